//! A plain file of a store (a `.catar` on a web server), read at any place in blocks of even size.
//!
//! Blocks are kept in memory by recency and, if there is a disk tier, as chunks on disk. What is missing is asked for in ranges as long as
//! the blocks that lie side by side; concurrent readers of a block share one request.
//!
//! `look` is what can be seen of it from outside, and how its settings change.
//!
//! Invariants: all bytes are of the version that the file had when it was opened, else a read is an error; every read ends by the deadline.
//! There is no digest to verify a plain archive with: what is known of its bytes is that the store gave them for this version.

mod look;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use bytes::{Bytes, BytesMut};
use futures_util::stream::{FuturesUnordered, StreamExt};
use lru::LruCache;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::ahead::{AheadBudget, ReadAhead};
use super::background::{Lanes, Purpose, Slot};
use super::budget::Budget;
use super::disk::DiskTier;
use super::disk::blocks::BlockMap;
use super::fetch::PAUSES;
use super::inflight::{Inflight, Leader, Role};
use super::source::{self, Source};
use super::touched::Touched;
use super::{CacheConfig, GetError, Got, MAX_REQUESTS, Want};
use crate::chunk::Chunk;
use crate::digest::Digest;
use crate::report::Report;
use crate::store::figures::{Recorder, in_time};
use crate::store::{FileInfo, FileStore, StoreError};

/// Bytes of a block. Smaller ones would make more requests, larger ones fetch more than is read: a listing reads a few hundred bytes at a
/// place.
pub const BLOCK_BYTES: u64 = 64 << 10;

/// The most blocks of one request.
const MAX_RUN_BLOCKS: usize = 16;

/// What kept blocks are named by.
const BLOCK_DIGEST: Digest = Digest::Sha512_256;

/// A file of a store.
#[derive(Debug, Clone)]
pub struct RemoteFile {
    /// Where it lies; `None` when nothing may be asked for.
    pub files: Option<Arc<dyn FileStore>>,
    /// Its name there.
    pub file: String,
    /// What its blocks are kept under.
    pub key: String,
    /// What messages call it.
    pub name: String,
    /// What was known of it when it was opened.
    pub info: FileInfo,
}

/// A file read in blocks.
#[derive(Debug, Clone)]
pub struct Blocks {
    shared: Arc<Shared>,
    purpose: Purpose,
    /// Who reads it, if anything may be read ahead of them.
    ahead: Option<Arc<ReadAhead>>,
}

#[derive(Debug)]
struct Shared {
    /// Without its store, which is in `files`.
    remote: RemoteFile,
    /// Replaced when settings change; held only to clone.
    files: RwLock<Option<Arc<dyn FileStore>>>,
    recorder: Recorder,
    /// The number of this file in what it shares with others.
    file_id: u64,
    room: Arc<BlockRoom>,
    inflight: Arc<Inflight<u64, Got<Bytes>, GetError>>,
    kept: Option<Kept>,
    /// Which parts were read since it was opened.
    touched: Touched,
    /// Changed as a whole; held only to copy.
    config: RwLock<CacheConfig>,
    report: Arc<Report>,
}

/// The memory and the limits that several files share.
#[derive(Debug)]
pub struct BlockRoom {
    /// By file and block. Never held over I/O or await; may be taken under the lock of `inflight`.
    memory: Mutex<LruCache<(u64, u64), Bytes>>,
    requests: Semaphore,
    /// Bytes of blocks read or asked for at the same time.
    budget: Arc<Budget>,
    /// What is fetched without anyone waiting.
    lanes: Lanes,
    n_files: AtomicU64,
}

impl BlockRoom {
    /// Room for as much as the configuration says.
    pub fn new(config: &CacheConfig, report: &Arc<Report>) -> Self {
        Self {
            memory: Mutex::new(LruCache::new(capacity(config))),
            requests: Semaphore::new(MAX_REQUESTS),
            budget: Budget::new(inflight_bytes(config)),
            lanes: Lanes::new(config.inflight_bytes, 1, Arc::clone(report)),
            n_files: AtomicU64::new(0),
        }
    }

    /// Room for another amount from now on.
    pub fn configure(&self, config: &CacheConfig) {
        self.budget.set_limit(inflight_bytes(config));
        self.lanes.set_inflight_bytes(config.inflight_bytes);
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).resize(capacity(config));
    }
}

