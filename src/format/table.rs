//! The metadata table of an archive: what its files are and where they lie, without their content.
//!
//! ```text
//! file     = magic, blocks, one BlockRef for each block, tail
//! blocks   = the content in pieces of BLOCK_BYTES (the last is shorter), each a zstd frame, or as it is when that is not shorter
//! content  = 8 zero bytes, then records, names, and what records point to, at any place
//! tail     = the last TAIL_BYTES: what archive it is, where the root's record and the BlockRefs are, a checksum
//! ```
//!
//! The content is addressed by its plain offsets. The children of a directory are [`Record`]s side by side in the order of the archive,
//! and the directory's own record leads to them through a [`Children`]; so a file is found by its offset by searching one
//! group after the other from the root down. Names stand apart from records; in a directory whose names are not in the order of the
//! archive, [`NameRef`]s ordered by hash stand beside. Attributes that few files have are a [`Extra`], one for all files with the same.
//!
//! All numbers are little-endian, nothing is aligned. Everything here is a total function on bytes, and whoever reads checks each place
//! against the content's length. A checksum of each block tells accidents; that a table is the one of an archive follows from its
//! [`Binding`], and is only as true as whoever wrote it.

use crate::format::catar::node::{MODE_DIRECTORY, MODE_TYPE};

/// First bytes of a table, and of its tail; the digit is the version of the format.
pub const MAGIC: &[u8; 8] = b"caifs-m3";

/// Bytes of content in a block. Smaller ones compress worse; larger ones make a look-up read more.
pub const BLOCK_BYTES: usize = 32 << 10;

/// Bytes at the end of a table that tell the rest.
pub const TAIL_BYTES: usize = 128;

/// Names of a directory that are not late ones ([`Tail::n_late`]).
pub const PROMPT_NAMES: u32 = 200;

/// Offsets in the content have so many bits.
const PLACE_BITS: u32 = 48;

/// The longest content, in bytes: far more than the largest archive that fits its indexes has.
pub const MAX_CONTENT_BYTES: u64 = 1 << 40;

/// The most children of one directory that is looked at, as in an archive's own tables.
pub const MAX_CHILDREN: u32 = 12_000_000;

/// The most bytes that the extended attributes of one file may have, names and values.
pub const MAX_EXTRA_BYTES: u32 = 32 << 20;

/// What archive a table belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Binding {
    /// Length of the archive in bytes.
    pub archive_bytes: u64,
    /// What is digested.
    pub kind: BindingKind,
    /// SHA-256.
    pub digest: [u8; 32],
}

/// What the digest of a [`Binding`] is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BindingKind {
    /// All bytes of the archive's index.
    Index,
    /// The first and the last bytes of a plain archive, which is also told by its time.
    Plain {
        /// When the archive was modified: seconds since 1970.
        mtime_s: i64,
        /// Nanoseconds of the second; 0 where the place does not tell.
        mtime_nsec: u32,
    },
}

impl Binding {
    /// Whether a table with this binding, as it was written where the archive was made, is the one of the archive that is at hand. A
    /// place that tells whole seconds only agrees with any part of the second.
    pub fn covers(&self, at_hand: &Self) -> bool {
        let is_same_time = match (self.kind, at_hand.kind) {
            (BindingKind::Index, BindingKind::Index) => true,
            (
                BindingKind::Plain { mtime_s: one_s, mtime_nsec: one_nsec },
                BindingKind::Plain { mtime_s: other_s, mtime_nsec: other_nsec },
            ) => one_s == other_s && (one_nsec == other_nsec || other_nsec == 0),
            _ => false,
        };
        is_same_time && self.archive_bytes == at_hand.archive_bytes && self.digest == at_hand.digest
    }
}

/// The end of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tail {
    /// What archive it is the table of.
    pub binding: Binding,
    /// Bytes of content.
    pub content_bytes: u64,
    /// Files, the root among them.
    pub n_nodes: u64,
    /// How many of them are directories.
    pub n_directories: u64,
    /// How many of them come behind the first [`PROMPT_NAMES`] of their directory: what large directories have.
    pub n_late: u64,
    /// Where the root's record is, in the content.
    pub root_at: u64,
    /// Where the first [`BlockRef`] is, in the file.
    pub refs_at: u64,
}

