//! Where the content of a mount or a verb comes from: stores, what keeps chunks of them, and indexes and archives wherever they lie.
//!
//! * [`Sources`] opens them; `files` reads files of stores, or what is kept of them; [`authentic`] is how an index is checked when
//!   something is demanded of it.

mod authentic;
mod files;

use std::collections::HashMap;
use std::io::{self, Read};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use super::open::{MemoryPlan, OpenError};
use super::table::TablePlaces;
use super::trust;
use crate::blob::source::{IndexBytes, MAX_INDEX_BYTES};
use crate::cache::ahead::AheadBudget;
use crate::cache::blocks::BlockRoom;
use crate::cache::disk::{DiskConfig, DiskTier};
use crate::cache::keeper::Keeper;
use crate::cache::{Cache, CacheConfig, Tiers};
use crate::config::SourceConfig;
use crate::digest::Digest;
use crate::report::Report;
use crate::store::figures::Observed;
use crate::store::files::WholeFile;
use crate::store::local_files::local_info;
use crate::store::location::{DEFAULT_STORE_NAME, FileLocation, Location};
use crate::store::open::{StoreSpec, open_store_list, open_writable};
use crate::store::retry::RetryPolicy;
use crate::store::router::Router;
use crate::store::{FileInfo, FileStore, Store, StoreError, StoreOptions, WriteStore};

/// What a local cache leaves free when nothing is said, in bytes: enough for a system to go on writing its logs.
pub(super) const DEFAULT_KEEP_FREE_BYTES: u64 = 128 << 20;

/// The share of a read's time that one request may take, so that another one, or another mirror, can be asked as well.
const REQUESTS_PER_READ: u32 = 3;

const CACHE_IS_STORE: &str = "it is a store, and cannot be a cache (a cache deletes what is old)";

/// Stores opened and kept for the next index. More than this are let go of together; indexes that are open keep theirs.
const MAX_KEPT: usize = 64;

/// The share of the memory that blocks of plain archives get where chunks are read, too: one part in so many.
const BLOCK_SHARE: u64 = 4;

/// Why a part of a file cannot be had.
#[derive(Debug)]
pub enum RangeError {
    /// The file is another by now.
    Changed,
    /// It cannot be read.
    Failed(OpenError),
}

/// Why a store is not asked.
const OFFLINE: &str = "its store is not asked (offline)";

/// What content is read from. What is opened is kept, and everything that is read through it shares one set of limits.
#[derive(Debug)]
pub struct Sources {
    config: Arc<SourceConfig>,
    cache_config: CacheConfig,
    block_config: CacheConfig,
    /// Chunks and blocks have a part of the memory each.
    is_divided: bool,
    tiers: Tiers,
    room: Arc<BlockRoom>,
    ahead: Arc<AheadBudget>,
    report: Arc<Report>,
    kept: Mutex<Kept>,
}

/// What was opened. Never locked over I/O or await.
#[derive(Debug, Default)]
struct Kept {
    /// The cache whose limits all others share.
    first: Option<Cache>,
    /// By the stores' texts.
    caches: HashMap<Vec<String>, Cache>,
    /// By the text of the directory, and whether its requests may take no longer than a share of a read's time.
    files: HashMap<(String, bool), (Arc<dyn FileStore>, Duration)>,
}

impl Sources {
    /// Sources over what keeps chunks already.
    pub(super) fn with_tiers(
        config: &SourceConfig,
        plan: &MemoryPlan,
        fetch_timeout: Duration,
        tiers: Tiers,
        report: &Arc<Report>,
    ) -> Self {
        let cache_config = CacheConfig {
            memory_bytes: plan.memory_tier_bytes,
            inflight_bytes: plan.inflight_bytes,
            fetch_timeout,
            is_offline: config.offline,
        };
        let ahead = Arc::new(AheadBudget::new(plan.ahead_bytes, plan.window_bytes, Arc::clone(report)));
        Self {
            config: Arc::new(config.clone()),
            cache_config,
            block_config: cache_config,
            is_divided: false,
            tiers,
            room: Arc::new(BlockRoom::new(&cache_config, report)),
            ahead,
            report: Arc::clone(report),
            kept: Mutex::default(),
        }
    }

