//! Both real programs, both ways: what they make is mounted as it was, and what we make they take for their own.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::chunks::chunk_files;
use crate::mount::{can_mount, contents, mount};
use crate::support::blob::{Xorshift, noise};
use crate::support::corner::Corner;
use crate::support::is_root;
use crate::support::listing::{Entry, Listing, tree_listing};
use crate::support::mounted::{self, Mounted};
use crate::support::peers::{missing, peer};
use crate::support::run::{Finished, caifs, command, run};
use crate::support::scratch::Scratch;

/// Runs a command given by words and paths.
#[track_caller]
fn run_ok(mut command: Command, args: &[&dyn AsRef<OsStr>]) -> Finished {
    run(command.args(args.iter().map(|arg| arg.as_ref()))).ok()
}

/// Panics where two files differ, with the first difference.
#[track_caller]
fn assert_same_bytes(ours: &Path, theirs: &Path, what: &str) {
    let (ours, theirs) = (fs::read(ours).unwrap(), fs::read(theirs).unwrap());
    let first = ours.iter().zip(&theirs).position(|(ours, theirs)| ours != theirs);
    assert!(ours == theirs, "{what}: {} and {} bytes, the first difference at {first:?}", ours.len(), theirs.len());
}

/// A mount shows what a listing says, and the content of a directory.
#[track_caller]
fn check_mount(spec: &Path, store: Option<&Path>, mountpoint: &Path, wanted: &Listing, content: &Path) {
    let mounted = mount(spec, store, mountpoint);
    tree_listing(mountpoint).assert_same(wanted);
    assert!(contents(mountpoint) == contents(content), "the content of {} differs", spec.display());
    assert!(mounted.end());
}

#[test]
fn trees_of_casync_are_mounted_listed_and_read() {
    let (true, Some(casync)) = (can_mount(), peer("casync")) else { return };
    let scratch = Scratch::new();
    let (source, mountpoint) = (scratch.dir("source"), scratch.dir("m"));
    Corner::ALL.build(&source);
    let wanted = tree_listing(&source);
    for (name, store, args) in [
        ("plain.catar", None, &["--digest=sha256"][..]),
        ("usual.caidx", Some("usual.castr"), &[]),
        ("other.caidx", Some("other.castr"), &["--digest=sha256", "--compression=xz", "--chunk-size=4096"]),
        ("gzip.caidx", Some("gzip.castr"), &["--compression=gzip", "--chunk-size=1000:5000:9000"]),
    ] {
        let (spec, store) = (scratch.join(name), store.map(|store| scratch.join(store)));
        let mut make = casync.command();
        make.arg("make").args(args).args(store.iter().map(|store| format!("--store={}", store.display())));
        run_ok(make, &[&spec, &source]);
        check_mount(&spec, store.as_deref(), &mountpoint, &wanted, &source);
        check_verbs(&spec, store.as_deref(), &wanted, &source);
    }
}

/// `ls` and `cat` of an archive show what a listing and a directory have.
#[track_caller]
fn check_verbs(spec: &Path, store: Option<&Path>, wanted: &Listing, source: &Path) {
    let with_store = |verb: &str| {
        let mut command = caifs();
        command.arg(verb).arg(spec);
        if let Some(store) = store {
            command.arg("-s").arg(store);
        }
        command
    };
    let listed = run(with_store("ls").arg("-R")).ok().stdout;
    // In the archive's order: the names of a directory by their bytes, each followed by what is in it. A name with a newline
    // takes two lines, so the text is compared and not its lines.
    let mut paths: Vec<Vec<&[u8]>> = wanted
        .entries()
        .filter(|(path, _)| !path.is_empty())
        .map(|(path, _)| path.split(|&byte| byte == b'/').collect())
        .collect();
    paths.sort();
    let text: Vec<u8> = paths.into_iter().flat_map(|names| [names.join(&b'/'), vec![b'\n']].concat()).collect();
    assert_eq!(listed.escape_ascii().to_string(), text.escape_ascii().to_string());
    for (path, content) in contents(source) {
        // Some of the many alike are enough.
        if path.starts_with("many") && !path.ends_with("entry-7") {
            continue;
        }
        let read = run(with_store("cat").arg("--path").arg(&path)).ok().stdout;
        assert!(read == content, "cat of {}", path.display());
    }
}

