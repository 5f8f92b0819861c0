//! S3 (rclone's server) and Google Cloud Storage (an emulator): the contract, credentials, errors, files, and desync on the same buckets.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use caifs::chunk::cipher::{Algorithm, Cipher, Key};
use caifs::chunk::codec::Form;
use caifs::store::files::{FileStore, FileVersion, ReadWhole};
use caifs::store::layout::Layout;
use caifs::store::location::Location;
use caifs::store::object::BucketStore;
use caifs::store::object::upgrade::{Upgraded, upgrade};
use caifs::store::open::{open, open_files, open_writable};
use caifs::store::options::{GcsOptions, HttpOptions, S3Options};
use caifs::store::retry::RetryPolicy;
use caifs::store::{Secret, Store, StoreError, StoreOptions, WriteStore};

use super::{chunk, store_contract};
use crate::support::blob::noise;
use crate::support::peers::peer;
use crate::support::run::{caifs, run};
use crate::support::scratch::Scratch;
use crate::support::server::{Server, free_port};
use crate::support::servers::{gcs, rclone};

const BUCKET: &str = "bkt";

/// Metadata that is nowhere: so that no test depends on whether this machine has any.
fn no_metadata() -> (String, String) {
    ("aws_metadata_endpoint".to_owned(), format!("http://127.0.0.1:{}", free_port()))
}

fn with_keys(access_key: &str, secret_key: &str) -> StoreOptions {
    let s3 = S3Options {
        access_key: Some(access_key.to_owned()),
        secret_key: Some(Secret::new(secret_key)),
        ..S3Options::default()
    };
    StoreOptions { s3, retry: RetryPolicy::NEVER, ..StoreOptions::default() }
}

/// rclone says 500 to one of two who write an object at the same moment, as the contract does, and the emulator of Google closes
/// connections after errors: both pass, and are asked again.
const PATIENT: RetryPolicy =
    RetryPolicy { n_retries: 8, base: Duration::from_millis(20), max: Duration::from_millis(200) };

fn signed_options() -> StoreOptions {
    with_keys(rclone::ACCESS_KEY, rclone::SECRET_KEY)
}

fn s3_text(server: &Server, path: &str) -> String {
    format!("s3+http://{}/{path}", server.address())
}

fn s3(server: &Server, path: &str, options: &StoreOptions) -> BucketStore {
    let Location::S3(location) = Location::parse(&s3_text(server, path)).unwrap() else { panic!("it is S3") };
    BucketStore::s3(&location, options).unwrap()
}

fn emulated(server: &Server) -> StoreOptions {
    let gcs = GcsOptions { endpoint: Some(format!("http://{}", server.address())), ..GcsOptions::default() };
    StoreOptions { gcs, retry: PATIENT, ..StoreOptions::default() }
}

fn layouts() -> Vec<Layout> {
    let key: Key = "d69371915dbc4b1f0ec55e2a80f0e089accf4b32e0f8dc0e29fed7f0f30d1b26".parse().unwrap();
    let cipher = |algorithm| Some(Arc::new(Cipher::new(algorithm, &key)));
    vec![
        Layout::default(),
        Layout { form: Form::Plain, cipher: None },
        Layout { form: Form::Compressed, cipher: cipher(Algorithm::XChaCha20Poly1305) },
        Layout { form: Form::Plain, cipher: cipher(Algorithm::Aes256Gcm) },
    ]
}

/// A bucket's directory and a server that wants signatures.
fn signed_bucket() -> Option<(Scratch, Server)> {
    let scratch = Scratch::new();
    scratch.dir(BUCKET);
    let server = rclone::signed(&scratch)?;
    Some((scratch, server))
}

#[tokio::test]
async fn an_s3_store_keeps_the_contract() {
    let Some((scratch, server)) = signed_bucket() else { return };
    for (number, layout) in layouts().into_iter().enumerate() {
        let options = StoreOptions { layout: layout.clone(), retry: PATIENT, ..signed_options() };
        // The last one has the bucket to itself, without a prefix.
        let (path, dir) = match number {
            3 => (BUCKET.to_owned(), scratch.join(BUCKET)),
            n => (format!("{BUCKET}/a/store {n}?lookup=path"), scratch.join(format!("{BUCKET}/a/store {n}"))),
        };
        let store = open_writable(&Location::parse(&s3_text(&server, &path)).unwrap(), &options).unwrap();
        store_contract(store.as_ref()).await;
        let (id, _) = chunk(Form::Plain, b"x");
        assert!(dir.join(layout.object_name(id)).is_file(), "{}", store.name());
        // Another layout's chunks are not there.
        let other = StoreOptions { layout: layouts()[(number + 1) % 4].clone(), ..signed_options() };
        let reader = open(&Location::parse(&s3_text(&server, &path)).unwrap(), &other).unwrap();
        assert_eq!(reader.fetch(id).await, Ok(None));
    }
}

