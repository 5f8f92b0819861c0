//! One line a request: `2024/05/01 12:00:00 Client: 127.0.0.1:5000, Request: GET /6a1d/6a1d….cacnk, Response: 200`.
//!
//! The path only is written: a query, or the name and password of a full URL, may hold secrets.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use hyper::{Method, StatusCode};

/// Where lines go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogTarget {
    /// Standard error.
    Stderr,
    /// The end of a file, which is made if it is not there.
    File(PathBuf),
}

/// An open log.
#[derive(Debug)]
pub(super) struct AccessLog {
    target: LogTarget,
    /// Held over the write of one line, so that lines do not mix.
    file: Mutex<Option<File>>,
}

impl AccessLog {
    /// Opens a log.
    pub(super) fn open(target: LogTarget) -> io::Result<Self> {
        let file = match &target {
            LogTarget::Stderr => None,
            LogTarget::File(path) => Some(append(path)?),
        };
        Ok(Self { target, file: Mutex::new(file) })
    }

    /// Opens the file again: who rotates logs has moved the old one away.
    pub(super) fn reopen(&self) -> io::Result<()> {
        if let LogTarget::File(path) = &self.target {
            let file = append(path)?;
            *self.file.lock().unwrap_or_else(PoisonError::into_inner) = Some(file);
        }
        Ok(())
    }

    /// Writes a line. A log that cannot be written (a full disk) is no reason to serve nothing.
    pub(super) fn write(&self, client: SocketAddr, method: &Method, path: &str, status: StatusCode) {
        let time = jiff::Zoned::now().strftime("%Y/%m/%d %H:%M:%S");
        let line = format!("{time} Client: {client}, Request: {method} {path}, Response: {}\n", status.as_u16());
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = match &mut *file {
            Some(file) => file.write_all(line.as_bytes()),
            None => io::stderr().write_all(line.as_bytes()),
        };
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
}
