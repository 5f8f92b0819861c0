//! Reading the children of a directory: in the order of their offsets, so that chunks are used one after the other, and with many
//! chunks in flight at once.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::dir::Dir;
use super::{Content, HEAD_BYTES, Node, Tree, TreeError, read_node};
use crate::blob::{Blob, Pinned};
use crate::format::catar::{self, ElementHeader, FilenameParse, Item};

/// Children read at once for a listing. Large enough that the chunks they need are fetched side by side, small enough that the
/// first names of a huge directory come soon.
const WINDOW_CHILDREN: usize = 1024;

/// Windows of a large directory that are fetched ahead of the one that is read.
const WINDOWS_AHEAD: usize = 8;

/// Windows read at the same time, so that the chunks held for listings are bounded whatever the number of readers.
pub(super) const MAX_LISTINGS: usize = 4;

/// A name in a directory and what it names.
#[derive(Debug, Clone)]
pub struct Child {
    /// Raw bytes of the name.
    pub name: Bytes,
    /// The file.
    pub node: Arc<Node>,
    /// Place after this child in the directory: where a listing goes on.
    pub next_idx: u64,
}

/// Children of a directory from some place on, as many as were read together.
#[derive(Debug, Clone)]
pub struct Children {
    window: Arc<Vec<Child>>,
    first: usize,
    /// Place in the directory where the next children begin; `None` at the end of the directory.
    pub next_idx: Option<u64>,
}

impl Children {
    /// The children.
    pub fn as_slice(&self) -> &[Child] {
        &self.window[self.first..]
    }
}

/// What keeping a window costs, in bytes, more or less.
fn weight_bytes(window: &[Child]) -> usize {
    // A name and a node are allocations of their own, each with a count of its users.
    const ALLOCATION_BYTES: usize = 32;
    let child_bytes = size_of::<Child>() + 2 * ALLOCATION_BYTES;
    window.iter().map(|child| child_bytes + child.name.len() + child.node.weight_bytes()).sum()
}

impl Tree {
    /// Children of a directory from a place on: 0, or [`Child::next_idx`] of the last one seen. May be empty before the end.
    ///
    /// # Errors
    /// The file is not a directory, or the archive cannot be read.
    pub async fn list(&self, node: &Arc<Node>, from_idx: u64) -> Result<Children, TreeError> {
        self.touch();
        if let Some(listed) = self.list_by_table(node, from_idx).await {
            return Ok(listed);
        }
        let dir = self.dir(node).await?;
        let from_idx = usize::try_from(from_idx).unwrap_or(usize::MAX).min(dir.items.len());
        let window_idx = from_idx / WINDOW_CHILDREN;
        let window = match self.room.listings.get(&(self.tree_id, node.entry_offset, window_idx)) {
            Some(window) => window,
            None => self.load_window(&dir, window_idx).await?,
        };
        let first = window.partition_point(|child| child.next_idx <= from_idx as u64);
        let window_end = ((window_idx + 1) * WINDOW_CHILDREN).min(dir.items.len());
        let next_idx = (window_end < dir.items.len()).then_some(window_end as u64);
        Ok(Children { window, first, next_idx })
    }

    /// As [`Tree::list`], from the metadata table if there is one.
    async fn list_by_table(&self, node: &Arc<Node>, from_idx: u64) -> Option<Children> {
        let table = self.table().filter(|_| node.is_directory())?;
        let window_idx = usize::try_from(from_idx).unwrap_or(usize::MAX) / WINDOW_CHILDREN;
        let start = (window_idx as u64).saturating_mul(WINDOW_CHILDREN as u64);
        let window_end = start.saturating_add(WINDOW_CHILDREN as u64);
        let key = (self.tree_id, node.entry_offset, window_idx);
        let (window, next_idx) = match self.room.listings.get(&key) {
            // Nothing is listed; it tells where it goes on.
            Some(window) => {
                let listed = table.table.list(node.entry_offset, window_end..window_end).await;
                (window, self.asked(&table, listed)?.1)
            }
            None => {
                let listed = table.table.list(node.entry_offset, start..window_end).await;
                let (window, next_idx) = self.asked(&table, listed)?;
                let window = Arc::new(window);
                self.room.listings.put(key, Arc::clone(&window), weight_bytes(&window));
                (window, next_idx)
            }
        };
        let first = window.partition_point(|child| child.next_idx <= from_idx);
        Some(Children { window, first, next_idx })
    }

    /// How many names a directory has, with those that name no file.
    pub(super) async fn n_items(&self, node: &Arc<Node>) -> Result<usize, TreeError> {
        Ok(self.dir(node).await?.items.len())
    }

    /// Number of subdirectories, if a metadata table tells it, or the whole directory has been listed and is still known.
    pub fn n_subdirectories_if_known(&self, node: &Node) -> Option<u64> {
        if let Some(n_subdirectories) = node.n_subdirectories {
            return Some(n_subdirectories.into());
        }
        let dir = self.room.dirs.get(&(self.tree_id, node.entry_offset))?;
        let mut n_subdirectories = 0;
        for window_idx in 0..dir.items.len().div_ceil(WINDOW_CHILDREN) {
            let window = self.room.listings.get(&(self.tree_id, node.entry_offset, window_idx))?;
            n_subdirectories += window.iter().filter(|child| child.node.is_directory()).count() as u64;
        }
        Some(n_subdirectories)
    }

