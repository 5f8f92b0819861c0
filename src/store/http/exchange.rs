//! One request and its answer, bounded in time and size, with its failures in words.
//!
//! [`Exchange`] sends requests for one store and reads answers; [`Exchange::refusal`] turns a status into an error that says whether
//! asking again helps. What a store does with a status (404 is "missing" to most) is its own affair.
//!
//! Invariants: no answer is read beyond the bytes allowed; a request ends within the store's timeout, body included, and a body
//! that stands still ends sooner; no error holds more of a URL than its caller named.

use std::error::Error;
use std::io;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use jiff::Timestamp;
use jiff::fmt::rfc2822::DateTimeParser;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, RETRY_AFTER};
use reqwest::{RequestBuilder, Response, StatusCode};

use crate::store::retry::{Failure, RetryPolicy};
use crate::store::{StoreError, StoreOptions};

/// The longest a body may stand still.
const MAX_STALL: Duration = Duration::from_secs(10);

/// How much of a body is made room for before it has come.
const MAX_EARLY_CAPACITY: u64 = 4 << 20;

/// How much of a refusal's text is read, and how much of its first line is shown.
const MAX_REFUSAL_BYTES: u64 = 16 << 10;
const MAX_SHOWN_CHARS: usize = 200;

/// The requests of one store.
#[derive(Debug, Clone)]
pub(crate) struct Exchange {
    /// Connections.
    pub client: reqwest::Client,
    /// The store's name in errors.
    pub name: String,
    /// What is done about failures that can pass.
    pub retry: RetryPolicy,
    /// The longest a request may take.
    pub timeout: Duration,
}

impl Exchange {
    /// The requests of a store of this name.
    ///
    /// # Errors
    /// Those of [`super::client()`].
    pub fn new(options: &StoreOptions, name: String) -> Result<Self, StoreError> {
        let client = super::client(options, &name)?;
        Ok(Self { client, name, retry: options.retry, timeout: options.request_timeout })
    }

    /// Sends a request, and gives what it was answered, whatever the status.
    pub async fn send(&self, request: RequestBuilder, object: &str) -> Result<Response, Failure> {
        request.timeout(self.timeout).send().await.map_err(|error| self.failure(&error, object))
    }

    /// All of a body of at most `max_bytes`; what more there is, is not read. `limit` says what the bound is in an error.
    pub async fn body(&self, response: Response, object: &str, max_bytes: u64, limit: &str) -> Result<Bytes, Failure> {
        let announced = content_length(response.headers());
        if let Some(n) = announced.filter(|n| *n > max_bytes) {
            return Err(self.permanent(object, format!("the answer has {n} bytes, more than {limit}")));
        }
        let capacity = announced.unwrap_or(0).min(MAX_EARLY_CAPACITY) as usize;
        // One buffer of its own: pieces of the connection's buffers would keep those alive as long as the chunk.
        let mut bytes = Vec::with_capacity(capacity);
        let mut response = response;
        let stall = self.timeout.min(MAX_STALL);
        loop {
            let piece = match tokio::time::timeout(stall, response.chunk()).await {
                Ok(Ok(Some(piece))) => piece,
                Ok(Ok(None)) => return Ok(bytes.into()),
                Ok(Err(error)) => return Err(self.failure(&error, object)),
                Err(_) => {
                    let n = bytes.len();
                    let reason = format!("the answer stopped after {n} bytes: nothing more for {}", seconds(stall));
                    return Err(StoreError::transient(&self.name, object, reason).into());
                }
            };
            if (bytes.len() + piece.len()) as u64 > max_bytes {
                return Err(
                    self.permanent(object, format!("the answer has more than {max_bytes} bytes, more than {limit}"))
                );
            }
            bytes.extend_from_slice(&piece);
        }
    }

