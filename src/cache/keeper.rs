//! A store as a cache: what other stores gave is written to it after its readers have been told.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::Instant;

use super::fetch::Permit;
use crate::chunk::Chunk;
use crate::chunk::codec::{self, Form};
use crate::digest::ChunkId;
use crate::report::{Gauge, Report};
use crate::store::{Put, StoreError, Stored, WriteStore};

/// Writes verified chunks to a store, behind the readers' backs.
#[derive(Debug)]
pub struct Keeper {
    /// Replaced when settings change; never locked over I/O or await.
    store: RwLock<Arc<dyn WriteStore>>,
    report: Arc<Report>,
    /// Until when nothing is written, after a write that failed; a store that is away is told of once.
    rests_until: Mutex<Option<Instant>>,
}

/// How long one write may take: it holds a part of the memory that fetches need.
const MAX_WRITE: Duration = Duration::from_secs(5);

/// How long a store that failed is left alone.
const REST: Duration = Duration::from_secs(30);

impl Keeper {
    /// Keeps chunks in a store, which must be one of those that are asked.
    pub fn new(store: Arc<dyn WriteStore>, report: Arc<Report>) -> Self {
        Self { store: RwLock::new(store), report, rests_until: Mutex::default() }
    }

    /// The store.
    pub fn store(&self) -> Arc<dyn WriteStore> {
        Arc::clone(&self.store.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Writes to another store from now on: the same place, reached in another way.
    pub fn replace_store(&self, store: Arc<dyn WriteStore>) {
        *self.store.write().unwrap_or_else(PoisonError::into_inner) = store;
        *self.rests_until() = None;
    }

    /// Starts to write a chunk that came from the store called `from`. The permit is held until it is written, so that a slow cache slows
    /// the fetching and not the growth of memory. Must be called on a thread of a runtime.
    pub(super) fn keep(self: &Arc<Self>, chunk: Chunk, stored: Stored, from: &str, permit: &Permit) {
        let store = self.store();
        if from == store.name() || self.rests_until().is_some_and(|until| Instant::now() < until) {
            return;
        }
        let stored = match (stored.form, store.form()) {
            (has, keeps) if has == keeps => stored,
            (_, Form::Plain) => Stored { form: Form::Plain, bytes: chunk.plain().clone() },
            (_, Form::Compressed) => {
                Stored { form: Form::Compressed, bytes: codec::encode(chunk.plain(), codec::DEFAULT_LEVEL).into() }
            }
        };
        let (keeper, permit) = (Arc::clone(self), Arc::clone(permit));
        let being_kept = Gauge::enter_owned(&self.report, |report| &report.being_kept);
        Handle::current().spawn(async move {
            let written = match tokio::time::timeout(MAX_WRITE, keeper.write(&store, chunk.id(), stored)).await {
                Ok(written) => written,
                Err(_) => {
                    let name = store.name();
                    Err(StoreError::transient(name, chunk.id().to_hex(), format!("not written within {MAX_WRITE:?}")))
                }
            };
            match written {
                Ok(put) => {
                    keeper.report.n_kept.add(u64::from(put == Put::Written));
                    *keeper.rests_until() = None;
                }
                Err(error) => {
                    keeper.report.n_keep_errors.add(1);
                    if keeper.rests_until().replace(Instant::now() + REST).is_none() {
                        tracing::warn!("the cache cannot be written, reads go on without it: {error}");
                    }
                }
            }
            drop((being_kept, permit));
        });
    }

    async fn write(&self, store: &Arc<dyn WriteStore>, id: ChunkId, stored: Stored) -> Result<Put, StoreError> {
        if store.blocking().is_none() {
            return store.put(id, stored).await;
        }
        // A store of local files writes on the thread that asks it, and that must not be one that others wait for.
        let writing = Arc::clone(store);
        let put = tokio::task::spawn_blocking(move || Handle::current().block_on(writing.put(id, stored)));
        put.await.unwrap_or_else(|error| Err(StoreError::new(store.name(), id.to_hex(), error)))
    }

    fn rests_until(&self) -> MutexGuard<'_, Option<Instant>> {
        self.rests_until.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
