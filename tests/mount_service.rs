//! The mount as a service, with a trivial file system behind it: what mount tables show, dead and busy mounts, readiness and
//! failure of the background process, signals, and mounting as an ordinary user. Needs root and /dev/fuse.

mod server;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use caifs::mount::attach::{AttachRequest, READ_AHEAD_KIB, attach};
use caifs::mount::detach::{How, Unmounted, unmount_path};
use caifs::mount::options::{KernelOptions, VfsFlags};
use caifs::mount::run::Place;
use caifs::mount::table::{MountEntry, MountTable};
use caifs::mount::{FS_TYPE, MountError};
use caifs::volume::FileKind;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::support::mounted::is_running;
use server::{Behaviour, CONTENT, Wanted};

/// Nothing in these tests takes as long; what does hangs.
const LIMIT: Duration = Duration::from_secs(30);

/// The user that is not root.
const NOBODY: u32 = 65534;

/// Whether mounts can be made here; if not, says why, and fails where everything is required.
fn can_mount() -> bool {
    let missing = if !nix::unistd::geteuid().is_root() {
        "not root"
    } else if !Path::new("/dev/fuse").exists() {
        "no /dev/fuse"
    } else {
        return true;
    };
    let required = std::env::var_os("CAIFS_REQUIRE_PEERS").is_some_and(|value| value == "1");
    assert!(!required, "cannot mount: {missing}");
    eprintln!("skipped: cannot mount: {missing}");
    false
}

/// A directory with the mountpoint `m` in it; all mounts below are gone when it goes, also when a test fails.
struct Ground(TempDir);

impl Ground {
    fn new() -> Self {
        let ground = Self(tempfile::tempdir().expect("temporary directory"));
        fs::create_dir(ground.mountpoint()).expect("mountpoint");
        ground
    }

    fn path(&self) -> PathBuf {
        self.0.path().canonicalize().expect("temporary directory")
    }

    fn mountpoint(&self) -> PathBuf {
        self.path().join("m")
    }

    /// What the table shows at the mountpoint.
    fn mounted(&self) -> Option<MountEntry> {
        MountTable::read().expect("mount table").at(&self.mountpoint()).cloned()
    }

    /// Mounts in the background; the process that serves.
    fn mount(&self, source: &str) -> Pid {
        let output = finish(&Wanted::new(source, self.mountpoint()));
        assert!(output.status.success(), "{output:?}");
        let pid = String::from_utf8(output.stdout).expect("a number").trim().parse().expect("a number");
        Pid::from_raw(pid)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let base = self.path();
        let is_below = |entry: &&MountEntry| entry.mountpoint.starts_with(&base);
        while let Some(entry) = MountTable::read().expect("mount table").entries().iter().rfind(is_below) {
            if umount2(&entry.mountpoint, MntFlags::MNT_DETACH).is_err() {
                return;
            }
        }
    }
}

fn program() -> PathBuf {
    std::env::current_exe().expect("test program")
}

fn start(wanted: &Wanted) -> Child {
    let mut command = Command::new(program());
    wanted.tell(&mut command);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("started")
}

/// Runs to the end of the process *and of its output*, as `$(…)` does.
fn finish(wanted: &Wanted) -> Output {
    output_of(start(wanted))
}

