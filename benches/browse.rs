//! Browsing a remote archive of millions of files: times of a mount, a listing and a file with nothing in the cache; what `find` costs with and
//! without the metadata table; and the memory that all of it takes. Then the same of a directory of many indexes.
//!
//! `cargo bench --bench browse -- [--entries N] [--huge N] [--content BYTES] [--latency-ms N] [--memory SIZE] [--without-find] [--indexes N]`
//!
//! The archive is made by `tests/support/generated.rs`, served by nginx behind a proxy that answers late, and mounted by the
//! `caifs` of this build. What is said of memory is `VmHWM` of the daemon.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use caifs::format::catar::FeatureFlags;
use caifs::pack::MakeOptions;
use caifs::pack::sink::Sink;
use caifs::store::local::LocalStore;

use support::generated::{Generated, deep_path};
use support::mounted::Mounted;
use support::peers::peer;
use support::proxy::{FaultProxy, ProxyFault};
use support::run::{caifs, run_within};
use support::scratch::Scratch;
use support::servers::nginx::{Nginx, Site};

/// Longer than anything here should take.
const LIMIT: Duration = Duration::from_secs(7200);

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let value = |name: &str| args.iter().position(|arg| arg == name).and_then(|at| args.get(at + 1)).cloned();
    let number = |name: &str, default: u64| value(name).map_or(default, |value| value.parse().expect("a number"));
    let n_entries = number("--entries", 100_000);
    let (n_huge, content_bytes) = (number("--huge", n_entries / 5), number("--content", 1000) as usize);
    let what = Generated { n_entries, n_huge, content_bytes };
    let latency = Duration::from_millis(number("--latency-ms", 20));
    let memory = value("--memory").unwrap_or_else(|| "256M".to_owned());
    many_indexes(number("--indexes", 1000));

    let (Some(nginx), scratch) = (peer("nginx"), Scratch::new()) else { return };
    let served = Nginx::start(&nginx.path, &scratch.dir("nginx"), Site::default());
    generate(what, served.root());
    let address = served.url().strip_prefix("http://").unwrap().trim_end_matches('/').parse().unwrap();
    let proxy = FaultProxy::start(address, move |_, _| ProxyFault::Latency(latency));
    let bench = Bench { spec: format!("{}/t.caidx", proxy.url()), memory, mnt: scratch.dir("mnt"), proxy: &proxy };

    println!("\n== without a table, cache empty, {latency:?} a request, budget {}", bench.memory);
    let mounted = bench.mount(&scratch.join("cache-a"), "no");
    bench.first_look();
    bench.say("memory", &mounted);
    bench.timed("ls in the huge directory (names)", || ls(&bench.mnt.join("huge")));
    bench.timed("one name in the huge directory", || {
        bench.mnt.join(format!("huge/entry-{:07}", what.n_huge - 1)).metadata().unwrap().len() as usize
    });
    bench.say("memory", &mounted);
    let mut without = Duration::ZERO;
    if !args.iter().any(|arg| arg == "--without-find") {
        without = bench.timed("find", || find(&bench.mnt));
        bench.say("memory", &mounted);
    }
    assert!(mounted.end());

    println!("\n== cache empty, the table is made meanwhile");
    let cache = scratch.join("cache-b");
    let mounted = bench.mount(&cache, "yes");
    bench.first_look();
    let start = Instant::now();
    let mut shown = String::new();
    while !shown.starts_with("in use") {
        std::thread::sleep(Duration::from_millis(100));
        shown = String::from_utf8(xattr::get(&bench.mnt, "user.caifs.table").unwrap().unwrap()).unwrap();
        assert!(start.elapsed() < LIMIT && shown != "none", "{shown}");
    }
    println!("{:44} {:>10.3} s   {shown}", "the table is made after", start.elapsed().as_secs_f64());
    bench.say("memory", &mounted);
    bench.timed("find, just switched to the table", || find(&bench.mnt));
    bench.say("memory", &mounted);
    assert!(mounted.end());
    let table = std::fs::read_dir(cache.join(".caifs/files")).unwrap().map(|entry| entry.unwrap());
    for entry in table.filter(|entry| entry.path().extension().is_some_and(|extension| extension == "table")) {
        println!("{:44} {:>10} bytes", "the table has", entry.metadata().unwrap().len());
    }

    println!("\n== mounted again, with the table");
    let mounted = bench.mount(&cache, "yes");
    bench.first_look();
    let with = bench.timed("find", || find(&bench.mnt));
    bench.say("memory", &mounted);
    bench.timed("ls in the huge directory (names)", || ls(&bench.mnt.join("huge")));
    bench.timed("find -size (attributes), then", || find_size(&bench.mnt));
    bench.say("memory", &mounted);
    assert!(mounted.end());

    println!("\n== mounted again, for attributes");
    let mounted = bench.mount(&cache, "yes");
    bench.timed("find -size (attributes)", || find_size(&bench.mnt));
    bench.timed("find -size (attributes), once more", || find_size(&bench.mnt));
    bench.say("memory", &mounted);
    assert!(mounted.end());
    if without > Duration::ZERO {
        println!("\nfind is {:.1} times as fast with the table", without.as_secs_f64() / with.as_secs_f64());
    }
}

