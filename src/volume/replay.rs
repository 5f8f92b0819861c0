//! Replaying a profile: what was touched first the last time is fetched before it is touched this time.
//!
//! Chunks are fetched in the order of the profile, those that the index does not have are left out. [`Follow`] tells where the readers
//! are in that order: who is faster than the replay is caught up with, and what was passed over comes at the end. As much as may be
//! read ahead lies in memory ahead of the readers' place; the rest goes to disk, if there is a cache there, or waits for the readers.
//!
//! Invariant: a replay that fails costs nothing but itself.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::Notify;

use super::warm::{Tally, Warming, work};
use crate::blob::{Blob, BlobError, ChunkedBlob};
use crate::cache::background::{Purpose, Warmth};
use crate::cache::{BATCH_CHUNKS, Want};
use crate::digest::ChunkId;
use crate::format::profile::Profile;

/// Batches under way at the same time.
const MAX_BATCHES: usize = 6;

/// How far before the replay a reader may be and still show that all readers are there: one chunk from the end of the profile that
/// happens to be touched early says nothing.
const MAX_JUMP: usize = 512;

/// Where readers are in the order of a profile.
#[derive(Debug)]
pub struct Follow {
    /// Place of each chunk by the first bytes of its id.
    places: HashMap<u64, usize>,
    /// Behind the furthest place that was touched.
    touched: AtomicUsize,
    /// Places from here on are not believed.
    limit: AtomicUsize,
    moved: Notify,
}

impl Follow {
    /// Nobody has touched anything yet.
    pub fn new(wants: &[Want]) -> Self {
        let places = wants.iter().enumerate().map(|(place, want)| (want.id.prefix(), place)).collect();
        Self { places, touched: AtomicUsize::new(0), limit: AtomicUsize::new(MAX_JUMP), moved: Notify::new() }
    }

    /// A reader touches a chunk.
    pub fn touched(&self, id: ChunkId) {
        let Some(place) = self.places.get(&id.prefix()) else { return };
        if *place < self.limit.load(Ordering::Relaxed) && self.touched.fetch_max(place + 1, Ordering::Relaxed) <= *place
        {
            self.moved.notify_one();
        }
    }

    fn place(&self) -> usize {
        self.touched.load(Ordering::Relaxed)
    }
}

/// The chunks of a profile that an index has, in the profile's order, without those that readers find in the backing file. Reads all of the
/// index, so it is for a blocking thread.
///
/// # Errors
/// The index is damaged or was changed.
pub fn known_chunks(profile: &Profile, blob: &ChunkedBlob) -> Result<Vec<Want>, BlobError> {
    let places: HashMap<ChunkId, usize> =
        profile.touches.iter().enumerate().map(|(place, touch)| (touch.id, place)).collect();
    let mut known: Vec<Option<Want>> = vec![None; profile.touches.len()];
    let index = blob.index();
    for (chunk_idx, item) in index.items().enumerate() {
        let item = item.map_err(|error| BlobError::Index(error.to_string()))?;
        // One that comes several times is wanted if it lacks in one of its places.
        if let Some(place) = places.get(&item.id).filter(|_| !blob.is_in_file(chunk_idx)) {
            known[*place] = Some(Want { id: item.id, n_bytes: item.size_bytes() });
        }
    }
    index.source().check_unchanged().map_err(BlobError::Index)?;
    Ok(known.into_iter().flatten().collect())
}

/// What may lie in memory before the readers.
#[derive(Debug, Clone, Copy)]
pub struct Ahead {
    /// So many bytes.
    pub memory_bytes: u64,
    /// Whether the replay waits for readers to come when these are there and nothing else keeps chunks; else it ends then.
    pub waits_for_readers: bool,
}

