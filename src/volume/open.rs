//! From what a user names to a volume: finds out what kind of file it is and puts store, cache, blob and tree together.

use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use super::image::{ImageConfig, ImageVolume};
use super::tree::TreeVolume;
use super::{Owners, Volume};
use crate::blob::source::IndexBytes;
use crate::blob::{Blob, ChunkedBlob, FileBlob};
use crate::cache::{Cache, CacheConfig};
use crate::config::{MountConfig, SourceConfig};
use crate::format::index::{Index, Kind, archive_flags, kind_of};
use crate::report::Report;
use crate::store::location::FileLocation;
use crate::store::open::open_stores;
use crate::tree::{Tree, TreeConfig};

/// First bytes of a file or stream that tell what it is: the header of an archive's ENTRY and its flags.
const SNIFF_BYTES: u64 = 24;

/// What a file that caifs can open is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SpecKind {
    /// Index of a blob (`.caibx`).
    BlobIndex,
    /// Index of an archive (`.caidx`).
    ArchiveIndex,
    /// Plain archive (`.catar`).
    Archive,
}

impl SpecKind {
    /// The kind a file name claims, by its suffix.
    pub fn by_suffix(path: &Path) -> Option<Self> {
        match path.extension()?.as_bytes() {
            b"caibx" => Some(Self::BlobIndex),
            b"caidx" => Some(Self::ArchiveIndex),
            b"catar" => Some(Self::Archive),
            _ => None,
        }
    }
}

/// Why something cannot be opened: one line that names it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {why}")]
pub struct OpenError {
    what: String,
    why: String,
}

impl OpenError {
    fn new(what: &Path, why: impl ToString) -> Self {
        Self { what: what.display().to_string(), why: why.to_string() }
    }
}

/// How a memory budget is shared out. The parts add up to the whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Chunks kept for the next read.
    pub memory_tier_bytes: u64,
    /// Chunks being fetched and decoded.
    pub inflight_bytes: u64,
    /// Buffers of reads that span chunks.
    pub reply_bytes: u64,
    /// Parsed directories and files.
    pub tree: TreeConfig,
}

impl MemoryPlan {
    /// Shares out a budget.
    pub fn new(budget_bytes: u64) -> Self {
        let sixteenth = budget_bytes / 16;
        let tree_bytes = usize::try_from(sixteenth).unwrap_or(usize::MAX);
        Self {
            memory_tier_bytes: budget_bytes - 8 * sixteenth,
            inflight_bytes: 2 * sixteenth,
            reply_bytes: 2 * sixteenth,
            tree: TreeConfig {
                node_bytes: tree_bytes,
                table_bytes: tree_bytes,
                listing_bytes: tree_bytes,
                pinned_bytes: sixteenth,
            },
        }
    }
}

/// A byte stream and what is known of it.
#[derive(Debug)]
pub struct Opened {
    /// What the file is.
    pub kind: SpecKind,
    /// The stream: the blob, or the archive.
    pub blob: Blob,
    /// The file's own path.
    pub path: PathBuf,
    /// The file's modification time.
    pub mtime: SystemTime,
}

