//! desync and casync as clients of our servers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use super::client::get;
use super::{chunk_server, start, url};
use crate::support::blob::noise;
use crate::support::peers::peer;
use crate::support::run::{caifs, run};
use crate::support::scratch::Scratch;
use crate::support::server::Server;

const KEY: &str = "d69371915dbc4b1f0ec55e2a80f0e089accf4b32e0f8dc0e29fed7f0f30d1b26";

/// A blob, its index and its store, made by us.
struct Made {
    scratch: Scratch,
    blob: PathBuf,
    index: PathBuf,
    store: PathBuf,
}

fn made() -> Made {
    let scratch = Scratch::new();
    let blob = scratch.file("blob", [noise(700_000), vec![0; 600_000], noise(200_000)].concat());
    let (index, store) = (scratch.join("blob.caibx"), scratch.join("store"));
    run(caifs().arg("make").arg("-s").arg(&store).arg(&index).arg(&blob)).ok();
    Made { scratch, blob, index, store }
}

impl Made {
    /// desync with its own configuration for one store.
    fn desync(&self, url: &str, options: &str) -> Option<Command> {
        let mut desync = peer("desync")?.command();
        let config = self.scratch.file("config.json", format!("{{\"store-options\": {{\"{url}\": {{{options}}}}}}}"));
        desync.arg("--config").arg(config).env_remove("DESYNC_ENCRYPTION_KEY");
        Some(desync)
    }

    /// desync gets the blob from a server.
    fn is_extracted_from(&self, url: &str, options: &str, flags: &[&Path]) {
        let Some(mut desync) = self.desync(url, options) else { return };
        let out = self.scratch.join("out");
        run(desync.args(["extract", "-s", url]).args(flags).arg(&self.index).arg(&out)).ok();
        assert!(fs::read(&out).unwrap() == fs::read(&self.blob).unwrap(), "{url}: another blob");
        fs::remove_file(&out).unwrap();
    }

    /// desync puts the blob's chunks to a server, with both of its verbs that do so; what is stored then has all of the blob.
    fn is_stored_by(&self, server: &Server, store: &Path, options: &str) {
        let url = url(server);
        let Some(mut desync) = self.desync(&url, options) else { return };
        let index = self.scratch.join("by-desync.caibx");
        run(desync.args(["make", "-s", &url]).arg(&index).arg(&self.blob)).ok();
        let cat = run(caifs().arg("cat").arg("-s").arg(store).arg(&index)).ok();
        assert!(cat.stdout == fs::read(&self.blob).unwrap(), "another blob");
        fs::remove_dir_all(store).unwrap();
        fs::create_dir(store).unwrap();
        let mut desync = self.desync(&url, options).expect("it was there a moment ago");
        run(desync.args(["chop", "-s", &url]).arg(&index).arg(&self.blob)).ok();
        let cat = run(caifs().arg("cat").arg("-s").arg(store).arg(&index)).ok();
        assert!(cat.stdout == fs::read(&self.blob).unwrap(), "another blob");
    }
}

#[test]
fn desync_reads_what_we_serve() {
    let made = made();
    let server = chunk_server(&made.store, &[]);
    made.is_extracted_from(&url(&server), "", &[]);
    let Some(mut desync) = made.desync(&url(&server), "") else { return };
    let cat = run(desync.args(["cat", "-s", &url(&server), "-o", "650000", "-l", "700000"]).arg(&made.index)).ok();
    assert!(cat.stdout == fs::read(&made.blob).unwrap()[650_000..1_350_000]);

    let server = chunk_server(&made.store, &["-u"]);
    made.is_extracted_from(&url(&server), "\"uncompressed\": true", &[]);
    for algorithm in ["xchacha20-poly1305", "aes-256-gcm"] {
        let server = chunk_server(&made.store, &["--encryption-key", KEY, "--encryption-algorithm", algorithm]);
        let options =
            format!("\"encryption\": true, \"encryption-algorithm\": \"{algorithm}\", \"encryption-key\": \"{KEY}\"");
        made.is_extracted_from(&url(&server), &options, &[]);
    }
}

#[test]
fn desync_reads_through_our_cache() {
    let made = made();
    let cache = made.scratch.join("cache");
    let server = chunk_server(&made.store, &["-c", cache.to_str().unwrap()]);
    made.is_extracted_from(&url(&server), "", &[]);
    fs::rename(&made.store, made.scratch.join("gone")).unwrap();
    made.is_extracted_from(&url(&server), "", &[]);
}

