//! What is mounted where: `/proc/self/mountinfo` (format: proc_pid_mountinfo(5)).
//!
//! Reading the table asks no file system anything, so it is safe beside a mount that does not answer.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::FS_TYPE;

/// A mount, told from all others that exist at the same time; when it has gone, the next one may get the same numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MountId {
    /// Number of the mount.
    pub mount: u64,
    /// Major number of the device, as stat(2) shows it for files inside.
    pub major: u32,
    /// Minor number of the device.
    pub minor: u32,
}

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// Which mount.
    pub id: MountId,
    /// Number of the mount it is on.
    pub parent: u64,
    /// Where, as an absolute path.
    pub mountpoint: PathBuf,
    /// Flags of the mount, separated by commas.
    pub options: String,
    /// File system type.
    pub fs_type: String,
    /// What is mounted.
    pub source: OsString,
    /// Options of the file system, separated by commas.
    pub super_options: String,
}

impl MountEntry {
    /// Whether caifs made it.
    pub fn is_ours(&self) -> bool {
        self.fs_type == FS_TYPE
    }
}

/// The mounts of this process's namespace.
#[derive(Debug, Clone, Default)]
pub struct MountTable {
    entries: Vec<MountEntry>,
}

impl MountTable {
    /// Reads the table.
    ///
    /// # Errors
    /// What reading `/proc/self/mountinfo` answers.
    pub fn read() -> io::Result<Self> {
        Ok(Self::parse(&std::fs::read("/proc/self/mountinfo")?))
    }

    /// Understands a table; lines that are not of the format are left out.
    pub fn parse(bytes: &[u8]) -> Self {
        Self { entries: bytes.split(|&byte| byte == b'\n').filter_map(parse_line).collect() }
    }

    /// All mounts, oldest first.
    pub fn entries(&self) -> &[MountEntry] {
        &self.entries
    }

    /// What one sees at `mountpoint` (absolute, without symlinks): of all that is mounted exactly there, what lies on top.
    /// `None` when nothing is, or only an automounter that waits for somebody to mount.
    pub fn at(&self, mountpoint: &Path) -> Option<&MountEntry> {
        let here = || self.entries.iter().filter(|entry| entry.mountpoint == mountpoint && entry.fs_type != "autofs");
        let is_covered =
            |entry: &MountEntry| here().any(|other| other.parent == entry.id.mount && other.id != entry.id);
        here().rfind(|entry| !is_covered(entry))
    }

    /// Whether an automounter watches `mountpoint`, which must then not be opened.
    pub fn is_automounted(&self, mountpoint: &Path) -> bool {
        self.entries.iter().any(|entry| entry.mountpoint == mountpoint && entry.fs_type == "autofs")
    }
}

fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|&byte| byte == b' ');
    let mount = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let (major, minor) = text(fields.next()?).split_once(':').map(|(a, b)| (a.parse(), b.parse()))?;
    let _root = fields.next()?;
    let mountpoint = unescape(fields.next()?);
    let options = text(fields.next()?);
    // Fields such as `shared:1`, any number of them, end with a lone dash.
    fields.by_ref().find(|field| *field == b"-")?;
    let fs_type = unescape(fields.next()?);
    let source = unescape(fields.next()?);
    let super_options = text(fields.next().unwrap_or_default());
    Some(MountEntry {
        id: MountId { mount, major: major.ok()?, minor: minor.ok()? },
        parent,
        mountpoint: PathBuf::from(mountpoint),
        options,
        fs_type: fs_type.to_string_lossy().into_owned(),
        source,
        super_options,
    })
}

fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(field).into_owned()
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

/// Undoes the kernel's (and fstab's) `\ooo` for space, tab, newline, backslash and `#`.
pub(super) fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let escaped = tail.get(..3).filter(|_| first == b'\\').and_then(octal);
        bytes.push(escaped.unwrap_or(first));
        rest = if escaped.is_some() { &tail[3..] } else { tail };
    }
    OsString::from_vec(bytes)
}

fn octal(digits: &[u8]) -> Option<u8> {
    let text = std::str::from_utf8(digits).ok()?;
    if !text.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    u8::from_str_radix(text, 8).ok()
}