/// Why bytes are not a metadata table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the metadata table is damaged: {0}")]
pub struct TableError(pub &'static str);

impl Tail {
    /// The bytes of the tail. `checksum` makes the checksum of bytes.
    pub fn to_bytes(&self, checksum: impl Fn(&[u8]) -> u64) -> [u8; TAIL_BYTES] {
        let (kind, mtime_s, mtime_nsec) = match self.binding.kind {
            BindingKind::Index => (1u32, 0, 0),
            BindingKind::Plain { mtime_s, mtime_nsec } => (2, mtime_s, mtime_nsec),
        };
        let mut bytes = [0; TAIL_BYTES];
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, 8, &kind.to_le_bytes());
        put(&mut bytes, 12, &(BLOCK_BYTES as u32).to_le_bytes());
        put(&mut bytes, 16, &self.binding.digest);
        put(&mut bytes, 48, &self.binding.archive_bytes.to_le_bytes());
        put(&mut bytes, 56, &mtime_s.to_le_bytes());
        put(&mut bytes, 64, &mtime_nsec.to_le_bytes());
        put(&mut bytes, 72, &self.content_bytes.to_le_bytes());
        put(&mut bytes, 80, &self.n_nodes.to_le_bytes());
        put(&mut bytes, 88, &self.root_at.to_le_bytes());
        put(&mut bytes, 96, &self.refs_at.to_le_bytes());
        put(&mut bytes, 104, &self.n_directories.to_le_bytes());
        put(&mut bytes, 112, &self.n_late.to_le_bytes());
        let sum = checksum(&bytes[..TAIL_BYTES - 8]);
        put(&mut bytes, TAIL_BYTES - 8, &sum.to_le_bytes());
        bytes
    }

    /// Reads the tail of a table that is `file_bytes` long.
    ///
    /// # Errors
    /// They are not the tail of a table, or of one of another version or length.
    pub fn parse(
        bytes: &[u8; TAIL_BYTES],
        file_bytes: u64,
        checksum: impl Fn(&[u8]) -> u64,
    ) -> Result<Self, TableError> {
        let damaged = |what| Err(TableError(what));
        if !bytes.starts_with(MAGIC) {
            return damaged("it is none, or of another version");
        }
        if u64_at(bytes, TAIL_BYTES - 8) != checksum(&bytes[..TAIL_BYTES - 8]) {
            return damaged("its tail has a wrong checksum");
        }
        let kind = match u32_at(bytes, 8) {
            1 => BindingKind::Index,
            2 => BindingKind::Plain { mtime_s: u64_at(bytes, 56) as i64, mtime_nsec: u32_at(bytes, 64) },
            _ => return damaged("it is bound to something unknown"),
        };
        if u32_at(bytes, 12) != BLOCK_BYTES as u32 {
            return damaged("its blocks are of another size");
        }
        let digest = bytes[16..].first_chunk::<32>().copied().unwrap_or_default();
        let tail = Self {
            binding: Binding { archive_bytes: u64_at(bytes, 48), kind, digest },
            content_bytes: u64_at(bytes, 72),
            n_nodes: u64_at(bytes, 80),
            root_at: u64_at(bytes, 88),
            refs_at: u64_at(bytes, 96),
            n_directories: u64_at(bytes, 104),
            n_late: u64_at(bytes, 112),
        };
        if tail.n_directories > tail.n_nodes || tail.n_late > tail.n_nodes {
            return damaged("it has more directories or late names than files");
        }
        if tail.content_bytes > MAX_CONTENT_BYTES || tail.root_at >= tail.content_bytes {
            return damaged("its content is too long or lacks the root");
        }
        let refs_bytes = tail.n_blocks() * BlockRef::BYTES as u64;
        let is_whole = tail.refs_at.checked_add(refs_bytes + TAIL_BYTES as u64) == Some(file_bytes);
        match is_whole && tail.refs_at >= MAGIC.len() as u64 {
            true => Ok(tail),
            false => damaged("it is not as long as it says"),
        }
    }

    /// Blocks of the table.
    pub fn n_blocks(&self) -> u64 {
        self.content_bytes.div_ceil(BLOCK_BYTES as u64)
    }

    /// Plain bytes of a block.
    pub fn block_bytes(&self, block_idx: u64) -> usize {
        let start = block_idx.saturating_mul(BLOCK_BYTES as u64);
        self.content_bytes.saturating_sub(start).min(BLOCK_BYTES as u64) as usize
    }
}

/// Where a block is in the file, and the checksum of its plain bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRef {
    /// Offset in the file.
    pub at: u64,
    /// Bytes in the file: those of the content for a block that is stored as it is.
    pub n_bytes: u16,
    /// Checksum of the plain bytes.
    pub checksum: u64,
}

impl BlockRef {
    /// Bytes of a reference.
    pub const BYTES: usize = 16;

