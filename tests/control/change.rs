//! Other settings for a mount that is served: reload, SIGHUP and remount, also while many read.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use caifs::mount::table::MountTable;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::ground::{Ground, is_idle};
use crate::mount::can_mount;
use crate::support::is_root;
use crate::support::mounted::{Mounted, is_mountpoint};
use crate::support::peers::peer;
use crate::support::run::{Finished, run};
use crate::support::scratch::Scratch;
use crate::support::scripted::{Scripted, answer};

#[test]
fn reload_changes_credentials_stores_and_limits_under_load_without_an_error() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new(40_000_000);
    // A server that asks for a word; which word counts changes.
    let (accepts, n_old) = (Arc::new(AtomicUsize::new(1)), Arc::new(AtomicUsize::new(0)));
    let (seen_accepts, seen_old, dir) = (Arc::clone(&accepts), Arc::clone(&n_old), ground.store.clone());
    let server = Scripted::start(move |_, request| {
        let accepted = seen_accepts.load(Ordering::SeqCst);
        let word = match request.header("authorization") {
            Some("word one") => 1,
            Some("word two") => 2,
            _ => 0,
        };
        if word == 0 || word & accepted == 0 {
            seen_old.fetch_add(1, Ordering::SeqCst);
            return answer("403 Forbidden", "", b"");
        }
        let path = request.line.trim_start_matches("GET /");
        match fs::read(dir.join(path)) {
            Ok(bytes) => answer("200 OK", "", &bytes),
            Err(_) => answer("404 Not Found", "", b""),
        }
    });
    let word = ground.scratch.file("word", "word one\n");
    fs::set_permissions(&word, fs::Permissions::from_mode(0o600)).unwrap();
    let config = ground.scratch.join("caifs.toml");
    let configure = |mount: &str| {
        let text = format!(
            "[mount]\n{mount}\n[[stores]]\nlocation = \"http://**\"\nhttp-auth = {{ file = \"{}\" }}\n",
            word.display()
        );
        fs::write(&config, text).unwrap();
    };
    configure("memory = \"16M\"");
    let mut mount = ground.caifs(&["mount", "--config"]);
    mount.arg(&config).arg(&ground.index).arg(&ground.mnt).arg("-s").arg(server.url()).args(["--io-timeout", "20s"]);
    let mounted = Mounted::by_command(&mut mount, &ground.mnt).unwrap();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..4)
            .map(|seed| {
                scope.spawn({
                    let (ground, is_over) = (&ground, &is_over);
                    move || ground.read_until(seed, is_over)
                })
            })
            .collect();
        let reload = || run(ground.caifs(&["reload"]).arg(&ground.mnt));
        let progress = |what: &str| {
            let before = ground.status()["totals"]["read_bytes"].as_u64().unwrap();
            ground.until_status(what, |status| status["totals"]["read_bytes"].as_u64().unwrap() > before + (4 << 20));
        };
        progress("readers read with the first word");
        assert_eq!(reload().ok().text(), "nothing is different; stores are opened anew\n");
        // Both words hold for a moment, as they do wherever credentials are rotated.
        accepts.store(3, Ordering::SeqCst);
        fs::write(&word, "word two\n").unwrap();
        let said = reload().ok().text();
        assert_eq!(said, format!("changed  http-auth of {}\n", server.url()));
        progress("readers read with the second word");
        accepts.store(2, Ordering::SeqCst);
        n_old.store(0, Ordering::SeqCst);
        progress("readers go on");
        assert_eq!(n_old.load(Ordering::SeqCst), 0, "nobody uses the first word any more");

        configure("memory = \"32M\"\nio-timeout = \"21s\"\nuid = 7");
        let said = reload().ok().text();
        assert_eq!(said, "changed  memory: 16M -> 32M\nnot now  uid: default -> 7 (unmount and mount again)\n");
        assert_eq!(ground.status()["tiers"][0]["limit_bytes"], 13 << 20);
        fs::write(&config, "[mount]\nmemory = \"64M\"\nio-timeot = \"9s\"\n").unwrap();
        let wrong = reload().fails();
        let line = wrong.error_line();
        assert!(line.contains("nothing is changed: ") && line.contains("unknown key \"io-timeot\""), "{line}");
        assert_eq!(ground.status()["tiers"][0]["limit_bytes"], 13 << 20);
        // What was not there when it was mounted: a second store; told by signal.
        fs::write(
            &config,
            format!(
                "[mount]\nmemory = \"20M\"\n[[stores]]\nlocation = \"http://**\"\nhttp-auth = {{ file = \"{}\" }}\n",
                word.display()
            ),
        )
        .unwrap();
        kill(Pid::from_raw(mounted.pids()[0]), Signal::SIGHUP).unwrap();
        ground.until_status("the signal is heard", |status| status["tiers"][0]["limit_bytes"] == 8_519_680);
        progress("readers go on after the signal");
        is_over.store(true, Ordering::SeqCst);
        for reader in readers {
            assert!(reader.join().unwrap() > 0);
        }
    });
    let status = ground.status();
    assert_eq!((&status["totals"]["n_eio"], &status["totals"]["n_panics"]), (&0.into(), &0.into()), "{status}");
    ground.until_status("nobody waits any more", is_idle);
    assert!(
        status["budget"]
            .as_array()
            .unwrap()
            .iter()
            .all(|share| share["used_bytes"].as_u64() <= share["limit_bytes"].as_u64())
    );
    assert!(mounted.end());
}

