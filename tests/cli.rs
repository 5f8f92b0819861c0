//! The command line: every verb's help, exit codes, one-line errors, and outputs against the files and against desync.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::mount::can_mount;
use crate::support::blob::{Xorshift, noise};
use crate::support::corner::Corner;
use crate::support::mounted::mountpoints_under;
use crate::support::peers::peer;
use crate::support::run::{self, Finished, TIME_LIMIT, caifs, run};
use crate::support::scratch::Scratch;

type Names = &'static [&'static str];

/// Flags that several verbs share.
const ACCESS: Names = &[
    "--client-cert",
    "--client-key",
    "--ca-cert",
    "-t, --trust-insecure",
    "-e, --error-retry",
    "-b, --error-retry-base-interval",
    "-r, --cache-repair[=<YES>]",
];
const STORES: Names = &[
    "-s, --store",
    "-c, --cache",
    "--cache-size",
    "--cache-keep-free",
    "--offline",
    "--store-file",
    "--io-timeout",
    "-n, --concurrency",
];

/// Flags of every verb that reads an index.
const TRUST: Names = &["--index-sha256", "--verify-key"];

const MOUNT: Names = &[
    "-o, --options",
    "-f, --foreground",
    "--memory",
    "--allow-other[=<YES>]",
    "--uid",
    "--gid",
    "--umask",
    "--uid-shift",
    "--keep-suffix[=<YES>]",
    "--poll-interval",
    "--read-ahead",
    "--kernel-read-ahead",
    "--warm",
    "--warm-rate",
    "--profile",
    "--record",
    "--backing",
    "--passthrough[=<YES>]",
    "--metadata-table[=<YES>]",
    "--mount-timeout",
    "--log",
    "--log-level",
    "--setuid",
    "--sandbox[=<YES>]",
    "--check-store[=<YES>]",
    "--control[=<YES>]",
    "--metrics",
    "--access-trace",
];

const SERVER: Names = &[
    "-l, --listen",
    "--log",
    "--cert",
    "--key",
    "--mutual-tls",
    "--client-ca",
    "--authorization",
    "-n, --concurrency",
    "--digest",
];

/// Every verb with its arguments and flags.
const VERBS: [(&str, Names, &[Names]); 24] = [
    ("mount", &["<SPEC>", "<DIR>"], &[STORES, TRUST, ACCESS, MOUNT]),
    ("umount", &["<DIR>"], &[&["-z, --lazy"]]),
    ("status", &["[DIR]"], &[&["--json"]]),
    ("top", &["[DIR]"], &[&["-i, --interval", "-n, --count"]]),
    ("map", &["<DIR>"], &[&["--part", "--svg", "--width", "--json"]]),
    ("reload", &["[DIR]"], &[&["--all", "--json"]]),
    ("abort", &["<DIR>"], &[]),
    (
        "make",
        &["<INDEX>", "<FILE>"],
        &[
            ACCESS,
            &[
                "-s, --store",
                "-m, --chunk-size",
                "--cut-rule",
                "--digest",
                "--level",
                "-n, --concurrency",
                "--print-stats",
            ],
        ],
    ),
    (
        "tar",
        &["<OUT>", "<DIR>"],
        &[
            ACCESS,
            &[
                "-i, --index",
                "-s, --store",
                "-m, --chunk-size",
                "--cut-rule",
                "--digest",
                "--level",
                "-n, --concurrency",
                "--with",
                "--without",
                "-x, --one-file-system",
                "--no-time",
                "--metadata-table",
                "--print-stats",
            ],
        ],
    ),
    ("cat", &["<INDEX>", "[OUTPUT]"], &[STORES, TRUST, ACCESS, &["-o, --offset", "-l, --length", "-p, --path"]]),
    ("ls", &["<SPEC>", "[PATH]"], &[STORES, TRUST, ACCESS, &["-l, --long", "-R, --recursive", "--json"]]),
    ("warm", &["<SPEC>", "[PATH]..."], &[STORES, TRUST, ACCESS, &["--range", "--metadata", "--rate"]]),
    ("profile", &["<COMMAND>"], &[]),
    ("info", &["<INDEX>"], &[STORES, TRUST, ACCESS, &["-f, --format"]]),
    ("list-chunks", &["<INDEX>"], &[TRUST, ACCESS]),
    ("verify-index", &["<INDEX>", "<FILE>"], &[TRUST, ACCESS, &["-n, --concurrency"]]),
    (
        "sign",
        &["[INDEX]..."],
        &[ACCESS, &["-G, --generate", "-s, --secret-key", "-p, --public-key", "--trusted-comment", "--password-file"]],
    ),
    ("verify-signature", &["<INDEX>"], &[ACCESS, &["-p, --public-key"]]),
    ("s3-upgrade", &[], &[ACCESS, &["-s, --store", "-n, --concurrency"]]),
    (
        "chunk-server",
        &[],
        &[
            SERVER,
            ACCESS,
            &[
                "-s, --store",
                "-c, --cache",
                "--store-file",
                "-w, --writable",
                "--skip-verify-read[=<BOOL>]",
                "--skip-verify-write[=<BOOL>]",
                "-u, --uncompressed",
                "--encryption",
                "--encryption-key",
                "--encryption-algorithm",
            ],
        ],
    ),
    ("index-server", &[], &[SERVER, ACCESS, &["-s, --store", "-w, --writable"]]),
    ("config", &["[LOCATION]"], &[STORES, TRUST, ACCESS, &["--json"]]),
    ("completions", &["<SHELL>"], &[]),
    ("demo", &["[DIR]"], &[]),
];

