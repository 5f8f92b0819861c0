//! From what a user names to a volume: finds out what kind of file it is and puts store, cache, blob and tree together.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use super::backing;
use super::collection;
use super::image::{ImageConfig, ImageVolume};
use super::sources::Sources;
use super::table::background::Walks;
use super::table::{self, TablePlaces};
use super::tree::TreeVolume;
use super::trust::refuse_plain_archive;
use super::{Live, LiveVolume, Part, Show, Volume};
use crate::blob::replies::Replies;
use crate::blob::{Blob, ChunkedBlob, FileBlob};
use crate::config::{MountConfig, SourceConfig};
use crate::format::index::{Index, Kind, archive_flags, kind_of};
use crate::report::Report;
use crate::store::FileInfo;
use crate::store::local_files::local_info;
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

/// How a memory budget is shared out. The parts add up to the whole, less a 32nd for what the allocator wastes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Chunks kept for the next read, among them those that are read ahead.
    pub memory_tier_bytes: u64,
    /// Of these, the most that is read ahead of all readers.
    pub ahead_bytes: u64,
    /// The most that is read ahead of one reader; `None` for a share.
    pub window_bytes: Option<u64>,
    /// Chunks being fetched and decoded.
    pub inflight_bytes: u64,
    /// Buffers of reads that span chunks.
    pub reply_bytes: u64,
    /// What only some mounts keep: the open indexes of a directory of them, or what a backing file takes.
    pub beside_bytes: u64,
    /// Parsed directories and files.
    pub tree: TreeConfig,
    /// The same of the walk that makes a metadata table.
    pub build: TreeConfig,
}

impl MemoryPlan {
    /// Shares out the budget of a mount.
    pub fn of_mount(location: &FileLocation, config: &MountConfig) -> Self {
        let mut plan = Self::new(config.memory_bytes);
        plan.window_bytes = config.ahead.window_bytes;
        if location.is_directory() || config.keep.backing.is_some() {
            plan.beside_bytes = config.memory_bytes / 16;
            plan.memory_tier_bytes -= plan.beside_bytes;
        }
        if location.is_directory() {
            // Some of its trees have metadata tables, whose blocks take the other half.
            plan.tree.table_bytes /= 2;
        }
        plan
    }

    /// Shares out a budget.
    pub fn new(budget_bytes: u64) -> Self {
        let sixteenth = budget_bytes / 16;
        let tree_bytes = usize::try_from(sixteenth).unwrap_or(usize::MAX);
        Self {
            memory_tier_bytes: budget_bytes - 9 * sixteenth - sixteenth / 2,
            // About half of the tier, so that what was read ahead is still there when its reader comes.
            ahead_bytes: 3 * sixteenth,
            window_bytes: None,
            inflight_bytes: 2 * sixteenth,
            reply_bytes: 2 * sixteenth,
            beside_bytes: 0,
            tree: TreeConfig {
                node_bytes: tree_bytes,
                table_bytes: tree_bytes,
                listing_bytes: tree_bytes,
                pinned_bytes: sixteenth,
            },
            build: TreeConfig {
                node_bytes: tree_bytes / 8,
                table_bytes: tree_bytes / 8,
                listing_bytes: tree_bytes / 4,
                pinned_bytes: sixteenth / 2,
            },
        }
    }
}

/// A byte stream and what is known of it.
#[derive(Debug, Clone)]
pub struct Opened {
    /// What the file is.
    pub kind: SpecKind,
    /// The stream: the blob, or the archive.
    pub blob: Blob,
    /// Where the file lies.
    pub location: FileLocation,
    /// What is known of the file that is read: that of what is kept, if its store does not answer.
    pub info: FileInfo,
    /// Where its metadata table may lie.
    pub tables: TablePlaces,
}

impl Opened {
    /// The file's modification time.
    pub fn mtime(&self) -> SystemTime {
        self.info.mtime.unwrap_or(SystemTime::UNIX_EPOCH)
    }
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
    let sources = Sources::open(sources, plan, fetch_timeout, report)?;
    open_with(&sources, location, &Arc::new(Replies::new(plan.reply_bytes))).await
}

