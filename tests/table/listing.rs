//! What listings give with names: attributes come where they are used, and nothing is missing where they do not come.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{mount_at, table_text};
use crate::mount::can_mount;
use crate::support::mounted::Mounted;
use crate::support::run::{caifs, run};
use crate::support::scratch::Scratch;

const N_DIRECTORIES: usize = 30;
const N_FILES: usize = 100;

/// A tree with its table.
struct Ground {
    scratch: Scratch,
    tree: PathBuf,
    index: PathBuf,
    mnt: PathBuf,
}

impl Ground {
    fn new() -> Self {
        let scratch = Scratch::new();
        let (tree, mnt, index) = (scratch.dir("tree"), scratch.dir("mnt"), scratch.join("t.caidx"));
        for directory in 0..N_DIRECTORIES {
            let path = tree.join(format!("directory-{directory:02}"));
            fs::create_dir(&path).unwrap();
            for file in 0..N_FILES {
                // No two have the same size, so that none passes for another.
                let made = File::create_new(path.join(format!("file-{file:02}"))).unwrap();
                made.set_len((directory * N_FILES + file) as u64).unwrap();
            }
        }
        run(caifs()
            .args(["tar", "--metadata-table", "-i", "-s"])
            .arg(scratch.join("default.castr"))
            .arg(&index)
            .arg(&tree))
        .ok();
        Self { scratch, tree, index, mnt }
    }

    fn mount(&self) -> Mounted {
        let trace = format!("--access-trace={}", self.trace().display());
        let mounted = mount_at(self.index.to_str().unwrap(), &[&trace], &self.mnt);
        assert!(table_text(&self.mnt).starts_with("in use"), "{}", table_text(&self.mnt));
        mounted
    }

    fn trace(&self) -> PathBuf {
        self.scratch.join("trace")
    }

    /// Ends a mount and says how often it was asked for what.
    #[track_caller]
    fn end(&self, mounted: Mounted) -> BTreeMap<String, usize> {
        assert!(mounted.end());
        let mut asked = BTreeMap::new();
        for line in fs::read_to_string(self.trace()).unwrap().lines().filter(|line| !line.starts_with('#')) {
            *asked.entry(line.split(' ').nth(1).unwrap().to_owned()).or_default() += 1;
        }
        fs::remove_file(self.trace()).unwrap();
        asked
    }

    /// Sizes by name, of files, gone through in one of the ways in which programs do it.
    fn sizes(&self, way: Way) -> BTreeMap<PathBuf, Option<u64>> {
        sizes(&self.mnt, way)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// As find(1) does: names and types.
    Names,
    /// As ls(1) does: one after the other.
    EachAtOnce,
    /// As du(1) does: all names of a directory, and then their attributes.
    AllNamesFirst,
}

fn sizes(root: &Path, way: Way) -> BTreeMap<PathBuf, Option<u64>> {
    let mut found = BTreeMap::new();
    let mut left = vec![root.to_owned()];
    let mut add = |path: &Path, is_wanted: bool| {
        let size = is_wanted.then(|| fs::symlink_metadata(path).unwrap().size());
        assert!(found.insert(path.strip_prefix(root).unwrap().to_owned(), size).is_none(), "{path:?} comes twice");
    };
    while let Some(directory) = left.pop() {
        let mut names = Vec::new();
        for entry in fs::read_dir(&directory).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                left.push(entry.path());
                continue;
            }
            match way {
                Way::Names | Way::EachAtOnce => add(&entry.path(), way == Way::EachAtOnce),
                Way::AllNamesFirst => names.push(entry.path()),
            }
        }
        names.iter().for_each(|path| add(path, true));
    }
    found
}

#[test]
fn attributes_come_with_names_where_they_are_used() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let (names, wanted) = (sizes(&ground.tree, Way::Names), sizes(&ground.tree, Way::EachAtOnce));
    assert_eq!(names.len(), N_DIRECTORIES * N_FILES);

    let mounted = ground.mount();
    assert!(ground.sizes(Way::Names) == names);
    assert!(ground.sizes(Way::Names) == names, "as the kernel has kept them");
    let asked = ground.end(mounted);
    assert!(asked["readdir"] >= N_DIRECTORIES, "names come without attributes: {asked:?}");
    assert!(!asked.contains_key("lookup"), "but those of directories: {asked:?}");

    let mounted = ground.mount();
    assert!(ground.sizes(Way::EachAtOnce) == wanted);
    let asked = ground.end(mounted);
    assert!(!asked.contains_key("lookup"), "attributes come with all names: {asked:?}");

    let mounted = ground.mount();
    assert!(ground.sizes(Way::AllNamesFirst) == wanted);
    let asked = ground.end(mounted);
    // Those of the first directory, and of one in 64.
    assert!(asked["lookup"] <= 3 * N_FILES, "it is learnt that attributes are wanted: {asked:?}");

    // Also when the kernel has kept the names of all directories.
    let mounted = ground.mount();
    assert!(ground.sizes(Way::Names) == names);
    assert!(ground.sizes(Way::AllNamesFirst) == wanted);
    let asked = ground.end(mounted);
    assert!(asked["lookup"] <= N_DIRECTORIES * N_FILES / 2, "{asked:?}");
}
