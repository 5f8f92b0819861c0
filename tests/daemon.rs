//! The process behind a mount: where it logs to, what it keeps open, who it is, and what it may open.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::mount::{can_mount, contents};
use crate::service::ground::{Ground, OTHER, held_back, open_to_all};
use crate::support::mounted::{Mounted, is_mountpoint};
use crate::support::run::{Finished, command, run};
use crate::support::scratch::Scratch;
use crate::support::servers::sshd::Sshd;

/// Nothing in these tests takes as long; what does hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// `CAP_SYS_ADMIN`, with which one may mount, among the bits of a set of capabilities.
const MAY_MOUNT: u64 = 1 << 21;

/// `CAP_DAC_OVERRIDE`.
const MAY_PASS_PERMISSIONS: u64 = 1 << 1;

/// Waits until something holds, and fails when it never does.
#[track_caller]
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < LIMIT, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A field of the status of each thread of a process, with the thread's name.
fn threads_of(pid: i32, field: &str) -> Vec<(String, String)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let statuses = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("status")).ok());
    let field_of = |status: &str, field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        line.unwrap_or_default().trim().to_owned()
    };
    let threads: Vec<_> = statuses.map(|status| (field_of(&status, "Name"), field_of(&status, field))).collect();
    assert!(threads.len() > 4, "{threads:?}");
    threads
}

fn bits(text: &str) -> u64 {
    u64::from_str_radix(text, 16).unwrap()
}

#[test]
fn the_log_of_a_background_mount_goes_to_a_file_that_can_be_moved_away() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let log = ground.scratch.join("caifs.log");
    let mounted = ground.mount(&["--log", log.to_str().unwrap(), "--error-retry=0"]).unwrap();
    fs::remove_dir_all(&ground.store).unwrap();
    let fails = |name: &str| assert!(fs::read(ground.mnt.join(name)).is_err(), "{name}");
    fails("dir 0/file 5");
    // The answer comes first.
    let mut text = String::new();
    until("it is in the log", || {
        text = fs::read_to_string(&log).unwrap();
        text.contains(" WARN EIO (01)") && text.contains("op=\"lookup\"")
    });
    let moved = ground.scratch.join("caifs.log.1");
    fs::rename(&log, &moved).unwrap();
    kill(Pid::from_raw(mounted.pids()[0]), Signal::SIGHUP).unwrap();
    until("the log is opened again", || log.exists());
    // A line may still come into the old one until the new one is in its place.
    until("lines come into the new file", || {
        fails("dir 1/file 5");
        !fs::read(&log).unwrap().is_empty()
    });
    assert!(fs::read_to_string(&moved).unwrap().starts_with(&text), "what was said stays");
    assert!(mounted.end());
}

#[test]
fn a_log_that_takes_no_line_holds_nobody_up() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    // As a disk that hangs: a pipe that is full, and that nobody reads.
    let log = ground.scratch.join("log");
    nix::unistd::mkfifo(&log, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut pipe = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&log).unwrap();
    while pipe.write(&[b'\n'; 512]).is_ok() {}
    let mounted = ground.mount(&["--log", log.to_str().unwrap(), "--error-retry=0"]).unwrap();
    let names: Vec<PathBuf> = contents(&ground.tree).into_keys().collect();
    fs::remove_dir_all(&ground.store).unwrap();
    let (told, all) = mpsc::channel();
    let mnt = ground.mnt.clone();
    std::thread::spawn(move || told.send(names.iter().filter(|name| fs::read(mnt.join(name)).is_err()).count()));
    let n_failed = all.recv_timeout(LIMIT).expect("every read is answered");
    assert!(n_failed > 10, "and is told of in the log: {n_failed}");
    let pid = Pid::from_raw(mounted.pids()[0]);
    kill(pid, Signal::SIGHUP).unwrap();
    run(ground.caifs().arg("status").arg(&ground.mnt)).ok();
    kill(pid, Signal::SIGTERM).unwrap();
    until("it is unmounted", || !is_mountpoint(&ground.mnt));
    assert!(mounted.end(), "the process ends as well");
}

