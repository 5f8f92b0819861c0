//! Options of stores, found by their locations: sections of files, the environment and flags, laid over each other.
//!
//! Sections are looked at in the order of [`StoreSettings`]; of those whose [`Place`] covers a location, a later one wins for what
//! it sets. Credentials that belong together are taken from one section. What means nothing to a kind of store is left out, so that
//! no secret is read for a store that cannot use it.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use super::glob::{BadPattern, Glob, Stars};
use super::store_options::{ByOption, Draft, STORE_OPTIONS, StoreOption, TOGETHER, place_of};
use super::value::{Kind, Value};
use super::{ConfigError, Origin};
use crate::store::location::{Location, split_group, without_secrets};
use crate::store::open::StoreSpec;
use crate::store::options::StoreOptions;

/// A value, and who said it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The value.
    pub value: Value,
    /// Who said it.
    pub origin: Origin,
}

/// The stores a section is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// All.
    All,
    /// Those whose location a pattern of ours covers.
    Ours(Pattern),
    /// Those whose location one of desync's patterns covers; of one table of its file only one may.
    Desync {
        /// The table of desync's file.
        table: &'static str,
        /// The pattern.
        pattern: Pattern,
    },
    /// Those on an S3 server, by `scheme://host[:port]` as typed.
    S3Server(String),
}

/// A pattern for locations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    /// As it was given.
    pub text: String,
    /// For locations with a scheme or host; any of them.
    remote: Vec<Glob>,
    /// For local directories; any of them.
    local: Vec<Glob>,
}

impl Pattern {
    /// A pattern of our own files, where `**` crosses `/`, and `/**` at the end covers also what stands before it. A relative path
    /// begins in `dir`.
    ///
    /// # Errors
    /// It is no pattern.
    pub fn ours(text: &str, dir: &Path) -> Result<Self, BadPattern> {
        Self::new(text, dir, Stars::CrossSlashes)
    }

    /// A pattern of desync's file: Go's `path.Match` on the location without one `/` at its end, on absolute paths for directories.
    ///
    /// # Errors
    /// It is no pattern.
    pub fn desync(text: &str, dir: &Path) -> Result<Self, BadPattern> {
        Self::new(text, dir, Stars::StayInPart)
    }

    fn new(text: &str, dir: &Path, stars: Stars) -> Result<Self, BadPattern> {
        let globs = |text: &str| {
            let text = text.strip_suffix('/').unwrap_or(text);
            let itself = text.strip_suffix("/**").filter(|_| stars == Stars::CrossSlashes);
            [Some(text), itself].into_iter().flatten().map(|text| Glob::new(text, stars)).collect::<Result<Vec<_>, _>>()
        };
        let local = match (text.strip_prefix("file://"), text.contains("://")) {
            (Some(path), _) => globs(&clean(Path::new(path), dir))?,
            (None, true) => Vec::new(),
            (None, false) if text.starts_with("**") => globs(text)?,
            (None, false) => globs(&clean(Path::new(text), dir))?,
        };
        Ok(Self { text: text.to_owned(), remote: globs(text)?, local })
    }

    fn covers(&self, names: &Names) -> bool {
        match &names.local {
            Some(path) => self.local.iter().any(|glob| glob.matches(path)),
            None => self.remote.iter().any(|glob| names.remote.iter().any(|name| glob.matches(name))),
        }
    }
}

/// What a location is looked up by.
struct Names {
    /// The absolute path of a local directory.
    local: Option<String>,
    /// Otherwise: as typed, without a query, without a login, without both.
    remote: Vec<String>,
    /// `scheme://host[:port]` of an S3 server, as typed and in the usual form.
    s3_servers: Vec<String>,
}

