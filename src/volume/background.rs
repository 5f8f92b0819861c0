//! What goes on beside the serving of a volume, as its settings say: warming, replaying a profile, recording one.
//!
//! [`Background`] does for every part of a volume what is to be done, when the part is opened: first its profile, then what is to be
//! warmed; once at a time for each part (`at_work`), and for a few parts at a time. It ends when it is stopped or dropped. The parts of a
//! directory of indexes are opened for it by a `tour`, if something of them is to be warmed. `profile` reads profiles wherever they lie.
//!
//! Invariants: nothing of it is waited for by a reader, no failure of it ends a mount, and what waits for its turn keeps no part open.

mod at_work;
mod profile;
mod tour;

use std::ffi::OsStr;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;

use self::at_work::{AllAtWork, AtWork};
pub use self::profile::{CutProfile, beside, read_profile};
use self::tour::Tour;
use super::live::{LiveVolume, PartObserver};
use super::open::OpenError;
use super::record::{FLUSH, Recorder};
use super::replay::{Ahead, Follow, known_chunks, replay};
use super::warm::{self, NotWarmable, Tally, Warming, Wish, WishError};
use super::{Live, Part, ROOT_INO};
use crate::blob::backing::Presence;
use crate::blob::{Blob, ChunkedBlob};
use crate::cache::Touches;
use crate::cache::background::Pace;
use crate::config::{AheadConfig, MountConfig, StoreSettings};
use crate::digest::ChunkId;
use crate::format::profile::{Profile, SUFFIX};
use crate::store::location::{FileLocation, Location};

/// The word for no profile.
const NO_PROFILE: &str = "no";

/// How often warming is tried again when the stores fail, and how soon: some ten minutes beside what every fetch does by itself.
const N_RETRIES: u32 = 12;
const FIRST_PAUSE: Duration = Duration::from_secs(2);

/// Profiles that are replayed at the same time, and parts that are warmed; other parts wait.
const MAX_REPLAYS: usize = 4;
const MAX_WARMED: usize = 4;

/// The background work of a volume. It ends with this value.
#[derive(Debug)]
pub struct Background {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: AheadConfig,
    is_offline: bool,
    /// How stores are reached.
    settings: Arc<StoreSettings>,
    /// The most chunks of a profile that are replayed.
    max_profile_chunks: usize,
    wishes: Vec<Wish>,
    warming: Warming,
    /// That of `warming`.
    pace: Arc<Pace>,
    watch: Arc<Watch>,
    replays: Arc<Semaphore>,
    warmings: Arc<Semaphore>,
    /// What has the parts. It knows us, too.
    live: Weak<Live>,
    at_work: Arc<AllAtWork>,
    runtime: Handle,
    tasks: Mutex<Vec<AbortHandle>>,
}

/// Who wants to know what readers touch.
#[derive(Debug, Default)]
struct Watch {
    recorder: OnceLock<Recorder>,
    /// Locked for writing only when a replay begins or ends.
    follows: RwLock<Vec<Arc<Follow>>>,
}

impl Touches for Watch {
    fn touched(&self, id: ChunkId) {
        if let Some(recorder) = self.recorder.get() {
            recorder.touched(id);
        }
        for follow in self.follows.read().unwrap_or_else(PoisonError::into_inner).iter() {
            follow.touched(id);
        }
    }
}

