//! What can be seen of a file read in blocks, and how its settings change while it is read.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::{BLOCK_BYTES, Blocks};
use crate::cache::CacheConfig;
use crate::cache::budget::BudgetUse;
use crate::cache::disk::DiskTier;
use crate::cache::touched::Touched;
use crate::store::FileStore;
use crate::store::figures::StoreFigures;

impl Blocks {
    /// How many blocks it has.
    pub fn n_blocks(&self) -> u64 {
        self.size().div_ceil(BLOCK_BYTES)
    }

    /// Whether a block is in memory, and whether it is being fetched.
    pub fn is_at_hand(&self, number: u64) -> (bool, bool) {
        (self.shared.lock().contains(&(self.shared.file_id, number)), self.shared.inflight.has(&number))
    }

    /// Whether a block is kept on disk, as far as can be told without reading it. Blocks on the disk.
    pub fn is_on_disk(&self, number: u64) -> bool {
        let kept = self.shared.kept.as_ref();
        kept.is_some_and(|kept| kept.ids.get(number).is_some_and(|id| kept.disk.has(id)))
    }

    /// Which parts were read since it was opened.
    pub fn touched(&self) -> &Touched {
        &self.shared.touched
    }

    /// The directory that keeps blocks, if there is one.
    pub fn disk(&self) -> Option<&Arc<DiskTier>> {
        self.shared.kept.as_ref().map(|kept| &kept.disk)
    }

    /// Which blocks are being fetched and for how long, the oldest first, of those at the most so many.
    pub fn in_flight(&self, n: usize) -> Vec<(u64, Duration)> {
        self.shared.inflight.oldest(n).into_iter().map(|(number, since)| (number, since.elapsed())).collect()
    }

    /// Blocks being fetched now.
    pub fn n_inflight(&self) -> usize {
        self.shared.inflight.len()
    }

    /// The bytes of blocks being fetched, as a share of what they may have.
    pub fn inflight_use(&self) -> BudgetUse {
        self.shared.room.budget.usage()
    }

    /// Bytes of blocks in memory now, and the most there may be.
    pub fn memory_use(&self) -> BudgetUse {
        let memory = self.shared.lock();
        let bytes = |n: usize| n as u64 * BLOCK_BYTES;
        BudgetUse { used_bytes: bytes(memory.len()), limit_bytes: bytes(memory.cap().get()), n_waiting: 0 }
    }

    /// What requests to its store came to.
    pub fn figures(&self) -> Vec<StoreFigures> {
        self.shared.files().map(|files| self.shared.recorder.figures(files.name())).into_iter().collect()
    }

    /// Asks another store from now on (the same place, reached in another way), and behaves in another way.
    pub fn configure(&self, config: CacheConfig, files: Option<Arc<dyn FileStore>>) {
        *self.shared.files.write().unwrap_or_else(PoisonError::into_inner) = files;
        *self.shared.config.write().unwrap_or_else(PoisonError::into_inner) = config;
        self.shared.room.configure(&config);
    }

    /// How it behaves now.
    pub fn config(&self) -> CacheConfig {
        self.shared.config()
    }
}
