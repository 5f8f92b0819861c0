//! Recording a profile: which chunks are touched first, in which order, and when.
//!
//! While a mount lives, its profile grows in `FILE.part`; when it ends, that becomes `FILE`. A process that was killed, or has left its mount to
//! the next one, leaves `FILE.part`, which is a profile of what was read until a second before; the next recording goes on with it. The format
//! is [`crate::format::profile`]'s.
//!
//! Invariant: what a recording holds in memory is bounded by [`MAX_PROFILE_CHUNKS`]; it ends there.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::cache::Touches;
use crate::digest::ChunkId;
use crate::format::profile::{HEADER, MAX_PROFILE_BYTES, MAX_PROFILE_CHUNKS, Profile, Touch};

/// How often what was touched is written.
pub const FLUSH: Duration = Duration::from_secs(1);

/// Mode of the file, before the umask.
const FILE_MODE: u32 = 0o644;

/// A recording.
#[derive(Debug)]
pub struct Recorder {
    path: PathBuf,
    part_path: PathBuf,
    started: Instant,
    /// How long it took before, in milliseconds.
    ms_before: u64,
    /// Never held over I/O.
    touched: Mutex<Touched>,
    /// `None` when it is over. Held over writing, so only by those who write; `touched` is taken under it.
    /// Locked as long as it is open.
    file: Mutex<Option<Flock<File>>>,
}

#[derive(Debug, Default)]
struct Touched {
    /// The first bytes of each id: enough to tell ids apart, since they are digests.
    met: HashSet<u64>,
    /// Lines that are not written yet.
    lines: String,
    is_full: bool,
}

impl Recorder {
    /// Begins a recording that becomes `path` at its end, or goes on with one that did not come to its end.
    ///
    /// # Errors
    /// The file beside it cannot be made or read.
    pub fn start(path: &Path) -> io::Result<Self> {
        let mut part_path = OsString::from(path);
        part_path.push(".part");
        let part_path = PathBuf::from(part_path);
        // A file of another user in a directory for everybody is not written through.
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).custom_flags(libc::O_NOFOLLOW).mode(FILE_MODE);
        let file = options.open(&part_path)?;
        let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            Errno::EWOULDBLOCK => io::Error::other("another mount is recording it"),
            errno => errno.into(),
        })?;
        let before = go_on(&mut file)?;
        let ms_before = before.touches.last().map_or(0, |touch| touch.ms);
        let mut touched = Touched::default();
        touched.met.extend(before.touches.iter().map(|touch| touch.id.prefix()));
        touched.is_full = touched.met.len() >= MAX_PROFILE_CHUNKS;
        Ok(Self {
            path: path.to_owned(),
            part_path,
            started: Instant::now(),
            ms_before,
            touched: Mutex::new(touched),
            file: Mutex::new(Some(file)),
        })
    }

    /// Writes what was touched since the last time. Blocks on the disk.
    ///
    /// # Errors
    /// It cannot be written; the recording is over then.
    pub fn flush(&self) -> io::Result<()> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(open) = file.as_mut() else { return Ok(()) };
        let lines = std::mem::take(&mut self.lock().lines);
        let written = open.write_all(lines.as_bytes());
        if written.is_err() {
            *file = None;
            self.lock().is_full = true;
        }
        written
    }

    /// Ends the recording: writes the rest and puts the file into its place. Blocks on the disk.
    ///
    /// # Errors
    /// It cannot be written or put into its place.
    pub fn finish(&self) -> io::Result<()> {
        self.flush()?;
        let file = self.file.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(file) = file else { return Ok(()) };
        self.lock().is_full = true;
        file.sync_all()?;
        std::fs::rename(&self.part_path, &self.path)
    }

    /// The file that it becomes.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn lock(&self) -> MutexGuard<'_, Touched> {
        self.touched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an earlier recording has left in its file, which is then ready for more: whole lines only. What is no profile is taken away.
fn go_on(file: &mut File) -> io::Result<Profile> {
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut bytes = Vec::new();
    (&*file).take(MAX_PROFILE_BYTES).read_to_end(&mut bytes)?;
    let n_whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
    let before = Profile::parse(&bytes[..n_whole]).ok();
    file.set_len(if before.is_some() { n_whole as u64 } else { 0 })?;
    file.seek(SeekFrom::End(0))?;
    if before.is_none() {
        file.write_all(format!("{HEADER}\n").as_bytes())?;
    }
    Ok(before.unwrap_or_default())
}

