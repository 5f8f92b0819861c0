//! Counting and making room, in the background: one thread in a process, one process at a time.
//!
//! A run reads the whole cache twice at most. The first walk counts what is there and how old it is (in a histogram, so memory does not
//! grow with the cache); that gives the true total, whatever was added or removed by others, and the age above which files go.
//! The second walk removes them, and directories that became empty. Age is the time since a file was written or last hit.
//!
//! Invariant: the total after a walk is not lower than what is there, save for what other programs wrote meanwhile. For that a file
//! born during the walk is left out by the count (its writer has added it to `State::since_bytes`), one born before is counted, and
//! one born in the first moment of the walk, which might be either, is both.

use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use nix::sys::stat::futimens;
use nix::sys::time::TimeSpec;

use super::open_shared;
use super::state::try_lock;
use super::{BLOCK_BYTES, Inner, occupied, seconds_now};
use crate::digest::CHUNK_ID_BYTES;
use crate::store::local::TEMPORARY_PREFIX;

/// Room is made when the cache has more than this many hundredths of its quota, and until it has this many.
const START_PERCENT: u64 = 97;
const GOAL_PERCENT: u64 = 90;

/// How long to wait after a run that could not make the room it was to make, and after one that another process was doing.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(10);
const PAUSE_AFTER_OTHERS: Duration = Duration::from_millis(200);

/// Files born this long after the start of a walk were added to the state during it: a writer makes its file right after.
const BIRTH_MARGIN: Duration = Duration::from_millis(100);

/// Directories of chunks: one for each four hex digits.
const N_DIRECTORIES: usize = 1 << 16;

/// Buckets of the histogram: 16 for each doubling of the age in milliseconds.
const N_BUCKETS: usize = 64 * 16;

/// Removed bytes are taken off the shared total when they are so many.
const TELL_BYTES: u64 = 256 << 10;

/// Unfinished files of desync are not touched before they are so old.
const UNFINISHED_AGE: Duration = Duration::from_secs(3600);

/// Private directories whose files may go.
const PRIVATE_EVICTABLE: [&str; 3] = ["files", "blocks", "quarantine"];

/// Whether it is time to make room.
pub(super) fn is_nearly_full(total_bytes: u64, quota_bytes: u64) -> bool {
    total_bytes > percent(quota_bytes, START_PERCENT)
}

fn percent(n_bytes: u64, percent: u64) -> u64 {
    n_bytes / 100 * percent + n_bytes % 100 * percent / 100
}

/// The background thread: whether it runs and when it may run again.
#[derive(Debug, Default)]
pub(super) struct Evictor {
    running: Mutex<Running>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Running {
    is_running: bool,
    not_before: Option<Instant>,
}

impl Evictor {
    pub(super) fn wait_idle(&self) {
        let running = self.lock();
        drop(self.ended.wait_while(running, |running| running.is_running).unwrap_or_else(PoisonError::into_inner));
    }

