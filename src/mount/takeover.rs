//! A mount that outlives its process: the service manager keeps the connection to the kernel, and the next process goes on with it.
//!
//! * [`keep`] gives the manager open files: the connection, a sealed description of it, and, of a directory of indexes, the numbers that its
//!   files have, which every process goes on writing.
//! * [`Kept::find`] gets them back; [`Kept::attached`] is the mount they belong to, if it is still there.
//!
//! Meanwhile nobody answers: what asks the file system waits. So nothing here looks at the mountpoint, only at the mount table; and a
//! process that cannot go on makes the manager let go of the connection, so that those who wait get an error, and mounts anew.
//!
//! Invariant: only the same content is served on: inode numbers are places in it, and the kernel keeps what it has read.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use super::MountError;
use super::attach::{Attached, is_connected};
use super::detach::{How, unmount};
use super::notify::Manager;
use super::options::{KernelOptions, VfsFlags};
use super::table::{MountId, MountTable, resolve_parent};
use crate::config::ShowConfig;
use crate::fuse::Handover;
use crate::volume::{FileKind, Volume};

/// What the manager calls the connection.
const CONNECTION: &str = "caifs-fuse";

/// What the manager calls the description.
const DESCRIPTION: &str = "caifs-state";

/// What the manager calls the numbers.
const NUMBERS: &str = "caifs-numbers";

/// The form of the description; another one is not read.
const FORM: u32 = 3;

/// The longest description, in bytes.
const MAX_DESCRIPTION_BYTES: u64 = 64 << 10;

/// What is known of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Description {
    form: u32,
    /// As it was given: a symlink, perhaps, that cannot be followed while nobody answers.
    given: PathBuf,
    mountpoint: PathBuf,
    major: u32,
    minor: u32,
    /// What is served.
    content: String,
    /// What the kernel was told about how, and has kept of what it was shown.
    way: String,
    /// Whether the mountpoint is a regular file.
    is_file: bool,
    /// Whether numbers are kept beside it.
    #[serde(default)]
    has_numbers: bool,
    /// The kernel's first request.
    init: Vec<u8>,
}

/// What holds until the kernel forgets a mount: its source, flags and options, and how files are shown, since it keeps their attributes.
/// In a form of its own: another version of caifs compares with it. (Names in a directory of indexes hold for a moment only; whether they have
/// suffixes is in its identity all the same.)
pub(super) fn way(
    source: &OsStr,
    flags: VfsFlags,
    kernel: &KernelOptions,
    allow_other: bool,
    show: &ShowConfig,
) -> String {
    let number = |number: Option<u32>| number.map(|number| number.to_string()).unwrap_or_default();
    let ShowConfig { uid, gid, umask, uid_shift, keep_suffix: _, poll_interval: _ } = show;
    format!(
        "source={};flags={:x};kernel={};others={};uid={};gid={};umask={};shift={}",
        source.as_bytes().escape_ascii(),
        flags.kernel().bits(),
        kernel.data(true).trim_start_matches(','),
        u8::from(allow_other),
        number(*uid),
        number(*gid),
        number(umask.map(u32::from)),
        number(*uid_shift),
    )
}

/// Gives a mount to the manager to keep. Says in the log why not, where that cannot be. `way` tells options apart that hold until the
/// kernel forgets the mount.
pub(super) fn keep(
    manager: &Manager,
    attached: &Attached,
    handover: &Handover,
    given: &Path,
    volume: &dyn Volume,
    way: String,
) -> bool {
    let Some(init) = handover.agreed() else {
        tracing::warn!("this mount cannot be taken over by a restarted service: that needs Linux 6.9");
        return false;
    };
    let Some(content) = volume.identity() else {
        tracing::warn!("this mount cannot be taken over by a restarted service: its content has no version");
        return false;
    };
    let MountId { major, minor, .. } = attached.id();
    let mountpoint = attached.mountpoint().to_owned();
    let given = std::path::absolute(given).unwrap_or_else(|_| given.to_owned());
    let is_file = volume.root_kind() != FileKind::Directory;
    let init = init.to_vec();
    let described =
        Description { form: FORM, given, mountpoint, major, minor, content, way, is_file, has_numbers: false, init };
    let kept = numbers_of(volume).and_then(|numbers| {
        // The connection last: without what belongs to it, it is of no use to anybody.
        let description = Description { has_numbers: numbers.is_some(), ..described };
        manager.keep(DESCRIPTION, description.seal()?.as_fd())?;
        if let Some(numbers) = numbers {
            manager.keep(NUMBERS, numbers.as_fd())?;
        }
        manager.keep(CONNECTION, attached.connection())
    });
    match kept {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!("the service manager cannot keep the mount: {error}");
            forget(manager);
            false
        }
    }
}

/// A file of memory in which a volume writes its numbers from now on, if it needs that.
fn numbers_of(volume: &dyn Volume) -> io::Result<Option<OwnedFd>> {
    let fd = memfd_create(c"caifs-numbers", MFdFlags::MFD_CLOEXEC)?;
    Ok(volume.keep_numbers(File::from(fd.try_clone()?))?.then_some(fd))
}

