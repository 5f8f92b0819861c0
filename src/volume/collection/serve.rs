//! A collection as a volume: what is asked of a directory is answered here, the rest by the part that has the number.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;

use super::ledger::{Given, Ledger};
use super::look::{self, aside, kept_another, unknown_attr, unopened};
use super::names::EntryKind;
use super::part::{OpenPart, Part, content_of};
use super::{Collection, DIRECTORY_LASTS, Dir, Shared, inode};
use crate::blob::Blob;
use crate::tree::{ROOT_INO, Tree};
use crate::volume::image::{ImageConfig, ImageVolume};
use crate::volume::open::{SpecKind, open_with};
use crate::volume::table;
use crate::volume::tree::TreeVolume;
use crate::volume::{
    Answer, Attr, DirEntry, FOREVER, FileKind, Listing, Part as LivePart, Volume, VolumeError, VolumeStat, own_xattr,
};

/// Permission bits of a directory of the collection, less the umask.
const DIRECTORY_PERMISSIONS: u16 = 0o555;

/// Asks the part that has the number, opening it if need be.
macro_rules! ask_part {
    ($self:ident, $ino:ident, |$volume:ident, $inner:ident| $call:expr) => {{
        let shared = Arc::clone(&$self.shared);
        Box::pin(async move {
            let (part, $inner) = shared.part_of($ino).await?;
            let open = shared.open_part(&part).await?;
            let $volume = &open.volume;
            $call.await
        })
    }};
}

/// An answer that is known already.
fn ready<T: Send + 'static>(answer: Result<T, VolumeError>) -> Answer<T> {
    Box::pin(std::future::ready(answer))
}

