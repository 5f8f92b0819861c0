//! Chunks and whole files in a directory that is reached over SFTP, spoken by libssh2.
//!
//! * [`SftpStore`] is the store: names of objects, retries, errors.
//! * `pool`: a bounded number of sessions, each used by one request at a time on a blocking thread.
//! * `session`: one session: reading, looking, and what its errors mean. `write`: temporary file, then rename.
//! * `auth` logs in, `known_hosts` tells whether the server is the one that is meant.
//!
//! `~/.ssh/config`, jump hosts and passwords are for `ssh://` stores, which run the ssh program; here keys and an agent log in.
//!
//! Invariants: a server whose key is not known gets no login; a session that failed, or whose reader went away, is cut off and never
//! used again; no request takes longer than the request timeout, whatever the server does or does not.

mod auth;
mod known_hosts;
mod list;
mod pool;
mod session;
mod write;

use std::ops::Range;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::future::BoxFuture;

use super::files::{FileInfo, FileStore, FileVersion, Listed, ReadWhole, WholeFile, changed};
use super::layout::Layout;
use super::location::{Location, SshLocation};
use super::retry::{Failure, RetryPolicy, retry};
use super::{Form, Put, Store, StoreError, StoreOptions, Stored, WriteStore};
use crate::chunk::MAX_CHUNK_BYTES;
use crate::digest::ChunkId;
use pool::{Done, Pool};
use session::{Fault, Session, Target};
use write::Existing;

/// A directory over SFTP.
#[derive(Debug)]
pub struct SftpStore {
    name: String,
    /// The directory on the server, without `/` at its end.
    directory: String,
    layout: Layout,
    retry: RetryPolicy,
    pool: Pool,
}

impl SftpStore {
    /// The store at a location. Nobody is asked yet: sessions are made when they are needed.
    ///
    /// # Errors
    /// The location names no user, and the one this program runs as has no name.
    pub fn new(location: &SshLocation, options: &StoreOptions) -> Result<Self, StoreError> {
        let shown = Location::Sftp(location.clone()).to_string();
        let name = shown.trim_end_matches('/').to_owned();
        let target =
            Target::new(location, options).map_err(|reason| StoreError::new(name.clone(), name.clone(), reason))?;
        let directory = location.path.trim_end_matches('/').to_owned();
        let pool = Pool::new(target, options.concurrency, options.request_timeout);
        Ok(Self { name, directory, layout: options.layout.clone(), retry: options.retry, pool })
    }

