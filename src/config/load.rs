//! From files and environment to settings: which files there are, and in which order they count.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::unistd::geteuid;

use super::environment::{self, Lookup};
use super::secret::SecretSource;
use super::store_options::STORE_OPTIONS;
use super::stores::{Entry, Section};
use super::toml_file::FileContent;
use super::value::Value;
use super::{ConfigError, MountEntry, Origin, StoreSettings, desync_file, read, toml_file};

/// Where the machine's configuration is.
const SYSTEM_DIR: &str = "/etc/caifs";

/// Everything that files and environment say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Configuration {
    /// Options of a mount, the strongest last.
    pub mount: Vec<MountEntry>,
    /// Options of stores.
    pub settings: StoreSettings,
    /// The files that were read, the strongest last.
    pub files: Vec<PathBuf>,
}

/// Reads the configuration: the file given instead of the usual ones, and the environment, which is asked through `lookup`.
///
/// # Errors
/// A file given does not exist; one that exists cannot be read or is wrong; a variable is wrong.
pub fn load(explicit: Option<&Path>, lookup: Lookup<'_>) -> Result<Configuration, ConfigError> {
    let home = environment::set(lookup, "HOME").map(PathBuf::from);
    let mut loader = Loader { home: home.as_deref(), configuration: Configuration::default(), sections: Vec::new() };
    let (under, over) = environment::sections(lookup)?;
    loader.sections.push(under);
    match explicit {
        Some(path) => loader.file(path)?,
        None => loader.usual_files(lookup)?,
    }
    loader.sections.push(over);
    loader.sections.retain(|section| !section.entries.is_empty());
    loader.configuration.settings = StoreSettings::new(loader.sections);
    Ok(loader.configuration)
}

struct Loader<'a> {
    home: Option<&'a Path>,
    configuration: Configuration,
    sections: Vec<Section>,
}

impl Loader<'_> {
    fn usual_files(&mut self, lookup: Lookup<'_>) -> Result<(), ConfigError> {
        if let Some(home) = self.home {
            self.file_if_there(&home.join(".config/desync/config.json"))?;
        }
        let system = environment::set(lookup, "CAIFS_CONFIG_DIR").map_or(SYSTEM_DIR.into(), PathBuf::from);
        self.file_if_there(&system.join("caifs.toml"))?;
        for path in toml_files(&system.join("conf.d"))? {
            self.file_if_there(&path)?;
        }
        let user = environment::set(lookup, "XDG_CONFIG_HOME").map(PathBuf::from);
        // A relative one is not valid, says its standard.
        let user = user.filter(|dir| dir.is_absolute()).or_else(|| self.home.map(|home| home.join(".config")));
        match user {
            Some(user) => self.file_if_there(&user.join("caifs/caifs.toml")),
            None => Ok(()),
        }
    }

    fn file_if_there(&mut self, path: &Path) -> Result<(), ConfigError> {
        if has_nothing(path) {
            return Ok(());
        }
        if is_closed_to_us(path) {
            tracing::debug!("configuration in {} is not for this user", path.display());
            return Ok(());
        }
        self.file(path)
    }

    fn file(&mut self, path: &Path) -> Result<(), ConfigError> {
        let path: Arc<Path> = std::path::absolute(path).unwrap_or(path.to_owned()).into();
        let text = read(&path)?;
        let is_json = match path.extension().and_then(|suffix| suffix.to_str()) {
            Some("toml") => false,
            Some("json") => true,
            _ => text.trim_start().starts_with('{'),
        };
        let content = match is_json {
            true => {
                let dir = std::path::absolute(".").unwrap_or("/".into());
                FileContent { mount: Vec::new(), sections: desync_file::parse(&text, &path, &dir)? }
            }
            false => toml_file::parse(&text, &path, self.home)?,
        };
        tracing::debug!("configuration read from {}", path.display());
        if let Some((option, line)) = open_secret(&path, &content.sections) {
            let path = path.display();
            let or_elsewhere = if is_json { "" } else { ", or { file = … } instead of a text" };
            tracing::warn!("{path}:{line}: everybody can read the secret {option} (chmod 600 {path}{or_elsewhere})");
        }
        self.configuration.mount.extend(content.mount);
        self.configuration.files.push(path.to_path_buf());
        self.sections.extend(content.sections);
        Ok(())
    }
}

