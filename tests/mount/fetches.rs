//! What is fetched, and that large trees and files work.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use nix::sys::stat::{Mode, SFlag, mknod};

use crate::support::blob::{Xorshift, noise};
use crate::support::scratch::Scratch;

use super::{can_mount, mount, n_fetches, pack};

#[test]
fn mounting_and_listing_fetch_what_they_must_and_no_more() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let (source, mountpoint) = (scratch.dir("source"), scratch.dir("m"));
    let mut random = Xorshift::seeded(5);
    let n_children = 40;
    for i in 0..n_children {
        // Several chunks each, so that every child lies in chunks of its own.
        fs::write(source.join(format!("file{i:02}")), random.bytes(700_000)).unwrap();
    }
    let (index, store) = pack(&scratch, &source);
    let _mounted = mount(&index, Some(&store), &mountpoint);
    let at_mount = n_fetches(&mountpoint);
    assert!(at_mount <= 3, "mounting a tree fetched {at_mount} chunks");
    assert!(!mountpoint.join("absent").exists());
    assert!(n_fetches(&mountpoint) <= 3, "a name that is not there costs no chunk of a child");
    assert_eq!(fs::read_dir(&mountpoint).unwrap().count(), n_children);
    let listed = n_fetches(&mountpoint);
    assert!(listed <= n_children as u64 + 2, "ls of {n_children} children fetched {listed} chunks");
    assert!(listed > n_children as u64 / 2, "the test's files do not lie in chunks of their own");
    for i in 0..n_children {
        mountpoint.join(format!("file{i:02}")).metadata().unwrap();
    }
    assert_eq!(n_fetches(&mountpoint), listed, "attributes come with the listing");
}

#[test]
fn one_byte_in_the_middle_of_a_gigabyte_fetches_one_chunk() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let (source, mountpoint) = (scratch.dir("source"), scratch.dir("m"));
    let file = File::create_new(source.join("huge")).unwrap();
    file.set_len(1 << 30).unwrap();
    let middle = noise(1 << 20);
    file.write_all_at(&middle, (1 << 29) - (1 << 19)).unwrap();
    drop(file);
    let (index, store) = pack(&scratch, &source);
    let _mounted = mount(&index, Some(&store), &mountpoint);
    let huge = File::open(mountpoint.join("huge")).unwrap();
    let before = n_fetches(&mountpoint);
    let mut byte = [0];
    huge.read_exact_at(&mut byte, 1 << 29).unwrap();
    assert_eq!(byte[0], middle[1 << 19]);
    // The kernel reads at most its read-ahead around a random read; 4 MiB of it are zeros here but for 1 MiB.
    let fetched = n_fetches(&mountpoint) - before;
    assert!(fetched <= 1 + (4 << 20) / 16384, "{fetched}");
    assert!(fetched >= 1);
    let unaligned = n_fetches(&mountpoint);
    // Without read-ahead it is the one chunk, or two when the page crosses a cut.
    nix::fcntl::posix_fadvise(&huge, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_RANDOM).unwrap();
    huge.read_exact_at(&mut byte, (1 << 29) + (300 << 10)).unwrap();
    assert!(n_fetches(&mountpoint) - unaligned <= 2);
}

#[test]
fn large_and_deep_trees_and_large_files_work() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let (source, mountpoint) = (scratch.dir("source"), scratch.dir("m"));
    let many = source.join("many");
    fs::create_dir(&many).unwrap();
    for i in 0..100_000 {
        mknod(&many.join(format!("entry-{i}")), SFlag::S_IFREG, Mode::S_IRUSR, 0).unwrap();
    }
    let mut deep = source.join("deep");
    for level in 0..200 {
        deep = deep.join(format!("d{level}"));
    }
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("bottom"), b"here").unwrap();
    let sparse = File::create_new(source.join("sparse")).unwrap();
    sparse.set_len((4 << 30) + 12345).unwrap();
    sparse.write_all_at(b"the end", (4 << 30) + 12338).unwrap();
    drop(sparse);
    let (index, store) = pack(&scratch, &source);
    let _mounted = mount(&index, Some(&store), &mountpoint);
    let mut names: Vec<_> =
        fs::read_dir(mountpoint.join("many")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 100_000);
    assert!(mountpoint.join("many/entry-77777").symlink_metadata().unwrap().is_file());
    assert!(!mountpoint.join("many/entry-100000").exists());
    let bottom = mountpoint.join(deep.strip_prefix(&source).unwrap()).join("bottom");
    assert_eq!(fs::read(bottom).unwrap(), b"here");
    let sparse = File::open(mountpoint.join("sparse")).unwrap();
    assert_eq!(sparse.metadata().unwrap().len(), (4 << 30) + 12345);
    let mut end = [0; 7];
    sparse.read_exact_at(&mut end, (4 << 30) + 12338).unwrap();
    assert_eq!(&end, b"the end");
}