#[test]
fn a_read_that_is_tried_for_ever_does_not_fill_the_log() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let log = ground.scratch.join("caifs.log");
    let mounted = ground.mount(&["--log", log.to_str().unwrap(), "--error-retry=0"]).unwrap();
    let file = fs::File::open(ground.mnt.join("dir 0/file 5")).unwrap();
    fs::remove_dir_all(&ground.store).unwrap();
    const N_READS: usize = 300;
    for _ in 0..N_READS {
        file.read_at(&mut [0; 4096], 150_000).unwrap_err();
    }
    drop(file);
    assert!(mounted.end());
    let text = fs::read_to_string(&log).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| line.contains(" WARN EIO (01)")).collect();
    let n_more = |line: &&str| line.strip_suffix(" more of these)")?.rsplit_once('(')?.1.parse::<usize>().ok();
    let n_said: usize = lines.iter().map(|line| n_more(line).unwrap_or(1)).sum();
    assert!(n_said >= N_READS, "{text}");
    assert!(lines.len() < N_READS / 3, "{text}");
}

#[test]
fn the_log_level_is_an_option_and_can_change() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let log = ground.scratch.join("caifs.log");
    let text = || fs::read_to_string(&log).unwrap();
    let logging = ["--log", log.to_str().unwrap()];
    assert!(ground.mount(&logging).unwrap().end());
    assert_eq!(text(), "", "warnings by default");
    let mounted = ground.mount(&logging).unwrap();
    let remount =
        |options: &str| run(ground.caifs().args(["mount", "-o", options]).arg(&ground.index).arg(&ground.mnt));
    remount("remount,log-level=info").ok();
    until("it is told of", || text().contains(" INFO settings are read again: "));
    assert!(mounted.end());
    // As mount(8) gives it, who has no other way to say so.
    let mounted = ground.mount(&[&logging[..], &["-o", "log-level=info"]].concat()).unwrap();
    until("it is told of", || text().contains(" INFO mounted on "));
    assert!(mounted.end());
    assert!(text().lines().last().unwrap().contains(" INFO ended: 0.0 MiB read, "), "{}", text());
    let refused = run(&mut ground.background(&["--log-level=loud"])).fails();
    assert_eq!(refused.status.code(), Some(1));
    assert!(refused.error_line().contains("error, warn, info, debug or trace"), "{refused:?}");
}

#[test]
fn what_is_done_beside_a_mount_is_in_its_log_from_the_first_line() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let log = ground.scratch.join("caifs.log");
    // It is found missing as soon as anything is begun.
    let options = format!("profile={}", ground.scratch.join("none").display());
    for _ in 0..20 {
        let mounted = ground.mount(&["--log", log.to_str().unwrap(), "-o", &options]).unwrap();
        let text = || fs::read_to_string(&log).unwrap();
        until("it is told of", || text().contains("none: there is no such profile; going on without it"));
        assert!(mounted.end());
        fs::remove_file(&log).unwrap();
    }
}

#[test]
fn a_log_that_cannot_be_is_said_before_anything_is_mounted() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let refused = |log: &str| -> Finished { run(&mut ground.background(&["--log", log])).fails() };
    let missing = ground.scratch.join("no/such/log");
    let said = refused(missing.to_str().unwrap());
    assert!(said.error_line().ends_with(&format!("log {}: No such file or directory", missing.display())), "{said:?}");
    assert_eq!(said.status.code(), Some(32));
    if !Path::new("/run/systemd/journal/socket").exists() {
        let said = refused("journald");
        assert!(said.error_line().contains("log journald: /run/systemd/journal/socket: No such file"), "{said:?}");
    }
    assert!(!is_mountpoint(&ground.mnt));
}

