//! `caifs tar`: a directory as an archive, or as an index and chunks.

use std::fs::File;
use std::io::{self, BufWriter, ErrorKind, IntoInnerError, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use tokio::runtime::Runtime;

use super::args::TarArgs;
use super::make::{check_suffix, make_options};
use super::output::progress_bar;
use super::places::write_elsewhere;
use super::settings;
use crate::blob::{Blob, FileBlob};
use crate::chunk::chunker::CutRule;
use crate::format::catar::FeatureFlags;
use crate::format::table::Binding;
use crate::pack::output::{AtomicFile, write_atomically};
use crate::pack::sink::{INDEX_MODE, Sink};
use crate::pack::tar::{TarOptions, tar, tar_with_table};
use crate::pack::{self, PackError};
use crate::store::location::FileLocation;
use crate::store::open::open_files;
use crate::tree::table::pack::TablePacker;
use crate::volume::table;

/// Mode of an archive, before the umask.
const ARCHIVE_MODE: u32 = 0o666;

pub fn run(args: &TarArgs) -> Result<()> {
    let mut options = make_options(&args.cut, args.store.as_deref(), &args.access)?;
    let feature_flags = feature_flags(args, options.rule)?.with_digest(options.digest);
    let tar_options = TarOptions { feature_flags, one_file_system: args.one_file_system, no_time: args.no_time };
    let bar = progress_bar(0);
    bar.set_style(indicatif::ProgressStyle::with_template("{bytes} {bytes_per_sec}").unwrap_or_else(|_| bar.style()));
    let out = FileLocation::parse(args.out.as_os_str())?;
    let mut table = Table::begin(args, &out)?;
    if args.index {
        check_suffix(&args.out, "caidx")?;
        options.feature_flags = Some(feature_flags.0);
        options.progress = Some(super::make::report_to(&bar));
        let mut sink = Sink::new(&options)?;
        tar_with_table(&args.source, &tar_options, &mut sink, table.packer.as_mut())?;
        let (index, stats) = sink.finish()?;
        let binding = table::binding_of_index(&index, stats.blob_bytes);
        match &out {
            FileLocation::Local(path) => write_atomically(path, &index, INDEX_MODE)?,
            elsewhere => {
                let runtime = Runtime::new().context("cannot start")?;
                let settings = settings::of_access(&args.access, args.cut.concurrency)?;
                write_elsewhere(&runtime, elsewhere, index, &settings)?;
            }
        }
        table.publish(args, &out, binding)?;
        bar.finish_and_clear();
        if args.print_stats {
            writeln!(io::stderr(), "{}", stats.desync_json())?;
        }
        return Ok(());
    }
    check_suffix(&args.out, "catar")?;
    if let FileLocation::Remote { .. } = out {
        bail!(
            "{}: an archive is written to a local file (then copy it, or use -i to store chunks)",
            args.out.display()
        );
    }
    if args.out == Path::new("-") {
        let mut out = BufWriter::new(Output::new(Path::new("stdout"), io::stdout().lock()));
        let done = tar(&args.source, &tar_options, &mut out).map_err(anyhow::Error::from);
        let done = done.and_then(|_| Ok(out.flush()?));
        if out.get_ref().reader_left {
            return Err(io::Error::from(ErrorKind::BrokenPipe).into());
        }
        done?;
    } else if args.out.metadata().is_ok_and(|metadata| !metadata.is_file()) {
        let file = File::options().write(true).open(&args.out).with_context(|| args.out.display().to_string())?;
        let mut out = BufWriter::new(Output::new(&args.out, file));
        tar(&args.source, &tar_options, &mut out)?;
        out.flush()?;
    } else {
        let file = Output::new(&args.out, AtomicFile::create(&args.out, ARCHIVE_MODE)?);
        let mut to = BufWriter::with_capacity(1 << 20, file);
        tar_with_table(&args.source, &tar_options, &mut to, table.packer.as_mut())?;
        to.into_inner().map_err(IntoInnerError::into_error)?.inner.commit()?;
        if table.packer.is_some() {
            let archive = FileBlob::open(&args.out).with_context(|| args.out.display().to_string())?;
            let mtime = args.out.metadata().and_then(|metadata| metadata.modified())?;
            let runtime = Runtime::new().context("cannot start")?;
            let binding = runtime.block_on(table::binding(&Blob::File(archive), mtime))?;
            table.publish(args, &out, binding)?;
        }
    }
    bar.finish_and_clear();
    Ok(())
}

/// The metadata table, if one is wanted.
struct Table {
    packer: Option<TablePacker>,
}

impl Table {
    fn begin(args: &TarArgs, out: &FileLocation) -> Result<Self> {
        if !args.metadata_table {
            return Ok(Self { packer: None });
        }
        let is_no_file = args.out.metadata().is_ok_and(|metadata| !metadata.is_file());
        match out {
            FileLocation::Local(_) if is_no_file => bail!("{}: a table lies beside a file only", args.out.display()),
            FileLocation::Local(path) => Ok(Self { packer: Some(pack::table::begin(Some(path))?) }),
            FileLocation::Remote { .. } => Ok(Self { packer: Some(pack::table::begin(None)?) }),
            FileLocation::Stdio => bail!("--metadata-table needs a name for the table to lie beside, and - is none"),
        }
    }

    /// Puts the table beside what it belongs to, which is there.
    fn publish(self, args: &TarArgs, out: &FileLocation, binding: Binding) -> Result<()> {
        let Some(packer) = self.packer else { return Ok(()) };
        match out {
            FileLocation::Remote { directory, directory_text, name } => {
                let settings = settings::of_access(&args.access, args.cut.concurrency)?;
                let options = settings.resolve(directory_text)?.first().map(|spec| spec.options.clone());
                let files = open_files(directory, &options.unwrap_or_default())?;
                let bytes = pack::table::bytes(packer, binding)?;
                let runtime = Runtime::new().context("cannot start")?;
                Ok(runtime.block_on(files.write(&format!("{name}{}", table::TABLE_SUFFIX), bytes))?)
            }
            _ => Ok(pack::table::publish(packer, binding, &args.out)?),
        }
    }
}

/// Where an archive goes: its errors have its name, and a reader that went away is known.
struct Output<'a, W> {
    name: &'a Path,
    inner: W,
    reader_left: bool,
}

