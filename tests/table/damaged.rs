//! Tables with changed or missing bytes, in the cache and beside an archive: each is noticed, and the archive answers.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::{FileExt, symlink};
use std::sync::Arc;
use std::time::Duration;

use caifs::config::SourceConfig;
use caifs::format::table::{BLOCK_BYTES, TAIL_BYTES};
use caifs::pack::tar::{TarOptions, tar_with_table};
use caifs::report::Report;
use caifs::store::location::FileLocation;
use caifs::tree::table::Table;
use caifs::tree::table::check::check;
use caifs::tree::table::pack::TablePacker;
use caifs::tree::table::writer::Writer;
use caifs::volume::open::{MemoryPlan, open_blob, open_tree};
use caifs::volume::tree::TreeVolume;
use caifs::volume::{Attr, FileKind, Show, Volume};
use proptest::prelude::*;
use tokio::runtime::Runtime;

use super::{Open, generated, make_table, table_in, tables_in, wait_until, with_cache};
use crate::support::generated::Generated;
use crate::support::run::{caifs, run};
use crate::support::scratch::Scratch;
use crate::volume::{by_lookup, walk, without_links};

#[test]
fn a_damaged_table_in_the_cache_is_taken_away_and_the_archive_answers() {
    let scratch = Scratch::new();
    let runtime = Runtime::new().unwrap();
    let spec = generated(&scratch, Generated { n_entries: 4_000, n_huge: 1_500, ..Generated::default() });
    let cache = scratch.join("cache");
    let wanted = walk(&runtime, Open::without_table(&runtime, &spec).volume(), 1000).unwrap();
    make_table(&runtime, &spec, &cache);
    let right = fs::read(table_in(&cache)).unwrap();
    let n_blocks = Table::open(File::open(table_in(&cache)).unwrap(), 0).unwrap().n_blocks();
    assert!(n_blocks > 8, "{n_blocks} blocks of {BLOCK_BYTES}");
    // In the middle of some blocks; in the references; in the tail; at the start; cut; empty.
    let refs_at = right.len() - TAIL_BYTES - 16 * n_blocks as usize;
    type Damage = Box<dyn Fn(&mut Vec<u8>)>;
    let mut damages: Vec<(String, Damage)> = Vec::new();
    for at in
        [0, 9, refs_at / 3, refs_at / 2, refs_at - 1, refs_at + 3, refs_at + 17, right.len() - 100, right.len() - 1]
    {
        damages.push((format!("byte {at}"), Box::new(move |bytes| bytes[at] ^= 0x40)));
    }
    for len in [0, 1, TAIL_BYTES, refs_at, right.len() - 1] {
        damages.push((format!("cut to {len}"), Box::new(move |bytes| bytes.truncate(len))));
    }
    damages.push(("zeros".to_owned(), Box::new(move |bytes| bytes[100..refs_at].fill(0))));
    for (what, damage) in damages {
        let path = match tables_in(&cache).pop() {
            Some(path) => path,
            None => {
                make_table(&runtime, &spec, &cache);
                table_in(&cache)
            }
        };
        let mut wrong = right.clone();
        damage(&mut wrong);
        fs::write(&path, &wrong).unwrap();
        // No other is made meanwhile: the mount is too short for that.
        let open = Open::new(&runtime, &spec, with_cache(&cache), |_| ());
        let seen = walk(&runtime, open.volume(), 1000).unwrap();
        let stripped = |all: &BTreeMap<Vec<u8>, Attr>| -> BTreeMap<Vec<u8>, Attr> {
            all.iter().map(|(path, attr)| (path.clone(), without_links(attr.clone()))).collect()
        };
        assert!(stripped(&seen) == stripped(&wanted), "{what}");
        drop(open);
        wait_until(|| tables_in(&cache).iter().all(|path| fs::read(path).is_ok_and(|bytes| bytes != wrong)), &what);
    }
}

