//! What requests to a store came to: how many, how fast, with which errors. For status and metrics.
//!
//! * [`Recorder`] hears of every request; [`StoreFigures`] is what it shows.
//! * [`Observed`] is any store with a recorder before it.
//! * [`in_time`] is how requests are given up on that the store had enough time for.
//!
//! Invariants: every request that began is told of once, also when nobody waits for it any more. One that is given up on is held
//! against the store only if the deadline came: not if it lost a race, or was not wanted any more.

use std::future::Future;
use std::sync::Arc;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::Instant;

use super::health::{MAX_ERRORS_IN_ROW, MemberHealth};
use super::latency::Latencies;
use super::{BlockingStore, Store, StoreError, Stored};
use crate::digest::ChunkId;
use crate::report::gauge::Inside;
use crate::report::histogram::HistogramSnapshot;
use crate::report::{Counter, Gauge, Histogram};

/// The most of an error's text that is kept, in bytes.
const MAX_ERROR_BYTES: usize = 512;

/// A request that had a smaller part of the time than this when the deadline came says nothing about the store: it may have waited
/// for its turn.
const ENOUGH_TIME: f64 = 0.5;

/// When requests of a task are given up on, and how much time there was for all of it.
#[derive(Debug, Clone, Copy)]
struct Limit {
    deadline: Instant,
    timeout: Duration,
}

tokio::task_local! {
    static LIMIT: Limit;
}

/// Does something until a deadline, for which there was so much time. Requests that begin in it and are under way when it comes are late.
///
/// # Errors
/// The deadline came.
pub(crate) async fn in_time<F: Future>(
    deadline: Instant,
    timeout: Duration,
    work: F,
) -> Result<F::Output, tokio::time::error::Elapsed> {
    tokio::time::timeout_at(deadline, LIMIT.scope(Limit { deadline, timeout }, work)).await
}

/// What a store looks like from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreFigures {
    /// The store's name, without secrets.
    pub name: String,
    /// The name of the group of mirrors it is in.
    pub mirror_of: Option<String>,
    /// Requests so far, those under way among them.
    pub n_requests: u64,
    /// Requests that gave a chunk (or a part of a file).
    pub n_found: u64,
    /// Requests answered with "I do not have it".
    pub n_missing: u64,
    /// Requests that ended in an error.
    pub n_failed: u64,
    /// Requests that nobody waited for any more: they lost a race, or were too late.
    pub n_dropped: u64,
    /// Bytes it gave, in stored form.
    pub found_bytes: u64,
    /// Requests under way.
    pub n_in_flight: u64,
    /// The middle of the recent latencies, and what 95 of 100 took at the most; `None` while too few are known.
    pub p50: Option<Duration>,
    /// See `p50`.
    pub p95: Option<Duration>,
    /// All latencies of requests that gave something.
    pub latency: HistogramSnapshot,
    /// Errors since the last answer, and requests that had none when the deadline came.
    pub n_errors_in_row: u32,
    /// How long ago the last answer or error was.
    pub last_heard: Option<Duration>,
    /// The last error, and how long ago it was.
    pub last_error: Option<(Duration, String)>,
    /// How it stands among several stores.
    pub health: Option<MemberHealth>,
}

impl StoreFigures {
    /// Whether it answers and is asked in its turn. Alone it is never set aside, so its errors in a row count here; a store that never
    /// answered anything needs but one.
    pub fn is_healthy(&self) -> bool {
        let is_new = self.n_found + self.n_missing == 0;
        let limit = if is_new { 1 } else { MAX_ERRORS_IN_ROW };
        self.n_errors_in_row < limit && self.health.as_ref().is_none_or(|health| health.is_healthy)
    }
}

/// Hears of the requests to a store.
#[derive(Debug, Default)]
pub struct Recorder {
    n_requests: Counter,
    n_found: Counter,
    n_missing: Counter,
    n_failed: Counter,
    n_dropped: Counter,
    found_bytes: Counter,
    in_flight: Gauge,
    latency: Histogram,
    /// Never held over I/O or await.
    recent: Mutex<Recent>,
}

