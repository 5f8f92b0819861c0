//! What the environment says about stores. The caller passes a look-up; nothing here reads the environment itself.
//!
//! | variables | option | strength |
//! |---|---|---|
//! | `S3_ACCESS_KEY`, `S3_SECRET_KEY`, `S3_SESSION_TOKEN`, `S3_REGION`; without the first `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN` | `s3-access-key`, … | over files |
//! | `DESYNC_OCI_USERNAME`, `DESYNC_OCI_PASSWORD` | `oci-username`, `oci-password` | over files |
//! | `CASYNC_SSH_PATH`, `CASYNC_REMOTE_PATH` | `ssh-program`, `ssh-remote-command` | over files |
//! | `DESYNC_ENCRYPTION_KEY` | `encryption-key`, where encryption is on | under files |
//! | `AWS_PROFILE`, `AWS_SHARED_CREDENTIALS_FILE` (`~/.aws/credentials` if it is there), `AWS_REGION`, `AWS_DEFAULT_REGION` | `s3-profile`, … | under files |
//! | `AWS_WEB_IDENTITY_TOKEN_FILE`, `AWS_ROLE_ARN`, `AWS_CONTAINER_…`, … | `s3-more` | under files |
//! | `GOOGLE_APPLICATION_CREDENTIALS` (`~/.config/gcloud/application_default_credentials.json` if it is there), `STORAGE_EMULATOR_HOST` | `gcs-credentials-file`, `gcs-endpoint` | under files |
//! | `DOCKER_CONFIG` (`~/.docker/config.json` if it is there) | `docker-config` | under files |
//! | `SSH_AUTH_SOCK`, `HOME`, `LOGNAME`, `USER` | `ssh-agent-socket`, `ssh-home`, `ssh-user` | under files |
//!
//! What was set for desync, casync or this program wins over files, as in desync. What a machine sets for every program is a
//! default: a file that says something about one store knows better. `S3_REGION` without keys beside it is such a default, too.
//! An empty variable counts as not set.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::store_options::StoreOption;
use super::stores::Section;
use super::value::{Kind, Value};
use super::{ConfigError, Origin};

/// A look-up of environment variables.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// Variables handed to the S3 client by their names in lower case.
const S3_MORE: &[&str] = &[
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_ENDPOINT_URL_STS",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_METADATA_ENDPOINT",
];

/// A variable that is set, and not empty.
pub fn set(lookup: Lookup<'_>, name: &str) -> Option<OsString> {
    lookup(name).filter(|value| !value.is_empty())
}

