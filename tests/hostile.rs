//! Archives and indexes that lie or end early, served by a volume: errors of the right kind, and never a panic, a hang or an endless tree.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use caifs::config::SourceConfig;
use caifs::format::catar::node::{Entry, MODE_DIRECTORY, MODE_REGULAR};
use caifs::format::catar::{Content, Encoder, FeatureFlags, Item, Node, Tail, name_hash};
use caifs::report::Report;
use caifs::store::fault::Fault;
use caifs::store::location::FileLocation;
use caifs::volume::open::{MemoryPlan, open_blob, open_tree};
use caifs::volume::tree::TreeVolume;
use caifs::volume::{FileKind, ROOT_INO, Show, Volume, VolumeError};
use tokio::runtime::Runtime;

use crate::support::blob::noise;
use crate::support::run::{caifs, run};
use crate::support::scratch::Scratch;
use crate::volume::{MEMORY, NO_HANG, NO_MEMORY, archive_volume, blob, tree_of, within};

const CASYNC: &[u8] = include_bytes!("data/casync.catar");
const DESYNC: &[u8] = include_bytes!("data/desync.catar");
const ORPHANS: &[u8] = include_bytes!("data/desync-orphans.catar");

/// What became of a walk over a volume.
#[derive(Debug, Default)]
struct Walked {
    n_entries: usize,
    n_errors: usize,
}

/// Asks everything of everything that can be reached, and goes on after errors.
fn walk_all(runtime: &Runtime, volume: &dyn Volume, max_entries: usize) -> Walked {
    let mut walked = Walked::default();
    let mut waiting = vec![(ROOT_INO, volume.root_kind())];
    while let Some((ino, kind)) = waiting.pop() {
        walked.n_entries += 1;
        assert!(walked.n_entries <= max_entries, "more entries than the archive has room for");
        let mut check = |outcome: Result<(), VolumeError>| {
            if let Err(error) = outcome {
                assert!([libc::EIO, libc::ENOENT].contains(&error.errno()), "{error}");
                assert!(!error.to_string().contains('\n'), "{error}");
                walked.n_errors += 1;
            }
        };
        check(runtime.block_on(volume.getattr(ino)).map(|attr| assert_eq!((attr.ino, attr.kind), (ino, kind))));
        check(runtime.block_on(volume.inode_flags(ino)).map(drop));
        match runtime.block_on(volume.listxattr(ino, true)) {
            Ok(names) => names.iter().for_each(|name| {
                check(runtime.block_on(volume.getxattr(ino, name)).map(|value| assert!(value.is_some())))
            }),
            Err(error) => check(Err(error)),
        }
        check(runtime.block_on(volume.getxattr(ino, b"user.caifs.chunks")).map(drop));
        match kind {
            FileKind::Regular => {
                for offset in [0, 1, 1 << 40, u64::MAX] {
                    check(runtime.block_on(volume.read(ino, offset, 1 << 16)).map(drop));
                }
            }
            FileKind::Symlink => check(runtime.block_on(volume.readlink(ino)).map(drop)),
            FileKind::Directory => {
                let mut offset = 0;
                loop {
                    let listing = match runtime.block_on(volume.readdir(ino, offset, 4)) {
                        Ok(listing) => listing,
                        Err(error) => {
                            check(Err(error));
                            break;
                        }
                    };
                    let Some(last) = listing.entries.last() else { break };
                    assert!(last.next_offset > offset);
                    offset = last.next_offset;
                    for entry in &listing.entries {
                        check(runtime.block_on(volume.lookup(ino, &entry.name)).map(drop));
                    }
                    waiting.extend(listing.entries.iter().map(|entry| (entry.attr.ino, entry.attr.kind)));
                }
            }
            FileKind::BlockDevice | FileKind::CharDevice | FileKind::Fifo | FileKind::Socket => {}
        }
    }
    walked
}

