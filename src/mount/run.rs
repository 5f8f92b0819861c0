//! The whole of a mount: check, split off the daemon, open, attach, serve, and clean up.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use nix::sys::signal::Signal;
use tokio::runtime::{Handle, Runtime};

use super::MountError;
use super::attach::{Attached, Attachment, attach, prepare, words};
use super::daemon::{self, Outcome, Readiness, Side};
use super::options::MountOptions;
use crate::fuse::{self, Session};
use crate::report::Report;
use crate::store::location::without_password;
use crate::sys;
use crate::volume::open::open_volume;

/// A mount to be made.
#[derive(Debug, Clone)]
pub struct MountRequest {
    /// What is mounted, as the user named it: shown in messages and, without password, in the mount table.
    pub spec: String,
    /// The file to open.
    pub path: PathBuf,
    /// Where to mount it.
    pub mountpoint: PathBuf,
    /// How.
    pub options: MountOptions,
    /// Stay in this process until it is unmounted.
    pub foreground: bool,
}

impl MountRequest {
    fn fail(&self, why: impl std::fmt::Display) -> MountError {
        MountError::Failed(format!(
            "cannot mount {} on {}: {why}",
            without_password(&self.spec),
            self.mountpoint.display()
        ))
    }
}

/// Mounts. In the background, returns when the mount answers; in the foreground, when it is unmounted.
///
/// # Errors
/// It could not be mounted; nothing is left behind then.
pub fn run(mut request: MountRequest) -> Result<(), MountError> {
    request.mountpoint = prepare(&request.mountpoint).map_err(|error| request.fail(error))?;
    if request.foreground {
        return serve(&request, None);
    }
    match daemon::split().map_err(|error| request.fail(words(&error)))? {
        Side::Parent(Outcome::Ready) => Ok(()),
        Side::Parent(Outcome::Failed(exit_code, reason)) => Err(match exit_code {
            1 => MountError::Usage(reason),
            _ => MountError::Failed(reason),
        }),
        Side::Child(readiness) => {
            // The parent has the word on how it went; from here on this is the daemon, which ends with its mount.
            let ended = serve(&request, Some(readiness));
            std::process::exit(i32::from(ended.is_err()));
        }
    }
}

fn serve(request: &MountRequest, mut readiness: Option<Readiness>) -> Result<(), MountError> {
    let started = start(request);
    let mount = match started {
        Ok(mount) => mount,
        Err(error) => {
            if let Some(readiness) = readiness.take() {
                readiness.failed(error.exit_code(), &error.to_string());
            }
            return Err(error);
        }
    };
    if let Some(readiness) = readiness.take()
        && let Err(error) = readiness.ready()
    {
        tracing::warn!("cannot go into the background: {error}");
    }
    let Mount { attached, server, report, runtime } = mount;
    let ended = server.join();
    // Unmounted from outside, aborted or failed: in every case nothing of ours may stay behind.
    let _ = attached.detach();
    // A store that hangs must not keep the daemon.
    runtime.shutdown_background();
    tracing::info!(?report, "unmounted");
    match ended {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(request.fail(words(&error))),
        Err(_) => Err(request.fail("the server panicked")),
    }
}

/// A mount that answers.
struct Mount {
    attached: Arc<Attached>,
    server: std::thread::JoinHandle<std::io::Result<()>>,
    report: Arc<Report>,
    runtime: Runtime,
}

fn start(request: &MountRequest) -> Result<Mount, MountError> {
    let fail = |why: &dyn std::fmt::Display| request.fail(why);
    // Before anything is mounted, so that no signal in between can leave the mount behind.
    let signals =
        sys::catch_signals(&[Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]).map_err(|error| fail(&words(&error)))?;
    let runtime = Runtime::new().map_err(|error| fail(&words(&error)))?;
    let report = Arc::new(Report::default());
    let config = &request.options.config;
    let on_file = request.mountpoint.is_file();
    let opening = open_volume(&request.path, config, on_file, &report);
    let volume = runtime.block_on(opening).map_err(|error| fail(&error))?;
    let is_root = nix::unistd::geteuid().is_root();
    let attachment = Attachment {
        source: without_password(&request.spec),
        mountpoint: request.mountpoint.clone(),
        flags: request.options.flags,
        allow_other: config.allow_other.unwrap_or(is_root),
    };
    let (attached, fd) = attach(&attachment).map_err(|error| fail(&error))?;
    let attached = Arc::new(attached);
    let begin = |fd: OwnedFd, runtime: Handle| -> std::io::Result<_> {
        let settings = fuse::Settings { io_timeout: config.io_timeout };
        let session = fuse::serve(volume, fd, settings, runtime, Arc::clone(&report))?;
        attached.raise_read_ahead();
        unmount_on_signals(signals, Arc::clone(&attached))?;
        let server = std::thread::Builder::new().name("session".to_owned()).spawn(|| Session::run(session))?;
        // The answer to this comes from the mount itself, so it is the proof that it works.
        std::fs::symlink_metadata(attached.mountpoint())?;
        Ok(server)
    };
    match begin(fd, runtime.handle().clone()) {
        Ok(server) => Ok(Mount { attached, server, report, runtime }),
        Err(error) => {
            let _ = attached.detach();
            Err(fail(&words(&error)))
        }
    }
}

/// Unmounts at the first SIGTERM or SIGINT, lazily when it is busy; ends the process at the second. SIGHUP is for a later use
/// and does nothing, so that a closed terminal does not end a mount.
fn unmount_on_signals(mut signals: UnixStream, attached: Arc<Attached>) -> std::io::Result<()> {
    let watch = move || {
        let mut n_asked = 0;
        let mut signal = [0];
        while signals.read_exact(&mut signal).is_ok() {
            if i32::from(signal[0]) == libc::SIGHUP {
                continue;
            }
            n_asked += 1;
            if n_asked > 1 {
                std::process::exit(128 + i32::from(signal[0]));
            }
            match attached.detach() {
                Ok(false) => {}
                Ok(true) => tracing::warn!(
                    "{} is busy: detached, and served until its last file is closed (a second signal ends it now)",
                    attached.mountpoint().display()
                ),
                Err(error) => tracing::warn!("{error}"),
            }
        }
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(watch).map(drop)
}
