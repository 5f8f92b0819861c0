//! The corner tree: a small directory with everything that is hard to store, restore or show.
//!
//! What only root may make (devices, capabilities, other owners, `trusted.*`, flags) is left out for other users, and
//! said so.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;

use super::blob::Xorshift;
use super::{is_root, peers, run};

/// What the tree holds beside what every tree holds.
#[derive(Debug, Clone, Copy)]
pub struct Corner {
    /// Times before 1970. casync stores them, but its extract stops at them.
    pub before_1970: bool,
    /// Names of 255 bytes. casync stores them, but its extract cannot restore them.
    pub long_names: bool,
    /// Devices, capabilities, other owners, `trusted.*` xattrs, immutable and append-only files (only made as root).
    pub privileged: bool,
    /// `chattr` flags (where the filesystem has them).
    pub flags: bool,
}

impl Corner {
    /// Everything.
    pub const ALL: Self = Self { before_1970: true, long_names: true, privileged: true, flags: true };

    /// What casync can restore.
    pub const FOR_CASYNC_EXTRACT: Self = Self { before_1970: false, long_names: false, ..Self::ALL };

    /// Makes the tree in an empty directory.
    pub fn build(self, root: &Path) {
        let as_root = self.privileged && is_root();
        if self.privileged && !as_root {
            peers::missing("root: devices, capabilities and other owners are not in the corner tree");
        }
        names(root, self.long_names);
        contents(root);
        links(root);
        special(root);
        acls(root);
        xattrs(root);
        if as_root {
            privileged(root);
        }
        times(root, self.before_1970);
        // Last, because an immutable file cannot be changed any more.
        if self.flags {
            flags(root, as_root);
        }
    }
}

/// Names that programs get wrong: they are bytes, and any byte but `/` and NUL.
fn names(root: &Path, long_names: bool) {
    let dir = make_dir(root, "names");
    let mut odd: Vec<Vec<u8>> = [
        &b" "[..],
        b" leading and trailing ",
        b"new\nline",
        b"tab\tand\rreturn",
        b"-dash",
        b"..dots",
        b"quote'\"`",
        b"back\\slash\\n",
        b"glob*?[a]",
        b"%41 %",
        b"\xff\xfe not UTF-8",
        b"lone \xc3",
        b"\x01\x7f control",
        "\u{fc}ber \u{65e5}\u{672c} \u{1f980}".as_bytes(),
        "u\u{308}ber (decomposed)".as_bytes(),
        b"case",
        b"Case",
        b"CASE",
        b"a,b=c:d;e&f|g<h>i$j#k",
        b".caexclude-not",
        b"default.castr",
    ]
    .map(<[u8]>::to_vec)
    .to_vec();
    if long_names {
        odd.push(vec![b'n'; 255]);
        odd.push([&[0xff; 200][..], &[b'x'; 55]].concat());
    }
    for name in odd {
        let path = dir.join(OsStr::from_bytes(&name));
        fs::write(&path, &name).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
    }
    let deep = (0..40).fold(make_dir(root, "deep"), |path, level| make_dir(&path, &format!("level-{level}")));
    write(&deep, "bottom", "as deep as it goes");
}

/// Sizes around the chunk sizes, modes, and a file that is mostly hole.
fn contents(root: &Path) {
    let dir = make_dir(root, "contents");
    let mut noise = Xorshift::default();
    for size in [0, 1, 2, 16_383, 16_384, 16_385, 65_536, 262_143, 262_144, 262_145, 700_000] {
        write(&dir, &format!("noise-{size}"), noise.bytes(size));
    }
    write(&dir, "zeros", vec![0; 600_000]);
    write(&dir, "same-again", Xorshift::default().bytes(700_000));
    let sparse = File::create(dir.join("sparse")).expect("a file can be made");
    sparse.set_len(3 << 20).expect("a file can have a hole");
    sparse.write_all_at(b"an island", 1_500_001).expect("a file can be written in the middle");
    for mode in [0o000, 0o400, 0o644, 0o777, 0o4755, 0o2755, 0o6711, 0o1644] {
        let path = write(&dir, &format!("mode-{mode:04o}"), b"mode");
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("the mode of an own file can be set");
    }
    for mode in [0o700, 0o1777, 0o2775] {
        let path = make_dir(&dir, &format!("dir-{mode:04o}"));
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("the mode of an own directory can be set");
    }
    make_dir(&make_dir(&dir, "empty"), "emptier");
    let many = make_dir(root, "many");
    for number in 0..300 {
        write(&many, &format!("entry-{number}"), format!("{number}\n"));
    }
}

