//! What happens when stores, indexes, archives or servers go wrong.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::blob::noise;
use crate::support::is_root;
use crate::support::mounted::{is_mountpoint, is_running};
use crate::support::run::{caifs, run};
use crate::support::scratch::Scratch;

use super::{can_mount, image, mount, mount_with};

#[test]
fn missing_and_bad_chunks_are_eio_and_the_rest_goes_on() {
    let content = noise(2_000_000);
    let Some((_scratch, index, store, mountpoint)) = image(&content) else { return };
    let ids = run(caifs().arg("list-chunks").arg(&index)).ok().text();
    let ids: Vec<&str> = ids.lines().collect();
    let path = |id: &str| store.join(&id[..4]).join(format!("{id}.cacnk"));
    let originals: Vec<Vec<u8>> = ids.iter().map(|id| fs::read(path(id)).unwrap()).collect();
    let rewrite = |id: &str, bytes: &[u8]| {
        let _ = fs::remove_file(path(id));
        fs::write(path(id), bytes).unwrap();
    };
    fs::remove_file(path(ids[1])).unwrap();
    rewrite(ids[3], b"");
    rewrite(ids[5], &originals[6]);
    rewrite(ids[7], &originals[7][..originals[7].len() / 2]);
    let mut flipped = originals[9].clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    rewrite(ids[9], &flipped);
    rewrite(ids[11], &[originals[11].as_slice(), b"more"].concat());
    let _mounted = mount_with(&index, Some(&store), &mountpoint, &["--memory", "16M"]).unwrap();
    let starts: Vec<u64> = {
        // The offsets of the chunks, from the index itself: 40-byte items after 64 bytes, each with the end first.
        let bytes = fs::read(&index).unwrap();
        let ends = (0..ids.len()).map(|i| u64::from_le_bytes(bytes[64 + 40 * i..][..8].try_into().unwrap()));
        std::iter::once(0).chain(ends).collect()
    };
    let disk = File::open(mountpoint.join("disk")).unwrap();
    nix::fcntl::posix_fadvise(&disk, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_RANDOM).unwrap();
    for (chunk_idx, window) in starts.windows(2).enumerate() {
        // A page that lies within the chunk.
        let offset = window[0].next_multiple_of(4096);
        if offset + 4096 > window[1] {
            continue;
        }
        let mut page = vec![0; 4096];
        let read = disk.read_exact_at(&mut page, offset);
        match [1, 3, 5, 7, 9, 11].contains(&chunk_idx) {
            true => assert_eq!(read.unwrap_err().raw_os_error(), Some(libc::EIO), "chunk {chunk_idx}"),
            false => {
                read.unwrap();
                assert!(page == content[offset as usize..][..4096], "chunk {chunk_idx}");
            }
        }
    }
    // What was wrong is not remembered.
    for (id, original) in ids.iter().zip(&originals) {
        rewrite(id, original);
    }
    assert!(fs::read(mountpoint.join("disk")).unwrap() == content);
}

#[test]
fn a_store_that_vanishes_is_eio_and_reads_resume_when_it_is_back() {
    let content = noise(2_000_000);
    let Some((scratch, index, store, mountpoint)) = image(&content) else { return };
    let _mounted = mount(&index, Some(&store), &mountpoint);
    let away = scratch.join("away");
    fs::rename(&store, &away).unwrap();
    let eio = || String::from_utf8(xattr::get(&mountpoint, "user.caifs.eio").unwrap().unwrap()).unwrap();
    assert_eq!(eio(), "0");
    assert_eq!(fs::read(mountpoint.join("disk")).unwrap_err().raw_os_error(), Some(libc::EIO));
    // Counted under the numbered site for a chunk that no store has.
    assert!(eio().contains("(01: "), "{}", eio());
    assert_eq!(mountpoint.join("disk").metadata().unwrap().len(), 2_000_000);
    assert!(nix::sys::statvfs::statvfs(&mountpoint).unwrap().blocks() > 0);
    fs::rename(&away, &store).unwrap();
    assert!(fs::read(mountpoint.join("disk")).unwrap() == content);
}

#[test]
fn a_changed_index_is_noticed() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    // Large enough to be mapped: some 30,000 chunks of fixed size.
    let blob = scratch.join("blob");
    File::create_new(&blob).unwrap().set_len(2 << 30).unwrap();
    let (index, store) = (scratch.join("disk.caibx"), scratch.join("disk.castr"));
    run(caifs().args(["make", "-m", "64:64:64", "-s"]).arg(&store).arg(&index).arg(&blob)).ok();
    assert!(index.metadata().unwrap().len() > 1 << 20);
    let mountpoint = scratch.dir("m");
    let _mounted = mount(&index, Some(&store), &mountpoint);
    let disk = File::open(mountpoint.join("disk")).unwrap();
    let mut byte = [9];
    disk.read_exact_at(&mut byte, 1 << 30).unwrap();
    assert_eq!(byte, [0]);
    File::options().write(true).open(&index).unwrap().set_len(1000).unwrap();
    // Not the end of the file: an error, also for reads that would lie within what the shorter index still describes.
    for offset in [(1 << 30) + (500 << 20), 4 << 20] {
        let after = disk.read_at(&mut byte, offset);
        assert_eq!(after.unwrap_err().raw_os_error(), Some(libc::EIO));
    }
}