/// A directory of indexes in `n_indexes` files, half of them images and half of them trees.
fn many_indexes(n_indexes: u64) {
    let scratch = Scratch::new();
    let (indexes, store, mnt) = (scratch.dir("indexes"), scratch.dir("default.castr"), scratch.dir("mnt"));
    let (image, tree) = (scratch.join("image"), scratch.dir("tree"));
    std::fs::write(&image, vec![7; 400_000]).unwrap();
    std::fs::write(tree.join("file"), "content").unwrap();
    let make = |verb: &[&str], name: &str, source: &Path| {
        let mut make = caifs();
        make.args(verb).arg("-s").arg(&store).arg(indexes.join(name)).arg(source);
        run_within(&mut make, LIMIT).ok();
    };
    make(&["make"], "image-0.caibx", &image);
    make(&["tar", "-i"], "tree-0.caidx", &tree);
    for n in 1..n_indexes / 2 {
        std::fs::copy(indexes.join("image-0.caibx"), indexes.join(format!("image-{n}.caibx"))).unwrap();
        std::fs::copy(indexes.join("tree-0.caidx"), indexes.join(format!("tree-{n}.caidx"))).unwrap();
    }

    println!("== a directory of {n_indexes} indexes");
    let mut command = caifs();
    command.arg("mount").arg(&indexes).arg(&mnt).arg("-s").arg(&store);
    let mounted = Mounted::by_command(&mut command, &mnt).expect("it mounts");
    let n_open = || String::from_utf8(xattr::get(&mnt, "user.caifs.parts").unwrap().unwrap()).unwrap();
    let say = |what: &str, start: Instant| {
        println!("{what:44} {:>10.3} s   {} open", start.elapsed().as_secs_f64(), n_open());
    };
    println!("{:44} {:>10.3} s", "mount", mounted.time_to_mount.as_secs_f64());
    let start = Instant::now();
    assert!(ls(&mnt) as u64 >= n_indexes / 2 * 2);
    say("ls", start);
    std::fs::copy(indexes.join("image-0.caibx"), indexes.join("new.caibx")).unwrap();
    let start = Instant::now();
    while !mnt.join("new").exists() {
        assert!(start.elapsed() < LIMIT);
        std::thread::sleep(Duration::from_millis(1));
    }
    say("a new one is seen after", start);
    let start = Instant::now();
    assert_eq!(std::fs::read(mnt.join("image-1")).unwrap().len(), 400_000);
    say("one is read", start);
    assert!(mounted.end());
}

struct Bench<'a> {
    spec: String,
    memory: String,
    mnt: PathBuf,
    proxy: &'a FaultProxy,
}

impl Bench<'_> {
    fn mount(&self, cache: &Path, table: &str) -> Mounted {
        let mut command = caifs();
        command.arg("mount").arg(&self.spec).arg(&self.mnt).arg("-c").arg(cache);
        command.args(["-o", &format!("memory={},metadata-table={table}", self.memory)]);
        let n_before = self.proxy.n_requests();
        let mounted = Mounted::by_command(&mut command, &self.mnt).expect("it mounts");
        let n_requests = self.proxy.n_requests() - n_before;
        println!("{:44} {:>10.3} s   {n_requests} requests", "mount", mounted.time_to_mount.as_secs_f64());
        mounted
    }

    fn first_look(&self) {
        self.timed("ls of the root", || ls(&self.mnt));
        self.timed(&format!("cat of a file {} levels deep", support::generated::DEPTH + 1), || {
            std::fs::read(self.mnt.join(deep_path())).unwrap().len()
        });
        self.timed("cat of a file in the middle", || {
            std::fs::read(self.mnt.join("a001/directory-077/file-50.txt")).unwrap().len()
        });
    }

    fn timed(&self, what: &str, work: impl FnOnce() -> usize) -> Duration {
        let n_before = self.proxy.n_requests();
        let start = Instant::now();
        let n = work();
        let took = start.elapsed();
        let n_requests = self.proxy.n_requests() - n_before;
        println!("{what:44} {:>10.3} s   {n_requests} requests   ({n})", took.as_secs_f64());
        took
    }

    fn say(&self, what: &str, mounted: &Mounted) {
        let mib = mounted.peak_rss_bytes().unwrap_or_default() as f64 / f64::from(1 << 20);
        println!("{what:44} {mib:>10.1} MiB at most");
    }
}

fn ls(dir: &Path) -> usize {
    let mut ls = Command::new("ls");
    run_within(ls.arg("-f").arg(dir), LIMIT).ok().stdout.iter().filter(|&&byte| byte == b'\n').count()
}

fn find(dir: &Path) -> usize {
    let mut find = Command::new("find");
    // The names alone are some hundred megabytes.
    let found = run_within(find.arg(dir).args(["-printf", "."]), LIMIT).ok();
    found.stdout.len()
}

/// As du(1) and rsync(1) go through a tree.
fn find_size(dir: &Path) -> usize {
    let mut find = Command::new("find");
    run_within(find.arg(dir).args(["-size", "+100"]), LIMIT).ok().stdout.len()
}

fn generate(what: Generated, root: &Path) {
    let start = Instant::now();
    let options = MakeOptions {
        store: Some(Arc::new(LocalStore::create(root.join("default.castr")))),
        level: 1,
        feature_flags: Some(FeatureFlags::CASYNC_DEFAULT.0),
        ..MakeOptions::default()
    };
    let mut sink = Sink::new(&options).unwrap();
    let n_entries = what.write(&mut sink);
    let stats = sink.finish_to(&root.join("t.caidx")).unwrap();
    println!(
        "{n_entries} entries, {} of them in one directory; an archive of {} bytes in {} chunks of {} stored bytes; made in {:.1} s",
        what.n_huge,
        stats.blob_bytes,
        stats.n_chunks_accepted,
        stats.stored_bytes,
        start.elapsed().as_secs_f64()
    );
}
