//! Indexes that come, go and are replaced while they are mounted; and numbers that stay.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use caifs::config::MountConfig;
use caifs::report::Report;
use caifs::store::location::FileLocation;
use caifs::volume::open::open_volume;
use caifs::volume::{FileKind, ROOT_INO, Volume};
use tokio::runtime::Runtime;

use super::{Ground, errno, eventually};
use crate::mount::can_mount;
use crate::support::blob::noise;

#[test]
fn new_ones_appear_removed_ones_disappear_and_replaced_ones_are_new() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let (first, second) = (noise(500_000), noise(600_000));
    ground.image("a.caibx", &first);
    ground.tree("t.caidx");
    let mounted = ground.mount(&["-o", "poll-interval=0"]);
    let at = |name: &str| ground.mnt.join(name);
    assert_eq!(ground.names(""), ["a", "t"]);
    assert_eq!(errno(fs::metadata(at("new"))), Some(libc::ENOENT), "the kernel knows that there is no such name");

    // New: as a file, a directory, a file below it, and by a rename.
    ground.image("new.caibx", &second);
    assert_eq!(ground.names(""), ["a", "new", "t"], "a listing is never old");
    eventually("the name is there", || fs::metadata(at("new")).is_ok_and(|metadata| metadata.len() == 600_000));
    assert!(fs::read(at("new")).unwrap() == second);
    fs::create_dir(ground.index.join("sub")).unwrap();
    assert_eq!(
        (ground.names(""), ground.names("sub")),
        (["a", "new", "sub", "t"].map(str::to_owned).to_vec(), Vec::new())
    );
    fs::rename(ground.index.join("new.caibx"), ground.index.join("sub/moved.caibx")).unwrap();
    assert_eq!(
        (ground.names(""), ground.names("sub")),
        (["a", "sub", "t"].map(str::to_owned).to_vec(), vec!["moved".to_owned()])
    );
    eventually("the old name is gone", || fs::metadata(at("new")).is_err());
    let store = ground.store.display().to_string();
    std::os::unix::fs::symlink(&store, ground.index.join("sub/default.castr")).unwrap();
    assert!(fs::read(at("sub/moved")).unwrap() == second);

    // Replaced: another file of the same name; who has the one before open goes on reading it.
    let (open, before) = (File::open(at("a")).unwrap(), fs::metadata(at("a")).unwrap());
    let mut some = vec![0; 1000];
    open.read_exact_at(&mut some, 0).unwrap();
    let other = ground.image("other.caibx", &second);
    fs::rename(other, ground.index.join("a.caibx")).unwrap();
    eventually("the new one is there", || fs::metadata(at("a")).is_ok_and(|metadata| metadata.len() == 600_000));
    assert_ne!(fs::metadata(at("a")).unwrap().ino(), before.ino());
    assert!(fs::read(at("a")).unwrap() == second);
    for offset in [0u64, 100_000, 499_000] {
        open.read_exact_at(&mut some, offset).unwrap();
        assert!(some == first[offset as usize..][..1000], "the one before, at {offset}");
    }
    assert_eq!(open.metadata().unwrap().len(), 500_000);

    // Written to in place, as cp does it: again another file.
    let number = fs::metadata(at("a")).unwrap().ino();
    fs::copy(ground.index.join("sub/moved.caibx"), ground.scratch.join("copy")).unwrap();
    ground.image("b.caibx", &first);
    fs::copy(ground.index.join("b.caibx"), ground.index.join("a.caibx")).unwrap();
    eventually("the written one is there", || fs::metadata(at("a")).is_ok_and(|metadata| metadata.ino() != number));
    assert!(fs::read(at("a")).unwrap() == first);

    // Removed: also a tree that somebody is in.
    let file = File::open(at("t/dir/file")).unwrap();
    file.read_exact_at(&mut some, 5).unwrap();
    fs::remove_file(ground.index.join("t.caidx")).unwrap();
    fs::remove_file(ground.index.join("a.caibx")).unwrap();
    eventually("it is gone", || errno_of(&at("t")) == Some(libc::ENOENT) && errno_of(&at("a")) == Some(libc::ENOENT));
    file.read_exact_at(&mut some, 200_000).unwrap();
    assert!(some == noise(300_000)[200_000..][..1000]);
    assert_eq!(ground.names(""), ["b", "sub"]);
    fs::remove_dir_all(ground.index.join("sub")).unwrap();
    eventually("the directory is gone", || errno_of(&at("sub")) == Some(libc::ENOENT));
    // And there again, with what it has now.
    fs::create_dir(ground.index.join("sub")).unwrap();
    eventually("the directory is there", || fs::read_dir(at("sub")).is_ok_and(|mut names| names.next().is_none()));
    drop((open, file));
    assert!(mounted.end());
}

