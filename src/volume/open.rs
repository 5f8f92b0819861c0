//! From what a user names to a volume: finds out what kind of file it is and puts store, cache, blob and tree together.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use super::backing;
use super::image::{ImageConfig, ImageVolume};
use super::sources::Sources;
use super::tree::TreeVolume;
use super::{Live, LiveVolume, Owners, Part, Volume};
use crate::blob::{Blob, ChunkedBlob, FileBlob};
use crate::config::{MountConfig, SourceConfig};
use crate::format::index::{Index, Kind, archive_flags, kind_of};
use crate::report::Report;
use crate::store::location::{FileLocation, without_secrets};
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
    pub(super) fn new(what: &str, why: impl ToString) -> Self {
        Self { what: without_secrets(what), why: why.to_string() }
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
    /// Where the file lies.
    pub location: FileLocation,
    /// The file's modification time.
    pub mtime: SystemTime,
}

/// Opens an index or archive for reading.
///
/// # Errors
/// The file cannot be read, is of no kind we know or not what its suffix says; or a store cannot be opened.
pub async fn open_blob(
    location: &FileLocation,
    sources: &SourceConfig,
    plan: &MemoryPlan,
    fetch_timeout: Duration,
    report: &Arc<Report>,
) -> Result<Opened, OpenError> {
    let shown = location.to_string();
    let fail = |why: &dyn ToString| OpenError::new(&shown, why.to_string());
    let sources = Sources::open(sources, plan, fetch_timeout, report)?;
    let claimed = SpecKind::by_suffix(location.file_name());
    let kind = match location {
        FileLocation::Local(path) => kind_of(&local_head(path).map_err(|error| fail(&error))?),
        // What a store has is read as what its name says, and what stands in for a file is an index.
        FileLocation::Remote { name, .. } => match claimed {
            Some(SpecKind::Archive) => Kind::Archive,
            Some(SpecKind::BlobIndex | SpecKind::ArchiveIndex) => Kind::Index,
            None => kind_of(&sources.head(location, name, SNIFF_BYTES).await?),
        },
        FileLocation::Stdio => Kind::Index,
    };
    match (kind, claimed) {
        (Kind::Archive, Some(SpecKind::BlobIndex | SpecKind::ArchiveIndex)) => {
            return Err(fail(&"it is an archive, not an index (rename it to .catar)"));
        }
        (Kind::Index, Some(SpecKind::Archive)) => {
            return Err(fail(&"it is an index, not an archive (rename it to .caidx or .caibx)"));
        }
        (Kind::Archive, _) | (Kind::Other, Some(SpecKind::Archive)) => {
            let (blob, mtime) = match location {
                FileLocation::Remote { name, .. } => {
                    let (blocks, mtime) = sources.archive(location, name).await?;
                    (Blob::Remote(blocks), mtime)
                }
                _ => {
                    let path = location.file_name();
                    let mtime = path.metadata().and_then(|metadata| metadata.modified());
                    let blob = FileBlob::open(path).map_err(|error| fail(&error))?;
                    (Blob::File(blob), mtime.unwrap_or(SystemTime::UNIX_EPOCH))
                }
            };
            return Ok(Opened { kind: SpecKind::Archive, blob, location: location.clone(), mtime });
        }
        (Kind::Other, None) => {
            return Err(fail(&"it is neither an index (.caibx, .caidx) nor an archive (.catar)"));
        }
        (Kind::Index, _) | (Kind::Other, Some(SpecKind::BlobIndex | SpecKind::ArchiveIndex)) => {}
    }
    let (bytes, mtime) = sources.index(location).await?;
    let index = Index::open(bytes).map_err(|error| fail(&error))?;
    let suggests_archive = index.header().suggests_archive();
    let cache = sources.cache(location)?;
    let blob = Blob::Chunked(ChunkedBlob::new(index, &shown, cache, plan.reply_bytes));
    let kind = match claimed {
        Some(kind) => kind,
        None if suggests_archive || begins_with_archive(&blob).await => SpecKind::ArchiveIndex,
        None => SpecKind::BlobIndex,
    };
    Ok(Opened { kind, blob, location: location.clone(), mtime })
}

