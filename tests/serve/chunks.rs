//! The chunk server's answers, row by row (formats.md 6.2), and what stands behind it: forms, stores, cache.

use std::fs;
use std::io::Write;
use std::sync::Arc;

use caifs::chunk::cipher::{Algorithm, Cipher};
use caifs::chunk::codec::Form;
use caifs::digest::Digest;
use caifs::serve::chunk_server::{ChunkServer, ChunkServerConfig, Upstream};
use caifs::serve::http::{Answer, Body, Service};
use caifs::store::fault::{Fault, FaultStore};
use caifs::store::layout::Layout;
use caifs::store::local::LocalStore;
use caifs::store::router::Router;
use caifs::store::{Store, StoreError, Stored, WriteStore};
use futures_util::future::BoxFuture;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::Semaphore;

use super::client::{LIMIT, ask, get, put};
use super::{chunk_server, compressed, file_of, id_of, path_of, start, store_of};
use crate::support::blob::noise;
use crate::support::run::{caifs, run};
use crate::support::scratch::Scratch;

const KEY: &str = "d69371915dbc4b1f0ec55e2a80f0e089accf4b32e0f8dc0e29fed7f0f30d1b26";

#[test]
fn a_server_that_only_reads_answers_as_desyncs() {
    let scratch = Scratch::new();
    let dir = scratch.join("store");
    store_of(&dir, Form::Compressed, &[b"x"]);
    let server = chunk_server(&dir, &[]);
    let at = server.address();
    let (id, other) = (id_of(b"x"), id_of(b"y"));
    let path = path_of(id) + ".cacnk";
    let missing = path_of(other) + ".cacnk";

    let found = get(at, &path);
    assert_eq!((found.status, &found.body), (200, &fs::read(file_of(&dir, id, ".cacnk")).unwrap()));
    assert_eq!(found.header("content-length"), Some(found.body.len().to_string().as_str()));
    assert_eq!(found.header("content-type"), Some("application/zstd"));
    let not_found = get(at, &missing);
    assert_eq!((not_found.status, not_found.text()), (404, format!("chunk {other} not found\n")));
    for (path, status) in [(&path, 200), (&missing, 404)] {
        let reply = ask(at, "HEAD", path, &[], b"");
        assert_eq!((reply.status, reply.body.len()), (status, 0));
        assert!(status != 200 || reply.header("content-length").is_none_or(|length| length != "0"), "{reply:?}");
    }
    assert_eq!(put(at, &path, &compressed(b"x")).status, 400);
    for method in ["DELETE", "POST", "OPTIONS", "MKCOL"] {
        let reply = ask(at, method, &path, &[], b"");
        assert_eq!((reply.status, reply.header("allow")), (405, Some("GET, HEAD, PUT")), "{method}");
    }
    let hex = id.to_hex();
    for wrong in [
        "/".to_owned(),
        path_of(id),
        format!("{path}.x"),
        format!("{}.xz", path_of(id)),
        format!("/0000/{hex}.cacnk"),
        format!("/{hex}.cacnk"),
        format!("/store{path}"),
        format!("/6A1D/{}.cacnk", hex.to_uppercase()),
        format!("/6a1d/{}g.cacnk", &hex[..63]),
        format!("/6a1d/{}.cacnk", &hex[..62]),
        "/6a1d/../../etc/passwd".to_owned(),
        "/healthz/".to_owned(),
    ] {
        for method in ["GET", "HEAD", "PUT", "DELETE"] {
            assert_eq!(ask(at, method, &wrong, &[], b"").status, 400, "{method} {wrong}");
        }
    }
    // A file that cannot be read is no missing chunk; where it lies is nobody's business.
    fs::write(file_of(&dir, id, ".cacnk"), "").unwrap();
    let failed = get(at, &path);
    assert_eq!(failed.status, 500);
    assert!(!failed.text().contains(&*dir.to_string_lossy()), "{}", failed.text());
    assert_eq!(ask(at, "HEAD", &path, &[], b"").status, 404, "an empty file is no chunk to a local store");
}

