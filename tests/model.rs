//! A random index, random reads and random faults against the plain bytes: a read gives the right bytes or an error, and the right
//! bytes again once the faults are over.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use caifs::blob::source::IndexBytes;
use caifs::blob::{Blob, ChunkedBlob};
use caifs::cache::{Cache, CacheConfig};
use caifs::chunk::chunker::{Chunker, CutRule};
use caifs::digest::{ChunkId, Digest};
use caifs::format::index::{self, ChunkSizes, FLAG_SHA512_256, Index, IndexHeader};
use caifs::report::Report;
use caifs::store::fault::{Fault, FaultStore};
use proptest::prelude::*;

use crate::support::blob::Xorshift;

const SIZES: ChunkSizes = ChunkSizes { min: 256, avg: 1024, max: 4096 };

/// Plain bytes with an index over them and a store that holds their chunks.
struct Model {
    plain: Vec<u8>,
    index: Vec<u8>,
    chunks: HashMap<ChunkId, Vec<u8>>,
}

impl Model {
    /// Noise with stretches of zeros, so that chunks repeat.
    fn new(seed: u64, n_bytes: usize, digest: Digest) -> Self {
        let mut random = Xorshift::seeded(seed | 1);
        let mut plain = Vec::with_capacity(n_bytes);
        while plain.len() < n_bytes {
            let len = (random.below(9000) as usize + 1).min(n_bytes - plain.len());
            match random.below(3) {
                0 => plain.resize(plain.len() + len, 0),
                _ => plain.extend(random.bytes(len)),
            }
        }
        let chunker = Chunker::new(SIZES, CutRule::Casync).unwrap();
        let mut items = Vec::new();
        let mut chunks = HashMap::new();
        let mut start = 0;
        for len in chunker.cut_all(&plain) {
            let bytes = &plain[start..start + len];
            let id = digest.id(bytes);
            start += len;
            items.push((start as u64, id));
            chunks.insert(id, bytes.to_vec());
        }
        let feature_flags = if digest == Digest::Sha512_256 { FLAG_SHA512_256 } else { 0 };
        let header = IndexHeader { feature_flags, sizes: SIZES };
        Self { plain, index: index::encode(&header, items.iter().map(|(end, id)| (*end, id))), chunks }
    }

    fn blob(
        &self,
        config: CacheConfig,
        script: impl Fn(ChunkId, u64) -> Fault + Send + Sync + 'static,
    ) -> (Blob, Arc<FaultStore>) {
        let store = Arc::new(FaultStore::new("faulty", script));
        for (id, bytes) in &self.chunks {
            store.insert(*id, bytes);
        }
        let index = Index::open(IndexBytes::Copied(self.index.clone())).unwrap();
        let cache = Cache::new(Arc::<FaultStore>::clone(&store), config, Arc::new(Report::default()));
        (Blob::Chunked(ChunkedBlob::new(index, "model", cache, 1 << 20)), store)
    }
}

fn config(memory_bytes: u64) -> CacheConfig {
    CacheConfig { memory_bytes, inflight_bytes: 8192, fetch_timeout: Duration::from_millis(100), is_offline: false }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn any_fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        6 => Just(Fault::None),
        1 => Just(Fault::Missing),
        1 => Just(Fault::Fail),
        1 => Just(Fault::Flip),
        1 => Just(Fault::Truncate),
        1 => Just(Fault::Lengthen),
        1 => Just(Fault::Empty),
        1 => Just(Fault::Delay(Duration::from_millis(2))),
        1 => Just(Fault::Hang),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn a_read_gives_the_plain_bytes_or_an_error(
        seed in any::<u64>(),
        n_bytes in 0usize..60_000,
        memory_bytes in prop_oneof![Just(0u64), Just(10_000), Just(1 << 20)],
        faults in proptest::collection::vec(any_fault(), 1..12),
        reads in proptest::collection::vec((0.0f64..1.0, 0usize..20_000), 1..12),
        sha256 in any::<bool>(),
    ) {
        let digest = if sha256 { Digest::Sha256 } else { Digest::Sha512_256 };
        let model = Model::new(seed, n_bytes, digest);
        let n_faulty = 3 * faults.len() as u64;
        let (blob, _) = model.blob(config(memory_bytes), move |_, n_before| match n_before < n_faulty {
            true => faults[n_before as usize % faults.len()],
            false => Fault::None,
        });
        runtime().block_on(async {
            // All at once, so that reads of one chunk meet.
            let read = |(at, len): (f64, usize)| {
                let offset = (at * model.plain.len() as f64) as usize;
                let len = len.min(model.plain.len() - offset);
                let blob = blob.clone();
                async move { (offset, len, blob.read_at(offset as u64, len).await) }
            };
            let answers = futures_util::future::join_all(reads.iter().copied().map(read)).await;
            for (offset, len, answer) in answers {
                if let Ok(bytes) = answer {
                    assert!(bytes == model.plain[offset..offset + len], "wrong bytes at {offset}+{len}");
                }
            }
            // The faults end after some fetches; each failing read makes at least one, so this ends too.
            for at in reads {
                loop {
                    let (offset, len, answer) = read(at).await;
                    if let Ok(bytes) = answer {
                        assert!(bytes == model.plain[offset..offset + len]);
                        break;
                    }
                }
            }
        });
    }

    #[test]
    fn a_damaged_index_gives_the_plain_bytes_or_an_error(
        seed in any::<u64>(),
        flips in proptest::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..4),
        reads in proptest::collection::vec((0u64..40_000, 1usize..20_000), 1..12),
    ) {
        let mut model = Model::new(seed, 30_000, Digest::Sha512_256);
        for (place, bit) in flips {
            let byte = place.index(model.index.len());
            model.index[byte] ^= 1 << bit;
        }
        // What O(1) checks find is refused at once; what they cannot find must not give wrong bytes later.
        let Ok(index) = Index::open(IndexBytes::Copied(model.index.clone())) else { return Ok(()) };
        let changed_ends = index.check().is_err();
        let (blob, _) = model.blob(config(1 << 20), |_, _| Fault::None);
        runtime().block_on(async {
            for (offset, len) in reads {
                if let Ok(bytes) = blob.read_at(offset, len).await {
                    assert_eq!(bytes.len(), len);
                    let right = model.plain.get(offset as usize..offset as usize + len);
                    // An index whose offsets are changed consistently describes other content, which nothing can tell; a chunk
                    // itself is still never changed. With sound offsets every byte is the original's.
                    if let Some(right) = right && !changed_ends && index.blob_size() == model.plain.len() as u64 {
                        assert!(bytes == right, "wrong bytes at {offset}+{len}");
                    }
                }
            }
        });
    }
}

