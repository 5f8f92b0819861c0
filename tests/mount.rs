//! Real mounts: what is shown against the source, what is refused, what is fetched, and what happens when things go wrong.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::stat::{Mode, SFlag, mknod};

use crate::support::blob::{Xorshift, noise};
use crate::support::corner::Corner;
use crate::support::is_root;
use crate::support::listing::tree_listing;
use crate::support::mounted::{Mounted, is_mountpoint};
use crate::support::peers::missing;
use crate::support::run::{caifs, run};
use crate::support::scratch::Scratch;

/// Whether real mounts are possible; says so once when not.
pub fn can_mount() -> bool {
    let possible = is_root() && Path::new("/dev/fuse").exists();
    if !possible {
        missing("root and /dev/fuse: real mounts");
    }
    possible
}

/// Packs a directory with our own `tar -i`.
fn pack(scratch: &Scratch, source: &Path) -> (PathBuf, PathBuf) {
    let (index, store) = (scratch.join("tree.caidx"), scratch.join("tree.castr"));
    run(caifs().args(["tar", "-i", "-s"]).arg(&store).arg(&index).arg(source)).ok();
    (index, store)
}

/// Makes an index and store of a blob with our own `make`.
fn make(scratch: &Scratch, content: &[u8]) -> (PathBuf, PathBuf) {
    let (index, store, blob) = (scratch.join("disk.caibx"), scratch.join("disk.castr"), scratch.file("blob", content));
    run(caifs().args(["make", "-s"]).arg(&store).arg(&index).arg(&blob)).ok();
    (index, store)
}

pub fn mount_with(spec: &Path, store: Option<&Path>, mountpoint: &Path, options: &[&str]) -> Result<Mounted, String> {
    let mut command = caifs();
    command.arg("mount").arg(spec).arg(mountpoint).args(options);
    if let Some(store) = store {
        command.arg("-s").arg(store);
    }
    Mounted::by_command(&mut command, mountpoint)
}

#[track_caller]
pub fn mount(spec: &Path, store: Option<&Path>, mountpoint: &Path) -> Mounted {
    mount_with(spec, store, mountpoint, &[]).unwrap()
}

/// Chunks fetched so far, as the mount itself counts them.
fn n_fetches(mountpoint: &Path) -> u64 {
    let value = xattr::get(mountpoint, "user.caifs.fetches").unwrap().unwrap();
    String::from_utf8(value).unwrap().parse().unwrap()
}

pub fn contents(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(dir) = waiting.pop() {
        for child in fs::read_dir(dir).unwrap() {
            let path = child.unwrap().path();
            let kind = path.symlink_metadata().unwrap().file_type();
            if kind.is_dir() {
                waiting.push(path);
            } else if kind.is_file() {
                all.insert(path.strip_prefix(root).unwrap().to_owned(), fs::read(&path).unwrap());
            }
        }
    }
    all
}

#[test]
fn a_tree_shows_every_attribute_and_all_content_of_its_source() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let (source, mountpoint) = (scratch.dir("source"), scratch.dir("m"));
    Corner::ALL.build(&source);
    fs::write(source.join("large"), noise(3_000_000)).unwrap();
    let (index, store) = pack(&scratch, &source);
    let wanted = tree_listing(&source).map(|_, entry| {
        // One nanosecond before 1970 is "no time" in the format, and stored as the nanosecond before.
        if entry.mtime == (-1, 999_999_999) {
            entry.mtime = (-1, 999_999_998);
        }
    });
    let mounted = mount(&index, Some(&store), &mountpoint);
    tree_listing(&mountpoint).assert_same(&wanted);
    assert!(contents(&mountpoint) == contents(&source), "content differs");
    assert!(mounted.end());
    let archive = scratch.join("tree.catar");
    run(caifs().arg("tar").arg(&archive).arg(&source)).ok();
    let mounted = mount(&archive, None, &mountpoint);
    tree_listing(&mountpoint).assert_same(&wanted);
    assert!(contents(&mountpoint) == contents(&source), "content differs");
    assert!(mounted.end());
}

