//! Which chunks of a backing file are there: two bits for each, read without a lock.
//!
//! Invariant: what is written to the disk says [`State::Present`] of chunks only whose bytes were on the disk before: they pass through
//! [`Unsynced`], a flush of the file, and [`Map::made_durable`], in that order. Until then the disk has them as claimed, which means that
//! they are hashed before they are used. A flush that fails loses all that was written before it, see [`Map::lose_written`].

use std::collections::{BTreeSet, HashSet};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::state::{BLOCK_CHUNKS, BLOCK_WORDS, WORD_CHUNKS};

/// The lower bit of every chunk of a word.
const LOW_BITS: u64 = 0x5555_5555_5555_5555;

/// What is known of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum State {
    /// It is not there.
    Absent = 0,
    /// It may be there: its bytes are to be hashed before they are used.
    Claimed = 1,
    /// It was written by this process after it was verified, and need not be on the disk yet.
    Written = 2,
    /// It was verified, and is on the disk.
    Present = 3,
}

impl State {
    /// Whether its bytes are as good as the index says.
    pub(super) fn is_readable(self) -> bool {
        matches!(self, Self::Written | Self::Present)
    }
}

/// The states of all chunks.
#[derive(Debug)]
pub(super) struct Map {
    /// Whole blocks of words.
    words: Vec<AtomicU64>,
    n_chunks: usize,
    /// Chunks that are readable.
    n_readable: AtomicU64,
    /// Chunks that are claimed.
    n_claimed: AtomicU64,
    /// Blocks that differ from those on the disk; never locked over anything else.
    dirty: Mutex<BTreeSet<u64>>,
}

/// Chunks that were written and are durable after the next flush of the file.
#[derive(Debug, Default)]
pub(super) struct Unsynced {
    chunks: Vec<usize>,
    pub(super) n_bytes: u64,
}

impl Unsynced {
    /// A chunk was written and is [`State::Written`] now.
    pub(super) fn add(&mut self, chunk_idx: usize, n_bytes: u64) {
        self.chunks.push(chunk_idx);
        self.n_bytes += n_bytes;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Takes out what was written again since, and so is part of a later flush.
    pub(super) fn without(mut self, later: &Self) -> Self {
        let later: HashSet<usize> = later.chunks.iter().copied().collect();
        self.chunks.retain(|chunk_idx| !later.contains(chunk_idx));
        self
    }
}

impl Map {
    /// Memory that the map of so many chunks takes, in bytes.
    pub(super) fn memory_bytes(n_chunks: u64) -> u64 {
        n_chunks.div_ceil(BLOCK_CHUNKS as u64) * (BLOCK_WORDS as u64 * 8)
    }

    /// A map of which nothing is there.
    pub(super) fn new(n_chunks: usize) -> Self {
        let n_words = n_chunks.div_ceil(BLOCK_CHUNKS) * BLOCK_WORDS;
        Self {
            words: (0..n_words).map(|_| AtomicU64::new(0)).collect(),
            n_chunks,
            n_readable: AtomicU64::new(0),
            n_claimed: AtomicU64::new(0),
            dirty: Mutex::default(),
        }
    }

    /// Takes over a block as it was on the disk; before the map is shared. With `is_trusted` false what is present is claimed only.
    pub(super) fn load(&mut self, map_block: u64, words: &[u64; BLOCK_WORDS], is_trusted: bool) {
        let first_word = map_block as usize * BLOCK_WORDS;
        for (word_idx, word) in words.iter().enumerate() {
            let first_chunk = (first_word + word_idx) * WORD_CHUNKS;
            let n_valid = self.n_chunks.saturating_sub(first_chunk).min(WORD_CHUNKS);
            let valid = if n_valid == WORD_CHUNKS { u64::MAX } else { (1 << (2 * n_valid)) - 1 };
            let low = word & LOW_BITS & valid;
            let high = (word >> 1) & LOW_BITS & valid;
            // Only 1 and 3 are ever written; a 2 is taken for a claim.
            let (present, claimed) = match is_trusted {
                true => (low & high, low ^ high),
                false => (0, low | high),
            };
            let Some(slot) = self.words.get_mut(first_word + word_idx) else { return };
            *slot.get_mut() = present | present << 1 | claimed;
            *self.n_readable.get_mut() += u64::from(present.count_ones());
            *self.n_claimed.get_mut() += u64::from(claimed.count_ones());
        }
    }

    /// What is known of a chunk.
    pub(super) fn state(&self, chunk_idx: usize) -> State {
        let Some(word) = self.words.get(chunk_idx / WORD_CHUNKS) else { return State::Absent };
        // What was written to the file before the state was set is seen by whoever sees the state.
        match (word.load(Ordering::Acquire) >> (2 * (chunk_idx % WORD_CHUNKS))) & 3 {
            0 => State::Absent,
            1 => State::Claimed,
            2 => State::Written,
            _ => State::Present,
        }
    }

