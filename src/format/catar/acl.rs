//! Access control lists: the archive's elements, and the attribute values by which Linux reads and sets them.
//!
//! Linux keeps an ACL in the attributes `system.posix_acl_access` and `system.posix_acl_default`: a version word, then
//! entries of tag, permissions and id (linux/posix_acl_xattr.h). The archive has one element for each named user and
//! group; the unnamed entries are in the mode. Where a file has a mask, the mode's group bits are the mask, and the
//! owning group's own permissions stand in ACL_GROUP_OBJ.

use super::CatarError;

/// Version word of Linux's attribute.
const VERSION: u32 = 2;
/// Id of entries that name nobody.
const NO_ID: u32 = u32::MAX;
/// Bytes of one entry of Linux's attribute.
const ENTRY_BYTES: usize = 8;

const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// Access of one named user or group.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct AclEntry {
    /// Numeric user or group.
    pub id: u64,
    /// Its name where the archive was made, if recorded.
    pub name: Option<Vec<u8>>,
    /// 4 read, 2 write, 1 execute.
    pub permissions: u64,
}

/// The unnamed entries of a directory's default ACL; permissions as in [`AclEntry`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DefaultAcl {
    /// The owner's permissions.
    pub user_obj: u64,
    /// The owning group's.
    pub group_obj: u64,
    /// Everybody else's.
    pub other: u64,
    /// The most that named users and groups get.
    pub mask: Option<u64>,
}

/// All that an archive says of a node's access beyond its mode.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Acl {
    /// Named users.
    pub users: Vec<AclEntry>,
    /// Named groups.
    pub groups: Vec<AclEntry>,
    /// Permissions of the owning group, where the mode holds the mask instead.
    pub group_obj: Option<u64>,
    /// Unnamed entries of the default ACL.
    pub default: Option<DefaultAcl>,
    /// Named users of the default ACL.
    pub default_users: Vec<AclEntry>,
    /// Named groups of the default ACL.
    pub default_groups: Vec<AclEntry>,
}

impl Acl {
    /// Whether nothing is said beyond the mode.
    pub fn is_empty(&self) -> bool {
        self.users.is_empty()
            && self.groups.is_empty()
            && self.group_obj.is_none()
            && self.default.is_none()
            && self.default_users.is_empty()
            && self.default_groups.is_empty()
    }

    /// The access ACL of a node with this mode, if it says more than the mode.
    pub fn access(&self, mode: u32) -> Option<PosixAcl> {
        if self.group_obj.is_none() && self.users.is_empty() && self.groups.is_empty() {
            return None;
        }
        let mode_group = u64::from(mode >> 3 & 7);
        Some(PosixAcl {
            user_obj: u64::from(mode >> 6 & 7),
            users: self.users.clone(),
            group_obj: self.group_obj.unwrap_or(mode_group),
            groups: self.groups.clone(),
            mask: Some(mode_group),
            other: u64::from(mode & 7),
        })
    }

    /// The default ACL of a directory, if it has one.
    pub fn default_acl(&self) -> Option<PosixAcl> {
        let default = self.default?;
        Some(PosixAcl {
            user_obj: default.user_obj,
            users: self.default_users.clone(),
            group_obj: default.group_obj,
            groups: self.default_groups.clone(),
            mask: default.mask,
            other: default.other,
        })
    }

    /// Takes in a file's access ACL as Linux gave it. Without a mask it says no more than the mode does.
    pub fn set_access(&mut self, acl: PosixAcl) {
        self.group_obj = acl.mask.map(|_| acl.group_obj);
        (self.users, self.groups) = (acl.users, acl.groups);
    }

    /// Takes in a directory's default ACL as Linux gave it.
    pub fn set_default(&mut self, acl: PosixAcl) {
        let (user_obj, group_obj, other, mask) = (acl.user_obj, acl.group_obj, acl.other, acl.mask);
        self.default = Some(DefaultAcl { user_obj, group_obj, other, mask });
        (self.default_users, self.default_groups) = (acl.users, acl.groups);
    }

    /// All lists of named entries.
    pub fn lists_mut(&mut self) -> [&mut Vec<AclEntry>; 4] {
        [&mut self.users, &mut self.groups, &mut self.default_users, &mut self.default_groups]
    }
}

/// A whole ACL as Linux has it in one attribute.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PosixAcl {
    /// The owner's permissions.
    pub user_obj: u64,
    /// Named users.
    pub users: Vec<AclEntry>,
    /// The owning group's permissions.
    pub group_obj: u64,
    /// Named groups.
    pub groups: Vec<AclEntry>,
    /// The most that named users and groups and the owning group get.
    pub mask: Option<u64>,
    /// Everybody else's permissions.
    pub other: u64,
}

