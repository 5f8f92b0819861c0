//! Settings: what was meant, after everything that was typed, stands in files or in the environment has been read and laid over each
//! other. Knows neither the command line nor the environment: the caller passes what was given, and a look-up of variables.
//!
//! * [`stores`] finds the options of a store by its location; [`store_options`] is the table of what can be set.
//! * [`toml_file`] and [`desync_file`] read files, [`environment`] the variables, [`secret`] what is not to be shown.
//! * [`load`] puts them together; [`explain`] shows the result and where each value comes from.
//! * [`glob`], [`value`] and [`units`] are how locations, values, sizes and times are written.
//!
//! # Layers
//!
//! Each wins over those before it:
//!
//! 1. what holds when nothing is said, and what the machine sets for every program (see [`environment`]);
//! 2. `~/.config/desync/config.json`, desync's file;
//! 3. `/etc/caifs/caifs.toml`, then `/etc/caifs/conf.d/*.toml` by name (another directory than `/etc/caifs`: `CAIFS_CONFIG_DIR`);
//! 4. `$XDG_CONFIG_HOME/caifs/caifs.toml` (`~/.config/caifs/caifs.toml`);
//! 5. variables for caifs, desync and casync: S3 keys as desync takes them, registry logins, ssh commands;
//! 6. options of the mount, and flags.
//!
//! `--config FILE` stands in place of 2 to 4; it may be of our kind or desync's. Within a file `[store]` comes before every
//! `[[stores]]`, and those count in their order.
//!
//! # The file
//!
//! ```toml
//! # Defaults of `caifs mount`, by the names of its options (those of stores stand below).
//! [mount]
//! memory = "512M"
//! io-timeout = "1m"
//! cache = "/var/cache/caifs"
//! cache-size = "20G"
//! cache-keep-free = "5G"
//!
//! # For every store.
//! [store]
//! timeout = "30s"             # of one request; a number is seconds
//! error-retry = 5
//! error-retry-base-interval = "250ms"
//! concurrency = 10
//! ca-cert = "ca.pem"          # beside this file; ~/ is the home directory
//! ssh-identity-file = ["~/.ssh/backup_ed25519"]
//!
//! # For some: * is anything up to a /, ** anything, and /** at the end covers what stands before it, too.
//! [[stores]]
//! location = "https://backup.example/**"
//! http-auth = { file = "/etc/caifs/backup.auth" }
//! client-cert = "client.pem"
//! client-key = "client.key"
//!
//! [[stores]]
//! location = "s3+https://s3.example/chunks/*"
//! s3-access-key = "AKIA0000"
//! s3-secret-key = { command = ["pass", "show", "s3.example"] }
//! s3-region = "eu-west-1"
//!
//! [[stores]]
//! location = "/srv/plain/*"
//! uncompressed = true
//! encryption = true           # with DESYNC_ENCRYPTION_KEY, or:
//! encryption-key = { file = "~/chunks.key" }
//! ```
//!
//! A secret is a text, the first line of a file, or the first line that a program writes; files and programs are read when a store
//! needs the secret, and once.
//!
//! Invariants: a wrong file is an error that names file, line and key; no error and nothing shown holds a secret.

pub mod desync_file;
pub mod environment;
pub mod explain;
pub mod glob;
mod load;
pub mod secret;
pub mod store_options;
pub mod stores;
pub mod toml_file;
pub mod units;
pub mod value;

pub use desync_file::{StoreFile, store_file};
pub use load::{Configuration, load};
pub use stores::StoreSettings;

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::store::location::LocationError;

/// The largest configuration file, in bytes.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// The memory budget when none is given, in bytes.
pub const DEFAULT_MEMORY_BYTES: u64 = 256 << 20;

/// The smallest memory budget a mount works with, in bytes: a few of the largest usual chunks and replies.
pub const MIN_MEMORY_BYTES: u64 = 16 << 20;

/// How long a read may take before it is answered with EIO, when nothing else is said.
pub const DEFAULT_IO_TIMEOUT: Duration = Duration::from_secs(30);

