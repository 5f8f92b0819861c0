//! Who reads where, and what to read ahead of them: a window for each reader that starts small and doubles when the reader had to wait.
//!
//! * [`AheadBudget`] is what may be ahead of all readers of a mount together.
//! * [`ReadAhead`] knows the readers of one byte stream. It fetches nothing: it says which bytes to fetch.
//!
//! There are no file handles to know a reader by. A reader is a place that moves on: who reads where one left off is the same one.
//! The first read at a new place is a reader without a window; the second that follows it opens one of [`MIN_WINDOW_BYTES`]. A read that
//! had to wait doubles it, but only once for each window that was read, since all that is in flight makes a reader wait once. A seek
//! is a new reader; the old one is forgotten when it has not moved for [`IDLE`], or when others need its place or its bytes.
//!
//! Invariants: the bytes ahead of all readers are within the budget; the number of readers known is bounded; nothing is said to be
//! fetched twice for one reader, and nothing far behind the end of the file that it reads.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::report::Report;

/// The first window, in bytes: two chunks of the usual size.
pub const MIN_WINDOW_BYTES: u64 = 128 << 10;

/// Readers of one byte stream that are known at the same time.
const MAX_READERS: usize = 64;

/// A reader that has not moved for so long is forgotten.
pub const IDLE: Duration = Duration::from_secs(5);

/// A reader that has not moved for so long gives way to one that moves, if there is not enough for both.
const RESTING: Duration = Duration::from_secs(1);

/// How often idle readers are looked for.
pub const SWEEP: Duration = Duration::from_secs(1);

/// How far behind its place a read may be and still be the same reader's, in reads of the same length: requests of the kernel overtake
/// each other, as many as there are threads that take them.
const MAX_BEHIND_READS: u64 = 4;

/// How far a reader may skip that has no window, at the least, in bytes: from the content of one file of an archive to that of the next.
const MIN_SKIP_BYTES: u64 = 4 << 10;

/// How far to read behind the end of a file, in bytes, for a reader that has gone on from one file to the next: a chunk or two.
const NEXT_FILE_BYTES: u64 = 64 << 10;

/// What may be read ahead.
#[derive(Debug)]
pub struct AheadBudget {
    max_bytes: AtomicU64,
    max_window_bytes: AtomicU64,
    used_bytes: AtomicU64,
    report: Arc<Report>,
}

impl AheadBudget {
    /// A budget of so many bytes for all readers, and so many for one; `None` for a quarter of the whole. Zero reads nothing ahead.
    pub fn new(max_bytes: u64, max_window_bytes: Option<u64>, report: Arc<Report>) -> Self {
        let budget = Self {
            max_bytes: AtomicU64::new(0),
            max_window_bytes: AtomicU64::new(0),
            used_bytes: AtomicU64::new(0),
            report,
        };
        budget.set(max_bytes, max_window_bytes);
        budget
    }

    /// Another budget from now on.
    pub fn set(&self, max_bytes: u64, max_window_bytes: Option<u64>) {
        let max_window_bytes = max_window_bytes.unwrap_or(max_bytes / 4).min(max_bytes);
        self.max_bytes.store(max_bytes, Ordering::Relaxed);
        self.max_window_bytes.store(max_window_bytes, Ordering::Relaxed);
    }

    /// What may be ahead of all readers, in bytes.
    pub fn max_bytes(&self) -> u64 {
        self.max_bytes.load(Ordering::Relaxed)
    }

    /// Whether there is anything to be read ahead.
    pub fn is_empty(&self) -> bool {
        self.max_window_bytes.load(Ordering::Relaxed) == 0
    }

    /// What one of the readers that there are may have.
    fn share(&self) -> u64 {
        let max_window_bytes = self.max_window_bytes.load(Ordering::Relaxed);
        (self.max_bytes() / self.report.ahead_windows.get().max(1)).min(max_window_bytes)
    }

    /// Takes as many bytes as there are, up to `wanted`.
    fn take(&self, wanted: u64) -> u64 {
        let mut taken = 0;
        let update = |used: u64| {
            taken = wanted.min(self.max_bytes().saturating_sub(used));
            Some(used + taken)
        };
        // The closure never refuses.
        let _ = self.used_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update);
        self.report.ahead_now_bytes.add(taken);
        taken
    }

    fn give_back(&self, n_bytes: u64) {
        self.used_bytes.fetch_sub(n_bytes, Ordering::Relaxed);
        self.report.ahead_now_bytes.sub(n_bytes);
    }
}

