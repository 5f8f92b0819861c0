//! desync's own files, as they are: its configuration (formats.md 7.3) and its store files.
//!
//! In its configuration an empty text, `false` and the number 0 are what is not there (but for `error-retry`), keys nobody knows
//! are left alone, and durations are nanoseconds. JSON gives no lines, so what is wrong is named by file and keys.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value as Json};

use super::secret::LazySecret;
use super::store_options::{NO_TIMEOUT, StoreOption};
use super::stores::{Pattern, Place, Section};
use super::value::{Kind, Value};
use super::{ConfigError, Origin};
use crate::store::location::without_secrets;

/// A key of `store-options`, how its value is read, and our option.
const STORE_KEYS: &[(&str, Form, &str)] = &[
    ("n", Form::Number, "concurrency"),
    ("client-cert", Form::Text, "client-cert"),
    ("client-key", Form::Text, "client-key"),
    ("ca-cert", Form::Text, "ca-cert"),
    ("trust-insecure", Form::Switch, "trust-insecure"),
    ("http-auth", Form::Text, "http-auth"),
    ("http-cookie", Form::Text, "http-cookie"),
    ("timeout", Form::Nanoseconds, "timeout"),
    ("error-retry", Form::Retries, "error-retry"),
    ("error-retry-base-interval", Form::Nanoseconds, "error-retry-base-interval"),
    ("skip-verify", Form::Switch, "skip-verify"),
    ("uncompressed", Form::Switch, "uncompressed"),
    ("encryption", Form::Switch, "encryption"),
    ("encryption-algorithm", Form::Text, "encryption-algorithm"),
    ("encryption-key", Form::Text, "encryption-key"),
];

const S3_KEYS: &[(&str, Form, &str)] = &[
    ("access-key", Form::Text, "s3-access-key"),
    ("secret-key", Form::Text, "s3-secret-key"),
    ("aws-credentials-file", Form::Text, "s3-credentials-file"),
    ("aws-profile", Form::Text, "s3-profile"),
    ("aws-region", Form::Text, "s3-region"),
];

const OCI_KEYS: &[(&str, Form, &str)] =
    &[("username", Form::Text, "oci-username"), ("secret", Form::Text, "oci-password")];

/// How a value is written.
#[derive(Debug, Clone, Copy)]
enum Form {
    Text,
    Switch,
    Number,
    Retries,
    Nanoseconds,
}

impl Form {
    fn expected(self) -> &'static str {
        match self {
            Self::Text => "a text",
            Self::Switch => "true or false",
            Self::Number | Self::Retries => "a number",
            Self::Nanoseconds => "a number of nanoseconds",
        }
    }
}

/// Reads a configuration. Relative paths begin in `dir`, the process's own directory, as in desync.
///
/// # Errors
/// It is no JSON, or a value is not what its key takes.
pub fn parse(text: &str, path: &Path, dir: &Path) -> Result<Vec<Section>, ConfigError> {
    let origin = Origin::File { path: path.into(), line: None };
    let root = object_of(text, &origin)?;
    let reader = Reader { origin, dir };
    let mut sections = Vec::new();
    for (server, value) in reader.table(&root, "s3-credentials")? {
        let place = Place::S3Server(server.strip_suffix('/').unwrap_or(server).to_owned());
        sections.extend(reader.section(place, "s3-credentials", server, value, S3_KEYS)?);
    }
    for (table, keys) in [("oci-credentials", OCI_KEYS), ("store-options", STORE_KEYS)] {
        for (text, value) in reader.table(&root, table)? {
            let pattern = Pattern::desync(text, dir)
                .map_err(|why| reader.wrong(table, &format!("{:?} is {why}", without_secrets(text))))?;
            sections.extend(reader.section(Place::Desync { table, pattern }, table, text, value, keys)?);
        }
    }
    Ok(sections)
}

/// Stores and a cache, from a file that can be read again.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StoreFile {
    /// Store locations in the order they are asked.
    pub stores: Vec<String>,
    /// The cache's location.
    pub cache: Option<String>,
}

