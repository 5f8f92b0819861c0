//! Options of a mount as they were given, free of the directory they were given in: for a service that left it, and for one that is asked to
//! change.

use std::path::PathBuf;

use anyhow::{Result, anyhow};

use super::args::MountArgs;
use super::paths::placed;
use crate::config::MountConfig;
use crate::mount::options::{MountOption, MountOptions};
use crate::mount::reload::Given;

/// All options of a mount in the order they count, our own ones and flags of the kernel; paths are absolute.
pub fn all(args: &MountArgs) -> Result<Vec<Given>> {
    let mut given = Vec::new();
    for list in &args.options {
        given.extend(MountOptions::named(list)?);
    }
    let flags = args.stores.given().into_iter().chain(args.mount_options.given());
    given.extend(flags.map(|(name, value)| (name.to_owned(), value)));
    given.into_iter().map(|(name, value)| absolute(&name, value)).collect()
}

/// Our own options among some.
pub fn own(given: &[Given]) -> Vec<Given> {
    given.iter().filter(|(name, _)| MountOption::find(name).is_some()).cloned().collect()
}

/// An option with its path made absolute, if its value is one.
fn absolute(name: &str, value: Option<String>) -> Result<Given> {
    let (Some(option), Some(value)) = (MountOption::find(name), &value) else { return Ok((name.to_owned(), value)) };
    // A home directory is the shell's affair where options are typed.
    let value = placed(option.name, value, &std::env::current_dir()?, None)?;
    Ok((name.to_owned(), Some(value)))
}

/// Reads the settings of a mount again, as they were read when it was made, with other options over them.
#[derive(Debug, Clone)]
pub struct Again {
    given: Vec<Given>,
    config_file: Option<PathBuf>,
}

impl Again {
    /// For what was typed.
    ///
    /// # Errors
    /// The options cannot be read.
    pub fn new(args: &MountArgs) -> Result<Self> {
        let config_file = args.stores.access.config_file.as_ref().map(std::path::absolute).transpose()?;
        Ok(Self { given: own(&all(args)?), config_file })
    }

    /// The values that were typed.
    pub fn values(&self) -> impl Iterator<Item = &str> {
        self.given.iter().filter_map(|(_, value)| value.as_deref())
    }

    /// The settings now. An option among `over` stands in place of the same one as it was typed.
    ///
    /// # Errors
    /// A file cannot be read or is wrong, or an option is.
    pub fn read(&self, over: &[Given]) -> Result<MountConfig> {
        let find = |name: &str| MountOption::find(name).map(|option| option.name);
        let is_given = |name: &str| over.iter().any(|(other, _)| find(other) == Some(name));
        // A file of stores and stores do not go together: the one that is given now stands in place of the other.
        let is_over = |name: &str| match find(name) {
            Some(name @ "store-file") => is_given(name) || is_given("store"),
            Some(name @ ("store" | "cache")) => is_given(name) || is_given("store-file"),
            Some(name) => is_given(name),
            None => false,
        };
        let given: Vec<&Given> = self.given.iter().filter(|(name, _)| !is_over(name)).chain(over).collect();
        let put_over = |config: MountConfig| {
            let mut options = MountOptions { config, ..MountOptions::default() };
            for (name, value) in &given {
                let option = MountOption::find(name).ok_or_else(|| anyhow!("unknown mount option {name:?}"))?;
                option.apply(&mut options.config, value.as_deref())?;
            }
            Ok(options)
        };
        Ok(super::mount::settle(&put_over, self.config_file.as_deref())?.config)
    }
}
