//! What is set, and who said it: for a person in the syntax of our file, for programs as JSON. Secrets are masked.

use std::fmt::Write;

use super::store_options::{STORE_OPTIONS, StoreOption};
use super::stores::{Effective, Entry, Place};
use super::value::{Value, quoted};
use super::{ConfigError, Origin, StoreSettings};
use crate::store::location::{split_group, without_secrets};

/// A part of the configuration, ready to be shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Its header: `[mount]`, `[store]` or `[[stores]]`.
    pub header: &'static str,
    /// The stores it is for, in words of the file (`location = "…"`), and where the part begins.
    pub location: Option<(String, Origin)>,
    /// What it sets.
    pub lines: Vec<Line>,
}

/// A value that is set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// The option.
    pub name: String,
    /// Its value in the file's syntax, without secrets.
    pub value: String,
    /// Who said it.
    pub origin: Origin,
}

/// The stores' part of the configuration: what holds for all, then each section for some.
pub fn stores(settings: &StoreSettings) -> Vec<Part> {
    let mut parts =
        vec![Part { header: "[store]", location: None, lines: with_defaults(settings.for_all(), |_| true) }];
    for section in settings.sections() {
        if let Some(location) = place_text(&section.place) {
            let lines = section.entries.iter().map(|(place, entry)| line(&STORE_OPTIONS[*place], entry)).collect();
            let location = Some((location, section.origin.clone()));
            parts.push(Part { header: "[[stores]]", location, lines });
        }
    }
    parts
}

/// What holds for one store, or for each member of a group. Secrets are not read.
///
/// # Errors
/// It is no location, or two patterns of desync's file cover it.
pub fn store(settings: &StoreSettings, text: &str) -> Result<Vec<Part>, ConfigError> {
    let mut parts = Vec::new();
    for member in split_group(text) {
        let Effective { location, entries } = settings.effective(member)?;
        let lines = with_defaults(entries, |option| option.scope.covers(&location));
        let location = Some((without_secrets(member), Origin::Flag("location")));
        parts.push(Part { header: "[[stores]]", location, lines });
    }
    Ok(parts)
}

/// What was said for one store, or for each member of a group, beside the defaults: names with values, without secrets.
///
/// # Errors
/// As [`store`].
pub fn said(settings: &StoreSettings, text: &str) -> Result<Vec<(String, String)>, ConfigError> {
    let lines = store(settings, text)?.into_iter().flat_map(|part| part.lines);
    Ok(lines.filter(|line| line.origin != Origin::Default).map(|line| (line.name, line.value)).collect())
}

/// The options that two settings have otherwise for a store, or for any member of a group. Secrets are compared by what they are, so those of `new`
/// are read now.
///
/// # Errors
/// As [`store`]; a secret cannot be read.
pub fn differences(old: &StoreSettings, new: &StoreSettings, text: &str) -> Result<Vec<&'static str>, ConfigError> {
    let mut names = Vec::new();
    for member in split_group(text) {
        let (old, new) = (old.effective(member)?.entries, new.effective(member)?.entries);
        let value_in = |entries: &[(&'static StoreOption, Entry)], name: &str| {
            entries.iter().find(|(option, _)| option.name == name).map(|(_, entry)| entry.value.clone())
        };
        for option in STORE_OPTIONS {
            let is_same = match (value_in(&old, option.name), value_in(&new, option.name)) {
                (Some(Value::Secret(old)), Some(Value::Secret(new))) => {
                    let wrong = |why: String| ConfigError::new(format!("{}: {why}", option.name));
                    // One that could never be read was another.
                    old == new && old.get().ok() == Some(new.get().map_err(wrong)?)
                }
                (old, new) => old == new,
            };
            if !is_same && !names.contains(&option.name) {
                names.push(option.name);
            }
        }
    }
    Ok(names)
}

