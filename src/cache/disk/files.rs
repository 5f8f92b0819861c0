//! Whole files in the disk cache, such as indexes from afar: `.caifs/files/<SHA-256 of the key, in hex>`.
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 8 | `caifs-f1` |
//! | 8 | 32 | SHA-256 of all that follows |
//! | 40 | 4, 4 | bytes of the key, bytes of the version (`0xffffffff`: it has none) |
//! | 48 | 8, 4, 4 | mtime: seconds since 1970 (signed), nanoseconds, 1 if it is known |
//! | 64 | | key, version, content |
//!
//! All numbers are little-endian.
//!
//! Invariant: what is given out was kept under this key by somebody we trust, and is undamaged; a file that is not goes.

use std::fs::{self, Metadata};
use std::io;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::workplace::Taken;
use super::{DiskTier, open_to_read, read_all};
use crate::digest::Digest;

/// The longest file that is kept: an index of that size has 25 million chunks.
pub const MAX_KEPT_BYTES: u64 = 1 << 30;

const MAGIC: &[u8; 8] = b"caifs-f1";
const HEAD_BYTES: usize = 64;
const DIGEST_END: usize = 40;
const NO_VERSION: u32 = u32::MAX;

/// A file from the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptFile {
    /// Its content.
    pub bytes: Vec<u8>,
    /// What its source said to tell this version from others (an ETag), if it did.
    pub version: Option<String>,
    /// When it was changed at its source, if that is known.
    pub mtime: Option<SystemTime>,
}

impl DiskTier {
    /// The file kept under a key, if it is here and undamaged. Blocks; every fault is a miss.
    pub fn kept_file(&self, key: &str) -> Option<KeptFile> {
        let inner = &*self.inner;
        if inner.reads.is_resting() {
            return None;
        }
        let path = self.file_path(key);
        let read = || -> io::Result<Option<(Metadata, Option<KeptFile>)>> {
            let Some((mut file, metadata)) = open_to_read(&path)? else { return Ok(None) };
            let is_possible = metadata.is_file() && inner.is_ours(&metadata) && metadata.len() <= longest(key);
            if !is_possible {
                return Ok(Some((metadata, None)));
            }
            let kept = parse(key, read_all(&mut file, &metadata)?);
            if kept.is_some() {
                inner.touch(&file, &metadata);
            }
            Ok(Some((metadata, kept)))
        };
        match read() {
            Ok(Some((_, Some(kept)))) => return Some(kept),
            Ok(Some((metadata, None))) => {
                inner.report.n_disk_bad.add(1);
                inner.remove(&path, &metadata);
            }
            Ok(None) => {}
            Err(error) => inner.read_failed(&path, &error),
        }
        None
    }

    /// Keeps a file under a key, in the place of one that was kept under it, if there is room and the disk works. Blocks.
    pub fn keep_file(&self, key: &str, version: Option<&str>, mtime: Option<SystemTime>, bytes: &[u8]) {
        let head = head(key, version, mtime, bytes);
        if head.len() as u64 + bytes.len() as u64 > longest(key) {
            return;
        }
        let path = self.file_path(key);
        let is_placed = self.inner.place(&path, &[&head, bytes], 0o600, Taken::Replace);
        // An old version must not stand for the new one.
        if !is_placed && let Ok(metadata) = fs::symlink_metadata(&path) {
            self.inner.remove(&path, &metadata);
        }
    }

    fn file_path(&self, key: &str) -> PathBuf {
        self.inner.private.join("files").join(Digest::Sha256.id(key.as_bytes()).to_hex())
    }
}

fn longest(key: &str) -> u64 {
    MAX_KEPT_BYTES + HEAD_BYTES as u64 + key.len() as u64
}

