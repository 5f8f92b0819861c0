//! Stores and files on web servers: nginx for what servers do, a scripted one for what they do when they are ill.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use caifs::chunk::cipher::{Algorithm, Cipher, Key};
use caifs::chunk::codec::{self, Form};
use caifs::format::index::Index;
use caifs::store::files::{FileStore, ReadWhole};
use caifs::store::http::HttpStore;
use caifs::store::layout::Layout;
use caifs::store::location::Location;
use caifs::store::open::{open, open_files, open_writable};
use caifs::store::options::HttpOptions;
use caifs::store::retry::RetryPolicy;
use caifs::store::{Put, Secret, Store, StoreError, StoreOptions, WriteStore};
use url::Url;

use super::{chunk, store_contract};
use crate::support::blob::noise;
use crate::support::certificates::Certificates;
use crate::support::peers::peer;
use crate::support::run::run;
use crate::support::scratch::Scratch;
use crate::support::scripted::{Answer, Scripted, answer};
use crate::support::servers::nginx::{Nginx, Site};

/// nginx serving a new directory, or nothing where it is not installed.
fn nginx(scratch: &Scratch, name: &str, site: Site<'_>) -> Option<Nginx> {
    Some(Nginx::start(&peer("nginx")?.path, &scratch.dir(name), site))
}

fn store(url: &str, options: &StoreOptions) -> HttpStore {
    HttpStore::new(Url::parse(url).unwrap(), options).unwrap()
}

fn with_http(http: HttpOptions) -> StoreOptions {
    StoreOptions { http, retry: RetryPolicy::NEVER, ..StoreOptions::default() }
}

/// Retries, without the waiting.
fn retrying(n_retries: u32) -> StoreOptions {
    let retry = RetryPolicy { n_retries, base: Duration::ZERO, max: Duration::ZERO };
    StoreOptions { retry, ..StoreOptions::default() }
}

#[track_caller]
fn reason<T: std::fmt::Debug>(result: Result<T, StoreError>, what: &str) -> StoreError {
    let error = result.expect_err("it had to fail");
    assert!(error.to_string().contains(what), "{error}");
    error
}

/// Compressed and plain, as they are and encrypted.
pub fn layouts() -> Vec<Layout> {
    let key: Key = "d69371915dbc4b1f0ec55e2a80f0e089accf4b32e0f8dc0e29fed7f0f30d1b26".parse().unwrap();
    let cipher = |algorithm| Some(Arc::new(Cipher::new(algorithm, &key)));
    vec![
        Layout::default(),
        Layout { form: Form::Plain, cipher: None },
        Layout { form: Form::Compressed, cipher: cipher(Algorithm::XChaCha20Poly1305) },
        Layout { form: Form::Plain, cipher: cipher(Algorithm::Aes256Gcm) },
    ]
}

#[tokio::test]
async fn a_web_server_keeps_the_contract() {
    let scratch = Scratch::new();
    let Some(nginx) = nginx(&scratch, "nginx", Site::default()) else { return };
    for (i, layout) in layouts().into_iter().enumerate() {
        let location = Location::parse(&format!("{}some/store%20{i}", nginx.url())).unwrap();
        let options = StoreOptions { layout: layout.clone(), ..StoreOptions::default() };
        store_contract(open_writable(&location, &options).unwrap().as_ref()).await;
        // What lies there is what a local store has.
        let (id, stored) = chunk(layout.form, b"x");
        let content = std::fs::read(nginx.root().join(format!("some/store {i}")).join(layout.object_name(id))).unwrap();
        assert_eq!(layout.open(content.into()), Ok(stored));
    }
}

