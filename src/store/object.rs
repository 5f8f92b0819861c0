//! S3 and Google Cloud Storage: chunks are objects `<prefix>/<4 hex digits>/<64 hex digits><extension>`, files are `<prefix>/<name>`.
//!
//! * [`BucketStore`] is both, over the `object_store` crate; an object appears as a whole or not at all, so nothing is renamed.
//! * `connect` makes the crate's clients from our options, `aws_profile` reads credentials files, `access` finds out whether requests
//!   are signed when nobody said so, `answer` makes readable errors of what servers say, `emulator` is for those of Google's.
//! * [`upgrade`] moves the chunks of a store of early desync to where they are looked for today.
//!
//! Invariants: an object is not read before its size is known to be allowed. Only "there is no such object" means that a chunk is
//! missing: a bucket that is not there or may not be read is an error.

mod access;
mod answer;
mod aws_profile;
mod connect;
mod emulator;
mod list;
pub mod upgrade;

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use object_store::path::Path;
use object_store::{Attribute, Attributes, GetOptions, GetRange, GetResult, ObjectMeta, PutOptions, PutPayload};

use self::access::{Access, Bucket, Way};
use self::answer::Trouble;
use super::files::{self, FileInfo, FileStore, FileVersion, Listed, ReadWhole, WholeFile};
use super::layout::Layout;
use super::location::{Location, S3Location};
use super::retry::{Failure, retry};
use super::{Form, Put, Store, StoreError, StoreOptions, Stored, WriteStore};
use crate::chunk::MAX_CHUNK_BYTES;
use crate::digest::ChunkId;

/// The most that encryption adds to a chunk: nonce and tag of XChaCha20-Poly1305 (formats.md 11).
const MAX_CIPHER_BYTES: u64 = 40;

/// The largest object that can be a chunk.
const MAX_OBJECT_BYTES: u64 = MAX_CHUNK_BYTES + MAX_CIPHER_BYTES;

/// As much memory is set aside for a body on the server's word; the rest when it comes.
const MAX_FIRST_RESERVE_BYTES: u64 = 4 << 20;

/// Content type of compressed chunks.
const COMPRESSED_TYPE: &str = "application/zstd";

/// Content type of everything else.
const OTHER_TYPE: &str = "application/octet-stream";

/// A prefix in a bucket of S3 or Google Cloud Storage.
#[derive(Debug)]
pub struct BucketStore {
    name: String,
    /// What object names begin with; empty, or with a `/` at its end.
    prefix: String,
    access: Access,
    options: StoreOptions,
}

impl BucketStore {
    /// A store in an S3 bucket. Nothing is asked of the server yet.
    ///
    /// # Errors
    /// The options do not fit, or a file they name cannot be read.
    pub fn s3(location: &S3Location, options: &StoreOptions) -> Result<Self, StoreError> {
        let name = Location::S3(location.clone()).to_string();
        Self::new(name, &location.prefix, connect::s3(location, options), options)
    }

    /// A store in a bucket of Google Cloud Storage. Nothing is asked of the server yet.
    ///
    /// # Errors
    /// The options do not fit, or a file they name cannot be read.
    pub fn gcs(bucket: &str, prefix: &str, options: &StoreOptions) -> Result<Self, StoreError> {
        let name = Location::Gcs { bucket: bucket.to_owned(), prefix: prefix.to_owned() }.to_string();
        Self::new(name, prefix, connect::gcs(bucket, options), options)
    }

    fn new(
        name: String,
        prefix: &str,
        access: Result<Access, String>,
        options: &StoreOptions,
    ) -> Result<Self, StoreError> {
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        match access {
            Ok(access) => Ok(Self { name, prefix, access, options: options.clone() }),
            Err(reason) => Err(StoreError::new(name.clone(), name, reason)),
        }
    }

    fn layout(&self) -> &Layout {
        &self.options.layout
    }

    /// The full name of an object for messages.
    fn shown(&self, object: &str) -> String {
        format!("{}/{object}", self.name)
    }

