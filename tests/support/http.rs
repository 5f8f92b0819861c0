//! As much HTTP/1.1 as a proxy must read: heads and bodies of messages, from a stream and what was read of it too much.

use std::io::{self, ErrorKind};

use bytes::BytesMut;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

/// The longest head of a message that is read.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// How long a body is.
pub(super) enum BodySize {
    Chunked,
    Bytes(usize),
    ToTheEnd,
}

/// The head of a request or response.
pub(super) struct Head {
    pub(super) start_line: String,
    pub(super) fields: Vec<(String, String)>,
}

impl Head {
    /// Reads a head; `None` if the connection ends before it.
    pub(super) async fn read(stream: &mut TcpStream, unread: &mut BytesMut) -> io::Result<Option<Self>> {
        let mut n_seen = 0usize;
        let end = loop {
            let found = unread[n_seen..].windows(4).position(|bytes| bytes == b"\r\n\r\n");
            if let Some(position) = found {
                break n_seen + position;
            }
            if unread.len() > MAX_HEAD_BYTES {
                return Err(ErrorKind::InvalidData.into());
            }
            n_seen = unread.len().saturating_sub(3);
            if stream.read_buf(unread).await? == 0 {
                return if unread.is_empty() { Ok(None) } else { Err(ErrorKind::UnexpectedEof.into()) };
            }
        };
        let bytes = unread.split_to(end + 4);
        let text = String::from_utf8_lossy(&bytes[..end]);
        let mut lines = text.split("\r\n");
        let start_line = lines.next().unwrap_or_default().to_owned();
        let field = |line: &str| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_owned(), value.trim().to_owned()))
        };
        Ok(Some(Self { start_line, fields: lines.filter_map(field).collect() }))
    }

    pub(super) fn value(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// Removes a field; its value if it was there.
    pub(super) fn take(&mut self, name: &str) -> Option<String> {
        let position = self.fields.iter().position(|(key, _)| key.eq_ignore_ascii_case(name))?;
        Some(self.fields.remove(position).1)
    }

    pub(super) fn set(&mut self, name: &str, value: impl ToString) {
        self.take(name);
        self.fields.push((name.to_owned(), value.to_string()));
    }

    pub(super) fn body_size(&self) -> BodySize {
        if self.value("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
            return BodySize::Chunked;
        }
        self.value("content-length").and_then(|value| value.parse().ok()).map_or(BodySize::ToTheEnd, BodySize::Bytes)
    }

    /// The code of a response.
    pub(super) fn status(&self) -> &str {
        self.start_line.split(' ').nth(1).unwrap_or_default()
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut text = format!("{}\r\n", self.start_line);
        for (name, value) in &self.fields {
            text.extend([name, ": ", value, "\r\n"]);
        }
        text.push_str("\r\n");
        text.into_bytes()
    }
}

pub(super) async fn read_exactly(stream: &mut TcpStream, unread: &mut BytesMut, n: usize) -> io::Result<Vec<u8>> {
    while unread.len() < n {
        unread.reserve(n - unread.len());
        if stream.read_buf(unread).await? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(unread.split_to(n).to_vec())
}

async fn read_line(stream: &mut TcpStream, unread: &mut BytesMut) -> io::Result<String> {
    loop {
        if let Some(end) = unread.windows(2).position(|bytes| bytes == b"\r\n") {
            let line = unread.split_to(end + 2);
            return Ok(String::from_utf8_lossy(&line[..end]).into_owned());
        }
        if unread.len() > MAX_HEAD_BYTES || stream.read_buf(unread).await? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
    }
}

pub(super) async fn read_chunked(stream: &mut TcpStream, unread: &mut BytesMut) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = read_line(stream, unread).await?;
        let size = line.split(';').next().unwrap_or_default().trim();
        let size = usize::from_str_radix(size, 16).map_err(|_| ErrorKind::InvalidData)?;
        if size == 0 {
            break;
        }
        body.extend(read_exactly(stream, unread, size).await?);
        read_exactly(stream, unread, 2).await?;
    }
    // Trailers are dropped.
    while !read_line(stream, unread).await?.is_empty() {}
    Ok(body)
}
