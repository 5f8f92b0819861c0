//! The filesystem without FUSE: every operation of a volume against the source, every error's errno, and archives that lie.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use caifs::blob::source::IndexBytes;
use caifs::blob::{Blob, ChunkedBlob};
use caifs::cache::{Cache, CacheConfig};
use caifs::config::MountConfig;
use caifs::config::SourceConfig;
use caifs::digest::{ChunkId, Digest};
use caifs::format::index::{self, ChunkSizes, FLAG_SHA512_256, Index, IndexHeader};
use caifs::report::Report;
use caifs::store::fault::{Fault, FaultStore};
use caifs::store::location::FileLocation;
use caifs::tree::{Tree, TreeConfig};
use caifs::volume::image::{ImageConfig, ImageVolume};
use caifs::volume::open::{MemoryPlan, open_blob, open_tree, open_volume};
use caifs::volume::tree::TreeVolume;
use caifs::volume::{Attr, EioSite, FileKind, ROOT_INO, Show, Volume, VolumeError};
use tokio::runtime::Runtime;

use crate::mount::contents;
use crate::support::blob::{Xorshift, noise};
use crate::support::corner::Corner;
use crate::support::listing::{Entry, Listing, tree_listing};
use crate::support::peers::peer;
use crate::support::run::run;
use crate::support::scratch::Scratch;

/// Long enough for all that a test does, short enough to tell a hang from work.
pub const NO_HANG: Duration = Duration::from_secs(300);

/// Keeps nothing that was parsed but the last of each kind.
pub const NO_MEMORY: TreeConfig = TreeConfig { node_bytes: 0, table_bytes: 0, listing_bytes: 0, pinned_bytes: 0 };

/// Everything kept.
pub const MEMORY: TreeConfig =
    TreeConfig { node_bytes: 1 << 24, table_bytes: 1 << 24, listing_bytes: 1 << 24, pinned_bytes: 1 << 24 };

/// Does work on a thread of its own, so that a hang is a failure and not a test that never ends.
pub fn within<T: Send + 'static>(limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = channel();
    let worker = std::thread::spawn(move || sender.send(work()));
    match receiver.recv_timeout(limit) {
        Ok(value) => value,
        Err(RecvTimeoutError::Timeout) => panic!("not done after {limit:?}"),
        Err(RecvTimeoutError::Disconnected) => {
            std::panic::resume_unwind(worker.join().expect_err("it ended without a result"))
        }
    }
}

/// A chunked blob in memory: a chunk every `chunk_bytes`, kept in a store that does as its script says.
pub fn blob(bytes: &[u8], chunk_bytes: usize, script: impl Fn(ChunkId, u64) -> Fault + Send + Sync + 'static) -> Blob {
    let store = Arc::new(FaultStore::new("scripted", script));
    let mut items = Vec::new();
    for chunk in bytes.chunks(chunk_bytes) {
        let id = Digest::default().id(chunk);
        store.insert(id, chunk);
        items.push((items.last().map_or(0, |(end, _)| *end) + chunk.len() as u64, id));
    }
    let size = chunk_bytes as u64;
    let header = IndexHeader { feature_flags: FLAG_SHA512_256, sizes: ChunkSizes { min: size, avg: size, max: size } };
    let index =
        Index::open(IndexBytes::Copied(index::encode(&header, items.iter().map(|(end, id)| (*end, id))))).unwrap();
    let config = CacheConfig {
        memory_bytes: 1 << 24,
        inflight_bytes: 1 << 22,
        fetch_timeout: Duration::from_secs(5),
        is_offline: false,
    };
    Blob::Chunked(ChunkedBlob::new(index, "in memory", Cache::new(store, config, Arc::default()), 1 << 22))
}

