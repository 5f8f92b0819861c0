//! Reads that failed late, which the kernel asks for once more.
//!
//! Of what is read through its page cache the kernel first asks for some pages at once, and when that fails, for the first page that
//! somebody wants (mm/filemap.c: what is not up to date after reading ahead is read by itself). Whoever reads would wait twice as long as a
//! read may take. So the second one gets what is at hand, and is answered as the first was if that is not there.
//!
//! Invariants: every failure answers one request at the most, and only a moment later; who is never asked again (`O_DIRECT`) is not meant.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How soon the kernel asks again: it does so at once, and has to be let do so.
const SOON: Duration = Duration::from_millis(200);

/// More failures at the same time than this are not remembered.
const MAX_FAILURES: usize = 64;

/// What failed late a moment ago.
#[derive(Debug, Default)]
pub(super) struct LateReads {
    is_any: AtomicBool,
    /// Never held over I/O or await.
    failures: Mutex<Vec<Failure>>,
}

#[derive(Debug)]
struct Failure {
    ino: u64,
    bytes: Range<u64>,
    at: Instant,
}

/// A read that has not succeeded yet.
#[derive(Debug)]
pub(super) struct Reading {
    late: Arc<LateReads>,
    ino: u64,
    bytes: Range<u64>,
    since: Instant,
    late_after: Duration,
    has_succeeded: bool,
}

impl LateReads {
    /// Whether this is asked for again. The next time it is not.
    pub(super) fn take(&self, ino: u64, bytes: Range<u64>) -> bool {
        if !self.is_any.load(Ordering::Relaxed) {
            return false;
        }
        let mut failures = self.failures();
        failures.retain(|failure| failure.at.elapsed() < SOON);
        let is_it = |failure: &Failure| {
            failure.ino == ino && failure.bytes.start < bytes.end && bytes.start < failure.bytes.end
        };
        let found = failures.iter().position(is_it);
        if let Some(place) = found {
            failures.swap_remove(place);
        }
        self.is_any.store(!failures.is_empty(), Ordering::Relaxed);
        found.is_some()
    }

    /// Remembers a read if it fails, or is given up, later than after this time.
    pub(super) fn begin(self: &Arc<Self>, ino: u64, bytes: Range<u64>, late_after: Duration) -> Reading {
        Reading { late: Arc::clone(self), ino, bytes, since: Instant::now(), late_after, has_succeeded: false }
    }

    fn failures(&self) -> MutexGuard<'_, Vec<Failure>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reading {
    /// It is not remembered.
    pub(super) fn succeed(mut self) {
        self.has_succeeded = true;
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        if self.has_succeeded || self.since.elapsed() < self.late_after {
            return;
        }
        let mut failures = self.late.failures();
        if failures.len() < MAX_FAILURES {
            failures.push(Failure { ino: self.ino, bytes: self.bytes.clone(), at: Instant::now() });
            self.late.is_any.store(true, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_late_answers_one_that_asks_again() {
        let late = Arc::new(LateReads::default());
        drop(late.begin(1, 4096..8192, Duration::from_secs(60)));
        assert!(!late.take(1, 4096..8192), "that was soon");
        late.begin(1, 4096..8192, Duration::ZERO).succeed();
        assert!(!late.take(1, 4096..8192), "that was no failure");
        // However slow this machine is: it is tried until the moment is not over.
        while !{
            drop(late.begin(1, 4096..12288, Duration::ZERO));
            assert!(!late.take(2, 4096..8192) && !late.take(1, 0..4096) && !late.take(1, 12288..16384));
            late.take(1, 4096..8192)
        } {}
        assert!(!late.take(1, 4096..8192), "once");
        for _ in 0..2 * MAX_FAILURES {
            drop(late.begin(1, 0..4096, Duration::ZERO));
        }
        assert!(late.failures().len() <= MAX_FAILURES);
        std::thread::sleep(SOON);
        assert!(!late.take(1, 0..4096), "a moment later");
        assert!(late.failures().is_empty() && !late.is_any.load(Ordering::Relaxed));
    }
}
