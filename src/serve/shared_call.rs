//! One call for all who want the same at the same time.
//!
//! Invariant: a call runs as long as somebody waits for it, and is dropped with the last of them; what fails is told to all who
//! wait, and the next one who asks starts anew.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared, WeakShared};

/// Calls that are under way, by what they are for.
pub(super) struct SharedCalls<K, T: Clone> {
    /// Never held over await.
    table: Mutex<Table<K, T>>,
}

struct Table<K, T: Clone> {
    calls: HashMap<K, Entry<T>>,
    n_started: u64,
}

struct Entry<T: Clone> {
    /// Which call it is, among all that there were.
    number: u64,
    call: WeakShared<BoxFuture<'static, T>>,
}

impl<K, T: Clone> Default for SharedCalls<K, T> {
    fn default() -> Self {
        Self { table: Mutex::new(Table { calls: HashMap::new(), n_started: 0 }) }
    }
}

impl<K, T: Clone> fmt::Debug for SharedCalls<K, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedCalls({})", self.lock().calls.len())
    }
}

impl<K, T: Clone> SharedCalls<K, T> {
    fn lock(&self) -> MutexGuard<'_, Table<K, T>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Copy + Eq + Hash, T: Clone> SharedCalls<K, T> {
    /// Waits for the call there is, or starts one.
    pub(super) async fn join(&self, key: K, start: impl FnOnce() -> BoxFuture<'static, T>) -> T {
        let waiting = {
            let mut table = self.lock();
            let running = table.calls.get(&key).and_then(|entry| Some((entry.number, entry.call.upgrade()?)));
            let (number, call) = running.unwrap_or_else(|| {
                let call = start().shared();
                table.n_started += 1;
                let number = table.n_started;
                // Nobody has polled it, so it has no result yet and can be downgraded.
                table.calls.extend(call.downgrade().map(|call| (key, Entry { number, call })));
                (number, call)
            });
            Waiting { calls: self, key, number, call: Some(call), is_done: false }
        };
        waiting.outcome().await
    }

    /// Lets go of the call for something that has changed: who asks from now on gets an answer of a new call.
    pub(super) fn forget(&self, key: K) {
        self.lock().calls.remove(&key);
    }

    /// Lets go of all calls.
    pub(super) fn forget_all(&self) {
        self.lock().calls.clear();
    }
}

/// Somebody who waits. The entry goes with the first who has the answer, or with the last who gives up.
struct Waiting<'a, K: Copy + Eq + Hash, T: Clone> {
    calls: &'a SharedCalls<K, T>,
    key: K,
    number: u64,
    call: Option<Shared<BoxFuture<'static, T>>>,
    is_done: bool,
}

impl<K: Copy + Eq + Hash, T: Clone> Waiting<'_, K, T> {
    async fn outcome(mut self) -> T {
        // Polled in its place, so that the destructor below finds it also when this future is dropped half way.
        let call = self.call.as_mut().expect("it is taken in the destructor only");
        let outcome = call.await;
        self.is_done = true;
        outcome
    }
}

impl<K: Copy + Eq + Hash, T: Clone> Drop for Waiting<'_, K, T> {
    fn drop(&mut self) {
        // Outside the lock: with the last who waits the call itself is dropped.
        drop(self.call.take());
        let mut table = self.calls.lock();
        let is_over =
            |entry: &Entry<T>| entry.number == self.number && (self.is_done || entry.call.upgrade().is_none());
        if table.calls.get(&self.key).is_some_and(is_over) {
            table.calls.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio::sync::Semaphore;

    #[derive(Default)]
    struct Counted {
        calls: SharedCalls<u8, u32>,
        n_started: AtomicU32,
    }

    impl Counted {
        async fn join(&self, key: u8, gate: &Arc<Semaphore>) -> u32 {
            let gate = Arc::clone(gate);
            self.calls
                .join(key, || {
                    let n = self.n_started.fetch_add(1, Ordering::SeqCst) + 1;
                    async move {
                        drop(gate.acquire().await);
                        n
                    }
                    .boxed()
                })
                .await
        }
    }

    #[tokio::test]
    async fn all_who_wait_share_a_call_and_the_next_starts_one() {
        let (counted, gate) = (Counted::default(), Arc::new(Semaphore::new(0)));
        let release = async {
            tokio::task::yield_now().await;
            gate.add_permits(1);
        };
        let waiting = futures_util::future::join_all((0..4).map(|_| counted.join(1, &gate)));
        let (answers, other, ()) = tokio::join!(waiting, counted.join(2, &gate), release);
        assert_eq!((answers, other), (vec![1; 4], 2));
        assert_eq!(counted.calls.lock().calls.len(), 0, "nothing is left behind");
        assert_eq!(counted.join(1, &gate).await, 3);
    }

    #[tokio::test]
    async fn a_call_lives_as_long_as_one_waits() {
        let (counted, gate) = (Counted::default(), Arc::new(Semaphore::new(0)));
        {
            let mut first = Box::pin(counted.join(1, &gate));
            let mut second = Box::pin(counted.join(1, &gate));
            assert!(futures_util::poll!(&mut first).is_pending());
            assert!(futures_util::poll!(&mut second).is_pending());
            drop(first);
            gate.add_permits(1);
            assert_eq!(second.await, 1);
        }
        let gate = Arc::new(Semaphore::new(0));
        let mut given_up = Box::pin(counted.join(1, &gate));
        assert!(futures_util::poll!(&mut given_up).is_pending());
        drop(given_up);
        assert_eq!(counted.calls.lock().calls.len(), 0, "nothing is left behind");
    }

    #[tokio::test]
    async fn what_was_forgotten_is_not_joined() {
        let (counted, gate) = (Counted::default(), Arc::new(Semaphore::new(0)));
        let mut old = Box::pin(counted.join(1, &gate));
        assert!(futures_util::poll!(&mut old).is_pending());
        counted.calls.forget(1);
        assert!(futures_util::poll!(&mut old).is_pending());
        let mut new = Box::pin(counted.join(1, &gate));
        assert!(futures_util::poll!(&mut new).is_pending());
        gate.add_permits(2);
        assert_eq!(old.await, 1);
        assert_eq!(counted.calls.lock().calls.len(), 1, "the entry of another is left alone");
        assert_eq!(new.await, 2);
    }
}
