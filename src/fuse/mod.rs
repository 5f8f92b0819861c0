//! The only room that names `fuser`: translates kernel requests to a [`Volume`] and back.
//!
//! * [`serve`] answers the kernel's first request and gives a [`Session`]; [`Session::run`] serves until the mount is gone.
//! * `adapter` has one function for each request; `answer` replies at once or moves the reply into a task; `convert` turns our
//!   types into fuser's; `passthrough` lets the kernel read complete local copies itself; `listing` leaves attributes out where nobody uses
//!   them; `late` keeps the kernel's second try of a read from waiting as long again.
//! * [`handover`]: a connection that outlives its process; [`gate`]: the end of taking requests.
//! * [`requests`] are those under way, [`trace`] writes down all of them.
//!
//! Invariants: a request that needs nothing but memory is answered on the thread it came in on; nothing here waits for I/O;
//! every request is answered by its deadline; a panic is answered with EIO and counted.

mod adapter;
mod answer;
mod convert;
pub mod gate;
pub mod handover;
mod late;
mod listing;
mod passthrough;
pub mod requests;
pub mod trace;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;

use crate::report::Report;
use crate::volume::Volume;
use adapter::Adapter;
pub use handover::Handover;
use requests::Requests;

/// Threads that take requests from the kernel. Two make the latency of one request four times smaller than one (the kernel wakes
/// a waiting thread on the same core); more than the cores bring nothing, since they never wait for I/O.
const THREADS: std::ops::RangeInclusive<usize> = 2..=4;

/// How requests are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Every request is answered by then.
    pub io_timeout: Duration,
    /// Whether the kernel may read complete local copies itself; `None` means: if it can.
    pub passthrough: Option<bool>,
    /// Whether the threads that take requests may open the device again ([`can_open_device`], asked on such a thread), so that each has a
    /// descriptor of its own.
    pub opens_device: bool,
}

/// A mounted volume, ready to be served.
#[derive(Debug)]
pub struct Session {
    session: fuser::Session<Adapter>,
    requests: Arc<Requests>,
    volume: Arc<dyn Volume>,
}

/// Does the handshake with the kernel over the descriptor of a mount, or goes on where another process ended, as `handover` says.
///
/// # Errors
/// The kernel does not speak FUSE as we do, or the mount went away.
pub fn serve(
    volume: Arc<dyn Volume>,
    fd: OwnedFd,
    settings: Settings,
    runtime: Handle,
    report: Arc<Report>,
    handover: &Handover,
) -> io::Result<Session> {
    let requests = Arc::new(Requests::new(settings.io_timeout));
    // Which files the kernel reads itself is known to the process alone that let it: another one, that goes on, would answer an open in
    // a way that the kernel refuses.
    let passthrough = if handover.may_clone() { settings.passthrough } else { Some(false) };
    if settings.passthrough == Some(true) && passthrough == Some(false) {
        tracing::warn!(
            "passthrough: the service manager keeps this mount for the next process; files are read through us"
        );
    }
    let (of_adapter, gate) = (Arc::clone(&volume), Arc::clone(handover.gate()));
    let adapter = Adapter::new(of_adapter, Arc::clone(&requests), passthrough, runtime, report, gate);
    let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut config = fuser::Config::default();
    config.n_threads = Some(n_cores.clamp(*THREADS.start(), *THREADS.end()));
    config.clone_fd = handover.may_clone() && settings.opens_device;
    // Who may use the mount is the kernel's to decide, from the mount options; fuser must not refuse root beside it.
    let session = handover.begin(fd, |fd| fuser::Session::from_fd(adapter, fd, fuser::SessionACL::All, config))?;
    Ok(Session { session, requests, volume })
}

/// Whether the calling thread may open the device. One of a process that has become another user may not, where it is root's alone.
pub fn can_open_device() -> bool {
    std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").is_ok()
}

impl Session {
    /// The requests under way, also while the session runs.
    pub fn requests(&self) -> &Arc<Requests> {
        &self.requests
    }

    /// Serves until the file system is unmounted and no file in it is open any more.
    ///
    /// # Errors
    /// The connection to the kernel failed in another way.
    pub fn run(self) -> io::Result<()> {
        let ended = self.session.run();
        self.volume.end();
        match ended {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            ended => ended,
        }
    }
}
