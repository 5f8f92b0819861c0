//! A mount from beginning to end: `fork` -> confine -> open -> attach -> serve -> ready -> run -> unmount; or, where another process has
//! mounted already, open -> take over -> serve and so on.
//!
//! What a volume is and how the kernel is answered come in as closures, so that this file is about the order only.
//! Invariant: the caller learns of success when the mount is usable, and of failure when nothing of it is left.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};

use super::attach::{AttachRequest, READ_AHEAD_KIB, attach, check_answers, prepare};
use super::daemon::{Ready, in_background};
use super::detach::How;
use super::log::{self, Destination};
use super::notify::Pulse;
use super::options::{KernelOptions, VfsFlags};
use super::privileges::{Confinement, Role};
use super::service::{Service, open_log};
use super::signals::{Keeping, Watch};
use super::takeover::{self, Kept};
use super::{Attached, BoxError, MountError, given, shown_source};
use crate::fuse::Handover;
use crate::fuse::handover::n_session_threads;
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
    /// What surrounds it.
    pub service: Service,
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
    /// How the session begins and ends.
    pub handover: Arc<Handover>,
    /// What threads that read what came from elsewhere enter first; those of the runtime have.
    pub confinement: Arc<Confinement>,
}

/// What a volume is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opening {
    /// The mountpoint is a regular file.
    pub on_file: bool,
    /// It is to go on with a mount that is there, and in use: what is away at the moment is waited for by those who read it.
    pub goes_on: bool,
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

/// Mounts. `open` makes the volume, told what for; `serve` does the INIT handshake and gives a function
/// that answers the kernel until the connection ends. In the background all run in the child, and so must not have started threads
/// before; `open` and that function run on threads of their own, which are confined.
///
/// # Errors
/// [`MountError::Failed`], with the reason and the exit code; nothing is mounted then.
pub fn mount<O, S, R>(request: &MountRequest, open: O, serve: S) -> Result<MountOutcome, MountError>
where
    O: FnOnce(&Runtime, Opening) -> Result<Arc<dyn Volume>, BoxError> + Send,
    S: FnOnce(Served) -> Result<R, MountError>,
    R: FnOnce() -> io::Result<()> + Send,
{
    log::set_level(request.service.config.service.log_level);
    // One that is to be gone on with waits for us to answer.
    let checked = if request.service.has_kept() { Ok(()) } else { check_answers(&request.mountpoint) };
    let outcome = checked.and_then(|()| open_log(request)).and_then(|log| match request.place {
        Place::Foreground => service(request, log, open, serve, Ready::foreground()).map(|()| MountOutcome::Ended),
        Place::Background => in_background(request.ready_timeout, |ready| service(request, log, open, serve, ready))
            .map(|pid| MountOutcome::Background { pid }),
    });
    if outcome.is_err() {
        // Not taken yet by a process that failed before.
        takeover::give_up(&request.service.manager, request.service.take_kept());
    }
    outcome.map_err(|error| MountError::Failed {
        source_name: shown_source(&request.source).to_string_lossy().into_owned(),
        mountpoint: request.mountpoint.clone(),
        reason: error.to_string(),
        exit_code: error.exit_code(),
    })
}

fn service<O, S, R>(
    request: &MountRequest,
    log: Option<Destination>,
    open: O,
    serve: S,
    ready: Ready,
) -> Result<(), MountError>
where
    O: FnOnce(&Runtime, Opening) -> Result<Arc<dyn Volume>, BoxError> + Send,
    S: FnOnce(Served) -> Result<R, MountError>,
    R: FnOnce() -> io::Result<()> + Send,
{
    // Before the descriptors of the caller are closed, of which it is one.
    let given = given::descriptor(&request.mountpoint)?;
    request.service.leave_caller(request.place);
    let confinement = Arc::new(Confinement::begin(&request.service)?);
    let watch = Watch::start().map_err(MountError::system("catching signals"))?;
    let of_workers = Arc::clone(&confinement);
    let runtime = Builder::new_multi_thread()
        .enable_all()
        .thread_name("caifs")
        .on_thread_start(move || of_workers.enter(Role::Worker))
        .build()
        .map_err(MountError::system("starting threads"))?;
    let stage = Stage { request, watch, runtime: &runtime, confinement };
    let ended = stage.play(given, log, open, serve, ready);
    // Without waiting for tasks that hang: a dead store must not keep the process.
    runtime.shutdown_background();
    ended
}

/// What a mount is played on.
struct Stage<'a> {
    request: &'a MountRequest,
    watch: &'static Watch,
    runtime: &'a Runtime,
    confinement: Arc<Confinement>,
}

/// A mount with somebody to serve it.
struct Scene {
    volume: Arc<dyn Volume>,
    fd: OwnedFd,
    /// `None` for a mount that somebody else has made and will unmount.
    attached: Option<Arc<Attached>>,
    handover: Handover,
    is_taken_over: bool,
}

