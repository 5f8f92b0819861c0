//! How long things took: counted by upper ends that stay the same, as Prometheus wants them.
//!
//! Invariant: counting takes no lock. A snapshot taken meanwhile may lack what is being counted, and is never more than that off.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper ends of the buckets in seconds: from an answer out of memory to a read that waited for its deadline.
pub const LATENCY_SECONDS: [f64; 16] =
    [0.00001, 0.000025, 0.0001, 0.00025, 0.001, 0.0025, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 2.5, 10.0, 30.0, 60.0];

/// How many took up to each of [`LATENCY_SECONDS`], and longer than all.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; LATENCY_SECONDS.len() + 1],
    total_ns: AtomicU64,
}

/// What was counted up to a moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HistogramSnapshot {
    /// How many took longer than the end before and up to this one; the last one is for longer than all ends.
    pub counts: Vec<u64>,
    /// All spans together.
    pub total: Duration,
}

impl Histogram {
    /// Counts one.
    pub fn observe(&self, span: Duration) {
        let seconds = span.as_secs_f64();
        let bucket = LATENCY_SECONDS.partition_point(|end| *end < seconds);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.total_ns.fetch_add(u64::try_from(span.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// What was counted so far.
    pub fn snapshot(&self) -> HistogramSnapshot {
        let counts = self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect();
        HistogramSnapshot { counts, total: Duration::from_nanos(self.total_ns.load(Ordering::Relaxed)) }
    }
}

impl HistogramSnapshot {
    /// How many were counted.
    pub fn n(&self) -> u64 {
        self.counts.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_span_is_counted_at_its_end() {
        let histogram = Histogram::default();
        for span in [Duration::ZERO, Duration::from_micros(10), Duration::from_millis(1), Duration::from_secs(3600)] {
            histogram.observe(span);
        }
        let snapshot = histogram.snapshot();
        assert_eq!((snapshot.counts[0], snapshot.counts[4], snapshot.n()), (2, 1, 4));
        assert_eq!(snapshot.counts.last(), Some(&1));
        assert_eq!(snapshot.total, Duration::from_micros(3_600_001_010));
        assert!(LATENCY_SECONDS.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
