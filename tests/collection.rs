//! A directory of indexes as one mount: what is shown and how it is called, owners and permissions, refusals.
//!
//! * [`changes`]: indexes that come, go and are replaced; [`replaced`]: the same when all else goes wrong. [`servers`]: directories elsewhere.
//!   [`many`]: a thousand of them.

mod changes;
mod many;
mod replaced;
mod servers;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::mount::{can_mount, contents};
use crate::support::blob::noise;
use crate::support::corner::Corner;
use crate::support::listing::tree_listing;
use crate::support::mounted::Mounted;
use crate::support::peers::peer;
use crate::support::run::{Finished, caifs, run};
use crate::support::scratch::Scratch;

/// How long what must happen by itself may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Content to make indexes of, a directory for them, and a place to mount it.
struct Ground {
    scratch: Scratch,
    tree: PathBuf,
    index: PathBuf,
    store: PathBuf,
    mnt: PathBuf,
}

impl Ground {
    fn new() -> Self {
        let scratch = Scratch::new();
        let (tree, index, mnt) = (scratch.dir("tree"), scratch.dir("indexes"), scratch.dir("mnt"));
        fs::create_dir(tree.join("dir")).unwrap();
        fs::write(tree.join("dir/file"), noise(300_000)).unwrap();
        symlink("dir/file", tree.join("link")).unwrap();
        let store = index.join("default.castr");
        Self { scratch, tree, index, store, mnt }
    }

    /// An image of this content, under a name below the directory of indexes.
    #[track_caller]
    fn image(&self, name: &str, content: &[u8]) -> PathBuf {
        let (index, blob) = (self.index.join(name), self.scratch.file("blob", content));
        run(caifs().args(["make", "-s"]).arg(&self.store).arg(&index).arg(blob)).ok();
        index
    }

    /// The tree as an index, or as a plain archive if the name says so.
    #[track_caller]
    fn tree(&self, name: &str) {
        let mut tar = caifs();
        match name.ends_with(".catar") {
            true => tar.arg("tar"),
            false => tar.args(["tar", "-i", "-s"]).arg(&self.store),
        };
        run(tar.arg(self.index.join(name)).arg(&self.tree)).ok();
    }

    /// The command that mounts a place; nothing of this machine's settings counts.
    fn command(&self, spec: impl AsRef<Path>, args: &[&str]) -> Command {
        let nowhere = "/nonexistent";
        let mut command = caifs();
        command.env("HOME", nowhere).env("XDG_CONFIG_HOME", nowhere).env("CAIFS_CONFIG_DIR", nowhere);
        command.arg("mount").arg(spec.as_ref()).arg(&self.mnt).args(args);
        command
    }

    #[track_caller]
    fn mount(&self, args: &[&str]) -> Mounted {
        Mounted::by_command(&mut self.command(&self.index, args), &self.mnt).unwrap()
    }

    #[track_caller]
    fn refused(&self, spec: impl AsRef<Path>, args: &[&str]) -> Finished {
        run(&mut self.command(spec, args)).fails()
    }

    /// The names in a directory of the mount, in order.
    #[track_caller]
    fn names(&self, below: &str) -> Vec<String> {
        names(&self.mnt.join(below))
    }

    /// A number that the mount tells of itself.
    #[track_caller]
    fn own(&self, name: &str) -> u64 {
        let value = xattr::get(&self.mnt, format!("user.caifs.{name}")).unwrap().unwrap();
        let text = String::from_utf8(value).unwrap();
        text.split(' ').next().unwrap().parse().unwrap()
    }

    /// Compares a directory of the mount with the tree.
    #[track_caller]
    fn check_tree(&self, below: &str) {
        let shown = self.mnt.join(below);
        tree_listing(&shown).assert_same(&tree_listing(&self.tree));
        assert!(contents(&shown) == contents(&self.tree), "{below}: contents");
    }
}

