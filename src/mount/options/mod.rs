//! What stands after `-o`: split, unquoted, and sorted into our own options, flags of the kernel, and what to ignore.
//!
//! * [`MountOptions::parse`] reads a list as mount(8), an fstab line or a person gives it.
//! * [`MOUNT_OPTIONS`] is the table of our own options.
//! * [`VfsFlags`] are the flags that every file system has, [`KernelOptions`] what the kernel understands beside them.
//! * [`MountOptions::effective`] is what holds in the end, for people.
//!
//! Which options reach a mount helper, and in what form, is util-linux's optmap.c and mount(8), section "External helpers".
//! Invariant: parsing never panics, and what it refuses it names.

mod effective;
mod kernel;
mod own;
mod table;
mod vfs;

pub use crate::config::units::{MAX_SPAN, parse_id, parse_size, parse_span, parse_switch};
pub use kernel::KernelOptions;
pub use own::{MOUNT_OPTIONS, MountOption, ValueKind};
pub use vfs::VfsFlags;

use self::vfs::{VFS_OPTIONS, vfs_option};
use crate::config::{MountConfig, units};

/// Options that mount(8) or systemd mean for themselves but that may reach us; and those that the mount table shows of every mount of
/// ours, which mount(8) takes from there for a remount of what fstab does not have.
const IGNORED: &[&str] = &[
    "_netdev",
    "auto",
    "comment",
    "default_permissions",
    "defaults",
    "group",
    "group_id",
    "helper",
    "nofail",
    "noauto",
    "nogroup",
    "noowner",
    "nouser",
    "nousers",
    "owner",
    "seclabel",
    "uhelper",
    "user",
    "user_id",
    "users",
];

/// Options that mount(8) acts on itself: meaningless here, and never the name of an option of ours.
const RESERVED: &[&str] = &["bind", "encryption", "loop", "move", "offset", "rbind", "sizelimit"];

/// What `ro=` may be given in mount(8).
const READ_ONLY_EXTENTS: [&str; 3] = ["vfs", "fs", "recursive"];

/// What to do with an option nobody knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unknown {
    /// It is an error.
    Refuse,
    /// Put its name into [`MountOptions::unknown`] (`-s`, "sloppy").
    Collect,
}

/// What the options of a mount mean.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// Our own settings.
    pub config: MountConfig,
    /// Flags for the kernel.
    pub flags: VfsFlags,
    /// What else the kernel is told.
    pub kernel: KernelOptions,
    /// Our own options as they were given, in their order.
    pub given: Vec<(&'static str, String)>,
    /// `rw` was asked for; the mount is read-only all the same. mount(8) says `rw` whenever nobody said `ro`.
    pub wants_rw: bool,
    /// `remount` was asked for: no new mount, but other settings for the one that is there.
    pub remount: bool,
    /// Names of unknown options, when they are collected.
    pub unknown: Vec<String>,
}

/// Why an option cannot be used. One line, with the option's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// Nobody knows it.
    #[error("unknown mount option {name:?}{}", nearest.map(|n| format!(" (did you mean {n:?}?)")).unwrap_or_default())]
    Unknown {
        /// As it was given.
        name: String,
        /// A known name that looks like it.
        nearest: Option<&'static str>,
    },
    /// A value is missing.
    #[error("mount option {name:?} needs a value: {expected}")]
    NoValue {
        /// The option.
        name: &'static str,
        /// What it takes.
        expected: &'static str,
    },
    /// The value cannot be understood or is out of range.
    #[error("mount option {name:?}: {value:?} is not {expected}")]
    BadValue {
        /// The option.
        name: &'static str,
        /// As it was given.
        value: String,
        /// What it takes.
        expected: &'static str,
    },
    /// It takes no value but was given one.
    #[error("mount option {name:?} takes no value")]
    UnwantedValue {
        /// The option.
        name: &'static str,
    },
    /// It cannot be the name of an option: the end of a value with a comma in it, which may be secret and is not told.
    #[error("mount options have a part that is none{} (a comma within a value? then {:?} in double quotes)",
        behind.as_ref().map(|name| format!(", behind {name:?}")).unwrap_or_default(), format!("{}=…,…", behind.as_deref().unwrap_or("name")))]
    NoName {
        /// The option before it.
        behind: Option<String>,
    },
    /// It is for mount(8), not for a file system.
    #[error("mount option {name:?} does not fit a caifs mount")]
    Reserved {
        /// The option.
        name: &'static str,
    },
    /// A double quote without its partner.
    #[error("mount options end within double quotes")]
    OpenQuote,
}