impl Background {
    /// Makes ready what the settings of a volume say; [`Self::begin`] begins it.
    ///
    /// # Errors
    /// A profile is to be recorded, and its file cannot be made, or the volume has no chunks to record.
    pub fn new(live: &Arc<Live>, runtime: &Handle) -> Result<Self, OpenError> {
        let MountConfig { ahead, sources, memory_bytes, .. } = live.config();
        let watch = Arc::new(Watch::default());
        let pace = Arc::new(Pace::new(ahead.warm_rate_bytes));
        if let Some(path) = &ahead.record {
            let is_plain = |part: &Part| !matches!(part.blob, Blob::Chunked(_));
            if live.parts().iter().any(is_plain) {
                let why = "a plain archive has no chunks to record (make an index of it with tar -i)";
                return Err(OpenError::new(&live.location.to_string(), why));
            }
            let recorder = Recorder::start(path);
            let recorder = recorder.map_err(|error| {
                OpenError::new(&path.to_string_lossy(), format!("the profile cannot be recorded: {error}"))
            })?;
            let _ = watch.recorder.set(recorder);
        }
        let shared = Arc::new(Shared {
            is_offline: sources.offline,
            settings: sources.settings,
            max_profile_chunks: profile::max_chunks(memory_bytes),
            wishes: ahead.warm.iter().map(|wish| Wish::parse(wish.as_bytes())).collect(),
            warming: Warming {
                pace: Some(Arc::clone(&pace)),
                n_retries: N_RETRIES,
                pause: FIRST_PAUSE,
                gives_up: true,
            },
            config: ahead,
            pace,
            watch,
            replays: Arc::new(Semaphore::new(MAX_REPLAYS)),
            warmings: Arc::new(Semaphore::new(MAX_WARMED)),
            live: Arc::downgrade(live),
            at_work: Arc::default(),
            runtime: runtime.clone(),
            tasks: Mutex::default(),
        });
        Ok(Self { shared })
    }

    /// Begins it, for the parts of the volume that are open and those that will be. What is said of it goes to where lines of the log go then.
    pub fn begin(&self, volume: &LiveVolume) {
        let (shared, live) = (&self.shared, &volume.live);
        if shared.watch.recorder.get().is_some() {
            shared.spawn(write_regularly(Arc::clone(&shared.watch)));
        }
        let observer: Arc<dyn PartObserver> = Arc::<Shared>::clone(shared);
        live.observe(&observer);
        // Nobody told us of a change before.
        shared.settings_changed(&live.config());
        if !shared.wishes.is_empty() && tour::is_changeable(&*volume.volume, ROOT_INO) {
            let tour = Tour {
                volume: Arc::clone(&volume.volume),
                live: Arc::downgrade(live),
                wishes: shared.wishes.clone(),
                at_work: Arc::clone(&shared.at_work),
                turns: Arc::clone(&shared.warmings),
            };
            shared.spawn(tour.run());
        }
    }

    /// Ends all of it; a recording is put into its place.
    pub fn stop(&self) {
        for task in self.shared.lock().drain(..) {
            task.abort();
        }
        if let Some(recorder) = self.shared.watch.recorder.get()
            && let Err(error) = recorder.finish()
        {
            tracing::warn!("{}: the profile cannot be written: {error}", recorder.path().display());
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.stop();
    }
}

impl PartObserver for Shared {
    fn part_opened(&self, part: &Part) {
        if let (Some(_), Blob::Chunked(blob)) = (self.watch.recorder.get(), &part.blob) {
            blob.cache().set_touches(Arc::<Watch>::clone(&self.watch));
        }
        let wishes: Vec<Wish> = self.wishes.iter().filter_map(|wish| wish.for_part(&part.path)).collect();
        let profile = self.profile_of(part);
        if profile.is_none() && wishes.is_empty() {
            return;
        }
        // One that was closed and is open again while its turn has not come or is not over.
        let Some(at_work) = AtWork::begin(&self.at_work, part) else { return };
        let work = PartWork {
            live: Weak::clone(&self.live),
            at_work,
            location: part.location.clone(),
            wishes,
            settings: Arc::clone(&self.settings),
            max_profile_chunks: self.max_profile_chunks,
            warming: self.warming.clone(),
            watch: Arc::clone(&self.watch),
        };
        self.spawn(work.run(profile, Arc::clone(&self.replays), Arc::clone(&self.warmings)));
    }

