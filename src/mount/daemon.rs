//! A process in the background that tells its parent when it is ready, or why it never will be.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, dup2_stderr, dup2_stdin, dup2_stdout, setsid};

use crate::sys::{Forked, fork};

/// What the child says when it is ready; anything else is the reason of its failure.
const READY: &[u8] = b"\0ready";

/// The longest reason that is passed on, in bytes.
const MAX_REASON_BYTES: u64 = 64 << 10;

/// Which process this is after [`split`].
#[derive(Debug)]
pub enum Side {
    /// The one that was started; it has waited for the other.
    Parent(Outcome),
    /// The daemon.
    Child(Readiness),
}

/// What became of the daemon, as its parent sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It is ready.
    Ready,
    /// It failed: the exit code it wants, and the reason.
    Failed(u8, String),
}

/// The daemon's duty to report. Dropped without a report, the parent says that the daemon ended.
#[derive(Debug)]
pub struct Readiness {
    parent: UnixStream,
}

/// Splits off a daemon. Must be called before any thread exists.
///
/// # Errors
/// The system cannot make another process.
pub fn split() -> io::Result<Side> {
    let (ours, theirs) = UnixStream::pair()?;
    match fork()? {
        Forked::Parent { child } => {
            drop(theirs);
            Ok(Side::Parent(wait_for_report(ours, child)))
        }
        Forked::Child => {
            drop(ours);
            // A session of its own: the terminal's signals and its end no longer reach it.
            setsid()?;
            Ok(Side::Child(Readiness { parent: theirs }))
        }
    }
}

fn wait_for_report(child_end: UnixStream, child: Pid) -> Outcome {
    let mut report = Vec::new();
    let read = child_end.take(MAX_REASON_BYTES).read_to_end(&mut report);
    if report == READY {
        return Outcome::Ready;
    }
    if let (Ok(_), [exit_code, reason @ ..]) = (read, report.as_slice()) {
        return Outcome::Failed(*exit_code, String::from_utf8_lossy(reason).into_owned());
    }
    let ended = match waitpid(child, None) {
        Ok(WaitStatus::Exited(_, code)) => format!("with exit code {code}"),
        Ok(WaitStatus::Signaled(_, signal, _)) => format!("by {signal}"),
        _ => "for an unknown reason".to_owned(),
    };
    const INTERNAL: u8 = 4;
    Outcome::Failed(INTERNAL, format!("the daemon ended {ended} before it was ready"))
}

impl Readiness {
    /// Lets go of the terminal and of the directory it was started in, and tells the parent that all is well.
    ///
    /// # Errors
    /// The standard streams cannot be replaced; nothing was told then.
    pub fn ready(mut self) -> io::Result<()> {
        std::env::set_current_dir("/")?;
        let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
        dup2_stdin(&null)?;
        dup2_stdout(&null)?;
        dup2_stderr(&null)?;
        // A parent that was killed cannot be told; the mount is there all the same.
        let _ = self.parent.write_all(READY);
        Ok(())
    }

    /// Tells the parent why there will be no daemon.
    pub fn failed(mut self, exit_code: u8, reason: &str) {
        let _ = self.parent.write_all(&[&[exit_code.max(1)], reason.as_bytes()].concat());
    }
}
