//! The disk tier: damage, crashes, full and vanishing disks, several processes, and desync in the same directory.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use caifs::cache::Want;
use caifs::cache::disk::{DiskConfig, DiskTier};
use caifs::chunk::Chunk;
use caifs::chunk::codec::{self, Form};
use caifs::digest::{ChunkId, Digest};
use caifs::report::Report;
use caifs::store::local::LocalStore;
use caifs::store::{BlockingStore, Stored, WriteStore};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use proptest::prelude::*;

use crate::support::blob::Xorshift;
use crate::support::is_root;
use crate::support::peers::{missing, peer};
use crate::support::run::{command, run};
use crate::support::scratch::Scratch;

/// How long something that must come may take on a slow machine.
const LIMIT: Duration = Duration::from_secs(100);

/// The environment of the process that is killed: the cache it writes to, and where its chunks begin.
const WRITER_PATH: &str = "CAIFS_TEST_CACHE_WRITER";
const WRITER_START: &str = "CAIFS_TEST_CACHE_WRITER_START";

const WRITER_QUOTA_BYTES: u64 = 6 << 20;

fn open(path: &Path, quota_bytes: u64) -> (Arc<DiskTier>, Arc<Report>) {
    let report = Arc::new(Report::default());
    let config = DiskConfig { path: path.to_owned(), quota_bytes: Some(quota_bytes), keep_free_bytes: 0 };
    (DiskTier::open(config, Arc::clone(&report)).unwrap(), report)
}

/// Chunk number `seed`: noise, so that its stored form is as long as its content.
fn chunk(seed: u64, n_bytes: usize) -> Chunk {
    let bytes = Xorshift::seeded(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1).bytes(n_bytes);
    Chunk::of(Digest::default(), bytes.into())
}

fn want(chunk: &Chunk) -> Want {
    Want { id: chunk.id(), n_bytes: chunk.plain().len() as u64 }
}

/// What the tier has for a chunk, which must be the chunk if it is anything.
#[track_caller]
fn get(tier: &DiskTier, chunk: &Chunk) -> bool {
    let Some(got) = tier.get(Digest::default(), &want(chunk)) else { return false };
    assert!(got.id() == chunk.id() && got.plain() == chunk.plain(), "wrong bytes for {}", chunk.id());
    true
}

fn chunk_file(cache: &Path, id: ChunkId) -> PathBuf {
    let hex = id.to_hex();
    cache.join(&hex[..4]).join(format!("{hex}.cacnk"))
}

/// Writes over a file that is read-only, as damage does.
fn damage(path: &Path, content: &[u8]) {
    let _ = fs::remove_file(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o444)).unwrap();
}

/// All bytes below a directory as `du -sb` counts them: files and directories, with itself. What vanishes meanwhile is nothing.
fn apparent_bytes(path: &Path) -> u64 {
    let Ok(metadata) = fs::symlink_metadata(path) else { return 0 };
    let below = match metadata.is_dir() {
        true => fs::read_dir(path).into_iter().flatten().flatten().map(|entry| apparent_bytes(&entry.path())).sum(),
        false => 0,
    };
    metadata.len() + below
}

/// All files below a directory, but for ours (`.caifs`).
fn chunk_ids_in(cache: &Path) -> BTreeSet<String> {
    let directories = fs::read_dir(cache).unwrap().flatten().filter(|entry| entry.file_name() != ".caifs");
    let names = directories.flat_map(|entry| fs::read_dir(entry.path()).into_iter().flatten().flatten());
    names.map(|entry| entry.file_name().into_string().unwrap()).collect()
}

/// The temporary files of everyone, without locks.
fn temporary_files(cache: &Path) -> Vec<PathBuf> {
    let workplaces = fs::read_dir(cache.join(".caifs/tmp")).unwrap().flatten();
    let files = workplaces.flat_map(|entry| fs::read_dir(entry.path()).into_iter().flatten().flatten());
    files.map(|entry| entry.path()).filter(|path| !path.ends_with("lock")).collect()
}

/// Tries until it holds.
#[track_caller]
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < LIMIT, "{what}: not after {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn make_old(path: &Path, age: Duration) {
    File::open(path).unwrap().set_modified(SystemTime::now() - age).unwrap();
}

