//! Certificates and keys from PEM files, for one side or both.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};

use super::ServeError;

/// PEM files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate, and those between it and the authority.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Authorities of clients: who has no certificate of one of them is not talked to.
    pub client_ca: Option<PathBuf>,
}

/// Reads the files.
pub(super) fn server_config(files: &TlsFiles) -> Result<Arc<ServerConfig>, ServeError> {
    let provider = Arc::new(ring::default_provider());
    let fail = |path: &Path, reason: &dyn std::fmt::Display| ServeError::new(path.display(), reason);
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| ServeError::new("TLS", error))?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for cert in certificates(path)? {
                roots.add(cert).map_err(|error| fail(path, &error))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|error| fail(path, &error))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let key = PrivateKeyDer::from_pem_file(&files.key)
        .map_err(|error| fail(&files.key, &format!("no private key in PEM form: {error}")))?;
    let mut config = builder
        .with_single_cert(certificates(&files.cert)?, key)
        .map_err(|error| fail(&files.cert, &format!("does not go with {}: {error}", files.key.display())))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, ServeError> {
    let fail = |reason: String| ServeError::new(path.display(), reason);
    let read: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path)
        .map_err(|error| fail(format!("no certificates in PEM form: {error}")))?
        .collect();
    let certs = read.map_err(|error| fail(format!("no certificates in PEM form: {error}")))?;
    match certs.is_empty() {
        true => Err(fail("no certificates in PEM form".to_owned())),
        false => Ok(certs),
    }
}
