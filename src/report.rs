//! What happened: counters that every layer adds to and that tests and status read.
//!
//! [`gauge`] counts what goes on now, [`histogram`] how long things took; [`prometheus`] writes all of it as text. [`behind`] writes
//! lines without anybody waiting for them.

pub mod behind;
pub mod gauge;
pub mod histogram;
pub mod prometheus;

pub use gauge::Gauge;
pub use histogram::Histogram;

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to the number.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The number now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counters of one mount (or one run of a verb).
#[derive(Debug, Default)]
pub struct Report {
    /// Chunks fetched from a store.
    pub n_fetches: Counter,
    /// Bytes fetched from a store, in stored form.
    pub fetched_bytes: Counter,
    /// Chunks that no store had.
    pub n_missing: Counter,
    /// Fetched chunks whose bytes could not be decoded or were not what their id says.
    pub n_bad_chunks: Counter,
    /// Fetches that ended in an error of the store.
    pub n_store_errors: Counter,
    /// Chunks found in the memory tier.
    pub n_memory_hits: Counter,
    /// Chunks that a get had to wait for.
    pub n_memory_misses: Counter,
    /// Chunks dropped from the memory tier to make room.
    pub n_evicted: Counter,
    /// Chunks written to a store that serves as cache.
    pub n_kept: Counter,
    /// Chunks that such a store did not take.
    pub n_keep_errors: Counter,
    /// Chunks found in the disk tier.
    pub n_disk_hits: Counter,
    /// Chunks looked for in the disk tier and not found there.
    pub n_disk_misses: Counter,
    /// Chunks written to the disk tier.
    pub n_disk_kept: Counter,
    /// Files of the disk tier whose bytes were not what they should be; each was taken away.
    pub n_disk_bad: Counter,
    /// Files removed from the disk tier to make room.
    pub n_disk_evicted: Counter,
    /// Operations of the disk tier that the file system refused.
    pub n_disk_errors: Counter,
    /// Reads that the backing file alone answered.
    pub n_backing_hits: Counter,
    /// Chunks written to the backing file.
    pub n_backing_kept: Counter,
    /// Operations of the backing file that failed.
    pub n_backing_errors: Counter,
    /// Opens of files that the kernel reads itself from then on.
    pub n_passthrough_opens: Counter,
    /// Reads answered with the right bytes, in bytes.
    pub read_bytes: Counter,
    /// Requests answered with EIO, by numbered site (see `volume::EioSite`).
    pub eio: [Counter; Report::N_EIO_SITES],
    /// Panics caught while answering a request.
    pub n_panics: Counter,
    /// Requests of the kernel answered, by their place in [`OPS`].
    pub ops: [Counter; OPS.len()],
    /// From a read's arrival to its answer.
    pub read_latency: Histogram,
    /// Batches of chunks that are verified and kept on disk now, and chunks that are written to a store that serves as cache.
    pub being_kept: Gauge,
    /// Requests of the kernel that wait for something else than memory.
    pub requests_in_flight: Gauge,
    /// Reads (and look-ups in archives) that wait for chunks.
    pub waiting_for_chunks: Gauge,
    /// Requests to stores that wait for their turn.
    pub waiting_for_turn: Gauge,
    /// Lines of the access trace that were lost because the disk was slower than the requests.
    pub n_trace_dropped: Counter,
    /// Chunks (or blocks) read ahead of a reader.
    pub n_ahead: Counter,
    /// Their plain bytes.
    pub ahead_bytes: Counter,
    /// Of what was read ahead (or found in memory on the way), the bytes that their reader came to.
    pub ahead_used_bytes: Counter,
    /// Chunks (or blocks) fetched for later: warmed, or replayed from a profile.
    pub n_warmed: Counter,
    /// Their plain bytes.
    pub warmed_bytes: Counter,
    /// Readers that are read ahead of now.
    pub ahead_windows: Gauge,
    /// Bytes ahead of all readers now.
    pub ahead_now_bytes: Gauge,
    /// Chunks (or blocks) being fetched now without anyone waiting.
    pub background_chunks: Gauge,
}

/// The requests of the kernel that are counted, by the names that the log has for them. The last is for all others.
pub const OPS: [&str; 10] =
    ["lookup", "getattr", "readlink", "read", "readdir", "readdirplus", "getxattr", "listxattr", "ioctl", "other"];

impl Report {
    /// Room for the numbered places that answer EIO.
    pub const N_EIO_SITES: usize = 16;

    /// All requests answered with EIO.
    pub fn n_eio(&self) -> u64 {
        self.eio.iter().map(Counter::get).sum()
    }

    /// Counts a request of the kernel by its name in [`OPS`].
    pub fn count_op(&self, op: &str) {
        let place = OPS.iter().position(|known| *known == op).unwrap_or(OPS.len() - 1);
        self.ops[place].add(1);
    }

    /// The requests answered with EIO: how many, and how many at each numbered site that had any, as `3 (01: 2, 05: 1)`.
    pub fn eio_text(&self) -> String {
        let sites = self.eio.iter().enumerate().filter(|(_, counter)| counter.get() > 0);
        let sites: Vec<String> = sites.map(|(site, counter)| format!("{site:02}: {}", counter.get())).collect();
        match sites.is_empty() {
            true => "0".to_owned(),
            false => format!("{} ({})", self.n_eio(), sites.join(", ")),
        }
    }
}

/// What happened so far in a line for people, as for `STATUS=` of systemd.
pub fn summary(report: &Report) -> String {
    const MIB: f64 = (1 << 20) as f64;
    let mib = |counter: &Counter| counter.get() as f64 / MIB;
    let percent = match hit_rate(&report.n_memory_hits, &report.n_memory_misses) {
        Some(rate) => format!("{:.0} % of chunks from memory", 100.0 * rate),
        None => "nothing read yet".to_owned(),
    };
    format!(
        "{:.1} MiB read, {:.1} MiB fetched, {percent}, {} requests waiting, EIO {}",
        mib(&report.read_bytes),
        mib(&report.fetched_bytes),
        report.requests_in_flight.get(),
        report.n_eio()
    )
}

/// The share of hits among hits and misses, 0 to 1; `None` when there was neither.
pub fn hit_rate(hits: &Counter, misses: &Counter) -> Option<f64> {
    let (hits, misses) = (hits.get(), misses.get());
    let n = hits + misses;
    (n > 0).then(|| hits as f64 / n as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_is_one_line() {
        let report = Report::default();
        assert_eq!(summary(&report), "0.0 MiB read, 0.0 MiB fetched, nothing read yet, 0 requests waiting, EIO 0");
        report.read_bytes.add(3 << 20);
        report.n_memory_hits.add(3);
        report.n_memory_misses.add(1);
        report.eio[3].add(1);
        let wanted = "3.0 MiB read, 0.0 MiB fetched, 75 % of chunks from memory, 0 requests waiting, EIO 1";
        assert_eq!(summary(&report), wanted);
    }

    #[test]
    fn requests_are_counted_by_name() {
        let report = Report::default();
        for op in ["read", "read", "bmap"] {
            report.count_op(op);
        }
        let counted: Vec<u64> = report.ops.iter().map(Counter::get).collect();
        assert_eq!(counted, [0, 0, 0, 2, 0, 0, 0, 0, 0, 1]);
    }

    #[test]
    fn eio_is_told_by_site() {
        let report = Report::default();
        assert_eq!(report.eio_text(), "0");
        report.eio[1].add(2);
        report.eio[12].add(1);
        assert_eq!(report.eio_text(), "3 (01: 2, 12: 1)");
    }
}
