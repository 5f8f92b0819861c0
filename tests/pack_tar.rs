//! Packing directories: the archive is, byte for byte, what the peers make of the same tree.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use caifs::format::catar::FeatureFlags;
use caifs::pack::tar::{TarOptions, TarStats, tar};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::support::corner::Corner;
use crate::support::mounted;
use crate::support::peers::{self, Peer};
use crate::support::scratch::Scratch;
use crate::support::{is_root, run};

fn packed(root: &Path, flags: FeatureFlags) -> Vec<u8> {
    let mut archive = Vec::new();
    let options = TarOptions { feature_flags: flags, ..TarOptions::default() };
    let stats = tar(root, &options, &mut archive).unwrap();
    assert_eq!(stats.archive_bytes, archive.len() as u64);
    archive
}

/// What `casync make` writes with these options.
fn made<S: AsRef<OsStr>>(casync: &Peer, scratch: &Scratch, root: &Path, options: &[S]) -> Vec<u8> {
    let path = scratch.join("peer.catar");
    run::run(casync.command().arg("make").args(options).arg(&path).arg(root)).ok();
    fs::read(&path).unwrap()
}

/// A corner tree without the one time that casync writes and then cannot read.
fn corner(scratch: &Scratch, corner: Corner) -> PathBuf {
    let root = scratch.dir("corner");
    corner.build(&root);
    fs::remove_file(root.join("times/just-before")).unwrap();
    root
}

#[track_caller]
fn assert_same(ours: &[u8], theirs: &[u8], what: &str) {
    let first = ours.iter().zip(theirs).position(|(one, other)| one != other);
    let at = first.unwrap_or(ours.len().min(theirs.len()));
    assert!(ours == theirs, "{what}: {} and {} bytes, the first difference is at {at}", ours.len(), theirs.len());
}

fn flags(names: &str) -> FeatureFlags {
    names.split(' ').fold(FeatureFlags(0), |all, name| all.with(FeatureFlags::parse(name).unwrap()))
}

fn made_by_casync() -> FeatureFlags {
    FeatureFlags::SHA512_256.with(FeatureFlags::EXCLUDE_FILE).with(FeatureFlags::EXCLUDE_NODUMP)
}

#[test]
fn the_corner_tree_is_packed_as_casync_packs_it() {
    let Some(casync) = peers::peer("casync") else { return };
    let scratch = Scratch::new();
    let root = corner(&scratch, Corner::ALL);
    assert_same(&packed(&root, FeatureFlags::CASYNC_DEFAULT), &made::<&str>(&casync, &scratch, &root, &[]), "default");
    let with = [
        "best",
        "fat",
        "fuse",
        "chattr",
        "privileged",
        "32bit-uids user-names acl xattrs usec-time",
        "user-names 2sec-time",
    ];
    for with in with {
        let options: Vec<String> = with.split(' ').map(|name| format!("--with={name}")).collect();
        let theirs = made(&casync, &scratch, &root, &options);
        assert_same(&packed(&root, flags(with).with(made_by_casync())), &theirs, with);
    }
    let without =
        ["acl", "xattrs", "acl permissions", "nsec-time", "user-names", "symlinks fifos", "sockets device-nodes"];
    for without in without {
        let options: Vec<String> = without.split(' ').map(|name| format!("--without={name}")).collect();
        let theirs = made(&casync, &scratch, &root, &options);
        let ours = FeatureFlags::WITH_MASK.without(flags(without)).with(made_by_casync());
        assert_same(&packed(&root, ours), &theirs, without);
    }
    let theirs = made(&casync, &scratch, &root, &["--exclude-nodump=no", "--digest=sha256"]);
    let ours = FeatureFlags::WITH_MASK.with(FeatureFlags::EXCLUDE_FILE);
    assert_same(&packed(&root, ours), &theirs, "nodump, sha256");
}

#[test]
fn a_tree_of_small_owners_is_packed_as_casync_packs_it_for_unix() {
    let Some(casync) = peers::peer("casync") else { return };
    let scratch = Scratch::new();
    // 16 bits do not hold the corner tree's larger owners: casync refuses it, and so do we.
    let root = corner(&scratch, Corner { privileged: false, ..Corner::ALL });
    let theirs = made(&casync, &scratch, &root, &["--with=unix"]);
    assert_same(&packed(&root, flags("unix").with(made_by_casync())), &theirs, "unix");
    if is_root() {
        std::os::unix::fs::chown(root.join("names/case"), Some(100_000), None).unwrap();
        let options = TarOptions { feature_flags: flags("unix"), ..TarOptions::default() };
        let error = tar(&root, &options, &mut io::sink()).unwrap_err().to_string();
        assert!(error.contains("names/case: cannot be archived: an owner") && error.lines().count() == 1, "{error}");
    }
}

