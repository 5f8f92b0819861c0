//! Who else mounts: an ordinary user, mount.fuse3 in our place, and somebody for another namespace.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use super::world::{World, daemons, mount, umount, until};
use crate::support::peers::peer;
use crate::support::run::{command, run};

/// The user that is not root.
const NOBODY: u32 = 65534;

fn as_nobody(program: &str, args: &[&str]) -> Command {
    let mut command = command("setpriv", ["--reuid=65534", "--regid=65534", "--clear-groups", "--", program]);
    command.args(args);
    command
}

#[test]
fn an_ordinary_user_mounts_and_unmounts_a_line_with_user() {
    let Some(world) = World::enter("fstab::users::an_ordinary_user_mounts_and_unmounts_a_line_with_user") else {
        return;
    };
    world.link_helpers();
    let content = world.content("srv", "x");
    let mountpoint = world.mountpoint("home");
    let index = content.index.display();
    world.write_fstab(&format!(
        "{index} /mnt/home caifs noauto,user,memory=64M,max_read=65536 0 0\n\
         {index} /mnt/open caifs noauto,user,allow_other 0 0\n\
         {index} /mnt/root caifs noauto 0 0\n"
    ));
    let refused = run(&mut as_nobody("mount", &["/mnt/home"])).fails();
    assert_eq!(refused.status.code(), Some(32));
    assert!(refused.error_line().contains("the mountpoint must belong to the user who mounts"), "{}", refused.stderr);
    chown(&mountpoint, Some(NOBODY), Some(NOBODY)).unwrap();

    let mut command = as_nobody("mount", &["/mnt/home"]);
    run(command.env_remove("PATH")).ok();
    let [_, _, _, vfs, own] = world.mounted(&mountpoint);
    assert_eq!(vfs, "ro,nosuid,nodev,noexec,relatime");
    assert_eq!(own, "ro,user_id=65534,group_id=65534,default_permissions,max_read=65536");
    let mut compare = as_nobody("cmp", &["/mnt/home/x", "/run/world/srv/x.blob"]);
    run(&mut compare).ok();
    let [pid] = daemons()[..] else { panic!("one daemon") };
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("\nUid:\t65534\t65534\t65534\t65534\n"), "{status}");
    assert!(fs::read(mountpoint.join("x")).is_err(), "without allow_other not even root may look");
    let again = run(&mut as_nobody("mount", &["/mnt/home"])).fails();
    assert!(again.stderr.contains("already mounted"), "{}", again.stderr);
    run(&mut as_nobody("umount", &["/mnt/home"])).ok();
    assert_eq!(world.mounts().len(), 0);
    until(|| daemons().is_empty());

    let not_for_users = run(&mut as_nobody("mount", &["/mnt/root"])).fails();
    assert!(not_for_users.stderr.contains("/mnt/root"), "{}", not_for_users.stderr);
    let open = world.mountpoint("open");
    chown(&open, Some(NOBODY), Some(NOBODY)).unwrap();
    let configuration = world.path("fuse.conf");
    fs::write(&configuration, "").unwrap();
    fs::set_permissions(&configuration, fs::Permissions::from_mode(0o644)).unwrap();
    if !Path::new("/etc/fuse.conf").exists() {
        fs::write("/etc/fuse.conf", "").unwrap();
    }
    mount(&["--bind", configuration.to_str().unwrap(), "/etc/fuse.conf"]).ok();
    let hinted = run(&mut as_nobody("mount", &["/mnt/open"])).fails();
    assert_eq!(hinted.status.code(), Some(32));
    assert!(hinted.error_line().contains("/etc/fuse.conf"), "{}", hinted.stderr);
    assert!(
        hinted.error_line().ends_with("(root can add that line; or mount without allow-other)"),
        "{}",
        hinted.stderr
    );
    fs::write(&configuration, "user_allow_other\n").unwrap();
    run(&mut as_nobody("mount", &["/mnt/open"])).ok();
    content.assert_read_from(&open);
    umount(&open);
}

