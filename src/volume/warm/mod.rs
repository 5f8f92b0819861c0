//! Warming: making a cache hold content before it is read.
//!
//! * [`Wish`] is what somebody asks for, [`wish`] finds out which bytes that is in what was opened.
//! * [`work`] sees to it that the chunks of a range are kept, [`fill`] that they are in a backing file.
//! * [`metadata`] reads all metadata of an archive.
//! * [`warm`] does all of it for one index or archive, and counts in a [`Tally`].
//!
//! Invariants: what is kept already is not fetched; what is fetched goes past the memory tier, so that nothing is evicted that readers
//! use (but the metadata on the way); what cannot be had is counted and named, and the rest goes on.

pub mod fill;
pub mod metadata;
pub mod wish;
pub mod work;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Part;
use super::open::SpecKind;
use crate::blob::Blob;
use crate::cache::background::{Pace, Purpose, Warmth};
use crate::report::{Counter, Gauge};
use crate::tree::{Tree, TreeConfig};
pub use wish::{ByteRange, Wish, WishError};

/// Failures that are told one by one; of the others only their number is.
const MAX_TOLD: usize = 5;

/// What is kept of a tree that is walked for warming: enough for a deep path and one large listing.
pub const SMALL_TREE: TreeConfig =
    TreeConfig { node_bytes: 1 << 20, table_bytes: 1 << 20, listing_bytes: 1 << 20, pinned_bytes: 4 << 20 };

/// How to warm.
#[derive(Debug, Clone, Default)]
pub struct Warming {
    /// How fast.
    pub pace: Option<Arc<Pace>>,
    /// How often what failed in a way that can pass is tried again, beyond what every read does.
    pub n_retries: u32,
    /// The first pause before that; later ones are longer.
    pub pause: Duration,
    /// Whether to end at the first failure that can pass, when the retries are over.
    pub gives_up: bool,
}

impl Warming {
    /// What bytes are fetched for, that somebody may read some time.
    pub fn purpose(&self, into_memory: bool) -> Purpose {
        Purpose::Warm(Warmth { pace: self.pace.clone(), into_memory, is_urgent: false })
    }
}

/// What came of it, up to now. Chunks that come again are counted once, as far as that is remembered; a block of a plain archive
/// counts as a chunk.
#[derive(Debug, Default)]
pub struct Tally {
    /// Bytes there are to look at; more are added as they are found.
    pub total_bytes: Gauge,
    /// Bytes looked at: kept now, or given up.
    pub done_bytes: Counter,
    /// Chunks that were kept already.
    pub n_present: Counter,
    /// Chunks fetched.
    pub n_fetched: Counter,
    /// Chunks that could not be had.
    pub n_failed: Counter,
    told: Mutex<Vec<String>>,
}

impl Tally {
    /// Counts what could not be had, and remembers why for the first few.
    pub fn failed(&self, n: u64, why: impl ToString) {
        self.n_failed.add(n);
        self.tell(why);
    }

    /// Remembers why something could not be had, of the first few.
    fn tell(&self, why: impl ToString) {
        let mut told = self.told();
        if told.len() < MAX_TOLD {
            let why = why.to_string();
            if !told.contains(&why) {
                told.push(why);
            }
        }
    }

    /// Why the first of those that could not be had could not.
    pub fn failures(&self) -> Vec<String> {
        self.told().clone()
    }

    fn told(&self) -> MutexGuard<'_, Vec<String>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why nothing can be warmed here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotWarmable {
    /// There is nothing that would keep it.
    #[error("there is no cache that could keep it (name one with -c)")]
    NoCache,
    /// Nothing may be asked for.
    #[error("the stores are not asked (offline)")]
    Offline,
    /// It lies here already.
    #[error("it is a local file already")]
    Local,
}

/// Whether warming makes sense for a stream. Waits until it is known whether it has a backing file.
///
/// # Errors
/// Why not.
pub async fn check(blob: &Blob) -> Result<(), NotWarmable> {
    let (is_kept, is_offline) = match blob {
        Blob::Chunked(blob) => {
            let has_backing = blob.settled_backing().await.is_some();
            let cache = blob.cache();
            (has_backing || cache.disk().is_some() || cache.keeper().is_some(), cache.is_offline())
        }
        Blob::Remote(blocks) => (blocks.is_kept(), blocks.is_offline()),
        Blob::File(_) => return Err(NotWarmable::Local),
    };
    match (is_kept, is_offline) {
        (false, _) => Err(NotWarmable::NoCache),
        (true, true) => Err(NotWarmable::Offline),
        (true, false) => Ok(()),
    }
}

