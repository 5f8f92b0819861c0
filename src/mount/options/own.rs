//! The options of a mount that are our own: one table for the command line, `-o` and the configuration file.

use super::OptionError;
pub use super::table::MOUNT_OPTIONS;
use crate::config::MountConfig;
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
    /// What a help text calls the value; `None` where it may be left out.
    pub placeholder: Option<&'static str>,
    /// Whether it may be given several times, each adding to the others; otherwise the last one counts.
    pub repeatable: bool,
    /// One sentence for a help text.
    pub help: &'static str,
    pub(super) set: fn(&mut MountConfig, &str) -> Option<()>,
}

/// An option of mount.fuse3, which acts on it itself: in lines of fstab that were written for it.
const DROP_PRIVILEGES: &str = "drop_privileges";

impl MountOption {
    /// The option of that name, spelt with `-` or `_`; or the one that does what is asked for with a name of mount.fuse3's.
    pub fn find(name: &str) -> Option<&'static Self> {
        let name = if name == DROP_PRIVILEGES { "sandbox" } else { name };
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
                "mount-timeout" => "a time above 0 such as 60s or 5m, at most 24h",
                "umask" => "permission bits in octal such as 022",
                "index-sha256" => "64 hexadecimal digits",
                "warm-rate" => "a size above 0 (of a second), such as 4M",
                "record" | "access-trace" => "a path",
                "metrics" => "an address and port such as 127.0.0.1:9100",
                "log-level" => "error, warn, info, debug or trace",
                "log" => "journald, or the full path of a file",
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
            allow_other: Some(true),
            show: crate::config::ShowConfig { uid: Some(1000), gid: Some(100), ..Default::default() },
            ..MountConfig::default()
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
