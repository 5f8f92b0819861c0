//! One function for each request of the kernel: calls the volume, converts, replies. Nothing else.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags,
    KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyBmap, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr,
    Request, TimeOrNow, WriteFlags,
};
use tokio::runtime::Handle;

use super::answer::{Answerer, Asked, Refuse};
use super::convert::{file_attr, file_type};
use super::gate::Gate;
use super::late::LateReads;
use super::listing::Listings;
use super::passthrough::Opens;
use super::requests::Requests;
use crate::report::Report;
use crate::volume::{Attr, EioSite, FOREVER, ROOT_INO, Volume, VolumeError};

/// Requests the kernel may have waiting in the background (read-ahead and asynchronous direct reads). With 64, a window of 16 MiB
/// is in flight at 1 MiB a request and still some at 128 KiB.
const MAX_BACKGROUND: u16 = 64;

/// Bytes an entry takes in a READDIR reply, at the least: `fuse_dirent` of 24 bytes and a name padded to 8.
const DIRENT_BYTES: usize = 32;

/// The same in a READDIRPLUS reply: `fuse_entry_out` of 128 bytes more.
const DIRENT_PLUS_BYTES: usize = 160;

/// Bytes of a listing worth preparing: the buffer of glibc's readdir(3), which newer kernels pass on. (fuser does not tell the size.)
const READDIR_BYTES: usize = 32 << 10;

/// The part of a request's time after which a failure is late: half of it, so that two that are not take no longer than one may.
const LATE_SHARE: u32 = 2;

/// What is in memory or on a disk here is read in this time.
const AT_HAND: Duration = Duration::from_millis(100);

/// Listing offsets of `.` and `..`; those of the volume come after.
const N_DOTS: u64 = 2;

/// `FS_IOC_GETFLAGS` and its 32-bit form, as chattr(1) and lsattr(1) use them (linux/fs.h).
const FS_IOC_GETFLAGS: [u32; 2] = [0x8008_6601, 0x8004_6601];

/// `FS_IOC_SETFLAGS` and its 32-bit form.
const FS_IOC_SETFLAGS: [u32; 2] = [0x4008_6602, 0x4004_6602];

/// Serves a volume to the kernel.
#[derive(Debug)]
pub(super) struct Adapter {
    volume: Arc<dyn Volume>,
    answerer: Answerer,
    report: Arc<Report>,
    /// Whether the kernel may read files itself, as it was asked.
    passthrough: Option<bool>,
    opens: Opens,
    listings: Arc<Listings>,
    late_reads: Arc<LateReads>,
    /// The kernel goes without OPENDIR once it is told ENOSYS.
    no_opendir: bool,
}

/// Calls a method of the volume inside a future, so that everything it does is under the answerer's guard.
macro_rules! ask {
    ($self:ident, $op:literal, ($ino:expr, $offset:expr, $n_bytes:expr), $reply:ident, |$volume:ident| $call:expr, $send:expr) => {{
        let $volume = Arc::clone(&$self.volume);
        let asked = Asked { op: $op, ino: $ino, offset: $offset, n_bytes: $n_bytes };
        $self.answerer.answer(asked, async move { $call.await }, $reply, $send)
    }};
    ($self:ident, $op:literal, $ino:expr, $reply:ident, |$volume:ident| $call:expr, $send:expr) => {
        ask!($self, $op, ($ino, 0, 0), $reply, |$volume| $call, $send)
    };
}

