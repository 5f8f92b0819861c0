//! Profiles: recorded by a mount, merged, shown, and replayed by the next mount and for the next version.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{Ground, until};
use crate::cli::one_line;
use crate::mount::{can_mount, n_fetches};
use crate::support::blob::noise;
use crate::support::mounted::Mounted;
use crate::support::run::{caifs, run};

/// The ids that a profile lists.
fn ids_of(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap();
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("caifs-profile 1"));
    lines.map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
}

/// Reads 64 KiB at some places, with nothing of the kernel's between.
fn touch(ground: &Ground, places_mib: &[u64]) {
    let file = fs::File::open(ground.mnt.join("disk")).unwrap();
    let mut piece = vec![0; 65536];
    places_mib.iter().for_each(|place| file.read_exact_at(&mut piece, place << 20).unwrap());
}

#[test]
fn of_a_profile_that_is_too_long_for_the_memory_the_first_chunks_are_replayed() {
    if !can_mount() {
        return;
    }
    let Some(ground) = Ground::new() else { return };
    let ids = ground.make("disk.caibx", &noise(1 << 20));
    // Those of the image first, and then more than there is memory for, in more than one piece.
    let others = (0..20_000).map(|n| format!("{n:064x}"));
    let lines = ids.iter().cloned().chain(others).map(|id| format!("7 {id}\n"));
    let text = format!("caifs-profile 1\n{}", lines.collect::<String>());
    let local = ground.scratch.file("p", text.as_bytes());
    fs::write(ground.nginx.root().join("disk.caibx.profile"), text).unwrap();
    for profile in ["", &format!(",profile={}", local.display())] {
        let log = ground.scratch.join("log");
        let options = format!("memory=16M,log={}{profile}", log.display());
        let mut mount = ground.logged_mount(&log, &options);
        mount.arg("-c").arg(&ground.cache).arg(ground.url("disk.caibx")).arg(&ground.mnt);
        let mounted = Mounted::by_command(&mut mount, &ground.mnt).unwrap();
        until("the first chunks are there", || ground.n_cached(&ids) == ids.len());
        until("it is told", || fs::read_to_string(&log).is_ok_and(|text| text.contains("of the profile are replayed")));
        assert!(mounted.end());
        let text = fs::read_to_string(&log).unwrap();
        assert!(text.contains("only the first 3276 chunks of the profile are replayed (give more memory)"), "{text}");
        fs::remove_file(log).unwrap();
        fs::remove_dir_all(&ground.cache).unwrap();
    }
}

#[test]
fn a_replay_follows_its_readers_where_nothing_can_be_warmed() {
    if !can_mount() {
        return;
    }
    const N_MIB: usize = 24;
    let Some(ground) = Ground::new() else { return };
    let ids = ground.make("disk.caibx", &noise(N_MIB << 20));
    let lines: String = ids.iter().map(|id| format!("7 {id}\n")).collect();
    let profile = ground.scratch.file("p", format!("caifs-profile 1\n{lines}").as_bytes());
    let log = ground.scratch.join("log");
    let options = format!("memory=16M,log-level=info,warm=all,log={},profile={}", log.display(), profile.display());
    let mut mount = ground.logged_mount(&log, &options);
    let mounted = Mounted::by_command(mount.arg(ground.url("disk.caibx")).arg(&ground.mnt), &ground.mnt).unwrap();
    for mib in 0..N_MIB as u64 {
        touch(&ground, &[mib]);
        until("it is where the reader is", || n_fetches(&ground.mnt) >= ids.len() as u64 * mib / N_MIB as u64);
    }
    until("it has ended", || fs::read_to_string(&log).unwrap().contains("p: replayed: "));
    until("there is no cache", || fs::read_to_string(&log).unwrap().contains("nothing is warmed: "));
    assert!(!fs::read_to_string(&log).unwrap().contains("the rest of the profile"));
    assert!(mounted.end());
}

