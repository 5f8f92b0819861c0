//! `caifs mount`.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use super::args::MountArgs;
use crate::mount::options::MountOptions;
use crate::mount::{self, MountError, MountRequest};
use crate::store::location::Location;

pub fn run(args: MountArgs) -> ExitCode {
    match request(args).and_then(mount::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "caifs: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn request(args: MountArgs) -> Result<MountRequest, MountError> {
    let mut options = MountOptions::default();
    for text in &args.options {
        options.parse(text)?;
    }
    // Every flag is an option of the same name, and overrules `-o`.
    let ids = [("uid", args.uid), ("gid", args.gid)].map(|(name, id)| (name, id.map(|id| id.to_string())));
    let texts = [("memory", args.memory), ("io-timeout", args.io_timeout)];
    for (name, value) in ids.into_iter().chain(texts) {
        if let Some(value) = value {
            options.set(name, Some(&value))?;
        }
    }
    for store in &args.stores {
        options.set("store", Some(store))?;
    }
    if args.allow_other {
        options.set("allow-other", None)?;
    }
    for store in &mut options.config.stores {
        *store = absolute(store)?;
    }
    // A file is named by its full path in the mount table, as mount(8) does it, whatever directory it was named from.
    let path = args.spec.canonicalize().or_else(|_| std::path::absolute(&args.spec)).unwrap_or(args.spec);
    let spec = path.to_string_lossy().into_owned();
    Ok(MountRequest { spec, path, mountpoint: args.mountpoint, options, foreground: args.foreground })
}

/// A store's location that means the same from every directory: the daemon leaves the one it was started in.
fn absolute(store: &str) -> Result<String, MountError> {
    let Location::Local(path) = Location::parse(store).map_err(|error| MountError::Usage(error.to_string()))?;
    let absolute = std::path::absolute::<&Path>(&path).unwrap_or(path);
    match absolute.to_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(MountError::Usage(format!("store {store}: its path is not UTF-8"))),
    }
}
