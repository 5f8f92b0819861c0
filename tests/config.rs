//! The configuration as the program reads it: layers, secrets, desync's file, and what is said about mistakes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::peers::peer;
use crate::support::run::{Finished, caifs, run};
use crate::support::scratch::Scratch;

/// A text that no output may have.
const SECRET: &str = "geheimnis-4711";

/// A home directory and a machine's configuration of their own.
struct Place {
    scratch: Scratch,
}

impl Place {
    fn new() -> Self {
        Self { scratch: Scratch::new() }
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.scratch.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    fn command(&self, mut command: Command, args: &[&str]) -> Command {
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("HOME", self.scratch.join("home")).env("CAIFS_CONFIG_DIR", self.scratch.join("etc"));
        command.args(args).current_dir(&*self.scratch);
        command
    }

    fn caifs(&self, args: &[&str]) -> Command {
        self.command(caifs(), args)
    }

    /// The line that `caifs config` has for an option, without its padding.
    fn line(&self, args: &[&str], variables: &[(&str, &str)], name: &str) -> String {
        let mut command = self.caifs(&[&["config"][..], args].concat());
        let text = run(command.envs(variables.iter().copied())).ok().text();
        let line = text.lines().find(|line| line.starts_with(&format!("{name} = ")));
        let line = line.unwrap_or_else(|| panic!("no {name} in\n{text}"));
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

#[test]
fn each_layer_wins_over_those_before_and_says_so() {
    let place = Place::new();
    let at = ["s3+http://h/b"];
    assert_eq!(place.line(&at, &[], "error-retry"), "error-retry = 3 # default");
    let desync = r#"{"store-options": {"s3+http://h/*": {"error-retry": 4}}, "s3-credentials": {"http://h": {"access-key": "x", "secret-key": "y"}}}"#;
    let path = place.file("home/.config/desync/config.json", desync);
    assert_eq!(place.line(&at, &[], "error-retry"), format!("error-retry = 4 # {}", shown(&path)));
    assert_eq!(place.line(&at, &[], "s3-access-key"), format!("s3-access-key = \"***\" # {}", shown(&path)));
    for (file, n) in [("etc/caifs.toml", 5), ("etc/conf.d/x.toml", 6), ("home/.config/caifs/caifs.toml", 7)] {
        let path = place.file(file, &format!("[mount]\nmemory = \"{n}G\"\n[store]\nerror-retry = {n}\n"));
        assert_eq!(place.line(&at, &[], "error-retry"), format!("error-retry = {n} # {}:4", shown(&path)));
        assert_eq!(place.line(&[], &[], "memory"), format!("memory = \"{n}G\" # {}:2", shown(&path)));
    }
    let keys = [("S3_ACCESS_KEY", "a"), ("S3_SECRET_KEY", "b"), ("CASYNC_SSH_PATH", "myssh")];
    assert_eq!(place.line(&at, &keys, "s3-access-key"), "s3-access-key = \"***\" # environment S3_ACCESS_KEY");
    assert_eq!(
        place.line(&["ssh://h/x"], &keys, "ssh-program"),
        "ssh-program = \"myssh\" # environment CASYNC_SSH_PATH"
    );
    for flag in [&["-e", "8"][..], &["--error-retry=8"]] {
        assert_eq!(place.line(&[&at[..], flag].concat(), &[], "error-retry"), "error-retry = 8 # flag --error-retry");
    }
    let explicit = place.file("other.conf", "[store]\nerror-retry = 9\n");
    let line = place.line(&["s3+http://h/b", "--config", "other.conf"], &[], "error-retry");
    assert_eq!(line, format!("error-retry = 9 # {}:2", shown(&explicit)));
    assert_eq!(place.line(&["--config", "other.conf"], &[], "memory"), "memory = \"256M\" # default");
    let before_the_verb = run(&mut place.caifs(&["--config", "other.conf", "config"])).ok().text();
    assert!(before_the_verb.contains("error-retry = 9"), "{before_the_verb}");
}

#[test]
fn secrets_are_shown_nowhere() {
    let place = Place::new();
    let toml = format!(
        "[store]\nhttp-auth = \"{SECRET}\"\nhttp-cookie = {{ command = [\"echo\", \"{SECRET}\"] }}\n\
         [[stores]]\nlocation = \"http://u:{SECRET}@h/**\"\nencryption = true\nencryption-key = \"{SECRET}\"\n\
         [mount]\nstore = [\"http://u:{SECRET}@h/x\"]\ncache = \"http://u:{SECRET}@h/y\"\n"
    );
    place.file("home/.config/caifs/caifs.toml", &toml);
    let json =
        format!(r#"{{"oci-credentials": {{"oci+http://u:{SECRET}@h/r": {{"username": "u", "secret": "{SECRET}"}}}}}}"#);
    place.file("home/.config/desync/config.json", &json);
    place.file("x.caibx", "no index");
    let variables = ["S3_ACCESS_KEY", "S3_SECRET_KEY", "S3_SESSION_TOKEN", "DESYNC_ENCRYPTION_KEY"];
    let address = format!("http://u:{SECRET}@h/x");
    let group = format!("{address}|s3+http://h/b|oci+http://u:{SECRET}@h/r");
    for args in [
        &["config"][..],
        &["config", "--json"],
        &["config", &group],
        &["config", &group, "--json"],
        &["config", "-c", &address],
        &["cat", "-s", &address, "x.caibx"],
        &["info", "-s", &address, "x.caibx"],
        &["make", "-s", &address, "y.caibx", "x.caibx"],
        &["mount", "-s", &address, "x.caibx", "."],
        &["mount", "-o", &format!("store={address},error-retry=x"), "x.caibx", "."],
    ] {
        let mut command = place.caifs(args);
        command.arg("-vv").envs(variables.iter().map(|name| (*name, SECRET)));
        let Finished { stdout, stderr, .. } = run(&mut command);
        let stdout = String::from_utf8_lossy(&stdout);
        assert!(!stdout.contains(SECRET) && !stderr.contains(SECRET), "{args:?}\n{stdout}\n{stderr}");
    }
    let parsed: serde_json::Value =
        serde_json::from_slice(&run(&mut place.caifs(&["config", "--json"])).ok().stdout).unwrap();
    assert_eq!(parsed[1]["options"]["http-auth"]["value"], "\"***\"");
}

/// A store under two encryptions: what is read with the right key is right, with another one an error of one line.
#[test]
fn a_key_comes_from_a_file_a_command_and_the_environment() {
    const KEY: &str = "d69371915dbc4b1f0ec55e2a80f0e089accf4b32e0f8dc0e29fed7f0f30d1b26";
    let place = Place::new();
    let content = crate::support::blob::noise(300_000);
    fs::write(place.scratch.join("blob"), &content).unwrap();
    place.file("key", &format!("{KEY}\n"));
    let say = place.file("say-key", "#!/bin/sh\ncat \"$1\"\n");
    fs::set_permissions(&say, fs::Permissions::from_mode(0o700)).unwrap();
    for (n, key) in [
        "encryption-key = { file = \"key\" }".to_owned(),
        "encryption-key = { command = [\"./say-key\", \"key\"] }".to_owned(),
        format!("encryption-key = \"{KEY}\""),
        String::new(),
    ]
    .into_iter()
    .enumerate()
    {
        let config = format!("[[stores]]\nlocation = \"s{n}\"\nencryption = true\n{key}\n");
        place.file("c.toml", &config);
        let (store, index) = (format!("s{n}"), format!("{n}.caibx"));
        let with_env = |args: &[&str]| {
            let mut command = place.caifs(args);
            if key.is_empty() {
                command.env("DESYNC_ENCRYPTION_KEY", KEY);
            }
            run(&mut command).ok()
        };
        with_env(&["--config", "c.toml", "make", "-s", &store, &index, "blob"]);
        let stored = run(Command::new("find").arg(place.scratch.join(&store)).args(["-type", "f"])).ok().text();
        assert!(stored.lines().count() > 1, "{stored}");
        assert!(stored.lines().all(|name| name.ends_with(".cacnk.xchacha20-poly1305-511a735b")), "{stored}");
        assert!(with_env(&["cat", "--config", "c.toml", "-s", &store, &index]).stdout == content, "{key}");
    }
    place.file("c.toml", "[[stores]]\nlocation = \"s0\"\nencryption = true\nencryption-key = { file = \"none\" }\n");
    let error = run(&mut place.caifs(&["cat", "--config", "c.toml", "-s", "s0", "0.caibx"])).fails();
    let line = error.error_line();
    let origin = shown(&place.scratch.join("c.toml"));
    assert!(line.contains(&format!("s0: encryption-key ({origin}:4): secret file ")), "{line}");
    assert!(line.ends_with("none: No such file or directory"), "{line}");
    place.file("c.toml", "[store]\nencryption = true\nencryption-key = { command = [\"false\"] }\n");
    let error = run(&mut place.caifs(&["cat", "--config", "c.toml", "-s", "s0", "0.caibx"])).fails();
    assert!(error.error_line().contains("command false for a secret: it failed (exit status: 1)"));
}

#[test]
fn desyncs_file_is_read_as_desync_reads_it() {
    let Some(desync) = peer("desync") else { return };
    let place = Place::new();
    let content = crate::support::blob::noise(300_000);
    fs::write(place.scratch.join("blob"), &content).unwrap();
    let file = r#"{
        "s3-credentials": {"http://localhost": {"access-key": "a", "secret-key": "b"}},
        "store-options": {
            "https://h/*/": {"timeout": 1000000000, "error-retry": 2, "trust-insecure": true},
            "plain*": {"uncompressed": true}
        }
    }"#;
    place.file("config.json", file);
    let printed = run(&mut place.command(desync.command(), &["--config", "config.json", "config"])).ok().text();
    // What desync makes of it is the same to us.
    place.file("printed.json", &printed);
    let of = |file: &str, location: &str| {
        let text = run(&mut place.caifs(&["config", "--config", file, location])).ok().text();
        let text = text.replace(&format!("# {}", shown(&place.scratch.join(file))), "# FILE");
        // desync prints its own defaults as if they were set; its waits are of another kind than ours.
        let is_own = |line: &&str| !line.starts_with("error-retry-base-interval") && !line.contains("error-retry = 3");
        text.lines().filter(is_own).collect::<Vec<_>>().join("\n")
    };
    for location in ["s3+http://localhost/b", "https://h/x", "https://h/x/y", "plain-1", "other"] {
        assert_eq!(of("config.json", location), of("printed.json", location), "{location}\n{printed}");
    }
    assert!(of("config.json", "https://h/x/").contains("timeout = \"1s\""));
    assert!(of("config.json", "https://h/x/y").contains("timeout = \"60s\""));

    // A store that desync writes uncompressed because its file says so is read by us for the same reason, and the other way round.
    for store in ["plain-1", "plain-2"] {
        fs::create_dir(place.scratch.join(store)).unwrap();
    }
    let theirs = ["--config", "config.json", "make", "-s", "plain-1", "1.caibx", "blob"];
    run(&mut place.command(desync.command(), &theirs)).ok();
    assert!(
        run(&mut place.caifs(&["cat", "--config", "config.json", "-s", "plain-1", "1.caibx"])).ok().stdout == content
    );
    run(&mut place.caifs(&["--config", "config.json", "make", "-s", "plain-2", "2.caibx", "blob"])).ok();
    let stored = run(Command::new("find").arg(place.scratch.join("plain-2")).args(["-type", "f"])).ok().text();
    assert!(!stored.is_empty() && !stored.contains(".cacnk"), "{stored}");
    let theirs = ["--config", "config.json", "cat", "-s", "plain-2", "2.caibx"];
    assert!(run(&mut place.command(desync.command(), &theirs)).ok().stdout == content);
}

#[test]
fn a_store_file_stands_in_place_of_stores() {
    let place = Place::new();
    let content = crate::support::blob::noise(100_000);
    fs::write(place.scratch.join("blob"), &content).unwrap();
    run(&mut place.caifs(&["make", "-s", "s", "x.caibx", "blob"])).ok();
    place.file("stores.json", r#"{"stores": ["s"]}"#);
    let cat = run(&mut place.caifs(&["cat", "--store-file", "stores.json", "x.caibx"])).ok();
    assert!(cat.stdout == content);
    let both = run(&mut place.caifs(&["cat", "--store-file", "stores.json", "-s", "s", "x.caibx"])).fails();
    assert!(both.error_line().contains("cannot be used with"), "{}", both.stderr);
    let both = run(&mut place.caifs(&["mount", "-o", "store-file=stores.json,store=s", "x.caibx", "."])).fails();
    assert!(both.error_line().contains("store-file names the stores"), "{}", both.stderr);
    let flags = ["-n", "4", "-e", "1", "-b", "1.5s", "-r", "-t", "--io-timeout", "1m"];
    assert!(run(place.caifs(&["cat", "-s", "s", "x.caibx"]).args(flags)).ok().stdout == content);
    let unheard = run(&mut place.caifs(&["cat", "-s", "s", "x.caibx", "--cache-repair=no"])).ok();
    assert!(unheard.stdout == content && unheard.stderr.contains("--cache-repair=no"), "{}", unheard.stderr);
}

#[test]
fn mistakes_are_one_line_with_their_place() {
    let place = Place::new();
    let toml = place.file("c.toml", "");
    place.file("x.caibx", "");
    let error = |text: &str, args: &[&str]| {
        fs::write(&toml, text).unwrap();
        let finished = run(&mut place.caifs(&[args, &["--config", "c.toml"]].concat())).fails();
        finished.error_line().to_owned()
    };
    let start = format!("caifs: {}:", shown(&toml));
    for (text, why) in [
        ("[store]\nerorr-retry = 1\n", "2: store: unknown key \"erorr-retry\" (did you mean \"error-retry\"?)"),
        ("[mount]\n\nmemroy = 1\n", "3: mount: unknown key \"memroy\" (did you mean \"memory\"?)"),
        ("[mount]\nmemory = \"1k\"\n", "2: mount: memory: \"1k\" is not a size of at least 16M, such as 512M or 1G"),
        ("[mount]\nerror-retry = 1\n", "2: mount: error-retry is for stores (put it into [store])"),
        ("[mount]\nconfig = \"x\"\n", "2: mount: a configuration file cannot name another"),
        ("[store\n", "1: not TOML: "),
    ] {
        for args in [&["config"][..], &["cat", "-s", ".", "x.caibx"], &["mount", "x.caibx", "."]] {
            let line = error(text, args);
            assert!(line.starts_with(&format!("{start}{why}")), "{args:?}: {line}");
        }
    }
    for (args, why) in [
        (&["cat", "--config", "none.toml", "x.caibx"][..], "none.toml: No such file or directory"),
        (&["cat", "-e", "x", "x.caibx"], "--error-retry: \"x\" is not a number from 0 to 1000"),
        (&["cat", "-b", "1x", "x.caibx"], "--error-retry-base-interval: \"1x\" is not a time above 0"),
        (&["cat", "--offline", "x.caibx"], "offline needs a cache"),
        (&["cat", "--cache-size", "much", "x.caibx"], "--cache-size: \"much\" is not a size above 0"),
        (&["config", "ftp://h"], "ftp://h: unknown scheme ftp://"),
        (&["mount", "-o", "config=none.toml", "x.caibx", "."], "none.toml: No such file or directory"),
        (
            &["mount", "-o", "eror-retry=1", "x.caibx", "."],
            "unknown mount option \"eror-retry\" (did you mean \"error-retry\"?)",
        ),
    ] {
        let finished = run(&mut place.caifs(args)).fails();
        assert!(finished.error_line().contains(why), "{args:?}: {}", finished.stderr);
    }
}

#[test]
fn a_mount_takes_its_options_from_files_and_its_own_over_them() {
    let place = Place::new();
    let content = crate::support::blob::noise(100_000);
    fs::write(place.scratch.join("blob"), &content).unwrap();
    run(&mut place.caifs(&["make", "-s", "s", "x.caibx", "blob"])).ok();
    let mnt = place.scratch.dir("mnt");
    place.file("home/.config/caifs/caifs.toml", "[mount]\nstore = \"../../../s\"\nuid = 4711\nmemory = \"32M\"\n");
    place.file("other.toml", "[mount]\nstore = \"none\"\nuid = 4712\n");
    for (args, uid) in
        [(&[][..], 4711), (&["-o", "config=other.toml,store=s"], 4712), (&["-s", "s", "--uid", "4713"], 4713)]
    {
        run(place.caifs(&["mount", "x.caibx", "mnt"]).args(args)).ok();
        let metadata = fs::metadata(mnt.join("x")).unwrap();
        assert_eq!(std::os::unix::fs::MetadataExt::uid(&metadata), uid, "{args:?}");
        assert!(fs::read(mnt.join("x")).unwrap() == content, "{args:?}");
        run(&mut place.caifs(&["umount", "mnt"])).ok();
    }
    let missing = run(&mut place.caifs(&["mount", "--config", "other.toml", "x.caibx", "mnt"])).fails();
    assert!(missing.error_line().contains(&shown(&place.scratch.join("none"))), "{}", missing.stderr);
}

#[test]
fn paths_for_mounts_begin_where_their_file_lies_or_at_home() {
    let place = Place::new();
    let paths = "cache = \"~/cache\"\nbacking = \"plain\"\nprofile = \"~/p\"\nrecord = \"../r\"\n";
    let file = place.file("home/.config/caifs/caifs.toml", &format!("[mount]\n{paths}store = \"a|~/b|https://h/s\"\n"));
    let (home, dir) = (shown(&place.scratch.join("home")), shown(file.parent().unwrap()));
    for (name, wanted) in [
        ("cache", format!("\"{home}/cache\"")),
        ("backing", format!("\"{dir}/plain\"")),
        ("profile", format!("\"{home}/p\"")),
        ("record", format!("\"{dir}/../r\"")),
        ("store", format!("[\"{dir}/a|{home}/b|https://h/s\"]")),
    ] {
        let line = place.line(&[], &[], name);
        assert!(line.starts_with(&format!("{name} = {wanted} ")), "{line}");
    }
}

#[test]
fn what_is_for_root_only_is_left_out_for_others_and_what_is_for_everybody_is_warned_of() {
    // The scratch directory may lie in a home that is closed to others.
    let place = Place { scratch: Scratch::new_for_all() };
    fs::set_permissions(&*place.scratch, fs::Permissions::from_mode(0o750)).unwrap();
    let path = place.file("etc/caifs.toml", "[store]\nerror-retry = 9\nhttp-auth = \"geheimnis-4711\"\n");
    let settings = |finished: Finished| {
        let finished = finished.ok();
        let line = finished.text().lines().find(|line| line.starts_with("error-retry")).map(str::to_owned);
        (line.unwrap().contains("= 9"), finished.stderr)
    };
    assert_eq!(settings(run(&mut place.caifs(&["config"]))), (true, String::new()));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(settings(run(&mut place.caifs(&["config"]))), (true, String::new()), "nobody else gets to it");
    fs::set_permissions(&*place.scratch, fs::Permissions::from_mode(0o755)).unwrap();
    let (is_read, said) = settings(run(&mut place.caifs(&["config"])));
    let shown = path.display();
    let wanted = format!(
        "{shown}:3: everybody can read the secret http-auth (chmod 600 {shown}, or {{ file = … }} instead of a text)"
    );
    assert!(is_read && said.lines().count() == 1 && said.contains(&wanted), "{said}");
    assert!(!said.contains(SECRET));

    let Some(setpriv) = peer("setpriv").filter(|_| nix::unistd::geteuid().is_root()) else { return };
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    // The program itself may lie where nobody else can go.
    let program = place.scratch.join("caifs");
    fs::copy(env!("CARGO_BIN_EXE_caifs"), &program).unwrap();
    let mut by_another = setpriv.command();
    by_another.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]).arg(&program);
    assert_eq!(settings(run(&mut place.command(by_another, &["config"]))), (false, String::new()));
    let mut named = setpriv.command();
    named.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]).arg(&program).arg("--config").arg(&path);
    let refused = run(&mut place.command(named, &["config"])).fails();
    assert!(refused.error_line().contains("Permission denied"), "{}", refused.stderr);
}