#[tokio::test]
async fn certificates_are_checked_both_ways() {
    let scratch = Scratch::new();
    let made = Certificates::make(&scratch.dir("certificates"));
    let site = Site { tls: Some(&made), verify_client: true, ..Site::default() };
    let Some(nginx) = nginx(&scratch, "nginx", site) else { return };
    let url = nginx.url();
    let (id, stored) = chunk(Form::Compressed, b"x");
    let client = || HttpOptions {
        client_cert: Some(made.client_cert.clone()),
        client_key: Some(made.client_key.clone()),
        ..HttpOptions::default()
    };

    let known = with_http(HttpOptions { ca_cert: Some(made.ca.clone()), ..client() });
    store_contract(&store(&url, &known)).await;
    assert!(nginx.requests(1).iter().all(|request| request.protocol == "HTTP/2.0"));

    // Whoever has no certificate is turned away by the server, and its certificate is trusted by nobody who was not told to.
    let nobody = with_http(HttpOptions { ca_cert: Some(made.ca.clone()), ..HttpOptions::default() });
    let error = reason(store(&url, &nobody).fetch(id).await, "No required SSL certificate was sent");
    assert!(error.reason.starts_with("400 ") && !error.is_transient, "{error}");
    let error = reason(store(&url, &with_http(client())).fetch(id).await, "UnknownIssuer");
    assert!(!error.is_transient && error.to_string().contains("ca-cert"), "{error}");
    let error = reason(store(&url.replace("127.0.0.1", "127.0.0.2"), &known).fetch(id).await, "cannot connect");
    assert!(error.is_transient, "{error}");

    let trusting = with_http(HttpOptions { trust_insecure: true, ..client() });
    assert_eq!(store(&url, &trusting).fetch(id).await, Ok(Some(stored)));
}

#[tokio::test]
async fn a_certificate_for_another_host_is_refused() {
    let scratch = Scratch::new();
    let made = Certificates::make(&scratch.dir("certificates"));
    // The client's certificate is good for both names, but not as a server's.
    let wrong = Certificates { server_cert: made.client_cert.clone(), server_key: made.client_key.clone(), ..made };
    let Some(nginx) = nginx(&scratch, "nginx", Site { tls: Some(&wrong), ..Site::default() }) else { return };
    let options = with_http(HttpOptions { ca_cert: Some(wrong.ca.clone()), ..HttpOptions::default() });
    let (id, _) = chunk(Form::Compressed, b"x");
    let error = reason(store(&nginx.url(), &options).fetch(id).await, "TLS: invalid peer certificate");
    assert!(!error.is_transient, "{error}");
}

#[tokio::test]
async fn a_certificate_that_signed_itself_is_trusted_when_it_is_no_ca() {
    let Some(openssl) = peer("openssl") else { return };
    let scratch = Scratch::new();
    let (id, _) = chunk(Form::Compressed, b"x");
    for (name, ca, wanted) in [("leaf", "FALSE", Ok(None)), ("ca", "TRUE", Err("it needs one with CA:FALSE"))] {
        let dir = scratch.dir(&format!("{name}-certificates"));
        let (cert, key) = (dir.join("cert.pem"), dir.join("key.pem"));
        let mut command = openssl.command();
        command.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]);
        command.args(["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-addext"]);
        command.arg(format!("basicConstraints=critical,CA:{ca}")).arg("-keyout").arg(&key).arg("-out").arg(&cert);
        run(&mut command).ok();
        let made = Certificates {
            ca: cert.clone(),
            server_cert: cert.clone(),
            server_key: key.clone(),
            client_cert: cert.clone(),
            client_key: key,
        };
        let Some(nginx) = nginx(&scratch, name, Site { tls: Some(&made), ..Site::default() }) else { return };
        let options = with_http(HttpOptions { ca_cert: Some(cert), ..HttpOptions::default() });
        let found = store(&nginx.url(), &options).fetch(id).await;
        match wanted {
            Ok(found_there) => assert_eq!(found, Ok(found_there)),
            Err(what) => drop(reason(found, what)),
        }
    }
}

#[tokio::test]
async fn connections_are_kept() {
    let scratch = Scratch::new();
    let Some(nginx) = nginx(&scratch, "nginx", Site::default()) else { return };
    let store = store(&nginx.url(), &StoreOptions::default());
    let (id, stored) = chunk(Form::Compressed, b"x");
    let (missing, _) = chunk(Form::Compressed, b"missing");
    store.put(id, stored.clone()).await.unwrap();
    for _ in 0..50 {
        assert_eq!(store.fetch(id).await, Ok(Some(stored.clone())));
        assert_eq!(store.fetch(missing).await, Ok(None));
        assert_eq!(store.has(missing).await, Ok(false));
    }
    // Several, because whoever asks again before an answer's connection is back in the pool makes another.
    let requests = nginx.requests(151);
    let connections: std::collections::BTreeSet<u64> = requests.iter().map(|request| request.connection).collect();
    assert!(connections.len() <= 5, "{} connections for {} requests", connections.len(), requests.len());
}