#[test]
fn a_table_that_is_damaged_while_it_is_used_is_left() {
    let scratch = Scratch::new();
    let runtime = Runtime::new().unwrap();
    let spec = generated(&scratch, Generated { n_entries: 9_000, n_huge: 6_000, ..Generated::default() });
    let cache = scratch.join("cache");
    make_table(&runtime, &spec, &cache);
    for is_cut in [false, true] {
        if tables_in(&cache).is_empty() {
            make_table(&runtime, &spec, &cache);
        }
        // So little is kept in memory that blocks are read again.
        let open = Open::new(&runtime, &spec, with_cache(&cache), |config| config.memory_bytes = 1 << 20);
        assert!(open.is_in_use());
        let wanted = by_lookup(&runtime, open.volume(), b"huge/entry-0000000").unwrap();
        let file = File::options().write(true).open(table_in(&cache)).unwrap();
        match is_cut {
            true => file.set_len(1000).unwrap(),
            false => file.write_all_at(&vec![0x55; file.metadata().unwrap().len() as usize - 200], 50).unwrap(),
        }
        let found = walk(&runtime, open.volume(), 500).unwrap();
        assert_eq!(
            found.len(),
            Generated { n_entries: 9_000, n_huge: 6_000, ..Generated::default() }.write(&mut std::io::sink()) as usize
        );
        assert_eq!(without_links(found[&b"huge/entry-0000000"[..]].clone()), without_links(wanted));
        assert!(!open.is_in_use());
        wait_until(|| tables_in(&cache).is_empty(), "it is taken away");
    }
}

/// A small archive with its right answers, and its table.
struct Small {
    archive: tempfile::NamedTempFile,
    table: Vec<u8>,
    names: Vec<Vec<u8>>,
}

impl Small {
    fn new(scratch: &Scratch) -> Self {
        let source = scratch.dir("source");
        for dir in ["one", "two/three"] {
            fs::create_dir_all(source.join(dir)).unwrap();
            fs::write(source.join(dir).join("file"), dir).unwrap();
            symlink(dir, source.join(dir).join("link")).unwrap();
            xattr::set(source.join(dir), "user.x", b"value").unwrap();
        }
        let archive = tempfile::NamedTempFile::new_in(&**scratch).unwrap();
        let path = scratch.join("small.catar");
        run(caifs().args(["tar", "--metadata-table"]).arg(&path).arg(&source)).ok();
        fs::copy(&path, archive.path()).unwrap();
        let names = ["", "one", "one/file", "two/three/link", "two/four", "two/three/file"];
        let names = names.map(|name| name.as_bytes().to_vec()).to_vec();
        Self { archive, table: fs::read(scratch.join("small.catar.table")).unwrap(), names }
    }

    /// Answers with some bytes as the table; they must be right, whatever the bytes are.
    fn ask(&self, runtime: &Runtime, table: &[u8]) -> (Vec<Option<Attr>>, bool) {
        let plan = MemoryPlan::new(16 << 20);
        let spec = FileLocation::Local(self.archive.path().to_owned());
        runtime.block_on(async {
            let report = Arc::new(Report::default());
            let opened =
                open_blob(&spec, &SourceConfig::default(), &plan, Duration::from_secs(5), &report).await.unwrap();
            let tree = Arc::new(open_tree(opened, &plan).await.unwrap());
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(table).unwrap();
            let opened = Table::open(file, 1 << 20);
            if let Ok(table) = &opened {
                let _ = check(table);
            }
            let is_attached = match opened {
                Ok(table) => tree.attach(table, |_| ()).await.is_ok(),
                Err(_) => false,
            };
            let volume = TreeVolume::new(tree, Show::default(), "small".to_owned(), report);
            let mut answers = Vec::new();
            for name in &self.names {
                let mut attr = Some(volume.getattr(1).await.unwrap());
                for part in name.split(|&byte| byte == b'/').filter(|part| !part.is_empty()) {
                    attr = match attr {
                        Some(above) => volume.lookup(above.ino, part).await.unwrap(),
                        None => None,
                    };
                }
                answers.push(attr.map(without_links));
            }
            let listing = volume.readdir(1, 0, 100).await.unwrap();
            answers.extend(listing.entries.into_iter().map(|entry| Some(without_links(entry.attr))));
            (answers, is_attached)
        })
    }
}

