//! An index by its two ends: how long its blob is and what its first chunk is, without the table between.

use super::index::{
    ITEM_BYTES, Index, IndexError, IndexHeader, Item, MIN_INDEX_BYTES, TABLE_START_BYTES, check_length, tail_for,
    u64_at,
};

/// What the two ends of an index tell, when only they are at hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    /// What it says before its table.
    pub header: IndexHeader,
    /// Length of the blob in bytes, by the last item.
    pub blob_size: u64,
    /// The first chunk; `None` for an empty blob.
    pub first: Option<Item>,
}

impl Ends {
    /// Bytes needed from the beginning: all before the second item (or the whole of a shorter index).
    pub const HEAD_BYTES: usize = TABLE_START_BYTES + ITEM_BYTES;
    /// Bytes needed from the end: the last item and the tail (or the whole of a shorter index).
    pub const END_BYTES: usize = 2 * ITEM_BYTES;

    /// Reads the ends of an index of `n_bytes`. The checks are those of [`Index::open`], and the first item's.
    pub fn read(head: &[u8], end: &[u8], n_bytes: u64) -> Result<Self, IndexError> {
        let bad_tail = IndexError::BadTail { has: n_bytes };
        if n_bytes < MIN_INDEX_BYTES as u64 {
            // Told by the whole of it.
            return match Index::open(head) {
                Ok(_) => Err(bad_tail),
                Err(error) => Err(error),
            };
        }
        let has_items = n_bytes > MIN_INDEX_BYTES as u64;
        let file_bytes = usize::try_from(n_bytes).unwrap_or(usize::MAX);
        // The same index with no more than its first chunk goes through the checks of all indexes.
        let kept = if has_items { Self::HEAD_BYTES } else { TABLE_START_BYTES };
        let mut abridged = head.get(..kept).unwrap_or(head).to_vec();
        abridged.extend_from_slice(&tail_for(kept + ITEM_BYTES));
        let abridged = Index::open(abridged)?;
        let is_whole_table = (n_bytes - MIN_INDEX_BYTES as u64).is_multiple_of(ITEM_BYTES as u64);
        if !is_whole_table || end.last_chunk::<ITEM_BYTES>() != Some(&tail_for(file_bytes)) {
            return Err(bad_tail);
        }
        let first = if has_items { Some(abridged.item(0)?) } else { None };
        let blob_size = match first {
            Some(_) => end.len().checked_sub(Self::END_BYTES).and_then(|at| u64_at(end, at)).ok_or(bad_tail)?,
            None => 0,
        };
        let n_chunks = (n_bytes - MIN_INDEX_BYTES as u64) / ITEM_BYTES as u64;
        check_length(blob_size, n_chunks, abridged.header().sizes.max)?;
        match first {
            Some(Item { end, .. }) if end > blob_size => Err(IndexError::BadItem {
                chunk: n_chunks - 1,
                start: end,
                end: blob_size,
                max: abridged.header().sizes.max,
            }),
            _ => Ok(Self { header: *abridged.header(), blob_size, first }),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::digest::ChunkId;
    use crate::format::index::{ChunkSizes, FLAG_SHA512_256, encode};

    fn read(bytes: &[u8]) -> Result<Ends, IndexError> {
        let n = bytes.len();
        let (head, end) = (&bytes[..n.min(Ends::HEAD_BYTES)], &bytes[n.saturating_sub(Ends::END_BYTES)..]);
        Ends::read(head, end, n as u64)
    }

    fn sample(ends: &[u64]) -> Vec<u8> {
        let header = IndexHeader { feature_flags: FLAG_SHA512_256, sizes: ChunkSizes { min: 1, avg: 20, max: 100 } };
        let ids: Vec<ChunkId> = (0..ends.len()).map(|i| ChunkId([i as u8 + 1; 32])).collect();
        encode(&header, ends.iter().copied().zip(&ids))
    }

    #[test]
    fn the_ends_tell_what_the_whole_tells() {
        for ends in [&[][..], &[7], &[7, 90], &[7, 90, 100, 150, 151]] {
            let bytes = sample(ends);
            let whole = Index::open(&bytes).unwrap();
            let ends = read(&bytes).unwrap();
            assert_eq!((ends.header, ends.blob_size), (*whole.header(), whole.blob_size()));
            assert_eq!(ends.first, whole.item(0).ok());
        }
    }

    #[test]
    fn what_is_no_sound_index_is_an_error_and_never_a_panic() {
        let bytes = sample(&[7, 90, 100]);
        for n in 0..bytes.len() {
            assert!(read(&bytes[..n]).is_err(), "cut at {n}");
        }
        for at in 0..bytes.len() {
            for flipped in [0x01, 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] ^= flipped;
                // What lies between the ends is not looked at; all else is as the whole index sees it.
                if let (Ok(ends), Ok(whole)) = (read(&damaged), Index::open(&damaged)) {
                    assert_eq!(ends.blob_size, whole.blob_size(), "byte {at}");
                } else if Index::open(&damaged).is_err() {
                    assert!(read(&damaged).is_err(), "byte {at}");
                }
            }
        }
        for (last, is_sound) in [(300, true), (301, false), ((1 << 60) - 2, false), (u64::MAX, false)] {
            let bytes = sample(&[7, 90, last]);
            assert_eq!((read(&bytes).is_ok(), Index::open(&bytes).is_ok()), (is_sound, is_sound), "{last}");
        }
        assert!(Ends::read(&[], &[], u64::MAX).is_err() && Ends::read(&bytes[..64], &bytes[..10], 144).is_err());
    }
}
