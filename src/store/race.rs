//! Asking several stores for one chunk: in order, the next one beside a late one, sick ones last.
//!
//! [`Members`] are the stores with their health; [`Members::ask`] is the one loop, for fetching and for `has`. [`Pace`] says
//! when a store is late: by its own latencies with a budget for doubled requests (mirrors), or after a fixed patience.
//!
//! Invariants: every member is asked before the answer is "missing" or an error, and only those that are not to be
//! trusted are left out. A probe of a sick store never delays an answer that a healthy one gives. What lost is dropped.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::time::Instant;

use super::figures::StoreFigures;
use super::health::{Begun, End, Health, MemberHealth, Standing};
use super::latency::{MIN_LATENESS, UNKNOWN_LATENESS};
use super::{BlockingStore, Fetched, Store, StoreError, Stored};
use crate::digest::ChunkId;

/// How long a probe may take; a store has longer timeouts, with retries, and would be missed that long after its return.
const PROBE_TIMEOUT: Duration = Duration::from_secs(15);

/// What a store says to one question: a value, "I have no such chunk", or an error.
type Answer<T> = Result<Option<T>, StoreError>;

/// When the next store is asked beside one that does not answer.
#[derive(Debug)]
pub(super) enum Pace {
    /// When it is later than it uses to be and the budget allows it, or when it seems dead.
    Latency(Budget),
    /// After this span.
    Patience(Duration),
}

/// How many requests may be doubled: a share of all, in sixteenths of a request.
#[derive(Debug)]
pub(super) struct Budget(AtomicU32);

impl Budget {
    /// What a doubled request costs. Each request earns 1, so that one in sixteen may be doubled.
    const COST: u32 = 16;

    /// What can be saved up: a burst of four.
    const MAX: u32 = 4 * Self::COST;

    pub(super) fn new() -> Self {
        Self(AtomicU32::new(Self::MAX))
    }

    fn earn(&self) {
        let more = |saved: u32| (saved < Self::MAX).then_some(saved + 1);
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
    }

    fn spend(&self) -> bool {
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |saved| saved.checked_sub(Self::COST)).is_ok()
    }
}

/// A store and how it is doing.
#[derive(Debug)]
struct Member {
    store: Arc<dyn Store>,
    health: Health,
}

/// Stores that are asked for the same chunks.
#[derive(Debug)]
pub(super) struct Members {
    members: Vec<Arc<Member>>,
    pace: Pace,
}

impl Members {
    /// Stores in the order they are preferred.
    pub(super) fn new(stores: Vec<Arc<dyn Store>>, pace: Pace) -> Self {
        let min_silence = match pace {
            Pace::Latency(_) => Duration::ZERO,
            Pace::Patience(patience) => patience,
        };
        let member = |store: Arc<dyn Store>| {
            let health = Health::new(store.name(), min_silence);
            Arc::new(Member { store, health })
        };
        Self { members: stores.into_iter().map(member).collect(), pace }
    }

    /// The stores' names.
    pub(super) fn names(&self) -> Vec<&str> {
        self.members.iter().map(|member| member.store.name()).collect()
    }

    /// How they are doing, in their order.
    pub(super) fn health(&self) -> Vec<MemberHealth> {
        let now = Instant::now();
        self.members.iter().map(|member| member.health.show(now)).collect()
    }

    /// What requests to each came to, with how it stands here. What several stores behind one are among themselves counts as well.
    pub(super) fn figures(&self) -> Vec<StoreFigures> {
        let now = Instant::now();
        let of_member = |member: &Arc<Member>| {
            let here = member.health.show(now);
            let mut figures = member.store.figures();
            for store in &mut figures {
                match &mut store.health {
                    None => store.health = Some(here.clone()),
                    Some(there) => {
                        there.is_healthy &= here.is_healthy;
                        there.set_aside_for = there.set_aside_for.max(here.set_aside_for);
                    }
                }
            }
            figures
        };
        self.members.iter().flat_map(of_member).collect()
    }

    /// Whether all of them can be asked by [`Members::fetch_now`].
    pub(super) fn are_blocking(&self) -> bool {
        self.members.iter().all(|member| member.store.blocking().is_some())
    }

