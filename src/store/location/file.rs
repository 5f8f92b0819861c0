//! Where an index or archive is: a file of a store, or none of a store.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::secrets::without_secrets;
use super::{Location, LocationError};

/// The file name of the store that casync looks for beside an index.
pub const DEFAULT_STORE_NAME: &str = "default.castr";

/// Where an index or archive is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileLocation {
    /// A local file.
    Local(PathBuf),
    /// A file of a store.
    Remote {
        /// What lies before the last `/`.
        directory: Location,
        /// The text of `directory`, by which its options are found.
        directory_text: String,
        /// The name behind the last `/`; or several with `/` between them, of what lies below a directory; empty for the directory itself.
        name: String,
    },
    /// Standard input or output.
    Stdio,
}

impl FileLocation {
    /// Reads the location of a file as typed.
    ///
    /// # Errors
    /// It is of an unknown scheme, or lacks a part.
    pub fn parse(typed: &OsStr) -> Result<Self, LocationError> {
        let Some(text) = typed.to_str() else { return Ok(Self::Local(typed.into())) };
        if text == "-" {
            return Ok(Self::Stdio);
        }
        let refuse = |reason: &str| Err(LocationError { shown: without_secrets(text), reason: reason.to_owned() });
        if let Location::Local(path) = Location::parse(text)? {
            return Ok(Self::Local(path));
        }
        // A query belongs to the directory (`?lookup=path`), or to a web server's file.
        let (before_query, query) = match text.find('?') {
            Some(at) => text.split_at(at),
            None => (text, ""),
        };
        let Some((directory, name)) = before_query.rsplit_once(['/', ':']).filter(|(_, name)| !name.is_empty()) else {
            return refuse("it names no file");
        };
        let slash = &before_query[directory.len()..before_query.len() - name.len()];
        // `host:name` lies in the directory that is logged in to.
        let directory = if slash == ":" { format!("{directory}:.") } else { directory.to_owned() };
        let directory_text = match before_query.starts_with("s3+") {
            true => format!("{directory}{query}"),
            false => directory,
        };
        let directory = match Location::parse(&directory_text)? {
            Location::Oci(_) => return refuse("a registry keeps chunks only, no index or archive"),
            Location::Local(_) => return refuse("it names no file"),
            Location::Http(mut url) => {
                // The query goes with every request to this directory.
                url.set_query(query.strip_prefix('?'));
                Location::Http(url)
            }
            directory => directory,
        };
        let name = match &directory {
            Location::Ssh(_) if slash == ":" => name.to_owned(),
            _ => percent_encoding::percent_decode_str(name).decode_utf8_lossy().into_owned(),
        };
        Ok(Self::Remote { directory, directory_text, name })
    }

    /// Reads the location of a file, or of a directory of files: an existing local one, or a URL that ends with `/`.
    ///
    /// # Errors
    /// It is of an unknown scheme, lacks a part, or is a directory of a kind that has no files.
    pub fn parse_any(typed: &OsStr) -> Result<Self, LocationError> {
        let Some(text) = typed.to_str() else { return Self::parse(typed) };
        let before_query = text.split('?').next().unwrap_or_default();
        if !before_query.ends_with('/') {
            return Self::parse(typed);
        }
        match Location::parse(text)? {
            Location::Local(path) => Ok(Self::Local(path)),
            Location::Oci(_) => Err(LocationError {
                shown: without_secrets(text),
                reason: "a registry keeps chunks only, no index or archive".to_owned(),
            }),
            mut directory => {
                if let Location::Sftp(ssh) | Location::Ssh(ssh) = &mut directory {
                    let path = ssh.path.trim_end_matches('/');
                    ssh.path = if path.is_empty() { "/".to_owned() } else { path.to_owned() };
                }
                // A query of a web server goes with every request, as the location has it; that of a bucket belongs to its text.
                let query = if text.starts_with("s3+") { &text[before_query.len()..] } else { "" };
                let directory_text = format!("{}{query}", before_query.trim_end_matches('/'));
                Ok(Self::Remote { directory, directory_text, name: String::new() })
            }
        }
    }

    /// Whether it is a directory of files, not a file. Looks at the disk for a local one.
    pub fn is_directory(&self) -> bool {
        match self {
            Self::Local(path) => path.is_dir(),
            Self::Remote { name, .. } => name.is_empty(),
            Self::Stdio => false,
        }
    }

    /// A file below a directory, by its path there (bytes that are UTF-8 but for a local one).
    pub fn below(&self, path: &[u8]) -> Self {
        match self {
            Self::Local(directory) => Self::Local(directory.join(OsStr::from_bytes(path))),
            Self::Remote { directory, directory_text, .. } => Self::Remote {
                directory: directory.clone(),
                directory_text: directory_text.clone(),
                name: String::from_utf8_lossy(path).into_owned(),
            },
            Self::Stdio => Self::Stdio,
        }
    }

    /// The last part of the name, by whose suffix its kind is told.
    pub fn file_name(&self) -> &Path {
        match self {
            Self::Local(path) => path,
            Self::Remote { name, .. } => Path::new(name),
            Self::Stdio => Path::new("-"),
        }
    }

    /// The store casync uses for an index when none is named: `default.castr` in the index's directory.
    pub fn default_store(&self) -> String {
        match self {
            Self::Local(path) => {
                let beside = path.with_file_name(DEFAULT_STORE_NAME);
                // A path that begins like a URL would be read as one.
                std::path::absolute(&beside).unwrap_or(beside).to_string_lossy().into_owned()
            }
            Self::Remote { directory_text, name, .. } => {
                let (before_query, query) = match directory_text.find('?') {
                    Some(at) => directory_text.split_at(at),
                    None => (directory_text.as_str(), ""),
                };
                let below = name.rsplit_once('/').map_or(String::new(), |(below, _)| format!("/{}", encoded(below)));
                format!("{before_query}{below}/{DEFAULT_STORE_NAME}{query}")
            }
            Self::Stdio => DEFAULT_STORE_NAME.to_owned(),
        }
    }
}

