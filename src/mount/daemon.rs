//! Into the background: the caller waits until the child is ready, or gets the reason why it is not.
//!
//! The child keeps the caller's terminal and streams until it is ready, so that what it logs is seen and Ctrl-C reaches it; then
//! it lets go of them, so that a caller who reads its output through a pipe sees the end. The answer comes through a socket that
//! closes by itself when the child dies.
//!
//! Invariant: the child never returns to the caller of [`in_background`], it ends there.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::MountError;
use crate::sys::{self, Forked};

/// First byte of the child's answer.
const READY: u8 = b'R';
const FAILED: u8 = b'F';

/// The longest reason a caller listens to, in bytes.
const MAX_REASON_BYTES: usize = 64 << 10;

/// How long a child has to clean up and end: one that is too late is killed then.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often a child that is to end is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);

/// Exit code of a process that panicked, as mount(8)'s "internal bug".
pub const INTERNAL_BUG: u8 = 4;

/// How the child tells that it is ready.
#[derive(Debug)]
pub struct Ready {
    caller: Option<UnixStream>,
}

impl Ready {
    /// For a process that stays in the foreground: nobody is told.
    pub fn foreground() -> Self {
        Self { caller: None }
    }

    /// Lets go of the terminal, the working directory and the standard streams, then tells the caller that all is well.
    ///
    /// # Errors
    /// `Abandoned` when the caller is gone; a failing system call.
    pub fn tell(self) -> Result<(), MountError> {
        let Some(mut caller) = self.caller else { return Ok(()) };
        detach().map_err(MountError::system("detaching from the terminal"))?;
        caller.write_all(&[READY]).map_err(|_| MountError::Abandoned)
    }
}

/// Runs `service` in a child process. Returns its process number when `service` has called [`Ready::tell`].
///
/// # Errors
/// What `service` returned instead of telling, with its exit code; `Background` when it died, panicked, or took longer than
/// `timeout`; `Interrupted` when a SIGINT or SIGTERM came first; `System` when the process cannot be split, as when it has threads.
pub fn in_background(
    timeout: Duration,
    service: impl FnOnce(Ready) -> Result<(), MountError>,
) -> Result<i32, MountError> {
    let (ours, theirs) = UnixStream::pair().map_err(MountError::system("socketpair"))?;
    let interruptions = Interruptions::hold().map_err(MountError::system("holding signals back"))?;
    match sys::fork().map_err(MountError::system("fork"))? {
        Forked::Parent { child } => {
            drop(theirs);
            wait_for_answer(ours, child, timeout, &interruptions)
        }
        Forked::Child => {
            drop(interruptions);
            drop(ours);
            serve(theirs, service)
        }
    }
}

fn serve(caller: UnixStream, service: impl FnOnce(Ready) -> Result<(), MountError>) -> ! {
    let exit_code = match caller.try_clone() {
        Err(error) => fail(&caller, &MountError::system("dup")(error)),
        Ok(caller_of_ready) => {
            let ready = Ready { caller: Some(caller_of_ready) };
            match catch_unwind(AssertUnwindSafe(|| service(ready))) {
                Ok(Ok(())) => 0,
                Ok(Err(error)) => fail(&caller, &error),
                Err(_) => {
                    let reason = "internal error: the background process panicked (see above)";
                    send_failure(&caller, INTERNAL_BUG, reason);
                    INTERNAL_BUG
                }
            }
        }
    };
    std::process::exit(i32::from(exit_code))
}

/// Tells the reason to a caller who may still be waiting; after readiness nobody listens, and the log has it.
fn fail(caller: &UnixStream, error: &MountError) -> u8 {
    tracing::debug!("{error}");
    send_failure(caller, error.exit_code(), &error.to_string());
    error.exit_code()
}

fn send_failure(mut caller: &UnixStream, exit_code: u8, reason: &str) {
    let message = [&[FAILED, exit_code], reason.as_bytes()].concat();
    // Nobody may be there any more, which changes nothing.
    let _ = caller.write_all(&message);
    // A thread that waits for something that hangs can keep this process from ending: nobody is to wait for it.
    let _ = let_go_of_streams();
    let _ = caller.shutdown(Shutdown::Both);
}

