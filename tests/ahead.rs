//! Reading ahead, warming and profiles: through nginx and a slow network, with real mounts where a mount is what matters.

mod directory;
mod profiles;
mod warm;

use std::fs;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use caifs::config::{AheadConfig, MountConfig, SourceConfig};
use caifs::report::Report;
use caifs::store::location::FileLocation;
use caifs::volume::open::open_volume;
use caifs::volume::{LiveVolume, ROOT_INO};
use tokio::runtime::Runtime;

use crate::mount::can_mount;
use crate::support::blob::{Xorshift, noise};
use crate::support::mounted::Mounted;
use crate::support::peers::peer;
use crate::support::proxy::{FaultProxy, ProxyFault};
use crate::support::run::{Finished, caifs, command, run};
use crate::support::scratch::Scratch;
use crate::support::servers::nginx::{Nginx, Site};

/// How long something that goes on in the background may take.
const LIMIT: Duration = Duration::from_secs(60);

/// A directory behind nginx and a proxy before it, a cache, and a place to mount.
pub struct Ground {
    pub scratch: Scratch,
    pub nginx: Nginx,
    pub proxy: FaultProxy,
    pub mnt: PathBuf,
    pub cache: PathBuf,
}

impl Ground {
    pub fn new() -> Option<Self> {
        let program = peer("nginx")?;
        let scratch = Scratch::new();
        let nginx =
            Nginx::start(&program.path, &scratch.dir("nginx"), Site { server: "", tls: None, verify_client: false });
        let url = nginx.url();
        let address = url.trim_start_matches("http://").trim_end_matches('/').parse().expect("nginx has an address");
        let proxy = FaultProxy::start(address, |_, _| ProxyFault::None);
        let (mnt, cache) = (scratch.dir("mnt"), scratch.join("cache"));
        Some(Self { scratch, nginx, proxy, mnt, cache })
    }

    /// Adds so much to each request.
    pub fn delay(&self, span: Duration) {
        self.proxy.set_script(move |_, _| ProxyFault::Latency(span));
    }

    /// Makes an index of some content, and its chunks, for the web server. Gives the chunks' ids.
    pub fn make(&self, name: &str, content: &[u8]) -> Vec<String> {
        let blob = self.scratch.file("blob", content);
        let (index, store) = (self.nginx.root().join(name), self.nginx.root().join("default.castr"));
        run(caifs().args(["make", "-s"]).arg(&store).arg(&index).arg(&blob)).ok();
        self.chunks_of(&index)
    }

    /// The ids of an index's chunks.
    pub fn chunks_of(&self, index: &Path) -> Vec<String> {
        run(caifs().arg("list-chunks").arg(index)).ok().text().lines().map(str::to_owned).collect()
    }

    /// Packs a directory for the web server, as `t.caidx` and `t.catar`.
    pub fn pack(&self, tree: &Path) {
        let root = self.nginx.root();
        run(caifs().args(["tar", "-i", "-s"]).arg(root.join("default.castr")).arg(root.join("t.caidx")).arg(tree)).ok();
        run(caifs().arg("tar").arg(root.join("t.catar")).arg(tree)).ok();
    }

    /// The URL of a file behind the proxy.
    pub fn url(&self, name: &str) -> String {
        format!("{}/{name}", self.proxy.url())
    }

    /// caifs without the settings that a user of this machine may have.
    pub fn command(&self) -> Command {
        let mut command = caifs();
        let nowhere = "/nonexistent";
        command.env("HOME", nowhere).env("XDG_CONFIG_HOME", nowhere).env("CAIFS_CONFIG_DIR", nowhere);
        command
    }

    /// `caifs warm NAME -c CACHE …`.
    pub fn warm(&self, name: &str, args: &[&str]) -> Finished {
        run(self.command().arg("warm").arg(self.url(name)).arg("-c").arg(&self.cache).args(args))
    }

    #[track_caller]
    pub fn mount(&self, name: &str, args: &[&str]) -> Mounted {
        let mut command = self.command();
        command.arg("mount").arg(self.url(name)).arg(&self.mnt).args(args);
        Mounted::by_command(&mut command, &self.mnt).unwrap()
    }

