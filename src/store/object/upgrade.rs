//! From the flat layout of early desync, `<prefix>/<64 hex digits>.cacnk`, to `<prefix>/<4 hex digits>/<64 hex digits>.cacnk`.
//!
//! Invariant: a chunk is deleted in its old place only after the server has confirmed it, whole, in its new one. So the work can be
//! broken off at any moment and begun again.

use futures_util::StreamExt;
use futures_util::stream;
use object_store::ObjectStoreExt;
use object_store::list::PaginatedListOptions;
use object_store::path::Path;

use super::BucketStore;
use super::answer::Trouble;
use crate::chunk::codec::Form;
use crate::digest::ChunkId;
use crate::store::StoreError;
use crate::store::layout::{COMPRESSED_SUFFIX, Layout};

/// The layout that chunks are moved to; early desync knew no other.
const LAYOUT: Layout = Layout { form: Form::Compressed, cipher: None };

/// What an upgrade did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Upgraded {
    /// Chunks moved to their new place.
    pub n_moved: u64,
    /// Objects beside them that are no chunks, and were left alone.
    pub n_others: u64,
}

/// Moves every chunk that lies directly under a store's prefix, several at once.
///
/// # Errors
/// The first that happens. What is under way then is broken off, which loses nothing; the next call goes on from there.
pub async fn upgrade(store: &BucketStore) -> Result<Upgraded, StoreError> {
    let mut done = Upgraded::default();
    let mut page_token = None;
    loop {
        let page = page(store, page_token).await?;
        let mut flat = Vec::new();
        for (object, size_bytes) in page.objects {
            match flat_chunk(&object) {
                Some(id) => flat.push((object, id, size_bytes)),
                None => done.n_others += 1,
            }
        }
        let moves = flat.into_iter().map(|(object, id, size_bytes)| move_chunk(store, object, id, size_bytes));
        let mut moves = stream::iter(moves).buffer_unordered(store.options.concurrency.max(1));
        while let Some(moved) = moves.next().await {
            moved?;
            done.n_moved += 1;
        }
        page_token = page.next;
        if page_token.is_none() {
            return Ok(done);
        }
    }
}

/// Some of the objects directly under the prefix.
struct Page {
    /// Names below the prefix, with sizes in bytes.
    objects: Vec<(String, u64)>,
    /// Where the next page begins.
    next: Option<String>,
}

async fn page(store: &BucketStore, page_token: Option<String>) -> Result<Page, StoreError> {
    let prefix = Some(store.prefix.as_str()).filter(|prefix| !prefix.is_empty());
    let listed = store.request("", |bucket| {
        let options = PaginatedListOptions {
            delimiter: Some("/".into()),
            page_token: page_token.clone(),
            ..PaginatedListOptions::default()
        };
        async move { bucket.list_paginated(prefix, options).await.map_err(Trouble::from) }
    });
    let listed = listed.await?;
    let below = |key: &Path| key.as_ref().strip_prefix(store.prefix.as_str()).map(str::to_owned);
    let objects = listed.result.objects.iter().filter_map(|meta| Some((below(&meta.location)?, meta.size))).collect();
    Ok(Page { objects, next: listed.page_token })
}

/// The chunk that a name of the flat layout is for.
fn flat_chunk(object: &str) -> Option<ChunkId> {
    let hex = object.strip_suffix(COMPRESSED_SUFFIX)?;
    let id: ChunkId = hex.parse().ok()?;
    (id.to_hex() == hex).then_some(id)
}

async fn move_chunk(store: &BucketStore, object: String, id: ChunkId, size_bytes: u64) -> Result<(), StoreError> {
    let target = LAYOUT.object_name(id);
    let (from, to) = (store.key(&object)?, store.key(&target)?);
    store
        .request(&object, |bucket| {
            let (from, to) = (&from, &to);
            async move { bucket.copy(from, to).await.map_err(Trouble::from) }
        })
        .await?;
    let copied = store.head(&target).await?.map(|meta| meta.size);
    if copied != Some(size_bytes) {
        let reason = match copied {
            None => "the server said that it was copied here, but it is not there".to_owned(),
            Some(n) => format!("the server copied {n} bytes of {size_bytes}"),
        };
        return Err(StoreError::new(store.name.clone(), store.shown(&target), reason));
    }
    store
        .request(&object, |bucket| {
            let from = &from;
            async move { super::unless_missing(bucket.delete(from).await).map(drop) }
        })
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_chunks_of_the_flat_layout_are_moved() {
        let hex = "6a1db6c1dd481f7aab2adb9c262b210edcca35624ec64c29ffca6857b1e30253";
        assert!(flat_chunk(&format!("{hex}.cacnk")).is_some());
        for other in [
            hex.to_owned(),
            format!("6a1d/{hex}.cacnk"),
            format!("{}.cacnk", hex.to_uppercase()),
            format!("{}.cacnk", &hex[1..]),
            format!("{hex}.cacnk.aes-256-gcm-511a735b"),
            "x.caibx".to_owned(),
            String::new(),
        ] {
            assert_eq!(flat_chunk(&other), None, "{other}");
        }
    }
}
