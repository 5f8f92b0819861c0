//! Our own configuration file. The module above has its schema; here it is read, and what is wrong with it is said by file, line and key.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use toml::de::{DeTable, DeValue};

use super::secret::{LazySecret, SecretSource};
use super::store_options::{STORE_OPTIONS, StoreOption};
use super::stores::{Pattern, Place, Section};
use super::units::nearest;
use super::value::{Kind, Value};
use super::{ConfigError, MountEntry, Origin};
use crate::store::Secret;

/// What a file says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FileContent {
    /// Options of a mount, in the file's order.
    pub mount: Vec<MountEntry>,
    /// Options of stores: those for all first.
    pub sections: Vec<Section>,
}

/// Tables that a file may have.
const TABLES: [&str; 3] = ["mount", "store", "stores"];

/// Reads a file's text. `path` names it and says where its relative paths begin; `home` is what `~/` stands for.
///
/// # Errors
/// The first thing that is wrong.
pub fn parse(text: &str, path: &Path, home: Option<&Path>) -> Result<FileContent, ConfigError> {
    let reader = Reader { text, path: path.into(), dir: path.parent().unwrap_or(Path::new("/")), home };
    let table = match DeTable::parse(text) {
        Ok(table) => table.into_inner(),
        Err(error) => {
            // The message holds no part of the text, which may be a secret.
            return Err(reader.wrong(error.span().unwrap_or(0..0), &format!("not TOML: {}", error.message())));
        }
    };
    let mut content = FileContent::default();
    for (key, value) in in_file_order(&table) {
        match (key.get_ref().as_ref(), value.get_ref()) {
            ("mount", DeValue::Table(table)) => content.mount = reader.mount(table)?,
            // Before those of single stores, wherever it stands.
            ("store", DeValue::Table(table)) => {
                content.sections.insert(0, reader.section(table, key.span(), Place::All, "store")?);
            }
            ("stores", DeValue::Array(items)) => {
                for item in items.iter() {
                    content.sections.push(reader.stores(item)?);
                }
            }
            ("stores", _) => return Err(reader.wrong(key.span(), "stores: expected tables ([[stores]])")),
            (name @ ("mount" | "store"), _) => {
                return Err(reader.wrong(key.span(), &format!("{name}: expected a table ([{name}])")));
            }
            (other, _) => {
                let expected = "expected [mount], [store] or [[stores]]";
                return Err(reader.wrong(key.span(), &unknown("", other, TABLES.into_iter(), expected)));
            }
        }
    }
    Ok(content)
}

/// Where values are looked for, and what to call it.
struct Reader<'a> {
    text: &'a str,
    path: Arc<Path>,
    dir: &'a Path,
    home: Option<&'a Path>,
}

type Item<'a> = (&'a toml::Spanned<toml::de::DeString<'a>>, &'a toml::Spanned<DeValue<'a>>);

fn in_file_order<'a>(table: &'a DeTable<'a>) -> Vec<Item<'a>> {
    let mut items: Vec<Item<'a>> = table.iter().collect();
    items.sort_by_key(|(key, _)| key.span().start);
    items
}

