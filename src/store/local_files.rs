//! Whole files in a local directory.
//!
//! A version is made of size, modification time and inode, so that a file that was replaced is another version even when it was
//! replaced within one tick of the clock. A file is written to a temporary one in the same directory, flushed and moved to its place.

use std::fs::{self, File, Metadata, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind, Read, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;

use super::files::{ReadWhole, WholeFile, changed};
use super::{FileInfo, FileStore, FileVersion, StoreError};

/// What names of unfinished files begin with.
const TEMPORARY_PREFIX: &str = ".tmp-caifs.";

/// How often a temporary name may be taken before it is an error.
const MAX_NAME_TRIES: u32 = 16;

/// A directory of files.
#[derive(Debug, Clone)]
pub struct LocalFiles {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    name: String,
}

impl LocalFiles {
    /// The files of a directory that exists.
    ///
    /// # Errors
    /// It does not, or is no directory.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let root = dir.into();
        let inner = Inner { name: root.display().to_string(), root };
        match fs::metadata(&inner.root) {
            Ok(metadata) if metadata.is_dir() => Ok(Self { inner: Arc::new(inner) }),
            Ok(_) => Err(inner.error(&inner.root, "not a directory")),
            Err(error) => Err(inner.error(&inner.root, plain_words(&error))),
        }
    }

    /// Does work on the files on a thread that may wait for the disk.
    fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, StoreError> + Send + 'static,
    ) -> BoxFuture<'static, Result<T, StoreError>> {
        let inner = Arc::clone(&self.inner);
        Box::pin(async move {
            let name = inner.name.clone();
            match tokio::task::spawn_blocking(move || work(&inner)).await {
                Ok(done) => done,
                Err(error) => Err(StoreError::new(name.clone(), name, error)),
            }
        })
    }
}

impl FileStore for LocalFiles {
    fn name(&self) -> &str {
        &self.inner.name
    }

    fn stat<'a>(&'a self, file: &'a str) -> BoxFuture<'a, Result<Option<FileInfo>, StoreError>> {
        let file = file.to_owned();
        self.work(move |inner| Ok(inner.open(&file)?.map(|(_, metadata, _)| info(&metadata))))
    }

    fn read_whole<'a>(
        &'a self,
        file: &'a str,
        known: Option<&'a FileVersion>,
        max_bytes: u64,
    ) -> BoxFuture<'a, Result<ReadWhole, StoreError>> {
        let (file, known) = (file.to_owned(), known.cloned());
        self.work(move |inner| {
            let Some((mut open, metadata, path)) = inner.open(&file)? else { return Ok(ReadWhole::Missing) };
            let info = info(&metadata);
            if known.is_some() && info.version == known {
                return Ok(ReadWhole::Unchanged);
            }
            if info.size > max_bytes {
                let reason = format!("it has {} bytes, more than the {max_bytes} allowed", info.size);
                return Err(inner.error(&path, reason));
            }
            let mut bytes = vec![0; info.size as usize];
            open.read_exact(&mut bytes).map_err(|error| inner.read_error(&path, &error))?;
            Ok(ReadWhole::Content(WholeFile { bytes: bytes.into(), info }))
        })
    }

    fn read_range<'a>(
        &'a self,
        file: &'a str,
        range: Range<u64>,
        version: Option<&'a FileVersion>,
    ) -> BoxFuture<'a, Result<Bytes, StoreError>> {
        let (file, version) = (file.to_owned(), version.cloned());
        self.work(move |inner| {
            let Some((open, metadata, path)) = inner.open(&file)? else {
                return Err(inner.error(&inner.root.join(&file), "No such file or directory"));
            };
            if version.is_some() && version != info(&metadata).version {
                return Err(changed(&inner.name, &path.display().to_string()));
            }
            if range.start > range.end || range.end > metadata.len() {
                let reason = format!("bytes {} to {} do not lie in it", range.start, range.end);
                return Err(inner.error(&path, reason));
            }
            let mut bytes = vec![0; (range.end - range.start) as usize];
            open.read_exact_at(&mut bytes, range.start).map_err(|error| inner.read_error(&path, &error))?;
            Ok(bytes.into())
        })
    }

    fn write<'a>(&'a self, file: &'a str, bytes: Bytes) -> BoxFuture<'a, Result<(), StoreError>> {
        let file = file.to_owned();
        self.work(move |inner| {
            let path = inner.root.join(&file);
            inner.replace(&path, &bytes).map_err(|error| inner.error(&path, plain_words(&error)))
        })
    }
}

impl Inner {
    fn error(&self, path: &Path, reason: impl ToString) -> StoreError {
        StoreError::new(self.name.clone(), path.display().to_string(), reason)
    }