#[track_caller]
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Waits until something is so.
#[track_caller]
fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn errno<T: std::fmt::Debug>(outcome: std::io::Result<T>) -> Option<i32> {
    outcome.unwrap_err().raw_os_error()
}

#[test]
fn images_trees_and_archives_of_all_programs_are_files_and_directories() {
    if !can_mount() {
        return;
    }
    let (Some(casync), Some(desync)) = (peer("casync"), peer("desync")) else { return };
    let ground = Ground::new();
    Corner::ALL.build(&ground.scratch.dir("corner"));
    fs::rename(ground.scratch.join("corner"), ground.tree.join("corner")).unwrap();
    fs::create_dir_all(ground.index.join("sub/deep")).unwrap();
    fs::create_dir(ground.index.join("empty")).unwrap();
    let content = noise(3_000_000);
    ground.image("ours.caibx", &content);
    ground.tree("ours.caidx");
    ground.tree("archive.catar");
    ground.image("sub/deep/below.caibx", &content[..100_000]);
    let blob = ground.scratch.file("blob", &content);
    let at = |name: &str| ground.index.join(name);
    run(casync.command().arg("make").arg("--store").arg(&ground.store).arg(at("casync.caibx")).arg(&blob)).ok();
    run(casync.command().arg("make").arg("--store").arg(&ground.store).arg(at("sub/tree.caidx")).arg(&ground.tree))
        .ok();
    run(desync.command().args(["make", "-s"]).arg(&ground.store).arg(at("desync.caibx")).arg(&blob)).ok();
    // desync knows neither ACLs nor capabilities.
    let plain = ground.scratch.dir("plain");
    fs::write(plain.join("file"), noise(50_000)).unwrap();
    run(desync.command().args(["tar", "-i", "-s"]).arg(&ground.store).arg(at("desync-tree.caidx")).arg(&plain)).ok();
    fs::write(at("notes.txt"), "no index").unwrap();
    fs::copy(at("ours.caibx"), at(".#ours.caibx0123456789abcdef")).unwrap();
    symlink("ours.caibx", at("link.caibx")).unwrap();
    symlink("..", at("sub/up")).unwrap();

    let store = ground.store.display().to_string();
    let mounted =
        Mounted::by_command(&mut ground.command(format!("{}/", ground.index.display()), &["-s", &store]), &ground.mnt)
            .unwrap();
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(table.contains(&format!(" - fuse.caifs {} ", ground.index.display())), "as mount(8) looks for it");
    assert_eq!(
        ground.names(""),
        ["archive", "casync", "desync", "desync-tree", "empty", "link", "ours.caibx", "ours.caidx", "sub"]
    );
    assert_eq!(
        (ground.names("sub"), ground.names("sub/deep"), ground.names("empty")),
        (vec!["deep".to_owned(), "tree".to_owned()], vec!["below".to_owned()], Vec::new())
    );
    assert_eq!((ground.own("parts"), ground.own("fetches")), (0, 0), "a listing opens nothing");
    for name in ["ours.caibx", "casync", "desync", "link"] {
        let metadata = fs::metadata(ground.mnt.join(name)).unwrap();
        assert_eq!((metadata.len(), metadata.mode()), (3_000_000, libc::S_IFREG | 0o444), "{name}");
        assert_eq!(
            metadata.mtime(),
            fs::metadata(ground.index.join("ours.caibx")).unwrap().mtime().max(metadata.mtime())
        );
    }
    assert_eq!((ground.own("parts"), ground.own("fetches")), (0, 0), "the length of an image is in its index");
    for name in ["ours.caibx", "casync", "desync", "link"] {
        assert!(fs::read(ground.mnt.join(name)).unwrap() == content, "{name}");
    }
    assert_eq!(ground.own("parts"), 4);
    assert!(fs::read(ground.mnt.join("sub/deep/below")).unwrap() == content[..100_000]);
    // Attributes of a tree's own directory come from its first chunk, without opening it.
    let root = fs::metadata(ground.mnt.join("sub/tree")).unwrap();
    let wanted = fs::metadata(&ground.tree).unwrap();
    assert_eq!(
        (root.mode(), root.uid(), root.mtime(), root.mtime_nsec()),
        (wanted.mode(), wanted.uid(), wanted.mtime(), wanted.mtime_nsec())
    );
    assert_eq!(ground.own("parts"), 5);
    let wanted = tree_listing(&ground.tree).map(|_, entry| {
        // One nanosecond before 1970 is "no time" in the format, and stored as the nanosecond before.
        if entry.mtime == (-1, 999_999_999) {
            entry.mtime = (-1, 999_999_998);
        }
    });
    for (below, by) in [("ours.caidx", "caifs"), ("archive", "caifs"), ("sub/tree", "casync")] {
        let seen = tree_listing(&ground.mnt.join(below)).map(|_, entry| {
            if by == "casync" && entry.mtime == (-1, 999_999_999) {
                entry.mtime = (-1, 999_999_998);
            }
        });
        seen.assert_same(&wanted);
        assert!(contents(&ground.mnt.join(below)) == contents(&ground.tree), "{below}");
    }
    assert!(contents(&ground.mnt.join("desync-tree")) == contents(&plain));
    // Of a file in a part, where it comes from is told as in a mount of that part alone.
    let own = |path: &str, name: &str| {
        let value = xattr::get(ground.mnt.join(path), format!("user.caifs.{name}")).unwrap();
        value.map(|value| String::from_utf8(value).unwrap())
    };
    assert_eq!(own("archive/dir/file", "index").unwrap(), at("archive.catar").to_str().unwrap());
    assert_eq!(own("sub/deep/below", "index").unwrap(), at("sub/deep/below.caibx").to_str().unwrap());
    assert!(own("ours.caibx", "chunks").unwrap().parse::<u64>().unwrap() > 10);
    assert_eq!((own("sub", "index").unwrap(), own("sub", "parts")), (at("sub").display().to_string(), None));
    assert_eq!(fs::canonicalize(ground.mnt.join("archive/dir/../..")).unwrap(), ground.mnt);
    // No two files of the mount have one number.
    let mut numbers = Vec::new();
    let mut waiting = vec![ground.mnt.clone()];
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let metadata = path.symlink_metadata().unwrap();
            numbers.push(metadata.ino());
            if metadata.is_dir() {
                waiting.push(path);
            }
        }
    }
    let n_files = numbers.len();
    numbers.sort();
    numbers.dedup();
    assert_eq!(numbers.len(), n_files);
    assert_eq!(ground.own("eio"), 0);
    assert!(mounted.end());
}

