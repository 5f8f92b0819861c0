//! How much a listing tells of each name.
//!
//! A name that comes with its attributes (READDIRPLUS) saves a request of whoever wants them, and costs the kernel an inode, which is most of
//! what going through a large tree takes; find(1) wants no attributes of files. Where the kernel agrees (`FUSE_READDIRPLUS_AUTO`) it asks
//! for them at the start of a directory, and goes on asking as long as one that came is used (fs/fuse/readdir.c). So a listing that begins
//! gives attributes of a few names only, as a sample: ls(1) uses them at once and gets all.
//!
//! A program that reads all names before it wants attributes (du(1), rsync(1), tar(1)) has to look up each. That is seen by counting, and
//! from then on listings begin with attributes of all that the first answer has room for. (The kernel asks for names only from then on,
//! since none was used in between.) Names that the kernel kept without attributes are then listed anew.
//!
//! So samples are for trees of which most directories are not small, where attributes of all cost as little, and of which few names lie
//! behind what an answer has room for: those such programs look up one by one.
//!
//! Invariant: this is about time only; every name is listed once, whatever is decided.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use fuser::{FopenFlags, InitFlags, KernelConfig};
use nix::sys::utsname::uname;

use crate::volume::{DirEntry, FileKind, TreeShape, Volume};

/// Directories must have so many files, on average, for samples: each costs two requests more, which is what attributes of some fifteen
/// files cost.
const LEAST_MEAN_CHILDREN: u64 = 32;

/// Of so many names one may lie behind the first of its directory that an answer has room for. A lookup takes five to ten times as long as
/// attributes in a listing, so that a program which wants all takes some three times as long at the worst. Measured with `du -s`: where a
/// quarter does, 2.5 s with samples and 0.8 to 1.0 s without; on five directories of 20,000, where nearly all do, 3.8 s and 0.5 s.
const LATE_PART: u64 = 4;

/// The first Linux that asks for as much as the reader has room for (fs/fuse/readdir.c). Before, it asks for a page, with attributes of some
/// twenty names.
const LARGE_ANSWERS_SINCE: (u32, u32) = (6, 16);

/// A directory of no more names is given whole.
const WHOLE_ENTRIES: usize = 24;

/// Names in a sample.
const SAMPLE_ENTRIES: usize = 8;

/// Bare names and lookups that are remembered; of more, one half counts.
const MEMORY: u32 = 4096;

/// Attributes are wanted when this part of the bare names is looked up. A lookup takes some five times as long as attributes in a listing.
const WANTED_PART: u32 = 4;

/// While attributes are wanted, one directory of so many is sampled all the same: others may go through the tree by then.
const SAMPLED_PART: u32 = 64;

/// Marks of directories with bare names, in words: 128 KiB, so that those of a million directories are mostly apart.
const BARE_WORDS: usize = 1 << 14;

/// Decides for a whole mount.
#[derive(Debug)]
pub(super) struct Listings {
    /// The marks, where the kernel stops asking for attributes that nobody uses.
    bare: Option<Box<[AtomicU64]>>,
    counts: Counts,
}

impl Listings {
    /// Asks the kernel for listings with attributes: only where they are used, if there is a cheap way to those that were left out.
    pub(super) fn negotiate(volume: &dyn Volume, config: &mut KernelConfig) -> Self {
        let mut enable = |flag| config.add_capabilities(flag).is_ok();
        let is_plus = enable(InitFlags::FUSE_DO_READDIRPLUS);
        let is_worth_it = volume.shape().is_some_and(is_for_samples)
            && uname().is_ok_and(|system| system.release().to_str().is_some_and(has_large_answers));
        Self::new(is_plus && is_worth_it && enable(InitFlags::FUSE_READDIRPLUS_AUTO))
    }

    /// `is_auto` as the kernel agreed.
    pub(super) fn new(is_auto: bool) -> Self {
        let bare = is_auto.then(|| std::iter::repeat_with(AtomicU64::default).take(BARE_WORDS).collect());
        Self { bare, counts: Counts::default() }
    }

    /// Whether listings may begin with a sample. Then every directory must be opened through us.
    pub(super) fn are_sampled(&self) -> bool {
        self.bare.is_some()
    }

    /// How a directory that never changes is opened: what the kernel has kept of its listing is used, but bare names where attributes are
    /// wanted.
    pub(super) fn open_flags(&self, ino: u64) -> FopenFlags {
        let is_bare = self.mark(ino).is_some_and(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0);
        match is_bare && self.counts.are_wanted() {
            true => FopenFlags::FOPEN_CACHE_DIR,
            false => FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE,
        }
    }