/// Blocks on disk: which chunk each is, and the tier that has the chunks.
#[derive(Debug)]
struct Kept {
    disk: Arc<DiskTier>,
    ids: BlockMap,
}

type BlockLeader = Leader<u64, Got<Bytes>, GetError>;

impl Blocks {
    /// Opens a file. With `disk`, blocks are kept there if the file has a version to know them by.
    pub fn new(remote: RemoteFile, disk: Option<Arc<DiskTier>>, config: CacheConfig, report: Arc<Report>) -> Self {
        let room = Arc::new(BlockRoom::new(&config, &report));
        Self::sharing(remote, disk, config, report, room)
    }

    /// The same, with memory and limits that other files have, too.
    pub fn sharing(
        mut remote: RemoteFile,
        disk: Option<Arc<DiskTier>>,
        config: CacheConfig,
        report: Arc<Report>,
        room: Arc<BlockRoom>,
    ) -> Self {
        let kept = disk.zip(remote.info.version.as_ref()).map(|(disk, version)| {
            let ids = disk.block_ids(&remote.key, &version.0);
            Kept { disk, ids }
        });
        let file_id = room.n_files.fetch_add(1, Ordering::Relaxed);
        let touched = Touched::new(remote.info.size, remote.info.size.div_ceil(BLOCK_BYTES));
        let shared = Shared {
            touched,
            files: RwLock::new(remote.files.take()),
            remote,
            recorder: Recorder::default(),
            file_id,
            room,
            inflight: Arc::default(),
            kept,
            config: RwLock::new(config),
            report,
        };
        Self { shared: Arc::new(shared), purpose: Purpose::Reader, ahead: None }
    }

    /// The same file, with something that may be read ahead of its readers.
    pub fn with_ahead(mut self, budget: Arc<AheadBudget>) -> Self {
        self.ahead = Some(Arc::new(ReadAhead::new(budget)));
        self
    }

    /// The same file, read for another purpose.
    pub fn for_purpose(&self, purpose: Purpose) -> Self {
        Self { shared: Arc::clone(&self.shared), purpose, ahead: self.ahead.clone() }
    }

    /// Who reads it.
    pub fn ahead(&self) -> Option<&Arc<ReadAhead>> {
        self.ahead.as_ref()
    }

    /// Whether blocks are kept on disk.
    pub fn is_kept(&self) -> bool {
        self.shared.kept.is_some()
    }

    /// Whether the store is asked.
    pub fn is_offline(&self) -> bool {
        self.shared.config().is_offline || self.shared.files().is_none()
    }

    /// Gets blocks without holding them.
    ///
    /// # Errors
    /// The first that cannot be had.
    pub async fn fetch(&self, numbers: Range<u64>) -> Result<(), GetError> {
        let numbers: Vec<u64> = numbers.collect();
        self.get(&numbers).await.map(drop)
    }

    /// Length of the file in bytes.
    pub fn size(&self) -> u64 {
        self.shared.remote.info.size
    }

    /// Which file and version it is, if the store tells versions apart.
    pub fn identity(&self) -> Option<String> {
        let RemoteFile { key, info, .. } = &self.shared.remote;
        info.version.as_ref().map(|version| format!("remote {key} {} {}", info.size, version.0))
    }

    /// Exactly `n_bytes` (at least one) from `offset`; the range lies in the file. Ready at the first poll when the blocks are in memory.
    ///
    /// # Errors
    /// The bytes cannot be had, or the file was changed.
    pub async fn read_at(&self, offset: u64, n_bytes: usize) -> Result<Bytes, GetError> {
        let end = offset + n_bytes as u64;
        let first = offset / BLOCK_BYTES;
        let last = (end - 1) / BLOCK_BYTES;
        let numbers: Vec<u64> = (first..=last).collect();
        let blocks = self.get(&numbers).await?;
        let start = (offset - first * BLOCK_BYTES) as usize;
        if let [block] = blocks.as_slice() {
            return Ok(block.slice(start..start + n_bytes));
        }
        let mut bytes = BytesMut::with_capacity(n_bytes);
        let mut skip = start;
        for block in &blocks {
            let take = (block.len() - skip).min(n_bytes - bytes.len());
            bytes.extend_from_slice(&block[skip..skip + take]);
            skip = 0;
        }
        Ok(bytes.freeze())
    }

