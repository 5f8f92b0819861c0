//! Fetches that nobody waits for yet: they go on beside those that somebody waits for, and never before them.
//!
//! * [`Purpose`] says for whom chunks are fetched; a [`super::Cache`] or [`super::blocks::Blocks`] is one for a purpose.
//! * `Lanes` lets such fetches in: a share of the requests, of the memory and of the threads, so that the rest is always free for readers.
//! * [`Pace`] bounds the bytes that they take in a second.
//!
//! Invariants: a chunk is let in before it is said to be in flight, so that a reader that comes to want it follows a fetch that is
//! under way, or makes its own; at no time have background fetches all of anything that a reader needs.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::MAX_REQUESTS;
use super::budget::{Budget, Share};
use crate::report::Report;

/// Chunks that may be in flight in the background at the same time; readers have the other requests for themselves.
const N_BACKGROUND: usize = MAX_REQUESTS / 4 * 3;

/// Of these, how many may be for later, so that what is read ahead finds room beside them.
const N_WARM: usize = MAX_REQUESTS / 2;

/// How long warming waits for readers to have what they wait for. Then it goes on with a few chunks all the same: where somebody always
/// waits, it would never end.
const MAX_STANDING_BACK: Duration = Duration::from_secs(1);

/// What may be taken at once after a while of nothing, as a span of the pace.
const BURST: Duration = Duration::from_millis(100);

/// For whom chunks are fetched.
#[derive(Debug, Clone, Default)]
pub enum Purpose {
    /// Somebody waits.
    #[default]
    Reader,
    /// Somebody will want them soon: they are kept in memory.
    Ahead,
    /// Somebody may want them some time: they are kept on disk.
    Warm(Warmth),
}

/// How chunks are fetched for later.
#[derive(Debug, Clone, Default)]
pub struct Warmth {
    /// How fast; several may share one pace.
    pub pace: Option<Arc<Pace>>,
    /// Keep them in memory as well, for want of a disk tier.
    pub into_memory: bool,
    /// Who reads soon what is fetched here does not have to be stood back for: it is fetched for them.
    pub is_urgent: bool,
}

impl Purpose {
    /// Whether nobody waits.
    pub fn is_background(&self) -> bool {
        !matches!(self, Self::Reader)
    }

    /// The most bytes that are to be let in together.
    pub(super) fn max_group_bytes(&self) -> u64 {
        match self {
            Self::Warm(Warmth { pace: Some(pace), .. }) => pace.bytes_per_second() / 4,
            _ => u64::MAX,
        }
    }
}

/// A limit of bytes a second, in stored form, or none. It may change at any time.
#[derive(Debug)]
pub struct Pace {
    /// [`u64::MAX`] for no limit.
    bytes_per_second: AtomicU64,
    /// Never held over await.
    state: Mutex<PaceState>,
    /// More may be taken than was said before.
    given_back: Notify,
}

#[derive(Debug)]
struct PaceState {
    /// What may be taken; below zero, what was taken too much.
    balance: f64,
    at: Instant,
}

impl Pace {
    /// A limit of so many bytes a second, at least one; `None` for no limit.
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        let state = PaceState { balance: 0.0, at: Instant::now() };
        let bytes_per_second = AtomicU64::new(rate_of(bytes_per_second));
        Self { bytes_per_second, state: Mutex::new(state), given_back: Notify::new() }
    }

    /// Another limit from now on, also for those who wait.
    pub fn set(&self, bytes_per_second: Option<u64>) {
        // What has come in until now came by the old one.
        let state = self.settled();
        self.bytes_per_second.store(rate_of(bytes_per_second), Ordering::Relaxed);
        drop(state);
        self.given_back.notify_waiters();
    }

    fn bytes_per_second(&self) -> u64 {
        self.bytes_per_second.load(Ordering::Relaxed)
    }

    /// Waits until what was taken before has been paid for, and takes so many bytes.
    async fn take(&self, n_bytes: u64) {
        loop {
            // Listens before it looks: what is given back in between must not be missed.
            let given_back = self.given_back.notified();
            let debt = {
                let mut state = self.settled();
                if state.balance >= 0.0 {
                    state.balance -= n_bytes as f64;
                    return;
                }
                -state.balance
            };
            let wait = Duration::from_secs_f64(debt / self.bytes_per_second() as f64 + 1e-6);
            let _ = tokio::time::timeout(wait, given_back).await;
        }
    }

    /// What was taken turned out to be another number of bytes.
    fn correct(&self, taken: u64, used: u64) {
        self.settled().balance += taken as f64 - used as f64;
        self.given_back.notify_waiters();
    }

    /// The state with what has come in until now.
    fn settled(&self) -> MutexGuard<'_, PaceState> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (now, rate) = (Instant::now(), self.bytes_per_second() as f64);
        let come_in = now.saturating_duration_since(state.at).as_secs_f64() * rate;
        state.balance = (state.balance + come_in).min(rate * BURST.as_secs_f64());
        state.at = now;
        state
    }
}