fn errno_of(path: &Path) -> Option<i32> {
    path.symlink_metadata().err().and_then(|error| error.raw_os_error())
}

#[test]
fn a_second_of_the_same_name_gives_both_their_suffixes() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    ground.image("x.caibx", b"x");
    let _mounted = ground.mount(&[]);
    let number = fs::metadata(ground.mnt.join("x")).unwrap().ino();
    ground.tree("x.caidx");
    assert_eq!(ground.names(""), ["x.caibx", "x.caidx"]);
    assert_eq!(fs::metadata(ground.mnt.join("x.caibx")).unwrap().ino(), number, "the same file");
    fs::remove_file(ground.index.join("x.caidx")).unwrap();
    assert_eq!(ground.names(""), ["x"]);
    eventually("the old name is back", || fs::read(ground.mnt.join("x")).is_ok_and(|content| content == b"x"));
}

#[test]
fn without_inotify_time_tells() {
    // Over a directory that changes behind the back of the watch: through a symlink, which is not followed by it.
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let target = ground.image("target.caibx", b"one");
    let elsewhere = ground.scratch.join("elsewhere.caibx");
    fs::rename(target, &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, ground.index.join("x.caibx")).unwrap();
    let _mounted = ground.mount(&["-o", "poll-interval=50ms"]);
    assert_eq!(fs::read(ground.mnt.join("x")).unwrap(), b"one");
    let two = ground.image("two.caibx", b"other");
    fs::rename(two, &elsewhere).unwrap();
    eventually("the new content is there", || fs::read(ground.mnt.join("x")).is_ok_and(|content| content == b"other"));
}

/// Every file of a volume: path and number.
fn walk(runtime: &Runtime, volume: &dyn Volume) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    let mut waiting = vec![(String::new(), ROOT_INO)];
    while let Some((path, ino)) = waiting.pop() {
        let mut offset = 0;
        loop {
            let listing = runtime.block_on(volume.readdir(ino, offset, 3)).unwrap();
            let Some(last) = listing.entries.last() else { break };
            offset = last.next_offset;
            for entry in listing.entries {
                let attr = runtime.block_on(volume.lookup(ino, &entry.name)).unwrap().unwrap();
                // Of local files a listing tells as much as the number, if it does not tell the attributes.
                assert_eq!(entry.attr.ino, attr.ino);
                let path = format!("{path}/{}", String::from_utf8(entry.name.to_vec()).unwrap());
                if attr.kind == FileKind::Directory {
                    waiting.push((path.clone(), attr.ino));
                }
                found.push((path, attr.ino));
            }
        }
    }
    found.sort();
    found
}

#[test]
fn numbers_are_the_same_on_every_mount_and_enough_to_find_the_file() {
    let ground = Ground::new();
    fs::create_dir_all(ground.index.join("sub/deep")).unwrap();
    ground.image("a.caibx", &noise(200_000));
    ground.tree("t.caidx");
    ground.tree("sub/deep/u.catar");
    let runtime = Runtime::new().unwrap();
    let place = FileLocation::Local(ground.index.clone());
    let open = || {
        let (config, report) = (MountConfig::default(), Arc::new(Report::default()));
        runtime.block_on(open_volume(&place, &config, false, &report)).unwrap().volume
    };
    let first = open();
    let files = walk(&runtime, &*first);
    assert_eq!(files.len(), 5 + 2 * 3, "{files:?}");
    assert_eq!(walk(&runtime, &*open()), files);
    // As after another process has taken the mount over: the kernel asks for numbers, and nothing was looked up before.
    for (path, ino) in &files {
        let volume = open();
        let attr = runtime.block_on(volume.getattr(*ino)).unwrap();
        let wanted = runtime.block_on(first.getattr(*ino)).unwrap();
        assert_eq!(
            (attr.ino, attr.kind, attr.size, attr.mtime),
            (*ino, wanted.kind, wanted.size, wanted.mtime),
            "{path}"
        );
        if attr.kind == FileKind::Regular {
            let content = runtime.block_on(volume.read(*ino, 100, 50)).unwrap();
            assert!(content == noise(300_000)[100..150], "{path}");
        }
    }
    for unknown in [2, 1 << 60, (1 << 61) + 12345, (2 << 61) + 12345, (3 << 61) + 12345, u64::MAX] {
        let error = runtime.block_on(open().getattr(unknown)).unwrap_err();
        assert_eq!(error.errno(), libc::ESTALE, "{unknown:#x}: {error}");
    }
}
