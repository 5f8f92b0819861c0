//! Directories of a collection: what was listed of them, and what has changed when they are listed again.
//!
//! Invariants: an entry whose file is the same as before stays the same value, with all that is known of it; one whose file was replaced
//! is a new one; the place of an entry in a listing never changes, so that a reader who goes on after a change misses nothing that was
//! there all the time, and sees nothing twice; all listings of a mount together take no more than their room ([`NameRoom`]).

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::names::{EntryKind, shown_names};
use super::part::Part;
use crate::store::FileVersion;

/// How soon a directory that is known to have changed is listed again when that failed.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// What a name takes beside the letters of its path: its entry, and what is known of it once it was looked at.
const ENTRY_BYTES: usize = 768;

/// How often the letters of a path are held.
const N_PATHS: usize = 4;

/// The room that all listings of a mount have together.
#[derive(Debug)]
pub(super) struct NameRoom {
    max_bytes: usize,
    /// Never held over I/O or await.
    n_bytes: Mutex<usize>,
}

impl NameRoom {
    /// An empty one.
    pub(super) fn new(max_bytes: usize) -> Self {
        Self { max_bytes, n_bytes: Mutex::new(0) }
    }

    /// How much it has.
    pub(super) fn max_bytes(&self) -> usize {
        self.max_bytes
    }

    /// Takes so much in the place of what was taken before; `false` if that is too much.
    fn exchange(&self, before: usize, after: usize) -> bool {
        let mut n_bytes = self.n_bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = n_bytes.saturating_sub(before).saturating_add(after);
        let fits = after <= before || wanted <= self.max_bytes;
        if fits {
            *n_bytes = wanted;
        }
        fits
    }
}

/// What a listing told of a file. Two that are equal are taken for the same file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Stamp {
    /// Length in bytes.
    pub(super) size: Option<u64>,
    /// When it was modified.
    pub(super) mtime: Option<SystemTime>,
    /// Its version, where the listing tells the same as the file itself.
    pub(super) version: Option<FileVersion>,
}

impl Stamp {
    /// Whether a file that was replaced would have another stamp.
    fn tells_changes(&self) -> bool {
        self.version.is_some() || (self.size.is_some() && self.mtime.is_some())
    }
}

/// A name that was listed.
#[derive(Debug, Clone)]
pub(super) struct Found {
    /// The file's name.
    pub(super) name: Vec<u8>,
    /// What it is.
    pub(super) kind: EntryKind,
    /// What the listing told of it.
    pub(super) stamp: Stamp,
}

/// A file or directory of a directory.
#[derive(Debug)]
pub(super) struct Entry {
    /// The file's path below the place that is mounted.
    pub(super) path: Vec<u8>,
    /// What it is.
    pub(super) kind: EntryKind,
    /// What the listing told of it.
    pub(super) stamp: Stamp,
    /// What was found out about it. Never held over I/O or await.
    known: Mutex<Option<Arc<Part>>>,
    /// Whether it must be looked at again before that is used.
    is_stale: AtomicBool,
    /// Held by who looks at it.
    pub(super) looking: Arc<tokio::sync::Mutex<()>>,
}

impl Entry {
    /// What was found out about it, if that can be used.
    pub(super) fn known(&self) -> Option<Arc<Part>> {
        self.part().filter(|part| !self.is_stale.load(Ordering::Relaxed) && !part.is_replaced())
    }

    /// The same, be it old.
    pub(super) fn part(&self) -> Option<Arc<Part>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes note of what was found out; gives what was known before, if that was another.
    pub(super) fn set(&self, part: &Arc<Part>) -> Option<Arc<Part>> {
        let before = self.known.lock().unwrap_or_else(PoisonError::into_inner).replace(Arc::clone(part));
        self.is_stale.store(false, Ordering::Relaxed);
        before.filter(|before| !Arc::ptr_eq(before, part))
    }
}