impl MountOptions {
    /// Adds a list of options, as after one `-o`, to those already there.
    ///
    /// A comma separates, unless it stands within double quotes (where `""` is a quote) or after a backslash. Outside quotes a
    /// backslash also protects a quote and a backslash, and stands for itself before anything else; within quotes it always
    /// stands for itself, as mount(8) understands them.
    ///
    /// # Errors
    /// The first option that cannot be used; those before it are in place.
    pub fn parse(&mut self, list: &str, unknown: Unknown) -> Result<(), OptionError> {
        let mut before = None;
        for item in split(list)? {
            let (name, value) = match item.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (item.as_str(), None),
            };
            if !is_name(name) && !is_ignored(name) {
                return Err(OptionError::NoName { behind: before });
            }
            self.add(name, value, unknown)?;
            before = Some(name.to_owned());
        }
        Ok(())
    }

    /// The options of a list as they are named, each with its value: our own, and the flags that every file system has. What is for others is left out.
    ///
    /// # Errors
    /// As [`MountOptions::parse`], for quotes only.
    pub fn named(list: &str) -> Result<Vec<(String, Option<String>)>, OptionError> {
        let named = |item: String| match item.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (item, None),
        };
        let all = split(list)?.into_iter().map(named);
        Ok(all.filter(|(name, _)| MountOption::find(name).is_some() || vfs_option(name).is_some()).collect())
    }

    fn add(&mut self, name: &str, value: Option<&str>, unknown: Unknown) -> Result<(), OptionError> {
        if let Some(option) = MountOption::find(name) {
            option.apply(&mut self.config, value)?;
            self.given.push((option.name, value.unwrap_or("yes").to_owned()));
            return Ok(());
        }
        if let Some(taken) = self.kernel.take(name, value) {
            return taken;
        }
        if is_ignored(name) {
            return Ok(());
        }
        if let Some(name) = RESERVED.iter().find(|reserved| **reserved == name) {
            return Err(OptionError::Reserved { name });
        }
        if let Some(option) = vfs_option(name) {
            // util-linux 2.39 lets be said what is read-only, `ro=vfs` the mount, `ro=fs` what is mounted; here both are.
            let is_extent = option.name == "ro" && value.is_some_and(|value| READ_ONLY_EXTENTS.contains(&value));
            if value.is_some() && !is_extent {
                return Err(OptionError::UnwantedValue { name: option.name });
            }
            match option.name {
                "rw" => self.wants_rw = true,
                "ro" => self.wants_rw = false,
                "remount" => self.remount = true,
                _ => self.flags.apply(option),
            }
            return Ok(());
        }
        match unknown {
            Unknown::Refuse => Err(OptionError::Unknown { name: name.to_owned(), nearest: nearest(name) }),
            Unknown::Collect => {
                self.unknown.push(name.to_owned());
                Ok(())
            }
        }
    }
}

/// Whether it could be the name of an option, ours or another file system's.
fn is_name(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.+".contains(&byte))
}

fn is_ignored(name: &str) -> bool {
    IGNORED.contains(&name) || name.starts_with("x-") || name.starts_with("X-")
}

/// The known name that differs least, if it differs little for its length.
fn nearest(name: &str) -> Option<&'static str> {
    let known = MOUNT_OPTIONS.iter().map(|option| option.name).chain(VFS_OPTIONS.iter().map(|option| option.name));
    units::nearest(name, known.chain(KernelOptions::names()))
}

