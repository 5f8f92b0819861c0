//! Reading the content of a table: block by block, each checked when it comes from the file, and as many kept as there is room for.
//!
//! A table is read, not mapped: its blocks are compressed; what is read stays within the memory budget however much is looked at (a
//! mapping would grow the process by all that `find` touches); the bytes that were checked are the bytes that are used, whatever
//! becomes of the file; and no page fault makes a thread wait that takes requests.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use super::super::bounded::Bounded;
use crate::chunk::checksum::xxh64;
use crate::chunk::codec::{self, Form};
use crate::format::table::{BLOCK_BYTES, BlockRef, MAGIC, TAIL_BYTES, TableError, Tail};
use crate::sys::read_at_nowait;

/// Blocks that are read at once for one question on a thread that must not wait; a question that needs more goes to another thread.
const MAX_LOADS_AT_ONCE: usize = 6;

/// Blocks at hand without asking the shared ones: of records, of names and of what they point to.
const N_AT_HAND: usize = 3;

/// Why a table does not answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fault {
    /// The disk would have to be waited for.
    WouldWait,
    /// It is damaged, or cannot be read.
    Damaged(String),
}

impl From<TableError> for Fault {
    fn from(error: TableError) -> Self {
        Self::Damaged(error.0.to_owned())
    }
}

impl Fault {
    pub(super) fn damaged<T>(what: &str) -> Result<T, Self> {
        Err(Self::Damaged(what.to_owned()))
    }
}

/// Whether the disk may be waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    Never,
    Allowed,
}

/// The blocks of an open table.
#[derive(Debug)]
pub(super) struct Blocks {
    file: File,
    pub(super) tail: Tail,
    /// Its number among those that share what is kept.
    table_id: u64,
    kept: KeptBlocks,
}

/// Blocks of one or more tables that are kept in memory, by table and number.
#[derive(Debug, Clone)]
pub struct KeptBlocks {
    blocks: Arc<Bounded<(u64, u64), Bytes>>,
    n_tables: Arc<AtomicU64>,
}

impl KeptBlocks {
    /// Room for so many bytes.
    pub fn new(max_bytes: usize) -> Self {
        Self { blocks: Arc::new(Bounded::new(max_bytes)), n_tables: Arc::default() }
    }

    pub(in crate::tree) fn set_max_bytes(&self, max_bytes: usize) {
        self.blocks.set_max_bytes(max_bytes);
    }
}

/// The checksum of a block: of its bytes, its number and the archive, so that no block passes for another.
pub(super) fn block_checksum(tail_digest: &[u8; 32], block_idx: u64, plain: &[u8]) -> u64 {
    xxh64(xxh64(block_idx, tail_digest), plain)
}

/// The checksum of a tail.
pub(super) fn tail_checksum(bytes: &[u8]) -> u64 {
    xxh64(0, bytes)
}

impl Blocks {
    /// Opens a table by its first and last bytes.
    pub(super) fn open(file: File, kept: KeptBlocks) -> Result<Self, Fault> {
        let unreadable = |error: io::Error| Fault::Damaged(format!("it cannot be read: {error}"));
        let metadata = file.metadata().map_err(unreadable)?;
        let too_short = || Fault::Damaged("it is too short".to_owned());
        let tail_at = metadata.len().checked_sub(TAIL_BYTES as u64).filter(|_| metadata.is_file());
        let (mut first, mut tail) = ([0; MAGIC.len()], [0; TAIL_BYTES]);
        file.read_exact_at(&mut tail, tail_at.ok_or_else(too_short)?).map_err(unreadable)?;
        file.read_exact_at(&mut first, 0).map_err(unreadable)?;
        if first != *MAGIC {
            return Fault::damaged("it is none, or of another version");
        }
        let tail = Tail::parse(&tail, metadata.len(), tail_checksum)?;
        let table_id = kept.n_tables.fetch_add(1, Ordering::Relaxed);
        Ok(Self { file, tail, table_id, kept })
    }