    /// The bytes of the reference.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        put(&mut bytes, 0, &pack(self.at, self.n_bytes).to_le_bytes());
        put(&mut bytes, 8, &self.checksum.to_le_bytes());
        bytes
    }

    /// Reads a reference, which any bytes are.
    pub fn parse(bytes: &[u8; Self::BYTES]) -> Self {
        let (at, n_bytes) = unpack(u64_at(bytes, 0));
        Self { at, n_bytes, checksum: u64_at(bytes, 8) }
    }
}

/// A file. What `n1` and `n2` are depends on its type.
///
/// | type | `n1` | `n2` |
/// |---|---|---|
/// | regular file | from the ENTRY to the payload | bytes of content |
/// | symlink | bytes of the target | place of the target |
/// | device | major number | minor number |
/// | directory | 0 | place of its [`Children`] |
/// | other | 0 | 0 |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Record {
    /// Where its ENTRY lies in the archive.
    pub entry_offset: u64,
    /// Modification time in nanoseconds since the epoch.
    pub mtime_ns: i64,
    /// Place of the name in the content.
    pub name_at: u64,
    /// Bytes of the name.
    pub name_bytes: u16,
    /// Place of the [`Extra`], 0 for none.
    pub extra_at: u64,
    /// st_mode.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Its place in the directory, by which listings go on. Names without a file leave gaps.
    pub idx: u32,
    /// See above.
    pub n1: u32,
    /// See above.
    pub n2: u64,
}

impl Record {
    /// Bytes of a record.
    pub const BYTES: usize = 56;

    /// The bytes of the record.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        put(&mut bytes, 0, &self.entry_offset.to_le_bytes());
        put(&mut bytes, 8, &self.mtime_ns.to_le_bytes());
        put(&mut bytes, 16, &pack(self.name_at, self.name_bytes).to_le_bytes());
        put(&mut bytes, 24, &pack(self.extra_at, self.mode).to_le_bytes());
        put(&mut bytes, 32, &self.uid.to_le_bytes());
        put(&mut bytes, 36, &self.gid.to_le_bytes());
        put(&mut bytes, 40, &self.idx.to_le_bytes());
        put(&mut bytes, 44, &self.n1.to_le_bytes());
        put(&mut bytes, 48, &self.n2.to_le_bytes());
        bytes
    }

    /// Reads a record, which any bytes are.
    pub fn parse(bytes: &[u8; Self::BYTES]) -> Self {
        let (name_at, name_bytes) = unpack(u64_at(bytes, 16));
        let (extra_at, mode) = unpack(u64_at(bytes, 24));
        Self {
            entry_offset: u64_at(bytes, 0),
            mtime_ns: u64_at(bytes, 8) as i64,
            name_at,
            name_bytes,
            extra_at,
            mode,
            uid: u32_at(bytes, 32),
            gid: u32_at(bytes, 36),
            idx: u32_at(bytes, 40),
            n1: u32_at(bytes, 44),
            n2: u64_at(bytes, 48),
        }
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        u32::from(self.mode) & MODE_TYPE == MODE_DIRECTORY
    }
}

/// What a directory has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Children {
    /// Where the directory's node ends in the archive.
    pub end: u64,
    /// Place of the first child's record; the others follow.
    pub records_at: u64,
    /// Place of the [`NameRef`]s, one for each child; 0 when the children are ordered by name.
    pub names_at: u64,
    /// How many children.
    pub n_children: u32,
    /// How many of them are directories.
    pub n_subdirectories: u32,
}

impl Children {
    /// Bytes of it.
    pub const BYTES: usize = 32;

    /// The bytes.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        put(&mut bytes, 0, &self.end.to_le_bytes());
        put(&mut bytes, 8, &self.records_at.to_le_bytes());
        put(&mut bytes, 16, &self.names_at.to_le_bytes());
        put(&mut bytes, 24, &self.n_children.to_le_bytes());
        put(&mut bytes, 28, &self.n_subdirectories.to_le_bytes());
        bytes
    }

    /// Reads it.
    ///
    /// # Errors
    /// There are more children than a directory may have.
    pub fn parse(bytes: &[u8; Self::BYTES]) -> Result<Self, TableError> {
        let children = Self {
            end: u64_at(bytes, 0),
            records_at: u64_at(bytes, 8),
            names_at: u64_at(bytes, 16),
            n_children: u32_at(bytes, 24),
            n_subdirectories: u32_at(bytes, 28),
        };
        match children.n_children <= MAX_CHILDREN && children.n_subdirectories <= children.n_children {
            true => Ok(children),
            false => Err(TableError("a directory has more children than there can be")),
        }
    }

    /// Place of the record of child `n`; saturates where no content can reach.
    pub fn record_at(&self, n: u32) -> u64 {
        self.records_at.saturating_add(u64::from(n) * Record::BYTES as u64)
    }

    /// Place of the `n`th [`NameRef`].
    pub fn name_ref_at(&self, n: u32) -> u64 {
        self.names_at.saturating_add(u64::from(n) * NameRef::BYTES as u64)
    }
}

