//! Whole files of a web server: [`FileStore`] by HEAD, conditional GET, ranges and PUT.
//!
//! A version is the file's strong ETag, or else its `Last-Modified` and size; a weak ETag does not promise equal bytes. Ranges
//! are asked with `If-Range` for an ETag, and what comes is checked in any case: the server may know none of it.

use std::ops::Range;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use reqwest::header::{
    ACCEPT_RANGES, CONTENT_RANGE, ETAG, HeaderMap, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, LAST_MODIFIED, RANGE,
};
use reqwest::{Method, Response, StatusCode};

use super::exchange::{content_length, http_date, is_missing, text};
use super::{HttpStore, Object};
use crate::store::files::{FileInfo, FileStore, FileVersion, Listed, ReadWhole, WholeFile, changed};
use crate::store::retry::{Failure, retry};
use crate::store::{Store, StoreError};

impl FileStore for HttpStore {
    fn name(&self) -> &str {
        Store::name(self)
    }

    fn stat<'a>(&'a self, file: &'a str) -> BoxFuture<'a, Result<Option<FileInfo>, StoreError>> {
        Box::pin(async move {
            let object = self.object(file)?;
            retry(self.exchange.retry, |_| self.stat_once(&object)).await
        })
    }

    fn list<'a>(&'a self, directory: &'a str) -> BoxFuture<'a, Result<Option<Vec<Listed>>, StoreError>> {
        Box::pin(self.list_directory(directory))
    }

    fn read_whole<'a>(
        &'a self,
        file: &'a str,
        known: Option<&'a FileVersion>,
        max_bytes: u64,
    ) -> BoxFuture<'a, Result<ReadWhole, StoreError>> {
        Box::pin(async move {
            let object = self.object(file)?;
            retry(self.exchange.retry, |_| self.read_whole_once(&object, known, max_bytes)).await
        })
    }

    fn read_range<'a>(
        &'a self,
        file: &'a str,
        range: Range<u64>,
        version: Option<&'a FileVersion>,
    ) -> BoxFuture<'a, Result<Bytes, StoreError>> {
        Box::pin(async move {
            let object = self.object(file)?;
            if range.is_empty() {
                return Ok(Bytes::new());
            }
            retry(self.exchange.retry, |_| self.read_range_once(&object, range.clone(), version)).await
        })
    }

    fn write<'a>(&'a self, file: &'a str, bytes: Bytes) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move { self.put_object(&self.object(file)?, bytes).await })
    }
}

impl HttpStore {
    async fn stat_once(&self, object: &Object) -> Result<Option<FileInfo>, Failure> {
        let response = self.send(self.request(Method::HEAD, object), object).await?;
        match response.status() {
            StatusCode::OK => {}
            status if is_missing(status) => return Ok(None),
            // A URL signed for GET, or a server that knows no HEAD.
            StatusCode::FORBIDDEN | StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED => {
                return self.probe(object, None).await;
            }
            _ => return Err(self.refusal(response, object).await),
        }
        let headers = response.headers();
        match (content_length(headers), text(headers, ACCEPT_RANGES)) {
            (Some(size), Some(unit)) => Ok(Some(info(headers, size, unit.eq_ignore_ascii_case("bytes")))),
            // A server that does not say whether it has ranges (or how long the file is) says so when it is asked for one byte.
            (size, _) => self.probe(object, size.map(|size| info(headers, size, false))).await,
        }
    }

    /// What an answer to a request for the first byte tells; `known` is what HEAD told.
    async fn probe(&self, object: &Object, known: Option<FileInfo>) -> Result<Option<FileInfo>, Failure> {
        let response = self.send(self.request(Method::GET, object).header(RANGE, "bytes=0-0"), object).await?;
        let headers = response.headers();
        let size = match response.status() {
            StatusCode::PARTIAL_CONTENT => match content_range(headers) {
                Some((_, Some(size))) => return Ok(Some(info(headers, size, true))),
                _ => None,
            },
            StatusCode::OK => content_length(headers),
            // An empty file has no first byte.
            StatusCode::RANGE_NOT_SATISFIABLE if known.as_ref().is_none_or(|known| known.size == 0) => Some(0),
            status if is_missing(status) => return Ok(None),
            _ if known.is_some() => return Ok(known),
            _ => return Err(self.refusal(response, object).await),
        };
        match (known, size) {
            (Some(known), _) => Ok(Some(known)),
            (None, Some(size)) => Ok(Some(info(headers, size, false))),
            (None, None) => {
                Err(self.exchange.permanent(&object.shown, "the server does not tell how long the file is"))
            }
        }
    }