    /// Sets what is known of a chunk if it is still `from`.
    pub(super) fn change(&self, chunk_idx: usize, from: State, to: State) -> bool {
        if chunk_idx >= self.n_chunks {
            return false;
        }
        let shift = 2 * (chunk_idx % WORD_CHUNKS);
        let changed = self.words[chunk_idx / WORD_CHUNKS].fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            ((word >> shift) & 3 == from as u64).then_some(word & !(3 << shift) | (to as u64) << shift)
        });
        if changed.is_err() {
            return false;
        }
        for (state, n) in [(from, u64::MAX), (to, 1)] {
            if state.is_readable() {
                self.n_readable.fetch_add(n, Ordering::AcqRel);
            } else if state == State::Claimed {
                self.n_claimed.fetch_add(n, Ordering::AcqRel);
            }
        }
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner).insert((chunk_idx / BLOCK_CHUNKS) as u64);
        true
    }

    /// The file was flushed after all of these had been written.
    pub(super) fn made_durable(&self, flushed: Unsynced) {
        for chunk_idx in flushed.chunks {
            self.change(chunk_idx, State::Written, State::Present);
        }
    }

    /// A flush failed, so that nothing written since the last good one need be on the disk, now or ever: the kernel tells of a failure
    /// once, for the whole file, and may keep in memory as clean what the disk does not have. Only writing it again helps.
    pub(super) fn lose_written(&self) {
        for (word_idx, word) in self.words.iter().enumerate() {
            let seen = word.load(Ordering::Acquire);
            let mut written = (seen >> 1) & !seen & LOW_BITS;
            while written != 0 {
                let chunk_idx = word_idx * WORD_CHUNKS + written.trailing_zeros() as usize / 2;
                self.change(chunk_idx, State::Written, State::Absent);
                written &= written - 1;
            }
        }
    }

    /// Chunks that are readable.
    pub(super) fn n_readable(&self) -> u64 {
        self.n_readable.load(Ordering::Acquire)
    }

    /// Chunks that are claimed.
    pub(super) fn n_claimed(&self) -> u64 {
        self.n_claimed.load(Ordering::Acquire)
    }

    /// Whether all chunks are readable.
    pub(super) fn is_full(&self) -> bool {
        self.n_readable() == self.n_chunks as u64
    }

    /// The blocks that changed since this was last asked, as the disk is to have them.
    pub(super) fn take_dirty(&self) -> Vec<(u64, [u64; BLOCK_WORDS])> {
        let dirty = std::mem::take(&mut *self.dirty.lock().unwrap_or_else(PoisonError::into_inner));
        dirty.into_iter().map(|map_block| (map_block, self.block_for_disk(map_block))).collect()
    }

    /// The disk need not have any block as it is here.
    pub(super) fn all_dirty(&self) {
        self.still_dirty(0..(self.words.len() / BLOCK_WORDS) as u64);
    }

    /// These blocks could not be written.
    pub(super) fn still_dirty(&self, blocks: impl Iterator<Item = u64>) {
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner).extend(blocks);
    }

    fn block_for_disk(&self, map_block: u64) -> [u64; BLOCK_WORDS] {
        let mut words = [0; BLOCK_WORDS];
        let first_word = map_block as usize * BLOCK_WORDS;
        for (word, slot) in words.iter_mut().zip(self.words.iter().skip(first_word)) {
            let seen = slot.load(Ordering::Acquire);
            let (low, high) = (seen & LOW_BITS, (seen >> 1) & LOW_BITS);
            // Written becomes claimed: its bytes may not survive a loss of power.
            *word = (low | high) | (low & high) << 1;
        }
        words
    }

    /// The next claimed chunk from `chunk_idx` on.
    pub(super) fn next_claimed(&self, chunk_idx: usize) -> Option<usize> {
        let mut at = chunk_idx;
        while at < self.n_chunks {
            let word = self.words[at / WORD_CHUNKS].load(Ordering::Acquire);
            let claimed = word & !(word >> 1) & LOW_BITS;
            let rest = claimed >> (2 * (at % WORD_CHUNKS));
            if rest != 0 {
                return Some(at + rest.trailing_zeros() as usize / 2);
            }
            at = (at / WORD_CHUNKS + 1) * WORD_CHUNKS;
        }
        None
    }

    /// Runs of readable chunks, in order.
    pub(super) fn readable_runs(&self) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for chunk_idx in (0..self.n_chunks).filter(|&chunk_idx| self.state(chunk_idx).is_readable()) {
            match runs.last_mut() {
                Some(run) if run.end == chunk_idx => run.end += 1,
                _ => runs.push(chunk_idx..chunk_idx + 1),
            }
        }
        runs
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use State::{Absent, Claimed, Present, Written};

    /// As the next process finds it after this one was killed at this moment.
    fn reopened(map: &Map, is_trusted: bool) -> Map {
        let mut next = Map::new(map.n_chunks);
        for map_block in 0..map.n_chunks.div_ceil(BLOCK_CHUNKS) as u64 {
            next.load(map_block, &map.block_for_disk(map_block), is_trusted);
        }
        next
    }

    #[test]
    fn the_disk_hears_of_a_chunk_only_after_the_flush_that_came_after_it() {
        let map = Map::new(5000);
        assert!(map.change(4100, Absent, Written));
        let mut unsynced = Unsynced::default();
        unsynced.add(4100, 64);
        // The flush begins; another chunk is written meanwhile and not part of it.
        assert!(map.change(4101, Absent, Written));
        assert_eq!(reopened(&map, true).state(4100), Claimed);
        map.made_durable(unsynced);
        let next = reopened(&map, true);
        assert_eq!((next.state(4100), next.state(4101), next.state(4102)), (Present, Claimed, Absent));
        assert_eq!((next.n_readable(), next.n_claimed()), (1, 1));
        assert_eq!((map.n_readable(), map.n_claimed()), (2, 0));
        let distrusted = reopened(&map, false);
        assert_eq!((distrusted.state(4100), distrusted.state(4101)), (Claimed, Claimed));
        assert_eq!((distrusted.n_readable(), distrusted.n_claimed()), (0, 2));
    }

    #[test]
    fn a_chunk_that_was_lost_during_a_flush_is_not_present_after_it() {
        let map = Map::new(10);
        assert!(map.change(3, Absent, Written));
        let mut unsynced = Unsynced::default();
        unsynced.add(3, 64);
        assert!(map.change(3, Written, Absent));
        map.made_durable(unsynced);
        assert_eq!(map.state(3), Absent);
        assert_eq!(map.n_readable(), 0);
    }

    #[test]
    fn what_was_written_again_during_a_flush_is_present_after_the_next_one() {
        let map = Map::new(10);
        let (mut first, mut second) = (Unsynced::default(), Unsynced::default());
        for chunk_idx in [3, 4] {
            assert!(map.change(chunk_idx, Absent, Written));
            first.add(chunk_idx, 64);
        }
        assert!(map.change(3, Written, Absent) && map.change(3, Absent, Written));
        second.add(3, 64);
        map.made_durable(first.without(&second));
        assert_eq!((map.state(3), map.state(4)), (Written, Present));
        map.made_durable(second);
        assert_eq!(map.state(3), Present);
    }

    #[test]
    fn a_flush_that_fails_loses_what_was_written_and_nothing_else() {
        let map = Map::new(5000);
        for (chunk_idx, state) in [(0, Written), (31, Written), (32, Present), (33, Claimed), (4999, Written)] {
            assert!(map.change(chunk_idx, Absent, state));
        }
        map.lose_written();
        let states = [0, 31, 32, 33, 34, 4999].map(|chunk_idx| map.state(chunk_idx));
        assert_eq!(states, [Absent, Absent, Present, Claimed, Absent, Absent]);
        assert_eq!((map.n_readable(), map.n_claimed()), (1, 1));
        assert_eq!(reopened(&map, true).state(31), Absent);
    }

    #[test]
    fn changed_blocks_are_told_once_and_claims_and_runs_are_found() {
        let n_chunks = 3 * BLOCK_CHUNKS + 5;
        let map = Map::new(n_chunks);
        assert!(map.take_dirty().is_empty());
        for chunk_idx in [0, 1, 31, 32, 33, BLOCK_CHUNKS * 2, n_chunks - 1] {
            assert!(map.change(chunk_idx, Absent, Claimed));
            assert!(!map.change(chunk_idx, Absent, Claimed));
        }
        assert!(!map.change(n_chunks, Absent, Written), "there is no such chunk");
        let dirty: Vec<u64> = map.take_dirty().into_iter().map(|(map_block, _)| map_block).collect();
        assert_eq!(dirty, [0, 2, 3]);
        assert!(map.take_dirty().is_empty());
        map.still_dirty([2].into_iter());
        assert_eq!(map.take_dirty().len(), 1);
        let mut found = Vec::new();
        let mut at = 0;
        while let Some(chunk_idx) = map.next_claimed(at) {
            assert!(map.change(chunk_idx, Claimed, Written));
            found.push(chunk_idx);
            at = chunk_idx + 1;
        }
        assert_eq!(found, [0, 1, 31, 32, 33, BLOCK_CHUNKS * 2, n_chunks - 1]);
        assert_eq!(map.readable_runs(), [0..2, 31..34, BLOCK_CHUNKS * 2..BLOCK_CHUNKS * 2 + 1, n_chunks - 1..n_chunks]);
        assert!(!map.is_full());
    }

    #[test]
    fn bits_behind_the_last_chunk_do_not_count() {
        let mut map = Map::new(33);
        map.load(0, &[u64::MAX; BLOCK_WORDS], true);
        assert_eq!(map.n_readable(), 33);
        assert!(map.is_full());
        map.load(9, &[u64::MAX; BLOCK_WORDS], true);
        assert_eq!(map.state(5000), Absent);
        assert!(Map::new(0).is_full(), "an empty image");
        // What is never written is taken for a claim.
        let mut map = Map::new(32);
        map.load(0, &[2; BLOCK_WORDS], true);
        assert_eq!((map.state(0), map.n_claimed()), (Claimed, 1));
    }
}
