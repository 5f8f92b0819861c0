//! A backing file without a mount: what comes back, what is refused, and that no damage makes a wrong byte readable.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::time::SystemTime;

use tempfile::TempDir;

use super::state::BLOCK_BYTES;
use super::*;
use crate::format::index::{ChunkSizes, FLAG_SHA512_256, IndexHeader, encode};

/// An image of small chunks, some of them zeros.
pub(super) struct Image {
    pub(super) bytes: Vec<u8>,
    pub(super) index: Arc<Index<IndexBytes>>,
    pub(super) chunks: Vec<Chunk>,
}

impl Image {
    /// Chunks of 4096 bytes; each seventh is of zeros.
    pub(super) fn new(n_chunks: usize, seed: u8) -> Self {
        Self::of_chunks(n_chunks, seed, 4096)
    }

    pub(super) fn of_chunks(n_chunks: usize, seed: u8, n_bytes: usize) -> Self {
        let mut bytes = Vec::new();
        let mut chunks = Vec::new();
        let mut items = Vec::new();
        for chunk_idx in 0..n_chunks {
            let mut plain = vec![0; n_bytes];
            if chunk_idx % 7 != 3 {
                plain.fill(seed);
                plain[..8].copy_from_slice(&(chunk_idx as u64 + 1).to_le_bytes());
            }
            bytes.extend_from_slice(&plain);
            let chunk = Chunk::of(Digest::Sha512_256, plain.into());
            items.push((bytes.len() as u64, chunk.id()));
            chunks.push(chunk);
        }
        let sizes = ChunkSizes { min: n_bytes as u64, avg: n_bytes as u64, max: n_bytes as u64 };
        let header = IndexHeader { feature_flags: FLAG_SHA512_256, sizes };
        let encoded = encode(&header, items.iter().map(|(end, id)| (*end, id)));
        Self { bytes, index: Arc::new(Index::open(IndexBytes::Copied(encoded)).unwrap()), chunks }
    }

    fn open(&self, path: &Path) -> Result<Backing, BackingError> {
        self.open_with(path, 0)
    }

    fn open_with(&self, path: &Path, keep_free_bytes: u64) -> Result<Backing, BackingError> {
        let config = BackingConfig {
            file: BackingFile::At(path.to_owned()),
            keep_free_bytes,
            memory_bytes: 1 << 20,
            max_wait: Duration::from_secs(60),
        };
        Backing::open(Arc::clone(&self.index), &config, Arc::default())
    }

    fn fill(&self, backing: &Backing, chunks: impl IntoIterator<Item = usize>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        for chunk_idx in chunks {
            runtime.block_on(backing.offer(chunk_idx, &self.chunks[chunk_idx]));
        }
    }

    /// Offers chunks where nobody can wait.
    fn fill_at_once(&self, backing: &Backing, chunks: impl IntoIterator<Item = usize>) {
        for chunk_idx in chunks {
            let offered = futures_util::FutureExt::now_or_never(backing.offer(chunk_idx, &self.chunks[chunk_idx]));
            assert!(offered.is_some(), "somebody waits for the disk");
        }
    }

    /// Has a chunk written, and waits for it.
    fn keep(&self, backing: &Backing, chunk_idx: usize) -> bool {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(backing.keep(chunk_idx, &self.chunks[chunk_idx]))
    }

    /// Checks that whatever can be read is right; how many chunks can be.
    #[track_caller]
    fn check(&self, backing: &Backing) -> usize {
        let mut n_readable = 0;
        for (chunk_idx, chunk) in self.chunks.iter().enumerate() {
            let mut buffer = vec![9; 4096];
            match backing.held(chunk_idx) {
                Held::Yes => backing.read(&mut buffer, 4096 * chunk_idx as u64).unwrap(),
                Held::Claimed => match backing.check(&[chunk_idx]).pop().unwrap().1 {
                    Some(checked) => buffer.copy_from_slice(checked.plain()),
                    None => continue,
                },
                Held::No => continue,
            }
            assert!(buffer == *chunk.plain(), "chunk {chunk_idx} is wrong");
            n_readable += 1;
        }
        n_readable
    }
}

