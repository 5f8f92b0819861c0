//! What an archive records: the feature flags of every ENTRY, and the attribute bits of files that use the same bits.
//!
//! casync writes one bit for each thing it stored (kinds of nodes, granularity of times, ...), so that a reader knows
//! whether something is absent or was not looked at. Four more bits say how the archive was made, not what is in it.

use std::fmt;

use crate::digest::Digest;

/// The feature flags of an archive or an index.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
pub struct FeatureFlags(pub u64);

macro_rules! flags {
    ($($name:ident = $bit:expr, $text:literal;)*) => {
        impl FeatureFlags {
            $(#[doc = concat!("`", $text, "`")] pub const $name: Self = Self($bit);)*
        }

        /// The names of casync's `--with=` and `--without=`, in the order of its help.
        const NAMES: &[(&str, u64)] = &[$(($text, $bit),)*];
    };
}

flags! {
    UIDS_16BIT = 0x1, "16bit-uids";
    UIDS_32BIT = 0x2, "32bit-uids";
    USER_NAMES = 0x4, "user-names";
    SEC_TIME = 0x8, "sec-time";
    USEC_TIME = 0x10, "usec-time";
    NSEC_TIME = 0x20, "nsec-time";
    TWO_SEC_TIME = 0x40, "2sec-time";
    READ_ONLY = 0x80, "read-only";
    PERMISSIONS = 0x100, "permissions";
    SYMLINKS = 0x200, "symlinks";
    DEVICE_NODES = 0x400, "device-nodes";
    FIFOS = 0x800, "fifos";
    SOCKETS = 0x1000, "sockets";
    FLAG_HIDDEN = 0x2000, "flag-hidden";
    FLAG_SYSTEM = 0x4000, "flag-system";
    FLAG_ARCHIVE = 0x8000, "flag-archive";
    FLAG_APPEND = 0x1_0000, "flag-append";
    FLAG_NOATIME = 0x2_0000, "flag-noatime";
    FLAG_COMPR = 0x4_0000, "flag-compr";
    FLAG_NOCOW = 0x8_0000, "flag-nocow";
    FLAG_NODUMP = 0x10_0000, "flag-nodump";
    FLAG_DIRSYNC = 0x20_0000, "flag-dirsync";
    FLAG_IMMUTABLE = 0x40_0000, "flag-immutable";
    FLAG_SYNC = 0x80_0000, "flag-sync";
    FLAG_NOCOMP = 0x100_0000, "flag-nocomp";
    FLAG_PROJINHERIT = 0x200_0000, "flag-projinherit";
    SUBVOLUME = 0x400_0000, "subvolume";
    SUBVOLUME_RO = 0x800_0000, "subvolume-ro";
    XATTRS = 0x1000_0000, "xattrs";
    ACL = 0x2000_0000, "acl";
    SELINUX = 0x4000_0000, "selinux";
    FCAPS = 0x8000_0000, "fcaps";
    QUOTA_PROJID = 0x1_0000_0000, "quota-projid";
}

/// Attribute bits of a file (chattr), ours beside the `FS_*_FL` bits of `FS_IOC_GETFLAGS` (linux/fs.h).
const CHATTR: [(FeatureFlags, u32); 10] = [
    (FeatureFlags::FLAG_APPEND, 0x20),
    (FeatureFlags::FLAG_NOATIME, 0x80),
    (FeatureFlags::FLAG_COMPR, 0x4),
    (FeatureFlags::FLAG_NOCOW, 0x80_0000),
    (FeatureFlags::FLAG_NODUMP, 0x40),
    (FeatureFlags::FLAG_DIRSYNC, 0x1_0000),
    (FeatureFlags::FLAG_IMMUTABLE, 0x10),
    (FeatureFlags::FLAG_SYNC, 0x8),
    (FeatureFlags::FLAG_NOCOMP, 0x400),
    (FeatureFlags::FLAG_PROJINHERIT, 0x2000_0000),
];

/// Attribute bits of a file on FAT, ours beside those of `FAT_IOCTL_GET_ATTRIBUTES` (linux/msdos_fs.h).
const FAT: [(FeatureFlags, u32); 3] =
    [(FeatureFlags::FLAG_HIDDEN, 2), (FeatureFlags::FLAG_SYSTEM, 4), (FeatureFlags::FLAG_ARCHIVE, 32)];

impl FeatureFlags {
    /// `.caexclude` files were honoured.
    pub const EXCLUDE_FILE: Self = Self(0x1000_0000_0000_0000);
    /// Chunk ids are SHA-512/256, else SHA-256.
    pub const SHA512_256: Self = Self(0x2000_0000_0000_0000);
    /// Mount points were left out.
    pub const EXCLUDE_SUBMOUNTS: Self = Self(0x4000_0000_0000_0000);
    /// Files with the nodump attribute were left out.
    pub const EXCLUDE_NODUMP: Self = Self(0x8000_0000_0000_0000);

    /// Everything that `--with` can ask for.
    pub const WITH_MASK: Self = Self(0x1_ffff_ffff);
    /// Everything this program knows.
    pub const KNOWN: Self = Self(Self::WITH_MASK.0 | 0xf000_0000_0000_0000);
    /// What `casync make` records when it is not told otherwise.
    pub const CASYNC_DEFAULT: Self = Self(0xb000_0001_ffef_fe26);
    /// What desync always records.
    pub const DESYNC: Self = Self(0xb000_0000_1000_1f22);

    /// The set `chattr`.
    pub const CHATTR: Self = Self(0x3ff_0000);
    /// The set `fat-attrs`.
    pub const FAT_ATTRS: Self = Self(0xe000);
    /// The set `unix`: what every file system of a Unix can store.
    pub const UNIX: Self = Self(0x1f09);
    /// The set `fat`: what FAT can store.
    pub const FAT: Self = Self(0xe0c0);
    /// The set `best`: the most exact form of everything.
    pub const BEST: Self = Self(0x1_ffff_fe26);
    /// The set `privileged`: what only a privileged user can restore.
    pub const PRIVILEGED: Self = Self(
        Self::UIDS.0
            | Self::USER_NAMES.0
            | Self::DEVICE_NODES.0
            | Self::FLAG_SYSTEM.0
            | Self::FLAG_APPEND.0
            | Self::FLAG_IMMUTABLE.0
            | Self::SUBVOLUME.0
            | Self::SUBVOLUME_RO.0
            | Self::ACL.0
            | Self::SELINUX.0
            | Self::FCAPS.0
            | Self::QUOTA_PROJID.0,
    );
    /// The set `fuse`: what casync's mount shows.
    pub const FUSE: Self =
        Self(Self::UIDS.0 | Self::TIMES.0 | 0x1f80 | Self::FAT_ATTRS.0 | Self::CHATTR.0 | Self::XATTRS.0);

    /// Both kinds of numeric owners.
    pub const UIDS: Self = Self(0x3);
    /// All granularities of times.
    pub const TIMES: Self = Self(0x78);

    /// Whether all of these flags are set.
    pub const fn has(self, flags: Self) -> bool {
        self.0 & flags.0 == flags.0
    }

    /// Whether at least one of these flags is set.
    pub const fn has_any(self, flags: Self) -> bool {
        self.0 & flags.0 != 0
    }

    /// These flags and those.
    pub const fn with(self, flags: Self) -> Self {
        Self(self.0 | flags.0)
    }

    /// These flags but for those.
    pub const fn without(self, flags: Self) -> Self {
        Self(self.0 & !flags.0)
    }

    /// A flag or a set by its name on casync's command line.
    pub fn parse(name: &str) -> Result<Self, FlagNameError> {
        let set = match name {
            "best" => Self::BEST,
            "all" => Self::WITH_MASK,
            "unix" => Self::UNIX,
            "fat" => Self::FAT,
            "chattr" => Self::CHATTR,
            "fat-attrs" => Self::FAT_ATTRS,
            "privileged" => Self::PRIVILEGED,
            "fuse" => Self::FUSE,
            flag => match NAMES.iter().find(|(name, _)| *name == flag) {
                Some((_, bit)) => Self(*bit),
                None => return Err(FlagNameError(flag.chars().take(80).collect())),
            },
        };
        Ok(set)
    }

    /// The names of all flags that are set, in the order of their bits (those that say how an archive was made have no
    /// name).
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        NAMES.iter().filter(move |(_, bit)| self.0 & bit != 0).map(|(name, _)| *name)
    }

    /// The flags without those that others make useless, as every writer must store them (formats: 4.3.2).
    pub fn normalised(self) -> Self {
        let mut flags = self;
        if flags.has(Self::ACL) && !flags.has_any(Self::UIDS.with(Self::USER_NAMES)) {
            flags = flags.with(Self::UIDS_32BIT).with(Self::USER_NAMES);
        }
        // Each line: with the first, the second says nothing more.
        let weaker = [
            (Self::UIDS_32BIT, Self::UIDS_16BIT),
            (Self::NSEC_TIME, Self(0x58)),
            (Self::USEC_TIME, Self(0x48)),
            (Self::SEC_TIME, Self::TWO_SEC_TIME),
            (Self::ACL, Self(0x180)),
            (Self::PERMISSIONS, Self::READ_ONLY),
            (Self::EXCLUDE_NODUMP, Self::FLAG_NODUMP),
        ];
        for (strong, weak) in weaker {
            if flags.has(strong) {
                flags = flags.without(weak);
            }
        }
        if flags.has(Self::SUBVOLUME_RO) {
            flags = flags.with(Self::SUBVOLUME);
        }
        flags
    }

    /// The flags again if this program knows all of them.
    pub fn known(self) -> Result<Self, super::CatarError> {
        match self.without(Self::KNOWN) {
            Self(0) => Ok(self),
            Self(unknown) => Err(super::CatarError::UnknownFlags(unknown)),
        }
    }

    /// The digest of the chunk ids that belong to this archive.
    pub fn digest(self) -> Digest {
        if self.has(Self::SHA512_256) { Digest::Sha512_256 } else { Digest::Sha256 }
    }

    /// The flags with the bit of this digest.
    pub fn with_digest(self, digest: Digest) -> Self {
        match digest {
            Digest::Sha512_256 => self.with(Self::SHA512_256),
            Digest::Sha256 => self.without(Self::SHA512_256),
        }
    }

    /// Whether an archive with these flags is (as good as surely) one of desync's, whose quirks a reader then heeds.
    pub fn is_desync(self) -> bool {
        self.0 & Self::WITH_MASK.0 == Self::DESYNC.0 & Self::WITH_MASK.0
    }

    /// A time in nanoseconds, rounded down to what these flags store; 0 if they store none.
    ///
    /// casync divides the unsigned number, so that a time before 1970 comes out up to one unit from a whole unit of
    /// signed time; equal archives matter more than the beauty of such a time.
    pub fn round_time(self, mtime_ns: i64) -> i64 {
        let unit = match () {
            () if self.has(Self::NSEC_TIME) => 1,
            () if self.has(Self::USEC_TIME) => 1_000,
            () if self.has(Self::SEC_TIME) => 1_000_000_000,
            () if self.has(Self::TWO_SEC_TIME) => 2_000_000_000,
            () => return 0,
        };
        let unsigned = mtime_ns as u64;
        (unsigned - unsigned % unit) as i64
    }
}

