//! Metadata tables: what is answered from one is what the archive says, nothing is fetched for it, and a wrong or damaged one is noticed.
//!
//! * [`published`]: tables beside an index. [`damaged`]: tables with other bytes. [`listing`]: what listings give with names.

mod damaged;
mod listing;
mod published;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use caifs::config::{MountConfig, SourceConfig};
use caifs::pack::MakeOptions;
use caifs::pack::sink::Sink;
use caifs::report::Report;
use caifs::store::location::FileLocation;
use caifs::tree::table::Table;
use caifs::tree::table::build::Pace;
use caifs::tree::table::check::check;
use caifs::tree::{TableState, Tree};
use caifs::volume::open::{MemoryPlan, open_blob, open_volume};
use caifs::volume::table::{Made, make};
use caifs::volume::{Attr, FileKind, LiveVolume, Volume};
use tokio::runtime::Runtime;

use crate::mount::can_mount;
use crate::support::blob::noise;
use crate::support::corner::Corner;
use crate::support::generated::{Generated, deep_path};
use crate::support::listing::Entry;
use crate::support::mounted::Mounted;
use crate::support::peers::peer;
use crate::support::proxy::{FaultProxy, ProxyFault};
use crate::support::run::{caifs, run};
use crate::support::scratch::Scratch;
use crate::support::servers::nginx::{Nginx, Site};
use crate::volume::{by_lookup, entry_of, read_all, walk, without_links};

/// How long a table may take to come into use.
const TABLE_LIMIT: Duration = Duration::from_secs(120);

/// All that a volume tells of a file.
#[derive(Debug, Clone, PartialEq)]
struct Seen {
    attr: Attr,
    entry: Entry,
    inode_flags: u32,
}

/// Everything that can be asked of a volume but content.
fn snapshot(runtime: &Runtime, volume: &dyn Volume, max_entries: usize) -> BTreeMap<Vec<u8>, Seen> {
    let listed = walk(runtime, volume, max_entries).unwrap();
    let mut seen = BTreeMap::new();
    for (path, attr) in listed {
        let looked_up = by_lookup(runtime, volume, &path).unwrap_or_else(|| panic!("{}", path.escape_ascii()));
        assert_eq!(without_links(looked_up), without_links(attr.clone()), "{}", path.escape_ascii());
        if attr.kind == FileKind::Directory {
            for no_name in [&b"no such name"[..], b"\0", b"zzz", &[b'x'; 300]] {
                assert!(runtime.block_on(volume.lookup(attr.ino, no_name)).unwrap().is_none());
            }
        } else {
            assert!(runtime.block_on(volume.lookup(attr.ino, b"x")).is_err());
        }
        // Asked for when everything is listed, so that the number of links is known.
        let attr = runtime.block_on(volume.getattr(attr.ino)).unwrap();
        let entry = entry_of(runtime, volume, &attr);
        let inode_flags = runtime.block_on(volume.inode_flags(attr.ino)).unwrap();
        seen.insert(path, Seen { attr, entry, inode_flags });
    }
    assert!(runtime.block_on(volume.getattr(3)).is_err(), "no file lies there");
    seen
}

#[track_caller]
fn assert_same(one: &BTreeMap<Vec<u8>, Seen>, other: &BTreeMap<Vec<u8>, Seen>) {
    assert_eq!(one.len(), other.len());
    for ((path, one), (other_path, other)) in one.iter().zip(other) {
        assert_eq!((path, one), (other_path, other), "{}", path.escape_ascii());
    }
}

fn go_on() -> Pace {
    Box::new(|_| Box::pin(async { true }))
}

fn with_cache(cache: &Path) -> SourceConfig {
    SourceConfig { cache: Some(cache.to_str().unwrap().to_owned()), ..SourceConfig::default() }
}

