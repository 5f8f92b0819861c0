//! Secret keys of minisign: a file of 158 bytes in base64, encrypted with a password or not.
//!
//! ```text
//! "Ed" || kdf, 2 bytes ("Sc", or zeros for none) || "B2" || salt, 32 || opslimit, u64 || memlimit, u64
//!   || key id, 8 || seed, 32 || public key, 32 || checksum, 32
//! ```
//!
//! The last 104 bytes are combined by exclusive or with as many bytes of scrypt when there is a password. The checksum is the BLAKE2b-256
//! of `"Ed"`, key id, seed and public key; without a password minisign leaves zeros there. (minisign.h, struct SeckeyStruct.)
//!
//! Invariant: no secret is in a `Debug` text or an error.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use blake2::{Blake2b256, Blake2b512, Digest};
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{Ed25519KeyPair, KeyPair};
use scrypt::{Params, scrypt};

use super::{
    ALGORITHM_PURE, Algorithm, KEY_ID_BYTES, KeyId, MAX_TRUSTED_COMMENT_BYTES, MinisignError, PUBLIC_KEY_BYTES,
    PublicKey, SIGNATURE_BYTES, Signature, UNTRUSTED, decoded, part,
};

const KDF_SCRYPT: [u8; 2] = *b"Sc";
const KDF_NONE: [u8; 2] = [0, 0];
const CHECKSUM_BLAKE2B: [u8; 2] = *b"B2";

const SALT_BYTES: usize = 32;
const SEED_BYTES: usize = 32;
const CHECKSUM_BYTES: usize = 32;
/// What a password protects: key id, seed, public key and checksum.
const PROTECTED_BYTES: usize = KEY_ID_BYTES + SEED_BYTES + PUBLIC_KEY_BYTES + CHECKSUM_BYTES;
/// What stands before it.
const HEAD_BYTES: usize = 6 + SALT_BYTES + 16;

/// The work of a password that minisign chooses: 1 GiB of memory and some seconds.
pub const USUAL_WORK: Work = Work { operations: 33_554_432, memory_bytes: 1 << 30 };

/// The most work that a key file may ask for: that which minisign chooses, and as much again.
const MAX_MEMORY_BYTES: u64 = 2 << 30;
const MAX_OPERATIONS: u64 = 1 << 28;
const MAX_PARALLEL: u64 = 1024;

/// How much work it is to try a password, in the measures of libsodium.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// "opslimit".
    pub operations: u64,
    /// "memlimit", in bytes.
    pub memory_bytes: u64,
}

impl Work {
    /// The parameters of scrypt, as libsodium's crypto_pwhash_scryptsalsa208sha256 finds them; `None` when it is more than we do.
    fn params(self) -> Option<Params> {
        const R: u64 = 8;
        const MIN_OPERATIONS: u64 = 32768;
        if self.operations > MAX_OPERATIONS || self.memory_bytes > MAX_MEMORY_BYTES {
            return None;
        }
        let operations = self.operations.max(MIN_OPERATIONS);
        // The largest power of two that is at most `max_n`, and 2 at least.
        let log_of = |max_n: u64| (1..63).find(|log_n| (1_u64 << log_n) > max_n / 2);
        let (log_n, p) = if operations < self.memory_bytes / 32 {
            (log_of(operations / (R * 4))?, 1)
        } else {
            let log_n = log_of(self.memory_bytes / (R * 128))?;
            let rp = (operations / 4) >> log_n;
            (log_n, rp.min(0x3fff_ffff) / R)
        };
        if p > MAX_PARALLEL {
            return None;
        }
        Params::new(log_n, R as u32, p as u32).ok()
    }

    /// As many bytes as a password protects, made of the password.
    fn stream(self, password: &[u8], salt: &[u8]) -> Option<[u8; PROTECTED_BYTES]> {
        let mut stream = [0; PROTECTED_BYTES];
        scrypt(password, salt, &self.params()?, &mut stream).ok()?;
        Some(stream)
    }
}

/// A secret key's file: what it says without its password.
#[derive(Clone)]
pub struct SecretKeyFile {
    password: Option<(Work, [u8; SALT_BYTES])>,
    protected: [u8; PROTECTED_BYTES],
}