/// Reads a store file, `{"stores": ["…"], "cache": "…"}`.
///
/// # Errors
/// It cannot be read, is no such JSON, or names no store.
pub fn store_file(path: &Path) -> Result<StoreFile, ConfigError> {
    let origin = Origin::File { path: path.into(), line: None };
    let text = super::read(path)?;
    let root = object_of(&text, &origin)?;
    let wrong = |why: &str| ConfigError::at(&origin, why);
    let mut file = StoreFile::default();
    match root.get("stores") {
        Some(Json::Array(stores)) => {
            for store in stores {
                let location = store.as_str().filter(|location| !location.is_empty());
                file.stores.push(location.ok_or_else(|| wrong("stores: expected a list of locations"))?.to_owned());
            }
        }
        None | Some(Json::Null) => {}
        Some(_) => return Err(wrong("stores: expected a list of locations")),
    }
    match root.get("cache") {
        Some(Json::String(cache)) => file.cache = Some(cache.clone()).filter(|cache| !cache.is_empty()),
        None | Some(Json::Null) => {}
        Some(_) => return Err(wrong("cache: expected a location")),
    }
    if file.stores.is_empty() {
        return Err(wrong("it names no store ({\"stores\": [\"…\"]})"));
    }
    Ok(file)
}

fn object_of(text: &str, origin: &Origin) -> Result<Map<String, Json>, ConfigError> {
    match serde_json::from_str(text) {
        Ok(Json::Object(object)) => Ok(object),
        Ok(_) => Err(ConfigError::at(origin, "expected a JSON object")),
        Err(error) => {
            let origin = match origin {
                Origin::File { path, .. } => Origin::File { path: Arc::clone(path), line: Some(error.line()) },
                other => other.clone(),
            };
            Err(ConfigError::at(&origin, &format!("not JSON: {error}")))
        }
    }
}

struct Reader<'a> {
    origin: Origin,
    dir: &'a Path,
}

impl Reader<'_> {
    fn wrong(&self, keys: &str, why: &str) -> ConfigError {
        ConfigError::at(&self.origin, &format!("{keys}: {why}"))
    }

    fn table<'j>(
        &self,
        root: &'j Map<String, Json>,
        name: &str,
    ) -> Result<impl Iterator<Item = (&'j String, &'j Map<String, Json>)>, ConfigError> {
        let mut items = Vec::new();
        match root.get(name) {
            None | Some(Json::Null) => {}
            Some(Json::Object(table)) => {
                for (key, value) in table {
                    match value {
                        Json::Object(value) => items.push((key, value)),
                        Json::Null => {}
                        _ => return Err(self.wrong(name, &format!("{:?}: expected an object", without_secrets(key)))),
                    }
                }
            }
            Some(_) => return Err(self.wrong(name, "expected an object")),
        }
        Ok(items.into_iter())
    }

    /// A section; `None` when it sets nothing.
    fn section(
        &self,
        place: Place,
        table: &str,
        name: &str,
        values: &Map<String, Json>,
        keys: &[(&str, Form, &str)],
    ) -> Result<Option<Section>, ConfigError> {
        let mut section = Section { place, ..Section::for_all(self.origin.clone()) };
        for (key, form, option) in keys {
            let Some(value) = values.get(*key).filter(|value| !value.is_null()) else { continue };
            let Some(option) = StoreOption::find(option) else { continue };
            let wrong = |expected: &str| {
                self.wrong(&format!("{table}: {:?}: {key}", without_secrets(name)), &format!("expected {expected}"))
            };
            match self.value(*form, option, value) {
                Read::Value(value) => section.set(option.name, value, self.origin.clone()),
                Read::Nothing => {}
                Read::WrongForm => return Err(wrong(form.expected())),
                Read::WrongValue => return Err(wrong(&option.kind.expected())),
            }
        }
        Ok((!section.entries.is_empty()).then_some(section))
    }

    fn value(&self, form: Form, option: &StoreOption, value: &Json) -> Read {
        let read = match (form, value) {
            (Form::Text, Json::String(text)) if text.is_empty() => return Read::Nothing,
            (Form::Text, Json::String(text)) => match option.kind {
                Kind::Secret(_) => Some(Value::Secret(LazySecret::text(text))),
                _ => option.kind.text(text, self.dir),
            },
            (Form::Switch, Json::Bool(false)) => return Read::Nothing,
            (Form::Switch, Json::Bool(true)) => Some(Value::Switch(true)),
            (form @ (Form::Number | Form::Retries | Form::Nanoseconds), Json::Number(n)) => match (form, n.as_i64()) {
                (_, None) => None,
                // Fewer than no further requests there are not.
                (Form::Retries, Some(n)) => option.kind.count(n.max(0).cast_unsigned()),
                (_, Some(0)) => return Read::Nothing,
                (Form::Nanoseconds, Some(n)) if n < 0 && option.name == "timeout" => Some(Value::Span(NO_TIMEOUT)),
                (_, Some(n)) if n < 0 => None,
                (Form::Nanoseconds, Some(n)) => {
                    Some(Value::Span(Duration::from_nanos(n.cast_unsigned()).min(NO_TIMEOUT)))
                }
                (_, Some(n)) => option.kind.count(n.cast_unsigned()),
            },
            _ => return Read::WrongForm,
        };
        read.map_or(Read::WrongValue, Read::Value)
    }
}

