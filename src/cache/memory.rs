//! The memory tier: plain chunks in a sharded LRU, weighed by their bytes.
//!
//! Invariant: the weight of all shards together stays at or below the capacity, except that the chunk inserted last is
//! always kept, so that a chunk larger than the capacity can still be used.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use lru::LruCache;

use crate::chunk::Chunk;
use crate::digest::ChunkId;

/// Enough that threads rarely meet at one lock; a get is some 15 ns, so more would only cost memory.
const N_SHARDS: usize = 16;

/// What a chunk weighs beside its bytes: its entries in the map and the recency list, and the allocator's share.
const OVERHEAD_BYTES: u64 = 192;

/// A byte-weighted LRU of chunks.
#[derive(Debug)]
pub struct MemoryTier {
    /// One lock is held at a time, and never over I/O or await.
    shards: Vec<Mutex<LruCache<ChunkId, Chunk>>>,
    capacity_bytes: AtomicU64,
    weight_bytes: AtomicU64,
    /// The shard that gives next when the inserting one has nothing left to give.
    next_victim: AtomicUsize,
}

impl MemoryTier {
    /// An empty tier that holds at most `capacity_bytes`.
    pub fn new(capacity_bytes: u64) -> Self {
        Self {
            shards: (0..N_SHARDS).map(|_| Mutex::new(LruCache::unbounded())).collect(),
            capacity_bytes: AtomicU64::new(capacity_bytes),
            weight_bytes: AtomicU64::new(0),
            next_victim: AtomicUsize::new(0),
        }
    }

    /// The chunk, if it is here; it becomes the most recently used.
    pub fn get(&self, id: &ChunkId) -> Option<Chunk> {
        self.shard(shard_of(id)).get(id).cloned()
    }

    /// Keeps a chunk and drops the least recently used ones to make room. Returns how many were dropped.
    pub fn insert(&self, chunk: Chunk) -> u64 {
        let id = chunk.id();
        let home = shard_of(&id);
        let added = weight(&chunk);
        // Counted before it is there: whoever drops it takes away what was counted.
        let mut total = self.weight_bytes.fetch_add(added, Ordering::Relaxed) + added;
        let replaced = self.shard(home).put(id, chunk).map_or(0, |old| weight(&old));
        if replaced > 0 {
            total = self.weight_bytes.fetch_sub(replaced, Ordering::Relaxed) - replaced;
        }
        self.evict(&id, home, total)
    }

    /// Whether a chunk is here; it does not become younger by that.
    pub fn has(&self, id: &ChunkId) -> bool {
        self.shard(shard_of(id)).contains(id)
    }

    /// Changes how much is held at the most. Returns how many chunks were dropped for that.
    pub fn set_capacity(&self, capacity_bytes: u64) -> u64 {
        self.capacity_bytes.store(capacity_bytes, Ordering::Relaxed);
        self.shrink()
    }

    /// The most that is held.
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes.load(Ordering::Relaxed)
    }

    /// Drops the least recently used chunks of all shards in turn until the rest fits.
    fn shrink(&self) -> u64 {
        let mut n_evicted = 0;
        let mut n_empty_shards = 0;
        let mut shard_idx = 0;
        while self.weight_bytes() > self.capacity_bytes() && n_empty_shards < N_SHARDS {
            let victim = self.shard(shard_idx).pop_lru();
            shard_idx = (shard_idx + 1) % N_SHARDS;
            match victim {
                Some((_, old)) => {
                    self.weight_bytes.fetch_sub(weight(&old), Ordering::Relaxed);
                    n_evicted += 1;
                    n_empty_shards = 0;
                }
                None => n_empty_shards += 1,
            }
        }
        n_evicted
    }

    /// Makes room for the chunk `id` that was just put into the shard `home`; `total` is what all chunks weigh with it.
    fn evict(&self, id: &ChunkId, home: usize, mut total: u64) -> u64 {
        let mut n_evicted = 0;
        let mut n_empty_shards = 0;
        let mut victim_shard = home;
        while total > self.capacity_bytes() && n_empty_shards < N_SHARDS {
            let victim = {
                let mut shard = self.shard(victim_shard);
                match shard.peek_lru() {
                    Some((oldest, _)) if oldest != id => shard.pop_lru(),
                    _ => None,
                }
            };
            match victim {
                Some((_, old)) => {
                    let freed = weight(&old);
                    total = self.weight_bytes.fetch_sub(freed, Ordering::Relaxed) - freed;
                    n_evicted += 1;
                    n_empty_shards = 0;
                }
                None => {
                    n_empty_shards += 1;
                    victim_shard = self.next_victim.fetch_add(1, Ordering::Relaxed) % N_SHARDS;
                }
            }
        }
        n_evicted
    }

    /// Bytes held now.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes.load(Ordering::Relaxed)
    }

    fn shard(&self, shard_idx: usize) -> MutexGuard<'_, LruCache<ChunkId, Chunk>> {
        // A panic cannot leave an LRU half changed here, so a poisoned lock is as good as any.
        self.shards[shard_idx].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn shard_of(id: &ChunkId) -> usize {
    usize::from(id.0[0]) % N_SHARDS
}