#[tokio::test]
async fn a_store_of_google_keeps_the_contract() {
    let Some(server) = gcs::start(BUCKET) else { return };
    for (number, layout) in layouts().into_iter().enumerate() {
        let options = StoreOptions { layout, ..emulated(&server) };
        let text = if number == 3 { format!("gs://{BUCKET}") } else { format!("gs://{BUCKET}/a/store {number}") };
        let location = Location::parse(&text.replace(' ', "%20")).unwrap();
        let store = open_writable(&location, &options).unwrap();
        assert_eq!(store.name(), text);
        store_contract(store.as_ref()).await;
    }
}

/// The error for a chunk that a store is asked for.
async fn refusal(store: &BucketStore) -> StoreError {
    let (id, _) = chunk(Form::Compressed, b"x");
    let error = Store::fetch(store, id).await.unwrap_err();
    assert_eq!(error.store, Store::name(store));
    assert_eq!(error.object, format!("{}/{}", error.store, Layout::default().object_name(id)));
    let text = error.to_string();
    assert!(!text.contains('\n') && !text.contains("<") && !text.contains(rclone::SECRET_KEY), "{text}");
    error
}

#[tokio::test]
async fn a_refusal_says_who_what_and_why() {
    let Some((_scratch, server)) = signed_bucket() else { return };
    let wrong = refusal(&s3(&server, BUCKET, &with_keys(rclone::ACCESS_KEY, "wrong secret"))).await;
    assert!(wrong.reason.starts_with("403 Forbidden: SignatureDoesNotMatch: "), "{wrong}");
    assert!(!wrong.is_transient);
    let unknown = refusal(&s3(&server, BUCKET, &with_keys("nobody", "x"))).await;
    assert!(unknown.reason.contains("InvalidAccessKeyId") && !unknown.is_transient, "{unknown}");
    let elsewhere = refusal(&s3(&server, "nosuch/prefix", &signed_options())).await;
    assert!(elsewhere.reason.starts_with("404 Not Found: NoSuchBucket"), "{elsewhere}");
    assert!(!elsewhere.is_transient);
    let (id, stored) = chunk(Form::Compressed, b"x");
    let error = WriteStore::put(&s3(&server, "nosuch", &signed_options()), id, stored).await.unwrap_err();
    assert!(error.reason.contains("NoSuchBucket"), "{error}");

    // Nobody answers: that can pass.
    let port = server.port;
    drop(server);
    let Location::S3(location) = Location::parse(&format!("s3+http://127.0.0.1:{port}/{BUCKET}")).unwrap() else {
        panic!("it is S3")
    };
    let dead = refusal(&BucketStore::s3(&location, &signed_options()).unwrap()).await;
    assert_eq!((dead.reason.as_str(), dead.is_transient), ("Connection refused", true));
}

#[tokio::test]
async fn credentials_come_from_a_profile() {
    let Some((scratch, server)) = signed_bucket() else { return };
    let (key, secret) = (rclone::ACCESS_KEY, rclone::SECRET_KEY);
    let file = scratch.file(
        "credentials",
        format!(
            "[default]\naws_access_key_id = x\naws_secret_access_key = y\n\n\
             [good]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
        ),
    );
    let options = |profile: &str, file: &Path| {
        let s3 = S3Options {
            credentials_file: Some(file.to_owned()),
            profile: Some(profile.to_owned()),
            ..S3Options::default()
        };
        StoreOptions { s3, retry: RetryPolicy::NEVER, ..StoreOptions::default() }
    };
    let patient = StoreOptions { retry: PATIENT, ..options("good", &file) };
    store_contract(&s3(&server, BUCKET, &patient)).await;
    let other = refusal(&s3(&server, BUCKET, &options("default", &file))).await;
    assert!(other.reason.contains("InvalidAccessKeyId"), "{other}");
    let none = refusal(&s3(&server, BUCKET, &options("none", &file))).await;
    assert_eq!(none.reason, format!("{}: no profile 'none'", file.display()));
    let gone = refusal(&s3(&server, BUCKET, &options("good", Path::new("/no/such/file")))).await;
    assert!(gone.reason.starts_with("/no/such/file: No such file"), "{gone}");
    // Keys that are given win over the file.
    let both =
        StoreOptions { s3: S3Options { credentials_file: Some(file), ..signed_options().s3 }, ..signed_options() };
    let (id, _) = chunk(Form::Compressed, b"x");
    assert_eq!(Store::has(&s3(&server, BUCKET, &both), id).await, Ok(true));
}

