//! Writes an archive, byte for byte as casync would: the caller gives nodes in order, the encoder keeps the offsets and
//! writes every directory's table.
//!
//! What the feature flags do not record is left out or reduced here, so a caller hands over all it knows of a file. The
//! encoder holds what it wrote until the caller drains it; payload may bypass it. Rules that other readers rely on hold
//! for whatever is given: names sorted, attributes sorted, no owner's name that casync would refuse. With the flags of desync
//! extended attributes take desync's form, which its reader needs: all of them, each value with a NUL.

use super::acl::AclEntry;
use super::goodbye::{Child, encode_goodbye, name_hash};
use super::node::{
    self, Content, Entry, MODE_BLOCK_DEVICE, MODE_CHARACTER_DEVICE, MODE_DIRECTORY, MODE_FIFO, MODE_REGULAR,
    MODE_SOCKET, MODE_SYMLINK, MODE_TYPE, Node, check_filename, is_portable_account_name,
};
use super::{
    CatarError, ElementHeader, FeatureFlags, Kind, MAX_SELINUX_BYTES, MAX_SYMLINK_BYTES, MAX_XATTR_NAME_BYTES,
    MAX_XATTR_VALUE_BYTES,
};

/// An id of 16 bits that means "nobody" to casync; it refuses an archive with it.
const UID16_INVALID: u64 = 65535;
/// The id of 32 bits that means "none" to Linux.
const UID32_INVALID: u64 = u32::MAX as u64;

/// Writes an archive into a buffer that the caller drains.
#[derive(Debug)]
pub struct Encoder {
    flags: FeatureFlags,
    buffer: Vec<u8>,
    /// Bytes of the archive that are no longer (or were never) in the buffer.
    gone_bytes: u64,
    directories: Vec<Directory>,
    /// The regular file whose payload is not complete, and how much of it is missing.
    open_file: Option<(Position, u64)>,
    has_root: bool,
}

/// Where a node stands among its siblings; the root has no FILENAME.
#[derive(Debug, Clone, Copy)]
struct Position {
    hash: u64,
    filename_offset: u64,
}

#[derive(Debug)]
struct Directory {
    position: Position,
    entry_offset: u64,
    children: Vec<Child>,
    last_name: Vec<u8>,
}

impl Encoder {
    /// An archive that records what these flags (after normalisation) say.
    pub fn new(flags: FeatureFlags) -> Self {
        let (buffer, directories) = (Vec::new(), Vec::new());
        Self { flags: flags.normalised(), buffer, gone_bytes: 0, directories, open_file: None, has_root: false }
    }

    /// The flags as they stand in the archive.
    pub fn feature_flags(&self) -> FeatureFlags {
        self.flags
    }

    /// Absolute offset of the next byte.
    pub fn offset(&self) -> u64 {
        self.gone_bytes + self.buffer.len() as u64
    }

    /// What was written and not drained yet.
    pub fn buffered(&self) -> &[u8] {
        &self.buffer
    }

    /// Forgets what [`Self::buffered`] gave; the buffer keeps its memory.
    pub fn clear(&mut self) {
        self.gone_bytes += self.buffer.len() as u64;
        self.buffer.clear();
    }

    /// Takes away what was written and not drained yet.
    pub fn take(&mut self) -> Vec<u8> {
        self.gone_bytes += self.buffer.len() as u64;
        std::mem::take(&mut self.buffer)
    }

    /// How many directories are open.
    pub fn depth(&self) -> usize {
        self.directories.len()
    }

    /// Whether these flags record nodes of this file type at all.
    pub fn records(&self, mode: u32) -> bool {
        let needed = match mode & MODE_TYPE {
            MODE_REGULAR | MODE_DIRECTORY => return true,
            MODE_SYMLINK => FeatureFlags::SYMLINKS,
            MODE_FIFO => FeatureFlags::FIFOS,
            MODE_SOCKET => FeatureFlags::SOCKETS,
            MODE_CHARACTER_DEVICE | MODE_BLOCK_DEVICE => FeatureFlags::DEVICE_NODES,
            _ => return false,
        };
        self.flags.has(needed)
    }