#[test]
fn suffixes_are_kept_by_option() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    ground.image("a.caibx", b"a");
    ground.image("b.caibx", b"b");
    ground.tree("b.caidx");
    ground.tree("c.catar");
    for (args, wanted) in [
        (&[][..], ["a", "b.caibx", "b.caidx", "c"]),
        (&["-o", "keep-suffix"], ["a.caibx", "b.caibx", "b.caidx", "c.catar"]),
    ] {
        let mounted = ground.mount(args);
        assert_eq!(ground.names(""), wanted);
        assert_eq!(fs::read(ground.mnt.join(wanted[0])).unwrap(), b"a");
        ground.check_tree(wanted[2]);
        ground.check_tree(wanted[3]);
        assert!(mounted.end());
    }
}

#[test]
fn what_is_broken_is_shown_and_is_an_error_to_who_uses_it() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    ground.image("good.caibx", b"good");
    ground.tree("good-tree.caidx");
    let index = fs::read(ground.index.join("good.caibx")).unwrap();
    for (name, content) in [
        ("rubbish.caibx", noise(1000)),
        ("cut.caibx", index[..index.len() - 1].to_vec()),
        ("empty.caidx", Vec::new()),
        ("archive.caibx", b"no archive".to_vec()),
        ("other.catar", noise(5000)),
        ("no-chunk.caidx", fs::read(ground.index.join("good-tree.caidx")).unwrap()),
    ] {
        fs::write(ground.index.join(name), content).unwrap();
    }
    // Its store has nothing.
    fs::create_dir_all(ground.index.join("sub/default.castr")).unwrap();
    fs::rename(ground.index.join("no-chunk.caidx"), ground.index.join("sub/no-chunk.caidx")).unwrap();
    let log = ground.scratch.join("log");
    let mut command = ground.command(&ground.index, &["-f"]);
    command.stderr(fs::File::create(&log).unwrap());
    let _mounted = {
        let shown = command.get_args().any(|arg| arg == "-f");
        assert!(shown);
        Mounted::by_server(&mut command, &ground.mnt).unwrap()
    };
    assert_eq!(ground.names(""), ["archive", "cut", "empty", "good", "good-tree", "other", "rubbish", "sub"]);
    for name in ["archive", "cut", "empty", "other", "rubbish", "sub/no-chunk"] {
        assert_eq!(errno(fs::metadata(ground.mnt.join(name))), Some(libc::EIO), "{name}");
        assert_eq!(errno(fs::File::open(ground.mnt.join(name))), Some(libc::EIO), "{name}");
    }
    assert_eq!(fs::read(ground.mnt.join("good")).unwrap(), b"good");
    ground.check_tree("good-tree");
    assert!(ground.own("eio") >= 6);
    assert_eq!(errno(fs::metadata(ground.mnt.join("none"))), Some(libc::ENOENT));
}