pub fn tree_of(runtime: &Runtime, blob: Blob, config: TreeConfig) -> Result<TreeVolume, VolumeError> {
    let tree = runtime.block_on(Tree::open(blob, config)).map_err(VolumeError::from)?;
    Ok(TreeVolume::new(Arc::new(tree), Show::default(), "in memory".to_owned(), Arc::new(Report::default())))
}

pub fn archive_volume(runtime: &Runtime, bytes: &[u8], config: TreeConfig) -> Result<TreeVolume, VolumeError> {
    tree_of(runtime, blob(bytes, 4096, |_, _| Fault::None), config)
}

/// The corner tree and what casync makes of it.
struct Setting {
    scratch: Scratch,
    runtime: Runtime,
}

impl Setting {
    fn new() -> Option<Self> {
        let casync = peer("casync")?;
        let scratch = Scratch::new();
        let source = scratch.dir("source");
        Corner::ALL.build(&source);
        let (index, archive) = (scratch.join("tree.caidx"), scratch.join("tree.catar"));
        run(casync.command().arg("make").arg("--store").arg(scratch.join("default.castr")).arg(index).arg(&source))
            .ok();
        run(casync.command().arg("make").arg(archive).arg(&source)).ok();
        Some(Self { scratch, runtime: Runtime::new().unwrap() })
    }

    fn open(&self, name: &str) -> Arc<dyn Volume> {
        let (path, config, report) = (self.scratch.join(name), MountConfig::default(), Arc::new(Report::default()));
        self.runtime.block_on(open_volume(&FileLocation::Local(path.clone()), &config, false, &report)).unwrap().volume
    }

    fn open_small(&self, name: &str) -> TreeVolume {
        let plan = MemoryPlan { tree: NO_MEMORY, memory_tier_bytes: 0, ..MemoryPlan::new(16 << 20) };
        let report = Arc::new(Report::default());
        let path = self.scratch.join(name);
        let opened = self
            .runtime
            .block_on(open_blob(
                &FileLocation::Local(path.clone()),
                &SourceConfig::default(),
                &plan,
                Duration::from_secs(30),
                &report,
            ))
            .unwrap();
        let tree = self.runtime.block_on(open_tree(opened, &plan)).unwrap();
        TreeVolume::new(Arc::new(tree), Show::default(), "small".to_owned(), report)
    }
}

/// All that a volume tells of itself, by path.
pub fn walk(
    runtime: &Runtime,
    volume: &dyn Volume,
    max_entries: usize,
) -> Result<BTreeMap<Vec<u8>, Attr>, VolumeError> {
    let mut found = BTreeMap::new();
    let root = runtime.block_on(volume.getattr(ROOT_INO))?;
    let mut waiting = vec![(Vec::new(), ROOT_INO, root)];
    while let Some((path, parent_ino, attr)) = waiting.pop() {
        if attr.kind == FileKind::Directory {
            let mut offset = 0;
            loop {
                let listing = runtime.block_on(volume.readdir(attr.ino, offset, max_entries))?;
                assert_eq!(listing.parent_ino, parent_ino, "{}", path.escape_ascii());
                assert!(listing.entries.len() <= max_entries);
                let Some(last) = listing.entries.last() else { break };
                assert!(last.next_offset > offset, "a listing goes on");
                offset = last.next_offset;
                for entry in listing.entries {
                    let slash: &[u8] = if path.is_empty() { b"" } else { b"/" };
                    waiting.push(([&path, slash, &entry.name].concat(), attr.ino, entry.attr));
                }
            }
        }
        assert!(found.insert(path, attr).is_none(), "a path is listed twice");
    }
    Ok(found)
}

