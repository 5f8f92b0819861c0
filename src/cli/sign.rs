//! `caifs sign`: signatures of indexes, and the keys for them, as minisign has them.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use tokio::runtime::Runtime;

use super::places::{open_index, write_elsewhere};
use super::settings;
use super::store_flags::AccessFlags;
use crate::config::SourceConfig;
use crate::config::secret::{LazySecret, SecretSource};
use crate::format::minisign::secret::USUAL_WORK;
use crate::format::minisign::{MAX_KEY_FILE_BYTES, MinisignError, SecretKey, SecretKeyFile};
use crate::pack::output::AtomicFile;
use crate::store::Secret;
use crate::store::location::FileLocation;
use crate::sys::read_password;
use crate::volume::trust::signature_of;

/// What nothing protects and nobody believes, in front of a signature.
const UNTRUSTED_COMMENT: &str = "signature from a minisign secret key";

/// Modes of the files written, before the umask.
const PUBLIC_MODE: u32 = 0o644;
const SECRET_MODE: u32 = 0o600;

/// Arguments of `sign`.
#[derive(Debug, clap::Args)]
pub struct SignArgs {
    /// The indexes to sign; the signature of each is written beside it, with .minisig behind its name.
    #[arg(value_name = "INDEX", required_unless_present = "generate")]
    pub indexes: Vec<PathBuf>,
    /// Make a new pair of keys instead.
    #[arg(short = 'G', long, conflicts_with = "indexes", requires = "public_key")]
    pub generate: bool,
    /// The secret key: to sign with, or to write.
    #[arg(short, long, value_name = "FILE")]
    pub secret_key: PathBuf,
    /// The public key to write.
    #[arg(short, long, value_name = "FILE", requires = "generate")]
    pub public_key: Option<PathBuf>,
    /// What the signature says of the index [default: time and name].
    #[arg(long, value_name = "TEXT", conflicts_with = "generate")]
    pub trusted_comment: Option<String>,
    /// The password of the secret key is the first line of this file [default: asked for; a new key has none].
    #[arg(long, value_name = "FILE")]
    pub password_file: Option<PathBuf>,
    /// How indexes are reached.
    #[command(flatten)]
    pub access: AccessFlags,
}

pub fn run(args: &SignArgs) -> Result<()> {
    match (&args.public_key, args.generate) {
        (Some(public_key), true) => generate(args, public_key),
        _ => sign(args),
    }
}

fn generate(args: &SignArgs, public_path: &Path) -> Result<()> {
    let secret_path = &args.secret_key;
    for path in [secret_path.as_path(), public_path] {
        if path.symlink_metadata().is_ok() {
            bail!("{}: it is there already, and a key is not overwritten", path.display());
        }
    }
    let password = args.password_file.as_deref().map(password_of_file).transpose()?;
    let key = SecretKey::generate()?;
    let work = password.as_ref().map(|password| (password.expose().as_bytes(), USUAL_WORK));
    let secret_text = key.to_file_text(work)?;
    write_new(secret_path, &secret_text, SECRET_MODE)?;
    if let Err(error) = write_new(public_path, &key.public_key().to_file_text(), PUBLIC_MODE) {
        // A pair or nothing.
        let _ = fs::remove_file(secret_path);
        return Err(error);
    }
    if password.is_none() {
        let shown = secret_path.display();
        tracing::warn!("{shown}: not encrypted: who can read it can sign (--password-file encrypts it)");
    }
    Ok(writeln!(io::stdout(), "{}", key.public_key().to_base64())?)
}

fn sign(args: &SignArgs) -> Result<()> {
    // All that can be wrong with what was typed is found before the password is asked for.
    let mut places = Vec::new();
    for index in &args.indexes {
        let location = FileLocation::parse(index.as_os_str())?;
        let Some(place) = signature_of(&location) else {
            bail!("an index from standard input has nothing beside it to put a signature in");
        };
        places.push((index, location, place));
    }
    let settings = settings::of_access(&args.access, None)?;
    let sources = SourceConfig { settings: Arc::new(settings), ..SourceConfig::default() };
    let key = secret_key(&args.secret_key, args.password_file.as_deref())?;
    let runtime = Runtime::new().context("cannot start")?;
    for (typed, location, place) in places {
        let (name, index) = open_index(&runtime, typed.as_os_str(), &sources)?;
        // What is damaged is not vouched for.
        index.check().with_context(|| name.clone())?;
        let comment = match &args.trusted_comment {
            Some(comment) => comment.clone(),
            None => usual_comment(location.file_name().file_name().unwrap_or_default()),
        };
        let signature = key.sign(index.source().as_ref(), &comment)?.to_file_text(UNTRUSTED_COMMENT);
        match &place {
            FileLocation::Local(path) => {
                let mut file = AtomicFile::create(path, PUBLIC_MODE)?;
                file.write_all(signature.as_bytes()).with_context(|| path.display().to_string())?;
                file.commit()?;
            }
            _ => write_elsewhere(&runtime, &place, signature.into_bytes(), &sources.settings)?,
        }
    }
    Ok(())
}

/// The comment that minisign writes when none is given.
fn usual_comment(name: &OsStr) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let name: String = name.to_string_lossy().chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    format!("timestamp:{now}\tfile:{name}\thashed")
}

fn secret_key(path: &Path, password_file: Option<&Path>) -> Result<SecretKey> {
    let shown = path.display().to_string();
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(MAX_KEY_FILE_BYTES).read_to_string(&mut text));
    read.with_context(|| shown.clone())?;
    let file = SecretKeyFile::parse(&text).with_context(|| shown.clone())?;
    let password = match (file.needs_password(), password_file) {
        (false, _) => None,
        (true, Some(path)) => Some(password_of_file(path)?),
        (true, None) => {
            let asked = read_password(&format!("Password of {shown}: "));
            let hint = || format!("{shown}: {} (or --password-file)", MinisignError::NeedsPassword);
            Some(Secret::new(asked.with_context(hint)?))
        }
    };
    file.open(password.as_ref().map(|password| password.expose().as_bytes())).with_context(|| shown)
}

fn password_of_file(path: &Path) -> Result<Secret> {
    LazySecret::new(SecretSource::File(path.to_owned())).get().map_err(anyhow::Error::msg)
}

/// Writes a file that must not be there yet.
fn write_new(path: &Path, text: &str, mode: u32) -> Result<()> {
    let shown = || path.display().to_string();
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path).with_context(shown)?;
    if let Err(error) = file.write_all(text.as_bytes()).and_then(|()| file.sync_all()) {
        let _ = fs::remove_file(path);
        return Err(error).with_context(shown);
    }
    Ok(())
}
