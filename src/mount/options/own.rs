//! The options of a mount that are our own: one table for the command line, `-o` and the configuration file.

use std::sync::Arc;

use super::OptionError;
use crate::config::units::{parse_id, parse_size, parse_span, parse_switch};
use crate::config::{MIN_MEMORY_BYTES, MountConfig};
use crate::store::location::without_secrets;

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
    /// A whole number.
    Number,
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
            Self::Number => Some("N"),
            Self::Switch => None,
        }
    }

    fn expected(self) -> &'static str {
        match self {
            Self::Text => "a text",
            Self::Size => "a size such as 512M or 1G",
            Self::Span => "a time such as 30s, 500ms or 1m, at most 24h",
            Self::Id => "a number of a user or group",
            Self::Number => "a number",
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
        name: "cache",
        kind: ValueKind::Text,
        repeatable: false,
        help: "Keep fetched chunks in this directory (or store)",
        set: |config, value| {
            config.sources.cache = Some(non_empty(value)?);
            Some(())
        },
    },
    MountOption {
        name: "cache-size",
        kind: ValueKind::Size,
        repeatable: false,
        help: "The most a local cache may hold [default: a share of the free disk]",
        set: |config, value| {
            config.sources.cache_size_bytes = Some(parse_size(value).filter(|&bytes| bytes > 0)?);
            Some(())
        },
    },
    MountOption {
        name: "cache-keep-free",
        kind: ValueKind::Size,
        repeatable: false,
        help: "What a local cache leaves free on its file system",
        set: |config, value| {
            config.sources.cache_keep_free_bytes = Some(parse_size(value)?);
            Some(())
        },
    },
    MountOption {
        name: "cache-repair",
        kind: ValueKind::Switch,
        repeatable: false,
        help: "A bad chunk in the cache is fetched again; always so, accepted for desync's sake",
        set: |_, value| parse_switch(value).map(drop),
    },
    MountOption {
        name: "offline",
        kind: ValueKind::Switch,
        repeatable: false,
        help: "Use what the cache has, and ask no store",
        set: |config, value| {
            config.sources.offline = parse_switch(value)?;
            Some(())
        },
    },
    MountOption {
        name: "store-file",
        kind: ValueKind::Text,
        repeatable: false,
        help: "A file with the stores and the cache: {\"stores\": [\"…\"], \"cache\": \"…\"}",
        set: |config, value| {
            config.store_file = Some(non_empty(value)?.into());
            Some(())
        },
    },
    MountOption {
        name: "config",
        kind: ValueKind::Text,
        repeatable: false,
        help: "A configuration file to read instead of the usual ones",
        set: |config, value| {
            config.config_file = Some(non_empty(value)?.into());
            Some(())
        },
    },
    MountOption {
        name: "concurrency",
        kind: ValueKind::Number,
        repeatable: false,
        help: "Sessions to one store at a time [default: 10]",
        set: |config, value| for_stores(config, "concurrency", value),
    },
    MountOption {
        name: "client-cert",
        kind: ValueKind::Text,
        repeatable: false,
        help: "Certificate to show to servers (PEM); goes with client-key",
        set: |config, value| for_stores(config, "client-cert", value),
    },
    MountOption {
        name: "client-key",
        kind: ValueKind::Text,
        repeatable: false,
        help: "Key of the certificate (PEM)",
        set: |config, value| for_stores(config, "client-key", value),
    },
    MountOption {
        name: "ca-cert",
        kind: ValueKind::Text,
        repeatable: false,
        help: "Certificates to trust beside the system's (PEM)",
        set: |config, value| for_stores(config, "ca-cert", value),
    },
    MountOption {
        name: "trust-insecure",
        kind: ValueKind::Switch,
        repeatable: false,
        help: "Accept any certificate",
        set: |config, value| for_stores(config, "trust-insecure", value),
    },
    MountOption {
        name: "error-retry",
        kind: ValueKind::Number,
        repeatable: false,
        help: "How often a failed request is made again [default: 3]",
        set: |config, value| for_stores(config, "error-retry", value),
    },
    MountOption {
        name: "error-retry-base-interval",
        kind: ValueKind::Span,
        repeatable: false,
        help: "The first wait before that; later ones are longer [default: 200ms]",
        set: |config, value| for_stores(config, "error-retry-base-interval", value),
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
            value: without_secrets(value),
            expected: match self.name {
                "memory" => "a size of at least 16M, such as 512M or 1G",
                "io-timeout" => "a time above 0 such as 30s, 500ms or 1m, at most 24h",
                "store" | "cache" => "a location",
                "cache-size" => "a size above 0, such as 512M or 20G",
                "store-file" | "config" | "client-cert" | "client-key" | "ca-cert" => "a path",
                "error-retry" => "a number from 0 to 1000",
                "concurrency" => "a number from 1 to 1024",
                "error-retry-base-interval" => "a time above 0 such as 30s, 500ms or 1m30s, at most 24h",
                _ => self.kind.expected(),
            },
        })
    }
}

/// Sets an option of every store.
fn for_stores(config: &mut MountConfig, name: &'static str, value: &str) -> Option<()> {
    Arc::make_mut(&mut config.sources.settings).set_by_flag(name, value)
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
            ("cache", Some("/c")),
            ("cache-size", Some("20G")),
            ("cache_keep_free", Some("0")),
            ("cache-repair", Some("yes")),
            ("offline", None),
            ("store-file", Some("/f")),
            ("config", Some("/g")),
        ] {
            MountOption::find(name).expect(name).apply(&mut config, value).unwrap();
            assert!(MountOption::find(&name.replace('_', "-")).is_some());
        }
        let expected = MountConfig {
            sources: crate::config::SourceConfig {
                stores: vec!["/a".into(), "/b".into()],
                cache: Some("/c".into()),
                cache_size_bytes: Some(20 << 30),
                cache_keep_free_bytes: Some(0),
                offline: true,
                ..Default::default()
            },
            config_file: Some("/g".into()),
            store_file: Some("/f".into()),
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
    fn options_of_stores_reach_every_store() {
        let mut config = MountConfig::default();
        for (name, value) in [
            ("concurrency", Some("4")),
            ("client-cert", Some("/cert")),
            ("client-key", Some("/key")),
            ("ca-cert", Some("ca.pem")),
            ("trust-insecure", None),
            ("error-retry", Some("7")),
            ("error-retry-base-interval", Some("1.5s")),
        ] {
            MountOption::find(name).expect(name).apply(&mut config, value).unwrap();
        }
        let options = config.sources.settings.resolve("https://h/x").unwrap().remove(0).options;
        assert_eq!((options.concurrency, options.retry.n_retries), (4, 7));
        assert_eq!(options.retry.base, Duration::from_millis(1500));
        assert_eq!((options.http.client_cert, options.http.client_key), (Some("/cert".into()), Some("/key".into())));
        assert!(options.http.trust_insecure && options.http.ca_cert.is_some_and(|path| path.is_absolute()));
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
            ("cache", Some("")),
            ("cache-size", Some("0")),
            ("offline", Some("maybe")),
            ("error-retry", Some("-1")),
            ("concurrency", Some("0")),
            ("error-retry-base-interval", Some("0s")),
            ("client-cert", None),
            ("ca-cert", Some("")),
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
