//! The access trace: a line for each request of the kernel, written behind the requests' backs.
//!
//! A line has eight fields, separated by one space, as the first line of the file says: time (seconds since 1970), request, inode, offset,
//! length, where the bytes came from (`memory`, `disk`, `store`, `-` for a failure), microseconds to the answer, errno (0 for none).
//!
//! Invariants: who answers requests never waits for the disk: what does not fit into the queue is counted and lost; a disk that cannot
//! be written to is told of once, and tried again.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::cache::source::Source;
use crate::report::Report;
use crate::report::behind::{Behind, Sink};

/// Lines that wait for the disk at the most: 64 bytes each, so half a megabyte.
const MAX_WAITING: usize = 8192;

/// How long a line waits in memory when nothing else comes.
const FLUSH_AFTER: Duration = Duration::from_millis(250);

/// What a request came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceLine {
    /// When it was answered.
    pub at: SystemTime,
    /// Name of the request.
    pub op: &'static str,
    /// Inode it is about.
    pub ino: u64,
    /// First byte of a read.
    pub offset: u64,
    /// Bytes of a read, as asked for.
    pub n_bytes: u32,
    /// Where its bytes came from; `None` for a failure.
    pub source: Option<Source>,
    /// From its arrival to its answer.
    pub took: Duration,
    /// The errno of the answer, 0 for none.
    pub errno: i32,
}

/// A file that gets a line for each request.
#[derive(Debug)]
pub struct Trace {
    behind: Behind<TraceLine>,
    report: Arc<Report>,
}

impl Trace {
    /// Opens a file, or makes it, and starts to write at its end.
    ///
    /// # Errors
    /// It cannot be opened; no thread can be started.
    pub fn open(path: &Path, report: Arc<Report>) -> io::Result<Arc<Self>> {
        let writer = Writer { path: path.to_owned(), file: open(path)?, is_failing: false };
        Ok(Arc::new(Self { behind: Behind::start("caifs-trace", MAX_WAITING, || {}, writer)?, report }))
    }

    /// Writes a line soon.
    pub fn write(&self, line: TraceLine) {
        if !self.behind.write(line) {
            self.report.n_trace_dropped.add(1);
        }
    }

    /// Opens the file by its name again before the next line: somebody who rotates logs has moved it away.
    pub fn reopen(&self) {
        self.behind.reopen();
    }

    /// Writes what waits, and ends. Lines after this are lost, and so are those that the disk does not take in time.
    pub fn finish(&self) {
        if !self.behind.finish() {
            tracing::warn!("access trace: its disk does not answer, what waits for it is lost");
        }
    }
}

fn open(path: &Path) -> io::Result<BufWriter<File>> {
    // Whoever reads it learns what somebody reads.
    let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    let is_new = file.metadata()?.len() == 0;
    let mut file = BufWriter::new(file);
    if is_new {
        writeln!(file, "# time request inode offset length source microseconds errno")?;
    }
    Ok(file)
}

struct Writer {
    path: PathBuf,
    file: BufWriter<File>,
    is_failing: bool,
}

impl Sink<TraceLine> for Writer {
    fn write(&mut self, line: TraceLine) {
        let written = self.line(&line);
        self.tell(written);
    }

    fn due(&self) -> Option<Duration> {
        (!self.file.buffer().is_empty()).then_some(FLUSH_AFTER)
    }

    fn flush(&mut self, _is_end: bool) {
        let written = self.file.flush();
        self.tell(written);
    }

    fn reopen(&mut self) {
        let flushed = self.file.flush();
        let opened = open(&self.path).map(|file| {
            // What the old one did not take is lost, and not tried again.
            drop(std::mem::replace(&mut self.file, file).into_parts());
        });
        self.tell(flushed.and(opened));
    }
}

impl Writer {
    /// Says once that it cannot be written to.
    fn tell(&mut self, written: io::Result<()>) {
        match written {
            Ok(()) => self.is_failing = false,
            Err(error) => {
                if !std::mem::replace(&mut self.is_failing, true) {
                    tracing::warn!("access trace {}: {error}", self.path.display());
                }
            }
        }
    }

    fn line(&mut self, line: &TraceLine) -> io::Result<()> {
        let at = line.at.duration_since(UNIX_EPOCH).unwrap_or_default();
        writeln!(
            self.file,
            "{}.{:06} {} {} {} {} {} {} {}",
            at.as_secs(),
            at.subsec_micros(),
            line.op,
            line.ino,
            line.offset,
            line.n_bytes,
            line.source.map_or("-", Source::name),
            line.took.as_micros(),
            line.errno
        )
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn line(ino: u64) -> TraceLine {
        TraceLine {
            at: UNIX_EPOCH + Duration::from_micros(1_700_000_000_000_042),
            op: "read",
            ino,
            offset: 4096,
            n_bytes: 512,
            source: (ino == 1).then_some(Source::Store),
            took: Duration::from_micros(77),
            errno: if ino == 1 { 0 } else { 5 },
        }
    }

    #[test]
    fn lines_are_written_also_to_a_file_that_was_moved_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace");
        let report = Arc::new(Report::default());
        let trace = Trace::open(&path, Arc::clone(&report)).unwrap();
        trace.write(line(1));
        while std::fs::read_to_string(&path).unwrap().lines().count() < 2 {
            std::thread::yield_now();
        }
        let old = dir.path().join("old");
        std::fs::rename(&path, &old).unwrap();
        trace.reopen();
        trace.write(line(2));
        trace.finish();
        trace.finish();
        let head = "# time request inode offset length source microseconds errno\n";
        assert_eq!(
            std::fs::read_to_string(old).unwrap(),
            format!("{head}1700000000.000042 read 1 4096 512 store 77 0\n")
        );
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            format!("{head}1700000000.000042 read 2 4096 512 - 77 5\n")
        );
        trace.write(line(3));
        assert_eq!(report.n_trace_dropped.get(), 1);
        assert!(Trace::open(dir.path(), report).is_err());
    }

    #[test]
    fn what_the_disk_is_too_slow_for_is_lost_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        // A pipe without a reader's attention takes 64 KiB and then nothing.
        let path = dir.path().join("pipe");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let reader = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let report = Arc::new(Report::default());
        let trace = Trace::open(&path, Arc::clone(&report)).unwrap();
        let mut n_written = 0u64;
        while report.n_trace_dropped.get() == 0 {
            trace.write(line(n_written));
            n_written += 1;
        }
        assert!(n_written > MAX_WAITING as u64);
        // With a reader it goes on to its end.
        let draining = std::thread::spawn(move || io::copy(&mut io::BufReader::new(reader), &mut io::sink()));
        trace.finish();
        drop(draining);
    }

    #[test]
    fn the_end_does_not_wait_for_a_disk_that_hangs() {
        use std::os::unix::fs::OpenOptionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        // A pipe that nobody reads takes 64 KiB, and then it hangs.
        let _nobody = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let report = Arc::new(Report::default());
        let trace = Trace::open(&path, Arc::clone(&report)).unwrap();
        (0..3 * MAX_WAITING as u64).for_each(|_| trace.write(line(1)));
        trace.finish();
        assert!(report.n_trace_dropped.get() > 0, "it hung");
    }
}
