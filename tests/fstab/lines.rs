//! Lines of fstab, mounted by `mount -a` and by name.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use super::world::{World, daemons, mount, umount, until};
use crate::support::peers::peer;
use crate::support::run::run;
use crate::support::servers::nginx::{Nginx, Site};
use crate::support::servers::sshd::Sshd;

#[test]
fn mount_a_twice_mounts_every_line_once() {
    let Some(nginx) = peer("nginx") else { return };
    let Some(world) = World::enter("fstab::lines::mount_a_twice_mounts_every_line_once") else { return };
    world.link_helpers();
    let site = world.path("site");
    fs::create_dir(&site).unwrap();
    let server = Nginx::start(&nginx.path, &site, Site::default());
    let url = server.url();
    let served = world.content("site/root", "deb12");
    let local = world.content("srv/a b", "x");
    let more = world.content("more", "y");
    symlink(&local.index, world.path("link.caibx")).unwrap();
    for name in ["img", "secret", "x", "link", "file", "two words", "quoted"] {
        world.mountpoint(name);
    }
    let home = "/run/world";
    // Chunks of `more` lie in the second store, whose name has a comma; of the third line of options, each quoting is one.
    let comma = world.path("st,ore");
    fs::rename(&more.store, &comma).unwrap();
    let secret = url.replace("//", "//user:password@");
    world.write_fstab(&format!(
        "# a comment\n\
         {url}deb12.caibx /mnt/img caifs _netdev,nofail,store={url}default.castr,cache={home}/cache,cache-size=20G 0 0\n\
         {secret}deb12.caibx /mnt/secret caifs _netdev,comment=hello,x-foo=1,X-bar,cache={home}/cache 0 0\n\
         srv/a\\040b/x.caibx /mnt/x fuse.caifs defaults,nosuid,nodev 0 0\n\
         {home}/link.caibx /mnt/link/ caifs ro,noexec 0 0\n\
         file://{home}/srv/a%20b/x.caibx /mnt/file caifs defaults 0 0\n\
         {home}/more/y.caibx /mnt/two\\040words caifs store={home}/srv/a\\040b/default.castr,\"store={home}/st,ore\",memory=64M 0 0\n\
         {home}/more/y.caibx /mnt/quoted caifs store={home}/srv/a\\040b/default.castr,store={home}/st\\134,ore 0 0\n\
         {home}/none.caibx /mnt/none caifs noauto 0 0\n"
    ));
    let from = |program: &str, args: &[&str]| run(Command::new(program).args(args).current_dir(home));
    let all = from("mount", &["-a"]).ok();
    assert_eq!((all.text(), all.stderr.as_str()), (String::new(), ""), "what went well is not talked about");
    let first = world.mounts();
    let again = from("mount", &["-a"]).ok();
    assert_eq!((again.text(), again.stderr.as_str()), (String::new(), ""));
    assert_eq!(world.mounts(), first, "nothing is mounted a second time");

    let sources: Vec<_> = first.iter().map(|[source, target, ..]| (source.as_str(), target.as_str())).collect();
    let (image, shown) = (format!("{url}deb12.caibx"), format!("{}deb12.caibx", url.replace("//", "//user@")));
    assert_eq!(
        sources,
        [
            (image.as_str(), "/mnt/img"),
            (&shown, "/mnt/secret"),
            (r"/run/world/srv/a\x20b/x.caibx", "/mnt/x"),
            (r"/run/world/srv/a\x20b/x.caibx", "/mnt/link"),
            (r"file:///run/world/srv/a%20b/x.caibx", "/mnt/file"),
            ("/run/world/more/y.caibx", r"/mnt/two\x20words"),
            ("/run/world/more/y.caibx", "/mnt/quoted"),
        ]
    );
    for [_, target, fs_type, vfs, own] in &first {
        assert_eq!(fs_type, "fuse.caifs");
        let flags = if target == "/mnt/link" { "ro,nosuid,nodev,noexec,relatime" } else { "ro,nosuid,nodev,relatime" };
        assert_eq!(vfs, flags, "{target}");
        assert_eq!(own, "ro,user_id=0,group_id=0,default_permissions,allow_other", "{target}");
    }
    for (content, names) in
        [(&served, ["img", "secret"].as_slice()), (&local, &["x", "link", "file"]), (&more, &["two words", "quoted"])]
    {
        for name in names {
            content.assert_read_from(&Path::new("/mnt").join(name));
        }
    }
    let df = from("df", &["-t", "fuse.caifs", "--output=source,used,avail,target", "-B1", "/mnt/img"]).ok().text();
    let line: Vec<&str> = df.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!((line[0], line[2], line[3]), (image.as_str(), "0", "/mnt/img"));
    assert!(line[1].parse::<u64>().unwrap() >= 400_000, "{df}");

    // Gone by its mountpoint, or by its source; a line mounts it again.
    assert_eq!(daemons().len(), 7);
    umount(Path::new("/mnt/img"));
    from("umount", &["/run/world/link.caibx"]).ok();
    assert_eq!(world.mounts().len(), 5);
    mount(&["/mnt/img"]).ok();
    served.assert_read_from(Path::new("/mnt/img"));
    for [_, target, ..] in world.mounts() {
        umount(Path::new(&target.replace(r"\x20", " ")));
    }
    assert_eq!(world.mounts().len(), 0);
    until(|| daemons().is_empty());
}

