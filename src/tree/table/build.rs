//! A table made by a walk over a tree: every directory is listed, then those below it, in the order of the archive.
//!
//! A directory's records are laid down window by window, and where its subdirectories' children will be is filled in when they are
//! listed; so what is held in memory is one window and one goodbye table, whatever the size of the archive.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::future::BoxFuture;

use super::super::{Content, MAX_DEPTH, Node, Tree, TreeError};
use super::writer::Writer;
use crate::format::catar::node::MODE_DIRECTORY;
use crate::format::catar::{Tail, name_hash};
use crate::format::table::{Children, NameRef, Record};

/// Records read back at once to find the directories among them.
const WINDOW_RECORDS: u32 = 1024;

/// Directories that are fetched together before they are listed one after the other, so that a far store is not asked one by one.
const DIRECTORIES_AHEAD: usize = 16;

/// A directory that is no longer than this in the archive is fetched as a whole: there is little but metadata in it. Of another
/// one, only its end is known to be needed.
const WHOLE_DIRECTORY_BYTES: u64 = 256 << 10;

/// Times that is done for what does not fit into the budget at once.
const MAX_ROUNDS_AHEAD: u32 = 8;

/// Every chunk of the usual size has a place that is a multiple of this, or is fetched a little later.
const STEP_BYTES: usize = 16 << 10;

/// Why no table was made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The archive cannot be read.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// The table cannot be written.
    #[error("cannot write the table: {0}")]
    Write(#[from] io::Error),
    /// It is not wanted any more.
    #[error("given up")]
    GivenUp,
}

/// Asked before each piece of work, with the number of files so far; gives whether to go on, when it is time to.
pub type Pace = Box<dyn Fn(u64) -> BoxFuture<'static, bool> + Send + Sync>;

/// Describes all files of a tree, whose root is a directory, and gives the root's record. The tree should not be the one that others
/// use: what it keeps is of no use to them.
///
/// # Errors
/// The archive cannot be read, the table not be written, or it is not to go on.
pub async fn build(tree: &Tree, mut writer: Writer, pace: &Pace) -> Result<(Writer, Record), BuildError> {
    let root = Arc::clone(tree.root());
    let described = Arc::clone(&root);
    let (writer_back, root_record) = blocking(writer, move |writer| writer.describe(0, b"", &described)).await?;
    writer = writer_back;
    let mut levels: Vec<Level> = Vec::new();
    let mut next = Some((root, root_record.n2));
    loop {
        if let Some((directory, children_at)) = next.take() {
            if levels.len() >= MAX_DEPTH {
                return Err(TreeError::Damaged("directories are nested too deep".to_owned()).into());
            }
            let entry_offset = directory.entry_offset;
            let (writer_back, children) = list(tree, writer, directory, children_at, pace).await?;
            writer = writer_back;
            levels.push(Level { entry_offset, children, n_seen: 0, waiting: VecDeque::new() });
        }
        let Some(level) = levels.last_mut() else { return Ok((writer, root_record)) };
        if let Some(below) = level.waiting.pop_front() {
            next = Some(below);
            if level.waiting.len() % DIRECTORIES_AHEAD == DIRECTORIES_AHEAD - 1 {
                fetch_ahead(tree, &level.waiting).await;
            }
            continue;
        }
        let Level { children, n_seen, entry_offset, .. } = level;
        let n_window = (children.n_children - *n_seen).min(WINDOW_RECORDS);
        if n_window == 0 || children.n_subdirectories == 0 {
            levels.pop();
            continue;
        }
        let (at, parent_offset) = (children.record_at(*n_seen), *entry_offset);
        *n_seen += n_window;
        let read_back = blocking(writer, move |writer| directories(writer, at, n_window, parent_offset));
        let (writer_back, waiting) = read_back.await?;
        writer = writer_back;
        fetch_ahead(tree, &waiting).await;
        level.waiting = waiting;
    }
}

/// A directory that is listed, and those in it that are not yet.
struct Level {
    entry_offset: u64,
    children: Children,
    /// Records read back so far.
    n_seen: u32,
    waiting: VecDeque<(Arc<Node>, u64)>,
}