/// Makes the table of an archive in a cache.
fn make_table(runtime: &Runtime, spec: &Path, cache: &Path) -> Made {
    runtime.block_on(async {
        let (plan, report) = (MemoryPlan::new(64 << 20), Arc::new(Report::default()));
        let location = FileLocation::Local(spec.to_owned());
        let opened = open_blob(&location, &with_cache(cache), &plan, Duration::from_secs(30), &report).await.unwrap();
        make(&opened, &plan, go_on()).await.unwrap()
    })
}

struct Open {
    live: LiveVolume,
    report: Arc<Report>,
}

impl Open {
    fn new(runtime: &Runtime, spec: &Path, sources: SourceConfig, change: impl Fn(&mut MountConfig)) -> Self {
        let mut config = MountConfig { sources, ..MountConfig::default() };
        change(&mut config);
        let report = Arc::new(Report::default());
        let location = FileLocation::Local(spec.to_owned());
        let live = runtime.block_on(open_volume(&location, &config, false, &report)).unwrap();
        Self { live, report }
    }

    fn without_table(runtime: &Runtime, spec: &Path) -> Self {
        Self::new(runtime, spec, SourceConfig::default(), |config| config.keep.metadata_table = Some(false))
    }

    fn volume(&self) -> &dyn Volume {
        &*self.live.volume
    }

    fn tree(&self) -> Arc<Tree> {
        self.live.live.parts()[0].tree.clone().unwrap()
    }

    fn is_in_use(&self) -> bool {
        matches!(self.tree().table_state(), TableState::InUse { .. })
    }

    /// Chunks that were asked for, wherever they were found.
    fn n_gets(&self) -> u64 {
        self.report.n_memory_hits.get() + self.report.n_memory_misses.get() + self.report.n_fetches.get()
    }
}

