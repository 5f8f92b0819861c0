//! Numbers about a server, in Prometheus' text format.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use hyper::{Method, StatusCode};

use crate::report::gauge::Inside;
use crate::report::prometheus::{buckets, counter, family, gauge, sample};
use crate::report::{Counter, Gauge};

/// Upper ends of the buckets of the time to an answer's head, in seconds: from a chunk in the page cache to a far store on retry.
const BUCKETS_SECONDS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 2.5, 10.0, 60.0];

/// The numbers of a server.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Bytes that came in on all connections, headers included.
    pub received_bytes: Counter,
    /// Bytes that went out on all connections, headers included.
    pub sent_bytes: Counter,
    /// Connections accepted.
    pub n_accepted: Counter,
    n_connections: Gauge,
    n_in_flight: Gauge,
    /// Never held over I/O or await.
    answered: Mutex<Answered>,
}

#[derive(Debug, Default)]
struct Answered {
    /// How many requests of a method were answered with a status.
    by_status: BTreeMap<(&'static str, u16), u64>,
    /// How many answers took up to each end, and longer than all.
    by_time: [u64; BUCKETS_SECONDS.len() + 1],
    total_time: Duration,
}

impl Metrics {
    /// Counts a connection until it is dropped.
    pub fn connection(&self) -> Inside<'_> {
        self.n_accepted.add(1);
        self.n_connections.enter()
    }

    /// Counts a request that is being answered until it is dropped.
    pub fn in_flight(&self) -> Inside<'_> {
        self.n_in_flight.enter()
    }

    /// Counts an answer.
    pub fn answered(&self, method: &Method, status: StatusCode, took: Duration) {
        // Methods come from outside: names that nobody serves are not kept.
        let method = match *method {
            Method::GET => "GET",
            Method::HEAD => "HEAD",
            Method::PUT => "PUT",
            _ => "other",
        };
        let bucket = BUCKETS_SECONDS.partition_point(|end| *end < took.as_secs_f64());
        let mut answered = self.answered.lock().unwrap_or_else(PoisonError::into_inner);
        *answered.by_status.entry((method, status.as_u16())).or_default() += 1;
        answered.by_time[bucket] += 1;
        answered.total_time += took;
    }

    /// All of it as text.
    pub fn render(&self) -> String {
        let mut text = String::new();
        family(&mut text, "caifs_http_requests_total", "counter", "Requests answered.");
        let answered = self.answered.lock().unwrap_or_else(PoisonError::into_inner);
        for ((method, status), n) in &answered.by_status {
            let labels = [("method", *method), ("status", &status.to_string())];
            sample(&mut text, "caifs_http_requests_total", &labels, n);
        }
        let name = "caifs_http_request_duration_seconds";
        family(&mut text, name, "histogram", "Time from a request's head to its answer's head.");
        buckets(&mut text, name, &[], &BUCKETS_SECONDS, &answered.by_time, answered.total_time.as_secs_f64());
        drop(answered);
        counter(
            &mut text,
            "caifs_http_received_bytes_total",
            "Bytes received, headers included.",
            &self.received_bytes,
        );
        counter(&mut text, "caifs_http_sent_bytes_total", "Bytes sent, headers included.", &self.sent_bytes);
        counter(&mut text, "caifs_http_accepted_connections_total", "Connections accepted.", &self.n_accepted);
        gauge(&mut text, "caifs_http_connections", "Connections open now.", &self.n_connections);
        gauge(&mut text, "caifs_http_requests_in_flight", "Requests being answered now.", &self.n_in_flight);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_counted_by_method_status_and_time() {
        let metrics = Metrics::default();
        let _open = metrics.connection();
        drop(metrics.in_flight());
        metrics.answered(&Method::GET, StatusCode::OK, Duration::from_micros(2500));
        metrics.answered(&Method::GET, StatusCode::OK, Duration::from_millis(500));
        metrics.answered(&Method::PUT, StatusCode::BAD_REQUEST, Duration::from_secs(100));
        metrics.answered(&Method::DELETE, StatusCode::METHOD_NOT_ALLOWED, Duration::ZERO);
        let text = metrics.render();
        for wanted in [
            "caifs_http_requests_total{method=\"GET\",status=\"200\"} 2",
            "caifs_http_requests_total{method=\"PUT\",status=\"400\"} 1",
            "caifs_http_requests_total{method=\"other\",status=\"405\"} 1",
            "caifs_http_request_duration_seconds_bucket{le=\"0.001\"} 1",
            "caifs_http_request_duration_seconds_bucket{le=\"0.0025\"} 2",
            "caifs_http_request_duration_seconds_bucket{le=\"1\"} 3",
            "caifs_http_request_duration_seconds_bucket{le=\"60\"} 3",
            "caifs_http_request_duration_seconds_bucket{le=\"+Inf\"} 4",
            "caifs_http_request_duration_seconds_sum 100.5025",
            "caifs_http_request_duration_seconds_count 4",
            "caifs_http_connections 1",
            "caifs_http_requests_in_flight 0",
        ] {
            assert!(text.lines().any(|line| line == wanted), "{wanted} is not in\n{text}");
        }
    }
}
