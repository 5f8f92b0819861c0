//! Where files are written before they move to their place: `.caifs/tmp/<pid>-<random>/`, one directory for each opened tier.
//!
//! The directory has a file `lock`, locked as long as its owner lives. Whoever opens the cache later takes the lock of a dead owner and
//! removes what it left.
//!
//! Invariant: a name in the cache never refers to a part of a file (short of a crash of the machine, which reading notices), and a
//! file that is there is not replaced unless that is asked for.

use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::Flock;

use super::open_shared;
use super::state::try_lock;

/// The name of the lock in a directory of temporary files.
const LOCK_NAME: &str = "lock";

/// How often a name may be taken, and how often a directory may vanish under a writer, before it is an error.
const MAX_TRIES: u32 = 8;

/// What to do when the place of a file is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taken {
    /// Leave what is there.
    Leave,
    /// Put the new file in its place.
    Replace,
}

/// A directory for temporary files that is ours as long as we live.
#[derive(Debug)]
pub(super) struct Workplace {
    path: PathBuf,
    next_name: AtomicU64,
    _lock: Flock<File>,
}

impl Workplace {
    /// Makes a directory in `tmp`, which exists.
    pub(super) fn make(tmp: &Path) -> io::Result<Self> {
        for attempt in 0..MAX_TRIES {
            let random = RandomState::new().hash_one(attempt);
            let path = tmp.join(format!("{}-{random:016x}", std::process::id()));
            make_directory(&path, 0o700)?;
            match open_lock(&path).and_then(try_lock) {
                // Somebody who took us for dead may have removed the directory between its making and the lock.
                Ok(Ok(lock)) if lock.metadata()?.nlink() > 0 => {
                    return Ok(Self { path, next_name: AtomicU64::new(0), _lock: lock });
                }
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other("no directory for temporary files can be made"))
    }

    /// A path for a file that is written elsewhere than here.
    pub(super) fn new_path(&self) -> PathBuf {
        self.path.join(self.next_name.fetch_add(1, Ordering::Relaxed).to_string())
    }

    /// Writes a file and moves it to its place; `false` when that was taken. The directory of `target` is made when it is missing.
    pub(super) fn write(&self, target: &Path, content: &[&[u8]], mode: u32, taken: Taken) -> io::Result<bool> {
        let temporary = Temporary(self.new_path());
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary.0)?;
        for part in content {
            file.write_all(part)?;
        }
        drop(file);
        let mut tries = 0;
        loop {
            match rename(&temporary.0, target, taken) {
                Ok(moved) => {
                    if moved == Moved::Renamed {
                        temporary.keep();
                    }
                    return Ok(true);
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists && taken == Taken::Leave => return Ok(false),
                // The directory is not there yet, or an eviction has just removed it.
                Err(error) if error.kind() == ErrorKind::NotFound && tries < MAX_TRIES => {
                    let Some(directory) = target.parent() else { return Err(error) };
                    make_directory(directory, 0o755)?;
                    tries += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for Workplace {
    fn drop(&mut self) {
        // Without the lock yet given up; what cannot be removed is left to whoever opens the cache next.
        remove_workplace(&self.path);
    }
}

/// Removes what dead owners left in `tmp`.
pub(super) fn remove_dead(tmp: &Path) -> io::Result<()> {
    for entry in fs::read_dir(tmp)? {
        let path = entry?.path();
        // Whatever cannot be opened or locked is not ours to remove.
        if let Ok(Ok(Ok(_lock))) = open_lock(&path).map(try_lock) {
            remove_workplace(&path);
        }
    }
    Ok(())
}

/// Removes the files of a workplace, the lock last, and the directory.
fn remove_workplace(path: &Path) {
    let Ok(entries) = fs::read_dir(path) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_name() != LOCK_NAME) {
        drop(fs::remove_file(entry.path()));
    }
    drop(fs::remove_file(path.join(LOCK_NAME)));
    drop(fs::remove_dir(path));
}

fn open_lock(directory: &Path) -> io::Result<File> {
    open_shared(&directory.join(LOCK_NAME))
}

/// Makes a directory unless it is there.
pub(super) fn make_directory(path: &Path, mode: u32) -> io::Result<()> {
    match fs::DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// A temporary file, removed unless it has found its place.
struct Temporary(PathBuf);

impl Temporary {
    fn keep(mut self) {
        self.0 = PathBuf::new();
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty() {
            // What cannot be removed is left to whoever opens the cache next.
            drop(fs::remove_file(&self.0));
        }
    }
}

/// How a file came to its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moved {
    /// It has its new name only.
    Renamed,
    /// It has both names.
    Linked,
}

fn rename(from: &Path, to: &Path, taken: Taken) -> io::Result<Moved> {
    if taken == Taken::Replace {
        return fs::rename(from, to).map(|()| Moved::Renamed);
    }
    #[cfg(target_env = "gnu")]
    {
        use nix::errno::Errno;
        use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
        match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
            Ok(()) => return Ok(Moved::Renamed),
            Err(Errno::EINVAL | Errno::ENOSYS) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    // A second name cannot replace anything either; the first goes with the temporary file.
    match fs::hard_link(from, to) {
        Err(error) if !matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::NotFound) => {
            fs::rename(from, to).map(|()| Moved::Renamed)
        }
        linked => linked.map(|()| Moved::Linked),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_dead_are_cleared_away_and_the_living_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let living = Workplace::make(dir.path()).unwrap();
        fs::write(living.path.join("5"), "being written").unwrap();
        for name in ["1-dead", "2-dead before it had a lock"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("1-dead/lock"), "").unwrap();
        fs::write(dir.path().join("1-dead/7"), "left").unwrap();
        remove_dead(dir.path()).unwrap();
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(left, std::slice::from_ref(&living.path));
        assert!(living.path.join("5").exists());
        drop(living);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_comes_to_its_place_whole_and_replaces_only_when_asked() {
        let dir = tempfile::tempdir().unwrap();
        let workplace = Workplace::make(dir.path()).unwrap();
        let target = dir.path().join("ab/file");
        let write = |content: &[u8], taken| workplace.write(&target, &[content], 0o600, taken).unwrap();
        assert!(write(b"one", Taken::Leave));
        assert!(!write(b"two", Taken::Leave));
        assert_eq!(fs::read(&target).unwrap(), b"one");
        assert!(write(b"three", Taken::Replace));
        assert_eq!(fs::read(&target).unwrap(), b"three");
        assert!(workplace.write(&dir.path().join("no/such/place"), &[b"x"], 0o600, Taken::Leave).is_err());
        assert_eq!(fs::read_dir(&workplace.path).unwrap().count(), 1, "only the lock");
    }
}
