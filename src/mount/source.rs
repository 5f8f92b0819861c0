//! The source of a mount as everybody may see it in the mount table.

use std::ffi::{OsStr, OsString};

use crate::store::location::without_secrets;

/// The source to show for a given one: the same, so that `mount -a` finds its fstab line mounted, but for the secrets of a URL, which
/// the mount table would show to everybody.
pub fn shown_source(source: &OsStr) -> OsString {
    match source.to_str() {
        Some(text) => without_secrets(text).into(),
        None => source.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_go_and_everything_else_stays() {
        for (given, shown) in [
            ("/srv/a.caibx", "/srv/a.caibx"),
            ("https://u:secret@h/x.caibx", "https://u@h/x.caibx"),
            ("https://u:se:c@ret@h:8080/x", "https://u@h:8080/x"),
            ("s3+https://:secret@h/x?lookup=dns", "s3+https://h/x?lookup=dns"),
            ("https://token@h/x", "https://h/x"),
            ("https://h:80/a:b@c", "https://h:80/a:b@c"),
            ("https://h/x?a=1&sig=secret", "https://h/x?a=1&sig=…"),
            ("ssh://bk:pw@host", "ssh://bk@host"),
            ("a b://u:p@h", "a b://u:p@h"),
            ("://u:p@h", "://u:p@h"),
            ("", ""),
        ] {
            assert_eq!(shown_source(OsStr::new(given)), OsStr::new(shown), "{given}");
        }
    }
}
