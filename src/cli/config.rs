//! `caifs config`: the configuration, and where each value comes from.

use std::io::{self, Write};

use anyhow::Result;

use super::args::ConfigArgs;
use super::settings;
use crate::config::explain::{self, Line, Part};
use crate::config::store_options::place_of;
use crate::config::units::show_span;
use crate::config::value::quoted;
use crate::config::{Configuration, MountConfig, Origin};
use crate::mount::options::{MOUNT_OPTIONS, MountOption};
use crate::store::location::without_secrets;

pub fn run(args: &ConfigArgs) -> Result<()> {
    let configuration = settings::load(args.stores.access.config_file.as_deref())?;
    let mount = mount_part(&configuration, args)?;
    let mut flags = MountConfig::default();
    settings::apply(&args.stores.given(), &mut flags)?;
    let settings = (*flags.sources.settings).clone().over(configuration.settings);
    let parts = match &args.location {
        Some(location) => explain::store(&settings, location)?,
        None => [vec![mount], explain::stores(&settings)].concat(),
    };
    let text = match args.json {
        true => explain::json(&parts),
        false => explain::text(&parts),
    };
    Ok(writeln!(io::stdout(), "{}", text.trim_end())?)
}

/// What holds for a mount: the last value given for each option, by files or flags.
fn mount_part(configuration: &Configuration, args: &ConfigArgs) -> Result<Part> {
    let mut lines: Vec<Line> = Vec::new();
    let given = args.stores.given();
    // Options of stores are shown with the stores.
    for option in MOUNT_OPTIONS.iter().filter(|option| place_of(option.name).is_none()) {
        let is_it = |name: &str| MountOption::find(name).is_some_and(|found| found.name == option.name);
        let of_files = configuration.mount.iter().filter(|entry| is_it(&entry.name));
        let of_files = of_files.map(|entry| (entry.value.clone(), entry.origin.clone()));
        let of_flags = given.iter().filter(|(name, _)| *name == option.name);
        let of_flags = of_flags.map(|(name, value)| (value.clone().unwrap_or("yes".into()), Origin::Flag(name)));
        let mut values: Vec<(String, Origin)> = of_files.chain(of_flags).collect();
        let Some((_, origin)) = values.last().cloned() else { continue };
        values.retain(|(_, other)| *other == origin);
        let mut shown: Vec<String> = values.iter().map(|(value, _)| quoted(&without_secrets(value))).collect();
        let value = match (option.repeatable, shown.pop()) {
            (true, last) => format!("[{}]", shown.into_iter().chain(last).collect::<Vec<_>>().join(", ")),
            (false, last) => last.unwrap_or_default(),
        };
        lines.push(Line { name: option.name.to_owned(), value, origin });
    }
    let defaults = MountConfig::default();
    let sizes = [("memory", format!("{}M", defaults.memory_bytes >> 20))];
    let times = [("io-timeout", show_span(defaults.io_timeout))];
    for (name, value) in sizes.into_iter().chain(times) {
        if !lines.iter().any(|line| line.name == name) {
            lines.push(Line { name: name.to_owned(), value: quoted(&value), origin: Origin::Default });
        }
    }
    Ok(Part { header: "[mount]", location: None, lines })
}
