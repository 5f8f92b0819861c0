//! Where chunks come from and go to; and indexes and archives, which are whole files beside them.
//!
//! * [`Store`] fetches chunks in stored form; [`WriteStore`] keeps them too. [`FileStore`] has whole files.
//! * [`location`] turns what the user typed into a [`location::Location`]: the only parser of store locations. [`open`] makes
//!   a store of it, as [`options`] say; [`layout`] names its objects.
//! * Where it can lie: [`local`] is a directory (`.castr`), [`local_files`] one of whole files, [`http`] a web server, [`object`] a bucket of
//!   S3 or Google, [`oci`] a registry, [`sftp`] and [`ssh`] a directory of another machine; [`fault`] is a store that fails on script.
//! * [`listing`] reads what servers tell of a directory.
//! * [`router`] asks several in order, [`mirror`] those that have the same chunks: `race` is the loop of both, `health` and
//!   `latency` what they know about each.
//! * [`figures`] counts what requests came to, for whoever looks.
//! * [`atomic`] writes local files that appear whole; [`retry`] asks again what failed in a way that can pass.
//!
//! Invariants: a store says `Ok(None)` for a chunk it does not have and an error for everything else; what it hands out is
//! not trusted by anyone before it is decoded and verified; its name and its errors hold no secrets; every request has a timeout.

pub mod atomic;
pub mod fault;
pub mod figures;
pub mod files;
mod health;
pub mod http;
pub(crate) mod latency;
pub mod layout;
pub mod listing;
pub mod local;
pub mod local_files;
pub mod location;
pub mod mirror;
pub mod object;
pub mod oci;
pub mod open;
pub mod options;
mod race;
pub mod retry;
pub mod router;
pub mod sftp;
pub mod ssh;
pub mod tls;

pub use crate::chunk::codec::Form;
pub use files::{FileInfo, FileStore, FileVersion, Listed};
pub use options::{Secret, StoreOptions};

use std::fmt::Debug;

use bytes::Bytes;
use futures_util::future::BoxFuture;

use crate::digest::ChunkId;

/// A chunk as a store keeps it, less its encryption: untrusted bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// How to read `bytes`.
    pub form: Form,
    /// The content of the chunk file or object, decrypted if it was encrypted.
    pub bytes: Bytes,
}

/// What was fetched, and from where: of several stores, the one that answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// The chunk.
    pub stored: Stored,
    /// The name of the store that had it, as its own [`Store::name`] gives it.
    pub store: String,
}

/// Why a store could not answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("chunk store {store}: {object}: {reason}")]
pub struct StoreError {
    /// The store's name, as [`Store::name`] gives it.
    pub store: String,
    /// The full name of the object asked for (a path, a URL).
    pub object: String,
    /// What went wrong, in the words of the system or server (with the status, if there is one).
    pub reason: String,
    /// Whether the same request can succeed later: a timeout, a broken connection, 429 or 5xx. Not so a refusal such as 403.
    pub is_transient: bool,
}

impl StoreError {
    /// An error that asking again does not cure.
    pub fn new(store: impl Into<String>, object: impl Into<String>, reason: impl ToString) -> Self {
        Self { store: store.into(), object: object.into(), reason: reason.to_string(), is_transient: false }
    }

    /// An error that may be gone when asked again.
    pub fn transient(store: impl Into<String>, object: impl Into<String>, reason: impl ToString) -> Self {
        Self { is_transient: true, ..Self::new(store, object, reason) }
    }
}

/// Somewhere chunks can be fetched from.
pub trait Store: Debug + Send + Sync {
    /// What to call this store in messages: its location without secrets.
    fn name(&self) -> &str;

    /// Fetches the stored form of a chunk; `None` when the store does not have it.
    fn fetch(&self, id: ChunkId) -> BoxFuture<'_, Result<Option<Stored>, StoreError>>;

    /// Fetches a chunk from any store but those named in `avoid` (they gave wrong bytes for it), and tells which one had it.
    /// `None` when no other has it. A store of its own needs no more than this default; several stores behind one choose.
    fn fetch_avoiding<'a>(
        &'a self,
        id: ChunkId,
        avoid: &'a [String],
    ) -> BoxFuture<'a, Result<Option<Fetched>, StoreError>> {
        Box::pin(async move {
            if avoid.iter().any(|name| name == self.name()) {
                return Ok(None);
            }
            let stored = self.fetch(id).await?;
            Ok(stored.map(|stored| Fetched { stored, store: self.name().to_owned() }))
        })
    }

    /// Tells whether the store has a chunk, without fetching it.
    fn has(&self, id: ChunkId) -> BoxFuture<'_, Result<bool, StoreError>>;

    /// The blocking side of a store that only reads local files: such a store is fetched from on the thread that
    /// decodes and verifies, which saves two changes of thread a chunk.
    fn blocking(&self) -> Option<&dyn BlockingStore> {
        None
    }

    /// What requests came to: of one store, or of each of several behind it. Nothing where nobody counts.
    fn figures(&self) -> Vec<figures::StoreFigures> {
        Vec::new()
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

    /// Writes a chunk atomically: afterwards the store has all of it, or nothing on failure. It need not look whether the chunk is
    /// there before it writes.
    fn put(&self, id: ChunkId, stored: Stored) -> BoxFuture<'_, Result<Put, StoreError>>;
}
