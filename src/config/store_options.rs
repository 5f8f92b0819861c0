//! What can be set for a store: one table for the configuration files, the environment and the command line.
//!
//! * [`STORE_OPTIONS`] is the table; [`StoreOption`] one row of it.
//! * [`Draft`] is where values are put.
//!
//! Invariant: a value that was accepted can be put in; only a secret can still turn out to be wrong, when it is read.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::value::{Kind, Texts, Value};
use crate::chunk::cipher::{Algorithm, Cipher, Key};
use crate::chunk::codec::Form;
use crate::store::location::Location;
use crate::store::{Secret, StoreOptions};

/// The longest timeout: what desync's "none" becomes, because every request has one.
pub const NO_TIMEOUT: Duration = super::units::MAX_SPAN;

/// Sessions to one store at the most.
const MAX_CONCURRENCY: u64 = 1024;

/// Retries at the most: with waits of seconds, more than any read waits for.
const MAX_RETRIES: u64 = 1000;

/// Kinds of stores that an option means something to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// All.
    Any,
    /// Those with TLS: web servers, registries, S3 and Google Cloud Storage.
    Tls,
    /// Web servers and registries.
    Http,
    /// S3.
    S3,
    /// Google Cloud Storage.
    Gcs,
    /// Registries.
    Oci,
    /// SFTP and the casync protocol.
    Ssh,
}

impl Scope {
    /// Whether the store there is of such a kind.
    pub fn covers(self, location: &Location) -> bool {
        use Location::{Gcs, Http, Local, Oci, S3, Sftp, Ssh};
        match self {
            Self::Any => true,
            Self::Tls => match location {
                Http(_) | Oci(_) | S3(_) | Gcs { .. } => true,
                Local(_) | Sftp(_) | Ssh(_) => false,
            },
            Self::Http => matches!(location, Http(_) | Oci(_)),
            Self::S3 => matches!(location, S3(_)),
            Self::Gcs => matches!(location, Gcs { .. }),
            Self::Oci => matches!(location, Oci(_)),
            Self::Ssh => matches!(location, Sftp(_) | Ssh(_)),
        }
    }
}

/// One thing that can be set.
#[derive(Debug)]
pub struct StoreOption {
    /// The key in a file, and the flag's name if there is one.
    pub name: &'static str,
    /// Which stores it is for.
    pub scope: Scope,
    /// What it takes.
    pub kind: Kind,
    /// What holds when nothing is said, in TOML; `None` for nothing.
    pub default: Option<&'static str>,
    /// What it means, in a sentence without its full stop.
    pub help: &'static str,
}

impl StoreOption {
    /// The option of that name.
    pub fn find(name: &str) -> Option<&'static Self> {
        STORE_OPTIONS.iter().find(|option| option.name == name)
    }

    /// Puts a value in; a secret is read now.
    ///
    /// # Errors
    /// The secret cannot be read.
    pub fn put(&self, draft: &mut Draft, value: &Value) -> Result<(), String> {
        match (&self.kind, value.clone()) {
            (Kind::Switch(put), Value::Switch(yes)) => put(draft, yes),
            (Kind::Count(_, put), Value::Count(n)) => put(draft, n),
            (Kind::Span(put), Value::Span(span)) => put(draft, span),
            (Kind::Path(put) | Kind::Program(put), Value::Path(path)) => put(draft, path),
            (Kind::Paths(put), Value::Paths(paths)) => put(draft, paths),
            (Kind::Text(_, put), Value::Text(text)) => put(draft, text),
            (Kind::Pairs(put), Value::Pairs(pairs)) => put(draft, pairs),
            (Kind::Secret(put), Value::Secret(secret)) => put(draft, secret.get()?),
            (kind, _) => return Err(format!("not {}", kind.expected())),
        }
        Ok(())
    }
}

/// Options on their way: encryption is known only when all of its parts are.
#[derive(Debug, Clone, Default)]
pub struct Draft {
    options: StoreOptions,
    encryption: Option<bool>,
    algorithm: Algorithm,
    key: Option<Secret>,
}

impl Draft {
    /// Options to begin with.
    pub fn new(options: StoreOptions) -> Self {
        Self { options, ..Self::default() }
    }

