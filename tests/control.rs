//! What can be seen of a mount from outside, and changed: status, map, top, reload, remount, abort, metrics and the access trace; with stores and
//! services that hang.

mod change;
mod ending;
mod ground;
mod metrics;
mod soak;
mod top;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use caifs::mount::attach::{AttachRequest, attach};
use caifs::mount::control::MountedAt;
use caifs::mount::options::VfsFlags;
use caifs::mount::table::MountTable;
use caifs::volume::FileKind;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::mount::can_mount;
use crate::mount_service::{run_with_open_fuse, users_may_open_fuse};
use crate::support::mounted::{Mounted, is_mountpoint, is_running};
use crate::support::peers::peer;
use crate::support::proxy::{FaultProxy, Mode, ProxyFault};
use crate::support::run::{command, run};
use crate::support::scratch::Scratch;
use crate::support::server::free_port;
use crate::support::servers::nginx::{Nginx, Site};
use ground::{BLOCK_BYTES, Ground, direct, until};

#[test]
fn status_is_found_by_any_way_to_the_mount_and_tells_what_is_there() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new(3_000_000);
    let mounted = ground.mount(&[]);
    let link = ground.scratch.join("link");
    symlink(&ground.mnt, &link).unwrap();
    assert!(fs::read(ground.image()).unwrap() == ground.blob);
    for way in [ground.mnt.clone(), link.clone(), link.join("blob"), ground.scratch.join("st/../mnt/.")] {
        let status = ground.status_of(&way);
        assert_eq!(status["pid"], mounted.pids()[0]);
        assert_eq!(status["mountpoint"], ground.mnt.to_str().unwrap());
    }
    let status = ground.status();
    assert_eq!(status["source"], ground.index.to_str().unwrap());
    assert_eq!((&status["kind"], &status["parts"][0]["size_bytes"]), (&"image".into(), &3_000_000.into()));
    assert_eq!(status["totals"]["read_bytes"], 3_000_000);
    assert_eq!((&status["totals"]["n_eio"], &status["totals"]["n_panics"]), (&0.into(), &0.into()));
    let (store, n_chunks) = (&status["stores"][0], &status["parts"][0]["n_chunks"]);
    assert_eq!(
        (&store["name"], &store["n_found"], &store["is_healthy"]),
        (&ground.store.to_str().unwrap().into(), n_chunks, &true.into())
    );
    assert_eq!(status["totals"]["n_fetches"], *n_chunks);
    let setting = |name: &str| {
        let settings = status["settings"].as_array().unwrap().clone();
        settings.into_iter().find(|setting| setting["name"] == name).map(|setting| setting["value"].clone())
    };
    assert_eq!((setting("memory"), setting("uid")), (Some("256M".into()), None));
    assert_eq!(status["requests"]["n_in_flight"], 0);
    // Everything was read and fits into memory.
    ground.until_status("it is seen to be present", |status| {
        status["present"]["memory"] == 1.0
            && status["present"]["read"] == 1.0
            && status["present"]["is_estimate"] == false
    });
    let text = ground.caifs(&["status"]).arg(&ground.mnt).output().unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains("  present    100 % (memory 100 %, disk 0 %); read so far: 100 %"), "{text}");
    let table = run(&mut ground.caifs(&["status"])).ok().text();
    assert!(
        table.lines().count() >= 2 && table.lines().any(|line| line.starts_with(ground.mnt.to_str().unwrap())),
        "{table}"
    );
    let sockets: Vec<_> = fs::read_dir(ground.run_dir()).unwrap().map(|entry| entry.unwrap()).collect();
    assert_eq!(sockets.len(), 1);
    assert_eq!(sockets[0].metadata().unwrap().mode() & 0o777, 0o600);
    assert!(mounted.end());
    until("the socket goes with the mount", || fs::read_dir(ground.run_dir()).unwrap().count() == 0);
    let gone = run(ground.caifs(&["status"]).arg(&ground.mnt)).fails();
    assert_eq!(gone.error_line(), format!("caifs: {} is not a mountpoint of caifs", ground.mnt.display()));
}

