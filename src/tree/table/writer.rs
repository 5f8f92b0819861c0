//! Making a table: the content goes into a plain file first, in any order and with places filled in later, and from there, compressed
//! block by block, into the table.
//!
//! [`Writer`] lays down names, records and what they point to; [`Writer::seal`] makes the table of it.
//!
//! Invariant: memory does not grow with the table, but by the 16 bytes of each block's reference.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use super::super::{Content, Node};
use super::blocks::{block_checksum, tail_checksum};
use crate::chunk::codec;
use crate::digest::Digest;
use crate::format::table::{
    BLOCK_BYTES, Binding, BlockRef, Children, Extra, MAGIC, MAX_CONTENT_BYTES, NameRef, PROMPT_NAMES, Record, Tail,
};

/// Written at once to the plain file, in bytes.
const PIECE_BYTES: usize = 256 << 10;

/// Sets of attributes remembered, so that files with the same share one; when there are more, it begins anew.
const MAX_REMEMBERED: usize = 16 << 10;

/// The compression of blocks: as fast as the disk, and a table is a fifth of its content already.
const LEVEL: i32 = 3;

/// Asked before the plain file grows by so many bytes.
pub type Room = Box<dyn FnMut(u64) -> io::Result<()> + Send>;

/// Makes a table.
pub struct Writer {
    plain: File,
    room: Room,
    /// What comes behind what is in the file.
    pending: Vec<u8>,
    pending_at: u64,
    /// Places of attributes, by their digest.
    extras: HashMap<[u8; 32], u64>,
    n_nodes: u64,
    n_directories: u64,
    n_late: u64,
}

impl Writer {
    /// Begins a table. `plain` is an empty file, open for reading and writing, that is not needed any more in the end.
    pub fn new(plain: File, room: Room) -> Self {
        // The first bytes are left free, so that no place is 0, which means "none".
        let pending = vec![0; 8];
        Self { plain, room, pending, pending_at: 0, extras: HashMap::new(), n_nodes: 0, n_directories: 0, n_late: 0 }
    }

    /// Files so far.
    pub fn n_nodes(&self) -> u64 {
        self.n_nodes
    }

    /// Puts bytes behind all others and gives their place.
    fn append(&mut self, bytes: &[u8]) -> io::Result<u64> {
        let at = self.end();
        if at + bytes.len() as u64 > MAX_CONTENT_BYTES {
            return Err(io::Error::other("a table of that size is not made"));
        }
        self.pending.extend_from_slice(bytes);
        if self.pending.len() >= PIECE_BYTES {
            self.flush()?;
        }
        Ok(at)
    }

    fn end(&self) -> u64 {
        self.pending_at + self.pending.len() as u64
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        (self.room)(self.pending.len() as u64)?;
        self.plain.write_all_at(&self.pending, self.pending_at)?;
        self.pending_at += self.pending.len() as u64;
        self.pending.clear();
        Ok(())
    }

    /// Leaves room for records.
    pub(super) fn reserve(&mut self, n_records: u32) -> io::Result<u64> {
        let n_bytes = u64::from(n_records) * Record::BYTES as u64;
        if n_bytes <= PIECE_BYTES as u64 {
            return self.append(&vec![0; n_bytes as usize]);
        }
        self.flush()?;
        (self.room)(n_bytes)?;
        let at = self.pending_at;
        self.pending_at += n_bytes;
        if self.pending_at > MAX_CONTENT_BYTES {
            return Err(io::Error::other("a table of that size is not made"));
        }
        Ok(at)
    }

    /// Fills in a place that was left free; it lies within one piece.
    pub(super) fn fill(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        match at.checked_sub(self.pending_at) {
            Some(start) => {
                let start = start as usize;
                let place = self.pending.get_mut(start..start + bytes.len());
                place.ok_or_else(|| io::Error::other("a place outside of the table"))?.copy_from_slice(bytes);
                Ok(())
            }
            None => self.plain.write_all_at(bytes, at),
        }
    }

    /// Records that were written before.
    pub(super) fn records(&mut self, at: u64, n_records: u32) -> io::Result<Vec<Record>> {
        let mut bytes = vec![0; n_records as usize * Record::BYTES];
        if at + bytes.len() as u64 > self.pending_at {
            self.flush()?;
        }
        self.plain.read_exact_at(&mut bytes, at)?;
        Ok(bytes.as_chunks::<{ Record::BYTES }>().0.iter().map(Record::parse).collect())
    }

    /// What was written of a directory.
    pub(super) fn children(&mut self, at: u64) -> io::Result<Children> {
        if at + Children::BYTES as u64 > self.pending_at {
            self.flush()?;
        }
        let mut bytes = [0; Children::BYTES];
        self.plain.read_exact_at(&mut bytes, at)?;
        Children::parse(&bytes).map_err(io::Error::other)
    }