    /// How much of a directory the answer to a READDIRPLUS shall have that goes on after `offset`.
    pub(super) fn extent(&self, volume: &dyn Volume, ino: u64, offset: u64) -> Extent {
        let Some((word, bit)) = self.mark(ino).filter(|_| offset == 0 && volume.has_attributes_at_hand()) else {
            return Extent::Full;
        };
        word.fetch_and(!bit, Ordering::Relaxed);
        if self.counts.begin() { Extent::Sample } else { Extent::Full }
    }

    /// Names of so many files of a directory were listed without attributes. (Those of directories are looked up by everybody.)
    pub(super) fn listed(&self, ino: u64, n_files: u32) {
        if let Some((word, bit)) = self.mark(ino).filter(|_| n_files > 0) {
            word.fetch_or(bit, Ordering::Relaxed);
            self.counts.listed(n_files);
        }
    }

    /// A name was looked up.
    pub(super) fn looked_up(&self, kind: FileKind) {
        if self.bare.is_some() && kind != FileKind::Directory {
            self.counts.looked_up();
        }
    }

    /// Where the mark of a directory is; others may have the same.
    fn mark(&self, ino: u64) -> Option<(&AtomicU64, u64)> {
        // Fibonacci hashing: numbers that are near each other come far apart.
        let hash = ino.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - BARE_WORDS.ilog2() - u64::BITS.ilog2());
        let word = self.bare.as_ref()?.get(usize::try_from(hash).unwrap_or_default() / 64)?;
        Some((word, 1 << (hash % 64)))
    }
}

/// Whether samples gain more in a tree than they may cost.
fn is_for_samples(TreeShape { n_nodes, n_directories, n_late }: TreeShape) -> bool {
    n_nodes / n_directories.max(1) >= LEAST_MEAN_CHILDREN && n_late.saturating_mul(LATE_PART) <= n_nodes
}

/// Whether a Linux of this release asks for more than a page of a listing.
fn has_large_answers(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= LARGE_ANSWERS_SINCE
}

/// How much of a directory an answer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// As much as there is room for.
    Full,
    /// All of a small directory and of one of directories, which everybody looks up who goes on; little of another.
    Sample,
}

impl Extent {
    /// How many it has of the entries that there is room for.
    pub(super) fn n_given(self, entries: &[DirEntry]) -> usize {
        let n_directories = || entries.iter().filter(|entry| entry.attr.kind == FileKind::Directory).count();
        match self {
            Self::Sample if entries.len() > WHOLE_ENTRIES && n_directories() * 2 < entries.len() => SAMPLE_ENTRIES,
            Self::Full | Self::Sample => entries.len(),
        }
    }
}

/// What happened lately.
#[derive(Debug, Default)]
struct Counts {
    /// Files listed without attributes.
    n_bare: AtomicU32,
    /// Files looked up.
    n_looked_up: AtomicU32,
    /// Directories of which the listing began.
    n_begun: AtomicU32,
}

impl Counts {
    /// Whether bare names are looked up, as a rule.
    fn are_wanted(&self) -> bool {
        let n_bare = self.n_bare.load(Ordering::Relaxed);
        self.n_looked_up.load(Ordering::Relaxed).saturating_mul(WANTED_PART) > n_bare
    }

    /// A listing begins: whether with a sample.
    fn begin(&self) -> bool {
        self.n_begun.fetch_add(1, Ordering::Relaxed).is_multiple_of(SAMPLED_PART) || !self.are_wanted()
    }

    fn listed(&self, n_files: u32) {
        self.count(&self.n_bare, n_files);
    }

    fn looked_up(&self) {
        self.count(&self.n_looked_up, 1);
    }

