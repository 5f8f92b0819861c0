//! Making an index (and chunks) of a file or block device, on all cores.
//!
//! The content is taken in segments of some megabytes, each with as many bytes of the next as a chunk can reach over. A
//! segment goes through three steps, done by whichever thread is free:
//!
//! 1. *cut*: read it, and cut it as if a chunk began where it begins;
//! 2. *stitch*, one after the other: take over the cuts from where the chunks before really end. Cuts depend on few bytes
//!    before them, so the two soon meet (a few chunks); up to there it is cut again. The result is that of one pass;
//! 3. *ingest*, in batches of chunks: hash, compress, store ([`super::ingest`]).
//!
//! Invariants: a chunk's bytes are read once and hashed, compressed and stored from the same memory, so that the index
//! is right for what is in the store even if the file changes meanwhile (which is an error, noticed at the end); the
//! number of segments in memory is bounded; lock order: there is one lock, never held over reading or waiting.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::cutter::{Cut, Cutter};
use super::ingest::{BatchSize, Ingest};
use super::output::write_atomically;
use super::{MakeOptions, MakeStats, PackError};
use crate::chunk::chunker::Chunker;
use crate::digest::ChunkId;
use crate::format::index;

/// Bytes of a segment, if chunks are not longer.
const SEGMENT_BYTES: usize = 8 << 20;

/// Segments in memory beyond one a thread, so that nobody waits for the slowest.
const SPARE_SEGMENTS: usize = 2;

/// Makes the index of `file` at `index_path`, with its chunks in the store that the options name.
///
/// The index appears when all its chunks are stored, with the file's permissions as casync gives them. The calling thread
/// waits for all of it, so a program with a tokio runtime calls this from a blocking thread.
///
/// # Errors
/// The file cannot be read, is neither a regular file nor a block device, or changed while it was read; the store failed;
/// the index cannot be written.
pub fn make(index_path: &Path, file: &Path, options: &MakeOptions) -> Result<MakeStats, PackError> {
    let (bytes, stats) = make_index(file, options)?;
    let metadata = std::fs::metadata(file).map_err(|error| PackError::file(file, &error))?;
    write_atomically(index_path, &bytes, metadata.mode() & 0o666)?;
    Ok(stats)
}

/// As [`make`], but gives the bytes of the index instead of writing them to a file.
pub fn make_index(file: &Path, options: &MakeOptions) -> Result<(Vec<u8>, MakeStats), PackError> {
    let input = Input::open(file)?;
    let mut first_bytes = vec![0; input.size.min(64) as usize];
    input.read(&mut first_bytes, 0)?;
    let header = options.header(&first_bytes);

    let ingest = Ingest::new(options)?;
    let (items, n_chunks_produced) = chunks_of(&input, 0, options, &ingest)?;
    let bytes = index::encode(&header, items.iter().map(|(end, id)| (*end, id)));
    let stats = MakeStats {
        n_chunks_produced,
        n_chunks_accepted: items.len() as u64,
        n_chunks_written: ingest.n_written(),
        blob_bytes: input.size,
        stored_bytes: ingest.stored_bytes(),
    };
    Ok((bytes, stats))
}

/// The chunks of a file from an offset on: where each ends, and its id; with the number of chunks cut for that.
pub(super) fn chunks_of(
    input: &Input<'_>,
    start: u64,
    options: &MakeOptions,
    ingest: &Ingest,
) -> Result<(Vec<(u64, ChunkId)>, u64), PackError> {
    let cutter = Cutter::new(Chunker::new(options.sizes, options.rule)?);
    let segment_bytes = SEGMENT_BYTES.max(cutter.max_bytes());
    let content_bytes = input.size.saturating_sub(start);
    let n_segments = content_bytes.div_ceil(segment_bytes as u64);
    let n_threads = options.n_threads().min(usize::try_from(n_segments).unwrap_or(usize::MAX)).max(1);
    let hole = match input.may_have_holes && content_bytes > segment_bytes as u64 {
        true => vec![0; segment_bytes + cutter.max_bytes()],
        false => Vec::new(),
    };
    let work = Work {
        input,
        ingest,
        options,
        cutter,
        start,
        segment_bytes,
        n_segments,
        hole: Arc::new(hole),
        done_bytes: AtomicU64::new(0),
        state: Mutex::new(State { n_free_segments: n_threads + SPARE_SEGMENTS, position: start, ..State::default() }),
        changed: Condvar::new(),
    };
    // All threads are new ones: the caller's may run futures, where nothing may wait for a store.
    let n_started = std::thread::scope(|scope| {
        let start = |_| std::thread::Builder::new().name("caifs-make".into()).spawn_scoped(scope, || work.run());
        // Fewer threads than wished for do the same work.
        (0..n_threads).map(start).filter(Result::is_ok).count()
    });
    if n_started == 0 {
        return Err(PackError::Resources("the system allows no more threads".to_owned()));
    }
    let state = work.state.into_inner().unwrap_or_else(PoisonError::into_inner);
    match state.failure {
        Some(failure) => Err(failure),
        None => {
            input.check_unchanged()?;
            Ok((state.items, state.n_produced))
        }
    }
}

