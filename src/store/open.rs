//! From a location and its options to a store.

use std::io::ErrorKind;
use std::sync::Arc;

use super::local::LocalStore;
use super::location::Location;
use super::mirror::MirrorGroup;
use super::router::Router;
use super::{Store, StoreError, StoreOptions, WriteStore};

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
    let mut stores: Vec<Arc<dyn Store>> = Vec::with_capacity(groups.len());
    for group in groups {
        let opened = group.iter().map(|StoreSpec { location, options }| open(location, options));
        let mut members: Vec<Arc<dyn Store>> = opened.collect::<Result<_, _>>()?;
        match members.len() {
            0 => {}
            1 => stores.push(members.remove(0)),
            _ => stores.push(Arc::new(MirrorGroup::new(members))),
        }
    }
    Ok(match stores.len() {
        1 => stores.remove(0),
        _ => Arc::new(Router::new(stores)),
    })
}

/// Opens a store for reading. Nothing is asked of a network yet.
///
/// # Errors
/// A local store does not exist, or the options do not fit.
pub fn open(location: &Location, options: &StoreOptions) -> Result<Arc<dyn Store>, StoreError> {
    match location {
        Location::Local(path) => Ok(Arc::new(LocalStore::open(path)?.with_layout(options.layout.clone()))),
        other => Err(unsupported(other)),
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
        other => Err(unsupported(other)),
    }
}

fn unsupported(location: &Location) -> StoreError {
    StoreError::new(location.to_string(), location.to_string(), "not supported")
}
