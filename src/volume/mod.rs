//! The filesystem without FUSE: what a mount serves, as futures, with errors that know their errno.
//!
//! * [`Volume`] is what the kernel can ask of a read-only filesystem.
//! * [`tree`] serves a directory archive, [`image`] a blob as a file in a directory or as the mountpoint itself, [`collection`] a
//!   directory of many of both.
//! * [`backing`] gives an image its backing file.
//! * [`show`] is how files are shown, whatever is stored of them.
//! * [`open`] puts store, cache, blob and tree together for what a user names; [`live`] is what they are while the volume is served.
//! * [`prove`] finds out whether what was opened can be read, before it is mounted.
//! * [`retune`] changes its stores and limits meanwhile.
//! * [`trust`] says what an index must be before anything of it is used.
//! * [`table`] finds, keeps and makes the metadata table of a tree.
//! * [`background`] is what goes on beside the serving: [`warm`] fetches what was asked for, [`replay`] what a profile lists, [`record`]
//!   makes a profile.
//! * [`VolumeError`] carries its errno and the numbered site of every EIO.
//!
//! Invariants: a volume is immutable, so that the kernel may keep what it learns for ever, but where [`Volume::lasts`] says less; a future that finds all it needs in
//! memory is ready at its first poll and does no blocking work in a poll; `statfs` never waits.

pub mod background;
pub mod backing;
pub mod collection;
mod error;
pub mod image;
pub mod live;
pub mod open;
pub mod prove;
pub mod record;
pub mod replay;
pub mod retune;
pub mod show;
pub mod sources;
pub mod table;
pub mod tree;
pub mod trust;
pub mod warm;

pub use error::{EioSite, VolumeError};
pub use live::{Live, LiveVolume, Part};
pub use show::Show;

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::future::BoxFuture;

pub use crate::tree::ROOT_INO;
pub use crate::tree::table::TreeShape;

/// Extended attributes that say what a file is made of; the names after this prefix are in README.md.
const OWN_XATTR_PREFIX: &[u8] = b"user.caifs.";

/// The name after our own prefix.
fn own_xattr(name: &[u8]) -> Option<&[u8]> {
    name.strip_prefix(OWN_XATTR_PREFIX)
}

/// The type of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// Directory.
    Directory,
    /// Regular file.
    Regular,
    /// Symbolic link.
    Symlink,
    /// Block device.
    BlockDevice,
    /// Character device.
    CharDevice,
    /// Named pipe.
    Fifo,
    /// Unix socket.
    Socket,
}

/// What stat(2) shows of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attr {
    /// Inode number; the same on every mount of the same index.
    pub ino: u64,
    /// File type.
    pub kind: FileKind,
    /// Permission bits including set-id and sticky (07777).
    pub permissions: u16,
    /// Number of names; 1 for a directory whose subdirectories have not been counted.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Content length in bytes; the length of the target for a symlink.
    pub size: u64,
    /// Modification time, shown as all times.
    pub mtime: SystemTime,
    /// Device number of a device node, as `makedev(3)` packs it, else 0.
    pub rdev: u64,
}

/// A name in a directory listing.
#[derive(Debug, Clone)]
pub struct DirEntry {
    /// Raw bytes of the name.
    pub name: Bytes,
    /// Attributes of the file it names.
    pub attr: Attr,
    /// Whether they are known; else only number and type count, and whoever needs more must look the name up.
    pub is_attr_known: bool,
    /// Where a listing that has seen this entry goes on; opaque.
    pub next_offset: u64,
}

/// A part of a directory's listing.
#[derive(Debug, Clone)]
pub struct Listing {
    /// Inode number of the directory above; the directory's own for the root.
    pub parent_ino: u64,
    /// Entries without `.` and `..`; none means the end of the directory.
    pub entries: Vec<DirEntry>,
}

/// What statfs(2) shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VolumeStat {
    /// Bytes of content described by the index.
    pub size_bytes: u64,
    /// Number of files, 0 when unknown.
    pub n_files: u64,
}

/// How long the kernel may keep what never changes: for longer than any mount lives (136 years).
pub const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);

/// A future of a volume's answer; owns all it needs so that it can move into a task with the reply.
pub type Answer<T> = BoxFuture<'static, Result<T, VolumeError>>;

/// A read-only filesystem.
pub trait Volume: Debug + Send + Sync {
    /// Attributes of an inode.
    fn getattr(&self, ino: u64) -> Answer<Attr>;

    /// Attributes of the file a directory calls `name`; `None` when there is no such name.
    fn lookup(&self, parent: u64, name: &[u8]) -> Answer<Option<Attr>>;

    /// Target of a symlink.
    fn readlink(&self, ino: u64) -> Answer<Bytes>;

    /// Content of a regular file: `len` bytes from `offset`, fewer only at the end of the file.
    fn read(&self, ino: u64, offset: u64, len: u32) -> Answer<Bytes>;

    /// At most `max_entries` entries of a directory from an offset that an earlier entry gave, 0 for the start.
    fn readdir(&self, ino: u64, offset: u64, max_entries: usize) -> Answer<Listing>;

    /// Names of the extended attributes; `privileged` callers see `trusted.*` too.
    fn listxattr(&self, ino: u64, privileged: bool) -> Answer<Vec<Bytes>>;

    /// Value of one extended attribute; `None` when the file does not have it.
    fn getxattr(&self, ino: u64, name: &[u8]) -> Answer<Option<Bytes>>;

    /// chattr(1) flags as `FS_IOC_GETFLAGS` shows them.
    fn inode_flags(&self, ino: u64) -> Answer<u32>;

    /// How long the attributes of an inode hold and, of a directory, what names it has and has not. Known without asking anyone.
    fn lasts(&self, _ino: u64) -> Duration {
        FOREVER
    }

    /// Totals, known without asking anyone.
    fn stat(&self) -> VolumeStat;

    /// Whether any file can have POSIX ACLs, which the kernel must then enforce.
    fn has_acls(&self) -> bool;

    /// What tells this content, and the inode numbers it has, from any other: a process that goes on with the mount of another one must
    /// serve the same. `None` when that cannot be told. May read a whole index.
    fn identity(&self) -> Option<String> {
        None
    }

    /// Takes the numbers that an earlier process has given from a file, which may be empty, and writes those that are given from now on at
    /// its end, for a process that goes on with the mount. `false` where [`Volume::identity`] tells the numbers, and this does nothing. To be
    /// asked before a number is used.
    ///
    /// # Errors
    /// The file cannot be used; numbers of an earlier process are missing in it.
    fn keep_numbers(&self, _file: File) -> io::Result<bool> {
        Ok(false)
    }

    /// Whether attributes are found without asking a store: then a listing may leave them to those who want them. May change at any time.
    fn has_attributes_at_hand(&self) -> bool {
        false
    }

    /// How files lie in directories. `None` when that is unknown.
    fn shape(&self) -> Option<TreeShape> {
        None
    }

    /// Type of the root: a directory, or a regular file for a mount on a file.
    fn root_kind(&self) -> FileKind;

    /// Whether a file can get a local copy that the kernel may read itself. Only then is the volume told of every open.
    fn has_backing(&self) -> bool {
        false
    }

    /// The local file that has all bytes of a regular file, and no others, known without asking anyone. `None` when there is none (yet).
    fn backing_file(&self, _ino: u64) -> Option<Arc<File>> {
        None
    }

    /// Nothing is asked any more: what is kept beside the volume is put in order. May block, for a bounded time.
    fn end(&self) {}
}
