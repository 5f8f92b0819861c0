//! The bad network that other tests use does what it says.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use reqwest::{Client, StatusCode};
use tokio::net::TcpListener;

use crate::support::proxy::{FaultProxy, Mode, ProxyFault, chosen};

/// The server's answer to GET: 100 kB, longer than what is written at once.
fn content() -> Bytes {
    (0..100_000u32).map(|i| (i % 251) as u8).collect::<Vec<_>>().into()
}

/// A server: GET gives [`content`], in chunks below `/chunked`; PUT gives back what was put, with the request's path.
async fn upstream() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service = hyper::service::service_fn(answer);
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        }
    });
    address
}

async fn answer(request: Request<Incoming>) -> Result<Response<BoxBody<Bytes, Infallible>>, Infallible> {
    if request.uri().path().starts_with("/chunked") {
        let frames: Vec<Result<_, Infallible>> =
            content().chunks(30_000).map(|piece| Ok(Frame::data(Bytes::copy_from_slice(piece)))).collect();
        return Ok(Response::new(StreamBody::new(stream::iter(frames)).boxed()));
    }
    let body = match *request.method() {
        Method::PUT => {
            let path = request.uri().to_string();
            let sent = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
            [path.as_bytes(), &sent].concat().into()
        }
        _ => content(),
    };
    Ok(Response::new(Full::new(body).boxed()))
}

fn client() -> Client {
    // Another test may have done it before.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Client::builder().no_proxy().build().unwrap()
}

/// A proxy that does this to its second request and nothing to the others.
async fn second(fault: ProxyFault) -> FaultProxy {
    FaultProxy::start(upstream().await, move |n, _| if n == 1 { fault } else { ProxyFault::None })
}

async fn get(client: &Client, proxy: &FaultProxy, path: &str) -> reqwest::Result<(StatusCode, Bytes)> {
    let response = client.get(proxy.url() + path).send().await?;
    Ok((response.status(), response.bytes().await?))
}

/// Makes three requests, of which the first and last must be answered rightly; gives the second one's answer.
async fn second_of_three(proxy: &FaultProxy) -> reqwest::Result<(StatusCode, Bytes)> {
    let client = client();
    let right = (StatusCode::OK, content());
    assert_eq!(get(&client, proxy, "/a").await.unwrap(), right);
    // A POST, because a GET whose kept connection broke may be asked again by the client itself.
    let answer = client.post(proxy.url() + "/b?query").send().await;
    let answer = match answer {
        Ok(response) => {
            let status = response.status();
            response.bytes().await.map(|body| (status, body))
        }
        Err(error) => Err(error),
    };
    assert_eq!(get(&client, proxy, "/a").await.unwrap(), right);
    assert_eq!((proxy.n_requests(), proxy.n_requests_of("/a"), proxy.n_requests_of("/b")), (3, 2, 1));
    answer
}

#[tokio::test]
async fn without_faults_nothing_changes_and_connections_are_kept() {
    let proxy = FaultProxy::start(upstream().await, |_, _| ProxyFault::None);
    let client = client();
    for path in ["/", "/chunked", "/x?y=z"] {
        assert_eq!(get(&client, &proxy, path).await.unwrap(), (StatusCode::OK, content()));
    }
    assert_eq!(proxy.sent_bytes(), 300_000);
    let head = client.head(proxy.url()).send().await.unwrap();
    assert_eq!(head.headers()["content-length"], "100000");
    let long = Bytes::from(vec![7; 3_000_000]);
    let chunked = reqwest::Body::wrap_stream(stream::iter([Ok::<_, Infallible>(long.clone())]));
    for body in [reqwest::Body::from(long.clone()), chunked] {
        let put =
            client.put(proxy.url() + "/p?q=%20").header("expect", "100-continue").body(body).send().await.unwrap();
        assert_eq!(put.bytes().await.unwrap(), [b"/p?q=%20", &long[..]].concat());
    }
    assert_eq!((proxy.n_requests(), proxy.n_connections()), (6, 1));
}

#[tokio::test]
async fn latency_delays_a_right_answer() {
    let span = Duration::from_millis(50);
    let proxy = second(ProxyFault::Latency(span)).await;
    let start = Instant::now();
    assert_eq!(second_of_three(&proxy).await.unwrap(), (StatusCode::OK, content()));
    assert!(start.elapsed() >= span);
}

#[tokio::test]
async fn resets_and_truncation_break_the_request_only() {
    let proxy = second(ProxyFault::Reset).await;
    let error = second_of_three(&proxy).await.unwrap_err();
    assert!(error.is_request() && format!("{error:?}").contains("ConnectionReset"), "{error:?}");
    assert_eq!(proxy.sent_bytes(), 200_000);
    for fault in [ProxyFault::ResetInBody, ProxyFault::Truncate] {
        let proxy = second(fault).await;
        let error = format!("{:?}", second_of_three(&proxy).await.unwrap_err());
        assert_eq!(error.contains("ConnectionReset"), fault == ProxyFault::ResetInBody, "{error}");
        assert_eq!(proxy.sent_bytes(), 250_000);
    }
}

#[tokio::test]
async fn wrong_bytes_are_as_many_and_nearly_right() {
    let proxy = second(ProxyFault::WrongBytes).await;
    let (status, body) = second_of_three(&proxy).await.unwrap();
    assert_eq!((status, body.len()), (StatusCode::OK, content().len()));
    let right = content();
    let wrong: Vec<usize> = (0..body.len()).filter(|&i| body[i] != right[i]).collect();
    assert_eq!(wrong, [50_000]);
}

