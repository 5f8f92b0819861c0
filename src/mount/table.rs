//! What is mounted where, from `/proc/self/mountinfo` (proc(5)): read without touching any mount.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// The type our mounts show.
pub const FS_TYPE: &str = "fuse.caifs";

/// The type of the entry that automounters put under what they mount.
const AUTOFS: &str = "autofs";

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// Unique number of the mount.
    pub id: u64,
    /// Device number of the file system, `MAJOR:MINOR`, as it stands in `/sys/class/bdi`.
    pub device: String,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// Type, such as `fuse.caifs`.
    pub fs_type: String,
    /// What is mounted.
    pub source: OsString,
}

impl MountEntry {
    /// Whether it is a mount of ours.
    pub fn is_ours(&self) -> bool {
        self.fs_type == FS_TYPE
    }
}

/// All mounts, in the order they were made; a later one covers an earlier one at the same place.
///
/// # Errors
/// The table cannot be read.
pub fn read() -> io::Result<Vec<MountEntry>> {
    Ok(parse(&fs::read("/proc/self/mountinfo")?))
}

/// The mount on top at a place, automounters' own entries left out.
///
/// # Errors
/// The table cannot be read.
pub fn at(mountpoint: &Path) -> io::Result<Option<MountEntry>> {
    Ok(read()?.into_iter().rfind(|entry| entry.mountpoint == mountpoint && entry.fs_type != AUTOFS))
}

fn parse(table: &[u8]) -> Vec<MountEntry> {
    table.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

/// A line: `36 35 98:0 /root /mountpoint options [optional…] - type source superoptions`.
fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let device = String::from_utf8(fields.nth(1)?.to_vec()).ok()?;
    let mountpoint = unescape(fields.nth(1)?);
    let mut after = fields.skip_while(|field| *field != b"-").skip(1);
    let fs_type = String::from_utf8(unescape(after.next()?)).ok()?;
    let source = OsString::from_vec(unescape(after.next()?));
    Some(MountEntry { id, device, mountpoint: OsString::from_vec(mountpoint).into(), fs_type, source })
}

/// Undoes the kernel's escapes of blanks and backslashes: three octal digits after a backslash.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        let octal =
            tail.get(..3).filter(|digits| byte == b'\\' && digits.iter().all(|digit| (b'0'..=b'7').contains(digit)));
        match octal {
            Some(digits) => {
                let value = digits.iter().fold(0u32, |value, digit| value * 8 + u32::from(digit - b'0'));
                plain.push(value as u8);
                rest = &tail[3..];
            }
            None => plain.push(byte),
        }
    }
    plain
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_with_their_escapes_and_optional_fields() {
        let table = br"36 35 98:0 /mnt1 /mnt\0402 rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue
37 36 0:52 / /m/\134odd\011name ro,nosuid - fuse.caifs https://u@h/a,b\040c.caibx ro,user_id=0
nonsense
";
        let entries = parse(table);
        assert_eq!(entries.len(), 2);
        assert_eq!((entries[0].id, entries[0].mountpoint.to_str().unwrap()), (36, "/mnt 2"));
        assert!(!entries[0].is_ours() && entries[1].is_ours());
        assert_eq!(entries[1].mountpoint.to_str().unwrap(), "/m/\\odd\tname");
        assert_eq!(
            (entries[1].device.as_str(), entries[1].source.to_str().unwrap()),
            ("0:52", "https://u@h/a,b c.caibx")
        );
    }

    #[test]
    fn this_machines_table_has_a_root() {
        assert!(at(Path::new("/")).unwrap().is_some());
        assert_eq!(at(Path::new("/no/such/place")).unwrap(), None);
    }
}
