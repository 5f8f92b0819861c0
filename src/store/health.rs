//! How one of several stores is doing: what it answered, how fast, and whether it is set aside for a while.
//!
//! * [`Health`] hears of every request from its start to its end. [`MemberHealth`] is what it shows.
//! * Its [`Latencies`] tell when a request is late, and how long a silence shows it to be dead.
//!
//! A store is set aside after errors in a row, after a silence, or for wrong bytes: for a span that doubles each time
//! it proves itself sick again. When the span is over, one request at a time probes it; any answer brings it back.
//!
//! Invariant: a store that only its readers gave up on (a lost race, a deadline) is judged by its silence, which is the
//! time it was asked something and answered nothing; so a store nobody asks does not grow sick.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::StoreError;
use super::latency::{Latencies, MIN_DEADLY_SILENCE};
use super::retry::RetryPolicy;
use crate::digest::ChunkId;

/// Errors in a row that set a store aside. One is an accident, and one chunk may be unreadable for good.
pub(super) const MAX_ERRORS_IN_ROW: u32 = 3;

/// How long a store is set aside: a second first, so that a restarted server is hardly missed, and half a minute at the most, which
/// bounds how late its return is noticed.
const SPANS: RetryPolicy =
    RetryPolicy { n_retries: u32::MAX, base: Duration::from_secs(1), max: Duration::from_secs(30) };

/// What wrong bytes weigh against right ones: a store is set aside at the limit, which takes three bad chunks in a row, and
/// is never reached by a store with one bad chunk in ten.
const WRONG_WEIGHT: u32 = 10;
const WRONG_LIMIT: u32 = 28;

/// What a store among several looks like from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberHealth {
    /// The store's name.
    pub name: String,
    /// Whether it is asked in its turn. If not it is set aside, and asked only when the others cannot answer, or to probe it.
    pub is_healthy: bool,
    /// For how much longer it is set aside; zero when a probe is due or under way.
    pub set_aside_for: Option<Duration>,
    /// How long 95 of 100 recent fetches took at the most; `None` while too few are known.
    pub p95: Option<Duration>,
    /// Requests so far.
    pub n_requests: u64,
    /// Errors, silences and chunks with wrong bytes so far.
    pub n_failures: u64,
    /// How often another store was asked beside it because it was late.
    pub n_hedges: u64,
}

/// How a request ended.
#[derive(Debug)]
pub(super) enum End<'a> {
    /// With a chunk, or with the word that it is there.
    Found,
    /// The store does not have the chunk.
    Missing,
    /// With an error.
    Failed(&'a StoreError),
    /// Nobody waits for it any more.
    Dropped,
}

/// A request that began.
#[derive(Debug, Clone, Copy)]
pub(super) struct Begun {
    pub at: Instant,
    /// Whether its latency is that of a fetch.
    pub is_fetch: bool,
    /// Whether it probes a store that is set aside; the next probe waits for its end.
    pub is_probe: bool,
}

/// Whether a store may be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// In its turn.
    InUse,
    /// After those in use, and by a probe from this instant.
    Aside(Instant),
}

/// What is known about a store.
#[derive(Debug)]
pub(super) struct Health {
    name: String,
    /// The shortest silence that shows the store to be dead.
    min_silence: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    n_errors_in_row: u32,
    /// Rises with wrong bytes and sinks with every chunk.
    wrong_level: u32,
    /// The last chunk with wrong bytes: a chunk asked for again is not held against the store twice.
    last_wrong: Option<ChunkId>,
    aside: Option<Aside>,
    /// The last time it was set aside: which of the growing spans it got, and how long that was.
    last_step: u32,
    last_span: Duration,
    returned: Option<Instant>,
    latencies: Latencies,
    n_running: u32,
    /// When the silence that lasts began; `None` while nothing is asked.
    silent_since: Option<Instant>,
    /// The silence of requests that ended without an answer.
    past_silence: Duration,
    n_requests: u64,
    n_failures: u64,
    n_hedges: u64,
}

#[derive(Debug, Clone, Copy)]
struct Aside {
    until: Instant,
    is_probed: bool,
    /// Only requests made after the span prove anything then: nobody here sees whether bytes are right.
    is_for_wrong_bytes: bool,
}