/// A read, as a reader makes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadNote {
    /// First byte.
    pub offset: u64,
    /// Number of bytes, at least one.
    pub n_bytes: u64,
    /// Where the file ends that is read.
    pub file_end: u64,
    /// Whether the reader had to wait for it.
    pub has_waited: bool,
}

/// What to fetch for a reader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetch {
    /// The bytes; what begins in them is to be fetched.
    pub range: Range<u64>,
    /// The reader, for [`ReadAhead::failed`].
    pub reader: u64,
    /// Somebody must call [`ReadAhead::sweep`] every [`SWEEP`] from now on, until it says that there is nothing left.
    pub must_sweep: bool,
}

/// The readers of a byte stream.
#[derive(Debug)]
pub struct ReadAhead {
    budget: Arc<AheadBudget>,
    /// Never held over I/O or await.
    readers: Mutex<Readers>,
}

#[derive(Debug, Default)]
struct Readers {
    known: Vec<Reader>,
    /// Numbers that were given to readers.
    n_readers: u64,
    is_swept: bool,
}

#[derive(Debug)]
struct Reader {
    number: u64,
    /// Where it left off.
    next: u64,
    /// Up to where was fetched for it; not before `next`.
    ahead_end: u64,
    /// Zero until it reads on.
    window_bytes: u64,
    /// Where it was when its window changed last.
    changed_at: u64,
    /// The end of the file that it reads.
    file_end: u64,
    /// Whether it has gone on from one file to another.
    reads_files: bool,
    moved: Instant,
}

impl Reader {
    fn ahead_bytes(&self) -> u64 {
        self.ahead_end - self.next
    }

    /// How far a read is from where this reader is expected to go on; `None` when it is not this one's.
    fn distance(&self, read: &ReadNote) -> Option<u64> {
        let skip = read.n_bytes.saturating_mul(2).max(MIN_SKIP_BYTES);
        let furthest = self.ahead_end.max(self.next.saturating_add(skip));
        // Without a window there is nothing in flight that could overtake, and what is of another file is somebody else's.
        let can_be_late = self.window_bytes > 0 && self.file_end == read.file_end;
        let behind = if can_be_late { read.n_bytes.saturating_mul(MAX_BEHIND_READS) } else { 0 };
        let is_near = (self.next.saturating_sub(behind)..=furthest).contains(&read.offset);
        is_near.then(|| read.offset.abs_diff(self.next))
    }
}

impl ReadAhead {
    /// Nobody reads yet.
    pub fn new(budget: Arc<AheadBudget>) -> Self {
        Self { budget, readers: Mutex::default() }
    }

    /// What may be ahead of them, beside the readers of other streams.
    pub fn budget(&self) -> &AheadBudget {
        &self.budget
    }

    /// Takes note of a read, and says what to fetch for what comes after it.
    pub fn note(&self, read: ReadNote) -> Option<Fetch> {
        if self.budget.is_empty() {
            return None;
        }
        let now = Instant::now();
        let mut readers = self.lock();
        let near = readers.known.iter().enumerate();
        // Who reads on already comes before who may be about to.
        let near = near.filter_map(|(i, reader)| Some((reader.window_bytes == 0, reader.distance(&read)?, i)));
        let Some((_, _, i)) = near.min() else {
            readers.begin(&self.budget, &read, now);
            return None;
        };
        let report = &self.budget.report;
        let read_end = read.offset.saturating_add(read.n_bytes);
        let reader = &mut readers.known[i];
        reader.moved = now;
        if read_end <= reader.next {
            return None;
        }
        let used = read_end.min(reader.ahead_end).saturating_sub(read.offset.max(reader.next));
        report.ahead_used_bytes.add(used);
        self.budget.give_back(read_end.min(reader.ahead_end) - reader.next);
        reader.next = read_end;
        reader.ahead_end = reader.ahead_end.max(read_end);
        reader.reads_files |= reader.file_end != read.file_end;
        reader.file_end = read.file_end;
        if reader.window_bytes == 0 {
            reader.window_bytes = MIN_WINDOW_BYTES;
            reader.changed_at = read_end;
            report.ahead_windows.add(1);
        } else if read.has_waited && read_end.saturating_sub(reader.changed_at) >= reader.window_bytes {
            let max_window_bytes = self.budget.max_window_bytes.load(Ordering::Relaxed).max(MIN_WINDOW_BYTES);
            reader.window_bytes = (2 * reader.window_bytes).min(max_window_bytes);
            reader.changed_at = read_end;
        }
        let window_bytes = reader.window_bytes.min(self.budget.share());
        let file_end = read.file_end.saturating_add(if reader.reads_files { NEXT_FILE_BYTES } else { 0 });
        let window_end = read_end.saturating_add(window_bytes).min(file_end);
        let wanted = window_end.saturating_sub(reader.ahead_end);
        // In pieces that are worth a task, unless there is nothing more to come.
        if wanted == 0 || (wanted < window_bytes / 4 && window_end < file_end) {
            return None;
        }
        let (number, start) = (reader.number, reader.ahead_end);
        let mut taken = self.budget.take(wanted);
        if taken < wanted && readers.give_up_resting(&self.budget, number, now) {
            taken += self.budget.take(wanted - taken);
        }
        if taken == 0 {
            return None;
        }
        let reader = readers.known.iter_mut().find(|reader| reader.number == number)?;
        reader.ahead_end += taken;
        let must_sweep = !std::mem::replace(&mut readers.is_swept, true);
        Some(Fetch { range: start..start + taken, reader: number, must_sweep })
    }