#[derive(Debug, Default)]
struct Recent {
    latencies: Latencies,
    n_errors_in_row: u32,
    last_error: Option<(Instant, String)>,
    /// When it last gave something, or said that it does not have it.
    last_answer: Option<Instant>,
}

/// A request under way.
#[derive(Debug)]
pub struct Request<'a> {
    recorder: &'a Recorder,
    start: Instant,
    limit: Option<Limit>,
    is_told: bool,
    _in_flight: Inside<'a>,
}

impl Recorder {
    /// Hears that a request begins.
    pub fn begin(&self) -> Request<'_> {
        self.n_requests.add(1);
        let limit = LIMIT.try_with(|limit| *limit).ok();
        Request { recorder: self, start: Instant::now(), limit, is_told: false, _in_flight: self.in_flight.enter() }
    }

    /// What is known of the store called `name`.
    pub fn figures(&self, name: &str) -> StoreFigures {
        let recent = self.recent();
        StoreFigures {
            name: name.to_owned(),
            mirror_of: None,
            n_requests: self.n_requests.get(),
            n_found: self.n_found.get(),
            n_missing: self.n_missing.get(),
            n_failed: self.n_failed.get(),
            n_dropped: self.n_dropped.get(),
            found_bytes: self.found_bytes.get(),
            n_in_flight: self.in_flight.get(),
            p50: recent.latencies.p50(),
            p95: recent.latencies.p95(),
            latency: self.latency.snapshot(),
            n_errors_in_row: recent.n_errors_in_row,
            last_heard: recent.last_error.as_ref().map(|(at, _)| *at).max(recent.last_answer).map(|at| at.elapsed()),
            last_error: recent.last_error.as_ref().map(|(at, text)| (at.elapsed(), text.clone())),
            health: None,
        }
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Request<'_> {
    /// It gave so many bytes.
    pub fn found(mut self, n_bytes: u64) {
        self.is_told = true;
        let latency = self.start.elapsed();
        self.recorder.n_found.add(1);
        self.recorder.found_bytes.add(n_bytes);
        self.recorder.latency.observe(latency);
        let mut recent = self.recorder.recent();
        recent.latencies.add(latency, true);
        recent.answered();
    }

    /// The store does not have it.
    pub fn missing(mut self) {
        self.is_told = true;
        self.recorder.n_missing.add(1);
        self.recorder.recent().answered();
    }

    /// It failed.
    pub fn failed(mut self, error: &StoreError) {
        self.is_told = true;
        self.recorder.n_failed.add(1);
        let mut text = error.to_string();
        if text.len() > MAX_ERROR_BYTES {
            let end = (0..=MAX_ERROR_BYTES).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
            text.truncate(end);
            text.push('…');
        }
        self.recorder.recent().failed(text);
    }

    /// Nobody waits for it any more.
    fn given_up(&self) {
        self.recorder.n_dropped.add(1);
        let Some(Limit { deadline, timeout }) = self.limit else { return };
        let had = deadline.saturating_duration_since(self.start);
        if Instant::now() < deadline || had < timeout.mul_f64(ENOUGH_TIME) {
            return;
        }
        let mut recent = self.recorder.recent();
        // One of several that it answers meanwhile is slow, and not a sign that it fails.
        if recent.last_answer.is_some_and(|at| at >= self.start) {
            return;
        }
        match &recent.last_error {
            // What went wrong meanwhile says more than that this is late.
            Some((at, _)) if *at >= self.start => recent.n_errors_in_row = recent.n_errors_in_row.saturating_add(1),
            _ => recent.failed(format!("no answer within {:.1} s", had.as_secs_f64())),
        }
    }

    /// Hears of the answer of a [`Store`].
    fn stored(self, answer: &Result<Option<Stored>, StoreError>) {
        match answer {
            Ok(Some(stored)) => self.found(stored.bytes.len() as u64),
            Ok(None) => self.missing(),
            Err(error) => self.failed(error),
        }
    }
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        if !self.is_told {
            self.given_up();
        }
    }
}

