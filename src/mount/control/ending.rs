//! The end of the process that serves a mount, for who unmounts it: it writes what it still has after the mount is gone.
//!
//! Invariant: no wait is longer than its caller allows.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Pid;

use super::client::{connect, process_in_words};
use super::paths::mounts_of;
use super::place::Place;
use crate::mount::abort::connection;
use crate::mount::table::{MountEntry, MountId, MountTable};
use crate::sys;

/// The process that serves a mount, and where else it does, as it is now, for [`Serving::wait`]. What is there later under the number of the mount may be
/// another one, which got it when it was free.
#[derive(Debug)]
pub struct Serving {
    elsewhere: Vec<MountId>,
    minor: u32,
    connection: Option<FileId>,
    number: Pid,
    process: OwnedFd,
}

/// Device and inode of a file.
type FileId = (u64, u64);

impl Serving {
    /// The process behind a mount; `None` when it has no control socket, does not answer there, is out of our sight, or cannot be watched.
    pub fn of(runtime_dir: &Path, entry: &MountEntry) -> Option<Self> {
        let place = Place::of(entry);
        let (stream, _) = connect(runtime_dir, &place).ok()?;
        // 0 is a process of another namespace of numbers.
        let number = getsockopt(&stream, PeerCredentials).ok().map(|peer| Pid::from_raw(peer.pid()));
        let number = number.filter(|number| number.as_raw() > 0 && *number != Pid::this())?;
        let table = MountTable::read().ok()?;
        let others = mounts_of(&table, place.device).filter(|other| other.id != entry.id);
        Some(Self {
            elsewhere: others.map(|other| other.id).collect(),
            minor: entry.id.minor,
            connection: connection_id(entry.id.minor),
            number,
            process: sys::watch_process(number).ok()?,
        })
    }

    /// Waits until it has ended after an unmount; not at all while it serves the mount at another place, or in another mount namespace as
    /// far as fusectl tells.
    ///
    /// # Errors
    /// It has not ended within `limit`: the process, in words.
    pub fn wait(&self, limit: Duration) -> Result<(), String> {
        let is_elsewhere = MountTable::read().is_ok_and(|table| {
            table.entries().iter().any(|entry| entry.is_ours() && self.elsewhere.contains(&entry.id))
        });
        if is_elsewhere || self.connection.is_some() && connection_id(self.minor) == self.connection {
            return Ok(());
        }
        let deadline = Instant::now() + limit;
        loop {
            let left =
                PollTimeout::try_from(deadline.saturating_duration_since(Instant::now())).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.process.as_fd(), PollFlags::POLLIN)], left) {
                Err(Errno::EINTR) => {}
                Ok(0) | Err(_) => return Err(process_in_words(self.number.as_raw())),
                Ok(_) => return Ok(()),
            }
        }
    }
}

/// What tells the connection of a mount from a later one with the same number, where fusectl is mounted.
fn connection_id(minor: u32) -> Option<FileId> {
    connection(minor).metadata().ok().map(|metadata| (metadata.dev(), metadata.ino()))
}
