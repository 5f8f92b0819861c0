//! Chunk id to verified plain bytes: memory, then the chunks in flight, then the disk, then the store. The only way up.
//!
//! * [`memory`] keeps plain chunks by recency, weighed by their bytes; [`disk`] keeps stored ones in a directory, [`keeper`] in a store.
//! * [`blocks`] does for a plain file of a store what the rest does for chunks.
//! * [`budget`] bounds the bytes in flight; [`source`] tells where bytes came from, [`touched`] what was read.
//! * `inflight` makes concurrent askers of one chunk share one fetch.
//! * [`background`] lets fetches in that nobody waits for yet; [`ahead`] knows who reads where, and what to read ahead of them.
//! * [`Cache`] puts them together: what is missing is fetched in small batches that run side by side; each batch is decoded
//!   and verified together on a blocking thread.
//!
//! Invariants: bytes leave only as a [`Chunk`], so verified; every fetch ends by its deadline; a fetch goes on when its asker goes
//! away, so that the work is not lost; what is in memory and in flight stays within the memory budget.

pub mod ahead;
pub mod background;
pub mod blocks;
pub mod budget;
pub mod disk;
mod fetch;
mod inflight;
pub mod keeper;
pub mod memory;
pub mod source;
pub mod touched;

use std::fmt::Debug;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::chunk::Chunk;
use crate::digest::{ChunkId, Digest};
use crate::report::Report;
use crate::store::latency::Latencies;
use crate::store::{Store, StoreError};
use ahead::AheadBudget;
use background::{Lanes, Purpose};
use budget::{Budget, BudgetUse};
use disk::DiskTier;
use inflight::{Abandoned, Inflight, Leader, Role};
use keeper::Keeper;
use memory::MemoryTier;
use source::Source;

/// Chunks fetched, decoded and verified as one batch. Eight is what a multi-lane digest takes at once; more would make
/// the first chunk of a batch wait longer for the last.
pub const BATCH_CHUNKS: usize = 8;

/// Batches of a blocking store decoded at the same time, for each core: more than one, since opening the files of a cold store waits for
/// the disk (eight outstanding opens on two cores gave three times the throughput of two).
const BATCHES_PER_CORE: usize = 4;

/// Requests to stores that answer over a network, at the same time.
const MAX_REQUESTS: usize = 64;

/// One chunk that is wanted: its id and the length the index gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Want {
    /// The chunk's id.
    pub id: ChunkId,
    /// Plain bytes the index says it has.
    pub n_bytes: u64,
}

/// Why a chunk cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GetError {
    /// No store has it.
    #[error("chunk {id} is missing in {stores}")]
    Missing {
        /// The chunk.
        id: ChunkId,
        /// The stores asked.
        stores: String,
    },
    /// The bytes a store has are not the chunk.
    #[error("chunk {id} from {stores} is bad: {reason}")]
    Bad {
        /// The chunk.
        id: ChunkId,
        /// The stores asked.
        stores: String,
        /// What is wrong with the bytes.
        reason: String,
    },
    /// The index gives a chunk a length it does not have.
    #[error("the index gives chunk {id} {wanted} bytes, the chunk has {found}")]
    WrongLength {
        /// The chunk.
        id: ChunkId,
        /// Bytes by the index.
        wanted: u64,
        /// Bytes of the verified chunk.
        found: u64,
    },
    /// A store failed.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// It is not kept, and no store may be asked.
    #[error("{what} is not in the cache, and the stores are not asked (offline)")]
    Offline {
        /// A chunk, or a part of a file.
        what: String,
    },
    /// The store did not answer in time.
    #[error("chunk {id}: no answer from {stores} within {} s", timeout.as_secs_f32())]
    Deadline {
        /// The chunk.
        id: ChunkId,
        /// The stores asked.
        stores: String,
        /// How long the fetch was given.
        timeout: Duration,
    },
    /// The fetch ended without an answer (a bug, or the program is ending).
    #[error("the fetch of a chunk was given up")]
    Abandoned,
}

impl Abandoned for GetError {
    fn abandoned() -> Self {
        Self::Abandoned
    }
}

