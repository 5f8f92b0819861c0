//! What Linux knows of a file beyond stat(2): extended attributes, inode flags, project ids; and fnmatch(3).
//!
//! Questions that a file system does not understand are answered with "nothing": an archive of a simple file system
//! is no error.

use std::ffi::{CStr, c_int, c_long, c_uint};
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Room for the answer to a first question; most attribute lists and values are shorter.
const FIRST_BYTES: usize = 256;

/// What ioctl(2) and the attribute calls answer where a file system does not know the question.
const UNSUPPORTED: [c_int; 6] =
    [libc::ENOTTY, libc::EOPNOTSUPP, libc::ENOSYS, libc::EINVAL, libc::EBADF, libc::ENODATA];

#[allow(missing_docs, reason = "made by a macro, and private")]
mod request {
    use super::{Fsxattr, c_long};

    nix::ioctl_read!(get_flags, b'f', 1, c_long);
    nix::ioctl_read!(get_fsxattr, b'X', 31, Fsxattr);
    nix::ioctl_read!(fat_attributes, b'r', 0x10, u32);
    nix::ioctl_read!(subvolume_flags, 0x94, 25, u64);
}

/// `struct fsxattr` of linux/fs.h.
#[repr(C)]
#[derive(Debug, Default)]
struct Fsxattr {
    xflags: u32,
    extent_bytes: u32,
    n_extents: u32,
    project_id: u32,
    cow_extent_bytes: u32,
    padding: [u8; 8],
}

/// A file whose attributes are asked for.
#[derive(Debug, Clone, Copy)]
pub enum AttributesOf<'a> {
    /// An open regular file or directory.
    Open(std::os::fd::BorrowedFd<'a>),
    /// A file by its path, which is not followed if it is a symlink.
    Path(&'a CStr),
}

/// Appends the names of a file's extended attributes, each with its NUL.
///
/// # Errors
/// What flistxattr(2) answers, but for a file system without attributes.
pub fn list_xattrs(of: AttributesOf<'_>, names: &mut Vec<u8>) -> io::Result<()> {
    grow(names, |room| {
        let (data, len) = (room.as_mut_ptr().cast(), room.len());
        match of {
            // SAFETY: `data` points to `len` bytes that we hold exclusively.
            AttributesOf::Open(fd) => unsafe { libc::flistxattr(fd.as_raw_fd(), data, len) },
            // SAFETY: the same, and the path ends with NUL.
            AttributesOf::Path(path) => unsafe { libc::llistxattr(path.as_ptr(), data, len) },
        }
    })
    .map(drop)
}

/// Appends the value of an extended attribute; false if the file does not have it.
///
/// # Errors
/// What fgetxattr(2) answers, but for a missing attribute.
pub fn get_xattr(of: AttributesOf<'_>, name: &CStr, value: &mut Vec<u8>) -> io::Result<bool> {
    grow(value, |room| {
        let (data, len) = (room.as_mut_ptr().cast(), room.len());
        match of {
            // SAFETY: `data` points to `len` bytes that we hold exclusively, and the name ends with NUL.
            AttributesOf::Open(fd) => unsafe { libc::fgetxattr(fd.as_raw_fd(), name.as_ptr(), data, len) },
            // SAFETY: the same, and the path ends with NUL, too.
            AttributesOf::Path(path) => unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), data, len) },
        }
    })
}

/// Appends what `call` writes into a buffer, which grows until it is large enough; false where there is nothing.
fn grow(bytes: &mut Vec<u8>, call: impl Fn(&mut [u8]) -> isize) -> io::Result<bool> {
    // The kernel's bound on attribute lists and on values.
    const MAX_BYTES: usize = 65536;
    let start = bytes.len();
    let mut room = FIRST_BYTES;
    loop {
        bytes.resize(start + room, 0);
        let written = usize::try_from(call(&mut bytes[start..]));
        let error = io::Error::last_os_error();
        bytes.truncate(start + written.unwrap_or(0));
        match (written, error.raw_os_error()) {
            (Ok(_), _) => return Ok(true),
            (_, Some(libc::ERANGE)) if room < MAX_BYTES => room = MAX_BYTES,
            (_, Some(libc::EINTR)) => {}
            (_, Some(code)) if UNSUPPORTED.contains(&code) => return Ok(false),
            _ => return Err(error),
        }
    }
}

/// The `FS_*_FL` flags that chattr sets; `None` where the file system has none.
///
/// # Errors
/// What ioctl(2) answers otherwise.
pub fn inode_flags(fd: impl AsFd) -> io::Result<Option<u32>> {
    // The request is numbered for a long, but the kernel writes an int.
    let mut flags = [0u32; 2];
    // SAFETY: there is room for a long, and the kernel asks for no alignment.
    let answer = unsafe { request::get_flags(fd.as_fd().as_raw_fd(), (&raw mut flags).cast()) };
    Ok(supported(answer)?.then_some(flags[0]))
}