impl Volume for Collection {
    fn getattr(&self, ino: u64) -> Answer<Attr> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            if inode::is_directory(ino) {
                let dir = shared.dir(ino).await?;
                // A listing that fails is told by who reads it.
                drop(shared.freshen(&dir).await);
                return Ok(shared.directory_attr(&dir));
            }
            let (part, inner) = shared.part_of(ino).await?;
            if inner == ROOT_INO {
                return Ok(part.attr.clone());
            }
            let open = shared.open_part(&part).await?;
            open.volume.getattr(inner).await.map(|attr| outer(&part, attr))
        })
    }

    fn lookup(&self, parent: u64, name: &[u8]) -> Answer<Option<Attr>> {
        let (shared, name) = (Arc::clone(&self.shared), name.to_vec());
        Box::pin(async move {
            if !inode::is_directory(parent) {
                let (part, inner) = shared.part_of(parent).await?;
                let open = shared.open_part(&part).await?;
                let found = open.volume.lookup(inner, &name).await?;
                return Ok(found.map(|attr| outer(&part, attr)));
            }
            let dir = shared.dir(parent).await?;
            shared.freshen(&dir).await?;
            let Some(entry) = dir.get(&name) else { return Ok(None) };
            if entry.kind == EntryKind::Directory {
                return Ok(Some(shared.directory_attr(&shared.dir_of(&entry, parent))));
            }
            let part = shared.part(&dir, &name, &entry).await?;
            Ok(part.map(|part| part.attr.clone()))
        })
    }

    fn readlink(&self, ino: u64) -> Answer<Bytes> {
        match inode::is_directory(ino) {
            true => ready(Err(VolumeError::Invalid)),
            false => ask_part!(self, ino, |volume, inner| volume.readlink(inner)),
        }
    }

    fn read(&self, ino: u64, offset: u64, len: u32) -> Answer<Bytes> {
        match inode::is_directory(ino) {
            true => ready(Err(VolumeError::IsADirectory)),
            false => ask_part!(self, ino, |volume, inner| volume.read(inner, offset, len)),
        }
    }

    fn readdir(&self, ino: u64, offset: u64, max_entries: usize) -> Answer<Listing> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            if !inode::is_directory(ino) {
                let (part, inner) = shared.part_of(ino).await?;
                let open = shared.open_part(&part).await?;
                let mut listing = open.volume.readdir(inner, offset, max_entries).await?;
                listing.parent_ino = match inner {
                    ROOT_INO => part.parent_ino,
                    _ => part.base + listing.parent_ino,
                };
                for entry in &mut listing.entries {
                    entry.attr.ino += part.base;
                }
                return Ok(listing);
            }
            let dir = shared.dir(ino).await?;
            shared.freshen(&dir).await?;
            let behind = dir.behind(offset, max_entries).into_iter();
            let entries = behind.map(|(place, name, entry)| {
                let known = match entry.kind {
                    EntryKind::Directory => Some(shared.directory_attr(&shared.dir_of(&entry, ino))),
                    _ => entry.known().map(|part| part.attr.clone()),
                };
                let is_attr_known = known.is_some();
                let attr = known.unwrap_or_else(|| unknown_attr(&entry));
                DirEntry { name: name.into(), attr, is_attr_known, next_offset: place }
            });
            Ok(Listing { parent_ino: dir.parent_ino, entries: entries.collect() })
        })
    }

    fn listxattr(&self, ino: u64, privileged: bool) -> Answer<Vec<Bytes>> {
        match inode::is_directory(ino) {
            true => ready(Ok(Vec::new())),
            false => ask_part!(self, ino, |volume, inner| volume.listxattr(inner, privileged)),
        }
    }

    fn getxattr(&self, ino: u64, name: &[u8]) -> Answer<Option<Bytes>> {
        let name = name.to_vec();
        if !inode::is_directory(ino) {
            return ask_part!(self, ino, |volume, inner| volume.getxattr(inner, &name));
        }
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            let dir = shared.dir(ino).await?;
            let is_root = dir.ino == ROOT_INO;
            let value = match own_xattr(&name) {
                Some(b"index") if is_root => Some(shared.place.to_string()),
                Some(b"index") => Some(shared.place.below(&dir.path).to_string()),
                Some(b"parts") if is_root => Some(shared.open.len().to_string()),
                Some(b"fetches") if is_root => Some(shared.report.n_fetches.get().to_string()),
                Some(b"eio") if is_root => Some(shared.report.eio_text()),
                _ => None,
            };
            Ok(value.map(Bytes::from))
        })
    }

    fn inode_flags(&self, ino: u64) -> Answer<u32> {
        match inode::is_directory(ino) {
            true => ready(Ok(0)),
            false => ask_part!(self, ino, |volume, inner| volume.inode_flags(inner)),
        }
    }

    fn lasts(&self, ino: u64) -> Duration {
        match inode::is_directory(ino) {
            true => DIRECTORY_LASTS,
            // What a part shows never changes: a file that is replaced is a part of its own.
            false => FOREVER,
        }
    }

    fn stat(&self) -> VolumeStat {
        let n_files = self.shared.dirs().get(&ROOT_INO).map_or(0, |dir| dir.len() as u64);
        VolumeStat { size_bytes: self.shared.size_bytes.load(Ordering::Relaxed), n_files }
    }

    fn has_acls(&self) -> bool {
        // Any tree that comes may have them.
        true
    }

    /// Files come and go without its being another directory; which of them has which number is in the ledger.
    fn identity(&self) -> Option<String> {
        let Shared { place, keep_suffix, .. } = &*self.shared;
        Some(format!("directory keep-suffix={} {place}", u8::from(*keep_suffix)))
    }

    fn keep_numbers(&self, file: File) -> io::Result<bool> {
        let (mut ledger, given) = Ledger::open(file)?;
        let mut numbers = self.shared.numbers();
        numbers.reserve(given);
        let here: Vec<Given> = numbers.parts().map(|part| look::given(part)).collect();
        for given in here {
            if !numbers.is_reserved(&given) && ledger.write(&given) {
                numbers.reserve(vec![given]);
            }
        }
        *self.shared.ledger() = Some(ledger);
        Ok(true)
    }

    fn root_kind(&self) -> FileKind {
        FileKind::Directory
    }
}

/// Attributes as the part has them, with the number that they have here.
fn outer(part: &Part, attr: Attr) -> Attr {
    Attr { ino: part.base + attr.ino, ..attr }
}

impl Shared {
    fn directory_attr(&self, dir: &Dir) -> Attr {
        Attr {
            ino: dir.ino,
            kind: FileKind::Directory,
            permissions: self.show.permissions(DIRECTORY_PERMISSIONS),
            // Its subdirectories are not counted.
            nlink: 1,
            uid: self.show.uid(0),
            gid: self.show.gid(0),
            size: 0,
            mtime: dir.mtime(),
            rdev: 0,
        }
    }

