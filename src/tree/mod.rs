//! A directory tree over an archive, by random access: nothing is read but what is asked for.
//!
//! * [`Node`] is one file; its inode number is where its ENTRY lies in the archive.
//! * `dir` is a directory's goodbye table, `list` reads its children, `bounded` keeps what was parsed.
//! * [`TreeRoom`] is what several trees share of that, within one limit.
//! * [`Tree`] finds: from the last 24 bytes to the root's table, from there by hash to any child (formats.md 4.5).
//! * [`table`] is the metadata table, which answers instead of the archive once one is attached; `attached` asks it.
//!
//! Invariants: stateless — an inode number alone finds its file again, by descending to the node that contains the offset, so nothing
//! that the caches drop is lost; a name that is not there is known from hashes alone; what an archive says is checked
//! before it is used: a child lies within its parent, strictly.

mod attached;
mod bounded;
mod dir;
mod list;
mod node;
pub mod table;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

use bytes::Bytes;
use tokio::sync::Semaphore;

use crate::blob::{Blob, BlobError};
use crate::format::catar::node::ENTRY_BYTES;
use crate::format::catar::{self, CatarError, FeatureFlags, Item, NodeParse, Tail};
pub use attached::TableState;
use attached::{Attached, Clock};
use bounded::Bounded;
use dir::{Dir, MAX_WHOLE_TABLE_BYTES, TableSpan};
pub use list::{Child, Children};
pub use node::{Content, Node, ROOT_INO, ino_of};
use table::KeptBlocks;

/// Read at once for a child: its name, its ENTRY and usually all its metadata.
const HEAD_BYTES: usize = 512;

/// The deepest nesting looked into when a file is found again by its offset; casync stops at 64.
const MAX_DEPTH: usize = 4096;

/// Symlinks in the middle of a path that [`Tree::resolve`] follows before it gives up, as the kernel does.
const MAX_SYMLINKS: usize = 40;

/// Why the tree cannot answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TreeError {
    /// No file has this inode number or path.
    #[error("no such file")]
    NotFound,
    /// The file is not a directory.
    #[error("not a directory")]
    NotADirectory,
    /// Too many symlinks in a path.
    #[error("too many levels of symbolic links")]
    Loop,
    /// The archive is damaged.
    #[error("the archive is damaged: {0}")]
    Damaged(String),
    /// The archive's bytes cannot be had.
    #[error(transparent)]
    Blob(#[from] BlobError),
}

/// How much of what was parsed is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TreeConfig {
    /// Bytes of parsed nodes.
    pub node_bytes: usize,
    /// Bytes of goodbye tables; the one used last is always kept.
    pub table_bytes: usize,
    /// Bytes of listings; the one used last is always kept.
    pub listing_bytes: usize,
    /// Bytes of chunks held while directories are listed, by all that are listed at the same time.
    pub pinned_bytes: u64,
}

/// A directory tree over an archive.
#[derive(Debug)]
pub struct Tree {
    blob: Blob,
    root: Arc<Node>,
    feature_flags: FeatureFlags,
    /// The number of this tree in what it shares with others.
    tree_id: u64,
    room: Arc<TreeRoom>,
    /// The metadata table, if there is one. Never locked over I/O or await.
    attached: RwLock<Attached>,
    /// When the tree was asked last.
    clock: Clock,
}

/// What is kept of one or more trees, within limits for all of them.
#[derive(Debug)]
pub struct TreeRoom {
    /// All by tree and offset of the file's ENTRY.
    nodes: Bounded<(u64, u64), Arc<Node>>,
    dirs: Bounded<(u64, u64), Arc<Dir>>,
    blocks: KeptBlocks,
    listings: Bounded<(u64, u64, usize), Arc<Vec<Child>>>,
    listing_permits: Arc<Semaphore>,
    /// Bytes of chunks that one listing may hold.
    pinned_bytes: AtomicU64,
    n_trees: AtomicU64,
}