    /// `caifs mount -o OPTIONS`, with what is said before the mount goes into the background in the log as well.
    pub fn logged_mount(&self, log: &Path, options: &str) -> Command {
        let script = format!("exec \"$0\" \"$@\" 2>>{}", log.display());
        let mut mount = command("sh", ["-c", &script, env!("CARGO_BIN_EXE_caifs"), "mount", "-o", options]);
        let nowhere = "/nonexistent";
        mount.env("HOME", nowhere).env("XDG_CONFIG_HOME", nowhere).env("CAIFS_CONFIG_DIR", nowhere);
        mount
    }

    #[track_caller]
    pub fn mount_cached(&self, name: &str, args: &[&str]) -> Mounted {
        let cache = self.cache.display().to_string();
        self.mount(name, &[&["-c", &cache], args].concat())
    }

    /// How many of some chunks the cache has.
    pub fn n_cached(&self, ids: &[String]) -> usize {
        ids.iter().filter(|id| self.cache.join(&id[..4]).join(format!("{id}.cacnk")).exists()).count()
    }

    /// Opens what a mount would serve.
    fn open(&self, runtime: &Runtime, name: &str, window_bytes: Option<u64>) -> (LiveVolume, Arc<Report>) {
        let report = Arc::new(Report::default());
        let config = MountConfig {
            ahead: AheadConfig { window_bytes, ..AheadConfig::default() },
            sources: SourceConfig::default(),
            ..MountConfig::default()
        };
        let location = FileLocation::parse(self.url(name).as_ref()).unwrap();
        (runtime.block_on(open_volume(&location, &config, false, &report)).unwrap(), report)
    }
}

/// Waits for something that goes on in the background.
#[track_caller]
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < LIMIT, "{what}: not after {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Reads a file from its start to its end, some bytes at a time.
fn read_all(runtime: &Runtime, opened: &LiveVolume, name: &str, step: u32) -> Vec<u8> {
    let volume = &opened.volume;
    runtime.block_on(async {
        let attr = volume.lookup(ROOT_INO, name.as_bytes()).await.unwrap().unwrap();
        let mut content = Vec::new();
        while (content.len() as u64) < attr.size {
            content.extend_from_slice(&volume.read(attr.ino, content.len() as u64, step).await.unwrap());
        }
        content
    })
}

#[test]
fn a_reader_is_read_ahead_of_and_all_is_given_back_when_it_rests() {
    let Some(ground) = Ground::new() else { return };
    let content = noise(8 << 20);
    let n_chunks = ground.make("disk.caibx", &content).len() as u64;
    fs::create_dir(ground.scratch.join("tree")).unwrap();
    fs::write(ground.scratch.join("tree/disk"), &content).unwrap();
    ground.pack(&ground.scratch.join("tree"));
    let runtime = Runtime::new().unwrap();
    for (name, n_pieces) in [("disk.caibx", n_chunks), ("t.catar", 128)] {
        ground.delay(Duration::from_millis(5));
        let (opened, report) = ground.open(&runtime, name, None);
        assert!(read_all(&runtime, &opened, "disk", 64 << 10) == content, "{name}");
        let (n_ahead, used) = (report.n_ahead.get(), report.ahead_used_bytes.get());
        assert!(n_ahead > n_pieces * 9 / 10, "{name}: {n_ahead} of {n_pieces}");
        assert!(n_ahead <= n_pieces + 4, "{name}: nothing twice and nothing behind the end, {n_ahead} of {n_pieces}");
        assert!(used > (content.len() as u64) * 9 / 10, "{name}: {used}");
        until("readers are forgotten", || report.ahead_windows.get() == 0);
        assert_eq!((report.ahead_now_bytes.get(), report.background_chunks.get()), (0, 0));

        // Not when it is switched off, before or while it is served.
        let (opened, report) = ground.open(&runtime, name, Some(0));
        assert!(read_all(&runtime, &opened, "disk", 1 << 20) == content, "{name}");
        assert_eq!((report.n_ahead.get(), report.ahead_windows.get()), (0, 0), "{name}");
        let (opened, report) = ground.open(&runtime, name, None);
        let mut config = opened.live.config();
        config.ahead.window_bytes = Some(0);
        {
            let _guard = runtime.enter();
            opened.live.prepare(config).unwrap().commit(&opened.live);
        }
        assert!(read_all(&runtime, &opened, "disk", 1 << 20) == content, "{name}");
        assert_eq!((report.n_ahead.get(), report.ahead_windows.get()), (0, 0), "{name}");
    }
}