/// What the environment says: the section under all files, and the one over them.
///
/// # Errors
/// A variable is not what its option takes.
pub fn sections(lookup: Lookup<'_>) -> Result<(Section, Section), ConfigError> {
    let mut under = Reader { lookup, section: Section::for_all(Origin::Default) };
    let mut over = Reader { lookup, section: Section::for_all(Origin::Default) };

    let keys = [
        ["S3_ACCESS_KEY", "S3_SECRET_KEY", "S3_SESSION_TOKEN"],
        ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"],
    ];
    let has_keys = match keys.iter().find(|names| set(lookup, names[0]).is_some()) {
        Some([access_key, secret_key, session_token]) => {
            over.option("s3-access-key", access_key)?;
            over.option("s3-secret-key", secret_key)?;
            over.option("s3-session-token", session_token)?;
            true
        }
        None => false,
    };
    for name in ["AWS_DEFAULT_REGION", "AWS_REGION"] {
        under.option("s3-region", name)?;
    }
    if has_keys { &mut over } else { &mut under }.option("s3-region", "S3_REGION")?;
    for (option, name) in [
        ("oci-username", "DESYNC_OCI_USERNAME"),
        ("oci-password", "DESYNC_OCI_PASSWORD"),
        ("ssh-program", "CASYNC_SSH_PATH"),
        ("ssh-remote-command", "CASYNC_REMOTE_PATH"),
    ] {
        over.option(option, name)?;
    }

    let mut more = Vec::new();
    let mut more_origin = None;
    for name in S3_MORE {
        if let Some(value) = under.text(name)? {
            more.push((name.to_ascii_lowercase(), value));
            more_origin = Some(Origin::Environment(name));
        }
    }
    if let Some(origin) = more_origin {
        under.section.set("s3-more", Value::Pairs(more), origin);
    }
    // A token of the machine's identity comes before the file that everybody has, as for the programs of AWS.
    if set(lookup, "AWS_WEB_IDENTITY_TOKEN_FILE").is_none() {
        under.file_below_home("s3-credentials-file", ".aws/credentials");
    }
    under.file_below_home("gcs-credentials-file", ".config/gcloud/application_default_credentials.json");
    under.file_below_home("docker-config", ".docker/config.json");
    for (option, name) in [
        ("encryption-key", "DESYNC_ENCRYPTION_KEY"),
        ("s3-profile", "AWS_PROFILE"),
        ("s3-credentials-file", "AWS_SHARED_CREDENTIALS_FILE"),
        ("gcs-credentials-file", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("ssh-agent-socket", "SSH_AUTH_SOCK"),
        ("ssh-home", "HOME"),
        ("ssh-user", "USER"),
        ("ssh-user", "LOGNAME"),
    ] {
        under.option(option, name)?;
    }
    if let Some(host) = under.text("STORAGE_EMULATOR_HOST")? {
        let server = if host.contains("://") { host } else { format!("http://{host}") };
        under.section.set("gcs-endpoint", Value::Text(server), Origin::Environment("STORAGE_EMULATOR_HOST"));
    }
    if let Some(dir) = set(lookup, "DOCKER_CONFIG") {
        let path = absolute(Path::new(&dir)).join("config.json");
        under.section.set("docker-config", Value::Path(path), Origin::Environment("DOCKER_CONFIG"));
    }
    Ok((under.section, over.section))
}

struct Reader<'a> {
    lookup: Lookup<'a>,
    section: Section,
}