/// A blob with its index and store, cut into small chunks.
struct Setting {
    scratch: Scratch,
    blob: Vec<u8>,
}

impl Setting {
    fn new() -> Self {
        let scratch = Scratch::new();
        let mut blob = noise(700_000);
        blob[200_000..500_000].fill(0);
        let file = scratch.file("blob", &blob);
        let (index, store) = (scratch.join("blob.caibx"), scratch.join("default.castr"));
        run(caifs().args(["make", "-m", "4:16:64", "-s"]).arg(store).arg(index).arg(file)).ok();
        Self { scratch, blob }
    }

    /// Runs caifs where the files are.
    fn caifs(&self, args: &[&str]) -> Finished {
        run(caifs().current_dir(&*self.scratch).args(args))
    }

    /// The file of each chunk, in the order of the index.
    fn chunks(&self) -> Vec<PathBuf> {
        let ids = self.caifs(&["list-chunks", "blob.caibx"]).ok().text();
        ids.lines().map(|id| self.scratch.join("default.castr").join(&id[..4]).join(format!("{id}.cacnk"))).collect()
    }
}

/// One line on stderr that begins as all our errors do, and exit code 1.
#[track_caller]
pub fn one_line(failed: Finished) -> String {
    let failed = failed.fails();
    assert_eq!(failed.status.code(), Some(1), "{}", failed.command);
    let line = failed.error_line();
    assert!(line.starts_with("caifs: "), "{}: {line}", failed.command);
    assert!(!line.contains("os error"), "{}: {line}", failed.command);
    line.to_owned()
}

