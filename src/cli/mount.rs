//! `caifs mount`.

use std::ffi::OsString;
use std::io;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::runtime::Runtime;

use super::args::MountArgs;
use super::given::Again;
use super::runtime_dir::runtime_dir;
use super::service::{self, Beside, Fresh};
use super::{remount, service_environment, settings, warm};
use crate::config::MountConfig;
use crate::fuse;
use crate::mount::control::MountedAt;
use crate::mount::notify::Manager;
use crate::mount::options::{MountOption, MountOptions, Unknown};
use crate::mount::privileges::{Confinement, Role};
use crate::mount::run::{Opening, Served};
use crate::mount::sandbox::SandboxPlan;
use crate::mount::service::Descriptors;
use crate::mount::{BoxError, MountError, MountRequest, Place, Service};
use crate::report::{Report, summary};
use crate::store::location::{FileLocation, Location, split_group, without_secrets};
use crate::sys::{limit_heaps, replace_in_arguments};
use crate::volume::LiveVolume;
use crate::volume::background::Background;
use crate::volume::backing::AUTO;
use crate::volume::open::{OpenError, open_volume};
use crate::volume::prove::prove;

/// Heaps of a mount. Measured while a tree of two million files was gone through, with a budget of 256 MiB: 299 MiB resident with sixteen,
/// 241 with four, 229 with two, and sequential reads as fast with four as with sixteen.
const HEAPS: RangeInclusive<usize> = 4..=8;

/// How long the end of a mount waits for its cache.
const KEEP_LIMIT: Duration = Duration::from_secs(2);

/// Exit code of mount(8) for wrong arguments.
pub(super) const USAGE: u8 = 1;

const SEEN_IN_ARGUMENTS: &str =
    "a password among the options stays among the arguments of the process, where every user sees it";

/// Where the environment says that certificates lie, as for OpenSSL.
fn certificates() -> Vec<PathBuf> {
    let lists = ["SSL_CERT_FILE", "SSL_CERT_DIR"].map(|name| std::env::var_os(name).unwrap_or_default());
    lists.iter().flat_map(std::env::split_paths).filter(|path| path.is_absolute()).collect()
}

pub fn run(args: MountArgs) -> ExitCode {
    // Before anything is opened: what is open now is what the caller left open.
    let (manager, descriptors) = service_environment::look();
    let manager = if args.foreground { manager } else { service_environment::of_background(manager) };
    let (message, exit_code) = match options(&args, Unknown::Refuse) {
        Err(error) => {
            descriptors.give_up(&manager);
            (format!("{error:#}"), USAGE)
        }
        Ok(options) => match mount(args, options, manager, descriptors) {
            Ok(()) => return ExitCode::SUCCESS,
            Err(error) => (error.to_string(), error.exit_code()),
        },
    };
    super::complain(&message);
    ExitCode::from(exit_code)
}