#[test]
fn chattr_flags_links_blocks_and_own_xattrs_are_shown() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let (source, mountpoint) = (scratch.dir("source"), scratch.dir("m"));
    fs::write(source.join("plain"), noise(300_000)).unwrap();
    fs::write(source.join("flagged"), b"x").unwrap();
    fs::create_dir_all(source.join("dir/a/b")).unwrap();
    symlink("some/target", source.join("link")).unwrap();
    let flagged = run(std::process::Command::new("chattr").arg("+dA").arg(source.join("flagged")));
    let (index, store) = pack(&scratch, &source);
    // casync's default leaves files with +d out; this archive is made with them.
    let _mounted = mount(&index, Some(&store), &mountpoint);
    let at = |name: &str| mountpoint.join(name).symlink_metadata().unwrap();
    assert_eq!((at("link").size(), at("link").blocks(), at("link").nlink()), (11, 1, 1));
    assert_eq!((at("plain").size(), at("plain").blocks(), at("plain").nlink()), (300_000, 586, 1));
    assert_ne!(at("plain").ino(), at("link").ino());
    let own = |name: &str, own: &str| {
        let value = xattr::get(mountpoint.join(name), format!("user.caifs.{own}")).unwrap();
        value.map(|value| String::from_utf8(value).unwrap())
    };
    assert_eq!(own("plain", "index").unwrap(), index.to_str().unwrap());
    assert!((1..=10).contains(&own("plain", "chunks").unwrap().parse::<u64>().unwrap()));
    assert_eq!(own("plain", "entry-offset").unwrap(), at("plain").ino().to_string());
    let payload: u64 = own("plain", "payload-offset").unwrap().parse().unwrap();
    assert!(payload > at("plain").ino());
    assert_eq!(own("plain", "nonsense"), None);
    assert_eq!(own("dir", "chunks"), None);
    assert_eq!(xattr::list(mountpoint.join("plain")).unwrap().count(), 0, "own attributes are not listed");
    let lsattr = run(std::process::Command::new("lsattr").arg("-d").arg(mountpoint.join("plain"))).ok().text();
    assert!(lsattr.starts_with("----------"), "{lsattr}");
    if flagged.status.success() {
        assert!(!mountpoint.join("flagged").exists(), "a file with +d is left out, as casync does");
    }
}

#[test]
fn every_change_is_refused_with_erofs() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let (source, mountpoint) = (scratch.dir("source"), scratch.dir("m"));
    fs::write(source.join("file"), b"x").unwrap();
    fs::create_dir(source.join("dir")).unwrap();
    let (index, store) = pack(&scratch, &source);
    let _mounted = mount(&index, Some(&store), &mountpoint);
    let (file, dir, new) = (mountpoint.join("file"), mountpoint.join("dir"), mountpoint.join("new"));
    let nix = |done: nix::Result<()>| done.map_err(io::Error::from);
    let outcomes: Vec<(&str, io::Result<()>)> = vec![
        ("open for writing", File::options().write(true).open(&file).map(drop)),
        ("create", File::create_new(&new).map(drop)),
        ("truncate", nix(nix::unistd::truncate(&file, 0))),
        ("chmod", fs::set_permissions(&file, fs::Permissions::from_mode(0o600))),
        ("chown", std::os::unix::fs::chown(&file, Some(1), Some(1))),
        ("mkdir", fs::create_dir(&new)),
        ("rmdir", fs::remove_dir(&dir)),
        ("unlink", fs::remove_file(&file)),
        ("symlink", symlink("x", &new)),
        ("link", fs::hard_link(&file, &new)),
        ("rename", fs::rename(&file, &new)),
        ("mknod", nix(mknod(&new, SFlag::S_IFIFO, Mode::S_IRWXU, 0))),
        ("setxattr", xattr::set(&file, "user.x", b"1")),
        ("removexattr", xattr::remove(&file, "user.x")),
        (
            "utimes",
            nix(nix::sys::stat::utimes(
                &file,
                &nix::sys::time::TimeVal::new(1, 0),
                &nix::sys::time::TimeVal::new(1, 0),
            )),
        ),
    ];
    for (what, outcome) in outcomes {
        assert_eq!(outcome.unwrap_err().raw_os_error(), Some(libc::EROFS), "{what}");
    }
    // Remounted read-write, the kernel asks us, and we refuse too.
    let remounted =
        nix::mount::mount(None::<&str>, &mountpoint, None::<&str>, nix::mount::MsFlags::MS_REMOUNT, None::<&str>);
    if remounted.is_ok() {
        assert_eq!(fs::create_dir(&new).unwrap_err().raw_os_error(), Some(libc::EROFS));
        assert_eq!(fs::remove_file(&file).unwrap_err().raw_os_error(), Some(libc::EROFS));
    }
}

