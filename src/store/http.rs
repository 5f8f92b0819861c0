//! A store on a web server (formats.md 6): chunks as any server of a `.castr` directory has them, and files beside them.
//!
//! * [`client()`] makes the connections, [`exchange`] sends requests and reads answers within bounds.
//! * [`HttpStore`] names the objects and says what the answers mean; [`files`] does so for whole files.
//!
//! Invariants: credentials of the URL and of the options are sent to the store's own server only, and stand in no name and no error;
//! "missing" is what the server says with 404 or 410, and nothing else.

pub(crate) mod client;
pub(crate) mod exchange;
mod files;
mod list;

use std::fmt;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use reqwest::header::{AUTHORIZATION, COOKIE, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use url::Url;

pub use client::{MAX_CONNECT_TIMEOUT, client};

use self::exchange::{Exchange, is_missing};
use super::layout::Layout;
use super::location::{Location, without_secrets};
use super::retry::{Failure, retry};
use super::{Form, Put, Secret, Store, StoreError, StoreOptions, Stored, WriteStore};
use crate::chunk::MAX_CHUNK_BYTES;
use crate::digest::ChunkId;

/// The most bytes an object of a chunk can have: the largest chunk, encrypted (formats.md 11 has the overhead, 40 at the most).
pub(crate) const MAX_OBJECT_BYTES: u64 = MAX_CHUNK_BYTES + 40;

/// A store on a web server.
pub struct HttpStore {
    exchange: Exchange,
    /// Where its objects lie: ends with `/`, without login, with its query.
    base: Url,
    /// What goes with every request: `Authorization` and `Cookie`, marked as sensitive.
    headers: HeaderMap,
    layout: Layout,
}

/// The URL of an object, and how it is shown.
struct Object {
    url: Url,
    shown: String,
}

impl HttpStore {
    /// The store at a URL. A login in the URL becomes basic authentication, unless the options have an `authorization`; its
    /// query goes with every request. Nothing is asked of the server yet.
    ///
    /// # Errors
    /// The options do not fit, or a file that they name cannot be read.
    pub fn new(url: Url, options: &StoreOptions) -> Result<Self, StoreError> {
        let mut base = url;
        if !base.path().ends_with('/') {
            let path = format!("{}/", base.path());
            base.set_path(&path);
        }
        base.set_fragment(None);
        let name = Location::Http(base.clone()).to_string();
        let mut headers = headers(options, &name)?;
        if let Some(login) = login_of(&base)
            && !headers.contains_key(AUTHORIZATION)
        {
            headers.insert(AUTHORIZATION, secret_value(&login, "the login of the URL", &name)?);
        }
        // A URL that can have a host can have a login, so taking it away cannot fail; one without has none.
        let _ = base.set_username("");
        let _ = base.set_password(None);
        Ok(Self { exchange: Exchange::new(options, name)?, base, headers, layout: options.layout.clone() })
    }

    fn object(&self, name: &str) -> Result<Object, StoreError> {
        let mut url = self.base.clone();
        let fits = name.split('/').all(|part| !matches!(part, "" | "." | ".."));
        let pushed = match url.path_segments_mut() {
            Ok(mut segments) if fits => {
                segments.pop_if_empty().extend(name.split('/'));
                true
            }
            _ => false,
        };
        if !pushed {
            return Err(StoreError::new(&self.exchange.name, name, "not the name of an object"));
        }
        let shown = without_secrets(url.as_str());
        Ok(Object { url, shown })
    }

    fn chunk(&self, id: ChunkId) -> Result<Object, StoreError> {
        self.object(&self.layout.object_name(id))
    }

    fn request(&self, method: Method, object: &Object) -> RequestBuilder {
        self.exchange.client.request(method, object.url.clone()).headers(self.headers.clone())
    }

    async fn send(&self, request: RequestBuilder, object: &Object) -> Result<Response, Failure> {
        self.exchange.send(request, &object.shown).await
    }

    async fn refusal(&self, response: Response, object: &Object) -> Failure {
        self.exchange.refusal(response, &object.shown).await
    }

    async fn get_chunk(&self, object: &Object) -> Result<Option<Bytes>, Failure> {
        let response = self.send(self.request(Method::GET, object), object).await?;
        match response.status() {
            StatusCode::OK => {}
            status if is_missing(status) => {
                self.exchange.discard(response, &object.shown).await;
                return Ok(None);
            }
            _ => return Err(self.refusal(response, object).await),
        }
        let bytes = self.exchange.body(response, &object.shown, MAX_OBJECT_BYTES, "any chunk can").await?;
        match bytes.is_empty() {
            true => Err(self.exchange.permanent(&object.shown, "the object is empty")),
            false => Ok(Some(bytes)),
        }
    }

    async fn head_chunk(&self, object: &Object) -> Result<bool, Failure> {
        let response = self.send(self.request(Method::HEAD, object), object).await?;
        match response.status() {
            StatusCode::OK => Ok(true),
            status if is_missing(status) => Ok(false),
            _ => Err(self.refusal(response, object).await),
        }
    }

    async fn put_object(&self, object: &Object, content: Bytes) -> Result<(), StoreError> {
        retry(self.exchange.retry, |_| async {
            let response = self.send(self.request(Method::PUT, object).body(content.clone()), object).await?;
            match response.status() {
                StatusCode::OK | StatusCode::CREATED | StatusCode::NO_CONTENT => {
                    self.exchange.discard(response, &object.shown).await;
                    Ok(())
                }
                _ => Err(self.refusal(response, object).await),
            }
        })
        .await
    }
}

impl fmt::Debug for HttpStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpStore")
            .field("name", &self.exchange.name)
            .field("layout", &self.layout)
            .finish_non_exhaustive()
    }
}