fn links(root: &Path) {
    let dir = make_dir(root, "links");
    let target = write(&dir, "target", "linked");
    fs::hard_link(&target, dir.join("hard")).expect("a hard link can be made");
    fs::hard_link(&target, root.join("contents/hard-in-other-directory")).expect("a hard link can be made");
    let long = "t".repeat(255) + "/" + &"u".repeat(255);
    let targets: [(&str, &OsStr); 8] = [
        ("to-file", "target".as_ref()),
        ("to-directory", "../contents".as_ref()),
        ("dangling", "no/such/file".as_ref()),
        ("absolute", "/etc/passwd".as_ref()),
        ("loop", "loop".as_ref()),
        ("up-and-out", "../../../../..".as_ref()),
        ("not-utf-8", OsStr::from_bytes(b"\xff\xfe\n")),
        ("long", long.as_ref()),
    ];
    for (name, target) in targets {
        symlink(target, dir.join(name)).expect("a symlink can be made");
    }
}

fn special(root: &Path) {
    let dir = make_dir(root, "special");
    node(&dir.join("fifo"), SFlag::S_IFIFO, 0);
    node(&dir.join("socket"), SFlag::S_IFSOCK, 0);
}

/// Access and default ACLs, written in the kernel's own form (`struct posix_acl_xattr_header`, version 2).
fn acls(root: &Path) {
    const USER_OBJ: u16 = 0x01;
    const USER: u16 = 0x02;
    const GROUP_OBJ: u16 = 0x04;
    const GROUP: u16 = 0x08;
    const MASK: u16 = 0x10;
    const OTHER: u16 = 0x20;
    const NO_ID: u32 = u32::MAX;
    let acl = |entries: &[(u16, u16, u32)]| {
        let mut bytes = 2u32.to_le_bytes().to_vec();
        for (tag, permissions, id) in entries {
            bytes.extend_from_slice(&tag.to_le_bytes());
            bytes.extend_from_slice(&permissions.to_le_bytes());
            bytes.extend_from_slice(&id.to_le_bytes());
        }
        bytes
    };
    let full = acl(&[
        (USER_OBJ, 6, NO_ID),
        (USER, 7, 1),
        (USER, 4, 54_321),
        (GROUP_OBJ, 5, NO_ID),
        (GROUP, 6, 2),
        (GROUP, 0, 65_534),
        (MASK, 6, NO_ID),
        (OTHER, 4, NO_ID),
    ]);
    let mask_only = acl(&[(USER_OBJ, 6, NO_ID), (GROUP_OBJ, 7, NO_ID), (MASK, 4, NO_ID), (OTHER, 0, NO_ID)]);
    let no_mask = acl(&[(USER_OBJ, 7, NO_ID), (GROUP_OBJ, 5, NO_ID), (OTHER, 1, NO_ID)]);
    let dir = make_dir(root, "acls");
    let file = write(&dir, "file", "users and groups");
    set_xattr(&file, "system.posix_acl_access", &full);
    let file = write(&dir, "mask-only", "only a mask");
    set_xattr(&file, "system.posix_acl_access", &mask_only);
    let with_default = make_dir(&dir, "with-default");
    set_xattr(&with_default, "system.posix_acl_default", &full);
    write(&with_default, "inherits", "the kernel gives it an ACL");
    make_dir(&with_default, "inherits-too");
    let both = make_dir(&dir, "with-both");
    set_xattr(&both, "system.posix_acl_access", &full);
    set_xattr(&both, "system.posix_acl_default", &no_mask);
}