impl Health {
    /// A store nothing is known about; a silence shorter than `min_silence` (of a second at the least) does not count.
    pub(super) fn new(name: &str, min_silence: Duration) -> Self {
        Self { name: name.to_owned(), min_silence: min_silence.max(MIN_DEADLY_SILENCE), state: Mutex::default() }
    }

    /// Hears that a request began.
    pub(super) fn begin(&self, begun: Begun) {
        let mut state = self.lock();
        state.n_requests += 1;
        state.n_running += 1;
        state.silent_since.get_or_insert(begun.at);
    }

    /// Hears how it ended.
    pub(super) fn end(&self, now: Instant, begun: Begun, end: End<'_>) {
        let mut state = self.lock();
        let latency = now - begun.at;
        state.n_running = state.n_running.saturating_sub(1);
        let news = match end {
            End::Found | End::Missing => {
                state.hear(now);
                if begun.is_fetch && matches!(end, End::Found) {
                    state.latencies.add(latency, true);
                    state.wrong_level = state.wrong_level.saturating_sub(1);
                }
                state.n_errors_in_row = 0;
                state.bring_back(now, begun).then(|| "answers again".to_owned())
            }
            End::Failed(error) => {
                state.hear(now);
                state.fail(now, begun.is_probe).map(|span| set_aside_text(span, &error.to_string()))
            }
            End::Dropped if begun.is_probe => {
                state.rest(now);
                state.fail(now, true).map(|span| set_aside_text(span, "no answer to a probe"))
            }
            End::Dropped => {
                // Given up on before it was late it says nothing; later it says that the latency is more than this.
                if begun.is_fetch && latency >= state.latencies.lateness() {
                    state.latencies.add(latency, false);
                }
                state.rest(now);
                None
            }
        };
        drop(state);
        self.tell(news);
    }

    /// Hears that a chunk it handed out had wrong bytes.
    pub(super) fn gave_wrong_bytes(&self, now: Instant, id: ChunkId) {
        let mut state = self.lock();
        if state.last_wrong == Some(id) {
            return;
        }
        state.last_wrong = Some(id);
        state.n_failures += 1;
        state.wrong_level += WRONG_WEIGHT;
        if state.wrong_level < WRONG_LIMIT || state.aside.is_some() {
            return;
        }
        state.wrong_level = 0;
        let span = state.set_aside(now, true);
        drop(state);
        self.tell(Some(set_aside_text(span, "wrong bytes")));
    }

    /// Whether it was silent for so long that it seems dead; then it is set aside.
    pub(super) fn is_dead(&self, now: Instant) -> bool {
        let mut state = self.lock();
        if state.aside.is_some() {
            return true;
        }
        let silence = state.silence(now);
        if silence < state.latencies.deadly_silence(self.min_silence) {
            return false;
        }
        state.n_failures += 1;
        let span = state.set_aside(now, false);
        drop(state);
        self.tell(Some(set_aside_text(span, &format!("no answer for {} ms", silence.as_millis()))));
        true
    }

    /// How much longer it may be silent before it seems dead.
    pub(super) fn until_dead(&self, now: Instant) -> Duration {
        let state = self.lock();
        state.latencies.deadly_silence(self.min_silence).saturating_sub(state.silence(now))
    }

    /// How long a fetch may take before it is late.
    pub(super) fn lateness(&self) -> Duration {
        self.lock().latencies.lateness()
    }

    /// Counts that another store was asked because this one was late.
    pub(super) fn count_hedge(&self) {
        self.lock().n_hedges += 1;
    }

    /// Whether it may be asked.
    pub(super) fn standing(&self) -> Standing {
        self.lock().aside.map_or(Standing::InUse, |aside| Standing::Aside(aside.until))
    }

    /// Whether a probe is due; the caller makes it, and no other is due before that one ends.
    pub(super) fn take_probe(&self, now: Instant) -> bool {
        match &mut self.lock().aside {
            Some(aside) if aside.until <= now && !aside.is_probed => {
                aside.is_probed = true;
                true
            }
            _ => false,
        }
    }

    /// Makes the next probe due at once: there is reason to think that it answers again.
    pub(super) fn expect_return(&self, now: Instant) {
        if let Some(aside) = &mut self.lock().aside {
            aside.until = aside.until.min(now);
        }
    }

