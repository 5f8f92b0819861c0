//! Tables that somebody has published beside an index or archive: used where they lie, fetched, and found out when they are wrong.

use std::fs::{self, File};
use std::path::Path;

use caifs::config::SourceConfig;
use caifs::digest::Digest;
use caifs::format::table::TAIL_BYTES;
use caifs::pack::tar::{TarOptions, tar_with_table};
use caifs::tree::TableState;
use caifs::tree::table::check::check;
use caifs::tree::table::pack::TablePacker;
use caifs::tree::table::writer::Writer;
use caifs::tree::table::{Table, TreeShape};
use tokio::runtime::Runtime;

use super::{Open, assert_same, generated, make_table, mount_at, snapshot, table_in, wait_for_table, wait_until};
use crate::mount::{can_mount, contents};
use crate::support::blob::noise;
use crate::support::corner::Corner;
use crate::support::generated::Generated;
use crate::support::listing::tree_listing;
use crate::support::peers::peer;
use crate::support::run::{caifs, run};
use crate::support::scratch::Scratch;
use crate::support::servers::nginx::{Nginx, Site};
use crate::volume::{by_lookup, read_all};

#[test]
fn a_published_table_is_the_one_a_walk_makes_and_is_used_where_it_lies() {
    let scratch = Scratch::new();
    let runtime = Runtime::new().unwrap();
    let source = scratch.dir("source");
    Corner::ALL.build(&source);
    let store = scratch.join("default.castr");
    let (index, archive) = (scratch.join("t.caidx"), scratch.join("t.catar"));
    run(caifs().args(["tar", "--metadata-table", "-i", "-s"]).arg(&store).arg(&index).arg(&source)).ok();
    run(caifs().args(["tar", "--metadata-table"]).arg(&archive).arg(&source)).ok();
    for spec in [&index, &archive] {
        let published = scratch.join(format!("{}.table", spec.file_name().unwrap().to_str().unwrap()));
        let table = Table::open(File::open(&published).unwrap(), 0).unwrap();
        check(&table).unwrap();
        let wanted = snapshot(&runtime, Open::without_table(&runtime, spec).volume(), 100);
        let open = Open::new(&runtime, spec, SourceConfig::default(), |_| ());
        assert!(open.is_in_use(), "{}", published.display());
        let n_gets = open.n_gets();
        assert_same(&snapshot(&runtime, open.volume(), 100), &wanted);
        assert_eq!(open.n_gets(), n_gets);

        // One of a version before, or to come, is as none: by its first bytes, its last, or both.
        let bytes = fs::read(&published).unwrap();
        let tail_at = bytes.len() - TAIL_BYTES;
        for places in [&[7][..], &[tail_at + 7], &[7, tail_at + 7]] {
            let mut other = bytes.clone();
            places.iter().for_each(|&at| other[at] = b'2');
            seal_tail(&mut other);
            assert_ne!(other, bytes);
            fs::write(&published, other).unwrap();
            assert!(!Open::new(&runtime, spec, SourceConfig::default(), |_| ()).is_in_use(), "{places:?}");
        }
        let mut same = bytes.clone();
        seal_tail(&mut same);
        assert!(same == bytes, "the checksum is what a table has");
        fs::write(&published, bytes).unwrap();

        if spec == &index {
            let digest = Digest::Sha256.id(&fs::read(spec).unwrap()).0;
            let proven = Open::new(&runtime, spec, SourceConfig::default(), |config| {
                config.sources.trust.index_sha256 = Some(digest);
            });
            assert!(!proven.is_in_use(), "what is not signed is not used where the index must be proven");
        }
        // Another version of the archive: the table beside it is of the old one.
        fs::write(source.join("new"), "another version").unwrap();
        let mut again = caifs();
        match spec == &index {
            true => again.args(["tar", "-i", "-s"]).arg(&store).arg(&index),
            false => again.arg("tar").arg(&archive),
        };
        run(again.arg(&source)).ok();
        let open = Open::new(&runtime, spec, SourceConfig::default(), |_| ());
        assert!(!open.is_in_use() && published.exists());
        assert!(by_lookup(&runtime, open.volume(), b"new").is_some());
        fs::remove_file(source.join("new")).unwrap();
    }
    let refused = run(caifs().args(["tar", "--metadata-table", "-"]).arg(&source)).fails();
    assert!(refused.error_line().contains("needs a name"), "{}", refused.stderr);
}

/// Makes the checksum at the end of a table right again: the XXH64 of the tail before it.
fn seal_tail(table: &mut [u8]) {
    let sum_at = table.len() - 8;
    let sum = xxh64(&table[table.len() - TAIL_BYTES..sum_at]);
    table[sum_at..].copy_from_slice(&sum.to_le_bytes());
}

