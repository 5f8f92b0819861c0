//! `caifs ls` in all its forms against the tree that was packed.

use std::fs;

use crate::cli::one_line;
use crate::support::corner::Corner;
use crate::support::listing::tree_listing;
use crate::support::run::{caifs, run};
use crate::support::scratch::Scratch;

/// A line of `ls --json`.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    path: String,
    path_hex: Option<String>,
    r#type: String,
    mode: String,
    uid: u32,
    gid: u32,
    mtime_ns: i64,
    size: Option<u64>,
    target: Option<String>,
    target_hex: Option<String>,
    device: Option<(u64, u64)>,
}

/// The bytes that a text and, where they are no text, their hex digits stand for.
fn bytes(text: &str, hex: Option<&String>) -> Vec<u8> {
    let Some(hex) = hex else { return text.as_bytes().to_vec() };
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
}

#[test]
fn ls_shows_what_is_there() {
    let scratch = Scratch::new();
    let source = scratch.dir("source");
    Corner::ALL.build(&source);
    let archive = scratch.join("x.catar");
    run(caifs().arg("tar").arg(&archive).arg(&source)).ok();
    let ls = |args: &[&str]| run(caifs().env("TZ", "UTC").arg("ls").arg(&archive).args(args)).ok();
    let wanted = tree_listing(&source);
    let json = ls(&["-R", "--json"]).text();
    let lines: Vec<Line> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len() + 1, wanted.len());
    for line in &lines {
        let path = bytes(&line.path, line.path_hex.as_ref());
        let entry = wanted.get(&path).unwrap_or_else(|| panic!("{}", line.path));
        assert_eq!(line.path, String::from_utf8_lossy(&path));
        let is_regular = entry.mode & libc::S_IFMT == libc::S_IFREG;
        assert_eq!(line.size, entry.size.filter(|_| is_regular), "{}", line.path);
        assert_eq!(line.mode, format!("{:04o}", entry.mode & 0o7777));
        assert_eq!((line.uid, line.gid, line.device), (entry.uid, entry.gid, entry.device));
        assert_eq!(line.mtime_ns, entry.mtime.0 * 1_000_000_000 + entry.mtime.1, "{}", line.path);
        let target = line.target.as_ref().map(|target| bytes(target, line.target_hex.as_ref()));
        assert_eq!(target, entry.target, "{}", line.path);
        assert_eq!(line.r#type == "file", is_regular, "{}", line.path);
    }
    let types = |path: &str| lines.iter().find(|line| line.path == path).unwrap().r#type.clone();
    assert_eq!(
        [types("special/fifo"), types("special/socket"), types("acls"), types("links/loop")].join(" "),
        "fifo socket directory symlink"
    );

    let names = |dir: &str| {
        let mut names: Vec<String> = fs::read_dir(source.join(dir))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(ls(&[]).text().lines().collect::<Vec<_>>(), names(""));
    for path in [
        "contents",
        "/contents",
        "contents/",
        "./contents/../contents",
        "links/to-directory",
        "links/up-and-out/contents",
    ] {
        assert_eq!(ls(&[path]).text().lines().collect::<Vec<_>>(), names("contents"), "{path}");
    }
    assert_eq!(ls(&["contents/noise-1"]).text(), "contents/noise-1\n");
    assert_eq!(ls(&["contents/empty/emptier"]).text(), "");
    let long = ls(&["-l"]).text();
    let times = long.lines().find(|line| line.ends_with(" times")).unwrap();
    assert!(times.starts_with("drwxr-xr-x ") && times.contains(" 2009-02-13 23:31 "), "{times}");
    let file = ls(&["-l", "contents/mode-4755"]).text();
    assert!(file.starts_with("-rwsr-xr-x ") && file.split_whitespace().nth(3) == Some("4"), "{file}");
    assert!(ls(&["-l", "links"]).text().contains(" dangling -> no/such/file\n"));
    assert!(ls(&["names"]).stdout.windows(13).any(|bytes| bytes == b"\xff\xfe not UTF-8\n"), "names are raw bytes");
    let looping = one_line(run(caifs().arg("ls").arg(&archive).arg("links/loop")));
    assert!(looping.contains("symbolic links"), "{looping}");
}
