//! The requests of the kernel that are under way, for whoever looks from outside; and what of their answering can be changed meanwhile.
//!
//! Only requests that were not ready at their first poll are written down: what memory answers is over before anybody could see it.
//! Invariant: a request is in the table from before it moves into its task until it is answered, however that ends.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::answer::Asked;
use super::trace::Trace;

/// Enough that the threads that take and those that answer requests rarely meet at one lock.
const N_SHARDS: u64 = 8;

/// What is known of all requests.
#[derive(Debug)]
pub struct Requests {
    /// Never held over I/O or await, one at a time.
    shards: [Mutex<HashMap<u64, (Asked, Instant)>>; N_SHARDS as usize],
    next: AtomicU64,
    io_timeout_us: AtomicU64,
    trace: OnceLock<Arc<Trace>>,
}

/// A request that waits for something else than memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestInFlight {
    /// Name of the request, as `read`.
    pub op: &'static str,
    /// The inode it is about.
    pub ino: u64,
    /// First byte of a read, or where a listing goes on.
    pub offset: u64,
    /// Bytes of a read.
    pub n_bytes: u32,
    /// How long it has been waiting.
    pub age: Duration,
}

/// A place in the table, given up on drop.
#[derive(Debug)]
pub(super) struct Entered {
    requests: Arc<Requests>,
    number: u64,
}

impl Requests {
    /// No requests, to be answered within `io_timeout`.
    pub fn new(io_timeout: Duration) -> Self {
        let requests = Self {
            shards: Default::default(),
            next: AtomicU64::new(0),
            io_timeout_us: AtomicU64::new(0),
            trace: OnceLock::new(),
        };
        requests.set_io_timeout(io_timeout);
        requests
    }

    /// By when a request is answered that begins to wait now.
    pub fn io_timeout(&self) -> Duration {
        Duration::from_micros(self.io_timeout_us.load(Ordering::Relaxed))
    }

    /// Changes that, for requests that begin to wait from now on.
    pub fn set_io_timeout(&self, io_timeout: Duration) {
        let us = u64::try_from(io_timeout.as_micros()).unwrap_or(u64::MAX);
        self.io_timeout_us.store(us, Ordering::Relaxed);
    }

    /// Writes down every request from now on. The first trace stays.
    pub fn set_trace(&self, trace: Arc<Trace>) {
        // A second one would be a mistake of the caller, and harmless.
        drop(self.trace.set(trace));
    }

    /// The trace, if there is one.
    pub fn trace(&self) -> Option<&Arc<Trace>> {
        self.trace.get()
    }

    /// How many wait.
    pub fn n_in_flight(&self) -> usize {
        (0..N_SHARDS).map(|shard| self.shard(shard).len()).sum()
    }

    /// Those that wait, the oldest first, at the most so many.
    pub fn oldest(&self, n: usize) -> Vec<RequestInFlight> {
        let mut all = Vec::new();
        for shard in 0..N_SHARDS {
            all.extend(self.shard(shard).values().copied());
        }
        all.sort_by_key(|(_, since)| *since);
        all.truncate(n);
        let shown = |(asked, since): (Asked, Instant)| RequestInFlight {
            op: asked.op,
            ino: asked.ino,
            offset: asked.offset,
            n_bytes: asked.n_bytes,
            age: since.elapsed(),
        };
        all.into_iter().map(shown).collect()
    }

    /// Writes down a request that came in at `since`.
    pub(super) fn enter(self: &Arc<Self>, asked: Asked, since: Instant) -> Entered {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.shard(number).insert(number, (asked, since));
        Entered { requests: Arc::clone(self), number }
    }

    fn shard(&self, number: u64) -> MutexGuard<'_, HashMap<u64, (Asked, Instant)>> {
        self.shards[(number % N_SHARDS) as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.requests.shard(self.number).remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_are_shown_first_and_those_answered_are_gone() {
        let requests = Arc::new(Requests::new(Duration::from_millis(1500)));
        let now = Instant::now();
        let entered: Vec<Entered> = (0..20)
            .map(|ino| {
                let asked = Asked { op: "read", ino, offset: 7, n_bytes: 9 };
                requests.enter(asked, now - Duration::from_secs(ino))
            })
            .collect();
        assert_eq!(requests.n_in_flight(), 20);
        let oldest = requests.oldest(3);
        assert_eq!(oldest.iter().map(|one| one.ino).collect::<Vec<_>>(), [19, 18, 17]);
        assert!(oldest[0].age >= Duration::from_secs(19) && oldest[0].op == "read");
        drop(entered);
        assert_eq!((requests.n_in_flight(), requests.oldest(9).len()), (0, 0));
        assert_eq!(requests.io_timeout(), Duration::from_millis(1500));
    }
}
