//! Changes of local directories, by inotify. Nothing waits for them: they are looked for whenever a directory is asked for something, and
//! mark it as to be listed again. Where there is no inotify (too many watches, a network file system), time alone does.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use super::catalog::Dir;

/// The watches of a mount.
#[derive(Debug)]
pub(super) struct Watch {
    inotify: Inotify,
    /// Never held over I/O or await.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    dirs: HashMap<WatchDescriptor, Weak<Dir>>,
    has_failed: bool,
}

impl Watch {
    /// Begins to watch nothing; `None` where the system does not let us.
    pub(super) fn new() -> Option<Self> {
        match Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC) {
            Ok(inotify) => Some(Self { inotify, state: Mutex::default() }),
            Err(error) => {
                tracing::warn!("no inotify ({error}): changes of the directory are seen after poll-interval");
                None
            }
        }
    }

    /// Watches a directory from now on. To be asked before it is listed.
    pub(super) fn add(&self, path: &Path, dir: &Arc<Dir>) {
        let what = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        match self.inotify.add_watch(path, what) {
            // The same directory has the same number again.
            Ok(descriptor) => drop(self.lock().dirs.insert(descriptor, Arc::downgrade(dir))),
            Err(error) => {
                if !std::mem::replace(&mut self.lock().has_failed, true) {
                    let path = path.display();
                    tracing::warn!("{path}: no inotify ({error}): its changes are seen after poll-interval");
                }
            }
        }
    }

    /// Marks the directories that were changed.
    pub(super) fn look(&self) {
        // EAGAIN when nothing has happened; anything else is as good, since time marks them as well.
        while let Ok(events) = self.inotify.read_events() {
            let mut state = self.lock();
            for event in events {
                if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                    state.dirs.values().filter_map(Weak::upgrade).for_each(|dir| dir.mark());
                }
                if let Some(dir) = state.dirs.get(&event.wd).and_then(Weak::upgrade) {
                    dir.mark();
                }
                if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                    state.dirs.remove(&event.wd);
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
