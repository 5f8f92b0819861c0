//! Mounts and their servers, undone on drop, on panic, and all at once when the program is interrupted.
//!
//! A server that goes into the background is found by its command line, which holds the mountpoint: a path that nothing
//! else uses.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::run;

/// How long a mount may take to become usable.
pub const READY_LIMIT: Duration = Duration::from_secs(120);

/// How long a server may take to end after its mount is gone, before it is told to, and again before it is killed.
const END_LIMIT: Duration = Duration::from_secs(20);

/// Everything mounted now, so that an interrupted program can undo it.
static MOUNTED: Mutex<Vec<Entry>> = Mutex::new(Vec::new());

#[derive(Debug, Clone)]
struct Entry {
    mountpoint: PathBuf,
    pids: Vec<i32>,
}

/// A mount and the processes that serve it.
#[derive(Debug)]
pub struct Mounted {
    /// Where it is mounted (canonical).
    pub mountpoint: PathBuf,
    /// When the program was started.
    pub started: Instant,
    /// From the start of the program until the mount was usable.
    pub time_to_mount: Duration,
    server: Option<Child>,
    pids: Vec<i32>,
}

impl Mounted {
    /// Runs a mount command that returns when the mount is usable and leaves a daemon, such as `caifs mount`.
    ///
    /// # Errors
    /// The command failed (its error output), or returned without a mount.
    pub fn by_command(command: &mut Command, mountpoint: &Path) -> Result<Self, String> {
        let mountpoint = canonical(mountpoint)?;
        // Registered before the mount is there, because an interruption may come in between.
        register(&mountpoint, Vec::new());
        let start = Instant::now();
        let finished = run::run_within(command, READY_LIMIT);
        let time_to_mount = start.elapsed();
        let pids = server_pids(&mountpoint);
        register(&mountpoint, pids.clone());
        let mounted = Self { mountpoint, started: start, time_to_mount, server: None, pids };
        if !finished.status.success() {
            return Err(format!("{}: {}: {}", finished.command, finished.status, finished.stderr.trim_end()));
        }
        if !is_mountpoint(&mounted.mountpoint) {
            return Err(format!("{}: succeeded, but nothing is mounted", finished.command));
        }
        // A mount without a known server could not be ended, nor its memory measured.
        match mounted.pids.is_empty() {
            true => Err(format!("{}: no process names {}", finished.command, mounted.mountpoint.display())),
            false => Ok(mounted),
        }
    }

    /// Starts a server that stays in the foreground and waits until its mount answers.
    ///
    /// # Errors
    /// The server ended, or did not mount in [`READY_LIMIT`].
    pub fn by_server(command: &mut Command, mountpoint: &Path) -> Result<Self, String> {
        let mountpoint = canonical(mountpoint)?;
        register(&mountpoint, Vec::new());
        let shown = run::shown(command);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        let start = Instant::now();
        let server = command.spawn().map_err(|error| format!("cannot start {shown}: {error}"))?;
        let pids = vec![server.id() as i32];
        register(&mountpoint, pids.clone());
        let mut mounted =
            Self { mountpoint, started: start, time_to_mount: Duration::ZERO, server: Some(server), pids };
        loop {
            // The answer comes from the server once the mount is there, so this is also the wait for its readiness.
            if is_mountpoint(&mounted.mountpoint) && mounted.mountpoint.metadata().is_ok() {
                mounted.time_to_mount = start.elapsed();
                return Ok(mounted);
            }
            let ended = mounted.server.as_mut().and_then(|server| server.try_wait().ok().flatten());
            if let Some(status) = ended {
                return Err(format!("{shown}: ended ({status}) without a mount"));
            }
            if start.elapsed() > READY_LIMIT {
                return Err(format!("{shown}: no mount after {READY_LIMIT:?}"));
            }
            thread::sleep(Duration::from_micros(500));
        }
    }

    /// The processes that serve the mount.
    pub fn pids(&self) -> &[i32] {
        &self.pids
    }

    /// The most memory any one server process had resident so far, in bytes (`VmHWM`); `None` when all have ended.
    pub fn peak_rss_bytes(&self) -> Option<u64> {
        self.pids.iter().filter_map(|&pid| status_kib(pid, "VmHWM:")).max().map(|kib| kib * 1024)
    }