    /// The error for an answer that is none of those hoped for: its status, and the first line of its text if there is one.
    pub async fn refusal(&self, response: Response, object: &str) -> Failure {
        let content_type = text(response.headers(), CONTENT_TYPE);
        let words = match content_type.is_some_and(|kind| kind.contains("html")) {
            true => title,
            false => first_line,
        };
        self.refusal_in(response, object, words).await
    }

    /// The same, with what is to be shown of the answer's text picked by `words`.
    pub async fn refusal_in(&self, response: Response, object: &str, words: fn(&str) -> Option<String>) -> Failure {
        let status = response.status();
        let retry_after = text(response.headers(), RETRY_AFTER).and_then(|value| retry_after(value, SystemTime::now()));
        let mut reason = match status.canonical_reason() {
            Some(words) => format!("{} {words}", status.as_u16()),
            None => status.as_u16().to_string(),
        };
        if status.is_redirection() {
            reason.push_str(", a redirect that is not followed");
        }
        let body = self.body(response, object, MAX_REFUSAL_BYTES, "a text should have").await.unwrap_or_default();
        let shown = std::str::from_utf8(&body).ok().and_then(words).and_then(|text| presentable(&text));
        if let Some(text) = shown.filter(|text| !reason.contains(text.as_str())) {
            reason = match text.starts_with(status.as_str()) {
                // The title of a page says the status again, in words of its own.
                true => text,
                false => format!("{reason}: {text}"),
            };
        }
        let is_transient = can_pass(status);
        Failure { error: StoreError { is_transient, ..StoreError::new(&self.name, object, reason) }, retry_after }
    }

    /// Reads what stands behind an answer that is clear by its status, if it is little, so that the connection can be used again.
    pub async fn discard(&self, response: Response, object: &str) {
        if content_length(response.headers()).is_some_and(|n| n > 0 && n <= MAX_REFUSAL_BYTES) {
            // Nobody needs it, so nobody misses it.
            drop(self.body(response, object, MAX_REFUSAL_BYTES, "a text should have").await);
        }
    }

    /// An error that asking again does not cure.
    pub fn permanent(&self, object: &str, reason: impl ToString) -> Failure {
        StoreError::new(&self.name, object, reason).into()
    }

    /// The error for a request without an answer, or an answer that was cut off.
    pub fn failure(&self, error: &reqwest::Error, object: &str) -> Failure {
        let cause = root_cause(error);
        if error.is_builder() || error.is_redirect() {
            return self.permanent(object, cause);
        }
        if let Some(tls) = find::<rustls::Error>(error) {
            let hint = match tls.to_string() {
                text if text.contains("UnknownIssuer") => " (give its issuer's certificate as ca-cert)",
                text if text.contains("CaUsedAsEndEntity") => {
                    " (the server uses a CA's certificate as its own; it needs one with CA:FALSE)"
                }
                _ => "",
            };
            // A certificate is not better the next time; a connection that was broken may be.
            return match tls {
                rustls::Error::InvalidCertificate(_) | rustls::Error::AlertReceived(_) => {
                    self.permanent(object, format!("TLS: {tls}{hint}"))
                }
                _ => StoreError::transient(&self.name, object, format!("TLS: {tls}")).into(),
            };
        }
        let reason = match (error.is_timeout(), error.is_connect()) {
            (true, true) => {
                format!("cannot connect: no answer within {}", seconds(self.timeout.min(super::MAX_CONNECT_TIMEOUT)))
            }
            (true, false) => format!("not answered in full within {}", seconds(self.timeout)),
            (false, true) => format!("cannot connect: {cause}"),
            (false, false) if error.is_body() || error.is_decode() => format!("the answer was cut off: {cause}"),
            (false, false) => format!("the connection broke: {cause}"),
        };
        StoreError::transient(&self.name, object, reason).into()
    }
}

/// Whether a request with this status can succeed later.
pub(crate) fn can_pass(status: StatusCode) -> bool {
    status == StatusCode::REQUEST_TIMEOUT || status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error()
}