impl Recent {
    fn answered(&mut self) {
        self.n_errors_in_row = 0;
        self.last_answer = Some(Instant::now());
    }

    fn failed(&mut self, text: String) {
        self.n_errors_in_row = self.n_errors_in_row.saturating_add(1);
        self.last_error = Some((Instant::now(), text));
    }
}

/// A store with a recorder before it.
#[derive(Debug)]
pub struct Observed {
    store: Arc<dyn Store>,
    recorder: Recorder,
}

impl Observed {
    /// The same store, observed from now on.
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self { store, recorder: Recorder::default() }
    }
}

impl Store for Observed {
    fn name(&self) -> &str {
        self.store.name()
    }

    fn fetch(&self, id: ChunkId) -> BoxFuture<'_, Result<Option<Stored>, StoreError>> {
        Box::pin(async move {
            let request = self.recorder.begin();
            let answer = self.store.fetch(id).await;
            request.stored(&answer);
            answer
        })
    }

    fn has(&self, id: ChunkId) -> BoxFuture<'_, Result<bool, StoreError>> {
        Box::pin(async move {
            let request = self.recorder.begin();
            let answer = self.store.has(id).await;
            match &answer {
                Ok(true) => request.found(0),
                Ok(false) => request.missing(),
                Err(error) => request.failed(error),
            }
            answer
        })
    }

    fn blocking(&self) -> Option<&dyn BlockingStore> {
        self.store.blocking().is_some().then_some(self as &dyn BlockingStore)
    }

    fn figures(&self) -> Vec<StoreFigures> {
        vec![self.recorder.figures(self.name())]
    }
}

