//! `fake-gcs-server`: an emulator of Google Cloud Storage, which keeps its buckets in memory.

use std::io::{Read, Write};
use std::net::TcpStream;

use crate::support::peers::peer;
use crate::support::server::{Server, free_port};

/// A server with one empty bucket; `None` when there is no fake-gcs-server.
///
/// # Panics
/// When the bucket cannot be made.
pub fn start(bucket: &str) -> Option<Server> {
    let port = free_port();
    let mut command = peer("fake-gcs-server")?.command();
    command.args(["-scheme", "http", "-host", "127.0.0.1", "-backend", "memory", "-log-level", "error"]);
    // By this name the Google client of other programs reads objects.
    command.args(["-port", &port.to_string(), "-public-host", &format!("127.0.0.1:{port}")]);
    let server = Server::start(&mut command, port);
    let body = format!("{{\"name\":\"{bucket}\"}}");
    let mut stream = TcpStream::connect(server.address()).expect("it listens");
    write!(
        stream,
        "POST /storage/v1/b?project=x HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        server.address(),
        body.len()
    )
    .expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    Some(server)
}