/// Opens an index or archive from what is open already.
///
/// # Errors
/// Those of [`open_blob`].
pub(super) async fn open_with(
    sources: &Sources,
    location: &FileLocation,
    replies: &Arc<Replies>,
) -> Result<Opened, OpenError> {
    let shown = location.to_string();
    let fail = |why: &dyn ToString| OpenError::new(&shown, why.to_string());
    let trust = &sources.config().trust;
    let mut tables = sources.table_places(location)?;
    tables.obey_trust(trust);
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
            refuse_plain_archive(trust).map_err(|error| fail(&error))?;
            let (blob, info) = match location {
                FileLocation::Remote { name, .. } => {
                    let (blocks, info) = sources.archive(location, name).await?;
                    (Blob::Remote(blocks), info)
                }
                _ => {
                    let path = location.file_name();
                    // Looked at before it is opened, as an index is.
                    let info = local_info(path);
                    let blob = FileBlob::open(path).map_err(|error| fail(&error))?;
                    let size = blob.size();
                    let unknown = || FileInfo { size, version: None, mtime: None, has_ranges: true };
                    (Blob::File(blob), info.unwrap_or_else(unknown))
                }
            };
            return Ok(Opened { kind: SpecKind::Archive, blob, location: location.clone(), info, tables });
        }
        (Kind::Other, None) => {
            return Err(fail(&"it is neither an index (.caibx, .caidx) nor an archive (.catar)"));
        }
        (Kind::Index, _) | (Kind::Other, Some(SpecKind::BlobIndex | SpecKind::ArchiveIndex)) => {}
    }
    let (bytes, info) = sources.index(location).await?;
    let index = Index::open(bytes).map_err(|error| fail(&error))?;
    let suggests_archive = index.header().suggests_archive();
    let cache = sources.cache(location)?;
    let blob = Blob::Chunked(ChunkedBlob::with_replies(index, &shown, cache, Arc::clone(replies)));
    let kind = match claimed {
        Some(kind) => kind,
        None if suggests_archive || begins_with_archive(&blob).await => SpecKind::ArchiveIndex,
        None => SpecKind::BlobIndex,
    };
    Ok(Opened { kind, blob, location: location.clone(), info, tables })
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
    let mtime = opened.mtime();
    let tree = Tree::open(opened.blob, plan.tree).await.map_err(|error| OpenError::new(&shown, error))?;
    table::attach_at_hand(&tree, &opened.tables, mtime).await;
    Ok(tree)
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
    if location.is_directory() {
        return collection::open(location, config, on_file, report).await;
    }
    let plan = MemoryPlan::of_mount(location, config);
    let fetch_timeout = fetch_timeout(config.io_timeout);
    let mut opened = open_blob(location, &config.sources, &plan, fetch_timeout, report).await?;
    opened.tables.obey(&config.keep);
    backing::attach(&opened, config, plan.beside_bytes)?;
    let show = Show::new(&config.show);
    let source = location.to_string();
    let live = Arc::new(Live::new(location.clone(), config.clone(), Arc::clone(report)));
    let (kind, blob) = (opened.kind, opened.blob.clone());
    let part = |tree| {
        let (opening, location, blob) = (Arc::default(), location.clone(), blob.clone());
        Part { path: Vec::new(), number: 0, opening, location, kind, blob, tree }
    };
    if kind == SpecKind::BlobIndex {
        let file_name = match on_file {
            true => None,
            false => {
                let path = location.file_name();
                Some(Bytes::copy_from_slice(path.file_stem().unwrap_or(path.as_os_str()).as_bytes()))
            }
        };
        live.add(part(None));
        let is_backed = config.keep.backing.is_some();
        let image = ImageConfig { file_name, show, mtime: opened.mtime(), source, is_backed };
        let volume = Arc::new(ImageVolume::new(opened.blob, image, Arc::clone(report)));
        return Ok(LiveVolume { volume, live });
    }
    let (tables, mtime) = (opened.tables.clone(), opened.mtime());
    let tree = Arc::new(open_tree(opened, &plan).await?);
    table::background::start(&tree, tables, mtime, &Walks::new(&plan));
    live.add(part(Some(Arc::clone(&tree))));
    let volume = TreeVolume::new(tree, show, source, Arc::clone(report));
    if (volume.root_kind() == super::FileKind::Directory) == on_file {
        let why = match on_file {
            true => "a directory tree cannot be mounted on a file",
            false => "this archive holds a single file; mount it on a file",
        };
        return Err(OpenError::new(&location.to_string(), why));
    }
    Ok(LiveVolume { volume: Arc::new(volume), live })
}

/// How long a fetch may take: it ends before the read that waits for it, so that the read is answered with the fetch's own reason.
pub(super) fn fetch_timeout(io_timeout: Duration) -> Duration {
    io_timeout.mul_f64(0.9)
}

/// Whether the stream begins with an archive's first element. Unreadable content says no: the blob mount then shows the error.
async fn begins_with_archive(blob: &Blob) -> bool {
    let n_head = blob.size().min(SNIFF_BYTES) as usize;
    match blob.read_at(0, n_head).await {
        Ok(head) => archive_flags(&head).is_some(),
        Err(_) => false,
    }
}