pub fn entry_of(runtime: &Runtime, volume: &dyn Volume, attr: &Attr) -> Entry {
    let Attr { ino, kind, .. } = *attr;
    let type_bits = match kind {
        FileKind::Directory => libc::S_IFDIR,
        FileKind::Regular => libc::S_IFREG,
        FileKind::Symlink => libc::S_IFLNK,
        FileKind::BlockDevice => libc::S_IFBLK,
        FileKind::CharDevice => libc::S_IFCHR,
        FileKind::Fifo => libc::S_IFIFO,
        FileKind::Socket => libc::S_IFSOCK,
    };
    let mtime = match attr.mtime.duration_since(UNIX_EPOCH) {
        Ok(after) => (after.as_secs() as i64, i64::from(after.subsec_nanos())),
        Err(before) => {
            let ns = -(before.duration().as_nanos() as i128);
            (ns.div_euclid(1_000_000_000) as i64, ns.rem_euclid(1_000_000_000) as i64)
        }
    };
    let names = runtime.block_on(volume.listxattr(ino, true)).unwrap();
    let xattrs = names.into_iter().map(|name| {
        let value = runtime.block_on(volume.getxattr(ino, &name)).unwrap().expect("it was listed");
        (name.to_vec(), value.to_vec())
    });
    let is_device = matches!(kind, FileKind::BlockDevice | FileKind::CharDevice);
    Entry {
        mode: type_bits | u32::from(attr.permissions),
        uid: attr.uid,
        gid: attr.gid,
        size: (kind != FileKind::Directory).then_some(attr.size),
        mtime,
        target: (kind == FileKind::Symlink).then(|| runtime.block_on(volume.readlink(ino)).unwrap().to_vec()),
        device: is_device.then(|| (u64::from(libc::major(attr.rdev)), u64::from(libc::minor(attr.rdev)))),
        xattrs: xattrs.collect(),
    }
}

pub fn by_lookup(runtime: &Runtime, volume: &dyn Volume, path: &[u8]) -> Option<Attr> {
    let mut attr = runtime.block_on(volume.getattr(ROOT_INO)).unwrap();
    for name in path.split(|&byte| byte == b'/').filter(|name| !name.is_empty()) {
        attr = runtime.block_on(volume.lookup(attr.ino, name)).unwrap()?;
    }
    Some(attr)
}

/// An attribute whose number of links depends on what was listed before.
pub fn without_links(mut attr: Attr) -> Attr {
    attr.nlink = 0;
    attr
}

pub fn read_all(runtime: &Runtime, volume: &dyn Volume, ino: u64, step: u32) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let piece = runtime.block_on(volume.read(ino, all.len() as u64, step)).unwrap();
        match piece.is_empty() {
            true => return all,
            false => all.extend_from_slice(&piece),
        }
    }
}

#[test]
fn every_operation_shows_the_source() {
    let Some(setting) = Setting::new() else { return };
    let runtime = &setting.runtime;
    let source = setting.scratch.join("source");
    let wanted = tree_listing(&source);
    let bytes = contents(&source);
    for (name, max_entries) in [("tree.caidx", 1000), ("tree.catar", 7)] {
        let volume = setting.open(name);
        let found = walk(runtime, &*volume, max_entries).unwrap();
        let entries = found.iter().map(|(path, attr)| (path.clone(), entry_of(runtime, &*volume, attr)));
        Listing::from_entries(entries).assert_same(&wanted);
        for (path, attr) in &found {
            let looked_up = by_lookup(runtime, &*volume, path).unwrap_or_else(|| panic!("{}", path.escape_ascii()));
            assert_eq!(without_links(looked_up.clone()), without_links(attr.clone()));
            assert_eq!(runtime.block_on(volume.getattr(attr.ino)).unwrap(), looked_up, "listed, so links are known");
            let metadata = source.join(Path::new(std::ffi::OsStr::from_bytes(path))).symlink_metadata().unwrap();
            if attr.kind == FileKind::Directory {
                assert_eq!(u64::from(looked_up.nlink), std::os::unix::fs::MetadataExt::nlink(&metadata), "{path:?}");
            } else {
                assert_eq!(looked_up.nlink, 1);
            }
        }
        for (path, content) in &bytes {
            let attr = &found[path.as_os_str().as_bytes()];
            assert!(read_all(runtime, &*volume, attr.ino, 100_000) == *content, "{}", path.display());
        }
        let public = |path: &str| runtime.block_on(volume.listxattr(found[path.as_bytes()].ino, false)).unwrap();
        assert_eq!(public("xattrs/directory"), ["user.on"]);
        if found.contains_key(&b"privileged/trusted"[..]) {
            assert!(public("privileged/trusted").is_empty(), "only root sees trusted.*");
        }
        assert!(volume.has_acls() && volume.root_kind() == FileKind::Directory);
        assert_eq!(volume.stat().size_bytes, setting.scratch.join("tree.catar").metadata().unwrap().len());
        if let Some(immutable) = found.get(&b"flags/immutable"[..]) {
            assert_eq!(runtime.block_on(volume.inode_flags(immutable.ino)).unwrap(), 0x10, "FS_IMMUTABLE_FL");
            assert_eq!(runtime.block_on(volume.inode_flags(found[&b"links/target"[..]].ino)).unwrap(), 0);
        }
    }
}

