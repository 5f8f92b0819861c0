//! What the user typed as a store, turned into a store: the only parser of store locations.
//!
//! A location is a path or a `file://` URL. Other schemes are named in the error, so that a typing mistake and a store this
//! version cannot reach are told apart.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::local::LocalStore;
use super::router::Router;
use super::{Store, StoreError, WriteStore};

/// The file name of the store that casync looks for beside an index.
pub const DEFAULT_STORE_NAME: &str = "default.castr";

/// Where a store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A `.castr` directory.
    Local(PathBuf),
}

impl Location {
    /// Reads a location as typed.
    ///
    /// # Errors
    /// The location names a scheme that is not supported, or is empty.
    pub fn parse(text: &str) -> Result<Self, StoreError> {
        let refuse =
            |reason: String| Err(StoreError { store: without_password(text), object: "location".to_owned(), reason });
        if text.is_empty() {
            return refuse("a store location cannot be empty".to_owned());
        }
        match text.split_once("://") {
            Some(("file", path)) => {
                let path = path.strip_prefix("localhost").unwrap_or(path);
                if !path.starts_with('/') {
                    return refuse("a file:// URL needs an absolute path".to_owned());
                }
                Ok(Self::Local(PathBuf::from(path)))
            }
            Some((scheme, _)) if is_scheme(scheme) => {
                refuse(format!("stores over {scheme}:// are not supported by this version (use a local directory)"))
            }
            _ => Ok(Self::Local(PathBuf::from(text))),
        }
    }

    /// The store at this location for writing; a directory that is not there is made (so that what has no chunks has a store, too).
    ///
    /// # Errors
    /// The store cannot be made or opened.
    pub fn create(&self) -> Result<Arc<dyn WriteStore>, StoreError> {
        match self {
            Self::Local(path) => {
                match std::fs::create_dir(path) {
                    Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                        let name = path.display().to_string();
                        return Err(StoreError {
                            store: name.clone(),
                            object: name,
                            reason: format!("cannot be made: {error}"),
                        });
                    }
                    _ => {}
                }
                Ok(Arc::new(LocalStore::open(path)?))
            }
        }
    }

    /// Opens the store at this location for reading.
    ///
    /// # Errors
    /// The store does not exist or cannot be opened.
    pub fn open(&self) -> Result<Arc<dyn Store>, StoreError> {
        match self {
            Self::Local(path) => Ok(Arc::new(LocalStore::open(path)?)),
        }
    }
}

/// Opens the stores at some locations, to be asked in the order given.
///
/// # Errors
/// One of the locations cannot be read or opened.
pub fn open_stores(locations: &[String]) -> Result<Arc<dyn Store>, StoreError> {
    let mut stores = Vec::with_capacity(locations.len());
    for location in locations {
        stores.push(Location::parse(location)?.open()?);
    }
    Ok(match stores.len() {
        1 => stores.remove(0),
        _ => Arc::new(Router::new(stores)),
    })
}

/// The store casync uses for an index when none is named: `default.castr` in the index's directory.
pub fn default_store(index: &Path) -> PathBuf {
    index.with_file_name(DEFAULT_STORE_NAME)
}

/// A location as it may be shown: the password of `scheme://user:password@host` left out.
pub fn without_password(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else { return text.to_owned() };
    let authority_end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(authority_end);
    match authority.rsplit_once('@') {
        Some((login, host)) => {
            let user = login.split(':').next().unwrap_or_default();
            format!("{scheme}://{user}@{host}{path}")
        }
        None => text.to_owned(),
    }
}

/// Whether the text before `://` can be a URL scheme (RFC 3986, 3.1), so that a path with `://` in it stays a path.
fn is_scheme(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_file_urls_are_local() {
        for (text, path) in [
            ("/srv/store", "/srv/store"),
            ("store.castr", "store.castr"),
            ("./a b:c", "./a b:c"),
            ("/odd://path", "/odd://path"),
            ("file:///srv/store", "/srv/store"),
            ("file://localhost/srv/store", "/srv/store"),
        ] {
            assert_eq!(Location::parse(text), Ok(Location::Local(path.into())), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_reached_is_named_without_its_password() {
        for (text, scheme) in
            [("https://u:secret@h/store", "https"), ("s3+http://h/b?lookup=path", "s3+http"), ("ssh://h/x", "ssh")]
        {
            let message = Location::parse(text).expect_err(text).to_string();
            assert!(message.contains(&format!("{scheme}://")) && !message.contains("secret"), "{message}");
        }
        assert!(Location::parse("").is_err());
        assert!(Location::parse("file://relative/store").is_err());
    }

    #[test]
    fn passwords_are_left_out() {
        for (text, shown) in [
            ("https://u:p@h/x", "https://u@h/x"),
            ("https://u:p@q@h/x@y", "https://u@h/x@y"),
            ("https://h/x@y", "https://h/x@y"),
            ("/path/a:b@c", "/path/a:b@c"),
        ] {
            assert_eq!(without_password(text), shown);
        }
    }

    #[test]
    fn the_default_store_lies_beside_the_index() {
        assert_eq!(default_store(Path::new("/a/b.caibx")), Path::new("/a/default.castr"));
        assert_eq!(default_store(Path::new("b.caibx")), Path::new("default.castr"));
    }
}
