//! Many indexes as one volume: a directory (of this machine, a web server, a bucket, an SFTP server) in which every `.caibx` is a file and
//! every `.caidx` and `.catar` a directory, with the directories below it.
//!
//! * `names` says what is shown, and how it is called; `inode` gives the numbers, and `ledger` has them for a process that goes on with the
//!   mount.
//! * `catalog` is what was listed; `watch` hears of changes; `look` lists again, and finds out what must be known of a file to show it,
//!   by `peek`.
//! * `part` is an index or archive that was looked at, and the few of them that are open; `serve` is the volume.
//!
//! A listing opens nothing: what it does not know of a file (the length of an image, the owner of a tree) the kernel asks for when somebody
//! wants to know. Looking a name up reads the ends of that one index; only using what is in it opens it.
//!
//! Directories may change at any time, so the kernel keeps what it knows of them for [`DIRECTORY_LASTS`] only. A file that is replaced is
//! another one, with another number; the one before can be read on by who has it open, as long as it is among the parts that are open.
//!
//! Invariants: all parts share one cache, one set of limits and one memory budget; a number means the same file for as long as it means
//! anything; a file that cannot be opened is shown, and is an error to whoever uses it, and to nobody else.

mod catalog;
mod inode;
mod ledger;
mod look;
mod names;
mod part;
mod peek;
mod serve;
mod watch;

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use self::catalog::{Dir, NameRoom};
use self::inode::Numbers;
use self::ledger::Ledger;
use self::part::{OpenParts, Part};
use self::watch::Watch;
use super::open::{MemoryPlan, OpenError, fetch_timeout};
use super::sources::Sources;
use super::table::background::Walks;
use super::{Live, LiveVolume, Show};
use crate::blob::replies::Replies;
use crate::config::MountConfig;
use crate::report::Report;
use crate::store::location::FileLocation;
use crate::tree::{ROOT_INO, TreeRoom};

/// How long the kernel may keep what a directory has and has not.
pub const DIRECTORY_LASTS: Duration = Duration::from_secs(1);

/// How old a listing may be where nothing tells of changes, when nothing else is said.
pub const DEFAULT_POLL_INTERVAL: Duration = Duration::from_secs(30);

/// Looks and openings under way at the same time, each on a thread that may block; there are 512 of those.
const MAX_ASIDES: usize = 64;

/// What all listings of a mount may take, in bytes: some 300,000 names. It is not part of the memory budget, since what was listed cannot be
/// forgotten while the kernel may ask for it, but a server that has ever more directories must not take all memory.
const MAX_NAME_BYTES: usize = 256 << 20;

/// A directory of indexes and archives.
#[derive(Debug, Clone)]
pub struct Collection {
    shared: Arc<Shared>,
}

/// Locks are never held over I/O or await, and none while another is taken, but for `gone` before `numbers`, `numbers` before `ledger`, and what
/// a directory knows before the room for names.
#[derive(Debug)]
struct Shared {
    /// The directory.
    place: FileLocation,
    live: Arc<Live>,
    /// Replaced when settings change.
    sources: Mutex<(MountConfig, Arc<Sources>)>,
    replies: Arc<Replies>,
    trees: Arc<TreeRoom>,
    /// Bounds what goes on aside.
    asides: Arc<Semaphore>,
    /// Metadata tables are made one after the other.
    walks: Walks,
    show: Show,
    keep_suffix: bool,
    /// How old a listing may be; `None` for any age.
    max_age: Option<Duration>,
    /// Nothing of an index is believed before all of it was verified.
    must_open: bool,
    report: Arc<Report>,
    watch: Option<Arc<Watch>>,
    dirs: Mutex<HashMap<u64, Arc<Dir>>>,
    numbers: Mutex<Numbers<Part>>,
    /// Where numbers are written down, if another process may go on.
    ledger: Mutex<Option<Ledger>>,
    /// The bases of parts whose files are gone, the oldest first.
    gone: Mutex<VecDeque<u64>>,
    /// The numbers of directories that are gone, the oldest first. One that is there again may be among them.
    gone_dirs: Mutex<VecDeque<u64>>,
    /// Bounds what is known of all directories.
    names: NameRoom,
    open: OpenParts,
    /// Bytes of the parts that were looked at.
    size_bytes: AtomicU64,
    /// When a number was searched for in vain.
    last_search: tokio::sync::Mutex<Option<Instant>>,
}

