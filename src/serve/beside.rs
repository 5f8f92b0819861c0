//! What lies beside an index or archive and is named as that with a suffix behind: its signature, its profile, its metadata table.
//!
//! It is sent as it is: its readers look at all of it themselves, and know what to say. What is uploaded must be of the form that its name
//! says; that it is the one of the index it lies beside nobody knows here, since that may come later.

use std::io;

use bytes::Bytes;

use crate::format::minisign::{MAX_SIGNATURE_BYTES, Signature};
use crate::format::profile::{self, MAX_PROFILE_BYTES, Profile};
use crate::volume::table::{self, TABLE_SUFFIX};
use crate::volume::trust::SIGNATURE_SUFFIX;

/// The longest table that is taken, in bytes: that of some thirty million files. It is held in memory meanwhile.
const MAX_TABLE_BYTES: u64 = 1 << 30;

/// What a file beside an index is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Beside {
    Signature,
    Profile,
    Table,
}

impl Beside {
    /// What a file of this name is; `None` for an index or archive. A suffix alone lies beside nothing.
    pub(super) fn of(name: &str) -> Option<Self> {
        let all = [Self::Signature, Self::Profile, Self::Table];
        all.into_iter().find(|beside| name.strip_suffix(beside.suffix()).is_some_and(|index| !index.is_empty()))
    }

    fn suffix(self) -> &'static str {
        match self {
            Self::Signature => SIGNATURE_SUFFIX,
            Self::Profile => profile::SUFFIX,
            Self::Table => TABLE_SUFFIX,
        }
    }

    /// What to call it.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Signature => "signature",
            Self::Profile => "profile",
            Self::Table => "metadata table",
        }
    }

    /// The longest that is taken, in bytes. Readers take no longer signature or profile, either.
    pub(super) fn max_bytes(self) -> u64 {
        match self {
            Self::Signature => MAX_SIGNATURE_BYTES,
            Self::Profile => MAX_PROFILE_BYTES,
            Self::Table => MAX_TABLE_BYTES,
        }
    }

    /// Whether bytes are of this form, all of them, and what is wrong otherwise. Not on a thread that others wait for.
    ///
    /// # Errors
    /// They cannot be looked at.
    pub(super) async fn check(self, bytes: Bytes) -> io::Result<Result<(), String>> {
        let checking = tokio::task::spawn_blocking(move || match self {
            Self::Signature => Ok(Signature::parse(&bytes).map(drop).map_err(|error| error.to_string())),
            Self::Profile => Ok(Profile::parse(&bytes).map(drop).map_err(|error| error.to_string())),
            Self::Table => Ok(table::check_bytes(&bytes)?.map_err(|fault| fault.to_string())),
        });
        checking.await.map_err(io::Error::other)?
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_beside_is_known_by_its_name() {
        for (name, wanted) in [
            ("x.caibx.minisig", Some(Beside::Signature)),
            ("x.caibx.profile", Some(Beside::Profile)),
            ("x.caidx.table", Some(Beside::Table)),
            ("x.catar.table", Some(Beside::Table)),
            ("x.caidx.table.minisig", Some(Beside::Signature)),
            ("metrics.profile", Some(Beside::Profile)),
            (".minisig", None),
            (".profile", None),
            ("table", None),
            ("x.table.caidx", None),
            ("x.minisig.bak", None),
            ("x.caibx", None),
        ] {
            assert_eq!(Beside::of(name), wanted, "{name}");
        }
    }

    #[tokio::test]
    async fn each_must_be_of_its_form() {
        let signature = include_bytes!("../../tests/minisign/hi.minisig").as_slice();
        let profile = profile::HEADER.to_owned() + "\n";
        for (bytes, right) in [
            (signature, Some(Beside::Signature)),
            (profile.as_bytes(), Some(Beside::Profile)),
            (b"", None),
            (&[0; 1000], None),
        ] {
            for beside in [Beside::Signature, Beside::Profile, Beside::Table] {
                let checked = beside.check(Bytes::copy_from_slice(bytes)).await.unwrap();
                assert_eq!(checked.is_ok(), right == Some(beside), "{beside:?}: {checked:?}");
            }
        }
    }
}