/// A directory.
#[derive(Debug)]
pub(super) struct Dir {
    /// Its path below the place that is mounted, empty for the root.
    pub(super) path: Vec<u8>,
    pub(super) ino: u64,
    pub(super) parent_ino: u64,
    /// Never held over I/O or await.
    state: Mutex<State>,
    /// To be listed again.
    is_marked: AtomicBool,
    /// A listing takes longer than anybody waits for it.
    is_late: AtomicBool,
    /// The one above does not have it any more.
    is_gone: AtomicBool,
    /// Held by who lists it.
    pub(super) listing: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    /// By their places in a listing: the name that is shown, and the entry.
    entries: BTreeMap<u64, (Vec<u8>, Arc<Entry>)>,
    /// Places by the names that are shown.
    by_name: HashMap<Vec<u8>, u64>,
    next_place: u64,
    /// What the entries take of the room for names.
    n_bytes: usize,
    listed: Option<Instant>,
    /// When it could not be listed, if that is the last that is known.
    failed: Option<Instant>,
    /// When the newest of its files was modified.
    newest: Option<SystemTime>,
    /// When it was modified itself, if anybody tells.
    mtime: Option<SystemTime>,
}

impl Dir {
    pub(super) fn new(path: Vec<u8>, ino: u64, parent_ino: u64) -> Self {
        Self {
            path,
            ino,
            parent_ino,
            state: Mutex::default(),
            is_marked: AtomicBool::new(false),
            is_late: AtomicBool::new(false),
            is_gone: AtomicBool::new(false),
            listing: tokio::sync::Mutex::default(),
        }
    }

    /// Says that it must be listed before it is used again.
    pub(super) fn mark(&self) {
        self.is_marked.store(true, Ordering::Relaxed);
    }

    /// To be asked before it is listed: takes the mark away; whether there was one.
    pub(super) fn unmark(&self) -> bool {
        self.is_marked.swap(false, Ordering::Relaxed)
    }

    /// Whether what was listed can be used: it is not older than `max_age` (`None` for any age), and nothing is known to have changed; or
    /// it was just tried in vain to list it.
    pub(super) fn is_fresh(&self, max_age: Option<Duration>) -> bool {
        let (listed, failed) = {
            let state = self.lock();
            (state.listed, state.failed)
        };
        let is_settled = !self.is_marked.load(Ordering::Relaxed) || failed.is_some_and(|at| at.elapsed() < RETRY_PAUSE);
        is_settled && listed.is_some_and(|at| max_age.is_none_or(|max_age| at.elapsed() < max_age))
    }

    /// Takes note whether a listing of it is waited for in vain.
    pub(super) fn set_late(&self, is_late: bool) {
        self.is_late.store(is_late, Ordering::Relaxed);
    }

    /// Whether there is something to answer with and no use in waiting for better.
    pub(super) fn is_late(&self) -> bool {
        self.is_late.load(Ordering::Relaxed) && self.is_listed()
    }

    /// Whether it was ever listed.
    pub(super) fn is_listed(&self) -> bool {
        self.lock().listed.is_some()
    }

    /// Takes note that it could not be listed; whether that is news. What was known of it goes on being used for as long as if it had
    /// been listed.
    pub(super) fn failed(&self) -> bool {
        let mut state = self.lock();
        state.listed = state.listed.and(Some(Instant::now()));
        state.failed.replace(Instant::now()).is_none()
    }

    /// Hears whether the one above has it.
    pub(super) fn set_gone(&self, is_gone: bool) {
        self.is_gone.store(is_gone, Ordering::Relaxed);
    }

    /// Whether the one above has it no more.
    pub(super) fn is_gone(&self) -> bool {
        self.is_gone.load(Ordering::Relaxed)
    }

    /// Forgets what was listed, as of one that is gone; gives what was in it. If it comes back it is another, and its entries have new places.
    pub(super) fn empty(&self, room: &NameRoom) -> Gone {
        let mut state = self.lock();
        let mut gone = Gone::default();
        std::mem::take(&mut state.entries).values().for_each(|(_, entry)| gone.add(entry));
        state.by_name = HashMap::new();
        room.exchange(std::mem::take(&mut state.n_bytes), 0);
        state.listed = None;
        gone
    }