#[tokio::test]
async fn a_public_bucket_needs_no_settings() {
    let scratch = Scratch::new();
    scratch.dir(BUCKET);
    let Some(server) = rclone::public(&scratch) else { return };
    let anonymous = S3Options { anonymous: true, ..S3Options::default() };
    let nothing = S3Options { more: vec![no_metadata()], ..S3Options::default() };
    for (path, s3_options) in [("anonymous", anonymous), ("nothing", nothing)] {
        let options = StoreOptions { s3: s3_options, retry: PATIENT, ..StoreOptions::default() };
        store_contract(&s3(&server, &format!("{BUCKET}/{path}"), &options)).await;
    }
    drop(server);

    let Some(server) = rclone::signed(&scratch) else { return };
    let nothing = S3Options { more: vec![no_metadata()], ..S3Options::default() };
    let options = StoreOptions { s3: nothing, retry: RetryPolicy::NEVER, ..StoreOptions::default() };
    let (id, _) = chunk(Form::Compressed, b"x");
    let error = Store::fetch(&s3(&server, BUCKET, &options), id).await.unwrap_err();
    // rclone's words for a request without a signature are its own.
    assert!(error.reason.starts_with('4') && !error.is_transient, "{error}");
}

/// The contract of a place of whole files that is empty.
async fn files_contract(files: &dyn FileStore) {
    let content = Bytes::from(noise(100_000));
    let name = "dir/an index.caibx";
    assert_eq!(files.stat(name).await, Ok(None));
    assert_eq!(files.read_whole(name, None, u64::MAX).await, Ok(ReadWhole::Missing));
    let missing = files.read_range(name, 0..1, None).await.unwrap_err();
    assert!(missing.reason.starts_with("404") && !missing.is_transient, "{missing}");

    files.write(name, content.clone()).await.unwrap();
    let info = files.stat(name).await.unwrap().unwrap();
    assert_eq!((info.size, info.has_ranges), (100_000, true));
    assert!(info.version.is_some() && info.mtime.is_some());
    let ReadWhole::Content(whole) = files.read_whole(name, None, 100_000).await.unwrap() else { panic!("it is there") };
    assert_eq!((&whole.bytes, &whole.info), (&content, &info));
    let too_long = files.read_whole(name, None, 99_999).await.unwrap_err();
    assert!(too_long.reason.contains("100000 bytes") && !too_long.is_transient, "{too_long}");

    let version = info.version.as_ref();
    assert_eq!(files.read_whole(name, version, 100_000).await, Ok(ReadWhole::Unchanged));
    for range in [0..1, 0..100_000, 99_999..100_000, 1234..56_789] {
        let wanted = content.slice(range.start as usize..range.end as usize);
        assert_eq!(files.read_range(name, range.clone(), version).await, Ok(wanted.clone()));
        assert_eq!(files.read_range(name, range, None).await, Ok(wanted));
    }
    assert_eq!(files.read_range(name, 5..5, version).await, Ok(Bytes::new()));
    for past in [99_999..100_001, 100_000..100_001] {
        assert!(files.read_range(name, past, None).await.is_err());
    }

    // The same name with other content is another version.
    files.write(name, content.slice(1..)).await.unwrap();
    let changed = files.read_range(name, 0..10, version).await.unwrap_err();
    assert!(changed.reason.contains("changed while in use") && !changed.is_transient, "{changed}");
    assert_eq!(changed.object, format!("{}/{name}", files.name()));
    let ReadWhole::Content(whole) = files.read_whole(name, version, u64::MAX).await.unwrap() else { panic!("changed") };
    assert_eq!(whole.bytes, content.slice(1..));
    let other = FileVersion("something else".to_owned());
    assert!(files.read_range(name, 0..10, Some(&other)).await.is_err());

    files.write("empty", Bytes::new()).await.unwrap();
    assert_eq!(files.stat("empty").await.unwrap().unwrap().size, 0);
    let ReadWhole::Content(empty) = files.read_whole("empty", None, 0).await.unwrap() else { panic!("it is there") };
    assert!(empty.bytes.is_empty());
    for name in ["", "..", "a/../b", "a//b", "a\nb", "/a", "a/"] {
        let error = files.write(name, content.clone()).await.unwrap_err();
        assert!(error.reason.contains("no name"), "{name:?}: {error}");
    }
}