impl Reader<'_> {
    fn text(&self, name: &'static str) -> Result<Option<String>, ConfigError> {
        // A wrong value is not repeated: it may be a secret.
        let wrong = |_| ConfigError::at(&Origin::Environment(name), "not UTF-8");
        set(self.lookup, name).map(|value| value.into_string().map_err(wrong)).transpose()
    }

    /// Sets an option from a variable, if there is one.
    fn option(&mut self, option: &'static str, name: &'static str) -> Result<(), ConfigError> {
        let Some(kind) = StoreOption::find(option).map(|option| &option.kind) else { return Ok(()) };
        let value = match kind {
            // A path may be any bytes.
            Kind::Path(_) => set(self.lookup, name).map(|path| Value::Path(absolute(Path::new(&path)))),
            Kind::Program(_) => set(self.lookup, name).map(|path| Value::Path(path.into())),
            _ => match self.text(name)? {
                Some(text) => {
                    let wrong = || ConfigError::at(&Origin::Environment(name), &format!("not {}", kind.expected()));
                    Some(kind.typed(&text, Path::new("")).ok_or_else(wrong)?)
                }
                None => None,
            },
        };
        if let Some(value) = value {
            self.section.set(option, value, Origin::Environment(name));
        }
        Ok(())
    }

    /// Sets an option to a file of the home directory, if it is there.
    fn file_below_home(&mut self, option: &'static str, path: &str) {
        let Some(home) = set(self.lookup, "HOME") else { return };
        let path = Path::new(&home).join(path);
        if path.is_file() {
            self.section.set(option, Value::Path(path), Origin::Environment("HOME"));
        }
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or(path.to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::StoreSettings;
    use crate::store::{Secret, StoreOptions};

    fn options(variables: &[(&str, &str)], location: &str) -> Result<StoreOptions, ConfigError> {
        let lookup = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.into());
        let (under, over) = sections(&lookup)?;
        Ok(StoreSettings::new(vec![under, over]).resolve(location)?.remove(0).options)
    }

    #[test]
    fn the_first_set_of_s3_keys_counts() {
        let aws = [("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b"), ("AWS_SESSION_TOKEN", "c")];
        let s3 = options(&aws, "s3+https://h/b").unwrap().s3;
        assert_eq!(s3.access_key.as_deref(), Some("a"));
        assert_eq!((s3.secret_key, s3.session_token), (Some(Secret::new("b")), Some(Secret::new("c"))));
        let both = [&aws[..], &[("S3_ACCESS_KEY", "d"), ("S3_SECRET_KEY", "e"), ("S3_REGION", "r")]].concat();
        let s3 = options(&both, "s3+https://h/b").unwrap().s3;
        assert_eq!((s3.access_key.as_deref(), s3.region.as_deref()), (Some("d"), Some("r")));
        assert_eq!((s3.secret_key, s3.session_token), (Some(Secret::new("e")), None));
        let half = [("S3_ACCESS_KEY", "d"), ("AWS_SECRET_ACCESS_KEY", "b")];
        assert!(options(&half, "s3+https://h/b").is_err());
    }

    #[test]
    fn each_variable_has_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().to_str().unwrap();
        let below = |path: &str| Some(dir.path().join(path));
        let files = [".aws/credentials", ".config/gcloud/application_default_credentials.json", ".docker/config.json"];
        for file in files {
            let path = dir.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let at = |variables: &[(&str, &str)], location: &str| {
            options(&[&[("HOME", home)][..], variables].concat(), location).unwrap()
        };
        assert_eq!(at(&[], "s3+http://h/b").s3.credentials_file, below(files[0]));
        assert_eq!(at(&[], "gs://b").gcs.credentials_file, below(files[1]));
        assert_eq!(at(&[], "oci+http://h/b").oci.docker_config, below(files[2]));

        let aws = [("AWS_PROFILE", "p"), ("AWS_SHARED_CREDENTIALS_FILE", "/c"), ("AWS_REGION", "r")];
        let s3 = at(&aws, "s3+http://h/b").s3;
        assert_eq!(
            (s3.profile.as_deref(), s3.credentials_file, s3.region.as_deref()),
            (Some("p"), Some("/c".into()), Some("r"))
        );
        let web = at(&[("AWS_WEB_IDENTITY_TOKEN_FILE", "/t"), ("AWS_ROLE_ARN", "arn")], "s3+http://h/b").s3;
        assert_eq!(web.credentials_file, None);
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(web.more, [pair("aws_web_identity_token_file", "/t"), pair("aws_role_arn", "arn")]);

        let gcs = [("GOOGLE_APPLICATION_CREDENTIALS", "/g"), ("STORAGE_EMULATOR_HOST", "localhost:4443")];
        let gcs = at(&gcs, "gs://b").gcs;
        assert_eq!((gcs.credentials_file, gcs.endpoint.as_deref()), (Some("/g".into()), Some("http://localhost:4443")));
        let oci = [("DESYNC_OCI_USERNAME", "u"), ("DESYNC_OCI_PASSWORD", "p"), ("DOCKER_CONFIG", "/d")];
        let oci = at(&oci, "oci+http://h/b").oci;
        assert_eq!((oci.username.as_deref(), oci.password), (Some("u"), Some(Secret::new("p"))));
        assert_eq!(oci.docker_config, Some("/d/config.json".into()));
        let ssh =
            [("CASYNC_SSH_PATH", "myssh"), ("CASYNC_REMOTE_PATH", "caifs"), ("SSH_AUTH_SOCK", "/a"), ("USER", "me")];
        let ssh = at(&ssh, "ssh://h/p").ssh;
        assert_eq!((ssh.program.to_str(), ssh.remote_command.as_str()), (Some("myssh"), "caifs"));
        assert_eq!((ssh.agent_socket, ssh.home), (Some("/a".into()), Some(dir.path().into())));
        assert_eq!(ssh.user.as_deref(), Some("me"));
    }

    #[test]
    fn an_empty_variable_is_none_and_a_password_needs_a_name() {
        assert_eq!(options(&[("S3_ACCESS_KEY", ""), ("HOME", "")], "s3+http://h/b"), Ok(StoreOptions::default()));
        let error = options(&[("DESYNC_OCI_PASSWORD", "geheim")], "oci+http://h/b").unwrap_err().to_string();
        assert!(error.contains("oci-password is given without oci-username") && !error.contains("geheim"), "{error}");
        assert!(options(&[("DESYNC_OCI_PASSWORD", "geheim")], "http://h/b").is_ok());
    }
}
