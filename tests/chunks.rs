//! Indexes and chunks of the real programs against ours.

use std::path::Path;

use bytes::Bytes;
use caifs::chunk::MAX_CHUNK_BYTES;
use caifs::chunk::chunker::{Chunker, CutRule};
use caifs::chunk::codec::{self, Form};
use caifs::digest::{ChunkId, Digest};
use caifs::format::index::{self, ChunkSizes, Index, IndexError, IndexHeader};

use crate::support::peers::peer;
use crate::support::run::run;

/// Content with random, repeating and constant stretches, the same on every run.
pub fn sample_blob(len: usize) -> Vec<u8> {
    let mut x: u64 = 0x9E37_79B9_7F4A_7C15;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    let mut bytes = Vec::with_capacity(len + (1 << 20));
    while bytes.len() < len {
        let stretch = 1000 + (next() % 700_000) as usize;
        match next() % 4 {
            0 => bytes.resize(bytes.len() + stretch, 0),
            1 => {
                let period = 1 + (next() % 300) as usize;
                bytes.extend((0..stretch).map(|i| (i % period) as u8));
            }
            _ => bytes.extend((0..stretch / 8).flat_map(|_| next().to_le_bytes())),
        }
    }
    bytes.truncate(len);
    bytes
}

/// The index of a blob, cut and hashed one chunk after the other.
pub fn serial_index(data: &[u8], sizes: ChunkSizes, rule: CutRule, feature_flags: u64) -> Vec<u8> {
    let header = IndexHeader { feature_flags, sizes };
    let chunker = Chunker::new(sizes, rule).unwrap();
    let (mut end, mut items) = (0, Vec::new());
    for len in chunker.cut_all(data) {
        items.push(((end + len) as u64, header.digest().id(&data[end..end + len])));
        end += len;
    }
    index::encode(&header, items.iter().map(|(end, id)| (*end, id)))
}

const CASYNC_FLAGS: u64 = 0xb000_0000_0000_0000;
const DESYNC_FLAGS: u64 = 0xa000_0000_0000_0000;

fn lengths() -> Vec<usize> {
    vec![0, 1, 47, 48, 49, 16383, 16384, 16385, 262_143, 262_144, 262_145, 9_000_000]
}

#[test]
fn indexes_made_by_casync_are_ours_byte_for_byte() {
    if peer("casync").is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let sizes = [
        "16384:65536:262144",
        "1024:4096:16384",
        "1:1:1000",
        "65536:65536:262144",
        "100:100:100",
        "1000:1001:1002",
        "32K:128K:1M",
        "64K",
        "1.5M",
        "10M",
    ];
    for len in lengths() {
        let data = sample_blob(len);
        std::fs::write(dir.path().join("blob"), &data).unwrap();
        for digest in [Digest::Sha512_256, Digest::Sha256] {
            let many_sizes = if len > 1_000_000 && digest == Digest::Sha512_256 { &sizes[..] } else { &sizes[..1] };
            for text in many_sizes {
                let theirs = casync_index(dir.path(), &["--chunk-size", text, "--digest", digest.name()]);
                let flags = match digest {
                    Digest::Sha512_256 => CASYNC_FLAGS,
                    Digest::Sha256 => CASYNC_FLAGS & !index::FLAG_SHA512_256,
                };
                let sizes = caifs::chunk::sizes::parse_casync(text).unwrap();
                let ours = serial_index(&data, sizes, CutRule::Casync, flags);
                assert!(ours == theirs, "{len} bytes, sizes {text}, {digest}");
                Index::open(&theirs).unwrap().check().unwrap();
            }
        }
    }
}

fn casync_index(dir: &Path, options: &[&str]) -> Vec<u8> {
    let out = dir.join("theirs.caibx");
    let mut casync = peer("casync").unwrap().command();
    run(casync.arg("make").args(options).arg("--store").arg(dir.join("store.castr")).arg(&out).arg(dir.join("blob")))
        .ok();
    std::fs::read(&out).unwrap()
}

#[test]
fn indexes_made_by_desync_are_ours_byte_for_byte() {
    if peer("desync").is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for len in lengths() {
        let data = sample_blob(len);
        std::fs::write(dir.path().join("blob"), &data).unwrap();
        let many_sizes = ["16:64:256", "1:4:16", "64:64:256", "8:8:8", "2:9:11", "64:256:1024"];
        let many_sizes = if len > 1_000_000 { &many_sizes[..] } else { &many_sizes[..1] };
        for text in many_sizes {
            let out = dir.path().join("theirs.caibx");
            run(peer("desync").unwrap().command().args(["make", "-m", text]).arg(&out).arg(dir.path().join("blob")))
                .ok();
            let sizes = caifs::chunk::sizes::parse_kib(text).unwrap();
            let ours = serial_index(&data, sizes, CutRule::Desync, DESYNC_FLAGS);
            assert!(ours == std::fs::read(&out).unwrap(), "{len} bytes, sizes {text}");
        }
    }
}

