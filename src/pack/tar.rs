//! Packing a directory into an archive: byte for byte what casync makes of it with the same feature flags.
//!
//! A walk over open directories, names in ascending order of bytes; every file is opened once and asked for its metadata
//! through that descriptor, so nothing of it can be exchanged in between. [`super::scan`] reads the metadata,
//! [`super::exclude`] says what is left out, [`Encoder`] writes.
//!
//! Invariant: what is written is a prefix of a sound archive. A file that shrinks or grows while it is read ends the
//! packing with its name, for its length is already written.

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, PosixFadviseAdvice, openat, posix_fadvise, readlinkat};
use nix::sys::stat::{FileStat, Mode, fstat, fstatat, major, minor};

use super::PackError;
use super::exclude::{EXCLUDE_FILE, MAX_EXCLUDE_BYTES, Rules};
use super::scan::{Scanner, Subject, path_in};
use crate::format::catar::node::{
    MODE_BLOCK_DEVICE, MODE_CHARACTER_DEVICE, MODE_DIRECTORY, MODE_REGULAR, MODE_SYMLINK, MODE_TYPE,
};
use crate::format::catar::{Content, ElementHeader, Encoder, FeatureFlags, Node};
use crate::sys::attributes::mount_id;
use crate::sys::read_at_nowait;
use crate::tree::table::pack::TablePacker;

/// The archive goes to the sink in pieces of about this size.
const PIECE_BYTES: usize = 1 << 20;
/// Files up to this size are collected with their metadata; larger ones go to the sink as they are read.
const SMALL_FILE_BYTES: u64 = 256 << 10;

/// So many files of a directory are opened ahead, so that the disk works on them all, while files are not in memory.
const AHEAD_FILES: usize = 16;
/// Below so many directories nothing is opened ahead: the files wait while subdirectories are packed, and the number of
/// open files is limited.
const AHEAD_DEPTH: usize = 16;
/// Of each file opened ahead, so much is asked for.
const AHEAD_BYTES: libc::off_t = 1 << 20;
/// After a file that was not in memory, so many files are expected to be like it.
const COLD_FILES: u32 = 256;

/// How a directory is packed.
#[derive(Debug, Clone)]
pub struct TarOptions {
    /// What is recorded. `EXCLUDE_NODUMP`, `EXCLUDE_FILE` and `EXCLUDE_SUBMOUNTS` say what is left out.
    pub feature_flags: FeatureFlags,
    /// Leaves out what is mounted below the root, as `EXCLUDE_SUBMOUNTS` does, which is then set.
    pub one_file_system: bool,
    /// Records no times of modification: all are 0.
    pub no_time: bool,
}

impl Default for TarOptions {
    fn default() -> Self {
        Self { feature_flags: FeatureFlags::CASYNC_DEFAULT, one_file_system: false, no_time: false }
    }
}

/// What was packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TarStats {
    /// Regular files.
    pub n_files: u64,
    /// Directories, the root among them.
    pub n_directories: u64,
    /// Symlinks, devices, FIFOs, sockets.
    pub n_others: u64,
    /// Files left out, because of an exclude file, the nodump flag, a mount, or a type that is not recorded. What is below
    /// a directory that is left out is not counted.
    pub n_excluded: u64,
    /// Files that went away between their directory's listing and their turn.
    pub n_vanished: u64,
    /// Content of regular files.
    pub payload_bytes: u64,
    /// Length of the archive.
    pub archive_bytes: u64,
}

/// Packs the directory `root` into an archive that is written to `sink`. Nothing is flushed.
///
/// # Errors
/// A file cannot be read, changes its length while it is read, or cannot be recorded; or the sink fails. What was written
/// until then is no archive.
pub fn tar(root: &Path, options: &TarOptions, sink: &mut dyn Write) -> Result<TarStats, PackError> {
    tar_with_table(root, options, sink, None)
}