#[tokio::test]
async fn a_kept_chunk_comes_back_and_any_store_reads_it() {
    let scratch = Scratch::new();
    let cache = scratch.join("made/with/parents");
    let (tier, report) = open(&cache, 64 << 20);
    assert_eq!(fs::metadata(&cache).unwrap().mode() & 0o777, 0o700);
    assert_eq!(tier.path(), cache);
    let chunks: Vec<Chunk> = (1..20).map(|seed| chunk(seed, 1 + 5000 * seed as usize)).collect();
    for chunk in &chunks {
        assert!(!tier.has(chunk.id()) && !get(&tier, chunk));
        tier.keep(chunk, None);
        tier.keep(chunk, None);
        assert!(tier.has(chunk.id()) && get(&tier, chunk));
    }
    assert_eq!((report.n_disk_kept.get(), report.n_disk_hits.get(), report.n_disk_misses.get()), (19, 19, 19));
    assert_eq!((report.n_disk_bad.get(), report.n_disk_errors.get(), report.n_disk_evicted.get()), (0, 0, 0));
    assert!(apparent_bytes(&cache) <= tier.weight_bytes(), "{} {}", apparent_bytes(&cache), tier.weight_bytes());
    // Its length by the index is part of what is wanted; that it is wrong is not the file's fault.
    for n_bytes in [0, 1, 5000, 5002, 1 << 40] {
        assert!(
            tier.get(Digest::default(), &Want { id: chunks[0].id(), n_bytes: n_bytes + 5001 }).is_none()
                || n_bytes == 0
        );
    }
    assert!(get(&tier, &chunks[0]) && report.n_disk_bad.get() == 0);
    let store = LocalStore::open(&cache).unwrap();
    for chunk in &chunks {
        let stored = store.fetch_now(chunk.id(), u64::MAX).unwrap().unwrap();
        let plain = codec::decode(stored.form, &stored.bytes, chunk.plain().len() as u64).unwrap();
        assert_eq!(&plain, chunk.plain());
    }
    // What others put there in any compression is used too: it is hashed.
    let foreign = chunk(77, 3000);
    let stored = Stored { form: Form::Compressed, bytes: codec::encode(foreign.plain(), 3).into() };
    store.put(foreign.id(), stored).await.unwrap();
    assert!(get(&tier, &foreign));
    // Another opener sees all of it.
    let (other, _) = open(&cache, 64 << 20);
    assert!(chunks.iter().all(|chunk| get(&other, chunk)));
}

#[test]
fn a_damaged_file_is_a_miss_is_taken_away_and_can_be_kept_again() {
    let scratch = Scratch::new();
    let (tier, report) = open(&scratch, 64 << 20);
    let (one, other) = (chunk(1, 9000), chunk(2, 9000));
    tier.keep(&one, None);
    tier.keep(&other, None);
    let (path, right) = (chunk_file(&scratch, one.id()), fs::read(chunk_file(&scratch, one.id())).unwrap());
    let swapped = fs::read(chunk_file(&scratch, other.id())).unwrap();
    let half_zero = [&right[..4096], &vec![0; right.len() - 4096][..]].concat();
    // The frame of one under a seal of the other.
    let mixed = [&right[..right.len() - 56], &swapped[swapped.len() - 56..]].concat();
    let other_frame = codec::encode(other.plain(), 3);
    let damages: [&[u8]; 12] = [
        b"",
        b"x",
        &right[..1],
        &right[..right.len() / 2],
        &right[..right.len() - 1],
        &right[right.len() - 56..],
        &vec![0; right.len()],
        &half_zero,
        &swapped,
        &mixed,
        &other_frame,
        &[&right[..], b"more"].concat(),
    ];
    for (case, content) in damages.iter().enumerate() {
        damage(&path, content);
        let n_bad = report.n_disk_bad.get();
        assert!(!get(&tier, &one), "case {case}");
        assert_eq!(report.n_disk_bad.get(), n_bad + 1, "case {case}");
        assert!(!path.exists(), "case {case}");
        tier.keep(&one, None);
        assert!(get(&tier, &one), "case {case}");
    }
    // A longer file than the chunk can have is not read, and replaced by who has the chunk.
    damage(&path, &vec![1; 1 << 20]);
    assert!(!get(&tier, &one) && path.exists());
    tier.keep(&one, None);
    assert!(get(&tier, &one));
    // Things that are no files.
    for make in [
        (|path: &Path| fs::create_dir(path).unwrap()) as fn(&Path),
        |path| nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap(),
        |path| std::os::unix::fs::symlink(path, path).unwrap(),
        |path| std::os::unix::fs::symlink("/dev/null", path).unwrap(),
    ] {
        fs::remove_file(&path).unwrap();
        make(&path);
        assert!(!get(&tier, &one) && !tier.has(one.id()));
        tier.keep(&one, None);
        if path.is_dir() {
            fs::remove_dir(&path).unwrap()
        } else {
            fs::remove_file(&path).unwrap()
        }
        tier.keep(&one, None);
        assert!(get(&tier, &one));
    }
    // Only so many bad files are kept to look at, and none of them is served.
    for seed in 100..140 {
        damage(&chunk_file(&scratch, chunk(seed, 100).id()), b"rubbish");
        assert!(!get(&tier, &chunk(seed, 100)));
    }
    let n_quarantined = fs::read_dir(scratch.join(".caifs/quarantine")).unwrap().count();
    assert!((1..=16).contains(&n_quarantined), "{n_quarantined}");
}

#[test]
fn no_flipped_bit_of_a_file_is_served() {
    let scratch = Scratch::new();
    let (tier, _) = open(&scratch, 64 << 20);
    let chunk =
        Chunk::of(Digest::default(), Bytes::from_static(b"a chunk, a chunk, a chunk of a few bytes only, a chunk"));
    tier.keep(&chunk, None);
    let path = chunk_file(&scratch, chunk.id());
    let right = fs::read(&path).unwrap();
    for at in 0..right.len() {
        for bit in 0..8 {
            let mut wrong = right.clone();
            wrong[at] ^= 1 << bit;
            damage(&path, &wrong);
            get(&tier, &chunk);
        }
    }
    damage(&path, &right);
    assert!(get(&tier, &chunk));
}