/// The duty to fetch a chunk.
type ChunkLeader = Leader<ChunkId, Got<Chunk>, GetError>;

/// What was had, and from where.
type Got<T> = (T, Source);

/// How a cache behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheConfig {
    /// Bytes of plain chunks kept in memory.
    pub memory_bytes: u64,
    /// Bytes of plain chunks being fetched at any time; one chunk is always let through.
    pub inflight_bytes: u64,
    /// How long one fetch may take, whatever has to be asked again.
    pub fetch_timeout: Duration,
    /// Whether the stores that are asked are caches only, so that a chunk they lack is not "missing".
    pub is_offline: bool,
}

/// What keeps chunks beyond the memory.
#[derive(Debug, Clone, Default)]
pub struct Tiers {
    /// A directory.
    pub disk: Option<Arc<DiskTier>>,
    /// A store, which is the first of those that are asked.
    pub keeper: Option<Arc<Keeper>>,
}

/// Somebody who wants to know which chunks readers touch, in memory or not.
pub trait Touches: Debug + Send + Sync {
    /// A reader touches a chunk. Called for every read, so it has to be quick, and must not wait.
    fn touched(&self, id: ChunkId);
}

/// The cache of one or more blobs over one store, as it is used for some purpose; one [beside](Cache::beside) it has another store and the
/// same limits.
#[derive(Debug, Clone)]
pub struct Cache {
    shared: Arc<Shared>,
    purpose: Purpose,
}

/// What all users of a cache and its fetches share.
#[derive(Debug)]
struct Shared {
    /// Replaced when settings change; never locked over I/O or await.
    store: RwLock<Arc<dyn Store>>,
    disk: Option<Arc<DiskTier>>,
    keeper: Option<Arc<Keeper>>,
    memory: Arc<MemoryTier>,
    inflight: Arc<Inflight<ChunkId, Got<Chunk>, GetError>>,
    /// Changed as a whole; held only to copy.
    config: RwLock<CacheConfig>,
    /// Bytes of chunks in flight.
    budget: Arc<Budget>,
    /// Batches of a blocking store, and decoding, at the same time.
    workers: Arc<Semaphore>,
    /// Requests to a store that is not blocking, at the same time.
    requests: Arc<Semaphore>,
    /// Of requests to such a store; never held over I/O or await.
    latencies: Mutex<Latencies>,
    /// What is fetched without anyone waiting.
    lanes: Arc<Lanes>,
    /// What may be read ahead of readers; nothing when it is not set.
    ahead: OnceLock<Arc<AheadBudget>>,
    touches: OnceLock<Arc<dyn Touches>>,
    report: Arc<Report>,
}

impl Cache {
    /// An empty cache over a store, without tiers beyond the memory.
    pub fn new(store: Arc<dyn Store>, config: CacheConfig, report: Arc<Report>) -> Self {
        Self::with_tiers(store, Tiers::default(), config, report)
    }

    /// A cache over a store and what is kept of it.
    pub fn with_tiers(store: Arc<dyn Store>, tiers: Tiers, config: CacheConfig, report: Arc<Report>) -> Self {
        let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
        let shared = Shared {
            store: RwLock::new(store),
            disk: tiers.disk,
            keeper: tiers.keeper,
            memory: Arc::new(MemoryTier::new(config.memory_bytes)),
            inflight: Arc::default(),
            config: RwLock::new(config),
            budget: Budget::new(config.inflight_bytes),
            workers: Arc::new(Semaphore::new(BATCHES_PER_CORE * n_cores)),
            requests: Arc::new(Semaphore::new(MAX_REQUESTS)),
            latencies: Mutex::default(),
            lanes: Arc::new(Lanes::new(config.inflight_bytes, BATCHES_PER_CORE * n_cores, Arc::clone(&report))),
            ahead: OnceLock::new(),
            touches: OnceLock::new(),
            report,
        };
        Self { shared: Arc::new(shared), purpose: Purpose::Reader }
    }

    /// Whether nobody waits for what is got.
    pub fn is_background(&self) -> bool {
        self.purpose.is_background()
    }

