//! What every store must do, and what is special about each.

mod http;
mod object;
pub mod oci;
mod sftp;

use std::os::unix::fs::PermissionsExt;

use bytes::Bytes;
use caifs::chunk::codec::{self, Form};
use caifs::digest::{ChunkId, Digest};
use caifs::store::local::LocalStore;
use caifs::store::{BlockingStore, Put, Store, Stored, WriteStore};

use crate::support::peers::peer;
use crate::support::run::run;

/// A chunk in a form, with its id.
pub fn chunk(form: Form, plain: &[u8]) -> (ChunkId, Stored) {
    let bytes = match form {
        Form::Compressed => codec::encode(plain, codec::DEFAULT_LEVEL),
        Form::Plain => plain.to_vec(),
    };
    (Digest::default().id(plain), Stored { form, bytes: bytes.into() })
}

/// The contract of every store that can be written to; the store must be empty of these chunks.
pub async fn store_contract(store: &dyn WriteStore) {
    let form = store.form();
    let other = match form {
        Form::Compressed => Form::Plain,
        Form::Plain => Form::Compressed,
    };
    assert!(!store.name().is_empty());
    let (missing, _) = chunk(form, b"never put");
    assert_eq!(store.fetch(missing).await, Ok(None));
    assert_eq!(store.has(missing).await, Ok(false));

    // One byte, a usual size, and one above any buffer; the same chunk again is nothing new.
    let noise: Vec<u8> = (0..300_000u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    for plain in [&b"x"[..], &noise[..65_536], &noise[..]] {
        let (id, stored) = chunk(form, plain);
        assert_eq!(store.put(id, stored.clone()).await, Ok(Put::Written));
        assert_eq!(store.has(id).await, Ok(true));
        assert_eq!(store.fetch(id).await, Ok(Some(stored.clone())));
        // A store over a network may write it again instead of asking for it first.
        assert!(store.put(id, stored.clone()).await.is_ok());
        assert_eq!(store.fetch(id).await, Ok(Some(stored)));
        if let Some(blocking) = store.blocking() {
            assert_eq!(blocking.fetch_now(id, u64::MAX), store.fetch(id).await);
            assert_eq!(blocking.fetch_now(missing, u64::MAX), Ok(None));
        }
    }

    // What it does not keep it refuses, and then has nothing of it.
    let (id, stored) = chunk(other, b"in the wrong form");
    assert!(store.put(id, stored).await.is_err());
    let (_, stored) = chunk(form, b"in the wrong form");
    assert!(store.put(id, Stored { bytes: Bytes::new(), ..stored }).await.is_err());
    assert_eq!(store.has(id).await, Ok(false));

    // Many at once, each of them twice.
    let chunks: Vec<_> = (0..50u8).map(|i| chunk(form, &vec![i; 1000 + usize::from(i)])).collect();
    let puts = chunks.iter().chain(&chunks).map(|(id, stored)| store.put(*id, stored.clone()));
    let done = futures_util::future::join_all(puts).await;
    assert!(done.iter().all(Result::is_ok), "{done:?}");
    let fetches = chunks.iter().map(|(id, _)| store.fetch(*id));
    for (fetched, (_, stored)) in futures_util::future::join_all(fetches).await.into_iter().zip(&chunks) {
        assert_eq!(fetched, Ok(Some(stored.clone())));
    }
}

#[tokio::test]
async fn a_local_store_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    store_contract(&LocalStore::open(dir.path()).unwrap()).await;
    let plain = tempfile::tempdir().unwrap();
    store_contract(&LocalStore::open(plain.path()).unwrap().with_form(Form::Plain)).await;
    store_contract(&LocalStore::create(dir.path().join("made later"))).await;
    assert!(
        LocalStore::create("/proc/no such place")
            .put(chunk(Form::Compressed, b"x").0, chunk(Form::Compressed, b"x").1)
            .await
            .is_err()
    );
}

