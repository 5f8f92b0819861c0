//! One node by random access: its ENTRY, all metadata and where its content lies.
//!
//! [`parse_node`] takes as many bytes as the caller happens to have and either gives the node or says how many bytes it
//! needs, so that one read near a node is nearly always enough. Metadata elements are accepted in any order. What
//! [`super::Decoder`] reads goes through the same [`NodeBuilder`], so both agree on what a node is.

use super::acl::{Acl, AclEntry, DefaultAcl};
use super::{
    CatarError, ElementHeader, FeatureFlags, Kind, MAX_ACCOUNT_NAME_BYTES, MAX_NAME_BYTES, MAX_NODE_METADATA_BYTES,
    header_at, word,
};

/// File type bits of a mode.
pub const MODE_TYPE: u32 = 0o170000;
/// A FIFO.
pub const MODE_FIFO: u32 = 0o010000;
/// A character device.
pub const MODE_CHARACTER_DEVICE: u32 = 0o020000;
/// A directory.
pub const MODE_DIRECTORY: u32 = 0o040000;
/// A block device.
pub const MODE_BLOCK_DEVICE: u32 = 0o060000;
/// A regular file.
pub const MODE_REGULAR: u32 = 0o100000;
/// A symlink.
pub const MODE_SYMLINK: u32 = 0o120000;
/// A socket.
pub const MODE_SOCKET: u32 = 0o140000;

/// Bytes of an ENTRY element.
pub const ENTRY_BYTES: u64 = 64;

/// The fixed fields of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// What the archive records; the same in all its nodes.
    pub feature_flags: FeatureFlags,
    /// File type and permissions, as in `st_mode`.
    pub mode: u32,
    /// Attributes of chattr and FAT and the subvolume bits, in the bits of the feature flags.
    pub flags: u64,
    /// Owner.
    pub uid: u64,
    /// Owning group.
    pub gid: u64,
    /// Time of modification, nanoseconds since 1970. (-1 is "none" to casync's reader, yet its writer stores it for a file
    /// of that time; here it is a time.)
    pub mtime_ns: i64,
}

/// What a node holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// A regular file's bytes.
    Payload {
        /// How many.
        size: u64,
        /// Where they start, counted from the start of the ENTRY.
        offset: usize,
    },
    /// A symlink's target.
    Symlink(Vec<u8>),
    /// A device node's numbers.
    Device {
        /// The driver.
        major: u64,
        /// The device.
        minor: u64,
    },
    /// A directory.
    Directory {
        /// Where its first FILENAME (or its GOODBYE) starts, counted from the start of the ENTRY.
        first_child: usize,
    },
    /// Nothing: a FIFO or a socket.
    None,
}

/// A node of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// The fixed fields.
    pub entry: Entry,
    /// Name of the owner, without NUL.
    pub user: Option<Vec<u8>>,
    /// Name of the owning group, without NUL.
    pub group: Option<Vec<u8>>,
    /// Extended attributes, name and value, as stored.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Access control lists.
    pub acl: Acl,
    /// SELinux label, without NUL.
    pub selinux: Option<Vec<u8>>,
    /// File capabilities, the value of `security.capability`.
    pub fcaps: Option<Vec<u8>>,
    /// Project id for quotas.
    pub quota_projid: Option<u64>,
    /// What the node holds.
    pub content: Content,
}

impl Node {
    /// A node without any metadata beyond its ENTRY.
    pub fn new(entry: Entry, content: Content) -> Self {
        let (user, group, selinux, fcaps, quota_projid) = (None, None, None, None, None);
        Self { entry, user, group, xattrs: Vec::new(), acl: Acl::default(), selinux, fcaps, quota_projid, content }
    }

    /// File type bits of the mode, one of the `MODE_*`.
    pub fn file_type(&self) -> u32 {
        self.entry.mode & MODE_TYPE
    }

    /// Whether this is a directory.
    pub fn is_directory(&self) -> bool {
        self.file_type() == MODE_DIRECTORY
    }

    /// The value of `system.posix_acl_access`, if access says more than the mode.
    pub fn posix_acl_access(&self) -> Option<Vec<u8>> {
        self.acl.access(self.entry.mode).map(|acl| acl.to_bytes())
    }

    /// The value of `system.posix_acl_default`, if a directory has a default ACL.
    pub fn posix_acl_default(&self) -> Option<Vec<u8>> {
        self.acl.default_acl().map(|acl| acl.to_bytes())
    }

