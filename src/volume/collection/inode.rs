//! Inode numbers of a directory of indexes: the same on every mount of the same files.
//!
//! | bits 62 and 61 | what | the lower 61 bits |
//! |---|---|---|
//! | 0 | the root, number 1 | 1 |
//! | 1 | a directory | hash of its path |
//! | 2 | an image | hash of its index's path and version, and 1 |
//! | 3 | a file of a tree | hash of the path and version of its index or archive, and the file's number in the tree |
//!
//! A file's number in its tree is where it lies in the archive, so a tree has as many numbers as its archive has bytes: a span of them,
//! that begins at a hash. That spans of two trees meet has the chance of their bytes in 2^61 (1,000 trees of 1 TiB: one in 2,000); the
//! one that is looked at second then gets another hash, and its numbers depend on the order. An archive of [`MAX_SPAN`] bytes or
//! more is not taken, and one for which none of [`MAX_SALTS`] hashes has room neither: archives that only claim to be so large leave room
//! for others. Bit 63 is never set, as some programs print these numbers with a sign.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::ledger::Given;
use crate::digest::Digest;
use crate::tree::ROOT_INO;

const KIND_SHIFT: u32 = 61;
const HASH_MASK: u64 = (1 << KIND_SHIFT) - 1;

/// The most numbers that one part may have: those of a pebibyte. There are 2,048 times as many.
pub(super) const MAX_SPAN: u64 = 1 << 50;

/// How many hashes are tried. With half of all numbers taken by spans as large as the one that is sought, a hash has room with a chance of
/// one in six, and none of them has for one part in 100,000; with a quarter taken, for none in 10^21.
const MAX_SALTS: u32 = 64;

/// What a number is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u64)]
pub(super) enum NumberKind {
    Directory = 1,
    Image = 2,
    Tree = 3,
}

/// Whether a number is a directory's of the collection itself.
pub(super) fn is_directory(ino: u64) -> bool {
    ino == ROOT_INO || ino >> KIND_SHIFT == NumberKind::Directory as u64
}

/// The number of a directory by its path, empty for the root.
pub(super) fn directory_ino(path: &[u8]) -> u64 {
    match path {
        b"" => ROOT_INO,
        _ => number(NumberKind::Directory, path, "", 0),
    }
}

/// The number before the first of a part, if no other part is in its way.
pub(super) fn first_base(kind: NumberKind, path: &[u8], version: &str) -> u64 {
    number(kind, path, version, 0)
}

fn number(kind: NumberKind, path: &[u8], version: &str, salt: u32) -> u64 {
    // Neither paths nor versions have a NUL in them.
    let text = [path, b"\0", version.as_bytes(), b"\0", &salt.to_le_bytes()].concat();
    let id = Digest::Sha256.id(&text);
    let hash = id.0.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    (kind as u64) << KIND_SHIFT | hash & HASH_MASK
}

/// Something that has a span of numbers.
pub(super) trait Numbered {
    /// The number before the first.
    fn base(&self) -> u64;
    /// How many there are, one at the least: `base + 1` to `base + span`.
    fn span(&self) -> u64;
}

/// Which part has which numbers.
#[derive(Debug)]
pub(super) struct Numbers<P> {
    by_base: BTreeMap<u64, Arc<P>>,
    /// What is written down as given, by a process before or this one: nobody else's, also while nobody has asked for it here.
    given: BTreeMap<u64, Given>,
}

impl<P> Default for Numbers<P> {
    fn default() -> Self {
        Self { by_base: BTreeMap::new(), given: BTreeMap::new() }
    }
}

impl<P: Numbered> Numbers<P> {
    /// The part that has a number.
    pub(super) fn find(&self, ino: u64) -> Option<&Arc<P>> {
        let (base, part) = self.by_base.range(..ino).next_back()?;
        (ino - base <= part.span()).then_some(part)
    }

