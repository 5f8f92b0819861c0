//! Indexes over HTTP, as desync's index server gives and takes them (formats.md 6.3), plain archives, and what lies beside both.
//!
//! The last part of a path is the name; what stands before it does not matter. An index is sent only if it is one; it is looked at
//! once for each of its versions. A `.catar` is sent as it is, and so is what lies beside an index or archive. All can be read by
//! ranges and are told apart by ETag, so that an archive can be mounted from here and a mount notices when what it reads was replaced.
//!
//! A path that ends with `/` is the list of all indexes and archives ([`listing`]), behind the same authorization as they are, so that all
//! can be mounted as one directory. desync's server has no such list.
//!
//! Invariant: what is uploaded is a sound index of the right digest, or what its name says that lies beside one, before it is kept.

use std::fmt;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{StreamExt, stream};
use hyper::header::{ACCEPT_RANGES, CONTENT_RANGE, ETAG, HeaderValue, IF_NONE_MATCH, IF_RANGE, RANGE};
use hyper::http::request::Parts;
use hyper::{Method, StatusCode};
use lru::LruCache;
use tokio::sync::Semaphore;

use super::beside::Beside;
use super::http::{Answer, Body, Service};
use crate::digest::Digest;
use crate::format::index::Index;
use crate::store::files::{ReadWhole, WholeFile};
use crate::store::{FileInfo, FileStore, FileVersion, Listed, StoreError, listing};

/// The longest index that is read or taken, in bytes: 26 million chunks, which is more than a TiB in chunks of the usual size.
const MAX_INDEX_BYTES: u64 = 1 << 30;

/// How much of a file is read at a time, in bytes.
const PIECE_BYTES: u64 = 1 << 20;

/// How many indexes are remembered as looked at.
const N_CHECKED: NonZeroUsize = NonZeroUsize::new(1024).expect("it is not zero");

/// How many files are read as a whole at a time: that takes memory.
const MAX_CHECKING: usize = 2;

/// What names of archives end with.
const ARCHIVE_SUFFIX: &str = ".catar";

/// What the names of files in the list end with.
const LISTED_SUFFIXES: [&str; 3] = [".caibx", ".caidx", ARCHIVE_SUFFIX];

/// The service.
pub struct IndexServer {
    files: Arc<dyn FileStore>,
    /// What makes the ids in indexes that are uploaded.
    digest: Digest,
    is_writable: bool,
    /// The versions that are sound indexes. Never held over I/O or await.
    checked: Mutex<LruCache<String, FileVersion>>,
    checking: Semaphore,
}

impl fmt::Debug for IndexServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IndexServer").field("files", &self.files).field("is_writable", &self.is_writable).finish()
    }
}

impl IndexServer {
    /// A service over files. Only indexes with ids of this digest are taken.
    pub fn new(files: Arc<dyn FileStore>, digest: Digest, is_writable: bool) -> Self {
        let checked = Mutex::new(LruCache::new(N_CHECKED));
        Self { files, digest, is_writable, checked, checking: Semaphore::new(MAX_CHECKING) }
    }

