//! The asker's end of control sockets: which mounts there are, and a question to the service of one.
//!
//! Invariants: nothing here looks at a mountpoint or into a mount, so nothing here can hang with one; every question has a deadline;
//! sockets of mounts that are gone are removed; nothing is asked in a directory that somebody else can put a socket into.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, getsockopt, socket, sockopt::PeerCredentials};
use nix::unistd::geteuid;

use super::paths;
pub use super::place::Place;
use super::place::{Home, places};
use super::protocol::{Answer, Ask, MAX_REPLY_BYTES, Refusal, Reply, Request, Status, VERSION, to_line};
use crate::mount::table::MountTable;

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
    /// It is a user's, and other mounts of users took too long.
    #[error("{} is not asked: other mounts of users do not answer in time (name it to ask it)", .0.display())]
    NotAsked(PathBuf),
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

/// Of those, our own.
///
/// # Errors
/// As [`all`].
pub fn all_own(runtime_dir: &Path) -> Result<Vec<Place>, ControlError> {
    let mut places = all(runtime_dir)?;
    places.retain(|place| place.is_own(runtime_dir));
    Ok(places)
}

/// What several mounts show, asked side by side, our own first. Places whose service is gone for good and that are mounted nowhere are
/// left out, and their sockets removed.
pub fn ask_all(runtime_dir: &Path, places: Vec<Place>) -> Vec<(Place, Result<Status, ControlError>)> {
    let (own, others): (Vec<_>, Vec<_>) = places.into_iter().partition(|place| place.is_own(runtime_dir));
    let mut all: Vec<_> = own.chunks(MAX_ASKED).flat_map(|some| ask_some(runtime_dir, some)).collect();
    // A user may have any number of mounts whose processes keep silent: who looks at everything does not wait for each.
    let deadline = Instant::now() + LOOK_TIMEOUT;
    for some in others.chunks(MAX_ASKED) {
        if Instant::now() < deadline {
            all.extend(ask_some(runtime_dir, some));
        } else {
            all.extend(some.iter().map(|place| (place.clone(), Err(ControlError::NotAsked(place.name())))));
        }
    }
    all
}

