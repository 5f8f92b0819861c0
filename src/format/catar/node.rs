//! One file of an archive: its ENTRY, the metadata elements after it, and where its content begins.
//!
//! The parser takes the bytes that are at hand and says how many it needs, so that a reader by random access fetches no more than
//! a file's head. It accepts the metadata in any order, since nothing depends on it.

use super::element::{
    CatarError, ElementHeader, ElementKind, ENTRY_BYTES, HEADER_BYTES, MAX_NAME_BYTES, text, u64_at,
};
use super::flags::FeatureFlags;

/// Bytes of metadata a file can have before its content: room for the largest attribute lists that Linux file systems hold.
pub const MAX_METADATA_BYTES: usize = 16 << 20;

/// The fields of an ENTRY element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// What the archive stores; the same in every ENTRY.
    pub feature_flags: FeatureFlags,
    /// st_mode: type and permission bits.
    pub mode: u32,
    /// chattr and FAT flags, as bits of [`FeatureFlags`].
    pub flags: u64,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Modification time in nanoseconds since the epoch, negative before.
    pub mtime_ns: i64,
}

/// An ACL entry of a user or group.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct AclEntry {
    /// User or group id.
    pub id: u64,
    /// Its name, if the archive has it.
    pub name: Option<Vec<u8>>,
    /// 4 read, 2 write, 1 execute.
    pub permissions: u64,
}

/// The base entries of a default ACL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AclDefault {
    /// The owner's permissions.
    pub user_obj: u64,
    /// The owning group's permissions.
    pub group_obj: u64,
    /// Everyone else's permissions.
    pub other: u64,
    /// The mask, if there is one.
    pub mask: Option<u64>,
}

/// POSIX ACLs of a file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Acl {
    /// Users.
    pub users: Vec<AclEntry>,
    /// Groups.
    pub groups: Vec<AclEntry>,
    /// The owning group's permissions, when the mode's group bits are the mask.
    pub group_obj: Option<u64>,
    /// The default ACL of a directory.
    pub default: Option<AclDefault>,
    /// Users of the default ACL.
    pub default_users: Vec<AclEntry>,
    /// Groups of the default ACL.
    pub default_groups: Vec<AclEntry>,
}

/// What comes after the metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Content of a regular file.
    Payload {
        /// Its length in bytes.
        size: u64,
        /// Where it begins, counted from the ENTRY.
        offset: usize,
    },
    /// Target of a symlink.
    Symlink(Vec<u8>),
    /// Numbers of a device.
    Device {
        /// Major number.
        major: u64,
        /// Minor number.
        minor: u64,
    },
    /// The first child, or the goodbye table, of a directory.
    Directory {
        /// Where it begins, counted from the ENTRY.
        first_child: usize,
    },
    /// Nothing: a FIFO or a socket.
    None,
}

/// A file's metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Mode, owner, time.
    pub entry: Entry,
    /// Name of the owner.
    pub user: Option<Vec<u8>>,
    /// Name of the group.
    pub group: Option<Vec<u8>>,
    /// Extended attributes, in stored order.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// ACLs.
    pub acl: Acl,
    /// SELinux label.
    pub selinux: Option<Vec<u8>>,
    /// Value of `security.capability`.
    pub fcaps: Option<Vec<u8>>,
    /// Project id.
    pub quota_projid: Option<u64>,
    /// What comes next.
    pub content: Content,
}

/// What the bytes at hand hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeParse {
    /// All of the metadata.
    Node(Node),
    /// A part: at least so many bytes from the ENTRY are needed.
    Need(usize),
}