#[test]
fn desync_writes_to_what_we_serve() {
    let made = made();
    let written = made.scratch.dir("written");
    let server = chunk_server(&written, &["-w"]);
    made.is_stored_by(&server, &written, "");
    let written = made.scratch.dir("written-plain");
    let server = chunk_server(&written, &["-w", "-u"]);
    made.is_stored_by(&server, &written, "\"uncompressed\": true");
    let written = made.scratch.dir("written-encrypted");
    let server = chunk_server(&written, &["-w", "--encryption-key", KEY]);
    made.is_stored_by(&server, &written, &format!("\"encryption\": true, \"encryption-key\": \"{KEY}\""));
}

#[test]
fn casync_extracts_what_we_serve() {
    let Some(casync) = peer("casync") else { return };
    let made = made();
    let indexes = made.scratch.dir("indexes");
    fs::copy(&made.index, indexes.join("blob.caibx")).unwrap();
    let chunks = chunk_server(&made.store, &[]);
    let indexes = start("index-server", |command| command.arg("-s").arg(&indexes));
    for index in [made.index.to_str().unwrap().to_owned(), format!("{}any/blob.caibx", url(&indexes))] {
        let out = made.scratch.join("out");
        let store = format!("--store={}", url(&chunks));
        run(casync.command().arg("extract").arg(&store).arg(&index).arg(&out).env("XDG_CACHE_HOME", &*made.scratch))
            .ok();
        assert!(fs::read(&out).unwrap() == fs::read(&made.blob).unwrap(), "{index}: another blob");
        fs::remove_file(&out).unwrap();
    }
}

#[test]
fn desync_reads_and_writes_indexes() {
    let made = made();
    let indexes = made.scratch.dir("indexes");
    let server = start("index-server", |command| command.arg("-w").arg("-s").arg(&indexes));
    let remote = format!("{}blob.caibx", url(&server));
    let Some(mut desync) = made.desync(&url(&server), "") else { return };
    run(desync.args(["make", "-s"]).arg(&made.store).arg(&remote).arg(&made.blob)).ok();
    let kept = indexes.join("blob.caibx");
    let cat = run(caifs().arg("cat").arg("-s").arg(&made.store).arg(&kept)).ok();
    assert!(cat.stdout == fs::read(&made.blob).unwrap(), "another blob");
    let mut desync = made.desync(&url(&server), "").expect("it was there a moment ago");
    let cat = run(desync.args(["cat", "-s"]).arg(&made.store).arg(&remote)).ok();
    assert!(cat.stdout == fs::read(&made.blob).unwrap(), "another blob");
}

#[test]
fn a_wrong_authorization_is_refused() {
    let made = made();
    let secret = "Bearer swordfish";
    for by_environment in [false, true] {
        let log = made.scratch.join("log");
        let server = start("chunk-server", |command| {
            let command = command.arg("-s").arg(&made.store).arg("--log").arg(&log);
            match by_environment {
                true => command.env("DESYNC_HTTP_AUTH", secret),
                false => command.args(["--authorization", secret]),
            }
        });
        made.is_extracted_from(&url(&server), &format!("\"http-auth\": \"{secret}\""), &[]);
        for path in ["/", "/healthz", "/metrics", "/0000/x"] {
            for value in [None, Some("Bearer swordfis"), Some("Bearer swordfish "), Some("bearer swordfish"), Some("")]
            {
                let headers: Vec<_> = value.map(|value| ("Authorization", value)).into_iter().collect();
                let status = super::client::ask(server.address(), "GET", path, &headers, b"").status;
                // White space around a header's value is no part of it.
                let is_right = value.is_some_and(|value| value.trim() == secret);
                assert_eq!(status == 401, !is_right, "{path} {value:?}");
            }
        }
        assert_eq!(get(server.address(), "/").header("www-authenticate"), Some("Bearer realm=\"caifs\""));
        let logged = fs::read_to_string(&log).unwrap();
        assert!(logged.contains("Response: 401") && !logged.contains("swordfish"), "{logged}");
        fs::remove_file(&log).unwrap();
    }
}

/// A certificate authority with a server's and a client's certificate, as PEM files.
struct Certificates {
    ca: PathBuf,
    server: (PathBuf, PathBuf),
    client: (PathBuf, PathBuf),
}

fn certificates(scratch: &Scratch, name: &str) -> Certificates {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&key).unwrap();
    let issuer = Issuer::new(params, key);
    let ca = scratch.file(&format!("{name}-ca.pem"), ca.pem());
    let issued = |role: &str| {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let cert = params.signed_by(&key, &issuer).unwrap();
        (
            scratch.file(&format!("{name}-{role}.pem"), cert.pem()),
            scratch.file(&format!("{name}-{role}.key"), key.serialize_pem()),
        )
    };
    Certificates { ca, server: issued("server"), client: issued("client") }
}

