//! Metadata tables in the disk cache: `.caifs/files/<SHA-256 of the key, in hex>.table`, made in `.caifs/tmp` and moved to their place.
//!
//! A table can be too large for memory, so it is written piece by piece ([`GrowingFile`]) and handed out as an open file. What it holds is
//! not looked at here: tables check themselves.
//!
//! Invariants: what is handed out was put under this key by somebody we trust; bytes are added to the total before they are
//! written; one process at a time makes the table of a key, and a killed one is followed by the next.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::workplace::Workplace;
use super::{DiskTier, Inner, occupied, open_shared, open_to_read};
use crate::digest::Digest;

/// Bytes that are added to the total at once.
const STEP_BYTES: u64 = 1 << 20;

/// A table may have the quota divided by this, and so may its plain content while it is made.
const SHARE_OF_QUOTA: u64 = 3;

/// How often room is asked for while old chunks are removed, and how long is waited in between.
const N_TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(100);

/// A file of the cache that is being written, and that is gone when it is dropped.
#[derive(Debug)]
pub struct GrowingFile {
    inner: Arc<Inner>,
    file: File,
    path: PathBuf,
    written_bytes: u64,
    reserved_bytes: u64,
    /// Whose directory it is in.
    _workplace: Arc<Workplace>,
}

/// The right to make the table of a key.
#[derive(Debug)]
pub struct TableLock(#[allow(dead_code, reason = "the lock is held as long as the file is open")] File);

impl DiskTier {
    /// The table kept under a key, if there is one. Blocks; every fault is a miss.
    pub fn table(&self, key: &str) -> Option<File> {
        let inner = &*self.inner;
        if inner.reads.is_resting() {
            return None;
        }
        let path = self.table_path(key);
        match open_to_read(&path) {
            Ok(Some((file, metadata))) if metadata.is_file() && inner.is_ours(&metadata) => {
                inner.touch(&file, &metadata);
                Some(file)
            }
            Ok(_) => None,
            Err(error) => {
                inner.read_failed(&path, &error);
                None
            }
        }
    }

    /// Takes a table away that proved to be damaged. Blocks.
    pub fn discard_table(&self, key: &str, reason: &str) {
        let path = self.table_path(key);
        if let Ok(metadata) = fs::symlink_metadata(&path) {
            self.inner.take_away(&path, &metadata, reason);
        }
    }

    /// Begins a file; `None` when nothing can be written. Blocks.
    pub fn growing_file(&self) -> Option<GrowingFile> {
        let inner = &self.inner;
        if inner.writes.is_resting() {
            return None;
        }
        let made = inner.workplace().and_then(|workplace| {
            let path = workplace.new_path();
            let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
            Ok(GrowingFile {
                inner: Arc::clone(inner),
                file,
                path,
                written_bytes: 0,
                reserved_bytes: 0,
                _workplace: workplace,
            })
        });
        made.map_err(|error| inner.write_failed(&error)).ok()
    }

    /// Takes the right to make the table of a key, if nobody has it. Blocks, but not for others.
    ///
    /// # Errors
    /// The lock cannot be opened.
    pub fn lock_table(&self, key: &str) -> io::Result<Option<TableLock>> {
        let file = open_shared(&self.inner.private.join("tables.lock"))?;
        // One byte of the file for each key, so that one file is enough. The file stays empty.
        let place = Digest::Sha256.id(key.as_bytes()).0;
        let place = place.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes)) >> 2;
        let lock = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: place as libc::off_t,
            l_len: 1,
            l_pid: 0,
        };
        match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock)) {
            Ok(_) => Ok(Some(TableLock(file))),
            Err(Errno::EAGAIN | Errno::EACCES | Errno::EINTR) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    fn table_path(&self, key: &str) -> PathBuf {
        self.inner.private.join("files").join(format!("{}.table", Digest::Sha256.id(key.as_bytes()).to_hex()))
    }
}

