//! Everything there is to see of a mount, gathered without waiting for a store, a disk or the mount itself.

use std::time::Duration;

use super::protocol::{
    Cell, EarlyStatus, FetchStatus, FetchesStatus, MAX_CELLS, MAX_LISTED, Map, PartStatus, PresentStatus,
    RequestStatus, RequestsStatus, SettingStatus, Status, StoreStatus, Totals,
};
use super::survey::{Look, PartLook, Sample};
use super::tiers::{budget, each_cache, tiers};
use super::{Served, paths};
use crate::blob::Blob;
use crate::mount::settings::{SHOWN, of_store};
use crate::mount::table::MountTable;
use crate::report::{Counter, OPS, Report};
use crate::store::figures::StoreFigures;
use crate::store::location::split_group;
use crate::volume::open::SpecKind;
use crate::volume::{EioSite, Part};

/// How long status and map wait for a look at what is present.
const PATIENCE: Duration = Duration::from_millis(500);

/// Everything there is to see.
pub fn status(served: &Served) -> Status {
    let live = &served.live;
    let (parts, report) = (live.parts(), &*live.report);
    let look = served.survey.look(PATIENCE);
    Status {
        program: env!("CARGO_PKG_VERSION").to_owned(),
        source: served.source.to_string_lossy().into_owned(),
        mountpoint: mountpoint(served),
        device: served.device.map_or_else(String::new, |(major, minor)| format!("{major}:{minor}")),
        kind: kind(&parts).to_owned(),
        pid: std::process::id(),
        uid: nix::unistd::geteuid().as_raw(),
        uptime_seconds: live.opened.elapsed().as_secs_f64(),
        rss_bytes: rss_bytes(),
        n_parts: parts.len(),
        parts: parts.iter().take(MAX_LISTED).map(part_status).collect(),
        stores: stores(served, &parts),
        tiers: tiers(&parts, report, look.as_deref()),
        early: early(report),
        budget: budget(&parts),
        requests: requests(served, report),
        fetches: fetches(&parts),
        present: look.and_then(|look| present(&look, &parts)),
        totals: totals(report),
        settings: settings(served),
    }
}

/// Where it is mounted by now; where it was when it is out of sight.
fn mountpoint(served: &Served) -> String {
    let now = served.device.and_then(|device| {
        let table = MountTable::read().ok()?;
        paths::mounts_of(&table, device).next().map(|entry| entry.mountpoint.clone())
    });
    now.unwrap_or_else(|| served.mountpoint.clone()).to_string_lossy().into_owned()
}

fn kind(parts: &[Part]) -> &'static str {
    match parts {
        [Part { path, kind: SpecKind::BlobIndex, .. }] if path.is_empty() => "image",
        [Part { path, .. }] if path.is_empty() => "tree",
        _ => "directory",
    }
}

fn part_status(part: &Part) -> PartStatus {
    let kind = match part.kind {
        SpecKind::BlobIndex => "blob index",
        SpecKind::ArchiveIndex => "archive index",
        SpecKind::Archive => "archive",
    };
    PartStatus {
        path: String::from_utf8_lossy(&part.path).into_owned(),
        location: part.location.to_string(),
        kind: kind.to_owned(),
        size_bytes: part.blob.size(),
        n_chunks: part.blob.n_pieces(),
    }
}

/// What requests to each store came to; parts that share a store show it once.
pub fn store_figures(parts: &[Part]) -> Vec<StoreFigures> {
    let mut all: Vec<StoreFigures> = Vec::new();
    let mut seen = Vec::new();
    for part in parts {
        let figures = match &part.blob {
            Blob::Chunked(blob) => {
                let store = blob.cache().store();
                let place = std::sync::Arc::as_ptr(&store).cast::<()>() as usize;
                if seen.contains(&place) {
                    continue;
                }
                seen.push(place);
                store.figures()
            }
            Blob::Remote(blocks) => blocks.figures(),
            Blob::File(_) => Vec::new(),
        };
        all.extend(figures);
        if all.len() >= MAX_LISTED {
            all.truncate(MAX_LISTED);
            break;
        }
    }
    all
}