/// Reads the file whose ENTRY the bytes begin with. `complete` says that the archive ends with these bytes.
///
/// # Errors
/// They are not a sound ENTRY with its metadata.
pub fn parse_node(bytes: &[u8], complete: bool) -> Result<NodeParse, CatarError> {
    let header = match element_at(bytes, 0)? {
        Ok(header) => header,
        Err(need) => return Ok(need),
    };
    if header.kind != ElementKind::Entry {
        return Err(CatarError::Unexpected { found: header.kind, wanted: "an ENTRY" });
    }
    let Some(body) = bytes.get(HEADER_BYTES..ENTRY_BYTES) else { return Ok(NodeParse::Need(ENTRY_BYTES)) };
    let mut node = Node {
        entry: parse_entry(body)?,
        user: None,
        group: None,
        xattrs: Vec::new(),
        acl: Acl::default(),
        selinux: None,
        fcaps: None,
        quota_projid: None,
        content: Content::None,
    };
    let kind = node.entry.mode & libc::S_IFMT;
    let mut position = ENTRY_BYTES;
    loop {
        if complete && position == bytes.len() {
            break;
        }
        let header = match element_at(bytes, position)? {
            Ok(header) => header,
            Err(need) => return Ok(need),
        };
        let body_start = position + HEADER_BYTES;
        match header.kind {
            ElementKind::Payload => {
                node.content = Content::Payload { size: header.size - HEADER_BYTES as u64, offset: body_start };
                break;
            }
            ElementKind::Filename | ElementKind::Goodbye => {
                if kind == libc::S_IFDIR {
                    node.content = Content::Directory { first_child: position };
                }
                break;
            }
            ElementKind::Entry => {
                return Err(CatarError::Unexpected { found: header.kind, wanted: "metadata or content" });
            }
            _ => {}
        }
        // The sizes of all other elements are small; the sum is bounded below.
        let end = position + header.size as usize;
        if end > MAX_METADATA_BYTES {
            return Err(CatarError::BadValue { what: "amount of metadata", value: end as u64 });
        }
        let Some(body) = bytes.get(body_start..end) else {
            // The next element's header, too, so that this was the last time for most files.
            return Ok(NodeParse::Need(end + HEADER_BYTES));
        };
        node.take(header.kind, body)?;
        position = end;
        if matches!(header.kind, ElementKind::Symlink | ElementKind::Device) {
            break;
        }
    }
    node.check(kind)?;
    Ok(NodeParse::Node(node))
}

/// The header at a position, or how many bytes it needs.
fn element_at(bytes: &[u8], position: usize) -> Result<Result<ElementHeader, NodeParse>, CatarError> {
    match bytes.get(position..position + HEADER_BYTES) {
        Some(header) => ElementHeader::parse(header).map(Ok),
        None => Ok(Err(NodeParse::Need(position + HEADER_BYTES))),
    }
}

fn parse_entry(body: &[u8]) -> Result<Entry, CatarError> {
    let feature_flags = FeatureFlags(u64_at(body, 0)?);
    if feature_flags.without(FeatureFlags::ALL_KNOWN) != FeatureFlags(0) {
        return Err(CatarError::BadValue { what: "feature flags", value: feature_flags.0 });
    }
    let mode = u64_at(body, 8)?;
    let known_mode = u64::from(libc::S_IFMT | 0o7777);
    if mode & !known_mode != 0 {
        return Err(CatarError::BadValue { what: "mode", value: mode });
    }
    Ok(Entry {
        feature_flags,
        mode: mode as u32,
        flags: u64_at(body, 16)?,
        uid: u64_at(body, 24)?,
        gid: u64_at(body, 32)?,
        mtime_ns: u64_at(body, 40)?.cast_signed(),
    })
}

impl Node {
    /// Takes in a metadata element.
    fn take(&mut self, kind: ElementKind, body: &[u8]) -> Result<(), CatarError> {
        match kind {
            ElementKind::User => self.user = Some(text(body, "user name")?.to_vec()),
            ElementKind::Group => self.group = Some(text(body, "group name")?.to_vec()),
            ElementKind::Xattr => {
                let name_len = body.iter().position(|byte| *byte == 0).ok_or(CatarError::BadText("attribute name"))?;
                let (name, value) = (&body[..name_len], &body[name_len + 1..]);
                if name.is_empty() || name_len > MAX_NAME_BYTES {
                    return Err(CatarError::BadText("attribute name"));
                }
                self.xattrs.push((name.to_vec(), self.without_desync_nul(value).to_vec()));
            }
            ElementKind::AclUser => self.acl.users.push(acl_entry(body)?),
            ElementKind::AclGroup => self.acl.groups.push(acl_entry(body)?),
            ElementKind::AclGroupObj => self.acl.group_obj = Some(permissions(u64_at(body, 0)?)?),
            ElementKind::AclDefault => {
                let mask = u64_at(body, 24)?;
                self.acl.default = Some(AclDefault {
                    user_obj: permissions(u64_at(body, 0)?)?,
                    group_obj: permissions(u64_at(body, 8)?)?,
                    other: permissions(u64_at(body, 16)?)?,
                    mask: if mask == u64::MAX { None } else { Some(permissions(mask)?) },
                });
            }
            ElementKind::AclDefaultUser => self.acl.default_users.push(acl_entry(body)?),
            ElementKind::AclDefaultGroup => self.acl.default_groups.push(acl_entry(body)?),
            ElementKind::Selinux => self.selinux = Some(text(body, "SELinux label")?.to_vec()),
            ElementKind::Fcaps => self.fcaps = Some(body.to_vec()),
            ElementKind::QuotaProjid => self.quota_projid = Some(u64_at(body, 0)?),
            ElementKind::Symlink => self.content = Content::Symlink(text(body, "symlink target")?.to_vec()),
            ElementKind::Device => {
                self.content = Content::Device { major: u64_at(body, 0)?, minor: u64_at(body, 8)? };
            }
            ElementKind::Entry | ElementKind::Payload | ElementKind::Filename | ElementKind::Goodbye => {
                return Err(CatarError::Unexpected { found: kind, wanted: "metadata" });
            }
        }
        Ok(())
    }

