//! Making indexes and stores: the same bytes as the real programs and as one pass, whatever the number of threads.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use caifs::chunk::chunker::CutRule;
use caifs::chunk::codec::Form;
use caifs::digest::{ChunkId, Digest};
use caifs::format::index::{ChunkSizes, Index};
use caifs::pack::make::{make, make_index};
use caifs::pack::sink::Sink;
use caifs::pack::{MakeOptions, MakeStats};
use caifs::store::local::LocalStore;
use caifs::store::{Put, Store, StoreError, Stored, WriteStore};
use futures_util::future::BoxFuture;

use crate::chunks::{chunk_files, sample_blob, serial_index};
use crate::support::peers::peer;
use crate::support::run::run;

/// A blob of several segments: mixed content, long zeros that begin and end anywhere, and mixed content again.
fn large_blob() -> Vec<u8> {
    let mut bytes = sample_blob(13_000_001);
    bytes.resize(bytes.len() + 21_000_003, 0);
    bytes.extend(sample_blob(11_000_000));
    bytes
}

fn distinct_ids(index: &[u8]) -> BTreeSet<ChunkId> {
    Index::open(index).unwrap().items().map(|item| item.unwrap().id).collect()
}

/// The store has exactly the index's chunks, and they make up the blob.
fn check_store(store: &Path, index: &[u8], blob: &[u8]) {
    let ids: Vec<String> = distinct_ids(index).iter().map(|id| format!("{id}.cacnk")).collect();
    let files: Vec<String> = chunk_files(store).into_iter().map(|(name, _)| name).collect();
    assert_eq!(files, ids);
    crate::chunks::check_store(blob, index, store, "made by us");
}

#[test]
fn any_number_of_threads_gives_the_index_of_one_pass() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("blob");
    let blob = large_blob();
    std::fs::write(&file, &blob).unwrap();
    let default = ChunkSizes::default();
    let cases = [
        (default, CutRule::Casync, Digest::Sha512_256, 0xb000_0000_0000_0000),
        (default, CutRule::Desync, Digest::Sha256, 0x8000_0000_0000_0000),
        (ChunkSizes { min: 1 << 20, avg: 4 << 20, max: 12 << 20 }, CutRule::Casync, Digest::Sha256, 0x9 << 60),
        (ChunkSizes { min: 100_000, avg: 100_000, max: 100_000 }, CutRule::Casync, Digest::Sha256, 0x9 << 60),
    ];
    for (sizes, rule, digest, flags) in cases {
        let expected = serial_index(&blob, sizes, rule, flags);
        for n_threads in [1, 2, 5] {
            let options = MakeOptions { sizes, rule, digest, n_threads, ..MakeOptions::default() };
            let (index, stats) = make_index(&file, &options).unwrap();
            assert!(index == expected, "{sizes:?} {rule:?} {n_threads} threads");
            let n_chunks = Index::open(&index).unwrap().n_chunks() as u64;
            assert_eq!((stats.n_chunks_accepted, stats.blob_bytes), (n_chunks, blob.len() as u64));
            assert!(stats.n_chunks_produced >= n_chunks);
            assert_eq!((stats.n_chunks_written, stats.stored_bytes), (0, 0));

            let mut sink = Sink::new(&options).unwrap();
            let mut rest = &blob[..];
            for step in [1, 47, 16384, 5_000_000, 1, 262_144, 300_000].into_iter().cycle() {
                let (now, later) = rest.split_at(rest.len().min(step));
                sink.write_all(now).unwrap();
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            let (streamed, stats) = sink.finish().unwrap();
            assert!(streamed == expected, "{sizes:?} {rule:?} {n_threads} threads, streamed");
            assert_eq!((stats.n_chunks_accepted, stats.blob_bytes), (n_chunks, blob.len() as u64));
        }
    }
}

