//! `caifs mount`.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use tokio::runtime::Runtime;

use super::args::MountArgs;
use super::settings;
use crate::config::MountConfig;
use crate::fuse;
use crate::mount::options::{MountOptions, Unknown};
use crate::mount::run::Served;
use crate::mount::{BoxError, MountError, MountRequest, Place};
use crate::report::Report;
use crate::store::location::{FileLocation, Location, split_group};
use crate::volume::Live;
use crate::volume::backing::AUTO;
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
    let (location, source) = match options.location {
        // A file is named by its full path in the mount table, as mount(8) does it, whatever directory it was named from.
        FileLocation::Local(path) => {
            let path = path.canonicalize().or_else(|_| std::path::absolute(&path)).unwrap_or(path);
            (FileLocation::Local(path.clone()), path.into_os_string())
        }
        elsewhere => (elsewhere, args.spec.into_os_string()),
    };
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
    let settings =
        fuse::Settings { io_timeout: options.config.io_timeout, passthrough: options.config.keep.passthrough };
    // Opened first, then served: what the second finds here, the first has put there.
    let live: OnceCell<Arc<Live>> = OnceCell::new();
    let open = |runtime: &Runtime, on_file: bool| -> Result<_, BoxError> {
        let opened = runtime.block_on(open_volume(&location, &options.config, on_file, &report))?;
        live.set(opened.live).map_err(|_| "opened twice")?;
        Ok(opened.volume)
    };
    let serve = |served: Served| {
        let session = fuse::serve(served.volume, served.fd, settings, served.runtime, Arc::clone(&report))?;
        Ok(move || session.run())
    };
    let ended = crate::mount::mount(&request, open, serve);
    tracing::info!(?report, "ended");
    ended.map(drop)
}

/// What was typed, read.
struct Typed {
    location: FileLocation,
    options: MountOptions,
}

fn options(args: &MountArgs) -> anyhow::Result<Typed> {
    let location = FileLocation::parse(args.spec.as_os_str())?;
    if location == FileLocation::Stdio {
        anyhow::bail!("a mount cannot be read from standard input");
    }
    // Read twice: first to learn which file to read, then over what the files say.
    let typed = over(MountConfig::default(), args)?;
    let config_file = args.stores.access.config_file.as_ref().or(typed.config.config_file.as_ref());
    let configuration = settings::load(config_file.map(PathBuf::as_path))?;
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
    let mut options = over(defaults, args)?;
    options.config = settings::finish(options.config, configuration)?;
    if let Some(cache) = typed.config.sources.cache {
        // Over one in a store file that the configuration names.
        options.config.sources.cache = Some(cache);
    }
    if options.remount {
        anyhow::bail!("a caifs mount cannot be remounted (unmount it and mount it again)");
    }
    let sources = &mut options.config.sources;
    for store in sources.stores.iter_mut().chain(&mut sources.cache) {
        *store = settings::absolute(store)?;
    }
    let mut places = sources.stores.clone();
    if places.is_empty() {
        places.push(location.default_store());
    }
    places.extend(sources.cache.clone());
    if let Some(file) = options.config.keep.backing.as_mut().filter(|file| *file != AUTO) {
        let absolute = std::path::absolute(&*file).with_context(|| format!("backing={file}"))?;
        *file = absolute.to_str().with_context(|| format!("backing={file}: its path is not UTF-8"))?.to_owned();
        places.push(file.clone());
    }
    check_not_covered(&args.mountpoint, &places)?;
    Ok(Typed { location, options })
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
