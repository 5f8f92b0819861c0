//! A small LRU with a bound on the weight of what it keeps: parsed nodes, tables and listings.

use std::hash::Hash;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use lru::LruCache;

/// An LRU of shared values, weighed when they are put in.
#[derive(Debug)]
pub(super) struct Bounded<K: Hash + Eq, V> {
    /// Never held over I/O or await.
    state: Mutex<State<K, V>>,
    max_bytes: AtomicUsize,
}

#[derive(Debug)]
struct State<K: Hash + Eq, V> {
    values: LruCache<K, (V, usize)>,
    n_bytes: usize,
}

impl<K: Hash + Eq, V: Clone> Bounded<K, V> {
    pub(super) fn new(max_bytes: usize) -> Self {
        Self {
            state: Mutex::new(State { values: LruCache::unbounded(), n_bytes: 0 }),
            max_bytes: AtomicUsize::new(max_bytes),
        }
    }

    pub(super) fn get(&self, key: &K) -> Option<V> {
        self.lock().values.get(key).map(|(value, _)| value.clone())
    }

    /// What keeping any value costs beside it, in bytes, more or less: its key, its place in the order and in the map, and the
    /// allocator's share.
    const ENTRY_BYTES: usize = 120;

    /// Keeps a value; the least recently used ones go, but never this one.
    pub(super) fn put(&self, key: K, value: V, n_bytes: usize) {
        let n_bytes = n_bytes.saturating_add(Self::ENTRY_BYTES);
        let mut state = self.lock();
        state.n_bytes += n_bytes;
        if let Some((_, old_bytes)) = state.values.put(key, (value, n_bytes)) {
            state.n_bytes -= old_bytes;
        }
        self.shrink(&mut state);
    }

    /// Another bound holds from now on.
    pub(super) fn set_max_bytes(&self, max_bytes: usize) {
        self.max_bytes.store(max_bytes, Ordering::Relaxed);
        self.shrink(&mut self.lock());
    }

    /// What is kept weighs so much, and may weigh so much.
    pub(super) fn weight(&self) -> (usize, usize) {
        (self.lock().n_bytes, self.max_bytes.load(Ordering::Relaxed))
    }

    fn shrink(&self, state: &mut State<K, V>) {
        while state.n_bytes > self.max_bytes.load(Ordering::Relaxed) && state.values.len() > 1 {
            let Some((_, (_, old_bytes))) = state.values.pop_lru() else { break };
            state.n_bytes -= old_bytes;
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&self) {
        let mut state = self.lock();
        state.values.clear();
        state.n_bytes = 0;
    }

    fn lock(&self) -> MutexGuard<'_, State<K, V>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_holds_and_the_newest_stays() {
        let bounded = Bounded::new(10 * (10 + Bounded::<i32, i32>::ENTRY_BYTES));
        for key in 0..50 {
            bounded.put(key, key, 10);
        }
        assert_eq!((0..50).filter(|key| bounded.get(key).is_some()).count(), 10);
        bounded.put(99, 99, 10_000);
        assert_eq!(bounded.get(&99), Some(99));
        assert_eq!(bounded.get(&49), None);
        bounded.put(99, 100, 10);
        bounded.put(1, 1, 10);
        assert_eq!((bounded.get(&99), bounded.get(&1)), (Some(100), Some(1)));
        bounded.set_max_bytes(10);
        assert_eq!((bounded.weight(), bounded.get(&1)), ((10 + Bounded::<i32, i32>::ENTRY_BYTES, 10), Some(1)));
        bounded.clear();
        bounded.put(2, 2, 10_000);
        assert_eq!((bounded.get(&99), bounded.get(&2)), (None, Some(2)));
    }
}
