//! A plain copy of an image in a sparse local file, filled as the image is read, and read instead of the stores from then on.
//!
//! * `state` is the format of the side file that says what the copy is of and what of it is there; `map` is the same in memory.
//! * `place` opens both; `writer` is the thread that fills the file, and `queue` the way to it.
//! * [`Backing`] is what a blob asks.
//!
//! Every chunk was verified before it was written. The bytes in the file are trusted like those of a disk: the file belongs to us or root
//! and nobody else may write it, and no checksum is looked at when a part of a chunk is read, since the kernel would look at none either
//! once it reads the complete file itself. What is not known to have reached the disk, what was copied or changed while we were not
//! looking, and what another program wrote, is hashed before its first use.
//!
//! Invariants: whatever happens to the two files, to the process or to the machine, a read gives the right bytes or those of the stores;
//! a full or broken disk stops the filling only; a file of another image is never written to.

mod map;
mod place;
mod queue;
mod state;
mod writer;

use std::cell::OnceCell;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use tokio::time::Instant as Deadline;

use super::source::IndexBytes;
use crate::cache::disk::make_root;
use crate::chunk::Chunk;
use crate::digest::{ChunkId, Digest};
use crate::format::index::{ITEM_BYTES, Index, Item, TABLE_START_BYTES};
use crate::report::Report;
use crate::sys;
use map::{Map, State};
pub use place::BackingError;
use place::{Content, Place};
use queue::Queue;
pub use state::Identity;

/// The largest index that is hashed before a mount is ready, in bytes: some 400,000 chunks, 25 GB of content. A larger one is hashed in
/// the background, and the backing file is used from then on.
const MAX_HASHED_AT_ONCE_BYTES: usize = 16 << 20;

/// What an index is hashed by at a time: a multiple of the size of its items.
const HASHED_BYTES: usize = ITEM_BYTES << 14;

/// Where a backing file lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackingFile {
    /// This file.
    At(PathBuf),
    /// A file in this directory, named by what it is a copy of. The directory is made when it is missing.
    In(PathBuf),
}

/// How a backing file is filled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingConfig {
    /// Where it lies.
    pub file: BackingFile,
    /// What it leaves free on its file system, in bytes.
    pub keep_free_bytes: u64,
    /// What the map of its chunks and the chunks waiting to be written may take of the memory, in bytes.
    pub memory_bytes: u64,
    /// How long a read may be held up by a disk that is slower than the stores.
    pub max_wait: Duration,
}

/// A backing file in use.
#[derive(Debug)]
pub struct Backing {
    shared: Arc<Shared>,
    /// `None` when nothing is added: it is complete, or another process's.
    queue: Option<Queue>,
    closed: Once,
}

/// What readers and the writer share.
#[derive(Debug)]
struct Shared {
    index: Arc<Index<IndexBytes>>,
    digest: Digest,
    identity: Identity,
    path: PathBuf,
    data: Arc<File>,
    /// `None` when the file was complete when it was opened.
    map: Option<Map>,
    is_complete: AtomicBool,
    report: Arc<Report>,
    opened: Instant,
    /// When somebody last read, in milliseconds since it was opened.
    last_read_ms: AtomicU64,
    /// Whether claims can be checked: what is read of them is what the disk has. Never locked over I/O.
    is_faced: (Mutex<bool>, Condvar),
    /// How often the pages of the file were dropped from memory.
    n_forgotten: AtomicU64,
    max_wait: Duration,
}

/// How much of an image is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Presence {
    /// The file.
    pub path: PathBuf,
    /// Whether the file is complete and known to be so on the disk.
    pub is_complete: bool,
    /// Whether this process adds to it.
    pub is_filled: bool,
    /// Chunks of the image.
    pub n_chunks: u64,
    /// Chunks that are there.
    pub n_present: u64,
    /// Chunks that may be there and are hashed before they are used.
    pub n_claimed: u64,
}

impl Presence {
    /// Hundredths of percent of the chunks that are there; 10,000 only if all are, on the disk, too.
    pub fn per_myriad(&self) -> u64 {
        match self.n_chunks {
            0 => 10_000,
            n_chunks if self.n_present == n_chunks && self.is_filled => 9_999,
            n_chunks => u64::try_from(u128::from(self.n_present) * 10_000 / u128::from(n_chunks)).unwrap_or(10_000),
        }
    }
}

/// What is known of a chunk in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Held {
    /// Its bytes can be read.
    Yes,
    /// It has to be hashed first: nobody knows whether it is there, or it is not on the disk yet, and a fault of the disk that nobody has
    /// heard of could have taken it back.
    Claimed,
    /// It is not there.
    No,
}

