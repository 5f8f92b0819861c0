//! Real mounts: what is shown against the source, what is refused, what is fetched, and what happens when things go wrong.

mod faults;
mod fetches;
mod place;
mod shown;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::is_root;
use crate::support::mounted::Mounted;
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

/// An image with its store and a mountpoint; nothing where it cannot be mounted.
fn image(content: &[u8]) -> Option<(Scratch, PathBuf, PathBuf, PathBuf)> {
    if !can_mount() {
        return None;
    }
    let scratch = Scratch::new();
    let (index, store) = make(&scratch, content);
    let mountpoint = scratch.dir("m");
    Some((scratch, index, store, mountpoint))
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
pub fn n_fetches(mountpoint: &Path) -> u64 {
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
