//! Backing files on disks that are full, that fail when they are flushed, and that do not answer.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;

use super::{Ground, mount_fs, present, wait_until};
use crate::mount::mount_with;
use crate::support::mounted::{Mounted, unmount};
use crate::support::peers::{missing, peer};
use crate::support::run::{command, run};

#[test]
fn a_full_disk_ends_the_filling_and_nothing_else() {
    let Some(ground) = Ground::new(12_000_000) else { return };
    let Some(disk) = mount_fs(&ground, "small", "tmpfs", "size=4m") else { return };
    // Full by itself, and full but for what is to stay free.
    for options in [",cache-keep-free=0", ",cache-keep-free=2M", ""] {
        let backing = disk.join("backing");
        let option = format!("backing={}{options}", backing.display());
        let mounted = mount_with(&ground.index, Some(&ground.store), &ground.mountpoint, &["-o", &option]).unwrap();
        for _ in 0..2 {
            ground.check_all();
        }
        assert_eq!(xattr::get(&ground.mountpoint, "user.caifs.eio").unwrap().unwrap(), b"0");
        assert_ne!(present(&ground.image()), "100");
        assert!(mounted.end());
        let mounted = mount_with(&ground.index, Some(&ground.store), &ground.mountpoint, &["-o", &option]).unwrap();
        ground.check_all();
        assert!(mounted.end());
        let used = fs::metadata(&backing).unwrap().blocks() * 512;
        let most = match options {
            ",cache-keep-free=0" => 4 << 20,
            ",cache-keep-free=2M" => 2 << 20,
            _ => 0,
        };
        assert!(used <= most && used >= most / 2, "{options}: {used}");
        fs::remove_file(&backing).unwrap();
        fs::remove_file(disk.join("backing.caifs")).unwrap();
    }
    // No room even for the state.
    fs::write(disk.join("filler"), vec![1; 5 << 20]).unwrap_err();
    let option = format!("backing={}", disk.join("backing").display());
    let mounted = mount_with(&ground.index, Some(&ground.store), &ground.mountpoint, &["-o", &option]).unwrap();
    ground.check_all();
    assert!(mounted.end());
}

/// ext4 in a file on a tmpfs, which can be full while the ext4 believes it has room: what was written to it fails when it is flushed.
pub(super) struct ThinDisk {
    tmpfs: PathBuf,
    pub(super) path: PathBuf,
}

impl ThinDisk {
    pub(super) fn new(ground: &Ground) -> Option<Self> {
        let tmpfs = mount_fs(ground, "thin", "tmpfs", "size=24m")?;
        let image = tmpfs.join("ext4");
        File::create(&image).unwrap().set_len(64 << 20).unwrap();
        // Without a journal, whose failure would end all writing for good.
        // A block is as long as what the tmpfs gives out, so that a new one always takes room.
        let options = ["-q", "-F", "-b", "4096", "-O", "^has_journal", "-E", "lazy_itable_init=0"];
        run(command("mkfs.ext4", options).arg(&image)).ok();
        let disk = Self { tmpfs, path: ground.scratch.dir("on-thin") };
        match disk.mount() {
            true => Some(disk),
            false => {
                missing("a loop device with ext4");
                None
            }
        }
    }

    pub(super) fn mount(&self) -> bool {
        let mut mount = command("mount", ["-t", "ext4", "-o", "loop,errors=continue"]);
        run(mount.arg(self.tmpfs.join("ext4")).arg(&self.path)).status.success()
    }

    /// Takes all the room, or gives it back.
    pub(super) fn set_full(&self, is_full: bool) {
        let filler = self.tmpfs.join("filler");
        match is_full {
            true => drop(fs::write(&filler, vec![1; 64 << 20]).unwrap_err()),
            false => fs::remove_file(&filler).unwrap(),
        }
    }

    /// Whatever is written to it waits, until what this gives is dropped.
    fn freeze(&self) -> Frozen<'_> {
        run(command("fsfreeze", ["-f"]).arg(&self.path)).ok();
        Frozen(self)
    }
}

/// A disk that does not answer. Nothing can end who waits for it, so it must answer again whatever becomes of the test.
struct Frozen<'a>(&'a ThinDisk);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        run(command("fsfreeze", ["-u"]).arg(&self.0.path));
    }
}