#[test]
fn help_names_every_verb_argument_and_flag() {
    let top = run(caifs().arg("--help")).ok().text();
    assert_eq!(run(caifs().arg("-h")).ok().text(), top);
    for (verb, arguments, flags) in VERBS {
        assert!(top.lines().any(|line| line.trim_start().starts_with(&format!("{verb} "))), "{verb}: {top}");
        let help = run(caifs().args([verb, "--help"])).ok();
        assert!(help.stderr.is_empty());
        let help = help.text();
        let usage = help.lines().find(|line| line.starts_with("Usage: ")).unwrap();
        assert!(arguments.iter().all(|argument| usage.contains(argument)), "{usage}");
        let shown: Vec<&str> = help.lines().map(str::trim_start).filter(|line| line.starts_with('-')).collect();
        let flags = [&flags.concat()[..], &["-v, --verbose", "--config", "-h, --help"]].concat();
        for flag in &flags {
            let line = shown.iter().find(|line| {
                line.strip_prefix(flag).is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '.']))
            });
            assert!(line.is_some(), "{verb}: {flag} is not in {help}");
        }
        assert_eq!(shown.len(), flags.len(), "a flag that no test knows: {help}");
    }
    let version = run(caifs().arg("--version")).ok().text();
    assert_eq!(version, format!("caifs {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn wrong_arguments_are_one_line_with_what_to_do() {
    let setting = Setting::new();
    let cases: [(&[&str], &[&str]); 22] = [
        (&["nonsense"], &["nonsense", "--help"]),
        (&["mnt"], &["mnt"]),
        (&["info", "--nonsense", "blob.caibx"], &["--nonsense"]),
        (&["info"], &["<INDEX>"]),
        (&["info", "a", "b"], &["'b'"]),
        (&["cat", "-o", "x", "blob.caibx"], &["'x'", "--offset"]),
        (&["cat", "-l", "-1", "blob.caibx"], &["-1"]),
        (&["info", "-f", "xml", "blob.caibx"], &["xml", "json", "plain"]),
        (&["ls", "-l", "--json", "x.catar"], &["--long", "--json"]),
        (&["make", "x.caibx", "blob", "--digest", "md5"], &["md5", "sha256"]),
        (&["make", "x.caibx", "blob", "--cut-rule", "git"], &["git", "desync"]),
        (&["make", "x.caibx", "blob", "--level", "23"], &["23", "22"]),
        (&["make", "x.caibx", "blob", "-m", "64:16:256"], &["chunk sizes"]),
        (&["make", "x.caibx", "blob", "-m", "a:b"], &["a:b"]),
        (&["make", "x.caibx", "blob", "-s", "ftp://localhost/"], &["ftp://", "known are"]),
        (&["make", "x.caidx", "absent"], &["absent"]),
        (&["make", "nowhere/x.caibx", "blob"], &["nowhere/x.caibx"]),
        (&["tar", "x.catar", ".", "-s", "x.castr"], &["--index"]),
        (&["tar", "-i", "x.caidx", "."], &["--store"]),
        (&["tar", "x.caidx", "."], &["x.caidx", ".catar"]),
        (&["tar", "x.catar", ".", "--with", "colours"], &["colours"]),
        (&["tar", "x.catar", "absent"], &["absent", "No such file"]),
    ];
    for (args, wanted) in cases {
        let line = one_line(setting.caifs(args));
        assert!(wanted.iter().all(|part| line.contains(part)), "{args:?}: {line}");
    }
    assert!(one_line(setting.caifs(&["tar", "x.catar", "blob"])).contains("blob"), "a file is no directory");
    assert!(one_line(setting.caifs(&["umount", "."])).contains("not"), "nothing is mounted there");
    // Nothing is left of what failed.
    let mut names: Vec<_> = fs::read_dir(&*setting.scratch).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["blob", "blob.caibx", "default.castr"]);
    assert_eq!(run(&mut caifs()).fails().status.code(), Some(1), "no verb");
}