/// What is set, and the defaults of what is not, in the table's order.
fn with_defaults(entries: Vec<(&'static StoreOption, Entry)>, is_for: impl Fn(&StoreOption) -> bool) -> Vec<Line> {
    let mut lines = Vec::new();
    for option in STORE_OPTIONS.iter().filter(|option| is_for(option)) {
        match (entries.iter().find(|(set, _)| set.name == option.name), option.default) {
            (Some((_, entry)), _) => lines.push(line(option, entry)),
            (None, Some(default)) => {
                let (name, value) = (option.name.to_owned(), default.to_owned());
                lines.push(Line { name, value, origin: Origin::Default });
            }
            (None, None) => {}
        }
    }
    lines
}

fn line(option: &StoreOption, entry: &Entry) -> Line {
    let value = match &entry.value {
        // An address may hold a login.
        Value::Text(text) => quoted(&without_secrets(text)),
        value => value.shown(),
    };
    Line { name: option.name.to_owned(), value, origin: entry.origin.clone() }
}

fn place_text(place: &Place) -> Option<String> {
    match place {
        Place::All => None,
        Place::Ours(pattern) | Place::Desync { pattern, .. } => Some(without_secrets(&pattern.text)),
        Place::S3Server(server) => Some(format!("s3+{}/**", without_secrets(server))),
    }
}

/// Parts as text of our file, with who said it behind each value.
pub fn text(parts: &[Part]) -> String {
    let mut text = String::new();
    for (n, part) in parts.iter().enumerate() {
        let gap = if n > 0 { "\n" } else { "" };
        // Writing into a text cannot fail.
        let _ = writeln!(text, "{gap}{}", part.header);
        let location = part.location.iter().map(|(location, origin)| {
            let value = quoted(location);
            let origin = if matches!(origin, Origin::Flag(_)) { None } else { Some(origin) };
            ("location", value, origin)
        });
        let lines = part.lines.iter().map(|line| (line.name.as_str(), line.value.clone(), Some(&line.origin)));
        for (name, value, origin) in location.chain(lines) {
            let value = format!("{name} = {value}");
            let _ = match origin {
                Some(origin) => writeln!(text, "{value:<48} # {}", printable(&origin.to_string())),
                None => writeln!(text, "{value}"),
            };
        }
    }
    text
}

/// Parts as a JSON array.
pub fn json(parts: &[Part]) -> String {
    use serde_json::{Map, Value as Json, json};
    let shown = parts.iter().map(|part| {
        let lines = part
            .lines
            .iter()
            .map(|line| (line.name.clone(), json!({ "value": line.value, "from": line.origin.to_string() })));
        let options: Map<String, Json> = lines.collect();
        let section = part.header.trim_matches(['[', ']']);
        json!({ "section": section, "location": part.location.as_ref().map(|it| &it.0), "options": options })
    });
    format!("{:#}", Json::Array(shown.collect()))
}

/// A name of a file that cannot end its line.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{FFFD}' } else { c }).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::{desync_file, toml_file};
    use std::path::Path;

    fn settings() -> StoreSettings {
        let toml = "[store]\nerror-retry = 5\nhttp-auth = \"geheim\"\n\
                    [[stores]]\nlocation = \"https://u:geheim@h/**\"\nhttp-cookie = { file = \"/f\" }\n\
                    [[stores]]\nlocation = \"s3+http://h/*\"\ns3-secret-key = { command = [\"pass\", \"geheim\"] }\n\
                    s3-more = [\"aws_token=geheim\"]\n";
        let json = r#"{"s3-credentials": {"http://h": {"access-key": "geheim", "secret-key": "geheim"}}}"#;
        let mut sections = desync_file::parse(json, Path::new("/d.json"), Path::new("/")).unwrap();
        sections.extend(toml_file::parse(toml, Path::new("/c.toml"), None).unwrap().sections);
        let mut settings = StoreSettings::default();
        settings.set_by_flag("concurrency", "3").unwrap();
        settings.over(StoreSettings::new(sections))
    }

    #[test]
    fn everything_is_shown_but_secrets() {
        let parts = stores(&settings());
        let shown = text(&parts);
        for line in [
            "error-retry = 5                                  # /c.toml:2",
            "http-auth = \"***\"                                # /c.toml:3",
            "concurrency = 3                                  # flag --concurrency",
            "timeout = \"60s\"                                  # default",
            "location = \"https://u@h/**\"                      # /c.toml:4",
            "http-cookie = { file = \"/f\" }                    # /c.toml:6",
            "location = \"s3+http://h/**\"                      # /d.json",
            "s3-access-key = \"***\"                            # /d.json",
            "s3-secret-key = { command = [\"pass\", …] }        # /c.toml:9",
            "s3-more = [\"aws_token=***\"]                      # /c.toml:10",
        ] {
            assert!(shown.lines().any(|shown| shown == line), "{line}\n{shown}");
        }
        assert!(!shown.contains("geheim") && !json(&parts).contains("geheim"), "{shown}");
        let parsed: serde_json::Value = serde_json::from_str(&json(&parts)).unwrap();
        assert_eq!(parsed[0]["options"]["error-retry"]["from"], "/c.toml:2");
    }

    #[test]
    fn one_store_shows_what_it_uses() {
        let shown = text(&store(&settings(), "https://u:geheim@h/x|/srv/store").unwrap());
        for (line, is_there) in [
            ("location = \"https://u@h/x\"", true),
            ("location = \"/srv/store\"", true),
            ("http-cookie = { file", true),
            ("trust-insecure = false", true),
            ("s3-", false),
            ("geheim", false),
        ] {
            assert_eq!(shown.contains(line), is_there, "{line}\n{shown}");
        }
        let local = text(&store(&settings(), "/srv/store").unwrap());
        assert!(!local.contains("http-auth"), "{local}");
        assert!(store(&settings(), "ftp://h").is_err());
    }
}
