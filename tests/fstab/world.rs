//! A private place for a test: a mount namespace with its own /run, /mnt, /etc/fstab and /usr/sbin, and a process namespace, so that
//! every mount and every process of the test ends with it, however the test ends.
//!
//! The test runs twice: outside it makes the place and runs itself again in it, inside it does its work.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::mount::can_mount;
use crate::support::blob::Xorshift;
use crate::support::peers::peer;
use crate::support::run::{Finished, run};

/// Set inside.
pub const INSIDE: &str = "CAIFS_TEST_FSTAB";

/// Where everything of the place lies; in memory.
const HOME: &str = "/run/world";

/// The names that mount(8) looks for.
pub const HELPERS: [&str; 2] = ["mount.caifs", "mount.fuse.caifs"];

/// Makes the place. `$1` is the test program, `$2` the test, `$3` the program to test.
const SETTING: &str = r#"
    # Mounts of other tests would live as long as this place.
    timeout 10 umount -l -c -a -t fuse.caifs || :
    sbin=$(readlink -f /sbin)
    mount -t tmpfs -o mode=755 none /run
    mount -t tmpfs -o mode=755 none /mnt
    mkdir -p /run/world/upper /run/world/work /run/sshd
    mount -t overlay -o "lowerdir=$sbin,upperdir=/run/world/upper,workdir=/run/world/work" none "$sbin"
    touch /run/world/fstab /run/world/caifs
    mount --bind /run/world/fstab /etc/fstab
    # The program may lie where an ordinary user cannot go.
    mount --bind "$3" /run/world/caifs
    # As udev has it everywhere.
    mknod -m 666 /run/world/fuse c 10 229
    mount --bind /run/world/fuse /dev/fuse
    "$1" --exact "$2" --nocapture
"#;

/// The inside.
#[derive(Debug)]
pub struct World {
    n_contents: std::cell::Cell<u64>,
}

/// An index with the blob that it describes; its chunks are in `default.castr` beside it.
#[derive(Debug)]
pub struct Content {
    pub index: PathBuf,
    pub store: PathBuf,
    /// The name of the file in a mount.
    pub name: String,
    pub bytes: Vec<u8>,
}

impl World {
    /// The place, when the test (by its full name) runs in it; outside, runs it there and gives `None`.
    #[track_caller]
    pub fn enter(test: &str) -> Option<Self> {
        if let Some(world) = Self::inside() {
            return Some(world);
        }
        if !can_mount() {
            return None;
        }
        for program in ["unshare", "fusermount3", "setpriv", "findmnt"] {
            peer(program)?;
        }
        // It ends with this process, which may be killed. The shell is the first process of the namespace, and looks after those whose
        // parents end.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "unshare"]);
        command.args(["--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-ec", SETTING, "sh"]);
        command.arg(std::env::current_exe().unwrap()).arg(test).arg(env!("CARGO_BIN_EXE_caifs"));
        // A configuration of the machine's is none of ours.
        command.env(INSIDE, "1").env("CAIFS_CONFIG_DIR", HOME).env_remove("CAIFS_LOG").env("HOME", "/run/world/nobody");
        let finished = run(&mut command);
        let said = finished.text();
        assert!(finished.status.success() && said.contains("1 passed"), "{said}{}", finished.stderr);
        None
    }

    /// The place, in it.
    pub fn inside() -> Option<Self> {
        std::env::var_os(INSIDE).map(|_| Self { n_contents: std::cell::Cell::new(1) })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        Path::new(HOME).join(name)
    }

    /// A new directory below /mnt.
    pub fn mountpoint(&self, name: &str) -> PathBuf {
        let path = Path::new("/mnt").join(name);
        fs::create_dir(&path).unwrap();
        path
    }

    /// Links the program to the names of helpers.
    pub fn link_helpers(&self) {
        for name in HELPERS {
            symlink("/run/world/caifs", Path::new("/sbin").join(name)).unwrap();
        }
    }

    /// Takes the links away, and has the program in the path as `caifs` instead, which is what mount.fuse3 starts.
    pub fn without_helpers(&self) {
        for name in HELPERS {
            let _ = fs::remove_file(Path::new("/sbin").join(name));
        }
        symlink("/run/world/caifs", "/sbin/caifs").unwrap();
    }

    pub fn write_fstab(&self, text: &str) {
        fs::write("/etc/fstab", text).unwrap();
    }

    /// Makes an index `name.caibx` of other noise than any before, in a new directory.
    pub fn content(&self, dir: &str, name: &str) -> Content {
        let seed = self.n_contents.get();
        self.n_contents.set(seed + 1);
        let dir = self.path(dir);
        fs::create_dir_all(&dir).unwrap();
        let bytes = Xorshift::seeded(seed).bytes(400_000);
        let (index, store) = (dir.join(format!("{name}.caibx")), dir.join("default.castr"));
        let blob = dir.join(format!("{name}.blob"));
        fs::write(&blob, &bytes).unwrap();
        run(Command::new("/run/world/caifs").args(["make", "-s"]).arg(&store).arg(&index).arg(&blob)).ok();
        Content { index, store, name: name.to_owned(), bytes }
    }

    /// What findmnt shows of all mounts of ours: source, target, type and both kinds of options.
    pub fn mounts(&self) -> Vec<[String; 5]> {
        let columns = "SOURCE,TARGET,FSTYPE,VFS-OPTIONS,FS-OPTIONS";
        let mut command = Command::new("findmnt");
        command.args(["-t", "fuse.caifs", "-n", "-r", "-o", columns]);
        // The table is a copy of that outside, where others mount too.
        let all = run(&mut command).text();
        let lines = all.lines().map(|line| {
            let fields: Vec<String> = line.split(' ').map(str::to_owned).collect();
            <[String; 5]>::try_from(fields).unwrap_or_else(|_| panic!("five columns: {line:?}"))
        });
        lines.filter(|fields| fields[1].starts_with("/mnt/")).collect()
    }

    /// The one mount of ours on `mountpoint`, as [`World::mounts`] has it.
    #[track_caller]
    pub fn mounted(&self, mountpoint: &Path) -> [String; 5] {
        let mut found = self.mounts();
        found.retain(|fields| Path::new(&fields[1]) == mountpoint);
        assert_eq!(found.len(), 1, "{}: {found:?}", mountpoint.display());
        found.remove(0)
    }
}

impl Content {
    /// Reads it through a mount.
    #[track_caller]
    pub fn assert_read_from(&self, mountpoint: &Path) {
        let seen = fs::read(mountpoint.join(&self.name)).unwrap();
        assert!(seen == self.bytes, "{}: other bytes than packed", mountpoint.display());
    }
}

/// Runs mount(8).
#[track_caller]
pub fn mount(args: &[&str]) -> Finished {
    run(Command::new("mount").args(args))
}

/// Runs umount(8), which must succeed, and waits until no process serves a mount on this path.
#[track_caller]
pub fn umount(mountpoint: &Path) {
    run(Command::new("umount").arg(mountpoint)).ok();
}

/// The processes of this place that run the program to test.
pub fn daemons() -> Vec<i32> {
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let runs = |pid: &i32| {
        // One that has ended has no program any more.
        let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        fs::metadata(&program).is_ok_and(|_| program.ends_with("caifs"))
    };
    pids.filter(runs).collect()
}

/// Waits until something holds; the time limit of the whole test ends it otherwise.
pub fn until(mut holds: impl FnMut() -> bool) {
    while !holds() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