#[test]
fn a_seal_in_a_file_that_others_may_write_is_not_believed() {
    let scratch = Scratch::new();
    let (tier, _) = open(&scratch, 64 << 20);
    let (one, other) = (chunk(1, 5000), chunk(2, 5000));
    tier.keep(&one, None);
    let path = chunk_file(&scratch, one.id());
    // A forged seal: right for the content of another chunk, under the id of this one.
    let forged = forge(&other, one.id());
    damage(&path, &forged);
    let believed = tier.get(Digest::default(), &want(&one)).expect("a file of our own is believed");
    assert_eq!(believed.plain(), other.plain(), "the forgery is a good one");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o464)).unwrap();
    assert!(!get(&tier, &one), "the group may write it");
    if is_root() {
        damage(&path, &forged);
        std::os::unix::fs::chown(&path, Some(12345), None).unwrap();
        assert!(!get(&tier, &one), "somebody else's");
    }
}

/// A file for `id` with the content of another chunk, sealed as we seal: the frame is that of the chunk kept in a cache of its own.
fn forge(content: &Chunk, id: ChunkId) -> Vec<u8> {
    let scratch = Scratch::new();
    let (tier, _) = open(&scratch, 64 << 20);
    tier.keep(content, None);
    let mut stored = fs::read(chunk_file(&scratch, content.id())).unwrap();
    let n_frame = stored.len() - 56;
    let seal = &mut stored[n_frame..];
    seal[16..48].copy_from_slice(&id.0);
    let seed = xxh64(0, &stored[n_frame..n_frame + 48]);
    let checksum = xxh64(seed, &stored[..n_frame]);
    stored[n_frame + 48..].copy_from_slice(&checksum.to_le_bytes());
    stored
}

/// XXH64 in its plainest form, for forging.
fn xxh64(seed: u64, bytes: &[u8]) -> u64 {
    const P: [u64; 5] = [
        11_400_714_785_074_694_791,
        14_029_467_366_897_019_727,
        1_609_587_929_392_839_161,
        9_650_029_242_287_828_579,
        2_870_177_450_012_600_261,
    ];
    let round = |lane: u64, word: u64| lane.wrapping_add(word.wrapping_mul(P[1])).rotate_left(31).wrapping_mul(P[0]);
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let mut at = 0;
    let mut hash = seed.wrapping_add(P[4]);
    if bytes.len() >= 32 {
        let mut lanes =
            [seed.wrapping_add(P[0]).wrapping_add(P[1]), seed.wrapping_add(P[1]), seed, seed.wrapping_sub(P[0])];
        while at + 32 <= bytes.len() {
            (0..4).for_each(|lane| lanes[lane] = round(lanes[lane], word(at + 8 * lane)));
            at += 32;
        }
        hash = (0..4).fold(0, |sum, lane| lanes[lane].rotate_left([1, 7, 12, 18][lane]).wrapping_add(sum));
        for lane in lanes {
            hash = (hash ^ round(0, lane)).wrapping_mul(P[0]).wrapping_add(P[3]);
        }
    }
    hash = hash.wrapping_add(bytes.len() as u64);
    while at + 8 <= bytes.len() {
        hash = (hash ^ round(0, word(at))).rotate_left(27).wrapping_mul(P[0]).wrapping_add(P[3]);
        at += 8;
    }
    if at + 4 <= bytes.len() {
        let half = u64::from(u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()));
        hash = (hash ^ half.wrapping_mul(P[0])).rotate_left(23).wrapping_mul(P[1]).wrapping_add(P[2]);
        at += 4;
    }
    for byte in &bytes[at..] {
        hash = (hash ^ u64::from(*byte).wrapping_mul(P[4])).rotate_left(11).wrapping_mul(P[0]);
    }
    hash = (hash ^ (hash >> 33)).wrapping_mul(P[1]);
    hash = (hash ^ (hash >> 29)).wrapping_mul(P[2]);
    hash ^ (hash >> 32)
}

#[test]
fn the_quota_holds_at_all_times_with_four_openers_and_twice_as_much_to_keep() {
    const QUOTA_BYTES: u64 = 24 << 20;
    let scratch = Scratch::new();
    let is_over = AtomicBool::new(false);
    let mut largest = 0;
    let n_evicted: u64 = std::thread::scope(|scope| {
        let openers: Vec<_> = (0..4u64)
            .map(|opener| {
                let (scratch, is_over) = (&scratch, &is_over);
                scope.spawn(move || {
                    let (tier, report) = open(scratch, QUOTA_BYTES);
                    let mut random = Xorshift::seeded(opener + 1);
                    // Until things went both in and out often enough, whatever the machine's speed.
                    let start = Instant::now();
                    while report.n_disk_kept.get() < 600 || report.n_disk_hits.get() < 50 {
                        assert!(start.elapsed() < LIMIT, "{report:?}");
                        let chunk = chunk(1 + random.below(900), 40_000 + random.below(30_000) as usize / 4096 * 4096);
                        // The length differs by drawing, so the same number is several chunks.
                        if !get(&tier, &chunk) {
                            tier.keep(&chunk, None);
                        }
                    }
                    tier.wait_idle();
                    assert_eq!((report.n_disk_bad.get(), report.n_disk_errors.get()), (0, 0));
                    is_over.store(true, Ordering::Relaxed);
                    report.n_disk_evicted.get()
                })
            })
            .collect();
        while openers.iter().any(|opener| !opener.is_finished()) {
            let n_bytes = apparent_bytes(&scratch);
            largest = largest.max(n_bytes);
            assert!(n_bytes <= QUOTA_BYTES + QUOTA_BYTES / 20, "{n_bytes} bytes");
        }
        openers.into_iter().map(|opener| opener.join().unwrap()).sum()
    });
    assert!(is_over.load(Ordering::Relaxed));
    assert!(n_evicted > 500, "{n_evicted}");
    // The quota is used, too.
    assert!(largest > QUOTA_BYTES / 10 * 8, "{largest}");
    let (tier, _) = open(&scratch, QUOTA_BYTES);
    assert!(apparent_bytes(&scratch) <= tier.weight_bytes());
    assert_eq!(temporary_files(&scratch), Vec::<PathBuf>::new());
}