#[test]
fn mounts_in_the_foreground_and_on_files_have_sockets_and_control_no_has_none() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new(300_000);
    let file = ground.scratch.file("file", "");
    for (mountpoint, foreground) in [(&ground.mnt, true), (&file, false), (&file, true)] {
        let mut command = ground.mount_command(mountpoint, &[]);
        let mounted = match foreground {
            true => Mounted::by_server(command.arg("-f"), mountpoint).unwrap(),
            false => Mounted::by_command(&mut command, mountpoint).unwrap(),
        };
        until("it can be asked", || {
            run(ground.caifs(&["status", "--json"]).arg(mountpoint)).text().contains("\"kind\": \"image\"")
        });
        assert!(mounted.end());
    }
    let mounted = ground.mount(&["--control=no"]);
    let silent = run(ground.caifs(&["status"]).arg(&ground.mnt)).fails();
    assert!(
        silent.error_line().contains("has no control socket (it was mounted with control=no, or its process is dead)"),
        "{}",
        silent.stderr
    );
    assert!(mounted.end());
}

#[test]
fn a_connection_that_was_mounted_by_somebody_else_is_found_in_the_table() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let mnt = scratch.dir("mnt");
    let source = std::ffi::OsString::from("x");
    let request = AttachRequest {
        mountpoint: &mnt,
        source: &source,
        root_kind: FileKind::Directory,
        flags: VfsFlags::default(),
        kernel: &Default::default(),
        allow_other: false,
    };
    let mounted = attach(&request).expect("mounted");
    let id = mounted.attached.id();
    let by_path = MountedAt::find(File::open("/dev/null").unwrap(), &mnt);
    assert_eq!((by_path.mountpoint.as_path(), by_path.device), (mnt.as_path(), Some((id.major, id.minor))));
    let by_connection = MountedAt::find(&mounted.fd, Path::new("/dev/fd/9"));
    if by_connection.device.is_some() {
        // Of a kernel that tells.
        assert_eq!(by_connection, by_path);
    }
}

#[test]
fn only_the_mounts_user_and_root_are_answered() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new(300_000);
    let mounted = ground.mount(&[]);
    let socket = ground.socket();
    // As if permissions had not kept him out.
    fs::set_permissions(&*ground.scratch, fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
    let mut stranger = command(
        "setpriv",
        ["--reuid=65534", "--regid=65534", "--clear-groups", "--", env!("CARGO_BIN_EXE_caifs"), "status"],
    );
    stranger.arg(&ground.mnt).env("CAIFS_RUNTIME_DIR", ground.run_dir()).env("LC_ALL", "C");
    let refused = run(&mut stranger).fails();
    assert_eq!(refused.error_line(), "caifs: this mount is another user's");
    assert!(mounted.end());
}

