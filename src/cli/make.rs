//! `caifs make`, and what it shares with `tar`: how content is cut and where chunks go.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use tokio::runtime::Runtime;

use super::args::{CutFlags, MakeArgs};
use super::output::progress_bar;
use super::places::write_elsewhere;
use super::settings;
use super::store_flags::AccessFlags;
use crate::chunk::chunker::CutRule;
use crate::chunk::sizes::parse_kib;
use crate::pack::make::{make, make_index};
use crate::pack::{MakeOptions, Progress};
use crate::store::WriteStore;
use crate::store::location::{FileLocation, without_secrets};
use crate::store::open::open_writable;

/// Levels that zstd has.
const LEVELS: std::ops::RangeInclusive<i32> = -131072..=22;

pub fn run(args: &MakeArgs) -> Result<()> {
    let n_bytes = args.file.metadata().map_or(0, |metadata| metadata.len());
    let bar = progress_bar(n_bytes);
    let mut options = make_options(&args.cut, args.store.as_deref(), &args.access)?;
    options.progress = Some(report_to(&bar));
    let stats = match FileLocation::parse(args.index.as_os_str())? {
        FileLocation::Local(path) => make(&path, &args.file, &options)?,
        elsewhere => {
            let (bytes, stats) = make_index(&args.file, &options)?;
            let runtime = Runtime::new().context("cannot start")?;
            write_elsewhere(&runtime, &elsewhere, bytes, &settings::of_access(&args.access, args.cut.concurrency)?)?;
            stats
        }
    };
    bar.finish_and_clear();
    if args.print_stats {
        writeln!(io::stderr(), "{}", stats.desync_json())?;
    }
    Ok(())
}

/// A progress report that moves a bar.
pub fn report_to(bar: &indicatif::ProgressBar) -> Progress {
    let bar = bar.clone();
    Arc::new(move |n_bytes| bar.set_position(n_bytes))
}

/// What the flags mean.
pub fn make_options(cut: &CutFlags, store: Option<&str>, access: &AccessFlags) -> Result<MakeOptions> {
    let rule = match cut.cut_rule.as_str() {
        "casync" => CutRule::Casync,
        "desync" => CutRule::Desync,
        other => bail!("unknown cut rule '{other}' (use casync or desync)"),
    };
    if !LEVELS.contains(&cut.level) {
        bail!("compression level {} is not one of {} to {}", cut.level, LEVELS.start(), LEVELS.end());
    }
    let store: Option<Arc<dyn WriteStore>> = match store {
        Some(text) => {
            let settings = settings::of_access(access, cut.concurrency)?;
            match settings.resolve(text)?.as_slice() {
                [spec] => Some(open_writable(&spec.location, &spec.options)?),
                _ => bail!("{}: a group of mirrors can only be read", without_secrets(text)),
            }
        }
        None => None,
    };
    Ok(MakeOptions {
        sizes: parse_kib(&cut.chunk_size)?,
        rule,
        digest: cut.digest.parse().map_err(|error: String| anyhow!(error))?,
        store,
        level: cut.level,
        n_threads: cut.concurrency.unwrap_or(0),
        ..MakeOptions::default()
    })
}

/// Refuses a name whose suffix says something else than what is made.
pub fn check_suffix(path: &Path, made: &str) -> Result<()> {
    let suffix = path.extension().and_then(|suffix| suffix.to_str());
    match suffix {
        Some(known @ ("catar" | "caidx" | "caibx")) if known != made => {
            bail!("{}: what is made is a .{made}, not a .{known}", path.display())
        }
        _ => Ok(()),
    }
}