impl<'a, W: Write> Output<'a, W> {
    fn new(name: &'a Path, inner: W) -> Self {
        Self { name, inner, reader_left: false }
    }

    fn named(&mut self, error: &io::Error) -> io::Error {
        self.reader_left |= error.kind() == ErrorKind::BrokenPipe;
        io::Error::other(PackError::file(self.name, error))
    }
}

impl<W: Write> Write for Output<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.inner.write(bytes) {
            // Asked again by the caller.
            Err(error) if error.kind() == ErrorKind::Interrupted => Err(error),
            written => written.map_err(|error| self.named(&error)),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush().map_err(|error| self.named(&error))
    }
}

/// What to store, as casync's `--with` and `--without` say it: `--with` replaces the default, `--without` takes away.
fn feature_flags(args: &TarArgs, rule: CutRule) -> Result<FeatureFlags> {
    let named = |names: &[String]| {
        names.iter().try_fold(FeatureFlags(0), |flags, name| FeatureFlags::parse(name).map(|more| flags.with(more)))
    };
    // Facts of how it is made, and not of what is stored.
    let how = FeatureFlags::EXCLUDE_NODUMP.with(FeatureFlags::EXCLUDE_FILE);
    let base = match (args.with.is_empty(), rule) {
        (true, CutRule::Casync) => FeatureFlags::WITH_MASK,
        (true, CutRule::Desync) => FeatureFlags::DESYNC,
        (false, _) => named(&args.with)?,
    };
    let submounts = if args.one_file_system { FeatureFlags::EXCLUDE_SUBMOUNTS } else { FeatureFlags(0) };
    Ok(base.without(named(&args.without)?).with(how).with(submounts).normalised())
}
