//! Attaching: the mountpoint checked, dead mounts of our own cleaned away, the kernel told what is mounted where.
//!
//! The mount is made here rather than by `fuser`: its type is `fuse.caifs`, its source exactly what was asked for (fstab compares
//! it), and it is unmounted lazily when in use, but never anything else in its place.

use std::ffi::{CString, OsStr};
use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{FileStat, SFlag, mode_t, stat};
use nix::sys::statvfs::statvfs;
use nix::sys::wait::waitpid;
use nix::unistd::{getegid, geteuid};

use super::daemon::let_go_of_streams;
use super::detach::{How, Unmounted, unmount};
use super::options::{KernelOptions, VfsFlags};
use super::table::{MountEntry, MountId, MountTable, resolve_parent};
use super::{FS_TYPE, MountError, fusermount};
use crate::sys::{self, Forked};
use crate::volume::FileKind;

/// Read-ahead of the kernel for a mount, in KiB, where root mounts. The default of 128 makes READs of 128 KiB with at most four
/// in flight: 2,168 MiB/s from memory against 3,432, and 12 against 250 MiB/s when each READ takes 20 ms. More than 4096 gains
/// nothing from memory (limits.md B1, B7; mounting.md 3.1) and makes faults of mapped files dearer.
pub const READ_AHEAD_KIB: u32 = 4096;

/// How many dead mounts may lie on each other.
const MAX_DEAD_MOUNTS: usize = 16;

/// How long a mount of ours that is there already may take to answer. One that lives answers from its memory.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// What to mount where.
#[derive(Debug, Clone)]
pub struct AttachRequest<'a> {
    /// Where.
    pub mountpoint: &'a Path,
    /// What the mount table shows; without passwords (see [`shown_source`](super::shown_source)).
    pub source: &'a OsStr,
    /// Type of the root, and so of the mountpoint.
    pub root_kind: FileKind,
    /// Flags.
    pub flags: VfsFlags,
    /// What else the kernel is told.
    pub kernel: &'a KernelOptions,
    /// Whether other users may use it.
    pub allow_other: bool,
}

/// A mount that waits for somebody to answer the kernel.
#[derive(Debug)]
pub struct Mounted {
    /// Where the kernel's requests come from; the first is INIT.
    pub fd: OwnedFd,
    /// The mount.
    pub attached: Attached,
}

/// A mount of ours; unmounted, lazily if it is in use, when dropped.
#[derive(Debug)]
pub struct Attached {
    mountpoint: PathBuf,
    id: MountId,
    /// A second descriptor of the connection, to see whether it lives. The kernel gives numbers of mounts and devices that have
    /// become free to the very next mount, so `id` means ours only as long as the connection does.
    connection: OwnedFd,
}

/// Mounts: cleans away a dead mount of ours, checks the mountpoint, and mounts with mount(2), or with fusermount3 if that is not
/// allowed.
///
/// # Errors
/// What is wrong with the mountpoint; FUSE is not there; this source is mounted there already; the kernel or fusermount3 refuses.
pub fn attach(request: &AttachRequest<'_>) -> Result<Mounted, MountError> {
    let Prepared { path: mountpoint, mode } = prepare(request.mountpoint, request.source)?;
    if let Some(mode) = mode {
        check_kind(request.mountpoint, mode, request.root_kind)?;
    }
    let fd = match mount_directly(request, &mountpoint)? {
        Some(fd) => fd,
        None => fusermount::mount(&mountpoint, request)?,
    };
    let table = MountTable::read().map_err(MountError::Table)?;
    match table.at(&mountpoint) {
        Some(entry) if entry.is_ours() => {
            let connection = fd.try_clone().map_err(MountError::system("dup"))?;
            Ok(Mounted { fd, attached: Attached { mountpoint, id: entry.id, connection } })
        }
        // Closing the file ends the connection, and with it all that could hang.
        _ => Err(MountError::mountpoint(mountpoint, "the new mount cannot be seen there")),
    }
}

