//! Directories for tests that vanish afterwards, even with mounts, immutable files or closed directories inside.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::mounted;

/// A directory on the disk that holds the build (so that it has xattrs, ACLs and devices, which a tmpfs may not have),
/// removed when dropped.
#[derive(Debug)]
pub struct Scratch {
    dir: Option<tempfile::TempDir>,
    path: PathBuf,
}

impl Scratch {
    /// A new empty directory.
    pub fn new() -> Self {
        Self::new_in(Path::new(env!("CARGO_TARGET_TMPDIR")))
    }

    /// One that other users can be let into: the directory of the build may be closed to them.
    pub fn new_for_all() -> Self {
        Self::new_in(&std::env::temp_dir())
    }

    fn new_in(parent: &Path) -> Self {
        let dir = tempfile::Builder::new().prefix("caifs-").tempdir_in(parent);
        let dir = dir.expect("a directory for temporary files takes another");
        let path = dir.path().canonicalize().expect("the directory just made has a path");
        Self { dir: Some(dir), path }
    }

    /// A new empty directory inside this one.
    pub fn dir(&self, name: &str) -> PathBuf {
        let path = self.path.join(name);
        std::fs::create_dir(&path).unwrap_or_else(|error| panic!("cannot make {}: {error}", path.display()));
        path
    }

    /// A file inside this directory.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path.join(name);
        std::fs::write(&path, content).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
        path
    }
}

impl Deref for Scratch {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A removal that ran into a mount would read, and could delete, what is mounted there.
        for mountpoint in mounted::mountpoints_under(&self.path) {
            mounted::unmount(&mountpoint);
        }
        let Some(dir) = self.dir.take() else { return };
        if dir.close().is_ok() {
            return;
        }
        // Immutable and append-only files can only be removed after their flags.
        let _ = Command::new("chattr")
            .args(["-R", "-f", "-i", "-a"])
            .arg(&self.path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        let removed = std::fs::remove_dir_all(&self.path);
        if let (Err(error), false) = (&removed, std::thread::panicking()) {
            panic!("cannot remove {}: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_vanishes_with_what_is_in_it() {
        let scratch = Scratch::new();
        let path = scratch.to_owned();
        scratch.file("file", "content");
        std::fs::create_dir(scratch.dir("dir").join("inner")).expect("made");
        drop(scratch);
        assert!(!path.exists());
    }
}
