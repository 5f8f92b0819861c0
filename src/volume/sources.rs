//! Where the content of a mount or a verb comes from: stores, what keeps chunks of them, and indexes and archives wherever they lie.

use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::open::{MemoryPlan, OpenError};
use crate::blob::source::{IndexBytes, MAX_INDEX_BYTES};
use crate::cache::blocks::{Blocks, RemoteFile};
use crate::cache::disk::{DiskConfig, DiskTier};
use crate::cache::keeper::Keeper;
use crate::cache::{Cache, CacheConfig, Tiers};
use crate::config::SourceConfig;
use crate::digest::Digest;
use crate::report::Report;
use crate::store::files::{ReadWhole, WholeFile};
use crate::store::location::{DEFAULT_STORE_NAME, FileLocation, Location};
use crate::store::open::{StoreSpec, open_files, open_store_list, open_writable};
use crate::store::retry::RetryPolicy;
use crate::store::router::Router;
use crate::store::{FileInfo, FileStore, FileVersion, Store, StoreError, StoreOptions};

/// What a local cache leaves free when nothing is said, in bytes: enough for a system to go on writing its logs.
pub(super) const DEFAULT_KEEP_FREE_BYTES: u64 = 128 << 20;

/// The share of a read's time that one request may take, so that another one, or another mirror, can be asked as well.
const REQUESTS_PER_READ: u32 = 3;

const CACHE_IS_STORE: &str = "it is a store, and cannot be a cache (a cache deletes what is old)";

/// What content is read from.
#[derive(Debug)]
pub struct Sources<'a> {
    config: &'a SourceConfig,
    cache_config: CacheConfig,
    tiers: Tiers,
    report: Arc<Report>,
}

impl<'a> Sources<'a> {
    /// Opens what keeps chunks. Stores are opened when an index needs them.
    ///
    /// # Errors
    /// The cache cannot be opened.
    pub fn open(
        config: &'a SourceConfig,
        plan: &MemoryPlan,
        fetch_timeout: Duration,
        report: &Arc<Report>,
    ) -> Result<Self, OpenError> {
        let cache_config = CacheConfig {
            memory_bytes: plan.memory_tier_bytes,
            inflight_bytes: plan.inflight_bytes,
            fetch_timeout,
            is_offline: config.offline,
        };
        let mut sources = Self { config, cache_config, tiers: Tiers::default(), report: Arc::clone(report) };
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
                // A cache that is slow or away is done without.
                let options = StoreOptions { retry: RetryPolicy::NEVER, ..spec.options.clone() };
                let store = open_writable(location, &options).map_err(|error| OpenError::new(text, error))?;
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
        let fail = |error: StoreError| OpenError::new(&location.to_string(), error);
        let mut stores: Vec<Arc<dyn Store>> = Vec::new();
        if let Some(keeper) = &self.tiers.keeper {
            stores.push(Arc::clone(keeper.store()) as Arc<dyn Store>);
        }
        if !self.config.offline {
            for text in self.stores_or_default(location)? {
                stores.extend(open_store_list(&[self.resolve(&text)?]).map_err(fail)?);
            }
        }
        let store: Arc<dyn Store> = match stores.len() {
            1 => stores.remove(0),
            _ => Arc::new(Router::new(stores)),
        };
        Ok(Cache::with_tiers(store, self.tiers.clone(), self.cache_config, Arc::clone(&self.report)))
    }