    async fn get(&self, name: &str, head: &Parts) -> Answer {
        let info = match self.files.stat(name).await {
            Ok(Some(info)) => info,
            Ok(None) => return missing(name),
            Err(error) => return self.unreadable(name, &error),
        };
        let etag = info.version.as_ref().map(etag);
        if let Some(etag) = &etag
            && names_etag(head, etag)
        {
            return Answer::empty(StatusCode::NOT_MODIFIED).with(ETAG, etag.clone());
        }
        let read = match Beside::of(name) {
            Some(beside) => self.whole_beside(name, beside, info).await,
            None if !name.ends_with(ARCHIVE_SUFFIX) => self.checked_index(name, info).await,
            None if info.has_ranges => Ok(Some((info, None))),
            None => {
                return Answer::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{name} cannot be read by ranges"));
            }
        };
        let (info, bytes) = match read {
            Ok(Some(read)) => read,
            Ok(None) => return missing(name),
            Err(answer) => return *answer,
        };
        let etag = info.version.as_ref().map(self::etag);
        let (range, is_part) = match wanted_range(head, info.size, etag.as_ref()) {
            Wanted::All => (0..info.size, false),
            Wanted::Part(range) => (range, true),
            Wanted::Nothing => {
                return Answer::text(StatusCode::RANGE_NOT_SATISFIABLE, "no byte of that range is in the file")
                    .with(CONTENT_RANGE, header(format!("bytes */{}", info.size)));
            }
        };
        let body = match bytes {
            Some(bytes) => Body::Bytes(bytes.slice(range.start as usize..range.end as usize)),
            None if head.method == Method::HEAD => {
                Body::Stream { n_bytes: range.end - range.start, pieces: stream::empty().boxed() }
            }
            None => self.stream(name, range.clone(), info.version),
        };
        let mut answer =
            Answer::content("application/octet-stream", body).with(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        answer.headers.extend(etag.map(|etag| (ETAG, etag)));
        if is_part {
            answer.status = StatusCode::PARTIAL_CONTENT;
            let shown = format!("bytes {}-{}/{}", range.start, range.end - 1, info.size);
            answer = answer.with(CONTENT_RANGE, header(shown));
        }
        answer
    }

    /// Whether this version of a file has been looked at, and can be read by ranges.
    fn is_checked(&self, name: &str, info: &FileInfo) -> bool {
        let mut checked = self.checked.lock().unwrap_or_else(PoisonError::into_inner);
        has_safe_ranges(info) && checked.get(name) == info.version.as_ref()
    }

    /// Reads an index and looks at all of it. One that is known to be sound is not read: its bytes are `None`.
    async fn checked_index(
        &self,
        name: &str,
        info: FileInfo,
    ) -> Result<Option<(FileInfo, Option<Bytes>)>, Box<Answer>> {
        if self.is_checked(name, &info) {
            return Ok(Some((info, None)));
        }
        let _permit = self.checking.acquire().await;
        // Others may have done it meanwhile.
        if self.is_checked(name, &info) {
            return Ok(Some((info, None)));
        }
        let Some(whole) = self.read_whole(name, MAX_INDEX_BYTES).await? else { return Ok(None) };
        match check_index(whole.bytes.clone(), None).await {
            Ok(()) => {
                if let Some(version) = whole.info.version.clone() {
                    let mut checked = self.checked.lock().unwrap_or_else(PoisonError::into_inner);
                    checked.put(name.to_owned(), version);
                }
                Ok(Some((whole.info, Some(whole.bytes))))
            }
            Err(reason) => {
                tracing::warn!("{}: {name}: no sound index: {reason}", self.files.name());
                Err(Box::new(Answer::text(StatusCode::BAD_REQUEST, format!("{name} is no sound index: {reason}"))))
            }
        }
    }

    /// Reads what lies beside an index as a whole. What can be read by ranges is not: its bytes are `None`.
    async fn whole_beside(
        &self,
        name: &str,
        beside: Beside,
        info: FileInfo,
    ) -> Result<Option<(FileInfo, Option<Bytes>)>, Box<Answer>> {
        if has_safe_ranges(&info) {
            return Ok(Some((info, None)));
        }
        let _permit = self.checking.acquire().await;
        let whole = self.read_whole(name, beside.max_bytes()).await?;
        Ok(whole.map(|whole| (whole.info, Some(whole.bytes))))
    }

    async fn read_whole(&self, name: &str, max_bytes: u64) -> Result<Option<WholeFile>, Box<Answer>> {
        match self.files.read_whole(name, None, max_bytes).await {
            Ok(ReadWhole::Content(whole)) => Ok(Some(whole)),
            Ok(ReadWhole::Missing | ReadWhole::Unchanged) => Ok(None),
            Err(error) => Err(Box::new(self.unreadable(name, &error))),
        }
    }

    fn stream(&self, name: &str, range: Range<u64>, version: Option<FileVersion>) -> Body {
        let n_bytes = range.end - range.start;
        let (files, name) = (Arc::clone(&self.files), name.to_owned());
        let pieces = stream::try_unfold(range.start, move |start| {
            let (files, name, version) = (Arc::clone(&files), name.clone(), version.clone());
            async move {
                if start == range.end {
                    return Ok(None);
                }
                let end = range.end.min(start + PIECE_BYTES);
                let piece = files.read_range(&name, start..end, version.as_ref()).await?;
                Ok(Some((piece, end)))
            }
        });
        Body::Stream { n_bytes, pieces: pieces.boxed() }
    }

    /// What can be asked for by name: the files whose names are those of indexes and archives. Each has the ETag that an answer has, so
    /// that a reader of the list knows which have changed.
    async fn list(&self) -> Answer {
        let listed = match self.files.list("").await {
            Ok(listed) => listed.unwrap_or_default(),
            Err(error) => return self.unreadable("the list", &error),
        };
        let mut listed: Vec<Listed> = listed
            .into_iter()
            .filter(|listed| !listed.is_directory && !listed.name.starts_with('.') && is_listed(&listed.name))
            .collect();
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        for listed in &mut listed {
            let tag = listed.version.as_ref().map(etag);
            listed.version = tag.and_then(|tag| Some(FileVersion(tag.to_str().ok()?.to_owned())));
        }
        Answer::content("application/json", Body::Bytes(listing::to_json(&listed).into()))
    }

    async fn put(&self, name: &str, body: Bytes) -> Answer {
        let (what, checked) = match Beside::of(name) {
            Some(beside) => (beside.word(), beside.check(body.clone()).await),
            None => ("index", Ok(check_index(body.clone(), Some(self.digest)).await)),
        };
        match checked {
            Ok(Ok(())) => {}
            Ok(Err(reason)) => {
                let why = format!("{name} is no sound {what}: {reason}");
                return Answer::text(StatusCode::UNSUPPORTED_MEDIA_TYPE, why);
            }
            Err(error) => {
                tracing::warn!("{name}: it cannot be checked: {error}");
                return Answer::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{name} cannot be checked"));
            }
        }
        match self.files.write(name, body).await {
            Ok(()) => Answer::empty(StatusCode::OK),
            Err(error) => {
                tracing::warn!("{error}");
                Answer::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{name} cannot be stored"))
            }
        }
    }

    /// As desync, which calls everything 400 that is there and cannot be read; but for what may pass.
    fn unreadable(&self, name: &str, error: &StoreError) -> Answer {
        tracing::warn!("{error}");
        let status = match error.is_transient {
            true => StatusCode::INTERNAL_SERVER_ERROR,
            false => StatusCode::BAD_REQUEST,
        };
        Answer::text(status, format!("{name} cannot be read (the server's log tells why)"))
    }
}

impl Service for IndexServer {
    fn admit(&self, head: &Parts) -> Result<u64, Box<Answer>> {
        let name = match name_of(head) {
            Err(_) if is_list(head) => return Ok(0),
            name => name?,
        };
        match head.method {
            Method::GET | Method::HEAD => Ok(0),
            Method::PUT if self.is_writable => Ok(Beside::of(&name).map_or(MAX_INDEX_BYTES, Beside::max_bytes)),
            Method::PUT => Err(Box::new(Answer::text(
                StatusCode::BAD_REQUEST,
                "this server takes no indexes (it is started without --writable)",
            ))),
            _ => Err(Box::new(Answer::method_not_allowed("GET, HEAD, PUT"))),
        }
    }

