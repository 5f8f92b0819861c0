//! Whether a server is the one that is meant: `known_hosts` files as OpenSSH's sshd(8) describes them.
//!
//! Lines are read here (patterns, negation, `[host]:port`, `@revoked`); only hashed names are compared by libssh2, which has SHA-1.
//! Certificates of hosts (`@cert-authority`) are not supported: such lines are passed over, and no certificate is asked for.
//!
//! Invariant: only a key that a line for this very host and port has is accepted.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use ssh2::{CheckResult, HashType, KnownHostFileKind, MethodType};

use super::session::{DEFAULT_PORT, Fault, Target};

/// The host keys for everyone on this machine.
const SYSTEM_FILE: &str = "/etc/ssh/ssh_known_hosts";

/// Types of host keys with the algorithms that prove them, best first. SHA-1 signatures and DSA are left out, as OpenSSH does.
const ALGORITHMS: &[(&str, &str)] = &[
    ("ssh-ed25519", "ssh-ed25519"),
    ("ecdsa-sha2-nistp256", "ecdsa-sha2-nistp256"),
    ("ecdsa-sha2-nistp384", "ecdsa-sha2-nistp384"),
    ("ecdsa-sha2-nistp521", "ecdsa-sha2-nistp521"),
    ("ssh-rsa", "rsa-sha2-512,rsa-sha2-256"),
];

/// The keys that are known.
#[derive(Debug)]
pub struct KnownHosts {
    lines: Vec<Line>,
    /// The file to name to people.
    file: PathBuf,
}

/// One line of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    is_revoked: bool,
    /// Patterns, or one hashed name.
    hosts: String,
    key_type: String,
    /// In base64.
    key: String,
}

/// Reads the files that count for a server.
pub fn read(target: &Target) -> Result<KnownHosts, Fault> {
    if let Some(file) = &target.known_hosts {
        let text = read_file(file).map_err(|error| Fault::Refused(format!("{}: {error}", file.display())))?;
        return Ok(KnownHosts { lines: parse(&text), file: file.clone() });
    }
    let own = target.home.as_ref().map(|home| home.join(".ssh/known_hosts"));
    let system = PathBuf::from(SYSTEM_FILE);
    let mut lines = Vec::new();
    for file in own.iter().chain([&system]) {
        match read_file(file) {
            Ok(text) => lines.extend(parse(&text)),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => tracing::warn!("{}: {error}", file.display()),
        }
    }
    Ok(KnownHosts { lines, file: own.unwrap_or(system) })
}

/// Comments may be in any encoding.
fn read_file(file: &Path) -> std::io::Result<String> {
    Ok(String::from_utf8_lossy(&std::fs::read(file)?).into_owned())
}

fn parse(text: &str) -> Vec<Line> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Line> {
    let mut words = line.split_ascii_whitespace().peekable();
    let is_revoked = match words.peek()? {
        word if word.starts_with('#') => return None,
        &"@revoked" => words.next().is_some(),
        // What a marker unknown to us says of its line cannot be guessed.
        word if word.starts_with('@') => return None,
        _ => false,
    };
    let mut next = || words.next().map(str::to_owned);
    Some(Line { is_revoked, hosts: next()?, key_type: next()?, key: next()? })
}

impl KnownHosts {
    /// Has the server prove itself by a key that is known, if it has several.
    pub fn prefer_known(&self, ssh: &ssh2::Session, target: &Target) -> Result<(), Fault> {
        let lines = self.lines_for(ssh, target);
        Ok(ssh.method_pref(MethodType::HostKey, &preference(&lines))?)
    }

    /// Checks the key the server has proved to have.
    pub fn check(&self, ssh: &ssh2::Session, target: &Target) -> Result<(), Fault> {
        let (Some((key, _)), Some(hash)) = (ssh.host_key(), ssh.host_key_hash(HashType::Sha256)) else {
            return Err(Fault::Broken("the server has shown no key".to_owned()));
        };
        let key_type = key_type(key);
        let shown = format!("{key_type} SHA256:{}", STANDARD_NO_PAD.encode(hash));
        let encoded = STANDARD.encode(key);
        let Target { host, port, .. } = target;
        let file = self.file.display();
        let reason = match judge(&self.lines_for(ssh, target), &key_type, &encoded) {
            Verdict::Known => return Ok(()),
            Verdict::Revoked => format!("the host key {shown} is revoked in {file}"),
            Verdict::Changed => format!(
                "the host key is not the one known: it is {shown} now, and somebody may be in between; if that is right, \
                 remove the old one (ssh-keygen -R '{}' -f {file}) and log in once with ssh",
                names(target)[0]
            ),
            Verdict::Unknown => format!(
                "the host key {shown} is not known; log in once with ssh, or add what \
                 `ssh-keyscan -p {port} {host}` says to {file} if the fingerprint is right"
            ),
        };
        Err(Fault::Refused(reason))
    }