    /// The key of an object in the bucket.
    fn key(&self, object: &str) -> Result<Path, StoreError> {
        let text = format!("{}{object}", self.prefix);
        match Path::parse(&text) {
            // The crate would leave slashes at the ends out, which is another object's name.
            Ok(key) if !object.is_empty() && key.as_ref() == text => Ok(key),
            _ => Err(StoreError::new(self.name.clone(), self.shown(object), "no name that an object can have")),
        }
    }

    /// Makes a request for an object, and again while what is wrong can pass. Each has the time that the options give it.
    async fn request<T, F>(&self, object: &str, ask: impl Fn(Arc<dyn Bucket>) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, Trouble>>,
    {
        let span = self.options.request_timeout;
        retry(self.options.retry, |_| async {
            let asked = async {
                let way = self.access.way().await;
                let answer = ask(Arc::clone(&way.bucket)).await;
                answer.map_err(|trouble| self.failure(object, &way, trouble))
            };
            match tokio::time::timeout(span, asked).await {
                Ok(answer) => answer,
                Err(_) => Err(self.late(object)),
            }
        })
        .await
    }

    fn late(&self, object: &str) -> Failure {
        let reason = format!("no answer within {:?}", self.options.request_timeout);
        StoreError::transient(self.name.clone(), self.shown(object), reason).into()
    }

    fn failure(&self, object: &str, way: &Way, trouble: Trouble) -> Failure {
        let (reason, is_transient, retry_after) = match trouble {
            Trouble::Broken(reason) => (reason, true, None),
            Trouble::Wrong(reason) => (reason, false, None),
            Trouble::Refused(refusal) => {
                let mut reason = refusal.to_string();
                if refusal.is_denied() {
                    self.access.refused(way);
                    if let Some(why) = &way.why_unsigned {
                        reason.push_str(&format!(
                            " (the request was unsigned: no credentials are set, and the machine has none: {why})"
                        ));
                    }
                }
                (reason, refusal.is_transient(), refusal.retry_after)
            }
        };
        let error = StoreError { is_transient, ..StoreError::new(self.name.clone(), self.shown(object), reason) };
        Failure { error, retry_after }
    }

    async fn fetch(&self, id: ChunkId) -> Result<Option<Stored>, StoreError> {
        let object = self.layout().object_name(id);
        let key = self.key(&object)?;
        let content = self.request(&object, |bucket| {
            let key = &key;
            async move {
                let Some(got) = unless_missing(bucket.get_opts(key, GetOptions::default()).await)? else {
                    return Ok(None);
                };
                let size = got.meta.size;
                match size {
                    0 => Err(Trouble::Wrong("the object is empty (remove it and make it again)".to_owned())),
                    n if n > MAX_OBJECT_BYTES => {
                        Err(Trouble::Wrong(format!("the object has {n} bytes, more than any chunk can")))
                    }
                    _ => read_body(got, size).await.map(Some),
                }
            }
        });
        let Some(content) = content.await? else { return Ok(None) };
        let opened = self.layout().open(content);
        opened.map(Some).map_err(|error| StoreError::new(self.name.clone(), self.shown(&object), error))
    }

    /// What the server says of an object without sending it.
    async fn head(&self, object: &str) -> Result<Option<ObjectMeta>, StoreError> {
        let key = self.key(object)?;
        self.request(object, |bucket| {
            let key = &key;
            async move {
                let options = GetOptions { head: true, ..GetOptions::default() };
                Ok(unless_missing(bucket.get_opts(key, options).await)?.map(|got| got.meta))
            }
        })
        .await
    }

    async fn write_object(&self, object: &str, content: Bytes, content_type: &'static str) -> Result<(), StoreError> {
        let key = self.key(object)?;
        self.request(object, |bucket| {
            let attributes = Attributes::from_iter([(Attribute::ContentType, content_type)]);
            let (key, payload) = (&key, PutPayload::from_bytes(content.clone()));
            async move {
                let options = PutOptions { attributes, ..PutOptions::default() };
                bucket.put_opts(key, payload, options).await?;
                Ok(())
            }
        })
        .await
    }

    async fn put(&self, id: ChunkId, stored: Stored) -> Result<Put, StoreError> {
        let object = self.layout().object_name(id);
        let refuse = |reason: String| StoreError::new(self.name.clone(), self.shown(&object), reason);
        let content = self.layout().seal(stored).map_err(|reason| refuse(reason.to_owned()))?;
        if content.len() as u64 > MAX_OBJECT_BYTES {
            return Err(refuse(format!("a stored chunk cannot have {} bytes", content.len())));
        }
        let content_type = match self.layout() {
            Layout { form: Form::Compressed, cipher: None } => COMPRESSED_TYPE,
            _ => OTHER_TYPE,
        };
        // Whether it is there already costs a request of its own to learn; it is written again as it is.
        self.write_object(&object, content, content_type).await?;
        Ok(Put::Written)
    }

    async fn read_whole(
        &self,
        file: &str,
        known: Option<&FileVersion>,
        max_bytes: u64,
    ) -> Result<ReadWhole, StoreError> {
        let key = self.key(file)?;
        self.request(file, |bucket| {
            let key = &key;
            async move {
                let options = GetOptions { if_none_match: known.and_then(e_tag), ..GetOptions::default() };
                let got = match bucket.get_opts(key, options).await.map_err(Trouble::from) {
                    Ok(got) => got,
                    Err(Trouble::Refused(refusal)) if refusal.status == 304 => return Ok(ReadWhole::Unchanged),
                    Err(Trouble::Refused(refusal)) if refusal.is_missing_object() => return Ok(ReadWhole::Missing),
                    Err(trouble) => return Err(trouble),
                };
                let info = info_of(&got.meta);
                // A server that does not know conditions sends it all the same.
                if known.is_some() && info.version.as_ref() == known {
                    return Ok(ReadWhole::Unchanged);
                }
                if info.size > max_bytes {
                    let reason = format!("it has {} bytes, more than the {max_bytes} that it may have", info.size);
                    return Err(Trouble::Wrong(reason));
                }
                let bytes = read_body(got, info.size).await?;
                Ok(ReadWhole::Content(WholeFile { bytes, info }))
            }
        })
        .await
    }

    async fn read_range(
        &self,
        file: &str,
        range: Range<u64>,
        version: Option<&FileVersion>,
    ) -> Result<Bytes, StoreError> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let key = self.key(file)?;
        let read = self.request(file, |bucket| {
            let (key, range) = (&key, range.clone());
            async move {
                let n_bytes = range.end - range.start;
                let if_match = version.and_then(e_tag);
                let range = Some(GetRange::Bounded(range));
                let options = GetOptions { if_match, range, ..GetOptions::default() };
                match bucket.get_opts(key, options).await.map_err(Trouble::from) {
                    Ok(got) if version.is_some() && version_of(&got.meta).as_ref() != version => Ok(None),
                    Ok(got) => read_body(got, n_bytes).await.map(Some),
                    Err(Trouble::Refused(refusal)) if refusal.is_failed_condition() => Ok(None),
                    // Only a file that was longer has been asked for these bytes.
                    Err(Trouble::Refused(refusal)) if refusal.status == 416 && version.is_some() => Ok(None),
                    Err(trouble) => Err(trouble),
                }
            }
        });
        read.await?.ok_or_else(|| files::changed(&self.name, &self.shown(file)))
    }
}

