//! Credentials as Docker keeps them: in its `config.json`, or with a program `docker-credential-NAME` that the file names.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::Deserialize;

use crate::store::Secret;
use crate::store::local::plain_words;

/// How long a credential helper may take: it may be waiting for somebody to type.
pub(super) const HELPER_LIMIT: Duration = Duration::from_secs(10);

/// The most bytes of a helper's answer and of the file.
const MAX_ANSWER_BYTES: u64 = 64 << 10;
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// The key under which Docker keeps the login to its own registry.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// What says who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Credentials {
    /// A user and a password (or an access token in its place).
    Password {
        /// The user.
        user: String,
        /// The password.
        password: Secret,
    },
    /// A token that a token server takes for the password.
    IdentityToken(Secret),
}

/// A user and a secret, as a helper gives them.
pub(super) struct Login {
    pub user: String,
    pub secret: String,
}

impl From<Login> for Credentials {
    fn from(login: Login) -> Self {
        // Docker marks an identity token by this name.
        match login.user.as_str() {
            "<token>" => Self::IdentityToken(Secret::new(login.secret)),
            _ => Self::Password { user: login.user, password: Secret::new(login.secret) },
        }
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Config {
    auths: HashMap<String, Entry>,
    cred_helpers: HashMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "lowercase", default)]
struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    username: String,
    secret: String,
}

/// The credentials for a registry (`host[:port]`) by Docker's `config.json`: from the helper for this registry, else from the helper for all
/// or the file itself. `None` when there are none, or no file.
///
/// # Errors
/// What is wrong with the file, or what the helper said.
pub(super) fn credentials(config: &Path, host: &str, limit: Duration) -> Result<Option<Credentials>, String> {
    let mut content = Vec::new();
    let opened = std::fs::File::open(config).and_then(|file| file.take(MAX_CONFIG_BYTES).read_to_end(&mut content));
    match opened {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(plain_words(&error)),
    }
    // The words of the parser could repeat a part of the file.
    let config: Config = serde_json::from_slice(&content).map_err(|error| {
        format!("not a Docker configuration: wrong at line {}, column {}", error.line(), error.column())
    })?;
    config.credentials(host, limit)
}

impl Config {
    fn credentials(&self, host: &str, limit: Duration) -> Result<Option<Credentials>, String> {
        let keys = keys(host);
        let own_helper = keys.iter().find_map(|key| self.cred_helpers.get(*key));
        let helper = own_helper.or(self.creds_store.as_ref()).filter(|name| !name.is_empty());
        if let Some(name) = helper {
            if name.contains('/') {
                return Err("a credential helper's name cannot have a '/'".to_owned());
            }
            let program = OsString::from(format!("docker-credential-{name}"));
            // Docker asks its helper by the full name of its own registry.
            let asked = keys.last().copied().unwrap_or(host);
            if let Some(login) = ask_helper(&program, asked, limit)? {
                return Ok(Some(login.into()));
            }
        }
        let entry = self.auths.iter().find(|(key, _)| keys.contains(&key.as_str()) || keys.contains(&host_of(key)));
        match entry {
            Some((_, entry)) => entry.credentials(),
            None => Ok(None),
        }
    }
}

impl Entry {
    fn credentials(&self) -> Result<Option<Credentials>, String> {
        let filled = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        if let Some(token) = filled(&self.identitytoken) {
            return Ok(Some(Credentials::IdentityToken(Secret::new(token))));
        }
        let (user, password) = match (filled(&self.auth), filled(&self.username), filled(&self.password)) {
            (Some(auth), _, _) => {
                let wrong = || "an auth of the Docker configuration is not base64 of USER:PASSWORD".to_owned();
                let decoded = BASE64_STANDARD.decode(auth.trim()).map_err(|_| wrong())?;
                let text = String::from_utf8(decoded).map_err(|_| wrong())?;
                let (user, password) = text.split_once(':').ok_or_else(wrong)?;
                (user.to_owned(), password.trim_end_matches('\0').to_owned())
            }
            (None, Some(user), Some(password)) => (user, password),
            _ => return Ok(None),
        };
        Ok(Some(Credentials::Password { user, password: Secret::new(password) }))
    }
}