/// As [`tar`], with a metadata table that is told of everything that is packed.
///
/// # Errors
/// As [`tar`]; or the table cannot be written.
pub fn tar_with_table(
    root: &Path,
    options: &TarOptions,
    sink: &mut dyn Write,
    table: Option<&mut TablePacker>,
) -> Result<TarStats, PackError> {
    let mut flags = options.feature_flags.normalised();
    if options.one_file_system {
        flags = flags.with(FeatureFlags::EXCLUDE_SUBMOUNTS);
    }
    let mut packer = Packer {
        flags,
        scanner: Scanner::new(flags, options.no_time),
        encoder: Encoder::new(flags),
        table,
        sink,
        root,
        open: Vec::new(),
        buffer: Vec::new(),
        no_atime: OFlag::O_NOATIME,
        n_cold: 0,
        stats: TarStats::default(),
    };
    packer.root()?;
    while let Some(directory) = packer.open.last_mut() {
        match directory.names.next() {
            Some(listed) => packer.child(listed)?,
            None => packer.leave()?,
        }
    }
    packer.encoder.finish().map_err(|error| packer.refused(None, &error))?;
    packer.drain(0)?;
    packer.stats.archive_bytes = packer.encoder.offset();
    Ok(packer.stats)
}

struct Packer<'a> {
    flags: FeatureFlags,
    scanner: Scanner,
    encoder: Encoder,
    table: Option<&'a mut TablePacker>,
    sink: &'a mut dyn Write,
    root: &'a Path,
    open: Vec<OpenDirectory>,
    /// For the payload of one file at a time.
    buffer: Vec<u8>,
    /// `O_NOATIME` as long as nobody objected.
    no_atime: OFlag,
    /// For so many files to come, it pays to ask the disk early.
    n_cold: u32,
    stats: TarStats,
}

struct OpenDirectory {
    name: CString,
    dir: Dir,
    /// Children still to be packed, in ascending order.
    names: std::vec::IntoIter<Listed>,
    rules: Rules,
    /// Which mount the directory is on, if that matters.
    mount_id: u64,
}

struct Listed {
    name: CString,
    /// What the listing said; not every file system says it.
    file_type: Option<Type>,
    /// A regular file that was opened ahead.
    opened: Option<OwnedFd>,
}

