//! Archives (.catar): a directory tree as one stream of elements, each behind a header of size and type.
//!
//! In reading order: this file has the element types, their size rules and the errors; [`flags`] what an archive
//! records at all; [`acl`] access control lists in the archive's form and in Linux's; [`node`] one file's metadata by
//! random access; [`goodbye`] the search tree at the end of every directory; [`decode`] a whole archive as a stream of
//! events; [`encode`] the way back.
//!
//! Everything here is a total function on bytes: any input gives a value or a [`CatarError`], never a panic, and no
//! more memory is taken than the input warrants. Offsets are checked: the arithmetic on untrusted sizes never wraps.
//!
//! All integers of the format are 64 bit little endian, and nothing is aligned.

pub mod acl;
pub mod decode;
pub mod encode;
pub mod flags;
pub mod goodbye;
pub mod node;

use std::fmt;

pub use acl::{Acl, AclEntry, DefaultAcl, PosixAcl};
pub use decode::{Decoder, DecoderOptions, Event};
pub use encode::Encoder;
pub use flags::FeatureFlags;
pub use goodbye::{Child, Descent, GoodbyeTable, Item, Tail, encode_goodbye, name_hash, search_tree_order};
pub use node::{
    Content, Entry, Filename, FilenameParse, Node, NodeParse, check_filename, is_portable_account_name, parse_filename,
    parse_node,
};

/// Longest file name in bytes (NAME_MAX of Linux).
pub const MAX_NAME_BYTES: usize = 255;
/// Longest FILENAME element: header, name, NUL.
pub const MAX_FILENAME_ELEMENT_BYTES: u64 = (ElementHeader::BYTES + MAX_NAME_BYTES + 1) as u64;
/// Longest USER, GROUP or name in an ACL element, without its NUL.
pub const MAX_ACCOUNT_NAME_BYTES: usize = 255;
/// Longest name of an extended attribute (XATTR_NAME_MAX of Linux).
pub const MAX_XATTR_NAME_BYTES: usize = 255;
/// Longest value of an extended attribute (XATTR_SIZE_MAX of Linux).
pub const MAX_XATTR_VALUE_BYTES: usize = 65536;
/// Longest symlink target with its NUL (PATH_MAX of Linux).
pub const MAX_SYMLINK_BYTES: usize = 4096;
/// Longest SELinux label with its NUL.
pub const MAX_SELINUX_BYTES: usize = 4096;
/// The metadata of one node, up to its content, may be this long: more is refused as hostile. Linux lists at the most
/// 64 KiB of attribute names on a file; real nodes stay below a few hundred KiB.
pub const MAX_NODE_METADATA_BYTES: u64 = 16 << 20;
/// Directories may be nested this deep. casync stops at 64; paths longer than PATH_MAX are reachable on Linux, so a
/// reader bounds its own stack rather than the format.
pub const MAX_DEPTH: usize = 4096;

/// What an element is: the second word of its header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Starts a node: feature flags, mode, flags, owner, time.
    Entry,
    /// Name of the owner.
    User,
    /// Name of the owning group.
    Group,
    /// One extended attribute.
    Xattr,
    /// Access of one named user.
    AclUser,
    /// Access of one named group.
    AclGroup,
    /// Access of the owning group, where the mode's group bits hold the mask.
    AclGroupObj,
    /// The unnamed entries of a directory's default ACL.
    AclDefault,
    /// One named user of a default ACL.
    AclDefaultUser,
    /// One named group of a default ACL.
    AclDefaultGroup,
    /// SELinux label.
    Selinux,
    /// File capabilities, as in the attribute `security.capability`.
    Fcaps,
    /// Project id for quotas.
    QuotaProjid,
    /// Target of a symlink.
    Symlink,
    /// Numbers of a device node.
    Device,
    /// Content of a regular file.
    Payload,
    /// Name of a directory's child; the child's node follows.
    Filename,
    /// Ends a directory: the search tree of its children.
    Goodbye,
}

