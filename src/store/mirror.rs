//! Mirrors: stores that have the same chunks, of which the first healthy one is asked (`A|B` in store lists).
//!
//! A mirror that lacks a chunk or fails hands on to the next at once. One that is later than it uses to be is not waited for:
//! the next is asked beside it. One that fails again and again, falls silent or gives wrong bytes is set aside and probed until it
//! is well; then it has its old place again. [`super::health`] has the rules, [`super::race`] the loop.
//!
//! Invariant: a chunk is missing only if every mirror says so. If any failed instead, the answer is an error that names them all.

use std::sync::Arc;

use futures_util::future::BoxFuture;

use super::figures::StoreFigures;
use super::race::{Budget, Members, Pace};
use super::{BlockingStore, Fetched, Store, StoreError, Stored};
use crate::digest::ChunkId;

pub use super::health::MemberHealth;

/// Errors written out in one message; of more mirrors only the number is told.
const MAX_ERRORS_SHOWN: usize = 4;

/// Stores that have the same chunks.
#[derive(Debug)]
pub struct MirrorGroup {
    members: Members,
    name: String,
    are_blocking: bool,
}

impl MirrorGroup {
    /// Mirrors, the preferred one first.
    pub fn new(members: Vec<Arc<dyn Store>>) -> Self {
        let members = Members::new(members, Pace::Latency(Budget::new()));
        let name = members.names().join("|");
        let are_blocking = members.are_blocking();
        Self { members, name, are_blocking }
    }

    /// How the mirrors are doing, in their order.
    pub fn members(&self) -> Vec<MemberHealth> {
        self.members.health()
    }

    /// One line for all that failed.
    fn error(&self, id: ChunkId, mut errors: Vec<StoreError>) -> StoreError {
        if errors.len() == 1 {
            return errors.remove(0);
        }
        let is_transient = errors.iter().any(|error| error.is_transient);
        let mut lines: Vec<String> = errors.iter().take(MAX_ERRORS_SHOWN).map(reason_of).collect();
        if errors.len() > MAX_ERRORS_SHOWN {
            lines.push(format!("and {} more", errors.len() - MAX_ERRORS_SHOWN));
        }
        let object = format!("chunk {id}");
        StoreError { store: self.name.clone(), object, reason: lines.join("; "), is_transient }
    }
}

/// What failed where; the object's name mostly begins with that of its store.
fn reason_of(error: &StoreError) -> String {
    let StoreError { store, object, reason, .. } = error;
    if object.starts_with(store.as_str()) {
        format!("{object}: {reason}")
    } else {
        format!("{store}: {object}: {reason}")
    }
}

impl Store for MirrorGroup {
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
        Box::pin(async move { self.members.fetch(id, avoid).await.map_err(|errors| self.error(id, errors)) })
    }

    fn has(&self, id: ChunkId) -> BoxFuture<'_, Result<bool, StoreError>> {
        Box::pin(async move { self.members.has(id).await.map_err(|errors| self.error(id, errors)) })
    }

    fn blocking(&self) -> Option<&dyn BlockingStore> {
        self.are_blocking.then_some(self as &dyn BlockingStore)
    }

    fn figures(&self) -> Vec<StoreFigures> {
        let mut figures = self.members.figures();
        for store in &mut figures {
            store.mirror_of = Some(self.name.clone());
        }
        figures
    }
}

impl BlockingStore for MirrorGroup {
    fn fetch_now(&self, id: ChunkId, max_bytes: u64) -> Result<Option<Stored>, StoreError> {
        self.members.fetch_now(id, max_bytes).map_err(|errors| self.error(id, errors))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;

    #[test]
    fn an_error_names_every_mirror_once() {
        let group = MirrorGroup::new(Vec::new());
        let id = Digest::default().id(b"x");
        let first = StoreError::new("http://a", "http://a/6a1d/x", "403 Forbidden");
        let second = StoreError::transient("b", "o", "timed out");
        assert_eq!(group.error(id, vec![first.clone()]), first);
        let both = group.error(id, vec![first.clone(), second]);
        assert_eq!(both.reason, "http://a/6a1d/x: 403 Forbidden; b: o: timed out");
        assert!(both.is_transient);
        assert!(both.to_string().contains(&id.to_hex()));
        let many = group.error(id, vec![first; 6]);
        assert!(many.reason.ends_with("; and 2 more"), "{many}");
        assert!(!many.is_transient);
    }
}