fn output_of(child: Child) -> Output {
    let pid = child.id();
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    let output = receiver.recv_timeout(LIMIT);
    output.unwrap_or_else(|_| panic!("process {pid} or its output does not end")).expect("output")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits until something holds, and fails when it never does.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn hello(mountpoint: &Path) -> Vec<u8> {
    fs::read(mountpoint.join("hello")).expect("the file of the test file system")
}

#[test]
fn the_mount_table_shows_type_source_and_flags_as_asked_for() {
    if !can_mount() {
        return;
    }
    for source in [
        "/srv/images/app.caibx",
        r"a b,c\d#e",
        "https://host/x?a=1,rw,suid&b=2",
        "-o",
        "tab\tand\nnewline",
        "ümlaut.caidx",
    ] {
        let ground = Ground::new();
        let pid = ground.mount(source);
        let entry = ground.mounted().expect("mounted");
        assert_eq!(entry.fs_type, "fuse.caifs");
        assert_eq!(entry.source, source);
        for flag in ["ro", "nosuid", "nodev"] {
            assert!(entry.options.split(',').any(|option| option == flag), "{flag}: {}", entry.options);
        }
        for option in ["ro", "user_id=0", "group_id=0", "default_permissions", "allow_other"] {
            assert!(entry.super_options.split(',').any(|one| one == option), "{option}: {}", entry.super_options);
        }
        assert_eq!(hello(&ground.mountpoint()), CONTENT);
        assert_eq!(
            fs::write(ground.mountpoint().join("new"), b"").expect_err("read-only").raw_os_error(),
            Some(libc::EROFS)
        );
        let bdi = format!("/sys/class/bdi/{}:{}/read_ahead_kb", entry.id.major, entry.id.minor);
        assert_eq!(fs::read_to_string(bdi).expect("bdi").trim(), READ_AHEAD_KIB.to_string());
        umount2(&ground.mountpoint(), MntFlags::empty()).expect("an idle mount is unmounted");
        until("the process ends when its mount has gone", || !is_running(pid.as_raw()));
    }
}

#[test]
fn a_password_is_not_in_the_mount_table() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    ground.mount("https://user:secret@host/x.caibx");
    assert_eq!(ground.mounted().expect("mounted").source, "https://user@host/x.caibx");
    let again = finish(&Wanted::new("https://user:secret@host/x.caibx", ground.mountpoint()));
    assert_eq!(again.status.code(), Some(32));
    let expected = format!(
        "caifs: cannot mount https://user@host/x.caibx on {0}: already mounted on {0}\n",
        ground.mountpoint().display()
    );
    assert_eq!(stderr(&again), expected);
}

#[test]
fn a_single_file_is_mounted_on_a_file() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let file = ground.path().join("disk.img");
    fs::write(&file, b"below").expect("mountpoint");
    let mut wanted = Wanted::new("disk.caibx", &file);
    wanted.root = FileKind::Regular;
    let output = finish(&wanted);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(fs::read(&file).expect("mounted file"), CONTENT);
    assert_eq!(unmount_path(&file, How::WhenIdle).expect("unmounted"), Unmounted::Gone);
    assert_eq!(fs::read(&file).expect("file"), b"below");
}

#[test]
fn mountpoints_that_do_not_fit_are_refused_with_the_reason() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let file = ground.path().join("file");
    fs::write(&file, b"").expect("file");
    let mut on_directory = Wanted::new("x", ground.mountpoint());
    on_directory.root = FileKind::Regular;
    for (wanted, reason) in [
        (Wanted::new("x", ground.path().join("missing")), "does not exist"),
        (Wanted::new("x", ground.path().join("missing/deeper")), "does not exist"),
        (Wanted::new("x", &file), "is not a directory"),
        (on_directory, "is not a regular file, as a mount of a single file needs"),
    ] {
        let output = finish(&wanted);
        assert_eq!(output.status.code(), Some(32));
        let path = wanted.mountpoint.display();
        assert_eq!(stderr(&output), format!("caifs: cannot mount x on {path}: mountpoint {path}: {reason}\n"));
    }
}

#[test]
fn a_dead_mount_of_ours_is_cleaned_away_also_through_a_symlink() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let link = ground.path().join("link");
    std::os::unix::fs::symlink(ground.mountpoint(), &link).expect("symlink");
    for mountpoint in [ground.mountpoint(), link] {
        let pid = ground.mount("one");
        kill(pid, Signal::SIGKILL).expect("kill");
        let is_dead = || nix::sys::stat::stat(&ground.mountpoint()) == Err(Errno::ENOTCONN);
        until("the mount is dead", is_dead);
        let output = finish(&Wanted::new("one", mountpoint));
        assert!(output.status.success(), "{output:?}");
        assert_eq!(hello(&ground.mountpoint()), CONTENT);
        let table = MountTable::read().expect("mount table");
        let n_mounts = table.entries().iter().filter(|entry| entry.mountpoint == ground.mountpoint()).count();
        assert_eq!(n_mounts, 1, "the dead mount does not lie below the new one");
        unmount_path(&ground.mountpoint(), How::WhenIdle).expect("unmounted");
        assert_eq!(ground.mounted(), None);
    }
}