/// The `FS_*_FL` bits (`FS_IOC_GETFLAGS`, lsattr) of a file's attribute bits.
pub fn to_fs_flags(flags: u64) -> u32 {
    CHATTR.iter().filter(|(ours, _)| flags & ours.0 != 0).fold(0, |bits, (_, theirs)| bits | theirs)
}

/// A file's attribute bits from its `FS_*_FL` bits; those that archives do not know are dropped.
pub fn from_fs_flags(bits: u32) -> u64 {
    CHATTR.iter().filter(|(_, theirs)| bits & theirs != 0).fold(0, |flags, (ours, _)| flags | ours.0)
}

/// The attribute byte of FAT (`FAT_IOCTL_GET_ATTRIBUTES`) of a file's attribute bits.
pub fn to_fat_attrs(flags: u64) -> u32 {
    FAT.iter().filter(|(ours, _)| flags & ours.0 != 0).fold(0, |bits, (_, theirs)| bits | theirs)
}

/// A file's attribute bits from those of FAT; those that archives do not know are dropped.
pub fn from_fat_attrs(bits: u32) -> u64 {
    FAT.iter().filter(|(_, theirs)| bits & theirs != 0).fold(0, |flags, (ours, _)| flags | ours.0)
}

impl fmt::Debug for FeatureFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FeatureFlags({:#x})", self.0)
    }
}