#[test]
fn what_a_flush_could_not_bring_to_the_disk_is_written_again() {
    let Some(ground) = Ground::new(12_000_000) else { return };
    let Some(disk) = ThinDisk::new(&ground) else { return };
    let log = ground.scratch.join("log");
    let backing = disk.path.join("backing");
    let option = format!("backing={},cache-keep-free=0,log={}", backing.display(), log.display());
    for ends_between in [false, true] {
        let mount = || mount_with(&ground.index, Some(&ground.store), &ground.mountpoint, &["-o", &option]).unwrap();
        let mut mounted = mount();
        // The names of the new files are on the disk before it is full.
        nix::unistd::syncfs(File::open(&disk.path).unwrap()).unwrap();
        disk.set_full(true);
        ground.check_all();
        match ends_between {
            // The mount itself hears of it when it ends.
            true => {
                assert!(mounted.end());
                disk.set_full(false);
                mounted = mount();
            }
            false => {
                wait_until("the flush fails", || fs::read_to_string(&log).unwrap().contains("os error"));
                disk.set_full(false);
            }
        }
        wait_until("the backing file is complete", || {
            // What the kernel has of the image is not asked for.
            let file = File::open(ground.image()).unwrap();
            nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
            ground.check_all();
            present(&ground.image()) == "100"
        });
        assert!(mounted.end());
        // What only memory had is gone now.
        nix::mount::umount(&disk.path).unwrap();
        assert!(disk.mount());
        let right = fs::read(&backing).unwrap() == ground.content;
        assert!(right, "the complete file has other bytes on the disk (ended between: {ends_between})");
        fs::remove_file(&backing).unwrap();
        fs::remove_file(disk.path.join("backing.caifs")).unwrap();
    }
    nix::mount::umount(&disk.path).unwrap();
}

/// Mounts with a backing file on a disk all of which it may use, and more options. What is said before the mount goes into the background
/// is in the log as well.
pub(super) fn mount_logged(ground: &Ground, mountpoint: &Path, backing: &Path, log: &Path, options: &str) -> Mounted {
    let option = format!("backing={},cache-keep-free=0,log={}{options}", backing.display(), log.display());
    let script = format!("exec \"$0\" \"$@\" 2>>{}", log.display());
    let mut mount = command("sh", ["-c", &script, env!("CARGO_BIN_EXE_caifs"), "mount", "-v", "-o", &option, "-s"]);
    mount.arg(&ground.store).arg(&ground.index).arg(mountpoint);
    Mounted::by_command(&mut mount, mountpoint).unwrap()
}

#[test]
fn a_disk_that_does_not_answer_is_told_of_at_the_end() {
    let Some(ground) = Ground::new(2_000_000) else { return };
    let (Some(disk), Some(_)) = (ThinDisk::new(&ground), peer("fsfreeze")) else { return };
    let (backing, log) = (disk.path.join("backing"), ground.scratch.join("log"));
    let option = format!("backing={},cache-keep-free=0,log={}", backing.display(), log.display());
    let mounted = mount_with(&ground.index, Some(&ground.store), &ground.mountpoint, &["-o", &option]).unwrap();
    let frozen = disk.freeze();
    ground.check_all();
    const WHY: &str = "its disk does not answer; it was not closed in order";
    thread::scope(|scope| {
        scope.spawn(|| unmount(&ground.mountpoint));
        wait_until("it is told of", || fs::read_to_string(&log).unwrap().contains(WHY));
    });
    drop(frozen);
    assert!(mounted.end());
    assert_eq!(fs::read_to_string(&log).unwrap().matches(WHY).count(), 1);
    // Nothing wrong comes of it.
    let mounted = mount_with(&ground.index, Some(&ground.store), &ground.mountpoint, &["-o", &option]).unwrap();
    ground.check_all();
    wait_until("the backing file is complete", || present(&ground.image()) == "100");
    assert!(mounted.end());
    assert!(fs::read(&backing).unwrap() == ground.content, "the backing file has other bytes");
    nix::mount::umount(&disk.path).unwrap();
}