/// Mounts what was typed: the one way for people and for mount(8).
pub(super) fn mount(
    args: MountArgs,
    options: Typed,
    manager: Manager,
    descriptors: Descriptors,
) -> Result<(), MountError> {
    if options.options.remount {
        return remount::run(&args, options.source, options.options.kernel);
    }
    let Typed { location, source, options, again } = options;
    hide_secrets(&args, &again);
    let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
    limit_heaps(n_cores.clamp(*HEAPS.start(), *HEAPS.end()) as u16);
    let report = Arc::new(Report::default());
    let request = MountRequest {
        source,
        mountpoint: args.mountpoint,
        flags: options.flags,
        kernel: options.kernel,
        allow_other: options.config.allow_other,
        place: if args.foreground { Place::Foreground } else { Place::Background },
        ready_timeout: options.config.service.mount_timeout,
        service: Service {
            config: options.config.clone(),
            location: Some(location.clone()),
            // Of whoever mounts, not of whom the process becomes.
            control_dir: options.config.service.control.then(runtime_dir),
            report: Arc::clone(&report),
            plan: SandboxPlan { read: certificates(), ..SandboxPlan::default() },
            manager,
            descriptors: Arc::new(Mutex::new(descriptors)),
        },
    };
    let (io_timeout, passthrough) = (options.config.io_timeout, options.config.passthrough());
    if passthrough == Some(false) && options.config.keep.passthrough == Some(true) {
        tracing::warn!("passthrough: a profile of what is read is recorded; files are read through us");
    }
    // Opened first, then served: what the second finds here, the first has put there.
    let opened: Mutex<Option<(LiveVolume, Beside)>> = Mutex::new(None);
    let open = |runtime: &Runtime, Opening { on_file, goes_on }: Opening| -> Result<_, BoxError> {
        let beside = Beside::open(&options.config.service, &report)?;
        let opening = async {
            let volume = open_volume(&location, &options.config, on_file, &report).await?;
            if !goes_on && options.config.service.check_store {
                prove(&volume.live, request.ready_timeout).await?;
            }
            Ok::<_, OpenError>(volume)
        };
        let volume = match request.place {
            // Who waits for a mount in the background looks at the clock himself.
            Place::Background => runtime.block_on(opening)?,
            Place::Foreground => runtime
                .block_on(async { tokio::time::timeout(request.ready_timeout, opening).await })
                .map_err(|_| MountError::NotReady(request.ready_timeout))??,
        };
        *opened.lock().unwrap_or_else(PoisonError::into_inner) = Some((volume.clone(), beside));
        Ok(volume.volume)
    };
    let serve = |served: Served| {
        let Served { volume, fd, runtime, handover, confinement, .. } = served;
        let at = MountedAt::find(&fd, &request.mountpoint);
        let opens_device = confined(&confinement, Role::Session, fuse::can_open_device);
        let settings = fuse::Settings { io_timeout, passthrough, opens_device };
        let session = fuse::serve(volume, fd, settings, runtime.clone(), Arc::clone(&report), &handover)
            .map_err(MountError::Serve)?;
        let opened = opened.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (opened, beside) =
            opened.ok_or_else(|| MountError::Serve(io::Error::other("served before it was opened")))?;
        let background = confined(&confinement, Role::Worker, || Background::new(&opened.live, &runtime));
        let background = background.map_err(|error| MountError::Open(error.into()))?;
        let manager = request.service.manager.clone();
        let held = Arc::clone(&confinement);
        let around = Box::new(move |begins: bool| match begins {
            true => {
                // Also where a signal asks for it: on a thread that has as much as the one that may mount.
                held.enter(Role::Control);
                // The end is told when it comes.
                std::mem::forget(manager.reloading());
            }
            false => manager.ready(),
        });
        let (held, place) = (Arc::clone(&confinement), location.clone());
        let admits = Box::new(move |config: &MountConfig| held.admits(&place, config));
        let fresh = Fresh {
            source: &request.source,
            control_dir: request.service.control_dir.as_deref(),
            at,
            live: &opened.live,
            requests: session.requests(),
            again,
            admits,
            around,
        };
        let service = confined(&confinement, Role::Control, || service::start(fresh, beside));
        let kept_by = Arc::clone(&report);
        Ok(move || {
            // Its lines are in the log, which whoever has waited for the mount does not see.
            background.begin(&opened);
            let ended = session.run();
            background.stop();
            wait_until_kept(&kept_by);
            drop(service);
            tracing::info!("ended: {}", summary(&kept_by));
            ended
        })
    };
    crate::mount::mount(&request, open, serve).map(drop)
}