#[test]
fn a_busy_mount_goes_out_of_sight_and_serves_its_last_user() {
    if !can_mount() {
        return;
    }
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let ground = Ground::new();
        let pid = ground.mount("busy");
        let mut user = File::open(ground.mountpoint().join("hello")).expect("open");
        let busy = unmount_path(&ground.mountpoint(), How::WhenIdle).expect_err("in use");
        assert!(matches!(busy, MountError::Unmount { busy: true, .. }), "{busy}");
        kill(pid, Signal::SIGHUP).expect("kill");
        kill(pid, signal).expect("kill");
        until("it is out of sight", || ground.mounted().is_none());
        assert!(is_running(pid.as_raw()));
        let mut content = Vec::new();
        user.rewind().expect("rewind");
        user.read_to_end(&mut content).expect("read by the last user");
        assert_eq!(content, CONTENT);
        drop(user);
        until("the process ends with its last user", || !is_running(pid.as_raw()));
    }
}

#[test]
fn a_mount_in_use_survives_whoever_ends_services_and_ends_by_sigint_after_that() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let pid = ground.mount("busy");
    let user = File::open(ground.mountpoint().join("hello")).expect("open");
    kill(pid, Signal::SIGTERM).expect("kill");
    until("it is out of sight", || ground.mounted().is_none());
    // What the kernel has kept is dropped, so that the process must answer.
    let read = || {
        let dropped = nix::fcntl::posix_fadvise(&user, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        dropped.expect("fadvise");
        user.read_at(&mut [0u8; 1], 0)
    };
    // Each is taken before the next is sent: those that wait are one.
    for signal in [Signal::SIGTERM, Signal::SIGUSR1, Signal::SIGTERM] {
        kill(pid, signal).expect("kill");
        until("it is taken", || !is_waiting(pid, signal));
        read().expect("it is served on");
    }
    assert!(is_running(pid.as_raw()));
    kill(pid, Signal::SIGINT).expect("kill");
    until("the process ends", || !is_running(pid.as_raw()));
    assert!(read().is_err(), "nobody serves the user any more");
}

/// Whether a signal was sent to a process that has not taken it yet.
fn is_waiting(pid: Pid, signal: Signal) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let waiting = status.lines().find_map(|line| line.strip_prefix("ShdPnd:")).unwrap_or("0").trim().to_owned();
    u64::from_str_radix(&waiting, 16).expect("a mask") & 1 << (signal as i32 - 1) != 0
}

#[test]
fn in_the_foreground_a_signal_unmounts_and_the_exit_code_is_0() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let mut wanted = Wanted::new("front", ground.mountpoint());
    wanted.place = Place::Foreground;
    let child = start(&wanted);
    until("mounted", || ground.mounted().is_some());
    assert_eq!(hello(&ground.mountpoint()), CONTENT);
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).expect("kill");
    let output = output_of(child);
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
    assert_eq!(ground.mounted(), None);
}

#[test]
fn failures_reach_the_caller_with_reason_and_exit_code_and_leave_no_mount() {
    if !can_mount() {
        return;
    }
    for (behaviour, exit_code, reason) in [
        (Behaviour::OpenFails, 32, "index x.caibx: it is no index"),
        (Behaviour::OpenPanics, 4, "internal error: the background process panicked (see above)"),
        (Behaviour::OpenDies, 32, "the background process was killed by SIGKILL before the mount was ready"),
        (Behaviour::ServeFails, 32, "FUSE session: as asked for"),
    ] {
        let ground = Ground::new();
        let mut wanted = Wanted::new("x", ground.mountpoint());
        wanted.behaviour = behaviour;
        let output = finish(&wanted);
        let lines = stderr(&output);
        let expected = format!("caifs: cannot mount x on {}: {reason}", ground.mountpoint().display());
        assert_eq!(lines.lines().last(), Some(expected.as_str()), "{behaviour:?}");
        assert_eq!(output.status.code(), Some(exit_code), "{behaviour:?}");
        assert_eq!(lines.matches("cannot mount").count(), 1, "the reason is said once: {lines}");
        assert_eq!(ground.mounted(), None, "{behaviour:?}");
    }
}