impl Touches for Recorder {
    fn touched(&self, id: ChunkId) {
        let key = id.prefix();
        let mut touched = self.lock();
        if touched.is_full || !touched.met.insert(key) {
            return;
        }
        let ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_add(self.ms_before);
        Touch { ms, id }.write_line(&mut touched.lines);
        if touched.met.len() >= MAX_PROFILE_CHUNKS {
            touched.is_full = true;
            touched.met = HashSet::new();
            tracing::info!("{}: the profile is full with {MAX_PROFILE_CHUNKS} chunks", self.path.display());
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::digest::CHUNK_ID_BYTES;
    use crate::format::profile::Profile;

    fn ids(path: &Path) -> Vec<u8> {
        let profile = Profile::parse(&std::fs::read(path).unwrap()).unwrap();
        assert!(profile.touches.is_sorted_by_key(|touch| touch.ms));
        profile.touches.iter().map(|touch| touch.id.0[0]).collect()
    }

    #[test]
    fn first_touches_are_written_in_order_and_appear_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let (path, part) = (dir.path().join("p"), dir.path().join("p.part"));
        std::fs::write(&path, "an older one").unwrap();
        let recorder = Recorder::start(&path).unwrap();
        let touch = |n: u8| recorder.touched(ChunkId([n; CHUNK_ID_BYTES]));
        [5, 3, 5, 9].into_iter().for_each(touch);
        recorder.flush().unwrap();
        assert_eq!(ids(&part), [5, 3, 9], "what a kill leaves");
        assert_eq!(std::fs::read(&path).unwrap(), b"an older one");
        [3, 1].into_iter().for_each(touch);
        recorder.finish().unwrap();
        assert_eq!(ids(&path), [5, 3, 9, 1]);
        assert!(!part.exists());
        touch(2);
        recorder.finish().unwrap();
        assert_eq!(ids(&path), [5, 3, 9, 1], "it is over");
    }

    #[test]
    fn two_do_not_record_into_one_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p");
        let first = Recorder::start(&path).unwrap();
        first.touched(ChunkId([5; CHUNK_ID_BYTES]));
        assert_eq!(Recorder::start(&path).unwrap_err().to_string(), "another mount is recording it");
        first.finish().unwrap();
        assert_eq!(ids(&path), [5]);
        Recorder::start(&path).unwrap().finish().unwrap();
    }

    #[test]
    fn what_was_not_ended_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let (path, part) = (dir.path().join("p"), dir.path().join("p.part"));
        let touch = |recorder: &Recorder, n: u8| recorder.touched(ChunkId([n; CHUNK_ID_BYTES]));
        let killed = Recorder::start(&path).unwrap();
        [5, 3].into_iter().for_each(|n| touch(&killed, n));
        killed.flush().unwrap();
        drop(killed);
        let written = std::fs::read(&part).unwrap();
        // Torn in the middle of a line, too.
        for torn in [&b""[..], b"17 00ff"] {
            std::fs::write(&part, [&written[..], torn].concat()).unwrap();
            let next = Recorder::start(&path).unwrap();
            [3, 7].into_iter().for_each(|n| touch(&next, n));
            next.finish().unwrap();
            assert_eq!(ids(&path), [5, 3, 7]);
        }
        std::fs::write(&part, "what is no profile\n").unwrap();
        let anew = Recorder::start(&path).unwrap();
        touch(&anew, 1);
        anew.finish().unwrap();
        assert_eq!(ids(&path), [1]);
        assert!(nix::unistd::mkfifo(&part, nix::sys::stat::Mode::S_IRWXU).is_ok());
        assert!(Recorder::start(&path).is_err(), "it does not wait for a writer");
    }

    #[test]
    fn a_place_that_cannot_be_written_is_an_error_at_once() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Recorder::start(&dir.path().join("no/such/p")).is_err());
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("q.part")).unwrap();
        assert!(Recorder::start(&dir.path().join("q")).is_err());
    }
}
