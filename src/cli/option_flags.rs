//! Flags of `mount` that are mount options: made of the table of the options, so that each is defined once.

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use super::store_flags::{Given, StoreFlags};
use crate::mount::options::{MOUNT_OPTIONS, MountOption};

/// The global flag that names a configuration file stands in place of the mount option.
const GLOBAL: &str = "config";

/// Every mount option that is not a flag of all verbs that read: `--name VALUE`, or `--name` for a switch.
#[derive(Debug, Clone, Default)]
pub struct OptionFlags {
    given: Vec<Given>,
}

impl OptionFlags {
    /// The flags that were given.
    pub fn given(&self) -> Vec<Given> {
        self.given.clone()
    }
}

/// The options that become flags here.
fn own_options() -> impl Iterator<Item = &'static MountOption> {
    let of_stores = StoreFlags::augment_args(Command::new("stores"));
    let is_of_stores = move |name: &str| of_stores.get_arguments().any(|arg| arg.get_long() == Some(name));
    MOUNT_OPTIONS.iter().filter(move |option| option.name != GLOBAL && !is_of_stores(option.name))
}

/// What clap knows the flag by.
fn id(option: &MountOption) -> &'static str {
    match option.name {
        // That of the flag before any verb, which casync gives its helpers: here it is this one.
        "log-level" => "log_level",
        name => name,
    }
}

fn flag(option: &'static MountOption) -> Arg {
    let arg = Arg::new(id(option)).long(option.name).help(option.help).action(ArgAction::Append);
    match option.placeholder {
        Some(placeholder) => arg.value_name(placeholder),
        None => arg.value_name("YES").num_args(0..=1).require_equals(true).default_missing_value("yes"),
    }
}

impl Args for OptionFlags {
    fn augment_args(command: Command) -> Command {
        own_options().fold(command, |command, option| command.arg(flag(option)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for OptionFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut given = Vec::new();
        for option in own_options() {
            let values = matches.get_many::<String>(id(option)).into_iter().flatten();
            given.extend(values.map(|value| (option.name, Some(value.clone()))));
        }
        Ok(Self { given })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        options: OptionFlags,
        #[command(flatten)]
        stores: StoreFlags,
    }

    #[test]
    fn every_mount_option_is_a_flag() {
        let command = Line::augment_args(Command::new("mount"));
        for option in MOUNT_OPTIONS.iter().filter(|option| option.name != GLOBAL) {
            let n_flags = command.get_arguments().filter(|arg| arg.get_long() == Some(option.name)).count();
            assert_eq!(n_flags, 1, "{}", option.name);
        }
    }

    #[test]
    fn flags_are_given_as_options() {
        let line = ["mount", "--umask", "022", "--control=no", "--allow-other", "--warm", "a", "--warm", "b"];
        let given = Line::try_parse_from(line).unwrap().options.given();
        let given: Vec<_> = given.iter().map(|(name, value)| (*name, value.as_deref().unwrap_or_default())).collect();
        assert_eq!(given, [("allow-other", "yes"), ("umask", "022"), ("warm", "a"), ("warm", "b"), ("control", "no")]);
    }
}
