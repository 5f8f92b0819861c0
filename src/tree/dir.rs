//! A directory's goodbye table, and finding names in it by their hashes.
//!
//! A table is kept twice ordered: by offset, which is the order of listing and of cheap access, and by hash, so that a name is
//! found (or known to be absent) without touching any child. A table too large to keep for one lookup is searched where it lies.

use std::sync::Arc;

use futures_util::StreamExt;

use super::{Node, TreeError};
use crate::blob::{Blob, BlobError};
use crate::format::catar::{CatarError, Descent, ElementHeader, GoodbyeTable, Item, Kind, Tail};

/// The largest goodbye table that is read whole for a lookup, in bytes (some 170,000 names). A larger one is searched by a
/// walk down its search tree: about as many reads as the logarithm of the number of names.
pub(super) const MAX_WHOLE_TABLE_BYTES: u64 = 4 << 20;

/// The largest goodbye table that is read at all, in bytes: 11 million names in one directory. What says it is larger is damaged
/// or hostile.
const MAX_TABLE_BYTES: u64 = 256 << 20;

/// Children in a piece of a table that is not read at once: 1 MiB, so that no read needs the whole budget of replies.
const PIECE_ITEMS: u64 = (1 << 20) / Item::BYTES as u64;

/// Pieces read side by side, so that a large table from afar does not take a time for each.
const PIECES_AT_ONCE: usize = 4;

/// Candidates looked at for one name in a search tree on disk; more equal hashes than this are no accident.
const MAX_CANDIDATES: usize = 64;

/// A directory's goodbye table.
#[derive(Debug)]
pub(super) struct Dir {
    /// The directory itself.
    pub(super) node: Arc<Node>,
    /// Its children, by offset.
    pub(super) items: Vec<Item>,
    /// Places in `items`, by hash.
    by_hash: Vec<u32>,
}

/// Where a directory's table lies, by its last 24 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TableSpan {
    /// Where the directory's ENTRY lies.
    pub(super) entry_offset: u64,
    /// Where the GOODBYE element begins.
    pub(super) goodbye_offset: u64,
    /// Bytes of the GOODBYE element.
    pub(super) n_bytes: u64,
    /// Children in it.
    n_items: u64,
}

impl TableSpan {
    fn damaged(&self, error: CatarError) -> TreeError {
        TreeError::Damaged(format!("{error}, at offset {}", self.goodbye_offset))
    }

    /// Reads the tail of the directory whose node ends at `end`.
    pub(super) async fn read(blob: &Blob, end: u64) -> Result<Self, TreeError> {
        let damaged =
            |error: CatarError| TreeError::Damaged(format!("{error}, in the directory that ends at offset {end}"));
        let tail_offset = end.saturating_sub(Tail::BYTES as u64);
        let tail = read_array(blob, tail_offset).await?;
        let tail = Tail::parse(&tail).map_err(damaged)?;
        let (goodbye_offset, entry_offset) = tail.locate(end).map_err(damaged)?;
        Ok(Self { entry_offset, goodbye_offset, n_bytes: tail.goodbye_size, n_items: tail.n_items() })
    }
}

