//! A real sshd with its own host key, one user key, and SFTP: nothing of the machine's own configuration is read or changed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User, geteuid};

use crate::support::peers::{self, peer};
use crate::support::run::{command, run};
use crate::support::scratch::Scratch;
use crate::support::server::{Server, free_port};

/// Where sshd, started by root, looks for its empty directory.
const PRIVILEGE_SEPARATION_DIRECTORY: &str = "/run/sshd";

/// A running sshd that lets the user of the tests in by key. Ended on drop, with the sessions it serves.
#[derive(Debug)]
pub struct Sshd {
    /// Who may log in: the user of the tests.
    pub user: String,
    /// Its port on 127.0.0.1, the same after a restart.
    pub port: u16,
    /// The private key that is let in; `.pub` beside it is the public one.
    pub key: PathBuf,
    /// The server's key as `[127.0.0.1]:port`.
    pub known_hosts: PathBuf,
    /// For `CASYNC_SSH_PATH`: ssh with that key, that port and those known hosts.
    pub ssh: PathBuf,
    server: Option<Server>,
    directory: Scratch,
}

impl Sshd {
    /// Starts a server; `None` when a program is missing here.
    #[track_caller]
    pub fn start() -> Option<Self> {
        for name in ["sshd", "ssh", "ssh-keygen"] {
            peer(name)?;
        }
        let directory = Scratch::new();
        let user = User::from_uid(geteuid()).expect("users can be looked up").expect("the tests' user has a name").name;
        let port = free_port();
        let key = make_key(&directory, "id");
        let host_key = make_key(&directory, "host_key");
        fs::copy(directory.join("id.pub"), directory.join("authorized_keys")).expect("keys can be copied");
        let public = fs::read_to_string(directory.join("host_key.pub")).expect("the host key was made");
        let known_hosts = directory.file("known_hosts", format!("[127.0.0.1]:{port} {public}"));
        directory.file(
            "sshd_config",
            format!(
                "Port {port}\nListenAddress 127.0.0.1\nHostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nPidFile none\n\
                 PasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\nSubsystem sftp internal-sftp\n",
                host_key.display(),
                directory.join("authorized_keys").display(),
            ),
        );
        let ssh = directory.file(
            "ssh",
            format!(
                "#!/bin/sh\nexec ssh -F none -i '{}' -o IdentitiesOnly=yes -o BatchMode=yes -o StrictHostKeyChecking=yes \
                 -o UserKnownHostsFile='{}' -o GlobalKnownHostsFile=none -p {port} \"$@\"\n",
                key.display(),
                known_hosts.display(),
            ),
        );
        fs::set_permissions(&ssh, fs::Permissions::from_mode(0o755)).expect("our own file");
        if geteuid().is_root() {
            // Starting the machine's own sshd would make it; it is empty.
            fs::create_dir_all(PRIVILEGE_SEPARATION_DIRECTORY).expect("root can make it");
        }
        let mut sshd = Self { user, port, key, known_hosts, ssh, server: None, directory };
        sshd.restart();
        Some(sshd)
    }

    /// Ends the server and all sessions, as a crash of its machine would.
    pub fn stop(&mut self) {
        let Some(server) = self.server.take() else { return };
        let sessions = descendants(server.pid());
        drop(server);
        signal(&sessions, Signal::SIGKILL);
    }

    /// Starts it (again), with the same port and keys.
    #[track_caller]
    pub fn restart(&mut self) {
        self.stop();
        let program = peers::find("sshd").expect("it was there at the start");
        let config = self.directory.join("sshd_config");
        // It insists on being started by an absolute path.
        let mut command = command(program, [Path::new("-D"), Path::new("-e"), Path::new("-f"), &config]);
        let log = fs::File::create(self.directory.join("log")).expect("our own directory");
        self.server = Some(Server::start(command.stderr(log), self.port));
    }

    /// Gives the server one more host key, from the next start on.
    pub fn add_host_key(&self, key: &Path) {
        let config = self.directory.join("sshd_config");
        let text = fs::read_to_string(&config).expect("it was written at the start");
        fs::write(config, format!("HostKey {}\n{text}", key.display())).expect("our own file");
    }

    /// Stops all sessions in their tracks: connections stay open, and nobody answers.
    pub fn freeze_sessions(&self) {
        let sessions = self.server.as_ref().map(|server| descendants(server.pid())).unwrap_or_default();
        assert!(!sessions.is_empty(), "there are sessions to freeze");
        signal(&sessions, Signal::SIGSTOP);
    }

    /// How many processes serve sessions.
    pub fn n_session_processes(&self) -> usize {
        self.server.as_ref().map_or(0, |server| descendants(server.pid()).len())
    }

    /// What the server said.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    /// The location of a directory on this server.
    pub fn url(&self, scheme: &str, directory: &Path) -> String {
        format!("{scheme}://{}@127.0.0.1:{}{}", self.user, self.port, directory.display())
    }

    /// The same for programs that leave the port to [`Sshd::ssh`].
    pub fn url_without_port(&self, scheme: &str, directory: &Path) -> String {
        format!("{scheme}://{}@127.0.0.1{}", self.user, directory.display())
    }

    /// A command that uses [`Sshd::ssh`].
    pub fn with_ssh<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("CASYNC_SSH_PATH", &self.ssh)
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Makes a key pair without a passphrase; gives the private one.
#[track_caller]
pub fn make_key(directory: &Path, name: &str) -> PathBuf {
    let path = directory.join(name);
    run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"]).arg(&path)).ok();
    path
}

/// The children of a process and theirs. sshd gives each session a process group of its own, so they are not in the server's.
fn descendants(pid: i32) -> Vec<i32> {
    let parents: Vec<(i32, i32)> = fs::read_dir("/proc")
        .expect("there is a /proc")
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            // "pid (name) state parent …"; the name may hold anything.
            let parent = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse().ok()?;
            Some((pid, parent))
        })
        .collect();
    let mut found = vec![pid];
    let mut at = 0;
    while at < found.len() {
        let parent = found[at];
        found.extend(parents.iter().filter(|(_, other)| *other == parent).map(|(pid, _)| *pid));
        at += 1;
    }
    found.split_off(1)
}

fn signal(pids: &[i32], signal: Signal) {
    for pid in pids {
        // One that has ended by itself needs no signal.
        let _ = kill(Pid::from_raw(*pid), signal);
    }
}