    fn answer<'a>(&'a self, head: &'a Parts, body: Bytes) -> BoxFuture<'a, Answer> {
        Box::pin(async move {
            match (name_of(head), &head.method) {
                (Err(_), _) if is_list(head) => self.list().await,
                (Err(answer), _) => *answer,
                (Ok(name), &Method::PUT) => self.put(&name, body).await,
                (Ok(name), _) => self.get(&name, head).await,
            }
        })
    }
}

/// Whether a request is for the list: it reads a path that ends with `/`. As with names, only what is behind the last `/` counts.
fn is_list(head: &Parts) -> bool {
    head.uri.path().ends_with('/') && matches!(head.method, Method::GET | Method::HEAD)
}

/// Whether a file of this name is told of: what a reader could not use is not.
fn is_listed(name: &str) -> bool {
    LISTED_SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
}

/// Whether a file can be read by ranges without fear that it becomes another meanwhile.
fn has_safe_ranges(info: &FileInfo) -> bool {
    info.version.is_some() && info.has_ranges
}

/// The name that a request is for: the last part of its path, which must be a name and nothing that leads elsewhere.
fn name_of(head: &Parts) -> Result<String, Box<Answer>> {
    let last = head.uri.path().rsplit('/').next().unwrap_or_default();
    let decoded = percent_encoding::percent_decode_str(last).decode_utf8();
    match decoded.as_deref() {
        Ok("" | "." | "..") | Err(_) => {}
        Ok(name) if name.contains(['/', '\\', '\0']) => {}
        Ok(name) => return Ok(name.to_owned()),
    }
    Err(Box::new(Answer::text(StatusCode::BAD_REQUEST, "expected the name of an index")))
}

/// Whether bytes are a sound index, with ids of a digest if one is given. It goes over every chunk, so not on a thread that others wait for.
async fn check_index(bytes: Bytes, digest: Option<Digest>) -> Result<(), String> {
    let checking = tokio::task::spawn_blocking(move || {
        let index = Index::open(bytes).map_err(|error| error.to_string())?;
        index.check().map_err(|error| error.to_string())?;
        match digest {
            Some(wanted) if wanted != index.digest() => {
                Err(format!("its chunk ids are {}, and {} is wanted", index.digest().name(), wanted.name()))
            }
            _ => Ok(()),
        }
    });
    checking.await.unwrap_or_else(|error| Err(error.to_string()))
}

/// A version as an ETag. What a store calls a version can have any characters, so it is hashed.
fn etag(version: &FileVersion) -> HeaderValue {
    header(format!("\"{}\"", &Digest::Sha256.id(version.0.as_bytes()).to_hex()[..32]))
}

fn header(text: String) -> HeaderValue {
    HeaderValue::try_from(text).expect("hex digits, numbers and plain words make a header")
}

/// Whether the client says that it has this version.
fn names_etag(head: &Parts, etag: &HeaderValue) -> bool {
    head.headers.get_all(IF_NONE_MATCH).iter().any(|value| {
        let mut tags = value.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
        tags.any(|tag| tag == b"*" || tag.strip_prefix(b"W/").unwrap_or(tag) == etag.as_bytes())
    })
}

/// What of a file is wanted.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    All,
    Part(Range<u64>),
    /// A range that lies outside.
    Nothing,
}

