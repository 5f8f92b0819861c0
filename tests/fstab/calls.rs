//! How mount(8) calls the helper, what the helper says, and its exit codes.

use std::fs;
use std::net::TcpListener;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::world::{World, daemons, mount, umount, until};
use crate::support::run::{caifs, command, run};
use crate::support::server::{Server, free_port};

#[test]
fn a_fake_mount_checks_and_tells_but_does_not_mount() {
    let Some(world) = World::enter("fstab::calls::a_fake_mount_checks_and_tells_but_does_not_mount") else { return };
    world.link_helpers();
    let content = world.content("srv", "x");
    let index = content.index.to_str().unwrap();
    let mountpoint = world.mountpoint("a");
    fs::write(world.path("caifs.toml"), "[mount]\nio-timeout = \"20s\"\nmemory = \"32M\"\n").unwrap();
    let options =
        r#"noexec,memory=64M,store=/run/world/srv/default.castr,"store=http://u:secret@127.0.0.1:9/s?a=1,2",_netdev"#;
    world.write_fstab(&format!("{index} /mnt/a caifs {options} 0 0\n"));
    let effective = "type fuse.caifs (ro,nosuid,nodev,noexec,default_permissions,allow_other,store=/run/world/srv/default.castr,\
                     \"store=http://u@127.0.0.1:9/s?a=1,2\",memory=64M,io-timeout=20s)";
    let taken = "caifs: rw was taken as ro: what caifs mounts cannot be written to (mount(8) says rw unless told ro)";
    let fake = mount(&["-fv", "/mnt/a"]).ok();
    assert_eq!(fake.text(), format!("caifs: {index} would be mounted on /mnt/a, {effective}\n{taken}\n"));
    assert_eq!((world.mounts().len(), daemons().len()), (0, 0));
    let real = mount(&["-v", "/mnt/a"]).ok();
    assert_eq!(real.text(), format!("caifs: {index} mounted on /mnt/a, {effective}\n{taken}\n"));
    content.assert_read_from(&mountpoint);
    umount(&mountpoint);
    let read_only = mount(&["-v", "-t", "caifs", "-r", index, "/mnt/a"]).ok();
    assert_eq!(read_only.text().lines().count(), 1, "nobody said rw: {}", read_only.text());
    umount(&mountpoint);
    for (args, exit_code, said) in [
        (
            ["-f", "-t", "caifs", "-o", "memory=1", index, "/mnt/a"],
            1,
            "\"memory\": \"1\" is not a size of at least 16M",
        ),
        (["-f", "-t", "caifs", "-o", "ro", index, "/mnt/none"], 32, "mountpoint /mnt/none: does not exist"),
        (
            ["-f", "-t", "caifs", "-o", "ro", "/run/world/none.caibx", "/mnt/a"],
            32,
            "/run/world/none.caibx: No such file",
        ),
        (["-f", "-t", "caifs", "-o", "ro", "nosuch://h/x.caibx", "/mnt/a"], 1, "nosuch://h/x.caibx"),
    ] {
        let failed = mount(&args).fails();
        assert_eq!(failed.status.code(), Some(exit_code), "{args:?}: {}", failed.stderr);
        assert!(failed.error_line().contains(said), "{args:?}: {}", failed.stderr);
    }
}