impl Adapter {
    pub(super) fn new(
        volume: Arc<dyn Volume>,
        requests: Arc<Requests>,
        passthrough: Option<bool>,
        runtime: Handle,
        report: Arc<Report>,
        gate: Arc<Gate>,
    ) -> Self {
        let answerer = Answerer::new(runtime, requests, Arc::clone(&report), gate);
        Self {
            volume,
            answerer,
            report,
            passthrough,
            opens: Opens::unknown(),
            listings: Arc::new(Listings::new(false)),
            late_reads: Arc::default(),
            no_opendir: false,
        }
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        self.listings = Arc::new(Listings::negotiate(&*self.volume, config));
        // One by one: fuser refuses a whole set for one flag that the kernel lacks. Each is an improvement only.
        let mut enable = |flag| config.add_capabilities(flag).is_ok();
        enable(InitFlags::FUSE_PARALLEL_DIROPS);
        enable(InitFlags::FUSE_CACHE_SYMLINKS);
        enable(InitFlags::FUSE_EXPLICIT_INVAL_DATA);
        enable(InitFlags::FUSE_ASYNC_DIO);
        enable(InitFlags::FUSE_HAS_IOCTL_DIR);
        // A directory whose names change must be asked for them anew each time, which only an answer to OPENDIR can say.
        // So must one whose names may be kept without attributes.
        self.no_opendir = self.volume.lasts(ROOT_INO) == FOREVER
            && !self.listings.are_sampled()
            && enable(InitFlags::FUSE_NO_OPENDIR_SUPPORT);
        if self.volume.has_acls() && !enable(InitFlags::FUSE_POSIX_ACL) {
            // Without it the group bits of a file with an ACL, which hold the ACL's mask, would be taken for its group's.
            tracing::warn!("this kernel does not enforce POSIX ACLs on FUSE mounts: permissions are wider than stored");
        }
        let _ = config.set_max_background(MAX_BACKGROUND);
        self.opens = Opens::negotiate(&*self.volume, self.passthrough, config);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.as_bytes().to_vec();
        let (names_last, asked) = (self.volume.lasts(parent.0), Arc::clone(&self.volume));
        let listings = Arc::clone(&self.listings);
        let send = move |reply: ReplyEntry, found: Option<Attr>| match found {
            Some(attr) => {
                listings.looked_up(attr.kind);
                reply.entry_with_ttls(&asked.lasts(attr.ino), &names_last, &file_attr(&attr), Generation(0));
            }
            None => reply.entry(&names_last, &no_such_entry(), Generation(0)),
        };
        ask!(self, "lookup", parent.0, reply, |volume| volume.lookup(parent.0, &name), send);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let lasts = self.volume.lasts(ino.0);
        ask!(self, "getattr", ino.0, reply, |volume| volume.getattr(ino.0), move |reply: ReplyAttr, attr| {
            reply.attr(&lasts, &file_attr(&attr));
        });
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        ask!(self, "readlink", ino.0, reply, |volume| volume.readlink(ino.0), |reply: ReplyData, target| {
            reply.data(&target);
        });
    }

    fn open(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.opens.open(&*self.volume, ino.0, reply, &self.report);
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.opens.release(ino.0, fh);
        reply.ok();
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let report = Arc::clone(&self.report);
        let bytes = offset..offset.saturating_add(size.into());
        let io_timeout = self.answerer.io_timeout();
        let at_hand = AT_HAND.min(io_timeout / (2 * LATE_SHARE));
        let reading = (flags.0 & libc::O_DIRECT == 0)
            .then(|| self.late_reads.begin(ino.0, bytes.clone(), io_timeout / LATE_SHARE));
        let is_again = reading.is_some() && self.late_reads.take(ino.0, bytes);
        ask!(
            self,
            "read",
            (ino.0, offset, size),
            reply,
            |volume| async move {
                let read = volume.read(ino.0, offset, size);
                let content = match is_again {
                    false => read.await,
                    // Of all that was asked for at first one chunk may have failed, and this be another.
                    true => tokio::time::timeout(at_hand, read).await.unwrap_or_else(|_| {
                        let why = "a read that failed late is not tried again at once";
                        Err(VolumeError::io(EioSite::Deadline, why))
                    }),
                }?;
                if let Some(reading) = reading {
                    reading.succeed();
                }
                Ok(content)
            },
            move |reply: ReplyData, content| {
                report.read_bytes.add(content.len() as u64);
                reply.data(&content);
            }
        );
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        // ENOSYS makes the kernel go without it.
        reply.error(Errno::ENOSYS);
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.no_opendir {
            true => reply.error(Errno::ENOSYS),
            false if self.volume.lasts(ino.0) < FOREVER => reply.opened(FileHandle(0), FopenFlags::empty()),
            false => reply.opened(FileHandle(0), self.listings.open_flags(ino.0)),
        }
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, reply: ReplyDirectory) {
        let from = offset.saturating_sub(N_DOTS);
        let max_entries = READDIR_BYTES / DIRENT_BYTES;
        let listings = Arc::clone(&self.listings);
        ask!(
            self,
            "readdir",
            (ino.0, offset, 0),
            reply,
            |volume| volume.readdir(ino.0, from, max_entries),
            move |mut reply: ReplyDirectory, listing| {
                for (dot_offset, dot_ino, name) in dots(ino.0, listing.parent_ino) {
                    if offset < dot_offset && reply.add(INodeNo(dot_ino), dot_offset, FileType::Directory, name) {
                        return reply.ok();
                    }
                }
                let mut n_files = 0;
                for entry in &listing.entries {
                    let name = OsStr::from_bytes(&entry.name);
                    let kind = file_type(entry.attr.kind);
                    if reply.add(INodeNo(entry.attr.ino), N_DOTS + entry.next_offset, kind, name) {
                        break;
                    }
                    n_files += u32::from(kind != FileType::Directory);
                }
                listings.listed(ino.0, n_files);
                reply.ok();
            }
        );
    }

