//! A directory tree as a table of what can be seen of each entry, for comparing a mount with its source.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::sys::stat::{major, minor};

/// Extended attributes that caifs adds to what is stored; no source has them.
const OWN_XATTRS: &[u8] = b"user.caifs.";

/// How many differences are worth showing.
const SHOWN_DIFFERENCES: usize = 20;

/// What can be seen of one entry without reading its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// File type and permission bits, as in `st_mode`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes; not for directories, whose size is the filesystem's own affair.
    pub size: Option<u64>,
    /// Modification time: seconds since 1970 (negative before) and nanoseconds.
    pub mtime: (i64, i64),
    /// Where a symlink points.
    pub target: Option<Vec<u8>>,
    /// Major and minor number of a device.
    pub device: Option<(u64, u64)>,
    /// Extended attributes, those of ACLs and capabilities too.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// Every entry of a tree by its path from the root, which itself is the empty path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing(BTreeMap<Vec<u8>, Entry>);

/// Lists a tree; does not follow symlinks, and panics on an entry that cannot be looked at.
#[track_caller]
pub fn tree_listing(root: &Path) -> Listing {
    let mut entries = BTreeMap::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(path) = waiting.pop() {
        let entry = entry(&path);
        if entry.mode & libc::S_IFMT == libc::S_IFDIR {
            let children =
                fs::read_dir(&path).unwrap_or_else(|error| panic!("cannot list {}: {error}", path.display()));
            waiting.extend(
                children.map(|child| {
                    child.unwrap_or_else(|error| panic!("cannot list {}: {error}", path.display())).path()
                }),
            );
        }
        let relative = path.strip_prefix(root).expect("below the root").as_os_str().as_bytes().to_vec();
        let again = entries.insert(relative, entry);
        assert!(again.is_none(), "{} is listed twice", path.display());
    }
    Listing(entries)
}