#[tokio::test]
async fn files_lie_beside_the_chunks() {
    if let Some((scratch, server)) = signed_bucket() {
        let location = Location::parse(&s3_text(&server, "bkt/indexes?lookup=path")).unwrap();
        let options = StoreOptions { retry: PATIENT, ..signed_options() };
        let files = open_files(&location, &options).unwrap();
        files_contract(files.as_ref()).await;
        assert!(scratch.join("bkt/indexes/dir/an index.caibx").is_file());
    }
    if let Some(server) = gcs::start(BUCKET) {
        let location = Location::parse("gs://bkt/indexes").unwrap();
        files_contract(open_files(&location, &emulated(&server)).unwrap().as_ref()).await;
    }
}

/// A server of one answer to everything, and how often it was asked.
fn canned(answer: &'static [u8]) -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let n_requests = Arc::new(AtomicUsize::new(0));
    let n = Arc::clone(&n_requests);
    // It ends with the test's process; nobody waits for it.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            n.fetch_add(1, Ordering::SeqCst);
            let mut request = Vec::new();
            let mut buffer = [0; 4096];
            while !request.windows(4).any(|end| end == b"\r\n\r\n") {
                match stream.read(&mut buffer) {
                    Ok(0) | Err(_) => break,
                    Ok(n) => request.extend_from_slice(&buffer[..n]),
                }
            }
            // The client may have gone away: that is its business.
            let _ = stream.write_all(answer);
        }
    });
    (port, n_requests)
}

fn canned_store(port: u16, retry: RetryPolicy) -> BucketStore {
    let Location::S3(location) = Location::parse(&format!("s3+http://127.0.0.1:{port}/{BUCKET}")).unwrap() else {
        panic!("it is S3")
    };
    BucketStore::s3(&location, &StoreOptions { retry, ..signed_options() }).unwrap()
}

#[tokio::test]
async fn what_can_pass_is_asked_again_and_nothing_else() {
    let policy = RetryPolicy { n_retries: 2, base: Duration::from_millis(1), max: Duration::from_millis(1) };
    for (answer, n_expected, is_transient, words) in [
        (
            &b"HTTP/1.1 503 x\r\nConnection: close\r\nContent-Length: 43\r\n\r\n<Error><Code>SlowDown</Code></Error>\r\n\r\n\r\n\r"[..],
            3,
            true,
            "503 Service Unavailable: SlowDown",
        ),
        (b"HTTP/1.1 429 x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", 3, true, "429 Too Many Requests"),
        // The body breaks off.
        (b"HTTP/1.1 200 x\r\nConnection: close\r\nETag: \"x\"\r\nContent-Length: 9\r\n\r\nshort", 3, true, ""),
        // Larger than any chunk: not read.
        (
            b"HTTP/1.1 200 x\r\nConnection: close\r\nContent-Length: 134217769\r\n\r\n",
            1,
            false,
            "the object has 134217769 bytes",
        ),
        (b"HTTP/1.1 200 x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", 1, false, "the object is empty"),
        (b"HTTP/1.1 403 x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", 1, false, "403 Forbidden"),
        (
            b"HTTP/1.1 301 x\r\nConnection: close\r\nx-amz-bucket-region: eu-west-9\r\nContent-Length: 0\r\n\r\n",
            1,
            false,
            "301 Moved Permanently (the bucket's region is eu-west-9)",
        ),
    ] {
        let (port, n_requests) = canned(answer);
        let error = refusal(&canned_store(port, policy)).await;
        assert!(error.reason.starts_with(words), "{error}");
        assert_eq!(error.is_transient, is_transient, "{error}");
        assert_eq!(n_requests.load(Ordering::SeqCst), n_expected, "{error}");
    }
}

