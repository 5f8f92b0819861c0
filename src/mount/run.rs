//! A mount from beginning to end: `fork` -> open -> attach -> serve -> ready -> run -> unmount.
//!
//! What a volume is and how the kernel is answered come in as closures, so that this file is about the order only.
//! Invariant: the caller learns of success when the mount is usable, and of failure when nothing of it is left.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};

use super::attach::{AttachRequest, READ_AHEAD_KIB, attach, default_allow_other, prepare};
use super::daemon::{Ready, in_background};
use super::detach::How;
use super::options::{KernelOptions, VfsFlags};
use super::signals::Watch;
use super::{Attached, BoxError, MountError, given, shown_source};
use crate::volume::Volume;

/// Where a mount is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In this process, until it is unmounted.
    Foreground,
    /// In a child process; returns when the mount is usable.
    Background,
}

/// What to mount, where, and how.
#[derive(Debug, Clone)]
pub struct MountRequest {
    /// As it was given; the mount table shows it without passwords.
    pub source: OsString,
    /// As it was given; `/dev/fd/N` for a mount that somebody else has made (see `given`).
    pub mountpoint: PathBuf,
    /// Flags for the kernel.
    pub flags: VfsFlags,
    /// What else the kernel is told.
    pub kernel: KernelOptions,
    /// Whether other users may use the mount; `None` means: yes when root mounts.
    pub allow_other: Option<bool>,
    /// Where it is served.
    pub place: Place,
    /// How long the background process may take to become ready.
    pub ready_timeout: Duration,
}

/// A fresh mount, for whoever answers the kernel.
#[derive(Debug)]
pub struct Served {
    /// What is mounted.
    pub volume: Arc<dyn Volume>,
    /// Where requests come from; INIT waits.
    pub fd: OwnedFd,
    /// Whether requests of other users are answered.
    pub allow_other: bool,
    /// Where futures run.
    pub runtime: Handle,
}

/// How a mount ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountOutcome {
    /// Another process serves it.
    Background {
        /// Its number.
        pid: i32,
    },
    /// It was served here and has been unmounted.
    Ended,
}

/// Mounts. `open` makes the volume, told whether the mountpoint is a regular file; `serve` does the INIT handshake and gives a function that answers the kernel until the
/// connection ends. In the background both run in the child, and so must not have started threads before.
///
/// # Errors
/// [`MountError::Failed`], with the reason and the exit code; nothing is mounted then.
pub fn mount<O, S, R>(request: &MountRequest, open: O, serve: S) -> Result<MountOutcome, MountError>
where
    O: FnOnce(&Runtime, bool) -> Result<Arc<dyn Volume>, BoxError>,
    S: FnOnce(Served) -> io::Result<R>,
    R: FnOnce() -> io::Result<()>,
{
    let outcome = match request.place {
        Place::Foreground => service(request, open, serve, Ready::foreground()).map(|()| MountOutcome::Ended),
        Place::Background => in_background(request.ready_timeout, |ready| service(request, open, serve, ready))
            .map(|pid| MountOutcome::Background { pid }),
    };
    outcome.map_err(|error| MountError::Failed {
        source_name: shown_source(&request.source).to_string_lossy().into_owned(),
        mountpoint: request.mountpoint.clone(),
        reason: error.to_string(),
        exit_code: error.exit_code(),
    })
}

fn service<O, S, R>(request: &MountRequest, open: O, serve: S, ready: Ready) -> Result<(), MountError>
where
    O: FnOnce(&Runtime, bool) -> Result<Arc<dyn Volume>, BoxError>,
    S: FnOnce(Served) -> io::Result<R>,
    R: FnOnce() -> io::Result<()>,
{
    let watch = Watch::start().map_err(MountError::system("catching signals"))?;
    let runtime = Builder::new_multi_thread()
        .enable_all()
        .thread_name("caifs")
        .build()
        .map_err(MountError::system("starting threads"))?;
    let ended = serve_until_unmounted(request, watch, &runtime, open, serve, ready);
    // Without waiting for tasks that hang: a dead store must not keep the process.
    runtime.shutdown_background();
    ended
}

fn serve_until_unmounted<O, S, R>(
    request: &MountRequest,
    watch: &'static Watch,
    runtime: &Runtime,
    open: O,
    serve: S,
    ready: Ready,
) -> Result<(), MountError>
where
    O: FnOnce(&Runtime, bool) -> Result<Arc<dyn Volume>, BoxError>,
    S: FnOnce(Served) -> io::Result<R>,
    R: FnOnce() -> io::Result<()>,
{
    if let Some(fd) = given::descriptor(&request.mountpoint)? {
        let volume = open(runtime, false).map_err(MountError::Open)?;
        return given::serve_until_unmounted(
            Served { volume, fd, allow_other: true, runtime: runtime.handle().clone() },
            serve,
            ready,
        );
    }
    let source = shown_source(&request.source);
    let prepared = prepare(&request.mountpoint, &source)?;
    let volume = open(runtime, prepared.is_file()).map_err(MountError::Open)?;
    let allow_other = request.allow_other.unwrap_or_else(default_allow_other);
    let attach_request = AttachRequest {
        mountpoint: &request.mountpoint,
        source: &source,
        root_kind: volume.root_kind(),
        flags: request.flags,
        kernel: &request.kernel,
        allow_other,
    };
    let (fd, attached) = watch.guard(|| attach(&attach_request))?;
    let _in_care = InCare { watch, attached: Arc::clone(&attached) };
    let served = Served { volume, fd, allow_other, runtime: runtime.handle().clone() };
    let run = serve(served).map_err(MountError::Serve)?;
    set_read_ahead(&attached);
    ready.tell()?;
    tracing::info!("mounted on {}", attached.mountpoint().display());
    run().map_err(MountError::Serve)
}

fn set_read_ahead(attached: &Attached) {
    if let Err(error) = attached.set_read_ahead(READ_AHEAD_KIB) {
        // A user may not, and reads smaller pieces then.
        tracing::debug!("kernel read-ahead stays at its default: {error}");
    }
}

/// A mount in the care of the watch; unmounted and taken out of it on drop, however the service ends.
struct InCare {
    watch: &'static Watch,
    attached: Arc<Attached>,
}

impl Drop for InCare {
    fn drop(&mut self) {
        // Unmounted first: a signal in between finds a mount that is gone, which is no error.
        if let Err(error) = self.attached.unmount(How::LazilyWhenBusy) {
            tracing::warn!("{error}");
        }
        self.watch.release();
    }
}
