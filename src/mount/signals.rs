//! Signals that end a mount: SIGTERM and SIGINT unmount, lazily when it is in use. A SIGINT after that ends the process at once; another
//! SIGTERM does not, whoever sends it: the service manager and a machine that shuts down send several, and there is SIGKILL.
//!
//! SIGUSR1 hands a mount over that the service manager keeps: what is being answered is answered, and the process ends without
//! unmounting (a unit says `RestartKillSignal=SIGUSR1`). Where nobody keeps it, it is as SIGTERM.
//! SIGHUP opens a log file again and makes a mount read its settings again, and never ends it: a closed terminal is no reason to take
//! files away from those who read them.
//! There is one watch in a process, since signals are the process's; a mount puts itself in its care with [`Watch::guard`].

use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;

use super::MountError;
use super::attach::{Attached, Mounted};
use super::detach::{How, Unmounted};
use super::notify::Manager;
use super::{log, takeover};
use crate::fuse::gate::Gate;
use crate::sys;

/// Ends the process and leaves the mount to the next one.
const HAND_OVER: Signal = Signal::SIGUSR1;

/// Added to the number of the signal for the exit code, as shells do.
const SIGNAL_EXIT_BASE: i32 = 128;

/// Waits for signals in a thread of its own, for the rest of the process.
#[derive(Debug)]
pub(super) struct Watch {
    phase: Mutex<Phase>,
    /// Locked after `phase`, if both are.
    manager: Mutex<Option<Keeping>>,
}

/// The service manager of the mount, and whether it keeps it.
#[derive(Debug, Clone)]
pub(super) struct Keeping {
    /// The manager.
    pub(super) manager: Manager,
    /// Where requests are held back when the mount is handed over, and how long those being answered may take; none when nobody
    /// keeps the mount.
    pub(super) handed_over: Option<(Arc<Gate>, Duration)>,
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
    /// It was told to go, and may have users: SIGINT ends.
    Leaving(Arc<Attached>),
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
        let stream = sys::catch_signals(&[Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, HAND_OVER])?;
        let watch = WATCH.get_or_init(|| Self { phase: Mutex::new(Phase::Idle), manager: Mutex::default() });
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

    /// Cares for a mount that is there already.
    pub(super) fn adopt(&self, attached: Attached) -> Arc<Attached> {
        let attached = Arc::new(attached);
        *self.lock() = Phase::Attached(Arc::clone(&attached));
        attached
    }

    /// Hears who manages the mount.
    pub(super) fn set_manager(&self, keeping: Keeping) {
        *self.lock_manager() = Some(keeping);
    }

    /// The mount is over, or will be when its last user has closed: the service manager hears of it, once, and keeps nothing of it.
    pub(super) fn tell_end(&self) {
        let Some(Keeping { manager, handed_over }) = self.lock_manager().take() else { return };
        manager.stopping();
        if handed_over.is_some() {
            takeover::forget(&manager);
        }
    }

    /// The mount is over.
    pub(super) fn release(&self) {
        *self.lock() = Phase::Idle;
    }

    fn lock_manager(&self) -> MutexGuard<'_, Option<Keeping>> {
        self.manager.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, mut stream: impl Read) {
        let mut byte = [0u8; 1];
        while stream.read_exact(&mut byte).is_ok() {
            match i32::from(byte[0]) {
                libc::SIGHUP => {
                    log::reopen();
                    hang_up();
                }
                signal if signal == HAND_OVER as i32 => self.hand_over(signal),
                signal => self.leave(signal),
            }
        }
    }

    /// Leaves the mount to the next process, if somebody keeps it until then.
    fn hand_over(&self, signal: i32) {
        let keeping = self.lock_manager().clone();
        let Some(Keeping { manager, handed_over: Some((gate, limit)) }) = keeping else { return self.leave(signal) };
        manager.stopping();
        let n_left = gate.close(limit);
        tracing::info!(
            "the mount is handed over ({n_left} requests are not answered yet, and will be asked for again)"
        );
        end(0)
    }

    fn leave(&self, signal: i32) {
        let mut phase = self.lock();
        let attached = match &*phase {
            Phase::Idle => end(SIGNAL_EXIT_BASE + signal),
            // Whoever types it again wants no more of it.
            Phase::Leaving(_) if signal == Signal::SIGINT as i32 => end(SIGNAL_EXIT_BASE + signal),
            // What could not be unmounted is tried again. What is out of sight stays for those who use it: to take it away from them
            // would be an error in each of their reads.
            Phase::Attached(attached) | Phase::Leaving(attached) => Arc::clone(attached),
        };
        *phase = Phase::Leaving(Arc::clone(&attached));
        drop(phase);
        self.tell_end();
        match attached.unmount(How::LazilyWhenBusy) {
            Ok(Unmounted::Gone) => {}
            Ok(Unmounted::OutOfSight) => tracing::warn!(
                "{} is unmounted but still in use: waiting for its users (SIGINT ends at once)",
                attached.mountpoint().display()
            ),
            Err(error) => tracing::error!("{error} (SIGINT ends at once)"),
        }
    }
}

/// Ends the process, when all that was said is in the log.
fn end(exit_code: i32) -> ! {
    log::finish();
    std::process::exit(exit_code)
}