    /// Opens what keeps chunks. Stores are opened when an index needs them.
    ///
    /// # Errors
    /// The cache cannot be opened.
    pub fn open(
        config: &SourceConfig,
        plan: &MemoryPlan,
        fetch_timeout: Duration,
        report: &Arc<Report>,
    ) -> Result<Self, OpenError> {
        let mut sources = Self::with_tiers(config, plan, fetch_timeout, Tiers::default(), report);
        let Some(text) = &config.cache else {
            return match config.offline {
                true => Err(OpenError::new("offline", "there is no cache to read from (name one with -c)")),
                false => Ok(sources),
            };
        };
        let spec = match sources.resolve(text)?.as_slice() {
            [spec] => spec.clone(),
            _ => return Err(OpenError::new(text, "a cache is one place, not a group of mirrors")),
        };
        match &spec.location {
            Location::Local(path) if spec.options.layout.cipher.is_none() => {
                sources.check_not_a_store(path)?;
                let disk = DiskConfig {
                    path: path.clone(),
                    quota_bytes: config.cache_size_bytes,
                    keep_free_bytes: config.cache_keep_free_bytes.unwrap_or(DEFAULT_KEEP_FREE_BYTES),
                };
                let opened = DiskTier::open(disk, Arc::clone(report));
                let opened = opened.map_err(|error| OpenError::new(text, format!("cannot be the cache: {error}")))?;
                sources.tiers.disk = Some(opened);
            }
            location => {
                let store = keeper_store(text, location, &spec.options)?;
                sources.tiers.keeper = Some(Arc::new(Keeper::new(store, Arc::clone(report))));
            }
        }
        Ok(sources)
    }

    /// A cache over the stores that an index at `location` is read with: those named, or casync's default.
    ///
    /// # Errors
    /// A store cannot be opened, or none is named and there is no default.
    pub fn cache(&self, location: &FileLocation) -> Result<Cache, OpenError> {
        let texts = self.store_texts(location)?;
        if let Some(cache) = self.kept().caches.get(&texts) {
            return Ok(cache.clone());
        }
        let store = self.store(location, self.tiers.keeper.as_ref().map(|keeper| keeper.store()))?;
        let mut kept = self.kept();
        let cache = match &kept.first {
            Some(first) => first.beside(store),
            None => {
                let first = Cache::with_tiers(store, self.tiers.clone(), self.cache_config, Arc::clone(&self.report));
                first.set_ahead(Arc::clone(&self.ahead));
                first
            }
        };
        kept.first.get_or_insert_with(|| cache.clone());
        if kept.caches.len() >= MAX_KEPT {
            kept.caches.clear();
        }
        kept.caches.insert(texts, cache.clone());
        Ok(cache)
    }

    /// How caches over these sources behave.
    pub(super) fn cache_config(&self) -> CacheConfig {
        self.cache_config
    }

    /// How blocks of plain archives are cached over these sources.
    pub(super) fn block_config(&self) -> CacheConfig {
        self.block_config
    }

    /// The stores that an index is read with, as they are named.
    fn store_texts(&self, location: &FileLocation) -> Result<Vec<String>, OpenError> {
        if self.config.offline { Ok(Vec::new()) } else { self.stores_or_default(location) }
    }

    /// The store that an index at `location` is read with, where `kept` is asked first, which keeps chunks.
    pub(super) fn store(
        &self,
        location: &FileLocation,
        kept: Option<Arc<dyn WriteStore>>,
    ) -> Result<Arc<dyn Store>, OpenError> {
        let fail = |error: StoreError| OpenError::new(&location.to_string(), error);
        let mut stores: Vec<Arc<dyn Store>> = Vec::new();
        if let Some(kept) = kept {
            stores.push(Arc::new(Observed::new(kept)));
        }
        for text in &self.store_texts(location)? {
            stores.extend(open_store_list(&[self.resolve(text)?]).map_err(fail)?);
        }
        Ok(match stores.len() {
            1 => stores.remove(0),
            _ => Arc::new(Router::new(stores)),
        })
    }

    /// The place that keeps chunks, opened anew as the settings say by now; `None` for a directory.
    pub(super) fn kept_again(&self) -> Result<Option<Arc<dyn WriteStore>>, OpenError> {
        let Some(text) = self.config.cache.as_ref().filter(|_| self.tiers.keeper.is_some()) else { return Ok(None) };
        match self.resolve(text)?.as_slice() {
            [spec] => keeper_store(text, &spec.location, &spec.options).map(Some),
            _ => Err(OpenError::new(text, "a cache is one place, not a group of mirrors")),
        }
    }

