//! The `pull` server of the casync protocol (formats.md 5): an archive, an index and chunks, to whoever runs us at the end of a pipe.
//!
//! The index and the archive are streamed unasked; chunks are sent as they are asked for, urgent ones first, several at a time and in the
//! order in which the stores give them. A chunk goes as it is stored if it is compressed, since desync takes no other.
//!
//! Invariants: an id is queued once at a time, whatever the client repeats; what waits to be sent is bounded, so a slow reader slows
//! the stores; the end of the stream is as good as a GOODBYE.

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::wire::{Incoming, Outgoing, Sender, SessionError};
use crate::chunk::codec::{self, Form};
use crate::digest::ChunkId;
use crate::format::protocol::{Features, Frame, MAX_CHUNK_DATA_BYTES, USUAL_DATA_BYTES, check_session};
use crate::store::Store;

/// Chunks fetched at the same time.
const N_FETCHES: usize = 16;

/// Ids that may wait. casync asks for the whole index at once; beyond this it is read no further until some are answered.
const MAX_QUEUED: usize = 4 << 20;

/// What a `pull` serves.
#[derive(Debug, Default)]
pub struct Pull {
    /// An archive, streamed as a whole.
    pub archive: Option<PathBuf>,
    /// An index, streamed as a whole.
    pub index: Option<PathBuf>,
    /// Where chunks come from.
    pub store: Option<Arc<dyn Store>>,
    /// The most bytes to send in a second.
    pub max_bytes_per_second: Option<u64>,
}

impl Pull {
    /// Serves standard input and output until the client is done. The calling thread reads, and runs no futures.
    ///
    /// # Errors
    /// The client does not speak the protocol, or something served cannot be read.
    pub fn serve(self, runtime: &Handle) -> Result<(), SessionError> {
        let outgoing = Outgoing::start(self.max_bytes_per_second)?;
        let sender = outgoing.sender();
        let served = self.session(runtime, &sender);
        if let Err(error) = &served
            && !sender.is_gone()
        {
            // The second one after `give_up`, if it was that; the client has left with the first.
            sender.send_blocking(Frame::Abort { errno: error.errno(), reason: error.to_string() });
        }
        let was_gone = sender.is_gone();
        drop(sender);
        match (served, outgoing.finish()) {
            (Err(error), _) => Err(error),
            // Who has all that it wants just goes.
            (Ok(()), Err(error)) if was_gone || error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            (Ok(()), sent) => Ok(sent?),
        }
    }

    fn session(self, runtime: &Handle, sender: &Sender) -> Result<(), SessionError> {
        let offers = [
            (self.store.is_some(), Features::READABLE_STORE),
            (self.index.is_some(), Features::READABLE_INDEX),
            (self.archive.is_some(), Features::READABLE_ARCHIVE),
        ];
        let offered = offers.into_iter().filter(|(is_there, _)| *is_there).map(|(_, offer)| offer);
        let Some(ours) = offered.reduce(Features::with) else {
            return Err(SessionError::Failed("there is nothing to serve: name an archive, an index or a store".into()));
        };
        // Before hello, so that a name that is wrong is told instead of a session that breaks.
        let open = |path: Option<PathBuf>| path.map(|path| open(&path).map(|file| (path, file))).transpose();
        let (archive, index) = (open(self.archive)?, open(self.index)?);
        sender.send_blocking(Frame::Hello(ours));
        let mut incoming = Incoming::default();
        let theirs = match incoming.next()? {
            Some(Frame::Hello(theirs)) => theirs,
            Some(other) => return Err(SessionError::OutOfTurn(other.name())),
            None => return Ok(()),
        };
        check_session(ours, theirs)?;
        let mut streams = Vec::new();
        if let Some((path, file)) = index.filter(|_| theirs.has(Features::PULL_INDEX)) {
            streams.push(stream(path, file, Frame::Index, Frame::IndexEof, sender.clone())?);
        }
        if let Some((path, file)) = archive.filter(|_| theirs.has(Features::PULL_ARCHIVE)) {
            streams.push(stream(path, file, Frame::Archive, Frame::ArchiveEof, sender.clone())?);
        }
        let queue = Arc::new(Queue::default());
        let mut workers = Vec::new();
        if let Some(store) = &self.store {
            for _ in 0..N_FETCHES {
                workers.push(runtime.spawn(answer(Arc::clone(&queue), Arc::clone(store), sender.clone())));
            }
        }
        let read = read_requests(&mut incoming, &queue, sender);
        queue.close();
        let mut outcome = read;
        for worker in workers {
            let done = runtime.block_on(worker).unwrap_or_else(|error| Err(SessionError::Failed(error.to_string())));
            outcome = outcome.and(done);
        }
        for stream in streams {
            let done = stream.join().unwrap_or_else(|_| Err(SessionError::Failed("a stream panicked".into())));
            outcome = outcome.and(done);
        }
        outcome
    }
}

fn open(path: &Path) -> Result<File, SessionError> {
    File::open(path).map_err(|error| SessionError::Failed(format!("{}: {error}", path.display())))
}