impl Scene {
    fn of_somebody(volume: Arc<dyn Volume>, fd: OwnedFd) -> Self {
        Self { volume, fd, attached: None, handover: Handover::default(), is_taken_over: false }
    }
}

impl Stage<'_> {
    fn play<O, S, R>(
        &self,
        given: Option<OwnedFd>,
        log: Option<Destination>,
        open: O,
        serve: S,
        ready: Ready,
    ) -> Result<(), MountError>
    where
        O: FnOnce(&Runtime, Opening) -> Result<Arc<dyn Volume>, BoxError> + Send,
        S: FnOnce(Served) -> Result<R, MountError>,
        R: FnOnce() -> io::Result<()> + Send,
    {
        let Self { request, watch, .. } = self;
        // The last to go: all that ends before may have something to say.
        let _log = log::Finish;
        // Who may use one that somebody else has made was told to the kernel by whoever made it.
        let by_default = given.is_some() || self.confinement.mounts_as_root();
        let allow_other = request.allow_other.filter(|_| given.is_none()).unwrap_or(by_default);
        let Scene { volume, fd, attached, handover, is_taken_over } = match given {
            Some(fd) => Scene::of_somebody(self.open_confined(open, Opening { on_file: false, goes_on: false })?, fd),
            None => self.attach_or_take_over(allow_other, open)?,
        };
        let attached = attached.as_ref();
        let _in_care = attached.map(|attached| InCare { watch, attached: Arc::clone(attached) });
        let handover = Arc::new(handover);
        let served = Served {
            volume: Arc::clone(&volume),
            fd,
            allow_other,
            runtime: self.runtime.handle().clone(),
            handover: Arc::clone(&handover),
            confinement: Arc::clone(&self.confinement),
        };
        let run = match serve(served).and_then(|run| self.confinement.check().map(|()| run)) {
            Ok(run) => run,
            Err(error) => {
                if is_taken_over {
                    // Until it is left to the manager anew, the manager has what was taken over, and who waits in it would go on waiting.
                    takeover::forget(&request.service.manager);
                }
                return Err(error);
            }
        };
        if let Some(attached) = attached {
            self.set_read_ahead(attached);
            self.leave_to_manager(&volume, attached, &handover, is_taken_over, allow_other);
        }
        if let Some(log) = log {
            log::switch(log);
        }
        // From now on somebody may wait for those who have something to say.
        let of_log = Arc::clone(&self.confinement);
        log::write_behind(move || of_log.enter(Role::Control));
        thread::scope(|scope| {
            let confinement = &self.confinement;
            let session = thread::Builder::new()
                .name("session".into())
                .spawn_scoped(scope, move || {
                    confinement.enter(Role::Session);
                    run()
                })
                .map_err(MountError::system("starting threads"))?;
            let told = ready.tell();
            let _pulse = match (attached, &told) {
                (Some(attached), Ok(())) => {
                    tracing::info!("mounted on {}", attached.mountpoint().display());
                    self.tell_ready(request.place == Place::Background)
                }
                (Some(attached), Err(_)) => {
                    // The session ends when its mount is gone.
                    let _ = attached.unmount(How::LazilyWhenBusy);
                    None
                }
                (None, _) => None,
            };
            let ended = session.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            if let (Place::Background, Err(error)) = (request.place, &ended) {
                // Nobody waits for it any more who could be told.
                tracing::error!("the mount has ended: {error}");
            }
            told.and(ended.map_err(MountError::Serve))
        })
    }

    fn attach_or_take_over(
        &self,
        allow_other: bool,
        open: impl FnOnce(&Runtime, Opening) -> Result<Arc<dyn Volume>, BoxError> + Send,
    ) -> Result<Scene, MountError> {
        let Service { manager, .. } = &self.request.service;
        let mountpoint = &self.request.mountpoint;
        let kept = self.request.service.take_kept();
        let has_kept = !kept.is_empty();
        let source = shown_source(&self.request.source);
        match Kept::find(kept) {
            Some(kept) if kept.is_at(mountpoint) => {
                // With other options it is mounted anew.
                let goes_on = kept.is_made_in(&self.way(allow_other));
                let volume = match self.open_confined(open, Opening { on_file: kept.is_file(), goes_on }) {
                    Ok(volume) => volume,
                    Err(error) => {
                        // Whoever reads in it waits, and nobody knows until when this could be opened again.
                        kept.give_up(manager);
                        return Err(error);
                    }
                };
                let handover = kept.handover();
                let keep_numbers = |file| volume.keep_numbers(file);
                match kept.attached(volume.identity().as_deref(), &self.way(allow_other), keep_numbers) {
                    Ok((fd, attached)) => {
                        tracing::info!("going on with the mount on {}", attached.mountpoint().display());
                        let attached = Some(self.watch.adopt(attached));
                        return Ok(Scene { volume, fd, attached, handover, is_taken_over: true });
                    }
                    Err(error) => {
                        tracing::warn!("{error}: files that are open in it fail, and it is mounted anew");
                        kept.give_up(manager);
                    }
                }
                return self.attach(volume, &source, allow_other);
            }
            // One that was mounted elsewhere, or is gone.
            Some(kept) => kept.give_up(manager),
            None if has_kept => takeover::forget(manager),
            None => {}
        }
        let prepared = prepare(mountpoint, &source)?;
        let volume = self.open_confined(open, Opening { on_file: prepared.is_file(), goes_on: false })?;
        self.attach(volume, &source, allow_other)
    }

    fn attach(&self, volume: Arc<dyn Volume>, source: &OsStr, allow_other: bool) -> Result<Scene, MountError> {
        let attach_request = AttachRequest {
            mountpoint: &self.request.mountpoint,
            source,
            root_kind: volume.root_kind(),
            flags: self.request.flags,
            kernel: &self.request.kernel,
            allow_other,
        };
        let (fd, attached) = self.watch.guard(|| attach(&attach_request))?;
        let is_watched = self.request.service.manager.is_there() && self.request.place == Place::Foreground;
        let handover = if is_watched { Handover::first() } else { Handover::default() };
        Ok(Scene { volume, fd, attached: Some(attached), handover, is_taken_over: false })
    }

    /// What a process must agree with that goes on with the mount.
    fn way(&self, allow_other: bool) -> String {
        let MountRequest { source, flags, kernel, service, .. } = self.request;
        takeover::way(&shown_source(source), *flags, kernel, allow_other, &service.config.show)
    }

    /// Opens on a thread that reads what came from elsewhere, and may not mount.
    fn open_confined(
        &self,
        open: impl FnOnce(&Runtime, Opening) -> Result<Arc<dyn Volume>, BoxError> + Send,
        opening: Opening,
    ) -> Result<Arc<dyn Volume>, MountError> {
        thread::scope(|scope| {
            let thread = thread::Builder::new()
                .name("open".into())
                .spawn_scoped(scope, || {
                    self.confinement.enter(Role::Worker);
                    open(self.runtime, opening)
                })
                .map_err(MountError::system("starting threads"))?;
            let opened = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            opened.map_err(MountError::Open)
        })
    }

    fn set_read_ahead(&self, attached: &Attached) {
        let kib = match self.request.service.config.ahead.kernel_bytes {
            Some(bytes) => u32::try_from(bytes >> 10).unwrap_or(u32::MAX),
            None => READ_AHEAD_KIB,
        };
        if let Err(error) = attached.set_read_ahead(kib) {
            // A user may not, and reads smaller pieces then.
            tracing::debug!("kernel read-ahead stays at its default: {error}");
        }
    }

    /// Gives the mount to the service manager to keep, for the next process.
    fn leave_to_manager(
        &self,
        volume: &Arc<dyn Volume>,
        attached: &Attached,
        handover: &Handover,
        is_taken_over: bool,
        allow_other: bool,
    ) {
        let Service { manager, config, .. } = &self.request.service;
        if !manager.is_there() {
            return;
        }
        let given = &self.request.mountpoint;
        // In the background another process than ours may be the service, with files of its own to be kept.
        let is_kept = is_taken_over
            || (self.request.place == Place::Foreground
                && takeover::keep(manager, attached, handover, given, &**volume, self.way(allow_other)));
        let handed_over = is_kept.then(|| (Arc::clone(handover.gate()), config.io_timeout));
        self.watch.set_manager(Keeping { manager: manager.clone(), handed_over });
    }

    fn tell_ready(&self, is_background: bool) -> Option<Pulse> {
        let Service { manager, report, .. } = &self.request.service;
        if is_background {
            manager.main_pid(std::process::id());
        }
        manager.ready();
        let confinement = Arc::clone(&self.confinement);
        let enter = move || confinement.enter(Role::Worker);
        let runtime = self.runtime.handle().clone();
        Pulse::start(manager, Arc::clone(report), runtime, enter, || n_session_threads() > 0)
            .inspect_err(|error| tracing::warn!("the service manager does not hear that the mount lives: {error}"))
            .ok()
    }
}

/// A mount in the care of the watch; unmounted and taken out of it on drop, however the service ends.
struct InCare {
    watch: &'static Watch,
    attached: Arc<Attached>,
}

impl Drop for InCare {
    fn drop(&mut self) {
        self.watch.tell_end();
        // Unmounted first: a signal in between finds a mount that is gone, which is no error.
        if let Err(error) = self.attached.unmount(How::LazilyWhenBusy) {
            tracing::warn!("{error}");
        }
        self.watch.release();
    }
}
