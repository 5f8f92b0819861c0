//! Chunk ids and the digests that make them: the only place that hashes chunk content.
//!
//! An index says by one feature flag which of two digests its chunk ids are: SHA-512/256 of FIPS 180-4 (own initial
//! values, not a truncated SHA-512) or SHA-256. A chunk id is always the digest of the plain bytes of a chunk, before
//! compression and encryption.
//!
//! Callers that have several chunks at hand pass them together ([`Digest::ids`]), so that an implementation that
//! hashes several chunks at once can take the place of this one without a change anywhere else.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest as _, Sha256, Sha512_256};

/// Bytes in a chunk id.
pub const CHUNK_ID_BYTES: usize = 32;

/// The digest of a chunk's plain bytes: its name in every store.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId(pub [u8; CHUNK_ID_BYTES]);

impl ChunkId {
    /// The id as 64 lower-case hex digits.
    pub fn to_hex(&self) -> String {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut text = String::with_capacity(2 * CHUNK_ID_BYTES);
        for byte in self.0 {
            text.push(char::from(DIGITS[usize::from(byte >> 4)]));
            text.push(char::from(DIGITS[usize::from(byte & 15)]));
        }
        text
    }

    /// The first bytes as a number: enough to tell some million ids apart, since they are digests.
    pub fn prefix(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        u64::from_be_bytes([a, b, c, d, e, f, g, h])
    }
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_hex())
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkId({self})")
    }
}

/// Why a text is not a chunk id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a chunk id (64 hex digits)")]
pub struct ChunkIdError(pub String);

impl FromStr for ChunkId {
    type Err = ChunkIdError;

    fn from_str(text: &str) -> Result<Self, ChunkIdError> {
        let wrong = || ChunkIdError(text.chars().take(80).collect());
        let digits = text.as_bytes();
        if digits.len() != 2 * CHUNK_ID_BYTES {
            return Err(wrong());
        }
        let mut id = [0; CHUNK_ID_BYTES];
        for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
            let nibble = |digit: u8| char::from(digit).to_digit(16);
            match (nibble(pair[0]), nibble(pair[1])) {
                (Some(high), Some(low)) => *byte = (high * 16 + low) as u8,
                _ => return Err(wrong()),
            }
        }
        Ok(Self(id))
    }
}

/// Which hash makes the chunk ids of an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Digest {
    /// SHA-512/256, the default of casync and desync.
    #[default]
    Sha512_256,
    /// SHA-256.
    Sha256,
}

impl Digest {
    /// The id of one chunk's plain bytes.
    pub fn id(self, plain: &[u8]) -> ChunkId {
        match self {
            Self::Sha512_256 => ChunkId(Sha512_256::digest(plain).into()),
            Self::Sha256 => ChunkId(Sha256::digest(plain).into()),
        }
    }

    /// The ids of several chunks' plain bytes, in the order given.
    pub fn ids(self, plain: &[&[u8]]) -> Vec<ChunkId> {
        plain.iter().map(|bytes| self.id(bytes)).collect()
    }

    /// A running digest over a stream, as casync prints for whole archives and blobs.
    pub fn stream(self) -> StreamDigest {
        StreamDigest(match self {
            Self::Sha512_256 => State::Sha512_256(Sha512_256::new()),
            Self::Sha256 => State::Sha256(Sha256::new()),
        })
    }

    /// The name casync and desync use on their command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha512_256 => "sha512-256",
            Self::Sha256 => "sha256",
        }
    }
}

impl FromStr for Digest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "sha512-256" | "default" => Ok(Self::Sha512_256),
            "sha256" => Ok(Self::Sha256),
            other => Err(format!("unknown digest '{other}' (use sha512-256 or sha256)")),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A digest being computed over a stream.
#[derive(Clone)]
pub struct StreamDigest(State);

#[derive(Clone)]
enum State {
    Sha512_256(Sha512_256),
    Sha256(Sha256),
}

impl StreamDigest {
    /// Takes in the next bytes of the stream.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            State::Sha512_256(state) => state.update(bytes),
            State::Sha256(state) => state.update(bytes),
        }
    }

    /// The digest of everything taken in.
    pub fn finish(self) -> ChunkId {
        match self.0 {
            State::Sha512_256(state) => ChunkId(state.finalize().into()),
            State::Sha256(state) => ChunkId(state.finalize().into()),
        }
    }
}

impl fmt::Debug for StreamDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StreamDigest")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_digests() {
        let cases: [(Digest, &[u8], &str); 4] = [
            (Digest::Sha512_256, b"", "c672b8d1ef56ed28ab87c3622c5114069bdd3ad7b8f9737498d0c01ecef0967a"),
            (Digest::Sha512_256, b"x", "6a1db6c1dd481f7aab2adb9c262b210edcca35624ec64c29ffca6857b1e30253"),
            (Digest::Sha256, b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
            (Digest::Sha256, b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        ];
        for (digest, plain, hex) in cases {
            assert_eq!(digest.id(plain).to_hex(), hex);
            let mut stream = digest.stream();
            plain.chunks(1).for_each(|byte| stream.update(byte));
            assert_eq!(stream.finish().to_hex(), hex);
        }
    }

    #[test]
    fn a_batch_gives_the_same_ids_in_order() {
        let plain: Vec<Vec<u8>> = (0..9u8).map(|i| vec![i; 100 * usize::from(i)]).collect();
        let slices: Vec<&[u8]> = plain.iter().map(Vec::as_slice).collect();
        for digest in [Digest::Sha512_256, Digest::Sha256] {
            let alone: Vec<ChunkId> = slices.iter().map(|bytes| digest.id(bytes)).collect();
            assert_eq!(digest.ids(&slices), alone);
        }
    }

    #[test]
    fn ids_parse_and_print() {
        let hex = "c672b8d1ef56ed28ab87c3622c5114069bdd3ad7b8f9737498d0c01ecef0967a";
        assert_eq!(hex.parse::<ChunkId>().map(|id| id.to_hex()), Ok(hex.to_owned()));
        for wrong in ["", "c6", &hex[1..], &hex.replace('c', "g"), &format!("{hex}0"), "é"] {
            assert!(wrong.parse::<ChunkId>().is_err(), "{wrong}");
        }
    }
}