enum Read {
    Value(Value),
    Nothing,
    WrongForm,
    WrongValue,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::StoreSettings;
    use crate::store::{Secret, StoreOptions};

    fn settings(text: &str) -> Result<StoreSettings, ConfigError> {
        parse(text, Path::new("/c.json"), Path::new("/place")).map(StoreSettings::new)
    }

    fn options(text: &str, location: &str) -> StoreOptions {
        settings(text).unwrap().resolve(location).unwrap().remove(0).options
    }

    const FULL: &str = r#"{
      "s3-credentials": {
        "http://localhost:9000": {"access-key": "a", "secret-key": "s", "aws-region": "eu"},
        "https://h": {"aws-credentials-file": "creds", "aws-profile": "p", "access-key": ""}
      },
      "oci-credentials": {"oci+https://ghcr.io/*/x": {"username": "u", "secret": "p"}},
      "store-options": {
        "https://h/*": {"client-cert": "/c", "client-key": "/k", "ca-cert": "ca", "trust-insecure": true,
          "http-auth": "auth", "http-cookie": "cookie", "timeout": 5000000000, "error-retry": 0,
          "error-retry-base-interval": 250000000, "n": 4, "unknown": 1},
        "http://none": {"timeout": -1, "error-retry": 5},
        "http://zero/": {"timeout": 0, "error-retry-base-interval": 0, "http-auth": "", "uncompressed": false},
        "/srv/*": {"uncompressed": true, "skip-verify": true},
        "rel": {"encryption": true, "encryption-algorithm": "aes-256-gcm",
          "encryption-key": "d69371915dbc4b1f0ec55e2a80f0e089accf4b32e0f8dc0e29fed7f0f30d1b26"},
        "empty": null
      },
      "something-new": []
    }"#;

    #[test]
    fn every_key_has_its_option() {
        let https = options(FULL, "https://h/x/");
        assert_eq!(https.http.authorization, Some(Secret::new("auth")));
        assert_eq!(https.http.cookie, Some(Secret::new("cookie")));
        assert_eq!((https.http.client_cert, https.http.client_key), (Some("/c".into()), Some("/k".into())));
        assert_eq!((https.http.ca_cert, https.http.trust_insecure), (Some("/place/ca".into()), true));
        assert_eq!((https.request_timeout, https.concurrency), (Duration::from_secs(5), 4));
        assert_eq!((https.retry.n_retries, https.retry.base), (0, Duration::from_millis(250)));

        let none = options(FULL, "http://none");
        assert_eq!((none.request_timeout, none.retry.n_retries), (NO_TIMEOUT, 5));
        assert_eq!(options(FULL, "http://zero"), StoreOptions::default());
        assert_eq!(options(FULL, "https://h/x/y"), StoreOptions::default());

        let s3 = options(FULL, "s3+http://localhost:9000/b/p").s3;
        assert_eq!((s3.access_key.as_deref(), s3.region.as_deref()), (Some("a"), Some("eu")));
        let s3 = options(FULL, "s3+https://h/b").s3;
        assert_eq!((s3.access_key, s3.profile.as_deref()), (None, Some("p")));
        assert_eq!(s3.credentials_file, Some("/place/creds".into()));

        let oci = options(FULL, "oci+https://ghcr.io/me/x/").oci;
        assert_eq!((oci.username.as_deref(), oci.password), (Some("u"), Some(Secret::new("p"))));
        let local = options(FULL, "/srv/x");
        assert_eq!((local.layout.extension().as_str(), local.skip_verify), ("", true));
        let encrypted = options(FULL, "/place/rel").layout.extension();
        assert_eq!(encrypted, ".cacnk.aes-256-gcm-511a735b");
    }

    #[test]
    fn what_desync_prints_is_read() {
        let printed = "{\n  \"s3-credentials\": null,\n  \"store-options\": null\n}\n";
        assert_eq!(settings(printed).unwrap(), StoreSettings::default());
    }

    #[test]
    fn mistakes_are_named_by_file_and_keys() {
        for (text, why) in [
            ("{\n\"a\":", "/c.json:2: not JSON: "),
            ("[]", "/c.json: expected a JSON object"),
            (r#"{"store-options": []}"#, "/c.json: store-options: expected an object"),
            (r#"{"store-options": {"x": 1}}"#, "/c.json: store-options: \"x\": expected an object"),
            (r#"{"store-options": {"[": {}}}"#, "/c.json: store-options: \"[\" is not a pattern"),
            (
                r#"{"store-options": {"http://u:geheim@h": {"timeout": "1m"}}}"#,
                "/c.json: store-options: \"http://u@h\": timeout: expected a number of nanoseconds",
            ),
            (
                r#"{"store-options": {"x": {"error-retry-base-interval": -5}}}"#,
                "/c.json: store-options: \"x\": error-retry-base-interval: expected a time above 0",
            ),
            (
                r#"{"store-options": {"x": {"encryption-algorithm": "rot13"}}}"#,
                "/c.json: store-options: \"x\": encryption-algorithm: expected \"xchacha20-poly1305\" or \"aes-256-gcm\"",
            ),
            (
                r#"{"s3-credentials": {"http://h": {"secret-key": ["geheim"]}}}"#,
                "/c.json: s3-credentials: \"http://h\": secret-key: expected a text",
            ),
        ] {
            let error = settings(text).unwrap_err().to_string();
            assert!(error.starts_with(why) && !error.contains("geheim"), "{error}");
        }
    }

    #[test]
    fn a_store_file_names_stores_and_a_cache() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stores.json");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            store_file(&path)
        };
        let stores = vec!["/a".to_owned(), "http://h/b".to_owned()];
        let both = read(r#"{"stores": ["/a", "http://h/b"], "cache": "/c"}"#);
        assert_eq!(both, Ok(StoreFile { stores: stores.clone(), cache: Some("/c".into()) }));
        assert_eq!(read(r#"{"stores": ["/a", "http://h/b"], "cache": ""}"#), Ok(StoreFile { stores, cache: None }));
        for (text, why) in [
            ("{}", "names no store"),
            (r#"{"stores": "/a"}"#, "stores: expected a list of locations"),
            (r#"{"stores": ["/a"], "cache": 1}"#, "cache: expected a location"),
            ("", "not JSON"),
        ] {
            assert!(read(text).unwrap_err().to_string().contains(why), "{text}");
        }
        assert!(store_file(&dir.path().join("none")).unwrap_err().to_string().contains("No such file"));
    }
}
