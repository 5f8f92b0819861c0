//! From flags, mount options, files and the environment to settings: the layers of `config`, and flags over them.
//!
//! A flag is the mount option of the same name, so that one table knows what a value may be.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use nix::unistd::{User, geteuid};

use super::paths::placed;
use super::store_flags::{AccessFlags, Given, StoreFlags, TrustFlags};
use crate::config::store_options::place_of;
use crate::config::{self, Configuration, MountConfig, Origin, SourceConfig, StoreSettings};
use crate::mount::options::{MOUNT_OPTIONS, MountOption, OptionError};
use crate::store::location::{Location, split_group, without_secrets};
use crate::volume::trust;

/// What files and the environment say, checked.
pub fn load(config_file: Option<&Path>) -> Result<Configuration> {
    let mut configuration = config::load(config_file, &variable)?;
    let home = variable("HOME").map(PathBuf::from);
    for entry in &mut configuration.mount {
        let (Some(option), Origin::File { path, .. }) = (MountOption::find(&entry.name), &entry.origin) else {
            continue;
        };
        let dir = path.parent().unwrap_or(Path::new("/"));
        entry.value = placed(option.name, &entry.value, dir, home.as_deref())?;
    }
    // All of it, also by verbs that do not mount: a mistake is to be found where it is made.
    mount_defaults(&configuration)?;
    Ok(configuration)
}

/// A variable of the environment. Services and mount(8) may have no `HOME`: then it is the one of the user that this process is.
fn variable(name: &str) -> Option<OsString> {
    let value = std::env::var_os(name).filter(|value| !value.is_empty());
    match (name, value) {
        ("HOME", None) => User::from_uid(geteuid()).ok().flatten().map(|user| user.dir.into()),
        (_, value) => value,
    }
}

/// The settings of a mount as files say them, before its own options.
pub fn mount_defaults(configuration: &Configuration) -> Result<MountConfig> {
    let mut config = MountConfig::default();
    let mut stores_of = None;
    for entry in &configuration.mount {
        let Some(option) = MountOption::find(&entry.name) else {
            let names = MOUNT_OPTIONS.iter().map(|option| option.name);
            let hint = config::units::nearest(&entry.name, names).map(|near| format!(" (did you mean {near:?}?)"));
            bail!("{}: mount: unknown key {:?}{}", entry.origin, entry.name, hint.unwrap_or_default());
        };
        if option.name == "config" {
            bail!("{}: mount: a configuration file cannot name another", entry.origin);
        }
        if place_of(option.name).is_some() {
            bail!("{}: mount: {} is for stores (put it into [store])", entry.origin, option.name);
        }
        // A list of stores stands in place of one in a weaker file, as every other value.
        if option.name == "store" && stores_of.replace(&entry.origin) != Some(&entry.origin) {
            config.sources.stores.clear();
        }
        option
            .apply(&mut config, Some(&entry.value))
            .map_err(|error| anyhow!("{}: mount: {}", entry.origin, in_words(&error, "")))?;
    }
    Ok(config)
}

/// Puts flags over settings.
pub fn apply(given: &[Given], config: &mut MountConfig) -> Result<()> {
    for (name, value) in given {
        if let Some(option) = MountOption::find(name) {
            option.apply(config, value.as_deref()).map_err(|error| anyhow!(in_words(&error, "--")))?;
        }
        if *name == "cache-repair" && value.as_deref().and_then(config::units::parse_switch) == Some(false) {
            tracing::warn!("--cache-repair=no: a bad chunk in the cache is fetched again all the same");
        }
    }
    Ok(())
}

/// Puts what is below the flags below them, and reads the store file. Whether they go together is for those who read with them.
pub fn finish(mut config: MountConfig, configuration: Configuration) -> Result<MountConfig> {
    if let Some(path) = &config.store_file {
        let file = config::store_file(path)?;
        config.sources.stores = file.stores;
        config.sources.cache = file.cache.or(config.sources.cache);
    }
    let sources = &mut config.sources;
    // Read now: what opens an index later may stand in another directory, or be shut out of this one.
    if let Some(key) = &mut sources.trust.verify_key {
        *key = trust::key_text(key)?;
    }
    let flags = std::mem::take(Arc::make_mut(&mut sources.settings));
    sources.settings = Arc::new(flags.over(configuration.settings));
    Ok(config)
}

/// The settings of a verb that reads: its flags over what is configured for stores. What is configured for mounts is not for it, but for
/// what an index must be: who demands that means it wherever content is read.
pub fn of_reading(flags: &StoreFlags) -> Result<MountConfig> {
    let configuration = load(flags.access.config_file.as_deref())?;
    let mut config = MountConfig::default();
    config.sources.trust = mount_defaults(&configuration)?.sources.trust;
    apply(&flags.given(), &mut config)?;
    let config = finish(config, configuration)?;
    config.sources.check()?;
    Ok(config)
}

/// The settings of a verb that reads an index and no chunk.
pub fn of_index(trust: &TrustFlags, access: &AccessFlags) -> Result<SourceConfig> {
    of_stores(&StoreFlags { trust: trust.clone(), access: access.clone(), ..StoreFlags::default() })
}

/// The stores of a verb that reads, with their options.
pub fn of_stores(flags: &StoreFlags) -> Result<SourceConfig> {
    Ok(of_reading(flags)?.sources)
}

/// The options of stores of a verb that has flags of its own for which stores.
pub fn of_access(access: &AccessFlags, concurrency: Option<usize>) -> Result<StoreSettings> {
    let configuration = load(access.config_file.as_deref())?;
    let mut config = MountConfig::default();
    let mut given = access.given();
    // 0 means as many as there are cores, to those who count threads with the same flag.
    given.extend(concurrency.filter(|n| *n > 0).map(|n| ("concurrency", Some(n.to_string()))));
    apply(&given, &mut config)?;
    Ok(Arc::unwrap_or_clone(finish(config, configuration)?.sources.settings))
}

/// A store's location that means the same from every directory: a daemon leaves the one it was started in.
pub fn absolute(store: &str) -> Result<String> {
    let mut members = Vec::new();
    for member in split_group(store) {
        members.push(match Location::parse(member)? {
            Location::Local(path) => {
                let absolute = std::path::absolute::<&Path>(&path).unwrap_or(path);
                let text = absolute.to_str().map(str::to_owned);
                text.with_context(|| format!("store {}: its path is not UTF-8", without_secrets(store)))?
            }
            _ => member.to_owned(),
        });
    }
    Ok(members.join("|"))
}

/// What is wrong with an option, said of the place it was given in.
fn in_words(error: &OptionError, dashes: &str) -> String {
    match error {
        OptionError::BadValue { name, value, expected } => format!("{dashes}{name}: {value:?} is not {expected}"),
        OptionError::NoValue { name, expected } => format!("{dashes}{name} needs a value: {expected}"),
        OptionError::Unknown { .. }
        | OptionError::UnwantedValue { .. }
        | OptionError::Reserved { .. }
        | OptionError::OpenQuote
        | OptionError::NoName { .. } => error.to_string(),
    }
}