impl TreeRoom {
    /// Room for as much as the configuration says.
    pub fn new(config: TreeConfig) -> Self {
        Self {
            nodes: Bounded::new(config.node_bytes),
            dirs: Bounded::new(config.table_bytes),
            blocks: KeptBlocks::new(config.table_bytes),
            listings: Bounded::new(config.listing_bytes),
            listing_permits: Arc::new(Semaphore::new(list::MAX_LISTINGS)),
            pinned_bytes: AtomicU64::new(config.pinned_bytes / list::MAX_LISTINGS as u64),
            n_trees: AtomicU64::new(0),
        }
    }
}

impl Tree {
    /// Opens an archive: reads its end and its beginning.
    ///
    /// # Errors
    /// The bytes cannot be had, or are not an archive.
    pub async fn open(blob: Blob, config: TreeConfig) -> Result<Self, TreeError> {
        Self::open_in(blob, Arc::new(TreeRoom::new(config))).await
    }

    /// The root of an archive of `size` bytes of which `blob` has the beginning at least.
    ///
    /// # Errors
    /// The bytes cannot be had or are not an archive; or the root has more metadata than `blob` has bytes.
    pub async fn root_of(blob: &Blob, size: u64) -> Result<Node, TreeError> {
        let head = blob.read_some(0, size.min(ENTRY_BYTES) as usize, HEAD_BYTES).await?;
        Node::new(&*read_node(blob, 0, size, head).await?, 0, 0, size)
    }

    /// Opens an archive that shares what is kept with others.
    ///
    /// # Errors
    /// Those of [`Tree::open`].
    pub async fn open_in(blob: Blob, room: Arc<TreeRoom>) -> Result<Self, TreeError> {
        let size = blob.size();
        let head = blob.read_some(0, size.min(ENTRY_BYTES) as usize, HEAD_BYTES);
        let head = meanwhile(&blob, size, head).await?;
        let parsed = read_node(&blob, 0, size, head).await?;
        if matches!(parsed.content, catar::Content::Directory { .. }) {
            let span = TableSpan::read(&blob, size).await?;
            if span.entry_offset != 0 {
                let found = span.entry_offset;
                return Err(TreeError::Damaged(format!(
                    "its last directory begins at offset {found}, not at the start"
                )));
            }
        }
        let root = Arc::new(Node::new(&parsed, 0, 0, size)?);
        Ok(Self {
            blob,
            root,
            feature_flags: parsed.entry.feature_flags,
            tree_id: room.n_trees.fetch_add(1, Ordering::Relaxed),
            room,
            attached: RwLock::default(),
            clock: Clock::default(),
        })
    }

    /// Keeps more, or less, from now on.
    pub fn configure(&self, config: TreeConfig) {
        self.room.nodes.set_max_bytes(config.node_bytes);
        self.room.dirs.set_max_bytes(config.table_bytes);
        self.room.blocks.set_max_bytes(config.table_bytes);
        self.room.listings.set_max_bytes(config.listing_bytes);
        self.room.pinned_bytes.store(config.pinned_bytes / list::MAX_LISTINGS as u64, Ordering::Relaxed);
    }

    /// How many bytes are kept of what was parsed, and how many may be.
    pub fn weight_bytes(&self) -> (usize, usize) {
        let weights = [self.room.nodes.weight(), self.room.dirs.weight(), self.room.listings.weight()];
        weights.iter().fold((0, 0), |(used, max), weight| (used + weight.0, max + weight.1))
    }

    /// The root: a directory, or a file for the single-file archives that desync makes.
    pub fn root(&self) -> &Arc<Node> {
        &self.root
    }

    /// What the archive stores of each file.
    pub fn feature_flags(&self) -> FeatureFlags {
        self.feature_flags
    }

    /// The archive's bytes.
    pub fn blob(&self) -> &Blob {
        &self.blob
    }