#[test]
fn what_goes_wrong_is_said_in_one_line_with_the_exit_code_of_mount() {
    let Some(world) = World::enter("fstab::calls::what_goes_wrong_is_said_in_one_line_with_the_exit_code_of_mount")
    else {
        return;
    };
    world.link_helpers();
    let content = world.content("srv", "x");
    let index = content.index.to_str().unwrap();
    let mountpoint = world.mountpoint("a");
    fs::write("/mnt/file", b"").unwrap();
    let nobody_there = format!("http://127.0.0.1:{}/x.caibx", free_port());
    // Takes connections and never says a word.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silence = format!("http://{}/x.caibx", silent.local_addr().unwrap());
    for (options, spec, target, exit_code, said) in [
        ("memroy=64M", index, "/mnt/a", 1, "unknown mount option \"memroy\" (did you mean \"memory\"?)"),
        ("noexce", index, "/mnt/a", 1, "\"noexce\" (did you mean \"noexec\"?)"),
        ("io-timeout=soon", index, "/mnt/a", 1, "\"io-timeout\": \"soon\" is not a time"),
        ("config=/run/world/none", index, "/mnt/a", 1, "/run/world/none"),
        (
            "ro",
            index,
            "/mnt/none",
            32,
            "cannot mount /run/world/srv/x.caibx on /mnt/none: mountpoint /mnt/none: does not exist",
        ),
        ("ro", "/run/world/none.caibx", "/mnt/a", 32, "none.caibx: No such file"),
        ("store=/run/world/none", index, "/mnt/a", 32, "/run/world/none"),
        ("error-retry=0", &nobody_there, "/mnt/a", 32, "refused"),
        ("mount-timeout=1s", &silence, "/mnt/a", 32, "not ready within 1 s"),
    ] {
        let failed = mount(&["-t", "caifs", "-o", options, spec, target]).fails();
        assert_eq!(failed.status.code(), Some(exit_code), "{options} {spec}: {}", failed.stderr);
        let line = failed.error_line();
        assert!(line.starts_with("caifs: ") && line.contains(said), "{options} {spec}: {line}");
        assert_eq!(world.mounts().len(), 0, "{options} {spec}");
    }
    for (args, said) in [
        (["a"].as_slice(), "a mount helper needs SPEC and DIR, and was given 1"),
        (&["a", "b", "c", "-o", "ro"], "was given 3"),
        (&["a", "b", "-x"], "unknown option -x"),
        (&[index, "/mnt/a", "-o", "loop,offset=5"], "\"loop\" does not fit"),
        (&[index, "/mnt/a", "-o", "a=\"b"], "within double quotes"),
        (&[index, "/mnt/a", "-N", "/run/world/none"], "mount namespace /run/world/none: No such file"),
        (&[index, "/mnt/a", "-N", "/run/world/fstab"], "mount namespace /run/world/fstab: Invalid argument"),
    ] {
        let failed = run(&mut command("/sbin/mount.caifs", args)).fails();
        assert_eq!(failed.status.code(), Some(1), "{args:?}");
        assert!(failed.error_line().contains(said), "{args:?}: {}", failed.stderr);
    }
    let sloppy = mount(&["-s", "-t", "caifs", "-o", "memroy=64M,frobnicate", index, "/mnt/a"]).ok();
    let warnings: Vec<&str> = sloppy.stderr.lines().collect();
    assert_eq!(
        warnings,
        [
            "caifs: warning: unknown mount option \"memroy\" is ignored",
            "caifs: warning: unknown mount option \"frobnicate\" is ignored"
        ]
    );
    content.assert_read_from(&mountpoint);
    umount(&mountpoint);
    let help = run(&mut command("/sbin/mount.caifs", ["--help"])).ok().text();
    assert!(help.starts_with("mount.caifs SPEC DIR [-sfnv]"), "{help}");
}

#[test]
fn an_image_is_mounted_only_if_it_can_be_read_from_somewhere() {
    let Some(world) = World::enter("fstab::calls::an_image_is_mounted_only_if_it_can_be_read_from_somewhere") else {
        return;
    };
    world.link_helpers();
    let content = world.content("srv", "x");
    let index = content.index.to_str().unwrap();
    let mountpoint = world.mountpoint("a");
    let store = content.store.to_str().unwrap();
    let (empty, cache) = (world.path("empty"), world.path("cache"));
    fs::create_dir(&empty).unwrap();
    let port = free_port();
    let empty_server = format!("http://127.0.0.1:{port}");
    let _server =
        Server::start(caifs().args(["chunk-server", "-l", &format!("127.0.0.1:{port}"), "-s"]).arg(&empty), port);
    let servers = daemons();
    let nobody_there = format!("http://127.0.0.1:{}/s", free_port());
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silence = format!("http://{}/s", silent.local_addr().unwrap());
    for (options, said) in [
        (format!("mount-timeout=8s,error-retry=0,store={nobody_there}"), vec![nobody_there.as_str(), "refused"]),
        (format!("mount-timeout=8s,store={silence}"), vec!["no answer from", &silence, "within 2 s"]),
        (format!("store={empty_server}"), vec!["is missing in", &empty_server]),
        (
            format!("mount-timeout=8s,error-retry=0,store={},store={nobody_there}|{silence}", empty.display()),
            vec![nobody_there.as_str(), "refused"],
        ),
    ] {
        let failed = mount(&["-t", "caifs", "-o", &options, index, "/mnt/a"]).fails();
        assert_eq!(failed.status.code(), Some(32), "{options}: {}", failed.stderr);
        let line = failed.error_line();
        let wanted = format!("caifs: cannot mount {index} on /mnt/a: {index}: its first bytes cannot be had: ");
        assert!(line.starts_with(&wanted) && said.iter().all(|said| line.contains(said)), "{options}: {line}");
        assert!(world.mounts().is_empty() && daemons() == servers, "{options}");
    }
    // One of several is enough, and what is kept needs nobody.
    let cached = format!("cache={}", cache.display());
    for options in [
        format!("error-retry=0,store={nobody_there}|{store}"),
        format!("error-retry=0,store={nobody_there},store={store},{cached}"),
    ] {
        mount(&["-t", "caifs", "-o", &options, index, "/mnt/a"]).ok();
        content.assert_read_from(&mountpoint);
        umount(&mountpoint);
        until(|| daemons() == servers);
    }
    for options in [format!("error-retry=0,store={nobody_there},{cached}"), format!("offline,{cached}")] {
        mount(&["-t", "caifs", "-o", &options, index, "/mnt/a"]).ok();
        content.assert_read_from(&mountpoint);
        umount(&mountpoint);
        until(|| daemons() == servers);
    }
    // What is known not to be there is no surprise, nor is it to who wants the mount all the same.
    for options in [format!("offline,cache={}", empty.display()), format!("check-store=no,store={}", empty.display())] {
        mount(&["-t", "caifs", "-o", &options, index, "/mnt/a"]).ok();
        assert!(fs::read(mountpoint.join("x")).is_err());
        umount(&mountpoint);
        until(|| daemons() == servers);
    }
}