fn detach() -> io::Result<()> {
    nix::unistd::setsid()?;
    std::env::set_current_dir("/")?;
    let_go_of_streams()
}

/// Nobody who reads what the caller says waits for this process from now on.
pub(super) fn let_go_of_streams() -> io::Result<()> {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    Ok(())
}

/// The signals that would end a caller while it waits, held back so that it can say so and see to its child. On drop they have
/// their effect again, also those that came meanwhile.
struct Interruptions {
    before: SigSet,
    signals: SignalFd,
}

impl Interruptions {
    fn hold() -> io::Result<Self> {
        let mut held = SigSet::empty();
        held.add(Signal::SIGINT);
        held.add(Signal::SIGTERM);
        let signals = SignalFd::with_flags(&held, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let before = SigSet::thread_get_mask()?;
        held.thread_block()?;
        Ok(Self { before, signals })
    }
}

impl Drop for Interruptions {
    fn drop(&mut self) {
        // It was set to this before, so it cannot be refused.
        let _ = self.before.thread_set_mask();
    }
}

fn wait_for_answer(
    mut answer: UnixStream,
    child: Pid,
    timeout: Duration,
    interruptions: &Interruptions,
) -> Result<i32, MountError> {
    let deadline = Instant::now() + timeout;
    let message = match read_answer(&mut answer, deadline, &interruptions.signals) {
        Ok(Some(message)) => message,
        Ok(None) => {
            end(child);
            return Err(MountError::Interrupted);
        }
        Err(error) if error.kind() == io::ErrorKind::TimedOut => {
            end(child);
            return Err(MountError::NotReady(timeout));
        }
        Err(error) => return Err(MountError::System { what: "waiting for the background process", error }),
    };
    match message.as_slice() {
        [READY, ..] => Ok(child.as_raw()),
        [FAILED, exit_code, reason @ ..] => {
            // What it held is free when the caller tries again.
            has_ended(child);
            Err(MountError::Reported { exit_code: *exit_code, reason: String::from_utf8_lossy(reason).into_owned() })
        }
        _ => Err(MountError::Background(match waitpid(child, None) {
            Ok(WaitStatus::Signaled(_, signal, _)) => {
                format!("the background process was killed by {signal} before the mount was ready")
            }
            Ok(WaitStatus::Exited(_, code)) => {
                format!("the background process ended with status {code} before the mount was ready")
            }
            _ => "the background process ended before the mount was ready".into(),
        })),
    }
}

/// All the child says: one byte when it is ready, otherwise up to the end of the stream. `None` when a signal came first.
fn read_answer(answer: &mut UnixStream, deadline: Instant, signals: &SignalFd) -> io::Result<Option<Vec<u8>>> {
    let mut message = Vec::new();
    let mut part = [0u8; 1024];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut fds = [PollFd::new(answer.as_fd(), PollFlags::POLLIN), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        // One more, so that a wait of less than a millisecond does not become none at all.
        let left_ms = i32::try_from(left.as_millis()).unwrap_or(i32::MAX).saturating_add(1);
        match poll(&mut fds, PollTimeout::try_from(left_ms).unwrap_or(PollTimeout::MAX)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let [has_answer, has_signal] = fds.map(|fd| fd.revents().is_some_and(|events| !events.is_empty()));
        // An answer that is there counts more: the mount is made, or the reason known.
        if has_answer {
            match answer.read(&mut part) {
                Ok(0) => return Ok(Some(message)),
                Ok(n) => message.extend_from_slice(&part[..n]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if message.first() == Some(&READY) || message.len() >= MAX_REASON_BYTES {
                return Ok(Some(message));
            }
        } else if has_signal && signals.read_signal()?.is_some() {
            return Ok(None);
        }
    }
}

/// Ends a child: asks, so that it can unmount, then kills.
fn end(child: Pid) {
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let _ = kill(child, signal);
        if has_ended(child) {
            return;
        }
    }
}

/// Waits for the end of a child, for a bounded time: one that waits for something that hangs may never end.
fn has_ended(child: Pid) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        match waitpid(child, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => std::thread::sleep(LOOK_INTERVAL),
            _ => return true,
        }
    }
    false
}
