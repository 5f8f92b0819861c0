//! The bytes of an index, where they lie.
//!
//! A small index is copied into memory, so that a writer that changes the file in place cannot change what is mounted. A large one is
//! mapped, so that a mount costs the same for every size; [`IndexBytes::check_unchanged`] then notices a changed file.

use std::fs::{File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::sys::MappedFile;

/// The largest index that is copied, in bytes: some 25,000 chunks, 1.6 GB of content at the usual chunk size. A copy of
/// this size takes well under a millisecond.
const MAX_COPIED_BYTES: u64 = 1 << 20;

/// The largest index that is taken from elsewhere than a local file, in bytes: some 25 million chunks.
pub const MAX_INDEX_BYTES: u64 = 1 << 30;

/// Where an index that came from elsewhere is laid down when there is no cache directory.
const SPOOL_DIR: &str = "/var/tmp";

/// The bytes of an index file.
#[derive(Debug)]
pub enum IndexBytes {
    /// A copy.
    Copied(Vec<u8>),
    /// The mapped file, with what it was when it was mapped.
    Mapped(MappedIndex),
}

/// A mapped index file.
#[derive(Debug)]
pub struct MappedIndex {
    map: MappedFile,
    file: File,
    path: PathBuf,
    version: Version,
}

/// What changes when a file is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Version {
    size: u64,
    mtime: (i64, i64),
}

impl Version {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Self { size: metadata.size(), mtime: (metadata.mtime(), metadata.mtime_nsec()) }
    }
}

impl IndexBytes {
    /// Opens an index file, without reading more than its first bytes when it is large.
    ///
    /// # Errors
    /// The file cannot be opened, is not a regular file, or cannot be read or mapped.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let metadata = file.metadata()?;
        if metadata.is_dir() {
            return Err(io::Error::from_raw_os_error(libc::EISDIR));
        }
        if !metadata.is_file() || metadata.size() <= MAX_COPIED_BYTES {
            // Pipes and devices have no size to go by; the limit stands for them too.
            let mut bytes = Vec::with_capacity(metadata.size() as usize);
            Read::by_ref(&mut file).take(MAX_COPIED_BYTES + 1).read_to_end(&mut bytes)?;
            if bytes.len() as u64 > MAX_COPIED_BYTES {
                return Err(io::Error::other("the file grows while it is read, or is not a regular file"));
            }
            return Ok(Self::Copied(bytes));
        }
        let map = MappedFile::new(&file)?;
        Ok(Self::Mapped(MappedIndex { map, version: Version::of(&metadata), file, path: path.to_owned() }))
    }

    /// Opens an index file as [`IndexBytes::open`] does, but makes a copy of a large one, too, in a file without a name: what is
    /// checked of the bytes now holds for as long as they are used, whoever may write to the file.
    ///
    /// # Errors
    /// As [`IndexBytes::open`]; or the copy cannot be made.
    pub fn copy(path: &Path, dir: Option<&Path>) -> io::Result<Self> {
        let mapped = match Self::open(path)? {
            Self::Mapped(mapped) => mapped,
            copied => return Ok(copied),
        };
        let Some(mut copy) = unnamed_file(dir) else {
            let why = format!(
                "an index of this size cannot be checked: no copy of it can be made in {SPOOL_DIR} or the cache"
            );
            return Err(io::Error::other(why));
        };
        // One byte more would tell of a file that grew.
        let size = mapped.version.size;
        let copied = io::copy(&mut (&mapped.file).take(size.saturating_add(1)), &mut copy)?;
        if copied != size {
            return Err(io::Error::other("the file changes while it is read"));
        }
        Self::laid_down(copy)
    }

    /// Holds an index that came from elsewhere. A large one is laid down in a file without a name, in `dir` or a directory for such
    /// files, and mapped, so that it does not count as memory.
    ///
    /// # Errors
    /// It is larger than any index may be, or cannot be laid down.
    pub fn hold(bytes: Vec<u8>, dir: Option<&Path>) -> io::Result<Self> {
        if bytes.len() as u64 <= MAX_COPIED_BYTES {
            return Ok(Self::Copied(bytes));
        }
        if bytes.len() as u64 > MAX_INDEX_BYTES {
            return Err(io::Error::other(format!("an index of more than {MAX_INDEX_BYTES} bytes is not taken")));
        }
        let written = |dir: Option<&Path>| {
            let mut file = unnamed_file(dir)?;
            file.write_all(&bytes).ok().map(|()| file)
        };
        let Some(file) = written(dir).or_else(|| written(None)) else {
            tracing::warn!("a large index is held in memory: it cannot be laid down in {SPOOL_DIR} or the cache");
            return Ok(Self::Copied(bytes));
        };
        Self::laid_down(file)
    }

    fn laid_down(file: File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let map = MappedFile::new(&file)?;
        let path = PathBuf::from("(laid down)");
        Ok(Self::Mapped(MappedIndex { map, version: Version::of(&metadata), file, path }))
    }

    /// Bytes that are held in memory.
    pub fn held_bytes(&self) -> usize {
        match self {
            Self::Copied(bytes) => bytes.len(),
            Self::Mapped(mapped) => mapped.map.held_bytes(),
        }
    }

    /// Checks that a mapped file is still what it was when it was opened. A copy cannot change.
    ///
    /// # Errors
    /// The file was written to or truncated.
    pub fn check_unchanged(&self) -> Result<(), String> {
        let Self::Mapped(mapped) = self else { return Ok(()) };
        let changed = |why: &str| Err(format!("index {} {why}; mount it again", mapped.path.display()));
        match mapped.file.metadata() {
            Ok(metadata) if Version::of(&metadata) == mapped.version => Ok(()),
            Ok(_) => changed("was changed while in use"),
            Err(_) => changed("can no longer be looked at"),
        }
    }
}

/// A file without a name in `dir`, or else in the directory for such files.
fn unnamed_file(dir: Option<&Path>) -> Option<File> {
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_TMPFILE | libc::O_EXCL).mode(0o600);
    dir.into_iter().chain([Path::new(SPOOL_DIR)]).find_map(|dir| options.open(dir).ok())
}

impl AsRef<[u8]> for IndexBytes {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Copied(bytes) => bytes,
            Self::Mapped(mapped) => mapped.map.as_ref(),
        }
    }
}
