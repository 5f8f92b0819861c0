//! Keys and signatures as the program minisign writes them: small texts of base64 and comments, over Ed25519.
//!
//! * [`PublicKey`] verifies, [`SecretKey`] signs, [`Signature`] is what lies beside the signed file.
//! * [`secret`] reads and writes the file of a secret key, with or without a password.
//!
//! A signature file has four lines (<https://jedisct1.github.io/minisign/#signature-format>):
//!
//! ```text
//! untrusted comment: any text
//! base64(algorithm, 2 bytes || key id, 8 || signature, 64)
//! trusted comment: any text
//! base64(global signature, 64)
//! ```
//!
//! The algorithm is `ED`, where the signature is of the BLAKE2b-512 of the file, or `Ed`, where it is of the file itself. The global
//! signature is of the signature's 64 bytes followed by the trusted comment, so that this comment can be believed as the file can.
//!
//! Invariant: nothing is believed but what [`PublicKey::verify`] has verified, both signatures of it.

pub mod secret;

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use blake2::{Blake2b512, Digest};
use ring::signature::{ED25519, UnparsedPublicKey};

pub use secret::{SecretKey, SecretKeyFile};

/// The largest signature file that is read, in bytes: above what minisign can write (comments of 1,024 and 8,192 bytes).
pub const MAX_SIGNATURE_BYTES: u64 = 16 << 10;

/// The largest key file that is read, in bytes.
pub const MAX_KEY_FILE_BYTES: u64 = 4 << 10;

/// The longest trusted comment, in bytes, as minisign has it.
pub const MAX_TRUSTED_COMMENT_BYTES: usize = 8192;

const UNTRUSTED: &str = "untrusted comment:";
const TRUSTED: &str = "trusted comment: ";

/// Marks keys, and signatures of the file itself.
const ALGORITHM_PURE: [u8; 2] = *b"Ed";
/// Marks signatures of the file's BLAKE2b-512.
const ALGORITHM_PREHASHED: [u8; 2] = *b"ED";

const KEY_ID_BYTES: usize = 8;
const PUBLIC_KEY_BYTES: usize = 32;
const SIGNATURE_BYTES: usize = 64;

/// Why a text is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MinisignError {
    /// It is not a public key.
    #[error("not a minisign public key ({0})")]
    PublicKey(&'static str),
    /// It is not a secret key.
    #[error("not a minisign secret key ({0})")]
    SecretKey(&'static str),
    /// It is not a signature.
    #[error("not a minisign signature ({0})")]
    Signature(&'static str),
    /// The secret key is encrypted, and no password was given.
    #[error("the secret key needs its password")]
    NeedsPassword,
    /// The password is not the one the secret key was encrypted with.
    #[error("wrong password for the secret key")]
    WrongPassword,
    /// A comment cannot stand in a signature.
    #[error("a trusted comment is one line of at most {MAX_TRUSTED_COMMENT_BYTES} bytes")]
    Comment,
    /// The system gave no random numbers.
    #[error("the system gives no random numbers")]
    Random,
}

/// Why a file is not what was signed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// Another key signed it.
    #[error("wrong key: it is signed with key {signed_with}, and the key to verify with is {wanted}")]
    WrongKey {
        /// The key that signed it, as the signature claims.
        signed_with: KeyId,
        /// The key it was verified with.
        wanted: KeyId,
    },
    /// The file or the signature was changed.
    #[error("bad signature: it is not what key {0} signed")]
    BadSignature(KeyId),
    /// The trusted comment was changed.
    #[error("bad signature: its trusted comment is not what key {0} signed")]
    BadComment(KeyId),
}

/// The name of a key: a random number, shown as minisign shows it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyId(pub [u8; KEY_ID_BYTES]);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016X}", u64::from_le_bytes(self.0))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({self})")
    }
}

/// A key that signatures are verified with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublicKey {
    /// Its name.
    pub id: KeyId,
    key: [u8; PUBLIC_KEY_BYTES],
}