    /// A name below the directory, as the server is asked for it.
    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.directory)
    }

    /// A name below the directory, as people are told it.
    fn object(&self, name: &str) -> String {
        format!("{}/{name}", self.name)
    }

    fn error(&self, name: &str, fault: Fault) -> StoreError {
        StoreError {
            is_transient: fault.is_transient(),
            ..StoreError::new(self.name.clone(), self.object(name), fault)
        }
    }

    /// Does a piece of work on a session, again on another one if the session fails.
    async fn ask<T, W>(&self, name: &str, work: W) -> Result<T, StoreError>
    where
        T: Send + 'static,
        W: Fn(&Session) -> Result<Done<T>, Fault> + Clone + Send + 'static,
    {
        retry(self.retry, |_| {
            let work = work.clone();
            async move { self.pool.run(work).await.map_err(|fault| Failure::from(self.error(name, fault))) }
        })
        .await
    }

    async fn fetch_chunk(&self, id: ChunkId) -> Result<Option<Stored>, StoreError> {
        let name = self.layout.object_name(id);
        let path = self.path(&name);
        let content = self.ask(&name, move |session| {
            let Some(mut file) = session.open_if_there(&path)? else { return Ok(Done::with(None)) };
            let bytes = session.read_to_end(&mut file, MAX_CHUNK_BYTES)?;
            if bytes.is_empty() {
                return Err(Fault::Unfit("the chunk file is empty (remove it and make it again)".to_owned()));
            }
            Ok(Done { value: Some(Bytes::from(bytes)), open: Some(file) })
        });
        let Some(content) = content.await? else { return Ok(None) };
        let stored = self.layout.open(content);
        stored.map(Some).map_err(|error| StoreError::new(self.name.clone(), self.object(&name), error))
    }

    async fn has_chunk(&self, id: ChunkId) -> Result<bool, StoreError> {
        let name = self.layout.object_name(id);
        let path = self.path(&name);
        let asked = self.ask(&name, move |session| Ok(Done::with(session.stat(&path)?)));
        // An empty file is what a crash of the server left, and what a writer replaces.
        Ok(asked.await?.is_some_and(|stat| stat.is_file() && stat.size != Some(0)))
    }

    async fn put_chunk(&self, id: ChunkId, stored: Stored) -> Result<Put, StoreError> {
        let name = self.layout.object_name(id);
        let content = self.layout.seal(stored);
        let content = content.map_err(|reason| StoreError::new(self.name.clone(), self.object(&name), reason))?;
        self.write_file(&name, content, Existing::Keep).await
    }

    async fn write_file(&self, name: &str, content: Bytes, existing: Existing) -> Result<Put, StoreError> {
        let path = self.path(name);
        // One temporary name for all attempts: the next one overwrites what a broken session left.
        let temporary = write::temporary_name(&path);
        let written = self.ask(name, move |session| {
            write::write_file(session, &path, &temporary, &content, existing).map(Done::with)
        });
        written.await
    }

    async fn read_whole_file(
        &self,
        name: &str,
        known: Option<FileVersion>,
        max_bytes: u64,
    ) -> Result<ReadWhole, StoreError> {
        let path = self.path(name);
        let read = self.ask(name, move |session| {
            let Some(mut file) = session.open_if_there(&path)? else { return Ok(Done::with(ReadWhole::Missing)) };
            let info = info(&session.stat_open(&mut file)?)?;
            if known.is_some() && info.version == known {
                return Ok(Done { value: ReadWhole::Unchanged, open: Some(file) });
            }
            if info.size > max_bytes {
                return Err(Fault::Unfit(format!("it has {} bytes, more than the {max_bytes} allowed", info.size)));
            }
            let bytes = session.read_exactly(&mut file, info.size)?;
            // Somebody who writes into the file instead of replacing it changes what is being read.
            if self::info(&session.stat_open(&mut file)?)? != info || bytes.len() as u64 != info.size {
                return Err(Fault::Unsteady("it was changed while it was read".to_owned()));
            }
            let whole = WholeFile { bytes: bytes.into(), info };
            Ok(Done { value: ReadWhole::Content(whole), open: Some(file) })
        });
        read.await
    }

    async fn read_file_range(
        &self,
        name: &str,
        range: Range<u64>,
        version: Option<FileVersion>,
    ) -> Result<Bytes, StoreError> {
        let path = self.path(name);
        let read = self.ask(name, move |session| {
            let mut file = session.open(&path)?;
            session.seek(&mut file, range.start)?;
            let n_wanted = range.end.saturating_sub(range.start);
            let bytes = session.read_exactly(&mut file, n_wanted)?;
            // Looked at behind the read, so that a change during the read is seen, too.
            let is_changed = version.is_some() && info(&session.stat_open(&mut file)?)?.version != version;
            if is_changed {
                return Ok(Done { value: None, open: Some(file) });
            }
            let n_read = bytes.len() as u64;
            if n_read < n_wanted {
                return Err(Fault::Unfit(format!(
                    "it ends at byte {}, before the end of the range asked for ({})",
                    range.start + n_read,
                    range.end
                )));
            }
            Ok(Done { value: Some(Bytes::from(bytes)), open: Some(file) })
        });
        read.await?.ok_or_else(|| changed(&self.name, &self.object(name)))
    }
}

impl Store for SftpStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn fetch(&self, id: ChunkId) -> BoxFuture<'_, Result<Option<Stored>, StoreError>> {
        Box::pin(self.fetch_chunk(id))
    }

    fn has(&self, id: ChunkId) -> BoxFuture<'_, Result<bool, StoreError>> {
        Box::pin(self.has_chunk(id))
    }
}

