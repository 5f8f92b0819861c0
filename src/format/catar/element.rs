//! What every element has: a header of size and type, and limits on both.

/// Bytes of an element's header: size and type.
pub const HEADER_BYTES: usize = 16;

/// Bytes of an ENTRY element.
pub const ENTRY_BYTES: usize = 64;

/// Longest name of a file in bytes, as NAME_MAX of Linux.
pub const MAX_NAME_BYTES: usize = 255;

/// Largest value of an extended attribute in bytes, as XATTR_SIZE_MAX of Linux.
pub const MAX_XATTR_VALUE_BYTES: u64 = 65536;

/// Longest user, group, extended attribute or ACL name in bytes, its NUL not counted.
const MAX_ID_NAME_BYTES: u64 = 255;

/// Longest symlink target or SELinux label in bytes, as PATH_MAX of Linux with its NUL.
const MAX_TARGET_BYTES: u64 = 4096;

/// Why bytes are not a sound archive.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CatarError {
    /// An element of a type that no version of the format has.
    #[error("unknown element type {0:#018x}")]
    UnknownElement(u64),
    /// An element whose size its type does not allow.
    #[error("a {kind:?} element of {size} bytes")]
    BadSize {
        /// The type.
        kind: ElementKind,
        /// The size in its header.
        size: u64,
    },
    /// An element where another is needed.
    #[error("a {found:?} element where {wanted} is needed")]
    Unexpected {
        /// The type found.
        found: ElementKind,
        /// What would fit.
        wanted: &'static str,
    },
    /// A field with a value it cannot have.
    #[error("bad {what}: {value:#x}")]
    BadValue {
        /// The field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// A name or text that is not allowed.
    #[error("bad {0}")]
    BadText(&'static str),
    /// Bytes that end within an element.
    #[error("it is cut off")]
    Truncated,
    /// A goodbye table that does not fit its place.
    #[error("bad goodbye table: {0}")]
    BadGoodbye(&'static str),
    /// Bytes that do not begin as an archive does.
    #[error("it does not begin with an ENTRY element")]
    NotAnArchive,
}

macro_rules! kinds {
    ($($(#[doc = $doc:literal])* $name:ident = $code:literal),* $(,)?) => {
        /// The type of an element (formats.md 4.1).
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum ElementKind { $($(#[doc = $doc])* $name,)* }

        impl ElementKind {
            /// The number that stands for the type.
            pub fn code(self) -> u64 {
                match self { $(Self::$name => $code,)* }
            }

            /// The type a number stands for.
            pub fn from_code(code: u64) -> Option<Self> {
                match code { $($code => Some(Self::$name),)* _ => None }
            }
        }
    };
}

kinds! {
    /// Begins a file: mode, owner, time.
    Entry = 0x1396fabcea5bbb51,
    /// Name of the owner.
    User = 0xf453131aaeeaccb3,
    /// Name of the group.
    Group = 0x25eb6ac969396a52,
    /// Extended attribute.
    Xattr = 0xb8157091f80bc486,
    /// ACL entry of a user.
    AclUser = 0x297dc88b2ef12faf,
    /// ACL entry of a group.
    AclGroup = 0x36f2acb56cb3dd0b,
    /// ACL entry of the owning group.
    AclGroupObj = 0x23047110441f38f3,
    /// The base entries of a default ACL.
    AclDefault = 0xfe3eeda6823c8cd0,
    /// Default ACL entry of a user.
    AclDefaultUser = 0xbdf03df9bd010a91,
    /// Default ACL entry of a group.
    AclDefaultGroup = 0xa0cb1168782d1f51,
    /// SELinux label.
    Selinux = 0x46faf0602fd26c59,
    /// File capabilities.
    Fcaps = 0xf7267db0afed0629,
    /// Project id of quotas.
    QuotaProjid = 0x161baf2d8772a72b,
    /// Target of a symlink.
    Symlink = 0x664a6fb6830e0d6c,
    /// Numbers of a device.
    Device = 0xac3dace369dfe643,
    /// Content of a regular file.
    Payload = 0x8b9e1d93d6dcffc9,
    /// Name of the next file in a directory.
    Filename = 0x6dbb6ebcb3161f0b,
    /// Table at the end of a directory.
    Goodbye = 0xdfd35c5e8327c403,
}

/// Size and type of an element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ElementHeader {
    /// Bytes of the whole element, its header too.
    pub size: u64,
    /// Its type.
    pub kind: ElementKind,
}

impl ElementHeader {
    /// Reads a header, and checks the size against what the type allows.
    ///
    /// # Errors
    /// Fewer than 16 bytes, an unknown type, or a size the type does not allow.
    pub fn parse(bytes: &[u8]) -> Result<Self, CatarError> {
        let (size, code) = (u64_at(bytes, 0)?, u64_at(bytes, 8)?);
        let kind = ElementKind::from_code(code).ok_or(CatarError::UnknownElement(code))?;
        let header = HEADER_BYTES as u64;
        let (min, max) = match kind {
            ElementKind::Entry => (64, 64),
            ElementKind::User | ElementKind::Group => (header + 2, header + MAX_ID_NAME_BYTES + 1),
            // A name, its NUL, and a value that may be empty.
            ElementKind::Xattr => (header + 2, header + MAX_ID_NAME_BYTES + 1 + MAX_XATTR_VALUE_BYTES + 1),
            ElementKind::AclUser
            | ElementKind::AclGroup
            | ElementKind::AclDefaultUser
            | ElementKind::AclDefaultGroup => (32, 32 + MAX_ID_NAME_BYTES + 1),
            ElementKind::AclGroupObj | ElementKind::QuotaProjid => (24, 24),
            ElementKind::AclDefault => (48, 48),
            ElementKind::Selinux | ElementKind::Symlink => (header + 2, header + MAX_TARGET_BYTES),
            ElementKind::Fcaps => (header + 1, header + MAX_XATTR_VALUE_BYTES),
            ElementKind::Device => (32, 32),
            // The largest sum of offset and size a 64-bit archive can have is bounded where the payload is used.
            ElementKind::Payload => (header, u64::MAX - 1),
            ElementKind::Filename => (header + 2, header + MAX_NAME_BYTES as u64 + 1),
            ElementKind::Goodbye => (40, u64::MAX - 1),
        };
        let is_table = kind == ElementKind::Goodbye;
        if !(min..=max).contains(&size) || (is_table && !(size - 40).is_multiple_of(24)) {
            return Err(CatarError::BadSize { kind, size });
        }
        Ok(Self { size, kind })
    }

    /// The bytes of a header.
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&self.size.to_le_bytes());
        bytes[8..].copy_from_slice(&self.kind.code().to_le_bytes());
        bytes
    }
}

/// The little-endian number at an offset.
pub(super) fn u64_at(bytes: &[u8], offset: usize) -> Result<u64, CatarError> {
    let field = bytes.get(offset..).and_then(|rest| rest.first_chunk::<8>());
    field.map(|field| u64::from_le_bytes(*field)).ok_or(CatarError::Truncated)
}

/// A text with exactly one NUL, at its end, given without it.
pub(super) fn text<'a>(bytes: &'a [u8], what: &'static str) -> Result<&'a [u8], CatarError> {
    match bytes.split_last() {
        Some((0, text)) if !text.is_empty() && !text.contains(&0) => Ok(text),
        _ => Err(CatarError::BadText(what)),
    }
}
