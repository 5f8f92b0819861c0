//! The mount as a service: what its manager hears, and restarts under load without an error.

pub mod ground;
mod manager;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};

use crate::mount::{can_mount, contents};
use crate::support::mounted::{is_mountpoint, unmount};
use crate::support::run::run;
use crate::support::server::{Server, free_port};
use ground::{Ground, Load, OTHER, held_back, open_to_all};
use manager::{LIMIT, Manager, was_killed_by};

/// What a service keeps with its manager.
const KEPT: [&str; 2] = ["caifs-state", "caifs-fuse"];

/// Opens a file that stays open while nobody answers. The kernel asks for FLUSH once, and learns that nobody wants to hear of it: a
/// program that another test starts meanwhile, and that closes its copy of the file, would wait otherwise.
fn open(ground: &Ground, name: &str) -> File {
    drop(File::open(ground.mnt.join(name)).unwrap());
    File::open(ground.mnt.join(name)).unwrap()
}

/// The manager of a service that mounts.
fn manager(ground: &Ground, args: &[&str]) -> Manager {
    Manager::new(&ground.scratch, ground.foreground(args))
}

#[test]
fn the_manager_hears_of_readiness_when_the_mount_can_be_used_and_of_the_end() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let mut manager = manager(&ground, &[]);
    manager.watch(Duration::from_millis(200));
    manager.start();
    assert!(contents(&ground.mnt) == contents(&ground.tree));
    assert_eq!(manager.kept(), KEPT);
    manager.until("the watchdog hears of it", |manager| manager.count("WATCHDOG=1") >= 3);
    let is_status = |message: &String| message.starts_with("STATUS=") && message.contains("fetched");
    manager.until("there is a status", |manager| manager.messages().iter().any(is_status));
    let status = manager.end(Signal::SIGTERM);
    assert!(status.success(), "{status}\n{}", manager.said());
    assert!(!is_mountpoint(&ground.mnt), "a stop unmounts");
    manager.until("it hears of the end", |manager| manager.has_heard("STOPPING=1"));
    manager.until("nothing is kept", |manager| manager.kept().is_empty());
}

#[test]
fn a_mount_that_fails_is_never_ready() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    fs::remove_file(&ground.index).unwrap();
    let mut manager = manager(&ground, &[]);
    manager.start_without_waiting();
    assert_eq!(manager.wait().code(), Some(32));
    assert!(manager.messages().is_empty(), "{:?}", manager.messages());
}

#[test]
fn a_service_that_is_never_ready_ends_by_its_mount_timeout() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    // Takes connections and never says a word.
    let silence = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let spec = format!("http://{}/x.caidx", silence.local_addr().unwrap());
    let mut mount = ground.caifs();
    mount.args(["mount", "--foreground", "-o", "mount-timeout=1s"]).arg(spec).arg(&ground.mnt);
    let failed = run(&mut mount).fails();
    assert_eq!(failed.status.code(), Some(32), "{}", failed.stderr);
    assert!(failed.error_line().contains("not ready within 1 s"), "{}", failed.stderr);
    assert!(!is_mountpoint(&ground.mnt));
}

#[test]
fn a_service_restarted_under_load_goes_on_with_its_mount_and_readers_see_no_error() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let cache = ground.scratch.join("cache");
    let mut manager = manager(&ground, &["--cache", cache.to_str().unwrap()]);
    manager.start();
    let mount_line = |manager: &Manager| {
        let table = fs::read_to_string(format!("/proc/{}/mountinfo", manager.pid())).unwrap();
        let mnt = ground.mnt.to_str().unwrap();
        let lines: Vec<&str> = table.lines().filter(|line| line.split(' ').nth(4) == Some(mnt)).collect();
        assert_eq!(lines.len(), 1, "one mount: {lines:?}");
        lines[0].to_owned()
    };
    let first = mount_line(&manager);
    let load = Load::start(&ground.mnt, &Arc::new(contents(&ground.tree)));
    use Signal::{SIGKILL, SIGUSR1};
    for signal in [SIGKILL, SIGUSR1, SIGKILL, SIGKILL, SIGUSR1, SIGUSR1] {
        load.go_on(&|| manager.said());
        let status = manager.end(signal);
        match signal {
            SIGKILL => assert!(was_killed_by(status, signal), "{status}"),
            _ => assert!(status.success(), "{status}\n{}", manager.said()),
        }
        assert!(is_mountpoint(&ground.mnt), "it stays mounted without a process");
        manager.start();
        assert_eq!(mount_line(&manager), first, "it is the mount that was there before");
        assert_eq!(manager.kept(), KEPT, "kept as before, once");
        run(ground.caifs().arg("status").arg(&ground.mnt)).ok();
    }
    load.go_on(&|| manager.said());
    load.end().unwrap_or_else(|error| panic!("{error}\n{}", manager.said()));
    assert!(manager.end(Signal::SIGTERM).success());
    assert!(!is_mountpoint(&ground.mnt), "a stop unmounts what was taken over");
    manager.until("nothing is kept", |manager| manager.kept().is_empty());
}