/// A directory in memory where there is one: these tests flush a lot.
fn directory() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// Ends it, and waits until all is written.
fn close(backing: Backing) {
    drop(backing);
}

#[track_caller]
fn refusal(opened: Result<Backing, BackingError>) -> String {
    match opened {
        Err(BackingError::Refused(why)) => why,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn what_was_kept_is_there_the_next_time_and_complete_when_all_is() {
    let (directory, image) = (directory(), Image::new(5000, 1));
    let path = directory.path().join("image");
    let backing = image.open(&path).unwrap();
    assert_eq!(backing.presence().per_myriad(), 0);
    image.fill(&backing, 0..2500);
    close(backing);
    let backing = image.open(&path).unwrap();
    let presence = backing.presence();
    assert_eq!((presence.n_present, presence.n_claimed, presence.per_myriad()), (2500, 0, 5000));
    assert_eq!(backing.present_chunks(), [Range { start: 0, end: 2500 }]);
    assert!(backing.has(2499) && !backing.has(2500));
    assert_eq!(image.check(&backing), 2500);
    assert!(backing.complete_file().is_none());
    image.fill(&backing, 2400..5000);
    close(backing);
    assert_eq!(fs::read(&path).unwrap(), image.bytes);
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!(metadata.mode() & 0o777, 0o600);
    assert!(metadata.blocks() * 512 < metadata.len() * 9 / 10, "chunks of zeros stay holes");
    let backing = image.open(&path).unwrap();
    assert!(backing.complete_file().is_some());
    assert_eq!(backing.presence().per_myriad(), 10_000);
    assert_eq!(image.check(&backing), 5000);
    // A complete file is locked by nobody.
    assert!(image.open(&path).unwrap().complete_file().is_some());
}

#[test]
fn no_damage_to_the_state_makes_a_wrong_byte_readable() {
    let (directory, image) = (directory(), Image::new(40, 1));
    let path = directory.path().join("image");
    let backing = image.open(&path).unwrap();
    image.fill(&backing, (0..40).filter(|chunk_idx| chunk_idx % 2 == 0));
    close(backing);
    let state = place::state_path(&path);
    let right = fs::read(&state).unwrap();
    assert_eq!(right.len(), 3 * BLOCK_BYTES);
    let file = fs::OpenOptions::new().write(true).open(&state).unwrap();
    let (mut n_refused, mut n_believed) = (0, 0);
    let mut try_with = |damaged: &[u8]| {
        // In place, so that it is the file it was.
        file.set_len(0).unwrap();
        file.write_all_at(damaged, 0).unwrap();
        match image.open(&path) {
            Ok(backing) => {
                let n_readable = image.check(&backing);
                // Zeros are found where a claim says so, and rightly: they are not there, and they are right.
                assert!(n_readable <= 20 + 3, "{n_readable}");
                n_believed += 1;
            }
            Err(BackingError::Refused(why)) => {
                assert!(why.contains("remove it and"), "{why}");
                n_refused += 1;
            }
            Err(other) => panic!("{other}"),
        }
    };
    for at in 0..right.len() {
        let mut damaged = right.clone();
        damaged[at] ^= 1 << (at % 8);
        try_with(&damaged);
        // An empty one is made by whoever then finds it a file that is none of ours.
        try_with(&right[..at]);
    }
    assert_eq!(n_refused, 2 * BLOCK_BYTES);
    assert_eq!(n_believed, 4 * BLOCK_BYTES);
}

#[test]
fn a_file_of_another_image_is_refused_and_left_as_it_is() {
    let (directory, image) = (directory(), Image::new(100, 1));
    let path = directory.path().join("image");
    let backing = image.open(&path).unwrap();
    image.fill(&backing, 0..50);
    close(backing);
    let state = place::state_path(&path);
    let before = (fs::read(&path).unwrap(), fs::read(&state).unwrap());
    let refusals = [
        (Image::new(100, 2), "is of an image with other content"),
        (Image::new(99, 1), "is of an image of 409600 bytes"),
    ];
    for (other, why) in refusals {
        let shown = refusal(other.open(&path));
        let (path, state) = (path.display(), state.display());
        assert_eq!(shown, format!("{state} {why}: remove it and {path}, or name another file"));
    }
    assert_eq!((fs::read(&path).unwrap(), fs::read(&state).unwrap()), before);
}

#[test]
fn what_was_copied_or_changed_meanwhile_is_hashed_first() {
    let (directory, image) = (directory(), Image::new(100, 1));
    let (path, copy) = (directory.path().join("image"), directory.path().join("copy"));
    let backing = image.open(&path).unwrap();
    image.fill(&backing, 0..100);
    close(backing);
    fs::copy(&path, &copy).unwrap();
    fs::copy(place::state_path(&path), place::state_path(&copy)).unwrap();
    let changed = fs::OpenOptions::new().write(true).open(&copy).unwrap();
    changed.write_all_at(b"rubbish", 4096 * 30 + 100).unwrap();
    let backing = image.open(&copy).unwrap();
    assert!(backing.complete_file().is_none());
    assert_eq!(image.check(&backing), 99);
    assert!(!backing.has(30));
    image.fill(&backing, [30]);
    close(backing);
    assert_eq!(fs::read(&copy).unwrap(), image.bytes);
    assert!(image.open(&copy).unwrap().complete_file().is_some(), "checked once, and no more");
    // The same inode with another time.
    changed.write_all_at(b"rubbish", 0).unwrap();
    changed.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    let backing = image.open(&copy).unwrap();
    assert_eq!(image.check(&backing), 99);
}

#[test]
fn a_state_without_its_file_counts_for_nothing() {
    let (directory, image) = (directory(), Image::new(3000, 1));
    let path = directory.path().join("image");
    for recreated in [false, true] {
        let backing = image.open(&path).unwrap();
        image.fill(&backing, 0..2000);
        close(backing);
        fs::remove_file(&path).unwrap();
        if recreated {
            // By somebody who thinks that this is what is lacking; of the right length and all zeros.
            let file = File::create(&path).unwrap();
            file.set_permissions(fs::Permissions::from_mode(0o600)).unwrap();
            file.set_len(image.bytes.len() as u64).unwrap();
        }
        let backing = image.open(&path).unwrap();
        assert_eq!(backing.presence().n_present, 0);
        let n_zero_chunks = (0..2000).filter(|chunk_idx| chunk_idx % 7 == 3).count();
        assert_eq!(image.check(&backing), if recreated { n_zero_chunks } else { 0 });
        image.fill(&backing, 0..10);
        close(backing);
        assert!(image.check(&image.open(&path).unwrap()) >= 10);
        fs::remove_file(&path).unwrap();
        fs::remove_file(place::state_path(&path)).unwrap();
    }
}

#[test]
fn a_file_that_others_can_write_is_refused() {
    let (directory, image) = (directory(), Image::new(10, 1));
    let path = directory.path().join("image");
    close(image.open(&path).unwrap());
    for file in [path.clone(), place::state_path(&path)] {
        fs::set_permissions(&file, fs::Permissions::from_mode(0o620)).unwrap();
        assert!(
            refusal(image.open(&path))
                .ends_with("can be written by others (mode 0620): chmod 600 it if its content is to be trusted")
        );
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::chown(&file, Some(77), None).unwrap();
            assert!(refusal(image.open(&path)).contains("belongs to user 77"));
            std::os::unix::fs::chown(&file, Some(0), None).unwrap();
        }
    }
    let link = directory.path().join("link");
    symlink(&path, &link).unwrap();
    assert!(refusal(image.open(&link)).ends_with("is not a regular file"));
    symlink(place::state_path(&path), place::state_path(&link)).unwrap();
    assert!(refusal(image.open(&link)).ends_with("is a symbolic link: name the file itself"));
    assert!(refusal(image.open(directory.path())).contains("not a regular file"));
    assert!(refusal(image.open(&directory.path().join("no/such"))).contains("No such file"));
}

#[test]
fn the_second_to_open_it_reads_what_the_first_has() {
    let (directory, image) = (directory(), Image::new(100, 1));
    let path = directory.path().join("image");
    let first = image.open(&path).unwrap();
    image.fill(&first, 0..50);
    close(first);
    let first = image.open(&path).unwrap();
    let second = image.open(&path).unwrap();
    assert!(!second.presence().is_filled && first.presence().is_filled);
    assert_eq!(image.check(&second), 50);
    image.fill(&second, 50..100);
    close(second);
    image.fill(&first, 50..70);
    close(first);
    assert_eq!(image.check(&image.open(&path).unwrap()), 70);
}

#[test]
fn a_file_of_desync_is_taken_over_with_its_state_only() {
    let (directory, image) = (directory(), Image::new(5003, 1));
    let path = directory.path().join("image");
    let foreign = || {
        // What desync says is there, with one chunk wrong, and rubbish where a chunk of zeros belongs.
        let mut bytes = image.bytes[..4096 * 2100].to_vec();
        bytes[4096 * 5] ^= 1;
        bytes.resize(image.bytes.len(), 0);
        bytes[4096 * 2110] = 7;
        assert_eq!(2110 % 7, 3);
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    };
    foreign();
    let before = fs::read(&path).unwrap();
    assert!(refusal(image.open(&path)).contains("nothing says what is in it"));
    let mut bits = vec![0u8; 5003usize.div_ceil(8)];
    bits[..2100 / 8].fill(0xff);
    fs::write(directory.path().join("image.state"), &bits[1..]).unwrap();
    assert!(refusal(image.open(&path)).ends_with("(it has 625 bytes instead of 626)"));
    assert_eq!(fs::read(&path).unwrap(), before);
    fs::write(directory.path().join("image.state"), &bits).unwrap();
    let backing = image.open(&path).unwrap();
    // And the chunks of zeros after it, which desync does not note, but for one that is none.
    let n_right = 2100 / 8 * 8 + (2100 / 8 * 8..5003).filter(|chunk_idx| chunk_idx % 7 == 3).count() - 2;
    assert_eq!(image.check(&backing), n_right);
    image.fill(&backing, 0..5003);
    close(backing);
    assert_eq!(fs::read(&path).unwrap(), image.bytes, "also where zeros belong");
    assert!(image.open(&path).unwrap().complete_file().is_some());
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    // Without a reader the claims are checked in the background.
    for name in ["image", "image.caifs"] {
        fs::remove_file(directory.path().join(name)).unwrap();
    }
    foreign();
    let backing = image.open(&path).unwrap();
    while backing.presence().n_claimed > 0 {
        std::thread::yield_now();
    }
    assert_eq!(image.check(&backing), n_right);
    fs::write(&path, b"short").unwrap();
    fs::remove_file(place::state_path(&path)).unwrap();
    assert!(refusal(image.open(&path)).contains("is there and no copy of this image (it has 5 bytes"));
}

#[test]
fn nothing_is_added_below_the_reserve_and_nobody_waits_for_it() {
    let (directory, image) = (directory(), Image::new(1000, 1));
    let path = directory.path().join("image");
    let backing = image.open_with(&path, u64::MAX).unwrap();
    // Zeros need no room.
    assert!(image.keep(&backing, 3), "the first chunk of zeros");
    assert!(!image.keep(&backing, 0), "who can wait is told that it was not written");
    // Nobody could wait: the runtime of this has no time at all.
    image.fill_at_once(&backing, 0..1000);
    close(backing);
    let backing = image.open(&path).unwrap();
    let n_present = backing.presence().n_present;
    assert!((1..=1000 / 7 + 1).contains(&n_present), "{n_present}");
    assert_eq!(image.check(&backing), n_present as usize);
}

#[test]
fn who_waits_hears_of_every_chunk_and_the_queue_may_be_full() {
    let (directory, image) = (directory(), Image::new(2000, 1));
    let backing = image.open(&directory.path().join("image")).unwrap();
    assert!((0..2000).all(|chunk_idx| image.keep(&backing, chunk_idx)));
    assert!(image.keep(&backing, 7), "it is there already");
    assert_eq!(backing.presence().n_present, 2000);
    // Complete or about to be: nothing more is taken.
    assert!(image.keep(&backing, 8));
}

#[test]
fn who_asks_for_a_flush_finds_on_the_disk_what_was_written_before() {
    let (directory, image) = (directory(), Image::new(100, 1));
    let backing = image.open(&directory.path().join("image")).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    for chunks in [0..20, 20..20, 20..50] {
        assert!(chunks.clone().all(|chunk_idx| image.keep(&backing, chunk_idx)));
        assert!(chunks.clone().all(|chunk_idx| backing.held(chunk_idx) == Held::Claimed), "not flushed yet");
        let n_losses = runtime.block_on(backing.flushed());
        assert!((0..chunks.end).all(|chunk_idx| backing.held(chunk_idx) == Held::Yes));
        assert_eq!(n_losses, 0);
    }
    // The thread ends with the last chunk.
    image.fill(&backing, 50..100);
    runtime.block_on(backing.flushed());
    assert!((0..100).all(|chunk_idx| backing.held(chunk_idx) == Held::Yes));
    runtime.block_on(backing.flushed());
}

#[test]
fn what_an_earlier_file_left_in_the_state_is_gone_before_a_new_one_has_its_length() {
    let (directory, image) = (directory(), Image::new(100, 1));
    let path = directory.path().join("image");
    let backing = image.open(&path).unwrap();
    image.fill(&backing, 0..50);
    close(backing);
    let identity = identity_of(&image.index).unwrap();
    // As a process leaves it that is killed while it fills.
    let state = fs::OpenOptions::new().read(true).write(true).open(place::state_path(&path)).unwrap();
    let mut block = vec![0; BLOCK_BYTES];
    state.read_exact_at(&mut block, BLOCK_BYTES as u64).unwrap();
    let condition = state::Condition::decode(&block, identity.seed()).unwrap();
    let condition = state::Condition { is_complete: false, changed: None, ..condition };
    state.write_all_at(&condition.encode(identity.seed()), BLOCK_BYTES as u64).unwrap();
    drop(state);
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(0).unwrap();
    let place = place::open(&path, &identity, &|_| false).unwrap();
    // Killed here, before anything was written of the new file.
    drop(place);
    let backing = image.open(&path).unwrap();
    assert_eq!(backing.presence().n_present, 0, "holes are not taken for chunks");
    assert!(image.check(&backing) <= 100 / 7 + 1, "but for those of zeros");
}

#[test]
fn a_file_that_gets_shorter_loses_what_was_there() {
    let (directory, image) = (directory(), Image::new(100, 1));
    let path = directory.path().join("image");
    let backing = image.open(&path).unwrap();
    image.fill(&backing, 0..50);
    close(backing);
    let backing = image.open(&path).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(4096 * 20).unwrap();
    let mut buffer = [0; 4096];
    let error = backing.read(&mut buffer, 4096 * 30).unwrap_err();
    backing.lost(30, &error);
    assert!(!backing.has(30) && backing.has(10));
    image.fill(&backing, [30]);
    close(backing);
    let why = refusal(image.open(&path));
    assert!(why.contains("bytes and the image 409600: remove it and"), "{why}");
}

#[test]
fn an_index_is_known_by_all_its_bytes() {
    let (image, other) = (Image::new(20_000, 1), Image::new(20_000, 2));
    let identity = identity_of(&image.index).unwrap();
    let whole = Digest::Sha256.id(image.index.source().as_ref());
    assert_eq!((identity.index, identity.n_chunks, identity.size), (whole.0, 20_000, 20_000 * 4096));
    let other = identity_of(&other.index).unwrap();
    assert_eq!(other.layout, identity.layout);
    assert_ne!(other.index, identity.index);
    assert_ne!(identity_of(&Image::new(19_999, 1).index).unwrap().layout, identity.layout);
}