    /// The part with this base.
    pub(super) fn at(&self, base: u64) -> Option<&Arc<P>> {
        self.by_base.get(&base)
    }

    /// The part of a path and version, by whichever hash it found room.
    pub(super) fn known(
        &self,
        kind: NumberKind,
        path: &[u8],
        version: &str,
        is_it: impl Fn(&P) -> bool,
    ) -> Option<&Arc<P>> {
        (0..MAX_SALTS).filter_map(|salt| self.at(number(kind, path, version, salt))).find(|part| is_it(part))
    }

    /// Leaves what was given to those who had it.
    pub(super) fn reserve(&mut self, given: Vec<Given>) {
        self.given.extend(given.into_iter().map(|given| (given.base, given)));
    }

    /// Whether just this is reserved.
    pub(super) fn is_reserved(&self, given: &Given) -> bool {
        self.given.get(&given.base) == Some(given)
    }

    /// Whom a process before has given a number.
    pub(super) fn was_given(&self, ino: u64) -> Option<&Given> {
        let (base, given) = self.given.range(..ino).next_back()?;
        (ino - base <= given.span).then_some(given)
    }

    /// All that have numbers.
    pub(super) fn parts(&self) -> impl Iterator<Item = &Arc<P>> {
        self.by_base.values()
    }

    /// A base from which on `span` numbers are free, if one is found: the one that a process before has given, if there is one.
    pub(super) fn free_base(&self, kind: NumberKind, path: &[u8], version: &str, span: u64) -> Option<u64> {
        let is_own = |given: &Given| given.path == path && given.version == version && given.span == span;
        let bases = || (0..MAX_SALTS).map(|salt| number(kind, path, version, salt));
        if !self.given.is_empty()
            && let Some(base) = bases().find(|base| self.given.get(base).is_some_and(is_own))
            && !self.by_base.contains_key(&base)
        {
            return Some(base);
        }
        bases().find(|base| {
            let fits = (base & HASH_MASK).checked_add(span).is_some_and(|end| end <= HASH_MASK);
            // The last one that begins before the end of the span must end before its beginning.
            fits && {
                let part = self.by_base.range(..=base + span).next_back();
                let given = self.given.range(..=base + span).next_back();
                part.is_none_or(|(other, part)| other + part.span() < *base)
                    && given.is_none_or(|(other, given)| other + given.span < *base)
            }
        })
    }

    pub(super) fn insert(&mut self, part: Arc<P>) {
        self.by_base.insert(part.base(), part);
    }