/// A name in the order of hashes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct NameRef {
    /// High half of the name's hash in the archive.
    pub hash: u32,
    /// Which child of the directory has it.
    pub child: u32,
}

impl NameRef {
    /// Bytes of it.
    pub const BYTES: usize = 8;

    /// The high half of a hash.
    pub fn half(hash: u64) -> u32 {
        (hash >> 32) as u32
    }

    /// The bytes.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        put(&mut bytes, 0, &self.hash.to_le_bytes());
        put(&mut bytes, 4, &self.child.to_le_bytes());
        bytes
    }

    /// Reads it, which any bytes are.
    pub fn parse(bytes: &[u8; Self::BYTES]) -> Self {
        Self { hash: u32_at(bytes, 0), child: u32_at(bytes, 4) }
    }
}

/// Name and value of an extended attribute, where they lie.
pub type XattrRef<'a> = (&'a [u8], &'a [u8]);

/// Attributes that few files have: chattr flags, and extended attributes by name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Extra {
    /// chattr flags as `FS_IOC_GETFLAGS` shows them.
    pub inode_flags: u32,
    /// Extended attributes, name and value.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Extra {
    /// Bytes before the attributes: flags, and how many bytes follow.
    pub const HEAD_BYTES: usize = 8;

    /// The bytes: head, then for each attribute the lengths of name (2 bytes) and value (4 bytes), name, value.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut body = Vec::new();
        for (name, value) in &self.xattrs {
            body.extend_from_slice(&(name.len() as u16).to_le_bytes());
            body.extend_from_slice(&(value.len() as u32).to_le_bytes());
            body.extend_from_slice(name);
            body.extend_from_slice(value);
        }
        let mut bytes = Vec::with_capacity(Self::HEAD_BYTES + body.len());
        bytes.extend_from_slice(&self.inode_flags.to_le_bytes());
        bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&body);
        bytes
    }

    /// Flags, and how many bytes are behind the head.
    ///
    /// # Errors
    /// More than a file may have.
    pub fn parse_head(head: &[u8; Self::HEAD_BYTES]) -> Result<(u32, usize), TableError> {
        match u32_at(head, 4) {
            n_bytes if n_bytes <= MAX_EXTRA_BYTES => Ok((u32_at(head, 0), n_bytes as usize)),
            _ => Err(TableError("a file has more extended attributes than there can be")),
        }
    }

    /// The attributes behind a head: name and value of each, as parts of `body`.
    ///
    /// # Errors
    /// They do not fill the body exactly.
    pub fn parse_body(body: &[u8]) -> Result<Vec<XattrRef<'_>>, TableError> {
        const DAMAGED: TableError = TableError("the extended attributes of a file are cut off");
        let mut xattrs = Vec::new();
        let mut rest = body;
        while !rest.is_empty() {
            let (head, after) = rest.split_first_chunk::<6>().ok_or(DAMAGED)?;
            let name_bytes = usize::from(u16::from_le_bytes([head[0], head[1]]));
            let value_bytes = u32_at(head, 2) as usize;
            let (name, after) = after.split_at_checked(name_bytes).ok_or(DAMAGED)?;
            let (value, after) = after.split_at_checked(value_bytes).ok_or(DAMAGED)?;
            xattrs.push((name, value));
            rest = after;
        }
        Ok(xattrs)
    }
}

/// A place and a small number in one.
fn pack(place: u64, small: u16) -> u64 {
    place & ((1 << PLACE_BITS) - 1) | u64::from(small) << PLACE_BITS
}

fn unpack(packed: u64) -> (u64, u16) {
    (packed & ((1 << PLACE_BITS) - 1), (packed >> PLACE_BITS) as u16)
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + field.len()) {
        place.copy_from_slice(field);
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(<[u8]>::first_chunk::<8>).map_or(0, |word| u64::from_le_bytes(*word))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(<[u8]>::first_chunk::<4>).map_or(0, |word| u32::from_le_bytes(*word))
}

#[cfg(test)]
mod tests;