/// What an index is, by all its bytes.
///
/// # Errors
/// The index is damaged, or was changed meanwhile.
pub fn identity_of(index: &Index<IndexBytes>) -> Result<Identity, String> {
    let (mut whole, mut layout) = (Digest::Sha256.stream(), Digest::Sha256.stream());
    let bytes = index.source().as_ref();
    whole.update(&bytes[..TABLE_START_BYTES]);
    let mut ends = Vec::with_capacity(HASHED_BYTES / ITEM_BYTES * 8);
    for (part_idx, part) in bytes[TABLE_START_BYTES..].chunks(HASHED_BYTES).enumerate() {
        whole.update(part);
        ends.clear();
        let first_idx = part_idx * (HASHED_BYTES / ITEM_BYTES);
        for chunk_idx in first_idx..index.n_chunks().min(first_idx + HASHED_BYTES / ITEM_BYTES) {
            let item = index.item(chunk_idx).map_err(|error| error.to_string())?;
            ends.extend_from_slice(&item.end.to_le_bytes());
        }
        layout.update(&ends);
    }
    index.source().check_unchanged()?;
    let (size, n_chunks) = (index.blob_size(), index.n_chunks() as u64);
    Ok(Identity { index: whole.finish().0, layout: layout.finish().0, size, n_chunks })
}

/// Whether the index is small enough to be hashed while somebody waits for the mount.
pub(super) fn is_hashed_at_once(index: &Index<IndexBytes>) -> bool {
    index.source().as_ref().len() <= MAX_HASHED_AT_ONCE_BYTES
}

impl Backing {
    /// Opens the backing file of an image, or makes one. Blocks for as long as hashing the index takes.
    ///
    /// # Errors
    /// [`BackingError::Refused`] when it is of another image, not ours to write, or nothing is known of it;
    /// [`BackingError::Unusable`] when it is of no use now.
    pub(super) fn open(
        index: Arc<Index<IndexBytes>>,
        config: &BackingConfig,
        report: Arc<Report>,
    ) -> Result<Self, BackingError> {
        let identity = identity_of(&index).map_err(BackingError::Unusable)?;
        let map_bytes = Map::memory_bytes(identity.n_chunks);
        if map_bytes > config.memory_bytes / 2 {
            let needed = (2 * map_bytes / config.memory_bytes.max(1) + 1).saturating_mul(100);
            return Err(BackingError::Refused(format!(
                "its map needs {map_bytes} bytes of memory, which is too much of the budget (give memory= some {needed} % of what it is)"
            )));
        }
        let path = match &config.file {
            BackingFile::At(path) => path.clone(),
            BackingFile::In(directory) => {
                make_directory(directory)?;
                directory.join(format!("{}.img", ChunkId(identity.index).to_hex()))
            }
        };
        let null = OnceCell::new();
        let is_null = |chunk_idx| {
            let max = index.header().sizes.max;
            let item = index.item(chunk_idx).ok().filter(|item| item.size_bytes() == max);
            item.is_some_and(|item| item.id == *null.get_or_init(|| id_of_zeros(index.digest(), max)))
        };
        let Place { data, content } = place::open(&path, &identity, &is_null)?;
        let (map, ours) = match content {
            Content::Complete => (None, None),
            Content::Ours { map, state, is_foreign } => (Some(map), Some((state, is_foreign))),
            Content::Others { map, why } => {
                tracing::warn!("backing file {}: {why}; what it has is used, and nothing is added", path.display());
                (Some(map), None)
            }
        };
        let shared = Arc::new(Shared {
            digest: index.digest(),
            index,
            identity,
            path,
            data: Arc::new(data),
            is_complete: AtomicBool::new(map.is_none()),
            map,
            report,
            opened: Instant::now(),
            last_read_ms: AtomicU64::new(0),
            is_faced: Default::default(),
            n_forgotten: AtomicU64::new(0),
            max_wait: config.max_wait,
        });
        let queue_bytes = config.memory_bytes - map_bytes;
        let queue = ours.map(|(state, is_foreign)| {
            writer::start(Arc::clone(&shared), state, is_foreign, config.keep_free_bytes, queue_bytes, config.max_wait)
        });
        let queue = queue.transpose().map_err(|error| BackingError::Unusable(format!("starting a thread: {error}")))?;
        Ok(Self { shared, queue, closed: Once::new() })
    }

    /// The file, if all of the image is in it.
    pub fn complete_file(&self) -> Option<&Arc<File>> {
        self.shared.is_complete.load(Ordering::Acquire).then_some(&self.shared.data)
    }

