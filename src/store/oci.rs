//! A store in a repository of an OCI registry (formats.md 7.1): each chunk is a blob, and a manifest tagged `<id><extension>` that names it.
//!
//! * [`auth`] answers a registry that wants to know who asks; [`docker`] finds the credentials that Docker keeps.
//! * [`manifest`] reads and writes the little JSON.
//!
//! Invariants: a chunk is there when its manifest is, and the manifest is written last; credentials go to the registry and to the
//! token server it names, never down from https to http, and stand in no error.

mod auth;
mod docker;
mod manifest;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, LOCATION};
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use tokio::sync::OnceCell;
use url::Url;

use self::auth::Auth;
use self::manifest::Descriptor;
use super::http::exchange::{Exchange, is_missing, text};
use super::http::{MAX_OBJECT_BYTES, headers, open_object, seal_object};
use super::layout::Layout;
use super::location::{Location, OciLocation, without_secrets};
use super::retry::{Failure, retry};
use super::{Form, Put, Store, StoreError, StoreOptions, Stored, WriteStore};
use crate::digest::ChunkId;

/// The most bytes a manifest of a chunk can have; ours have 700.
const MAX_MANIFEST_BYTES: u64 = 64 << 10;

/// How often one request is made with other credentials: the first is without, the second with a token that may have been another's.
const MAX_TRIES: u32 = 3;

/// A store in a repository of a registry.
#[derive(Debug)]
pub struct OciStore {
    exchange: Exchange,
    /// `scheme://host[:port]`.
    registry: Url,
    repository: String,
    layout: Layout,
    /// `Cookie`, if the options have one, and a fixed `Authorization`, which then takes the place of `auth`.
    headers: HeaderMap,
    auth: Auth,
    /// Full once the configuration that all chunks share is in the repository.
    config: OnceCell<()>,
}

/// The URL of an object, and how it is shown.
struct Object {
    url: Url,
    shown: String,
}

impl OciStore {
    /// The store in a repository. Nothing is asked of the registry yet, and credentials are looked up when it wants some.
    ///
    /// # Errors
    /// The options do not fit, or a file that they name cannot be read.
    pub fn new(location: &OciLocation, options: &StoreOptions) -> Result<Self, StoreError> {
        let name = Location::Oci(location.clone()).to_string();
        let registry = Url::parse(&location.registry)
            .map_err(|error| StoreError::new(&name, without_secrets(&location.registry), error))?;
        let exchange = Exchange::new(options, name)?;
        let headers = headers(options, &exchange.name)?;
        let auth = Auth::new(&registry, &options.oci, &exchange)?;
        Ok(Self {
            registry,
            repository: location.repository.clone(),
            layout: options.layout.clone(),
            headers,
            auth,
            config: OnceCell::new(),
            exchange,
        })
    }

