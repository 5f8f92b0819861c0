//! Indexes and archives of a collection: what is known of one that was looked at, and those that are open.
//!
//! Invariant: what is open stays within a number and a weight; who was used longest ago is closed, one that can be opened again before
//! one whose file is gone. A part that is closed keeps its numbers, and is opened again when one of them is asked for.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use lru::LruCache;

use super::inode::Numbered;
use crate::blob::Blob;
use crate::digest::{ChunkId, Digest};
use crate::store::FileInfo;
use crate::store::location::FileLocation;
use crate::volume::open::Opened;
use crate::volume::{Attr, Volume};

/// Parts open at a time. Each may have a file open, and the usual limit of files is 1,024.
const MAX_OPEN: NonZeroUsize = NonZeroUsize::new(256).expect("it is not zero");

/// What an open part weighs beside the bytes of its index.
const OVERHEAD_BYTES: usize = 4096;

/// An index or archive that was looked at. Its own file or directory has the number `base + 1`.
#[derive(Debug)]
pub(super) struct Part {
    /// The number before its first.
    pub(super) base: u64,
    /// How many numbers it has.
    pub(super) span: u64,
    /// The file's path below the place that is mounted.
    pub(super) path: Vec<u8>,
    /// Its path in the mount.
    pub(super) shown: Vec<u8>,
    /// The directory it is shown in.
    pub(super) parent_ino: u64,
    /// Where it lies.
    pub(super) location: FileLocation,
    /// What is known of the file of the index or archive.
    pub(super) info: FileInfo,
    /// What its index has in it, where no version tells.
    pub(super) content: Option<ChunkId>,
    /// Bytes of the blob or archive.
    pub(super) size: u64,
    /// What is shown of its own file or directory.
    pub(super) attr: Attr,
    /// Its file was removed or replaced.
    is_gone: AtomicBool,
    /// Another file was found in its place, be it that a listing does not tell.
    is_replaced: AtomicBool,
    /// Held by who opens it.
    pub(super) opening: Arc<tokio::sync::Mutex<()>>,
}

/// What was found out about an index or archive.
#[derive(Debug)]
pub(super) struct Facts {
    pub(super) path: Vec<u8>,
    pub(super) shown: Vec<u8>,
    pub(super) parent_ino: u64,
    pub(super) location: FileLocation,
    pub(super) info: FileInfo,
    pub(super) content: Option<ChunkId>,
    pub(super) size: u64,
    pub(super) attr: Attr,
}

/// Whether what is known of two files says that they are the same.
pub(super) fn is_same_file(one: &FileInfo, other: &FileInfo) -> bool {
    one.size == other.size && one.version == other.version
}

/// What tells an index from others where its server tells no version: the hash of all of it, as it was just read from one end to the
/// other. (An archive without a version is not opened at all.)
pub(super) fn content_of(opened: &Opened) -> Option<ChunkId> {
    match (&opened.info.version, &opened.blob) {
        (None, Blob::Chunked(blob)) => Some(Digest::Sha256.id(blob.index().bytes())),
        (Some(_), _) | (None, Blob::File(_) | Blob::Remote(_)) => None,
    }
}

impl Part {
    pub(super) fn new(base: u64, span: u64, facts: Facts) -> Self {
        let Facts { path, shown, parent_ino, location, info, content, size, attr } = facts;
        let attr = Attr { ino: base + 1, ..attr };
        let (is_gone, is_replaced, opening) = (AtomicBool::new(false), AtomicBool::new(false), Arc::default());
        Self { base, span, path, shown, parent_ino, location, info, content, size, attr, is_gone, is_replaced, opening }
    }

    /// Whether a file is the one that this was made from, by what is known of both.
    pub(super) fn is_of(&self, info: &FileInfo) -> bool {
        is_same_file(&self.info, info) && !self.is_replaced()
    }

    /// Hears whether another file was found in its place. Until it has been looked at anew, nothing found there is this one.
    pub(super) fn set_replaced(&self, is_replaced: bool) {
        self.is_replaced.store(is_replaced, Ordering::Relaxed);
    }

    /// Whether another file was found in its place.
    pub(super) fn is_replaced(&self) -> bool {
        self.is_replaced.load(Ordering::Relaxed)
    }

    /// When the index or archive was modified.
    pub(super) fn mtime(&self) -> SystemTime {
        self.info.mtime.unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// Hears whether its file is there.
    pub(super) fn set_gone(&self, is_gone: bool) {
        self.is_gone.store(is_gone, Ordering::Relaxed);
    }

    /// Whether its file was removed or replaced.
    pub(super) fn is_gone(&self) -> bool {
        self.is_gone.load(Ordering::Relaxed)
    }
}

impl Numbered for Part {
    fn base(&self) -> u64 {
        self.base
    }

