//! What surrounds a mount: who started the process and watches it, what it left open, and what the process shall be.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::MountError;
use super::log::{self, Destination};
use super::notify::Manager;
use super::privileges::find_user;
use super::run::{MountRequest, Place};
use super::sandbox::SandboxPlan;
use super::{shown_source, takeover};
use crate::config::MountConfig;
use crate::report::Report;
use crate::store::location::FileLocation;
use crate::sys::descriptors::Inherited;

/// What surrounds a mount.
#[derive(Debug, Clone, Default)]
pub struct Service {
    /// The settings of the mount.
    pub config: MountConfig,
    /// What is mounted, whose files the process needs.
    pub location: Option<FileLocation>,
    /// What the process needs to open beside that.
    pub plan: SandboxPlan,
    /// Where the control socket will lie, if there is to be one.
    pub control_dir: Option<PathBuf>,
    /// The counters that the service manager hears of.
    pub report: Arc<Report>,
    /// The service manager.
    pub manager: Manager,
    /// Open files that came with the process.
    pub descriptors: Arc<Mutex<Descriptors>>,
}

/// Open files that came with the process.
#[derive(Debug, Default)]
pub struct Descriptors {
    /// Those that the service manager kept for us, with their names.
    pub kept: Vec<(String, OwnedFd)>,
    /// All others, which a process in the background closes.
    pub inherited: Inherited,
}

impl Descriptors {
    /// Lets go of a mount that the service manager kept for a process that cannot go on with it: who waits for it gets an error.
    pub fn give_up(self, manager: &Manager) {
        takeover::give_up(manager, self.kept);
    }
}

impl Service {
    /// Whether the service manager kept something that has not been taken yet.
    pub(super) fn has_kept(&self) -> bool {
        !self.descriptors().kept.is_empty()
    }

    /// What the service manager kept; the second time, nothing.
    pub(super) fn take_kept(&self) -> Vec<(String, OwnedFd)> {
        std::mem::take(&mut self.descriptors().kept)
    }

    /// Lets go of what the caller left open for us, in the background; in the foreground the caller may be waiting for its end.
    pub(super) fn leave_caller(&self, place: Place) {
        let mut inherited = std::mem::take(&mut self.descriptors().inherited);
        if place == Place::Foreground {
            inherited.leave_open();
        }
    }

    fn descriptors(&self) -> MutexGuard<'_, Descriptors> {
        self.descriptors.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Opens the log of a mount; `None` when it stays on standard error.
///
/// # Errors
/// The log that was asked for cannot be had.
pub(super) fn open_log(request: &MountRequest) -> Result<Option<Destination>, MountError> {
    let source = shown_source(&request.source).to_string_lossy().into_owned();
    let config = &request.service.config.service;
    let destination = match (&config.log, request.place) {
        (Some(wanted), _) => Destination::open(wanted, &source, &request.mountpoint)?,
        (None, Place::Background) => Destination::of_background(&source, &request.mountpoint),
        (None, Place::Foreground) => return Ok(None),
    };
    if let Some(user) = &config.setuid {
        let user = find_user(user)?;
        destination.give_to(user.uid.as_raw(), user.gid.as_raw())?;
    }
    match request.place {
        // Whoever watches a foreground process looks where he was told to.
        Place::Foreground => {
            log::switch(destination);
            Ok(None)
        }
        Place::Background => Ok(Some(destination)),
    }
}
