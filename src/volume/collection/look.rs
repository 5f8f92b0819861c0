//! Looking: directories are listed when they are asked for and what was listed is too old; a file is looked at when its name is looked up.

use std::collections::VecDeque;
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use super::Shared;
use super::catalog::{Dir, Entry, Found, Gone, Stamp, joined};
use super::inode::{MAX_SPAN, NumberKind, directory_ino, first_base, is_directory};
use super::ledger::Given;
use super::names::EntryKind;
use super::part::{Facts, Part, is_same_file};
use super::peek::{PeekError, Peeked, peek};
use crate::digest::ChunkId;
use crate::store::location::FileLocation;
use crate::store::{FileInfo, Listed, local_files};
use crate::tree::ROOT_INO;
use crate::volume::open::OpenError;
use crate::volume::tree::attr_of;
use crate::volume::{Attr, EioSite, FileKind, VolumeError};

/// How long a directory that was listed before is waited for when it is listed again. What is known of it answers then.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often all directories are searched for a number that nobody knows.
const SEARCH_PAUSE: Duration = Duration::from_secs(5);

/// The most directories searched for it.
const MAX_SEARCHED: usize = 10_000;

/// Parts whose files are gone that are remembered by their numbers, beside those that are open; and directories that are gone.
const MAX_GONE: usize = 4096;

/// A name in a directory.
type Named = (Arc<Dir>, Vec<u8>, Arc<Entry>);

impl Shared {
    /// Sees to it that what was listed of a directory can be used.
    pub(super) async fn freshen(self: &Arc<Self>, dir: &Arc<Dir>) -> Result<(), VolumeError> {
        if let Some(watch) = &self.watch {
            watch.look();
        }
        // Late is only what somebody still lists.
        if dir.is_fresh(self.max_age) || dir.is_late() && dir.listing.try_lock().is_err() {
            return Ok(());
        }
        // In a task, so that the work is not lost when nobody waits for it.
        let listing = {
            let (shared, dir) = (Arc::clone(self), Arc::clone(dir));
            tokio::spawn(async move { shared.list(&dir).await })
        };
        let listed = match dir.is_listed() {
            true => match tokio::time::timeout(PATIENCE, listing).await {
                Ok(Ok(Err(error))) => {
                    tracing::debug!("{error}; using what was listed before");
                    return Ok(());
                }
                Ok(listed) => listed,
                Err(_) => {
                    dir.set_late(true);
                    return Ok(());
                }
            },
            false => listing.await,
        };
        match listed {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(unopened(&error)),
            Err(error) => Err(VolumeError::io(EioSite::Unopened, error.to_string())),
        }
    }

    /// Lists a directory, unless somebody has just done so.
    pub(super) async fn list(self: &Arc<Self>, dir: &Arc<Dir>) -> Result<(), OpenError> {
        let _guard = dir.listing.lock().await;
        if dir.is_fresh(self.max_age) {
            return Ok(());
        }
        let was_marked = dir.unmark();
        let found = self.find_entries(dir).await;
        dir.set_late(false);
        let found = match found {
            Ok(Some(found)) => found,
            // One below that is gone is empty until the one above tells.
            Ok(None) if dir.ino != ROOT_INO => Vec::new(),
            Ok(None) => {
                let error = OpenError::new(&self.place.to_string(), "there is no such directory");
                return self.not_listed(dir, was_marked, error);
            }
            Err(error) => return self.not_listed(dir, was_marked, error),
        };
        let Some(gone) = dir.take(found, self.keep_suffix, &self.names) else {
            let max = self.names.max_bytes() >> 20;
            let why = format!(
                "its names are too many beside those of the other directories ({max} MiB are held at the most)"
            );
            let error = OpenError::new(&self.place.below(&dir.path).to_string(), why);
            return self.not_listed(dir, was_marked, error);
        };
        self.leave(gone);
        Ok(())
    }