impl PublicKey {
    /// Reads a public key: its file's text, or only the line of base64 in it (what minisign takes with `-P`).
    ///
    /// # Errors
    /// It is none.
    pub fn parse(text: &str) -> Result<Self, MinisignError> {
        let wrong = MinisignError::PublicKey;
        let mut lines = text.lines().map(str::trim_end).filter(|line| !line.is_empty());
        let mut line = lines.next().ok_or(wrong("it is empty"))?;
        if line.starts_with(UNTRUSTED) {
            line = lines.next().ok_or(wrong("the line behind the comment is missing"))?;
        }
        let bytes: [u8; 2 + KEY_ID_BYTES + PUBLIC_KEY_BYTES] =
            decoded(line.trim()).ok_or(wrong("56 characters of base64 are needed"))?;
        if bytes[..2] != ALGORITHM_PURE {
            return Err(wrong("it is for an unknown algorithm"));
        }
        Ok(Self { id: KeyId(part(&bytes, 2)), key: part(&bytes, 2 + KEY_ID_BYTES) })
    }

    /// The key as one line of base64.
    pub fn to_base64(&self) -> String {
        STANDARD.encode([&ALGORITHM_PURE[..], &self.id.0, &self.key].concat())
    }

    /// The text of the key's file.
    pub fn to_file_text(&self) -> String {
        format!("{UNTRUSTED} minisign public key {}\n{}\n", self.id, self.to_base64())
    }

    /// Verifies a file's signature, and that of its trusted comment.
    ///
    /// # Errors
    /// Another key signed it, or it is not what was signed.
    pub fn verify(&self, message: &[u8], signature: &Signature) -> Result<(), VerifyError> {
        if signature.key_id != self.id {
            return Err(VerifyError::WrongKey { signed_with: signature.key_id, wanted: self.id });
        }
        let key = UnparsedPublicKey::new(&ED25519, self.key);
        let is_signed = match signature.algorithm {
            Algorithm::Pure => key.verify(message, &signature.signature).is_ok(),
            Algorithm::Prehashed => key.verify(&Blake2b512::digest(message), &signature.signature).is_ok(),
        };
        if !is_signed {
            return Err(VerifyError::BadSignature(self.id));
        }
        let with_comment = [&signature.signature[..], signature.trusted_comment.as_bytes()].concat();
        key.verify(&with_comment, &signature.global).map_err(|_| VerifyError::BadComment(self.id))
    }
}

/// What was signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// The file itself (minisign's "legacy").
    Pure,
    /// The file's BLAKE2b-512.
    Prehashed,
}

/// A signature of a file. What it says of itself is to be believed after [`PublicKey::verify`] only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    /// What was signed.
    pub algorithm: Algorithm,
    /// The key that signed it.
    pub key_id: KeyId,
    /// What the signer says of the file.
    pub trusted_comment: String,
    signature: [u8; SIGNATURE_BYTES],
    global: [u8; SIGNATURE_BYTES],
}

impl Signature {
    /// Reads the text of a signature's file.
    ///
    /// # Errors
    /// It is none.
    pub fn parse(text: &[u8]) -> Result<Self, MinisignError> {
        let wrong = MinisignError::Signature;
        let text = std::str::from_utf8(text).map_err(|_| wrong("it is not text"))?;
        let mut lines = text.split('\n').map(|line| line.strip_suffix('\r').unwrap_or(line));
        let first = lines.next().unwrap_or_default();
        if !first.starts_with(UNTRUSTED) {
            return Err(wrong("it does not begin with an untrusted comment"));
        }
        let line = lines.next().ok_or(wrong("its signature is missing"))?;
        let bytes: [u8; 2 + KEY_ID_BYTES + SIGNATURE_BYTES] =
            decoded(line).ok_or(wrong("its signature is not 100 characters of base64"))?;
        let algorithm = match part(&bytes, 0) {
            ALGORITHM_PURE => Algorithm::Pure,
            ALGORITHM_PREHASHED => Algorithm::Prehashed,
            _ => return Err(wrong("it is of an unknown algorithm")),
        };
        let comment = lines.next().and_then(|line| line.strip_prefix(TRUSTED));
        let trusted_comment = comment.ok_or(wrong("its trusted comment is missing"))?.to_owned();
        let line = lines.next().ok_or(wrong("the signature of its trusted comment is missing"))?;
        let global =
            decoded(line).ok_or(wrong("the signature of its trusted comment is not 88 characters of base64"))?;
        // What stands behind would be believed by nobody, and somebody might take it as signed.
        if lines.any(|line| !line.is_empty()) {
            return Err(wrong("it has more than four lines"));
        }
        let (key_id, signature) = (KeyId(part(&bytes, 2)), part(&bytes, 2 + KEY_ID_BYTES));
        Ok(Self { algorithm, key_id, trusted_comment, signature, global })
    }

