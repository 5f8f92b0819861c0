//! The settings in force as a person would write them, and which of them can change while a mount is served.
//!
//! [`SHOWN`] has a row for every mount option: a new option without one fails a test.
//! Invariant: no secret is shown.

use std::path::PathBuf;

use super::log::level_name;
use crate::config::units::{show_size, show_span};
use crate::config::{MountConfig, explain};
use crate::store::location::without_secrets;

/// How an option is shown.
#[derive(Debug)]
pub struct Shown {
    /// The option's name.
    pub name: &'static str,
    /// Whether it can change while the mount is served.
    pub can_change: bool,
    value: fn(&MountConfig) -> Option<String>,
}

impl Shown {
    /// The option of that name.
    pub fn find(name: &str) -> Option<&'static Self> {
        SHOWN.iter().find(|row| row.name == name)
    }

    /// What it is set to, without secrets; `None` when nobody set it and what then holds depends on other things.
    pub fn value(&self, config: &MountConfig) -> Option<String> {
        (self.value)(config)
    }
}

/// An option that is different in two settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The option's name.
    pub name: &'static str,
    /// Its value before; `None` for none.
    pub from: Option<String>,
    /// Its value after.
    pub to: Option<String>,
    /// Whether it can change while the mount is served.
    pub can_change: bool,
}

/// The options that two settings have otherwise. (Options of stores are looked at for each store, see [`explain::differences`].)
pub fn differences(old: &MountConfig, new: &MountConfig) -> Vec<Difference> {
    let difference = |row: &Shown| {
        let (from, to) = (row.value(old), row.value(new));
        (from != to).then_some(Difference { name: row.name, from, to, can_change: row.can_change })
    };
    SHOWN.iter().filter_map(difference).collect()
}

/// A row of what can change.
const fn live(name: &'static str, value: fn(&MountConfig) -> Option<String>) -> Shown {
    Shown { name, can_change: true, value }
}

/// A row of what holds until the mount ends.
const fn fixed(name: &'static str, value: fn(&MountConfig) -> Option<String>) -> Shown {
    Shown { name, can_change: false, value }
}

fn switch(yes: bool) -> Option<String> {
    Some(if yes { "yes" } else { "no" }.to_owned())
}

fn path(path: Option<&PathBuf>) -> Option<String> {
    path.map(|path| path.display().to_string())
}

/// What flags or files say for every store.
fn of_stores(config: &MountConfig, name: &str) -> Option<String> {
    let entries = config.sources.settings.for_all();
    entries.into_iter().find(|(option, _)| option.name == name).map(|(_, entry)| entry.value.shown())
}

