//! How many bytes the cache has, known to all its processes: a small file, read and written under its lock.
//!
//! A writer adds its bytes before it writes ([`StateFile::update`]) and takes them off when it could not; so a process killed in
//! between makes the total too high, never too low. The total is read from the disk anew by a walk, from time to time
//! (`evict.rs`): while one runs, writers add to [`State::since_bytes`] as well, and the total becomes what the walk counted and that.
//!
//! Invariant: the lock is held for two small system calls, and waited for a moment only: who does not get it goes without. The file is
//! not mapped, so that nobody can kill its readers by truncating it; a damaged one counts as "nothing known".

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::open_shared;

use crate::chunk::checksum::xxh64;

const MAGIC: &[u8; 8] = b"caifs-t1";

/// Magic, six numbers and a checksum.
const STATE_BYTES: usize = 64;

/// How often the lock is tried at once, and then with a pause: 100 ms in all. Its holder needs microseconds, unless it was stopped.
const N_SPINS: u32 = 50;
const N_PAUSES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(1);

/// What all processes know of a cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct State {
    /// Bytes in the cache, with what is about to be written; worth something only if `is_known`.
    pub total_bytes: u64,
    /// Bytes added since the walk began that runs now.
    pub since_bytes: u64,
    /// Which walk runs, or ran last.
    pub walk: u64,
    /// When the last walk ended, in seconds since 1970.
    pub counted_at: u64,
    /// Whether the total covers everything in the directory.
    pub is_known: bool,
    /// Whether a walk runs (or was killed).
    pub is_walking: bool,
}

impl State {
    fn to_bytes(self) -> [u8; STATE_BYTES] {
        let flags = u64::from(self.is_known) | u64::from(self.is_walking) << 1;
        let mut bytes = [0; STATE_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        let numbers = [self.total_bytes, self.since_bytes, self.walk, self.counted_at, flags, 0];
        for (field, number) in bytes[8..].chunks_exact_mut(8).zip(numbers) {
            field.copy_from_slice(&number.to_le_bytes());
        }
        let checksum = xxh64(0, &bytes[..STATE_BYTES - 8]);
        bytes[STATE_BYTES - 8..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// The state in these bytes; nothing is known when they are damaged.
    fn from_bytes(bytes: &[u8; STATE_BYTES]) -> Option<Self> {
        let number = |field: usize| bytes[8 * field..].first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        if &bytes[..8] != MAGIC || number(7) != xxh64(0, &bytes[..STATE_BYTES - 8]) {
            return None;
        }
        Some(Self {
            total_bytes: number(1),
            since_bytes: number(2),
            walk: number(3),
            counted_at: number(4),
            is_known: number(5) & 1 != 0,
            is_walking: number(5) & 2 != 0,
        })
    }
}

/// The file that has the [`State`].
#[derive(Debug)]
pub(super) struct StateFile {
    path: PathBuf,
    /// Held over the file's lock, which excludes other processes but not other threads. No other lock is taken under it.
    file: Mutex<Option<File>>,
}

impl StateFile {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, file: Mutex::new(None) }
    }

    /// Changes the state under the lock, and gives what `change` gives. The file is made if its directory is there.
    ///
    /// # Errors
    /// `WouldBlock` when another process holds the lock; what the file system answers.
    pub(super) fn update<R>(&self, change: impl FnOnce(&mut State) -> R) -> io::Result<R> {
        let mut slot = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        // An error drops the descriptor: the next caller opens what is at the path then.
        let file = match slot.take() {
            Some(file) => file,
            None => self.open()?,
        };
        let mut locked = lock(file)?;
        if locked.metadata()?.nlink() == 0 {
            // The cache was deleted, and perhaps made again by somebody else.
            locked = lock(self.open()?)?;
        }
        let before = read(&locked)?;
        let mut state = before.unwrap_or_default();
        let result = change(&mut state);
        if before != Some(state) {
            locked.write_all_at(&state.to_bytes(), 0)?;
        }
        *slot = locked.unlock().ok();
        Ok(result)
    }

    /// The state without the lock: for looking at it.
    pub(super) fn peek(&self) -> Option<State> {
        let slot = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        slot.as_ref().and_then(|file| read(file).ok()?)
    }

    fn open(&self) -> io::Result<File> {
        open_shared(&self.path)
    }
}

fn read(file: &File) -> io::Result<Option<State>> {
    let mut bytes = [0; STATE_BYTES];
    match file.read_exact_at(&mut bytes, 0) {
        Ok(()) => Ok(State::from_bytes(&bytes)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

/// Takes the lock of a file, trying for a moment.
fn lock(mut file: File) -> io::Result<Flock<File>> {
    for attempt in 0..N_SPINS + N_PAUSES {
        match try_lock(file)? {
            Ok(locked) => return Ok(locked),
            Err(same) => file = same,
        }
        match attempt < N_SPINS {
            true => std::thread::yield_now(),
            false => std::thread::sleep(PAUSE),
        }
    }
    Err(io::Error::new(io::ErrorKind::WouldBlock, "another process holds the lock of the cache's state"))
}

/// Takes the lock of a file, or gives the file back when somebody else has the lock.
pub(super) fn try_lock(file: File) -> io::Result<Result<Flock<File>, File>> {
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(locked) => Ok(Ok(locked)),
        Err((file, Errno::EWOULDBLOCK | Errno::EINTR)) => Ok(Err(file)),
        Err((_, errno)) => Err(errno.into()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_shared_and_survives() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let (one, two) = (StateFile::new(path.clone()), StateFile::new(path.clone()));
        assert_eq!(one.update(|state| *state).unwrap(), State::default());
        let wanted =
            State { total_bytes: 7, since_bytes: 3, walk: 9, counted_at: 11, is_known: true, is_walking: true };
        one.update(|state| *state = wanted).unwrap();
        assert_eq!(two.update(|state| *state).unwrap(), wanted);
        assert_eq!(one.peek(), Some(wanted));
        let threads: Vec<_> = [one, two]
            .into_iter()
            .map(|file| {
                std::thread::spawn(move || (0..500).all(|_| file.update(|state| state.total_bytes += 1).is_ok()))
            })
            .collect();
        assert!(threads.into_iter().all(|thread| thread.join().unwrap()));
        assert_eq!(StateFile::new(path).update(|state| state.total_bytes).unwrap(), 1007);
    }

    #[test]
    fn a_damaged_state_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let file = StateFile::new(path.clone());
        file.update(|state| *state = State { total_bytes: 1 << 40, is_known: true, ..State::default() }).unwrap();
        let right = std::fs::read(&path).unwrap();
        for at in 0..right.len() {
            let mut wrong = right.clone();
            wrong[at] ^= 4;
            std::fs::write(&path, &wrong).unwrap();
            assert_eq!(file.peek(), None, "byte {at}");
            std::fs::write(&path, &right[..at]).unwrap();
            assert_eq!(file.update(|state| *state).unwrap(), State::default(), "{at} bytes");
        }
    }

    #[test]
    fn a_deleted_state_begins_anew_and_a_held_lock_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let file = StateFile::new(path.clone());
        file.update(|state| state.is_known = true).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(!file.update(|state| state.is_known).unwrap());
        assert!(path.exists());
        let held = lock(File::open(&path).unwrap()).unwrap();
        assert_eq!(file.update(|_| ()).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(held);
        assert!(file.update(|_| ()).is_ok());
    }
}