/// A file to read, with what it was like when it was opened.
pub(super) struct Input<'a> {
    path: &'a Path,
    file: File,
    /// Length in bytes.
    pub(super) size: u64,
    /// When it was last changed (seconds and nanoseconds); a device does not tell.
    changed: Option<(i64, i64)>,
    may_have_holes: bool,
}

impl<'a> Input<'a> {
    pub(super) fn open(path: &'a Path) -> Result<Self, PackError> {
        let fail = |error| PackError::file(path, &error);
        let wrong = |reason: &str| PackError::File { path: path.to_owned(), reason: reason.to_owned() };
        // The type comes first: opening a pipe would wait for its other end.
        let kind = std::fs::metadata(path).map_err(fail)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(wrong("neither a regular file nor a block device"));
        }
        let mut file = File::open(path).map_err(fail)?;
        let metadata = file.metadata().map_err(fail)?;
        let is_file = metadata.is_file();
        let size = match is_file {
            true => metadata.len(),
            false => file.seek(SeekFrom::End(0)).map_err(fail)?,
        };
        let changed = is_file.then(|| (metadata.mtime(), metadata.mtime_nsec()));
        let may_have_holes = is_file && metadata.blocks() * 512 < size;
        Ok(Self { path, file, size, changed, may_have_holes })
    }

    /// The file's name.
    pub(super) fn path(&self) -> &Path {
        self.path
    }

    fn wrong(&self, reason: impl Into<String>) -> PackError {
        PackError::File { path: self.path.to_owned(), reason: reason.into() }
    }

    /// Fills the buffer from an offset.
    pub(super) fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), PackError> {
        match self.file.read_exact_at(buffer, offset) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                Err(self.wrong(format!("the file was truncated while it was read (it had {} bytes)", self.size)))
            }
            Err(error) => Err(PackError::file(self.path, &error)),
        }
    }

    /// Whether a range holds no data at all.
    fn is_hole(&self, offset: u64, n_bytes: usize) -> bool {
        use nix::unistd::{Whence, lseek};
        if !self.may_have_holes {
            return false;
        }
        let Ok(from) = i64::try_from(offset) else { return false };
        match lseek(&self.file, from, Whence::SeekData) {
            Ok(data) => data as u64 >= offset + n_bytes as u64,
            // There is no data behind the offset.
            Err(nix::errno::Errno::ENXIO) => true,
            Err(_) => false,
        }
    }

    /// An error when the file is not what it was when it was opened.
    pub(super) fn check_unchanged(&self) -> Result<(), PackError> {
        let metadata = self.file.metadata().map_err(|error| PackError::file(self.path, &error))?;
        match self.changed {
            Some(before) if before != (metadata.mtime(), metadata.mtime_nsec()) || metadata.len() != self.size => {
                Err(self.wrong("the file changed while it was read"))
            }
            _ => Ok(()),
        }
    }
}