impl Attached {
    /// A mount that is there already; `connection` is a descriptor of it.
    pub(super) fn of(mountpoint: PathBuf, id: MountId, connection: OwnedFd) -> Self {
        Self { mountpoint, id, connection }
    }

    /// A descriptor of the connection to the kernel.
    pub(super) fn connection(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }

    /// Where it was mounted, as an absolute path without symlinks.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Which mount it is.
    pub fn id(&self) -> MountId {
        self.id
    }

    /// Unmounts it; it is no error if that has happened already. (Of an aborted connection a dead mount stays, for the next
    /// [`attach`] to clean away: whether it is ours cannot be known, and looking at a mount may wait for its server.)
    ///
    /// # Errors
    /// It is in use and `how` forbids to go on; something else covers it; the kernel or fusermount3 refuses.
    pub fn unmount(&self, how: How) -> Result<Unmounted, MountError> {
        if !is_connected(self.connection()) {
            return Ok(Unmounted::Gone);
        }
        unmount(self.id, how)
    }

    /// Sets the kernel's read-ahead for this mount in KiB, which only root may.
    ///
    /// # Errors
    /// What writing to `/sys/class/bdi` answers.
    pub fn set_read_ahead(&self, kib: u32) -> io::Result<()> {
        let MountId { major, minor, .. } = self.id;
        std::fs::write(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"), kib.to_string())
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if let Err(error) = self.unmount(How::LazilyWhenBusy) {
            tracing::warn!("{error}");
        }
    }
}

/// Whether the file system of a connection still exists: the kernel reports an error on the descriptor once it does not.
pub(super) fn is_connected(connection: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(connection, PollFlags::empty())];
    let polled = poll(&mut fds, PollTimeout::ZERO);
    polled == Ok(0) || !fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR))
}

/// A mountpoint that can be mounted on.
#[derive(Debug)]
pub(super) struct Prepared {
    /// As an absolute path without symlinks.
    path: PathBuf,
    /// Its type and permissions; unknown when an automounter waits for the mount.
    mode: Option<mode_t>,
}

impl Prepared {
    /// Whether it is a regular file.
    pub(super) fn is_file(&self) -> bool {
        self.mode.is_some_and(|mode| mode & SFlag::S_IFMT.bits() == libc::S_IFREG)
    }
}

/// Cleans away a dead mount of ours at a mountpoint, and looks at what is there.
///
/// # Errors
/// What is wrong with the mountpoint; this source is mounted there already.
pub(super) fn prepare(given: &Path, source: &OsStr) -> Result<Prepared, MountError> {
    if source.as_bytes().contains(&0) {
        return Err(MountError::Source);
    }
    for _ in 0..MAX_DEAD_MOUNTS {
        let resolved = given.canonicalize();
        let mountpoint = match &resolved {
            Ok(path) => path.clone(),
            // Of a dead mount only the way to it can be resolved.
            Err(_) => resolve_parent(given).map_err(|error| mountpoint_error(given, &error))?,
        };
        let table = MountTable::read().map_err(MountError::Table)?;
        let there = table.at(&mountpoint);
        if there.is_none() && table.is_automounted(&mountpoint) {
            // Somebody waits for this very mount; a look at the directory would wait with him.
            return Ok(Prepared { path: mountpoint, mode: None });
        }
        // The kernel may know the attributes of a mount of ours for ever, but never how full it is: so that is what a dead one is
        // asked, which a living one answers at once.
        let seen = match there {
            Some(ours) if ours.is_ours() => look(&mountpoint).ok_or_else(|| no_answer(given))?,
            // A disk that starts, or a server that comes back, may take as long as the whole mount.
            _ => stat(&mountpoint),
        };
        match (seen, there) {
            // "Aborted" is the answer to a question that was waiting when the server died.
            (Err(Errno::ENOTCONN | Errno::ECONNABORTED), Some(dead)) if dead.is_ours() => {
                tracing::info!("cleaning away a dead mount on {}", mountpoint.display());
                unmount(dead.id, How::Lazily)?;
            }
            (Err(Errno::ENOTCONN | Errno::ECONNABORTED), Some(dead)) => {
                let problem = format!("a dead {} mount is there; unmount it with `fusermount3 -uz`", dead.fs_type);
                return Err(MountError::mountpoint(given, problem));
            }
            (Err(error), _) => return Err(mountpoint_error(given, &error.into())),
            (Ok(_), Some(living)) if living.is_ours() && living.source == source => {
                return Err(MountError::AlreadyMounted(mountpoint));
            }
            (Ok(stat), _) => {
                let path = resolved.map_err(|error| mountpoint_error(given, &error))?;
                return Ok(Prepared { path, mode: Some(stat.st_mode) });
            }
        }
    }
    Err(MountError::mountpoint(given, "dead mounts keep appearing there"))
}