    fn readdirplus(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, reply: ReplyDirectoryPlus) {
        let from = offset.saturating_sub(N_DOTS);
        let extent = self.listings.extent(&*self.volume, ino.0, offset);
        let max_entries = READDIR_BYTES / DIRENT_PLUS_BYTES;
        let names_last = self.volume.lasts(ino.0);
        ask!(
            self,
            "readdirplus",
            (ino.0, offset, 0),
            reply,
            |volume| volume.readdir(ino.0, from, max_entries),
            move |mut reply: ReplyDirectoryPlus, listing| {
                for (dot_offset, dot_ino, name) in dots(ino.0, listing.parent_ino) {
                    let mut attr = no_such_entry();
                    // The kernel takes only number and type of these two, and must not learn attributes from them.
                    attr.kind = FileType::Directory;
                    attr.ino = INodeNo(dot_ino);
                    if offset < dot_offset
                        && reply.add(INodeNo(dot_ino), dot_offset, name, &FOREVER, &attr, Generation(0))
                    {
                        return reply.ok();
                    }
                }
                for entry in listing.entries.iter().take(extent.n_given(&listing.entries)) {
                    let (attr, name) = (file_attr(&entry.attr), OsStr::from_bytes(&entry.name));
                    // What is unknown is looked up before it is used for anything.
                    let lasts = if entry.is_attr_known { names_last } else { Duration::ZERO };
                    if reply.add(attr.ino, N_DOTS + entry.next_offset, name, &lasts, &attr, Generation(0)) {
                        break;
                    }
                }
                reply.ok();
            }
        );
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        const BLOCK_BYTES: u32 = 4096;
        let stat = self.volume.stat();
        let n_blocks = stat.size_bytes.div_ceil(u64::from(BLOCK_BYTES));
        reply.statfs(n_blocks, 0, 0, stat.n_files, 0, BLOCK_BYTES, 255, BLOCK_BYTES);
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let name = name.as_bytes().to_vec();
        ask!(
            self,
            "getxattr",
            ino.0,
            reply,
            |volume| volume.getxattr(ino.0, &name),
            move |reply: ReplyXattr, value| {
                match value {
                    Some(value) => send_xattr(reply, size, &value),
                    None => reply.error(Errno::ENODATA),
                }
            }
        );
    }

    fn listxattr(&self, req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let privileged = req.uid() == 0;
        ask!(self, "listxattr", ino.0, reply, |volume| volume.listxattr(ino.0, privileged), move |reply, names| {
            let mut list = Vec::new();
            for name in &names {
                list.extend_from_slice(name);
                list.push(0);
            }
            send_xattr(reply, size, &list);
        });
    }

    fn ioctl(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        if FS_IOC_SETFLAGS.contains(&cmd) {
            return reply.error(Errno::EROFS);
        }
        if !FS_IOC_GETFLAGS.contains(&cmd) {
            return reply.error(Errno::ENOTTY);
        }
        ask!(self, "ioctl", ino.0, reply, |volume| volume.inode_flags(ino.0), |reply: ReplyIoctl, flags| {
            reply.ioctl(0, &flags.to_ne_bytes());
        });
    }

    fn bmap(&self, _req: &Request, _ino: INodeNo, _blocksize: u32, _idx: u64, reply: ReplyBmap) {
        reply.error(Errno::ENOSYS);
    }

    fn lseek(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _offset: i64, _whence: i32, reply: ReplyLseek) {
        // The kernel then answers by itself: a file is data up to its end. No holes are recorded in these formats.
        reply.error(Errno::ENOSYS);
    }

    // The kernel refuses changes by itself, since the mount is read-only; these answer for one remounted read-write.

    fn setattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        _size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(Errno::EROFS);
    }

    fn mknod(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn mkdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn unlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn rmdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn symlink(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _link_name: &OsStr,
        _target: &std::path::Path,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn rename(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _newparent: INodeNo,
        _newname: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn link(&self, _req: &Request, _ino: INodeNo, _newparent: INodeNo, _newname: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::EROFS);
    }

    fn setxattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn removexattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn create(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::EROFS);
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _length: u64,
        _mode: i32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }
}

/// The two names every directory has: listing offset after it, inode, name.
fn dots(ino: u64, parent_ino: u64) -> [(u64, u64, &'static str); 2] {
    [(1, ino, "."), (2, parent_ino, "..")]
}

/// An entry with inode number 0: the kernel keeps it as "no such name".
fn no_such_entry() -> fuser::FileAttr {
    fuser::FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: SystemTime::UNIX_EPOCH,
        mtime: SystemTime::UNIX_EPOCH,
        ctime: SystemTime::UNIX_EPOCH,
        crtime: SystemTime::UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

/// Answers in the two steps of the protocol: the size when none is offered, else the value if it fits.
fn send_xattr(reply: ReplyXattr, size: u32, value: &[u8]) {
    match (size, u32::try_from(value.len())) {
        (0, Ok(n_bytes)) => reply.size(n_bytes),
        (_, Ok(n_bytes)) if n_bytes <= size => reply.data(value),
        _ => Refuse::refuse(reply, Errno::ERANGE),
    }
}
