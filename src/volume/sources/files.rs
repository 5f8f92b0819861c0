//! Files of stores: a whole one, or what is kept of it; a part of one; what is known of one; a directory of them.
//!
//! Invariant: whatever is read comes with what is known of exactly that, be it fresh or kept.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::{Came, MAX_KEPT, OFFLINE, RangeError, Sources, key_of};
use crate::cache::blocks::{Blocks, RemoteFile};
use crate::store::files::{ReadWhole, WholeFile, is_changed};
use crate::store::local_files::local_info;
use crate::store::location::FileLocation;
use crate::store::open::open_files;
use crate::store::{FileInfo, FileStore, FileVersion, Listed, StoreError};
use crate::volume::open::OpenError;

impl Sources {
    /// What is kept of a file of a store.
    pub(super) fn kept_file(&self, location: &FileLocation) -> Option<WholeFile> {
        let kept = self.tiers.disk.as_ref()?.kept_file(&key_of(location))?;
        let info = FileInfo {
            size: kept.bytes.len() as u64,
            version: kept.version.map(FileVersion),
            mtime: kept.mtime,
            has_ranges: true,
        };
        Some(WholeFile { info, bytes: kept.bytes.into() })
    }

    /// Keeps a file of a store that turned out to be good.
    pub(super) fn keep_file(&self, location: &FileLocation, info: &FileInfo, bytes: &[u8]) {
        if let Some(disk) = &self.tiers.disk {
            let version = info.version.as_ref().map(|version| version.0.as_str());
            disk.keep_file(&key_of(location), version, info.mtime, bytes);
        }
    }

    /// A file of a store as a whole: from its place, or what is kept of it if that is the same or the place does not answer. `None` when
    /// its place has no such file.
    pub(super) async fn whole_file(
        &self,
        location: &FileLocation,
        name: &str,
        max_bytes: u64,
    ) -> Result<Option<(WholeFile, Came)>, OpenError> {
        let shown = location.to_string();
        let fail = |why: &dyn ToString| OpenError::new(&shown, why.to_string());
        let kept = self.kept_file(location);
        if self.config.offline {
            let kept = kept.ok_or_else(|| fail(&"it is not in the cache, and its store is not asked (offline)"))?;
            return Ok(Some((kept, Came::FromCache)));
        }
        let known = kept.as_ref().and_then(|kept| kept.info.version.as_ref());
        let (files, request_timeout) = self.files(location, None)?;
        let timeout = request_timeout.max(self.cache_config.fetch_timeout);
        let asked = tokio::time::timeout(timeout, files.read_whole(name, known, max_bytes));
        let answer = match asked.await {
            Ok(answer) => answer,
            Err(_) => Err(StoreError::transient(files.name(), name, "no answer in time")),
        };
        match (answer, kept) {
            (Ok(ReadWhole::Content(whole)), _) => Ok(Some((whole, Came::Fresh))),
            (Ok(ReadWhole::Unchanged), Some(kept)) => Ok(Some((kept, Came::FromCache))),
            (Ok(ReadWhole::Unchanged), None) => {
                Err(fail(&"its store says that it is unchanged, but it was never read"))
            }
            (Ok(ReadWhole::Missing), _) => Ok(None),
            (Err(error), Some(kept)) if error.is_transient => {
                tracing::warn!("{error}; using what is kept of it");
                Ok(Some((kept, Came::FromCache)))
            }
            (Err(error), _) => Err(fail(&error)),
        }
    }

