//! A table made while its archive is made: told of every node as it is encoded, so that nothing is read again.
//!
//! Memory grows with the number of files in the directories that are open at a time, as in packing itself: 56 bytes a file.

use std::io::{self, Write};

use super::super::Node;
use super::writer::Writer;
use crate::format::catar::{self, ElementHeader, Kind, NodeParse, Tail};
use crate::format::table::{Binding, Children, Record};

/// Makes a table of an archive that is being written.
#[derive(Debug)]
pub struct TablePacker {
    writer: Writer,
    open: Vec<OpenDirectory>,
    root: Option<Record>,
}

#[derive(Debug)]
struct OpenDirectory {
    record: Record,
    records: Vec<[u8; Record::BYTES]>,
    n_subdirectories: u32,
}

impl TablePacker {
    /// Begins a table.
    pub fn new(writer: Writer) -> Self {
        Self { writer, open: Vec::new(), root: None }
    }

    /// Hears of the next node: its name (none for the root), where its ENTRY lies, and its bytes from there up to where its content
    /// begins, the headers of a payload or the whole of a symlink or device among them.
    ///
    /// # Errors
    /// The table cannot be written, or the bytes are no node.
    pub fn node(&mut self, name: Option<&[u8]>, entry_offset: u64, head: &[u8]) -> io::Result<()> {
        let node = parse(head, entry_offset, self.open.last().map_or(0, |above| above.record.entry_offset))?;
        let idx = self.open.last().map_or(0, |above| above.records.len());
        let idx = u32::try_from(idx).map_err(io::Error::other)?;
        let record = self.writer.describe(idx, name.unwrap_or_default(), &node)?;
        if node.is_directory() {
            self.open.push(OpenDirectory { record, records: Vec::new(), n_subdirectories: 0 });
        } else {
            self.close(record);
        }
        Ok(())
    }

    /// Hears that the directory that is open ends at an offset, its table included.
    ///
    /// # Errors
    /// The table cannot be written.
    pub fn end_directory(&mut self, end: u64) -> io::Result<()> {
        let Some(directory) = self.open.pop() else { return Err(io::Error::other("no directory is open")) };
        let OpenDirectory { record, records, n_subdirectories } = directory;
        let n_children = u32::try_from(records.len()).map_err(io::Error::other)?;
        let records_at = self.writer.put_records(&records)?;
        // The encoder takes names in their order only.
        let children = Children { end, records_at, names_at: 0, n_children, n_subdirectories };
        self.writer.fill(record.n2, &children.to_bytes())?;
        self.close(record);
        Ok(())
    }

    /// Writes all that it holds back to the plain file.
    ///
    /// # Errors
    /// The table cannot be written.
    pub fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }

    /// Makes the table, when the archive is complete.
    ///
    /// # Errors
    /// The table cannot be written, or the root is not a directory.
    pub fn finish(self, binding: Binding, out: &mut dyn Write) -> io::Result<()> {
        let root = self.root.filter(|root| self.open.is_empty() && root.is_directory());
        let root = root.ok_or_else(|| io::Error::other("the archive is not complete"))?;
        self.writer.seal(&root, binding, out)
    }

    /// Adds a node that is complete to the directory above.
    fn close(&mut self, record: Record) {
        match self.open.last_mut() {
            Some(above) => {
                above.n_subdirectories += u32::from(record.is_directory());
                above.records.push(record.to_bytes());
            }
            None => self.root = Some(record),
        }
    }
}

/// What a reader of the archive will find.
fn parse(head: &[u8], entry_offset: u64, parent_offset: u64) -> io::Result<Node> {
    // Behind the metadata of a directory comes a FILENAME or GOODBYE, which is not encoded yet; behind a FIFO or socket there is nothing,
    // and behind a payload's header its bytes, of which the parser need not know.
    let least = ElementHeader { size: (ElementHeader::BYTES + Tail::BYTES) as u64, kind: Kind::Goodbye }.to_bytes();
    let mut bytes = head.to_vec();
    let n_bytes = bytes.len() as u64;
    let parsed = match catar::parse_node(&bytes, n_bytes) {
        Ok(NodeParse::Node(node)) => Ok(node),
        _ => {
            bytes.extend_from_slice(&least);
            match catar::parse_node(&bytes, u64::MAX) {
                Ok(NodeParse::Node(node)) => Ok(node),
                Ok(NodeParse::Need(_)) => Err(io::Error::other("a node is cut off")),
                Err(error) => Err(io::Error::other(error)),
            }
        }
    };
    Node::new(&*parsed?, entry_offset, parent_offset, u64::MAX).map_err(io::Error::other)
}