/// Opens and walks; errors of opening count as one. No node is smaller than its ENTRY.
fn open_and_walk(runtime: &Runtime, archive: &[u8]) -> Walked {
    match archive_volume(runtime, archive, if archive.len().is_multiple_of(2) { MEMORY } else { NO_MEMORY }) {
        Ok(volume) => walk_all(runtime, &volume, archive.len() / 64 + 1),
        Err(error) => {
            assert_eq!(error.errno(), libc::EIO, "{error}");
            Walked { n_entries: 0, n_errors: 1 }
        }
    }
}

#[test]
fn every_flipped_byte_is_seen_or_harmless() {
    within(NO_HANG, || {
        let runtime = Runtime::new().unwrap();
        for original in [CASYNC, DESYNC, ORPHANS] {
            assert_eq!(open_and_walk(&runtime, original).n_errors, 0);
            let mut n_seen = 0;
            for position in 0..original.len() {
                for mask in [0x01, 0x80, 0xff] {
                    let mut archive = original.to_vec();
                    archive[position] ^= mask;
                    n_seen += usize::from(open_and_walk(&runtime, &archive).n_errors > 0);
                }
            }
            assert!(n_seen > original.len(), "only {n_seen} flips were seen");
        }
    });
}

#[test]
fn an_archive_that_ends_early_is_refused_wherever_it_ends() {
    within(NO_HANG, || {
        let runtime = Runtime::new().unwrap();
        for original in [CASYNC, DESYNC, ORPHANS] {
            for end in 0..original.len() {
                let error = archive_volume(&runtime, &original[..end], MEMORY).map(drop).unwrap_err();
                assert_eq!(error.errno(), libc::EIO, "{end}: {error}");
            }
            // Bytes at its end that are not its own are no better.
            for more in [1, 24, 40, 64] {
                let longer = [original, &vec![0; more]].concat();
                assert_eq!(archive_volume(&runtime, &longer, MEMORY).map(drop).unwrap_err().errno(), libc::EIO);
            }
        }
    });
}

fn open_path(runtime: &Runtime, path: &Path, stores: &[String]) -> Result<TreeVolume, String> {
    let plan = MemoryPlan::new(16 << 20);
    let report = Arc::new(Report::default());
    let opened = runtime.block_on(open_blob(
        &FileLocation::Local(path.to_owned()),
        &SourceConfig { stores: stores.to_vec(), ..SourceConfig::default() },
        &plan,
        Duration::from_secs(30),
        &report,
    ));
    let tree = runtime.block_on(open_tree(opened.map_err(|error| error.to_string())?, &plan));
    Ok(TreeVolume::new(Arc::new(tree.map_err(|error| error.to_string())?), Show::default(), String::new(), report))
}

#[test]
fn torn_files_are_one_line_that_names_them() {
    within(NO_HANG, || {
        let runtime = Runtime::new().unwrap();
        let scratch = Scratch::new();
        let archive = scratch.file("whole.catar", CASYNC);
        let (blob_index, index, store) =
            (scratch.join("whole.caibx"), scratch.join("whole.caidx"), scratch.join("store.castr"));
        run(caifs().args(["make", "-m", "1:1:1", "-s"]).arg(&store).arg(&blob_index).arg(&archive)).ok();
        fs::rename(blob_index, &index).unwrap();
        let stores = [store.to_str().unwrap().to_owned()];
        let whole = open_path(&runtime, &index, &stores).unwrap();
        assert_eq!(walk_all(&runtime, &whole, 100).n_errors, 0);
        for (name, bytes) in [("torn.caidx", fs::read(&index).unwrap()), ("torn.catar", CASYNC.to_vec())] {
            for end in 0..bytes.len() {
                let error = open_path(&runtime, &scratch.file(name, &bytes[..end]), &stores).map(drop).unwrap_err();
                assert!(error.contains(name) && !error.contains('\n'), "{end}: {error}");
            }
        }
        // Chunks that end early, each chunk at each byte: never the wrong bytes.
        let mut files: Vec<_> = crate::chunks::chunk_files(&store);
        files.sort();
        assert_eq!(files.len(), 2);
        for (name, stored) in files {
            let path = store.join(&name[..4]).join(&name);
            for end in 0..stored.len() {
                let _ = fs::remove_file(&path);
                fs::write(&path, &stored[..end]).unwrap();
                let n_errors = match open_path(&runtime, &index, &stores) {
                    Ok(volume) => walk_all(&runtime, &volume, 100).n_errors,
                    Err(error) => {
                        assert!(error.contains("torn.caidx") || error.contains("whole.caidx"), "{error}");
                        1
                    }
                };
                assert!(n_errors > 0, "{name} with {end} of {} bytes", stored.len());
            }
            fs::write(&path, &stored).unwrap();
        }
    });
}

