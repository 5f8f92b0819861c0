//! Stores over SFTP, against a real sshd, and against rclone's server, which is written in another language on another library.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use caifs::chunk::cipher::{Algorithm, Cipher, Key};
use caifs::chunk::codec::{self, Form};
use caifs::digest::Digest;
use caifs::format::index::Index;
use caifs::store::files::ReadWhole;
use caifs::store::layout::Layout;
use caifs::store::local::LocalStore;
use caifs::store::location::Location;
use caifs::store::open::{open, open_files, open_writable};
use caifs::store::retry::RetryPolicy;
use caifs::store::{FileStore, FileVersion, Put, StoreOptions, WriteStore};

use super::{chunk, store_contract};
use crate::support::blob::Xorshift;
use crate::support::peers::peer;
use crate::support::run::{kill_group, run};
use crate::support::scratch::Scratch;
use crate::support::server::{Server, free_port};
use crate::support::servers::sshd::{Sshd, make_key};

/// How long a server that says nothing is waited for in these tests.
const SHORT: Duration = Duration::from_millis(1500);

/// Options that log in to a server.
fn options(sshd: &Sshd) -> StoreOptions {
    let mut options = StoreOptions::default();
    options.ssh.identity_files = vec![sshd.key.clone()];
    options.ssh.known_hosts = Some(sshd.known_hosts.clone());
    options
}

fn location(sshd: &Sshd, directory: &Path) -> Location {
    Location::parse(&sshd.url("sftp", directory)).unwrap()
}

fn writable(sshd: &Sshd, directory: &Path, options: &StoreOptions) -> Arc<dyn WriteStore> {
    open_writable(&location(sshd, directory), options).unwrap()
}

