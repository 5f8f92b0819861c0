//! Credentials from an AWS credentials file: `[profile]` sections of `name = value` lines.
//!
//! Invariant: the file is looked at again when what was read of it is older than a minute, so that credentials can be replaced under a
//! running mount (formats.md 7.2).

use std::fmt;
use std::io::Read;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use object_store::CredentialProvider;
use object_store::aws::AwsCredential;

/// The profile that is meant when none is named.
pub const DEFAULT_PROFILE: &str = "default";

/// How long credentials are used before the file is read again.
const LASTS: Duration = Duration::from_secs(60);

/// The longest file that is read.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// One profile of one file.
pub struct ProfileFile {
    path: PathBuf,
    profile: String,
    /// What was read last, and when.
    known: Mutex<Option<(Instant, Arc<AwsCredential>)>>,
}

impl ProfileFile {
    /// The profile in a file, which is read when credentials are asked for.
    pub fn new(path: PathBuf, profile: Option<String>) -> Self {
        Self { path, profile: profile.unwrap_or_else(|| DEFAULT_PROFILE.to_owned()), known: Mutex::default() }
    }

    /// The credentials at this time.
    fn at(&self, now: Instant) -> Result<Arc<AwsCredential>, String> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((read, credential)) =
            known.as_ref().filter(|(read, _)| now.saturating_duration_since(*read) < LASTS)
        {
            let _ = read;
            return Ok(Arc::clone(credential));
        }
        match (self.read(), known.as_ref()) {
            (Ok(credential), _) => {
                let credential = Arc::new(credential);
                *known = Some((now, Arc::clone(&credential)));
                Ok(credential)
            }
            // Whoever replaces the file may be at it just now. If what we have is no longer good, the server says so.
            (Err(reason), Some((_, credential))) => {
                tracing::warn!("{reason}; the credentials read before are used");
                Ok(Arc::clone(credential))
            }
            (Err(reason), None) => Err(reason),
        }
    }

    fn read(&self) -> Result<AwsCredential, String> {
        let path = self.path.display();
        let mut text = String::new();
        let file = std::fs::File::open(&self.path).map_err(|error| format!("{path}: {error}"))?;
        file.take(MAX_FILE_BYTES).read_to_string(&mut text).map_err(|error| format!("{path}: {error}"))?;
        parse(&text, &self.profile).map_err(|reason| format!("{path}: {reason}"))
    }
}

impl fmt::Debug for ProfileFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProfileFile").field("path", &self.path).field("profile", &self.profile).finish_non_exhaustive()
    }
}

impl CredentialProvider for ProfileFile {
    type Credential = AwsCredential;

    fn get_credential<'a, 'b>(&'a self) -> BoxFuture<'b, object_store::Result<Arc<AwsCredential>>>
    where
        'a: 'b,
        Self: 'b,
    {
        // A small local file, once a minute: not worth a thread of its own.
        Box::pin(async move {
            self.at(Instant::now())
                .map_err(|reason| object_store::Error::Generic { store: "S3", source: reason.into() })
        })
    }
}

/// The credentials of a profile. Sections may be called `[name]` or, as in AWS's other file, `[profile name]`; lines that begin with `#`
/// or `;` and settings of other names are passed over.
fn parse(text: &str, profile: &str) -> Result<AwsCredential, String> {
    let mut is_inside = false;
    let mut was_inside = false;
    let (mut key_id, mut secret_key, mut token) = (None, None, None);
    for line in text.trim_start_matches('\u{feff}').lines().map(str::trim) {
        if line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(section) = line.strip_prefix('[').and_then(|rest| rest.split_once(']')).map(|(name, _)| name.trim())
        {
            let name = section.strip_prefix("profile ").map_or(section, str::trim);
            is_inside = name == profile;
            was_inside |= is_inside;
            continue;
        }
        let Some((name, value)) = line.split_once('=').filter(|_| is_inside) else { continue };
        let value = Some(value.trim()).filter(|value| !value.is_empty()).map(str::to_owned);
        match name.trim().to_ascii_lowercase().as_str() {
            "aws_access_key_id" => key_id = value,
            "aws_secret_access_key" => secret_key = value,
            "aws_session_token" => token = value,
            _ => {}
        }
    }
    if !was_inside {
        return Err(format!("no profile '{profile}'"));
    }
    match (key_id, secret_key) {
        (Some(key_id), Some(secret_key)) => Ok(AwsCredential { key_id, secret_key, token }),
        (None, _) => Err(format!("profile '{profile}' has no aws_access_key_id")),
        (_, None) => Err(format!("profile '{profile}' has no aws_secret_access_key")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const FILE: &str = "\u{feff}# comment\n\
        aws_access_key_id = outside\n\
        [default]\r\n\
        aws_access_key_id=AKID\r\n\
        aws_secret_access_key = a/b+c=d==\r\n\
        region = eu-west-1\r\n\
        \n\
        ; [commented]\n\
        [ other ]   # and why\n\
        \tAWS_Access_Key_Id = OTHER\n\
        # aws_session_token = no\n\
        s3 =\n  addressing_style = path\n\
        aws_secret_access_key = secret\n\
        aws_session_token = token\n\
        [profile third]\n\
        aws_access_key_id = THIRD\n\
        [fourth]\n\
        aws_access_key_id =\n";

    #[test]
    fn profiles_are_read() {
        let read = |profile| {
            parse(FILE, profile).map(|AwsCredential { key_id, secret_key, token }| (key_id, secret_key, token))
        };
        assert_eq!(read("default"), Ok(("AKID".to_owned(), "a/b+c=d==".to_owned(), None)));
        assert_eq!(read("other"), Ok(("OTHER".to_owned(), "secret".to_owned(), Some("token".to_owned()))));
        assert_eq!(read("third").unwrap_err(), "profile 'third' has no aws_secret_access_key");
        assert_eq!(read("fourth").unwrap_err(), "profile 'fourth' has no aws_access_key_id");
        assert_eq!(read("commented").unwrap_err(), "no profile 'commented'");
        assert_eq!(parse("", "default").unwrap_err(), "no profile 'default'");
        for rubbish in ["[", "]", "=", "[]\n=", "[default\naws_access_key_id=x"] {
            assert!(parse(rubbish, "default").is_err(), "{rubbish:?}");
        }
    }

    #[test]
    fn a_file_is_read_again_after_a_minute() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("credentials");
        let write = |key: &str| {
            std::fs::write(&path, format!("[default]\naws_access_key_id={key}\naws_secret_access_key=s\n")).unwrap();
        };
        let file = ProfileFile::new(path.clone(), None);
        let start = Instant::now();
        let key_at =
            |seconds| file.at(start + Duration::from_secs(seconds)).map(|credential| credential.key_id.clone());
        assert!(key_at(0).unwrap_err().contains("No such file"));
        write("one");
        assert_eq!(key_at(0).unwrap(), "one");
        write("two");
        assert_eq!(key_at(59).unwrap(), "one");
        assert_eq!(key_at(60).unwrap(), "two");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(key_at(200).unwrap(), "two");
        write("three");
        assert_eq!(key_at(201).unwrap(), "three");
        assert!(!format!("{file:?}").contains("three"));
    }
}