impl BlockingStore for Observed {
    fn fetch_now(&self, id: ChunkId, max_bytes: u64) -> Result<Option<Stored>, StoreError> {
        let request = self.recorder.begin();
        let answer = match self.store.blocking() {
            Some(store) => store.fetch_now(id, max_bytes),
            None => Err(StoreError::new(self.name(), id.to_hex(), "it cannot be asked this way")),
        };
        request.stored(&answer);
        answer
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::digest::Digest;
    use crate::store::fault::{Fault, FaultStore};
    use crate::store::mirror::MirrorGroup;
    use crate::store::router::Router;

    fn observed(name: &str, fault: Fault) -> Arc<dyn Store> {
        let store = FaultStore::new(name, move |_, _| fault);
        store.insert(Digest::default().id(b"x"), b"x");
        Arc::new(Observed::new(Arc::new(store)))
    }

    #[tokio::test(start_paused = true)]
    async fn every_end_of_a_request_is_counted_once() {
        let id = Digest::default().id(b"x");
        let slow = Fault::Delay(Duration::from_millis(40));
        for (fault, n) in [
            (slow, (1, 0, 0, 0)),
            (Fault::Missing, (0, 1, 0, 0)),
            (Fault::Fail, (0, 0, 1, 0)),
            (Fault::Hang, (0, 0, 0, 1)),
        ] {
            let store = observed("s", fault);
            let asked = tokio::time::timeout(Duration::from_secs(1), store.fetch(id));
            drop(asked.await);
            let figures = store.figures().remove(0);
            assert_eq!((figures.n_found, figures.n_missing, figures.n_failed, figures.n_dropped), n, "{fault:?}");
            assert_eq!((figures.n_requests, figures.n_in_flight), (1, 0));
            assert_eq!(figures.latency.n(), n.0);
            assert_eq!(figures.last_error.is_some(), n.2 == 1);
            assert_eq!(figures.found_bytes, n.0);
        }
    }

    #[tokio::test]
    async fn a_store_that_is_alone_fails_by_its_errors_in_a_row_until_it_answers() {
        let id = Digest::default().id(b"x");
        let script = [Fault::Fail, Fault::Missing, Fault::Fail, Fault::Fail, Fault::Fail, Fault::None];
        let faulty = FaultStore::new("s", move |_, n| script[n as usize]);
        faulty.insert(id, b"x");
        let store = Observed::new(Arc::new(faulty));
        assert!(store.figures()[0].is_healthy(), "nothing is known of it");
        for (n_errors, is_healthy) in [(1, false), (0, true), (1, true), (2, true), (3, false), (0, true)] {
            drop(store.fetch(id).await);
            let figures = store.figures().remove(0);
            assert_eq!((figures.n_errors_in_row, figures.is_healthy()), (n_errors, is_healthy));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_deadline_is_held_against_a_store_that_is_silent() {
        const SECOND: Duration = Duration::from_secs(1);
        let id = Digest::default().id(b"x");
        let store = observed("s", Fault::Hang);
        let seen = || {
            let figures = store.figures().remove(0);
            (figures.n_dropped, figures.n_errors_in_row, figures.last_error.map(|(_, text)| text))
        };
        // Given up on by itself: before a deadline, and without one.
        drop(tokio::time::timeout(SECOND, in_time(Instant::now() + 2 * SECOND, 2 * SECOND, store.fetch(id))).await);
        drop(tokio::time::timeout(SECOND, store.fetch(id)).await);
        // Most of the time it waited for its turn.
        drop(in_time(Instant::now() + SECOND, 3 * SECOND, store.fetch(id)).await);
        assert_eq!(seen(), (3, 0, None));
        assert!(in_time(Instant::now() + SECOND, SECOND, store.fetch(id)).await.is_err());
        assert_eq!(seen(), (4, 1, Some("no answer within 1.0 s".to_owned())));
    }

    #[tokio::test(start_paused = true)]
    async fn one_late_request_among_answers_is_not_held_against_a_store() {
        const SECOND: Duration = Duration::from_secs(1);
        let id = Digest::default().id(b"x");
        let faulty = FaultStore::new("s", |_, n| if n == 0 { Fault::Hang } else { Fault::Delay(SECOND / 4) });
        faulty.insert(id, b"x");
        let store = Observed::new(Arc::new(faulty));
        let late = in_time(Instant::now() + SECOND, SECOND, store.fetch(id));
        let (late, answered) = tokio::join!(late, store.fetch(id));
        assert!(late.is_err() && answered.unwrap().is_some());
        let figures = store.figures().remove(0);
        assert_eq!((figures.n_dropped, figures.n_errors_in_row, figures.last_error), (1, 0, None));
    }

    #[tokio::test(start_paused = true)]
    async fn a_mirror_that_loses_a_race_does_not_fail() {
        let id = Digest::default().id(b"x");
        let group = MirrorGroup::new(vec![observed("a", Fault::Hang), observed("b", Fault::None)]);
        let time = Duration::from_secs(60);
        assert!(in_time(Instant::now() + time, time, group.fetch(id)).await.unwrap().unwrap().is_some());
        let figures = group.figures().remove(0);
        assert_eq!((figures.n_dropped, figures.n_errors_in_row, figures.last_error), (1, 0, None));
    }

    #[tokio::test]
    async fn stores_behind_one_show_themselves_with_their_health() {
        let id = Digest::default().id(b"x");
        let group: Arc<dyn Store> =
            Arc::new(MirrorGroup::new(vec![observed("a", Fault::Fail), observed("b", Fault::None)]));
        let router = Router::new(vec![observed("c", Fault::Missing), group]);
        for _ in 0..3 {
            assert!(router.fetch(id).await.unwrap().is_some());
        }
        let figures = router.figures();
        let seen: Vec<_> = figures
            .iter()
            .map(|store| {
                let is_healthy = store.health.as_ref().unwrap().is_healthy;
                (store.name.as_str(), store.mirror_of.as_deref(), store.n_requests > 0, is_healthy)
            })
            .collect();
        assert_eq!(seen, [("c", None, true, true), ("a", Some("a|b"), true, false), ("b", Some("a|b"), true, true)]);
        assert!(figures[1].last_error.as_ref().unwrap().1.contains("scripted failure"));
    }
}
