//! Options that are meant for the kernel and handed on to it as they are: labels of SELinux, and the size of its reads.
//!
//! Names and quoting: mount(8), section "Filesystem-independent mount options", and the kernel's selinux_sb_eat_lsm_opts(), which
//! takes a comma within double quotes for a part of the value.

use super::{OptionError, split};

/// The labels; several may be given.
const CONTEXTS: &[&str] = &["context", "fscontext", "defcontext", "rootcontext"];

const MAX_READ: &str = "max_read";

/// The longest label, in bytes: four of them fit into the one page that mount(2) takes.
const MAX_CONTEXT_BYTES: usize = 800;

/// The least that the kernel takes as `max_read`: less is as much as this (fuse_fill_super_common() of fs/fuse/inode.c).
const MIN_READ_BYTES: u32 = 4096;

/// What is handed on to the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelOptions {
    /// The most bytes that one read of the kernel asks for.
    max_read: Option<u32>,
    /// Labels by the name of their option; the last one of a name counts.
    contexts: Vec<(&'static str, String)>,
}

impl KernelOptions {
    /// Takes an option if it is one of these.
    pub(super) fn take(&mut self, name: &str, value: Option<&str>) -> Option<Result<(), OptionError>> {
        if name == MAX_READ {
            return Some(self.take_max_read(value));
        }
        let name = CONTEXTS.iter().find(|context| **context == name)?;
        Some(self.take_context(name, value))
    }

    fn take_max_read(&mut self, value: Option<&str>) -> Result<(), OptionError> {
        let expected = "a number of bytes";
        let value = value.ok_or(OptionError::NoValue { name: MAX_READ, expected })?;
        let is_number = value.bytes().all(|digit| digit.is_ascii_digit());
        let number = value.parse().ok().filter(|_| is_number);
        let bad = || OptionError::BadValue { name: MAX_READ, value: value.to_owned(), expected };
        self.max_read = Some(number.ok_or_else(bad)?);
        Ok(())
    }

    fn take_context(&mut self, name: &'static str, value: Option<&str>) -> Result<(), OptionError> {
        let expected = "a label such as system_u:object_r:usr_t:s0";
        let value = value.ok_or(OptionError::NoValue { name, expected })?;
        // A quote would end the quotes that keep a comma from beginning another option.
        let is_label = !value.is_empty() && !value.contains(|c: char| c == '"' || c.is_control());
        if !is_label || value.len() > MAX_CONTEXT_BYTES {
            return Err(OptionError::BadValue { name, value: value.to_owned(), expected });
        }
        self.contexts.retain(|(other, _)| *other != name);
        self.contexts.push((name, value.to_owned()));
        Ok(())
    }

    /// Names for the search of one that was meant.
    pub(super) fn names() -> impl Iterator<Item = &'static str> {
        CONTEXTS.iter().copied().chain([MAX_READ])
    }

    /// The first of the options that a mount does not have, as the mount table shows it: they hold until it ends. Labels are not looked at
    /// where the kernel knows none.
    pub(in crate::mount) fn lacking(&self, shown: &str, knows_labels: bool) -> Option<&'static str> {
        let mut there = Self::default();
        for item in split(shown).unwrap_or_default() {
            if let Some((name, value)) = item.split_once('=') {
                // What the kernel shows is of its making; what cannot be read of it is not there.
                let _ = there.take(name, Some(value));
            }
        }
        let other_read = self.max_read.is_some_and(|bytes| there.max_read != shown_read(bytes));
        let other_label = self.contexts.iter().filter(|_| knows_labels).find(|label| !there.contexts.contains(label));
        other_read.then_some(MAX_READ).or(other_label.map(|(name, _)| *name))
    }

    /// Whether there are labels, which only root may set.
    pub(in crate::mount) fn has_contexts(&self) -> bool {
        !self.contexts.is_empty()
    }

    /// For the data of mount(2), each with a comma before it. A kernel without SELinux refuses labels.
    pub(in crate::mount) fn data(&self, with_contexts: bool) -> String {
        let mut data = self.fusermount();
        for (name, label) in self.contexts.iter().filter(|_| with_contexts) {
            data.push_str(&format!(",{name}=\"{label}\""));
        }
        data
    }

    /// For the `-o` of fusermount3, which knows no labels; with a comma before it.
    pub(in crate::mount) fn fusermount(&self) -> String {
        self.max_read.map(|bytes| format!(",{MAX_READ}={bytes}")).unwrap_or_default()
    }
}

/// What the kernel shows of a `max_read` that it was given; the largest is its default, of which it shows nothing.
fn shown_read(bytes: u32) -> Option<u32> {
    (bytes != u32::MAX).then_some(bytes.max(MIN_READ_BYTES))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::{MountOptions, Unknown};
    use super::*;

    fn parsed(list: &str) -> Result<KernelOptions, OptionError> {
        let mut options = MountOptions::default();
        options.parse(list, Unknown::Refuse).map(|()| options.kernel)
    }

    #[test]
    fn labels_with_commas_reach_the_kernel_in_quotes() {
        let label = "system_u:object_r:usr_t:s0:c1,c2";
        for list in [
            format!(r#"ro,context="{label}",noexec"#),
            format!(r#"ro,"context={label}",noexec"#),
            format!(r"ro,context={},noexec", label.replace(',', r"\,")),
            format!(r#"context=first,context="{label}""#),
        ] {
            assert_eq!(parsed(&list).unwrap().data(true), format!(",context=\"{label}\""), "{list}");
        }
        let all = parsed("max_read=4096,rootcontext=a:b,fscontext=c,defcontext=d").unwrap();
        assert_eq!(all.data(true), r#",max_read=4096,rootcontext="a:b",fscontext="c",defcontext="d""#);
        assert_eq!((all.data(false).as_str(), all.fusermount().as_str()), (",max_read=4096", ",max_read=4096"));
        assert!(all.has_contexts());
        assert_eq!(parsed("ro").unwrap().data(true), "");
    }

    #[test]
    fn what_a_mount_lacks_is_named() {
        let shown = "ro,context=\"a:b:c1,c2\",user_id=0,group_id=0,max_read=4096";
        for (list, knows_labels, lacking) in [
            ("ro", true, None),
            ("max_read=4096,context=\"a:b:c1,c2\"", true, None),
            ("max_read=8192", true, Some("max_read")),
            ("max_read=1024", true, None),
            ("max_read=0", true, None),
            ("max_read=4294967295", true, Some("max_read")),
            ("context=a", true, Some("context")),
            ("context=a", false, None),
            ("rootcontext=\"a:b:c1,c2\"", true, Some("rootcontext")),
        ] {
            assert_eq!(parsed(list).unwrap().lacking(shown, knows_labels), lacking, "{list}");
        }
        assert_eq!(parsed("max_read=4096").unwrap().lacking("ro,user_id=0", true), Some("max_read"));
        assert_eq!(parsed("max_read=4294967295").unwrap().lacking("ro,user_id=0", true), None, "it is the default");
    }

    #[test]
    fn a_label_cannot_become_options() {
        for list in [r#"context=a\"\,suid"#, "context=", "context", "max_read=1k", "max_read=+1", "max_read"] {
            assert!(parsed(list).is_err(), "{list}");
        }
        assert!(parsed(&format!("context={}", "x".repeat(MAX_CONTEXT_BYTES + 1))).is_err());
        let message = parsed("contxt=a").unwrap_err().to_string();
        assert_eq!(message, r#"unknown mount option "contxt" (did you mean "context"?)"#);
    }
}