    /// Takes over what was listed; gives the parts and the directories that are not there any more. `None` if there is no room for so many
    /// names: what was known stays.
    pub(super) fn take(&self, mut found: Vec<Found>, keep_suffix: bool, room: &NameRoom) -> Option<Gone> {
        found.sort_by(|a, b| a.name.cmp(&b.name));
        found.dedup_by(|a, b| a.name == b.name);
        let names: Vec<(&[u8], EntryKind)> = found.iter().map(|found| (found.name.as_slice(), found.kind)).collect();
        let shown = shown_names(&names, keep_suffix);
        let newest = found.iter().filter_map(|found| found.stamp.mtime).max();
        let letters: usize = found.iter().map(|found| found.name.len() + self.path.len() + 1).sum();
        let n_bytes = found.len() * ENTRY_BYTES + letters * N_PATHS;
        let mut state = self.lock();
        if !room.exchange(state.n_bytes, n_bytes) {
            return None;
        }
        state.n_bytes = n_bytes;
        let mut before: HashMap<Vec<u8>, (u64, Arc<Entry>)> = std::mem::take(&mut state.entries)
            .into_iter()
            .map(|(place, (_, entry))| (entry.path.clone(), (place, entry)))
            .collect();
        let mut gone = Gone::default();
        state.by_name.clear();
        for (found, shown) in found.into_iter().zip(shown) {
            let path = joined(&self.path, &found.name);
            let (place, entry) = match before.remove(&path) {
                Some((place, entry)) if entry.kind == found.kind && entry.stamp == found.stamp => {
                    if !entry.stamp.tells_changes() && entry.kind != EntryKind::Directory {
                        entry.is_stale.store(true, Ordering::Relaxed);
                    }
                    (place, entry)
                }
                Some((place, entry)) => {
                    // A directory with another time is the same one.
                    if (entry.kind, found.kind) != (EntryKind::Directory, EntryKind::Directory) {
                        gone.add(&entry);
                    }
                    (place, Arc::new(Entry::new(path, found)))
                }
                None => {
                    state.next_place += 1;
                    (state.next_place, Arc::new(Entry::new(path, found)))
                }
            };
            state.by_name.insert(shown.clone(), place);
            state.entries.insert(place, (shown, entry));
        }
        before.values().for_each(|(_, entry)| gone.add(entry));
        (state.listed, state.failed, state.newest) = (Some(Instant::now()), None, newest);
        Some(gone)
    }

    /// The entry that is shown by a name.
    pub(super) fn get(&self, name: &[u8]) -> Option<Arc<Entry>> {
        let state = self.lock();
        let place = state.by_name.get(name)?;
        state.entries.get(place).map(|(_, entry)| Arc::clone(entry))
    }

    /// At most `max_entries` behind a place (0 for the start): place, name, entry.
    pub(super) fn behind(&self, place: u64, max_entries: usize) -> Vec<(u64, Vec<u8>, Arc<Entry>)> {
        let state = self.lock();
        let behind = state.entries.range(place.saturating_add(1)..).take(max_entries);
        behind.map(|(place, (name, entry))| (*place, name.clone(), Arc::clone(entry))).collect()
    }

    /// How many entries there are.
    pub(super) fn len(&self) -> usize {
        self.lock().entries.len()
    }

