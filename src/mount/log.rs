//! Where log lines go: standard error, and after a mount has let go of it journald, syslog or a file.
//!
//! * [`Destination`] is one of these, opened before anything is mounted so that what is wrong with it is said in time.
//! * [`switch`] makes it the one; [`reopen`] follows a file that was moved away (logrotate, then SIGHUP).
//! * [`LogWriter`] and [`Lines`] are what a `tracing` subscriber is made with.
//!
//! The journal's protocol: one datagram an entry, fields as `KEY=value` and a newline, or `KEY`, a newline, the length in 8 bytes
//! (little-endian), the value and a newline where the value has newlines (systemd's JOURNAL_NATIVE_PROTOCOL). Priorities are
//! those of syslog(3).
//!
//! Invariant: a line that cannot be written is lost, and nothing else.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use nix::unistd::geteuid;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::fmt::format::{Format, Full, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

use super::MountError;

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

/// How long a log daemon may leave a line waiting: a thread that takes requests may be the one that logs.
const SEND_TIMEOUT: Duration = Duration::from_millis(100);

/// Permissions of a new log file.
const FILE_MODE: u32 = 0o640;

/// `LOG_DAEMON`, shifted as in syslog(3).
const FACILITY_DAEMON: u8 = 3 << 3;

/// Where lines go.
#[derive(Debug)]
pub enum Destination {
    /// Into the journal.
    Journal {
        /// A socket that is connected to it.
        socket: UnixDatagram,
        /// Fields of every entry, encoded.
        fields: Vec<u8>,
    },
    /// To a syslog daemon.
    Syslog(UnixDatagram),
    /// To the end of a file.
    File {
        /// Where it is looked for again.
        path: PathBuf,
        /// The file.
        file: File,
    },
    /// Nowhere.
    Nowhere,
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

    /// What a mount in the background logs to when nothing is said: journald where it runs, else syslog, else nothing.
    pub fn of_background(source: &str, mountpoint: &Path) -> Self {
        if let Ok(journal) = Self::journal(Path::new(JOURNAL_SOCKET), source, mountpoint) {
            return journal;
        }
        connect(Path::new(SYSLOG_SOCKET)).map_or(Self::Nowhere, Self::Syslog)
    }

    fn journal(socket: &Path, source: &str, mountpoint: &Path) -> io::Result<Self> {
        let mut fields = Vec::new();
        field(&mut fields, "SYSLOG_IDENTIFIER", IDENTIFIER);
        field(&mut fields, "MOUNTPOINT", &mountpoint.to_string_lossy());
        field(&mut fields, "CAIFS_SOURCE", source);
        Ok(Self::Journal { socket: connect(socket)?, fields })
    }

