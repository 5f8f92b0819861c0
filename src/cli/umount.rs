//! `caifs umount`.

use std::time::Duration;

use anyhow::Result;

use super::args::UmountArgs;
use super::runtime_dir::runtime_dir;
use crate::mount::control::Serving;
use crate::mount::detach::{How, Unmounted, mounted_at, unmount};

/// How long the process of a mount may take to write what it still has: a profile, the end of a backing file, a trace.
const END_LIMIT: Duration = Duration::from_secs(30);

pub fn run(args: &UmountArgs) -> Result<()> {
    let how = if args.lazy { How::Lazily } else { How::WhenIdle };
    let mounted = mounted_at(&args.mountpoint)?;
    // Asked before: afterwards there is no way to it. What somebody still uses goes on, and is not waited for.
    let serving = if args.lazy { None } else { Serving::of(&runtime_dir(), &mounted) };
    let unmounted = unmount(mounted.id, how)?;
    if let (Unmounted::Gone, Some(Err(process))) = (unmounted, serving.map(|serving| serving.wait(END_LIMIT))) {
        tracing::warn!(
            "{} is unmounted, and its process ({process}) has not ended within {} s",
            args.mountpoint.display(),
            END_LIMIT.as_secs()
        );
    }
    Ok(())
}