/// Reads the Range header. What is no single range of bytes is ignored, as it may be; so is one for another version.
fn wanted_range(head: &Parts, size: u64, etag: Option<&HeaderValue>) -> Wanted {
    if head.method != Method::GET || head.headers.get(IF_RANGE).is_some_and(|tag| Some(tag) != etag) {
        return Wanted::All;
    }
    let range = head.headers.get(RANGE).and_then(|value| value.to_str().ok());
    let Some((first, last)) = range.and_then(|range| range.strip_prefix("bytes=")?.trim().split_once('-')) else {
        return Wanted::All;
    };
    let range = match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), Ok(last)) if first <= last => first..size.min(last.saturating_add(1)),
        (Ok(first), Err(_)) if last.is_empty() => first..size,
        (Err(_), Ok(n_last)) if first.is_empty() => size.saturating_sub(n_last)..size,
        _ => return Wanted::All,
    };
    match range.start < range.end {
        true => Wanted::Part(range),
        false => Wanted::Nothing,
    }
}

fn missing(name: &str) -> Answer {
    let what = if Beside::of(name).is_some() { "" } else { "index " };
    Answer::text(StatusCode::NOT_FOUND, format!("{what}{name} not found"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn head(path: &str, headers: &[(&str, &str)]) -> Parts {
        let request =
            headers.iter().fold(hyper::Request::get(path), |request, (name, value)| request.header(*name, *value));
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn a_name_is_the_last_part_of_a_path() {
        for (path, wanted) in [
            ("/x.caibx", Some("x.caibx")),
            ("/any/prefix/x.caibx", Some("x.caibx")),
            ("//metrics", Some("metrics")),
            ("/a%20b%25", Some("a b%")),
            ("/x?y=../z", Some("x")),
            ("/...", Some("...")),
            ("/", None),
            ("/x/", None),
            ("/.", None),
            ("/..", None),
            ("/%2e%2e", None),
            ("/a%2fb", None),
            ("/..%2fb", None),
            ("/a%5cb", None),
            ("/a%00b", None),
            ("/%ff", None),
        ] {
            assert_eq!(name_of(&head(path, &[])).ok().as_deref(), wanted, "{path}");
        }
    }

    #[test]
    fn single_ranges_are_understood() {
        for (range, wanted) in [
            ("bytes=0-0", Wanted::Part(0..1)),
            ("bytes=2-", Wanted::Part(2..10)),
            ("bytes=2-99", Wanted::Part(2..10)),
            ("bytes=9-18446744073709551615", Wanted::Part(9..10)),
            ("bytes=-3", Wanted::Part(7..10)),
            ("bytes=-99", Wanted::Part(0..10)),
            ("bytes=10-", Wanted::Nothing),
            ("bytes=-0", Wanted::Nothing),
            ("bytes=3-2", Wanted::All),
            ("bytes=0-1,3-4", Wanted::All),
            ("items=0-1", Wanted::All),
            ("bytes=-", Wanted::All),
        ] {
            assert_eq!(wanted_range(&head("/x", &[("range", range)]), 10, None), wanted, "{range}");
        }
        assert_eq!(wanted_range(&head("/x", &[("range", "bytes=0-")]), 0, None), Wanted::Nothing);
        let tag = HeaderValue::from_static("\"a\"");
        let with = |tag| head("/x", &[("range", "bytes=1-2"), ("if-range", tag)]);
        assert_eq!(wanted_range(&with("\"a\""), 10, Some(&tag)), Wanted::Part(1..3));
        assert_eq!(wanted_range(&with("\"b\""), 10, Some(&tag)), Wanted::All);
    }

    #[test]
    fn a_version_the_client_has_is_recognised() {
        let tag = HeaderValue::from_static("\"a\"");
        for (value, wanted) in [("\"a\"", true), ("\"b\", W/\"a\"", true), ("*", true), ("\"b\"", false), ("a", false)]
        {
            assert_eq!(names_etag(&head("/x", &[("if-none-match", value)]), &tag), wanted, "{value}");
        }
    }
}