/// Opens a directory of indexes and lists it.
///
/// # Errors
/// It cannot be listed; the cache cannot be opened; or an option is for one index only.
pub async fn open(
    place: &FileLocation,
    config: &MountConfig,
    on_file: bool,
    report: &Arc<Report>,
) -> Result<LiveVolume, OpenError> {
    let fail = |why: &str| OpenError::new(&place.to_string(), why);
    if on_file {
        return Err(fail("a directory of indexes cannot be mounted on a file"));
    }
    if config.sources.trust.index_sha256.is_some() {
        return Err(fail("index-sha256 is for one index, and this is a directory of them (use verify-key)"));
    }
    if config.keep.backing.is_some() {
        return Err(fail("backing is for one image, and this is a directory of them"));
    }
    let plan = MemoryPlan::of_mount(place, config);
    // As for a single index: a fetch ends before the read that waits for it.
    let mut sources = Sources::open(&config.sources, &plan, config.io_timeout.mul_f64(0.9), report)?;
    let is_local = matches!(place, FileLocation::Local(_));
    if !is_local {
        sources.divide();
    }
    let live = Arc::new(Live::new(place.clone(), config.clone(), Arc::clone(report)));
    let poll_interval = config.show.poll_interval.unwrap_or(DEFAULT_POLL_INTERVAL);
    let shared = Arc::new(Shared {
        place: place.clone(),
        live: Arc::clone(&live),
        sources: Mutex::new((config.clone(), Arc::new(sources))),
        replies: Arc::new(Replies::new(plan.reply_bytes)),
        trees: Arc::new(TreeRoom::new(plan.tree)),
        walks: Walks::new(&plan),
        asides: Arc::new(Semaphore::new(MAX_ASIDES)),
        show: Show::new(&config.show),
        keep_suffix: config.show.keep_suffix,
        max_age: Some(poll_interval).filter(|interval| !interval.is_zero()),
        must_open: config.sources.trust.verify_key.is_some(),
        report: Arc::clone(report),
        watch: if is_local { Watch::new().map(Arc::new) } else { None },
        dirs: Mutex::default(),
        numbers: Mutex::default(),
        ledger: Mutex::default(),
        gone: Mutex::default(),
        gone_dirs: Mutex::default(),
        names: NameRoom::new(MAX_NAME_BYTES),
        open: OpenParts::new(usize::try_from(plan.beside_bytes).unwrap_or(usize::MAX)),
        size_bytes: AtomicU64::new(0),
        last_search: tokio::sync::Mutex::default(),
    });
    let root = shared.dir_at(b"", ROOT_INO);
    shared.list(&root).await?;
    Ok(LiveVolume { volume: Arc::new(Collection { shared }), live })
}

impl Shared {
    /// What parts are read from, by the settings in force.
    fn sources(&self) -> Arc<Sources> {
        let config = self.live.config();
        let mut current = lock(&self.sources);
        let (of, sources) = &mut *current;
        if *of != config {
            let plan = MemoryPlan::of_mount(&self.place, &config);
            *sources = Arc::new(sources.retuned(&config.sources, &plan, fetch_timeout(config.io_timeout)));
            *of = config;
        }
        Arc::clone(sources)
    }

    fn dirs(&self) -> MutexGuard<'_, HashMap<u64, Arc<Dir>>> {
        lock(&self.dirs)
    }

    fn numbers(&self) -> MutexGuard<'_, Numbers<Part>> {
        lock(&self.numbers)
    }

    fn ledger(&self) -> MutexGuard<'_, Option<Ledger>> {
        lock(&self.ledger)
    }

    fn gone_dirs(&self) -> MutexGuard<'_, VecDeque<u64>> {
        lock(&self.gone_dirs)
    }

    fn gone(&self) -> MutexGuard<'_, VecDeque<u64>> {
        lock(&self.gone)
    }
}

/// A panic cannot leave half of a change here that would matter.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
