//! The disk tier: chunks kept in a `.castr` directory, shared by processes, within a quota, and never trusted.
//!
//! * [`DiskTier`] gets and keeps chunks: `<4 hex>/<64 hex>.cacnk`, as desync has them, which can use the directory as its cache or store.
//!   What we write is sealed ([`crate::chunk::seal`]); what others wrote is hashed.
//! * [`files`] keeps whole files (indexes), [`tables`] metadata tables, [`blocks`] the chunk ids of the blocks of plain archives.
//! * `state` is the byte total that processes share, `quota` adds to it before a write, `evict` counts and removes, `workplace` writes, `health` knows a failing disk.
//!
//! Everything of ours but the chunks is in `.caifs/`: `state`, `evict.lock`, `tables.lock`, `tmp/`, `files/`, `blocks/`, `quarantine/`.
//!
//! Sizes are counted as `st_size` rounded up to 4 KiB, directories too: so neither `du` nor `du -b` shows more than our total.
//!
//! Invariants: what a read gives is verified, or nothing; no fault of the disk reaches the caller; a file's bytes are added to the total
//! before it is written, and refused when that would exceed the quota; opening costs the same however large the cache is.

pub mod blocks;
mod evict;
pub mod files;
mod health;
mod quota;
mod state;
pub mod tables;
mod workplace;

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use nix::sys::stat::futimens;
use nix::sys::time::TimeSpec;

use super::Want;
use crate::chunk::codec::{self, CodecError, Form};
use crate::chunk::{Chunk, MAX_CHUNK_BYTES, seal};
use crate::digest::{ChunkId, Digest};
use crate::report::Report;
use crate::store::Stored;
use evict::Evictor;
use health::{Health, Seldom, Space};
use state::StateFile;
use workplace::{Taken, Workplace, make_directory};

/// Our private directory in the cache's.
pub const PRIVATE_NAME: &str = ".caifs";

/// What a file or directory occupies is a multiple of this.
const BLOCK_BYTES: u64 = 4096;

/// What a cache has before the first chunk: its directory, ours with four inside, the state and a workplace.
const START_BYTES: u64 = 8 * BLOCK_BYTES;

/// A hit makes a file young again when it was last made so longer ago than this: one more write a minute for a file at the most.
const TOUCH_AFTER: Duration = Duration::from_secs(60);

/// The compression of what we keep. Level 1 writes a third faster than level 3 and reads as fast, for some percent of space.
const KEEP_LEVEL: i32 = 1;

/// The part of the cache that goes when a write finds the disk full.
const SHARE_OF_FULL_DISK: u64 = 32;

/// Bad files kept for whoever wants to know what happened, and how large each may be. All others are removed.
const MAX_QUARANTINED: usize = 16;
const MAX_QUARANTINED_BYTES: u64 = 1 << 20;

/// The names looked at to tell whether a directory is a new one.
const N_NAMES_OF_NEW: usize = 8;

/// How a disk tier behaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// The directory; made if it is missing.
    pub path: PathBuf,
    /// How many bytes the directory may have; `None` for a quarter of what the file system has to give.
    pub quota_bytes: Option<u64>,
    /// How many bytes of the file system are to stay free.
    pub keep_free_bytes: u64,
}

/// Chunks, files and block maps on disk. All its functions block on the disk: they are for blocking threads.
#[derive(Debug)]
pub struct DiskTier {
    inner: Arc<Inner>,
}

/// What the tier, its block maps and its background thread share.
#[derive(Debug)]
struct Inner {
    root: PathBuf,
    private: PathBuf,
    state: StateFile,
    space: Space,
    evictor: Evictor,
    /// Nothing is written without one. It goes at any failure, and is made anew, with all directories, at the next try.
    workplace: RwLock<Option<Arc<Workplace>>>,
    writes: Health,
    reads: Health,
    bad_files: Seldom,
    euid: u32,
    /// The tier is gone: the background thread is to end.
    is_over: AtomicBool,
    report: Arc<Report>,
}