#[test]
fn umask_and_shifted_ids_are_shown_of_images_and_trees() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let file = ground.tree.join("dir/file");
    std::os::unix::fs::chown(&file, Some(1000), Some(50)).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o6775)).unwrap();
    let with_acl = ground.tree.join("acl");
    fs::write(&with_acl, b"x").unwrap();
    let set = Command::new("setfacl").args(["-m", "u:7:rwx,g:9:rx,m::rwx,o::r"]).arg(&with_acl).status();
    assert!(set.unwrap().success());
    ground.tree("t.caidx");
    ground.image("i.caibx", b"i");
    let index = |name: &str| ground.index.join(name);
    let all = ground.index.clone();
    for (spec, tree, image) in [(&all, "t/", "i"), (&index("t.caidx"), "", ""), (&index("i.caibx"), "none", "i")] {
        let args = ["-o", "umask=027,uid-shift=100000,gid=77"];
        let _mounted = Mounted::by_command(&mut ground.command(spec, &args), &ground.mnt).unwrap();
        let shown = |path: &str| {
            let metadata = ground.mnt.join(path).symlink_metadata().unwrap();
            (metadata.mode() & 0o7777, metadata.uid(), metadata.gid())
        };
        if tree != "none" {
            assert_eq!(shown(&format!("{tree}dir/file")), (0o6750, 101_000, 77));
            assert_eq!(shown(&format!("{tree}dir")).0 & 0o027, 0);
            assert_eq!(shown(&format!("{tree}link")), (0o777, 100_000, 77), "a symlink has no permissions to take");
            let acl = run(Command::new("getfacl").args(["-n", "-c", "-p"]).arg(ground.mnt.join(tree).join("acl"))).ok();
            let lines: Vec<String> =
                acl.text().lines().map(|line| line.split('\t').next().unwrap().to_owned()).collect();
            for line in ["user:100007:r-x", "group:100009:r-x", "mask::r-x", "other::---"] {
                assert!(lines.iter().any(|found| found == line), "{line} in {lines:?}");
            }
        }
        if !image.is_empty() {
            assert_eq!(shown(image), (0o440, 100_000, 77));
            assert_eq!(shown(""), (0o550, 100_000, 77));
        }
    }
    // Owners that are named win, and what does not fit is nobody's.
    let args = ["-o", "uid=5,uid-shift=4294967294"];
    let _mounted = ground.mount(&args);
    let metadata = ground.mnt.join("t/dir/file").metadata().unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (5, 65534));
}

