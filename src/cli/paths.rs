//! Mount options whose values are paths, or can be: where these begin. The one list of them, for whoever reads options elsewhere than they
//! were given: files, a service that left its directory, a remount.

use std::ffi::OsStr;
use std::path::Path;

use anyhow::{Result, anyhow};

use crate::format::minisign::PublicKey;
use crate::store::location::{FileLocation, Location, split_group};
use crate::volume::backing::AUTO;

/// The value of a mount option with its paths as they are from everywhere: they begin at `dir`, and `~/` is `home`, if there is one. What is
/// no path stays as it is, as does what makes no sense, which is refused by whoever sets the option.
///
/// # Errors
/// A path is not UTF-8.
pub fn placed(name: &str, value: &str, dir: &Path, home: Option<&Path>) -> Result<String> {
    let full = |path: &Path| {
        let path = match (path.strip_prefix("~"), home) {
            (Ok(rest), Some(home)) if path != Path::new("~") => home.join(rest),
            _ => dir.join(path),
        };
        let path = std::path::absolute(path)?;
        path.into_os_string().into_string().map_err(|_| anyhow!("{name}: its path is not UTF-8"))
    };
    // Nothing stays nothing, which is refused later.
    if value.is_empty() {
        return Ok(String::new());
    }
    match name {
        "store" | "cache" => {
            let members = split_group(value).map(|member| match Location::parse(member) {
                Ok(Location::Local(path)) => full(&path),
                _ => Ok(member.to_owned()),
            });
            Ok(members.collect::<Result<Vec<_>>>()?.join("|"))
        }
        "profile" if value != "no" => match FileLocation::parse(OsStr::new(value)) {
            Ok(FileLocation::Local(path)) => full(&path),
            _ => Ok(value.to_owned()),
        },
        "backing" if value != AUTO => full(Path::new(value)),
        "log" if value != "journald" => full(Path::new(value)),
        // A key itself, or the file it stands in.
        "verify-key" if value != "no" && PublicKey::parse(value).is_err() => full(Path::new(value)),
        "store-file" | "config" | "client-cert" | "client-key" | "ca-cert" | "record" | "access-trace" => {
            full(Path::new(value))
        }
        _ => Ok(value.to_owned()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::mount::options::MOUNT_OPTIONS;

    #[test]
    fn paths_of_every_option_begin_where_they_were_said() {
        let of_paths = [
            "store",
            "cache",
            "store-file",
            "config",
            "client-cert",
            "client-key",
            "ca-cert",
            "profile",
            "record",
            "backing",
            "verify-key",
            "log",
            "access-trace",
        ];
        for option in MOUNT_OPTIONS {
            let placed = |value: &str| placed(option.name, value, Path::new("/etc/caifs"), Some(Path::new("/root")));
            let said = ["a/./b", "~/a", "/a", ""].map(|value| placed(value).unwrap());
            match of_paths.contains(&option.name) {
                true => assert_eq!(said, ["/etc/caifs/a/b", "/root/a", "/a", ""], "{}", option.name),
                false => assert_eq!(said, ["a/./b", "~/a", "/a", ""], "{}", option.name),
            }
        }
        for (name, value, wanted) in [
            ("store", "a|https://h/s|~/b", "/etc/caifs/a|https://h/s|/root/b"),
            ("store", "file:///a/b", "/a/b"),
            ("profile", "no", "no"),
            ("profile", "https://h/p", "https://h/p"),
            ("profile", "host:/p", "host:/p"),
            ("backing", "auto", "auto"),
            ("log", "journald", "journald"),
            ("verify-key", "no", "no"),
        ] {
            assert_eq!(placed(name, value, Path::new("/etc/caifs"), Some(Path::new("/root"))).unwrap(), wanted);
        }
        assert_eq!(placed("cache", "~/a", Path::new("/x"), None).unwrap(), "/x/~/a", "nobody's home");
    }
}