/// Fetches chunks in their order, until all are there or the stores fail for good. `follow` is told of what the readers touch
/// meanwhile. `false` if it ended early, since nobody is to be waited for.
pub async fn replay(
    blob: &ChunkedBlob,
    wants: Vec<Want>,
    follow: &Follow,
    ahead: Ahead,
    warming: &Warming,
    tally: &Tally,
) -> bool {
    let for_purpose = |into_memory| {
        let purpose = Purpose::Warm(Warmth { pace: warming.pace.clone(), into_memory, is_urgent: true });
        match Blob::Chunked(blob.clone()).for_purpose(purpose) {
            Blob::Chunked(blob) => blob,
            _ => blob.clone(),
        }
    };
    let (to_memory, to_disk) = (for_purpose(true), for_purpose(false));
    let is_kept = blob.cache().disk().is_some() || blob.cache().keeper().is_some();
    let mut order = Order::new(&wants);
    let mut under_way = FuturesUnordered::new();
    loop {
        let moved = follow.moved.notified();
        order.catch_up(follow.place());
        follow.limit.store(order.next + MAX_JUMP, Ordering::Relaxed);
        let has_room = order.ahead_bytes(follow.place()) < ahead.memory_bytes;
        let may_start = under_way.len() < MAX_BATCHES;
        let mut batch = None;
        if may_start && (has_room || is_kept) {
            batch = order.next_batch();
        }
        if may_start && batch.is_none() && is_kept {
            batch = order.next_skipped();
        }
        if let Some(batch) = batch {
            let wants = wants[batch].to_vec();
            let getter = if has_room { &to_memory } else { &to_disk };
            under_way.push(async move {
                let kept = if is_kept { work::kept(getter, &wants).await } else { vec![false; wants.len()] };
                tally.n_present.add(kept.iter().filter(|is_kept| **is_kept).count() as u64);
                let missing = wants.into_iter().zip(kept).filter(|(_, is_kept)| !is_kept).map(|(want, _)| want);
                work::fetch(getter, missing.collect(), warming, tally).await
            });
            continue;
        }
        let is_stuck = !has_room && !is_kept && !ahead.waits_for_readers;
        if under_way.is_empty() && (order.is_over(is_kept) || is_stuck) {
            return order.is_over(is_kept);
        }
        tokio::select! {
            Some(went_well) = under_way.next() => {
                if !went_well && warming.gives_up {
                    return true;
                }
            }
            () = moved => {}
        }
    }
}

/// What comes next.
struct Order {
    /// How many bytes lie before each place, and before the end.
    before: Vec<u64>,
    next: usize,
    skipped: VecDeque<Range<usize>>,
}

impl Order {
    fn new(wants: &[Want]) -> Self {
        let mut before = Vec::with_capacity(wants.len() + 1);
        let mut n_bytes = 0;
        for want in wants {
            before.push(n_bytes);
            n_bytes += want.n_bytes;
        }
        before.push(n_bytes);
        Self { before, next: 0, skipped: VecDeque::new() }
    }

    fn n_chunks(&self) -> usize {
        self.before.len() - 1
    }

    /// Goes on from where the readers are, if they are before.
    fn catch_up(&mut self, place: usize) {
        if place > self.next {
            self.skipped.push_back(self.next..place);
            self.next = place;
        }
    }

    /// Bytes between the readers and what comes next.
    fn ahead_bytes(&self, place: usize) -> u64 {
        self.before[self.next] - self.before[place.min(self.next)]
    }

    fn next_batch(&mut self) -> Option<Range<usize>> {
        let end = self.n_chunks().min(self.next + BATCH_CHUNKS);
        let batch = self.next..end;
        self.next = end;
        (!batch.is_empty()).then_some(batch)
    }

    /// Of what was passed over, when there is nothing else.
    fn next_skipped(&mut self) -> Option<Range<usize>> {
        if self.next < self.n_chunks() {
            return None;
        }
        let mut range = self.skipped.pop_front()?;
        let batch = range.start..range.end.min(range.start + BATCH_CHUNKS);
        range.start = batch.end;
        if !range.is_empty() {
            self.skipped.push_front(range);
        }
        Some(batch)
    }

