//! What both servers share: limits in time and number, the end in good order, the log and the numbers.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use caifs::chunk::codec::Form;
use caifs::digest::Digest;
use caifs::serve::chunk_server::{ChunkServer, ChunkServerConfig, Upstream};
use caifs::serve::http::{HttpConfig, Limits, Server};
use caifs::store::fault::{Fault, FaultStore};
use caifs::store::layout::Layout;
use caifs::store::{Store, WriteStore};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};

use super::client::{LIMIT, ask, connect, get, head, parse, put, reply_of, rest_of};
use super::{chunk_server, compressed, file_of, id_of, path_of, start, store_of};
use crate::support::scratch::Scratch;

const SHORT: Duration = Duration::from_millis(100);

/// A server inside the test, ended with it.
struct Inside {
    at: SocketAddr,
    runtime: Option<Runtime>,
    end: Option<oneshot::Sender<()>>,
    ended: Option<tokio::task::JoinHandle<()>>,
}

impl Inside {
    fn new(store: Arc<dyn Store>, writable: Option<Arc<dyn WriteStore>>, limits: Limits) -> Self {
        let config = ChunkServerConfig {
            layout: Layout::default(),
            digest: Digest::default(),
            verify_read: false,
            verify_write: true,
        };
        let service = Arc::new(ChunkServer::new(config, Upstream { store, cache: None, writable }, None));
        let runtime = Runtime::new().unwrap();
        let listen = vec!["127.0.0.1:0".to_owned()];
        let http = HttpConfig { listen, tls: None, authorization: None, access_log: None, limits };
        let server = runtime.block_on(Server::bind(http, service)).unwrap();
        let at = server.addresses().unwrap()[0];
        let (end, ending) = oneshot::channel();
        let (_, reloads) = mpsc::channel(1);
        let ended = runtime.spawn(server.run(async move { drop(ending.await) }, reloads));
        Self { at, runtime: Some(runtime), end: Some(end), ended: Some(ended) }
    }

