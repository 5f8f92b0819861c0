//! Unmounting: with umount2(2), or with fusermount3 for those who may not; only what the caller means.

use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use super::table::{MountEntry, MountId, MountTable, resolve_parent};
use super::{MountError, fusermount};

/// What to do about users of the mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// Fail when it is in use.
    WhenIdle,
    /// Take it out of sight when it is in use; it ends when the last user closes.
    LazilyWhenBusy,
    /// Take it out of sight in any case.
    Lazily,
}

/// How an unmount went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmounted {
    /// It is gone.
    Gone,
    /// Out of sight; somebody may still be using it.
    OutOfSight,
}

/// Unmounts whatever caifs has mounted at `path`.
///
/// # Errors
/// As [`mounted_at`]; it is in use; the kernel or fusermount3 refuses.
pub fn unmount_path(path: &Path, how: How) -> Result<Unmounted, MountError> {
    unmount(mounted_at(path)?.id, how)
}

/// The mount that [`unmount_path`] means.
///
/// # Errors
/// Nothing is mounted there, or something else is.
pub fn mounted_at(path: &Path) -> Result<MountEntry, MountError> {
    let table = MountTable::read().map_err(MountError::Table)?;
    let not_ours = |problem: String| MountError::NotOurs { path: path.to_owned(), problem };
    // The path as it is named, then as a symlink names it; neither asks the mounted file system.
    let named = resolve_parent(path).ok().filter(|named| table.at(named).is_some_and(MountEntry::is_ours));
    let mountpoint = match named {
        Some(named) => named,
        None => path.canonicalize().map_err(|error| not_ours(format!("cannot be unmounted: {error}")))?,
    };
    match table.at(&mountpoint) {
        None => Err(not_ours("is not a mountpoint".into())),
        Some(entry) if !entry.is_ours() => Err(not_ours(format!("is a mount of {}, not of caifs", entry.fs_type))),
        Some(entry) => Ok(entry.clone()),
    }
}

/// Unmounts the mount `id`, wherever it is by now (it moves when somebody renames its mountpoint).
///
/// # Errors
/// As [`unmount_path`]; something else is mounted over it.
pub fn unmount(id: MountId, how: How) -> Result<Unmounted, MountError> {
    let table = MountTable::read().map_err(MountError::Table)?;
    let Some(entry) = table.entries().iter().find(|entry| entry.id == id) else { return Ok(Unmounted::Gone) };
    let mountpoint = entry.mountpoint.as_path();
    // Unmounting goes by path, so what lies on top would be unmounted instead.
    if let Some(cover) = table.at(mountpoint).filter(|top| top.id != id) {
        let problem = format!("is covered by another mount ({})", cover.fs_type);
        return Err(MountError::NotOurs { path: mountpoint.to_owned(), problem });
    }
    let idle = if how == How::Lazily { Err(Errno::EBUSY) } else { umount2(mountpoint, MntFlags::UMOUNT_NOFOLLOW) };
    let outcome = match (idle, how) {
        (Err(Errno::EBUSY), How::LazilyWhenBusy | How::Lazily) => {
            umount2(mountpoint, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH).map(|()| Unmounted::OutOfSight)
        }
        (idle, _) => idle.map(|()| Unmounted::Gone),
    };
    match outcome {
        Ok(unmounted) => Ok(unmounted),
        Err(Errno::EPERM) => unmount_as_user(mountpoint, how),
        Err(Errno::EBUSY) => Err(busy(mountpoint)),
        Err(error) => {
            let problem = std::io::Error::from(error).to_string();
            Err(MountError::Unmount { path: mountpoint.to_owned(), busy: false, problem })
        }
    }
}

fn unmount_as_user(mountpoint: &Path, how: How) -> Result<Unmounted, MountError> {
    let idle = if how == How::Lazily { None } else { Some(fusermount::unmount(mountpoint, false)) };
    match (idle, how) {
        (Some(Ok(())), _) => Ok(Unmounted::Gone),
        (Some(Err(problem)), How::WhenIdle) if problem.contains("busy") => Err(busy(mountpoint)),
        (Some(Err(problem)), How::WhenIdle) => {
            Err(MountError::Unmount { path: mountpoint.to_owned(), busy: false, problem })
        }
        (_, How::LazilyWhenBusy | How::Lazily) | (None, How::WhenIdle) => fusermount::unmount(mountpoint, true)
            .map(|()| Unmounted::OutOfSight)
            .map_err(|problem| MountError::Unmount { path: mountpoint.to_owned(), busy: false, problem }),
    }
}

fn busy(mountpoint: &Path) -> MountError {
    let problem = "it is in use (close what uses it, or unmount lazily)".into();
    MountError::Unmount { path: mountpoint.to_owned(), busy: true, problem }
}