    /// The options, when everything has been put in.
    ///
    /// # Errors
    /// Encryption without a key, or with a wrong one; halves of pairs.
    pub fn finish(mut self) -> Result<StoreOptions, String> {
        match (self.encryption, self.key) {
            (Some(true), Some(key)) => {
                let key: Key = key.expose().parse().map_err(|why| format!("encryption-key: {why}"))?;
                self.options.layout.cipher = Some(Arc::new(Cipher::new(self.algorithm, &key)));
            }
            (Some(true), None) => {
                return Err("encryption is on, and there is no encryption-key (DESYNC_ENCRYPTION_KEY)".to_owned());
            }
            (Some(false), _) => self.options.layout.cipher = None,
            (None, _) => {}
        }
        let StoreOptions { http, s3, oci, .. } = &self.options;
        for (one, has_one, other, has_other) in [
            ("client-cert", http.client_cert.is_some(), "client-key", http.client_key.is_some()),
            ("s3-access-key", s3.access_key.is_some(), "s3-secret-key", s3.secret_key.is_some()),
            ("oci-username", oci.username.is_some(), "oci-password", oci.password.is_some()),
        ] {
            match (has_one, has_other) {
                (true, false) => return Err(format!("{one} is given without {other}")),
                (false, true) => return Err(format!("{other} is given without {one}")),
                (true, true) | (false, false) => {}
            }
        }
        Ok(self.options)
    }
}

/// What a section that sets the first option takes back from those below it: credentials belong together, and halves of two
/// different ones are none.
pub const TOGETHER: &[(&str, &[&str])] = &[
    ("s3-access-key", &["s3-secret-key", "s3-session-token"]),
    ("s3-credentials-file", &["s3-access-key", "s3-secret-key", "s3-session-token"]),
    ("s3-profile", &["s3-access-key", "s3-secret-key", "s3-session-token"]),
    ("oci-username", &["oci-password"]),
    ("client-cert", &["client-key"]),
];

const fn option(name: &'static str, help: &'static str, scope: Scope, kind: Kind) -> StoreOption {
    StoreOption { name, scope, kind, default: None, help }
}

const fn with_default(
    name: &'static str,
    help: &'static str,
    scope: Scope,
    default: &'static str,
    kind: Kind,
) -> StoreOption {
    StoreOption { name, scope, kind, default: Some(default), help }
}

