//! Trust in an index: signatures and hashes by every verb that reads one, together with the real minisign, over a mirror that lies.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use caifs::blob::source::IndexBytes;
use caifs::digest::ChunkId;
use caifs::format::index::{ChunkSizes, FLAG_SHA512_256, IndexHeader, encode};
use sha2::{Digest, Sha256};

use crate::cli::one_line;
use crate::mount::can_mount;
use crate::support::blob::noise;
use crate::support::mounted::{Mounted, is_mountpoint};
use crate::support::peers::peer;
use crate::support::run::{Finished, caifs, command, run};
use crate::support::scratch::Scratch;
use crate::support::servers::nginx::{Nginx, Site};

/// A tree with its index, signed, and a key that did not sign it.
struct Ground {
    scratch: Scratch,
    /// Where index and store lie.
    dir: PathBuf,
}

const FILE: &[u8] = b"what was packed";

impl Ground {
    fn new() -> Self {
        let scratch = Scratch::new();
        let dir = scratch.dir("served");
        Self::over(scratch, dir)
    }

    fn over(scratch: Scratch, dir: PathBuf) -> Self {
        let tree = scratch.dir("tree");
        fs::write(tree.join("file"), FILE).unwrap();
        let ground = Self { scratch, dir };
        ground.pack("t.caidx", &tree);
        for key in ["good", "other"] {
            let (secret, public) = (ground.key(key, "sec"), ground.key(key, "pub"));
            ground.caifs(&["sign", "-G", "-s", &secret, "-p", &public]).ok();
        }
        ground.sign("t.caidx", "good").ok();
        ground
    }

    fn pack(&self, name: &str, tree: &Path) {
        let store = self.dir.join("default.castr");
        run(caifs().args(["tar", "-i", "-s"]).arg(store).arg(self.dir.join(name)).arg(tree)).ok();
    }

    fn key(&self, name: &str, kind: &str) -> String {
        self.scratch.join(format!("{name}.{kind}")).display().to_string()
    }

    fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    fn caifs(&self, args: &[&str]) -> Finished {
        let nowhere = self.scratch.join("nothing");
        run(caifs().env("CAIFS_CONFIG_DIR", nowhere).current_dir(&*self.scratch).args(args))
    }

    fn sign(&self, name: &str, key: &str) -> Finished {
        self.caifs(&["sign", "-s", &self.key(key, "sec"), &self.path(name)])
    }