    /// The same cache for another purpose.
    pub fn for_purpose(&self, purpose: Purpose) -> Self {
        Self { shared: Arc::clone(&self.shared), purpose }
    }

    /// Sets what may be read ahead of those who read blobs over this cache; once, and before the blobs are made.
    pub fn set_ahead(&self, budget: Arc<AheadBudget>) {
        // Set twice, the first one holds.
        let _ = self.shared.ahead.set(budget);
    }

    /// What may be read ahead.
    pub fn ahead(&self) -> Option<&Arc<AheadBudget>> {
        self.shared.ahead.get()
    }

    /// How long one fetch may take, whatever has to be asked again.
    pub fn fetch_timeout(&self) -> Duration {
        self.shared.config().fetch_timeout
    }

    /// Tells somebody from now on what readers touch; only the first who wants it is told.
    pub fn set_touches(&self, touches: Arc<dyn Touches>) {
        let _ = self.shared.touches.set(touches);
    }

    /// Who is to be told of a chunk that is read without being asked for here; `None` when nobody is, or no reader reads it.
    pub fn touches(&self) -> Option<&dyn Touches> {
        self.shared.touches.get().filter(|_| !self.is_background()).map(AsRef::as_ref)
    }

    /// A cache over another store with the same tiers, limits and counters as this one: what either has got serves both. What is in
    /// flight is each one's own, since one store may have what the other lacks.
    pub fn beside(&self, store: Arc<dyn Store>) -> Self {
        let own = &self.shared;
        let shared = Shared {
            store: RwLock::new(store),
            disk: own.disk.clone(),
            keeper: own.keeper.clone(),
            memory: Arc::clone(&own.memory),
            inflight: Arc::default(),
            config: RwLock::new(own.config()),
            budget: Arc::clone(&own.budget),
            workers: Arc::clone(&own.workers),
            requests: Arc::clone(&own.requests),
            latencies: Mutex::default(),
            lanes: Arc::clone(&own.lanes),
            ahead: own.ahead.clone(),
            touches: own.touches.clone(),
            report: Arc::clone(&own.report),
        };
        Self { shared: Arc::new(shared), purpose: self.purpose.clone() }
    }

    /// The chunk, if it is in memory and as long as the index says.
    pub fn peek(&self, want: &Want) -> Option<Chunk> {
        let chunk = self.shared.memory.get(&want.id)?;
        if let Some(touches) = self.touches() {
            touches.touched(want.id);
        }
        self.shared.report.n_memory_hits.add(1);
        (chunk.plain().len() as u64 == want.n_bytes).then_some(chunk)
    }

    /// Gets some chunks and hands each, with its place in `wants`, to `take` as soon as it is there. Chunks in memory are
    /// handed over at the first poll; what is missing is fetched concurrently.
    ///
    /// # Errors
    /// The first chunk that cannot be had; the fetches of the others go on.
    pub async fn get_many(
        &self,
        digest: Digest,
        wants: &[Want],
        mut take: impl FnMut(usize, Chunk) + Send,
    ) -> Result<(), GetError> {
        self.gather(digest, wants, |want_idx, got| got.map(|chunk| take(want_idx, chunk))).await
    }

    /// Gets some chunks and tells of each whether it could be had, without holding any of them.
    pub async fn get_each(&self, digest: Digest, wants: &[Want]) -> Vec<Result<(), GetError>> {
        let mut outcomes = vec![Err(GetError::Abandoned); wants.len()];
        let gathered = self.gather(digest, wants, |want_idx, got| {
            outcomes[want_idx] = got.map(drop);
            Ok(())
        });
        if let Err(late) = gathered.await {
            for outcome in outcomes.iter_mut().filter(|outcome| **outcome == Err(GetError::Abandoned)) {
                *outcome = Err(late.clone());
            }
        }
        outcomes
    }

