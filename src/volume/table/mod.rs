//! Where metadata tables come from and where they are kept.
//!
//! * [`TablePlaces`] is where the table of an archive may lie: the disk cache, and beside the index or archive, named as that with
//!   [`TABLE_SUFFIX`] behind.
//! * [`binding`] tells the archive by its index, or a plain one by its ends, length and time; [`attach_at_hand`] uses a table that is here already.
//! * [`background`] serves a mount: fetches and checks a table from beside the index, or makes one. [`make`] makes one for a verb.
//! * [`check_bytes`] looks at one that somebody wants to put beside an index.
//! * `spool` is a table in the making.
//!
//! # What a table is worth
//!
//! One that we made is kept in the private part of our cache, and worth what the archive was. One from beside the index says by its
//! binding what index it belongs to, and nothing proves that it tells the truth: it comes from where the index comes from, and is as
//! good as an index that nobody has signed. So it is used only where the index need not be proven (neither `index-sha256` nor
//! `verify-key` is set), kept under another key than ours, and it must agree with the archive wherever the two meet: at
//! the root, and where the content of a file begins, before that is read. Content itself always comes from the archive.
//! By checksums and order a table is checked as a whole before it is used where it lies, or kept.
//!
//! Invariants: a mount waits for no table but a small one that is at hand; one that nobody has checked answers nothing; a table that proves
//! wrong is taken away, and the archive answers.

pub mod background;
mod spool;

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::open::{MemoryPlan, OpenError, Opened};
use crate::blob::source::IndexBytes;
use crate::blob::{Blob, BlobError};
use crate::cache::disk::DiskTier;
use crate::config::{KeepConfig, TrustConfig};
use crate::digest::Digest;
use crate::format::table::{Binding, BindingKind, MAGIC};
use crate::store::StoreOptions;
use crate::store::location::{FileLocation, Location};
use crate::tree::table::build::{BuildError, Pace, build};
use crate::tree::table::check::check;
use crate::tree::table::writer::Writer;
use crate::tree::table::{Table, TableFault};
use crate::tree::{Tree, TreeConfig};
use spool::Spool;

/// What stands behind the name of an index or archive in the name of its table.
pub const TABLE_SUFFIX: &str = ".table";

/// The first and the last bytes of a plain archive that tell it from others.
const SAMPLE_HEAD_BYTES: u64 = 64;
const SAMPLE_TAIL_BYTES: u64 = 4096;

/// The largest index that is digested before a mount is ready: 16 MiB, of some 26 GB of content, take 10 ms.
const MAX_DIGESTED_AT_ONCE: usize = 16 << 20;

/// The longest table beside an index that is checked before a mount is ready: some ten thousand files. A longer one is checked in the
/// background, and used from then on.
const MAX_CHECKED_AT_ONCE_BYTES: u64 = 256 << 10;

/// Kept in memory of a table that is gone through.
const CHECK_BYTES: usize = 1 << 20;

/// How often a process that waits for another one's table looks for it.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// Where the table of an archive may lie or be kept, and what may be done with it. The default is nowhere.
#[derive(Debug, Clone, Default)]
pub struct TablePlaces {
    disk: Option<Arc<DiskTier>>,
    beside: Beside,
    /// No store may be asked.
    is_offline: bool,
    /// One is wanted also where no cache can keep it.
    is_wanted: bool,
    /// However large the index is, it is digested before anything else is done.
    is_patient: bool,
    /// The index is proven, which a table of others is not.
    is_own_only: bool,
}

/// What lies beside an index.
#[derive(Debug, Clone, Default)]
enum Beside {
    #[default]
    Nowhere,
    Local(PathBuf),
    Remote {
        directory: Location,
        options: Box<StoreOptions>,
        name: String,
    },
}

/// Who made a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// We, from the archive.
    Own,
    /// Whoever put it beside the index.
    Published,
}

