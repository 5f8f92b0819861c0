//! Whole files of a local directory, for whoever does not care where an index or archive lies.
//!
//! A version is size, modification time in nanoseconds, and inode. It is taken of the open file after the bytes were read: a
//! file that was changed before or meanwhile has another.

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::time::SystemTime;

use bytes::Bytes;
use futures_util::future::BoxFuture;

use super::StoreError;
use super::atomic::AtomicFile;
use super::files::{FileInfo, FileStore, FileVersion, Listed, ReadWhole, WholeFile, changed};
use super::listing::MAX_LISTED;
use super::local::plain_words;

/// The mode of a file that is written, less the umask.
const MODE: u32 = 0o666;

/// The files of a directory.
#[derive(Debug, Clone)]
pub struct LocalFiles {
    root: PathBuf,
    name: String,
}

impl LocalFiles {
    /// The files of this directory; whether it is there shows with the first file.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        let root = root.into();
        let name = root.display().to_string();
        Self { root, name }
    }

    /// The files of a directory that exists.
    ///
    /// # Errors
    /// It does not exist or is no directory.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let files = Self::new(root);
        match fs::metadata(&files.root) {
            Ok(metadata) if metadata.is_dir() => Ok(files),
            Ok(_) => Err(files.error(&files.root, &ErrorKind::NotADirectory.into())),
            Err(error) => Err(files.error(&files.root, &error)),
        }
    }

    fn path_of(&self, file: &str) -> Result<PathBuf, StoreError> {
        let mut parts = Path::new(file).components();
        let is_inside = !file.is_empty() && parts.all(|part| matches!(part, Component::Normal(_)));
        match is_inside {
            true => Ok(self.root.join(file)),
            false => Err(StoreError::new(&self.name, file, "not the name of a file in this directory")),
        }
    }

    fn error(&self, path: &Path, error: &io::Error) -> StoreError {
        StoreError::new(&self.name, path.display().to_string(), plain_words(error))
    }

    fn changed(&self, path: &Path) -> StoreError {
        changed(&self.name, &path.display().to_string())
    }

    /// Runs what blocks on a thread that may block.
    async fn blocking<T: Send + 'static>(
        &self,
        file: &str,
        work: impl FnOnce(&Self, &Path) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let path = self.path_of(file)?;
        let this = self.clone();
        match tokio::task::spawn_blocking(move || work(&this, &path)).await {
            Ok(done) => done,
            Err(error) => Err(StoreError::new(&self.name, file, error)),
        }
    }

    /// The open file, and what is known of it; `None` when there is no such file.
    fn open_file(&self, path: &Path) -> Result<Option<(File, Metadata)>, StoreError> {
        // Without O_NONBLOCK a named pipe would hold the reader for ever.
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path);
        let file = match opened {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.error(path, &error)),
        };
        let metadata = file.metadata().map_err(|error| self.error(path, &error))?;
        match metadata.is_file() {
            true => Ok(Some((file, metadata))),
            false => Err(self.error(path, &io::Error::other("not a regular file"))),
        }
    }

    fn read_whole_now(
        &self,
        path: &Path,
        known: Option<&FileVersion>,
        max_bytes: u64,
    ) -> Result<ReadWhole, StoreError> {
        let Some((file, before)) = self.open_file(path)? else { return Ok(ReadWhole::Missing) };
        if known == Some(&version(&before)) {
            return Ok(ReadWhole::Unchanged);
        }
        let n = before.len();
        if n > max_bytes {
            let reason = format!("it has {n} bytes, more than the {max_bytes} that this file may have");
            return Err(StoreError::new(&self.name, path.display().to_string(), reason));
        }
        let mut bytes = Vec::with_capacity(n as usize);
        let read = (&file).take(n.saturating_add(1)).read_to_end(&mut bytes).and_then(|_| file.metadata());
        let after = read.map_err(|error| self.error(path, &error))?;
        match version(&after) == version(&before) && bytes.len() as u64 == n {
            true => Ok(ReadWhole::Content(WholeFile { bytes: bytes.into(), info: info(&after) })),
            false => Err(self.changed(path)),
        }
    }

    fn read_range_now(
        &self,
        path: &Path,
        range: Range<u64>,
        wanted: Option<&FileVersion>,
    ) -> Result<Bytes, StoreError> {
        let Some((file, metadata)) = self.open_file(path)? else {
            return Err(self.error(path, &ErrorKind::NotFound.into()));
        };
        let is_wanted = |metadata: &Metadata| wanted.is_none_or(|wanted| *wanted == version(metadata));
        if !is_wanted(&metadata) {
            return Err(self.changed(path));
        }
        if range.end > metadata.len() {
            let reason = format!("asked for bytes up to {} of a file of {}", range.end, metadata.len());
            return Err(StoreError::new(&self.name, path.display().to_string(), reason));
        }
        let mut bytes = vec![0; range.end.saturating_sub(range.start) as usize];
        match file.read_exact_at(&mut bytes, range.start).and_then(|()| file.metadata()) {
            Ok(after) if is_wanted(&after) => Ok(bytes.into()),
            Ok(_) => Err(self.changed(path)),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Err(self.changed(path)),
            Err(error) => Err(self.error(path, &error)),
        }
    }

    fn list_now(&self, path: &Path) -> Result<Option<Vec<Listed>>, StoreError> {
        let entries = match read_directory(path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.error(path, &error)),
        };
        // What has no name in UTF-8 cannot be asked for, either.
        let named = entries.into_iter().filter_map(|(name, listed)| Some((name.into_string().ok()?, listed)));
        Ok(Some(
            named
                .map(|(name, found)| match found {
                    Found::Directory { mtime } => Listed { name, is_directory: true, size: None, mtime, version: None },
                    Found::File(info) => Listed {
                        name,
                        is_directory: false,
                        size: Some(info.size),
                        mtime: info.mtime,
                        version: info.version,
                    },
                })
                .collect(),
        ))
    }

    fn write_now(&self, path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
        let written = AtomicFile::create(path, MODE).and_then(|mut file| {
            file.write_all(bytes)?;
            file.commit()
        });
        written.map_err(|error| self.error(path, &error))
    }
}

