//! Trust in an index: what it must be before anything of it is used. An index names the digest of every chunk, and chunks are verified
//! against it, so that all content is authentic if the index is, whatever the stores, mirrors and caches on the way are.
//!
//! * [`check`] says whether an index is what [`TrustConfig`] demands: of a SHA-256, or signed with a key.
//! * [`signature_of`] is where the signature lies: beside the index, its name with `.minisig` behind it.
//! * [`key_text`] finds a key that is given by its file.
//!
//! # From the check to the use
//!
//! What was checked is what is used: the bytes are read once, into memory or into a file without a name (see
//! [`IndexBytes::copy`](crate::blob::source::IndexBytes::copy)), checked there, and used from there. Somebody who changes the index's
//! file, or what its server sends, between the check and the use changes nothing. A kept copy of an index or signature is checked as a
//! fresh one is, each time it is used, and a fresh one is kept only after it was checked: a mirror can neither slip one into the cache
//! nor push a good one out of it.
//!
//! A signature says who made an index. It does not say which: whoever serves it may serve an older one, or another one that the same
//! key signed. Where that matters, the SHA-256 says which, or a key for each image.
//!
//! Invariant: with a demand, an index that does not meet it is never opened; what cannot be checked as a whole (a plain archive) is refused.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::config::TrustConfig;
use crate::digest::ChunkId;
use crate::format::minisign::{MAX_KEY_FILE_BYTES, MinisignError, PublicKey, Signature, VerifyError};
use crate::store::location::FileLocation;

/// What the name of a signature has behind that of what was signed.
pub const SIGNATURE_SUFFIX: &str = ".minisig";

