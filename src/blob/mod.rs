//! A byte stream read at any place: over an index and its chunks, or a plain file, here or in a store.
//!
//! * [`source`] is the index's bytes, copied or mapped.
//! * [`chunked`] reads over an index, [`file`] from a plain local file, [`Blocks`] from one of a store;
//!   [`Blob`] is any of them.
//! * [`backing`] keeps a plain copy of what was read over an index in a local file.
//! * [`replies`] bounds the memory of replies that are put together from several chunks.
//! * [`presence`] tells which parts are at hand and which were read.
//! * [`read_ahead`] reads along a file and fetches what comes next.
//! * [`Pinned`] holds some chunks for as long as a caller parses them.
//!
//! Invariants: opening costs the same for every size; a read is ready at its first poll when its chunks are in memory; a read
//! gives exactly the bytes asked for or an error.

pub mod backing;
pub mod chunked;
pub mod file;
pub mod presence;
pub mod read_ahead;
pub mod replies;
pub mod source;

use std::path::PathBuf;

use bytes::Bytes;

use crate::cache::GetError;
use crate::cache::blocks::{BLOCK_BYTES, Blocks};
use crate::digest::Digest;
pub use chunked::{ChunkedBlob, Filled, Pinned};
pub use file::FileBlob;

/// Why a read failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BlobError {
    /// A chunk cannot be had.
    #[error(transparent)]
    Get(#[from] GetError),
    /// The index is damaged or was changed.
    #[error("{0}")]
    Index(String),
    /// A plain file cannot be read.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        reason: String,
    },
    /// The range does not lie in the blob.
    #[error("bytes {offset} to {} lie outside of the blob of {size} bytes", offset.saturating_add(*n_bytes))]
    OutOfRange {
        /// Start of the range.
        offset: u64,
        /// Length of the range.
        n_bytes: u64,
        /// Size of the blob.
        size: u64,
    },
    /// The read ended without an answer (a bug, or the program is ending).
    #[error("the read was given up")]
    Abandoned,
}

/// A byte stream that can be read at any place.
#[derive(Debug, Clone)]
pub enum Blob {
    /// Over an index.
    Chunked(ChunkedBlob),
    /// A plain local file.
    File(FileBlob),
    /// A plain file of a store.
    Remote(Blocks),
}

impl Blob {
    /// Length in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Self::Chunked(blob) => blob.size(),
            Self::File(blob) => blob.size(),
            Self::Remote(blocks) => blocks.size(),
        }
    }

    /// Exactly `n_bytes` from `offset`.
    ///
    /// # Errors
    /// The range lies outside of the blob, or its bytes cannot be had.
    pub async fn read_at(&self, offset: u64, n_bytes: usize) -> Result<Bytes, BlobError> {
        let size = self.size();
        if offset.checked_add(n_bytes as u64).is_none_or(|end| end > size) {
            return Err(BlobError::OutOfRange { offset, n_bytes: n_bytes as u64, size });
        }
        if n_bytes == 0 {
            return Ok(Bytes::new());
        }
        match self {
            Self::Chunked(blob) => blob.read_at(offset, n_bytes).await,
            Self::File(blob) => blob.read_at(offset, n_bytes).await,
            Self::Remote(blocks) => Ok(blocks.read_at(offset, n_bytes).await?),
        }
    }

    /// As many bytes from `offset` as one access gives: at least `min_bytes`, at most `max_bytes`, up to the end of the chunk. Nothing
    /// is fetched for more than `min_bytes`.
    ///
    /// # Errors
    /// The first `min_bytes` lie outside of the blob or cannot be had.
    pub async fn read_some(&self, offset: u64, min_bytes: usize, max_bytes: usize) -> Result<Bytes, BlobError> {
        let rest = usize::try_from(self.size().saturating_sub(offset)).unwrap_or(usize::MAX);
        match self {
            Self::Chunked(blob) if offset < blob.size() => {
                let in_chunk = blob.bytes_to_chunk_end(offset)?;
                self.read_at(offset, max_bytes.min(in_chunk).max(min_bytes)).await
            }
            Self::Remote(blocks) if offset < blocks.size() => {
                let in_block = (BLOCK_BYTES - offset % BLOCK_BYTES) as usize;
                self.read_at(offset, max_bytes.min(in_block).min(rest).max(min_bytes)).await
            }
            _ => self.read_at(offset, max_bytes.min(rest).max(min_bytes)).await,
        }
    }

    /// Gets the chunks (or blocks) that some offsets lie in, concurrently, and holds them: those of as many offsets, in the order given, as `max_bytes`
    /// of chunks hold, and of one at the least. Gives the number of offsets, too. A plain file needs no such thing.
    ///
    /// # Errors
    /// An offset lies outside of the blob or a chunk cannot be had.
    pub async fn pin(&self, offsets: &[u64], max_bytes: u64) -> Result<(Pinned, usize), BlobError> {
        match self {
            Self::Chunked(blob) => blob.pin(offsets, max_bytes).await,
            Self::File(_) => Ok((Pinned::default(), offsets.len())),
            Self::Remote(blocks) => {
                let (held, n_offsets) = blocks.hold(offsets, max_bytes).await?;
                Ok((Pinned::new(held), n_offsets))
            }
        }
    }

    /// What tells this content from any other: of an index the digest of all its bytes (which are read for it), of a plain file which
    /// file it is and when it was changed. `None` when that cannot be told.
    pub fn identity(&self) -> Option<String> {
        match self {
            Self::Chunked(blob) => Some(Digest::Sha256.id(blob.index().bytes()).to_hex()),
            Self::File(blob) => Some(blob.identity()),
            Self::Remote(blocks) => blocks.identity(),
        }
    }

    /// How many chunks a range is made of; `None` for a plain file.
    ///
    /// # Errors
    /// The index is damaged.
    pub fn n_chunks(&self, offset: u64, n_bytes: u64) -> Result<Option<u64>, BlobError> {
        match self {
            Self::Chunked(blob) => blob.n_chunks(offset, n_bytes).map(Some),
            Self::File(_) | Self::Remote(_) => Ok(None),
        }
    }
}