/// All files below a directory, by name.
fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .flat_map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            match entry.path().is_dir() {
                true => self::names(&entry.path()).into_iter().map(|below| format!("{name}/{below}")).collect(),
                false => vec![name],
            }
        })
        .collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn an_sftp_store_keeps_the_contract_in_every_layout() {
    let Some(sshd) = Sshd::start() else { return };
    let dir = Scratch::new();
    let key: Key = "d69371915dbc4b1f0ec55e2a80f0e089accf4b32e0f8dc0e29fed7f0f30d1b26".parse().unwrap();
    let cipher = Arc::new(Cipher::new(Algorithm::XChaCha20Poly1305, &key));
    for (form, cipher, name) in [
        (Form::Compressed, None, "compressed"),
        (Form::Plain, None, "plain"),
        (Form::Compressed, Some(Arc::clone(&cipher)), "encrypted"),
        (Form::Plain, Some(cipher), "plain and encrypted"),
    ] {
        let store_dir = dir.dir(name);
        let layout = Layout { form, cipher };
        let options = StoreOptions { layout: layout.clone(), ..options(&sshd) };
        store_contract(&*writable(&sshd, &store_dir, &options)).await;
        let files = names(&store_dir);
        assert!(files.len() > 50);
        assert!(files.iter().all(|name| layout.parse(name).is_some()), "only chunks are left: {files:?}");
        // What it wrote is a store for everybody else, and it reads what others wrote.
        let (id, stored) = chunk(form, b"written by another");
        LocalStore::open(&store_dir).unwrap().with_layout(layout).put(id, stored.clone()).await.unwrap();
        let store = open(&location(&sshd, &store_dir), &options).unwrap();
        assert_eq!(store.fetch(id).await, Ok(Some(stored)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_sftp_store_of_another_kind_of_server_keeps_the_contract() {
    let Some(rclone) = peer("rclone") else { return };
    let dir = Scratch::new();
    let (key, host_key, port) = (make_key(&dir, "id"), make_key(&dir, "host_key"), free_port());
    dir.dir("served");
    let mut command = rclone.command();
    command.args(["serve", "sftp", "--user", "somebody", "--addr"]).arg(format!("127.0.0.1:{port}"));
    command.arg("--authorized-keys").arg(dir.join("id.pub")).arg("--key").arg(host_key).arg(&*dir);
    let _server = Server::start(command.env("HOME", &*dir), port);
    let public = fs::read_to_string(dir.join("host_key.pub")).unwrap();
    let mut options = StoreOptions::default();
    options.ssh.known_hosts = Some(dir.file("known_hosts", format!("[127.0.0.1]:{port} {public}")));
    options.ssh.identity_files = vec![key];
    let location = Location::parse(&format!("sftp://somebody@127.0.0.1:{port}/served")).unwrap();
    store_contract(&*open_writable(&location, &options).unwrap()).await;
    replaces_files(&*open_files(&location, &options).unwrap(), &dir.join("served")).await;
}

/// What must be so for files of every server.
async fn replaces_files(files: &dyn FileStore, directory: &Path) {
    for content in ["first", "the second", "3"] {
        files.write("index.caibx", Bytes::from_static(content.as_bytes())).await.unwrap();
        assert_eq!(fs::read_to_string(directory.join("index.caibx")).unwrap(), content);
        let ReadWhole::Content(whole) = files.read_whole("index.caibx", None, 100).await.unwrap() else {
            panic!("it is there")
        };
        assert_eq!(whole.bytes, content);
    }
    let left = names(directory);
    assert_eq!(left.iter().filter(|name| name.starts_with("index")).count(), 1, "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn files_over_sftp_are_read_whole_and_by_ranges_and_replaced_at_once() {
    let Some(sshd) = Sshd::start() else { return };
    let dir = Scratch::new();
    let files = open_files(&location(&sshd, &dir), &options(&sshd)).unwrap();
    assert_eq!(files.stat("none").await, Ok(None));
    assert_eq!(files.read_whole("none", None, 10).await, Ok(ReadWhole::Missing));
    replaces_files(&*files, &dir).await;

    let content = Bytes::from(Xorshift::seeded(1).bytes(3_000_000));
    files.write("archive.catar", content.clone()).await.unwrap();
    let info = files.stat("archive.catar").await.unwrap().unwrap();
    assert_eq!(info.size, 3_000_000);
    assert!(info.has_ranges && info.mtime.is_some());
    let version = info.version.clone().unwrap();

    let ReadWhole::Content(whole) = files.read_whole("archive.catar", None, 3_000_000).await.unwrap() else {
        panic!("it is there")
    };
    assert!(whole.bytes == content);
    assert_eq!(whole.info, info);
    let old = FileVersion("1-1".to_owned());
    assert_eq!(files.read_whole("archive.catar", Some(&version), 10).await, Ok(ReadWhole::Unchanged));
    assert!(matches!(files.read_whole("archive.catar", Some(&old), 3_000_000).await, Ok(ReadWhole::Content(_))));
    let error = files.read_whole("archive.catar", None, 2_999_999).await.unwrap_err();
    assert!(error.reason.contains("3000000 bytes, more than the 2999999 allowed") && !error.is_transient, "{error}");

    for range in [0..1, 0..3_000_000, 7..7, 1_234_567..1_300_000, 2_999_999..3_000_000, 29_999..30_001, 3..60_003] {
        let wanted = content.slice(range.start as usize..range.end as usize);
        for version in [None, Some(&version)] {
            assert!(files.read_range("archive.catar", range.clone(), version).await.unwrap() == wanted, "{range:?}");
        }
        let error = files.read_range("archive.catar", range, Some(&old)).await.unwrap_err();
        assert!(error.reason.contains("changed") && !error.is_transient, "{error}");
    }
    let error = files.read_range("archive.catar", 2_999_999..3_000_001, None).await.unwrap_err();
    assert!(error.reason.contains("ends at byte 3000000") && !error.is_transient, "{error}");
    let error = files.read_range("none", 0..1, None).await.unwrap_err();
    assert_eq!(error.object, format!("{}/none", sshd.url("sftp", &dir)));
    assert!(error.reason.contains("no such file") && !error.is_transient, "{error}");

    fs::write(dir.join("archive.catar"), "shorter").unwrap();
    let error = files.read_range("archive.catar", 0..3, Some(&version)).await.unwrap_err();
    assert!(error.reason.contains("changed"), "{error}");

    assert!(files.write("no such directory/x", Bytes::from_static(b"x")).await.is_err());
    fs::create_dir(dir.join("directory")).unwrap();
    assert!(files.write("directory", Bytes::from_static(b"x")).await.is_err());
    assert!(files.stat("directory").await.unwrap_err().reason.contains("not a regular file"));
    let left = names(&dir);
    assert_eq!(left, ["archive.catar", "index.caibx"], "no temporary file is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_chunk_files_over_sftp_are_errors_that_name_the_object() {
    let Some(sshd) = Sshd::start() else { return };
    let dir = Scratch::new();
    let store = writable(&sshd, &dir, &options(&sshd));
    let (id, stored) = chunk(Form::Compressed, b"x");
    let hex = id.to_hex();
    let path = dir.dir(&hex[..4]).join(format!("{hex}.cacnk"));
    let fails = async |what: &str| {
        let error = store.fetch(id).await.unwrap_err();
        assert_eq!(error.object, sshd.url("sftp", &path));
        assert!(error.reason.contains(what) && !error.is_transient, "{error}");
    };
    fs::write(&path, "").unwrap();
    fails("empty").await;
    // An empty file is what a crash leaves: it is not there for a writer, who replaces it.
    assert_eq!(store.has(id).await, Ok(false));
    assert_eq!(store.put(id, stored.clone()).await, Ok(Put::Written));
    assert_eq!(store.fetch(id).await, Ok(Some(stored.clone())));
    assert_eq!(store.put(id, stored.clone()).await, Ok(Put::Present));
    fs::remove_file(&path).unwrap();
    fs::File::create(&path).unwrap().set_len((128 << 20) + 1).unwrap();
    fails("more than 134217728 bytes").await;
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    fails("SFTP").await;
    assert!(store.put(id, stored.clone()).await.is_err());
    fs::remove_dir(&path).unwrap();
    assert_eq!(store.put(id, stored.clone()).await, Ok(Put::Written));
    assert_eq!(names(&dir).len(), 1, "no temporary file is left");

    let nowhere = writable(&sshd, &dir.join("not there"), &options(&sshd));
    assert_eq!(nowhere.fetch(id).await, Ok(None));
    let error = nowhere.put(id, stored).await.unwrap_err();
    assert!(error.reason.contains("no such file") && error.reason.contains("must exist"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_not_known_gets_no_login() {
    let Some(sshd) = Sshd::start() else { return };
    let dir = Scratch::new();
    let (id, _) = chunk(Form::Compressed, b"x");
    let known = fs::read_to_string(&sshd.known_hosts).unwrap();
    make_key(&dir, "other");
    let other_key = fs::read_to_string(dir.join("other.pub")).unwrap();
    let (port, key) = (sshd.port, known.split_once(' ').unwrap().1);
    // ssh-keygen -H keeps the unhashed file beside it.
    let hashed = dir.file("hashed", &known);
    run(Command::new("ssh-keygen").arg("-H").arg("-f").arg(&hashed)).ok();
    let hashed = fs::read_to_string(hashed).unwrap();
    assert!(hashed.starts_with("|1|"));
    // A key of another type is no reason to be asked for that one, nor to be content with it.
    let rsa = format!("[127.0.0.1]:{port} ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAgQC7\n");
    for (text, refused) in [
        (known.clone(), None),
        (hashed, None),
        (format!("# a comment\n\n{rsa}{known}"), None),
        (format!("127.0.0.1 {key}"), None),
        (format!("[127.0.0.*]:{port},elsewhere {key}"), None),
        (String::new(), Some("is not known")),
        (rsa, Some("is not known")),
        (format!("[127.0.0.1]:{} {key}", port ^ 1), Some("is not known")),
        (format!("@cert-authority [127.0.0.1]:{port} {key}"), Some("is not known")),
        (format!("[127.0.0.1]:{port} {other_key}"), Some("is not the one known")),
        (format!("[127.0.0.1]:{port} {other_key}127.0.0.1 {key}"), Some("is not the one known")),
        (format!("{known}@revoked * {key}"), Some("is revoked")),
    ] {
        let mut options = options(&sshd);
        options.ssh.known_hosts = Some(dir.file("known_hosts", &text));
        let fetched = open(&location(&sshd, &dir), &options).unwrap().fetch(id).await;
        match (refused, fetched) {
            (None, fetched) => assert_eq!(fetched, Ok(None), "{text}"),
            (Some(why), Ok(fetched)) => panic!("{text}: {fetched:?} and not {why}"),
            (Some(why), Err(error)) => {
                assert!(error.reason.contains(why) && error.reason.contains("SHA256:"), "{text}: {error}");
                assert!(!error.is_transient);
            }
        }
    }
    let shown = run(Command::new("ssh-keygen").arg("-lf").arg(&sshd.known_hosts)).ok().text();
    let fingerprint = shown.split(' ').nth(1).unwrap().to_owned();
    let mut options = options(&sshd);
    options.ssh.known_hosts = Some(dir.file("known_hosts", ""));
    let error = open(&location(&sshd, &dir), &options).unwrap().fetch(id).await.unwrap_err();
    assert!(error.reason.contains(&fingerprint) && error.reason.contains("ssh-keyscan"), "{error}");
    options.ssh.known_hosts = Some(dir.join("no such file"));
    let error = open(&location(&sshd, &dir), &options).unwrap().fetch(id).await.unwrap_err();
    assert!(error.reason.contains("no such file: No such file"), "{error}");
    // Without a file of one's own the one of the home directory counts, and the keys there.
    options.ssh.known_hosts = None;
    options.ssh.identity_files = Vec::new();
    let home = dir.dir("home");
    fs::create_dir(home.join(".ssh")).unwrap();
    fs::write(home.join(".ssh/known_hosts"), &known).unwrap();
    fs::copy(&sshd.key, home.join(".ssh/id_ed25519")).unwrap();
    options.ssh.home = Some(home);
    assert_eq!(open(&location(&sshd, &dir), &options).unwrap().fetch(id).await, Ok(None));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_known_key_is_asked_for_though_the_server_has_a_better_one() {
    let Some(mut sshd) = Sshd::start() else { return };
    let dir = Scratch::new();
    let rsa = dir.join("rsa");
    run(Command::new("ssh-keygen").args(["-q", "-t", "rsa", "-b", "2048", "-N", "", "-f"]).arg(&rsa)).ok();
    sshd.add_host_key(&rsa);
    sshd.restart();
    let public = fs::read_to_string(dir.join("rsa.pub")).unwrap();
    let mut options = options(&sshd);
    options.ssh.known_hosts = Some(dir.file("known_hosts", format!("[127.0.0.1]:{} {public}", sshd.port)));
    let (id, _) = chunk(Form::Compressed, b"x");
    assert_eq!(open(&location(&sshd, &dir), &options).unwrap().fetch(id).await, Ok(None));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_let_in_is_told_what_was_tried() {
    let Some(sshd) = Sshd::start() else { return };
    let dir = Scratch::new();
    let (id, _) = chunk(Form::Compressed, b"x");
    let wrong = make_key(&dir, "wrong");
    let locked = dir.join("locked");
    let made =
        Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "a passphrase", "-f"]).arg(&locked).status();
    assert!(made.unwrap().success());
    let reason = async |files: &[&Path], agent: Option<PathBuf>| {
        let mut options = options(&sshd);
        options.ssh.identity_files = files.iter().map(|file| file.to_path_buf()).collect();
        options.ssh.agent_socket = agent;
        options.ssh.home = Some(dir.join("no home"));
        let error = open(&location(&sshd, &dir), &options).unwrap().fetch(id).await.unwrap_err();
        assert!(!error.is_transient, "{error}");
        assert!(error.reason.contains(&format!("cannot log in as {}", sshd.user)), "{error}");
        error.reason
    };
    let text = reason(&[&wrong, &locked, &dir.join("none")], Some(dir.join("no agent"))).await;
    for part in ["wrong (refused)", "locked (cannot be read", "none (no such file)", "no agent ("] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let text = reason(&[], None).await;
    assert!(text.contains("nothing"), "{text}");
}

/// An agent with a key, ended on drop.
struct Agent {
    child: Child,
    socket: PathBuf,
}

impl Agent {
    fn start(directory: &Path) -> Self {
        use std::os::unix::process::CommandExt;
        let socket = directory.join("agent");
        let mut command = Command::new("ssh-agent");
        command.arg("-D").arg("-a").arg(&socket).stdout(Stdio::piped()).process_group(0);
        let mut child = command.spawn().unwrap();
        // It says where it listens when it does.
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("SSH_AUTH_SOCK"), "{line}");
        Self { child, socket }
    }

    fn add(&self, key: &Path) {
        run(Command::new("ssh-add").arg("-q").arg(key).env("SSH_AUTH_SOCK", &self.socket)).ok();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        kill_group(&mut self.child);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_logs_in() {
    let Some(sshd) = Sshd::start() else { return };
    if peer("ssh-agent").is_none() || peer("ssh-add").is_none() {
        return;
    }
    // Paths of sockets are short.
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let (id, _) = chunk(Form::Compressed, b"x");
    let mut options = options(&sshd);
    options.ssh.identity_files = Vec::new();
    options.ssh.agent_socket = Some(agent.socket.clone());
    let fetch = async |options: &StoreOptions| open(&location(&sshd, dir.path()), options).unwrap().fetch(id).await;
    let text = fetch(&options).await.unwrap_err().reason;
    assert!(text.contains("it has no keys"), "{text}");
    agent.add(&make_key(dir.path(), "wrong"));
    let text = fetch(&options).await.unwrap_err().reason;
    assert!(text.contains("the agent's key wrong (refused)"), "{text}");
    agent.add(&sshd.key);
    assert_eq!(fetch(&options).await, Ok(None));
    // More keys than the server takes: the one that is named is shown first.
    let many = Agent::start(tempfile::tempdir_in(dir.path()).unwrap().keep().as_path());
    for n in 0..7 {
        many.add(&make_key(dir.path(), &format!("many{n}")));
    }
    many.add(&sshd.key);
    options.ssh.agent_socket = Some(many.socket.clone());
    let error = fetch(&options).await.unwrap_err();
    assert!(error.reason.contains("ended the login") && !error.is_transient, "{error}");
    // The private key itself is not there: only its name and the public one are.
    let named = dir.path().join("named");
    fs::copy(sshd.key.with_extension("pub"), named.with_extension("pub")).unwrap();
    options.ssh.identity_files = vec![named];
    assert_eq!(fetch(&options).await, Ok(None));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_comes_back_is_used_again() {
    let Some(mut sshd) = Sshd::start() else { return };
    let dir = Scratch::new();
    let options = StoreOptions { retry: RetryPolicy::NEVER, ..options(&sshd) };
    let store = writable(&sshd, &dir, &options);
    let (id, stored) = chunk(Form::Compressed, b"x");
    store.put(id, stored.clone()).await.unwrap();
    for fetched in futures_util::future::join_all((0..20).map(|_| store.fetch(id))).await {
        assert_eq!(fetched, Ok(Some(stored.clone())));
    }
    assert!(sshd.n_session_processes() > 1, "several sessions serve at once");
    sshd.stop();
    let error = store.fetch(id).await.unwrap_err();
    assert!(error.is_transient && error.reason.contains("Connection refused"), "{error}");
    sshd.restart();
    // Sessions that ended since are no reason to fail, not even without retries.
    for fetched in futures_util::future::join_all((0..20).map(|_| store.fetch(id))).await {
        assert_eq!(fetched, Ok(Some(stored.clone())));
    }
    sshd.restart();
    assert_eq!(store.put(id, stored.clone()).await, Ok(Put::Present));
    assert_eq!(store.fetch(id).await, Ok(Some(stored)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_says_nothing_is_not_waited_for_longer_than_the_timeout() {
    let Some(sshd) = Sshd::start() else { return };
    let dir = Scratch::new();
    let mut options = StoreOptions { retry: RetryPolicy::NEVER, request_timeout: SHORT, ..options(&sshd) };
    options.concurrency = 2;
    // Connections are taken by the system, and nobody is there.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody =
        Location::parse(&format!("sftp://u@127.0.0.1:{}{}", silent.local_addr().unwrap().port(), dir.display()));
    let (id, stored) = chunk(Form::Compressed, b"x");
    let error = open(&nobody.unwrap(), &options).unwrap().fetch(id).await.unwrap_err();
    assert!(error.is_transient && error.reason.contains("timed out"), "{error}");

    // Sessions that stop answering are given up and replaced, and the threads that waited in them are free again.
    let store = writable(&sshd, &dir, &options);
    store.put(id, stored.clone()).await.unwrap();
    for _ in 0..3 {
        sshd.freeze_sessions();
        let error = store.has(id).await.unwrap_err();
        assert!(error.is_transient && error.reason.contains("timed out"), "{error}");
        assert_eq!(store.has(id).await, Ok(true));
    }
    // So is the session of a reader that went away in the middle.
    sshd.freeze_sessions();
    assert!(tokio::time::timeout(SHORT / 3, store.has(id)).await.is_err());
    assert_eq!(store.fetch(id).await, Ok(Some(stored)));
}

#[tokio::test(flavor = "multi_thread")]
async fn desync_reads_what_we_write_over_sftp_and_the_other_way_round() {
    let Some(sshd) = Sshd::start() else { return };
    let Some(desync) = peer("desync") else { return };
    let dir = Scratch::new();
    let image = dir.file("image", Xorshift::seeded(7).bytes(1_500_000));
    let (theirs, ours, local) = (dir.dir("theirs"), dir.dir("ours"), dir.dir("local"));
    let index = dir.join("image.caibx");
    let mut make = desync.command();
    make.args(["make", "-s"]).arg(sshd.url_without_port("sftp", &theirs)).arg(&index).arg(&image);
    run(sshd.with_ssh(&mut make)).ok();
    let bytes = fs::read(&index).unwrap();
    let parsed = Index::open(bytes.clone()).unwrap();

    // Every chunk that desync wrote is read and proved; then it goes where desync reads it.
    let from = open(&location(&sshd, &theirs), &options(&sshd)).unwrap();
    let to = writable(&sshd, &ours, &options(&sshd));
    let mut plain = Vec::new();
    for item in parsed.items() {
        let item = item.unwrap();
        let stored = from.fetch(item.id).await.unwrap().expect("desync wrote it");
        let decoded = codec::decode(stored.form, &stored.bytes, item.size_bytes()).unwrap();
        assert_eq!(Digest::default().id(&decoded), item.id);
        plain.extend_from_slice(&decoded);
        to.put(item.id, stored).await.unwrap();
    }
    assert!(plain == fs::read(&image).unwrap());
    let files = open_files(&location(&sshd, &ours), &options(&sshd)).unwrap();
    files.write("image.caibx", bytes.into()).await.unwrap();

    let mut extract = desync.command();
    extract.args(["extract", "-s"]).arg(sshd.url_without_port("sftp", &ours));
    extract.arg(sshd.url_without_port("sftp", &ours.join("image.caibx"))).arg(local.join("image"));
    run(sshd.with_ssh(&mut extract)).ok();
    assert!(fs::read(local.join("image")).unwrap() == plain);
}

#[test]
fn nothing_is_asked_of_the_network_when_a_store_is_opened() {
    // No runtime, no server, no such host.
    let location = Location::parse("sftp://somebody@no-such-host.invalid/store").unwrap();
    let options = StoreOptions::default();
    assert_eq!(open(&location, &options).unwrap().name(), "sftp://somebody@no-such-host.invalid/store");
    assert!(open_files(&location, &options).is_ok() && open_writable(&location, &options).is_ok());
}