impl Store for HttpStore {
    fn name(&self) -> &str {
        &self.exchange.name
    }

    fn fetch(&self, id: ChunkId) -> BoxFuture<'_, Result<Option<Stored>, StoreError>> {
        Box::pin(async move {
            let object = self.chunk(id)?;
            match retry(self.exchange.retry, |_| self.get_chunk(&object)).await? {
                Some(content) => open_object(&self.layout, content, &self.exchange.name, &object.shown).await.map(Some),
                None => Ok(None),
            }
        })
    }

    fn has(&self, id: ChunkId) -> BoxFuture<'_, Result<bool, StoreError>> {
        Box::pin(async move {
            let object = self.chunk(id)?;
            retry(self.exchange.retry, |_| self.head_chunk(&object)).await
        })
    }
}

impl WriteStore for HttpStore {
    fn form(&self) -> Form {
        self.layout.form
    }

    fn put(&self, id: ChunkId, stored: Stored) -> BoxFuture<'_, Result<Put, StoreError>> {
        Box::pin(async move {
            let object = self.chunk(id)?;
            let content = seal_object(&self.layout, stored, &self.exchange.name, &object.shown).await?;
            self.put_object(&object, content).await?;
            Ok(Put::Written)
        })
    }
}

/// The chunk in an object, decrypted off the threads that wait for the network.
pub(crate) async fn open_object(
    layout: &Layout,
    content: Bytes,
    store: &str,
    object: &str,
) -> Result<Stored, StoreError> {
    if layout.cipher.is_none() {
        return layout.open(content).map_err(|error| StoreError::new(store, object, error));
    }
    let layout = layout.clone();
    match tokio::task::spawn_blocking(move || layout.open(content)).await {
        Ok(opened) => opened.map_err(|error| StoreError::new(store, object, error)),
        Err(error) => Err(StoreError::new(store, object, error)),
    }
}

/// The object for a chunk, encrypted off the threads that wait for the network.
pub(crate) async fn seal_object(
    layout: &Layout,
    stored: Stored,
    store: &str,
    object: &str,
) -> Result<Bytes, StoreError> {
    let size = stored.bytes.len() as u64;
    if size > MAX_CHUNK_BYTES {
        return Err(StoreError::new(store, object, format!("a stored chunk cannot have {size} bytes")));
    }
    if layout.cipher.is_none() {
        return layout.seal(stored).map_err(|reason| StoreError::new(store, object, reason));
    }
    let layout = layout.clone();
    match tokio::task::spawn_blocking(move || layout.seal(stored)).await {
        Ok(sealed) => sealed.map_err(|reason| StoreError::new(store, object, reason)),
        Err(error) => Err(StoreError::new(store, object, error)),
    }
}