/// Element types with their names, least and greatest sizes (formats: 4.1).
const KINDS: [(Kind, u64, &str, u64, u64); 18] = {
    const H: u64 = ElementHeader::BYTES as u64;
    const NAME: u64 = H + MAX_ACCOUNT_NAME_BYTES as u64 + 1;
    // One byte more than casync allows, for the NUL that desync appends to a value.
    const XATTR: u64 = H + MAX_XATTR_NAME_BYTES as u64 + 1 + MAX_XATTR_VALUE_BYTES as u64 + 1;
    [
        (Kind::Entry, 0x1396fabcea5bbb51, "ENTRY", 64, 64),
        (Kind::User, 0xf453131aaeeaccb3, "USER", H + 2, NAME),
        (Kind::Group, 0x25eb6ac969396a52, "GROUP", H + 2, NAME),
        (Kind::Xattr, 0xb8157091f80bc486, "XATTR", H + 2, XATTR),
        (Kind::AclUser, 0x297dc88b2ef12faf, "ACL_USER", 32, NAME + 16),
        (Kind::AclGroup, 0x36f2acb56cb3dd0b, "ACL_GROUP", 32, NAME + 16),
        (Kind::AclGroupObj, 0x23047110441f38f3, "ACL_GROUP_OBJ", 24, 24),
        (Kind::AclDefault, 0xfe3eeda6823c8cd0, "ACL_DEFAULT", 48, 48),
        (Kind::AclDefaultUser, 0xbdf03df9bd010a91, "ACL_DEFAULT_USER", 32, NAME + 16),
        (Kind::AclDefaultGroup, 0xa0cb1168782d1f51, "ACL_DEFAULT_GROUP", 32, NAME + 16),
        (Kind::Selinux, 0x46faf0602fd26c59, "SELINUX", H + 2, H + MAX_SELINUX_BYTES as u64),
        (Kind::Fcaps, 0xf7267db0afed0629, "FCAPS", H + 1, H + MAX_XATTR_VALUE_BYTES as u64),
        (Kind::QuotaProjid, 0x161baf2d8772a72b, "QUOTA_PROJID", 24, 24),
        (Kind::Symlink, 0x664a6fb6830e0d6c, "SYMLINK", H + 2, H + MAX_SYMLINK_BYTES as u64),
        (Kind::Device, 0xac3dace369dfe643, "DEVICE", 32, 32),
        (Kind::Payload, 0x8b9e1d93d6dcffc9, "PAYLOAD", H, u64::MAX - 1),
        (Kind::Filename, 0x6dbb6ebcb3161f0b, "FILENAME", H + 2, MAX_FILENAME_ELEMENT_BYTES),
        (Kind::Goodbye, 0xdfd35c5e8327c403, "GOODBYE", H + Tail::BYTES as u64, u64::MAX - 1),
    ]
};

impl Kind {
    /// The type word of the format.
    pub fn code(self) -> u64 {
        KINDS[self as usize].1
    }

    /// The element of a type word, if there is one.
    pub fn from_code(code: u64) -> Option<Self> {
        KINDS.iter().find(|kind| kind.1 == code).map(|kind| kind.0)
    }

