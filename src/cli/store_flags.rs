//! Flags of every verb that reads chunks, and opening what such a verb reads.

use std::ffi::OsStr;
use std::sync::Arc;

use anyhow::Result;
use tokio::runtime::Runtime;

use crate::config::{DEFAULT_IO_TIMEOUT, DEFAULT_MEMORY_BYTES, SourceConfig};
use crate::report::Report;
use crate::store::location::FileLocation;
use crate::volume::open::{MemoryPlan, Opened, open_blob};

/// Flags of every verb that reads chunks.
#[derive(Debug, Clone, clap::Args)]
pub struct StoreFlags {
    /// Store of chunks (repeatable, asked in this order) [default: default.castr beside the index].
    #[arg(short, long = "store", value_name = "STORE")]
    pub stores: Vec<String>,
}

impl StoreFlags {
    /// Opens an index or archive, wherever it lies.
    pub fn open(&self, runtime: &Runtime, typed: &OsStr) -> Result<Opened> {
        let location = FileLocation::parse(typed)?;
        let report = Arc::new(Report::default());
        let sources = SourceConfig { stores: self.stores.clone(), ..SourceConfig::default() };
        Ok(runtime.block_on(open_blob(&location, &sources, &memory_plan(), DEFAULT_IO_TIMEOUT, &report))?)
    }
}

/// How verbs that read chunks share out their memory.
pub fn memory_plan() -> MemoryPlan {
    MemoryPlan::new(DEFAULT_MEMORY_BYTES)
}
