//! `caifs warm` and `-o warm=`: what was warmed is read without the network, and readers do not wait for warming.

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::{Ground, until};
use crate::cli::one_line;
use crate::mount::can_mount;
use crate::support::blob::{Xorshift, noise};
use crate::support::proxy::{Mode, ProxyFault};
use crate::support::run::run;

/// A tree of some directories, each file of other content.
fn tree(ground: &Ground) -> std::path::PathBuf {
    let tree = ground.scratch.dir("tree");
    let mut random = Xorshift::seeded(77);
    for (dir, n) in [("a", 3), ("b/inner", 5), ("c", 2)] {
        fs::create_dir_all(tree.join(dir)).unwrap();
        for i in 0..n {
            fs::write(tree.join(dir).join(format!("file {i}")), random.bytes(500_000)).unwrap();
        }
    }
    ground.pack(&tree);
    tree
}

/// The first two numbers of a summary behind its colon: chunks, and how many of them were fetched.
fn fetched(summary: &str) -> (u64, u64) {
    let behind = summary.rsplit_once(": ").unwrap();
    let n_chunks = behind.0.rsplit_once(": ").unwrap().1.split(' ').next().unwrap().parse().unwrap();
    (n_chunks, behind.1.split(' ').next().unwrap().parse().unwrap())
}

#[test]
fn what_was_warmed_is_read_offline() {
    if !can_mount() {
        return;
    }
    let Some(ground) = Ground::new() else { return };
    let tree = tree(&ground);
    for spec in ["t.caidx", "t.catar"] {
        let summary = ground.warm(spec, &["b", "/c/file 1", "a/file 0:0-100k"]).ok().text();
        let (n_chunks, n_fetched) = fetched(&summary);
        assert!(n_fetched > 20 && n_chunks >= n_fetched, "{summary}");
        let again = fetched(&ground.warm(spec, &["b", "/c/file 1", "a/file 0:0-100k"]).ok().text());
        assert_eq!(again.1, 0, "all of it is there");

        let n_before = ground.proxy.n_requests();
        let mounted = ground.mount_cached(spec, &["--offline"]);
        for i in 0..5 {
            let file = format!("b/inner/file {i}");
            assert!(fs::read(ground.mnt.join(&file)).unwrap() == fs::read(tree.join(&file)).unwrap(), "{spec}: {file}");
        }
        assert!(fs::read(ground.mnt.join("c/file 1")).unwrap() == fs::read(tree.join("c/file 1")).unwrap());
        let mut part = vec![0; 100 << 10];
        fs::File::open(ground.mnt.join("a/file 0")).unwrap().read_exact_at(&mut part, 0).unwrap();
        assert!(fs::read(tree.join("a/file 0")).unwrap().starts_with(&part));
        assert_eq!(fs::read(ground.mnt.join("a/file 1")).unwrap_err().raw_os_error(), Some(libc::ENETUNREACH));
        assert!(mounted.end());
        assert_eq!(ground.proxy.n_requests(), n_before);
        fs::remove_dir_all(&ground.cache).unwrap();
    }
}

#[test]
fn metadata_is_all_that_find_needs() {
    if !can_mount() {
        return;
    }
    let Some(ground) = Ground::new() else { return };
    let tree = tree(&ground);
    ground.warm("t.caidx", &["--metadata"]).ok();
    let cached: u64 = fs::read_dir(&ground.cache).unwrap().count() as u64;
    assert!(cached < 60, "not all of it: {cached}");
    let mounted = ground.mount_cached("t.caidx", &["--offline"]);
    // Everything but the contents, which are not there.
    assert_eq!(walk(&ground.mnt), walk(&tree));
    assert!(mounted.end());
}

fn walk(root: &std::path::Path) -> Vec<(std::path::PathBuf, u64)> {
    let mut found = Vec::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let entry = entry.unwrap();
            let metadata = entry.metadata().unwrap();
            if metadata.is_dir() {
                waiting.push(entry.path());
            }
            let size = if metadata.is_file() { metadata.len() } else { 0 };
            found.push((entry.path().strip_prefix(root).unwrap().to_owned(), size));
        }
    }
    found.sort();
    found
}