    /// All extended attributes that this node shows on Linux, names and values, each name once: those stored as such
    /// (desync stores all of them so), then ACLs, capabilities and the SELinux label from their own elements.
    pub fn shown_xattrs(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut shown = self.xattrs.clone();
        // The kernel gives labels with their NUL.
        let label = self.selinux.as_ref().map(|label| [label.as_slice(), b"\0"].concat());
        let derived = [
            ("system.posix_acl_access", self.posix_acl_access()),
            ("system.posix_acl_default", self.posix_acl_default()),
            ("security.capability", self.fcaps.clone()),
            ("security.selinux", label),
        ];
        for (name, value) in derived {
            let is_stored = self.xattrs.iter().any(|(stored, _)| stored == name.as_bytes());
            match value {
                Some(value) if !is_stored => shown.push((name.as_bytes().to_vec(), value)),
                _ => {}
            }
        }
        shown
    }
}

/// What [`parse_node`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeParse {
    /// A whole node (boxed: it is large, and the other variant is not).
    Node(Box<Node>),
    /// The bytes end before the metadata does: call again with at least this many bytes from the start of the ENTRY.
    /// Always more than were given, never more than the node may have, nor than [`MAX_NODE_METADATA_BYTES`] and one
    /// element.
    Need(u64),
}

/// Reads the node whose ENTRY starts `bytes`.
///
/// `node_bytes` is the distance from the ENTRY to the end of the node as the parent's table says (for the root: to the
/// end of the archive). `bytes` may hold less or more than that. A payload that goes on beyond the node is an error;
/// what is behind a FIFO or socket is not looked at beyond its header.
pub fn parse_node(bytes: &[u8], node_bytes: u64) -> Result<NodeParse, CatarError> {
    let within = usize::try_from(node_bytes).map_or(bytes, |end| bytes.get(..end).unwrap_or(bytes));
    let need = |end: u64| match end {
        end if end > node_bytes => Err(CatarError::Truncated("a node")),
        end => Ok(NodeParse::Need(end)),
    };
    let Some(header) = header_at(within, 0)? else { return need(ENTRY_BYTES) };
    if header.kind != Kind::Entry {
        return Err(CatarError::Unexpected { found: header.kind, place: "where a node starts" });
    }
    let Some(entry) = within.get(ElementHeader::BYTES..ENTRY_BYTES as usize) else { return need(ENTRY_BYTES) };
    let mut builder = NodeBuilder::new(entry)?;
    let mut position = ENTRY_BYTES as usize;
    loop {
        let Some(header) = header_at(within, position)? else {
            if position as u64 == node_bytes {
                return builder.finish(None, &[]).map(|node| NodeParse::Node(Box::new(node)));
            }
            return need(position as u64 + ElementHeader::BYTES as u64);
        };
        let body_start = position + ElementHeader::BYTES;
        if builder.is_inline(header.kind) {
            let size = header.small_size()?;
            let Some(body) = within.get(body_start..position + size) else {
                return need(position as u64 + size as u64);
            };
            if header.kind.is_metadata() {
                builder.metadata(header.kind, body)?;
                position += size;
                continue;
            }
            return builder.finish(Some(header), body).map(|node| NodeParse::Node(Box::new(node)));
        }
        let mut node = builder.finish(Some(header), &[])?;
        match &mut node.content {
            Content::Payload { size, offset } => {
                *offset = body_start;
                let end = (body_start as u64).checked_add(*size);
                if end.is_none_or(|end| end > node_bytes) {
                    return Err(CatarError::Truncated("a payload"));
                }
            }
            Content::Directory { first_child } => *first_child = position,
            _ => {}
        }
        return Ok(NodeParse::Node(Box::new(node)));
    }
}

/// A node while its elements come in.
#[derive(Debug)]
pub(crate) struct NodeBuilder {
    node: Node,
    metadata_bytes: u64,
    seen: u32,
}

impl NodeBuilder {
    /// Starts with the body of an ENTRY.
    pub(crate) fn new(entry: &[u8]) -> Result<Self, CatarError> {
        let mode = word(entry, 8)?;
        let entry = Entry {
            feature_flags: FeatureFlags(word(entry, 0)?).known()?,
            mode: u32::try_from(mode).map_err(|_| CatarError::Invalid("a mode with bits that no file has"))?,
            flags: word(entry, 16)?,
            uid: word(entry, 24)?,
            gid: word(entry, 32)?,
            mtime_ns: word(entry, 40)? as i64,
        };
        if entry.mode & !(MODE_TYPE | 0o7777) != 0 {
            return Err(CatarError::Invalid("a mode with bits that no file has"));
        }
        match entry.mode & MODE_TYPE {
            MODE_FIFO
            | MODE_CHARACTER_DEVICE
            | MODE_DIRECTORY
            | MODE_BLOCK_DEVICE
            | MODE_REGULAR
            | MODE_SYMLINK
            | MODE_SOCKET => {}
            _ => return Err(CatarError::Invalid("a mode of no known file type")),
        }
        if entry.uid > u64::from(u32::MAX) || entry.gid > u64::from(u32::MAX) {
            return Err(CatarError::Invalid("an owner that is not a 32 bit number"));
        }
        Ok(Self { node: Node::new(entry, Content::None), metadata_bytes: 0, seen: 0 })
    }