/// Everything that can be set, in the order it is shown.
pub const STORE_OPTIONS: &[StoreOption] = &[
    with_default(
        "uncompressed",
        "Chunks lie in this store as they are, not compressed with zstd",
        Scope::Any,
        "false",
        Kind::Switch(|draft, yes| draft.options.layout.form = if yes { Form::Plain } else { Form::Compressed }),
    ),
    with_default(
        "encryption",
        "Chunks are encrypted in this store, as desync does it; needs encryption-key",
        Scope::Any,
        "false",
        Kind::Switch(|draft, yes| draft.encryption = Some(yes)),
    ),
    option(
        "encryption-algorithm",
        "The cipher; xchacha20-poly1305 when nothing is said",
        Scope::Any,
        Kind::Text(Texts::OneOf(&["xchacha20-poly1305", "aes-256-gcm"]), |draft, text| {
            draft.algorithm = text.parse().unwrap_or_default();
        }),
    ),
    option(
        "encryption-key",
        "The key of the encryption: 64 hexadecimal digits",
        Scope::Any,
        Kind::Secret(|draft, secret| draft.key = Some(secret)),
    ),
    with_default(
        "skip-verify",
        "Chunks of this store are handed on unverified where they are only passed along: by a chunk server, into a cache that is a store. What is read through a mount or a verb is verified whatever is set",
        Scope::Any,
        "false",
        Kind::Switch(|draft, yes| draft.options.skip_verify = yes),
    ),
    with_default(
        "timeout",
        "How long one request may take, from connecting to its last byte",
        Scope::Any,
        "\"60s\"",
        Kind::Span(|draft, span| draft.options.request_timeout = span),
    ),
    with_default(
        "error-retry",
        "How often a failed request is made again, if its failure can pass",
        Scope::Any,
        "3",
        Kind::Count(0..=MAX_RETRIES, |draft, n| draft.options.retry.n_retries = n as u32),
    ),
    with_default(
        "error-retry-base-interval",
        "The first wait before that; each later one is twice as long, up to a limit",
        Scope::Any,
        "\"200ms\"",
        Kind::Span(|draft, span| {
            let retry = &mut draft.options.retry;
            retry.base = span;
            retry.max = retry.max.max(span);
        }),
    ),
    with_default(
        "concurrency",
        "Sessions to this store at a time",
        Scope::Any,
        "10",
        Kind::Count(1..=MAX_CONCURRENCY, |draft, n| draft.options.concurrency = n as usize),
    ),
    option(
        "client-cert",
        "Certificate to show to the server (PEM); goes with client-key",
        Scope::Tls,
        Kind::Path(|draft, path| draft.options.http.client_cert = Some(path)),
    ),
    option(
        "client-key",
        "Key of the certificate (PEM)",
        Scope::Tls,
        Kind::Path(|draft, path| draft.options.http.client_key = Some(path)),
    ),
    option(
        "ca-cert",
        "Certificates to trust beside the system's (PEM)",
        Scope::Tls,
        Kind::Path(|draft, path| draft.options.http.ca_cert = Some(path)),
    ),
    with_default(
        "trust-insecure",
        "Accept any certificate",
        Scope::Tls,
        "false",
        Kind::Switch(|draft, yes| draft.options.http.trust_insecure = yes),
    ),
    option(
        "http-auth",
        "Value of the Authorization header",
        Scope::Http,
        Kind::Secret(|draft, secret| draft.options.http.authorization = Some(secret)),
    ),
    option(
        "http-cookie",
        "Value of the Cookie header",
        Scope::Http,
        Kind::Secret(|draft, secret| draft.options.http.cookie = Some(secret)),
    ),
    option(
        "s3-access-key",
        "Access key; goes with s3-secret-key",
        Scope::S3,
        Kind::Secret(|draft, secret| draft.options.s3.access_key = Some(secret.expose().to_owned())),
    ),
    option(
        "s3-secret-key",
        "Secret key",
        Scope::S3,
        Kind::Secret(|draft, secret| draft.options.s3.secret_key = Some(secret)),
    ),
    option(
        "s3-session-token",
        "Session token of temporary keys",
        Scope::S3,
        Kind::Secret(|draft, secret| draft.options.s3.session_token = Some(secret)),
    ),
    option(
        "s3-credentials-file",
        "A file of AWS credentials, instead of ~/.aws/credentials",
        Scope::S3,
        Kind::Path(|draft, path| draft.options.s3.credentials_file = Some(path)),
    ),
    option(
        "s3-profile",
        "The profile in it",
        Scope::S3,
        Kind::Text(Texts::Any, |draft, text| draft.options.s3.profile = Some(text)),
    ),
    option(
        "s3-region",
        "Region of the bucket",
        Scope::S3,
        Kind::Text(Texts::Any, |draft, text| draft.options.s3.region = Some(text)),
    ),
    with_default(
        "s3-anonymous",
        "Requests are not signed",
        Scope::S3,
        "false",
        Kind::Switch(|draft, yes| draft.options.s3.anonymous = yes),
    ),
    option(
        "s3-more",
        "Further settings of the S3 client, by their names in it",
        Scope::S3,
        Kind::Pairs(|draft, pairs| draft.options.s3.more = pairs),
    ),
    option(
        "gcs-credentials-file",
        "A service account's key, or application default credentials",
        Scope::Gcs,
        Kind::Path(|draft, path| draft.options.gcs.credentials_file = Some(path)),
    ),
    option(
        "gcs-endpoint",
        "Another server than Google's, such as an emulator",
        Scope::Gcs,
        Kind::Text(Texts::Server, |draft, text| draft.options.gcs.endpoint = Some(text)),
    ),
    with_default(
        "gcs-anonymous",
        "Requests carry no login",
        Scope::Gcs,
        "false",
        Kind::Switch(|draft, yes| draft.options.gcs.anonymous = yes),
    ),
    option(
        "oci-username",
        "Login at the registry; goes with oci-password",
        Scope::Oci,
        Kind::Text(Texts::Any, |draft, text| draft.options.oci.username = Some(text)),
    ),
    option(
        "oci-password",
        "Password at the registry",
        Scope::Oci,
        Kind::Secret(|draft, secret| draft.options.oci.password = Some(secret)),
    ),
    option(
        "docker-config",
        "A config.json of docker or podman with logins",
        Scope::Oci,
        Kind::Path(|draft, path| draft.options.oci.docker_config = Some(path)),
    ),
    with_default(
        "ssh-program",
        "The program that connects for ssh://",
        Scope::Ssh,
        "\"ssh\"",
        Kind::Program(|draft, path| draft.options.ssh.program = path.into()),
    ),
    with_default(
        "ssh-remote-command",
        "The program that it runs at the other end",
        Scope::Ssh,
        "\"casync\"",
        Kind::Text(Texts::Any, |draft, text| draft.options.ssh.remote_command = text),
    ),
    option(
        "ssh-identity-file",
        "Private keys to log in with over sftp://, tried before those of the agent",
        Scope::Ssh,
        Kind::Paths(|draft, paths| draft.options.ssh.identity_files = paths),
    ),
    option(
        "ssh-known-hosts",
        "Host keys to accept over sftp://",
        Scope::Ssh,
        Kind::Path(|draft, path| draft.options.ssh.known_hosts = Some(path)),
    ),
    option(
        "ssh-agent-socket",
        "Socket of the agent to ask for keys",
        Scope::Ssh,
        Kind::Path(|draft, path| draft.options.ssh.agent_socket = Some(path)),
    ),
    option(
        "ssh-home",
        "The home directory whose .ssh is looked into",
        Scope::Ssh,
        Kind::Path(|draft, path| draft.options.ssh.home = Some(path)),
    ),
    option(
        "ssh-user",
        "Who logs in when the location does not say",
        Scope::Ssh,
        Kind::Text(Texts::Any, |draft, text| draft.options.ssh.user = Some(text)),
    ),
];

