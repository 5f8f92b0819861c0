//! Mount options, as `-o` and fstab have them.
//!
//! One table names every option of ours, so that the command line, `-o` and the configuration cannot differ. Options of mount(8)
//! itself are taken as flags of the mount or ignored; anything else is an error that names the nearest option.

use std::time::Duration;

use nix::mount::MsFlags;

use super::MountError;
use crate::config::{MIN_MEMORY_BYTES, MountConfig};

/// An option of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionSpec {
    /// Name, with dashes; underscores are taken for them.
    pub name: &'static str,
    /// What stands after `=`; empty for a switch.
    pub value: &'static str,
    /// What it does.
    pub help: &'static str,
    key: Key,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Key {
    Store,
    Memory,
    IoTimeout,
    Uid,
    Gid,
    AllowOther,
}

/// Every option of ours.
pub const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "store",
        value: "STORE",
        help: "store of chunks; may be given several times, asked in this order",
        key: Key::Store,
    },
    OptionSpec { name: "memory", value: "SIZE", help: "memory for chunks, buffers and directories", key: Key::Memory },
    OptionSpec {
        name: "io-timeout",
        value: "TIME",
        help: "answer every read by then, with an error if need be",
        key: Key::IoTimeout,
    },
    OptionSpec { name: "uid", value: "ID", help: "show this owner for every file", key: Key::Uid },
    OptionSpec { name: "gid", value: "ID", help: "show this group for every file", key: Key::Gid },
    OptionSpec { name: "allow-other", value: "", help: "let other users use the mount", key: Key::AllowOther },
];

/// Options of mount(8) that set or clear flags of the mount: name, flag, and whether it sets it.
const VFS_FLAGS: &[(&str, MsFlags, bool)] = &[
    ("suid", MsFlags::MS_NOSUID, false),
    ("nosuid", MsFlags::MS_NOSUID, true),
    ("dev", MsFlags::MS_NODEV, false),
    ("nodev", MsFlags::MS_NODEV, true),
    ("exec", MsFlags::MS_NOEXEC, false),
    ("noexec", MsFlags::MS_NOEXEC, true),
    ("atime", MsFlags::MS_NOATIME, false),
    ("noatime", MsFlags::MS_NOATIME, true),
    ("diratime", MsFlags::MS_NODIRATIME, false),
    ("nodiratime", MsFlags::MS_NODIRATIME, true),
    ("relatime", MsFlags::MS_RELATIME, true),
    ("strictatime", MsFlags::MS_STRICTATIME, true),
];

/// Options that mount(8), fstab, systemd and mount.fuse have for themselves. A read-only file system has nothing to do for
/// `rw` either: mount(8) passes it always, so that it cannot be told from one that was asked for.
const IGNORED: &[&str] = &[
    "rw",
    "ro",
    "defaults",
    "auto",
    "noauto",
    "nofail",
    "user",
    "nouser",
    "users",
    "nousers",
    "owner",
    "group",
    "uhelper",
    "helper",
    "_netdev",
    "comment",
    "sync",
    "async",
    "dirsync",
    "lazytime",
    "nolazytime",
    "iversion",
    "noiversion",
    "mand",
    "nomand",
    "silent",
    "loud",
    "norelatime",
    "nostrictatime",
    "symfollow",
    "default-permissions",
    "nonempty",
];

/// What the options of a mount mean together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountOptions {
    /// Our settings.
    pub config: MountConfig,
    /// Flags of the mount.
    pub flags: MsFlags,
}

impl Default for MountOptions {
    fn default() -> Self {
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        Self { config: MountConfig::default(), flags }
    }
}

