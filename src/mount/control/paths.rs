//! Where control sockets lie, and which mount a path means. Nothing here asks the mounted file system anything.
//!
//! A socket is called by the device number of its mount (`0:57.sock`): that is in the mount table for whoever knows the mountpoint, however
//! it was spelt, wherever the mount was moved to, and whoever serves it by now.
//!
//! Invariant: sockets lie in a directory that nobody else can write to.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use nix::unistd::geteuid;

use crate::mount::table::{MountEntry, MountTable};

/// The longest path of a socket in bytes, less the NUL behind it (unix(7)).
const MAX_SOCKET_PATH_BYTES: usize = 107;

/// Symlinks followed in a path, as the kernel does.
const MAX_SYMLINKS: usize = 40;

/// Device number of a mount: major and minor.
pub type Device = (u32, u32);

/// The name of a mount's socket.
pub fn socket_name((major, minor): Device) -> String {
    format!("{major}:{minor}.sock")
}

/// The device whose socket has this name.
pub fn device_of_name(name: &str) -> Option<Device> {
    let (major, minor) = name.strip_suffix(".sock")?.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Makes the directory of sockets, or checks that the one there is safe.
///
/// # Errors
/// It cannot be made, or others may write to it.
pub fn prepare(dir: &Path) -> io::Result<()> {
    let mode = if geteuid().is_root() { 0o755 } else { 0o700 };
    match DirBuilder::new().mode(mode).create(dir) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        // Of a test's or a service's own directory the parents may lack, too.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            DirBuilder::new().recursive(true).mode(mode).create(dir)?
        }
        Err(error) => return Err(error),
    }
    check(dir)
}

/// Where the sockets of a user's mounts lie who is not root: below what the session manager makes for him, or else in /tmp.
pub fn of_user(uid: u32) -> [PathBuf; 2] {
    [format!("/run/user/{uid}/caifs").into(), without_session(uid)]
}

/// Where the sockets of a user's mounts lie whom no session manager has given a directory.
pub fn without_session(uid: u32) -> PathBuf {
    format!("/tmp/caifs-{uid}").into()
}

/// Checks that only we (and root) can have put anything into the directory.
///
/// # Errors
/// It is missing, no directory (a link is none), or others may write to it.
pub fn check(dir: &Path) -> io::Result<()> {
    check_of(dir, geteuid().as_raw())
}

/// Checks that only a user (and root) can have put anything into the directory.
///
/// # Errors
/// As [`check`].
pub fn check_of(dir: &Path, uid: u32) -> io::Result<()> {
    let metadata = fs::symlink_metadata(dir)?;
    let is_ours = metadata.uid() == uid || metadata.uid() == 0;
    match metadata.is_dir() && is_ours && metadata.mode() & 0o022 == 0 {
        true => Ok(()),
        false => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("{} is not a directory that only this user can write to", dir.display()),
        )),
    }
}

/// Calls `with` with a path of the socket that is short enough for the kernel.
pub fn with_short<T>(dir: &Path, name: &str, with: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let path = dir.join(name);
    if path.as_os_str().len() <= MAX_SOCKET_PATH_BYTES {
        return with(&path);
    }
    let dir = File::open(dir)?;
    with(&Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name))
}

/// The device of the mount that a FUSE connection serves, as the kernel tells since 6.11; `None` by an older one.
pub fn device_of_connection(connection: impl AsFd) -> Option<Device> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", connection.as_fd().as_raw_fd())).ok()?;
    let number = info.lines().find_map(|line| line.strip_prefix("fuse_connection:"))?;
    let number: u32 = number.trim().parse().ok()?;
    // The kernel's own form: 12 bits of major over 20 of minor.
    Some((number >> 20, number & 0xf_ffff))
}

/// The mount of ours that a path names, and whether it is the mountpoint itself (or lies in the mount). Symlinks on the way are followed; from the
/// first mountpoint of ours on nothing is looked at.
///
/// # Errors
/// The way to it cannot be followed. `None` when it leads to no mount of ours.
pub fn find<'a>(table: &'a MountTable, path: &Path) -> io::Result<Option<(&'a MountEntry, bool)>> {
    // The current directory is known to the kernel by name: asking for it asks no file system.
    let absolute = std::path::absolute(path)?;
    let mut left: Vec<PathBuf> = vec![absolute];
    let mut at = PathBuf::from("/");
    let mut n_symlinks = 0;
    while let Some(rest) = left.pop() {
        let mut components = rest.components();
        let Some(component) = components.next() else { continue };
        let rest = components.as_path().to_owned();
        let is_last = rest.as_os_str().is_empty() && left.iter().all(|path| path.as_os_str().is_empty());
        left.push(rest);
        match component {
            Component::RootDir => at = PathBuf::from("/"),
            Component::ParentDir => {
                at.pop();
            }
            Component::CurDir | Component::Prefix(_) => {}
            Component::Normal(name) => {
                at.push(name);
                if let Some(entry) = table.at(&at).filter(|entry| entry.is_ours()) {
                    let outer = (entry, is_last);
                    return Ok(Some(inside(table, entry, at, left.iter().rev()).unwrap_or(outer)));
                }
                // Somebody waits for an automounter's mount: a look would wait with him.
                if table.is_automounted(&at) && table.at(&at).is_none() {
                    return Ok(None);
                }
                match fs::read_link(&at) {
                    Ok(target) => {
                        n_symlinks += 1;
                        if n_symlinks > MAX_SYMLINKS {
                            return Err(io::Error::from_raw_os_error(libc::ELOOP));
                        }
                        at.pop();
                        left.push(target);
                    }
                    // Not a symlink.
                    Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                    Err(error) => return Err(error),
                }
            }
        }
    }
    Ok(None)
}

