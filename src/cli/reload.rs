//! `caifs reload`: a mount reads its settings again.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Result, bail};

use super::figures::safe;
use super::runtime_dir::runtime_dir;
use crate::mount::control::client::{ControlError, Place, all_own, ask_place, place_of, wrong_reply};
use crate::mount::control::protocol::{Change, Changed};
use crate::mount::control::{Reply, Request};

/// Arguments of `reload`.
#[derive(Debug, clap::Args)]
pub struct ReloadArgs {
    /// The mountpoint.
    #[arg(value_name = "DIR", required_unless_present = "all")]
    pub mountpoint: Option<PathBuf>,
    /// All mounts of this user.
    #[arg(long, conflicts_with = "mountpoint")]
    pub all: bool,
    /// Print what changed as JSON.
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &ReloadArgs) -> Result<()> {
    let dir = runtime_dir();
    let reload = |place: &Place| -> Result<Changed, ControlError> {
        match ask_place(&dir, place, &Request::Reload)? {
            Reply::Changed(changed) => Ok(changed),
            Reply::Status(_) | Reply::Map(_) => Err(wrong_reply(&dir, place)),
        }
    };
    let mut out = std::io::stdout().lock();
    if let Some(mountpoint) = &args.mountpoint {
        let changed = reload(&place_of(&dir, mountpoint)?)?;
        match args.json {
            true => writeln!(out, "{}", serde_json::to_string_pretty(&changed)?)?,
            false => out.write_all(text(&changed).as_bytes())?,
        }
        return Ok(());
    }
    let mut outcomes = Vec::new();
    let mut failed = Vec::new();
    for place in all_own(&dir)? {
        let name = place.name().to_string_lossy().into_owned();
        match reload(&place) {
            Ok(changed) if args.json => outcomes.push(serde_json::json!({ "mountpoint": name, "changed": changed })),
            Ok(changed) => write!(out, "{}:\n{}", safe(&name), text(&changed))?,
            // A mount without a socket is not meant.
            Err(ControlError::NoSocket { .. } | ControlError::Dead(_)) => {}
            Err(error) => failed.push(format!("{name}: {error}")),
        }
    }
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&outcomes)?)?;
    }
    match failed.is_empty() {
        true => Ok(()),
        false => bail!("{}", failed.join("; ")),
    }
}

/// What changed, a line each.
pub fn text(changed: &Changed) -> String {
    let value = |value: &Option<String>| value.as_deref().map_or_else(|| "default".to_owned(), safe);
    let line = |change: &Change| format!("{}: {} -> {}", change.name, value(&change.from), value(&change.to));
    let mut text = String::new();
    for change in &changed.changed {
        let _ = writeln!(text, "changed  {}", line(change));
    }
    for (store, names) in &changed.stores {
        let _ = writeln!(text, "changed  {} of {}", names.join(", "), safe(store));
    }
    if text.is_empty() {
        text.push_str("nothing is different; stores are opened anew\n");
    }
    for change in &changed.fixed {
        let _ = writeln!(text, "not now  {} (unmount and mount again)", line(change));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed_is_a_line_each() {
        let change = |name: &str, from: Option<&str>| Change {
            name: name.into(),
            from: from.map(str::to_owned),
            to: Some("1G".into()),
        };
        let changed = Changed {
            changed: vec![change("memory", Some("64M")), change("cache-size", None)],
            stores: vec![("https://h/x".into(), vec!["http-auth".into()])],
            fixed: vec![change("uid", None)],
        };
        let wanted = "changed  memory: 64M -> 1G\nchanged  cache-size: default -> 1G\nchanged  http-auth of https://h/x\n\
                      not now  uid: default -> 1G (unmount and mount again)\n";
        assert_eq!(text(&changed), wanted);
        assert!(text(&Changed::default()).starts_with("nothing is different"));
    }
}