fn ask_some(runtime_dir: &Path, some: &[Place]) -> Vec<(Place, Result<Status, ControlError>)> {
    let asked: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = some.iter().map(|place| scope.spawn(move || status_of(runtime_dir, place))).collect();
        threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
    });
    let mut all = Vec::with_capacity(some.len());
    for (place, status) in some.iter().zip(asked) {
        let Ok(status) = status else { continue };
        let is_gone = place.mountpoint.as_os_str().is_empty() && matches!(status, Err(ControlError::Dead(_)));
        if !is_gone {
            all.push((place.clone(), status));
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
    ControlError::Socket { socket: Home::of(runtime_dir, place).dir.join(paths::socket_name(place.device)), error }
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
    let deadline = Instant::now() + timeout;
    let (mut stream, socket) = connect(runtime_dir, place)?;
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
/// It has none, nobody listens or accepts, or somebody else does.
pub(super) fn connect(runtime_dir: &Path, place: &Place) -> Result<(UnixStream, PathBuf), ControlError> {
    let name = paths::socket_name(place.device);
    let home = Home::of(runtime_dir, place);
    let socket = home.dir.join(&name);
    match if home.dir == runtime_dir { paths::check(runtime_dir) } else { Ok(()) } {
        // Without the directory there is no socket, which is told below.
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(ControlError::Socket { socket, error }),
        _ => {}
    }
    let stream = match paths::with_short(&home.dir, &name, |path| connect_within(path, LOOK_TIMEOUT)) {
        Ok(stream) => stream,
        Err(error) => return Err(not_connected(place, socket, error)),
    };
    if home.owner.is_some() && !is_of_user(&stream, home.owner) {
        let error = io::Error::new(io::ErrorKind::PermissionDenied, "somebody else listens than who mounted");
        return Err(ControlError::Socket { socket, error });
    }
    Ok((stream, socket))
}

/// Connects to a socket. Where somebody listens and does not accept, connect(2) waits: for ever, were it not for `limit`.
///
/// # Errors
/// `TimedOut` when nobody has accepted; what connect(2) answers.
pub(super) fn connect_within(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let address = UnixAddr::new(path)?;
    let stream = UnixStream::from(socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?);
    let deadline = Instant::now() + limit;
    let mut left = limit;
    loop {
        // It counts for connect(2), too (socket(7), SO_SNDTIMEO).
        stream.set_write_timeout(Some(left))?;
        match nix::sys::socket::connect(stream.as_raw_fd(), &address) {
            Ok(()) => return Ok(stream),
            Err(Errno::EINTR) => left = deadline.saturating_duration_since(Instant::now()),
            Err(Errno::EAGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) => return Err(error.into()),
        }
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}

/// Whether the process at the other end is a user's. He may have put another's socket, or a link to one, where his own lie.
fn is_of_user(stream: &UnixStream, uid: Option<u32>) -> bool {
    getsockopt(stream, PeerCredentials).is_ok_and(|peer| Some(peer.uid()) == uid)
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
        io::ErrorKind::TimedOut => ControlError::Silent {
            mountpoint: place.name(),
            process: "it takes no connections".to_owned(),
            timeout: LOOK_TIMEOUT,
        },
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
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::{PermissionsExt, chown, symlink};
    use std::os::unix::net::UnixListener;

    use nix::sys::socket::{Backlog, bind, listen};

    /// Listens, accepts nobody, and has no room for one more who waits.
    fn full(path: &Path) -> Vec<OwnedFd> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let new = || socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        let address = UnixAddr::new(path).unwrap();
        let mut all = vec![new()];
        bind(all[0].as_raw_fd(), &address).unwrap();
        listen(&all[0], Backlog::new(0).unwrap()).unwrap();
        loop {
            all.push(new());
            match nix::sys::socket::connect(all[all.len() - 1].as_raw_fd(), &address) {
                Ok(()) => {}
                Err(error) => {
                    assert_eq!(error, Errno::EAGAIN);
                    return all;
                }
            }
        }
    }

    #[test]
    fn who_listens_and_accepts_nobody_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place { device: (0, 57), mountpoint: "/mnt".into(), source: String::new(), uid: None };
        let _full = full(&dir.path().join(paths::socket_name(place.device)));
        let (sender, answers) = std::sync::mpsc::channel();
        let runtime_dir = dir.path().to_owned();
        std::thread::spawn(move || sender.send(ask_place(&runtime_dir, &place, &Request::Reload)));
        let error = answers.recv_timeout(Duration::from_secs(60)).expect("it is waited for").unwrap_err();
        assert!(matches!(error, ControlError::Silent { .. }), "{error}");
    }

    #[test]
    fn however_many_mounts_of_users_keep_silent_who_asks_all_waits_for_a_few() {
        if !geteuid().is_root() {
            return;
        }
        // Nobody's number.
        let uid = 2_000_000_000 + std::process::id();
        let of_user = paths::without_session(uid);
        std::fs::create_dir(&of_user).unwrap();
        chown(&of_user, Some(uid), None).unwrap();
        let _full = full(&of_user.join("full"));
        let of = |minor| Place { device: (0, minor), mountpoint: "/mnt".into(), source: String::new(), uid: Some(uid) };
        let places: Vec<Place> = (1..=3 * MAX_ASKED as u32).map(of).collect();
        for place in &places {
            symlink("full", of_user.join(paths::socket_name(place.device))).unwrap();
        }
        let own = tempfile::tempdir().unwrap();
        let seen = ask_all(own.path(), places.clone());
        std::fs::remove_dir_all(&of_user).unwrap();
        assert_eq!(seen.len(), places.len());
        for (n, (place, status)) in seen.into_iter().enumerate() {
            match (status.unwrap_err(), n < MAX_ASKED) {
                (ControlError::Silent { .. }, true) | (ControlError::NotAsked(_), false) => {
                    assert_eq!(place, places[n])
                }
                (error, _) => panic!("{n}: {error}"),
            }
        }
    }

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
