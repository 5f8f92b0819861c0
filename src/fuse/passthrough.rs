//! Files that the kernel reads itself, from a complete local copy.
//!
//! The kernel has rules (fs/fuse/iomode.c), and answers an open that breaks them with EIO: as long as a file is open through its cache it
//! cannot be opened for passthrough, and as long as it is open for passthrough every further open must be, with the same backing id. A file
//! that was opened when its copy was not complete is therefore opened through the cache by all, until nobody has it open.
//!
//! It tells us of an open's end after it has counted it. It does not tell us when the opener was killed before our answer came; such a
//! file may be taken for open for ever, and is read through the cache (or keeps its id) until the mount ends. That is no fault.
//!
//! Invariant: an open is counted before it is answered, under the lock that it was decided under, so that no answer breaks the rules.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::{Mutex, PoisonError};

use fuser::{BackingId, Errno, FileHandle, FopenFlags, InitFlags, KernelConfig, ReplyOpen};

use crate::report::Report;
use crate::volume::Volume;

/// File systems between the file and the disk: the copy must lie on one that is not stacked itself, and another file system may
/// still be laid over the mount.
const MAX_STACK_DEPTH: u32 = 1;

/// The handle of what is open through the kernel's cache.
const CACHED: FileHandle = FileHandle(0);

/// The handle of what the kernel reads itself.
const PASSED: FileHandle = FileHandle(1);

/// How files are opened.
#[derive(Debug)]
pub(super) struct Opens {
    /// The kernel goes without OPEN once it is told ENOSYS.
    can_go_without: bool,
    passthrough: Option<Passthrough>,
}

/// What has to be remembered of open files.
#[derive(Debug)]
struct Passthrough {
    /// It was asked for, so that it is worth a line when it cannot be.
    is_wanted: bool,
    /// Held while an open is answered, which waits for nobody.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    files: HashMap<u64, Open>,
    /// The kernel does not let us.
    is_refused: bool,
}

/// A file that is open.
#[derive(Debug, Default)]
struct Open {
    n_cached: u64,
    n_passed: u64,
    /// What the passed ones are read from; as long as there are any.
    id: Option<BackingId>,
    /// The copy cannot be used.
    is_hopeless: bool,
}

impl Opens {
    /// Asks the kernel for what it needs. `wanted` as [`crate::config::KeepConfig::passthrough`].
    pub(super) fn negotiate(volume: &dyn Volume, wanted: Option<bool>, config: &mut KernelConfig) -> Self {
        let can_go_without = config.add_capabilities(InitFlags::FUSE_NO_OPEN_SUPPORT).is_ok();
        let is_wanted = wanted == Some(true);
        if !volume.has_backing() || wanted == Some(false) {
            return Self { can_go_without, passthrough: None };
        }
        let is_granted = config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
            && config.set_max_stack_depth(MAX_STACK_DEPTH).is_ok();
        if !is_granted && is_wanted {
            tracing::warn!("passthrough: this kernel cannot (6.9 or later is needed); files are read through us");
        }
        let passthrough = is_granted.then(|| Passthrough { is_wanted, state: Mutex::default() });
        Self { can_go_without, passthrough }
    }

    /// What is known when the kernel has said nothing.
    pub(super) fn unknown() -> Self {
        Self { can_go_without: false, passthrough: None }
    }

    /// Answers an open.
    pub(super) fn open(&self, volume: &dyn Volume, ino: u64, reply: ReplyOpen, report: &Report) {
        let Some(passthrough) = &self.passthrough else { return self.open_without(reply) };
        let mut state = passthrough.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.is_refused && self.can_go_without {
            drop(state);
            return self.open_without(reply);
        }
        let mut is_refused = state.is_refused;
        let file = state.files.entry(ino).or_default();
        if file.id.is_none() && file.n_cached == 0 && !file.is_hopeless && !is_refused {
            file.id = volume.backing_file(ino).and_then(|copy| match id_of(&copy, &reply) {
                Ok(id) => Some(id),
                Err(error) => {
                    passthrough.tell(&error);
                    file.is_hopeless = true;
                    is_refused = error.raw_os_error() == Some(libc::EPERM);
                    None
                }
            });
        }
        match &file.id {
            Some(id) => {
                file.n_passed += 1;
                report.n_passthrough_opens.add(1);
                reply.opened_passthrough(PASSED, FopenFlags::empty(), id);
            }
            None => {
                file.n_cached += 1;
                reply.opened(CACHED, FopenFlags::FOPEN_KEEP_CACHE);
            }
        }
        state.is_refused = is_refused;
    }

    fn open_without(&self, reply: ReplyOpen) {
        match self.can_go_without {
            true => reply.error(Errno::ENOSYS),
            false => reply.opened(CACHED, FopenFlags::FOPEN_KEEP_CACHE),
        }
    }

    /// Hears that a file was closed.
    pub(super) fn release(&self, ino: u64, handle: FileHandle) {
        let Some(passthrough) = &self.passthrough else { return };
        let mut state = passthrough.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = state.files.get_mut(&ino) else { return };
        let count = if handle == PASSED { &mut file.n_passed } else { &mut file.n_cached };
        *count = count.saturating_sub(1);
        if file.n_passed == 0 {
            file.id = None;
        }
        if file.n_passed + file.n_cached == 0 && !file.is_hopeless {
            state.files.remove(&ino);
        }
    }
}

impl Passthrough {
    /// Says why the kernel cannot read a file itself.
    fn tell(&self, error: &io::Error) {
        let why = match error.raw_os_error() {
            Some(libc::EPERM) => "only root may let it".to_owned(),
            Some(libc::ELOOP) => "the backing file lies on a stacked file system".to_owned(),
            Some(libc::EOPNOTSUPP) => "the file system of the backing file cannot".to_owned(),
            _ => error.to_string(),
        };
        match self.is_wanted {
            true => tracing::warn!("passthrough: the kernel does not read the file itself: {why}"),
            false => tracing::debug!("passthrough: the kernel does not read the file itself: {why}"),
        }
    }
}

fn id_of(copy: &File, reply: &ReplyOpen) -> io::Result<BackingId> {
    reply.open_backing(copy)
}
