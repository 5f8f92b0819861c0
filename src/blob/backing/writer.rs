//! The thread that fills a backing file: writes chunks, flushes them, tells the state, and checks claims when there is nothing else to do.
//!
//! Chunks come through a [`Queue`] of bounded bytes. Every [`FLUSH_BYTES`] or [`FLUSH_AFTER`] the file is flushed on a thread of its own,
//! while writing goes on; only then are its chunks written down as present.
//!
//! Invariants: no fault of the disk reaches a reader; nothing is added while the file system has less than its reserve; what a flush that
//! failed may have lost is written again before it counts, of the file and of its state.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use nix::fcntl::{FallocateFlags, Flock, fallocate};
use tokio::sync::oneshot;

use super::Shared;
use super::map::{Map, State, Unsynced};
use super::queue::{FIRST_REST, Inbox, LONGEST_REST, Message, Queue};
use super::state::{BLOCK_BYTES, Condition, FileId, encode_map_block, map_block_at};
use crate::chunk::Chunk;

/// Bytes that are written before the file is flushed: what a loss of power makes us hash again.
const FLUSH_BYTES: u64 = 64 << 20;

/// How long a written chunk waits for a flush.
const FLUSH_AFTER: Duration = Duration::from_secs(5);

/// Chunks checked in one go, as many as a multi-lane digest takes, and their bytes.
const CHECK_CHUNKS: usize = 8;
const CHECK_BYTES: u64 = 4 << 20;

/// Claims are checked when nobody has read for so long.
const QUIET: Duration = Duration::from_millis(50);

/// What file systems give out at a time, mostly.
const DISK_BLOCK_BYTES: u64 = 4096;

/// How old an answer about the free space may be.
const SPACE_AGE: Duration = Duration::from_secs(1);

/// Starts the thread, which has the lock of the state as long as it goes on. `max_wait` bounds what a reader waits for a slow disk.
pub(super) fn start(
    shared: Arc<Shared>,
    state: Flock<File>,
    is_foreign: bool,
    keep_free_bytes: u64,
    queue_bytes: u64,
    max_wait: Duration,
) -> io::Result<Queue> {
    let (queue, inbox, told) = Queue::new(queue_bytes, max_wait);
    let writer = Writer::new(shared, state, is_foreign, keep_free_bytes, inbox);
    std::thread::Builder::new().name("caifs-backing".to_owned()).spawn(move || {
        // The end is told even after a panic, so that the mount's own end does not wait for it.
        let _told = told;
        writer.run();
    })?;
    Ok(queue)
}

struct Writer {
    shared: Arc<Shared>,
    state: Flock<File>,
    seed: u64,
    is_foreign: bool,
    keep_free_bytes: u64,
    /// What the file system had free when it was asked, less what was written since.
    free: Option<(Instant, u64)>,
    inbox: Inbox,
    /// The last rest; zero when the last write worked.
    pause: Duration,
    /// The last flush failed.
    is_losing: bool,
    unsynced: Unsynced,
    /// When the first of `unsynced` was written.
    written_since: Option<Instant>,
    /// Who wants `unsynced` to be flushed now.
    hurried: Vec<oneshot::Sender<()>>,
    /// What a flush that is under way is for, and who waits for it.
    flushing: Option<(Unsynced, Vec<oneshot::Sender<()>>)>,
    /// Claims before this chunk were looked at.
    claim_cursor: usize,
    /// The state says that it is of this file, and nothing of it failed since.
    is_introduced: bool,
    is_sealed: bool,
}

impl Writer {
    fn new(shared: Arc<Shared>, state: Flock<File>, is_foreign: bool, keep_free_bytes: u64, inbox: Inbox) -> Self {
        Self {
            seed: shared.identity.seed(),
            shared,
            state,
            is_foreign,
            keep_free_bytes,
            free: None,
            inbox,
            pause: Duration::ZERO,
            is_losing: false,
            unsynced: Unsynced::default(),
            written_since: None,
            hurried: Vec::new(),
            flushing: None,
            claim_cursor: 0,
            is_introduced: false,
            is_sealed: false,
        }
    }

