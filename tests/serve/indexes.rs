//! The index server's answers, row by row (formats.md 6.3), and archives beside the indexes.

use std::fs;

use super::client::{ask, get, put};
use super::start;
use crate::support::blob::noise;
use crate::support::run::{caifs, run};
use crate::support::scratch::Scratch;

/// A sound index, as we make it, of a blob with several chunks.
fn index(scratch: &Scratch, digest: &str) -> Vec<u8> {
    let blob = scratch.file("blob", noise(500_000));
    let path = scratch.join(format!("{digest}.caibx"));
    run(caifs().args(["make", "--digest", digest]).arg(&path).arg(&blob)).ok();
    fs::read(path).unwrap()
}

#[test]
fn indexes_are_read_by_their_last_name() {
    let scratch = Scratch::new();
    let dir = scratch.dir("indexes");
    let bytes = index(&scratch, "sha512-256");
    fs::write(dir.join("x.caibx"), &bytes).unwrap();
    fs::write(dir.join("metrics"), &bytes).unwrap();
    fs::write(dir.join("rubbish.caibx"), noise(1000)).unwrap();
    fs::write(dir.join("cut.caibx"), &bytes[..bytes.len() - 1]).unwrap();
    fs::create_dir(dir.join("dir")).unwrap();
    fs::write(scratch.join("secret.caibx"), &bytes).unwrap();
    let server = start("index-server", |command| command.arg("-s").arg(&dir));
    let at = server.address();
    // Twice, because the second time it is known to be sound, and sent in another way.
    for path in ["/x.caibx", "/x.caibx", "/any/where/x.caibx", "/%78.caibx?query", "//metrics"] {
        let found = get(at, path);
        assert_eq!((found.status, &found.body), (200, &bytes), "{path}");
        assert_eq!(found.header("content-length"), Some(bytes.len().to_string().as_str()));
        let reply = ask(at, "HEAD", path, &[], b"");
        assert_eq!((reply.status, reply.body.len()), (200, 0), "{path}");
        assert_eq!(reply.header("content-length"), Some(bytes.len().to_string().as_str()));
        assert_eq!((reply.header("etag"), reply.header("accept-ranges")), (found.header("etag"), Some("bytes")));
    }
    for (path, status) in [
        ("/none.caibx", 404),
        ("/secret.caibx", 404),
        ("/rubbish.caibx", 400),
        ("/cut.caibx", 400),
        ("/dir", 400),
        ("/..", 400),
        ("/.", 400),
        ("/..%2fsecret.caibx", 400),
        ("/..%5csecret.caibx", 400),
        ("/x.caibx%00", 400),
    ] {
        for method in ["GET", "HEAD"] {
            assert_eq!(ask(at, method, path, &[], b"").status, status, "{method} {path}");
        }
    }
    // A path that ends with a slash is the list, in the form of nginx; the ETags in it are those of the files.
    fs::write(dir.join(".hidden.caibx"), &bytes).unwrap();
    for path in ["/", "/dir/", "/any/where/"] {
        let list = get(at, path);
        assert_eq!((list.status, list.header("content-type")), (200, Some("application/json")), "{path}");
        let rows: Vec<serde_json::Value> = serde_json::from_slice(&list.body).unwrap();
        let names: Vec<_> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["cut.caibx", "rubbish.caibx", "x.caibx"]);
        assert_eq!((rows[2]["type"].as_str(), rows[2]["size"].as_u64()), (Some("file"), Some(bytes.len() as u64)));
        assert_eq!(rows[2]["etag"].as_str(), get(at, "/x.caibx").header("etag"));
        let head = ask(at, "HEAD", path, &[], b"");
        assert_eq!((head.status, head.body.len()), (200, 0));
    }
    assert_eq!(put(at, "/", &bytes).status, 400);
    assert_eq!(put(at, "/y.caibx", &bytes).status, 400, "it is not writable");
    assert!(!dir.join("y.caibx").exists());
    let reply = ask(at, "DELETE", "/x.caibx", &[], b"");
    assert_eq!((reply.status, reply.header("allow")), (405, Some("GET, HEAD, PUT")));
    assert_eq!(ask(at, "PUT", "/metrics", &[], b"").status, 405);
    assert!(get(at, "/metrics").text().contains("caifs_http_requests_total{method=\"GET\",status=\"200\"} "));
}