/// Describes the children of a directory.
async fn list(
    tree: &Tree,
    mut writer: Writer,
    directory: Arc<Node>,
    children_at: u64,
    pace: &Pace,
) -> Result<(Writer, Children), BuildError> {
    let Content::Directory { end } = directory.content else { return Err(TreeError::NotADirectory.into()) };
    let n_items = u32::try_from(tree.n_items(&directory).await?).map_err(io::Error::other)?;
    let (writer_back, records_at) = blocking(writer, move |writer| writer.reserve(n_items)).await?;
    writer = writer_back;
    let mut listing = Listing {
        children: Children { end, records_at, ..Children::default() },
        names: Vec::new(),
        last_name: Vec::new(),
        is_sorted: true,
    };
    let mut from_idx = Some(0);
    while let Some(idx) = from_idx {
        if !pace(writer.n_nodes()).await {
            return Err(BuildError::GivenUp);
        }
        let children = tree.list(&directory, idx).await?;
        from_idx = children.next_idx;
        let (writer_back, listing_back) = blocking(writer, move |writer| {
            let mut records = Vec::with_capacity(children.as_slice().len() * Record::BYTES);
            let at = listing.children.record_at(listing.children.n_children);
            for child in children.as_slice() {
                let idx = u32::try_from(child.next_idx - 1).map_err(io::Error::other)?;
                records.extend_from_slice(&writer.describe(idx, &child.name, &child.node)?.to_bytes());
                listing.add(&child.name, child.node.is_directory());
            }
            writer.fill(at, &records)?;
            Ok(listing)
        })
        .await?;
        (writer, listing) = (writer_back, listing_back);
    }
    let finished = blocking(writer, move |writer| {
        let mut children = listing.children;
        if !listing.is_sorted {
            children.names_at = writer.names(listing.names)?;
        }
        writer.fill(children_at, &children.to_bytes())?;
        Ok(children)
    });
    finished.await
}

/// What is known of a directory while its children are described.
struct Listing {
    children: Children,
    names: Vec<NameRef>,
    last_name: Vec<u8>,
    is_sorted: bool,
}

impl Listing {
    fn add(&mut self, name: &[u8], is_directory: bool) {
        let child = self.children.n_children;
        self.is_sorted &= child == 0 || name > self.last_name.as_slice();
        self.names.push(NameRef { hash: NameRef::half(name_hash(name)), child });
        self.last_name.clear();
        self.last_name.extend_from_slice(name);
        self.children.n_children += 1;
        self.children.n_subdirectories += u32::from(is_directory);
    }
}

/// The directories among some records, as far as listing them needs.
fn directories(
    writer: &mut Writer,
    at: u64,
    n_records: u32,
    parent_offset: u64,
) -> io::Result<VecDeque<(Arc<Node>, u64)>> {
    let mut found = VecDeque::new();
    for record in writer.records(at, n_records)?.into_iter().filter(Record::is_directory) {
        let end = writer.children(record.n2)?.end;
        let node = Node {
            entry_offset: record.entry_offset,
            parent_offset,
            mode: MODE_DIRECTORY,
            uid: 0,
            gid: 0,
            mtime_ns: 0,
            inode_flags: 0,
            xattrs: Box::default(),
            content: Content::Directory { end },
            n_subdirectories: None,
        };
        found.push_back((Arc::new(node), record.n2));
    }
    Ok(found)
}

/// Fetches the next directories, or at least their ends, which are read first of them.
async fn fetch_ahead(tree: &Tree, waiting: &VecDeque<(Arc<Node>, u64)>) {
    let mut offsets = Vec::new();
    for (node, _) in waiting.iter().take(DIRECTORIES_AHEAD) {
        let Content::Directory { end } = node.content else { continue };
        if end.saturating_sub(node.entry_offset) <= WHOLE_DIRECTORY_BYTES {
            offsets.extend((node.entry_offset..end).step_by(STEP_BYTES));
        }
        offsets.push(end.saturating_sub(Tail::BYTES as u64));
    }
    let (mut rest, mut n_rounds) = (offsets.as_slice(), 0);
    let max_bytes = tree.room.pinned_bytes.load(Ordering::Relaxed);
    // What cannot be had is an error when it is read. Few rounds hold what is fetched together, if the budget is not very small.
    while let (Some(_), Ok((_, n))) = (rest.get(1), tree.blob().pin(rest, max_bytes).await) {
        rest = &rest[n..];
        n_rounds += 1;
        if n_rounds == MAX_ROUNDS_AHEAD {
            break;
        }
    }
}

/// Works with the writer on a thread that may wait for the disk.
async fn blocking<T: Send + 'static>(
    mut writer: Writer,
    work: impl FnOnce(&mut Writer) -> io::Result<T> + Send + 'static,
) -> Result<(Writer, T), BuildError> {
    let worked = tokio::task::spawn_blocking(move || work(&mut writer).map(|done| (writer, done)));
    worked.await.unwrap_or_else(|_| Err(io::Error::other("it was given up"))).map_err(BuildError::Write)
}
