//! From a location and its options to a store, or to the files beside the chunks.

use std::io::ErrorKind;
use std::sync::Arc;

use super::figures::Observed;
use super::http::HttpStore;
use super::local::LocalStore;
use super::local_files::LocalFiles;
use super::location::Location;
use super::mirror::MirrorGroup;
use super::object::BucketStore;
use super::oci::OciStore;
use super::router::Router;
use super::sftp::SftpStore;
use super::ssh::SshStore;
use super::{FileStore, Store, StoreError, StoreOptions, WriteStore};

/// A store that is meant: where it is, and how it is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreSpec {
    /// Where it is.
    pub location: Location,
    /// How it is reached.
    pub options: StoreOptions,
}

/// Opens stores to be asked in the order given; each is a group of mirrors, mostly of one member.
///
/// # Errors
/// One of them cannot be opened.
pub fn open_stores(groups: &[Vec<StoreSpec>]) -> Result<Arc<dyn Store>, StoreError> {
    let mut stores = open_store_list(groups)?;
    Ok(match stores.len() {
        1 => stores.remove(0),
        _ => Arc::new(Router::new(stores)),
    })
}

/// Opens each of some groups as one store.
///
/// # Errors
/// One of them cannot be opened.
pub fn open_store_list(groups: &[Vec<StoreSpec>]) -> Result<Vec<Arc<dyn Store>>, StoreError> {
    let mut stores: Vec<Arc<dyn Store>> = Vec::with_capacity(groups.len());
    for group in groups {
        let observed = |store| -> Arc<dyn Store> { Arc::new(Observed::new(store)) };
        let opened = group.iter().map(|StoreSpec { location, options }| open(location, options).map(observed));
        let mut members = opened.collect::<Result<Vec<_>, _>>()?;
        match members.len() {
            0 => {}
            1 => stores.append(&mut members),
            _ => stores.push(Arc::new(MirrorGroup::new(members))),
        }
    }
    Ok(stores)
}

/// Opens a store for reading. Nothing is asked of a network yet.
///
/// # Errors
/// A local store does not exist, or the options do not fit.
pub fn open(location: &Location, options: &StoreOptions) -> Result<Arc<dyn Store>, StoreError> {
    match location {
        Location::Local(path) => Ok(Arc::new(LocalStore::open(path)?.with_layout(options.layout.clone()))),
        Location::S3(bucket) => Ok(Arc::new(BucketStore::s3(bucket, options)?)),
        Location::Gcs { bucket, prefix } => Ok(Arc::new(BucketStore::gcs(bucket, prefix, options)?)),
        Location::Http(url) => Ok(Arc::new(HttpStore::new(url.clone(), options)?)),
        Location::Oci(location) => Ok(Arc::new(OciStore::new(location, options)?)),
        Location::Sftp(location) => Ok(Arc::new(SftpStore::new(location, options)?)),
        Location::Ssh(location) => Ok(Arc::new(SshStore::new(location, options)?)),
    }
}

/// Opens a store for writing, too; a local directory that is not there is made (so that what has no chunks has a store, too).
///
/// # Errors
/// A local directory cannot be made, the options do not fit, or the store is of a kind that can only be read.
pub fn open_writable(location: &Location, options: &StoreOptions) -> Result<Arc<dyn WriteStore>, StoreError> {
    match location {
        Location::Local(path) => {
            match std::fs::create_dir(path) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                    let name = path.display().to_string();
                    return Err(StoreError::new(name.clone(), name, format!("cannot be made: {error}")));
                }
                _ => {}
            }
            Ok(Arc::new(LocalStore::open(path)?.with_layout(options.layout.clone())))
        }
        Location::S3(bucket) => Ok(Arc::new(BucketStore::s3(bucket, options)?)),
        Location::Gcs { bucket, prefix } => Ok(Arc::new(BucketStore::gcs(bucket, prefix, options)?)),
        Location::Http(url) => Ok(Arc::new(HttpStore::new(url.clone(), options)?)),
        Location::Oci(location) => Ok(Arc::new(OciStore::new(location, options)?)),
        Location::Sftp(location) => Ok(Arc::new(SftpStore::new(location, options)?)),
        Location::Ssh(_) => Err(cannot(location, "a store over ssh:// can only be read (use sftp://)")),
    }
}

/// Opens the place of whole files: indexes and archives. Nothing is asked of a network yet.
///
/// # Errors
/// The options do not fit, or it is a place that has no files.
pub fn open_files(location: &Location, options: &StoreOptions) -> Result<Arc<dyn FileStore>, StoreError> {
    match location {
        Location::Local(path) => Ok(Arc::new(LocalFiles::new(path))),
        Location::Http(url) => Ok(Arc::new(HttpStore::new(url.clone(), options)?)),
        Location::S3(bucket) => Ok(Arc::new(BucketStore::s3(bucket, options)?)),
        Location::Gcs { bucket, prefix } => Ok(Arc::new(BucketStore::gcs(bucket, prefix, options)?)),
        Location::Sftp(location) => Ok(Arc::new(SftpStore::new(location, options)?)),
        Location::Ssh(location) => Ok(Arc::new(SshStore::new(location, options)?)),
        Location::Oci(_) => Err(cannot(location, "a registry keeps chunks only, no index or archive")),
    }
}

fn cannot(location: &Location, reason: &str) -> StoreError {
    StoreError::new(location.to_string(), location.to_string(), reason)
}