/// Every option of a mount, in the order of the help text.
pub const SHOWN: &[Shown] = &[
    live("store", |config| {
        let stores: Vec<String> = config.sources.stores.iter().map(|store| without_secrets(store)).collect();
        (!stores.is_empty()).then(|| stores.join(", "))
    }),
    fixed("cache", |config| config.sources.cache.as_deref().map(without_secrets)),
    live("cache-size", |config| config.sources.cache_size_bytes.map(show_size)),
    live("cache-keep-free", |config| config.sources.cache_keep_free_bytes.map(show_size)),
    // Always so, whatever is said.
    live("cache-repair", |_| None),
    live("offline", |config| switch(config.sources.offline)),
    live("store-file", |config| path(config.store_file.as_ref())),
    live("config", |config| path(config.config_file.as_ref())),
    live("concurrency", |config| of_stores(config, "concurrency")),
    live("client-cert", |config| of_stores(config, "client-cert")),
    live("client-key", |config| of_stores(config, "client-key")),
    live("ca-cert", |config| of_stores(config, "ca-cert")),
    live("trust-insecure", |config| of_stores(config, "trust-insecure")),
    live("error-retry", |config| of_stores(config, "error-retry")),
    live("error-retry-base-interval", |config| of_stores(config, "error-retry-base-interval")),
    live("memory", |config| Some(show_size(config.memory_bytes))),
    live("io-timeout", |config| Some(show_span(config.io_timeout))),
    fixed("allow-other", |config| config.allow_other.and_then(switch)),
    fixed("uid", |config| config.show.uid.map(|uid| uid.to_string())),
    fixed("gid", |config| config.show.gid.map(|gid| gid.to_string())),
    fixed("umask", |config| config.show.umask.map(|umask| format!("{umask:03o}"))),
    fixed("uid-shift", |config| config.show.uid_shift.map(|shift| shift.to_string())),
    fixed("keep-suffix", |config| switch(config.show.keep_suffix)),
    fixed("poll-interval", |config| config.show.poll_interval.map(show_span)),
    live("read-ahead", |config| config.ahead.window_bytes.map(show_size)),
    fixed("kernel-read-ahead", |config| config.ahead.kernel_bytes.map(show_size)),
    fixed("warm", |config| (!config.ahead.warm.is_empty()).then(|| config.ahead.warm.join(", "))),
    live("warm-rate", |config| config.ahead.warm_rate_bytes.map(show_size)),
    fixed("profile", |config| config.ahead.profile.as_deref().map(without_secrets)),
    fixed("record", |config| path(config.ahead.record.as_ref())),
    fixed("backing", |config| config.keep.backing.clone()),
    fixed("passthrough", |config| config.keep.passthrough.and_then(switch)),
    fixed("metadata-table", |config| config.keep.metadata_table.and_then(switch)),
    fixed("index-sha256", |config| {
        config.sources.trust.index_sha256.map(|digest| digest.iter().map(|byte| format!("{byte:02x}")).collect())
    }),
    fixed("verify-key", |config| config.sources.trust.verify_key.clone()),
    fixed("mount-timeout", |config| Some(show_span(config.service.mount_timeout))),
    fixed("log", |config| config.service.log.clone()),
    live("log-level", |config| config.service.log_level.map(|level| level_name(level).to_owned())),
    fixed("setuid", |config| config.service.setuid.clone()),
    fixed("sandbox", |config| config.service.sandbox.and_then(switch)),
    fixed("check-store", |config| switch(config.service.check_store)),
    fixed("control", |config| switch(config.service.control)),
    fixed("metrics", |config| config.service.metrics.clone()),
    fixed("access-trace", |config| path(config.service.access_trace.as_ref())),
];

/// What is set for a store beside the defaults, as `name = value`. Nothing if its location cannot be read, which its opening tells.
pub fn of_store(config: &MountConfig, store: &str) -> Vec<(String, String)> {
    explain::said(&config.sources.settings, store).unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::mount::options::{MOUNT_OPTIONS, MountOption, ValueKind};

    #[test]
    fn every_option_has_a_row_that_shows_it() {
        for option in MOUNT_OPTIONS {
            let row = Shown::find(option.name).unwrap_or_else(|| panic!("{} is not in SHOWN", option.name));
            let value = match (option.name, option.kind) {
                ("umask", _) => "022",
                ("index-sha256", _) => "6a1d6a1d6a1d6a1d6a1d6a1d6a1d6a1d6a1d6a1d6a1d6a1d6a1d6a1d6a1d6a1d",
                ("control" | "check-store", _) => "no",
                ("log-level", _) => "debug",
                (_, ValueKind::Size) => "64M",
                (_, ValueKind::Span) => "7s",
                (_, ValueKind::Id | ValueKind::Number) => "7",
                (_, ValueKind::Switch) => "yes",
                (_, ValueKind::Text) => "/a",
            };
            let before = MountConfig::default();
            let mut after = before.clone();
            option.apply(&mut after, Some(value)).unwrap_or_else(|error| panic!("{}: {error}", option.name));
            let seen: Vec<&str> = differences(&before, &after).iter().map(|difference| difference.name).collect();
            let wanted: &[&str] = if option.name == "cache-repair" { &[] } else { &[row.name] };
            assert_eq!(seen, wanted, "{}", option.name);
        }
        assert_eq!(SHOWN.len(), MOUNT_OPTIONS.len());
    }

    #[test]
    fn secrets_are_not_shown() {
        let mut config = MountConfig::default();
        for (name, value) in [("store", "https://u:geheim@h/x?sig=geheim"), ("cache", "https://u:geheim@h/c")] {
            MountOption::find(name).unwrap().apply(&mut config, Some(value)).unwrap();
        }
        for difference in differences(&MountConfig::default(), &config) {
            let shown = format!("{difference:?}");
            assert!(shown.contains("https://u@h/") && !shown.contains("geheim"), "{shown}");
        }
    }
}
