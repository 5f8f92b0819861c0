//! `.caexclude`: which files of a directory are left out of an archive (formats.md 4.10, and trials with casync).
//!
//! A line is a pattern. Without a slash it holds in the directory of its file and everywhere below; with one, it names a
//! path from that directory. `!` in front keeps what another pattern leaves out: from above or from below, keeping wins.
//!
//! [`Rules`] belong to one directory; those of a child come from its parent's by [`Rules::below`].

use std::ffi::{CStr, CString};

use crate::sys::attributes::matches_pattern;

/// The name of the file with the patterns.
pub const EXCLUDE_FILE: &CStr = c".caexclude";
/// An exclude file larger than this is refused: it is no list that anybody wrote.
pub const MAX_EXCLUDE_BYTES: u64 = 16 << 20;

/// What holds in one directory.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    rules: Vec<Rule>,
}

#[derive(Debug, Clone)]
struct Rule {
    /// Components of the path that is meant, from this directory on.
    components: Vec<CString>,
    /// Holds in directories below, too.
    is_everywhere: bool,
    only_directories: bool,
    keeps: bool,
}

impl Rules {
    /// Takes in the exclude file of this directory; an error is the number of a line that is no pattern (from 1).
    pub fn add(&mut self, text: &[u8]) -> Result<(), usize> {
        for (i, line) in text.split(|byte| *byte == b'\n').enumerate() {
            let line = trim(line);
            if line.is_empty() || line.starts_with(b"#") {
                continue;
            }
            self.rules.push(parse(line).ok_or(i + 1)?);
        }
        Ok(())
    }

    /// Whether this directory's file of that name is left out.
    pub fn excludes(&self, name: &CStr, is_directory: bool) -> bool {
        let mut excluded = false;
        for rule in &self.rules {
            let [pattern] = rule.components.as_slice() else { continue };
            if (rule.only_directories && !is_directory) || !matches_pattern(pattern, name) {
                continue;
            }
            if rule.keeps {
                return false;
            }
            excluded = true;
        }
        excluded
    }

    /// What holds in this directory's child directory of that name, before its own exclude file is read.
    pub fn below(&self, name: &CStr) -> Self {
        let below = |rule: &Rule| {
            if rule.is_everywhere {
                return Some(rule.clone());
            }
            let (first, rest) = rule.components.split_first()?;
            let leads_on = !rest.is_empty() && matches_pattern(first, name);
            leads_on.then(|| Rule { components: rest.to_vec(), ..rule.clone() })
        };
        Self { rules: self.rules.iter().filter_map(below).collect() }
    }

    /// Whether nothing is said at all.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }
}

fn trim(line: &[u8]) -> &[u8] {
    let is_blank = |byte: &u8| matches!(byte, b' ' | b'\t');
    let start = line.iter().position(|byte| !is_blank(byte)).unwrap_or(line.len());
    let end = line.iter().rposition(|byte| !is_blank(byte)).map_or(start, |last| last + 1);
    &line[start..end]
}

fn parse(line: &[u8]) -> Option<Rule> {
    let (keeps, pattern) = line.strip_prefix(b"!").map_or((false, line), |rest| (true, rest));
    let only_directories = pattern.ends_with(b"/");
    // One slash in front or within ties the pattern to its directory; one at the end does not.
    let end = pattern.iter().rposition(|byte| *byte != b'/')?;
    let is_everywhere = !pattern[..end].contains(&b'/');
    let components: Vec<&[u8]> =
        pattern.split(|byte| *byte == b'/').filter(|component| !component.is_empty()).collect();
    if components.iter().any(|component| matches!(*component, b"." | b"..")) {
        return None;
    }
    let components =
        components.into_iter().map(|component| CString::new(component).ok()).collect::<Option<Vec<_>>>()?;
    Some(Rule { components, is_everywhere, only_directories, keeps })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Whether a path is left out by the exclude files of the directories on its way.
    fn excluded(files: &[(&str, &str)], path: &str) -> bool {
        let mut rules = Rules::default();
        let is_directory = path.ends_with('/');
        let components: Vec<&str> = path.trim_end_matches('/').split('/').collect();
        let mut directory = String::new();
        for (i, component) in components.iter().enumerate() {
            for (_, text) in files.iter().filter(|(of, _)| *of == directory) {
                rules.add(text.as_bytes()).unwrap();
            }
            let name = CString::new(*component).unwrap();
            let is_last = i + 1 == components.len();
            if rules.excludes(&name, is_directory || !is_last) {
                return true;
            }
            rules = rules.below(&name);
            directory = format!("{directory}{component}/");
        }
        false
    }

    #[test]
    fn what_casync_was_seen_to_leave_out() {
        type Files = &'static [(&'static str, &'static str)];
        let cases: &[(Files, &[&str], &[&str])] = &[
            (&[("", "*.o\n")], &["a.o", "d/f/k.o"], &[".a.o", "b.c", "d/"]),
            (&[("", "/a.o")], &["a.o"], &["d/a.o"]),
            (&[("", "//a.o")], &["a.o"], &["d/a.o"]),
            (&[("", "d//a.o")], &["d/a.o"], &["a.o"]),
            (&[("", "*.o\n!k.o\n")], &["a.o", "d/a.o"], &["k.o", "d/f/k.o"]),
            (&[("", "*.o\n"), ("d/", "!k.o\n")], &["k.o", "d/a.o", "foo/k.o"], &["d/k.o", "d/f/k.o"]),
            (&[("", "*.o\n!k.o\n"), ("d/", "k.o\n")], &["d/a.o"], &["d/k.o"]),
            (&[("", "!*.o\n"), ("d/", "*.o\n")], &[], &["d/a.o", "d/f/k.o"]),
            (&[("", "*.o\n!d/k.o\n"), ("d/", "*.o\n")], &["k.o", "d/f/k.o"], &["d/k.o"]),
            (&[("", "d/x/y/\n")], &["d/x/y/", "d/x/y/z"], &["d/x/y", "d/x/z"]),
            (&[("", "foo/\n")], &["foo/", "d/foo/"], &["d/foo"]),
            (&[("", "/foo/\n")], &["foo/"], &["d/foo/"]),
            (&[("", "*\n")], &["a", "d/"], &[".caexclude", ".hid"]),
            (&[("", "d/*/a.o\n")], &["d/f/a.o"], &["d/a.o", "d/f/x/a.o"]),
            (&[("", "  a.o \t\n\t# c\n\n")], &["a.o"], &["c"]),
            (&[("", "d/f/k.o\n"), ("d/f/", "!k.o\n")], &[], &["d/f/k.o"]),
            (&[("", "d/f\n!d/f/k.o\n")], &["d/f/k.o"], &[]),
            (&[("", "\\!a.o\n!!b\nb\n")], &["!a.o", "b"], &["a.o"]),
        ];
        for (files, out, kept) in cases {
            for (paths, expected) in [(out, true), (kept, false)] {
                for path in *paths {
                    assert_eq!(excluded(files, path), expected, "{path} with {files:?}");
                }
            }
        }
    }

    #[test]
    fn lines_that_are_no_pattern_are_errors() {
        for (text, line) in [("./a\n", 1), ("a\n../b\n", 2), ("/\n", 1), ("!\n", 1), ("a\0b\n", 1)] {
            assert_eq!(Rules::default().add(text.as_bytes()), Err(line), "{text:?}");
        }
    }
}