#[test]
fn any_change_and_any_cut_of_a_table_is_noticed() {
    let scratch = Scratch::new();
    let runtime = Runtime::new().unwrap();
    let small = Small::new(&scratch);
    let (wanted, is_attached) = small.ask(&runtime, &small.table);
    assert!(is_attached && wanted.len() == small.names.len() + 2);
    assert_eq!(small.ask(&runtime, b"").0, wanted, "as the archive says");
    for at in 0..small.table.len() {
        let mut wrong = small.table.clone();
        wrong[at] ^= 1 << (at % 8);
        assert_eq!(small.ask(&runtime, &wrong).0, wanted, "byte {at}");
    }
    for len in (0..small.table.len()).step_by(7) {
        assert_eq!(small.ask(&runtime, &small.table[..len]).0, wanted, "{len} bytes");
    }
    let run = |changes: Vec<(prop::sample::Index, u8)>| {
        let mut wrong = small.table.clone();
        for (at, byte) in changes {
            let at = at.index(wrong.len());
            wrong[at] = byte;
        }
        prop_assert_eq!(&small.ask(&runtime, &wrong).0, &wanted);
        Ok(())
    };
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(100)
    });
    runner.run(&changes, run).unwrap();
}

#[test]
fn a_table_with_right_checksums_and_wrong_content_is_refused_or_answers_without_a_panic() {
    let scratch = Scratch::new();
    let source = scratch.dir("source");
    for dir in ["a", "b/c"] {
        fs::create_dir_all(source.join(dir)).unwrap();
        (0..20).for_each(|number| fs::write(source.join(dir).join(format!("file {number}")), b"x").unwrap());
    }
    let archive = scratch.join("t.catar");
    run(caifs().args(["tar", "--metadata-table"]).arg(&archive).arg(&source)).ok();
    let binding = *Table::open(File::open(scratch.join("t.catar.table")).unwrap(), 0).unwrap().binding();
    let runtime = Runtime::new().unwrap();
    let n_refused = std::cell::Cell::new(0);
    let try_with = |changes: Vec<(prop::sample::Index, u8)>| {
        // Changed after all was laid down and before the checksums are made.
        let plain = tempfile::tempfile().unwrap();
        let mut packer = TablePacker::new(Writer::new(plain.try_clone().unwrap(), Box::new(|_| Ok(()))));
        tar_with_table(&source, &TarOptions::default(), &mut std::io::sink(), Some(&mut packer)).unwrap();
        let mut out = tempfile::tempfile().unwrap();
        let damage = |file: &File| {
            let len = file.metadata().unwrap().len() as usize;
            changes.iter().for_each(|(at, byte)| file.write_all_at(&[*byte], at.index(len) as u64).unwrap());
        };
        packer.flush().unwrap();
        damage(&plain);
        packer.finish(binding, &mut BufWriter::new(&mut out)).unwrap();
        let table = Table::open(out, 0).unwrap();
        n_refused.set(n_refused.get() + u32::from(check(&table).is_err()));
        let plan = MemoryPlan::new(16 << 20);
        let spec = FileLocation::Local(archive.clone());
        runtime.block_on(async {
            let report = Arc::new(Report::default());
            let mut opened =
                open_blob(&spec, &SourceConfig::default(), &plan, Duration::from_secs(5), &report).await.unwrap();
            opened.tables = Default::default();
            let tree = Arc::new(open_tree(opened, &plan).await.unwrap());
            let _ = tree.attach(table, |_| ()).await;
            let volume = TreeVolume::new(tree, Show::default(), "lies".to_owned(), report);
            let mut waiting = vec![1];
            let mut n_seen = 0;
            while let Some(ino) = waiting.pop() {
                n_seen += 1;
                let Ok(listing) = volume.readdir(ino, 0, 1000).await else { continue };
                let inside = listing.entries.iter().filter(|entry| entry.attr.ino > ino);
                waiting
                    .extend(inside.filter(|entry| entry.attr.kind == FileKind::Directory).map(|entry| entry.attr.ino));
                assert!(n_seen < 10_000, "a tree that ends");
                for entry in listing.entries {
                    let _ = volume.lookup(ino, &entry.name).await;
                    let _ = volume.read(entry.attr.ino, 0, 4096).await;
                    let _ = volume.listxattr(entry.attr.ino, true).await;
                }
            }
        });
        Ok(())
    };
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(150) };
    proptest::test_runner::TestRunner::new(config).run(&changes, try_with).unwrap();
    assert!(n_refused.get() > 20, "{} were refused", n_refused.get());
}
