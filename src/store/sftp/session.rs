//! One session with a server: made, asked, and cut off.
//!
//! [`Target`] says who is meant, [`Session`] is a login there with SFTP started, [`Fault`] what can go wrong. Everything here blocks the
//! calling thread, but for connecting.

use std::fmt;
use std::io::{self, Read, Seek, SeekFrom};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use ssh2::{ErrorCode, File, FileStat, OpenFlags, OpenType, Sftp};

use super::super::location::SshLocation;
use super::super::options::StoreOptions;
use super::{auth, known_hosts};

/// The port of SSH servers.
pub const DEFAULT_PORT: u16 = 22;

/// The longest a connection may take to be made, whatever a request may take.
const MAX_CONNECT_TIME: Duration = Duration::from_secs(10);

/// The first read of a file whose size is not known. libssh2 asks four times as much ahead, in pieces of 30,000 bytes: a usual
/// chunk then comes in one round trip. Measured over 20 ms, 200 kB took 70 ms, and 110 ms with half of this; more only
/// adds requests behind the end of small chunks.
const FIRST_READ_BYTES: usize = 64 << 10;

/// The largest read: four times this is on its way at once. Measured over 20 ms, 64 MB took 0.9 s, and 10 s by reads of 32 KiB.
const MAX_READ_BYTES: usize = 512 << 10;

/// The most that is allocated before any of it has come.
const MAX_FIRST_ALLOCATION: u64 = 4 << 20;

/// How much later than the one who waits libssh2 gives up a call.
const GRACE: Duration = Duration::from_secs(1);

/// A connection in use or kept is asked whether it lives after this long without a word, so often, and so many times.
const KEEPALIVE_IDLE_SECONDS: u32 = 30;
const KEEPALIVE_INTERVAL_SECONDS: u32 = 10;
const KEEPALIVE_PROBES: u32 = 3;

/// Statuses of SFTP and errors of libssh2 that are told apart here.
mod code {
    pub const NO_SUCH_FILE: i32 = 2;
    pub const NO_CONNECTION: i32 = 6;
    pub const CONNECTION_LOST: i32 = 7;
    pub const OP_UNSUPPORTED: i32 = 8;
    pub const NO_SUCH_PATH: i32 = 10;
    /// libssh2: the answer was a status, or made no sense.
    pub const SFTP_PROTOCOL: i32 = -31;
    /// libssh2: no channel, or no subsystem.
    pub const CHANNEL_FAILURE: i32 = -21;
    pub const CHANNEL_REQUEST_DENIED: i32 = -22;
}

/// Why a piece of work failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The server's answer to a request; the session goes on. Its code is 0 where libssh2 does not tell.
    Status {
        /// The status.
        code: i32,
        /// The same in words.
        words: String,
    },
    /// What the server has cannot be used; the session goes on.
    Unfit(String),
    /// What the server has was changed in the middle of the request; the session goes on, and the request can be made again.
    Unsteady(String),
    /// The connection failed or was not made: it can pass.
    Broken(String),
    /// The server is not the one that is meant, or does not let us in.
    Refused(String),
}

impl Fault {
    /// Whether the session can be used for the next request.
    pub fn keeps_session(&self) -> bool {
        matches!(self, Self::Status { .. } | Self::Unfit(_) | Self::Unsteady(_))
    }

    /// Whether the same request can succeed later.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Broken(_) | Self::Unsteady(_))
    }

    /// Whether the file, or a directory above it, is not there.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Status { code: code::NO_SUCH_FILE | code::NO_SUCH_PATH, .. })
    }

    /// Whether the server does not know the request.
    pub fn is_unsupported(&self) -> bool {
        matches!(self, Self::Status { code: code::OP_UNSUPPORTED, .. })
    }

    /// What a status means.
    pub fn status(code: i32) -> Self {
        match code {
            0 | code::NO_CONNECTION | code::CONNECTION_LOST => {
                Self::Broken(format!("broken answer (SFTP status {code})"))
            }
            _ => {
                let error = ssh2::Error::from_errno(ErrorCode::SFTP(code));
                Self::Status { code, words: format!("{} (SFTP status {code})", error.message()) }
            }
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status { words, .. } => f.write_str(words),
            Self::Unfit(text) | Self::Unsteady(text) | Self::Broken(text) | Self::Refused(text) => f.write_str(text),
        }
    }
}

