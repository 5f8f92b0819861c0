//! `mount -o remount`: other options for a mount that is there.

use std::ffi::OsString;

use super::args::MountArgs;
use super::given;
use super::runtime_dir::runtime_dir;
use crate::mount::MountError;
use crate::mount::options::{KernelOptions, MountOption};
use crate::mount::remount::{Remount, remount};

/// Exit code of mount(8) for wrong arguments.
const USAGE: u8 = 1;

/// Changes the mount that the arguments name, which is of this source. `kernel` is what they say to the kernel.
pub fn run(args: &MountArgs, source: OsString, kernel: KernelOptions) -> Result<(), MountError> {
    let wrong = |error: anyhow::Error| MountError::Reported { exit_code: USAGE, reason: format!("{error:#}") };
    let all = given::all(args).map_err(wrong)?;
    let is_own = |name: &str| MountOption::find(name).is_some();
    let wanted = Remount {
        mountpoint: args.mountpoint.clone(),
        source: Some(source),
        flags: all.iter().filter(|(name, _)| !is_own(name)).map(|(name, _)| name.clone()).collect(),
        kernel,
        options: given::own(&all),
    };
    let changed = remount(&runtime_dir(), &wanted)?;
    tracing::info!("{}", super::reload::text(&changed).trim_end());
    for change in &changed.fixed {
        // Of the configuration, that is: what was asked for here and cannot be is an error.
        tracing::info!("{} holds as it was until the next mount", change.name);
    }
    Ok(())
}
