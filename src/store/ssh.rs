//! A directory of another machine over the casync protocol (formats.md 5): `ssh` runs `casync pull` (or that of desync or caifs) there.
//!
//! * [`SshStore`] shares its requests out among sessions; `session` is one of them: a process, and what was asked of it.
//! * As a [`FileStore`] it pulls indexes and archives as a whole: the protocol has no ranges.
//!
//! The ssh program reads the user's configuration: jump hosts, agents and keys are its business. Each id has a REQUEST of its own, since
//! desync's server reads only the first id of one; answers may come in any order.
//!
//! Invariants: nothing of the user's is put into a shell unquoted but the remote command, which is meant to be; a session that failed or
//! let somebody wait too long is ended, and all its requests fail in a way that can be asked again.

mod session;

use std::ffi::OsString;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures_util::future::BoxFuture;

use super::files::{Listed, ReadWhole, WholeFile, read_only};
use super::location::{Location, SshLocation};
use super::retry::{Failure, retry};
use super::{FileInfo, FileStore, FileVersion, Store, StoreError, StoreOptions, Stored};
use crate::digest::ChunkId;
use session::{Far, Pulled, Session, Slot};

/// Requests outstanding in every session before another session is begun: enough that the way there and back is filled.
const PIPELINED: usize = 8;

/// A directory over the casync protocol.
#[derive(Debug)]
pub struct SshStore {
    name: String,
    location: SshLocation,
    options: StoreOptions,
    /// Sessions begun; never held over I/O or await.
    sessions: Mutex<Vec<Arc<Session>>>,
}

impl SshStore {
    /// A store; nothing is asked of the network yet.
    ///
    /// # Errors
    /// The options ask for encryption, which the protocol does not have.
    pub fn new(location: &SshLocation, options: &StoreOptions) -> Result<Self, StoreError> {
        let name = Location::Ssh(location.clone()).to_string();
        if options.layout.cipher.is_some() {
            let reason = "chunks over ssh:// cannot be encrypted (use sftp://, or leave the encryption away)";
            return Err(StoreError::new(name.clone(), name, reason));
        }
        Ok(Self { name, location: location.clone(), options: options.clone(), sessions: Mutex::default() })
    }

    /// What starts the far end that serves `path` in a place of its command line.
    fn far(&self, slot: Slot, path: &str) -> Far {
        let SshLocation { user, host, port, .. } = &self.location;
        let mut args: Vec<OsString> = Vec::new();
        if let Some(port) = port {
            args.extend(["-p".into(), port.to_string().into()]);
        }
        let login = user.as_ref().map_or_else(|| host.clone(), |user| format!("{user}@{host}"));
        args.extend(["--".into(), login.into()]);
        let mut words = ["-".to_owned(), "-".to_owned(), "-".to_owned(), "-".to_owned()];
        words[slot.position()] = quoted(path);
        args.push(format!("{} pull {}", self.options.ssh.remote_command, words.join(" ")).into());
        Far { store: self.name.clone(), program: self.options.ssh.program.clone(), args }
    }

    /// The session to ask for a chunk: the one with the least to do, or a new one.
    fn session(&self, id: ChunkId) -> Result<Arc<Session>, StoreError> {
        let mut sessions = self.lock();
        sessions.retain(|session| session.is_alive());
        let fit = sessions.iter().filter(|session| session.can_ask_for(id));
        let least = fit.min_by_key(|session| session.n_outstanding()).cloned();
        let may_begin = sessions.len() < self.options.concurrency.max(1);
        match least {
            Some(session) if session.n_outstanding() < PIPELINED || !may_begin => Ok(session),
            _ => {
                if !may_begin {
                    // All have answered this before. The one with the least to do makes room: it ends with its last request.
                    let least = sessions.iter().enumerate().min_by_key(|(_, session)| session.n_outstanding());
                    if let Some((place, _)) = least {
                        sessions.swap_remove(place);
                    }
                }
                let session = Arc::new(Session::begin(self.far(Slot::Store, &self.location.path))?);
                sessions.push(Arc::clone(&session));
                Ok(session)
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Session>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn fetch_once(&self, id: ChunkId) -> Result<Option<Stored>, Failure> {
        let session = self.session(id)?;
        match tokio::time::timeout(self.options.request_timeout, session.fetch(id)).await {
            Ok(answer) => Ok(answer?),
            Err(_) => {
                // Whatever it waits for, what was asked behind this waits as well.
                session.end();
                let reason = format!("no answer within {} s", self.options.request_timeout.as_secs_f32());
                Err(StoreError::transient(self.name.clone(), format!("{}/{id}", self.name), reason).into())
            }
        }
    }

    async fn pull(&self, file: &str, max_bytes: u64) -> Result<Option<Bytes>, StoreError> {
        let path = format!("{}/{file}", self.location.path.trim_end_matches('/'));
        let slot = if file.ends_with(".catar") { Slot::Archive } else { Slot::Index };
        let object = format!("{}/{file}", self.name);
        retry(self.options.retry, |_| async {
            let pulled = session::pull(self.far(slot, &path), slot, max_bytes);
            match tokio::time::timeout(self.options.request_timeout, pulled).await {
                Ok(Ok(Pulled::Content(bytes))) => Ok(Some(bytes)),
                Ok(Ok(Pulled::Missing)) => Ok(None),
                Ok(Ok(Pulled::TooLong)) => {
                    let reason = format!("it has more than the {max_bytes} bytes that this file may have");
                    Err(StoreError::new(self.name.clone(), object.clone(), reason).into())
                }
                Ok(Err(error)) => Err(StoreError { object: object.clone(), ..error }.into()),
                Err(_) => {
                    let reason = format!("no answer within {} s", self.options.request_timeout.as_secs_f32());
                    Err(StoreError::transient(self.name.clone(), object.clone(), reason).into())
                }
            }
        })
        .await
    }

    fn only_whole(&self, file: &str) -> StoreError {
        let reason = "over ssh:// a file is read as a whole only (use sftp://)";
        StoreError::new(self.name.clone(), format!("{}/{file}", self.name), reason)
    }
}

impl Store for SshStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn fetch(&self, id: ChunkId) -> BoxFuture<'_, Result<Option<Stored>, StoreError>> {
        Box::pin(retry(self.options.retry, move |_| self.fetch_once(id)))
    }

    fn has(&self, id: ChunkId) -> BoxFuture<'_, Result<bool, StoreError>> {
        // The protocol has no other question.
        Box::pin(async move { Ok(self.fetch(id).await?.is_some()) })
    }
}