#[test]
fn ranges_of_images_and_whole_images_are_warmed() {
    let Some(ground) = Ground::new() else { return };
    let mut content = noise(6 << 20);
    // Zeros come again and again, and are fetched once.
    content[2 << 20..4 << 20].fill(0);
    let ids = ground.make("disk.caibx", &content);
    let distinct: std::collections::HashSet<_> = ids.iter().collect();
    let part = fetched(&ground.warm("disk.caibx", &["--range", "0-256k", "--range", "5M-"]).ok().text());
    assert!(part.1 > 0 && part.0 < distinct.len() as u64 / 2, "{part:?} of {}", distinct.len());
    let summary = ground.warm("disk.caibx", &[]).ok().text();
    assert_eq!(fetched(&summary), (distinct.len() as u64, distinct.len() as u64 - part.1), "{summary}");
    assert_eq!(ground.n_cached(&ids), ids.len());
    let whole = fetched(&ground.warm("disk.caibx", &[]).ok().text());
    assert_eq!(whole, (distinct.len() as u64, 0));
    let read = super::run(
        ground.command().arg("cat").arg(ground.url("disk.caibx")).args(["--offline", "-c"]).arg(&ground.cache),
    );
    assert!(read.ok().stdout == content);
}

#[test]
fn what_fails_is_named_and_the_rest_is_warmed() {
    let Some(ground) = Ground::new() else { return };
    tree(&ground);
    let ids = ground.make("disk.caibx", &noise(2 << 20));
    let lost = &ids[3];
    fs::remove_file(ground.nginx.root().join("default.castr").join(&lost[..4]).join(format!("{lost}.cacnk"))).unwrap();
    let failed = ground.warm("disk.caibx", &[]);
    let line = one_line(failed);
    assert!(line.contains("1 could not be had") && line.contains(lost), "{line}");
    assert_eq!(ground.n_cached(&ids), ids.len() - 1);

    for (args, wanted) in [
        (&["t.caidx", "no/such"][..], "no/such: no such file"),
        (&["t.caidx", "a:0-1k"], "a: not a regular file"),
        (&["t.caidx", "--range", "0-1k"], "--range is for disk images"),
        (&["disk.caibx", "some/file"], "a disk image has no files"),
        (&["disk.caibx", "--metadata"], "a disk image has no metadata"),
        (&["disk.caibx", "--range", "5-4"], "\"5-4\" is not a range"),
        (&["disk.caibx", "--rate", "0"], "--rate"),
        (&["disk.caibx", "--offline"], "offline"),
    ] {
        let line = one_line(ground.warm(args[0], &args[1..]));
        assert!(line.contains(wanted), "{args:?}: {line}");
    }
    let line = one_line(super::run(ground.command().arg("warm").arg(ground.url("disk.caibx"))));
    assert!(line.contains("there is no cache"), "{line}");
    let local = ground.nginx.root().join("t.catar");
    let line = one_line(super::run(ground.command().arg("warm").arg(local).arg("-c").arg(&ground.cache)));
    assert!(line.contains("local file"), "{line}");
    // A cache that cannot hold it all says so.
    fs::remove_dir_all(&ground.cache).unwrap();
    let line = one_line(ground.warm("disk.caibx", &["--range", "1M-", "--cache-size", "400k"]));
    assert!(line.contains("not in the cache"), "{line}");
}

#[test]
fn a_rate_bounds_what_comes_through_the_network() {
    let Some(ground) = Ground::new() else { return };
    let ids = ground.make("disk.caibx", &noise(1 << 20));
    let rate = 500_000;
    let (before, start) = (ground.proxy.sent_bytes(), Instant::now());
    ground.warm("disk.caibx", &["--rate", "500000"]).ok();
    let sent = (ground.proxy.sent_bytes() - before) as f64;
    // The other way round than a limit of time: however slow the machine is, no more than this can have come in the time it took. A
    // group of chunks is let in at once, and the index and the heads of answers are not counted.
    let most = rate as f64 * start.elapsed().as_secs_f64() + 300_000.0;
    assert!(sent <= most, "{sent} of {most}");
    assert!(sent > 1_000_000.0);
    assert_eq!(ground.n_cached(&ids), ids.len());
}