/// Makes the directory of a cache, or of another copy of what was fetched, for this user alone: what is in it is not encrypted, and everybody
/// who can open it reads it. Those above it are made as every directory is: others may lie in them, and other users' too.
///
/// # Errors
/// It cannot be made. One that is there stays as it is, and is no error.
pub fn make_root(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        made => made,
    }
}

/// What a look for a chunk found.
enum Found {
    Chunk(Chunk),
    Nothing,
    /// The file is not what its name says.
    Bad(Metadata, String),
}

impl DiskTier {
    /// Opens a cache, or makes one. The time this takes does not depend on how much is in it. A directory in which nothing can be
    /// written is opened all the same: what is there is used.
    ///
    /// # Errors
    /// The directory is not there and cannot be made, or is none.
    pub fn open(config: DiskConfig, report: Arc<Report>) -> io::Result<Arc<Self>> {
        let root = config.path;
        match fs::metadata(&root) {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => return Err(io::Error::new(ErrorKind::NotADirectory, "not a directory")),
            Err(error) if error.kind() == ErrorKind::NotFound => make_root(&root)?,
            Err(error) => return Err(error),
        }
        let private = root.join(PRIVATE_NAME);
        let inner = Arc::new(Inner {
            state: StateFile::new(private.join("state")),
            space: Space::new(&root, config.quota_bytes, config.keep_free_bytes),
            evictor: Evictor::default(),
            workplace: RwLock::new(None),
            writes: Health::new("nothing is kept"),
            reads: Health::new("nothing is read from it"),
            bad_files: Seldom::default(),
            euid: nix::unistd::geteuid().as_raw(),
            is_over: AtomicBool::new(false),
            report,
            root,
            private,
        });
        if let Err(error) = inner.workplace() {
            inner.write_failed(&error);
        }
        inner.recount_if_stale();
        Ok(Arc::new(Self { inner }))
    }

    /// The chunk, if it is here, verified, and as long as it is wanted. Every fault is a miss; a bad file is taken away.
    pub fn get(&self, digest: Digest, want: &Want) -> Option<Chunk> {
        let inner = &*self.inner;
        if inner.reads.is_resting() {
            inner.report.n_disk_misses.add(1);
            return None;
        }
        let path = inner.chunk_path(want.id);
        match inner.read_chunk(&path, digest, want) {
            Ok(Found::Chunk(chunk)) => {
                inner.reads.worked(&inner.root);
                inner.report.n_disk_hits.add(1);
                return Some(chunk);
            }
            Ok(Found::Nothing) => {}
            Ok(Found::Bad(metadata, reason)) => inner.take_away(&path, &metadata, &reason),
            Err(error) => inner.read_failed(&path, &error),
        }
        inner.report.n_disk_misses.add(1);
        None
    }

    /// Whether there is a file for this chunk. Only reading it tells what it is worth.
    pub fn has(&self, id: ChunkId) -> bool {
        fs::metadata(self.inner.chunk_path(id)).is_ok_and(|metadata| metadata.is_file() && metadata.len() > 0)
    }

    /// Keeps a chunk, if there is room and the disk works. What is there already stays. The frame that it was decoded from is written as
    /// it is, if it is one of zstd.
    pub fn keep(&self, chunk: &Chunk, stored: Option<&Stored>) {
        let inner = &self.inner;
        if chunk.plain().is_empty() || inner.writes.is_resting() {
            return;
        }
        let path = inner.chunk_path(chunk.id());
        let taken = match fs::symlink_metadata(&path) {
            // An empty file is what a crash of the machine leaves, and one that is too long is never read.
            Ok(metadata)
                if metadata.is_file() && !(1..=longest_form(chunk.plain().len() as u64)).contains(&metadata.len()) =>
            {
                Taken::Replace
            }
            Ok(_) => return,
            Err(_) => Taken::Leave,
        };
        if inner.is_full() {
            return;
        }
        let frame = stored.filter(|stored| stored.form == Form::Compressed && codec::is_zstd_frame(&stored.bytes));
        let is_placed = match frame {
            Some(stored) => inner.place(&path, &[&stored.bytes, &seal::seal_for(chunk, &stored.bytes)], 0o444, taken),
            None => inner.place(&path, &[&seal::seal(chunk, KEEP_LEVEL)], 0o444, taken),
        };
        if is_placed {
            inner.report.n_disk_kept.add(1);
        }
    }

