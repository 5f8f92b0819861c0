//! The state of a backing file, beside it as `FILE.caifs`: whose copy it is, and which of its chunks are there.
//!
//! Blocks of 512 bytes, which a disk writes whole or not at all. Each ends with the XXH64 of the 504 bytes before it, little-endian as
//! all numbers. The seed is 0 for block 0, and the number of the block added to the checksum of block 0 for all others, so that a
//! block of another state or place is never taken for this one.
//!
//! | block | offset | bytes | |
//! |---|---|---|---|
//! | 0 | 0 | 16 | `caifs-backing-1\n`; the figure is the version |
//! | | 16 | 32 | SHA-256 of the index's bytes |
//! | | 48 | 32 | SHA-256 of the chunk layout: where each chunk ends, 8 bytes each |
//! | | 80 | 8 | size of the image in bytes |
//! | | 88 | 8 | number of chunks |
//! | 1 | 0 | 4 | 1: closed in order, 2: complete, 4: somebody else wrote it at first |
//! | | 8 | 8 | inode of the backing file |
//! | | 16 | 16 | when it was made: seconds, nanoseconds, whether that is known |
//! | | 32 | 16 | when it was last changed, if it was closed in order: the same |
//! | 2.. | 0 | 504 | 2 bits for each of 2016 chunks, from the lowest: 0 absent, 1 claimed, 3 present |
//!
//! Invariants: a block with a wrong checksum, and one that is not there, says that no chunk of it is present; nothing in here is
//! believed about another image, or about another file than the one it was written for.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::chunk::checksum::xxh64;

/// What is written at a time.
pub(super) const BLOCK_BYTES: usize = 512;

/// The part of a block before its checksum.
const CONTENT_BYTES: usize = BLOCK_BYTES - 8;

/// 64-bit words of a map block.
pub(super) const BLOCK_WORDS: usize = CONTENT_BYTES / 8;

/// Chunks that one word tells of.
pub(super) const WORD_CHUNKS: usize = 32;

/// Chunks that one block tells of.
pub(super) const BLOCK_CHUNKS: usize = BLOCK_WORDS * WORD_CHUNKS;

/// Blocks before the map.
const MAP_BLOCK: u64 = 2;

const MAGIC: &[u8; 16] = b"caifs-backing-1\n";

/// What all versions begin with.
const MAGIC_START: &[u8] = b"caifs-backing-";

/// What a backing file is a copy of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// SHA-256 of the index's bytes.
    pub index: [u8; 32],
    /// SHA-256 of where its chunks end.
    pub layout: [u8; 32],
    /// Size of the image in bytes.
    pub size: u64,
    /// Chunks of the image.
    pub n_chunks: u64,
}

/// What is wrong with a state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum StateError {
    /// Not a state at all.
    #[error("is no state of a backing file")]
    Foreign,
    /// A version that we do not know.
    #[error("was written by another version of caifs")]
    Version,
    /// Its first block is damaged.
    #[error("is damaged")]
    Damaged,
    /// Another image.
    #[error("is of an image of {0} bytes")]
    Size(u64),
    /// Other chunks.
    #[error("is of an image that is cut into other chunks")]
    Layout,
    /// Other content.
    #[error("is of an image with other content")]
    Content,
}

impl Identity {
    /// Block 0.
    pub(super) fn encode(&self) -> [u8; BLOCK_BYTES] {
        let mut block = [0; BLOCK_BYTES];
        block[..16].copy_from_slice(MAGIC);
        block[16..48].copy_from_slice(&self.index);
        block[48..80].copy_from_slice(&self.layout);
        block[80..88].copy_from_slice(&self.size.to_le_bytes());
        block[88..96].copy_from_slice(&self.n_chunks.to_le_bytes());
        sealed(block, 0)
    }

    /// Checks that block 0 of a state is that of this image.
    pub(super) fn check(&self, block: &[u8]) -> Result<(), StateError> {
        let Some(block) = block.first_chunk::<BLOCK_BYTES>() else {
            // Whoever makes a state writes it whole before it gets its name.
            return Err(if block.starts_with(MAGIC_START) { StateError::Damaged } else { StateError::Foreign });
        };
        if !block.starts_with(MAGIC_START) {
            return Err(StateError::Foreign);
        }
        if !block.starts_with(MAGIC) {
            return Err(StateError::Version);
        }
        if !is_sealed(block, 0) {
            return Err(StateError::Damaged);
        }
        let size = u64_at(block, 80);
        if size != self.size {
            return Err(StateError::Size(size));
        }
        if u64_at(block, 88) != self.n_chunks || block[48..80] != self.layout {
            return Err(StateError::Layout);
        }
        match block[16..48] == self.index {
            true => Ok(()),
            false => Err(StateError::Content),
        }
    }

