//! Fetching what memory lacks: batches that run side by side, each decoded and verified together.
//!
//! Two ways, one result. A blocking store is read, decoded and verified by one blocking task a batch. Any other store is
//! asked for all chunks of a batch at once, and what has arrived is decoded and verified together, without waiting for the rest.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::OwnedSemaphorePermit;

use super::inflight::Leader;
use super::{BATCH_CHUNKS, GetError, PERMIT_BYTES, Shared};
use crate::chunk::{Chunk, codec};
use crate::digest::{ChunkId, Digest};
use crate::store::{StoreError, Stored};

/// A chunk to fetch: the duty to tell, and the bytes the index gives it.
type Task = (Leader, u64);

/// The most a stored form of so many plain bytes can have: no codec makes its input longer by more than a fraction of this. A file that
/// is longer is not that chunk, and not worth the memory to find out.
fn max_stored_bytes(n_bytes: u64) -> u64 {
    n_bytes + n_bytes / 4 + (64 << 10)
}

/// Starts to fetch some chunks, in batches of even size, in tasks of their own.
pub(super) fn start(shared: &Arc<Shared>, digest: Digest, tasks: Vec<Task>) {
    // Half of the budget at the most, so that two batches of large chunks can be in flight.
    let max_bytes = shared.config.inflight_bytes / 2;
    let n_batches = tasks.len().div_ceil(BATCH_CHUNKS).max(1);
    let even_size = tasks.len().div_ceil(n_batches);
    let mut batch: Vec<Task> = Vec::with_capacity(even_size);
    let mut n_bytes = 0;
    for task in tasks {
        if !batch.is_empty() && (batch.len() == even_size || n_bytes + task.1 > max_bytes) {
            start_batch(shared, digest, std::mem::replace(&mut batch, Vec::with_capacity(even_size)), n_bytes);
            n_bytes = 0;
        }
        n_bytes += task.1;
        batch.push(task);
    }
    if !batch.is_empty() {
        start_batch(shared, digest, batch, n_bytes);
    }
}

fn start_batch(shared: &Arc<Shared>, digest: Digest, batch: Vec<Task>, n_bytes: u64) {
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        // The permit is held until the chunks are in memory, where the tier's own limit takes over.
        let Ok(permit) = shared.reserve(n_bytes).await else { return };
        match shared.store.blocking() {
            Some(_) => fetch_blocking(shared, digest, batch, permit).await,
            None => fetch_concurrently(shared, digest, batch, permit).await,
        }
    });
}

/// Reads, decodes and verifies a batch on one blocking thread.
async fn fetch_blocking(shared: Arc<Shared>, digest: Digest, batch: Vec<Task>, permit: OwnedSemaphorePermit) {
    let Ok(worker) = Arc::clone(&shared.workers).acquire_owned().await else { return };
    tokio::task::spawn_blocking(move || {
        let Some(store) = shared.store.blocking() else { return };
        let mut decoded = Vec::with_capacity(batch.len());
        for (leader, n_bytes) in batch {
            let fetched = store.fetch_now(leader.id(), max_stored_bytes(n_bytes));
            if let Some((leader, plain)) = shared.decode(leader, n_bytes, fetched) {
                decoded.push((leader, plain));
            }
        }
        shared.verify_and_tell(digest, decoded);
        drop((permit, worker));
    });
}