    fn is_over(&self, is_kept: bool) -> bool {
        self.next == self.n_chunks() && (self.skipped.is_empty() || !is_kept)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::blob::source::IndexBytes;
    use crate::cache::{Cache, CacheConfig};
    use crate::digest::Digest;
    use crate::format::index::{self, ChunkSizes, FLAG_SHA512_256, Index, IndexHeader};
    use crate::format::profile::Touch;
    use crate::store::fault::{Fault, FaultStore};
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    const CHUNK_BYTES: u64 = 1000;

    /// A blob of so many chunks, what it wants, and the order in which the store was asked.
    fn setting(n: usize, fault: Fault) -> (ChunkedBlob, Vec<Want>, Arc<Mutex<Vec<ChunkId>>>) {
        let asked: Arc<Mutex<Vec<ChunkId>>> = Arc::default();
        let of_store = Arc::clone(&asked);
        let store = Arc::new(FaultStore::new("store", move |id, _| {
            of_store.lock().unwrap().push(id);
            fault
        }));
        let mut wants = Vec::new();
        for i in 0..n {
            let plain: Vec<u8> = (0..CHUNK_BYTES).map(|k| (i as u64 * 31 + k * (i as u64 + 1)) as u8).collect();
            let plain = [&(i as u64).to_le_bytes()[..], &plain[8..]].concat();
            let id = Digest::default().id(&plain);
            store.insert(id, &plain);
            wants.push(Want { id, n_bytes: CHUNK_BYTES });
        }
        let sizes = ChunkSizes { min: CHUNK_BYTES, avg: CHUNK_BYTES, max: CHUNK_BYTES };
        let items = wants.iter().enumerate().map(|(i, want)| ((i as u64 + 1) * CHUNK_BYTES, &want.id));
        let bytes = index::encode(&IndexHeader { feature_flags: FLAG_SHA512_256, sizes }, items);
        let config = CacheConfig {
            memory_bytes: 1 << 20,
            inflight_bytes: 1 << 20,
            fetch_timeout: Duration::from_secs(1),
            is_offline: false,
        };
        let cache = Cache::new(store, config, Arc::default());
        let blob = ChunkedBlob::new(Index::open(IndexBytes::Copied(bytes)).unwrap(), "test", cache, 1 << 20);
        (blob, wants, asked)
    }

    #[tokio::test]
    async fn what_the_index_has_is_known_in_the_profiles_order() {
        let (blob, wants, _) = setting(5, Fault::None);
        let strange = ChunkId([7; 32]);
        let ids = [wants[3].id, strange, wants[0].id];
        let profile = Profile { touches: ids.iter().map(|id| Touch { ms: 0, id: *id }).collect() };
        assert_eq!(known_chunks(&profile, &blob).unwrap(), [wants[3], wants[0]]);
    }

    fn ahead(memory_bytes: u64, waits_for_readers: bool) -> Ahead {
        Ahead { memory_bytes, waits_for_readers }
    }

    #[tokio::test]
    async fn when_something_else_is_to_be_done_nobody_is_waited_for() {
        let (blob, wants, asked) = setting(200, Fault::None);
        let follow = Follow::new(&wants);
        let (warming, tally) = (Warming::default(), Tally::default());
        assert!(!replay(&blob, wants, &follow, ahead(16 * CHUNK_BYTES, false), &warming, &tally).await);
        let n_asked = asked.lock().unwrap().len();
        assert!((16..=16 + BATCH_CHUNKS).contains(&n_asked), "{n_asked}");
    }

    #[tokio::test]
    async fn as_much_as_may_be_is_ahead_of_the_readers_and_no_more() {
        let (blob, wants, asked) = setting(200, Fault::None);
        let follow = Follow::new(&wants);
        let (warming, tally) = (Warming::default(), Tally::default());
        let n_asked = || asked.lock().unwrap().len();
        let replayed = replay(&blob, wants.clone(), &follow, ahead(16 * CHUNK_BYTES, true), &warming, &tally);
        let reader = async {
            for (place, want) in wants.iter().enumerate() {
                // It gets as far as it may without the readers.
                while n_asked() < (place + 16).min(wants.len()) {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                assert!(n_asked() <= place + 16 + BATCH_CHUNKS, "{} at {place}", n_asked());
                assert!(blob.cache().get(Digest::default(), *want).await.is_ok());
                follow.touched(want.id);
            }
        };
        assert!(tokio::join!(replayed, reader).0);
        assert_eq!((n_asked(), tally.n_fetched.get()), (200, 200), "each once");
    }

    #[tokio::test]
    async fn readers_who_are_faster_are_caught_up_with_but_not_one_that_is_elsewhere() {
        let (_, wants, _) = setting(2000, Fault::None);
        let follow = Follow::new(&wants);
        follow.touched(wants[1999].id);
        assert_eq!(follow.place(), 0);
        follow.touched(wants[300].id);
        follow.touched(wants[20].id);
        assert_eq!(follow.place(), 301);
        let mut order = Order::new(&wants);
        assert_eq!(order.next_batch(), Some(0..8));
        order.catch_up(301);
        assert_eq!((order.ahead_bytes(301), order.next_batch()), (0, Some(301..309)));
        assert_eq!(order.ahead_bytes(303), 6 * CHUNK_BYTES);
        assert_eq!(order.next_skipped(), None, "first what comes next");
        while order.next_batch().is_some() {}
        let mut places: Vec<usize> = Vec::new();
        while let Some(batch) = order.next_skipped() {
            places.extend(batch);
        }
        assert_eq!(places, (8..301).collect::<Vec<_>>());
        assert!(order.is_over(true));
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_is_away_ends_it() {
        let (blob, wants, asked) = setting(100, Fault::Hang);
        let follow = Follow::new(&wants);
        let warming = Warming { gives_up: true, ..Warming::default() };
        let tally = Tally::default();
        replay(&blob, wants, &follow, ahead(1 << 20, true), &warming, &tally).await;
        assert!(tally.n_failed.get() > 0 && !tally.failures().is_empty(), "{:?}", tally.failures());
        assert!(asked.lock().unwrap().len() < 100 * 4);
        // What was under way ends by itself.
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(blob.cache().report().background_chunks.get(), 0);
    }
}