#[test]
fn holes_are_the_zeros_they_stand_for() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("sparse");
    let mut sparse = std::fs::File::create(&file).unwrap();
    let blob = large_blob();
    let zeros = 13_000_001 + 100..13_000_001 + 20_990_000;
    sparse.write_all(&blob[..zeros.start]).unwrap();
    std::io::Seek::seek(&mut sparse, std::io::SeekFrom::Start(zeros.end as u64)).unwrap();
    sparse.write_all(&blob[zeros.end..]).unwrap();
    sparse.set_len(90_000_000).unwrap();
    let mut expected = blob;
    expected.resize(90_000_000, 0);
    let (index, _) = make_index(&file, &MakeOptions::default()).unwrap();
    assert!(index == serial_index(&expected, ChunkSizes::default(), CutRule::Casync, 0xb << 60));

    // Nothing but a hole, and one byte more than whole segments.
    for len in [8 << 20, 24 << 20, (24 << 20) + 1] {
        std::fs::File::create(&file).unwrap().set_len(len).unwrap();
        let (index, _) = make_index(&file, &MakeOptions::default()).unwrap();
        let expected = serial_index(&vec![0; len as usize], ChunkSizes::default(), CutRule::Casync, 0xb << 60);
        assert!(index == expected, "{len}");
    }
}

#[test]
fn the_store_gets_the_chunks_of_the_index_and_no_others() {
    let dir = tempfile::tempdir().unwrap();
    let (file, index_path) = (dir.path().join("blob"), dir.path().join("blob.caibx"));
    let blob = large_blob();
    std::fs::write(&file, &blob).unwrap();
    for (n_threads, name) in [(1, "one.castr"), (4, "four.castr")] {
        let store = LocalStore::create(dir.path().join(name));
        let done = Arc::new(AtomicU64::new(0));
        let seen = Arc::clone(&done);
        let options = MakeOptions {
            store: Some(Arc::new(store.clone())),
            n_threads,
            progress: Some(Arc::new(move |bytes| {
                seen.fetch_max(bytes, Ordering::Relaxed);
            })),
            ..MakeOptions::default()
        };
        let first = make(&index_path, &file, &options).unwrap();
        let index = std::fs::read(&index_path).unwrap();
        assert_eq!(done.load(Ordering::Relaxed), blob.len() as u64);
        assert_eq!(first.n_chunks_written, distinct_ids(&index).len() as u64);
        let stored: usize = chunk_files(store.path()).iter().map(|(_, bytes)| bytes.len()).sum();
        assert_eq!(first.stored_bytes, stored as u64);
        check_store(store.path(), &index, &blob);

        let again = make(&index_path, &file, &options).unwrap();
        assert_eq!((again.n_chunks_written, again.stored_bytes), (0, 0));
        assert_eq!(std::fs::read(&index_path).unwrap(), index);

        let streamed = LocalStore::create(dir.path().join(format!("{name}.streamed")));
        let mut sink = Sink::new(&MakeOptions { store: Some(Arc::new(streamed.clone())), ..options }).unwrap();
        sink.read_from(&mut &blob[..], &file).unwrap();
        let stats = sink.finish_to(&index_path).unwrap();
        assert_eq!(stats.n_chunks_written, first.n_chunks_written);
        assert_eq!(std::fs::read(&index_path).unwrap(), index);
        check_store(streamed.path(), &index, &blob);
    }
}

#[test]
fn casync_makes_the_same_index() {
    let Some(casync) = peer("casync") else { return };
    let dir = tempfile::tempdir().unwrap();
    let (file, theirs, ours) =
        (dir.path().join("blob"), dir.path().join("theirs.caibx"), dir.path().join("ours.caibx"));
    std::fs::write(&file, large_blob()).unwrap();
    run(casync.command().arg("make").arg("--store").arg(dir.path().join("theirs.castr")).arg(&theirs).arg(&file)).ok();
    let store = LocalStore::create(dir.path().join("ours.castr"));
    let options = MakeOptions { store: Some(Arc::new(store)), ..MakeOptions::default() };
    make(&ours, &file, &options).unwrap();
    assert!(std::fs::read(&ours).unwrap() == std::fs::read(&theirs).unwrap());
    let mode = |path: &Path| std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(path).unwrap().permissions());
    assert_eq!(mode(&ours), mode(&theirs));
    // casync restores the blob from what we made.
    let out = dir.path().join("out");
    run(peer("casync")
        .unwrap()
        .command()
        .arg("extract")
        .arg("--store")
        .arg(dir.path().join("ours.castr"))
        .arg(&ours)
        .arg(&out))
    .ok();
    assert!(std::fs::read(&out).unwrap() == large_blob());
}

