//! A directory's goodbye table, and finding names in it by their hashes.
//!
//! A table is kept twice ordered: by offset, which is the order of listing and of cheap access, and by hash, so that a name is
//! found (or known to be absent) without touching any child. A table too large to keep for one lookup is searched where it lies.

use std::sync::Arc;

use super::{Node, TreeError};
use crate::blob::Blob;
use crate::format::catar;

/// The largest goodbye table that is read whole for a lookup, in bytes (some 170,000 names). A larger one is searched by a
/// walk down its search tree: about as many reads as the logarithm of the number of names.
pub(super) const MAX_WHOLE_TABLE_BYTES: u64 = 4 << 20;

/// Bytes of one item of a goodbye table (formats.md 4.4).
const ITEM_BYTES: u64 = 24;

/// Bytes before the items: the header of the GOODBYE element.
const HEADER_BYTES: u64 = 16;

/// Candidates looked at for one name in a search tree on disk; more equal hashes than this are no accident.
const MAX_CANDIDATES: usize = 64;

/// A directory's goodbye table.
#[derive(Debug)]
pub(super) struct Dir {
    /// The directory itself.
    pub(super) node: Arc<Node>,
    /// Its children, by offset.
    pub(super) items: Vec<catar::Item>,
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
}

impl TableSpan {
    /// Reads the tail of the directory whose node ends at `end`.
    pub(super) async fn read(blob: &Blob, end: u64) -> Result<Self, TreeError> {
        let damaged = || TreeError::Damaged(format!("no directory ends at offset {end}"));
        let n_tail = catar::TAIL_BYTES as u64;
        let tail_offset = end.checked_sub(n_tail).ok_or_else(damaged)?;
        let bytes = blob.read_at(tail_offset, catar::TAIL_BYTES).await?;
        let tail = catar::Tail::parse(&bytes).map_err(|error| TreeError::Damaged(format!("{error}, at offset {tail_offset}")))?;
        let goodbye_offset = end.checked_sub(tail.goodbye_size).ok_or_else(damaged)?;
        let entry_offset = goodbye_offset.checked_sub(tail.entry_distance).ok_or_else(damaged)?;
        Ok(Self { entry_offset, goodbye_offset, n_bytes: tail.goodbye_size })
    }

    /// Number of items.
    fn n_items(&self) -> u64 {
        self.n_bytes.saturating_sub(HEADER_BYTES + ITEM_BYTES) / ITEM_BYTES
    }
}

impl Dir {
    /// Reads a whole table.
    pub(super) async fn load(blob: &Blob, node: Arc<Node>, span: TableSpan) -> Result<Self, TreeError> {
        let n_bytes = usize::try_from(span.n_bytes).map_err(|_| TreeError::Damaged("a goodbye table is too large".to_owned()))?;
        let bytes = blob.read_at(span.goodbye_offset, n_bytes).await?;
        let table = catar::GoodbyeTable::parse(&bytes, span.goodbye_offset, span.entry_offset)
            .map_err(|error| TreeError::Damaged(format!("{error}, in the goodbye table at offset {}", span.goodbye_offset)))?;
        let mut items = table.into_items();
        items.sort_unstable_by_key(|item| item.filename_offset);
        if items.windows(2).any(|pair| pair[0].end > pair[1].filename_offset) {
            let offset = span.goodbye_offset;
            return Err(TreeError::Damaged(format!("children overlap in the goodbye table at offset {offset}")));
        }
        let mut by_hash: Vec<u32> = (0..items.len() as u32).collect();
        by_hash.sort_by_key(|item_idx| items[*item_idx as usize].hash);
        Ok(Self { node, items, by_hash })
    }

    /// The children whose names have this hash.
    pub(super) fn candidates(&self, hash: u64) -> impl Iterator<Item = &catar::Item> {
        let first = self.by_hash.partition_point(|item_idx| self.items[*item_idx as usize].hash < hash);
        self.by_hash[first..].iter().map(|item_idx| &self.items[*item_idx as usize]).take_while(move |item| item.hash == hash)
    }

    /// The child whose node contains an offset.
    pub(super) fn containing(&self, offset: u64) -> Option<&catar::Item> {
        let after = self.items.partition_point(|item| item.filename_offset <= offset);
        self.items[..after].last().filter(|item| offset < item.end)
    }

    pub(super) fn weight_bytes(&self) -> usize {
        size_of::<Self>() + self.items.len() * (size_of::<catar::Item>() + size_of::<u32>())
    }
}

/// Walks down the search tree of a table that is not read whole; gives the children whose names have this hash.
pub(super) async fn search_in_place(blob: &Blob, span: TableSpan, hash: u64) -> Result<Vec<catar::Item>, TreeError> {
    let n_items = span.n_items();
    let mut found = Vec::new();
    let mut to_visit = vec![0u64];
    while let Some(item_idx) = to_visit.pop() {
        if item_idx >= n_items || found.len() >= MAX_CANDIDATES {
            continue;
        }
        let offset = span.goodbye_offset + HEADER_BYTES + ITEM_BYTES * item_idx;
        let bytes = blob.read_at(offset, ITEM_BYTES as usize).await?;
        let item = catar::Item::parse(&bytes, span.goodbye_offset, span.entry_offset)
            .map_err(|error| TreeError::Damaged(format!("{error}, in the goodbye table at offset {}", span.goodbye_offset)))?;
        // Equal hashes can stand on both sides.
        if hash >= item.hash {
            to_visit.push(2 * item_idx + 2);
        }
        if hash <= item.hash {
            to_visit.push(2 * item_idx + 1);
        }
        if hash == item.hash {
            found.push(item);
        }
    }
    Ok(found)
}