#[test]
fn tls_serves_who_trusts_us_and_whom_we_trust() {
    let made = made();
    let (ours, strange) = (certificates(&made.scratch, "ours"), certificates(&made.scratch, "strange"));
    let secured = |flags: &[&Path]| {
        start("chunk-server", |command| {
            command
                .arg("-s")
                .arg(&made.store)
                .arg("--cert")
                .arg(&ours.server.0)
                .arg("--key")
                .arg(&ours.server.1)
                .args(flags)
        })
    };
    let https = |server: &Server| format!("https://{}/", server.address());
    let server = secured(&[]);
    let trusting: [&Path; 2] = ["--ca-cert".as_ref(), &ours.ca];
    made.is_extracted_from(&https(&server), "", &trusting);

    let mutual = secured(&["--mutual-tls".as_ref(), "--client-ca".as_ref(), &ours.ca]);
    let presenting = |(cert, key): &(PathBuf, PathBuf)| {
        let words = ["--client-cert".as_ref(), cert.as_path(), "--client-key".as_ref(), key.as_path()];
        [&trusting[..], &words[..]].concat().into_iter().map(Path::to_owned).collect::<Vec<_>>()
    };
    let right = presenting(&ours.client);
    made.is_extracted_from(&https(&mutual), "", &right.iter().map(PathBuf::as_path).collect::<Vec<_>>());
    for wrong in [trusting.map(Path::to_owned).to_vec(), presenting(&strange.client)] {
        let url = https(&mutual);
        let Some(mut desync) = made.desync(&url, "\"error-retry\": 1") else { return };
        let out = made.scratch.join("out");
        run(desync.args(["extract", "-s", &url]).args(&wrong).arg(&made.index).arg(&out)).fails();
    }
    // Who talks to it without TLS gets nothing, and does no harm.
    let mut plain = super::client::connect(server.address());
    std::io::Write::write_all(&mut plain, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = std::io::Read::read_to_end(&mut plain, &mut answer);
    assert!(!answer.starts_with(b"HTTP/"));
    made.is_extracted_from(&https(&server), "", &trusting);
}

#[tokio::test]
async fn http_2_is_spoken_with_and_without_tls() {
    let scratch = Scratch::new();
    let store = scratch.dir("store");
    let ours = certificates(&scratch, "ours");
    // It is there already when another test was first.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let ca = reqwest::Certificate::from_pem(&fs::read(&ours.ca).unwrap()).unwrap();
    let secured = start("chunk-server", |command| {
        command.arg("-s").arg(&store).arg("--cert").arg(&ours.server.0).arg("--key").arg(&ours.server.1)
    });
    let plain = chunk_server(&store, &[]);
    let builder = || reqwest::Client::builder().no_proxy();
    for (client, url) in [
        (builder().tls_certs_only([ca]).build().unwrap(), format!("https://{}/healthz", secured.address())),
        (builder().http2_prior_knowledge().build().unwrap(), format!("http://{}/healthz", plain.address())),
    ] {
        let reply = client.get(&url).send().await.unwrap();
        assert_eq!((reply.version(), reply.status().as_u16()), (reqwest::Version::HTTP_2, 200), "{url}");
        assert_eq!(reply.text().await.unwrap(), "ok\n");
    }
}

#[tokio::test]
async fn a_renewed_certificate_is_used_after_a_hangup() {
    let scratch = Scratch::new();
    let (old, new) = (certificates(&scratch, "old"), certificates(&scratch, "new"));
    let _ = rustls::crypto::ring::default_provider().install_default();
    let server = start("chunk-server", |command| {
        command.arg("-s").arg(scratch.dir("store")).arg("--cert").arg(&old.server.0).arg("--key").arg(&old.server.1)
    });
    let url = format!("https://{}/healthz", server.address());
    // A client each time: a kept connection would show nothing.
    let is_trusted = async |ca: &Path| {
        let ca = reqwest::Certificate::from_pem(&fs::read(ca).unwrap()).unwrap();
        let client = reqwest::Client::builder().no_proxy().tls_certs_only([ca]).build().unwrap();
        client.get(&url).send().await.is_ok()
    };
    let hangup = || nix::sys::signal::kill(nix::unistd::Pid::from_raw(server.pid()), nix::sys::signal::Signal::SIGHUP);
    assert!(is_trusted(&old.ca).await && !is_trusted(&new.ca).await);
    // A key that does not go with the certificate changes nothing.
    fs::copy(&new.server.0, &old.server.0).unwrap();
    hangup().unwrap();
    assert!(is_trusted(&old.ca).await);
    fs::copy(&new.server.1, &old.server.1).unwrap();
    hangup().unwrap();
    let start = std::time::Instant::now();
    while !is_trusted(&new.ca).await {
        assert!(start.elapsed() < super::client::LIMIT, "the certificate is not read again");
    }
    assert!(!is_trusted(&old.ca).await);
}