#[test]
fn what_was_hit_outlives_what_was_not() {
    let scratch = Scratch::new();
    let (tier, report) = open(&scratch, 8 << 20);
    let chunks: Vec<Chunk> = (0..80).map(|seed| chunk(seed + 1, 60_000)).collect();
    for chunk in &chunks {
        tier.keep(chunk, None);
        assert!(tier.has(chunk.id()));
        make_old(&chunk_file(&scratch, chunk.id()), Duration::from_secs(3600));
    }
    let used: Vec<&Chunk> = chunks.iter().step_by(4).collect();
    for chunk in &used {
        assert!(get(&tier, chunk));
    }
    // A hit within the minute writes nothing.
    let file = chunk_file(&scratch, used[0].id());
    make_old(&file, Duration::from_secs(30));
    let before = fs::metadata(&file).unwrap().modified().unwrap();
    assert!(get(&tier, used[0]));
    assert_eq!(fs::metadata(&file).unwrap().modified().unwrap(), before);
    let mut seed = 1000;
    while report.n_disk_evicted.get() == 0 {
        tier.keep(&chunk(seed, 60_000), None);
        seed += 1;
        assert!(seed < 1200, "{report:?}");
        tier.wait_idle();
    }
    assert!(used.iter().all(|chunk| tier.has(chunk.id())));
    assert!(chunks.iter().filter(|chunk| tier.has(chunk.id())).count() < chunks.len());
    // To the goal, not to nothing, with the directories that became empty.
    assert!(tier.weight_bytes() <= (8 << 20) / 10 * 9);
    assert!(tier.weight_bytes() > (8 << 20) / 10 * 8, "{}", tier.weight_bytes());
    let n_directories = fs::read_dir(&*scratch).unwrap().count() - 1;
    assert_eq!(n_directories, chunk_ids_in(&scratch).iter().map(|name| &name[..4]).collect::<BTreeSet<_>>().len());
}

/// Not a test by itself: the process that `a_killed_writer_leaves_nothing_wrong` starts and kills.
#[test]
fn writer_that_is_killed() {
    let (Some(path), Some(start)) = (std::env::var_os(WRITER_PATH), std::env::var(WRITER_START).ok()) else { return };
    let (tier, report) = open(Path::new(&path), WRITER_QUOTA_BYTES);
    for seed in start.parse::<u64>().unwrap().. {
        tier.keep(&chunk(seed, 30_000), None);
        if report.n_disk_kept.get() > 0 {
            let _ = writeln!(std::io::stderr(), "kept");
        }
    }
}