    /// The name of the format.
    pub fn name(self) -> &'static str {
        KINDS[self as usize].2
    }

    /// Whether this element stands between a node's ENTRY and its content.
    pub fn is_metadata(self) -> bool {
        (Self::User as u8..=Self::QuotaProjid as u8).contains(&(self as u8))
    }

    fn accepts(self, size: u64) -> bool {
        let (_, _, _, least, greatest) = KINDS[self as usize];
        let fits = (least..=greatest).contains(&size);
        match self {
            Self::Goodbye => fits && (size - least).is_multiple_of(Item::BYTES as u64),
            _ => fits,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What every element starts with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ElementHeader {
    /// Bytes of the whole element, this header included.
    pub size: u64,
    /// What the element is.
    pub kind: Kind,
}

impl ElementHeader {
    /// Bytes of a header.
    pub const BYTES: usize = 16;

    /// Reads a header. An unknown type and a size that its type cannot have are errors.
    pub fn parse(bytes: &[u8; Self::BYTES]) -> Result<Self, CatarError> {
        let (size, code) = (word(bytes, 0)?, word(bytes, 8)?);
        let kind = Kind::from_code(code).ok_or(CatarError::UnknownKind(code))?;
        if !kind.accepts(size) {
            return Err(CatarError::Size { kind, size });
        }
        Ok(Self { size, kind })
    }

    /// The header as bytes.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.size.to_le_bytes());
        bytes[8..].copy_from_slice(&self.kind.code().to_le_bytes());
        bytes
    }

    /// Bytes after the header.
    pub fn body_bytes(self) -> u64 {
        self.size.saturating_sub(Self::BYTES as u64)
    }

    /// Bytes of a whole element that is known to be small (anything but PAYLOAD and GOODBYE).
    pub(crate) fn small_size(self) -> Result<usize, CatarError> {
        usize::try_from(self.size).map_err(|_| CatarError::Size { kind: self.kind, size: self.size })
    }
}

/// Why bytes are not an archive, or a node cannot be written into one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CatarError {
    /// No element has this type word.
    #[error("unknown element type {0:#018x}")]
    UnknownKind(u64),
    /// An element of this type cannot have this size.
    #[error("{kind} element of {size} bytes")]
    Size {
        /// The element.
        kind: Kind,
        /// Its size with the header.
        size: u64,
    },
    /// The archive (or the place reserved for a node in it) ends within an element.
    #[error("the archive ends in the middle of {0}")]
    Truncated(&'static str),
    /// An element where the grammar has no place for it.
    #[error("unexpected {found} element {place}")]
    Unexpected {
        /// The element.
        found: Kind,
        /// Where it was.
        place: &'static str,
    },
    /// A field with a value it cannot have.
    #[error("{0}")]
    Invalid(&'static str),
    /// Feature flags this program does not know.
    #[error("unsupported feature flags {0:#x}")]
    UnknownFlags(u64),
    /// Two nodes of one archive that record different things.
    #[error("feature flags change from {first:#x} to {later:#x} within the archive")]
    FlagsDiffer {
        /// Flags of the first ENTRY.
        first: u64,
        /// Flags of a later one.
        later: u64,
    },
    /// Directories nested deeper than allowed.
    #[error("directories are nested deeper than {0} levels")]
    TooDeep(usize),
    /// Metadata of a node that is larger than [`MAX_NODE_METADATA_BYTES`].
    #[error("the metadata of a node is larger than {MAX_NODE_METADATA_BYTES} bytes")]
    TooLarge,
    /// The search tree of a directory does not describe its children.
    #[error("the table of a directory is wrong: {0}")]
    Goodbye(&'static str),
}

/// The 64-bit word at a position, or an error where the bytes end.
pub(crate) fn word(bytes: &[u8], position: usize) -> Result<u64, CatarError> {
    let end = position.checked_add(8).ok_or(CatarError::Truncated("a number"))?;
    match bytes.get(position..end).and_then(|word| word.try_into().ok()) {
        Some(word) => Ok(u64::from_le_bytes(word)),
        None => Err(CatarError::Truncated("a number")),
    }
}

/// The element header at a position, or `None` where the bytes end before it does.
pub(crate) fn header_at(bytes: &[u8], position: usize) -> Result<Option<ElementHeader>, CatarError> {
    let Some(rest) = bytes.get(position..) else { return Ok(None) };
    rest.first_chunk::<{ ElementHeader::BYTES }>().map(ElementHeader::parse).transpose()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_kinds_is_in_the_order_of_the_enum_and_round_trips() {
        for (i, (kind, code, name, least, greatest)) in KINDS.into_iter().enumerate() {
            assert_eq!(kind as usize, i);
            assert_eq!((kind.code(), kind.name()), (code, name));
            assert_eq!(Kind::from_code(code), Some(kind));
            for (size, good) in [(least, true), (least - 1, false), (greatest.wrapping_add(1), false)] {
                let header = ElementHeader { size, kind };
                assert_eq!(ElementHeader::parse(&header.to_bytes()).is_ok(), good, "{name} {size}");
            }
        }
        assert!(!Kind::Entry.is_metadata() && !Kind::Symlink.is_metadata());
        assert!(Kind::User.is_metadata() && Kind::QuotaProjid.is_metadata());
    }

    #[test]
    fn headers_without_sense_are_errors() {
        let header = |size: u64, code: u64| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&size.to_le_bytes());
            bytes[8..].copy_from_slice(&code.to_le_bytes());
            ElementHeader::parse(&bytes)
        };
        assert_eq!(header(16, 7), Err(CatarError::UnknownKind(7)));
        for size in [0, 15, u64::MAX] {
            assert_eq!(header(size, Kind::Payload.code()), Err(CatarError::Size { kind: Kind::Payload, size }));
        }
        assert!(header(41, Kind::Goodbye.code()).is_err(), "not a whole number of items");
        assert!(header(64, Kind::Goodbye.code()).is_ok());
    }
}