    /// Forgets what is not there any more, and what was below it.
    fn leave(&self, gone: Gone) {
        let mut waiting = vec![gone];
        while let Some(Gone { parts, directories }) = waiting.pop() {
            self.forget(parts);
            for path in directories {
                let ino = directory_ino(&path);
                let Some(dir) = self.dirs().get(&ino).cloned() else { continue };
                // If it is there again, it is another. Who is in it finds it empty.
                waiting.push(dir.empty(&self.names));
                if !dir.is_gone() {
                    dir.set_gone(true);
                    self.gone_dirs().push_back(ino);
                }
            }
        }
        loop {
            let oldest = {
                let mut gone = self.gone_dirs();
                if gone.len() <= MAX_GONE { None } else { gone.pop_front() }
            };
            let Some(ino) = oldest else { return };
            let mut dirs = self.dirs();
            if dirs.get(&ino).is_some_and(|dir| dir.is_gone()) {
                dirs.remove(&ino);
            }
        }
    }

    fn not_listed(&self, dir: &Dir, was_marked: bool, error: OpenError) -> Result<(), OpenError> {
        if was_marked {
            // What it was marked for was not seen.
            dir.mark();
        }
        if dir.is_listed() && dir.failed() {
            tracing::warn!("{error}; using what was listed before");
        }
        Err(error)
    }

    async fn find_entries(&self, dir: &Arc<Dir>) -> Result<Option<Vec<Found>>, OpenError> {
        let FileLocation::Local(root) = &self.place else {
            let below = String::from_utf8_lossy(&dir.path);
            let listed = self.sources().list(&self.place, &below).await?;
            return Ok(listed.map(|listed| listed.into_iter().filter_map(found_remote).collect()));
        };
        let FileLocation::Local(path) = self.place.below(&dir.path) else { return Ok(None) };
        let path = if dir.path.is_empty() { root.clone() } else { path };
        let shown = path.display().to_string();
        let watch = self.watch.clone().map(|watch| (watch, Arc::clone(dir)));
        let listing = tokio::task::spawn_blocking(move || {
            if let Some((watch, dir)) = watch {
                watch.add(&path, &dir);
            }
            let mtime = path.metadata().and_then(|metadata| metadata.modified());
            local_files::read_directory(&path).map(|listed| (listed, mtime.ok()))
        });
        match listing.await {
            Ok(Ok((listed, mtime))) => {
                dir.set_mtime(mtime);
                Ok(Some(listed.into_iter().filter_map(|(name, found)| found_local(name.into_vec(), found)).collect()))
            }
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Ok(Err(error)) => Err(OpenError::new(&shown, error)),
            Err(error) => Err(OpenError::new(&shown, error)),
        }
    }

    /// What is known of a file of a directory; `None` when it is not there any more.
    pub(super) async fn part(
        self: &Arc<Self>,
        dir: &Arc<Dir>,
        name: &[u8],
        entry: &Arc<Entry>,
    ) -> Result<Option<Arc<Part>>, VolumeError> {
        if let Some(part) = entry.known() {
            return Ok(Some(part));
        }
        // Who waits for another one's look does so without a thread, and for no longer than his own request.
        let guard = Arc::clone(&entry.looking).lock_owned().await;
        if let Some(part) = entry.known() {
            return Ok(Some(part));
        }
        let (shared, dir, name, entry) = (Arc::clone(self), Arc::clone(dir), name.to_vec(), Arc::clone(entry));
        let look = async move {
            let _guard = guard;
            shared.look_at(&dir, &name, &entry).await
        };
        aside(&self.asides, look).await
    }