    /// Opens a part, if it is not open.
    pub(super) async fn open_part(self: &Arc<Self>, part: &Arc<Part>) -> Result<Arc<OpenPart>, VolumeError> {
        if let Some(open) = self.open.get(part.base) {
            return Ok(open);
        }
        // Who waits for another one's opening does so without a thread, and for no longer than his own request.
        let guard = Arc::clone(&part.opening).lock_owned().await;
        if let Some(open) = self.open.get(part.base) {
            return Ok(open);
        }
        let (shared, part) = (Arc::clone(self), Arc::clone(part));
        let open = async move {
            let _guard = guard;
            shared.open_now(&part).await
        };
        aside(&self.asides, open).await
    }

    /// Another file was found in the place of a part: whoever looks there again finds that.
    fn replaced(&self, part: &Part) -> VolumeError {
        part.set_replaced(true);
        self.removed_or_replaced(part)
    }

    fn removed_or_replaced(&self, part: &Part) -> VolumeError {
        if let Some(dir) = self.dirs().get(&part.parent_ino) {
            dir.mark();
        }
        VolumeError::Stale { message: format!("{} was removed or replaced", part.location) }
    }

    async fn open_now(&self, part: &Arc<Part>) -> Result<Arc<OpenPart>, VolumeError> {
        let config = self.live.config();
        let sources = self.sources();
        let opened = open_with(&sources, &part.location, &self.replies).await;
        // Looked at behind the reading: a file that is the same then was the same before, since versions do not come again. If its store
        // is away, what is kept of it was opened.
        match sources.info(&part.location).await {
            Ok(Some(info)) if part.is_of(&info) => {}
            Ok(Some(_)) => return Err(self.replaced(part)),
            Ok(None) => return Err(self.removed_or_replaced(part)),
            Err(_) => {}
        }
        let mut opened = opened.map_err(|error| unopened(&error))?;
        // What was opened may be what is kept, whatever its place has.
        if !part.is_of(&opened.info) {
            return Err(kept_another(&part.location));
        }
        if opened.blob.size() != part.size || content_of(&opened) != part.content {
            return Err(self.replaced(part));
        }
        opened.tables.obey(&self.live.config().keep);
        let (source, report) = (part.location.to_string(), Arc::clone(&self.report));
        let index_bytes = match &opened.blob {
            Blob::Chunked(blob) => blob.index().source().held_bytes(),
            Blob::File(_) | Blob::Remote(_) => 0,
        };
        let (kind, blob, tables) = (opened.kind, opened.blob, opened.tables);
        let (volume, tree): (Arc<dyn Volume>, _) = match kind {
            SpecKind::BlobIndex => {
                let (show, mtime) = (self.show, part.mtime());
                let config = ImageConfig { file_name: None, show, mtime, source, is_backed: false };
                (Arc::new(ImageVolume::new(blob.clone(), config, report)), None)
            }
            SpecKind::ArchiveIndex | SpecKind::Archive => {
                let tree = Tree::open_in(blob.clone(), Arc::clone(&self.trees)).await;
                let tree = Arc::new(tree.map_err(VolumeError::from)?);
                table::attach_at_hand(&tree, &tables, part.mtime()).await;
                table::background::start(&tree, tables, part.mtime(), &self.walks);
                (Arc::new(TreeVolume::new(Arc::clone(&tree), self.show, source, report)), Some(tree))
            }
        };
        self.live.remove(&part.shown);
        let (path, location, opening) = (part.shown.clone(), part.location.clone(), Arc::default());
        let live_part = LivePart { path, number: part.base, opening, location, kind, blob, tree };
        self.live.add(live_part.clone());
        // Settings that came meanwhile may have found it not there yet.
        if self.live.config() != config {
            let (live, live_part) = (Arc::clone(&self.live), live_part);
            // Secrets may have to be asked for. What goes wrong is in the log.
            let _ = tokio::task::spawn_blocking(move || live.retune(&live_part)).await;
        }
        let open = Arc::new(OpenPart { part: Arc::clone(part), volume, index_bytes });
        for closed in self.open.insert(Arc::clone(&open)) {
            // Of two of the same path, one of which was replaced, the newer is told of.
            if !self.open.is_shown(&closed.part.shown) {
                self.live.remove(&closed.part.shown);
            }
        }
        Ok(open)
    }
}