#[test]
fn inode_numbers_are_those_of_every_other_opening_and_are_found_again_without_caches() {
    let Some(setting) = Setting::new() else { return };
    let runtime = &setting.runtime;
    let numbers = |found: &BTreeMap<Vec<u8>, Attr>| -> BTreeMap<Vec<u8>, u64> {
        found.iter().map(|(path, attr)| (path.clone(), attr.ino)).collect()
    };
    let first = walk(runtime, &*setting.open("tree.caidx"), 1000).unwrap();
    let mut distinct: Vec<u64> = first.values().map(|attr| attr.ino).collect();
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(distinct.len(), first.len());
    for name in ["tree.caidx", "tree.catar"] {
        assert_eq!(numbers(&walk(runtime, &*setting.open(name), 10).unwrap()), numbers(&first));
    }
    let source = setting.scratch.join("source");
    let bytes = contents(&source);
    for name in ["tree.caidx", "tree.catar"] {
        // A new volume knows nothing; this one forgets all it learns, too. The order is one no walk has.
        let small = setting.open_small(name);
        let mut random = Xorshift::seeded(11);
        let paths: Vec<&Vec<u8>> = first.keys().collect();
        for _ in 0..300 {
            let path = paths[random.below(paths.len() as u64) as usize];
            let known = &first[path];
            let again = runtime.block_on(small.getattr(known.ino)).unwrap();
            assert_eq!(without_links(again), without_links(known.clone()), "{}", path.escape_ascii());
            if known.kind == FileKind::Directory {
                let above = path.iter().rposition(|&byte| byte == b'/').map_or(&b""[..], |end| &path[..end]);
                let listing = runtime.block_on(small.readdir(known.ino, 0, 5)).unwrap();
                assert_eq!(listing.parent_ino, first[above].ino);
            }
            if let Some(content) = bytes.get(Path::new(std::ffi::OsStr::from_bytes(path))) {
                let offset = random.below(content.len() as u64 + 2);
                let piece = runtime.block_on(small.read(known.ino, offset, 5000)).unwrap();
                let rest = &content[content.len().min(offset as usize)..];
                assert!(piece == rest[..rest.len().min(5000)], "{} at {offset}", path.escape_ascii());
            }
        }
        assert_eq!(numbers(&walk(runtime, &small, 3).unwrap()), numbers(&first));
    }
}

