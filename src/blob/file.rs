//! A byte stream that is a plain local file (a `.catar`): read where it lies, without chunks.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::BlobError;
use super::source::Version;
use crate::sys;

/// A local file as a byte stream.
#[derive(Debug, Clone)]
pub struct FileBlob {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    file: File,
    path: PathBuf,
    size: u64,
    /// Device and inode number.
    id: (u64, u64),
    /// What it was when it was opened.
    version: Version,
}

impl FileBlob {
    /// Opens a regular file.
    ///
    /// # Errors
    /// The file cannot be opened or is not a regular file.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        Ok(Self {
            shared: Arc::new(Shared {
                size: metadata.size(),
                id: (metadata.dev(), metadata.ino()),
                version: Version::of(&metadata),
                file,
                path: path.to_owned(),
            }),
        })
    }

    /// Length in bytes when it was opened.
    pub fn size(&self) -> u64 {
        self.shared.size
    }

    /// Which file it is, and its size and time of change when it was opened.
    pub fn identity(&self) -> String {
        let Shared { id: (device, ino), version, .. } = &*self.shared;
        format!("file {device}:{ino} {version:?}")
    }

    /// Exactly `n_bytes` from `offset`. What the page cache holds is read on the calling thread, the rest on a blocking one.
    ///
    /// # Errors
    /// The file cannot be read, or was changed since it was opened.
    pub async fn read_at(&self, offset: u64, n_bytes: usize) -> Result<Bytes, BlobError> {
        let mut bytes = vec![0; n_bytes];
        if let Ok(Some(n_read)) = sys::read_at_nowait(&self.shared.file, &mut bytes, offset)
            && n_read == n_bytes
        {
            self.shared.check_unchanged()?;
            return Ok(bytes.into());
        }
        let shared = Arc::clone(&self.shared);
        let read = tokio::task::spawn_blocking(move || {
            shared.file.read_exact_at(&mut bytes, offset).map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => shared.error("it became shorter while in use"),
                _ => shared.error(error),
            })?;
            // After the read: what was written before it is noticed now.
            shared.check_unchanged()?;
            Ok(Bytes::from(bytes))
        });
        read.await.unwrap_or(Err(BlobError::Abandoned))
    }
}

impl Shared {
    fn check_unchanged(&self) -> Result<(), BlobError> {
        match self.file.metadata() {
            Ok(metadata) if Version::of(&metadata) == self.version => Ok(()),
            Ok(_) => Err(self.error("it was changed while in use; mount it again")),
            Err(error) => Err(self.error(error)),
        }
    }

    fn error(&self, reason: impl ToString) -> BlobError {
        BlobError::File { path: self.path.clone(), reason: reason.to_string() }
    }
}