fn weight(chunk: &Chunk) -> u64 {
    chunk.plain().len() as u64 + OVERHEAD_BYTES
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::digest::Digest;

    fn chunk(seed: u32, n_bytes: usize) -> Chunk {
        let mut plain = vec![0; n_bytes];
        plain[..4].copy_from_slice(&seed.to_le_bytes());
        Chunk::of(Digest::default(), Bytes::from(plain))
    }

    #[test]
    fn weight_stays_under_the_capacity_and_old_chunks_go_first() {
        let tier = MemoryTier::new(100_000);
        let mut n_evicted = 0;
        for seed in 0..1000 {
            n_evicted += tier.insert(chunk(seed, 1000));
            assert!(tier.weight_bytes() <= 100_000);
        }
        let n_held = (0..1000).filter(|seed| tier.get(&chunk(*seed, 1000).id()).is_some()).count() as u64;
        assert_eq!(n_held + n_evicted, 1000);
        assert_eq!(tier.weight_bytes(), n_held * (1000 + OVERHEAD_BYTES));
        assert!(n_held > 70, "{n_held}");
        assert!(tier.get(&chunk(999, 1000).id()).is_some());
    }

    #[test]
    fn what_another_thread_drops_at_once_is_counted_right() {
        let tier = MemoryTier::new(0);
        let chunks: Vec<Chunk> = (0..64).map(|seed| chunk(seed, 100)).collect();
        std::thread::scope(|scope| {
            for part in chunks.chunks(16) {
                let tier = &tier;
                scope.spawn(move || {
                    for chunk in part.iter().cycle().take(200_000) {
                        tier.insert(chunk.clone());
                    }
                });
            }
        });
        let n_held = chunks.iter().filter(|chunk| tier.has(&chunk.id())).count() as u64;
        assert_eq!(tier.weight_bytes(), n_held * (100 + OVERHEAD_BYTES));
    }

    #[test]
    fn a_chunk_larger_than_the_capacity_is_kept_alone() {
        let tier = MemoryTier::new(1000);
        tier.insert(chunk(1, 100));
        let large = chunk(2, 5000);
        assert_eq!(tier.insert(large.clone()), 1);
        assert!(tier.get(&large.id()).is_some());
        tier.insert(chunk(3, 100));
        assert!(tier.get(&large.id()).is_none());
        assert_eq!(tier.weight_bytes(), 100 + OVERHEAD_BYTES);
    }

    #[test]
    fn a_lower_capacity_holds_at_once() {
        let tier = MemoryTier::new(100_000);
        for seed in 0..50 {
            tier.insert(chunk(seed, 1000));
        }
        let before = tier.weight_bytes();
        let n_evicted = tier.set_capacity(10_000);
        assert!(tier.weight_bytes() <= 10_000 && tier.weight_bytes() + n_evicted * (1000 + OVERHEAD_BYTES) == before);
        assert_eq!((0..50).filter(|seed| tier.has(&chunk(*seed, 1000).id())).count() as u64, 50 - n_evicted);
        tier.set_capacity(0);
        assert_eq!(tier.weight_bytes(), 0);
    }

    #[test]
    fn inserting_again_does_not_weigh_twice() {
        let tier = MemoryTier::new(1000);
        for _ in 0..10 {
            tier.insert(chunk(1, 100));
        }
        assert_eq!(tier.weight_bytes(), 100 + OVERHEAD_BYTES);
    }
}