#[test]
fn mount_fuse3_and_the_link_make_the_same_mount() {
    let Some(world) = World::enter("fstab::users::mount_fuse3_and_the_link_make_the_same_mount") else { return };
    if peer("mount.fuse3").is_none() {
        return;
    }
    let content = world.content("srv", "it's $(x)");
    let index = content.index.to_str().unwrap();
    let mountpoint = world.mountpoint("a");
    let store = world.path("st,ore");
    fs::rename(&content.store, &store).unwrap();
    let mut seen = Vec::new();
    for with_link in [false, true] {
        match with_link {
            true => world.link_helpers(),
            false => world.without_helpers(),
        }
        for (options, vfs) in [
            ("defaults", "ro,nosuid,nodev,relatime"),
            ("ro,nosuid", "ro,nosuid,nodev,relatime"),
            ("suid,dev,noexec", "ro,nosuid,nodev,noexec,relatime"),
            ("allow-suid,noexec", "ro,nodev,noexec,relatime"),
        ] {
            let options = format!(r#"{options},memory=64M,_netdev,nofail,"store=/run/world/st,ore""#);
            mount(&["-t", "fuse.caifs", "-o", &options, index, "/mnt/a"]).ok();
            let mounted = world.mounted(&mountpoint);
            assert_eq!(mounted[3], vfs, "{options}, by our link: {with_link}");
            seen.push(mounted);
            content.assert_read_from(&mountpoint);
            umount(&mountpoint);
        }
        let wrong = mount(&["-t", "fuse.caifs", "-o", "memroy=1G", index, "/mnt/a"]).fails();
        assert!(wrong.error_line().contains("did you mean \"memory\""), "{}", wrong.stderr);
    }
    let (by_mount_fuse, by_us) = seen.split_at(4);
    assert_eq!(by_mount_fuse, by_us);
}

#[test]
fn a_mount_that_mount_fuse3_has_made_is_served_from_its_descriptor() {
    let Some(world) = World::enter("fstab::users::a_mount_that_mount_fuse3_has_made_is_served_from_its_descriptor")
    else {
        return;
    };
    if peer("mount.fuse3").is_none() {
        return;
    }
    world.without_helpers();
    let content = world.content("srv", "x");
    let mountpoint = world.mountpoint("a");
    let options = "ro,drop_privileges,allow_other,default_permissions,memory=64M";
    mount(&["-t", "fuse.caifs", "-o", options, content.index.to_str().unwrap(), "/mnt/a"]).ok();
    content.assert_read_from(&mountpoint);
    world.mounted(&mountpoint);
    let [pid] = daemons()[..] else { panic!("one daemon") };
    let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(line.contains("\0/dev/fd/"), "{line:?}");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
    umount(&mountpoint);
    until(|| daemons().is_empty());

    // What is no connection to the kernel, or none that is mounted, is refused in one line.
    let refused =
        run(&mut command("sh", ["-c", "exec caifs /run/world/srv/x.caibx /dev/fd/7 -o ro 7</dev/null"])).fails();
    assert!(refused.error_line().contains("mountpoint /dev/fd/7: is not /dev/fuse"), "{}", refused.stderr);
    let refused =
        run(&mut command("sh", ["-c", "exec caifs /run/world/srv/x.caibx /dev/fd/7 -o ro 7<>/dev/fuse"])).fails();
    assert!(refused.error_line().contains("FUSE session: "), "{}", refused.stderr);
    let refused = run(&mut command("caifs", ["/run/world/srv/x.caibx", "/dev/fd/99", "-o", "ro"])).fails();
    assert!(refused.error_line().contains("/dev/fd/99: no descriptor to serve"), "{}", refused.stderr);
    assert_eq!(refused.status.code(), Some(32));
}

#[test]
fn a_mount_for_another_namespace_is_there_and_not_here() {
    let Some(world) = World::enter("fstab::users::a_mount_for_another_namespace_is_there_and_not_here") else { return };
    world.link_helpers();
    let content = world.content("srv", "x");
    world.mountpoint("a");
    // It lives as long as its standard input, and says when it is there.
    let mut other = Command::new("unshare");
    other.args(["--mount", "sh", "-c", "echo ready; cat"]);
    let mut other = other.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut line = [0u8; 6];
    std::io::Read::read_exact(other.stdout.as_mut().unwrap(), &mut line).unwrap();
    let namespace = format!("/proc/{}/ns/mnt", other.id());
    mount(&["-N", &namespace, "-t", "caifs", content.index.to_str().unwrap(), "/mnt/a"]).ok();
    assert_eq!(world.mounts().len(), 0, "not here");
    let there = |args: &[&str]| run(command("nsenter", [format!("--mount={namespace}")]).args(args));
    there(&["cmp", "/mnt/a/x", "/run/world/srv/x.blob"]).ok();
    there(&["umount", "/mnt/a"]).ok();
    until(|| daemons().is_empty());
    drop(other.stdin.take());
    other.wait().unwrap();
    let refused = as_nobody("/sbin/mount.caifs", &["/run/world/srv/x.caibx", "/mnt/a", "-N", "/proc/self/ns/mnt"]);
    let refused = { refused }.output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
}