impl FileStore for LocalFiles {
    fn name(&self) -> &str {
        &self.name
    }

    fn stat<'a>(&'a self, file: &'a str) -> BoxFuture<'a, Result<Option<FileInfo>, StoreError>> {
        Box::pin(self.blocking(file, |this, path| Ok(this.open_file(path)?.map(|(_, metadata)| info(&metadata)))))
    }

    fn list<'a>(&'a self, directory: &'a str) -> BoxFuture<'a, Result<Option<Vec<Listed>>, StoreError>> {
        match directory {
            "" => {
                let this = self.clone();
                Box::pin(async move {
                    match tokio::task::spawn_blocking(move || this.list_now(&this.root)).await {
                        Ok(listed) => listed,
                        Err(error) => Err(StoreError::new(&self.name, &self.name, error)),
                    }
                })
            }
            _ => Box::pin(self.blocking(directory, |this, path| this.list_now(path))),
        }
    }

    fn read_whole<'a>(
        &'a self,
        file: &'a str,
        known: Option<&'a FileVersion>,
        max_bytes: u64,
    ) -> BoxFuture<'a, Result<ReadWhole, StoreError>> {
        let known = known.cloned();
        Box::pin(self.blocking(file, move |this, path| this.read_whole_now(path, known.as_ref(), max_bytes)))
    }

    fn read_range<'a>(
        &'a self,
        file: &'a str,
        range: Range<u64>,
        version: Option<&'a FileVersion>,
    ) -> BoxFuture<'a, Result<Bytes, StoreError>> {
        let version = version.cloned();
        Box::pin(self.blocking(file, move |this, path| this.read_range_now(path, range, version.as_ref())))
    }

    fn write<'a>(&'a self, file: &'a str, bytes: Bytes) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(self.blocking(file, move |this, path| this.write_now(path, &bytes)))
    }
}

/// What lies in a local directory under a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// A directory.
    Directory {
        /// When it was modified.
        mtime: Option<SystemTime>,
    },
    /// A regular file, or a symlink to one, with what is known of it.
    File(FileInfo),
}

/// What lies in a local directory: directories, regular files and symlinks to such. A symlink to a directory is not among them, since it
/// may lead to one above. Blocks the calling thread.
///
/// # Errors
/// The directory cannot be read, or has more than [`MAX_LISTED`] names.
pub fn read_directory(path: &Path) -> io::Result<Vec<(OsString, Found)>> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        // What goes away meanwhile, or is a symlink to nowhere, is not there.
        let found = match kind.is_dir() {
            true => Found::Directory { mtime: entry.metadata().and_then(|metadata| metadata.modified()).ok() },
            false => match fs::metadata(entry.path()) {
                Ok(metadata) if metadata.is_file() => Found::File(info(&metadata)),
                Ok(_) | Err(_) => continue,
            },
        };
        if entries.len() == MAX_LISTED {
            return Err(io::Error::other(format!("it has more than {MAX_LISTED} names")));
        }
        entries.push((entry.file_name(), found));
    }
    Ok(entries)
}

/// What is known of an open file; `None` when it is not a regular one.
///
/// # Errors
/// What fstat(2) answers.
pub fn info_of_open(file: &File) -> io::Result<Option<FileInfo>> {
    let metadata = file.metadata()?;
    Ok(metadata.is_file().then(|| info(&metadata)))
}

/// What is known of a local file by now; `None` when there is no such regular file.
pub fn local_info(path: &Path) -> Option<FileInfo> {
    let metadata = fs::metadata(path).ok()?;
    metadata.is_file().then(|| info(&metadata))
}