#[test]
fn a_busy_mount_is_detached_by_sigterm_and_served_until_its_last_file_is_closed() {
    let content = noise(1_000_000);
    let Some((_scratch, index, store, mountpoint)) = image(&content) else { return };
    let mounted = mount(&index, Some(&store), &mountpoint);
    let disk = File::open(mountpoint.join("disk")).unwrap();
    let busy = run(caifs().arg("umount").arg(&mountpoint)).fails();
    assert!(busy.error_line().contains("in use"), "{}", busy.stderr);
    for &pid in mounted.pids() {
        kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    }
    let start = Instant::now();
    while is_mountpoint(&mountpoint) {
        assert!(start.elapsed() < Duration::from_secs(10), "still mounted");
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut last = [0; 1000];
    disk.read_exact_at(&mut last, 999_000).unwrap();
    assert!(last == content[999_000..]);
    drop(disk);
    assert!(mounted.end(), "the daemon goes on after the last file was closed");
}

#[test]
fn umount_returns_when_the_process_has_ended_and_not_for_one_of_two_places() {
    let content = noise(1_000_000);
    let Some((scratch, index, store, mountpoint)) = image(&content) else { return };
    let mounted = mount(&index, Some(&store), &mountpoint);
    let pids: Vec<Pid> = mounted.pids().iter().copied().map(Pid::from_raw).collect();
    let all = |signal| pids.iter().for_each(|&pid| kill(pid, signal).unwrap());

    // Who serves the mount at another place goes on, and is not waited for.
    let other = scratch.dir("other");
    if is_root() {
        nix::mount::mount(Some(&mountpoint), &other, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        let ended = run(caifs().arg("umount").arg(&other));
        let is_left = nix::mount::umount2(&other, MntFlags::MNT_DETACH).is_ok();
        ended.ok();
        assert!(!is_left && is_mountpoint(&mountpoint));
        assert!(pids.iter().all(|pid| is_running(pid.as_raw())));
    }

    // A process that cannot end is waited for.
    all(Signal::SIGSTOP);
    let mut waiting = caifs().arg("umount").arg(&mountpoint).spawn().unwrap();
    let start = Instant::now();
    while is_mountpoint(&mountpoint) {
        assert!(start.elapsed() < Duration::from_secs(10), "still mounted");
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(300));
    let ended_early = waiting.try_wait().unwrap();
    all(Signal::SIGCONT);
    let status = waiting.wait().unwrap();
    assert_eq!((ended_early, status.code()), (None, Some(0)));
    assert!(pids.iter().all(|pid| !is_running(pid.as_raw())), "umount returned before the process had ended");
}

#[test]
fn after_kill_9_the_same_place_can_be_mounted_again() {
    let content = noise(4_000_000);
    let Some((_scratch, index, store, mountpoint)) = image(&content) else { return };
    for round in 0..3 {
        let mut mounted = mount(&index, Some(&store), &mountpoint);
        // Under load: a reader that is in the middle of it.
        let disk = mountpoint.join("disk");
        let reader = std::thread::spawn(move || {
            let mut read = Vec::new();
            File::open(disk).and_then(|mut file| file.read_to_end(&mut read))
        });
        mounted.kill_server();
        let _ = reader.join().unwrap();
        // The kernel still knows the attributes, but nobody answers any more. It may notice while it asks, once.
        let ask = || nix::sys::statvfs::statvfs(&mountpoint).unwrap_err();
        let refused = Some(ask()).filter(|&errno| errno != Errno::ECONNABORTED).unwrap_or_else(ask);
        assert_eq!(refused, Errno::ENOTCONN, "round {round}");
        std::mem::forget(mounted);
    }
    let mounted = mount(&index, Some(&store), &mountpoint);
    assert!(fs::read(mountpoint.join("disk")).unwrap() == content);
    assert!(mounted.end());
    assert!(!is_mountpoint(&mountpoint));
}

#[test]
fn a_changed_archive_is_noticed() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let (source, mountpoint) = (scratch.dir("source"), scratch.dir("m"));
    fs::write(source.join("file"), noise(100_000)).unwrap();
    let archive = scratch.join("tree.catar");
    run(caifs().arg("tar").arg(&archive).arg(&source)).ok();
    let _mounted = mount(&archive, None, &mountpoint);
    File::options().write(true).open(&archive).unwrap().write_all_at(b"other", 50_000).unwrap();
    assert_eq!(fs::read(mountpoint.join("file")).unwrap_err().raw_os_error(), Some(libc::EIO));
}
