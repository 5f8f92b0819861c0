//! A blob (a disk image) as a volume: one file in a directory, or the mountpoint itself.

use std::fs::File;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;

use super::{Answer, Attr, DirEntry, FileKind, Listing, ROOT_INO, Show, Volume, VolumeError, VolumeStat, own_xattr};
use crate::blob::backing::Presence;
use crate::blob::{Blob, ChunkedBlob};
use crate::report::Report;

/// Inode number of the image when it lies in a directory.
const IMAGE_INO: u64 = 2;

/// A blob as a file.
#[derive(Debug, Clone)]
pub struct ImageVolume {
    shared: Arc<Shared>,
}

/// What an image looks like.
#[derive(Debug, Clone)]
pub struct ImageConfig {
    /// Name of the file in its directory; `None` when the mountpoint itself is the image.
    pub file_name: Option<Bytes>,
    /// How it is shown; what is stored is taken for root's.
    pub show: Show,
    /// Modification time to show.
    pub mtime: SystemTime,
    /// Where the index lies.
    pub source: String,
    /// Whether the image has a backing file, now or soon.
    pub is_backed: bool,
}

#[derive(Debug)]
struct Shared {
    blob: Blob,
    config: ImageConfig,
    report: Arc<Report>,
}

impl ImageVolume {
    /// A volume over a blob.
    pub fn new(blob: Blob, config: ImageConfig, report: Arc<Report>) -> Self {
        Self { shared: Arc::new(Shared { blob, config, report }) }
    }
}

impl Shared {
    fn image_ino(&self) -> u64 {
        if self.config.file_name.is_some() { IMAGE_INO } else { ROOT_INO }
    }

    fn attr(&self, ino: u64) -> Result<Attr, VolumeError> {
        let (kind, permissions, nlink, size) = match ino {
            _ if ino == self.image_ino() => (FileKind::Regular, 0o444, 1, self.blob.size()),
            ROOT_INO => (FileKind::Directory, 0o555, 2, 0),
            _ => return Err(VolumeError::NotFound),
        };
        let show = self.config.show;
        let (permissions, uid, gid) = (show.permissions(permissions), show.uid(0), show.gid(0));
        Ok(Attr { ino, kind, permissions, nlink, uid, gid, size, mtime: self.config.mtime, rdev: 0 })
    }

    /// Checks that an inode exists and is the root directory.
    fn directory(&self, ino: u64) -> Result<(), VolumeError> {
        match self.attr(ino)?.kind {
            FileKind::Directory => Ok(()),
            _ => Err(VolumeError::NotADirectory),
        }
    }

    fn chunked(&self) -> Option<&ChunkedBlob> {
        match &self.blob {
            Blob::Chunked(blob) => Some(blob),
            Blob::File(_) | Blob::Remote(_) => None,
        }
    }

    fn presence(&self) -> Option<Presence> {
        self.chunked()?.presence()
    }

    fn own_xattr(&self, ino: u64, name: &[u8]) -> Result<Option<Bytes>, VolumeError> {
        let is_image = self.attr(ino)?.kind == FileKind::Regular;
        let value = match own_xattr(name) {
            Some(b"index") => Some(self.config.source.clone()),
            Some(b"chunks") if is_image => {
                self.blob.n_chunks(0, self.blob.size())?.map(|n_chunks| n_chunks.to_string())
            }
            Some(b"present") if is_image => self.presence().map(|presence| {
                // Rounded down, so that 100 says that nothing is missing.
                let per_myriad = presence.per_myriad();
                match per_myriad {
                    10_000 => "100".to_owned(),
                    _ => format!("{}.{:02}", per_myriad / 100, per_myriad % 100),
                }
            }),
            Some(b"fetches") if ino == ROOT_INO => Some(self.report.n_fetches.get().to_string()),
            Some(b"eio") if ino == ROOT_INO => Some(self.report.eio_text()),
            _ => None,
        };
        Ok(value.map(Bytes::from))
    }
}

/// An answer that is known already.
fn ready<T: Send + 'static>(answer: Result<T, VolumeError>) -> Answer<T> {
    Box::pin(std::future::ready(answer))
}

impl Volume for ImageVolume {
    fn getattr(&self, ino: u64) -> Answer<Attr> {
        ready(self.shared.attr(ino))
    }

    fn lookup(&self, parent: u64, name: &[u8]) -> Answer<Option<Attr>> {
        ready(self.shared.directory(parent).and_then(|()| match &self.shared.config.file_name {
            Some(file_name) if file_name == name => self.shared.attr(IMAGE_INO).map(Some),
            _ => Ok(None),
        }))
    }

    fn readlink(&self, _ino: u64) -> Answer<Bytes> {
        ready(Err(VolumeError::Invalid))
    }

    fn read(&self, ino: u64, offset: u64, len: u32) -> Answer<Bytes> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            if shared.attr(ino)?.kind != FileKind::Regular {
                return Err(VolumeError::IsADirectory);
            }
            let n_bytes = shared.blob.size().saturating_sub(offset).min(u64::from(len));
            Ok(shared.blob.read_along(offset, n_bytes as usize, shared.blob.size()).await?)
        })
    }

    fn readdir(&self, ino: u64, offset: u64, _max_entries: usize) -> Answer<Listing> {
        let image = self.shared.directory(ino).and_then(|()| match &self.shared.config.file_name {
            Some(name) if offset == 0 => Ok(vec![DirEntry {
                name: name.clone(),
                attr: self.shared.attr(IMAGE_INO)?,
                is_attr_known: true,
                next_offset: 1,
            }]),
            _ => Ok(Vec::new()),
        });
        ready(image.map(|entries| Listing { parent_ino: ROOT_INO, entries }))
    }

    fn listxattr(&self, ino: u64, _privileged: bool) -> Answer<Vec<Bytes>> {
        ready(self.shared.attr(ino).map(|_| Vec::new()))
    }

    fn getxattr(&self, ino: u64, name: &[u8]) -> Answer<Option<Bytes>> {
        ready(self.shared.own_xattr(ino, name))
    }

    fn inode_flags(&self, ino: u64) -> Answer<u32> {
        ready(self.shared.attr(ino).map(|_| 0))
    }

    fn stat(&self) -> VolumeStat {
        VolumeStat { size_bytes: self.shared.blob.size(), n_files: 1 }
    }

    fn has_acls(&self) -> bool {
        false
    }

    fn identity(&self) -> Option<String> {
        // The name of the file is not content, but the kernel knows it all the same.
        Some(format!("image {:?} {}", self.shared.config.file_name, self.shared.blob.identity()?))
    }

    fn has_backing(&self) -> bool {
        self.shared.config.is_backed
    }

    fn backing_file(&self, ino: u64) -> Option<Arc<File>> {
        let backing = self.shared.chunked().filter(|_| ino == self.shared.image_ino())?.backing()?;
        backing.complete_file().map(Arc::clone)
    }

    fn end(&self) {
        if let Some(backing) = self.shared.chunked().and_then(|blob| blob.backing()) {
            backing.close();
        }
    }

    fn root_kind(&self) -> FileKind {
        match self.shared.config.file_name {
            Some(_) => FileKind::Directory,
            None => FileKind::Regular,
        }
    }
}
