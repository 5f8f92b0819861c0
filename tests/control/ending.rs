//! What `caifs umount` waits for: the end of the process that served the very mount that was meant. And who mounts where a mount hangs.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use caifs::mount::attach::{AttachRequest, attach};
use caifs::mount::control::Serving;
use caifs::mount::detach::{How, mounted_at, unmount};
use caifs::mount::options::VfsFlags;
use caifs::mount::{MountError, Mounted as Attached};
use caifs::volume::FileKind;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::ground::{Ground, until};
use crate::mount::can_mount;
use crate::support::mounted::{Mounted, is_mountpoint, is_running};
use crate::support::run::{caifs, run};
use crate::support::scratch::Scratch;

/// Mounts made until one has a number that has just become free.
const MAX_MOUNTS: usize = 100;

/// How often it may have gone to somebody else, who mounts at the same time.
const MAX_ROUNDS: usize = 20;

/// A mount that nobody answers for, as long as it is held.
fn attach_unserved(mountpoint: &Path, source: &str) -> Result<Attached, MountError> {
    attach(&AttachRequest {
        mountpoint,
        source: source.as_ref(),
        root_kind: FileKind::Directory,
        flags: VfsFlags::default(),
        kernel: &Default::default(),
        allow_other: false,
    })
}

#[test]
fn a_mount_that_has_got_the_number_of_another_is_not_taken_for_it() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new(300_000);
    for round in 0..MAX_ROUNDS {
        let mounted = ground.mount(&[]);
        let pid = Pid::from_raw(mounted.pids()[0]);
        let entry = mounted_at(&ground.mnt).unwrap();
        let serving = Serving::of(&ground.run_dir(), &entry).expect("it has a socket");
        kill(pid, Signal::SIGSTOP).unwrap();
        unmount(entry.id, How::WhenIdle).unwrap();
        let mut others = Vec::new();
        let has_number = (0..MAX_MOUNTS).any(|n| {
            let mountpoint = ground.scratch.join(format!("other-{round}-{n}"));
            fs::create_dir(&mountpoint).unwrap();
            let other = attach_unserved(&mountpoint, "other").expect("mounted");
            let id = other.attached.id();
            others.push(other);
            (id.major, id.minor) == (entry.id.major, entry.id.minor)
        });
        let waited = has_number.then(|| serving.wait(Duration::from_millis(200)));
        kill(pid, Signal::SIGCONT).unwrap();
        drop(others);
        assert!(mounted.end());
        match waited {
            Some(waited) => {
                assert!(waited.unwrap_err().contains("is stopped"));
                assert_eq!(serving.wait(Duration::from_secs(30)), Ok(()));
                return;
            }
            None => continue,
        }
    }
    panic!("the number was always somebody else's");
}

#[test]
fn a_mount_in_a_mount_is_asked_and_its_process_waited_for() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new(300_000);
    let tree = ground.scratch.dir("tree");
    fs::create_dir(tree.join("in")).unwrap();
    let archive = ground.scratch.join("tree.catar");
    run(ground.caifs(&["tar"]).arg(&archive).arg(&tree)).ok();
    let outer = Mounted::by_command(ground.caifs(&["mount"]).arg(&archive).arg(&ground.mnt), &ground.mnt).unwrap();
    let place = ground.mnt.join("in");
    let inner = Mounted::by_command(&mut ground.mount_command(&place, &[]), &place).unwrap();
    let pid = inner.pids()[0];
    assert_ne!(pid, outer.pids()[0]);
    for (way, pid) in [(&place, pid), (&place.join("blob"), pid), (&ground.mnt, outer.pids()[0])] {
        assert_eq!(ground.status_of(way)["pid"], pid, "{}", way.display());
    }
    kill(Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
    let mut waiting = ground.caifs(&["umount"]).arg(&place).spawn().unwrap();
    until("it is unmounted", || !is_mountpoint(&place));
    // Time to end in, for one that does not wait.
    let start = Instant::now();
    let mut ended_early = None;
    while ended_early.is_none() && start.elapsed() < Duration::from_millis(300) {
        ended_early = waiting.try_wait().unwrap();
        std::thread::sleep(Duration::from_millis(10));
    }
    kill(Pid::from_raw(pid), Signal::SIGCONT).unwrap();
    let status = waiting.wait().unwrap();
    assert_eq!((ended_early, status.code()), (None, Some(0)));
    assert!(!is_running(pid) && is_running(outer.pids()[0]));
    assert!(inner.end() && outer.end());
}

/// Answers how the kernel begins, and then reads what it asks and answers nothing: who asks cannot be killed from then on.
fn serve_nothing(fd: &OwnedFd, is_over: &AtomicBool) {
    const INIT: [u32; 2] = [26, 7];
    let mut request = vec![0; 1 << 20];
    while !is_over.load(Ordering::SeqCst) {
        let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(20u8)) != Ok(1) {
            continue;
        }
        let Ok(n_bytes) = nix::unistd::read(fd, &mut request) else { return };
        let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        assert!(n_bytes >= 40);
        if [word(4), word(40)] == INIT {
            // Length, no error, and the number of the request; then version 7.31, and no more than what must be.
            let mut reply = [80u32.to_ne_bytes(), [0; 4]].concat();
            reply.extend_from_slice(&request[8..16]);
            for number in [7u32, 31, 0, 0, 0, 4096, 1] {
                reply.extend_from_slice(&number.to_ne_bytes());
            }
            reply.resize(80, 0);
            nix::unistd::write(fd, &reply).unwrap();
        }
    }
}

/// Ends what it tells, also when a test fails.
struct SetWhenDropped<'a>(&'a AtomicBool);

impl Drop for SetWhenDropped<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn who_mounts_over_a_mount_that_hangs_is_told_so() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let (mnt, index) = (scratch.dir("mnt"), scratch.join("other.caibx"));
    let (store, source) = (scratch.dir("s.castr"), scratch.file("source", b"content"));
    run(caifs().arg("make").arg("-s").arg(&store).arg(&index).arg(source)).ok();
    let hanging = attach_unserved(&mnt, "http://h/x.caibx").unwrap();
    let wanted = format!("mountpoint {}: the process of the mount there does not answer within 10 s", mnt.display());
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _over = SetWhenDropped(&is_over);
        scope.spawn(|| serve_nothing(&hanging.fd, &is_over));
        // Whoever finds by himself whether it is mounted already, and whoever mounts, and reads to its end what is said.
        let helper = scope.spawn(|| {
            let mut helper = caifs();
            helper.arg0("mount.caifs").arg("http://user:secret@h/x.caibx").arg(&mnt).env("HOME", "/nonexistent");
            run(&mut helper).fails()
        });
        let mount = |args: &'static [&str]| {
            let (mnt, index, store) = (&mnt, &index, &store);
            scope.spawn(move || run(caifs().arg("mount").args(args).arg(index).arg(mnt).arg("-s").arg(store)).fails())
        };
        let others = [mount(&[]), mount(&["-f"])];
        let refused = attach_unserved(&mnt, "other").unwrap_err().to_string();
        assert!(refused.starts_with(&wanted), "{refused}");
        for refused in [helper].into_iter().chain(others) {
            let refused = refused.join().unwrap();
            assert_eq!(refused.status.code(), Some(32), "{}", refused.stderr);
            assert!(refused.error_line().contains(&wanted) && !refused.stderr.contains("secret"), "{}", refused.stderr);
        }
    });
    drop(hanging);
    assert!(!is_mountpoint(&mnt));
}
