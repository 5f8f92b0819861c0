//! The `push` server of the casync protocol (formats.md 5): takes an index with its chunks, or an archive, from a client at the end of a pipe.
//!
//! The index comes first; then the chunks that no store here has are asked for, verified, and written. The index or archive appears
//! when everything is there, and the client is told so afterwards.
//!
//! Invariants: only verified chunks are written; a session that breaks leaves no index, and the chunks it brought.

use std::collections::HashSet;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::runtime::Handle;

use super::wire::{Incoming, Outgoing, Sender, SessionError};
use crate::blob::source::MAX_INDEX_BYTES;
use crate::chunk::Chunk;
use crate::chunk::codec::{self, Form};
use crate::digest::{ChunkId, Digest};
use crate::format::index::Index;
use crate::format::protocol::{Features, Frame, USUAL_DATA_BYTES, check_session};
use crate::store::atomic::AtomicFile;
use crate::store::{Store, Stored, WriteStore};

/// Mode of an index or archive, less the umask.
const FILE_MODE: u32 = 0o666;

/// Ids of one REQUEST: as many as casync puts into one.
const IDS_PER_REQUEST: usize = (USUAL_DATA_BYTES - 24) / 32;

/// Ids looked for in the stores at the same time.
const N_LOOKS: usize = 64;

/// What a `push` takes.
#[derive(Debug, Default)]
pub struct Push {
    /// Where an archive is put.
    pub archive: Option<PathBuf>,
    /// Where an index is put.
    pub index: Option<PathBuf>,
    /// Where chunks are put.
    pub store: Option<Arc<dyn WriteStore>>,
    /// Stores whose chunks need not be sent.
    pub others: Vec<Arc<dyn Store>>,
}

impl Push {
    /// Serves standard input and output until the client has sent everything. The calling thread runs no futures.
    ///
    /// # Errors
    /// The client does not speak the protocol, sends something wrong or goes away; or something cannot be written.
    pub fn serve(self, runtime: &Handle) -> Result<(), SessionError> {
        let outgoing = Outgoing::start(None)?;
        let sender = outgoing.sender();
        let served = self.session(runtime, &sender);
        if let Err(error) = &served
            && !sender.is_gone()
        {
            sender.send_blocking(Frame::Abort { errno: error.errno(), reason: error.to_string() });
        }
        drop(sender);
        let sent = outgoing.finish();
        served?;
        Ok(sent?)
    }

    fn session(self, runtime: &Handle, sender: &Sender) -> Result<(), SessionError> {
        let offers = [
            (self.store.is_some(), Features::WRITABLE_STORE),
            (self.index.is_some(), Features::WRITABLE_INDEX),
            (self.archive.is_some(), Features::WRITABLE_ARCHIVE),
        ];
        let offered = offers.into_iter().filter(|(is_there, _)| *is_there).map(|(_, offer)| offer);
        let Some(ours) = offered.reduce(Features::with) else {
            return Err(SessionError::Failed("there is nothing to take: name an archive, an index or a store".into()));
        };
        sender.send_blocking(Frame::Hello(ours));
        let mut incoming = Incoming::default();
        let theirs = match incoming.next()? {
            Some(Frame::Hello(theirs)) => theirs,
            Some(other) => return Err(SessionError::OutOfTurn(other.name())),
            None => return Err(SessionError::Ended),
        };
        check_session(ours, theirs)?;
        let mut taking = Taking {
            runtime,
            sender,
            push: &self,
            archive: None,
            index: Vec::new(),
            lacking: Vec::new(),
            wanted: HashSet::new(),
            digest: Digest::default(),
            waits_for_index: theirs.has(Features::PUSH_INDEX),
            waits_for_archive: theirs.has(Features::PUSH_ARCHIVE),
        };
        taking.all(&mut incoming)?;
        taking.install()?;
        sender.send_blocking(Frame::Goodbye);
        Ok(())
    }
}

/// What has been taken so far.
struct Taking<'a> {
    runtime: &'a Handle,
    sender: &'a Sender,
    push: &'a Push,
    archive: Option<AtomicFile>,
    index: Vec<u8>,
    /// Chunks to ask for, last first.
    lacking: Vec<ChunkId>,
    /// Chunks asked for and not come.
    wanted: HashSet<ChunkId>,
    digest: Digest,
    waits_for_index: bool,
    waits_for_archive: bool,
}

