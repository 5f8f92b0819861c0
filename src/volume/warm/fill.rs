//! Seeing to it that the chunks of a range are in the backing file of their blob.
//!
//! A range is gone through again as long as the disk of the file loses what was written. What counts in the end is what is in the file
//! then, on its disk: a chunk that failed and came later is no failure, and one that was there and was lost is one.

use std::ops::Range;

use futures_util::stream::StreamExt;
use tokio::time::sleep;

use super::work::{MAX_PAUSE, can_pass, fetched, present};
use super::{Tally, Warming};
use crate::blob::{Blob, BlobError, ChunkedBlob, Filled};
use crate::format::index::{IndexError, Item};
use crate::store::retry::RetryPolicy;

/// Chunks on their way into a backing file at the same time.
const N_FILLED: usize = 32;

/// How often a range is gone through for what a backing file has lost meanwhile, since its disk failed. The pauses between are the file's.
const MAX_AGAIN: u32 = 14;

/// Why chunks are not in the file that a store would have given.
const TAKES_NOTHING: &str =
    "the backing file takes nothing (its disk is full or fails, or another mount fills it); the rest is not fetched";

/// Sees to it that the chunks of a range are in the backing file of their blob, on its disk. What cannot be had is in the tally.
pub(super) async fn fill(blob: &ChunkedBlob, range: Range<u64>, warming: &Warming, tally: &Tally) {
    let Blob::Chunked(getter) = Blob::Chunked(blob.clone()).for_purpose(warming.purpose(false)) else { return };
    let mut n_losses = getter.flushed().await;
    let mut n_passes = 0;
    let (failures, takes_nothing) = loop {
        // What comes again was counted the first time. What failed before and came now is no failure any more.
        let (again, failures) = (Tally::default(), Tally::default());
        let counted = if n_passes == 0 { tally } else { &again };
        let went = fill_once(&getter, &range, warming, counted, &failures).await;
        n_passes += 1;
        let n_losses_before = std::mem::replace(&mut n_losses, getter.flushed().await);
        let is_losing = n_losses != n_losses_before;
        if went != Went::Well || !is_losing || n_passes > MAX_AGAIN {
            break (failures, is_losing || went == Went::Nowhere);
        }
    };
    let of_thread = getter.clone();
    let count = move || chunks(&of_thread, &range).filter(|(chunk_idx, _)| !of_thread.is_filled(*chunk_idx)).count();
    // It is cancelled only with all that waits for it.
    let n_missing = tokio::task::spawn_blocking(count).await.unwrap_or_default() as u64;
    if n_missing == 0 {
        return;
    }
    tally.n_failed.add(n_missing);
    if takes_nothing || failures.n_failed.get() == 0 {
        tally.tell(TAKES_NOTHING);
    }
    failures.failures().iter().for_each(|why| tally.tell(why));
}

/// The chunks that a range lies in, by their numbers.
fn chunks(blob: &ChunkedBlob, range: &Range<u64>) -> impl Iterator<Item = (usize, Result<Item, IndexError>)> {
    let (index, end) = (blob.index(), range.end);
    let first_idx = index.locate(range.start).ok().flatten().unwrap_or(0);
    let items = (first_idx..index.n_chunks()).map(move |chunk_idx| (chunk_idx, index.item(chunk_idx)));
    items.take_while(move |(_, item)| item.as_ref().map_or(true, |item| item.start < end))
}

/// Goes through a range once. `tally` counts what is there and what came, `failures` what did not.
async fn fill_once(blob: &ChunkedBlob, range: &Range<u64>, warming: &Warming, tally: &Tally, failures: &Tally) -> Went {
    let filled = futures_util::stream::iter(chunks(blob, range)).map(|(chunk_idx, item)| async move {
        match item {
            Ok(item) => fill_one(blob, chunk_idx, item.size_bytes(), warming, tally, failures).await,
            Err(error) => {
                failures.failed(1, error);
                Went::Passing
            }
        }
    });
    let mut filled = std::pin::pin!(filled.buffer_unordered(N_FILLED));
    while let Some(went) = filled.next().await {
        // What is there takes no time at all, and there may be millions of it.
        tokio::task::coop::consume_budget().await;
        match went {
            Went::Well => {}
            // There is no use in asking for the rest.
            Went::Passing if warming.gives_up => return Went::Passing,
            Went::Passing => {}
            Went::Nowhere => return Went::Nowhere,
        }
    }
    Went::Well
}

/// What came of one chunk, or of all of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Went {
    /// It is there, or never can be had.
    Well,
    /// It failed in a way that can pass.
    Passing,
    /// The file takes nothing, of other chunks neither.
    Nowhere,
}

