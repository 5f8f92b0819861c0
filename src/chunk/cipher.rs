//! Encryption of stored chunks, as desync does it (formats.md 11): `nonce || ciphertext || 16-byte tag`, no associated data.
//!
//! What is encrypted is the stored form (compressed, or plain in uncompressed stores). The key's digest is part of the objects'
//! names, so a store can hold chunks under several keys. The tag proves the content to whoever has the key; that it is the chunk
//! asked for only the chunk id proves, as for every chunk.

use std::fmt;
use std::str::FromStr;

use aes_gcm::Aes256Gcm;
use chacha20poly1305::XChaCha20Poly1305;
use chacha20poly1305::aead::{Aead, AeadCore, Generate, KeyInit, Nonce};
use sha2::{Digest as _, Sha256};

/// Bytes in a key.
pub const KEY_BYTES: usize = 32;

/// Bytes of the tag behind the ciphertext.
const TAG_BYTES: usize = 16;

/// Which cipher.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Algorithm {
    /// XChaCha20-Poly1305, desync's default: 24-byte nonce.
    #[default]
    XChaCha20Poly1305,
    /// AES-256-GCM: 12-byte nonce.
    Aes256Gcm,
}

impl Algorithm {
    /// The name in options and object names.
    pub fn name(self) -> &'static str {
        match self {
            Self::XChaCha20Poly1305 => "xchacha20-poly1305",
            Self::Aes256Gcm => "aes-256-gcm",
        }
    }

    fn nonce_bytes(self) -> usize {
        match self {
            Self::XChaCha20Poly1305 => 24,
            Self::Aes256Gcm => 12,
        }
    }
}

impl FromStr for Algorithm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "" | "xchacha20-poly1305" => Ok(Self::XChaCha20Poly1305),
            "aes-256-gcm" => Ok(Self::Aes256Gcm),
            other => Err(format!("unknown encryption algorithm '{other}' (use xchacha20-poly1305 or aes-256-gcm)")),
        }
    }
}

/// A secret key.
#[derive(Clone, PartialEq, Eq)]
pub struct Key([u8; KEY_BYTES]);

impl Key {
    /// A key of these bytes.
    pub fn new(bytes: [u8; KEY_BYTES]) -> Self {
        Self(bytes)
    }

    /// The first 4 bytes of the key's SHA-256 in hex: which key an object is encrypted with.
    pub fn id(&self) -> String {
        Sha256::digest(self.0).iter().take(4).map(|byte| format!("{byte:02x}")).collect()
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", self.id())
    }
}

impl FromStr for Key {
    type Err = &'static str;

    /// Reads 64 hex digits.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // The digits of a wrong key are not repeated: they may be most of the right one.
        let wrong = "an encryption key is 64 hex digits";
        let digits = text.as_bytes();
        if digits.len() != 2 * KEY_BYTES {
            return Err(wrong);
        }
        let mut key = [0; KEY_BYTES];
        for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
            let nibble = |digit: u8| char::from(digit).to_digit(16).ok_or(wrong);
            *byte = (nibble(pair[0])? * 16 + nibble(pair[1])?) as u8;
        }
        Ok(Self(key))
    }
}

/// Why an encrypted chunk cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CipherError {
    /// It cannot even hold nonce and tag.
    #[error("the encrypted chunk is truncated: it has {0} bytes")]
    Truncated(usize),
    /// It is damaged, or was encrypted with another key.
    #[error("the encrypted chunk is damaged, or is encrypted with another key")]
    Refused,
}

/// A cipher with its key.
#[derive(Clone)]
pub struct Cipher {
    algorithm: Algorithm,
    key: Key,
    aead: AnyAead,
}

#[derive(Clone)]
enum AnyAead {
    XChaCha20Poly1305(Box<XChaCha20Poly1305>),
    Aes256Gcm(Box<Aes256Gcm>),
}

impl Cipher {
    /// A cipher with this key.
    pub fn new(algorithm: Algorithm, key: &Key) -> Self {
        let aead = match algorithm {
            Algorithm::XChaCha20Poly1305 => AnyAead::XChaCha20Poly1305(Box::new(XChaCha20Poly1305::new(&key.0.into()))),
            Algorithm::Aes256Gcm => AnyAead::Aes256Gcm(Box::new(Aes256Gcm::new(&key.0.into()))),
        };
        Self { algorithm, key: key.clone(), aead }
    }

