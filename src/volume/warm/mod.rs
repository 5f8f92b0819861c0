//! Warming: making a cache hold content before it is read.
//!
//! * [`Wish`] is what somebody asks for, [`wish`] finds out which bytes that is in what was opened.
//! * [`work`] sees to it that the chunks of a range are kept.
//! * [`metadata`] reads all metadata of an archive.
//! * [`warm`] does all of it for one index or archive, and counts in a [`Tally`].
//!
//! Invariants: what is kept already is not fetched; what is fetched goes past the memory tier, so that nothing is evicted that readers
//! use (but the metadata on the way); what cannot be had is counted and named, and the rest goes on.

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

/// Whether warming makes sense for a stream.
///
/// # Errors
/// Why not.
pub fn check(blob: &Blob) -> Result<(), NotWarmable> {
    let (is_kept, is_offline) = match blob {
        Blob::Chunked(blob) => {
            let cache = blob.cache();
            (cache.disk().is_some() || cache.keeper().is_some() || blob.backing().is_some(), cache.is_offline())
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
    for range in &ranges {
        match &part.blob {
            Blob::Chunked(blob) if blob.backing().is_some() => work::fill(blob, range.clone(), warming, tally).await,
            _ => work::keep(&part.blob, range.clone(), warming, tally).await,
        }
    }
    Ok(ranges)
}

/// A tree of its own to walk, so that what readers have parsed stays.
async fn open_tree(part: &Part, warming: &Warming) -> Result<Tree, WishError> {
    let opened = Tree::open(part.blob.for_purpose(warming.purpose(true)), SMALL_TREE).await;
    opened.map_err(|error| WishError::new(part.location.to_string(), error))
}
