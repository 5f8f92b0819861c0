//! Chunks: the variable-sized pieces that content is cut into, and the forms they are stored in.
//!
//! * [`chunker`] finds the cuts in a stream (buzhash), [`sizes`] reads chunk sizes as they are typed.
//! * [`codec`] turns stored forms (zstd, xz, gzip, plain) into plain bytes and plain bytes into zstd.
//! * [`cipher`] encrypts stored forms.
//! * [`seal`] lets the disk cache trust what it wrote itself without hashing it again; `checksum` is what it does so by.
//! * [`Chunk`] is plain bytes that have proved to be what their id says.
//!
//! Invariant: a [`Chunk`] is made only by hashing its bytes, or from a form that was sealed when they were hashed and is undamaged since.
//! So whoever holds one holds verified content.

pub(crate) mod checksum;
pub mod chunker;
pub mod cipher;
pub mod codec;
pub mod seal;
pub mod sizes;

pub use crate::format::index::MAX_CHUNK_BYTES;

use bytes::Bytes;

use crate::digest::{ChunkId, Digest};

/// Plain bytes whose digest is their id.
#[derive(Debug, Clone)]
pub struct Chunk {
    id: ChunkId,
    plain: Bytes,
}

/// Bytes that are not the chunk they were said to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("content does not match chunk id {wanted}: its digest is {found}")]
pub struct Mismatch {
    /// The id that was asked for.
    pub wanted: ChunkId,
    /// The digest of the bytes.
    pub found: ChunkId,
}

impl Chunk {
    /// The chunk that these bytes are.
    pub fn of(digest: Digest, plain: Bytes) -> Self {
        Self { id: digest.id(&plain), plain }
    }

    /// The chunks that these bytes are, in the order given, hashed as one batch.
    pub fn of_batch(digest: Digest, plain: Vec<Bytes>) -> Vec<Self> {
        let slices: Vec<&[u8]> = plain.iter().map(Bytes::as_ref).collect();
        let ids = digest.ids(&slices);
        ids.into_iter().zip(plain).map(|(id, plain)| Self { id, plain }).collect()
    }

    /// Proves that each of these bytes are the chunk named beside them, in the order given, as one batch.
    pub fn verify_batch(digest: Digest, claimed: Vec<(ChunkId, Bytes)>) -> Vec<Result<Self, Mismatch>> {
        let slices: Vec<&[u8]> = claimed.iter().map(|(_, plain)| plain.as_ref()).collect();
        let found = digest.ids(&slices);
        claimed
            .into_iter()
            .zip(found)
            .map(|((wanted, plain), found)| match wanted == found {
                true => Ok(Self { id: wanted, plain }),
                false => Err(Mismatch { wanted, found }),
            })
            .collect()
    }

    /// The chunk in a form whose seal was found right. Only [`seal::unseal`] may call this, which only the disk tier may.
    fn sealed(id: ChunkId, plain: Bytes) -> Self {
        Self { id, plain }
    }

    /// The digest of the bytes.
    pub fn id(&self) -> ChunkId {
        self.id
    }

    /// The plain bytes.
    pub fn plain(&self) -> &Bytes {
        &self.plain
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_matching_bytes_become_chunks() {
        let right = Bytes::from_static(b"right");
        let id = Digest::default().id(&right);
        let made = Chunk::verify_batch(
            Digest::default(),
            vec![(id, right.clone()), (id, Bytes::from_static(b"wrong")), (id, Bytes::new())],
        );
        assert_eq!(made[0].as_ref().map(|chunk| chunk.plain().clone()), Ok(right));
        assert!(made[1].is_err() && made[2].is_err());
    }
}