    /// The text of the signature's file, with a comment that nothing protects.
    pub fn to_file_text(&self, untrusted_comment: &str) -> String {
        let algorithm = match self.algorithm {
            Algorithm::Pure => ALGORITHM_PURE,
            Algorithm::Prehashed => ALGORITHM_PREHASHED,
        };
        let signature = STANDARD.encode([&algorithm[..], &self.key_id.0, &self.signature].concat());
        let (comment, global) = (&self.trusted_comment, STANDARD.encode(self.global));
        format!("{UNTRUSTED} {untrusted_comment}\n{signature}\n{TRUSTED}{comment}\n{global}\n")
    }
}

/// A line of base64 that holds just so many bytes.
fn decoded<const N: usize>(line: &str) -> Option<[u8; N]> {
    STANDARD.decode(line).ok()?.try_into().ok()
}

/// `N` bytes from `start`, which the caller's array has.
fn part<const N: usize>(bytes: &[u8], start: usize) -> [u8; N] {
    let mut part = [0; N];
    part.copy_from_slice(&bytes[start..start + N]);
    part
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    // What minisign 0.11 wrote: `minisign -G -W`, `minisign -S` and `minisign -S -l`, of a file with "hi\n".
    const PUBLIC: &str = include_str!("../../../tests/minisign/plain.pub");
    const PREHASHED: &[u8] = include_bytes!("../../../tests/minisign/hi.minisig");
    const LEGACY: &[u8] = include_bytes!("../../../tests/minisign/hi.legacy.minisig");
    const MESSAGE: &[u8] = b"hi\n";

    #[test]
    fn what_minisign_signed_verifies() {
        let key = PublicKey::parse(PUBLIC).unwrap();
        assert_eq!(key.to_file_text(), PUBLIC);
        assert_eq!(PublicKey::parse(&key.to_base64()), Ok(key));
        assert_eq!(PublicKey::parse(&PUBLIC.replace('\n', "\r\n")), Ok(key));
        for (text, algorithm) in [(PREHASHED, Algorithm::Prehashed), (LEGACY, Algorithm::Pure)] {
            let signature = Signature::parse(text).unwrap();
            assert_eq!(signature.algorithm, algorithm);
            assert_eq!(key.verify(MESSAGE, &signature), Ok(()));
            assert!(signature.trusted_comment.contains("file:hi"), "{signature:?}");
            let first = std::str::from_utf8(text).unwrap().lines().next().unwrap();
            assert_eq!(signature.to_file_text(first.strip_prefix("untrusted comment: ").unwrap()).as_bytes(), text);
        }
    }

    #[test]
    fn a_change_of_any_part_is_noticed() {
        let key = PublicKey::parse(PUBLIC).unwrap();
        for text in [PREHASHED, LEGACY] {
            let signature = Signature::parse(text).unwrap();
            assert_eq!(key.verify(b"ho\n", &signature), Err(VerifyError::BadSignature(key.id)));
            assert_eq!(key.verify(b"", &signature), Err(VerifyError::BadSignature(key.id)));
            for byte in 0..SIGNATURE_BYTES {
                for bit in [1, 0x80] {
                    let mut changed = signature.clone();
                    changed.signature[byte] ^= bit;
                    assert_eq!(key.verify(MESSAGE, &changed), Err(VerifyError::BadSignature(key.id)));
                    let mut changed = signature.clone();
                    changed.global[byte] ^= bit;
                    assert_eq!(key.verify(MESSAGE, &changed), Err(VerifyError::BadComment(key.id)));
                }
            }
            let mut changed = signature.clone();
            changed.trusted_comment.push(' ');
            assert_eq!(key.verify(MESSAGE, &changed), Err(VerifyError::BadComment(key.id)));
            let mut changed = signature.clone();
            changed.key_id.0[0] ^= 1;
            assert!(matches!(key.verify(MESSAGE, &changed), Err(VerifyError::WrongKey { .. })));
            let mut changed = signature.clone();
            changed.algorithm = match signature.algorithm {
                Algorithm::Pure => Algorithm::Prehashed,
                Algorithm::Prehashed => Algorithm::Pure,
            };
            assert_eq!(key.verify(MESSAGE, &changed), Err(VerifyError::BadSignature(key.id)));
            for byte in 0..PUBLIC_KEY_BYTES {
                let mut other = key;
                other.key[byte] ^= 1;
                assert!(other.verify(MESSAGE, &signature).is_err(), "byte {byte} of the key");
            }
        }
        // The global signature of one does not vouch for the other.
        let mut mixed = Signature::parse(PREHASHED).unwrap();
        mixed.global = Signature::parse(LEGACY).unwrap().global;
        assert_eq!(key.verify(MESSAGE, &mixed), Err(VerifyError::BadComment(key.id)));
    }

    #[test]
    fn a_changed_text_never_verifies() {
        let key = PublicKey::parse(PUBLIC).unwrap();
        let untrusted = PREHASHED.iter().position(|byte| *byte == b'\n').unwrap();
        for at in 0..PREHASHED.len() {
            let mut text = PREHASHED.to_vec();
            text[at] ^= 1;
            let verified = Signature::parse(&text).is_ok_and(|signature| key.verify(MESSAGE, &signature).is_ok());
            // Only the comment that says so itself may be another, and the end of the last line be missing.
            let may_be = (UNTRUSTED.len()..untrusted).contains(&at);
            assert!(!verified || may_be, "byte {at}");
            let cut = Signature::parse(&PREHASHED[..at]).is_ok_and(|signature| key.verify(MESSAGE, &signature).is_ok());
            assert!(!cut || at == PREHASHED.len() - 1, "cut at {at}");
        }
    }

    #[test]
    fn texts_that_are_none_say_why() {
        for (text, why) in [
            ("", "it is empty"),
            ("untrusted comment: x\n", "the line behind the comment is missing"),
            ("RWQ", "56 characters of base64 are needed"),
            ("/etc/caifs/key.pub", "56 characters of base64 are needed"),
            ("AAAEj1RmjwCar+HcfkWvVw45Mt22ridLpP1qcWCje1IRgsqk016I3x0R", "it is for an unknown algorithm"),
        ] {
            assert_eq!(PublicKey::parse(text), Err(MinisignError::PublicKey(why)), "{text}");
        }
        let good = std::str::from_utf8(PREHASHED).unwrap();
        let lines: Vec<&str> = good.lines().collect();
        for (text, why) in [
            (String::new(), "it does not begin with an untrusted comment"),
            (lines[0].to_owned(), "its signature is missing"),
            (format!("{}\nRUQ=", lines[0]), "its signature is not 100 characters of base64"),
            (format!("{}\n{}", lines[0], lines[1].replacen("RU", "AA", 1)), "it is of an unknown algorithm"),
            (lines[..2].join("\n"), "its trusted comment is missing"),
            (lines[..3].join("\n"), "the signature of its trusted comment is missing"),
            (format!("{good}more\n"), "it has more than four lines"),
        ] {
            assert_eq!(Signature::parse(text.as_bytes()), Err(MinisignError::Signature(why)), "{text}");
        }
        assert_eq!(Signature::parse(b"\xff"), Err(MinisignError::Signature("it is not text")));
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in r"(untrusted comment: |trusted comment: |R[UW]Q[A-Za-z0-9+/=]{0,140}|\PC|\n){0,12}") {
            let _ = PublicKey::parse(&text);
            let _ = Signature::parse(text.as_bytes());
            let _ = SecretKeyFile::parse(&text);
        }
    }
}