fn stores(served: &Served, parts: &[Part]) -> Vec<StoreStatus> {
    let config = served.live.config();
    // A store is found by its name, which is its location without secrets.
    let typed: Vec<&str> = config.sources.stores.iter().flat_map(|store| split_group(store)).collect();
    let settings_of = |name: &str| {
        let is_it = |typed: &&&str| {
            crate::store::location::without_secrets(typed).trim_end_matches('/') == name.trim_end_matches('/')
        };
        let text = typed.iter().find(is_it).map_or(name, |typed| typed);
        of_store(&config, text)
    };
    let status = |figures: StoreFigures| {
        let health = figures.health.as_ref();
        StoreStatus {
            settings: settings_of(&figures.name),
            is_healthy: figures.is_healthy(),
            n_errors_in_row: figures.n_errors_in_row,
            set_aside_seconds: health.and_then(|health| health.set_aside_for).map(|span| span.as_secs_f64()),
            n_hedges: health.map_or(0, |health| health.n_hedges),
            name: figures.name,
            mirror_of: figures.mirror_of,
            n_requests: figures.n_requests,
            n_found: figures.n_found,
            n_missing: figures.n_missing,
            n_failed: figures.n_failed,
            n_dropped: figures.n_dropped,
            found_bytes: figures.found_bytes,
            n_in_flight: figures.n_in_flight,
            p50_seconds: figures.p50.map(|span| span.as_secs_f64()),
            p95_seconds: figures.p95.map(|span| span.as_secs_f64()),
            last_error_age_seconds: figures.last_error.as_ref().map(|(age, _)| age.as_secs_f64()),
            last_error: figures.last_error.map(|(_, text)| text),
        }
    };
    store_figures(parts).into_iter().map(status).collect()
}

fn early(report: &Report) -> EarlyStatus {
    EarlyStatus {
        n_ahead: report.n_ahead.get(),
        ahead_bytes: report.ahead_bytes.get(),
        ahead_used_bytes: report.ahead_used_bytes.get(),
        n_ahead_readers: report.ahead_windows.get(),
        ahead_now_bytes: report.ahead_now_bytes.get(),
        n_warmed: report.n_warmed.get(),
        warmed_bytes: report.warmed_bytes.get(),
        n_in_flight: report.background_chunks.get(),
    }
}

fn requests(served: &Served, report: &Report) -> RequestsStatus {
    let status = |request: crate::fuse::requests::RequestInFlight| RequestStatus {
        op: request.op.to_owned(),
        ino: request.ino,
        offset: request.offset,
        n_bytes: request.n_bytes,
        age_seconds: request.age.as_secs_f64(),
    };
    RequestsStatus {
        n_in_flight: served.requests.n_in_flight() as u64,
        n_waiting_for_chunks: report.waiting_for_chunks.get(),
        n_waiting_for_turn: report.waiting_for_turn.get(),
        oldest: served.requests.oldest(MAX_LISTED).into_iter().map(status).collect(),
        answered: OPS.iter().zip(&report.ops).map(|(op, counter)| ((*op).to_owned(), counter.get())).collect(),
    }
}

fn fetches(parts: &[Part]) -> FetchesStatus {
    let mut n_in_flight = 0;
    let mut oldest = Vec::new();
    for blob in each_cache(parts) {
        match blob {
            Blob::Chunked(blob) => {
                n_in_flight += blob.cache().n_inflight();
                let fetches = blob.cache().in_flight(MAX_LISTED).into_iter();
                oldest.extend(fetches.map(|(id, age)| (id.to_hex(), age)));
            }
            Blob::Remote(blocks) => {
                n_in_flight += blocks.n_inflight();
                let fetches = blocks.in_flight(MAX_LISTED).into_iter();
                oldest.extend(fetches.map(|(number, age)| (format!("block {number}"), age)));
            }
            Blob::File(_) => {}
        }
    }
    oldest.sort_by_key(|(_, age)| std::cmp::Reverse(*age));
    oldest.truncate(MAX_LISTED);
    let status = |(chunk, age): (String, Duration)| FetchStatus { chunk, age_seconds: age.as_secs_f64() };
    FetchesStatus { n_in_flight: n_in_flight as u64, oldest: oldest.into_iter().map(status).collect() }
}