#[test]
fn a_caller_that_is_told_to_end_says_so_and_leaves_nothing() {
    let Some(world) = World::enter("fstab::calls::a_caller_that_is_told_to_end_says_so_and_leaves_nothing") else {
        return;
    };
    world.link_helpers();
    let mountpoint = world.mountpoint("a");
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let spec = format!("http://{}/x.caibx", silent.local_addr().unwrap());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut command = Command::new("/sbin/mount.caifs");
        command.arg(&spec).arg(&mountpoint).args(["-o", "rw"]).process_group(0);
        let child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        // The process in the background has begun to ask.
        let _asked = silent.accept().unwrap();
        kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(8), "{output:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(said, format!("caifs: cannot mount {spec} on /mnt/a: interrupted\n"));
        until(|| daemons().is_empty());
        assert_eq!(world.mounts().len(), 0);
    }
}

#[test]
fn without_home_path_and_input_a_mount_works() {
    let Some(world) = World::enter("fstab::calls::without_home_path_and_input_a_mount_works") else { return };
    world.link_helpers();
    let content = world.content("srv", "x");
    let mountpoint = world.mountpoint("a");
    // Then it is the one of the user.
    let home = world.path("home");
    fs::create_dir_all(home.join(".config/caifs")).unwrap();
    fs::write(home.join(".config/caifs/caifs.toml"), "[mount]\nmemory = \"77M\"\n").unwrap();
    let users = fs::read_to_string("/etc/passwd").unwrap();
    let users_here = world.path("passwd");
    fs::write(&users_here, users.replacen(":/root:", &format!(":{}:", home.display()), 1)).unwrap();
    mount(&["--bind", users_here.to_str().unwrap(), "/etc/passwd"]).ok();
    let mut command = Command::new("/usr/bin/mount");
    command.env_clear().args(["-n", "-t", "caifs"]).arg(&content.index).arg(&mountpoint);
    run(&mut command).ok();
    content.assert_read_from(&mountpoint);
    let [pid] = daemons()[..] else { panic!("one daemon") };
    for fd in [0, 1, 2] {
        assert_eq!(fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap(), Path::new("/dev/null"));
    }
    let status = run(Command::new("/run/world/caifs").args(["status", "--json"]).arg(&mountpoint)).ok().text();
    assert!(status.contains("77M"), "{status}");
    umount(&mountpoint);
    until(|| daemons().is_empty());
}

