//! What is in a backing file is not fetched for anybody, and is read like everything else for who records.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::Path;

use super::{Ground, PROBE_BYTES, is_passed_through, open_passed_through, present, wait_until};
use crate::mount::{mount, mount_with, n_fetches};
use crate::support::mounted::Mounted;

/// Reads all in order and ends the mount. How many chunks were fetched for that, also by what reads ahead.
fn n_fetched(ground: &Ground, mounted: Mounted) -> u64 {
    ground.check_all();
    let n_fetches = n_fetches(&ground.mountpoint);
    assert!(mounted.end());
    n_fetches
}

#[test]
fn what_is_in_the_file_is_not_read_ahead() {
    let Some(ground) = Ground::new(6_000_000) else { return };
    let n_all = n_fetched(&ground, mount(&ground.index, Some(&ground.store), &ground.mountpoint));
    assert!(n_all > 200, "{n_all}");
    // A part of it, and nothing that was not asked for, by the kernel neither.
    let mounted = ground.mount(",read-ahead=0");
    let file = File::open(ground.image()).unwrap();
    nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_RANDOM).unwrap();
    ground.check(&file, 0..1_000_000);
    drop(file);
    let n_first = n_fetches(&ground.mountpoint);
    assert!(mounted.end());
    assert_eq!(n_fetched(&ground, ground.mount(",passthrough=no")), n_all - n_first);
    assert_eq!(n_fetched(&ground, ground.mount(",passthrough=no")), 0);
}

/// The chunks that a profile names.
fn named(profile: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(profile).unwrap();
    text.lines().skip(1).map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
}

#[test]
fn what_is_read_from_the_file_is_recorded_and_not_replayed() {
    let Some(ground) = Ground::new(6_000_000) else { return };
    let profiles = ["cold", "half", "full"].map(|name| ground.scratch.join(name));
    let record = |profile: &Path| ground.mount(&format!(",record={}", profile.display()));
    let mounted = record(&profiles[0]);
    ground.complete();
    assert!(mounted.end());
    let all = named(&profiles[0]);
    assert!(all.len() > 200, "{}", all.len());

    let mounted = record(&profiles[2]);
    let file = File::open(ground.image()).unwrap();
    assert!(!is_passed_through(&mounted, &file, PROBE_BYTES), "nobody would hear of it");
    ground.check_all();
    drop(file);
    assert!(mounted.end());
    assert!(named(&profiles[2]) == all, "{} chunks", named(&profiles[2]).len());

    // Without the recording the kernel reads it, and a replay finds all of it there.
    let log = ground.scratch.join("log");
    let (backing, profile, log_to) = (ground.backing(), profiles[0].display(), log.display());
    let options = format!("backing={},profile={profile},log={log_to}", backing.display());
    let options = ["-v", "-o", &options];
    let mounted = mount_with(&ground.index, Some(&ground.store), &ground.mountpoint, &options).unwrap();
    drop(open_passed_through(&mounted, &ground.image()));
    wait_until("it is replayed", || fs::read_to_string(&log).unwrap().contains(": replayed: "));
    assert_eq!(n_fetches(&ground.mountpoint), 0);
    assert!(mounted.end());

    // Half of it, and then the rest as well.
    for name in ["backing", "backing.caifs"] {
        fs::remove_file(ground.scratch.join(name)).unwrap();
    }
    let mounted = ground.mount("");
    ground.check(&File::open(ground.image()).unwrap(), 0..3_000_000);
    assert!(mounted.end());
    let mounted = record(&profiles[1]);
    assert_ne!(present(&ground.image()), "100");
    ground.check_all();
    assert!(mounted.end());
    assert!(named(&profiles[1]) == all, "{} chunks", named(&profiles[1]).len());
}