    pub(super) fn file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    pub(super) fn reader(&self, wait: Wait) -> Reader<'_> {
        let loads_left = if wait == Wait::Never { MAX_LOADS_AT_ONCE } else { usize::MAX };
        Reader { blocks: self, wait, loads_left, at_hand: [const { None }; N_AT_HAND], next: 0 }
    }

    /// The plain bytes of a block, checked.
    pub(super) fn load(&self, block_idx: u64, wait: Wait) -> Result<Bytes, Fault> {
        let n_bytes = self.tail.block_bytes(block_idx);
        let mut block_ref = [0; BlockRef::BYTES];
        self.read(&mut block_ref, self.tail.refs_at + block_idx * BlockRef::BYTES as u64, wait)?;
        let block_ref = BlockRef::parse(&block_ref);
        let stored_bytes = usize::from(block_ref.n_bytes);
        if stored_bytes > n_bytes {
            return Fault::damaged("a block is longer than its content");
        }
        let mut stored = vec![0; stored_bytes];
        self.read(&mut stored, block_ref.at, wait)?;
        let stored = Bytes::from(stored);
        let plain = match stored_bytes == n_bytes {
            true => stored,
            false => codec::decode(Form::Compressed, &stored, n_bytes as u64)
                .map_err(|_| Fault::Damaged("a block cannot be decompressed".to_owned()))?,
        };
        match block_checksum(&self.tail.binding.digest, block_idx, &plain) == block_ref.checksum {
            true => Ok(plain),
            false => Fault::damaged("a block has a wrong checksum"),
        }
    }

    fn read(&self, bytes: &mut [u8], at: u64, wait: Wait) -> Result<(), Fault> {
        let read = match wait {
            Wait::Allowed => self.file.read_exact_at(bytes, at),
            Wait::Never => match read_at_nowait(&self.file, bytes, at) {
                Ok(Some(n)) if n == bytes.len() => Ok(()),
                // A part only: it goes on where the memory ends, or is an error there.
                Ok(_) => return Err(Fault::WouldWait),
                Err(error) => Err(error),
            },
        };
        read.map_err(|error| Fault::Damaged(format!("it cannot be read: {error}")))
    }
}

/// Reads the content for one question.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    blocks: &'a Blocks,
    wait: Wait,
    loads_left: usize,
    at_hand: [Option<(u64, Bytes)>; N_AT_HAND],
    /// Which of those at hand goes next.
    next: usize,
}

impl Reader<'_> {
    /// Fills `bytes` with the content at a place.
    pub(super) fn read(&mut self, at: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        let end = at.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| end > self.blocks.tail.content_bytes) {
            return Fault::damaged("it points to a place that it does not have");
        }
        let (mut place, mut rest) = (at, bytes);
        while !rest.is_empty() {
            let start = (place % BLOCK_BYTES as u64) as usize;
            let block = self.block(place / BLOCK_BYTES as u64)?;
            let n = rest.len().min(block.len().saturating_sub(start));
            let (now, later) = rest.split_at_mut(n);
            match block.get(start..start + n) {
                Some(found) if n > 0 => now.copy_from_slice(found),
                _ => return Fault::damaged("a block is shorter than its content"),
            }
            place += n as u64;
            rest = later;
        }
        Ok(())
    }

    pub(super) fn array<const N: usize>(&mut self, at: u64) -> Result<[u8; N], Fault> {
        let mut bytes = [0; N];
        self.read(at, &mut bytes)?;
        Ok(bytes)
    }

    /// `n_bytes` of content, which the caller has bounded.
    pub(super) fn bytes(&mut self, at: u64, n_bytes: usize) -> Result<Bytes, Fault> {
        let mut bytes = vec![0; n_bytes];
        self.read(at, &mut bytes)?;
        Ok(bytes.into())
    }

    fn block(&mut self, block_idx: u64) -> Result<&Bytes, Fault> {
        let found = self.at_hand.iter().position(|block| block.as_ref().is_some_and(|(idx, _)| *idx == block_idx));
        let place = match found {
            Some(place) => place,
            None => {
                let block = match self.blocks.kept.blocks.get(&(self.blocks.table_id, block_idx)) {
                    Some(block) => block,
                    None => self.load(block_idx)?,
                };
                let place = self.next;
                self.next = (place + 1) % N_AT_HAND;
                self.at_hand[place] = Some((block_idx, block));
                place
            }
        };
        match &self.at_hand[place] {
            Some((_, block)) => Ok(block),
            None => Fault::damaged("a block is lost"),
        }
    }

    fn load(&mut self, block_idx: u64) -> Result<Bytes, Fault> {
        self.loads_left = self.loads_left.checked_sub(1).ok_or(Fault::WouldWait)?;
        let block = self.blocks.load(block_idx, self.wait)?;
        self.blocks.kept.blocks.put((self.blocks.table_id, block_idx), block.clone(), block.len());
        Ok(block)
    }
}
