//! Where chunks come from and go to.
//!
//! * [`Store`] fetches chunks in stored form; [`WriteStore`] keeps them too.
//! * [`location`] turns what the user typed into a store: the only parser of store locations.
//! * [`local`] is a directory (`.castr`), [`router`] several stores in order, [`fault`] a store that fails on script.
//!
//! Invariants: a store says `Ok(None)` for a chunk it does not have and an error for everything else; what it hands out is
//! not trusted by anyone before it is decoded and verified; its name and its errors hold no secrets.

pub mod fault;
pub mod local;
pub mod location;
pub mod router;

pub use crate::chunk::codec::Form;

use std::fmt::Debug;

use bytes::Bytes;
use futures_util::future::BoxFuture;

use crate::digest::ChunkId;

/// A chunk as a store keeps it: untrusted bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// How to read `bytes`.
    pub form: Form,
    /// The content of the chunk file or object.
    pub bytes: Bytes,
}

/// Why a store could not answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("chunk store {store}: {object}: {reason}")]
pub struct StoreError {
    /// The store's name, as [`Store::name`] gives it.
    pub store: String,
    /// The full name of the object asked for (a path, a URL).
    pub object: String,
    /// What went wrong, in the words of the system or server.
    pub reason: String,
}

/// Somewhere chunks can be fetched from.
pub trait Store: Debug + Send + Sync {
    /// What to call this store in messages: its location without secrets.
    fn name(&self) -> &str;

    /// Fetches the stored form of a chunk; `None` when the store does not have it.
    fn fetch(&self, id: ChunkId) -> BoxFuture<'_, Result<Option<Stored>, StoreError>>;

    /// Tells whether the store has a chunk, without fetching it.
    fn has(&self, id: ChunkId) -> BoxFuture<'_, Result<bool, StoreError>>;

    /// The blocking side of a store that only reads local files: such a store is fetched from on the thread that
    /// decodes and verifies, which saves two changes of thread a chunk.
    fn blocking(&self) -> Option<&dyn BlockingStore> {
        None
    }
}

/// A store whose chunks are local files.
pub trait BlockingStore: Debug + Send + Sync {
    /// [`Store::fetch`], blocking the calling thread. A stored form of more than `max_bytes` is an error, and not read.
    fn fetch_now(&self, id: ChunkId, max_bytes: u64) -> Result<Option<Stored>, StoreError>;
}

/// Whether [`WriteStore::put`] changed the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// The chunk is new in the store.
    Written,
    /// The store had the chunk already.
    Present,
}

/// A store that chunks can be written to.
pub trait WriteStore: Store {
    /// The form this store keeps chunks in; [`WriteStore::put`] takes only that one.
    fn form(&self) -> Form;

    /// Writes a chunk atomically: afterwards the store has all of it, or nothing on failure.
    fn put(&self, id: ChunkId, stored: Stored) -> BoxFuture<'_, Result<Put, StoreError>>;
}