/// Takes requests until the client is done.
fn read_requests(incoming: &mut Incoming, queue: &Queue, sender: &Sender) -> Result<(), SessionError> {
    loop {
        match incoming.next()? {
            Some(Frame::Request { is_urgent, ids }) => queue.push(&ids, is_urgent),
            Some(Frame::Goodbye) | None => return Ok(()),
            Some(other) => return Err(SessionError::OutOfTurn(other.name())),
        }
        if sender.is_gone() {
            return Ok(());
        }
        queue.wait_for_room();
    }
}

/// Sends a file in pieces, from a thread of its own.
fn stream(
    path: PathBuf,
    mut file: File,
    piece: fn(Bytes) -> Frame,
    end: Frame,
    sender: Sender,
) -> Result<std::thread::JoinHandle<Result<(), SessionError>>, SessionError> {
    let send = move || {
        let mut buffer = vec![0; USUAL_DATA_BYTES];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) if sender.send_blocking(piece(Bytes::copy_from_slice(&buffer[..n]))) => {}
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(SessionError::Failed(format!("{}: {error}", path.display()))),
            }
        }
        sender.send_blocking(end);
        Ok(())
    };
    Ok(std::thread::Builder::new().name("caifs-stream".into()).spawn(send)?)
}

/// Answers requests until there are no more.
async fn answer(queue: Arc<Queue>, store: Arc<dyn Store>, sender: Sender) -> Result<(), SessionError> {
    while let Some(id) = queue.next().await {
        let frame = match store.fetch(id).await {
            Ok(None) => Frame::Missing(id),
            Ok(Some(stored)) => {
                let data = match stored.form {
                    Form::Compressed => stored.bytes,
                    Form::Plain => codec::encode(&stored.bytes, codec::DEFAULT_LEVEL).into(),
                };
                if data.len() > MAX_CHUNK_DATA_BYTES {
                    let n_bytes = data.len();
                    let reason = format!("chunk {id} has {n_bytes} bytes, more than the protocol can carry");
                    return give_up(&queue, &sender, reason).await;
                }
                Frame::Chunk { is_compressed: true, id, data }
            }
            // Not "missing": it may be there, and a client that is told so asks again.
            Err(error) => return give_up(&queue, &sender, error.to_string()).await,
        };
        if !sender.send(frame).await {
            // Nobody is left to answer, and nobody is to wait for room.
            queue.close();
            return Ok(());
        }
    }
    Ok(())
}

/// Tells the client at once, which then ends the session: the one who reads would not notice before that.
async fn give_up(queue: &Queue, sender: &Sender, reason: String) -> Result<(), SessionError> {
    let error = SessionError::Failed(reason);
    sender.send(Frame::Abort { errno: error.errno(), reason: error.to_string() }).await;
    queue.close();
    Err(error)
}

/// Ids that are asked for and not answered.
#[derive(Debug, Default)]
struct Queue {
    /// Never held over I/O or await.
    waiting: Mutex<Waiting>,
    /// Something came, or nothing will.
    news: Notify,
    room: std::sync::Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    urgent: VecDeque<ChunkId>,
    others: VecDeque<ChunkId>,
    /// All of `urgent` and `others`. An id in both is answered once, and skipped where it is met again.
    queued: HashSet<ChunkId>,
    is_closed: bool,
}

impl Queue {
    fn push(&self, ids: &[ChunkId], is_urgent: bool) {
        let mut waiting = self.lock();
        for id in ids {
            let is_new = waiting.queued.insert(*id);
            match is_urgent {
                true => waiting.urgent.push_back(*id),
                false if is_new => waiting.others.push_back(*id),
                false => {}
            }
        }
        drop(waiting);
        // Each wakes one worker; a permit is kept for one that is not waiting yet, and a worker looks again before it waits.
        (0..ids.len().min(N_FETCHES)).for_each(|_| self.news.notify_one());
    }

    /// The next id; `None` when there will be no more.
    async fn next(&self) -> Option<ChunkId> {
        loop {
            let news = self.news.notified();
            tokio::pin!(news);
            news.as_mut().enable();
            {
                let mut waiting = self.lock();
                while let Some(id) = waiting.urgent.pop_front().or_else(|| waiting.others.pop_front()) {
                    if waiting.queued.remove(&id) {
                        self.room.notify_all();
                        return Some(id);
                    }
                }
                if waiting.is_closed {
                    return None;
                }
            }
            news.await;
        }
    }

    /// Blocks while too many are waiting.
    fn wait_for_room(&self) {
        let waiting = self.lock();
        let is_full =
            |waiting: &mut Waiting| !waiting.is_closed && waiting.urgent.len() + waiting.others.len() > MAX_QUEUED;
        drop(self.room.wait_while(waiting, is_full));
    }

    fn close(&self) {
        self.lock().is_closed = true;
        self.room.notify_all();
        self.news.notify_waiters();
        // Also for a worker between its look and its wait: it has enabled its wait before it looked.
        (0..N_FETCHES).for_each(|_| self.news.notify_one());
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn urgent_ids_come_first_and_each_once() {
        let id = |n: u8| ChunkId([n; 32]);
        let queue = Queue::default();
        queue.push(&[id(1), id(2), id(3), id(2)], false);
        queue.push(&[id(3), id(4)], true);
        queue.close();
        let mut answered = Vec::new();
        while let Some(id) = queue.next().await {
            answered.push(id.0[0]);
        }
        assert_eq!(answered, [3, 4, 1, 2]);
    }
}
