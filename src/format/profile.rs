//! Profiles: which chunks were touched first, in which order, and when.
//!
//! A profile is a text that a person can read and a script can make:
//!
//! ```text
//! caifs-profile 1
//! # what was run, and when; lines like this one are for people
//! 12 d15c8f2f6b3c6f1a6a0d3b2f6cf0f1d0f2f80dca3ef9f17a47ea9b6a6b6a5f3e
//! 12 7a0bd1ba4e1e8c25b3d02e7c8ef45d9cc1a5b0a1bd37a8a3a9d1f1a8a4ff1a02
//! 340 0f4be3…
//! ```
//!
//! The first line is the version. Each other line is a chunk: milliseconds since the recording began, a space, and the chunk's id in
//! 64 hexadecimal digits, in the order in which they were touched first. Lines that are empty or begin with `#` mean nothing. A chunk
//! that comes again counts where it came first. What stands behind the last line end is ignored: whoever wrote it was killed at it.
//!
//! Since it names content and not places, a profile helps the next version of an image as far as the two have chunks in common.

use std::collections::{HashMap, HashSet};
use std::fmt::Write;

use crate::digest::{CHUNK_ID_BYTES, ChunkId};

/// What a profile is called that lies beside its index: the index's name and this.
pub const SUFFIX: &str = ".profile";

/// The largest profile, in bytes.
pub const MAX_PROFILE_BYTES: u64 = 32 << 20;

/// The most chunks in a profile: 16 GiB of content at the usual chunk size.
pub const MAX_PROFILE_CHUNKS: usize = 1 << 18;

/// A line is shorter, unless it is a remark. More of one is not kept.
const MAX_LINE_BYTES: usize = 256;

/// The first line.
pub const HEADER: &str = "caifs-profile 1";

/// What the first line of every version begins with.
const ANY_HEADER: &str = "caifs-profile ";

/// A chunk that was touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Touch {
    /// Milliseconds since the recording began.
    pub ms: u64,
    /// The chunk.
    pub id: ChunkId,
}

impl Touch {
    /// The touch as a line, with its end.
    pub fn write_line(&self, text: &mut String) {
        // A string takes everything.
        let _ = writeln!(text, "{} {}", self.ms, self.id.to_hex());
    }
}

/// Why a text is not a profile.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProfileError {
    /// It begins otherwise.
    #[error("not a profile (its first line is not {HEADER:?})")]
    NotAProfile,
    /// It is one that another caifs wrote.
    #[error("a profile of another version ({0:?}); this caifs reads {HEADER:?}")]
    Version(String),
    /// A line is wrong.
    #[error("line {line}: {reason}")]
    Line {
        /// Which, from 1.
        line: usize,
        /// What is wrong.
        reason: &'static str,
    },
    /// There are more than [`MAX_PROFILE_CHUNKS`].
    #[error("more than {MAX_PROFILE_CHUNKS} chunks")]
    TooMany,
}

/// Chunks in the order in which they were touched first, each once.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Profile {
    /// The chunks.
    pub touches: Vec<Touch>,
}

impl Profile {
    /// Reads a profile.
    ///
    /// # Errors
    /// It is none, or a line in it is wrong.
    pub fn parse(text: &[u8]) -> Result<Self, ProfileError> {
        let mut reader = ProfileReader::new(MAX_PROFILE_CHUNKS);
        reader.take(text)?;
        match reader.finish()? {
            (profile, false) => Ok(profile),
            (_, true) => Err(ProfileError::TooMany),
        }
    }

    /// The profile as text.
    pub fn to_text(&self) -> String {
        let mut text = format!("{HEADER}\n");
        for touch in &self.touches {
            touch.write_line(&mut text);
        }
        text
    }

