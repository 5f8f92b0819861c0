//! Numbers as text for Prometheus (exposition format 0.0.4).
//!
//! Invariant: label values are escaped, so that no name of a store can make a line of its own.

use std::fmt::{Display, Write};

use super::histogram::{HistogramSnapshot, LATENCY_SECONDS};
use super::{Counter, Gauge};

/// The type that an HTTP answer with this text has.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Says what the samples below are: `kind` is `counter`, `gauge` or `histogram`.
pub fn family(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// Writes one sample without labels.
pub fn line(text: &mut String, name: &str, value: impl Display) {
    let _ = writeln!(text, "{name} {value}");
}

/// Writes one sample with labels.
pub fn sample(text: &mut String, name: &str, labels: &[(&str, &str)], value: impl Display) {
    let _ = writeln!(text, "{name}{} {value}", in_braces(labels));
}

/// Writes one counter with what it is.
pub fn counter(text: &mut String, name: &str, help: &str, counter: &Counter) {
    family(text, name, "counter", help);
    line(text, name, counter.get());
}

/// Writes one gauge with what it is.
pub fn gauge(text: &mut String, name: &str, help: &str, gauge: &Gauge) {
    family(text, name, "gauge", help);
    line(text, name, gauge.get());
}

/// Writes the samples of a histogram over [`LATENCY_SECONDS`].
pub fn histogram(text: &mut String, name: &str, labels: &[(&str, &str)], snapshot: &HistogramSnapshot) {
    buckets(text, name, labels, &LATENCY_SECONDS, &snapshot.counts, snapshot.total.as_secs_f64());
}

/// Writes the samples of a histogram with these upper ends; `counts` has one more, for what was longer than all.
pub fn buckets(
    text: &mut String,
    name: &str,
    labels: &[(&str, &str)],
    ends: &[f64],
    counts: &[u64],
    total_seconds: f64,
) {
    let bucket = format!("{name}_bucket");
    let mut n_up_to = 0;
    for (end, n) in ends.iter().map(f64::to_string).chain(["+Inf".to_owned()]).zip(counts) {
        n_up_to += n;
        let with_end: Vec<(&str, &str)> = labels.iter().copied().chain([("le", end.as_str())]).collect();
        sample(text, &bucket, &with_end, n_up_to);
    }
    sample(text, &format!("{name}_sum"), labels, total_seconds);
    sample(text, &format!("{name}_count"), labels, n_up_to);
}

fn in_braces(labels: &[(&str, &str)]) -> String {
    if labels.is_empty() {
        return String::new();
    }
    let pairs: Vec<String> = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
    format!("{{{}}}", pairs.join(","))
}

fn escaped(value: &str) -> String {
    value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::report::Histogram;

    #[test]
    fn labels_cannot_break_out() {
        let mut text = String::new();
        sample(&mut text, "x", &[("store", "a\"} 1\nb\\"), ("n", "1")], 7);
        assert_eq!(text, "x{store=\"a\\\"} 1\\nb\\\\\",n=\"1\"} 7\n");
    }

    #[test]
    fn buckets_add_up() {
        let recorded = Histogram::default();
        recorded.observe(Duration::from_millis(2));
        recorded.observe(Duration::from_secs(100));
        let mut text = String::new();
        histogram(&mut text, "h", &[("a", "b")], &recorded.snapshot());
        for wanted in [
            "h_bucket{a=\"b\",le=\"0.001\"} 0",
            "h_bucket{a=\"b\",le=\"0.0025\"} 1",
            "h_bucket{a=\"b\",le=\"60\"} 1",
            "h_bucket{a=\"b\",le=\"+Inf\"} 2",
            "h_sum{a=\"b\"} 100.002",
            "h_count{a=\"b\"} 2",
        ] {
            assert!(text.lines().any(|line| line == wanted), "{wanted} is not in\n{text}");
        }
    }
}
