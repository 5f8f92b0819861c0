//! One file's metadata, as far as an archive records it, with as few system calls as that takes.
//!
//! An open file or directory costs fstat, one list of attributes and, where the flags ask for them, one call each for
//! inode flags and project id. Names of owners and facts about file systems are asked for once.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::stat::FileStat;
use nix::sys::statfs::fstatfs;
use nix::unistd::{Gid, Group, Uid, User};

use crate::format::catar::flags::{from_fat_attrs, from_fs_flags};
use crate::format::catar::node::{MODE_DIRECTORY, MODE_REGULAR, MODE_SYMLINK, MODE_TYPE};
use crate::format::catar::{Acl, Content, Entry, FeatureFlags, Node, PosixAcl};
use crate::sys::attributes::{
    self, AttributesOf, get_xattr, inode_flags, list_xattrs, project_id, subvolume_is_read_only,
};

/// The `FS_*_FL` flag of files that backups leave out.
const NODUMP: u32 = 0x40;
/// Inode number of the root of every subvolume of btrfs.
const BTRFS_SUBVOLUME_INO: u64 = 256;
const BTRFS: u64 = 0x9123_683e;
const MSDOS: u64 = 0x4d44;

/// File systems that show the kernel's state rather than keep files (linux/magic.h): their directories are archived empty,
/// as casync does.
const VIRTUAL: [u64; 21] = [
    0x0187,      // autofs
    0x4249_4e4d, // binfmt_misc
    0xcafe_4a11, // bpf
    0x27_e0eb,   // cgroup
    0x6367_7270, // cgroup2
    0x6265_6570, // configfs
    0x6462_6720, // debugfs
    0x1cd1,      // devpts
    0xde5e_81e4, // efivarfs
    0x6573_5543, // fusectl
    0x9584_58f6, // hugetlbfs
    0x1980_0202, // mqueue
    0x6e66_7364, // nfsd
    0x6e73_6673, // nsfs
    0x9fa0,      // proc
    0x6165_676c, // pstore
    0x6759_6969, // rpc_pipefs
    0x7363_6673, // securityfs
    0xf97c_ff8c, // selinux
    0x6265_6572, // sysfs
    0x7472_6163, // tracefs
];

/// What kind of file system a device is.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct FileSystem {
    /// Shows the kernel's state: directories count as empty, files as of no length.
    pub is_virtual: bool,
    is_fat: bool,
    is_btrfs: bool,
}

/// Reads metadata, and remembers what does not change between files.
#[derive(Debug)]
pub(super) struct Scanner {
    flags: FeatureFlags,
    no_time: bool,
    users: HashMap<u32, Option<Vec<u8>>>,
    groups: HashMap<u32, Option<Vec<u8>>>,
    file_systems: HashMap<u64, FileSystem>,
    /// Names of attributes, to be used again.
    names: Vec<u8>,
}