#[test]
fn the_manager_of_a_service_that_mounts_on_its_way_hears_nothing_of_us() {
    let Some(world) = World::enter("fstab::calls::the_manager_of_a_service_that_mounts_on_its_way_hears_nothing_of_us")
    else {
        return;
    };
    world.link_helpers();
    let content = world.content("srv", "x");
    let (a, b) = (world.mountpoint("a"), world.mountpoint("b"));
    let socket = world.path("notify");
    let manager = UnixDatagram::bind(&socket).unwrap();
    manager.set_nonblocking(true).unwrap();
    let mut by_mount = Command::new("/usr/bin/mount");
    by_mount.args(["-t", "caifs"]).arg(&content.index).arg(&a);
    let mut by_itself = Command::new("/run/world/caifs");
    // As the manager's variables are for whatever the service's own process starts.
    by_itself.arg("mount").arg(&content.index).arg(&b).env("SYSTEMD_EXEC_PID", std::process::id().to_string());
    for command in [&mut by_mount, &mut by_itself] {
        run(command.env("NOTIFY_SOCKET", &socket)).ok();
    }
    umount(&a);
    umount(&b);
    until(|| daemons().is_empty());
    let mut message = [0; 256];
    let heard = manager.recv(&mut message).map(|n| String::from_utf8_lossy(&message[..n]).into_owned());
    assert_eq!(heard.map_err(|error| error.kind()), Err(std::io::ErrorKind::WouldBlock));
}

#[test]
fn flags_are_on_when_asked_for_and_the_kernel_gets_its_own_options() {
    let Some(world) = World::enter("fstab::calls::flags_are_on_when_asked_for_and_the_kernel_gets_its_own_options")
    else {
        return;
    };
    world.link_helpers();
    let content = world.content("srv", "x");
    let index = content.index.to_str().unwrap();
    let mountpoint = world.mountpoint("a");
    for (options, vfs) in [
        ("defaults", "ro,nosuid,nodev,relatime"),
        ("rw,exec,auto,user,exec", "ro,nosuid,nodev,relatime"),
        ("users", "ro,nosuid,nodev,noexec,relatime"),
        // mount(8) keeps these to itself, as what holds anyway: hence the second names.
        ("suid,dev", "ro,nosuid,nodev,relatime"),
        ("allow-suid", "ro,nodev,relatime"),
        ("allow_suid,allow-dev", "ro,relatime"),
        ("user,suid", "ro,nodev,noexec,relatime"),
        ("noatime,nodev", "ro,nosuid,nodev,noatime"),
        ("sync,dirsync,lazytime,nosymfollow,silent", "ro,nosuid,nodev,relatime,nosymfollow"),
    ] {
        mount(&["-t", "caifs", "-o", options, index, "/mnt/a"]).ok();
        assert_eq!(world.mounted(&mountpoint)[3], vfs, "{options}");
        umount(&mountpoint);
    }
    for (options, own) in [
        ("max_read=4096", "ro,user_id=0,group_id=0,default_permissions,allow_other,max_read=4096"),
        ("default_permissions,allow_other=no", "ro,user_id=0,group_id=0,default_permissions"),
        // As lines have it that were written for mount.fuse3.
        ("drop_privileges", "ro,user_id=0,group_id=0,default_permissions,allow_other"),
    ] {
        mount(&["-t", "caifs", "-o", options, index, "/mnt/a"]).ok();
        assert_eq!(world.mounted(&mountpoint)[4], own, "{options}");
        content.assert_read_from(&mountpoint);
        umount(&mountpoint);
    }
    if !fs::read_to_string("/proc/filesystems").unwrap().contains("selinuxfs") {
        // As mount(8) does it, which leaves them out before we see them.
        let args = [index, "/mnt/a", "-o", r#"rw,context="system_u:object_r:usr_t:s0:c1,c2",rootcontext=a:b"#];
        let labelled = run(&mut command("/sbin/mount.caifs", args)).ok();
        assert!(
            labelled.stderr.contains("SELinux is not enabled: context= and the like are left out"),
            "{}",
            labelled.stderr
        );
        content.assert_read_from(&mountpoint);
        umount(&mountpoint);
    }
    for (args, vfs) in [("rw,suid", "ro,nodev,relatime"), ("rw,suid,dev,noexec,exec", "ro,relatime")] {
        run(&mut command("/sbin/mount.caifs", [index, "/mnt/a", "-o", args])).ok();
        assert_eq!(world.mounted(&mountpoint)[3], vfs, "{args}");
        umount(&mountpoint);
    }
    let remount = run(&mut command("/sbin/mount.caifs", [index, "/mnt/a", "-o", "ro,remount"])).fails();
    assert!(remount.error_line().starts_with("caifs: "), "{}", remount.stderr);
    assert_eq!(world.mounts().len(), 0, "a remount never mounts");
}