impl Reader<'_> {
    fn origin(&self, span: &Range<usize>) -> Origin {
        let before = self.text.as_bytes().get(..span.start).unwrap_or_default();
        let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
        Origin::File { path: Arc::clone(&self.path), line: Some(line) }
    }

    fn wrong(&self, span: Range<usize>, why: &str) -> ConfigError {
        ConfigError::at(&self.origin(&span), why)
    }

    fn mount(&self, table: &DeTable<'_>) -> Result<Vec<MountEntry>, ConfigError> {
        let mut entries = Vec::new();
        for (key, value) in in_file_order(table) {
            let expected = "expected a text, a number, true or false, or a list of texts";
            let wrong = || self.wrong(key.span(), &format!("mount: {}: {expected}", key.get_ref()));
            let values = match value.get_ref() {
                DeValue::Array(items) => {
                    items.iter().map(|item| scalar(item.get_ref())).collect::<Option<Vec<_>>>().ok_or_else(wrong)?
                }
                value => vec![scalar(value).ok_or_else(wrong)?],
            };
            let name = key.get_ref().clone().into_owned();
            let origin = self.origin(&key.span());
            entries.extend(values.into_iter().map(|value| MountEntry {
                name: name.clone(),
                value,
                origin: origin.clone(),
            }));
        }
        Ok(entries)
    }

    fn stores(&self, item: &toml::Spanned<DeValue<'_>>) -> Result<Section, ConfigError> {
        let DeValue::Table(table) = item.get_ref() else {
            return Err(self.wrong(item.span(), "stores: expected tables ([[stores]])"));
        };
        let location = table.iter().find(|(key, _)| key.get_ref() == "location");
        let Some((key, value)) = location else {
            return Err(self.wrong(item.span(), "stores: location is missing (location = \"https://host/*\")"));
        };
        let Some(text) = value.get_ref().as_str().filter(|text| !text.is_empty()) else {
            let why = "stores: location: expected a text such as \"https://host/*\"";
            return Err(self.wrong(key.span(), why));
        };
        let expanded = self.expanded(text);
        let pattern = Pattern::ours(&expanded, self.dir)
            .map_err(|why| self.wrong(key.span(), &format!("stores: location: {text:?} is {why}")))?;
        self.section(table, item.span(), Place::Ours(pattern), "stores")
    }

    fn section(
        &self,
        table: &DeTable<'_>,
        span: Range<usize>,
        place: Place,
        name: &str,
    ) -> Result<Section, ConfigError> {
        let mut section = Section { place, ..Section::for_all(self.origin(&span)) };
        for (key, value) in in_file_order(table) {
            let key_name = key.get_ref().as_ref();
            if name == "stores" && key_name == "location" {
                continue;
            }
            let Some(option) = StoreOption::find(key_name) else {
                let known = STORE_OPTIONS.iter().map(|option| option.name);
                let why = unknown(&format!("{name}: "), key_name, known, "see `caifs config` for those there are");
                return Err(self.wrong(key.span(), &why));
            };
            let Some(value) = self.value(&option.kind, value.get_ref()) else {
                // What was given is not repeated: it may be a secret.
                let why = format!("{name}: {key_name}: expected {}", option.kind.expected());
                return Err(self.wrong(key.span(), &why));
            };
            section.set(option.name, value, self.origin(&key.span()));
        }
        Ok(section)
    }

    fn value(&self, kind: &Kind, value: &DeValue<'_>) -> Option<Value> {
        match (kind, value) {
            (Kind::Switch(_), DeValue::Boolean(yes)) => Some(Value::Switch(*yes)),
            (kind, DeValue::Integer(n)) => kind.count(u64::from_str_radix(n.as_str(), n.radix()).ok()?),
            (Kind::Secret(_), DeValue::Table(table)) => {
                let mut items = table.iter();
                let (key, value) = items.next().filter(|_| table.len() == 1)?;
                let source = match (key.get_ref().as_ref(), value.get_ref()) {
                    ("file", DeValue::String(path)) if !path.is_empty() => {
                        SecretSource::File(self.dir.join(self.expanded(path)))
                    }
                    ("command", DeValue::Array(words)) => {
                        let words = words.iter().map(|word| word.get_ref().as_str());
                        let words: Vec<String> = words.map(|word| word.map(str::to_owned)).collect::<Option<_>>()?;
                        let program = self.expanded(words.first().filter(|program| !program.is_empty())?);
                        let program = match program.contains('/') {
                            true => self.dir.join(program).to_string_lossy().into_owned(),
                            false => program,
                        };
                        SecretSource::Command([&[program], &words[1..]].concat())
                    }
                    _ => return None,
                };
                Some(Value::Secret(LazySecret::new(source)))
            }
            (Kind::Secret(_), DeValue::String(text)) if !text.is_empty() => {
                Some(Value::Secret(LazySecret::new(SecretSource::Text(Secret::new(text.as_ref())))))
            }
            (Kind::Path(_) | Kind::Program(_) | Kind::Paths(_), DeValue::String(text)) => {
                kind.text(&self.expanded(text), self.dir)
            }
            (kind, DeValue::String(text)) => kind.text(text, self.dir),
            (kind, DeValue::Array(items)) => {
                let texts = items.iter().map(|item| item.get_ref().as_str());
                let is_paths = matches!(kind, Kind::Paths(_));
                let texts =
                    texts.map(|text| text.map(|text| if is_paths { self.expanded(text) } else { text.to_owned() }));
                kind.list(&texts.collect::<Option<Vec<_>>>()?, self.dir)
            }
            _ => None,
        }
    }

    /// A path with `~/` replaced.
    fn expanded(&self, text: &str) -> String {
        match (text.strip_prefix("~/"), self.home) {
            (Some(rest), Some(home)) => home.join(rest).to_string_lossy().into_owned(),
            _ => text.to_owned(),
        }
    }
}