impl Names {
    fn new(text: &str, location: &Location) -> Self {
        if let Some(path) = location.local_path() {
            // Of the process's own directory, which a relative location means.
            let path = std::path::absolute(path).unwrap_or(path.to_owned());
            return Self { local: Some(clean(&path, Path::new("/"))), remote: Vec::new(), s3_servers: Vec::new() };
        }
        let without_query = text.split_once('?').map_or(text, |(before, _)| before);
        let mut remote = Vec::new();
        for text in [text, without_query] {
            remote.push(text.strip_suffix('/').unwrap_or(text).to_owned());
            remote.extend(without_login(text.strip_suffix('/').unwrap_or(text)));
        }
        let mut s3_servers = Vec::new();
        if let Location::S3(s3) = location {
            s3_servers.push(s3.endpoint.clone());
            let typed = text.strip_prefix("s3+").unwrap_or(text);
            if let Some((scheme, rest)) = typed.split_once("://") {
                let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
                let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
                s3_servers.push(format!("{scheme}://{host}"));
            }
        }
        Self { local: None, remote, s3_servers }
    }
}

/// `scheme://host/…` from `scheme://user:password@host/…`.
fn without_login(text: &str) -> Option<String> {
    let (scheme, rest) = text.split_once("://")?;
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let (_, host) = authority.rsplit_once('@')?;
    Some(format!("{scheme}://{host}{path}"))
}

