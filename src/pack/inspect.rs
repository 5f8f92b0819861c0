//! Looking at indexes and content: what desync's `info`, `list-chunks`, `chunk`, `inspect-chunks` and `verify-index` tell.
//!
//! Output formats are those of formats.md 8, checked against desync by the tests.

use std::collections::{HashMap, HashSet};
use std::io::{self, Write};
use std::path::Path;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use futures_util::stream::{self, StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};

use super::ingest::{BATCH_BYTES, BATCH_CHUNKS, Ingest};
use super::make::{Input, chunks_of};
use super::{MakeOptions, PackError, Progress};
use crate::digest::ChunkId;
use crate::format::index::{Index, Item};
use crate::store::Store;

/// What an index says, and how much of it is at hand. Serialised with desync's keys in desync's order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Info {
    /// Chunks of the index.
    pub total: u64,
    /// Distinct chunks; so are all counts and sizes that follow, but `size`.
    pub unique: u64,
    /// Chunks the store has.
    pub in_store: u64,
    /// Chunks of the seeds.
    pub in_seed: u64,
    /// Chunks the cache has.
    pub in_cache: u64,
    /// Chunks that would have to be fetched.
    pub not_in_seed_nor_cache: u64,
    /// Length of the blob in bytes.
    pub size: u64,
    /// Plain bytes of the chunks that are in no seed.
    pub dedup_size_not_in_seed: u64,
    /// Plain bytes of the chunks that would have to be fetched.
    pub dedup_size_not_in_seed_nor_cache: u64,
    /// Stored bytes of those, 0 when the size of any is not known.
    pub dedup_size_not_in_seed_nor_cache_compressed: u64,
    /// Minimum chunk size in bytes.
    pub chunk_size_min: u64,
    /// Average chunk size in bytes.
    pub chunk_size_avg: u64,
    /// Maximum chunk size in bytes.
    pub chunk_size_max: u64,
}

impl Info {
    /// As JSON, as desync prints it by default (without the newline at the end).
    pub fn json(&self) -> String {
        // A struct of numbers always serialises.
        serde_json::to_string_pretty(self).unwrap_or_default()
    }

    /// As lines of text, as desync prints it for `--format=plain`.
    pub fn plain(&self) -> String {
        let lines = [
            ("Blob size", self.size),
            ("Size of deduplicated chunks not in seed", self.dedup_size_not_in_seed),
            ("Size of deduplicated chunks not in seed nor cache", self.dedup_size_not_in_seed_nor_cache),
            ("Total chunks", self.total),
            ("Unique chunks", self.unique),
            ("Chunks in store", self.in_store),
            ("Chunks in seed", self.in_seed),
            ("Chunks in cache", self.in_cache),
            ("Chunks not in seed nor cache", self.not_in_seed_nor_cache),
            ("Compressed chunks not in seed nor cache", self.dedup_size_not_in_seed_nor_cache_compressed),
            ("Chunk size min", self.chunk_size_min),
            ("Chunk size avg", self.chunk_size_avg),
            ("Chunk size max", self.chunk_size_max),
        ];
        lines.iter().map(|(label, number)| format!("{label}: {number}\n")).collect()
    }
}

/// Sizes of one chunk: an element of what desync's `inspect-chunks` prints and `info --chunks-info` reads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkInfo {
    /// The chunk's id as hex digits.
    pub id: String,
    /// Plain bytes.
    pub uncompressed_size: u64,
    /// Stored bytes, 0 (and left out) when not known.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub compressed_size: u64,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// What [`info`] compares an index with.
#[derive(Debug, Clone, Copy, Default)]
pub struct InfoSources<'a> {
    /// The store.
    pub store: Option<&'a dyn Store>,
    /// The cache.
    pub cache: Option<&'a dyn Store>,
    /// Chunks of the seeds.
    pub seed_ids: Option<&'a HashSet<ChunkId>>,
    /// Sizes of stored chunks.
    pub chunk_infos: &'a [ChunkInfo],
    /// Questions to a store under way at a time; 0 counts as 1.
    pub n_concurrent: usize,
}