    /// The lines for a server. A server on a port of its own that no line names may have the key of its host, as with OpenSSH.
    fn lines_for(&self, ssh: &ssh2::Session, target: &Target) -> Vec<&Line> {
        for name in names(target) {
            let lines: Vec<&Line> = self.lines.iter().filter(|line| line.is_for(ssh, &name)).collect();
            if lines.iter().any(|line| !line.is_revoked) {
                return lines;
            }
        }
        // Nothing but perhaps revocations, which must count.
        let is_named = |line: &&Line| names(target).iter().any(|name| line.is_for(ssh, name));
        self.lines.iter().filter(is_named).collect()
    }
}

/// What a server is called in the files, the exact name first.
fn names(target: &Target) -> Vec<String> {
    let host = target.host.to_ascii_lowercase();
    match target.port {
        DEFAULT_PORT => vec![host],
        port => vec![format!("[{host}]:{port}"), host],
    }
}

/// What the lines for a server say of its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Known,
    Unknown,
    Changed,
    Revoked,
}

fn judge(lines: &[&Line], key_type: &str, key: &str) -> Verdict {
    let (same, other): (Vec<&Line>, Vec<&Line>) = lines.iter().copied().partition(|line| line.key == key);
    if same.iter().any(|line| line.is_revoked) {
        return Verdict::Revoked;
    }
    if !same.is_empty() {
        return Verdict::Known;
    }
    match other.iter().any(|line| !line.is_revoked && line.key_type == key_type) {
        true => Verdict::Changed,
        false => Verdict::Unknown,
    }
}

/// Algorithms to ask for: those of known keys first.
fn preference(lines: &[&Line]) -> String {
    let is_known = |key_type: &str| lines.iter().any(|line| !line.is_revoked && line.key_type == key_type);
    let (known, other): (Vec<_>, Vec<_>) = ALGORITHMS.iter().partition(|(key_type, _)| is_known(key_type));
    let algorithms: Vec<&str> = known.iter().chain(&other).map(|(_, algorithms)| *algorithms).collect();
    algorithms.join(",")
}

/// A key's type, which is its first text.
fn key_type(key: &[u8]) -> String {
    let text = key.split_first_chunk().and_then(|(length, rest)| rest.get(..u32::from_be_bytes(*length) as usize));
    String::from_utf8_lossy(text.unwrap_or(b"unknown")).into_owned()
}

impl Line {
    /// Whether the line is for a server of this name.
    fn is_for(&self, ssh: &ssh2::Session, name: &str) -> bool {
        if self.hosts.starts_with('|') {
            return self.is_hash_of(ssh, name).unwrap_or(false);
        }
        let mut is_named = false;
        for pattern in self.hosts.split(',') {
            let (is_negated, pattern) = match pattern.strip_prefix('!') {
                Some(pattern) => (true, pattern),
                None => (false, pattern),
            };
            if matches(pattern.to_ascii_lowercase().as_bytes(), name.as_bytes()) {
                if is_negated {
                    return false;
                }
                is_named = true;
            }
        }
        is_named
    }

    /// Whether `|1|salt|hash` is the hash of a name. To libssh2 this line is all there is to know, and no key is the empty one: a
    /// key that does not fit means that the name does.
    fn is_hash_of(&self, ssh: &ssh2::Session, name: &str) -> Result<bool, ssh2::Error> {
        let mut hosts = ssh.known_hosts()?;
        hosts.read_str(&format!("{} {} {}", self.hosts, self.key_type, self.key), KnownHostFileKind::OpenSSH)?;
        Ok(matches!(hosts.check(name, b"no key"), CheckResult::Mismatch))
    }
}