    /// Gets the blocks that some offsets lie in, side by side, and gives each by the offset it starts at: those of as many offsets, in the
    /// order given, as `max_bytes` hold, and of one at the least. Gives the number of offsets, too.
    ///
    /// # Errors
    /// A block cannot be had, or an offset lies outside of the file.
    pub async fn hold(&self, offsets: &[u64], max_bytes: u64) -> Result<(BTreeMap<u64, Bytes>, usize), GetError> {
        let mut numbers: Vec<u64> = Vec::new();
        let mut n_offsets = 0;
        for offset in offsets {
            if *offset >= self.size() {
                return Err(self.shared.outside(*offset));
            }
            let number = offset / BLOCK_BYTES;
            // Offsets mostly come in order, and many lie in the same block.
            if numbers.last() != Some(&number) {
                if !numbers.is_empty() && (numbers.len() as u64 + 1) * BLOCK_BYTES > max_bytes {
                    break;
                }
                numbers.push(number);
            }
            n_offsets += 1;
        }
        let blocks = self.get(&numbers).await?;
        Ok((numbers.into_iter().map(|number| number * BLOCK_BYTES).zip(blocks).collect(), n_offsets))
    }

    /// Some blocks, in the order given.
    async fn get(&self, numbers: &[u64]) -> Result<Vec<Bytes>, GetError> {
        let shared = &self.shared;
        let is_reader = !self.purpose.is_background();
        if is_reader {
            for number in numbers {
                shared.touched.mark(number * BLOCK_BYTES, BLOCK_BYTES);
            }
        }
        let mut blocks = vec![Bytes::new(); numbers.len()];
        let mut followers = FuturesUnordered::new();
        // A reader's blocks all at once, what is fetched in the background as it is let in.
        let paced = usize::try_from(self.purpose.max_group_bytes() / BLOCK_BYTES).unwrap_or(usize::MAX);
        let group_size = if is_reader { numbers.len() } else { paced.clamp(1, MAX_RUN_BLOCKS) };
        for (group_idx, group) in numbers.chunks(group_size.max(1)).enumerate() {
            let mut leaders: Vec<BlockLeader> = Vec::new();
            let slot = match is_reader || group.iter().all(|number| shared.is_in_memory(*number)) {
                true => None,
                false => shared.room.lanes.enter(&self.purpose, group.len(), group.len() as u64 * BLOCK_BYTES).await,
            };
            for (idx, &number) in group.iter().enumerate() {
                let block_idx = group_idx * group_size + idx;
                if let Some(block) = shared.in_memory(number) {
                    shared.report.n_memory_hits.add(u64::from(is_reader));
                    blocks[block_idx] = block;
                    continue;
                }
                let in_memory = || shared.in_memory(number).map(|block| (block, Source::Memory));
                let follower = match shared.inflight.join(number, in_memory) {
                    Role::Arrived((block, _)) => {
                        blocks[block_idx] = block;
                        continue;
                    }
                    Role::Leader(leader, follower) => {
                        leaders.push(leader);
                        follower
                    }
                    Role::Follower(follower) => follower,
                };
                shared.report.n_memory_misses.add(u64::from(is_reader));
                followers.push(async move { (block_idx, follower.outcome().await) });
            }
            start(shared, leaders, slot);
        }
        if followers.is_empty() {
            return Ok(blocks);
        }
        let _waiting = is_reader.then(|| (shared.room.lanes.wait(), shared.report.waiting_for_chunks.enter()));
        let timeout = shared.config().fetch_timeout;
        let deadline = Instant::now() + timeout + timeout / 20;
        while let Ok(told) = tokio::time::timeout_at(deadline, followers.next()).await {
            let Some((block_idx, outcome)) = told else { return Ok(blocks) };
            let (block, from) = outcome?;
            source::note(from);
            if is_reader && !shared.is_in_memory(numbers[block_idx]) {
                // Fetched for later by somebody else, and now wanted.
                shared.remember(numbers[block_idx], block.clone());
            }
            blocks[block_idx] = block;
        }
        Err(shared.late())
    }
}

/// How many blocks are kept in memory.
fn capacity(config: &CacheConfig) -> NonZeroUsize {
    let n_blocks = usize::try_from(config.memory_bytes / BLOCK_BYTES).unwrap_or(usize::MAX);
    NonZeroUsize::new(n_blocks).unwrap_or(NonZeroUsize::MIN)
}

/// How many bytes of blocks may be in flight: of one run at the least.
fn inflight_bytes(config: &CacheConfig) -> u64 {
    config.inflight_bytes.max(MAX_RUN_BLOCKS as u64 * BLOCK_BYTES)
}