/// What the threads share.
struct Work<'a> {
    input: &'a Input<'a>,
    ingest: &'a Ingest,
    options: &'a MakeOptions,
    cutter: Cutter,
    /// Where the first segment begins in the file.
    start: u64,
    segment_bytes: usize,
    n_segments: u64,
    /// The content of every segment that is a hole.
    hole: Arc<Vec<u8>>,
    done_bytes: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The next segment to be read.
    next_segment: u64,
    /// The next segment to be stitched, and where the chunks before it end.
    next_stitch: u64,
    position: u64,
    is_stitching: bool,
    /// Segments cut and not stitched, by number.
    cut: BTreeMap<u64, Segment>,
    /// Chunks stitched and not taken in.
    batches: VecDeque<Batch>,
    n_in_ingest: usize,
    n_free_segments: usize,
    buffers: Vec<Vec<u8>>,
    /// End and id of each chunk; the id is filled in when the chunk is taken in.
    items: Vec<(u64, ChunkId)>,
    n_produced: u64,
    failure: Option<PackError>,
    /// A thread panicked: the others stop, so that the panic comes out.
    is_broken: bool,
}

struct Segment {
    offset: u64,
    /// Bytes in which this segment's chunks begin; what it holds beyond is where they may end.
    own_bytes: usize,
    data: Data,
    /// Start (in the segment) and cut of each chunk.
    chunks: Vec<(usize, Cut)>,
}

enum Data {
    Read(Vec<u8>),
    Hole(Arc<Vec<u8>>, usize),
}

impl Segment {
    fn data(&self) -> &[u8] {
        match &self.data {
            Data::Read(bytes) => bytes,
            Data::Hole(zeros, n_bytes) => &zeros[..*n_bytes],
        }
    }
}

struct Batch {
    segment: Arc<Segment>,
    chunks: Vec<(usize, Cut)>,
    /// Where the first chunk's item is.
    first_item: usize,
}

enum Step {
    Cut(u64, Vec<u8>),
    Stitch(Segment, u64),
    Ingest(Batch),
    Finished,
}