    /// Fetches a chunk from any but the stores in `avoid`.
    ///
    /// # Errors
    /// None has it, and these failed, in the order of the stores.
    pub(super) async fn fetch(&self, id: ChunkId, avoid: &[String]) -> Result<Option<Fetched>, Vec<StoreError>> {
        let now = Instant::now();
        for member in self.members.iter().filter(|member| member.is_in(avoid)) {
            member.health.gave_wrong_bytes(now, id);
        }
        let fetch = |store: Arc<dyn Store>| -> BoxFuture<'static, Answer<Fetched>> {
            let avoid = avoid.to_vec();
            Box::pin(async move { store.fetch_avoiding(id, &avoid).await })
        };
        self.ask(avoid, true, fetch).await
    }

    /// Tells whether any has a chunk.
    ///
    /// # Errors
    /// As [`Members::fetch`].
    pub(super) async fn has(&self, id: ChunkId) -> Result<bool, Vec<StoreError>> {
        let has = |store: Arc<dyn Store>| -> BoxFuture<'static, Answer<()>> {
            Box::pin(async move { Ok(store.has(id).await?.then_some(())) })
        };
        Ok(self.ask(&[], false, has).await?.is_some())
    }

    /// Fetches a chunk on the calling thread; only for stores that are all blocking, which need no more than their order.
    ///
    /// # Errors
    /// As [`Members::fetch`].
    pub(super) fn fetch_now(&self, id: ChunkId, max_bytes: u64) -> Result<Option<Stored>, Vec<StoreError>> {
        let mut errors = Vec::new();
        for store in self.members.iter().filter_map(|member| member.store.blocking()) {
            match BlockingStore::fetch_now(store, id, max_bytes) {
                Ok(Some(stored)) => return Ok(Some(stored)),
                Ok(None) => {}
                Err(error) => errors.push(error),
            }
        }
        if errors.is_empty() { Ok(None) } else { Err(errors) }
    }

    async fn ask<T: Send + 'static>(
        &self,
        avoid: &[String],
        is_fetch: bool,
        question: impl Fn(Arc<dyn Store>) -> BoxFuture<'static, Answer<T>>,
    ) -> Result<Option<T>, Vec<StoreError>> {
        if let Pace::Latency(budget) = &self.pace {
            budget.earn();
        }
        let now = Instant::now();
        let mut queue = self.in_order(avoid);
        let is_any_in_use = queue.front().is_some_and(|&first| self.members[first].is_in_use());
        let mut running: FuturesUnordered<BoxFuture<'static, (usize, Answer<T>)>> = FuturesUnordered::new();
        if is_any_in_use {
            queue.retain(|&index| {
                let member = &self.members[index];
                let is_due = member.health.take_probe(now);
                if is_due {
                    let answer = question(Arc::clone(&member.store));
                    let probe = Arc::clone(member).probe(is_fetch, answer);
                    running.push(Box::pin(async move { (index, probe.await) }));
                }
                !is_due
            });
        }

        let mut errors: Vec<(usize, StoreError)> = Vec::new();
        // The member that must answer, or be late, before the next one is asked.
        let mut newest: Option<&Arc<Member>> = None;
        let mut newest_index = usize::MAX;
        let timer = tokio::time::sleep_until(now);
        tokio::pin!(timer);
        loop {
            if newest.is_none()
                && let Some(index) = queue.pop_front()
            {
                let member = &self.members[index];
                let answer = Arc::clone(member).ask(is_fetch, question(Arc::clone(&member.store)));
                running.push(Box::pin(async move { (index, answer.await) }));
                newest = Some(member);
                newest_index = index;
                let now = Instant::now();
                timer.as_mut().reset(now + self.patience_with(member, now));
            }
            tokio::select! {
                biased;
                answered = running.next() => {
                    let Some((index, answer)) = answered else { break };
                    match answer {
                        Ok(Some(value)) => {
                            if !is_any_in_use {
                                self.expect_return();
                            }
                            return Ok(Some(value));
                        }
                        Ok(None) => {}
                        Err(error) => errors.push((index, error)),
                    }
                    if index == newest_index {
                        newest = None;
                    }
                }
                () = &mut timer, if newest.is_some() && !queue.is_empty() => {
                    let now = Instant::now();
                    let (Some(late), Some(&next)) = (newest, queue.front()) else { continue };
                    if self.may_go_on(late, &self.members[next], now) {
                        late.health.count_hedge();
                        newest = None;
                    } else {
                        timer.as_mut().reset(now + late.health.until_dead(now).max(MIN_LATENESS));
                    }
                }
            }
        }
        if errors.is_empty() {
            return Ok(None);
        }
        errors.sort_by_key(|(index, _)| *index);
        Err(errors.into_iter().map(|(_, error)| error).collect())
    }

    /// Those in use as they were given, then those set aside, beginning with the one whose time is over first.
    fn in_order(&self, avoid: &[String]) -> VecDeque<usize> {
        let mut order: Vec<(Option<Instant>, usize)> = Vec::with_capacity(self.members.len());
        for (index, member) in self.members.iter().enumerate() {
            if member.is_in(avoid) {
                continue;
            }
            let until = match member.health.standing() {
                Standing::InUse => None,
                Standing::Aside(until) => Some(until),
            };
            order.push((until, index));
        }
        order.sort();
        order.into_iter().map(|(_, index)| index).collect()
    }

    /// How long to wait for a store that is asked now.
    fn patience_with(&self, member: &Member, now: Instant) -> Duration {
        let usual = match &self.pace {
            Pace::Latency(_) => member.health.lateness(),
            Pace::Patience(patience) => *patience,
        };
        // Of those set aside, one is as good as the other.
        if !member.is_in_use() {
            return usual.min(UNKNOWN_LATENESS);
        }
        usual.min(member.health.until_dead(now).max(MIN_LATENESS))
    }

    /// Whether the next store is asked beside a late one.
    fn may_go_on(&self, late: &Member, next: &Member, now: Instant) -> bool {
        if late.health.is_dead(now) {
            return true;
        }
        match &self.pace {
            // It is not for a healthy store's lateness that a sick one is asked.
            Pace::Latency(budget) => next.is_in_use() && budget.spend(),
            Pace::Patience(_) => true,
        }
    }

    /// All were set aside and one has answered: most likely it was the network, and the others are back, too.
    fn expect_return(&self) {
        let now = Instant::now();
        for member in &self.members {
            member.health.expect_return(now);
        }
    }
}