#[test]
fn what_is_read_past_the_page_cache_is_right() {
    if !can_mount() {
        return;
    }
    let Some(ground) = Ground::new() else { return };
    let content = noise(12_345_678);
    ground.make("disk.caibx", &content);
    ground.delay(Duration::from_millis(3));
    let mounted = ground.mount("disk.caibx", &["--memory=16M"]);
    let file = fs::File::options().read(true).custom_flags(libc::O_DIRECT).open(ground.mnt.join("disk")).unwrap();
    let (mut read, mut piece) = (Vec::new(), vec![0; 128 << 10]);
    while let n @ 1.. = file.read_at(&mut piece, read.len() as u64).unwrap() {
        read.extend_from_slice(&piece[..n]);
    }
    assert!(read == content);
    drop(file);
    assert!(mounted.end());
}

#[test]
fn reading_a_file_of_a_tree_fetches_hardly_anything_of_the_next() {
    let Some(ground) = Ground::new() else { return };
    let tree = ground.scratch.dir("tree");
    // Large enough that a window would reach far behind their ends.
    for (seed, name) in ["a", "b", "c"].into_iter().enumerate() {
        fs::write(tree.join(name), Xorshift::seeded(seed as u64 + 5).bytes(4 << 20)).unwrap();
    }
    ground.pack(&tree);
    let runtime = Runtime::new().unwrap();
    for (name, piece_bytes) in [("t.caidx", 256 << 10), ("t.catar", 64 << 10)] {
        let (opened, report) = ground.open(&runtime, name, None);
        runtime.block_on(opened.volume.lookup(ROOT_INO, b"a")).unwrap();
        runtime.block_on(opened.volume.lookup(ROOT_INO, b"b")).unwrap();
        let before = report.fetched_bytes.get();
        assert_eq!(read_all(&runtime, &opened, "a", 64 << 10).len(), 4 << 20);
        until("all that was begun is there", || report.background_chunks.get() == 0);
        assert!(report.n_ahead.get() > 10, "{name}");
        let fetched = report.fetched_bytes.get() - before;
        assert!(fetched <= (4 << 20) + 2 * piece_bytes + 4096, "{name}: {fetched}");
    }
}

#[test]
fn many_readers_at_once_read_what_is_there() {
    let Some(ground) = Ground::new() else { return };
    let tree = ground.scratch.dir("tree");
    for i in 0..24 {
        fs::write(tree.join(format!("{i}")), Xorshift::seeded(i + 5).bytes(400_000 + 1000 * i as usize)).unwrap();
    }
    ground.pack(&tree);
    ground.delay(Duration::from_millis(2));
    let runtime = Runtime::new().unwrap();
    for name in ["t.caidx", "t.catar"] {
        let (opened, report) = ground.open(&runtime, name, None);
        std::thread::scope(|scope| {
            for i in 0..24 {
                let (opened, runtime, tree) = (&opened, &runtime, &tree);
                scope.spawn(move || {
                    let wanted = fs::read(tree.join(format!("{i}"))).unwrap();
                    assert!(read_all(runtime, opened, &format!("{i}"), 16 << 10) == wanted, "{i}");
                });
            }
        });
        assert!(report.n_ahead.get() > 50, "{name}: {report:?}");
        drop(opened);
        until("gauges go back", || report.ahead_now_bytes.get() + report.background_chunks.get() == 0);
    }
}
