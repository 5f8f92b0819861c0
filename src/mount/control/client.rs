//! The asker's end of control sockets: which mounts there are, and a question to the service of one.
//!
//! Invariants: nothing here looks at a mountpoint or into a mount, so nothing here can hang with one; every question has a deadline;
//! sockets of mounts that are gone are removed; nothing is asked in a directory that somebody else can put a socket into.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;

use super::paths::{self, Device};
use super::protocol::{Answer, Ask, MAX_REPLY_BYTES, Refusal, Reply, Request, Status, VERSION, to_line};
use crate::mount::table::{MountEntry, MountTable};

/// How long a service may take to show what there is to see. It waits for nothing itself.
pub const LOOK_TIMEOUT: Duration = Duration::from_secs(3);

/// How long it may take to read its settings again: programs that give secrets have half a minute each.
pub const RELOAD_TIMEOUT: Duration = Duration::from_secs(120);

/// Services asked at the same time.
const MAX_ASKED: usize = 32;

/// Why a question has no answer, in a line for people.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The path is no mountpoint of ours.
    #[error("{} is not a mountpoint of caifs", .0.display())]
    NotMounted(PathBuf),
    /// The way to it cannot be followed.
    #[error("{}: {error}", path.display())]
    Path {
        /// As it was given.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The table of mounts cannot be read.
    #[error("/proc/self/mountinfo: {0}")]
    Table(io::Error),
    /// There is no socket for this mount.
    #[error("{} has no control socket{hint} (looked for {})", mountpoint.display(), socket.display())]
    NoSocket {
        /// The mount.
        mountpoint: PathBuf,
        /// Where it would be.
        socket: PathBuf,
        /// What may be the reason.
        hint: String,
    },
    /// Nobody listens: the process has died.
    #[error("the process that served {} is dead (unmount with `caifs umount`, or mount again)", .0.display())]
    Dead(PathBuf),
    /// It listens and does not answer.
    #[error("the process of {} ({process}) does not answer within {} s (`caifs abort` ends a mount that hangs)", mountpoint.display(), timeout.as_secs_f32())]
    Silent {
        /// The mount.
        mountpoint: PathBuf,
        /// The process and its state, as far as they are known.
        process: String,
        /// How long was waited.
        timeout: Duration,
    },
    /// It refuses.
    #[error("{}", .0.message)]
    Refused(Refusal),
    /// The connection broke, or the answer is none.
    #[error("control socket {}: {error}", socket.display())]
    Socket {
        /// The socket.
        socket: PathBuf,
        /// What the system says.
        error: io::Error,
    },
}

/// A mount that can perhaps be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Its number.
    pub device: Device,
    /// Where it is mounted, as the table has it; empty when it is out of our sight.
    pub mountpoint: PathBuf,
    /// What is mounted, as the table has it.
    pub source: String,
    /// The user it belongs to, as the table has it.
    pub uid: Option<u32>,
}

/// Asks the service of the mount at `mountpoint` (or that has it inside), within the time that such a request may take.
///
/// # Errors
/// There is no such mount, or no answer.
pub fn ask(runtime_dir: &Path, mountpoint: &Path, request: &Request) -> Result<Reply, ControlError> {
    let place = place_of(runtime_dir, mountpoint)?;
    ask_place(runtime_dir, &place, request)
}

/// The mount that a path names. One that the table does not have is looked for among those that say they are there.
///
/// # Errors
/// There is none; the way there cannot be followed.
pub fn place_of(runtime_dir: &Path, path: &Path) -> Result<Place, ControlError> {
    let table = MountTable::read().map_err(ControlError::Table)?;
    let found = paths::find(&table, path).map_err(|error| ControlError::Path { path: path.to_owned(), error });
    if let Ok(Some((entry, _))) = &found {
        return Ok(Place::of(entry));
    }
    // Mounted in another mount namespace, or out of sight but in use.
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let unseen: Vec<Place> =
        places(runtime_dir, &table).into_iter().filter(|place| place.mountpoint.as_os_str().is_empty()).collect();
    for (place, status) in ask_all(runtime_dir, unseen) {
        if status.is_ok_and(|status| Path::new(&status.mountpoint) == absolute) {
            return Ok(place);
        }
    }
    found.and(Err(ControlError::NotMounted(path.to_owned())))
}

/// All mounts of caifs that there are to see: in the mount table, and with a socket in `runtime_dir`.
///
/// # Errors
/// The mount table cannot be read.
pub fn all(runtime_dir: &Path) -> Result<Vec<Place>, ControlError> {
    let table = MountTable::read().map_err(ControlError::Table)?;
    Ok(places(runtime_dir, &table))
}

fn places(runtime_dir: &Path, table: &MountTable) -> Vec<Place> {
    let mut places: Vec<Place> = Vec::new();
    for entry in table.entries().iter().filter(|entry| entry.is_ours()) {
        let place = Place::of(entry);
        // A mount that is bound to several places is one mount.
        if !places.iter().any(|known| known.device == place.device) {
            places.push(place);
        }
    }
    for device in sockets(runtime_dir) {
        if !places.iter().any(|known| known.device == device) {
            places.push(Place { device, mountpoint: PathBuf::new(), source: String::new(), uid: None });
        }
    }
    places
}

