//! A file's metadata as extended attributes, the way Linux file systems show it.

use super::node::{AclEntry, Node};

/// Version of the ACL attributes (linux/posix_acl_xattr.h).
const ACL_VERSION: u32 = 2;

/// Id of entries that have none.
const ACL_NO_ID: u32 = u32::MAX;

/// Tags of ACL entries, in the order they must have.
mod tag {
    pub(super) const USER_OBJ: u16 = 0x01;
    pub(super) const USER: u16 = 0x02;
    pub(super) const GROUP_OBJ: u16 = 0x04;
    pub(super) const GROUP: u16 = 0x08;
    pub(super) const MASK: u16 = 0x10;
    pub(super) const OTHER: u16 = 0x20;
}

impl Node {
    /// Everything a mount shows as an extended attribute, by name and without duplicates: stored ones, ACLs, capabilities, label.
    pub fn shown_xattrs(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let own = [
            ("security.capability", self.fcaps.clone()),
            ("security.selinux", self.selinux.as_ref().map(|label| [label.as_slice(), b"\0"].concat())),
            ("system.posix_acl_access", self.posix_acl_access()),
            ("system.posix_acl_default", self.posix_acl_default()),
        ];
        let own = own.into_iter().filter_map(|(name, value)| Some((name.as_bytes().to_vec(), value?)));
        // Elements of their own come first: where an archive has both, they are what casync restores.
        let mut all: Vec<_> = own.chain(self.xattrs.iter().cloned()).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all.dedup_by(|later, first| later.0 == first.0);
        all
    }

    /// The value of `system.posix_acl_access`. With an ACL, the mode's group bits are its mask.
    pub fn posix_acl_access(&self) -> Option<Vec<u8>> {
        let acl = &self.acl;
        if acl.group_obj.is_none() && acl.users.is_empty() && acl.groups.is_empty() {
            return None;
        }
        let mode = u64::from(self.entry.mode);
        let (owner, mask, other) = (mode >> 6 & 7, mode >> 3 & 7, mode & 7);
        Some(encode(owner, &acl.users, acl.group_obj.unwrap_or(mask), &acl.groups, Some(mask), other))
    }

    /// The value of `system.posix_acl_default`.
    pub fn posix_acl_default(&self) -> Option<Vec<u8>> {
        let base = self.acl.default?;
        let (users, groups) = (&self.acl.default_users, &self.acl.default_groups);
        Some(encode(base.user_obj, users, base.group_obj, groups, base.mask, base.other))
    }
}

fn encode(
    user_obj: u64,
    users: &[AclEntry],
    group_obj: u64,
    groups: &[AclEntry],
    mask: Option<u64>,
    other: u64,
) -> Vec<u8> {
    let mut value = ACL_VERSION.to_le_bytes().to_vec();
    let mut add = |tag: u16, permissions: u64, id: u32| {
        value.extend(tag.to_le_bytes());
        value.extend((permissions as u16).to_le_bytes());
        value.extend(id.to_le_bytes());
    };
    let named = |entries: &[AclEntry]| {
        let mut entries: Vec<(u32, u64)> =
            entries.iter().filter_map(|entry| Some((u32::try_from(entry.id).ok()?, entry.permissions))).collect();
        entries.sort_unstable();
        entries
    };
    add(tag::USER_OBJ, user_obj, ACL_NO_ID);
    named(users).into_iter().for_each(|(id, permissions)| add(tag::USER, permissions, id));
    add(tag::GROUP_OBJ, group_obj, ACL_NO_ID);
    named(groups).into_iter().for_each(|(id, permissions)| add(tag::GROUP, permissions, id));
    if let Some(mask) = mask {
        add(tag::MASK, mask, ACL_NO_ID);
    }
    add(tag::OTHER, other, ACL_NO_ID);
    value
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::flags::FeatureFlags;
    use super::super::node::{Acl, Content, Entry};
    use super::*;

    fn node(mode: u32, acl: Acl) -> Node {
        let entry =
            Entry { feature_flags: FeatureFlags::CASYNC_DEFAULT, mode, flags: 0, uid: 0, gid: 0, mtime_ns: 0 };
        Node {
            entry,
            user: None,
            group: None,
            xattrs: Vec::new(),
            acl,
            selinux: None,
            fcaps: None,
            quota_projid: None,
            content: Content::None,
        }
    }

    #[test]
    fn an_acl_as_setfacl_stores_it() {
        // setfacl -m u:1000:rw on a file of mode 0640, which then shows 0660 with the mask.
        let users = vec![AclEntry { id: 1000, name: None, permissions: 6 }];
        let shown = node(0o100660, Acl { users, group_obj: Some(4), ..Acl::default() }).posix_acl_access().unwrap();
        let expected: Vec<u8> = [
            &[2, 0, 0, 0][..],
            &[1, 0, 6, 0, 255, 255, 255, 255],
            &[2, 0, 6, 0, 0xe8, 3, 0, 0],
            &[4, 0, 4, 0, 255, 255, 255, 255],
            &[16, 0, 6, 0, 255, 255, 255, 255],
            &[32, 0, 0, 0, 255, 255, 255, 255],
        ]
        .concat();
        assert_eq!(shown, expected);
        assert_eq!(node(0o100660, Acl::default()).posix_acl_access(), None);
    }

    #[test]
    fn elements_of_their_own_win_over_stored_attributes() {
        let mut node = node(0o100644, Acl::default());
        node.fcaps = Some(b"caps".to_vec());
        node.xattrs = vec![(b"user.b".to_vec(), b"1".to_vec()), (b"security.capability".to_vec(), b"old".to_vec())];
        let shown = node.shown_xattrs();
        assert_eq!(shown, [
            (b"security.capability".to_vec(), b"caps".to_vec()),
            (b"user.b".to_vec(), b"1".to_vec())
        ]);
    }
}