#[test]
fn a_background_mount_logs_to_journald_where_it_runs() {
    if !can_mount() {
        return;
    }
    // A namespace of its own, with a journal of ours.
    let ground = Ground::new();
    let journal = ground.scratch.dir("journal");
    let listener = UnixDatagram::bind(journal.join("socket")).unwrap();
    listener.set_read_timeout(Some(LIMIT)).unwrap();
    // Mounts of other tests would live as long as it.
    let script = r#"timeout 10 umount -l -c -a -t fuse.caifs || :
        mount -t tmpfs none /run; mkdir -p /run/systemd/journal; mount --bind "$1" /run/systemd/journal; shift
        "$@" || exit 9; rm -r "$STORE"; cat "$MNT/dir 0/file 5" >/dev/null 2>&1 && exit 8; umount "$MNT""#;
    let mut in_namespace = command("unshare", ["--mount", "sh", "-c", script, "sh"]);
    in_namespace.arg(&journal).env("MNT", &ground.mnt).env("STORE", &ground.store);
    let mount = ground.background(&["--error-retry=0"]);
    in_namespace.arg(mount.get_program()).args(mount.get_args());
    run(&mut in_namespace).ok();
    let mut entry = vec![0; 64 << 10];
    let n_bytes = listener.recv(&mut entry).unwrap();
    let entry = String::from_utf8_lossy(&entry[..n_bytes]).into_owned();
    for field in ["PRIORITY=4\n", "SYSLOG_IDENTIFIER=caifs\n", "MESSAGE=EIO (01): "] {
        assert!(entry.contains(field), "{field}: {entry}");
    }
    assert!(entry.contains(&format!("MOUNTPOINT={}\n", ground.mnt.display())), "{entry}");
}