/// Shares by bytes of the samples; `None` when nothing has chunks.
pub fn present(look: &Look, parts: &[Part]) -> Option<PresentStatus> {
    let mut n_all = 0.0;
    let mut shares = [0.0f64; 3];
    for part_look in &look.parts {
        // One that is gone by now is not counted.
        let Some(part) = parts.iter().find(|part| part.path == part_look.path) else { continue };
        let sampled: u64 = part_look.samples.iter().map(|sample| sample.end - sample.start).sum();
        if sampled == 0 {
            continue;
        }
        // Samples stand for the bytes between them.
        let scale = part.blob.size() as f64 / sampled as f64;
        n_all += part.blob.size() as f64;
        for sample in &part_look.samples {
            let n_bytes = (sample.end - sample.start) as f64 * scale;
            let is_in = [sample.in_memory, sample.on_disk, sample.in_memory || sample.on_disk];
            for (share, is_in) in shares.iter_mut().zip(is_in) {
                *share += if is_in { n_bytes } else { 0.0 };
            }
        }
    }
    if n_all == 0.0 {
        return None;
    }
    let read: Option<f64> = match parts {
        [part] => part.blob.touched().map(crate::cache::touched::Touched::share),
        _ => None,
    };
    let [memory, disk, any] = shares.map(|share| (share / n_all).min(1.0));
    let is_estimate = look.parts.iter().any(|part| part.is_estimate);
    Some(PresentStatus { memory, disk, any, read, is_estimate, age_seconds: look.at.elapsed().as_secs_f64() })
}

fn totals(report: &Report) -> Totals {
    let sites = report.eio.iter().enumerate().filter(|(_, counter)| counter.get() > 0);
    Totals {
        read_bytes: report.read_bytes.get(),
        fetched_bytes: report.fetched_bytes.get(),
        n_fetches: report.n_fetches.get(),
        n_missing: report.n_missing.get(),
        n_bad_chunks: report.n_bad_chunks.get(),
        n_store_errors: report.n_store_errors.get(),
        n_passthrough_opens: report.n_passthrough_opens.get(),
        n_eio: report.n_eio(),
        eio: sites.map(|(site, counter)| (eio_name(site), Counter::get(counter))).collect(),
        n_panics: report.n_panics.get(),
        n_trace_dropped: report.n_trace_dropped.get(),
    }
}

/// What was wrong at a site, with the number that messages have.
pub fn eio_name(site: usize) -> String {
    format!("{site:02} {}", EioSite::name_of(site))
}

fn settings(served: &Served) -> Vec<SettingStatus> {
    let config = served.live.config();
    let status = |row: &crate::mount::settings::Shown| {
        row.value(&config).map(|value| SettingStatus { name: row.name.to_owned(), value, can_change: row.can_change })
    };
    SHOWN.iter().filter_map(status).collect()
}

/// Resident memory of this process; 0 when /proc does not tell.
pub fn rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib =
        status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.trim().parse().ok());
    kib.unwrap_or(0u64) * 1024
}

/// Which parts of an image or archive are present.
///
/// # Errors
/// There is no such part, in a line for people.
pub fn map(served: &Served, path: Option<&str>, n_cells: u32) -> Result<Map, String> {
    let parts = served.live.parts();
    let part = match (path, parts.as_slice()) {
        (None, [part]) => part,
        (None, []) => return Err("nothing is open yet".to_owned()),
        (None, several) => {
            let names: Vec<String> =
                several.iter().take(10).map(|part| String::from_utf8_lossy(&part.path).into_owned()).collect();
            return Err(format!("{} indexes are open; name one of them (--part): {}", several.len(), names.join(", ")));
        }
        (Some(path), parts) => {
            let wanted = path.trim_matches('/').as_bytes();
            parts.iter().find(|part| part.path == wanted).ok_or_else(|| format!("no index is open at {path}"))?
        }
    };
    let n_cells = n_cells.clamp(1, MAX_CELLS) as usize;
    let status = part_status(part);
    if status.n_chunks == 0 {
        let here = Cell { disk: 1.0, any: 1.0, ..Cell::default() };
        return Ok(Map { part: status, cells: vec![here; n_cells], is_estimate: false, knows_reads: false });
    }
    let look = served.survey.look(PATIENCE).ok_or("it is still being counted what is present (try again)")?;
    let seen = look.parts.iter().find(|seen| seen.path == part.path).ok_or("it is not looked at: too many are open")?;
    let knows_reads = part.blob.touched().is_some();
    Ok(Map { part: status, cells: cells(seen, part.blob.size(), n_cells), is_estimate: seen.is_estimate, knows_reads })
}

