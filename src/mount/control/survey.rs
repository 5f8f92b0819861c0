//! Which chunks are at hand, looked at by a thread of its own, because a look at a disk can take any time.
//!
//! A look takes samples: every chunk of what is small, some 65,000 evenly spread ones of what is large. The first look at something is a rough one,
//! so that there soon is an answer, and later ones are finer as long as they are quick.
//!
//! Invariants: who asks sees what was there when he asked, so that after a read he sees what was read, as long as looking costs little; nobody
//! waits for a look longer than he wants; a look is made only when somebody asks, and looking takes a twentieth of the time and a burst at
//! the most; the memory for it has a bound, whatever is mounted.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::volume::Live;

/// Samples of all parts together, by round: each round after the first is made only if the one before was quick.
const ROUNDS: [u64; 3] = [1 << 10, 1 << 13, 1 << 16];

/// A round that took longer is not followed by a finer one.
const QUICK: Duration = Duration::from_secs(1);

/// Parts looked at; of a directory with more open indexes, the first.
const MAX_PARTS: usize = 256;

/// Looking takes one part in so many of the time.
const SHARE: u32 = 20;

/// What looking may take beyond its share before the last look has to do: some looks at what is large, and of what is small as many as
/// anybody asks for.
const BURST: Duration = Duration::from_secs(2);

/// What was seen at one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// Its first byte.
    pub start: u64,
    /// The byte behind its last.
    pub end: u64,
    /// Whether it was in memory.
    pub in_memory: bool,
    /// Whether there is a file for it on disk.
    pub on_disk: bool,
    /// Whether it was being fetched.
    pub is_fetching: bool,
    /// Whether something of it was read.
    pub was_read: bool,
}

/// What was seen of a part.
#[derive(Debug, Clone)]
pub struct PartLook {
    /// The part's path in the mount.
    pub path: Vec<u8>,
    /// In the order of their bytes.
    pub samples: Vec<Sample>,
    /// Whether there are more chunks than samples.
    pub is_estimate: bool,
}

/// What was seen.
#[derive(Debug, Clone)]
pub struct Look {
    /// When it was complete.
    pub at: Instant,
    /// Each part that has chunks.
    pub parts: Vec<PartLook>,
    /// Bytes in the directory that keeps chunks, of all mounts; `None` without such a directory.
    pub disk_bytes: Option<u64>,
}

/// Looks when it is asked to.
#[derive(Debug)]
pub struct Survey {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    live: Arc<Live>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    last: Option<Arc<Look>>,
    /// Looks that began, and the last of them that saw enough.
    n_begun: u64,
    n_seen: u64,
    is_looking: bool,
    is_over: bool,
    debt: Debt,
}

/// Time that looking took and that its share of the time has not made up for yet.
#[derive(Debug, Default)]
struct Debt(Option<(Instant, Duration)>);

impl Survey {
    /// Nothing is looked at yet.
    pub fn new(live: Arc<Live>) -> Self {
        Self { shared: Arc::new(Shared { live, state: Mutex::default(), changed: Condvar::new() }) }
    }