#[test]
fn a_closed_tree_stays_closed_for_other_users() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    fs::set_permissions(&ground.tree, fs::Permissions::from_mode(0o700)).unwrap();
    ground.tree("t.caidx");
    fs::set_permissions(&ground.tree, fs::Permissions::from_mode(0o755)).unwrap();
    ground.tree("open.caidx");
    let _mounted = ground.mount(&[]);
    // Somebody else can list the directory, and is the first who uses the trees.
    let as_nobody = |path: &str| {
        let setpriv = peer("setpriv").unwrap();
        let mut command = setpriv.command();
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "cat"]).arg(ground.mnt.join(path));
        run(&mut command)
    };
    for dir in ground.mnt.ancestors().skip(1).take_while(|dir| dir.starts_with(env!("CARGO_MANIFEST_DIR"))) {
        if fs::metadata(dir).unwrap().mode() & 0o001 == 0 {
            fs::set_permissions(dir, fs::Permissions::from_mode(0o711)).unwrap();
        }
    }
    assert_eq!(ground.names(""), ["open", "t"]);
    as_nobody("open/dir/file").ok();
    assert!(as_nobody("t/dir/file").fails().stderr.contains("Permission denied"));
}

#[test]
fn trees_answer_from_the_metadata_tables_beside_their_indexes() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    for i in 0..2000 {
        fs::write(ground.tree.join(format!("dir/one of many files {i}")), noise(20 + i)).unwrap();
    }
    let mut tar = caifs();
    tar.args(["tar", "-i", "--metadata-table", "-s"]).arg(&ground.store).arg(ground.index.join("t.caidx"));
    run(tar.arg(&ground.tree)).ok();
    assert!(ground.index.join("t.caidx.table").exists());
    let n_fetches = |option: &str| {
        let mounted = ground.mount(&["-o", option]);
        let found =
            run(Command::new("find").current_dir(ground.mnt.join("t")).args([".", "-printf", "%p %m %s %T@\\n"]));
        let shown = found.ok().text();
        let n = crate::mount::n_fetches(&ground.mnt);
        assert!(mounted.end());
        (shown, n)
    };
    let (with, without) = (n_fetches("metadata-table=yes"), n_fetches("metadata-table=no"));
    assert!(with.0 == without.0, "the same tree");
    assert!(with.1 <= 2 && without.1 > with.1 + 2, "{} fetches with, {} without", with.1, without.1);
}

#[test]
fn what_cannot_work_is_refused() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    ground.image("a.caibx", b"a");
    let refused = |spec: &Path, args: &[&str], why: &str| {
        let finished = ground.refused(spec, args);
        assert!(finished.error_line().contains(why), "{}", finished.stderr);
    };
    let hash = "0".repeat(64);
    refused(&ground.index, &["-o", &format!("index-sha256={hash}")], "index-sha256 is for one index");
    refused(&ground.index, &["-o", "backing=/tmp/x"], "backing is for one image");
    refused(Path::new("/nonexistent/"), &[], "No such file");
    refused(Path::new("ssh://h/indexes/"), &[], "cannot be listed (use sftp://");
    refused(Path::new("oci+http://127.0.0.1:1/x/"), &[], "no index or archive");
    refused(&ground.mnt, &[], "lie in each other");
    refused(&ground.scratch, &[], "lie in each other");
    let inside = ground.index.join("inside");
    fs::create_dir(&inside).unwrap();
    let finished = run(caifs().arg("mount").arg(&ground.index).arg(&inside)).fails();
    assert!(finished.error_line().contains("lie in each other"), "{}", finished.stderr);
    let on_file = ground.scratch.file("file", "");
    let finished = run(caifs().arg("mount").arg(&ground.index).arg(&on_file)).fails();
    assert!(finished.error_line().contains("cannot be mounted on a file"), "{}", finished.stderr);
}