/// Numbers about an index. Stores are asked for every distinct chunk, many at a time; nothing is fetched.
///
/// # Errors
/// The index is damaged, a store failed, or a chunk's size in `chunk_infos` is not that of the index.
pub async fn info<B: AsRef<[u8]>>(name: &str, index: &Index<B>, sources: InfoSources<'_>) -> Result<Info, PackError> {
    let sizes = index.header().sizes;
    let mut info = Info {
        total: index.n_chunks() as u64,
        size: index.blob_size(),
        chunk_size_min: sizes.min,
        chunk_size_avg: sizes.avg,
        chunk_size_max: sizes.max,
        ..Info::default()
    };
    let mut distinct: Vec<Item> = Vec::new();
    let mut met = HashSet::new();
    for item in index.items() {
        let item = item.map_err(|error| PackError::Index { name: name.to_owned(), error })?;
        if met.insert(item.id) {
            distinct.push(item);
        }
    }
    info.unique = distinct.len() as u64;

    let n_concurrent = sources.n_concurrent.max(1);
    info.in_store = found_in(sources.store, &distinct, n_concurrent).await?.len() as u64;
    let cached = found_in(sources.cache, &distinct, n_concurrent).await?;
    info.in_cache = cached.len() as u64;

    let mut stored_sizes: HashMap<ChunkId, &ChunkInfo> = HashMap::new();
    for chunk in sources.chunk_infos {
        let id = ChunkId::from_str(&chunk.id).map_err(|error| PackError::Differs(format!("chunks info: {error}")))?;
        stored_sizes.insert(id, chunk);
    }
    let mut compressed = Some(0);
    for item in &distinct {
        let size = item.size_bytes();
        let is_in_seed = sources.seed_ids.is_some_and(|ids| ids.contains(&item.id));
        match is_in_seed {
            true => info.in_seed += 1,
            false => info.dedup_size_not_in_seed += size,
        }
        if is_in_seed || cached.contains(&item.id) {
            continue;
        }
        info.not_in_seed_nor_cache += 1;
        info.dedup_size_not_in_seed_nor_cache += size;
        let stored_bytes = match stored_sizes.get(&item.id) {
            Some(chunk) if chunk.uncompressed_size != size => {
                let theirs = chunk.uncompressed_size;
                return Err(PackError::Differs(format!(
                    "chunks info: chunk {} has {theirs} bytes there and {size} in the index {name}",
                    item.id
                )));
            }
            Some(chunk) if chunk.compressed_size > 0 => Some(chunk.compressed_size),
            Some(_) | None => None,
        };
        compressed = compressed.zip(stored_bytes).map(|(sum, bytes)| sum + bytes);
    }
    info.dedup_size_not_in_seed_nor_cache_compressed = compressed.unwrap_or(0);
    Ok(info)
}

/// The chunks that a store has.
async fn found_in(
    store: Option<&dyn Store>,
    items: &[Item],
    n_concurrent: usize,
) -> Result<HashSet<ChunkId>, PackError> {
    let Some(store) = store else { return Ok(HashSet::new()) };
    let mut found = HashSet::new();
    let questions = items.iter().map(|item| async { store.has(item.id).await.map(|has| (item.id, has)) });
    let mut answers = stream::iter(questions).buffer_unordered(n_concurrent);
    while let Some((id, has)) = answers.try_next().await? {
        if has {
            found.insert(id);
        }
    }
    Ok(found)
}

/// Writes the id of every chunk of an index, one a line, in order and with repetitions.
pub fn list_chunks<B: AsRef<[u8]>>(name: &str, index: &Index<B>, out: &mut dyn Write) -> Result<(), PackError> {
    for item in index.items() {
        let item = item.map_err(|error| PackError::Index { name: name.to_owned(), error })?;
        writeln!(out, "{}", item.id).map_err(|error| output_error(&error))?;
    }
    out.flush().map_err(|error| output_error(&error))
}

/// Writes `START\tLENGTH\tID` for every chunk that a file is cut into from an offset on, which counts as a chunk's start.
/// Nothing is stored.
pub fn chunk(file: &Path, start: u64, options: &MakeOptions, out: &mut dyn Write) -> Result<(), PackError> {
    let input = Input::open(file)?;
    let options = MakeOptions { store: None, ..options.clone() };
    let (items, _) = chunks_of(&input, start, &options, &Ingest::new(&options)?)?;
    let mut chunk_start = start;
    for (end, id) in items {
        writeln!(out, "{chunk_start}\t{}\t{id}", end - chunk_start).map_err(|error| output_error(&error))?;
        chunk_start = end;
    }
    out.flush().map_err(|error| output_error(&error))
}

fn output_error(error: &io::Error) -> PackError {
    PackError::file(Path::new("standard output"), error)
}

