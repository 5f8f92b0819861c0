//! systemd itself, as the first process of namespaces of its own: mount units, automount units and the template service as they are
//! started, waited for and ended in earnest. It sees only the units of this test.
//!
//! The test runs twice: outside it starts systemd, and systemd starts it again as a service.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::world::{World, daemons, until};
use crate::mount::can_mount;
use crate::support::peers::peer;
use crate::support::run::{Finished, command, run};
use crate::support::scratch::Scratch;

const TEST: &str = "fstab::systemd::systemd_mounts_the_lines_and_runs_the_service";

/// Makes the place and goes over to systemd. `$1` is the cgroup to be in, `$2` the program to test, `$3` a script to run in the place
/// before systemd starts.
const BOOT: &str = r#"
    echo $$ >"$1/cgroup.procs"
    exec unshare --mount --pid --fork --mount-proc --cgroup --ipc --uts --kill-child sh -ec '
        # Mounts of other tests would live as long as this place.
        timeout 10 umount -l -c -a -t fuse.caifs || :
        # What systemd sets for a whole machine is not to be set.
        mount --bind /proc/sys /proc/sys
        mount -o remount,bind,ro /proc/sys
        mount -t tmpfs -o mode=755 none /run
        mount -t tmpfs -o mode=755 none /mnt
        umount -l /sys/fs/cgroup
        mount -t cgroup2 none /sys/fs/cgroup
        mkdir -p /run/world /run/units /run/made /run/none
        for dir in /etc "$(readlink -f /sbin)"; do
            layer=/run/world/layer$(echo "$dir" | tr / -)
            mkdir -p "$layer/upper" "$layer/work"
            mount -t overlay -o "lowerdir=$dir,upperdir=$layer/upper,workdir=$layer/work" none "$dir"
        done
        touch /run/world/caifs
        mount --bind "$2" /run/world/caifs
        sh -e "$3"
        SYSTEMD_FSTAB=/etc/fstab /usr/lib/systemd/system-generators/systemd-fstab-generator /run/made /run/made /run/made
        rm -f /run/made/local-fs.target.wants/systemd-remount-fs.service
        export container=caifs SYSTEMD_UNIT_PATH=/run/units:/run/made SYSTEMD_GENERATOR_PATH=/run/none
        exec /lib/systemd/systemd --system --unit=check.service --log-target=null --show-status=no
    ' sh "$@"
"#;

/// systemd's own units that mounts, services and its end need.
const UNITS: &str = "local-fs-pre.target local-fs.target remote-fs-pre.target remote-fs.target network.target network-online.target \
                     umount.target shutdown.target final.target exit.target systemd-exit.service";

/// A cgroup of the second kind, for systemd to make its own below; removed on drop.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new() -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let root = mounts.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            (fields[2] == "cgroup2").then(|| fields[1].to_owned())
        })?;
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
        let path = Path::new(&root).join(own).join(format!("caifs-test-{}", std::process::id()));
        fs::create_dir(&path).ok().map(|()| Self(path))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let mut waiting = vec![self.0.clone()];
        let mut all = Vec::new();
        while let Some(dir) = waiting.pop() {
            let children = fs::read_dir(&dir).into_iter().flatten().flatten();
            waiting.extend(children.map(|child| child.path()).filter(|path| path.is_dir()));
            all.push(dir);
        }
        for dir in all.iter().rev() {
            // A process that was killed just now may be in it for a moment more.
            for _ in 0..1000 {
                match fs::remove_dir(dir) {
                    Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                        std::thread::sleep(std::time::Duration::from_millis(5));
                    }
                    _ => break,
                }
            }
        }
    }
}