fn version(metadata: &Metadata) -> FileVersion {
    let (seconds, nanoseconds) = (metadata.mtime(), metadata.mtime_nsec());
    FileVersion(format!("{}-{seconds}.{nanoseconds:09}-{}", metadata.len(), metadata.ino()))
}

fn info(metadata: &Metadata) -> FileInfo {
    FileInfo {
        size: metadata.len(),
        version: Some(version(metadata)),
        mtime: metadata.modified().ok(),
        has_ranges: true,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn files_are_read_written_and_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let files = LocalFiles::new(dir.path());
        assert_eq!(files.stat("x.caibx").await, Ok(None));
        assert_eq!(files.read_whole("x.caibx", None, 10).await, Ok(ReadWhole::Missing));
        assert!(files.read_range("x.caibx", 0..1, None).await.is_err());

        files.write("x.caibx", Bytes::from_static(b"0123456789")).await.unwrap();
        let info = files.stat("x.caibx").await.unwrap().unwrap();
        assert!(info.size == 10 && info.has_ranges && info.mtime.is_some());
        let version = info.version.clone();
        let content = WholeFile { bytes: Bytes::from_static(b"0123456789"), info };
        assert_eq!(files.read_whole("x.caibx", None, 10).await, Ok(ReadWhole::Content(content)));
        assert_eq!(files.read_whole("x.caibx", version.as_ref(), 10).await, Ok(ReadWhole::Unchanged));
        assert!(files.read_whole("x.caibx", None, 9).await.unwrap_err().reason.contains("10 bytes"));
        assert_eq!(files.read_range("x.caibx", 2..5, version.as_ref()).await, Ok(Bytes::from_static(b"234")));
        assert_eq!(files.read_range("x.caibx", 3..3, None).await, Ok(Bytes::new()));
        assert!(files.read_range("x.caibx", 8..11, version.as_ref()).await.is_err());

        files.write("x.caibx", Bytes::from_static(b"9876543210")).await.unwrap();
        let error = files.read_range("x.caibx", 2..5, version.as_ref()).await.unwrap_err();
        assert!(error.reason.contains("changed") && !error.is_transient, "{error}");
        assert!(matches!(files.read_whole("x.caibx", version.as_ref(), 10).await, Ok(ReadWhole::Content(_))));
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["x.caibx"], "no temporary file is left");
    }

    #[tokio::test]
    async fn a_directory_is_listed_with_what_stat_says() {
        let dir = tempfile::tempdir().unwrap();
        let files = LocalFiles::new(dir.path());
        fs::create_dir_all(dir.path().join("sub/deep")).unwrap();
        files.write("x.caibx", Bytes::from_static(b"1234")).await.unwrap();
        files.write("sub/y.catar", Bytes::from_static(b"12")).await.unwrap();
        std::os::unix::fs::symlink("x.caibx", dir.path().join("link.caibx")).unwrap();
        std::os::unix::fs::symlink("..", dir.path().join("sub/up")).unwrap();
        std::os::unix::fs::symlink("nowhere", dir.path().join("broken.caibx")).unwrap();
        let names = |listed: Option<Vec<Listed>>| {
            let mut names: Vec<_> = listed.unwrap().into_iter().map(|one| (one.name, one.is_directory)).collect();
            names.sort();
            names
        };
        let root = files.list("").await.unwrap();
        for listed in root.iter().flatten().filter(|listed| !listed.is_directory) {
            let info = files.stat(&listed.name).await.unwrap().unwrap();
            assert_eq!((listed.size, listed.mtime, &listed.version), (Some(info.size), info.mtime, &info.version));
        }
        assert_eq!(names(root), [("link.caibx".into(), false), ("sub".into(), true), ("x.caibx".into(), false)]);
        let sub = files.list("sub").await.unwrap();
        assert_eq!(names(sub), [("deep".into(), true), ("y.catar".into(), false)]);
        assert_eq!(files.list("none").await, Ok(None));
        assert!(files.list("../").await.is_err() && files.list("x.caibx").await.is_err());
    }

    #[tokio::test]
    async fn names_stay_inside_and_only_files_are_files() {
        let dir = tempfile::tempdir().unwrap();
        let files = LocalFiles::new(dir.path().join("inside"));
        assert!(files.write("x", Bytes::new()).await.is_err(), "the directory is not made");
        fs::create_dir_all(dir.path().join("inside/dir")).unwrap();
        for name in ["", "..", "../x", "/etc/passwd", "dir/../../x", "."] {
            assert!(files.write(name, Bytes::new()).await.is_err(), "{name}");
            assert!(files.stat(name).await.is_err(), "{name}");
        }
        assert!(files.stat("dir").await.unwrap_err().reason.contains("not a regular file"));
        files.write("dir/x", Bytes::new()).await.unwrap();
        assert_eq!(files.stat("dir/x").await.unwrap().unwrap().size, 0);
    }
}