    /// Writes a node: the root without a name, every other with its name in the directory that is open, names in
    /// ascending order of bytes. A directory stays open until [`Self::end_directory`]; behind a regular file comes
    /// exactly as much payload as its content says. After an error nothing of the node is written.
    ///
    /// The node's own feature flags and the offsets in its content are not looked at.
    pub fn start_node(&mut self, name: Option<&[u8]>, node: &Node) -> Result<(), CatarError> {
        let start = self.buffer.len();
        let written = self.node(name, node);
        if written.is_err() {
            self.buffer.truncate(start);
        }
        written
    }

    /// Writes payload of the file that is open.
    pub fn payload(&mut self, bytes: &[u8]) -> Result<(), CatarError> {
        self.take_payload(bytes.len() as u64)?;
        self.buffer.extend_from_slice(bytes);
        self.end_file_if_complete();
        Ok(())
    }

    /// Says that the caller wrote payload itself, behind all that the encoder held; nothing may be buffered.
    pub fn advance(&mut self, n_bytes: u64) -> Result<(), CatarError> {
        if !self.buffer.is_empty() {
            return Err(CatarError::Invalid("payload written before the bytes that precede it"));
        }
        self.take_payload(n_bytes)?;
        self.gone_bytes = self.gone_bytes.checked_add(n_bytes).ok_or(CatarError::Invalid("an archive beyond 2^64"))?;
        self.end_file_if_complete();
        Ok(())
    }

    /// Bytes of payload that are missing from the file that is open.
    pub fn payload_left(&self) -> u64 {
        self.open_file.map_or(0, |(_, left)| left)
    }

    /// Writes the table of the directory that is open, and closes it.
    pub fn end_directory(&mut self) -> Result<(), CatarError> {
        self.no_open_file()?;
        let goodbye_offset = self.offset();
        let Some(directory) = self.directories.pop() else {
            return Err(CatarError::Invalid("the end of a directory where none is open"));
        };
        let goodbye = encode_goodbye(&directory.children, goodbye_offset, directory.entry_offset)?;
        self.buffer.extend_from_slice(&goodbye);
        self.end_node(directory.position);
        Ok(())
    }

    /// An error unless the archive is complete. What is buffered stays to be drained.
    pub fn finish(&self) -> Result<(), CatarError> {
        self.no_open_file()?;
        match self.has_root && self.directories.is_empty() {
            true => Ok(()),
            false => Err(CatarError::Truncated("a directory")),
        }
    }

    fn no_open_file(&self) -> Result<(), CatarError> {
        match self.open_file {
            None => Ok(()),
            Some(_) => Err(CatarError::Truncated("a payload")),
        }
    }

    fn take_payload(&mut self, n_bytes: u64) -> Result<(), CatarError> {
        let left = self.open_file.as_mut().and_then(|(_, left)| Some((left.checked_sub(n_bytes)?, left)));
        match left {
            Some((less, left)) => *left = less,
            None if n_bytes == 0 => {}
            None => return Err(CatarError::Invalid("more payload than the file has")),
        }
        Ok(())
    }

    fn end_file_if_complete(&mut self) {
        if let Some((position, 0)) = self.open_file {
            self.open_file = None;
            self.end_node(position);
        }
    }

    fn end_node(&mut self, position: Position) {
        let end = self.offset();
        if let Some(parent) = self.directories.last_mut() {
            let Position { hash, filename_offset } = position;
            parent.children.push(Child { hash, filename_offset, end });
        }
    }