#[test]
fn a_process_that_is_never_ready_is_ended_in_time() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let mut wanted = Wanted::new("x", ground.mountpoint());
    wanted.behaviour = Behaviour::OpenIsSlow;
    wanted.timeout = Duration::from_millis(500);
    let output = finish(&wanted);
    assert_eq!(output.status.code(), Some(32));
    assert!(stderr(&output).ends_with(": not ready within 0.5 s\n"), "{}", stderr(&output));
    assert_eq!(ground.mounted(), None);
}

#[test]
fn nothing_stays_mounted_when_the_caller_is_killed_while_waiting() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let mut wanted = Wanted::new("x", ground.mountpoint());
    wanted.behaviour = Behaviour::OpenIsSlow;
    let caller = start(&wanted);
    let children = format!("/proc/{0}/task/{0}/children", caller.id());
    let mut child = String::new();
    until("the child is there", || {
        child = fs::read_to_string(&children).unwrap_or_default();
        !child.trim().is_empty()
    });
    let child = Pid::from_raw(child.trim().parse().expect("one child"));
    kill(Pid::from_raw(caller.id().cast_signed()), Signal::SIGKILL).expect("kill");
    // The output ends with the child, which holds it until it is ready.
    output_of(caller);
    until("the child ends", || !is_running(child.as_raw()));
    assert_eq!(ground.mounted(), None);
}

#[test]
fn only_our_own_mount_is_ever_unmounted() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let mountpoint = ground.mountpoint();
    let nothing = unmount_path(&mountpoint, How::Lazily).expect_err("nothing is mounted");
    assert_eq!(nothing.to_string(), format!("{} is not a mountpoint", mountpoint.display()));

    let source = OsString::from_vec(b"not \xff utf-8".to_vec());
    let request = AttachRequest {
        mountpoint: &mountpoint,
        source: &source,
        root_kind: FileKind::Directory,
        flags: VfsFlags::default(),
        kernel: &KernelOptions::default(),
        allow_other: false,
    };
    let mounted = attach(&request).expect("mounted");
    let entry = ground.mounted().expect("mounted");
    assert_eq!((entry.id, &entry.source), (mounted.attached.id(), &source));

    nix::mount::mount(Some("cover"), &mountpoint, Some("tmpfs"), MsFlags::empty(), None::<&str>).expect("tmpfs");
    let covered = mounted.attached.unmount(How::LazilyWhenBusy).expect_err("covered");
    assert!(covered.to_string().ends_with("is covered by another mount (tmpfs)"), "{covered}");
    let foreign = unmount_path(&mountpoint, How::Lazily).expect_err("a tmpfs is not ours");
    assert!(foreign.to_string().ends_with("is a mount of tmpfs, not of caifs"), "{foreign}");
    assert_eq!(ground.mounted().expect("still there").fs_type, "tmpfs");
    umount2(&mountpoint, MntFlags::empty()).expect("umount tmpfs");

    drop(mounted);
    assert_eq!(ground.mounted(), None, "dropping unmounts");
}

#[test]
fn a_mount_that_has_gone_leaves_its_successor_alone_even_with_the_same_numbers() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let mountpoint = ground.mountpoint();
    let attach_here = || {
        let source = OsString::from("x");
        let request = AttachRequest {
            mountpoint: &mountpoint,
            source: &source,
            root_kind: FileKind::Directory,
            flags: VfsFlags::default(),
            kernel: &KernelOptions::default(),
            allow_other: false,
        };
        attach(&request).expect("mounted")
    };
    // Others mount at the same time, so the numbers come back in most rounds, not in each.
    for _ in 0..20 {
        let first = attach_here();
        umount2(&mountpoint, MntFlags::empty()).expect("umount by somebody else");
        let second = attach_here();
        assert_eq!(first.attached.unmount(How::Lazily).expect("nothing to do"), Unmounted::Gone);
        drop(first);
        assert_eq!(ground.mounted().map(|entry| entry.id), Some(second.attached.id()));
        drop(second);
        assert_eq!(ground.mounted(), None);
    }
}

