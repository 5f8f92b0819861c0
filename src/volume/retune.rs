//! Other stores, credentials and limits for a volume that is served, without anybody who reads noticing.
//!
//! First everything that can fail is done ([`Live::prepare`]): the new stores are opened. Then all of it is put in force at once
//! ([`Prepared::commit`]), which cannot fail. A part that was opened between the two follows ([`Live::retune`]). What is being fetched ends with the store and the time it began with.

use std::sync::Arc;

use super::open::{MemoryPlan, OpenError, fetch_timeout};
use super::sources::{DEFAULT_KEEP_FREE_BYTES, Sources};
use super::{Live, Part};
use crate::blob::Blob;
use crate::cache::{CacheConfig, Tiers};
use crate::config::MountConfig;
use crate::store::location::FileLocation;
use crate::store::{FileStore, Store, WriteStore};

/// New settings and everything opened that they need.
#[derive(Debug)]
pub struct Prepared {
    config: MountConfig,
    plan: MemoryPlan,
    parts: Vec<Step>,
}

/// What becomes of one part.
#[derive(Debug)]
struct Step {
    part: Part,
    cache_config: CacheConfig,
    source: NewSource,
}

/// Where the bytes of a part come from next.
#[derive(Debug)]
enum NewSource {
    /// A local file stays as it is.
    Unchanged,
    /// Chunks: the stores, and the place that keeps them if that is a store.
    Stores(Arc<dyn Store>, Option<Arc<dyn WriteStore>>),
    /// A plain file of a store.
    Files(Option<Arc<dyn FileStore>>),
}

impl Live {
    /// Opens what other settings need. Nothing changes yet. Parts that are opened meanwhile are looked at when the settings are put in
    /// force.
    ///
    /// # Errors
    /// A store cannot be opened, or a secret not be read.
    pub fn prepare(&self, config: MountConfig) -> Result<Prepared, OpenError> {
        let plan = MemoryPlan::of_mount(&self.location, &config);
        let parts = self.parts().into_iter().map(|part| self.step(part, &config, &plan));
        let parts = parts.collect::<Result<_, _>>()?;
        Ok(Prepared { config, plan, parts })
    }

    /// Gives a part the settings in force, which it may have been opened before. If that fails it keeps those that it has.
    pub fn retune(&self, part: &Part) {
        let config = self.config();
        let plan = MemoryPlan::of_mount(&self.location, &config);
        match self.step(part.clone(), &config, &plan) {
            Ok(step) => step.apply(&config, &plan),
            Err(error) => {
                tracing::warn!("{}: opened with the settings before, and keeps them: {error}", part.location);
            }
        }
    }

    /// What becomes of a part.
    fn step(&self, part: Part, config: &MountConfig, plan: &MemoryPlan) -> Result<Step, OpenError> {
        let tiers = match &part.blob {
            Blob::Chunked(blob) => Tiers { disk: blob.cache().disk().cloned(), keeper: blob.cache().keeper().cloned() },
            Blob::Remote(blocks) => Tiers { disk: blocks.disk().cloned(), keeper: None },
            Blob::File(_) => Tiers::default(),
        };
        let timeout = fetch_timeout(config.io_timeout);
        let mut sources = Sources::with_tiers(&config.sources, plan, timeout, tiers, &self.report);
        if self.location.is_directory() && !matches!(self.location, FileLocation::Local(_)) {
            sources.divide();
        }
        sources.check_stores()?;
        let source = match &part.blob {
            Blob::Chunked(_) => {
                let kept = sources.kept_again()?;
                NewSource::Stores(sources.store(&part.location, kept.clone())?, kept)
            }
            Blob::Remote(_) => NewSource::Files(sources.files_again(&part.location)?),
            Blob::File(_) => NewSource::Unchanged,
        };
        let cache_config = match &part.blob {
            Blob::Remote(_) => sources.block_config(),
            Blob::Chunked(_) | Blob::File(_) => sources.cache_config(),
        };
        Ok(Step { cache_config, part, source })
    }
}

impl Prepared {
    /// Puts the settings in force. May remove much from memory, so it is for a thread that nobody waits for.
    pub fn commit(self, live: &Live) {
        let Self { config, plan, parts } = self;
        let openings: Vec<Arc<()>> = parts.iter().map(|step| Arc::clone(&step.part.opening)).collect();
        parts.into_iter().for_each(|step| step.apply(&config, &plan));
        live.set_config(config);
        // Those that were opened since the others were looked at. Whoever opens one from now on sees the new settings.
        for part in live.parts() {
            if !openings.iter().any(|opening| Arc::ptr_eq(opening, &part.opening)) {
                live.retune(&part);
            }
        }
    }
}

impl Step {
    fn apply(self, config: &MountConfig, plan: &MemoryPlan) {
        let Self { part, cache_config, source } = self;
        let disk = match (&part.blob, source) {
            (Blob::Chunked(blob), NewSource::Stores(store, kept)) => {
                let cache = blob.cache();
                cache.replace_store(store);
                if let (Some(keeper), Some(kept)) = (cache.keeper(), kept) {
                    keeper.replace_store(kept);
                }
                cache.configure(cache_config);
                if let Some(ahead) = cache.ahead() {
                    ahead.set(plan.ahead_bytes, plan.window_bytes);
                }
                blob.set_reply_bytes(plan.reply_bytes);
                cache.disk()
            }
            (Blob::Remote(blocks), NewSource::Files(files)) => {
                blocks.configure(cache_config, files);
                if let Some(ahead) = blocks.ahead() {
                    ahead.budget().set(plan.ahead_bytes, plan.window_bytes);
                }
                blocks.disk()
            }
            _ => None,
        };
        if let Some(disk) = disk {
            let keep_free_bytes = config.sources.cache_keep_free_bytes.unwrap_or(DEFAULT_KEEP_FREE_BYTES);
            disk.set_limits(config.sources.cache_size_bytes, keep_free_bytes);
        }
        if let Some(tree) = &part.tree {
            tree.configure(plan.tree);
        }
    }
}