    async fn look_at(&self, dir: &Dir, name: &[u8], entry: &Entry) -> Result<Option<Arc<Part>>, VolumeError> {
        let (sources, location) = (self.sources(), self.place.below(&entry.path));
        let is_listed = entry.stamp.version.is_some();
        let mut info = match &entry.stamp {
            Stamp { size: Some(size), version: Some(version), mtime } => {
                FileInfo { size: *size, version: Some(version.clone()), mtime: *mtime, has_ranges: true }
            }
            _ => match (sources.info(&location).await, entry.part()) {
                (Ok(Some(info)), _) => info,
                (Ok(None), _) => {
                    dir.mark();
                    return Ok(None);
                }
                (Err(error), Some(part)) => {
                    tracing::debug!("{error}; taking it for unchanged");
                    return Ok(Some(part));
                }
                (Err(error), None) => return Err(unopened(&error)),
            },
        };
        if let Some(part) = entry.part().filter(|part| part.is_of(&info)) {
            entry.set(&part);
            return Ok(Some(part));
        }
        let mut peeked = peek(&sources, &location, entry.kind, &info, &self.replies, self.must_open).await;
        if matches!(peeked, Err(PeekError::Changed)) && is_listed {
            // It was replaced since it was listed; or its server lists other versions than it sends.
            dir.mark();
            if let Ok(Some(now)) = sources.info(&location).await {
                peeked = peek(&sources, &location, entry.kind, &now, &self.replies, self.must_open).await;
                info = now;
            }
        }
        let peeked = match peeked {
            Ok(peeked) => peeked,
            Err(PeekError::Failed(error)) => return Err(unopened(&error)),
            Err(PeekError::Changed) => {
                // Whoever asks again finds what is there now; the kernel does so by itself.
                dir.mark();
                return Err(VolumeError::Stale { message: format!("{location} was just replaced") });
            }
        };
        // What was read may be what is kept of the file. If it is not that of `info`, only its place can say that it is there.
        if !is_same_file(&peeked.info, &info) {
            let now = sources.info(&location).await;
            if !matches!(now, Ok(Some(now)) if is_same_file(&peeked.info, &now)) {
                return Err(kept_another(&location));
            }
        }
        let part = self.number(dir, name, entry, location, peeked)?;
        self.forget(entry.set(&part).into_iter().collect());
        Ok(Some(part))
    }

    /// Gives a part its numbers: those it had before, if it is the same.
    fn number(
        &self,
        dir: &Dir,
        name: &[u8],
        entry: &Entry,
        location: FileLocation,
        peeked: Peeked,
    ) -> Result<Arc<Part>, VolumeError> {
        let Peeked { info, content, size, root } = peeked;
        let (kind, span) = number_kind(entry.kind, size);
        if span >= MAX_SPAN || i64::try_from(size).is_err() {
            let why = format!("{location}: it says that it has {size} bytes");
            return Err(VolumeError::io(EioSite::Unopened, why));
        }
        let attr = match &root {
            Some(root) => attr_of(root, None, &self.show),
            None => Attr {
                ino: 0,
                kind: FileKind::Regular,
                permissions: self.show.permissions(0o444),
                nlink: 1,
                uid: self.show.uid(0),
                gid: self.show.gid(0),
                size,
                mtime: info.mtime.unwrap_or(SystemTime::UNIX_EPOCH),
                rdev: 0,
            },
        };
        let version = version_text(&info, content.as_ref());
        let mut numbers = self.numbers();
        let is_known = |known: &Part| {
            let is_same = known.location == location && is_same_file(&known.info, &info);
            is_same && known.size == size && known.content == content
        };
        if let Some(known) = numbers.known(kind, &entry.path, &version, is_known) {
            // It was away, or another one was there meanwhile, and is there again.
            known.set_replaced(false);
            if known.is_gone() {
                known.set_gone(false);
                self.size_bytes.fetch_add(size, Ordering::Relaxed);
            }
            return Ok(Arc::clone(known));
        }
        let Some(base) = numbers.free_base(kind, &entry.path, &version, span) else {
            let why =
                format!("{location}: the archives here say that they are so large that no inode numbers are left");
            return Err(VolumeError::io(EioSite::Unopened, why));
        };
        let shown = joined(&dir.path, name);
        let parent_ino = dir.ino;
        let facts = Facts { path: entry.path.clone(), shown, parent_ino, location, info, content, size, attr };
        let part = Arc::new(Part::new(base, span, facts));
        numbers.insert(Arc::clone(&part));
        let given = given(&part);
        // Under the lock: nobody may hear of a number that is not written down. What a process before has written, or this one of a part
        // that was away, stands there already.
        if let Some(ledger) = &mut *self.ledger()
            && !numbers.is_reserved(&given)
            && ledger.write(&given)
        {
            numbers.reserve(vec![given]);
        }
        self.size_bytes.fetch_add(size, Ordering::Relaxed);
        Ok(part)
    }

    /// Takes note that the files of some parts are gone. They stay what they are for who has them open.
    fn forget(&self, parts: Vec<Arc<Part>>) {
        for part in parts {
            part.set_gone(true);
            self.size_bytes.fetch_sub(part.size, Ordering::Relaxed);
            let mut gone = self.gone();
            gone.push_back(part.base);
            if gone.len() > MAX_GONE
                && let Some(base) = gone.pop_front()
            {
                let mut numbers = self.numbers();
                if numbers.at(base).is_some_and(|part| part.is_gone()) && !self.open.has(base) {
                    numbers.remove(base);
                }
            }
        }
    }