#[test]
fn what_has_a_password_is_remounted_by_its_directory_and_by_its_line() {
    let Some(nginx) = peer("nginx") else { return };
    let test = "fstab::lines::what_has_a_password_is_remounted_by_its_directory_and_by_its_line";
    let Some(world) = World::enter(test) else { return };
    world.link_helpers();
    let site = world.path("site");
    fs::create_dir(&site).unwrap();
    let server = Nginx::start(&nginx.path, &site, Site::default());
    let content = world.content("site/root", "x");
    let mountpoint = world.mountpoint("a");
    let with_login = |login: &str| format!("{}x.caibx", server.url().replace("//", &format!("//{login}@")));
    let (secret, shown) = (with_login("user:password"), with_login("user"));
    mount(&["-t", "caifs", &secret, "/mnt/a"]).ok();
    assert_eq!(world.mounted(&mountpoint)[0], shown);
    let memory = || {
        let mut status = Command::new("/run/world/caifs");
        let status = run(status.args(["status", "--json", "/mnt/a"])).ok().text();
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        let settings = status["settings"].as_array().unwrap();
        settings.iter().find(|setting| setting["name"] == "memory").unwrap()["value"].clone()
    };
    // Without a line mount(8) hands over what the mount table shows.
    mount(&["-o", "remount,memory=64M", "/mnt/a"]).ok();
    assert_eq!(memory(), "64M");
    let token = format!("{}x.caibx", server.url());
    for (other, named) in [(with_login("other:password"), with_login("other")), (with_login("token"), token)] {
        let refused = mount(&["-t", "caifs", "-o", "remount,memory=32M", &other, "/mnt/a"]).fails();
        let wanted = format!("mountpoint /mnt/a: {shown} is mounted there, and not {named}");
        assert!(refused.error_line().ends_with(&wanted), "{}", refused.stderr);
    }
    assert_eq!(memory(), "64M");
    world.write_fstab(&format!("{secret} /mnt/a caifs _netdev,noauto,memory=80M 0 0\n"));
    mount(&["-o", "remount", "/mnt/a"]).ok();
    assert_eq!(memory(), "80M");
    mount(&["-o", "remount,memory=96M", "/mnt/a"]).ok();
    assert_eq!(memory(), "96M");
    // With both named no line is looked for, and without a type no helper.
    mount(&["-t", "caifs", "-o", "remount,memory=64M", &secret, "/mnt/a"]).ok();
    assert_eq!(memory(), "64M");
    content.assert_read_from(&mountpoint);
    assert_eq!(world.mounts().len(), 1, "no second mount");
    umount(&mountpoint);
}

#[test]
fn a_backup_over_ssh_is_mounted_by_its_line() {
    let Some(world) = World::enter("fstab::lines::a_backup_over_ssh_is_mounted_by_its_line") else { return };
    let Some(sshd) = Sshd::start() else { return };
    world.link_helpers();
    let tree = world.path("home");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("letter"), b"dear reader").unwrap();
    let (store, index) = (world.path("default.castr"), world.path("home.caidx"));
    run(Command::new("/run/world/caifs").args(["tar", "-i", "-s"]).args([&store, &index, &tree])).ok();
    let mountpoint = world.mountpoint("home");
    let spec = sshd.url("ssh", &index);
    world.write_fstab(&format!(
        "{spec} /mnt/home caifs _netdev,noauto,x-systemd.automount,x-systemd.idle-timeout=10min,user 0 0\n"
    ));
    mount(&["-a"]).ok();
    assert_eq!(world.mounts().len(), 0, "noauto");
    // The far end runs this very program, which is not in its path.
    let mut command = Command::new("mount");
    command.env("CASYNC_REMOTE_PATH", "/run/world/caifs").arg("/mnt/home");
    run(sshd.with_ssh(&mut command)).ok();
    assert_eq!(fs::read(mountpoint.join("letter")).unwrap(), b"dear reader");
    let [source, _, _, vfs, _] = world.mounted(&mountpoint);
    assert_eq!((source, vfs.as_str()), (spec, "ro,nosuid,nodev,noexec,relatime"), "`user` makes it noexec");
    let again = run(sshd.with_ssh(&mut command)).fails();
    assert!(again.stderr.contains("already mounted"), "{}", again.stderr);
    umount(&mountpoint);
}

#[test]
fn a_remote_line_without_netdev_is_warned_of() {
    let Some(world) = World::enter("fstab::lines::a_remote_line_without_netdev_is_warned_of") else { return };
    world.link_helpers();
    let content = world.content("srv", "x");
    let index = content.index.display();
    for name in ["a", "b", "c"] {
        world.mountpoint(name);
    }
    // Only a store is far away, and never asked. What nobody mounts at boot cannot stop it.
    let store = "store=/run/world/srv/default.castr|http://127.0.0.1:9/s";
    world.write_fstab(&format!(
        "{index} /mnt/a caifs {store} 0 0\n{index} /mnt/b caifs {store},_netdev 0 0\n{index} /mnt/c caifs noauto,{store} 0 0\n"
    ));
    let warned = mount(&["/mnt/a"]).ok();
    assert_eq!(
        warned.error_line(),
        "caifs: warning: fstab has /mnt/a without _netdev: at boot it is mounted before there is a network, and its failure stops \
         the boot (add _netdev,nofail)"
    );
    for name in ["/mnt/b", "/mnt/c"] {
        assert_eq!(mount(&[name]).ok().stderr, "", "{name}");
    }
    let by_hand = world.mountpoint("d");
    let finished = mount(&["-t", "caifs", "-o", store, &index.to_string(), by_hand.to_str().unwrap()]).ok();
    assert_eq!(finished.stderr, "");
}