fn start_writer(cache: &Path, start: u64) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "cache::writer_that_is_killed", "--nocapture", "--test-threads=1"]);
    command.env(WRITER_PATH, cache).env(WRITER_START, start.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn a_killed_writer_leaves_nothing_wrong() {
    const N_KILLS: u64 = 100;
    const SEEDS_EACH: u64 = 100_000;
    let scratch = Scratch::new();
    let mut random = Xorshift::seeded(7);
    let mut n_leftovers = 0;
    for kill in 0..N_KILLS {
        // Numbers that overlap those of the writer before.
        let mut writer = start_writer(&scratch, 1 + kill / 4 * SEEDS_EACH);
        let mut lines = BufReader::new(writer.stderr.take().unwrap()).lines();
        // Somewhere in its work: after so many chunks, at whatever point of the next one it is.
        for _ in 0..1 + random.below(30) {
            assert!(lines.next().is_some_and(|line| line.is_ok()), "the writer ended");
        }
        writer.kill().unwrap();
        assert_eq!(writer.wait().unwrap().signal(), Some(9));
        n_leftovers += temporary_files(&scratch).len();
        let (tier, report) = open(&scratch, WRITER_QUOTA_BYTES);
        assert_eq!(temporary_files(&scratch), Vec::<PathBuf>::new());
        assert_eq!(fs::read_dir(scratch.join(".caifs/tmp")).unwrap().count(), 1, "one workplace is alive: ours");
        tier.wait_idle();
        let n_bytes = apparent_bytes(&scratch);
        assert!(n_bytes <= tier.weight_bytes(), "{n_bytes} are more than {}", tier.weight_bytes());
        assert!(n_bytes <= WRITER_QUOTA_BYTES / 100 * 105);
        // Everything that is there is right.
        if kill % 10 == 9 {
            let names = chunk_ids_in(&scratch);
            assert!(!names.is_empty());
            for name in &names {
                let id: ChunkId = name.strip_suffix(".cacnk").unwrap().parse().unwrap();
                let got = tier.get(Digest::default(), &Want { id, n_bytes: 30_000 }).expect("a whole chunk");
                assert_eq!(Digest::default().id(got.plain()), id);
            }
        }
        assert_eq!((report.n_disk_bad.get(), report.n_disk_errors.get()), (0, 0), "kill {kill}");
    }
    println!("{n_leftovers} temporary files were left by {N_KILLS} kills");
}

#[test]
fn processes_share_the_total() {
    let scratch = Scratch::new();
    let mut writers: Vec<Child> = (0..3).map(|writer| start_writer(&scratch, 1 + writer * 1_000_000)).collect();
    let (tier, report) = open(&scratch, WRITER_QUOTA_BYTES);
    let start = Instant::now();
    // Their standard errors are read, so that no writer waits for us.
    let readers: Vec<_> = writers
        .iter_mut()
        .map(|writer| {
            let lines = BufReader::new(writer.stderr.take().unwrap()).lines();
            std::thread::spawn(move || lines.map_while(Result::ok).count())
        })
        .collect();
    let mut n_full = 0;
    let mut seed = 9_000_000;
    while n_full < 20 || report.n_disk_kept.get() < 20 {
        assert!(start.elapsed() < LIMIT, "{n_full} {report:?}");
        tier.keep(&chunk(seed, 30_000), None);
        seed += 1;
        let n_bytes = apparent_bytes(&scratch);
        assert!(n_bytes <= WRITER_QUOTA_BYTES / 100 * 105, "{n_bytes}");
        n_full += usize::from(n_bytes > WRITER_QUOTA_BYTES / 100 * 85);
    }
    for writer in &mut writers {
        writer.kill().unwrap();
        writer.wait().unwrap();
    }
    assert!(readers.into_iter().all(|reader| reader.join().unwrap() > 20), "all of them kept chunks");
}

#[test]
fn an_adopted_directory_is_counted_before_anything_is_kept() {
    let scratch = Scratch::new();
    let foreign: Vec<Chunk> = (0..100).map(|seed| chunk(seed + 1, 50_000)).collect();
    for chunk in &foreign {
        damage(&chunk_file(&scratch, chunk.id()), &codec::encode(chunk.plain(), 3));
        make_old(&chunk_file(&scratch, chunk.id()), Duration::from_secs(9000));
    }
    let other = scratch.file("not a chunk", "of somebody");
    let (tier, report) = open(&scratch, 4 << 20);
    let new = chunk(1000, 50_000);
    until("the new chunk is kept", || {
        tier.keep(&new, None);
        // Whatever else: not before it fits.
        assert!(!tier.has(new.id()) || apparent_bytes(&scratch) <= (4 << 20) / 100 * 105);
        tier.has(new.id())
    });
    tier.wait_idle();
    assert!(report.n_disk_evicted.get() > 20 && other.exists());
    assert!(foreign.iter().any(|chunk| get(&tier, chunk)) && get(&tier, &new));
    let n_bytes = apparent_bytes(&scratch);
    assert!((n_bytes..=n_bytes + 400_000).contains(&tier.weight_bytes()), "{n_bytes} {}", tier.weight_bytes());
    // A state that was lost or damaged is found again.
    for content in [&b""[..], b"rubbish", &[0xff; 64]] {
        drop(open(&scratch, 4 << 20));
        fs::write(scratch.join(".caifs/state"), content).unwrap();
        let (tier, _) = open(&scratch, 4 << 20);
        until("it is counted", || tier.weight_bytes() >= n_bytes / 2);
        tier.wait_idle();
        assert!(apparent_bytes(&scratch) <= tier.weight_bytes());
    }
}

/// A file system in memory, if that can be had.
fn tmpfs(scratch: &Scratch, name: &str, options: &str) -> Option<PathBuf> {
    let path = scratch.dir(name);
    if !is_root() || mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), Some(options)).is_err() {
        missing("a tmpfs (root may mount one)");
        return None;
    }
    Some(path)
}

#[test]
fn a_full_disk_stops_keeping_and_not_reading() {
    let scratch = Scratch::new();
    let new = chunk(1000, 60_000);
    // Full by its bytes, which is seen before a write, and by its files, which a write runs into.
    for (name, options, is_seen) in [("bytes", "size=2m", true), ("files", "size=200m,nr_inodes=60", false)] {
        let Some(disk) = tmpfs(&scratch, name, options) else { return };
        let (tier, report) = open(&disk.join("cache"), 1 << 30);
        let chunks: Vec<Chunk> = (0..60).map(|seed| chunk(seed + 1, 60_000)).collect();
        chunks.iter().for_each(|chunk| tier.keep(chunk, None));
        assert_eq!(report.n_disk_errors.get() == 0, is_seen, "{name}");
        tier.wait_idle();
        let n_kept = chunks.iter().filter(|chunk| get(&tier, chunk)).count();
        assert!((10..50).contains(&n_kept), "{name}: {n_kept}");
        assert_eq!(report.n_disk_bad.get(), 0);
        assert_eq!(temporary_files(tier.path()), Vec::<PathBuf>::new());
        // It heals by itself: what is old makes room.
        until("a chunk is kept again", || {
            tier.keep(&new, None);
            tier.has(new.id())
        });
        assert!(get(&tier, &new));
    }
}