impl PosixAcl {
    /// Reads the value of `system.posix_acl_access` or `system.posix_acl_default`. Names stay empty.
    pub fn parse(value: &[u8]) -> Result<Self, CatarError> {
        const WRONG: CatarError = CatarError::Invalid("an ACL attribute that is not of Linux's version 2");
        let (version, entries) = value.split_first_chunk::<4>().ok_or(WRONG)?;
        if u32::from_le_bytes(*version) != VERSION || entries.len() % ENTRY_BYTES != 0 {
            return Err(WRONG);
        }
        let mut acl = Self::default();
        for entry in entries.chunks_exact(ENTRY_BYTES) {
            let tag = u16::from_le_bytes([entry[0], entry[1]]);
            let permissions = u64::from(u16::from_le_bytes([entry[2], entry[3]]) & 7);
            let id = u64::from(u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]));
            match tag {
                USER_OBJ => acl.user_obj = permissions,
                USER => acl.users.push(AclEntry { id, name: None, permissions }),
                GROUP_OBJ => acl.group_obj = permissions,
                GROUP => acl.groups.push(AclEntry { id, name: None, permissions }),
                MASK => acl.mask = Some(permissions),
                OTHER => acl.other = permissions,
                _ => return Err(WRONG),
            }
        }
        Ok(acl)
    }

    /// The value of the attribute: entries in the order that Linux demands, named ones by id.
    pub fn to_bytes(&self) -> Vec<u8> {
        let n_entries = 4 + self.users.len() + self.groups.len();
        let mut bytes = Vec::with_capacity(4 + ENTRY_BYTES * n_entries);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        let mut put = |tag: u16, permissions: u64, id: u32| {
            bytes.extend_from_slice(&tag.to_le_bytes());
            bytes.extend_from_slice(&((permissions & 7) as u16).to_le_bytes());
            bytes.extend_from_slice(&id.to_le_bytes());
        };
        let put_named = |put: &mut dyn FnMut(u16, u64, u32), tag: u16, list: &[AclEntry]| {
            let mut sorted: Vec<&AclEntry> = list.iter().collect();
            sorted.sort_by_key(|entry| entry.id);
            sorted.iter().for_each(|entry| put(tag, entry.permissions, entry.id as u32));
        };
        put(USER_OBJ, self.user_obj, NO_ID);
        put_named(&mut put, USER, &self.users);
        put(GROUP_OBJ, self.group_obj, NO_ID);
        put_named(&mut put, GROUP, &self.groups);
        if let Some(mask) = self.mask {
            put(MASK, mask, NO_ID);
        }
        put(OTHER, self.other, NO_ID);
        bytes
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_list_with_a_mask_goes_to_linux_and_back() {
        let entry = |id, permissions| AclEntry { id, name: None, permissions };
        let acl = Acl {
            users: vec![entry(1000, 6), entry(7, 4)],
            groups: vec![entry(5, 1)],
            group_obj: Some(5),
            ..Acl::default()
        };
        let value = acl.access(0o100754).unwrap().to_bytes();
        let expected = [
            "02000000",
            "01000700ffffffff",
            "0200040007000000",
            "02000600e8030000",
            "04000500ffffffff",
            "0800010005000000",
            "10000500ffffffff",
            "20000400ffffffff",
        ];
        let hex: String = value.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, expected.concat());
        let mut back = Acl::default();
        back.set_access(PosixAcl::parse(&value).unwrap());
        assert_eq!(back.access(0o100754), acl.access(0o100754).map(sorted));
        assert_eq!(Acl::default().access(0o755), None);
    }

    fn sorted(mut acl: PosixAcl) -> PosixAcl {
        acl.users.sort();
        acl
    }

    #[test]
    fn a_default_list_without_a_mask() {
        let mut acl = Acl::default();
        acl.set_default(PosixAcl { user_obj: 7, group_obj: 5, other: 4, ..PosixAcl::default() });
        let value = acl.default_acl().unwrap().to_bytes();
        assert_eq!(value.len(), 4 + 3 * 8);
        assert_eq!(PosixAcl::parse(&value).unwrap(), acl.default_acl().unwrap());
        assert_eq!(acl.access(0o755), None);
    }

    #[test]
    fn what_is_no_list_is_an_error() {
        for wrong in [&b""[..], b"\x01\0\0\0", b"\x02\0\0\0\x01", b"\x02\0\0\0\x40\0\0\0\0\0\0\0"] {
            assert!(PosixAcl::parse(wrong).is_err());
        }
    }
}
