//! What keeps chunks, how full it is and how often it had what was asked; and who has which share of the memory.

use std::path::PathBuf;

use super::gather::store_figures;
use super::protocol::{BackingStatus, BudgetStatus, TierStatus};
use super::survey::Look;
use crate::blob::Blob;
use crate::cache::budget::BudgetUse;
use crate::report::{Report, hit_rate};
use crate::volume::Part;

/// What keeps chunks, fastest first.
pub(super) fn tiers(parts: &[Part], report: &Report, look: Option<&Look>) -> Vec<TierStatus> {
    let memory = memory_use(parts);
    let mut tiers = vec![TierStatus {
        name: "memory".to_owned(),
        n_hits: report.n_memory_hits.get(),
        n_misses: report.n_memory_misses.get(),
        hit_rate: hit_rate(&report.n_memory_hits, &report.n_memory_misses),
        used_bytes: Some(memory.used_bytes),
        limit_bytes: Some(memory.limit_bytes),
        n_evicted: report.n_evicted.get(),
        ..TierStatus::default()
    }];
    tiers.extend(backing_tier(parts, report));
    let disk = parts.iter().find_map(|part| match &part.blob {
        Blob::Chunked(blob) => blob.cache().disk(),
        Blob::Remote(blocks) => blocks.disk(),
        Blob::File(_) => None,
    });
    if let Some(disk) = disk {
        let (quota_bytes, _) = disk.limits_bytes();
        tiers.push(TierStatus {
            name: "disk".to_owned(),
            place: Some(disk.path().display().to_string()),
            n_hits: report.n_disk_hits.get(),
            n_misses: report.n_disk_misses.get(),
            hit_rate: hit_rate(&report.n_disk_hits, &report.n_disk_misses),
            used_bytes: look.and_then(|look| look.disk_bytes),
            limit_bytes: (quota_bytes > 0).then_some(quota_bytes),
            n_kept: report.n_disk_kept.get(),
            n_evicted: report.n_disk_evicted.get(),
            n_bad: report.n_disk_bad.get(),
            n_errors: report.n_disk_errors.get(),
            ..TierStatus::default()
        });
    }
    let keeper = parts.iter().find_map(|part| match &part.blob {
        Blob::Chunked(blob) => blob.cache().keeper(),
        Blob::Remote(_) | Blob::File(_) => None,
    });
    if let Some(keeper) = keeper {
        let name = keeper.store().name().to_owned();
        // What it gave is known of it as of every store: it is the first that is asked.
        let found = store_figures(parts).into_iter().find(|figures| figures.name == name);
        let (n_hits, n_misses) = found.map_or((0, 0), |figures| (figures.n_found, figures.n_missing));
        let n = n_hits + n_misses;
        tiers.push(TierStatus {
            name: "keeper".to_owned(),
            place: Some(name),
            n_hits,
            n_misses,
            hit_rate: (n > 0).then(|| n_hits as f64 / n as f64),
            n_kept: report.n_kept.get(),
            n_errors: report.n_keep_errors.get(),
            ..TierStatus::default()
        });
    }
    tiers
}

/// The backing files of all parts together; `None` where there is none.
fn backing_tier(parts: &[Part], report: &Report) -> Option<TierStatus> {
    let (first, present) = backing(parts);
    Some(TierStatus {
        name: "backing".to_owned(),
        place: Some(first?.display().to_string()),
        n_hits: report.n_backing_hits.get(),
        present: Some(present),
        n_kept: report.n_backing_kept.get(),
        n_errors: report.n_backing_errors.get(),
        ..TierStatus::default()
    })
}

/// How much of the images of all parts is in backing files, and the first of those.
pub fn backing(parts: &[Part]) -> (Option<PathBuf>, BackingStatus) {
    let mut first = None;
    let mut sum = BackingStatus::default();
    for part in parts {
        let Blob::Chunked(blob) = &part.blob else { continue };
        let Some(presence) = blob.presence() else { continue };
        sum.n_files += 1;
        sum.n_complete += u64::from(presence.is_complete);
        sum.n_chunks += presence.n_chunks;
        sum.n_present += presence.n_present;
        first = first.or(Some(presence.path));
    }
    (first, sum)
}

/// Memory of the chunks (and blocks) of all parts; caches that parts share count once.
pub fn memory_use(parts: &[Part]) -> BudgetUse {
    sum(each_cache(parts).map(|blob| match blob {
        Blob::Chunked(blob) => BudgetUse {
            used_bytes: blob.cache().memory_weight_bytes(),
            limit_bytes: blob.cache().memory_capacity_bytes(),
            n_waiting: 0,
        },
        Blob::Remote(blocks) => blocks.memory_use(),
        Blob::File(_) => BudgetUse::default(),
    }))
}

/// Bytes being fetched for all parts.
pub fn inflight_use(parts: &[Part]) -> BudgetUse {
    sum(each_cache(parts).map(|blob| match blob {
        Blob::Chunked(blob) => blob.cache().inflight_use(),
        Blob::Remote(blocks) => blocks.inflight_use(),
        Blob::File(_) => BudgetUse::default(),
    }))
}

/// Bytes of replies being put together for all parts.
pub fn reply_use(parts: &[Part]) -> BudgetUse {
    sum(parts.iter().map(|part| match &part.blob {
        Blob::Chunked(blob) => blob.reply_use(),
        Blob::Remote(_) | Blob::File(_) => BudgetUse::default(),
    }))
}

/// Bytes of what was parsed of all parts.
pub fn tree_use(parts: &[Part]) -> BudgetUse {
    sum(parts.iter().filter_map(|part| part.tree.as_ref()).map(|tree| {
        let (used, limit) = tree.weight_bytes();
        BudgetUse { used_bytes: used as u64, limit_bytes: limit as u64, n_waiting: 0 }
    }))
}

/// One blob of each cache.
pub(super) fn each_cache(parts: &[Part]) -> impl Iterator<Item = &Blob> {
    let mut seen = Vec::new();
    parts.iter().map(|part| &part.blob).filter(move |blob| match blob {
        Blob::Chunked(blob) => {
            let is_new = !seen.contains(&blob.cache().identity());
            if is_new {
                seen.push(blob.cache().identity());
            }
            is_new
        }
        Blob::Remote(_) | Blob::File(_) => true,
    })
}

fn sum(uses: impl Iterator<Item = BudgetUse>) -> BudgetUse {
    uses.fold(BudgetUse::default(), |sum, one| BudgetUse {
        used_bytes: sum.used_bytes + one.used_bytes,
        limit_bytes: sum.limit_bytes.saturating_add(one.limit_bytes),
        n_waiting: sum.n_waiting + one.n_waiting,
    })
}

/// Who has which share of the memory.
pub(super) fn budget(parts: &[Part]) -> Vec<BudgetStatus> {
    let named = [
        ("memory tier", memory_use(parts)),
        ("in flight", inflight_use(parts)),
        ("replies", reply_use(parts)),
        ("tree", tree_use(parts)),
    ];
    let status = |(name, share): (&str, BudgetUse)| BudgetStatus {
        name: name.to_owned(),
        used_bytes: share.used_bytes,
        limit_bytes: share.limit_bytes,
        n_waiting: share.n_waiting as u64,
    };
    named.into_iter().map(status).collect()
}
