//! A mount that somebody else has made and handed over as an open descriptor, named `/dev/fd/N` in place of the mountpoint: so does
//! mount.fuse3 with `drop_privileges` (fuse3's util/mount.fuse.c), and whoever mounts for a process that may not.
//!
//! Invariant: such a mount is served, and neither made nor unmounted; it is its maker's.

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;

use nix::sys::stat::{SFlag, fstat, major, minor};

use super::MountError;
use super::daemon::Ready;
use super::run::Served;
use crate::sys;

/// Where open descriptors are named by number.
const DIRECTORIES: &[&str] = &["/dev/fd", "/proc/self/fd"];

/// The device number of /dev/fuse: Documentation/admin-guide/devices.txt of Linux.
const FUSE_DEVICE: (u64, u64) = (10, 229);

/// The descriptor that a mountpoint names; `None` for any other path.
///
/// # Errors
/// It is not open, or not /dev/fuse.
pub(super) fn descriptor(mountpoint: &Path) -> Result<Option<OwnedFd>, MountError> {
    let Some(number) = number(mountpoint) else { return Ok(None) };
    let wrong = |problem: String| MountError::mountpoint(mountpoint, problem);
    let fd = sys::inherited_fd(number).map_err(|error| wrong(format!("no descriptor to serve: {error}")))?;
    let stat = fstat(&fd).map_err(|error| wrong(io::Error::from(error).to_string()))?;
    let is_device = stat.st_mode & SFlag::S_IFMT.bits() == libc::S_IFCHR;
    if !is_device || (major(stat.st_rdev), minor(stat.st_rdev)) != FUSE_DEVICE {
        return Err(wrong("is not /dev/fuse: it must be the descriptor of a FUSE mount".into()));
    }
    Ok(Some(fd))
}

fn number(mountpoint: &Path) -> Option<RawFd> {
    let name = DIRECTORIES.iter().find_map(|directory| mountpoint.strip_prefix(directory).ok())?.to_str()?;
    name.bytes().all(|digit| digit.is_ascii_digit()).then(|| name.parse().ok()).flatten()
}

/// Serves until its maker unmounts it.
///
/// # Errors
/// The handshake with the kernel fails (as when nothing is mounted), or the connection does.
pub(super) fn serve_until_unmounted<S, R>(served: Served, serve: S, ready: Ready) -> Result<(), MountError>
where
    S: FnOnce(Served) -> io::Result<R>,
    R: FnOnce() -> io::Result<()>,
{
    let run = serve(served).map_err(MountError::Serve)?;
    ready.tell()?;
    run().map_err(MountError::Serve)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn only_names_of_descriptors_are_descriptors() {
        for (path, named) in [
            ("/dev/fd/4", Some(4)),
            ("/proc/self/fd/12", Some(12)),
            ("/dev/fd/+4", None),
            ("/dev/fd/4/x", None),
            ("/dev/fd", None),
            ("/dev/fd/99999999999", None),
            ("/mnt/4", None),
        ] {
            assert_eq!(number(Path::new(path)), named, "{path}");
        }
    }

    #[test]
    fn a_descriptor_that_is_not_of_fuse_is_refused() {
        let file = tempfile::tempfile().expect("temporary file");
        let path = format!("/dev/fd/{}", file.as_raw_fd());
        let refused = descriptor(Path::new(&path)).expect_err("a file").to_string();
        assert_eq!(refused, format!("mountpoint {path}: is not /dev/fuse: it must be the descriptor of a FUSE mount"));
        let closed = descriptor(Path::new("/dev/fd/2147483647")).expect_err("not open").to_string();
        assert!(closed.starts_with("mountpoint /dev/fd/2147483647: no descriptor to serve: "), "{closed}");
        assert!(descriptor(Path::new("/mnt")).expect("a path").is_none());
    }
}
