//! The table of a mount: found, fetched or made while the mount is served, so that nobody waits for it.
//!
//! In this order: one that is kept in the cache, one beside the index, and at last one that is made by a walk over the archive. The walk
//! begins when nobody has used the mount for a moment, goes on while nobody does, and in small steps otherwise.

use std::io::{self, Write};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::StreamExt;
use tokio::sync::Semaphore;

use super::spool::Spool;
use super::{
    Beside, CHECK_BYTES, LOOK_AGAIN, Origin, TablePlaces, attach, attach_kept, blocking, checked_beside, key_of,
    make_into,
};
use crate::blob::Blob;
use crate::cache::background::{Purpose, Warmth};
use crate::format::table::{Binding, TAIL_BYTES, Tail};
use crate::store::files::{FileInfo, FileStore, ReadWhole};
use crate::store::open::open_files;
use crate::tree::table::build::{BuildError, Pace};
use crate::tree::table::check::check;
use crate::tree::table::{Table, parse_tail};
use crate::tree::{TableState, Tree, TreeConfig};
use crate::volume::open::MemoryPlan;

/// The mount has been left alone for so long when the walk begins, or has been there for so long.
const QUIET_BEFORE: Duration = Duration::from_secs(1);
const LONGEST_BEFORE: Duration = Duration::from_secs(30);

/// The mount has been left alone for so long when a step of the walk is done, or the step has waited for so long.
const QUIET: Duration = Duration::from_millis(30);
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// A walk that the archive's store ended is begun anew so often, and after so long; each time twice as long.
const MAX_WALKS: u32 = 6;
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(30);

/// A table in use is made young again in the cache from time to time, so that it is not the first thing to go.
const KEEP_YOUNG: Duration = Duration::from_secs(600);

/// The largest table that is fetched: that of some hundred million files.
const MAX_FETCHED_BYTES: u64 = 4 << 30;

/// The largest table that is fetched from a server that cannot read parts of a file, and so is held in memory.
const MAX_WHOLE_BYTES: u64 = 4 << 20;

/// A table is fetched in pieces of this size, so many side by side.
const PIECE_BYTES: u64 = 512 << 10;
const PIECES_AT_ONCE: usize = 4;

/// What the trees of a mount share: one walk at a time, within the memory that the plan has for one.
#[derive(Debug, Clone)]
pub struct Walks {
    config: TreeConfig,
    turn: Arc<Semaphore>,
    /// The same for what is fetched from beside an index.
    fetch: Arc<Semaphore>,
}

impl Walks {
    /// For all trees of a mount.
    pub fn new(plan: &MemoryPlan) -> Self {
        let one = || Arc::new(Semaphore::new(1));
        Self { config: plan.build, turn: one(), fetch: one() }
    }
}

/// Starts looking for a table for a tree that is served, or making one. Ends with the tree.
pub fn start(tree: &Arc<Tree>, places: TablePlaces, mtime: SystemTime, walks: &Walks) {
    if places.is_nowhere() || !tree.root().is_directory() {
        return;
    }
    let service = Service { tree: Arc::downgrade(tree), places, mtime, walks: walks.clone() };
    tokio::spawn(service.run());
}

struct Service {
    /// Weak, so that the work ends with the mount.
    tree: Weak<Tree>,
    places: TablePlaces,
    mtime: SystemTime,
    walks: Walks,
}

impl Service {
    async fn run(self) {
        let Some(blob) = self.blob() else { return };
        let binding = super::binding(&blob, self.mtime).await;
        drop(blob);
        let binding = match binding {
            Ok(binding) => binding,
            Err(error) => return tracing::debug!("no metadata table: {error}"),
        };
        if !self.is_in_use() {
            self.say(TableState::Sought);
        }
        if self.find(&binding).await || self.make(&binding).await {
            return self.keep_young(&binding).await;
        }
        self.say(TableState::None);
    }

    /// What the tree is read from, while there is one.
    fn blob(&self) -> Option<Blob> {
        self.tree.upgrade().map(|tree| tree.blob().clone())
    }

    fn is_in_use(&self) -> bool {
        self.tree.upgrade().is_some_and(|tree| matches!(tree.table_state(), TableState::InUse { .. }))
    }

    fn say(&self, state: TableState) {
        if let Some(tree) = self.tree.upgrade() {
            tree.set_table_state(state);
        }
    }

