//! Seals: what lets a later reader trust a stored chunk without hashing its content.
//!
//! A sealed chunk is one zstd frame, as a store had it or made here, followed by a seal of [`SEAL_BYTES`]: a
//! *skippable frame* (RFC 8878, 3.1.2), which every zstd decoder passes over, so that desync reads such a file as any other.
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 4 | magic number of a skippable frame, `0x184D2A5C`, little-endian |
//! | 4 | 4 | bytes that follow, 48, little-endian |
//! | 8 | 8 | `caifs-1\n` |
//! | 16 | 32 | the chunk's id |
//! | 48 | 8 | XXH64 of the zstd frame, with XXH64 (seed 0) of the 48 bytes before as its seed, little-endian |
//!
//! Invariant: a right seal says that this frame was made from a verified chunk with this id, and that neither was damaged since. It
//! says so against accidents only: whoever may write the file can forge it, so the disk tier asks first whose file it is.

use bytes::Bytes;

use super::checksum::xxh64;
use super::{Chunk, codec};
use crate::digest::{CHUNK_ID_BYTES, ChunkId};

/// How long a seal is.
pub const SEAL_BYTES: usize = 56;

/// Where the checksum begins, and what it covers beside the frame ends.
const CHECKSUM_AT: usize = 48;

/// Skippable frame number 12, the length of what follows, and our name with the version of the seal.
const HEAD: [u8; 16] = *b"\x5c\x2a\x4d\x18\x30\0\0\0caifs-1\n";

/// The stored form of a chunk, with its seal.
pub(crate) fn seal(chunk: &Chunk, level: i32) -> Vec<u8> {
    let mut stored = codec::encode_checked(chunk.plain(), level);
    let seal = seal_for(chunk, &stored);
    stored.extend_from_slice(&seal);
    stored
}