#[tokio::test]
async fn a_status_is_told_with_retry_after() {
    let proxy = second(ProxyFault::Status { code: 503, retry_after: Some(7) }).await;
    let (status, _) = second_of_three(&proxy).await.unwrap();
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    proxy.set_script(|_, path| match path {
        "/busy" => ProxyFault::Status { code: 429, retry_after: Some(9) },
        _ => ProxyFault::Status { code: 403, retry_after: None },
    });
    let busy = client().get(proxy.url() + "/busy").send().await.unwrap();
    assert_eq!((busy.status().as_u16(), busy.headers()["retry-after"].as_bytes()), (429, &b"9"[..]));
    let head = client().head(proxy.url()).send().await.unwrap();
    assert_eq!((head.status().as_u16(), head.headers().get("retry-after")), (403, None));
}

#[tokio::test]
async fn a_trickle_takes_its_time() {
    let proxy = second(ProxyFault::Trickle(500_000)).await;
    let start = Instant::now();
    assert_eq!(second_of_three(&proxy).await.unwrap(), (StatusCode::OK, content()));
    assert!(start.elapsed() >= Duration::from_millis(200));
}

#[tokio::test]
async fn a_black_hole_swallows_a_request_until_the_proxy_is_dropped() {
    let proxy = second(ProxyFault::BlackHole).await;
    let client = client();
    get(&client, &proxy, "/").await.unwrap();
    let lost = client.get(proxy.url()).timeout(Duration::from_millis(100)).send().await;
    assert!(lost.unwrap_err().is_timeout());
    get(&client, &proxy, "/").await.unwrap();

    proxy.set_script(|_, _| ProxyFault::BlackHole);
    let url = proxy.url();
    let waiting = tokio::spawn(client.post(url).send());
    seen(&proxy, 4).await;
    drop(proxy);
    assert!(waiting.await.unwrap().is_err());
}

/// Waits until the proxy has seen so many requests.
async fn seen(proxy: &FaultProxy, n: u64) {
    while proxy.n_requests() < n {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn the_network_goes_down_and_comes_back() {
    let proxy = FaultProxy::start(upstream().await, |_, path| match path {
        "/slow" => ProxyFault::Trickle(500_000),
        _ => ProxyFault::None,
    });
    let client = client();
    // One connection in the middle of a body, one that is kept, one that is new.
    let mut under_way = client.get(proxy.url() + "/slow").send().await.unwrap();
    assert!(under_way.chunk().await.unwrap().is_some());
    proxy.set_mode(Mode::BlackHole);
    let n_sent = proxy.sent_bytes();
    let waiting = tokio::spawn(client.get(proxy.url() + "/waiting").send());
    seen(&proxy, 2).await;
    let lost = client.get(proxy.url()).timeout(Duration::from_millis(100)).send().await;
    assert!(lost.unwrap_err().is_timeout());
    // A piece may have been on its way.
    assert!(proxy.sent_bytes() <= n_sent + 50_000, "{} {n_sent}", proxy.sent_bytes());
    assert!(!waiting.is_finished());
    proxy.set_mode(Mode::Up);
    assert_eq!(waiting.await.unwrap().unwrap().bytes().await.unwrap(), content());
    while under_way.chunk().await.unwrap().is_some() {}
    assert_eq!(get(&client, &proxy, "/").await.unwrap().1, content());

    proxy.set_mode(Mode::Reset);
    for _ in 0..3 {
        assert!(get(&client, &proxy, "/").await.is_err());
    }
    proxy.set_mode(Mode::Up);
    assert_eq!(get(&client, &proxy, "/").await.unwrap().1, content());
}

#[tokio::test]
async fn a_raw_proxy_carries_bytes_and_obeys_its_mode() {
    let proxy = FaultProxy::start_raw(upstream().await);
    let client = client();
    assert_eq!(get(&client, &proxy, "/").await.unwrap().1, content());
    assert!(proxy.sent_bytes() > 100_000);
    proxy.set_mode(Mode::BlackHole);
    let waiting = tokio::spawn(client.get(proxy.url()).send());
    let lost = client.get(proxy.url()).timeout(Duration::from_millis(100)).send().await;
    assert!(lost.unwrap_err().is_timeout());
    assert!(!waiting.is_finished());
    proxy.set_mode(Mode::Up);
    assert_eq!(waiting.await.unwrap().unwrap().bytes().await.unwrap(), content());
    proxy.set_mode(Mode::Reset);
    assert!(get(&client, &proxy, "/").await.is_err());
}

#[tokio::test]
async fn a_server_that_is_gone_is_a_broken_connection() {
    let gone = ([127, 0, 0, 1], crate::support::server::free_port()).into();
    let proxy = FaultProxy::start(gone, |_, _| ProxyFault::None);
    assert!(get(&client(), &proxy, "/").await.is_err());
}

#[test]
fn chance_is_fair_and_repeats() {
    for percent in [0, 5, 20, 100] {
        let picked = |seed: u64| (0..10_000).filter(|&n| chosen(seed, n, percent)).collect::<Vec<_>>();
        assert_eq!(picked(1), picked(1));
        assert!(picked(1).len().abs_diff(percent as usize * 100) <= 150, "{percent}: {}", picked(1).len());
        assert!(percent % 100 == 0 || picked(1) != picked(2));
    }
}
