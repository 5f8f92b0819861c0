//! Flags of the servers: names, letters and defaults are desync's, but that uploads are verified unless told otherwise.

use std::path::PathBuf;

use super::store_flags::AccessFlags;

/// Arguments of `chunk-server`.
#[derive(Debug, clap::Args)]
pub struct ChunkServerArgs {
    /// Store of chunks (repeatable, asked in this order).
    #[arg(short, long = "store", value_name = "STORE", value_delimiter = ',')]
    pub stores: Vec<String>,
    /// Store that keeps what was fetched, and is asked first.
    #[arg(short, long, value_name = "STORE")]
    pub cache: Option<String>,
    /// JSON file with "stores" (a list) and "cache", read again on SIGHUP.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["stores", "cache"])]
    pub store_file: Option<PathBuf>,
    /// Take chunks, too; needs exactly one store and no cache.
    #[arg(short, long, alias = "writeable")]
    pub writable: bool,
    /// Send chunks without verifying them (whoever reads them does).
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub skip_verify_read: bool,
    /// Store chunks without verifying them.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub skip_verify_write: bool,
    /// Send and take chunks uncompressed, whatever the stores have.
    #[arg(short, long)]
    pub uncompressed: bool,
    /// Send and take chunks encrypted.
    #[arg(long)]
    pub encryption: bool,
    /// The key of the encryption, 64 hex digits [default: $DESYNC_ENCRYPTION_KEY].
    #[arg(long, value_name = "KEY")]
    pub encryption_key: Option<String>,
    /// The cipher of the encryption [default: xchacha20-poly1305].
    #[arg(long, value_name = "NAME", value_parser = ["xchacha20-poly1305", "aes-256-gcm"])]
    pub encryption_algorithm: Option<String>,
    /// How it listens.
    #[command(flatten)]
    pub server: ServerFlags,
}

/// Arguments of `index-server`.
#[derive(Debug, clap::Args)]
pub struct IndexServerArgs {
    /// Where the indexes are.
    #[arg(short, long, value_name = "STORE", required = true)]
    pub store: String,
    /// Take indexes and what lies beside them, too.
    #[arg(short, long, alias = "writeable")]
    pub writable: bool,
    /// How it listens.
    #[command(flatten)]
    pub server: ServerFlags,
}

/// Flags of every server.
#[derive(Debug, clap::Args)]
pub struct ServerFlags {
    /// Address to listen on (repeatable), as host:port, :port or [::1]:port.
    #[arg(short, long, value_name = "ADDRESS", value_delimiter = ',', default_value = ":http")]
    pub listen: Vec<String>,
    /// Write a line for each request to this file, - for stderr.
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Certificate chain for HTTPS (PEM).
    #[arg(long, value_name = "FILE", requires = "key")]
    pub cert: Option<PathBuf>,
    /// Private key of the certificate (PEM).
    #[arg(long, value_name = "FILE", requires = "cert")]
    pub key: Option<PathBuf>,
    /// Talk only to clients with a certificate.
    #[arg(long, requires_all = ["client_ca", "cert"])]
    pub mutual_tls: bool,
    /// Certificates that those of clients must come from (PEM).
    #[arg(long, value_name = "FILE", requires = "mutual_tls")]
    pub client_ca: Option<PathBuf>,
    /// What the Authorization header of each request must be [default: $DESYNC_HTTP_AUTH].
    #[arg(long, value_name = "VALUE")]
    pub authorization: Option<String>,
    /// Sessions to each store.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 10)]
    pub concurrency: usize,
    /// Digest of the chunk ids.
    #[arg(long, value_name = "sha512-256|sha256", default_value = "sha512-256")]
    pub digest: String,
    /// How stores are reached.
    #[command(flatten)]
    pub access: AccessFlags,
}
