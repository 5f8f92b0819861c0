//! Chunks over HTTP, as desync's chunk server gives and takes them (formats.md 6.2).
//!
//! A chunk's name is that of a store's object: `/<4 hex digits>/<64 hex digits><extension>`. The extension, and with it whether chunks
//! go over the wire compressed and encrypted, is the server's own and independent of how the stores behind it keep theirs. What
//! is stored as the wire wants it is sent as it is, in whatever compression it was made.
//!
//! Invariant: nothing gets into the cache, and nothing that a client uploads gets into the store, whose content is not what its
//! name says (unless [`ChunkServerConfig::verify_write`] is off).

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use hyper::http::request::Parts;
use hyper::{Method, StatusCode};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use super::http::{Answer, Body, Service};
use super::shared_call::SharedCalls;
use crate::chunk::{Chunk, MAX_CHUNK_BYTES, codec};
use crate::digest::{ChunkId, Digest};
use crate::report::prometheus::counter;
use crate::report::{Counter, Report};
use crate::store::layout::Layout;
use crate::store::{Form, Store, StoreError, Stored, WriteStore};

/// What encryption can add to the longest stored chunk, in bytes: the nonce and the tag.
const MAX_OVERHEAD_BYTES: u64 = 64;

/// How chunks go over the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkServerConfig {
    /// Names and form on the wire.
    pub layout: Layout,
    /// What makes the ids.
    pub digest: Digest,
    /// Whether chunks are verified before they are sent. Clients verify what they get in any case.
    pub verify_read: bool,
    /// Whether chunks are verified before they are stored.
    pub verify_write: bool,
}

/// Where chunks come from and go to.
#[derive(Debug, Clone)]
pub struct Upstream {
    /// What is asked for chunks.
    pub store: Arc<dyn Store>,
    /// What is asked before, and keeps what came from the store.
    pub cache: Option<Arc<dyn WriteStore>>,
    /// What takes uploads; none for a server that only reads.
    pub writable: Option<Arc<dyn WriteStore>>,
}

/// Opens what is served again; blocking.
pub type Reopen = Box<dyn Fn() -> Result<Upstream, String> + Send + Sync>;

/// The service.
pub struct ChunkServer {
    /// Replaced as a whole on reload; held only to clone.
    upstream: RwLock<Arc<Upstream>>,
    reopen: Option<Reopen>,
    calls: SharedCalls<ChunkId, Result<Option<Bytes>, Unavailable>>,
    inner: Arc<Inner>,
}

/// What calls need that outlive the request that started them.
#[derive(Debug)]
struct Inner {
    config: ChunkServerConfig,
    report: Report,
    n_cache_hits: Counter,
    n_uploads: Counter,
    /// One permit for each core: for decoding, encoding and hashing.
    workers: Semaphore,
}

/// A chunk cannot be had. Why stands in our log: it names places that are no business of a client.
#[derive(Debug, Clone, Copy)]
struct Unavailable;

impl fmt::Debug for ChunkServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChunkServer").field("config", &self.inner.config).finish_non_exhaustive()
    }
}

impl ChunkServer {
    /// A service over an upstream; `reopen` makes a new one when the server is told to reload.
    pub fn new(config: ChunkServerConfig, upstream: Upstream, reopen: Option<Reopen>) -> Self {
        let n_workers = std::thread::available_parallelism().map_or(1, usize::from);
        let inner = Inner {
            config,
            report: Report::default(),
            n_cache_hits: Counter::default(),
            n_uploads: Counter::default(),
            workers: Semaphore::new(n_workers),
        };
        let upstream = RwLock::new(Arc::new(upstream));
        Self { upstream, reopen, calls: SharedCalls::default(), inner: Arc::new(inner) }
    }

