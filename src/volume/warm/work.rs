//! Seeing to it that the chunks of a range are kept: looks which are, and fetches the others, several at a time.

use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::time::sleep;

use super::{Tally, Warming};
use crate::blob::{Blob, BlobError, ChunkedBlob};
use crate::cache::blocks::{BLOCK_BYTES, Blocks};
use crate::cache::{BATCH_CHUNKS, GetError, Want};
use crate::store::retry::RetryPolicy;

/// Chunks that are looked for in the cache at a time.
const LOOK_CHUNKS: usize = 64;

/// Batches under way at the same time. How many chunks are really fetched at once is for the cache to say.
const MAX_BATCHES: usize = 8;

/// Chunks remembered as met, so that what comes again is counted and looked for once: half a megabyte of them.
const MAX_MET: usize = 1 << 15;

/// The longest pause before something is tried again.
pub(super) const MAX_PAUSE: Duration = Duration::from_secs(60);

/// Makes the cache keep the chunks that a range lies in. What cannot be had is in the tally.
pub(super) async fn keep(blob: &Blob, range: Range<u64>, warming: &Warming, tally: &Tally) {
    let Some(mut pieces) = Pieces::new(blob, range, warming) else { return };
    let mut under_way = FuturesUnordered::new();
    let mut waiting: VecDeque<Batch> = VecDeque::new();
    let mut is_over = false;
    loop {
        while under_way.len() < MAX_BATCHES
            && let Some(batch) = waiting.pop_front()
        {
            let getter = pieces.getter.clone();
            under_way.push(async move { get(&getter, batch, warming, tally).await });
        }
        if waiting.is_empty() && under_way.len() < MAX_BATCHES && !is_over {
            match pieces.next_missing(tally).await {
                Ok(Some(batches)) => waiting.extend(batches),
                Ok(None) => is_over = true,
                Err(error) => {
                    tally.failed(1, error);
                    is_over = true;
                }
            }
            continue;
        }
        match under_way.next().await {
            // There is no use in asking for the rest.
            Some(false) if warming.gives_up => return,
            Some(_) => {}
            None => return,
        }
    }
}

/// How many of the chunks of a range are not kept.
///
/// # Errors
/// The index is damaged.
pub async fn n_not_kept(blob: &Blob, range: Range<u64>) -> Result<u64, BlobError> {
    let (warming, tally) = (Warming::default(), Tally::default());
    let Some(mut pieces) = Pieces::new(blob, range, &warming) else { return Ok(0) };
    let mut n = 0;
    while let Some(batches) = pieces.next_missing(&tally).await? {
        n += batches.iter().map(Batch::n_chunks).sum::<u64>();
    }
    Ok(n)
}

/// What is fetched together.
#[derive(Debug, Clone)]
enum Batch {
    Chunks(Vec<Want>),
    Blocks(Range<u64>),
}

impl Batch {
    fn n_chunks(&self) -> u64 {
        match self {
            Self::Chunks(wants) => wants.len() as u64,
            Self::Blocks(numbers) => numbers.end - numbers.start,
        }
    }

    fn n_bytes(&self) -> u64 {
        match self {
            Self::Chunks(wants) => wants.iter().map(|want| want.n_bytes).sum(),
            Self::Blocks(numbers) => (numbers.end - numbers.start) * BLOCK_BYTES,
        }
    }
}

/// Where batches are fetched from.
#[derive(Debug, Clone)]
enum Getter {
    Chunks(ChunkedBlob),
    Blocks(Blocks),
}

/// The pieces of a range, from its start.
struct Pieces {
    getter: Getter,
    /// Number of the next chunk or block.
    next: u64,
    range: Range<u64>,
    met: HashSet<u64>,
}

impl Pieces {
    /// `None` for what needs no warming.
    fn new(blob: &Blob, range: Range<u64>, warming: &Warming) -> Option<Self> {
        if range.is_empty() {
            return None;
        }
        let (getter, next) = match blob.for_purpose(warming.purpose(false)) {
            Blob::Chunked(blob) => {
                // An index that is damaged is found so when its chunks are looked at.
                let next = blob.index().locate(range.start).ok().flatten().unwrap_or(0);
                (Getter::Chunks(blob), next as u64)
            }
            Blob::Remote(blocks) => (Getter::Blocks(blocks), range.start / BLOCK_BYTES),
            Blob::File(_) => return None,
        };
        Some(Self { getter, next, range, met: HashSet::new() })
    }

    /// Looks at the next pieces and gives those that are not kept; `None` at the end.
    async fn next_missing(&mut self, tally: &Tally) -> Result<Option<Vec<Batch>>, BlobError> {
        match self.getter.clone() {
            Getter::Chunks(blob) => self.next_chunks(&blob, tally).await,
            Getter::Blocks(blocks) => Ok(self.next_blocks(blocks, tally).await),
        }
    }

    async fn next_chunks(&mut self, blob: &ChunkedBlob, tally: &Tally) -> Result<Option<Vec<Batch>>, BlobError> {
        let index = blob.index();
        let mut wants: Vec<Want> = Vec::new();
        let mut is_any = false;
        // Not only zeros for ever without a look at the runtime.
        for _ in 0..16 * LOOK_CHUNKS {
            if wants.len() == LOOK_CHUNKS || self.next >= index.n_chunks() as u64 {
                break;
            }
            let item = index.item(self.next as usize).map_err(|error| BlobError::Index(error.to_string()))?;
            if item.start >= self.range.end {
                break;
            }
            self.next += 1;
            is_any = true;
            if self.met.len() >= MAX_MET {
                self.met.clear();
            }
            match self.met.insert(item.id.prefix()) {
                true => wants.push(Want { id: item.id, n_bytes: item.size_bytes() }),
                false => tally.done_bytes.add(item.size_bytes()),
            }
        }
        index.source().check_unchanged().map_err(BlobError::Index)?;
        if !is_any {
            return Ok(None);
        }
        let mut missing = Vec::with_capacity(wants.len());
        for (want, is_kept) in wants.iter().zip(kept(blob, &wants).await) {
            match is_kept {
                true => present(tally, 1, want.n_bytes),
                false => missing.push(*want),
            }
        }
        Ok(Some(missing.chunks(BATCH_CHUNKS).map(|batch| Batch::Chunks(batch.to_vec())).collect()))
    }