    /// The file with an inode number.
    ///
    /// # Errors
    /// There is none, or the archive cannot be read there.
    pub async fn node(&self, ino: u64) -> Result<Arc<Node>, TreeError> {
        if ino == ROOT_INO {
            // Known without asking anybody, and so no use that others would have to wait for.
            return Ok(self.table().map_or_else(|| Arc::clone(&self.root), |table| Arc::clone(&table.root)));
        }
        self.touch();
        if let Some(node) = self.room.nodes.get(&(self.tree_id, ino)) {
            return Ok(node);
        }
        let entry_offset = node::entry_offset_of(ino);
        if let Some(table) = self.table()
            && let Some(found) = self.asked(&table, table.table.node(entry_offset).await)
        {
            return found.map(|node| self.keep(node)).ok_or(TreeError::NotFound);
        }
        self.find_again(entry_offset).await
    }

    /// The file a directory calls `name`; `None` when there is no such name.
    ///
    /// # Errors
    /// `parent` is not a directory, or the archive cannot be read.
    pub async fn lookup(&self, parent: &Arc<Node>, name: &[u8]) -> Result<Option<Arc<Node>>, TreeError> {
        let Content::Directory { end } = parent.content else { return Err(TreeError::NotADirectory) };
        self.touch();
        if let Some(table) = self.table()
            && let Some(found) = self.asked(&table, table.table.lookup(parent.entry_offset, name.to_vec()).await)
        {
            return Ok(found.map(|node| self.keep(node)));
        }
        let hash = catar::name_hash(name);
        let candidates: Vec<Item> = match self.room.dirs.get(&(self.tree_id, parent.entry_offset)) {
            Some(dir) => dir.candidates(hash).copied().collect(),
            None => {
                let span = self.span(parent, end).await?;
                if span.n_bytes > MAX_WHOLE_TABLE_BYTES {
                    dir::search_in_place(&self.blob, span, hash).await?
                } else {
                    self.load_dir(parent, span).await?.candidates(hash).copied().collect()
                }
            }
        };
        for item in candidates {
            // A directory is looked into as the next thing, and that begins at its end.
            if let Some(child) = meanwhile(&self.blob, item.end, self.read_child(parent, &item, None)).await?
                && child.name == name
            {
                return Ok(Some(child.node));
            }
        }
        Ok(None)
    }

    /// The file at a path below a directory. Symlinks in the middle of the path are followed within the tree, and the last
    /// one too when `follow_last` is set.
    ///
    /// # Errors
    /// There is no such file, or the archive cannot be read.
    pub async fn resolve(&self, path: &[u8], follow_last: bool) -> Result<Arc<Node>, TreeError> {
        let mut node = Arc::clone(&self.root);
        let mut above: Vec<Arc<Node>> = Vec::new();
        let mut names: Vec<Vec<u8>> = components(path);
        let mut n_symlinks = 0;
        while let Some(name) = names.pop() {
            match name.as_slice() {
                b"." => continue,
                b".." => {
                    node = above.pop().unwrap_or(node);
                    continue;
                }
                _ => {}
            }
            let child = self.lookup(&node, &name).await?.ok_or(TreeError::NotFound)?;
            match &child.content {
                Content::Symlink(target) if follow_last || !names.is_empty() => {
                    n_symlinks += 1;
                    if n_symlinks > MAX_SYMLINKS {
                        return Err(TreeError::Loop);
                    }
                    if target.starts_with(b"/") {
                        node = Arc::clone(&self.root);
                        above.clear();
                    }
                    names.extend(components(target));
                }
                _ => above.push(std::mem::replace(&mut node, child)),
            }
        }
        Ok(node)
    }

    /// Content of a regular file: `len` bytes from `offset`, fewer only at its end.
    ///
    /// # Errors
    /// The file is not a regular one, or its bytes cannot be had.
    pub async fn read(&self, node: &Node, offset: u64, len: u32) -> Result<Bytes, TreeError> {
        self.touch();
        let confirmed;
        let node = match offset == 0 && self.table().is_some() {
            true => {
                confirmed = self.confirmed(node).await?;
                confirmed.as_deref().unwrap_or(node)
            }
            false => node,
        };
        let Content::File { offset: payload, size } = node.content else { return Err(TreeError::NotFound) };
        let n_bytes = size.saturating_sub(offset).min(u64::from(len));
        if n_bytes == 0 {
            return Ok(Bytes::new());
        }
        let start =
            payload.checked_add(offset).ok_or_else(|| TreeError::Damaged("a file ends past the archive".to_owned()))?;
        Ok(self.blob.read_along(start, n_bytes as usize, payload.saturating_add(size)).await?)
    }