    /// Lays down what a record points to, and gives the record. That of a directory leads to a place for its children.
    pub(super) fn describe(&mut self, idx: u32, name: &[u8], node: &Node) -> io::Result<Record> {
        let wrong = |what| io::Error::other(format!("{what} of the entry at offset {}", node.entry_offset));
        let name_at = self.append(name)?;
        let (n1, n2) = match &node.content {
            Content::File { offset, size } => {
                let head_bytes = offset.checked_sub(node.entry_offset).and_then(|n| u32::try_from(n).ok());
                (head_bytes.ok_or_else(|| wrong("the metadata is too long"))?, *size)
            }
            Content::Symlink(target) => (target.len() as u32, self.append(target)?),
            Content::Device { major, minor } => (*major, u64::from(*minor)),
            Content::Directory { end } => {
                let children = Children { end: *end, ..Children::default() };
                (0, self.append(&children.to_bytes())?)
            }
            Content::Nothing => (0, 0),
        };
        let mode = u16::try_from(node.mode).map_err(|_| wrong("the mode"))?;
        let name_bytes = u16::try_from(name.len()).map_err(|_| wrong("the name"))?;
        let Node { entry_offset, mtime_ns, uid, gid, .. } = *node;
        let extra_at = self.extra(node)?;
        self.n_nodes += 1;
        self.n_directories += u64::from(node.is_directory());
        self.n_late += u64::from(idx >= PROMPT_NAMES);
        Ok(Record { entry_offset, mtime_ns, name_at, name_bytes, extra_at, mode, uid, gid, idx, n1, n2 })
    }

    fn extra(&mut self, node: &Node) -> io::Result<u64> {
        if node.inode_flags == 0 && node.xattrs.is_empty() {
            return Ok(0);
        }
        let xattrs = node.xattrs.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
        let bytes = Extra { inode_flags: node.inode_flags, xattrs }.to_bytes();
        let digest = Digest::Sha256.id(&bytes).0;
        if let Some(at) = self.extras.get(&digest) {
            return Ok(*at);
        }
        if self.extras.len() >= MAX_REMEMBERED {
            self.extras.clear();
        }
        let at = self.append(&bytes)?;
        self.extras.insert(digest, at);
        Ok(at)
    }

    /// Lays down names by hash, and gives their place.
    pub(super) fn names(&mut self, mut names: Vec<NameRef>) -> io::Result<u64> {
        names.sort_unstable();
        let at = self.end();
        for names in names.chunks(PIECE_BYTES / NameRef::BYTES) {
            let bytes: Vec<u8> = names.iter().flat_map(NameRef::to_bytes).collect();
            self.append(&bytes)?;
        }
        Ok(at)
    }

    /// Puts records side by side, and gives the place of the first.
    pub(super) fn put_records(&mut self, records: &[[u8; Record::BYTES]]) -> io::Result<u64> {
        let at = self.end();
        for records in records.chunks(PIECE_BYTES / Record::BYTES) {
            self.append(records.as_flattened())?;
        }
        Ok(at)
    }

    /// Makes the table of all that was laid down, and writes it to `out`.
    ///
    /// # Errors
    /// The plain file cannot be read, or `out` not be written.
    pub fn seal(mut self, root: &Record, binding: Binding, out: &mut dyn Write) -> io::Result<()> {
        let root_at = self.append(&root.to_bytes())?;
        self.flush()?;
        let content_bytes = self.pending_at;
        let (mut at, mut refs) = (MAGIC.len() as u64, Vec::new());
        let Self { n_nodes, n_directories, n_late, .. } = self;
        let mut tail = Tail { binding, content_bytes, n_nodes, n_directories, n_late, root_at, refs_at: 0 };
        out.write_all(MAGIC)?;
        let mut block = vec![0; BLOCK_BYTES];
        for block_idx in 0..tail.n_blocks() {
            let plain = &mut block[..tail.block_bytes(block_idx)];
            self.plain.read_exact_at(plain, block_idx * BLOCK_BYTES as u64)?;
            let packed = codec::encode(plain, LEVEL);
            let stored = if packed.len() < plain.len() { packed.as_slice() } else { &*plain };
            out.write_all(stored)?;
            let checksum = block_checksum(&tail.binding.digest, block_idx, plain);
            // A block has 32 KiB at the most.
            refs.extend_from_slice(&BlockRef { at, n_bytes: stored.len() as u16, checksum }.to_bytes());
            at += stored.len() as u64;
        }
        tail.refs_at = at;
        let end = tail.to_bytes(tail_checksum);
        out.write_all(&refs)?;
        out.write_all(&end)
    }
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer")
            .field("plain", &self.plain)
            .field("end", &self.end())
            .field("n_nodes", &self.n_nodes)
            .finish_non_exhaustive()
    }
}
