//! Reads of a blob that has a backing file: what is there comes from the file, the rest through the cache, and is kept then.

use std::io;
use std::ops::Range;

use tokio::time::Instant;

use super::*;
use crate::blob::backing::{Backing, BackingConfig, BackingError, Held, Presence, is_hashed_at_once};
use crate::blob::replies::Reply;

/// Bytes that are in the file: where in the reply they belong, where in the blob they are, and the pieces they are of.
struct Run {
    reply: Range<usize>,
    offset: u64,
    pieces: Range<usize>,
}

/// How often a chunk is offered again after a rest of the backing file, which is a second at first and a minute at last: for some ten
/// minutes.
const MAX_RESTS: u32 = 14;

/// What came of filling a chunk into a backing file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    /// It was there, or there is no such file.
    There,
    /// It was fetched and written.
    Kept,
    /// The file takes nothing: its disk is full or fails, or another process fills it.
    Refused,
}

impl ChunkedBlob {
    /// Keeps a plain copy of the blob in a file from now on, and reads from it what is there. A large index is hashed first, in the
    /// background, so that this takes the same time for every size; a failure is logged then.
    ///
    /// # Errors
    /// As [`BackingError`] says. The blob goes on without.
    pub fn keep_in_file(&self, config: BackingConfig) -> Result<(), BackingError> {
        let shared = &self.shared;
        if shared.size == 0 {
            return Ok(());
        }
        let report = Arc::clone(self.cache.report());
        let open = |shared: &Shared| {
            let backing = Backing::open(Arc::clone(&shared.index), &config, Arc::clone(&report))?;
            // A blob gets one backing file.
            drop(shared.backing.set(Arc::new(backing)));
            Ok(())
        };
        if is_hashed_at_once(&shared.index) {
            return open(shared);
        }
        let opening = Opening::begin(shared);
        let shared = Arc::clone(shared);
        let config = config.clone();
        let work = move || {
            let _opening = opening;
            let opened = Backing::open(Arc::clone(&shared.index), &config, report);
            match opened {
                Ok(backing) => drop(shared.backing.set(Arc::new(backing))),
                Err(error) => tracing::error!("the mount goes on without its backing file: {error}"),
            }
        };
        let started = std::thread::Builder::new().name("caifs-backing".to_owned()).spawn(work);
        started.map(drop).map_err(|error| BackingError::Unusable(format!("starting a thread: {error}")))
    }

    /// The backing file, if there is one in use.
    pub fn backing(&self) -> Option<&Arc<Backing>> {
        self.shared.backing.get()
    }

    /// The same, once it is known: waits for one that is being opened in the background.
    pub async fn settled_backing(&self) -> Option<&Arc<Backing>> {
        let mut is_opening = self.shared.is_opening_backing.subscribe();
        // It fails only when the sender is gone, which we have.
        let _ = is_opening.wait_for(|is_opening| !is_opening).await;
        self.backing()
    }

    /// How much of the blob is in its backing file; `None` without one.
    pub fn presence(&self) -> Option<Presence> {
        self.backing().map(|backing| backing.presence())
    }

    /// Makes sure that a chunk, by its number in the index, is in the backing file, and waits for its disk. After a fault of the disk, or
    /// when it was full, nothing is fetched until it is time to try again, and what was fetched is kept back until then.
    ///
    /// # Errors
    /// The chunk cannot be had.
    pub async fn fill(&self, chunk_idx: usize) -> Result<Filled, BlobError> {
        let Some(backing) = self.backing() else { return Ok(Filled::There) };
        if backing.has(chunk_idx) {
            return Ok(Filled::There);
        }
        if backing.held(chunk_idx) == Held::Claimed {
            let checking = Arc::clone(backing);
            let checked = tokio::task::spawn_blocking(move || checking.check(&[chunk_idx])).await;
            if checked.map_err(|_| BlobError::Abandoned)?.iter().any(|(_, chunk)| chunk.is_some()) {
                return Ok(Filled::There);
            }
        }
        if !backing.rested().await {
            return Ok(Filled::Refused);
        }
        let item = self.shared.index.item(chunk_idx).map_err(|error| self.shared.damaged(error))?;
        let chunk = self.cache.get(self.shared.digest, want(&item)).await?;
        let mut n_rests = 0;
        while !backing.keep(chunk_idx, &chunk).await {
            if n_rests == MAX_RESTS {
                return Ok(Filled::Refused);
            }
            n_rests += 1;
            backing.rested().await;
        }
        Ok(Filled::Kept)
    }

