//! The limit: the same chunks opened, read, decompressed and verified on two threads, without any filesystem.
//!
//! What a mount adds to this (requests, copies, the reader itself, on the same cores) is what the ratio to it shows. It
//! uses the library's own decoder and digest, so a faster digest moves the limit as well as the mount.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use caifs::chunk::Chunk;
use caifs::chunk::codec::{self, Form};
use caifs::digest::ChunkId;
use caifs::format::index::{Index, Item};

/// Threads that work at the same time.
pub const N_THREADS: usize = 2;

/// Chunks verified together.
const BATCH_CHUNKS: usize = 16;

/// What the limit gave.
#[derive(Debug, Clone, Copy)]
pub struct Limit {
    /// Wall clock for all distinct chunks.
    pub time: Duration,
    /// Plain bytes of the distinct chunks.
    pub distinct_bytes: u64,
}

/// Whether chunks are verified, to see what the digest costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verify {
    /// As the mount does.
    Yes,
    /// Only opened, read and decompressed.
    No,
}

/// An index read from a file.
///
/// # Errors
/// What is wrong, in one line.
pub fn read_index(path: &Path) -> Result<Index<Vec<u8>>, String> {
    let bytes = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Index::open(bytes).map_err(|error| format!("{}: {error}", path.display()))
}

/// Decodes every distinct chunk of an index once, in the order of the index.
///
/// # Errors
/// A chunk that is missing or wrong.
pub fn decode_all(index: &Path, store: &Path, verify: Verify) -> Result<Limit, String> {
    let index = read_index(index)?;
    let digest = index.digest();
    let mut seen = BTreeSet::new();
    let mut items: Vec<Item> = Vec::new();
    for item in index.items() {
        let item = item.map_err(|error| error.to_string())?;
        if seen.insert(item.id) {
            items.push(item);
        }
    }
    let batches: Vec<&[Item]> = items.chunks(BATCH_CHUNKS).collect();
    let next = AtomicUsize::new(0);
    let work = || -> Result<(), String> {
        while let Some(batch) = batches.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut claimed = Vec::with_capacity(batch.len());
            for item in *batch {
                claimed.push((item.id, decode(store, item)?));
            }
            if verify == Verify::Yes {
                for outcome in Chunk::verify_batch(digest, claimed) {
                    outcome.map_err(|error| error.to_string())?;
                }
            }
        }
        Ok(())
    };
    let start = Instant::now();
    thread::scope(|scope| {
        let workers: Vec<_> = (0..N_THREADS).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("a worker does not panic"))
    })?;
    let time = start.elapsed();
    Ok(Limit { time, distinct_bytes: items.iter().map(Item::size_bytes).sum() })
}

/// An offset in the second half of an index's blob where the content is not zeros: the start of a chunk that is there
/// only once.
pub fn offset_of_content(index: &Path) -> Result<u64, String> {
    let index = read_index(index)?;
    let items: Vec<Item> = index.items().collect::<Result<_, _>>().map_err(|error| error.to_string())?;
    let mut count = std::collections::HashMap::<ChunkId, u32>::new();
    items.iter().for_each(|item| *count.entry(item.id).or_default() += 1);
    let single = |item: &&Item| count.get(&item.id) == Some(&1);
    let found = items[items.len() / 2..].iter().find(single).or_else(|| items.iter().find(single));
    found.map(|item| item.start).ok_or_else(|| "the image has no content".to_owned())
}

fn decode(store: &Path, item: &Item) -> Result<Bytes, String> {
    let hex = item.id.to_hex();
    let path = store.join(&hex[..4]).join(format!("{hex}.cacnk"));
    let stored = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    codec::decode(Form::Compressed, &Bytes::from(stored), item.size_bytes())
        .map_err(|error| format!("{}: {error}", path.display()))
}
