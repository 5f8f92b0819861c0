//! How one store is reached and what its objects look like: resolved settings, no files and no environment.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::layout::Layout;
use super::retry::RetryPolicy;

/// How long one request may take when nothing is said.
pub const DEFAULT_REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// Sessions or connections to one store when nothing is said (desync's default).
pub const DEFAULT_CONCURRENCY: usize = 10;

/// A text that no message, log or `Debug` shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Keeps a text secret.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the one place that sends or compares it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Everything that can be set for one store. What a kind of store has no use for is ignored by it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreOptions {
    /// Names and form of its objects: compressed or not, encrypted or not.
    pub layout: Layout,
    /// Whether chunks that are only handed on (by a server, into a cache) go unverified. What is read is always verified.
    pub skip_verify: bool,
    /// How long one request may take, from connecting to its last byte.
    pub request_timeout: Duration,
    /// What is done about requests that fail in a way that can pass.
    pub retry: RetryPolicy,
    /// Sessions of stores that answer one request a session at a time (SFTP, SSH); at least 1.
    pub concurrency: usize,
    /// For HTTP, and OCI registries.
    pub http: HttpOptions,
    /// For S3.
    pub s3: S3Options,
    /// For Google Cloud Storage.
    pub gcs: GcsOptions,
    /// For OCI registries.
    pub oci: OciOptions,
    /// For SFTP and SSH.
    pub ssh: SshOptions,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            layout: Layout::default(),
            skip_verify: false,
            request_timeout: DEFAULT_REQUEST_TIMEOUT,
            retry: RetryPolicy::default(),
            concurrency: DEFAULT_CONCURRENCY,
            http: HttpOptions::default(),
            s3: S3Options::default(),
            gcs: GcsOptions::default(),
            oci: OciOptions::default(),
            ssh: SshOptions::default(),
        }
    }
}

/// Headers and TLS.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HttpOptions {
    /// Value of the `Authorization` header.
    pub authorization: Option<Secret>,
    /// Value of the `Cookie` header.
    pub cookie: Option<Secret>,
    /// PEM file with the client's certificate chain; goes with `client_key`.
    pub client_cert: Option<PathBuf>,
    /// PEM file with the client's private key.
    pub client_key: Option<PathBuf>,
    /// PEM file with certificates to trust beside (not instead of) the system's.
    pub ca_cert: Option<PathBuf>,
    /// Accept any certificate.
    pub trust_insecure: bool,
}

/// Credentials for S3. Without any the instance's metadata is asked; `anonymous` sends unsigned requests.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct S3Options {
    /// Access key id.
    pub access_key: Option<String>,
    /// Secret access key.
    pub secret_key: Option<Secret>,
    /// Session token of temporary credentials.
    pub session_token: Option<Secret>,
    /// An AWS credentials file (INI), used when there is no access key.
    pub credentials_file: Option<PathBuf>,
    /// Profile in that file.
    pub profile: Option<String>,
    /// Region; without one the server's default.
    pub region: Option<String>,
    /// Send unsigned requests.
    pub anonymous: bool,
    /// Other settings by the names of the `object_store` crate (`aws_web_identity_token_file`, `aws_container_credentials_relative_uri`, …).
    pub more: Vec<(String, String)>,
}

/// Credentials for Google Cloud Storage. Without any the instance's metadata is asked.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GcsOptions {
    /// A file with a service account's key or application default credentials.
    pub credentials_file: Option<PathBuf>,
    /// Another server than Google's, with scheme: an emulator, asked without signatures.
    pub endpoint: Option<String>,
    /// Send unsigned requests.
    pub anonymous: bool,
}

/// Credentials for an OCI registry. Without any the Docker credential store is asked, and then nobody.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OciOptions {
    /// User name; goes with `password`.
    pub username: Option<String>,
    /// Password or token.
    pub password: Option<Secret>,
    /// Docker's `config.json`.
    pub docker_config: Option<PathBuf>,
}

/// How SSH servers are reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SshOptions {
    /// The ssh program for `ssh://`.
    pub program: OsString,
    /// The casync (or caifs, or desync) command on the far side.
    pub remote_command: String,
    /// Private keys to try for `sftp://`; without any the usual files of `~/.ssh`.
    pub identity_files: Vec<PathBuf>,
    /// Host keys to trust for `sftp://`; without it `~/.ssh/known_hosts` and `/etc/ssh/ssh_known_hosts`.
    pub known_hosts: Option<PathBuf>,
    /// Socket of an agent for `sftp://`.
    pub agent_socket: Option<PathBuf>,
    /// The home directory that `~/.ssh` lies in.
    pub home: Option<PathBuf>,
    /// The user to log in as when the location names none.
    pub user: Option<String>,
}

impl Default for SshOptions {
    fn default() -> Self {
        Self {
            program: "ssh".into(),
            remote_command: "casync".to_owned(),
            identity_files: Vec::new(),
            known_hosts: None,
            agent_socket: None,
            home: None,
            user: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_shown() {
        let options = StoreOptions {
            http: HttpOptions { authorization: Some(Secret::new("Bearer xyz")), ..HttpOptions::default() },
            ..StoreOptions::default()
        };
        assert!(!format!("{options:?}").contains("xyz"));
    }
}
