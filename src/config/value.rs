//! Values of options: what a kind of option takes, from a file or typed, and how it is shown.
//!
//! * [`Value`] is what an option was set to, checked but not yet put anywhere.
//! * [`Kind`] makes values of what was written, and says what would have been right.
//!
//! Invariant: a value that was accepted can be put in; only a secret can still turn out to be wrong, when it is read.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::secret::{LazySecret, SecretSource};
use super::store_options::Draft;
use super::units::{MAX_SPAN, parse_span, parse_switch, show_span};
use crate::store::Secret;

/// What an option was set to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// Yes or no.
    Switch(bool),
    /// A number.
    Count(u64),
    /// A time.
    Span(Duration),
    /// A file, or a program.
    Path(PathBuf),
    /// Files.
    Paths(Vec<PathBuf>),
    /// A text.
    Text(String),
    /// Names with values.
    Pairs(Vec<(String, String)>),
    /// A secret.
    Secret(LazySecret),
}

impl Value {
    /// The value as it may be shown, in the syntax of the TOML file.
    pub fn shown(&self) -> String {
        match self {
            Self::Switch(yes) => yes.to_string(),
            Self::Count(n) => n.to_string(),
            Self::Span(span) => quoted(&show_span(*span)),
            Self::Path(path) => quoted(&path.to_string_lossy()),
            Self::Paths(paths) => {
                let paths: Vec<String> = paths.iter().map(|path| quoted(&path.to_string_lossy())).collect();
                format!("[{}]", paths.join(", "))
            }
            Self::Text(text) => quoted(text),
            Self::Pairs(pairs) => {
                let pairs: Vec<String> = pairs.iter().map(|(name, _)| quoted(&format!("{name}=***"))).collect();
                format!("[{}]", pairs.join(", "))
            }
            Self::Secret(secret) => match secret.source() {
                SecretSource::Text(_) => quoted("***"),
                SecretSource::File(path) => format!("{{ file = {} }}", quoted(&path.to_string_lossy())),
                // The arguments of a command may be secret enough.
                SecretSource::Command(command) => {
                    let program = command.first().map_or("", String::as_str);
                    let rest = if command.len() > 1 { ", …" } else { "" };
                    format!("{{ command = [{}{rest}] }}", quoted(program))
                }
            },
        }
    }
}

/// A text as TOML's basic string.
pub fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// Which texts an option takes.
#[derive(Debug, Clone, Copy)]
pub enum Texts {
    /// Any that is not empty.
    Any,
    /// A URL of a server.
    Server,
    /// One of these.
    OneOf(&'static [&'static str]),
}

/// What an option takes, and where it is put.
#[derive(Debug, Clone)]
pub enum Kind {
    /// Yes or no.
    Switch(fn(&mut Draft, bool)),
    /// A number of that range.
    Count(RangeInclusive<u64>, fn(&mut Draft, u64)),
    /// A time above 0.
    Span(fn(&mut Draft, Duration)),
    /// A file.
    Path(fn(&mut Draft, PathBuf)),
    /// A program, searched as the shell does it.
    Program(fn(&mut Draft, PathBuf)),
    /// Files.
    Paths(fn(&mut Draft, Vec<PathBuf>)),
    /// A text.
    Text(Texts, fn(&mut Draft, String)),
    /// Texts `name=value`.
    Pairs(fn(&mut Draft, Vec<(String, String)>)),
    /// A secret.
    Secret(fn(&mut Draft, Secret)),
}

impl Kind {
    /// What it takes, in words.
    pub fn expected(&self) -> String {
        match self {
            Self::Switch(_) => "true or false".to_owned(),
            Self::Count(range, _) => format!("a number from {} to {}", range.start(), range.end()),
            Self::Span(_) => "a time above 0 such as \"30s\", \"500ms\" or \"1m30s\", at most 24h".to_owned(),
            Self::Path(_) | Self::Program(_) => "a path".to_owned(),
            Self::Paths(_) => "a list of paths".to_owned(),
            Self::Text(Texts::Any, _) => "a text that is not empty".to_owned(),
            Self::Text(Texts::Server, _) => "a server such as \"https://host:port\"".to_owned(),
            Self::Text(Texts::OneOf(words), _) => {
                let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
                words.join(" or ")
            }
            Self::Pairs(_) => "a list of texts \"name=value\"".to_owned(),
            Self::Secret(_) => "a text, { file = \"/path\" } or { command = [\"program\", \"argument\"] }".to_owned(),
        }
    }

