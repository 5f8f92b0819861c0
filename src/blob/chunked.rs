//! A byte stream over an index: a range becomes chunks, fetched concurrently and put together with one copy at the most.
//!
//! `backed` is what is different when there is a plain copy to read from and to fill.

mod backed;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use tokio::sync::Semaphore;

use super::BlobError;
use super::backing::Backing;
use super::source::IndexBytes;
use crate::cache::{Cache, Want};
use crate::chunk::Chunk;
use crate::digest::Digest;
use crate::format::index::{Index, IndexError, Item};

/// Granularity of the reply budget, in bytes.
const PERMIT_BYTES: usize = 1024;

/// A blob over an index and a cache.
#[derive(Debug, Clone)]
pub struct ChunkedBlob {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    index: Arc<Index<IndexBytes>>,
    /// As it was when the index was opened: a mapped index that is truncated later must not look like a shorter blob.
    size: u64,
    name: String,
    digest: Digest,
    cache: Cache,
    /// Bounds the bytes of replies being put together, in units of [`PERMIT_BYTES`].
    replies: Arc<Semaphore>,
    n_reply_permits: u32,
    spare: Spare,
    /// The plain copy, once there is one.
    backing: OnceLock<Arc<Backing>>,
}

/// A part of a read: a chunk, and which of its bytes are wanted.
#[derive(Debug, Clone)]
struct Piece {
    /// Its number in the index.
    chunk_idx: usize,
    want: Want,
    /// Range within the chunk.
    range: Range<usize>,
}

impl ChunkedBlob {
    /// A blob over an index whose chunks come from `cache`. `name` is what messages call the index; `reply_bytes` bounds the
    /// buffers of reads that span chunks.
    pub fn new(index: Index<IndexBytes>, name: &str, cache: Cache, reply_bytes: u64) -> Self {
        let n_reply_permits =
            u32::try_from(reply_bytes / PERMIT_BYTES as u64).unwrap_or(u32::MAX >> 4).clamp(1, u32::MAX >> 4);
        let shared = Shared {
            digest: index.header().digest(),
            size: index.blob_size(),
            index: Arc::new(index),
            name: name.to_owned(),
            cache,
            replies: Arc::new(Semaphore::new(n_reply_permits as usize)),
            n_reply_permits,
            spare: Spare::new(reply_bytes),
            backing: OnceLock::new(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.shared.size
    }

    /// The index.
    pub fn index(&self) -> &Index<IndexBytes> {
        &self.shared.index
    }

    /// Where the chunks come from.
    pub fn cache(&self) -> &Cache {
        &self.shared.cache
    }

    /// Exactly `n_bytes` from `offset`, which must lie in the blob.
    pub(super) async fn read_at(&self, offset: u64, n_bytes: usize) -> Result<Bytes, BlobError> {
        let shared = &self.shared;
        if let Some(backing) = shared.backing.get() {
            return self.read_backed(backing, offset, n_bytes).await;
        }
        let pieces = shared.pieces(offset, n_bytes)?;
        if let [piece] = pieces.as_slice() {
            // The usual small read: no buffer, no copy.
            let chunk = match shared.cache.peek(&piece.want) {
                Some(chunk) => chunk,
                None => shared.cache.get(shared.digest, piece.want).await?,
            };
            return Ok(chunk.plain().slice(piece.range.clone()));
        }
        let mut reply = self.reply(n_bytes, 0).await?;
        let mut starts = Vec::with_capacity(pieces.len());
        let mut n_placed = 0;
        for piece in &pieces {
            starts.push(n_placed);
            n_placed += piece.range.len();
        }
        let wants: Vec<Want> = pieces.iter().map(|piece| piece.want).collect();
        let copy = |piece_idx: usize, chunk: Chunk| {
            let range = &pieces[piece_idx].range;
            reply.bytes[starts[piece_idx]..][..range.len()].copy_from_slice(&chunk.plain()[range.clone()]);
        };
        shared.cache.get_many(shared.digest, &wants, copy).await?;
        Ok(Bytes::from_owner(reply))
    }

    /// Bytes from `offset` to the end of the chunk it lies in.
    pub(super) fn bytes_to_chunk_end(&self, offset: u64) -> Result<usize, BlobError> {
        let (_, item) = self.shared.locate(offset)?;
        Ok(usize::try_from(item.end - offset).unwrap_or(usize::MAX))
    }

    /// Gets and holds the chunks that some offsets lie in, as [`super::Blob::pin`] says.
    pub(super) async fn pin(&self, offsets: &[u64], max_bytes: u64) -> Result<(Pinned, usize), BlobError> {
        let shared = &self.shared;
        let mut items: Vec<Item> = Vec::new();
        let mut n_bytes = 0;
        let mut n_offsets = 0;
        for offset in offsets {
            // Offsets mostly come in order, and many lie in the same chunk.
            if items.last().is_none_or(|item| !(item.start..item.end).contains(offset)) {
                let (_, item) = shared.locate(*offset)?;
                n_bytes += item.end - item.start;
                if n_bytes > max_bytes && !items.is_empty() {
                    break;
                }
                items.push(item);
            }
            n_offsets += 1;
        }
        shared.check_unchanged()?;
        let wants: Vec<Want> = items.iter().map(want).collect();
        let mut pieces = BTreeMap::new();
        let hold = |item_idx: usize, chunk: Chunk| {
            pieces.insert(items[item_idx].start, chunk.plain().clone());
        };
        shared.cache.get_many(shared.digest, &wants, hold).await?;
        Ok((Pinned::new(pieces), n_offsets))
    }

    /// How many chunks a range is made of.
    pub(super) fn n_chunks(&self, offset: u64, n_bytes: u64) -> Result<u64, BlobError> {
        if n_bytes == 0 || offset >= self.size() {
            return Ok(0);
        }
        let (first_idx, _) = self.shared.locate(offset)?;
        let last = offset.saturating_add(n_bytes).min(self.size()) - 1;
        let (last_idx, _) = self.shared.locate(last)?;
        Ok((last_idx - first_idx + 1) as u64)
    }
}

/// A reply being put together, with its share of the budget; both are given back when the kernel has the bytes.
#[derive(Debug)]
struct Reply {
    /// At least `n_bytes`; what is behind them is left from an earlier reply.
    bytes: Vec<u8>,
    n_bytes: usize,
    shared: Arc<Shared>,
    _permit: tokio::sync::OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Reply {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.n_bytes]
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.shared.spare.give_back(std::mem::take(&mut self.bytes));
    }
}

/// Reply buffers for the next read. A fresh buffer costs a page fault every 4 KiB, which is as dear as decompressing its content.
#[derive(Debug)]
struct Spare {
    buffers: Mutex<Vec<Vec<u8>>>,
    max_buffers: usize,
}

impl Spare {
    /// Buffers kept. More replies are rarely put together at once on a few cores.
    const MAX_BUFFERS: usize = 8;