#[test]
fn the_nanosecond_before_1970_is_shown_and_never_stored() {
    let Some(casync) = peer("casync") else { return };
    let scratch = Scratch::new();
    let (source, theirs, ours) = (scratch.dir("source"), scratch.join("theirs.catar"), scratch.join("ours.catar"));
    let last = std::time::UNIX_EPOCH - std::time::Duration::from_nanos(1);
    fs::File::create_new(source.join("file")).unwrap().set_modified(last).unwrap();
    // casync stores a number that its own reader refuses.
    run_ok(casync.command(), &[&"make", &theirs, &source]);
    run_ok(caifs(), &[&"tar", &ours, &source]);
    run(casync.command().arg("list").arg(&theirs)).fails();
    run_ok(casync.command(), &[&"list", &ours]);
    let shown = |archive: &Path| run_ok(caifs(), &[&"ls", &"--json", &archive]).text();
    assert!(shown(&theirs).contains("\"mtime_ns\":-1,") && shown(&ours).contains("\"mtime_ns\":-2,"));
}

/// FIFOs and sockets, which desync leaves out (it writes their names without a file).
fn is_pipe_or_socket(_: &[u8], entry: &Entry) -> bool {
    matches!(entry.mode & libc::S_IFMT, libc::S_IFIFO | libc::S_IFSOCK)
}

#[test]
fn trees_of_desync_are_mounted_with_their_oddities() {
    let (true, Some(desync)) = (can_mount(), peer("desync")) else { return };
    let scratch = Scratch::new();
    let (source, mountpoint) = (scratch.dir("source"), scratch.dir("m"));
    Corner::ALL.build(&source);
    let wanted = tree_listing(&source).without(is_pipe_or_socket);
    let (archive, index, store) = (scratch.join("x.catar"), scratch.join("x.caidx"), scratch.dir("x.castr"));
    run_ok(desync.command(), &[&"tar", &archive, &source]);
    check_mount(&archive, None, &mountpoint, &wanted, &source);
    run_ok(desync.command(), &[&"tar", &"-i", &"-s", &store, &index, &source]);
    check_mount(&index, Some(&store), &mountpoint, &wanted, &source);
    check_verbs(&index, Some(&store), &wanted, &source);
}

#[test]
fn an_unsorted_archive_that_desync_made_from_a_tar_stream_is_mounted() {
    let (true, Some(desync), Some(tar)) = (can_mount(), peer("desync"), peer("tar")) else { return };
    let scratch = Scratch::new();
    let (source, mountpoint) = (scratch.dir("source"), scratch.dir("m"));
    let order = ["z", "m", "m/y", "m/deep", "m/deep/b", "m/deep/a", "m/x", "a", "link"];
    fs::create_dir_all(source.join("m/deep")).unwrap();
    for (i, name) in ["z", "m/y", "m/deep/b", "m/deep/a", "m/x", "a"].into_iter().enumerate() {
        fs::write(source.join(name), noise(1 + 30_000 * i)).unwrap();
    }
    symlink("m/deep/b", source.join("link")).unwrap();
    xattr::set(source.join("m/x"), "user.one", b"value").unwrap();
    xattr::set(source.join("m/x"), "user.empty", b"").unwrap();
    let (stream, archive) = (scratch.join("x.tar"), scratch.join("x.catar"));
    let mut pack = tar.command();
    pack.args(["--format=posix", "--xattrs", "--no-recursion", "-cf"]).arg(&stream).arg("-C").arg(&source).arg(".");
    run(pack.args(order.map(|name| format!("./{name}")))).ok();
    run_ok(desync.command(), &[&"tar", &"--input-format", &"tar", &archive, &stream]);
    // tar's own records say less of a time than the nanosecond when it is a whole one; nothing here is.
    let wanted = tree_listing(&source);
    check_mount(&archive, None, &mountpoint, &wanted, &source);
    let listed = run_ok(caifs(), &[&"ls", &"-R", &archive]).text();
    assert_eq!(listed.lines().collect::<Vec<_>>(), order, "in the order of the archive");
    for name in order {
        assert_eq!(run_ok(caifs(), &[&"ls", &archive, &name]).status.code(), Some(0), "{name} is found by its hash");
    }
}

