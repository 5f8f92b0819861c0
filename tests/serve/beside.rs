//! What lies beside indexes and archives: the index server gives and takes it, and mounts and verbs find it there.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use caifs::tree::table::Table;
use caifs::tree::table::check::check;

use super::client::{ask, get, put};
use super::start;
use crate::mount::can_mount;
use crate::support::blob::noise;
use crate::support::corner::Corner;
use crate::support::listing::tree_listing;
use crate::support::mounted::{Mounted, is_mountpoint};
use crate::support::run::{Finished, caifs, run};
use crate::support::scratch::Scratch;
use crate::support::scripted::{Scripted, answer};
use crate::support::server::Server;
use crate::table::{mount_at, table_in, wait_for_table, wait_until};

/// A directory of indexes behind an index server.
struct Ground {
    scratch: Scratch,
    dir: PathBuf,
    store: PathBuf,
    mnt: PathBuf,
    server: Server,
}

impl Ground {
    fn new(flags: &[&str]) -> Self {
        let scratch = Scratch::new();
        let (dir, store, mnt) = (scratch.dir("indexes"), scratch.join("store"), scratch.dir("mnt"));
        let log = File::create(scratch.join("server.log")).unwrap();
        let server = start("index-server", |command| command.args(flags).arg("-s").arg(&dir).stderr(log));
        Self { scratch, dir, store, mnt, server }
    }

    fn url(&self, name: &str) -> String {
        format!("http://{}/{name}", self.server.address())
    }

    /// What the server has said so far.
    fn log(&self) -> String {
        fs::read_to_string(self.scratch.join("server.log")).unwrap()
    }

    fn caifs(&self, args: &[&str]) -> Finished {
        run(caifs().env("CAIFS_CONFIG_DIR", self.scratch.join("nothing")).args(args))
    }

    /// Makes an index of a blob at the server, and chunks in the store.
    fn make(&self, name: &str, content: &[u8]) {
        let blob = self.scratch.file("blob", content);
        run(caifs().args(["make", "-s"]).arg(&self.store).arg(self.url(name)).arg(&blob)).ok();
    }

    fn key(&self, name: &str, kind: &str) -> String {
        self.scratch.join(format!("{name}.{kind}")).display().to_string()
    }
}