/// Looks whether something can be mounted there, and changes nothing: a dead mount of ours would be cleaned away, an automounter is
/// not woken, and what is mounted there already does not matter.
///
/// # Errors
/// What is wrong with the mountpoint.
pub fn check(given: &Path) -> Result<(), MountError> {
    let resolved = given.canonicalize();
    let named = match &resolved {
        Ok(path) => path.clone(),
        Err(_) => resolve_parent(given).map_err(|error| mountpoint_error(given, &error))?,
    };
    let table = MountTable::read().map_err(MountError::Table)?;
    let is_there = table.at(&named).is_some_and(MountEntry::is_ours) || table.is_automounted(&named);
    match resolved {
        Err(error) if !is_there => Err(mountpoint_error(given, &error)),
        _ => Ok(()),
    }
}

/// Whether this source is mounted there and served. To be called before any other thread exists.
///
/// # Errors
/// It is mounted and does not answer.
pub fn is_mounted(given: &Path, source: &OsStr) -> Result<bool, MountError> {
    answers(given, |entry| entry.source == source)
}

/// Makes sure that a mount of ours that is there answers, or is dead. To be called before any other thread exists: where one of its
/// threads waits for a mount that hangs, a process cannot end, and whoever reads what it says would wait for it.
///
/// # Errors
/// It does not answer.
pub(super) fn check_answers(given: &Path) -> Result<(), MountError> {
    match answers(given, |_| true) {
        // In a process that has threads already.
        Err(MountError::System { .. }) => Ok(()),
        told => told.map(drop),
    }
}

/// Whether there is a certain mount of ours, and it is served.
fn answers(given: &Path, is_it: impl Fn(&MountEntry) -> bool) -> Result<bool, MountError> {
    let Ok(mountpoint) = given.canonicalize() else { return Ok(false) };
    let is_ours = |entry: &MountEntry| entry.is_ours() && is_it(entry);
    if !MountTable::read().is_ok_and(|table| table.at(&mountpoint).is_some_and(is_ours)) {
        return Ok(false);
    }
    // Asked by a process: a thread that waits would be in the way of a later fork.
    let (mut ours, mut theirs) = UnixStream::pair().map_err(MountError::system("socketpair"))?;
    ours.set_read_timeout(Some(ANSWER_LIMIT)).map_err(MountError::system("setsockopt"))?;
    let child = match sys::fork().map_err(MountError::system("fork"))? {
        Forked::Child => {
            let _ = let_go_of_streams();
            // How full it is, a dead mount cannot say.
            let told = theirs.write_all(&[u8::from(statvfs(&mountpoint).is_ok())]);
            std::process::exit(i32::from(told.is_err()));
        }
        Forked::Parent { child } => child,
    };
    drop(theirs);
    let mut is_served = [0];
    match ours.read_exact(&mut is_served) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            // It may have to wait on, for as long as the mount does: nobody waits for it.
            let _ = kill(child, Signal::SIGKILL);
            Err(no_answer(given))
        }
        told => {
            let _ = waitpid(child, None);
            Ok(told.is_ok() && is_served == [1])
        }
    }
}

