//! Where log lines go: standard error, and after a mount has let go of it journald, syslog or a file.
//!
//! * [`Destination`] is one of these, opened before anything is mounted so that what is wrong with it is said in time.
//! * [`switch`] makes it the one; [`reopen`] follows a file that was moved away (logrotate, then SIGHUP).
//! * [`write_behind`]: from then on a thread writes the lines, since those who serve a mount must not wait for a disk or a daemon. It
//!   counts lines that say the same (`folded`), connects again to a daemon that was started anew, and says how many lines were lost.
//! * [`start`] makes the process's `tracing` subscriber, of [`LogWriter`] and [`Lines`]; [`set_level`] changes what it says.
//!
//! The journal's protocol: one datagram an entry, fields as `KEY=value` and a newline, or `KEY`, a newline, the length in 8 bytes
//! (little-endian), the value and a newline where the value has newlines (systemd's JOURNAL_NATIVE_PROTOCOL). Priorities are
//! those of syslog(3).
//!
//! Invariants: a line that cannot be written is lost, and nothing else; nobody who answers the kernel waits for a log.

mod destination;
mod folded;
mod level;

use std::cell::Cell;
use std::fmt;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::fmt::format::{Format, Full, Writer as FormatWriter};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

pub use self::destination::{Destination, JOURNAL_SOCKET, SYSLOG_SOCKET};
use self::folded::Folded;
pub use self::level::{level_name, set_level, start};
use crate::report::behind::{Behind, Sink};

/// Lines that wait for the thread that writes them at the most: some hundred bytes each.
const MAX_WAITING: usize = 1024;

/// A line to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    level: Level,
    /// It begins with the time and a space.
    has_time: bool,
    text: Vec<u8>,
}

impl Line {
    /// Whether another line differs in nothing but its time.
    fn says_the_same_as(&self, other: &Self) -> bool {
        (self.level, self.has_time) == (other.level, other.has_time) && self.said() == other.said()
    }

    fn said(&self) -> &[u8] {
        &self.text[self.time().len()..]
    }

    fn time(&self) -> &[u8] {
        match self.text.iter().position(|&byte| byte == b' ') {
            Some(end) if self.has_time => &self.text[..end],
            _ => &[],
        }
    }
}

/// How lines get to their destination.
#[derive(Debug, Clone)]
enum Way {
    /// Who has one writes it.
    Direct(Arc<Destination>),
    /// A thread writes them.
    Behind(Arc<Queue>),
}

#[derive(Debug)]
struct Queue {
    lines: Behind<Line>,
    destination: Arc<Mutex<Arc<Destination>>>,
    has_time: bool,
    n_lost: Arc<AtomicU64>,
}

impl Way {
    fn has_time(&self) -> bool {
        match self {
            Self::Direct(destination) => destination.has_time(),
            Self::Behind(queue) => queue.has_time,
        }
    }
}

/// The way of this process; none is to standard error. A process has one log, as `tracing` has one subscriber.
static CURRENT: RwLock<Option<Way>> = RwLock::new(None);

fn current() -> Option<Way> {
    CURRENT.read().unwrap_or_else(PoisonError::into_inner).clone()
}

fn set_current(way: Option<Way>) {
    *CURRENT.write().unwrap_or_else(PoisonError::into_inner) = way;
}

/// From now on lines go there, instead of standard error or where they went before, and are written by those who have them. To be asked
/// before [`write_behind`].
pub fn switch(destination: Destination) {
    set_current(Some(Way::Direct(Arc::new(destination))));
}

thread_local! {
    /// Whether a panic on this thread is being told of, or is one of the log itself.
    static IS_TELLING: Cell<bool> = const { Cell::new(false) };
}

/// Has panics told of as a line of the log, once [`switch`] or [`write_behind`] says where lines go; before that on standard error, as
/// ever.
fn hear_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let is_away = CURRENT.try_read().is_ok_and(|current| current.is_some());
        // One in the log itself is not told of by the log, nor one where the log does not take errors.
        if !is_away || !tracing::enabled!(Level::ERROR) || IS_TELLING.replace(true) {
            return before(panic);
        }
        tracing::error!("{}", panic.to_string().replace('\n', " "));
        IS_TELLING.set(false);
    }));
}

/// Opens a log file again, which somebody may have moved away. When that fails, lines go on to the file that was open.
pub fn reopen() {
    match current() {
        Some(Way::Behind(queue)) => queue.lines.reopen(),
        Some(Way::Direct(destination)) => {
            if let Some(opened) = destination.opened_again() {
                switch(opened);
            }
        }
        None => {}
    }
}

/// From now on lines are written by a thread. `enter` is run first on it.
pub(super) fn write_behind(enter: impl FnOnce() + Send + 'static) {
    let destination = match current() {
        None => Arc::new(Destination::Stderr),
        Some(Way::Direct(destination)) => destination,
        Some(Way::Behind(_)) => return,
    };
    let n_lost = Arc::new(AtomicU64::new(0));
    let has_time = destination.has_time();
    let destination = Arc::new(Mutex::new(destination));
    let writer =
        Writer { destination: Arc::clone(&destination), folded: Folded::default(), n_lost: Arc::clone(&n_lost) };
    let enter = || {
        enter();
        IS_TELLING.set(true);
    };
    match Behind::start("caifs-log", MAX_WAITING, enter, writer) {
        Ok(lines) => set_current(Some(Way::Behind(Arc::new(Queue { lines, destination, has_time, n_lost })))),
        Err(error) => tracing::warn!("log lines are written by those who have them: {error}"),
    }
}