    fn over(fault: Fault, limits: Limits) -> Self {
        let store = FaultStore::new("fault", move |_, _| fault);
        store.insert(id_of(b"x"), b"x");
        Self::new(Arc::new(store), None, limits)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn path() -> String {
    path_of(id_of(b"x")) + ".cacnk"
}

#[test]
fn who_does_not_finish_a_head_is_cut_off() {
    let server = Inside::over(Fault::None, Limits { header_timeout: SHORT, ..Limits::default() });
    for start in [&b""[..], b"GET", b"PRI * HTTP/2.0\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n"] {
        let mut stream = connect(server.at);
        stream.write_all(start).unwrap();
        assert_eq!(rest_of(stream), b"", "{start:?}");
    }
    // Nor by sending one byte after the other.
    let mut stream = connect(server.at);
    stream.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    let begun = Instant::now();
    while stream.write_all(b"X: y\r\n").is_ok() {
        assert!(begun.elapsed() < LIMIT, "it is not cut off");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn an_idle_connection_is_closed_and_a_kept_one_serves_again() {
    let server = Inside::over(Fault::None, Limits { idle_timeout: SHORT, ..Limits::default() });
    let mut stream = connect(server.at);
    let request = format!("GET {} HTTP/1.1\r\nHost: x\r\n\r\n", path());
    stream.write_all(request.repeat(2).as_bytes()).unwrap();
    let answers = rest_of(stream);
    assert_eq!(answers.windows(12).filter(|bytes| bytes == b"HTTP/1.1 200").count(), 2);
}

#[test]
fn a_store_that_does_not_answer_is_a_timeout_and_a_panic_is_one_requests_failure() {
    let limits = Limits { request_timeout: SHORT, ..Limits::default() };
    let server = Inside::over(Fault::Hang, limits);
    assert_eq!(get(server.at, &path()).status, 504);
    let server = Inside::over(Fault::Fail, Limits::default());
    assert_eq!(get(server.at, &path()).status, 500);
    assert_eq!(ask(server.at, "HEAD", &path(), &[], b"").status, 500);
    let server = Inside::over(Fault::Panic, Limits::default());
    assert_eq!(get(server.at, &path()).status, 500);
    assert_eq!(get(server.at, "/healthz").status, 200);
}

#[test]
fn an_upload_that_stops_is_given_up() {
    let scratch = Scratch::new();
    let store = Arc::new(store_of(&scratch.join("store"), Form::Compressed, &[]));
    let limits = Limits { request_timeout: SHORT, ..Limits::default() };
    let server = Inside::new(store.clone(), Some(store.clone()), limits);
    let mut stream = connect(server.at);
    stream.write_all(head("PUT", &path(), &[], 100).as_bytes()).unwrap();
    stream.write_all(b"not all").unwrap();
    assert_eq!(reply_of(stream).status, 408);
    // One that ends early is not stored either.
    let mut stream = connect(server.at);
    stream.write_all(head("PUT", &path(), &[], 100).as_bytes()).unwrap();
    stream.write_all(&compressed(b"x")).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let _ = rest_of(stream);
    assert!(!file_of(store.path(), id_of(b"x"), ".cacnk").exists());
}

#[test]
fn uploads_wait_for_room() {
    let scratch = Scratch::new();
    let store = Arc::new(store_of(&scratch.join("store"), Form::Compressed, &[]));
    let limits = Limits { upload_budget_bytes: 1024, ..Limits::default() };
    let server = Inside::new(store.clone(), Some(store), limits);
    // It takes all the room there is; that it is asked for its body tells that it has it.
    let body = compressed(b"x");
    let mut first = connect(server.at);
    first.write_all(head("PUT", &path(), &[("Expect", "100-continue")], body.len() as u64).as_bytes()).unwrap();
    first.read_exact(&mut [0; 25]).unwrap();
    let mut second = connect(server.at);
    second.write_all(head("PUT", &path(), &[], body.len() as u64).as_bytes()).unwrap();
    second.write_all(&body).unwrap();
    second.set_read_timeout(Some(SHORT)).unwrap();
    let waited = second.read(&mut [0; 1]).unwrap_err().kind();
    assert!(matches!(waited, ErrorKind::WouldBlock | ErrorKind::TimedOut), "{waited:?}");
    first.write_all(&body).unwrap();
    assert_eq!(reply_of(first).status, 200);
    second.set_read_timeout(Some(LIMIT)).unwrap();
    assert_eq!(reply_of(second).status, 200);
}

#[test]
fn connections_above_the_limit_wait() {
    let server = Inside::over(Fault::None, Limits { max_connections: 1, ..Limits::default() });
    let mut first = connect(server.at);
    let request = format!("GET {} HTTP/1.1\r\nHost: x\r\n\r\n", path());
    first.write_all(request.as_bytes()).unwrap();
    let mut start = [0; 12];
    first.read_exact(&mut start).unwrap();
    let mut second = connect(server.at);
    second.write_all(head("GET", &path(), &[], 0).as_bytes()).unwrap();
    second.set_read_timeout(Some(SHORT)).unwrap();
    let waited = second.read(&mut [0; 1]).unwrap_err().kind();
    assert!(matches!(waited, ErrorKind::WouldBlock | ErrorKind::TimedOut), "{waited:?}");
    drop(first);
    second.set_read_timeout(Some(LIMIT)).unwrap();
    assert_eq!(reply_of(second).status, 200);
}

#[test]
fn a_refused_upload_still_gets_its_answer_when_all_of_it_is_sent_first() {
    let scratch = Scratch::new();
    let server = chunk_server(&scratch.dir("store"), &[]);
    let reply = put(server.address(), &path(), &vec![7; 900_000]);
    assert_eq!(reply.status, 400);
    // Who asks before sending is told without being asked to send.
    let mut stream = connect(server.address());
    stream.write_all(head("PUT", &path(), &[("Expect", "100-continue")], 900_000).as_bytes()).unwrap();
    assert_eq!(reply_of(stream).status, 400);
}

/// Waits until nobody listens at an address any more.
fn until_closed(at: SocketAddr) {
    let start = Instant::now();
    while TcpStream::connect(at).is_ok() {
        assert!(start.elapsed() < LIMIT, "it still listens");
    }
}

#[test]
fn a_signal_ends_it_when_what_it_has_begun_is_done() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let scratch = Scratch::new();
        let store = scratch.dir("store");
        let mut server = chunk_server(&store, &["-w"]);
        let idle = connect(server.address());
        let body = compressed(b"x");
        let mut stream = connect(server.address());
        stream.write_all(head("PUT", &path(), &[("Expect", "100-continue")], body.len() as u64).as_bytes()).unwrap();
        // That it is asked for the body tells that the request has been begun.
        let mut asked = [0; 25];
        stream.read_exact(&mut asked).unwrap();
        assert_eq!(&asked, b"HTTP/1.1 100 Continue\r\n\r\n");
        kill(Pid::from_raw(server.pid()), signal).unwrap();
        until_closed(server.address());
        assert_eq!(rest_of(idle), b"");
        stream.write_all(&body).unwrap();
        assert_eq!(reply_of(stream).status, 200);
        let status = server.wait(LIMIT).expect("it ends");
        assert_eq!(status.code(), Some(0));
    }
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let scratch = Scratch::new();
    let mut server = chunk_server(&scratch.dir("store"), &["-w"]);
    let mut stream = connect(server.address());
    stream.write_all(head("PUT", &path(), &[("Expect", "100-continue")], 10).as_bytes()).unwrap();
    stream.read_exact(&mut [0; 25]).unwrap();
    let terminate = || kill(Pid::from_raw(server.pid()), Signal::SIGTERM).unwrap();
    terminate();
    until_closed(server.address());
    terminate();
    let status = server.wait(LIMIT).expect("it ends");
    assert_eq!(status.code(), Some(128 + 15));
}

#[test]
fn what_is_not_done_in_time_is_cut_off_at_the_end() {
    let mut server = Inside::over(Fault::Hang, Limits { drain_timeout: SHORT, ..Limits::default() });
    let mut stream = connect(server.at);
    stream.write_all(head("GET", &path(), &[], 0).as_bytes()).unwrap();
    let gauge = || get(server.at, "/metrics").text();
    let start = Instant::now();
    while !gauge().contains("caifs_http_requests_in_flight 2\n") {
        assert!(start.elapsed() < LIMIT, "the request is not begun");
    }
    drop(server.end.take());
    let (runtime, ended) = (server.runtime.take().unwrap(), server.ended.take().unwrap());
    runtime.block_on(ended).unwrap();
    runtime.shutdown_background();
    assert_eq!(rest_of(stream), b"");
}

#[test]
fn requests_are_logged_and_counted() {
    let scratch = Scratch::new();
    let dir = scratch.join("store");
    store_of(&dir, Form::Compressed, &[b"x"]);
    let log = scratch.join("log");
    let server = chunk_server(&dir, &["--log", log.to_str().unwrap()]);
    let at = server.address();
    assert_eq!(get(at, &(path() + "?token=secret")).status, 200);
    assert_eq!(put(at, &path(), b"x").status, 400);
    assert_eq!((get(at, "/healthz").status, get(at, "/healthz").text()), (200, "ok\n".to_owned()));
    assert_eq!(ask(at, "HEAD", "/metrics", &[], b"").status, 200);
    assert_eq!(ask(at, "POST", "/healthz", &[], b"").status, 405);

    let logged = fs::read_to_string(&log).unwrap();
    let lines: Vec<&str> = logged.lines().collect();
    assert_eq!(lines.len(), 6, "{logged}");
    let (time, rest) = lines[0].split_once(" Client: 127.0.0.1:").unwrap();
    assert!(jiff::civil::DateTime::strptime("%Y/%m/%d %H:%M:%S", time).is_ok(), "{time}");
    assert!(rest.ends_with(&format!(", Request: GET {}, Response: 200", path())), "{rest}");
    assert!(lines[1].ends_with(&format!(", Request: PUT {}, Response: 400", path())), "{}", lines[1]);

    let numbers = get(at, "/metrics");
    assert_eq!(numbers.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let numbers = numbers.text();
    for wanted in [
        "caifs_http_requests_total{method=\"GET\",status=\"200\"} 3",
        "caifs_http_requests_total{method=\"PUT\",status=\"400\"} 1",
        "caifs_http_requests_total{method=\"other\",status=\"405\"} 1",
        "caifs_http_request_duration_seconds_count 6",
        "caifs_http_requests_in_flight 1",
        "caifs_chunk_fetches_total 1",
        "caifs_chunk_store_errors_total 0",
    ] {
        assert!(numbers.lines().any(|line| line == wanted), "{wanted} is not in\n{numbers}");
    }
    for line in numbers.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').unwrap();
        assert!(name.starts_with("caifs_") && value.parse::<f64>().is_ok(), "{line}");
    }
}

#[test]
fn it_listens_on_several_addresses_and_logs_to_standard_error() {
    let scratch = Scratch::new();
    let second = crate::support::server::free_port();
    let errors = scratch.file("stderr", "");
    let server = start("chunk-server", |command| {
        command.args(["-l", &format!("localhost:{second}"), "--log", "-", "-s"]).arg(scratch.dir("store"));
        command.stderr(fs::OpenOptions::new().append(true).open(&errors).unwrap())
    });
    assert_eq!(get(server.address(), "/healthz").status, 200);
    let mut other = TcpStream::connect(("localhost", second)).unwrap();
    other.write_all(head("GET", "/healthz", &[], 0).as_bytes()).unwrap();
    assert_eq!(parse(&rest_of(other)).status, 200);
    let logged = fs::read_to_string(&errors).unwrap();
    assert_eq!(logged.matches("Request: GET /healthz, Response: 200\n").count(), 2, "{logged}");
}