    /// What was to be fetched for a reader cannot be had. It begins anew.
    pub fn failed(&self, reader: u64) {
        let mut readers = self.lock();
        if let Some(reader) = readers.known.iter_mut().find(|known| known.number == reader) {
            close(&self.budget, reader);
        }
    }

    /// Forgets idle readers. Gives false when no reader has a window any more, and nobody has to call this again until told.
    pub fn sweep(&self) -> bool {
        let now = Instant::now();
        let mut readers = self.lock();
        readers.known.retain_mut(|reader| {
            let is_idle = now.saturating_duration_since(reader.moved) >= IDLE;
            if is_idle {
                close(&self.budget, reader);
            }
            !is_idle
        });
        readers.is_swept = readers.known.iter().any(|reader| reader.window_bytes > 0);
        readers.is_swept
    }

    fn lock(&self) -> MutexGuard<'_, Readers> {
        self.readers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        let mut readers = self.lock();
        for reader in &mut readers.known {
            close(&self.budget, reader);
        }
    }
}

impl Readers {
    /// A new reader, in the place of an old one if there are too many: of those without a window the one that moved first, if there
    /// is one, so that reads at random do not drive out who reads on.
    fn begin(&mut self, budget: &AheadBudget, read: &ReadNote, now: Instant) {
        if self.known.len() >= MAX_READERS {
            let oldest =
                self.known.iter().enumerate().min_by_key(|(_, reader)| (reader.window_bytes > 0, reader.moved));
            if let Some((i, _)) = oldest {
                close(budget, &mut self.known.swap_remove(i));
            }
        }
        self.n_readers += 1;
        let next = read.offset.saturating_add(read.n_bytes);
        self.known.push(Reader {
            number: self.n_readers,
            next,
            ahead_end: next,
            window_bytes: 0,
            changed_at: next,
            file_end: read.file_end,
            reads_files: false,
            moved: now,
        });
    }

    /// Makes resting readers give back what is ahead of them, for the sake of another; whether there was one.
    fn give_up_resting(&mut self, budget: &AheadBudget, for_reader: u64, now: Instant) -> bool {
        let mut is_any = false;
        for reader in &mut self.known {
            let rests = now.saturating_duration_since(reader.moved) >= RESTING;
            if rests && reader.number != for_reader && reader.ahead_bytes() > 0 {
                close(budget, reader);
                is_any = true;
            }
        }
        is_any
    }
}