#[test]
fn root_asks_the_mount_of_a_user() {
    const USER: u32 = 65534;
    if !can_mount() {
        return;
    }
    if !users_may_open_fuse() {
        run_with_open_fuse("control::root_asks_the_mount_of_a_user");
        return;
    }
    let ground = Ground::new(300_000);
    fs::set_permissions(&*ground.scratch, fs::Permissions::from_mode(0o755)).unwrap();
    chown(&ground.mnt, Some(USER), Some(USER)).unwrap();
    // The program itself may lie where nobody else can go.
    let program = ground.scratch.join("caifs");
    fs::copy(env!("CARGO_BIN_EXE_caifs"), &program).unwrap();
    let as_user = ["--reuid=65534", "--regid=65534", "--clear-groups", "--"];
    let mut mount = command("setpriv", as_user);
    mount.arg(&program).arg("mount").arg(&ground.index).arg(&ground.mnt).arg("-s").arg(&ground.store);
    mount.env("HOME", "/nonexistent").env_remove("XDG_RUNTIME_DIR").env_remove("CAIFS_RUNTIME_DIR");
    let mounted = Mounted::by_command(&mut mount, &ground.mnt).unwrap();

    let status = ground.status();
    assert_eq!(status["pid"], mounted.pids()[0]);
    let all = run(&mut ground.caifs(&["status"])).ok().text();
    assert!(all.contains(ground.mnt.to_str().unwrap()), "{all}");
    run(ground.caifs(&["reload"]).arg(&ground.mnt)).ok();
    // A mount of root's that was killed left its socket, and this one has got its number.
    let id = MountTable::read().unwrap().at(&ground.mnt).unwrap().id;
    let name = format!("{}:{}.sock", id.major, id.minor);
    fs::create_dir(ground.run_dir()).unwrap();
    drop(UnixListener::bind(ground.run_dir().join(&name)).unwrap());
    assert_eq!(ground.status()["pid"], mounted.pids()[0]);
    fs::remove_dir_all(ground.run_dir()).unwrap();

    // The user could lead root to somebody else's socket.
    let dir = Path::new("/tmp/caifs-65534");
    assert_eq!(dir.symlink_metadata().unwrap().uid(), USER);
    let socket = dir.join(&name);
    fs::remove_file(&socket).unwrap();
    let _other = UnixListener::bind(&socket).unwrap();
    let refused = run(ground.caifs(&["status"]).arg(&ground.mnt)).fails();
    assert!(refused.error_line().ends_with("somebody else listens than who mounted"), "{}", refused.error_line());
    // Nor does he make root's own look at everything fail.
    let all = run(&mut ground.caifs(&["status"])).ok().text();
    assert!(all.contains("somebody else listens than who mounted"), "{all}");
    let reloaded = run(&mut ground.caifs(&["reload", "--all"])).ok().text();
    let top = run(&mut ground.caifs(&["top", "-n", "1"])).ok().text();
    assert!([&reloaded, &top].iter().all(|text| !text.contains(ground.mnt.to_str().unwrap())), "{reloaded}{top}");
    fs::remove_file(&socket).unwrap();
    let missing = run(ground.caifs(&["status"]).arg(&ground.mnt)).fails();
    assert!(missing.error_line().contains("it was mounted by user 65534"), "{}", missing.error_line());
    assert!(mounted.end());
}

#[test]
fn requests_that_are_none_are_refused_and_hurt_nobody() {
    use std::io::{Read, Write};
    if !can_mount() {
        return;
    }
    let ground = Ground::new(300_000);
    let mounted = ground.mount(&[]);
    let ask = |bytes: &[u8]| {
        let mut stream = std::os::unix::net::UnixStream::connect(ground.socket()).unwrap();
        // The answer may come, and the connection end, before all is sent.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        text
    };
    assert!(
        ask(b"{\"version\":1,\"request\":\"status\"}\n{\"version\":1,\"request\":\"status\"}\n").lines().count() == 2
    );
    assert!(
        ask(b"{\"version\":9,\"request\":\"status\"}\n")
            .contains("version 9 of the control protocol is not spoken here")
    );
    assert!(ask(b"GET / HTTP/1.1\n").contains("\"kind\":\"bad_request\""));
    let long = vec![b'x'; 200 << 10];
    assert!(ask(&long).contains("a request has 65536 bytes at the most"));
    assert_eq!(ask(b""), "");
    assert_eq!(ground.status()["pid"], mounted.pids()[0]);
    assert!(mounted.end());
}