    fn digest(&self, name: &str) -> String {
        hex(&Sha256::digest(fs::read(self.dir.join(name)).unwrap()))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A program that reads passwords from its standard input.
fn with_input(command: &mut Command, input: &str) -> bool {
    let quiet = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = quiet.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait().unwrap().success()
}

#[test]
fn every_verb_that_reads_an_index_refuses_a_wrong_one() {
    let ground = Ground::new();
    let index = ground.path("t.caidx");
    let archive = ground.scratch.join("archive");
    ground.caifs(&["cat", &index, archive.to_str().unwrap()]).ok();
    let archive = archive.display().to_string();
    let verbs: [(&[&str], &[&str]); 6] = [
        (&["cat", "-p", "file"], &[]),
        (&["cat"], &[]),
        (&["ls"], &[]),
        (&["info"], &[]),
        (&["list-chunks"], &[]),
        (&["verify-index"], &[&archive]),
    ];
    let (good, other) = (ground.key("good", "pub"), ground.key("other", "pub"));
    let digest = ground.digest("t.caidx");
    let text = fs::read_to_string(&good).unwrap().lines().nth(1).unwrap().to_owned();
    for (verb, more) in verbs {
        let with = |flags: &[&str]| ground.caifs(&[verb, flags, &[&index], more].concat());
        with(&["--verify-key", &good]).ok();
        with(&["--verify-key", &text, "--index-sha256", &digest.to_uppercase()]).ok();
        let wrong = one_line(with(&["--verify-key", &other]));
        assert!(wrong.contains("t.caidx: wrong key: it is signed with key "), "{wrong}");
        let wrong = one_line(with(&["--index-sha256", &"0".repeat(64)]));
        assert!(wrong.contains(&format!("t.caidx: wrong index: its SHA-256 is {digest}, and not 0000")), "{wrong}");
    }
    for (flags, why) in [
        (["--index-sha256", "abc"], "--index-sha256: \"abc\" is not 64 hexadecimal digits"),
        (["--verify-key", "no.pub"], "verify-key no.pub: No such file"),
        (["--verify-key", &index], "t.caidx: "),
    ] {
        let line = one_line(ground.caifs(&[&["ls"], &flags[..], &[&index]].concat()));
        assert!(line.contains(why), "{line}");
    }
}

#[test]
fn what_is_configured_for_mounts_holds_for_every_reader() {
    let ground = Ground::new();
    let config = ground.scratch.dir("conf");
    // A key's file begins where the configuration lies.
    fs::copy(ground.key("other", "pub"), config.join("key.pub")).unwrap();
    fs::write(config.join("caifs.toml"), "[mount]\nverify-key = \"key.pub\"\n").unwrap();
    let ls = |flags: &[&str]| {
        run(caifs().env("CAIFS_CONFIG_DIR", &config).arg("ls").args(flags).arg(ground.dir.join("t.caidx")))
    };
    assert!(one_line(ls(&[])).contains("wrong key"));
    ls(&["--verify-key", &ground.key("good", "pub")]).ok();
    ls(&["--verify-key", "no"]).ok();
    let text = fs::read_to_string(ground.key("good", "pub")).unwrap();
    fs::write(config.join("caifs.toml"), format!("[mount]\nverify-key = \"{}\"\n", text.lines().nth(1).unwrap()))
        .unwrap();
    ls(&[]).ok();
}

#[test]
fn what_cannot_be_checked_is_refused() {
    let ground = Ground::new();
    let archive = ground.path("t.catar");
    run(caifs().arg("tar").arg(&archive).arg(ground.scratch.join("tree"))).ok();
    let (key, digest) = (ground.key("good", "pub"), ground.digest("t.catar"));
    for (flags, option) in [(["--verify-key", &key], "verify-key"), (["--index-sha256", &digest], "index-sha256")] {
        let line = one_line(ground.caifs(&[&["ls"], &flags[..], &[&archive]].concat()));
        let why = format!("t.catar: a plain archive cannot be checked before it is read ({option} is for indexes");
        assert!(line.contains(&why), "{line}");
    }
    assert!(one_line(ground.sign("t.catar", "good")).contains("not an index"));
    let (index, digest) = (ground.path("t.caidx"), ground.digest("t.caidx"));
    let piped = |flags: &str| {
        let caifs = env!("CARGO_BIN_EXE_caifs");
        run(&mut command("sh", ["-c", &format!("{caifs} list-chunks {flags} - < {index}")]))
    };
    let line = one_line(piped(&format!("--verify-key {key}")));
    assert!(line.contains("an index from standard input has no signature beside it"), "{line}");
    piped(&format!("--index-sha256 {digest}")).ok();
}

#[test]
fn minisign_and_caifs_verify_what_the_other_signed() {
    let Some(minisign) = peer("minisign") else { return };
    let ground = Ground::new();
    let index = ground.path("t.caidx");
    let signature = format!("{index}.minisig");
    let minisign_runs = |args: &[&str]| run(minisign.command().args(args));
    let verify = |key: &str| ground.caifs(&["verify-signature", "-p", key, &index]);

    // Our key and our signature.
    let (ours, our_public) = (ground.key("good", "sec"), ground.key("good", "pub"));
    minisign_runs(&["-V", "-H", "-p", &our_public, "-m", &index]).ok();
    let comment = ["--trusted-comment", "release 7"];
    ground.caifs(&[&["sign", "-s", &ours], &comment[..], &[&index]].concat()).ok();
    let told = minisign_runs(&["-V", "-Q", "-p", &our_public, "-m", &index]).ok().text();
    assert_eq!(told.trim_end(), "release 7");
    let told = verify(&our_public).ok().text();
    assert!(told.contains("signed with key ") && told.ends_with("trusted comment: release 7\n"), "{told}");

    // Our key, signatures by minisign of both kinds.
    for legacy in [&["-l"][..], &[]] {
        minisign_runs(&[&["-S", "-W", "-s", &ours, "-m", &index], legacy].concat()).ok();
        verify(&our_public).ok();
    }

    // Its key, without a password and with one.
    let (plain, plain_public) = (ground.key("plain", "sec"), ground.key("plain", "pub"));
    minisign_runs(&["-G", "-W", "-s", &plain, "-p", &plain_public]).ok();
    ground.sign("t.caidx", "plain").ok();
    minisign_runs(&["-V", "-p", &plain_public, "-m", &index]).ok();

    let (locked, locked_public) = (ground.key("locked", "sec"), ground.key("locked", "pub"));
    let generate = ["-G", "-s", &locked, "-p", &locked_public];
    assert!(with_input(minisign.command().args(generate), "geheim\ngeheim\n"));
    let password = ground.scratch.file("password", "geheim\n");
    let wrong = ground.scratch.file("wrong", "falsch\n");
    for file in [&password, &wrong] {
        fs::set_permissions(file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    }
    let sign = |file: &Path| ground.caifs(&["sign", "-s", &locked, "--password-file", file.to_str().unwrap(), &index]);
    assert!(one_line(sign(&wrong)).ends_with("locked.sec: wrong password for the secret key"));
    verify(&plain_public).ok();
    sign(&password).ok();
    minisign_runs(&["-V", "-p", &locked_public, "-m", &index]).ok();
    assert!(one_line(verify(&plain_public)).contains("wrong key"));

    // A key of ours with a password, used by minisign.
    let (sealed, sealed_public) = (ground.key("sealed", "sec"), ground.key("sealed", "pub"));
    let generate = ["sign", "-G", "-s", &sealed, "-p", &sealed_public, "--password-file", password.to_str().unwrap()];
    assert_eq!(ground.caifs(&generate).ok().stderr, "", "an encrypted key is nothing to warn of");
    fs::remove_file(&signature).unwrap();
    assert!(with_input(minisign.command().args(["-S", "-s", &sealed, "-m", &index]), "geheim\n"));
    verify(&sealed_public).ok();

    fs::remove_file(&signature).unwrap();
    let missing = one_line(verify(&our_public));
    let why = format!("t.caidx: no signature found: there is no {signature} (caifs sign makes it)");
    assert!(missing.ends_with(&why), "{missing}");
}

#[test]
fn a_password_is_asked_for_at_the_terminal_and_not_shown() {
    let ground = Ground::new();
    let (sealed, public) = (ground.key("sealed", "sec"), ground.key("sealed", "pub"));
    let password = ground.scratch.file("password", "geheim\n");
    ground.caifs(&["sign", "-G", "-s", &sealed, "-p", &public, "--password-file", password.to_str().unwrap()]).ok();
    let line = one_line(run(
        command("setsid", ["-w", env!("CARGO_BIN_EXE_caifs"), "sign", "-s", &sealed]).arg(ground.path("t.caidx"))
    ));
    assert!(line.contains("the secret key needs its password (or --password-file): "), "{line}");
    let Some(script) = peer("script") else { return };
    let typed = format!("{} sign -s {sealed} {}", env!("CARGO_BIN_EXE_caifs"), ground.path("t.caidx"));
    let mut at_terminal = script.command();
    at_terminal.args(["-q", "-e", "-c", &typed, "/dev/null"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = at_terminal.spawn().unwrap();
    // What is typed before the question is asked is thrown away.
    let (mut shown, mut byte) = (Vec::new(), [0]);
    let mut output = child.stdout.take().unwrap();
    while !shown.ends_with(b"sealed.sec: ") && output.read(&mut byte).unwrap() == 1 {
        shown.push(byte[0]);
    }
    child.stdin.take().unwrap().write_all(b"geheim\n").unwrap();
    output.read_to_end(&mut shown).unwrap();
    assert!(child.wait().unwrap().success(), "{}", String::from_utf8_lossy(&shown));
    let shown = String::from_utf8_lossy(&shown);
    assert!(shown.contains("Password of ") && !shown.contains("geheim"), "{shown}");
    ground.caifs(&["verify-signature", "-p", &public, &ground.path("t.caidx")]).ok();
}

#[test]
fn keys_are_not_overwritten_and_secret_ones_are_private() {
    let ground = Ground::new();
    let (secret, public) = (ground.key("good", "sec"), ground.key("good", "pub"));
    let mode = |path: &str| std::os::unix::fs::PermissionsExt::mode(&fs::metadata(path).unwrap().permissions()) & 0o777;
    assert_eq!(mode(&secret), 0o600);
    let before = fs::read(&secret).unwrap();
    for (secret, public) in [(&secret, &ground.key("new", "pub")), (&ground.key("new", "sec"), &public)] {
        let line = one_line(ground.caifs(&["sign", "-G", "-s", secret, "-p", public]));
        assert!(line.contains("it is there already, and a key is not overwritten"), "{line}");
    }
    assert_eq!(fs::read(&secret).unwrap(), before);
    assert!(!Path::new(&ground.key("new", "sec")).exists() && !Path::new(&ground.key("new", "pub")).exists());
    let warned = ground.caifs(&["sign", "-G", "-s", &ground.key("new", "sec"), "-p", &ground.key("new", "pub")]).ok();
    assert!(warned.stderr.contains("not encrypted: who can read it can sign"), "{}", warned.stderr);
    // A public key is none to sign with, and the other way round.
    assert!(
        one_line(ground.caifs(&["sign", "-s", &public, &ground.path("t.caidx")])).contains("not a minisign secret key")
    );
    let line = one_line(ground.caifs(&["verify-signature", "-p", &secret, &ground.path("t.caidx")]));
    assert!(line.contains("not a minisign public key"), "{line}");
    // A damaged index is not signed, and its signature stays.
    let signature = fs::read(ground.path("t.caidx.minisig")).unwrap();
    let mut index = fs::read(ground.path("t.caidx")).unwrap();
    index[70] ^= 0xff;
    fs::write(ground.path("t.caidx"), index).unwrap();
    assert!(one_line(ground.sign("t.caidx", "good")).contains("damaged"));
    assert_eq!(fs::read(ground.path("t.caidx.minisig")).unwrap(), signature);
}

/// What a mirror can do with a file.
enum Lie {
    Change(usize),
    Is(&'static str),
    Content(Vec<u8>),
    Gone,
    SignedWith(&'static str),
}

impl Lie {
    fn tell(&self, ground: &Ground, name: &str) {
        let path = ground.path(name);
        match self {
            Self::Change(at) => {
                let mut bytes = fs::read(&path).unwrap();
                // Another character of base64, and another byte of an index.
                bytes[*at] = if bytes[*at] == b'A' { b'B' } else { b'A' };
                fs::write(&path, bytes).unwrap();
            }
            Self::Is(other) => drop(fs::copy(ground.path(other), &path).unwrap()),
            Self::Content(bytes) => fs::write(&path, bytes).unwrap(),
            Self::Gone => fs::remove_file(&path).unwrap(),
            Self::SignedWith(key) => drop(ground.sign("t.caidx", key).ok()),
        }
    }
}

/// All of them: what it is, the file, the change, and what is said of it.
fn lies(ground: &Ground) -> Vec<(&'static str, &'static str, Lie, &'static str)> {
    const CHANGED: &str = "bad signature: it is not what key";
    const COMMENT: &str = "bad signature: its trusted comment is not what key";
    let (index, signature) = ("t.caidx", "t.caidx.minisig");
    let text = fs::read(ground.path(signature)).unwrap();
    let at = |what: &[u8]| text.windows(what.len()).position(|window| window == what).unwrap();
    vec![
        ("another chunk id", index, Lie::Change(80), CHANGED),
        ("another header", index, Lie::Change(16), CHANGED),
        ("an empty index", index, Lie::Content(Vec::new()), CHANGED),
        ("another index", index, Lie::Is("older.caidx"), CHANGED),
        ("another signature", signature, Lie::Is("older.caidx.minisig"), CHANGED),
        ("a changed signature", signature, Lie::Change(at(b"\nRU") + 30), CHANGED),
        ("a changed comment", signature, Lie::Change(at(b"timestamp")), COMMENT),
        ("a changed signature of the comment", signature, Lie::Change(text.len() - 20), COMMENT),
        ("a signature of somebody else", signature, Lie::SignedWith("other"), "wrong key: it is signed with key"),
        ("no signature", signature, Lie::Gone, "no signature found: there is no http://"),
        ("an error page", signature, Lie::Content(b"<html>".to_vec()), "not a minisign signature (it does not begin"),
        ("a huge signature", signature, Lie::Content(vec![b'x'; 1 << 20]), "t.caidx.minisig: "),
    ]
}

#[test]
fn a_mirror_that_lies_is_found_out_and_spoils_no_cache() {
    if !can_mount() {
        return;
    }
    let Some(nginx) = peer("nginx") else { return };
    let scratch = Scratch::new();
    let served = scratch.dir("nginx");
    let nginx = Nginx::start(&nginx.path, &served, Site { server: "", tls: None, verify_client: false });
    let ground = Ground::over(scratch, nginx.root().to_owned());
    let older = ground.scratch.dir("older");
    fs::write(older.join("file"), "another").unwrap();
    ground.pack("older.caidx", &older);
    ground.sign("older.caidx", "good").ok();
    let (key, digest, mnt) = (ground.key("good", "pub"), ground.digest("t.caidx"), ground.scratch.dir("mnt"));
    let url = format!("{}t.caidx", nginx.url());
    let cache = ground.scratch.join("cache").display().to_string();
    let cat = |more: &[&str]| ground.caifs(&[&["cat", "-p", "file", "--verify-key", &key], more, &[&url]].concat());

    let saved: Vec<(String, Vec<u8>)> = ["t.caidx", "t.caidx.minisig", "older.caidx", "older.caidx.minisig"]
        .map(|name| (ground.path(name), fs::read(ground.path(name)).unwrap()))
        .into();
    let restore = || saved.iter().for_each(|(path, bytes)| fs::write(path, bytes).unwrap());

    // Before anything is kept.
    fs::remove_file(ground.path("t.caidx.minisig")).unwrap();
    cat(&["-c", &cache]).fails();
    let line = one_line(cat(&["-c", &cache, "--offline"]));
    assert!(line.contains("it is not in the cache"), "nothing is kept that was not checked: {line}");
    restore();
    assert_eq!(cat(&["-c", &cache]).ok().stdout, FILE);
    let n_requests = nginx.requests(1).len();
    assert_eq!(cat(&["-c", &cache]).ok().stdout, FILE);
    let asked: Vec<String> =
        nginx.requests(n_requests + 1)[n_requests..].iter().map(|request| request.uri.clone()).collect();
    assert_eq!(asked, ["/t.caidx"], "the kept signature is that of the kept index, and is not asked for");

    for (what, name, lie, why) in lies(&ground) {
        lie.tell(&ground, name);
        let line = one_line(cat(&[]));
        assert!(line.contains(why), "{what}: {line}");
        let mut mount = caifs();
        mount.args(["mount", "--verify-key", &key, &url]).arg(&mnt);
        let refused = run(&mut mount).fails();
        assert_eq!(refused.status.code(), Some(32), "{what}");
        assert!(refused.error_line().contains(why) && !is_mountpoint(&mnt), "{what}: {}", refused.stderr);
        // What is kept still serves: with a lie about the index the mount fails, and what was kept before it stays.
        let _ = cat(&["-c", &cache]);
        assert_eq!(cat(&["-c", &cache, "--offline"]).ok().stdout, FILE, "{what}");
        restore();
    }

    // What is signed with the same key is taken for it; only the hash says which.
    fs::copy(ground.path("older.caidx"), ground.path("t.caidx")).unwrap();
    fs::copy(ground.path("older.caidx.minisig"), ground.path("t.caidx.minisig")).unwrap();
    assert_eq!(cat(&[]).ok().stdout, b"another");
    assert!(one_line(cat(&["--index-sha256", &digest])).contains("wrong index"));
    restore();

    let mut mount = caifs();
    mount.args(["mount", "--index-sha256", &digest, "--verify-key", &key, &url]).arg(&mnt);
    let mounted = Mounted::by_command(&mut mount, &mnt).unwrap();
    assert_eq!(fs::read(mnt.join("file")).unwrap(), FILE);
    assert!(mounted.end());

    // What is kept is checked as well: another key does not take it.
    let refused = ground.caifs(&["ls", "-c", &cache, "--offline", "--verify-key", &ground.key("other", "pub"), &url]);
    assert!(one_line(refused).contains("wrong key"));
}

#[test]
fn a_large_index_is_checked_on_a_copy_that_nobody_can_change() {
    let scratch = Scratch::new();
    let bytes = noise(3 << 20);
    let path = scratch.file("large", &bytes);
    let copy = IndexBytes::copy(&path, None).unwrap();
    let mapped = IndexBytes::open(&path).unwrap();
    // In place, as a writer does it that wants to slip something in after the check; its time is put back.
    let before = fs::metadata(&path).unwrap().modified().unwrap();
    let mut changed = bytes.clone();
    changed[1 << 20..2 << 20].fill(0);
    fs::write(&path, &changed).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(before).unwrap();
    assert!(mapped.as_ref() == changed.as_slice(), "a mapped file shows what was written: hence the copy");
    assert!(copy.as_ref() == bytes.as_slice());
    assert_eq!(copy.check_unchanged(), Ok(()));
    assert!(IndexBytes::copy(&scratch, None).is_err(), "a directory");
}

#[test]
fn an_index_that_is_mapped_otherwise_is_checked_as_any() {
    let ground = Ground::new();
    // 40,000 chunks: 1.6 MB.
    let ids: Vec<ChunkId> = (0..40_000_u32).map(|n| ChunkId(Sha256::digest(n.to_le_bytes()).into())).collect();
    let header = IndexHeader { feature_flags: FLAG_SHA512_256, sizes: ChunkSizes { min: 1, avg: 1, max: 1 } };
    fs::write(ground.dir.join("large.caibx"), encode(&header, (1..).zip(&ids))).unwrap();
    ground.sign("large.caibx", "good").ok();
    let index = ground.path("large.caibx");
    let list = |flags: &[&str]| ground.caifs(&[&["list-chunks"], flags, &[&index]].concat());
    let demands = ["--verify-key", &ground.key("good", "pub"), "--index-sha256", &ground.digest("large.caibx")];
    assert_eq!(list(&demands).ok().text(), list(&[]).ok().text());
    let mut bytes = fs::read(&index).unwrap();
    *bytes.get_mut(1_000_000).unwrap() ^= 1;
    fs::write(&index, bytes).unwrap();
    assert!(one_line(list(&demands[..2])).contains("bad signature"));
    assert!(one_line(list(&demands[2..])).contains("wrong index"));
}