    /// The place of an archive in a store, opened anew as the settings say by now; `None` when no store is to be asked.
    pub(super) fn files_again(&self, location: &FileLocation) -> Result<Option<Arc<dyn FileStore>>, OpenError> {
        match self.config.offline {
            true => Ok(None),
            false => Ok(Some(self.files(location, Some(self.share()))?.0)),
        }
    }

    /// Refuses stores that are the cache.
    pub(super) fn check_stores(&self) -> Result<(), OpenError> {
        let Some(text) = &self.config.cache else { return Ok(()) };
        match self.resolve(text)?.as_slice() {
            [StoreSpec { location: Location::Local(path), .. }] => self.check_not_a_store(path),
            _ => Ok(()),
        }
    }

    /// The bytes of an index, and what is known of the file that they are of: what is kept, if its place does not answer. They are what is demanded of them (see [`trust`]): the one way to an index.
    ///
    /// # Errors
    /// It cannot be had, from its place or from what is kept; or it is not what is demanded.
    pub async fn index(&self, location: &FileLocation) -> Result<(IndexBytes, FileInfo), OpenError> {
        let (bytes, info, _) = self.signed_index(location).await?;
        Ok((bytes, info))
    }

    async fn read_index(&self, location: &FileLocation) -> Result<ReadIndex, OpenError> {
        let fail = |why: &dyn ToString| OpenError::new(&location.to_string(), why.to_string());
        match location {
            FileLocation::Local(path) => {
                // Looked at before the reading: whoever finds the same behind it knows that this was read, as versions do not come again.
                let info = local_info(path);
                let bytes = match trust::is_demanded(&self.config.trust) {
                    true => IndexBytes::copy(path, self.spool()),
                    false => IndexBytes::open(path),
                };
                let bytes = bytes.map_err(|error| fail(&error))?;
                let info = info.unwrap_or_else(|| unknown_info(&bytes, SystemTime::UNIX_EPOCH));
                Ok(ReadIndex { bytes, info, came: None })
            }
            FileLocation::Stdio => {
                let mut bytes = Vec::new();
                let read = io::stdin().lock().take(MAX_INDEX_BYTES + 1).read_to_end(&mut bytes);
                read.map_err(|error| fail(&error))?;
                let bytes = self.held(bytes, location)?;
                let info = unknown_info(&bytes, SystemTime::now());
                Ok(ReadIndex { bytes, info, came: None })
            }
            FileLocation::Remote { name, .. } => {
                let Some((whole, came)) = self.whole_file(location, name, MAX_INDEX_BYTES).await? else {
                    return Err(fail(&"there is no such file"));
                };
                let WholeFile { info, bytes } = whole;
                Ok(ReadIndex { bytes: self.held(bytes.into(), location)?, info, came: Some(came) })
            }
        }
    }

    fn held(&self, bytes: Vec<u8>, location: &FileLocation) -> Result<IndexBytes, OpenError> {
        IndexBytes::hold(bytes, self.spool()).map_err(|error| OpenError::new(&location.to_string(), error))
    }

    /// Where a copy of an index is laid down, if there is a better place than the usual one.
    fn spool(&self) -> Option<&Path> {
        self.tiers.disk.as_ref().map(|disk| disk.path())
    }

    /// Where the metadata table of what lies at a location may be.
    ///
    /// # Errors
    /// The options of its store cannot be found.
    pub fn table_places(&self, location: &FileLocation) -> Result<TablePlaces, OpenError> {
        let options = match location {
            FileLocation::Remote { directory_text, .. } => {
                Some(self.resolve(directory_text)?.first().map(|spec| spec.options.clone()).unwrap_or_default())
            }
            FileLocation::Local(_) | FileLocation::Stdio => None,
        };
        Ok(TablePlaces::new(self.tiers.disk.clone(), location, options, self.config.offline))
    }

    /// The same with other settings from now on: what keeps chunks stays, with the limits that the settings say.
    pub fn retuned(&self, config: &SourceConfig, plan: &MemoryPlan, fetch_timeout: Duration) -> Self {
        let mut retuned = Self::with_tiers(config, plan, fetch_timeout, self.tiers.clone(), &self.report);
        if self.is_divided {
            retuned.divide();
        }
        let first = self.kept().first.clone();
        if let Some(first) = &first {
            first.configure(retuned.cache_config);
        }
        self.room.configure(&retuned.block_config);
        self.ahead.set(plan.ahead_bytes, plan.window_bytes);
        if let Some(disk) = &self.tiers.disk {
            let keep_free_bytes = config.cache_keep_free_bytes.unwrap_or(DEFAULT_KEEP_FREE_BYTES);
            disk.set_limits(config.cache_size_bytes, keep_free_bytes);
        }
        retuned.kept = Mutex::new(Kept { first, ..Kept::default() });
        Self { room: Arc::clone(&self.room), ahead: Arc::clone(&self.ahead), ..retuned }
    }