    /// Waits until what was filled into the backing file by now was flushed. A number that is another one each time when something that
    /// was filled may be lost since.
    pub async fn flushed(&self) -> u64 {
        match self.backing() {
            Some(backing) => backing.flushed().await,
            None => 0,
        }
    }

    /// Whether a chunk, by its number in the index, is in the backing file; `true` without one.
    pub fn is_filled(&self, chunk_idx: usize) -> bool {
        self.backing().is_none_or(|backing| backing.has(chunk_idx))
    }

    /// Whether all of the blob is in its backing file.
    pub(super) fn is_complete(&self) -> bool {
        self.backing().is_some_and(|backing| backing.complete_file().is_some())
    }

    /// Whether a reader finds a chunk, by its number in the index, in the backing file, as far as is known before it is looked at.
    pub fn is_in_file(&self, chunk_idx: usize) -> bool {
        self.backing().is_some_and(|backing| backing.held(chunk_idx) != Held::No)
    }

    /// As [`ChunkedBlob::read_at`], with a backing file.
    pub(super) async fn read_backed(
        &self,
        backing: &Arc<Backing>,
        offset: u64,
        n_bytes: usize,
    ) -> Result<Bytes, BlobError> {
        let shared = &self.shared;
        if backing.complete_file().is_some() {
            if let Some(touches) = self.cache.touches() {
                // The file is read without the index. One that was damaged since names nothing, and hinders nobody.
                shared.pieces(offset, n_bytes).iter().flatten().for_each(|piece| touches.touched(piece.want.id));
            }
            let whole = Run { reply: 0..n_bytes, offset, pieces: 0..0 };
            let (reply, lost) = read_runs(backing, shared.replies.begin(n_bytes).await, vec![whole]).await?;
            if lost.is_empty() {
                backing.report().n_backing_hits.add(1);
                return Ok(Bytes::from_owner(reply));
            }
        }
        // Fetching ends about then, and so has to end what the answer waits for after it.
        let by = Instant::now() + self.cache.fetch_timeout();
        let pieces = shared.pieces(offset, n_bytes)?;
        let held: Vec<Held> = pieces.iter().map(|piece| backing.held(piece.chunk_idx)).collect();
        if let Some(touches) = self.cache.touches() {
            // The cache tells of those that it is asked for.
            let in_file = pieces.iter().zip(&held).filter(|(_, held)| **held != Held::No);
            in_file.for_each(|(piece, _)| touches.touched(piece.want.id));
        }
        if let ([piece], [Held::No]) = (pieces.as_slice(), held.as_slice()) {
            let chunk = match self.cache.peek(&piece.want) {
                Some(chunk) => chunk,
                None => self.cache.get(shared.digest, piece.want).await?,
            };
            let plain = chunk.plain().slice(piece.range.clone());
            backing.offer(&[(piece.chunk_idx, chunk)], by).await;
            return Ok(plain);
        }
        let of_kind = |kind| (0..pieces.len()).filter(|&piece_idx| held[piece_idx] == kind).collect::<Vec<usize>>();
        let mut claimed = of_kind(Held::Claimed);
        let mut missing = of_kind(Held::No);
        // What was fetched a moment ago is in memory still, as a rule.
        let mut at_hand = Vec::new();
        claimed.retain(|&piece_idx| match self.cache.peek(&pieces[piece_idx].want) {
            Some(chunk) => {
                at_hand.push((piece_idx, chunk));
                false
            }
            None => true,
        });
        // Claimed chunks are read as a whole.
        let claimed_bytes: u64 = claimed.iter().map(|&piece_idx| pieces[piece_idx].want.n_bytes).sum();
        let mut reply = shared.replies.begin_with(n_bytes, claimed_bytes).await;
        let mut starts = Vec::with_capacity(pieces.len());
        let mut n_placed = 0;
        for piece in &pieces {
            starts.push(n_placed);
            n_placed += piece.range.len();
        }
        let place = |reply: &mut Reply, piece_idx: usize, chunk: &Chunk| {
            let range = &pieces[piece_idx].range;
            reply.bytes_mut()[starts[piece_idx]..][..range.len()].copy_from_slice(&chunk.plain()[range.clone()]);
        };

        for (piece_idx, chunk) in at_hand {
            place(&mut reply, piece_idx, &chunk);
        }
        let runs = runs(&held, &starts, n_bytes, offset);
        let (read, lost) = read_runs(backing, reply, runs).await?;
        reply = read;
        for (run, error) in lost {
            for piece_idx in run.pieces {
                backing.lost(pieces[piece_idx].chunk_idx, &error);
                missing.push(piece_idx);
            }
        }
        if !claimed.is_empty() {
            let (backing, numbers) = (Arc::clone(backing), claimed.iter().map(|&idx| pieces[idx].chunk_idx));
            let numbers: Vec<usize> = numbers.collect();
            let checked = tokio::task::spawn_blocking(move || backing.check(&numbers)).await;
            let checked = checked.map_err(|_| BlobError::Abandoned)?;
            for piece_idx in claimed {
                let found = checked.iter().find(|(chunk_idx, _)| *chunk_idx == pieces[piece_idx].chunk_idx);
                match found {
                    Some((_, Some(chunk))) => place(&mut reply, piece_idx, chunk),
                    _ => missing.push(piece_idx),
                }
            }
        }
        match missing.is_empty() {
            true => backing.report().n_backing_hits.add(1),
            false => {
                let wants: Vec<Want> = missing.iter().map(|&piece_idx| pieces[piece_idx].want).collect();
                let mut got = Vec::with_capacity(wants.len());
                let take = |want_idx: usize, chunk: Chunk| {
                    place(&mut reply, missing[want_idx], &chunk);
                    got.push((pieces[missing[want_idx]].chunk_idx, chunk));
                };
                self.cache.get_many(shared.digest, &wants, take).await?;
                backing.offer(&got, by).await;
            }
        }
        Ok(Bytes::from_owner(reply))
    }
}