    fn settings_changed(&self, config: &MountConfig) {
        self.pace.set(config.ahead.warm_rate_bytes);
    }
}

impl Shared {
    /// Where the profile of a part is, and whether it must be there.
    fn profile_of(&self, part: &Part) -> Option<(FileLocation, bool)> {
        // Nothing can be fetched before its time offline, and a plain archive has no chunks that a profile could name.
        if self.is_offline || !matches!(part.blob, Blob::Chunked(_)) {
            return None;
        }
        match self.config.profile.as_deref() {
            Some(NO_PROFILE) => None,
            Some(named) => match FileLocation::parse(OsStr::new(named)) {
                Ok(location) => Some((location, true)),
                Err(error) => {
                    tracing::warn!("profile: {error}");
                    None
                }
            },
            // A whole session, for a file that is hardly ever there.
            None if is_over_ssh(&part.location) => None,
            None => beside(&part.location, SUFFIX).map(|location| (location, false)),
        }
    }

    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.lock();
        tasks.retain(|task| !task.is_finished());
        tasks.push(self.runtime.spawn(work).abort_handle());
    }

    fn lock(&self) -> MutexGuard<'_, Vec<AbortHandle>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes a recording until it is over.
async fn write_regularly(watch: Arc<Watch>) {
    loop {
        tokio::time::sleep(FLUSH).await;
        let of_writer = Arc::clone(&watch);
        let written = tokio::task::spawn_blocking(move || match of_writer.recorder.get() {
            Some(recorder) => recorder.flush().map_err(|error| (recorder.path().to_owned(), error)),
            None => Ok(()),
        });
        if let Ok(Err((path, error))) = written.await {
            tracing::warn!("{}: the profile cannot be written and ends here: {error}", path.display());
            return;
        }
    }
}

/// What is to be done for one part. While it waits for its turn it does not hold the part itself, which may be closed meanwhile.
struct PartWork {
    live: Weak<Live>,
    at_work: AtWork,
    location: FileLocation,
    wishes: Vec<Wish>,
    settings: Arc<StoreSettings>,
    max_profile_chunks: usize,
    warming: Warming,
    watch: Arc<Watch>,
}

impl PartWork {
    async fn run(mut self, profile: Option<(FileLocation, bool)>, replays: Arc<Semaphore>, warmings: Arc<Semaphore>) {
        if let Some((location, is_named)) = profile {
            let _turn = replays.acquire().await;
            if let Some(profile) = self.read_profile(&location, is_named).await {
                match self.at_work.part(&self.live).map(|part| part.blob) {
                    Some(Blob::Chunked(blob)) => self.replay(&location, profile, &blob).await,
                    Some(Blob::File(_) | Blob::Remote(_)) => {}
                    None => return,
                }
            }
        }
        if !self.wishes.is_empty() {
            let _turn = warmings.acquire().await;
            if let Some(part) = self.at_work.part(&self.live) {
                self.warm(&part).await;
            }
        }
    }

    async fn read_profile(&self, location: &FileLocation, is_named: bool) -> Option<Profile> {
        let read = read_profile(location, &self.settings, self.max_profile_chunks).await;
        match (read, is_named) {
            (Ok(Some(CutProfile { profile, is_cut })), _) => {
                if is_cut {
                    let n = profile.touches.len();
                    tracing::warn!(
                        "{location}: only the first {n} chunks of the profile are replayed (give more memory)"
                    );
                }
                return Some(profile);
            }
            (Ok(None), true) => tracing::warn!("{location}: there is no such profile; going on without it"),
            (Ok(None), false) => {}
            (Err(error), true) => tracing::warn!("{error}; going on without the profile"),
            // One that only happens to lie there. But whoever put it there may wonder.
            (Err(error), false) => tracing::info!("{error}; going on without the profile"),
        }
        None
    }

