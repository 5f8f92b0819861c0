//! Which chunk has which block of a plain archive from afar: block number to chunk id, learned as blocks are fetched.
//!
//! A map is split into segments of [`SEGMENT_BLOCKS`] blocks, each a file `.caifs/blocks/<SHA-256 of key and version, in hex>.<segment,
//! in hex>` of 40 KiB that is made when the first of its blocks is learned and goes when it has not been used for long. A block's
//! entry is the chunk's id (32 bytes; all zero: unknown) and an XXH64 (8 bytes, little-endian) of the id, the map's name and the
//! block's number.
//!
//! Invariant: an id that is given out was set for this block of this version. A damaged entry, or one of another block, is unknown.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::workplace::Taken;
use super::{DiskTier, Inner};
use crate::chunk::checksum::xxh64;
use crate::digest::{CHUNK_ID_BYTES, ChunkId, Digest};

/// Blocks in one file.
pub const SEGMENT_BLOCKS: u64 = 1024;

/// An id and its checksum.
const ENTRY_BYTES: usize = CHUNK_ID_BYTES + 8;

/// What a segment's file has.
const SEGMENT_BYTES: usize = SEGMENT_BLOCKS as usize * ENTRY_BYTES;

/// The map of one version of one archive.
#[derive(Debug)]
pub struct BlockMap {
    inner: Arc<Inner>,
    /// The path of a segment but for its number.
    prefix: PathBuf,
    /// What binds an entry to this map.
    seed: u64,
    /// The segment used last. Held over its reading and writing, so only for blocking threads; the tier's own locks are taken under it.
    open: Mutex<Option<(u64, File)>>,
}

impl DiskTier {
    /// The map of an archive's version. The same for everyone who asks with the same words.
    pub fn block_ids(&self, key: &str, version: &str) -> BlockMap {
        // The length keeps ("ab", "c") and ("a", "bc") apart.
        let name = Digest::Sha256.id(format!("{} {key} {version}", key.len()).as_bytes());
        let prefix = self.inner.private.join("blocks").join(name.to_hex());
        BlockMap { inner: Arc::clone(&self.inner), prefix, seed: xxh64(0, &name.0), open: Mutex::new(None) }
    }
}

impl BlockMap {
    /// The chunk that has block `block_idx`, if it is known. Blocks on the disk.
    pub fn get(&self, block_idx: u64) -> Option<ChunkId> {
        if self.inner.reads.is_resting() {
            return None;
        }
        let mut open = self.lock();
        let mut entry = [0; ENTRY_BYTES];
        let read = self.segment(&mut open, block_idx).and_then(|file| match file {
            Some(file) => file.read_exact_at(&mut entry, offset_of(block_idx)).map(|()| true),
            None => Ok(false),
        });
        match read {
            Ok(true) => self.id_in(block_idx, &entry),
            Ok(false) => None,
            Err(error) => {
                *open = None;
                // A segment that somebody has truncated does not know its last blocks.
                if error.kind() != ErrorKind::UnexpectedEof {
                    self.inner.read_failed(&self.segment_path(block_idx), &error);
                }
                None
            }
        }
    }

    /// Learns which chunk has block `block_idx`, if there is room and the disk works. Blocks on the disk.
    pub fn set(&self, block_idx: u64, id: ChunkId) {
        if self.inner.writes.is_resting() {
            return;
        }
        let mut open = self.lock();
        // Twice, if the segment has just been evicted.
        for _ in 0..2 {
            let written = self.segment(&mut open, block_idx).and_then(|file| match file {
                Some(file) if file.metadata()?.nlink() > 0 => {
                    file.write_all_at(&self.entry_of(block_idx, id), offset_of(block_idx)).map(|()| true)
                }
                _ => Ok(false),
            });
            match written {
                Ok(true) => return,
                Ok(false) => {
                    *open = None;
                    // Zeros: nothing is known. Somebody else may make it at the same time, and then it is theirs that stays.
                    self.inner.place(&self.segment_path(block_idx), &[&[0; SEGMENT_BYTES]], 0o600, Taken::Leave);
                }
                Err(error) => {
                    *open = None;
                    return self.inner.write_failed(&error);
                }
            }
        }
    }

    /// The file that has a block's entry, opened if it is not the one used last; `None` when it is not there, or not ours.
    fn segment<'a>(&self, open: &'a mut Option<(u64, File)>, block_idx: u64) -> io::Result<Option<&'a File>> {
        let segment = block_idx / SEGMENT_BLOCKS;
        if open.as_ref().is_none_or(|(opened, _)| *opened != segment) {
            let mut options = OpenOptions::new();
            options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW);
            let path = self.segment_path(block_idx);
            let opened = match options.open(&path) {
                // What can be read only is still worth reading.
                Err(error) if matches!(error.kind(), ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied) => {
                    options.write(false).open(&path)
                }
                opened => opened,
            };
            let file = match opened {
                Ok(file) => file,
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            };
            let metadata = file.metadata()?;
            if !metadata.is_file() || !self.inner.is_ours(&metadata) || metadata.len() > SEGMENT_BYTES as u64 {
                return Ok(None);
            }
            self.inner.touch(&file, &metadata);
            *open = Some((segment, file));
        }
        Ok(open.as_ref().map(|(_, file)| file))
    }

    fn segment_path(&self, block_idx: u64) -> PathBuf {
        let mut path = self.prefix.as_os_str().to_owned();
        path.push(format!(".{:x}", block_idx / SEGMENT_BLOCKS));
        path.into()
    }

    fn entry_of(&self, block_idx: u64, id: ChunkId) -> [u8; ENTRY_BYTES] {
        let mut entry = [0; ENTRY_BYTES];
        entry[..CHUNK_ID_BYTES].copy_from_slice(&id.0);
        let checksum = xxh64(xxh64(self.seed, &block_idx.to_le_bytes()), &id.0);
        entry[CHUNK_ID_BYTES..].copy_from_slice(&checksum.to_le_bytes());
        entry
    }

    fn id_in(&self, block_idx: u64, entry: &[u8; ENTRY_BYTES]) -> Option<ChunkId> {
        let id = ChunkId(*entry.first_chunk::<CHUNK_ID_BYTES>()?);
        (self.entry_of(block_idx, id) == *entry).then_some(id)
    }

    fn lock(&self) -> MutexGuard<'_, Option<(u64, File)>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the entry of a block is in its segment.
fn offset_of(block_idx: u64) -> u64 {
    block_idx % SEGMENT_BLOCKS * ENTRY_BYTES as u64
}