    /// What the checksums of all other blocks begin with.
    pub(super) fn seed(&self) -> u64 {
        u64_at(&self.encode(), CONTENT_BYTES)
    }

    /// Blocks of the map.
    pub(super) fn n_map_blocks(&self) -> u64 {
        self.n_chunks.div_ceil(BLOCK_CHUNKS as u64)
    }
}

/// When something happened, as the file system keeps it.
type Stamp = Option<(i64, u32)>;

/// Which file a state was written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileId {
    ino: u64,
    born: Stamp,
}

impl FileId {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Self { ino: metadata.ino(), born: metadata.created().ok().and_then(stamp) }
    }
}

/// How the file was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Condition {
    /// All chunks are present, and on the disk.
    pub(super) is_complete: bool,
    /// Somebody else wrote the file at first: what is absent need not be a hole.
    pub(super) is_foreign: bool,
    pub(super) file: FileId,
    /// When the file was last changed; `None` while it is open, and after that if it was not closed in order.
    pub(super) changed: Stamp,
}

impl Condition {
    /// When a file was last changed, for [`Condition::changed`].
    pub(super) fn changed_at(metadata: &Metadata) -> Stamp {
        Some((metadata.mtime(), u32::try_from(metadata.mtime_nsec()).unwrap_or(0)))
    }

    /// Block 1.
    pub(super) fn encode(&self, seed: u64) -> [u8; BLOCK_BYTES] {
        let flags =
            u32::from(self.changed.is_some()) | u32::from(self.is_complete) << 1 | u32::from(self.is_foreign) << 2;
        let mut block = [0; BLOCK_BYTES];
        block[..4].copy_from_slice(&flags.to_le_bytes());
        block[8..16].copy_from_slice(&self.file.ino.to_le_bytes());
        for (at, stamp) in [(16, self.file.born), (32, self.changed)] {
            let (seconds, nanos) = stamp.unwrap_or_default();
            block[at..at + 8].copy_from_slice(&seconds.to_le_bytes());
            block[at + 8..at + 12].copy_from_slice(&nanos.to_le_bytes());
            block[at + 12..at + 16].copy_from_slice(&u32::from(stamp.is_some()).to_le_bytes());
        }
        sealed(block, seed.wrapping_add(1))
    }

    /// From block 1; `None` when it is damaged.
    pub(super) fn decode(block: &[u8], seed: u64) -> Option<Self> {
        let block = block.first_chunk::<BLOCK_BYTES>()?;
        if !is_sealed(block, seed.wrapping_add(1)) {
            return None;
        }
        let stamp = |at: usize| {
            let is_known = u32_at(block, at + 12) == 1;
            is_known.then(|| (u64_at(block, at).cast_signed(), u32_at(block, at + 8)))
        };
        let flags = u32_at(block, 0);
        Some(Self {
            is_complete: flags & 2 != 0,
            is_foreign: flags & 4 != 0,
            file: FileId { ino: u64_at(block, 8), born: stamp(16) },
            changed: stamp(32).filter(|_| flags & 1 != 0),
        })
    }
}

/// A block of the map.
pub(super) fn encode_map_block(words: &[u64], map_block: u64, seed: u64) -> [u8; BLOCK_BYTES] {
    let mut block = [0; BLOCK_BYTES];
    for (bytes, word) in block.chunks_exact_mut(8).zip(words.iter().take(BLOCK_WORDS)) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    sealed(block, seed.wrapping_add(MAP_BLOCK + map_block))
}

/// The words of a block of the map; `None` when it is damaged.
pub(super) fn decode_map_block(block: &[u8], map_block: u64, seed: u64) -> Option<[u64; BLOCK_WORDS]> {
    let block = block.first_chunk::<BLOCK_BYTES>()?;
    if !is_sealed(block, seed.wrapping_add(MAP_BLOCK + map_block)) {
        return None;
    }
    let mut words = [0; BLOCK_WORDS];
    for (word_idx, word) in words.iter_mut().enumerate() {
        *word = u64_at(block, 8 * word_idx);
    }
    Some(words)
}