    /// Uses a table that is kept, or lies beside the index.
    async fn find(&self, binding: &Binding) -> bool {
        let Some(tree) = self.tree.upgrade() else { return true };
        if self.is_in_use() || attach_kept(&tree, &self.places, binding).await {
            return true;
        }
        drop(tree);
        if let Some(file) = checked_beside(&self.places, binding, u64::MAX).await {
            return match self.tree.upgrade() {
                Some(tree) => attach(&tree, file, binding, None).await,
                None => true,
            };
        }
        match self.fetch(binding).await {
            Ok(Some(file)) => {
                let (Some(tree), Some(disk)) = (self.tree.upgrade(), &self.places.disk) else {
                    return match self.tree.upgrade() {
                        Some(tree) => attach(&tree, file, binding, None).await,
                        None => true,
                    };
                };
                let kept = (Arc::clone(disk), key_of(binding, Origin::Published));
                attach(&tree, file, binding, Some(kept)).await
            }
            Ok(None) => false,
            Err(error) => {
                tracing::info!("the metadata table beside the index is not used: {error}");
                false
            }
        }
    }

    /// Fetches a table from beside a remote index into the cache, and checks it.
    async fn fetch(&self, binding: &Binding) -> io::Result<Option<std::fs::File>> {
        let Beside::Remote { directory, options, name } = &self.places.beside else { return Ok(None) };
        if self.places.disk.is_none() && !self.places.is_wanted {
            return Ok(None);
        }
        let _turn = self.walks.fetch.acquire().await;
        if self.tree.strong_count() == 0 {
            return Ok(None);
        }
        let files = open_files(directory, options).map_err(io::Error::other)?;
        let remote = Remote { files: files.as_ref(), name, timeout: options.request_timeout };
        let Some(info) = remote.find(binding).await? else { return Ok(None) };
        let disk = self.places.disk.clone();
        let mut spool = blocking(move || Spool::new(disk.as_ref())).await?;
        let n_pieces = info.size.div_ceil(PIECE_BYTES);
        let pieces = futures_util::stream::iter(0..n_pieces).map(|piece| {
            let start = piece * PIECE_BYTES;
            remote.piece(&info, start..info.size.min(start + PIECE_BYTES))
        });
        let mut pieces = pieces.buffered(PIECES_AT_ONCE);
        while let Some(piece) = pieces.next().await {
            let piece = piece?;
            if self.tree.strong_count() == 0 {
                return Ok(None);
            }
            spool = blocking(move || spool.write_all(&piece).map(|()| spool)).await?;
        }
        let (disk, key, binding) = (self.places.disk.clone(), key_of(binding, Origin::Published), *binding);
        let kept = blocking(move || {
            spool.flush()?;
            let table = Table::open(spool.file()?, CHECK_BYTES).map_err(io::Error::other)?;
            if !table.binding().covers(&binding) {
                return Ok(None);
            }
            check(&table).map_err(io::Error::other)?;
            spool.keep_as(disk.as_deref(), &key).map(Some)
        });
        kept.await
    }