/// Asks for all chunks of a batch at once; decodes and verifies together what is there.
async fn fetch_concurrently(shared: Arc<Shared>, digest: Digest, batch: Vec<Task>, permit: OwnedSemaphorePermit) {
    let permit = Arc::new(permit);
    let fetches: FuturesUnordered<_> = batch
        .into_iter()
        .map(|(leader, n_bytes)| {
            let shared = Arc::clone(&shared);
            async move {
                let fetched = fetch_in_time(&shared, leader.id()).await;
                (leader, n_bytes, fetched)
            }
        })
        .collect();
    let mut arrivals = fetches.ready_chunks(BATCH_CHUNKS);
    while let Some(arrived) = arrivals.next().await {
        let Ok(worker) = Arc::clone(&shared.workers).acquire_owned().await else { return };
        let shared = Arc::clone(&shared);
        let permit = Arc::clone(&permit);
        tokio::task::spawn_blocking(move || {
            let mut decoded = Vec::with_capacity(arrived.len());
            for (leader, n_bytes, fetched) in arrived {
                match fetched {
                    Ok(fetched) => decoded.extend(shared.decode(leader, n_bytes, fetched)),
                    Err(error) => leader.tell(Err(error)),
                }
            }
            shared.verify_and_tell(digest, decoded);
            drop((permit, worker));
        });
    }
}

/// One request, ended by its deadline.
async fn fetch_in_time(shared: &Shared, id: ChunkId) -> Result<Result<Option<Stored>, StoreError>, GetError> {
    let timeout = shared.config.fetch_timeout;
    let request = async {
        let _permit = shared.requests.acquire().await;
        shared.store.fetch(id).await
    };
    match tokio::time::timeout(timeout, request).await {
        Ok(fetched) => Ok(fetched),
        Err(_) => {
            shared.report.n_store_errors.add(1);
            Err(GetError::Deadline { id, stores: shared.store.name().to_owned(), timeout })
        }
    }
}

impl Shared {
    /// Takes the in-flight budget for some bytes; more than the whole budget counts as the whole budget.
    async fn reserve(&self, n_bytes: u64) -> Result<OwnedSemaphorePermit, tokio::sync::AcquireError> {
        let n_permits = u32::try_from(n_bytes.div_ceil(PERMIT_BYTES)).unwrap_or(u32::MAX);
        Arc::clone(&self.budget).acquire_many_owned(n_permits.clamp(1, self.n_budget_permits)).await
    }

    /// Turns the answer of a store into plain bytes, or tells why that cannot be.
    fn decode(
        &self,
        leader: Leader,
        n_bytes: u64,
        fetched: Result<Option<Stored>, StoreError>,
    ) -> Option<(Leader, Bytes)> {
        self.report.n_fetches.add(1);
        let id = leader.id();
        let stores = || self.store.name().to_owned();
        let failure = match fetched {
            Ok(Some(stored)) => {
                self.report.fetched_bytes.add(stored.bytes.len() as u64);
                match codec::decode(stored.form, &stored.bytes, n_bytes) {
                    Ok(plain) => return Some((leader, plain)),
                    Err(error) => {
                        self.report.n_bad_chunks.add(1);
                        GetError::Bad { id, stores: stores(), reason: error.to_string() }
                    }
                }
            }
            Ok(None) => {
                self.report.n_missing.add(1);
                GetError::Missing { id, stores: stores() }
            }
            Err(error) => {
                self.report.n_store_errors.add(1);
                GetError::Store(error)
            }
        };
        leader.tell(Err(failure));
        None
    }

    /// Verifies a batch together, keeps what is right in memory, and tells the followers.
    fn verify_and_tell(&self, digest: Digest, decoded: Vec<(Leader, Bytes)>) {
        let claimed = decoded.iter().map(|(leader, plain)| (leader.id(), plain.clone())).collect();
        for ((leader, _), verified) in decoded.into_iter().zip(Chunk::verify_batch(digest, claimed)) {
            match verified {
                Ok(chunk) => {
                    self.report.n_evicted.add(self.memory.insert(chunk.clone()));
                    leader.tell(Ok(chunk));
                }
                Err(mismatch) => {
                    self.report.n_bad_chunks.add(1);
                    let stores = self.store.name().to_owned();
                    leader.tell(Err(GetError::Bad { id: mismatch.wanted, stores, reason: mismatch.to_string() }));
                }
            }
        }
    }
}
