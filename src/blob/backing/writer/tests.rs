//! The thread's work step by step, on files that really fail: one that cannot be flushed, and one that cannot grow.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64};

use nix::fcntl::{FcntlArg, FlockArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::super::identity_of;
use super::super::state::{BLOCK_CHUNKS, decode_map_block};
use super::super::tests::Image;
use super::*;

/// A file in memory of this length.
fn file(n_bytes: u64) -> File {
    let fd = memfd_create(c"test", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    let file = File::from(fd);
    file.set_len(n_bytes).unwrap();
    file
}

/// A file that takes every write, and says of each flush that it failed.
fn unflushable() -> Flock<File> {
    let null = File::options().read(true).write(true).open("/dev/null").unwrap();
    assert_eq!(null.sync_data().unwrap_err().raw_os_error(), Some(libc::EINVAL));
    Flock::lock(null, FlockArg::LockSharedNonblock).unwrap()
}

fn locked(file: &File) -> Flock<File> {
    Flock::lock(file.try_clone().unwrap(), FlockArg::LockExclusiveNonblock).unwrap()
}

/// A thread's work on a file of which nothing is there yet, without the thread.
fn writer(image: &Image, data: File, state: Flock<File>) -> Writer {
    let map = Map::new(image.chunks.len());
    map.all_dirty();
    let shared = Shared {
        index: Arc::clone(&image.index),
        digest: image.index.digest(),
        identity: identity_of(&image.index).unwrap(),
        path: "backing".into(),
        data: Arc::new(data),
        map: Some(map),
        is_complete: AtomicBool::new(false),
        report: Arc::default(),
        opened: Instant::now(),
        last_read_ms: AtomicU64::new(0),
        is_faced: Default::default(),
        n_forgotten: AtomicU64::new(0),
        max_wait: Duration::ZERO,
    };
    let (_, inbox, _) = Queue::new(1 << 20, Duration::ZERO);
    Writer::new(Arc::new(shared), state, false, 0, inbox)
}

/// How many blocks of the map a state has, and whether it says that it is of a file.
fn blocks(state: &File, writer: &Writer) -> (usize, Option<Condition>) {
    let mut block = [0; BLOCK_BYTES];
    let mut read = |at| state.read_exact_at(&mut block, at).map(|()| block).unwrap_or([0; BLOCK_BYTES]);
    let condition = Condition::decode(&read(BLOCK_BYTES as u64), writer.seed);
    let n_blocks =
        (0..10).filter(|&map_block| decode_map_block(&read(map_block_at(map_block)), map_block, writer.seed).is_some());
    (n_blocks.count(), condition)
}

/// Room for whatever comes at once: where these files lie, nobody tells how much there is.
fn make_room(writer: &mut Writer) {
    (writer.keep_free_bytes, writer.free) = (0, Some((Instant::now(), 1 << 40)));
}

fn rest(writer: &Writer) {
    assert!(writer.inbox.rest.is_on());
    std::thread::sleep(writer.inbox.rest.left());
    while writer.inbox.rest.is_on() {
        std::thread::yield_now();
    }
}

#[test]
fn a_state_that_cannot_be_flushed_is_written_again_as_a_whole() {
    let n_chunks = 2 * BLOCK_CHUNKS + 5;
    let image = Image::new(n_chunks, 1);
    let mut writer = writer(&image, file(image.bytes.len() as u64), unflushable());
    // All of it is written, and none of that counts.
    writer.settle();
    assert!(!writer.is_introduced);
    assert_eq!(writer.shared.report.n_backing_errors.get(), 1);
    assert!(writer.patience().is_some(), "it is tried again, also when nobody comes");
    rest(&writer);
    let state = file(0);
    writer.state = locked(&state);
    writer.settle();
    assert!(writer.is_introduced);
    let (n_blocks, condition) = blocks(&state, &writer);
    assert_eq!((n_blocks, condition.map(|condition| condition.is_complete)), (3, Some(false)));
    assert_eq!(writer.patience(), None, "nothing is left to do");

    // Later: blocks that were taken before and never flushed are lost with the others.
    make_room(&mut writer);
    assert!(writer.keep(1, &image.chunks[1]).unwrap());
    writer.begin_flush();
    let flushed = writer.shared.data.sync_data();
    writer.flushed(flushed);
    writer.settle();
    writer.state = unflushable();
    writer.end().unwrap_err();
    assert!(!writer.is_introduced);
    let state = file(0);
    writer.state = locked(&state);
    writer.end().unwrap();
    let (n_blocks, condition) = blocks(&state, &writer);
    assert_eq!(n_blocks, 3);
    assert!(condition.is_some_and(|condition| condition.changed.is_some()), "it was closed in order");
}

#[test]
fn a_state_that_was_never_flushed_does_not_say_of_which_file_it_is() {
    let image = Image::new(10, 1);
    let mut writer = writer(&image, file(image.bytes.len() as u64), unflushable());
    for _ in 0..2 {
        writer.introduce().unwrap_err();
        assert!(!writer.is_introduced);
        assert_eq!(writer.shared.map().unwrap().take_dirty().len(), 1, "all of it is to be written again");
    }
}

#[test]
fn a_claim_that_is_half_written_over_is_no_claim_any_more() {
    const N_BYTES: usize = 16384;
    let image = Image::of_chunks(3, 1, N_BYTES);
    let data = file(N_BYTES as u64 * 3 / 2);
    data.write_all_at(&vec![7; N_BYTES * 3 / 2], 0).unwrap();
    fcntl(data.as_fd(), FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW)).unwrap();
    let mut writer = writer(&image, data, locked(&file(0)));
    let shared = Arc::clone(&writer.shared);
    let map = shared.map().unwrap();
    for chunk_idx in 0..3 {
        assert!(map.change(chunk_idx, State::Absent, State::Claimed));
    }
    make_room(&mut writer);
    let error = writer.keep(1, &image.chunks[1]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    let mut half = vec![0; N_BYTES / 2];
    shared.data.read_exact_at(&mut half, N_BYTES as u64).unwrap();
    assert!(half == image.chunks[1].plain()[..N_BYTES / 2], "half of it is written");
    assert_eq!(map.state(1), State::Absent);
    // Somebody has hashed what was there before.
    writer.take(Message::Verified(1, shared.n_forgotten()));
    assert_eq!(map.state(1), State::Absent);
    writer.take(Message::Verified(2, shared.n_forgotten()));
    assert_eq!((map.state(0), map.state(2)), (State::Claimed, State::Written));
    // What there is no room for leaves what was there as it is.
    writer.keep_free_bytes = u64::MAX;
    assert_eq!(writer.keep(0, &image.chunks[0]).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    assert_eq!(map.state(0), State::Claimed);
}

#[test]
fn only_what_the_disk_took_ends_the_doubling_of_the_rests() {
    let image = Image::new(20, 1);
    let mut writer = writer(&image, file(image.bytes.len() as u64), locked(&file(0)));
    writer.settle();
    writer.keep_free_bytes = u64::MAX;
    let error = writer.keep(0, &image.chunks[0]).unwrap_err();
    writer.cannot_add(&error);
    assert_eq!(writer.pause, FIRST_REST);
    assert!(!writer.keep(3, &image.chunks[3]).unwrap(), "zeros need nothing");
    assert!(!writer.keep(3, &image.chunks[3]).unwrap(), "it is there already");
    writer.cannot_add(&error);
    assert_eq!(writer.pause, 2 * FIRST_REST);
    make_room(&mut writer);
    assert!(writer.keep(0, &image.chunks[0]).unwrap());
}