impl TablePlaces {
    /// The places for what lies at a location; `options` are those of its directory, if it is a store.
    pub fn new(
        disk: Option<Arc<DiskTier>>,
        location: &FileLocation,
        options: Option<StoreOptions>,
        is_offline: bool,
    ) -> Self {
        let beside = match (location, options) {
            (FileLocation::Local(path), _) => {
                let mut path = path.clone().into_os_string();
                path.push(TABLE_SUFFIX);
                Beside::Local(path.into())
            }
            // A signed URL names one file only.
            (FileLocation::Remote { directory: Location::Http(url), .. }, _) if url.query().is_some() => {
                Beside::Nowhere
            }
            (FileLocation::Remote { directory, name, .. }, Some(options)) if !is_offline => {
                let (directory, options) = (directory.clone(), Box::new(options));
                Beside::Remote { directory, options, name: format!("{name}{TABLE_SUFFIX}") }
            }
            _ => Beside::Nowhere,
        };
        Self { disk, beside, is_offline, is_wanted: false, is_patient: false, is_own_only: false }
    }

    /// Leaves out all tables, or wants one in any case, as settings say.
    pub fn obey(&mut self, keep: &KeepConfig) {
        if keep.metadata_table == Some(false) {
            *self = Self::default();
        }
        self.is_wanted |= keep.metadata_table == Some(true);
    }

    /// Leaves out tables that are not ours where the index must be proven.
    pub fn obey_trust(&mut self, trust: &TrustConfig) {
        if trust.index_sha256.is_some() || trust.verify_key.is_some() {
            self.beside = Beside::Nowhere;
            self.is_own_only = true;
        }
    }

    /// For a verb, which may take the time to digest a large index.
    pub fn be_patient(&mut self) {
        self.is_patient = true;
    }

    /// Whether there is a cache that keeps a table that is made.
    pub fn can_keep(&self) -> bool {
        self.disk.is_some()
    }

    fn is_nowhere(&self) -> bool {
        self.disk.is_none() && matches!(self.beside, Beside::Nowhere) && !self.is_wanted
    }
}

/// What tells an archive, and with it its table, from others. `mtime` is that of a plain archive.
///
/// # Errors
/// The archive cannot be read, or has no time by which a change could be known.
pub async fn binding(blob: &Blob, mtime: SystemTime) -> Result<Binding, BlobError> {
    let archive_bytes = blob.size();
    if let Blob::Chunked(chunked) = blob {
        let chunked = chunked.clone();
        let digest = tokio::task::spawn_blocking(move || {
            let source = chunked.index().source();
            let digest = Digest::Sha256.id(source.as_ref()).0;
            source.check_unchanged().map(|()| digest)
        });
        let digest = digest.await.map_err(|_| BlobError::Abandoned)?.map_err(BlobError::Index)?;
        return Ok(Binding { archive_bytes, kind: BindingKind::Index, digest });
    }
    let since = match mtime.duration_since(UNIX_EPOCH) {
        Ok(since) if !since.is_zero() => since,
        _ => return Err(BlobError::Index("nothing tells when the archive was changed".to_owned())),
    };
    let head = blob.read_at(0, archive_bytes.min(SAMPLE_HEAD_BYTES) as usize).await?;
    let tail_bytes = archive_bytes.min(SAMPLE_TAIL_BYTES);
    let tail = blob.read_at(archive_bytes - tail_bytes, tail_bytes as usize).await?;
    let mut digest = Digest::Sha256.stream();
    digest.update(&head);
    digest.update(&tail);
    let mtime_s = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    let kind = BindingKind::Plain { mtime_s, mtime_nsec: since.subsec_nanos() };
    Ok(Binding { archive_bytes, kind, digest: digest.finish().0 })
}

/// The binding of the archive that an index describes, given the index's bytes.
pub fn binding_of_index(index: &[u8], archive_bytes: u64) -> Binding {
    Binding { archive_bytes, kind: BindingKind::Index, digest: Digest::Sha256.id(index).0 }
}

/// What a table is kept under.
fn key_of(binding: &Binding, origin: Origin) -> String {
    let digest = crate::digest::ChunkId(binding.digest).to_hex();
    let time = match binding.kind {
        BindingKind::Index => String::new(),
        BindingKind::Plain { mtime_s, mtime_nsec } => format!(" of {mtime_s}.{mtime_nsec:09}"),
    };
    let origin = match origin {
        Origin::Own => "made here",
        Origin::Published => "published",
    };
    // Of two versions of this program that share a cache, each has its own.
    let form = String::from_utf8_lossy(MAGIC);
    format!("metadata table {form}, {origin}, of {digest}, {} bytes{time}", binding.archive_bytes)
}