#[test]
fn reload_all_reaches_every_mount_and_stores_in_a_file_are_read_again() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new(3_000_000);
    let empty = ground.scratch.dir("empty");
    let second = ground.scratch.dir("second");
    let stores = ground.scratch.join("stores.json");
    fs::write(&stores, format!("{{\"stores\": [{empty:?}]}}")).unwrap();
    let mut mount = ground.caifs(&["mount", "--store-file"]);
    mount.arg(&stores).arg(&ground.index).arg(&ground.mnt);
    let first = Mounted::by_command(&mut mount, &ground.mnt).unwrap();
    let mut mount = ground.mount_command(&second, &[]);
    let other = Mounted::by_command(&mut mount, &second).unwrap();
    assert!(fs::read(ground.image()).is_err(), "the store is empty");
    fs::write(&stores, format!("{{\"stores\": [{:?}]}}", ground.store)).unwrap();
    let said = run(&mut ground.caifs(&["reload", "--all"])).ok().text();
    assert!(said.contains(&format!("changed  store: {} -> {}", empty.display(), ground.store.display())), "{said}");
    assert!(said.contains(&format!("{}:\nnothing is different", second.display())), "{said}");
    assert!(fs::read(ground.image()).unwrap() == ground.blob);
    assert_eq!(ground.status()["stores"][0]["name"], ground.store.to_str().unwrap());
    fs::write(&stores, format!("{{\"stores\": [\"{}/missing\"]}}", ground.scratch.display())).unwrap();
    let wrong = run(ground.caifs(&["reload"]).arg(&ground.mnt)).fails();
    assert!(
        wrong.error_line().contains("nothing is changed: ") && wrong.stderr.contains("missing"),
        "{}",
        wrong.stderr
    );
    assert!(first.end() && other.end());
}

#[test]
fn a_store_out_of_the_sandbox_is_refused_and_nothing_changes() {
    if !can_mount() || !is_root() {
        return;
    }
    let (ground, elsewhere) = (Ground::new(3_000_000), Scratch::new());
    let far = elsewhere.join("st");
    run(Command::new("cp").arg("-r").arg(&ground.store).arg(&far)).ok();
    let stores = ground.scratch.join("stores.json");
    fs::write(&stores, format!("{{\"stores\": [{:?}]}}", ground.store)).unwrap();
    let mount = |sandbox: &str| {
        let mut mount = ground.caifs(&["mount", "--store-file"]);
        mount.arg(&stores).args(["-o", sandbox]).arg(&ground.index).arg(&ground.mnt);
        Mounted::by_command(&mut mount, &ground.mnt).unwrap()
    };
    let mounted = mount("sandbox=yes");
    fs::write(&stores, format!("{{\"stores\": [{far:?}]}}")).unwrap();
    let refused = run(ground.caifs(&["reload"]).arg(&ground.mnt)).fails();
    let line = refused.error_line();
    assert!(line.contains("nothing is changed: ") && line.contains("out of reach of the sandbox"), "{line}");
    assert!(fs::read(ground.image()).unwrap() == ground.blob);
    assert!(mounted.end());
    fs::write(&stores, format!("{{\"stores\": [{:?}]}}", ground.store)).unwrap();
    let mounted = mount("sandbox=no");
    fs::write(&stores, format!("{{\"stores\": [{far:?}]}}")).unwrap();
    run(ground.caifs(&["reload"]).arg(&ground.mnt)).ok();
    assert!(fs::read(ground.image()).unwrap() == ground.blob);
    assert!(mounted.end());
}

