//! Which parts of a stream were read, in a few kilobytes however large the stream is.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Parts that are told apart at the most: a bit each, so 8 KiB for a stream of any size.
const MAX_CELLS: u64 = 1 << 16;

/// Which parts of a stream were read.
#[derive(Debug)]
pub struct Touched {
    size: u64,
    n_cells: u64,
    bits: Box<[AtomicU64]>,
}

impl Touched {
    /// Nothing was read of a stream of `size` bytes in `n_pieces` pieces.
    pub fn new(size: u64, n_pieces: u64) -> Self {
        let n_cells = n_pieces.clamp(1, MAX_CELLS);
        let bits = (0..n_cells.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { size, n_cells, bits }
    }

    /// Some bytes were read.
    pub fn mark(&self, offset: u64, n_bytes: u64) {
        let Some((first, last)) = self.cells(offset, n_bytes) else { return };
        for cell in first..=last {
            let (word, bit) = (&self.bits[(cell / 64) as usize], 1 << (cell % 64));
            // Mostly it is set already, and a look does not take the line away from other cores.
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    /// Whether anything was read in a range, as far as parts are told apart.
    pub fn has(&self, range: Range<u64>) -> bool {
        let Some((first, last)) = self.cells(range.start, range.end.saturating_sub(range.start)) else { return false };
        (first..=last).any(|cell| self.bits[(cell / 64) as usize].load(Ordering::Relaxed) & (1 << (cell % 64)) != 0)
    }

    /// The share of the stream that was read, 0 to 1, as far as parts are told apart.
    pub fn share(&self) -> f64 {
        let n_set: u32 = self.bits.iter().map(|word| word.load(Ordering::Relaxed).count_ones()).sum();
        f64::from(n_set) / self.n_cells as f64
    }

    fn cells(&self, offset: u64, n_bytes: u64) -> Option<(u64, u64)> {
        if n_bytes == 0 || offset >= self.size {
            return None;
        }
        let cell = |at: u64| (u128::from(at) * u128::from(self.n_cells) / u128::from(self.size)) as u64;
        let last = offset.saturating_add(n_bytes).min(self.size) - 1;
        Some((cell(offset), cell(last)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_read_is_remembered_by_parts() {
        let touched = Touched::new(1000, 10);
        assert_eq!((touched.has(0..1000), touched.share()), (false, 0.0));
        touched.mark(250, 100);
        for (range, is_read) in [(0..200, false), (200..201, true), (399..400, true), (400..1000, false), (5..5, false)]
        {
            assert_eq!(touched.has(range.clone()), is_read, "{range:?}");
        }
        assert_eq!(touched.share(), 0.2);
        touched.mark(999, 100);
        touched.mark(1000, 1);
        touched.mark(0, 0);
        assert_eq!(touched.share(), 0.3);
        assert!(touched.has(900..u64::MAX));
    }

    #[test]
    fn a_huge_stream_takes_a_few_kilobytes() {
        let touched = Touched::new(u64::MAX, u64::MAX);
        assert_eq!(touched.bits.len() as u64, MAX_CELLS / 64);
        touched.mark(u64::MAX - 1, 1);
        assert!(touched.has(u64::MAX - 1..u64::MAX) && !touched.has(0..1 << 40));
    }
}