/// The names under which the login to a registry is kept.
fn keys(host: &str) -> Vec<&str> {
    match host {
        "registry-1.docker.io" | "docker.io" | "index.docker.io" => vec![host, "docker.io", DOCKER_HUB],
        _ => vec![host],
    }
}

/// `host[:port]` of a key, which may be a URL.
fn host_of(key: &str) -> &str {
    let behind = key.split_once("://").map_or(key, |(_, behind)| behind);
    behind.split('/').next().unwrap_or(behind)
}

/// Asks a credential helper (docker-credential-helpers' protocol: the server on standard input, JSON on standard output); `None` when it
/// has no credentials.
fn ask_helper(program: &OsStr, server: &str, limit: Duration) -> Result<Option<Login>, String> {
    let shown = program.to_string_lossy();
    let mut child = Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(|error| format!("cannot run {shown}: {}", plain_words(&error)))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A helper that does not read has answered, or fails by itself.
        drop(writeln!(stdin, "{server}"));
    }
    let (sender, receiver) = mpsc::channel();
    let stdout = child.stdout.take();
    std::thread::spawn(move || {
        let mut answer = Vec::new();
        if let Some(stdout) = stdout {
            // What was read before an error is judged like any answer.
            drop(stdout.take(MAX_ANSWER_BYTES).read_to_end(&mut answer));
        }
        // Nobody waits any more when the time is over.
        drop(sender.send(answer));
    });
    let answer = receiver.recv_timeout(limit);
    if answer.is_err() {
        // The group may have ended at this very moment.
        let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
    }
    // A helper that closed its output and stays would keep us: its answer is there, it may go.
    let status = match (&answer, child.try_wait()) {
        (Ok(_), Ok(None)) => wait_a_little(&mut child),
        _ => child.wait().ok(),
    };
    let Ok(answer) = answer else {
        return Err(format!("{shown} did not answer within {} s", limit.as_secs_f32()));
    };
    if !status.is_some_and(|status| status.success()) {
        let text = String::from_utf8_lossy(&answer);
        let first = text.lines().next().unwrap_or_default().trim();
        return match first.to_ascii_lowercase().contains("credentials not found") {
            true => Ok(None),
            false if first.is_empty() => Err(format!("{shown} failed")),
            false => Err(format!("{shown}: {}", first.chars().take(200).collect::<String>())),
        };
    }
    match serde_json::from_slice::<HelperAnswer>(&answer) {
        Ok(answer) if answer.secret.is_empty() => Ok(None),
        Ok(answer) => Ok(Some(Login { user: answer.username, secret: answer.secret })),
        Err(_) => Err(format!("{shown} gave an answer that is not what it should be")),
    }
}