/// A signature, a profile and a table, each with what its name has behind that of an index.
fn beside(scratch: &Scratch) -> [(&'static str, Vec<u8>); 3] {
    let signature = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/minisign/hi.minisig")).unwrap();
    let source = scratch.dir("source");
    (0..100).for_each(|n| fs::write(source.join(format!("file {n}")), noise(n)).unwrap());
    let archive = scratch.join("t.catar");
    run(caifs().args(["tar", "--metadata-table"]).arg(&archive).arg(&source)).ok();
    let table = fs::read(scratch.join("t.catar.table")).unwrap();
    let profile = format!("caifs-profile 1\n# a remark\n7 {}\n", "5".repeat(64));
    [(".minisig", signature), (".profile", profile.into_bytes()), (".table", table)]
}

#[test]
fn what_lies_beside_an_index_is_given_as_it_is() {
    let ground = Ground::new(&[]);
    let at = ground.server.address();
    for (suffix, bytes) in beside(&ground.scratch) {
        let path = format!("/any/where/x.caibx{suffix}");
        for method in ["GET", "HEAD"] {
            let missing = ask(at, method, &path, &[], b"");
            assert_eq!(missing.status, 404, "{method} {path}: {}", missing.text());
        }
        fs::write(ground.dir.join(format!("x.caibx{suffix}")), &bytes).unwrap();
        let found = get(at, &path);
        assert!((found.status, &found.body) == (200, &bytes), "{path}");
        let etag = found.header("etag").unwrap();
        let head = ask(at, "HEAD", &path, &[], b"");
        assert_eq!((head.status, head.body.len(), head.header("etag")), (200, 0, Some(etag)), "{path}");
        assert_eq!(head.header("content-length"), Some(bytes.len().to_string().as_str()), "{path}");
        assert_eq!(head.header("accept-ranges"), Some("bytes"), "{path}");
        let part = ask(at, "GET", &path, &[("Range", "bytes=3-9"), ("If-Range", etag)], b"");
        assert_eq!((part.status, part.body.as_slice()), (206, &bytes[3..10]), "{path}");
        assert_eq!(ask(at, "GET", &path, &[("If-None-Match", etag)], b"").status, 304, "{path}");
        assert_eq!(put(at, &path, &bytes).status, 400, "{path}: it is not writable");
        // Its readers say what is wrong with it.
        fs::write(ground.dir.join(format!("wrong.caibx{suffix}")), noise(100)).unwrap();
        assert_eq!(get(at, &format!("/wrong.caibx{suffix}")).body, noise(100), "{suffix}");
    }
    assert_eq!(get(at, "/").text(), "[]", "the list is of what can be mounted");
    assert!(!ground.log().contains("x.caibx"), "nothing of this is a fault: {}", ground.log());
    // Beside nothing there is nothing, and all else is an index or none.
    for name in [".profile", "x.caibx.other"] {
        fs::write(ground.dir.join(name), "caifs-profile 1\n").unwrap();
        assert_eq!(get(at, &format!("/{name}")).status, 400, "{name}");
        assert!(ground.log().contains(&format!(": {name}: no sound index")), "{}", ground.log());
    }
}

#[test]
fn from_a_place_without_ranges_it_is_read_as_a_whole() {
    let upstream = Scripted::start(|_, request| match request.line.split(' ').nth(1) {
        Some("/x.caibx.profile") => answer("200 OK", "", b"0123456789"),
        _ => answer("404 Not Found", "", b""),
    });
    let server = start("index-server", |command| command.arg("-s").arg(upstream.url()));
    let at = server.address();
    let whole = get(at, "/x.caibx.profile");
    assert_eq!((whole.status, whole.body.as_slice()), (200, &b"0123456789"[..]), "{}", whole.text());
    let part = ask(at, "GET", "/x.caibx.profile", &[("Range", "bytes=3-5")], b"");
    assert_eq!((part.status, part.body.as_slice()), (206, &b"345"[..]));
    assert_eq!(get(at, "/x.caibx.minisig").status, 404);
}

#[test]
fn beside_an_index_only_what_is_of_its_form_is_taken() {
    let ground = Ground::new(&["-w"]);
    let at = ground.server.address();
    let all = beside(&ground.scratch);
    for (suffix, good) in &all {
        let path = format!("/x.caibx{suffix}");
        let file = ground.dir.join(&path[1..]);
        let mut wrong = vec![("nothing", Vec::new()), ("rubbish", noise(1000))];
        wrong.extend(all.iter().filter(|(other, _)| other != suffix).map(|(other, bytes)| (*other, bytes.clone())));
        wrong.push(("one in which a byte is another", {
            let mut changed = good.clone();
            // In what is base64, a number, a block.
            let at = if *suffix == ".profile" { good.len() - 10 } else { good.len() / 3 };
            changed[at] ^= 0x80;
            changed
        }));
        for (what, body) in &wrong {
            let reply = put(at, &path, body);
            assert_eq!(reply.status, 415, "{path}, {what}: {}", reply.text());
            assert!(!file.exists(), "{path}, {what}");
        }
        let reply = put(at, &format!("/some/where{path}"), good);
        assert_eq!((reply.status, reply.body.len()), (200, 0), "{path}");
        assert!(fs::read(&file).unwrap() == *good && get(at, &path).body == *good, "{path}");
        assert_eq!(put(at, &path, b"rubbish").status, 415, "{path}");
        assert!(get(at, &path).body == *good, "{path}: what is wrong replaces nothing");
    }
    let mut names: Vec<_> = fs::read_dir(&ground.dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["x.caibx.minisig", "x.caibx.profile", "x.caibx.table"], "nothing else is left");
    let long = [all[0].1.as_slice(), &[b'\n'; 16 << 10]].concat();
    assert_eq!(put(at, "/x.caibx.minisig", &long).status, 413, "no reader takes a signature of this size");
    fs::create_dir(ground.dir.join("y.caibx.minisig")).unwrap();
    assert_eq!(put(at, "/y.caibx.minisig", &all[0].1).status, 500, "a directory is in its place");
}

#[test]
fn an_index_is_signed_at_the_index_server_and_mounted_from_it_with_the_key() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new(&["-w"]);
    let content = noise(500_000);
    ground.make("app.caibx", &content);
    for name in ["good", "other"] {
        ground.caifs(&["sign", "-G", "-s", &ground.key(name, "sec"), "-p", &ground.key(name, "pub")]).ok();
    }
    let (url, key) = (ground.url("app.caibx"), ground.key("good", "pub"));
    let mount = |key: &str| {
        let mut mount = caifs();
        mount.args(["mount", "--verify-key", key, "-s"]).arg(&ground.store).arg(&url).arg(&ground.mnt);
        mount
    };
    let refused = |key: &str, why: &str| {
        let refused = run(&mut mount(key)).fails();
        assert_eq!(refused.status.code(), Some(32), "{}", refused.stderr);
        assert!(refused.error_line().contains(why) && !is_mountpoint(&ground.mnt), "{}", refused.stderr);
    };
    refused(&key, "no signature found: there is no http://");
    ground.caifs(&["sign", "-s", &ground.key("good", "sec"), &url]).ok();
    assert!(ground.dir.join("app.caibx.minisig").exists());
    ground.caifs(&["verify-signature", "-p", &key, &url]).ok();
    let mounted = Mounted::by_command(&mut mount(&key), &ground.mnt).unwrap();
    assert!(fs::read(ground.mnt.join("app")).unwrap() == content);
    assert!(mounted.end());
    refused(&ground.key("other", "pub"), "wrong key: it is signed with key ");
    assert!(!ground.log().contains("app.caibx"), "nothing of this is a fault of the server's: {}", ground.log());
}