impl MountOptions {
    /// Takes in an option string, as after `-o`. Later options overrule earlier ones; stores add up.
    ///
    /// # Errors
    /// An unknown option, or a value that cannot be.
    pub fn parse(&mut self, text: &str) -> Result<(), MountError> {
        for option in split(text) {
            let (name, value) = match option.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (option.as_str(), None),
            };
            self.set(name, value)?;
        }
        Ok(())
    }

    /// Takes in one option.
    ///
    /// # Errors
    /// An unknown option, or a value that cannot be.
    pub fn set(&mut self, name: &str, value: Option<&str>) -> Result<(), MountError> {
        let usage = |why: String| Err(MountError::Usage(why));
        if let Some((_, flag, sets)) = VFS_FLAGS.iter().find(|(vfs_name, ..)| *vfs_name == name) {
            self.flags.set(*flag, *sets);
            return Ok(());
        }
        let dashed = name.replace('_', "-");
        let is_ignored = IGNORED.contains(&name) || IGNORED.contains(&dashed.as_str());
        if is_ignored || name.starts_with("x-") || name.starts_with("X-") || name.is_empty() {
            return Ok(());
        }
        let Some(option) = OPTIONS.iter().find(|option| option.name == dashed) else {
            let near = nearest(&dashed).map_or(String::new(), |near| format!(" (did you mean '{near}'?)"));
            return usage(format!("unknown mount option '{name}'{near}"));
        };
        let needed = || match value {
            Some(value) if !value.is_empty() => Ok(value),
            _ => Err(MountError::Usage(format!("mount option '{name}' needs a value: {name}={}", option.value))),
        };
        let wrong = |why: String| MountError::Usage(format!("mount option '{name}': {why}"));
        let config = &mut self.config;
        match option.key {
            Key::Store => config.stores.push(needed()?.to_owned()),
            Key::Memory => {
                let n_bytes = parse_size(needed()?).map_err(wrong)?;
                if n_bytes < MIN_MEMORY_BYTES {
                    return Err(wrong(format!("at least {} MiB are needed", MIN_MEMORY_BYTES >> 20)));
                }
                config.memory_bytes = n_bytes;
            }
            Key::IoTimeout => {
                let timeout = parse_time(needed()?).map_err(wrong)?;
                if timeout.is_zero() {
                    return Err(wrong("it must be longer than nothing".to_owned()));
                }
                config.io_timeout = timeout;
            }
            Key::Uid => config.uid = Some(parse_id(needed()?).map_err(wrong)?),
            Key::Gid => config.gid = Some(parse_id(needed()?).map_err(wrong)?),
            Key::AllowOther => match value {
                None => config.allow_other = Some(true),
                Some(value) => return usage(format!("mount option '{name}' takes no value ('{value}')")),
            },
        }
        Ok(())
    }
}

/// Splits an option string at its commas. A comma in double quotes, or after a backslash, belongs to the option; quotes and
/// the backslash itself go.
fn split(text: &str) -> Vec<String> {
    let mut options = vec![String::new()];
    let mut in_quotes = false;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        let Some(option) = options.last_mut() else { break };
        match c {
            '"' => in_quotes = !in_quotes,
            '\\' => option.extend(chars.next()),
            ',' if !in_quotes => options.push(String::new()),
            _ => option.push(c),
        }
    }
    options
}

/// The option most like a mistyped one, if any is like it at all.
fn nearest(name: &str) -> Option<&'static str> {
    let vfs = VFS_FLAGS.iter().map(|(name, ..)| *name);
    let all = OPTIONS.iter().map(|option| option.name).chain(vfs);
    let scored = all.map(|known| (strsim::damerau_levenshtein(name, known), known));
    scored.filter(|(distance, known)| *distance <= known.len().div_ceil(3)).min().map(|(_, known)| known)
}

fn parse_id(text: &str) -> Result<u32, String> {
    // The largest number means "no change" to the kernel.
    text.parse().ok().filter(|id| *id != u32::MAX).ok_or_else(|| format!("'{text}' is not an id (0 to 4294967294)"))
}

