//! The peers: programs that tests and benchmarks compare with, found and never installed.
//!
//! A missing peer is said in one line, once, and its tests are skipped. With `CAIFS_REQUIRE_PEERS=1`, which `.ci/run`
//! sets, a missing peer is a failure.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// A program that is there.
#[derive(Debug, Clone)]
pub struct Peer {
    /// The name it was asked for by.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
}

impl Peer {
    /// The program, ready for its arguments.
    pub fn command(&self) -> Command {
        Command::new(&self.path)
    }
}

/// Finds a peer; says what is missing, and that tests are skipped, when it is not there.
///
/// # Panics
/// When the peer is missing and `CAIFS_REQUIRE_PEERS=1`.
#[track_caller]
pub fn peer(name: &str) -> Option<Peer> {
    if let Some(path) = find(name) {
        return Some(Peer { name: name.to_owned(), path });
    }
    missing(&format!("{name} ({})", how_to_get(name)));
    None
}

/// Says that something a test needs is not there (`what` names it): the test is to return then.
///
/// # Panics
/// When `CAIFS_REQUIRE_PEERS=1`.
#[track_caller]
pub fn missing(what: &str) {
    assert!(!peers_are_required(), "missing: {what}, and CAIFS_REQUIRE_PEERS=1");
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let mut said = SAID.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if said.insert(what.to_owned()) {
        // Written directly, because the test runner swallows what passing tests print.
        let _ = writeln!(std::io::stderr(), "missing: {what}; tests that need it are skipped");
    }
}

/// Whether a missing peer is a failure.
pub fn peers_are_required() -> bool {
    std::env::var_os("CAIFS_REQUIRE_PEERS").is_some_and(|value| value == "1")
}

/// Where a program is: `$CAIFS_PEERS`, then `target/peers` (both made by `tests/peers/build`), then `PATH`, then the
/// system directories that a user's `PATH` may lack.
pub fn find(name: &str) -> Option<PathBuf> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/peers");
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::var_os("CAIFS_PEERS")
        .map(PathBuf::from)
        .into_iter()
        .chain([built])
        .chain(std::env::split_paths(&path))
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(name))
        .find(|candidate| is_executable(candidate))
}

fn is_executable(path: &Path) -> bool {
    path.is_file() && nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok()
}

fn how_to_get(name: &str) -> String {
    let package = match name {
        "desync" | "rclone" | "fake-gcs-server" => return "run tests/peers/build".to_owned(),
        "squashfuse_ll" => "squashfuse",
        "mksquashfs" => "squashfs-tools",
        "mkfs.ext4" | "e2fsck" | "chattr" | "lsattr" | "debugfs" => "e2fsprogs",
        "fusermount3" | "mount.fuse3" => "fuse3",
        "unshare" | "nsenter" | "setpriv" | "fsfreeze" => "util-linux",
        "systemd-analyze" => "systemd",
        "getfattr" | "setfattr" => "attr",
        "getfacl" | "setfacl" => "acl",
        "setcap" | "getcap" => "libcap2-bin",
        "htpasswd" => "apache2-utils",
        "sshd" | "sftp-server" => "openssh-server",
        "ssh" | "ssh-keygen" | "ssh-agent" | "ssh-add" | "sftp" => "openssh-client",
        "man" => "man-db",
        "ip" => "iproute2",
        "script" => "bsdutils",
        "findmnt" | "losetup" => "util-linux",
        other => other,
    };
    format!("apt-get install {package}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_in_the_path_is_found() {
        let sh = peer("sh").expect("every system has sh");
        assert!(sh.command().args(["-c", "exit 0"]).status().expect("sh starts").success());
    }

    #[test]
    fn a_missing_peer_is_nothing_or_a_failure() {
        let outcome = std::panic::catch_unwind(|| peer("no-such-peer-of-caifs"));
        match peers_are_required() {
            true => assert!(outcome.is_err()),
            false => assert!(matches!(outcome, Ok(None))),
        }
    }
}