#[test]
fn what_cannot_change_is_named_before_the_sandbox_is() {
    if !can_mount() || !is_root() {
        return;
    }
    let (ground, elsewhere) = (Ground::new(3_000_000), Scratch::new());
    let config = ground.scratch.file("caifs.toml", "");
    let mounted = ground.mount(&["-o", "sandbox=yes", "--config", config.to_str().unwrap()]);
    let file = elsewhere.join("copy");
    for backing in [file.to_str().unwrap(), "no"] {
        let mut remount = ground.caifs(&["mount", "-o", &format!("remount,memory=64M,backing={backing}")]);
        let refused = run(remount.arg(&ground.index).arg(&ground.mnt)).fails();
        let wanted = "caifs: nothing is changed: backing cannot change while mounted (unmount and mount again)";
        assert_eq!((refused.status.code(), refused.error_line()), (Some(1), wanted), "{backing}");
    }
    // What waits for the next mount is held to nothing now.
    fs::write(&config, format!("[mount]\nmemory = \"64M\"\nbacking = {file:?}\n")).unwrap();
    let said = run(ground.caifs(&["reload"]).arg(&ground.mnt)).ok().text();
    let wanted = format!(
        "changed  memory: 256M -> 64M\nnot now  backing: default -> {} (unmount and mount again)\n",
        file.display()
    );
    assert_eq!(said, wanted);
    assert!(mounted.end());
}

#[test]
fn offline_is_judged_by_who_serves_with_the_cache_that_the_mount_has() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new(3_000_000);
    let (cache, config_dir) = (ground.scratch.dir("cache"), ground.scratch.dir("etc"));
    let config = config_dir.join("caifs.toml");
    let caifs = |args: &[&str]| {
        let mut command = ground.caifs(args);
        command.env("CAIFS_CONFIG_DIR", &config_dir);
        command
    };
    let mount = |args: &[&str]| {
        let mut mount = ground.mount_command(&ground.mnt, args);
        Mounted::by_command(mount.env("CAIFS_CONFIG_DIR", &config_dir), &ground.mnt).unwrap()
    };
    let remount = |options: &str| run(caifs(&["mount", "-o", options]).arg(&ground.index).arg(&ground.mnt));
    let reload = || run(caifs(&["reload"]).arg(&ground.mnt));
    let setting = |name: &str| {
        let settings = ground.status()["settings"].as_array().unwrap().clone();
        settings.into_iter().find(|setting| setting["name"] == name).map(|setting| setting["value"].clone())
    };
    let mounted = mount(&["-c", cache.to_str().unwrap()]);
    assert!(fs::read(ground.image()).unwrap() == ground.blob);
    remount("remount,offline").ok();
    assert_eq!(setting("offline"), Some("yes".into()));
    remount("remount,offline=no").ok();
    assert!(mounted.end());

    let mounted = mount(&["-c", cache.to_str().unwrap()]);
    fs::write(&config, "[mount]\noffline = true\n").unwrap();
    assert_eq!(reload().ok().text(), "changed  offline: no -> yes\n");
    remount("remount,memory=128M").ok();
    assert_eq!((setting("offline"), setting("memory")), (Some("yes".into()), Some("128M".into())));
    assert!(mounted.end());

    // Without a cache it is refused, with all that is asked for beside it.
    let reason = "caifs: nothing is changed: offline needs a cache to read from (-c CACHE)";
    fs::write(&config, "").unwrap();
    let mounted = mount(&[]);
    let refused = |refused: Finished| {
        let refused = refused.fails();
        assert!(refused.error_line().ends_with(reason.trim_start_matches("caifs: ")), "{}", refused.stderr);
        assert_eq!((setting("offline"), setting("memory")), (Some("no".into()), Some("256M".into())));
    };
    let both = remount("remount,memory=128M,offline");
    assert_eq!((both.status.code(), both.error_line()), (Some(32), reason));
    refused(both);
    // A cache that is named now is of the next mount.
    fs::write(&config, format!("[mount]\ncache = {cache:?}\noffline = true\n")).unwrap();
    refused(remount("remount,memory=128M"));
    refused(reload());
    assert!(mounted.end());
}