    /// Kills the server as a crash would, leaving the dead mount for the test to deal with.
    pub fn kill_server(&mut self) {
        for &pid in &self.pids {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        if let Some(server) = &mut self.server {
            let _ = server.wait();
        }
        wait_for_end(&self.pids, END_LIMIT);
    }

    /// Unmounts and tells whether the server ended by itself thereafter, as it should.
    pub fn end(mut self) -> bool {
        unmount(&self.mountpoint);
        self.server_ends(END_LIMIT)
    }

    fn server_ends(&mut self, limit: Duration) -> bool {
        match &mut self.server {
            Some(server) => run::wait(server, limit).is_some(),
            None => wait_for_end(&self.pids, limit),
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount(&self.mountpoint);
        // A daemon that started after the first look (a command that failed half way) is found now.
        for pid in server_pids(&self.mountpoint) {
            if !self.pids.contains(&pid) {
                self.pids.push(pid);
            }
        }
        for signal in [None, Some(Signal::SIGTERM), Some(Signal::SIGKILL)] {
            for &pid in &self.pids {
                let _ = signal.map(|signal| kill(Pid::from_raw(pid), signal));
            }
            if self.server_ends(END_LIMIT) {
                break;
            }
        }
        let mut all = MOUNTED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        all.retain(|entry| entry.mountpoint != self.mountpoint);
    }
}

/// Undoes every mount of this program and kills the servers: for the end of an interrupted program.
pub fn undo_all() {
    let all = MOUNTED.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
    for entry in all {
        unmount(&entry.mountpoint);
        for pid in entry.pids.into_iter().chain(server_pids(&entry.mountpoint)) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Unmounts lazily whatever is mounted at a path, all layers of it; nothing happens when nothing is.
pub fn unmount(mountpoint: &Path) {
    while is_mountpoint(mountpoint) {
        let lazily = nix::mount::umount2(mountpoint, nix::mount::MntFlags::MNT_DETACH);
        if lazily == Err(Errno::EPERM) {
            let _ = Command::new("fusermount3").arg("-uzq").arg("--").arg(mountpoint).status();
        }
        if lazily.is_err() && is_mountpoint(mountpoint) {
            return;
        }
    }
}

/// Whether something is mounted exactly here, from the kernel's table: no server is asked, so a dead one cannot hang us.
pub fn is_mountpoint(path: &Path) -> bool {
    mount_table().iter().any(|mountpoint| mountpoint == path)
}

/// The mountpoints at or under a directory, innermost first.
pub fn mountpoints_under(dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = mount_table().into_iter().filter(|mountpoint| mountpoint.starts_with(dir)).collect();
    found.reverse();
    found
}

fn mount_table() -> Vec<PathBuf> {
    let table = std::fs::read("/proc/self/mountinfo").expect("/proc is mounted");
    table
        .split(|&byte| byte == b'\n')
        .filter_map(|line| line.split(|&byte| byte == b' ').nth(4))
        .map(|field| PathBuf::from(OsString::from_vec(unescaped(field))))
        .collect()
}

/// The kernel writes space, tab, newline and backslash as a backslash and three octal digits.
fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..] if first == b'\\' => {
                bytes.push((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'));
                rest = tail;
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    bytes
}

/// The processes whose command line names the mountpoint as one of its words.
fn server_pids(mountpoint: &Path) -> Vec<i32> {
    let own = std::process::id() as i32;
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(|&pid| pid != own)
        .filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|&byte| byte == 0).any(|word| word == mountpoint.as_os_str().as_encoded_bytes())
        })
        .collect()
}

fn status_kib(pid: i32, field: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Whether a process is there: one of its threads at least is no zombie, for what it holds is free only then.
pub fn is_running(pid: i32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    threads.filter_map(Result::ok).any(|thread| {
        let Ok(stat) = std::fs::read_to_string(thread.path().join("stat")) else { return false };
        // The state follows the name, which is in parentheses and may hold anything.
        stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
    })
}

fn wait_for_end(pids: &[i32], limit: Duration) -> bool {
    let start = Instant::now();
    while pids.iter().any(|&pid| is_running(pid)) {
        if start.elapsed() > limit {
            return false;
        }
        thread::sleep(Duration::from_millis(2));
    }
    true
}

fn register(mountpoint: &Path, pids: Vec<i32>) {
    let mut all = MOUNTED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    all.retain(|entry| entry.mountpoint != mountpoint);
    all.push(Entry { mountpoint: mountpoint.to_owned(), pids });
}

fn canonical(mountpoint: &Path) -> Result<PathBuf, String> {
    // Only the parent is looked up: the mountpoint itself may be a dead mount, which is a case of its own to test.
    let parent = mountpoint.parent().and_then(|parent| parent.canonicalize().ok());
    match (parent, mountpoint.file_name()) {
        (Some(parent), Some(name)) => Ok(parent.join(name)),
        _ => Err(format!("{} is no place to mount on", mountpoint.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::{is_root, peers, scratch::Scratch};

    #[test]
    fn escapes_of_the_mount_table_are_undone() {
        assert_eq!(unescaped(br"/a\040b\134\011c\12"), b"/a b\\\tc\\12");
    }

    #[test]
    fn a_mount_is_gone_after_its_guard_also_on_panic() {
        if !is_root() || !Path::new("/dev/fuse").exists() {
            return peers::missing("root and /dev/fuse");
        }
        let Some(desync) = peers::peer("desync") else { return };
        let scratch = Scratch::new();
        let blob = scratch.file("noise", super::super::blob::noise(100_000));
        let (index, store, mnt) = (scratch.join("noise.caibx"), scratch.dir("store"), scratch.dir("mnt"));
        let store_of = |command: &mut Command| {
            command.arg("-s").arg(&store);
        };
        let mut make = desync.command();
        make.arg("make");
        store_of(&mut make);
        run::run(make.arg(&index).arg(&blob)).ok();
        let outcome = std::panic::catch_unwind(|| {
            let mut server = desync.command();
            server.arg("mount-index");
            store_of(&mut server);
            let mounted = Mounted::by_server(server.arg(&index).arg(&mnt), &mnt).expect("desync mounts");
            assert!(is_mountpoint(&mounted.mountpoint));
            assert!(mounted.peak_rss_bytes().expect("it runs") > 1 << 20);
            assert_eq!(mountpoints_under(&scratch), std::slice::from_ref(&mounted.mountpoint));
            std::panic::panic_any(mounted.pids().to_vec());
        });
        let pids = outcome.expect_err("it panicked").downcast::<Vec<i32>>().expect("with the pids");
        assert!(!is_mountpoint(&mnt));
        assert!(!pids.is_empty() && pids.iter().all(|&pid| !is_running(pid)));
    }

    #[test]
    fn a_daemon_is_found_and_ends_with_its_mount() {
        if !is_root() || !Path::new("/dev/fuse").exists() {
            return peers::missing("root and /dev/fuse");
        }
        let (Some(make), Some(squashfuse)) = (peers::peer("mksquashfs"), peers::peer("squashfuse_ll")) else { return };
        let scratch = Scratch::new();
        let (source, image, mnt) = (scratch.dir("source"), scratch.join("image"), scratch.dir("mnt"));
        std::fs::write(source.join("file"), "content").expect("written");
        run::run(make.command().arg(&source).arg(&image).args(["-quiet", "-no-progress"])).ok();
        let mounted = Mounted::by_command(squashfuse.command().arg(&image).arg(&mnt), &mnt).expect("it mounts");
        assert_eq!(std::fs::read_to_string(mnt.join("file")).expect("read"), "content");
        assert_eq!(mounted.pids().len(), 1);
        assert!(mounted.end());

        let mut mounted =
            Mounted::by_command(squashfuse.command().arg(&image).arg(&mnt), &mnt).expect("it mounts again");
        mounted.kill_server();
        assert!(is_mountpoint(&mnt) && mnt.metadata().is_err(), "a killed server leaves a dead mount");
        drop(mounted);
        assert!(mnt.metadata().is_ok());
    }

    #[test]
    fn a_command_that_does_not_mount_is_an_error() {
        let scratch = Scratch::new();
        let mnt = scratch.dir("mnt");
        let nothing = Mounted::by_command(&mut Command::new("true"), &mnt).expect_err("nothing is mounted");
        assert!(nothing.ends_with("nothing is mounted"), "{nothing}");
        let ended = Mounted::by_server(&mut Command::new("false"), &mnt).expect_err("it ended");
        assert!(ended.contains("without a mount"), "{ended}");
    }
}