    /// The bytes of an index, and when it was modified.
    ///
    /// # Errors
    /// It cannot be had, from its place or from what is kept.
    pub async fn index(&self, location: &FileLocation) -> Result<(IndexBytes, SystemTime), OpenError> {
        let fail = |why: &dyn ToString| OpenError::new(&location.to_string(), why.to_string());
        match location {
            FileLocation::Local(path) => {
                let mtime = path.metadata().and_then(|metadata| metadata.modified());
                let bytes = IndexBytes::open(path).map_err(|error| fail(&error))?;
                Ok((bytes, mtime.unwrap_or(SystemTime::UNIX_EPOCH)))
            }
            FileLocation::Stdio => {
                let mut bytes = Vec::new();
                let read = io::stdin().lock().take(MAX_INDEX_BYTES + 1).read_to_end(&mut bytes);
                read.map_err(|error| fail(&error))?;
                Ok((self.held(bytes, location)?, SystemTime::now()))
            }
            FileLocation::Remote { name, .. } => {
                let whole = self.whole_file(location, name).await?;
                let mtime = whole.info.mtime.unwrap_or(SystemTime::UNIX_EPOCH);
                Ok((self.held(whole.bytes.into(), location)?, mtime))
            }
        }
    }

    fn held(&self, bytes: Vec<u8>, location: &FileLocation) -> Result<IndexBytes, OpenError> {
        let spool = self.tiers.disk.as_ref().map(|disk| disk.path());
        IndexBytes::hold(bytes, spool).map_err(|error| OpenError::new(&location.to_string(), error))
    }

    /// A file of a store as a whole: from its place, or what is kept of it if that is the same or the place does not answer.
    async fn whole_file(&self, location: &FileLocation, name: &str) -> Result<WholeFile, OpenError> {
        let shown = location.to_string();
        let fail = |why: &dyn ToString| OpenError::new(&shown, why.to_string());
        let key = key_of(location);
        let kept = self.tiers.disk.as_ref().and_then(|disk| disk.kept_file(&key)).map(|kept| WholeFile {
            info: FileInfo {
                size: kept.bytes.len() as u64,
                version: kept.version.map(FileVersion),
                mtime: kept.mtime,
                has_ranges: true,
            },
            bytes: kept.bytes.into(),
        });
        if self.config.offline {
            return kept.ok_or_else(|| fail(&"it is not in the cache, and its store is not asked (offline)"));
        }
        let known = kept.as_ref().and_then(|kept| kept.info.version.as_ref());
        let (files, request_timeout) = self.files(location, None)?;
        let timeout = request_timeout.max(self.cache_config.fetch_timeout);
        let asked = tokio::time::timeout(timeout, files.read_whole(name, known, MAX_INDEX_BYTES));
        let answer = match asked.await {
            Ok(answer) => answer,
            Err(_) => Err(StoreError::transient(files.name(), name, "no answer in time")),
        };
        match (answer, kept) {
            (Ok(ReadWhole::Content(whole)), _) => {
                if let Some(disk) = &self.tiers.disk {
                    let version = whole.info.version.as_ref().map(|version| version.0.as_str());
                    disk.keep_file(&key, version, whole.info.mtime, &whole.bytes);
                }
                Ok(whole)
            }
            (Ok(ReadWhole::Unchanged), Some(kept)) => Ok(kept),
            (Ok(ReadWhole::Unchanged), None) => {
                Err(fail(&"its store says that it is unchanged, but it was never read"))
            }
            (Ok(ReadWhole::Missing), _) => Err(fail(&"there is no such file")),
            (Err(error), Some(kept)) if error.is_transient => {
                tracing::warn!("{error}; using what is kept of it");
                Ok(kept)
            }
            (Err(error), _) => Err(fail(&error)),
        }
    }

