//! Fetching what memory lacks: batches that run side by side, each decoded and verified together.
//!
//! What is at hand (the disk tier, stores of local files) is read, decoded and verified by one blocking task a batch. What is left is
//! asked for over the network, all chunks of a batch at once; what has arrived is decoded and verified together, without waiting
//! for the rest. A chunk that turns out wrong is fetched again, from another store if there is one; a failure that can pass is
//! waited out until the chunk's deadline. What came from a store is kept on disk after its readers have been told.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::runtime::Handle;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::background::Slot;
use super::budget::Share;
use super::source::Source;
use super::{BATCH_CHUNKS, ChunkLeader, GetError, Got, Shared, Want};
use crate::chunk::{Chunk, codec};
use crate::digest::{ChunkId, Digest};
use crate::store::figures::in_time;
use crate::store::latency::{Latencies, MIN_DEADLY_SILENCE};
use crate::store::retry::RetryPolicy;
use crate::store::{Fetched, StoreError, Stored};

/// How often a chunk is fetched when its bytes are wrong each time: from other stores first, then from the same ones again, since a
/// connection can damage what a store has right.
const MAX_BAD_FETCHES: u32 = 8;

/// The pauses between requests that fail in a way that can pass; the deadline ends them.
pub(super) const PAUSES: RetryPolicy =
    RetryPolicy { n_retries: u32::MAX, base: Duration::from_millis(50), max: Duration::from_secs(2) };

/// The most requests for a chunk at the same time, of which all but one are believed to be lost.
const MAX_ASKED: u32 = 4;

/// A chunk to fetch, and the duty to tell.
#[derive(Debug)]
pub(super) struct Task {
    leader: ChunkLeader,
    n_bytes: u64,
    deadline: Instant,
    /// Stores that gave wrong bytes.
    avoid: Vec<String>,
    n_bad: u32,
    /// What was wrong last.
    last_bad: Option<GetError>,
}

impl Task {
    fn id(&self) -> ChunkId {
        self.leader.key()
    }

    fn want(&self) -> Want {
        Want { id: self.id(), n_bytes: self.n_bytes }
    }

    fn tell(self, outcome: Result<Got<Chunk>, GetError>) {
        self.leader.tell(outcome);
    }
}

/// A chunk whose stored form was decoded and is to be verified.
struct Decoded {
    task: Task,
    plain: Bytes,
    stored: Stored,
    /// The store it came from.
    store: String,
}

/// What a batch holds until it is done: its share of the in-flight budget, and the room that it was let in to if nobody waits for it.
pub(super) type Permit = Arc<Held>;

#[derive(Debug)]
pub(super) struct Held {
    slot: Option<Arc<Slot>>,
    _budget: Share,
}

impl Held {
    fn is_for_memory(&self) -> bool {
        self.slot.as_ref().is_none_or(|slot| slot.into_memory)
    }

    fn fetched(&self, n_bytes: u64) {
        if let Some(slot) = &self.slot {
            slot.fetched(n_bytes);
        }
    }

    fn arrived(&self, chunk: &Chunk) {
        if let Some(slot) = &self.slot {
            slot.arrived(chunk.plain().len() as u64);
        }
    }
}

/// The most a stored form of so many plain bytes can have: no codec makes its input longer by more than a fraction of this. A file that
/// is longer is not that chunk, and not worth the memory to find out.
fn max_stored_bytes(n_bytes: u64) -> u64 {
    n_bytes + n_bytes / 4 + (64 << 10)
}