#[test]
fn a_single_file_that_desync_archived_is_mounted_on_a_file() {
    let (true, Some(desync)) = (can_mount(), peer("desync")) else { return };
    let scratch = Scratch::new();
    let content = noise(300_000);
    let (file, archive, on) = (scratch.file("file", &content), scratch.join("x.catar"), scratch.file("on", b""));
    xattr::set(&file, "user.one", b"value").unwrap();
    let (index, store) = (scratch.join("x.caidx"), scratch.dir("x.castr"));
    run_ok(desync.command(), &[&"tar", &archive, &file]);
    run_ok(desync.command(), &[&"tar", &"-i", &"-s", &store, &index, &file]);
    for (spec, store) in [(&archive, None), (&index, Some(store.as_path()))] {
        let mounted = mount(spec, store, &on);
        tree_listing(&on).assert_same(&tree_listing(&file));
        assert!(fs::read(&on).unwrap() == content);
        assert!(mounted.end());
    }
    let dir = scratch.dir("dir");
    let refused = run(caifs().arg("mount").arg(&archive).arg(&dir)).fails();
    assert!(refused.error_line().contains("single file"), "{}", refused.stderr);
}

#[test]
fn archives_are_byte_for_byte_those_of_casync() {
    let Some(casync) = peer("casync") else { return };
    let scratch = Scratch::new();
    let source = scratch.dir("source");
    Corner::ALL.build(&source);
    for (i, name) in ["kept", "dropped", "sub/dropped"].into_iter().enumerate() {
        fs::create_dir_all(source.join("excluding/sub")).unwrap();
        fs::write(source.join("excluding").join(name), noise(i)).unwrap();
    }
    fs::write(source.join("excluding/.caexclude"), "# what is left out\ndropped\n").unwrap();
    let (ours, theirs) = (scratch.join("ours.catar"), scratch.join("theirs.catar"));
    let sets = [
        "",
        "--with=unix",
        "--with=best",
        "--with=fat",
        "--with=fuse",
        "--with=chattr",
        "--with=fat-attrs",
        "--with=privileged",
        "--with=16bit-uids",
        "--with=32bit-uids",
        "--with=user-names",
        "--with=sec-time",
        "--with=2sec-time",
        "--with=usec-time",
        "--with=read-only",
        "--with=permissions",
        "--with=symlinks",
        "--with=device-nodes",
        "--with=acl",
        "--with=xattrs",
        "--with=fcaps",
        "--without=privileged",
        "--without=xattrs",
        "--without=symlinks",
        "--without=fifos",
        "--without=sockets",
        "--without=acl",
        "--without=all",
        "--digest=sha256",
    ];
    // 16 bits do not hold the large ids of the tree: casync gives up, and so do we.
    let too_small = ["--with=unix", "--with=16bit-uids"];
    let make = |set: &str| {
        let args: Vec<&str> = set.split(' ').filter(|arg| !arg.is_empty()).collect();
        let theirs_made = run(casync.command().arg("make").args(&args).arg(&theirs).arg(&source));
        let ours_made = run(caifs().arg("tar").args(&args).arg(&ours).arg(&source));
        assert_eq!(ours_made.status.success(), theirs_made.status.success(), "{set}: {}", ours_made.stderr);
        theirs_made.status.success()
    };
    for set in sets {
        match make(set) {
            true => assert_same_bytes(&ours, &theirs, set),
            false => assert!(too_small.contains(&set), "{set}"),
        }
    }
    if is_root() {
        fs::remove_file(source.join("privileged/large-ids")).unwrap();
    }
    for set in too_small {
        assert!(make(set), "{set}");
        assert_same_bytes(&ours, &theirs, set);
    }
}