/// Reads the items of a whole table, in any order: those of a large one piece by piece, so that its bytes are not held beside them.
async fn read_items(blob: &Blob, span: TableSpan) -> Result<Vec<Item>, TreeError> {
    let TableSpan { goodbye_offset, entry_offset, n_bytes, n_items } = span;
    if n_bytes > MAX_TABLE_BYTES {
        return Err(TreeError::Damaged(format!("a goodbye table of {n_bytes} bytes, at offset {goodbye_offset}")));
    }
    if n_items <= PIECE_ITEMS {
        let bytes = blob.read_at(goodbye_offset, n_bytes as usize).await?;
        let table = GoodbyeTable::parse(&bytes, goodbye_offset, entry_offset).map_err(|error| span.damaged(error))?;
        return Ok(table.into_items_by_offset());
    }
    // The tail was looked at before.
    let header = read_array(blob, goodbye_offset).await?;
    let header = ElementHeader::parse(&header).map_err(|error| span.damaged(error))?;
    if (header.kind, header.size) != (Kind::Goodbye, n_bytes) {
        return Err(span.damaged(CatarError::Goodbye("its two sizes differ")));
    }
    let pieces = futures_util::stream::iter((0..n_items).step_by(PIECE_ITEMS as usize)).map(|first| {
        let n = PIECE_ITEMS.min(n_items - first) as usize;
        blob.read_at(Item::position(goodbye_offset, first), n * Item::BYTES)
    });
    let mut pieces = pieces.buffered(PIECES_AT_ONCE);
    let mut items = Vec::with_capacity(n_items as usize);
    while let Some(piece) = pieces.next().await {
        for item in piece?.as_chunks::<{ Item::BYTES }>().0 {
            items.push(Item::parse(item, goodbye_offset, entry_offset).map_err(|error| span.damaged(error))?);
        }
    }
    items.sort_unstable_by_key(|item| item.filename_offset);
    Ok(items)
}

/// Reads a piece of fixed size.
async fn read_array<const N: usize>(blob: &Blob, offset: u64) -> Result<[u8; N], TreeError> {
    let bytes = blob.read_at(offset, N).await?;
    <[u8; N]>::try_from(bytes.as_ref()).map_err(|_| TreeError::Blob(BlobError::Abandoned))
}

impl Dir {
    /// Reads a whole table.
    pub(super) async fn load(blob: &Blob, node: Arc<Node>, span: TableSpan) -> Result<Self, TreeError> {
        let items = read_items(blob, span).await?;
        if items.windows(2).any(|pair| pair[0].end > pair[1].filename_offset) {
            let offset = span.goodbye_offset;
            return Err(TreeError::Damaged(format!("children overlap in the goodbye table at offset {offset}")));
        }
        let mut by_hash: Vec<u32> = (0..items.len() as u32).collect();
        by_hash.sort_unstable_by_key(|item_idx| items[*item_idx as usize].hash);
        Ok(Self { node, items, by_hash })
    }

    /// The children whose names have this hash.
    pub(super) fn candidates(&self, hash: u64) -> impl Iterator<Item = &Item> {
        let first = self.by_hash.partition_point(|item_idx| self.items[*item_idx as usize].hash < hash);
        self.by_hash[first..]
            .iter()
            .map(|item_idx| &self.items[*item_idx as usize])
            .take_while(move |item| item.hash == hash)
    }

    /// The child whose node contains an offset.
    pub(super) fn containing(&self, offset: u64) -> Option<&Item> {
        let after = self.items.partition_point(|item| item.filename_offset <= offset);
        self.items[..after].last().filter(|item| offset < item.end)
    }

    pub(super) fn weight_bytes(&self) -> usize {
        size_of::<Self>() + self.items.len() * (size_of::<Item>() + size_of::<u32>())
    }
}

/// Walks down the search tree of a table that is not read whole; gives the children whose names have this hash.
pub(super) async fn search_in_place(blob: &Blob, span: TableSpan, hash: u64) -> Result<Vec<Item>, TreeError> {
    let mut found = Vec::new();
    let mut descent = Descent::new(span.n_items, hash);
    while let Some(item_idx) = descent.next_index() {
        let bytes = read_array(blob, Item::position(span.goodbye_offset, item_idx)).await?;
        let item = Item::parse(&bytes, span.goodbye_offset, span.entry_offset).map_err(|error| span.damaged(error))?;
        if descent.visit(item_idx, item.hash) {
            found.push(item);
            if found.len() > MAX_CANDIDATES {
                return Err(TreeError::Damaged(format!(
                    "too many equal hashes in the table at {}",
                    span.goodbye_offset
                )));
            }
        }
    }
    Ok(found)
}