    /// What can be seen now; the last that was seen if a new look takes longer than `patience` or looking has cost too much lately, and `None` if
    /// there was none yet.
    pub fn look(&self, patience: Duration) -> Option<Arc<Look>> {
        let mut state = self.shared.lock();
        let now = Instant::now();
        if state.last.is_some() && state.debt.owed(now) >= BURST {
            return state.last.clone();
        }
        // One that is under way may have passed by where something has come since.
        let wanted = state.n_begun + 1;
        let deadline = now + patience;
        while state.n_seen < wanted {
            if !state.is_looking {
                // It saw nothing: a panic, or there is no thread to be had.
                if state.n_begun >= wanted {
                    break;
                }
                self.begin(&mut state);
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.last.clone()
    }

    fn begin(&self, state: &mut State) {
        state.n_begun += 1;
        let (shared, number) = (Arc::downgrade(&self.shared), state.n_begun);
        let started = std::thread::Builder::new().name("caifs-survey".into()).spawn(move || run(&shared, number));
        state.is_looking = started.is_ok();
    }
}

impl Drop for Survey {
    fn drop(&mut self) {
        self.shared.lock().is_over = true;
    }
}

impl Debt {
    fn owed(&self, now: Instant) -> Duration {
        let Some((at, owed)) = self.0 else { return Duration::ZERO };
        owed.saturating_sub(now.saturating_duration_since(at) / SHARE)
    }

    fn add(&mut self, now: Instant, took: Duration) {
        self.0 = Some((now, self.owed(now) + took));
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says that the thread has ended, however it did.
struct Ending<'a>(&'a Shared);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.is_looking = false;
        drop(state);
        self.0.changed.notify_all();
    }
}

/// One look, in rounds. The thread ends with it: a look is a rare thing.
fn run(shared: &Weak<Shared>, number: u64) {
    // Held for the whole look: the survey may be dropped meanwhile, and tells so.
    let Some(shared) = shared.upgrade() else { return };
    let _ending = Ending(&shared);
    for (round, n_samples) in ROUNDS.into_iter().enumerate() {
        let start = Instant::now();
        let Some((parts, disk_bytes)) = look(&shared, n_samples) else { return };
        let is_fine = parts.iter().all(|part| !part.is_estimate);
        let (took, now) = (start.elapsed(), Instant::now());
        let mut state = shared.lock();
        state.last = Some(Arc::new(Look { at: now, parts, disk_bytes }));
        state.debt.add(now, took);
        let is_done = is_fine || took > QUICK || round + 1 == ROUNDS.len();
        // Who waits is content with a rough answer only if there was none before.
        if is_done || round == 0 && took > QUICK / 4 {
            state.n_seen = number;
            shared.changed.notify_all();
        }
        if is_done {
            return;
        }
    }
}

/// Looks at so many samples; `None` when nobody wants to know any more.
fn look(shared: &Shared, n_samples: u64) -> Option<(Vec<PartLook>, Option<u64>)> {
    let mut looks = Vec::new();
    let parts: Vec<_> =
        shared.live.parts().into_iter().filter(|part| part.blob.n_pieces() > 0).take(MAX_PARTS).collect();
    let n_each = (n_samples / parts.len().max(1) as u64).max(1);
    let mut disk_bytes = None;
    for part in parts {
        let n_pieces = part.blob.n_pieces();
        let n = n_pieces.min(n_each);
        let mut samples = Vec::with_capacity(n as usize);
        for sample in 0..n {
            if sample % 256 == 0 && shared.lock().is_over {
                return None;
            }
            let number = (u128::from(sample) * u128::from(n_pieces) / u128::from(n)) as u64;
            let Some(span) = part.blob.piece_span(number) else { continue };
            let (in_memory, is_fetching) = part.blob.is_at_hand(number);
            let on_disk = part.blob.is_on_disk(number);
            let was_read = part.blob.touched().is_some_and(|touched| touched.has(span.clone()));
            samples.push(Sample { start: span.start, end: span.end, in_memory, on_disk, is_fetching, was_read });
        }
        let disk = match &part.blob {
            crate::blob::Blob::Chunked(blob) => blob.cache().disk(),
            crate::blob::Blob::Remote(blocks) => blocks.disk(),
            crate::blob::Blob::File(_) => None,
        };
        if let (None, Some(disk)) = (disk_bytes, disk) {
            disk_bytes = Some(disk.weight_bytes());
        }
        looks.push(PartLook { path: part.path, samples, is_estimate: n < n_pieces });
    }
    Some((looks, disk_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MountConfig;
    use crate::report::Report;
    use crate::store::location::FileLocation;

    #[test]
    fn a_mount_without_chunks_is_seen_at_once_and_the_thread_ends() {
        let location = FileLocation::Local("/x.catar".into());
        let live = Arc::new(Live::new(location, MountConfig::default(), Arc::new(Report::default())));
        let survey = Survey::new(live);
        let look = survey.look(Duration::from_secs(60)).expect("nothing is to be looked at");
        assert!(look.parts.is_empty() && look.disk_bytes.is_none());
        let new = survey.look(Duration::from_secs(60)).expect("nothing is to be looked at");
        assert!(!Arc::ptr_eq(&look, &new), "what came since is seen");
        survey.shared.lock().debt.add(Instant::now(), Duration::from_secs(3600));
        let same = survey.look(Duration::from_secs(60)).expect("looking has cost too much, so the last has to do");
        assert!(Arc::ptr_eq(&new, &same));
        let shared = Arc::downgrade(&survey.shared);
        drop(survey);
        while shared.upgrade().is_some() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn who_asks_while_somebody_looks_gets_the_next_look() {
        let location = FileLocation::Local("/x.catar".into());
        let live = Arc::new(Live::new(location, MountConfig::default(), Arc::new(Report::default())));
        let survey = Survey::new(live);
        {
            let mut state = survey.shared.lock();
            (state.n_begun, state.is_looking) = (1, true);
        }
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| survey.look(Duration::from_secs(60)));
            let mut state = survey.shared.lock();
            state.n_seen = 1;
            state.last = Some(Arc::new(Look { at: Instant::now(), parts: Vec::new(), disk_bytes: Some(1) }));
            drop(state);
            drop(Ending(&survey.shared));
            let look = asked.join().expect("no panic").expect("nothing is to be looked at");
            assert_eq!(look.disk_bytes, None, "what was seen before is not what he asked for");
        });
    }

    #[test]
    fn looking_has_a_burst_and_a_share_of_the_time() {
        let (mut debt, second, mut now) = (Debt::default(), Duration::from_secs(1), Instant::now());
        let (start, mut n_looks) = (now, 0);
        assert_eq!(debt.owed(now), Duration::ZERO);
        // Somebody asks ten times a second for what takes half a second.
        while now < start + 100 * second {
            if debt.owed(now) < BURST {
                now += second / 2;
                debt.add(now, second / 2);
                n_looks += 1;
            }
            now += second / 10;
        }
        assert!((12..=15).contains(&n_looks), "{n_looks}: 4 at once, and 10 in 100 seconds");
        assert_eq!(debt.owed(now + 100 * second), Duration::ZERO);
    }
}