/// Whether a name fits a pattern with `*` (any text) and `?` (one character).
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut at, mut pos) = (0, 0);
    // Where the last star stands, and how much of the name it was given.
    let mut star = None;
    while pos < name.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, pos));
                at += 1;
            }
            Some(&byte) if byte == b'?' || byte == name[pos] => {
                at += 1;
                pos += 1;
            }
            _ => {
                let Some((star_at, given)) = star else { return false };
                star = Some((star_at, given + 1));
                (at, pos) = (star_at + 1, given + 1);
            }
        }
    }
    pattern[at..].iter().all(|&byte| byte == b'*')
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::StoreOptions;
    use crate::store::location::SshLocation;

    const ED: &str = "AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ";

    fn target(host: &str, port: u16) -> Target {
        let location =
            SshLocation { user: Some("u".into()), host: host.into(), port: Some(port), path: "/".to_owned() };
        Target::new(&location, &StoreOptions::default()).unwrap()
    }

    /// The names of the lines for a server, of a file with these lines.
    fn named(text: &str, host: &str, port: u16) -> Vec<String> {
        let ssh = ssh2::Session::new().unwrap();
        let known = KnownHosts { lines: parse(text), file: "f".into() };
        known.lines_for(&ssh, &target(host, port)).into_iter().map(|line| line.hosts.clone()).collect()
    }

    #[test]
    fn names_are_matched_as_openssh_does() {
        for (hosts, host, port, fits) in [
            ("h", "h", 22, true),
            ("H.example", "h.EXAMPLE", 22, true),
            ("h", "hh", 22, false),
            ("a,h,b", "h", 22, true),
            ("*", "h", 22, true),
            ("*.x.org", "a.b.x.org", 22, true),
            ("*.x.org", "x.org", 22, false),
            ("h?,!h2", "h1", 22, true),
            ("h?,!h2", "h2", 22, false),
            ("!h2", "h1", 22, false),
            ("[h]:2222", "h", 2222, true),
            ("[h]:2222", "h", 22, false),
            ("[h]:2222", "h", 2223, false),
            ("h", "h", 2222, true),
            ("[*]:2222", "h", 2222, true),
            ("::1", "::1", 22, true),
            ("[::1]:2222", "::1", 2222, true),
        ] {
            let line = format!("{hosts} ssh-ed25519 {ED} a comment\n");
            let wanted: &[&str] = if fits { &[hosts] } else { &[] };
            assert_eq!(named(&line, host, port), wanted, "{hosts} for {host}:{port}");
        }
    }

    #[test]
    fn a_line_for_the_port_hides_the_host_s() {
        let text = format!("h ssh-ed25519 {ED}\n[h]:2222 ssh-ed25519 {ED}\n");
        assert_eq!(named(&text, "h", 2222), ["[h]:2222"]);
        assert_eq!(named(&text, "h", 22), ["h"]);
        assert_eq!(named(&text, "h", 1), ["h"]);
    }

    #[test]
    fn hashed_names_are_found() {
        // Made by ssh-keygen -H.
        for (hashed, port) in [
            ("|1|/Dnj6IXSemX7s+6H8VLQvLenmw0=|d/2G3IkL/Cmw6QVepVyed6htF54=", 22),
            ("|1|A6DydKL5wsC8LgzGj7OLA8bz/WU=|VCOybb2GYQYVfvbRfpFi3GFim8Q=", 2222),
        ] {
            let line = format!("{hashed} ssh-ed25519 {ED}\n");
            assert_eq!(named(&line, "h", port), [hashed]);
            assert!(named(&line, "other", port).is_empty());
        }
        assert!(named(&format!("|1|rubbish ssh-ed25519 {ED}\n"), "h", 22).is_empty());
        assert!(named(&format!("|2|a|b ssh-ed25519 {ED}\n"), "h", 22).is_empty());
    }

    #[test]
    fn lines_that_say_nothing_are_passed_over() {
        let text =
            format!("\n# h ssh-ed25519 {ED}\nh\nh ssh-ed25519\n@cert-authority h ssh-ed25519 {ED}\n@x h t {ED}\n");
        assert_eq!(parse(&text), []);
        let revoked = parse_line(&format!("@revoked * ssh-ed25519 {ED}")).unwrap();
        assert!(revoked.is_revoked && revoked.hosts == "*");
    }

    #[test]
    fn only_a_known_key_is_accepted() {
        let line = |is_revoked, key_type: &str, key: &str| Line {
            is_revoked,
            hosts: "h".to_owned(),
            key_type: key_type.to_owned(),
            key: key.to_owned(),
        };
        let (known, old) = (line(false, "ssh-ed25519", "A"), line(false, "ssh-ed25519", "B"));
        let (rsa, revoked) = (line(false, "ssh-rsa", "C"), line(true, "ssh-ed25519", "A"));
        for (lines, verdict) in [
            (vec![&known], Verdict::Known),
            (vec![&old, &rsa, &known], Verdict::Known),
            (vec![&old], Verdict::Changed),
            (vec![&rsa], Verdict::Unknown),
            (vec![], Verdict::Unknown),
            (vec![&known, &revoked], Verdict::Revoked),
            (vec![&revoked], Verdict::Revoked),
        ] {
            assert_eq!(judge(&lines, "ssh-ed25519", "A"), verdict, "{lines:?}");
        }
        assert!(preference(&[]).starts_with("ssh-ed25519,"));
        assert!(preference(&[&rsa]).starts_with("rsa-sha2-512,rsa-sha2-256,ssh-ed25519,"));
        assert!(preference(&[&revoked, &rsa]).starts_with("rsa-sha2-512"));
    }

    #[test]
    fn a_revocation_for_every_host_counts_without_another_line() {
        assert_eq!(named(&format!("@revoked * ssh-ed25519 {ED}\n"), "h", 2222), ["*"]);
        // And it does not hide the line of the host without a port.
        let text = format!("@revoked * ssh-ed25519 {ED}\nh ssh-ed25519 {ED}\n");
        assert_eq!(named(&text, "h", 2222), ["*", "h"]);
    }
}
