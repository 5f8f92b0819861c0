//! Where lines can go.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::unistd::geteuid;
use tracing::Level;

use crate::mount::MountError;

/// Where journald listens.
pub const JOURNAL_SOCKET: &str = "/run/systemd/journal/socket";

/// Where a syslog daemon listens.
pub const SYSLOG_SOCKET: &str = "/dev/log";

/// The value of the option that means journald.
const JOURNALD: &str = "journald";

/// What we are called in the log.
const IDENTIFIER: &str = "caifs";

/// The longest line that goes into a datagram, in bytes: well below the usual send buffer.
const MAX_DATAGRAM_LINE_BYTES: usize = 48 << 10;

/// How long a log daemon may leave a line waiting.
const SEND_TIMEOUT: Duration = Duration::from_millis(500);

/// Permissions of a new log file.
const FILE_MODE: u32 = 0o640;

/// `LOG_DAEMON`, shifted as in syslog(3).
const FACILITY_DAEMON: u8 = 3 << 3;

/// Where lines go.
#[derive(Debug)]
pub enum Destination {
    /// To standard error.
    Stderr,
    /// Into the journal.
    Journal {
        /// Where it listens.
        daemon: Daemon,
        /// Fields of every entry, encoded.
        fields: Vec<u8>,
    },
    /// To a syslog daemon.
    Syslog(Daemon),
    /// To the end of a file.
    File {
        /// Where it is looked for again.
        path: PathBuf,
        /// The file.
        file: File,
    },
}

impl Destination {
    /// The destination that was asked for: `journald`, or a file. Entries of the journal carry what is mounted where.
    ///
    /// # Errors
    /// There is no journald, or the file cannot be written to.
    pub fn open(wanted: &str, source: &str, mountpoint: &Path) -> Result<Self, MountError> {
        if wanted != JOURNALD {
            let path = PathBuf::from(wanted);
            let wrong = |why: String| MountError::Log { what: wanted.to_owned(), why };
            if !path.is_absolute() {
                return Err(wrong("not a full path (journald, or a file, is what a log can be)".to_owned()));
            }
            let file = open_file(&path).map_err(|error| wrong(error.to_string()))?;
            return Ok(Self::File { path, file });
        }
        Self::journal(Path::new(JOURNAL_SOCKET), source, mountpoint).map_err(|error| {
            let why =
                format!("{JOURNAL_SOCKET}: {error} (is systemd-journald running here? a file can be named instead)");
            MountError::Log { what: JOURNALD.to_owned(), why }
        })
    }

    /// What a mount in the background logs to when nothing is said: journald where it runs, else syslog, which may be started later.
    pub fn of_background(source: &str, mountpoint: &Path) -> Self {
        if let Ok(journal) = Self::journal(Path::new(JOURNAL_SOCKET), source, mountpoint) {
            return journal;
        }
        Self::Syslog(Daemon::new(Path::new(SYSLOG_SOCKET)))
    }

    fn journal(socket: &Path, source: &str, mountpoint: &Path) -> io::Result<Self> {
        let mut fields = Vec::new();
        field(&mut fields, "SYSLOG_IDENTIFIER", IDENTIFIER);
        field(&mut fields, "MOUNTPOINT", &mountpoint.to_string_lossy());
        field(&mut fields, "CAIFS_SOURCE", source);
        let daemon = Daemon::new(socket);
        daemon.connect()?;
        Ok(Self::Journal { daemon, fields })
    }

    /// Gives a file to the user that the process becomes, so that it can be opened again. That user may own the directory, and have put
    /// a link to somebody else's file there: only a file that is empty and root's is given away, and nothing is written to through a link.
    ///
    /// # Errors
    /// It is a link, or a file of yet another user.
    pub(in crate::mount) fn give_to(&self, uid: u32, gid: u32) -> Result<(), MountError> {
        let Self::File { path, file } = self else { return Ok(()) };
        let wrong = |why: String| MountError::Log { what: path.display().to_string(), why };
        let unreadable = |error: io::Error| wrong(error.to_string());
        let (named, opened) = (path.symlink_metadata().map_err(unreadable)?, file.metadata().map_err(unreadable)?);
        let is_itself = (named.dev(), named.ino()) == (opened.dev(), opened.ino());
        if !is_itself || !opened.is_file() || opened.nlink() != 1 || ![0, uid].contains(&opened.uid()) {
            return Err(wrong(
                "with setuid it must be a file of its own, root's or that user's, and no link".to_owned(),
            ));
        }
        if opened.uid() == 0 && opened.len() == 0 {
            std::os::unix::fs::fchown(file, Some(uid), Some(gid)).map_err(unreadable)?;
        }
        Ok(())
    }

    /// Whether lines begin with the time: log daemons know it.
    pub(super) fn has_time(&self) -> bool {
        match self {
            Self::Journal { .. } | Self::Syslog(_) => false,
            Self::Stderr | Self::File { .. } => true,
        }
    }

    /// The same with its file opened by its name; `None` if it is none, or that cannot be, which is said.
    pub(super) fn opened_again(&self) -> Option<Self> {
        let Self::File { path, .. } = self else { return None };
        match open_file(path) {
            Ok(file) => Some(Self::File { path: path.clone(), file }),
            Err(error) => {
                tracing::warn!("log {} cannot be opened again: {error}", path.display());
                None
            }
        }
    }

