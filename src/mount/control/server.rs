//! The service's end of a control socket: a thread that accepts, and one for each who asks.
//!
//! Invariants: only this user and root are answered; requests, their time and their number are bounded; nothing here waits for a store,
//! except reading settings again, which is for one asker at a time and holds up nobody else.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;

use super::protocol::{Answer, Change, Changed, MAX_REQUEST_BYTES, RefusalKind, Reply, Request, parse_ask, to_line};
use super::{Served, gather, paths};
use crate::mount::reload::{Changes, ReloadError};
use crate::mount::settings::Difference;

/// Askers at the same time; others are told to come again.
const MAX_ASKERS: usize = 16;

/// From an asker's connecting, or the answer before, to the end of his request; and for him to take the answer.
const ASKER_TIMEOUT: Duration = Duration::from_secs(10);

/// How long nothing is accepted when the system has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A socket that is listened on, removed on drop.
#[derive(Debug)]
pub struct Server {
    stop: UnixStream,
    thread: Option<JoinHandle<()>>,
    path: PathBuf,
}

/// The file of a socket. It is removed only if it is still ours: a service that takes a mount over makes its own.
#[derive(Debug)]
struct Socket {
    path: PathBuf,
    dev: u64,
    ino: u64,
}

impl Drop for Socket {
    fn drop(&mut self) {
        let is_ours = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == (self.dev, self.ino));
        if is_ours {
            // A process that has given up its rights leaves it to whoever comes next.
            drop(std::fs::remove_file(&self.path));
        }
    }
}

impl Server {
    /// Listens. A socket that is left from a mount with the same number is replaced.
    ///
    /// # Errors
    /// The directory is not safe; the socket cannot be made; no thread can be started.
    pub fn start(dir: &std::path::Path, name: &str, served: Arc<Served>) -> io::Result<Self> {
        paths::prepare(dir)?;
        let path = dir.join(name);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = paths::with_short(dir, name, |path| {
            let listener = UnixListener::bind(path)?;
            // Who connects in between is asked who he is all the same.
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
            Ok(listener)
        })?;
        let metadata = std::fs::symlink_metadata(&path)?;
        let socket = Socket { path: path.clone(), dev: metadata.dev(), ino: metadata.ino() };
        listener.set_nonblocking(true)?;
        let (stop, stopped) = UnixStream::pair()?;
        let thread = std::thread::Builder::new().name("caifs-control".into()).spawn(move || {
            // Removed by this thread: whoever ends the service may be shut in where the socket is out of reach.
            let _socket = socket;
            accept(&listener, &stopped, &served);
        })?;
        Ok(Self { stop, thread: Some(thread), path })
    }