#[test]
fn a_profile_is_recorded_and_replayed_also_for_the_next_version() {
    if !can_mount() {
        return;
    }
    let Some(ground) = Ground::new() else { return };
    let mut content = noise(16 << 20);
    // The first chunk is what a mount asks for itself.
    let ids = ground.make("disk.caibx", &content).split_off(1);
    let profile = ground.scratch.join("p");
    let record = format!("--record={}", profile.display());
    let mounted = ground.mount("disk.caibx", &[&record, "--kernel-read-ahead=128k"]);
    touch(&ground, &[12, 3, 7]);
    assert!(mounted.end());
    let recorded = ids_of(&profile);
    assert!((3..40).contains(&recorded.len()), "{}", recorded.len());
    // In the order of the reads: places in the index fall, then rise.
    let place = |id: &String| ids.iter().position(|known| known == id).unwrap();
    let (first, last) = (place(&recorded[0]), place(recorded.last().unwrap()));
    assert!(first > last && recorded.iter().any(|id| place(id) < last), "{first} {last}");
    assert!(!ground.scratch.join("p.part").exists());

    // Replayed by name, and from beside the index; not when it is not wanted.
    let named = format!("--profile={}", profile.display());
    let mounted = ground.mount_cached("disk.caibx", &[&named]);
    until("the profile is replayed", || ground.n_cached(&recorded) == recorded.len());
    assert_eq!(ground.n_cached(&ids), recorded.len(), "and no more than that is fetched");
    assert!(mounted.end());
    fs::remove_dir_all(&ground.cache).unwrap();
    fs::copy(&profile, ground.nginx.root().join("disk.caibx.profile")).unwrap();
    let mounted = ground.mount_cached("disk.caibx", &["--profile=no"]);
    assert!(fs::metadata(ground.mnt.join("disk")).is_ok());
    assert!(mounted.end());
    assert_eq!(
        (ground.n_cached(&ids), ground.proxy.n_requests_of("/disk.caibx.profile")),
        (0, 1),
        "asked for by the first mount"
    );
    let mounted = ground.mount_cached("disk.caibx", &[]);
    until("the profile beside the index is replayed", || ground.n_cached(&recorded) == recorded.len());
    assert!(mounted.end());
    fs::remove_dir_all(&ground.cache).unwrap();

    // The next version has most of it, elsewhere.
    content.splice(1 << 20..1 << 20, [7; 100_000]);
    content[3 << 20..(3 << 20) + 300_000].fill(9);
    let next = ground.make("next.caibx", &content);
    let common: Vec<String> = recorded.iter().filter(|id| next.contains(id)).cloned().collect();
    assert!(!common.is_empty() && common.len() < recorded.len(), "{} of {}", common.len(), recorded.len());
    let mounted = ground.mount_cached("next.caibx", &[&named]);
    until("what is common is replayed", || ground.n_cached(&common) == common.len());
    assert!(mounted.end());
    assert_eq!(ground.n_cached(&recorded), common.len(), "what the next version does not have is not asked for");

    // Shown, alone and against both.
    let shown = |args: &[&str]| run(caifs().args(["profile", "show"]).arg(&profile).args(args)).ok().text();
    assert!(shown(&[]).contains(&format!("chunks:   {}\n", recorded.len())));
    let all = shown(&["-i", &ground.url("disk.caibx")]);
    assert!(all.contains(&format!("{} (100.0 %)", recorded.len())), "{all}");
    let some = shown(&["-i", &ground.url("next.caibx")]);
    assert!(some.contains(&format!(": {} (", common.len())), "{some}");
}

#[test]
fn a_killed_daemon_leaves_a_prefix() {
    if !can_mount() {
        return;
    }
    let Some(ground) = Ground::new() else { return };
    ground.make("disk.caibx", &noise(4 << 20));
    let profile = ground.scratch.join("p");
    let mut mounted = ground.mount("disk.caibx", &["-o", &format!("record={}", profile.display())]);
    touch(&ground, &[2]);
    let part = ground.scratch.join("p.part");
    until("it is written while the mount lives", || fs::read_to_string(&part).unwrap().lines().count() > 1);
    mounted.kill_server();
    drop(mounted);
    assert!(!ids_of(&part).is_empty());
    assert!(!profile.exists());
}

#[test]
fn profiles_are_merged() {
    let Some(ground) = Ground::new() else { return };
    let ids = ground.make("disk.caibx", &noise(1 << 20));
    let write = |name: &str, chunks: &[usize]| {
        let lines: String = chunks.iter().enumerate().map(|(ms, i)| format!("{ms} {}\n", ids[*i])).collect();
        ground.scratch.file(name, format!("caifs-profile 1\n# {name}\n{lines}"))
    };
    let (one, two, out) = (write("one", &[0, 1, 2]), write("two", &[2, 3]), ground.scratch.join("out"));
    run(caifs().args(["profile", "merge"]).args([&out, &one, &two])).ok();
    assert_eq!(ids_of(&out), [&ids[2], &ids[0], &ids[1], &ids[3]].map(String::clone));
    let to_stdout = run(caifs().args(["profile", "merge", "-"]).args([&one, &two])).ok();
    assert_eq!(to_stdout.stdout, fs::read(&out).unwrap());
    for (content, wanted) in [("", "not a profile"), ("caifs-profile 1\nx y\n", "line 2")] {
        let wrong = ground.scratch.file("wrong", content);
        let line = one_line(run(caifs().args(["profile", "merge"]).args([&out, &one, &wrong])));
        assert!(line.contains("wrong: ") && line.contains(wanted), "{line}");
    }
    one_line(run(caifs().args(["profile", "show"]).arg(ground.scratch.join("none"))));
    assert_eq!(ids_of(&out).len(), 4, "what cannot be merged changes nothing");
}

#[test]
fn a_profile_that_cannot_be_used_or_made_is_said() {
    if !can_mount() {
        return;
    }
    let Some(ground) = Ground::new() else { return };
    ground.make("disk.caibx", &noise(1 << 20));
    // A mount goes on without a profile to replay,
    for (name, content) in [("wrong", Some("something else\n")), ("missing", None)] {
        let path = content.map_or(ground.scratch.join(name), |content| ground.scratch.file(name, content));
        let mounted = ground.mount("disk.caibx", &["--profile", path.to_str().unwrap()]);
        touch(&ground, &[0]);
        assert!(mounted.end());
    }
    // but who asks for one to be recorded wants it.
    let mut mount = ground.command();
    mount.arg("mount").arg(ground.url("disk.caibx")).arg(&ground.mnt).args(["--record", "/no/such/dir/p"]);
    let refused = run(&mut mount).fails();
    assert!(refused.error_line().contains("/no/such/dir/p"), "{}", refused.stderr);
    assert!(!crate::support::mounted::is_mountpoint(&ground.mnt));
}