    /// Gets some chunks and hands the outcome of each to `take`, until that fails, or the deadline is there.
    async fn gather(
        &self,
        digest: Digest,
        wants: &[Want],
        mut take: impl FnMut(usize, Result<Chunk, GetError>) -> Result<(), GetError> + Send,
    ) -> Result<(), GetError> {
        let shared = &self.shared;
        let is_reader = !self.purpose.is_background();
        if let Some(touches) = self.touches() {
            wants.iter().for_each(|want| touches.touched(want.id));
        }
        let mut followers = FuturesUnordered::new();
        let mut hand_over = |want_idx: usize, got: Result<Chunk, GetError>| {
            take(want_idx, got.and_then(|chunk| checked(&wants[want_idx], chunk)))
        };
        // A failure is kept until the fetches have been started: others may already follow them.
        let mut failure = Ok(());
        let mut is_waiting = vec![false; wants.len()];
        let mut start = 0;
        while start < wants.len() {
            // A reader's chunks all at once, what is fetched in the background as it is let in.
            let group = if is_reader { 0..wants.len() } else { self.group(wants, start) };
            start = group.end;
            let mut leaders = Vec::new();
            let slot = match is_reader || group.clone().all(|i| shared.memory.get(&wants[i].id).is_some()) {
                true => None,
                false => {
                    let n_bytes = wants[group.clone()].iter().map(|want| want.n_bytes).sum();
                    shared.lanes.enter(&self.purpose, group.len(), n_bytes).await
                }
            };
            for want_idx in group {
                let want = &wants[want_idx];
                if let Some(chunk) = shared.memory.get(&want.id) {
                    shared.report.n_memory_hits.add(u64::from(is_reader));
                    failure = failure.and(hand_over(want_idx, Ok(chunk)));
                    continue;
                }
                let follower = match shared.inflight.join(want.id, || shared.in_memory(&want.id)) {
                    Role::Arrived((chunk, _)) => {
                        shared.report.n_memory_hits.add(u64::from(is_reader));
                        failure = failure.and(hand_over(want_idx, Ok(chunk)));
                        continue;
                    }
                    Role::Leader(leader, follower) => {
                        leaders.push((leader, want.n_bytes));
                        follower
                    }
                    Role::Follower(follower) => follower,
                };
                shared.report.n_memory_misses.add(u64::from(is_reader));
                is_waiting[want_idx] = true;
                followers.push(async move { (want_idx, follower.outcome().await) });
            }
            fetch::start(shared, digest, leaders, slot);
        }
        failure?;
        if followers.is_empty() {
            return Ok(());
        }
        let _waiting = is_reader.then(|| shared.lanes.wait());
        // One deadline for all, whatever a fetch waits for: a store of any kind, a worker, the budget. A little later than that of a
        // request to a store, so that a request that ends by its own is over when its readers hear of it.
        let _waiting_now = is_reader.then(|| shared.report.waiting_for_chunks.enter());
        let timeout = shared.config().fetch_timeout;
        let deadline = Instant::now() + timeout + timeout / 20;
        while let Ok(told) = tokio::time::timeout_at(deadline, followers.next()).await {
            let Some((want_idx, outcome)) = told else { return Ok(()) };
            is_waiting[want_idx] = false;
            let outcome = outcome.map(|(chunk, source)| {
                source::note(source);
                chunk
            });
            if let (true, Ok(chunk)) = (is_reader, &outcome)
                && shared.memory.get(&chunk.id()).is_none()
            {
                // Fetched for later by somebody else, and now wanted.
                shared.report.n_evicted.add(shared.memory.insert(chunk.clone()));
            }
            hand_over(want_idx, outcome)?;
        }
        let late_idx = is_waiting.iter().position(|is_waiting| *is_waiting).unwrap_or(0);
        let stores = shared.store().name().to_owned();
        Err(GetError::Deadline { id: wants[late_idx].id, stores, timeout })
    }

    /// The wants from `start` on that are let in together.
    fn group(&self, wants: &[Want], start: usize) -> Range<usize> {
        // No more than an eighth of what is in flight, so that several are.
        let max_bytes = self.purpose.max_group_bytes().min(self.shared.config().inflight_bytes / 8);
        let mut end = start + 1;
        let mut n_bytes = wants[start].n_bytes;
        while end < wants.len() && end - start < BATCH_CHUNKS {
            n_bytes += wants[end].n_bytes;
            if n_bytes > max_bytes {
                break;
            }
            end += 1;
        }
        start..end
    }