/// Archives of all kinds of makers: name and whether all of the corner tree is in it.
fn archives(scratch: &Scratch) -> Vec<PathBuf> {
    let corner = scratch.dir("corner");
    Corner::ALL.build(&corner);
    let mut specs = vec![scratch.join("ours.caidx"), scratch.join("ours.catar")];
    let store = scratch.join("default.castr");
    run(caifs().args(["tar", "-i", "-s"]).arg(&store).arg(&specs[0]).arg(&corner)).ok();
    run(caifs().arg("tar").arg(&specs[1]).arg(&corner)).ok();
    if let Some(casync) = peer("casync") {
        let spec = scratch.join("casync.caidx");
        run(casync.command().arg("make").arg("--store").arg(&store).arg(&spec).arg(&corner)).ok();
        specs.push(spec);
    }
    let (Some(desync), Some(tar)) = (peer("desync"), peer("tar")) else { return specs };
    // A FIFO becomes a name without a file there, and a tar stream keeps its order.
    let plain = scratch.dir("plain");
    for name in ["z", "m", "a", "q", "b"] {
        let dir = plain.join(name);
        fs::create_dir(&dir).unwrap();
        for number in (0..40).rev() {
            fs::write(dir.join(format!("{number}-{name}")), noise(number * 100)).unwrap();
        }
        symlink("z/1-z", dir.join("link")).unwrap();
    }
    let stream = scratch.join("unsorted.tar");
    let unsorted = ["./z", "./m", "./a", "./q", "./b"];
    run(tar.command().arg("cf").arg(&stream).arg("--no-recursion").arg("-C").arg(&plain).arg(".")).ok();
    for dir in unsorted {
        run(tar.command().arg("rf").arg(&stream).arg("--sort=none").arg("-C").arg(&plain).arg(dir)).ok();
    }
    let spec = scratch.join("desync-stream.catar");
    run(desync.command().args(["tar", "--input-format=tar"]).arg(&spec).arg(&stream)).ok();
    specs.push(spec);
    nix::unistd::mkfifo(&plain.join("a/3-fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    nix::unistd::mkfifo(&plain.join("zz-fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    let spec = scratch.join("desync.caidx");
    run(desync.command().args(["tar", "-i", "-s"]).arg(&store).arg(&spec).arg(&plain)).ok();
    specs.push(spec);
    specs
}

#[test]
fn everything_is_the_same_with_and_without_a_table_and_nothing_is_fetched() {
    let scratch = Scratch::new();
    let runtime = Runtime::new().unwrap();
    for spec in archives(&scratch) {
        let name = spec.file_name().unwrap().to_string_lossy().into_owned();
        let cache = scratch.join(format!("cache of {name}"));
        let without = Open::without_table(&runtime, &spec);
        let wanted = snapshot(&runtime, without.volume(), 7);
        assert!(!without.is_in_use() && wanted.len() > 50, "{name}");

        let Made::New { n_nodes } = make_table(&runtime, &spec, &cache) else { panic!("{name}: it was not there") };
        assert_eq!(n_nodes, wanted.len() as u64, "{name}");
        assert_eq!(make_table(&runtime, &spec, &cache), Made::Kept { n_nodes });
        let with = Open::new(&runtime, &spec, with_cache(&cache), |_| ());
        assert!(with.is_in_use(), "{name}");
        let n_gets = with.n_gets();
        for max_entries in [1000, 3] {
            assert_same(&snapshot(&runtime, with.volume(), max_entries), &wanted);
        }
        assert_eq!(with.n_gets(), n_gets, "{name}: chunks for metadata");
        let root = runtime.block_on(with.volume().getattr(1)).unwrap();
        assert!(root.nlink > 2, "{name}: links of the root without a listing");
        for (path, seen) in wanted.iter().filter(|(_, seen)| seen.attr.kind == FileKind::Regular) {
            let [one, other] = [&with, &without].map(|open| read_all(&runtime, open.volume(), seen.attr.ino, 100_000));
            assert!(one == other && one.len() as u64 == seen.attr.size, "{name}: {}", path.escape_ascii());
        }
        assert!(with.is_in_use(), "{name}: content lies where the table says");
    }
}

#[test]
fn a_switch_while_a_directory_is_listed_shows_every_name_once() {
    let scratch = Scratch::new();
    let runtime = Runtime::new().unwrap();
    let spec = generated(&scratch, Generated { n_entries: 6_000, n_huge: 3_000, ..Generated::default() });
    let cache = scratch.join("cache");
    let open = Open::new(&runtime, &spec, with_cache(&cache), |config| config.keep.metadata_table = Some(false));
    make_table(&runtime, &spec, &cache);
    let attach = || {
        let table = Table::open(File::open(table_in(&cache)).unwrap(), 1 << 20).unwrap();
        runtime.block_on(open.tree().attach(table, |fault| panic!("{fault}"))).unwrap();
    };
    let huge = runtime.block_on(open.volume().lookup(1, b"huge")).unwrap().unwrap();
    let (mut offset, mut names) = (0, Vec::new());
    for step in 0.. {
        match step % 4 {
            1 => attach(),
            3 => open.tree().detach(),
            _ => {}
        }
        let listing = runtime.block_on(open.volume().readdir(huge.ino, offset, 171)).unwrap();
        let Some(last) = listing.entries.last() else { break };
        offset = last.next_offset;
        names.extend(listing.entries.iter().map(|entry| String::from_utf8(entry.name.to_vec()).unwrap()));
    }
    let wanted: Vec<String> = (0..3_000).map(|number| format!("entry-{number:07}")).collect();
    assert_eq!(names, wanted);
}

/// Writes a generated archive as index and chunks.
fn generated(scratch: &Path, what: Generated) -> PathBuf {
    let store = scratch.join("default.castr");
    let spec = scratch.join("generated.caidx");
    let options = MakeOptions {
        store: Some(Arc::new(caifs::store::local::LocalStore::create(&store))),
        feature_flags: Some(caifs::format::catar::FeatureFlags::CASYNC_DEFAULT.0),
        ..MakeOptions::default()
    };
    let mut sink = Sink::new(&options).unwrap();
    let n_entries = what.write(&mut sink);
    sink.finish_to(&spec).unwrap();
    assert!(n_entries.abs_diff(what.n_entries) < 200, "{n_entries}");
    spec
}

/// The only table in a cache.
pub fn table_in(cache: &Path) -> PathBuf {
    let tables = tables_in(cache);
    assert_eq!(tables.len(), 1, "{tables:?}");
    tables[0].clone()
}

fn tables_in(cache: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(cache.join(".caifs/files")) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|extension| extension == "table")).collect()
}