#[tokio::test]
async fn credentials_go_to_the_store_and_nowhere_else() {
    let scratch = Scratch::new();
    let Some(other) = nginx(&scratch, "other", Site::default()) else { return };
    let (id, stored) = chunk(Form::Compressed, b"x");
    store(&other.url(), &StoreOptions::default()).put(id, stored.clone()).await.unwrap();
    let n_before = other.requests(1).len();

    // base64 of "user:pass word".
    let login = "Basic dXNlcjpwYXNzIHdvcmQ=";
    let server = format!(
        r#"if ($http_authorization != "{login}") {{ return 401; }}
           location /away/ {{ rewrite ^/away/(.*)$ {}$1 redirect; }}
           location /here/ {{ rewrite ^/here/(.*)$ /$1 permanent; }}"#,
        other.url()
    );
    let Some(nginx) = nginx(&scratch, "nginx", Site { server: &server, ..Site::default() }) else { return };
    let url = nginx.url().replace("http://", "http://user:pass%20word@");
    let cookie = HttpOptions { cookie: Some(Secret::new("session=1")), ..HttpOptions::default() };
    let mine = |path: &str| store(&format!("{url}{path}"), &with_http(cookie.clone()));
    store_contract(&mine("?sig=a%2Fb")).await;
    for request in nginx.requests(1) {
        assert_eq!(request.credentials, format!("{login} session=1"));
        assert!(request.uri.ends_with("?sig=a%2Fb"), "{request:?}");
    }
    assert_eq!(mine("here/").fetch(id).await, Ok(Some(stored.clone())));
    assert_eq!(mine("away/").fetch(id).await, Ok(Some(stored)));
    let requests = other.requests(n_before + 1);
    assert_eq!(requests.last().unwrap().credentials, "- -");

    let name = Store::name(&mine("?sig=a")).to_owned();
    let wrong = store(&nginx.url().replace("http://", "http://user:hidden@"), &with_http(HttpOptions::default()));
    let error = reason(wrong.fetch(id).await, "401 Authorization Required");
    assert!(
        !error.to_string().contains("hidden") && !name.contains("pass") && !name.contains("sig=a"),
        "{error} {name}"
    );
    let right = HttpOptions { authorization: Some(Secret::new(login)), ..HttpOptions::default() };
    let right = open(&Location::parse(&nginx.url()).unwrap(), &with_http(right)).unwrap();
    assert_eq!(right.has(id).await, Ok(true));
}

#[tokio::test]
async fn statuses_are_told_apart() {
    let scratch = Scratch::new();
    let server = r#"location /gone/ { return 410; }
        location /forbidden/ { return 403; }
        location /broken/ { default_type text/plain; return 500 "the disk is full\nmore"; }
        location /teapot/ { return 418; }
        location /read-only/ { dav_methods off; }
        location /see-other/ { return 303 /; }"#;
    let Some(nginx) = nginx(&scratch, "nginx", Site { server, ..Site::default() }) else { return };
    let (id, stored) = chunk(Form::Compressed, b"x");
    let at = |path: &str| store(&format!("{}{path}", nginx.url()), &with_http(HttpOptions::default()));
    for path in ["gone", "nowhere"] {
        assert_eq!(at(path).fetch(id).await, Ok(None));
        assert_eq!(at(path).has(id).await, Ok(false));
    }
    for (path, what, is_transient) in [
        ("forbidden", "403 Forbidden", false),
        ("broken", "500 Internal Server Error: the disk is full", true),
        ("teapot", "418 I'm a teapot", false),
        ("see-other", "303 See Other", false),
    ] {
        let error = reason(at(path).fetch(id).await, what);
        assert_eq!(error.is_transient, is_transient, "{error}");
        assert_eq!(error.object, format!("{}{path}/{}", nginx.url(), Layout::default().object_name(id)));
        assert!(!error.to_string().contains('\n'), "{error}");
        reason(at(path).put(id, stored.clone()).await, &what[..3]);
        reason(at(path).has(id).await, &what[..3]);
    }
    reason(at("read-only").put(id, stored).await, "405");
    reason(store("http://127.0.0.1:1/", &with_http(HttpOptions::default())).fetch(id).await, "Connection refused");
    // A name that the standard keeps from being anybody's.
    reason(store("http://no-such-host.invalid/", &with_http(HttpOptions::default())).fetch(id).await, "cannot connect");
}