#[test]
fn so_many_bytes_of_the_disk_stay_free() {
    const KEEP_FREE: u64 = 3 << 20;
    let scratch = Scratch::new();
    let Some(disk) = tmpfs(&scratch, "disk", "size=8m") else { return };
    let report = Arc::new(Report::default());
    let config = DiskConfig { path: disk.join("cache"), quota_bytes: None, keep_free_bytes: KEEP_FREE };
    let tier = DiskTier::open(config, Arc::clone(&report)).unwrap();
    let free = || {
        let answer = nix::sys::statvfs::statvfs(&disk).unwrap();
        answer.blocks_available() as u64 * answer.fragment_size() as u64
    };
    let mut seed = 1;
    until("room is made", || {
        tier.keep(&chunk(seed, 60_000), None);
        seed += 1;
        tier.wait_idle();
        assert!(free() >= KEEP_FREE, "{}", free());
        report.n_disk_evicted.get() > 0
    });
    // Without a quota it is a quarter of the disk.
    let weight = tier.weight_bytes();
    assert!((1 << 20..=2 << 20).contains(&weight), "{weight}");
    // Others fill the disk: the cache gives way.
    fs::write(disk.join("other"), vec![1; 5 << 20]).unwrap();
    until("the cache gives way", || {
        tier.keep(&chunk(seed, 60_000), None);
        seed += 1;
        tier.wait_idle();
        free() >= KEEP_FREE - (1 << 20) && tier.weight_bytes() < weight
    });
    assert_eq!(report.n_disk_errors.get(), 0);
}

#[test]
fn a_directory_that_vanishes_or_is_read_only_heals_when_it_is_back() {
    let scratch = Scratch::new();
    let cache = scratch.join("cache");
    let (tier, report) = open(&cache, 64 << 20);
    let map = tier.block_ids("key", "version");
    let one = chunk(1, 5000);
    let keeps = |chunk: &Chunk| {
        until("a chunk is kept again", || {
            tier.keep(chunk, None);
            tier.has(chunk.id())
        });
        assert!(get(&tier, chunk));
    };
    keeps(&one);
    map.set(3, one.id());
    fs::remove_dir_all(&cache).unwrap();
    assert!(!get(&tier, &one) && !tier.has(one.id()));
    keeps(&one);
    until("the map learns again", || {
        map.set(5, one.id());
        map.get(5) == Some(one.id())
    });
    // Something else in its place, for a while.
    fs::remove_dir_all(&cache).unwrap();
    fs::write(&cache, "a file").unwrap();
    tier.keep(&one, None);
    assert!(!get(&tier, &one) && !tier.has(one.id()) && tier.kept_file("key").is_none());
    tier.keep_file("key", None, None, b"content");
    map.set(4, one.id());
    fs::remove_file(&cache).unwrap();
    keeps(&one);
    assert!(apparent_bytes(&cache) <= tier.weight_bytes());
    assert!(report.n_disk_errors.get() > 0);

    if !is_root() {
        return missing("a read-only mount (root may make one)");
    }
    let cache = scratch.join("read-only");
    let (tier, _) = open(&cache, 4 << 20);
    let (two, three) = (chunk(2, 5000), chunk(3, 5000));
    tier.keep(&two, None);
    make_old(&chunk_file(&cache, two.id()), Duration::from_secs(3600));
    // The same directory, mounted over itself.
    let bind = |flags| mount(Some(&cache), &cache, None::<&str>, MsFlags::MS_BIND | flags, None::<&str>).unwrap();
    bind(MsFlags::empty());
    bind(MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY);
    assert!(get(&tier, &two));
    tier.keep(&three, None);
    tier.keep_file("key", None, None, b"content");
    assert!(!tier.has(three.id()) && tier.kept_file("key").is_none());
    // One that is read-only from the start can be read, too.
    let (late, _) = open(&cache, 4 << 20);
    late.keep(&three, None);
    assert!(get(&late, &two) && !late.has(three.id()));
    assert!(late.block_ids("a", "b").get(7).is_none());
    umount2(&cache, MntFlags::MNT_DETACH).unwrap();
    for tier in [&tier, &late] {
        until("a chunk is kept again", || {
            tier.keep(&three, None);
            tier.has(three.id())
        });
    }
}

#[test]
fn a_cache_that_cannot_be_made_is_an_error() {
    let scratch = Scratch::new();
    let file = scratch.file("file", "x");
    for path in [file.clone(), file.join("below"), "/proc/no such place".into()] {
        let config = DiskConfig { path, quota_bytes: None, keep_free_bytes: 0 };
        assert!(DiskTier::open(config, Arc::default()).is_err());
    }
}

