//! Metadata tables: what is answered from one is what the archive says, nothing is fetched for it, and a wrong or damaged one is noticed.

mod listing;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use caifs::config::{MountConfig, SourceConfig};
use caifs::digest::Digest;
use caifs::format::table::{BLOCK_BYTES, TAIL_BYTES};
use caifs::pack::MakeOptions;
use caifs::pack::sink::Sink;
use caifs::pack::tar::{TarOptions, tar_with_table};
use caifs::report::Report;
use caifs::store::location::FileLocation;
use caifs::tree::table::build::Pace;
use caifs::tree::table::check::check;
use caifs::tree::table::pack::TablePacker;
use caifs::tree::table::writer::Writer;
use caifs::tree::table::{Table, TreeShape};
use caifs::tree::{TableState, Tree};
use caifs::volume::open::{MemoryPlan, open_blob, open_tree, open_volume};
use caifs::volume::table::{Made, make};
use caifs::volume::tree::TreeVolume;
use caifs::volume::{Attr, FileKind, LiveVolume, Show, Volume};
use proptest::prelude::*;
use tokio::runtime::Runtime;

use crate::mount::{can_mount, contents};
use crate::support::blob::noise;
use crate::support::corner::Corner;
use crate::support::generated::{Generated, deep_path};
use crate::support::listing::{Entry, tree_listing};
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
fn table_in(cache: &Path) -> PathBuf {
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

fn mount_at(spec: &str, args: &[&str], mnt: &Path) -> Mounted {
    let mut command = caifs();
    Mounted::by_command(command.arg("mount").arg(spec).arg(mnt).args(args), mnt).unwrap()
}

fn table_text(mnt: &Path) -> String {
    String::from_utf8(xattr::get(mnt, "user.caifs.table").unwrap().unwrap()).unwrap()
}

/// Waits until a mount uses a table.
#[track_caller]
fn wait_for_table(mnt: &Path) {
    let start = Instant::now();
    while !table_text(mnt).starts_with("in use") {
        assert!(start.elapsed() < TABLE_LIMIT, "no table after {TABLE_LIMIT:?}: {}", table_text(mnt));
        // Not looked at all the time: a mount makes its table when it is left alone.
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn a_published_table_is_the_one_a_walk_makes_and_is_used_where_it_lies() {
    let scratch = Scratch::new();
    let runtime = Runtime::new().unwrap();
    let source = scratch.dir("source");
    Corner::ALL.build(&source);
    let store = scratch.join("default.castr");
    let (index, archive) = (scratch.join("t.caidx"), scratch.join("t.catar"));
    run(caifs().args(["tar", "--metadata-table", "-i", "-s"]).arg(&store).arg(&index).arg(&source)).ok();
    run(caifs().args(["tar", "--metadata-table"]).arg(&archive).arg(&source)).ok();
    for spec in [&index, &archive] {
        let published = scratch.join(format!("{}.table", spec.file_name().unwrap().to_str().unwrap()));
        let table = Table::open(File::open(&published).unwrap(), 0).unwrap();
        check(&table).unwrap();
        let wanted = snapshot(&runtime, Open::without_table(&runtime, spec).volume(), 100);
        let open = Open::new(&runtime, spec, SourceConfig::default(), |_| ());
        assert!(open.is_in_use(), "{}", published.display());
        let n_gets = open.n_gets();
        assert_same(&snapshot(&runtime, open.volume(), 100), &wanted);
        assert_eq!(open.n_gets(), n_gets);

        // One of a version before, or to come, is as none.
        let bytes = fs::read(&published).unwrap();
        let mut other = bytes.clone();
        let tail_at = other.len() - TAIL_BYTES;
        [7, tail_at + 7].iter().for_each(|&at| other[at] = b'2');
        assert_ne!(other, bytes);
        fs::write(&published, other).unwrap();
        assert!(!Open::new(&runtime, spec, SourceConfig::default(), |_| ()).is_in_use());
        fs::write(&published, bytes).unwrap();

        if spec == &index {
            let digest = Digest::Sha256.id(&fs::read(spec).unwrap()).0;
            let proven = Open::new(&runtime, spec, SourceConfig::default(), |config| {
                config.sources.trust.index_sha256 = Some(digest);
            });
            assert!(!proven.is_in_use(), "what is not signed is not used where the index must be proven");
        }
        // Another version of the archive: the table beside it is of the old one.
        fs::write(source.join("new"), "another version").unwrap();
        let mut again = caifs();
        match spec == &index {
            true => again.args(["tar", "-i", "-s"]).arg(&store).arg(&index),
            false => again.arg("tar").arg(&archive),
        };
        run(again.arg(&source)).ok();
        let open = Open::new(&runtime, spec, SourceConfig::default(), |_| ());
        assert!(!open.is_in_use() && published.exists());
        assert!(by_lookup(&runtime, open.volume(), b"new").is_some());
        fs::remove_file(source.join("new")).unwrap();
    }
    let refused = run(caifs().args(["tar", "--metadata-table", "-"]).arg(&source)).fails();
    assert!(refused.error_line().contains("needs a name"), "{}", refused.stderr);
}

#[test]
fn a_table_says_how_files_lie_in_directories_whoever_made_it() {
    let scratch = Scratch::new();
    let source = scratch.dir("source");
    for (name, n_files) in [("large", 250), ("larger", 300), ("fitting", 200), ("empty", 0)] {
        fs::create_dir(source.join(name)).unwrap();
        // In another order than the archive's.
        (0..n_files).for_each(|number| drop(File::create(source.join(name).join(format!("{}", n_files - number)))));
    }
    let (store, index) = (scratch.join("default.castr"), scratch.join("t.caidx"));
    run(caifs().args(["tar", "--metadata-table", "-i", "-s"]).arg(&store).arg(&index).arg(&source)).ok();
    let published = scratch.join("t.caidx.table");
    let shape = TreeShape { n_nodes: 1 + 4 + 750, n_directories: 5, n_late: 150 };
    assert_eq!(Table::open(File::open(&published).unwrap(), 0).unwrap().shape(), shape);
    fs::remove_file(published).unwrap();
    let cache = scratch.join("cache");
    make_table(&Runtime::new().unwrap(), &index, &cache);
    assert_eq!(Table::open(File::open(table_in(&cache)).unwrap(), 0).unwrap().shape(), shape);
}

#[test]
fn a_published_table_is_fetched_checked_and_kept() {
    if !can_mount() {
        return;
    }
    let Some(nginx) = peer("nginx") else { return };
    let scratch = Scratch::new();
    let source = scratch.dir("source");
    Corner::ALL.build(&source);
    let served = Nginx::start(&nginx.path, &scratch.dir("nginx"), Site::default());
    let at = |name: &str| served.root().join(name);
    run(caifs().args(["tar", "--metadata-table", "-i", "-s"]).arg(at("default.castr")).arg(at("t.caidx")).arg(&source))
        .ok();
    run(caifs().args(["tar", "--metadata-table"]).arg(at("t.catar")).arg(&source)).ok();
    for name in ["t.caidx", "t.catar"] {
        let (spec, cache) = (format!("{}{name}", slash(&served.url())), scratch.join(format!("cache of {name}")));
        let mnt = scratch.dir(&format!("mnt of {name}"));
        let mounted = mount_at(&spec, &["-c", cache.to_str().unwrap()], &mnt);
        wait_for_table(&mnt);
        let n_fetches = xattr::get(&mnt, "user.caifs.fetches").unwrap();
        tree_listing(&mnt).assert_same(&tree_listing(&source));
        assert_eq!(xattr::get(&mnt, "user.caifs.fetches").unwrap(), n_fetches, "{name}");
        assert!(contents(&mnt) == contents(&source), "{name}");
        assert!(mounted.end());
        let kept = fs::read(table_in(&cache)).unwrap();
        assert!(kept == fs::read(at(&format!("{name}.table"))).unwrap(), "{name}: fetched, not made");

        // A damaged one is not kept, and one is made.
        let published = at(&format!("{name}.table"));
        let mut damaged = kept.clone();
        damaged[20] ^= 1;
        fs::write(&published, damaged).unwrap();
        let cache = scratch.join(format!("other cache of {name}"));
        let mounted = mount_at(&spec, &["-c", cache.to_str().unwrap()], &mnt);
        wait_for_table(&mnt);
        tree_listing(&mnt).assert_same(&tree_listing(&source));
        assert!(mounted.end());
        let made = Table::open(File::open(table_in(&cache)).unwrap(), 0).unwrap();
        check(&made).unwrap();
    }
}

fn slash(url: &str) -> String {
    format!("{}/", url.trim_end_matches('/'))
}

#[test]
fn a_table_that_lies_is_found_out_before_wrong_bytes_are_read() {
    let scratch = Scratch::new();
    let runtime = Runtime::new().unwrap();
    let (one, other) = (scratch.dir("one"), scratch.dir("other"));
    // Archives of the same length whose files lie elsewhere.
    for (dir, sizes) in [(&one, [10, 5_000]), (&other, [5_000, 10])] {
        for (name, size) in ["a", "b"].iter().zip(sizes) {
            fs::write(dir.join(name), noise(size)).unwrap();
        }
    }
    let (right, wrong) = (scratch.join("right.catar"), scratch.join("wrong.catar"));
    for (spec, source) in [(&right, &one), (&wrong, &other)] {
        run(caifs().args(["tar", "--no-time", "--metadata-table"]).arg(spec).arg(source)).ok();
    }
    assert_eq!(right.metadata().unwrap().len(), wrong.metadata().unwrap().len());
    // The table of the one with the binding of the other, which anybody can write.
    let beside = scratch.join("right.catar.table");
    let binding = *Table::open(File::open(&beside).unwrap(), 0).unwrap().binding();
    let mut lie = Vec::new();
    packed(&other, TarOptions { no_time: true, ..TarOptions::default() }).finish(binding, &mut lie).unwrap();
    fs::write(&beside, &lie).unwrap();
    let open = Open::new(&runtime, &right, SourceConfig::default(), |_| ());
    assert!(open.is_in_use(), "it looks right");
    let a = runtime.block_on(open.volume().lookup(1, b"a")).unwrap().unwrap();
    assert_eq!(a.size, 5_000, "so it is believed");
    let content = read_all(&runtime, open.volume(), a.ino, 100_000);
    assert!(content == fs::read(one.join("a")).unwrap(), "until content is read");
    assert!(!open.is_in_use());
    assert_eq!(runtime.block_on(open.volume().lookup(1, b"a")).unwrap().unwrap().size, 10);
    fs::write(&beside, &lie).unwrap();
    let cat = run(caifs().args(["cat", "-p", "a"]).arg(&right)).ok();
    assert!(cat.stdout == fs::read(one.join("a")).unwrap());
}

/// A table of a directory's archive, before it is bound to anything.
fn packed(source: &Path, options: TarOptions) -> TablePacker {
    let mut packer = TablePacker::new(Writer::new(tempfile::tempfile().unwrap(), Box::new(|_| Ok(()))));
    tar_with_table(source, &options, &mut std::io::sink(), Some(&mut packer)).unwrap();
    packer
}

#[test]
fn a_damaged_table_in_the_cache_is_taken_away_and_the_archive_answers() {
    let scratch = Scratch::new();
    let runtime = Runtime::new().unwrap();
    let spec = generated(&scratch, Generated { n_entries: 4_000, n_huge: 1_500, ..Generated::default() });
    let cache = scratch.join("cache");
    let wanted = walk(&runtime, Open::without_table(&runtime, &spec).volume(), 1000).unwrap();
    make_table(&runtime, &spec, &cache);
    let right = fs::read(table_in(&cache)).unwrap();
    let n_blocks = Table::open(File::open(table_in(&cache)).unwrap(), 0).unwrap().n_blocks();
    assert!(n_blocks > 8, "{n_blocks} blocks of {BLOCK_BYTES}");
    // In the middle of some blocks; in the references; in the tail; at the start; cut; empty.
    let refs_at = right.len() - TAIL_BYTES - 16 * n_blocks as usize;
    type Damage = Box<dyn Fn(&mut Vec<u8>)>;
    let mut damages: Vec<(String, Damage)> = Vec::new();
    for at in
        [0, 9, refs_at / 3, refs_at / 2, refs_at - 1, refs_at + 3, refs_at + 17, right.len() - 100, right.len() - 1]
    {
        damages.push((format!("byte {at}"), Box::new(move |bytes| bytes[at] ^= 0x40)));
    }
    for len in [0, 1, TAIL_BYTES, refs_at, right.len() - 1] {
        damages.push((format!("cut to {len}"), Box::new(move |bytes| bytes.truncate(len))));
    }
    damages.push(("zeros".to_owned(), Box::new(move |bytes| bytes[100..refs_at].fill(0))));
    for (what, damage) in damages {
        let path = match tables_in(&cache).pop() {
            Some(path) => path,
            None => {
                make_table(&runtime, &spec, &cache);
                table_in(&cache)
            }
        };
        let mut wrong = right.clone();
        damage(&mut wrong);
        fs::write(&path, &wrong).unwrap();
        // No other is made meanwhile: the mount is too short for that.
        let open = Open::new(&runtime, &spec, with_cache(&cache), |_| ());
        let seen = walk(&runtime, open.volume(), 1000).unwrap();
        let stripped = |all: &BTreeMap<Vec<u8>, Attr>| -> BTreeMap<Vec<u8>, Attr> {
            all.iter().map(|(path, attr)| (path.clone(), without_links(attr.clone()))).collect()
        };
        assert!(stripped(&seen) == stripped(&wanted), "{what}");
        drop(open);
        wait_until(|| tables_in(&cache).iter().all(|path| fs::read(path).is_ok_and(|bytes| bytes != wrong)), &what);
    }
}

/// Waits for something that is done in the background.
#[track_caller]
fn wait_until(is_done: impl Fn() -> bool, what: &str) {
    let start = Instant::now();
    while !is_done() {
        assert!(start.elapsed() < TABLE_LIMIT, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_table_that_is_damaged_while_it_is_used_is_left() {
    let scratch = Scratch::new();
    let runtime = Runtime::new().unwrap();
    let spec = generated(&scratch, Generated { n_entries: 9_000, n_huge: 6_000, ..Generated::default() });
    let cache = scratch.join("cache");
    make_table(&runtime, &spec, &cache);
    for is_cut in [false, true] {
        if tables_in(&cache).is_empty() {
            make_table(&runtime, &spec, &cache);
        }
        // So little is kept in memory that blocks are read again.
        let open = Open::new(&runtime, &spec, with_cache(&cache), |config| config.memory_bytes = 1 << 20);
        assert!(open.is_in_use());
        let wanted = by_lookup(&runtime, open.volume(), b"huge/entry-0000000").unwrap();
        let file = File::options().write(true).open(table_in(&cache)).unwrap();
        match is_cut {
            true => file.set_len(1000).unwrap(),
            false => file.write_all_at(&vec![0x55; file.metadata().unwrap().len() as usize - 200], 50).unwrap(),
        }
        let found = walk(&runtime, open.volume(), 500).unwrap();
        assert_eq!(
            found.len(),
            Generated { n_entries: 9_000, n_huge: 6_000, ..Generated::default() }.write(&mut std::io::sink()) as usize
        );
        assert_eq!(without_links(found[&b"huge/entry-0000000"[..]].clone()), without_links(wanted));
        assert!(!open.is_in_use());
        wait_until(|| tables_in(&cache).is_empty(), "it is taken away");
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

/// A small archive with its right answers, and its table.
struct Small {
    archive: tempfile::NamedTempFile,
    table: Vec<u8>,
    names: Vec<Vec<u8>>,
}

impl Small {
    fn new(scratch: &Scratch) -> Self {
        let source = scratch.dir("source");
        for dir in ["one", "two/three"] {
            fs::create_dir_all(source.join(dir)).unwrap();
            fs::write(source.join(dir).join("file"), dir).unwrap();
            symlink(dir, source.join(dir).join("link")).unwrap();
            xattr::set(source.join(dir), "user.x", b"value").unwrap();
        }
        let archive = tempfile::NamedTempFile::new_in(&**scratch).unwrap();
        let path = scratch.join("small.catar");
        run(caifs().args(["tar", "--metadata-table"]).arg(&path).arg(&source)).ok();
        fs::copy(&path, archive.path()).unwrap();
        let names = ["", "one", "one/file", "two/three/link", "two/four", "two/three/file"];
        let names = names.map(|name| name.as_bytes().to_vec()).to_vec();
        Self { archive, table: fs::read(scratch.join("small.catar.table")).unwrap(), names }
    }

    /// Answers with some bytes as the table; they must be right, whatever the bytes are.
    fn ask(&self, runtime: &Runtime, table: &[u8]) -> (Vec<Option<Attr>>, bool) {
        let plan = MemoryPlan::new(16 << 20);
        let spec = FileLocation::Local(self.archive.path().to_owned());
        runtime.block_on(async {
            let report = Arc::new(Report::default());
            let opened =
                open_blob(&spec, &SourceConfig::default(), &plan, Duration::from_secs(5), &report).await.unwrap();
            let tree = Arc::new(open_tree(opened, &plan).await.unwrap());
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(table).unwrap();
            let opened = Table::open(file, 1 << 20);
            if let Ok(table) = &opened {
                let _ = check(table);
            }
            let is_attached = match opened {
                Ok(table) => tree.attach(table, |_| ()).await.is_ok(),
                Err(_) => false,
            };
            let volume = TreeVolume::new(tree, Show::default(), "small".to_owned(), report);
            let mut answers = Vec::new();
            for name in &self.names {
                let mut attr = Some(volume.getattr(1).await.unwrap());
                for part in name.split(|&byte| byte == b'/').filter(|part| !part.is_empty()) {
                    attr = match attr {
                        Some(above) => volume.lookup(above.ino, part).await.unwrap(),
                        None => None,
                    };
                }
                answers.push(attr.map(without_links));
            }
            let listing = volume.readdir(1, 0, 100).await.unwrap();
            answers.extend(listing.entries.into_iter().map(|entry| Some(without_links(entry.attr))));
            (answers, is_attached)
        })
    }
}

#[test]
fn any_change_and_any_cut_of_a_table_is_noticed() {
    let scratch = Scratch::new();
    let runtime = Runtime::new().unwrap();
    let small = Small::new(&scratch);
    let (wanted, is_attached) = small.ask(&runtime, &small.table);
    assert!(is_attached && wanted.len() == small.names.len() + 2);
    assert_eq!(small.ask(&runtime, b"").0, wanted, "as the archive says");
    for at in 0..small.table.len() {
        let mut wrong = small.table.clone();
        wrong[at] ^= 1 << (at % 8);
        assert_eq!(small.ask(&runtime, &wrong).0, wanted, "byte {at}");
    }
    for len in (0..small.table.len()).step_by(7) {
        assert_eq!(small.ask(&runtime, &small.table[..len]).0, wanted, "{len} bytes");
    }
    let run = |changes: Vec<(prop::sample::Index, u8)>| {
        let mut wrong = small.table.clone();
        for (at, byte) in changes {
            let at = at.index(wrong.len());
            wrong[at] = byte;
        }
        prop_assert_eq!(&small.ask(&runtime, &wrong).0, &wanted);
        Ok(())
    };
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(100)
    });
    runner.run(&changes, run).unwrap();
}

#[test]
fn a_table_with_right_checksums_and_wrong_content_is_refused_or_answers_without_a_panic() {
    let scratch = Scratch::new();
    let source = scratch.dir("source");
    for dir in ["a", "b/c"] {
        fs::create_dir_all(source.join(dir)).unwrap();
        (0..20).for_each(|number| fs::write(source.join(dir).join(format!("file {number}")), b"x").unwrap());
    }
    let archive = scratch.join("t.catar");
    run(caifs().args(["tar", "--metadata-table"]).arg(&archive).arg(&source)).ok();
    let binding = *Table::open(File::open(scratch.join("t.catar.table")).unwrap(), 0).unwrap().binding();
    let runtime = Runtime::new().unwrap();
    let n_refused = std::cell::Cell::new(0);
    let try_with = |changes: Vec<(prop::sample::Index, u8)>| {
        // Changed after all was laid down and before the checksums are made.
        let plain = tempfile::tempfile().unwrap();
        let mut packer = TablePacker::new(Writer::new(plain.try_clone().unwrap(), Box::new(|_| Ok(()))));
        tar_with_table(&source, &TarOptions::default(), &mut std::io::sink(), Some(&mut packer)).unwrap();
        let mut out = tempfile::tempfile().unwrap();
        let damage = |file: &File| {
            let len = file.metadata().unwrap().len() as usize;
            changes.iter().for_each(|(at, byte)| file.write_all_at(&[*byte], at.index(len) as u64).unwrap());
        };
        packer.flush().unwrap();
        damage(&plain);
        packer.finish(binding, &mut BufWriter::new(&mut out)).unwrap();
        let table = Table::open(out, 0).unwrap();
        n_refused.set(n_refused.get() + u32::from(check(&table).is_err()));
        let plan = MemoryPlan::new(16 << 20);
        let spec = FileLocation::Local(archive.clone());
        runtime.block_on(async {
            let report = Arc::new(Report::default());
            let mut opened =
                open_blob(&spec, &SourceConfig::default(), &plan, Duration::from_secs(5), &report).await.unwrap();
            opened.tables = Default::default();
            let tree = Arc::new(open_tree(opened, &plan).await.unwrap());
            let _ = tree.attach(table, |_| ()).await;
            let volume = TreeVolume::new(tree, Show::default(), "lies".to_owned(), report);
            let mut waiting = vec![1];
            let mut n_seen = 0;
            while let Some(ino) = waiting.pop() {
                n_seen += 1;
                let Ok(listing) = volume.readdir(ino, 0, 1000).await else { continue };
                let inside = listing.entries.iter().filter(|entry| entry.attr.ino > ino);
                waiting
                    .extend(inside.filter(|entry| entry.attr.kind == FileKind::Directory).map(|entry| entry.attr.ino));
                assert!(n_seen < 10_000, "a tree that ends");
                for entry in listing.entries {
                    let _ = volume.lookup(ino, &entry.name).await;
                    let _ = volume.read(entry.attr.ino, 0, 4096).await;
                    let _ = volume.listxattr(entry.attr.ino, true).await;
                }
            }
        });
        Ok(())
    };
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(150) };
    proptest::test_runner::TestRunner::new(config).run(&changes, try_with).unwrap();
    assert!(n_refused.get() > 20, "{} were refused", n_refused.get());
}