/// A backing file that is being opened, until this is dropped: also when its thread panics or could not be started.
struct Opening(Arc<Shared>);

impl Opening {
    fn begin(shared: &Arc<Shared>) -> Self {
        shared.is_opening_backing.send_replace(true);
        Self(Arc::clone(shared))
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        self.0.is_opening_backing.send_replace(false);
    }
}

/// The parts of a reply that are in the file, as long as they go.
fn runs(held: &[Held], starts: &[usize], n_bytes: usize, offset: u64) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (piece_idx, _) in held.iter().enumerate().filter(|(_, held)| **held == Held::Yes) {
        let end = starts.get(piece_idx + 1).copied().unwrap_or(n_bytes);
        match runs.last_mut() {
            Some(run) if run.pieces.end == piece_idx => {
                run.pieces.end += 1;
                run.reply.end = end;
            }
            _ => {
                let start = starts[piece_idx];
                runs.push(Run { reply: start..end, offset: offset + start as u64, pieces: piece_idx..piece_idx + 1 });
            }
        }
    }
    runs
}

/// Reads runs into a reply: what the page cache has on the spot, the rest on a blocking thread. Gives those that cannot be read.
async fn read_runs(
    backing: &Arc<Backing>,
    mut reply: Reply,
    mut runs: Vec<Run>,
) -> Result<(Reply, Vec<(Run, io::Error)>), BlobError> {
    runs.retain_mut(|run| {
        let n_read = backing.read_now(&mut reply.bytes_mut()[run.reply.clone()], run.offset);
        // What was read needs no second time; which piece it ends in is of no account.
        run.reply.start += n_read;
        run.offset += n_read as u64;
        !run.reply.is_empty()
    });
    if runs.is_empty() {
        return Ok((reply, Vec::new()));
    }
    let backing = Arc::clone(backing);
    let read = tokio::task::spawn_blocking(move || {
        let mut lost = Vec::new();
        for run in runs {
            if let Err(error) = backing.read(&mut reply.bytes_mut()[run.reply.clone()], run.offset) {
                lost.push((run, error));
            }
        }
        (reply, lost)
    });
    read.await.map_err(|_| BlobError::Abandoned)
}