    /// The directory at a path.
    pub(super) fn dir_at(&self, path: &[u8], parent_ino: u64) -> Arc<Dir> {
        let ino = directory_ino(path);
        let mut dirs = self.dirs();
        let dir = dirs.entry(ino).or_insert_with(|| Arc::new(Dir::new(path.to_vec(), ino, parent_ino)));
        dir.set_gone(false);
        Arc::clone(dir)
    }

    /// The directory of an entry that is one.
    pub(super) fn dir_of(&self, entry: &Entry, parent_ino: u64) -> Arc<Dir> {
        let dir = self.dir_at(&entry.path, parent_ino);
        if entry.stamp.mtime.is_some() {
            dir.set_mtime(entry.stamp.mtime);
        }
        dir
    }

    /// The directory with a number.
    pub(super) async fn dir(self: &Arc<Self>, ino: u64) -> Result<Arc<Dir>, VolumeError> {
        if let Some(dir) = self.dirs().get(&ino) {
            return Ok(Arc::clone(dir));
        }
        self.search(ino).await?;
        self.dirs().get(&ino).cloned().ok_or_else(|| stale(ino))
    }

    /// The part that has a number, and the number within it.
    pub(super) async fn part_of(self: &Arc<Self>, ino: u64) -> Result<(Arc<Part>, u64), VolumeError> {
        let find = || self.numbers().find(ino).map(|part| (Arc::clone(part), ino - part.base));
        if let Some(found) = find() {
            return Ok(found);
        }
        self.search(ino).await?;
        find().ok_or_else(|| stale(ino))
    }

    /// Looks at the file at a path that a process before has given numbers to.
    async fn look_again(self: &Arc<Self>, path: &[u8]) -> Result<(), VolumeError> {
        let mut dir = self.dir_at(b"", ROOT_INO);
        loop {
            self.freshen(&dir).await?;
            let leads_there = |entry: &Entry| match entry.kind {
                EntryKind::Directory => path.strip_prefix(&entry.path[..]).is_some_and(|rest| rest.starts_with(b"/")),
                _ => entry.path == path,
            };
            let all = dir.behind(0, usize::MAX);
            let Some((_, name, entry)) = all.into_iter().find(|(.., entry)| leads_there(entry)) else { return Ok(()) };
            if entry.kind != EntryKind::Directory {
                return self.part(&dir, &name, &entry).await.map(drop);
            }
            dir = self.dir_of(&entry, dir.ino);
        }
    }

    /// Looks through all directories for whatever has a number, as after this process has taken the mount over from another one.
    async fn search(self: &Arc<Self>, ino: u64) -> Result<(), VolumeError> {
        let is_known = || match is_directory(ino) {
            true => self.dirs().contains_key(&ino),
            false => self.numbers().find(ino).is_some(),
        };
        // Each file for itself: one that cannot be opened for a long time holds up nobody else.
        let was_given = self.numbers().was_given(ino).map(|given| given.path.clone());
        if let Some(path) = was_given {
            self.look_again(&path).await?;
            return if is_known() { Ok(()) } else { Err(stale(ino)) };
        }
        let mut last_search = self.last_search.lock().await;
        if is_known() {
            return Ok(());
        }
        if last_search.is_some_and(|at| at.elapsed() < SEARCH_PAUSE) {
            return Err(stale(ino));
        }
        let mut nearest: Option<(u64, Named)> = None;
        let mut waiting = VecDeque::from([self.dir_at(b"", ROOT_INO)]);
        let mut n_searched = 0;
        while let Some(dir) = waiting.pop_front()
            && n_searched < MAX_SEARCHED
        {
            n_searched += 1;
            if let Err(error) = self.freshen(&dir).await {
                tracing::debug!("{error}");
                continue;
            }
            for (_, name, entry) in dir.behind(0, usize::MAX) {
                if entry.kind == EntryKind::Directory {
                    waiting.push_back(self.dir_of(&entry, dir.ino));
                    continue;
                }
                if is_directory(ino) {
                    continue;
                }
                let base = match (&entry.stamp.version, entry.stamp.size) {
                    (Some(version), Some(_)) => first_base(number_kind(entry.kind, 0).0, &entry.path, &version.0),
                    _ => match self.part(&dir, &name, &entry).await {
                        Ok(Some(part)) => part.base,
                        Ok(None) | Err(_) => continue,
                    },
                };
                if base < ino && nearest.as_ref().is_none_or(|(nearest, ..)| *nearest < base) {
                    nearest = Some((base, (Arc::clone(&dir), name, entry)));
                }
            }
        }
        if let Some((_, (dir, name, entry))) = nearest {
            self.part(&dir, &name, &entry).await?;
        }
        if !is_known() {
            *last_search = Some(Instant::now());
        }
        Ok(())
    }
}