/// The project id for quotas; `None` where the file system has none.
///
/// # Errors
/// What ioctl(2) answers otherwise.
pub fn project_id(fd: impl AsFd) -> io::Result<Option<u32>> {
    let mut attributes = Fsxattr::default();
    // SAFETY: the structure is the kernel's.
    let answer = unsafe { request::get_fsxattr(fd.as_fd().as_raw_fd(), &raw mut attributes) };
    Ok(supported(answer)?.then_some(attributes.project_id))
}

/// The attribute bits of a file on FAT; `None` on another file system. Ask only where FAT is: elsewhere the number of the
/// request may mean something else.
///
/// # Errors
/// What ioctl(2) answers otherwise.
pub fn fat_attributes(fd: impl AsFd) -> io::Result<Option<u32>> {
    let mut bits = 0;
    // SAFETY: the kernel writes 32 bits.
    let answer = unsafe { request::fat_attributes(fd.as_fd().as_raw_fd(), &raw mut bits) };
    Ok(supported(answer)?.then_some(bits))
}

/// Whether a subvolume of btrfs is read-only; `None` if it is not one.
///
/// # Errors
/// What ioctl(2) answers otherwise.
pub fn subvolume_is_read_only(fd: impl AsFd) -> io::Result<Option<bool>> {
    const READ_ONLY: u64 = 2;
    let mut flags = 0;
    // SAFETY: the kernel writes 64 bits.
    let answer = unsafe { request::subvolume_flags(fd.as_fd().as_raw_fd(), &raw mut flags) };
    Ok(supported(answer)?.then_some(flags & READ_ONLY != 0))
}

fn supported(answer: nix::Result<c_int>) -> io::Result<bool> {
    match answer {
        Ok(_) => Ok(true),
        Err(error) if UNSUPPORTED.contains(&(error as c_int)) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Which mount a file in a directory is on: two numbers differ across any mount point, also across bind mounts of one file
/// system. The name may be empty for the directory itself; a symlink is not followed.
///
/// # Errors
/// What statx(2) answers.
pub fn mount_id(dir: impl AsFd, name: &CStr) -> io::Result<u64> {
    // SAFETY: an all-zero statx is a valid value of a structure of numbers.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT;
    let mask: c_uint = libc::STATX_MNT_ID;
    // SAFETY: the name ends with NUL, and the structure is the kernel's.
    match unsafe { libc::statx(dir.as_fd().as_raw_fd(), name.as_ptr(), flags, mask, &raw mut stat) } {
        0 => Ok(stat.stx_mnt_id),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether a file name matches a shell pattern, where a leading dot needs a dot in the pattern (`FNM_PERIOD`).
pub fn matches_pattern(pattern: &CStr, name: &CStr) -> bool {
    // SAFETY: both end with NUL.
    unsafe { libc::fnmatch(pattern.as_ptr(), name.as_ptr(), libc::FNM_PERIOD) == 0 }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_a_shell_does() {
        for (pattern, name, matches) in [
            (c"*.o", c"a.o", true),
            (c"*.o", c".a.o", false),
            (c".*", c".a", true),
            (c"[ab]?", c"bc", true),
            (c"", c"a", false),
        ] {
            assert_eq!(matches_pattern(pattern, name), matches, "{pattern:?} {name:?}");
        }
    }

    #[test]
    fn what_a_file_system_does_not_know_is_nothing() {
        let proc = std::fs::File::open("/proc/version").unwrap();
        assert_eq!(inode_flags(&proc).unwrap(), None);
        assert_eq!(project_id(&proc).unwrap(), None);
        assert_eq!(subvolume_is_read_only(&proc).unwrap(), None);
        let mut value = b"before".to_vec();
        assert!(!get_xattr(AttributesOf::Open(proc.as_fd()), c"user.none", &mut value).unwrap());
        assert_eq!(value, b"before");
        assert!(inode_flags(std::fs::File::open("/").unwrap()).is_ok());
        assert_ne!(mount_id(&proc, c"").unwrap(), mount_id(std::fs::File::open("/").unwrap(), c"").unwrap());
    }

    #[test]
    fn values_longer_than_the_first_room_come_whole() {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        if xattr::set(file.path(), "user.long", &[7; 3000]).is_err() {
            return;
        }
        let (mut names, mut value) = (Vec::new(), b"before".to_vec());
        list_xattrs(AttributesOf::Open(file.as_file().as_fd()), &mut names).unwrap();
        assert!(names.split(|byte| *byte == 0).any(|name| name == b"user.long"));
        assert!(get_xattr(AttributesOf::Open(file.as_file().as_fd()), c"user.long", &mut value).unwrap());
        assert_eq!((value.len(), value[6]), (3006, 7));
    }
}