    /// Makes the table, if nobody else does, or waits for it.
    async fn make(&self, binding: &Binding) -> bool {
        if self.places.is_offline || self.places.disk.is_none() && !self.places.is_wanted {
            return false;
        }
        self.say(TableState::Building { n_nodes: 0 });
        if !self.wait_for_quiet(QUIET_BEFORE, LONGEST_BEFORE).await {
            return true;
        }
        let key = key_of(binding, Origin::Own);
        let _lock = loop {
            let Some(disk) = self.places.disk.clone() else { break None };
            let wanted = key.clone();
            match blocking(move || disk.lock_table(&wanted)).await {
                Ok(Some(lock)) => break Some(lock),
                Ok(None) => tokio::time::sleep(LOOK_AGAIN).await,
                Err(error) => {
                    tracing::debug!("no metadata table is made: {error}");
                    return false;
                }
            }
            if self.tree.strong_count() == 0 {
                return true;
            }
        };
        // Another process may have made it meanwhile.
        let Some(tree) = self.tree.upgrade() else { return true };
        if attach_kept(&tree, &self.places, binding).await {
            return true;
        }
        drop(tree);
        let mut pause = PAUSE_AFTER_FAILURE;
        for n_walks in 1.. {
            let Ok(turn) = self.walks.turn.acquire().await else { return false };
            let Some(blob) = self.blob() else { return true };
            // Beside what readers fetch, and not in its way.
            let blob = blob.for_purpose(Purpose::Warm(Warmth { pace: None, into_memory: true, is_urgent: false }));
            let made = make_into(&blob, self.walks.config, &self.places, *binding, &self.pace()).await;
            drop((blob, turn));
            match made {
                Ok(table) => {
                    // The walk's caches are gone; without this, what they had stays with the process.
                    drop(tokio::task::spawn_blocking(crate::sys::give_memory_back).await);
                    return self.use_made(table, binding).await;
                }
                Err(BuildError::GivenUp) => return true,
                Err(BuildError::Tree(error @ crate::tree::TreeError::Blob(_))) if n_walks < MAX_WALKS => {
                    tracing::info!("making the metadata table: {error}; it is tried again");
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
                Err(error) => {
                    tracing::info!("no metadata table is made: {error}");
                    return false;
                }
            }
        }
        false
    }

    async fn use_made(&self, table: Table, binding: &Binding) -> bool {
        let Some(tree) = self.tree.upgrade() else { return true };
        if attach_kept(&tree, &self.places, binding).await {
            return true;
        }
        // One that no cache keeps.
        let table = table.with_kept(&tree.table_blocks());
        let warn = |fault: &_| tracing::warn!("metadata table: {fault}; the archive is read instead");
        match table {
            Ok(table) => tree.attach(table, warn).await.is_ok(),
            Err(_) => false,
        }
    }

    fn pace(&self) -> Pace {
        let tree = self.tree.clone();
        Box::new(move |n_nodes| {
            let tree = tree.clone();
            Box::pin(async move {
                match tree.upgrade() {
                    Some(tree) => tree.set_table_state(TableState::Building { n_nodes }),
                    None => return false,
                }
                wait_for_quiet(&tree, QUIET, LONGEST_WAIT).await
            })
        })
    }

    async fn wait_for_quiet(&self, quiet: Duration, longest: Duration) -> bool {
        wait_for_quiet(&self.tree, quiet, longest).await
    }

    async fn keep_young(&self, binding: &Binding) {
        let keys = [Origin::Own, Origin::Published].map(|origin| key_of(binding, origin));
        while let (Some(disk), true) = (self.places.disk.clone(), self.is_in_use()) {
            tokio::time::sleep(KEEP_YOUNG).await;
            let keys = keys.clone();
            // Looking at a table makes it young.
            drop(blocking(move || Ok(keys.iter().any(|key| disk.table(key).is_some()))).await);
        }
    }
}

/// Waits until a tree has not been asked for anything for so long, but not for ever; gives whether it is still there.
async fn wait_for_quiet(tree: &Weak<Tree>, quiet: Duration, longest: Duration) -> bool {
    let mut waited = Duration::ZERO;
    loop {
        let Some(idle) = tree.upgrade().map(|tree| tree.idle_for()) else { return false };
        let rest = quiet.saturating_sub(idle).max(Duration::from_millis(1));
        if idle >= quiet || waited >= longest {
            return true;
        }
        tokio::time::sleep(rest).await;
        waited += rest;
    }
}

/// A table beside a remote index.
struct Remote<'a> {
    files: &'a dyn FileStore,
    name: &'a str,
    timeout: Duration,
}

impl Remote<'_> {
    /// What is known of the table, if there is one of this archive.
    async fn find(&self, binding: &Binding) -> io::Result<Option<FileInfo>> {
        let Some(info) = self.within(self.files.stat(self.name)).await? else { return Ok(None) };
        if info.size > MAX_FETCHED_BYTES || !info.has_ranges && info.size > MAX_WHOLE_BYTES {
            return Err(io::Error::other(format!("{} bytes are too many", info.size)));
        }
        let Some(tail_at) = info.size.checked_sub(TAIL_BYTES as u64) else { return Ok(None) };
        if !info.has_ranges {
            return Ok(Some(info));
        }
        let tail = self.piece(&info, tail_at..info.size).await?;
        let tail = tail.first_chunk().ok_or_else(|| io::Error::other("it is cut off"))?;
        let tail: Tail = parse_tail(tail, info.size).map_err(io::Error::other)?;
        // One of another version is nothing to fetch.
        Ok(tail.binding.covers(binding).then_some(info))
    }

    async fn piece(&self, info: &FileInfo, range: std::ops::Range<u64>) -> io::Result<Bytes> {
        if info.has_ranges {
            return self.within(self.files.read_range(self.name, range, info.version.as_ref())).await;
        }
        match self.within(self.files.read_whole(self.name, None, MAX_WHOLE_BYTES)).await? {
            ReadWhole::Content(whole) if whole.bytes.len() as u64 == info.size => {
                Ok(whole.bytes.slice(range.start as usize..range.end as usize))
            }
            _ => Err(io::Error::other("it was changed meanwhile")),
        }
    }

    async fn within<T>(&self, asked: impl Future<Output = Result<T, crate::store::StoreError>>) -> io::Result<T> {
        match tokio::time::timeout(self.timeout, asked).await {
            Ok(answer) => answer.map_err(io::Error::other),
            Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut)),
        }
    }
}