/// Writes what waits for the thread that writes, for a bounded time. To be asked before the process ends: lines after this are written by
/// those who have them.
pub(super) fn finish() {
    static FINISHING: Mutex<()> = Mutex::new(());
    // Whoever ends the process meanwhile waits for the same lines.
    let _one = FINISHING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(Way::Behind(queue)) = current() {
        let in_time = queue.lines.finish();
        // What did not take the last lines in time would only hold up the end of the process.
        set_current(in_time.then(|| Way::Direct(to_now(&queue.destination))));
    }
}

fn to_now(destination: &Mutex<Arc<Destination>>) -> Arc<Destination> {
    Arc::clone(&destination.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Finishes the log when it is dropped.
#[derive(Debug)]
pub(super) struct Finish;

impl Drop for Finish {
    fn drop(&mut self) {
        finish();
    }
}

/// The thread that writes.
struct Writer {
    /// Never locked over writing.
    destination: Arc<Mutex<Arc<Destination>>>,
    folded: Folded,
    n_lost: Arc<AtomicU64>,
}

impl Sink<Line> for Writer {
    fn write(&mut self, line: Line) {
        let due = self.folded.take(line, Instant::now());
        self.put(due);
    }

    fn due(&self) -> Option<Duration> {
        self.folded.due(Instant::now())
    }

    fn flush(&mut self, is_end: bool) {
        let due = if is_end { self.folded.end() } else { self.folded.expire(Instant::now()) };
        self.put(due);
    }

    fn reopen(&mut self) {
        if let Some(opened) = to_now(&self.destination).opened_again() {
            *self.destination.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(opened);
        }
    }
}

impl Writer {
    fn put(&self, lines: Vec<Line>) {
        let destination = to_now(&self.destination);
        for line in lines {
            let n_lost = self.n_lost.swap(0, Ordering::Relaxed);
            if n_lost > 0 && destination.write(&lost(n_lost, &line), Level::WARN).is_err() {
                // To be said when it takes lines again.
                self.n_lost.fetch_add(n_lost, Ordering::Relaxed);
            }
            if destination.write(&line.text, line.level).is_err() {
                self.n_lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// What is said of lines that were lost before this one.
fn lost(n_lost: u64, before: &Line) -> Vec<u8> {
    let text =
        format!("{n_lost} lines of this log are lost: they came faster than they could be written, or not at all");
    let head: Vec<u8> = match before.time() {
        [] => Vec::new(),
        time => [time, b"  WARN "].concat(),
    };
    [&head, text.as_bytes(), b"\n"].concat()
}

/// Gives a subscriber a writer for each line, to where lines go at that moment.
#[derive(Debug, Clone, Copy, Default)]
pub struct LogWriter;

/// The writer of one line.
#[derive(Debug)]
pub struct LineWriter {
    level: Level,
    way: Option<Way>,
}

impl MakeWriter<'_> for LogWriter {
    type Writer = LineWriter;

    fn make_writer(&self) -> LineWriter {
        LineWriter { level: Level::INFO, way: current() }
    }

    fn make_writer_for(&self, metadata: &Metadata<'_>) -> LineWriter {
        LineWriter { level: *metadata.level(), way: current() }
    }
}

impl Write for LineWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match &self.way {
            None => io::stderr().write_all(line)?,
            // There is nowhere left to say that a line was lost.
            Some(Way::Direct(destination)) => drop(destination.write(line, self.level)),
            Some(Way::Behind(queue)) => {
                let line = Line { level: self.level, has_time: queue.has_time, text: line.to_vec() };
                if !queue.lines.write(line) {
                    queue.n_lost.fetch_add(1, Ordering::Relaxed);
                }
            }
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
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, writer: FormatWriter<'_>, event: &Event<'_>) -> fmt::Result {
        match current().is_none_or(|way| way.has_time()) {
            true => self.whole.format_event(ctx, writer, event),
            false => self.bare.format_event(ctx, writer, event),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use super::*;

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

    #[test]
    fn what_is_lost_is_said_when_lines_are_taken_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let reader = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let destination = Destination::open(path.to_str().unwrap(), "x", Path::new("/mnt")).unwrap();
        let destination = Arc::new(Mutex::new(Arc::new(destination)));
        let n_lost = Arc::new(AtomicU64::new(0));
        let writer = Writer { destination, folded: Folded::default(), n_lost: Arc::clone(&n_lost) };
        let lines = Behind::start("test", 8, || {}, writer).unwrap();
        // A pipe that nobody reads takes 64 KiB, and then it hangs.
        let mut n_written = 0;
        let line = |number: u32| {
            let text = format!("2026-01-01T00:00:00Z  WARN {number} {}\n", "x".repeat(1 << 10)).into_bytes();
            Line { level: Level::WARN, has_time: true, text }
        };
        while n_lost.load(Ordering::Relaxed) < 3 {
            n_written += 1;
            if !lines.write(line(n_written)) {
                n_lost.fetch_add(1, Ordering::Relaxed);
            }
        }
        let (sender, all) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let lines = std::io::BufRead::lines(std::io::BufReader::new(reader));
            lines.map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        assert!(lines.finish(), "with a reader it ends");
        let lost = "2026-01-01T00:00:00Z  WARN 3 lines of this log are lost: they came faster than they could be written, or not at all";
        let next = || all.recv_timeout(Duration::from_secs(20)).unwrap();
        while next() != lost {}
    }
}
