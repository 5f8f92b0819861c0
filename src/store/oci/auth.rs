//! Who asks a registry: nobody, a user with a password, or the bearer of a token from the server that the registry names.
//!
//! A registry tells what it wants in the `WWW-Authenticate` of a 401 answer (RFC 9110, 11.6.1; Docker's token authentication). What
//! satisfied it is sent with every later request until it expires or is refused.

use std::fmt;
use std::time::{Duration, Instant};

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use serde::Deserialize;
use tokio::sync::{Mutex, RwLock};
use url::Url;

use super::docker::{self, Credentials};
use crate::store::StoreError;
use crate::store::http::exchange::Exchange;
use crate::store::http::{basic, secret_value};
use crate::store::options::OciOptions;
use crate::store::retry::Failure;

/// The most bytes of a token server's answer.
const MAX_TOKEN_BYTES: u64 = 1 << 20;

/// How long a token is good for when its server does not say so (Docker's token authentication).
const DEFAULT_TOKEN_LIFE: Duration = Duration::from_secs(60);

/// How long before its end a token is not used any more: a request takes a while.
const TOKEN_MARGIN: Duration = Duration::from_secs(5);

/// How the requests of one store say who asks.
pub(super) struct Auth {
    /// `host[:port]`, by which Docker keeps credentials.
    host: String,
    is_https: bool,
    options: OciOptions,
    /// What satisfied the registry last. Held for as long as it takes to copy it.
    current: RwLock<Option<Current>>,
    /// Held while a new one is got, so that many requests refused at once get one token; taken before `current`.
    renewal: Mutex<Wanted>,
}

#[derive(Clone)]
struct Current {
    header: HeaderValue,
    /// When it is no good any more, if it ever is not.
    expires: Option<Instant>,
}

/// The widest scope the registry asked for: a token for writing is good for reading, too.
#[derive(Default)]
struct Wanted {
    push_scope: Option<String>,
}

/// What a registry wants.
#[derive(Debug, PartialEq, Eq)]
enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

impl Auth {
    /// For requests to this registry.
    ///
    /// # Errors
    /// There is a user without a password, or the other way round.
    pub fn new(registry: &Url, options: &OciOptions, exchange: &Exchange) -> Result<Self, StoreError> {
        let refuse = |what: &str| Err(StoreError::new(&exchange.name, &exchange.name, what));
        match (&options.username, &options.password) {
            (Some(_), None) => return refuse("the user name for the registry needs a password"),
            (None, Some(_)) => return refuse("the password for the registry needs a user name"),
            _ => {}
        }
        let host = match (registry.host_str().unwrap_or_default(), registry.port()) {
            (host, Some(port)) => format!("{host}:{port}"),
            (host, None) => host.to_owned(),
        };
        let is_https = registry.scheme() == "https";
        let (current, renewal) = (RwLock::default(), Mutex::default());
        Ok(Self { host, is_https, options: options.clone(), current, renewal })
    }

    /// What to send as `Authorization`.
    pub async fn header(&self) -> Option<HeaderValue> {
        let current = self.current.read().await;
        current.as_ref().filter(|current| current.is_good()).map(|current| current.header.clone())
    }

    /// Gets what a refused request lacked; `refused` is what it had. `false` when there is nothing else to be tried.
    pub async fn renew(
        &self,
        exchange: &Exchange,
        answer: &HeaderMap,
        refused: Option<HeaderValue>,
    ) -> Result<bool, Failure> {
        let challenges = challenges(answer);
        let mut wanted = self.renewal.lock().await;
        if let Some(header) = self.header().await
            && Some(&header) != refused.as_ref()
        {
            // Another request got it meanwhile.
            return Ok(true);
        }
        let bearer = challenges.iter().find(|challenge| matches!(challenge, Challenge::Bearer { .. }));
        let current = match bearer.or(challenges.first()) {
            None => return Ok(false),
            Some(Challenge::Basic) => match self.credentials(exchange).await? {
                Some(Credentials::Password { user, password }) => Some(Current {
                    header: secret_value(&basic(&user, password.expose()), "the login", &exchange.name)?,
                    expires: None,
                }),
                Some(Credentials::IdentityToken(_)) | None => None,
            },
            Some(Challenge::Bearer { realm, service, scope }) => {
                if let Some(scope) = scope.as_ref().filter(|scope| scope.contains("push")) {
                    wanted.push_scope = Some(scope.clone());
                }
                let scope = wanted.push_scope.as_ref().or(scope.as_ref());
                Some(self.token(exchange, realm, service.as_deref(), scope.map(String::as_str)).await?)
            }
        };
        let Some(current) = current else { return Ok(false) };
        // What was refused once is refused again: a wrong password is not to be tried till the account is locked.
        let is_new = Some(&current.header) != refused.as_ref();
        *self.current.write().await = Some(current);
        Ok(is_new)
    }

