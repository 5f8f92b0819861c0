//! `caifs cat`: the content of an index, or of one file in an archive.

use std::os::unix::ffi::OsStrExt;

use anyhow::{Context, Result, bail};
use tokio::runtime::Runtime;

use super::args::CatArgs;
use super::output::{self, Span};
use super::store_flags::memory_plan;
use crate::tree::Content;
use crate::volume::open::open_tree;

pub fn run(args: &CatArgs) -> Result<()> {
    let runtime = Runtime::new().context("cannot start")?;
    let opened = args.stores.open(&runtime, args.index.as_os_str())?;
    let (blob, whole) = match &args.path {
        None => {
            let n_bytes = opened.blob.size();
            (opened.blob, Span { offset: 0, n_bytes })
        }
        Some(path) => {
            let tree = runtime.block_on(open_tree(opened, &memory_plan()))?;
            let name = || format!("{}: {}", args.index.display(), path.display());
            let node = runtime.block_on(tree.resolve(path.as_os_str().as_bytes(), true)).with_context(name)?;
            let node = runtime.block_on(tree.confirmed(&node)).with_context(name)?.unwrap_or(node);
            match node.content {
                Content::File { offset, size } => (tree.blob().clone(), Span { offset, n_bytes: size }),
                Content::Directory { .. } => bail!("{}: it is a directory (list it with ls)", name()),
                Content::Symlink(_) | Content::Device { .. } | Content::Nothing => {
                    bail!("{}: not a regular file", name())
                }
            }
        }
    };
    let size = whole.n_bytes;
    if args.offset > size {
        bail!("{}: offset {} lies past the end at {size}", args.index.display(), args.offset);
    }
    let rest = size - args.offset;
    let n_bytes = if args.length == 0 { rest } else { args.length.min(rest) };
    let span = Span { offset: whole.offset + args.offset, n_bytes };
    output::copy(&runtime, &blob, span, args.output.as_deref())?;
    if args.length > rest {
        bail!("{}: only {rest} of {} bytes were there from offset {}", args.index.display(), args.length, args.offset);
    }
    Ok(())
}
