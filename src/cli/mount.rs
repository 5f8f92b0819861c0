//! `caifs mount`.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use tokio::runtime::Runtime;

use super::args::MountArgs;
use super::given::Again;
use super::service::{self, Beside, Fresh};
use super::{remount, settings};
use crate::config::MountConfig;
use crate::fuse;
use crate::mount::control::MountedAt;
use crate::mount::options::{MountOptions, Unknown};
use crate::mount::run::Served;
use crate::mount::{BoxError, MountError, MountRequest, Place, shown_source};
use crate::report::Report;
use crate::store::location::{FileLocation, Location, split_group};
use crate::volume::Live;
use crate::volume::open::open_volume;

/// Exit code of mount(8) for wrong arguments.
const USAGE: u8 = 1;

pub fn run(args: MountArgs) -> ExitCode {
    let (message, exit_code) = match options(&args) {
        Err(error) => (format!("{error:#}"), USAGE),
        Ok(options) => match mount(args, options) {
            Ok(()) => return ExitCode::SUCCESS,
            Err(error) => (error.to_string(), error.exit_code()),
        },
    };
    super::complain(&message);
    ExitCode::from(exit_code)
}

fn mount(args: MountArgs, options: Typed) -> Result<(), MountError> {
    let (location, source) = match options.location.clone() {
        // A file is named by its full path in the mount table, as mount(8) does it, whatever directory it was named from.
        FileLocation::Local(path) => {
            let path = path.canonicalize().or_else(|_| std::path::absolute(&path)).unwrap_or(path);
            (FileLocation::Local(path.clone()), path.into_os_string())
        }
        elsewhere => (elsewhere, args.spec.clone().into_os_string()),
    };
    if options.options.remount {
        return remount::run(&args, shown_source(&source));
    }
    let again = options.again;
    let options = options.options;
    let request = MountRequest {
        source,
        mountpoint: args.mountpoint,
        flags: options.flags,
        allow_other: options.config.allow_other,
        place: if args.foreground { Place::Foreground } else { Place::Background },
        ready_timeout: options.config.service.mount_timeout,
    };
    let report = Arc::new(Report::default());
    let settings = fuse::Settings { io_timeout: options.config.io_timeout };
    // Opened first, then served: what the second finds here, the first has put there.
    let opened: Cell<Option<(Arc<Live>, Beside)>> = Cell::new(None);
    let open = |runtime: &Runtime, on_file: bool| -> Result<_, BoxError> {
        let beside = Beside::open(&options.config.service, &report)?;
        let volume = runtime.block_on(open_volume(&location, &options.config, on_file, &report))?;
        opened.set(Some((volume.live, beside)));
        Ok(volume.volume)
    };
    let serve = |served: Served| {
        let at = MountedAt::find(&served.fd, &request.mountpoint);
        let session = fuse::serve(served.volume, served.fd, settings, served.runtime, Arc::clone(&report))?;
        let service = opened.take().map(|(live, beside)| {
            let (source, requests, around) = (&request.source, session.requests(), Box::new(|_| {}));
            service::start(Fresh { source, at, live: &live, requests, again, around }, beside)
        });
        Ok(move || {
            let ended = session.run();
            drop(service);
            ended
        })
    };
    let ended = crate::mount::mount(&request, open, serve);
    tracing::info!(?report, "ended");
    ended.map(drop)
}

/// What was typed, read.
struct Typed {
    location: FileLocation,
    options: MountOptions,
    /// Reads the options again while they are in force.
    again: Again,
}

fn options(args: &MountArgs) -> anyhow::Result<Typed> {
    let location = FileLocation::parse(args.spec.as_os_str())?;
    if location == FileLocation::Stdio {
        anyhow::bail!("a mount cannot be read from standard input");
    }
    let options = settle(&|config| over(config, args), args.stores.access.config_file.as_deref())?;
    let again = Again::new(args)?;
    if options.remount {
        return Ok(Typed { location, options, again });
    }
    let sources = &options.config.sources;
    let mut places = sources.stores.clone();
    if places.is_empty() {
        places.push(location.default_store());
    }
    places.extend(sources.cache.clone());
    check_not_covered(&args.mountpoint, &places)?;
    Ok(Typed { location, options, again })
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
    let mut options = over(defaults)?;
    options.config = settings::finish(options.config, configuration)?;
    if let Some(cache) = typed.config.sources.cache {
        // Over one in a store file that the configuration names.
        options.config.sources.cache = Some(cache);
    }
    let sources = &mut options.config.sources;
    for store in sources.stores.iter_mut().chain(&mut sources.cache) {
        *store = settings::absolute(store)?;
    }
    let config = &mut options.config;
    let paths =
        [&mut config.config_file, &mut config.store_file, &mut config.ahead.record, &mut config.service.access_trace];
    for path in paths.into_iter().flatten() {
        // So that they are the same when they are read again from another directory.
        *path = std::path::absolute(&*path)?;
    }
    Ok(options)
}

/// Mount options, and flags, over settings. Every flag is an option of the same name, and overrules `-o`.
fn over(config: MountConfig, args: &MountArgs) -> anyhow::Result<MountOptions> {
    let mut options = MountOptions { config, ..MountOptions::default() };
    for list in &args.options {
        options.parse(list, Unknown::Refuse)?;
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

/// The path without symlinks, of what need not be there yet.
fn real_path(path: &Path) -> Option<PathBuf> {
    let path = std::path::absolute(path).ok()?;
    path.ancestors().find_map(|ancestor| {
        let real = ancestor.canonicalize().ok()?;
        Some(real.join(path.strip_prefix(ancestor).ok()?))
    })
}