/// Where a block of the map stands in the file.
pub(super) fn map_block_at(map_block: u64) -> u64 {
    (MAP_BLOCK + map_block) * BLOCK_BYTES as u64
}

fn sealed(mut block: [u8; BLOCK_BYTES], seed: u64) -> [u8; BLOCK_BYTES] {
    let checksum = xxh64(seed, &block[..CONTENT_BYTES]);
    block[CONTENT_BYTES..].copy_from_slice(&checksum.to_le_bytes());
    block
}

fn is_sealed(block: &[u8; BLOCK_BYTES], seed: u64) -> bool {
    block[CONTENT_BYTES..] == xxh64(seed, &block[..CONTENT_BYTES]).to_le_bytes()
}

fn stamp(time: SystemTime) -> Stamp {
    let since = time.duration_since(UNIX_EPOCH).ok()?;
    Some((i64::try_from(since.as_secs()).ok()?, since.subsec_nanos()))
}

fn u64_at(block: &[u8; BLOCK_BYTES], at: usize) -> u64 {
    block[at..].first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

fn u32_at(block: &[u8; BLOCK_BYTES], at: usize) -> u32 {
    block[at..].first_chunk::<4>().map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity { index: [1; 32], layout: [2; 32], size: 77_000, n_chunks: 5000 }
    }

    #[test]
    fn a_state_is_that_of_its_image_only_and_says_what_differs() {
        let right = identity();
        let block = right.encode();
        assert_eq!(right.check(&block), Ok(()));
        let differ = [
            (Identity { size: 1, ..right }, StateError::Size(77_000)),
            (Identity { n_chunks: 1, ..right }, StateError::Layout),
            (Identity { layout: [9; 32], ..right }, StateError::Layout),
            (Identity { index: [9; 32], ..right }, StateError::Content),
        ];
        for (other, error) in differ {
            assert_eq!(other.check(&block), Err(error));
        }
        assert_eq!(right.check(b"#!/bin/sh"), Err(StateError::Foreign));
        assert_eq!(right.check(b""), Err(StateError::Foreign));
        for at in 0..BLOCK_BYTES {
            for bit in 0..8 {
                let mut damaged = block;
                damaged[at] ^= 1 << bit;
                assert!(right.check(&damaged).is_err(), "bit {bit} of byte {at}");
            }
            assert!(right.check(&block[..at]).is_err(), "{at} bytes");
        }
    }

    #[test]
    fn a_condition_comes_back_and_no_damaged_one_does() {
        let file = FileId { ino: 7, born: Some((-5, 9)) };
        for changed in [None, Some((1 << 40, 999_999_999)), Some((0, 0))] {
            for (is_complete, is_foreign) in [(false, false), (true, false), (false, true), (true, true)] {
                let condition = Condition { is_complete, is_foreign, file, changed };
                let block = condition.encode(3);
                assert_eq!(Condition::decode(&block, 3), Some(condition));
                assert_eq!(Condition::decode(&block, 4), None, "of another state");
                for at in 0..BLOCK_BYTES {
                    let mut damaged = block;
                    damaged[at] ^= 1;
                    assert_eq!(Condition::decode(&damaged, 3), None, "byte {at}");
                    assert_eq!(Condition::decode(&block[..at], 3), None, "{at} bytes");
                }
            }
        }
    }

    #[test]
    fn a_map_block_is_believed_at_its_own_place_and_undamaged_only() {
        let words: Vec<u64> = (0..BLOCK_WORDS as u64).map(|word| word.wrapping_mul(0x9E37_79B9_7F4A_7C15)).collect();
        let block = encode_map_block(&words, 4, 11);
        assert_eq!(decode_map_block(&block, 4, 11).unwrap().as_slice(), words);
        assert_eq!(decode_map_block(&block, 5, 11), None);
        assert_eq!(decode_map_block(&block, 4, 12), None);
        assert_eq!(decode_map_block(&[0; BLOCK_BYTES], 4, 11), None, "a hole");
        for at in 0..BLOCK_BYTES {
            for bit in 0..8 {
                let mut damaged = block;
                damaged[at] ^= 1 << bit;
                assert_eq!(decode_map_block(&damaged, 4, 11), None, "bit {bit} of byte {at}");
            }
            assert_eq!(decode_map_block(&block[..at], 4, 11), None, "{at} bytes");
        }
        assert_eq!(decode_map_block(&encode_map_block(&[], 0, 0), 0, 0), Some([0; BLOCK_WORDS]));
    }
}
