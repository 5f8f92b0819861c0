//! One request: who asks, what for, how much comes with it, and what is written down of it.

use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::time::Instant;

use bytes::Bytes;
use futures_util::FutureExt;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::header::{AUTHORIZATION, EXPECT, HeaderValue, WWW_AUTHENTICATE};
use hyper::http::request::Parts;
use hyper::{Method, Request, StatusCode};
use subtle::ConstantTimeEq;

use super::{Answer, Body, Shared};
use crate::store::Secret;

/// What answers as long as the server does. Neither can be the name of a chunk.
const HEALTH_PATH: &str = "/healthz";
/// The numbers. An index of this name can be had as `//metrics`.
const METRICS_PATH: &str = "/metrics";

/// Bytes that one permit of the upload budget stands for.
const PERMIT_BYTES: u64 = 1 << 10;

/// How much of the body of a refused request is read and thrown away, in bytes: many clients look for the answer only after they have sent
/// everything, and a connection that is closed on them before takes the answer with it.
const MAX_DISCARD_BYTES: usize = 1 << 20;

/// How many permits of the upload budget so many bytes take.
pub(super) fn upload_permits(n_bytes: u64) -> u32 {
    u32::try_from(n_bytes.div_ceil(PERMIT_BYTES)).unwrap_or(u32::MAX)
}

/// Answers a request, counts it and writes it down.
pub(super) async fn handle(shared: &Shared, request: Request<Incoming>, client: SocketAddr) -> Answer {
    let start = Instant::now();
    let _in_flight = shared.metrics.in_flight();
    let (head, body) = request.into_parts();
    // A panic is one request's failure, not the connection's.
    let answer = match AssertUnwindSafe(answer(shared, &head, body)).catch_unwind().await {
        Ok(answer) => answer,
        Err(_) => Answer::text(StatusCode::INTERNAL_SERVER_ERROR, "internal error"),
    };
    shared.metrics.answered(&head.method, answer.status, start.elapsed());
    if let Some(log) = &shared.access_log {
        log.write(client, &head.method, head.uri.path(), answer.status);
    }
    match head.method {
        Method::HEAD => answer.without_body(),
        _ => answer,
    }
}

async fn answer(shared: &Shared, head: &Parts, body: Incoming) -> Answer {
    if let Some(wanted) = &shared.authorization
        && !is_authorized(wanted, head)
    {
        return refuse(shared, head, body, unauthorized(wanted)).await;
    }
    if let Some(answer) = reserved(shared, head) {
        return refuse(shared, head, body, answer).await;
    }
    let max_bytes = match shared.service.admit(head) {
        Ok(max_bytes) => max_bytes,
        Err(answer) => return refuse(shared, head, body, *answer).await,
    };
    let declared = body.size_hint().lower();
    if max_bytes > 0 && declared > max_bytes {
        return refuse(shared, head, body, too_large(max_bytes)).await;
    }
    let reading = async {
        if max_bytes == 0 {
            return Ok((None, Bytes::new()));
        }
        // A body that does not tell its length may have all it is allowed to.
        let n_bytes = body.size_hint().exact().unwrap_or(max_bytes).min(shared.limits.upload_budget_bytes);
        let permit = shared.uploads.acquire_many(upload_permits(n_bytes)).await;
        let limit = usize::try_from(max_bytes).unwrap_or(usize::MAX);
        match Limited::new(body, limit).collect().await {
            Ok(collected) => Ok((permit.ok(), collected.to_bytes())),
            Err(error) if error.is::<LengthLimitError>() => Err(too_large(max_bytes)),
            Err(_) => Err(Answer::text(StatusCode::BAD_REQUEST, "the body ended early")),
        }
    };
    let timeout = shared.limits.request_timeout;
    let (_permit, body) = match tokio::time::timeout(timeout, reading).await {
        Ok(Ok(read)) => read,
        Ok(Err(answer)) => return answer,
        Err(_) => return Answer::text(StatusCode::REQUEST_TIMEOUT, "the body took too long"),
    };
    let answering = async {
        let _permit = shared.requests.acquire().await;
        shared.service.answer(head, body).await
    };
    match tokio::time::timeout(timeout, answering).await {
        Ok(answer) => answer,
        Err(_) => Answer::text(StatusCode::GATEWAY_TIMEOUT, "the answer took too long"),
    }
}

/// Whether a request has the right header, in a time that tells nothing of how much of it is right.
fn is_authorized(wanted: &Secret, head: &Parts) -> bool {
    let found = head.headers.get(AUTHORIZATION).map_or(&b""[..], HeaderValue::as_bytes);
    found.ct_eq(wanted.expose().as_bytes()).into()
}

fn unauthorized(wanted: &Secret) -> Answer {
    let answer = Answer::text(StatusCode::UNAUTHORIZED, "not authorized");
    // The scheme is no secret; a value without one is all secret.
    match wanted.expose().split_once(' ') {
        Some((scheme @ ("Basic" | "Bearer"), _)) => {
            let challenge = HeaderValue::from_str(&format!("{scheme} realm=\"caifs\""));
            answer.with(WWW_AUTHENTICATE, challenge.expect("a scheme of letters makes a header"))
        }
        _ => answer,
    }
}

fn reserved(shared: &Shared, head: &Parts) -> Option<Answer> {
    let path = head.uri.path();
    if path != HEALTH_PATH && path != METRICS_PATH {
        return None;
    }
    Some(match head.method {
        Method::GET | Method::HEAD if path == HEALTH_PATH => Answer::text(StatusCode::OK, "ok"),
        Method::GET | Method::HEAD => {
            let mut text = shared.metrics.render();
            shared.service.render_metrics(&mut text);
            Answer::content("text/plain; version=0.0.4; charset=utf-8", Body::Bytes(text.into()))
        }
        _ => Answer::method_not_allowed("GET, HEAD"),
    })
}

fn too_large(max_bytes: u64) -> Answer {
    Answer::text(StatusCode::PAYLOAD_TOO_LARGE, format!("a body can have {max_bytes} bytes at the most"))
}

/// Answers without the body, some of which is read all the same (see [`MAX_DISCARD_BYTES`]) unless its sender waits to be told to send it.
async fn refuse(shared: &Shared, head: &Parts, body: Incoming, answer: Answer) -> Answer {
    if !body.is_end_stream()
        && !head.headers.contains_key(EXPECT)
        && body.size_hint().lower() <= MAX_DISCARD_BYTES as u64
    {
        let mut rest = Limited::new(body, MAX_DISCARD_BYTES);
        let discarding = async { while let Some(Ok(_)) = rest.frame().await {} };
        // However it ends, the answer is the same.
        let _ = tokio::time::timeout(shared.limits.header_timeout, discarding).await;
    }
    answer
}