    fn node(&mut self, name: Option<&[u8]>, node: &Node) -> Result<(), CatarError> {
        self.no_open_file()?;
        if !self.records(node.entry.mode) {
            return Err(CatarError::Invalid("a file of a type that the feature flags do not record"));
        }
        let position = Position { hash: name_hash(name.unwrap_or_default()), filename_offset: self.offset() };
        match (name, self.directories.last()) {
            (None, None) if !self.has_root => {}
            (Some(name), Some(parent)) => {
                check_filename(name)?;
                if name <= parent.last_name.as_slice() {
                    return Err(CatarError::Invalid("file names of a directory that are not in ascending order"));
                }
                self.element(Kind::Filename, &[name, b"\0"])?;
            }
            _ => return Err(CatarError::Invalid("a root with a name, or another node without one")),
        }
        let entry_offset = self.offset();
        self.entry(&node.entry)?;
        self.metadata(node)?;
        self.content(node)?;
        // Nothing fails from here on.
        if let (Some(name), Some(parent)) = (name, self.directories.last_mut()) {
            parent.last_name.clear();
            parent.last_name.extend_from_slice(name);
        }
        self.has_root = true;
        match &node.content {
            Content::Directory { .. } => {
                let (children, last_name) = (Vec::new(), Vec::new());
                self.directories.push(Directory { position, entry_offset, children, last_name });
            }
            Content::Payload { size, .. } => {
                self.open_file = Some((position, *size));
                self.end_file_if_complete();
            }
            Content::Symlink(_) | Content::Device { .. } | Content::None => self.end_node(position),
        }
        Ok(())
    }

    fn element(&mut self, kind: Kind, parts: &[&[u8]]) -> Result<(), CatarError> {
        let size = ElementHeader::BYTES + parts.iter().map(|part| part.len()).sum::<usize>();
        let header = ElementHeader { size: size as u64, kind }.to_bytes();
        ElementHeader::parse(&header)?;
        self.buffer.extend_from_slice(&header);
        parts.iter().for_each(|part| self.buffer.extend_from_slice(part));
        Ok(())
    }

    fn numbers<const N: usize>(&mut self, kind: Kind, numbers: [u64; N]) -> Result<(), CatarError> {
        self.element(kind, &[numbers.map(u64::to_le_bytes).as_flattened()])
    }

    fn entry(&mut self, entry: &Entry) -> Result<(), CatarError> {
        let flags = self.flags;
        let (file_type, permissions) = (entry.mode & MODE_TYPE, entry.mode & 0o7777);
        let is_directory = file_type == MODE_DIRECTORY;
        let is_writable = permissions & 0o222 != 0;
        let permissions = match (is_directory, file_type) {
            (_, MODE_SYMLINK) => 0o777,
            _ if flags.has_any(FeatureFlags::PERMISSIONS.with(FeatureFlags::ACL)) => permissions,
            (true, _) if flags.has(FeatureFlags::READ_ONLY) && !is_writable => 0o555,
            (false, _) if flags.has(FeatureFlags::READ_ONLY) && !is_writable => 0o444,
            (true, _) => 0o777,
            (false, _) => 0o666,
        };
        let mut file_flags = FeatureFlags::CHATTR.with(FeatureFlags::FAT_ATTRS);
        file_flags = file_flags.with(FeatureFlags::SUBVOLUME).with(FeatureFlags::SUBVOLUME_RO);
        let has_flags = is_directory || file_type == MODE_REGULAR;
        // One nanosecond before 1970 is the number that means "none" to casync's reader, which refuses the archive.
        let mtime_ns = match flags.round_time(entry.mtime_ns) {
            -1 => -2,
            mtime_ns => mtime_ns,
        };
        self.numbers(
            Kind::Entry,
            [
                flags.0,
                u64::from(file_type | permissions),
                if has_flags { entry.flags & file_flags.0 & flags.0 } else { 0 },
                self.owner(entry.uid)?,
                self.owner(entry.gid)?,
                mtime_ns as u64,
            ],
        )
    }