    pub(super) fn remove(&mut self, base: u64) {
        self.by_base.remove(&base);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug)]
    struct Span(u64, u64);

    impl Numbered for Span {
        fn base(&self) -> u64 {
            self.0
        }

        fn span(&self) -> u64 {
            self.1
        }
    }

    #[test]
    fn numbers_are_the_same_everywhere_and_tell_their_kind() {
        // Fixed for ever: a mount that is taken over by another version of the program keeps its numbers.
        assert_eq!(directory_ino(b""), 1);
        let wanted = Digest::Sha256.id(b"a/b\0\0\0\0\0\0").0;
        let hash = u64::from_le_bytes([
            wanted[0], wanted[1], wanted[2], wanted[3], wanted[4], wanted[5], wanted[6], wanted[7],
        ]);
        assert_eq!(directory_ino(b"a/b"), 1 << 61 | hash & ((1 << 61) - 1));
        assert!(is_directory(1) && is_directory(directory_ino(b"x")) && !is_directory(2));
        for kind in [NumberKind::Image, NumberKind::Tree] {
            let base = first_base(kind, b"x.caibx", "1");
            assert!(!is_directory(base) && base >> 61 == kind as u64);
            assert_ne!(base, first_base(kind, b"x.caibx", "2"), "another version is another file");
            assert_ne!(base, first_base(kind, b"y.caibx", "1"));
        }
    }

    #[test]
    fn what_a_process_before_has_given_is_given_to_the_same_whoever_asks_first() {
        let span = HASH_MASK >> 1;
        let base = |numbers: &Numbers<Span>, path: &[u8], version: &str| {
            numbers.free_base(NumberKind::Tree, path, version, span)
        };
        // Two that cannot both have room: who is asked for first would have it.
        let has_room = |path: &String| base(&Numbers::default(), path.as_bytes(), "1").is_some();
        let mut paths = (0..1000).map(|i| format!("{i}.caidx")).filter(has_room);
        let (a, b) = (paths.next().unwrap(), paths.next().unwrap());
        let base_a = base(&Numbers::default(), a.as_bytes(), "1").unwrap();
        let mut second = Numbers::<Span>::default();
        let given = |version: &str| Given { base: base_a, span, path: a.clone().into_bytes(), version: version.into() };
        second.reserve(vec![given("1")]);
        assert!(second.is_reserved(&given("1")) && !second.is_reserved(&given("2")), "it is written down once");
        assert_eq!(base(&second, b.as_bytes(), "1"), None);
        assert_eq!(base(&second, a.as_bytes(), "1"), Some(base_a));
        assert_eq!(base(&second, a.as_bytes(), "2"), None, "another version is another file");
        assert_eq!(second.was_given(base_a + span).map(|given| given.path.clone()), Some(a.into_bytes()));
        assert!(second.was_given(base_a).is_none() && second.was_given(base_a + span + 1).is_none());
    }

    #[test]
    fn where_there_is_no_room_the_search_ends() {
        let mut numbers = Numbers::default();
        let all = HASH_MASK >> 1;
        let first = (0..100).find_map(|i| numbers.free_base(NumberKind::Tree, b"x", &i.to_string(), all)).unwrap();
        numbers.insert(Arc::new(Span(first, all)));
        assert_eq!(numbers.free_base(NumberKind::Tree, b"y", "", all), None);
        assert_eq!(numbers.free_base(NumberKind::Tree, b"y", "", HASH_MASK), None);
        assert_eq!(numbers.free_base(NumberKind::Tree, b"y", "", u64::MAX), None);
        assert!(numbers.free_base(NumberKind::Tree, b"y", "", 1 << 40).is_some(), "others have room");
        // As many of the largest as anybody could have, and a quarter of all numbers with them.
        let mut numbers = Numbers::default();
        for i in 0..512 {
            let base = numbers.free_base(NumberKind::Tree, b"x", &i.to_string(), MAX_SPAN - 1).unwrap();
            numbers.insert(Arc::new(Span(base, MAX_SPAN - 1)));
        }
    }

    proptest! {
        #[test]
        fn no_number_belongs_to_two_parts(spans in proptest::collection::vec(1u64..1 << 57, 1..7), probe in any::<u64>()) {
            let mut numbers = Numbers::default();
            let mut all = Vec::new();
            for (i, span) in spans.into_iter().enumerate() {
                // Spans so large that they often meet.
                let base = numbers.free_base(NumberKind::Tree, b"x", &i.to_string(), span).unwrap();
                prop_assert_eq!(base >> 61, 3);
                prop_assert_eq!((base + span) >> 61, 3);
                numbers.insert(Arc::new(Span(base, span)));
                all.push((base, span));
            }
            for (base, span) in &all {
                for ino in [base + 1, base + span, base + 1 + probe % span] {
                    let found = numbers.find(ino).map(|part| part.0);
                    prop_assert_eq!(found, Some(*base));
                    let owners = all.iter().filter(|(base, span)| ino > *base && ino - base <= *span).count();
                    prop_assert_eq!(owners, 1);
                }
                let outside = base + span + 1;
                let owner = all.iter().find(|(base, span)| outside > *base && outside - base <= *span);
                prop_assert_eq!(numbers.find(outside).map(|part| part.0), owner.map(|(base, _)| *base));
            }
        }
    }
}