    fn lock(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says that the thread has ended, however it did.
struct Ending {
    inner: Arc<Inner>,
    pause: Duration,
}

impl Ending {
    fn end(mut self, outcome: io::Result<Duration>) {
        match outcome {
            Ok(pause) => self.pause = pause,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => {
                self.inner.report.n_disk_errors.add(1);
                tracing::debug!("disk cache {}: making room: {error}", self.inner.root.display());
            }
        }
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        let mut running = self.inner.evictor.lock();
        *running = Running { is_running: false, not_before: Some(Instant::now() + self.pause) };
        self.inner.evictor.ended.notify_all();
    }
}

impl Inner {
    /// Starts a thread that counts the cache and makes room: down to the goal if the cache is nearly full, for `wanted_bytes` under the
    /// quota, and `lacking_bytes` for the sake of the file system. Does nothing when one runs already.
    pub(super) fn start_eviction(self: &Arc<Self>, wanted_bytes: u64, lacking_bytes: u64) {
        let mut running = self.evictor.lock();
        let is_early = running.not_before.is_some_and(|not_before| Instant::now() < not_before);
        if running.is_running || is_early || wanted_bytes > self.space.quota_bytes() {
            return;
        }
        running.is_running = true;
        drop(running);
        let ending = Ending { inner: Arc::clone(self), pause: PAUSE_AFTER_FAILURE };
        // Without a thread the ending is dropped, and the next caller tries again after the pause.
        drop(std::thread::Builder::new().name("caifs-evict".to_owned()).spawn(move || {
            let outcome = run(&ending.inner, wanted_bytes, lacking_bytes);
            ending.end(outcome);
        }));
    }
}

/// Opens the lock of whoever makes room. It is made with the cache: on a full disk it could not be.
pub(super) fn open_lock(private: &Path) -> io::Result<File> {
    open_shared(&private.join("evict.lock"))
}

/// Counts and makes room. Gives how long to wait before the next run.
fn run(inner: &Inner, wanted_bytes: u64, lacking_bytes: u64) -> io::Result<Duration> {
    let lock = open_lock(&inner.private)?;
    let Ok(lock) = try_lock(lock)? else { return Ok(PAUSE_AFTER_OTHERS) };
    let walk = inner.state.update(|state| {
        state.walk = state.walk.wrapping_add(1);
        (state.is_walking, state.since_bytes) = (true, 0);
        state.walk
    })?;
    // The file system's clock, which also tells the age of files.
    futimens(&*lock, &TimeSpec::UTIME_NOW, &TimeSpec::UTIME_NOW)?;
    let now = lock.metadata()?.modified()?;
    let mut census = Census::new(now);
    let counted = walk_all(inner, &mut census);
    let total_bytes = inner.state.update(|state| {
        if state.walk == walk && state.is_walking && counted.is_ok() {
            state.total_bytes = census.n_bytes.saturating_add(state.since_bytes);
            (state.is_known, state.counted_at) = (true, seconds_now());
        }
        state.is_walking = false;
        state.total_bytes
    })?;
    counted?;
    inner.space.refresh(total_bytes)?;
    let quota_bytes = inner.space.quota_bytes();
    let mut excess_bytes = total_bytes.saturating_add(wanted_bytes).saturating_sub(quota_bytes).max(lacking_bytes);
    if is_nearly_full(total_bytes, quota_bytes) || excess_bytes > 0 {
        excess_bytes = excess_bytes.max(total_bytes.saturating_sub(percent(quota_bytes, GOAL_PERCENT)));
    }
    if lacking_bytes > 0 {
        // A little more, so that the next chunk does not ask again.
        excess_bytes = excess_bytes.saturating_add(total_bytes / 64);
    }
    if excess_bytes == 0 {
        return Ok(Duration::ZERO);
    }
    let mut removal = Removal::new(inner, &census, excess_bytes);
    let removed = walk_all(inner, &mut removal);
    removal.tell();
    removed?;
    Ok(match removal.freed_bytes >= excess_bytes {
        true => Duration::ZERO,
        false => PAUSE_AFTER_FAILURE,
    })
}

/// What a walk does with what it finds.
trait Visitor {
    /// Whether a directory of chunks is worth opening.
    fn wants(&self, directory_idx: usize) -> bool;
    /// A file, or anything else that is no directory. Gives whether it is still there.
    fn file(&mut self, path: &Path, metadata: &Metadata, is_evictable: bool) -> bool;
    /// A directory whose files were all visited; `directory_idx` for one of chunks.
    fn directory(&mut self, path: &Path, n_bytes: u64, directory_idx: Option<usize>, is_empty: bool);
}

/// Visits everything in the cache, our private directories first: a file that moves from there to its place is met twice, not never.
fn walk_all(inner: &Inner, visitor: &mut impl Visitor) -> io::Result<()> {
    for name in PRIVATE_EVICTABLE {
        walk_directory(inner, &inner.private.join(name), None, true, visitor)?;
    }
    let tmp = inner.private.join("tmp");
    for entry in fs::read_dir(&tmp)? {
        walk_directory(inner, &entry?.path(), None, false, visitor)?;
    }
    visitor.directory(&tmp, fs::metadata(&tmp)?.len(), None, false);
    walk_directory(inner, &inner.private, None, false, visitor)?;
    // By name instead of listing the root: that costs a tenth of a second for an empty cache, and meets directories made meanwhile.
    let mut path = inner.root.join("0000");
    for directory_idx in 0..N_DIRECTORIES {
        if visitor.wants(directory_idx) {
            path.set_file_name(format!("{directory_idx:04x}"));
            walk_directory(inner, &path, Some(directory_idx), true, visitor)?;
        }
    }
    visitor.directory(&inner.root, fs::metadata(&inner.root)?.len(), None, false);
    Ok(())
}

/// Visits the files of one directory. One that is not there or must not be read is passed over.
fn walk_directory(
    inner: &Inner,
    path: &Path,
    directory_idx: Option<usize>,
    is_evictable: bool,
    visitor: &mut impl Visitor,
) -> io::Result<()> {
    if inner.is_over.load(Ordering::Relaxed) {
        return Err(ErrorKind::Interrupted.into());
    }
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) => {
            return match error.kind() {
                ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::PermissionDenied => Ok(()),
                _ => Err(error),
            };
        }
    };
    let mut is_empty = true;
    for entry in entries {
        let entry = entry?;
        let metadata = match entry.metadata() {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let is_evictable = is_evictable && (directory_idx.is_none() || is_ours_to_remove(&entry, &metadata));
        is_empty &= !metadata.is_dir() && !visitor.file(&entry.path(), &metadata, is_evictable);
    }
    let n_bytes = match fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    visitor.directory(path, n_bytes, directory_idx, is_empty);
    Ok(())
}

/// Whether a file in a directory of chunks is a chunk in any form, or an old unfinished one.
fn is_ours_to_remove(entry: &fs::DirEntry, metadata: &Metadata) -> bool {
    let name = entry.file_name();
    let name = name.as_bytes();
    if name.starts_with(TEMPORARY_PREFIX.as_bytes()) {
        let age = metadata.modified().ok().and_then(|modified| modified.elapsed().ok());
        return age.is_some_and(|age| age > UNFINISHED_AGE);
    }
    name.len() >= 2 * CHUNK_ID_BYTES && name[..2 * CHUNK_ID_BYTES].iter().all(u8::is_ascii_hexdigit)
}

/// The bucket of an age: 16 for each doubling, so that an age is known to 6 %.
fn bucket_of(now: SystemTime, metadata: &Metadata) -> usize {
    let modified = metadata.modified().unwrap_or(now);
    // What is from the future is young.
    let age = now.duration_since(modified).unwrap_or_default();
    let millis = u64::try_from(age.as_millis()).unwrap_or(u64::MAX).saturating_add(1);
    let octave = millis.ilog2();
    let fraction = (millis << (u64::BITS - 1 - octave)) >> (u64::BITS - 5) & 15;
    octave as usize * 16 + fraction as usize
}

/// The first walk: how much there is, how old it is, and in which directories.
struct Census {
    now: SystemTime,
    n_bytes: u64,
    bytes_by_age: Vec<u64>,
    has_directory: Vec<bool>,
}

impl Census {
    fn new(now: SystemTime) -> Self {
        Self { now, n_bytes: 0, bytes_by_age: vec![0; N_BUCKETS], has_directory: vec![false; N_DIRECTORIES] }
    }
}

impl Visitor for Census {
    fn wants(&self, _: usize) -> bool {
        true
    }