    /// Bytes in the cache, of all processes, as far as they are known.
    pub fn weight_bytes(&self) -> u64 {
        self.inner.state.peek().map_or(0, |state| state.total_bytes)
    }

    /// How many bytes the cache may have, and how many of the file system are to stay free. The first is not known before something was
    /// written if it is a share of the free disk.
    pub fn limits_bytes(&self) -> (u64, u64) {
        (self.inner.space.quota_bytes(), self.inner.space.keep_free_bytes())
    }

    /// Other limits hold from now on. What is too much goes in the background.
    pub fn set_limits(&self, quota_bytes: Option<u64>, keep_free_bytes: u64) {
        if self.inner.space.set_limits(quota_bytes, keep_free_bytes) {
            self.inner.start_eviction(0, 0);
        }
    }

    /// The cache's directory.
    pub fn path(&self) -> &Path {
        &self.inner.root
    }

    /// Waits until nothing is counted or removed in the background by this tier.
    pub fn wait_idle(&self) {
        self.inner.evictor.wait_idle();
    }
}

impl Drop for DiskTier {
    fn drop(&mut self) {
        // The thread looks at this before each directory. It is not waited for: the disk may hang.
        self.inner.is_over.store(true, Ordering::Relaxed);
    }
}

impl Inner {
    /// `<root>/<4 hex>/<64 hex>.cacnk`.
    fn chunk_path(&self, id: ChunkId) -> PathBuf {
        let hex = id.to_hex();
        let mut path = self.root.as_os_str().to_owned();
        for part in ["/", &hex[..4], "/", &hex, ".cacnk"] {
            path.push(part);
        }
        path.into()
    }

    fn read_chunk(&self, path: &Path, digest: Digest, want: &Want) -> io::Result<Found> {
        let Some((mut file, metadata)) = open_to_read(path)? else { return Ok(Found::Nothing) };
        if !metadata.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        match metadata.len() {
            0 => return Ok(Found::Bad(metadata, "the file is empty".to_owned())),
            // Not worth the memory. Perhaps it is the index that is wrong, so the file stays until somebody keeps the chunk.
            n if n > longest_form(want.n_bytes) => return Ok(Found::Nothing),
            _ => {}
        }
        let stored = read_all(&mut file, &metadata)?;
        let opened = match self.is_ours(&metadata) {
            true => seal::unseal(want.id, &stored, want.n_bytes),
            false => None,
        };
        let chunk = match opened {
            Some(chunk) => chunk,
            None => match hashed(digest, want, stored.into()) {
                Ok(chunk) => chunk,
                Err(reason) => return Ok(Found::Bad(metadata, reason)),
            },
        };
        if chunk.plain().len() as u64 != want.n_bytes {
            // A right chunk: it is the index that is wrong, which the store's answer will show.
            return Ok(Found::Nothing);
        }
        self.touch(&file, &metadata);
        Ok(Found::Chunk(chunk))
    }

    /// Whether nobody but us (and root) can have written a file.
    fn is_ours(&self, metadata: &Metadata) -> bool {
        (metadata.uid() == self.euid || metadata.uid() == 0) && metadata.mode() & 0o022 == 0
    }

    /// Makes a file young again.
    fn touch(&self, file: &File, metadata: &Metadata) {
        let age = metadata.modified().ok().and_then(|modified| modified.elapsed().ok());
        if age.is_some_and(|age| age > TOUCH_AFTER) {
            // A file of somebody else, or on a read-only disk, stays as old as it is.
            let _ = futimens(file, &TimeSpec::UTIME_NOW, &TimeSpec::UTIME_NOW);
        }
    }

