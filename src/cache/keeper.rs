//! A store as a cache: what other stores gave is written to it after its readers have been told.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::runtime::Handle;
use tokio::sync::OwnedSemaphorePermit;

use crate::chunk::Chunk;
use crate::chunk::codec::{self, Form};
use crate::report::Report;
use crate::store::{Put, Stored, WriteStore};

/// Writes verified chunks to a store, behind the readers' backs.
#[derive(Debug)]
pub struct Keeper {
    store: Arc<dyn WriteStore>,
    report: Arc<Report>,
    /// Whether the last write failed, so that a store that is away is told of once.
    is_failing: AtomicBool,
}

impl Keeper {
    /// Keeps chunks in a store, which must be one of those that are asked.
    pub fn new(store: Arc<dyn WriteStore>, report: Arc<Report>) -> Self {
        Self { store, report, is_failing: AtomicBool::new(false) }
    }

    /// The store.
    pub fn store(&self) -> &Arc<dyn WriteStore> {
        &self.store
    }

    /// Starts to write a chunk that came from the store called `from`. The permit is held until it is written, so that a slow cache slows
    /// the fetching and not the growth of memory. Must be called on a thread of a runtime.
    pub(super) fn keep(self: &Arc<Self>, chunk: Chunk, stored: Stored, from: &str, permit: &Arc<OwnedSemaphorePermit>) {
        if from == self.store.name() {
            return;
        }
        let stored = match (stored.form, self.store.form()) {
            (has, keeps) if has == keeps => stored,
            (_, Form::Plain) => Stored { form: Form::Plain, bytes: chunk.plain().clone() },
            (_, Form::Compressed) => {
                Stored { form: Form::Compressed, bytes: codec::encode(chunk.plain(), codec::DEFAULT_LEVEL).into() }
            }
        };
        let (keeper, permit) = (Arc::clone(self), Arc::clone(permit));
        Handle::current().spawn(async move {
            match keeper.store.put(chunk.id(), stored).await {
                Ok(put) => {
                    keeper.report.n_kept.add(u64::from(put == Put::Written));
                    keeper.is_failing.store(false, Ordering::Relaxed);
                }
                Err(error) => {
                    keeper.report.n_keep_errors.add(1);
                    if !keeper.is_failing.swap(true, Ordering::Relaxed) {
                        tracing::warn!("the cache cannot be written, reads go on without it: {error}");
                    }
                }
            }
            drop(permit);
        });
    }
}