    /// One profile of several. A chunk's place is the foremost that it has in any of them; of those with the same place the one comes
    /// first that more of them have, then the one of the profile named first. Its time is the earliest it has, but not before
    /// that of the chunk before it. Of more than [`MAX_PROFILE_CHUNKS`] the last are left out.
    pub fn merge(profiles: &[Self]) -> Self {
        struct Met {
            place: usize,
            n_profiles: usize,
            order: usize,
            ms: u64,
        }
        let mut met: HashMap<ChunkId, Met> = HashMap::new();
        for profile in profiles {
            for (place, touch) in profile.touches.iter().enumerate() {
                let order = met.len();
                let first = Met { place, n_profiles: 0, order, ms: touch.ms };
                let chunk = met.entry(touch.id).or_insert(first);
                chunk.n_profiles += 1;
                chunk.place = chunk.place.min(place);
                chunk.ms = chunk.ms.min(touch.ms);
            }
        }
        let mut merged: Vec<(ChunkId, Met)> = met.into_iter().collect();
        merged.sort_unstable_by_key(|(_, met)| (met.place, usize::MAX - met.n_profiles, met.order));
        merged.truncate(MAX_PROFILE_CHUNKS);
        let mut ms = 0;
        let in_time = merged.into_iter().map(|(id, met)| {
            ms = met.ms.max(ms);
            Touch { ms, id }
        });
        Self { touches: in_time.collect() }
    }
}

/// Reads a profile that comes in pieces, and keeps its first chunks.
#[derive(Debug)]
pub struct ProfileReader {
    max_chunks: usize,
    touches: Vec<Touch>,
    met: HashSet<ChunkId>,
    /// What has come of the line that has not ended yet, as far as it is looked at.
    begun: Vec<u8>,
    n_lines: usize,
    is_cut: bool,
}

impl ProfileReader {
    /// Nothing has come yet; so many chunks are kept.
    pub fn new(max_chunks: usize) -> Self {
        Self { max_chunks, touches: Vec::new(), met: HashSet::new(), begun: Vec::new(), n_lines: 0, is_cut: false }
    }

    /// Takes what comes next. Whether more is wanted.
    ///
    /// # Errors
    /// It is no profile, or a line in it is wrong.
    pub fn take(&mut self, bytes: &[u8]) -> Result<bool, ProfileError> {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            if self.is_cut {
                break;
            }
            let (text, is_whole) = match piece.strip_suffix(b"\n") {
                Some(text) => (text, true),
                None => (piece, false),
            };
            let room = MAX_LINE_BYTES - self.begun.len();
            self.begun.extend_from_slice(&text[..text.len().min(room)]);
            if is_whole {
                self.n_lines += 1;
                let line = std::mem::take(&mut self.begun);
                self.line(&line)?;
            } else if self.n_lines == 0 && self.begun.len() == MAX_LINE_BYTES {
                return Err(ProfileError::NotAProfile);
            }
        }
        Ok(!self.is_cut)
    }

    /// The chunks that were kept, and whether there were more.
    ///
    /// # Errors
    /// Nothing came that is the start of a profile.
    pub fn finish(self) -> Result<(Profile, bool), ProfileError> {
        match self.n_lines {
            0 => Err(ProfileError::NotAProfile),
            _ => Ok((Profile { touches: self.touches }, self.is_cut)),
        }
    }

    fn line(&mut self, line: &[u8]) -> Result<(), ProfileError> {
        if self.n_lines == 1 {
            if line == HEADER.as_bytes() {
                return Ok(());
            }
            if line.starts_with(ANY_HEADER.as_bytes()) {
                let shown: String = String::from_utf8_lossy(line).chars().take(40).collect();
                return Err(ProfileError::Version(shown));
            }
            return Err(ProfileError::NotAProfile);
        }
        if line.is_empty() || line.starts_with(b"#") {
            return Ok(());
        }
        let touch = touch(line).map_err(|reason| ProfileError::Line { line: self.n_lines, reason })?;
        if self.met.insert(touch.id) {
            match self.touches.len() < self.max_chunks {
                true => self.touches.push(touch),
                false => self.is_cut = true,
            }
        }
        Ok(())
    }
}