fn sockets(runtime_dir: &Path) -> Vec<Device> {
    if paths::check(runtime_dir).is_err() {
        return Vec::new();
    }
    let entries = std::fs::read_dir(runtime_dir).into_iter().flatten().flatten();
    let mut devices: Vec<Device> =
        entries.filter_map(|entry| paths::device_of_name(entry.file_name().to_str()?)).collect();
    devices.sort_unstable();
    devices
}

impl Place {
    pub(super) fn of(entry: &MountEntry) -> Self {
        let user = entry.super_options.split(',').find_map(|option| option.strip_prefix("user_id="));
        Self {
            device: (entry.id.major, entry.id.minor),
            mountpoint: entry.mountpoint.clone(),
            source: entry.source.to_string_lossy().into_owned(),
            uid: user.and_then(|user| user.parse().ok()),
        }
    }
}

/// What several mounts show, asked side by side. Places whose service is gone for good and that are mounted nowhere are left out, and
/// their sockets removed.
pub fn ask_all(runtime_dir: &Path, places: Vec<Place>) -> Vec<(Place, Result<Status, ControlError>)> {
    let mut all = Vec::with_capacity(places.len());
    for some in places.chunks(MAX_ASKED) {
        let asked: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = some.iter().map(|place| scope.spawn(move || status_of(runtime_dir, place))).collect();
            threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
        });
        for (place, status) in some.iter().zip(asked) {
            let Ok(status) = status else { continue };
            let is_gone = place.mountpoint.as_os_str().is_empty() && matches!(status, Err(ControlError::Dead(_)));
            if !is_gone {
                all.push((place.clone(), status));
            }
        }
    }
    all
}

/// What one mount shows.
///
/// # Errors
/// It does not answer.
pub fn status_of(runtime_dir: &Path, place: &Place) -> Result<Status, ControlError> {
    match ask_place(runtime_dir, place, &Request::Status)? {
        Reply::Status(status) => Ok(*status),
        Reply::Map(_) | Reply::Changed(_) => Err(wrong_reply(runtime_dir, place)),
    }
}

/// The error for a reply to something else.
pub fn wrong_reply(runtime_dir: &Path, place: &Place) -> ControlError {
    let error = io::Error::new(io::ErrorKind::InvalidData, "the reply is to another question");
    ControlError::Socket { socket: runtime_dir.join(paths::socket_name(place.device)), error }
}

/// Asks the service of a mount.
///
/// # Errors
/// It does not answer, or refuses.
pub fn ask_place(runtime_dir: &Path, place: &Place, request: &Request) -> Result<Reply, ControlError> {
    let timeout = match request {
        Request::Status | Request::Map { .. } => LOOK_TIMEOUT,
        Request::Reload | Request::Remount { .. } => RELOAD_TIMEOUT,
    };
    let (mut stream, socket) = connect(runtime_dir, place)?;
    let deadline = Instant::now() + timeout;
    let answer = exchange(&mut stream, request, deadline);
    match answer {
        Ok(Answer { error: Some(refusal), .. }) => Err(ControlError::Refused(refusal)),
        Ok(Answer { reply: Some(reply), .. }) => Ok(reply),
        Ok(Answer { reply: None, error: None, .. }) => Err(wrong_reply(runtime_dir, place)),
        Err(error) if error.kind() == io::ErrorKind::TimedOut => {
            Err(ControlError::Silent { mountpoint: place.name(), process: process_behind(&stream), timeout })
        }
        // It ended while it was asked.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Err(ControlError::Dead(place.name())),
        Err(error) => Err(ControlError::Socket { socket, error }),
    }
}

/// The way to the service of a mount, and the socket it leads through.
///
/// # Errors
/// It has none, nobody listens, or somebody else does.
pub(super) fn connect(runtime_dir: &Path, place: &Place) -> Result<(UnixStream, PathBuf), ControlError> {
    let name = paths::socket_name(place.device);
    let elsewhere = dir_of_user(runtime_dir, place, &name);
    let dir = elsewhere.as_deref().unwrap_or(runtime_dir);
    let socket = dir.join(&name);
    match if elsewhere.is_some() { Ok(()) } else { paths::check(dir) } {
        // Without the directory there is no socket, which is told below.
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(ControlError::Socket { socket, error }),
        _ => {}
    }
    let stream = match paths::with_short(dir, &name, |path| UnixStream::connect(path)) {
        Ok(stream) => stream,
        Err(error) => return Err(not_connected(place, socket, error)),
    };
    if elsewhere.is_some() && !is_of_user(&stream, place.uid) {
        let error = io::Error::new(io::ErrorKind::PermissionDenied, "somebody else listens than who mounted");
        return Err(ControlError::Socket { socket, error });
    }
    Ok((stream, socket))
}