#[test]
fn an_image_is_a_file_in_a_directory_or_the_mountpoint_itself() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let mut content = noise(5_000_000);
    content[1_000_000..4_000_000].fill(0);
    let (index, store) = make(&scratch, &content);
    let mountpoint = scratch.dir("m");
    let mounted = mount(&index, Some(&store), &mountpoint);
    assert_eq!(n_fetches(&mountpoint), 0, "mounting a blob fetches no chunk");
    let names: Vec<_> = fs::read_dir(&mountpoint).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["disk"]);
    let metadata = mountpoint.join("disk").metadata().unwrap();
    assert_eq!((metadata.len(), metadata.mode() & 0o7777, metadata.blocks()), (5_000_000, 0o444, 9766));
    assert!(fs::read(mountpoint.join("disk")).unwrap() == content);
    assert_eq!(mountpoint.join("other").symlink_metadata().unwrap_err().raw_os_error(), Some(libc::ENOENT));
    assert!(mounted.end());

    let on_file = scratch.file("image", b"covered");
    let mounted = mount(&index, Some(&store), &on_file);
    assert!(fs::read(&on_file).unwrap() == content);
    let mut some = [0; 100];
    File::open(&on_file).unwrap().read_exact_at(&mut some, 4_999_900).unwrap();
    assert!(some == content[4_999_900..]);
    assert!(mounted.end());
    assert_eq!(fs::read(&on_file).unwrap(), b"covered");
}

#[test]
fn a_tree_on_a_file_is_refused() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let (index, store) = pack(&scratch, &scratch.dir("source"));
    let error = mount_with(&index, Some(&store), &scratch.file("file", b""), &[]).unwrap_err();
    assert!(error.contains("a directory tree cannot be mounted on a file"), "{error}");
}

#[test]
fn empty_things_can_be_mounted() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let mountpoint = scratch.dir("m");
    let (index, store) = make(&scratch, b"");
    let mounted = mount(&index, Some(&store), &mountpoint);
    assert_eq!(fs::read(mountpoint.join("disk")).unwrap(), b"");
    assert!(mounted.end());
    let (index, store) = pack(&scratch, &scratch.dir("empty"));
    let mounted = mount(&index, Some(&store), &mountpoint);
    assert_eq!(fs::read_dir(&mountpoint).unwrap().count(), 0);
    assert!(mounted.end());
}

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

#[test]
fn missing_and_bad_chunks_are_eio_and_the_rest_goes_on() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let content = noise(2_000_000);
    let (index, store) = make(&scratch, &content);
    let mountpoint = scratch.dir("m");
    let ids = run(caifs().arg("list-chunks").arg(&index)).ok().text();
    let ids: Vec<&str> = ids.lines().collect();
    let path = |id: &str| store.join(&id[..4]).join(format!("{id}.cacnk"));
    let originals: Vec<Vec<u8>> = ids.iter().map(|id| fs::read(path(id)).unwrap()).collect();
    let rewrite = |id: &str, bytes: &[u8]| {
        let _ = fs::remove_file(path(id));
        fs::write(path(id), bytes).unwrap();
    };
    fs::remove_file(path(ids[1])).unwrap();
    rewrite(ids[3], b"");
    rewrite(ids[5], &originals[6]);
    rewrite(ids[7], &originals[7][..originals[7].len() / 2]);
    let mut flipped = originals[9].clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    rewrite(ids[9], &flipped);
    rewrite(ids[11], &[originals[11].as_slice(), b"more"].concat());
    let _mounted = mount_with(&index, Some(&store), &mountpoint, &["--memory", "16M"]).unwrap();
    let starts: Vec<u64> = {
        // The offsets of the chunks, from the index itself: 40-byte items after 64 bytes, each with the end first.
        let bytes = fs::read(&index).unwrap();
        let ends = (0..ids.len()).map(|i| u64::from_le_bytes(bytes[64 + 40 * i..][..8].try_into().unwrap()));
        std::iter::once(0).chain(ends).collect()
    };
    let disk = File::open(mountpoint.join("disk")).unwrap();
    nix::fcntl::posix_fadvise(&disk, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_RANDOM).unwrap();
    for (chunk_idx, window) in starts.windows(2).enumerate() {
        // A page that lies within the chunk.
        let offset = window[0].next_multiple_of(4096);
        if offset + 4096 > window[1] {
            continue;
        }
        let mut page = vec![0; 4096];
        let read = disk.read_exact_at(&mut page, offset);
        match [1, 3, 5, 7, 9, 11].contains(&chunk_idx) {
            true => assert_eq!(read.unwrap_err().raw_os_error(), Some(libc::EIO), "chunk {chunk_idx}"),
            false => {
                read.unwrap();
                assert!(page == content[offset as usize..][..4096], "chunk {chunk_idx}");
            }
        }
    }
    // What was wrong is not remembered.
    for (id, original) in ids.iter().zip(&originals) {
        rewrite(id, original);
    }
    assert!(fs::read(mountpoint.join("disk")).unwrap() == content);
}