#[test]
fn a_store_that_hangs_is_seen_with_who_waits_for_it() {
    if !can_mount() {
        return;
    }
    let Some(nginx) = peer("nginx") else { return };
    let ground = Ground::new(6_000_000);
    let nginx = Nginx::start(&nginx.path, &ground.scratch, Site { server: "", tls: None, verify_client: false });
    let proxy = ground.behind_proxy(&nginx);
    let store = format!("{}/st", proxy.url());
    let mounted = ground.mount_from(&store, &["--io-timeout", "60s"]);
    proxy.set_mode(Mode::BlackHole);
    std::thread::scope(|scope| {
        let image = direct(&ground.image());
        let reader = scope.spawn(move || {
            let mut buffer = ground::Aligned::new(BLOCK_BYTES);
            image.read_exact_at(buffer.bytes(), 1 << 20).map(|()| buffer.bytes().to_vec())
        });
        // Counted by the mount itself, so this waits for what happens and not for time.
        ground.until_status("the reader waits", |status| status["requests"]["n_in_flight"].as_u64() >= Some(1));
        let status = ground.status();
        let request = &status["requests"]["oldest"][0];
        assert_eq!((&request["op"], &request["ino"]), (&"read".into(), &2.into()), "{request}");
        assert!(request["age_seconds"].as_f64().unwrap() >= 0.0);
        assert!(status["requests"]["n_waiting_for_chunks"].as_u64() >= Some(1));
        assert!(status["fetches"]["n_in_flight"].as_u64() >= Some(1));
        assert_eq!(status["fetches"]["oldest"][0]["chunk"].as_str().unwrap().len(), 64);
        ground.until_status("the store is asked", |status| status["stores"][0]["n_in_flight"].as_u64() >= Some(1));
        let text = run(ground.caifs(&["status"]).arg(&ground.mnt)).ok().text();
        assert!(text.contains("read for ") && text.contains(" under way"), "{text}");
        let map: serde_json::Value =
            serde_json::from_str(&run(ground.caifs(&["map", "--json"]).arg(&ground.mnt)).ok().text()).unwrap();
        assert!(map["cells"].as_array().unwrap().iter().any(|cell| cell["is_fetching"] == true), "{map}");
        let top = run(ground.caifs(&["top", "-n", "2", "-i", "100ms"]).arg(&ground.mnt)).ok().text();
        assert!(top.contains("requests wait (") && top.matches(&*ground.mnt.to_string_lossy()).count() >= 2, "{top}");
        proxy.set_mode(Mode::Up);
        let read = reader.join().unwrap().unwrap();
        assert!(read == ground.blob[1 << 20..][..BLOCK_BYTES]);
    });
    ground.until_status("nobody waits any more", ground::is_idle);
    assert!(mounted.end());
}

#[test]
fn a_service_that_is_stopped_or_dead_is_told_and_its_mount_can_be_aborted() {
    if !can_mount() {
        return;
    }
    for is_dead in [false, true] {
        let ground = Ground::new(6_000_000);
        let mut mounted = ground.mount(&[]);
        // At the first close of a mount the kernel asks for a FLUSH and waits for the answer, in whatever program closes: also one that another
        // test starts and that inherits the file. That is over before the service stops.
        drop(direct(&ground.image()));
        let image = direct(&ground.image());
        let pid = mounted.pids()[0];
        match is_dead {
            true => mounted.kill_server(),
            false => kill(Pid::from_raw(pid), Signal::SIGSTOP).unwrap(),
        }
        let silent = run(ground.caifs(&["status"]).arg(&ground.mnt)).fails();
        let wanted = match is_dead {
            true => format!(
                "caifs: the process that served {} is dead (unmount with `caifs umount`, or mount again)",
                ground.mnt.display()
            ),
            false => format!(
                "caifs: the process of {} ({pid}, which is stopped: `kill -CONT {pid}` lets it go on) does not answer within 3 s \
                 (`caifs abort` ends a mount that hangs)",
                ground.mnt.display()
            ),
        };
        assert_eq!(silent.error_line(), wanted);
        let table = run(&mut ground.caifs(&["status"])).fails();
        assert!(
            table.text().contains(ground.mnt.to_str().unwrap()) && table.stderr.contains("do not answer"),
            "{}",
            table.stderr
        );
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| image.read_at(ground::Aligned::new(BLOCK_BYTES).bytes(), 0).map(drop));
            let aborted = run(ground.caifs(&["abort"]).arg(&ground.mnt)).ok().text();
            assert!(aborted.starts_with(&format!("{} is aborted and unmounted", ground.mnt.display())), "{aborted}");
            assert!(reader.join().unwrap().is_err(), "who waits has an error");
        });
        assert!(!is_mountpoint(&ground.mnt));
        if !is_dead {
            kill(Pid::from_raw(pid), Signal::SIGCONT).unwrap();
            until("the process ends", || !is_running(pid));
        }
        run(&mut ground.caifs(&["status"])).ok();
        assert_eq!(fs::read_dir(ground.run_dir()).unwrap().count(), 0, "what is left of it is cleaned away");
        let again = run(ground.caifs(&["abort"]).arg(&ground.mnt)).fails();
        assert_eq!(again.error_line(), format!("caifs: {} is not a mountpoint of caifs", ground.mnt.display()));
    }
}