/// Has a tree answer from a table that is here already: kept in the cache, or beside the index. Every fault is as good as no table.
pub async fn attach_at_hand(tree: &Tree, places: &TablePlaces, mtime: SystemTime) {
    if places.is_nowhere() || !tree.root().is_directory() {
        return;
    }
    let is_large = match tree.blob() {
        Blob::Chunked(blob) => match blob.index().source() {
            IndexBytes::Mapped(_) => blob.index().source().as_ref().len() > MAX_DIGESTED_AT_ONCE,
            IndexBytes::Copied(_) => false,
        },
        Blob::File(_) | Blob::Remote(_) => false,
    };
    if is_large && !places.is_patient {
        return;
    }
    if let Ok(binding) = binding(tree.blob(), mtime).await {
        if attach_kept(tree, places, &binding).await {
            return;
        }
        let max_bytes = if places.is_patient { u64::MAX } else { MAX_CHECKED_AT_ONCE_BYTES };
        if let Some(file) = checked_beside(places, &binding, max_bytes).await {
            attach(tree, file, &binding, None).await;
        }
    }
}

async fn attach_kept(tree: &Tree, places: &TablePlaces, binding: &Binding) -> bool {
    let Some(disk) = &places.disk else { return false };
    let origins: &[Origin] = match places.is_own_only {
        true => &[Origin::Own],
        false => &[Origin::Own, Origin::Published],
    };
    for origin in origins {
        let key = key_of(binding, *origin);
        let (tier, sought) = (Arc::clone(disk), key.clone());
        let Ok(Some(file)) = tokio::task::spawn_blocking(move || tier.table(&sought)).await else { continue };
        if attach(tree, file, binding, Some((Arc::clone(disk), key))).await {
            return true;
        }
    }
    false
}

/// The table beside an index of this machine, checked as a whole; `None` if there is none of this archive, it is wrong, or is longer than
/// `max_bytes`.
async fn checked_beside(places: &TablePlaces, binding: &Binding, max_bytes: u64) -> Option<File> {
    let Beside::Local(path) = &places.beside else { return None };
    let (path, binding) = (path.clone(), *binding);
    let checked = tokio::task::spawn_blocking(move || {
        // A pipe in the place of a file is not opened.
        path.metadata().ok().filter(|metadata| metadata.is_file() && metadata.len() <= max_bytes)?;
        let file = File::open(&path).ok()?;
        let table = file.try_clone().map_err(|error| TableFault(error.to_string()));
        let table = table.and_then(|file| Table::open(file, CHECK_BYTES));
        let is_right = table.and_then(|table| match table.binding().covers(&binding) {
            true => check(&table).map(|()| true),
            // One that was published for another version stays where it is, and is not used.
            false => Ok(false),
        });
        match is_right {
            Ok(is_right) => is_right.then_some(file),
            Err(fault) => {
                // Whoever looks at short ones only is followed by who looks at all, and says it.
                if max_bytes == u64::MAX {
                    tracing::warn!("{}: {fault}; it is not used", path.display());
                }
                None
            }
        }
    });
    checked.await.ok().flatten()
}

/// Checks the bytes of a table as a whole, whatever archive it is of. Blocks.
///
/// # Errors
/// There is no room for the file that they are read from.
pub fn check_bytes(bytes: &[u8]) -> io::Result<Result<(), TableFault>> {
    let mut spool = Spool::new(None)?;
    // In pieces: a spool keeps what it has not written yet.
    bytes.chunks(CHECK_BYTES).try_for_each(|piece| spool.write_all(piece))?;
    spool.flush()?;
    Ok(Table::open(spool.file()?, CHECK_BYTES).and_then(|table| check(&table)))
}