/// What a mountpoint is where something of ours is mounted, which is asked how full it is, too; `None` when it does not tell in time.
fn look(mountpoint: &Path) -> Option<nix::Result<FileStat>> {
    let (sender, answers) = mpsc::channel();
    let asked = mountpoint.to_owned();
    // A call that waits for a mount that hangs cannot be taken back.
    let started = std::thread::Builder::new().name("caifs-look".into()).spawn(move || {
        // Who has not waited does not want to know any more.
        let _ = sender.send(statvfs(&asked).and_then(|_| stat(&asked)));
    });
    match started {
        Ok(_) => answers.recv_timeout(ANSWER_LIMIT).ok(),
        Err(_) => Some(Err(Errno::EAGAIN)),
    }
}

fn no_answer(mountpoint: &Path) -> MountError {
    let problem = format!(
        "the process of the mount there does not answer within {} s (`caifs abort` ends a mount that hangs)",
        ANSWER_LIMIT.as_secs()
    );
    MountError::mountpoint(mountpoint, problem)
}

fn mountpoint_error(path: &Path, error: &io::Error) -> MountError {
    match error.kind() {
        io::ErrorKind::NotFound => MountError::mountpoint(path, "does not exist"),
        _ => MountError::mountpoint(path, error.to_string()),
    }
}

fn check_kind(path: &Path, mode: mode_t, root_kind: FileKind) -> Result<(), MountError> {
    let kind = mode & SFlag::S_IFMT.bits();
    match root_kind {
        FileKind::Directory if kind == libc::S_IFDIR => Ok(()),
        FileKind::Directory => Err(MountError::mountpoint(path, "is not a directory")),
        _ if kind == libc::S_IFREG => Ok(()),
        _ => Err(MountError::mountpoint(path, "is not a regular file, as a mount of a single file needs")),
    }
}

/// `None` when the kernel does not allow it to us.
fn mount_directly(request: &AttachRequest<'_>, mountpoint: &Path) -> Result<Option<OwnedFd>, MountError> {
    let device = match OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(device) => device,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(None),
        Err(error) => return Err(MountError::NoFuse(error)),
    };
    let root_mode = if request.root_kind == FileKind::Directory { libc::S_IFDIR } else { libc::S_IFREG };
    let mut data = format!(
        "fd={},rootmode={root_mode:o},user_id={},group_id={},default_permissions",
        device.as_raw_fd(),
        geteuid(),
        getegid()
    );
    if request.allow_other {
        data.push_str(",allow_other");
    }
    data.push_str(&request.kernel.data(takes_contexts(request.kernel)));
    let source = CString::new(request.source.as_bytes()).map_err(|_| MountError::Source)?;
    let flags = request.flags.kernel();
    match nix::mount::mount(Some(source.as_c_str()), mountpoint, Some(FS_TYPE), flags, Some(data.as_str())) {
        Ok(()) => Ok(Some(device.into())),
        Err(Errno::EPERM) => Ok(None),
        Err(Errno::ENODEV) => Err(MountError::NoFuse(Errno::ENODEV.into())),
        Err(error) => Err(MountError::Kernel(error.into())),
    }
}

/// Whether the kernel takes the labels, if there are any; mount(8) leaves them out where it does not, and so do we.
fn takes_contexts(options: &KernelOptions) -> bool {
    if !options.has_contexts() {
        return false;
    }
    let has_selinux = knows_labels();
    if !has_selinux {
        tracing::warn!("SELinux is not enabled: context= and the like are left out");
    }
    has_selinux
}

/// Whether the kernel has SELinux enabled.
pub(super) fn knows_labels() -> bool {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    known.lines().any(|line| line.ends_with("\tselinuxfs"))
}
