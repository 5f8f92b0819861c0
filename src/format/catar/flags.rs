//! Feature flags: what an archive stores of each file, with casync's names and rules (formats.md 4.3).

use std::fmt;
use std::ops::{BitAnd, BitOr, BitOrAssign};

use crate::digest::Digest;

/// What an archive stores of each file, and a few facts of how it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct FeatureFlags(pub u64);

macro_rules! flags {
    ($($(#[doc = $doc:literal])* $name:ident = $bit:literal, $text:literal;)*) => {
        impl FeatureFlags {
            $($(#[doc = $doc])* pub const $name: Self = Self($bit);)*

            /// Every feature with the name casync gives it.
            const NAMED: &'static [(&'static str, Self)] = &[$(($text, Self::$name),)*];
        }
    };
}

flags! {
    /// Owners below 65535.
    UIDS_16BIT = 0x1, "16bit-uids";
    /// Owners of any number.
    UIDS_32BIT = 0x2, "32bit-uids";
    /// Names of owners.
    USER_NAMES = 0x4, "user-names";
    /// Times in seconds.
    SEC_TIME = 0x8, "sec-time";
    /// Times in microseconds.
    USEC_TIME = 0x10, "usec-time";
    /// Times in nanoseconds.
    NSEC_TIME = 0x20, "nsec-time";
    /// Times in units of two seconds.
    SEC2_TIME = 0x40, "2sec-time";
    /// Of the permissions, only whether the file can be written.
    READ_ONLY = 0x80, "read-only";
    /// All permission bits.
    PERMISSIONS = 0x100, "permissions";
    /// Symlinks.
    SYMLINKS = 0x200, "symlinks";
    /// Device nodes.
    DEVICE_NODES = 0x400, "device-nodes";
    /// FIFOs.
    FIFOS = 0x800, "fifos";
    /// Sockets.
    SOCKETS = 0x1000, "sockets";
    /// FAT "hidden".
    FLAG_HIDDEN = 0x2000, "flag-hidden";
    /// FAT "system".
    FLAG_SYSTEM = 0x4000, "flag-system";
    /// FAT "archive".
    FLAG_ARCHIVE = 0x8000, "flag-archive";
    /// chattr +a.
    FLAG_APPEND = 0x10000, "flag-append";
    /// chattr +A.
    FLAG_NOATIME = 0x20000, "flag-noatime";
    /// chattr +c.
    FLAG_COMPR = 0x40000, "flag-compr";
    /// chattr +C.
    FLAG_NOCOW = 0x80000, "flag-nocow";
    /// chattr +d.
    FLAG_NODUMP = 0x100000, "flag-nodump";
    /// chattr +D.
    FLAG_DIRSYNC = 0x200000, "flag-dirsync";
    /// chattr +i.
    FLAG_IMMUTABLE = 0x400000, "flag-immutable";
    /// chattr +S.
    FLAG_SYNC = 0x800000, "flag-sync";
    /// chattr +m.
    FLAG_NOCOMP = 0x1000000, "flag-nocomp";
    /// chattr +P.
    FLAG_PROJINHERIT = 0x2000000, "flag-projinherit";
    /// btrfs subvolumes.
    SUBVOLUME = 0x4000000, "subvolume";
    /// btrfs read-only subvolumes.
    SUBVOLUME_RO = 0x8000000, "subvolume-ro";
    /// Extended attributes.
    XATTRS = 0x10000000, "xattrs";
    /// POSIX ACLs.
    ACL = 0x20000000, "acl";
    /// SELinux labels.
    SELINUX = 0x40000000, "selinux";
    /// File capabilities.
    FCAPS = 0x80000000, "fcaps";
    /// Project ids of quotas.
    QUOTA_PROJID = 0x100000000, "quota-projid";
}

/// chattr flags: the archive's bit and the kernel's (linux/fs.h).
const CHATTR: [(FeatureFlags, u32); 10] = [
    (FeatureFlags::FLAG_APPEND, 0x20),
    (FeatureFlags::FLAG_NOATIME, 0x80),
    (FeatureFlags::FLAG_COMPR, 0x4),
    (FeatureFlags::FLAG_NOCOW, 0x0080_0000),
    (FeatureFlags::FLAG_NODUMP, 0x40),
    (FeatureFlags::FLAG_DIRSYNC, 0x0001_0000),
    (FeatureFlags::FLAG_IMMUTABLE, 0x10),
    (FeatureFlags::FLAG_SYNC, 0x8),
    (FeatureFlags::FLAG_NOCOMP, 0x400),
    (FeatureFlags::FLAG_PROJINHERIT, 0x2000_0000),
];

/// FAT attributes: the archive's bit and the kernel's (linux/msdos_fs.h).
const FAT: [(FeatureFlags, u32); 3] =
    [(FeatureFlags::FLAG_HIDDEN, 0x2), (FeatureFlags::FLAG_SYSTEM, 0x4), (FeatureFlags::FLAG_ARCHIVE, 0x20)];

impl FeatureFlags {
    /// Made with the exclude file honoured.
    pub const EXCLUDE_FILE: Self = Self(1 << 60);
    /// Chunk ids are SHA-512/256, not SHA-256.
    pub const SHA512_256: Self = Self(1 << 61);
    /// Made without directories on other file systems.
    pub const EXCLUDE_SUBMOUNTS: Self = Self(1 << 62);
    /// Made without files that have chattr +d.
    pub const EXCLUDE_NODUMP: Self = Self(1 << 63);

    /// Everything that can be stored of a file.
    pub const ALL_STORED: Self = Self(0x1_ffff_ffff);
    /// Every bit with a meaning.
    pub const ALL_KNOWN: Self = Self(0xf000_0001_ffff_ffff);
    /// What casync uses by default (as Debian builds it; verified).
    pub const CASYNC_DEFAULT: Self = Self(0xb000_0001_ffef_fe26);
    /// What desync always uses (verified).
    pub const DESYNC: Self = Self(0xb000_0000_1000_1f22);

    const FAT_ATTRS: Self = Self(0xe000);
    const CHATTR: Self = Self(0x03ff_0000);
    const ALL_TIMES: Self = Self(0x78);
    const NODES: Self = Self(0x1e00);

    /// Whether all of some features are stored.
    pub fn contains(self, features: Self) -> bool {
        self.0 & features.0 == features.0
    }

    /// Whether any of some features is stored.
    pub fn intersects(self, features: Self) -> bool {
        self.0 & features.0 != 0
    }

    /// These features without some.
    #[must_use]
    pub fn without(self, features: Self) -> Self {
        Self(self.0 & !features.0)
    }

    /// The digest of the chunk ids.
    pub fn digest(self) -> Digest {
        match self.contains(Self::SHA512_256) {
            true => Digest::Sha512_256,
            false => Digest::Sha256,
        }
    }

    /// A feature or set of features by casync's name.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn by_name(name: &str) -> Result<Self, UnknownFeature> {
        let set = match name {
            "all" => Self::ALL_STORED,
            "none" => Self(0),
            "best" => {
                Self::UIDS_32BIT
                    | Self::USER_NAMES
                    | Self::NSEC_TIME
                    | Self::NODES
                    | Self::FAT_ATTRS
                    | Self::CHATTR
                    | Self::SUBVOLUME
                    | Self::SUBVOLUME_RO
                    | Self::XATTRS
                    | Self::ACL
                    | Self::SELINUX
                    | Self::FCAPS
                    | Self::QUOTA_PROJID
            }
            "unix" => Self::UIDS_16BIT | Self::PERMISSIONS | Self::SEC_TIME | Self::NODES,
            "fat" => Self::SEC2_TIME | Self::READ_ONLY | Self::FAT_ATTRS,
            "chattr" => Self::CHATTR,
            "fat-attrs" => Self::FAT_ATTRS,
            "privileged" => {
                Self::UIDS_16BIT
                    | Self::UIDS_32BIT
                    | Self::USER_NAMES
                    | Self::DEVICE_NODES
                    | Self::FLAG_SYSTEM
                    | Self::FLAG_APPEND
                    | Self::FLAG_IMMUTABLE
                    | Self::SUBVOLUME
                    | Self::SUBVOLUME_RO
                    | Self::ACL
                    | Self::SELINUX
                    | Self::FCAPS
                    | Self::QUOTA_PROJID
            }
            "fuse" => {
                Self::UIDS_16BIT
                    | Self::UIDS_32BIT
                    | Self::ALL_TIMES
                    | Self::READ_ONLY
                    | Self::PERMISSIONS
                    | Self::NODES
                    | Self::FAT_ATTRS
                    | Self::CHATTR
                    | Self::XATTRS
            }
            _ => {
                let named = Self::NAMED.iter().find(|(text, _)| *text == name);
                return named.map(|(_, feature)| *feature).ok_or_else(|| UnknownFeature(name.to_owned()));
            }
        };
        Ok(set)
    }

    /// The names of the features, in the order of their bits.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        Self::NAMED.iter().filter(move |(_, feature)| self.contains(*feature)).map(|(name, _)| *name)
    }

    /// Casync's normal form: features that others contain are left out, those that others need are added (formats.md 4.3.2).
    #[must_use]
    pub fn normalised(self) -> Self {
        let mut flags = self;
        if flags.contains(Self::ACL) && !flags.intersects(Self::UIDS_16BIT | Self::UIDS_32BIT | Self::USER_NAMES) {
            flags |= Self::UIDS_32BIT | Self::USER_NAMES;
        }
        let overruled = [
            (Self::UIDS_32BIT, Self::UIDS_16BIT),
            (Self::NSEC_TIME, Self::USEC_TIME | Self::SEC_TIME | Self::SEC2_TIME),
            (Self::USEC_TIME, Self::SEC_TIME | Self::SEC2_TIME),
            (Self::SEC_TIME, Self::SEC2_TIME),
            (Self::ACL, Self::PERMISSIONS | Self::READ_ONLY),
            (Self::PERMISSIONS, Self::READ_ONLY),
            (Self::EXCLUDE_NODUMP, Self::FLAG_NODUMP),
        ];
        for (feature, others) in overruled {
            if flags.contains(feature) {
                flags = flags.without(others);
            }
        }
        if flags.contains(Self::SUBVOLUME_RO) {
            flags |= Self::SUBVOLUME;
        }
        flags
    }

    /// The granularity of stored times in nanoseconds; `None` when no times are stored.
    pub fn time_granularity_ns(self) -> Option<u64> {
        let kinds = [
            (Self::NSEC_TIME, 1),
            (Self::USEC_TIME, 1_000),
            (Self::SEC_TIME, 1_000_000_000),
            (Self::SEC2_TIME, 2_000_000_000),
        ];
        kinds.into_iter().find(|(kind, _)| self.contains(*kind)).map(|(_, granularity)| granularity)
    }
}