impl fmt::Debug for SecretKeyFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretKeyFile").field("needs_password", &self.needs_password()).finish_non_exhaustive()
    }
}

impl SecretKeyFile {
    /// Reads the text of a secret key's file.
    ///
    /// # Errors
    /// It is none, or its password is more work than we do.
    pub fn parse(text: &str) -> Result<Self, MinisignError> {
        let wrong = MinisignError::SecretKey;
        let mut lines = text.lines().map(str::trim_end).filter(|line| !line.is_empty());
        let first = lines.next().ok_or(wrong("it is empty"))?;
        if !first.starts_with(UNTRUSTED) {
            return Err(wrong("it does not begin with an untrusted comment"));
        }
        let line = lines.next().ok_or(wrong("the line behind the comment is missing"))?;
        let bytes: [u8; HEAD_BYTES + PROTECTED_BYTES] =
            decoded(line).ok_or(wrong("212 characters of base64 are needed"))?;
        if bytes[..2] != ALGORITHM_PURE || bytes[4..6] != CHECKSUM_BLAKE2B {
            return Err(wrong("it is for an unknown algorithm"));
        }
        let number = |start| u64::from_le_bytes(part(&bytes, start));
        let work = Work { operations: number(6 + SALT_BYTES), memory_bytes: number(14 + SALT_BYTES) };
        let password = match part(&bytes, 2) {
            KDF_NONE => None,
            KDF_SCRYPT if work.params().is_some() => Some((work, part(&bytes, 6))),
            KDF_SCRYPT => return Err(wrong("its password is more work than can be done")),
            _ => return Err(wrong("it is encrypted in an unknown way")),
        };
        Ok(Self { password, protected: part(&bytes, HEAD_BYTES) })
    }

    /// Whether it is encrypted.
    pub fn needs_password(&self) -> bool {
        self.password.is_some()
    }

    /// The key in it. With a password this takes seconds and as much memory as the file says, 1 GiB as a rule.
    ///
    /// # Errors
    /// The password is missing or wrong, or the key is damaged.
    pub fn open(&self, password: Option<&[u8]>) -> Result<SecretKey, MinisignError> {
        let mut bytes = self.protected;
        if let Some((work, salt)) = &self.password {
            let password = password.ok_or(MinisignError::NeedsPassword)?;
            let too_much = MinisignError::SecretKey("its password is more work than can be done");
            let stream = work.stream(password, salt).ok_or(too_much)?;
            bytes.iter_mut().zip(stream).for_each(|(byte, other)| *byte ^= other);
        }
        let id = KeyId(part(&bytes, 0));
        let (seed, public) = (part(&bytes, KEY_ID_BYTES), part(&bytes, KEY_ID_BYTES + SEED_BYTES));
        let found: [u8; CHECKSUM_BYTES] = part(&bytes, PROTECTED_BYTES - CHECKSUM_BYTES);
        let is_unchecked = self.password.is_none() && found == [0; CHECKSUM_BYTES];
        if !is_unchecked && found != checksum(id, &seed, &public) {
            return Err(match self.password {
                Some(_) => MinisignError::WrongPassword,
                None => MinisignError::SecretKey("its checksum is wrong: it is damaged"),
            });
        }
        SecretKey::new(id, seed, public)
    }
}

/// A key that files are signed with.
pub struct SecretKey {
    id: KeyId,
    seed: [u8; SEED_BYTES],
    public: [u8; PUBLIC_KEY_BYTES],
    pair: Ed25519KeyPair,
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretKey").field("id", &self.id).finish_non_exhaustive()
    }
}

impl SecretKey {
    fn new(id: KeyId, seed: [u8; SEED_BYTES], public: [u8; PUBLIC_KEY_BYTES]) -> Result<Self, MinisignError> {
        let damaged = |_| MinisignError::SecretKey("its two halves do not fit: it is damaged");
        let pair = Ed25519KeyPair::from_seed_and_public_key(&seed, &public).map_err(damaged)?;
        Ok(Self { id, seed, public, pair })
    }