/// The innermost mount of ours inside the mount `outer` at `at`, on the way that `rest` names, and whether that is the end of it. A path that is a
/// mountpoint has no symlinks in it, so the table alone tells.
fn inside<'a, 'b>(
    table: &'a MountTable,
    outer: &MountEntry,
    mut at: PathBuf,
    rest: impl Iterator<Item = &'b PathBuf>,
) -> Option<(&'a MountEntry, bool)> {
    let mut found: Option<(&MountEntry, bool)> = None;
    let mut seen = outer.id.mount;
    for component in rest.flat_map(|rest| rest.components()) {
        if component == Component::CurDir {
            continue;
        }
        found = found.map(|(entry, _)| (entry, false));
        // Where `..` leads from here only the mount knows.
        let Component::Normal(name) = component else { break };
        at.push(name);
        // One that was there before `outer` came is hidden by it.
        if let Some(entry) = table.at(&at).filter(|entry| is_on(table, entry, seen)) {
            seen = entry.id.mount;
            found = if entry.is_ours() { Some((entry, true)) } else { found };
        }
    }
    found
}

/// Whether a mount is mounted on the mount `below`, or on one that is.
fn is_on(table: &MountTable, entry: &MountEntry, below: u64) -> bool {
    let parent_of = |entry: &MountEntry| table.entries().iter().find(|other| other.id.mount == entry.parent);
    let n_mounts = table.entries().len();
    std::iter::successors(Some(entry), |entry| parent_of(entry)).take(n_mounts).any(|entry| entry.parent == below)
}

/// The mounts of ours with a device number: more than one when it is bound to several places.
pub fn mounts_of(table: &MountTable, (major, minor): Device) -> impl Iterator<Item = &MountEntry> {
    let is_it = move |entry: &&MountEntry| entry.is_ours() && (entry.id.major, entry.id.minor) == (major, minor);
    table.entries().iter().filter(is_it)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn names_tell_devices() {
        assert_eq!(socket_name((0, 57)), "0:57.sock");
        for (name, device) in [
            ("0:57.sock", Some((0, 57))),
            ("8:1.sock", Some((8, 1))),
            ("0:57", None),
            ("x.sock", None),
            (".sock", None),
        ] {
            assert_eq!(device_of_name(name), device, "{name}");
        }
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_refused() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("deeper/run");
        prepare(&dir).unwrap();
        prepare(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(prepare(&dir).unwrap_err().to_string().contains("only this user"));
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
        let link = scratch.path().join("link");
        symlink(&dir, &link).unwrap();
        assert!(prepare(&link).is_err(), "a link may be anybody's");
        let file = scratch.path().join("file");
        fs::write(&file, b"").unwrap();
        assert!(prepare(&file).is_err());
        assert!(check(&scratch.path().join("missing")).is_err());
    }

    #[test]
    fn a_mount_is_found_by_any_spelling_and_from_inside() {
        let scratch = tempfile::tempdir().unwrap();
        let base = scratch.path().canonicalize().unwrap();
        fs::create_dir_all(base.join("a/mnt")).unwrap();
        symlink("a", base.join("link")).unwrap();
        symlink(base.join("a/mnt"), base.join("direct")).unwrap();
        symlink("loop", base.join("loop")).unwrap();
        let line = format!("36 22 0:77 / {}/a/mnt ro - fuse.caifs x ro,user_id=0\n", base.display());
        let inner = format!("37 36 0:78 / {}/a/mnt/in/ner ro - fuse.caifs y ro,user_id=0\n", base.display());
        let hidden = format!("35 22 0:76 / {}/a/mnt/old ro - fuse.caifs z ro,user_id=0\n", base.display());
        let table = MountTable::parse(format!("{hidden}{line}{inner}").as_bytes());
        let found = |path: &str| {
            find(&table, &base.join(path)).map(|found| found.map(|(entry, exact)| (entry.id.minor, exact)))
        };
        for (path, wanted) in [
            ("a/mnt", Some((77, true))),
            ("a/mnt/", Some((77, true))),
            ("a/./../a/mnt/.", Some((77, true))),
            ("link/mnt", Some((77, true))),
            ("direct", Some((77, true))),
            ("direct/deep/er", Some((77, false))),
            ("link/../link/mnt/x", Some((77, false))),
            ("a/mnt/in", Some((77, false))),
            ("a/mnt/old", Some((77, false))),
            ("direct/in/./ner/", Some((78, true))),
            ("link/mnt/in/ner/deep", Some((78, false))),
            ("link/mnt/in/ner/deep/..", Some((78, false))),
            ("link/mnt/in/../in/ner", Some((77, false))),
            ("a", None),
        ] {
            assert_eq!(found(path).unwrap(), wanted, "{path}");
        }
        assert_eq!(found("missing/x").unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(found("loop").unwrap_err().raw_os_error(), Some(libc::ELOOP));
        assert_eq!(mounts_of(&table, (0, 77)).count(), 1);
        assert_eq!(mounts_of(&table, (0, 79)).count(), 0);
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_reached_all_the_same() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("d".repeat(120));
        fs::create_dir(&dir).unwrap();
        let _listener = with_short(&dir, "0:1.sock", |path| std::os::unix::net::UnixListener::bind(path)).unwrap();
        assert!(dir.join("0:1.sock").exists());
        assert!(with_short(&dir, "0:1.sock", |path| std::os::unix::net::UnixStream::connect(path)).is_ok());
    }
}