#[tokio::test]
async fn a_server_that_never_answers_is_given_up() {
    // The system takes the connection, and nobody ever reads from it.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let Location::S3(location) = Location::parse(&format!("s3+http://127.0.0.1:{port}/{BUCKET}")).unwrap() else {
        panic!("it is S3")
    };
    let options = StoreOptions { request_timeout: Duration::from_millis(300), ..signed_options() };
    let error = refusal(&BucketStore::s3(&location, &options).unwrap()).await;
    assert!(error.is_transient, "{error}");
}

/// An S3 server behind TLS is only trusted with its certificate.
#[tokio::test]
async fn a_server_behind_tls_must_be_trusted() {
    let Some(peer) = peer("rclone") else { return };
    let scratch = Scratch::new();
    scratch.dir(BUCKET);
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let cert = scratch.file("cert.pem", made.cert.pem());
    let key = scratch.file("key.pem", made.signing_key.serialize_pem());
    let port = free_port();
    let mut command = peer.command();
    command.args(["serve", "s3", "--config", "", "--log-level", "CRITICAL", "--addr", &format!("127.0.0.1:{port}")]);
    command.arg("--cert").arg(&cert).arg("--key").arg(&key).arg(&*scratch);
    let _server = Server::start(&mut command, port);
    let Location::S3(location) = Location::parse(&format!("s3+https://localhost:{port}/{BUCKET}")).unwrap() else {
        panic!("it is S3")
    };
    let with = |http: HttpOptions| {
        let s3 = S3Options { anonymous: true, ..S3Options::default() };
        let options = StoreOptions { http, s3, retry: RetryPolicy::NEVER, ..StoreOptions::default() };
        BucketStore::s3(&location, &options).unwrap()
    };
    let untrusted = refusal(&with(HttpOptions::default())).await;
    assert!(untrusted.reason.contains("certificate") && !untrusted.is_transient, "{untrusted}");
    let (id, _) = chunk(Form::Compressed, b"x");
    for http in [
        HttpOptions { ca_cert: Some(cert.clone()), ..HttpOptions::default() },
        HttpOptions { trust_insecure: true, ..HttpOptions::default() },
    ] {
        assert_eq!(Store::fetch(&with(http), id).await, Ok(None));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn desync_and_we_read_each_other_in_s3() {
    let (Some(desync), Some((scratch, server))) = (peer("desync"), signed_bucket()) else { return };
    let blob = scratch.file("blob", noise(300_000));
    let (theirs, back) = (scratch.join("theirs.caibx"), scratch.join("back"));
    let desync = |args: &[&str]| {
        let mut command = desync.command();
        command.envs([("S3_ACCESS_KEY", rclone::ACCESS_KEY), ("S3_SECRET_KEY", rclone::SECRET_KEY)]);
        command.env("S3_REGION", "us-east-1").env("HOME", &*scratch);
        run(command.args(args)).ok()
    };
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let location = s3_text(&server, "bkt/theirs?lookup=path");
    desync(&["make", "-s", &location, &text(&theirs), &text(&blob)]);
    let ids = run(caifs().arg("list-chunks").arg(&theirs)).ok().text();
    let read = s3(&server, "bkt/theirs?lookup=path", &signed_options());
    let write = s3(&server, "bkt/ours?lookup=path", &signed_options());
    let mut n = 0;
    for id in ids.lines().map(|line| line.parse().unwrap()) {
        let stored = Store::fetch(&read, id).await.unwrap().expect("desync wrote it");
        WriteStore::put(&write, id, stored).await.unwrap();
        n += 1;
    }
    assert!(n > 1);
    desync(&["extract", "-s", &s3_text(&server, "bkt/ours?lookup=path"), &text(&theirs), &text(&back)]);
    assert_eq!(std::fs::read(&back).unwrap(), std::fs::read(&blob).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn desync_and_we_read_each_other_in_google() {
    let (Some(desync), Some(server)) = (peer("desync"), gcs::start(BUCKET)) else { return };
    let scratch = Scratch::new();
    let blob = scratch.file("blob", noise(300_000));
    let (theirs, back) = (scratch.join("theirs.caibx"), scratch.join("back"));
    let desync = |args: &[&str]| {
        let mut command = desync.command();
        command.env("STORAGE_EMULATOR_HOST", server.address().to_string()).env("HOME", &*scratch);
        run(command.args(args)).ok()
    };
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    desync(&["make", "-s", "gs://bkt/theirs", &text(&theirs), &text(&blob)]);
    let ids = run(caifs().arg("list-chunks").arg(&theirs)).ok().text();
    let read = BucketStore::gcs(BUCKET, "theirs", &emulated(&server)).unwrap();
    let write = BucketStore::gcs(BUCKET, "ours", &emulated(&server)).unwrap();
    for id in ids.lines().map(|line| line.parse().unwrap()) {
        let stored = Store::fetch(&read, id).await.unwrap().expect("desync wrote it");
        WriteStore::put(&write, id, stored).await.unwrap();
    }
    desync(&["extract", "-s", "gs://bkt/ours", &text(&theirs), &text(&back)]);
    assert_eq!(std::fs::read(&back).unwrap(), std::fs::read(&blob).unwrap());
}

/// Puts chunks where early desync kept them, beside what is none; gives their names.
fn flat_store(dir: &Path, n: u8) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for number in 0..n {
        let (id, stored) = chunk(Form::Compressed, &[number; 1000]);
        std::fs::write(dir.join(format!("{id}.cacnk")), &stored.bytes).unwrap();
        names.push(id.to_hex());
    }
    std::fs::write(dir.join("index.caibx"), "not a chunk").unwrap();
    std::fs::write(dir.join(format!("{}.cacnk", "A".repeat(64))), "not a chunk either").unwrap();
    names
}

#[tokio::test]
async fn a_flat_store_is_upgraded() {
    let Some((scratch, server)) = signed_bucket() else { return };
    let paths = [BUCKET, "bkt/pre/fix"];
    let flat = paths.map(|path| {
        std::fs::create_dir_all(scratch.join(path)).unwrap();
        flat_store(&scratch.join(path), 25)
    });
    for (path, names) in paths.into_iter().zip(&flat) {
        let dir = scratch.join(path);
        // As after a break: one chunk is in its new place already, whole, and still in its old one.
        let moved = dir.join(&names[0][..4]).join(format!("{}.cacnk", names[0]));
        std::fs::create_dir(moved.parent().unwrap()).unwrap();
        std::fs::copy(dir.join(format!("{}.cacnk", names[0])), &moved).unwrap();

        let store = s3(&server, &format!("{path}?lookup=path"), &signed_options());
        assert_eq!(upgrade(&store).await, Ok(Upgraded { n_moved: 25, n_others: 2 }));
        for number in 0..25u8 {
            let (id, stored) = chunk(Form::Compressed, &[number; 1000]);
            assert_eq!(Store::fetch(&store, id).await, Ok(Some(stored)));
            assert!(!dir.join(format!("{id}.cacnk")).exists());
        }
        assert!(dir.join("index.caibx").is_file());
        assert_eq!(upgrade(&store).await, Ok(Upgraded { n_moved: 0, n_others: 2 }));
    }
    let error = upgrade(&s3(&server, "nosuch", &signed_options())).await.unwrap_err();
    assert!(error.reason.contains("NoSuchBucket"), "{error}");
}

#[test]
fn the_verb_upgrades_a_public_bucket() {
    let scratch = Scratch::new();
    let names = flat_store(&scratch.dir(BUCKET), 3);
    let Some(server) = rclone::public(&scratch) else { return };
    let store = s3_text(&server, BUCKET);
    let done = run(caifs().args(["s3-upgrade", "-v", "-s", &store])).ok();
    assert_eq!(done.text(), "");
    assert!(done.stderr.lines().any(|line| line == "3 chunks moved, 2 other objects left alone"), "{}", done.stderr);
    assert!(scratch.join(format!("{BUCKET}/{}/{}.cacnk", &names[0][..4], names[0])).is_file());
    let again = run(caifs().args(["s3-upgrade", "-n", "1", "-s", &store])).ok();
    assert_eq!((again.text().as_str(), again.stderr.as_str()), ("", ""));
    for wrong in ["/tmp", "gs://bkt", "ftp://x", "s3+http://h/b|/tmp"] {
        let refused = run(caifs().args(["s3-upgrade", "-s", wrong])).fails();
        assert!(refused.error_line().starts_with("caifs: "), "{}", refused.stderr);
    }
}
