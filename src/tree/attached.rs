//! The metadata table that a tree answers from, and what becomes of it when it proves wrong.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::table::{KeptBlocks, Table, TableFault, TreeShape, is_same_root};
use super::{Content, Node, Tree, TreeError, ino_of};
use crate::format::catar::{ElementHeader, Kind};

/// What there is of a metadata table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TableState {
    /// Nothing.
    #[default]
    None,
    /// One is being looked for, fetched or checked.
    Sought,
    /// One is being made.
    Building {
        /// Files so far.
        n_nodes: u64,
    },
    /// Metadata is answered from it.
    InUse {
        /// Files in it.
        n_nodes: u64,
    },
}

impl fmt::Display for TableState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Sought => f.write_str("sought"),
            Self::Building { n_nodes } => write!(f, "being made, {n_nodes} files so far"),
            Self::InUse { n_nodes } => write!(f, "in use, {n_nodes} files"),
        }
    }
}

/// The table of a tree.
#[derive(Debug, Default)]
pub(super) struct Attached {
    state: TableState,
    in_use: Option<Arc<InUse>>,
}

/// A table that is answered from.
pub(super) struct InUse {
    pub(super) table: Table,
    pub(super) root: Arc<Node>,
    on_fault: Box<dyn Fn(&TableFault) + Send + Sync>,
}

impl fmt::Debug for InUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InUse").field("table", &self.table).finish_non_exhaustive()
    }
}

/// When something was asked for last.
#[derive(Debug)]
pub(super) struct Clock {
    start: Instant,
    /// Milliseconds from the start.
    last: AtomicU64,
}

impl Default for Clock {
    fn default() -> Self {
        Self { start: Instant::now(), last: AtomicU64::new(0) }
    }
}

impl Clock {
    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl Tree {
    /// Answers from a metadata table from now on, until it proves to be damaged; then `on_fault` is told.
    ///
    /// # Errors
    /// It is damaged, or not the table of this archive.
    pub async fn attach(
        &self,
        table: Table,
        on_fault: impl Fn(&TableFault) + Send + Sync + 'static,
    ) -> Result<(), TableFault> {
        let root = table.root().await?;
        if !is_same_root(&root, self.root()) || table.binding().archive_bytes != self.blob.size() {
            return Err(TableFault("it is the table of another archive".to_owned()));
        }
        let state = TableState::InUse { n_nodes: table.n_nodes() };
        let in_use = InUse { table, root: Arc::new(root), on_fault: Box::new(on_fault) };
        self.write(|attached| *attached = Attached { state, in_use: Some(Arc::new(in_use)) });
        // What was read from the archive before is not needed any more. Files lack the number of their subdirectories.
        self.room.dirs.clear();
        self.room.nodes.clear();
        self.room.listings.clear();
        Ok(())
    }

    /// Answers from the archive from now on.
    pub fn detach(&self) {
        self.write(|attached| *attached = Attached::default());
        self.room.nodes.clear();
        self.room.listings.clear();
    }

    /// What there is of a metadata table.
    pub fn table_state(&self) -> TableState {
        self.attached.read().unwrap_or_else(PoisonError::into_inner).state
    }

    /// Whether the tree answers from a metadata table.
    pub fn has_table(&self) -> bool {
        self.table().is_some()
    }

    /// How files lie in directories. `None` when that is unknown.
    pub fn shape(&self) -> Option<TreeShape> {
        self.table().map(|in_use| in_use.table.shape())
    }

    /// Says how far a table is that is not in use yet.
    pub fn set_table_state(&self, state: TableState) {
        self.write(|attached| {
            if attached.in_use.is_none() {
                attached.state = state;
            }
        });
    }

    /// Where a table keeps some of its content in memory: as much as the goodbye tables have, which are not read while there is one.
    pub fn table_blocks(&self) -> KeptBlocks {
        self.room.blocks.clone()
    }

    /// For how long nobody has asked for anything.
    pub fn idle_for(&self) -> Duration {
        Duration::from_millis(self.clock.now().saturating_sub(self.clock.last.load(Ordering::Relaxed)))
    }

    /// The file as the archive has it, if the metadata table says otherwise where its content lies. Looks at what stands before the content,
    /// mostly in the same chunk. `None` when the table is right, or not in use.
    ///
    /// # Errors
    /// The archive cannot be read.
    pub async fn confirmed(&self, node: &Node) -> Result<Option<Arc<Node>>, TreeError> {
        let (Content::File { offset, size }, Some(table)) = (&node.content, self.table()) else { return Ok(None) };
        let head = match offset.checked_sub(ElementHeader::BYTES as u64) {
            Some(at) => self.blob.read_at(at, ElementHeader::BYTES).await?,
            None => bytes::Bytes::new(),
        };
        let header = head.first_chunk().and_then(|head| ElementHeader::parse(head).ok());
        if header.is_some_and(|header| (header.kind, header.body_bytes()) == (Kind::Payload, *size)) {
            return Ok(None);
        }
        self.fault(&table, &TableFault(format!("no file of {size} bytes lies at offset {offset}")));
        self.node(ino_of(node.entry_offset)).await.map(Some)
    }

    pub(super) fn touch(&self) {
        self.clock.last.store(self.clock.now(), Ordering::Relaxed);
    }

    pub(super) fn table(&self) -> Option<Arc<InUse>> {
        self.attached.read().unwrap_or_else(PoisonError::into_inner).in_use.clone()
    }

    /// What a table answered; `None` when it cannot, and then it is not asked again.
    pub(super) fn asked<T>(&self, table: &Arc<InUse>, answer: Result<T, TableFault>) -> Option<T> {
        answer.map_err(|fault| self.fault(table, &fault)).ok()
    }

    /// Keeps a file that a table has told of.
    pub(super) fn keep(&self, node: Node) -> Arc<Node> {
        let node = Arc::new(node);
        self.room.nodes.put((self.tree_id, node.ino()), Arc::clone(&node), node.weight_bytes());
        node
    }

    fn fault(&self, table: &Arc<InUse>, fault: &TableFault) {
        let is_first = self.write(|attached| {
            let is_current = attached.in_use.as_ref().is_some_and(|current| Arc::ptr_eq(current, table));
            if is_current {
                *attached = Attached::default();
            }
            is_current
        });
        if is_first {
            // Nothing that it said is used any longer.
            self.room.nodes.clear();
            self.room.listings.clear();
            (table.on_fault)(fault);
        }
    }

    fn write<T>(&self, change: impl FnOnce(&mut Attached) -> T) -> T {
        change(&mut self.attached.write().unwrap_or_else(PoisonError::into_inner))
    }
}