/// XXH64 with the seed 0, of bytes whose number is a multiple of 8 and at least 32.
fn xxh64(bytes: &[u8]) -> u64 {
    const P1: u64 = 0x9e37_79b1_85eb_ca87;
    const P2: u64 = 0xc2b2_ae3d_27d4_eb4f;
    const P3: u64 = 0x1656_67b1_9e37_79f9;
    const P4: u64 = 0x85eb_ca77_c2b2_ae63;
    let round = |sum: u64, word: u64| sum.wrapping_add(word.wrapping_mul(P2)).rotate_left(31).wrapping_mul(P1);
    let words: Vec<u64> = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
    let stripes = words.chunks_exact(4);
    let rest = stripes.remainder();
    let mut lanes = [P1.wrapping_add(P2), P2, 0, 0u64.wrapping_sub(P1)];
    for stripe in stripes {
        lanes.iter_mut().zip(stripe).for_each(|(lane, word)| *lane = round(*lane, *word));
    }
    let mut sum = lanes.iter().zip([1, 7, 12, 18]).fold(0u64, |sum, (lane, by)| sum.wrapping_add(lane.rotate_left(by)));
    for lane in lanes {
        sum = (sum ^ round(0, lane)).wrapping_mul(P1).wrapping_add(P4);
    }
    sum = sum.wrapping_add(bytes.len() as u64);
    for word in rest {
        sum = (sum ^ round(0, *word)).rotate_left(27).wrapping_mul(P1).wrapping_add(P4);
    }
    sum = (sum ^ (sum >> 33)).wrapping_mul(P2);
    sum = (sum ^ (sum >> 29)).wrapping_mul(P3);
    sum ^ (sum >> 32)
}

#[test]
fn a_table_beside_an_index_answers_nothing_before_all_of_it_was_checked() {
    let scratch = Scratch::new();
    let runtime = Runtime::new().unwrap();
    // One that is checked before a mount is ready, and one that is checked in the background.
    for (n_entries, is_small) in [(4_000, true), (40_000, false)] {
        let what = Generated { n_entries, n_huge: 1_500, ..Generated::default() };
        let spec = generated(&scratch.dir(&format!("of {n_entries}")), what);
        let cache = scratch.join(format!("cache of {n_entries}"));
        make_table(&runtime, &spec, &cache);
        let right = fs::read(table_in(&cache)).unwrap();
        assert_eq!(right.len() < 256 << 10, is_small, "{} bytes", right.len());
        let beside = spec.with_file_name("generated.caidx.table");
        let open = || Open::new(&runtime, &spec, SourceConfig::default(), |_| ());
        // In the middle, which nobody reads who only opens it.
        let mut wrong = right.clone();
        wrong[right.len() / 3] ^= 1;
        fs::write(&beside, wrong).unwrap();
        let damaged = open();
        assert!(!damaged.is_in_use());
        wait_until(|| matches!(damaged.tree().table_state(), TableState::None), "it is looked for in vain");
        fs::write(&beside, &right).unwrap();
        let used = open();
        assert!(used.is_in_use() || !is_small, "a small one at once");
        wait_until(|| used.is_in_use(), "and a large one when it was checked");
    }
}

#[test]
fn a_table_says_how_files_lie_in_directories_whoever_made_it() {
    let scratch = Scratch::new();
    let source = scratch.dir("source");
    for (name, n_files) in [("large", 250), ("larger", 300), ("fitting", 200), ("empty", 0)] {
        fs::create_dir(source.join(name)).unwrap();
        // In another order than the archive's.
        (0..n_files).for_each(|number| drop(File::create(source.join(name).join(format!("{}", n_files - number)))));
    }
    let (store, index) = (scratch.join("default.castr"), scratch.join("t.caidx"));
    run(caifs().args(["tar", "--metadata-table", "-i", "-s"]).arg(&store).arg(&index).arg(&source)).ok();
    let published = scratch.join("t.caidx.table");
    let shape = TreeShape { n_nodes: 1 + 4 + 750, n_directories: 5, n_late: 150 };
    assert_eq!(Table::open(File::open(&published).unwrap(), 0).unwrap().shape(), shape);
    fs::remove_file(published).unwrap();
    let cache = scratch.join("cache");
    make_table(&Runtime::new().unwrap(), &index, &cache);
    assert_eq!(Table::open(File::open(table_in(&cache)).unwrap(), 0).unwrap().shape(), shape);
}