    /// A plain archive of a store, to be read at any place; and what is known of the file that is read: what is kept, if its place does
    /// not answer.
    ///
    /// # Errors
    /// It cannot be looked at, or not be read by ranges.
    pub async fn archive(&self, location: &FileLocation, name: &str) -> Result<(Blocks, FileInfo), OpenError> {
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
        let remote = RemoteFile { files, file: name.to_owned(), key, name: shown, info: info.clone() };
        let (disk, report, room) = (self.tiers.disk.clone(), Arc::clone(&self.report), Arc::clone(&self.room));
        let blocks = Blocks::sharing(remote, disk, self.block_config, report, room);
        Ok((blocks.with_ahead(Arc::clone(&self.ahead)), info))
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
    pub(in crate::volume) fn files(
        &self,
        location: &FileLocation,
        share: Option<Duration>,
    ) -> Result<(Arc<dyn FileStore>, Duration), OpenError> {
        let FileLocation::Remote { directory, directory_text, .. } = location else {
            return Err(OpenError::new(&location.to_string(), "it does not lie in a store"));
        };
        let key = (directory_text.clone(), share.is_some());
        if let Some((files, timeout)) = self.kept().files.get(&key) {
            return Ok((Arc::clone(files), *timeout));
        }
        let specs = self.config.settings.resolve(directory_text).map_err(|error| OpenError::new("store", error))?;
        let mut options = specs.first().map(|spec| spec.options.clone()).unwrap_or_default();
        options.request_timeout = options.request_timeout.min(share.unwrap_or(Duration::MAX));
        let opened = open_files(directory, &options).map_err(|error| OpenError::new(&location.to_string(), error))?;
        let mut kept = self.kept();
        if kept.files.len() >= MAX_KEPT {
            kept.files.clear();
        }
        kept.files.insert(key, (Arc::clone(&opened), options.request_timeout));
        Ok((opened, options.request_timeout))
    }

    /// What is known of a file by now; `None` when there is none.
    ///
    /// # Errors
    /// Its store cannot tell.
    pub async fn info(&self, location: &FileLocation) -> Result<Option<FileInfo>, OpenError> {
        let shown = location.to_string();
        match location {
            FileLocation::Local(path) => {
                let path = path.clone();
                let looked = tokio::task::spawn_blocking(move || local_info(&path)).await;
                looked.map_err(|error| OpenError::new(&shown, error))
            }
            FileLocation::Remote { name, .. } => {
                if self.config.offline {
                    return Err(OpenError::new(&shown, OFFLINE));
                }
                let (files, _) = self.files(location, Some(self.share()))?;
                match tokio::time::timeout(self.cache_config.fetch_timeout, files.stat(name)).await {
                    Ok(info) => info.map_err(|error| OpenError::new(&shown, error)),
                    Err(_) => Err(OpenError::new(&shown, "no answer in time")),
                }
            }
            FileLocation::Stdio => Ok(None),
        }
    }

    /// Some bytes of a file of a store, of this version if one is given.
    ///
    /// # Errors
    /// They cannot be read, or the file is another by now.
    pub async fn range(
        &self,
        location: &FileLocation,
        range: Range<u64>,
        version: Option<&FileVersion>,
    ) -> Result<Bytes, RangeError> {
        let shown = location.to_string();
        let FileLocation::Remote { name, .. } = location else {
            return Err(RangeError::Failed(OpenError::new(&shown, "it does not lie in a store")));
        };
        if self.config.offline {
            return Err(RangeError::Failed(OpenError::new(&shown, OFFLINE)));
        }
        let (files, _) = self.files(location, Some(self.share())).map_err(RangeError::Failed)?;
        match tokio::time::timeout(self.cache_config.fetch_timeout, files.read_range(name, range, version)).await {
            Ok(Ok(bytes)) => Ok(bytes),
            Ok(Err(error)) if is_changed(&error) => Err(RangeError::Changed),
            Ok(Err(error)) => Err(RangeError::Failed(OpenError::new(&shown, error))),
            Err(_) => Err(RangeError::Failed(OpenError::new(&shown, "no answer in time"))),
        }
    }

    /// What lies in a directory of a store, `below` the one that the location names; `None` when there is no such directory.
    ///
    /// # Errors
    /// It cannot be listed.
    pub async fn list(&self, location: &FileLocation, below: &str) -> Result<Option<Vec<Listed>>, OpenError> {
        let shown = location.to_string();
        if self.config.offline {
            return Err(OpenError::new(&shown, "a directory is not kept, and its store is not asked (offline)"));
        }
        let (files, _) = self.files(location, None)?;
        match tokio::time::timeout(self.cache_config.fetch_timeout, files.list(below)).await {
            Ok(listed) => listed.map_err(|error| OpenError::new(&shown, error)),
            Err(_) => Err(OpenError::new(&shown, "no answer in time")),
        }
    }
}
