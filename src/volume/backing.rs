//! From the option `backing` to the backing file of an image.

use std::path::PathBuf;

use super::open::{OpenError, Opened, SpecKind};
use super::sources::DEFAULT_KEEP_FREE_BYTES;
use crate::blob::Blob;
use crate::blob::backing::{BackingConfig, BackingError, BackingFile};
use crate::cache::disk::PRIVATE_NAME;
use crate::config::MountConfig;

/// What stands for a file in the cache.
pub const AUTO: &str = "auto";

/// The directory of such files, in the cache's private one.
const DIRECTORY_NAME: &str = "backing";

/// The part of a read's time that it may wait for a slow disk to take what was read before: a quarter.
const WAIT_SHARE: u32 = 4;

/// Gives an opened image the backing file that the settings ask for. `memory_bytes` is what it may take of the memory.
///
/// # Errors
/// It is not an image, or the file is not to be used. A disk that is full or broken is no error: the mount does without.
pub fn attach(opened: &Opened, config: &MountConfig, memory_bytes: u64) -> Result<(), OpenError> {
    let Some(text) = &config.keep.backing else { return Ok(()) };
    let fail = |why: &str| Err(OpenError::new(&format!("backing={text}"), why));
    let blob = match (&opened.blob, opened.kind) {
        (Blob::Chunked(blob), SpecKind::BlobIndex) => blob,
        _ => return fail("only a disk image (.caibx) can have a backing file, and this is a directory tree"),
    };
    let file = match text.as_str() {
        AUTO => match blob.cache().disk() {
            Some(disk) => BackingFile::In(disk.path().join(PRIVATE_NAME).join(DIRECTORY_NAME)),
            None => return fail("there is no local cache for it (name a directory with -c, or a file)"),
        },
        path => BackingFile::At(PathBuf::from(path)),
    };
    let keep_free_bytes = config.sources.cache_keep_free_bytes.unwrap_or(DEFAULT_KEEP_FREE_BYTES);
    let max_wait = config.io_timeout / WAIT_SHARE;
    match blob.keep_in_file(BackingConfig { file, keep_free_bytes, memory_bytes, max_wait }) {
        Ok(()) => Ok(()),
        Err(BackingError::Refused(why)) => fail(&why),
        Err(BackingError::Unusable(why)) => {
            tracing::warn!("the mount goes on without its backing file: {why}");
            Ok(())
        }
    }
}
