//! Indexes and archives as they are named on the command line: local files, files of stores, standard input and output.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use tokio::runtime::Runtime;

use super::store_flags::memory_plan;
use crate::blob::source::IndexBytes;
use crate::config::{DEFAULT_IO_TIMEOUT, SourceConfig, StoreSettings};
use crate::format::index::Index;
use crate::report::Report;
use crate::store::location::FileLocation;
use crate::store::open::open_files;
use crate::volume::sources::Sources;

/// Opens an index, wherever it lies; with what to call it.
pub fn open_index(runtime: &Runtime, typed: &OsStr, config: &SourceConfig) -> Result<(String, Index<IndexBytes>)> {
    let location = FileLocation::parse(typed)?;
    let name = location.to_string();
    let report = Arc::new(Report::default());
    let sources = Sources::open(config, &memory_plan(), DEFAULT_IO_TIMEOUT, &report)?;
    let (bytes, _) = runtime.block_on(sources.index(&location))?;
    let index = Index::open(bytes).with_context(|| name.clone())?;
    Ok((name, index))
}

/// Writes an index or archive to where it does not lie on a local disk: a store, or standard output.
pub fn write_elsewhere(
    runtime: &Runtime,
    location: &FileLocation,
    bytes: Vec<u8>,
    settings: &StoreSettings,
) -> Result<()> {
    match location {
        FileLocation::Local(path) => bail!("{}: is a local file", path.display()),
        FileLocation::Stdio => {
            let mut stdout = io::stdout().lock();
            stdout.write_all(&bytes)?;
            Ok(stdout.flush()?)
        }
        FileLocation::Remote { directory, directory_text, name } => {
            let specs = settings.resolve(directory_text)?;
            let options = specs.first().map(|spec| spec.options.clone()).unwrap_or_default();
            let files = open_files(directory, &options)?;
            Ok(runtime.block_on(files.write(name, bytes.into()))?)
        }
    }
}