impl GrowingFile {
    /// A second handle of the file.
    ///
    /// # Errors
    /// What dup(2) answers.
    pub fn file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Adds bytes to the total before they are written to the file. Blocks, and waits a little for room.
    ///
    /// # Errors
    /// There is no room.
    pub fn grow(&mut self, n_bytes: u64) -> io::Result<()> {
        self.written_bytes += n_bytes;
        let no_room = || io::Error::new(io::ErrorKind::StorageFull, "there is no room in the cache");
        self.inner.space.refresh(self.inner.state.peek().map_or(0, |state| state.total_bytes))?;
        if self.written_bytes > self.inner.space.quota_bytes() / SHARE_OF_QUOTA {
            return Err(no_room());
        }
        let mut n_tries = 0;
        while self.reserved_bytes < occupied(self.written_bytes) {
            let step = (occupied(self.written_bytes) - self.reserved_bytes).next_multiple_of(STEP_BYTES);
            let reserved = match self.inner.reserve(step) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
                reserved => reserved?,
            };
            match reserved {
                Some(reserved) => {
                    reserved.spend();
                    self.inner.space.wrote(step);
                    self.reserved_bytes += step;
                }
                None if n_tries < N_TRIES => {
                    n_tries += 1;
                    std::thread::sleep(PAUSE);
                }
                None => return Err(no_room()),
            }
        }
        Ok(())
    }

    /// Keeps the file as the table of a key, in the place of one that was there. Blocks.
    ///
    /// # Errors
    /// What rename(2) answers.
    pub fn keep_as(mut self, tier: &DiskTier, key: &str) -> io::Result<File> {
        let target = tier.table_path(key);
        let file = self.file.try_clone()?;
        // So that a crash of the machine does not leave a part of it.
        file.sync_data()?;
        let old_bytes = fs::symlink_metadata(&target).map_or(0, |metadata| occupied(metadata.len()));
        fs::rename(&self.path, &target)?;
        self.path = PathBuf::new();
        let kept_bytes = occupied(file.metadata()?.size());
        self.inner.release(self.reserved_bytes.saturating_sub(kept_bytes).saturating_add(old_bytes));
        self.reserved_bytes = 0;
        Ok(file)
    }
}

impl Write for GrowingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for GrowingFile {
    fn drop(&mut self) {
        if self.path != Path::new("") {
            // What cannot be removed is left to whoever opens the cache next.
            drop(fs::remove_file(&self.path));
        }
        if self.reserved_bytes > 0 {
            self.inner.release(self.reserved_bytes);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Read;

    use super::super::{BLOCK_BYTES, DiskConfig};
    use super::*;

    fn tier(path: &Path, quota_bytes: u64) -> Arc<DiskTier> {
        let config = DiskConfig { path: path.to_owned(), quota_bytes: Some(quota_bytes), keep_free_bytes: 0 };
        DiskTier::open(config, Arc::default()).unwrap()
    }

    #[test]
    fn a_table_is_kept_counted_replaced_and_taken_away() {
        let dir = tempfile::tempdir().unwrap();
        let tier = tier(dir.path(), 64 << 20);
        let empty_bytes = tier.weight_bytes();
        assert!(tier.table("key").is_none());
        for content in [&b"first"[..], &[7; 10_000]] {
            let mut growing = tier.growing_file().unwrap();
            growing.grow(content.len() as u64).unwrap();
            growing.write_all(content).unwrap();
            assert!(tier.weight_bytes() >= empty_bytes + STEP_BYTES);
            growing.keep_as(&tier, "key").unwrap();
            let mut kept = Vec::new();
            tier.table("key").unwrap().read_to_end(&mut kept).unwrap();
            assert_eq!(kept, content);
            assert_eq!(tier.weight_bytes(), empty_bytes + (content.len() as u64).next_multiple_of(BLOCK_BYTES));
        }
        assert!(tier.table("other").is_none());
        tier.discard_table("key", "a test");
        assert!(tier.table("key").is_none());
    }

    #[test]
    fn what_is_dropped_or_has_no_room_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let tier = tier(dir.path(), 8 << 20);
        let empty_bytes = tier.weight_bytes();
        let mut growing = tier.growing_file().unwrap();
        growing.grow(2 << 20).unwrap();
        growing.write_all(&[1; 1000]).unwrap();
        let path = growing.path.clone();
        assert!(path.exists());
        assert_eq!(growing.grow(1 << 20).unwrap_err().kind(), io::ErrorKind::StorageFull, "more than its share");
        drop(growing);
        assert!(!path.exists());
        assert_eq!(tier.weight_bytes(), empty_bytes);
    }

    #[test]
    fn one_makes_the_table_of_a_key() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (tier(dir.path(), 1 << 20), tier(dir.path(), 1 << 20));
        let held = one.lock_table("key").unwrap().unwrap();
        assert!(two.lock_table("key").unwrap().is_none());
        assert!(two.lock_table("other").unwrap().is_some());
        drop(held);
        assert!(two.lock_table("key").unwrap().is_some());
    }
}
