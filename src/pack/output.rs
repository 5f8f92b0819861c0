//! Files that are made: each appears whole or not at all, and says its name in errors.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::PackError;
use crate::store::atomic;

/// A file being written beside its place; see [`atomic::AtomicFile`].
#[derive(Debug)]
pub struct AtomicFile {
    file: atomic::AtomicFile,
    target: PathBuf,
}

impl AtomicFile {
    /// Begins a file with this mode (less the umask).
    pub fn create(target: &Path, mode: u32) -> Result<Self, PackError> {
        let created = atomic::AtomicFile::create(target, mode);
        let file = created.map_err(|error| PackError::file(target, &error))?;
        Ok(Self { file, target: target.to_owned() })
    }

    /// Puts the file into its place, replacing what was there, after its content has reached the disk.
    pub fn commit(self) -> Result<(), PackError> {
        self.file.commit().map_err(|error| PackError::file(&self.target, &error))
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
    use std::fs;

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