fn xattrs(root: &Path) {
    let dir = make_dir(root, "xattrs");
    let file = write(&dir, "many", "attributes");
    for number in 0..20 {
        set_xattr(&file, &format!("user.number-{number}"), format!("value {number}").as_bytes());
    }
    let file = write(&dir, "odd", "values");
    set_xattr(&file, "user.empty", b"");
    set_xattr(&file, "user.binary", b"\0\x01\xff\n\0");
    set_xattr(&file, "user.\u{fc}", "\u{e9}".as_bytes());
    let long_name = format!("user.{}", "l".repeat(250));
    set_xattr(&file, &long_name, b"the longest name there is");
    let file = write(&dir, "large", "value");
    set_xattr(&file, "user.large", &Xorshift::default().bytes(2_000));
    set_xattr(&make_dir(&dir, "directory"), "user.on", b"directory");
}

fn privileged(root: &Path) {
    let dir = make_dir(root, "privileged");
    node(&dir.join("null"), SFlag::S_IFCHR, makedev(1, 3));
    node(&dir.join("block"), SFlag::S_IFBLK, makedev(8, 17));
    node(&dir.join("large-numbers"), SFlag::S_IFCHR, makedev(4_095, 1_048_575));
    // struct vfs_cap_data, revision 2, effective: CAP_NET_BIND_SERVICE (10) and CAP_NET_RAW (13) permitted.
    let words: [u32; 5] = [0x0200_0001, 1 << 10 | 1 << 13, 0, 0, 0];
    let capabilities: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    set_xattr(&write(&dir, "capable", "#!/bin/true\n"), "security.capability", &capabilities);
    set_xattr(&write(&dir, "trusted", "by root"), "trusted.caifs", b"only root sees this");
    for (name, uid, gid) in [("nobody", 65_534, 65_534), ("daemon", 1, 1), ("large-ids", 3_000_000_000, 4_000_000_000)]
    {
        chown(write(&dir, name, "owned"), Some(uid), Some(gid)).expect("root can give files away");
    }
    // A change of owner clears the set-id bits, so the mode comes after it.
    let path = write(&dir, "setuid-of-nobody", "owned");
    chown(&path, Some(65_534), Some(0)).expect("root can give files away");
    fs::set_permissions(path, fs::Permissions::from_mode(0o6755)).expect("root can set modes");
    let link = dir.join("link-of-nobody");
    symlink("nobody", &link).expect("a symlink can be made");
    lchown(link, Some(65_534), Some(65_534)).expect("root can give links away");
}

/// Gives every entry a time of its own with nanoseconds; children before their directories, whose times they change.
fn times(root: &Path, before_1970: bool) {
    let mut all = Vec::new();
    collect(root, &mut all);
    for (number, path) in all.iter().enumerate() {
        let number = number as i64;
        // Spread over 2001 to 2033, beyond what 31 bits of seconds hold for a few.
        set_time(path, 1_000_000_000 + number * 2_654_435 % 1_200_000_000, (number * 123_456_789 + 1) % 1_000_000_000);
    }
    let dir = root.join("times");
    fs::create_dir(&dir).expect("a directory can be made");
    let mut odd = vec![("epoch", 0, 0), ("one-nanosecond", 0, 1), ("after-2038", 4_000_000_000, 999_999_999)];
    if before_1970 {
        // Not the very last nanosecond: its number means "no time" to casync, whose reader refuses it.
        odd.extend([("just-before", -1, 999_999_998), ("1960", -315_619_200, 5), ("1910", -1_893_456_000, 0)]);
    }
    for (name, seconds, nanoseconds) in odd {
        set_time(&write(&dir, name, name), seconds, nanoseconds);
    }
    set_time(&dir, 1_234_567_890, 123_456_789);
    set_time(root, 1_111_111_111, 222_222_222);
}