/// Starts to get blocks, each run of neighbours by a task of its own. `slot` is what they were let in to, if nobody waits.
fn start(shared: &Arc<Shared>, leaders: Vec<BlockLeader>, slot: Option<Slot>) {
    let slot = slot.map(Arc::new);
    let mut run: Vec<BlockLeader> = Vec::new();
    let spawn = |run: Vec<BlockLeader>| {
        let (shared, slot) = (Arc::clone(shared), slot.clone());
        tokio::spawn(async move { shared.get_run(run, slot).await });
    };
    for leader in leaders {
        let follows = run.last().is_some_and(|last| last.key() + 1 == leader.key());
        if !run.is_empty() && (!follows || run.len() == MAX_RUN_BLOCKS) {
            spawn(std::mem::take(&mut run));
        }
        run.push(leader);
    }
    if !run.is_empty() {
        spawn(run);
    }
}

impl Shared {
    /// Gets blocks that lie side by side: those on disk from there, the others by one request for each stretch of them.
    async fn get_run(self: Arc<Self>, run: Vec<BlockLeader>, slot: Option<Arc<Slot>>) {
        let _share = self.room.budget.take(run.len() as u64 * BLOCK_BYTES).await;
        let deadline = Instant::now() + self.config().fetch_timeout;
        let run = if self.kept.is_some() { Arc::clone(&self).take_kept(run, slot.clone()).await } else { run };
        let mut stretches: Vec<Vec<BlockLeader>> = Vec::new();
        for leader in run {
            match stretches.last_mut() {
                Some(stretch) if stretch.last().is_some_and(|last| last.key() + 1 == leader.key()) => {
                    stretch.push(leader);
                }
                _ => stretches.push(vec![leader]),
            }
        }
        let fetches = stretches.into_iter().map(|stretch| Arc::clone(&self).fetch(stretch, deadline, slot.clone()));
        let fetches: FuturesUnordered<_> = fetches.collect();
        fetches.collect::<()>().await;
    }

    /// Takes what the disk tier has; gives back the rest.
    async fn take_kept(self: Arc<Self>, run: Vec<BlockLeader>, slot: Option<Arc<Slot>>) -> Vec<BlockLeader> {
        let work = tokio::task::spawn_blocking(move || {
            let Some(kept) = &self.kept else { return run };
            let mut left = Vec::new();
            for leader in run {
                let number = leader.key();
                let n_bytes = self.span(number, 1).end - number * BLOCK_BYTES;
                let chunk = kept.ids.get(number).and_then(|id| kept.disk.get(BLOCK_DIGEST, &Want { id, n_bytes }));
                match chunk {
                    Some(chunk) => self.tell(leader, chunk.plain().clone(), Source::Disk, slot.as_deref()),
                    None => left.push(leader),
                }
            }
            left
        });
        work.await.unwrap_or_default()
    }

    /// Asks for a stretch of blocks, and again while that fails in a way that can pass.
    async fn fetch(self: Arc<Self>, stretch: Vec<BlockLeader>, deadline: Instant, slot: Option<Arc<Slot>>) {
        let first = stretch.first().map_or(0, Leader::key);
        let span = self.span(first, stretch.len() as u64);
        let fetched = self.fetch_span(span.clone(), deadline).await;
        self.report.n_fetches.add(1);
        let bytes = match fetched {
            Ok(bytes) => bytes,
            Err(error) => {
                self.report.n_store_errors.add(1);
                stretch.into_iter().for_each(|leader| leader.tell(Err(error.clone())));
                return;
            }
        };
        self.report.fetched_bytes.add(bytes.len() as u64);
        if let Some(slot) = &slot {
            slot.fetched(bytes.len() as u64);
        }
        let into_memory = slot.as_ref().is_none_or(|slot| slot.into_memory);
        let mut to_keep = Vec::with_capacity(stretch.len());
        let mut untold = Vec::new();
        for leader in stretch {
            let number = leader.key();
            let start = (number * BLOCK_BYTES - span.start) as usize;
            let end = bytes.len().min(start + BLOCK_BYTES as usize);
            // A copy, so that a block in memory does not hold its whole stretch.
            let block = Bytes::copy_from_slice(&bytes[start..end]);
            to_keep.push((number, block.clone()));
            match into_memory {
                true => self.tell(leader, block, Source::Store, slot.as_deref()),
                // Kept before anyone is told: where else would they find it?
                false => untold.push((leader, block)),
            }
        }
        if self.kept.is_some() {
            let shared = Arc::clone(&self);
            let kept = tokio::task::spawn_blocking(move || shared.keep(to_keep));
            drop(kept.await);
        }
        for (leader, block) in untold {
            self.tell(leader, block, Source::Store, slot.as_deref());
        }
    }

