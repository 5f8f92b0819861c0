//! Warming into a backing file: it outlasts a disk that is full or fails for a while, and says in the end what is in the file.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::MsFlags;

use super::disk::{ThinDisk, mount_logged};
use super::{Ground, mount_fs, present, wait_until};
use crate::mount::{mount_with, n_fetches};
use crate::support::mounted::Mounted;
use crate::support::run::{caifs, run};

/// Mounts with a backing file that is warmed.
fn warm(ground: &Ground, mountpoint: &Path, backing: &Path, log: &Path) -> Mounted {
    mount_logged(ground, mountpoint, backing, log, ",warm=all")
}

fn has_logged(log: &Path, what: &str) -> bool {
    fs::read_to_string(log).is_ok_and(|text| text.contains(what))
}

/// What a warming says at its end, and of how many chunks how many are in the file then.
#[track_caller]
fn end_of_warming(log: &Path) -> (String, u64, u64) {
    const KEPT: &str = " chunks are in its backing file";
    let line = || fs::read_to_string(log).ok()?.lines().find(|line| line.ends_with(KEPT)).map(str::to_owned);
    wait_until("the warming ends", || line().is_some());
    let line = line().unwrap();
    let counts = line.strip_suffix(KEPT).unwrap().rsplit_once("; ").unwrap().1;
    let (n_present, n_chunks) = counts.split_once(" of ").unwrap();
    let (n_present, n_chunks) = (n_present.parse().unwrap(), n_chunks.parse().unwrap());
    (line, n_present, n_chunks)
}

#[test]
fn a_warming_waits_for_room_on_a_full_disk() {
    let Some(ground) = Ground::new(12_000_000) else { return };
    let Some(disk) = mount_fs(&ground, "small", "tmpfs", "size=4m") else { return };
    let (backing, log) = (disk.join("backing"), ground.scratch.join("log"));
    let mounted = warm(&ground, &ground.mountpoint, &backing, &log);
    wait_until("the disk is full", || has_logged(&log, "nothing is added until it works again"));
    assert_ne!(present(&ground.image()), "100");
    nix::mount::mount(Some("tmpfs"), &disk, None::<&str>, MsFlags::MS_REMOUNT, Some("size=64m")).unwrap();
    let (line, n_present, n_chunks) = end_of_warming(&log);
    assert!(n_present == n_chunks && n_chunks > 100, "{line}");
    wait_until("it is complete", || present(&ground.image()) == "100");
    assert!(mounted.end());
    assert!(fs::read(&backing).unwrap() == ground.content, "the backing file has other bytes");
}

/// An empty backing file on a disk, which has the names of its files whatever happens then.
fn new_backing_on(disk: &ThinDisk, ground: &Ground) -> PathBuf {
    let backing = disk.path.join("backing");
    let option = format!("backing={}", backing.display());
    assert!(mount_with(&ground.index, Some(&ground.store), &ground.mountpoint, &["-o", &option]).unwrap().end());
    nix::unistd::syncfs(fs::File::open(&disk.path).unwrap()).unwrap();
    backing
}

#[test]
fn a_warming_brings_to_the_disk_what_a_flush_could_not() {
    let Some(ground) = Ground::new(12_000_000) else { return };
    let Some(disk) = ThinDisk::new(&ground) else { return };
    let (backing, log) = (new_backing_on(&disk, &ground), ground.scratch.join("log"));
    disk.set_full(true);
    let mounted = warm(&ground, &ground.mountpoint, &backing, &log);
    wait_until("the flush fails", || has_logged(&log, "what was written since the last flush is fetched again"));
    disk.set_full(false);
    let (line, n_present, n_chunks) = end_of_warming(&log);
    assert!(n_present == n_chunks && n_chunks > 100, "{line}");
    wait_until("it is complete", || present(&ground.image()) == "100");
    assert!(mounted.end());
    // What only memory had is gone now.
    nix::mount::umount(&disk.path).unwrap();
    assert!(disk.mount());
    assert!(fs::read(&backing).unwrap() == ground.content, "the complete file has other bytes on the disk");
    nix::mount::umount(&disk.path).unwrap();
}

#[test]
fn what_a_flush_could_not_bring_to_the_disk_and_no_store_has_any_more_is_told() {
    let Some(ground) = Ground::new(12_000_000) else { return };
    let Some(disk) = ThinDisk::new(&ground) else { return };
    let (backing, log) = (new_backing_on(&disk, &ground), ground.scratch.join("log"));
    let ids = run(caifs().arg("list-chunks").arg(&ground.index)).ok().text();
    let first = ids.lines().next().unwrap();
    disk.set_full(true);
    let mounted = warm(&ground, &ground.mountpoint, &backing, &log);
    // What is filled first will be lost, and will not be fetched again before a second is over.
    wait_until("much is fetched", || n_fetches(&ground.mountpoint) > 40);
    fs::remove_file(ground.store.join(&first[..4]).join(format!("{first}.cacnk"))).unwrap();
    wait_until("the flush fails", || has_logged(&log, "what was written since the last flush is fetched again"));
    disk.set_full(false);
    let (line, n_present, n_chunks) = end_of_warming(&log);
    assert_eq!(n_present + 1, n_chunks, "{line}");
    assert!(line.contains("warmed, but 1 chunks could not be had, the first one: ") && line.contains(first), "{line}");
    assert!(mounted.end());
    nix::mount::umount(&disk.path).unwrap();
}

#[test]
fn a_warming_that_cannot_fill_the_file_says_so_and_how_much_is_in_it() {
    let Some(ground) = Ground::new(3_000_000) else { return };
    let (other, log) = (ground.scratch.dir("other"), ground.scratch.join("log"));
    let first = ground.mount("");
    let second = warm(&ground, &other, &ground.backing(), &log);
    let (line, n_present, n_chunks) = end_of_warming(&log);
    assert_eq!(n_present, 0, "{line}");
    let why = "the backing file takes nothing (its disk is full or fails, or another mount fills it); the rest is not fetched";
    assert!(
        line.contains(&format!("warmed, but {n_chunks} chunks could not be had, the first one: {why}; ")),
        "{line}"
    );
    assert!(second.end() && first.end());
}