    /// Writes a line, which ends with a newline.
    pub(super) fn write(&self, line: &[u8], level: Level) -> io::Result<()> {
        let end = line.strip_suffix(b"\n").unwrap_or(line).len();
        let short = &line[..end.min(MAX_DATAGRAM_LINE_BYTES)];
        match self {
            Self::Stderr => io::stderr().write_all(line),
            Self::Journal { daemon, fields } => {
                let mut entry = fields.clone();
                field(&mut entry, "PRIORITY", &priority(level).to_string());
                field(&mut entry, "MESSAGE", &String::from_utf8_lossy(short));
                daemon.send(&entry)
            }
            Self::Syslog(daemon) => {
                let head = format!("<{}>{IDENTIFIER}[{}]: ", FACILITY_DAEMON | priority(level), std::process::id());
                daemon.send(&[head.as_bytes(), short].concat())
            }
            // In one call, so that lines of several mounts into one file do not mix.
            Self::File { file, .. } => { file }.write_all(line),
        }
    }
}

/// A log daemon, which may be started anew at any time.
#[derive(Debug)]
pub struct Daemon {
    path: PathBuf,
    /// Held while a line is sent, for a bounded time.
    socket: Mutex<Option<UnixDatagram>>,
}

impl Daemon {
    fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), socket: Mutex::default() }
    }

    /// Fails if it does not listen now.
    fn connect(&self) -> io::Result<()> {
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        *socket = Some(connected(&self.path)?);
        Ok(())
    }

    fn send(&self, datagram: &[u8]) -> io::Result<()> {
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connected) = &*socket {
            match connected.send(datagram) {
                Ok(_) => return Ok(()),
                // It is there, and slow.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(error),
                Err(_) => {}
            }
        }
        // The one that listened is gone; another one may have its place.
        *socket = None;
        let connected = connected(&self.path)?;
        connected.send(datagram)?;
        *socket = Some(connected);
        Ok(())
    }
}

fn connected(path: &Path) -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.connect(path)?;
    socket.set_write_timeout(Some(SEND_TIMEOUT))?;
    Ok(socket)
}

fn open_file(path: &Path) -> io::Result<File> {
    // Who has become another user keeps rights that this user's links must not borrow.
    let flags = if geteuid().is_root() { 0 } else { libc::O_NOFOLLOW };
    OpenOptions::new().append(true).create(true).mode(FILE_MODE).custom_flags(flags).open(path)
}

/// Adds a field of a journal entry.
fn field(entry: &mut Vec<u8>, key: &str, value: &str) {
    entry.extend_from_slice(key.as_bytes());
    if value.contains('\n') {
        entry.push(b'\n');
        entry.extend_from_slice(&(value.len() as u64).to_le_bytes());
    } else {
        entry.push(b'=');
    }
    entry.extend_from_slice(value.as_bytes());
    entry.push(b'\n');
}

/// Severity as syslog(3) counts.
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn listener(dir: &Path) -> (PathBuf, UnixDatagram) {
        let path = dir.join("socket");
        let listener = UnixDatagram::bind(&path).unwrap();
        listener.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        (path, listener)
    }

    fn next(listener: &UnixDatagram) -> Vec<u8> {
        let mut bytes = vec![0; 128 << 10];
        let n_bytes = listener.recv(&mut bytes).unwrap();
        bytes.truncate(n_bytes);
        bytes
    }

    #[test]
    fn entries_of_the_journal_have_priority_and_what_is_mounted_where() {
        let dir = tempfile::tempdir().unwrap();
        let (path, listener) = listener(dir.path());
        let journal = Destination::journal(&path, "https://h/x.caibx", Path::new("/mnt/a\nb")).unwrap();
        journal.write(b"EIO (03): gone\n", Level::WARN).unwrap();
        let entry = next(&listener);
        let expected =
            b"SYSLOG_IDENTIFIER=caifs\nMOUNTPOINT\n\x08\0\0\0\0\0\0\0/mnt/a\nb\nCAIFS_SOURCE=https://h/x.caibx\n\
            PRIORITY=4\nMESSAGE=EIO (03): gone\n";
        assert_eq!(entry, expected, "{}", String::from_utf8_lossy(&entry));
        journal.write(&vec![b'x'; 1 << 20], Level::ERROR).unwrap();
        assert!(next(&listener).len() > MAX_DATAGRAM_LINE_BYTES, "a long line is cut, not lost");
    }

    #[test]
    fn syslog_lines_name_us_and_reach_a_daemon_that_is_started_late_or_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let syslog = Destination::Syslog(Daemon::new(&path));
        assert!(syslog.write(b"too early\n", Level::ERROR).is_err());
        for text in ["a line", "another"] {
            let (_, listener) = listener(dir.path());
            syslog.write(format!("{text}\n").as_bytes(), Level::ERROR).unwrap();
            let expected = format!("<27>caifs[{}]: {text}", std::process::id());
            assert_eq!(String::from_utf8(next(&listener)).unwrap(), expected);
            drop(listener);
            assert!(syslog.write(b"meanwhile\n", Level::ERROR).is_err());
            std::fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn a_log_that_cannot_be_is_refused_with_what_would_help() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("no/such.log");
        let open = |wanted: &str| Destination::open(wanted, "x", Path::new("/mnt")).unwrap_err().to_string();
        assert_eq!(
            open(missing.to_str().unwrap()),
            format!("log {}: No such file or directory (os error 2)", missing.display())
        );
        assert!(open("x.log").starts_with("log x.log: not a full path"));
        let refused = Destination::journal(&dir.path().join("socket"), "x", Path::new("/mnt"));
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
