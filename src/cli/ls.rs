//! `caifs ls`: the files of an archive, read lazily: only what is listed is fetched.

use std::io::{self, BufWriter, IsTerminal, Write};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use anyhow::{Context, Result};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Serialize;
use tokio::runtime::Runtime;

use super::args::LsArgs;
use super::output::printable;
use super::store_flags::memory_plan;
use crate::tree::{Content, Node, Tree};
use crate::volume::open::open_tree;

pub fn run(args: &LsArgs) -> Result<()> {
    let runtime = Runtime::new().context("cannot start")?;
    let opened = args.stores.open(&runtime, args.spec.as_os_str())?;
    let tree = runtime.block_on(open_tree(opened, &memory_plan()))?;
    let path = args.path.as_os_str().as_bytes();
    let name = || format!("{}: {}", args.spec.display(), args.path.display());
    let node = runtime.block_on(tree.resolve(path, true)).with_context(name)?;
    let stdout = io::stdout();
    let mut list = List {
        args,
        runtime: &runtime,
        tree: &tree,
        to_terminal: stdout.is_terminal(),
        out: BufWriter::new(stdout.lock()),
    };
    match node.is_directory() {
        true => list.directories(node).with_context(name)?,
        false => list.line(args.path.as_os_str().as_bytes(), &node)?,
    }
    Ok(list.out.flush()?)
}

struct List<'a, W: Write> {
    args: &'a LsArgs,
    runtime: &'a Runtime,
    tree: &'a Tree,
    to_terminal: bool,
    out: W,
}

/// A directory being listed.
struct Level {
    /// Path of the directory below the one asked for, with a `/` at its end unless empty.
    prefix: Vec<u8>,
    node: Arc<Node>,
    /// Where its listing goes on.
    next_idx: Option<u64>,
    /// Children of it read and not shown yet, last first.
    waiting: Vec<(Vec<u8>, Arc<Node>)>,
}

impl Level {
    fn new(prefix: Vec<u8>, node: Arc<Node>) -> Self {
        Self { prefix, node, next_idx: Some(0), waiting: Vec::new() }
    }
}

impl<W: Write> List<'_, W> {
    /// Lists a directory and, when asked, all below it, in the order of the archive. The levels stand on a stack of their own, so
    /// that deep trees need no deep calls.
    fn directories(&mut self, top: Arc<Node>) -> Result<()> {
        let mut levels = vec![Level::new(Vec::new(), top)];
        while let Some(level) = levels.last_mut() {
            if let Some((path, node)) = level.waiting.pop() {
                self.line(&path, &node)?;
                if self.args.recursive && node.is_directory() {
                    levels.push(Level::new([path.as_slice(), b"/"].concat(), node));
                }
                continue;
            }
            let Some(from_idx) = level.next_idx else {
                levels.pop();
                continue;
            };
            let children = self.runtime.block_on(self.tree.list(&level.node, from_idx))?;
            level.next_idx = children.next_idx;
            let named = children.as_slice().iter().rev();
            level.waiting =
                named.map(|child| ([&level.prefix, child.name.as_ref()].concat(), Arc::clone(&child.node))).collect();
        }
        Ok(())
    }

    fn line(&mut self, path: &[u8], node: &Node) -> Result<()> {
        if self.args.json {
            // As the error of the output that it is, so that a reader that went away is known.
            serde_json::to_writer(&mut self.out, &Line::new(path, node)).map_err(io::Error::from)?;
            return Ok(self.out.write_all(b"\n")?);
        }
        if self.args.long {
            let size = match &node.content {
                Content::File { size, .. } => size.to_string(),
                Content::Symlink(target) => target.len().to_string(),
                Content::Device { major, minor } => format!("{major},{minor}"),
                Content::Directory { .. } | Content::Nothing => "0".to_owned(),
            };
            let Node { uid, gid, .. } = node;
            write!(self.out, "{} {uid:>5} {gid:>5} {size:>11} {} ", mode_text(node.mode), time_text(node.mtime_ns))?;
        }
        self.out.write_all(&printable(path, self.to_terminal))?;
        if let Content::Symlink(target) = &node.content
            && self.args.long
        {
            self.out.write_all(b" -> ")?;
            self.out.write_all(&printable(target, self.to_terminal))?;
        }
        Ok(self.out.write_all(b"\n")?)
    }
}