    /// The largest buffer kept, in bytes: a READ of the kernel is 1 MiB at the most.
    const MAX_BUFFER_BYTES: usize = 1 << 20;

    /// Keeps at most a quarter of the bytes that replies may take, and one buffer.
    fn new(reply_bytes: u64) -> Self {
        let quarter = usize::try_from(reply_bytes / 4).unwrap_or(usize::MAX);
        let max_buffers = (quarter / Self::MAX_BUFFER_BYTES).clamp(1, Self::MAX_BUFFERS);
        Self { buffers: Mutex::default(), max_buffers }
    }

    /// A buffer of at least `n_bytes`, of any content.
    fn take(&self, n_bytes: usize) -> Vec<u8> {
        let spare = self.lock().pop();
        match spare {
            Some(mut buffer) => {
                if buffer.len() < n_bytes {
                    buffer.resize(n_bytes, 0);
                }
                buffer
            }
            None => vec![0; n_bytes],
        }
    }

    fn give_back(&self, buffer: Vec<u8>) {
        let mut buffers = self.lock();
        if buffers.len() < self.max_buffers && buffer.len() <= Self::MAX_BUFFER_BYTES {
            buffers.push(buffer);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    /// The chunks a range is made of. The range lies in the blob and is not empty.
    fn pieces(&self, offset: u64, n_bytes: usize) -> Result<Vec<Piece>, BlobError> {
        let end = offset + n_bytes as u64;
        let (mut item_idx, mut item) = self.locate(offset)?;
        let mut pieces = Vec::new();
        loop {
            let from = offset.max(item.start) - item.start;
            let to = end.min(item.end) - item.start;
            // A chunk is at most 128 MiB, by the check of the index.
            pieces.push(Piece { chunk_idx: item_idx, want: want(&item), range: from as usize..to as usize });
            if end <= item.end {
                break;
            }
            item_idx += 1;
            item = self.index.item(item_idx).map_err(|error| self.damaged(error))?;
        }
        self.check_unchanged()?;
        Ok(pieces)
    }

    /// To be asked after the index was read for something and before that is used.
    fn check_unchanged(&self) -> Result<(), BlobError> {
        self.index.source().check_unchanged().map_err(BlobError::Index)
    }

    fn locate(&self, offset: u64) -> Result<(usize, Item), BlobError> {
        let located = self.index.locate(offset).and_then(|item_idx| match item_idx {
            Some(item_idx) => self.index.item(item_idx).map(|item| Some((item_idx, item))),
            None => Ok(None),
        });
        match located.map_err(|error| self.damaged(error))? {
            // A damaged index need not be in order, and then the search can end anywhere.
            Some((item_idx, item)) if (item.start..item.end).contains(&offset) => Ok((item_idx, item)),
            Some(_) => Err(BlobError::Index(format!("index {} is damaged: its chunks are not in order", self.name))),
            None => Err(BlobError::OutOfRange { offset, n_bytes: 1, size: self.size }),
        }
    }

    fn damaged(&self, error: IndexError) -> BlobError {
        BlobError::Index(format!("index {}: {error}", self.name))
    }
}

fn want(item: &Item) -> Want {
    Want { id: item.id, n_bytes: item.end - item.start }
}

/// Chunks (or blocks) held in memory whatever the cache drops, for reading without waiting.
#[derive(Debug, Default)]
pub struct Pinned {
    /// By the offset each starts at.
    pieces: BTreeMap<u64, Bytes>,
}

impl Pinned {
    /// Holds pieces of a stream, by the offset each starts at.
    pub(super) fn new(pieces: BTreeMap<u64, Bytes>) -> Self {
        Self { pieces }
    }

    /// The bytes from `offset` to the end of its piece, at most `max_bytes`; `None` when the piece is not held.
    pub fn bytes_at(&self, offset: u64, max_bytes: usize) -> Option<Bytes> {
        let (start, piece) = self.pieces.range(..=offset).next_back()?;
        let from = usize::try_from(offset - start).ok()?;
        let to = piece.len().min(from.saturating_add(max_bytes));
        (from < to).then(|| piece.slice(from..to))
    }
}