/// Makes the manager let go of the mount.
pub(super) fn forget(manager: &Manager) {
    manager.forget(CONNECTION);
    manager.forget(DESCRIPTION);
    manager.forget(NUMBERS);
}

/// Lets go of a mount that nobody goes on with: who waits for it gets an error, and it is out of sight, since a look at it would wait for
/// ever. `kept` is what the manager kept, which may be nothing.
pub(super) fn give_up(manager: &Manager, kept: Vec<(String, OwnedFd)>) {
    if kept.is_empty() {
        return;
    }
    match Kept::find(kept) {
        Some(kept) => kept.give_up(manager),
        None => forget(manager),
    }
}

/// A mount that another process has served.
#[derive(Debug)]
pub(super) struct Kept {
    connection: OwnedFd,
    description: Description,
    numbers: Option<OwnedFd>,
}

impl Kept {
    /// The mount among what the manager kept; `None` when there is none, or one without its description.
    pub(super) fn find(kept: Vec<(String, OwnedFd)>) -> Option<Self> {
        let (mut connection, mut description, mut numbers) = (None, None, None);
        for (name, fd) in kept {
            match name.as_str() {
                CONNECTION => connection = Some(fd),
                DESCRIPTION => description = Description::read(fd),
                NUMBERS => numbers = Some(fd),
                _ => {}
            }
        }
        Some(Self { connection: connection?, description: description?, numbers })
    }

    /// As [`give_up`], wherever it is mounted.
    pub(super) fn give_up(self, manager: &Manager) {
        forget(manager);
        // The number of a mount that is gone passes to another one, which is nobody's to unmount here.
        let table = if is_connected(self.connection.as_fd()) { MountTable::read().ok() } else { None };
        let id = table.and_then(|table| self.id(&table));
        if let Some(Err(error)) = id.map(|id| unmount(id, How::Lazily)) {
            tracing::warn!("{error}");
        }
    }

    /// Whether the mountpoint is a regular file.
    pub(super) fn is_file(&self) -> bool {
        self.description.is_file
    }

    /// Whether the kernel was told the same when it was mounted; `way` as [`keep`] was told.
    pub(super) fn is_made_in(&self, way: &str) -> bool {
        self.description.way == way
    }

    /// How the session begins that goes on.
    pub(super) fn handover(&self) -> Handover {
        Handover::later(self.description.init.clone())
    }

    /// Whether it is the mount that is asked for, and still there. To be asked without looking at the mountpoint.
    pub(super) fn is_at(&self, mountpoint: &Path) -> bool {
        let Ok(table) = MountTable::read() else { return false };
        let is_named = std::path::absolute(mountpoint).is_ok_and(|path| path == self.description.given)
            || resolve_parent(mountpoint).is_ok_and(|path| path == self.description.mountpoint);
        is_named && self.id(&table).is_some() && is_connected(self.connection.as_fd())
    }

    /// The mount, to go on with the same content in the same way; `way` as [`keep`] was told. `keep_numbers` is the volume's.
    ///
    /// # Errors
    /// It is gone, or the content is another one, or what the kernel was told.
    pub(super) fn attached(
        &self,
        content: Option<&str>,
        way: &str,
        keep_numbers: impl FnOnce(File) -> io::Result<bool>,
    ) -> Result<(OwnedFd, Attached), MountError> {
        let Description { mountpoint, .. } = &self.description;
        let refused = |why| MountError::Takeover { mountpoint: mountpoint.clone(), why };
        if !self.is_made_in(way) {
            return Err(refused("its options are others now, and the kernel goes by those it was mounted with"));
        }
        if content != Some(self.description.content.as_str()) {
            return Err(refused("its content is not what was mounted there before; it cannot go on"));
        }
        if self.description.has_numbers && !self.numbers_go_on(keep_numbers) {
            return Err(refused("the inode numbers of its files are not known any more"));
        }
        let table = MountTable::read().map_err(MountError::Table)?;
        let id = self.id(&table).ok_or_else(|| refused("it was unmounted meanwhile"))?;
        let clone = || self.connection.try_clone().map_err(MountError::system("dup"));
        Ok((clone()?, Attached::of(mountpoint.clone(), id, clone()?)))
    }

    /// Has the numbers of the process before given on, and written down; whether that can be.
    fn numbers_go_on(&self, keep_numbers: impl FnOnce(File) -> io::Result<bool>) -> bool {
        let file = self.numbers.as_ref().and_then(|numbers| numbers.try_clone().ok());
        let kept = file.map(|file| keep_numbers(file.into()));
        if let Some(Err(error)) = &kept {
            tracing::warn!("inode numbers: {error}");
        }
        matches!(kept, Some(Ok(true)))
    }

    /// The number of the device stays as long as the connection; that of the mount may change with the namespace.
    fn id(&self, table: &MountTable) -> Option<MountId> {
        let Description { mountpoint, major, minor, .. } = &self.description;
        let there = table.at(mountpoint).filter(|entry| entry.is_ours())?;
        (there.id.major == *major && there.id.minor == *minor).then_some(there.id)
    }
}