/// Default of [`ServiceConfig::mount_timeout`]: less than the 90 s that systemd gives a mount unit.
pub const DEFAULT_MOUNT_TIMEOUT: Duration = Duration::from_secs(60);

/// Where content comes from, and what is kept of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SourceConfig {
    /// Store locations in the order they are asked; empty for the casync rule (`default.castr` beside the index).
    pub stores: Vec<String>,
    /// A local directory or a store that keeps what was fetched.
    pub cache: Option<String>,
    /// The most a local cache may hold, in bytes; `None` for a share of the free disk.
    pub cache_size_bytes: Option<u64>,
    /// What a local cache leaves free on its filesystem, in bytes.
    pub cache_keep_free_bytes: Option<u64>,
    /// Use what is kept, and ask no store.
    pub offline: bool,
    /// What an index must be.
    pub trust: TrustConfig,
    /// Options of each store.
    pub settings: Arc<StoreSettings>,
}

impl SourceConfig {
    /// Whether there is something to read from.
    ///
    /// # Errors
    /// No store is to be asked, and nothing is kept.
    pub fn check(&self) -> Result<(), ConfigError> {
        match (self.offline, &self.cache) {
            (true, None) => Err(ConfigError::new("offline needs a cache to read from (-c CACHE)")),
            (true, Some(_)) | (false, _) => Ok(()),
        }
    }
}

/// How a mount behaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountConfig {
    /// Where content comes from.
    pub sources: SourceConfig,
    /// The configuration file to read instead of the usual ones.
    pub config_file: Option<PathBuf>,
    /// A file with stores and a cache, instead of those of `sources`.
    pub store_file: Option<PathBuf>,
    /// One budget for the memory tier, read-ahead and buffers, in bytes.
    pub memory_bytes: u64,
    /// Every request of the kernel is answered by then.
    pub io_timeout: Duration,
    /// Whether other users may use the mount; `None` means: yes when mounted by root.
    pub allow_other: Option<bool>,
    /// How files are shown.
    pub show: ShowConfig,
    /// What is read before it is asked for.
    pub ahead: AheadConfig,
    /// What is kept beside chunks so that later mounts are faster.
    pub keep: KeepConfig,
    /// The process that serves the mount.
    pub service: ServiceConfig,
}

impl MountConfig {
    /// Whether the kernel may read a complete copy itself; `None` means: if it can. What it reads so nobody hears of, and a profile of
    /// what is read would have nothing of it.
    pub fn passthrough(&self) -> Option<bool> {
        match self.ahead.record {
            Some(_) => Some(false),
            None => self.keep.passthrough,
        }
    }
}

impl Default for MountConfig {
    fn default() -> Self {
        Self {
            sources: SourceConfig::default(),
            config_file: None,
            store_file: None,
            memory_bytes: DEFAULT_MEMORY_BYTES,
            io_timeout: DEFAULT_IO_TIMEOUT,
            allow_other: None,
            show: ShowConfig::default(),
            ahead: AheadConfig::default(),
            keep: KeepConfig::default(),
            service: ServiceConfig::default(),
        }
    }
}

/// How files are shown, whatever the archive says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ShowConfig {
    /// Owner of everything, instead of the stored one.
    pub uid: Option<u32>,
    /// Group of everything, instead of the stored one.
    pub gid: Option<u32>,
    /// Permission bits that nothing has.
    pub umask: Option<u16>,
    /// Added to every stored owner and group, as a user namespace of a container needs it.
    pub uid_shift: Option<u32>,
    /// Whether files of a directory of indexes keep the suffix of their index in their name.
    pub keep_suffix: bool,
    /// How often a directory of indexes is looked at again where it cannot tell of changes itself; zero for never.
    pub poll_interval: Option<Duration>,
}