#[test]
fn only_sound_indexes_of_the_digest_are_taken() {
    let scratch = Scratch::new();
    let dir = scratch.dir("indexes");
    let server = start("index-server", |command| command.arg("-w").arg("-s").arg(&dir));
    let at = server.address();
    let (good, other) = (index(&scratch, "sha512-256"), index(&scratch, "sha256"));
    let mut shuffled = good.clone();
    // Two ends in the wrong order: only who looks at every chunk sees it.
    shuffled[64..72].copy_from_slice(&good[104..112]);
    shuffled[104..112].copy_from_slice(&good[64..72]);
    for (what, body) in [
        ("nothing", Vec::new()),
        ("rubbish", noise(1000)),
        ("a part", good[..good.len() - 40].to_vec()),
        ("more", [&good[..], b"x"].concat()),
        ("chunks in disorder", shuffled),
        ("another digest", other.clone()),
    ] {
        let reply = put(at, "/x.caibx", &body);
        assert_eq!(reply.status, 415, "{what}: {}", reply.text());
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0, "{what}");
    }
    assert_eq!(put(at, "/..%2fx.caibx", &good).status, 400);
    let reply = put(at, "/some/where/x.caibx", &good);
    assert_eq!((reply.status, reply.body.len()), (200, 0));
    assert_eq!(fs::read(dir.join("x.caibx")).unwrap(), good);
    assert_eq!(get(at, "/x.caibx").body, good);

    // One that replaces it is seen at once, and a wrong one does not replace it.
    let blob = scratch.file("blob2", noise(10));
    run(caifs().arg("make").arg(scratch.join("2.caibx")).arg(&blob)).ok();
    let second = fs::read(scratch.join("2.caibx")).unwrap();
    assert_eq!(put(at, "/x.caibx", &second).status, 200);
    assert_eq!(put(at, "/x.caibx", b"rubbish").status, 415);
    assert_eq!(get(at, "/x.caibx").body, second);
    let sha256 = start("index-server", |command| command.args(["-w", "--digest", "sha256", "-s"]).arg(&dir));
    assert_eq!(put(sha256.address(), "/x.caibx", &good).status, 415);
    assert_eq!(put(sha256.address(), "/x.caibx", &other).status, 200);
    fs::remove_file(dir.join("x.caibx")).unwrap();
    fs::create_dir(dir.join("x.caibx")).unwrap();
    assert_eq!(put(at, "/x.caibx", &good).status, 500, "a directory is in its place");
}

#[test]
fn archives_are_read_by_ranges() {
    let scratch = Scratch::new();
    let dir = scratch.dir("archives");
    let bytes = noise(3_000_000);
    fs::write(dir.join("x.catar"), &bytes).unwrap();
    let server = start("index-server", |command| command.arg("-s").arg(&dir));
    let at = server.address();
    let whole = get(at, "/x.catar");
    assert!((whole.status, &whole.body) == (200, &bytes));
    let etag = whole.header("etag").unwrap().to_owned();
    let head = ask(at, "HEAD", "/x.catar", &[("Range", "bytes=0-1")], b"");
    assert_eq!(
        (head.status, head.header("content-length"), head.header("accept-ranges")),
        (200, Some("3000000"), Some("bytes"))
    );
    let part = |headers: &[(&str, &str)]| ask(at, "GET", "/x.catar", headers, b"");
    for (range, wanted, shown) in [
        ("bytes=0-0", 0..1, "bytes 0-0/3000000"),
        ("bytes=1000000-2500000", 1_000_000..2_500_001, "bytes 1000000-2500000/3000000"),
        ("bytes=2999990-", 2_999_990..3_000_000, "bytes 2999990-2999999/3000000"),
        ("bytes=-24", 2_999_976..3_000_000, "bytes 2999976-2999999/3000000"),
    ] {
        let reply = part(&[("Range", range), ("If-Range", &etag)]);
        assert_eq!((reply.status, reply.header("content-range")), (206, Some(shown)), "{range}");
        assert!(reply.body == bytes[wanted], "{range}");
        assert_eq!(reply.header("etag"), Some(etag.as_str()));
    }
    let outside = part(&[("Range", "bytes=3000000-")]);
    assert_eq!((outside.status, outside.header("content-range")), (416, Some("bytes */3000000")));
    assert_eq!(part(&[("Range", "bytes=0-0"), ("If-Range", "\"another\"")]).status, 200);
    let known = part(&[("If-None-Match", &etag)]);
    assert_eq!((known.status, known.body.len(), known.header("etag")), (304, 0, Some(etag.as_str())));

    // A file that was replaced is another version.
    fs::write(dir.join("y"), &bytes).unwrap();
    fs::rename(dir.join("y"), dir.join("x.catar")).unwrap();
    assert_ne!(part(&[("If-None-Match", &etag)]).header("etag"), Some(etag.as_str()));
    fs::write(dir.join("empty.catar"), "").unwrap();
    let empty = get(at, "/empty.catar");
    assert_eq!((empty.status, empty.body.len(), empty.header("content-length")), (200, 0, Some("0")));
}