    /// A value for a number.
    pub fn count(&self, n: u64) -> Option<Value> {
        match self {
            Self::Count(range, _) if range.contains(&n) => Some(Value::Count(n)),
            Self::Span(_) => span(Duration::from_secs(n)),
            _ => None,
        }
    }

    /// A value for a text of a file; paths in it begin in `dir`.
    pub fn text(&self, text: &str, dir: &Path) -> Option<Value> {
        if text.is_empty() {
            return None;
        }
        match self {
            Self::Span(_) => span(parse_span(text)?),
            Self::Path(_) => Some(Value::Path(dir.join(text))),
            Self::Program(_) => Some(Value::Path(match text.contains('/') {
                true => dir.join(text),
                false => PathBuf::from(text),
            })),
            Self::Paths(_) | Self::Pairs(_) => self.list(&[text.to_owned()], dir),
            Self::Text(texts, _) => {
                let fits = match texts {
                    Texts::Any => true,
                    Texts::Server => ["http://", "https://"].iter().any(|scheme| text.starts_with(scheme)),
                    Texts::OneOf(words) => words.contains(&text),
                };
                fits.then(|| Value::Text(text.to_owned()))
            }
            Self::Secret(_) => Some(Value::Secret(LazySecret::text(text))),
            Self::Switch(_) | Self::Count(..) => None,
        }
    }

    /// A value for what was typed or stands in the environment, where everything is text.
    pub fn typed(&self, text: &str, dir: &Path) -> Option<Value> {
        match self {
            Self::Switch(_) => Some(Value::Switch(parse_switch(text)?)),
            Self::Count(..) => self.count(text.parse().ok()?),
            _ => self.text(text, dir),
        }
    }

    /// A value for a list of texts.
    pub fn list(&self, texts: &[String], dir: &Path) -> Option<Value> {
        if texts.iter().any(String::is_empty) {
            return None;
        }
        match self {
            Self::Paths(_) => Some(Value::Paths(texts.iter().map(|text| dir.join(text)).collect())),
            Self::Pairs(_) => {
                let pair = |text: &String| text.split_once('=').map(|(name, value)| (name.into(), value.into()));
                Some(Value::Pairs(texts.iter().map(pair).collect::<Option<_>>()?))
            }
            _ => None,
        }
    }
}

fn span(span: Duration) -> Option<Value> {
    (!span.is_zero() && span <= MAX_SPAN).then_some(Value::Span(span))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::store_options::StoreOption;

    #[test]
    fn wrong_values_are_refused() {
        for (name, text) in [
            ("uncompressed", "maybe"),
            ("timeout", "0"),
            ("timeout", "25h"),
            ("error-retry", "-1"),
            ("error-retry", "1001"),
            ("concurrency", "0"),
            ("encryption-algorithm", "rot13"),
            ("gcs-endpoint", "h:80"),
            ("s3-more", "x"),
            ("ca-cert", ""),
            ("http-auth", ""),
        ] {
            assert_eq!(StoreOption::find(name).unwrap().kind.typed(text, Path::new("/")), None, "{name} = {text}");
        }
    }

    #[test]
    fn paths_begin_where_the_file_lies() {
        for (name, text, wanted) in [
            ("ca-cert", "ca.pem", "/dir/ca.pem"),
            ("ca-cert", "/ca.pem", "/ca.pem"),
            ("ssh-program", "ssh", "ssh"),
            ("ssh-program", "./ssh", "/dir/./ssh"),
        ] {
            let value = StoreOption::find(name).unwrap().kind.text(text, Path::new("/dir"));
            assert_eq!(value, Some(Value::Path(wanted.into())), "{name} = {text}");
        }
    }

    #[test]
    fn what_is_shown_is_no_secret() {
        let secret = Value::Secret(LazySecret::text("geheim"));
        let file = Value::Secret(LazySecret::new(SecretSource::File("/f".into())));
        let command = vec!["pass".to_owned(), "geheim".to_owned()];
        let command = Value::Secret(LazySecret::new(SecretSource::Command(command)));
        for (value, shown) in [
            (secret, "\"***\""),
            (file, "{ file = \"/f\" }"),
            (command, "{ command = [\"pass\", …] }"),
            (Value::Pairs(vec![("a".into(), "geheim".into())]), "[\"a=***\"]"),
            (Value::Text("a\"b\\\n".into()), r#""a\"b\\\n""#),
            (Value::Span(Duration::from_millis(1500)), "\"1500ms\""),
        ] {
            assert_eq!(value.shown(), shown);
        }
    }
}