    fn file(&mut self, _: &Path, metadata: &Metadata, is_evictable: bool) -> bool {
        // Where the file system does not know the birth, the bytes count twice until the next walk.
        if metadata.created().is_ok_and(|born| born > self.now + BIRTH_MARGIN) {
            return true;
        }
        let n_bytes = occupied(metadata.len());
        self.n_bytes += n_bytes;
        if is_evictable {
            self.bytes_by_age[bucket_of(self.now, metadata)] += n_bytes;
        }
        true
    }

    fn directory(&mut self, _: &Path, n_bytes: u64, directory_idx: Option<usize>, _: bool) {
        self.n_bytes += occupied(n_bytes.max(1));
        if let Some(directory_idx) = directory_idx {
            self.has_directory[directory_idx] = true;
        }
    }
}

/// The second walk: what is old goes.
struct Removal<'a> {
    inner: &'a Inner,
    census: &'a Census,
    /// All older buckets go, and of this one as much as is needed.
    oldest_bucket: usize,
    bytes_of_oldest: u64,
    freed_bytes: u64,
    told_bytes: u64,
}

impl<'a> Removal<'a> {
    fn new(inner: &'a Inner, census: &'a Census, excess_bytes: u64) -> Self {
        let mut left_bytes = excess_bytes;
        let mut oldest_bucket = N_BUCKETS - 1;
        for (bucket, n_bytes) in census.bytes_by_age.iter().enumerate().rev() {
            oldest_bucket = bucket;
            if *n_bytes >= left_bytes {
                break;
            }
            left_bytes -= n_bytes;
        }
        Self { inner, census, oldest_bucket, bytes_of_oldest: left_bytes, freed_bytes: 0, told_bytes: 0 }
    }