/// Attaches a table if it is one of this archive. When it proves wrong, it is taken out of the cache.
async fn attach(tree: &Tree, file: File, binding: &Binding, kept: Option<(Arc<DiskTier>, String)>) -> bool {
    let take_away = move |fault: &TableFault| {
        tracing::warn!("metadata table: {fault}; the archive is read instead");
        if let Some((disk, key)) = kept.clone() {
            let reason = fault.to_string();
            drop(tokio::task::spawn_blocking(move || disk.discard_table(&key, &reason)));
        }
    };
    let kept = tree.table_blocks();
    let opened = tokio::task::spawn_blocking(move || Table::open_in(file, kept)).await;
    let opened = opened.unwrap_or_else(|_| Err(TableFault("it was given up".to_owned())));
    let attached = match opened {
        // One that was published for another version stays where it is, and is not used.
        Ok(table) if !table.binding().covers(binding) => return false,
        Ok(table) => tree.attach(table, take_away.clone()).await,
        Err(fault) => Err(fault),
    };
    attached.map_err(|fault| take_away(&fault)).is_ok()
}

/// What became of a table that was to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Made {
    /// It was there already.
    Kept {
        /// Files in it.
        n_nodes: u64,
    },
    /// It was made.
    New {
        /// Files in it.
        n_nodes: u64,
    },
}

/// Makes the table of an archive and keeps it in the disk cache, unless it is there. `pace` is told of the number of files so far and can
/// end it. Reads the metadata of the whole archive.
///
/// # Errors
/// There is no cache to keep it in, the archive is none or cannot be read, or the table cannot be written.
pub async fn make(opened: &Opened, plan: &MemoryPlan, pace: Pace) -> Result<Made, OpenError> {
    let fail = |why: &dyn ToString| OpenError::new(&opened.location.to_string(), why.to_string());
    let Some(disk) = &opened.tables.disk else {
        return Err(fail(&"there is no cache to keep its metadata table in (name a directory with -c)"));
    };
    let binding = binding(&opened.blob, opened.mtime()).await.map_err(|error| fail(&error))?;
    let key = key_of(&binding, Origin::Own);
    let _lock = loop {
        if let Some(table) = kept_table(disk, &key, &binding).await {
            return Ok(Made::Kept { n_nodes: table.n_nodes() });
        }
        let (tier, wanted) = (Arc::clone(disk), key.clone());
        let lock = tokio::task::spawn_blocking(move || tier.lock_table(&wanted)).await;
        match lock.unwrap_or(Ok(None)).map_err(|error| fail(&error))? {
            Some(lock) => break lock,
            None => tokio::time::sleep(LOOK_AGAIN).await,
        }
    };
    let made = make_into(&opened.blob, plan.build, &opened.tables, binding, &pace).await;
    match made {
        Ok(table) => Ok(Made::New { n_nodes: table.n_nodes() }),
        Err(error) => Err(fail(&error)),
    }
}

/// A table in the cache, if it is one.
async fn kept_table(disk: &Arc<DiskTier>, key: &str, binding: &Binding) -> Option<Table> {
    let (disk, key, binding) = (Arc::clone(disk), key.to_owned(), *binding);
    let opened = tokio::task::spawn_blocking(move || {
        let table = Table::open(disk.table(&key)?, 0);
        table.map_err(|fault| disk.discard_table(&key, &fault.to_string())).ok()
    });
    opened.await.ok()?.filter(|table| table.binding().covers(&binding))
}

/// Makes a table and keeps it, in the cache or for this process only.
async fn make_into(
    blob: &Blob,
    config: TreeConfig,
    places: &TablePlaces,
    binding: Binding,
    pace: &Pace,
) -> Result<Table, BuildError> {
    let tree = Tree::open(blob.clone(), config).await?;
    if !tree.root().is_directory() {
        return Err(BuildError::GivenUp);
    }
    let disk = places.disk.clone();
    let (plain, mut sealed) = blocking(move || Ok((Spool::new(disk.as_ref())?, Spool::new(disk.as_ref())?))).await?;
    let writer = Writer::new(plain.file()?, plain.into_room());
    let (writer, root) = build(&tree, writer, pace).await?;
    let disk = places.disk.clone();
    let sealing = blocking(move || {
        writer.seal(&root, binding, &mut sealed)?;
        let file = sealed.keep_as(disk.as_deref(), &key_of(&binding, Origin::Own))?;
        Table::open(file, 0).map_err(io::Error::other)
    });
    Ok(sealing.await?)
}

/// Does what blocks on a thread for it.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| Err(io::Error::other("it was given up")))
}
