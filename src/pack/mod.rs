//! Making: content to chunks in a store and an index.
//!
//! * [`make`] cuts a file or block device on all cores; [`sink`] takes any stream (an archive being made, standard input).
//! * Both ask, compress and write through [`ingest`], cut with [`cutter`] and leave their result through [`output`].
//! * [`tar`] packs a directory into an archive, [`exclude`] says what is left out of it, [`scan`] reads metadata.
//! * [`table`] makes the metadata table of an archive while it is packed.
//! * [`inspect`] looks at indexes and content without making anything.
//!
//! Invariants: the cuts are those of one pass from the start, however many threads there are; an index is written only
//! when all its chunks are in the store, and then whole or not at all; memory does not grow with the content but by the
//! 40 bytes of each chunk in the index.

pub mod exclude;
pub mod inspect;
pub mod make;
pub mod output;
pub mod sink;
pub mod table;
pub mod tar;

mod cutter;
mod ingest;
mod scan;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::chunk::chunker::CutRule;
use crate::chunk::codec::DEFAULT_LEVEL;
use crate::chunk::sizes::SizesError;
use crate::digest::Digest;
use crate::format::index::{self, ChunkSizes, IndexError, IndexHeader};
use crate::store::{StoreError, WriteStore};

/// Told how many bytes of the content are done so far, from any thread: a smaller number can come after a larger one.
pub type Progress = Arc<dyn Fn(u64) + Send + Sync>;

/// How content is made into an index and chunks.
#[derive(Clone)]
pub struct MakeOptions {
    /// Bounds of the chunks.
    pub sizes: ChunkSizes,
    /// Whose cuts are made.
    pub rule: CutRule,
    /// What makes the chunk ids.
    pub digest: Digest,
    /// Where chunks go; without a store only the index is made.
    pub store: Option<Arc<dyn WriteStore>>,
    /// zstd's level.
    pub level: i32,
    /// Threads that cut, hash and compress; 0 for one a core (and more for a store behind a network).
    pub n_threads: usize,
    /// Feature flags of the index; `None` for those that the program whose rule is chosen gives the index of a blob.
    pub feature_flags: Option<u64>,
    /// Told of the progress.
    pub progress: Option<Progress>,
}

impl Default for MakeOptions {
    fn default() -> Self {
        Self {
            sizes: ChunkSizes::default(),
            rule: CutRule::default(),
            digest: Digest::default(),
            store: None,
            level: DEFAULT_LEVEL,
            n_threads: 0,
            feature_flags: None,
            progress: None,
        }
    }
}

impl fmt::Debug for MakeOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MakeOptions")
            .field("sizes", &self.sizes)
            .field("rule", &self.rule)
            .field("digest", &self.digest)
            .field("store", &self.store)
            .field("level", &self.level)
            .field("n_threads", &self.n_threads)
            .field("feature_flags", &self.feature_flags)
            .finish_non_exhaustive()
    }
}

impl MakeOptions {
    /// The header of the index of content that begins with these bytes.
    ///
    /// Defaults (formats.md 2.1): both programs set EXCLUDE_NODUMP and the digest's bit, casync EXCLUDE_FILE as well;
    /// desync adds the flags of an archive when the content begins like one.
    fn header(&self, first_bytes: &[u8]) -> IndexHeader {
        let digest_flag = match self.digest {
            Digest::Sha512_256 => index::FLAG_SHA512_256,
            Digest::Sha256 => 0,
        };
        let feature_flags = self.feature_flags.unwrap_or_else(|| match self.rule {
            CutRule::Casync => index::FLAG_EXCLUDE_NODUMP | index::FLAG_EXCLUDE_FILE,
            CutRule::Desync => {
                index::FLAG_EXCLUDE_NODUMP | (index::archive_flags(first_bytes).unwrap_or(0) & index::KNOWN_FLAGS)
            }
        });
        // Whatever the flags come from, the digest's bit must say how the ids are made.
        IndexHeader { feature_flags: (feature_flags & !index::FLAG_SHA512_256) | digest_flag, sizes: self.sizes }
    }

    /// The number of threads that is meant.
    fn n_threads(&self) -> usize {
        if self.n_threads > 0 {
            return self.n_threads;
        }
        let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
        match &self.store {
            // A thread that waits for a network leaves its core to others.
            Some(store) if store.blocking().is_none() => n_cores * 3,
            _ => n_cores,
        }
    }
}

/// What was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MakeStats {
    /// Chunks cut, with those cut twice where threads met (desync's ChunksProduced).
    pub n_chunks_produced: u64,
    /// Chunks in the index (desync's ChunksAccepted).
    pub n_chunks_accepted: u64,
    /// Chunks the store did not have.
    pub n_chunks_written: u64,
    /// Length of the content in bytes.
    pub blob_bytes: u64,
    /// Bytes written to the store, in stored form.
    pub stored_bytes: u64,
}

impl MakeStats {
    /// What desync prints for `--print-stats`.
    pub fn desync_json(&self) -> String {
        format!(
            "{{\n  \"ChunksAccepted\": {},\n  \"ChunksProduced\": {}\n}}",
            self.n_chunks_accepted, self.n_chunks_produced
        )
    }
}

/// Why nothing was made.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PackError {
    /// A local file cannot be read or written.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The chunk sizes cannot be used.
    #[error(transparent)]
    Sizes(#[from] SizesError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An index is damaged.
    #[error("{name}: {error}")]
    Index {
        /// Which index.
        name: String,
        /// What is wrong with it.
        error: IndexError,
    },
    /// Content is not what an index says.
    #[error("{0}")]
    Differs(String),
    /// The machine has no more of what is needed to work.
    #[error("cannot start: {0}")]
    Resources(String),
}

impl PackError {
    /// An error of a file, in the system's words.
    pub fn file(path: &Path, error: &io::Error) -> Self {
        let text = error.to_string();
        let reason = text.split_once(" (os error").map_or(text.as_str(), |(words, _)| words);
        Self::File { path: path.to_owned(), reason: reason.to_owned() }
    }
}
