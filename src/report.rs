//! What happened: counters that every layer adds to and that tests and status read.

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
}

impl Report {
    /// Room for the numbered places that answer EIO.
    pub const N_EIO_SITES: usize = 16;

    /// All requests answered with EIO.
    pub fn n_eio(&self) -> u64 {
        self.eio.iter().map(Counter::get).sum()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eio_is_told_by_site() {
        let report = Report::default();
        assert_eq!(report.eio_text(), "0");
        report.eio[1].add(2);
        report.eio[12].add(1);
        assert_eq!(report.eio_text(), "3 (01: 2, 12: 1)");
    }
}
