//! Which parts somebody waits or works for, so that each is worked for once at a time.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::Notify;

use crate::volume::{Live, Part};

/// Which part: its path and number.
type PartKey = (Vec<u8>, u64);

/// Parts that somebody waits or works for.
#[derive(Debug, Default)]
pub(super) struct AllAtWork {
    /// Never held over I/O or await; the parts of a volume may be asked for meanwhile.
    state: Mutex<State>,
    /// Somebody is done with one.
    is_over: Notify,
}

#[derive(Debug, Default)]
struct State {
    keys: HashSet<PartKey>,
    /// A path that is watched, and whether its part was closed before its turn.
    watched: (Vec<u8>, bool),
}

impl AllAtWork {
    /// The next [`Self::finished`] is for this path.
    pub(super) fn watch(&self, path: &[u8]) {
        self.lock().watched = (path.to_vec(), false);
    }

    /// Waits until nobody works for a part at a path. Whether what was to be done was begun: it was not closed before.
    pub(super) async fn finished(&self, path: &[u8]) -> bool {
        loop {
            // Listens before it looks.
            let is_over = self.is_over.notified();
            {
                let state = self.lock();
                if !state.keys.iter().any(|(other, _)| other == path) {
                    return state.watched != (path.to_vec(), true);
                }
            }
            is_over.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A part that is waited or worked for, until this is dropped.
pub(super) struct AtWork {
    all: Arc<AllAtWork>,
    key: PartKey,
    /// It counts as done already.
    is_over: bool,
}

impl AtWork {
    /// `None` if somebody is at it already.
    pub(super) fn begin(all: &Arc<AllAtWork>, part: &Part) -> Option<Self> {
        let key = (part.path.clone(), part.number);
        let is_new = all.lock().keys.insert(key.clone());
        is_new.then(|| Self { all: Arc::clone(all), key, is_over: false })
    }

    /// The part, if it is open. Otherwise it counts as done: whoever opens it from now on begins anew.
    pub(super) fn part(&mut self, live: &Weak<Live>) -> Option<Part> {
        let live = live.upgrade()?;
        let mut state = self.all.lock();
        let part = live.parts().into_iter().find(|part| part.path == self.key.0 && part.number == self.key.1);
        if part.is_none() {
            state.keys.remove(&self.key);
            self.is_over = true;
            if state.watched.0 == self.key.0 {
                state.watched.1 = true;
            }
        }
        drop(state);
        if self.is_over {
            self.all.is_over.notify_waiters();
        }
        part
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        if !self.is_over {
            self.all.lock().keys.remove(&self.key);
            self.all.is_over.notify_waiters();
        }
    }
}