    /// Divides the memory between chunks and blocks of plain archives, for who reads both. To be asked before anything is opened.
    pub fn divide(&mut self) {
        let blocks = CacheConfig {
            memory_bytes: self.cache_config.memory_bytes / BLOCK_SHARE,
            inflight_bytes: self.cache_config.inflight_bytes / BLOCK_SHARE,
            ..self.cache_config
        };
        self.cache_config.memory_bytes -= blocks.memory_bytes;
        self.cache_config.inflight_bytes -= blocks.inflight_bytes;
        self.room = Arc::new(BlockRoom::new(&blocks, &self.report));
        self.block_config = blocks;
        self.is_divided = true;
    }

    /// The settings of the stores.
    pub fn config(&self) -> &SourceConfig {
        &self.config
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What one request of a read may take.
    pub(super) fn share(&self) -> Duration {
        self.cache_config.fetch_timeout / REQUESTS_PER_READ
    }

    /// Refuses a cache that is one of the stores: its quota would eat the store. To be asked before the cache is opened.
    fn check_not_a_store(&self, cache: &Path) -> Result<(), OpenError> {
        let Ok(cache) = cache.canonicalize() else { return Ok(()) };
        for text in &self.config.stores {
            for spec in self.resolve(text)? {
                if spec.location.local_path().is_some_and(|path| path.canonicalize().is_ok_and(|path| path == cache)) {
                    return Err(OpenError::new(text, CACHE_IS_STORE));
                }
            }
        }
        // The store that is found beside an index, by its name.
        match cache.file_name().is_some_and(|name| name == DEFAULT_STORE_NAME) {
            true => Err(OpenError::new(&cache.to_string_lossy(), CACHE_IS_STORE)),
            false => Ok(()),
        }
    }

    /// The members of a group with their options, each request bounded well within a read's time.
    fn resolve(&self, text: &str) -> Result<Vec<StoreSpec>, OpenError> {
        let mut specs = self.config.settings.resolve(text).map_err(|error| OpenError::new("store", error))?;
        for spec in &mut specs {
            spec.options.request_timeout = spec.options.request_timeout.min(self.share());
        }
        Ok(specs)
    }

    /// The stores to ask: those given, or casync's default.
    fn stores_or_default(&self, location: &FileLocation) -> Result<Vec<String>, OpenError> {
        if !self.config.stores.is_empty() {
            return Ok(self.config.stores.clone());
        }
        let beside = location.default_store();
        if matches!(location, FileLocation::Local(_) | FileLocation::Stdio) && !Path::new(&beside).is_dir() {
            let why = format!("no store is given and {beside} does not exist (name a store with -s)");
            return Err(OpenError::new(&location.to_string(), why));
        }
        Ok(vec![beside])
    }
}

/// A store that keeps chunks. One that is slow or away is done without.
fn keeper_store(text: &str, location: &Location, options: &StoreOptions) -> Result<Arc<dyn WriteStore>, OpenError> {
    let options = StoreOptions { retry: RetryPolicy::NEVER, ..options.clone() };
    open_writable(location, &options).map_err(|error| OpenError::new(text, error))
}

/// An index as it was read, not checked yet.
struct ReadIndex {
    bytes: IndexBytes,
    /// What is known of the file that the bytes are of.
    info: FileInfo,
    /// Whether it is fresh, if it lies in a store.
    came: Option<Came>,
}

/// What is known of an index that is no regular file.
fn unknown_info(bytes: &IndexBytes, mtime: SystemTime) -> FileInfo {
    FileInfo { size: bytes.as_ref().len() as u64, version: None, mtime: Some(mtime), has_ranges: false }
}

/// Where a whole file came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Came {
    /// From its place.
    Fresh,
    /// From what is kept.
    FromCache,
}

/// What a remote file is kept under: all of its location counts, also what is not shown of it.
fn key_of(location: &FileLocation) -> String {
    Digest::Sha256.id(format!("{location:?}").as_bytes()).to_hex()
}