/// Warms what is wished for of one index or archive. Gives the ranges that should be kept now.
///
/// # Errors
/// A wish that cannot be understood or found; what was fetched until then stays. Chunks that cannot be had are in the tally.
pub async fn warm(
    part: &Part,
    wishes: &[Wish],
    warming: &Warming,
    tally: &Tally,
) -> Result<Vec<Range<u64>>, WishError> {
    let mut ranges = Vec::new();
    let mut wants_metadata = false;
    let mut tree: Option<Tree> = None;
    for wish in wishes {
        match wish {
            Wish::All => ranges.push(0..part.blob.size()),
            Wish::Metadata => wants_metadata = part.kind != SpecKind::BlobIndex,
            Wish::Path { path, range } => {
                if tree.is_none() && part.kind != SpecKind::BlobIndex {
                    tree = Some(open_tree(part, warming).await?);
                }
                ranges.push(wish::range_of(part, tree.as_ref(), path, *range).await?);
            }
        }
    }
    tally.total_bytes.add(ranges.iter().map(|range| range.end - range.start).sum());
    if wants_metadata {
        let tree = match tree {
            Some(tree) => tree,
            None => open_tree(part, warming).await?,
        };
        metadata::read_all(&tree, tally).await;
    }
    let backed = match &part.blob {
        // One that is being opened is to have the bytes, and not the cache.
        Blob::Chunked(blob) => blob.settled_backing().await.map(|_| blob),
        Blob::Remote(_) | Blob::File(_) => None,
    };
    for range in &ranges {
        match backed {
            Some(blob) => fill::fill(blob, range.clone(), warming, tally).await,
            None => work::keep(&part.blob, range.clone(), warming, tally).await,
        }
    }
    Ok(ranges)
}

/// A tree of its own to walk, so that what readers have parsed stays.
async fn open_tree(part: &Part, warming: &Warming) -> Result<Tree, WishError> {
    let opened = Tree::open(part.blob.for_purpose(warming.purpose(true)), SMALL_TREE).await;
    opened.map_err(|error| WishError::new(part.location.to_string(), error))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::blob::ChunkedBlob;
    use crate::blob::backing::{BackingConfig, BackingFile};
    use crate::blob::source::IndexBytes;
    use crate::cache::{Cache, CacheConfig};
    use crate::digest::Digest;
    use crate::format::index::{self, ChunkSizes, FLAG_SHA512_256, Index, IndexHeader};
    use crate::store::fault::{Fault, FaultStore};
    use crate::store::location::FileLocation;

    const CHUNK_BYTES: u64 = 4096;

    /// More than are hashed before a mount is ready.
    const N_CHUNKS: u64 = 430_000;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_large_image_is_warmed_into_its_backing_file_as_soon_as_that_is_open() {
        let plain = vec![1; CHUNK_BYTES as usize];
        let id = Digest::default().id(&plain);
        let store = FaultStore::new("store", |_, _| Fault::None);
        store.insert(id, &plain);
        let sizes = ChunkSizes { min: CHUNK_BYTES, avg: CHUNK_BYTES, max: CHUNK_BYTES };
        let items = (1..=N_CHUNKS).map(|n| (n * CHUNK_BYTES, &id));
        let bytes = index::encode(&IndexHeader { feature_flags: FLAG_SHA512_256, sizes }, items);
        let config = CacheConfig {
            memory_bytes: 1 << 20,
            inflight_bytes: 1 << 20,
            fetch_timeout: Duration::from_secs(10),
            is_offline: false,
        };
        let cache = Cache::new(Arc::new(store), config, Arc::default());
        let blob = ChunkedBlob::new(Index::open(IndexBytes::Copied(bytes)).unwrap(), "test", cache, 1 << 20);
        assert_eq!(check(&Blob::Chunked(blob.clone())).await, Err(NotWarmable::NoCache));
        let directory = tempfile::tempdir().unwrap();
        let config = BackingConfig {
            file: BackingFile::At(directory.path().join("image")),
            keep_free_bytes: 0,
            memory_bytes: 16 << 20,
            max_wait: Duration::from_secs(1),
        };
        blob.keep_in_file(config).unwrap();
        let part = Part {
            path: Vec::new(),
            number: 0,
            opening: Arc::default(),
            location: FileLocation::Local("test".into()),
            kind: SpecKind::BlobIndex,
            blob: Blob::Chunked(blob.clone()),
            tree: None,
        };
        let wish = Wish::path(b":0-40960");
        let (warming, tally) = (Warming::default(), Tally::default());
        let (warmed, checked) =
            tokio::join!(warm(&part, std::slice::from_ref(&wish), &warming, &tally), check(&part.blob));
        assert_eq!((checked, warmed.unwrap().len()), (Ok(()), 1));
        assert_eq!((tally.n_fetched.get(), tally.n_failed.get()), (10, 0), "{:?}", tally.failures());
        assert!(blob.is_filled(9) && !blob.is_filled(10) && blob.backing().is_some());
    }
}