#[test]
fn wrong_files_are_one_line_that_names_them() {
    let setting = Setting::new();
    let index = fs::read(setting.scratch.join("blob.caibx")).unwrap();
    setting.scratch.file("cut.caibx", &index[..index.len() - 1]);
    setting.scratch.file("longer.caibx", [&index[..], b"x"].concat());
    setting.scratch.file("text.caibx", "some text that is longer than the header of an index, so that it is looked at");
    setting.scratch.file("empty.caibx", "");
    setting.scratch.file("x.catar", include_bytes!("data/casync.catar"));
    setting.scratch.file("archive.caibx", include_bytes!("data/casync.catar"));
    setting.scratch.file("index.catar", &index);
    setting.scratch.dir("dir.caibx");
    let bad = ["absent.caibx", "cut.caibx", "longer.caibx", "text.caibx", "empty.caibx", "archive.caibx", "dir.caibx"];
    for verb in ["cat", "ls", "info", "list-chunks", "verify-index"] {
        for name in bad {
            let args = if verb == "verify-index" { vec![verb, name, "blob"] } else { vec![verb, name] };
            let line = one_line(setting.caifs(&args));
            assert!(line.contains(name), "{verb}: {line}");
        }
    }
    for (args, wanted) in [
        (&["ls", "blob.caibx"][..], "not of a directory tree"),
        (&["ls", "index.catar"], "index.catar"),
        (&["cat", "--path", "x", "blob.caibx"], "not of a directory tree"),
        (&["ls", "x.catar", "absent"], "absent: no such file"),
        (&["ls", "x.catar", "a.txt/x"], "not a directory"),
        (&["cat", "x.catar", "--path", "absent"], "absent: no such file"),
        (&["cat", "x.catar", "--path", "/"], "directory"),
        (&["cat", "blob.caibx", "-s", "absent.castr"], "absent.castr"),
        (&["cat", "blob.caibx", "-s", "blob"], "blob"),
        (&["cat", "blob.caibx", "nowhere/out"], "nowhere/out"),
        (&["tar", "/dev/full", "dir.caibx"], "/dev/full: No space left"),
        (&["info", "blob.caibx", "-s", "absent.castr"], "absent.castr"),
        (&["verify-index", "blob.caibx", "absent"], "absent"),
        (&["verify-index", "blob.caibx", "."], ".: "),
    ] {
        let line = one_line(setting.caifs(args));
        assert!(line.contains(wanted), "{args:?}: {line}");
    }
    fs::rename(setting.scratch.join("default.castr"), setting.scratch.join("other.castr")).unwrap();
    let line = one_line(setting.caifs(&["cat", "blob.caibx"]));
    assert!(line.contains("default.castr") && line.contains("-s"), "{line}");
    setting.caifs(&["cat", "blob.caibx", "-s", "other.castr"]).ok();
}

#[test]
fn cat_gives_the_bytes_of_any_range() {
    let setting = Setting::new();
    let blob = &setting.blob;
    assert!(setting.caifs(&["cat", "blob.caibx"]).ok().stdout == *blob);
    assert!(setting.caifs(&["cat", "blob.caibx", "-"]).ok().stdout == *blob);
    setting.caifs(&["cat", "-o", "5", "blob.caibx", "out"]).ok();
    assert!(fs::read(setting.scratch.join("out")).unwrap() == blob[5..]);
    let mut random = Xorshift::seeded(21);
    for _ in 0..30 {
        let offset = random.below(blob.len() as u64 + 1) as usize;
        let length = random.below((blob.len() - offset) as u64 + 1) as usize;
        let (offset_text, length_text) = (offset.to_string(), length.to_string());
        let read = setting.caifs(&["cat", "-o", &offset_text, "-l", &length_text, "blob.caibx"]).ok().stdout;
        let end = if length == 0 { blob.len() } else { offset + length };
        assert!(read == blob[offset..end], "{length} bytes from {offset}");
    }
    // At the end there is nothing; past it is an error; what reaches past it gives what there is, and is an error too.
    for (args, wanted, is_error) in [
        (["-o", "700000", "-l", "0"], &b""[..], false),
        (["-o", "700001", "-l", "0"], b"", true),
        (["-o", "18446744073709551615", "-l", "1"], b"", true),
        (["-o", "699990", "-l", "11"], &blob[699_990..], true),
        (["-o", "699990", "-l", "18446744073709551615"], &blob[699_990..], true),
        (["-o", "700000", "-l", "1"], b"", true),
    ] {
        let ours = setting.caifs(&[&["cat"], &args[..], &["blob.caibx"]].concat());
        assert!(ours.stdout == wanted, "{args:?}");
        if let Some(desync) = peer("desync") {
            let offset_fits = !args[1].starts_with("184") && !args[3].starts_with("184");
            let mut cat = desync.command();
            cat.current_dir(&*setting.scratch).args(["cat", "-s", "default.castr"]).args(args).arg("blob.caibx");
            let theirs = run(&mut cat);
            assert!(!offset_fits || (theirs.stdout == wanted && theirs.status.success() != is_error), "{args:?}");
        }
        match is_error {
            true => assert!(one_line(ours).contains("blob.caibx"), "{args:?}"),
            false => drop(ours.ok()),
        }
    }
}

