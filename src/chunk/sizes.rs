//! Chunk sizes as they are typed: desync's `MIN:AVG:MAX` in KiB and casync's `--chunk-size`.
//!
//! Both give the same [`ChunkSizes`], in bytes; what they have in common is only the colon.

use crate::format::index::{ChunkSizes, MAX_CHUNK_BYTES};

/// Why a text gives no chunk sizes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizesError {
    /// The text has not the wanted form.
    #[error("'{text}' is not a chunk size (use {wanted})")]
    Syntax {
        /// What was typed.
        text: String,
        /// What would be right.
        wanted: &'static str,
    },
    /// The sizes contradict each other or the limits.
    #[error("chunk sizes {}:{}:{} bytes: {reason}", sizes.min, sizes.avg, sizes.max)]
    Range {
        /// The sizes.
        sizes: ChunkSizes,
        /// The rule they break.
        reason: &'static str,
    },
}

/// Parses desync's `MIN:AVG:MAX`, three whole numbers of KiB.
pub fn parse_kib(text: &str) -> Result<ChunkSizes, SizesError> {
    let wrong = || SizesError::Syntax { text: text.to_owned(), wanted: "MIN:AVG:MAX in KiB, such as 16:64:256" };
    let mut bytes = [0; 3];
    let mut parts = text.split(':');
    for place in &mut bytes {
        let kib: u64 = parts.next().and_then(|part| part.parse().ok()).ok_or_else(wrong)?;
        *place = kib.checked_mul(1024).ok_or_else(wrong)?;
    }
    if parts.next().is_some() {
        return Err(wrong());
    }
    checked(ChunkSizes { min: bytes[0], avg: bytes[1], max: bytes[2] })
}

/// Parses casync's `--chunk-size`: `AVG` (the others follow from it), `MIN:AVG:MAX`, or `auto`, in bytes or with a
/// suffix of B K M G T P E (powers of 1024), fractions and sums allowed (`1.5M`, `1M 512K`).
pub fn parse_casync(text: &str) -> Result<ChunkSizes, SizesError> {
    let wrong =
        || SizesError::Syntax { text: text.to_owned(), wanted: "AVG, MIN:AVG:MAX (such as 16K:64K:256K) or auto" };
    if text == "auto" {
        return Ok(ChunkSizes::default());
    }
    let parts: Option<Vec<u64>> = text.split(':').map(parse_bytes).collect();
    match parts.as_deref() {
        Some(&[avg]) => derive(None, Some(avg), None),
        Some(&[min, avg, max]) => derive(Some(min), Some(avg), Some(max)),
        _ => Err(wrong()),
    }
}

/// Fills in the sizes that are not given, by casync's rules: the average from the geometric mean of the others or a
/// factor of four to one of them, the bounds a factor of four from the average.
pub fn derive(min: Option<u64>, avg: Option<u64>, max: Option<u64>) -> Result<ChunkSizes, SizesError> {
    let avg = match (avg, min, max) {
        (Some(avg), _, _) => avg,
        (None, Some(min), Some(max)) => ((min as f64).log2() / 2.0 + (max as f64).log2() / 2.0).exp2().round() as u64,
        (None, Some(min), None) => min.saturating_mul(4).clamp(1, MAX_CHUNK_BYTES),
        (None, None, Some(max)) => (max / 4).clamp(1, MAX_CHUNK_BYTES),
        (None, None, None) => ChunkSizes::default().avg,
    };
    checked(ChunkSizes {
        min: min.unwrap_or((avg / 4).max(1)),
        avg,
        max: max.unwrap_or(avg.saturating_mul(4).min(MAX_CHUNK_BYTES)),
    })
}

fn checked(sizes: ChunkSizes) -> Result<ChunkSizes, SizesError> {
    match sizes.are_valid() {
        true => Ok(sizes),
        false => Err(SizesError::Range { sizes, reason: "they must be 1 <= min <= avg <= max <= 128 MiB" }),
    }
}

/// One size as casync reads it: terms of a number and an optional suffix, added up.
fn parse_bytes(text: &str) -> Option<u64> {
    let mut total: f64 = 0.0;
    let mut rest = text.trim();
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let number_end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let number: f64 = rest[..number_end].parse().ok()?;
        rest = &rest[number_end..];
        let factor = match rest.chars().next() {
            None => 0,
            Some(suffix) => match "BKMGTPE".find(suffix) {
                Some(power) => {
                    rest = rest[1..].trim_start();
                    power as i32
                }
                None => return None,
            },
        };
        total += number * 1024f64.powi(factor);
    }
    (total.is_finite() && total < u64::MAX as f64).then_some(total as u64)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sizes(min: u64, avg: u64, max: u64) -> ChunkSizes {
        ChunkSizes { min, avg, max }
    }

    #[test]
    fn desync_sizes_are_kib() {
        assert_eq!(parse_kib("16:64:256"), Ok(ChunkSizes::default()));
        assert_eq!(parse_kib("8:32:128"), Ok(sizes(8192, 32768, 131072)));
        for wrong in [
            "",
            "64",
            "16:64",
            "16:64:256:1",
            "a:64:256",
            "16K:64K:256K",
            "-1:64:256",
            "0:64:256",
            "64:16:256",
            "16:64:63",
            "16:64:131073",
            "1:1:18446744073709551615",
        ] {
            assert!(parse_kib(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn casync_sizes_have_suffixes_and_derive_each_other() {
        let cases = [
            ("auto", ChunkSizes::default()),
            ("65536", ChunkSizes::default()),
            ("64K", ChunkSizes::default()),
            ("16K:64K:256K", ChunkSizes::default()),
            ("1M", sizes(262_144, 1_048_576, 4_194_304)),
            ("1.5M", sizes(393_216, 1_572_864, 6_291_456)),
            ("1M 512K", sizes(393_216, 1_572_864, 6_291_456)),
            ("64M", sizes(16 << 20, 64 << 20, 128 << 20)),
            ("1", sizes(1, 1, 4)),
            ("3B", sizes(1, 3, 12)),
            ("1:1:1000", sizes(1, 1, 1000)),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_casync(text), Ok(expected), "{text}");
        }
        for wrong in ["", "x", "16K:64K", "1:2:3:4", "64Q", "K", "0", "129M", "4:2:8", "1..5M", "é", "1M:é:3"] {
            assert!(parse_casync(wrong).is_err(), "{wrong}");
        }
        assert_eq!(derive(Some(16 << 10), None, Some(256 << 10)), Ok(ChunkSizes::default()));
        assert_eq!(derive(Some(16 << 10), None, None), Ok(ChunkSizes::default()));
        assert_eq!(derive(None, None, Some(256 << 10)), Ok(ChunkSizes::default()));
        assert_eq!(derive(None, None, None), Ok(ChunkSizes::default()));
    }
}
