//! Making an index (and chunks) of a stream: standard input, or an archive while it is made.
//!
//! [`Sink`] is written to; the writing thread cuts, and threads of its own hash, compress and store batches of chunks.
//!
//! Invariants: at most two batches a thread wait in memory, so a slow store slows the writer; a sink that is dropped
//! ends its threads and leaves no index.

use std::any::Any;
use std::io::{self, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::cutter::{Cut, Cutter};
use super::ingest::{BATCH_BYTES, BATCH_CHUNKS, Ingest};
use super::output::write_atomically;
use super::{MakeOptions, MakeStats, PackError, Progress};
use crate::chunk::chunker::Chunker;
use crate::digest::ChunkId;
use crate::format::index;

/// Bytes read from a stream at a time.
const READ_BYTES: usize = 256 << 10;

/// The mode of an index made of a stream, less the umask.
pub const INDEX_MODE: u32 = 0o666;

/// Takes a stream of bytes and makes it into an index and chunks.
pub struct Sink {
    options: MakeOptions,
    cutter: Cutter,
    /// Bytes written and not handed over; the first `cut_bytes` of them are the chunks of `cuts`.
    buffer: Vec<u8>,
    cuts: Vec<Cut>,
    cut_bytes: usize,
    /// First bytes of the stream.
    first_bytes: Vec<u8>,
    /// Where each chunk handed over ends.
    ends: Vec<u64>,
    written_bytes: u64,
    queue: Option<SyncSender<Batch>>,
    threads: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
}

struct Shared {
    ingest: Ingest,
    receiver: Mutex<Receiver<Batch>>,
    /// Ids of the chunks of each batch done, with the number of its first chunk.
    done: Mutex<Vec<(usize, Vec<ChunkId>)>>,
    failure: Mutex<Option<PackError>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Nothing more is to be done: something failed, or nobody wants it.
    has_failed: AtomicBool,
    /// Buffers to be used again.
    buffers: Mutex<Vec<Vec<u8>>>,
    done_bytes: AtomicU64,
    progress: Option<Progress>,
}

struct Batch {
    data: Vec<u8>,
    cuts: Vec<Cut>,
    first_chunk: usize,
}

impl Sink {
    /// Begins an index. The threads are started here.
    pub fn new(options: &MakeOptions) -> Result<Self, PackError> {
        let cutter = Cutter::new(Chunker::new(options.sizes, options.rule)?);
        let n_threads = options.n_threads();
        let (sender, receiver) = sync_channel(n_threads);
        let shared = Arc::new(Shared {
            ingest: Ingest::new(options)?,
            receiver: Mutex::new(receiver),
            done: Mutex::default(),
            failure: Mutex::default(),
            panic: Mutex::default(),
            has_failed: AtomicBool::new(false),
            buffers: Mutex::default(),
            done_bytes: AtomicU64::new(0),
            progress: options.progress.clone(),
        });
        let mut sink = Self {
            options: options.clone(),
            cutter,
            buffer: Vec::new(),
            cuts: Vec::new(),
            cut_bytes: 0,
            first_bytes: Vec::new(),
            ends: Vec::new(),
            written_bytes: 0,
            queue: Some(sender),
            threads: Vec::new(),
            shared,
        };
        for _ in 0..n_threads {
            let shared = Arc::clone(&sink.shared);
            let started = std::thread::Builder::new().name("caifs-sink".into()).spawn(move || shared.run());
            sink.threads.push(started.map_err(|error| PackError::Resources(error.to_string()))?);
        }
        Ok(sink)
    }

    /// Takes the rest of a reader; `name` is what to call it in an error.
    pub fn read_from(&mut self, reader: &mut dyn Read, name: &Path) -> Result<(), PackError> {
        let mut buffer = vec![0; READ_BYTES];
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => self.push(&buffer[..n])?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(PackError::file(name, &error)),
            }
        }
    }

    /// Bytes taken so far.
    pub fn written_bytes(&self) -> u64 {
        self.written_bytes
    }

    /// Ends the stream: the bytes of the index, when all its chunks are in the store.
    pub fn finish(mut self) -> Result<(Vec<u8>, MakeStats), PackError> {
        self.cut_all(true);
        self.hand_over()?;
        self.join()?;
        let mut done = std::mem::take(&mut *lock(&self.shared.done));
        done.sort_unstable_by_key(|(first_chunk, _)| *first_chunk);
        let ids = done.iter().flat_map(|(_, ids)| ids);
        let header = self.options.header(&self.first_bytes);
        let bytes = index::encode(&header, self.ends.iter().copied().zip(ids));
        let stats = MakeStats {
            n_chunks_produced: self.ends.len() as u64,
            n_chunks_accepted: self.ends.len() as u64,
            n_chunks_written: self.shared.ingest.n_written(),
            blob_bytes: self.written_bytes,
            stored_bytes: self.shared.ingest.stored_bytes(),
        };
        Ok((bytes, stats))
    }

    /// [`Sink::finish`], with the index written to a file, whole or not at all.
    pub fn finish_to(self, index_path: &Path) -> Result<MakeStats, PackError> {
        let (bytes, stats) = self.finish()?;
        write_atomically(index_path, &bytes, INDEX_MODE)?;
        Ok(stats)
    }

    /// Takes bytes, and waits while enough of them are under way.
    fn push(&mut self, mut bytes: &[u8]) -> Result<(), PackError> {
        self.written_bytes += bytes.len() as u64;
        let n_first = bytes.len().min(64 - self.first_bytes.len());
        self.first_bytes.extend_from_slice(&bytes[..n_first]);
        while !bytes.is_empty() {
            let room = (self.cut_bytes + self.cutter.max_bytes()).max(BATCH_BYTES) - self.buffer.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.buffer.extend_from_slice(now);
            bytes = later;
            self.cut_all(false);
            if self.cuts.len() >= BATCH_CHUNKS || self.cut_bytes >= BATCH_BYTES {
                self.hand_over()?;
            }
        }
        Ok(())
    }

    /// Cuts as long as the bytes at hand allow: less than the longest chunk is left, unless this is the end.
    fn cut_all(&mut self, at_end: bool) {
        loop {
            let rest = &self.buffer[self.cut_bytes..];
            // Cutting less than the longest chunk would be done again with more bytes.
            if !at_end && rest.len() < self.cutter.max_bytes() {
                return;
            }
            let Some(cut) = self.cutter.cut(rest, at_end) else { return };
            self.cut_bytes += cut.len;
            self.cuts.push(cut);
        }
    }

    /// Gives the chunks that are cut to the threads.
    fn hand_over(&mut self) -> Result<(), PackError> {
        if self.cuts.is_empty() {
            return Ok(());
        }
        let mut next = lock(&self.shared.buffers).pop().unwrap_or_default();
        next.clear();
        next.extend_from_slice(&self.buffer[self.cut_bytes..]);
        self.buffer.truncate(self.cut_bytes);
        let data = std::mem::replace(&mut self.buffer, next);
        let cuts = std::mem::take(&mut self.cuts);
        self.cut_bytes = 0;
        let first_chunk = self.ends.len();
        let mut end = self.ends.last().copied().unwrap_or(0);
        for cut in &cuts {
            end += cut.len as u64;
            self.ends.push(end);
        }
        let is_sent = match &self.queue {
            Some(queue) => queue.send(Batch { data, cuts, first_chunk }).is_ok(),
            None => false,
        };
        match is_sent && !self.shared.has_failed.load(Ordering::Relaxed) {
            true => Ok(()),
            false => self.join(),
        }
    }

    /// Ends the threads and tells whether all they had to do is done.
    fn join(&mut self) -> Result<(), PackError> {
        self.queue = None;
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
        if let Some(panic) = lock(&self.shared.panic).take() {
            resume_unwind(panic);
        }
        match lock(&self.shared.failure).clone() {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        if self.threads.is_empty() {
            return;
        }
        // Nobody will ask for what is still in the queue.
        self.shared.has_failed.store(true, Ordering::Relaxed);
        self.queue = None;
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

impl std::fmt::Debug for Sink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sink")
            .field("options", &self.options)
            .field("written_bytes", &self.written_bytes)
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// Takes in batches till there are no more; after a failure they are only taken out of the way.
    fn run(&self) {
        loop {
            // The lock is held while waiting for a batch: whoever has it is the next to get one.
            let received = lock(&self.receiver).recv();
            let Ok(batch) = received else { return };
            if self.has_failed.load(Ordering::Relaxed) {
                continue;
            }
            // A thread that ended in a panic would leave the writer waiting for room in the queue.
            match catch_unwind(AssertUnwindSafe(|| self.take_in(batch))) {
                Ok(Ok(())) => continue,
                Ok(Err(failure)) => drop(lock(&self.failure).get_or_insert(failure)),
                Err(panic) => *lock(&self.panic) = Some(panic),
            }
            self.has_failed.store(true, Ordering::Relaxed);
        }
    }

    fn take_in(&self, batch: Batch) -> Result<(), PackError> {
        let mut rest = &batch.data[..];
        let mut plain = Vec::with_capacity(batch.cuts.len());
        for cut in &batch.cuts {
            let (chunk, others) = rest.split_at(cut.len);
            plain.push((chunk, *cut));
            rest = others;
        }
        let ids = self.ingest.batch(&plain)?;
        lock(&self.done).push((batch.first_chunk, ids));
        let n_bytes = batch.data.len() as u64;
        let done = self.done_bytes.fetch_add(n_bytes, Ordering::Relaxed) + n_bytes;
        lock(&self.buffers).push(batch.data);
        if let Some(progress) = &self.progress {
            progress(done);
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