#[test]
fn every_wrong_question_has_its_errno() {
    let runtime = Runtime::new().unwrap();
    let archive = include_bytes!("data/casync.catar");
    let volume = archive_volume(&runtime, archive, MEMORY).unwrap();
    let found = walk(&runtime, &volume, 100).unwrap();
    let of = |kind: FileKind| found.values().find(|attr| attr.kind == kind).unwrap_or_else(|| panic!("{kind:?}")).ino;
    let (root, file, link, fifo) = (ROOT_INO, of(FileKind::Regular), of(FileKind::Symlink), of(FileKind::Fifo));
    let errno = |error: VolumeError| error.errno();
    let wait = |answer: caifs::volume::Answer<Bytes>| runtime.block_on(answer).unwrap_err().errno();
    for ino in [0, 2, file + 1, file - 1, archive.len() as u64, u64::MAX] {
        assert_eq!(runtime.block_on(volume.getattr(ino)).map_err(errno), Err(libc::ENOENT), "{ino}");
        assert_eq!(runtime.block_on(volume.lookup(ino, b"x")).map_err(errno), Err(libc::ENOENT));
        assert_eq!(runtime.block_on(volume.inode_flags(ino)).map_err(errno), Err(libc::ENOENT));
        assert_eq!(runtime.block_on(volume.listxattr(ino, true)).map_err(errno), Err(libc::ENOENT));
        assert_eq!(runtime.block_on(volume.getxattr(ino, b"user.x")).map_err(errno), Err(libc::ENOENT));
        assert_eq!(runtime.block_on(volume.readdir(ino, 0, 9)).unwrap_err().errno(), libc::ENOENT);
        assert_eq!((wait(volume.read(ino, 0, 9)), wait(volume.readlink(ino))), (libc::ENOENT, libc::ENOENT));
    }
    for ino in [file, link, fifo] {
        assert_eq!(runtime.block_on(volume.lookup(ino, b"x")).map_err(errno), Err(libc::ENOTDIR));
        assert_eq!(runtime.block_on(volume.readdir(ino, 0, 9)).unwrap_err().errno(), libc::ENOTDIR);
    }
    assert_eq!([root, file, fifo].map(|ino| wait(volume.readlink(ino))), [libc::EINVAL; 3]);
    assert_eq!([root, link, fifo].map(|ino| wait(volume.read(ino, 0, 9))), [libc::EISDIR, libc::EINVAL, libc::EINVAL]);
    for name in [&b""[..], b".", b"..", b"a/b", b"absent", &[b'x'; 5000]] {
        assert_eq!(runtime.block_on(volume.lookup(root, name)).unwrap(), None);
    }
    for offset in [1000, u64::MAX] {
        assert!(runtime.block_on(volume.readdir(root, offset, 9)).unwrap().entries.is_empty());
        assert!(runtime.block_on(volume.read(file, offset, u32::MAX)).unwrap().is_empty());
    }
    assert_eq!(runtime.block_on(volume.getxattr(file, b"user.absent")).unwrap(), None);
}

