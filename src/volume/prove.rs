//! Whether what was opened can be read, asked before anyone is told that it is there: the first bytes of a disk image, as whoever
//! looks into it first would ask for them. A tree needs no such thing, since opening it reads its root.
//!
//! One request proves it, and none where the cache or the backing file has the bytes: who has kept what is needed can do without a store.
//! Stores on this machine are proved by opening them. A directory of indexes proves nothing: its parts are opened when they are used, and which chunks these need is not known before.

use std::time::Duration;

use super::live::{Live, Part};
use super::open::{OpenError, SpecKind};
use crate::blob::Blob;
use crate::cache::background::{Purpose, Warmth};

/// The share of the time a mount has that a store gets to answer in, and to come back in: one part in so many. Well below the whole, so that
/// the mount fails with the store's own reason and not because it is late.
const TIME_SHARE: u32 = 4;

/// Finds out whether the images of a volume can be read. `timeout` is how long the whole mount may take.
///
/// # Errors
/// The first bytes of one can be had from nowhere; the stores that were asked are named.
pub async fn prove(live: &Live, timeout: Duration) -> Result<(), OpenError> {
    if live.config().sources.offline {
        // Nobody is to be asked, and what is not kept is known not to be there.
        return Ok(());
    }
    for part in live.parts().iter().filter(|part| part.kind == SpecKind::BlobIndex && part.blob.size() > 0) {
        if !is_local(&part.blob) {
            first_bytes(part, timeout / TIME_SHARE).await?;
        }
    }
    Ok(())
}

/// Whether all that a blob is read from was opened with it.
fn is_local(blob: &Blob) -> bool {
    matches!(blob, Blob::Chunked(blob) if blob.cache().store().blocking().is_some())
}

async fn first_bytes(part: &Part, limit: Duration) -> Result<(), OpenError> {
    let fail =
        |why: String| OpenError::new(&part.location.to_string(), format!("its first bytes cannot be had: {why}"));
    if let Blob::Chunked(blob) = &part.blob {
        // A file of a large image is being opened in the background, and may have them.
        let _ = tokio::time::timeout(limit / 2, blob.settled_backing()).await;
    }
    // No reader has read anything yet, and nothing is read ahead of one.
    let blob = part.blob.for_purpose(Purpose::Warm(Warmth { pace: None, into_memory: true, is_urgent: true }));
    match tokio::time::timeout(limit, blob.read_at(0, 1)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(fail(error.to_string())),
        Err(_) => Err(fail(last_words(&part.blob, limit))),
    }
}

/// What stores have said that are asked again and again.
fn last_words(blob: &Blob, limit: Duration) -> String {
    let Blob::Chunked(blob) = blob else { return String::new() };
    let store = blob.cache().store();
    let mut errors: Vec<String> =
        store.figures().into_iter().filter_map(|figures| Some(figures.last_error?.1)).collect();
    errors.dedup();
    match errors.is_empty() {
        true => format!("no answer from {} within {} s", store.name(), limit.as_secs_f32()),
        false => errors.join("; "),
    }
}