#[test]
fn abort_leaves_alone_what_is_not_ours() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new(300_000);
    let mounted = ground.mount(&[]);
    let refused = run(ground.caifs(&["abort"]).arg(ground.image())).fails();
    let wanted =
        format!("caifs: {} lies in the caifs mount on {}: name that", ground.image().display(), ground.mnt.display());
    assert_eq!(refused.error_line(), wanted);
    let refused = run(&mut ground.caifs(&["abort", "/proc"])).fails();
    assert_eq!(refused.error_line(), "caifs: /proc is a mount of proc, not of fuse.caifs");
    let refused = run(ground.caifs(&["abort"]).arg(&*ground.scratch)).fails();
    assert!(refused.error_line().ends_with("is not a mountpoint of caifs"), "{}", refused.stderr);
    assert!(fs::read(ground.image()).unwrap() == ground.blob);
    assert!(mounted.end());
}

#[test]
fn a_map_shows_what_is_where() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new(4_000_000);
    let cache = ground.scratch.dir("cache");
    let with_cache = ["-c", cache.to_str().unwrap(), "--cache-size", "1G"];
    let mounted = ground.mount(&with_cache);
    let map = |args: &[&str]| run(ground.caifs(&["map"]).args(args).arg(&ground.mnt)).ok().text();
    let cells = || -> Vec<serde_json::Value> {
        let map: serde_json::Value = serde_json::from_str(&map(&["--json", "--width", "16"])).unwrap();
        map["cells"].as_array().unwrap().clone()
    };
    assert!(cells().iter().all(|cell| cell["any"] == 0.0 && cell["was_read"] == false));
    let empty = map(&["--width", "20"]);
    assert!(empty.contains(", 0 % present") && empty.contains("        0 B ....................\n"), "{empty}");
    let image = direct(&ground.image());
    let mut buffer = ground::Aligned::new(2 << 20);
    image.read_exact_at(buffer.bytes(), 0).unwrap();
    until("half of it is seen in memory and on disk", || {
        let cells = cells();
        let n = cells.len();
        let is_here =
            |cell: &serde_json::Value| cell["memory"] == 1.0 && cell["disk"] == 1.0 && cell["was_read"] == true;
        cells[..n * 45 / 100].iter().all(is_here)
            && cells[n * 6 / 10..].iter().all(|cell| cell["any"] == 0.0 && cell["was_read"] == false)
    });
    let text = map(&["--width", "20"]);
    assert!(text.contains("        0 B ####################\n") && text.contains("....................\n"), "{text}");
    drop(image);
    assert!(mounted.end());
    let mounted = ground.mount(&with_cache);
    until("it is seen on disk only", || {
        let cells = cells();
        cells[..cells.len() * 45 / 100].iter().all(|cell| cell["memory"] == 0.0 && cell["disk"] == 1.0)
    });
    let picture = ground.scratch.join("map.svg");
    map(&["--svg", picture.to_str().unwrap()]);
    let svg = fs::read_to_string(&picture).unwrap();
    assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>") && svg.contains("on disk"), "{svg}");
    assert!(svg.len() < 20_000, "{}", svg.len());
    let wrong = run(ground.caifs(&["map", "--part", "x"]).arg(&ground.mnt)).fails();
    assert_eq!(wrong.error_line(), "caifs: no index is open at x");
    assert!(mounted.end());
}