    /// A directory's table.
    async fn dir(&self, node: &Arc<Node>) -> Result<Arc<Dir>, TreeError> {
        let Content::Directory { end } = node.content else { return Err(TreeError::NotADirectory) };
        if let Some(dir) = self.room.dirs.get(&(self.tree_id, node.entry_offset)) {
            return Ok(dir);
        }
        let span = self.span(node, end).await?;
        self.load_dir(node, span).await
    }

    async fn load_dir(&self, node: &Arc<Node>, span: TableSpan) -> Result<Arc<Dir>, TreeError> {
        let dir = Arc::new(Dir::load(&self.blob, Arc::clone(node), span).await?);
        self.room.dirs.put((self.tree_id, node.entry_offset), Arc::clone(&dir), dir.weight_bytes());
        Ok(dir)
    }

    async fn span(&self, node: &Node, end: u64) -> Result<TableSpan, TreeError> {
        let span = TableSpan::read(&self.blob, end).await?;
        if span.entry_offset != node.entry_offset {
            let (wanted, found) = (node.entry_offset, span.entry_offset);
            return Err(TreeError::Damaged(format!(
                "the directory at offset {wanted} ends with the table of the one at offset {found}"
            )));
        }
        Ok(span)
    }

    /// Finds a file by the offset of its ENTRY, from the root down, through the children that contain the offset.
    async fn find_again(&self, entry_offset: u64) -> Result<Arc<Node>, TreeError> {
        let mut node = Arc::clone(&self.root);
        for _ in 0..MAX_DEPTH {
            if !node.is_directory() {
                return Err(TreeError::NotFound);
            }
            let dir = self.dir(&node).await?;
            let item = *dir.containing(entry_offset).ok_or(TreeError::NotFound)?;
            let child = self.read_child(&node, &item, None).await?.ok_or(TreeError::NotFound)?;
            if child.node.entry_offset == entry_offset {
                return Ok(child.node);
            }
            node = child.node;
        }
        Err(TreeError::Damaged("directories are nested too deep".to_owned()))
    }
}

/// Does some work, and has what the node that ends at `end` ends with fetched at the same time. Neither waits for the other.
async fn meanwhile<T>(blob: &Blob, end: u64, work: impl Future<Output = T>) -> T {
    let tail = [end.saturating_sub(Tail::BYTES as u64)];
    let fetching = async {
        // A fetch goes on when nobody waits for it; what cannot be had is an error when it is read.
        drop(blob.pin(&tail, 0).await);
        std::future::pending::<std::convert::Infallible>().await
    };
    tokio::select! {
        biased;
        never = fetching => match never {},
        done = work => done,
    }
}

/// Parses the node at an offset, which ends at `end`, and of which some bytes are at hand; reads more as needed.
async fn read_node(blob: &Blob, entry_offset: u64, end: u64, head: Bytes) -> Result<Box<catar::Node>, TreeError> {
    let mut bytes = head;
    loop {
        let damaged = |error: CatarError| TreeError::Damaged(format!("{error}, in the entry at offset {entry_offset}"));
        match catar::parse_node(&bytes, end.saturating_sub(entry_offset)).map_err(damaged)? {
            NodeParse::Node(node) => return Ok(node),
            NodeParse::Need(n_bytes) => {
                // Given back before more is asked for: it may hold a part of the budget that the next read needs. How much is read
                // is bounded by the parser, whatever the archive says.
                drop(bytes);
                let n_bytes = n_bytes as usize;
                bytes = blob.read_some(entry_offset, n_bytes, n_bytes.max(HEAD_BYTES)).await?;
            }
        }
    }
}

/// The components of a path, last first.
fn components(path: &[u8]) -> Vec<Vec<u8>> {
    path.rsplit(|byte| *byte == b'/').filter(|name| !name.is_empty()).map(<[u8]>::to_vec).collect()
}
