//! What is to be warmed, as people write it, and which bytes that is.

use std::ops::Range;
use std::os::unix::ffi::OsStrExt;

use super::super::Part;
use crate::config::units::parse_size;
use crate::store::location::FileLocation;
use crate::tree::{Content, Tree, TreeError};

/// Bytes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteRange {
    /// The first.
    pub start: u64,
    /// The one behind the last; `None` for the end of the file.
    pub end: Option<u64>,
}

impl ByteRange {
    /// Reads `START-END`, with sizes such as `64M`; without END up to the end. What is behind START must be more than nothing.
    pub fn parse(text: &str) -> Option<Self> {
        let (start, end) = text.split_once('-')?;
        let start = parse_size(start)?;
        let end = match end {
            "" => None,
            end => Some(parse_size(end).filter(|end| *end > start)?),
        };
        Some(Self { start, end })
    }

    /// The bytes of a file that lies at `file`.
    fn within(self, file: &Range<u64>) -> Range<u64> {
        let place = |offset: u64| file.start.saturating_add(offset).min(file.end);
        place(self.start)..self.end.map_or(file.end, place)
    }
}

/// What is to be warmed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
    /// Everything.
    All,
    /// All metadata of an archive.
    Metadata,
    /// A file or directory, or a part of a file.
    Path {
        /// Path within the mount; empty for a disk image, too.
        path: Vec<u8>,
        /// Only these bytes.
        range: Option<ByteRange>,
    },
}

impl Wish {
    /// Reads `all`, `metadata`, or a path with or without `:START-END`. A file with such a name is meant by `./all`.
    pub fn parse(text: &[u8]) -> Self {
        match text {
            b"all" => Self::All,
            b"metadata" => Self::Metadata,
            _ => Self::path(text),
        }
    }

    /// Reads a path, with or without `:START-END`.
    pub fn path(text: &[u8]) -> Self {
        let colon = text.iter().rposition(|byte| *byte == b':');
        let ranged = colon.and_then(|at| {
            let range = ByteRange::parse(std::str::from_utf8(&text[at + 1..]).ok()?)?;
            Some((&text[..at], range))
        });
        match ranged {
            Some((path, range)) => Self::Path { path: path.to_vec(), range: Some(range) },
            None => Self::Path { path: text.to_vec(), range: None },
        }
    }

    /// What of this is for the part at a path within the mount; `None` for nothing.
    pub fn for_part(&self, part_path: &[u8]) -> Option<Self> {
        let Self::Path { path, range } = self else { return Some(self.clone()) };
        let mut rest = components(path);
        for name in components(part_path) {
            match rest.next() {
                // A directory above the part: all of the part.
                None if range.is_none() => return Some(Self::All),
                Some(wanted) if wanted == name => {}
                _ => return None,
            }
        }
        let path = rest.collect::<Vec<_>>().join(&b'/');
        Some(Self::Path { path, range: *range })
    }
}

/// The names of a path.
pub(in crate::volume) fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".")
}

/// Why a wish cannot be granted.
#[derive(Debug, Clone, thiserror::Error)]
pub enum WishError {
    /// There is no such file.
    #[error("{what}: {error}")]
    Path {
        /// The index and the path in it.
        what: String,
        /// Why.
        error: String,
    },
    /// The archive cannot be read there, now.
    #[error("{what}: {error}")]
    Unreadable {
        /// The index and the path in it.
        what: String,
        /// Why.
        error: TreeError,
    },
    /// A range of what has none.
    #[error("{what}: not a regular file, which a range of bytes could be of")]
    NoRange {
        /// The index and the path in it.
        what: String,
    },
}

impl WishError {
    pub(super) fn new(what: String, error: TreeError) -> Self {
        match error {
            TreeError::NotFound | TreeError::NotADirectory | TreeError::Loop => {
                Self::Path { what, error: error.to_string() }
            }
            TreeError::Damaged(_) | TreeError::Blob(_) => Self::Unreadable { what, error },
        }
    }
}

