//! Mounting and unmounting: mount(2) for who may, fusermount3 for everyone else.
//!
//! fuser's own mounting is not used: in the pinned version it cannot set the type, does not escape the source and leaves busy
//! mounts behind.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::statvfs;

use super::MountError;
use super::table::{self, FS_TYPE, MountEntry};
use crate::sys;

/// The kernel's door to FUSE.
const DEV_FUSE: &str = "/dev/fuse";

/// Read-ahead of the kernel, in KiB, where we may set it: with 4 MiB, four requests of 1 MiB are in flight for one reader, which on two
/// cores read a decoded image about 1.6 times as fast as the default of 128 KiB; 16 MiB was no faster.
const READ_AHEAD_KIB: u32 = 4096;

/// Where fusermount3 may be when PATH does not tell.
const HELPER_DIRS: [&str; 4] = ["/usr/bin", "/bin", "/usr/sbin", "/sbin"];

/// What to mount where.
#[derive(Debug, Clone)]
pub struct Attachment {
    /// What the mount table shows as source.
    pub source: String,
    /// Where: an existing directory or regular file, without symlinks.
    pub mountpoint: PathBuf,
    /// Flags of the mount.
    pub flags: MsFlags,
    /// Whether other users may use it.
    pub allow_other: bool,
}

/// A mount of ours, to be served through its descriptor.
#[derive(Debug)]
pub struct Attached {
    mountpoint: PathBuf,
    /// The mount's entry in the table, to know it again.
    entry: Option<MountEntry>,
}

/// How to unmount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// Only when no file in it is open.
    WhenIdle,
    /// Detach it from the tree now; it ends when the last open file is closed.
    Lazy,
}

/// Makes a mountpoint ready: it exists, and is not a mount of ours whose daemon has died (that one is unmounted). Gives its path without
/// symlinks.
///
/// # Errors
/// The mountpoint cannot be used.
pub fn prepare(mountpoint: &Path) -> Result<PathBuf, MountError> {
    let fail = |error: io::Error| MountError::Failed(format!("mountpoint {}: {}", mountpoint.display(), words(&error)));
    // The last component is not looked at before the mount table has been: a dead mount there would be an error.
    let absolute = without_symlinks_above(mountpoint).map_err(fail)?;
    while let Some(entry) = table::at(&absolute).map_err(fail)?.filter(MountEntry::is_ours) {
        // Of everything that can be asked, this is never answered from the kernel's own memory, and by a living daemon at once.
        match statvfs(&absolute) {
            Err(Errno::ENOTCONN) => unmount_path(&absolute, How::Lazy)?,
            _ => return Err(fail(io::Error::other(format!("{} is mounted there already", entry.source.display())))),
        }
    }
    let metadata = fs::metadata(&absolute).map_err(fail)?;
    if !metadata.is_dir() && !metadata.is_file() {
        return Err(fail(io::Error::other("neither a directory nor a regular file")));
    }
    absolute.canonicalize().map_err(fail)
}

/// An absolute path whose directories are free of symlinks; the last component is left as it is.
fn without_symlinks_above(path: &Path) -> io::Result<PathBuf> {
    let absolute = std::path::absolute(path)?;
    match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => Ok(parent.canonicalize()?.join(name)),
        _ => absolute.canonicalize(),
    }
}

/// Mounts. The descriptor is the kernel's side of the mount: nothing in it answers until it is served.
///
/// # Errors
/// The system refuses; one line says why and, if known, what to do.
pub fn attach(attachment: &Attachment) -> Result<(Attached, OwnedFd), MountError> {
    let fail = |why: String| Err(MountError::Failed(why));
    let device = match OpenOptions::new().read(true).write(true).open(DEV_FUSE) {
        Ok(device) => device,
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
            return fail(format!("{DEV_FUSE} does not exist (is the fuse module loaded?)"));
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return fail(format!("{DEV_FUSE}: {} (chmod 666 {DEV_FUSE} lets every user mount)", words(&error)));
        }
        Err(error) => return fail(format!("{DEV_FUSE}: {}", words(&error))),
    };
    let fd = match attach_directly(attachment, &device) {
        Ok(()) => device.into(),
        Err(Errno::EPERM) => attach_by_helper(attachment)?,
        Err(errno) => return fail(format!("the kernel refuses: {}", errno.desc())),
    };
    let entry = table::at(&attachment.mountpoint).ok().flatten().filter(MountEntry::is_ours);
    Ok((Attached { mountpoint: attachment.mountpoint.clone(), entry }, fd))
}

fn attach_directly(attachment: &Attachment, device: &File) -> nix::Result<()> {
    let root = fs::metadata(&attachment.mountpoint)
        .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
    let mut data = format!(
        "fd={},rootmode={:o},user_id={},group_id={},default_permissions",
        device.as_raw_fd(),
        root.mode() & libc::S_IFMT,
        nix::unistd::geteuid(),
        nix::unistd::getegid(),
    );
    if attachment.allow_other {
        data.push_str(",allow_other");
    }
    // The source is an argument of its own here, so nothing in it can be taken for an option.
    mount(
        Some(attachment.source.as_str()),
        &attachment.mountpoint,
        Some(FS_TYPE),
        attachment.flags,
        Some(data.as_str()),
    )
}

