//! `caifs warm`: makes a cache keep content before it is read.

use std::ffi::{OsStr, OsString};
use std::future::Future;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::runtime::Runtime;

use super::output::progress_bar;
use super::settings;
use super::store_flags::{StoreFlags, memory_plan};
use crate::cache::background::Pace;
use crate::config::units::parse_size;
use crate::config::{AheadConfig, MountConfig};
use crate::report::Report;
use crate::store::location::FileLocation;
use crate::tree::table::build::Pace as TablePace;
use crate::volume::Part;
use crate::volume::open::{Opened, SpecKind, open_blob};
use crate::volume::table::{self, Made};
use crate::volume::warm::{self, ByteRange, Tally, Warming, Wish, work};

/// How often the progress is shown.
const SHOW_EVERY: Duration = Duration::from_millis(200);

/// How often it is looked whether all that was fetched has been kept.
const KEPT_EVERY: Duration = Duration::from_millis(2);

/// Arguments of `warm`.
#[derive(Debug, clap::Args)]
pub struct WarmArgs {
    /// A .caibx, .caidx or .catar file.
    #[arg(value_name = "SPEC")]
    pub spec: PathBuf,
    /// Files and directories of the archive, with :START-END for a part of a file [default: everything].
    #[arg(value_name = "PATH")]
    pub paths: Vec<OsString>,
    /// These bytes of a disk image, as 0-64M or 1G- (repeatable).
    #[arg(long, value_name = "START-END", conflicts_with = "paths")]
    pub range: Vec<String>,
    /// All metadata of the archive: names, attributes and where content lies.
    #[arg(long)]
    pub metadata: bool,
    /// The most bytes to fetch in a second.
    #[arg(long, value_name = "SIZE")]
    pub rate: Option<String>,
    /// Where to find the chunks, and the cache.
    #[command(flatten)]
    pub stores: StoreFlags,
}

pub fn run(args: &WarmArgs) -> Result<()> {
    let mut wishes = wishes(args)?;
    let pace = match &args.rate {
        None => None,
        Some(rate) => match parse_size(rate).filter(|rate| *rate > 0) {
            Some(rate) => Some(Arc::new(Pace::new(Some(rate)))),
            None => bail!("--rate: {rate:?} is not a size above 0 (of a second), such as 4M"),
        },
    };
    let location = FileLocation::parse(args.spec.as_os_str())?;
    let MountConfig { sources, io_timeout, .. } = settings::of_reading(&args.stores)?;
    let report = Arc::new(Report::default());
    let runtime = Runtime::new().context("cannot start")?;
    let opened = runtime.block_on(open_blob(&location, &sources, &memory_plan(), io_timeout, &report))?;
    let name = location.to_string();
    match (opened.kind, &args.paths[..]) {
        (SpecKind::BlobIndex, [_, ..]) => bail!("{name}: a disk image has no files (name a part of it with --range)"),
        (SpecKind::BlobIndex, []) if args.metadata => bail!("{name}: a disk image has no metadata"),
        (SpecKind::ArchiveIndex | SpecKind::Archive, _) if !args.range.is_empty() => {
            bail!("{name}: --range is for disk images (name a part of a file as PATH:START-END)")
        }
        _ => {}
    }
    runtime.block_on(warm::check(&opened.blob)).with_context(|| name.clone())?;
    let (warming, tally) = (Warming { pace, ..Warming::default() }, Tally::default());
    if args.metadata && opened.tables.can_keep() {
        // On its way it reads all metadata, and what it leaves behind answers for all of it.
        let of_table = Opened { blob: opened.blob.for_purpose(warming.purpose(true)), ..opened.clone() };
        let going_on: TablePace = Box::new(|_| Box::pin(std::future::ready(true)));
        let (Made::Kept { n_nodes } | Made::New { n_nodes }) =
            runtime.block_on(table::make(&of_table, &memory_plan(), going_on))?;
        let (n_bytes, n_requests) = (report.fetched_bytes.get(), report.n_fetches.get());
        let what = format!("all metadata, in a table of {n_nodes} files");
        writeln!(io::stdout(), "{name}: {what}: {n_bytes} bytes fetched in {n_requests} requests")?;
        wishes.retain(|wish| !matches!(wish, Wish::Metadata));
        if wishes.is_empty() {
            return Ok(());
        }
    }
    let (path, opening, kind, blob) = (Vec::new(), Arc::default(), opened.kind, opened.blob);
    let part = Part { path, number: 0, opening, location, kind, blob, tree: None };
    let ranges = runtime.block_on(showing_progress(&tally, warm::warm(&part, &wishes, &warming, &tally)))?;
    let (n_bytes, n_requests) = (report.fetched_bytes.get(), report.n_fetches.get());
    let (n_fetched, n_present, n_failed) = (tally.n_fetched.get(), tally.n_present.get(), tally.n_failed.get());
    let n_chunks = n_fetched + n_present + n_failed;
    let summary = match wishes[..] {
        // It is read as a reader reads it, who does not know of chunks.
        [Wish::Metadata] => format!("all metadata: {n_bytes} bytes fetched in {n_requests} requests"),
        _ => format!(
            "{n_chunks} chunks: {n_fetched} fetched ({n_bytes} bytes in {n_requests} requests), {n_present} there already"
        ),
    };
    writeln!(io::stdout(), "{name}: {summary}")?;
    if n_failed > 0 {
        bail!("{name}: {n_failed} could not be had: {}", tally.failures().join("; "));
    }
    // What was read on the way to a path is kept after that.
    while report.being_kept.get() > 0 {
        std::thread::sleep(KEPT_EVERY);
    }
    // A cache that is too small has evicted the first again, or has not taken the last.
    let mut n_lost = 0;
    for range in ranges {
        n_lost += runtime.block_on(work::n_not_kept(&part.blob, range))?;
    }
    if n_lost > 0 {
        bail!(
            "{name}: {n_lost} of the chunks are not in the cache (it is too small, see --cache-size, or cannot be written)"
        );
    }
    Ok(())
}

