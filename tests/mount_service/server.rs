//! The process that mounts in these tests: this very test program, started again with `CAIFS_TEST_MOUNT` set.
//!
//! It has to fork before any thread exists, and the test harness starts threads before it runs a test; so a constructor, run by
//! the loader before `main`, looks for the variable and does not come back when it is there.

use std::ffi::OsStr;
use std::io;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use caifs::mount::options::{KernelOptions, VfsFlags};
use caifs::mount::run::{MountOutcome, MountRequest, Place, Served, mount};
use caifs::mount::{MountError, Service};
use caifs::volume::{Answer, Attr, FileKind, Listing, Volume, VolumeError, VolumeStat};
use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData,
    ReplyEntry, Request, Session, SessionACL,
};

/// What the one file of the test file system holds.
pub const CONTENT: &[u8] = b"Hello from a test\n";

/// How the mounting process behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    /// As it should.
    Good,
    /// The volume cannot be opened.
    OpenFails,
    /// Opening panics.
    OpenPanics,
    /// The process is killed while opening.
    OpenDies,
    /// Opening takes a second, or for ever if the caller gives half a second.
    OpenIsSlow,
    /// The handshake with the kernel fails.
    ServeFails,
}

const BEHAVIOURS: [Behaviour; 6] = [
    Behaviour::Good,
    Behaviour::OpenFails,
    Behaviour::OpenPanics,
    Behaviour::OpenDies,
    Behaviour::OpenIsSlow,
    Behaviour::ServeFails,
];

/// A mount to ask for.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub source: String,
    pub mountpoint: PathBuf,
    pub place: Place,
    pub behaviour: Behaviour,
    pub root: FileKind,
    pub timeout: Duration,
    pub allow_other: Option<bool>,
}

impl Wanted {
    pub fn new(source: &str, mountpoint: impl Into<PathBuf>) -> Self {
        Self {
            source: source.into(),
            mountpoint: mountpoint.into(),
            place: Place::Background,
            behaviour: Behaviour::Good,
            root: FileKind::Directory,
            timeout: Duration::from_secs(20),
            allow_other: None,
        }
    }

    /// The variables that tell the process all this.
    pub fn tell(&self, command: &mut Command) {
        let behaviour = BEHAVIOURS.iter().position(|one| *one == self.behaviour).expect("all are listed");
        command
            .env("CAIFS_TEST_MOUNT", &self.source)
            .env("CAIFS_TEST_DIR", &self.mountpoint)
            .env("CAIFS_TEST_FOREGROUND", if self.place == Place::Foreground { "1" } else { "0" })
            .env("CAIFS_TEST_BEHAVIOUR", behaviour.to_string())
            .env("CAIFS_TEST_FILE", if self.root == FileKind::Regular { "1" } else { "0" })
            .env("CAIFS_TEST_TIMEOUT_MS", self.timeout.as_millis().to_string())
            .env("CAIFS_TEST_ALLOW_OTHER", self.allow_other.map(|yes| yes.to_string()).unwrap_or_default());
    }

    fn told() -> Option<Self> {
        let var = |name: &str| std::env::var(name).ok();
        Some(Self {
            source: var("CAIFS_TEST_MOUNT")?,
            mountpoint: std::env::var_os("CAIFS_TEST_DIR")?.into(),
            place: if var("CAIFS_TEST_FOREGROUND")? == "1" { Place::Foreground } else { Place::Background },
            behaviour: *BEHAVIOURS.get(var("CAIFS_TEST_BEHAVIOUR")?.parse::<usize>().ok()?)?,
            root: if var("CAIFS_TEST_FILE")? == "1" { FileKind::Regular } else { FileKind::Directory },
            timeout: Duration::from_millis(var("CAIFS_TEST_TIMEOUT_MS")?.parse().ok()?),
            allow_other: var("CAIFS_TEST_ALLOW_OTHER")?.parse().ok(),
        })
    }
}

extern "C" fn before_main() {
    if std::env::var_os("CAIFS_TEST_MOUNT").is_none() {
        return;
    }
    // What `main` of a Rust program would have seen to.
    #[allow(unsafe_code, reason = "as the runtime does it")]
    // SAFETY: ignoring a signal runs no code of ours.
    let _ =
        unsafe { nix::sys::signal::signal(nix::sys::signal::Signal::SIGPIPE, nix::sys::signal::SigHandler::SigIgn) };
    let wanted = Wanted::told().expect("all variables are set");
    std::process::exit(i32::from(serve(&wanted)));
}

#[allow(unsafe_code, reason = "only the loader runs before the threads of the test harness")]
// SAFETY: the loader calls the functions of this section without arguments that matter; ours has the C calling convention.
#[unsafe(link_section = ".init_array")]
#[used]
static BEFORE_MAIN: extern "C" fn() = before_main;