/// A file to be scanned: open, or by its path where it cannot be opened.
#[derive(Debug, Clone, Copy)]
pub(super) enum Subject<'a> {
    /// A regular file or directory.
    Open(BorrowedFd<'a>),
    /// Anything else.
    Path(&'a CString),
}

impl Scanner {
    /// Reads what these flags record.
    pub(super) fn new(flags: FeatureFlags, no_time: bool) -> Self {
        let (users, groups, file_systems) = Default::default();
        Self { flags, no_time, users, groups, file_systems, names: Vec::new() }
    }

    /// The kind of the file system that an open file is on.
    pub(super) fn file_system(&mut self, fd: BorrowedFd<'_>, stat: &FileStat) -> io::Result<FileSystem> {
        if let Some(known) = self.file_systems.get(&stat.st_dev) {
            return Ok(*known);
        }
        let magic = fstatfs(fd)?.filesystem_type().0 as u64 & 0xffff_ffff;
        let file_system =
            FileSystem { is_virtual: VIRTUAL.contains(&magic), is_fat: magic == MSDOS, is_btrfs: magic == BTRFS };
        self.file_systems.insert(stat.st_dev, file_system);
        Ok(file_system)
    }

    /// A file's node; `None` if it is marked as not to be dumped and the flags leave such files out (the root never is).
    pub(super) fn node(
        &mut self,
        subject: Subject<'_>,
        stat: &FileStat,
        content: Content,
        is_root: bool,
    ) -> io::Result<Option<Node>> {
        let flags = self.flags;
        let mut entry = Entry {
            feature_flags: flags,
            mode: stat.st_mode,
            flags: 0,
            uid: u64::from(stat.st_uid),
            gid: u64::from(stat.st_gid),
            mtime_ns: if self.no_time { 0 } else { mtime_ns(stat)? },
        };
        let mut projid = None;
        if let Subject::Open(fd) = subject {
            let file_system = self.file_system(fd, stat)?;
            let asked = FeatureFlags::CHATTR.with(FeatureFlags::EXCLUDE_NODUMP);
            let bits = if flags.has_any(asked) { inode_flags(fd)?.unwrap_or(0) } else { 0 };
            if bits & NODUMP != 0 && flags.has(FeatureFlags::EXCLUDE_NODUMP) && !is_root {
                return Ok(None);
            }
            entry.flags = from_fs_flags(bits);
            if file_system.is_fat && flags.has_any(FeatureFlags::FAT_ATTRS) {
                entry.flags |= from_fat_attrs(attributes::fat_attributes(fd)?.unwrap_or(0));
            }
            let is_directory = stat.st_mode & MODE_TYPE == MODE_DIRECTORY;
            if file_system.is_btrfs && is_directory && stat.st_ino == BTRFS_SUBVOLUME_INO {
                entry.flags |= match subvolume_is_read_only(fd)? {
                    Some(true) => FeatureFlags::SUBVOLUME.with(FeatureFlags::SUBVOLUME_RO).0,
                    Some(false) => FeatureFlags::SUBVOLUME.0,
                    None => 0,
                };
            }
            if flags.has(FeatureFlags::QUOTA_PROJID) {
                projid = project_id(fd)?.map(u64::from);
            }
        }
        let mut node = Node::new(entry, content);
        node.quota_projid = projid;
        if flags.has(FeatureFlags::USER_NAMES) {
            node.user = self.user(stat.st_uid);
            node.group = self.group(stat.st_gid);
        }
        self.attributes(subject, &mut node)?;
        Ok(Some(node))
    }

    fn attributes(&mut self, subject: Subject<'_>, node: &mut Node) -> io::Result<()> {
        let flags = self.flags;
        let file_type = node.file_type();
        let asked = FeatureFlags::XATTRS.with(FeatureFlags::ACL).with(FeatureFlags::SELINUX).with(FeatureFlags::FCAPS);
        // Symlinks have none but a label (desync also stores `trusted.` ones).
        let is_symlink = file_type == MODE_SYMLINK;
        if !flags.has_any(asked) || (is_symlink && !flags.has(FeatureFlags::SELINUX) && !flags.is_desync()) {
            return Ok(());
        }
        let of = match subject {
            Subject::Open(fd) => AttributesOf::Open(fd),
            Subject::Path(path) => AttributesOf::Path(path),
        };
        let mut names = std::mem::take(&mut self.names);
        names.clear();
        list_xattrs(of, &mut names)?;
        for name in names.split_inclusive(|byte| *byte == 0) {
            let Ok(name) = CStr::from_bytes_with_nul(name) else { continue };
            let mut value = Vec::new();
            // An attribute may go away between its listing and its reading.
            if self.records(name.to_bytes(), file_type) && get_xattr(of, name, &mut value)? {
                self.take(node, name.to_bytes(), value)?;
            }
        }
        self.names = names;
        self.name_acl(&mut node.acl);
        Ok(())
    }

    /// Whether an extended attribute is recorded, in whatever form.
    fn records(&self, name: &[u8], file_type: u32) -> bool {
        let flags = self.flags;
        let is_symlink = file_type == MODE_SYMLINK;
        match name {
            _ if flags.is_desync() => true,
            b"system.posix_acl_access" => flags.has(FeatureFlags::ACL) && !is_symlink,
            b"system.posix_acl_default" => flags.has(FeatureFlags::ACL) && file_type == MODE_DIRECTORY,
            b"security.selinux" => flags.has(FeatureFlags::SELINUX),
            b"security.capability" => flags.has(FeatureFlags::FCAPS) && file_type == MODE_REGULAR,
            _ => {
                let is_plain = matches!(file_type, MODE_REGULAR | MODE_DIRECTORY);
                let is_stored = name.starts_with(b"user.") || name.starts_with(b"trusted.");
                flags.has(FeatureFlags::XATTRS) && is_plain && is_stored
            }
        }
    }

    /// Puts an extended attribute where an archive has it.
    fn take(&self, node: &mut Node, name: &[u8], mut value: Vec<u8>) -> io::Result<()> {
        let wrong = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        match name {
            _ if self.flags.is_desync() => node.xattrs.push((name.to_vec(), value)),
            b"system.posix_acl_access" => node.acl.set_access(PosixAcl::parse(&value).map_err(wrong)?),
            b"system.posix_acl_default" => node.acl.set_default(PosixAcl::parse(&value).map_err(wrong)?),
            b"security.selinux" => {
                if value.last() == Some(&0) {
                    value.pop();
                }
                node.selinux = Some(value).filter(|label| !label.is_empty());
            }
            b"security.capability" => node.fcaps = Some(value),
            _ => node.xattrs.push((name.to_vec(), value)),
        }
        Ok(())
    }

    /// Names the users and groups of an ACL.
    fn name_acl(&mut self, acl: &mut Acl) {
        if !self.flags.has(FeatureFlags::USER_NAMES) {
            return;
        }
        for entry in acl.users.iter_mut().chain(&mut acl.default_users) {
            entry.name = u32::try_from(entry.id).ok().and_then(|id| self.user(id));
        }
        for entry in acl.groups.iter_mut().chain(&mut acl.default_groups) {
            entry.name = u32::try_from(entry.id).ok().and_then(|id| self.group(id));
        }
    }

    fn user(&mut self, uid: u32) -> Option<Vec<u8>> {
        // A name that cannot be had is as good as none: the number is recorded.
        let ask = || User::from_uid(Uid::from_raw(uid)).ok().flatten().map(|user| user.name.into_bytes());
        self.users.entry(uid).or_insert_with(ask).clone()
    }

    fn group(&mut self, gid: u32) -> Option<Vec<u8>> {
        let ask = || Group::from_gid(Gid::from_raw(gid)).ok().flatten().map(|group| group.name.into_bytes());
        self.groups.entry(gid).or_insert_with(ask).clone()
    }
}

/// Time of modification in nanoseconds since 1970; those that 64 bits cannot hold are an error.
fn mtime_ns(stat: &FileStat) -> io::Result<i64> {
    let ns = stat.st_mtime.checked_mul(1_000_000_000).and_then(|ns| ns.checked_add(stat.st_mtime_nsec));
    ns.ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, "the time of modification is beyond what archives hold")
    })
}

/// Path by which the kernel finds a file in an open directory, for calls that take no directory.
pub(super) fn path_in(dir: BorrowedFd<'_>, name: &CStr) -> CString {
    use std::os::fd::AsRawFd;
    let mut path = format!("/proc/self/fd/{}/", dir.as_fd().as_raw_fd()).into_bytes();
    path.extend_from_slice(name.to_bytes());
    // Neither part has a NUL.
    CString::new(path).unwrap_or_default()
}
