//! What the user typed as a store or an index, turned into what is meant: the only parser of locations.
//!
//! | text | what it is |
//! |---|---|
//! | a path, `file:///path` | a local directory (a path with a `:` before its first `/` is written `./a:b`) |
//! | `http://…`, `https://…` | a web server |
//! | `s3+http://host[:port]/bucket[/prefix][?lookup=auto\|dns\|path]`, `s3+https://…` | an S3 bucket |
//! | `gs://bucket[/prefix]` | a Google Cloud Storage bucket |
//! | `sftp://[user@]host[:port]/path` | a directory over SFTP |
//! | `ssh://[user@]host[:port]/path`, `[user@]host:path` | a directory over the casync protocol |
//! | `oci+http://host/repository`, `oci+https://…` | a registry |
//! | `A\|B` | a group of mirrors ([`split_group`]) |
//! | `-` | standard input or output (indexes only) |
//!
//! A file (an index, an archive) is a store's location, a `/`, and a name: [`file`]. What of all this may be shown: [`secrets`].

pub mod file;
pub mod secrets;

pub use file::{DEFAULT_STORE_NAME, FileLocation};
pub use secrets::without_secrets;

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use url::Url;

/// Where a store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A `.castr` directory.
    Local(PathBuf),
    /// A directory of a web server; the path ends with `/`.
    Http(Url),
    /// An S3 bucket.
    S3(S3Location),
    /// A Google Cloud Storage bucket.
    Gcs {
        /// The bucket.
        bucket: String,
        /// What object names begin with; empty, or without `/` at either end.
        prefix: String,
    },
    /// A directory over SFTP.
    Sftp(SshLocation),
    /// A directory over the casync protocol.
    Ssh(SshLocation),
    /// A repository of a registry.
    Oci(OciLocation),
}

/// An S3 bucket on a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Location {
    /// The server: `http://host:port` or `https://host`.
    pub endpoint: String,
    /// The bucket.
    pub bucket: String,
    /// What object names begin with; empty, or without `/` at either end.
    pub prefix: String,
    /// How the bucket is named in requests.
    pub lookup: Lookup,
}

/// How an S3 bucket is named in requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Lookup {
    /// By host name for servers of AWS and Google, else by path.
    #[default]
    Auto,
    /// `bucket.host`.
    Dns,
    /// `host/bucket`.
    Path,
}

/// A directory on a host that is logged in to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SshLocation {
    /// Who logs in.
    pub user: Option<String>,
    /// The host; never begins with `-`.
    pub host: String,
    /// The port, if it is not the usual one.
    pub port: Option<u16>,
    /// The directory; absolute for URLs.
    pub path: String,
}

/// A repository of a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OciLocation {
    /// The server: `http://host:port` or `https://host`.
    pub registry: String,
    /// The repository, without `/` at either end.
    pub repository: String,
}

/// Why a text is no location.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{shown}: {reason}")]
pub struct LocationError {
    /// The text without secrets.
    shown: String,
    /// What is wrong with it.
    reason: String,
}

