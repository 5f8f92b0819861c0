//! A store in a local directory (`.castr`): `<4 hex digits>/<64 hex digits>.cacnk`, without the suffix for plain chunks.
//!
//! [`LocalStore`] reads both forms and writes one. A chunk is written to a temporary file beside its place, under a
//! name that `desync prune` removes should it be left behind, and then moved there without replacing anything.
//!
//! Invariant: a chunk's name never refers to a part of it. A crash of the machine can leave an empty file (nothing is
//! flushed for a single chunk): that is an error to read, and not "present" for whoever writes the chunk again.

use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;

use super::layout::{Layout, form_extension};
use super::{BlockingStore, Form, Put, Store, StoreError, Stored, WriteStore};
use crate::chunk::MAX_CHUNK_BYTES;
use crate::digest::ChunkId;

/// What names of unfinished chunks begin with; `desync prune` removes such files.
pub const TEMPORARY_PREFIX: &str = ".tmp-cacnk.";

/// How often a temporary name may be taken before it is an error.
const MAX_NAME_TRIES: u32 = 16;

/// A directory of chunks.
#[derive(Debug, Clone)]
pub struct LocalStore {
    inner: Arc<Inner>,
}

#[derive(Debug, Clone)]
struct Inner {
    root: PathBuf,
    name: String,
    /// Chunks are read in both forms, with this cipher, and written in this form.
    layout: Layout,
}

impl LocalStore {
    /// The store in a directory that exists.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let store = Self::create(path);
        let root = &store.inner.root;
        match fs::metadata(root) {
            Ok(metadata) if metadata.is_dir() => Ok(store),
            Ok(_) => Err(store.inner.error(root, "not a directory")),
            Err(error) => Err(store.inner.error(root, plain_words(&error))),
        }
    }

    /// The store in a directory that is made with the first chunk written; till then it has no chunks.
    pub fn create(path: impl Into<PathBuf>) -> Self {
        let root = path.into();
        let name = root.display().to_string();
        Self { inner: Arc::new(Inner { root, name, layout: Layout::default() }) }
    }

    /// The same store, writing chunks in this form (compressed at first). It reads both.
    pub fn with_form(mut self, form: Form) -> Self {
        Arc::make_mut(&mut self.inner).layout.form = form;
        self
    }

    /// The same store with encrypted chunks, or written in another form. An encrypted store sees no chunk that is not encrypted with its key.
    pub fn with_layout(mut self, layout: Layout) -> Self {
        Arc::make_mut(&mut self.inner).layout = layout;
        self
    }

    /// The store's directory.
    pub fn path(&self) -> &Path {
        &self.inner.root
    }
}

impl Store for LocalStore {
    fn name(&self) -> &str {
        &self.inner.name
    }

    fn fetch(&self, id: ChunkId) -> BoxFuture<'_, Result<Option<Stored>, StoreError>> {
        let inner = Arc::clone(&self.inner);
        Box::pin(async move {
            match tokio::task::spawn_blocking(move || inner.fetch(id, MAX_CHUNK_BYTES)).await {
                Ok(fetched) => fetched,
                Err(error) => Err(self.inner.error(&self.inner.path_of(id, Form::Compressed), error)),
            }
        })
    }

    fn has(&self, id: ChunkId) -> BoxFuture<'_, Result<bool, StoreError>> {
        Box::pin(async move { self.inner.has(id) })
    }

    fn blocking(&self) -> Option<&dyn BlockingStore> {
        Some(self)
    }
}

impl BlockingStore for LocalStore {
    fn fetch_now(&self, id: ChunkId, max_bytes: u64) -> Result<Option<Stored>, StoreError> {
        self.inner.fetch(id, max_bytes)
    }
}

impl WriteStore for LocalStore {
    fn form(&self) -> Form {
        self.inner.layout.form
    }

    fn put(&self, id: ChunkId, stored: Stored) -> BoxFuture<'_, Result<Put, StoreError>> {
        Box::pin(async move { self.inner.put(id, stored) })
    }
}

impl Inner {
    /// `<root>/<4 hex>/<64 hex><suffix>`.
    fn path_of(&self, id: ChunkId, form: Form) -> PathBuf {
        let hex = id.to_hex();
        let mut path = self.root.as_os_str().to_owned();
        for part in ["/", &hex[..4], "/", &hex, form_extension(form)] {
            path.push(part);
        }
        if let Some(cipher) = &self.layout.cipher {
            path.push(cipher.extension());
        }
        path.into()
    }

    fn error(&self, path: &Path, reason: impl ToString) -> StoreError {
        StoreError::new(self.name.clone(), path.display().to_string(), reason)
    }