#[test]
fn chunks_in_every_compression_of_casync_decode() {
    if peer("casync").is_none() {
        return;
    }
    let data = sample_blob(3_000_000);
    for compression in ["zstd", "xz", "gzip"] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("blob"), &data).unwrap();
        let bytes = casync_index(dir.path(), &["--compression", compression]);
        check_store(&data, &bytes, &dir.path().join("store.castr"), compression);
    }
}

#[test]
fn chunks_of_desync_decode() {
    let Some(mut desync) = peer("desync").map(|peer| peer.command()) else { return };
    let data = sample_blob(3_000_000);
    let dir = tempfile::tempdir().unwrap();
    let (blob, out, store) = (dir.path().join("blob"), dir.path().join("i.caibx"), dir.path().join("store"));
    std::fs::write(&blob, &data).unwrap();
    std::fs::create_dir(&store).unwrap();
    run(desync.args(["make", "-s"]).arg(&store).arg(&out).arg(&blob)).ok();
    check_store(&data, &std::fs::read(&out).unwrap(), &store, "desync");
}

/// Every chunk of the index is in the store, decodes and is the blob's content, and there are no others.
pub fn check_store(data: &[u8], index: &[u8], store: &Path, what: &str) {
    let index = Index::open(index).unwrap();
    let files: std::collections::HashMap<_, _> = chunk_files(store).into_iter().collect();
    let mut used = std::collections::HashSet::new();
    for item in index.items() {
        let item = item.unwrap();
        let stored = Bytes::from(files[&format!("{}.cacnk", item.id)].clone());
        let expected = &data[item.start as usize..item.end as usize];
        assert!(codec::decode(Form::Compressed, &stored, item.size_bytes()).unwrap() == expected, "{what}");
        let limit = index.header().sizes.max;
        assert!(codec::decode_unknown_size(Form::Compressed, &stored, limit).unwrap() == expected, "{what}");
        used.insert(item.id);
    }
    assert_eq!(used.len(), files.len(), "{what}");
}

#[test]
fn every_truncation_and_bit_flip_of_an_index_is_an_error_or_a_sound_answer() {
    let sizes = ChunkSizes { min: 64, avg: 100, max: 300 };
    let bytes = serial_index(&sample_blob(1500), sizes, CutRule::Casync, CASYNC_FLAGS);
    assert!(bytes.len() < 2000);
    for len in 0..bytes.len() {
        let error = Index::open(&bytes[..len]).map(drop);
        assert!(error.is_err(), "{len} bytes");
    }
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let Ok(index) = Index::open(&flipped) else { continue };
        let blob_size = index.blob_size();
        for offset in (0..1600).step_by(13).chain([blob_size.wrapping_sub(1), blob_size, u64::MAX]) {
            match index.locate(offset) {
                Ok(Some(i)) => {
                    let item = index.item(i).unwrap();
                    assert!(item.start <= offset && offset < item.end && item.size_bytes() <= MAX_CHUNK_BYTES);
                }
                Ok(None) => assert!(offset >= blob_size),
                Err(IndexError::BadItem { .. }) => {}
                Err(other) => panic!("bit {bit}: {other}"),
            }
        }
        let sound = index.check().is_ok();
        assert_eq!(sound, index.items().all(|item| item.is_ok()));
    }
}

#[test]
fn golden_ids() {
    let id: ChunkId = "6a1db6c1dd481f7aab2adb9c262b210edcca35624ec64c29ffca6857b1e30253".parse().unwrap();
    let one = serial_index(b"x", ChunkSizes::default(), CutRule::Casync, CASYNC_FLAGS);
    assert_eq!(one.len(), 144);
    let index = Index::open(one).unwrap();
    assert_eq!((index.blob_size(), index.item(0).unwrap().id), (1, id));
    assert_eq!(serial_index(b"", ChunkSizes::default(), CutRule::Casync, CASYNC_FLAGS).len(), 104);
}

/// All chunk files of a store directory: name and content.
pub fn chunk_files(store: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    for directory in std::fs::read_dir(store).unwrap() {
        for file in std::fs::read_dir(directory.unwrap().path()).unwrap() {
            let file = file.unwrap();
            let name = file.file_name().into_string().unwrap();
            files.push((name, std::fs::read(file.path()).unwrap()));
        }
    }
    files.sort();
    files
}
