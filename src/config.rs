//! Resolved settings: what was meant, after everything that was typed has been read. Knows neither clap nor the environment.

use std::sync::Arc;
use std::time::Duration;

use crate::store::location::{Location, LocationError, split_group};
use crate::store::open::StoreSpec;
use crate::store::options::StoreOptions;

/// The memory budget when none is given, in bytes.
pub const DEFAULT_MEMORY_BYTES: u64 = 256 << 20;

/// The smallest memory budget a mount works with, in bytes: a few of the largest usual chunks and replies.
pub const MIN_MEMORY_BYTES: u64 = 16 << 20;

/// How long a read may take before it is answered with EIO, when nothing else is said.
pub const DEFAULT_IO_TIMEOUT: Duration = Duration::from_secs(30);

/// Options of stores, found by their locations.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StoreSettings {
    /// What holds for every store.
    pub base: StoreOptions,
}

impl StoreSettings {
    /// The members of a group of mirrors (one, if it is no group), each with its options.
    ///
    /// # Errors
    /// A location cannot be read, or its options contradict each other.
    pub fn resolve(&self, text: &str) -> Result<Vec<StoreSpec>, LocationError> {
        let members = if text.contains('|') { split_group(text).collect() } else { vec![text] };
        members
            .into_iter()
            .map(|member| Ok(StoreSpec { location: Location::parse(member)?, options: self.base.clone() }))
            .collect()
    }
}

/// Where content comes from, and what is kept of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SourceConfig {
    /// Store locations in the order they are asked; empty for the casync rule (`default.castr` beside the index).
    pub stores: Vec<String>,
    /// A local directory or a store that keeps what was fetched.
    pub cache: Option<String>,
    /// The most a local cache may hold, in bytes; `None` for a share of the free disk.
    pub cache_size_bytes: Option<u64>,
    /// What a local cache leaves free on its filesystem, in bytes.
    pub cache_keep_free_bytes: Option<u64>,
    /// Use what is kept, and ask no store.
    pub offline: bool,
    /// Options of each store.
    pub settings: Arc<StoreSettings>,
}

/// How a mount behaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountConfig {
    /// Where content comes from.
    pub sources: SourceConfig,
    /// One budget for the memory tier, read-ahead and buffers, in bytes.
    pub memory_bytes: u64,
    /// Every request of the kernel is answered by then.
    pub io_timeout: Duration,
    /// Owner shown for everything, instead of the stored one.
    pub uid: Option<u32>,
    /// Group shown for everything, instead of the stored one.
    pub gid: Option<u32>,
    /// Whether other users may use the mount; `None` means: yes when mounted by root.
    pub allow_other: Option<bool>,
}

impl Default for MountConfig {
    fn default() -> Self {
        Self {
            sources: SourceConfig::default(),
            memory_bytes: DEFAULT_MEMORY_BYTES,
            io_timeout: DEFAULT_IO_TIMEOUT,
            uid: None,
            gid: None,
            allow_other: None,
        }
    }
}