#[test]
fn twenty_thousand_files_are_found_without_a_request() {
    if !can_mount() {
        return;
    }
    let (Some(nginx), Some(find)) = (peer("nginx"), peer("find")) else { return };
    let scratch = Scratch::new();
    let served = Nginx::start(&nginx.path, &scratch.dir("nginx"), Site::default());
    let what = Generated { n_entries: 20_000, n_huge: 5_000, ..Generated::default() };
    generated(served.root(), what);
    let address = served.url().strip_prefix("http://").unwrap().trim_end_matches('/').parse().unwrap();
    let proxy = FaultProxy::start(address, |_, _| ProxyFault::Latency(Duration::from_millis(1)));
    let (spec, cache, mnt) = (format!("{}/generated.caidx", proxy.url()), scratch.join("cache"), scratch.dir("mnt"));
    // A profile would be looked for as well.
    let mount = || mount_at(&spec, &["-c", cache.to_str().unwrap(), "--profile=no"], &mnt);
    let find_all = || {
        let found = run(find.command().arg(&mnt).args(["-printf", "%P %M %U %G %s %T@ %l %i\\n"])).ok().stdout;
        let mut lines: Vec<Vec<u8>> = found.split(|&byte| byte == b'\n').map(<[u8]>::to_vec).collect();
        lines.sort();
        lines
    };

    let mounted = mount();
    let before = find_all();
    assert!(before.len().abs_diff(20_000) < 200, "{}", before.len());
    wait_for_table(&mnt);
    assert!(mounted.end());
    let mounted = mount();
    assert!(table_text(&mnt).starts_with("in use"), "at once: {}", table_text(&mnt));
    let n_requests = proxy.n_requests();
    assert!(find_all() == before, "find shows the same");
    assert!(!mnt.join("huge/entry-9999999").exists() && mnt.join("huge/entry-0004999").exists());
    assert_eq!(proxy.n_requests(), n_requests, "requests for metadata");
    let bottom = fs::read_to_string(mnt.join(deep_path())).unwrap();
    assert!(bottom.ends_with(" is what bottom says\n"), "{bottom}");
    assert!(mounted.end());
}

pub fn mount_at(spec: &str, args: &[&str], mnt: &Path) -> Mounted {
    let mut command = caifs();
    Mounted::by_command(command.arg("mount").arg(spec).arg(mnt).args(args), mnt).unwrap()
}

fn table_text(mnt: &Path) -> String {
    String::from_utf8(xattr::get(mnt, "user.caifs.table").unwrap().unwrap()).unwrap()
}