    /// Gets one chunk.
    ///
    /// # Errors
    /// The chunk cannot be had.
    pub async fn get(&self, digest: Digest, want: Want) -> Result<Chunk, GetError> {
        let mut got = None;
        self.get_many(digest, &[want], |_, chunk| got = Some(chunk)).await?;
        got.ok_or(GetError::Abandoned)
    }

    /// A number that clones of one cache share and no other cache has at the same time.
    pub fn identity(&self) -> usize {
        Arc::as_ptr(&self.shared) as usize
    }

    /// Chunks being fetched now.
    pub fn n_inflight(&self) -> usize {
        self.shared.inflight.len()
    }

    /// What is being fetched and for how long, the oldest first, of those at the most so many.
    pub fn in_flight(&self, n: usize) -> Vec<(ChunkId, Duration)> {
        self.shared.inflight.oldest(n).into_iter().map(|(id, since)| (id, since.elapsed())).collect()
    }

    /// Whether a chunk is being fetched.
    pub fn is_in_flight(&self, id: &ChunkId) -> bool {
        self.shared.inflight.has(id)
    }

    /// Whether a chunk is in memory; it does not become younger by that.
    pub fn is_in_memory(&self, id: &ChunkId) -> bool {
        self.shared.memory.has(id)
    }

    /// The bytes of chunks being fetched, as a share of what they may have.
    pub fn inflight_use(&self) -> BudgetUse {
        self.shared.budget.usage()
    }

    /// The most bytes of plain chunks that are kept in memory.
    pub fn memory_capacity_bytes(&self) -> u64 {
        self.shared.memory.capacity_bytes()
    }

    /// How it behaves now.
    pub fn config(&self) -> CacheConfig {
        self.shared.config()
    }

    /// Behaves in another way from now on; what is in flight ends as it began.
    pub fn configure(&self, config: CacheConfig) {
        *self.shared.config.write().unwrap_or_else(PoisonError::into_inner) = config;
        self.shared.budget.set_limit(config.inflight_bytes);
        self.shared.lanes.set_inflight_bytes(config.inflight_bytes);
        self.shared.report.n_evicted.add(self.shared.memory.set_capacity(config.memory_bytes));
    }

    /// The store that keeps chunks, if there is one.
    pub fn keeper(&self) -> Option<&Arc<Keeper>> {
        self.shared.keeper.as_ref()
    }

    /// Bytes of plain chunks in memory now.
    pub fn memory_weight_bytes(&self) -> u64 {
        self.shared.memory.weight_bytes()
    }

    /// The store chunks are fetched from.
    pub fn store(&self) -> Arc<dyn Store> {
        self.shared.store()
    }

    /// Fetches from another store from now on. What is being fetched goes on with the one before.
    pub fn replace_store(&self, store: Arc<dyn Store>) {
        *self.shared.store.write().unwrap_or_else(PoisonError::into_inner) = store;
    }

    /// The directory that keeps chunks, if there is one.
    pub fn disk(&self) -> Option<&Arc<DiskTier>> {
        self.shared.disk.as_ref()
    }

    /// Whether the stores are asked.
    pub fn is_offline(&self) -> bool {
        self.shared.config().is_offline
    }

    /// The counters this cache adds to.
    pub fn report(&self) -> &Arc<Report> {
        &self.shared.report
    }
}

impl Shared {
    fn config(&self) -> CacheConfig {
        *self.config.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn in_memory(&self, id: &ChunkId) -> Option<Got<Chunk>> {
        self.memory.get(id).map(|chunk| (chunk, Source::Memory))
    }

    /// The store of the moment.
    fn store(&self) -> Arc<dyn Store> {
        Arc::clone(&self.store.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A verified chunk can still be longer or shorter than a (damaged or malicious) index says.
fn checked(want: &Want, chunk: Chunk) -> Result<Chunk, GetError> {
    let found = chunk.plain().len() as u64;
    match found == want.n_bytes {
        true => Ok(chunk),
        false => Err(GetError::WrongLength { id: want.id, wanted: want.n_bytes, found }),
    }
}