impl Member {
    fn is_in(&self, avoid: &[String]) -> bool {
        avoid.iter().any(|name| name == self.store.name())
    }

    fn is_in_use(&self) -> bool {
        self.health.standing() == Standing::InUse
    }

    async fn ask<T>(self: Arc<Self>, is_fetch: bool, answer: BoxFuture<'static, Answer<T>>) -> Answer<T> {
        let request = Request::begin(self, is_fetch, false);
        request.end(answer.await)
    }

    /// Asks in a task of its own, which goes on to its end when nobody waits for it.
    fn probe<T: Send + 'static>(
        self: Arc<Self>,
        is_fetch: bool,
        answer: BoxFuture<'static, Answer<T>>,
    ) -> impl Future<Output = Answer<T>> + Send {
        let name = self.store.name().to_owned();
        let request = Request::begin(self, is_fetch, true);
        let task = tokio::spawn(async move {
            let answer = tokio::time::timeout(PROBE_TIMEOUT, answer).await;
            // A probe without an answer ends as the request is dropped.
            Some(request.end(answer.ok()?))
        });
        async move {
            match task.await {
                Ok(Some(answer)) => answer,
                Ok(None) => {
                    let reason = format!("no answer in {} s", PROBE_TIMEOUT.as_secs());
                    Err(StoreError::transient(name.clone(), name, reason))
                }
                Err(error) => Err(StoreError::new(name.clone(), name, error)),
            }
        }
    }
}

/// A request under way; dropped before its end it was given up on.
#[derive(Debug)]
struct Request {
    member: Arc<Member>,
    begun: Begun,
    is_over: bool,
}

impl Request {
    fn begin(member: Arc<Member>, is_fetch: bool, is_probe: bool) -> Self {
        let begun = Begun { at: Instant::now(), is_fetch, is_probe };
        member.health.begin(begun);
        Self { member, begun, is_over: false }
    }

    fn end<T>(mut self, answer: Answer<T>) -> Answer<T> {
        self.is_over = true;
        let end = match &answer {
            Ok(Some(_)) => End::Found,
            Ok(None) => End::Missing,
            Err(error) => End::Failed(error),
        };
        self.member.health.end(Instant::now(), self.begun, end);
        answer
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if !self.is_over {
            self.member.health.end(Instant::now(), self.begun, End::Dropped);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_a_burst_and_then_a_share() {
        let budget = Budget::new();
        let mut n_spent = 0;
        for _ in 0..1600 {
            budget.earn();
            n_spent += u32::from(budget.spend());
        }
        assert_eq!(n_spent, 4 + 99);
        // What is not spent is not saved up for ever.
        for _ in 0..1600 {
            budget.earn();
        }
        assert_eq!((0..100).filter(|_| budget.spend()).count(), 4);
    }
}