/// Starts systemd, which runs the test; whether it could be started here.
fn boot() {
    if !can_mount() || ["unshare", "setpriv", "systemd"].iter().any(|name| peer(name).is_none()) {
        return;
    }
    let Some(cgroup) = Cgroup::new() else {
        // Not the test's failure: a container may be given none, and there is nothing to install.
        eprintln!("skipped: systemd needs a cgroup of version 2 that it may divide");
        return;
    };
    let scratch = Scratch::new();
    let (said, program) = (scratch.file("said", b""), std::env::current_exe().unwrap());
    let install = Path::new(env!("CARGO_MANIFEST_DIR")).join("mount-helpers/install.sh");
    let setting = scratch.file(
        "setting",
        format!(
            r#"
            for unit in {UNITS}; do
                cp "/lib/systemd/system/$unit" /run/units
            done
            for target in sysinit basic; do
                echo '[Unit]' >"/run/units/$target.target"
            done
            PREFIX=/run/world/usr CAIFS=/run/world/caifs UNITDIR=/run/units sh '{install}'
            mkdir -p /mnt/img /mnt/home /mnt/bad /mnt/service
            cd /run/world
            head -c 400000 /dev/urandom >x.blob
            ./caifs make -s default.castr x.caibx x.blob >/dev/null
            printf 'SPEC=/run/world/x.caibx\nDIR=/mnt/service\n' >/etc/caifs/mounts/plain.conf
            printf 'SPEC=/run/world/x.caibx\nDIR=/mnt/service\nOPTIONS='\''noexec,"store=/run/world/st,ore",memory=64M'\''\n' \
                >/etc/caifs/mounts/quoted.conf
            mv default.castr st,ore
            cp -a st,ore default.castr
            cat >/etc/fstab <<END
            /run/world/x.caibx /mnt/img caifs _netdev,nofail,cache=/run/world/cache,cache-size=20M 0 0
            /run/world/x.caibx /mnt/home caifs _netdev,noauto,x-systemd.automount,x-systemd.idle-timeout=1s,user 0 0
            /run/world/none.caibx /mnt/bad caifs _netdev,noauto 0 0
END
            cat >/run/units/check.service <<END
[Unit]
DefaultDependencies=no
Wants=remote-fs.target
After=remote-fs.target
SuccessAction=exit
FailureAction=exit
[Service]
Type=oneshot
Environment={inside}=1 CAIFS_REQUIRE_PEERS=0
StandardOutput=append:{said}
StandardError=append:{said}
ExecStart={program} --exact {TEST} --nocapture
END
"#,
            install = install.display(),
            inside = super::world::INSIDE,
            said = said.display(),
            program = program.display(),
        ),
    );
    let mut command = command("setpriv", ["--pdeathsig", "KILL", "sh", "-ec", BOOT, "sh"]);
    let booted = run(command.arg(&cgroup.0).arg(env!("CARGO_BIN_EXE_caifs")).arg(&setting));
    let said = fs::read_to_string(&said).unwrap();
    assert!(said.contains("1 passed"), "{said}{}{}", booted.text(), booted.stderr);
}

fn systemctl(args: &[&str]) -> Finished {
    run(Command::new("systemctl").args(args))
}

fn property(unit: &str, name: &str) -> String {
    systemctl(&["show", "--value", "-p", name, unit]).ok().text().trim_end().to_owned()
}

fn assert_read(mountpoint: &str) {
    let seen = fs::read(Path::new(mountpoint).join("x")).unwrap();
    assert!(seen == fs::read("/run/world/x.blob").unwrap(), "{mountpoint}: other bytes than packed");
}