    fn upstream(&self) -> Arc<Upstream> {
        Arc::clone(&self.upstream.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn id_of(&self, head: &Parts) -> Result<ChunkId, Box<Answer>> {
        let path = head.uri.path();
        let id = path.strip_prefix('/').and_then(|name| self.inner.config.layout.parse(name));
        id.ok_or_else(|| {
            let extension = self.inner.config.layout.extension();
            let text = format!("expected a chunk: /<4 hex digits>/<64 hex digits>{extension}");
            Box::new(Answer::text(StatusCode::BAD_REQUEST, text))
        })
    }

    async fn get(&self, id: ChunkId) -> Answer {
        let wire = self.calls.join(id, || {
            let (inner, upstream) = (Arc::clone(&self.inner), self.upstream());
            async move { inner.wire_form(&upstream, id).await }.boxed()
        });
        match wire.await {
            Ok(Some(bytes)) => {
                let content_type = match (self.inner.config.layout.form, &self.inner.config.layout.cipher) {
                    (Form::Compressed, None) => "application/zstd",
                    _ => "application/octet-stream",
                };
                Answer::content(content_type, Body::Bytes(bytes))
            }
            Ok(None) => missing(id),
            Err(Unavailable) => unavailable(id),
        }
    }

    async fn head(&self, id: ChunkId) -> Answer {
        let upstream = self.upstream();
        let has = async {
            if let Some(cache) = &upstream.cache {
                match on_its_thread(cache, move |cache| cache.has(id)).await {
                    Ok(true) => return Ok(true),
                    Ok(false) => {}
                    Err(error) => tracing::warn!("cache: {error}"),
                }
            }
            on_its_thread(&upstream.store, move |store| store.has(id)).await
        };
        match has.await {
            Ok(true) => Answer::empty(StatusCode::OK),
            Ok(false) => missing(id),
            Err(error) => {
                self.inner.report.n_store_errors.add(1);
                tracing::warn!("{error}");
                unavailable(id)
            }
        }
    }

    async fn put(&self, id: ChunkId, body: Bytes) -> Answer {
        // Looked at on admission, too, but what is served may have been changed since.
        let Some(writable) = self.upstream().writable.clone() else { return not_writable() };
        let inner = Arc::clone(&self.inner);
        let form = writable.form();
        let stored = match self.inner.work(move || inner.uploaded(id, body, form)).await {
            Ok(stored) => stored,
            Err(reason) => return Answer::text(StatusCode::BAD_REQUEST, format!("chunk {id} is invalid: {reason}")),
        };
        let done = on_its_thread(&writable, move |store| store.put(id, stored)).await;
        // Who waits for an answer of before the upload gets that one; who asks from now on does not.
        self.calls.forget(id);
        match done {
            Ok(_) => {
                self.inner.n_uploads.add(1);
                Answer::empty(StatusCode::OK)
            }
            Err(error) => {
                self.inner.report.n_store_errors.add(1);
                tracing::warn!("{error}");
                Answer::text(StatusCode::INTERNAL_SERVER_ERROR, format!("chunk {id} cannot be stored"))
            }
        }
    }
}

impl Service for ChunkServer {
    fn admit(&self, head: &Parts) -> Result<u64, Box<Answer>> {
        self.id_of(head)?;
        match head.method {
            Method::GET | Method::HEAD => Ok(0),
            Method::PUT if self.upstream().writable.is_none() => Err(Box::new(not_writable())),
            Method::PUT => Ok(MAX_CHUNK_BYTES + MAX_OVERHEAD_BYTES),
            _ => Err(Box::new(Answer::method_not_allowed("GET, HEAD, PUT"))),
        }
    }

    fn answer<'a>(&'a self, head: &'a Parts, body: Bytes) -> BoxFuture<'a, Answer> {
        Box::pin(async move {
            match (self.id_of(head), &head.method) {
                (Err(answer), _) => *answer,
                (Ok(id), &Method::HEAD) => self.head(id).await,
                (Ok(id), &Method::PUT) => self.put(id, body).await,
                (Ok(id), _) => self.get(id).await,
            }
        })
    }

    fn reload(&self) -> Result<(), String> {
        if let Some(reopen) = &self.reopen {
            let upstream = Arc::new(reopen()?);
            *self.upstream.write().unwrap_or_else(PoisonError::into_inner) = upstream;
            self.calls.forget_all();
        }
        Ok(())
    }

    fn render_metrics(&self, text: &mut String) {
        let Inner { report, n_cache_hits, n_uploads, .. } = &*self.inner;
        for (name, help, number) in [
            ("caifs_chunk_fetches_total", "Chunks asked of the stores.", &report.n_fetches),
            (
                "caifs_chunk_fetched_bytes_total",
                "Bytes fetched from the stores, in stored form.",
                &report.fetched_bytes,
            ),
            ("caifs_chunk_missing_total", "Chunks that no store had.", &report.n_missing),
            (
                "caifs_chunk_bad_total",
                "Chunks that are not what their id says, or cannot be decoded.",
                &report.n_bad_chunks,
            ),
            ("caifs_chunk_store_errors_total", "Requests that a store failed to answer.", &report.n_store_errors),
            ("caifs_chunk_cache_hits_total", "Chunks found in the cache.", n_cache_hits),
            ("caifs_chunk_uploads_total", "Chunks taken from clients.", n_uploads),
        ] {
            counter(text, name, help, number);
        }
    }
}

impl Inner {
    /// A chunk as the wire wants it.
    async fn wire_form(self: &Arc<Self>, upstream: &Upstream, id: ChunkId) -> Result<Option<Bytes>, Unavailable> {
        let stored = match self.obtain(upstream, id).await {
            Ok(Some(stored)) => stored,
            Ok(None) => return Ok(None),
            Err(error) => {
                self.report.n_store_errors.add(1);
                tracing::warn!("{error}");
                return Err(Unavailable);
            }
        };
        let layout = &self.config.layout;
        if stored.form == layout.form && layout.cipher.is_none() {
            return Ok(Some(stored.bytes));
        }
        let inner = Arc::clone(self);
        let wire = move || {
            let layout = &inner.config.layout;
            let converted = converted(stored, layout.form).map_err(|error| error.to_string())?;
            layout.seal(converted).map_err(str::to_owned)
        };
        match self.work(wire).await {
            Ok(wire) => Ok(Some(wire)),
            Err(reason) => {
                self.report.n_bad_chunks.add(1);
                tracing::warn!("chunk {id}: {reason}");
                Err(Unavailable)
            }
        }
    }

    /// A chunk from the cache, or else from the store by way of the cache.
    async fn obtain(self: &Arc<Self>, upstream: &Upstream, id: ChunkId) -> Result<Option<Stored>, StoreError> {
        if let Some(cache) = &upstream.cache {
            match on_its_thread(cache, move |cache| cache.fetch(id)).await {
                Ok(Some(stored)) if self.config.verify_read => match self.verified(id, stored).await {
                    Ok(stored) => {
                        self.n_cache_hits.add(1);
                        return Ok(Some(stored));
                    }
                    Err((_, reason)) => self.is_bad(id, cache.name(), &reason),
                },
                Ok(Some(stored)) => {
                    self.n_cache_hits.add(1);
                    return Ok(Some(stored));
                }
                Ok(None) => {}
                Err(error) => tracing::warn!("cache: {error}"),
            }
        }
        let mut avoid: Vec<String> = Vec::new();
        loop {
            self.report.n_fetches.add(1);
            let names = avoid.clone();
            let fetching = on_its_thread(&upstream.store, move |store| {
                async move { store.fetch_avoiding(id, &names).await }.boxed()
            });
            let Some(fetched) = fetching.await? else {
                if avoid.is_empty() {
                    self.report.n_missing.add(1);
                    return Ok(None);
                }
                return Err(StoreError::new(avoid.join(", "), id.to_hex(), "it is damaged there, and nowhere else"));
            };
            self.report.fetched_bytes.add(fetched.stored.bytes.len() as u64);
            if !self.config.verify_read && upstream.cache.is_none() {
                return Ok(Some(fetched.stored));
            }
            match self.verified(id, fetched.stored).await {
                Ok(stored) => {
                    if let Some(cache) = &upstream.cache {
                        self.keep(cache, id, stored.clone()).await;
                    }
                    return Ok(Some(stored));
                }
                Err((stored, reason)) => {
                    self.is_bad(id, &fetched.store, &reason);
                    if !self.config.verify_read {
                        return Ok(Some(stored));
                    }
                    // A store that answers although it is to be avoided would be asked for ever.
                    if avoid.contains(&fetched.store) {
                        return Err(StoreError::new(fetched.store, id.to_hex(), reason));
                    }
                    avoid.push(fetched.store);
                }
            }
        }
    }

    fn is_bad(&self, id: ChunkId, store: &str, reason: &str) {
        self.report.n_bad_chunks.add(1);
        tracing::warn!("chunk store {store}: chunk {id}: {reason}");
    }

    /// The chunk if it is what its id says; else the chunk and what is wrong with it.
    async fn verified(&self, id: ChunkId, stored: Stored) -> Result<Stored, (Stored, String)> {
        let digest = self.config.digest;
        self.work(move || match verify(digest, id, &stored) {
            Ok(_) => Ok(stored),
            Err(reason) => Err((stored, reason)),
        })
        .await
    }

    /// Writes a verified chunk into the cache. A cache that cannot take it makes us slower, nothing else.
    async fn keep(&self, cache: &Arc<dyn WriteStore>, id: ChunkId, stored: Stored) {
        let form = cache.form();
        let kept = match self.work(move || converted(stored, form)).await {
            Ok(stored) => on_its_thread(cache, move |cache| cache.put(id, stored)).await.map(drop),
            Err(error) => Err(StoreError::new(cache.name(), id.to_hex(), error)),
        };
        if let Err(error) = kept {
            tracing::warn!("cache: {error}");
        }
    }

    /// What came in, as the store wants it; or what is wrong with it.
    fn uploaded(&self, id: ChunkId, body: Bytes, form: Form) -> Result<Stored, String> {
        let stored = self.config.layout.open(body).map_err(|error| error.to_string())?;
        if stored.bytes.is_empty() {
            return Err("it is empty".to_owned());
        }
        if self.config.verify_write {
            verify(self.config.digest, id, &stored)?;
        }
        converted(stored, form).map_err(|error| error.to_string())
    }

    /// Does work that keeps a core busy on a thread that may be kept busy.
    async fn work<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let _permit = self.workers.acquire().await;
        blocking(work).await
    }
}

/// The plain bytes, if they are what the id says.
fn verify(digest: Digest, id: ChunkId, stored: &Stored) -> Result<Chunk, String> {
    let plain = codec::decode_unknown_size(stored.form, &stored.bytes, MAX_CHUNK_BYTES).map_err(|e| e.to_string())?;
    let found = Chunk::of(digest, plain);
    match found.id() == id {
        true => Ok(found),
        false => Err(format!("the {} digest of its content is {}", digest.name(), found.id())),
    }
}

/// A chunk in a form; the same bytes if it has that form already.
fn converted(stored: Stored, form: Form) -> Result<Stored, codec::CodecError> {
    let bytes = match (stored.form, form) {
        (Form::Compressed, Form::Plain) => codec::decode_unknown_size(stored.form, &stored.bytes, MAX_CHUNK_BYTES)?,
        (Form::Plain, Form::Compressed) => codec::encode(&stored.bytes, codec::DEFAULT_LEVEL).into(),
        (Form::Compressed, Form::Compressed) | (Form::Plain, Form::Plain) => stored.bytes,
    };
    Ok(Stored { form, bytes })
}

/// Asks a store; one that reads local files is asked on a thread that may wait for the disk.
async fn on_its_thread<S, T, F>(store: &Arc<S>, ask: F) -> T
where
    S: Store + ?Sized + 'static,
    T: Send + 'static,
    F: for<'a> FnOnce(&'a S) -> BoxFuture<'a, T> + Send + 'static,
{
    if store.blocking().is_none() {
        return ask(store).await;
    }
    let store = Arc::clone(store);
    let handle = Handle::current();
    blocking(move || handle.block_on(ask(&store))).await
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        // The request that waits for it fails in the same way.
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // Only a runtime that is shut down gives work up, and with it whoever waits.
        Err(_) => std::future::pending().await,
    }
}

fn missing(id: ChunkId) -> Answer {
    Answer::text(StatusCode::NOT_FOUND, format!("chunk {id} not found"))
}

fn unavailable(id: ChunkId) -> Answer {
    Answer::text(StatusCode::INTERNAL_SERVER_ERROR, format!("chunk {id} cannot be had (the server's log tells why)"))
}

fn not_writable() -> Answer {
    Answer::text(StatusCode::BAD_REQUEST, "this server takes no chunks (it is started without --writable)")
}
