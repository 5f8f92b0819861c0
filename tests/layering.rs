//! The import table of the rooms, read from the sources: who may name whom.
//!
//! Imports go one way, `cli -> mount, pack, unpack, serve -> fuse -> volume -> tree -> blob -> cache -> store -> chunk ->
//! format -> digest`. Each room's row below is the whole of what it may name; a room that is not in the table fails.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Each room with the rooms it may name.
const ROOMS: &[(&str, &[&str])] = &[
    ("digest", &["sys"]),
    ("format", &["digest", "sys"]),
    ("chunk", &["format", "digest", "sys"]),
    ("report", &[]),
    ("config", &["store", "chunk", "format", "digest"]),
    ("store", &["chunk", "format", "digest", "report", "sys"]),
    ("cache", &["store", "chunk", "format", "digest", "config", "report", "sys"]),
    ("blob", &["cache", "store", "chunk", "format", "digest", "config", "report", "sys"]),
    ("tree", &["blob", "cache", "store", "chunk", "format", "digest", "config", "report", "sys"]),
    ("volume", &["tree", "blob", "cache", "store", "chunk", "format", "digest", "config", "report", "sys"]),
    ("fuse", BELOW_FUSE),
    ("mount", BELOW_SERVICES),
    ("pack", BELOW_SERVICES),
    ("unpack", BELOW_SERVICES),
    ("serve", BELOW_SERVICES),
    ("cli", BELOW_CLI),
    ("sys", &[]),
    // The program: from argv to the command line, nothing else.
    ("main", &["cli"]),
];

const BELOW_FUSE: &[&str] =
    &["volume", "tree", "blob", "cache", "store", "chunk", "format", "digest", "config", "report", "sys"];

const BELOW_SERVICES: &[&str] =
    &["fuse", "volume", "tree", "blob", "cache", "store", "chunk", "format", "digest", "config", "report", "sys"];

const BELOW_CLI: &[&str] = &[
    "mount", "pack", "unpack", "serve", "fuse", "volume", "tree", "blob", "cache", "store", "chunk", "format",
    "digest", "config", "report", "sys",
];

/// Words that stand in some rooms only, the first of which is theirs. `unseal` makes verified chunks without hashing: the disk tier,
/// which is in the cache, asks whose file it is before.
const CONFINED: &[(&str, &[&str])] =
    &[("fuser", &["fuse"]), ("clap", &["cli"]), ("unsafe", &["sys"]), ("unseal", &["cache", "chunk"])];

#[test]
fn every_room_names_only_the_rooms_below_it() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&src, &mut files);
    assert!(files.len() > 10, "the sources are read");
    let mut violations = Vec::new();
    for path in files {
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let relative = path.strip_prefix(&src).expect("below src");
        violations.extend(check(relative, &text));
    }
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

#[test]
fn a_violation_is_caught_however_it_is_written() {
    let wrong = [
        ("chunk/codec.rs", "use crate::store::Store;"),
        ("chunk/codec.rs", "use crate::{digest::ChunkId, store::{self, Store}};"),
        ("chunk/codec.rs", "fn f() { crate :: cache :: get() }"),
        ("chunk/codec.rs", "use super::super::cache;"),
        ("chunk/mod.rs", "use super::cache;"),
        ("chunk/mod.rs", "mod tests { use super::super::cache; }"),
        ("digest.rs", "use crate::*;"),
        ("blob/mod.rs", "use crate::tree::Tree;"),
        ("store/http.rs", "use crate::config::MountConfig;"),
        ("mount/mod.rs", "use crate::pack::make;"),
        ("volume/mod.rs", "use fuser::Errno;"),
        ("mount/mod.rs", "fn f(_: fuser::Session) {}"),
        ("config/mod.rs", "#[derive(clap::Args)] struct A;"),
        ("fuse/mod.rs", "unsafe { f() }"),
        ("blob/mod.rs", "use crate::chunk::seal::unseal;"),
        ("new_room/mod.rs", ""),
        ("main.rs", "fn main() { caifs::mount::run() }"),
        ("chunk/codec.rs", "fn f<'a>(x: &'a str) -> char { '\"' } use crate::store::Store; const Q: char = '\"';"),
    ];
    for (path, text) in wrong {
        assert_eq!(check(Path::new(path), text).len(), 1, "{path}: {text}");
    }
}