/// The headers that the options want with every request.
///
/// # Errors
/// A value cannot stand in a header.
pub(crate) fn headers(options: &StoreOptions, store: &str) -> Result<HeaderMap, StoreError> {
    let mut headers = HeaderMap::new();
    let wanted: [(HeaderName, &Option<Secret>); 2] =
        [(AUTHORIZATION, &options.http.authorization), (COOKIE, &options.http.cookie)];
    for (name, value) in wanted {
        if let Some(value) = value {
            let what = format!("the value for the header {name}");
            headers.insert(name, secret_value(value.expose(), &what, store)?);
        }
    }
    Ok(headers)
}

/// The value of `Authorization` for a user and password (RFC 7617).
pub(crate) fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{password}")))
}

/// A value of a header that no log shows.
pub(crate) fn secret_value(value: &str, what: &str, store: &str) -> Result<HeaderValue, StoreError> {
    let mut value = HeaderValue::from_str(value)
        .map_err(|_| StoreError::new(store, store, format!("{what} has a character that no header can have")))?;
    value.set_sensitive(true);
    Ok(value)
}

/// Basic authentication from the login of a URL, if it has one.
fn login_of(url: &Url) -> Option<String> {
    if url.username().is_empty() && url.password().is_none() {
        return None;
    }
    let decode = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
    Some(basic(&decode(url.username()), &decode(url.password().unwrap_or_default())))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::options::HttpOptions;

    fn store(url: &str, http: HttpOptions) -> HttpStore {
        HttpStore::new(Url::parse(url).unwrap(), &StoreOptions { http, ..StoreOptions::default() }).unwrap()
    }

    #[test]
    fn objects_lie_below_the_url_and_keep_its_query() {
        let store = store("https://u:p@h:8443/a%20b/c?sig=s%2Fx&t=1#part", HttpOptions::default());
        assert_eq!(store.name(), "https://u@h:8443/a%20b/c/?sig=…&t=1");
        for (name, url) in [
            ("6a1d/x.cacnk", "https://h:8443/a%20b/c/6a1d/x.cacnk?sig=s%2Fx&t=1"),
            ("ä #?%.caibx", "https://h:8443/a%20b/c/%C3%A4%20%23%3F%25.caibx?sig=s%2Fx&t=1"),
        ] {
            let object = store.object(name).unwrap();
            assert_eq!(object.url.as_str(), url);
            assert!(!object.shown.contains("s%2Fx") && !object.shown.contains('@'), "{}", object.shown);
        }
        for name in ["", "..", "a/../b", "a//b", "./a"] {
            assert!(store.object(name).is_err(), "{name}");
        }
    }

    #[test]
    fn logins_become_headers_that_nobody_sees() {
        let authorization = |store: &HttpStore| store.headers.get(AUTHORIZATION).map(|value| value.as_bytes().to_vec());
        let plain = store("http://h/", HttpOptions::default());
        assert_eq!(authorization(&plain), None);
        // The example of RFC 7617.
        let login = store("http://Aladdin:open%20sesame@h/", HttpOptions::default());
        assert_eq!(authorization(&login), Some(b"Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==".to_vec()));
        let options = HttpOptions {
            authorization: Some(Secret::new("Bearer hidden")),
            cookie: Some(Secret::new("session=hidden")),
            ..HttpOptions::default()
        };
        let both = store("http://u:hidden@h/", options);
        assert_eq!(authorization(&both), Some(b"Bearer hidden".to_vec()));
        assert!(!format!("{both:?}{:?}", both.headers).contains("hidden"));
        let bad = HttpOptions { cookie: Some(Secret::new("a\nhidden")), ..HttpOptions::default() };
        let options = StoreOptions { http: bad, ..StoreOptions::default() };
        let error = HttpStore::new(Url::parse("http://h/").unwrap(), &options).unwrap_err().to_string();
        assert!(error.contains("header cookie") && !error.contains("hidden"), "{error}");
    }
}
