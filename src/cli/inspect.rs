//! `caifs info`, `list-chunks` and `verify-index`: looking at an index.

use std::io::{self, BufWriter, Write};
use std::sync::Arc;

use anyhow::{Context, Result};
use tokio::runtime::Runtime;

use super::args::{InfoArgs, ListChunksArgs, VerifyIndexArgs};
use super::make::report_to;
use super::output::progress_bar;
use super::places::open_index;
use super::settings;
use crate::pack::inspect::{self, InfoSources};
use crate::store::Store;
use crate::store::open::open_stores;

/// Chunks asked for at the same time.
const N_CONCURRENT: usize = 10;

pub fn info(args: &InfoArgs) -> Result<()> {
    let runtime = Runtime::new().context("cannot start")?;
    let configured = settings::of_stores(&args.stores)?;
    let (name, index) = open_index(&runtime, args.index.as_os_str(), &configured)?;
    let opened = |texts: &[String]| -> Result<Option<Arc<dyn Store>>> {
        let groups: Result<Vec<_>, _> = texts.iter().map(|text| configured.settings.resolve(text)).collect();
        Ok(if texts.is_empty() { None } else { Some(open_stores(&groups?)?) })
    };
    let store = opened(&configured.stores)?;
    let cache = opened(configured.cache.as_slice())?;
    let sources = InfoSources {
        store: store.as_deref(),
        cache: cache.as_deref(),
        seed_ids: None,
        chunk_infos: &[],
        n_concurrent: N_CONCURRENT,
    };
    let info = runtime.block_on(inspect::info(&name, &index, sources))?;
    let text = if args.format == "plain" { info.plain() } else { info.json() };
    Ok(writeln!(io::stdout(), "{}", text.trim_end())?)
}

pub fn list_chunks(args: &ListChunksArgs) -> Result<()> {
    let runtime = Runtime::new().context("cannot start")?;
    let (name, index) = open_index(&runtime, args.index.as_os_str(), &settings::of_index(&args.trust, &args.access)?)?;
    let mut out = BufWriter::new(io::stdout().lock());
    // Through an error of our own kind, so that a reader that goes away is told from other failures.
    for item in index.items() {
        let item = item.with_context(|| name.clone())?;
        writeln!(out, "{}", item.id)?;
    }
    Ok(out.flush()?)
}

pub fn verify_index(args: &VerifyIndexArgs) -> Result<()> {
    let runtime = Runtime::new().context("cannot start")?;
    let (name, index) = open_index(&runtime, args.index.as_os_str(), &settings::of_index(&args.trust, &args.access)?)?;
    let bar = progress_bar(index.blob_size());
    let progress = report_to(&bar);
    inspect::verify_index(&name, &index, &args.file, args.concurrency.unwrap_or(0), Some(&progress))?;
    bar.finish_and_clear();
    Ok(())
}