/// A path as it stands in a URL.
fn encoded(path: &str) -> String {
    /// All but what RFC 3986 calls unreserved, and the slash.
    const IN_PATH: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');
    utf8_percent_encode(path, &IN_PATH).to_string()
}

/// The location as it may be shown, without secrets.
impl fmt::Display for FileLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(path) => write!(f, "{}", path.display()),
            Self::Remote { directory: Location::Http(url), name, .. } => {
                let mut shown = url.clone();
                if let Ok(mut segments) = shown.path_segments_mut() {
                    segments.pop_if_empty().extend(name.split('/'));
                }
                f.write_str(&without_secrets(shown.as_str()))
            }
            Self::Remote { directory, name, .. } if name.is_empty() => write!(f, "{directory}/"),
            Self::Remote { directory, name, .. } => write!(f, "{directory}/{name}"),
            Self::Stdio => f.write_str("-"),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn files_lie_in_stores() {
        for (text, directory, directory_text, name, default) in [
            ("http://h/t/x.caibx", "http://h/t/", "http://h/t", "x.caibx", "http://h/t/default.castr"),
            ("https://h/x.caidx", "https://h", "https://h", "x.caidx", "https://h/default.castr"),
            (
                "s3+http://h/b/p/x.caibx?lookup=path",
                "s3+http://h/b/p?lookup=path",
                "s3+http://h/b/p?lookup=path",
                "x.caibx",
                "s3+http://h/b/p/default.castr?lookup=path",
            ),
            ("gs://b/x.catar", "gs://b", "gs://b", "x.catar", "gs://b/default.castr"),
            ("sftp://u@h/p/a%20b.catar", "sftp://u@h/p", "sftp://u@h/p", "a b.catar", "sftp://u@h/p/default.castr"),
            ("u@h:/p/x.caibx", "u@h:/p", "u@h:/p", "x.caibx", "u@h:/p/default.castr"),
            ("h:x.caibx", "h:.", "h:.", "x.caibx", "h:./default.castr"),
        ] {
            let file = FileLocation::parse(OsStr::new(text)).unwrap();
            assert_eq!(file.default_store(), default);
            let directory = Location::parse(directory).unwrap();
            let (directory_text, name) = (directory_text.to_owned(), name.to_owned());
            assert_eq!(file, FileLocation::Remote { directory, directory_text, name }, "{text}");
        }
        assert_eq!(FileLocation::parse(OsStr::new("-")), Ok(FileLocation::Stdio));
        for local in [&b"/a/b.caibx"[..], b"b.caibx", b"/a/\xff.caibx"] {
            let local = OsStr::from_bytes(local);
            assert_eq!(FileLocation::parse(local), Ok(FileLocation::Local(local.into())));
        }
        assert_eq!(FileLocation::parse(OsStr::new("/a/b.caibx")).unwrap().default_store(), "/a/default.castr");
        for wrong in ["http://h/t/", "oci+http://h/r/x.caibx", "ftp://h/x"] {
            assert!(FileLocation::parse(OsStr::new(wrong)).is_err(), "{wrong}");
        }
    }

    #[test]
    fn directories_end_with_a_slash() {
        let any = |text: &str| FileLocation::parse_any(OsStr::new(text)).unwrap();
        for (text, shown, store, below) in [
            ("http://u:p@h/i/?t=1", "http://u@h/i/?t=1", "http://u:p@h/i", "http://u@h/i/a%20b/x.caibx?t=1"),
            (
                "s3+http://h/b/p/?lookup=path",
                "s3+http://h/b/p/",
                "s3+http://h/b/p?lookup=path",
                "s3+http://h/b/p/a b/x.caibx",
            ),
            ("gs://b/", "gs://b/", "gs://b", "gs://b/a b/x.caibx"),
            ("sftp://h/p//", "sftp://h/p/", "sftp://h/p", "sftp://h/p/a b/x.caibx"),
        ] {
            let directory = any(text);
            assert!(directory.is_directory(), "{text}");
            assert_eq!(directory.to_string(), shown);
            let file = directory.below(b"a b/x.caibx");
            assert!(!file.is_directory());
            assert_eq!(file.to_string(), below);
            let (path, query) =
                store.split_once('?').map_or((store, String::new()), |(path, query)| (path, format!("?{query}")));
            assert_eq!(file.default_store(), format!("{path}/a%20b/default.castr{query}"));
            assert!(Location::parse(&file.default_store()).is_ok());
        }
        assert_eq!(any("/no/such/"), FileLocation::Local("/no/such/".into()));
        assert!(!any("/no/such/").is_directory() && any("/tmp").is_directory());
        assert_eq!(any("http://h/x.caibx"), FileLocation::parse(OsStr::new("http://h/x.caibx")).unwrap());
        assert!(FileLocation::parse_any(OsStr::new("oci+http://h/r/")).is_err());
    }

    #[test]
    fn a_signed_url_goes_with_its_file() {
        let file = FileLocation::parse(OsStr::new("https://u:p@h/t/x.caibx?sig=abc")).unwrap();
        assert_eq!(file.to_string(), "https://u@h/t/x.caibx?sig=…");
        let FileLocation::Remote { directory: Location::Http(url), .. } = &file else { panic!("{file:?}") };
        assert_eq!(url.query(), Some("sig=abc"));
        assert_eq!(file.default_store(), "https://u:p@h/t/default.castr");
    }
}