/// The bytes of a part's stream that a path stands for: of a file its ENTRY and content, of a directory all that is below it.
pub(super) async fn range_of(
    part: &Part,
    tree: Option<&Tree>,
    path: &[u8],
    range: Option<ByteRange>,
) -> Result<Range<u64>, WishError> {
    let what = || format!("{}: {}", part.location, String::from_utf8_lossy(path));
    let Some(tree) = tree else {
        let whole = 0..part.blob.size();
        let mut names = components(path);
        let is_image = match (names.next(), names.next()) {
            (None, _) => true,
            (Some(name), None) => image_names(&part.location).contains(&name),
            _ => false,
        };
        return match is_image {
            true => Ok(range.map_or(whole.clone(), |range| range.within(&whole))),
            false => Err(WishError::Path { what: what(), error: TreeError::NotFound.to_string() }),
        };
    };
    let node = tree.resolve(path, true).await.map_err(|error| WishError::new(what(), error))?;
    let entry = node.entry_offset;
    Ok(match (&node.content, range) {
        (Content::File { offset, size }, None) => entry..offset.saturating_add(*size),
        (Content::File { offset, size }, Some(range)) => range.within(&(*offset..offset.saturating_add(*size))),
        (_, Some(_)) => return Err(WishError::NoRange { what: what() }),
        (Content::Directory { end }, None) => entry..*end,
        // To find it, its metadata was read, and there is no more to it.
        (Content::Symlink(_) | Content::Device { .. } | Content::Nothing, None) => entry..entry,
    })
}

/// What an image may be called: as the mount shows it, with and without the suffix of its index.
fn image_names(location: &FileLocation) -> Vec<&[u8]> {
    let name = location.file_name();
    name.file_stem().into_iter().chain(name.file_name()).map(OsStrExt::as_bytes).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn path(path: &str, range: Option<(u64, Option<u64>)>) -> Wish {
        let range = range.map(|(start, end)| ByteRange { start, end });
        Wish::Path { path: path.into(), range }
    }

    #[test]
    fn wishes_are_words_or_paths_with_ranges() {
        for (text, wanted) in [
            ("all", Wish::All),
            ("metadata", Wish::Metadata),
            ("./all", path("./all", None)),
            ("usr/bin", path("usr/bin", None)),
            ("/a:b", path("/a:b", None)),
            ("/a:0-4k", path("/a", Some((0, Some(4096))))),
            ("/a:b:1M-", path("/a:b", Some((1 << 20, None)))),
            (":0-64M", path("", Some((0, Some(64 << 20))))),
            ("/a:7-7", path("/a:7-7", None)),
            ("/a:9-7", path("/a:9-7", None)),
            ("/a:-7", path("/a:-7", None)),
        ] {
            assert_eq!(Wish::parse(text.as_bytes()), wanted, "{text}");
        }
        assert_eq!(Wish::path(b"all"), path("all", None));
        assert_eq!(ByteRange::parse("5"), None);
    }

    #[test]
    fn a_range_stays_in_its_file() {
        let range = |text| ByteRange::parse(text).unwrap();
        let file = 100..200;
        for (text, wanted) in [("0-10", 100..110), ("50-", 150..200), ("50-1000", 150..200), ("500-600", 200..200)] {
            assert_eq!(range(text).within(&file), wanted, "{text}");
        }
        let last = u64::MAX - 1..u64::MAX;
        assert_eq!(range("1T-2T").within(&last), u64::MAX..u64::MAX);
    }

    #[test]
    fn a_path_of_the_mount_is_one_of_its_part() {
        for (wish, part, wanted) in [
            (path("a/b/c", None), "", Some(path("a/b/c", None))),
            (path("/a/b/c", None), "a", Some(path("b/c", None))),
            (path("a/./b//c", Some((1, None))), "a/b", Some(path("c", Some((1, None))))),
            (path("a/b", None), "a/b/c", Some(Wish::All)),
            (path("a/b", Some((1, None))), "a/b/c", None),
            (path("a/x", None), "a/b", None),
            (path("", None), "a", Some(Wish::All)),
            (Wish::All, "a", Some(Wish::All)),
            (Wish::Metadata, "a", Some(Wish::Metadata)),
        ] {
            assert_eq!(wish.for_part(part.as_bytes()), wanted, "{wish:?} for {part}");
        }
    }
}