impl From<ssh2::Error> for Fault {
    fn from(error: ssh2::Error) -> Self {
        match error.code() {
            ErrorCode::SFTP(code) => Self::status(code),
            ErrorCode::Session(_) => Self::Broken(error.message().to_owned()),
        }
    }
}

/// Whom to log in to, and how.
#[derive(Debug, Clone)]
pub struct Target {
    /// The host, without brackets.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Who logs in.
    pub user: String,
    /// The socket of an agent to ask for keys.
    pub agent_socket: Option<PathBuf>,
    /// Key files to try; if empty the usual ones of `home`.
    pub identity_files: Vec<PathBuf>,
    /// The one file of host keys; if there is none the usual ones.
    pub known_hosts: Option<PathBuf>,
    /// The home directory that `.ssh` lies in.
    pub home: Option<PathBuf>,
    /// How long a request may take.
    pub timeout: Duration,
}

impl Target {
    /// The server of a location.
    ///
    /// # Errors
    /// It is not said who logs in, and this process's user has no name.
    pub fn new(location: &SshLocation, options: &StoreOptions) -> Result<Self, String> {
        let ssh = &options.ssh;
        let user = match location.user.clone().or_else(|| ssh.user.clone()) {
            Some(user) => user,
            None => own_name()?,
        };
        Ok(Self {
            host: location.host.clone(),
            port: location.port.unwrap_or(DEFAULT_PORT),
            user,
            agent_socket: ssh.agent_socket.clone(),
            identity_files: ssh.identity_files.clone(),
            known_hosts: ssh.known_hosts.clone(),
            home: ssh.home.clone(),
            timeout: options.request_timeout,
        })
    }

    /// Connects to the server.
    pub async fn connect(&self) -> Result<TcpStream, Fault> {
        let limit = MAX_CONNECT_TIME.min(self.timeout);
        let failed = |why: &dyn fmt::Display| Fault::Broken(format!("cannot connect to port {}: {why}", self.port));
        let start = tokio::time::Instant::now();
        let lookup = tokio::time::timeout(limit, tokio::net::lookup_host((self.host.as_str(), self.port)));
        let addresses: Vec<_> = match lookup.await {
            Ok(Ok(addresses)) => addresses.collect(),
            Ok(Err(error)) => return Err(failed(&error)),
            Err(_) => return Err(failed(&"the name of the host is not answered")),
        };
        let mut fault = failed(&"the host has no address");
        for (n_before, address) in addresses.iter().enumerate() {
            // An address that never answers leaves time for the others.
            let left = limit.saturating_sub(start.elapsed()) / (addresses.len() - n_before) as u32;
            match tokio::time::timeout(left, tokio::net::TcpStream::connect(address)).await {
                Ok(Ok(stream)) => return prepare(stream).map_err(|error| failed(&error)),
                Ok(Err(error)) => fault = failed(&without_number(&error)),
                Err(_) => fault = failed(&"no answer in time"),
            }
        }
        Err(fault)
    }
}

/// The name of the user this process runs as.
fn own_name() -> Result<String, String> {
    let uid = nix::unistd::geteuid();
    match nix::unistd::User::from_uid(uid) {
        Ok(Some(user)) => Ok(user.name),
        _ => Err(format!("user {uid} has no name here; say who logs in (sftp://user@host/path)")),
    }
}

fn prepare(stream: tokio::net::TcpStream) -> io::Result<TcpStream> {
    let stream = stream.into_std()?;
    stream.set_nodelay(true)?;
    setsockopt(&stream, sockopt::KeepAlive, &true)?;
    setsockopt(&stream, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_SECONDS)?;
    setsockopt(&stream, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL_SECONDS)?;
    setsockopt(&stream, sockopt::TcpKeepCount, &KEEPALIVE_PROBES)?;
    Ok(stream)
}

