//! Going through a whole table: for one that comes from elsewhere, before it is kept.
//!
//! What holds afterwards: every block is what it was when the table was made; files lie within their directories and beside each other;
//! every name can be found, and stands for one file; there are as many files as the table says. What the table says of
//! them is as true as whoever made it: reading a file looks whether it lies where the table says.

use std::cmp::Ordering;

use super::super::{Content, MAX_DEPTH};
use super::blocks::{Fault, Wait};
use super::view::{Found, View};
use super::{Table, TableFault, TreeShape};
use crate::format::catar::name_hash;
use crate::format::table::{Children, NameRef, PROMPT_NAMES};

/// Checks a table. Blocks for as long as that takes: some seconds for a million files.
///
/// # Errors
/// What is wrong with it.
pub fn check(table: &Table) -> Result<(), TableFault> {
    let mut view = table.view(Wait::Allowed);
    let root = view.root()?;
    let (mut n_nodes, mut n_directories, mut n_late) = (1u64, 1u64, 0u64);
    let mut levels = match view.children(&root)? {
        Some(children) => vec![Level::new(root, children)],
        None => return Err(TableFault("its root is not a directory".to_owned())),
    };
    view.node(&root)?;
    while let Some(level) = levels.last_mut() {
        let Some(found) = level.next(&mut view)? else {
            level.check_names(&mut view)?;
            levels.pop();
            continue;
        };
        n_nodes += 1;
        n_late += u64::from(found.record.idx >= PROMPT_NAMES);
        if n_nodes > table.n_nodes() {
            return Err(TableFault("it has more files than it says".to_owned()));
        }
        if let Some(children) = view.children(&found)? {
            n_directories += 1;
            levels.push(Level::new(found, children));
            if levels.len() > MAX_DEPTH {
                return Err(TableFault("directories are nested too deep".to_owned()));
            }
        }
    }
    match (TreeShape { n_nodes, n_directories, n_late }) == table.shape() {
        true => Ok(()),
        false => Err(TableFault("it has not as many files, directories or late names as it says".to_owned())),
    }
}

/// A directory that is gone through.
struct Level {
    above: Found,
    children: Children,
    n_seen: u32,
    n_subdirectories: u32,
    /// Where the space for the next child begins.
    least_offset: u64,
    last_idx: Option<u32>,
    last_name: Vec<u8>,
}

impl Level {
    fn new(above: Found, children: Children) -> Self {
        let least_offset = above.record.entry_offset + 1;
        Self { above, children, n_seen: 0, n_subdirectories: 0, least_offset, last_idx: None, last_name: Vec::new() }
    }

    /// The next child; `None` behind the last.
    fn next(&mut self, view: &mut View<'_>) -> Result<Option<Found>, Fault> {
        if self.n_seen == self.children.n_children {
            return match self.n_subdirectories == self.children.n_subdirectories {
                true => Ok(None),
                false => Fault::damaged("a directory has another number of subdirectories than it says"),
            };
        }
        let found = view.child(&self.above, &self.children, self.n_seen)?;
        let node = view.node(&found)?;
        let name = view.name(&found.record)?;
        if node.entry_offset < self.least_offset {
            return Fault::damaged("files overlap");
        }
        if self.last_idx.is_some_and(|last| found.record.idx <= last) {
            return Fault::damaged("the files of a directory are not in order");
        }
        if self.children.names_at == 0 && self.n_seen > 0 && name.as_ref().cmp(&self.last_name) != Ordering::Greater {
            return Fault::damaged("the names of a directory are not in order");
        }
        self.least_offset = match node.content {
            Content::File { offset, size } => offset + size,
            Content::Directory { end } => end,
            _ => node.entry_offset + 1,
        };
        self.n_subdirectories += u32::from(node.is_directory());
        self.last_idx = Some(found.record.idx);
        self.last_name.clear();
        self.last_name.extend_from_slice(&name);
        self.n_seen += 1;
        Ok(Some(found))
    }

    /// Checks that every child of a directory can be found by its name.
    fn check_names(&self, view: &mut View<'_>) -> Result<(), Fault> {
        if self.children.names_at == 0 {
            return Ok(());
        }
        let mut last = None;
        for n in 0..self.children.n_children {
            let name_ref = NameRef::parse(&view.reader.array(self.children.name_ref_at(n))?);
            // Strictly in order, and each with the hash of its own name: so each child is there once.
            if last.is_some_and(|last| last >= name_ref) || name_ref.child >= self.children.n_children {
                return Fault::damaged("the names of a directory are not in order");
            }
            let record = view.record(self.children.record_at(name_ref.child))?;
            if NameRef::half(name_hash(&view.name(&record)?)) != name_ref.hash {
                return Fault::damaged("a name has the hash of another");
            }
            last = Some(name_ref);
        }
        Ok(())
    }
}
