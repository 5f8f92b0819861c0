//! What a server answers when it refuses, and what breaks on the way to it: told apart here and nowhere else.
//!
//! [`Connector`] makes the clients of `object_store`. They turn every answer of the bucket's server but success into a [`Refusal`], because
//! that crate keeps the status and the words of an answer to itself. [`Trouble`] finds it again in the crate's errors.
//!
//! Invariant: a refusal by a server of credentials is never taken for one by the bucket's server ("not found" means another thing there).

use std::error::Error;
use std::fmt;
use std::io;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody, HttpService,
    ReqwestConnector,
};
use url::Url;

use super::emulator;

/// As much of an error's body is read: all of any server's own, and not all of anything else.
const MAX_ERROR_BODY_BYTES: usize = 64 << 10;

/// As many characters of a server's words are passed on.
const MAX_WORDS_CHARS: usize = 300;

/// An answer that is no success.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The HTTP status.
    pub status: u16,
    /// The words for it.
    status_words: &'static str,
    /// The server's own code (`NoSuchKey`), empty if it gave none.
    pub code: String,
    /// The server's explanation, one line, perhaps empty.
    message: String,
    /// How long it asks to be left alone.
    pub retry_after: Option<Duration>,
    /// The region that the bucket is in, if it was asked for in another one.
    region: Option<String>,
    /// The server, when it is not the bucket's but one that gives credentials.
    credentials_host: Option<String>,
}

impl Refusal {
    /// Whether the bucket's server says that the object is not there (and not, that the bucket is not).
    pub fn is_missing_object(&self) -> bool {
        self.status == 404 && self.credentials_host.is_none() && self.code != "NoSuchBucket"
    }

    /// Whether the bucket's server wants other credentials.
    pub fn is_denied(&self) -> bool {
        matches!(self.status, 401 | 403) && self.credentials_host.is_none()
    }

    /// Whether the bucket's server says that a condition on the object's version does not hold.
    pub fn is_failed_condition(&self) -> bool {
        self.status == 412 && self.credentials_host.is_none()
    }

    /// Whether the same request can succeed later.
    pub fn is_transient(&self) -> bool {
        matches!(self.status, 408 | 429 | 500..)
    }

    fn of_body(status: u16, status_words: &'static str, body: &str) -> Self {
        let (code, message) = words(body);
        Self { status, status_words, code, message, retry_after: None, region: None, credentials_host: None }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(host) = &self.credentials_host {
            write!(f, "credentials from {host}: ")?;
        }
        write!(f, "{} {}", self.status, self.status_words)?;
        if !self.code.is_empty() {
            write!(f, ": {}", self.code)?;
        }
        if !self.message.is_empty() {
            write!(f, ": {}", self.message)?;
        }
        match &self.region {
            Some(region) => write!(f, " (the bucket's region is {region})"),
            None => Ok(()),
        }
    }
}

impl Error for Refusal {}

/// Why a request came to nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// A server's answer.
    Refused(Box<Refusal>),
    /// The way to the server or back broke, which can pass.
    Broken(String),
    /// Something that asking again does not cure.
    Wrong(String),
}

impl From<object_store::Error> for Trouble {
    fn from(error: object_store::Error) -> Self {
        let mut is_transport = false;
        let mut cause: Option<&(dyn Error + 'static)> = Some(&error);
        while let Some(present) = cause {
            if let Some(refusal) = present.downcast_ref::<Refusal>() {
                return Self::Refused(Box::new(refusal.clone()));
            }
            if let Some(error) = tls_error(present) {
                return Self::Wrong(format!("TLS: {}", one_line(&error.to_string())));
            }
            is_transport |= present.is::<HttpError>();
            cause = present.source();
        }
        if is_transport {
            return Self::Broken(one_line(&root_cause(&error)));
        }
        // What this crate says around its cause ("Generic S3 error") tells nobody anything.
        let cause = error.source().map_or_else(|| error.to_string(), ToString::to_string);
        Self::Wrong(one_line(&cause))
    }
}

fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    // An I/O error passes over the error it was made of when asked for its source, and one may be made of another.
    match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        Some(inner) => tls_error(inner),
        None => error.downcast_ref(),
    }
}