#[test]
fn a_restarted_service_goes_on_while_its_store_is_away() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let blob: Vec<u8> = crate::support::blob::noise(3_000_000);
    let (index, file) = (ground.scratch.join("x.caibx"), ground.scratch.file("blob", &blob));
    run(ground.caifs().args(["make", "-s"]).arg(&ground.store).arg(&index).arg(file)).ok();
    let port = free_port();
    let serve = || {
        let mut server = ground.caifs();
        server.arg("chunk-server").arg("-s").arg(&ground.store).args(["-l", &format!("127.0.0.1:{port}")]);
        Server::start(&mut server, port)
    };
    let server = serve();
    let (mut caifs, mnt) = (ground.caifs(), ground.mnt.clone());
    caifs.args(["mount", "--foreground", "--mount-timeout=4s", "-s", &format!("http://127.0.0.1:{port}/")]);
    caifs.arg(&index).arg(&mnt);
    let args: Vec<_> = caifs.get_args().map(ToOwned::to_owned).collect();
    let envs: Vec<_> =
        caifs.get_envs().filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned()))).collect();
    let mut manager = Manager::new(&ground.scratch, move || {
        let mut command = crate::support::run::caifs();
        command.args(&args).envs(envs.iter().map(|(name, value)| (name, value)));
        command
    });
    manager.start();
    let held = open(&ground, "x");
    drop(server);
    manager.end(Signal::SIGKILL);
    manager.start();
    let _server = serve();
    let mut end = [0; 100];
    held.read_exact_at(&mut end, blob.len() as u64 - 100).unwrap();
    assert!(end == blob[blob.len() - 100..], "the file that was open is read by the next process");
    drop(held);
    assert!(manager.end(Signal::SIGTERM).success());
}

#[test]
fn a_directory_of_indexes_is_gone_on_with_under_load() {
    if !can_mount() {
        return;
    }
    let (ground, wanted) = Ground::new().into_directory();
    let mut manager = manager(&ground, &["--cache", ground.scratch.join("cache").to_str().unwrap()]);
    manager.start();
    let device = || fs::metadata(&ground.mnt).unwrap().dev();
    let first = device();
    let load = Load::start(&ground.mnt, &Arc::new(wanted));
    use Signal::{SIGKILL, SIGUSR1};
    for signal in [SIGKILL, SIGUSR1, SIGKILL] {
        load.go_on(&|| manager.said());
        // What is there only now has its numbers from the process after the first, and keeps them with the next.
        let later = ground.index.join(format!("later {signal}.caidx"));
        fs::copy(ground.index.join("one.caidx"), later).unwrap();
        let later = ground.mnt.join(format!("later {signal}/dir 0/file 0"));
        manager.until("it is seen", |_| later.exists());
        let (held, before) = (File::open(&later).unwrap(), fs::metadata(&later).unwrap().ino());
        manager.end(signal);
        manager.start();
        assert_eq!(device(), first, "{signal}: it is the mount that was there before");
        assert_eq!(manager.kept(), ["caifs-state", "caifs-numbers", "caifs-fuse"]);
        held.read_exact_at(&mut [0; 4096], 8192).unwrap();
        assert_eq!(fs::metadata(&later).unwrap().ino(), before);
    }
    load.go_on(&|| manager.said());
    load.end().unwrap_or_else(|error| panic!("{error}\n{}", manager.said()));
    assert!(manager.end(Signal::SIGTERM).success());
    assert!(!is_mountpoint(&ground.mnt));
    manager.until("nothing is kept", |manager| manager.kept().is_empty());
}

