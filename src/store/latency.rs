//! How fast a store is: its recent latencies, when a request is late by them, and what silence is more than lateness.
//!
//! Invariant: a request that was given up on while late counts with the time it had, which is less than it needed. So what is late
//! grows until few requests are, also if late ones never come to their end.

use std::collections::VecDeque;
use std::time::Duration;

/// Latencies remembered a store.
const N_LATENCIES: usize = 64;

/// Fewer latencies than this say nothing about the 95th percentile.
const MIN_LATENCIES: usize = 8;

/// How long a request may take before it is late, while latencies are unknown.
pub(super) const UNKNOWN_LATENESS: Duration = Duration::from_millis(500);

/// A request is never late before this: timers and schedulers are no more exact, and a fast store needs no second one.
pub(super) const MIN_LATENESS: Duration = Duration::from_millis(20);

/// A request is always late after this.
const MAX_LATENESS: Duration = Duration::from_secs(5);

/// How much a request may take beyond the 95th percentile, so that a steady store is not late by a rounding error.
const LATENESS_FACTOR: f64 = 1.25;

/// The bounds of a silence that shows a store to be dead; between them it is some times the 95th percentile.
pub(crate) const MIN_DEADLY_SILENCE: Duration = Duration::from_secs(1);
const UNKNOWN_SILENCE: Duration = Duration::from_secs(2);
const MAX_SILENCE: Duration = Duration::from_secs(10);
const SILENCE_FACTOR: u32 = 4;

/// The last latencies, oldest first, and of each whether it is that of an answer: otherwise nobody waited any longer.
#[derive(Debug, Default)]
pub(crate) struct Latencies(VecDeque<(Duration, bool)>);

impl Latencies {
    /// Remembers one.
    pub(crate) fn add(&mut self, latency: Duration, is_answer: bool) {
        if self.0.len() == N_LATENCIES {
            self.0.pop_front();
        }
        self.0.push_back((latency, is_answer));
    }

    fn is_answer(sample: &(Duration, bool)) -> bool {
        sample.1
    }

    fn longest(&self, is_meant: impl Fn(&(Duration, bool)) -> bool) -> Duration {
        self.0.iter().filter(|sample| is_meant(sample)).map(|(latency, _)| *latency).max().unwrap_or_default()
    }

    /// 95 of 100 answers were this fast; `None` while too few are known.
    pub(super) fn p95(&self) -> Option<Duration> {
        self.p95_of(Self::is_answer)
    }

    /// Half of the answers were this fast; `None` while too few are known.
    pub(super) fn p50(&self) -> Option<Duration> {
        self.percentile_of(50, Self::is_answer)
    }

    /// How long a fetch may take before it is late.
    pub(super) fn lateness(&self) -> Duration {
        let lateness = match self.p95_of(|_| true) {
            Some(p95) => p95.mul_f64(LATENESS_FACTOR),
            // What is known of a few is at least that such a latency happens.
            None => UNKNOWN_LATENESS.max(self.longest(|_| true) * 2),
        };
        lateness.clamp(MIN_LATENESS, MAX_LATENESS)
    }

    /// How long a silence, of `min` at the least, shows the store to be dead.
    pub(crate) fn deadly_silence(&self, min: Duration) -> Duration {
        let usual = match self.p95() {
            Some(p95) => p95 * SILENCE_FACTOR,
            None => UNKNOWN_SILENCE.max(self.longest(Self::is_answer) * SILENCE_FACTOR),
        };
        usual.min(MAX_SILENCE).max(min)
    }

    fn p95_of(&self, is_meant: impl Fn(&(Duration, bool)) -> bool) -> Option<Duration> {
        self.percentile_of(95, is_meant)
    }

    fn percentile_of(&self, percent: usize, is_meant: impl Fn(&(Duration, bool)) -> bool) -> Option<Duration> {
        let mut latencies: Vec<Duration> =
            self.0.iter().filter(|sample| is_meant(sample)).map(|(latency, _)| *latency).collect();
        if latencies.len() < MIN_LATENCIES {
            return None;
        }
        let rank = (latencies.len() * percent).div_ceil(100) - 1;
        Some(*latencies.select_nth_unstable(rank).1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_request_is_late_after_the_95th_percentile() {
        let mut latencies = Latencies::default();
        assert_eq!((latencies.p95(), latencies.lateness()), (None, UNKNOWN_LATENESS));
        for i in 1..=100 {
            latencies.add(MS * i, true);
        }
        // Of 37 ms to 100 ms.
        assert_eq!(latencies.p95(), Some(97 * MS));
        assert_eq!(latencies.lateness(), (97 * MS).mul_f64(1.25));
        for (latency, lateness) in [(MS, MIN_LATENESS), (Duration::from_secs(20), MAX_LATENESS)] {
            for _ in 0..N_LATENCIES {
                latencies.add(latency, true);
            }
            assert_eq!(latencies.lateness(), lateness);
        }
    }

    #[test]
    fn what_was_given_up_on_lengthens_lateness_and_not_the_deadly_silence() {
        let mut latencies = Latencies::default();
        for _ in 0..N_LATENCIES {
            latencies.add(300 * MS, true);
        }
        for _ in 0..4 {
            latencies.add(900 * MS, false);
        }
        assert_eq!(latencies.lateness(), 1125 * MS);
        assert_eq!((latencies.p95(), latencies.deadly_silence(Duration::ZERO)), (Some(300 * MS), 1200 * MS));
    }

    #[test]
    fn a_few_latencies_count_as_what_happens() {
        let mut latencies = Latencies::default();
        assert_eq!(latencies.deadly_silence(Duration::ZERO), UNKNOWN_SILENCE);
        latencies.add(900 * MS, false);
        assert_eq!((latencies.lateness(), latencies.deadly_silence(Duration::ZERO)), (1800 * MS, UNKNOWN_SILENCE));
        latencies.add(700 * MS, true);
        assert_eq!((latencies.p95(), latencies.deadly_silence(Duration::ZERO)), (None, 2800 * MS));
        for (latency, min, silence) in [(MS, 0, 1), (MS, 5, 5), (60_000 * MS, 5, 10), (60_000 * MS, 20, 20)] {
            for _ in 0..N_LATENCIES {
                latencies.add(latency, true);
            }
            let min = MIN_DEADLY_SILENCE.max(Duration::from_secs(min));
            assert_eq!(latencies.deadly_silence(min), Duration::from_secs(silence));
        }
    }
}