#[test]
fn uploads_are_verified_and_stored_in_the_stores_form() {
    let scratch = Scratch::new();
    let dir = scratch.dir("store");
    let server = chunk_server(&dir, &["-w"]);
    let at = server.address();
    let path = path_of(id_of(b"x")) + ".cacnk";
    let is_stored = || file_of(&dir, id_of(b"x"), ".cacnk").exists();

    for (what, body) in [
        ("another chunk", compressed(b"y")),
        ("plain bytes", b"x".to_vec()),
        ("rubbish", noise(1000)),
        ("half a chunk", compressed(b"x")[..5].to_vec()),
        ("two chunks", [compressed(b"x"), compressed(b"x")].concat()),
        ("nothing", Vec::new()),
    ] {
        let reply = put(at, &path, &body);
        assert_eq!(reply.status, 400, "{what}: {}", reply.text());
        assert!(reply.text().contains(" is invalid: "), "{what}: {}", reply.text());
        assert!(!is_stored(), "{what}");
    }
    let reply = put(at, &path, &compressed(b"x"));
    assert_eq!((reply.status, reply.body.len()), (200, 0), "{}", reply.text());
    assert!(is_stored());
    assert_eq!(get(at, &path).body, compressed(b"x"));
    assert_eq!(put(at, &path, &compressed(b"x")).status, 200, "again");
    let temporary = fs::read_dir(dir.join("6a1d")).unwrap().count();
    assert_eq!(temporary, 1, "nothing else is left");
}

#[test]
fn verification_of_uploads_can_be_switched_off() {
    let scratch = Scratch::new();
    let dir = scratch.dir("store");
    let server = chunk_server(&dir, &["--writeable", "--skip-verify-write"]);
    let path = path_of(id_of(b"x")) + ".cacnk";
    assert_eq!(put(server.address(), &path, b"").status, 400, "nothing is never a chunk");
    assert_eq!(put(server.address(), &path, b"anything").status, 200);
    assert_eq!(fs::read(file_of(&dir, id_of(b"x"), ".cacnk")).unwrap(), b"anything");
}

#[test]
fn ids_are_of_the_servers_digest() {
    let scratch = Scratch::new();
    let dir = scratch.dir("store");
    let server = chunk_server(&dir, &["-w", "--digest", "sha256"]);
    let path = |id| path_of(id) + ".cacnk";
    assert_eq!(put(server.address(), &path(id_of(b"x")), &compressed(b"x")).status, 400);
    assert_eq!(put(server.address(), &path(Digest::Sha256.id(b"x")), &compressed(b"x")).status, 200);
}

#[test]
fn a_body_longer_than_any_chunk_is_refused_unread() {
    let scratch = Scratch::new();
    let server = chunk_server(&scratch.dir("store"), &["-w"]);
    let path = path_of(id_of(b"x")) + ".cacnk";
    let mut stream = super::client::connect(server.address());
    stream.write_all(super::client::head("PUT", &path, &[], (128 << 20) + 65).as_bytes()).unwrap();
    assert_eq!(super::client::reply_of(stream).status, 413);
    // One that does not tell its length is read up to the limit.
    let mut stream = super::client::connect(server.address());
    let head = super::client::head("PUT", &path, &[("Transfer-Encoding", "chunked")], 0);
    stream.write_all(head.as_bytes()).unwrap();
    let mebibyte = vec![0; 1 << 20];
    let mut sending = stream.try_clone().unwrap();
    let sender = std::thread::spawn(move || {
        // The server stops to read at some point; what it says counts.
        let mut send = || -> std::io::Result<()> {
            for _ in 0..130 {
                sending.write_all(b"100000\r\n")?;
                sending.write_all(&mebibyte)?;
                sending.write_all(b"\r\n")?;
            }
            sending.write_all(b"0\r\n\r\n")
        };
        send().is_ok()
    });
    let mut start = [0; 12];
    std::io::Read::read_exact(&mut stream, &mut start).unwrap();
    assert_eq!(&start, b"HTTP/1.1 413");
    drop(stream);
    sender.join().unwrap();
}