#[test]
fn a_local_store_must_be_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let text = |path: &std::path::Path| LocalStore::open(path).unwrap_err().to_string();
    assert!(text(&file).ends_with("file: not a directory"), "{}", text(&file));
    let none = dir.path().join("none");
    assert!(text(&none).ends_with("none: No such file or directory"), "{}", text(&none));
}

#[tokio::test]
async fn a_local_store_reads_both_forms_and_prefers_the_compressed() {
    let dir = tempfile::tempdir().unwrap();
    let store = LocalStore::open(dir.path()).unwrap();
    let (id, plain) = chunk(Form::Plain, b"both");
    store.clone().with_form(Form::Plain).put(id, plain.clone()).await.unwrap();
    assert_eq!(store.fetch(id).await, Ok(Some(plain)));
    // A chunk there in one form is not written in the other.
    let (_, compressed) = chunk(Form::Compressed, b"both");
    assert_eq!(store.put(id, compressed.clone()).await, Ok(Put::Present));
    let hex = id.to_hex();
    std::fs::write(dir.path().join(&hex[..4]).join(format!("{hex}.cacnk")), &compressed.bytes).unwrap();
    assert_eq!(store.fetch(id).await, Ok(Some(compressed)));
}

#[tokio::test]
async fn files_of_a_local_store_are_where_and_as_casync_has_them() {
    let dir = tempfile::tempdir().unwrap();
    let store = LocalStore::create(dir.path().join("default.castr"));
    let (id, stored) = chunk(Form::Compressed, b"x");
    assert_eq!(id.to_hex()[..4], *"6a1d");
    store.put(id, stored.clone()).await.unwrap();
    let directory = dir.path().join("default.castr/6a1d");
    let names: Vec<_> = std::fs::read_dir(&directory).unwrap().map(|file| file.unwrap().file_name()).collect();
    assert_eq!(names, [format!("{id}.cacnk").as_str()], "no temporary file is left");
    let mode = std::fs::metadata(directory.join(&names[0])).unwrap().permissions().mode();
    assert_eq!(mode & 0o7333, 0, "readable only: {mode:o}");
    assert_eq!(mode & 0o400, 0o400);
}

#[tokio::test]
async fn bad_chunk_files_are_errors_that_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let store = LocalStore::open(dir.path()).unwrap();
    let (id, stored) = chunk(Form::Compressed, b"x");
    let hex = id.to_hex();
    let directory = dir.path().join(&hex[..4]);
    let path = directory.join(format!("{hex}.cacnk"));
    std::fs::create_dir(&directory).unwrap();

    let reason = |what: &str| {
        let error = store.fetch_now(id, u64::MAX).unwrap_err();
        assert_eq!(error.object, path.display().to_string());
        assert!(error.reason.contains(what), "{error}");
    };
    std::fs::write(&path, "").unwrap();
    reason("empty");
    // An empty file is what a crash leaves: it is not there for a writer, who replaces it.
    assert_eq!(store.has(id).await, Ok(false));
    assert_eq!(store.put(id, stored.clone()).await, Ok(Put::Written));
    assert_eq!(store.fetch(id).await, Ok(Some(stored)));

    std::fs::remove_file(&path).unwrap();
    std::fs::File::create(&path).unwrap().set_len((128 << 20) + 1).unwrap();
    reason("134217729 bytes");
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    reason("not a regular file");
    std::fs::remove_dir(&path).unwrap();
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    reason("not a regular file");
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink(path.file_name().unwrap(), &path).unwrap();
    reason("symbolic links");
}

#[tokio::test]
async fn desync_reads_and_prunes_what_a_local_store_wrote() {
    let Some(mut desync) = peer("desync").map(|peer| peer.command()) else { return };
    let dir = tempfile::tempdir().unwrap();
    let store = LocalStore::open(dir.path()).unwrap();
    for plain in [&b"x"[..], &[7; 100_000]] {
        let (id, stored) = chunk(Form::Compressed, plain);
        store.put(id, stored).await.unwrap();
    }
    let checked = run(desync.args(["verify", "-s"]).arg(dir.path())).ok();
    assert_eq!(checked.stderr, "");
}