/// Why an index is not trusted, or cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    /// It has another SHA-256.
    #[error("wrong index: its SHA-256 is {found}, and not {wanted} as index-sha256 demands")]
    WrongDigest {
        /// What it is, in hex.
        found: String,
        /// What it should be, in hex.
        wanted: String,
    },
    /// Nothing is signed.
    #[error("no signature found: there is no {0} (caifs sign makes it)")]
    NoSignature(String),
    /// It is not a signature.
    #[error("{name}: {error}")]
    NotASignature {
        /// Where it lies.
        name: String,
        /// Why.
        error: MinisignError,
    },
    /// It is not signed with this key, or not this is signed.
    #[error(transparent)]
    Signature(#[from] VerifyError),
    /// The key cannot be read.
    #[error("verify-key {name}: {why}")]
    Key {
        /// The key as given, or its file.
        name: String,
        /// Why.
        why: String,
    },
    /// A plain archive.
    #[error("a plain archive cannot be checked before it is read ({0} is for indexes; caifs tar -i makes one)")]
    PlainArchive(&'static str),
    /// Standard input has nothing beside it.
    #[error("an index from standard input has no signature beside it (verify-key needs one; index-sha256 does not)")]
    Stdin,
}

/// Whether anything is demanded of an index.
pub fn is_demanded(config: &TrustConfig) -> bool {
    *config != TrustConfig::default()
}

/// Checks the bytes of an index. `signature` is the content of the file beside it, if there is one, and `signature_name` what to call that.
/// Gives the signature if one is demanded; its trusted comment can be believed then.
///
/// # Errors
/// The index is not what is demanded, in one line; or the key cannot be read.
pub fn check(
    bytes: &[u8],
    signature: Option<&[u8]>,
    signature_name: &str,
    config: &TrustConfig,
) -> Result<Option<Signature>, TrustError> {
    if let Some(wanted) = config.index_sha256 {
        let found: [u8; 32] = Sha256::digest(bytes).into();
        if found != wanted {
            let (found, wanted) = (ChunkId(found).to_hex(), ChunkId(wanted).to_hex());
            return Err(TrustError::WrongDigest { found, wanted });
        }
    }
    let Some(key) = &config.verify_key else { return Ok(None) };
    let key = public_key(key)?;
    let name = || signature_name.to_owned();
    let signature = signature.ok_or_else(|| TrustError::NoSignature(name()))?;
    let signature = Signature::parse(signature).map_err(|error| TrustError::NotASignature { name: name(), error })?;
    key.verify(bytes, &signature)?;
    Ok(Some(signature))
}

/// Refuses a plain archive if anything is demanded: its content is covered by no table of chunks, so that it would have to be read as a
/// whole before the first byte of it could be believed, and again whenever it is used.
///
/// # Errors
/// Something is demanded.
pub fn refuse_plain_archive(config: &TrustConfig) -> Result<(), TrustError> {
    match (&config.index_sha256, &config.verify_key) {
        (None, None) => Ok(()),
        (Some(_), _) => Err(TrustError::PlainArchive("index-sha256")),
        (None, Some(_)) => Err(TrustError::PlainArchive("verify-key")),
    }
}

/// Where the signature of an index lies; `None` for standard input.
pub fn signature_of(location: &FileLocation) -> Option<FileLocation> {
    match location {
        FileLocation::Local(path) => {
            let mut path = path.clone().into_os_string();
            path.push(SIGNATURE_SUFFIX);
            Some(FileLocation::Local(PathBuf::from(path)))
        }
        FileLocation::Remote { directory, directory_text, name } => Some(FileLocation::Remote {
            directory: directory.clone(),
            directory_text: directory_text.clone(),
            name: format!("{name}{SIGNATURE_SUFFIX}"),
        }),
        FileLocation::Stdio => None,
    }
}

/// The line of base64 of a key that is given by that line or by its file.
///
/// # Errors
/// It is neither.
pub fn key_text(given: &str) -> Result<String, TrustError> {
    public_key(given).map(|key| key.to_base64())
}

fn public_key(given: &str) -> Result<PublicKey, TrustError> {
    if let Ok(key) = PublicKey::parse(given) {
        return Ok(key);
    }
    let wrong = |why: String| TrustError::Key { name: given.to_owned(), why };
    let text = small_file(Path::new(given)).map_err(|error| wrong(error.to_string()))?;
    PublicKey::parse(&text).map_err(|error| wrong(error.to_string()))
}

fn small_file(path: &Path) -> std::io::Result<String> {
    // Looked at before it is opened: opening a pipe would wait for whoever writes it.
    if !path.metadata()?.is_file() {
        return Err(std::io::Error::other("not a regular file"));
    }
    let mut text = String::new();
    File::open(path)?.take(MAX_KEY_FILE_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::ffi::OsStr;

    use super::*;
    use crate::format::minisign::SecretKey;

    fn signed_with(key: &SecretKey) -> TrustConfig {
        TrustConfig { index_sha256: None, verify_key: Some(key.public_key().to_base64()) }
    }

    fn checked(bytes: &[u8], signature: Option<&[u8]>, config: &TrustConfig) -> Result<Option<String>, String> {
        let checked = check(bytes, signature, "x.caibx.minisig", config);
        checked.map(|found| found.map(|found| found.trusted_comment)).map_err(|error| error.to_string())
    }

    #[test]
    fn nothing_is_demanded_by_default() {
        assert!(!is_demanded(&TrustConfig::default()));
        assert_eq!(checked(b"x", None, &TrustConfig::default()), Ok(None));
        assert_eq!(refuse_plain_archive(&TrustConfig::default()), Ok(()));
    }

    #[test]
    fn the_digest_must_be_that_of_the_bytes() {
        let config = TrustConfig { index_sha256: Some(Sha256::digest(b"x").into()), verify_key: None };
        assert!(is_demanded(&config));
        assert_eq!(checked(b"x", None, &config), Ok(None));
        let error = checked(b"y", None, &config).unwrap_err();
        assert!(error.starts_with("wrong index: its SHA-256 is a1fce4363854ff888cff4b8e7875d600"), "{error}");
        assert!(error.contains("and not 2d711642b726b04401627ca9fbac32f5"), "{error}");
        assert!(refuse_plain_archive(&config).unwrap_err().to_string().contains("index-sha256"));
    }

    #[test]
    fn the_signature_must_be_there_and_of_this_key_and_these_bytes() {
        let (key, other) = (SecretKey::generate().unwrap(), SecretKey::generate().unwrap());
        let signature = |key: &SecretKey, bytes: &[u8]| key.sign(bytes, "mine").unwrap().to_file_text("x").into_bytes();
        let config = signed_with(&key);
        assert_eq!(checked(b"x", Some(&signature(&key, b"x")), &config), Ok(Some("mine".to_owned())));
        let (id, other_id) = (key.public_key().id, other.public_key().id);
        for (found, why) in [
            (None, "no signature found: there is no x.caibx.minisig (caifs sign makes it)".to_owned()),
            (
                Some(signature(&other, b"x")),
                format!("wrong key: it is signed with key {other_id}, and the key to verify with is {id}"),
            ),
            (Some(signature(&key, b"y")), format!("bad signature: it is not what key {id} signed")),
            (
                Some(b"<html>".to_vec()),
                "x.caibx.minisig: not a minisign signature (it does not begin with an untrusted comment)".to_owned(),
            ),
        ] {
            assert_eq!(checked(b"x", found.as_deref(), &config), Err(why));
        }
        // Both demands count.
        let both = TrustConfig { index_sha256: Some([0; 32]), ..config };
        assert!(checked(b"x", Some(&signature(&key, b"x")), &both).unwrap_err().starts_with("wrong index"));
    }

    #[test]
    fn a_key_is_given_by_its_line_or_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key.pub");
        let key = SecretKey::generate().unwrap().public_key();
        std::fs::write(&path, key.to_file_text()).unwrap();
        assert_eq!(key_text(path.to_str().unwrap()), Ok(key.to_base64()));
        assert_eq!(key_text(&key.to_base64()), Ok(key.to_base64()));
        std::fs::write(&path, "something else").unwrap();
        let error = key_text(path.to_str().unwrap()).unwrap_err().to_string();
        assert!(error.ends_with("key.pub: not a minisign public key (56 characters of base64 are needed)"), "{error}");
        let error = key_text("/nowhere/key.pub").unwrap_err().to_string();
        assert!(error.starts_with("verify-key /nowhere/key.pub: No such file"), "{error}");
        assert!(key_text(dir.path().to_str().unwrap()).unwrap_err().to_string().contains("not a regular file"));
    }

    #[test]
    fn signatures_lie_beside_their_index() {
        for (index, signature) in [
            ("/srv/x.caibx", Some("/srv/x.caibx.minisig")),
            ("https://h/d/x.caidx?a=1", Some("https://h/d/x.caidx.minisig?a=1")),
            ("s3+https://h/b/x.caibx?lookup=path", Some("s3+https://h/b/x.caibx.minisig")),
            ("sftp://h/d/x.caibx", Some("sftp://h/d/x.caibx.minisig")),
            ("-", None),
        ] {
            let location = signature_of(&FileLocation::parse(OsStr::new(index)).unwrap());
            assert_eq!(location.map(|location| location.to_string()).as_deref(), signature, "{index}");
        }
    }
}
