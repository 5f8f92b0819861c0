//! What must be known of an index or archive to show its name, without opening it: the length of an image, and the attributes of a tree's
//! root.
//!
//! Of an index two small pieces are read, its ends. They tell how long its blob is; for a tree also which chunk is the first, in which the
//! archive's root lies. Only where that is not enough is the whole opened: a server without ranges, a root with a very long list of
//! attributes, an index that must be verified before any of it is believed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use super::names::EntryKind;
use super::part::content_of;
use crate::blob::replies::Replies;
use crate::blob::source::IndexBytes;
use crate::blob::{Blob, BlobError, ChunkedBlob, FileBlob};
use crate::digest::ChunkId;
use crate::format::ends::Ends;
use crate::format::index::{Index, encode};
use crate::store::FileInfo;
use crate::store::local_files::info_of_open;
use crate::store::location::FileLocation;
use crate::tree::{Node, Tree, TreeError};
use crate::volume::open::{OpenError, open_with};
use crate::volume::sources::{RangeError, Sources};

/// An index up to this length is read as a whole: that takes one request.
const MAX_WHOLE_BYTES: u64 = 16 << 10;

/// What was found out.
#[derive(Debug)]
pub(super) struct Peeked {
    /// What is known of the file that was read. That may be what is kept of it, when its place does not answer.
    pub(super) info: FileInfo,
    /// What its index has in it, where no version tells.
    pub(super) content: Option<ChunkId>,
    /// Bytes of the blob or archive.
    pub(super) size: u64,
    /// The root of a tree.
    pub(super) root: Option<Node>,
}

/// Why nothing was found out.
#[derive(Debug)]
pub(super) enum PeekError {
    /// The file is not the one that was listed any more.
    Changed,
    /// It cannot be read, or is not what its name says.
    Failed(OpenError),
}

impl From<OpenError> for PeekError {
    fn from(error: OpenError) -> Self {
        Self::Failed(error)
    }
}

/// Looks at an index or archive of which `info` is known. With `whole`, nothing is believed that was not opened as a whole.
///
/// # Errors
/// See [`PeekError`].
pub(super) async fn peek(
    sources: &Sources,
    location: &FileLocation,
    kind: EntryKind,
    info: &FileInfo,
    replies: &Arc<Replies>,
    whole: bool,
) -> Result<Peeked, PeekError> {
    if whole || (kind != EntryKind::Archive && !(info.has_ranges && info.version.is_some())) {
        return Ok(open_and_look(sources, location, kind, replies).await?);
    }
    if kind == EntryKind::Archive {
        let (blob, read) = archive(sources, location).await?;
        let (size, info) = (blob.size(), read.unwrap_or_else(|| info.clone()));
        return Ok(Peeked { info, content: None, size, root: Some(root_of(&blob, size, location).await?) });
    }
    let shown = location.to_string();
    let failed = |why: &dyn ToString| PeekError::Failed(OpenError::new(&shown, why.to_string()));
    let n_bytes = info.size;
    let (head, end) = match n_bytes <= MAX_WHOLE_BYTES {
        true => {
            let all = range(sources, location, info, 0, n_bytes).await?;
            (all.clone(), all)
        }
        false => {
            let (head, end) = (Ends::HEAD_BYTES as u64, n_bytes - Ends::END_BYTES as u64);
            let (head, end) =
                tokio::join!(range(sources, location, info, 0, head), range(sources, location, info, end, n_bytes));
            (head?, end?)
        }
    };
    let (first_bytes, last_bytes) = (head.len().min(Ends::HEAD_BYTES), end.len().saturating_sub(Ends::END_BYTES));
    let ends = Ends::read(&head[..first_bytes], &end[last_bytes..], n_bytes).map_err(|error| failed(&error))?;
    let size = ends.blob_size;
    // Each range was of this version.
    let peeked = |root| Peeked { info: info.clone(), content: None, size, root };
    if kind == EntryKind::Image {
        return Ok(peeked(None));
    }
    let Some(first) = ends.first else { return Err(failed(&"the archive is empty")) };
    // The index of the first chunk alone, as if the archive had no more.
    let beginning = encode(&ends.header, [(first.end, &first.id)]);
    let beginning = Index::open(IndexBytes::Copied(beginning)).map_err(|error| failed(&error))?;
    let cache = sources.cache(location)?;
    let beginning = Blob::Chunked(ChunkedBlob::with_replies(beginning, &shown, cache, Arc::clone(replies)));
    match Tree::root_of(&beginning, size).await {
        Ok(root) => Ok(peeked(Some(root))),
        // It has more metadata than the first chunk has bytes.
        Err(TreeError::Blob(BlobError::OutOfRange { .. })) => {
            Ok(open_and_look(sources, location, kind, replies).await?)
        }
        Err(error) => Err(failed(&error)),
    }
}

