//! The end of a mount that hangs: its connection is aborted through the fusectl file system, and it is taken out of sight.
//!
//! Everybody who waits for the mount gets an error. Neither the mountpoint nor the process that serves it is asked, so it works as well when
//! that is dead, stopped, or waits for something itself.
//!
//! Invariant: only a mount of ours is aborted, the very one that was named.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::control::paths::find;
use super::detach::{How, unmount};
use super::table::{MountId, MountTable};
use super::{FS_TYPE, MountError};

/// Where the fusectl file system is mounted.
const CONNECTIONS: &str = "/sys/fs/fuse/connections";

/// What was aborted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Aborted {
    /// Where it was mounted.
    pub mountpoint: PathBuf,
    /// The mount.
    pub id: MountId,
}

/// Aborts the mount of ours at `path` and takes it out of sight.
///
/// # Errors
/// Nothing of ours is mounted right there; the connection cannot be aborted, which needs root, or the mount's own user where fusectl is mounted.
pub fn abort(path: &Path) -> Result<Aborted, MountError> {
    let table = MountTable::read().map_err(MountError::Table)?;
    let not_ours = |problem: String| MountError::NotOurs { path: path.to_owned(), problem };
    let entry = match find(&table, path) {
        Ok(Some((entry, true))) => entry,
        Ok(Some((entry, false))) => {
            let problem = format!("lies in the caifs mount on {}: name that", entry.mountpoint.display());
            return Err(not_ours(problem));
        }
        Ok(None) => {
            let there =
                std::path::absolute(path).ok().and_then(|path| table.at(&path).map(|entry| entry.fs_type.clone()));
            return Err(not_ours(match there {
                Some(fs_type) => format!("is a mount of {fs_type}, not of {FS_TYPE}"),
                None => "is not a mountpoint of caifs".to_owned(),
            }));
        }
        Err(error) => return Err(not_ours(format!("cannot be looked for: {error}"))),
    };
    let aborted = Aborted { mountpoint: entry.mountpoint.clone(), id: entry.id };
    abort_connection(entry.id).map_err(|error| {
        let hint = match error.kind() {
            io::ErrorKind::PermissionDenied => {
                " (root can; or its own user, where fusectl is mounted on /sys/fs/fuse/connections)"
            }
            _ => "",
        };
        MountError::System {
            what: "aborting the connection",
            error: io::Error::new(error.kind(), format!("{error}{hint}")),
        }
    })?;
    unmount(entry.id, How::Lazily)?;
    Ok(aborted)
}

/// The directory of a mount's connection, by the minor number of its device, where fusectl is mounted; it is there until the mount is
/// gone from every mount namespace.
pub(super) fn connection(minor: u32) -> PathBuf {
    Path::new(CONNECTIONS).join(minor.to_string())
}

/// Aborts the connection of a mount. One that is gone already is no error.
fn abort_connection(id: MountId) -> io::Result<()> {
    let file = connection(id.minor).join("abort");
    let has_fusectl = || {
        let table = MountTable::read()?;
        Ok::<_, io::Error>(table.at(Path::new(CONNECTIONS)).is_some_and(|entry| entry.fs_type == "fusectl"))
    };
    if has_fusectl()? {
        return write_abort(&file);
    }
    // Mounted for a moment, where nobody else sees it: by a thread with a mount namespace of its own, which ends with it.
    let thread = std::thread::Builder::new().name("caifs-abort".into()).spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
        mount(Some("fusectl"), CONNECTIONS, Some("fusectl"), MsFlags::empty(), None::<&str>)?;
        write_abort(&file)
    })?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("a panic was caught")))
}

fn write_abort(file: &Path) -> io::Result<()> {
    match fs::write(file, "1") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        written => written,
    }
}