    /// A plain archive of a store, to be read at any place.
    ///
    /// # Errors
    /// It cannot be looked at, or not be read by ranges.
    pub async fn archive(&self, location: &FileLocation, name: &str) -> Result<(Blocks, SystemTime), OpenError> {
        let shown = location.to_string();
        let fail = |why: &dyn ToString| OpenError::new(&shown, why.to_string());
        // What was known of the file is kept beside its blocks, so that it can be opened offline.
        let key = key_of(location);
        let facts_key = format!("facts of {key}");
        let kept = self.tiers.disk.as_ref().and_then(|disk| disk.kept_file(&facts_key));
        let kept = kept.and_then(|kept| {
            let size = u64::from_le_bytes(kept.bytes.as_slice().try_into().ok()?);
            Some(FileInfo { size, version: kept.version.map(FileVersion), mtime: kept.mtime, has_ranges: true })
        });
        let share = self.share();
        let files = if self.config.offline { None } else { Some(self.files(location, Some(share))?.0) };
        let info = match &files {
            None => {
                kept.clone().ok_or_else(|| fail(&"it is not in the cache, and its store is not asked (offline)"))?
            }
            Some(files) => {
                let asked = tokio::time::timeout(self.cache_config.fetch_timeout, files.stat(name)).await;
                let late = |_| Err(StoreError::transient(files.name(), name, "no answer in time"));
                match (asked.unwrap_or_else(late), kept.clone()) {
                    (Ok(Some(info)), _) => info,
                    (Ok(None), _) => return Err(fail(&"there is no such file")),
                    (Err(error), Some(kept)) if error.is_transient => {
                        tracing::warn!("{error}; using what is kept of it");
                        kept
                    }
                    (Err(error), _) => return Err(fail(&error)),
                }
            }
        };
        if !info.has_ranges {
            return Err(fail(&"its server cannot read parts of a file (copy it here, or serve it over http or sftp)"));
        }
        if info.version.is_none() {
            // Its blocks could be of several contents, and nothing would tell.
            return Err(fail(
                &"its server tells no version of it (an ETag or Last-Modified is needed to read it in parts)",
            ));
        }
        let is_new = kept.as_ref() != Some(&info);
        if let (Some(disk), Some(version), true) = (&self.tiers.disk, &info.version, is_new) {
            disk.keep_file(&facts_key, Some(&version.0), info.mtime, &info.size.to_le_bytes());
        }
        let mtime = info.mtime.unwrap_or(SystemTime::UNIX_EPOCH);
        let remote = RemoteFile { files, file: name.to_owned(), key, name: shown, info };
        let blocks = Blocks::new(remote, self.tiers.disk.clone(), self.cache_config, Arc::clone(&self.report));
        Ok((blocks, mtime))
    }

    /// The first bytes of a file of a store.
    ///
    /// # Errors
    /// It cannot be read.
    pub async fn head(&self, location: &FileLocation, name: &str, n_bytes: u64) -> Result<Vec<u8>, OpenError> {
        let (blocks, _) = self.archive(location, name).await?;
        match blocks.size().min(n_bytes) as usize {
            0 => Ok(Vec::new()),
            n => match blocks.read_at(0, n).await {
                Ok(bytes) => Ok(bytes.into()),
                Err(error) => Err(OpenError::new(&location.to_string(), error)),
            },
        }
    }

    /// Where a remote file lies, and how long a request there may take: no longer than `share`, if one is given. An index may take as long
    /// as the settings allow: its length is not known.
    fn files(
        &self,
        location: &FileLocation,
        share: Option<Duration>,
    ) -> Result<(Arc<dyn FileStore>, Duration), OpenError> {
        let FileLocation::Remote { directory, directory_text, .. } = location else {
            return Err(OpenError::new(&location.to_string(), "it does not lie in a store"));
        };
        let specs = self.config.settings.resolve(directory_text).map_err(|error| OpenError::new("store", error))?;
        let mut options = specs.first().map(|spec| spec.options.clone()).unwrap_or_default();
        options.request_timeout = options.request_timeout.min(share.unwrap_or(Duration::MAX));
        let opened = open_files(directory, &options).map_err(|error| OpenError::new(&location.to_string(), error))?;
        Ok((opened, options.request_timeout))
    }

    /// What one request of a read may take.
    fn share(&self) -> Duration {
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

/// What a remote file is kept under: all of its location counts, also what is not shown of it.
fn key_of(location: &FileLocation) -> String {
    Digest::Sha256.id(format!("{location:?}").as_bytes()).to_hex()
}
