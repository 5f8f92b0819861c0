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
use crate::chunk::chunker::CutRule;
use crate::format::catar::FeatureFlags;
use crate::pack::PackError;
use crate::pack::output::AtomicFile;
use crate::pack::sink::Sink;
use crate::pack::tar::{TarOptions, tar};
use crate::store::location::FileLocation;

/// Mode of an archive, before the umask.
const ARCHIVE_MODE: u32 = 0o666;

pub fn run(args: &TarArgs) -> Result<()> {
    let mut options = make_options(&args.cut, args.store.as_deref(), &args.access)?;
    let feature_flags = feature_flags(args, options.rule)?.with_digest(options.digest);
    let tar_options = TarOptions { feature_flags, one_file_system: args.one_file_system, no_time: args.no_time };
    let bar = progress_bar(0);
    bar.set_style(indicatif::ProgressStyle::with_template("{bytes} {bytes_per_sec}").unwrap_or_else(|_| bar.style()));
    if args.index {
        check_suffix(&args.out, "caidx")?;
        options.feature_flags = Some(feature_flags.0);
        options.progress = Some(super::make::report_to(&bar));
        let mut sink = Sink::new(&options)?;
        tar(&args.source, &tar_options, &mut sink)?;
        let stats = match FileLocation::parse(args.out.as_os_str())? {
            FileLocation::Local(path) => sink.finish_to(&path)?,
            elsewhere => {
                let (index, stats) = sink.finish()?;
                let runtime = Runtime::new().context("cannot start")?;
                write_elsewhere(
                    &runtime,
                    &elsewhere,
                    index,
                    &settings::of_access(&args.access, args.cut.concurrency)?,
                )?;
                stats
            }
        };
        bar.finish_and_clear();
        if args.print_stats {
            writeln!(io::stderr(), "{}", stats.desync_json())?;
        }
        return Ok(());
    }
    check_suffix(&args.out, "catar")?;
    if let FileLocation::Remote { .. } = FileLocation::parse(args.out.as_os_str())? {
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
        let mut out = BufWriter::with_capacity(1 << 20, file);
        tar(&args.source, &tar_options, &mut out)?;
        out.into_inner().map_err(IntoInnerError::into_error)?.inner.commit()?;
    }
    bar.finish_and_clear();
    Ok(())
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