/// The first bytes of a local file.
fn local_head(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    if file.metadata()?.is_dir() {
        return Err(io::Error::other("is a directory (a .caibx, .caidx or .catar file is needed)"));
    }
    let mut head = Vec::new();
    file.take(SNIFF_BYTES).read_to_end(&mut head)?;
    Ok(head)
}

/// Opens the tree of an archive or an archive's index.
///
/// # Errors
/// It is neither, or its beginning or end cannot be read.
pub async fn open_tree(opened: Opened, plan: &MemoryPlan) -> Result<Tree, OpenError> {
    let shown = opened.location.to_string();
    if opened.kind == SpecKind::BlobIndex {
        return Err(OpenError::new(&shown, "it is the index of a blob, not of a directory tree"));
    }
    Tree::open(opened.blob, plan.tree).await.map_err(|error| OpenError::new(&shown, error))
}

/// Opens what a mount serves. With `on_file`, the mountpoint is a regular file and becomes the image.
///
/// # Errors
/// As [`open_blob`] and [`open_tree`]; and a tree cannot be mounted on a file.
pub async fn open_volume(
    location: &FileLocation,
    config: &MountConfig,
    on_file: bool,
    report: &Arc<Report>,
) -> Result<LiveVolume, OpenError> {
    let mut plan = MemoryPlan::new(config.memory_bytes);
    let backing_bytes = backing::reserve(config, &mut plan);
    // A fetch ends before the read that waits for it, so that the read is answered with the fetch's own reason.
    let fetch_timeout = config.io_timeout.mul_f64(0.9);
    let opened = open_blob(location, &config.sources, &plan, fetch_timeout, report).await?;
    backing::attach(&opened, config, backing_bytes)?;
    let owners = Owners { uid: config.show.uid, gid: config.show.gid };
    let source = location.to_string();
    let live = Arc::new(Live::new(location.clone(), config.clone(), Arc::clone(report)));
    let (kind, blob) = (opened.kind, opened.blob.clone());
    let part = |tree| Part { path: Vec::new(), location: location.clone(), kind, blob: blob.clone(), tree };
    if kind == SpecKind::BlobIndex {
        let file_name = match on_file {
            true => None,
            false => {
                let path = location.file_name();
                Some(Bytes::copy_from_slice(path.file_stem().unwrap_or(path.as_os_str()).as_bytes()))
            }
        };
        live.add(part(None));
        let image =
            ImageConfig { file_name, owners, mtime: opened.mtime, source, is_backed: config.keep.backing.is_some() };
        let volume = Arc::new(ImageVolume::new(opened.blob, image, Arc::clone(report)));
        return Ok(LiveVolume { volume, live });
    }
    let tree = Arc::new(open_tree(opened, &plan).await?);
    live.add(part(Some(Arc::clone(&tree))));
    let volume = TreeVolume::new(tree, owners, source, Arc::clone(report));
    if (volume.root_kind() == super::FileKind::Directory) == on_file {
        let why = match on_file {
            true => "a directory tree cannot be mounted on a file",
            false => "this archive holds a single file; mount it on a file",
        };
        return Err(OpenError::new(&location.to_string(), why));
    }
    Ok(LiveVolume { volume: Arc::new(volume), live })
}

/// Whether the stream begins with an archive's first element. Unreadable content says no: the blob mount then shows the error.
async fn begins_with_archive(blob: &Blob) -> bool {
    let n_head = blob.size().min(SNIFF_BYTES) as usize;
    match blob.read_at(0, n_head).await {
        Ok(head) => archive_flags(&head).is_some(),
        Err(_) => false,
    }
}
