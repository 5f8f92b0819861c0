//! What a web server tells of a directory: JSON or a page ([`listing`]).

use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderValue};
use reqwest::{Method, StatusCode};

use super::exchange::{is_missing, text};
use super::{HttpStore, Object};
use crate::store::StoreError;
use crate::store::files::Listed;
use crate::store::listing::{self, MAX_LISTING_BYTES};
use crate::store::location::without_secrets;
use crate::store::retry::{Failure, retry};

/// What is said of a server that has no listing for us.
const HINT: &str = "the server lists no directories here (turn its listing on, as nginx does with autoindex, or use caifs index-server)";

impl HttpStore {
    /// The names in a directory; `None` when there is no such directory.
    pub(super) async fn list_directory(&self, directory: &str) -> Result<Option<Vec<Listed>>, StoreError> {
        let object = self.directory(directory)?;
        retry(self.exchange.retry, |_| self.list_once(&object)).await
    }

    /// A directory, whose URL ends with `/`.
    fn directory(&self, name: &str) -> Result<Object, StoreError> {
        if name.is_empty() {
            let url = self.base.clone();
            return Ok(Object { shown: without_secrets(url.as_str()), url });
        }
        let mut object = self.object(name)?;
        let path = format!("{}/", object.url.path());
        object.url.set_path(&path);
        object.shown = without_secrets(object.url.as_str());
        Ok(object)
    }

    async fn list_once(&self, object: &Object) -> Result<Option<Vec<Listed>>, Failure> {
        let accept = HeaderValue::from_static("application/json, text/html;q=0.9, */*;q=0.1");
        let request = self.request(Method::GET, object).header(ACCEPT, accept);
        let response = self.send(request, object).await?;
        match response.status() {
            StatusCode::OK => {}
            status if is_missing(status) => return Ok(None),
            // Servers that list nothing answer so: nginx without autoindex, and desync's index server.
            StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST | StatusCode::METHOD_NOT_ALLOWED => {
                let mut failure = self.refusal(response, object).await;
                failure.error.reason = format!("{}: {HINT}", failure.error.reason);
                return Err(failure);
            }
            _ => return Err(self.refusal(response, object).await),
        }
        // Links are relative to where it was found in the end.
        let base = response.url().join(".").unwrap_or_else(|_| response.url().clone());
        let kind = text(response.headers(), CONTENT_TYPE).unwrap_or_default().to_ascii_lowercase();
        let bytes = self.exchange.body(response, &object.shown, MAX_LISTING_BYTES, "a listing may have").await?;
        let listed = if kind.contains("json") {
            listing::from_json(&bytes)
        } else if kind.contains("html") {
            listing::from_html(&String::from_utf8_lossy(&bytes), &base)
        } else {
            Err(format!("the answer is of the type {kind:?}"))
        };
        listed.map(Some).map_err(|reason| self.exchange.permanent(&object.shown, format!("{reason}: {HINT}")))
    }
}