    /// Where it listens.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.shutdown(std::net::Shutdown::Both));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn accept(listener: &UnixListener, stopped: &UnixStream, served: &Arc<Served>) {
    let n_askers = Arc::new(AtomicUsize::new(0));
    loop {
        let mut fds =
            [PollFd::new(listener.as_fd(), PollFlags::POLLIN), PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::NONE).is_err() {
            continue;
        }
        if fds[1].any() == Some(true) {
            return;
        }
        match listener.accept() {
            Ok((stream, _)) => {
                let asker = Asker { n_askers: Arc::clone(&n_askers) };
                let n = n_askers.fetch_add(1, Ordering::Relaxed);
                let served = Arc::clone(served);
                // Without a thread the asker sees his connection close.
                drop(std::thread::Builder::new().name("caifs-asked".into()).spawn(move || {
                    let _asker = asker;
                    if let Err(error) = talk(stream, &served, n >= MAX_ASKERS) {
                        tracing::debug!("control socket: {error}");
                    }
                }));
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => {
                tracing::debug!("control socket: {error}");
                std::thread::sleep(ACCEPT_PAUSE);
            }
        }
    }
}

/// One who asks, counted until he has gone.
struct Asker {
    n_askers: Arc<AtomicUsize>,
}

impl Drop for Asker {
    fn drop(&mut self) {
        self.n_askers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Answers one asker until he goes away.
fn talk(mut stream: UnixStream, served: &Served, is_busy: bool) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(ASKER_TIMEOUT))?;
    let peer = getsockopt(&stream, PeerCredentials)?;
    if peer.uid() != 0 && peer.uid() != geteuid().as_raw() {
        let refusal = Answer::refusal(RefusalKind::BadRequest, "this mount is another user's");
        return stream.write_all(&to_line(&refusal));
    }
    if is_busy {
        let refusal = Answer::refusal(RefusalKind::Busy, "too many ask at the same time (try again)");
        return stream.write_all(&to_line(&refusal));
    }
    let mut unread = Vec::new();
    while let Some(line) = read_line(&mut stream, &mut unread)? {
        let answer = match line {
            Ok(line) => match parse_ask(&line) {
                // Options may name files that only root can read, and this process may read them for the user that it became.
                Ok(Request::Remount { .. }) if peer.uid() != 0 && served.live.config().service.setuid.is_some() => {
                    Answer::refusal(RefusalKind::BadRequest, "only root changes the options of a mount with setuid")
                }
                Ok(request) => answer(served, &request),
                Err(refusal) => *refusal,
            },
            Err(TooLong) => {
                let reason = format!("a request has {MAX_REQUEST_BYTES} bytes at the most");
                stream.write_all(&to_line(&Answer::refusal(RefusalKind::BadRequest, reason)))?;
                return Ok(());
            }
        };
        stream.write_all(&to_line(&answer))?;
    }
    Ok(())
}

struct TooLong;

/// The next line without its end; `None` when there is none any more.
fn read_line(stream: &mut UnixStream, unread: &mut Vec<u8>) -> io::Result<Option<Result<Vec<u8>, TooLong>>> {
    let deadline = Instant::now() + ASKER_TIMEOUT;
    let mut part = [0; 4096];
    loop {
        if let Some(end) = unread.iter().position(|byte| *byte == b'\n') {
            let rest = unread.split_off(end + 1);
            let mut line = std::mem::replace(unread, rest);
            line.pop();
            return Ok(Some(Ok(line)));
        }
        if unread.len() > MAX_REQUEST_BYTES {
            return Ok(Some(Err(TooLong)));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut part) {
            Ok(0) => return Ok(None),
            Ok(n) => unread.extend_from_slice(&part[..n]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        }
    }
}

/// Answers a request. A panic is an answer, too.
pub(super) fn answer(served: &Served, request: &Request) -> Answer {
    let answered = catch_unwind(AssertUnwindSafe(|| match request {
        Request::Status => Answer::reply(Reply::Status(Box::new(gather::status(served)))),
        Request::Map { part, cells } => match gather::map(served, part.as_deref(), *cells) {
            Ok(map) => Answer::reply(Reply::Map(map)),
            Err(reason) => Answer::refusal(RefusalKind::Failed, reason),
        },
        Request::Reload => changed(served.reloader.reload()),
        Request::Remount { options } => changed(served.reloader.remount(options)),
    }));
    answered.unwrap_or_else(|_| {
        served.live.report.n_panics.add(1);
        Answer::refusal(RefusalKind::Failed, "a panic was caught; please report it with the lines of the log")
    })
}

fn changed(outcome: Result<Changes, ReloadError>) -> Answer {
    let changes = match outcome {
        Ok(changes) => changes,
        Err(error @ ReloadError::Fixed(_)) => return Answer::refusal(RefusalKind::Fixed, error.to_string()),
        Err(error @ ReloadError::Failed(_)) => return Answer::refusal(RefusalKind::Failed, error.to_string()),
    };
    let change =
        |difference: Difference| Change { name: difference.name.to_owned(), from: difference.from, to: difference.to };
    let stores =
        changes.stores.into_iter().map(|(store, names)| (store, names.into_iter().map(str::to_owned).collect()));
    Answer::reply(Reply::Changed(Changed {
        changed: changes.changed.into_iter().map(change).collect(),
        stores: stores.collect(),
        fixed: changes.fixed.into_iter().map(change).collect(),
    }))
}
