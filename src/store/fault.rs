//! A store in memory that fails on script: for tests of every layer above.

use std::collections::HashMap;
use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;

use super::{Form, Store, StoreError, Stored};
use crate::digest::ChunkId;

/// What a [`FaultStore`] does with one fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Answers rightly.
    None,
    /// Says that it does not have the chunk.
    Missing,
    /// Answers with an error.
    Fail,
    /// Hands out the chunk with one bit flipped.
    Flip,
    /// Hands out the chunk without its last byte.
    Truncate,
    /// Hands out the chunk with a byte too many.
    Lengthen,
    /// Hands out no bytes at all.
    Empty,
    /// Answers rightly after a while.
    Delay(Duration),
    /// Never answers.
    Hang,
    /// Panics.
    Panic,
}

type Script = dyn Fn(ChunkId, u64) -> Fault + Send + Sync;

/// A store in memory that asks its script about every fetch.
pub struct FaultStore {
    name: String,
    chunks: Mutex<HashMap<ChunkId, Bytes>>,
    script: Box<Script>,
    n_fetches: AtomicU64,
}

impl FaultStore {
    /// An empty store; the script is given the id and how many fetches there were before.
    pub fn new(name: &str, script: impl Fn(ChunkId, u64) -> Fault + Send + Sync + 'static) -> Self {
        Self { name: name.to_owned(), chunks: Mutex::default(), script: Box::new(script), n_fetches: AtomicU64::new(0) }
    }

    /// Keeps some plain bytes under an id, right or wrong.
    pub fn insert(&self, id: ChunkId, plain: &[u8]) {
        self.lock().insert(id, Bytes::copy_from_slice(plain));
    }

    /// How often a chunk was asked for.
    pub fn n_fetches(&self) -> u64 {
        self.n_fetches.load(Ordering::SeqCst)
    }

    fn failure(&self, id: ChunkId) -> StoreError {
        StoreError::new(self.name.clone(), id.to_hex(), "scripted failure")
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<ChunkId, Bytes>> {
        self.chunks.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl fmt::Debug for FaultStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultStore").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Store for FaultStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn fetch(&self, id: ChunkId) -> BoxFuture<'_, Result<Option<Stored>, StoreError>> {
        Box::pin(async move {
            let n_before = self.n_fetches.fetch_add(1, Ordering::SeqCst);
            let fault = (self.script)(id, n_before);
            let Some(plain) = self.lock().get(&id).cloned() else { return Ok(None) };
            let mut bytes = plain.to_vec();
            match fault {
                Fault::None => {}
                Fault::Missing => return Ok(None),
                Fault::Fail => return Err(self.failure(id)),
                Fault::Flip => {
                    let middle = bytes.len() / 2;
                    if let Some(byte) = bytes.get_mut(middle) {
                        *byte ^= 0x10;
                    }
                }
                Fault::Truncate => {
                    bytes.pop();
                }
                Fault::Lengthen => bytes.push(0),
                Fault::Empty => bytes.clear(),
                Fault::Delay(span) => tokio::time::sleep(span).await,
                Fault::Hang => std::future::pending().await,
                Fault::Panic => panic!("scripted panic"),
            }
            Ok(Some(Stored { form: Form::Plain, bytes: bytes.into() }))
        })
    }

    fn has(&self, id: ChunkId) -> BoxFuture<'_, Result<bool, StoreError>> {
        Box::pin(async move {
            match (self.script)(id, self.n_fetches()) {
                Fault::Fail => Err(self.failure(id)),
                Fault::Missing => Ok(false),
                _ => Ok(self.lock().contains_key(&id)),
            }
        })
    }
}