    /// What an encrypted object's name ends with: `.xchacha20-poly1305-511a735b`.
    pub fn extension(&self) -> String {
        format!(".{}-{}", self.algorithm.name(), self.key.id())
    }

    /// Encrypts under a fresh random nonce.
    pub fn seal(&self, clear: &[u8]) -> Vec<u8> {
        match &self.aead {
            AnyAead::XChaCha20Poly1305(aead) => seal(aead.as_ref(), clear),
            AnyAead::Aes256Gcm(aead) => seal(aead.as_ref(), clear),
        }
    }

    /// Decrypts, and checks that nothing was changed.
    pub fn open(&self, sealed: &[u8]) -> Result<Vec<u8>, CipherError> {
        let nonce_bytes = self.algorithm.nonce_bytes();
        if sealed.len() < nonce_bytes + TAG_BYTES {
            return Err(CipherError::Truncated(sealed.len()));
        }
        let (nonce, rest) = sealed.split_at(nonce_bytes);
        match &self.aead {
            AnyAead::XChaCha20Poly1305(aead) => open(aead.as_ref(), nonce, rest),
            AnyAead::Aes256Gcm(aead) => open(aead.as_ref(), nonce, rest),
        }
    }
}

fn seal<A: Aead + AeadCore>(aead: &A, clear: &[u8]) -> Vec<u8> {
    let nonce = Nonce::<A>::generate();
    // Only a text beyond the cipher's limit of many GiB is refused, and a chunk has 128 MiB at the most.
    let ciphertext = aead.encrypt(&nonce, clear).expect("a chunk is shorter than the cipher's limit");
    let mut sealed = Vec::with_capacity(nonce.len() + ciphertext.len());
    sealed.extend_from_slice(&nonce);
    sealed.extend_from_slice(&ciphertext);
    sealed
}

fn open<A: Aead + AeadCore>(aead: &A, nonce: &[u8], rest: &[u8]) -> Result<Vec<u8>, CipherError> {
    let nonce = Nonce::<A>::try_from(nonce).map_err(|_| CipherError::Refused)?;
    aead.decrypt(&nonce, rest).map_err(|_| CipherError::Refused)
}

impl PartialEq for Cipher {
    fn eq(&self, other: &Self) -> bool {
        self.algorithm == other.algorithm && self.key == other.key
    }
}

impl Eq for Cipher {}

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cipher({})", &self.extension()[1..])
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const KEY: &str = "d69371915dbc4b1f0ec55e2a80f0e089accf4b32e0f8dc0e29fed7f0f30d1b26";

    #[test]
    fn a_key_is_64_hex_digits_and_is_not_shown() {
        let key: Key = KEY.parse().unwrap();
        assert_eq!(key.id(), "511a735b");
        assert!(!format!("{key:?} {:?}", Cipher::new(Algorithm::Aes256Gcm, &key)).contains(&KEY[..8]));
        for wrong in ["", &KEY[1..], &KEY.replace('d', "g")] {
            assert!(wrong.parse::<Key>().is_err());
        }
    }

    #[test]
    fn only_what_was_sealed_with_the_key_is_opened() {
        let key: Key = KEY.parse().unwrap();
        let other = Key::new([7; KEY_BYTES]);
        for (algorithm, overhead) in [(Algorithm::XChaCha20Poly1305, 40), (Algorithm::Aes256Gcm, 28)] {
            let cipher = Cipher::new(algorithm, &key);
            assert_eq!(algorithm.name().parse::<Algorithm>(), Ok(algorithm));
            for clear in [&b""[..], b"x", &[5; 100_000]] {
                let sealed = cipher.seal(clear);
                assert_eq!(sealed.len(), clear.len() + overhead);
                assert_ne!(sealed, cipher.seal(clear), "nonces are not used twice");
                assert_eq!(cipher.open(&sealed).as_deref(), Ok(clear));
                assert_eq!(Cipher::new(algorithm, &other).open(&sealed), Err(CipherError::Refused));
                for at in [0, sealed.len() / 2, sealed.len() - 1] {
                    let mut damaged = sealed.clone();
                    damaged[at] ^= 1;
                    assert_eq!(cipher.open(&damaged), Err(CipherError::Refused));
                }
                assert!(cipher.open(&sealed[..sealed.len() - 1]).is_err());
            }
            assert_eq!(cipher.open(&[0; 27]), Err(CipherError::Truncated(27)));
        }
        assert!("aes".parse::<Algorithm>().is_err());
    }
}
