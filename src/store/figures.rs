//! What requests to a store came to: how many, how fast, with which errors. For status and metrics.
//!
//! * [`Recorder`] hears of every request; [`StoreFigures`] is what it shows.
//! * [`Observed`] is any store with a recorder before it.
//!
//! Invariant: every request that began is told of once, also when nobody waits for it any more.

use std::sync::Arc;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::Instant;

use super::health::MemberHealth;
use super::latency::Latencies;
use super::{BlockingStore, Store, StoreError, Stored};
use crate::digest::ChunkId;
use crate::report::gauge::Inside;
use crate::report::histogram::HistogramSnapshot;
use crate::report::{Counter, Gauge, Histogram};

/// The most of an error's text that is kept, in bytes.
const MAX_ERROR_BYTES: usize = 512;

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
    /// The last error, and how long ago it was.
    pub last_error: Option<(Duration, String)>,
    /// How it stands among several stores.
    pub health: Option<MemberHealth>,
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
    last_error: Option<(Instant, String)>,
}

/// A request under way.
#[derive(Debug)]
pub struct Request<'a> {
    recorder: &'a Recorder,
    start: Instant,
    is_told: bool,
    _in_flight: Inside<'a>,
}

impl Recorder {
    /// Hears that a request begins.
    pub fn begin(&self) -> Request<'_> {
        self.n_requests.add(1);
        Request { recorder: self, start: Instant::now(), is_told: false, _in_flight: self.in_flight.enter() }
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
        self.recorder.recent().latencies.add(latency, true);
    }

    /// The store does not have it.
    pub fn missing(mut self) {
        self.is_told = true;
        self.recorder.n_missing.add(1);
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
        self.recorder.recent().last_error = Some((Instant::now(), text));
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
            self.recorder.n_dropped.add(1);
        }
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