/// What is read before it is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AheadConfig {
    /// The most bytes read ahead of one reader; zero for none.
    pub window_bytes: Option<u64>,
    /// Read-ahead of the kernel in bytes, where root mounts.
    pub kernel_bytes: Option<u64>,
    /// What to fetch in the background: `all`, `metadata`, or paths with or without a range of bytes.
    pub warm: Vec<String>,
    /// The most bytes a second that background fetches take, in stored form.
    pub warm_rate_bytes: Option<u64>,
    /// The profile to replay; `no` for none, also if one lies beside the index.
    pub profile: Option<String>,
    /// The file to write a profile of this mount to.
    pub record: Option<PathBuf>,
}

/// What is kept beside chunks so that later mounts are faster.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KeepConfig {
    /// The file that gets a plain copy of an image as it is read; `auto` for one in the cache.
    pub backing: Option<String>,
    /// Whether the kernel may read a complete copy itself, see [`MountConfig::passthrough`].
    pub passthrough: Option<bool>,
    /// Whether a table of all metadata is used and made; `None` means: if there is a local cache.
    pub metadata_table: Option<bool>,
}

/// What the index must be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TrustConfig {
    /// SHA-256 of the index's bytes.
    pub index_sha256: Option<[u8; 32]>,
    /// A minisign public key, or the file it stands in, that the index must be signed with.
    pub verify_key: Option<String>,
}

/// The process that serves a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceConfig {
    /// A mount that is not ready by then has failed.
    pub mount_timeout: Duration,
    /// Where a background mount logs to: `journald`, or a file.
    pub log: Option<String>,
    /// The least of what is logged; `None` for what the command line says.
    pub log_level: Option<tracing::Level>,
    /// The user that the process becomes.
    pub setuid: Option<String>,
    /// Whether the process is shut out of all files but its own; `None` means: when root mounts and the kernel can.
    pub sandbox: Option<bool>,
    /// Whether an image is mounted only if its first bytes can be had.
    pub check_store: bool,
    /// Whether there is a control socket.
    pub control: bool,
    /// Where metrics are served, as `127.0.0.1:9100`.
    pub metrics: Option<String>,
    /// The file that gets a line for each request.
    pub access_trace: Option<PathBuf>,
}

impl Default for ServiceConfig {
    fn default() -> Self {
        Self {
            mount_timeout: DEFAULT_MOUNT_TIMEOUT,
            log: None,
            log_level: None,
            setuid: None,
            sandbox: None,
            check_store: true,
            control: true,
            metrics: None,
            access_trace: None,
        }
    }
}

/// An option of a mount as a file gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// The option's name.
    pub name: String,
    /// Its value, as after `name=`.
    pub value: String,
    /// Where it stands.
    pub origin: Origin,
}

/// Who said something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nobody.
    Default,
    /// A file.
    File {
        /// The file.
        path: Arc<Path>,
        /// The line, from 1, if it is known.
        line: Option<usize>,
    },
    /// A variable of the environment.
    Environment(&'static str),
    /// A flag, by its long name.
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line: Some(line) } => write!(f, "{}:{line}", path.display()),
            Self::File { path, line: None } => write!(f, "{}", path.display()),
            Self::Environment(name) => write!(f, "environment {name}"),
            Self::Flag(name) => write!(f, "flag --{name}"),
        }
    }
}

/// What is wrong with the configuration; one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

impl ConfigError {
    /// An error that says all.
    pub fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }

    /// An error of something that was said somewhere.
    pub fn at(origin: &Origin, why: &str) -> Self {
        Self(format!("{origin}: {why}"))
    }
}

impl From<LocationError> for ConfigError {
    fn from(error: LocationError) -> Self {
        Self(error.to_string())
    }
}

/// The text of a configuration file.
fn read(path: &Path) -> Result<String, ConfigError> {
    let wrong = |why: &dyn fmt::Display| ConfigError::new(format!("{}: {why}", path.display()));
    let file = std::fs::File::open(path).map_err(|error| wrong(&error))?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(|error| wrong(&error))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(wrong(&"too large for a configuration file"));
    }
    String::from_utf8(bytes).map_err(|_| wrong(&"not UTF-8"))
}