#[test]
fn what_is_allowed_passes() {
    let right = [
        ("cli/mount.rs", "use clap::Parser; use crate::{mount, report::Report};"),
        ("fuse/adapter.rs", "use fuser::Filesystem; use crate::volume::Volume;"),
        ("sys.rs", "fn f() { unsafe { g() } }"),
        ("cache/disk.rs", "use crate::chunk::seal::unseal;"),
        ("lib.rs", "#[allow(unsafe_code)] pub mod sys; pub mod cli;"),
        ("chunk/codec.rs", "// use crate::store\n/* crate::cache /* crate::tree */ */ //! crate::fuse"),
        ("chunk/codec.rs", r##"const A: &str = "crate::store"; const B: &str = r#"crate::"store"#; "##),
        ("chunk/codec.rs", "use super::MAX_CHUNK_BYTES; mod tests { use super::*; use super::super::cut; }"),
        ("volume/mod.rs", "mod error; use self::error::E; mod tests { use super::tree::X; }"),
        ("volume/mod.rs", "#[allow(unsafe_code, reason = \"x\")] use crate::sys;"),
        ("main.rs", "fn main() { caifs::cli::main() }"),
    ];
    for (path, text) in right {
        assert_eq!(check(Path::new(path), text), Vec::<String>::new(), "{path}: {text}");
    }
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("the sources can be listed") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// The violations in one file, given by its path below `src`.
fn check(path: &Path, text: &str) -> Vec<String> {
    let shown = path.display();
    let module: Vec<String> = path
        .with_extension("")
        .iter()
        .map(|part| part.to_string_lossy().into_owned())
        .filter(|part| part != "mod")
        .collect();
    let room = module[0].as_str();
    let tokens = tokens(text);
    let mut violations = Vec::new();
    for (word, homes) in CONFINED {
        if !homes.contains(&room) && tokens.iter().any(|token| token == word) {
            violations.push(format!("src/{shown}: names `{word}`, which stands only in {}", homes[0]));
        }
    }
    if room == "lib" {
        return violations;
    }
    let Some((_, allowed)) = ROOMS.iter().find(|(name, _)| *name == room) else {
        violations.push(format!("src/{shown}: room {room} is not in the table of tests/layering.rs"));
        return violations;
    };
    for named in named_rooms(&module, &tokens) {
        let is_room = named == "*" || ROOMS.iter().any(|(name, _)| *name == named);
        if is_room && named != room && !allowed.contains(&named.as_str()) {
            violations.push(format!("src/{shown}: {room} names {named}, which is not below it"));
        }
    }
    violations
}

/// What stands right below the crate's root in the paths of a file.
fn named_rooms(module: &[String], tokens: &[String]) -> BTreeSet<String> {
    let mut named = BTreeSet::new();
    // What each open brace opened: a module inside the file, or anything else.
    let mut open: Vec<bool> = Vec::new();
    let mut position = 0;
    while position < tokens.len() {
        let token = tokens[position].as_str();
        match token {
            "{" => open.push(position >= 2 && tokens[position - 2] == "mod"),
            "}" => {
                open.pop();
            }
            _ => {}
        }
        let depth = module.len() + open.iter().filter(|&&is_module| is_module).count();
        let starts_path = position == 0 || tokens[position - 1] != "::";
        let mut after = position + 1;
        let at_root = match token {
            "crate" => true,
            "caifs" => module == ["main"] && starts_path,
            "super" if starts_path => {
                let mut climbed = 1;
                while tokens.get(after).is_some_and(|token| token == "::")
                    && tokens.get(after + 1).is_some_and(|token| token == "super")
                {
                    climbed += 1;
                    after += 2;
                }
                climbed >= depth
            }
            _ => false,
        };
        if at_root && tokens.get(after).is_some_and(|token| token == "::") {
            first_names(&tokens[after + 1..], &mut named);
        }
        position += 1;
    }
    named
}

/// The first name of a path, or of each path of a group `{a::b, c}`.
fn first_names(tokens: &[String], named: &mut BTreeSet<String>) {
    if tokens.first().is_none_or(|token| token != "{") {
        named.extend(tokens.first().cloned());
        return;
    }
    let mut depth = 0;
    for (position, token) in tokens.iter().enumerate() {
        match token.as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            _ if depth == 1 && matches!(tokens[position - 1].as_str(), "{" | ",") => {
                named.insert(token.clone());
            }
            _ => {}
        }
        if depth == 0 {
            return;
        }
    }
}

/// The words and signs of a source text, without comments, strings and characters. `::` is one sign.
fn tokens(text: &str) -> Vec<String> {
    let chars: Vec<char> = text.chars().collect();
    let mut tokens = Vec::new();
    let mut at = 0;
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    while at < chars.len() {
        let next = chars.get(at + 1).copied();
        match chars[at] {
            '/' if next == Some('/') => {
                while at < chars.len() && chars[at] != '\n' {
                    at += 1;
                }
            }
            '/' if next == Some('*') => at = after_comment(&chars, at),
            '"' => at = after_string(&chars, at + 1),
            '\'' => at = after_quote(&chars, at),
            ':' if next == Some(':') => {
                tokens.push("::".to_owned());
                at += 2;
            }
            c if is_word(c) => {
                let start = at;
                while at < chars.len() && is_word(chars[at]) {
                    at += 1;
                }
                let word: String = chars[start..at].iter().collect();
                let hashes = chars[at..].iter().take_while(|&&c| c == '#').count();
                let is_raw = matches!(word.as_str(), "r" | "br" | "cr") && chars.get(at + hashes) == Some(&'"');
                if is_raw {
                    at = after_raw_string(&chars, at + hashes + 1, hashes);
                } else {
                    tokens.push(word);
                }
            }
            c => {
                if !c.is_whitespace() {
                    tokens.push(c.to_string());
                }
                at += 1;
            }
        }
    }
    tokens
}

fn after_comment(chars: &[char], start: usize) -> usize {
    let mut depth = 0;
    let mut at = start;
    while at + 1 < chars.len() {
        match (chars[at], chars[at + 1]) {
            ('/', '*') => {
                depth += 1;
                at += 2;
            }
            ('*', '/') => {
                depth -= 1;
                at += 2;
            }
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    chars.len()
}

fn after_string(chars: &[char], mut at: usize) -> usize {
    while at < chars.len() && chars[at] != '"' {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    at + 1
}

fn after_raw_string(chars: &[char], mut at: usize, hashes: usize) -> usize {
    while at < chars.len() {
        let closes = chars[at] == '"' && chars[at + 1..].iter().take_while(|&&c| c == '#').count() >= hashes;
        at += 1;
        if closes {
            return at + hashes;
        }
    }
    at
}

/// A quote begins a character (`'x'`, `'\n'`) or a lifetime (`'a`), which has no closing quote.
fn after_quote(chars: &[char], start: usize) -> usize {
    if chars.get(start + 1) == Some(&'\\') {
        let mut at = start + 3;
        while at < chars.len() && chars[at] != '\'' {
            at += 1;
        }
        return at + 1;
    }
    match chars.get(start + 2) {
        Some('\'') => start + 3,
        _ => start + 1,
    }
}