/// Takes the secrets in what was typed out of the arguments, which everybody can read for as long as the mount lives.
fn hide_secrets(args: &MountArgs, again: &Again) {
    let typed = args.spec.to_str().into_iter().chain(again.values()).flat_map(split_group);
    let mut secrets: Vec<(String, String)> =
        typed.map(|text| (text.to_owned(), without_secrets(text))).filter(|(text, shown)| text != shown).collect();
    if secrets.is_empty() {
        return;
    }
    // One may be the beginning of another.
    secrets.sort_by_key(|(text, _)| std::cmp::Reverse(text.len()));
    secrets.dedup();
    match replace_in_arguments(&secrets) {
        Ok(0) => {}
        // One with commas, in quotes of other kinds than ours.
        Ok(_) => tracing::warn!("{SEEN_IN_ARGUMENTS}"),
        Err(error) => tracing::warn!("{SEEN_IN_ARGUMENTS}: {error}"),
    }
}

/// Waits until what was read last is in the cache, which happens after its reader has it; but not for a disk that hangs.
fn wait_until_kept(report: &Report) {
    let deadline = Instant::now() + KEEP_LIMIT;
    while report.being_kept.get() > 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Does something on a thread of a role: what it starts is confined as the thread that starts it.
fn confined<T: Send>(confinement: &Confinement, role: Role, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            confinement.enter(role);
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// What was typed, read.
pub(super) struct Typed {
    pub(super) location: FileLocation,
    /// What the mount table is to show, but for secrets.
    pub(super) source: OsString,
    pub(super) options: MountOptions,
    /// Reads the options again while they are in force.
    again: Again,
}

/// Reads what was typed, over what files say.
pub(super) fn options(args: &MountArgs, unknown: Unknown) -> anyhow::Result<Typed> {
    let (location, source) = named(FileLocation::parse_any(args.spec.as_os_str())?, &args.spec);
    if location == FileLocation::Stdio {
        anyhow::bail!("a mount cannot be read from standard input");
    }
    let options = settle(&|config| over(config, args, unknown), args.stores.access.config_file.as_deref())?;
    let again = Again::new(args)?;
    if options.remount {
        // What they mean over those in force, the service knows.
        return Ok(Typed { location, source, options, again });
    }
    let sources = &options.config.sources;
    sources.check()?;
    let mut places = sources.stores.clone();
    if places.is_empty() && !location.is_directory() {
        places.push(location.default_store());
    }
    places.extend(sources.cache.clone());
    places.extend(options.config.keep.backing.clone().filter(|file| file != AUTO));
    check_not_covered(&args.mountpoint, &places)?;
    check_apart(&args.mountpoint, &location)?;
    Ok(Typed { location, source, options, again })
}

/// What options mean that `over` puts over settings: over those of the configuration file named, or of the usual ones.
pub(super) fn settle(
    over: &dyn Fn(MountConfig) -> anyhow::Result<MountOptions>,
    config_file: Option<&Path>,
) -> anyhow::Result<MountOptions> {
    // Read twice: first to learn which file to read, then over what the files say.
    let typed = over(MountConfig::default())?;
    let configuration = settings::load(config_file.or(typed.config.config_file.as_deref()))?;
    let mut defaults = settings::mount_defaults(&configuration)?;
    if !typed.config.sources.stores.is_empty() {
        // Stores that were typed stand in place of those of a file, and do not come after them.
        defaults.sources.stores.clear();
        defaults.store_file = None;
    }
    if typed.config.store_file.is_some() {
        if !typed.config.sources.stores.is_empty() || typed.config.sources.cache.is_some() {
            anyhow::bail!("store-file names the stores and the cache: it does not go with store or cache");
        }
        defaults.sources.stores.clear();
    }
    let of_files = configuration.mount.iter().filter_map(|entry| {
        let option = MountOption::find(&entry.name)?;
        Some((option.name, entry.value.clone()))
    });
    let mut options = over(defaults)?;
    options.given.splice(0..0, of_files);
    options.config = settings::finish(options.config, configuration)?;
    if let Some(cache) = typed.config.sources.cache {
        // Over one in a store file that the configuration names.
        options.config.sources.cache = Some(cache);
    }
    let sources = &mut options.config.sources;
    for store in sources.stores.iter_mut().chain(&mut sources.cache) {
        *store = settings::absolute(store)?;
    }
    warm::make_absolute(&mut options.config.ahead)?;
    let config = &mut options.config;
    let paths = [&mut config.config_file, &mut config.store_file, &mut config.service.access_trace];
    for path in paths.into_iter().flatten() {
        // So that they are the same when they are read again from another directory.
        *path = std::path::absolute(&*path)?;
    }
    if let Some(file) = config.keep.backing.as_mut().filter(|file| *file != AUTO) {
        let absolute = std::path::absolute(&*file).with_context(|| format!("backing={file}"))?;
        *file = absolute.to_str().with_context(|| format!("backing={file}: its path is not UTF-8"))?.to_owned();
    }
    Ok(options)
}

/// The location to open, and its name in the mount table: what mount(8) takes for the same when it looks whether a line of fstab is
/// mounted. That is the full path of a file, whatever directory and symlinks it was named by, and any other text as it is.
fn named(location: FileLocation, typed: &Path) -> (FileLocation, OsString) {
    let FileLocation::Local(path) = location else { return (location, typed.into()) };
    let full = path.canonicalize().or_else(|_| std::path::absolute(&path)).unwrap_or(path);
    let is_url = typed.to_str().is_some_and(|text| text.contains("://"));
    let source = if is_url { typed.into() } else { full.clone().into_os_string() };
    (FileLocation::Local(full), source)
}

/// Mount options, and flags, over settings. Every flag is an option of the same name, and overrules `-o`.
fn over(config: MountConfig, args: &MountArgs, unknown: Unknown) -> anyhow::Result<MountOptions> {
    let mut options = MountOptions { config, ..MountOptions::default() };
    for list in &args.options {
        options.parse(list, unknown)?;
    }
    let mut given = args.stores.given();
    given.extend(args.mount_options.given());
    settings::apply(&given, &mut options.config)?;
    Ok(options)
}

/// Refuses a mountpoint that would cover a store or cache: the mount would then look for its chunks in itself.
fn check_not_covered(mountpoint: &Path, places: &[String]) -> anyhow::Result<()> {
    let Ok(mountpoint) = mountpoint.canonicalize() else { return Ok(()) };
    for member in places.iter().flat_map(|place| split_group(place)) {
        let Ok(Location::Local(store)) = Location::parse(member) else { continue };
        if real_path(&store).is_some_and(|store| store.starts_with(&mountpoint)) {
            let (store, mountpoint) = (store.display(), mountpoint.display());
            anyhow::bail!("a mount on {mountpoint} would cover the store {store} (mount it elsewhere)");
        }
    }
    Ok(())
}

/// Refuses to mount a directory of indexes on itself, above itself or in itself: the mount would then look for indexes in itself.
fn check_apart(mountpoint: &Path, location: &FileLocation) -> anyhow::Result<()> {
    let FileLocation::Local(directory) = location else { return Ok(()) };
    let (Ok(mountpoint), Ok(directory)) = (mountpoint.canonicalize(), directory.canonicalize()) else { return Ok(()) };
    if directory.is_dir() && (mountpoint.starts_with(&directory) || directory.starts_with(&mountpoint)) {
        let (directory, mountpoint) = (directory.display(), mountpoint.display());
        anyhow::bail!("{mountpoint} and the directory of indexes {directory} lie in each other (mount it elsewhere)");
    }
    Ok(())
}

/// The path without symlinks, of what need not be there yet.
fn real_path(path: &Path) -> Option<PathBuf> {
    let path = std::path::absolute(path).ok()?;
    path.ancestors().find_map(|ancestor| {
        let real = ancestor.canonicalize().ok()?;
        Some(real.join(path.strip_prefix(ancestor).ok()?))
    })
}