#[test]
fn a_tree_of_ours_is_read_by_every_verb_of_casync() {
    let Some(casync) = peer("casync") else { return };
    let scratch = Scratch::new();
    let source = scratch.dir("source");
    Corner::FOR_CASYNC_EXTRACT.build(&source);
    for digest in ["sha512-256", "sha256"] {
        let digest_arg = format!("--digest={digest}");
        let make = |program: Command, verb: &[&str], index: &Path, store: &Path| {
            let mut command = program;
            let store_arg = format!("--store={}", store.display());
            run(command.args(verb).args([&digest_arg, &store_arg]).arg(index).arg(&source)).ok();
        };
        let path = |name: &str| scratch.join(format!("{digest}-{name}"));
        let (ours, store, theirs, their_store) =
            (path("ours.caidx"), path("ours.castr"), path("theirs.caidx"), path("theirs.castr"));
        make(caifs(), &["tar", "-i"], &ours, &store);
        make(casync.command(), &["make"], &theirs, &their_store);
        assert_same_bytes(&ours, &theirs, "the index");
        let names = |store: &Path| chunk_files(store).into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names(&store), names(&their_store));

        let store_arg = format!("--store={}", store.display());
        let out = path("out");
        run_ok(casync.command(), &[&"extract", &store_arg, &ours, &out]);
        let digest_of = |what: &Path| run_ok(casync.command(), &[&"digest", &digest_arg, &store_arg, &what]).text();
        assert_eq!(digest_of(&out), digest_of(&source));
        assert_eq!(digest_of(&ours), digest_of(&source));
        tree_listing(&out).assert_same(&tree_listing(&source));
        assert!(contents(&out) == contents(&source));
        for verb in ["list", "mtree"] {
            let of_ours = run_ok(casync.command(), &[&verb, &digest_arg, &store_arg, &ours]).stdout;
            let of_source = run_ok(casync.command(), &[&verb, &digest_arg, &source]).stdout;
            assert!(of_ours == of_source && of_ours.len() > 10_000, "{verb}");
        }
        if !can_mount() {
            continue;
        }
        let mountpoint = scratch.join("m");
        fs::create_dir_all(&mountpoint).unwrap();
        let mut serve = casync.command();
        let _mounted =
            Mounted::by_server(serve.arg("mount").arg(&store_arg).arg(&ours).arg(&mountpoint), &mountpoint).unwrap();
        // casync's own mount shows symlinks without a size and leaves most attributes out (with its own archives too).
        let comparable = |listing: Listing| {
            listing.map(|path, entry| {
                entry.xattrs.clear();
                entry.size = entry.size.filter(|_| entry.mode & libc::S_IFMT == libc::S_IFREG);
                // The root is the mount's own.
                if path.is_empty() {
                    (entry.mtime, entry.mode) = ((0, 0), 0);
                }
            })
        };
        comparable(tree_listing(&mountpoint)).assert_same(&comparable(tree_listing(&source)));
        assert!(contents(&mountpoint) == contents(&source), "what casync mount shows");
    }
}

/// A tree that desync can store and restore in full.
fn plain_tree(root: &Path) {
    let mut random = Xorshift::seeded(3);
    for dir in ["a", "a/b", "c", "empty"] {
        fs::create_dir(root.join(dir)).unwrap();
    }
    for i in 0..40 {
        let dir = ["", "a", "a/b", "c"][i % 4];
        fs::write(root.join(dir).join(format!("file {i}")), random.bytes(i * i * 200)).unwrap();
    }
    symlink("a/b", root.join("link")).unwrap();
    if is_root() {
        std::os::unix::fs::chown(root.join("a/file 1"), Some(65_534), Some(1)).unwrap();
    }
}