/// Whether nobody says anything under a name: there is no such file, or it lies where this user may not look. A link that leads nowhere is none
/// of that, nor is a file that cannot be looked at: what it was to say would be missed, were it a key that an index must be signed with.
fn has_nothing(path: &Path) -> bool {
    use std::io::ErrorKind::{NotADirectory, NotFound, PermissionDenied};
    match path.symlink_metadata() {
        Ok(_) => path.metadata().is_err_and(|error| error.kind() == PermissionDenied),
        Err(error) => matches!(error.kind(), NotFound | NotADirectory | PermissionDenied),
    }
}

/// Whether a file is kept from this user, as one with the machine's passwords is from all but root.
fn is_closed_to_us(path: &Path) -> bool {
    let refused = |error: std::io::Error| error.kind() == std::io::ErrorKind::PermissionDenied;
    !geteuid().is_root() && std::fs::File::open(path).is_err_and(refused)
}

/// Whether everybody can read a file: it, and every directory on the way to it, is open to them.
fn is_open_to_all(path: &Path) -> bool {
    let has = |path: &Path, bit| std::fs::metadata(path).is_ok_and(|metadata| metadata.mode() & bit != 0);
    let Ok(path) = path.canonicalize() else { return false };
    has(&path, 0o004) && path.ancestors().skip(1).all(|dir| has(dir, 0o001))
}

/// The first secret that stands in a file which everybody can read, and its line.
fn open_secret(path: &Path, sections: &[Section]) -> Option<(&'static str, usize)> {
    let is_open = is_open_to_all(path);
    let entries = sections.iter().filter(|_| is_open).flat_map(|section| &section.entries);
    let secrets = entries.filter_map(|(place, Entry { value, origin })| match (value, origin) {
        (Value::Secret(secret), Origin::File { line, .. }) if matches!(secret.source(), SecretSource::Text(_)) => {
            Some((STORE_OPTIONS.get(*place)?.name, line.unwrap_or(1)))
        }
        _ => None,
    });
    secrets.min_by_key(|(_, line)| *line)
}

