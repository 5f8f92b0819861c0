//! The source of a mount as everybody may see it in the mount table.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// The source to show for a given one: the same, so that `mount -a` finds its fstab line mounted, but for the password of a URL
/// (`scheme://user:password@host`), which the mount table would show to everybody.
pub fn shown_source(source: &OsStr) -> OsString {
    let bytes = source.as_bytes();
    let Some(scheme_len) = scheme_len(bytes) else { return source.to_owned() };
    let rest = &bytes[scheme_len..];
    let authority_len = rest.iter().position(|byte| matches!(byte, b'/' | b'?' | b'#')).unwrap_or(rest.len());
    let authority = &rest[..authority_len];
    let Some(at) = authority.iter().rposition(|&byte| byte == b'@') else { return source.to_owned() };
    let Some(colon) = authority[..at].iter().position(|&byte| byte == b':') else { return source.to_owned() };
    // "user@" stays, and of ":password@" nothing.
    let host = if colon == 0 { at + 1 } else { at };
    OsString::from_vec([&bytes[..scheme_len + colon], &rest[host..]].concat())
}

/// Length of `scheme://` at the start; schemes as RFC 3986, section 3.1.
fn scheme_len(bytes: &[u8]) -> Option<usize> {
    let len = bytes.windows(3).position(|window| window == b"://")?;
    let is_scheme = bytes.first().is_some_and(u8::is_ascii_alphabetic)
        && bytes[..len].iter().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(byte));
    is_scheme.then_some(len + 3)
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
            ("s3+https://:secret@h/x?y=a:b@c", "s3+https://h/x?y=a:b@c"),
            ("https://u@h/x", "https://u@h/x"),
            ("https://h:80/a:b@c", "https://h:80/a:b@c"),
            ("https://h?a:b@c", "https://h?a:b@c"),
            ("ssh://bk:pw@host", "ssh://bk@host"),
            ("a b://u:p@h", "a b://u:p@h"),
            ("://u:p@h", "://u:p@h"),
            ("", ""),
        ] {
            assert_eq!(shown_source(OsStr::new(given)), OsStr::new(shown), "{given}");
        }
    }
}