    fn fetch(&self, id: ChunkId, max_bytes: u64) -> Result<Option<Stored>, StoreError> {
        for form in [Form::Compressed, Form::Plain] {
            let path = self.path_of(id, form);
            match read_chunk_file(&path, max_bytes.min(MAX_CHUNK_BYTES)) {
                Ok(Some(content)) => {
                    let layout = Layout { form, cipher: self.layout.cipher.clone() };
                    return layout.open(content).map(Some).map_err(|error| self.error(&path, error));
                }
                Ok(None) => {}
                Err(error) => return Err(self.error(&path, plain_words(&error))),
            }
        }
        Ok(None)
    }

    fn has(&self, id: ChunkId) -> Result<bool, StoreError> {
        for form in [Form::Compressed, Form::Plain] {
            let path = self.path_of(id, form);
            match fs::metadata(&path) {
                Ok(metadata) if metadata.len() > 0 => return Ok(true),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(self.error(&path, plain_words(&error))),
            }
        }
        Ok(false)
    }

    fn put(&self, id: ChunkId, stored: Stored) -> Result<Put, StoreError> {
        let target = self.path_of(id, self.layout.form);
        let fail = |error: io::Error| self.error(&target, plain_words(&error));
        let content = self.layout.seal(stored).map_err(|reason| self.error(&target, reason))?;
        let size = content.len() as u64;
        if size > MAX_CHUNK_BYTES {
            return Err(self.error(&target, format!("a stored chunk cannot have {size} bytes")));
        }
        if self.has(id)? {
            return Ok(Put::Present);
        }
        let directory = target.parent().unwrap_or(&self.root);
        let (mut file, temporary) = match create_temporary(directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                make_directory(&self.root).map_err(fail)?;
                make_directory(directory).map_err(fail)?;
                create_temporary(directory)
            }
            made => made,
        }
        .map_err(fail)?;
        file.write_all(&content).map_err(fail)?;
        // An empty leftover of a crash is replaced, a chunk is not.
        match rename_without_replacing(&temporary.path, &target) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                if fs::metadata(&target).is_ok_and(|metadata| metadata.len() > 0) {
                    return Ok(Put::Present);
                }
                fs::rename(&temporary.path, &target).map_err(fail)?;
            }
            Err(error) => return Err(fail(error)),
        }
        temporary.keep();
        Ok(Put::Written)
    }
}

/// All of a chunk file with one open, one fstat and one read; `None` when there is no such file.
fn read_chunk_file(path: &Path, max_bytes: u64) -> io::Result<Option<Bytes>> {
    // Without O_NONBLOCK a named pipe in the place of a chunk would hold the reader for ever.
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path);
    let mut file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    match metadata.len() {
        0 => return Err(io::Error::other("the chunk file is empty (remove it and make it again)")),
        n if n > max_bytes => {
            return Err(io::Error::other(format!("the chunk file has {n} bytes, more than any chunk can")));
        }
        _ => {}
    }
    let mut bytes = vec![0; metadata.len() as usize];
    file.read_exact(&mut bytes)?;
    Ok(Some(bytes.into()))
}

/// A temporary file that is removed unless it is kept.
struct Temporary {
    path: PathBuf,
}

impl Temporary {
    /// Forgets the file: it has found its place.
    fn keep(mut self) {
        self.path = PathBuf::new();
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.path.as_os_str().is_empty() {
            // What cannot be removed is left to prune; the error that led here is the one to tell.
            drop(fs::remove_file(&self.path));
        }
    }
}

fn create_temporary(directory: &Path) -> io::Result<(File, Temporary)> {
    let mut tries = 0;
    loop {
        // A hasher's seed is the one source of random numbers in the standard library.
        let random = RandomState::new().hash_one(tries) as u32;
        let path = directory.join(format!("{TEMPORARY_PREFIX}{random}"));
        match OpenOptions::new().write(true).create_new(true).mode(0o444).open(&path) {
            Ok(file) => return Ok((file, Temporary { path })),
            Err(error) if error.kind() == ErrorKind::AlreadyExists && tries < MAX_NAME_TRIES => tries += 1,
            Err(error) => return Err(error),
        }
    }
}

fn make_directory(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// Moves a file to a name that must be free. Where the system or the filesystem cannot do that in one step the chunk
/// that may be there is replaced by its equal.
fn rename_without_replacing(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(target_env = "gnu")]
    {
        use nix::errno::Errno;
        use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
        match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
            Ok(()) => return Ok(()),
            Err(Errno::EINVAL | Errno::ENOSYS) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    fs::rename(from, to)
}

/// The reason without `(os error N)`, which says nothing to the reader of a message.
pub(super) fn plain_words(error: &io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error") {
        Some((words, _)) => words.to_owned(),
        None => text,
    }
}
