//! A table in the making: in the disk cache, or in a file without a name where there is no cache.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use crate::cache::disk::DiskTier;
use crate::cache::disk::tables::GrowingFile;
use crate::tree::table::writer::Room;

/// Where files without a name lie.
const SPOOL_DIR: &str = "/var/tmp";

/// Written at once, in bytes.
const PIECE_BYTES: usize = 1 << 20;

/// A file that grows.
#[derive(Debug)]
pub(super) struct Spool {
    place: Place,
    /// Not written yet.
    pending: Vec<u8>,
}

#[derive(Debug)]
enum Place {
    Cache(GrowingFile),
    Unnamed(File),
}

impl Spool {
    /// Begins a file. Blocks.
    pub(super) fn new(disk: Option<&Arc<DiskTier>>) -> io::Result<Self> {
        let place = match disk {
            Some(disk) => {
                Place::Cache(disk.growing_file().ok_or_else(|| io::Error::other("the cache cannot be written to"))?)
            }
            None => Place::Unnamed(unnamed()?),
        };
        Ok(Self { place, pending: Vec::new() })
    }

    /// A handle of the file.
    pub(super) fn file(&self) -> io::Result<File> {
        match &self.place {
            Place::Cache(growing) => growing.file(),
            Place::Unnamed(file) => file.try_clone(),
        }
    }

    /// Makes room for what is written through the handle; the file goes with it.
    pub(super) fn into_room(mut self) -> Room {
        Box::new(move |n_bytes| self.grow(n_bytes))
    }

    fn grow(&mut self, n_bytes: u64) -> io::Result<()> {
        match &mut self.place {
            Place::Cache(growing) => growing.grow(n_bytes),
            Place::Unnamed(_) => Ok(()),
        }
    }

    /// Ends the file: it is kept in the cache under a key, if it lies there. Blocks.
    pub(super) fn keep_as(mut self, disk: Option<&DiskTier>, key: &str) -> io::Result<File> {
        self.flush()?;
        match (self.place, disk) {
            (Place::Cache(growing), Some(disk)) => growing.keep_as(disk, key),
            (Place::Cache(growing), None) => growing.file(),
            (Place::Unnamed(file), _) => Ok(file),
        }
    }
}

impl Write for Spool {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.pending.extend_from_slice(bytes);
        if self.pending.len() >= PIECE_BYTES {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.grow(self.pending.len() as u64)?;
        match &mut self.place {
            Place::Cache(growing) => growing.write_all(&self.pending)?,
            Place::Unnamed(file) => file.write_all(&self.pending)?,
        }
        self.pending.clear();
        Ok(())
    }
}

fn unnamed() -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_TMPFILE | libc::O_EXCL).mode(0o600);
    options.open(SPOOL_DIR)
}