impl Location {
    /// Reads a location as typed.
    ///
    /// # Errors
    /// The text is empty, of an unknown scheme, or lacks a part.
    pub fn parse(text: &str) -> Result<Self, LocationError> {
        let refuse = |reason: &str| Err(LocationError { shown: without_secrets(text), reason: reason.to_owned() });
        if text.is_empty() {
            return refuse("a store location cannot be empty");
        }
        let Some((scheme, rest)) = text.split_once("://").filter(|(scheme, _)| is_scheme(scheme)) else {
            return Ok(match ssh_shorthand(text) {
                Some(location) => Self::Ssh(location),
                None => Self::Local(PathBuf::from(text)),
            });
        };
        match scheme {
            "file" => {
                let path = rest.strip_prefix("localhost").unwrap_or(rest);
                if !path.starts_with('/') {
                    return refuse("a file:// URL needs an absolute path");
                }
                let bytes: Vec<u8> = percent_encoding::percent_decode_str(path).collect();
                return Ok(Self::Local(PathBuf::from(OsStr::from_bytes(&bytes))));
            }
            "http" | "https" | "s3+http" | "s3+https" | "gs" | "sftp" | "ssh" | "oci+http" | "oci+https" => {}
            other => {
                return refuse(&format!(
                    "unknown scheme {other}:// (known are file, http, https, s3+http, s3+https, gs, sftp, ssh, oci+http, oci+https)"
                ));
            }
        }
        // Schemes with a + are no "special" ones to the URL standard, so the part behind it is what is read.
        let (plain_scheme, address) = match scheme.split_once('+') {
            Some((_, transport)) => (transport, format!("{transport}://{rest}")),
            None => (scheme, text.to_owned()),
        };
        let url = match Url::parse(&address) {
            Ok(url) => url,
            Err(error) => return refuse(&format!("not a URL: {error}")),
        };
        let Some(host) = url.host_str().filter(|host| !host.is_empty()) else {
            return refuse("the URL names no host");
        };
        let decoded = percent_encoding::percent_decode_str(url.path()).decode_utf8_lossy().into_owned();
        let path = decoded.trim_matches('/');
        let server = match url.port() {
            Some(port) => format!("{plain_scheme}://{host}:{port}"),
            None => format!("{plain_scheme}://{host}"),
        };
        match scheme {
            "http" | "https" => {
                let mut url = url;
                if !url.path().ends_with('/') {
                    let path = format!("{}/", url.path());
                    url.set_path(&path);
                }
                url.set_fragment(None);
                Ok(Self::Http(url))
            }
            "s3+http" | "s3+https" => {
                let (bucket, prefix) = path.split_once('/').unwrap_or((path, ""));
                if bucket.is_empty() {
                    return refuse("the URL names no bucket (s3+https://host/bucket/prefix)");
                }
                let mut lookup = Lookup::Auto;
                for (name, value) in url.query_pairs() {
                    lookup = match (name.as_ref(), value.as_ref()) {
                        ("lookup", "auto" | "") => Lookup::Auto,
                        ("lookup", "dns") => Lookup::Dns,
                        ("lookup", "path") => Lookup::Path,
                        ("lookup", other) => {
                            return refuse(&format!("unknown lookup '{other}' (use auto, dns or path)"));
                        }
                        _ => lookup,
                    };
                }
                let (bucket, prefix) = (bucket.to_owned(), prefix.to_owned());
                Ok(Self::S3(S3Location { endpoint: server, bucket, prefix, lookup }))
            }
            "gs" => Ok(Self::Gcs { bucket: host.to_owned(), prefix: path.to_owned() }),
            "oci+http" | "oci+https" => match path.is_empty() {
                true => refuse("the URL names no repository (oci+https://host/repository)"),
                false => Ok(Self::Oci(OciLocation { registry: server, repository: path.to_owned() })),
            },
            _ => {
                if host.starts_with('-') {
                    return refuse("a host name cannot begin with '-'");
                }
                let user = match url.username() {
                    "" => None,
                    user => Some(percent_encoding::percent_decode_str(user).decode_utf8_lossy().into_owned()),
                };
                if user.as_ref().is_some_and(|user| user.starts_with('-')) {
                    return refuse("a user name cannot begin with '-'");
                }
                let path = if decoded.is_empty() { "/".to_owned() } else { decoded };
                // An IPv6 address is written in brackets in a URL and without them to ssh.
                let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
                let location = SshLocation { user, host, port: url.port(), path };
                Ok(if scheme == "sftp" { Self::Sftp(location) } else { Self::Ssh(location) })
            }
        }
    }

    /// Whether it is a local directory.
    pub fn local_path(&self) -> Option<&Path> {
        match self {
            Self::Local(path) => Some(path),
            _ => None,
        }
    }
}

/// The location as it may be shown, without secrets.
impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(path) => write!(f, "{}", path.display()),
            Self::Http(url) => f.write_str(without_secrets(url.as_str()).trim_end_matches('/')),
            Self::S3(S3Location { endpoint, bucket, prefix, .. }) => {
                write!(f, "s3+{endpoint}/{bucket}")?;
                if prefix.is_empty() { Ok(()) } else { write!(f, "/{prefix}") }
            }
            Self::Gcs { bucket, prefix } if prefix.is_empty() => write!(f, "gs://{bucket}"),
            Self::Gcs { bucket, prefix } => write!(f, "gs://{bucket}/{prefix}"),
            Self::Sftp(location) => write!(f, "sftp://{location}"),
            Self::Ssh(location) => write!(f, "ssh://{location}"),
            Self::Oci(OciLocation { registry, repository }) => write!(f, "oci+{registry}/{repository}"),
        }
    }
}

impl fmt::Display for SshLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(user) = &self.user {
            write!(f, "{user}@")?;
        }
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        f.write_str(&host)?;
        if let Some(port) = self.port {
            write!(f, ":{port}")?;
        }
        let slash = if self.path.starts_with('/') { "" } else { "/" };
        write!(f, "{slash}{}", self.path)
    }
}

/// The members of a group of mirrors, in order; a location that is no group is its only member.
pub fn split_group(text: &str) -> impl Iterator<Item = &str> {
    text.split('|').map(str::trim).filter(|member| !member.is_empty())
}