    /// What is known.
    pub(super) fn show(&self, now: Instant) -> MemberHealth {
        let state = self.lock();
        MemberHealth {
            name: self.name.clone(),
            is_healthy: state.aside.is_none(),
            set_aside_for: state.aside.map(|aside| aside.until.saturating_duration_since(now)),
            p95: state.latencies.p95(),
            n_requests: state.n_requests,
            n_failures: state.n_failures,
            n_hedges: state.n_hedges,
        }
    }

    /// Says it to the log, with the lock given back.
    fn tell(&self, news: Option<String>) {
        if let Some(news) = news {
            tracing::warn!("chunk store {}: {news}", self.name);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn set_aside_text(span: Duration, why: &str) -> String {
    format!("set aside for {} ms: {why}", span.as_millis())
}

impl State {
    /// It answered something.
    fn hear(&mut self, now: Instant) {
        self.past_silence = Duration::ZERO;
        self.silent_since = (self.n_running > 0).then_some(now);
    }

    /// A request ended without an answer.
    fn rest(&mut self, now: Instant) {
        if self.n_running == 0 {
            self.past_silence = self.silence(now);
            self.silent_since = None;
        }
    }

    fn silence(&self, now: Instant) -> Duration {
        self.past_silence + self.silent_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    /// Counts an error; the span if it is set aside (again) for it.
    fn fail(&mut self, now: Instant, is_probe: bool) -> Option<Duration> {
        self.n_failures += 1;
        self.n_errors_in_row += 1;
        let is_sick = match self.aside {
            // Of the requests that were under way when it was set aside nothing new is learned.
            Some(aside) => is_probe || aside.until <= now,
            None => self.n_errors_in_row >= MAX_ERRORS_IN_ROW,
        };
        is_sick.then(|| self.set_aside(now, self.aside.is_some_and(|aside| aside.is_for_wrong_bytes)))
    }

    /// A span that doubles if it was set aside not long ago.
    fn set_aside(&mut self, now: Instant, is_for_wrong_bytes: bool) -> Duration {
        let was_sick_lately = self.returned.is_some_and(|at| now - at < self.last_span * 2);
        let step = if self.aside.is_some() || was_sick_lately { self.last_step.saturating_add(1) } else { 0 };
        let span = SPANS.wait(step);
        self.last_step = step;
        self.last_span = span;
        self.aside = Some(Aside { until: now + span, is_probed: false, is_for_wrong_bytes });
        span
    }

    /// It is well, as the answer to a request shows.
    fn bring_back(&mut self, now: Instant, begun: Begun) -> bool {
        let is_back = self.aside.is_some_and(|aside| !aside.is_for_wrong_bytes || aside.until <= begun.at);
        if is_back {
            self.aside = None;
            self.returned = Some(now);
        }
        is_back
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;

    const MS: Duration = Duration::from_millis(1);

    /// A health with a clock of its own.
    struct Patient {
        health: Health,
        now: Instant,
    }

    impl Patient {
        fn new() -> Self {
            Self { health: Health::new("s", Duration::ZERO), now: Instant::now() }
        }

        fn begin(&self, is_probe: bool) -> Begun {
            let begun = Begun { at: self.now, is_fetch: true, is_probe };
            self.health.begin(begun);
            begun
        }

        fn request(&mut self, latency: Duration, end: End<'_>) {
            let begun = self.begin(false);
            self.now += latency;
            self.health.end(self.now, begun, end);
        }

        fn fail(&mut self) {
            self.request(MS, End::Failed(&StoreError::new("s", "o", "r")));
        }

        /// How long it is set aside from now.
        fn span(&self) -> Option<Duration> {
            self.health.show(self.now).set_aside_for
        }
    }

    #[test]
    fn errors_in_a_row_set_it_aside_and_an_answer_brings_it_back() {
        let mut patient = Patient::new();
        for _ in 0..5 {
            patient.fail();
            patient.fail();
            patient.request(MS, End::Missing);
        }
        assert_eq!(patient.span(), None, "two errors are no row");
        for _ in 0..3 {
            patient.fail();
        }
        assert!(patient.span().is_some_and(|span| span > 400 * MS && span <= 1000 * MS), "{:?}", patient.span());
        patient.request(MS, End::Found);
        assert_eq!(patient.span(), None);
        assert_eq!(patient.health.show(patient.now).n_failures, 13);
    }

    #[test]
    fn spans_grow_to_a_bound_while_probes_fail_and_shrink_after_a_good_while() {
        let mut patient = Patient::new();
        for _ in 0..3 {
            patient.fail();
        }
        for step in 1..10 {
            assert!(!patient.health.take_probe(patient.now), "a probe before the span is over");
            patient.now += patient.span().unwrap_or_default();
            assert!(patient.health.take_probe(patient.now));
            assert!(!patient.health.take_probe(patient.now), "a second probe beside the first");
            let probe = patient.begin(true);
            patient.health.end(patient.now, probe, End::Dropped);
            let most = Duration::from_secs(1 << step).min(SPANS.max);
            let span = patient.span().unwrap_or_default();
            assert!(span >= most / 2 && span <= most, "{step}: {span:?}");
        }
        patient.now += SPANS.max;
        patient.request(MS, End::Found);
        for _ in 0..3 {
            patient.fail();
        }
        assert!(patient.span() >= Some(SPANS.max / 2), "sick again at once");
        patient.now += SPANS.max;
        patient.request(MS, End::Found);
        patient.now += SPANS.max * 3;
        for _ in 0..3 {
            patient.fail();
        }
        assert!(patient.span() <= Some(SPANS.base), "sick again after a good while");
    }

    #[test]
    fn errors_of_requests_that_were_under_way_do_not_lengthen_the_span() {
        let mut patient = Patient::new();
        for _ in 0..3 {
            patient.fail();
        }
        for _ in 0..100 {
            patient.fail();
            patient.now -= MS;
        }
        assert!(patient.span() <= Some(SPANS.base));
    }

    #[test]
    fn silence_is_time_with_requests_and_without_answers() {
        let mut patient = Patient::new();
        // A long rest between requests that were given up on is no silence.
        for _ in 0..3 {
            patient.request(600 * MS, End::Dropped);
            assert!(!patient.health.is_dead(patient.now));
            patient.now += Duration::from_secs(3600);
        }
        let begun = patient.begin(false);
        assert_eq!(patient.health.until_dead(patient.now), 200 * MS);
        patient.now += 199 * MS;
        assert!(!patient.health.is_dead(patient.now));
        patient.now += MS;
        assert!(patient.health.is_dead(patient.now));
        assert!(patient.span().is_some());
        // The late answer is one, too.
        patient.health.end(patient.now, begun, End::Found);
        assert_eq!(patient.span(), None);
        assert_eq!(patient.health.until_dead(patient.now), 2000 * MS);
    }

    #[test]
    fn only_requests_given_up_on_late_count_and_they_lengthen_what_is_late() {
        let mut patient = Patient::new();
        for _ in 0..64 {
            patient.request(100 * MS, End::Found);
        }
        for _ in 0..64 {
            patient.request(MS, End::Dropped);
            patient.request(MS, End::Missing);
        }
        assert_eq!(patient.health.lateness(), 125 * MS);
        for _ in 0..4 {
            patient.request(300 * MS, End::Dropped);
        }
        assert_eq!(patient.health.lateness(), 375 * MS);
    }

    #[test]
    fn wrong_bytes_set_it_aside_until_a_request_after_the_span() {
        let mut patient = Patient::new();
        let id = |i: u32| Digest::default().id(&i.to_le_bytes());
        for i in 0..1000 {
            if i % 11 == 0 {
                patient.health.gave_wrong_bytes(patient.now, id(i));
            }
            patient.request(MS, End::Found);
            assert_eq!(patient.span(), None, "one in eleven");
        }
        for _ in 0..100 {
            patient.health.gave_wrong_bytes(patient.now, id(2000));
        }
        assert_eq!(patient.span(), None, "one chunk, however often");
        for i in 3000..3003 {
            patient.request(MS, End::Found);
            patient.health.gave_wrong_bytes(patient.now, id(i));
        }
        assert!(patient.span().is_some());
        patient.request(MS, End::Found);
        assert!(patient.span().is_some(), "an answer proves nothing about its bytes");
        patient.now += SPANS.base;
        patient.request(MS, End::Found);
        assert_eq!(patient.span(), None);
    }
}