impl Taking<'_> {
    fn all(&mut self, incoming: &mut Incoming) -> Result<(), SessionError> {
        while self.waits_for_index || self.waits_for_archive || !self.wanted.is_empty() {
            let Some(frame) = incoming.next()? else { return Err(SessionError::Ended) };
            match frame {
                Frame::Index(data) if self.waits_for_index => {
                    self.index.extend_from_slice(&data);
                    if self.index.len() as u64 > MAX_INDEX_BYTES {
                        return Err(SessionError::Failed(format!("an index of more than {MAX_INDEX_BYTES} bytes")));
                    }
                }
                Frame::IndexEof if self.waits_for_index => {
                    self.waits_for_index = false;
                    self.ask_for_chunks()?;
                }
                Frame::Archive(data) if self.waits_for_archive => self.archive_file()?.write_all(&data)?,
                Frame::ArchiveEof if self.waits_for_archive => {
                    self.waits_for_archive = false;
                    self.archive_file()?;
                }
                Frame::Chunk { is_compressed, id, data } => {
                    self.chunk(id, is_compressed, data)?;
                    self.ask_for_more()?;
                }
                Frame::Missing(id) => {
                    let reason = format!("the index has chunk {id}, which the client does not have");
                    return Err(SessionError::Failed(reason));
                }
                other => return Err(SessionError::OutOfTurn(other.name())),
            }
        }
        Ok(())
    }

    fn archive_file(&mut self) -> Result<&mut AtomicFile, SessionError> {
        let Some(path) = &self.push.archive else { return Err(SessionError::OutOfTurn("ARCHIVE")) };
        if self.archive.is_none() {
            self.archive = Some(AtomicFile::create(path, FILE_MODE)?);
        }
        self.archive.as_mut().ok_or(SessionError::Ended)
    }

    /// Asks for the chunks of the index that no store here has.
    fn ask_for_chunks(&mut self) -> Result<(), SessionError> {
        let failed = |error: &dyn std::fmt::Display| SessionError::Failed(format!("the index sent: {error}"));
        let index = Index::open(&self.index).map_err(|error| failed(&error))?;
        self.digest = index.digest();
        let Some(store) = &self.push.store else { return Ok(()) };
        let mut ids = Vec::new();
        let mut met = HashSet::new();
        for item in index.items() {
            let id = item.map_err(|error| failed(&error))?.id;
            if met.insert(id) {
                ids.push(id);
            }
        }
        let mut lacking = Vec::new();
        for some in ids.chunks(N_LOOKS) {
            let looks = some.iter().map(|id| self.is_there(store.as_ref(), *id));
            for (id, is_there) in some.iter().zip(self.runtime.block_on(join_all(looks))) {
                if !is_there? {
                    lacking.push(*id);
                }
            }
        }
        lacking.reverse();
        self.lacking = lacking;
        self.ask_for_more()
    }

    /// Keeps a window of requests open. Not all at once: a client that writes and does not read meanwhile would stop us both.
    fn ask_for_more(&mut self) -> Result<(), SessionError> {
        while !self.lacking.is_empty() && self.wanted.len() < IDS_PER_REQUEST {
            let from = self.lacking.len().saturating_sub(IDS_PER_REQUEST);
            let ids: Vec<ChunkId> = self.lacking.drain(from..).rev().collect();
            self.wanted.extend(&ids);
            if !self.sender.send_blocking(Frame::Request { is_urgent: false, ids }) {
                return Err(SessionError::Ended);
            }
        }
        Ok(())
    }

    async fn is_there(&self, store: &dyn WriteStore, id: ChunkId) -> Result<bool, SessionError> {
        let failed = |error: crate::store::StoreError| SessionError::Failed(error.to_string());
        if store.has(id).await.map_err(failed)? {
            return Ok(true);
        }
        for other in &self.push.others {
            if other.has(id).await.map_err(failed)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn chunk(&mut self, id: ChunkId, is_compressed: bool, data: Bytes) -> Result<(), SessionError> {
        let Some(store) = self.push.store.as_ref().filter(|_| self.wanted.remove(&id)) else {
            return Err(SessionError::OutOfTurn("CHUNK"));
        };
        let bad = |why: String| SessionError::Failed(format!("chunk {id} as sent is bad: {why}"));
        let form = if is_compressed { Form::Compressed } else { Form::Plain };
        let plain = codec::decode_unknown_size(form, &data, u64::MAX).map_err(|error| bad(error.to_string()))?;
        let verified = Chunk::verify_batch(self.digest, vec![(id, plain)]).pop();
        let chunk = match verified {
            Some(Ok(chunk)) => chunk,
            Some(Err(mismatch)) => return Err(bad(mismatch.to_string())),
            None => return Err(bad("it was not verified".into())),
        };
        let bytes = match (form, store.form()) {
            (has, keeps) if has == keeps => data,
            (_, Form::Plain) => chunk.plain().clone(),
            (_, Form::Compressed) => codec::encode(chunk.plain(), codec::DEFAULT_LEVEL).into(),
        };
        let put = self.runtime.block_on(store.put(id, Stored { form: store.form(), bytes }));
        put.map(drop).map_err(|error| SessionError::Failed(error.to_string()))
    }

    /// Puts what was taken into its place.
    fn install(&mut self) -> Result<(), SessionError> {
        if let Some(path) = self.push.index.as_ref().filter(|_| !self.index.is_empty()) {
            let mut file = AtomicFile::create(path, FILE_MODE)?;
            file.write_all(&self.index)?;
            file.commit()?;
        }
        if let Some(file) = self.archive.take() {
            file.commit()?;
        }
        Ok(())
    }
}