    /// A new key.
    ///
    /// # Errors
    /// The system gives no random numbers.
    pub fn generate() -> Result<Self, MinisignError> {
        let (id, seed) = (random()?, random::<SEED_BYTES>()?);
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed).map_err(|_| MinisignError::Random)?;
        let public = part(pair.public_key().as_ref(), 0);
        Ok(Self { id: KeyId(id), seed, public, pair })
    }

    /// The key that verifies what this one signs.
    pub fn public_key(&self) -> PublicKey {
        PublicKey { id: self.id, key: self.public }
    }

    /// Signs a file by its BLAKE2b-512.
    ///
    /// # Errors
    /// The comment cannot stand in a signature.
    pub fn sign(&self, message: &[u8], trusted_comment: &str) -> Result<Signature, MinisignError> {
        self.sign_as(Algorithm::Prehashed, message, trusted_comment)
    }

    fn sign_as(&self, algorithm: Algorithm, message: &[u8], comment: &str) -> Result<Signature, MinisignError> {
        // A tab stands in the comments of minisign itself.
        if comment.len() > MAX_TRUSTED_COMMENT_BYTES || comment.chars().any(|c| c.is_control() && c != '\t') {
            return Err(MinisignError::Comment);
        }
        let signed = |bytes: &[u8]| -> [u8; SIGNATURE_BYTES] { part(self.pair.sign(bytes).as_ref(), 0) };
        let signature = match algorithm {
            Algorithm::Pure => signed(message),
            Algorithm::Prehashed => signed(&Blake2b512::digest(message)),
        };
        let global = signed(&[&signature[..], comment.as_bytes()].concat());
        Ok(Signature { algorithm, key_id: self.id, trusted_comment: comment.to_owned(), signature, global })
    }

    /// The text of the key's file, encrypted if there is a password.
    ///
    /// # Errors
    /// The system gives no random numbers.
    pub fn to_file_text(&self, password: Option<(&[u8], Work)>) -> Result<String, MinisignError> {
        let mut protected = [&self.id.0[..], &self.seed, &self.public, &[0; CHECKSUM_BYTES]].concat();
        let (mut kdf, mut salt, mut work) = (KDF_NONE, [0; SALT_BYTES], Work { operations: 0, memory_bytes: 0 });
        if let Some((password, wanted)) = password {
            (kdf, salt, work) = (KDF_SCRYPT, random()?, wanted);
            let too_much = MinisignError::SecretKey("its password is more work than can be done");
            let stream = work.stream(password, &salt).ok_or(too_much)?;
            protected[PROTECTED_BYTES - CHECKSUM_BYTES..].copy_from_slice(&checksum(self.id, &self.seed, &self.public));
            protected.iter_mut().zip(stream).for_each(|(byte, other)| *byte ^= other);
        }
        let numbers = [work.operations.to_le_bytes(), work.memory_bytes.to_le_bytes()].concat();
        let bytes = [&ALGORITHM_PURE[..], &kdf, &CHECKSUM_BLAKE2B, &salt, &numbers, &protected].concat();
        // The words that minisign writes in both cases.
        Ok(format!("{UNTRUSTED} minisign encrypted secret key\n{}\n", STANDARD.encode(bytes)))
    }
}

fn checksum(id: KeyId, seed: &[u8; SEED_BYTES], public: &[u8; PUBLIC_KEY_BYTES]) -> [u8; CHECKSUM_BYTES] {
    Blake2b256::digest([&ALGORITHM_PURE[..], &id.0, seed, public].concat()).into()
}