/// A name that is neither a feature flag nor a set of them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown feature '{0}' (see the list of --with=help)")]
pub struct FlagNameError(pub String);

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_and_sets_are_those_of_casync() {
        assert_eq!(NAMES.len(), 33);
        for (i, (name, bit)) in NAMES.iter().enumerate() {
            assert_eq!(*bit, 1 << i, "{name}");
            assert_eq!(FeatureFlags::parse(name), Ok(FeatureFlags(*bit)));
        }
        let set = |names: &str| names.split(' ').fold(0, |all, name| all | FeatureFlags::parse(name).unwrap().0);
        let times = "sec-time usec-time nsec-time 2sec-time";
        let nodes = "symlinks device-nodes fifos sockets";
        assert_eq!(FeatureFlags::UNIX.0, set(&format!("16bit-uids permissions sec-time {nodes}")));
        assert_eq!(FeatureFlags::FAT.0, set("2sec-time read-only flag-hidden flag-system flag-archive"));
        let fuse = format!("16bit-uids 32bit-uids {times} read-only permissions {nodes} fat-attrs chattr xattrs");
        assert_eq!(FeatureFlags::FUSE.0, set(&fuse));
        let rest = "fat-attrs chattr subvolume subvolume-ro xattrs acl selinux fcaps quota-projid";
        assert_eq!(FeatureFlags::BEST.0, set(&format!("32bit-uids user-names nsec-time {nodes} {rest}")));
        assert!(FeatureFlags::parse("bests").is_err());
        assert_eq!(FeatureFlags::FUSE.names().count(), 26);
    }

    #[test]
    fn normalising_everything_gives_what_casync_writes() {
        let made_by = FeatureFlags::EXCLUDE_NODUMP.with(FeatureFlags::EXCLUDE_FILE).with(FeatureFlags::SHA512_256);
        assert_eq!(FeatureFlags::WITH_MASK.with(made_by).normalised(), FeatureFlags::CASYNC_DEFAULT);
        assert_eq!(FeatureFlags::CASYNC_DEFAULT.normalised(), FeatureFlags::CASYNC_DEFAULT);
        assert_eq!(FeatureFlags::DESYNC.normalised(), FeatureFlags::DESYNC);
        let acl = FeatureFlags::ACL.with(FeatureFlags::PERMISSIONS);
        assert_eq!(acl.normalised().0, 0x2000_0006, "an ACL needs to name its users");
        assert_eq!(FeatureFlags::SUBVOLUME_RO.normalised().0, 0xc00_0000);
        assert_eq!(FeatureFlags(0x78).normalised().0, 0x20);
        assert_eq!(FeatureFlags(0x58).normalised().0, 0x10);
        assert_eq!(FeatureFlags(0x48).normalised().0, 0x8);
        assert_eq!(FeatureFlags(0x180).normalised().0, 0x100);
    }

    #[test]
    fn digest_and_unknown_bits() {
        assert_eq!(FeatureFlags::DESYNC.digest(), Digest::Sha512_256);
        assert_eq!(FeatureFlags::DESYNC.with_digest(Digest::Sha256).digest(), Digest::Sha256);
        assert!(FeatureFlags::KNOWN.known().is_ok());
        assert!(FeatureFlags(1 << 33).known().is_err());
        assert!(FeatureFlags::DESYNC.is_desync() && !FeatureFlags::CASYNC_DEFAULT.is_desync());
    }

    #[test]
    fn attribute_bits_go_both_ways() {
        assert_eq!(from_fs_flags(to_fs_flags(u64::MAX)), FeatureFlags::CHATTR.0);
        assert_eq!(from_fs_flags(0x10), FeatureFlags::FLAG_IMMUTABLE.0);
        assert_eq!(to_fs_flags(FeatureFlags::FLAG_NODUMP.0), 0x40);
        assert_eq!(from_fat_attrs(to_fat_attrs(u64::MAX)), FeatureFlags::FAT_ATTRS.0);
        assert_eq!(to_fat_attrs(FeatureFlags::FLAG_SYSTEM.0), 4);
    }

    #[test]
    fn times_are_rounded_as_casync_does() {
        let ns = 1_700_000_001_123_456_789;
        let cases = [(0x20, ns), (0x10, 1_700_000_001_123_456_000), (0x8, 1_700_000_001_000_000_000), (0, 0)];
        for (flags, rounded) in cases {
            assert_eq!(FeatureFlags(flags).round_time(ns), rounded);
        }
        assert_eq!(FeatureFlags(0x40).round_time(ns), 1_700_000_000_000_000_000);
        // Measured: `casync make --with=unix` of a file of 1960-01-01 00:00:00.123456789.
        assert_eq!(FeatureFlags::UNIX.round_time(-315_619_199_876_543_211), -315_619_200_709_551_616);
    }
}
