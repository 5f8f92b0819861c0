//! From plain bytes of chunks to their ids and to the store: hash, ask, compress, write.
//!
//! [`Ingest::batch`] is called by many threads at once, with several chunks each time: they are hashed together, and the
//! store is asked for and given all of them at the same time. A chunk that was met before is neither asked for again.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::runtime::{Handle, Runtime, RuntimeFlavor};

use super::cutter::Cut;
use super::{MakeOptions, PackError};
use crate::chunk::codec::{self, Form};
use crate::digest::{ChunkId, Digest};
use crate::store::{Put, StoreError, Stored, WriteStore};

/// Chunks handed over together: enough for hashing many at once, and for many requests under way.
pub(super) const BATCH_CHUNKS: usize = 16;

/// A batch ends with this many bytes at the latest.
pub(super) const BATCH_BYTES: usize = 2 << 20;

/// Whether chunks make a full batch. Zeros cost nothing, so they are not counted.
#[derive(Debug, Default)]
pub(super) struct BatchSize {
    n_chunks: usize,
    n_bytes: usize,
}

impl BatchSize {
    /// Adds a chunk; says whether the batch is full with it.
    pub(super) fn add(&mut self, cut: Cut) -> bool {
        if !cut.is_zero {
            self.n_chunks += 1;
            self.n_bytes += cut.len;
        }
        self.n_chunks >= BATCH_CHUNKS || self.n_bytes >= BATCH_BYTES
    }
}

/// Takes in chunks.
pub(super) struct Ingest {
    digest: Digest,
    level: i32,
    target: Option<Target>,
    /// Id of the chunk of zeros, once it has been taken in.
    zero_id: OnceLock<ChunkId>,
    n_written: AtomicU64,
    stored_bytes: AtomicU64,
}

/// A store, and what its futures run on.
struct Target {
    store: Arc<dyn WriteStore>,
    /// Ids met so far; never locked over anything that waits.
    met: Mutex<HashSet<ChunkId>>,
    handle: Handle,
    /// Keeps our own runtime alive when the caller has none.
    runtime: Option<Runtime>,
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // All that was asked of the store has been waited for, and waiting here is not allowed on every thread.
            runtime.shutdown_background();
        }
    }
}

impl Ingest {
    pub(super) fn new(options: &MakeOptions) -> Result<Self, PackError> {
        let target = match &options.store {
            None => None,
            Some(store) => Some(Target::new(Arc::clone(store))?),
        };
        Ok(Self {
            digest: options.digest,
            level: options.level,
            target,
            zero_id: OnceLock::new(),
            n_written: AtomicU64::new(0),
            stored_bytes: AtomicU64::new(0),
        })
    }

    /// The ids of these chunks, in the order given; afterwards the store has those that no call before has met.
    ///
    /// All chunks cut as zeros are one chunk, which is hashed only until its id is known. Waits for the store: not for
    /// threads that run futures.
    pub(super) fn batch(&self, chunks: &[(&[u8], Cut)]) -> Result<Vec<ChunkId>, StoreError> {
        let zero_id = self.zero_id.get().copied();
        let known = |cut: &Cut| if cut.is_zero { zero_id } else { None };
        let plain: Vec<&[u8]> =
            chunks.iter().filter(|(_, cut)| known(cut).is_none()).map(|(plain, _)| *plain).collect();
        let hashed = self.digest.ids(&plain);
        if let Some(target) = &self.target {
            let mut new: Vec<(ChunkId, &[u8])> = Vec::new();
            {
                let mut met = target.met.lock().unwrap_or_else(PoisonError::into_inner);
                new.extend(hashed.iter().copied().zip(plain).filter(|(id, _)| met.insert(*id)));
            }
            self.write(target, &new)?;
        }
        let mut hashed = hashed.into_iter();
        let mut ids = Vec::with_capacity(chunks.len());
        for (_, cut) in chunks {
            ids.extend(known(cut).or_else(|| hashed.next()));
        }
        if let Some(zero) = chunks.iter().position(|(_, cut)| cut.is_zero) {
            self.zero_id.get_or_init(|| ids[zero]);
        }
        Ok(ids)
    }

    /// Chunks the store did not have, so far.
    pub(super) fn n_written(&self) -> u64 {
        self.n_written.load(Ordering::Relaxed)
    }

    /// Bytes written to the store, so far.
    pub(super) fn stored_bytes(&self) -> u64 {
        self.stored_bytes.load(Ordering::Relaxed)
    }

    fn write(&self, target: &Target, chunks: &[(ChunkId, &[u8])]) -> Result<(), StoreError> {
        if chunks.is_empty() {
            return Ok(());
        }
        let store = &target.store;
        let there = target.handle.block_on(join_all(chunks.iter().map(|(id, _)| store.has(*id))));
        let form = store.form();
        let mut puts = Vec::new();
        for ((id, plain), there) in chunks.iter().zip(there) {
            if there? {
                continue;
            }
            let bytes: Bytes = match form {
                Form::Compressed => codec::encode(plain, self.level).into(),
                Form::Plain => Bytes::copy_from_slice(plain),
            };
            puts.push(async move {
                let n_bytes = bytes.len() as u64;
                let put = store.put(*id, Stored { form, bytes }).await?;
                if put == Put::Written {
                    self.n_written.fetch_add(1, Ordering::Relaxed);
                    self.stored_bytes.fetch_add(n_bytes, Ordering::Relaxed);
                }
                Ok(())
            });
        }
        target.handle.block_on(join_all(puts)).into_iter().collect()
    }
}

impl Target {
    fn new(store: Arc<dyn WriteStore>) -> Result<Self, PackError> {
        // A store may have begun its work on the caller's runtime, so that one comes first. One with a single thread cannot
        // be taken: that thread may be the caller's, which waits for us.
        let (handle, runtime) = match Handle::try_current() {
            Ok(handle) if handle.runtime_flavor() != RuntimeFlavor::CurrentThread => (handle, None),
            _ => {
                let runtime = tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(1)
                    .thread_name("caifs-store")
                    .enable_all()
                    .build()
                    .map_err(|error| PackError::Resources(error.to_string()))?;
                (runtime.handle().clone(), Some(runtime))
            }
        };
        Ok(Self { store, met: Mutex::new(HashSet::new()), handle, runtime })
    }
}
