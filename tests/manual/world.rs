//! The world of the examples: a machine of their own in namespaces, where `https://cdn.example/`, `/srv/store.castr` and `backup@host` exist.
//!
//! Its root is this machine's under an overlay, so that examples write wherever they like; its network has nothing but the servers that the
//! examples name: nginx, `rclone serve s3` and sshd. It ends, with all processes, mounts and files, when its first process does. What is
//! there stands in `world.sh`.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::support::certificates::Certificates;
use crate::support::is_root;
use crate::support::peers::{missing, peer};
use crate::support::run::{command, run, run_within};
use crate::support::scratch::Scratch;

/// How long all examples may take together.
const LIMIT: Duration = Duration::from_secs(600);

/// Names that the world's servers answer to.
const HOSTS: &[&str] = &["host", "near", "far", "cdn.example", "backup.example", "s3.example", "s3.eu"];

/// What the world needs of this machine.
const PROGRAMS: &[&str] = &[
    "unshare",
    "chroot",
    "ip",
    "nginx",
    "rclone",
    "sshd",
    "ssh-keygen",
    "mkfs.ext4",
    "casync",
    "minisign",
    "findmnt",
    "losetup",
];

/// A script, with what to call it.
#[derive(Debug)]
pub struct Script {
    pub name: String,
    pub text: String,
}

#[derive(Debug)]
pub struct World {
    dir: Scratch,
}

impl World {
    /// A world to be; `None` when this machine cannot have one.
    pub fn new() -> Option<Self> {
        for program in PROGRAMS {
            peer(program)?;
        }
        let can = is_root() && Path::new("/dev/fuse").exists();
        let namespaces = || run(&mut command("unshare", ["-m", "-n", "-p", "-f", "true"])).status.success();
        if !can || !namespaces() {
            missing("root, /dev/fuse and namespaces: a machine for the examples");
            return None;
        }
        Some(Self { dir: Scratch::new() })
    }

    /// Runs scripts one after the other, each with fresh files; tells of those that failed, with what they said.
    pub fn run(&self, scripts: &[Script]) -> Vec<String> {
        let shared = self.dir.dir("shared");
        fs::create_dir(shared.join("scripts")).unwrap();
        fs::create_dir(shared.join("tls")).unwrap();
        Certificates::make_for(&shared.join("tls"), HOSTS);
        fs::write(shared.join("hosts"), format!("127.0.0.1 localhost {}\n", HOSTS.join(" "))).unwrap();
        fs::write(shared.join("inside.sh"), include_str!("inside.sh")).unwrap();
        let path = |n: usize, kind: &str| shared.join("scripts").join(format!("{n:03}.{kind}"));
        for (n, script) in scripts.iter().enumerate() {
            fs::write(path(n, "sh"), format!("{}\n{}", include_str!("prelude.sh"), script.text)).unwrap();
        }
        let outside = self.dir.file("outside.sh", include_str!("outside.sh"));
        let mut world =
            command("unshare", ["-m", "-n", "-p", "-f", "--kill-child", "--mount-proc", "--propagation", "private"]);
        world.arg("bash").arg(outside).arg(&*self.dir).arg(env!("CARGO_BIN_EXE_caifs"));
        world.arg(peer("rclone").expect("it was there").path);
        let ran = run_within(&mut world, LIMIT);
        let read = |n: usize, kind: &str| fs::read_to_string(path(n, kind)).unwrap_or_default();
        let mut failures = Vec::new();
        if !ran.status.success() {
            failures.push(format!("the world itself: {}\n{}{}", ran.status, ran.text(), ran.stderr));
        }
        for (n, script) in scripts.iter().enumerate() {
            if read(n, "status").trim() != "0" {
                let (status, said) = (read(n, "status"), read(n, "out"));
                failures.push(format!("{}: exit {}\n{}---\n{said}", script.name, status.trim(), script.text));
            }
        }
        failures
    }
}