impl Work<'_> {
    /// Does whatever is to be done until nothing is left.
    fn run(&self) {
        let _guard = StopOnPanic(self);
        let mut state = self.lock();
        loop {
            let Some(step) = self.next_step(&mut state) else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(state);
            let done = match step {
                Step::Finished => return,
                Step::Cut(number, buffer) => self.cut(number, buffer),
                Step::Stitch(segment, position) => {
                    self.stitch(segment, position);
                    Ok(())
                }
                Step::Ingest(batch) => self.ingest(batch),
            };
            state = self.lock();
            if let Err(failure) = done {
                state.failure.get_or_insert(failure);
            }
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What to do now: what is nearest to its end first, so that little lies in memory. `None` is to wait.
    fn next_step(&self, state: &mut State) -> Option<Step> {
        if state.failure.is_some() || state.is_broken {
            return Some(Step::Finished);
        }
        if !state.is_stitching
            && let Some(segment) = state.cut.remove(&state.next_stitch)
        {
            state.is_stitching = true;
            return Some(Step::Stitch(segment, state.position));
        }
        if let Some(batch) = state.batches.pop_front() {
            state.n_in_ingest += 1;
            return Some(Step::Ingest(batch));
        }
        if state.next_segment < self.n_segments && state.n_free_segments > 0 {
            state.n_free_segments -= 1;
            state.next_segment += 1;
            return Some(Step::Cut(state.next_segment - 1, state.buffers.pop().unwrap_or_default()));
        }
        let is_done = state.next_stitch == self.n_segments && state.n_in_ingest == 0;
        is_done.then_some(Step::Finished)
    }

    /// Reads a segment and cuts it as if a chunk began at its start.
    fn cut(&self, number: u64, mut buffer: Vec<u8>) -> Result<(), PackError> {
        let offset = self.start + number * self.segment_bytes as u64;
        let rest_bytes = self.input.size - offset;
        let own_bytes = rest_bytes.min(self.segment_bytes as u64) as usize;
        let n_bytes = rest_bytes.min((self.segment_bytes + self.cutter.max_bytes()) as u64) as usize;
        let data = match self.input.is_hole(offset, n_bytes) && self.hole.len() >= n_bytes {
            true => Data::Hole(Arc::clone(&self.hole), n_bytes),
            false => {
                buffer.resize(n_bytes, 0);
                self.input.read(&mut buffer, offset)?;
                Data::Read(buffer)
            }
        };
        let mut segment = Segment { offset, own_bytes, data, chunks: Vec::new() };
        let mut chunks = Vec::with_capacity(own_bytes / self.options.sizes.avg as usize + 1);
        let mut at = 0;
        while at < own_bytes {
            let cut = self.cut_at(&segment, at);
            chunks.push((at, cut));
            at += cut.len;
        }
        segment.chunks = chunks;
        let mut state = self.lock();
        state.n_produced += segment.chunks.len() as u64;
        state.cut.insert(number, segment);
        Ok(())
    }

    /// The chunk that begins at a place of the segment's own bytes: it ends in the segment's data.
    fn cut_at(&self, segment: &Segment, at: usize) -> Cut {
        let rest = &segment.data()[at..];
        if matches!(segment.data, Data::Hole(..)) && rest.len() >= self.cutter.max_bytes() {
            return self.cutter.zero();
        }
        // Either the data goes on for as long as any chunk, or the file ends with it: there is always an answer.
        self.cutter.cut(rest, true).unwrap_or(Cut { len: rest.len(), is_zero: false })
    }

    /// Takes over the cuts of a segment from where the chunks before it end.
    fn stitch(&self, segment: Segment, position: u64) {
        let mut at = (position - segment.offset) as usize;
        let mut chunks: Vec<(usize, Cut)> = Vec::with_capacity(segment.chunks.len() + 1);
        let mut n_cut_again = 0;
        while at < segment.own_bytes {
            if let Ok(met) = segment.chunks.binary_search_by_key(&at, |(start, _)| *start) {
                chunks.extend_from_slice(&segment.chunks[met..]);
                at = chunks.last().map_or(at, |(start, cut)| start + cut.len);
                break;
            }
            let cut = self.cut_at(&segment, at);
            n_cut_again += 1;
            chunks.push((at, cut));
            at += cut.len;
        }

        let end = segment.offset + at as u64;
        let offset = segment.offset;
        let segment = Arc::new(segment);
        let mut state = self.lock();
        state.n_produced += n_cut_again;
        let mut rest = &chunks[..];
        while !rest.is_empty() {
            let (batch, others) = rest.split_at(batch_len(rest));
            rest = others;
            let first_item = state.items.len();
            let ends = batch.iter().map(|(start, cut)| offset + (start + cut.len) as u64);
            state.items.extend(ends.map(|end| (end, ChunkId([0; 32]))));
            state.batches.push_back(Batch { segment: Arc::clone(&segment), chunks: batch.to_vec(), first_item });
        }
        state.position = end;
        state.next_stitch += 1;
        state.is_stitching = false;
        // A segment without chunks of its own (one long chunk covers it) is free now.
        self.release(&mut state, segment);
    }

    /// Gives chunks their ids, and the store the chunks.
    fn ingest(&self, batch: Batch) -> Result<(), PackError> {
        let data = batch.segment.data();
        let plain_of = |(start, cut): &(usize, Cut)| (&data[*start..start + cut.len], *cut);
        let plain: Vec<(&[u8], Cut)> = batch.chunks.iter().map(plain_of).collect();
        let ids = self.ingest.batch(&plain)?;
        let n_bytes: usize = batch.chunks.iter().map(|(_, cut)| cut.len).sum();
        let done = self.done_bytes.fetch_add(n_bytes as u64, Ordering::Relaxed) + n_bytes as u64;

        let mut state = self.lock();
        for (item, id) in state.items[batch.first_item..].iter_mut().zip(ids) {
            item.1 = id;
        }
        state.n_in_ingest -= 1;
        self.release(&mut state, batch.segment);
        drop(state);
        if let Some(progress) = &self.options.progress {
            progress(done);
        }
        Ok(())
    }

    /// Lets go of a segment; the last to do so makes room for another.
    fn release(&self, state: &mut State, segment: Arc<Segment>) {
        if let Some(segment) = Arc::into_inner(segment) {
            state.n_free_segments += 1;
            if let Data::Read(buffer) = segment.data {
                state.buffers.push(buffer);
            }
        }
    }
}

/// How many of the chunks make a batch.
fn batch_len(chunks: &[(usize, Cut)]) -> usize {
    let mut size = BatchSize::default();
    chunks.iter().position(|(_, cut)| size.add(*cut)).map_or(chunks.len(), |last| last + 1)
}

/// Wakes the other threads to stop when its thread panics: they would wait for its work for ever.
struct StopOnPanic<'a, 'b>(&'a Work<'b>);

impl Drop for StopOnPanic<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().is_broken = true;
            self.0.changed.notify_all();
        }
    }
}