    async fn replay(&self, location: &FileLocation, profile: Profile, blob: &ChunkedBlob) {
        let n_listed = profile.touches.len();
        // What is in the backing file is known once that is open.
        blob.settled_backing().await;
        let of_thread = blob.clone();
        let known = tokio::task::spawn_blocking(move || known_chunks(&profile, &of_thread)).await;
        let wants = match known {
            Ok(Ok(wants)) => wants,
            Ok(Err(error)) => return tracing::warn!("{error}; the profile is not replayed"),
            Err(_) => return,
        };
        tracing::info!("{location}: replaying {} of {n_listed} chunks", wants.len());
        let follow = Arc::new(Follow::new(&wants));
        let _following = Following::start(&self.watch, &follow);
        blob.cache().set_touches(Arc::<Watch>::clone(&self.watch));
        let memory_bytes = blob.cache().ahead().map_or(0, |budget| budget.max_bytes());
        let tally = Tally::default();
        // What is to be warmed, and can be, must not wait for readers who may never come.
        let is_last = self.wishes.is_empty() || warm::check(&Blob::Chunked(blob.clone())).await.is_err();
        let ahead = Ahead { memory_bytes, waits_for_readers: is_last };
        let is_whole = replay(blob, wants, &follow, ahead, &self.warming, &tally).await;
        let rest = if is_whole { "" } else { "; the rest of the profile is left to what is to be warmed" };
        self.conclude(&format!("{location}: replayed"), &tally, rest);
    }

    async fn warm(&self, part: &Part) {
        let location = &self.location;
        match warm::check(&part.blob).await {
            Ok(()) => {}
            Err(NotWarmable::Local) => return,
            Err(why) => return tracing::warn!("{location}: nothing is warmed: {why}"),
        }
        let tally = Tally::default();
        for wish in &self.wishes {
            let mut n_before = 0;
            loop {
                match warm::warm(part, std::slice::from_ref(wish), &self.warming, &tally).await {
                    Ok(_) => break,
                    Err(WishError::Unreadable { .. }) if n_before < N_RETRIES => {
                        n_before += 1;
                        tokio::time::sleep(FIRST_PAUSE * (1 << n_before.min(5))).await;
                    }
                    Err(error) => {
                        tracing::warn!("warming: {error}");
                        break;
                    }
                }
            }
        }
        let presence = match &part.blob {
            Blob::Chunked(blob) => blob.presence(),
            Blob::Remote(_) | Blob::File(_) => None,
        };
        let kept = presence.map(|presence| {
            let Presence { n_present, n_chunks, .. } = presence;
            format!("; {n_present} of {n_chunks} chunks are in its backing file")
        });
        self.conclude(&format!("{location}: warmed"), &tally, &kept.unwrap_or_default());
    }

    /// Says what came of it, and what is kept now, in one line.
    fn conclude(&self, what: &str, tally: &Tally, kept: &str) {
        let (n_fetched, n_present, n_failed) = (tally.n_fetched.get(), tally.n_present.get(), tally.n_failed.get());
        match tally.failures().first() {
            None => tracing::info!("{what}: {n_fetched} chunks fetched, {n_present} there already{kept}"),
            Some(why) => tracing::warn!("{what}, but {n_failed} chunks could not be had, the first one: {why}{kept}"),
        }
    }
}

/// A replay that is told what is touched, until this is dropped.
struct Following {
    watch: Arc<Watch>,
    follow: Arc<Follow>,
}

impl Following {
    fn start(watch: &Arc<Watch>, follow: &Arc<Follow>) -> Self {
        watch.follows.write().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(follow));
        Self { watch: Arc::clone(watch), follow: Arc::clone(follow) }
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        let mut follows = self.watch.follows.write().unwrap_or_else(PoisonError::into_inner);
        follows.retain(|follow| !Arc::ptr_eq(follow, &self.follow));
    }
}

fn is_over_ssh(location: &FileLocation) -> bool {
    matches!(location, FileLocation::Remote { directory: Location::Ssh(_), .. })
}
