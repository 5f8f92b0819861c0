//! The numbers of a mount for Prometheus. Names and labels stay; others may be added.

use super::Served;
use super::gather::{eio_name, rss_bytes, store_figures};
use super::tiers::{backing, inflight_use, memory_use, reply_use, tree_use};
use crate::cache::budget::BudgetUse;
use crate::report::prometheus::{counter, family, gauge, histogram, line, sample};
use crate::report::{Counter, OPS};
use crate::store::figures::StoreFigures;

/// One number of many.
type Column<T> = fn(&T) -> u64;

/// All of it as text. Neither a store nor a disk is asked.
pub fn render(served: &Served) -> String {
    let mut text = String::new();
    let report = &*served.live.report;
    let parts = served.live.parts();
    family(&mut text, "caifs_info", "gauge", "What is mounted; always 1.");
    let source = served.source.to_string_lossy();
    let mountpoint = served.mountpoint.to_string_lossy();
    let labels = [("version", env!("CARGO_PKG_VERSION")), ("source", &*source), ("mountpoint", &*mountpoint)];
    sample(&mut text, "caifs_info", &labels, 1);
    let plain = |text: &mut String, name: &str, help: &str, value: f64| {
        family(text, name, "gauge", help);
        line(text, name, value);
    };
    plain(&mut text, "caifs_uptime_seconds", "Since the mount was opened.", served.live.opened.elapsed().as_secs_f64());
    plain(&mut text, "caifs_resident_bytes", "Resident memory of the process.", rss_bytes() as f64);
    plain(&mut text, "caifs_indexes_open", "Indexes and archives that are open.", parts.len() as f64);

    let counters: [(&str, &str, &Counter); 28] = [
        ("caifs_read_bytes_total", "Bytes given to readers.", &report.read_bytes),
        ("caifs_fetched_bytes_total", "Bytes from stores, in stored form.", &report.fetched_bytes),
        ("caifs_fetches_total", "Chunks asked of stores.", &report.n_fetches),
        ("caifs_chunks_missing_total", "Chunks that no store had.", &report.n_missing),
        ("caifs_chunks_bad_total", "Fetched chunks with wrong bytes.", &report.n_bad_chunks),
        ("caifs_fetch_errors_total", "Fetches that ended in an error.", &report.n_store_errors),
        ("caifs_memory_hits_total", "Chunks found in memory.", &report.n_memory_hits),
        ("caifs_memory_misses_total", "Chunks that were waited for.", &report.n_memory_misses),
        ("caifs_memory_evicted_total", "Chunks dropped from memory.", &report.n_evicted),
        ("caifs_disk_hits_total", "Chunks found on disk.", &report.n_disk_hits),
        ("caifs_disk_misses_total", "Chunks looked for on disk in vain.", &report.n_disk_misses),
        ("caifs_disk_kept_total", "Chunks written to disk.", &report.n_disk_kept),
        ("caifs_disk_bad_total", "Damaged files on disk.", &report.n_disk_bad),
        ("caifs_disk_evicted_total", "Files removed from disk to make room.", &report.n_disk_evicted),
        ("caifs_disk_errors_total", "Operations on disk that failed.", &report.n_disk_errors),
        ("caifs_keeper_kept_total", "Chunks written to a store that is the cache.", &report.n_kept),
        ("caifs_keeper_errors_total", "Chunks that such a store did not take.", &report.n_keep_errors),
        ("caifs_backing_hits_total", "Reads that the backing file alone answered.", &report.n_backing_hits),
        ("caifs_backing_kept_total", "Chunks written to the backing file.", &report.n_backing_kept),
        ("caifs_backing_errors_total", "Operations of the backing file that failed.", &report.n_backing_errors),
        (
            "caifs_passthrough_opens_total",
            "Opens of files that the kernel reads itself from then on, uncounted.",
            &report.n_passthrough_opens,
        ),
        ("caifs_ahead_chunks_total", "Chunks read ahead of a reader.", &report.n_ahead),
        ("caifs_ahead_bytes_total", "Plain bytes read ahead of a reader.", &report.ahead_bytes),
        ("caifs_ahead_used_bytes_total", "Bytes ahead of a reader that he came to.", &report.ahead_used_bytes),
        ("caifs_warmed_chunks_total", "Chunks warmed, or replayed from a profile.", &report.n_warmed),
        ("caifs_warmed_bytes_total", "Plain bytes warmed, or replayed from a profile.", &report.warmed_bytes),
        ("caifs_panics_total", "Panics caught.", &report.n_panics),
        ("caifs_trace_dropped_total", "Lines of the access trace that were lost.", &report.n_trace_dropped),
    ];
    for (name, help, number) in counters {
        counter(&mut text, name, help, number);
    }
    family(&mut text, "caifs_eio_total", "counter", "Requests answered with EIO, by what was wrong.");
    let known =
        report.eio.iter().enumerate().filter(|(site, number)| eio_name(*site).ends_with("other") <= (number.get() > 0));
    for (site, number) in known {
        sample(&mut text, "caifs_eio_total", &[("site", &eio_name(site))], number.get());
    }
    family(&mut text, "caifs_requests_total", "counter", "Requests of the kernel answered.");
    for (op, number) in OPS.iter().zip(&report.ops) {
        sample(&mut text, "caifs_requests_total", &[("op", op)], number.get());
    }
    for (name, help, number) in [
        ("caifs_requests_in_flight", "Requests that wait for something else than memory.", &report.requests_in_flight),
        ("caifs_waiting_for_chunks", "Reads that wait for chunks.", &report.waiting_for_chunks),
        ("caifs_waiting_for_turn", "Requests to stores that wait for their turn.", &report.waiting_for_turn),
        ("caifs_ahead_readers", "Readers that are read ahead of.", &report.ahead_windows),
        ("caifs_ahead_now_bytes", "Bytes ahead of all readers.", &report.ahead_now_bytes),
        ("caifs_background_chunks", "Chunks being fetched without anyone waiting.", &report.background_chunks),
    ] {
        gauge(&mut text, name, help, number);
    }
    if let (Some(_), present) = backing(&parts) {
        plain(&mut text, "caifs_backing_files", "Backing files in use.", present.n_files as f64);
        plain(&mut text, "caifs_backing_files_complete", "Of those, complete.", present.n_complete as f64);
        plain(&mut text, "caifs_backing_chunks", "Chunks of the images with backing files.", present.n_chunks as f64);
        plain(&mut text, "caifs_backing_chunks_present", "Of those, in the files.", present.n_present as f64);
    }
    let budgets = [
        ("memory tier", memory_use(&parts)),
        ("in flight", inflight_use(&parts)),
        ("replies", reply_use(&parts)),
        ("tree", tree_use(&parts)),
    ];
    let columns: [(&str, &str, Column<BudgetUse>); 3] = [
        ("caifs_budget_used_bytes", "Bytes of the memory budget in use.", |share| share.used_bytes),
        ("caifs_budget_limit_bytes", "Bytes of the memory budget.", |share| share.limit_bytes),
        ("caifs_budget_waiting", "Who waits for a share of the memory budget.", |share| share.n_waiting as u64),
    ];
    for (name, help, value) in columns {
        family(&mut text, name, "gauge", help);
        for (share, use_of_it) in &budgets {
            sample(&mut text, name, &[("share", share)], value(use_of_it));
        }
    }
    let name = "caifs_read_duration_seconds";
    family(&mut text, name, "histogram", "From a read's arrival to its answer.");
    histogram(&mut text, name, &[], &report.read_latency.snapshot());
    stores(&mut text, &merged(store_figures(&parts)));
    text
}

