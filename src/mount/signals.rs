//! Signals that end a mount: SIGTERM and SIGINT unmount, lazily when it is in use; a second one ends the process at once.
//!
//! SIGHUP makes a mount read its settings again, and never ends it: a closed terminal is no reason to take files away from those who read them.
//! There is one watch in a process, since signals are the process's; a mount puts itself in its care with [`Watch::guard`].

use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use nix::sys::signal::Signal;

use super::MountError;
use super::attach::{Attached, Mounted};
use super::detach::{How, Unmounted};
use crate::sys;

/// Added to the number of the signal for the exit code, as shells do.
const SIGNAL_EXIT_BASE: i32 = 128;

/// Waits for signals in a thread of its own, for the rest of the process.
#[derive(Debug)]
pub(super) struct Watch {
    phase: Mutex<Phase>,
}

/// What SIGHUP does.
type Hangup = Arc<dyn Fn() + Send + Sync>;

/// Never held while it runs.
static HANGUP: Mutex<Option<Hangup>> = Mutex::new(None);

/// From now on SIGHUP calls this, each time on a thread of its own; `None` for nothing.
pub(super) fn on_hangup(hangup: Option<Hangup>) {
    *HANGUP.lock().unwrap_or_else(PoisonError::into_inner) = hangup;
}

/// Beside the thread that waits for signals: the next one may be to end.
fn hang_up() {
    let Some(hangup) = HANGUP.lock().unwrap_or_else(PoisonError::into_inner).clone() else { return };
    drop(std::thread::Builder::new().name("caifs-hangup".into()).spawn(move || hangup()));
}

/// What a signal finds.
#[derive(Debug)]
enum Phase {
    /// Nothing is mounted: end.
    Idle,
    /// A mount: unmount it, and stay until its last user has closed.
    Attached(Arc<Attached>),
    /// The second signal: end.
    Leaving,
}

impl Watch {
    /// The watch of this process, started when first asked for.
    pub(super) fn start() -> io::Result<&'static Self> {
        static WATCH: OnceLock<Watch> = OnceLock::new();
        static STARTING: Mutex<()> = Mutex::new(());
        let _starting = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(watch) = WATCH.get() {
            return Ok(watch);
        }
        let stream = sys::catch_signals(&[Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP])?;
        let watch = WATCH.get_or_init(|| Self { phase: Mutex::new(Phase::Idle) });
        std::thread::Builder::new().name("signals".into()).spawn(move || watch.run(stream))?;
        Ok(watch)
    }

    /// Makes a mount while no signal can end the process, and cares for it until [`Watch::release`].
    pub(super) fn guard(
        &self,
        attach: impl FnOnce() -> Result<Mounted, MountError>,
    ) -> Result<(OwnedFd, Arc<Attached>), MountError> {
        // Held over the mount on purpose: a process that ends between mounting and knowing of it leaves a dead mount behind.
        let mut phase = self.lock();
        let Mounted { fd, attached } = attach()?;
        let attached = Arc::new(attached);
        *phase = Phase::Attached(Arc::clone(&attached));
        Ok((fd, attached))
    }

    /// The mount is over.
    pub(super) fn release(&self) {
        *self.lock() = Phase::Idle;
    }

    fn lock(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, mut stream: impl Read) {
        let mut byte = [0u8; 1];
        while stream.read_exact(&mut byte).is_ok() {
            let signal = i32::from(byte[0]);
            match signal {
                libc::SIGHUP => hang_up(),
                signal => self.leave(signal),
            }
        }
    }

    fn leave(&self, signal: i32) {
        let mut phase = self.lock();
        let attached = match std::mem::replace(&mut *phase, Phase::Leaving) {
            Phase::Idle | Phase::Leaving => std::process::exit(SIGNAL_EXIT_BASE + signal),
            Phase::Attached(attached) => attached,
        };
        drop(phase);
        match attached.unmount(How::LazilyWhenBusy) {
            Ok(Unmounted::Gone) => {}
            Ok(Unmounted::OutOfSight) => tracing::warn!(
                "{} is unmounted but still in use: waiting for its users (another signal ends at once)",
                attached.mountpoint().display()
            ),
            Err(error) => tracing::error!("{error} (another signal ends at once)"),
        }
    }
}