/// `<milliseconds> <id>`.
fn touch(line: &[u8]) -> Result<Touch, &'static str> {
    const FORM: &str = "not milliseconds, a space, and the 64 digits of a chunk's id";
    if line.len() == MAX_LINE_BYTES {
        return Err(FORM);
    }
    let text = std::str::from_utf8(line).map_err(|_| FORM)?;
    let (ms, id) = text.split_once(' ').ok_or(FORM)?;
    let is_number = !ms.is_empty() && ms.bytes().all(|byte| byte.is_ascii_digit());
    let ms = ms.parse().ok().filter(|_| is_number).ok_or(FORM)?;
    let id = id.parse().ok().filter(|_| id.len() == 2 * CHUNK_ID_BYTES).ok_or(FORM)?;
    Ok(Touch { ms, id })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn id(n: u8) -> ChunkId {
        ChunkId([n; CHUNK_ID_BYTES])
    }

    fn profile(touches: &[(u64, u8)]) -> Profile {
        Profile { touches: touches.iter().map(|&(ms, n)| Touch { ms, id: id(n) }).collect() }
    }

    #[test]
    fn what_is_written_is_read() {
        let written = profile(&[(0, 1), (5, 2), (5, 3), (70_000, 4)]);
        assert_eq!(Profile::parse(written.to_text().as_bytes()), Ok(written));
        assert_eq!(Profile::parse(b"caifs-profile 1\n"), Ok(Profile::default()));
    }

    #[test]
    fn a_prefix_and_remarks_and_repetitions_are_fine() {
        let text = format!("{HEADER}\n# a remark\n\n3 {}\n9 {}\n4 {}\n12 01", id(7), id(7), id(8));
        assert_eq!(Profile::parse(text.as_bytes()), Ok(profile(&[(3, 7), (4, 8)])));
        let whole = profile(&[(1, 1), (2, 2), (3, 3)]).to_text();
        for n_bytes in HEADER.len() + 1..whole.len() {
            let read = Profile::parse(&whole.as_bytes()[..n_bytes]).unwrap();
            assert!(profile(&[(1, 1), (2, 2), (3, 3)]).touches.starts_with(&read.touches));
        }
    }

    #[test]
    fn in_pieces_it_is_the_same_and_only_as_many_chunks_are_kept_as_are_wanted() {
        let whole = profile(&[(1, 1), (2, 2), (2, 3), (9, 4)]);
        let text = format!("{}# {}\n5 {}\n", whole.to_text(), "a long remark ".repeat(100), id(2));
        for n_bytes in [1, 2, 7, 100, 10_000] {
            let read = |max_chunks| {
                let mut reader = ProfileReader::new(max_chunks);
                let wants_more = text.as_bytes().chunks(n_bytes).all(|piece| reader.take(piece).unwrap());
                let (profile, is_cut) = reader.finish().unwrap();
                assert_eq!(is_cut, !wants_more);
                (profile, is_cut)
            };
            assert_eq!(read(4), (whole.clone(), false), "in pieces of {n_bytes}");
            assert_eq!(read(3), (profile(&[(1, 1), (2, 2), (2, 3)]), true), "in pieces of {n_bytes}");
            let wrong = "casync".repeat(100);
            let mut reader = ProfileReader::new(4);
            let taken: Result<Vec<bool>, _> =
                wrong.as_bytes().chunks(n_bytes).map(|piece| reader.take(piece)).collect();
            assert_eq!(taken.unwrap_err(), ProfileError::NotAProfile, "it is not read to its end");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, wanted) in [
            ("", "not a profile"),
            ("caifs-profile 1", "not a profile"),
            ("casync\n", "not a profile"),
            ("caifs-profile 2\n", "another version (\"caifs-profile 2\")"),
            ("caifs-profile 1\n\n12\n", "line 3: not milliseconds"),
            ("caifs-profile 1\n12 00\n", "line 2"),
            (&format!("caifs-profile 1\n-1 {}\n", id(0)), "line 2"),
            (&format!("caifs-profile 1\n+1 {}\n", id(0)), "line 2"),
            (&format!("caifs-profile 1\n{}0 {}\n", u64::MAX, id(0)), "line 2"),
            (&format!("caifs-profile 1\n1 {} \n", id(0)), "line 2"),
            (&format!("caifs-profile 1\n1 {}00\n", id(0)), "line 2"),
            (&format!("caifs-profile 1\r\n1 {}\r\n", id(0)), "another version"),
        ] {
            let error = Profile::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(wanted), "{text:?}: {error}");
        }
    }

    #[test]
    fn there_is_an_end_to_chunks() {
        let numbered = |n: usize| {
            let mut touches = Vec::with_capacity(n);
            for i in 0..n as u64 {
                let mut id = id(0);
                id.0[..8].copy_from_slice(&i.to_be_bytes());
                touches.push(Touch { ms: i, id });
            }
            Profile { touches }
        };
        let most = numbered(MAX_PROFILE_CHUNKS);
        let text = most.to_text();
        assert!(text.len() as u64 <= MAX_PROFILE_BYTES);
        assert_eq!(Profile::parse(text.as_bytes()), Ok(most));
        let more = numbered(MAX_PROFILE_CHUNKS + 1);
        assert_eq!(Profile::parse(more.to_text().as_bytes()), Err(ProfileError::TooMany));
        assert_eq!(Profile::merge(&[more]).touches.len(), MAX_PROFILE_CHUNKS);
    }

    #[test]
    fn merging_takes_the_foremost_place() {
        let one = profile(&[(10, 1), (20, 2), (30, 3)]);
        let two = profile(&[(5, 3), (6, 2), (7, 4)]);
        // Place 0: 1 and 3, of which two have 3. Place 1: 2. Place 2: 4.
        let merged = Profile::merge(&[one.clone(), two.clone()]);
        assert_eq!(merged, profile(&[(5, 3), (10, 1), (10, 2), (10, 4)]));
        assert_eq!(Profile::merge(std::slice::from_ref(&one)), one);
        assert_eq!(Profile::merge(&[one.clone(), one.clone()]), one);
        assert_eq!(Profile::merge(&[]), Profile::default());
        assert_eq!(Profile::merge(&[Profile::default(), two.clone()]), two);
    }

    proptest! {
        #[test]
        fn no_text_is_too_much(bytes in proptest::collection::vec(any::<u8>(), 0..400), has_header in any::<bool>()) {
            let mut text = if has_header { format!("{HEADER}\n").into_bytes() } else { Vec::new() };
            text.extend(bytes);
            if let Ok(profile) = Profile::parse(&text) {
                prop_assert_eq!(Profile::parse(profile.to_text().as_bytes()), Ok(profile));
            }
        }

        #[test]
        fn a_merged_profile_has_every_chunk_once_and_in_time(
            inputs in proptest::collection::vec(proptest::collection::vec((0u64..1000, 0u8..30), 0..40), 0..5),
        ) {
            let inputs: Vec<Profile> =
                inputs.iter().map(|touches| Profile::parse(profile(touches).to_text().as_bytes()).unwrap()).collect();
            let merged = Profile::merge(&inputs);
            let ids: HashSet<ChunkId> = merged.touches.iter().map(|touch| touch.id).collect();
            prop_assert_eq!(ids.len(), merged.touches.len());
            let wanted: HashSet<ChunkId> = inputs.iter().flat_map(|input| &input.touches).map(|touch| touch.id).collect();
            prop_assert_eq!(ids, wanted);
            prop_assert!(merged.touches.is_sorted_by_key(|touch| touch.ms));
        }
    }
}