/// A limit as it is kept.
fn rate_of(bytes_per_second: Option<u64>) -> u64 {
    bytes_per_second.unwrap_or(u64::MAX).max(1)
}

/// What lets background fetches in.
#[derive(Debug)]
pub(super) struct Lanes {
    chunks: Arc<Semaphore>,
    warm: Arc<Semaphore>,
    bytes: Arc<Budget>,
    /// Blocking threads at the same time.
    pub(super) workers: Arc<Semaphore>,
    n_waiting: AtomicUsize,
    none_waits: Notify,
    report: Arc<Report>,
}

impl Lanes {
    /// Lanes beside readers who have an in-flight budget of so many bytes and so many workers.
    pub(super) fn new(inflight_bytes: u64, n_workers: usize, report: Arc<Report>) -> Self {
        Self {
            chunks: Arc::new(Semaphore::new(N_BACKGROUND)),
            warm: Arc::new(Semaphore::new(N_WARM)),
            bytes: Budget::new(background_bytes(inflight_bytes)),
            workers: Arc::new(Semaphore::new((n_workers / 2).max(1))),
            n_waiting: AtomicUsize::new(0),
            none_waits: Notify::new(),
            report,
        }
    }

    /// Readers have another in-flight budget from now on.
    pub(super) fn set_inflight_bytes(&self, inflight_bytes: u64) {
        self.bytes.set_limit(background_bytes(inflight_bytes));
    }

    /// Somebody waits from now on, until this is dropped.
    pub(super) fn wait(&self) -> Waiting<'_> {
        self.n_waiting.fetch_add(1, Ordering::Relaxed);
        Waiting(self)
    }

    /// Waits for room for some chunks. `None` for a reader, who is never held up here.
    pub(super) async fn enter(&self, purpose: &Purpose, n_chunks: usize, n_bytes: u64) -> Option<Slot> {
        let warmth = match purpose {
            Purpose::Reader => return None,
            Purpose::Ahead => None,
            Purpose::Warm(warmth) => Some(warmth),
        };
        let n_chunks = u32::try_from(n_chunks).unwrap_or(u32::MAX);
        let mut permits = Vec::with_capacity(3);
        let mut paced = None;
        if let Some(warmth) = warmth {
            permits.push(acquire(&self.warm, n_chunks.clamp(1, N_WARM as u32)).await?);
            if !warmth.is_urgent {
                self.stand_back().await;
            }
            if let Some(pace) = &warmth.pace {
                pace.take(n_bytes).await;
                // From here on what was taken is given back, whatever happens.
                paced = Some(Paced { pace: Arc::clone(pace), taken: n_bytes, used: AtomicU64::new(0) });
            }
        }
        permits.push(acquire(&self.chunks, n_chunks.clamp(1, N_BACKGROUND as u32)).await?);
        let share = self.bytes.take(n_bytes).await;
        self.report.background_chunks.add(u64::from(n_chunks));
        let into_memory = warmth.is_none_or(|warmth| warmth.into_memory);
        Some(Slot {
            paced,
            n_chunks: u64::from(n_chunks),
            is_warm: warmth.is_some(),
            into_memory,
            report: Arc::clone(&self.report),
            _permits: permits,
            _share: share,
        })
    }

    /// Waits until no reader waits, but not for ever.
    async fn stand_back(&self) {
        let deadline = Instant::now() + MAX_STANDING_BACK;
        loop {
            let none_waits = self.none_waits.notified();
            if self.n_waiting.load(Ordering::Relaxed) == 0 {
                return;
            }
            if tokio::time::timeout_at(deadline, none_waits).await.is_err() {
                return;
            }
        }
    }
}

/// The part of an in-flight budget that is for the background.
fn background_bytes(inflight_bytes: u64) -> u64 {
    (inflight_bytes / 2).max(1)
}

async fn acquire(semaphore: &Arc<Semaphore>, n: u32) -> Option<OwnedSemaphorePermit> {
    // Never closed, so there is always a permit in the end.
    Arc::clone(semaphore).acquire_many_owned(n).await.ok()
}

/// A reader who waits.
#[derive(Debug)]
pub(super) struct Waiting<'a>(&'a Lanes);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.0.n_waiting.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.none_waits.notify_waiters();
        }
    }
}

/// The room that some chunks have while they are fetched in the background.
#[derive(Debug)]
pub(super) struct Slot {
    paced: Option<Paced>,
    n_chunks: u64,
    is_warm: bool,
    /// Whether what comes is to be kept in memory.
    pub(super) into_memory: bool,
    report: Arc<Report>,
    _permits: Vec<OwnedSemaphorePermit>,
    _share: Share,
}

