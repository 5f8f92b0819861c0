//! The end of the process that serves a mount, for who unmounts it: it writes what it still has after the mount is gone.
//!
//! Invariant: no wait is longer than its caller allows.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Pid;

use super::client::{Place, connect, process_in_words};
use super::paths::{self, Device};
use crate::mount::abort::connection;
use crate::mount::table::MountTable;
use crate::sys;

/// The process that serves a mount, as it is now, for [`Serving::wait`].
#[derive(Debug)]
pub struct Serving {
    device: Device,
    number: Pid,
    process: OwnedFd,
}

impl Serving {
    /// The process behind the mount at `mountpoint`; `None` when it has no control socket, is out of our sight, or cannot be watched.
    pub fn of(runtime_dir: &Path, mountpoint: &Path) -> Option<Self> {
        let table = MountTable::read().ok()?;
        let place = Place::of(paths::find(&table, mountpoint).ok()??.0);
        let (stream, _) = connect(runtime_dir, &place).ok()?;
        // 0 is a process of another namespace of numbers.
        let number = getsockopt(&stream, PeerCredentials).ok().map(|peer| Pid::from_raw(peer.pid()));
        let number = number.filter(|number| number.as_raw() > 0 && *number != Pid::this())?;
        Some(Self { device: place.device, number, process: sys::watch_process(number).ok()? })
    }

    /// Waits until it has ended after an unmount; not at all while it serves the mount at another place, or in another mount namespace as
    /// far as fusectl tells.
    ///
    /// # Errors
    /// It has not ended within `limit`: the process, in words.
    pub fn wait(&self, limit: Duration) -> Result<(), String> {
        let is_here = MountTable::read()
            .is_ok_and(|table| table.entries().iter().any(|entry| (entry.id.major, entry.id.minor) == self.device));
        if is_here || connection(self.device.1).exists() {
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