#[test]
fn desync_makes_the_same_index_and_restores_from_our_store() {
    let Some(desync) = peer("desync") else { return };
    let dir = tempfile::tempdir().unwrap();
    let (file, theirs, ours) =
        (dir.path().join("blob"), dir.path().join("theirs.caibx"), dir.path().join("ours.caibx"));
    std::fs::write(&file, large_blob()).unwrap();
    run(desync.command().arg("make").arg(&theirs).arg(&file)).ok();
    let store = LocalStore::create(dir.path().join("ours.castr"));
    let options = MakeOptions { store: Some(Arc::new(store)), rule: CutRule::Desync, ..MakeOptions::default() };
    let stats = make(&ours, &file, &options).unwrap();
    assert!(std::fs::read(&ours).unwrap() == std::fs::read(&theirs).unwrap());
    let n_chunks = Index::open(std::fs::read(&ours).unwrap()).unwrap().n_chunks();
    assert!(stats.desync_json().contains(&format!("\"ChunksAccepted\": {n_chunks},")));
    let out = dir.path().join("out");
    run(peer("desync")
        .unwrap()
        .command()
        .args(["extract", "-s"])
        .arg(dir.path().join("ours.castr"))
        .arg(&ours)
        .arg(&out))
    .ok();
    assert!(std::fs::read(&out).unwrap() == large_blob());
}

#[test]
fn the_index_of_an_archive_made_as_a_blob_has_its_flags_as_with_desync() {
    let (Some(casync), Some(desync)) = (peer("casync"), peer("desync")) else { return };
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("file"), sample_blob(500_000)).unwrap();
    let (archive, theirs) = (dir.path().join("tree.catar"), dir.path().join("theirs.caibx"));
    run(casync.command().arg("make").arg(&archive).arg(&tree)).ok();
    run(desync.command().arg("make").arg(&theirs).arg(&archive)).ok();
    let options = MakeOptions { rule: CutRule::Desync, ..MakeOptions::default() };
    let (ours, _) = make_index(&archive, &options).unwrap();
    assert!(ours == std::fs::read(&theirs).unwrap());
    assert!(Index::open(ours).unwrap().header().suggests_archive());
}

#[test]
fn a_small_or_empty_file_has_an_index_too() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("blob");
    for len in [0, 1, 48, 16384, 16385, 262_145] {
        let blob = sample_blob(len);
        std::fs::write(&file, &blob).unwrap();
        let expected = serial_index(&blob, ChunkSizes::default(), CutRule::Casync, 0xb << 60);
        assert!(make_index(&file, &MakeOptions::default()).unwrap().0 == expected);
        let mut sink = Sink::new(&MakeOptions::default()).unwrap();
        sink.write_all(&blob).unwrap();
        assert!(sink.finish().unwrap().0 == expected);
    }
}

/// Runs make on a file that something is done to as soon as the first chunks are done.
fn make_while(blob: &[u8], what: impl Fn(&Path) + Send + Sync + 'static) -> Result<MakeStats, String> {
    let dir = tempfile::tempdir().unwrap();
    let (file, index_path) = (dir.path().join("blob"), dir.path().join("blob.caibx"));
    std::fs::write(&file, blob).unwrap();
    std::fs::write(&index_path, "the index of before").unwrap();
    // Files touched within one tick of the clock look unchanged.
    std::thread::sleep(std::time::Duration::from_millis(20));
    let once = std::sync::Once::new();
    let touched = file.clone();
    let progress: caifs::pack::Progress = Arc::new(move |_| once.call_once(|| what(&touched)));
    let options = MakeOptions { n_threads: 2, progress: Some(progress), ..MakeOptions::default() };
    let made = make(&index_path, &file, &options).map_err(|error| error.to_string());
    if made.is_err() {
        assert_eq!(std::fs::read(&index_path).unwrap(), b"the index of before");
    }
    let names = std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(names, 2, "no temporary file is left");
    made
}

#[test]
fn a_file_that_changes_while_it_is_read_is_an_error_and_leaves_the_old_index() {
    let blob = sample_blob(100_000_000);
    make_while(&blob, |_| {}).unwrap();
    let truncated = make_while(&blob, |file| {
        std::fs::OpenOptions::new().write(true).open(file).unwrap().set_len(1000).unwrap();
    });
    let message = truncated.unwrap_err();
    assert!(message.contains("blob: the file was truncated while it was read (it had 100000000 bytes)"), "{message}");
    let changed = make_while(&blob, |file| {
        std::fs::OpenOptions::new().append(true).open(file).unwrap().write_all(b"more").unwrap();
    });
    assert!(changed.unwrap_err().contains("blob: the file changed while it was read"));
}