/// Waits for a child that has said all it has to say, and ends it when it does not end by itself.
fn wait_a_little(child: &mut std::process::Child) -> Option<std::process::ExitStatus> {
    for _ in 0..100 {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
    child.wait().ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    fn password(user: &str, password: &str) -> Credentials {
        Credentials::Password { user: user.to_owned(), password: Secret::new(password) }
    }

    #[test]
    fn the_file_has_logins_by_host() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        assert_eq!(credentials(&path, "h", LIMIT), Ok(None));
        // "dTpwOnE=" is u:p:q.
        let content = r#"{"auths": {"h:5000": {"auth": "dTpwOnE="}, "https://url.example/v2/": {"username": "a", "password": "b"},
            "t": {"auth": "dTpwOnE=", "identitytoken": "tok"}, "empty": {}, "bad": {"auth": "%%"},
            "https://index.docker.io/v1/": {"auth": "dTpwOnE="}}, "HttpHeaders": {"x": "y"}}"#;
        std::fs::write(&path, content).unwrap();
        let get = |host: &str| credentials(&path, host, LIMIT);
        assert_eq!(get("h:5000"), Ok(Some(password("u", "p:q"))));
        assert_eq!(get("h"), Ok(None));
        assert_eq!(get("url.example"), Ok(Some(password("a", "b"))));
        assert_eq!(get("t"), Ok(Some(Credentials::IdentityToken(Secret::new("tok")))));
        assert_eq!(get("empty"), Ok(None));
        assert_eq!(get("registry-1.docker.io"), Ok(Some(password("u", "p:q"))));
        assert!(get("bad").unwrap_err().contains("not base64"));
        std::fs::write(&path, r#"{"auths": {"h": "hidden"}}"#).unwrap();
        let error = get("h").unwrap_err();
        assert!(error.contains("line 1") && !error.contains("hidden"), "{error}");
    }

    #[test]
    fn helpers_are_asked_by_the_name_of_the_registry() {
        let dir = tempfile::tempdir().unwrap();
        let script = |name: &str, text: &str| -> OsString {
            let path = dir.path().join(name);
            // Written by another process: a file that a thread of this one has open for writing, when a test beside this one forks,
            // cannot be run.
            let write = r#"printf '#!/bin/sh\n%s\n' "$1" > "$0" && chmod 755 "$0""#;
            assert!(Command::new("sh").arg("-c").arg(write).arg(&path).arg(text).status().unwrap().success());
            path.into()
        };
        let good = script(
            "good",
            r#"test "$1" = get && read server && printf '{"ServerURL":"%s","Username":"user","Secret":"for %s"}' "$server" "$server""#,
        );
        let login = ask_helper(&good, "h:5000", LIMIT).unwrap().unwrap();
        assert_eq!((login.user.as_str(), login.secret.as_str()), ("user", "for h:5000"));
        let token = script("token", r#"echo '{"Username":"<token>","Secret":"tok"}'"#);
        let login = ask_helper(&token, "h", LIMIT).unwrap().unwrap();
        assert_eq!(Credentials::from(login), Credentials::IdentityToken(Secret::new("tok")));
        let none = script("none", "echo credentials not found in native keychain; exit 1");
        assert!(ask_helper(&none, "h", LIMIT).unwrap().is_none());
        for (helper, limit, what) in [
            (script("locked", "echo the keychain is locked; exit 1"), LIMIT, "locked: the keychain is locked"),
            (script("rubbish", "echo rubbish"), LIMIT, "not what it should be"),
            (script("hangs", "sleep 600"), Duration::from_millis(50), "did not answer within 0.05 s"),
            (dir.path().join("nowhere").into(), LIMIT, "No such file or directory"),
        ] {
            let Err(error) = ask_helper(&helper, "h", limit) else { panic!("{what}") };
            assert!(error.contains(what), "{error}");
        }
    }

    #[test]
    fn a_helper_of_the_registry_comes_before_that_for_all() {
        let config = |text: &str| serde_json::from_str::<Config>(text).unwrap().credentials("h", LIMIT);
        let error = config(r#"{"credHelpers": {"h": "no-such-one"}, "credsStore": "no-such-two"}"#).unwrap_err();
        assert!(error.contains("docker-credential-no-such-one"), "{error}");
        let error = config(r#"{"credHelpers": {"x": "no-such-one"}, "credsStore": "no-such-two"}"#).unwrap_err();
        assert!(error.contains("docker-credential-no-such-two"), "{error}");
        assert!(config(r#"{"credsStore": "../x"}"#).unwrap_err().contains("'/'"));
        assert_eq!(
            config(r#"{"credsStore": "", "auths": {"h": {"auth": "dTpwOnE="}}}"#),
            Ok(Some(password("u", "p:q")))
        );
    }
}