/// Nothing is waited for here: who looks after a read sees what was read, however short a time after another look.
/// What is answered when this machine has time for it: a look that took too long is one that was made before.
fn patiently<T>(ask: impl Fn() -> T) -> T {
    const QUICK: Duration = Duration::from_millis(300);
    for _ in 0..100 {
        let start = Instant::now();
        let answer = ask();
        if start.elapsed() < QUICK {
            return answer;
        }
    }
    panic!("this machine has no time")
}

#[test]
fn what_was_read_is_seen_at_once_by_map_and_status() {
    if !can_mount() {
        return;
    }
    const STEP: usize = 256 << 10;
    let ground = Ground::new(3 << 20);
    let mounted = ground.mount(&["-o", "read-ahead=0"]);
    let image = direct(&ground.image());
    let title = |args: &[&str]| {
        let text = patiently(|| run(ground.caifs(&["map"]).args(args).arg(&ground.mnt)).ok().text());
        text.lines().next().unwrap().to_owned()
    };
    let share = || patiently(|| ground.status())["present"]["memory"].as_f64().unwrap();
    assert!(title(&[]).ends_with(", 0 % present"));
    let mut buffer = ground::Aligned::new(STEP);
    for step in 0..12 {
        let before = share();
        image.read_exact_at(buffer.bytes(), (step * STEP) as u64).unwrap();
        let after = share();
        assert!(after > before && after >= (step + 1) as f64 / 12.0 - 1e-9, "step {step}: {before}, then {after}");
    }
    assert!(title(&[]).ends_with(", 100 % present"));
    drop(image);
    assert!(mounted.end());

    let dir = ground.scratch.dir("many");
    for n in 0..6 {
        fs::copy(&ground.index, dir.join(format!("i{n}.caibx"))).unwrap();
    }
    let mut command = ground.caifs(&["mount"]);
    // Each has its chunks in the memory that all share; what is read of one is there for the others.
    command.arg(&dir).arg(&ground.mnt).arg("-s").arg(&ground.store).args(["-o", "read-ahead=0"]);
    let mounted = Mounted::by_command(&mut command, &ground.mnt).unwrap();
    for n in 0..6 {
        let name = format!("i{n}");
        let path = ground.mnt.join(&name);
        let mut byte = [0];
        File::open(&path).unwrap().read_exact_at(&mut byte, 0).unwrap();
        let before = title(&["--part", &name]);
        assert_eq!(before.ends_with(", 100 % present"), n > 0, "{before}");
        assert!(fs::read(&path).unwrap() == ground.blob);
        let after = title(&["--part", &name]);
        assert!(after.ends_with(", 100 % present"), "{after}");
    }
    assert!(mounted.end());
}

#[test]
fn a_store_that_is_alone_and_answers_nothing_is_not_said_to_be_ok() {
    if !can_mount() {
        return;
    }
    let Some(nginx) = peer("nginx") else { return };
    let ground = Ground::new(1_000_000);
    let nginx = Nginx::start(&nginx.path, &ground.scratch, Site { server: "", tls: None, verify_client: false });
    let proxy = ground.behind_proxy(&nginx);
    let store = format!("{}/st", proxy.url());
    let shown = || {
        let text = run(ground.caifs(&["status"]).arg(&ground.mnt)).ok().text();
        let table = run(&mut ground.caifs(&["status"])).ok().text();
        let row = table.lines().find(|line| line.starts_with(ground.mnt.to_str().unwrap())).unwrap().to_owned();
        let top = run(ground.caifs(&["top", "-n", "1"]).arg(&ground.mnt)).ok().text();
        (text, row, top)
    };
    for mode in [Mode::BlackHole, Mode::Reset] {
        let port = free_port();
        let mounted = ground.mount_from(&store, &["-o", &format!("io-timeout=1s,metrics=127.0.0.1:{port}")]);
        let metric = || {
            let page = metrics::get(port, "/metrics").1;
            let prefix = format!("caifs_store_healthy{{store=\"{store}\"}} ");
            page.lines().find_map(|line| line.strip_prefix(&prefix)).map(str::to_owned)
        };
        proxy.set_mode(mode);
        // How many requests a read makes is the kernel's affair.
        until("it is seen to fail", || {
            fs::read(ground.image()).unwrap_err();
            ground.status()["stores"][0]["is_healthy"] == false
        });
        let status = ground.status();
        let seen = &status["stores"][0];
        assert!(seen["n_errors_in_row"].as_u64() >= Some(1) && seen["set_aside_seconds"].is_null(), "{seen:#}");
        let (text, row, top) = shown();
        assert!(text.contains("/st: failing, ") && text.contains(" in a row\n"), "{text}");
        let error = if mode == Mode::BlackHole { " ago: no answer within " } else { "  last error, " };
        assert!(text.contains(error), "{text}");
        assert!(row.ends_with("0/1 ok") && top.contains("/st  failing, "), "{row}\n{top}");
        assert_eq!(metric().as_deref(), Some("0"));

        proxy.set_mode(Mode::Up);
        until("it is read again", || fs::read(ground.image()).is_ok_and(|read| read == ground.blob));
        let (text, row, top) = shown();
        assert!(text.contains("/st: ok"), "{text}");
        assert!(row.ends_with("1/1 ok") && top.contains("/st  ok"), "{row}\n{top}");
        assert_eq!(metric().as_deref(), Some("1"));
        assert!(mounted.end());
    }
}