    async fn fetch_span(&self, span: Range<u64>, deadline: Instant) -> Result<Bytes, GetError> {
        let remote = &self.remote;
        let Some(files) = self.files().filter(|_| !self.config().is_offline) else {
            let what = format!("bytes {} to {} of {}", span.start, span.end, remote.name);
            return Err(GetError::Offline { what });
        };
        let wanted = (span.end - span.start) as usize;
        let mut n_before = 0;
        let mut last_error: Option<StoreError> = None;
        loop {
            let request = async {
                let waiting = self.report.waiting_for_turn.enter();
                let _permit = self.room.requests.acquire().await;
                drop(waiting);
                let request = self.recorder.begin();
                let answer = files.read_range(&remote.file, span.clone(), remote.info.version.as_ref()).await;
                match &answer {
                    Ok(bytes) => request.found(bytes.len() as u64),
                    Err(error) => request.failed(error),
                }
                answer
            };
            let error = match in_time(deadline, self.config().fetch_timeout, request).await {
                Err(_) => return Err(last_error.map_or_else(|| self.late(), GetError::Store)),
                Ok(Ok(bytes)) if bytes.len() == wanted => return Ok(bytes),
                Ok(Ok(bytes)) => {
                    let reason = format!("{} bytes came instead of {wanted}", bytes.len());
                    StoreError::transient(files.name(), &remote.name, reason)
                }
                Ok(Err(error)) => error,
            };
            if !error.is_transient {
                return Err(GetError::Store(error));
            }
            last_error = Some(error);
            tokio::time::sleep_until((Instant::now() + PAUSES.wait(n_before)).min(deadline)).await;
            n_before += 1;
        }
    }

    /// Puts a block into memory, unless it is for later, and tells who waits for it.
    fn tell(&self, leader: BlockLeader, block: Bytes, source: Source, slot: Option<&Slot>) {
        if slot.is_none_or(|slot| slot.into_memory) {
            self.remember(leader.key(), block.clone());
        }
        if let Some(slot) = slot {
            slot.arrived(block.len() as u64);
        }
        leader.tell(Ok((block, source)));
    }

    fn remember(&self, number: u64, block: Bytes) {
        let evicted = self.lock().push((self.file_id, number), block);
        self.report.n_evicted.add(u64::from(evicted.is_some()));
    }

    fn keep(&self, blocks: Vec<(u64, Bytes)>) {
        let Some(kept) = &self.kept else { return };
        for (number, block) in blocks {
            let chunk = Chunk::of(BLOCK_DIGEST, block);
            kept.disk.keep(&chunk, None);
            kept.ids.set(number, chunk.id());
        }
    }

    /// The bytes that some blocks are.
    fn span(&self, first: u64, n_blocks: u64) -> Range<u64> {
        let start = first * BLOCK_BYTES;
        start..(start + n_blocks * BLOCK_BYTES).min(self.remote.info.size)
    }

    fn outside(&self, offset: u64) -> GetError {
        let store = self.store_name();
        let reason = format!("there is no byte {offset}: the file has {}", self.remote.info.size);
        GetError::Store(StoreError::new(store, &self.remote.name, reason))
    }

    fn late(&self) -> GetError {
        let store = self.store_name();
        let reason = format!("no answer within {} s", self.config().fetch_timeout.as_secs_f32());
        GetError::Store(StoreError::transient(store, &self.remote.name, reason))
    }