#[test]
fn a_store_that_vanishes_is_eio_and_reads_resume_when_it_is_back() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let content = noise(2_000_000);
    let (index, store) = make(&scratch, &content);
    let mountpoint = scratch.dir("m");
    let _mounted = mount(&index, Some(&store), &mountpoint);
    let away = scratch.join("away");
    fs::rename(&store, &away).unwrap();
    let eio = || String::from_utf8(xattr::get(&mountpoint, "user.caifs.eio").unwrap().unwrap()).unwrap();
    assert_eq!(eio(), "0");
    assert_eq!(fs::read(mountpoint.join("disk")).unwrap_err().raw_os_error(), Some(libc::EIO));
    // Counted under the numbered site for a chunk that no store has.
    assert!(eio().contains("(01: "), "{}", eio());
    assert_eq!(mountpoint.join("disk").metadata().unwrap().len(), 2_000_000);
    assert!(nix::sys::statvfs::statvfs(&mountpoint).unwrap().blocks() > 0);
    fs::rename(&away, &store).unwrap();
    assert!(fs::read(mountpoint.join("disk")).unwrap() == content);
}

#[test]
fn a_changed_index_is_noticed() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    // Large enough to be mapped: some 30,000 chunks of fixed size.
    let blob = scratch.join("blob");
    File::create_new(&blob).unwrap().set_len(2 << 30).unwrap();
    let (index, store) = (scratch.join("disk.caibx"), scratch.join("disk.castr"));
    run(caifs().args(["make", "-m", "64:64:64", "-s"]).arg(&store).arg(&index).arg(&blob)).ok();
    assert!(index.metadata().unwrap().len() > 1 << 20);
    let mountpoint = scratch.dir("m");
    let _mounted = mount(&index, Some(&store), &mountpoint);
    let disk = File::open(mountpoint.join("disk")).unwrap();
    let mut byte = [9];
    disk.read_exact_at(&mut byte, 1 << 30).unwrap();
    assert_eq!(byte, [0]);
    File::options().write(true).open(&index).unwrap().set_len(1000).unwrap();
    // Not the end of the file: an error, also for reads that would lie within what the shorter index still describes.
    for offset in [(1 << 30) + (500 << 20), 4 << 20] {
        let after = disk.read_at(&mut byte, offset);
        assert_eq!(after.unwrap_err().raw_os_error(), Some(libc::EIO));
    }
}

#[test]
fn a_busy_mount_is_detached_by_sigterm_and_served_until_its_last_file_is_closed() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let content = noise(1_000_000);
    let (index, store) = make(&scratch, &content);
    let mountpoint = scratch.dir("m");
    let mounted = mount(&index, Some(&store), &mountpoint);
    let disk = File::open(mountpoint.join("disk")).unwrap();
    let busy = run(caifs().arg("umount").arg(&mountpoint)).fails();
    assert!(busy.error_line().contains("in use"), "{}", busy.stderr);
    for &pid in mounted.pids() {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM).unwrap();
    }
    let start = Instant::now();
    while is_mountpoint(&mountpoint) {
        assert!(start.elapsed() < Duration::from_secs(10), "still mounted");
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut last = [0; 1000];
    disk.read_exact_at(&mut last, 999_000).unwrap();
    assert!(last == content[999_000..]);
    drop(disk);
    assert!(mounted.end(), "the daemon goes on after the last file was closed");
}