#[test]
fn what_cannot_be_read_or_written_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let text = |file: &Path| make_index(file, &MakeOptions::default()).unwrap_err().to_string();
    assert!(text(&dir.path().join("none")).ends_with("none: No such file or directory"));
    assert!(text(dir.path()).ends_with(": neither a regular file nor a block device"));
    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(text(&pipe).ends_with("pipe: neither a regular file nor a block device"));
    let file = dir.path().join("blob");
    std::fs::write(&file, "x").unwrap();
    let options = MakeOptions { sizes: ChunkSizes { min: 9, avg: 5, max: 7 }, ..MakeOptions::default() };
    let message = make_index(&file, &options).unwrap_err().to_string();
    assert!(message.contains("chunk sizes 9:5:7 bytes"), "{message}");
}

/// A store that fails with its tenth chunk.
#[derive(Debug)]
struct FailsLater {
    n_puts: AtomicU64,
}

impl FailsLater {
    fn store() -> Arc<dyn WriteStore> {
        Arc::new(Self { n_puts: AtomicU64::new(0) })
    }
}

impl Store for FailsLater {
    fn name(&self) -> &str {
        "a full store"
    }

    fn fetch(&self, _: ChunkId) -> BoxFuture<'_, Result<Option<Stored>, StoreError>> {
        Box::pin(async { Ok(None) })
    }

    fn has(&self, _: ChunkId) -> BoxFuture<'_, Result<bool, StoreError>> {
        Box::pin(async { Ok(false) })
    }
}

impl WriteStore for FailsLater {
    fn form(&self) -> Form {
        Form::Plain
    }

    fn put(&self, id: ChunkId, stored: Stored) -> BoxFuture<'_, Result<Put, StoreError>> {
        Box::pin(async move {
            // A store behind a network is not done at once.
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            assert_eq!((stored.form, Digest::default().id(&stored.bytes)), (Form::Plain, id));
            match self.n_puts.fetch_add(1, Ordering::Relaxed) {
                0..10 => Ok(Put::Written),
                _ => Err(StoreError::new(self.name(), id.to_hex(), "no space")),
            }
        })
    }
}

#[test]
fn a_store_that_fails_ends_the_work_with_its_error_and_without_an_index() {
    let dir = tempfile::tempdir().unwrap();
    let (file, index_path) = (dir.path().join("blob"), dir.path().join("blob.caibx"));
    std::fs::write(&file, large_blob()).unwrap();
    for n_threads in [1, 3] {
        let options = MakeOptions { store: Some(FailsLater::store()), n_threads, ..MakeOptions::default() };
        let message = make(&index_path, &file, &options).unwrap_err().to_string();
        assert!(message.starts_with("chunk store a full store: ") && message.ends_with(": no space"), "{message}");

        let mut sink = Sink::new(&MakeOptions { store: Some(FailsLater::store()), ..options.clone() }).unwrap();
        let blob = large_blob();
        let written = blob.chunks(1_000_000).try_for_each(|part| sink.write_all(part));
        let message = written.unwrap_err().to_string();
        assert!(message.ends_with(": no space"), "{message}");
        assert!(sink.finish_to(&index_path).unwrap_err().to_string().ends_with(": no space"));

        // Dropped half-way, a sink ends without an index and without waiting for ever.
        let mut sink = Sink::new(&options).unwrap();
        let _ = sink.write_all(&blob);
        drop(sink);
        assert!(!index_path.exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn make_runs_on_a_blocking_thread_of_the_callers_runtime() {
    let dir = tempfile::tempdir().unwrap();
    let (file, store) = (dir.path().join("blob"), LocalStore::create(dir.path().join("store.castr")));
    let blob = sample_blob(3_000_000);
    std::fs::write(&file, &blob).unwrap();
    let options = MakeOptions { store: Some(Arc::new(store.clone())), ..MakeOptions::default() };
    let made = tokio::task::spawn_blocking(move || make_index(&file, &options)).await.unwrap();
    check_store(store.path(), &made.unwrap().0, &blob);
}