    /// The ENTRY.
    pub(crate) fn entry(&self) -> &Entry {
        &self.node.entry
    }

    /// Whether the body of such an element is part of what a node is, not behind it.
    pub(crate) fn is_inline(&self, kind: Kind) -> bool {
        kind.is_metadata()
            || match self.node.file_type() {
                MODE_SYMLINK => kind == Kind::Symlink,
                MODE_BLOCK_DEVICE | MODE_CHARACTER_DEVICE => kind == Kind::Device,
                _ => false,
            }
    }

    /// Takes in one metadata element.
    pub(crate) fn metadata(&mut self, kind: Kind, body: &[u8]) -> Result<(), CatarError> {
        self.metadata_bytes += (ElementHeader::BYTES + body.len()) as u64;
        if self.metadata_bytes > MAX_NODE_METADATA_BYTES {
            return Err(CatarError::TooLarge);
        }
        let first = self.seen & 1 << kind as u32 == 0;
        self.seen |= 1 << kind as u32;
        let node = &mut self.node;
        match kind {
            Kind::Xattr => node.xattrs.push(xattr(body)?),
            Kind::AclUser => node.acl.users.push(acl_entry(body)?),
            Kind::AclGroup => node.acl.groups.push(acl_entry(body)?),
            Kind::AclDefaultUser => node.acl.default_users.push(acl_entry(body)?),
            Kind::AclDefaultGroup => node.acl.default_groups.push(acl_entry(body)?),
            kind if !first => {
                return Err(CatarError::Unexpected { found: kind, place: "for the second time in a node" });
            }
            Kind::User => node.user = Some(account_name(body)?),
            Kind::Group => node.group = Some(account_name(body)?),
            Kind::AclGroupObj => node.acl.group_obj = Some(permissions(body, 0)?),
            Kind::AclDefault => node.acl.default = Some(default_acl(body)?),
            Kind::Selinux => node.selinux = Some(text(body, "an SELinux label that is empty or not ended by NUL")?),
            Kind::Fcaps => node.fcaps = Some(body.to_vec()),
            Kind::QuotaProjid => node.quota_projid = Some(word(body, 0)?),
            found => return Err(CatarError::Unexpected { found, place: "in a node's metadata" }),
        }
        Ok(())
    }

    /// The node, given the element behind its metadata (`None` at the end of the node) and, for a symlink or device,
    /// that element's body. Offsets in the content are left 0.
    pub(crate) fn finish(mut self, next: Option<ElementHeader>, body: &[u8]) -> Result<Node, CatarError> {
        let next_kind = next.map(|header| header.kind);
        self.node.content = match (self.node.file_type(), next_kind) {
            (MODE_REGULAR, Some(Kind::Payload)) => {
                Content::Payload { size: next.map_or(0, ElementHeader::body_bytes), offset: 0 }
            }
            (MODE_SYMLINK, Some(Kind::Symlink)) => {
                Content::Symlink(text(body, "a symlink target that is empty or not ended by NUL")?)
            }
            (MODE_BLOCK_DEVICE | MODE_CHARACTER_DEVICE, Some(Kind::Device)) => device(body)?,
            (MODE_DIRECTORY, Some(Kind::Filename | Kind::Goodbye)) => Content::Directory { first_child: 0 },
            (MODE_FIFO | MODE_SOCKET, None | Some(Kind::Filename | Kind::Goodbye)) => Content::None,
            (_, Some(found)) => return Err(CatarError::Unexpected { found, place: "as content of this type of file" }),
            (_, None) => return Err(CatarError::Truncated("a node, before its content")),
        };
        strip_desync_nul(&mut self.node);
        refuse_duplicates(&self.node.xattrs)?;
        Ok(self.node)
    }
}

/// desync writes a NUL behind each value that is not part of it. Its archives are known by their feature flags; a node
/// where one value lacks the NUL cannot be desync's, so nothing is taken from any.
fn strip_desync_nul(node: &mut Node) {
    if !node.entry.feature_flags.is_desync() || !node.xattrs.iter().all(|(_, value)| value.last() == Some(&0)) {
        return;
    }
    for (_, value) in &mut node.xattrs {
        value.pop();
    }
}

/// Two values for one name would leave open which is meant.
fn refuse_duplicates(xattrs: &[(Vec<u8>, Vec<u8>)]) -> Result<(), CatarError> {
    if xattrs.is_sorted_by(|one, next| one.0 < next.0) {
        return Ok(());
    }
    let mut names: Vec<&[u8]> = xattrs.iter().map(|(name, _)| name.as_slice()).collect();
    names.sort_unstable();
    match names.windows(2).any(|pair| pair[0] == pair[1]) {
        true => Err(CatarError::Invalid("an extended attribute that is there twice")),
        false => Ok(()),
    }
}