    /// Moves a bad file out of the way, or removes it.
    fn take_away(&self, path: &Path, read: &Metadata, reason: &str) {
        self.report.n_disk_bad.add(1);
        if self.bad_files.is_due() {
            tracing::warn!("disk cache: {}: {reason}; it is taken away and the chunk fetched again", path.display());
        }
        // Meanwhile somebody may have put a right file there.
        if !fs::symlink_metadata(path).is_ok_and(|now| (now.dev(), now.ino()) == (read.dev(), read.ino())) {
            return;
        }
        let quarantine = self.private.join("quarantine");
        let n_quarantined =
            fs::read_dir(&quarantine).map_or(usize::MAX, |entries| entries.take(MAX_QUARANTINED).count());
        if n_quarantined < MAX_QUARANTINED && read.len() <= MAX_QUARANTINED_BYTES {
            let name = path.file_name().unwrap_or_default();
            if fs::rename(path, quarantine.join(name)).is_ok() {
                return;
            }
        }
        self.remove(path, read);
    }

    /// Removes a file and takes it off the total.
    fn remove(&self, path: &Path, metadata: &Metadata) {
        match fs::remove_file(path) {
            Ok(()) => self.release(occupied(metadata.len())),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => self.read_failed(path, &error),
        }
    }

    /// Takes bytes off the total. If that fails the total is too high until the next count.
    fn release(&self, n_bytes: u64) {
        drop(self.state.update(|state| state.total_bytes = state.total_bytes.saturating_sub(n_bytes)));
    }

    /// Something could not be read. Where the disk itself fails it is left alone for a while.
    fn read_failed(&self, path: &Path, error: &io::Error) {
        self.report.n_disk_errors.add(1);
        match error.raw_os_error() {
            Some(libc::EIO | libc::ESTALE | libc::ENOTCONN | libc::ETIMEDOUT | libc::EHOSTDOWN) => {
                self.reads.failed(&self.root, error);
            }
            _ if self.bad_files.is_due() => tracing::warn!("disk cache: {}: {error}", path.display()),
            _ => {}
        }
    }