async fn open_and_look(
    sources: &Sources,
    location: &FileLocation,
    kind: EntryKind,
    replies: &Arc<Replies>,
) -> Result<Peeked, OpenError> {
    let opened = open_with(sources, location, replies).await?;
    let size = opened.blob.size();
    let root = match kind {
        EntryKind::Image | EntryKind::Directory => None,
        EntryKind::TreeIndex | EntryKind::Archive => Some(root_of(&opened.blob, size, location).await?),
    };
    Ok(Peeked { content: content_of(&opened), info: opened.info, size, root })
}

async fn root_of(blob: &Blob, size: u64, location: &FileLocation) -> Result<Node, OpenError> {
    Tree::root_of(blob, size).await.map_err(|error| OpenError::new(&location.to_string(), error))
}

/// A plain archive, and what is known of the file of a store that it is.
async fn archive(sources: &Sources, location: &FileLocation) -> Result<(Blob, Option<FileInfo>), OpenError> {
    let failed = |error: &dyn ToString| OpenError::new(&location.to_string(), error.to_string());
    match location {
        FileLocation::Remote { name, .. } => {
            let (blocks, info) = sources.archive(location, name).await?;
            Ok((Blob::Remote(blocks), Some(info)))
        }
        FileLocation::Local(path) => {
            let path = path.clone();
            let opened = tokio::task::spawn_blocking(move || FileBlob::open(&path)).await;
            Ok((Blob::File(opened.map_err(|error| failed(&error))?.map_err(|error| failed(&error))?), None))
        }
        FileLocation::Stdio => Err(failed(&"it does not lie in a directory")),
    }
}

/// Some bytes of a file of this version.
async fn range(
    sources: &Sources,
    location: &FileLocation,
    info: &FileInfo,
    start: u64,
    end: u64,
) -> Result<Bytes, PeekError> {
    let FileLocation::Local(path) = location else {
        return sources.range(location, start..end, info.version.as_ref()).await.map_err(|error| match error {
            RangeError::Changed => PeekError::Changed,
            RangeError::Failed(error) => PeekError::Failed(error),
        });
    };
    let (path, info, shown) = (path.clone(), info.clone(), location.to_string());
    let read = tokio::task::spawn_blocking(move || match local_range(&path, &info, start, end) {
        Ok(Some(bytes)) => Ok(bytes),
        Ok(None) => Err(PeekError::Changed),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(PeekError::Changed),
        Err(error) => Err(PeekError::Failed(OpenError::new(&shown, error))),
    });
    read.await.unwrap_or(Err(PeekError::Changed))
}

/// The same of a local file; `None` when it is another version.
fn local_range(path: &Path, info: &FileInfo, start: u64, end: u64) -> io::Result<Option<Bytes>> {
    let file = File::open(path)?;
    let mut bytes = vec![0; (end - start) as usize];
    if info_of_open(&file)?.as_ref() != Some(info) {
        return Ok(None);
    }
    match file.read_exact_at(&mut bytes, start) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    Ok((info_of_open(&file)?.as_ref() == Some(info)).then(|| bytes.into()))
}