#[test]
fn after_kill_9_the_same_place_can_be_mounted_again() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let content = noise(4_000_000);
    let (index, store) = make(&scratch, &content);
    let mountpoint = scratch.dir("m");
    for round in 0..3 {
        let mut mounted = mount(&index, Some(&store), &mountpoint);
        // Under load: a reader that is in the middle of it.
        let disk = mountpoint.join("disk");
        let reader = std::thread::spawn(move || {
            let mut read = Vec::new();
            File::open(disk).and_then(|mut file| file.read_to_end(&mut read))
        });
        mounted.kill_server();
        let _ = reader.join().unwrap();
        // The kernel still knows the attributes, but nobody answers any more.
        assert_eq!(nix::sys::statvfs::statvfs(&mountpoint).unwrap_err(), nix::errno::Errno::ENOTCONN, "round {round}");
        std::mem::forget(mounted);
    }
    let mounted = mount(&index, Some(&store), &mountpoint);
    assert!(fs::read(mountpoint.join("disk")).unwrap() == content);
    assert!(mounted.end());
    assert!(!is_mountpoint(&mountpoint));
}

#[test]
fn a_changed_archive_is_noticed() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let (source, mountpoint) = (scratch.dir("source"), scratch.dir("m"));
    fs::write(source.join("file"), noise(100_000)).unwrap();
    let archive = scratch.join("tree.catar");
    run(caifs().arg("tar").arg(&archive).arg(&source)).ok();
    let _mounted = mount(&archive, None, &mountpoint);
    File::options().write(true).open(&archive).unwrap().write_all_at(b"other", 50_000).unwrap();
    assert_eq!(fs::read(mountpoint.join("file")).unwrap_err().raw_os_error(), Some(libc::EIO));
}

#[test]
fn a_mount_that_would_cover_its_store_and_a_remount_are_refused() {
    let scratch = Scratch::new();
    let (index, store) = make(&scratch, b"content");
    let covering = run(caifs().arg("mount").arg(&index).arg(&*scratch).arg("-s").arg(&store)).fails();
    assert!(covering.error_line().contains("would cover the store"), "{}", covering.stderr);
    let mountpoint = scratch.dir("m");
    let again = run(caifs().arg("mount").args(["-o", "remount"]).arg(&index).arg(&mountpoint).arg("-s").arg(&store));
    let again = again.fails();
    assert!(again.error_line().contains("cannot be remounted"), "{}", again.stderr);
    assert!(!is_mountpoint(&mountpoint));
}

#[test]
fn a_place_where_a_mount_of_ours_lives_is_refused() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let (index, store) = make(&scratch, b"content");
    let mountpoint = scratch.dir("m");
    let _mounted = mount(&index, Some(&store), &mountpoint);
    let again = run(caifs().arg("mount").arg(&index).arg(&mountpoint).arg("-s").arg(&store)).fails();
    assert!(again.error_line().contains("already mounted on"), "{}", again.stderr);
    assert_eq!(fs::read(mountpoint.join("disk")).unwrap(), b"content");
}

#[test]
fn owners_and_access_are_as_asked() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let (source, mountpoint) = (scratch.dir("source"), scratch.dir("m"));
    fs::write(source.join("file"), b"x").unwrap();
    let (index, store) = pack(&scratch, &source);
    let mounted = mount_with(&index, Some(&store), &mountpoint, &["-o", "uid=1234,gid=5678"]).unwrap();
    let metadata = mountpoint.join("file").metadata().unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (1234, 5678));
    assert!(mounted.end());
}