/// Starts to fetch some chunks, in batches of even size, in tasks of their own. `slot` is what they were let in to, if nobody waits.
pub(super) fn start(shared: &Arc<Shared>, digest: Digest, leaders: Vec<(ChunkLeader, u64)>, slot: Option<Slot>) {
    let slot = slot.map(Arc::new);
    let config = shared.config();
    let deadline = Instant::now() + config.fetch_timeout;
    // Half of the budget at the most, so that two batches of large chunks can be in flight.
    let max_bytes = config.inflight_bytes / 2;
    let n_batches = leaders.len().div_ceil(BATCH_CHUNKS).max(1);
    let even_size = leaders.len().div_ceil(n_batches);
    let mut batch: Vec<Task> = Vec::with_capacity(even_size);
    let mut batch_bytes = 0;
    for (leader, n_bytes) in leaders {
        if !batch.is_empty() && (batch.len() == even_size || batch_bytes + n_bytes > max_bytes) {
            let full = std::mem::replace(&mut batch, Vec::with_capacity(even_size));
            start_batch(shared, digest, full, batch_bytes, slot.clone());
            batch_bytes = 0;
        }
        batch_bytes += n_bytes;
        batch.push(Task { leader, n_bytes, deadline, avoid: Vec::new(), n_bad: 0, last_bad: None });
    }
    if !batch.is_empty() {
        start_batch(shared, digest, batch, batch_bytes, slot);
    }
}

fn start_batch(shared: &Arc<Shared>, digest: Digest, batch: Vec<Task>, n_bytes: u64, slot: Option<Arc<Slot>>) {
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        // The permit is held until the chunks are in memory and on disk, where the tiers' own limits take over.
        let permit = Arc::new(Held { slot, _budget: shared.budget.take(n_bytes).await });
        let is_at_hand = shared.disk.is_some() || shared.store().blocking().is_some();
        let batch = if is_at_hand { at_hand(&shared, digest, batch, &permit).await } else { batch };
        if !batch.is_empty() {
            over_network(&shared, digest, batch, &permit).await;
        }
    });
}

/// Takes what the disk tier and a store of local files have, on one blocking thread; gives back what is left to ask for.
async fn at_hand(shared: &Arc<Shared>, digest: Digest, batch: Vec<Task>, permit: &Permit) -> Vec<Task> {
    let Some(worker) = worker(shared, permit).await else { return Vec::new() };
    let (shared, permit) = (Arc::clone(shared), Arc::clone(permit));
    let work = tokio::task::spawn_blocking(move || {
        let mut left = Vec::new();
        for task in batch {
            match shared.disk.as_ref().and_then(|disk| disk.get(digest, &task.want())) {
                Some(chunk) => {
                    if permit.is_for_memory() {
                        shared.report.n_evicted.add(shared.memory.insert(chunk.clone()));
                    }
                    permit.arrived(&chunk);
                    task.tell(Ok((chunk, Source::Disk)));
                }
                None => left.push(task),
            }
        }
        let store = shared.store();
        let Some(store) = store.blocking() else { return left };
        let mut decoded = Vec::with_capacity(left.len());
        for task in left {
            let fetched = store.fetch_now(task.id(), max_stored_bytes(task.n_bytes));
            let fetched = fetched.map(|stored| stored.map(|stored| Fetched { stored, store: String::new() }));
            decoded.extend(shared.decode(digest, task, fetched, &permit));
        }
        shared.verify_and_tell(digest, decoded, &permit);
        drop(worker);
        Vec::new()
    });
    work.await.unwrap_or_default()
}

/// A blocking thread's permit. What nobody waits for has a share of them only, so that it is never ahead of a reader by more than that.
async fn worker(shared: &Shared, permit: &Permit) -> Option<(Option<OwnedSemaphorePermit>, OwnedSemaphorePermit)> {
    let share = match permit.slot {
        Some(_) => Some(Arc::clone(&shared.lanes.workers).acquire_owned().await.ok()?),
        None => None,
    };
    Some((share, Arc::clone(&shared.workers).acquire_owned().await.ok()?))
}

/// Asks for all chunks of a batch at once; decodes and verifies together what is there.
async fn over_network(shared: &Arc<Shared>, digest: Digest, batch: Vec<Task>, permit: &Permit) {
    let fetches: FuturesUnordered<_> = batch
        .into_iter()
        .map(|mut task| async move {
            let fetched = fetch_in_time(shared, &mut task).await;
            (task, fetched)
        })
        .collect();
    let mut arrivals = fetches.ready_chunks(BATCH_CHUNKS);
    while let Some(arrived) = arrivals.next().await {
        let Some(worker) = worker(shared, permit).await else { return };
        let (shared, permit) = (Arc::clone(shared), Arc::clone(permit));
        tokio::task::spawn_blocking(move || {
            let mut decoded = Vec::with_capacity(arrived.len());
            for (task, fetched) in arrived {
                match fetched {
                    Ok(fetched) => decoded.extend(shared.decode(digest, task, fetched, &permit)),
                    Err(error) => task.tell(Err(error)),
                }
            }
            shared.verify_and_tell(digest, decoded, &permit);
            drop(worker);
        });
    }
}