/// The reason without `(os error N)`, which says nothing to the reader of a message.
fn without_number(error: &io::Error) -> String {
    let text = error.to_string();
    text.split_once(" (os error").map_or(text.clone(), |(words, _)| words.to_owned())
}

/// A login with SFTP started. The connection is cut when it is dropped, so that dropping never waits for the server.
pub struct Session {
    sftp: Sftp,
    ssh: ssh2::Session,
    socket: TcpStream,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // The connection may be gone already.
        drop(self.socket.shutdown(Shutdown::Both));
    }
}

impl Session {
    /// Checks the server's key, logs in, and starts SFTP.
    pub fn start(target: &Target, socket: TcpStream) -> Result<Self, Fault> {
        let broken = |error: io::Error| Fault::Broken(error.to_string());
        let mut ssh = ssh2::Session::new()?;
        // The one who waits gives up first, and says so; this ends what goes on behind an answer.
        let limit = target.timeout.saturating_add(GRACE);
        ssh.set_timeout(u32::try_from(limit.as_millis()).unwrap_or(u32::MAX));
        let known_hosts = known_hosts::read(target)?;
        known_hosts.prefer_known(&ssh, target)?;
        ssh.set_tcp_stream(socket.try_clone().map_err(broken)?);
        ssh.handshake().map_err(|error| Fault::Broken(format!("cannot agree with the server: {}", error.message())))?;
        known_hosts.check(&ssh, target)?;
        auth::log_in(&ssh, target)?;
        let sftp = ssh.sftp().map_err(|error| match error.code() {
            ErrorCode::Session(code::CHANNEL_FAILURE | code::CHANNEL_REQUEST_DENIED) => {
                Fault::Refused(format!("the server offers no SFTP: {}", error.message()))
            }
            _ => Fault::from(error),
        })?;
        Ok(Self { sftp, ssh, socket })
    }

    /// A handle by which the connection can be cut while a thread waits in it.
    pub fn socket(&self) -> io::Result<TcpStream> {
        self.socket.try_clone()
    }

    /// Whether the server has closed the connection, as far as it is known here.
    pub fn is_closed(&self) -> bool {
        // libssh2 has made the socket non-blocking: without anything to read this returns at once.
        match self.socket.peek(&mut [0]) {
            Ok(n) => n == 0,
            Err(error) => error.kind() != io::ErrorKind::WouldBlock,
        }
    }

    /// The SSH session below, for a channel of one's own.
    pub fn ssh(&self) -> &ssh2::Session {
        &self.ssh
    }

    /// SFTP for requests that need no more than their fault.
    pub fn sftp(&self) -> &Sftp {
        &self.sftp
    }

    /// Opens a file for reading.
    pub fn open(&self, path: &str) -> Result<File, Fault> {
        Ok(self.sftp.open_mode(Path::new(path), OpenFlags::READ, 0, OpenType::File)?)
    }

    /// Opens a file for reading; `None` when it is not there.
    pub fn open_if_there(&self, path: &str) -> Result<Option<File>, Fault> {
        match self.open(path) {
            Ok(file) => Ok(Some(file)),
            Err(fault) if fault.is_missing() => Ok(None),
            Err(fault) => Err(fault),
        }
    }

    /// Attributes of a name; `None` when it is not there.
    pub fn stat(&self, path: &str) -> Result<Option<FileStat>, Fault> {
        match self.sftp.stat(Path::new(path)).map_err(Fault::from) {
            Ok(stat) => Ok(Some(stat)),
            Err(fault) if fault.is_missing() => Ok(None),
            Err(fault) => Err(fault),
        }
    }

    /// Attributes of an open file.
    pub fn stat_open(&self, file: &mut File) -> Result<FileStat, Fault> {
        Ok(file.stat()?)
    }

    /// Goes to an offset, before anything was read.
    pub fn seek(&self, file: &mut File, offset: u64) -> Result<(), Fault> {
        file.seek(SeekFrom::Start(offset)).map(|_| ()).map_err(|error| self.fault_of_io(error))
    }