#[test]
fn mount_table_shows_spec_and_type() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let (index, store) = make(&scratch, b"x");
    let odd = scratch.join("odd, name\\ with space.caibx");
    fs::rename(index, &odd).unwrap();
    let mountpoint = scratch.dir("m");
    let _mounted = mount(&odd, Some(&store), &mountpoint);
    let table = procfs_line(&mountpoint);
    let mut fields = table.rsplit(" - ").next().unwrap().split(' ');
    assert_eq!(fields.next(), Some("fuse.caifs"));
    let source = fields.next().unwrap().replace("\\040", " ").replace("\\134", "\\");
    assert_eq!(source, odd.to_str().unwrap());
    assert!(table.contains(" ro,nosuid,nodev"), "{table}");
}

fn procfs_line(mountpoint: &Path) -> String {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = table.lines().find(|line| line.split(' ').nth(4) == mountpoint.to_str());
    line.unwrap().to_owned()
}

#[test]
fn bad_input_is_one_clear_line() {
    let scratch = Scratch::new();
    let mountpoint = scratch.dir("m");
    let (index, store) = make(&scratch, &noise(100_000));
    let bytes = fs::read(&index).unwrap();
    let cases: Vec<(PathBuf, &str)> = vec![
        (scratch.join("absent.caibx"), "No such file"),
        (scratch.file("cut.caibx", &bytes[..bytes.len() - 1]), "cut.caibx"),
        (scratch.file("empty.caibx", b""), "empty.caibx"),
        (scratch.file("text.caibx", b"this is no index at all, but some text"), "not an index"),
        (scratch.file("text", b"this is no index at all, but some text"), "neither an index"),
        (scratch.file("text.catar", b"this is no archive at all, but some text"), "text.catar"),
        (scratch.file("blob.caidx", &bytes), "blob.caidx"),
        (scratch.dir("dir.caidx"), "is a directory"),
    ];
    for (spec, wanted) in cases {
        let failed = run(caifs().arg("mount").arg(&spec).arg(&mountpoint).arg("-s").arg(&store)).fails();
        let line = failed.error_line();
        assert!(line.starts_with("caifs: ") && line.contains(wanted), "{line}");
        assert!(!is_mountpoint(&mountpoint));
    }
    let no_store = run(caifs().arg("mount").arg(&index).arg(&mountpoint)).fails();
    assert!(no_store.error_line().contains("default.castr"), "{}", no_store.stderr);
    let store_gone = run(caifs().arg("mount").arg(&index).arg(&mountpoint).args(["-s", "/no/such/store"])).fails();
    assert!(store_gone.error_line().contains("/no/such/store"), "{}", store_gone.stderr);
    let nowhere = run(caifs().arg("mount").arg(&index).arg(scratch.join("nowhere")).arg("-s").arg(&store)).fails();
    assert!(nowhere.error_line().contains("nowhere"), "{}", nowhere.stderr);
    let unknown = run(caifs().arg("mount").arg(&index).arg(&mountpoint).args(["-o", "memroy=1G"])).fails();
    assert!(unknown.error_line().contains("memroy") && unknown.error_line().contains("memory"), "{}", unknown.stderr);
    assert_eq!(unknown.status.code(), Some(1));
}

#[test]
fn a_mount_returns_when_it_is_usable_and_does_not_hold_the_callers_output() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let (index, store) = make(&scratch, b"content");
    let mountpoint = scratch.dir("m");
    let script = format!(
        "out=$({} mount {} {} -s {}) && cat {}/disk && echo \"[$out]\"",
        env!("CARGO_BIN_EXE_caifs"),
        index.display(),
        mountpoint.display(),
        store.display(),
        mountpoint.display()
    );
    let mut command = std::process::Command::new("sh");
    command.arg("-c").arg(script);
    let finished = run(&mut command).ok();
    assert_eq!(finished.text(), "content[]\n");
    run(caifs().arg("umount").arg(&mountpoint)).ok();
    assert!(!is_mountpoint(&mountpoint));
}

#[test]
fn changing_chattr_flags_is_refused() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let (index, store) = make(&scratch, b"content");
    let mountpoint = scratch.dir("m");
    let _mounted = mount(&index, Some(&store), &mountpoint);
    let set = run(std::process::Command::new("chattr").arg("+A").arg(mountpoint.join("disk"))).fails();
    assert!(set.stderr.contains("Read-only file system"), "{}", set.stderr);
}
