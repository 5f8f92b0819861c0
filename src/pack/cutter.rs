//! Cutting with a short way through zeros.
//!
//! Images are full of zeros, and a stretch of zeros as long as the longest chunk is always cut in the same place: one look
//! whether all is zero (ten times faster than the rolling hash) replaces the hash, and one digest serves all such chunks.

use crate::chunk::chunker::Chunker;

/// Bytes looked at together for being zero.
const ZERO_STEP: usize = 64;

/// A chunk that was cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cut {
    /// Length in bytes.
    pub len: usize,
    /// It is the chunk that every long stretch of zeros begins with.
    pub is_zero: bool,
}

/// A chunker that knows zeros.
#[derive(Debug, Clone)]
pub(super) struct Cutter {
    chunker: Chunker,
    zero_len: usize,
}

impl Cutter {
    pub(super) fn new(chunker: Chunker) -> Self {
        let zero_len = chunker.cut(&vec![0; chunker.max_bytes()], false).unwrap_or(chunker.max_bytes());
        Self { chunker, zero_len }
    }

    /// No chunk is longer, in bytes.
    pub(super) fn max_bytes(&self) -> usize {
        self.chunker.max_bytes()
    }

    /// As [`Chunker::cut`].
    pub(super) fn cut(&self, data: &[u8], at_end: bool) -> Option<Cut> {
        let max = self.chunker.max_bytes();
        if data.get(..max).is_some_and(is_zero) {
            return Some(self.zero());
        }
        self.chunker.cut(data, at_end).map(|len| Cut { len, is_zero: false })
    }

    /// The chunk that a stretch of zeros begins with, when it is at least [`Cutter::max_bytes`] long.
    pub(super) fn zero(&self) -> Cut {
        Cut { len: self.zero_len, is_zero: true }
    }
}

fn is_zero(data: &[u8]) -> bool {
    let (steps, rest) = data.as_chunks::<ZERO_STEP>();
    steps.iter().all(|step| step.iter().fold(0, |all, byte| all | byte) == 0) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::chunk::chunker::CutRule;
    use crate::format::index::ChunkSizes;

    #[test]
    fn zeros_are_cut_where_the_chunker_cuts_them() {
        // The last sizes cut zeros short of the maximum: a discriminator of 1 cuts everywhere.
        for (min, avg, max) in [(64, 256, 1024), (100, 100, 100), (1, 1, 1000)] {
            let chunker = Chunker::new(ChunkSizes { min, avg, max }, CutRule::Casync).unwrap();
            let cutter = Cutter::new(chunker.clone());
            for n_zeros in [0, 1, 99, 100, 1023, 1024, 1025, 5000] {
                let mut data = vec![0; n_zeros];
                data.extend((0..3000u32).map(|i| (i * i % 251) as u8));
                let mut rest = &data[..];
                while let Some(cut) = cutter.cut(rest, true) {
                    assert_eq!(Some(cut.len), chunker.cut(rest, true));
                    assert!(!cut.is_zero || rest[..cut.len].iter().all(|byte| *byte == 0));
                    rest = &rest[cut.len..];
                }
                assert!(rest.is_empty());
            }
        }
    }
}