    /// `/v2/<repository>/<kind>/<reference>`.
    fn object(&self, kind: &str, reference: &str) -> Object {
        let mut url = self.registry.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.clear().push("v2").extend(self.repository.split('/')).extend(kind.split('/')).push(reference);
        }
        let shown = url.to_string();
        Object { url, shown }
    }

    fn manifest_of(&self, id: ChunkId) -> Object {
        self.object("manifests", &self.layout.file_name(id))
    }

    fn blob(&self, digest: &str) -> Object {
        self.object("blobs", digest)
    }

    fn request(&self, method: Method, url: &Url) -> RequestBuilder {
        self.exchange.client.request(method, url.clone()).headers(self.headers.clone())
    }

    /// Sends a request to the registry, and again with the credentials that it asks for.
    async fn send(&self, make: impl Fn() -> RequestBuilder + Sync, object: &Object) -> Result<Response, Failure> {
        let is_fixed = self.headers.contains_key(reqwest::header::AUTHORIZATION);
        let mut n_before = 0;
        loop {
            let shown = self.auth.header().await;
            let request = match &shown {
                Some(header) if !is_fixed => make().header(reqwest::header::AUTHORIZATION, header.clone()),
                _ => make(),
            };
            let response = self.exchange.send(request, &object.shown).await?;
            n_before += 1;
            if response.status() != StatusCode::UNAUTHORIZED || is_fixed || n_before >= MAX_TRIES {
                return Ok(response);
            }
            if !self.auth.renew(&self.exchange, response.headers(), shown).await? {
                return Ok(response);
            }
            self.exchange.discard(response, &object.shown).await;
        }
    }

    /// What is right in an error is the status and what the registry says to it.
    async fn refusal(&self, response: Response, object: &Object) -> Failure {
        let is_unauthorized = response.status() == StatusCode::UNAUTHORIZED;
        let mut failure = self.exchange.refusal_in(response, &object.shown, manifest::error_words).await;
        if is_unauthorized {
            failure.error.reason.push_str(&format!(" ({})", self.auth.advice()));
        }
        failure
    }

    /// The chunk's blob, by its manifest; `None` when there is none, or it is no chunk's.
    async fn descriptor(&self, id: ChunkId) -> Result<Option<Descriptor>, StoreError> {
        let object = self.manifest_of(id);
        let content = retry(self.exchange.retry, |_| async {
            let make = || self.request(Method::GET, &object.url).header(ACCEPT, manifest::MANIFEST_TYPE);
            let response = self.send(make, &object).await?;
            match response.status() {
                StatusCode::OK => {}
                status if is_missing(status) => {
                    self.exchange.discard(response, &object.shown).await;
                    return Ok(None);
                }
                _ => return Err(self.refusal(response, &object).await),
            }
            let limit = "the manifest of a chunk should have";
            self.exchange.body(response, &object.shown, MAX_MANIFEST_BYTES, limit).await.map(Some)
        })
        .await?;
        let Some(content) = content else { return Ok(None) };
        let descriptor =
            manifest::read(&content).map_err(|reason| StoreError::new(&self.exchange.name, &object.shown, reason))?;
        match descriptor {
            Some(Descriptor { size, .. }) if size > MAX_OBJECT_BYTES => {
                let reason = format!("names a blob of {size} bytes, more than any chunk can");
                Err(StoreError::new(&self.exchange.name, &object.shown, reason))
            }
            other => Ok(other),
        }
    }

    async fn get_blob(&self, descriptor: &Descriptor, object: &Object) -> Result<Option<Bytes>, Failure> {
        let response = self.send(|| self.request(Method::GET, &object.url), object).await?;
        match response.status() {
            StatusCode::OK => {}
            status if is_missing(status) => {
                self.exchange.discard(response, &object.shown).await;
                return Ok(None);
            }
            _ => return Err(self.refusal(response, object).await),
        }
        let bytes = self.exchange.body(response, &object.shown, descriptor.size, "its manifest says").await?;
        match bytes.len() as u64 {
            0 => Err(self.exchange.permanent(&object.shown, "the blob is empty")),
            n if n == descriptor.size => Ok(Some(bytes)),
            n => {
                let reason = format!("the blob has {n} bytes, its manifest says {}", descriptor.size);
                Err(self.exchange.permanent(&object.shown, reason))
            }
        }
    }

    /// Puts a blob into the repository, under the digest of its bytes.
    async fn put_blob(&self, content: Bytes, content_digest: &str) -> Result<(), Failure> {
        let uploads = self.object("blobs/uploads", "");
        let response = self.send(|| self.request(Method::POST, &uploads.url), &uploads).await?;
        if response.status() != StatusCode::ACCEPTED {
            return Err(self.refusal(response, &uploads).await);
        }
        let place = text(response.headers(), LOCATION).and_then(|place| uploads.url.join(place).ok());
        let Some(mut place) = place else {
            return Err(self.exchange.permanent(&uploads.shown, "the registry does not say where to upload to"));
        };
        place.query_pairs_mut().append_pair("digest", content_digest);
        let is_registry = place.origin() == self.registry.origin();
        let make = || {
            // Only the registry itself is told who asks.
            let request = match is_registry {
                true => self.request(Method::PUT, &place),
                false => self.exchange.client.request(Method::PUT, place.clone()),
            };
            request.header(CONTENT_TYPE, manifest::BLOB_TYPE).body(content.clone())
        };
        let response = match is_registry {
            true => self.send(make, &uploads).await?,
            false => self.exchange.send(make(), &uploads.shown).await?,
        };
        match response.status() {
            StatusCode::CREATED => Ok(()),
            _ => Err(self.refusal(response, &uploads).await),
        }
    }

    /// Puts the configuration that all chunks share into the repository, unless it is there.
    async fn put_config(&self) -> Result<(), StoreError> {
        let object = self.blob(manifest::EMPTY_CONFIG_DIGEST);
        retry(self.exchange.retry, |_| async {
            let response = self.send(|| self.request(Method::HEAD, &object.url), &object).await?;
            match response.status() {
                StatusCode::OK => Ok(()),
                status if is_missing(status) => {
                    self.put_blob(Bytes::from_static(manifest::EMPTY_CONFIG), manifest::EMPTY_CONFIG_DIGEST).await
                }
                _ => Err(self.refusal(response, &object).await),
            }
        })
        .await
    }

    async fn put_manifest(&self, object: &Object, content: Bytes) -> Result<(), Failure> {
        let make = || {
            let request = self.request(Method::PUT, &object.url);
            request.header(CONTENT_TYPE, manifest::MANIFEST_TYPE).body(content.clone())
        };
        let response = self.send(make, object).await?;
        match response.status() {
            StatusCode::CREATED | StatusCode::OK => Ok(()),
            _ => {
                let mut failure = self.refusal(response, object).await;
                // While another writes the same blob the registry does not know it for a moment (docker-registry 2.8).
                failure.error.is_transient |= failure.error.reason.contains(manifest::UNKNOWN_BLOB);
                Err(failure)
            }
        }
    }
}

