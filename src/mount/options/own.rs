//! The options of a mount that are our own: one table for the command line, `-o` and the configuration file.

use super::OptionError;
use super::units::{parse_id, parse_size, parse_span, parse_switch};
use crate::config::{MIN_MEMORY_BYTES, MountConfig};

/// What an option takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueKind {
    /// Text as it is.
    Text,
    /// Bytes, as `512M`.
    Size,
    /// A span of time, as `30s`.
    Span,
    /// The number of a user or group.
    Id,
    /// Nothing, or yes or no.
    Switch,
}

impl ValueKind {
    /// What a help text calls the value; `None` where it may be left out.
    pub fn placeholder(self) -> Option<&'static str> {
        match self {
            Self::Text => Some("TEXT"),
            Self::Size => Some("SIZE"),
            Self::Span => Some("TIME"),
            Self::Id => Some("ID"),
            Self::Switch => None,
        }
    }

    fn expected(self) -> &'static str {
        match self {
            Self::Text => "a text",
            Self::Size => "a size such as 512M or 1G",
            Self::Span => "a time such as 30s, 500ms or 1m, at most 24h",
            Self::Id => "a number of a user or group",
            Self::Switch => "yes or no",
        }
    }
}

/// An option: the same name on the command line (`--name VALUE`), after `-o` (`name=VALUE`) and in the configuration file.
#[derive(Debug)]
pub struct MountOption {
    /// The name, with `-` between words; `_` is understood as well.
    pub name: &'static str,
    /// What it takes.
    pub kind: ValueKind,
    /// Whether it may be given several times, each adding to the others; otherwise the last one counts.
    pub repeatable: bool,
    /// One sentence for a help text.
    pub help: &'static str,
    set: fn(&mut MountConfig, &str) -> Option<()>,
}

/// All options of a mount.
pub const MOUNT_OPTIONS: &[MountOption] = &[
    MountOption {
        name: "store",
        kind: ValueKind::Text,
        repeatable: true,
        help: "Where chunks come from; several are asked in the order given [default: default.castr beside the index]",
        set: |config, value| {
            config.sources.stores.push(non_empty(value)?);
            Some(())
        },
    },
    MountOption {
        name: "memory",
        kind: ValueKind::Size,
        repeatable: false,
        help: "Memory for chunks, read-ahead and buffers together, at least 16M [default: 256M]",
        set: |config, value| {
            config.memory_bytes = parse_size(value).filter(|&bytes| bytes >= MIN_MEMORY_BYTES)?;
            Some(())
        },
    },
    MountOption {
        name: "io-timeout",
        kind: ValueKind::Span,
        repeatable: false,
        help: "A read is answered by then, with an error if it must be [default: 30s]",
        set: |config, value| {
            config.io_timeout = parse_span(value).filter(|span| !span.is_zero())?;
            Some(())
        },
    },
    MountOption {
        name: "uid",
        kind: ValueKind::Id,
        repeatable: false,
        help: "Show everything as owned by this user",
        set: |config, value| {
            config.uid = Some(parse_id(value)?);
            Some(())
        },
    },
    MountOption {
        name: "gid",
        kind: ValueKind::Id,
        repeatable: false,
        help: "Show everything as owned by this group",
        set: |config, value| {
            config.gid = Some(parse_id(value)?);
            Some(())
        },
    },
    MountOption {
        name: "allow-other",
        kind: ValueKind::Switch,
        repeatable: false,
        help: "Let other users use the mount, as permissions allow [default: yes when root mounts]",
        set: |config, value| {
            config.allow_other = Some(parse_switch(value)?);
            Some(())
        },
    },
];

impl MountOption {
    /// The option of that name, spelt with `-` or `_`.
    pub fn find(name: &str) -> Option<&'static Self> {
        let is_it = |option: &&Self| {
            let same = |(a, b): (u8, u8)| a == b || (a == b'_' && b == b'-');
            option.name.len() == name.len() && name.bytes().zip(option.name.bytes()).all(same)
        };
        MOUNT_OPTIONS.iter().find(is_it)
    }

    /// Puts the value into the settings; only a switch may go without one, which means yes.
    ///
    /// # Errors
    /// The value is missing or is not what the option takes.
    pub fn apply(&self, config: &mut MountConfig, value: Option<&str>) -> Result<(), OptionError> {
        let value = match (value, self.kind) {
            (Some(value), _) => value,
            (None, ValueKind::Switch) => "yes",
            (None, _) => return Err(OptionError::NoValue { name: self.name, expected: self.kind.expected() }),
        };
        (self.set)(config, value).ok_or_else(|| OptionError::BadValue {
            name: self.name,
            value: value.to_owned(),
            expected: match self.name {
                "memory" => "a size of at least 16M, such as 512M or 1G",
                "io-timeout" => "a time above 0 such as 30s, 500ms or 1m, at most 24h",
                "store" => "a location",
                _ => self.kind.expected(),
            },
        })
    }
}

fn non_empty(value: &str) -> Option<String> {
    (!value.is_empty()).then(|| value.to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn every_option_is_found_in_both_spellings_and_sets_its_setting() {
        let mut config = MountConfig::default();
        for (name, value) in [
            ("store", Some("/a")),
            ("store", Some("/b")),
            ("memory", Some("64M")),
            ("io_timeout", Some("500ms")),
            ("uid", Some("1000")),
            ("gid", Some("100")),
            ("allow_other", None),
        ] {
            MountOption::find(name).expect(name).apply(&mut config, value).unwrap();
            assert!(MountOption::find(&name.replace('_', "-")).is_some());
        }
        let expected = MountConfig {
            sources: crate::config::SourceConfig { stores: vec!["/a".into(), "/b".into()], ..Default::default() },
            memory_bytes: 64 << 20,
            io_timeout: Duration::from_millis(500),
            uid: Some(1000),
            gid: Some(100),
            allow_other: Some(true),
        };
        assert_eq!(config, expected);
        MountOption::find("allow-other").unwrap().apply(&mut config, Some("no")).unwrap();
        assert_eq!(config.allow_other, Some(false));
        assert!(MountOption::find("allow other").is_none() && MountOption::find("").is_none());
    }

    #[test]
    fn values_that_do_not_fit_are_refused_with_what_is_expected() {
        for (name, value) in [
            ("memory", Some("1M")),
            ("memory", None),
            ("io-timeout", Some("0")),
            ("uid", Some("root")),
            ("store", Some("")),
            ("allow-other", Some("")),
        ] {
            let mut config = MountConfig::default();
            let error = MountOption::find(name).unwrap().apply(&mut config, value).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
            assert_eq!(config, MountConfig::default(), "a refused value changes nothing");
        }
    }

    #[test]
    fn names_are_not_those_that_mount_keeps_for_itself() {
        for option in MOUNT_OPTIONS {
            assert!(!super::super::RESERVED.contains(&option.name), "{}", option.name);
            assert!(super::super::vfs_option(option.name).is_none(), "{}", option.name);
            assert!(!super::super::is_ignored(option.name), "{}", option.name);
        }
    }
}
