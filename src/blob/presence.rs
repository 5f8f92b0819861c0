//! Which pieces (chunks, blocks) of a stream are at hand and which were read: for whoever looks from outside.
//!
//! Functions of [`Blob`] tell of each piece where it lies and in which tiers it is.
//! Invariant: nothing here asks a store, fetches, or makes anything younger.

use std::ops::Range;

use super::Blob;
use crate::cache::blocks::BLOCK_BYTES;
use crate::cache::touched::Touched;

impl Blob {
    /// How many pieces it is fetched in; 0 for a local file, which is not fetched.
    pub fn n_pieces(&self) -> u64 {
        match self {
            Self::Chunked(blob) => blob.index().n_chunks() as u64,
            Self::File(_) => 0,
            Self::Remote(blocks) => blocks.n_blocks(),
        }
    }

    /// The bytes a piece has; `None` when there is no such piece, or the index is damaged there.
    pub fn piece_span(&self, number: u64) -> Option<Range<u64>> {
        match self {
            Self::Chunked(blob) => {
                let item = blob.index().item(usize::try_from(number).ok()?).ok()?;
                Some(item.start..item.end)
            }
            Self::File(_) => None,
            Self::Remote(blocks) => {
                let start = number.checked_mul(BLOCK_BYTES)?;
                let end = start.saturating_add(BLOCK_BYTES).min(blocks.size());
                (start < end).then_some(start..end)
            }
        }
    }

    /// Whether a piece is in memory, and whether it is being fetched.
    pub fn is_at_hand(&self, number: u64) -> (bool, bool) {
        match self {
            Self::Chunked(blob) => match usize::try_from(number).ok().and_then(|at| blob.index().item(at).ok()) {
                Some(item) => (blob.cache().is_in_memory(&item.id), blob.cache().is_in_flight(&item.id)),
                None => (false, false),
            },
            Self::File(_) => (false, false),
            Self::Remote(blocks) => blocks.is_at_hand(number),
        }
    }

    /// Whether a piece is kept on disk, as far as can be told without reading it. Blocks on the disk: not for a thread that others wait for.
    pub fn is_on_disk(&self, number: u64) -> bool {
        match self {
            Self::Chunked(blob) => {
                let Ok(at) = usize::try_from(number) else { return false };
                if blob.backing().is_some_and(|backing| backing.has(at)) {
                    return true;
                }
                let item = blob.index().item(at).ok();
                item.is_some_and(|item| blob.cache().disk().is_some_and(|disk| disk.has(item.id)))
            }
            Self::File(_) => true,
            Self::Remote(blocks) => blocks.is_on_disk(number),
        }
    }

    /// Which parts were read since it was opened; `None` for a local file, where nobody remembers.
    pub fn touched(&self) -> Option<&Touched> {
        match self {
            Self::Chunked(blob) => Some(blob.touched()),
            Self::File(_) => None,
            Self::Remote(blocks) => Some(blocks.touched()),
        }
    }
}
