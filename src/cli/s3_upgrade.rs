//! `caifs s3-upgrade`: from the flat layout of early desync to today's.

use std::io::{self, Write};

use anyhow::{Context, Result, bail};
use tokio::runtime::Runtime;

use super::args::S3UpgradeArgs;
use super::settings;
use crate::store::location::Location;
use crate::store::object::BucketStore;
use crate::store::object::upgrade::upgrade;

pub fn run(args: &S3UpgradeArgs, verbose: u8) -> Result<()> {
    let mut specs = settings::of_access(&args.access, Some(args.concurrency))?.resolve(&args.store)?;
    let (Some(spec), true) = (specs.pop(), specs.is_empty()) else {
        bail!("s3-upgrade takes one store, not a group of them");
    };
    let Location::S3(location) = &spec.location else {
        bail!("{}: not a store in S3 (s3+https://host/bucket/prefix)", spec.location);
    };
    let store = BucketStore::s3(location, &spec.options)?;
    let runtime = Runtime::new().context("cannot start")?;
    let done = runtime.block_on(upgrade(&store))?;
    if verbose > 0 {
        writeln!(io::stderr(), "{} chunks moved, {} other objects left alone", done.n_moved, done.n_others)?;
    }
    Ok(())
}