/// Lets fusermount3, which is set-uid root, mount for us and pass the descriptor back (`_FUSE_COMMFD`).
fn attach_by_helper(attachment: &Attachment) -> Result<OwnedFd, MountError> {
    let fail = |why: String| MountError::Failed(why);
    let helper = find_helper()?;
    let (ours, theirs) = UnixStream::pair().map_err(|error| fail(words(&error)))?;
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty())).map_err(|errno| fail(errno.desc().to_owned()))?;
    let output = Command::new(&helper)
        .arg("-o")
        .arg(helper_options(attachment))
        .arg("--")
        .arg(&attachment.mountpoint)
        .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .output()
        .map_err(|error| fail(format!("{}: {}", helper.display(), words(&error))))?;
    drop(theirs);
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let reason = said.lines().last().unwrap_or("fusermount3 failed and does not say why").trim();
        let hint = match attachment.allow_other && reason.contains("allow_other") {
            true => " (write user_allow_other into /etc/fuse.conf, or mount without allow-other)",
            false => "",
        };
        return Err(fail(format!("{reason}{hint}")));
    }
    match sys::receive_fd(&ours) {
        Ok(Some(fd)) => Ok(fd),
        Ok(None) => Err(fail("fusermount3 mounted but gave no descriptor".to_owned())),
        Err(error) => Err(fail(format!("fusermount3: {}", words(&error)))),
    }
}

fn helper_options(attachment: &Attachment) -> String {
    let source = attachment.source.replace('\\', "\\\\").replace(',', "\\,");
    let mut options = format!("ro,nosuid,nodev,default_permissions,subtype=caifs,fsname={source}");
    if attachment.flags.contains(MsFlags::MS_NOEXEC) {
        options.push_str(",noexec");
    }
    if attachment.allow_other {
        options.push_str(",allow_other");
    }
    options
}

fn find_helper() -> Result<PathBuf, MountError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(HELPER_DIRS.map(PathBuf::from)).collect::<Vec<_>>();
    let candidates =
        ["fusermount3", "fusermount"].into_iter().flat_map(|name| dirs.iter().map(move |dir| dir.join(name)));
    candidates.into_iter().find(|path| path.is_file()).ok_or_else(|| {
        MountError::Failed("mounting needs root, or fusermount3 (on Debian: apt install fuse3)".to_owned())
    })
}

impl Attached {
    /// Where it is mounted.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Raises the kernel's read-ahead, if we may.
    pub fn raise_read_ahead(&self) {
        let Some(entry) = &self.entry else { return };
        let setting = format!("/sys/class/bdi/{}/read_ahead_kb", entry.device);
        if let Err(error) = fs::write(&setting, READ_AHEAD_KIB.to_string()) {
            tracing::info!("cannot raise the read-ahead in {setting}: {error}");
        }
    }

    /// Unmounts: when idle, else lazily. Tells whether it was busy. A place where something else is mounted now is left alone.
    ///
    /// # Errors
    /// The system refuses.
    pub fn detach(&self) -> Result<bool, MountError> {
        let now = table::at(&self.mountpoint).ok().flatten();
        let is_this =
            matches!((&now, &self.entry), (Some(now), Some(entry)) if now.id == entry.id && now.device == entry.device);
        if !is_this {
            return Ok(false);
        }
        match unmount_path(&self.mountpoint, How::WhenIdle) {
            Ok(()) => Ok(false),
            Err(_) => unmount_path(&self.mountpoint, How::Lazy).map(|()| true),
        }
    }
}

/// Unmounts a mount of ours.
///
/// # Errors
/// Nothing of ours is mounted there, it is busy, or the system refuses.
pub fn unmount(mountpoint: &Path, how: How) -> Result<(), MountError> {
    let fail = |why: &str| Err(MountError::Failed(format!("cannot unmount {}: {why}", mountpoint.display())));
    // Looked up without touching the mount: its daemon may be dead or slow.
    let absolute = match without_symlinks_above(mountpoint) {
        Ok(absolute) => absolute,
        Err(error) => return fail(&words(&error)),
    };
    let found = match table::at(&absolute) {
        // The last component may be a symlink to the mountpoint.
        Ok(None) => absolute.canonicalize().and_then(|target| table::at(&target)),
        found => found,
    };
    match found {
        Ok(Some(entry)) if entry.is_ours() => unmount_path(&entry.mountpoint, how),
        Ok(Some(entry)) => fail(&format!("it is a mount of type {}, not of caifs", entry.fs_type)),
        Ok(None) => fail("nothing is mounted there"),
        Err(error) => fail(&words(&error)),
    }
}

fn unmount_path(mountpoint: &Path, how: How) -> Result<(), MountError> {
    let fail = |why: String| MountError::Failed(format!("cannot unmount {}: {why}", mountpoint.display()));
    let lazy = if how == How::Lazy { MntFlags::MNT_DETACH } else { MntFlags::empty() };
    match umount2(mountpoint, lazy | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(Errno::EBUSY) => Err(fail("it is busy (files in it are open; detach it with --lazy)".to_owned())),
        Err(Errno::EPERM) => {
            let helper = find_helper()?;
            let mut command = Command::new(&helper);
            command.arg("-u").args((how == How::Lazy).then_some("-z")).arg("--").arg(mountpoint);
            let output = command.stdin(Stdio::null()).output().map_err(|error| fail(words(&error)))?;
            match output.status.success() {
                true => Ok(()),
                false => Err(fail(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
            }
        }
        Err(errno) => Err(fail(errno.desc().to_owned())),
    }
}

/// An error of the system in words, without its number.
pub(super) fn words(error: &io::Error) -> String {
    let text = error.to_string();
    text.split_once(" (os error").map_or(text.as_str(), |(words, _)| words).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_cannot_become_an_option() {
        let attachment = Attachment {
            source: r"a,suid\,dev".to_owned(),
            mountpoint: PathBuf::from("/m"),
            flags: MsFlags::MS_NOEXEC,
            allow_other: true,
        };
        let options = helper_options(&attachment);
        assert_eq!(
            options,
            r"ro,nosuid,nodev,default_permissions,subtype=caifs,fsname=a\,suid\\\,dev,noexec,allow_other"
        );
    }
}
