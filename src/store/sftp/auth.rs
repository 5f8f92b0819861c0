//! Logging in: by the keys of an agent, then by key files.
//!
//! A server counts keys and ends the session after a few (six with OpenSSH). So of an agent's keys those that are
//! also named as files are shown first.
//!
//! Invariant: what was tried and why it failed is in the error; no key and no passphrase is.

use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ssh2::ErrorCode;

use super::session::{Fault, Target};

/// Key files of `~/.ssh` that are tried when none are named.
const DEFAULT_IDENTITIES: &[&str] = &["id_ed25519", "id_ecdsa", "id_rsa"];

/// libssh2: the server does not take the key.
const AUTHENTICATION_FAILED: i32 = -18;

/// libssh2: the key was not proved, or the connection ended meanwhile.
const PUBLICKEY_UNVERIFIED: i32 = -19;

/// libssh2: the connection failed.
const CONNECTION_ERRORS: &[i32] = &[-7, -9, -13, -43];

/// Logs in.
pub fn log_in(ssh: &ssh2::Session, target: &Target) -> Result<(), Fault> {
    let methods = match ssh.auth_methods(&target.user) {
        Ok(methods) => methods.to_owned(),
        // A server that lets everybody in has no methods to name.
        Err(_) if ssh.authenticated() => return Ok(()),
        Err(error) => return Err(fault(target, &error, &[])),
    };
    if ssh.authenticated() {
        return Ok(());
    }
    if !methods.split(',').any(|method| method == "publickey") {
        let user = &target.user;
        return Err(Fault::Refused(format!("the server does not let {user} log in by key, only by {methods}")));
    }
    let mut tried = Vec::new();
    let identities = identity_files(target);
    if let Some(socket) = &target.agent_socket
        && by_agent(ssh, target, socket, &identities, &mut tried)?
    {
        return Ok(());
    }
    for file in &identities {
        match ssh.userauth_pubkey_file(&target.user, None, file, None) {
            Ok(()) => return Ok(()),
            Err(error) => {
                let why = match refusal(ssh, target, &error, &tried)? {
                    Some(why) => why,
                    None if !file.exists() => "no such file",
                    None => "cannot be read (add a key with a passphrase to an agent)",
                };
                tried.push(format!("{} ({why})", file.display()));
            }
        }
    }
    if tried.is_empty() {
        tried.push("nothing: there is no agent and no key file".to_owned());
    }
    Err(Fault::Refused(format!("cannot log in as {}; tried {}", target.user, tried.join(", "))))
}

/// The key files to try.
fn identity_files(target: &Target) -> Vec<PathBuf> {
    if !target.identity_files.is_empty() {
        return target.identity_files.clone();
    }
    let Some(home) = &target.home else { return Vec::new() };
    DEFAULT_IDENTITIES.iter().map(|name| home.join(".ssh").join(name)).filter(|file| file.exists()).collect()
}

/// Tries the keys of an agent. An agent that does not answer as it should is one more thing that was tried.
fn by_agent(
    ssh: &ssh2::Session,
    target: &Target,
    socket: &Path,
    identities: &[PathBuf],
    tried: &mut Vec<String>,
) -> Result<bool, Fault> {
    let shown = socket.display();
    let mut agent = ssh.agent()?;
    agent.set_identity_path(socket)?;
    if let Err(error) = agent.connect().and_then(|()| agent.list_identities()) {
        tried.push(format!("the agent {shown} ({})", error.message()));
        return Ok(false);
    }
    let mut keys = agent.identities()?;
    if keys.is_empty() {
        tried.push(format!("the agent {shown} (it has no keys)"));
    }
    let named: Vec<Vec<u8>> = identities.iter().filter_map(|file| public_key(file)).collect();
    keys.sort_by_key(|key| !named.iter().any(|named| named == key.blob()));
    for key in keys {
        match agent.userauth(&target.user, &key) {
            Ok(()) => return Ok(true),
            Err(error) => {
                let why = refusal(ssh, target, &error, tried)?.unwrap_or(error.message());
                tried.push(format!("the agent's key {} ({why})", key.comment()));
            }
        }
    }
    Ok(false)
}

/// Why the server did not take a key; `None` when it was not asked. The end of the connection is a fault.
fn refusal(
    ssh: &ssh2::Session,
    target: &Target,
    error: &ssh2::Error,
    tried: &[String],
) -> Result<Option<&'static str>, Fault> {
    match error.code() {
        ErrorCode::Session(AUTHENTICATION_FAILED) => Ok(Some("refused")),
        ErrorCode::Session(code) if CONNECTION_ERRORS.contains(&code) => Err(fault(target, error, tried)),
        // Only asking something else tells whether there is anybody left.
        ErrorCode::Session(PUBLICKEY_UNVERIFIED) => match ssh.auth_methods(&target.user) {
            Ok(_) => Ok(Some("not proved")),
            Err(_) => Err(fault(target, error, tried)),
        },
        _ => Ok(None),
    }
}

/// The public key beside a private one.
fn public_key(file: &Path) -> Option<Vec<u8>> {
    let mut name = file.as_os_str().to_owned();
    name.push(".pub");
    let text = std::fs::read_to_string(PathBuf::from(name)).ok()?;
    STANDARD.decode(text.split_ascii_whitespace().nth(1)?).ok()
}

/// A connection that ends behind refused keys ends because of them.
fn fault(target: &Target, error: &ssh2::Error, tried: &[String]) -> Fault {
    match tried.iter().any(|tried| tried.ends_with("(refused)")) {
        true => Fault::Refused(format!("the server ended the login of {} after {}", target.user, tried.join(", "))),
        false => Fault::Broken(format!("the login of {} failed: {}", target.user, error.message())),
    }
}
