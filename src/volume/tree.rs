//! A directory archive as a volume.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use super::{
    Answer, Attr, DirEntry, EioSite, FileKind, Listing, ROOT_INO, Show, TreeShape, Volume, VolumeError, VolumeStat,
    own_xattr,
};
use crate::blob::BlobError;
use crate::cache::GetError;
use crate::format::catar::FeatureFlags;
use crate::report::Report;
use crate::tree::{Content, Node, Tree, TreeError, ino_of};

/// Only root sees these, as with every file system.
const PRIVILEGED_PREFIX: &[u8] = b"trusted.";

/// Permission bits of st_mode, set-id and sticky among them.
const PERMISSION_BITS: u32 = 0o7777;

/// A directory archive.
#[derive(Debug, Clone)]
pub struct TreeVolume {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    tree: Arc<Tree>,
    show: Show,
    /// What `user.caifs.index` answers: where the archive or its index lies.
    source: String,
    report: Arc<Report>,
}

impl TreeVolume {
    /// A volume over a tree; `source` names the archive or index.
    pub fn new(tree: Arc<Tree>, show: Show, source: String, report: Arc<Report>) -> Self {
        Self { shared: Arc::new(Shared { tree, show, source, report }) }
    }
}

impl Volume for TreeVolume {
    fn getattr(&self, ino: u64) -> Answer<Attr> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            let node = shared.tree.node(ino).await?;
            Ok(shared.attr(&node))
        })
    }

    fn lookup(&self, parent: u64, name: &[u8]) -> Answer<Option<Attr>> {
        let (shared, name) = (Arc::clone(&self.shared), name.to_vec());
        Box::pin(async move {
            let parent = shared.tree.node(parent).await?;
            let found = shared.tree.lookup(&parent, &name).await?;
            Ok(found.map(|node| shared.attr(&node)))
        })
    }

    fn readlink(&self, ino: u64) -> Answer<Bytes> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            match &shared.tree.node(ino).await?.content {
                Content::Symlink(target) => Ok(target.clone()),
                Content::File { .. } | Content::Device { .. } | Content::Directory { .. } | Content::Nothing => {
                    Err(VolumeError::Invalid)
                }
            }
        })
    }

    fn read(&self, ino: u64, offset: u64, len: u32) -> Answer<Bytes> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            let node = shared.tree.node(ino).await?;
            match node.content {
                Content::File { .. } => Ok(shared.tree.read(&node, offset, len).await?),
                Content::Directory { .. } => Err(VolumeError::IsADirectory),
                Content::Symlink(_) | Content::Device { .. } | Content::Nothing => Err(VolumeError::Invalid),
            }
        })
    }

    fn readdir(&self, ino: u64, offset: u64, max_entries: usize) -> Answer<Listing> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            let node = shared.tree.node(ino).await?;
            let parent_ino = ino_of(node.parent_offset);
            let mut from_idx = offset;
            loop {
                let children = shared.tree.list(&node, from_idx).await?;
                let entries: Vec<DirEntry> = children
                    .as_slice()
                    .iter()
                    .take(max_entries)
                    .map(|child| DirEntry {
                        name: child.name.clone(),
                        attr: shared.attr(&child.node),
                        is_attr_known: true,
                        next_offset: child.next_idx,
                    })
                    .collect();
                // A window of nothing but names without a file is empty without being the end.
                match children.next_idx {
                    Some(next_idx) if entries.is_empty() => from_idx = next_idx,
                    _ => return Ok(Listing { parent_ino, entries }),
                }
            }
        })
    }

    fn listxattr(&self, ino: u64, privileged: bool) -> Answer<Vec<Bytes>> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            let node = shared.tree.node(ino).await?;
            let names = node.xattrs.iter().map(|(name, _)| name);
            Ok(names.filter(|name| privileged || !name.starts_with(PRIVILEGED_PREFIX)).cloned().collect())
        })
    }

    fn getxattr(&self, ino: u64, name: &[u8]) -> Answer<Option<Bytes>> {
        let (shared, name) = (Arc::clone(&self.shared), name.to_vec());
        Box::pin(async move {
            let node = shared.tree.node(ino).await?;
            if let Some((_, value)) = node.xattrs.iter().find(|(stored, _)| *stored == name) {
                return Ok(Some(shared.show.xattr(&name, value)));
            }
            shared.own_xattr(&node, &name)
        })
    }

    fn inode_flags(&self, ino: u64) -> Answer<u32> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move { Ok(shared.tree.node(ino).await?.inode_flags) })
    }

    fn stat(&self) -> VolumeStat {
        VolumeStat { size_bytes: self.shared.tree.blob().size(), n_files: 0 }
    }

    fn has_acls(&self) -> bool {
        let flags = self.shared.tree.feature_flags();
        // desync stores ACLs as plain extended attributes.
        flags.has_any(FeatureFlags::ACL.with(FeatureFlags::XATTRS))
    }

    fn identity(&self) -> Option<String> {
        Some(format!("tree {}", self.shared.tree.blob().identity()?))
    }

    fn has_attributes_at_hand(&self) -> bool {
        self.shared.tree.has_table()
    }

    fn shape(&self) -> Option<TreeShape> {
        self.shared.tree.shape()
    }

    fn root_kind(&self) -> FileKind {
        kind_of(self.shared.tree.root())
    }
}

