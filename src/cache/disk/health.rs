//! What the tier does about a disk that fails: it says so once, leaves it alone for a while, and tries again.
//!
//! * [`Health`]: whether an operation is worth trying.
//! * [`Space`]: how much the file system has left, asked once a second.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The first pause after a failure; each failure after a pause doubles it, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// How old an answer about the free space may be.
const SPACE_AGE: Duration = Duration::from_secs(1);

/// The part of the free disk that a cache without a quota takes: a quarter.
const SHARE_OF_DISK: u64 = 4;

/// Between two messages about bad or unreadable files.
const MESSAGE_INTERVAL: Duration = Duration::from_secs(10);

/// Whether one kind of operation works.
#[derive(Debug)]
pub(super) struct Health {
    /// What stops meanwhile, for the message.
    what: &'static str,
    /// Whether the last operation failed: then `pause` has more.
    is_failing: AtomicBool,
    pause: Mutex<Pause>,
}

#[derive(Debug)]
struct Pause {
    until: Instant,
    length: Duration,
}

impl Health {
    pub(super) fn new(what: &'static str) -> Self {
        let pause = Pause { until: Instant::now(), length: Duration::ZERO };
        Self { what, is_failing: AtomicBool::new(false), pause: Mutex::new(pause) }
    }

    /// Whether the operation is not to be tried now.
    pub(super) fn is_resting(&self) -> bool {
        self.is_failing.load(Ordering::Relaxed) && Instant::now() < self.lock().until
    }

    /// The operation failed. The first failure is told.
    pub(super) fn failed(&self, cache: &Path, error: &io::Error) {
        let now = Instant::now();
        let mut pause = self.lock();
        if pause.length.is_zero() {
            tracing::warn!("disk cache {}: {error}; {} until it works again", cache.display(), self.what);
        } else if now < pause.until {
            // Others failed at the same time: that is the same failure.
            return;
        }
        pause.length = (2 * pause.length).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        pause.until = now + pause.length;
        self.is_failing.store(true, Ordering::Relaxed);
    }

    /// The operation went well.
    pub(super) fn worked(&self, cache: &Path) {
        if self.is_failing.load(Ordering::Relaxed) && self.is_failing.swap(false, Ordering::Relaxed) {
            self.lock().length = Duration::ZERO;
            tracing::info!("disk cache {}: works again", cache.display());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Pause> {
        self.pause.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets a message through from time to time.
#[derive(Debug, Default)]
pub(super) struct Seldom(Mutex<Option<Instant>>);

impl Seldom {
    pub(super) fn is_due(&self) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let is_due = last.is_none_or(|last| now.duration_since(last) >= MESSAGE_INTERVAL);
        if is_due {
            *last = Some(now);
        }
        is_due
    }
}

/// The free space of the cache's file system, and the quota that follows from it.
#[derive(Debug)]
pub(super) struct Space {
    root: PathBuf,
    /// Changed as a whole; held only to copy.
    limits: Mutex<Limits>,
    /// When the file system was asked last; nothing else is done under this lock.
    asked: Mutex<Option<Instant>>,
    free_bytes: AtomicU64,
    /// Written since the file system was asked.
    written_bytes: AtomicU64,
    share_bytes: AtomicU64,
}

/// What the settings say of room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limits {
    quota_bytes: Option<u64>,
    keep_free_bytes: u64,
}

impl Space {
    pub(super) fn new(root: &Path, quota_bytes: Option<u64>, keep_free_bytes: u64) -> Self {
        Self {
            root: root.to_owned(),
            limits: Mutex::new(Limits { quota_bytes, keep_free_bytes }),
            asked: Mutex::new(None),
            free_bytes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            share_bytes: AtomicU64::new(0),
        }
    }

    /// Asks the file system if its last answer is old. `total_bytes` is what the cache has.
    ///
    /// # Errors
    /// What statvfs(3) answers.
    pub(super) fn refresh(&self, total_bytes: u64) -> io::Result<()> {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.is_some_and(|asked| asked.elapsed() < SPACE_AGE) {
            return Ok(());
        }
        let answer = nix::sys::statvfs::statvfs(&self.root)?;
        // The fields have another width on other machines.
        #[allow(clippy::unnecessary_cast, clippy::useless_conversion)]
        let free_bytes = (answer.blocks_available() as u64).saturating_mul(answer.fragment_size() as u64);
        self.free_bytes.store(free_bytes, Ordering::Relaxed);
        self.written_bytes.store(0, Ordering::Relaxed);
        self.share_bytes.store(free_bytes.saturating_add(total_bytes) / SHARE_OF_DISK, Ordering::Relaxed);
        *asked = Some(Instant::now());
        Ok(())
    }

    /// How many bytes the cache may have.
    pub(super) fn quota_bytes(&self) -> u64 {
        self.limits().quota_bytes.unwrap_or_else(|| self.share_bytes.load(Ordering::Relaxed))
    }

    /// How many bytes are lacking if so many more are to be written.
    pub(super) fn lacking_bytes(&self, n_bytes: u64) -> u64 {
        let needed = self
            .limits()
            .keep_free_bytes
            .saturating_add(self.written_bytes.load(Ordering::Relaxed))
            .saturating_add(n_bytes);
        needed.saturating_sub(self.free_bytes.load(Ordering::Relaxed))
    }

    /// Other limits hold from now on. Tells whether they are others.
    pub(super) fn set_limits(&self, quota_bytes: Option<u64>, keep_free_bytes: u64) -> bool {
        let new = Limits { quota_bytes, keep_free_bytes };
        std::mem::replace(&mut *self.limits.lock().unwrap_or_else(PoisonError::into_inner), new) != new
    }

    /// How many bytes of the file system are to stay free.
    pub(super) fn keep_free_bytes(&self) -> u64 {
        self.limits().keep_free_bytes
    }

    fn limits(&self) -> Limits {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// So many bytes were written.
    pub(super) fn wrote(&self, n_bytes: u64) {
        self.written_bytes.fetch_add(n_bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_followed_by_a_pause_and_a_success_ends_it() {
        let health = Health::new("nothing is kept");
        assert!(!health.is_resting());
        let error = io::Error::from_raw_os_error(libc::ENOSPC);
        health.failed(Path::new("/c"), &error);
        assert!(health.is_resting());
        for _ in 0..20 {
            // As if each pause were over.
            health.lock().until = Instant::now();
            assert!(!health.is_resting());
            health.failed(Path::new("/c"), &error);
        }
        assert_eq!(health.lock().length, LONGEST_PAUSE);
        health.worked(Path::new("/c"));
        assert!(!health.is_resting());
        health.failed(Path::new("/c"), &error);
        assert_eq!(health.lock().length, FIRST_PAUSE);
    }

    #[test]
    fn what_is_to_stay_free_counts_what_was_just_written() {
        let space = Space::new(Path::new("/"), None, 0);
        space.refresh(4000).unwrap();
        let free = space.free_bytes.load(Ordering::Relaxed);
        assert_eq!(space.quota_bytes(), (free + 4000) / 4);
        assert_eq!(space.lacking_bytes(free), 0);
        space.wrote(10);
        assert_eq!(space.lacking_bytes(free), 10);
        let space = Space::new(Path::new("/"), Some(77), u64::MAX);
        space.refresh(0).unwrap();
        assert_eq!(space.quota_bytes(), 77);
        assert!(space.lacking_bytes(1) > 0);
        assert!(Space::new(Path::new("/no such place"), None, 0).refresh(0).is_err());
    }
}
