//! The casync protocol: our store with each program at the far end, and each program's client with ours at the far end.
//!
//! "ssh" is a script that runs its last words by a shell here, as the real one does there; the real one is run by the tests of mounts.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use caifs::chunk::codec::Form;
use caifs::digest::ChunkId;
use caifs::format::protocol::{Decoder, Features, Frame};
use caifs::store::local::LocalStore;
use caifs::store::location::{Location, SshLocation};
use caifs::store::options::SshOptions;
use caifs::store::retry::RetryPolicy;
use caifs::store::ssh::SshStore;
use caifs::store::{FileStore, Store, StoreOptions, WriteStore, files::ReadWhole};

use crate::store::chunk;
use crate::support::blob::noise;
use crate::support::listing::tree_listing;
use crate::support::peers::peer;
use crate::support::run::{caifs, run};
use crate::support::scratch::Scratch;

/// A directory with a blob, a tree, and what is made of them; and an ssh that stays here.
struct Place {
    scratch: Scratch,
    blob: Vec<u8>,
    ssh: PathBuf,
}

impl Place {
    fn new() -> Self {
        let scratch = Scratch::new();
        let blob = noise(3_000_000);
        scratch.file("blob", &blob);
        let tree = scratch.dir("tree");
        fs::create_dir(tree.join("dir")).unwrap();
        for i in 0..40 {
            fs::write(tree.join(format!("dir/file {i}")), noise(10_000 + i)).unwrap();
        }
        std::os::unix::fs::symlink("dir", tree.join("link")).unwrap();
        // The options before the login are skipped; what casync gives as words and desync as one text is the same to a shell.
        let ssh = scratch.file(
            "ssh",
            "#!/bin/sh\nwhile [ $# -gt 0 ]; do case \"$1\" in --) shift; break;; -p) shift 2;; *) break;; esac; done\nshift\nexec sh -c \"$*\"\n",
        );
        fs::set_permissions(&ssh, fs::Permissions::from_mode(0o755)).unwrap();
        Self { scratch, blob, ssh }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// Makes an index and store of the blob and the tree, and an archive of the tree.
    fn make(&self) {
        let [store, blob, tree] = ["it's a store", "blob", "tree"].map(|name| self.path(name));
        run(caifs().arg("make").arg("-s").arg(&store).arg(self.path("x.caibx")).arg(&blob)).ok();
        run(caifs().arg("tar").arg("-i").arg("-s").arg(&store).arg(self.path("t.caidx")).arg(&tree)).ok();
        run(caifs().arg("tar").arg(self.path("t.catar")).arg(&tree)).ok();
    }

    fn options(&self, far: &str) -> StoreOptions {
        StoreOptions {
            concurrency: 3,
            request_timeout: Duration::from_secs(20),
            retry: RetryPolicy { n_retries: 1, base: Duration::from_millis(10), max: Duration::from_millis(10) },
            ssh: SshOptions {
                program: self.ssh.clone().into(),
                remote_command: far.to_owned(),
                ..SshOptions::default()
            },
            ..StoreOptions::default()
        }
    }

    fn store(&self, far: &str, directory: &Path) -> SshStore {
        let text = format!("ssh://somewhere{}", directory.display());
        SshStore::new(&location(&text), &self.options(far)).unwrap()
    }

    /// A client's command whose ssh is ours, with our program at the far end.
    fn with_us<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("CASYNC_SSH_PATH", &self.ssh).env("CASYNC_REMOTE_PATH", our_program())
    }
}

fn location(text: &str) -> SshLocation {
    match Location::parse(&text.replace(' ', "%20")).unwrap() {
        Location::Ssh(location) => location,
        other => panic!("{other:?}"),
    }
}

fn our_program() -> String {
    caifs().get_program().to_str().expect("the path of the build is text").to_owned()
}

/// The programs that can be at the far end.
fn far_ends() -> Vec<String> {
    let peers = ["casync", "desync"].into_iter().filter_map(peer).map(|peer| peer.path.display().to_string());
    peers.chain([our_program()]).collect()
}

#[tokio::test]
async fn chunks_come_from_every_program_at_the_far_end() {
    let place = Place::new();
    let directory = place.scratch.dir("it's a store");
    let local = LocalStore::open(&directory).unwrap();
    let noise = noise(1_200_000);
    let mut chunks = vec![chunk(Form::Compressed, b"x"), chunk(Form::Compressed, &noise)];
    chunks.extend((0..50u8).map(|i| chunk(Form::Compressed, &vec![i; 1000 + usize::from(i)])));
    for (id, stored) in &chunks {
        local.put(*id, stored.clone()).await.unwrap();
    }
    let (missing, _) = chunk(Form::Compressed, b"never put");
    for far in far_ends() {
        let store = place.store(&far, &directory);
        assert_eq!(store.fetch(missing).await, Ok(None), "{far}");
        assert_eq!(store.has(missing).await, Ok(false), "{far}");
        assert_eq!(store.has(chunks[0].0).await, Ok(true), "{far}");
        // All at once, each of them twice, with one that is not there between them.
        let ids = chunks.iter().chain(&chunks).map(|(id, _)| *id).chain([missing]);
        let fetched = futures_util::future::join_all(ids.map(|id| store.fetch(id))).await;
        for (fetched, (id, stored)) in fetched.iter().zip(chunks.iter().chain(&chunks)) {
            assert_eq!(fetched.as_ref(), Ok(&Some(stored.clone())), "{far}: {id}");
        }
        assert_eq!(fetched.last(), Some(&Ok(None)), "{far}");
    }
}