/// A value as text, as it stands behind `-o name=`.
fn scalar(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.clone().into_owned()),
        DeValue::Integer(n) => Some(u64::from_str_radix(n.as_str(), n.radix()).ok()?.to_string()),
        DeValue::Boolean(yes) => Some(if *yes { "yes" } else { "no" }.to_owned()),
        DeValue::Float(_) | DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_) => None,
    }
}

fn unknown<'a>(before: &str, key: &str, known: impl Iterator<Item = &'a str>, expected: &str) -> String {
    match nearest(key, known) {
        Some(near) => format!("{before}unknown key {key:?} (did you mean {near:?}?)"),
        None => format!("{before}unknown key {key:?} ({expected})"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<FileContent, ConfigError> {
        parse(text, Path::new("/etc/caifs/caifs.toml"), Some(Path::new("/home/me")))
    }

    fn shown(section: &Section) -> Vec<String> {
        section
            .entries
            .iter()
            .map(|(i, e)| format!("{}={} {}", STORE_OPTIONS[*i].name, e.value.shown(), e.origin))
            .collect()
    }

    #[test]
    fn the_example_of_the_documentation_is_read() {
        let docs = include_str!("mod.rs");
        let example = docs.split("//! ```toml\n").nth(1).and_then(|rest| rest.split("//! ```").next()).unwrap();
        let example: String = example.lines().map(|line| line.trim_start_matches("//!").to_owned() + "\n").collect();
        let content = parsed(&example).unwrap();
        assert!(content.mount.len() >= 5 && content.sections.len() >= 4, "{content:?}");
        let named: Vec<&str> = content.mount.iter().map(|entry| entry.name.as_str()).collect();
        assert!(named.contains(&"cache"), "{named:?}");
    }

    #[test]
    fn values_have_their_line() {
        let text = "# first\n[[stores]]\nlocation = \"https://h/*\"\nca-cert = \"ca.pem\"\nclient-cert = \"~/c.pem\"\n\n\
                    [store]\ntimeout = 5\nssh-identity-file = [\"~/.ssh/a\", \"b\"]\nssh-program = \"ssh\"\n\
                    http-auth = { file = \"~/secret\" }\nhttp-cookie = { command = [\"./get\", \"x\"] }\n\
                    [mount]\nmemory = \"1G\"\nstore = [\"/a\", \"/b\"]\noffline = true\nuid = 0x10\n";
        let content = parsed(text).unwrap();
        let at = |line| format!("/etc/caifs/caifs.toml:{line}");
        assert_eq!(content.sections[0].place, Place::All, "what is for all comes first");
        assert_eq!(content.sections[0].origin.to_string(), at(7));
        assert_eq!(
            shown(&content.sections[0]),
            [
                format!("timeout=\"5s\" {}", at(8)),
                format!("http-auth={{ file = \"/home/me/secret\" }} {}", at(11)),
                format!("http-cookie={{ command = [\"/etc/caifs/./get\", …] }} {}", at(12)),
                format!("ssh-program=\"ssh\" {}", at(10)),
                format!("ssh-identity-file=[\"/home/me/.ssh/a\", \"/etc/caifs/b\"] {}", at(9)),
            ]
        );
        assert_eq!(
            shown(&content.sections[1]),
            [format!("client-cert=\"/home/me/c.pem\" {}", at(5)), format!("ca-cert=\"/etc/caifs/ca.pem\" {}", at(4)),]
        );
        let mount: Vec<_> = content.mount.iter().map(|e| format!("{}={} {}", e.name, e.value, e.origin)).collect();
        let wanted = [("memory=1G", 14), ("store=/a", 15), ("store=/b", 15), ("offline=yes", 16), ("uid=16", 17)];
        assert_eq!(mount, wanted.map(|(text, line)| format!("{text} {}", at(line))));
    }

    #[test]
    fn mistakes_are_named_by_file_line_and_key() {
        for (text, why) in [
            ("x = ", "1: not TOML: "),
            ("[store]\nerror-retry = 1\nerror-retry = 2", "3: not TOML: "),
            ("[stroe]", "1: unknown key \"stroe\" (did you mean \"store\"?)"),
            ("[frobnicate]", "1: unknown key \"frobnicate\" (expected [mount], [store] or [[stores]])"),
            ("store = 1", "1: store: expected a table ([store])"),
            ("[stores]\nlocation = \"x\"", "1: stores: expected tables ([[stores]])"),
            ("stores = [1]", "1: stores: expected tables ([[stores]])"),
            ("\n[[stores]]\nca-cert = \"x\"", "2: stores: location is missing (location = \"https://host/*\")"),
            ("[[stores]]\nlocation = 1", "2: stores: location: expected a text such as \"https://host/*\""),
            (
                "[[stores]]\nlocation = \"[\"",
                "2: stores: location: \"[\" is not a pattern: a [ without its ], or a \\ at the end",
            ),
            ("[store]\n\nerorr-retry = 1", "3: store: unknown key \"erorr-retry\" (did you mean \"error-retry\"?)"),
            (
                "[store]\nlocation = \"x\"",
                "2: store: unknown key \"location\" (see `caifs config` for those there are)",
            ),
            ("[store]\nerror-retry = \"many\"", "2: store: error-retry: expected a number from 0 to 1000"),
            ("[store]\nerror-retry = -1", "2: store: error-retry: expected a number from 0 to 1000"),
            ("[store]\nuncompressed = \"yes\"", "2: store: uncompressed: expected true or false"),
            ("[store]\ntimeout = 0", "2: store: timeout: expected a time above 0 such as"),
            ("[store]\ntimeout = 1.5", "2: store: timeout: expected a time above 0 such as"),
            ("[store]\nca-cert = \"\"", "2: store: ca-cert: expected a path"),
            ("[store]\nhttp-auth = 12345", "2: store: http-auth: expected a text, { file = "),
            ("[store]\nhttp-auth = { fiel = \"geheim\" }", "2: store: http-auth: expected a text, { file = "),
            ("[store]\nhttp-auth = { command = [] }", "2: store: http-auth: expected a text, { file = "),
            ("[store]\nhttp-auth = { file = \"a\", command = [\"b\"] }", "2: store: http-auth: expected a text"),
            ("[store]\nhttp-auth = \"geheim\nx", "3: not TOML: "),
            ("[store]\ns3-more = [\"geheim\"]", "2: store: s3-more: expected a list of texts \"name=value\""),
            ("[mount]\nmemory = 1.5", "2: mount: memory: expected a text, a number, true or false, or a list of texts"),
        ] {
            let error = parsed(text).unwrap_err().to_string();
            assert!(error.starts_with(&format!("/etc/caifs/caifs.toml:{why}")), "{text:?}: {error}");
            assert!(!error.contains("geheim") && !error.contains("12345") && !error.contains('\n'), "{error}");
        }
    }
}