#[test]
fn with_the_flags_of_desync_the_archive_is_that_of_desync() {
    let Some(desync) = peers::peer("desync") else { return };
    let scratch = Scratch::new();
    let root = corner(&scratch, Corner::ALL);
    // desync writes names without nodes for these.
    fs::remove_dir_all(root.join("special")).unwrap();
    for path in remove_special(&root) {
        fs::remove_file(path).unwrap();
    }
    let path = scratch.join("peer.catar");
    run::run(desync.command().arg("tar").arg(&path).arg(&root)).ok();
    let flags = FeatureFlags::DESYNC.without(FeatureFlags::EXCLUDE_FILE).without(FeatureFlags::EXCLUDE_NODUMP);
    // Neither exclude files nor nodump mean anything to desync, though its flags say so.
    assert!(flags.is_desync());
    assert_same(&packed(&root, FeatureFlags::DESYNC), &fs::read(&path).unwrap(), "desync");
}

/// FIFOs and sockets of a tree.
fn remove_special(dir: &Path) -> Vec<PathBuf> {
    use std::os::unix::fs::FileTypeExt;
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let file_type = entry.file_type().unwrap();
        if file_type.is_dir() {
            found.extend(remove_special(&entry.path()));
        } else if file_type.is_fifo() || file_type.is_socket() {
            found.push(entry.path());
        }
    }
    found
}

#[test]
fn exclude_files_leave_out_what_casync_leaves_out() {
    let Some(casync) = peers::peer("casync") else { return };
    let cases: [&[(&str, &str)]; 12] = [
        &[(".caexclude", "*.o\n")],
        &[(".caexclude", "/b.c")],
        &[(".caexclude", "*.o\n!k.o\n"), ("d/.caexclude", "k.o\n")],
        &[(".caexclude", "*.o\n"), ("d/.caexclude", "!k.o\n")],
        &[(".caexclude", "*.o\n!d/k.o\n"), ("d/.caexclude", "*.o\n")],
        &[(".caexclude", "d/x/y/\n"), ("d/f/.caexclude", "/a.o\n")],
        &[(".caexclude", "foo/\n")],
        &[(".caexclude", "/*\n!/d\n")],
        &[(".caexclude", "d//f/*.o\n .hid \n# *\n\n")],
        &[(".caexclude", "d/f\n!d/f/k.o\n")],
        &[(".caexclude", "[ab].?\n.*\n")],
        &[(".caexclude", "*\n")],
    ];
    for files in cases {
        let scratch = Scratch::new();
        let root = scratch.dir("tree");
        for dir in ["d/f", "d/x/y", "foo", "x"] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        for file in [
            "a.o", "b.c", "foo/a.o", "foo/k.o", "d/a.o", "d/k.o", "d/f/a.o", "d/f/k.o", "d/x/y/z", ".hid", ".a.o",
            "d/foo",
        ] {
            fs::write(root.join(file), file).unwrap();
        }
        for (path, text) in files {
            fs::write(root.join(path), text).unwrap();
        }
        let what = format!("{files:?}");
        let theirs = made::<&str>(&casync, &scratch, &root, &[]);
        assert_same(&packed(&root, FeatureFlags::CASYNC_DEFAULT), &theirs, &what);
        // Not compared: casync 2 clears the flag for --exclude-file=no, and leaves the files out all the same.
        let feature_flags = FeatureFlags::CASYNC_DEFAULT.without(FeatureFlags::EXCLUDE_FILE);
        let all = TarOptions { feature_flags, ..TarOptions::default() };
        assert_eq!(tar(&root, &all, &mut io::sink()).unwrap().n_excluded, 0, "{what}");
    }
}

#[test]
fn an_exclude_file_that_is_none_is_an_error_with_its_line() {
    let scratch = Scratch::new();
    fs::create_dir_all(scratch.join("tree/sub")).unwrap();
    fs::write(scratch.join("tree/sub/.caexclude"), "a\n../b\n").unwrap();
    let error = tar(&scratch.join("tree"), &TarOptions::default(), &mut io::sink()).unwrap_err().to_string();
    assert!(error.contains("tree/sub/.caexclude: line 2 "), "{error}");
}

#[test]
fn mounts_below_are_packed_or_left_out_as_casync_does() {
    let Some(casync) = peers::peer("casync") else { return };
    if !is_root() {
        return peers::missing("root: nothing can be mounted");
    }
    let scratch = Scratch::new();
    let root = scratch.dir("tree");
    for dir in ["proc", "tmp", "bind", "plain"] {
        fs::create_dir(root.join(dir)).unwrap();
    }
    fs::write(root.join("plain/file"), "plain").unwrap();
    fs::write(root.join("version"), "a bound file of /proc").unwrap();
    let mount = |args: &[&str], target: &str| {
        run::run(run::command("mount", args.iter().map(Path::new)).arg(root.join(target))).ok();
    };
    mount(&["-t", "proc", "none"], "proc");
    mount(&["-t", "tmpfs", "none"], "tmp");
    mount(&["--bind", root.join("plain").to_str().unwrap()], "bind");
    mount(&["--bind", "/proc/version"], "version");
    fs::write(root.join("tmp/file"), "on a tmpfs").unwrap();
    let theirs = made::<&str>(&casync, &scratch, &root, &[]);
    let ours = packed(&root, FeatureFlags::CASYNC_DEFAULT);
    let theirs_without = made(&casync, &scratch, &root, &["--exclude-submounts=yes"]);
    let mut ours_without = Vec::new();
    let options = TarOptions { one_file_system: true, ..TarOptions::default() };
    let stats = tar(&root, &options, &mut ours_without).unwrap();
    for mountpoint in mounted::mountpoints_under(&scratch) {
        mounted::unmount(&mountpoint);
    }
    assert_same(&ours, &theirs, "with mounts");
    assert_same(&ours_without, &theirs_without, "without mounts");
    assert_eq!((stats.n_directories, stats.n_files, stats.n_excluded), (2, 1, 4));
}