    async fn load_window(&self, dir: &Dir, window_idx: usize) -> Result<Arc<Vec<Child>>, TreeError> {
        // Never closed, so this always gives a permit.
        let _permit = self.room.listing_permits.acquire().await;
        if let Some(window) = self.room.listings.get(&(self.tree_id, dir.node.entry_offset, window_idx)) {
            // Another reader has read it in the meantime.
            return Ok(window);
        }
        let start = window_idx * WINDOW_CHILDREN;
        let items = dir.items.get(start..).unwrap_or_default();
        let items = &items[..items.len().min(WINDOW_CHILDREN)];
        let offsets: Vec<u64> = items.iter().map(|item| item.filename_offset).collect();
        let mut window = Vec::with_capacity(items.len());
        let mut n_done = 0;
        while n_done < items.len() {
            let max_bytes = self.room.pinned_bytes.load(Ordering::Relaxed);
            let (pinned, n_pinned) = self.blob.pin(&offsets[n_done..], max_bytes).await?;
            for (idx, item) in items.iter().enumerate().skip(n_done).take(n_pinned) {
                if let Some(mut child) = self.read_child(&dir.node, item, Some(&pinned)).await? {
                    child.next_idx = (start + idx + 1) as u64;
                    window.push(child);
                }
            }
            n_done += n_pinned;
        }
        let window = Arc::new(window);
        let key = (self.tree_id, dir.node.entry_offset, window_idx);
        self.room.listings.put(key, Arc::clone(&window), weight_bytes(&window));
        self.fetch_ahead(dir, window_idx);
        Ok(window)
    }

    /// Fetches in the background what the next windows need: a directory that is listed so far is listed to its end, as a rule.
    fn fetch_ahead(&self, dir: &Dir, window_idx: usize) {
        let next = dir.items.get((window_idx + 1) * WINDOW_CHILDREN..).unwrap_or_default();
        if next.is_empty() || !window_idx.is_multiple_of(WINDOWS_AHEAD / 2) || matches!(self.blob, Blob::File(_)) {
            return;
        }
        let next = next.iter().take(WINDOWS_AHEAD * WINDOW_CHILDREN);
        let offsets: Vec<u64> = next.map(|item| item.filename_offset).collect();
        // Where others list as well, there is something to fetch already.
        let Ok(permit) = Arc::clone(&self.room.listing_permits).try_acquire_owned() else { return };
        let (blob, max_bytes) = (self.blob.clone(), self.room.pinned_bytes.load(Ordering::Relaxed));
        tokio::spawn(async move {
            // What cannot be had is an error when it is read.
            drop(blob.pin(&offsets, max_bytes).await);
            drop(permit);
        });
    }

    /// Reads one child and keeps it. `None` for the name without a file that desync leaves for a FIFO or socket.
    pub(super) async fn read_child(
        &self,
        parent: &Node,
        item: &Item,
        pinned: Option<&Pinned>,
    ) -> Result<Option<Child>, TreeError> {
        let offset = item.filename_offset;
        let damaged = |what: &dyn Display| TreeError::Damaged(format!("{what}, in the name at offset {offset}"));
        let at_hand = pinned.and_then(|pinned| pinned.bytes_at(offset, HEAD_BYTES));
        let mut bytes = match at_hand {
            Some(bytes) => bytes,
            None => self.blob.read_some(offset, ElementHeader::BYTES, HEAD_BYTES).await?,
        };
        let filename = loop {
            match catar::parse_filename(&bytes).map_err(|error| damaged(&error))? {
                FilenameParse::Filename(filename) => break filename,
                FilenameParse::Need(n_bytes) => {
                    // Given back first, as in reading a node.
                    drop(bytes);
                    bytes = self.blob.read_some(offset, n_bytes as usize, HEAD_BYTES).await?;
                }
            }
        };
        let name = Bytes::from(filename.name);
        let entry_offset = offset + filename.element_bytes;
        if entry_offset == item.end {
            return Ok(None);
        }
        if entry_offset > item.end {
            return Err(damaged(&"it is longer than its node"));
        }
        if let Some(node) = self.room.nodes.get(&(self.tree_id, entry_offset)) {
            return Ok(Some(Child { name, node, next_idx: 0 }));
        }
        let rest = bytes.slice(filename.element_bytes as usize..);
        let parsed = read_node(&self.blob, entry_offset, item.end, rest).await?;
        let node = Node::new(&parsed, entry_offset, parent.entry_offset, item.end)?;
        let payload_end = match node.content {
            Content::File { offset, size } => offset.checked_add(size),
            _ => Some(entry_offset),
        };
        if payload_end.is_none_or(|payload_end| payload_end > item.end) {
            return Err(damaged(&"the file's content does not lie within its node"));
        }
        let node = Arc::new(node);
        self.room.nodes.put((self.tree_id, entry_offset), Arc::clone(&node), node.weight_bytes());
        Ok(Some(Child { name, node, next_idx: 0 }))
    }
}
