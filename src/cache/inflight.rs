//! Chunks being fetched: who asks first fetches, everyone else waits for that answer.
//!
//! Invariants: a chunk is fetched by at most one leader at a time; a leader that goes away without an answer (a panic, a
//! stopped runtime) wakes its followers with an error, by `Drop`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::GetError;
use crate::chunk::Chunk;
use crate::digest::ChunkId;

type Outcome = Option<Result<Chunk, GetError>>;

/// The table of chunks in flight.
#[derive(Debug, Default)]
pub(super) struct Inflight {
    /// Never held over I/O or await. The memory tier's shard locks may be taken under it, not the other way round.
    table: Mutex<HashMap<ChunkId, watch::Receiver<Outcome>>>,
}

/// What [`Inflight::join`] made of the caller.
#[derive(Debug)]
pub(super) enum Role {
    /// The chunk came in while the caller was looking.
    Arrived(Chunk),
    /// The caller must fetch the chunk and tell.
    Leader(Leader, Follower),
    /// Someone else fetches it.
    Follower(Follower),
}

/// The duty to fetch a chunk and to tell what came of it.
#[derive(Debug)]
pub(super) struct Leader {
    id: ChunkId,
    inflight: Arc<Inflight>,
    outcome: watch::Sender<Outcome>,
    /// Whether the table's entry is gone already; one that is there now is another leader's.
    is_done: bool,
}

/// The right to be told what came of a fetch.
#[derive(Debug)]
pub(super) struct Follower(watch::Receiver<Outcome>);

impl Inflight {
    /// Becomes the leader for a chunk or follows the one there is. `look_again` looks for the chunk in memory once more, under
    /// the lock: it may have arrived between the caller's look and this one.
    pub(super) fn join(self: &Arc<Self>, id: ChunkId, look_again: impl FnOnce() -> Option<Chunk>) -> Role {
        let mut table = self.lock();
        match table.entry(id) {
            Entry::Occupied(entry) => Role::Follower(Follower(entry.get().clone())),
            Entry::Vacant(entry) => {
                if let Some(chunk) = look_again() {
                    return Role::Arrived(chunk);
                }
                let (outcome, receiver) = watch::channel(None);
                entry.insert(receiver.clone());
                let leader = Leader { id, inflight: Arc::clone(self), outcome, is_done: false };
                Role::Leader(leader, Follower(receiver))
            }
        }
    }

    /// How many chunks are in flight.
    pub(super) fn len(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ChunkId, watch::Receiver<Outcome>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Leader {
    /// The chunk to fetch.
    pub(super) fn id(&self) -> ChunkId {
        self.id
    }

    /// Tells the followers. What was fetched must be in memory before, so that nobody fetches it again.
    pub(super) fn tell(mut self, outcome: Result<Chunk, GetError>) {
        // Before anyone is told, so that who asks again after a failure starts a new fetch and is not given the old answer.
        self.inflight.lock().remove(&self.id);
        self.is_done = true;
        self.outcome.send_replace(Some(outcome));
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        if !self.is_done {
            self.inflight.lock().remove(&self.id);
        }
    }
}

impl Follower {
    /// Waits for the leader's answer.
    pub(super) async fn outcome(mut self) -> Result<Chunk, GetError> {
        match self.0.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().unwrap_or(Err(GetError::Abandoned)),
            Err(_) => Err(GetError::Abandoned),
        }
    }
}