/// The `.toml` files of a directory by name; none when it is not there, or not for this user.
fn toml_files(dir: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    if has_nothing(dir) {
        return Ok(Vec::new());
    }
    let origin = Origin::File { path: dir.into(), line: None };
    let wrong = |error: std::io::Error| ConfigError::at(&origin, &error.to_string());
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => return Ok(Vec::new()),
        Err(error) => return Err(wrong(error)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(wrong)?.path();
        // What editors leave (.caifs.toml.swp, .#x.toml) is not meant.
        let is_hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if path.extension().is_some_and(|suffix| suffix == "toml") && !is_hidden {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::ffi::OsString;
    use std::os::unix::fs::PermissionsExt;

    struct Home {
        dir: tempfile::TempDir,
        variables: BTreeMap<&'static str, OsString>,
    }

    impl Home {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let variables = [("HOME", dir.path().into()), ("CAIFS_CONFIG_DIR", dir.path().join("etc").into())];
            Self { variables: variables.into_iter().collect(), dir }
        }

        fn file(&self, name: &str, text: &str) -> PathBuf {
            let path = self.dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, text).unwrap();
            path
        }

        fn load(&self, explicit: Option<&Path>) -> Result<Configuration, ConfigError> {
            load(explicit, &|name| self.variables.get(name).cloned())
        }

        fn retries(&self, explicit: Option<&Path>) -> u32 {
            let settings = self.load(explicit).unwrap().settings;
            settings.resolve("http://h/x").unwrap()[0].options.retry.n_retries
        }
    }

    #[test]
    fn each_layer_wins_over_those_before() {
        let mut home = Home::new();
        assert_eq!(home.retries(None), 3);
        home.file(".config/desync/config.json", r#"{"store-options": {"http://h/*": {"error-retry": 4}}}"#);
        assert_eq!(home.retries(None), 4);
        for (file, n) in [
            ("etc/caifs.toml", 5),
            ("etc/conf.d/10-a.toml", 6),
            ("etc/conf.d/20-b.toml", 7),
            (".config/caifs/caifs.toml", 8),
        ] {
            home.file(file, &format!("[mount]\nmemory = \"{n}G\"\n[store]\nerror-retry = {n}\n"));
            assert_eq!(home.retries(None), n, "{file}");
            assert_eq!(home.load(None).unwrap().mount.last().unwrap().value, format!("{n}G"));
        }
        home.file("etc/conf.d/05.toml", "[store]\nerror-retry = 9\n");
        home.file("etc/conf.d/.x.toml", "rubbish");
        home.file("etc/conf.d/README", "rubbish");
        assert_eq!(home.retries(None), 8);
        home.variables.insert("XDG_CONFIG_HOME", home.dir.path().join("xdg").into());
        assert_eq!(home.retries(None), 7);
        home.file("xdg/caifs/caifs.toml", "[[stores]]\nlocation = \"http://h/*\"\nerror-retry = 11\n");
        assert_eq!(home.retries(None), 11);

        let explicit = home.file("some.toml", "");
        assert_eq!(home.retries(Some(&explicit)), 3, "no other file is read");
        let explicit = home.file("some.conf", r#" {"store-options": {"http://h/x": {"error-retry": 1}}}"#);
        assert_eq!(home.retries(Some(&explicit)), 1);
        let error = home.load(Some(&home.dir.path().join("none.toml"))).unwrap_err().to_string();
        assert!(error.contains("none.toml: No such file"), "{error}");
    }

    #[test]
    fn variables_stand_over_or_under_files() {
        let mut home = Home::new();
        for (name, value) in [("S3_ACCESS_KEY", "env"), ("S3_SECRET_KEY", "s"), ("AWS_REGION", "env"), ("USER", "env")]
        {
            home.variables.insert(name, value.into());
        }
        let keys = "s3-access-key = \"file\"\ns3-secret-key = \"f\"\ns3-session-token = \"f\"\ns3-region = \"file\"\n";
        home.file(".config/caifs/caifs.toml", &format!("[[stores]]\nlocation = \"s3+http://h/b\"\n{keys}"));
        let s3 = |location: &str| home.load(None).unwrap().settings.resolve(location).unwrap().remove(0).options.s3;
        assert_eq!(s3("s3+http://h/b").access_key.as_deref(), Some("env"));
        assert_eq!(s3("s3+http://h/b").session_token, None, "it belongs to other keys");
        assert_eq!(s3("s3+http://h/b").region.as_deref(), Some("file"));
        assert_eq!(s3("s3+http://h/c").region.as_deref(), Some("env"));
    }

    #[test]
    fn a_secret_that_everybody_can_read_is_found() {
        let home = Home::new();
        let closed = |mode| std::fs::set_permissions(home.dir.path(), std::fs::Permissions::from_mode(mode)).unwrap();
        closed(0o755);
        let text = "[store]\nerror-retry = 4\n\n[[stores]]\nlocation = \"http://h/*\"\nhttp-auth = \"secret\"\n";
        let path = home.file("a.toml", text);
        let found = |text: &str, mode| {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            open_secret(&path, &toml_file::parse(text, &path, None).unwrap().sections)
        };
        assert_eq!(found(text, 0o644), Some(("http-auth", 6)));
        assert_eq!(found(text, 0o640), None);
        closed(0o750);
        assert_eq!(found(text, 0o644), None, "nobody else gets to it");
        closed(0o755);
        assert_eq!(found(&text.replace("\"secret\"", "{ file = \"/f\" }"), 0o644), None);
    }

    #[test]
    fn a_name_that_leads_nowhere_is_no_silence() {
        let home = Home::new();
        std::fs::create_dir_all(home.dir.path().join("etc/conf.d")).unwrap();
        assert_eq!(home.retries(None), 3);
        for name in ["etc/conf.d/50-trust.toml", "etc/caifs.toml", ".config/caifs/caifs.toml"] {
            let link = home.dir.path().join(name);
            std::fs::create_dir_all(link.parent().unwrap()).unwrap();
            std::os::unix::fs::symlink("/no/such/file", &link).unwrap();
            let error = home.load(None).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("No such file"), "{error}");
            std::fs::remove_file(&link).unwrap();
        }
        let conf = home.dir.path().join("etc/conf.d");
        std::fs::remove_dir(&conf).unwrap();
        std::os::unix::fs::symlink("/no/such/directory", &conf).unwrap();
        let error = home.load(None).unwrap_err().to_string();
        assert!(error.contains("etc/conf.d: No such file"), "{error}");
        std::fs::remove_file(&conf).unwrap();
        std::fs::write(&conf, "").unwrap();
        assert!(home.load(None).unwrap_err().to_string().contains("conf.d: Not a directory"));
        std::fs::remove_file(&conf).unwrap();
        assert_eq!(home.retries(None), 3);
    }

    #[test]
    fn without_a_home_there_are_the_machines_files() {
        let mut home = Home::new();
        home.variables.remove("HOME");
        home.file("etc/caifs.toml", "[store]\nerror-retry = 5\n");
        assert_eq!(home.retries(None), 5);
        home.file("etc/caifs.toml", "[store]\nerror-retry = true\n");
        let error = home.load(None).unwrap_err().to_string();
        assert!(error.contains("etc/caifs.toml:2: store: error-retry: expected a number"), "{error}");
    }
}
