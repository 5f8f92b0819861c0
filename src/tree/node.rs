//! One file of the tree, as small as it can be kept.

use bytes::Bytes;

use super::TreeError;
use crate::format::catar;
use crate::format::catar::flags::to_fs_flags;

/// Inode number of the root. Its ENTRY lies at offset 0, which the kernel does not take for a number.
pub const ROOT_INO: u64 = 1;

/// What a file's content is and where it lies in the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Regular file: `size` bytes from `offset`.
    File {
        /// Where the payload begins.
        offset: u64,
        /// Length in bytes.
        size: u64,
    },
    /// Symlink target.
    Symlink(Bytes),
    /// Device numbers.
    Device {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// Directory: its goodbye table ends at `end`.
    Directory {
        /// End of the directory's node.
        end: u64,
    },
    /// FIFO or socket.
    Nothing,
}

/// Metadata of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Where the file's ENTRY lies in the archive.
    pub entry_offset: u64,
    /// Where the ENTRY of the directory above lies; the root's own for the root.
    pub parent_offset: u64,
    /// st_mode: type and permission bits.
    pub mode: u32,
    /// Owner as stored, 0 when the archive has none.
    pub uid: u32,
    /// Group as stored, 0 when the archive has none.
    pub gid: u32,
    /// Modification time in nanoseconds since the epoch, negative before.
    pub mtime_ns: i64,
    /// chattr flags as `FS_IOC_GETFLAGS` shows them.
    pub inode_flags: u32,
    /// Extended attributes as a mount shows them, ACLs, capabilities and labels among them; by name.
    pub xattrs: Box<[(Bytes, Bytes)]>,
    /// The content.
    pub content: Content,
    /// Subdirectories of a directory, where a metadata table tells.
    pub n_subdirectories: Option<u32>,
}

/// The inode number of the file whose ENTRY lies at an offset.
pub fn ino_of(entry_offset: u64) -> u64 {
    entry_offset.max(ROOT_INO)
}

/// Where the ENTRY of an inode lies.
pub(super) fn entry_offset_of(ino: u64) -> u64 {
    if ino == ROOT_INO { 0 } else { ino }
}

impl Node {
    /// Takes over a parsed node whose ENTRY lies at `entry_offset` and whose last byte, for a directory, comes before `end`.
    pub(super) fn new(
        parsed: &catar::Node,
        entry_offset: u64,
        parent_offset: u64,
        end: u64,
    ) -> Result<Self, TreeError> {
        let damaged = |what: &str| TreeError::Damaged(format!("{what} of the entry at offset {entry_offset}"));
        let id = |id: u64, what| u32::try_from(id).map_err(|_| damaged(what));
        let content = match &parsed.content {
            catar::Content::Payload { size, offset } => {
                Content::File { offset: entry_offset.saturating_add(*offset as u64), size: *size }
            }
            catar::Content::Symlink(target) => Content::Symlink(Bytes::copy_from_slice(target)),
            catar::Content::Device { major, minor } => {
                Content::Device { major: id(*major, "device number")?, minor: id(*minor, "device number")? }
            }
            catar::Content::Directory { .. } => Content::Directory { end },
            catar::Content::None => Content::Nothing,
        };
        let xattrs =
            parsed.shown_xattrs().into_iter().map(|(name, value)| (Bytes::from(name), Bytes::from(value))).collect();
        Ok(Self {
            entry_offset,
            parent_offset,
            mode: parsed.entry.mode,
            uid: id(parsed.entry.uid, "owner")?,
            gid: id(parsed.entry.gid, "group")?,
            mtime_ns: parsed.entry.mtime_ns,
            inode_flags: to_fs_flags(parsed.entry.flags),
            xattrs,
            content,
            n_subdirectories: None,
        })
    }

    /// The inode number: the same on every mount of the same archive.
    pub fn ino(&self) -> u64 {
        ino_of(self.entry_offset)
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        matches!(self.content, Content::Directory { .. })
    }

    /// What keeping the node costs, in bytes, more or less.
    pub(super) fn weight_bytes(&self) -> usize {
        let target = match &self.content {
            Content::Symlink(target) => target.len(),
            _ => 0,
        };
        let xattrs: usize = self.xattrs.iter().map(|(name, value)| name.len() + value.len() + 64).sum();
        size_of::<Self>() + target + xattrs
    }
}