    fn owner(&self, id: u64) -> Result<u64, CatarError> {
        if !self.flags.has_any(FeatureFlags::UIDS) {
            return Ok(0);
        }
        // desync stores any owner, and its archives are read by itself.
        if (id == UID16_INVALID && !self.flags.is_desync()) || id >= UID32_INVALID {
            return Err(CatarError::Invalid("an owner with the id 65535 or 4294967295, which means 'none'"));
        }
        if id > UID16_INVALID && !self.flags.has(FeatureFlags::UIDS_32BIT) {
            return Err(CatarError::Invalid("an owner with an id that 16bit-uids cannot store"));
        }
        Ok(id)
    }

    /// A name as it may be stored: neither root's nor one that casync refuses. Where no numbers are recorded, the number
    /// takes the place of a name that is not known.
    fn account(&self, id: u64, name: Option<&Vec<u8>>) -> Option<Vec<u8>> {
        if !self.flags.has(FeatureFlags::USER_NAMES) || id == 0 {
            return None;
        }
        let name = name.filter(|name| is_portable_account_name(name)).cloned();
        name.or_else(|| (!self.flags.has_any(FeatureFlags::UIDS)).then(|| id.to_string().into_bytes()))
    }

    fn metadata(&mut self, node: &Node) -> Result<(), CatarError> {
        let flags = self.flags;
        let file_type = node.file_type();
        let is_file_or_directory = matches!(file_type, MODE_REGULAR | MODE_DIRECTORY);
        let owners =
            [(Kind::User, node.entry.uid, node.user.as_ref()), (Kind::Group, node.entry.gid, node.group.as_ref())];
        for (kind, id, name) in owners {
            if let Some(name) = self.account(id, name) {
                self.element(kind, &[&name, b"\0"])?;
            }
        }
        if flags.is_desync() {
            self.desync_xattrs(&node.xattrs)?;
        } else if flags.has(FeatureFlags::XATTRS) && is_file_or_directory {
            self.xattrs(&node.xattrs)?;
        }
        if flags.has(FeatureFlags::ACL) && file_type != MODE_SYMLINK {
            self.acl(node)?;
        }
        if let Some(label) = node.selinux.as_ref().filter(|_| flags.has(FeatureFlags::SELINUX)) {
            if label.contains(&0) || label.len() >= MAX_SELINUX_BYTES {
                return Err(CatarError::Invalid("an SELinux label that is too long or has a NUL"));
            }
            self.element(Kind::Selinux, &[label, b"\0"])?;
        }
        if let (Some(fcaps), MODE_REGULAR, true) = (&node.fcaps, file_type, flags.has(FeatureFlags::FCAPS)) {
            self.element(Kind::Fcaps, &[fcaps])?;
        }
        match node.quota_projid {
            Some(id) if id != 0 && flags.has(FeatureFlags::QUOTA_PROJID) && is_file_or_directory => {
                self.numbers(Kind::QuotaProjid, [id])
            }
            _ => Ok(()),
        }
    }

    /// Extended attributes, sorted. Others than `user.` and `trusted.` have their own elements or belong to the system
    /// they are on; casync refuses them in an archive.
    fn xattrs(&mut self, xattrs: &[(Vec<u8>, Vec<u8>)]) -> Result<(), CatarError> {
        let is_stored = |name: &[u8]| {
            let rest = name.strip_prefix(b"user.").or_else(|| name.strip_prefix(b"trusted."));
            rest.is_some_and(|rest| rest.last().is_some_and(|last| *last != b'.')) && !name.contains(&0)
        };
        let mut stored: Vec<_> = xattrs.iter().filter(|(name, _)| is_stored(name)).collect();
        stored.sort_unstable();
        if stored.windows(2).any(|pair| pair[0].0 == pair[1].0) {
            return Err(CatarError::Invalid("an extended attribute that is there twice"));
        }
        for (name, value) in stored {
            if name.len() > MAX_XATTR_NAME_BYTES || value.len() > MAX_XATTR_VALUE_BYTES {
                return Err(CatarError::Invalid("an extended attribute with a name or value that is too long"));
            }
            self.element(Kind::Xattr, &[name, b"\0", value])?;
        }
        Ok(())
    }

