//! What is installed: `install.sh`, the template service, the lines to copy, and the units that systemd makes of them.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::world::{World, daemons, mount, umount, until};
use crate::support::peers::{missing, peer};
use crate::support::run::{command, run};
use crate::support::scratch::Scratch;

/// The lines that must work: the service's contract with those who write fstab.
const LINES: &str = r#"
https://cdn.example/img/deb12.caibx   /mnt/img   caifs  _netdev,nofail,store=https://cdn.example/store,cache=/var/cache/caifs,cache-size=20G   0 0
ssh://bk@host/backups/home.caidx      /mnt/home  caifs  _netdev,noauto,x-systemd.automount,x-systemd.idle-timeout=10min,user                  0 0
/srv/idx/                             /mnt/all   caifs  ro,store=/srv/store,"store=s3+https://s3.eu/b?x=1,2"                                  0 0
x.caidx                               /mnt/x     fuse.caifs  defaults,nosuid,nodev  0 0
"#;

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("mount-helpers").join(name)
}

/// All files below a directory, with the targets of links.
fn listing(root: &Path) -> BTreeMap<String, Option<PathBuf>> {
    let mut all = BTreeMap::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(dir) = waiting.pop() {
        for child in fs::read_dir(dir).unwrap() {
            let path = child.unwrap().path();
            let kind = path.symlink_metadata().unwrap().file_type();
            let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            match (kind.is_dir(), kind.is_symlink()) {
                (true, _) => waiting.push(path),
                (false, true) => drop(all.insert(name, Some(fs::read_link(path).unwrap()))),
                (false, false) => drop(all.insert(name, None)),
            }
        }
    }
    all
}