    async fn next_blocks(&mut self, blocks: Blocks, tally: &Tally) -> Option<Vec<Batch>> {
        let end = self.range.end.min(blocks.size()).div_ceil(BLOCK_BYTES).min(self.next + LOOK_CHUNKS as u64);
        let numbers = self.next..end;
        if numbers.is_empty() {
            return None;
        }
        self.next = end;
        let looked_at = numbers.clone();
        let looked = tokio::task::spawn_blocking(move || looked_at.map(|number| blocks.is_on_disk(number)).collect());
        let is_kept: Vec<bool> = looked.await.unwrap_or_default();
        let mut batches: Vec<Batch> = Vec::new();
        for (number, is_kept) in numbers.zip(is_kept) {
            match (is_kept, batches.last_mut()) {
                (true, _) => present(tally, 1, BLOCK_BYTES),
                (false, Some(Batch::Blocks(run))) if run.end == number && run.end - run.start < 16 => run.end += 1,
                (false, _) => batches.push(Batch::Blocks(number..number + 1)),
            }
        }
        Some(batches)
    }
}

pub(super) fn present(tally: &Tally, n: u64, n_bytes: u64) {
    tally.n_present.add(n);
    tally.done_bytes.add(n_bytes);
}

/// Fetches some chunks, whatever is kept of them. Whether nothing failed in a way that can pass.
pub(in crate::volume) async fn fetch(blob: &ChunkedBlob, wants: Vec<Want>, warming: &Warming, tally: &Tally) -> bool {
    get(&Getter::Chunks(blob.clone()), Batch::Chunks(wants), warming, tally).await
}

/// Which of some chunks are kept, as far as can be told without reading them.
pub(in crate::volume) async fn kept(blob: &ChunkedBlob, wants: &[Want]) -> Vec<bool> {
    let cache = blob.cache();
    if let Some(disk) = cache.disk() {
        let (disk, ids): (_, Vec<_>) = (Arc::clone(disk), wants.iter().map(|want| want.id).collect());
        let looked = tokio::task::spawn_blocking(move || ids.into_iter().map(|id| disk.has(id)).collect());
        return looked.await.unwrap_or_else(|_| vec![false; wants.len()]);
    }
    let Some(keeper) = cache.keeper() else { return vec![false; wants.len()] };
    let store = keeper.store();
    let asked = wants.iter().map(|want| store.has(want.id));
    // A cache that cannot be asked keeps nothing.
    futures_util::future::join_all(asked).await.into_iter().map(|has| has.unwrap_or(false)).collect()
}

/// Gets a batch, and what failed of it again if that can help. Whether nothing failed in a way that can pass.
async fn get(getter: &Getter, batch: Batch, warming: &Warming, tally: &Tally) -> bool {
    let pauses = RetryPolicy { n_retries: warming.n_retries, base: warming.pause, max: MAX_PAUSE };
    let mut batch = batch;
    for n_before in 0.. {
        let mut again = Vec::new();
        let mut last_error = None;
        match (getter, &batch) {
            (Getter::Chunks(blob), Batch::Chunks(wants)) => {
                let outcomes = blob.cache().get_each(blob.index().digest(), wants).await;
                for (want, outcome) in wants.iter().zip(outcomes) {
                    match outcome {
                        Ok(()) => fetched(tally, 1, want.n_bytes),
                        Err(error) if can_pass(&error) => {
                            again.push(*want);
                            last_error = Some(error);
                        }
                        Err(error) => failed(tally, 1, want.n_bytes, &error),
                    }
                }
                batch = Batch::Chunks(again);
            }
            (Getter::Blocks(blocks), Batch::Blocks(numbers)) => match blocks.fetch(numbers.clone()).await {
                Ok(()) => fetched(tally, batch.n_chunks(), batch.n_bytes()),
                Err(error) if can_pass(&error) => last_error = Some(error),
                Err(error) => failed(tally, batch.n_chunks(), batch.n_bytes(), &error),
            },
            _ => {}
        }
        let Some(error) = last_error else { return true };
        if n_before >= warming.n_retries {
            failed(tally, batch.n_chunks(), batch.n_bytes(), &error);
            return false;
        }
        tracing::debug!("warming: {error}; trying again later");
        sleep(pauses.wait(n_before)).await;
    }
    true
}

pub(super) fn fetched(tally: &Tally, n: u64, n_bytes: u64) {
    tally.n_fetched.add(n);
    tally.done_bytes.add(n_bytes);
}

fn failed(tally: &Tally, n: u64, n_bytes: u64, error: &GetError) {
    tally.failed(n, error);
    tally.done_bytes.add(n_bytes);
}

/// Whether the same can succeed later.
pub(super) fn can_pass(error: &GetError) -> bool {
    match error {
        GetError::Store(error) => error.is_transient,
        GetError::Deadline { .. } => true,
        GetError::Missing { .. }
        | GetError::Bad { .. }
        | GetError::WrongLength { .. }
        | GetError::Offline { .. }
        | GetError::Abandoned => false,
    }
}