    /// Whether the content is what the mode says.
    fn check(&self, kind: u32) -> Result<(), CatarError> {
        let fits = match &self.content {
            Content::Payload { .. } => kind == libc::S_IFREG,
            Content::Symlink(_) => kind == libc::S_IFLNK,
            Content::Device { .. } => kind == libc::S_IFBLK || kind == libc::S_IFCHR,
            Content::Directory { .. } => kind == libc::S_IFDIR,
            Content::None => kind == libc::S_IFIFO || kind == libc::S_IFSOCK,
        };
        match fits {
            true => Ok(()),
            false => Err(CatarError::BadValue { what: "mode for this content", value: u64::from(self.entry.mode) }),
        }
    }

    /// desync ends every attribute value with a NUL that is not part of it (formats.md 4.8). Its archives are told by their flags.
    fn without_desync_nul<'a>(&self, value: &'a [u8]) -> &'a [u8] {
        match value {
            [value @ .., 0] if self.entry.feature_flags == FeatureFlags::DESYNC => value,
            _ => value,
        }
    }
}

fn acl_entry(body: &[u8]) -> Result<AclEntry, CatarError> {
    let name = match &body[16..] {
        [] => None,
        name => Some(text(name, "name in an ACL")?.to_vec()),
    };
    Ok(AclEntry { id: u64_at(body, 0)?, permissions: permissions(u64_at(body, 8)?)?, name })
}

fn permissions(value: u64) -> Result<u64, CatarError> {
    match value {
        0..=7 => Ok(value),
        _ => Err(CatarError::BadValue { what: "permissions in an ACL", value }),
    }
}

/// What the bytes at hand hold of a FILENAME element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FilenameParse<'a> {
    /// All of it.
    Filename {
        /// The name.
        name: &'a [u8],
        /// Bytes of the element.
        n_bytes: usize,
    },
    /// A part: at least so many bytes are needed.
    Need(usize),
}

/// Reads the FILENAME element that the bytes begin with.
///
/// # Errors
/// They do not begin with one, or the name cannot be one of a file.
pub fn parse_filename(bytes: &[u8]) -> Result<FilenameParse<'_>, CatarError> {
    if bytes.len() < HEADER_BYTES {
        return Ok(FilenameParse::Need(HEADER_BYTES));
    }
    let header = ElementHeader::parse(bytes)?;
    if header.kind != ElementKind::Filename {
        return Err(CatarError::Unexpected { found: header.kind, wanted: "a FILENAME" });
    }
    let n_bytes = header.size as usize;
    let Some(body) = bytes.get(HEADER_BYTES..n_bytes) else { return Ok(FilenameParse::Need(n_bytes)) };
    let name = text(body, "file name")?;
    if name == b"." || name == b".." || name.contains(&b'/') {
        return Err(CatarError::BadText("file name"));
    }
    Ok(FilenameParse::Filename { name, n_bytes })
}

/// Checks that bytes begin as an archive does.
///
/// # Errors
/// They do not.
pub fn check_is_archive(head: &[u8]) -> Result<(), CatarError> {
    match ElementHeader::parse(head) {
        Ok(header) if header.kind == ElementKind::Entry => Ok(()),
        _ => Err(CatarError::NotAnArchive),
    }
}