impl FileStore for SshStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn stat<'a>(&'a self, file: &'a str) -> BoxFuture<'a, Result<Option<FileInfo>, StoreError>> {
        Box::pin(async move { Err(self.only_whole(file)) })
    }

    fn list<'a>(&'a self, directory: &'a str) -> BoxFuture<'a, Result<Option<Vec<Listed>>, StoreError>> {
        let object = if directory.is_empty() { self.name.clone() } else { format!("{}/{directory}", self.name) };
        let reason = "over ssh:// a directory cannot be listed (use sftp://, or name an index)";
        Box::pin(std::future::ready(Err(StoreError::new(self.name.clone(), object, reason))))
    }

    fn read_whole<'a>(
        &'a self,
        file: &'a str,
        _known: Option<&'a FileVersion>,
        max_bytes: u64,
    ) -> BoxFuture<'a, Result<ReadWhole, StoreError>> {
        Box::pin(async move {
            let Some(bytes) = self.pull(file, max_bytes).await? else { return Ok(ReadWhole::Missing) };
            let info = FileInfo { size: bytes.len() as u64, version: None, mtime: None, has_ranges: false };
            Ok(ReadWhole::Content(WholeFile { bytes, info }))
        })
    }

    fn read_range<'a>(
        &'a self,
        file: &'a str,
        _range: Range<u64>,
        _version: Option<&'a FileVersion>,
    ) -> BoxFuture<'a, Result<Bytes, StoreError>> {
        Box::pin(async move { Err(self.only_whole(file)) })
    }

    fn write<'a>(&'a self, file: &'a str, _bytes: Bytes) -> BoxFuture<'a, Result<(), StoreError>> {
        let object = format!("{}/{file}", self.name);
        Box::pin(async move { Err(read_only(&self.name, &object, "ssh:// is for reading (use sftp://)")) })
    }
}

/// A word as a POSIX shell reads it back.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use crate::chunk::cipher::{Algorithm, Cipher, Key};
    use crate::store::layout::Layout;

    #[test]
    fn the_far_end_is_started_as_desync_does_it() {
        let location = |text: &str| match Location::parse(text).unwrap() {
            Location::Ssh(location) => location,
            other => panic!("{other:?}"),
        };
        for (text, slot, path, wanted) in [
            ("ssh://h/a/b", Slot::Store, "/a/b", &["--", "h", "casync pull - - - '/a/b'"][..]),
            ("u@h:it's", Slot::Store, "it's", &["--", "u@h", r"casync pull - - - 'it'\''s'"]),
            ("ssh://u@h:22/p", Slot::Index, "/p/x", &["-p", "22", "--", "u@h", "casync pull - - '/p/x' -"]),
            ("ssh://h/p", Slot::Archive, "/p/$(x)", &["--", "h", "casync pull - '/p/$(x)' - -"]),
        ] {
            let store = SshStore::new(&location(text), &StoreOptions::default()).unwrap();
            let far = store.far(slot, path);
            assert_eq!(
                (far.program.to_str(), far.args.as_slice()),
                (Some("ssh"), wanted.iter().map(OsString::from).collect::<Vec<_>>().as_slice())
            );
        }
    }

    #[test]
    fn encryption_is_refused() {
        let cipher = Cipher::new(Algorithm::Aes256Gcm, &Key::new([1; 32]));
        let layout = Layout { cipher: Some(Arc::new(cipher)), ..Layout::default() };
        let options = StoreOptions { layout, ..StoreOptions::default() };
        let location = SshLocation { user: None, host: "h".into(), port: None, path: "/p".into() };
        assert!(SshStore::new(&location, &options).unwrap_err().reason.contains("sftp://"));
    }
}