#[test]
fn a_mount_warms_in_the_background_whatever_the_network_does() {
    if !can_mount() {
        return;
    }
    let Some(ground) = Ground::new() else { return };
    let content = noise(4 << 20);
    let ids = ground.make("disk.caibx", &content);
    // The network goes away at first.
    ground.proxy.set_script(|n, _| match n {
        20..40 => ProxyFault::Reset,
        _ => ProxyFault::None,
    });
    let mounted = ground.mount_cached("disk.caibx", &["-o", "warm=all"]);
    until("all of it is there", || ground.n_cached(&ids) == ids.len());
    assert!(mounted.end());
    fs::remove_dir_all(&ground.cache).unwrap();

    // A part of it, by the file's name; a network that is gone for good; and the mount ends with warming under way.
    ground.proxy.set_script(|_, _| ProxyFault::None);
    let mounted = ground.mount_cached("disk.caibx", &["-o", "warm=disk:0-1M,warm=:3M-"]);
    let n_wanted = |mib: f64| (ids.len() as f64 * mib / 4.0) as usize;
    until("these parts are there", || ground.n_cached(&ids) >= n_wanted(1.7));
    assert!(ground.n_cached(&ids) <= n_wanted(2.5));
    assert!(mounted.end());
    fs::remove_dir_all(&ground.cache).unwrap();
    let mounted = ground.mount_cached("disk.caibx", &["-o", "warm=all,warm-rate=200k"]);
    until("it has begun", || ground.n_cached(&ids) > 0);
    ground.proxy.set_mode(Mode::BlackHole);
    assert!(mounted.end(), "the server ends with its mount");
    assert!(ground.n_cached(&ids) < ids.len());
}

#[test]
fn the_pace_of_a_warming_can_change_while_it_goes_on() {
    if !can_mount() {
        return;
    }
    let Some(ground) = Ground::new() else { return };
    let ids = ground.make("disk.caibx", &noise(4 << 20));
    // At this rate warming takes more than an hour.
    let mounted = ground.mount_cached("disk.caibx", &["-o", "warm=all,warm-rate=1k"]);
    until("it has begun", || ground.n_cached(&ids) > 0);
    assert!(ground.n_cached(&ids) < ids.len() / 2);
    let mut remount = ground.command();
    remount.arg("mount").args(["-o", "remount,warm-rate=1G"]).arg(ground.url("disk.caibx")).arg(&ground.mnt);
    run(&mut remount).ok();
    until("all of it is there", || ground.n_cached(&ids) == ids.len());
    assert!(mounted.end());
}

#[test]
fn readers_come_before_warming() {
    if !can_mount() {
        return;
    }
    let Some(ground) = Ground::new() else { return };
    let content = noise(16 << 20);
    let ids = ground.make("disk.caibx", &content);
    ground.delay(Duration::from_millis(20));
    // At this rate warming takes a minute.
    let mounted = ground.mount_cached("disk.caibx", &["-o", "warm=all,warm-rate=256k,io-timeout=20s"]);
    until("it has begun", || ground.n_cached(&ids) > 0);
    let file = fs::File::open(ground.mnt.join("disk")).unwrap();
    let mut piece = vec![0; 4096];
    for place in [15 << 20, 9 << 20, 12 << 20, 7 << 20] {
        file.read_exact_at(&mut piece, place as u64).unwrap();
        assert!(piece == content[place..place + 4096]);
    }
    assert!(ground.n_cached(&ids) < ids.len() * 9 / 10, "read while it was being warmed");
    drop(file);
    assert!(mounted.end());
}