#[test]
fn a_tree_of_ours_is_that_of_desync_and_unpacked_by_it() {
    let Some(desync) = peer("desync") else { return };
    let scratch = Scratch::new();
    let source = scratch.dir("source");
    plain_tree(&source);
    let (ours, theirs) = (scratch.join("ours.catar"), scratch.join("theirs.catar"));
    run_ok(caifs(), &[&"tar", &"--cut-rule", &"desync", &ours, &source]);
    run_ok(desync.command(), &[&"tar", &theirs, &source]);
    assert_same_bytes(&ours, &theirs, "an archive with desync's rule");
    let (our_index, their_index, store) =
        (scratch.join("ours.caidx"), scratch.join("theirs.caidx"), scratch.dir("s.castr"));
    run_ok(desync.command(), &[&"tar", &"-i", &"-s", &store, &their_index, &source]);
    // What desync has stored already is not stored again.
    let printed = run_ok(caifs(), &[&"tar", &"-i", &"-s", &store, &"--cut-rule=desync", &our_index, &source]);
    assert!(printed.stdout.is_empty() && printed.stderr.is_empty());
    assert_same_bytes(&our_index, &their_index, "an index with desync's rule");

    let (usual, store) = (scratch.join("usual.caidx"), scratch.join("usual.castr"));
    run_ok(caifs(), &[&"tar", &"-i", &"-s", &store, &usual, &source]);
    let usual_archive = scratch.join("usual.catar");
    run_ok(caifs(), &[&"tar", &usual_archive, &source]);
    let outs: Vec<PathBuf> = ["one", "two", "three"].into_iter().map(|name| scratch.dir(name)).collect();
    run_ok(desync.command(), &[&"untar", &"-i", &"-s", &store, &usual, &outs[0]]);
    run_ok(desync.command(), &[&"untar", &usual_archive, &outs[1]]);
    run_ok(desync.command(), &[&"untar", &ours, &outs[2]]);
    // desync gives symlinks no time of their own.
    let without_link_times = |listing: Listing| {
        listing.map(|_, entry| entry.mtime = if entry.target.is_some() { (0, 0) } else { entry.mtime })
    };
    for out in outs {
        without_link_times(tree_listing(&out)).assert_same(&without_link_times(tree_listing(&source)));
        assert!(contents(&out) == contents(&source));
    }
    let listed = |index: &Path| run_ok(desync.command(), &[&"mtree", &"-i", &"-s", &store, &index]).text();
    assert!(listed(&usual).contains("file\\0407") || listed(&usual).contains("file 7"), "{}", listed(&usual));
}

#[test]
fn indexes_of_blobs_are_theirs_and_restored_by_them() {
    let (Some(casync), Some(desync)) = (peer("casync"), peer("desync")) else { return };
    let scratch = Scratch::new();
    let blob = scratch.file("blob", crate::chunks::sample_blob(9_000_000));
    for (i, (digest, kib)) in [
        ("sha512-256", [16, 64, 256]),
        ("sha256", [16, 64, 256]),
        ("sha512-256", [3, 17, 40]),
        ("sha256", [64, 64, 64]),
    ]
    .into_iter()
    .enumerate()
    {
        let path = |name: &str| scratch.join(format!("{i}-{name}"));
        let (ours, as_desync, of_casync, of_desync, store, out) =
            (path("o.caibx"), path("d.caibx"), path("c.caibx"), path("d2.caibx"), path("o.castr"), path("out"));
        let sizes = kib.map(|kib| kib.to_string()).join(":");
        let byte_sizes = kib.map(|kib| (kib * 1024).to_string()).join(":");
        let (digest_arg, store_arg) = (format!("--digest={digest}"), format!("--store={}", store.display()));
        run_ok(caifs(), &[&"make", &digest_arg, &"-m", &sizes, &"-s", &store, &ours, &blob]);
        run_ok(
            caifs(),
            &[&"make", &digest_arg, &"-m", &sizes, &"-s", &store, &"--cut-rule", &"desync", &as_desync, &blob],
        );
        let their_store = format!("--store={}", path("c.castr").display());
        run_ok(
            casync.command(),
            &[&"make", &digest_arg, &their_store, &format!("--chunk-size={byte_sizes}"), &of_casync, &blob],
        );
        run_ok(desync.command(), &[&"make", &digest_arg, &"-m", &sizes, &of_desync, &blob]);
        assert_same_bytes(&ours, &of_casync, "casync's rule");
        assert_same_bytes(&as_desync, &of_desync, "desync's rule");
        for index in [&ours, &as_desync] {
            run_ok(desync.command(), &[&"verify-index", &digest_arg, index, &blob]);
            run_ok(desync.command(), &[&"extract", &digest_arg, &"-s", &store, index, &out]);
            assert!(fs::read(&out).unwrap() == fs::read(&blob).unwrap());
            fs::remove_file(&out).unwrap();
            run_ok(casync.command(), &[&"extract", &digest_arg, &store_arg, index, &out]);
            assert!(fs::read(&out).unwrap() == fs::read(&blob).unwrap());
            fs::remove_file(&out).unwrap();
        }
        run_ok(caifs(), &[&"verify-index", &of_casync, &blob]);
        run_ok(caifs(), &[&"verify-index", &of_desync, &blob]);
    }
}