#[test]
fn cat_without_a_chunk_is_an_error_and_leaves_the_old_output() {
    let setting = Setting::new();
    let chunks = setting.chunks();
    let (last, first) = (chunks.last().unwrap(), chunks.first().unwrap());
    let stored = fs::read(last).unwrap();
    setting.scratch.file("out", "what was there");
    for damage in [None, Some(&b""[..]), Some(&stored[..stored.len() - 1]), Some(b"no zstd at all")] {
        let _ = fs::remove_file(last);
        if let Some(bytes) = damage {
            fs::write(last, bytes).unwrap();
        }
        let id = last.file_stem().unwrap().to_str().unwrap();
        let failed = setting.caifs(&["cat", "blob.caibx"]);
        assert!(setting.blob.starts_with(&failed.stdout), "nothing wrong is written");
        assert!(one_line(failed).contains(id));
        assert!(one_line(setting.caifs(&["cat", "blob.caibx", "out"])).contains(id));
        assert_eq!(fs::read(setting.scratch.join("out")).unwrap(), b"what was there");
        // What does not need the chunk works.
        assert!(setting.caifs(&["cat", "-l", "1000", "blob.caibx"]).ok().stdout == setting.blob[..1000]);
    }
    // The second store is asked for what the first does not have.
    let second = setting.scratch.join("second.castr");
    let place = second.join(last.strip_prefix(setting.scratch.join("default.castr")).unwrap());
    fs::create_dir_all(place.parent().unwrap()).unwrap();
    fs::write(place, &stored).unwrap();
    fs::remove_file(last).unwrap();
    assert!(first.exists());
    let both = setting.caifs(&["cat", "-s", "default.castr", "-s", "second.castr", "blob.caibx"]).ok();
    assert!(both.stdout == setting.blob);
}

#[test]
fn info_list_chunks_and_verify_index_tell_what_desync_tells() {
    let setting = Setting::new();
    setting.scratch.file("nothing", "");
    setting.caifs(&["make", "nothing.caibx", "nothing"]).ok();
    let (files, indexes) = (["blob", "nothing"], ["blob.caibx", "nothing.caibx"]);
    fs::remove_file(&setting.chunks()[1]).unwrap();
    let theirs =
        |args: &[&str]| Some(run(peer("desync")?.command().current_dir(&*setting.scratch).args(args)).ok().text());
    for index in indexes {
        for args in [
            &["info", index][..],
            &["info", "-f", "plain", index],
            &["info", "--format=json", "-s", "default.castr", index],
            &["info", "-f", "plain", "-s", "default.castr", index],
            &["list-chunks", index],
        ] {
            let ours = setting.caifs(args).ok().text();
            if let Some(theirs) = theirs(args) {
                assert_eq!(ours.trim_end(), theirs.trim_end(), "{args:?}");
            }
        }
    }
    let json: serde_json::Value =
        serde_json::from_str(&setting.caifs(&["info", "blob.caibx", "-s", "default.castr"]).ok().text()).unwrap();
    assert_eq!(json["size"], 700_000);
    assert_eq!(json["in-store"].as_u64().unwrap() + 1, json["unique"].as_u64().unwrap());
    for (file, index) in files.into_iter().zip(indexes) {
        let good = setting.caifs(&["verify-index", index, file]).ok();
        assert!(good.stdout.is_empty() && good.stderr.is_empty());
        theirs(&["verify-index", index, file]);
    }
    let mut wrong = setting.blob.clone();
    wrong[699_999] ^= 1;
    setting.scratch.file("wrong", wrong);
    assert!(one_line(setting.caifs(&["verify-index", "blob.caibx", "wrong"])).contains("wrong"));
    assert!(one_line(setting.caifs(&["verify-index", "-n", "1", "nothing.caibx", "wrong"])).contains("wrong"));
}

