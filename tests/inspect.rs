//! What is told of indexes and content, against what desync tells of the same.

use std::collections::HashSet;
use std::path::Path;

use caifs::chunk::chunker::CutRule;
use caifs::digest::ChunkId;
use caifs::format::index::Index;
use caifs::pack::MakeOptions;
use caifs::pack::inspect::{ChunkInfo, InfoSources, chunk, info, list_chunks, verify_index};
use caifs::pack::make::make;
use caifs::store::local::LocalStore;

use crate::chunks::sample_blob;
use crate::support::peers::peer;
use crate::support::run::run;

/// Two blobs that share most of their content, with their indexes and a store of the first.
struct Setting {
    dir: tempfile::TempDir,
    blob: Vec<u8>,
}

impl Setting {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let blob = sample_blob(4_000_000);
        std::fs::write(dir.path().join("first"), &blob).unwrap();
        let second = [&blob[1_000_000..], &[5; 700_000], &blob[..500_000]].concat();
        std::fs::write(dir.path().join("second"), second).unwrap();
        let setting = Self { dir, blob };
        let store = LocalStore::create(setting.path("store"));
        let options =
            MakeOptions { store: Some(std::sync::Arc::new(store)), rule: CutRule::Desync, ..MakeOptions::default() };
        make(&setting.path("first.caibx"), &setting.path("first"), &options).unwrap();
        let options = MakeOptions { rule: CutRule::Desync, ..MakeOptions::default() };
        make(&setting.path("second.caibx"), &setting.path("second"), &options).unwrap();
        setting
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn index(&self, name: &str) -> Index<Vec<u8>> {
        Index::open(std::fs::read(self.path(name)).unwrap()).unwrap()
    }

    fn desync(&self, args: &[&str]) -> Option<String> {
        let desync = peer("desync")?;
        Some(run(desync.command().current_dir(self.dir.path()).args(args)).ok().text())
    }
}

fn ids_of(index: &Index<Vec<u8>>) -> HashSet<ChunkId> {
    index.items().map(|item| item.unwrap().id).collect()
}

#[tokio::test]
async fn info_is_what_desync_tells() {
    let setting = Setting::new();
    let store = LocalStore::open(setting.path("store")).unwrap();
    let seed_ids = ids_of(&setting.index("first.caibx"));
    let inspected = setting.desync(&["inspect-chunks", "-s", "store", "first.caibx"]);
    let infos: Vec<ChunkInfo> =
        inspected.as_deref().map(|text| serde_json::from_str(text).unwrap()).unwrap_or_default();
    if let Some(text) = &inspected {
        std::fs::write(setting.path("infos.json"), text).unwrap();
        assert_eq!(serde_json::to_string_pretty(&infos).unwrap(), text.trim_end());
    }
    let none = InfoSources { n_concurrent: 10, ..InfoSources::default() };
    let cases: [(&str, &[&str], InfoSources<'_>); 6] = [
        ("first.caibx", &[], none),
        ("second.caibx", &["-s", "store"], InfoSources { store: Some(&store), ..none }),
        ("second.caibx", &["-c", "store"], InfoSources { cache: Some(&store), ..none }),
        ("second.caibx", &["--seed", "first.caibx"], InfoSources { seed_ids: Some(&seed_ids), ..none }),
        ("first.caibx", &["--chunks-info", "infos.json"], InfoSources { chunk_infos: &infos, ..none }),
        ("second.caibx", &["--chunks-info", "infos.json"], InfoSources { chunk_infos: &infos, ..none }),
    ];
    for (name, args, sources) in cases {
        let ours = info(name, &setting.index(name), sources).await.unwrap();
        let n_unique = ids_of(&setting.index(name)).len() as u64;
        assert_eq!((ours.unique, ours.size), (n_unique, setting.index(name).blob_size()));
        for (format, text) in [("json", ours.json()), ("plain", ours.plain())] {
            let theirs = setting.desync(&[&["info", "--format", format, name], args].concat());
            if let Some(theirs) = theirs {
                assert_eq!(text.trim_end(), theirs.trim_end(), "{args:?}");
            }
        }
    }
    let second = setting.index("second.caibx");
    let with_seed = info("x", &second, InfoSources { seed_ids: Some(&seed_ids), ..none }).await.unwrap();
    assert!(0 < with_seed.in_seed && with_seed.in_seed < with_seed.unique);

    let wrong = [ChunkInfo { id: second.item(0).unwrap().id.to_hex(), uncompressed_size: 1, compressed_size: 1 }];
    let error = info("x", &second, InfoSources { chunk_infos: &wrong, ..none }).await.unwrap_err().to_string();
    assert!(error.contains("has 1 bytes there"), "{error}");
}

#[test]
fn listings_are_those_of_desync() {
    let setting = Setting::new();
    let mut ours = Vec::new();
    list_chunks("second.caibx", &setting.index("second.caibx"), &mut ours).unwrap();
    let ours = String::from_utf8(ours).unwrap();
    assert_eq!(ours.lines().count(), setting.index("second.caibx").n_chunks());
    if let Some(theirs) = setting.desync(&["list-chunks", "second.caibx"]) {
        assert_eq!(ours, theirs);
    }
    let options = MakeOptions { rule: CutRule::Desync, ..MakeOptions::default() };
    for start in [0, 1, 100_000, 3_999_999, 4_000_000, 9_000_000] {
        let mut ours = Vec::new();
        chunk(&setting.path("first"), start, &options, &mut ours).unwrap();
        let ours = String::from_utf8(ours).unwrap();
        assert_eq!(ours.is_empty(), start >= 4_000_000);
        if let Some(theirs) = setting.desync(&["chunk", "-S", &start.to_string(), "first"]) {
            assert_eq!(ours, theirs, "from {start}");
        }
    }
}

#[test]
fn verify_index_names_the_first_difference() {
    let setting = Setting::new();
    let index = setting.index("first.caibx");
    let file = setting.path("first");
    let verify = |n_threads| verify_index("first.caibx", &index, &file, n_threads, None).map_err(|e| e.to_string());
    for n_threads in [0, 1, 3] {
        assert_eq!(verify(n_threads), Ok(()));
    }
    let n_chunks = index.n_chunks();
    for wrong in [&[n_chunks - 1][..], &[0, n_chunks - 1], &[5, 6], &[n_chunks / 2, n_chunks - 2]] {
        let mut blob = setting.blob.clone();
        for i in wrong {
            blob[index.item(*i).unwrap().end as usize - 1] ^= 1;
        }
        std::fs::write(&file, &blob).unwrap();
        let item = index.item(wrong[0]).unwrap();
        let expected =
            format!("differs from the index first.caibx at chunk {} (bytes {} to {})", wrong[0], item.start, item.end);
        for n_threads in [1, 2, 4] {
            let error = verify(n_threads).unwrap_err();
            assert!(error.contains(&expected), "{error}, expected {expected}");
        }
    }
    std::fs::write(&file, &setting.blob[1..]).unwrap();
    let error = verify(2).unwrap_err();
    assert!(error.ends_with("first has 3999999 bytes, but the index first.caibx describes 4000000"), "{error}");
    assert!(verify_index("x", &index, Path::new("/nowhere/x"), 0, None).is_err());
}
