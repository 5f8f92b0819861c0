//! `caifs profile`: profiles shown and merged.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use tokio::runtime::Runtime;

use super::places::open_index;
use super::settings;
use super::store_flags::AccessFlags;
use crate::config::SourceConfig;
use crate::format::profile::{MAX_PROFILE_BYTES, Profile};
use crate::pack::output::write_atomically;

/// Mode of a profile, before the umask.
const PROFILE_MODE: u32 = 0o644;

/// Arguments of `profile`.
#[derive(Debug, clap::Args)]
pub struct ProfileArgs {
    /// What to do.
    #[command(subcommand)]
    pub verb: ProfileVerb,
}

/// What can be done with profiles.
#[derive(Debug, Subcommand)]
pub enum ProfileVerb {
    /// Make one profile of several: a chunk comes where it came first in any of them.
    Merge(MergeArgs),
    /// Tell what is in a profile; with an index, how much of it that is.
    Show(ShowArgs),
}

/// Arguments of `profile merge`.
#[derive(Debug, clap::Args)]
pub struct MergeArgs {
    /// The profile to write; - is stdout.
    #[arg(value_name = "OUT")]
    pub out: PathBuf,
    /// The profiles to merge.
    #[arg(value_name = "IN", required = true)]
    pub profiles: Vec<PathBuf>,
}

/// Arguments of `profile show`.
#[derive(Debug, clap::Args)]
pub struct ShowArgs {
    /// The profile.
    #[arg(value_name = "FILE")]
    pub profile: PathBuf,
    /// The index to compare it with.
    #[arg(short, long, value_name = "INDEX")]
    pub index: Option<PathBuf>,
    /// How the index is reached.
    #[command(flatten)]
    pub access: AccessFlags,
}

impl ProfileArgs {
    /// Where the verb keeps the configuration file that was named on the command line, if it reads one.
    pub fn config_file_mut(&mut self) -> Option<&mut Option<PathBuf>> {
        match &mut self.verb {
            ProfileVerb::Merge(_) => None,
            ProfileVerb::Show(args) => Some(&mut args.access.config_file),
        }
    }
}

pub fn run(args: &ProfileArgs) -> Result<()> {
    match &args.verb {
        ProfileVerb::Merge(args) => merge(args),
        ProfileVerb::Show(args) => show(args),
    }
}

fn merge(args: &MergeArgs) -> Result<()> {
    let profiles = args.profiles.iter().map(|path| read(path)).collect::<Result<Vec<_>>>()?;
    let text = Profile::merge(&profiles).to_text();
    if args.out == Path::new("-") {
        return Ok(io::stdout().write_all(text.as_bytes())?);
    }
    Ok(write_atomically(&args.out, text.as_bytes(), PROFILE_MODE)?)
}

fn show(args: &ShowArgs) -> Result<()> {
    let profile = read(&args.profile)?;
    let n_chunks = profile.touches.len();
    let last_ms = profile.touches.iter().map(|touch| touch.ms).max().unwrap_or(0);
    let mut out = io::stdout();
    writeln!(out, "chunks:   {n_chunks}")?;
    writeln!(out, "recorded: {}.{:03} s from the first to the last", last_ms / 1000, last_ms % 1000)?;
    let Some(path) = &args.index else { return Ok(()) };
    let runtime = Runtime::new().context("cannot start")?;
    let settings = Arc::new(settings::of_access(&args.access, None)?);
    let sources = SourceConfig { settings, ..SourceConfig::default() };
    let (name, index) = open_index(&runtime, path.as_os_str(), &sources)?;
    let listed: HashSet<_> = profile.touches.iter().map(|touch| touch.id).collect();
    let (mut met, mut n_met, mut met_bytes, mut image_bytes) = (HashSet::new(), 0, 0, 0);
    for item in index.items() {
        let item = item.with_context(|| name.clone())?;
        if !listed.contains(&item.id) {
            continue;
        }
        image_bytes += item.size_bytes();
        if met.insert(item.id) {
            n_met += 1;
            met_bytes += item.size_bytes();
        }
    }
    writeln!(out, "of these in {name}: {n_met} ({} %), {met_bytes} bytes", percent(n_met, n_chunks as u64))?;
    writeln!(
        out,
        "which is of the {} bytes there: {image_bytes} ({} %)",
        index.blob_size(),
        percent(image_bytes, index.blob_size())
    )?;
    Ok(())
}

/// A share in percent, with one digit behind the point.
fn percent(part: u64, whole: u64) -> String {
    match whole {
        0 => "0.0".to_owned(),
        _ => format!("{:.1}", part as f64 * 100.0 / whole as f64),
    }
}

fn read(path: &Path) -> Result<Profile> {
    let name = || path.display().to_string();
    let mut text = Vec::new();
    let file = File::open(path).with_context(name)?;
    file.take(MAX_PROFILE_BYTES + 1).read_to_end(&mut text).with_context(name)?;
    if text.len() as u64 > MAX_PROFILE_BYTES {
        bail!("{}: too large for a profile", name());
    }
    Profile::parse(&text).with_context(name)
}