/// The seal to put behind a frame that `chunk` was decoded from and verified.
pub(crate) fn seal_for(chunk: &Chunk, frame: &[u8]) -> [u8; SEAL_BYTES] {
    let mut seal = [0; SEAL_BYTES];
    seal[..HEAD.len()].copy_from_slice(&HEAD);
    seal[HEAD.len()..CHECKSUM_AT].copy_from_slice(&chunk.id().0);
    let checksum = checksum(frame, &seal);
    seal[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
    seal
}

/// The chunk in a stored form whose seal is right and says this id, if its content has at most `max_bytes`. Nothing is hashed.
///
/// Only the disk tier may call this, and only for a file that nobody else could have written.
pub(crate) fn unseal(id: ChunkId, stored: &[u8], max_bytes: u64) -> Option<Chunk> {
    let (frame, seal) = stored.split_last_chunk::<SEAL_BYTES>()?;
    if sealed_id(frame, seal)? != id {
        return None;
    }
    let plain = codec::decode_checked(frame, max_bytes)?;
    Some(Chunk::sealed(id, Bytes::from(plain)))
}

/// Whether what follows a frame is its seal, whatever chunk that names.
pub(super) fn is_seal_of(frame: &[u8], rest: &[u8]) -> bool {
    rest.first_chunk::<SEAL_BYTES>().is_some_and(|seal| rest.len() == SEAL_BYTES && sealed_id(frame, seal).is_some())
}

/// The id in a seal that is right for a frame.
fn sealed_id(frame: &[u8], seal: &[u8; SEAL_BYTES]) -> Option<ChunkId> {
    if seal[..HEAD.len()] != HEAD || seal[CHECKSUM_AT..] != checksum(frame, seal).to_le_bytes() {
        return None;
    }
    seal[HEAD.len()..].first_chunk::<CHUNK_ID_BYTES>().map(|id| ChunkId(*id))
}

fn checksum(frame: &[u8], seal: &[u8; SEAL_BYTES]) -> u64 {
    xxh64(xxh64(0, &seal[..CHECKSUM_AT]), frame)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::chunk::codec::{CodecError, Form};
    use crate::digest::Digest;
    use proptest::prelude::*;

    fn chunk(text: &[u8]) -> Chunk {
        Chunk::of(Digest::default(), Bytes::copy_from_slice(text))
    }

    #[test]
    fn a_sealed_chunk_opens_under_its_own_id_and_length_only() {
        let chunk = chunk(&b"a chunk, a chunk, a chunk and a bit".repeat(20));
        let n_bytes = chunk.plain().len() as u64;
        let sealed = seal(&chunk, 1);
        assert!(sealed.len() < chunk.plain().len());
        let opened = unseal(chunk.id(), &sealed, n_bytes).unwrap();
        assert_eq!((opened.id(), opened.plain()), (chunk.id(), chunk.plain()));
        assert!(unseal(Digest::default().id(b"another"), &sealed, n_bytes).is_none());
        assert!(unseal(chunk.id(), &sealed, n_bytes - 1).is_none());
        assert!(unseal(chunk.id(), &sealed[..sealed.len() - SEAL_BYTES], n_bytes).is_none());
        assert!(unseal(chunk.id(), b"", n_bytes).is_none());
    }

    #[test]
    fn a_frame_of_a_store_is_sealed_as_it_is() {
        let chunk = chunk(&[9; 5000]);
        let frame = codec::encode(chunk.plain(), 19);
        let sealed = [&frame[..], &seal_for(&chunk, &frame)].concat();
        assert_eq!(unseal(chunk.id(), &sealed, 5000).unwrap().plain(), chunk.plain());
        assert!(unseal(chunk.id(), &sealed, 4999).is_none());
    }

    #[test]
    fn a_seal_is_no_trailing_rubbish_to_a_reader_of_chunks_and_all_else_is() {
        let (one, other) = (chunk(&[7; 3000]), chunk(&[8; 3000]));
        let sealed = seal(&one, 3);
        let seal_of_other = seal(&other, 3);
        let n_frame = sealed.len() - SEAL_BYTES;
        let decode = |stored: Vec<u8>| codec::decode(Form::Compressed, &stored.into(), 3000);
        let decode_unknown = |stored: Vec<u8>| codec::decode_unknown_size(Form::Compressed, &stored.into(), 9000);
        assert_eq!(decode(sealed.clone()).unwrap(), one.plain());
        assert_eq!(decode_unknown(sealed.clone()).unwrap(), one.plain());
        assert_eq!(decode(sealed[..n_frame].to_vec()).unwrap(), one.plain());
        let wrong = [
            [&sealed[..n_frame], &seal_of_other[seal_of_other.len() - SEAL_BYTES..]].concat(),
            [&sealed, &sealed[n_frame..]].concat(),
            [&sealed, &b"\0"[..]].concat(),
            sealed[..sealed.len() - 1].to_vec(),
            [&sealed[..n_frame], &b"\x5c\x2a\x4d\x18\0\0\0\0"[..]].concat(),
        ];
        for stored in wrong {
            assert!(matches!(decode(stored.clone()), Err(CodecError::Trailing { .. })), "{stored:02x?}");
            assert!(decode_unknown(stored.clone()).is_err());
            assert!(unseal(one.id(), &stored, 3000).is_none());
        }
        assert!(decode(sealed[n_frame..].to_vec()).is_err(), "a seal alone is no chunk");
    }

    #[test]
    fn no_flipped_bit_and_no_changed_byte_passes() {
        for text in [&b"short"[..], &b"a chunk that is compressed, compressed, compressed, compressed".repeat(3)] {
            let chunk = chunk(text);
            let sealed = seal(&chunk, 3);
            for at in 0..sealed.len() {
                for bit in 0..8 {
                    let mut damaged = sealed.clone();
                    damaged[at] ^= 1 << bit;
                    assert!(unseal(chunk.id(), &damaged, 1000).is_none(), "bit {bit} of byte {at}");
                }
                for value in [0, 0xff, b'c'] {
                    let mut damaged = sealed.clone();
                    damaged[at] = value;
                    let right = damaged == sealed;
                    assert_eq!(unseal(chunk.id(), &damaged, 1000).is_some(), right, "byte {at} is {value}");
                }
                assert!(unseal(chunk.id(), &sealed[..at], 1000).is_none(), "cut to {at} bytes");
                assert!(unseal(chunk.id(), &sealed[at + 1..], 1000).is_none(), "without {} bytes", at + 1);
                let mut zeroed = sealed.clone();
                zeroed[at..].fill(0);
                assert!(unseal(chunk.id(), &zeroed, 1000).is_none(), "zeros from byte {at}");
            }
        }
    }

    proptest! {
        #[test]
        fn whatever_is_written_over_a_sealed_chunk_is_noticed(
            at in 0usize..4000, patch in proptest::collection::vec(any::<u8>(), 1..2000), len in 1usize..4000
        ) {
            let plain: Vec<u8> = (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 23) as u8).collect();
            let chunk = chunk(&plain);
            let sealed = seal(&chunk, 1);
            let mut damaged = sealed.clone();
            let at = at % damaged.len();
            let end = damaged.len().min(at + patch.len());
            damaged[at..end].copy_from_slice(&patch[..end - at]);
            let opened = unseal(chunk.id(), &damaged, 4000);
            prop_assert_eq!(opened.is_some(), damaged == sealed);
        }
    }
}