    fn run(mut self) {
        self.face_disk();
        loop {
            self.settle();
            if self.is_sealed {
                return;
            }
            let message = match self.patience() {
                Some(patience) => self.inbox.receiver.recv_timeout(patience),
                None => self.inbox.receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match message {
                Ok(Message::End) | Err(RecvTimeoutError::Disconnected) => break,
                Ok(message) => self.take(message),
                Err(RecvTimeoutError::Timeout) => self.check_claims(),
            }
            // The state is written once for all that has come meanwhile.
            while !self.is_flush_due() {
                match self.inbox.receiver.try_recv() {
                    Ok(Message::End) => return self.close(),
                    Ok(message) => self.take(message),
                    Err(_) => break,
                }
            }
        }
        self.close();
    }

    /// Makes that claims are read as the disk has them. The process before may have heard that its bytes did not reach the disk, and have
    /// left them in memory, where they look right.
    fn face_disk(&mut self) {
        if self.shared.map().is_some_and(|map| map.n_claimed() > 0) {
            self.begin_flush();
            self.flushed(self.shared.data.sync_data());
            self.shared.forget_pages();
        }
        self.shared.claims_can_be_checked();
    }

    /// How long to wait for a message; `None` when there is nothing to do without one.
    fn patience(&self) -> Option<Duration> {
        let map = self.shared.map()?;
        if map.next_claimed(self.claim_cursor).is_some() {
            return Some(match self.inbox.rest.is_on() || self.shared.quiet_for() < QUIET {
                true => QUIET,
                false => Duration::ZERO,
            });
        }
        if !self.is_introduced {
            // It is tried again after the rest.
            return Some(self.inbox.rest.left().max(Duration::from_millis(1)));
        }
        if self.flushing.is_some() {
            return None;
        }
        match self.written_since {
            Some(since) => Some(FLUSH_AFTER.saturating_sub(since.elapsed()).max(Duration::from_millis(1))),
            // Full, but sealing it failed.
            None if map.is_full() => Some(FIRST_REST),
            None => None,
        }
    }

    fn is_flush_due(&self) -> bool {
        let is_old = self.written_since.is_some_and(|since| since.elapsed() >= FLUSH_AFTER);
        self.flushing.is_none() && (self.unsynced.n_bytes >= FLUSH_BYTES || is_old || !self.hurried.is_empty())
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Keep(chunk_idx, chunk, _room, answer) => {
                if !self.inbox.rest.is_on() {
                    match self.keep(chunk_idx, &chunk) {
                        // What was written tells nothing about a disk that fails later.
                        Ok(_) if self.is_losing || !self.is_introduced => {}
                        Ok(true) => self.pause = Duration::ZERO,
                        Ok(false) => {}
                        Err(error) => self.cannot_add(&error),
                    }
                }
                self.inbox.arrived(chunk_idx);
                if let Some(answer) = answer {
                    let is_there = self.shared.map().is_some_and(|map| map.state(chunk_idx).is_readable());
                    // Nobody hears it when the warming was ended meanwhile.
                    let _ = answer.send(is_there);
                }
            }
            Message::Verified(chunk_idx, n_forgotten) => {
                // What was read before a flush failed may have come from memory only.
                if n_forgotten == self.shared.n_forgotten() {
                    self.is_there(chunk_idx, State::Claimed);
                }
            }
            Message::Flush(answer) => self.hurried.push(answer),
            Message::Flushed(flushed) => self.flushed(flushed),
            Message::End => {}
        }
    }

    /// Writes a chunk. Whether the disk had to take something for it.
    fn keep(&mut self, chunk_idx: usize, chunk: &Chunk) -> io::Result<bool> {
        let shared = Arc::clone(&self.shared);
        let Some(map) = shared.map() else { return Ok(false) };
        let Some((item, false)) = shared.item(chunk_idx).map(|item| (item, map.state(chunk_idx).is_readable())) else {
            return Ok(false);
        };
        if item.id != chunk.id() || item.size_bytes() != chunk.plain().len() as u64 {
            return Ok(false);
        }
        let is_zero = chunk.plain().iter().all(|byte| *byte == 0);
        if !is_zero {
            self.check_space(item.size_bytes())?;
        }
        // Writing can fail half-way: from here on nobody claims anything of what was there.
        map.change(chunk_idx, State::Claimed, State::Absent);
        match (is_zero, self.is_foreign) {
            // Of a zero chunk only zeros were ever written.
            (true, false) => {}
            (true, true) => {
                let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let (start, len) = (item.start.cast_signed(), item.size_bytes().cast_signed());
                if fallocate(&shared.data, hole, start, len).is_err() {
                    shared.data.write_all_at(chunk.plain(), item.start)?;
                }
            }
            (false, _) => shared.data.write_all_at(chunk.plain(), item.start)?,
        }
        shared.report.n_backing_kept.add(1);
        self.is_there(chunk_idx, State::Absent);
        Ok(!is_zero || self.is_foreign)
    }