/// An archive: the root holds files `a` and `b`, a directory `c` with a file `d`, and a file `e`.
fn small_archive() -> Vec<u8> {
    let feature_flags = FeatureFlags::CASYNC_DEFAULT;
    let entry = |mode| Entry { feature_flags, mode, flags: 0, uid: 0, gid: 0, mtime_ns: 0 };
    let directory = Node::new(entry(MODE_DIRECTORY | 0o755), Content::Directory { first_child: 0 });
    let mut encoder = Encoder::new(feature_flags);
    let file = |encoder: &mut Encoder, name: &[u8]| {
        let node = Node::new(entry(MODE_REGULAR | 0o644), Content::Payload { size: 3, offset: 0 });
        encoder.start_node(Some(name), &node).unwrap();
        encoder.payload(b"abc").unwrap();
    };
    encoder.start_node(None, &directory).unwrap();
    file(&mut encoder, b"a");
    file(&mut encoder, b"b");
    encoder.start_node(Some(b"c"), &directory).unwrap();
    file(&mut encoder, b"d");
    encoder.end_directory().unwrap();
    file(&mut encoder, b"e");
    encoder.end_directory().unwrap();
    encoder.finish().unwrap();
    encoder.take()
}

/// Where the table of the directory that ends at `end` lies, and its items in their order.
fn table(archive: &[u8], end: usize) -> (usize, Vec<Item>) {
    let tail = Tail::parse(archive[..end].last_chunk().unwrap()).unwrap();
    let (goodbye, entry) = tail.locate(end as u64).unwrap();
    let item = |i| {
        let position = Item::position(goodbye, i) as usize;
        Item::parse(archive[position..].first_chunk().unwrap(), goodbye, entry).unwrap()
    };
    (goodbye as usize, (0..tail.n_items()).map(item).collect())
}

fn put(archive: &mut [u8], position: usize, value: u64) {
    archive[position..][..8].copy_from_slice(&value.to_le_bytes());
}

/// The archive with one item of its root changed: new FILENAME offset and end.
fn with_item(i: usize, filename_offset: u64, end: u64) -> Vec<u8> {
    let mut archive = small_archive();
    let size = archive.len();
    let (goodbye, _) = table(&archive, size);
    let position = Item::position(goodbye as u64, i as u64) as usize;
    put(&mut archive, position, (goodbye as u64).wrapping_sub(filename_offset));
    put(&mut archive, position + 8, end.wrapping_sub(filename_offset));
    archive
}