/// `HOST:path` or `USER@HOST:path`, as casync reads it (formats.md 9): a path before the colon, or none behind it, makes it a local path.
fn ssh_shorthand(text: &str) -> Option<SshLocation> {
    let (login, path) = text.split_once(':')?;
    let (user, host) = match login.split_once('@') {
        Some((user, host)) => (Some(user), host),
        None => (None, login),
    };
    let is_word = |word: &str| {
        !word.is_empty()
            && !word.starts_with(['-', '.'])
            && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.%".contains(&byte))
    };
    (is_word(host) && user.is_none_or(is_word) && !path.is_empty()).then(|| SshLocation {
        user: user.map(str::to_owned),
        host: host.to_owned(),
        port: None,
        path: path.to_owned(),
    })
}

/// Whether the text before `://` can be a URL scheme (RFC 3986, 3.1), so that a path with `://` in it stays a path.
fn is_scheme(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn ssh(user: Option<&str>, host: &str, port: Option<u16>, path: &str) -> SshLocation {
        SshLocation { user: user.map(str::to_owned), host: host.to_owned(), port, path: path.to_owned() }
    }

    fn s3(endpoint: &str, bucket: &str, prefix: &str, lookup: Lookup) -> Location {
        let (endpoint, bucket, prefix) = (endpoint.to_owned(), bucket.to_owned(), prefix.to_owned());
        Location::S3(S3Location { endpoint, bucket, prefix, lookup })
    }

    #[test]
    fn paths_and_file_urls_are_local() {
        for (text, path) in [
            ("/srv/store", "/srv/store"),
            ("store.castr", "store.castr"),
            ("./a b:c", "./a b:c"),
            ("a b:c", "a b:c"),
            ("host:", "host:"),
            (":path", ":path"),
            ("/odd://path", "/odd://path"),
            ("file:///srv/store", "/srv/store"),
            ("file:///srv/a%20b", "/srv/a b"),
            ("file://localhost/srv/store", "/srv/store"),
        ] {
            assert_eq!(Location::parse(text), Ok(Location::Local(path.into())), "{text}");
        }
    }

    #[test]
    fn every_scheme_is_read() {
        let oci = |registry: &str, repository: &str| {
            Location::Oci(OciLocation { registry: registry.to_owned(), repository: repository.to_owned() })
        };
        for (text, location) in [
            ("http://h:80/a/b", Location::Http(Url::parse("http://h/a/b/").unwrap())),
            ("https://h", Location::Http(Url::parse("https://h/").unwrap())),
            ("s3+http://127.0.0.1:9000/bkt/a/b/?lookup=path", s3("http://127.0.0.1:9000", "bkt", "a/b", Lookup::Path)),
            ("s3+https://s3.amazonaws.com/bkt", s3("https://s3.amazonaws.com", "bkt", "", Lookup::Auto)),
            ("s3+https://h/b?lookup=dns", s3("https://h", "b", "", Lookup::Dns)),
            ("gs://bkt/a/b", Location::Gcs { bucket: "bkt".into(), prefix: "a/b".into() }),
            ("gs://bkt", Location::Gcs { bucket: "bkt".into(), prefix: String::new() }),
            ("sftp://u@h:2222/a/b", Location::Sftp(ssh(Some("u"), "h", Some(2222), "/a/b"))),
            ("ssh://h/a%20b", Location::Ssh(ssh(None, "h", None, "/a b"))),
            ("h:/a", Location::Ssh(ssh(None, "h", None, "/a"))),
            ("u@h.example:a/b", Location::Ssh(ssh(Some("u"), "h.example", None, "a/b"))),
            ("oci+http://127.0.0.1:5000/a/b", oci("http://127.0.0.1:5000", "a/b")),
            ("oci+https://h/a/", oci("https://h", "a")),
        ] {
            assert_eq!(Location::parse(text), Ok(location), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_without_secrets() {
        for (text, what) in [
            ("", "empty"),
            ("file://relative/store", "absolute"),
            ("ftp://u:secret@h/store", "unknown scheme ftp://"),
            ("s3+http://u:secret@h/", "no bucket"),
            ("s3+http://h/b?lookup=x", "unknown lookup 'x'"),
            ("oci+https://h", "no repository"),
            ("https://", "not a URL"),
            ("gs:///x", "no host"),
            ("ssh://-oProxyCommand=x/y", "cannot begin with '-'"),
            ("sftp://-l@h/y", "cannot begin with '-'"),
        ] {
            let message = Location::parse(text).expect_err(text).to_string();
            assert!(message.contains(what) && !message.contains("secret"), "{message}");
        }
    }

    #[test]
    fn groups_are_split() {
        assert_eq!(split_group("http://a/x | /b|").collect::<Vec<_>>(), ["http://a/x", "/b"]);
        assert_eq!(split_group("/b").collect::<Vec<_>>(), ["/b"]);
    }
}