    /// How much of the image is there.
    pub fn presence(&self) -> Presence {
        let shared = &*self.shared;
        let n_chunks = shared.identity.n_chunks;
        let (n_present, n_claimed) = match &shared.map {
            Some(map) => (map.n_readable(), map.n_claimed()),
            None => (n_chunks, 0),
        };
        Presence {
            path: shared.path.clone(),
            is_complete: shared.is_complete.load(Ordering::Acquire),
            is_filled: self.queue.is_some() && !shared.is_complete.load(Ordering::Acquire),
            n_chunks,
            n_present,
            n_claimed,
        }
    }

    /// Runs of chunks that are there, by their numbers in the index, in order.
    pub fn present_chunks(&self) -> Vec<Range<usize>> {
        match &self.shared.map {
            Some(map) => map.readable_runs(),
            None => Vec::from([Range { start: 0, end: self.shared.index.n_chunks() }]),
        }
    }

    /// Whether a chunk is there, by its number in the index.
    pub fn has(&self, chunk_idx: usize) -> bool {
        self.shared
            .map
            .as_ref()
            .map_or(chunk_idx < self.shared.index.n_chunks(), |map| map.state(chunk_idx).is_readable())
    }

    /// Stops the filling: what was offered is written and flushed, and the state says that the file was left in order. Blocks, for a
    /// bounded time, and the first time only. Reading goes on.
    pub fn close(&self) {
        let Some(queue) = &self.queue else { return };
        self.closed.call_once(|| {
            if !queue.close() {
                let path = self.shared.path.display();
                tracing::warn!("backing file {path}: its disk does not answer; it was not closed in order");
            }
        });
    }

    /// What is known of a chunk.
    pub(super) fn held(&self, chunk_idx: usize) -> Held {
        let Some(map) = &self.shared.map else { return Held::Yes };
        match map.state(chunk_idx) {
            State::Present => Held::Yes,
            State::Written => Held::Claimed,
            State::Claimed if self.queue.is_some() => Held::Claimed,
            State::Claimed | State::Absent => Held::No,
        }
    }

    /// Takes the verified chunks of a read, by their numbers in the index, to be written behind the reader's back. It may be held up until
    /// `by`.
    pub(super) async fn offer(&self, chunks: &[(usize, Chunk)], by: Deadline) {
        let missing = chunks.iter().filter(|(chunk_idx, _)| !self.has(*chunk_idx));
        if let Some(queue) = &self.queue {
            queue.offer(missing.map(|(chunk_idx, chunk)| (*chunk_idx, chunk)), by).await;
        }
    }

    /// Takes a verified chunk of the image for somebody who is in no hurry, and waits until it is written. Whether it is there then.
    pub(super) async fn keep(&self, chunk_idx: usize, chunk: &Chunk) -> bool {
        match &self.queue {
            Some(queue) if !self.has(chunk_idx) => queue.keep(chunk_idx, chunk).await || self.has(chunk_idx),
            _ => self.has(chunk_idx),
        }
    }

    /// Waits until something may be added again after the disk failed or was full. Whether something ever may.
    pub(super) async fn rested(&self) -> bool {
        let Some(queue) = &self.queue else { return false };
        queue.rested().await;
        true
    }

    /// Waits until what was written by now was flushed. How often a flush has failed up to then, or the claims were faced: as long as this
    /// is the same, nothing that was written is lost.
    pub(super) async fn flushed(&self) -> u64 {
        if let Some(queue) = &self.queue {
            queue.flushed().await;
        }
        self.shared.n_forgotten()
    }

    /// Hashes claimed chunks: the chunk, where the claim was right. Blocks.
    pub(super) fn check(&self, claimed: &[usize]) -> Vec<(usize, Option<Chunk>)> {
        let shared = &*self.shared;
        let is_unknown = |chunk_idx: &usize| shared.map().is_some_and(|map| map.state(*chunk_idx) == State::Claimed);
        if claimed.iter().any(is_unknown) && !shared.wait_until_faced() {
            // The disk hangs: they are fetched, and stay claims.
            return claimed.iter().map(|chunk_idx| (*chunk_idx, None)).collect();
        }
        let n_forgotten = shared.n_forgotten();
        let checked = shared.check(claimed);
        if let Some(queue) = &self.queue {
            for (chunk_idx, chunk) in &checked {
                if chunk.is_some() && is_unknown(chunk_idx) {
                    queue.verified(*chunk_idx, n_forgotten);
                }
            }
        }
        checked
    }

    /// Reads from the file what the page cache has: the number of bytes from the start of `buffer` that are right now.
    pub(super) fn read_now(&self, buffer: &mut [u8], offset: u64) -> usize {
        self.shared.touch();
        sys::read_at_nowait(&self.shared.data, buffer, offset).ok().flatten().unwrap_or(0)
    }

