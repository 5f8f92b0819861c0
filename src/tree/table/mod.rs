//! The metadata table of an archive: answers all but content without a look into the archive.
//!
//! * `blocks` reads and checks the content of a table, `view` answers questions with it; [`Table`] does so without waiting for the disk
//!   on a thread that must not.
//! * [`writer`] makes a table; [`build`] by a walk over a tree, [`pack`] while an archive is made.
//! * [`check`] goes through a table that comes from elsewhere.
//!
//! The format is [`crate::format::table`].
//!
//! Invariants: memory for a table does not grow with it; a block is checked each time it comes from the file; a table that is found
//! to be damaged is not asked again, and the archive answers instead.

pub(super) mod blocks;
pub mod build;
pub mod check;
pub mod pack;
mod view;
pub mod writer;

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use super::list::Child;
use super::{Content, Node};
use crate::format::table::{Binding, TAIL_BYTES, Tail};
pub use blocks::KeptBlocks;
use blocks::{Blocks, Fault, Wait};
use view::View;

/// Why a table cannot be used: it is damaged, or not readable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TableFault(pub String);

impl From<Fault> for TableFault {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Damaged(what) => Self(what),
            Fault::WouldWait => Self("its disk does not answer".to_owned()),
        }
    }
}

/// How the files of a tree lie in its directories.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TreeShape {
    /// Files of all types, the root among them.
    pub n_nodes: u64,
    /// How many of them are directories.
    pub n_directories: u64,
    /// How many of them come behind the first [`PROMPT_NAMES`](crate::format::table::PROMPT_NAMES) of their directory.
    pub n_late: u64,
}

/// An open table.
#[derive(Debug, Clone)]
pub struct Table {
    blocks: Arc<Blocks>,
}

impl Table {
    /// Opens a table by its first and last bytes; the time this takes does not depend on its size. `kept_bytes` bounds what is kept of
    /// its content in memory. Blocks.
    ///
    /// # Errors
    /// It is no table, or one that was cut.
    pub fn open(file: File, kept_bytes: usize) -> Result<Self, TableFault> {
        Self::open_in(file, KeptBlocks::new(kept_bytes))
    }

    /// The same, with room that tables share.
    ///
    /// # Errors
    /// Those of [`Table::open`].
    pub fn open_in(file: File, kept: KeptBlocks) -> Result<Self, TableFault> {
        Ok(Self { blocks: Arc::new(Blocks::open(file, kept)?) })
    }

    /// What archive it says it is the table of.
    pub fn binding(&self) -> &Binding {
        &self.blocks.tail.binding
    }

    /// How many files it has, the root among them.
    pub fn n_nodes(&self) -> u64 {
        self.blocks.tail.n_nodes
    }

    /// How they lie in directories.
    pub fn shape(&self) -> TreeShape {
        let Tail { n_nodes, n_directories, n_late, .. } = self.blocks.tail;
        TreeShape { n_nodes, n_directories, n_late }
    }

    /// Of how many blocks its content is.
    pub fn n_blocks(&self) -> u64 {
        self.blocks.tail.n_blocks()
    }

    /// The same table, of which as much is kept in memory as there is room.
    ///
    /// # Errors
    /// It cannot be read any more.
    pub fn with_kept(&self, kept: &KeptBlocks) -> Result<Self, TableFault> {
        let file = self.blocks.file().map_err(|error| TableFault(error.to_string()))?;
        Self::open_in(file, kept.clone())
    }

    /// The root.
    pub(super) async fn root(&self) -> Result<Node, TableFault> {
        let root = self.ask(|view| {
            let found = view.root()?;
            view.node(&found)
        });
        root.await
    }

    /// The file whose ENTRY lies at an offset.
    pub(super) async fn node(&self, entry_offset: u64) -> Result<Option<Node>, TableFault> {
        let node = self.ask(move |view| match view.find(entry_offset)? {
            Some(found) => view.node(&found).map(Some),
            None => Ok(None),
        });
        node.await
    }

    /// The file that the directory at an offset calls `name`.
    pub(super) async fn lookup(&self, directory: u64, name: Vec<u8>) -> Result<Option<Node>, TableFault> {
        let node = self.ask(move |view| {
            let Some(above) = view.find(directory)? else { return Fault::damaged("a directory is missing") };
            match view.by_name(&above, &name)? {
                Some(found) => view.node(&found).map(Some),
                None => Ok(None),
            }
        });
        node.await
    }

    /// The children of the directory at an offset whose places in it are in a range, and the place of the first one behind them.
    pub(super) async fn list(
        &self,
        directory: u64,
        places: Range<u64>,
    ) -> Result<(Vec<Child>, Option<u64>), TableFault> {
        let listed = self.ask(move |view| {
            let Some(above) = view.find(directory)? else { return Fault::damaged("a directory is missing") };
            view.list(&above, places.clone())
        });
        listed.await
    }

    fn view(&self, wait: Wait) -> View<'_> {
        View { reader: self.blocks.reader(wait), tail: &self.blocks.tail }
    }

    /// Answers on the spot what needs no waiting for the disk, and the rest on a thread that may wait.
    async fn ask<T: Send + 'static>(
        &self,
        question: impl Fn(&mut View<'_>) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, TableFault> {
        match question(&mut self.view(Wait::Never)) {
            Err(Fault::WouldWait) => {}
            answer => return Ok(answer?),
        }
        let table = self.clone();
        let asked = tokio::task::spawn_blocking(move || question(&mut table.view(Wait::Allowed)));
        match asked.await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(TableFault("it was given up".to_owned())),
        }
    }
}

/// Reads the tail of a table that is `file_bytes` long.
///
/// # Errors
/// It is none.
pub fn parse_tail(bytes: &[u8; TAIL_BYTES], file_bytes: u64) -> Result<Tail, TableFault> {
    Tail::parse(bytes, file_bytes, blocks::tail_checksum).map_err(|error| TableFault(error.0.to_owned()))
}

/// Whether a table's root is the one that the archive has.
pub(super) fn is_same_root(of_table: &Node, of_archive: &Node) -> bool {
    let Node { mode, uid, gid, mtime_ns, inode_flags, xattrs, content, .. } = of_archive;
    let is_directory = matches!(content, Content::Directory { .. });
    is_directory
        && (of_table.mode, of_table.uid, of_table.gid, of_table.mtime_ns) == (*mode, *uid, *gid, *mtime_ns)
        && of_table.inode_flags == *inode_flags
        && of_table.xattrs == *xattrs
        && of_table.content == *content
}
