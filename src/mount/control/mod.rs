//! What happens in a mount, seen from outside: a socket for each mount that answers questions and takes other settings.
//!
//! * [`paths`]: where sockets lie and which mount a path means; `place`: which mounts there are, and whose. [`protocol`]: what goes over them.
//! * [`server`] is the service's end, [`client`] the asker's: [`ask`] is all that others need.
//! * [`Serving`] tells when the process of a mount that was unmounted has ended.
//! * [`gather`] looks at everything, `tiers` at what keeps chunks, [`survey`] at what is on disk, [`metrics`] writes the numbers for Prometheus.
//!
//! Invariants: nobody here touches the mountpoint, so that nobody can hang with it; the service answers from threads of its own, which wait
//! for no store; only the mount's own user and root are answered.

pub mod client;
mod ending;
pub mod gather;
pub mod metrics;
pub mod paths;
mod place;
pub mod protocol;
pub mod server;
pub mod survey;
mod tiers;

pub use client::{ControlError, ask};
pub use ending::Serving;
pub use protocol::{Reply, Request};

use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::reload::Reloader;
use super::table::{MountTable, resolve_parent};
use crate::fuse::requests::Requests;
use crate::volume::Live;
use paths::Device;
use server::Server;
use survey::Survey;

/// A mount that is served, as whoever looks at it needs it.
#[derive(Debug)]
pub struct Served {
    /// What is mounted, without secrets.
    pub source: OsString,
    /// Where it was mounted.
    pub mountpoint: PathBuf,
    /// The number of the mount; `None` if that cannot be found out.
    pub device: Option<Device>,
    /// What it is made of.
    pub live: Arc<Live>,
    /// The requests under way.
    pub requests: Arc<Requests>,
    /// What changes its settings.
    pub reloader: Arc<Reloader>,
    /// What looks at what is present.
    pub survey: Survey,
}

/// Where a fresh connection is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountedAt {
    /// The mountpoint as an absolute path, as far as it is known.
    pub mountpoint: PathBuf,
    /// The number of the mount.
    pub device: Option<Device>,
}

impl MountedAt {
    /// Finds out where the mount of a connection is: from the kernel if it tells, else by the mountpoint as it was given. (A mountpoint such as
    /// `/dev/fd/3` tells nothing.)
    pub fn find(connection: impl AsFd, given: &Path) -> Self {
        let table = MountTable::read().unwrap_or_default();
        let by_path =
            || paths::find(&table, given).ok().flatten().filter(|(_, is_exact)| *is_exact).map(|(entry, _)| entry);
        let device = paths::device_of_connection(connection);
        let entry = match device {
            Some(device) => paths::mounts_of(&table, device).last(),
            None => by_path(),
        };
        match entry {
            Some(entry) => {
                Self { mountpoint: entry.mountpoint.clone(), device: Some((entry.id.major, entry.id.minor)) }
            }
            None => Self { mountpoint: resolve_parent(given).unwrap_or_else(|_| given.to_owned()), device },
        }
    }
}

/// Listens on the socket of a mount.
///
/// # Errors
/// Its number is not known, or the socket cannot be made.
pub fn listen(runtime_dir: &Path, served: &Arc<Served>) -> io::Result<Server> {
    let Some(device) = served.device else {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the number of the mount cannot be found out"));
    };
    Server::start(runtime_dir, &paths::socket_name(device), Arc::clone(served))
}