/// The options of a list without their quotes; empty ones are left out.
fn split(list: &str) -> Result<Vec<String>, OptionError> {
    let mut items = Vec::new();
    let mut item = String::new();
    let mut quoted = false;
    let mut chars = list.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => item.extend(chars.next()),
            '"' => quoted = !quoted,
            '\\' if !quoted && matches!(chars.peek(), Some(',' | '\\' | '"')) => item.extend(chars.next()),
            ',' if !quoted => items.push(std::mem::take(&mut item)),
            _ => item.push(c),
        }
    }
    if quoted {
        return Err(OptionError::OpenQuote);
    }
    items.push(item);
    items.retain(|item| !item.is_empty());
    Ok(items)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(list: &str) -> Result<MountOptions, OptionError> {
        let mut options = MountOptions::default();
        options.parse(list, Unknown::Refuse).map(|()| options)
    }

    #[test]
    fn lists_are_split_with_both_quotings() {
        for (list, items) in [
            ("", vec![]),
            (",,", vec![]),
            ("a,b=c", vec!["a", "b=c"]),
            (r#"a="x,y",b=z"#, vec!["a=x,y", "b=z"]),
            (r#""a=x,y",b=z"#, vec!["a=x,y", "b=z"]),
            (r#"a="x""y,""",b"#, vec![r#"a=x"y,""#, "b"]),
            (r#"a="""#, vec!["a="]),
            (r"a=x\,y,b", vec!["a=x,y", "b"]),
            (r"a=\\,b", vec![r"a=\", "b"]),
            (r#"a=\"x,b"#, vec![r#"a="x"#, "b"]),
            (r"a=C:\dir\", vec![r"a=C:\dir\"]),
            (r#"a="C:\",b"#, vec![r"a=C:\", "b"]),
            ("a=é,ü", vec!["a=é", "ü"]),
        ] {
            assert_eq!(split(list).unwrap(), items, "{list}");
        }
        assert!(matches!(split(r#"a="b,c"#), Err(OptionError::OpenQuote)));
    }

    #[test]
    fn what_mount_and_systemd_pass_along_is_ignored() {
        let list = "ro,_netdev,nofail,noauto,user,user=bob,users,x-systemd.automount,X-foo=1,comment=hi,defaults,owner,\
                    group,uhelper=x,helper=caifs,nouser,nousers,auto,default_permissions,user_id=0,group_id=0,seclabel,ro=vfs,ro=fs,ro=recursive";
        assert_eq!(parsed(list).unwrap(), MountOptions::default());
    }

    #[test]
    fn own_options_keep_their_order_and_the_last_value_counts() {
        let options = parsed(r#"store=/b,store="https://h/?a=1,2",memory=1G,allow_other,memory=2G,store=/b"#).unwrap();
        assert_eq!(options.config.sources.stores, ["/b", "https://h/?a=1,2", "/b"]);
        assert_eq!(options.config.memory_bytes, 2 << 30);
        assert_eq!(options.config.allow_other, Some(true));
    }

    #[test]
    fn several_lists_add_up() {
        let mut options = MountOptions::default();
        options.parse("store=a,noexec", Unknown::Refuse).unwrap();
        options.parse("store=b,exec", Unknown::Refuse).unwrap();
        assert_eq!(options.config.sources.stores, ["a", "b"]);
        assert_eq!(options.flags, VfsFlags::default());
    }

    #[test]
    fn options_are_named_as_they_are_given() {
        let named = MountOptions::named(r#"rw,_netdev,"store=a,b",noexec,cache_size=1G,user=x,offline"#).unwrap();
        let shown: Vec<_> = named.iter().map(|(name, value)| (name.as_str(), value.as_deref())).collect();
        let wanted =
            [("rw", None), ("store", Some("a,b")), ("noexec", None), ("cache_size", Some("1G")), ("offline", None)];
        assert_eq!(shown, wanted);
    }

    #[test]
    fn rw_is_noted_and_remount_told_apart() {
        assert!(parsed("rw,suid,dev").unwrap().wants_rw);
        assert!(!parsed("rw,ro").unwrap().wants_rw);
        assert!(parsed("ro,remount").unwrap().remount);
    }

    #[test]
    fn refusals_name_the_option_and_a_near_one() {
        for (list, message) in [
            ("stroe=/a", r#"unknown mount option "stroe" (did you mean "store"?)"#),
            ("allow_othr", r#"unknown mount option "allow_othr" (did you mean "allow-other"?)"#),
            ("nosiud", r#"unknown mount option "nosiud" (did you mean "nosuid"?)"#),
            ("frobnicate=1", r#"unknown mount option "frobnicate""#),
            ("store", r#"mount option "store" needs a value: a text"#),
            ("ro=1", r#"mount option "ro" takes no value"#),
            (
                "store=http://u:p,ss@h/x",
                "mount options have a part that is none, behind \"store\" (a comma within a value? then \"store=…,…\" in double quotes)",
            ),
            ("loop", r#"mount option "loop" does not fit a caifs mount"#),
            ("memory=x", r#"mount option "memory": "x" is not a size of at least 16M, such as 512M or 1G"#),
        ] {
            assert_eq!(parsed(list).unwrap_err().to_string(), message, "{list}");
        }
    }

    #[test]
    fn sloppy_parsing_collects_what_it_does_not_know() {
        let mut options = MountOptions::default();
        options.parse("frobnicate=1,store=a", Unknown::Collect).unwrap();
        assert_eq!(options.unknown, ["frobnicate"]);
        assert_eq!(options.config.sources.stores, ["a"]);
        assert!(options.parse("memory=x", Unknown::Collect).is_err(), "a wrong value is wrong all the same");
        assert!(options.parse("store=http://u:p,w@h/s", Unknown::Collect).is_err(), "and so is a part of one");
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(list in r#"([a-z_=,"\\]|store=|memory=|\PC){0,40}"#) {
            let _ = parsed(&list);
        }

        #[test]
        fn a_value_quoted_either_way_comes_back(value in r#"[^\x00]{1,30}"#) {
            let doubled = format!("ro,\"store={}\",noexec", value.replace('"', "\"\""));
            prop_assert_eq!(&parsed(&doubled).unwrap().config.sources.stores, std::slice::from_ref(&value));
            let escaped = value.replace('\\', r"\\").replace(',', r"\,").replace('"', "\\\"");
            prop_assert_eq!(&parsed(&format!("store={escaped},ro")).unwrap().config.sources.stores, &[value]);
        }
    }
}