#[tokio::test]
async fn plain_chunks_are_compressed_on_their_way() {
    let place = Place::new();
    let directory = place.scratch.dir("plain");
    let local = LocalStore::open(&directory).unwrap().with_form(Form::Plain);
    let (id, stored) = chunk(Form::Plain, b"plain bytes, plain bytes, plain bytes");
    local.put(id, stored.clone()).await.unwrap();
    let fetched = place.store(&our_program(), &directory).fetch(id).await.unwrap().unwrap();
    assert_eq!(fetched.form, Form::Compressed);
    let plain = caifs::chunk::codec::decode(fetched.form, &fetched.bytes, stored.bytes.len() as u64).unwrap();
    assert_eq!(plain, stored.bytes);
}

#[tokio::test]
async fn indexes_and_archives_are_pulled_as_a_whole() {
    let place = Place::new();
    place.make();
    for far in far_ends().iter().filter(|far| !far.ends_with("desync")) {
        let files = place.store(far, &place.scratch);
        for name in ["x.caibx", "t.caidx", "t.catar"] {
            let content = fs::read(place.path(name)).unwrap();
            match files.read_whole(name, None, content.len() as u64).await {
                Ok(ReadWhole::Content(whole)) => assert!(whole.bytes == content, "{far}: {name}"),
                other => panic!("{far}: {name}: {other:?}"),
            }
            let error = files.read_whole(name, None, content.len() as u64 - 1).await.unwrap_err();
            assert!(error.reason.contains("more than"), "{far}: {error}");
        }
        assert_eq!(files.read_whole("none.caibx", None, 100).await, Ok(ReadWhole::Missing), "{far}");
        assert_eq!(files.read_whole("none.catar", None, 100).await, Ok(ReadWhole::Missing), "{far}");
        assert!(files.read_range("t.catar", 0..1, None).await.unwrap_err().reason.contains("sftp://"));
    }
}

#[tokio::test]
async fn a_far_end_that_fails_is_told_and_begun_again() {
    let place = Place::new();
    let directory = place.scratch.dir("store");
    let (id, stored) = chunk(Form::Compressed, b"x");
    LocalStore::open(&directory).unwrap().put(id, stored.clone()).await.unwrap();
    // What there is to say is said on standard error.
    let absent = place.store("/no/such/program", &directory).fetch(id).await.unwrap_err();
    assert!(absent.reason.contains("/no/such/program") && absent.reason.contains("not found"), "{absent}");
    assert!(!absent.is_transient);
    let babble = place.store("echo Welcome to this machine; true", &directory).fetch(id).await.unwrap_err();
    assert!(babble.reason.contains("not the casync protocol") && babble.is_transient, "{babble}");

    // Killed behind our back, it is begun again.
    let pids = place.path("pids");
    let far = format!("echo $$ >>{}; exec {}", pids.display(), our_program());
    let store = place.store(&far, &directory);
    assert_eq!(store.fetch(id).await, Ok(Some(stored.clone())));
    let pid: i32 = fs::read_to_string(&pids).unwrap().trim().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    assert_eq!(store.fetch(id).await, Ok(Some(stored)));
    assert_eq!(fs::read_to_string(&pids).unwrap().lines().count(), 2);

    // One that says nothing is given up.
    let options = StoreOptions { request_timeout: Duration::from_millis(200), ..place.options("sleep 600; true") };
    let silent = SshStore::new(&location(&format!("ssh://h{}", directory.display())), &options).unwrap();
    let error = silent.fetch(id).await.unwrap_err();
    assert!(error.reason.contains("no answer") && error.is_transient, "{error}");
}

#[test]
fn clients_of_desync_and_casync_pull_from_us() {
    let (Some(casync), Some(desync)) = (peer("casync"), peer("desync")) else { return };
    let place = Place::new();
    place.make();
    let store = format!("ssh://h{}", place.path("it's a store").display());
    let out = place.path("out");
    run(place.with_us(desync.command().arg("extract").arg("-s").arg(&store)).arg(place.path("x.caibx")).arg(&out)).ok();
    assert!(fs::read(&out).unwrap() == place.blob, "desync extract");
    let cat = run(place.with_us(desync.command().arg("cat").arg("-s").arg(&store)).arg(place.path("x.caibx"))).ok();
    assert!(cat.stdout == place.blob, "desync cat");

    // casync puts no quotes around what it names.
    let plain = place.path("store");
    fs::rename(place.path("it's a store"), &plain).unwrap();
    let remote = |name: &str| format!("h:{}", place.path(name).display());
    fs::remove_file(&out).unwrap();
    let store = format!("--store={}", remote("store"));
    run(place.with_us(casync.command().arg("extract").arg(&store)).arg(remote("x.caibx")).arg(&out)).ok();
    assert!(fs::read(&out).unwrap() == place.blob, "casync extract of a blob");
    for name in ["t.caidx", "t.catar"] {
        let tree = place.scratch.dir(&format!("tree of {name}"));
        run(place.with_us(casync.command().arg("extract").arg(&store)).arg(remote(name)).arg(&tree)).ok();
        tree_listing(&tree).assert_same(&tree_listing(&place.path("tree")));
    }
}