/// The same path with an absolute parent free of symlinks, without asking the file system that may be mounted at it.
///
/// # Errors
/// What resolving the parent answers; `InvalidInput` for a path without a last component.
pub fn resolve_parent(path: &Path) -> io::Result<PathBuf> {
    let no_name = || io::Error::new(io::ErrorKind::InvalidInput, "the path does not end in a name");
    if path == Path::new("/") {
        return Ok(path.to_owned());
    }
    let name: &OsStr = path.file_name().ok_or_else(no_name)?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut resolved = parent.canonicalize()?;
    resolved.push(OsStr::from_bytes(name.as_bytes()));
    Ok(resolved)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TABLE: &str = r"22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw
36 22 0:30 / /mnt/a\040b\134c rw,nosuid shared:2 master:1 - fuse.caifs http://h/x,y\040z.caibx ro,user_id=0
40 22 0:40 / /mnt/auto rw - autofs systemd-1 rw,fd=40
41 22 0:41 / /mnt/two ro - fuse.caifs one ro
42 41 0:42 / /mnt/two ro - ext4 /dev/loop0 ro
43 40 0:43 / /mnt/auto ro - fuse.caifs  ro
this is not a line
50 22 0:x / /mnt/bad ro - ext4 a ro
51 22 0:51 / /mnt/bad ro
";

    #[test]
    fn lines_are_understood_with_their_escapes() {
        let table = MountTable::parse(TABLE.as_bytes());
        assert_eq!(table.entries().len(), 6);
        let entry = table.at(Path::new(r"/mnt/a b\c")).unwrap();
        assert_eq!(entry.id, MountId { mount: 36, major: 0, minor: 30 });
        assert_eq!(
            (entry.parent, entry.options.as_str(), entry.super_options.as_str()),
            (22, "rw,nosuid", "ro,user_id=0")
        );
        assert_eq!(entry.source, "http://h/x,y z.caibx");
        assert!(entry.is_ours());
    }

    #[test]
    fn the_upper_of_two_mounts_is_seen_and_automounters_are_not() {
        let table = MountTable::parse(TABLE.as_bytes());
        assert_eq!(table.at(Path::new("/mnt/two")).unwrap().id.mount, 42);
        assert_eq!(table.at(Path::new("/mnt/auto")).unwrap().id.mount, 43);
        assert_eq!(table.at(Path::new("/mnt/auto")).unwrap().source, "", "an empty source is a field too");
        assert!(table.is_automounted(Path::new("/mnt/auto")) && !table.is_automounted(Path::new("/mnt/two")));
        assert!(table.at(Path::new("/mnt")).is_none());
    }

    #[test]
    fn the_table_of_this_process_has_a_root() {
        assert!(MountTable::read().unwrap().at(Path::new("/")).is_some());
    }

    #[test]
    fn only_octal_escapes_are_undone() {
        for (field, name) in
            [(r"a\040b", "a b"), (r"a\\b", r"a\\b"), (r"\04", r"\04"), (r"\999", r"\999"), (r"\+12", r"\+12")]
        {
            assert_eq!(unescape(field.as_bytes()), OsStr::new(name), "{field}");
        }
    }

    #[test]
    fn parents_are_resolved_without_the_last_name() {
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path().canonicalize().unwrap();
        std::os::unix::fs::symlink(&base, base.join("link")).unwrap();
        assert_eq!(resolve_parent(&base.join("link/missing")).unwrap(), base.join("missing"));
        assert_eq!(resolve_parent(Path::new("/")).unwrap(), Path::new("/"));
        assert_eq!(resolve_parent(Path::new("x")).unwrap(), std::env::current_dir().unwrap().join("x"));
        assert!(resolve_parent(Path::new("..")).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_table(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            MountTable::parse(&bytes);
        }

        #[test]
        fn any_fields_are_a_table(text in r"([0-9]{1,30}|:|/| |-|\\[0-9]{0,3}|\n|a){0,60}") {
            MountTable::parse(text.as_bytes());
        }
    }
}