    fn count(&self, counter: &AtomicU32, n: u32) {
        let counted = counter.fetch_add(n, Ordering::Relaxed).saturating_add(n);
        if counted > MEMORY {
            for counter in [&self.n_bare, &self.n_looked_up] {
                let _ = counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| Some(count / 2));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::table::PROMPT_NAMES;
    use crate::volume::Attr;

    const KEPT: FopenFlags = FopenFlags::FOPEN_CACHE_DIR.union(FopenFlags::FOPEN_KEEP_CACHE);

    #[test]
    fn what_is_looked_up_is_wanted_until_it_is_not() {
        let counts = Counts::default();
        assert!(!counts.are_wanted() && counts.begin());
        counts.listed(1000);
        (0..250).for_each(|_| counts.looked_up());
        assert!(!counts.are_wanted());
        counts.looked_up();
        assert!(counts.are_wanted());
        let n_sampled = (0..10 * SAMPLED_PART).filter(|_| counts.begin()).count();
        assert_eq!(n_sampled, 10);
        // A long time of lookups is forgotten as soon as some thousand names are listed that nobody looks up.
        (0..1_000_000).for_each(|_| counts.looked_up());
        counts.listed(100);
        assert!(counts.are_wanted());
        (0..100).for_each(|_| counts.listed(100));
        assert!(!counts.are_wanted());
    }

    #[test]
    fn a_sample_has_all_of_a_small_directory_and_of_one_of_directories() {
        let entry = |kind| DirEntry {
            name: bytes::Bytes::from_static(b"name"),
            attr: Attr {
                ino: 2,
                kind,
                permissions: 0o644,
                nlink: 1,
                uid: 0,
                gid: 0,
                size: 0,
                mtime: std::time::UNIX_EPOCH,
                rdev: 0,
            },
            is_attr_known: true,
            next_offset: 1,
        };
        let n_given = |extent: Extent, n_files, n_directories| {
            let files = std::iter::repeat_n(entry(FileKind::Regular), n_files);
            let entries: Vec<_> = files.chain(std::iter::repeat_n(entry(FileKind::Directory), n_directories)).collect();
            extent.n_given(&entries)
        };
        assert_eq!(n_given(Extent::Full, 200, 0), 200);
        assert_eq!(n_given(Extent::Sample, WHOLE_ENTRIES, 0), WHOLE_ENTRIES);
        assert_eq!(n_given(Extent::Sample, WHOLE_ENTRIES, 1), SAMPLE_ENTRIES);
        assert_eq!(n_given(Extent::Sample, 100, 99), SAMPLE_ENTRIES);
        assert_eq!(n_given(Extent::Sample, 100, 100), 200);
    }

    #[test]
    fn names_that_are_kept_without_attributes_are_listed_anew_when_these_are_wanted() {
        let listings = Listings::new(true);
        listings.listed(7, 300);
        assert_eq!(listings.open_flags(7), KEPT);
        listings.looked_up(FileKind::Directory);
        (0..100).for_each(|_| listings.looked_up(FileKind::Symlink));
        assert_eq!(listings.open_flags(7), FopenFlags::FOPEN_CACHE_DIR);
        assert_eq!(listings.open_flags(8), KEPT);
        let never = Listings::new(false);
        never.listed(7, 300);
        (0..1000).for_each(|_| never.looked_up(FileKind::Regular));
        assert_eq!(never.open_flags(7), KEPT);
        assert!(!never.are_sampled());
    }

    #[test]
    fn samples_are_for_trees_of_directories_that_an_answer_has_room_for() {
        // Directories of so many names, and how many of them there are.
        let is_for = |groups: &[(u64, u64)]| {
            let mut shape = TreeShape { n_nodes: 1, n_directories: 1, n_late: 0 };
            for &(n_names, n_alike) in groups {
                shape.n_nodes += n_alike * (1 + n_names);
                shape.n_directories += n_alike;
                shape.n_late += n_alike * n_names.saturating_sub(u64::from(PROMPT_NAMES));
            }
            is_for_samples(shape)
        };
        for (groups, expected) in [
            (&[(100, 1000)][..], true),
            (&[(200, 1000)], true),
            (&[(100, 40_000), (1_000_000, 1)], true),
            (&[(100, 1000), (300, 1)], true),
            (&[(20_000, 5)], false),
            (&[(20_000, 5), (0, 3000)], false),
            (&[(100, 1000), (100_000, 1)], false),
            (&[(12, 10_000)], false),
            (&[(300, 1000)], false),
            (&[], false),
        ] {
            assert_eq!(is_for(groups), expected, "{groups:?}");
        }
    }

    #[test]
    fn releases_are_compared_by_their_numbers() {
        for (release, expected) in [
            ("6.16.0", true),
            ("6.16", true),
            ("6.18.3-amd64", true),
            ("7.0-rc1", true),
            ("10.1.0", true),
            ("6.15.9", false),
            ("6.2.0", false),
            ("6.12.48+deb13-amd64", false),
            ("5.19", false),
            ("", false),
            ("next", false),
        ] {
            assert_eq!(has_large_answers(release), expected, "{release}");
        }
    }

    #[test]
    fn marks_of_directories_that_are_near_each_other_are_apart() {
        let listings = Listings::new(true);
        let places: std::collections::HashSet<_> = (0..10_000)
            .filter_map(|idx| listings.mark(idx * 648).map(|(word, bit)| (std::ptr::from_ref(word), bit)))
            .collect();
        assert!(places.len() > 9_900, "{}", places.len());
    }
}