/// Where root finds the socket of another user's mount, which is not among his own.
fn dir_of_user(runtime_dir: &Path, place: &Place, name: &str) -> Option<PathBuf> {
    let uid = place.uid.filter(|uid| *uid != 0 && geteuid().is_root())?;
    let has_socket = |dir: &Path| dir.join(name).symlink_metadata().is_ok();
    if has_socket(runtime_dir) {
        return None;
    }
    paths::of_user(uid).into_iter().find(|dir| paths::check_of(dir, uid).is_ok() && has_socket(dir))
}

/// Whether the process at the other end is a user's. He may have put another's socket, or a link to one, where his own lie.
fn is_of_user(stream: &UnixStream, uid: Option<u32>) -> bool {
    getsockopt(stream, PeerCredentials).is_ok_and(|peer| Some(peer.uid()) == uid)
}

impl Place {
    /// What to call it: its mountpoint, or its number when it is out of sight.
    pub fn name(&self) -> PathBuf {
        match self.mountpoint.as_os_str().is_empty() {
            true => format!("mount {}:{}", self.device.0, self.device.1).into(),
            false => self.mountpoint.clone(),
        }
    }
}

fn not_connected(place: &Place, socket: PathBuf, error: io::Error) -> ControlError {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => {
            // The kernel refuses only where nobody listens. As long as the mount is there, the file says that it once was served.
            if place.mountpoint.as_os_str().is_empty() {
                drop(std::fs::remove_file(&socket));
            }
            ControlError::Dead(place.name())
        }
        io::ErrorKind::NotFound => {
            let me = geteuid().as_raw();
            let hint = match place.uid {
                Some(uid) if uid != me => format!(": it was mounted by user {uid}, who can ask it"),
                _ => " (it was mounted with control=no, or its process is dead)".to_owned(),
            };
            ControlError::NoSocket { mountpoint: place.name(), socket, hint }
        }
        _ => ControlError::Socket { socket, error },
    }
}

fn exchange(stream: &mut UnixStream, request: &Request, deadline: Instant) -> io::Result<Answer> {
    stream.set_write_timeout(Some(LOOK_TIMEOUT))?;
    let sent = stream.write_all(&to_line(&Ask { version: VERSION, request: request.clone() }));
    match sent {
        // Who refuses to listen says why, and is gone then.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            return Err(match error.kind() {
                io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
                _ => error,
            });
        }
        _ => {}
    }
    let mut line = Vec::new();
    let mut part = vec![0; 64 << 10];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut part) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ended without an answer")),
            Ok(n) => line.extend_from_slice(&part[..n]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) => return Err(error),
        }
        if line.last() == Some(&b'\n') {
            let answer: Answer = serde_json::from_slice(&line)?;
            return Ok(answer);
        }
        if line.len() > MAX_REPLY_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is too long"));
        }
    }
}

/// The process at the other end, in words: its number, and whether it is stopped.
fn process_behind(stream: &UnixStream) -> String {
    match getsockopt(stream, PeerCredentials) {
        Ok(peer) => process_in_words(peer.pid()),
        Err(_) => "unknown".to_owned(),
    }
}

/// A process and its state in words.
pub fn process_in_words(pid: i32) -> String {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name, which may hold anything, is in parentheses; the state is the first word behind.
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().next());
    match state {
        Some("T") => format!("{pid}, which is stopped: `kill -CONT {pid}` lets it go on"),
        Some("t") => format!("{pid}, which a debugger holds"),
        Some("D") => format!("{pid}, which waits for a disk"),
        Some("Z") => format!("{pid}, which has ended"),
        Some(_) => pid.to_string(),
        None => format!("{pid}, out of sight"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fs::{Permissions, set_permissions};
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    #[test]
    fn nobody_is_asked_in_a_directory_that_others_can_write_to() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place { device: (0, 57), mountpoint: "/mnt".into(), source: String::new(), uid: None };
        let listener = UnixListener::bind(dir.path().join(paths::socket_name(place.device))).unwrap();
        listener.set_nonblocking(true).unwrap();
        set_permissions(dir.path(), Permissions::from_mode(0o777)).unwrap();
        let options = vec![("store".to_owned(), Some("http://user:secret@store".to_owned()))];
        let error = ask_place(dir.path(), &place, &Request::Remount { options }).unwrap_err();
        assert!(error.to_string().contains("is not a directory that only this user can write to"), "{error}");
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock, "nothing was sent");

        set_permissions(dir.path(), Permissions::from_mode(0o700)).unwrap();
        let answers = std::thread::spawn(move || {
            listener.set_nonblocking(false).unwrap();
            drop(listener.accept().unwrap());
        });
        let error = ask_place(dir.path(), &place, &Request::Reload).unwrap_err();
        assert!(!error.to_string().contains("write to"), "the same one is asked where only we can write: {error}");
        answers.join().unwrap();
    }

    #[test]
    fn without_the_directory_there_is_no_socket() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place { device: (0, 57), mountpoint: "/mnt".into(), source: String::new(), uid: None };
        let error = ask_place(&dir.path().join("none"), &place, &Request::Status).unwrap_err();
        assert!(matches!(error, ControlError::NoSocket { .. }), "{error}");
    }
}
