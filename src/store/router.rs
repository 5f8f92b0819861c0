//! Several stores in the order the user gave them.
//!
//! A store that does not have a chunk, or fails, hands on to the next. A failure is reported only when no later store has the
//! chunk: then the chunk may exist, so "missing" would be the wrong answer. A store that does not answer is given some
//! patience; then the next is asked beside it. One that fails or keeps silent again and again is asked last until it is well.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;

use super::figures::StoreFigures;
use super::health::MemberHealth;
use super::race::{Members, Pace};
use super::{BlockingStore, Fetched, Store, StoreError, Stored};
use crate::digest::ChunkId;

/// How long a store may take before the next one is asked, too, when nothing is said: well below any deadline of a reader, and
/// well above what a slow store needs.
pub const DEFAULT_PATIENCE: Duration = Duration::from_secs(5);

/// Ordered stores.
#[derive(Debug)]
pub struct Router {
    stores: Members,
    name: String,
    are_blocking: bool,
}

impl Router {
    /// Stores in the order they are asked.
    pub fn new(stores: Vec<Arc<dyn Store>>) -> Self {
        Self::with_patience(stores, DEFAULT_PATIENCE)
    }

    /// Stores in the order they are asked, and for how long each but the last is before the next one is asked, too.
    pub fn with_patience(stores: Vec<Arc<dyn Store>>, patience: Duration) -> Self {
        let stores = Members::new(stores, Pace::Patience(patience));
        let name = stores.names().join(", ");
        let are_blocking = stores.are_blocking();
        Self { stores, name, are_blocking }
    }

    /// How the stores are doing, in their order.
    pub fn members(&self) -> Vec<MemberHealth> {
        self.stores.health()
    }
}

/// The error of the first store that failed; it may pass if that of any store may.
fn first(errors: Vec<StoreError>) -> StoreError {
    let is_transient = errors.iter().any(|error| error.is_transient);
    let first = errors.into_iter().next().expect("some store failed if the answer is an error");
    StoreError { is_transient, ..first }
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
        Box::pin(async move { self.stores.fetch(id, avoid).await.map_err(first) })
    }

    fn has(&self, id: ChunkId) -> BoxFuture<'_, Result<bool, StoreError>> {
        Box::pin(async move { self.stores.has(id).await.map_err(first) })
    }

    fn blocking(&self) -> Option<&dyn BlockingStore> {
        self.are_blocking.then_some(self as &dyn BlockingStore)
    }

    fn figures(&self) -> Vec<StoreFigures> {
        self.stores.figures()
    }
}

impl BlockingStore for Router {
    fn fetch_now(&self, id: ChunkId, max_bytes: u64) -> Result<Option<Stored>, StoreError> {
        self.stores.fetch_now(id, max_bytes).map_err(first)
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
