//! Flags of every verb that reads chunks, and opening what such a verb reads.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use tokio::runtime::Runtime;

use super::settings;
use crate::config::{DEFAULT_MEMORY_BYTES, MountConfig};
use crate::report::Report;
use crate::store::location::FileLocation;
use crate::volume::open::{MemoryPlan, Opened, open_blob};

/// A flag that was given: its long name, which is also that of the mount option, and its value.
pub type Given = (&'static str, Option<String>);

/// Flags of every verb that reads chunks. Letters and names are desync's where desync has the flag; but several stores are given by
/// several flags, not by commas, which may stand in a location.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Stores")]
pub struct StoreFlags {
    /// Store of chunks (repeatable, asked in this order) [default: default.castr beside the index].
    #[arg(short, long = "store", value_name = "STORE")]
    pub stores: Vec<String>,
    /// Keep fetched chunks in this directory (or store).
    #[arg(short, long, value_name = "CACHE")]
    pub cache: Option<String>,
    /// The most a local cache may hold [default: a share of the free disk].
    #[arg(long, value_name = "SIZE")]
    pub cache_size: Option<String>,
    /// What a local cache leaves free on its file system.
    #[arg(long, value_name = "SIZE")]
    pub cache_keep_free: Option<String>,
    /// Use what the cache has, and ask no store.
    #[arg(long)]
    pub offline: bool,
    /// A file with the stores and the cache: {"stores": ["…"], "cache": "…"}.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["stores", "cache"])]
    pub store_file: Option<String>,
    /// Answer every read by then, with an error if need be [default: 30s].
    #[arg(long, value_name = "TIME")]
    pub io_timeout: Option<String>,
    /// Sessions to one store at a time [default: 10].
    #[arg(short = 'n', long, value_name = "N")]
    pub concurrency: Option<String>,
    /// What an index must be.
    #[command(flatten)]
    pub trust: TrustFlags,
    /// How they are reached.
    #[command(flatten)]
    pub access: AccessFlags,
}

/// Flags of what an index must be, for every verb that reads one.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Stores")]
pub struct TrustFlags {
    /// Refuse an index with another SHA-256 than this.
    #[arg(long, value_name = "HEX")]
    pub index_sha256: Option<String>,
    /// Refuse an index that is not signed with this minisign key (or file of it); no for none.
    #[arg(long, value_name = "KEY")]
    pub verify_key: Option<String>,
}

impl TrustFlags {
    /// The flags that were given.
    pub fn given(&self) -> Vec<Given> {
        let flags = [("index-sha256", &self.index_sha256), ("verify-key", &self.verify_key)];
        flags.into_iter().filter_map(|(name, value)| Some((name, Some(value.clone()?)))).collect()
    }
}

/// Flags of how stores are reached, for verbs that have letters of their own for the rest.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Stores")]
pub struct AccessFlags {
    /// Certificate to show to servers (PEM); goes with --client-key.
    #[arg(long, value_name = "FILE")]
    pub client_cert: Option<String>,
    /// Key of the certificate (PEM).
    #[arg(long, value_name = "FILE")]
    pub client_key: Option<String>,
    /// Certificates to trust beside the system's (PEM).
    #[arg(long, value_name = "FILE")]
    pub ca_cert: Option<String>,
    /// Accept any certificate.
    #[arg(short, long)]
    pub trust_insecure: bool,
    /// How often a failed request is made again [default: 3].
    #[arg(short, long, value_name = "N")]
    pub error_retry: Option<String>,
    /// The first wait before that; later ones are longer [default: 200ms].
    #[arg(short = 'b', long, value_name = "TIME")]
    pub error_retry_base_interval: Option<String>,
    /// Fetch again what is bad in the cache: always so, accepted for desync's sake.
    #[arg(short = 'r', long, value_name = "YES", num_args = 0..=1, require_equals = true, default_missing_value = "yes")]
    pub cache_repair: Option<String>,
    /// The configuration file named before or behind the verb.
    #[arg(skip)]
    pub config_file: Option<PathBuf>,
}

impl StoreFlags {
    /// The flags that were given.
    pub fn given(&self) -> Vec<Given> {
        let mut given: Vec<Given> = self.stores.iter().map(|store| ("store", Some(store.clone()))).collect();
        for (name, value) in [
            ("cache", &self.cache),
            ("cache-size", &self.cache_size),
            ("cache-keep-free", &self.cache_keep_free),
            ("store-file", &self.store_file),
            ("io-timeout", &self.io_timeout),
            ("concurrency", &self.concurrency),
        ] {
            given.extend(value.clone().map(|value| (name, Some(value))));
        }
        given.extend(self.offline.then_some(("offline", None)));
        given.extend(self.trust.given());
        given.extend(self.access.given());
        given
    }

    /// Opens an index or archive, wherever it lies.
    pub fn open(&self, runtime: &Runtime, typed: &OsStr) -> Result<Opened> {
        let location = FileLocation::parse(typed)?;
        let report = Arc::new(Report::default());
        let MountConfig { sources, io_timeout, keep, .. } = settings::of_reading(self)?;
        let mut opened = runtime.block_on(open_blob(&location, &sources, &memory_plan(), io_timeout, &report))?;
        opened.tables.obey(&keep);
        opened.tables.be_patient();
        Ok(opened)
    }
}

impl AccessFlags {
    /// The flags that were given.
    pub fn given(&self) -> Vec<Given> {
        let mut given = Vec::new();
        for (name, value) in [
            ("client-cert", &self.client_cert),
            ("client-key", &self.client_key),
            ("ca-cert", &self.ca_cert),
            ("error-retry", &self.error_retry),
            ("error-retry-base-interval", &self.error_retry_base_interval),
            ("cache-repair", &self.cache_repair),
        ] {
            given.extend(value.clone().map(|value| (name, Some(value))));
        }
        given.extend(self.trust_insecure.then_some(("trust-insecure", None)));
        given
    }
}

/// How verbs that read chunks share out their memory.
pub fn memory_plan() -> MemoryPlan {
    MemoryPlan::new(DEFAULT_MEMORY_BYTES)
}