#[test]
fn every_stored_form_is_served_in_every_wire_form() {
    let scratch = Scratch::new();
    let plain = noise(100_000);
    let id = id_of(&plain);
    for form in [Form::Compressed, Form::Plain] {
        let dir = scratch.join(format!("{form:?}"));
        store_of(&dir, form, &[&plain]);
        for (flags, wire, cipher) in [
            (&[][..], Form::Compressed, None),
            (&["-u"], Form::Plain, None),
            (&["--encryption-key", KEY], Form::Compressed, Some(Algorithm::XChaCha20Poly1305)),
            (
                &["-u", "--encryption-key", KEY, "--encryption-algorithm", "aes-256-gcm"],
                Form::Plain,
                Some(Algorithm::Aes256Gcm),
            ),
        ] {
            let cipher = cipher.map(|algorithm| Arc::new(Cipher::new(algorithm, &KEY.parse().unwrap())));
            let layout = Layout { form: wire, cipher };
            let server = chunk_server(&dir, flags);
            let reply = get(server.address(), &format!("/{}", layout.object_name(id)));
            assert_eq!(reply.status, 200, "{form:?} {flags:?}: {}", reply.text());
            let stored = layout.open(reply.body.into()).unwrap();
            let found = caifs::chunk::codec::decode(stored.form, &stored.bytes, plain.len() as u64).unwrap();
            assert_eq!(found, plain, "{form:?} {flags:?}");
            // The name says the form, and no other is there.
            for other in ["", ".cacnk", ".cacnk.aes-256-gcm-511a735b", ".cacnk.xchacha20-poly1305-00000000"] {
                if other != layout.extension() {
                    assert_eq!(get(server.address(), &(path_of(id) + other)).status, 400, "{flags:?} {other}");
                }
            }
        }
    }
}

#[test]
fn uploads_in_every_wire_form_end_in_the_stores_form() {
    let scratch = Scratch::new();
    for (flags, wire, cipher) in [
        (&["-w", "-u"][..], Form::Plain, None),
        (&["-w", "--encryption-key", KEY], Form::Compressed, Some(Algorithm::XChaCha20Poly1305)),
    ] {
        let dir = scratch.dir(&flags.join(""));
        let cipher = cipher.map(|algorithm| Arc::new(Cipher::new(algorithm, &KEY.parse().unwrap())));
        let layout = Layout { form: wire, cipher };
        let server = chunk_server(&dir, flags);
        let bytes = if wire == Form::Plain { b"x".to_vec() } else { compressed(b"x") };
        let sealed = layout.seal(Stored { form: wire, bytes: bytes.into() }).unwrap();
        let path = format!("/{}", layout.object_name(id_of(b"x")));
        assert_eq!(put(server.address(), &path, &sealed).status, 200);
        assert_eq!(fs::read(file_of(&dir, id_of(b"x"), ".cacnk")).unwrap(), compressed(b"x"));
        let mut damaged = sealed.to_vec();
        damaged[0] ^= 1;
        assert_eq!(put(server.address(), &path, &damaged).status, 400);
    }
}