impl Store for BucketStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn fetch(&self, id: ChunkId) -> BoxFuture<'_, Result<Option<Stored>, StoreError>> {
        Box::pin(self.fetch(id))
    }

    fn has(&self, id: ChunkId) -> BoxFuture<'_, Result<bool, StoreError>> {
        Box::pin(async move { Ok(self.head(&self.layout().object_name(id)).await?.is_some()) })
    }
}

impl WriteStore for BucketStore {
    fn form(&self) -> Form {
        self.layout().form
    }

    fn put(&self, id: ChunkId, stored: Stored) -> BoxFuture<'_, Result<Put, StoreError>> {
        Box::pin(self.put(id, stored))
    }
}

impl FileStore for BucketStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn stat<'a>(&'a self, file: &'a str) -> BoxFuture<'a, Result<Option<FileInfo>, StoreError>> {
        Box::pin(async move { Ok(self.head(file).await?.map(|meta| info_of(&meta))) })
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
        Box::pin(self.read_whole(file, known, max_bytes))
    }

    fn read_range<'a>(
        &'a self,
        file: &'a str,
        range: Range<u64>,
        version: Option<&'a FileVersion>,
    ) -> BoxFuture<'a, Result<Bytes, StoreError>> {
        Box::pin(self.read_range(file, range, version))
    }

    fn write<'a>(&'a self, file: &'a str, bytes: Bytes) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(self.write_object(file, bytes, OTHER_TYPE))
    }
}

