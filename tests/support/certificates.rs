//! Certificates for servers under test: a CA, a server on 127.0.0.1 and localhost, a client. All of them PEM files.

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};

/// Where the files are.
#[derive(Debug, Clone)]
pub struct Certificates {
    /// The CA's certificate, which signed the others.
    pub ca: PathBuf,
    /// The server's certificate.
    pub server_cert: PathBuf,
    /// The server's key.
    pub server_key: PathBuf,
    /// The client's certificate.
    pub client_cert: PathBuf,
    /// The client's key.
    pub client_key: PathBuf,
}

impl Certificates {
    /// Makes new ones in a directory.
    pub fn make(dir: &Path) -> Self {
        Self::make_for(dir, &[])
    }

    /// Makes new ones for a server that has more names.
    pub fn make_for(dir: &Path, names: &[&str]) -> Self {
        let write = |name: &str, text: String| {
            let path = dir.join(name);
            fs::write(&path, text).expect("the directory can be written to");
            path
        };
        let mut params = CertificateParams::new(Vec::new()).expect("no names are good names");
        params.distinguished_name.push(DnType::CommonName, "CA of a test");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().expect("a key can be made");
        let ca = write("ca.pem", params.self_signed(&key).expect("a CA can be made").pem());
        let issuer = Issuer::new(params, key);
        let leaf = |name: &str, usage: ExtendedKeyUsagePurpose| {
            let names = ["127.0.0.1", "localhost"].iter().chain(names).map(|name| (*name).to_owned());
            let mut params = CertificateParams::new(names.collect::<Vec<_>>()).expect("good names");
            params.distinguished_name.push(DnType::CommonName, name);
            params.extended_key_usages = vec![usage];
            let key = KeyPair::generate().expect("a key can be made");
            let cert = params.signed_by(&key, &issuer).expect("a certificate can be made").pem();
            (write(&format!("{name}.pem"), cert), write(&format!("{name}.key"), key.serialize_pem()))
        };
        let (server_cert, server_key) = leaf("server", ExtendedKeyUsagePurpose::ServerAuth);
        let (client_cert, client_key) = leaf("client", ExtendedKeyUsagePurpose::ClientAuth);
        Self { ca, server_cert, server_key, client_cert, client_key }
    }
}