impl WriteStore for SftpStore {
    fn form(&self) -> Form {
        self.layout.form
    }

    fn put(&self, id: ChunkId, stored: Stored) -> BoxFuture<'_, Result<Put, StoreError>> {
        Box::pin(self.put_chunk(id, stored))
    }
}

impl FileStore for SftpStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn stat<'a>(&'a self, file: &'a str) -> BoxFuture<'a, Result<Option<FileInfo>, StoreError>> {
        let path = self.path(file);
        Box::pin(self.ask(file, move |session| {
            let stat = session.stat(&path)?;
            Ok(Done::with(stat.as_ref().map(info).transpose()?))
        }))
    }

    fn list<'a>(&'a self, directory: &'a str) -> BoxFuture<'a, Result<Option<Vec<Listed>>, StoreError>> {
        Box::pin(self.list_directory(directory))
    }

    fn read_whole<'a>(
        &'a self,
        file: &'a str,
        known: Option<&'a FileVersion>,
        max_bytes: u64,
    ) -> BoxFuture<'a, Result<ReadWhole, StoreError>> {
        Box::pin(self.read_whole_file(file, known.cloned(), max_bytes))
    }

    fn read_range<'a>(
        &'a self,
        file: &'a str,
        range: Range<u64>,
        version: Option<&'a FileVersion>,
    ) -> BoxFuture<'a, Result<Bytes, StoreError>> {
        Box::pin(self.read_file_range(file, range, version.cloned()))
    }

    fn write<'a>(&'a self, file: &'a str, bytes: Bytes) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move { self.write_file(file, bytes, Existing::Replace).await.map(|_| ()) })
    }
}

/// What a file's attributes say. SFTP gives times in whole seconds, so a file that is rewritten within one, with the same size, keeps
/// its version.
fn info(stat: &ssh2::FileStat) -> Result<FileInfo, Fault> {
    if stat.perm.is_some() && !stat.is_file() {
        return Err(Fault::Unfit("not a regular file".to_owned()));
    }
    let Some(size) = stat.size else { return Err(Fault::Unfit("the server does not tell its size".to_owned())) };
    Ok(FileInfo {
        size,
        version: stat.mtime.map(|mtime| FileVersion(format!("{size}-{mtime}"))),
        mtime: stat.mtime.and_then(|mtime| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(mtime))),
        has_ranges: true,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn stat(perm: Option<u32>, size: Option<u64>, mtime: Option<u64>) -> ssh2::FileStat {
        ssh2::FileStat { size, uid: None, gid: None, perm, atime: None, mtime }
    }

    #[test]
    fn a_version_is_size_and_time() {
        let version = |stat| info(&stat).unwrap().version;
        let first = version(stat(Some(0o100_644), Some(5), Some(7)));
        assert_eq!(first, Some(FileVersion("5-7".to_owned())));
        assert_ne!(version(stat(None, Some(6), Some(7))), first);
        assert_ne!(version(stat(None, Some(5), Some(8))), first);
        assert_eq!(version(stat(None, Some(5), None)), None);
        assert!(info(&stat(Some(0o040_755), Some(5), Some(7))).is_err(), "a directory");
        assert!(info(&stat(Some(0o100_644), None, Some(7))).is_err(), "no size");
        assert!(info(&stat(None, Some(5), Some(u64::MAX))).unwrap().mtime.is_none());
    }

    #[test]
    fn names_have_no_slash_twice() {
        for (path, directory) in [("/", ""), ("/a/b", "/a/b"), ("/a/b//", "/a/b")] {
            let location =
                SshLocation { user: Some("u".into()), host: "h".into(), port: Some(2222), path: path.into() };
            let store = SftpStore::new(&location, &StoreOptions::default()).unwrap();
            assert_eq!(store.path("x"), format!("{directory}/x"));
            assert_eq!(store.object("x"), format!("sftp://u@h:2222{directory}/x"));
        }
    }
}