/// `None` when the server says that there is no such object.
fn unless_missing<T>(answer: object_store::Result<T>) -> Result<Option<T>, Trouble> {
    match answer.map_err(Trouble::from) {
        Ok(got) => Ok(Some(got)),
        Err(Trouble::Refused(refusal)) if refusal.is_missing_object() => Ok(None),
        Err(trouble) => Err(trouble),
    }
}

/// All of an answer's body, which must have this many bytes.
async fn read_body(got: GetResult, n_bytes: u64) -> Result<Bytes, Trouble> {
    let mut frames = got.into_stream();
    let first = frames.next().await.transpose()?.unwrap_or_default();
    let mut n_got = first.len() as u64;
    // Small bodies come in one piece, which is handed on as it is.
    let mut pieces = BytesMut::new();
    while let Some(frame) = frames.next().await.transpose()? {
        if pieces.is_empty() {
            pieces.reserve(n_bytes.min(MAX_FIRST_RESERVE_BYTES) as usize);
            pieces.extend_from_slice(&first);
        }
        n_got += frame.len() as u64;
        if n_got > n_bytes {
            break;
        }
        pieces.extend_from_slice(&frame);
    }
    match n_got == n_bytes {
        true if pieces.is_empty() => Ok(first),
        true => Ok(pieces.freeze()),
        false => Err(Trouble::Broken(format!("{n_got} bytes came of {n_bytes}"))),
    }
}

fn info_of(meta: &ObjectMeta) -> FileInfo {
    FileInfo { size: meta.size, version: version_of(meta), mtime: mtime_of(meta), has_ranges: true }
}

/// A strong ETag, else the server's number for the version, else size and time.
fn version_of(meta: &ObjectMeta) -> Option<FileVersion> {
    let strong = meta.e_tag.as_deref().filter(|e_tag| is_strong(e_tag));
    if let Some(text) = strong.or(meta.version.as_deref()) {
        return Some(FileVersion(text.to_owned()));
    }
    let since = mtime_of(meta)?.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    Some(FileVersion(format!("{} bytes, {} s", meta.size, since.as_secs())))
}

/// The version as a condition of a request, if it is one that servers compare.
fn e_tag(version: &FileVersion) -> Option<String> {
    is_strong(&version.0).then(|| version.0.clone())
}

fn is_strong(e_tag: &str) -> bool {
    e_tag.len() > 2 && e_tag.starts_with('"') && e_tag.ends_with('"')
}

/// The crate says 1970 for a server that says nothing.
fn mtime_of(meta: &ObjectMeta) -> Option<SystemTime> {
    Some(SystemTime::from(meta.last_modified)).filter(|time| *time != SystemTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_what_the_server_tells() {
        let meta = |e_tag: Option<&str>, version: Option<&str>, seconds: u64| ObjectMeta {
            location: Path::default(),
            last_modified: (SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds)).into(),
            size: 7,
            e_tag: e_tag.map(str::to_owned),
            version: version.map(str::to_owned),
        };
        for (meta, version, is_condition) in [
            (meta(Some("\"x\""), Some("1"), 9), Some("\"x\""), true),
            (meta(Some("W/\"x\""), Some("1"), 9), Some("1"), false),
            (meta(None, Some("1"), 9), Some("1"), false),
            (meta(Some("\"\""), None, 9), Some("7 bytes, 9 s"), false),
            (meta(None, None, 0), None, false),
        ] {
            let told = version_of(&meta);
            assert_eq!(told.as_ref().map(|version| version.0.as_str()), version);
            assert_eq!(told.as_ref().and_then(e_tag).is_some(), is_condition);
        }
    }
}
