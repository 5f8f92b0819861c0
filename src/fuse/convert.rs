//! Our types as fuser's.

use fuser::{FileAttr, FileType, INodeNo};

use crate::volume::{Attr, FileKind};

/// What stat(2) calls the preferred block size.
const BLOCK_BYTES: u32 = 4096;

/// Unit of `st_blocks`.
const STAT_BLOCK_BYTES: u64 = 512;

pub(super) fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Directory => FileType::Directory,
        FileKind::Regular => FileType::RegularFile,
        FileKind::Symlink => FileType::Symlink,
        FileKind::BlockDevice => FileType::BlockDevice,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
    }
}

pub(super) fn file_attr(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino),
        size: attr.size,
        blocks: attr.size.div_ceil(STAT_BLOCK_BYTES),
        atime: attr.mtime,
        mtime: attr.mtime,
        ctime: attr.mtime,
        crtime: attr.mtime,
        kind: file_type(attr.kind),
        perm: attr.permissions,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: kernel_dev(attr.rdev),
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

/// A device number as the FUSE protocol carries it: the kernel's 32-bit encoding with the low byte of the minor first.
fn kernel_dev(rdev: u64) -> u32 {
    let (major, minor) = (libc::major(rdev), libc::minor(rdev));
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_have_the_kernels_encoding() {
        for (major, minor, encoded) in [(1, 3, 0x103), (8, 0, 0x800), (259, 5, 0x10305), (1, 0x12345, 0x12300145)] {
            assert_eq!(kernel_dev(libc::makedev(major, minor)), encoded);
        }
    }
}