#[test]
fn casync_pushes_blobs_and_trees_to_us() {
    let (Some(casync), Some(desync)) = (peer("casync"), peer("desync")) else { return };
    let place = Place::new();
    let far = place.scratch.dir("far");
    let remote = |name: &str| format!("h:{}", far.join(name).display());
    let store = format!("--store={}", remote("store"));
    for (name, source) in [("x.caibx", "blob"), ("t.caidx", "tree"), ("x.caibx", "blob")] {
        run(place.with_us(casync.command().arg("make").arg(&store)).arg(remote(name)).arg(place.path(source))).ok();
    }
    let verified = run(desync.command().arg("verify").arg("-s").arg(far.join("store"))).ok();
    assert_eq!(verified.stderr, "");
    let cat = run(caifs().arg("cat").arg("-s").arg(far.join("store")).arg(far.join("x.caibx"))).ok();
    assert!(cat.stdout == place.blob);
    run(caifs().arg("tar").arg(place.path("ours.catar")).arg(place.path("tree"))).ok();
    let ours = fs::read(place.path("ours.catar")).unwrap();
    let cat = run(caifs().arg("cat").arg("-s").arg(far.join("store")).arg(far.join("t.caidx"))).ok();
    assert!(cat.stdout == ours, "the archive came as it was made");
    let names: Vec<_> = fs::read_dir(&far).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 3, "no temporary file is left: {names:?}");
}

/// Pushes an archive by hand: casync's client mostly breaks off while it does so, to a casync as well (149 of 150 times).
fn push_archive(target: &Path, frames: &[Frame]) -> (Vec<Frame>, bool) {
    let mut command = caifs();
    command.args(["push", "-"]).arg(target).args(["-", "-"]);
    let mut server = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut bytes = BytesMut::new();
    frames.iter().for_each(|frame| frame.encode(&mut bytes).unwrap());
    let mut stdin = server.stdin.take().unwrap();
    let writer = std::thread::spawn(move || stdin.write_all(&bytes));
    let mut decoder = Decoder::default();
    let mut answer = Vec::new();
    server.stdout.take().unwrap().read_to_end(&mut answer).unwrap();
    decoder.feed(&answer);
    let answers = std::iter::from_fn(|| decoder.next_frame().unwrap()).collect();
    writer.join().unwrap().unwrap();
    (answers, server.wait().unwrap().success())
}

#[test]
fn an_archive_that_is_pushed_appears_when_all_of_it_is_there() {
    let place = Place::new();
    let archive = noise(1_000_000);
    let target = place.path("t.catar");
    let hello = Frame::Hello(Features::PUSH_ARCHIVE);
    let mut frames = vec![hello.clone()];
    frames.extend(archive.chunks(60_000).map(|piece| Frame::Archive(Bytes::copy_from_slice(piece))));
    let (answers, is_ok) = push_archive(&target, &frames);
    assert!(!is_ok && !target.exists(), "it broke off before the end: {answers:?}");
    frames.push(Frame::ArchiveEof);
    let (answers, is_ok) = push_archive(&target, &frames);
    assert_eq!(answers, [Frame::Hello(Features::WRITABLE_ARCHIVE), Frame::Goodbye]);
    assert!(is_ok && fs::read(&target).unwrap() == archive);
    // What was not asked for is refused, and what is there stays.
    let (answers, is_ok) = push_archive(&target, &[hello, Frame::Missing(ChunkId([0; 32])), Frame::ArchiveEof]);
    assert!(!is_ok && matches!(answers.last(), Some(Frame::Abort { .. })), "{answers:?}");
    assert!(fs::read(&target).unwrap() == archive);
}

#[test]
fn words_that_are_wrong_are_told() {
    for (args, what) in [
        (&["pull", "-", "-", "-", "-"][..], "nothing to serve"),
        (&["push", "-", "-", "-", "-"], "nothing to take"),
        (&["pull", "x", "-", "-", "/"], "base"),
        (&["pull", "-", "-", "-"], "nothing to serve"),
        (&["pull", "-", "/no/archive", "-", "-"], "/no/archive: No such file"),
        (&["pull", "-", "-", "-", "/no/store"], "/no/store"),
        (&["--rate-limit-bps=fast", "pull", "-", "-", "-", "/"], "rate-limit-bps"),
    ] {
        let failed = run(caifs().args(args)).fails();
        assert!(failed.stderr.contains(what), "{args:?}: {}", failed.stderr);
    }
    // Who comes and goes has done nothing wrong, whatever options stand where.
    run(caifs().args(["--log-level=7", "pull", "--rate-limit-bps=1000000", "-", "", "-", "/"])).ok();
}