    fn span(&self) -> u64 {
        self.span
    }
}

/// A part that is open.
#[derive(Debug)]
pub(super) struct OpenPart {
    pub(super) part: Arc<Part>,
    /// Its files, by their numbers less the base.
    pub(super) volume: Arc<dyn Volume>,
    /// Bytes of its index that are in memory.
    pub(super) index_bytes: usize,
}

/// The parts that are open.
#[derive(Debug)]
pub(super) struct OpenParts {
    /// Never held over I/O or await.
    state: Mutex<State>,
    max_bytes: usize,
}

#[derive(Debug)]
struct State {
    parts: LruCache<u64, Arc<OpenPart>>,
    n_bytes: usize,
}

impl OpenParts {
    /// None yet, and never more than so many bytes of indexes, but for one part.
    pub(super) fn new(max_bytes: usize) -> Self {
        Self { state: Mutex::new(State { parts: LruCache::unbounded(), n_bytes: 0 }), max_bytes }
    }

    /// The open part with this base.
    pub(super) fn get(&self, base: u64) -> Option<Arc<OpenPart>> {
        self.lock().parts.get(&base).cloned()
    }

    /// Adds a part; gives those that are closed to make room.
    pub(super) fn insert(&self, opened: Arc<OpenPart>) -> Vec<Arc<OpenPart>> {
        let base = opened.part.base;
        let mut state = self.lock();
        state.n_bytes += weight(&opened);
        let mut closed: Vec<_> = state.parts.put(base, opened).into_iter().collect();
        state.n_bytes -= closed.iter().map(|before| weight(before)).sum::<usize>();
        while state.n_bytes > self.max_bytes || state.parts.len() > MAX_OPEN.get() {
            let mut oldest = state.parts.iter().rev().filter(|(other, _)| **other != base);
            let again = oldest.clone().find(|(_, open)| !open.part.is_gone());
            let Some(victim) = again.or_else(|| oldest.next()).map(|(base, _)| *base) else { break };
            let Some(old) = state.parts.pop(&victim) else { break };
            state.n_bytes -= weight(&old);
            closed.push(old);
        }
        closed
    }

    /// How many are open.
    pub(super) fn len(&self) -> usize {
        self.lock().parts.len()
    }

    /// Whether a part that is shown at a path is open.
    pub(super) fn is_shown(&self, path: &[u8]) -> bool {
        self.lock().parts.iter().any(|(_, open)| open.part.shown == path)
    }

    /// Whether the part with this base is open, without using it.
    pub(super) fn has(&self, base: u64) -> bool {
        self.lock().parts.contains(&base)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn weight(open: &OpenPart) -> usize {
    open.index_bytes + OVERHEAD_BYTES
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests {
    use super::*;
    use crate::blob::FileBlob;
    use crate::volume::image::{ImageConfig, ImageVolume};
    use crate::volume::{FileKind, Show};

    /// A part over a file that is there.
    fn opened(base: u64, index_bytes: usize) -> Arc<OpenPart> {
        let attr = Attr {
            ino: 0,
            kind: FileKind::Regular,
            permissions: 0o444,
            nlink: 1,
            uid: 0,
            gid: 0,
            size: 1,
            mtime: SystemTime::UNIX_EPOCH,
            rdev: 0,
        };
        let info = FileInfo { size: 1, version: None, mtime: None, has_ranges: true };
        let location = FileLocation::Local("/x".into());
        let (path, shown) = (Vec::new(), Vec::new());
        let facts = Facts { path, shown, parent_ino: 1, location, info, content: None, size: 1, attr };
        let part = Arc::new(Part::new(base, 1, facts));
        assert_eq!((part.attr.ino, part.mtime()), (base + 1, SystemTime::UNIX_EPOCH));
        let blob = Blob::File(FileBlob::open(std::path::Path::new("/proc/self/stat")).unwrap());
        let config = ImageConfig {
            file_name: None,
            show: Show::default(),
            mtime: SystemTime::UNIX_EPOCH,
            source: String::new(),
            is_backed: false,
        };
        let volume = Arc::new(ImageVolume::new(blob, config, Arc::default()));
        Arc::new(OpenPart { part, volume, index_bytes })
    }

    #[test]
    fn number_and_weight_are_bounded_and_what_cannot_come_back_goes_last() {
        let open = OpenParts::new(10 * (1000 + OVERHEAD_BYTES));
        let gone = opened(0, 1000);
        gone.part.set_gone(true);
        assert!(open.insert(gone).is_empty());
        for base in 1..10 {
            assert!(open.insert(opened(base, 1000)).is_empty());
        }
        open.get(1).unwrap();
        let closed = open.insert(opened(10, 1000));
        assert_eq!(closed.iter().map(|open| open.part.base).collect::<Vec<_>>(), [2]);
        assert!(open.has(0) && open.has(1) && !open.has(2));
        let closed = open.insert(opened(11, 1 << 20));
        assert_eq!((closed.len(), closed.last().unwrap().part.base), (10, 0), "one that is too heavy stays alone");
        assert_eq!(open.len(), 1);
        assert_eq!(open.insert(opened(11, 10)).len(), 1, "the same again");
        assert_eq!(open.len(), 1);

        let open = OpenParts::new(usize::MAX);
        for base in 0..1000 {
            open.insert(opened(base, 0));
        }
        assert_eq!(open.len(), MAX_OPEN.get());
        assert!(open.has(999) && !open.has(0));
    }
}