/// A filesystem image mounted through a loop device, undone on drop.
struct LoopMount(PathBuf);

impl LoopMount {
    /// `None` where loop devices cannot be had, which is said.
    fn new(image: &Path, mountpoint: &Path) -> Option<Self> {
        let options = "loop,ro,noload";
        let finished = run(command("mount", ["-t", "ext4", "-o", options]).arg(image).arg(mountpoint));
        if !finished.status.success() {
            missing(&format!("loop devices ({})", finished.stderr.trim_end()));
            return None;
        }
        Some(Self(mountpoint.to_owned()))
    }
}

impl Drop for LoopMount {
    fn drop(&mut self) {
        // Not lazily at first: the loop device is free when this is done.
        if nix::mount::umount(&self.0).is_err() {
            mounted::unmount(&self.0);
        }
    }
}

#[test]
fn an_ext4_image_is_checked_and_mounted_from_the_mount() {
    let (true, Some(casync)) = (can_mount(), peer("casync")) else { return };
    let (Some(mkfs), Some(e2fsck)) = (peer("mkfs.ext4"), peer("e2fsck")) else { return };
    let scratch = Scratch::new();
    let source = scratch.dir("source");
    Corner::ALL.build(&source);
    fs::write(source.join("large"), noise(9_000_000)).unwrap();
    // Larger than an inode of such a small filesystem can hold.
    fs::remove_file(source.join("xattrs/large")).unwrap();
    let image = scratch.join("disk.img");
    run(mkfs.command().args(["-q", "-F", "-d"]).arg(&source).arg(&image).arg("48M")).ok();
    let (index, store, mountpoint) = (scratch.join("disk.caibx"), scratch.join("disk.castr"), scratch.dir("m"));
    let store_arg = format!("--store={}", store.display());
    run_ok(casync.command(), &[&"make", &"--digest=sha256", &store_arg, &index, &image]);
    let mounted = mount(&index, Some(&store), &mountpoint);
    let shown = mountpoint.join("disk");
    assert_same_bytes(&shown, &image, "the image");
    run_ok(e2fsck.command(), &[&"-fn", &shown]);
    let (native, ours) = (scratch.dir("native"), scratch.dir("ours"));
    {
        let (Some(_native), Some(_ours)) = (LoopMount::new(&image, &native), LoopMount::new(&shown, &ours)) else {
            return;
        };
        tree_listing(&ours).assert_same(&tree_listing(&native));
        let content = contents(&ours);
        assert!(content == contents(&native));
        assert!(content.len() > 300 && content[Path::new("large")] == noise(9_000_000));
    }
    assert!(mounted.end(), "the daemon ends after the loop device is gone");
}