fn root_cause(error: &(dyn Error + 'static)) -> String {
    let mut root = error;
    while let Some(source) = root.source() {
        root = source;
    }
    let text = root.to_string();
    match text.split_once(" (os error") {
        Some((words, _)) => words.to_owned(),
        None => text,
    }
}

/// Makes clients that tell refusals of one server.
#[derive(Debug, Clone)]
pub struct Connector {
    /// Host and port of the bucket's server as they stand in a URL.
    authority: String,
    /// Whether it emulates Google's.
    is_emulator: bool,
}

impl Connector {
    /// For the server of this URL.
    pub fn new(endpoint: &Url) -> Self {
        Self { authority: endpoint.authority().to_owned(), is_emulator: false }
    }

    /// The same, where the server emulates Google's (or not).
    pub fn with_emulator(self, is_emulator: bool) -> Self {
        Self { is_emulator, ..self }
    }
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let client = ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(Service { client, connector: self.clone() }))
    }
}

#[derive(Debug)]
struct Service {
    client: HttpClient,
    connector: Connector,
}

impl HttpService for Service {
    fn call<'a, 'b>(&'a self, mut request: HttpRequest) -> BoxFuture<'b, Result<HttpResponse, HttpError>>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(async move {
            // An empty token is how unsigned requests to Google's API are asked of the crate; the header would only confuse a server.
            if request.headers().get("authorization").is_some_and(|value| value.as_bytes().trim_ascii() == b"Bearer") {
                request.headers_mut().remove("authorization");
            }
            let asked = request.uri().authority().map(|authority| authority.as_str().to_owned()).unwrap_or_default();
            let Connector { authority, is_emulator } = &self.connector;
            let is_ours = asked == *authority;
            let response = match is_ours && *is_emulator {
                true => emulator::to_xml_api(self.client.execute(emulator::to_json_api(request)).await?),
                false => self.client.execute(request).await?,
            };
            let status = response.status();
            if status.is_success() {
                return Ok(with_partial_status(response));
            }
            // What servers of credentials refuse, the crate knows to read. But that it can pass is for us to see.
            if !is_ours && !matches!(status.as_u16(), 408 | 429 | 500..) {
                return Ok(response);
            }
            let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
            let retry_after = header("retry-after").and_then(|text| text.parse().ok()).map(Duration::from_secs);
            let region = match status.as_u16() {
                301 | 307 | 400 => header("x-amz-bucket-region").map(cut),
                _ => None,
            };
            let status_words = status.canonical_reason().unwrap_or("refused");
            let body = read_some(response.into_body()).await;
            let refusal = Refusal::of_body(status.as_u16(), status_words, &String::from_utf8_lossy(&body));
            let credentials_host = (!is_ours).then_some(asked);
            let refusal = Refusal { retry_after, region, credentials_host, ..refusal };
            Err(HttpError::new(HttpErrorKind::Unknown, refusal))
        })
    }
}

/// Some servers (rclone's) send the range that was asked for, and say so in `Content-Range`, under the status for a whole.
fn with_partial_status(mut response: HttpResponse) -> HttpResponse {
    if response.status().as_u16() == 200
        && response.headers().contains_key("content-range")
        && let Ok(partial) = 206u16.try_into()
    {
        *response.status_mut() = partial;
    }
    response
}

/// The first bytes of a body; one that breaks off ends there.
async fn read_some(body: HttpResponseBody) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut frames = body.bytes_stream();
    while let Some(Ok(frame)) = frames.next().await {
        let room = MAX_ERROR_BODY_BYTES - bytes.len();
        bytes.extend_from_slice(&frame[..frame.len().min(room)]);
        if bytes.len() == MAX_ERROR_BODY_BYTES {
            break;
        }
    }
    bytes
}

/// Code and message of an error's body: `<Error><Code>…</Code><Message>…</Message></Error>` of S3 and Google's XML API, or Google's
/// `{"error": {"message": …}}`. Empty where there is none.
fn words(body: &str) -> (String, String) {
    if let Ok(json) = serde_json::from_str::<serde_json::Value>(body) {
        let message = &json["error"]["message"];
        let message = if message.is_null() { &json["error_description"] } else { message };
        return (String::new(), cut(message.as_str().unwrap_or_default()));
    }
    (element(body, "Code"), element(body, "Message"))
}