    /// Extended attributes as desync writes and reads them: all of them, each value with a NUL behind it.
    fn desync_xattrs(&mut self, xattrs: &[(Vec<u8>, Vec<u8>)]) -> Result<(), CatarError> {
        let mut sorted: Vec<_> = xattrs.iter().collect();
        sorted.sort_unstable();
        for (name, value) in sorted {
            if name.is_empty() || name.contains(&0) {
                return Err(CatarError::Invalid("an extended attribute whose name is empty or has a NUL"));
            }
            self.element(Kind::Xattr, &[name, b"\0", value, b"\0"])?;
        }
        Ok(())
    }

    fn acl(&mut self, node: &Node) -> Result<(), CatarError> {
        let acl = &node.acl;
        self.acl_entries(Kind::AclUser, &acl.users)?;
        self.acl_entries(Kind::AclGroup, &acl.groups)?;
        // The mode holds the mask as soon as anybody is named; readers insist on this element then.
        if let Some(access) = acl.access(node.entry.mode) {
            self.numbers(Kind::AclGroupObj, [access.group_obj])?;
        }
        let (Some(default), MODE_DIRECTORY) = (acl.default, node.file_type()) else { return Ok(()) };
        if default.mask.is_none() && !(acl.default_users.is_empty() && acl.default_groups.is_empty()) {
            return Err(CatarError::Invalid("a default ACL that names users or groups and has no mask"));
        }
        let mask = default.mask.unwrap_or(u64::MAX);
        self.numbers(Kind::AclDefault, [default.user_obj, default.group_obj, default.other, mask])?;
        self.acl_entries(Kind::AclDefaultUser, &acl.default_users)?;
        self.acl_entries(Kind::AclDefaultGroup, &acl.default_groups)
    }

    fn acl_entries(&mut self, kind: Kind, entries: &[AclEntry]) -> Result<(), CatarError> {
        let mut sorted = Vec::with_capacity(entries.len());
        for AclEntry { id, name, permissions } in entries {
            let name = self.account(*id, name.as_ref());
            sorted.push(AclEntry { id: self.owner(*id)?, name, permissions: *permissions });
        }
        sorted.sort_unstable();
        sorted.dedup();
        for AclEntry { id, name, permissions } in sorted {
            let numbers = [id, permissions].map(u64::to_le_bytes);
            match name {
                Some(name) => self.element(kind, &[numbers.as_flattened(), &name, b"\0"])?,
                None => self.element(kind, &[numbers.as_flattened()])?,
            }
        }
        Ok(())
    }

    fn content(&mut self, node: &Node) -> Result<(), CatarError> {
        match (&node.content, node.file_type()) {
            (Content::Payload { size, .. }, node::MODE_REGULAR) => {
                let size = size.checked_add(ElementHeader::BYTES as u64).ok_or(CatarError::TooLarge)?;
                let header = ElementHeader { size, kind: Kind::Payload }.to_bytes();
                ElementHeader::parse(&header)?;
                self.buffer.extend_from_slice(&header);
                Ok(())
            }
            (Content::Symlink(target), MODE_SYMLINK) => {
                if target.contains(&0) || target.len() >= MAX_SYMLINK_BYTES {
                    return Err(CatarError::Invalid("a symlink target that is too long or has a NUL"));
                }
                self.element(Kind::Symlink, &[target, b"\0"])
            }
            (Content::Device { major, minor }, MODE_BLOCK_DEVICE | MODE_CHARACTER_DEVICE) => {
                if *major >= 1 << 12 || *minor >= 1 << 20 {
                    return Err(CatarError::Invalid("a device number that Linux does not have"));
                }
                self.numbers(Kind::Device, [*major, *minor])
            }
            (Content::Directory { .. }, MODE_DIRECTORY) | (Content::None, MODE_FIFO | MODE_SOCKET) => Ok(()),
            _ => Err(CatarError::Invalid("content that does not fit the type of file")),
        }
    }
}