/// Opens an index or archive for reading.
///
/// # Errors
/// The file cannot be read, is of no kind we know or not what its suffix says; or a store cannot be opened.
pub async fn open_blob(
    path: &Path,
    sources: &SourceConfig,
    plan: &MemoryPlan,
    fetch_timeout: Duration,
    report: &Arc<Report>,
) -> Result<Opened, OpenError> {
    let fail = |why: &dyn ToString| OpenError::new(path, why.to_string());
    let mut head = Vec::new();
    let file = File::open(path).map_err(|error| fail(&error))?;
    let metadata = file.metadata().map_err(|error| fail(&error))?;
    if metadata.is_dir() {
        return Err(fail(&"is a directory (a .caibx, .caidx or .catar file is needed)"));
    }
    file.take(SNIFF_BYTES).read_to_end(&mut head).map_err(|error| fail(&error))?;
    let mtime = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    let claimed = SpecKind::by_suffix(path);
    match (kind_of(&head), claimed) {
        (Kind::Archive, Some(SpecKind::BlobIndex | SpecKind::ArchiveIndex)) => {
            return Err(fail(&"it is an archive, not an index (rename it to .catar)"));
        }
        (Kind::Index, Some(SpecKind::Archive)) => {
            return Err(fail(&"it is an index, not an archive (rename it to .caidx or .caibx)"));
        }
        (Kind::Archive, _) | (Kind::Other, Some(SpecKind::Archive)) => {
            let blob = Blob::File(FileBlob::open(path).map_err(|error| fail(&error))?);
            return Ok(Opened { kind: SpecKind::Archive, blob, path: path.to_owned(), mtime });
        }
        (Kind::Other, None) => {
            return Err(fail(&"it is neither an index (.caibx, .caidx) nor an archive (.catar)"));
        }
        (Kind::Index, _) | (Kind::Other, Some(SpecKind::BlobIndex | SpecKind::ArchiveIndex)) => {}
    }
    let bytes = IndexBytes::open(path).map_err(|error| fail(&error))?;
    let index = Index::open(bytes).map_err(|error| fail(&error))?;
    let suggests_archive = index.header().suggests_archive();
    let mut groups = Vec::new();
    for text in stores_or_default(path, &sources.stores)? {
        groups.push(sources.settings.resolve(&text).map_err(|error| fail(&error))?);
    }
    let store = open_stores(&groups).map_err(|error| fail(&error))?;
    let cache_config =
        CacheConfig { memory_bytes: plan.memory_tier_bytes, inflight_bytes: plan.inflight_bytes, fetch_timeout };
    let cache = Cache::new(store, cache_config, Arc::clone(report));
    let blob = Blob::Chunked(ChunkedBlob::new(index, &path.display().to_string(), cache, plan.reply_bytes));
    let kind = match claimed {
        Some(kind) => kind,
        None if suggests_archive || begins_with_archive(&blob).await => SpecKind::ArchiveIndex,
        None => SpecKind::BlobIndex,
    };
    Ok(Opened { kind, blob, path: path.to_owned(), mtime })
}

/// Opens the tree of an archive or an archive's index.
///
/// # Errors
/// It is neither, or its beginning or end cannot be read.
pub async fn open_tree(opened: Opened, plan: &MemoryPlan) -> Result<Tree, OpenError> {
    let path = opened.path;
    if opened.kind == SpecKind::BlobIndex {
        return Err(OpenError::new(&path, "it is the index of a blob, not of a directory tree"));
    }
    Tree::open(opened.blob, plan.tree).await.map_err(|error| OpenError::new(&path, error))
}

/// Opens what a mount serves. With `on_file`, the mountpoint is a regular file and becomes the image.
///
/// # Errors
/// As [`open_blob`] and [`open_tree`]; and a tree cannot be mounted on a file.
pub async fn open_volume(
    path: &Path,
    config: &MountConfig,
    on_file: bool,
    report: &Arc<Report>,
) -> Result<Arc<dyn Volume>, OpenError> {
    let plan = MemoryPlan::new(config.memory_bytes);
    // A fetch ends before the read that waits for it, so that the read is answered with the fetch's own reason.
    let fetch_timeout = config.io_timeout.mul_f64(0.9);
    let opened = open_blob(path, &config.sources, &plan, fetch_timeout, report).await?;
    let owners = Owners { uid: config.uid, gid: config.gid };
    let source = path.display().to_string();
    if opened.kind == SpecKind::BlobIndex {
        let file_name = match on_file {
            true => None,
            false => Some(Bytes::copy_from_slice(path.file_stem().unwrap_or(path.as_os_str()).as_bytes())),
        };
        let image = ImageConfig { file_name, owners, mtime: opened.mtime, source };
        return Ok(Arc::new(ImageVolume::new(opened.blob, image, Arc::clone(report))));
    }
    let volume = TreeVolume::new(open_tree(opened, &plan).await?, owners, source, Arc::clone(report));
    if (volume.root_kind() == super::FileKind::Directory) == on_file {
        let why = match on_file {
            true => "a directory tree cannot be mounted on a file",
            false => "this archive holds a single file; mount it on a file",
        };
        return Err(OpenError::new(path, why));
    }
    Ok(Arc::new(volume))
}

/// The stores to ask: those given, or casync's default.
fn stores_or_default(path: &Path, stores: &[String]) -> Result<Vec<String>, OpenError> {
    if !stores.is_empty() {
        return Ok(stores.to_vec());
    }
    let beside = FileLocation::Local(path.to_owned()).default_store();
    if !Path::new(&beside).is_dir() {
        return Err(OpenError::new(
            path,
            format!("no store is given and {beside} does not exist (name a store with -s)"),
        ));
    }
    Ok(vec![beside])
}

/// Whether the stream begins with an archive's first element. Unreadable content says no: the blob mount then shows the error.
async fn begins_with_archive(blob: &Blob) -> bool {
    let n_head = blob.size().min(SNIFF_BYTES) as usize;
    match blob.read_at(0, n_head).await {
        Ok(head) => archive_flags(&head).is_some(),
        Err(_) => false,
    }
}