/// Checks that a file is what an index describes, on `n_threads` threads (0 for one a core).
///
/// # Errors
/// [`PackError::Differs`] names the first chunk that is different, in the order of the file, or the lengths.
pub fn verify_index<B: AsRef<[u8]> + Sync>(
    name: &str,
    index: &Index<B>,
    file: &Path,
    n_threads: usize,
    progress: Option<&Progress>,
) -> Result<(), PackError> {
    let input = Input::open(file)?;
    if input.size != index.blob_size() {
        return Err(PackError::Differs(format!(
            "{} has {} bytes, but the index {name} describes {}",
            file.display(),
            input.size,
            index.blob_size()
        )));
    }
    let n_threads = MakeOptions { n_threads, ..MakeOptions::default() }.n_threads();
    let check = Check {
        name,
        index,
        input,
        next_item: AtomicUsize::new(0),
        done_bytes: AtomicU64::new(0),
        first_failure: Mutex::new(None),
        progress,
    };
    std::thread::scope(|scope| {
        for _ in 1..n_threads.min(index.n_chunks().div_ceil(BATCH_CHUNKS)) {
            // Fewer threads than wished for do the same work.
            drop(std::thread::Builder::new().name("caifs-verify".into()).spawn_scoped(scope, || check.run()));
        }
        check.run();
    });
    match check.first_failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some((_, failure)) => Err(failure),
        None => check.input.check_unchanged(),
    }
}

/// What the threads that verify share.
struct Check<'a, B> {
    name: &'a str,
    index: &'a Index<B>,
    input: Input<'a>,
    next_item: AtomicUsize,
    done_bytes: AtomicU64,
    /// The failure with the lowest item number so far.
    first_failure: Mutex<Option<(usize, PackError)>>,
    progress: Option<&'a Progress>,
}

impl<B: AsRef<[u8]>> Check<'_, B> {
    fn run(&self) {
        let mut buffer = Vec::new();
        loop {
            let first = self.next_item.fetch_add(BATCH_CHUNKS, Ordering::Relaxed);
            // Batches are given out in order: what comes before a failure is done already or in other hands.
            let has_failed = self.first_failure.lock().unwrap_or_else(PoisonError::into_inner).is_some();
            if first >= self.index.n_chunks() || has_failed {
                return;
            }
            let behind = (first + BATCH_CHUNKS).min(self.index.n_chunks());
            let mut next = first;
            while next < behind {
                match self.verify(next, behind, &mut buffer) {
                    Ok(n_verified) => next += n_verified,
                    Err((at, failure)) => {
                        let mut first_failure = self.first_failure.lock().unwrap_or_else(PoisonError::into_inner);
                        if first_failure.as_ref().is_none_or(|(other, _)| at < *other) {
                            *first_failure = Some((at, failure));
                        }
                        return;
                    }
                }
            }
        }
    }

    /// Verifies as many items from `first` on as fit a batch's bytes, at least one; gives their number.
    fn verify(&self, first: usize, behind: usize, buffer: &mut Vec<u8>) -> Result<usize, (usize, PackError)> {
        let mut items: Vec<Item> = Vec::new();
        for i in first..behind {
            let item =
                self.index.item(i).map_err(|error| (i, PackError::Index { name: self.name.to_owned(), error }))?;
            if items.first().is_some_and(|start| item.end - start.start > BATCH_BYTES as u64) {
                break;
            }
            items.push(item);
        }
        let start = items.first().map_or(0, |item| item.start);
        let n_bytes = items.last().map_or(0, |item| item.end - start);
        buffer.resize(n_bytes as usize, 0);
        self.input.read(buffer, start).map_err(|error| (first, error))?;

        let plain: Vec<&[u8]> =
            items.iter().map(|item| &buffer[(item.start - start) as usize..(item.end - start) as usize]).collect();
        let found = self.index.digest().ids(&plain);
        for (i, (item, found)) in items.iter().zip(found).enumerate() {
            if found != item.id {
                let message = format!(
                    "{} differs from the index {} at chunk {} (bytes {} to {}): its content is {found}, expected {}",
                    self.input.path().display(),
                    self.name,
                    first + i,
                    item.start,
                    item.end,
                    item.id
                );
                return Err((first + i, PackError::Differs(message)));
            }
        }
        let done = self.done_bytes.fetch_add(n_bytes, Ordering::Relaxed) + n_bytes;
        if let Some(progress) = self.progress {
            progress(done);
        }
        Ok(items.len())
    }
}