#[test]
fn a_published_table_is_fetched_checked_and_kept() {
    if !can_mount() {
        return;
    }
    let Some(nginx) = peer("nginx") else { return };
    let scratch = Scratch::new();
    let source = scratch.dir("source");
    Corner::ALL.build(&source);
    let served = Nginx::start(&nginx.path, &scratch.dir("nginx"), Site::default());
    let at = |name: &str| served.root().join(name);
    run(caifs().args(["tar", "--metadata-table", "-i", "-s"]).arg(at("default.castr")).arg(at("t.caidx")).arg(&source))
        .ok();
    run(caifs().args(["tar", "--metadata-table"]).arg(at("t.catar")).arg(&source)).ok();
    for name in ["t.caidx", "t.catar"] {
        let (spec, cache) = (format!("{}{name}", slash(&served.url())), scratch.join(format!("cache of {name}")));
        let mnt = scratch.dir(&format!("mnt of {name}"));
        let mounted = mount_at(&spec, &["-c", cache.to_str().unwrap()], &mnt);
        wait_for_table(&mnt);
        let n_fetches = xattr::get(&mnt, "user.caifs.fetches").unwrap();
        tree_listing(&mnt).assert_same(&tree_listing(&source));
        assert_eq!(xattr::get(&mnt, "user.caifs.fetches").unwrap(), n_fetches, "{name}");
        assert!(contents(&mnt) == contents(&source), "{name}");
        assert!(mounted.end());
        let kept = fs::read(table_in(&cache)).unwrap();
        assert!(kept == fs::read(at(&format!("{name}.table"))).unwrap(), "{name}: fetched, not made");

        // A damaged one is not kept, and one is made.
        let published = at(&format!("{name}.table"));
        let mut damaged = kept.clone();
        damaged[20] ^= 1;
        fs::write(&published, damaged).unwrap();
        let cache = scratch.join(format!("other cache of {name}"));
        let mounted = mount_at(&spec, &["-c", cache.to_str().unwrap()], &mnt);
        wait_for_table(&mnt);
        tree_listing(&mnt).assert_same(&tree_listing(&source));
        assert!(mounted.end());
        let made = Table::open(File::open(table_in(&cache)).unwrap(), 0).unwrap();
        check(&made).unwrap();
    }
}

fn slash(url: &str) -> String {
    format!("{}/", url.trim_end_matches('/'))
}

#[test]
fn a_table_that_lies_is_found_out_before_wrong_bytes_are_read() {
    let scratch = Scratch::new();
    let runtime = Runtime::new().unwrap();
    let (one, other) = (scratch.dir("one"), scratch.dir("other"));
    // Archives of the same length whose files lie elsewhere.
    for (dir, sizes) in [(&one, [10, 5_000]), (&other, [5_000, 10])] {
        for (name, size) in ["a", "b"].iter().zip(sizes) {
            fs::write(dir.join(name), noise(size)).unwrap();
        }
    }
    let (right, wrong) = (scratch.join("right.catar"), scratch.join("wrong.catar"));
    for (spec, source) in [(&right, &one), (&wrong, &other)] {
        run(caifs().args(["tar", "--no-time", "--metadata-table"]).arg(spec).arg(source)).ok();
    }
    assert_eq!(right.metadata().unwrap().len(), wrong.metadata().unwrap().len());
    // The table of the one with the binding of the other, which anybody can write.
    let beside = scratch.join("right.catar.table");
    let binding = *Table::open(File::open(&beside).unwrap(), 0).unwrap().binding();
    let mut lie = Vec::new();
    packed(&other, TarOptions { no_time: true, ..TarOptions::default() }).finish(binding, &mut lie).unwrap();
    fs::write(&beside, &lie).unwrap();
    let open = Open::new(&runtime, &right, SourceConfig::default(), |_| ());
    assert!(open.is_in_use(), "it looks right");
    let a = runtime.block_on(open.volume().lookup(1, b"a")).unwrap().unwrap();
    assert_eq!(a.size, 5_000, "so it is believed");
    let content = read_all(&runtime, open.volume(), a.ino, 100_000);
    assert!(content == fs::read(one.join("a")).unwrap(), "until content is read");
    assert!(!open.is_in_use());
    assert_eq!(runtime.block_on(open.volume().lookup(1, b"a")).unwrap().unwrap().size, 10);
    fs::write(&beside, &lie).unwrap();
    let cat = run(caifs().args(["cat", "-p", "a"]).arg(&right)).ok();
    assert!(cat.stdout == fs::read(one.join("a")).unwrap());
}

/// A table of a directory's archive, before it is bound to anything.
fn packed(source: &Path, options: TarOptions) -> TablePacker {
    let mut packer = TablePacker::new(Writer::new(tempfile::tempfile().unwrap(), Box::new(|_| Ok(()))));
    tar_with_table(source, &options, &mut std::io::sink(), Some(&mut packer)).unwrap();
    packer
}
