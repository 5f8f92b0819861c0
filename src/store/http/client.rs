//! The HTTP client of one store: TLS, proxy, redirects, connections that are kept.
//!
//! Files that the options name are read here, once: a store that is opened works till its end, and what is wrong with them is
//! told before anything is asked of a network.
//!
//! Invariants: an answer is handed out as the server sent it (no transport compression is asked for or undone); `Authorization` and
//! `Cookie` follow a redirect only to the same scheme, host and port; nobody is led from https to http.

use std::path::Path;
use std::time::Duration;

use reqwest::redirect::{Attempt, Policy};
use reqwest::{Certificate, Client, Identity};

use crate::store::options::HttpOptions;
use crate::store::tls::install_provider;
use crate::store::{StoreError, StoreOptions};

/// The longest a connection may take to be made, TLS included.
pub const MAX_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a request may be sent elsewhere.
const MAX_REDIRECTS: usize = 10;

/// How often an HTTP/2 connection with requests under way is asked for a sign of life, and how long that may take. Without this
/// every retry would go into the connection that is dead already.
const SIGN_OF_LIFE: Duration = Duration::from_secs(10);

/// Makes the client for a store of this name: the system's certificates and those of `ca_cert`, a client certificate, the
/// proxy of the environment, HTTP/2 where the server offers it by ALPN.
///
/// # Errors
/// A file cannot be read, or holds no certificate or key; there is a client certificate without its key, or the other way round.
pub fn client(options: &StoreOptions, store_name: &str) -> Result<Client, StoreError> {
    install_provider();
    let roots = root_certificates(&options.http, store_name)?;
    let identity = identity(&options.http, store_name)?;
    let build = |with_system: bool| {
        let builder = Client::builder()
            .user_agent(concat!("caifs/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(options.request_timeout.min(MAX_CONNECT_TIMEOUT))
            .timeout(options.request_timeout)
            .redirect(Policy::custom(follow))
            .referer(false)
            .http2_keep_alive_interval(SIGN_OF_LIFE)
            .http2_keep_alive_timeout(SIGN_OF_LIFE)
            .tls_danger_accept_invalid_certs(options.http.trust_insecure);
        let builder = match with_system {
            true => builder.tls_certs_merge(roots.iter().cloned()),
            false => builder.tls_certs_only(roots.iter().cloned()),
        };
        match &identity {
            Some(identity) => builder.identity(identity.clone()),
            None => builder,
        }
        .build()
    };
    // A system without any certificate is no reason to refuse http://, nor https:// with a certificate of its own.
    let first = match build(true) {
        Ok(client) => return Ok(client),
        Err(error) => error,
    };
    build(false).map_err(|_| {
        let files: Vec<_> = [&options.http.ca_cert, &options.http.client_cert, &options.http.client_key]
            .into_iter()
            .flatten()
            .map(|path| path.display().to_string())
            .collect();
        let object = if files.is_empty() { store_name.to_owned() } else { files.join(", ") };
        StoreError::new(
            store_name,
            object,
            format!("no TLS client can be made: {}", super::exchange::root_cause(&first)),
        )
    })
}

/// Decides about one redirect.
fn follow(attempt: Attempt) -> reqwest::redirect::Action {
    let is_downgrade =
        attempt.url().scheme() != "https" && attempt.previous().last().is_some_and(|from| from.scheme() == "https");
    // 303 says that the answer lies elsewhere: following it would take a page about a PUT for its success.
    if is_downgrade || attempt.status() == reqwest::StatusCode::SEE_OTHER {
        return attempt.stop();
    }
    match attempt.previous().len() > MAX_REDIRECTS {
        true => attempt.error("redirected too often"),
        false => attempt.follow(),
    }
}

fn root_certificates(options: &HttpOptions, store_name: &str) -> Result<Vec<Certificate>, StoreError> {
    let Some(path) = &options.ca_cert else { return Ok(Vec::new()) };
    let pem = read(path, store_name)?;
    match Certificate::from_pem_bundle(&pem) {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(StoreError::new(store_name, path.display().to_string(), "holds no certificate in PEM form")),
    }
}

fn identity(options: &HttpOptions, store_name: &str) -> Result<Option<Identity>, StoreError> {
    let (cert, key) = match (&options.client_cert, &options.client_key) {
        (Some(cert), Some(key)) => (cert, key),
        (None, None) => return Ok(None),
        (Some(cert), None) => {
            return Err(StoreError::new(store_name, cert.display().to_string(), "a client certificate needs its key"));
        }
        (None, Some(key)) => {
            return Err(StoreError::new(store_name, key.display().to_string(), "a client key needs its certificate"));
        }
    };
    let mut pem = read(cert, store_name)?;
    if !Certificate::from_pem_bundle(&pem).is_ok_and(|certificates| !certificates.is_empty()) {
        return Err(StoreError::new(store_name, cert.display().to_string(), "holds no certificate in PEM form"));
    }
    pem.push(b'\n');
    pem.extend(read(key, store_name)?);
    match Identity::from_pem(&pem) {
        Ok(identity) => Ok(Some(identity)),
        Err(_) => Err(StoreError::new(
            store_name,
            key.display().to_string(),
            "holds no private key in PEM form (an encrypted key cannot be used)",
        )),
    }
}

fn read(path: &Path, store_name: &str) -> Result<Vec<u8>, StoreError> {
    std::fs::read(path).map_err(|error| {
        StoreError::new(store_name, path.display().to_string(), crate::store::local::plain_words(&error))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn refusal(http: HttpOptions) -> String {
        let options = StoreOptions { http, ..StoreOptions::default() };
        client(&options, "https://h").unwrap_err().to_string()
    }

    #[test]
    fn files_that_do_not_fit_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &str| -> Option<PathBuf> {
            let path = dir.path().join(name);
            std::fs::write(&path, content).unwrap();
            Some(path)
        };
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(vec!["h".to_owned()]).unwrap().self_signed(&key).unwrap();
        let rubbish = file("rubbish.pem", "rubbish");
        let cert = file("cert.pem", &certificate.pem());
        let key = file("key.pem", &key.serialize_pem());
        let none = Some(dir.path().join("none.pem"));
        let base = HttpOptions::default;
        for (options, what) in [
            (HttpOptions { ca_cert: none.clone(), ..base() }, "none.pem: No such file or directory"),
            (HttpOptions { ca_cert: rubbish.clone(), ..base() }, "rubbish.pem: holds no certificate"),
            (HttpOptions { client_cert: cert.clone(), ..base() }, "cert.pem: a client certificate needs its key"),
            (HttpOptions { client_key: key.clone(), ..base() }, "key.pem: a client key needs its certificate"),
            (
                HttpOptions { client_cert: cert.clone(), client_key: rubbish.clone(), ..base() },
                "rubbish.pem: holds no private key",
            ),
            (
                HttpOptions { client_cert: rubbish, client_key: key.clone(), ..base() },
                "rubbish.pem: holds no certificate",
            ),
            (HttpOptions { client_cert: cert.clone(), client_key: none, ..base() }, "none.pem: No such file"),
        ] {
            let text = refusal(options);
            assert!(text.contains(what), "{text}");
        }
        let http = HttpOptions { ca_cert: cert.clone(), client_cert: cert, client_key: key, ..base() };
        assert!(client(&StoreOptions { http, ..StoreOptions::default() }, "https://h").is_ok());
    }
}