#[test]
fn what_is_stored_as_the_wire_wants_it_is_sent_as_it_is() {
    let scratch = Scratch::new();
    let dir = scratch.join("store");
    store_of(&dir, Form::Compressed, &[]);
    // As casync makes them with --compression=xz and gzip, under the same name.
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    gzip.write_all(b"in gzip").unwrap();
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 6);
    xz.write_all(b"in xz").unwrap();
    for (plain, stored) in [(&b"in gzip"[..], gzip.finish().unwrap()), (b"in xz", xz.finish().unwrap())] {
        let file = file_of(&dir, id_of(plain), ".cacnk");
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, &stored).unwrap();
        let server = chunk_server(&dir, &["--skip-verify-read=false"]);
        assert_eq!(get(server.address(), &(path_of(id_of(plain)) + ".cacnk")).body, stored);
        let server = chunk_server(&dir, &["-u"]);
        assert_eq!(get(server.address(), &path_of(id_of(plain))).body, plain);
    }
}

#[test]
fn damaged_chunks_are_sent_only_by_a_server_that_does_not_verify() {
    let scratch = Scratch::new();
    let (bad, good) = (scratch.join("bad"), scratch.join("good"));
    store_of(&bad, Form::Compressed, &[b"x"]);
    store_of(&good, Form::Compressed, &[b"x"]);
    fs::remove_file(file_of(&bad, id_of(b"x"), ".cacnk")).unwrap();
    fs::write(file_of(&bad, id_of(b"x"), ".cacnk"), compressed(b"y")).unwrap();
    let path = path_of(id_of(b"x")) + ".cacnk";
    assert_eq!(get(chunk_server(&bad, &[]).address(), &path).body, compressed(b"y"));
    let strict = chunk_server(&bad, &["--skip-verify-read=false"]);
    assert_eq!(get(strict.address(), &path).status, 500);
    // What does not verify is not kept.
    let cache = scratch.dir("cache");
    let cache_flags = ["-c", cache.to_str().unwrap()];
    assert_eq!(get(chunk_server(&bad, &cache_flags).address(), &path).body, compressed(b"y"));
    assert!(!file_of(&cache, id_of(b"x"), ".cacnk").exists());
    let both = chunk_server(&bad, &[&cache_flags[..], &["-s", good.to_str().unwrap()]].concat());
    assert_eq!(get(both.address(), &path).body, compressed(b"y"));
}

#[test]
fn a_cache_is_filled_and_used_when_the_store_is_gone() {
    let scratch = Scratch::new();
    let (dir, cache) = (scratch.join("store"), scratch.join("cache"));
    store_of(&dir, Form::Plain, &[b"x", b"y"]);
    let server = chunk_server(&dir, &["-c", cache.to_str().unwrap()]);
    let path = |plain| path_of(id_of(plain)) + ".cacnk";
    assert_eq!(get(server.address(), &path(b"x")).status, 200);
    fs::rename(&dir, scratch.join("gone")).unwrap();
    assert_eq!(get(server.address(), &path(b"x")).body, compressed(b"x"));
    assert_eq!(ask(server.address(), "HEAD", &path(b"x"), &[], b"").status, 200);
    assert_eq!(get(server.address(), &path(b"y")).status, 404);
    let numbers = get(server.address(), "/metrics").text();
    for wanted in ["caifs_chunk_cache_hits_total 1", "caifs_chunk_fetches_total 2", "caifs_chunk_missing_total 1"] {
        assert!(numbers.lines().any(|line| line == wanted), "{wanted} is not in\n{numbers}");
    }
}

