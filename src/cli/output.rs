//! Copying content to stdout or a file, and names as a terminal may see them.

use std::borrow::Cow;
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result};
use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::runtime::Runtime;

use crate::blob::{Blob, BlobError};
use crate::pack::output::AtomicFile;

/// Read at once when content is copied, in bytes.
const COPY_BYTES: u64 = 1 << 20;

/// Mode of a file that is written, before the umask.
const OUTPUT_MODE: u32 = 0o666;

/// Reads in flight when content is copied.
const N_READS: usize = 8;

/// A range of a byte stream.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub n_bytes: u64,
}

/// Copies a range of a blob to a file, or to stdout. The file is written beside its place and renamed when it is whole; an existing
/// device or pipe is written into.
pub fn copy(runtime: &Runtime, blob: &Blob, span: Span, output: Option<&Path>) -> Result<()> {
    let Some(path) = output.filter(|path| *path != Path::new("-")) else {
        // Past the standard library's stdout, which looks for the ends of lines in all it is given.
        let mut stdout = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        return write_range(runtime, blob, span, &mut stdout);
    };
    let name = || format!("cannot write {}", path.display());
    if path.metadata().is_ok_and(|metadata| !metadata.is_file()) {
        let mut file = OpenOptions::new().write(true).open(path).with_context(name)?;
        return write_range(runtime, blob, span, &mut file);
    }
    let mut file = AtomicFile::create(path, OUTPUT_MODE)?;
    write_range(runtime, blob, span, &mut file)?;
    Ok(file.commit()?)
}

fn write_range(runtime: &Runtime, blob: &Blob, span: Span, out: &mut dyn Write) -> Result<()> {
    let progress = progress_bar(span.n_bytes);
    let end = span.offset + span.n_bytes;
    let starts = (span.offset..end).step_by(COPY_BYTES as usize);
    let reads = stream::iter(starts).map(|start| read_owned(blob.clone(), start, (end - start).min(COPY_BYTES)));
    let mut pieces = Box::pin(reads.buffered(N_READS));
    while let Some(piece) = runtime.block_on(pieces.next()) {
        let piece = piece?;
        out.write_all(&piece)?;
        progress.inc(piece.len() as u64);
    }
    progress.finish_and_clear();
    Ok(())
}

async fn read_owned(blob: Blob, offset: u64, n_bytes: u64) -> Result<Bytes, BlobError> {
    // In a task of its own, so that a read goes on while this thread writes.
    let read = tokio::spawn(async move { blob.read_at(offset, n_bytes as usize).await });
    read.await.unwrap_or(Err(BlobError::Abandoned))
}

/// A bar on stderr when that is a terminal, nothing otherwise.
pub fn progress_bar(n_bytes: u64) -> ProgressBar {
    let target = match io::stderr().is_terminal() {
        true => ProgressDrawTarget::stderr_with_hz(5),
        false => ProgressDrawTarget::hidden(),
    };
    let bar = ProgressBar::with_draw_target(Some(n_bytes), target);
    let template = "{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// A name as it is printed: raw into pipes and files, so that programs can use it; with control and undecodable bytes escaped
/// on a terminal.
pub fn printable(name: &[u8], to_terminal: bool) -> Cow<'_, [u8]> {
    let is_plain = std::str::from_utf8(name).is_ok_and(|text| !text.chars().any(char::is_control));
    if !to_terminal || is_plain {
        return Cow::Borrowed(name);
    }
    let mut escaped = Vec::with_capacity(name.len() + 16);
    for piece in name.utf8_chunks() {
        for c in piece.valid().chars() {
            match c.is_control() {
                true => escaped.extend(c.escape_default().to_string().into_bytes()),
                false => escaped.extend(c.to_string().into_bytes()),
            }
        }
        for byte in piece.invalid() {
            escaped.extend(format!("\\x{byte:02x}").into_bytes());
        }
    }
    Cow::Owned(escaped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_sees_no_control_bytes() {
        for (name, shown) in [
            (&b"plain \xc3\xa9"[..], &b"plain \xc3\xa9"[..]),
            (b"a\nb\x1b[1m", b"a\\nb\\u{1b}[1m"),
            (b"\xff\xfe", b"\\xff\\xfe"),
        ] {
            assert_eq!(printable(name, true).as_ref(), shown);
            assert_eq!(printable(name, false).as_ref(), name);
        }
    }
}
