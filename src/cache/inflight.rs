//! What is being fetched (chunks, blocks of files): who asks first fetches, everyone else waits for that answer.
//!
//! Invariants: a thing is fetched by at most one leader at a time; a leader that goes away without an answer (a panic, a
//! stopped runtime) wakes its followers with an error, by `Drop`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio::time::Instant;

/// Nothing yet, the thing `T`, or why it cannot be had.
type Outcome<T, E> = Option<Result<T, E>>;

/// What comes of each, and since when it has been in flight.
type Table<K, T, E> = HashMap<K, (watch::Receiver<Outcome<T, E>>, Instant)>;

/// The table of what is in flight, by its key.
#[derive(Debug)]
pub(super) struct Inflight<K, T, E> {
    /// Never held over I/O or await. The memory tier's shard locks may be taken under it, not the other way round.
    table: Mutex<Table<K, T, E>>,
}

impl<K, T, E> Default for Inflight<K, T, E> {
    fn default() -> Self {
        Self { table: Mutex::default() }
    }
}

/// An outcome for those who wait in vain.
pub(super) trait Abandoned {
    /// The fetch ended without an answer.
    fn abandoned() -> Self;
}

/// What [`Inflight::join`] made of the caller.
#[derive(Debug)]
pub(super) enum Role<K: Copy + Eq + Hash, T, E> {
    /// It came in while the caller was looking.
    Arrived(T),
    /// The caller must fetch it and tell.
    Leader(Leader<K, T, E>, Follower<T, E>),
    /// Someone else fetches it.
    Follower(Follower<T, E>),
}

/// The duty to fetch something and to tell what came of it.
#[derive(Debug)]
pub(super) struct Leader<K: Copy + Eq + Hash, T, E> {
    key: K,
    inflight: Arc<Inflight<K, T, E>>,
    outcome: watch::Sender<Outcome<T, E>>,
    /// Whether the table's entry is gone already; one that is there now is another leader's.
    is_done: bool,
}

/// The right to be told what came of a fetch.
#[derive(Debug)]
pub(super) struct Follower<T, E>(watch::Receiver<Outcome<T, E>>);

impl<K: Copy + Eq + Hash, T, E> Inflight<K, T, E> {
    /// Becomes the leader for a key or follows the one there is. `look_again` looks in memory once more, under
    /// the lock: it may have arrived between the caller's look and this one.
    pub(super) fn join(self: &Arc<Self>, key: K, look_again: impl FnOnce() -> Option<T>) -> Role<K, T, E> {
        let mut table = self.lock();
        match table.entry(key) {
            Entry::Occupied(entry) => Role::Follower(Follower(entry.get().0.clone())),
            Entry::Vacant(entry) => {
                if let Some(found) = look_again() {
                    return Role::Arrived(found);
                }
                let (outcome, receiver) = watch::channel(None);
                entry.insert((receiver.clone(), Instant::now()));
                let leader = Leader { key, inflight: Arc::clone(self), outcome, is_done: false };
                Role::Leader(leader, Follower(receiver))
            }
        }
    }

    /// How many are in flight.
    pub(super) fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether something is in flight.
    pub(super) fn has(&self, key: &K) -> bool {
        self.lock().contains_key(key)
    }

    /// What is in flight and since when, the oldest first, of those at the most so many.
    pub(super) fn oldest(&self, n: usize) -> Vec<(K, Instant)> {
        let mut all: Vec<(K, Instant)> = self.lock().iter().map(|(key, (_, since))| (*key, *since)).collect();
        all.sort_by_key(|(_, since)| *since);
        all.truncate(n);
        all
    }

    fn lock(&self) -> MutexGuard<'_, Table<K, T, E>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Copy + Eq + Hash, T, E> Leader<K, T, E> {
    /// What to fetch.
    pub(super) fn key(&self) -> K {
        self.key
    }

    /// Tells the followers. What was fetched must be in memory before, so that nobody fetches it again.
    pub(super) fn tell(mut self, outcome: Result<T, E>) {
        // Before anyone is told, so that who asks again after a failure starts a new fetch and is not given the old answer.
        self.inflight.lock().remove(&self.key);
        self.is_done = true;
        self.outcome.send_replace(Some(outcome));
    }
}

impl<K: Copy + Eq + Hash, T, E> Drop for Leader<K, T, E> {
    fn drop(&mut self) {
        if !self.is_done {
            self.inflight.lock().remove(&self.key);
        }
    }
}

impl<T: Clone, E: Clone + Abandoned> Follower<T, E> {
    /// Waits for the leader's answer.
    pub(super) async fn outcome(mut self) -> Result<T, E> {
        match self.0.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().unwrap_or(Err(E::abandoned())),
            Err(_) => Err(E::abandoned()),
        }
    }
}
