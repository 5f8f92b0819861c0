//! `remount`: other flags of the kernel, and other options, for a mount that is served already. No second service is started.
//!
//! Flags such as `noexec` are of the mount, and the kernel changes them; options of our own are put over those in force by the service itself.
//! Invariant: options that cannot change, and flags that this user may not change, are refused, and then nothing changed.

use std::path::{Path, PathBuf};

use caps::Capability;
use nix::errno::Errno;
use nix::mount::MsFlags;

use super::MountError;
use super::attach::knows_labels;
use super::control::client::{ask_place, place_of};
use super::control::paths::find;
use super::control::protocol::{Changed, RefusalKind};
use super::control::{ControlError, Reply, Request};
use super::options::{KernelOptions, VfsFlags};
use super::privileges::has_cap;
use super::reload::Given;
use super::source::shown_source;
use super::table::MountTable;
use crate::config::units::parse_switch;

/// What is to be another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remount {
    /// Where.
    pub mountpoint: PathBuf,
    /// What is to be mounted there, as it was given or as mount tables show it; nothing else is changed.
    pub source: Option<std::ffi::OsString>,
    /// Flags by the names that options have, in their order.
    pub flags: Vec<String>,
    /// What the kernel is told beside them, which cannot change.
    pub kernel: KernelOptions,
    /// Options of our own.
    pub options: Vec<Given>,
}

/// Changes a mount.
///
/// # Errors
/// Nothing of ours is there, or another source; an option cannot change; the service does not answer; the kernel refuses.
pub fn remount(runtime_dir: &Path, wanted: &Remount) -> Result<Changed, MountError> {
    let table = MountTable::read().map_err(MountError::Table)?;
    let problem = |problem: &str| MountError::mountpoint(&wanted.mountpoint, problem);
    let entry = match find(&table, &wanted.mountpoint) {
        Ok(Some((entry, true))) => entry,
        Ok(Some((_, false)) | None) => {
            return Err(problem("nothing of caifs is mounted there, so it cannot be remounted"));
        }
        Err(error) => return Err(problem(&error.to_string())),
    };
    if let Some(source) = &wanted.source {
        let shown = shown_source(source);
        // What mount(8) hands over is shown already, unless it comes from fstab; a user without a password would be left out as a token.
        if *source != entry.source && shown != entry.source {
            let reason = format!("{} is mounted there, and not {}", entry.source.display(), shown.display());
            return Err(problem(&reason));
        }
    }
    if let Some(name) = wanted.kernel.lacking(&entry.super_options, knows_labels()) {
        let reason = format!("nothing is changed: {name} cannot change while mounted (unmount and mount again)");
        return Err(MountError::Reported { exit_code: 1, reason });
    }
    let flags = VfsFlags::over_shown(&entry.options, &wanted.flags);
    let has_other_flags = flags != VfsFlags::over_shown(&entry.options, &[]);
    if has_other_flags && !has_cap(Capability::CAP_SYS_ADMIN) {
        return Err(problem("only root can change flags of a mount"));
    }
    let mut changed = Changed::default();
    let options: Vec<Given> =
        wanted.options.iter().filter(|given| !is_shown(given, &entry.super_options)).cloned().collect();
    if !options.is_empty() {
        let is_without_socket = options.iter().any(is_without_socket);
        let request = Request::Remount { options };
        let place = place_of(runtime_dir, &wanted.mountpoint).map_err(no_answer)?;
        match ask_place(runtime_dir, &place, &request) {
            Ok(Reply::Changed(reply)) => changed = reply,
            Ok(_) => {}
            // mount(8) hands over the whole line of fstab, whatever of it is to change.
            Err(ControlError::NoSocket { .. }) if is_without_socket => {
                tracing::warn!(
                    "options of caifs itself hold as they were: with control=no nobody can be asked to change them"
                );
            }
            Err(error) => return Err(no_answer(error)),
        }
    }
    if has_other_flags {
        let how = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | flags.kernel();
        // Of the mountpoint only the way to it is followed: the kernel asks the file system nothing.
        let done = nix::mount::mount(None::<&str>, &entry.mountpoint, None::<&str>, how, None::<&str>);
        match done {
            Ok(()) => {}
            Err(Errno::EPERM) => return Err(problem("only root can change flags of a mount")),
            Err(error) => return Err(MountError::Kernel(error.into())),
        }
    }
    Ok(changed)
}

/// Whether an option asks for what the mount table shows of the mount. mount(8) hands that back where fstab does not have the mount, and it
/// cannot change, so that asking for it would be refused.
fn is_shown((name, value): &Given, shown: &str) -> bool {
    let is_yes = value.as_deref().is_none_or(|value| parse_switch(value) == Some(true));
    name.replace('_', "-") == "allow-other" && is_yes && shown.split(',').any(|option| option == "allow_other")
}

/// Whether an option says that the mount has no control socket.
fn is_without_socket((name, value): &Given) -> bool {
    name == "control" && value.as_deref().and_then(parse_switch) == Some(false)
}

fn no_answer(error: ControlError) -> MountError {
    match error {
        ControlError::Refused(refusal) if refusal.kind == RefusalKind::Fixed => {
            MountError::Reported { exit_code: 1, reason: refusal.message }
        }
        ControlError::Refused(refusal) => MountError::Reported { exit_code: 32, reason: refusal.message },
        error => MountError::Background(format!("options of caifs itself need its control socket: {error}")),
    }
}