/// A size in bytes: a number with an optional suffix K, M, G or T (powers of 1024; `KiB` and `KB` mean the same).
///
/// # Errors
/// The text is no such size.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is not a size (such as 512M or 4G)");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let lower = suffix.to_ascii_lowercase();
    let unit = lower.strip_suffix("ib").or(lower.strip_suffix('b')).unwrap_or(&lower);
    let shift = match unit {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

/// A span of time: a number with an optional suffix ms, s (the default), m or h.
///
/// # Errors
/// The text is no such span.
pub fn parse_time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("'{text}' is not a time (such as 30s, 500ms or 2m)");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let unit_ms = match suffix {
        "ms" => 1,
        "" | "s" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(unit_ms).map(Duration::from_millis).ok_or_else(wrong)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(text: &str) -> Result<MountOptions, MountError> {
        let mut options = MountOptions::default();
        options.parse(text).map(|()| options)
    }

    #[test]
    fn both_quotings_and_both_spellings() {
        let options =
            parsed(r#"rw,store=/a,"store=/b,c",store=/d\,e,memory=1G,io_timeout=500ms,allow_other,uid=7"#).unwrap();
        let config = options.config;
        assert_eq!(config.stores, ["/a", "/b,c", "/d,e"]);
        assert_eq!((config.memory_bytes, config.io_timeout), (1 << 30, Duration::from_millis(500)));
        assert_eq!((config.uid, config.gid, config.allow_other), (Some(7), None, Some(true)));
    }

    #[test]
    fn what_mount_passes_on_is_no_error() {
        let line =
            "ro,nosuid,nodev,noexec,_netdev,nofail,user,users,x-systemd.automount,X-foo=1,comment=hi,defaults,noauto,";
        let options = parsed(line).unwrap();
        assert!(
            options.flags.contains(MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC)
        );
        assert_eq!(options.config, MountConfig::default());
        let options = parsed("suid,dev,noatime").unwrap();
        assert_eq!(options.flags, MsFlags::MS_RDONLY | MsFlags::MS_NOATIME);
    }

    #[test]
    fn mistakes_are_named() {
        for (text, wanted) in [
            ("memroy=1G", "unknown mount option 'memroy' (did you mean 'memory'?)"),
            ("zzzzzz", "unknown mount option 'zzzzzz'"),
            ("memory=1X", "mount option 'memory': '1X' is not a size (such as 512M or 4G)"),
            ("memory=1M", "mount option 'memory': at least 16 MiB are needed"),
            ("memory", "mount option 'memory' needs a value: memory=SIZE"),
            ("store=", "mount option 'store' needs a value: store=STORE"),
            ("io-timeout=0", "mount option 'io-timeout': it must be longer than nothing"),
            ("uid=4294967295", "mount option 'uid': '4294967295' is not an id (0 to 4294967294)"),
            ("allow-other=yes", "mount option 'allow-other' takes no value ('yes')"),
        ] {
            assert_eq!(parsed(text), Err(MountError::Usage(wanted.to_owned())), "{text}");
        }
    }

    #[test]
    fn sizes_and_times() {
        for (text, n_bytes) in
            [("0", 0), ("512", 512), ("64k", 65536), ("1M", 1 << 20), ("2GiB", 2 << 30), ("1TB", 1 << 40)]
        {
            assert_eq!(parse_size(text), Ok(n_bytes));
        }
        for text in ["", "M", "1.5M", "-1", "1MM", "99999999999999T"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        for (text, ms) in [("30", 30_000), ("30s", 30_000), ("500ms", 500), ("2m", 120_000), ("1h", 3_600_000)] {
            assert_eq!(parse_time(text), Ok(Duration::from_millis(ms)));
        }
        assert!(parse_time("1d").is_err() && parse_time("").is_err());
    }

    proptest! {
        #[test]
        fn no_option_string_panics(text in any::<String>()) {
            let _ = parsed(&text);
        }

        #[test]
        fn quoted_values_come_through(values in proptest::collection::vec("[ -~]{1,20}", 1..4)) {
            let escaped = values.iter().map(|value| {
                format!("store={}", value.replace('\\', "\\\\").replace('"', "\\\"").replace(',', "\\,"))
            });
            let text = escaped.collect::<Vec<_>>().join(",");
            prop_assert_eq!(parsed(&text).unwrap().config.stores, values);
        }
    }
}