pub fn users_may_open_fuse() -> bool {
    fs::metadata("/dev/fuse").expect("/dev/fuse").permissions().mode() & 0o006 == 0o006
}

/// Runs one test again where /dev/fuse is open to everybody.
pub fn run_with_open_fuse(test: &str) {
    // Mounts of other tests would live as long as this place.
    let script = r#"timeout 10 umount -l -c -a -t fuse.caifs || :
        mount -t tmpfs none "$1"; mknod -m 666 "$1/fuse" c 10 229; mount --bind "$1/fuse" /dev/fuse
        exec "$2" --exact "$3" --nocapture"#;
    let directory = tempfile::tempdir().expect("temporary directory");
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", script, "sh"]).arg(directory.path()).arg(program()).arg(test);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("unshare");
    let output = output_of(child);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{}", stderr(&output));
}

#[test]
fn a_user_mounts_through_fusermount3() {
    if !can_mount() {
        return;
    }
    let found = |name: &str| Command::new(name).arg("--version").output().is_ok();
    if !found("fusermount3") || !found("setpriv") {
        let required = std::env::var_os("CAIFS_REQUIRE_PEERS").is_some_and(|value| value == "1");
        assert!(!required, "fusermount3 or setpriv is missing");
        eprintln!("skipped: fusermount3 or setpriv is missing");
        return;
    }
    if !users_may_open_fuse() {
        // As udev has it everywhere; in a mount namespace, so that nothing changes for others.
        run_with_open_fuse("mount_service::a_user_mounts_through_fusermount3");
        return;
    }
    let ground = Ground::new();
    fs::set_permissions(ground.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
    chown(ground.mountpoint(), Some(NOBODY), Some(NOBODY)).expect("chown");
    // The test program itself may lie where nobody else can go.
    let copy = ground.path().join("program");
    fs::copy(program(), &copy).expect("copy");
    let as_nobody = |wanted: &Wanted| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]).arg(&copy);
        // A service may have no PATH at all.
        command.env_remove("PATH");
        wanted.tell(&mut command);
        let child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("started");
        output_of(child)
    };
    let source = r"a b,suid\,c";
    for signal in [Some(Signal::SIGTERM), Some(Signal::SIGKILL), None] {
        let output = as_nobody(&Wanted::new(source, ground.mountpoint()));
        assert!(output.status.success(), "{output:?}");
        let entry = ground.mounted().expect("mounted");
        assert_eq!((entry.fs_type.as_str(), &entry.source), (FS_TYPE, &OsString::from(source)));
        assert!(entry.options.starts_with("ro,nosuid,nodev"), "{}", entry.options);
        assert!(entry.super_options.contains("user_id=65534"), "{}", entry.super_options);
        let pid = Pid::from_raw(String::from_utf8_lossy(&output.stdout).trim().parse().expect("a number"));
        match signal {
            // The user unmounts; after SIGKILL the next round finds a dead mount.
            Some(signal) => kill(pid, signal).expect("kill"),
            None => umount2(&ground.mountpoint(), MntFlags::empty()).expect("umount"),
        }
        until("the process ends", || !is_running(pid.as_raw()));
        if signal != Some(Signal::SIGKILL) {
            until("unmounted", || ground.mounted().is_none());
        }
    }

    let user_may = fs::read_to_string("/etc/fuse.conf").unwrap_or_default();
    if !user_may.lines().any(|line| line.trim() == "user_allow_other") {
        let mut wanted = Wanted::new(source, ground.mountpoint());
        wanted.allow_other = Some(true);
        let output = as_nobody(&wanted);
        assert_eq!(output.status.code(), Some(32));
        assert!(stderr(&output).contains("user_allow_other"), "{}", stderr(&output));
        assert!(
            stderr(&output).contains("(root can add that line; or mount without allow-other)"),
            "{}",
            stderr(&output)
        );
    }
    fs::create_dir(ground.path().join("of-root")).expect("mkdir");
    let output = as_nobody(&Wanted::new("x", ground.path().join("of-root")));
    assert_eq!(output.status.code(), Some(32));
    assert!(stderr(&output).contains("the mountpoint must belong to the user who mounts"), "{}", stderr(&output));
}