/// Asks until there is an answer that asking again would not change, or the deadline is there.
async fn fetch_in_time(shared: &Shared, task: &mut Task) -> Result<Result<Option<Fetched>, StoreError>, GetError> {
    let (id, deadline) = (task.id(), task.deadline);
    let mut n_before = 0;
    let mut last_error = None;
    loop {
        let timeout = shared.config().fetch_timeout;
        let pause = match in_time(deadline, timeout, ask(shared, id, &task.avoid)).await {
            Err(_) => {
                shared.report.n_store_errors.add(1);
                // What came of it so far says more than that it is late.
                return match (task.last_bad.take(), last_error) {
                    (Some(error), _) => Err(error),
                    (None, Some(error)) => Ok(Err(error)),
                    (None, None) => Err(shared.late(id)),
                };
            }
            // Only those that gave wrong bytes have it. Local files stay as they are, but from elsewhere the bytes can have been damaged
            // on their way.
            Ok(Ok(None)) if !task.avoid.is_empty() => {
                if let (Some(_), Some(error)) = (shared.store().blocking(), task.last_bad.take()) {
                    return Err(error);
                }
                task.avoid.clear();
                PAUSES.wait(task.n_bad)
            }
            Ok(Err(error)) if error.is_transient => {
                shared.report.n_store_errors.add(1);
                last_error = Some(error);
                PAUSES.wait(n_before)
            }
            Ok(answer) => return Ok(answer),
        };
        // A pause that ends behind the deadline would end in the timeout of a request that is never made.
        tokio::time::sleep_until((Instant::now() + pause).min(deadline)).await;
        n_before += 1;
    }
}

/// Makes a request; and the same again beside it when it has been silent for much longer than others were, because it may be one that
/// is never answered. The first answer counts.
async fn ask(shared: &Shared, id: ChunkId, avoid: &[String]) -> Result<Option<Fetched>, StoreError> {
    let request = || async {
        let waiting = shared.report.waiting_for_turn.enter();
        let _permit = shared.requests.acquire().await;
        drop(waiting);
        let start = Instant::now();
        (shared.store().fetch_avoiding(id, avoid).await, start.elapsed())
    };
    let mut requests = FuturesUnordered::from_iter([request()]);
    let mut patience = shared.latencies().deadly_silence(MIN_DEADLY_SILENCE);
    let mut n_asked = 1;
    loop {
        let answered = match n_asked < MAX_ASKED {
            true => tokio::time::timeout(patience, requests.next()).await,
            false => Ok(requests.next().await),
        };
        match answered {
            Ok(Some((Ok(answer), latency))) => {
                shared.latencies().add(latency, true);
                return Ok(answer);
            }
            // One that is still under way may do better.
            Ok(Some((Err(error), _))) if error.is_transient && !requests.is_empty() => tracing::debug!("{error}"),
            Ok(Some((Err(error), _))) => return Err(error),
            // There is always one under way, so this does not happen.
            Ok(None) => return Ok(None),
            Err(_) => {
                requests.push(request());
                n_asked += 1;
                patience *= 2;
            }
        }
    }
}

impl Shared {
    fn latencies(&self) -> MutexGuard<'_, Latencies> {
        self.latencies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn late(&self, id: ChunkId) -> GetError {
        GetError::Deadline { id, stores: self.store().name().to_owned(), timeout: self.config().fetch_timeout }
    }

