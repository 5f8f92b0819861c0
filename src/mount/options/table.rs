//! The table of our own mount options: one row each, in the order a help text shows them.

use std::sync::Arc;

use tracing::Level;

use super::own::{MountOption, ValueKind};
use crate::config::units::{parse_id, parse_mode, parse_sha256, parse_size, parse_span, parse_switch};
use crate::config::{MIN_MEMORY_BYTES, MountConfig};
use crate::mount::log::level_name;

/// All options of a mount.
pub const MOUNT_OPTIONS: &[MountOption] = &[
    MountOption {
        name: "store",
        kind: ValueKind::Text,
        placeholder: Some("STORE"),
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
        placeholder: Some("CACHE"),
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
        placeholder: Some("SIZE"),
        repeatable: false,
        help: "The most a local cache may hold [default: a share of the free disk]",
        set: |config, value| {
            config.sources.cache_size_bytes = Some(above_zero(parse_size(value)?)?);
            Some(())
        },
    },
    MountOption {
        name: "cache-keep-free",
        kind: ValueKind::Size,
        placeholder: Some("SIZE"),
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
        placeholder: None,
        repeatable: false,
        help: "A bad chunk in the cache is fetched again; always so, accepted for desync's sake",
        set: |_, value| {
            parse_switch(value)?;
            Some(())
        },
    },
    MountOption {
        name: "offline",
        kind: ValueKind::Switch,
        placeholder: None,
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
        placeholder: Some("FILE"),
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
        placeholder: Some("FILE"),
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
        placeholder: Some("N"),
        repeatable: false,
        help: "Sessions to one store at a time [default: 10]",
        set: |config, value| {
            for_stores(config, "concurrency", value)?;
            Some(())
        },
    },
    MountOption {
        name: "client-cert",
        kind: ValueKind::Text,
        placeholder: Some("FILE"),
        repeatable: false,
        help: "Certificate to show to servers (PEM); goes with client-key",
        set: |config, value| {
            for_stores(config, "client-cert", value)?;
            Some(())
        },
    },
    MountOption {
        name: "client-key",
        kind: ValueKind::Text,
        placeholder: Some("FILE"),
        repeatable: false,
        help: "Key of the certificate (PEM)",
        set: |config, value| {
            for_stores(config, "client-key", value)?;
            Some(())
        },
    },
    MountOption {
        name: "ca-cert",
        kind: ValueKind::Text,
        placeholder: Some("FILE"),
        repeatable: false,
        help: "Certificates to trust beside the system's (PEM)",
        set: |config, value| {
            for_stores(config, "ca-cert", value)?;
            Some(())
        },
    },
    MountOption {
        name: "trust-insecure",
        kind: ValueKind::Switch,
        placeholder: None,
        repeatable: false,
        help: "Accept any certificate",
        set: |config, value| {
            for_stores(config, "trust-insecure", value)?;
            Some(())
        },
    },
    MountOption {
        name: "error-retry",
        kind: ValueKind::Number,
        placeholder: Some("N"),
        repeatable: false,
        help: "How often a failed request is made again [default: 3]",
        set: |config, value| {
            for_stores(config, "error-retry", value)?;
            Some(())
        },
    },
    MountOption {
        name: "error-retry-base-interval",
        kind: ValueKind::Span,
        placeholder: Some("TIME"),
        repeatable: false,
        help: "The first wait before that; later ones are longer [default: 200ms]",
        set: |config, value| {
            for_stores(config, "error-retry-base-interval", value)?;
            Some(())
        },
    },
    MountOption {
        name: "memory",
        kind: ValueKind::Size,
        placeholder: Some("SIZE"),
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
        placeholder: Some("TIME"),
        repeatable: false,
        help: "A read is answered by then, with an error if it must be [default: 30s]",
        set: |config, value| {
            config.io_timeout = parse_span(value).filter(|span| !span.is_zero())?;
            Some(())
        },
    },
    MountOption {
        name: "allow-other",
        kind: ValueKind::Switch,
        placeholder: None,
        repeatable: false,
        help: "Let other users use the mount, as permissions allow [default: yes when root mounts]",
        set: |config, value| {
            config.allow_other = Some(parse_switch(value)?);
            Some(())
        },
    },
    MountOption {
        name: "uid",
        kind: ValueKind::Id,
        placeholder: Some("ID"),
        repeatable: false,
        help: "Show everything as owned by this user",
        set: |config, value| {
            config.show.uid = Some(parse_id(value)?);
            Some(())
        },
    },
    MountOption {
        name: "gid",
        kind: ValueKind::Id,
        placeholder: Some("ID"),
        repeatable: false,
        help: "Show everything as owned by this group",
        set: |config, value| {
            config.show.gid = Some(parse_id(value)?);
            Some(())
        },
    },
    MountOption {
        name: "umask",
        kind: ValueKind::Text,
        placeholder: Some("MODE"),
        repeatable: false,
        help: "Permission bits that nothing has, in octal",
        set: |config, value| {
            config.show.umask = Some(parse_mode(value)?);
            Some(())
        },
    },
    MountOption {
        name: "uid-shift",
        kind: ValueKind::Id,
        placeholder: Some("N"),
        repeatable: false,
        help: "Add this to every stored owner and group, as the user namespace of a container does",
        set: |config, value| {
            config.show.uid_shift = Some(parse_id(value)?);
            Some(())
        },
    },
    MountOption {
        name: "keep-suffix",
        kind: ValueKind::Switch,
        placeholder: None,
        repeatable: false,
        help: "Of a directory of indexes, show names with .caibx and the like",
        set: |config, value| {
            config.show.keep_suffix = parse_switch(value)?;
            Some(())
        },
    },
    MountOption {
        name: "poll-interval",
        kind: ValueKind::Span,
        placeholder: Some("TIME"),
        repeatable: false,
        help: "How often a directory of indexes is looked at again where it tells of no changes itself; 0 for never [default: 30s]",
        set: |config, value| {
            config.show.poll_interval = Some(parse_span(value)?);
            Some(())
        },
    },
    MountOption {
        name: "read-ahead",
        kind: ValueKind::Size,
        placeholder: Some("SIZE"),
        repeatable: false,
        help: "The most that is read ahead of one reader, 0 for nothing [default: a share of the memory]",
        set: |config, value| {
            config.ahead.window_bytes = Some(parse_size(value)?);
            Some(())
        },
    },
    MountOption {
        name: "kernel-read-ahead",
        kind: ValueKind::Size,
        placeholder: Some("SIZE"),
        repeatable: false,
        help: "What the kernel reads ahead, where root mounts [default: 4M]",
        set: |config, value| {
            config.ahead.kernel_bytes = Some(parse_size(value)?);
            Some(())
        },
    },
    MountOption {
        name: "warm",
        kind: ValueKind::Text,
        placeholder: Some("WHAT"),
        repeatable: true,
        help: "Fetch this in the background: all, metadata, or a path, with :START-END for a part of a file",
        set: |config, value| {
            config.ahead.warm.push(non_empty(value)?);
            Some(())
        },
    },
    MountOption {
        name: "warm-rate",
        kind: ValueKind::Size,
        placeholder: Some("SIZE"),
        repeatable: false,
        help: "The most that background fetches take in a second",
        set: |config, value| {
            config.ahead.warm_rate_bytes = Some(above_zero(parse_size(value)?)?);
            Some(())
        },
    },
    MountOption {
        name: "profile",
        kind: ValueKind::Text,
        placeholder: Some("FILE"),
        repeatable: false,
        help: "Fetch in the background what this profile lists; no for none [default: one that lies beside the index]",
        set: |config, value| {
            config.ahead.profile = Some(non_empty(value)?);
            Some(())
        },
    },
    MountOption {
        name: "record",
        kind: ValueKind::Text,
        placeholder: Some("FILE"),
        repeatable: false,
        help: "Write a profile of what is read first; the kernel reads no plain copy itself meanwhile",
        set: |config, value| {
            config.ahead.record = Some(non_empty(value)?.into());
            Some(())
        },
    },
    MountOption {
        name: "backing",
        kind: ValueKind::Text,
        placeholder: Some("FILE"),
        repeatable: false,
        help: "Keep a plain copy of an image in this file as it is read; auto for one in the cache",
        set: |config, value| {
            config.keep.backing = Some(non_empty(value)?);
            Some(())
        },
    },
    MountOption {
        name: "passthrough",
        kind: ValueKind::Switch,
        placeholder: None,
        repeatable: false,
        help: "Let the kernel read a complete plain copy itself [default: yes where it can]",
        set: |config, value| {
            config.keep.passthrough = Some(parse_switch(value)?);
            Some(())
        },
    },
    MountOption {
        name: "metadata-table",
        kind: ValueKind::Switch,
        placeholder: None,
        repeatable: false,
        help: "Make and use a table of all metadata [default: yes with a local cache]",
        set: |config, value| {
            config.keep.metadata_table = Some(parse_switch(value)?);
            Some(())
        },
    },
    MountOption {
        name: "index-sha256",
        kind: ValueKind::Text,
        placeholder: Some("HEX"),
        repeatable: false,
        help: "Refuse an index with another SHA-256 than this",
        set: |config, value| {
            config.sources.trust.index_sha256 = Some(parse_sha256(value)?);
            Some(())
        },
    },
    MountOption {
        name: "verify-key",
        kind: ValueKind::Text,
        placeholder: Some("KEY"),
        repeatable: false,
        help: "Refuse an index that is not signed with this minisign key (or file of it); no for none",
        set: |config, value| {
            config.sources.trust.verify_key = Some(non_empty(value)?).filter(|value| value != "no");
            Some(())
        },
    },
    MountOption {
        name: "mount-timeout",
        kind: ValueKind::Span,
        placeholder: Some("TIME"),
        repeatable: false,
        help: "A mount that is not ready by then has failed [default: 60s]",
        set: |config, value| {
            config.service.mount_timeout = parse_span(value).filter(|span| !span.is_zero())?;
            Some(())
        },
    },
    MountOption {
        name: "log",
        kind: ValueKind::Text,
        placeholder: Some("WHERE"),
        repeatable: false,
        help: "Where a background mount logs to: journald or a file",
        set: |config, value| {
            config.service.log = Some(non_empty(value)?);
            Some(())
        },
    },
    MountOption {
        name: "log-level",
        kind: ValueKind::Text,
        placeholder: Some("LEVEL"),
        repeatable: false,
        help: "What is logged: error, warn, info, debug or trace [default: warn, or as -v says]",
        set: |config, value| {
            let levels = [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE];
            config.service.log_level = Some(levels.into_iter().find(|level| level_name(*level) == value)?);
            Some(())
        },
    },
    MountOption {
        name: "setuid",
        kind: ValueKind::Text,
        placeholder: Some("USER"),
        repeatable: false,
        help: "The user to become, by name or number",
        set: |config, value| {
            config.service.setuid = Some(non_empty(value)?);
            Some(())
        },
    },
    MountOption {
        name: "sandbox",
        kind: ValueKind::Switch,
        placeholder: None,
        repeatable: false,
        help: "Shut the process out of all files but its own [default: yes when root mounts and the kernel can]",
        set: |config, value| {
            config.service.sandbox = Some(parse_switch(value)?);
            Some(())
        },
    },
    MountOption {
        name: "check-store",
        kind: ValueKind::Switch,
        placeholder: None,
        repeatable: false,
        help: "Mount an image only if its first bytes can be had [default: yes]",
        set: |config, value| {
            config.service.check_store = parse_switch(value)?;
            Some(())
        },
    },
    MountOption {
        name: "control",
        kind: ValueKind::Switch,
        placeholder: None,
        repeatable: false,
        help: "Offer a control socket, as status and reload need it [default: yes]",
        set: |config, value| {
            config.service.control = parse_switch(value)?;
            Some(())
        },
    },
    MountOption {
        name: "metrics",
        kind: ValueKind::Text,
        placeholder: Some("ADDR"),
        repeatable: false,
        help: "Serve metrics for Prometheus at this address",
        set: |config, value| {
            config.service.metrics = Some(non_empty(value)?);
            Some(())
        },
    },
    MountOption {
        name: "access-trace",
        kind: ValueKind::Text,
        placeholder: Some("FILE"),
        repeatable: false,
        help: "Write a line for each request to this file",
        set: |config, value| {
            config.service.access_trace = Some(non_empty(value)?.into());
            Some(())
        },
    },
];

/// Sets an option of every store.
fn for_stores(config: &mut MountConfig, name: &'static str, value: &str) -> Option<()> {
    Arc::make_mut(&mut config.sources.settings).set_by_flag(name, value)
}

fn non_empty(value: &str) -> Option<String> {
    (!value.is_empty()).then(|| value.to_owned())
}

fn above_zero(n: u64) -> Option<u64> {
    (n > 0).then_some(n)
}
