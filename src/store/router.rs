//! Several stores in the order the user gave them.
//!
//! A store that does not have a chunk, or fails, hands on to the next. A failure is reported only when no later store has the
//! chunk: then the chunk may exist, so "missing" would be the wrong answer.

use std::sync::Arc;

use futures_util::future::BoxFuture;

use super::{BlockingStore, Fetched, Store, StoreError, Stored};
use crate::digest::ChunkId;

/// Ordered stores.
#[derive(Debug)]
pub struct Router {
    stores: Vec<Arc<dyn Store>>,
    name: String,
    all_blocking: bool,
}

impl Router {
    /// Stores in the order they are asked.
    pub fn new(stores: Vec<Arc<dyn Store>>) -> Self {
        let names: Vec<&str> = stores.iter().map(|store| store.name()).collect();
        let name = names.join(", ");
        let all_blocking = stores.iter().all(|store| store.blocking().is_some());
        Self { stores, name, all_blocking }
    }
}

impl Store for Router {
    fn name(&self) -> &str {
        &self.name
    }

    fn fetch(&self, id: ChunkId) -> BoxFuture<'_, Result<Option<Stored>, StoreError>> {
        Box::pin(async move { Ok(self.fetch_avoiding(id, &[]).await?.map(|fetched| fetched.stored)) })
    }

    fn fetch_avoiding<'a>(
        &'a self,
        id: ChunkId,
        avoid: &'a [String],
    ) -> BoxFuture<'a, Result<Option<Fetched>, StoreError>> {
        Box::pin(async move {
            let mut failure = None;
            for store in &self.stores {
                match store.fetch_avoiding(id, avoid).await {
                    Ok(Some(fetched)) => return Ok(Some(fetched)),
                    Ok(None) => {}
                    Err(error) => failure = failure.or(Some(error)),
                }
            }
            failure.map_or(Ok(None), Err)
        })
    }

    fn has(&self, id: ChunkId) -> BoxFuture<'_, Result<bool, StoreError>> {
        Box::pin(async move {
            let mut failure = None;
            for store in &self.stores {
                match store.has(id).await {
                    Ok(true) => return Ok(true),
                    Ok(false) => {}
                    Err(error) => failure = failure.or(Some(error)),
                }
            }
            failure.map_or(Ok(false), Err)
        })
    }

    fn blocking(&self) -> Option<&dyn BlockingStore> {
        self.all_blocking.then_some(self as &dyn BlockingStore)
    }
}

impl BlockingStore for Router {
    fn fetch_now(&self, id: ChunkId, max_bytes: u64) -> Result<Option<Stored>, StoreError> {
        let mut failure = None;
        for store in self.stores.iter().filter_map(|store| store.blocking()) {
            match store.fetch_now(id, max_bytes) {
                Ok(Some(stored)) => return Ok(Some(stored)),
                Ok(None) => {}
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        failure.map_or(Ok(None), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;
    use crate::store::fault::{Fault, FaultStore};

    fn holding(name: &str, chunks: &[&'static [u8]], fault: Fault) -> Arc<dyn Store> {
        let store = FaultStore::new(name, move |_, _| fault);
        for plain in chunks {
            store.insert(Digest::default().id(plain), plain);
        }
        Arc::new(store)
    }

    #[tokio::test]
    async fn missing_and_failing_stores_hand_on() {
        let id = Digest::default().id(b"x");
        let cases = [
            (vec![holding("a", &[], Fault::None), holding("b", &[b"x"], Fault::None)], "found"),
            (vec![holding("a", &[b"x"], Fault::Fail), holding("b", &[b"x"], Fault::None)], "found"),
            (vec![holding("a", &[b"x"], Fault::Fail), holding("b", &[], Fault::None)], "error"),
            (vec![holding("a", &[], Fault::None), holding("b", &[], Fault::None)], "missing"),
        ];
        for (stores, wanted) in cases {
            let router = Router::new(stores);
            let found = match router.fetch(id).await {
                Ok(Some(_)) => "found",
                Ok(None) => "missing",
                Err(_) => "error",
            };
            assert_eq!(found, wanted, "{}", router.name());
            let has = match router.has(id).await {
                Ok(true) => "found",
                Ok(false) => "missing",
                Err(_) => "error",
            };
            assert_eq!(has, wanted, "{}", router.name());
        }
    }
}