fn wishes(args: &WarmArgs) -> Result<Vec<Wish>> {
    let mut wishes: Vec<Wish> = args.paths.iter().map(|path| Wish::path(path.as_bytes())).collect();
    for text in &args.range {
        let range = ByteRange::parse(text);
        let range = range.with_context(|| format!("--range: {text:?} is not a range such as 0-64M, 1G-2G or 1G-"))?;
        wishes.push(Wish::Path { path: Vec::new(), range: Some(range) });
    }
    if args.metadata {
        wishes.push(Wish::Metadata);
    }
    if wishes.is_empty() {
        wishes.push(Wish::All);
    }
    Ok(wishes)
}

/// Waits for some work, with a bar meanwhile.
async fn showing_progress<T>(tally: &Tally, work: impl Future<Output = T>) -> T {
    let bar = progress_bar(0);
    let mut work = std::pin::pin!(work);
    let done = loop {
        match tokio::time::timeout(SHOW_EVERY, &mut work).await {
            Ok(done) => break done,
            Err(_) => {
                bar.set_length(tally.total_bytes.get());
                bar.set_position(tally.done_bytes.get());
            }
        }
    };
    bar.finish_and_clear();
    done
}

/// Paths of a mount's settings as they are from every directory: a daemon leaves the one it was started in.
pub fn make_absolute(config: &mut AheadConfig) -> Result<()> {
    if let Some(record) = &mut config.record {
        *record = std::path::absolute(&record).with_context(|| format!("record {}", record.display()))?;
    }
    if let Some(profile) = &mut config.profile
        && profile != "no"
    {
        let location = FileLocation::parse(OsStr::new(profile.as_str()))?;
        if let FileLocation::Local(path) = location {
            let path = std::path::absolute(&path).with_context(|| format!("profile {profile}"))?;
            *profile = path.into_os_string().into_string().ok().context("profile: its path is not UTF-8")?;
        }
    }
    Ok(())
}