impl Description {
    /// In an unnamed file that nobody can change.
    fn seal(&self) -> io::Result<OwnedFd> {
        let text = serde_json::to_vec(self)?;
        let fd = memfd_create(c"caifs-state", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        let mut file = File::from(fd);
        file.write_all(&text)?;
        let seals = SealFlag::F_SEAL_SEAL | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        Ok(file.into())
    }

    fn read(fd: OwnedFd) -> Option<Self> {
        let mut file = File::from(fd);
        let mut text = Vec::new();
        file.rewind().ok()?;
        file.take(MAX_DESCRIPTION_BYTES).read_to_end(&mut text).ok()?;
        let description: Self = serde_json::from_slice(&text).ok()?;
        (description.form == FORM).then_some(description)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::options::{MountOptions, Unknown};
    use super::*;

    fn description() -> Description {
        Description {
            form: FORM,
            given: "/mnt/link".into(),
            mountpoint: "/mnt/a b".into(),
            major: 0,
            minor: 77,
            content: "tree 00ff".into(),
            way: "nosuid".into(),
            is_file: false,
            has_numbers: false,
            init: vec![0, 1, 255],
        }
    }

    fn connection() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn a_description_comes_back_and_cannot_be_changed() {
        let sealed = description().seal().unwrap();
        assert!(File::from(sealed.try_clone().unwrap()).write_all(b"x").is_err());
        // Read twice: the place in the file is one for all who have it open.
        for _ in 0..2 {
            assert_eq!(Description::read(sealed.try_clone().unwrap()), Some(description()));
        }
    }

    #[test]
    fn the_way_of_a_mount_is_told_in_a_form_that_stays() {
        let told = |list: &str, allow_other| {
            let mut options = MountOptions::default();
            options.parse(list, Unknown::Refuse).unwrap();
            way(OsStr::new("https://h/a;b"), options.flags, &options.kernel, allow_other, &options.config.show)
        };
        // Whoever changes one of these changes FORM.
        assert_eq!(
            told("", true),
            "source=https://h/a;b;flags=7;kernel=;others=1;uid=;gid=;umask=;shift=",
            "nosuid, nodev and ro"
        );
        assert_eq!(
            told("noexec,suid,max_read=4096,context=a,uid=1,gid=2,umask=022,uid-shift=65536,poll-interval=1h", false),
            "source=https://h/a;b;flags=d;kernel=max_read=4096,context=\"a\";others=0;uid=1;gid=2;umask=18;shift=65536"
        );
    }

    #[test]
    fn only_both_files_are_a_mount() {
        let sealed = || (DESCRIPTION.to_owned(), description().seal().unwrap());
        let fuse = || (CONNECTION.to_owned(), connection());
        assert!(Kept::find(vec![]).is_none());
        assert!(Kept::find(vec![fuse()]).is_none());
        assert!(Kept::find(vec![sealed(), ("other".into(), connection())]).is_none());
        assert!(Kept::find(vec![fuse(), (DESCRIPTION.into(), connection())]).is_none(), "an empty description");
        let of_tomorrow = Description { form: FORM + 1, ..description() }.seal().unwrap();
        assert!(Kept::find(vec![fuse(), (DESCRIPTION.into(), of_tomorrow)]).is_none());
        let kept = Kept::find(vec![fuse(), sealed()]).unwrap();
        assert!(!kept.is_file() && !kept.is_at(Path::new("/mnt/a b")), "nothing is mounted there");
    }

    #[test]
    fn other_content_is_not_served_on() {
        let kept = || Kept { connection: connection(), description: description(), numbers: None };
        let none = |_: File| Ok(false);
        let refused = kept().attached(Some("tree 00fe"), "nosuid", none).unwrap_err().to_string();
        assert!(refused.starts_with("mount on /mnt/a b: its content is not what was mounted"), "{refused}");
        assert!(kept().attached(None, "nosuid", none).is_err());
        let refused = kept().attached(Some("tree 00ff"), "suid", none).unwrap_err().to_string();
        assert!(refused.starts_with("mount on /mnt/a b: its options are others now"), "{refused}");
        let gone = kept().attached(Some("tree 00ff"), "nosuid", none).unwrap_err().to_string();
        assert_eq!(gone, "mount on /mnt/a b: it was unmounted meanwhile");
    }

    #[test]
    fn numbers_that_were_kept_are_needed_to_go_on() {
        let description = || Description { has_numbers: true, ..description() };
        let told = |numbers: Option<OwnedFd>, works: io::Result<bool>| {
            let kept = Kept { connection: connection(), description: description(), numbers };
            kept.attached(Some("tree 00ff"), "nosuid", |_| works).unwrap_err().to_string()
        };
        let unknown = "mount on /mnt/a b: the inode numbers of its files are not known any more";
        assert_eq!(told(None, Ok(true)), unknown);
        assert_eq!(told(Some(connection()), Err(io::ErrorKind::InvalidData.into())), unknown);
        assert_eq!(told(Some(connection()), Ok(true)), "mount on /mnt/a b: it was unmounted meanwhile");
    }
}