#[test]
fn remount_changes_flags_and_options_and_names_what_it_cannot_change() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new(3_000_000);
    let cache = ground.scratch.dir("cache");
    let mounted = ground.mount(&["-o", "cache-size=100M", "-c", cache.to_str().unwrap()]);
    let remount = |options: &str| run(ground.caifs(&["mount", "-o", options]).arg(&ground.index).arg(&ground.mnt));
    let flags = || {
        let table = MountTable::read().unwrap();
        table.at(&ground.mnt).unwrap().options.clone()
    };
    remount("remount,cache-size=40G,noexec,noatime").ok();
    assert_eq!(flags(), "ro,nosuid,nodev,noexec,noatime");
    let setting = |name: &str| {
        let settings = ground.status()["settings"].as_array().unwrap().clone();
        settings.into_iter().find(|setting| setting["name"] == name).map(|setting| setting["value"].clone())
    };
    assert_eq!(setting("cache-size"), Some("40G".into()));
    assert_eq!(ground.status()["tiers"][1]["limit_bytes"], 40u64 << 30);
    remount("rw,_netdev,remount,exec,relatime").ok();
    assert_eq!(flags(), "ro,nosuid,nodev,relatime");
    // As mount(8) gives it: all options of the fstab line, of which one is another.
    remount(&format!("rw,remount,store={},cache={},cache-size=7G", ground.store.display(), cache.display())).ok();
    assert_eq!((setting("cache-size"), setting("memory")), (Some("7G".into()), Some("256M".into())));
    // And where fstab has no line: what the mount table shows, with what is asked for behind it.
    let shown = "ro,nosuid,nodev,relatime,remount,user_id=0,group_id=0,default_permissions,allow_other";
    remount(&format!("{shown},cache-size=8G")).ok();
    assert_eq!(setting("cache-size"), Some("8G".into()));
    remount(&format!("{shown},cache-size=7G")).ok();
    for (options, code, reason) in [
        (
            "remount,max_read=8192",
            1,
            "caifs: nothing is changed: max_read cannot change while mounted (unmount and mount again)",
        ),
        (
            "remount,allow_other,allow-other=no",
            1,
            "caifs: nothing is changed: allow-other cannot change while mounted (unmount and mount again)",
        ),
        (
            "remount,memory=32M,uid=7,backing=auto",
            1,
            "caifs: nothing is changed: uid, backing cannot change while mounted (unmount and mount again)",
        ),
        (
            "remount,memory=1",
            1,
            "caifs: mount option \"memory\": \"1\" is not a size of at least 16M, such as 512M or 1G",
        ),
        ("remount,memroy=32M", 1, "caifs: unknown mount option \"memroy\" (did you mean \"memory\"?)"),
    ] {
        let refused = remount(options).fails();
        assert_eq!((refused.status.code(), refused.error_line()), (Some(code), reason));
    }
    assert_eq!(setting("memory"), Some("256M".into()));
    // Who may not change flags is refused before options are changed.
    if let Some(setpriv) = peer("setpriv") {
        let mut unable = setpriv.command();
        unable.args(["--bounding-set", "-sys_admin"]).arg(env!("CARGO_BIN_EXE_caifs"));
        let command = ground.caifs(&["mount", "-o", "remount,memory=64M,noexec"]);
        unable.args(command.get_args()).arg(&ground.index).arg(&ground.mnt);
        unable.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let refused = run(&mut unable).fails();
        assert!(refused.error_line().contains("only root can change flags of a mount"), "{}", refused.stderr);
        assert_eq!(setting("memory"), Some("256M".into()), "nothing is changed");
    }
    // A remount outlives a reload.
    run(ground.caifs(&["reload"]).arg(&ground.mnt)).ok();
    assert_eq!(setting("cache-size"), Some("7G".into()));
    let other = run(ground.caifs(&["mount", "-o", "remount,noexec", "/nowhere/x.caibx"]).arg(&ground.mnt)).fails();
    let wanted = format!("{} is mounted there, and not /nowhere/x.caibx", ground.index.display());
    assert!(other.status.code() == Some(32) && other.error_line().contains(&wanted), "{}", other.stderr);
    assert_eq!(flags(), "ro,nosuid,nodev,relatime");
    let table = MountTable::read().unwrap();
    assert_eq!(table.entries().iter().filter(|entry| entry.mountpoint == ground.mnt).count(), 1, "no second mount");
    assert!(mounted.end());
    let nothing = remount("remount,memory=32M").fails();
    assert!(
        nothing.status.code() == Some(32) && nothing.error_line().contains("nothing of caifs is mounted there"),
        "{}",
        nothing.stderr
    );
    assert!(!is_mountpoint(&ground.mnt));

    let mounted = ground.mount(&["--control=no"]);
    remount("remount,noexec").ok();
    assert_eq!(flags(), "ro,nosuid,nodev,noexec,relatime");
    // As mount(8) gives it: the whole line of fstab, which says that there is nobody to ask.
    let whole = remount("rw,remount,exec,memory=256M,control=no").ok();
    assert!(whole.stderr.contains("options of caifs itself hold as they were"), "{}", whole.stderr);
    assert_eq!(flags(), "ro,nosuid,nodev,relatime");
    let refused = remount("remount,memory=32M").fails();
    assert_eq!(refused.status.code(), Some(32));
    assert!(refused.error_line().contains("options of caifs itself need its control socket: "), "{}", refused.stderr);
    assert!(mounted.end());
}
