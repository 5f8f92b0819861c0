//! `caifs abort`: the end of a mount that hangs.

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::Result;

use crate::mount::abort::abort;

/// Arguments of `abort`.
#[derive(Debug, clap::Args)]
pub struct AbortArgs {
    /// The mountpoint.
    #[arg(value_name = "DIR")]
    pub mountpoint: PathBuf,
}

pub fn run(args: &AbortArgs) -> Result<()> {
    let aborted = abort(&args.mountpoint)?;
    let mountpoint = super::figures::safe(&aborted.mountpoint.to_string_lossy());
    writeln!(std::io::stdout(), "{mountpoint} is aborted and unmounted; who waited for it has an error")?;
    Ok(())
}