fn random<const N: usize>() -> Result<[u8; N], MinisignError> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| MinisignError::Random)?;
    Ok(bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    // What minisign 0.11 wrote with `-G -W`; its public key and signatures stand beside it.
    const PLAIN: &str = include_str!("../../../tests/minisign/plain.sec");
    const PUBLIC: &str = include_str!("../../../tests/minisign/plain.pub");

    /// Little enough work for a test.
    const LITTLE: Work = Work { operations: 32768, memory_bytes: 1 << 20 };

    #[test]
    fn the_key_of_minisign_is_read_and_written_as_it_was() {
        let file = SecretKeyFile::parse(PLAIN).unwrap();
        assert!(!file.needs_password());
        let key = file.open(None).unwrap();
        assert_eq!(key.public_key().to_file_text(), PUBLIC);
        assert_eq!(key.to_file_text(None).unwrap(), PLAIN);
    }

    #[test]
    fn what_is_signed_verifies_and_says_what_it_was_given() {
        let key = SecretKey::generate().unwrap();
        for algorithm in [Algorithm::Pure, Algorithm::Prehashed] {
            for comment in ["", "timestamp:1\tfile:x", "é"] {
                let signature = key.sign_as(algorithm, b"content", comment).unwrap();
                let read = Signature::parse(signature.to_file_text("a comment").as_bytes()).unwrap();
                assert_eq!((&read, read.trusted_comment.as_str()), (&signature, comment));
                assert_eq!(key.public_key().verify(b"content", &read), Ok(()));
            }
        }
        for comment in ["a\nb", "a\rb", "\u{1b}[1m", &"x".repeat(MAX_TRUSTED_COMMENT_BYTES + 1)] {
            assert_eq!(key.sign(b"", comment), Err(MinisignError::Comment));
        }
        assert_ne!(key.public_key(), SecretKey::generate().unwrap().public_key());
    }

    #[test]
    fn a_password_protects_a_key() {
        let key = SecretKey::generate().unwrap();
        let text = key.to_file_text(Some((b"correct", LITTLE))).unwrap();
        let file = SecretKeyFile::parse(&text).unwrap();
        assert!(file.needs_password());
        assert_eq!(file.open(None).unwrap_err(), MinisignError::NeedsPassword);
        assert_eq!(file.open(Some(b"wrong")).unwrap_err(), MinisignError::WrongPassword);
        assert_eq!(file.open(Some(b"correct")).unwrap().public_key(), key.public_key());
        assert_ne!(key.to_file_text(Some((b"correct", LITTLE))).unwrap(), text, "another salt");
    }

    #[test]
    fn a_damaged_key_is_refused() {
        let text = SecretKey::generate().unwrap().to_file_text(None).unwrap();
        let line = text.lines().nth(1).unwrap();
        let bytes = STANDARD.decode(line).unwrap();
        // The two marks, seed, public key and checksum; the salt and the numbers mean nothing without a password, the id is a name.
        for at in [0, 2, 4, HEAD_BYTES + 8, HEAD_BYTES + 40, HEAD_BYTES + 103] {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            let text = format!("{UNTRUSTED} x\n{}\n", STANDARD.encode(damaged));
            assert!(SecretKeyFile::parse(&text).and_then(|file| file.open(None)).is_err(), "byte {at}");
        }
        for (text, why) in [
            ("", "it is empty"),
            ("RWQ", "it does not begin with an untrusted comment"),
            ("untrusted comment: x", "the line behind the comment is missing"),
            ("untrusted comment: x\nRWQ=", "212 characters of base64 are needed"),
        ] {
            assert_eq!(SecretKeyFile::parse(text).unwrap_err(), MinisignError::SecretKey(why));
        }
    }

    #[test]
    fn the_work_of_a_password_is_that_of_libsodium_and_bounded() {
        let params = |operations, memory_bytes| {
            Work { operations, memory_bytes }.params().map(|params| (params.log_n(), params.r(), params.p()))
        };
        assert_eq!(params(USUAL_WORK.operations, USUAL_WORK.memory_bytes), Some((20, 8, 1)));
        assert_eq!(params(524_288, 16 << 20), Some((14, 8, 1)));
        for (operations, memory_bytes) in [(u64::MAX, 1 << 20), (1 << 20, u64::MAX), (1 << 28, 0), (1 << 28, 1 << 11)] {
            assert_eq!(params(operations, memory_bytes), None, "{operations} {memory_bytes}");
        }
        assert!(params(0, 0).is_some() && params(0, 1 << 30).is_some());
    }

    #[test]
    fn secrets_are_not_shown() {
        let file = SecretKeyFile::parse(PLAIN).unwrap();
        assert_eq!(format!("{file:?}"), "SecretKeyFile { needs_password: false, .. }");
        let key = file.open(None).unwrap();
        assert_eq!(format!("{key:?}"), format!("SecretKey {{ id: KeyId({}), .. }}", key.public_key().id));
    }
}