#[test]
fn an_index_that_is_replaced_while_nobody_serves_is_another_file() {
    if !can_mount() {
        return;
    }
    let (ground, wanted) = Ground::new().into_directory();
    let mut manager = manager(&ground, &[]);
    manager.start();
    let image = ground.mnt.join("below/image");
    let (replaced, stays) = (open(&ground, "below/image"), open(&ground, "one/dir 2/file 5"));
    manager.end(Signal::SIGKILL);
    let blob = ground.scratch.file("other", [7; 100_000]);
    let index = ground.index.join("below/image.caibx");
    fs::remove_file(&index).unwrap();
    run(ground.caifs().args(["make", "-s"]).arg(&ground.store).arg(&index).arg(blob)).ok();
    manager.start();
    manager.until("the new one is seen", |_| fs::read(&image).is_ok_and(|bytes| bytes == [7; 100_000]));
    let old = replaced.read_at(&mut [0; 16], 200_000);
    assert_eq!(old.unwrap_err().raw_os_error(), Some(libc::ESTALE), "of the old one nothing wrong is read");
    let mut bytes = vec![0; 50_000];
    stays.read_exact_at(&mut bytes, 100_000).unwrap();
    assert!(bytes == wanted[Path::new("one/dir 2/file 5")][100_000..150_000]);
    // Without the numbers nobody knows whose they are.
    manager.end(Signal::SIGKILL);
    manager.lose("caifs-numbers");
    manager.start();
    assert!(manager.said().contains("the inode numbers of its files are not known any more"), "{}", manager.said());
    assert_eq!(stays.read_at(&mut [0; 16], 0).unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
    assert!(contents(&ground.mnt.join("one")) == contents(&ground.tree));
    assert!(manager.end(Signal::SIGTERM).success());
}

#[test]
fn a_restarted_service_of_another_user_goes_on_as_well() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    open_to_all(&ground.scratch);
    let mut manager = manager(&ground, &["--setuid", OTHER.0]);
    manager.start();
    let load = Load::start(&ground.mnt, &Arc::new(contents(&ground.tree)));
    for signal in [Signal::SIGKILL, Signal::SIGUSR1] {
        load.go_on(&|| manager.said());
        manager.end(signal);
        manager.start();
    }
    load.go_on(&|| manager.said());
    load.end().unwrap();
    assert!(manager.end(Signal::SIGTERM).success());
    assert!(!is_mountpoint(&ground.mnt));
}

#[test]
fn a_read_under_way_is_answered_by_the_process_that_has_it_or_by_the_next() {
    if !can_mount() {
        return;
    }
    for signal in [Signal::SIGKILL, Signal::SIGUSR1] {
        let ground = Ground::new();
        let (server, hold) = held_back(&ground.store);
        let mut manager = manager(&ground, &[&format!("--store={}", server.url())]);
        manager.start();
        let name = "dir 2/file 5";
        let mut file = open(&ground, name);
        hold.store(true, Ordering::SeqCst);
        let n_before = server.requests().len();
        let (sender, reader) = mpsc::channel();
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            sender.send(file.read_to_end(&mut bytes).map(|_| bytes))
        });
        manager.until("the read has reached the store", |_| server.requests().len() > n_before);
        match signal {
            Signal::SIGKILL => {
                manager.end(signal);
                manager.start_without_waiting();
                assert!(reader.try_recv().is_err(), "nobody has answered yet");
                hold.store(false, Ordering::SeqCst);
            }
            _ => {
                kill(manager.pid(), signal).unwrap();
                manager.until("it is on its way out", |manager| manager.has_heard("STOPPING=1"));
                hold.store(false, Ordering::SeqCst);
                assert!(manager.wait().success());
                manager.start_without_waiting();
            }
        }
        manager.until("it is ready again", |manager| manager.has_heard("READY=1"));
        let read = reader.recv_timeout(LIMIT).unwrap_or_else(|_| panic!("{signal}: no answer\n{}", manager.said()));
        let read = read.unwrap_or_else(|error| panic!("{signal}: {error}\n{}", manager.said()));
        assert!(read == fs::read(ground.tree.join(name)).unwrap(), "{signal}");
        assert!(manager.end(Signal::SIGTERM).success());
    }
}

#[test]
fn other_content_is_mounted_anew_and_said() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let mut manager = manager(&ground, &[]);
    manager.start();
    let open = open(&ground, "dir 0/file 0");
    manager.end(Signal::SIGUSR1);
    fs::write(ground.tree.join("dir 0/file 0"), "another version").unwrap();
    ground.pack();
    manager.start();
    assert_eq!(fs::read(ground.mnt.join("dir 0/file 0")).unwrap(), b"another version");
    assert!(manager.said().contains("its content is not what was mounted there before"), "{}", manager.said());
    manager.until("the new mount is kept, the old one not", |manager| manager.kept() == KEPT);
    let old = open.read_at(&mut [0; 16], 0);
    assert_eq!(old.unwrap_err().raw_os_error(), Some(libc::ENOTCONN), "of the old version nothing wrong is read");
    assert!(manager.end(Signal::SIGTERM).success());
    assert!(!is_mountpoint(&ground.mnt));
}

#[test]
fn other_options_are_in_force_after_a_restart() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let mut manager = manager(&ground, &[]);
    manager.start();
    let mode = || fs::metadata(ground.mnt.join("dir 0/file 0")).unwrap().mode() & 0o777;
    assert_eq!(mode() & 0o044, 0o044, "known to the kernel from now on");
    let open = open(&ground, "dir 0/file 0");
    manager.end(Signal::SIGUSR1);
    manager.set_command(ground.foreground(&["--umask", "077"]));
    manager.start();
    assert_eq!(mode() & 0o077, 0);
    assert!(manager.said().contains("its options are others now"), "{}", manager.said());
    assert_eq!(open.read_at(&mut [0; 16], 0).unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
    assert!(manager.end(Signal::SIGTERM).success());
    assert!(!is_mountpoint(&ground.mnt));
}