    /// A file that ends before its length was cut while it was read.
    fn read_error(&self, path: &Path, error: &io::Error) -> StoreError {
        match error.kind() {
            ErrorKind::UnexpectedEof => changed(&self.name, &path.display().to_string()),
            _ => self.error(path, plain_words(error)),
        }
    }

    /// An open file with what is known of it; `None` when there is none.
    fn open(&self, file: &str) -> Result<Option<(File, Metadata, PathBuf)>, StoreError> {
        let path = self.root.join(file);
        // Without O_NONBLOCK a named pipe would hold the reader for ever.
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(&path);
        let open = match opened {
            Ok(open) => open,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
            Err(error) => return Err(self.error(&path, plain_words(&error))),
        };
        let metadata = open.metadata().map_err(|error| self.error(&path, plain_words(&error)))?;
        match metadata.is_file() {
            true => Ok(Some((open, metadata, path))),
            false => Err(self.error(&path, "not a regular file")),
        }
    }

    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let (mut open, temporary) = self.create_temporary()?;
        let written = open.write_all(bytes).and_then(|()| open.sync_all()).and_then(|()| fs::rename(&temporary, path));
        if written.is_err() {
            // The error that led here is the one to tell.
            drop(fs::remove_file(&temporary));
        }
        written
    }

    fn create_temporary(&self) -> io::Result<(File, PathBuf)> {
        let mut tries = 0;
        loop {
            // A hasher's seed is the one source of random numbers in the standard library.
            let random = RandomState::new().hash_one(tries);
            let path = self.root.join(format!("{TEMPORARY_PREFIX}{random:016x}"));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => return Ok((file, path)),
                Err(error) if error.kind() == ErrorKind::AlreadyExists && tries < MAX_NAME_TRIES => tries += 1,
                Err(error) => return Err(error),
            }
        }
    }
}

fn info(metadata: &Metadata) -> FileInfo {
    let version = format!("{}-{}.{:09}-{}", metadata.len(), metadata.mtime(), metadata.mtime_nsec(), metadata.ino());
    FileInfo {
        size: metadata.len(),
        version: Some(FileVersion(version)),
        mtime: metadata.modified().ok(),
        has_ranges: true,
    }
}

/// The reason without `(os error N)`, which says nothing to the reader of a message.
fn plain_words(error: &io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error") {
        Some((words, _)) => words.to_owned(),
        None => text,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_is_read_as_a_whole_by_ranges_and_not_at_all_when_it_was_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let files = LocalFiles::open(dir.path()).unwrap();
        assert_eq!(files.stat("x").await, Ok(None));
        assert_eq!(files.read_whole("x", None, 10).await, Ok(ReadWhole::Missing));
        files.write("x", Bytes::from_static(b"0123456789")).await.unwrap();
        let info = files.stat("x").await.unwrap().unwrap();
        let ReadWhole::Content(whole) = files.read_whole("x", None, 10).await.unwrap() else { panic!("it is there") };
        assert_eq!((&whole.bytes[..], &whole.info), (&b"0123456789"[..], &info));
        let version = info.version.as_ref();
        assert_eq!(files.read_whole("x", version, 10).await, Ok(ReadWhole::Unchanged));
        assert!(files.read_whole("x", None, 9).await.is_err());
        assert_eq!(files.read_range("x", 2..5, version).await.as_deref(), Ok(&b"234"[..]));
        assert_eq!(files.read_range("x", 10..10, version).await.as_deref(), Ok(&b""[..]));
        assert!(files.read_range("x", 2..11, None).await.is_err());
        assert!(files.read_range("y", 0..0, None).await.is_err());

        files.write("x", Bytes::from_static(b"9876543210")).await.unwrap();
        assert!(files.read_range("x", 2..5, version).await.is_err());
        assert_eq!(files.read_range("x", 2..5, None).await.as_deref(), Ok(&b"765"[..]));
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["x"], "no temporary file is left");
    }

    #[tokio::test]
    async fn only_regular_files_of_a_directory_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let files = LocalFiles::open(dir.path()).unwrap();
        fs::create_dir(dir.path().join("dir")).unwrap();
        nix::unistd::mkfifo(&dir.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        for name in ["dir", "fifo"] {
            assert!(files.stat(name).await.unwrap_err().reason.contains("not a regular file"));
            assert!(files.read_whole(name, None, 10).await.is_err());
        }
        assert!(files.write("dir", Bytes::new()).await.is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "no temporary file is left");
        assert!(LocalFiles::open(dir.path().join("none")).is_err());
        assert!(LocalFiles::open(dir.path().join("fifo")).is_err());
    }
}
