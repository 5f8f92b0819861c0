//! `caifs mount`.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use tokio::runtime::Runtime;

use super::args::MountArgs;
use crate::fuse;
use crate::mount::options::{MOUNT_OPTIONS, MountOptions, Unknown};
use crate::mount::run::{READY_TIMEOUT, Served};
use crate::mount::{BoxError, MountError, MountRequest, Place};
use crate::report::Report;
use crate::store::location::{FileLocation, Location, split_group};
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
        ready_timeout: READY_TIMEOUT,
    };
    let report = Arc::new(Report::default());
    let settings = fuse::Settings { io_timeout: options.config.io_timeout };
    let open = |runtime: &Runtime, on_file: bool| {
        let opening = open_volume(&location, &options.config, on_file, &report);
        runtime.block_on(opening).map_err(BoxError::from)
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
    let mut options = MountOptions::default();
    for list in &args.options {
        options.parse(list, Unknown::Refuse)?;
    }
    // Every flag is an option of the same name, and overrules `-o`.
    let ids = [("uid", args.uid), ("gid", args.gid)].map(|(name, id)| (name, id.map(|id| id.to_string())));
    let texts = [("memory", args.memory.clone()), ("io-timeout", args.io_timeout.clone())];
    let mut flags: Vec<(&str, Option<&str>)> =
        args.stores.iter().map(|store| ("store", Some(store.as_str()))).collect();
    flags.extend(ids.iter().chain(&texts).filter_map(|(name, value)| Some((*name, Some(value.as_deref()?)))));
    flags.extend(args.allow_other.then_some(("allow-other", None)));
    for (name, value) in flags {
        if let Some(option) = MOUNT_OPTIONS.iter().find(|option| option.name == name) {
            option.apply(&mut options.config, value)?;
        }
    }
    if options.remount {
        anyhow::bail!("a caifs mount cannot be remounted (unmount it and mount it again)");
    }
    let sources = &mut options.config.sources;
    for place in sources.stores.iter_mut().chain(&mut sources.cache) {
        *place = absolute(place)?;
    }
    let mut places = sources.stores.clone();
    if places.is_empty() {
        places.push(location.default_store());
    }
    places.extend(sources.cache.clone());
    check_not_covered(&args.mountpoint, &places)?;
    Ok(Typed { location, options })
}

/// Refuses a mountpoint that would cover a store or cache: the mount would then look for its chunks in itself.
fn check_not_covered(mountpoint: &Path, places: &[String]) -> anyhow::Result<()> {
    let Ok(mountpoint) = mountpoint.canonicalize() else { return Ok(()) };
    for member in places.iter().flat_map(|place| split_group(place)) {
        let Ok(Location::Local(store)) = Location::parse(member) else { continue };
        if store.canonicalize().is_ok_and(|store| store.starts_with(&mountpoint)) {
            let (store, mountpoint) = (store.display(), mountpoint.display());
            anyhow::bail!("a mount on {mountpoint} would cover the store {store} (mount it elsewhere)");
        }
    }
    Ok(())
}

/// A store's location that means the same from every directory: the daemon leaves the one it was started in.
fn absolute(store: &str) -> anyhow::Result<String> {
    let mut members = Vec::new();
    for member in split_group(store) {
        members.push(match Location::parse(member)? {
            Location::Local(path) => {
                let absolute = std::path::absolute::<&Path>(&path).unwrap_or(path);
                match absolute.to_str() {
                    Some(text) => text.to_owned(),
                    None => anyhow::bail!("store {store}: its path is not UTF-8"),
                }
            }
            _ => member.to_owned(),
        });
    }
    Ok(members.join("|"))
}