#[test]
fn a_background_mount_keeps_nothing_of_its_caller_open() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let mount = ground.background(&[]);
    let mut caller = command("sh", ["-c", r#"exec 7</dev/zero 8>"$LEFT"; "$@""#, "sh"]);
    caller.env("LEFT", ground.scratch.join("left")).arg(mount.get_program()).args(mount.get_args());
    let mounted = Mounted::by_command(&mut caller, &ground.mnt).unwrap();
    let files = fs::read_dir(format!("/proc/{}/fd", mounted.pids()[0])).unwrap();
    let targets: Vec<PathBuf> = files.filter_map(|file| fs::read_link(file.unwrap().path()).ok()).collect();
    assert!(targets.len() > 3, "{targets:?}");
    assert!(!targets.iter().any(|target| target.ends_with("left") || target == Path::new("/dev/zero")), "{targets:?}");
    assert!(mounted.end());
}

#[test]
fn root_becomes_the_user_that_is_asked_for() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let (user, uid) = OTHER;
    open_to_all(&ground.scratch);
    let cache = ground.scratch.dir("cache");
    let args = ["--setuid", user, "--cache", cache.to_str().unwrap()];
    // A cache of root's is of no use to it, which is said.
    fs::set_permissions(&cache, fs::Permissions::from_mode(0o700)).unwrap();
    let refused = run(&mut ground.background(&args)).fails();
    let cache_shown = cache.display();
    let reason =
        format!("setuid: {user} cannot use the cache {cache_shown}: Permission denied (chown -R {user} {cache_shown})");
    assert!(refused.error_line().ends_with(&reason), "{refused:?}");
    assert!(!is_mountpoint(&ground.mnt));

    chown(&cache, Some(uid), None).unwrap();
    let mounted = ground.mount(&args).unwrap();
    assert!(contents(&ground.mnt) == contents(&ground.tree), "root may use it, as other users may");
    let pid = mounted.pids()[0];
    for field in ["Uid", "Gid"] {
        for (name, ids) in threads_of(pid, field) {
            assert_eq!(ids, format!("{uid}\t{uid}\t{uid}\t{uid}"), "{field} of {name}");
        }
    }
    // The first thread is the one that mounted; that of signals unmounts.
    let first = fs::read_to_string(format!("/proc/{pid}/task/{pid}/status")).unwrap();
    assert!(bits(first.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap().trim()) & MAY_MOUNT != 0);
    let with_caps: Vec<_> = threads_of(pid, "CapPrm").into_iter().filter(|(_, caps)| bits(caps) != 0).collect();
    let names: Vec<&str> = with_caps.iter().map(|(name, _)| name.as_str()).collect();
    // Sockets lie in a directory of root's.
    assert_eq!(names, ["caifs", "signals", "caifs-control", "caifs-log"], "{with_caps:?}");
    // A log file may lie where only root can open it again.
    assert_eq!([&with_caps[2].1, &with_caps[3].1].map(|caps| bits(caps)), [MAY_PASS_PERMISSIONS; 2]);
    let status = run(ground.caifs().args(["status", "--json"]).arg(&ground.mnt)).ok().text();
    assert!(status.contains(ground.index.to_str().unwrap()), "{status}");
    for (name, value) in threads_of(pid, "NoNewPrivs") {
        assert_eq!(value, "1", "{name}");
    }
    let owners: Vec<u32> =
        fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().metadata().unwrap().uid()).collect();
    assert!(!owners.is_empty() && owners.iter().all(|&owner| owner == uid), "{owners:?}");
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = table.lines().find(|line| line.contains(ground.mnt.to_str().unwrap())).unwrap();
    assert!(line.contains(&format!("user_id={uid}")) && line.contains("allow_other"), "{line}");
    // Its read-ahead was set, and it unmounts by itself: both only root may.
    let device = line.split(' ').nth(2).unwrap();
    assert_eq!(fs::read_to_string(format!("/sys/class/bdi/{device}/read_ahead_kb")).unwrap().trim(), "4096");
    kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    until("it is unmounted", || !is_mountpoint(&ground.mnt));
    assert!(mounted.end());

    let own = ground.scratch.dir("of-user");
    chown(&own, Some(uid), None).unwrap();
    let made = own.join("cache");
    let mounted = ground.mount(&["--setuid", user, "--cache", made.to_str().unwrap()]).unwrap();
    let metadata = fs::metadata(&made).unwrap();
    assert_eq!((metadata.uid(), metadata.mode() & 0o7777), (uid, 0o700), "a cache that is made is the user's alone");
    assert!(mounted.end());

    // One that is the user's in what the user may not enter is of no use either, and it is not the one to be mended.
    let (shut, link) = (ground.scratch.dir("shut"), ground.scratch.join("link"));
    fs::set_permissions(&shut, fs::Permissions::from_mode(0o700)).unwrap();
    let made = shut.join("cache");
    symlink(&made, &link).unwrap();
    let refused = |cache: &Path, cure: &str| {
        let refused = run(&mut ground.background(&["--setuid", user, "--cache", cache.to_str().unwrap()])).fails();
        let reason = format!("setuid: {user} cannot use the cache {}: Permission denied ({cure})", cache.display());
        assert!(refused.error_line().ends_with(&reason), "{refused:?}");
        assert!(!is_mountpoint(&ground.mnt));
    };
    let enter = |class: char| format!("{user} may not enter {0}: chmod {class}+x {0}", shut.display());
    refused(&made, &enter('o'));
    assert_eq!(fs::metadata(&made).unwrap().uid(), uid);
    for cache in [&made, &link] {
        refused(cache, &enter('o'));
    }
    chown(&shut, None, Some(uid)).unwrap();
    refused(&made, &enter('g'));
    chown(&shut, Some(uid), None).unwrap();
    fs::set_permissions(&shut, fs::Permissions::from_mode(0o600)).unwrap();
    refused(&made, &enter('u'));
    fs::set_permissions(&shut, fs::Permissions::from_mode(0o700)).unwrap();
    fs::set_permissions(&made, fs::Permissions::from_mode(0o500)).unwrap();
    refused(&made, &format!("chmod u+rwx {}", made.display()));
    fs::set_permissions(&made, fs::Permissions::from_mode(0o700)).unwrap();
    assert!(ground.mount(&["--setuid", user, "--cache", link.to_str().unwrap()]).unwrap().end());

    let missing = run(&mut ground.background(&["--setuid", "no-such-user"])).fails();
    assert!(missing.error_line().ends_with("setuid: there is no user no-such-user"), "{missing:?}");
}