#[test]
fn stats_are_json_on_stderr() {
    let setting = Setting::new();
    let made = setting.caifs(&["make", "--print-stats", "again.caibx", "blob"]).ok();
    let stats: serde_json::Value = serde_json::from_str(&made.stderr).unwrap();
    let n_chunks = setting.caifs(&["list-chunks", "again.caibx"]).ok().text().lines().count();
    assert_eq!(stats["ChunksAccepted"], n_chunks);
    assert!(made.stdout.is_empty() && stats["ChunksProduced"].as_u64() >= stats["ChunksAccepted"].as_u64());
    fs::create_dir(setting.scratch.join("dir")).unwrap();
    let packed = setting.caifs(&["tar", "-i", "-s", "t.castr", "--print-stats", "-", "dir"]).ok();
    fs::write(setting.scratch.join("t.caidx"), &packed.stdout).unwrap();
    let stats: serde_json::Value = serde_json::from_str(&packed.stderr).unwrap();
    assert_eq!(stats["ChunksAccepted"], 1);
    assert_eq!(setting.caifs(&["ls", "-s", "t.castr", "t.caidx"]).ok().text(), "");
    // To stdout and to a file it is the same archive.
    setting.caifs(&["tar", "t.catar", "dir"]).ok();
    assert!(setting.caifs(&["tar", "-", "dir"]).ok().stdout == fs::read(setting.scratch.join("t.catar")).unwrap());
}

/// Runs a command whose output is closed after its first bytes.
#[track_caller]
fn with_closed_output(command: &mut Command) {
    let shown = run::shown(command);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap();
    let mut first = [0; 10];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let Some(status) = run::wait(&mut child, TIME_LIMIT) else {
        run::kill_group(&mut child);
        panic!("{shown}: goes on after its output was closed");
    };
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert!(status.success() && stderr.is_empty(), "{shown}: {status} {stderr}");
}

#[test]
fn a_reader_that_goes_away_is_no_error_and_a_full_disk_is_one() {
    let setting = Setting::new();
    let dir = setting.scratch.dir("dir");
    for i in 0..5000 {
        File::create_new(dir.join(format!("a file with quite a long name, number {i}"))).unwrap();
    }
    setting.caifs(&["tar", "t.catar", "dir"]).ok();
    setting.caifs(&["make", "-m", "1:1:1", "small.caibx", "t.catar"]).ok();
    let cases: [&[&str]; 6] = [
        &["cat", "blob.caibx"],
        &["ls", "t.catar"],
        &["ls", "-l", "t.catar"],
        &["ls", "--json", "-R", "t.catar"],
        &["list-chunks", "small.caibx"],
        &["tar", "-", "dir"],
    ];
    for args in cases {
        with_closed_output(caifs().current_dir(&*setting.scratch).args(args));
        if !Path::new("/dev/full").exists() {
            continue;
        }
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut command = caifs();
        let child =
            command.current_dir(&*setting.scratch).args(args).stdout(full).stderr(Stdio::piped()).spawn().unwrap();
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(
            stderr.starts_with("caifs: ") && stderr.contains("No space left") && stderr.lines().count() == 1,
            "{args:?}: {stderr}"
        );
    }
}

#[test]
fn the_demo_shows_it_and_leaves_nothing() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let (tmp, source, without_text) = (scratch.dir("tmp"), scratch.dir("source"), scratch.dir("without-text"));
    Corner { privileged: false, flags: false, ..Corner::ALL }.build(&source);
    fs::write(without_text.join("binary"), [0xff; 10]).unwrap();
    let demo = |dir: &[&Path]| run(caifs().arg("demo").args(dir).env("TMPDIR", &tmp));
    let check_left = || {
        assert_eq!(fs::read_dir(&tmp).unwrap().count(), 0, "a directory is left");
        assert!(mountpoints_under(&scratch).is_empty(), "a mount is left");
    };
    let shown = demo(&[&source]).ok().text();
    for part in ["caifs tar -i", "caifs mount", "caifs umount", "chunks fetched", "The same ", "Done."] {
        assert!(shown.contains(part), "{part} is not in:\n{shown}");
    }
    check_left();
    assert!(demo(&[]).ok().text().ends_with("Done.\n"));
    check_left();
    for (dir, wanted) in [(without_text, "no file with text"), (scratch.join("absent"), "absent")] {
        let failed = demo(&[&dir]).fails();
        assert!(failed.error_line().contains(wanted), "{}", failed.stderr);
        check_left();
    }
}