    async fn read_whole_once(
        &self,
        object: &Object,
        known: Option<&FileVersion>,
        max_bytes: u64,
    ) -> Result<ReadWhole, Failure> {
        let mut request = self.request(Method::GET, object);
        match known.map(Condition::of) {
            Some(Condition::ETag(etag)) => request = request.header(IF_NONE_MATCH, etag),
            Some(Condition::Modified(date)) => request = request.header(IF_MODIFIED_SINCE, date),
            Some(Condition::None) | None => {}
        }
        let response = self.send(request, object).await?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::NOT_MODIFIED if known.is_some() => return Ok(ReadWhole::Unchanged),
            status if is_missing(status) => return Ok(ReadWhole::Missing),
            _ => return Err(self.refusal(response, object).await),
        }
        let headers = response.headers().clone();
        if let (Some(known), Some(size)) = (known, content_length(&headers))
            && version(&headers, size).as_ref() == Some(known)
        {
            return Ok(ReadWhole::Unchanged);
        }
        let limit = "this file may have";
        let bytes = self.exchange.body(response, &object.shown, max_bytes, limit).await?;
        let has_ranges = text(&headers, ACCEPT_RANGES).is_some_and(|unit| unit.eq_ignore_ascii_case("bytes"));
        let info = info(&headers, bytes.len() as u64, has_ranges);
        Ok(ReadWhole::Content(WholeFile { bytes, info }))
    }

    async fn read_range_once(
        &self,
        object: &Object,
        range: Range<u64>,
        wanted: Option<&FileVersion>,
    ) -> Result<Bytes, Failure> {
        let last = range.end - 1;
        let mut request = self.request(Method::GET, object).header(RANGE, format!("bytes={}-{last}", range.start));
        let condition = wanted.map_or(Condition::None, Condition::of);
        if let Condition::ETag(etag) = condition {
            request = request.header(IF_RANGE, etag);
        }
        let response = self.send(request, object).await?;
        let is_changed = || -> Failure { changed(&self.exchange.name, &object.shown).into() };
        match response.status() {
            StatusCode::PARTIAL_CONTENT => {}
            StatusCode::OK => return Err(self.answered_whole(&response, object, wanted)),
            StatusCode::RANGE_NOT_SATISFIABLE if wanted.is_some() => return Err(is_changed()),
            _ => return Err(self.refusal(response, object).await),
        }
        let headers = response.headers();
        let (sent, size) = match content_range(headers) {
            Some(told) => told,
            None => return Err(self.exchange.permanent(&object.shown, "the server does not tell which range it sent")),
        };
        // What an answer to If-Range does not repeat (RFC 9110, 15.3.7) is as it was asked for; a date is not asked for, so it must be there.
        let is_other = match (&condition, wanted) {
            (Condition::ETag(etag), _) => text(headers, ETAG).is_some_and(|found| found != *etag),
            (_, Some(wanted)) => size.and_then(|size| version(headers, size)).as_ref() != Some(wanted),
            (_, None) => false,
        };
        if is_other || (sent != range && wanted.is_some()) {
            return Err(is_changed());
        }
        if sent != range {
            let reason = format!(
                "asked for bytes {}-{last}, the server sent {}-{}",
                range.start,
                sent.start,
                sent.end.saturating_sub(1)
            );
            return Err(self.exchange.permanent(&object.shown, reason));
        }
        let n = range.end - range.start;
        let bytes = self.exchange.body(response, &object.shown, n, "was asked for").await?;
        match bytes.len() as u64 == n {
            true => Ok(bytes),
            false => {
                let reason = format!("the answer was cut off: {} bytes of {n}", bytes.len());
                Err(StoreError::transient(&self.exchange.name, &object.shown, reason).into())
            }
        }
    }

    /// The error for a whole file in answer to a range: another version (If-Range), or a server without ranges.
    fn answered_whole(&self, response: &Response, object: &Object, wanted: Option<&FileVersion>) -> Failure {
        let found = content_length(response.headers()).and_then(|size| version(response.headers(), size));
        match wanted.is_some() && found.as_ref() != wanted {
            true => changed(&self.exchange.name, &object.shown).into(),
            false => self.exchange.permanent(&object.shown, "the server cannot send a part of a file"),
        }
    }
}