    /// When it was modified; where nobody tells, when the newest of its files was.
    pub(super) fn mtime(&self) -> SystemTime {
        let state = self.lock();
        state.mtime.or(state.newest).unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// Hears when it was modified.
    pub(super) fn set_mtime(&self, mtime: Option<SystemTime>) {
        self.lock().mtime = mtime;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    fn new(path: Vec<u8>, found: Found) -> Self {
        let (known, is_stale, looking) = (Mutex::default(), AtomicBool::new(false), Arc::default());
        Self { path, kind: found.kind, stamp: found.stamp, known, is_stale, looking }
    }
}

/// What is not there any more.
#[derive(Debug, Default)]
pub(super) struct Gone {
    pub(super) parts: Vec<Arc<Part>>,
    /// By their paths.
    pub(super) directories: Vec<Vec<u8>>,
}

impl Gone {
    fn add(&mut self, entry: &Entry) {
        self.parts.extend(entry.part());
        if entry.kind == EntryKind::Directory {
            self.directories.push(entry.path.clone());
        }
    }
}

/// The path of a name in a directory.
pub(super) fn joined(directory: &[u8], name: &[u8]) -> Vec<u8> {
    match directory.is_empty() {
        true => name.to_vec(),
        false => [directory, b"/", name].concat(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn found(name: &str, size: Option<u64>) -> Found {
        let stamp = Stamp { size, mtime: size.map(|_| SystemTime::UNIX_EPOCH), version: None };
        Found { name: name.into(), kind: EntryKind::of(name.as_bytes(), false).unwrap(), stamp }
    }

    fn names(dir: &Dir, place: u64, max: usize) -> Vec<(u64, String)> {
        let behind = dir.behind(place, max).into_iter();
        behind.map(|(place, name, _)| (place, String::from_utf8(name).unwrap())).collect()
    }

    fn take(dir: &Dir, found: Vec<Found>, keep_suffix: bool) -> Gone {
        dir.take(found, keep_suffix, &NameRoom::new(usize::MAX)).unwrap()
    }

    #[test]
    fn the_names_of_all_directories_stay_within_their_room() {
        let room = NameRoom::new(10 * (ENTRY_BYTES + 100));
        let some = |n: usize| (0..n).map(|i| found(&format!("{i}.caibx"), Some(1))).collect::<Vec<_>>();
        let (one, other) = (Dir::new(b"one".to_vec(), 5, 1), Dir::new(b"other".to_vec(), 6, 1));
        assert!(one.take(some(6), false, &room).is_some());
        assert!(other.take(some(6), false, &room).is_none() && !other.is_listed() && other.len() == 0);
        assert!(other.take(some(3), false, &room).is_some());
        assert!(one.take(some(9), false, &room).is_none() && one.len() == 6, "what was known stays");
        assert!(one.take(some(2), false, &room).is_some() && other.take(some(6), false, &room).is_some());
        let gone = other.empty(&room);
        assert!(gone.parts.is_empty() && other.len() == 0 && !other.is_listed());
        assert!(one.take(some(9), false, &room).is_some());
        assert_eq!(*room.n_bytes.lock().unwrap(), one.lock().n_bytes);
        // What was emptied has new places.
        one.take(some(2), false, &room).unwrap();
        other.take(some(6), false, &room).unwrap();
        assert_eq!(names(&other, 6, 9).len(), 6);
        // A long name counts by its letters.
        let long = found(&format!("{}.caibx", "x".repeat(60_000)), Some(1));
        assert!(one.take(vec![long], false, &room).is_none());
    }

    #[test]
    fn a_listing_goes_on_where_it_was_whatever_changes() {
        let dir = Dir::new(b"d".to_vec(), 5, 1);
        assert!(!dir.is_listed() && !dir.is_fresh(None));
        take(&dir, vec![found("b.caibx", Some(1)), found("a.caibx", Some(1)), found("c.caibx", Some(1))], false);
        assert!(
            dir.is_fresh(None) && dir.is_fresh(Some(Duration::from_secs(3600))) && !dir.is_fresh(Some(Duration::ZERO))
        );
        let first = names(&dir, 0, 2);
        assert_eq!(first, [(1, "a".into()), (2, "b".into())]);
        let a = dir.get(b"a").unwrap();
        assert_eq!(a.path, b"d/a.caibx");
        // One before the place where the reader is comes, one goes, one is replaced.
        let gone =
            take(&dir, vec![found("0.caibx", Some(1)), found("a.caibx", Some(1)), found("c.caibx", Some(2))], false);
        assert!(gone.parts.is_empty() && gone.directories.is_empty());
        assert_eq!(names(&dir, 2, 9), [(3, "c".into()), (4, "0".into())]);
        assert!(Arc::ptr_eq(&a, &dir.get(b"a").unwrap()));
        assert!(dir.get(b"b").is_none() && dir.get(b"a.caibx").is_none());
        dir.mark();
        assert!(!dir.is_fresh(None) && dir.is_listed());
        assert!(dir.unmark() && !dir.unmark());
        assert!(dir.is_fresh(None) && dir.failed() && !dir.failed());
        dir.mark();
        assert!(dir.is_fresh(None), "not tried again at once");
        std::thread::sleep(RETRY_PAUSE);
        assert!(!dir.is_fresh(None), "the change is not forgotten");
    }

    #[test]
    fn a_name_is_another_when_a_second_comes_and_its_file_is_the_same() {
        let dir = Dir::new(Vec::new(), 1, 1);
        take(&dir, vec![found("a.caibx", Some(1))], false);
        let image = dir.get(b"a").unwrap();
        take(&dir, vec![found("a.caibx", Some(1)), found("a.caidx", Some(1))], false);
        assert!(dir.get(b"a").is_none() && Arc::ptr_eq(&image, &dir.get(b"a.caibx").unwrap()));
    }

    #[test]
    fn what_a_listing_does_not_tell_is_looked_at_again() {
        let dir = Dir::new(Vec::new(), 1, 1);
        for (size, is_stale) in [(Some(1), false), (None, true)] {
            take(&dir, vec![found("a.caibx", size)], false);
            take(&dir, vec![found("a.caibx", size)], false);
            assert_eq!(dir.get(b"a").unwrap().is_stale.load(Ordering::Relaxed), is_stale);
        }
    }
}