/// All before the content.
fn head(key: &str, version: Option<&str>, mtime: Option<SystemTime>, bytes: &[u8]) -> Vec<u8> {
    let length = |text: &str| u32::try_from(text.len()).unwrap_or(NO_VERSION);
    let (seconds, nanos, is_known) = match mtime {
        Some(mtime) => match mtime.duration_since(UNIX_EPOCH) {
            Ok(after) => (i64::try_from(after.as_secs()).unwrap_or(i64::MAX), after.subsec_nanos(), 1u32),
            // Before 1970: the second below, and nanoseconds up from it.
            Err(before) => {
                let before = before.duration();
                let seconds = -i64::try_from(before.as_secs()).unwrap_or(i64::MAX);
                match before.subsec_nanos() {
                    0 => (seconds, 0, 1),
                    nanos => (seconds.saturating_sub(1), 1_000_000_000 - nanos, 1),
                }
            }
        },
        None => (0, 0, 0),
    };
    let mut head = Vec::with_capacity(HEAD_BYTES + key.len() + version.map_or(0, str::len));
    head.extend_from_slice(MAGIC);
    head.extend_from_slice(&[0; DIGEST_END - MAGIC.len()]);
    head.extend_from_slice(&length(key).to_le_bytes());
    head.extend_from_slice(&version.map_or(NO_VERSION, length).to_le_bytes());
    head.extend_from_slice(&seconds.to_le_bytes());
    head.extend_from_slice(&nanos.to_le_bytes());
    head.extend_from_slice(&is_known.to_le_bytes());
    head.extend_from_slice(key.as_bytes());
    head.extend_from_slice(version.unwrap_or_default().as_bytes());
    let digest = digest_of(&head[DIGEST_END..], bytes);
    head[MAGIC.len()..DIGEST_END].copy_from_slice(&digest);
    head
}

/// The file in these bytes, if they are undamaged and were kept under this key.
fn parse(key: &str, mut bytes: Vec<u8>) -> Option<KeptFile> {
    let head = bytes.get(..HEAD_BYTES)?;
    if &head[..MAGIC.len()] != MAGIC || head[MAGIC.len()..DIGEST_END] != digest_of(&bytes[DIGEST_END..], &[]) {
        return None;
    }
    let u32_at = |at: usize| head[at..].first_chunk::<4>().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    let seconds = head[48..].first_chunk::<8>().map_or(0, |bytes| i64::from_le_bytes(*bytes));
    let (key_bytes, version_bytes, nanos, has_mtime) = (u32_at(40), u32_at(44), u32_at(56), u32_at(60) == 1);
    let key_end = HEAD_BYTES.checked_add(key_bytes as usize)?;
    let version_end = match version_bytes {
        NO_VERSION => key_end,
        n_bytes => key_end.checked_add(n_bytes as usize)?,
    };
    if bytes.get(HEAD_BYTES..key_end)? != key.as_bytes() {
        return None;
    }
    let version = std::str::from_utf8(bytes.get(key_end..version_end)?).ok()?;
    let version = (version_bytes != NO_VERSION).then(|| version.to_owned());
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let second = match seconds < 0 {
        true => UNIX_EPOCH.checked_sub(whole),
        false => UNIX_EPOCH.checked_add(whole),
    };
    let mtime = second.and_then(|second| second.checked_add(Duration::from_nanos(nanos.into()))).filter(|_| has_mtime);
    bytes.drain(..version_end);
    Some(KeptFile { bytes, version, mtime })
}

fn digest_of(head: &[u8], content: &[u8]) -> [u8; 32] {
    let mut digest = Digest::Sha256.stream();
    digest.update(head);
    digest.update(content);
    digest.finish().0
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_comes_back_and_nothing_else_does() {
        let second = Duration::from_secs(1);
        let mtimes = [
            None,
            Some(UNIX_EPOCH),
            Some(UNIX_EPOCH + 7 * second / 2),
            Some(UNIX_EPOCH - 7 * second / 2),
            Some(UNIX_EPOCH - second),
        ];
        for (mtime, version) in mtimes.into_iter().zip([None, Some(""), Some("\"etag\""), Some("é"), None]) {
            for content in [&b""[..], b"some content"] {
                let file = [&head("the key", version, mtime, content), content].concat();
                let kept = KeptFile { bytes: content.to_vec(), version: version.map(str::to_owned), mtime };
                assert_eq!(parse("the key", file.clone()), Some(kept));
                assert_eq!(parse("the kez", file.clone()), None);
                for at in 0..file.len() {
                    let mut wrong = file.clone();
                    wrong[at] ^= 1;
                    assert_eq!(parse("the key", wrong), None, "byte {at}");
                    assert_eq!(parse("the key", file[..at].to_vec()), None, "{at} bytes");
                }
            }
        }
        // Lengths that say more than there is, under a right digest.
        for at in [40, 44] {
            let mut file = head("k", Some("v"), None, b"");
            file[at..at + 4].copy_from_slice(&(u32::MAX - 1).to_le_bytes());
            let digest = digest_of(&file[DIGEST_END..], &[]);
            file[MAGIC.len()..DIGEST_END].copy_from_slice(&digest);
            assert_eq!(parse("k", file), None);
        }
    }
}