#[test]
fn a_hangup_makes_it_read_its_store_file_again() {
    let scratch = Scratch::new();
    let (a, b) = (scratch.join("a"), scratch.join("b"));
    store_of(&a, Form::Compressed, &[b"a"]);
    store_of(&b, Form::Compressed, &[b"b"]);
    let name = |dir: &std::path::Path| format!("{{\"stores\": [{:?}], \"cache\": \"\"}}", dir.to_str().unwrap());
    let file = scratch.file("stores.json", name(&a));
    let log = scratch.join("log");
    let server = start("chunk-server", |command| {
        command.arg("--store-file").arg(&file).arg("--log").arg(&log).env("CAIFS_LOG", "info")
    });
    let status = |plain| get(server.address(), &(path_of(id_of(plain)) + ".cacnk")).status;
    assert_eq!((status(b"a"), status(b"b")), (200, 404));
    // The log's new file tells that it has got to it: the log is opened again before the stores, on the same thread.
    let hangup = |n: u32| {
        fs::rename(&log, scratch.join(format!("log.{n}"))).unwrap();
        kill(Pid::from_raw(server.pid()), Signal::SIGHUP).unwrap();
        let start = std::time::Instant::now();
        while !log.exists() {
            assert!(start.elapsed() < LIMIT, "the log is not opened again");
            std::thread::yield_now();
        }
    };
    let becomes = |wanted| {
        let start = std::time::Instant::now();
        while (status(b"a"), status(b"b")) != wanted {
            assert!(start.elapsed() < LIMIT, "the stores are not read again");
        }
    };
    fs::write(&file, name(&b)).unwrap();
    hangup(1);
    becomes((404, 200));
    // What cannot be read changes nothing, and is no reason to end.
    fs::write(&file, "{").unwrap();
    hangup(2);
    fs::write(&file, name(&scratch.join("none"))).unwrap();
    hangup(3);
    assert_eq!((status(b"a"), status(b"b")), (404, 200));
    fs::write(&file, name(&a)).unwrap();
    hangup(4);
    becomes((200, 404));
}

#[test]
fn wrong_arguments_are_one_line() {
    let scratch = Scratch::new();
    let store = scratch.dir("store");
    let store = store.to_str().unwrap();
    let two_stores = scratch.file("two.json", format!("{{\"stores\": [{store:?}, {store:?}]}}"));
    let two_stores = two_stores.to_str().unwrap();
    let key_file = scratch.file("key.pem", "no key");
    let key_file = key_file.to_str().unwrap();
    for (args, wanted) in [
        (&["chunk-server"][..], "there is no store to serve"),
        (&["chunk-server", "-w"], "exactly one store"),
        (&["chunk-server", "-w", "-s", store, "-s", store], "exactly one store"),
        (&["chunk-server", "-w", "-s", store, "-c", store], "no cache"),
        (&["chunk-server", "-s", store, "--store-file", "x"], "cannot be used with"),
        (&["chunk-server", "-w", "--store-file", two_stores], "exactly one store"),
        (&["chunk-server", "--store-file", "/none"], "store file /none: No such file"),
        (&["chunk-server", "-s", "/none"], "/none: No such file"),
        (&["chunk-server", "-s", store, "-l", "80"], "listen on 80: "),
        (&["chunk-server", "-s", store, "--encryption"], "DESYNC_ENCRYPTION_KEY"),
        (&["chunk-server", "-s", store, "--encryption-key", "12"], "64 hex digits"),
        (&["chunk-server", "-s", store, "--digest", "md5"], "unknown digest 'md5'"),
        (&["chunk-server", "-s", store, "--cert", "x"], "--key"),
        (&["chunk-server", "-s", store, "--mutual-tls"], "--client-ca"),
        (&["chunk-server", "-s", store, "--cert", key_file, "--key", key_file], "key.pem: no private key"),
        (&["chunk-server", "-s", store, "--log", "/none/log"], "/none/log"),
        (&["index-server"], "--store"),
        (&["index-server", "-s", "/none"], "/none: No such file"),
    ] {
        let mut command = caifs();
        let finished = run(command.args(args).env_remove("DESYNC_ENCRYPTION_KEY")).fails();
        assert!(finished.error_line().contains(wanted), "{args:?}: {}", finished.error_line());
    }
}

/// A store that answers when it is let, and counts.
#[derive(Debug)]
struct Gated {
    store: LocalStore,
    gate: Semaphore,
    n_fetches: std::sync::atomic::AtomicU32,
}

impl Store for Gated {
    fn name(&self) -> &str {
        "gated"
    }

