//! `caifs umount`.

use anyhow::Result;

use super::args::UmountArgs;
use crate::mount::detach::{How, unmount_path};

pub fn run(args: &UmountArgs) -> Result<()> {
    let how = if args.lazy { How::Lazily } else { How::WhenIdle };
    unmount_path(&args.mountpoint, how)?;
    Ok(())
}