/// A name that no feature has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown feature '{0}'")]
pub struct UnknownFeature(pub String);

/// chattr flags of an ENTRY as `FS_IOC_GETFLAGS` gives them.
pub fn to_fs_flags(entry_flags: u64) -> u32 {
    CHATTR.iter().filter(|(feature, _)| entry_flags & feature.0 != 0).fold(0, |flags, (_, bit)| flags | bit)
}

/// What `FS_IOC_GETFLAGS` gives as flags of an ENTRY; what casync does not store is left out.
pub fn from_fs_flags(fs_flags: u32) -> u64 {
    CHATTR.iter().filter(|(_, bit)| fs_flags & bit != 0).fold(0, |flags, (feature, _)| flags | feature.0)
}

/// What `FAT_IOCTL_GET_ATTRIBUTES` gives as flags of an ENTRY.
pub fn from_fat_attributes(attributes: u32) -> u64 {
    FAT.iter().filter(|(_, bit)| attributes & bit != 0).fold(0, |flags, (feature, _)| flags | feature.0)
}

impl BitOr for FeatureFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOrAssign for FeatureFlags {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

impl BitAnd for FeatureFlags {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl fmt::Display for FeatureFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_and_sets() {
        assert_eq!(FeatureFlags::by_name("xattrs").unwrap(), FeatureFlags::XATTRS);
        assert_eq!(FeatureFlags::by_name("chattr").unwrap().names().count(), CHATTR.len());
        assert_eq!(FeatureFlags::by_name("all").unwrap().names().count(), 33);
        assert_eq!(FeatureFlags::by_name("best").unwrap().normalised(), FeatureFlags::by_name("best").unwrap());
        assert!(FeatureFlags::by_name("sparse").is_err());
        for (name, feature) in FeatureFlags::NAMED {
            assert_eq!(FeatureFlags::by_name(name), Ok(*feature));
        }
    }

    #[test]
    fn the_default_is_everything_in_normal_form() {
        let all = FeatureFlags::ALL_STORED
            | FeatureFlags::EXCLUDE_NODUMP
            | FeatureFlags::EXCLUDE_FILE
            | FeatureFlags::SHA512_256;
        assert_eq!(all.normalised(), FeatureFlags::CASYNC_DEFAULT);
        assert_eq!(FeatureFlags::DESYNC.normalised(), FeatureFlags::DESYNC);
    }

    #[test]
    fn chattr_flags_go_both_ways() {
        for (feature, bit) in CHATTR {
            assert_eq!((to_fs_flags(feature.0), from_fs_flags(bit)), (bit, feature.0));
        }
        assert_eq!(from_fs_flags(0x0008_0000), 0, "extents are the file system's own affair");
        assert_eq!(from_fat_attributes(0x20), 0x8000);
    }
}