#[test]
fn opening_reads_no_directory_of_chunks_nor_their_list() {
    let scratch = Scratch::new();
    let (tier, _) = open(&scratch, 64 << 20);
    let chunks: Vec<Chunk> = (1..30).map(|seed| chunk(seed, 1000)).collect();
    chunks.iter().for_each(|chunk| tier.keep(chunk, None));
    drop(tier);
    // Reading a directory sets its access time if that is older than its last change (or than a day).
    let directories: Vec<PathBuf> = chunks
        .iter()
        .map(|chunk| chunk_file(&scratch, chunk.id()).parent().unwrap().to_owned())
        .chain([scratch.to_path_buf()])
        .collect();
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
    let read_long_ago = |path: &PathBuf| {
        let times = fs::FileTimes::new().set_accessed(long_ago);
        File::open(path).unwrap().set_times(times).unwrap();
    };
    let was_read = |path: &PathBuf| fs::metadata(path).unwrap().accessed().unwrap() != long_ago;
    directories.iter().for_each(read_long_ago);
    let (tier, report) = open(&scratch, 64 << 20);
    tier.wait_idle();
    assert!(!directories.iter().any(was_read), "a directory was listed");
    assert!(chunks.iter().all(|chunk| get(&tier, chunk)));
    tier.keep(&chunk(1000, 1000), None);
    assert_eq!(report.n_disk_kept.get(), 1);
    tier.wait_idle();
    assert!(!directories.iter().any(was_read), "a directory was listed by a get or keep");
    // What this test sees is seen: where nothing sets access times it would be worth nothing.
    assert!(directories.iter().all(|path| fs::read_dir(path).unwrap().count() > 0));
    if !directories.iter().all(was_read) {
        missing("a file system that sets access times");
    }
}

#[test]
fn files_are_kept_by_key_and_damaged_ones_go() {
    let scratch = Scratch::new();
    let (tier, report) = open(&scratch, 8 << 20);
    let mtime = SystemTime::UNIX_EPOCH + Duration::new(1_700_000_000, 123_456_789);
    assert_eq!(tier.kept_file("http://h/x.caibx"), None);
    tier.keep_file("http://h/x.caibx", Some("\"etag\""), Some(mtime), b"content");
    tier.keep_file("http://h/y.caibx", None, None, b"");
    let kept = tier.kept_file("http://h/x.caibx").unwrap();
    assert_eq!(
        (kept.bytes.as_slice(), kept.version.as_deref(), kept.mtime),
        (&b"content"[..], Some("\"etag\""), Some(mtime))
    );
    assert_eq!(tier.kept_file("http://h/y.caibx").unwrap().version, None);
    tier.keep_file("http://h/x.caibx", Some("2"), None, &[7; 100_000]);
    assert_eq!(tier.kept_file("http://h/x.caibx").unwrap().bytes, [7; 100_000]);
    assert!(apparent_bytes(&scratch) <= tier.weight_bytes());
    // One that finds no room does not leave its old version in its place.
    tier.keep_file("http://h/x.caibx", Some("3"), None, &vec![8; 9 << 20]);
    assert_eq!(tier.kept_file("http://h/x.caibx"), None);
    let files = || fs::read_dir(scratch.join(".caifs/files")).unwrap().map(|file| file.unwrap().path());
    assert_eq!(files().count(), 1);
    for content in [&b""[..], b"rubbish", &[0; 5000]] {
        tier.keep_file("k", None, None, b"content");
        let n_bad = report.n_disk_bad.get();
        for path in files() {
            fs::write(path, content).unwrap();
        }
        assert_eq!((tier.kept_file("k"), files().count()), (None, 1));
        assert_eq!(report.n_disk_bad.get(), n_bad + 1);
    }
    // They are evicted like chunks.
    tier.keep_file("old", None, None, &[1; 50_000]);
    files().for_each(|path| make_old(&path, Duration::from_secs(9000)));
    let mut seed = 1;
    while report.n_disk_evicted.get() == 0 {
        tier.keep(&chunk(seed, 60_000), None);
        tier.wait_idle();
        seed += 1;
        assert!(seed < 1000);
    }
    assert_eq!(tier.kept_file("old"), None);
}

#[test]
fn block_maps_remember_what_was_set_and_nothing_else() {
    let scratch = Scratch::new();
    let (tier, report) = open(&scratch, 8 << 20);
    let ids: Vec<ChunkId> = (1..5000u64).map(|seed| Digest::default().id(&seed.to_le_bytes())).collect();
    let map = tier.block_ids("http://h/x.catar", "v1");
    for (block, id) in ids.iter().enumerate().step_by(3) {
        assert_eq!(map.get(block as u64), None);
        map.set(block as u64, *id);
    }
    map.set(u64::MAX, ids[0]);
    let (other, _) = open(&scratch, 8 << 20);
    let same = other.block_ids("http://h/x.catar", "v1");
    for (block, id) in ids.iter().enumerate() {
        assert_eq!(same.get(block as u64), (block % 3 == 0).then_some(*id), "block {block}");
    }
    assert_eq!(same.get(u64::MAX), Some(ids[0]));
    for (key, version) in [("http://h/x.catar", "v2"), ("http://h/x.cata", "r v1"), ("", "")] {
        assert!((0..5000).all(|block| other.block_ids(key, version).get(block).is_none()));
    }
    assert!(apparent_bytes(&scratch) <= tier.weight_bytes());
    assert_eq!(report.n_disk_errors.get(), 0);
    // Entries that moved, to another block or another map, and damaged ones, are unknown.
    let segment = |path: &Path, number: &str| path.to_str().unwrap().ends_with(number);
    let paths: Vec<PathBuf> =
        fs::read_dir(scratch.join(".caifs/blocks")).unwrap().map(|file| file.unwrap().path()).collect();
    assert_eq!(paths.len(), 6);
    let (first, second) = (
        paths.iter().find(|path| segment(path, ".0")).unwrap(),
        paths.iter().find(|path| segment(path, ".1")).unwrap(),
    );
    let right = fs::read(first).unwrap();
    fs::copy(second, first).unwrap();
    assert!((0..1024).all(|block| same.get(block).is_none()));
    for wrong in [vec![0xff; right.len()], vec![0; right.len()], right[..40].to_vec(), right[1..].to_vec(), Vec::new()]
    {
        fs::write(first, &wrong).unwrap();
        let known: Vec<u64> = (0..1024).filter(|block| same.get(*block).is_some()).collect();
        assert_eq!(known, if wrong.len() == 40 { vec![0] } else { vec![] });
    }
    // It is learned again, also when the segment was evicted under an open map.
    map.set(1, ids[1]);
    assert_eq!(same.get(1), Some(ids[1]));
    fs::remove_file(first).unwrap();
    map.set(2, ids[2]);
    assert_eq!(other.block_ids("http://h/x.catar", "v1").get(2), Some(ids[2]));
}

