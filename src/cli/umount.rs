//! `caifs umount`.

use anyhow::Result;

use super::args::UmountArgs;
use crate::mount;

pub fn run(args: &UmountArgs) -> Result<()> {
    let how = if args.lazy { mount::How::Lazy } else { mount::How::WhenIdle };
    mount::unmount(&args.mountpoint, how)?;
    Ok(())
}