/// Takes a reader's window from it.
fn close(budget: &AheadBudget, reader: &mut Reader) {
    budget.give_back(reader.ahead_bytes());
    budget.report.ahead_windows.sub(u64::from(reader.window_bytes > 0));
    reader.ahead_end = reader.next;
    reader.window_bytes = 0;
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;

    fn ahead(max_bytes: u64, window: Option<u64>) -> (ReadAhead, Arc<Report>) {
        let report = Arc::new(Report::default());
        (ReadAhead::new(Arc::new(AheadBudget::new(max_bytes, window, Arc::clone(&report)))), report)
    }

    fn read(offset: u64, n_bytes: u64, has_waited: bool) -> ReadNote {
        ReadNote { offset, n_bytes, file_end: u64::MAX / 2, has_waited }
    }

    /// Reads on in steps, waiting for each that does not lie in what was fetched; gives how far was fetched, and the number of waits.
    fn run(ahead: &ReadAhead, start: u64, step: u64, n_steps: u64) -> (u64, u64) {
        let (mut fetched_end, mut n_waits) = (start, 0);
        for i in 0..n_steps {
            let offset = start + i * step;
            let has_waited = offset + step > fetched_end;
            n_waits += u64::from(has_waited);
            if let Some(fetch) = ahead.note(read(offset, step, has_waited)) {
                assert!(fetch.range.start >= fetched_end.min(offset + step), "nothing twice");
                fetched_end = fetch.range.end;
            }
        }
        (fetched_end - (start + n_steps * step), n_waits)
    }

    #[tokio::test(start_paused = true)]
    async fn a_window_opens_at_the_second_read_and_starts_small() {
        let (ahead, report) = ahead(64 * MIB, None);
        assert_eq!(ahead.note(read(5 * MIB, 128 * KIB, true)), None);
        assert_eq!(report.ahead_windows.get(), 0);
        let start = 5 * MIB + 256 * KIB;
        let fetch = ahead.note(read(start - 128 * KIB, 128 * KIB, true)).unwrap();
        assert_eq!((fetch.range, fetch.must_sweep), (start..start + MIN_WINDOW_BYTES, true));
        assert_eq!((report.ahead_windows.get(), report.ahead_now_bytes.get()), (1, MIN_WINDOW_BYTES));
    }

    #[tokio::test(start_paused = true)]
    async fn waits_double_it_up_to_the_limit_and_who_does_not_wait_keeps_it() {
        let (ahead, report) = ahead(64 * MIB, Some(4 * MIB));
        ahead.note(read(0, 128 * KIB, true));
        let mut place = 128 * KIB;
        let mut windows = Vec::new();
        for i in 0..400 {
            // Everybody waits at every read: once for each window counts.
            ahead.note(read(place, 128 * KIB, true));
            place += 128 * KIB;
            if i < 100 {
                windows.push(ahead.lock().known[0].window_bytes);
            }
        }
        windows.dedup();
        assert_eq!(windows, [128 * KIB, 256 * KIB, 512 * KIB, MIB, 2 * MIB, 4 * MIB]);
        assert_eq!(ahead.lock().known[0].window_bytes, 4 * MIB);
        assert!(report.ahead_now_bytes.get() <= 4 * MIB && report.ahead_now_bytes.get() >= 3 * MIB);

        let (content, _) = self::ahead(64 * MIB, None);
        content.note(read(0, 128 * KIB, true));
        for i in 1..100 {
            content.note(read(i * 128 * KIB, 128 * KIB, false));
        }
        assert_eq!(content.lock().known[0].window_bytes, MIN_WINDOW_BYTES);
    }

    #[tokio::test(start_paused = true)]
    async fn a_seek_starts_small_again() {
        let (ahead, report) = ahead(64 * MIB, None);
        let (_, n_waits) = run(&ahead, 0, 128 * KIB, 400);
        assert!(n_waits < 10, "{n_waits}");
        assert_eq!(ahead.note(read(500 * MIB, 128 * KIB, true)), None);
        let fetch = ahead.note(read(500 * MIB + 128 * KIB, 128 * KIB, true)).unwrap();
        assert_eq!(fetch.range.end - fetch.range.start, MIN_WINDOW_BYTES);
        assert_eq!(ahead.lock().known.len(), 2);
        // The place that was left is forgotten when nobody comes back.
        tokio::time::advance(IDLE - Duration::from_millis(1)).await;
        assert!(ahead.sweep());
        ahead.note(read(500 * MIB + 256 * KIB, 128 * KIB, false));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(ahead.sweep());
        assert_eq!((ahead.lock().known.len(), report.ahead_windows.get()), (1, 1));
        tokio::time::advance(IDLE).await;
        assert!(!ahead.sweep(), "nothing is left to look after");
        assert_eq!((report.ahead_windows.get(), report.ahead_now_bytes.get()), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn requests_that_overtake_each_other_are_one_reader() {
        let (ahead, report) = ahead(64 * MIB, None);
        for pair in 0..20 {
            let place = pair * 256 * KIB;
            ahead.note(read(place + 128 * KIB, 128 * KIB, true));
            ahead.note(read(place, 128 * KIB, true));
        }
        assert_eq!(report.ahead_windows.get(), 1);
        assert!(ahead.lock().known.len() <= 2);
    }

    #[tokio::test(start_paused = true)]
    async fn reads_at_random_read_nothing_ahead_and_drive_nobody_out() {
        let (ahead, report) = ahead(64 * MIB, None);
        run(&ahead, 0, 128 * KIB, 100);
        let before = ahead.lock().known[0].window_bytes;
        for i in 1..1000 {
            assert_eq!(ahead.note(read(i * 7919 * MIB, 4 * KIB, true)), None);
        }
        assert_eq!(ahead.lock().known.len(), MAX_READERS);
        assert_eq!(report.ahead_windows.get(), 1);
        ahead.note(read(100 * 128 * KIB, 128 * KIB, false));
        assert!(ahead.lock().known.iter().any(|reader| reader.window_bytes == before));
    }

    #[tokio::test(start_paused = true)]
    async fn many_readers_share_the_budget() {
        let (ahead, report) = ahead(8 * MIB, None);
        for step in 0..100 {
            for reader in 0..40 {
                ahead.note(read(reader * 1000 * MIB + step * 128 * KIB, 128 * KIB, true));
                assert!(report.ahead_now_bytes.get() <= 8 * MIB);
            }
        }
        assert_eq!(report.ahead_windows.get(), 40);
        for reader in &ahead.lock().known {
            assert!(reader.ahead_bytes() <= 8 * MIB / 40, "{reader:?}");
            assert!(reader.ahead_bytes() > 0, "{reader:?}");
        }
        // All but one rest: it gets what they do not need.
        tokio::time::advance(RESTING).await;
        run(&ahead, 100 * 128 * KIB, 128 * KIB, 100);
        assert!(report.ahead_now_bytes.get() <= 8 * MIB);
        drop(ahead);
        assert_eq!((report.ahead_windows.get(), report.ahead_now_bytes.get()), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_rests_gives_way() {
        let (ahead, report) = ahead(MIB, Some(MIB));
        let waits = |start: u64| {
            for i in 0..100 {
                ahead.note(read(start + i * 128 * KIB, 128 * KIB, true));
            }
        };
        waits(0);
        assert!(report.ahead_now_bytes.get() >= 768 * KIB);
        tokio::time::advance(RESTING).await;
        waits(1000 * MIB);
        assert!((768 * KIB..=MIB).contains(&report.ahead_now_bytes.get()));
        assert_eq!(report.ahead_windows.get(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_a_file_is_the_end_unless_the_reader_goes_on_to_the_next() {
        let (ahead, _) = ahead(64 * MIB, None);
        let file = |start: u64, i: u64| ReadNote {
            offset: start + i * 64 * KIB,
            n_bytes: 64 * KIB,
            file_end: start + MIB,
            has_waited: true,
        };
        let mut furthest = 0;
        for i in 0..16 {
            furthest = ahead.note(file(0, i)).map_or(furthest, |fetch| fetch.range.end);
        }
        assert_eq!(furthest, MIB);
        // The next file begins a little further on.
        for i in 0..16 {
            furthest = ahead.note(file(MIB + 300, i)).map_or(furthest, |fetch| fetch.range.end);
        }
        assert_eq!(furthest, 2 * MIB + 300 + NEXT_FILE_BYTES);
        assert_eq!(ahead.lock().known.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn what_fails_begins_anew_and_zero_is_nothing() {
        let (ahead, report) = ahead(64 * MIB, None);
        ahead.note(read(0, 128 * KIB, true));
        let fetch = ahead.note(read(128 * KIB, 128 * KIB, true)).unwrap();
        ahead.failed(fetch.reader);
        ahead.failed(77);
        assert_eq!((report.ahead_windows.get(), report.ahead_now_bytes.get()), (0, 0));
        assert_eq!(ahead.note(read(256 * KIB, 128 * KIB, true)).unwrap().range, 384 * KIB..512 * KIB);

        for (max_bytes, window) in [(0, None), (64 * MIB, Some(0))] {
            let (nothing, report) = self::ahead(max_bytes, window);
            assert!((0..100).all(|i| nothing.note(read(i * 4096, 4096, true)).is_none()));
            assert_eq!(report.ahead_windows.get(), 0);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_used_is_counted() {
        let (ahead, report) = ahead(64 * MIB, None);
        let (left, _) = run(&ahead, 0, 64 * KIB, 1000);
        let used = report.ahead_used_bytes.get();
        assert!(used > 990 * 64 * KIB && used <= 1000 * 64 * KIB, "{used}");
        assert_eq!(report.ahead_now_bytes.get(), left);
        // Offsets at the end of numbers do no harm.
        ahead.note(ReadNote { offset: u64::MAX - 1, n_bytes: 2, file_end: u64::MAX, has_waited: true });
        ahead.note(ReadNote { offset: u64::MAX, n_bytes: u64::MAX / 4, file_end: 0, has_waited: true });
    }
}