impl Packer<'_> {
    fn root(&mut self) -> Result<(), PackError> {
        let failed = |error: Errno| PackError::file(self.root, &error.into());
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = nix::fcntl::open(self.root, flags, Mode::empty()).map_err(failed)?;
        let stat = fstat(&fd).map_err(failed)?;
        self.enter(fd, None, &stat, Rules::default()).map(drop)
    }

    /// Packs a directory's ENTRY and opens it for its children; false if it is left out.
    fn enter(
        &mut self,
        fd: OwnedFd,
        name: Option<&CStr>,
        stat: &FileStat,
        mut rules: Rules,
    ) -> Result<bool, PackError> {
        let failed = |packer: &Self, error: &io::Error| PackError::file(&packer.path(name), error);
        let content = Content::Directory { first_child: 0 };
        let node = self.scanner.node(Subject::Open(fd.as_fd()), stat, content, name.is_none());
        let Some(node) = node.map_err(|error| failed(self, &error))? else { return Ok(false) };
        self.start(name, &node)?;
        self.stats.n_directories += 1;
        let file_system = self.scanner.file_system(fd.as_fd(), stat).map_err(|error| failed(self, &error))?;
        let mount_id = match self.flags.has(FeatureFlags::EXCLUDE_SUBMOUNTS) {
            true => mount_id(&fd, c"").map_err(|error| failed(self, &error))?,
            false => 0,
        };
        let mut dir = Dir::from_fd(fd).map_err(|error| failed(self, &error.into()))?;
        let names = match file_system.is_virtual {
            true => Vec::new(),
            false => list(&mut dir).map_err(|error| failed(self, &error.into()))?,
        };
        let is_listed = names.binary_search_by(|listed| listed.name.as_c_str().cmp(EXCLUDE_FILE)).is_ok();
        if is_listed && self.flags.has(FeatureFlags::EXCLUDE_FILE) {
            self.read_exclude_file(dir.as_fd(), name, &mut rules)?;
        }
        let name = name.unwrap_or_default().to_owned();
        self.open.push(OpenDirectory { name, dir, names: names.into_iter(), rules, mount_id });
        Ok(true)
    }

    fn leave(&mut self) -> Result<(), PackError> {
        self.encoder.end_directory().map_err(|error| self.refused(None, &error))?;
        if let Some(table) = &mut self.table {
            table.end_directory(self.encoder.offset()).map_err(|error| table_error(&error))?;
        }
        self.open.pop();
        self.drain(PIECE_BYTES)
    }

    /// Packs the next child of the directory opened last.
    fn child(&mut self, mut listed: Listed) -> Result<(), PackError> {
        if self.n_cold > 0 && self.open.len() <= AHEAD_DEPTH {
            self.open_ahead();
        }
        match self.child_or_error(&mut listed) {
            // Gone since its directory was listed: as if it had gone before.
            Err(Failure::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
                self.stats.n_vanished += 1;
                Ok(())
            }
            Err(Failure::Io(error)) => Err(PackError::file(&self.path(Some(&listed.name)), &error)),
            Err(Failure::Pack(error)) => Err(error),
            Ok(true) => self.drain(PIECE_BYTES),
            Ok(false) => {
                self.stats.n_excluded += 1;
                Ok(())
            }
        }
    }

    /// Packs a child; false if it is left out. `NotFound` comes only as long as nothing of it is written.
    fn child_or_error(&mut self, listed: &mut Listed) -> Result<bool, Failure> {
        let name = listed.name.as_c_str();
        let Some(parent) = self.open.last() else { return Ok(false) };
        let dir = parent.dir.as_fd();
        let mut stat = None;
        let is_directory = match listed.file_type {
            Some(file_type) => file_type == Type::Directory,
            None => file_type(stat.insert(fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW)?)) == MODE_DIRECTORY,
        };
        if parent.rules.excludes(name, is_directory) {
            return Ok(false);
        }
        if self.flags.has(FeatureFlags::EXCLUDE_SUBMOUNTS) && mount_id(dir, name)? != parent.mount_id {
            return Ok(false);
        }
        let is_file = match stat {
            Some(stat) => file_type(&stat) == MODE_REGULAR,
            None => listed.file_type == Some(Type::File),
        };
        if !is_directory && !is_file {
            let stat = match stat {
                Some(stat) => stat,
                None => fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW)?,
            };
            return self.other(name, &stat);
        }
        let fd = match listed.opened.take() {
            Some(fd) => fd,
            None => open_child(&parent.dir, name, is_directory, &mut self.no_atime)?,
        };
        let stat = fstat(&fd)?;
        match file_type(&stat) {
            MODE_DIRECTORY => {
                let rules = self.open.last().map(|parent| parent.rules.below(name)).unwrap_or_default();
                Ok(self.enter(fd, Some(name), &stat, rules)?)
            }
            MODE_REGULAR => self.file(name, File::from(fd), &stat),
            _ => Err(io::Error::other("became another type of file while packed").into()),
        }
    }

    /// Opens the next files of the directory and has the disk read them.
    fn open_ahead(&mut self) {
        let Some(mut parent) = self.open.pop() else { return };
        let next = parent.names.as_mut_slice().iter_mut().take(AHEAD_FILES);
        for listed in next.filter(|listed| listed.file_type == Some(Type::File) && listed.opened.is_none()) {
            // What fails here fails again, and is then reported, when it is the file's turn.
            let Ok(fd) = open_child(&parent.dir, &listed.name, false, &mut self.no_atime) else { continue };
            let _ = posix_fadvise(&fd, 0, AHEAD_BYTES, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
            listed.opened = Some(fd);
        }
        self.open.push(parent);
    }

    fn file(&mut self, name: &CStr, mut file: File, stat: &FileStat) -> Result<bool, Failure> {
        let is_virtual = self.scanner.file_system(file.as_fd(), stat)?.is_virtual;
        let size = if is_virtual { 0 } else { u64::try_from(stat.st_size).unwrap_or(0) };
        let content = Content::Payload { size, offset: 0 };
        let Some(node) = self.scanner.node(Subject::Open(file.as_fd()), stat, content, false)? else {
            return Ok(false);
        };
        self.start(Some(name), &node)?;
        self.stats.n_files += 1;
        self.stats.payload_bytes += size;
        let packed = match size {
            0 => Ok(()),
            1..=SMALL_FILE_BYTES => self.small_payload(&file, size as usize),
            _ => self.large_payload(&mut file, size),
        };
        // Its header is written: now it must not be taken for a file that was never there.
        packed.map(|()| true).map_err(|error| Failure::Pack(self.failed(name, error)))
    }

    fn failed(&self, name: &CStr, failure: Failure) -> PackError {
        match failure {
            Failure::Io(error) => PackError::file(&self.path(Some(name)), &error),
            Failure::Pack(error) => error,
        }
    }

    /// Reads a file that fits into the buffer. One byte more is asked for than the file has: a read that gives less than
    /// was asked for has met the end, and no second one is needed.
    fn small_payload(&mut self, file: &File, size: usize) -> Result<(), Failure> {
        if self.buffer.len() <= size {
            self.buffer.resize(PIECE_BYTES, 0);
        }
        // What is in memory comes at once; what is not says that it pays to ask the disk early.
        let mut n = read_at_nowait(file, &mut self.buffer[..=size], 0)?.unwrap_or(0);
        self.n_cold = if n < size { COLD_FILES } else { self.n_cold.saturating_sub(1) };
        while n < size {
            match file.read_at(&mut self.buffer[n..=size], n as u64) {
                Ok(0) => break,
                Ok(more) => n += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        check_length(n as u64, size as u64)?;
        self.encoder.payload(&self.buffer[..size]).map_err(io::Error::other)?;
        Ok(())
    }

    /// Passes a file on as it is read.
    fn large_payload(&mut self, file: &mut File, size: u64) -> Result<(), Failure> {
        self.drain(0)?;
        // Advice that is not taken changes nothing.
        let _ = posix_fadvise(&*file, 0, 0, PosixFadviseAdvice::POSIX_FADV_SEQUENTIAL);
        self.buffer.resize(PIECE_BYTES, 0);
        let mut done = 0;
        while done < size {
            let n = read(file, &mut self.buffer)? as u64;
            if n == 0 || n > size - done {
                check_length(done + n, size)?;
            }
            self.sink.write_all(&self.buffer[..n as usize]).map_err(|error| sink_error(&error))?;
            self.encoder.advance(n).map_err(io::Error::other)?;
            done += n;
        }
        let more = read(file, &mut self.buffer[..1])? as u64;
        check_length(done + more, size)?;
        Ok(())
    }

    /// Packs a symlink, device, FIFO or socket.
    fn other(&mut self, name: &CStr, stat: &FileStat) -> Result<bool, Failure> {
        if !self.encoder.records(stat.st_mode) {
            return Ok(false);
        }
        let Some(parent) = self.open.last() else { return Ok(false) };
        let content = match file_type(stat) {
            MODE_SYMLINK => Content::Symlink(readlinkat(&parent.dir, name)?.as_bytes().to_vec()),
            MODE_BLOCK_DEVICE | MODE_CHARACTER_DEVICE => {
                Content::Device { major: major(stat.st_rdev), minor: minor(stat.st_rdev) }
            }
            MODE_REGULAR | MODE_DIRECTORY => {
                return Err(io::Error::other("became another type of file while packed").into());
            }
            _ => Content::None,
        };
        let path = path_in(parent.dir.as_fd(), name);
        let Some(node) = self.scanner.node(Subject::Path(&path), stat, content, false)? else { return Ok(false) };
        self.start(Some(name), &node)?;
        self.stats.n_others += 1;
        Ok(true)
    }

    fn read_exclude_file(&self, dir: BorrowedFd<'_>, name: Option<&CStr>, rules: &mut Rules) -> Result<(), PackError> {
        let path = || self.path(name).join(OsStr::from_bytes(EXCLUDE_FILE.to_bytes()));
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
        let fd = match openat(dir, EXCLUDE_FILE, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::ENOENT) => return Ok(()),
            Err(error) => return Err(PackError::file(&path(), &error.into())),
        };
        let mut text = Vec::new();
        let read = File::from(fd).take(MAX_EXCLUDE_BYTES).read_to_end(&mut text);
        read.map_err(|error| PackError::file(&path(), &error))?;
        if text.len() as u64 >= MAX_EXCLUDE_BYTES {
            return Err(PackError::File { path: path(), reason: "too large for an exclude file".to_owned() });
        }
        rules.add(&text).map_err(|line| {
            let reason = format!("line {line} is no pattern (. and .. and an empty path have no meaning there)");
            PackError::File { path: path(), reason }
        })
    }

    fn start(&mut self, name: Option<&CStr>, node: &Node) -> Result<(), PackError> {
        let (offset, n_buffered) = (self.encoder.offset(), self.encoder.buffered().len());
        let name_bytes = name.map(CStr::to_bytes);
        self.encoder.start_node(name_bytes, node).map_err(|error| self.refused(name, &error))?;
        let Some(table) = &mut self.table else { return Ok(()) };
        // What a reader will find, whatever the encoder made of the node.
        let filename_bytes = name_bytes.map_or(0, |name| ElementHeader::BYTES + name.len() + 1);
        let head = self.encoder.buffered().get(n_buffered + filename_bytes..).unwrap_or_default();
        table.node(name_bytes, offset + filename_bytes as u64, head).map_err(|error| table_error(&error))
    }

    /// Gives what the encoder holds to the sink if it is at least so much.
    fn drain(&mut self, least_bytes: usize) -> Result<(), PackError> {
        if self.encoder.buffered().len() < least_bytes {
            return Ok(());
        }
        self.sink.write_all(self.encoder.buffered()).map_err(|error| sink_error(&error))?;
        self.encoder.clear();
        Ok(())
    }

    /// An error of the encoder, with the file's name.
    fn refused(&self, name: Option<&CStr>, error: &dyn std::error::Error) -> PackError {
        PackError::File { path: self.path(name), reason: format!("cannot be archived: {error}") }
    }

    /// Path of the directory opened last, or of a child of it.
    fn path(&self, name: Option<&CStr>) -> PathBuf {
        let components = self.open.iter().skip(1).map(|directory| directory.name.as_c_str()).chain(name);
        let mut path = self.root.to_owned();
        path.extend(components.map(|component| OsStr::from_bytes(component.to_bytes())));
        path
    }
}

/// Why a file is not packed.
enum Failure {
    /// Something about the file itself.
    Io(io::Error),
    /// Everything else, already in words.
    Pack(PackError),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Errno> for Failure {
    fn from(error: Errno) -> Self {
        Self::Io(error.into())
    }
}

impl From<PackError> for Failure {
    fn from(error: PackError) -> Self {
        Self::Pack(error)
    }
}

/// Opens a regular file or directory, without waiting should it have become a FIFO.
fn open_child(dir: &Dir, name: &CStr, is_directory: bool, no_atime: &mut OFlag) -> io::Result<OwnedFd> {
    let mut flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    if is_directory {
        flags |= OFlag::O_DIRECTORY;
    }
    match openat(dir, name, flags | *no_atime, Mode::empty()) {
        // Only a file's owner may read it without a trace.
        Err(Errno::EPERM) if !no_atime.is_empty() => {
            *no_atime = OFlag::empty();
            Ok(openat(dir, name, flags, Mode::empty())?)
        }
        opened => Ok(opened?),
    }
}

fn file_type(stat: &FileStat) -> u32 {
    stat.st_mode & MODE_TYPE
}

/// A directory's names in ascending order of bytes.
fn list(dir: &mut Dir) -> nix::Result<Vec<Listed>> {
    let mut names = Vec::new();
    for entry in dir.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push(Listed { name: name.to_owned(), file_type: entry.file_type(), opened: None });
        }
    }
    names.sort_unstable_by(|one, other| one.name.cmp(&other.name));
    Ok(names)
}

fn read(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match file.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => return read,
        }
    }
}

fn check_length(found: u64, announced: u64) -> io::Result<()> {
    match found {
        _ if found == announced => Ok(()),
        _ if found < announced => Err(io::Error::other("shrank while packed")),
        _ => Err(io::Error::other("grew while packed")),
    }
}

/// An error of the metadata table.
fn table_error(error: &io::Error) -> PackError {
    PackError::file(Path::new("the metadata table"), error)
}

/// An error of the sink: of the pack room itself if it comes from there.
fn sink_error(error: &io::Error) -> PackError {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<PackError>()) {
        Some(inner) => inner.clone(),
        None => PackError::file(Path::new("the archive"), error),
    }
}
