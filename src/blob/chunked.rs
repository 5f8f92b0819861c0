//! A byte stream over an index: a range becomes chunks, fetched concurrently and put together with one copy at the most.
//!
//! `backed` is what is different when there is a plain copy to read from and to fill.

mod backed;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

pub use backed::Filled;
use bytes::Bytes;
use tokio::sync::watch;

use super::BlobError;
use super::backing::Backing;
use super::replies::Replies;
use super::source::IndexBytes;
use crate::cache::ahead::ReadAhead;
use crate::cache::background::Purpose;
use crate::cache::budget::BudgetUse;
use crate::cache::touched::Touched;
use crate::cache::{Cache, Want};
use crate::chunk::Chunk;
use crate::digest::Digest;
use crate::format::index::{Index, IndexError, Item};

/// A blob over an index and a cache.
#[derive(Debug, Clone)]
pub struct ChunkedBlob {
    shared: Arc<Shared>,
    cache: Cache,
}

#[derive(Debug)]
struct Shared {
    index: Arc<Index<IndexBytes>>,
    /// As it was when the index was opened: a mapped index that is truncated later must not look like a shorter blob.
    size: u64,
    name: String,
    digest: Digest,
    /// Who reads it, if anything may be read ahead of them.
    ahead: Option<Arc<ReadAhead>>,
    replies: Arc<Replies>,
    /// Which parts were read since it was opened.
    touched: Touched,
    /// The plain copy, once there is one.
    backing: OnceLock<Arc<Backing>>,
    /// Whether a plain copy is being opened, so that there may be one soon.
    is_opening_backing: watch::Sender<bool>,
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
        Self::with_replies(index, name, cache, Arc::new(Replies::new(reply_bytes)))
    }

    /// The same, with a limit of replies that other blobs have, too.
    pub fn with_replies(index: Index<IndexBytes>, name: &str, cache: Cache, replies: Arc<Replies>) -> Self {
        let touched = Touched::new(index.blob_size(), index.n_chunks() as u64);
        let shared = Shared {
            digest: index.header().digest(),
            size: index.blob_size(),
            index: Arc::new(index),
            name: name.to_owned(),
            ahead: cache.ahead().map(|budget| Arc::new(ReadAhead::new(Arc::clone(budget)))),
            replies,
            touched,
            backing: OnceLock::new(),
            is_opening_backing: watch::Sender::new(false),
        };
        Self { shared: Arc::new(shared), cache }
    }

    /// The same blob, read for another purpose.
    pub(super) fn for_purpose(&self, purpose: Purpose) -> Self {
        Self { shared: Arc::clone(&self.shared), cache: self.cache.for_purpose(purpose) }
    }

    /// Who reads it, as long as anything can be fetched for them.
    pub(super) fn ahead(&self) -> Option<&Arc<ReadAhead>> {
        self.shared.ahead.as_ref().filter(|_| !self.is_complete())
    }

    /// The chunks that begin in a range and are not in the backing file, up to one that is longer than `max_chunk_bytes`.
    pub(super) fn wants_in(&self, range: Range<u64>, max_chunk_bytes: u64) -> Result<Vec<Want>, BlobError> {
        let shared = &self.shared;
        if range.start >= shared.size {
            return Ok(Vec::new());
        }
        let (mut item_idx, mut item) = shared.locate(range.start)?;
        let mut wants = Vec::new();
        loop {
            if item.start >= range.end {
                break;
            }
            if item.start >= range.start {
                if item.size_bytes() > max_chunk_bytes {
                    break;
                }
                if !self.is_in_file(item_idx) {
                    wants.push(want(&item));
                }
            }
            item_idx += 1;
            if item_idx >= shared.index.n_chunks() {
                break;
            }
            item = shared.index.item(item_idx).map_err(|error| shared.damaged(error))?;
        }
        shared.check_unchanged()?;
        Ok(wants)
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.shared.size
    }

    /// The index.
    pub fn index(&self) -> &Index<IndexBytes> {
        &self.shared.index
    }

    /// The bytes of replies being put together, as a share of what they may have.
    pub fn reply_use(&self) -> BudgetUse {
        self.shared.replies.usage()
    }

    /// Replies being put together may have so many bytes from now on.
    pub fn set_reply_bytes(&self, reply_bytes: u64) {
        self.shared.replies.set_limit_bytes(reply_bytes);
    }

    /// Which parts were read since it was opened.
    pub fn touched(&self) -> &Touched {
        &self.shared.touched
    }

    /// Where the chunks come from.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// Exactly `n_bytes` from `offset`, which must lie in the blob.
    pub(super) async fn read_at(&self, offset: u64, n_bytes: usize) -> Result<Bytes, BlobError> {
        let shared = &self.shared;
        if !self.cache.is_background() {
            shared.touched.mark(offset, n_bytes as u64);
        }
        if let Some(backing) = shared.backing.get() {
            return self.read_backed(backing, offset, n_bytes).await;
        }
        let pieces = shared.pieces(offset, n_bytes)?;
        if let [piece] = pieces.as_slice() {
            // The usual small read: no buffer, no copy.
            let chunk = match self.cache.peek(&piece.want) {
                Some(chunk) => chunk,
                None => self.cache.get(shared.digest, piece.want).await?,
            };
            return Ok(chunk.plain().slice(piece.range.clone()));
        }
        let mut starts = Vec::with_capacity(pieces.len());
        let mut n_placed = 0;
        for piece in &pieces {
            starts.push(n_placed);
            n_placed += piece.range.len();
        }
        let wants: Vec<Want> = pieces.iter().map(|piece| piece.want).collect();
        let mut reply = shared.replies.begin(n_bytes).await;
        let copy = |piece_idx: usize, chunk: Chunk| {
            let range = &pieces[piece_idx].range;
            reply.bytes_mut()[starts[piece_idx]..][..range.len()].copy_from_slice(&chunk.plain()[range.clone()]);
        };
        self.cache.get_many(shared.digest, &wants, copy).await?;
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
                if !self.cache.is_background() {
                    shared.touched.mark(item.start, item.end - item.start);
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
        self.cache.get_many(shared.digest, &wants, hold).await?;
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