/// Does something to the tree as soon as so many bytes are written.
struct Meddler<F: FnMut()> {
    after: usize,
    meddle: F,
    n_bytes: usize,
}

impl<F: FnMut()> Write for Meddler<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let before = self.n_bytes;
        self.n_bytes += bytes.len();
        if before <= self.after && self.n_bytes > self.after {
            (self.meddle)();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn meddled(root: &Path, after: usize, meddle: impl FnMut()) -> Result<TarStats, String> {
    let mut sink = Meddler { after, meddle, n_bytes: 0 };
    tar(root, &TarOptions::default(), &mut sink).map_err(|error| error.to_string())
}

#[test]
fn a_file_that_changes_its_length_while_packed_is_an_error_with_its_name() {
    let scratch = Scratch::new();
    let root = scratch.dir("tree");
    fs::create_dir(root.join("sub")).unwrap();
    let file = root.join("sub/large");
    let set_len = |len| fs::File::options().write(true).open(&file).unwrap().set_len(len).unwrap();
    fs::write(&file, vec![1; 5 << 20]).unwrap();
    let error = meddled(&root, 2 << 20, || set_len(3 << 20)).unwrap_err();
    assert_eq!(error, format!("{}: shrank while packed", file.display()));
    fs::write(&file, vec![1; 5 << 20]).unwrap();
    let error = meddled(&root, 2 << 20, || set_len(8 << 20)).unwrap_err();
    assert_eq!(error, format!("{}: grew while packed", file.display()));
    fs::write(&file, vec![1; 5 << 20]).unwrap();
    assert_eq!(meddled(&root, 2 << 20, || {}).unwrap().payload_bytes, 5 << 20);
}

#[test]
fn a_file_that_goes_away_before_its_turn_is_left_out() {
    let scratch = Scratch::new();
    let root = scratch.dir("tree");
    fs::write(root.join("a"), vec![1; 3 << 20]).unwrap();
    fs::write(root.join("b"), "b").unwrap();
    fs::create_dir(root.join("c")).unwrap();
    symlink("a", root.join("d")).unwrap();
    let stats = meddled(&root, 1 << 20, || {
        fs::remove_file(root.join("b")).unwrap();
        fs::remove_dir(root.join("c")).unwrap();
        fs::remove_file(root.join("d")).unwrap();
    })
    .unwrap();
    assert_eq!((stats.n_files, stats.n_vanished), (1, 3));
}

#[test]
fn files_that_are_not_in_memory_are_packed_the_same() {
    let scratch = Scratch::new();
    let root = scratch.dir("tree");
    for i in 0..200u32 {
        let dir = root.join(format!("{:02}", i % 7));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(i.to_string()), vec![i as u8; 977 * i as usize]).unwrap();
    }
    let warm = packed(&root, FeatureFlags::CASYNC_DEFAULT);
    for dir in fs::read_dir(&root).unwrap() {
        for file in fs::read_dir(dir.unwrap().path()).unwrap() {
            let file = fs::File::open(file.unwrap().path()).unwrap();
            file.sync_all().unwrap();
            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        }
    }
    assert_same(&packed(&root, FeatureFlags::CASYNC_DEFAULT), &warm, "cold");
}

#[test]
fn what_cannot_be_packed_or_written_is_said_in_one_line() {
    let scratch = Scratch::new();
    let file = scratch.file("file", "no directory");
    let error = tar(&file, &TarOptions::default(), &mut io::sink()).unwrap_err().to_string();
    assert_eq!(error, format!("{}: Not a directory", file.display()));
    let error = tar(&scratch.join("none"), &TarOptions::default(), &mut io::sink()).unwrap_err().to_string();
    assert!(error.ends_with("none: No such file or directory"), "{error}");

    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::Error::from_raw_os_error(libc::ENOSPC))
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let error = tar(&scratch, &TarOptions::default(), &mut Full).unwrap_err().to_string();
    assert_eq!(error, "the archive: No space left on device");
}

#[test]
fn no_time_records_none() {
    let scratch = Scratch::new();
    let root = scratch.dir("tree");
    fs::write(root.join("a"), "a").unwrap();
    let mut archive = Vec::new();
    let options = TarOptions { no_time: true, ..TarOptions::default() };
    tar(&root, &options, &mut archive).unwrap();
    assert_eq!(archive[56..64], [0; 8], "the root's time");
    let child = 64 + 18;
    assert_eq!(archive[child + 56..child + 64], [0; 8], "the child's time");
}
