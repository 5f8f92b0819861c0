//! Which files of a directory are shown, and under which names.
//!
//! An index or archive is shown without its suffix, unless `keep-suffix` is set or another name of the directory would be the same: then
//! all that would share the name keep their suffixes. Directories are shown as they are called. Hidden files (temporary ones
//! are) and chunk stores (`*.castr`) are not shown, nor is anything else.

use std::collections::HashMap;

/// What chunk stores are called.
const STORE_SUFFIX: &[u8] = b".castr";

/// What a file of a directory of indexes is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum EntryKind {
    /// A directory of more of them.
    Directory,
    /// The index of a blob.
    Image,
    /// The index of an archive.
    TreeIndex,
    /// A plain archive.
    Archive,
}

impl EntryKind {
    /// What a name stands for, if it is shown at all.
    pub(super) fn of(name: &[u8], is_directory: bool) -> Option<Self> {
        if name.starts_with(b".") || name.is_empty() || name.contains(&0) {
            return None;
        }
        match (is_directory, suffix(name)) {
            (true, _) if name.ends_with(STORE_SUFFIX) => None,
            (true, _) => Some(Self::Directory),
            (false, b".caibx") => Some(Self::Image),
            (false, b".caidx") => Some(Self::TreeIndex),
            (false, b".catar") => Some(Self::Archive),
            (false, _) => None,
        }
    }
}

/// The names to show for names of one directory, which are all different, in their order.
pub(super) fn shown_names(names: &[(&[u8], EntryKind)], keep_suffix: bool) -> Vec<Vec<u8>> {
    let mut keeps: Vec<bool> = names.iter().map(|(_, kind)| keep_suffix || *kind == EntryKind::Directory).collect();
    loop {
        let shown: Vec<&[u8]> =
            names.iter().zip(&keeps).map(|((name, _), keeps)| if *keeps { name } else { stem(name) }).collect();
        let mut n_of: HashMap<&[u8], u32> = HashMap::with_capacity(shown.len());
        for name in &shown {
            *n_of.entry(name).or_default() += 1;
        }
        let mut is_done = true;
        for (name, keeps) in shown.iter().zip(&mut keeps) {
            if !*keeps && n_of.get(name).is_some_and(|n| *n > 1) {
                // A name with its suffix can be what another is without, so this is looked at again.
                *keeps = true;
                is_done = false;
            }
        }
        if is_done {
            return shown.into_iter().map(<[u8]>::to_vec).collect();
        }
    }
}

fn suffix(name: &[u8]) -> &[u8] {
    name.iter().rposition(|byte| *byte == b'.').map_or(&[], |at| &name[at..])
}

fn stem(name: &[u8]) -> &[u8] {
    &name[..name.len() - suffix(name).len()]
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn shown(names: &[&str], keep_suffix: bool) -> Vec<String> {
        let kinds: Vec<(&[u8], EntryKind)> = names
            .iter()
            .filter_map(|name| {
                let (name, is_directory) = name.strip_suffix('/').map_or((*name, false), |name| (name, true));
                Some((name.as_bytes(), EntryKind::of(name.as_bytes(), is_directory)?))
            })
            .collect();
        let shown = shown_names(&kinds, keep_suffix);
        shown.into_iter().map(|name| String::from_utf8_lossy(&name).into_owned()).collect()
    }

    #[test]
    fn only_indexes_archives_and_directories_are_shown() {
        let names = [
            "a.caibx",
            "b.caidx",
            "c.catar",
            "dir/",
            "d.x.caibx",
            "2024/",
            "e.txt",
            "caibx",
            "x.castr/",
            ".h.caibx",
            ".#a.caibx0123",
            ".hidden/",
            "f.caibx.tmp",
            "g.CAIBX",
            "h.caibx/",
        ];
        assert_eq!(shown(&names, false), ["a", "b", "c", "dir", "d.x", "2024", "h.caibx"]);
        assert_eq!(shown(&names, true), ["a.caibx", "b.caidx", "c.catar", "dir", "d.x.caibx", "2024", "h.caibx"]);
    }

    #[test]
    fn names_that_would_be_the_same_keep_their_suffixes() {
        assert_eq!(shown(&["a.caibx", "a.caidx", "b.catar"], false), ["a.caibx", "a.caidx", "b"]);
        assert_eq!(shown(&["a.caibx", "a/"], false), ["a.caibx", "a"]);
        assert_eq!(shown(&["a.caibx", "a.caidx", "a.caibx.catar"], false), ["a.caibx", "a.caidx", "a.caibx.catar"]);
        assert_eq!(shown(&["a.caibx.caidx", "a.caibx"], false), ["a.caibx", "a"]);
    }

    proptest! {
        #[test]
        fn no_two_are_shown_by_one_name(names in proptest::collection::btree_set("a{0,2}(b|\\.caibx|\\.caidx|\\.catar){1,3}/?", 0..12)) {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            // A file and a directory cannot have one name.
            let bare: HashSet<&str> = names.iter().map(|name| name.trim_end_matches('/')).collect();
            prop_assume!(bare.len() == names.len());
            for keep_suffix in [false, true] {
                let shown = shown(&names, keep_suffix);
                prop_assert_eq!(shown.iter().collect::<HashSet<_>>().len(), shown.len());
            }
        }
    }
}