    /// Reads to the end of the file; more than `max_bytes` is a fault. The size is not asked for, which would be one more round trip,
    /// unless the file turns out to be large.
    pub fn read_to_end(&self, file: &mut File, max_bytes: u64) -> Result<Vec<u8>, Fault> {
        let mut bytes = Vec::new();
        let too_long = || Fault::Unfit(format!("it has more than {max_bytes} bytes"));
        let mut is_size_known = false;
        let mut n_read = 0;
        let mut ask = FIRST_READ_BYTES;
        loop {
            let n = self.read_some(file, &mut bytes, n_read, ask)?;
            n_read += n;
            if n == 0 {
                bytes.truncate(n_read);
                return Ok(bytes);
            }
            if n_read > MAX_READ_BYTES && !is_size_known {
                if self.stat_open(file)?.size.is_some_and(|size| size > max_bytes) {
                    return Err(too_long());
                }
                is_size_known = true;
            }
            if n_read as u64 > max_bytes {
                return Err(too_long());
            }
            ask = n_read.clamp(FIRST_READ_BYTES, MAX_READ_BYTES);
        }
    }

    /// Reads so many bytes, or less when the file ends before.
    pub fn read_exactly(&self, file: &mut File, n_bytes: u64) -> Result<Vec<u8>, Fault> {
        let mut bytes = Vec::with_capacity(n_bytes.min(MAX_FIRST_ALLOCATION) as usize);
        let mut n_read = 0;
        while (n_read as u64) < n_bytes {
            // libssh2 asks for four times the buffer: a quarter of what is missing keeps it from fetching what nobody wants.
            let ask = ((n_bytes - n_read as u64) / 4).clamp(1, MAX_READ_BYTES as u64) as usize;
            let n = self.read_some(file, &mut bytes, n_read, ask)?;
            n_read += n;
            if n == 0 {
                break;
            }
        }
        bytes.truncate(n_read);
        Ok(bytes)
    }

    /// One read of at most `ask` bytes behind the first `n_read` of `bytes`, which is made as long as it takes.
    fn read_some(&self, file: &mut File, bytes: &mut Vec<u8>, n_read: usize, ask: usize) -> Result<usize, Fault> {
        if bytes.len() < n_read + ask {
            bytes.resize(n_read + ask, 0);
        }
        file.read(&mut bytes[n_read..n_read + ask]).map_err(|error| self.fault_of_io(error))
    }

    /// What an error of reading or writing means: the `ssh2` crate has dropped its code by then, but the session keeps it.
    pub fn fault_of_io(&self, error: io::Error) -> Fault {
        let last = ssh2::Error::last_session_error(&self.ssh).map(|last| last.code());
        let words = error.to_string();
        let nonsense = ssh2::Error::from_errno(ErrorCode::SFTP(0));
        if last == Some(ErrorCode::Session(code::SFTP_PROTOCOL)) && words != nonsense.message() {
            return Fault::Status { code: 0, words: format!("{words} (SFTP)") };
        }
        Fault::Broken(words)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_told_apart() {
        for (code, is_missing, keeps_session) in
            [(2, true, true), (10, true, true), (3, false, true), (7, false, false)]
        {
            let fault = Fault::status(code);
            assert_eq!((fault.is_missing(), fault.keeps_session()), (is_missing, keeps_session), "{fault:?}");
        }
        assert_eq!(Fault::status(3).to_string(), "permission denied (SFTP status 3)");
        assert!(Fault::status(8).is_unsupported());
    }

    #[test]
    fn who_logs_in_is_the_location_s_user_then_the_option_s_then_our_own() {
        let mut location = SshLocation { user: None, host: "h".into(), port: None, path: "/".into() };
        let mut options = StoreOptions::default();
        let own = nix::unistd::User::from_uid(nix::unistd::geteuid()).unwrap().unwrap().name;
        assert_eq!(Target::new(&location, &options).unwrap().user, own);
        options.ssh.user = Some("b".to_owned());
        assert_eq!(Target::new(&location, &options).unwrap().user, "b");
        location.user = Some("a".to_owned());
        let target = Target::new(&location, &options).unwrap();
        assert_eq!((target.user.as_str(), target.port), ("a", 22));
    }
}
