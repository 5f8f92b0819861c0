//! `caifs verify-signature`: whether an index is signed with a key.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use tokio::runtime::Runtime;

use super::output::printable;
use super::settings;
use super::store_flags::{AccessFlags, memory_plan};
use crate::config::{DEFAULT_IO_TIMEOUT, SourceConfig, TrustConfig};
use crate::report::Report;
use crate::store::location::FileLocation;
use crate::volume::sources::Sources;
use crate::volume::trust::key_text;

/// Arguments of `verify-signature`.
#[derive(Debug, clap::Args)]
pub struct VerifySignatureArgs {
    /// The index; its signature lies beside it, with .minisig behind its name.
    #[arg(value_name = "INDEX")]
    pub index: PathBuf,
    /// The key to verify with: the text of a minisign public key, or its file.
    #[arg(short, long, value_name = "KEY")]
    pub public_key: String,
    /// How the index is reached.
    #[command(flatten)]
    pub access: AccessFlags,
}

pub fn run(args: &VerifySignatureArgs) -> Result<()> {
    let location = FileLocation::parse(args.index.as_os_str())?;
    let verify_key = Some(key_text(&args.public_key)?);
    let config = SourceConfig {
        settings: Arc::new(settings::of_access(&args.access, None)?),
        trust: TrustConfig { index_sha256: None, verify_key },
        ..SourceConfig::default()
    };
    let runtime = Runtime::new().context("cannot start")?;
    let report = Arc::new(Report::default());
    let sources = Sources::open(&config, &memory_plan(), DEFAULT_IO_TIMEOUT, &report)?;
    let (_, _, signature) = runtime.block_on(sources.signed_index(&location))?;
    let Some(signature) = signature else {
        bail!("{location}: its signature was not looked at");
    };
    let stdout = io::stdout();
    let comment = printable(signature.trusted_comment.as_bytes(), stdout.is_terminal()).into_owned();
    writeln!(&stdout, "{location}: signed with key {}", signature.key_id)?;
    (&stdout).write_all(b"trusted comment: ")?;
    (&stdout).write_all(&comment)?;
    Ok(writeln!(&stdout)?)
}
