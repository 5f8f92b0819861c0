//! Whole files beside the chunks: indexes and plain archives, wherever they lie.
//!
//! A file is named by the text behind its store's location and a `/`. It is read as a whole (an index) or by ranges (an archive);
//! its version tells whether two reads saw the same content.
//!
//! Invariant: a range read against a version gives bytes of that version or an error.

use std::fmt::Debug;
use std::ops::Range;
use std::time::SystemTime;

use bytes::Bytes;
use futures_util::future::BoxFuture;

use super::StoreError;

/// What tells one content of a file from another: a strong ETag, a generation, or size and modification time as text.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FileVersion(pub String);

/// What a store knows of a file without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileInfo {
    /// Length in bytes.
    pub size: u64,
    /// Its version; `None` when the store cannot tell one content from another.
    pub version: Option<FileVersion>,
    /// When it was modified last, if the store knows.
    pub mtime: Option<SystemTime>,
    /// Whether it can be read by ranges.
    pub has_ranges: bool,
}

/// A whole file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WholeFile {
    /// Its content.
    pub bytes: Bytes,
    /// What is known of it; `size` is the length of `bytes`.
    pub info: FileInfo,
}

/// The answer to reading a whole file of which the reader may have a version already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadWhole {
    /// There is no such file.
    Missing,
    /// It is the version the reader has.
    Unchanged,
    /// Its content.
    Content(WholeFile),
}

/// A name in a directory of files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The name, without the directory's: never empty, and without `/`.
    pub name: String,
    /// Whether it is a directory.
    pub is_directory: bool,
    /// Length of a file in bytes, if the listing tells.
    pub size: Option<u64>,
    /// When the file was modified, if the listing tells.
    pub mtime: Option<SystemTime>,
    /// The version, where the listing has the same as [`FileStore::stat`].
    pub version: Option<FileVersion>,
}

/// Somewhere whole files can be read from, and perhaps written to.
pub trait FileStore: Debug + Send + Sync {
    /// What to call this place in messages: its location without secrets.
    fn name(&self) -> &str;

    /// What is known of a file; `None` when there is none.
    fn stat<'a>(&'a self, file: &'a str) -> BoxFuture<'a, Result<Option<FileInfo>, StoreError>>;

    /// The files and directories in a directory: `""` for the place itself, or names with `/` between them. In no order; `None` when there
    /// is no such directory. At most [`super::listing::MAX_LISTED`] (more is an error). Here for places that cannot tell.
    fn list<'a>(&'a self, directory: &'a str) -> BoxFuture<'a, Result<Option<Vec<Listed>>, StoreError>> {
        let object = if directory.is_empty() { self.name().to_owned() } else { format!("{}/{directory}", self.name()) };
        let error = StoreError::new(self.name(), object, "what lies here cannot be listed (name an index)");
        Box::pin(std::future::ready(Err(error)))
    }

    /// Reads a whole file of at most `max_bytes` (a longer one is an error, and is not read to its end).
    fn read_whole<'a>(
        &'a self,
        file: &'a str,
        known: Option<&'a FileVersion>,
        max_bytes: u64,
    ) -> BoxFuture<'a, Result<ReadWhole, StoreError>>;

    /// Reads exactly the bytes of a range that lies in the file. With a `version`, a file of another version is an error that says
    /// so and is not transient.
    fn read_range<'a>(
        &'a self,
        file: &'a str,
        range: Range<u64>,
        version: Option<&'a FileVersion>,
    ) -> BoxFuture<'a, Result<Bytes, StoreError>>;

    /// Writes a file as a whole: afterwards it has this content, or what it had before on failure.
    fn write<'a>(&'a self, file: &'a str, bytes: Bytes) -> BoxFuture<'a, Result<(), StoreError>>;
}

/// What is said of a file of another version.
const CHANGED: &str = "it was changed while in use; mount it again";

/// The error for a file of another version than the one that is being read.
pub fn changed(store: &str, object: &str) -> StoreError {
    StoreError::new(store, object, CHANGED)
}

/// Whether an error is that of [`changed`].
pub fn is_changed(error: &StoreError) -> bool {
    error.reason == CHANGED
}

/// The error for a place that cannot be written to.
pub fn read_only(store: &str, object: &str, why: &str) -> StoreError {
    StoreError::new(store, object, format!("cannot be written: {why}"))
}
