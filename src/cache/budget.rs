//! A budget of bytes that can be changed while it is in use.
//!
//! Invariants: who asked first gets first; what is asked for above the limit counts as the limit, and is let through alone; so the bytes given out
//! stay within the limit, except right after it was lowered, until enough has been given back.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// Bytes that users take and give back.
#[derive(Debug)]
pub struct Budget {
    /// Never held over I/O or await.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    limit_bytes: u64,
    used_bytes: u64,
    waiting: VecDeque<Waiter>,
}

#[derive(Debug)]
struct Waiter {
    wanted_bytes: u64,
    granted: oneshot::Sender<Share>,
}

/// What a budget looks like from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BudgetUse {
    /// Bytes given out.
    pub used_bytes: u64,
    /// The most that is given out.
    pub limit_bytes: u64,
    /// How many wait for their share.
    pub n_waiting: usize,
}

/// Bytes of a budget, given back when dropped.
#[derive(Debug)]
pub struct Share {
    budget: Arc<Budget>,
    n_bytes: u64,
}

impl Budget {
    /// A budget of so many bytes, all of them free.
    pub fn new(limit_bytes: u64) -> Arc<Self> {
        let state = State { limit_bytes, used_bytes: 0, waiting: VecDeque::new() };
        Arc::new(Self { state: Mutex::new(state) })
    }

    /// Takes a share, waiting until there is room. Ready at the first poll when there is and nobody waits.
    pub async fn take(self: &Arc<Self>, wanted_bytes: u64) -> Share {
        let waiting = {
            let mut state = self.lock();
            if state.waiting.is_empty() && state.has_room(wanted_bytes) {
                return state.give(self, wanted_bytes);
            }
            let (granted, waiting) = oneshot::channel();
            state.waiting.push_back(Waiter { wanted_bytes, granted });
            waiting
        };
        match waiting.await {
            Ok(share) => share,
            // A waiter is dropped only with the budget, which is held here.
            Err(_) => Share { budget: Arc::clone(self), n_bytes: 0 },
        }
    }

    /// Changes the limit. Those who wait now fit into the new one.
    pub fn set_limit(self: &Arc<Self>, limit_bytes: u64) {
        self.lock().limit_bytes = limit_bytes;
        self.grant();
    }

    /// The most that is given out.
    pub fn limit_bytes(&self) -> u64 {
        self.lock().limit_bytes
    }

    /// What it looks like now.
    pub fn usage(&self) -> BudgetUse {
        let state = self.lock();
        BudgetUse { used_bytes: state.used_bytes, limit_bytes: state.limit_bytes, n_waiting: state.waiting.len() }
    }

    /// Lets those in who fit in, the first first.
    fn grant(self: &Arc<Self>) {
        loop {
            let (waiter, share) = {
                let mut state = self.lock();
                let Some(first) = state.waiting.front() else { return };
                if !first.granted.is_closed() && !state.has_room(first.wanted_bytes) {
                    return;
                }
                let Some(first) = state.waiting.pop_front() else { return };
                if first.granted.is_closed() {
                    continue;
                }
                let share = state.give(self, first.wanted_bytes);
                (first.granted, share)
            };
            // Outside of the lock: a share that nobody takes any more comes back by being dropped, which locks, too.
            drop(waiter.send(share));
        }
    }

    fn give_back(self: &Arc<Self>, n_bytes: u64) {
        let is_wanted = {
            let mut state = self.lock();
            state.used_bytes = state.used_bytes.saturating_sub(n_bytes);
            !state.waiting.is_empty()
        };
        if is_wanted {
            self.grant();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn has_room(&self, wanted_bytes: u64) -> bool {
        self.used_bytes == 0 || self.used_bytes.saturating_add(wanted_bytes.min(self.limit_bytes)) <= self.limit_bytes
    }

    fn give(&mut self, budget: &Arc<Budget>, wanted_bytes: u64) -> Share {
        let n_bytes = wanted_bytes.min(self.limit_bytes);
        self.used_bytes += n_bytes;
        Share { budget: Arc::clone(budget), n_bytes }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let budget = Arc::clone(&self.budget);
        budget.give_back(std::mem::take(&mut self.n_bytes));
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn shares_are_given_in_order_and_within_the_limit() {
        let budget = Budget::new(100);
        let first = budget.take(60).now_or_never().expect("there is room");
        let mut large = Box::pin(budget.take(1000));
        let mut small = Box::pin(budget.take(1));
        assert!((&mut large).now_or_never().is_none());
        assert!((&mut small).now_or_never().is_none(), "not before the one that came first");
        assert_eq!(budget.usage(), BudgetUse { used_bytes: 60, limit_bytes: 100, n_waiting: 2 });
        drop(first);
        let large = large.now_or_never().expect("alone it is let through");
        assert!((&mut small).now_or_never().is_none());
        drop(large);
        drop(small.now_or_never().expect("its turn"));
        assert_eq!(budget.usage(), BudgetUse { used_bytes: 0, limit_bytes: 100, n_waiting: 0 });
    }

    #[tokio::test]
    async fn who_goes_away_does_not_hold_up_the_others() {
        let budget = Budget::new(10);
        let held = budget.take(10).await;
        let mut gone = Box::pin(budget.take(10));
        let mut next = Box::pin(budget.take(3));
        assert!((&mut gone).now_or_never().is_none() && (&mut next).now_or_never().is_none());
        drop(gone);
        drop(held);
        let share = next.now_or_never().expect("its turn");
        assert_eq!(budget.usage().used_bytes, 3);
        drop(share);
        // Granted, and dropped before it was looked at.
        let held = budget.take(10).await;
        let mut late = Box::pin(budget.take(10));
        assert!((&mut late).now_or_never().is_none());
        drop(held);
        drop(late);
        assert_eq!(budget.usage(), BudgetUse { used_bytes: 0, limit_bytes: 10, n_waiting: 0 });
    }

    #[tokio::test]
    async fn a_limit_can_be_lowered_below_what_is_waited_for() {
        let budget = Budget::new(100);
        let held = budget.take(90).await;
        let mut waiting = Box::pin(budget.take(80));
        assert!((&mut waiting).now_or_never().is_none());
        budget.set_limit(10);
        drop(held);
        let share = waiting.now_or_never().expect("it counts as the new limit");
        assert_eq!(budget.usage(), BudgetUse { used_bytes: 10, limit_bytes: 10, n_waiting: 0 });
        let mut more = Box::pin(budget.take(5));
        assert!((&mut more).now_or_never().is_none());
        budget.set_limit(20);
        drop(more.now_or_never().expect("the higher limit has room"));
        drop(share);
        assert_eq!(budget.usage().used_bytes, 0);
    }
}
