//! Other stores, credentials and limits for a volume that is served, without anybody who reads noticing.
//!
//! First everything that can fail is done ([`Live::prepare`]): the new stores are opened. Then all of it is put in force at once
//! ([`Prepared::commit`]), which cannot fail. What is being fetched ends with the store and the time it began with.

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
    /// Opens what other settings need. Nothing changes yet. Parts that are opened meanwhile are not looked at: they are opened as
    /// [`Live::config`] says.
    ///
    /// # Errors
    /// A store cannot be opened, or a secret not be read.
    pub fn prepare(&self, config: MountConfig) -> Result<Prepared, OpenError> {
        let plan = MemoryPlan::of_mount(&self.location, &config);
        let is_divided = self.location.is_directory() && !matches!(self.location, FileLocation::Local(_));
        let mut parts = Vec::new();
        for part in self.parts() {
            let tiers = match &part.blob {
                Blob::Chunked(blob) => {
                    Tiers { disk: blob.cache().disk().cloned(), keeper: blob.cache().keeper().cloned() }
                }
                Blob::Remote(blocks) => Tiers { disk: blocks.disk().cloned(), keeper: None },
                Blob::File(_) => Tiers::default(),
            };
            let timeout = fetch_timeout(config.io_timeout);
            let mut sources = Sources::with_tiers(&config.sources, &plan, timeout, tiers, &self.report);
            if is_divided {
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
            parts.push(Step { cache_config, part, source });
        }
        Ok(Prepared { config, plan, parts })
    }
}

impl Prepared {
    /// Puts the settings in force. May remove much from memory, so it is for a thread that nobody waits for.
    pub fn commit(self, live: &Live) {
        let quota_bytes = self.config.sources.cache_size_bytes;
        let keep_free_bytes = self.config.sources.cache_keep_free_bytes.unwrap_or(DEFAULT_KEEP_FREE_BYTES);
        for Step { part, cache_config, source } in self.parts {
            let disk = match (&part.blob, source) {
                (Blob::Chunked(blob), NewSource::Stores(store, kept)) => {
                    let cache = blob.cache();
                    cache.replace_store(store);
                    if let (Some(keeper), Some(kept)) = (cache.keeper(), kept) {
                        keeper.replace_store(kept);
                    }
                    cache.configure(cache_config);
                    if let Some(ahead) = cache.ahead() {
                        ahead.set(self.plan.ahead_bytes, self.plan.window_bytes);
                    }
                    blob.set_reply_bytes(self.plan.reply_bytes);
                    cache.disk()
                }
                (Blob::Remote(blocks), NewSource::Files(files)) => {
                    blocks.configure(cache_config, files);
                    blocks.disk()
                }
                _ => None,
            };
            if let Some(disk) = disk {
                disk.set_limits(quota_bytes, keep_free_bytes);
            }
            if let Some(tree) = &part.tree {
                tree.configure(self.plan.tree);
            }
        }
        live.set_config(self.config);
    }
}