#[test]
fn a_table_is_published_at_the_index_server_and_a_mount_from_it_fetches_nothing_for_find() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new(&["-w"]);
    let source = ground.scratch.dir("source");
    Corner::ALL.build(&source);
    let (url, store, cache) = (ground.url("t.caidx"), ground.store.to_str().unwrap(), ground.scratch.join("cache"));
    ground.caifs(&["tar", "-i", "--metadata-table", "-s", store, &url, source.to_str().unwrap()]).ok();
    let published = ground.dir.join("t.caidx.table");
    check(&Table::open(File::open(&published).unwrap(), 0).unwrap()).unwrap();
    let mounted = mount_at(&url, &["-s", store, "-c", cache.to_str().unwrap()], &ground.mnt);
    wait_for_table(&ground.mnt);
    let n_fetches = xattr::get(&ground.mnt, "user.caifs.fetches").unwrap();
    tree_listing(&ground.mnt).assert_same(&tree_listing(&source));
    assert_eq!(xattr::get(&ground.mnt, "user.caifs.fetches").unwrap(), n_fetches);
    assert!(mounted.end());
    assert!(fs::read(table_in(&cache)).unwrap() == fs::read(published).unwrap(), "fetched, not made");
    assert!(!ground.log().contains("t.caidx"), "nothing of this is a fault: {}", ground.log());
}

#[test]
fn a_profile_at_the_index_server_is_replayed() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new(&["-w"]);
    ground.make("app.caibx", &noise(2 << 20));
    let listed = ground.caifs(&["list-chunks", &ground.url("app.caibx")]).ok().text();
    let lines: String = listed.lines().map(|id| format!("7 {id}\n")).collect();
    let reply = put(ground.server.address(), "/app.caibx.profile", format!("caifs-profile 1\n{lines}").as_bytes());
    assert_eq!(reply.status, 200, "{}", reply.text());
    let (cache, log) = (ground.scratch.join("cache"), ground.scratch.join("mount.log"));
    let (cache, log, store) = (cache.to_str().unwrap(), log.to_str().unwrap(), ground.store.to_str().unwrap());
    let args = ["-s", store, "-c", cache, "--log", log, "--log-level=info"];
    let mounted = mount_at(&ground.url("app.caibx"), &args, &ground.mnt);
    let replaying = format!(" of {} chunks", listed.lines().count());
    let is_replayed = || {
        let text = fs::read_to_string(log).unwrap_or_default();
        text.contains("app.caibx.profile: replaying ") && text.contains(&replaying)
    };
    wait_until(is_replayed, "the profile beside the index is replayed");
    assert!(mounted.end());
    assert!(!ground.log().contains("app.caibx"), "nothing of this is a fault: {}", ground.log());
}