/// The path, absolute, without `.` and `..` (by name only, as Go does it).
fn clean(path: &Path, dir: &Path) -> String {
    let mut cleaned = PathBuf::from("/");
    for part in dir.join(path).components() {
        match part {
            Component::Normal(name) => cleaned.push(name),
            Component::ParentDir => {
                cleaned.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    cleaned.to_string_lossy().into_owned()
}

impl Place {
    fn covers(&self, names: &Names) -> bool {
        match self {
            Self::All => true,
            Self::Ours(pattern) | Self::Desync { pattern, .. } => pattern.covers(names),
            Self::S3Server(server) => names.s3_servers.contains(server),
        }
    }
}

/// What is set for the stores of one place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// The stores.
    pub place: Place,
    /// Where the section begins.
    pub origin: Origin,
    /// What is set.
    pub entries: ByOption<Entry>,
}

impl Section {
    /// A section for every store that sets nothing yet.
    pub fn for_all(origin: Origin) -> Self {
        Self { place: Place::All, origin, entries: BTreeMap::new() }
    }

    /// Sets an option of the table.
    pub fn set(&mut self, name: &str, value: Value, origin: Origin) {
        if let Some(place) = place_of(name) {
            self.entries.insert(place, Entry { value, origin });
        }
    }
}

/// What was set for one store.
#[derive(Debug, Clone)]
pub struct Effective {
    /// Where it is.
    pub location: Location,
    /// The options that mean something to it, in the table's order; secrets unread.
    pub entries: Vec<(&'static StoreOption, Entry)>,
}

/// Options of stores, found by their locations.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StoreSettings {
    /// What holds when no section says otherwise.
    pub base: StoreOptions,
    /// Sections; a later one wins.
    sections: Vec<Section>,
    /// What flags say, which wins over every section.
    flags: ByOption<Entry>,
}

impl StoreSettings {
    /// Settings of sections, the last of which is the strongest.
    pub fn new(sections: Vec<Section>) -> Self {
        Self { sections, ..Self::default() }
    }

    /// Sets an option for every store, as the flag `--name value` does it. `None` when the value does not fit, or nobody knows the
    /// option. A relative path begins in the process's own directory.
    pub fn set_by_flag(&mut self, name: &'static str, value: &str) -> Option<()> {
        let place = place_of(name)?;
        let mut value = STORE_OPTIONS[place].kind.typed(value, Path::new(""))?;
        if let (Value::Path(path), Kind::Path(_)) = (&mut value, &STORE_OPTIONS[place].kind) {
            *path = std::path::absolute(&path).ok()?;
        }
        self.flags.insert(place, Entry { value, origin: Origin::Flag(name) });
        Some(())
    }

    /// These settings with those of files and environment below them.
    pub fn over(self, below: Self) -> Self {
        let mut sections = below.sections;
        sections.extend(self.sections);
        let mut flags = below.flags;
        flags.extend(self.flags);
        Self { base: self.base, sections, flags }
    }

    /// The sections, the strongest last, without what flags say.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// What holds for every store whose location no pattern covers.
    pub fn for_all(&self) -> Vec<(&'static StoreOption, Entry)> {
        listed(&merged(self.sections.iter().filter(|section| section.place == Place::All), &self.flags))
    }

    /// What was set for the store at a location (no group), secrets unread.
    ///
    /// # Errors
    /// It is no location, or two patterns of desync's file cover it.
    pub fn effective(&self, text: &str) -> Result<Effective, ConfigError> {
        let location = Location::parse(text)?;
        let names = Names::new(text, &location);
        let covering: Vec<&Section> = self.sections.iter().filter(|section| section.place.covers(&names)).collect();
        let mut only: BTreeMap<&str, &Pattern> = BTreeMap::new();
        for section in &covering {
            let Place::Desync { table, pattern } = &section.place else { continue };
            if let Some(other) = only.insert(table, pattern) {
                let (other, pattern) = (without_secrets(&other.text), without_secrets(&pattern.text));
                let why = format!("{location}: two keys of {table} match: {other:?} and {pattern:?}");
                return Err(ConfigError::at(&section.origin, &why));
            }
        }
        let mut entries = listed(&merged(covering.into_iter(), &self.flags));
        entries.retain(|(option, _)| option.scope.covers(&location));
        Ok(Effective { location, entries })
    }

    /// The members of a group of mirrors (one, if it is no group), each with its options. An index is looked up by the text before its
    /// last `/`. Secrets in files and of commands are read now, those the store can use.
    ///
    /// # Errors
    /// A location cannot be read, its options contradict each other, or a secret cannot be read.
    pub fn resolve(&self, text: &str) -> Result<Vec<StoreSpec>, ConfigError> {
        let members = if text.contains('|') { split_group(text).collect() } else { vec![text] };
        members.into_iter().map(|member| self.resolve_member(member)).collect()
    }

    fn resolve_member(&self, text: &str) -> Result<StoreSpec, ConfigError> {
        let Effective { location, entries } = self.effective(text)?;
        let wrong = |why: &str| ConfigError::new(format!("{location}: {why}"));
        let is_said = |name: &str| entries.iter().any(|(option, _)| option.name == name);
        let is_encrypted =
            entries.iter().any(|(option, entry)| option.name == "encryption" && entry.value == Value::Switch(true));
        let mut draft = Draft::new(self.base.clone());
        for (option, Entry { value, origin }) in &entries {
            // A key in the environment is for the stores that are encrypted; one in a file was meant to encrypt.
            let is_of_encryption = matches!(option.name, "encryption-key" | "encryption-algorithm");
            if is_of_encryption && !is_said("encryption") && !matches!(origin, Origin::Environment(_)) {
                let why = format!("{} is set ({origin}), but encryption is not (encryption = true)", option.name);
                return Err(wrong(&why));
            }
            if option.name == "encryption-key" && !is_encrypted {
                continue;
            }
            option.put(&mut draft, value).map_err(|why| wrong(&format!("{} ({origin}): {why}", option.name)))?;
        }
        let options = draft.finish().map_err(|why| wrong(&why))?;
        Ok(StoreSpec { location, options })
    }
}

/// Sections laid over each other, and flags over them.
fn merged<'a>(sections: impl Iterator<Item = &'a Section>, flags: &'a ByOption<Entry>) -> ByOption<&'a Entry> {
    let mut merged: ByOption<&Entry> = BTreeMap::new();
    for entries in sections.map(|section| &section.entries).chain([flags]) {
        for (first, others) in TOGETHER {
            if place_of(first).is_some_and(|place| entries.contains_key(&place)) {
                merged.retain(|place, _| !others.contains(&STORE_OPTIONS[*place].name));
            }
        }
        merged.extend(entries.iter().map(|(place, entry)| (*place, entry)));
    }
    merged
}

fn listed(merged: &ByOption<&Entry>) -> Vec<(&'static StoreOption, Entry)> {
    merged.iter().map(|(place, entry)| (&STORE_OPTIONS[*place], (*entry).clone())).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::secret::{LazySecret, SecretSource};
    use std::time::Duration;

    fn section(place: Place, entries: &[(&'static str, Value)]) -> Section {
        let mut section = Section { place, ..Section::for_all(Origin::Default) };
        for (name, value) in entries {
            section.set(name, value.clone(), Origin::Flag(name));
        }
        section
    }

    fn ours(text: &str) -> Place {
        Place::Ours(Pattern::ours(text, Path::new("/etc/caifs")).unwrap())
    }

    fn retries(settings: &StoreSettings, text: &str) -> u32 {
        settings.resolve(text).unwrap()[0].options.retry.n_retries
    }

    #[test]
    fn later_sections_win_where_they_match() {
        let n = |n| [("error-retry", Value::Count(n))];
        let settings = StoreSettings::new(vec![
            section(Place::All, &n(1)),
            section(ours("https://h/*"), &n(2)),
            section(ours("https://h/b"), &n(4)),
            section(ours("https://h/tree/**"), &n(5)),
            section(ours("/srv/*"), &n(6)),
            section(ours("store"), &n(7)),
            section(ours("file:///mnt/x"), &n(8)),
            section(ours("**/deep"), &n(9)),
            section(ours("host:/srv/*"), &n(10)),
        ]);
        for (text, wanted) in [
            ("https://x/a", 1),
            ("https://h/a", 2),
            ("https://h/a/", 2),
            ("https://u:p@h/a", 2),
            ("https://h/a?sig=1", 2),
            ("https://h/a/c", 1),
            ("https://h/b/", 4),
            ("https://h/tree", 5),
            ("https://h/tree/a/b", 5),
            ("/srv/x", 6),
            ("/srv/x/", 6),
            ("/srv/a/../x/.", 6),
            ("file:///srv/x", 6),
            ("/srv", 1),
            ("/etc/caifs/store", 7),
            ("/mnt/x", 8),
            ("/a/b/deep", 9),
            ("host:/srv/x", 10),
            ("other:/srv/x", 1),
        ] {
            assert_eq!(retries(&settings, text), wanted, "{text}");
        }
        let mut flags = StoreSettings::default();
        flags.set_by_flag("error-retry", "0").unwrap();
        assert_eq!(flags.set_by_flag("error-retry", "x"), None);
        assert_eq!(retries(&flags.over(settings), "https://h/b"), 0);
    }

    #[test]
    fn members_of_a_group_are_matched_alone() {
        let settings = StoreSettings::new(vec![section(ours("http://b"), &[("uncompressed", Value::Switch(true))])]);
        let specs = settings.resolve("http://a|http://b").unwrap();
        let forms: Vec<_> = specs.iter().map(|spec| spec.options.layout.extension()).collect();
        assert_eq!(forms, [".cacnk", ""]);
    }

    #[test]
    fn two_keys_of_desync_are_one_too_many() {
        let desync = |text| {
            let pattern = Pattern::desync(text, Path::new("/")).unwrap();
            section(Place::Desync { table: "store-options", pattern }, &[("error-retry", Value::Count(9))])
        };
        let settings = StoreSettings::new(vec![desync("http://h/*"), desync("http://h/a"), desync("http://h/**/x")]);
        assert_eq!(retries(&settings, "http://h/b"), 9);
        assert_eq!(retries(&settings, "http://h/b/c/x"), 3, "two stars are one to Go");
        let error = settings.resolve("http://h/a/").unwrap_err().to_string();
        assert!(error.contains(r#"two keys of store-options match: "http://h/*" and "http://h/a""#), "{error}");
    }

    #[test]
    fn credentials_come_from_one_section() {
        let secret = |text: &str| Value::Secret(LazySecret::text(text));
        let keys = |key| [("s3-access-key", secret(key)), ("s3-secret-key", secret("s"))];
        let token = [&keys("a")[..], &[("s3-session-token", secret("t"))]].concat();
        let profile = [("s3-profile", Value::Text("p".into()))];
        for (second, access_key, token_is_kept) in [(&keys("b")[..], Some("b"), false), (&profile[..], None, false)] {
            let settings = StoreSettings::new(vec![section(Place::All, &token), section(Place::All, second)]);
            let s3 = settings.resolve("s3+http://h/b").unwrap().remove(0).options.s3;
            assert_eq!(s3.access_key.as_deref(), access_key);
            assert_eq!(s3.session_token.is_some(), token_is_kept);
        }
        let server = Place::S3Server("http://h:80".into());
        let settings = StoreSettings::new(vec![section(server, &keys("a"))]);
        for (text, has_key) in [("s3+http://h:80/b", true), ("s3+http://h/b", false), ("s3+https://h:80/b", false)] {
            assert_eq!(settings.resolve(text).unwrap()[0].options.s3.access_key.is_some(), has_key, "{text}");
        }
    }

    #[test]
    fn only_secrets_that_a_store_can_use_are_read() {
        let broken = Value::Secret(LazySecret::new(SecretSource::File("/no/such/file".into())));
        let entries: Vec<_> = ["http-auth", "s3-session-token", "encryption-key", "oci-password"]
            .map(|name| (name, broken.clone()))
            .into_iter()
            .chain([("encryption", Value::Switch(false)), ("oci-username", Value::Text("u".into()))])
            .collect();
        let settings = StoreSettings::new(vec![section(Place::All, &entries)]);
        assert!(settings.resolve("/srv/store").is_ok());
        for (text, name) in [("http://h/x", "http-auth"), ("s3+http://h/b", "s3-session-token")] {
            let error = settings.resolve(text).unwrap_err().to_string();
            assert!(error.contains(&format!("{name} (flag --{name}): secret file /no/such/file: No such")), "{error}");
        }
    }

    #[test]
    fn a_key_in_a_file_is_for_encryption() {
        let key = "d69371915dbc4b1f0ec55e2a80f0e089accf4b32e0f8dc0e29fed7f0f30d1b26";
        let key = Value::Secret(LazySecret::text(key));
        let alone = section(Place::All, &[("encryption-key", key.clone())]);
        let error = StoreSettings::new(vec![alone]).resolve("/s").unwrap_err().to_string();
        assert!(error.contains("encryption-key is set (flag --encryption-key), but encryption is not"), "{error}");
        let mut environment = Section::for_all(Origin::Default);
        environment.set("encryption-key", key, Origin::Environment("DESYNC_ENCRYPTION_KEY"));
        let on = section(ours("/s"), &[("encryption", Value::Switch(true))]);
        let settings = StoreSettings::new(vec![environment, on]);
        for (text, extension) in [("/s", ".cacnk.xchacha20-poly1305-511a735b"), ("/t", ".cacnk")] {
            assert_eq!(settings.resolve(text).unwrap()[0].options.layout.extension(), extension);
        }
    }

    #[test]
    fn settings_without_sections_are_their_base() {
        let base = StoreOptions { request_timeout: Duration::from_secs(1), ..StoreOptions::default() };
        let settings = StoreSettings { base: base.clone(), ..StoreSettings::default() };
        assert_eq!(settings.resolve("http://h").unwrap()[0].options, base);
        assert!(settings.resolve("").is_err() && settings.resolve("ftp://h").is_err());
    }
}