/// A line of `--json`.
#[derive(Debug, Serialize)]
struct Line {
    path: String,
    /// The path's bytes in hex, when they are not UTF-8 and `path` is only near it.
    #[serde(skip_serializing_if = "Option::is_none")]
    path_hex: Option<String>,
    r#type: &'static str,
    /// Permission bits in octal.
    mode: String,
    uid: u32,
    gid: u32,
    /// Nanoseconds since the epoch.
    mtime_ns: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
    /// The target's bytes in hex, as with the path.
    #[serde(skip_serializing_if = "Option::is_none")]
    target_hex: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<(u32, u32)>,
}

impl Line {
    fn new(path: &[u8], node: &Node) -> Self {
        let (mut size, mut target, mut target_hex, mut device) = (None, None, None, None);
        match &node.content {
            Content::File { size: n_bytes, .. } => size = Some(*n_bytes),
            Content::Symlink(bytes) => {
                target = Some(String::from_utf8_lossy(bytes).into_owned());
                target_hex = hex_unless_utf8(bytes);
            }
            Content::Device { major, minor } => device = Some((*major, *minor)),
            Content::Directory { .. } | Content::Nothing => {}
        }
        Self {
            path: String::from_utf8_lossy(path).into_owned(),
            path_hex: hex_unless_utf8(path),
            r#type: type_of(node.mode).1,
            mode: format!("{:04o}", node.mode & 0o7777),
            uid: node.uid,
            gid: node.gid,
            mtime_ns: node.mtime_ns,
            size,
            target,
            target_hex,
            device,
        }
    }
}

/// The bytes in hex, unless they are text that needs none.
fn hex_unless_utf8(bytes: &[u8]) -> Option<String> {
    std::str::from_utf8(bytes).is_err().then(|| bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The letter of `ls -l` and the word of `find -type` for a type.
fn type_of(mode: u32) -> (char, &'static str) {
    match mode & libc::S_IFMT {
        libc::S_IFDIR => ('d', "directory"),
        libc::S_IFLNK => ('l', "symlink"),
        libc::S_IFBLK => ('b', "block-device"),
        libc::S_IFCHR => ('c', "char-device"),
        libc::S_IFIFO => ('p', "fifo"),
        libc::S_IFSOCK => ('s', "socket"),
        _ => ('-', "file"),
    }
}

/// Type and permissions as `ls -l` shows them.
fn mode_text(mode: u32) -> String {
    let mut text = String::with_capacity(10);
    text.push(type_of(mode).0);
    for (shift, special_bit, special) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (mode & special_bit != 0, bits & 1 != 0) {
            (true, true) => special,
            (true, false) => special.to_ascii_uppercase(),
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    text
}

/// A time in the local time zone, to the minute.
fn time_text(mtime_ns: i64) -> String {
    match Timestamp::from_nanosecond(i128::from(mtime_ns)) {
        Ok(time) => time.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M").to_string(),
        Err(_) => format!("{mtime_ns} ns"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_shown_as_ls_shows_them() {
        for (mode, text) in [
            (0o100644, "-rw-r--r--"),
            (0o104755, "-rwsr-xr-x"),
            (0o102644, "-rw-r-Sr--"),
            (0o041777, "drwxrwxrwt"),
            (0o120777, "lrwxrwxrwx"),
            (0o020600, "crw-------"),
        ] {
            assert_eq!(mode_text(mode), text);
        }
    }
}