#[test]
fn items_that_point_where_no_child_can_be_are_eio() {
    let runtime = Runtime::new().unwrap();
    let original = small_archive();
    let (goodbye, items) = table(&original, original.len());
    assert_eq!(items.len(), 4);
    let mut in_order = items.clone();
    in_order.sort_by_key(|item| item.filename_offset);
    let root_goodbye = goodbye as u64;
    for (i, item) in items.iter().enumerate() {
        let Item { filename_offset, end, .. } = *item;
        let first = in_order[0].filename_offset;
        let next = in_order.iter().find(|next| next.filename_offset >= end);
        let mut wrong = vec![
            ("the directory itself", 0, end),
            ("before the archive", u64::MAX - 7, end),
            ("the middle of a name", filename_offset + 8, end),
            ("its own ENTRY", filename_offset + 18, end),
            ("an end behind the table", filename_offset, original.len() as u64),
            ("an end before its start", filename_offset, filename_offset - 1),
            ("an end within its name", filename_offset, filename_offset + 17),
            ("an end within its ENTRY", filename_offset, filename_offset + 40),
            ("an end within its content", filename_offset, end - 1),
            ("the table", root_goodbye, root_goodbye + 40),
        ];
        if let Some(next) = next {
            wrong.push(("what follows it too", filename_offset, next.end));
            wrong.push(("what follows it instead", next.filename_offset, next.end));
        }
        if filename_offset != first {
            wrong.push(("the first child a second time", first, in_order[0].end));
        }
        for (what, filename_offset, end) in wrong {
            let volume = archive_volume(&runtime, &with_item(i, filename_offset, end), MEMORY).unwrap();
            let listed = runtime.block_on(volume.readdir(ROOT_INO, 0, 100));
            match listed {
                Err(error) => assert_eq!(error.errno(), libc::EIO, "item {i}: {what}: {error}"),
                // Where a directory ends is only looked at when it is listed itself, below.
                Ok(_) => {
                    assert!(item.hash == name_hash(b"c") && what == "an end within its content", "item {i}: {what}")
                }
            }
            let walked = walk_all(&runtime, &volume, original.len() / 64 + 1);
            assert!(walked.n_errors > 0, "item {i}: {what}");
        }
    }
}

#[test]
fn a_directory_that_ends_with_another_ones_table_is_eio() {
    let runtime = Runtime::new().unwrap();
    let original = small_archive();
    let (_, items) = table(&original, original.len());
    let c = items.iter().find(|item| item.hash == name_hash(b"c")).unwrap();
    let (inner_goodbye, inner) = table(&original, c.end as usize);
    // Its tail says that the directory begins at the root, and an item of it points at what is above.
    for (position, value) in [
        (c.end as usize - 24, inner_goodbye as u64),
        (Item::position(inner_goodbye as u64, 0) as usize, inner_goodbye as u64),
        (Item::position(inner_goodbye as u64, 0) as usize, inner_goodbye as u64 - c.filename_offset),
        (Item::position(inner_goodbye as u64, 0) as usize + 8, inner[0].end),
    ] {
        let mut archive = original.clone();
        put(&mut archive, position, value);
        let volume = archive_volume(&runtime, &archive, MEMORY).unwrap();
        let inner = runtime.block_on(volume.lookup(ROOT_INO, b"c")).unwrap().unwrap();
        assert_eq!(runtime.block_on(volume.readdir(inner.ino, 0, 9)).map(drop).unwrap_err().errno(), libc::EIO);
        assert_eq!(runtime.block_on(volume.lookup(inner.ino, b"d")).unwrap_err().errno(), libc::EIO);
        // What lies beside it is not touched by the damage.
        let beside = runtime.block_on(volume.lookup(ROOT_INO, b"e")).unwrap().unwrap();
        assert_eq!(runtime.block_on(volume.read(beside.ino, 0, 9)).unwrap(), "abc");
    }
}

#[test]
fn equal_hashes_are_told_apart_by_their_names() {
    let runtime = Runtime::new().unwrap();
    let mut archive = small_archive();
    let size = archive.len();
    let (goodbye, items) = table(&archive, size);
    for i in 0..items.len() {
        put(&mut archive, Item::position(goodbye as u64, i as u64) as usize + 16, name_hash(b"e"));
    }
    let volume = archive_volume(&runtime, &archive, NO_MEMORY).unwrap();
    assert_eq!(runtime.block_on(volume.readdir(ROOT_INO, 0, 100)).unwrap().entries.len(), 4);
    let found = runtime.block_on(volume.lookup(ROOT_INO, b"e")).unwrap().unwrap();
    assert_eq!(runtime.block_on(volume.read(found.ino, 0, 9)).unwrap(), "abc");
    assert_eq!(runtime.block_on(volume.lookup(ROOT_INO, b"a")).unwrap(), None, "its hash is not in the table");
    assert_eq!(runtime.block_on(volume.lookup(ROOT_INO, b"f")).unwrap(), None);
    assert_eq!(walk_all(&runtime, &volume, 100).n_errors, 0);
}