#[test]
fn a_service_that_cannot_go_on_lets_those_go_who_wait_for_it() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let mut manager = manager(&ground, &[]);
    let moved = ground.scratch.dir("moved");
    type Spoil<'a> = &'a dyn Fn(&mut Manager);
    let no_index: Spoil = &|_| fs::remove_file(&ground.index).unwrap();
    let wrong_option: Spoil = &|manager| manager.set_command(ground.foreground(&["-o", "no-such-option"]));
    let wrong_flag: Spoil = &|manager| manager.set_command(ground.foreground(&["--no-such-flag"]));
    let no_log: Spoil = &|manager| manager.set_command(ground.foreground(&["--log", "/nonexistent/log"]));
    // The mount is taken over by then.
    let no_profile: Spoil = &|manager| manager.set_command(ground.foreground(&["--record", "/nonexistent/profile"]));
    for (spoil, code) in [(no_index, 32), (wrong_option, 1), (wrong_flag, 1), (no_log, 32), (no_profile, 32)] {
        ground.pack();
        manager.set_command(ground.foreground(&[]));
        manager.start();
        let file = open(&ground, "dir 1/file 1");
        manager.end(Signal::SIGKILL);
        spoil(&mut manager);
        let (told, waiting) = mpsc::channel();
        std::thread::spawn(move || told.send(file.read_at(&mut [0; 16], 4096)));
        manager.start_without_waiting();
        assert_eq!(manager.wait().code(), Some(code), "{}", manager.said());
        let read = waiting.recv_timeout(LIMIT).unwrap_or_else(|_| panic!("it waits for ever\n{}", manager.said()));
        assert!(read.is_err());
        manager.until("nothing is kept", |manager| manager.kept().is_empty());
        assert!(!is_mountpoint(&ground.mnt));
    }
    // The place of the mount is another one: the old one goes.
    ground.pack();
    manager.set_command(ground.foreground(&[]));
    manager.start();
    manager.end(Signal::SIGUSR1);
    let elsewhere = Ground { mnt: moved, ..ground };
    manager.set_command(elsewhere.foreground(&[]));
    manager.start();
    assert!(contents(&elsewhere.mnt) == contents(&elsewhere.tree));
    assert!(!is_mountpoint(&elsewhere.scratch.join("mnt")));
    assert!(manager.end(Signal::SIGTERM).success());
}

#[test]
fn a_recording_goes_on_in_the_next_process() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let (profile, part) = (ground.scratch.join("t.profile"), ground.scratch.join("t.profile.part"));
    let mut manager = manager(&ground, &["--record", profile.to_str().unwrap(), "--profile", "no"]);
    let lines = |path: &Path| -> Vec<String> {
        fs::read_to_string(path).unwrap_or_default().lines().map(str::to_owned).collect()
    };
    manager.start();
    fs::read(ground.mnt.join("dir 0/file 5")).unwrap();
    manager.until("it is written", |_| lines(&part).len() > 1);
    manager.end(Signal::SIGKILL);
    let first = lines(&part);
    manager.start();
    fs::read(ground.mnt.join("dir 3/file 5")).unwrap();
    assert!(manager.end(Signal::SIGTERM).success());
    let all = lines(&profile);
    assert!(all.starts_with(&first) && all.len() > first.len(), "{first:?}, then {all:?}");
    assert!(!part.exists());
}

#[test]
fn a_mount_that_somebody_took_away_meanwhile_is_made_again() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let mut manager = manager(&ground, &[]);
    manager.start();
    manager.end(Signal::SIGKILL);
    unmount(&ground.mnt);
    manager.start();
    assert!(contents(&ground.mnt) == contents(&ground.tree));
    // A manager that keeps nothing: the dead mount is cleaned away.
    manager.end(Signal::SIGKILL);
    manager.drop_store();
    manager.start();
    assert!(contents(&ground.mnt) == contents(&ground.tree));
    assert!(manager.end(Signal::SIGTERM).success());
    // Where there is no manager, what would hand the mount over unmounts it.
    let mut alone = ground.foreground(&[])().spawn().unwrap();
    manager.until("it is mounted", |_| is_mountpoint(&ground.mnt));
    manager.until("it is served", |_| ground.mnt.join("dir 0").metadata().is_ok());
    kill(nix::unistd::Pid::from_raw(alone.id().cast_signed()), Signal::SIGUSR1).unwrap();
    assert!(alone.wait().unwrap().success());
    assert!(!is_mountpoint(&ground.mnt));
}