/// The text of the first element of this name.
fn element(xml: &str, name: &str) -> String {
    let (Some((_, rest)), end) = (xml.split_once(&format!("<{name}>")), format!("</{name}>")) else {
        return String::new();
    };
    let text = rest.split_once(&end).map_or("", |(text, _)| text);
    let plain = text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"").replace("&#39;", "'");
    cut(&plain.replace("&apos;", "'").replace("&amp;", "&"))
}

/// A text as one line of a bounded length, without what moves a terminal's cursor.
pub fn one_line(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().filter(|c| !c.is_control()).take(MAX_WORDS_CHARS).collect()
}

fn cut(text: &str) -> String {
    one_line(text).trim_end_matches('.').to_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_quoted_in_one_line_without_markup() {
        for (status, words, body, shown) in [
            (
                403,
                "Forbidden",
                "<?xml version=\"1.0\"?>\n<Error><Code>SignatureDoesNotMatch</Code><Message>It is\n &lt;not&gt;\x1b[2J right.</Message>\
                 <StringToSign>x</StringToSign></Error>",
                "403 Forbidden: SignatureDoesNotMatch: It is <not>[2J right",
            ),
            (404, "Not Found", "<html><body>lost</body></html>", "404 Not Found"),
            (403, "Forbidden", r#"{"error": {"code": 403, "message": "no access"}}"#, "403 Forbidden: no access"),
            (400, "Bad Request", r#"{"error": "x", "error_description": "stale"}"#, "400 Bad Request: stale"),
            (503, "Service Unavailable", "<Code>SlowDown", "503 Service Unavailable"),
            (500, "Internal Server Error", "", "500 Internal Server Error"),
        ] {
            assert_eq!(Refusal::of_body(status, words, body).to_string(), shown);
        }
        let long = format!("<Message>{}</Message>", "x".repeat(10_000));
        assert!(Refusal::of_body(400, "Bad Request", &long).to_string().len() < 400);
    }

    #[test]
    fn only_the_buckets_server_knows_what_is_missing() {
        let missing = Refusal::of_body(404, "Not Found", "<Code>NoSuchKey</Code>");
        assert!(missing.is_missing_object());
        assert!(Refusal::of_body(404, "Not Found", "").is_missing_object());
        assert!(!Refusal::of_body(404, "Not Found", "<Code>NoSuchBucket</Code>").is_missing_object());
        let foreign = Refusal { credentials_host: Some("169.254.169.254".to_owned()), ..missing };
        assert!(!foreign.is_missing_object());
        assert!(foreign.to_string().starts_with("credentials from 169.254.169.254: 404"));
    }

    #[test]
    fn what_can_pass_is_told_from_what_cannot() {
        for (status, can_pass) in [(408, true), (429, true), (500, true), (503, true), (400, false), (403, false)] {
            assert_eq!(Refusal::of_body(status, "", "").is_transient(), can_pass);
        }
        let generic = |source: Box<dyn Error + Send + Sync>| object_store::Error::Generic { store: "S3", source };
        let refused = io::Error::new(io::ErrorKind::ConnectionRefused, "refused (os error 111)");
        let broken = Trouble::from(generic(Box::new(HttpError::new(HttpErrorKind::Connect, refused))));
        assert_eq!(broken, Trouble::Broken("refused".to_owned()));
        let certificate = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let tls = HttpError::new(HttpErrorKind::Connect, io::Error::other(io::Error::other(certificate)));
        let Trouble::Wrong(text) = Trouble::from(generic(Box::new(tls))) else { panic!("it is not transient") };
        assert!(text.contains("UnknownIssuer"), "{text}");
        let other = Trouble::from(generic("no profile".into()));
        assert_eq!(other, Trouble::Wrong("no profile".to_owned()));
        let refusal = Refusal::of_body(403, "Forbidden", "");
        let wrapped = generic(Box::new(HttpError::new(HttpErrorKind::Unknown, refusal.clone())));
        assert_eq!(Trouble::from(wrapped), Trouble::Refused(Box::new(refusal)));
    }
}