    /// Reads from the file. Blocks.
    pub(super) fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.shared.touch();
        self.shared.data.read_exact_at(buffer, offset)
    }

    /// A chunk that should be in the file cannot be read.
    pub(super) fn lost(&self, chunk_idx: usize, error: &io::Error) {
        let shared = &*self.shared;
        shared.report.n_backing_errors.add(1);
        let Some(map) = &shared.map else { return };
        let is_news =
            [State::Present, State::Written].into_iter().any(|from| map.change(chunk_idx, from, State::Absent));
        if is_news {
            tracing::warn!("backing file {}: chunk {chunk_idx} is fetched again: {error}", shared.path.display());
        }
    }

    /// The counters it adds to.
    pub(super) fn report(&self) -> &Report {
        &self.shared.report
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn map(&self) -> Option<&Map> {
        self.map.as_ref()
    }

    /// A chunk of the index, unless that was changed meanwhile.
    fn item(&self, chunk_idx: usize) -> Option<Item> {
        let item = self.index.item(chunk_idx).ok()?;
        self.index.source().check_unchanged().ok().map(|()| item)
    }

    /// Somebody reads.
    fn touch(&self) {
        self.last_read_ms.store(self.opened.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// How long nobody has read.
    fn quiet_for(&self) -> Duration {
        self.opened.elapsed().saturating_sub(Duration::from_millis(self.last_read_ms.load(Ordering::Relaxed)))
    }

    /// Drops the file from memory, so that what is read next is what the disk has. Pages that are not written yet stay; they are part of
    /// the next flush.
    fn forget_pages(&self) {
        // Where this is not possible, there are no pages either.
        let _ = posix_fadvise(&*self.data, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        self.n_forgotten.fetch_add(1, Ordering::AcqRel);
    }

    fn n_forgotten(&self) -> u64 {
        self.n_forgotten.load(Ordering::Acquire)
    }

    fn claims_can_be_checked(&self) {
        let (is_faced, condition) = &self.is_faced;
        *is_faced.lock().unwrap_or_else(PoisonError::into_inner) = true;
        condition.notify_all();
    }

    /// Waits until claims can be checked; `false` when that takes longer than a reader may wait.
    fn wait_until_faced(&self) -> bool {
        let (is_faced, condition) = &self.is_faced;
        let is_faced = is_faced.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = condition.wait_timeout_while(is_faced, self.max_wait, |is_faced| !*is_faced);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Hashes claimed chunks, as one batch. Those that are wrong, or cannot be read, are claimed or written no longer.
    fn check(&self, claimed: &[usize]) -> Vec<(usize, Option<Chunk>)> {
        let mut read = Vec::with_capacity(claimed.len());
        let mut checked = Vec::with_capacity(claimed.len());
        for &chunk_idx in claimed {
            let bytes = self.item(chunk_idx).and_then(|item| {
                let mut bytes = vec![0; usize::try_from(item.size_bytes()).ok()?];
                self.data.read_exact_at(&mut bytes, item.start).ok()?;
                Some((chunk_idx, (item.id, Bytes::from(bytes))))
            });
            match bytes {
                Some(bytes) => read.push(bytes),
                None => checked.push((chunk_idx, None)),
            }
        }
        let (numbers, bytes): (Vec<usize>, Vec<_>) = read.into_iter().unzip();
        let verified = Chunk::verify_batch(self.digest, bytes).into_iter().map(Result::ok);
        checked.extend(numbers.into_iter().zip(verified));
        for (chunk_idx, chunk) in &checked {
            if let (Some(map), None) = (&self.map, chunk) {
                map.change(*chunk_idx, State::Claimed, State::Absent);
                if map.change(*chunk_idx, State::Written, State::Absent) {
                    self.report.n_backing_errors.add(1);
                    tracing::warn!(
                        "backing file {}: chunk {chunk_idx} was lost on its way to the disk",
                        self.path.display()
                    );
                }
            }
        }
        checked
    }
}

fn id_of_zeros(digest: Digest, n_bytes: u64) -> ChunkId {
    let (mut stream, zeros) = (digest.stream(), [0; 4096]);
    let mut left = n_bytes;
    while left > 0 {
        let n = left.min(zeros.len() as u64);
        stream.update(&zeros[..n as usize]);
        left -= n;
    }
    stream.finish()
}

fn make_directory(directory: &Path) -> Result<(), BackingError> {
    make_root(directory).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT | libc::EIO | libc::EROFS) => {
            BackingError::Unusable(format!("{}: {error}", directory.display()))
        }
        _ => BackingError::Refused(format!("{}: {error}", directory.display())),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