/// Values by the options' places in [`STORE_OPTIONS`], each with what the caller keeps beside it.
pub type ByOption<T> = BTreeMap<usize, T>;

/// The place of an option in the table.
pub fn place_of(name: &str) -> Option<usize> {
    STORE_OPTIONS.iter().position(|option| option.name == name)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::path::Path;

    fn put(name: &str, text: &str, draft: &mut Draft) {
        let option = StoreOption::find(name).unwrap_or_else(|| panic!("{name}"));
        let value = option.kind.typed(text, Path::new("/dir")).unwrap_or_else(|| panic!("{name} = {text}"));
        option.put(draft, &value).unwrap();
    }

    #[test]
    fn the_defaults_shown_are_those_of_stores() {
        let mut draft = Draft::default();
        for option in STORE_OPTIONS {
            if let Some(default) = option.default {
                put(option.name, default.trim_matches('"'), &mut draft);
            }
        }
        assert_eq!(draft.finish().unwrap(), StoreOptions::default());
    }

    #[test]
    fn every_option_changes_the_options() {
        let texts = [
            ("encryption-algorithm", "aes-256-gcm"),
            ("encryption-key", "d69371915dbc4b1f0ec55e2a80f0e089accf4b32e0f8dc0e29fed7f0f30d1b26"),
            ("gcs-endpoint", "http://h"),
            ("s3-more", "aws_role_arn=arn"),
        ];
        // Others that an option needs.
        let needed: &[&[&str]] = &[
            &["encryption", "encryption-key", "encryption-algorithm"],
            &["client-cert", "client-key"],
            &["s3-access-key", "s3-secret-key"],
            &["oci-username", "oci-password"],
        ];
        for option in STORE_OPTIONS {
            let text = |option: &StoreOption| match option.kind {
                Kind::Switch(_) => "yes",
                Kind::Count(..) => "7",
                Kind::Span(_) => "7s",
                _ => texts.iter().find(|(name, _)| *name == option.name).map_or("x", |(_, text)| text),
            };
            let group = needed.iter().find(|group| group.contains(&option.name));
            let names: Vec<&str> = group.map_or(vec![option.name], |group| group.to_vec());
            let finished = |names: &[&str]| {
                let mut draft = Draft::default();
                for name in names {
                    put(name, text(StoreOption::find(name).unwrap()), &mut draft);
                }
                draft.finish()
            };
            let with = finished(&names).unwrap();
            assert_ne!(with, StoreOptions::default(), "{}", option.name);
            let without: Vec<&str> = names.iter().copied().filter(|name| *name != option.name).collect();
            assert_ne!(finished(&without), Ok(with), "{}", option.name);
        }
    }

    #[test]
    fn halves_are_refused() {
        for (name, text, why) in [
            ("client-cert", "x", "client-cert is given without client-key"),
            ("s3-secret-key", "x", "s3-secret-key is given without s3-access-key"),
            ("oci-password", "x", "oci-password is given without oci-username"),
            ("encryption", "yes", "no encryption-key"),
        ] {
            let mut draft = Draft::default();
            put(name, text, &mut draft);
            assert!(draft.finish().unwrap_err().contains(why), "{name}");
        }
        let mut draft = Draft::default();
        put("encryption", "yes", &mut draft);
        put("encryption-key", "0123456789abcdef", &mut draft);
        assert_eq!(draft.finish().unwrap_err(), "encryption-key: an encryption key is 64 hex digits");
    }
}
