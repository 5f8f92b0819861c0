//! Files that appear whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::PackError;

/// How often a temporary name may be taken before it is an error.
const MAX_NAME_TRIES: u32 = 16;

/// A file being written under a temporary name beside its place (`.#NAME<16 hex digits>`, as casync has it). Dropped
/// before [`AtomicFile::commit`] it is removed, and what was there before stays.
#[derive(Debug)]
pub struct AtomicFile {
    file: File,
    temporary: PathBuf,
    target: PathBuf,
    committed: bool,
}

impl AtomicFile {
    /// Begins a file with this mode (less the umask).
    pub fn create(target: &Path, mode: u32) -> Result<Self, PackError> {
        let fail = |error: io::Error| PackError::file(target, &error);
        let Some(name) = target.file_name() else {
            return Err(fail(io::Error::new(ErrorKind::IsADirectory, "not the name of a file")));
        };
        let mut tries = 0;
        loop {
            let mut temporary_name = std::ffi::OsString::from(".#");
            temporary_name.push(name);
            temporary_name.push(format!("{:016x}", RandomState::new().hash_one(tries)));
            let temporary = target.with_file_name(temporary_name);
            match OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary) {
                Ok(file) => return Ok(Self { file, temporary, target: target.to_owned(), committed: false }),
                Err(error) if error.kind() == ErrorKind::AlreadyExists && tries < MAX_NAME_TRIES => tries += 1,
                Err(error) => return Err(fail(error)),
            }
        }
    }

    /// Puts the file into its place, replacing what was there, after its content has reached the disk.
    pub fn commit(mut self) -> Result<(), PackError> {
        let done = self.file.sync_all().and_then(|()| fs::rename(&self.temporary, &self.target));
        done.map_err(|error| PackError::file(&self.target, &error))?;
        self.committed = true;
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
        if !self.committed {
            // A file that cannot be removed is a leftover, and the error that led here is the one to tell.
            drop(fs::remove_file(&self.temporary));
        }
    }
}

/// Writes a whole file, as [`AtomicFile`].
pub fn write_atomically(target: &Path, bytes: &[u8], mode: u32) -> Result<(), PackError> {
    let mut file = AtomicFile::create(target, mode)?;
    file.write_all(bytes).map_err(|error| PackError::file(target, &error))?;
    file.commit()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_a_committed_file_appears() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("x.caibx");
        let names = || -> Vec<_> {
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
        };
        let mut file = AtomicFile::create(&target, 0o644).unwrap();
        file.write_all(b"half").unwrap();
        assert!(names().len() == 1 && names()[0].starts_with(".#x.caibx"), "{:?}", names());
        drop(file);
        assert!(names().is_empty());
        write_atomically(&target, b"first", 0o644).unwrap();
        write_atomically(&target, b"second", 0o644).unwrap();
        assert_eq!((fs::read(&target).unwrap(), names()), (b"second".to_vec(), vec!["x.caibx".to_owned()]));
        let text = write_atomically(&dir.path().join("none/x"), b"", 0o644).unwrap_err().to_string();
        assert!(text.ends_with("none/x: No such file or directory"), "{text}");
        assert!(write_atomically(Path::new("/"), b"", 0o644).is_err());
    }
}