#[test]
fn a_package_has_everything_in_its_place_and_nothing_stays() {
    let scratch = Scratch::new();
    // It has completions for one shell, and none for the others.
    let program = scratch.file("program", b"#!/bin/sh\n[ \"$*\" != 'completions fish' ] || echo complete\n");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let package = scratch.dir("pack age");
    let install = |what: &str, prefix: &str| {
        // As root works where nothing is to be seen by others.
        let mut command = command("sh", ["-c", r#"umask 077; exec sh "$@""#, "sh"]);
        command
            .arg(shipped("install.sh"))
            .arg(what)
            .env("DESTDIR", &package)
            .env("CAIFS", &program)
            .env("PREFIX", prefix);
        run(&mut command)
    };
    for (prefix, unit) in [
        ("/usr", "usr/lib/systemd/system"),
        ("/usr/local", "usr/local/lib/systemd/system"),
        ("/opt/x", "opt/x/lib/systemd/system"),
    ] {
        install("install", prefix).ok();
        install("install", prefix).ok();
        let installed = listing(&package);
        let bin = format!("{prefix}/bin/caifs");
        for link in ["sbin/mount.caifs", "sbin/mount.fuse.caifs"] {
            assert_eq!(installed.get(link), Some(&Some(PathBuf::from(&bin))), "{link}: {installed:?}");
        }
        assert_eq!(fs::metadata(package.join(&bin[1..])).unwrap().permissions().mode() & 0o777, 0o755);
        for (name, _) in installed.iter().filter(|(_, target)| target.is_none()) {
            let path = package.join(name);
            let modes = [&*path, path.parent().unwrap()].map(|path| fs::metadata(path).unwrap().permissions().mode());
            assert!(modes[0] & 0o004 != 0 && modes[1] & 0o005 == 0o005, "{name} is for everybody: {modes:?}");
        }
        let unit = package.join(unit).join("caifs@.service");
        let text = fs::read_to_string(&unit).unwrap();
        assert!(text.contains(&format!("\nExecStart={bin} mount ")) && text.contains(&format!("\nExecReload={bin} ")));
        assert!(package.join("etc/caifs/mounts").is_dir());
        assert!(!installed.keys().any(|name| name.ends_with(".new")), "{installed:?}");
        let share = format!("{}/share", &prefix[1..]);
        let is_page = |name: &str| [".1", ".5", ".7", ".8"].iter().any(|section| name.ends_with(section));
        let pages = fs::read_dir(shipped("../man")).into_iter().flatten().flatten();
        for page in pages.filter_map(|page| page.file_name().into_string().ok()).filter(|name| is_page(name)) {
            let section = page.rsplit('.').next().unwrap();
            assert!(installed.contains_key(&format!("{share}/man/man{section}/{page}")), "{page}: {installed:?}");
        }
        let completions = package.join(&share).join("fish/vendor_completions.d/caifs.fish");
        assert_eq!(fs::read_to_string(completions).unwrap(), "complete\n");
        assert!(!installed.keys().any(|name| name.contains("bash-completion")), "{installed:?}");
        // A link of somebody else's is not ours to remove.
        fs::remove_file(package.join("sbin/mount.caifs")).unwrap();
        std::os::unix::fs::symlink("/elsewhere/caifs", package.join("sbin/mount.caifs")).unwrap();
        install("uninstall", prefix).ok();
        let left = listing(&package);
        assert_eq!(left.keys().collect::<Vec<_>>(), ["sbin/mount.caifs"]);
        fs::remove_file(package.join("sbin/mount.caifs")).unwrap();
    }
    let wrong = install("instal", "/usr").fails();
    assert_eq!(wrong.error_line(), "install.sh: unknown command instal (install or uninstall)");
    assert!(install("install", "usr").fails().error_line().contains("absolute path"));
    fs::remove_file(&program).unwrap();
    assert!(install("install", "/usr").fails().error_line().contains("no program at"));
}

#[test]
fn what_install_has_put_there_mounts_and_its_service_is_valid() {
    let Some(world) = World::enter("fstab::installed::what_install_has_put_there_mounts_and_its_service_is_valid")
    else {
        return;
    };
    let prefix = world.path("usr");
    let mut install = command("sh", [shipped("install.sh")]);
    install.env("PREFIX", &prefix).env("CAIFS", "/run/world/caifs").env("SYSCONFDIR", world.path("etc"));
    run(&mut install).ok();
    let content = world.content("srv", "x");
    let mountpoint = world.mountpoint("a");
    mount(&["-t", "caifs", content.index.to_str().unwrap(), "/mnt/a"]).ok();
    content.assert_read_from(&mountpoint);
    umount(&mountpoint);
    until(|| daemons().is_empty());
    // The service's own command, as systemd makes it of the template.
    let unit = prefix.join("lib/systemd/system/caifs@.service");
    let text = fs::read_to_string(&unit).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    let words = line.split(' ').map(|word| match word {
        "${OPTIONS}" => "memory=64M,noexec",
        "${SPEC}" => content.index.to_str().unwrap(),
        "${DIR}" => "/mnt/a",
        word => word,
    });
    let words: Vec<&str> = words.collect();
    let mut service = command(words[0], &words[1..]).spawn().unwrap();
    until(|| !world.mounts().is_empty());
    content.assert_read_from(&mountpoint);
    assert_eq!(world.mounted(&mountpoint)[3], "ro,nosuid,nodev,noexec,relatime");
    umount(&mountpoint);
    assert!(service.wait().unwrap().success());
    if let Some(analyze) = peer("systemd-analyze") {
        let instance = world.path("caifs@img.service");
        fs::copy(&unit, &instance).unwrap();
        let verified = run(analyze.command().args(["verify", "--man=no"]).arg(&instance)).ok();
        assert_eq!(verified.stderr.lines().filter(|line| line.contains("caifs")).count(), 0, "{}", verified.stderr);
        fs::write(&instance, text.replace("WatchdogSec", "WatchdogSecs")).unwrap();
        let wrong = run(analyze.command().args(["verify", "--man=no"]).arg(&instance));
        assert!(wrong.stderr.contains("WatchdogSecs"), "a mistake is found: {}", wrong.stderr);
    }
    run(install.arg("uninstall")).ok();
    assert!(!Path::new("/sbin/mount.caifs").exists());
}

/// Each unit with its text; and all files, with the targets of links.
type Units = (BTreeMap<String, String>, BTreeMap<String, Option<PathBuf>>);

/// The units that systemd makes of an fstab.
fn units_of(fstab: &Path, out: &Path) -> Option<Units> {
    let generator = Path::new("/usr/lib/systemd/system-generators/systemd-fstab-generator");
    if !generator.exists() {
        missing("systemd-fstab-generator (apt-get install systemd)");
        return None;
    }
    let mut command = Command::new(generator);
    run(command.args([out, out, out]).env("SYSTEMD_FSTAB", fstab)).ok();
    let listing = listing(out);
    let files = listing.iter().filter(|(_, target)| target.is_none());
    let texts = files.map(|(name, _)| (name.clone(), fs::read_to_string(out.join(name)).unwrap())).collect();
    Some((texts, listing))
}

#[test]
fn systemd_makes_the_units_that_the_lines_mean() {
    let scratch = Scratch::new();
    let Some((units, links)) = units_of(&scratch.file("fstab", LINES), &scratch.dir("units")) else { return };
    let has = |unit: &str, line: &str| {
        let text = units.get(unit).unwrap_or_else(|| panic!("{unit}: {:?}", units.keys()));
        assert!(text.lines().any(|own| own == line), "{unit} lacks {line}:\n{text}");
    };
    // Over the network, and the boot goes on without it.
    has("mnt-img.mount", "What=https://cdn.example/img/deb12.caibx");
    has("mnt-img.mount", "Type=caifs");
    has(
        "mnt-img.mount",
        "Options=_netdev,nofail,store=https://cdn.example/store,cache=/var/cache/caifs,cache-size=20G",
    );
    assert!(links.contains_key("remote-fs.target.wants/mnt-img.mount"), "{links:?}");
    assert!(!units["mnt-img.mount"].contains("Before="), "nothing waits for it");
    // Mounted when somebody looks.
    has("mnt-home.automount", "Where=/mnt/home");
    has("mnt-home.automount", "TimeoutIdleSec=10min");
    has("mnt-home.mount", "Before=remote-fs.target");
    assert!(links.contains_key("remote-fs.target.requires/mnt-home.automount"), "{links:?}");
    assert!(!links.keys().any(|link| link.ends_with(".target.requires/mnt-home.mount")), "{links:?}");
    // Local ones.
    has("mnt-all.mount", r#"Options=ro,store=/srv/store,"store=s3+https://s3.eu/b?x=1,2""#);
    has("mnt-all.mount", "What=/srv/idx/");
    has("mnt-x.mount", "Type=fuse.caifs");
    for unit in ["mnt-all.mount", "mnt-x.mount"] {
        assert!(links.contains_key(&format!("local-fs.target.requires/{unit}")), "{links:?}");
    }
    let ours = units.keys().filter(|name| name.contains("mnt-")).count();
    assert_eq!(ours, 5, "four mounts and one automount: {:?}", units.keys());
}

#[test]
fn the_examples_are_accepted_and_never_stop_a_boot() {
    let Some(world) = World::enter("fstab::installed::the_examples_are_accepted_and_never_stop_a_boot") else { return };
    world.link_helpers();
    let examples = fs::read_to_string(shipped("fstab.examples")).unwrap();
    for line in LINES.lines().filter(|line| line.contains("_netdev")) {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert!(examples.lines().any(|own| words(own) == words(line)), "the examples have {line}");
    }
    // Their places exist here, and in memory only.
    for place in ["/srv", "/var/lib", "/var/cache"] {
        fs::create_dir_all(place).unwrap();
        mount(&["-t", "tmpfs", "none", place]).ok();
    }
    for place in ["/srv/idx", "/srv/store", "/var/cache/caifs", "/var/lib/vm"] {
        fs::create_dir(place).unwrap();
    }
    for file in ["/srv/x.caidx", "/srv/two words.caidx", "/var/lib/vm/disk.img"] {
        fs::write(file, b"").unwrap();
    }
    let users = fs::read_to_string("/etc/passwd").unwrap();
    let users_here = world.path("passwd");
    fs::write(&users_here, format!("{users}_caifs:x:64999:65534::/nonexistent:/usr/sbin/nologin\n")).unwrap();
    mount(&["--bind", users_here.to_str().unwrap(), "/etc/passwd"]).ok();

    let lines: Vec<&str> = examples.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    assert!(lines.len() >= 8, "{lines:?}");
    for line in lines {
        let target = line.split_whitespace().nth(1).unwrap().replace("\\040", " ");
        if target.starts_with("/mnt/") {
            fs::create_dir_all(&target).unwrap();
        }
        world.write_fstab(&format!("{line}\n"));
        let faked = mount(&["-fv", &target]).ok();
        assert!(faked.text().contains(" would be mounted on "), "{line}: {}", faked.text());
        assert_eq!(faked.stderr, "", "{line}");
        if line.contains("://") {
            assert!(line.contains("_netdev,no"), "{line}: at boot it waits for the network, and nothing waits for it");
        }
    }
    let Some((units, links)) = units_of(&shipped("fstab.examples"), &{
        let out = world.path("units");
        fs::create_dir(&out).unwrap();
        out
    }) else {
        return;
    };
    let mounts = units.keys().filter(|name| name.ends_with(".mount")).count();
    assert!(mounts >= 8, "{:?}", units.keys());
    let required: Vec<_> = links.keys().filter(|link| link.contains("requires/") && link.ends_with(".mount")).collect();
    assert_eq!(required, ["local-fs.target.requires/mnt-x.mount"], "only what is local");
}

#[test]
fn no_line_of_the_manual_stops_a_boot() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut n_lines = 0;
    for text in ["README.md", "TROUBLESHOOTING.md", "man/src/mount.caifs.8.md", "man/src/caifs-mount.1.md"] {
        let text = fs::read_to_string(root.join(text)).unwrap_or_default();
        // Six words, the type the third.
        let is_line = |words: &[&str]| words.len() == 6 && ["caifs", "fuse.caifs"].contains(&words[2]);
        for line in text.lines().filter(|line| is_line(&line.split_whitespace().collect::<Vec<_>>())) {
            n_lines += 1;
            assert!(!line.contains("://") || line.contains("_netdev,no"), "{line}");
        }
    }
    assert!(n_lines >= 5, "{n_lines}");
}