#[tokio::test]
async fn what_passes_is_asked_again() {
    let (id, stored) = chunk(Form::Compressed, b"x");
    let content = stored.bytes.clone();
    let mut ills: Vec<Answer> =
        ["503 Service Unavailable", "429 Too Many Requests", "408 Request Timeout", "502 Bad Gateway"]
            .iter()
            .map(|status| answer(status, "Retry-After: 0\r\n", b""))
            .collect();
    let past = "Retry-After: Sun, 06 Nov 1994 08:49:37 GMT\r\n";
    ills.push(answer("503 Service Unavailable", past, b""));
    // Cut off in the body, in the head, and before it.
    ills.push(Answer::Then(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf".to_vec()));
    ills.push(Answer::Then(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhal".to_vec()));
    ills.push(Answer::Then(b"HTTP/1.1 200".to_vec()));
    ills.push(Answer::Then(Vec::new()));
    let n_ills = ills.len();
    let server = Scripted::start(move |n_before, _| match ills.get(n_before % (n_ills + 1)) {
        Some(ill) => ill.clone(),
        None => answer("200 OK", "", &content),
    });
    let patient = store(&server.url(), &retrying(n_ills as u32));
    assert_eq!(patient.fetch(id).await, Ok(Some(stored.clone())));
    assert_eq!(server.requests().len(), n_ills + 1);
    assert_eq!(patient.put(id, stored.clone()).await, Ok(Put::Written));
    let requests = server.requests();
    // A 200 is enough for a PUT, whatever comes behind it.
    assert_eq!(requests.len(), n_ills + 1 + 6);
    assert!(requests[n_ills + 1..].iter().all(|request| request.body == stored.bytes), "the whole chunk each time");
    // No compression is asked for.
    assert!(requests.iter().all(|request| request.header("accept-encoding").is_none()));
    let impatient = store(&server.url(), &retrying(1));
    assert!(impatient.fetch(id).await.is_err_and(|error| error.is_transient));
    assert_eq!(server.requests().len(), n_ills + 1 + 6 + 2);
}

#[tokio::test]
async fn the_server_says_how_long_to_wait() {
    let (id, stored) = chunk(Form::Compressed, b"x");
    let content = stored.bytes.clone();
    let server = Scripted::start(move |n_before, _| match n_before {
        0 => answer("429 Too Many Requests", "Retry-After: 1\r\n", b""),
        _ => answer("200 OK", "", &content),
    });
    let start = std::time::Instant::now();
    assert_eq!(store(&server.url(), &retrying(1)).fetch(id).await, Ok(Some(stored)));
    // A lower bound holds on a machine of any speed.
    assert!(start.elapsed() >= Duration::from_secs(1));
}

#[tokio::test]
async fn no_answer_takes_longer_or_more_than_it_may() {
    let (id, _) = chunk(Form::Compressed, b"x");
    let server = Scripted::start(|_, request| match request.line.split('/').nth(1) {
        Some("silent") => Answer::Hang(Vec::new()),
        Some("stalls") => Answer::Hang(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf".to_vec()),
        Some("announced") => Answer::Hang(b"HTTP/1.1 200 OK\r\nContent-Length: 134217769\r\n\r\nx".to_vec()),
        Some("empty") => answer("200 OK", "", b""),
        _ => {
            // One piece of 1 MiB after the other, more of them than any chunk has, and then silence.
            let mut bytes = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
            for _ in 0..129 {
                bytes.extend_from_slice(b"100000\r\n");
                bytes.resize(bytes.len() + (1 << 20), b'x');
                bytes.extend_from_slice(b"\r\n");
            }
            Answer::Hang(bytes)
        }
    });
    let options = |timeout| StoreOptions { request_timeout: timeout, ..with_http(HttpOptions::default()) };
    let at = |path: &str, timeout| store(&format!("{}{path}", server.url()), &options(timeout));
    let soon = Duration::from_millis(200);
    assert!(reason(at("silent", soon).fetch(id).await, "within 200 ms").is_transient);
    assert!(reason(at("silent", soon).has(id).await, "within 200 ms").is_transient);
    assert!(at("stalls", soon).fetch(id).await.is_err_and(|error| error.is_transient));
    // These end because of their size: a timeout would be another error.
    let late = Duration::from_secs(600);
    assert!(!reason(at("announced", late).fetch(id).await, "134217769 bytes, more than any chunk").is_transient);
    assert!(!reason(at("endless", late).fetch(id).await, "more than any chunk").is_transient);
    assert!(!reason(at("empty", late).fetch(id).await, "empty").is_transient);
}

#[tokio::test]
async fn files_are_read_whole_by_ranges_and_by_version() {
    let scratch = Scratch::new();
    let weak = "location /dated/ { etag off; } location /bare/ { etag off; add_header Last-Modified ''; }
        location /whole/ { max_ranges 0; }";
    let Some(nginx) = nginx(&scratch, "nginx", Site { server: weak, ..Site::default() }) else { return };
    let content: Vec<u8> = (0..100_000u32).flat_map(u32::to_be_bytes).collect();
    let at =
        |path: &str| open_files(&Location::parse(&format!("{}{path}", nginx.url())).unwrap(), &retrying(0)).unwrap();
    for (path, has_version, has_ranges) in
        [("", true, true), ("dated", true, true), ("bare", false, true), ("whole", true, false)]
    {
        let files = at(path);
        let name = "ä #1%.catar";
        assert_eq!(files.stat(name).await, Ok(None), "{path}");
        assert_eq!(files.read_whole(name, None, 1 << 20).await, Ok(ReadWhole::Missing));
        assert!(reason(files.read_range(name, 0..1, None).await, "404 Not Found").object.ends_with(".catar"));

        files.write(name, content.clone().into()).await.unwrap();
        let info = files.stat(name).await.unwrap().unwrap();
        assert_eq!((info.size, info.has_ranges), (content.len() as u64, has_ranges), "{path}");
        assert_eq!(info.version.is_some(), has_version, "{path}: {info:?}");
        let ReadWhole::Content(whole) = files.read_whole(name, None, content.len() as u64).await.unwrap() else {
            panic!("there is something")
        };
        assert!(whole.bytes == content && whole.info.version == info.version && whole.info.size == info.size);
        reason(
            files.read_whole(name, None, content.len() as u64 - 1).await,
            "400000 bytes, more than this file may have",
        );
        let version = info.version.as_ref();
        if !has_ranges {
            reason(files.read_range(name, 5..10, version).await, "cannot send a part");
            reason(files.read_range(name, 5..10, None).await, "cannot send a part");
            continue;
        }
        let last = content.len() - 1;
        for range in [0..1, 5..70_000, last..last + 1, 0..0] {
            let wanted = Bytes::copy_from_slice(&content[range.clone()]);
            let range = range.start as u64..range.end as u64;
            assert_eq!(files.read_range(name, range.clone(), version).await, Ok(wanted.clone()), "{path}");
            assert_eq!(files.read_range(name, range, None).await, Ok(wanted));
        }
        let beyond = content.len() as u64..content.len() as u64 + 5;
        assert!(!reason(files.read_range(name, beyond.clone(), None).await, "416").is_transient);
        let Some(version) = version else { continue };
        assert_eq!(files.read_whole(name, Some(version), 1 << 20).await, Ok(ReadWhole::Unchanged));
        reason(files.read_range(name, beyond, Some(version)).await, "changed");

        // Another content of the same size, later: every reader of the old one is told.
        let mut other = content.clone();
        other[7] ^= 1;
        files.write(name, other.clone().into()).await.unwrap();
        touch(&nginx.root().join(path).join(name));
        let error = reason(files.read_range(name, 5..10, Some(version)).await, "changed while in use");
        assert!(!error.is_transient);
        let ReadWhole::Content(whole) = files.read_whole(name, Some(version), 1 << 20).await.unwrap() else {
            panic!("{path}: it was changed")
        };
        assert!(whole.bytes == other && whole.info.version.as_ref() != Some(version));
    }
    // Ranges were asked for as such, and an unchanged file did not travel.
    let requests = nginx.requests(1);
    assert!(requests.iter().any(|request| request.status == 206 && request.body_bytes == 69_995));
    assert!(requests.iter().any(|request| request.status == 304 && request.body_bytes == 0));

    let files = at("");
    // Made here, because nginx takes no empty file.
    std::fs::write(nginx.root().join("empty"), "").unwrap();
    assert_eq!(files.stat("empty").await.unwrap().unwrap().size, 0);
    for name in ["", "..", "a/../b"] {
        reason(files.stat(name).await, "not the name");
    }
}

/// Sets a file's time to one that no write of this test has.
fn touch(path: &Path) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000)).unwrap();
}

#[tokio::test]
async fn desync_and_we_read_what_the_other_put_on_a_web_server() {
    let Some(desync) = peer("desync") else { return };
    let scratch = Scratch::new();
    let Some(nginx) = nginx(&scratch, "nginx", Site::default()) else { return };
    let (url, blob) = (nginx.url(), noise(1 << 20));
    let input = scratch.file("blob", &blob);
    let index = scratch.join("blob.caibx");
    // desync sends its requests below the URL it is given, and nginx makes the directories.
    let theirs = format!("{url}theirs/");
    run(desync.command().args(["make", "-s", &theirs]).arg(&index).arg(&input)).ok();
    let (from, to) = (store(&theirs, &retrying(0)), store(&format!("{url}ours/"), &retrying(0)));
    let parsed = Index::open(std::fs::read(&index).unwrap()).unwrap();
    let mut read = Vec::new();
    for item in parsed.items() {
        let item = item.unwrap();
        let id = item.id;
        let stored = from.fetch(id).await.unwrap().unwrap();
        read.extend(codec::decode(stored.form, &stored.bytes, item.size_bytes()).unwrap());
        to.put(id, stored).await.unwrap();
    }
    assert!(read == blob);
    let ours = format!("{url}ours/");
    let catted = run(desync.command().args(["cat", "-s", &ours]).arg(&index)).ok();
    assert!(catted.stdout == blob);
}

#[tokio::test]
async fn servers_that_lie_about_ranges_are_found_out() {
    let server = Scripted::start(|_, request| {
        let strong = "ETag: \"1\"\r\n";
        match request.line.rsplit('/').next().unwrap() {
            "moved" => answer("206 Partial Content", &format!("{strong}Content-Range: bytes 1-3/100\r\n"), b"abc"),
            "silent" => answer("206 Partial Content", strong, b"abc"),
            "short" => answer("206 Partial Content", &format!("{strong}Content-Range: bytes 0-2/100\r\n"), b"ab"),
            "long" => answer("206 Partial Content", &format!("{strong}Content-Range: bytes 0-2/100\r\n"), b"abcd"),
            "weak" => answer("206 Partial Content", "ETag: W/\"1\"\r\nContent-Range: bytes 0-2/100\r\n", b"abc"),
            "no-head" if request.line.starts_with("HEAD") => answer("403 Forbidden", "", b""),
            "no-head" => answer("206 Partial Content", &format!("{strong}Content-Range: bytes 0-0/100\r\n"), b"a"),
            _ => answer("206 Partial Content", "Content-Range: bytes 0-2/100\r\n", b"abc"),
        }
    });
    let files = store(&server.url(), &retrying(0));
    let version = caifs::store::FileVersion("\"1\"".to_owned());
    let read = |name: &'static str, version| files.read_range(name, 0..3, version);
    reason(read("moved", None).await, "asked for bytes 0-2, the server sent 1-3");
    reason(read("moved", Some(&version)).await, "changed");
    reason(read("silent", None).await, "does not tell which range");
    assert!(reason(read("short", None).await, "cut off: 2 bytes of 3").is_transient);
    reason(read("long", None).await, "more than was asked for");
    reason(read("weak", Some(&version)).await, "changed");
    // An answer to If-Range need not repeat the ETag.
    assert_eq!(read("plain", Some(&version)).await, Ok(Bytes::from_static(b"abc")));
    assert_eq!(server.requests().last().unwrap().header("if-range"), Some("\"1\""));
    let dated = caifs::store::FileVersion("Sun, 06 Nov 1994 08:49:37 GMT 100".to_owned());
    reason(read("plain", Some(&dated)).await, "changed");
    assert_eq!(server.requests().last().unwrap().header("if-range"), None);
    let info = files.stat("no-head").await.unwrap().unwrap();
    assert_eq!((info.size, info.version, info.has_ranges), (100, Some(version), true));
}