    /// The verified bytes of a chunk are in the file.
    fn is_there(&mut self, chunk_idx: usize, before: State) {
        let shared = Arc::clone(&self.shared);
        let (Some(map), Some(item)) = (shared.map(), shared.item(chunk_idx)) else { return };
        if map.change(chunk_idx, before, State::Written) {
            self.unsynced.add(chunk_idx, item.size_bytes());
            self.written_since.get_or_insert_with(Instant::now);
        }
    }

    /// Refuses what would take from the reserve.
    fn check_space(&mut self, n_bytes: u64) -> io::Result<()> {
        let free = match self.free {
            Some((asked, free)) if asked.elapsed() < SPACE_AGE => free,
            _ => {
                let answer = nix::sys::statvfs::fstatvfs(&self.shared.data)?;
                // The fields have another width on other machines.
                #[allow(clippy::unnecessary_cast, clippy::useless_conversion)]
                let free = (answer.blocks_available() as u64).saturating_mul(answer.fragment_size() as u64);
                self.free = Some((Instant::now(), free));
                free
            }
        };
        // A chunk lies in up to two blocks more than its bytes fill.
        let n_bytes = n_bytes + 2 * DISK_BLOCK_BYTES;
        if free < self.keep_free_bytes.saturating_add(n_bytes) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.free = self.free.map(|(asked, free)| (asked, free - n_bytes));
        Ok(())
    }

    fn cannot_add(&mut self, error: &io::Error) {
        self.failed(error, self.pause.is_zero(), "nothing is added until it works again");
    }

    /// Something could not be written: nothing is tried for a while. Only what is news is told.
    fn failed(&mut self, error: &io::Error, is_news: bool, then: &str) {
        self.shared.report.n_backing_errors.add(1);
        if is_news {
            tracing::warn!("backing file {}: {error}; {then}", self.shared.path.display());
        }
        self.pause = (2 * self.pause).clamp(FIRST_REST, LONGEST_REST);
        self.inbox.rest.begin(self.pause);
    }

    /// Does what is due.
    fn settle(&mut self) {
        let shared = Arc::clone(&self.shared);
        let Some(map) = shared.map() else { return };
        if self.is_flush_due() || (map.is_full() && self.flushing.is_none() && !self.unsynced.is_empty()) {
            self.start_flush();
        }
        if self.inbox.rest.is_on() {
            return;
        }
        if let Err(error) = self.write_map().and_then(|()| self.introduce()) {
            self.is_introduced = false;
            return self.cannot_add(&error);
        }
        if map.is_full() && self.unsynced.is_empty() && self.flushing.is_none() {
            match self.write_end(true) {
                Ok(()) => {
                    self.is_sealed = true;
                    shared.is_complete.store(true, Ordering::Release);
                    tracing::info!("backing file {} is complete", shared.path.display());
                }
                Err(error) => self.cannot_add(&error),
            }
        }
    }

    fn start_flush(&mut self) {
        self.begin_flush();
        let (data, sender) = (Arc::clone(&self.shared.data), self.inbox.sender.clone());
        let flush = move || {
            let flushed = data.sync_data();
            // Nobody hears it when the mount has ended meanwhile.
            drop(sender.send(Message::Flushed(flushed)));
        };
        if std::thread::Builder::new().name("caifs-flush".to_owned()).spawn(flush).is_err() {
            // No threads left: nothing is written meanwhile.
            self.flushed(self.shared.data.sync_data());
        }
    }

    fn begin_flush(&mut self) {
        self.flushing = Some((std::mem::take(&mut self.unsynced), std::mem::take(&mut self.hurried)));
        self.written_since = None;
    }

    fn flushed(&mut self, flushed: io::Result<()>) {
        let shared = Arc::clone(&self.shared);
        let (Some(map), Some((unsynced, waiting))) = (shared.map(), self.flushing.take()) else { return };
        match flushed {
            Ok(()) => {
                map.made_durable(unsynced.without(&self.unsynced));
                self.is_losing = false;
            }
            Err(error) => {
                self.lose_written(map);
                self.failed(&error, !self.is_losing, "what was written since the last flush is fetched again");
                self.is_losing = true;
            }
        }
        for answer in waiting {
            // Nobody hears it when the warming was ended meanwhile.
            let _ = answer.send(());
        }
    }