    fn write_failed(self: &Arc<Self>, error: &io::Error) {
        self.report.n_disk_errors.add(1);
        if matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)) {
            // However full the disk is, what is old can make room for what is new.
            let total_bytes = self.state.peek().map_or(0, |state| state.total_bytes);
            self.start_eviction(0, total_bytes / SHARE_OF_FULL_DISK);
        }
        self.writes.failed(&self.root, error);
        *self.workplace.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Where to write; made, with everything it needs, when there is none.
    fn workplace(&self) -> io::Result<Arc<Workplace>> {
        if let Some(workplace) = &*self.workplace.read().unwrap_or_else(PoisonError::into_inner) {
            return Ok(Arc::clone(workplace));
        }
        let mut slot = self.workplace.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(workplace) = &*slot {
            return Ok(Arc::clone(workplace));
        }
        make_directory(&self.root, 0o700)?;
        make_directory(&self.private, 0o700)?;
        for name in ["tmp", "files", "blocks", "quarantine"] {
            make_directory(&self.private.join(name), 0o700)?;
        }
        evict::open_lock(&self.private)?;
        let tmp = self.private.join("tmp");
        workplace::remove_dead(&tmp)?;
        let is_new = !self.state.update(|state| state.is_known)? && self.is_new();
        let workplace = Arc::new(Workplace::make(&tmp)?);
        self.state.update(|state| {
            if !state.is_known && is_new {
                (state.is_known, state.counted_at, state.total_bytes) = (true, seconds_now(), START_BYTES);
            } else if state.is_known {
                state.total_bytes += BLOCK_BYTES;
            }
        })?;
        Ok(Arc::clone(slot.insert(workplace)))
    }

    /// Whether nothing is in the cache yet. At most a few names are read.
    fn is_new(&self) -> bool {
        let is_empty = |name| fs::read_dir(self.private.join(name)).is_ok_and(|mut entries| entries.next().is_none());
        let mut names = fs::read_dir(&self.root).into_iter().flatten().take(N_NAMES_OF_NEW);
        names.all(|entry| entry.is_ok_and(|entry| entry.file_name() == PRIVATE_NAME))
            && ["tmp", "files", "blocks", "quarantine"].into_iter().all(is_empty)
    }

    /// Writes a file, unless its place is taken, there is no room, or the disk does not work.
    fn place(self: &Arc<Self>, target: &Path, content: &[&[u8]], mode: u32, taken: Taken) -> bool {
        if self.writes.is_resting() {
            return false;
        }
        match self.try_place(target, content, mode, taken) {
            Ok(is_placed) => {
                if is_placed {
                    self.writes.worked(&self.root);
                }
                is_placed
            }
            // Another process is slow with the state. This file is not worth waiting for.
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Err(error) => {
                self.write_failed(&error);
                false
            }
        }
    }

    fn try_place(self: &Arc<Self>, target: &Path, content: &[&[u8]], mode: u32, taken: Taken) -> io::Result<bool> {
        let workplace = self.workplace()?;
        let n_bytes: u64 = content.iter().map(|part| part.len() as u64).sum();
        let has_directory = target.parent().is_some_and(Path::exists);
        let n_bytes = occupied(n_bytes) + if has_directory { 0 } else { BLOCK_BYTES };
        let Some(reserved) = self.reserve(n_bytes)? else { return Ok(false) };
        let old_bytes = match taken {
            Taken::Replace => fs::symlink_metadata(target).map_or(0, |metadata| occupied(metadata.len())),
            Taken::Leave => 0,
        };
        let is_placed = workplace.write(target, content, mode, taken)?;
        if is_placed {
            reserved.spend();
            self.space.wrote(n_bytes);
            if old_bytes > 0 {
                self.release(old_bytes);
            }
        }
        Ok(is_placed)
    }
}

/// The longest stored form of so many plain bytes: no compression makes them longer by more than a fraction of this.
fn longest_form(n_bytes: u64) -> u64 {
    n_bytes.saturating_add(n_bytes / 4).saturating_add(64 << 10).min(MAX_CHUNK_BYTES)
}

/// What a file or directory of so many bytes counts as.
fn occupied(n_bytes: u64) -> u64 {
    n_bytes.next_multiple_of(BLOCK_BYTES)
}

fn seconds_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The chunk in a stored form, by hashing; the reason when it is another or none.
fn hashed(digest: Digest, want: &Want, stored: Bytes) -> Result<Chunk, String> {
    let plain = match codec::decode(Form::Compressed, &stored, want.n_bytes) {
        // It is the right chunk if the index is wrong, and then it stays.
        Err(CodecError::WrongSize { .. } | CodecError::AboveLimit { .. }) => {
            codec::decode_unknown_size(Form::Compressed, &stored, MAX_CHUNK_BYTES)
        }
        decoded => decoded,
    }
    .map_err(|error| error.to_string())?;
    match Chunk::verify_batch(digest, vec![(want.id, plain)]).pop() {
        Some(verified) => verified.map_err(|mismatch| mismatch.to_string()),
        None => Err("nothing was verified".to_owned()),
    }
}

/// Opens a file for reading; `None` when there is none.
fn open_to_read(path: &Path) -> io::Result<Option<(File, Metadata)>> {
    // Without O_NONBLOCK a named pipe in the place of a file would hold the reader for ever.
    match OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path) {
        Ok(file) => {
            let metadata = file.metadata()?;
            Ok(Some((file, metadata)))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Opens a file that processes share, or makes it: the state, or a lock. A link or a named pipe in its place is not followed or waited for.
fn open_shared(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
        .open(path)
}

/// All of a file that was just looked at: as long as it was then, or shorter if somebody truncated it.
fn read_all(file: &mut File, metadata: &Metadata) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    file.take(metadata.len()).read_to_end(&mut bytes)?;
    Ok(bytes)
}