#[test]
fn readers_of_one_chunk_share_one_fetch() {
    let model = Model::new(3, 3000, Digest::Sha512_256);
    let (blob, store) = model.blob(config(1 << 20), |_, _| Fault::Delay(Duration::from_millis(20)));
    runtime().block_on(async {
        let reads = (0..50).map(|i| {
            let blob = blob.clone();
            tokio::spawn(async move { blob.read_at(i, 10).await.unwrap() })
        });
        for (i, read) in reads.collect::<Vec<_>>().into_iter().enumerate() {
            assert!(read.await.unwrap() == model.plain[i..i + 10]);
        }
    });
    assert_eq!(store.n_fetches(), 1);
}

#[test]
fn a_panic_in_a_store_is_an_error_for_its_readers_only() {
    let model = Model::new(5, 20_000, Digest::Sha512_256);
    // Long enough for the panic's backtrace to be printed before the read gives up.
    let patient = CacheConfig { fetch_timeout: Duration::from_secs(30), ..config(1 << 20) };
    let (blob, _) = model.blob(patient, |_, n_before| if n_before == 0 { Fault::Panic } else { Fault::None });
    runtime().block_on(async {
        assert!(blob.read_at(0, 1).await.is_err());
        assert!(blob.read_at(0, 20_000).await.unwrap() == model.plain);
    });
}

#[test]
fn a_store_that_hangs_is_an_error_by_the_deadline_and_recovers() {
    let model = Model::new(7, 20_000, Digest::Sha512_256);
    let (blob, _) = model.blob(config(1 << 20), |_, n_before| if n_before < 40 { Fault::Hang } else { Fault::None });
    runtime().block_on(async {
        let error = blob.read_at(0, 20_000).await.unwrap_err().to_string();
        assert!(error.contains("no answer from faulty within 0.1 s"), "{error}");
        loop {
            if let Ok(bytes) = blob.read_at(0, 20_000).await {
                assert!(bytes == model.plain);
                break;
            }
        }
    });
}

#[test]
fn a_read_in_memory_is_ready_at_its_first_poll_and_shares_the_chunk() {
    let model = Model::new(9, 20_000, Digest::Sha512_256);
    let (blob, store) = model.blob(config(1 << 20), |_, _| Fault::None);
    let runtime = runtime();
    runtime.block_on(blob.read_at(0, 20_000)).unwrap();
    let n_fetches = store.n_fetches();
    let _context = runtime.enter();
    for len in [10usize, 20_000] {
        let mut read = Box::pin(blob.read_at(0, len));
        let polled = read.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop()));
        assert!(matches!(polled, std::task::Poll::Ready(Ok(bytes)) if bytes == model.plain[..len]));
    }
    let addresses: Vec<*const u8> =
        (0..2).map(|_| runtime.block_on(blob.read_at(0, 10)).map(|bytes: Bytes| bytes.as_ptr()).unwrap()).collect();
    assert_eq!(addresses[0], addresses[1], "a small read is copied");
    assert_eq!(store.n_fetches(), n_fetches);
}

#[test]
fn reads_outside_of_the_blob_are_errors() {
    let model = Model::new(11, 5000, Digest::Sha512_256);
    let (blob, _) = model.blob(config(1 << 20), |_, _| Fault::None);
    runtime().block_on(async {
        for (offset, len) in [(5000u64, 1usize), (4999, 2), (u64::MAX, 1), (u64::MAX, usize::MAX), (0, 5001)] {
            assert!(blob.read_at(offset, len).await.is_err(), "{offset}+{len}");
        }
        assert!(blob.read_at(5000, 0).await.unwrap().is_empty());
    });
}
