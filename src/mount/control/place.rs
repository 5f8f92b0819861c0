//! The mounts that there are to ask, and where each one's socket lies.
//!
//! Invariant: no file system is asked that a user may have mounted.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::geteuid;

use super::client::connect_within;
use super::paths::{self, Device};
use crate::mount::table::{MountEntry, MountTable};

/// Time enough for the kernel to tell whether somebody listens: it does so at once, unless more wait than the listener lets.
const PROBE_TIMEOUT: Duration = Duration::from_millis(1);

/// A mount that can perhaps be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Its number.
    pub device: Device,
    /// Where it is mounted, as the table has it; empty when it is out of our sight.
    pub mountpoint: PathBuf,
    /// What is mounted, as the table has it.
    pub source: String,
    /// The user it belongs to, as the table has it.
    pub uid: Option<u32>,
}

impl Place {
    pub(super) fn of(entry: &MountEntry) -> Self {
        let user = entry.super_options.split(',').find_map(|option| option.strip_prefix("user_id="));
        Self {
            device: (entry.id.major, entry.id.minor),
            mountpoint: entry.mountpoint.clone(),
            source: entry.source.to_string_lossy().into_owned(),
            uid: user.and_then(|user| user.parse().ok()),
        }
    }

    /// What to call it: its mountpoint, or its number when it is out of sight.
    pub fn name(&self) -> PathBuf {
        match self.mountpoint.as_os_str().is_empty() {
            true => format!("mount {}:{}", self.device.0, self.device.1).into(),
            false => self.mountpoint.clone(),
        }
    }

    /// Whether it is one of those that have their sockets in `runtime_dir`, or would have: also one that root mounted for a process that
    /// became another user.
    pub fn is_own(&self, runtime_dir: &Path) -> bool {
        Home::of(runtime_dir, self).owner.is_none()
    }
}

/// Where the socket of a mount lies, or would lie.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Home {
    /// The directory.
    pub dir: PathBuf,
    /// The user whose mount it is, when that is not us.
    pub owner: Option<u32>,
}

impl Home {
    /// Root finds other users' sockets as well, where there is none of his own that somebody listens on.
    pub fn of(runtime_dir: &Path, place: &Place) -> Self {
        let me = geteuid();
        let own = || Self { dir: runtime_dir.to_owned(), owner: None };
        let Some(uid) = place.uid.filter(|uid| *uid != me.as_raw()) else { return own() };
        let name = paths::socket_name(place.device);
        let has_socket = |dir: &Path| dir.join(&name).symlink_metadata().is_ok();
        let is_among_ours = has_socket(runtime_dir);
        // A process that was killed leaves its socket, and the next mount, whosoever it is, may get the same number.
        if is_among_ours && (!me.is_root() || is_listened_at(runtime_dir, &name)) {
            return own();
        }
        let dirs = if me.is_root() { dirs_of_user(uid) } else { Vec::new() };
        match dirs.into_iter().find(|dir| paths::check_of(dir, uid).is_ok() && has_socket(dir)) {
            Some(dir) => Self { dir, owner: Some(uid) },
            None if is_among_ours => own(),
            None => Self { dir: runtime_dir.to_owned(), owner: Some(uid) },
        }
    }
}

/// Whether somebody listens: the kernel refuses only where nobody does.
fn is_listened_at(dir: &Path, name: &str) -> bool {
    let connected = paths::with_short(dir, name, |path| connect_within(path, PROBE_TIMEOUT));
    !matches!(connected, Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound))
}

fn dirs_of_user(uid: u32) -> Vec<PathBuf> {
    MountTable::read().map(|table| not_mounted_over(&table, paths::of_user(uid))).unwrap_or_default()
}

/// Those directories that no process of a user's makes up: they are his, so he may mount on them, and a look would wait for him.
fn not_mounted_over(table: &MountTable, dirs: [PathBuf; 2]) -> Vec<PathBuf> {
    let is_fuse = |path: &Path| table.entries().iter().any(|entry| entry.mountpoint == path && is_of_process(entry));
    dirs.into_iter().filter(|dir| !dir.ancestors().any(is_fuse)).collect()
}

fn is_of_process(entry: &MountEntry) -> bool {
    entry.fs_type == "fuse" || entry.fs_type.starts_with("fuse.") || entry.fs_type == "fuseblk"
}

/// All mounts that there are to see: in the mount table, and with a socket in `runtime_dir`.
pub(super) fn places(runtime_dir: &Path, table: &MountTable) -> Vec<Place> {
    let mut places: Vec<Place> = Vec::new();
    for entry in table.entries().iter().filter(|entry| entry.is_ours()) {
        let place = Place::of(entry);
        // A mount that is bound to several places is one mount.
        if !places.iter().any(|known| known.device == place.device) {
            places.push(place);
        }
    }
    for device in sockets(runtime_dir) {
        if !places.iter().any(|known| known.device == device) {
            places.push(Place { device, mountpoint: PathBuf::new(), source: String::new(), uid: None });
        }
    }
    places
}

fn sockets(runtime_dir: &Path) -> Vec<Device> {
    if paths::check(runtime_dir).is_err() {
        return Vec::new();
    }
    let entries = std::fs::read_dir(runtime_dir).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name());
    let mut devices: Vec<Device> = names.filter_map(|name| paths::device_of_name(OsStr::to_str(&name)?)).collect();
    devices.sort_unstable();
    devices
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    const STRANGER: u32 = 54_321;

    fn place(uid: u32) -> Place {
        Place { device: (0, 57), mountpoint: "/mnt".into(), source: String::new(), uid: Some(uid) }
    }

    #[test]
    fn a_mount_is_ours_by_its_user_or_by_its_socket() {
        let dir = tempfile::tempdir().unwrap();
        let (me, dir) = (geteuid().as_raw(), dir.path());
        assert!(place(me).is_own(dir));
        assert!(!place(STRANGER).is_own(dir));
        // Of a process that became that user.
        let listener = UnixListener::bind(dir.join("0:57.sock")).unwrap();
        assert!(place(STRANGER).is_own(dir));
        // It has died: the socket is left.
        drop(listener);
        assert!(place(STRANGER).is_own(dir));
    }

    #[test]
    fn what_a_user_mounts_over_his_sockets_is_not_looked_at() {
        let shown = |lines: &str| not_mounted_over(&MountTable::parse(lines.as_bytes()), paths::of_user(1000));
        let [session, without] = paths::of_user(1000);
        let usual = "30 22 0:30 / /run/user/1000 rw - tmpfs tmpfs rw\n31 30 0:31 / /run/user/1000/doc rw - fuse.portal portal rw\n";
        assert_eq!(shown(usual), [session.clone(), without.clone()]);
        for mountpoint in ["/run/user/1000/caifs", "/run/user/1000"] {
            let line = format!("{usual}40 30 0:40 / {mountpoint} rw - fuse.sshfs h: rw,user_id=1000\n");
            assert_eq!(shown(&line), std::slice::from_ref(&without), "{mountpoint}");
        }
        assert_eq!(shown("40 22 0:40 / /tmp/caifs-1000 rw - fuse x rw\n"), [session]);
    }
}