impl Shared {
    fn attr(&self, node: &Node) -> Attr {
        let n_subdirectories = if node.is_directory() { self.tree.n_subdirectories_if_known(node) } else { None };
        attr_of(node, n_subdirectories, &self.show)
    }

    /// The attributes that say what a file is made of. They are answered but not listed, so that a copy does not carry them along.
    fn own_xattr(&self, node: &Node, name: &[u8]) -> Result<Option<Bytes>, VolumeError> {
        let Some(own_name) = own_xattr(name) else { return Ok(None) };
        let value = match (own_name, &node.content) {
            (b"index", _) => Some(self.source.clone()),
            (b"entry-offset", _) => Some(node.entry_offset.to_string()),
            (b"payload-offset", Content::File { offset, .. }) => Some(offset.to_string()),
            (b"chunks", Content::File { offset, size }) => {
                let n_chunks = self.tree.blob().n_chunks(*offset, *size).map_err(VolumeError::from)?;
                n_chunks.map(|n_chunks| n_chunks.to_string())
            }
            (b"fetches", _) if node.ino() == ROOT_INO => Some(self.report.n_fetches.get().to_string()),
            (b"table", _) if node.ino() == ROOT_INO => Some(self.tree.table_state().to_string()),
            (b"eio", _) if node.ino() == ROOT_INO => Some(self.report.eio_text()),
            _ => None,
        };
        Ok(value.map(Bytes::from))
    }
}

/// What is shown of a file; of a directory whose subdirectories have not been counted, one name.
pub(super) fn attr_of(node: &Node, n_subdirectories: Option<u64>, show: &Show) -> Attr {
    let (size, rdev) = match &node.content {
        Content::File { size, .. } => (*size, 0),
        Content::Symlink(target) => (target.len() as u64, 0),
        Content::Device { major, minor } => (0, libc::makedev(*major, *minor)),
        Content::Directory { .. } | Content::Nothing => (0, 0),
    };
    let nlink = n_subdirectories.map_or(1, |n| u32::try_from(n).map_or(1, |n| n.saturating_add(2)));
    Attr {
        ino: node.ino(),
        kind: kind_of(node),
        permissions: match node.content {
            // Nobody looks at those of a symlink, and they are the same everywhere.
            Content::Symlink(_) => (node.mode & PERMISSION_BITS) as u16,
            _ => show.permissions((node.mode & PERMISSION_BITS) as u16),
        },
        nlink,
        uid: show.uid(node.uid),
        gid: show.gid(node.gid),
        size,
        mtime: time_of(node.mtime_ns),
        rdev,
    }
}

fn kind_of(node: &Node) -> FileKind {
    match node.mode & libc::S_IFMT {
        libc::S_IFDIR => FileKind::Directory,
        libc::S_IFLNK => FileKind::Symlink,
        libc::S_IFBLK => FileKind::BlockDevice,
        libc::S_IFCHR => FileKind::CharDevice,
        libc::S_IFIFO => FileKind::Fifo,
        libc::S_IFSOCK => FileKind::Socket,
        _ => FileKind::Regular,
    }
}

fn time_of(mtime_ns: i64) -> SystemTime {
    let span = Duration::from_nanos(mtime_ns.unsigned_abs());
    let time = match mtime_ns < 0 {
        true => SystemTime::UNIX_EPOCH.checked_sub(span),
        false => SystemTime::UNIX_EPOCH.checked_add(span),
    };
    time.unwrap_or(SystemTime::UNIX_EPOCH)
}

impl From<TreeError> for VolumeError {
    fn from(error: TreeError) -> Self {
        match error {
            TreeError::NotFound | TreeError::Loop => Self::NotFound,
            TreeError::NotADirectory => Self::NotADirectory,
            TreeError::Damaged(_) => Self::io(EioSite::ArchiveDamaged, error.to_string()),
            TreeError::Blob(error) => error.into(),
        }
    }
}

impl From<BlobError> for VolumeError {
    fn from(error: BlobError) -> Self {
        let site = match &error {
            BlobError::Get(GetError::Offline { .. }) => return Self::Offline { message: error.to_string() },
            BlobError::Get(GetError::Missing { .. }) => EioSite::ChunkMissing,
            BlobError::Get(GetError::Bad { .. }) => EioSite::ChunkBad,
            BlobError::Get(GetError::WrongLength { .. }) | BlobError::Index(_) => EioSite::IndexDamaged,
            BlobError::Get(GetError::Store(_) | GetError::Abandoned) | BlobError::Abandoned => EioSite::StoreFailed,
            BlobError::Get(GetError::Deadline { .. }) => EioSite::Deadline,
            BlobError::File { .. } => EioSite::FileFailed,
            BlobError::OutOfRange { .. } => EioSite::ArchiveDamaged,
        };
        Self::io(site, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_the_epoch() {
        assert_eq!(time_of(-1_500_000_000), SystemTime::UNIX_EPOCH - Duration::from_millis(1500));
        assert_eq!(time_of(i64::MIN), SystemTime::UNIX_EPOCH - Duration::from_nanos(1 << 63));
        assert_eq!(time_of(7), SystemTime::UNIX_EPOCH + Duration::from_nanos(7));
    }
}