    /// What may help against a refusal.
    pub fn advice(&self) -> &'static str {
        match self.options.username {
            Some(_) => "are user name and password right?",
            None => "does it need a user name and password, or docker login?",
        }
    }

    async fn credentials(&self, exchange: &Exchange) -> Result<Option<Credentials>, StoreError> {
        if let (Some(user), Some(password)) = (&self.options.username, &self.options.password) {
            return Ok(Some(Credentials::Password { user: user.clone(), password: password.clone() }));
        }
        let Some(path) = self.options.docker_config.clone() else { return Ok(None) };
        let host = self.host.clone();
        let limit = exchange.timeout.min(docker::HELPER_LIMIT);
        let shown = path.display().to_string();
        let looked_up = tokio::task::spawn_blocking(move || docker::credentials(&path, &host, limit)).await;
        match looked_up {
            Ok(found) => found.map_err(|reason| StoreError::new(&exchange.name, shown, reason)),
            Err(error) => Err(StoreError::new(&exchange.name, shown, error)),
        }
    }

    /// Asks the token server.
    async fn token(
        &self,
        exchange: &Exchange,
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
    ) -> Result<Current, Failure> {
        let mut url = Url::parse(realm)
            .map_err(|error| exchange.permanent(&exchange.name, format!("names no token server: {error}")))?;
        let shown = crate::store::location::without_secrets(url.as_str());
        match url.scheme() {
            "https" => {}
            "http" if !self.is_https => {}
            other => return Err(exchange.permanent(&shown, format!("credentials are not sent over {other}"))),
        }
        let parts = [("service", service), ("scope", scope)];
        let parts = parts.into_iter().filter_map(|(key, value)| Some((key, value?)));
        let request = match self.credentials(exchange).await? {
            Some(Credentials::IdentityToken(token)) => {
                let mut form = url::form_urlencoded::Serializer::new(String::new());
                form.append_pair("grant_type", "refresh_token").append_pair("client_id", "caifs");
                form.append_pair("refresh_token", token.expose());
                form.extend_pairs(parts);
                let request = exchange.client.post(url);
                request.header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(form.finish())
            }
            credentials => {
                url.query_pairs_mut().extend_pairs(parts);
                let request = exchange.client.get(url);
                match credentials {
                    Some(Credentials::Password { user, password }) => {
                        let login = secret_value(&basic(&user, password.expose()), "the login", &exchange.name)?;
                        request.header(AUTHORIZATION, login)
                    }
                    _ => request,
                }
            }
        };
        let asked = Instant::now();
        let response = exchange.send(request, &shown).await?;
        if !response.status().is_success() {
            let mut failure = exchange.refusal(response, &shown).await;
            failure.error.reason.push_str(&format!(" ({})", self.advice()));
            return Err(failure);
        }
        let body = exchange.body(response, &shown, MAX_TOKEN_BYTES, "a token should have").await?;
        let answer: TokenAnswer = serde_json::from_slice(&body)
            .map_err(|_| exchange.permanent(&shown, "the token server's answer is not what it should be"))?;
        let Some(token) = answer.token.or(answer.access_token).filter(|token| !token.is_empty()) else {
            return Err(exchange.permanent(&shown, "the token server gave no token"));
        };
        let header = secret_value(&format!("Bearer {token}"), "the token", &exchange.name)?;
        let life = answer.expires_in.map_or(DEFAULT_TOKEN_LIFE, Duration::from_secs);
        Ok(Current { header, expires: asked.checked_add(life.saturating_sub(TOKEN_MARGIN)) })
    }
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auth").field("host", &self.host).finish_non_exhaustive()
    }
}

impl Current {
    fn is_good(&self) -> bool {
        self.expires.is_none_or(|expires| Instant::now() < expires)
    }
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

/// What an answer says its server wants, as far as we can give it.
fn challenges(headers: &HeaderMap) -> Vec<Challenge> {
    let values = headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(parse_challenges).collect()
}

/// Reads `Scheme key="value", key=value, Scheme …` (RFC 9110, 11.6.1).
fn parse_challenges(text: &str) -> Vec<Challenge> {
    let mut found: Vec<(String, Vec<(String, String)>)> = Vec::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let end = rest.find([' ', '\t', ',', '=']).unwrap_or(rest.len());
        let (word, behind) = rest.split_at(end);
        if word.is_empty() {
            break;
        }
        let Some(value) = behind.trim_start().strip_prefix('=') else {
            found.push((word.to_ascii_lowercase(), Vec::new()));
            rest = behind;
            continue;
        };
        let (value, behind) = parse_value(value.trim_start());
        if let Some((_, parameters)) = found.last_mut() {
            parameters.push((word.to_ascii_lowercase(), value));
        }
        rest = behind;
    }
    let challenge = |(scheme, parameters): (String, Vec<(String, String)>)| {
        let get = |key: &str| parameters.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone());
        match scheme.as_str() {
            "basic" => Some(Challenge::Basic),
            "bearer" => Some(Challenge::Bearer { realm: get("realm")?, service: get("service"), scope: get("scope") }),
            _ => None,
        }
    };
    found.into_iter().filter_map(challenge).collect()
}

/// A token or a quoted string at the beginning of a text, and what follows it.
fn parse_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([' ', '\t', ',']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            _ => value.push(c),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read() {
        let bearer = |realm: &str, service: Option<&str>, scope: Option<&str>| Challenge::Bearer {
            realm: realm.to_owned(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        };
        for (text, wanted) in [
            (r#"Basic realm="registry""#, vec![Challenge::Basic]),
            ("basic", vec![Challenge::Basic]),
            (
                r#"Bearer realm="https://t/token",service="r",scope="repository:a/b:pull,push",error="x""#,
                vec![bearer("https://t/token", Some("r"), Some("repository:a/b:pull,push"))],
            ),
            (r#"bearer  realm = "a\"b" , service=r"#, vec![bearer("a\"b", Some("r"), None)]),
            (r#"Negotiate, Basic realm="a, b", Bearer realm="c""#, vec![Challenge::Basic, bearer("c", None, None)]),
            ("Bearer", vec![]),
            (r#"Bearer realm="unclosed"#, vec![bearer("unclosed", None, None)]),
            ("", vec![]),
            ("=,=,=", vec![]),
        ] {
            assert_eq!(parse_challenges(text), wanted, "{text}");
        }
    }
}
