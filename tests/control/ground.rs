//! An image with its index and store, a place to mount it, and sockets of its own.

use std::alloc::Layout;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::support::blob::{Xorshift, noise};
use crate::support::mounted::Mounted;
use crate::support::proxy::{FaultProxy, ProxyFault};
use crate::support::run::{caifs, run};
use crate::support::scratch::Scratch;
use crate::support::servers::nginx::Nginx;

/// What readers read at once.
pub const BLOCK_BYTES: usize = 64 << 10;

/// How long anything may take that is waited for.
const LIMIT: Duration = Duration::from_secs(100);

/// An image and where it is mounted.
pub struct Ground {
    pub scratch: Scratch,
    pub blob: Vec<u8>,
    pub index: PathBuf,
    pub store: PathBuf,
    pub mnt: PathBuf,
}

impl Ground {
    pub fn new(n_bytes: usize) -> Self {
        let scratch = Scratch::new();
        let blob = noise(n_bytes);
        let file = scratch.file("blob", &blob);
        let (index, store, mnt) = (scratch.join("blob.caibx"), scratch.join("st"), scratch.dir("mnt"));
        run(caifs().args(["make", "-s"]).arg(&store).arg(&index).arg(&file)).ok();
        Self { scratch, blob, index, store, mnt }
    }

    pub fn run_dir(&self) -> PathBuf {
        self.scratch.join("run")
    }

    /// The only socket there is.
    pub fn socket(&self) -> PathBuf {
        let mut entries = fs::read_dir(self.run_dir()).unwrap();
        entries.next().unwrap().unwrap().path()
    }

    pub fn caifs(&self, args: &[&str]) -> Command {
        let nowhere = "/nonexistent";
        let mut command = caifs();
        command.args(args).env("CAIFS_RUNTIME_DIR", self.run_dir());
        command.env("HOME", nowhere).env("XDG_CONFIG_HOME", nowhere).env("CAIFS_CONFIG_DIR", nowhere);
        command
    }

    pub fn mount_command(&self, mountpoint: &Path, args: &[&str]) -> Command {
        let mut command = self.caifs(&["mount"]);
        command.arg(&self.index).arg(mountpoint).arg("-s").arg(&self.store).args(args);
        command
    }

    #[track_caller]
    pub fn mount(&self, args: &[&str]) -> Mounted {
        self.try_mount(args).unwrap()
    }

    pub fn try_mount(&self, args: &[&str]) -> Result<Mounted, String> {
        Mounted::by_command(&mut self.mount_command(&self.mnt, args), &self.mnt)
    }

    #[track_caller]
    pub fn mount_from(&self, store: &str, args: &[&str]) -> Mounted {
        let mut command = self.caifs(&["mount"]);
        command.arg(&self.index).arg(&self.mnt).args(["-s", store]).args(args);
        Mounted::by_command(&mut command, &self.mnt).unwrap()
    }

    pub fn image(&self) -> PathBuf {
        self.mnt.join("blob")
    }

    /// The store behind a web server behind a proxy, at `/st`.
    pub fn behind_proxy(&self, nginx: &Nginx) -> FaultProxy {
        run(Command::new("cp").arg("-r").arg(&self.store).arg(nginx.root().join("st"))).ok();
        let port = nginx.url().trim_end_matches('/').rsplit(':').next().unwrap().parse().unwrap();
        FaultProxy::start((Ipv4Addr::LOCALHOST, port).into(), |_, _| ProxyFault::None)
    }

    #[track_caller]
    pub fn status_of(&self, path: &Path) -> serde_json::Value {
        serde_json::from_str(&run(self.caifs(&["status", "--json"]).arg(path)).ok().text()).unwrap()
    }

    #[track_caller]
    pub fn status(&self) -> serde_json::Value {
        self.status_of(&self.mnt)
    }

    #[track_caller]
    pub fn until_status(&self, what: &str, is_so: impl Fn(&serde_json::Value) -> bool) {
        let mut last = serde_json::Value::Null;
        let start = Instant::now();
        while start.elapsed() < LIMIT {
            last = self.status();
            if is_so(&last) {
                return;
            }
        }
        panic!("{what}: not after {LIMIT:?}: {last:#}");
    }

    /// Reads blocks at random places past the page cache until it is over; each must be right. Gives how many there were.
    pub fn read_until(&self, seed: u64, is_over: &AtomicBool) -> u64 {
        let image = direct(&self.image());
        let mut random = Xorshift::seeded(seed + 1);
        let mut buffer = Aligned::new(BLOCK_BYTES);
        let n_blocks = (self.blob.len() / BLOCK_BYTES) as u64;
        let mut n = 0;
        while !is_over.load(Ordering::SeqCst) {
            let offset = random.below(n_blocks) as usize * BLOCK_BYTES;
            image
                .read_exact_at(buffer.bytes(), offset as u64)
                .unwrap_or_else(|error| panic!("read at {offset}: {error}"));
            assert!(*buffer.bytes() == self.blob[offset..offset + BLOCK_BYTES], "wrong bytes at {offset}");
            n += 1;
        }
        n
    }
}

/// Whether nobody waits for anything, and nothing of what comes and goes is in use.
pub fn is_idle(status: &serde_json::Value) -> bool {
    let requests = &status["requests"];
    let is_zero = |value: &serde_json::Value| value == 0;
    let shares = status["budget"].as_array().unwrap();
    let passing = |name: &str| {
        shares
            .iter()
            .filter(|share| share["name"] == name)
            .all(|share| is_zero(&share["used_bytes"]) && is_zero(&share["n_waiting"]))
    };
    is_zero(&requests["n_in_flight"])
        && is_zero(&requests["n_waiting_for_chunks"])
        && is_zero(&requests["n_waiting_for_turn"])
        && is_zero(&status["fetches"]["n_in_flight"])
        && passing("in flight")
        && passing("replies")
        && status["stores"].as_array().unwrap().iter().all(|store| is_zero(&store["n_in_flight"]))
}

#[track_caller]
pub fn until(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < LIMIT, "{what}: not after {LIMIT:?}");
        std::thread::yield_now();
    }
}

/// A file that is read past the page cache, so that each read reaches the mount.
pub fn direct(path: &Path) -> File {
    File::options().read(true).custom_flags(libc::O_DIRECT).open(path).unwrap()
}

/// A buffer as such reads need it.
pub struct Aligned {
    space: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    pub fn new(len: usize) -> Self {
        let align = Layout::new::<u8>().align().max(4096);
        let space = vec![0; len + align];
        let start = space.as_ptr().align_offset(align);
        Self { space, start, len }
    }

    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.space[self.start..][..self.len]
    }
}
