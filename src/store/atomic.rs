//! Local files that appear whole or not at all.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// How often a temporary name may be taken before it is an error.
const MAX_NAME_TRIES: u32 = 16;

/// A file being written under a temporary name beside its place (`.#NAME<16 hex digits>`, as casync has it). Dropped
/// before [`AtomicFile::commit`] it is removed, and what was there before stays.
#[derive(Debug)]
pub struct AtomicFile {
    file: File,
    temporary: PathBuf,
    target: PathBuf,
    is_committed: bool,
}

impl AtomicFile {
    /// Begins a file with this mode (less the umask).
    ///
    /// # Errors
    /// The target is not the name of a file, or its directory cannot be written.
    pub fn create(target: &Path, mode: u32) -> io::Result<Self> {
        let Some(name) = target.file_name() else {
            return Err(io::Error::new(ErrorKind::IsADirectory, "not the name of a file"));
        };
        let mut tries = 0;
        loop {
            let mut temporary_name = OsString::from(".#");
            temporary_name.push(name);
            // A hasher's seed is the one source of random numbers in the standard library.
            temporary_name.push(format!("{:016x}", RandomState::new().hash_one(tries)));
            let temporary = target.with_file_name(temporary_name);
            match OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary) {
                Ok(file) => return Ok(Self { file, temporary, target: target.to_owned(), is_committed: false }),
                Err(error) if error.kind() == ErrorKind::AlreadyExists && tries < MAX_NAME_TRIES => tries += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// Puts the file into its place, replacing what was there, after its content has reached the disk.
    ///
    /// # Errors
    /// The content cannot be written to the disk, or not be put into its place.
    pub fn commit(mut self) -> io::Result<()> {
        self.file.sync_all().and_then(|()| fs::rename(&self.temporary, &self.target))?;
        self.is_committed = true;
        Ok(())
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.is_committed {
            // A file that cannot be removed is a leftover, and the error that led here is the one to tell.
            drop(fs::remove_file(&self.temporary));
        }
    }
}