/// Whether a status says that there is no such object.
pub(crate) fn is_missing(status: StatusCode) -> bool {
    matches!(status, StatusCode::NOT_FOUND | StatusCode::GONE)
}

/// A header as text.
pub(crate) fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok().map(str::trim)
}

/// The length a header announces, which for HEAD is not that of the answer.
pub(crate) fn content_length(headers: &HeaderMap) -> Option<u64> {
    text(headers, reqwest::header::CONTENT_LENGTH)?.parse().ok()
}

/// A date as HTTP has it (RFC 9110, 5.6.7).
pub(crate) fn http_date(text: &str) -> Option<SystemTime> {
    let timestamp: Timestamp = DateTimeParser::new().parse_timestamp(text).ok()?;
    Some(timestamp.into())
}

/// How long the server asks to be left alone: seconds, or a date (RFC 9110, 10.2.3).
fn retry_after(text: &str, now: SystemTime) -> Option<Duration> {
    match text.trim().parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => Some(http_date(text)?.duration_since(now).unwrap_or(Duration::ZERO)),
    }
}

/// What lies at the bottom of an error, without numbers of the system and without URLs.
pub(crate) fn root_cause(error: &reqwest::Error) -> String {
    let mut deepest: &(dyn Error + 'static) = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    if let Some(error) = deepest.downcast_ref::<io::Error>() {
        return crate::store::local::plain_words(error);
    }
    if deepest.is::<reqwest::Error>() {
        // It is `error` itself: one that has no cause names the URL.
        return match error.is_timeout() {
            true => "no answer in time".to_owned(),
            false => "the request cannot be made".to_owned(),
        };
    }
    deepest.to_string()
}

/// An error among the causes of another.
fn find<'a, E: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a E> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        // An error inside an io::Error is not its source, but what it wraps; connectors wrap twice.
        if let Some(wrapped) = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            return find(wrapped);
        }
        next = error.source();
    }
    None
}

fn seconds(span: Duration) -> String {
    match span.subsec_millis() {
        0 => format!("{} s", span.as_secs()),
        _ => format!("{} ms", span.as_millis()),
    }
}

/// The first line of a text that has something in it.
fn first_line(text: &str) -> Option<String> {
    text.lines().find(|line| !line.trim().is_empty()).map(str::to_owned)
}

/// The title of a page.
fn title(page: &str) -> Option<String> {
    Some(page.split_once("<title>")?.1.split_once("</title>")?.0.to_owned())
}

/// A text that is fit to be shown in a line.
fn presentable(text: &str) -> Option<String> {
    let text = text.trim();
    (!text.is_empty() && !text.chars().any(char::is_control)).then(|| text.chars().take(MAX_SHOWN_CHARS).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        assert_eq!(now, SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777));
        for (text, wait) in [
            ("0", Some(0)),
            (" 120 ", Some(120)),
            ("Sun, 06 Nov 1994 08:50:00 GMT", Some(23)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", Some(0)),
            ("soon", None),
            ("-1", None),
        ] {
            assert_eq!(retry_after(text, now), wait.map(Duration::from_secs), "{text}");
        }
    }

    #[test]
    fn a_refusal_is_told_by_one_line() {
        let shown = |words: fn(&str) -> Option<String>, text: &str| words(text).and_then(|text| presentable(&text));
        assert_eq!(shown(first_line, "\n chunk abc not found\nmore").as_deref(), Some("chunk abc not found"));
        assert_eq!(shown(title, "<html><title>400 No certificate</title>").as_deref(), Some("400 No certificate"));
        for (words, text) in [(title as fn(&str) -> _, "<html>none"), (first_line, ""), (first_line, "a\x1b[31mb")] {
            assert_eq!(shown(words, text), None);
        }
        assert_eq!(shown(first_line, &"ä".repeat(5000)).unwrap().chars().count(), MAX_SHOWN_CHARS);
    }
}