#[test]
fn the_access_trace_has_a_line_for_each_request() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new(2_000_000);
    let cache = ground.scratch.dir("cache");
    let trace = ground.scratch.join("trace");
    let args = ["-c", cache.to_str().unwrap(), "--cache-size", "1G", "--access-trace", trace.to_str().unwrap()];
    for round in 0..2 {
        let mounted = ground.mount(&args);
        let image = direct(&ground.image());
        let mut buffer = ground::Aligned::new(BLOCK_BYTES);
        for _ in 0..2 {
            image.read_exact_at(buffer.bytes(), 1 << 20).unwrap();
        }
        // What is kept on disk is written behind the reader's back.
        ground.until_status("it is kept", |status| status["tiers"][1]["n_kept"].as_u64() > Some(0) || round > 0);
        drop(image);
        assert!(mounted.end());
    }
    let text = fs::read_to_string(&trace).unwrap();
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("# time request inode offset length source microseconds errno"));
    let lines: Vec<Vec<&str>> = lines.map(|line| line.split(' ').collect()).collect();
    for line in &lines {
        assert_eq!(line.len(), 8, "{line:?}");
        let numbers = [line[0], line[2], line[3], line[4], line[6], line[7]];
        assert!(numbers.iter().all(|number| number.parse::<f64>().is_ok()), "{line:?}");
    }
    let reads: Vec<_> = lines
        .iter()
        .filter(|line| line[1] == "read" && line[3] == "1048576")
        .map(|line| (line[2], line[5], line[7]))
        .collect();
    let wanted = [("2", "store", "0"), ("2", "memory", "0"), ("2", "disk", "0"), ("2", "memory", "0")];
    assert_eq!(reads, wanted, "{text}");
    assert!(lines.iter().any(|line| line[1] == "lookup"));
    assert_eq!(fs::metadata(&trace).unwrap().mode() & 0o777, 0o600);
    let nowhere = ground.try_mount(&["--access-trace", "/nonexistent/trace"]).unwrap_err();
    assert!(nowhere.contains("access trace /nonexistent/trace: No such file or directory"), "{nowhere}");
}

#[test]
fn a_proxy_that_is_set_up_for_these_tests_answers() {
    // What the tests above take for a hanging store must be one that otherwise works.
    let Some(nginx) = peer("nginx") else { return };
    let ground = Ground::new(300_000);
    let nginx = Nginx::start(&nginx.path, &ground.scratch, Site { server: "", tls: None, verify_client: false });
    let proxy: FaultProxy = ground.behind_proxy(&nginx);
    proxy.set_script(|_, _| ProxyFault::None);
    let out = ground.scratch.join("out");
    run(ground.caifs(&["cat", "-s"]).arg(format!("{}/st", proxy.url())).arg(&ground.index).arg(&out)).ok();
    assert!(fs::read(&out).unwrap() == ground.blob);
}
