//! Whether there is room: bytes are added to the total that all processes share before they are written, or refused.
//!
//! Invariant: what is accepted keeps the total within the quota, and so many bytes of the file system free as are to stay so. As long as
//! nobody has counted what is there, nothing is accepted.

use std::io;
use std::sync::Arc;

use super::evict::is_nearly_full;
use super::state::State;
use super::{BLOCK_BYTES, Inner, seconds_now};

/// After this long the total is read from the disk anew, in the background: others may write and delete here as well.
const RECOUNT_AFTER_SECS: u64 = 24 * 3600;

impl Inner {
    /// Adds bytes to the total before they are written; `None` when they would be too many.
    pub(super) fn reserve(self: &Arc<Self>, n_bytes: u64) -> io::Result<Option<Reserved<'_>>> {
        self.space.refresh(self.state.peek().map_or(0, |state| state.total_bytes))?;
        let lacking_bytes = self.space.lacking_bytes(n_bytes);
        if lacking_bytes > 0 {
            self.start_eviction(0, lacking_bytes);
            return Ok(None);
        }
        let quota_bytes = self.space.quota_bytes();
        let (is_accepted, state) = self.state.update(|state| {
            let total_bytes = state.total_bytes.saturating_add(n_bytes);
            if !state.is_known || total_bytes > quota_bytes {
                return (false, *state);
            }
            state.total_bytes = total_bytes;
            if state.is_walking {
                state.since_bytes = state.since_bytes.saturating_add(n_bytes);
            }
            (true, *state)
        })?;
        if !is_accepted {
            self.start_eviction(n_bytes, 0);
            return Ok(None);
        }
        if is_nearly_full(state.total_bytes, quota_bytes) || is_stale(&state) {
            self.start_eviction(0, 0);
        }
        Ok(Some(Reserved { inner: self, n_bytes, walk: state.walk }))
    }

    /// Whether it is known without a lock that there is no room: then a chunk need not be compressed first.
    pub(super) fn is_full(self: &Arc<Self>) -> bool {
        let Some(state) = self.state.peek() else { return false };
        let quota_bytes = self.space.quota_bytes();
        let is_full = quota_bytes > 0 && (!state.is_known || state.total_bytes + BLOCK_BYTES > quota_bytes);
        if is_full {
            self.start_eviction(BLOCK_BYTES, 0);
        }
        is_full
    }

    pub(super) fn recount_if_stale(self: &Arc<Self>) {
        if self.state.peek().is_some_and(|state| is_stale(&state)) {
            self.start_eviction(0, 0);
        }
    }
}

/// Bytes added to the total for a file that is being written; taken off again unless they are spent.
pub(super) struct Reserved<'a> {
    inner: &'a Inner,
    n_bytes: u64,
    /// The walk that ran then, or ran last.
    walk: u64,
}

impl Reserved<'_> {
    /// The file is there.
    pub(super) fn spend(mut self) {
        self.n_bytes = 0;
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if self.n_bytes == 0 {
            return;
        }
        // A total that stays too high is found by the next count.
        drop(self.inner.state.update(|state| {
            // A walk that began meanwhile does not know of these bytes, and may have ended.
            if state.walk != self.walk {
                return;
            }
            state.total_bytes = state.total_bytes.saturating_sub(self.n_bytes);
            if state.is_walking {
                state.since_bytes = state.since_bytes.saturating_sub(self.n_bytes);
            }
        }));
    }
}

fn is_stale(state: &State) -> bool {
    !state.is_known || seconds_now().abs_diff(state.counted_at) > RECOUNT_AFTER_SECS
}