/// Does work that may open files and stores on a thread that may block, to its end, whether or not somebody still waits for it. `turns` are
/// far fewer than there are such threads: the work itself needs some.
pub(super) async fn aside<T: Send + 'static>(
    turns: &Arc<Semaphore>,
    work: impl Future<Output = Result<T, VolumeError>> + Send + 'static,
) -> Result<T, VolumeError> {
    let turn = Arc::clone(turns).acquire_owned().await;
    let done = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        Handle::current().block_on(work)
    });
    done.await.unwrap_or_else(|error| Err(VolumeError::io(EioSite::Panic, error.to_string())))
}

/// The attributes of an entry that was not looked at: its type, and the number it will have if that is known, else one that nothing has.
pub(super) fn unknown_attr(entry: &Entry) -> Attr {
    let (kind, _) = number_kind(entry.kind, 0);
    let version = entry.stamp.version.as_ref().map_or("", |version| version.0.as_str());
    Attr {
        ino: first_base(kind, &entry.path, version) + 1,
        kind: if entry.kind == EntryKind::Image { FileKind::Regular } else { FileKind::Directory },
        // Nobody may do anything with it before it is known.
        permissions: 0,
        nlink: 1,
        uid: 0,
        gid: 0,
        size: 0,
        mtime: SystemTime::UNIX_EPOCH,
        rdev: 0,
    }
}

pub(super) fn unopened(error: &OpenError) -> VolumeError {
    VolumeError::io(EioSite::Unopened, error.to_string())
}

fn stale(ino: u64) -> VolumeError {
    VolumeError::Stale { message: format!("number {ino} belongs to a file that was removed or replaced") }
}

/// How a part of a kind is numbered, and how many numbers it needs for so many bytes.
fn number_kind(kind: EntryKind, size: u64) -> (NumberKind, u64) {
    match kind {
        EntryKind::Directory => (NumberKind::Directory, 1),
        EntryKind::Image => (NumberKind::Image, 1),
        EntryKind::TreeIndex | EntryKind::Archive => (NumberKind::Tree, size.saturating_add(1)),
    }
}

/// The version as it goes into the numbers.
fn version_text(info: &FileInfo, content: Option<&ChunkId>) -> String {
    match (&info.version, content) {
        (Some(version), _) => version.0.clone(),
        (None, Some(content)) => content.to_hex(),
        (None, None) => format!("{} bytes", info.size),
    }
}

/// The numbers of a part, to be written down.
pub(super) fn given(part: &Part) -> Given {
    let version = version_text(&part.info, part.content.as_ref());
    Given { base: part.base, span: part.span, path: part.path.clone(), version }
}

/// What was read is what is kept of a file, and its place has another one by now.
pub(super) fn kept_another(location: &FileLocation) -> VolumeError {
    let why = format!(
        "{location}: what can be read of it, from its place or the cache, is another version than its place tells of"
    );
    VolumeError::io(EioSite::Unopened, why)
}

fn found_remote(listed: Listed) -> Option<Found> {
    let Listed { name, is_directory, size, mtime, version } = listed;
    let kind = EntryKind::of(name.as_bytes(), is_directory)?;
    Some(Found { name: name.into_bytes(), kind, stamp: Stamp { size, mtime, version } })
}

fn found_local(name: Vec<u8>, found: local_files::Found) -> Option<Found> {
    let (is_directory, stamp) = match found {
        local_files::Found::Directory { mtime } => (true, Stamp { mtime, ..Stamp::default() }),
        local_files::Found::File(info) => {
            (false, Stamp { size: Some(info.size), mtime: info.mtime, version: info.version })
        }
    };
    let kind = EntryKind::of(&name, is_directory)?;
    Some(Found { name, kind, stamp })
}