impl Store for OciStore {
    fn name(&self) -> &str {
        &self.exchange.name
    }

    fn fetch(&self, id: ChunkId) -> BoxFuture<'_, Result<Option<Stored>, StoreError>> {
        Box::pin(async move {
            let Some(descriptor) = self.descriptor(id).await? else { return Ok(None) };
            let object = self.blob(&descriptor.digest);
            match retry(self.exchange.retry, |_| self.get_blob(&descriptor, &object)).await? {
                Some(content) => open_object(&self.layout, content, &self.exchange.name, &object.shown).await.map(Some),
                None => Ok(None),
            }
        })
    }

    fn has(&self, id: ChunkId) -> BoxFuture<'_, Result<bool, StoreError>> {
        // HEAD would not tell whether it is the manifest of a chunk.
        Box::pin(async move { Ok(self.descriptor(id).await?.is_some()) })
    }
}

impl WriteStore for OciStore {
    fn form(&self) -> Form {
        self.layout.form
    }

    fn put(&self, id: ChunkId, stored: Stored) -> BoxFuture<'_, Result<Put, StoreError>> {
        Box::pin(async move {
            let object = self.manifest_of(id);
            let content = seal_object(&self.layout, stored, &self.exchange.name, &object.shown).await?;
            self.config.get_or_try_init(|| self.put_config()).await?;
            let descriptor = Descriptor::of(&content);
            let manifest = manifest::write(&descriptor, &self.layout.file_name(id));
            // What failed is begun anew: the registry may have forgotten the upload, or not know the blob after all.
            retry(self.exchange.retry, |_| async {
                self.put_blob(content.clone(), &descriptor.digest).await?;
                self.put_manifest(&object, manifest.clone()).await
            })
            .await?;
            Ok(Put::Written)
        })
    }
}