    fn freed(&mut self, n_bytes: u64) {
        self.freed_bytes += n_bytes;
        if self.freed_bytes - self.told_bytes >= TELL_BYTES {
            self.tell();
        }
    }

    /// Takes what was removed off the shared total.
    fn tell(&mut self) {
        let n_bytes = self.freed_bytes - self.told_bytes;
        if n_bytes > 0
            && self.inner.state.update(|state| state.total_bytes = state.total_bytes.saturating_sub(n_bytes)).is_ok()
        {
            self.told_bytes = self.freed_bytes;
        }
    }
}

impl Visitor for Removal<'_> {
    fn wants(&self, directory_idx: usize) -> bool {
        self.census.has_directory[directory_idx]
    }

    fn file(&mut self, path: &Path, metadata: &Metadata, is_evictable: bool) -> bool {
        let bucket = bucket_of(self.census.now, metadata);
        let goes = bucket > self.oldest_bucket || bucket == self.oldest_bucket && self.bytes_of_oldest > 0;
        if !is_evictable || !goes {
            return true;
        }
        match fs::remove_file(path) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => return false,
            Err(_) => {
                self.inner.report.n_disk_errors.add(1);
                return true;
            }
        }
        self.inner.report.n_disk_evicted.add(1);
        let n_bytes = occupied(metadata.len());
        if bucket == self.oldest_bucket {
            self.bytes_of_oldest = self.bytes_of_oldest.saturating_sub(n_bytes);
        }
        self.freed(n_bytes);
        false
    }

    fn directory(&mut self, path: &Path, n_bytes: u64, directory_idx: Option<usize>, is_empty: bool) {
        // Only an empty one can be removed; a writer that comes in between makes it again.
        if is_empty && directory_idx.is_some() && fs::remove_dir(path).is_ok() {
            self.freed(occupied(n_bytes.max(1)).max(BLOCK_BYTES));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn buckets_grow_with_age_and_are_narrow() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let file = fs::File::create(&path).unwrap();
        let metadata = file.metadata().unwrap();
        let written = metadata.modified().unwrap();
        let mut last = 0;
        let octaves = (11..50).map(|octave| 1u64 << octave);
        for millis in (0..2000).chain(octaves) {
            let bucket = bucket_of(written + Duration::from_millis(millis), &metadata);
            assert!((last..N_BUCKETS).contains(&bucket), "{millis}");
            last = bucket;
        }
        assert_eq!(bucket_of(written - Duration::from_secs(9), &metadata), bucket_of(written, &metadata));
        let at = |seconds| bucket_of(written + Duration::from_secs(seconds), &metadata);
        assert!(at(100) < at(107) && at(1_000_000) < at(1_070_000));
    }

    #[test]
    fn percent_of_large_and_small_numbers() {
        assert_eq!(percent(1000, 97), 970);
        assert_eq!(percent(10, 97), 9);
        assert_eq!(percent(u64::MAX, 100), u64::MAX);
    }
}