/// Waits until a mount uses a table.
#[track_caller]
pub fn wait_for_table(mnt: &Path) {
    let start = Instant::now();
    while !table_text(mnt).starts_with("in use") {
        assert!(start.elapsed() < TABLE_LIMIT, "no table after {TABLE_LIMIT:?}: {}", table_text(mnt));
        // Not looked at all the time: a mount makes its table when it is left alone.
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Waits for something that is done in the background.
#[track_caller]
pub fn wait_until(is_done: impl Fn() -> bool, what: &str) {
    let start = Instant::now();
    while !is_done() {
        assert!(start.elapsed() < TABLE_LIMIT, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_killed_maker_is_followed_by_the_next_and_two_mounts_make_one_table() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let spec = generated(&scratch, Generated { n_entries: 30_000, n_huge: 5_000, ..Generated::default() });
    let spec = spec.to_str().unwrap();
    let (cache, mnt, other) = (scratch.join("cache"), scratch.dir("mnt"), scratch.dir("other"));
    let args = ["-c", cache.to_str().unwrap()];
    let mut mounted = mount_at(spec, &args, &mnt);
    wait_until(
        || {
            let text = table_text(&mnt);
            text.starts_with("being made, ") && !text.starts_with("being made, 0 ") || text.starts_with("in use")
        },
        "it begins",
    );
    mounted.kill_server();
    drop(mounted);
    // Whatever the killed one left, both come to use one table.
    let (one, two) = (mount_at(spec, &args, &mnt), mount_at(spec, &args, &other));
    wait_for_table(&mnt);
    wait_for_table(&other);
    check(&Table::open(File::open(table_in(&cache)).unwrap(), 0).unwrap()).unwrap();
    let left: Vec<PathBuf> = fs::read_dir(cache.join(".caifs/tmp"))
        .unwrap()
        .flat_map(|dir| fs::read_dir(dir.unwrap().path()).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.file_name().is_none_or(|name| name != "lock"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(one.end() && two.end());
}

#[test]
fn ls_and_cat_use_a_table_that_is_at_hand() {
    let scratch = Scratch::new();
    let runtime = Runtime::new().unwrap();
    let spec = generated(&scratch, Generated { n_entries: 5_000, n_huge: 100, ..Generated::default() });
    let cache = scratch.join("cache");
    make_table(&runtime, &spec, &cache);
    let ls = || {
        let mut ls = caifs();
        ls.arg("ls").args(["-R", "--json", "-c"]).arg(&cache).arg(&spec);
        run(&mut ls)
    };
    let listed = ls().ok().stdout;
    assert!(listed.iter().filter(|&&byte| byte == b'\n').count() > 4_500);
    let cat = |path: &str| run(caifs().args(["cat", "-p", path, "-c"]).arg(&cache).arg(&spec));
    let middle = "a000/directory-020/file-50.txt";
    let content = cat(middle).ok().text();
    assert!(content.ends_with(" is what file-50.txt says\n"), "{content}");
    // All chunks go, and then all but those that opening the archive reads.
    fs::remove_dir_all(scratch.join("default.castr")).unwrap();
    fs::create_dir(scratch.join("default.castr")).unwrap();
    let used = |path: &Path| path.metadata().unwrap().len();
    for entry in fs::read_dir(&cache).unwrap() {
        let dir = entry.unwrap().path();
        if dir.file_name().unwrap() != ".caifs" {
            fs::remove_dir_all(dir).unwrap();
        }
    }
    assert!(used(&table_in(&cache)) > 0);
    assert!(ls().fails().stderr.contains("missing"), "the archive's ends are read");
    let spec_again = generated(&scratch, Generated { n_entries: 5_000, n_huge: 100, ..Generated::default() });
    assert_eq!(spec_again, spec);
    keep_only_ends(&scratch, &spec);
    assert!(ls().ok().stdout == listed, "nothing else is read");
    let missing = cat(middle).fails();
    assert!(missing.stderr.contains("missing"), "{}", missing.stderr);
}

/// Removes all chunks of an index from its store but the first and the last.
fn keep_only_ends(dir: &Path, spec: &Path) {
    let listed = run(caifs().arg("list-chunks").arg(spec)).ok().text();
    let ids: Vec<&str> = listed.lines().collect();
    assert!(ids.len() > 4);
    for id in &ids[1..ids.len() - 1] {
        if *id != ids[0] && *id != ids[ids.len() - 1] {
            let _ = fs::remove_file(dir.join("default.castr").join(&id[..4]).join(format!("{id}.cacnk")));
        }
    }
}