#[test]
fn a_mount_of_root_is_held_to_its_store_and_cache() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let cache = ground.scratch.join("cache");
    // A store whose chunks are links: what they lead to lies outside of it.
    let elsewhere = Scratch::new();
    let (linked, outside) = (ground.scratch.dir("linked"), elsewhere.dir("outside"));
    for entry in fs::read_dir(&ground.store).unwrap().map(|entry| entry.unwrap()) {
        fs::rename(entry.path(), outside.join(entry.file_name())).unwrap();
        symlink(outside.join(entry.file_name()), linked.join(entry.file_name())).unwrap();
    }
    // The index lies where nothing else does: its directory may be read.
    let index = ground.scratch.dir("index").join("t.caidx");
    fs::rename(&ground.index, &index).unwrap();
    let ground = Ground { index, ..ground };
    let store = format!("--store={}", linked.display());
    let args = [&store, "--cache", cache.to_str().unwrap(), "--error-retry=0"];
    let denied = ground.mount(&args).expect_err("the tree's root lies in a chunk outside");
    assert!(denied.contains("Permission denied"), "{denied}");
    let mounted = ground.mount(&[&args[..], &["--sandbox=no"]].concat()).unwrap();
    assert!(contents(&ground.mnt) == contents(&ground.tree), "the links are good");
    for (name, value) in threads_of(mounted.pids()[0], "NoNewPrivs") {
        assert_eq!(value, "0", "{name}");
    }
    assert!(mounted.end());
    // By now all is in the cache, which may be read.
    let mounted = ground.mount(&args).unwrap();
    assert!(contents(&ground.mnt) == contents(&ground.tree));
    for (name, value) in threads_of(mounted.pids()[0], "NoNewPrivs") {
        assert_eq!(value, "1", "{name}");
    }
    run(ground.caifs().args(["status"]).arg(&ground.mnt)).ok();
    let may_mount = threads_of(mounted.pids()[0], "CapEff").into_iter().filter(|(_, caps)| bits(caps) & MAY_MOUNT != 0);
    let names: Vec<String> = may_mount.map(|(name, _)| name).collect();
    assert_eq!(names, ["caifs", "signals"]);
    assert!(mounted.end());
}

#[test]
fn a_mount_in_a_sandbox_reads_over_http_and_ssh_into_a_cache() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let cache = ground.scratch.join("caches/cache");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    let confined = ["--cache", cache.to_str().unwrap(), "--sandbox=yes"];
    let n_kept = || fs::read_dir(&cache).unwrap().count();
    let (server, _hold) = held_back(&ground.store);
    let mounted = ground.mount(&[&[format!("--store={}", server.url()).as_str()], &confined[..]].concat()).unwrap();
    assert!(contents(&ground.mnt) == contents(&ground.tree), "http");
    assert_eq!(mode(&cache), 0o700, "what was fetched is in it for everybody who can open it");
    let ordinary = mode(&ground.scratch.dir("ordinary"));
    assert_eq!(mode(cache.parent().unwrap()), ordinary, "others may have theirs beside it");
    assert!(mounted.end() && n_kept() > 2);
    let Some(sshd) = Sshd::start() else { return };
    fs::remove_dir_all(&cache).unwrap();
    let store = format!("--store={}", sshd.url_without_port("ssh", &ground.store));
    let mut command = ground.background(&[&[store.as_str()], &confined[..]].concat());
    let mounted = Mounted::by_command(sshd.with_ssh(&mut command), &ground.mnt).unwrap();
    assert!(contents(&ground.mnt) == contents(&ground.tree), "ssh");
    assert!(mounted.end() && n_kept() > 2);
}

#[test]
fn a_password_among_the_options_is_not_among_the_arguments_of_the_process() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let (server, _hold) = held_back(&ground.store);
    let with_password = server.url().replace("http://", "http://user:geheim@");
    let list = format!("noexec,store={with_password},memory=64M");
    for args in [vec!["-o", &list], vec!["-o", "memory=64M", "--store", &with_password]] {
        let mut command = ground.caifs();
        command.arg("mount").arg(&ground.index).arg(&ground.mnt).args(&args);
        let mounted = Mounted::by_command(&mut command, &ground.mnt).unwrap();
        assert!(contents(&ground.mnt) == contents(&ground.tree));
        for pid in mounted.pids() {
            let seen = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
            let kept = ["user@", "memory=64M", ground.mnt.to_str().unwrap()];
            assert!(!seen.contains("geheim") && kept.iter().all(|kept| seen.contains(kept)), "{seen:?}");
        }
        assert!(mounted.end());
    }
}

#[test]
fn the_kernel_reads_ahead_as_it_is_told() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let mounted = ground.mount(&["--kernel-read-ahead=1M"]).unwrap();
    let device = nix::sys::stat::stat(&ground.mnt).unwrap().st_dev;
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    assert_eq!(fs::read_to_string(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb")).unwrap().trim(), "1024");
    assert!(mounted.end());
}