#[test]
fn desync_and_we_use_one_cache() {
    let Some(desync) = peer("desync") else { return };
    let scratch = Scratch::new();
    let (store, cache, empty) = (scratch.dir("store"), scratch.dir("cache"), scratch.dir("empty"));
    let mut random = Xorshift::default();
    let blob = scratch.file("blob", random.bytes(3_000_000));
    let index = scratch.join("blob.caibx");
    run(desync.command().args(["make", "-s"]).args([&store, &index, &blob])).ok();
    let extract = |from: &Path, out: &str| {
        let out = scratch.join(out);
        run(desync.command().args(["extract", "-s"]).arg(from).arg("-c").args([&cache, &index, &out])).ok();
        assert_eq!(fs::read(&out).unwrap(), fs::read(&blob).unwrap());
    };
    let ids = || {
        let names = chunk_ids_in(&cache).into_iter();
        names.map(|name| name.strip_suffix(".cacnk").unwrap().parse::<ChunkId>().unwrap()).collect::<Vec<_>>()
    };
    // What it wrote we read: by hashing.
    extract(&store, "out 1");
    let (tier, report) = open(&cache, 64 << 20);
    let mut chunks = Vec::new();
    for id in ids() {
        let stored = LocalStore::open(&store).unwrap().fetch_now(id, u64::MAX).unwrap().unwrap();
        let plain = codec::decode_unknown_size(stored.form, &stored.bytes, u64::MAX).unwrap();
        let chunk = Chunk::of(Digest::default(), plain);
        assert!(get(&tier, &chunk));
        chunks.push(chunk);
    }
    assert!(chunks.len() > 20);
    // What we wrote it reads, as a cache and as a store.
    for chunk in &chunks {
        fs::remove_file(chunk_file(&cache, chunk.id())).unwrap();
        until("counted", || {
            tier.keep(chunk, None);
            tier.has(chunk.id())
        });
    }
    assert_eq!(report.n_disk_kept.get(), chunks.len() as u64);
    extract(&empty, "out 2");
    let out = run(desync.command().args(["cat", "-s"]).args([&cache, &index])).ok().stdout;
    assert_eq!(out, fs::read(&blob).unwrap());
    assert_eq!(run(desync.command().args(["verify", "-s"]).arg(&cache)).ok().stderr, "");
    // It finds what is wrong in our files as it does in its own.
    let path = chunk_file(&cache, chunks[0].id());
    let mut wrong = fs::read(&path).unwrap();
    let middle = wrong.len() / 2;
    wrong[middle] ^= 1;
    damage(&path, &wrong);
    let finished = run(desync.command().args(["verify", "-r", "-s"]).arg(&cache));
    assert!(finished.stderr.contains(&chunks[0].id().to_hex()), "{}", finished.stderr);
    assert!(!path.exists());
    // And du sees no more than we count.
    let du = run(&mut command("du", ["-sb".as_ref(), cache.as_os_str()])).ok().text();
    let n_bytes: u64 = du.split_whitespace().next().unwrap().parse().unwrap();
    assert!(n_bytes <= tier.weight_bytes(), "{n_bytes} {}", tier.weight_bytes());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn whatever_is_in_a_file_the_right_bytes_come_or_none(
        cut in any::<prop::sample::Index>(), patch in prop::collection::vec(any::<u8>(), 0..300), at in any::<prop::sample::Index>(),
        is_cut in any::<bool>(), len in 1usize..3000,
    ) {
        let scratch = Scratch::new();
        let (tier, _) = open(&scratch, 64 << 20);
        let chunk = chunk(len as u64, len);
        tier.keep(&chunk, None);
        let path = chunk_file(&scratch, chunk.id());
        let right = fs::read(&path).unwrap();
        let mut content = right.clone();
        let at = at.index(content.len());
        let end = content.len().min(at + patch.len());
        content[at..end].copy_from_slice(&patch[..end - at]);
        if is_cut {
            content.truncate(cut.index(content.len()));
        }
        damage(&path, &content);
        let is_hit = get(&tier, &chunk);
        prop_assert!(is_hit || content != right);
    }
}
