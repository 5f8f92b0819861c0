//! An HTTP client that sends exactly what it is told.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Nothing here takes as long; what does hangs.
pub const LIMIT: Duration = Duration::from_secs(60);

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    pub status: u16,
    /// In lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

pub fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("the server listens");
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    stream
}

/// Everything up to the end of the connection.
pub fn rest_of(mut stream: TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("the connection ends in good order");
    bytes
}

/// One answer, read to the end of its connection.
pub fn reply_of(stream: TcpStream) -> Reply {
    parse(&rest_of(stream))
}

pub fn parse(bytes: &[u8]) -> Reply {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").expect("the head has an end");
    let head = std::str::from_utf8(&bytes[..end]).unwrap();
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers = lines
        .map(|line| line.split_once(": ").unwrap())
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    Reply { status, headers, body: bytes[end + 4..].to_vec() }
}

/// A request with a connection of its own.
pub fn ask(address: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
    let mut stream = connect(address);
    stream.write_all(head(method, path, headers, body.len() as u64).as_bytes()).unwrap();
    stream.write_all(body).unwrap();
    reply_of(stream)
}

/// The head of a request that ends the connection.
pub fn head(method: &str, path: &str, headers: &[(&str, &str)], n_bytes: u64) -> String {
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if n_bytes > 0 {
        head.push_str(&format!("Content-Length: {n_bytes}\r\n"));
    }
    head + "\r\n"
}

pub fn get(address: SocketAddr, path: &str) -> Reply {
    ask(address, "GET", path, &[], b"")
}

pub fn put(address: SocketAddr, path: &str, body: &[u8]) -> Reply {
    ask(address, "PUT", path, &[], body)
}
