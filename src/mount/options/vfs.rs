//! Flags that every file system has: what mount(8) may pass, and what of it the kernel or fusermount3 is told.

use nix::mount::MsFlags;

/// `MS_NOSYMFOLLOW` of linux/mount.h, which nix does not name.
const NOSYMFOLLOW: MsFlags = MsFlags::from_bits_retain(256);

/// An option of every file system: the flag it sets or clears.
#[derive(Debug)]
pub(super) struct VfsOption {
    pub(super) name: &'static str,
    flag: MsFlags,
    set: bool,
}

const fn on(name: &'static str, flag: MsFlags) -> VfsOption {
    VfsOption { name, flag, set: true }
}

const fn off(name: &'static str, flag: MsFlags) -> VfsOption {
    VfsOption { name, flag, set: false }
}

const NONE: MsFlags = MsFlags::empty();

/// All of them. mount(8) takes `suid` and `dev` for what holds anyway and does not pass them on (libmount 2.38, unless `user` is
/// there too), so that they have second names which it does not know. Those without a flag are accepted and mean nothing to a read-only file system, or are read elsewhere.
pub(super) const VFS_OPTIONS: &[VfsOption] = &[
    on("ro", NONE),
    on("rw", NONE),
    on("remount", NONE),
    on("nosuid", MsFlags::MS_NOSUID),
    off("suid", MsFlags::MS_NOSUID),
    off("allow-suid", MsFlags::MS_NOSUID),
    on("nodev", MsFlags::MS_NODEV),
    off("dev", MsFlags::MS_NODEV),
    off("allow-dev", MsFlags::MS_NODEV),
    on("noexec", MsFlags::MS_NOEXEC),
    off("exec", MsFlags::MS_NOEXEC),
    on("noatime", MsFlags::MS_NOATIME),
    off("atime", MsFlags::MS_NOATIME),
    on("nodiratime", MsFlags::MS_NODIRATIME),
    off("diratime", MsFlags::MS_NODIRATIME),
    on("relatime", MsFlags::MS_RELATIME),
    off("norelatime", MsFlags::MS_RELATIME),
    on("strictatime", MsFlags::MS_STRICTATIME),
    off("nostrictatime", MsFlags::MS_STRICTATIME),
    on("nosymfollow", NOSYMFOLLOW),
    off("symfollow", NOSYMFOLLOW),
    on("sync", NONE),
    on("async", NONE),
    on("dirsync", NONE),
    on("lazytime", NONE),
    on("nolazytime", NONE),
    on("iversion", NONE),
    on("noiversion", NONE),
    on("mand", NONE),
    on("nomand", NONE),
    on("silent", NONE),
    on("loud", NONE),
    on("quiet", NONE),
];

pub(super) fn vfs_option(name: &str) -> Option<&'static VfsOption> {
    VFS_OPTIONS.iter().find(|option| option.name == name || option.name == name.replace('_', "-"))
}

/// Flags of a mount. It is always read-only; set-id programs and device nodes mean nothing in it unless asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VfsFlags(MsFlags);

impl Default for VfsFlags {
    fn default() -> Self {
        Self(MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV)
    }
}

impl VfsFlags {
    pub(super) fn apply(&mut self, option: &VfsOption) {
        self.0.set(option.flag, option.set);
    }

    /// The flags of a mount, as the mount table shows them, with options over them that are named in their order. Names that are no
    /// flags are passed over; it stays read-only.
    pub(in crate::mount) fn over_shown(shown: &str, names: &[String]) -> Self {
        let mut flags = Self(MsFlags::MS_RDONLY);
        for name in shown.split(',').chain(names.iter().map(String::as_str)) {
            let Some(option) = vfs_option(name) else { continue };
            // Of the three ways to keep access times one holds, and the last one named counts.
            let of_times = MsFlags::MS_NOATIME | MsFlags::MS_RELATIME | MsFlags::MS_STRICTATIME;
            if option.set && of_times.contains(option.flag) && !option.flag.is_empty() {
                flags.0.remove(of_times);
            }
            flags.apply(option);
        }
        flags
    }

    /// For mount(2).
    pub(in crate::mount) fn kernel(self) -> MsFlags {
        self.0
    }

    /// For the `-o` of fusermount3, which sets `nosuid,nodev` for other users than root in any case and refuses flags it does
    /// not know.
    pub(in crate::mount) fn fusermount(self) -> String {
        let set = self.set().filter(|name| matches!(*name, "nosuid" | "nodev" | "noexec" | "noatime"));
        std::iter::once("ro").chain(set).collect::<Vec<_>>().join(",")
    }

    /// What holds, for people: the flags that are set by their names, separated by commas, and those of the usual that are not.
    pub fn names(self) -> String {
        let is_off = |flag| !self.0.contains(flag);
        let asked = [("suid", MsFlags::MS_NOSUID), ("dev", MsFlags::MS_NODEV)];
        let asked = asked.into_iter().filter(|(_, flag)| is_off(*flag)).map(|(name, _)| name);
        std::iter::once("ro").chain(asked).chain(self.set()).collect::<Vec<_>>().join(",")
    }

    /// The flags that are set.
    fn set(self) -> impl Iterator<Item = &'static str> {
        let setting = VFS_OPTIONS.iter().filter(|option| option.set && option.flag != NONE);
        setting.filter(move |option| self.0.contains(option.flag)).map(|option| option.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_follow_the_options_and_stay_read_only() {
        let mut flags = VfsFlags::default();
        assert_eq!(flags.fusermount(), "ro,nosuid,nodev");
        let mut others = flags;
        for name in ["allow-suid", "allow_dev"] {
            others.apply(vfs_option(name).expect(name));
        }
        assert_eq!(others.names(), "ro,suid,dev");
        for name in ["rw", "suid", "dev", "noexec", "noatime", "sync"] {
            flags.apply(vfs_option(name).expect(name));
        }
        assert_eq!(flags.kernel(), MsFlags::MS_RDONLY | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME);
        flags.apply(vfs_option("nosymfollow").expect("known"));
        assert_eq!(flags.fusermount(), "ro,noexec,noatime");
        assert_eq!(flags.names(), "ro,suid,dev,noexec,noatime,nosymfollow");
    }

    #[test]
    fn options_go_over_the_flags_of_a_mount() {
        let over = |shown: &str, names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            VfsFlags::over_shown(shown, &names).kernel()
        };
        let shown = "ro,nosuid,nodev,relatime";
        let now = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_RELATIME;
        assert_eq!(over(shown, &[]), now);
        assert_eq!(over(shown, &["rw", "remount", "_netdev"]), now);
        assert_eq!(over(shown, &["noexec", "suid"]), (now | MsFlags::MS_NOEXEC) - MsFlags::MS_NOSUID);
        assert_eq!(over(shown, &["noatime"]), (now | MsFlags::MS_NOATIME) - MsFlags::MS_RELATIME);
        assert_eq!(over("ro,noexec,noatime", &["exec", "relatime"]), MsFlags::MS_RDONLY | MsFlags::MS_RELATIME);
    }

    #[test]
    fn no_option_is_listed_twice() {
        for (i, option) in VFS_OPTIONS.iter().enumerate() {
            assert!(VFS_OPTIONS[i + 1..].iter().all(|other| other.name != option.name), "{}", option.name);
        }
    }
}