async fn fill_one(
    blob: &ChunkedBlob,
    chunk_idx: usize,
    n_bytes: u64,
    warming: &Warming,
    tally: &Tally,
    failures: &Tally,
) -> Went {
    let pauses = RetryPolicy { n_retries: warming.n_retries, base: warming.pause, max: MAX_PAUSE };
    let mut n_failures = 0;
    loop {
        match blob.fill(chunk_idx).await {
            Ok(Filled::There) => {
                present(tally, 1, n_bytes);
                return Went::Well;
            }
            Ok(Filled::Kept) => {
                fetched(tally, 1, n_bytes);
                return Went::Well;
            }
            Ok(Filled::Refused) => return Went::Nowhere,
            Err(BlobError::Get(error)) if can_pass(&error) && n_failures < warming.n_retries => {
                sleep(pauses.wait(n_failures)).await;
                n_failures += 1;
            }
            Err(error) => {
                failures.failed(1, &error);
                tally.done_bytes.add(n_bytes);
                return match error {
                    BlobError::Get(error) if can_pass(&error) => Went::Passing,
                    _ => Went::Well,
                };
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::blob::backing::{BackingConfig, BackingFile};
    use crate::blob::source::IndexBytes;
    use crate::cache::{Cache, CacheConfig};
    use crate::digest::{ChunkId, Digest};
    use crate::format::index::{self, ChunkSizes, FLAG_SHA512_256, Index, IndexHeader};
    use crate::store::fault::{Fault, FaultStore};
    use std::sync::Arc;
    use std::time::Duration;

    const CHUNK_BYTES: u64 = 4096;
    const N_CHUNKS: u64 = 100;

    /// A blob with a backing file, of which the store gives the chunks from some number on in another way.
    fn setting(directory: &tempfile::TempDir, first_odd: u64, n_odd: u64, fault: Fault) -> ChunkedBlob {
        let plain = |i: u64| [i + 1; CHUNK_BYTES as usize / 8].map(u64::to_le_bytes).concat();
        let ids: Vec<ChunkId> = (0..N_CHUNKS).map(|i| Digest::default().id(&plain(i))).collect();
        let odd = ids[first_odd as usize..(first_odd + n_odd) as usize].to_vec();
        let store = FaultStore::new("store", move |id, _| if odd.contains(&id) { fault } else { Fault::None });
        (0..N_CHUNKS).for_each(|i| store.insert(ids[i as usize], &plain(i)));
        let sizes = ChunkSizes { min: CHUNK_BYTES, avg: CHUNK_BYTES, max: CHUNK_BYTES };
        let items = ids.iter().zip(1..).map(|(id, n)| (n * CHUNK_BYTES, id));
        let bytes = index::encode(&IndexHeader { feature_flags: FLAG_SHA512_256, sizes }, items);
        let config = CacheConfig {
            memory_bytes: 1 << 20,
            inflight_bytes: 1 << 20,
            fetch_timeout: Duration::from_millis(300),
            is_offline: false,
        };
        let cache = Cache::new(Arc::new(store), config, Arc::default());
        let blob = ChunkedBlob::new(Index::open(IndexBytes::Copied(bytes)).unwrap(), "test", cache, 1 << 20);
        let config = BackingConfig {
            file: BackingFile::At(directory.path().join("image")),
            keep_free_bytes: 0,
            memory_bytes: 1 << 20,
            max_wait: Duration::from_secs(1),
        };
        blob.keep_in_file(config).unwrap();
        blob
    }

    #[tokio::test]
    async fn what_is_not_in_the_file_in_the_end_is_what_failed() {
        let warming = Warming { gives_up: true, ..Warming::default() };
        for (n_odd, fault) in [(50, Fault::Hang), (3, Fault::Missing), (0, Fault::None)] {
            let directory = tempfile::tempdir().unwrap();
            let (blob, tally) = (setting(&directory, 50, n_odd, fault), Tally::default());
            fill(&blob, 0..N_CHUNKS * CHUNK_BYTES, &warming, &tally).await;
            let n_missing = (0..N_CHUNKS).filter(|i| !blob.is_filled(*i as usize)).count() as u64;
            assert!(n_missing == n_odd || fault == Fault::Hang && n_missing > n_odd, "{fault:?}: {n_missing}");
            assert_eq!(tally.n_failed.get(), n_missing, "{fault:?}");
            assert_eq!(tally.failures().is_empty(), n_odd == 0, "{fault:?}: {:?}", tally.failures());
            // A part of it, which is there.
            let of_part = Tally::default();
            fill(&blob, 0..10 * CHUNK_BYTES, &warming, &of_part).await;
            assert_eq!((of_part.n_present.get(), of_part.n_failed.get(), of_part.n_fetched.get()), (10, 0, 0));
        }
    }
}