#[test]
fn every_fault_has_its_site() {
    let runtime = Runtime::new().unwrap();
    let faults = [
        (Fault::Missing, EioSite::ChunkMissing),
        (Fault::Flip, EioSite::ChunkBad),
        (Fault::Truncate, EioSite::ChunkBad),
        (Fault::Lengthen, EioSite::ChunkBad),
        (Fault::Empty, EioSite::ChunkBad),
        (Fault::Fail, EioSite::StoreFailed),
        (Fault::Hang, EioSite::Deadline),
        (Fault::Panic, EioSite::StoreFailed),
    ];
    for (fault, wanted) in faults {
        let config = ImageConfig {
            file_name: Some("image".into()),
            show: Show { uid: Some(7), ..Show::default() },
            mtime: UNIX_EPOCH,
            source: "here".into(),
            is_backed: false,
        };
        let content = noise(10_000);
        let is_faulty = Arc::new(AtomicBool::new(true));
        let volume = ImageVolume::new(
            // Wrong bytes are asked for again, so they must be wrong each time.
            blob(&content, 4096, {
                let is_faulty = Arc::clone(&is_faulty);
                move |_, _| if is_faulty.load(Ordering::SeqCst) { fault } else { Fault::None }
            }),
            config,
            Arc::new(Report::default()),
        );
        let image = runtime.block_on(volume.lookup(ROOT_INO, b"image")).unwrap().unwrap();
        assert_eq!((image.uid, image.gid, image.size, image.nlink), (7, 0, 10_000, 1));
        match runtime.block_on(volume.read(image.ino, 5000, 10)).unwrap_err() {
            VolumeError::Io { site, message } => {
                assert_eq!(site, wanted, "{fault:?}: {message}");
                assert!(!message.is_empty() && !message.contains('\n'), "{message}");
            }
            other => panic!("{fault:?}: {other}"),
        }
        is_faulty.store(false, Ordering::SeqCst);
        let read = runtime.block_on(volume.read(image.ino, 0, 20_000)).unwrap();
        assert!(read == content, "a failure is not remembered: {fault:?}");
        assert_eq!(runtime.block_on(volume.lookup(ROOT_INO, b"other")).unwrap(), None);
        assert_eq!(runtime.block_on(volume.read(ROOT_INO, 0, 1)).unwrap_err().errno(), libc::EISDIR);
        assert_eq!(runtime.block_on(volume.readdir(image.ino, 0, 1)).unwrap_err().errno(), libc::ENOTDIR);
        assert_eq!(runtime.block_on(volume.lookup(image.ino, b"x")).unwrap_err().errno(), libc::ENOTDIR);
        assert_eq!(runtime.block_on(volume.getattr(image.ino + 1)).unwrap_err().errno(), libc::ENOENT);
        assert_eq!(runtime.block_on(volume.readlink(image.ino)).unwrap_err().errno(), libc::EINVAL);
        assert_eq!(walk(&runtime, &volume, 1).unwrap().len(), 2);
    }
}

#[test]
fn a_read_after_a_failed_one_is_not_given_the_answer_of_before() {
    let runtime = Runtime::new().unwrap();
    let archive = include_bytes!("data/casync.catar");
    for round in 0..500 {
        // Everything that memory does not hold comes from the store again, and every second answer is a failure.
        let fault = |_, n_before: u64| if n_before.is_multiple_of(2) { Fault::Fail } else { Fault::None };
        let blob = blob(archive, 1 << 16, fault);
        assert!(runtime.block_on(blob.read_at(0, 10)).is_err(), "round {round}");
        assert_eq!(runtime.block_on(blob.read_at(0, 10)).unwrap(), archive[..10], "round {round}");
    }
}

#[test]
fn a_plain_archive_that_is_cut_while_open_is_eio() {
    let runtime = Runtime::new().unwrap();
    let scratch = Scratch::new();
    let path = scratch.file("x.catar", include_bytes!("data/casync.catar"));
    let plan = MemoryPlan { tree: NO_MEMORY, ..MemoryPlan::new(16 << 20) };
    let report = Arc::new(Report::default());
    let opened = runtime
        .block_on(open_blob(
            &FileLocation::Local(path.clone()),
            &SourceConfig::default(),
            &plan,
            Duration::from_secs(30),
            &report,
        ))
        .unwrap();
    let tree = runtime.block_on(open_tree(opened, &plan)).unwrap();
    let volume = TreeVolume::new(Arc::new(tree), Show::default(), String::new(), report);
    let n_all = walk(&runtime, &volume, 100).unwrap().len();
    assert!(n_all > 5);
    fs::File::options().write(true).open(&path).unwrap().set_len(500).unwrap();
    match runtime.block_on(volume.readdir(ROOT_INO, 0, 100)).unwrap_err() {
        VolumeError::Io { site: EioSite::FileFailed, message } => assert!(message.contains("x.catar"), "{message}"),
        other => panic!("{other}"),
    }
    // The same bytes again are another version of the file all the same: nobody can know that they are the same.
    fs::write(&path, include_bytes!("data/casync.catar")).unwrap();
    let error = runtime.block_on(volume.readdir(ROOT_INO, 0, 100)).unwrap_err().to_string();
    assert!(error.contains("changed while in use"), "{error}");
}