    /// The file could not be flushed. What was written during the flush is lost, too: of its failure the kernel has told already.
    fn lose_written(&mut self, map: &Map) {
        self.unsynced = Unsynced::default();
        self.written_since = None;
        map.lose_written();
        // What an earlier process left in the file may be lost as well.
        self.shared.forget_pages();
        self.claim_cursor = 0;
    }

    fn write_map(&mut self) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let Some(map) = shared.map() else { return Ok(()) };
        let dirty = map.take_dirty();
        for (at, (map_block, words)) in dirty.iter().enumerate() {
            let block = encode_map_block(words, *map_block, self.seed);
            if let Err(error) = self.state.write_all_at(&block, map_block_at(*map_block)) {
                map.still_dirty(dirty[at..].iter().map(|(map_block, _)| *map_block));
                return Err(error);
            }
        }
        Ok(())
    }

    /// Writes down which file this is, and that it is in use. By then nothing in the state is about another file, on the disk either.
    fn introduce(&mut self) -> io::Result<()> {
        if self.is_introduced {
            return Ok(());
        }
        self.sync_state()?;
        let condition = Condition {
            is_complete: false,
            is_foreign: self.is_foreign,
            file: FileId::of(&self.shared.data.metadata()?),
            changed: None,
        };
        self.state.write_all_at(&condition.encode(self.seed), BLOCK_BYTES as u64)?;
        self.is_introduced = true;
        Ok(())
    }

    /// Flushes everything and writes down that the file is as it should be.
    fn write_end(&mut self, is_complete: bool) -> io::Result<()> {
        if let Err(error) = self.shared.data.sync_all() {
            let shared = Arc::clone(&self.shared);
            if let Some(map) = shared.map() {
                self.lose_written(map);
            }
            return Err(error);
        }
        self.write_map()?;
        self.sync_state()?;
        let metadata = self.shared.data.metadata()?;
        let condition = Condition {
            is_complete,
            is_foreign: self.is_foreign,
            file: FileId::of(&metadata),
            changed: Condition::changed_at(&metadata),
        };
        self.state.write_all_at(&condition.encode(self.seed), BLOCK_BYTES as u64)?;
        self.sync_state()
    }

    /// Flushes the state. When that fails, nothing written to it since the last good flush need be on the disk, now or ever, as with the
    /// file itself: all of it is written again, the condition last.
    ///
    /// Between its beginning and its end the state is left to the kernel. A block that is lost says less than is there, since what is
    /// present was on the disk before the block was written, and what is not present any more has no other bytes than the right ones
    /// written over it.
    fn sync_state(&mut self) -> io::Result<()> {
        let synced = self.state.sync_data();
        if let (Err(_), Some(map)) = (&synced, self.shared.map()) {
            map.all_dirty();
            self.is_introduced = false;
        }
        synced
    }

    /// Takes as long as the disk does. Who ends the mount waits for a bounded time only, and says so.
    fn close(mut self) {
        while self.flushing.is_some() {
            match self.inbox.receiver.recv() {
                Ok(message @ Message::Flushed(..)) => self.take(message),
                Ok(_) => {}
                // Not as long as we can send ourselves.
                Err(_) => break,
            }
        }
        self.begin_flush();
        self.flushed(self.shared.data.sync_data());
        // A flush tells also of what failed long ago, on a disk that works by now: then the second one is right.
        if let Err(error) = self.end().or_else(|_| self.end()) {
            tracing::warn!("backing file {}: {error}; it was not closed in order", self.shared.path.display());
        }
    }

    fn end(&mut self) -> io::Result<()> {
        let is_full = self.shared.map().is_some_and(|map| map.is_full());
        self.write_end(is_full)
    }

    /// Hashes some chunks that are claimed to be there.
    fn check_claims(&mut self) {
        if self.inbox.rest.is_on() || self.shared.quiet_for() < QUIET {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let Some(map) = shared.map() else { return };
        let mut claimed = Vec::new();
        let mut n_bytes = 0;
        while claimed.len() < CHECK_CHUNKS && n_bytes < CHECK_BYTES {
            let Some(chunk_idx) = map.next_claimed(self.claim_cursor) else { break };
            self.claim_cursor = chunk_idx + 1;
            n_bytes += shared.item(chunk_idx).map_or(0, |item| item.size_bytes());
            claimed.push(chunk_idx);
        }
        for (chunk_idx, chunk) in shared.check(&claimed) {
            if chunk.is_some() {
                self.is_there(chunk_idx, State::Claimed);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