/// What the template is for: whatever becomes of the process, it is the same mount, and who has a file open reads on.
fn check_that_the_mount_stays(world: &World) {
    const UNIT: &str = "caifs@plain.service";
    systemctl(&["start", UNIT]).ok();
    let device = || fs::metadata("/mnt/service").unwrap().dev();
    let (first, held) = (device(), fs::File::open("/mnt/service/x").unwrap());
    let blob = fs::read("/run/world/x.blob").unwrap();
    type End<'a> = &'a dyn Fn(&str);
    let killed: End = &|pid| drop(run(Command::new("kill").args(["-9", pid])).ok());
    let restarted: End = &|_| drop(systemctl(&["restart", UNIT]).ok());
    for end in [killed, restarted, killed] {
        let before = property(UNIT, "MainPID");
        end(&before);
        until(|| {
            let is_another = !["0", &before].contains(&property(UNIT, "MainPID").as_str());
            is_another && property(UNIT, "ActiveState") == "active"
        });
        assert_eq!(device(), first);
        // What the kernel has kept of it is dropped, so that this process must answer.
        nix::fcntl::posix_fadvise(&held, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        let mut bytes = vec![0; blob.len()];
        held.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == blob, "an open file goes on");
        assert_read("/mnt/service");
        assert_eq!(property(UNIT, "NFileDescriptorStore"), "2");
    }
    let pid = property(UNIT, "MainPID");
    systemctl(&["reload", UNIT]).ok();
    assert_eq!([property(UNIT, "ActiveState"), property(UNIT, "MainPID")], ["active".to_owned(), pid]);
    assert_eq!(device(), first);
    drop(held);
    systemctl(&["stop", UNIT]).ok();
    assert!(world.mounts().is_empty(), "a stop unmounts what was taken over");
    assert_eq!(property(UNIT, "Result"), "success");
}

#[test]
fn systemd_mounts_the_lines_and_runs_the_service() {
    let Some(world) = World::inside() else { return boot() };
    // The line for the boot is mounted after the network, and nothing waits for it.
    until(|| property("mnt-img.mount", "ActiveState") == "active");
    assert_read("/mnt/img");
    let after = property("mnt-img.mount", "After");
    assert!(after.split(' ').any(|unit| unit == "network-online.target"), "{after}");
    systemctl(&["stop", "mnt-img.mount"]).ok();
    assert!(world.mounts().is_empty());
    until(|| daemons().is_empty());
    systemctl(&["start", "mnt-img.mount"]).ok();
    assert_read("/mnt/img");
    // Somebody else's umount is noticed, and the process ends.
    run(Command::new("umount").arg("/mnt/img")).ok();
    until(|| property("mnt-img.mount", "ActiveState") == "inactive");

    // Nothing is mounted until somebody looks, and not for ever.
    assert_eq!(property("mnt-home.automount", "SubState"), "waiting");
    for _ in 0..2 {
        assert_read("/mnt/home");
        assert_eq!(world.mounted(Path::new("/mnt/home"))[3], "ro,nosuid,nodev,noexec,relatime");
        until(|| world.mounts().is_empty());
        until(|| property("mnt-home.automount", "SubState") == "waiting");
    }

    // The reason is our exit code's.
    systemctl(&["start", "mnt-bad.mount"]).fails();
    assert_eq!(property("mnt-bad.mount", "Result"), "exit-code");
    until(|| daemons().is_empty());

    // The template, without and with options. It is started when it can be used, and not before.
    for (instance, vfs) in [("plain", "ro,nosuid,nodev,relatime"), ("quoted", "ro,nosuid,nodev,noexec,relatime")] {
        let unit = format!("caifs@{instance}.service");
        systemctl(&["start", &unit]).ok();
        assert_read("/mnt/service");
        assert_eq!(world.mounted(Path::new("/mnt/service"))[3], vfs);
        assert_eq!(property(&unit, "Type"), "notify");
        until(|| property(&unit, "StatusText").contains("chunks from the cache"));
        systemctl(&["stop", &unit]).ok();
        assert!(world.mounts().is_empty());
        assert_eq!(property(&unit, "Result"), "success");
        assert_eq!(property(&unit, "NFileDescriptorStore"), "0");
    }
    check_that_the_mount_stays(&world);
    // An instance that nobody has described does not begin.
    systemctl(&["start", "caifs@nosuch.service"]).fails();
    assert_eq!(property("caifs@nosuch.service", "AssertResult"), "no");
    until(|| daemons().is_empty());
}