fn entry(path: &Path) -> Entry {
    let seen = fs::symlink_metadata(path).unwrap_or_else(|error| panic!("cannot look at {}: {error}", path.display()));
    let kind = seen.file_type();
    let is_device = kind.is_char_device() || kind.is_block_device();
    Entry {
        mode: seen.mode(),
        uid: seen.uid(),
        gid: seen.gid(),
        size: (!seen.is_dir()).then_some(seen.size()),
        mtime: (seen.mtime(), seen.mtime_nsec()),
        target: kind.is_symlink().then(|| {
            let target = fs::read_link(path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
            target.into_os_string().into_vec()
        }),
        device: is_device.then(|| (major(seen.rdev()), minor(seen.rdev()))),
        xattrs: xattrs(path),
    }
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let names = match xattr::list(path) {
        Ok(names) => names,
        // A filesystem without xattrs has none.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return BTreeMap::new(),
        Err(error) => panic!("cannot list the xattrs of {}: {error}", path.display()),
    };
    names
        .filter(|name| !name.as_bytes().starts_with(OWN_XATTRS))
        .map(|name| {
            let value = xattr::get(path, &name)
                .unwrap_or_else(|error| panic!("cannot read xattr {name:?} of {}: {error}", path.display()))
                .unwrap_or_else(|| panic!("xattr {name:?} of {} is listed but not there", path.display()));
            (name.into_vec(), value)
        })
        .collect()
}

impl Listing {
    /// One entry by its path from the root.
    pub fn get(&self, path: &[u8]) -> Option<&Entry> {
        self.0.get(path)
    }

    /// All entries in the order of their paths.
    pub fn entries(&self) -> impl Iterator<Item = (&[u8], &Entry)> {
        self.0.iter().map(|(path, entry)| (path.as_slice(), entry))
    }

    /// How many entries there are, the root included.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The listing with each entry changed: for what one of two sides is known not to have.
    pub fn map(mut self, change: impl Fn(&[u8], &mut Entry)) -> Self {
        self.0.iter_mut().for_each(|(path, entry)| change(path, entry));
        self
    }

    /// The listing of entries that were found in another way than through the kernel.
    pub fn from_entries(entries: impl IntoIterator<Item = (Vec<u8>, Entry)>) -> Self {
        Self(entries.into_iter().collect())
    }

    /// The listing without some entries: what one of two sides is known to leave out.
    pub fn without(mut self, is_left_out: impl Fn(&[u8], &Entry) -> bool) -> Self {
        self.0.retain(|path, entry| !is_left_out(path, entry));
        self
    }

    /// Panics with the first differences, one a line, unless both listings are the same.
    #[track_caller]
    pub fn assert_same(&self, other: &Self) {
        let differences = self.differences(other);
        if differences.is_empty() {
            return;
        }
        let mut text = format!("{} entries differ (left: this one, right: the other):", differences.len());
        for difference in differences.iter().take(SHOWN_DIFFERENCES) {
            let _ = write!(text, "\n  {difference}");
        }
        panic!("{text}");
    }

    fn differences(&self, other: &Self) -> Vec<String> {
        let paths: std::collections::BTreeSet<&Vec<u8>> = self.0.keys().chain(other.0.keys()).collect();
        paths
            .into_iter()
            .filter_map(|path| {
                let shown = String::from_utf8_lossy(path).escape_debug().to_string();
                match (self.0.get(path), other.0.get(path)) {
                    (Some(left), Some(right)) if left == right => None,
                    (Some(left), Some(right)) => Some(format!("{shown}: {}", difference(left, right))),
                    (Some(_), None) => Some(format!("{shown}: only left")),
                    (None, _) => Some(format!("{shown}: only right")),
                }
            })
            .collect()
    }
}

/// The fields of two entries that are not the same.
fn difference(left: &Entry, right: &Entry) -> String {
    let mut parts = Vec::new();
    let mut compare = |name: &str, left: String, right: String| {
        if left != right {
            parts.push(format!("{name} {left} / {right}"));
        }
    };
    compare("mode", format!("{:o}", left.mode), format!("{:o}", right.mode));
    compare("uid", left.uid.to_string(), right.uid.to_string());
    compare("gid", left.gid.to_string(), right.gid.to_string());
    compare("size", format!("{:?}", left.size), format!("{:?}", right.size));
    compare("mtime", format!("{:?}", left.mtime), format!("{:?}", right.mtime));
    compare("device", format!("{:?}", left.device), format!("{:?}", right.device));
    let text = |bytes: Option<&Vec<u8>>| bytes.map_or("none".to_owned(), |bytes| bytes.escape_ascii().to_string());
    compare("target", text(left.target.as_ref()), text(right.target.as_ref()));
    for name in left.xattrs.keys().chain(right.xattrs.keys().filter(|name| !left.xattrs.contains_key(*name))) {
        let shown = format!("xattr {}", name.escape_ascii());
        compare(&shown, text(left.xattrs.get(name)), text(right.xattrs.get(name)));
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::scratch::Scratch;

    #[test]
    fn every_difference_is_found() {
        let scratch = Scratch::new();
        let (left, right) = (scratch.dir("left"), scratch.dir("right"));
        for dir in [&left, &right] {
            fs::write(dir.join("same"), "same").expect("written");
            fs::write(dir.join("size"), "1").expect("written");
        }
        fs::write(right.join("size"), "22").expect("written");
        fs::write(left.join("extra"), "").expect("written");
        xattr::set(right.join("same"), "user.a", b"b").expect("the target directory has xattrs");
        let strip = |listing: Listing| listing.map(|_, entry| entry.mtime = (0, 0));
        let differences = strip(tree_listing(&left)).differences(&strip(tree_listing(&right)));
        assert_eq!(differences, ["extra: only left", "same: xattr user.a none / b", "size: size Some(1) / Some(2)"],);
    }
}