/// An archive whose root has more names than a table may have to be read whole.
fn huge_archive(n_names: usize) -> Vec<u8> {
    let feature_flags = FeatureFlags::CASYNC_DEFAULT;
    let entry = |mode| Entry { feature_flags, mode, flags: 0, uid: 0, gid: 0, mtime_ns: 0 };
    let mut encoder = Encoder::new(feature_flags);
    let root = Node::new(entry(MODE_DIRECTORY | 0o755), Content::Directory { first_child: 0 });
    let file = Node::new(entry(MODE_REGULAR | 0o644), Content::Payload { size: 0, offset: 0 });
    encoder.start_node(None, &root).unwrap();
    for i in 0..n_names {
        encoder.start_node(Some(format!("n{i:06}").as_bytes()), &file).unwrap();
    }
    encoder.end_directory().unwrap();
    encoder.finish().unwrap();
    encoder.take()
}

#[test]
fn a_table_too_large_to_read_whole_is_searched_where_it_lies() {
    within(NO_HANG, || {
        const N_NAMES: usize = 180_000;
        let runtime = Runtime::new().unwrap();
        let mut archive = huge_archive(N_NAMES);
        let volume = tree_of(&runtime, blob(&archive, 1 << 16, |_, _| Fault::None), MEMORY).unwrap();
        for i in (0..N_NAMES).step_by(997).chain([N_NAMES - 1]) {
            let name = format!("n{i:06}");
            let found = runtime.block_on(volume.lookup(ROOT_INO, name.as_bytes())).unwrap();
            assert!(found.is_some_and(|attr| attr.kind == FileKind::Regular), "{name}");
            assert_eq!(runtime.block_on(volume.lookup(ROOT_INO, &noise(i % 50 + 1)[..])).unwrap(), None);
        }
        // All hashes equal: a search that looked at every name would take for ever with each lookup.
        let size = archive.len();
        let (goodbye, _) = table(&archive, size);
        for i in 0..N_NAMES as u64 {
            put(&mut archive, Item::position(goodbye as u64, i) as usize + 16, name_hash(b"n000007"));
        }
        let volume = tree_of(&runtime, blob(&archive, 1 << 16, |_, _| Fault::None), MEMORY).unwrap();
        let refused = runtime.block_on(volume.lookup(ROOT_INO, b"n000007")).unwrap_err();
        assert!(refused.errno() == libc::EIO && refused.to_string().contains("equal hashes"), "{refused}");
        assert_eq!(runtime.block_on(volume.lookup(ROOT_INO, b"n000008")).unwrap(), None);
    });
}

#[test]
fn a_table_larger_than_any_directory_is_refused_before_memory_is_asked_for() {
    let scratch = Scratch::new();
    let source = scratch.dir("source");
    let archive = scratch.join("huge.catar");
    run(caifs().arg("tar").arg(&archive).arg(&source)).ok();
    // An empty directory, then nothing for 4 TiB (sparse), then a tail that claims 2 TiB of table.
    const SIZE: u64 = 4 << 40;
    const TABLE: u64 = 40 + 24 * (1 << 36);
    let file = std::fs::File::options().write(true).open(&archive).unwrap();
    if file.set_len(SIZE).is_err() {
        // A file system without files of this size cannot hold such an archive.
        return;
    }
    let tail: Vec<u8> = [SIZE - TABLE, TABLE, 0x57446fa533702943].into_iter().flat_map(u64::to_le_bytes).collect();
    std::os::unix::fs::FileExt::write_all_at(&file, &tail, SIZE - 24).unwrap();
    let listed = run(caifs().arg("ls").arg(&archive)).fails();
    assert!(listed.error_line().contains("a goodbye table of"), "{}", listed.stderr);
    assert_eq!(listed.status.code(), Some(1));
}