    fn files(&self) -> Option<Arc<dyn FileStore>> {
        self.files.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn store_name(&self) -> String {
        self.files().map_or_else(String::new, |files| files.name().to_owned())
    }

    fn config(&self) -> CacheConfig {
        *self.config.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_in_memory(&self, number: u64) -> bool {
        self.lock().contains(&(self.file_id, number))
    }

    fn in_memory(&self, number: u64) -> Option<Bytes> {
        self.lock().get(&(self.file_id, number)).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, LruCache<(u64, u64), Bytes>> {
        self.room.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::time::Duration;

    use futures_util::future::BoxFuture;

    use crate::store::{FileVersion, files};

    /// A file in memory: every `fail_every`-th range fails in a way that can pass.
    #[derive(Debug)]
    struct Memory {
        content: Vec<u8>,
        version: Mutex<FileVersion>,
        n_ranges: AtomicU64,
        fail_every: u64,
    }

    impl FileStore for Memory {
        fn name(&self) -> &str {
            "memory"
        }

        fn stat<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Option<FileInfo>, StoreError>> {
            unreachable!("the file is open")
        }

        fn read_whole<'a>(
            &'a self,
            _: &'a str,
            _: Option<&'a FileVersion>,
            _: u64,
        ) -> BoxFuture<'a, Result<files::ReadWhole, StoreError>> {
            unreachable!("the file is read by ranges")
        }

        fn read_range<'a>(
            &'a self,
            file: &'a str,
            range: Range<u64>,
            version: Option<&'a FileVersion>,
        ) -> BoxFuture<'a, Result<Bytes, StoreError>> {
            Box::pin(async move {
                tokio::task::yield_now().await;
                let n_before = self.n_ranges.fetch_add(1, Ordering::SeqCst);
                if self.fail_every > 0 && n_before.is_multiple_of(self.fail_every) {
                    return Err(StoreError::transient("memory", file, "unlucky"));
                }
                if version != Some(&*self.version.lock().unwrap()) {
                    return Err(files::changed("memory", file));
                }
                Ok(Bytes::copy_from_slice(&self.content[range.start as usize..range.end as usize]))
            })
        }

        fn write<'a>(&'a self, _: &'a str, _: Bytes) -> BoxFuture<'a, Result<(), StoreError>> {
            unreachable!("the file is only read")
        }
    }

    fn open(n_bytes: usize, fail_every: u64, memory_bytes: u64) -> (Blocks, Arc<Memory>) {
        let content = (0..n_bytes as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let version = FileVersion("1".into());
        let memory =
            Arc::new(Memory { content, version: Mutex::new(version.clone()), n_ranges: AtomicU64::new(0), fail_every });
        let info = FileInfo { size: n_bytes as u64, version: Some(version), mtime: None, has_ranges: true };
        let files: Arc<dyn FileStore> = Arc::clone(&memory) as Arc<dyn FileStore>;
        let remote =
            RemoteFile { files: Some(files), file: "f".into(), key: "f".into(), name: "memory/f".into(), info };
        let config = CacheConfig {
            memory_bytes,
            inflight_bytes: 1 << 20,
            fetch_timeout: Duration::from_secs(5),
            is_offline: false,
        };
        (Blocks::new(remote, None, config, Arc::default()), memory)
    }

    #[tokio::test(start_paused = true)]
    async fn any_range_is_read_whatever_fails() {
        let n_bytes = 5 * BLOCK_BYTES as usize + 123;
        for (fail_every, memory_bytes) in [(0, 1 << 20), (2, 1 << 20), (3, 0)] {
            let (blocks, memory) = open(n_bytes, fail_every, memory_bytes);
            for (offset, len) in [(0, 1), (n_bytes - 1, 1), (0, n_bytes), (65_530, 12), (200_000, 100_000)] {
                let read = blocks.read_at(offset as u64, len).await.unwrap();
                assert_eq!(read, memory.content[offset..offset + len]);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn neighbours_are_one_request_and_readers_share_it() {
        let (blocks, memory) = open(10 * BLOCK_BYTES as usize, 0, 1 << 20);
        let reads = (0..4).map(|_| blocks.read_at(0, 10 * BLOCK_BYTES as usize));
        for read in futures_util::future::join_all(reads).await {
            assert_eq!(read.unwrap(), memory.content);
        }
        blocks.read_at(77, 1000).await.unwrap();
        assert_eq!(memory.n_ranges.load(Ordering::SeqCst), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_file_is_an_error_at_once() {
        let (blocks, memory) = open(3 * BLOCK_BYTES as usize, 0, 0);
        blocks.read_at(0, 10).await.unwrap();
        *memory.version.lock().unwrap() = FileVersion("2".into());
        let start = Instant::now();
        let error = blocks.read_at(BLOCK_BYTES, 10).await.unwrap_err().to_string();
        assert!(error.contains("changed"), "{error}");
        assert_eq!(start.elapsed().as_secs(), 0);
    }
}