fn serve(wanted: &Wanted) -> u8 {
    let request = MountRequest {
        source: wanted.source.clone().into(),
        mountpoint: wanted.mountpoint.clone(),
        flags: VfsFlags::default(),
        kernel: KernelOptions::default(),
        allow_other: wanted.allow_other,
        place: wanted.place,
        ready_timeout: wanted.timeout,
        service: Service::default(),
    };
    let wanted = wanted.clone();
    let outcome = mount(
        &request,
        |_runtime, _on_file| match wanted.behaviour {
            Behaviour::OpenFails => Err("index x.caibx: it is no index".into()),
            Behaviour::OpenPanics => panic!("as asked for"),
            Behaviour::OpenDies => {
                nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL).expect("raise");
                Err("still alive".into())
            }
            Behaviour::OpenIsSlow => {
                let for_ever = wanted.timeout < Duration::from_secs(1);
                std::thread::sleep(if for_ever { Duration::from_secs(600) } else { Duration::from_secs(1) });
                Ok(Arc::new(RootOnly(wanted.root)))
            }
            Behaviour::Good | Behaviour::ServeFails => Ok(Arc::new(RootOnly(wanted.root))),
        },
        |Served { volume, fd, allow_other, .. }| {
            if wanted.behaviour == Behaviour::ServeFails {
                return Err(MountError::Serve(io::Error::other("as asked for")));
            }
            let acl = if allow_other { SessionACL::All } else { SessionACL::Owner };
            let session = Session::from_fd(Trivial(volume.root_kind()), fd, acl, fuser::Config::default())
                .map_err(MountError::Serve)?;
            Ok(move || session.run())
        },
    );
    match outcome {
        Ok(MountOutcome::Background { pid }) => {
            println!("{pid}");
            0
        }
        Ok(MountOutcome::Ended) => 0,
        Err(error) => {
            eprintln!("caifs: {error}");
            error.exit_code()
        }
    }
}

/// A volume that only has a kind of root; requests go to [`Trivial`].
#[derive(Debug)]
struct RootOnly(FileKind);

fn nothing<T: Send + 'static>() -> Answer<T> {
    Box::pin(async { Err(VolumeError::NotFound) })
}

impl Volume for RootOnly {
    fn getattr(&self, _ino: u64) -> Answer<Attr> {
        nothing()
    }
    fn lookup(&self, _parent: u64, _name: &[u8]) -> Answer<Option<Attr>> {
        nothing()
    }
    fn readlink(&self, _ino: u64) -> Answer<Bytes> {
        nothing()
    }
    fn read(&self, _ino: u64, _offset: u64, _len: u32) -> Answer<Bytes> {
        nothing()
    }
    fn readdir(&self, _ino: u64, _offset: u64, _max_entries: usize) -> Answer<Listing> {
        nothing()
    }
    fn listxattr(&self, _ino: u64, _privileged: bool) -> Answer<Vec<Bytes>> {
        nothing()
    }
    fn getxattr(&self, _ino: u64, _name: &[u8]) -> Answer<Option<Bytes>> {
        nothing()
    }
    fn inode_flags(&self, _ino: u64) -> Answer<u32> {
        nothing()
    }
    fn stat(&self) -> VolumeStat {
        VolumeStat { size_bytes: 0, n_files: 0 }
    }
    fn has_acls(&self) -> bool {
        false
    }
    fn root_kind(&self) -> FileKind {
        self.0
    }
}

/// A root that is a file, or a directory with the file `hello`.
struct Trivial(FileKind);

/// The kernel keeps nothing, so that every look at the mount needs the process.
const NEVER: Duration = Duration::ZERO;

impl Trivial {
    fn attr(&self, ino: INodeNo) -> FileAttr {
        let is_file = ino != INodeNo::ROOT || self.0 == FileKind::Regular;
        FileAttr {
            ino,
            size: if is_file { CONTENT.len() as u64 } else { 0 },
            blocks: 1,
            atime: SystemTime::UNIX_EPOCH,
            mtime: SystemTime::UNIX_EPOCH,
            ctime: SystemTime::UNIX_EPOCH,
            crtime: SystemTime::UNIX_EPOCH,
            kind: if is_file { FileType::RegularFile } else { FileType::Directory },
            perm: if is_file { 0o644 } else { 0o755 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Trivial {
    fn lookup(&self, _request: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == "hello" {
            reply.entry(&NEVER, &self.attr(INodeNo(2)), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&NEVER, &self.attr(ino));
    }

    fn read(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(CONTENT.len());
        let end = start.saturating_add(size as usize).min(CONTENT.len());
        reply.data(&CONTENT[start..end]);
    }
}