/// How a version is asked for.
enum Condition<'a> {
    /// By a strong ETag.
    ETag(&'a str),
    /// By a date.
    Modified(&'a str),
    /// Not at all: the version is another store's.
    None,
}

impl<'a> Condition<'a> {
    fn of(version: &'a FileVersion) -> Self {
        let text = version.0.as_str();
        if text.starts_with('"') {
            return Self::ETag(text);
        }
        match text.rsplit_once(' ') {
            Some((date, size)) if size.bytes().all(|byte| byte.is_ascii_digit()) => Self::Modified(date),
            _ => Self::None,
        }
    }
}

/// `"etag"`, or `<Last-Modified> <size>`.
fn version(headers: &HeaderMap, size: u64) -> Option<FileVersion> {
    match text(headers, ETAG).filter(|etag| etag.len() >= 2 && etag.starts_with('"') && etag.ends_with('"')) {
        Some(etag) => Some(FileVersion(etag.to_owned())),
        None => text(headers, LAST_MODIFIED).map(|date| FileVersion(format!("{date} {size}"))),
    }
}

fn info(headers: &HeaderMap, size: u64, has_ranges: bool) -> FileInfo {
    let mtime = text(headers, LAST_MODIFIED).and_then(http_date);
    FileInfo { size, version: version(headers, size), mtime, has_ranges }
}

/// The range and, if the server knows it, the size in `Content-Range: bytes 0-9/100`.
fn content_range(headers: &HeaderMap) -> Option<(Range<u64>, Option<u64>)> {
    let (range, size) = text(headers, CONTENT_RANGE)?.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let range = first.trim().parse().ok()?..last.trim().parse::<u64>().ok()?.checked_add(1)?;
    Some((range, size.trim().parse().ok()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use reqwest::header::{HeaderName, HeaderValue};

    use super::*;

    fn headers(pairs: &[(HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), HeaderValue::from_str(value).unwrap())).collect()
    }

    #[test]
    fn a_version_is_a_strong_etag_or_date_and_size() {
        let date = "Sun, 06 Nov 1994 08:49:37 GMT";
        for (pairs, wanted) in [
            (&[(ETAG, "\"a\""), (LAST_MODIFIED, date)][..], Some("\"a\"")),
            (&[(ETAG, "W/\"a\""), (LAST_MODIFIED, date)], Some("Sun, 06 Nov 1994 08:49:37 GMT 7")),
            (&[(ETAG, "W/\"a\"")], None),
            (&[(ETAG, "a")], None),
            (&[], None),
        ] {
            let version = version(&headers(pairs), 7);
            assert_eq!(version.as_ref().map(|version| version.0.as_str()), wanted);
        }
        let version = FileVersion(format!("{date} 7"));
        assert!(matches!(Condition::of(&version), Condition::Modified(asked) if asked == date));
        assert!(matches!(Condition::of(&FileVersion("\"a b 7\"".into())), Condition::ETag("\"a b 7\"")));
        assert!(matches!(Condition::of(&FileVersion("123-456".into())), Condition::None));
    }

    #[test]
    fn content_ranges_are_read() {
        for (text, wanted) in [
            ("bytes 0-9/100", Some((0..10, Some(100)))),
            ("bytes 5-5/*", Some((5..6, None))),
            ("bytes */100", None),
            ("bytes 0-18446744073709551615/*", None),
            ("items 0-9/100", None),
            ("bytes -9/100", None),
        ] {
            assert_eq!(content_range(&headers(&[(CONTENT_RANGE, text)])), wanted, "{text}");
        }
    }
}