/// Samples as cells of even size.
fn cells(look: &PartLook, size: u64, n_cells: usize) -> Vec<Cell> {
    let mut cells = Vec::with_capacity(n_cells);
    let mut first = 0;
    for cell in 0..n_cells as u128 {
        let edge = |cell: u128| (u128::from(size) * cell / n_cells as u128) as u64;
        let (start, end) = (edge(cell), edge(cell + 1).max(edge(cell) + 1));
        while look.samples.get(first).is_some_and(|sample| sample.end <= start) {
            first += 1;
        }
        let inside: Vec<&Sample> =
            look.samples[first.min(look.samples.len())..].iter().take_while(|sample| sample.start < end).collect();
        // Between two samples the one before stands for what is there.
        let inside = match (inside.is_empty(), first.checked_sub(1).and_then(|before| look.samples.get(before))) {
            (true, Some(before)) => vec![before],
            _ => inside,
        };
        cells.push(cell_of(&inside, start, end));
    }
    cells
}

fn cell_of(samples: &[&Sample], start: u64, end: u64) -> Cell {
    let overlap = |sample: &Sample| (sample.end.min(end).saturating_sub(sample.start.max(start)) as f32).max(1.0);
    let share = |is_in: &dyn Fn(&Sample) -> bool| {
        let all: f32 = samples.iter().map(|sample| overlap(sample)).sum();
        let inside: f32 = samples.iter().filter(|sample| is_in(sample)).map(|sample| overlap(sample)).sum();
        // (A sum of nothing is minus zero.)
        if all > 0.0 && inside > 0.0 { inside / all } else { 0.0 }
    };
    Cell {
        memory: share(&|sample| sample.in_memory),
        disk: share(&|sample| sample.on_disk),
        any: share(&|sample| sample.in_memory || sample.on_disk),
        is_fetching: samples.iter().any(|sample| sample.is_fetching),
        was_read: samples.iter().any(|sample| sample.was_read),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(start: u64, end: u64, in_memory: bool, on_disk: bool) -> Sample {
        Sample { start, end, in_memory, on_disk, is_fetching: start == 10, was_read: on_disk }
    }

    #[test]
    fn cells_are_weighed_by_bytes() {
        let samples = vec![sample(0, 10, true, false), sample(10, 40, false, true), sample(40, 80, false, false)];
        let look = PartLook { path: Vec::new(), samples, is_estimate: false };
        let whole = cells(&look, 80, 1)[0];
        assert_eq!((whole.memory, whole.disk, whole.any), (0.125, 0.375, 0.5));
        assert!(whole.is_fetching && whole.was_read);
        let halves = cells(&look, 80, 2);
        assert_eq!((halves[0].memory, halves[0].disk, halves[0].any), (0.25, 0.75, 1.0));
        assert_eq!(halves[1], Cell::default());
        // More cells than bytes: each has what its byte has.
        let many = cells(&look, 80, 160);
        assert_eq!(many.len(), 160);
        assert!(many[..20].iter().all(|cell| cell.memory == 1.0) && many[20..80].iter().all(|cell| cell.disk == 1.0));
    }

    #[test]
    fn samples_stand_for_what_is_between_them() {
        let samples = vec![sample(0, 1, true, false), sample(50, 51, false, true)];
        let look = PartLook { path: Vec::new(), samples, is_estimate: true };
        let seen = cells(&look, 100, 4);
        assert_eq!(
            seen.iter().map(|cell| (cell.memory, cell.disk)).collect::<Vec<_>>(),
            [(1.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.0, 1.0)]
        );
    }

    #[test]
    fn this_process_has_memory() {
        assert!(rss_bytes() > 1 << 20);
    }
}