fn flags(root: &Path, as_root: bool) {
    let Some(chattr) = peers::peer("chattr") else { return };
    let dir = make_dir(root, "flags");
    // Not `d`: casync and we leave such files out, as the flag asks for.
    let mut wanted = vec![("noatime", "+A"), ("sync", "+S")];
    if as_root {
        wanted.extend([("immutable", "+i"), ("append-only", "+a"), ("two", "+iA")]);
    }
    let files: Vec<(PathBuf, &str)> = wanted.iter().map(|(name, flag)| (write(&dir, name, name), *flag)).collect();
    let synchronous = make_dir(&dir, "synchronous-directory");
    for path in files.iter().map(|(path, _)| path).chain([&synchronous, &dir]) {
        set_time(path, 1_500_000_000, 7);
    }
    set_time(root, 1_111_111_111, 222_222_222);
    for (path, flag) in files.iter().chain([&(synchronous, "+D")]) {
        let finished = run::run(chattr.command().arg(flag).arg(path));
        if !finished.status.success() {
            return peers::missing("a filesystem with chattr flags under the target directory");
        }
    }
}

fn collect(path: &Path, all: &mut Vec<PathBuf>) {
    if path.is_dir() && !path.is_symlink() {
        let mut children: Vec<PathBuf> =
            fs::read_dir(path).expect("an own directory").map(|entry| entry.expect("an entry").path()).collect();
        children.sort();
        for child in &children {
            collect(child, all);
        }
    }
    all.push(path.to_owned());
}

fn set_time(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = TimeSpec::new(seconds, nanoseconds);
    utimensat(nix::fcntl::AT_FDCWD, path, &time, &time, UtimensatFlags::NoFollowSymlink)
        .unwrap_or_else(|error| panic!("cannot set the time of {}: {error}", path.display()));
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    xattr::set(path, name, value).unwrap_or_else(|error| panic!("cannot set {name} of {}: {error}", path.display()));
}

fn node(path: &Path, kind: SFlag, device: u64) {
    mknod(path, kind, Mode::from_bits_truncate(0o640), device)
        .unwrap_or_else(|error| panic!("cannot make {}: {error}", path.display()));
}

fn make_dir(parent: &Path, name: &str) -> PathBuf {
    let path = parent.join(name);
    fs::create_dir(&path).unwrap_or_else(|error| panic!("cannot make {}: {error}", path.display()));
    path
}

fn write(parent: &Path, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = parent.join(name);
    fs::write(&path, content).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
    path
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::listing::tree_listing;
    use crate::support::scratch::Scratch;

    #[test]
    fn the_tree_is_the_same_each_time_and_holds_what_it_says() {
        let scratch = Scratch::new();
        let (first, second) = (scratch.dir("first"), scratch.dir("second"));
        Corner::ALL.build(&first);
        Corner::ALL.build(&second);
        let listing = tree_listing(&first);
        listing.assert_same(&tree_listing(&second));
        let of = |path: &str| listing.get(path.as_bytes()).unwrap_or_else(|| panic!("{path} is missing"));
        assert_eq!(of("names/new\nline").size, Some(8));
        assert_eq!(of("times/1960").mtime, (-315_619_200, 5));
        assert_eq!(of("links/dangling").target.as_deref(), Some(&b"no/such/file"[..]));
        assert!(of("acls/file").xattrs.contains_key(&b"system.posix_acl_access"[..]));
        if is_root() {
            assert_eq!(of("privileged/large-numbers").device, Some((4_095, 1_048_575)));
            assert!(of("privileged/capable").xattrs.contains_key(&b"security.capability"[..]));
        }
    }

    #[test]
    fn what_casync_cannot_restore_can_be_left_out() {
        let scratch = Scratch::new();
        Corner::FOR_CASYNC_EXTRACT.build(&scratch);
        let listing = tree_listing(&scratch);
        assert!(listing.entries().all(|(path, _)| path.split(|&byte| byte == b'/').all(|name| name.len() < 255)));
        assert!(listing.entries().all(|(_, entry)| entry.mtime.0 >= 0));
    }
}