impl Slot {
    /// So many bytes came, in stored form.
    pub(super) fn fetched(&self, n_bytes: u64) {
        if let Some(paced) = &self.paced {
            paced.used.fetch_add(n_bytes, Ordering::Relaxed);
        }
    }

    /// A chunk of so many bytes is there.
    pub(super) fn arrived(&self, n_bytes: u64) {
        let report = &self.report;
        let (n_chunks, bytes) = match self.is_warm {
            true => (&report.n_warmed, &report.warmed_bytes),
            false => (&report.n_ahead, &report.ahead_bytes),
        };
        n_chunks.add(1);
        bytes.add(n_bytes);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.report.background_chunks.sub(self.n_chunks);
    }
}

/// What a slot took of a pace, before it was known how much it would use.
#[derive(Debug)]
struct Paced {
    pace: Arc<Pace>,
    taken: u64,
    used: AtomicU64,
}

impl Drop for Paced {
    fn drop(&mut self) {
        self.pace.correct(self.taken, self.used.load(Ordering::Relaxed));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::cache::{Cache, CacheConfig, Want};
    use crate::digest::Digest;
    use crate::store::fault::{Fault, FaultStore};
    use futures_util::FutureExt;

    const PERMIT_BYTES: u64 = 1024;

    fn warm(pace: Option<Arc<Pace>>, is_urgent: bool) -> Purpose {
        Purpose::Warm(Warmth { pace, is_urgent, into_memory: false })
    }

    fn lanes(inflight_bytes: u64) -> Lanes {
        Lanes::new(inflight_bytes, 8, Arc::default())
    }

    #[tokio::test(start_paused = true)]
    async fn a_pace_counts_what_was_really_used() {
        let (lanes, pace) = (lanes(1 << 30), Arc::new(Pace::new(Some(100_000))));
        let start = Instant::now();
        for _ in 0..100 {
            let slot = lanes.enter(&warm(Some(Arc::clone(&pace)), true), 1, 64_000).await.unwrap();
            // Compressed to a quarter; it takes a while until that is known.
            tokio::time::sleep(Duration::from_millis(20)).await;
            slot.fetched(16_000);
        }
        // 1.6 MB at 100 kB a second, of which the last is not waited for.
        let took = start.elapsed().as_secs_f64();
        assert!((15.5..16.5).contains(&took), "{took}");
    }

    #[tokio::test(start_paused = true)]
    async fn another_pace_holds_from_now_on_for_who_waits_as_well() {
        let pace = Pace::new(Some(1000));
        let start = Instant::now();
        pace.take(1_000_000).await;
        tokio::join!(pace.take(1_000_000), async {
            tokio::time::sleep(Duration::from_secs(10)).await;
            pace.set(Some(100_000));
        });
        // 10 kB in ten seconds, and the rest of the first MB a hundred times as fast.
        let took = start.elapsed().as_secs_f64();
        assert!((19.5..20.5).contains(&took), "{took}");
        pace.set(None);
        for _ in 0..100 {
            pace.take(1_000_000_000).await;
        }
        let took_more = start.elapsed().as_secs_f64() - took;
        assert!(took_more < 0.1, "no limit: {took_more}");
        pace.set(Some(1000));
        pace.take(1_000_000).await;
        pace.take(1).await;
        let took_more = start.elapsed().as_secs_f64() - took;
        assert!((990.0..1100.0).contains(&took_more), "and a limit again: {took_more}");
    }

    #[tokio::test(start_paused = true)]
    async fn several_share_a_pace_and_a_pause_is_no_credit() {
        let (lanes, pace) = (Arc::new(lanes(1 << 30)), Arc::new(Pace::new(Some(1_000_000))));
        tokio::time::sleep(Duration::from_secs(1000)).await;
        let start = Instant::now();
        let tasks = (0..8).map(|_| {
            let (lanes, pace) = (Arc::clone(&lanes), Arc::clone(&pace));
            tokio::spawn(async move {
                for _ in 0..10 {
                    let slot = lanes.enter(&warm(Some(Arc::clone(&pace)), true), 1, 50_000).await.unwrap();
                    slot.fetched(50_000);
                }
            })
        });
        futures_util::future::join_all(tasks).await;
        let took = start.elapsed().as_secs_f64();
        assert!((3.7..4.1).contains(&took), "4 MB at 1 MB a second, less the burst and the last: {took}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_slot_that_is_dropped_unused_gives_everything_back() {
        let (lanes, pace) = (lanes(1 << 20), Arc::new(Pace::new(Some(1))));
        for _ in 0..1000 {
            drop(lanes.enter(&warm(Some(Arc::clone(&pace)), true), 8, 1 << 19).await.unwrap());
        }
        assert_eq!(lanes.report.background_chunks.get(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn warming_stands_back_for_readers_but_goes_on_in_the_end() {
        let lanes = lanes(1 << 30);
        assert!(lanes.enter(&warm(None, false), 1, 1).now_or_never().is_some());
        let waiting = lanes.wait();
        assert!(lanes.enter(&Purpose::Ahead, 1, 1).now_or_never().is_some(), "what is read ahead is for readers");
        assert!(lanes.enter(&warm(None, true), 1, 1).now_or_never().is_some());
        let start = Instant::now();
        let patient = warm(None, false);
        let (_slot, ()) = tokio::join!(lanes.enter(&patient, 1, 1), async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            drop(waiting);
        });
        assert_eq!(start.elapsed().as_millis(), 300);
        let _waiting = lanes.wait();
        lanes.enter(&warm(None, false), 1, 1).await;
        assert_eq!(start.elapsed().as_millis(), 1300);
    }

    #[test]
    fn there_is_always_room_left_for_readers() {
        let lanes = lanes(100 * PERMIT_BYTES);
        let mut slots = Vec::new();
        while let Some(Some(slot)) = lanes.enter(&Purpose::Ahead, 1, PERMIT_BYTES).now_or_never() {
            slots.push(slot);
        }
        assert_eq!(slots.len(), N_BACKGROUND);
        const { assert!(N_BACKGROUND + 8 <= MAX_REQUESTS && N_WARM < N_BACKGROUND) };
        slots.clear();
        while let Some(Some(slot)) = lanes.enter(&Purpose::Ahead, 1, 10 * PERMIT_BYTES).now_or_never() {
            slots.push(slot);
        }
        assert_eq!(slots.len(), 5, "half of the bytes in flight");
        assert_eq!(lanes.report.background_chunks.get(), 5);
        slots.clear();
        assert!(lanes.enter(&Purpose::Ahead, 1, u64::MAX).now_or_never().flatten().is_some(), "one is always let in");
        assert_eq!(lanes.report.background_chunks.get(), 0);
    }

    /// A cache over a store that takes a second for each chunk, and the chunks in it.
    fn slow_cache(n_chunks: u32) -> (Cache, Vec<Want>) {
        let store = FaultStore::new("slow", |_, _| Fault::Delay(Duration::from_secs(1)));
        let wants = (0..n_chunks).map(|i| {
            let plain = i.to_le_bytes().repeat(1000);
            let id = Digest::default().id(&plain);
            store.insert(id, &plain);
            Want { id, n_bytes: plain.len() as u64 }
        });
        let wants = wants.collect();
        let config = CacheConfig {
            memory_bytes: 1 << 24,
            inflight_bytes: 1 << 20,
            fetch_timeout: Duration::from_secs(100),
            is_offline: false,
        };
        (Cache::new(Arc::new(store), config, Arc::default()), wants)
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_never_queues_behind_what_nobody_waits_for() {
        let (cache, wants) = slow_cache(2000);
        for purpose in [Purpose::Ahead, warm(None, true), warm(None, false)] {
            let (background, wanted) = (cache.for_purpose(purpose), wants.clone());
            tokio::spawn(async move { background.get_each(Digest::default(), &wanted[20..]).await });
        }
        tokio::time::sleep(Duration::from_millis(2500)).await;
        let start = Instant::now();
        let reads = wants[..10].iter().map(|want| cache.get(Digest::default(), *want));
        assert!(futures_util::future::join_all(reads).await.iter().all(Result::is_ok));
        assert_eq!(start.elapsed().as_secs(), 1, "as if nothing else went on");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_warmed_goes_past_the_memory_unless_a_reader_comes() {
        let (cache, wants) = slow_cache(20);
        let digest = Digest::default();
        let warming = cache.for_purpose(warm(None, false));
        assert!(warming.get_each(digest, &wants).await.iter().all(Result::is_ok));
        assert_eq!((cache.memory_weight_bytes(), cache.report().n_warmed.get()), (0, 20));
        assert!(cache.peek(&wants[0]).is_none());
        let (outcomes, read) = tokio::join!(warming.get_each(digest, &wants[..1]), async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            cache.get(digest, wants[0]).await
        });
        assert!(outcomes[0].is_ok() && read.is_ok());
        assert_eq!(cache.report().n_fetches.get(), 21, "the reader has followed");
        assert!(cache.peek(&wants[0]).is_some());
        assert!(cache.for_purpose(Purpose::Ahead).get_each(digest, &wants).await.iter().all(Result::is_ok));
        assert!(cache.peek(&wants[19]).is_some());
        assert_eq!(cache.report().n_ahead.get(), 19);
        // A fetch ends a little after its answer.
        for _ in 0..10_000 {
            if cache.report().background_chunks.get() == 0 {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
            tokio::task::yield_now().await;
        }
        panic!("{} fetches do not end", cache.report().background_chunks.get());
    }
}