/// A text that is not empty and ended by its only NUL.
fn text(body: &[u8], wrong: &'static str) -> Result<Vec<u8>, CatarError> {
    match body.split_last() {
        Some((0, text)) if !text.is_empty() && !text.contains(&0) => Ok(text.to_vec()),
        _ => Err(CatarError::Invalid(wrong)),
    }
}

fn account_name(body: &[u8]) -> Result<Vec<u8>, CatarError> {
    text(body, "a name of a user or group that is empty or not ended by NUL")
}

fn xattr(body: &[u8]) -> Result<(Vec<u8>, Vec<u8>), CatarError> {
    let nul = body.iter().position(|byte| *byte == 0);
    match nul {
        Some(end) if (1..=super::MAX_XATTR_NAME_BYTES).contains(&end) => {
            Ok((body[..end].to_vec(), body[end + 1..].to_vec()))
        }
        _ => Err(CatarError::Invalid("an extended attribute whose name is empty or not ended by NUL")),
    }
}

fn permissions(body: &[u8], position: usize) -> Result<u64, CatarError> {
    match word(body, position)? {
        permissions @ 0..=7 => Ok(permissions),
        _ => Err(CatarError::Invalid("an ACL with permissions that do not exist")),
    }
}

fn acl_entry(body: &[u8]) -> Result<AclEntry, CatarError> {
    let id = word(body, 0)?;
    if id > u64::from(u32::MAX) {
        return Err(CatarError::Invalid("an ACL for an owner that is not a 32 bit number"));
    }
    let name = match body.get(16..) {
        None | Some([]) => None,
        Some(name) => Some(account_name(name)?),
    };
    Ok(AclEntry { id, permissions: permissions(body, 8)?, name })
}

fn default_acl(body: &[u8]) -> Result<DefaultAcl, CatarError> {
    let mask = match word(body, 24)? {
        u64::MAX => None,
        _ => Some(permissions(body, 24)?),
    };
    Ok(DefaultAcl {
        user_obj: permissions(body, 0)?,
        group_obj: permissions(body, 8)?,
        other: permissions(body, 16)?,
        mask,
    })
}

fn device(body: &[u8]) -> Result<Content, CatarError> {
    let (major, minor) = (word(body, 0)?, word(body, 8)?);
    if major >= 1 << 12 || minor >= 1 << 20 {
        return Err(CatarError::Invalid("a device number that Linux does not have"));
    }
    Ok(Content::Device { major, minor })
}

/// A FILENAME element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filename {
    /// The name, without NUL.
    pub name: Vec<u8>,
    /// Bytes of the element: the child's ENTRY starts this far behind the FILENAME's start.
    pub element_bytes: u64,
}

/// What [`parse_filename`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FilenameParse {
    /// A whole name.
    Filename(Filename),
    /// Call again with at least this many bytes (at most [`super::MAX_FILENAME_ELEMENT_BYTES`]).
    Need(u64),
}

/// Reads the FILENAME element that starts `bytes`. Names that no directory of Linux can hold are errors.
pub fn parse_filename(bytes: &[u8]) -> Result<FilenameParse, CatarError> {
    let Some(header) = header_at(bytes, 0)? else {
        return Ok(FilenameParse::Need(ElementHeader::BYTES as u64));
    };
    if header.kind != Kind::Filename {
        return Err(CatarError::Unexpected { found: header.kind, place: "where a name is expected" });
    }
    match bytes.get(ElementHeader::BYTES..header.small_size()?) {
        None => Ok(FilenameParse::Need(header.size)),
        Some(body) => Ok(FilenameParse::Filename(Filename { name: filename_body(body)?, element_bytes: header.size })),
    }
}

/// The name in the body of a FILENAME.
pub(crate) fn filename_body(body: &[u8]) -> Result<Vec<u8>, CatarError> {
    let name = text(body, "a file name that is empty or not ended by NUL")?;
    check_filename(&name)?;
    Ok(name)
}

/// Whether a directory can hold this name: not empty, `.` or `..`, no slash, no NUL, at the most 255 bytes.
pub fn check_filename(name: &[u8]) -> Result<(), CatarError> {
    let fits = (1..=MAX_NAME_BYTES).contains(&name.len());
    if !fits || name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0) {
        return Err(CatarError::Invalid("a file name that no directory can hold"));
    }
    Ok(())
}

/// Whether casync's reader accepts this name of a user or group; with another it refuses the whole archive.
pub fn is_portable_account_name(name: &[u8]) -> bool {
    let first_is_good = name.first().is_some_and(|byte| byte.is_ascii_alphabetic() || *byte == b'_');
    first_is_good
        && name.len() <= MAX_ACCOUNT_NAME_BYTES
        && name.iter().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(byte))
}