    fn fetch(&self, id: caifs::digest::ChunkId) -> BoxFuture<'_, Result<Option<Stored>, StoreError>> {
        Box::pin(async move {
            self.n_fetches.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            drop(self.gate.acquire().await);
            self.store.fetch(id).await
        })
    }

    fn has(&self, id: caifs::digest::ChunkId) -> BoxFuture<'_, Result<bool, StoreError>> {
        self.store.has(id)
    }
}

fn service(store: Arc<dyn Store>, verify_read: bool) -> ChunkServer {
    let config =
        ChunkServerConfig { layout: Layout::default(), digest: Digest::default(), verify_read, verify_write: true };
    ChunkServer::new(config, Upstream { store, cache: None, writable: None }, None)
}

fn head_of(path: &str) -> hyper::http::request::Parts {
    hyper::Request::get(path).body(()).unwrap().into_parts().0
}

fn bytes_of(answer: Answer) -> (u16, Vec<u8>) {
    match answer.body {
        Body::Bytes(bytes) => (answer.status.as_u16(), bytes.to_vec()),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn concurrent_requests_for_a_chunk_are_one_for_the_store() {
    let scratch = Scratch::new();
    let dir = scratch.join("store");
    let gated = Arc::new(Gated {
        store: store_of(&dir, Form::Compressed, &[b"x"]),
        gate: Semaphore::new(0),
        n_fetches: 0.into(),
    });
    let service = service(gated.clone(), false);
    let head = head_of(&(path_of(id_of(b"x")) + ".cacnk"));
    let asking = futures_util::future::join_all((0..4).map(|_| service.answer(&head, bytes::Bytes::new())));
    let opening = async {
        tokio::task::yield_now().await;
        gated.gate.add_permits(1);
    };
    let (answers, ()) = tokio::join!(asking, opening);
    for answer in answers {
        assert_eq!(bytes_of(answer), (200, compressed(b"x")));
    }
    assert_eq!(gated.n_fetches.load(std::sync::atomic::Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_server_that_verifies_asks_the_next_store_for_what_is_damaged() {
    let damaged = |name: &str| {
        let store = FaultStore::new(name, |_, _| Fault::Flip);
        store.insert(id_of(b"x"), b"x");
        Arc::new(store) as Arc<dyn Store>
    };
    let good = FaultStore::new("good", |_, _| Fault::None);
    good.insert(id_of(b"x"), b"x");
    let head = head_of(&(path_of(id_of(b"x")) + ".cacnk"));
    let lucky = service(Arc::new(Router::new(vec![damaged("a"), damaged("b"), Arc::new(good)])), true);
    assert_eq!(bytes_of(lucky.answer(&head, bytes::Bytes::new()).await), (200, compressed(b"x")));
    let unlucky = service(Arc::new(Router::new(vec![damaged("a"), damaged("b")])), true);
    assert_eq!(bytes_of(unlucky.answer(&head, bytes::Bytes::new()).await).0, 500);
}

#[tokio::test]
async fn a_damaged_chunk_in_the_cache_is_fetched_when_chunks_are_verified() {
    let scratch = Scratch::new();
    let (dir, cache) = (scratch.join("store"), scratch.join("cache"));
    let store = store_of(&dir, Form::Compressed, &[b"x"]);
    let cache = store_of(&cache, Form::Compressed, &[]);
    cache.put(id_of(b"x"), Stored { form: Form::Compressed, bytes: compressed(b"y").into() }).await.unwrap();
    let config = ChunkServerConfig {
        layout: Layout::default(),
        digest: Digest::default(),
        verify_read: true,
        verify_write: true,
    };
    let upstream = Upstream { store: Arc::new(store), cache: Some(Arc::new(cache)), writable: None };
    let service = ChunkServer::new(config, upstream, None);
    let head = head_of(&(path_of(id_of(b"x")) + ".cacnk"));
    assert_eq!(bytes_of(service.answer(&head, bytes::Bytes::new()).await), (200, compressed(b"x")));
}
