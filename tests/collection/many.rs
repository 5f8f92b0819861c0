//! A thousand indexes: what a mount, a listing and a read cost.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use super::{Ground, eventually};
use crate::mount::can_mount;
use crate::support::blob::noise;

/// How many indexes there are.
const N: usize = 1000;

/// Memory of the process beside its budget, in bytes. An unoptimised build has more of it than what people run.
const REST_BYTES: u64 = 48 << 20;

/// How many names a listing has, with their types and nothing else.
fn list(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().filter(|entry| entry.as_ref().unwrap().file_type().is_ok()).count()
}

#[test]
fn a_thousand_indexes_cost_no_more_than_what_is_used_of_them() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    ground.image("first.caibx", &noise(400_000));
    ground.tree("tree.caidx");
    let (image, tree) = (ground.index.join("first.caibx"), ground.index.join("tree.caidx"));
    for i in 1..N / 2 {
        fs::copy(&image, ground.index.join(format!("image {i:04}.caibx"))).unwrap();
        fs::copy(&tree, ground.index.join(format!("tree {i:04}.caidx"))).unwrap();
    }
    let mounted = ground.mount(&["-o", "memory=16M"]);
    assert_eq!(list(&ground.mnt), N);
    assert_eq!((ground.own("parts"), ground.own("fetches")), (0, 0), "a listing opens nothing");
    fs::copy(&image, ground.index.join("new.caibx")).unwrap();
    assert_eq!(list(&ground.mnt), N + 1);
    eventually("a new one appears", || ground.mnt.join("new").exists());
    let mut some = [0; 100];
    fs::File::open(ground.mnt.join("image 0123")).unwrap().read_exact_at(&mut some, 200_000).unwrap();
    assert!(some == noise(400_000)[200_000..200_100]);
    assert_eq!((ground.own("parts"), ground.own("fetches")), (1, 1), "one is read, so one is open");

    // All of them looked at, then all of them used: no more are open than may be, and the memory stays what it is.
    let mut numbers: Vec<u64> =
        fs::read_dir(&ground.mnt).unwrap().map(|entry| entry.unwrap().metadata().unwrap().ino()).collect();
    assert_eq!(ground.own("parts"), 1, "a look at the attributes opens nothing");
    numbers.sort();
    numbers.dedup();
    assert_eq!(numbers.len(), N + 1);
    for entry in fs::read_dir(&ground.mnt).unwrap() {
        let path = entry.unwrap().path();
        let file = if path.is_dir() { path.join("dir/file") } else { path };
        fs::File::open(file).unwrap().read_exact_at(&mut some, 123_456).unwrap();
        assert!(some == noise(400_000)[123_456..123_556]);
    }
    let n_open = ground.own("parts");
    assert!((100..=256).contains(&n_open), "{n_open} parts are open");
    // The first ones are closed by now, and what the kernel knows of them is good.
    let file = ground.mnt.join("tree 0001/dir/file");
    assert!(fs::read(file).unwrap() == noise(300_000));
    assert_eq!(ground.own("eio"), 0);
    let peak = mounted.peak_rss_bytes().unwrap();
    assert!(peak < (16 << 20) + REST_BYTES, "{} MiB", peak >> 20);
    assert!(mounted.end());
}