    /// Gives a file to the user that the process becomes, so that it can be opened again. That user may own the directory, and have put
    /// a link to somebody else's file there: only a file that is empty and root's is given away, and nothing is written to through a link.
    ///
    /// # Errors
    /// It is a link, or a file of yet another user.
    pub(super) fn give_to(&self, uid: u32, gid: u32) -> Result<(), MountError> {
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

    fn write(&self, line: &[u8], level: Level) -> io::Result<()> {
        let end = line.strip_suffix(b"\n").unwrap_or(line).len();
        let short = &line[..end.min(MAX_DATAGRAM_LINE_BYTES)];
        match self {
            Self::Journal { socket, fields } => {
                let mut entry = fields.clone();
                field(&mut entry, "PRIORITY", &priority(level).to_string());
                field(&mut entry, "MESSAGE", &String::from_utf8_lossy(short));
                socket.send(&entry).map(drop)
            }
            Self::Syslog(socket) => {
                let head = format!("<{}>{IDENTIFIER}[{}]: ", FACILITY_DAEMON | priority(level), std::process::id());
                socket.send(&[head.as_bytes(), short].concat()).map(drop)
            }
            // In one call, so that lines of several mounts into one file do not mix.
            Self::File { file, .. } => { file }.write_all(line),
            Self::Nowhere => Ok(()),
        }
    }
}

fn connect(path: &Path) -> io::Result<UnixDatagram> {
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

/// The destination of this process; none is standard error. A process has one log, as `tracing` has one subscriber.
static CURRENT: RwLock<Option<Arc<Destination>>> = RwLock::new(None);

/// From now on lines go there, instead of standard error or where they went before.
pub fn switch(destination: Destination) {
    *CURRENT.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(destination));
}

/// Opens a log file again, which somebody may have moved away. When that fails, lines go on to the file that was open.
pub fn reopen() {
    let Some(current) = current() else { return };
    let Destination::File { path, .. } = &*current else { return };
    match open_file(path) {
        Ok(file) => switch(Destination::File { path: path.clone(), file }),
        Err(error) => tracing::warn!("log {} cannot be opened again: {error}", path.display()),
    }
}

fn current() -> Option<Arc<Destination>> {
    CURRENT.read().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Gives a subscriber a writer for each line, to where lines go at that moment.
#[derive(Debug, Clone, Copy, Default)]
pub struct LogWriter;

/// The writer of one line.
#[derive(Debug)]
pub struct LineWriter {
    level: Level,
    destination: Option<Arc<Destination>>,
}

impl MakeWriter<'_> for LogWriter {
    type Writer = LineWriter;

    fn make_writer(&self) -> LineWriter {
        LineWriter { level: Level::INFO, destination: current() }
    }

    fn make_writer_for(&self, metadata: &Metadata<'_>) -> LineWriter {
        LineWriter { level: *metadata.level(), destination: current() }
    }
}

impl Write for LineWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match &self.destination {
            None => io::stderr().write_all(line)?,
            // There is nowhere left to say that a line was lost.
            Some(destination) => drop(destination.write(line, self.level)),
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The form of a line: with time and level, but for log daemons, which know both.
#[derive(Debug, Clone)]
pub struct Lines {
    whole: Format<Full>,
    bare: Format<Full, ()>,
}

impl Default for Lines {
    fn default() -> Self {
        let whole = Format::default().with_target(false);
        Self { bare: whole.clone().without_time().with_level(false), whole }
    }
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        match current().as_deref() {
            Some(Destination::Journal { .. } | Destination::Syslog(_)) => self.bare.format_event(ctx, writer, event),
            Some(Destination::File { .. } | Destination::Nowhere) | None => self.whole.format_event(ctx, writer, event),
        }
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
    fn syslog_lines_name_us() {
        let dir = tempfile::tempdir().unwrap();
        let (path, listener) = listener(dir.path());
        Destination::Syslog(connect(&path).unwrap()).write(b"a line\n", Level::ERROR).unwrap();
        let expected = format!("<27>caifs[{}]: a line", std::process::id());
        assert_eq!(String::from_utf8(next(&listener)).unwrap(), expected);
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

    #[test]
    fn lines_are_appended_and_follow_a_file_that_was_moved_away() {
        use tracing_subscriber::layer::SubscriberExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "before\n").unwrap();
        // The one test that changes where this process logs to.
        switch(Destination::open(path.to_str().unwrap(), "x", Path::new("/mnt")).unwrap());
        let layer = tracing_subscriber::fmt::layer().event_format(Lines::default()).with_writer(LogWriter);
        let subscriber = tracing_subscriber::registry().with(layer);
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(op = "read", "one");
            std::fs::rename(&path, dir.path().join("log.1")).unwrap();
            tracing::warn!("two");
            reopen();
            tracing::warn!("three");
        });
        *CURRENT.write().unwrap() = None;
        let old = std::fs::read_to_string(dir.path().join("log.1")).unwrap();
        let lines: Vec<&str> = old.lines().collect();
        assert_eq!(lines.len(), 3, "{old}");
        assert_eq!(lines[0], "before");
        assert!(lines[1].ends_with("WARN one op=\"read\"") && lines[1].starts_with("20"), "{old}");
        let new = std::fs::read_to_string(&path).unwrap();
        assert!(new.ends_with("WARN three\n") && new.lines().count() == 1, "{new}");
    }
}