    /// Turns the answer of a store into plain bytes, or tells why that cannot be.
    fn decode(
        self: &Arc<Self>,
        digest: Digest,
        task: Task,
        fetched: Result<Option<Fetched>, StoreError>,
        permit: &Permit,
    ) -> Option<Decoded> {
        self.report.n_fetches.add(1);
        let id = task.id();
        let failure = match fetched {
            Ok(Some(Fetched { stored, store })) => {
                self.report.fetched_bytes.add(stored.bytes.len() as u64);
                permit.fetched(stored.bytes.len() as u64);
                match codec::decode(stored.form, &stored.bytes, task.n_bytes) {
                    Ok(plain) => return Some(Decoded { task, plain, stored, store }),
                    Err(error) => {
                        self.bad(digest, task, store, &error.to_string(), permit);
                        return None;
                    }
                }
            }
            Ok(None) if self.config().is_offline => GetError::Offline { what: format!("chunk {id}") },
            Ok(None) => {
                self.report.n_missing.add(1);
                GetError::Missing { id, stores: self.store().name().to_owned() }
            }
            Err(error) => {
                self.report.n_store_errors.add(1);
                GetError::Store(error)
            }
        };
        task.tell(Err(failure));
        None
    }

    /// Verifies a batch together, puts what is right into memory, tells the followers, and then keeps it on disk. What does not go into
    /// memory is kept before anyone is told: where else would they find it?
    fn verify_and_tell(self: &Arc<Self>, digest: Digest, decoded: Vec<Decoded>, permit: &Permit) {
        let claimed = decoded.iter().map(|decoded| (decoded.task.id(), decoded.plain.clone())).collect();
        let _being_kept = self.report.being_kept.enter();
        let mut to_keep = Vec::new();
        for (decoded, verified) in decoded.into_iter().zip(Chunk::verify_batch(digest, claimed)) {
            let Decoded { task, stored, store, .. } = decoded;
            match verified {
                Ok(chunk) => {
                    if let Some(bad) = &task.last_bad {
                        tracing::warn!("{bad}; fetched again, and right now");
                    }
                    permit.arrived(&chunk);
                    let untold = match permit.is_for_memory() {
                        true => {
                            self.report.n_evicted.add(self.memory.insert(chunk.clone()));
                            task.tell(Ok((chunk.clone(), Source::Store)));
                            None
                        }
                        false => Some(task),
                    };
                    to_keep.push((chunk, stored, store, untold));
                }
                Err(mismatch) => self.bad(digest, task, store, &mismatch.to_string(), permit),
            }
        }
        for (chunk, stored, store, untold) in to_keep {
            if let Some(disk) = &self.disk {
                disk.keep(&chunk, Some(&stored));
            }
            if let Some(task) = untold {
                task.tell(Ok((chunk.clone(), Source::Store)));
            }
            if let Some(keeper) = &self.keeper {
                keeper.keep(chunk, stored, &store, permit);
            }
        }
    }

    /// Fetches a chunk again whose bytes were wrong, or gives it up after enough of them.
    fn bad(self: &Arc<Self>, digest: Digest, mut task: Task, store: String, reason: &str, permit: &Permit) {
        self.report.n_bad_chunks.add(1);
        task.n_bad += 1;
        let (id, is_over) = (task.id(), Instant::now() >= task.deadline);
        let stores = if store.is_empty() { self.store().name().to_owned() } else { store.clone() };
        let error = GetError::Bad { id, stores, reason: reason.to_owned() };
        if task.n_bad >= MAX_BAD_FETCHES || is_over {
            return task.tell(Err(error));
        }
        tracing::debug!("{error}; fetching it again");
        task.last_bad = Some(error);
        if !store.is_empty() {
            task.avoid.push(store);
        }
        let (shared, permit) = (Arc::clone(self), Arc::clone(permit));
        // On a blocking thread of the runtime, which a task can be started from.
        Handle::current().spawn(async move { again(shared, digest, task, permit).await });
    }
}

/// Boxed, because fetching, verifying and fetching again call each other.
fn again(
    shared: Arc<Shared>,
    digest: Digest,
    task: Task,
    permit: Permit,
) -> futures_util::future::BoxFuture<'static, ()> {
    Box::pin(async move { over_network(&shared, digest, vec![task], &permit).await })
}
