//! How files are shown, whatever is stored of them: owners, shifted ids, permission bits that nothing has.
//!
//! `uid` and `gid` stand in place of every stored owner. `uid-shift` is added to every stored id, as container tools do when they give a
//! tree to a user namespace, also to the ids in POSIX ACLs; an id that does not fit is shown as the kernel's overflow id, 65534.
//! `umask` takes permission bits from every file, and from every entry of an ACL, since an ACL would give them back. File capabilities
//! are shown as they are stored.

use bytes::Bytes;

use crate::config::ShowConfig;
use crate::format::catar::PosixAcl;

/// What the kernel shows for an id that it has none for (`/proc/sys/kernel/overflowuid`).
pub const OVERFLOW_ID: u32 = 65534;

/// The id that means "no id" to every system call (`(uid_t) -1`).
const NO_ID: u32 = u32::MAX;

/// The attributes that hold ACLs.
const ACL_NAMES: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];

/// How files are shown. The default is: as they are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Show {
    /// Owner of everything.
    pub uid: Option<u32>,
    /// Group of everything.
    pub gid: Option<u32>,
    /// Permission bits that nothing has.
    pub umask: u16,
    /// Added to every stored id.
    pub id_shift: u32,
}

impl Show {
    /// As the options say.
    pub fn new(config: &ShowConfig) -> Self {
        Self {
            uid: config.uid,
            gid: config.gid,
            umask: config.umask.unwrap_or(0),
            id_shift: config.uid_shift.unwrap_or(0),
        }
    }

    /// The owner to show for a stored one.
    pub fn uid(&self, stored: u32) -> u32 {
        self.uid.unwrap_or_else(|| self.shifted(stored))
    }

    /// The group to show for a stored one.
    pub fn gid(&self, stored: u32) -> u32 {
        self.gid.unwrap_or_else(|| self.shifted(stored))
    }

    /// The permission bits to show for stored ones (07777).
    pub fn permissions(&self, stored: u16) -> u16 {
        stored & !self.umask
    }

    /// The value to show for a stored extended attribute: another one only for an ACL whose ids or permissions are shown otherwise. What
    /// cannot be read as an ACL is shown as it is; the kernel refuses it.
    pub fn xattr(&self, name: &[u8], stored: &Bytes) -> Bytes {
        if (self.umask == 0 && self.id_shift == 0) || !ACL_NAMES.contains(&name) {
            return stored.clone();
        }
        let Ok(mut acl) = PosixAcl::parse(stored) else { return stored.clone() };
        let hide = |permissions: &mut u64, class: u16| *permissions &= !u64::from(self.umask >> class & 0o7);
        hide(&mut acl.user_obj, 6);
        hide(&mut acl.other, 0);
        // All that is neither owner nor other is of the group's class, the mask too.
        hide(&mut acl.group_obj, 3);
        acl.mask.iter_mut().for_each(|mask| hide(mask, 3));
        for entry in acl.users.iter_mut().chain(&mut acl.groups) {
            hide(&mut entry.permissions, 3);
            entry.id = self.shifted(entry.id as u32).into();
        }
        acl.to_bytes().into()
    }

    fn shifted(&self, stored: u32) -> u32 {
        match stored.checked_add(self.id_shift) {
            Some(id) if id != NO_ID => id,
            _ => OVERFLOW_ID,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_win_over_the_shift_and_what_does_not_fit_is_nobody() {
        let plain = Show::default();
        assert_eq!((plain.uid(0), plain.gid(7), plain.uid(u32::MAX)), (0, 7, OVERFLOW_ID));
        let shifted = Show { id_shift: 100_000, ..plain };
        assert_eq!((shifted.uid(0), shifted.gid(1000)), (100_000, 101_000));
        assert_eq!(shifted.uid(u32::MAX - 100_000), OVERFLOW_ID, "it would be -1");
        assert_eq!(shifted.uid(u32::MAX - 100_001), u32::MAX - 1);
        assert_eq!(shifted.uid(u32::MAX - 5), OVERFLOW_ID);
        let owned = Show { uid: Some(5), ..shifted };
        assert_eq!((owned.uid(0), owned.gid(0)), (5, 100_000));
        assert_eq!(Show { umask: 0o027, ..plain }.permissions(0o6777), 0o6750);
    }

    #[test]
    fn acls_are_shifted_and_masked_and_nothing_else_is() {
        let entry = |tag: u16, permissions: u16, id: u32| {
            [&tag.to_le_bytes()[..], &permissions.to_le_bytes(), &id.to_le_bytes()].concat()
        };
        let acl = |entries: &[Vec<u8>]| Bytes::from([&2u32.to_le_bytes()[..], &entries.concat()].concat());
        let stored = acl(&[
            entry(0x01, 7, NO_ID),
            entry(0x02, 7, 1000),
            entry(0x04, 7, NO_ID),
            entry(0x08, 5, 50),
            entry(0x10, 7, NO_ID),
            entry(0x20, 5, NO_ID),
        ]);
        let show = Show { umask: 0o127, id_shift: 10, ..Show::default() };
        let shown = acl(&[
            entry(0x01, 6, NO_ID),
            entry(0x02, 5, 1010),
            entry(0x04, 5, NO_ID),
            entry(0x08, 5, 60),
            entry(0x10, 5, NO_ID),
            entry(0x20, 0, NO_ID),
        ]);
        for name in ACL_NAMES {
            assert_eq!(show.xattr(name, &stored), shown);
            assert_eq!(Show::default().xattr(name, &stored), stored);
            let damaged = stored.slice(..stored.len() - 1);
            assert_eq!(show.xattr(name, &damaged), damaged);
        }
        assert_eq!(show.xattr(b"user.x", &stored), stored);
    }
}
