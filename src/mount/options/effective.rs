//! What a mount is made with after all layers, as an option list for people (`mount -v`), without secrets.

use super::{MOUNT_OPTIONS, MountOptions};
use crate::store::location::without_secrets;
use nix::unistd::geteuid;

/// Options that are shown as what has become of them.
const RESOLVED: &[&str] = &["store", "cache", "store-file", "allow-other"];

impl MountOptions {
    /// The options that hold: those of the kernel, the stores and the cache there are, and whatever else was given here or in a
    /// file. What nobody gave has its default and is not listed.
    pub fn effective(&self) -> String {
        let mut list = vec![self.flags.names(), "default_permissions".to_owned()];
        if self.config.allow_other.unwrap_or_else(|| geteuid().is_root()) {
            list.push("allow_other".to_owned());
        }
        let kernel = self.kernel.data(true);
        list.extend(kernel.strip_prefix(',').map(str::to_owned));
        list.extend(self.config.sources.stores.iter().map(|store| shown("store", store)));
        list.extend(self.config.sources.cache.iter().map(|cache| shown("cache", cache)));
        for option in MOUNT_OPTIONS.iter().filter(|option| !RESOLVED.contains(&option.name)) {
            let given: Vec<&String> =
                self.given.iter().filter(|(name, _)| *name == option.name).map(|(_, value)| value).collect();
            let counting = if option.repeatable { 0 } else { given.len().saturating_sub(1) };
            list.extend(given[counting..].iter().map(|value| shown(option.name, value)));
        }
        list.join(",")
    }
}

/// An option as it could be given.
fn shown(name: &str, value: &str) -> String {
    let value = without_secrets(value);
    match value.contains([',', '"']) {
        true => format!("\"{name}={}\"", value.replace('"', "\"\"")),
        false => format!("{name}={value}"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::Unknown;
    use super::*;

    #[test]
    fn what_holds_is_listed_once_without_secrets() {
        let mut options = MountOptions { given: vec![("memory", "1G".into())], ..MountOptions::default() };
        let list = r#"rw,noexec,memory=2G,store=https://u:secret@h/s,"store=https://h/x?a=1,2&sig=secret",allow_other=no,warm=/a,warm=/b,max_read=4096"#;
        options.parse(list, Unknown::Refuse).unwrap();
        assert_eq!(
            options.effective(),
            "ro,nosuid,nodev,noexec,default_permissions,max_read=4096,store=https://u@h/s,\
             \"store=https://h/x?a=1,2&sig=…\",memory=2G,warm=/a,warm=/b"
        );
    }

    #[test]
    fn what_is_listed_can_be_given_again() {
        let mut options = MountOptions::default();
        options.parse(r#"suid,"store=/a,b""c",cache=/d,allow-other,umask=022"#, Unknown::Refuse).unwrap();
        let mut again = MountOptions::default();
        again.parse(&options.effective(), Unknown::Refuse).unwrap();
        assert_eq!((again.effective(), again.config), (options.effective(), options.config));
    }
}