/// One entry a name: parts can be read from the same store by connections of their own.
fn merged(all: Vec<StoreFigures>) -> Vec<StoreFigures> {
    let mut merged: Vec<StoreFigures> = Vec::new();
    for one in all {
        let Some(sum) = merged.iter_mut().find(|sum| sum.name == one.name) else {
            merged.push(one);
            continue;
        };
        sum.n_requests += one.n_requests;
        sum.n_found += one.n_found;
        sum.n_missing += one.n_missing;
        sum.n_failed += one.n_failed;
        sum.n_dropped += one.n_dropped;
        sum.found_bytes += one.found_bytes;
        sum.n_in_flight += one.n_in_flight;
        // Whoever heard of it last knows how it is.
        if one.last_heard.is_some_and(|one| sum.last_heard.is_none_or(|sum| one < sum)) {
            (sum.n_errors_in_row, sum.last_heard) = (one.n_errors_in_row, one.last_heard);
        }
        sum.latency.total += one.latency.total;
        for (count, more) in sum.latency.counts.iter_mut().zip(&one.latency.counts) {
            *count += more;
        }
        if let (Some(sum), Some(one)) = (&mut sum.health, &one.health) {
            sum.is_healthy &= one.is_healthy;
            sum.n_hedges += one.n_hedges;
        }
    }
    merged
}

fn stores(text: &mut String, stores: &[StoreFigures]) {
    let name = "caifs_store_requests_total";
    family(text, name, "counter", "Requests to a store that ended, by how they did.");
    for store in stores {
        for (outcome, n) in [
            ("found", store.n_found),
            ("missing", store.n_missing),
            ("failed", store.n_failed),
            ("dropped", store.n_dropped),
        ] {
            sample(text, name, &[("store", &store.name), ("outcome", outcome)], n);
        }
    }
    let columns: [(&str, &str, &str, Column<StoreFigures>); 4] = [
        ("caifs_store_found_bytes_total", "counter", "Bytes a store gave, in stored form.", |store| store.found_bytes),
        (
            "caifs_store_hedges_total",
            "counter",
            "How often another store was asked beside one that was late.",
            |store| store.health.as_ref().map_or(0, |health| health.n_hedges),
        ),
        ("caifs_store_requests_in_flight", "gauge", "Requests to a store under way.", |store| store.n_in_flight),
        (
            "caifs_store_healthy",
            "gauge",
            "1 for a store that answers and is asked in its turn, 0 for one that is set aside or fails again and again.",
            |store| u64::from(store.is_healthy()),
        ),
    ];
    for (name, kind, help, value) in columns {
        family(text, name, kind, help);
        for store in stores {
            sample(text, name, &[("store", &store.name)], value(store));
        }
    }
    let name = "caifs_store_request_duration_seconds";
    family(text, name, "histogram", "How long requests to a store took that found something.");
    for store in stores {
        histogram(text, name, &[("store", &store.name)], &store.latency);
    }
}
