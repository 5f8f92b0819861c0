//! Backing files with real mounts: filled by reading, read without a store, read by the kernel itself, shared, taken over from desync,
//! on full and stacked file systems, and killed at random moments while they fill.

mod disk;
mod local;
mod warm;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::MsFlags;

use crate::mount::{can_mount, mount_with};
use crate::mount_service::{run_with_open_fuse, users_may_open_fuse};
use crate::support::blob::Xorshift;
use crate::support::mounted::{Mounted, unmount};
use crate::support::peers::{missing, peer};
use crate::support::run::{caifs, command, run};
use crate::support::scratch::Scratch;

/// Nothing that is waited for here takes as long; what does hangs.
const LIMIT: Duration = Duration::from_secs(120);

/// How often the server is killed while the file fills, unless `CAIFS_KILLS` says otherwise.
const N_KILLS: u64 = 5;

/// An image with its index and store, and where to mount it.
struct Ground {
    scratch: Scratch,
    content: Vec<u8>,
    index: PathBuf,
    store: PathBuf,
    mountpoint: PathBuf,
}

impl Ground {
    /// An image of noise with zeros in the middle, of small chunks; `None` when nothing can be mounted.
    fn new(n_bytes: usize) -> Option<Self> {
        let mut content = Xorshift::seeded(n_bytes as u64).bytes(n_bytes);
        content[n_bytes / 2..n_bytes * 3 / 4].fill(0);
        if !can_mount() {
            return None;
        }
        let scratch = Scratch::new();
        let (index, store) = (scratch.join("disk.caibx"), scratch.join("disk.castr"));
        let blob = scratch.file("disk", &content);
        run(caifs().args(["make", "-m", "4:16:64", "-s"]).arg(&store).arg(&index).arg(&blob)).ok();
        let mountpoint = scratch.dir("m");
        Some(Self { scratch, content, index, store, mountpoint })
    }

    fn backing(&self) -> PathBuf {
        self.scratch.join("backing")
    }

    /// Mounts with a backing file and more options.
    #[track_caller]
    fn mount(&self, options: &str) -> Mounted {
        self.mount_at(&self.mountpoint, options).unwrap()
    }

    fn mount_at(&self, mountpoint: &Path, options: &str) -> Result<Mounted, String> {
        let options = format!("backing={}{options}", self.backing().display());
        mount_with(&self.index, Some(&self.store), mountpoint, &["-o", &options])
    }

    fn image(&self) -> PathBuf {
        self.mountpoint.join("disk")
    }

    /// Reads and checks a part of the image.
    #[track_caller]
    fn check(&self, file: &File, range: std::ops::Range<usize>) {
        let mut bytes = vec![0; range.len()];
        file.read_exact_at(&mut bytes, range.start as u64).unwrap();
        assert!(bytes == self.content[range], "the mount has other bytes");
    }

    #[track_caller]
    fn check_all(&self) {
        assert!(fs::read(self.image()).unwrap() == self.content, "the mount has other bytes");
    }

    /// Takes everything out of the store.
    fn empty_store(&self) {
        fs::remove_dir_all(&self.store).unwrap();
        fs::create_dir(&self.store).unwrap();
    }

    /// Reads all, and waits until the file is complete.
    #[track_caller]
    fn complete(&self) {
        self.check_all();
        wait_until("the backing file is complete", || present(&self.image()) == "100");
    }

    /// A complete backing file, and no mount.
    #[track_caller]
    fn fill(&self) {
        let mounted = self.mount("");
        self.complete();
        assert!(mounted.end());
        assert!(fs::read(self.backing()).unwrap() == self.content, "the backing file has other bytes");
    }
}

/// How much of the image is in its backing file, in percent, as the mount says it.
fn present(image: &Path) -> String {
    String::from_utf8(xattr::get(image, "user.caifs.present").unwrap().unwrap()).unwrap()
}

#[track_caller]
fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < LIMIT, "never: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Whether the kernel reads a file itself: then reads that bypass its cache do not reach the server, which would read as much itself.
fn is_passed_through(mounted: &Mounted, file: &File, n_bytes: usize) -> bool {
    let read_bytes = || -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/io", mounted.pids()[0])).unwrap();
        text.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
    };
    let before = read_bytes();
    // Opened again by its number, which is the same open file: a new one could be opened in another way.
    let flags = nix::fcntl::OFlag::from_bits_retain(nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_GETFL).unwrap());
    nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_SETFL(flags | nix::fcntl::OFlag::O_DIRECT)).unwrap();
    let mut buffer = vec![0; n_bytes + 4096];
    let at = buffer.as_ptr().align_offset(4096);
    file.read_exact_at(&mut buffer[at..at + n_bytes], 0).unwrap();
    nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_SETFL(flags)).unwrap();
    read_bytes() - before < n_bytes as u64
}

const PROBE_BYTES: usize = 1 << 20;

/// Opens the image so that the kernel reads it itself, which it can as soon as the server has heard of the last close.
#[track_caller]
fn open_passed_through(mounted: &Mounted, image: &Path) -> File {
    let mut passed = None;
    wait_until("the kernel reads the file itself", || {
        let file = File::open(image).unwrap();
        passed = is_passed_through(mounted, &file, PROBE_BYTES).then_some(file);
        passed.is_some()
    });
    passed.unwrap()
}

#[test]
fn what_was_read_once_is_read_without_a_store_and_by_the_kernel_itself() {
    let Some(ground) = Ground::new(6_000_000) else { return };
    let mounted = ground.mount("");
    assert_eq!(present(&ground.image()), "0.00");
    let file = File::open(ground.image()).unwrap();
    ground.check(&file, 0..2_000_000);
    wait_until("what was read is kept", || present(&ground.image()).parse::<f64>().unwrap() >= 30.0);
    // What is not in the file yet comes from memory, which looks the same from outside; all of it is there soon.
    wait_until("we read it for the kernel", || !is_passed_through(&mounted, &file, PROBE_BYTES));
    drop(file);
    assert!(mounted.end());
    let metadata = fs::metadata(ground.backing()).unwrap();
    assert_eq!((metadata.len(), metadata.mode() & 0o777), (6_000_000, 0o600));

    // Without the store: what is there is read, the rest is not, and comes when the store does.
    let kept = ground.scratch.join("kept.castr");
    fs::rename(&ground.store, &kept).unwrap();
    fs::create_dir(&ground.store).unwrap();
    let mounted = ground.mount(",io-timeout=2");
    let file = File::open(ground.image()).unwrap();
    // Here and there, since reading ahead may ask for what is behind: by the kernel, which is told not to, and by us, in order.
    nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_RANDOM).unwrap();
    for start in [1_500_000, 700_000, 100_000] {
        ground.check(&file, start..start + 1000);
    }
    assert_eq!(xattr::get(&ground.mountpoint, "user.caifs.fetches").unwrap().unwrap(), b"0");
    ground.check(&file, 0..2_000_000);
    assert!(file.read_exact_at(&mut [0; 100], 5_900_000).is_err());
    drop(file);
    assert!(mounted.end());
    fs::remove_dir(&ground.store).unwrap();
    fs::rename(&kept, &ground.store).unwrap();

    let mounted = ground.mount("");
    ground.complete();
    let file = open_passed_through(&mounted, &ground.image());
    ground.check(&file, 0..6_000_000);
    drop(file);
    assert!(mounted.end());

    ground.empty_store();
    for (options, passed) in
        [("", true), (",passthrough=yes", true), (",passthrough=no", false), (",passthrough", true)]
    {
        let mounted = ground.mount(options);
        assert_eq!(present(&ground.image()), "100");
        ground.check_all();
        let file = File::open(ground.image()).unwrap();
        assert_eq!(is_passed_through(&mounted, &file, PROBE_BYTES), passed, "{options}");
        let end = file.read_at(&mut [0; 100], 6_000_000).unwrap();
        assert_eq!((end, file.read_at(&mut [0; 100], 5_999_990).unwrap()), (0, 10));
        drop(file);
        let text = run(command("sha256sum", [ground.image()]).env("LC_ALL", "C")).ok().text();
        assert!(text.starts_with(&caifs::digest::Digest::Sha256.id(&ground.content).to_hex()));
        assert!(mounted.end());
    }
}

#[test]
fn a_file_that_is_open_never_stands_in_the_way_of_an_open() {
    let Some(ground) = Ground::new(4_000_000) else { return };
    let mounted = ground.mount("");
    let early = File::open(ground.image()).unwrap();
    ground.check(&early, 0..100);
    let map = caifs::sys::MappedFile::new(&early).unwrap();
    ground.complete();
    // As long as it is open through the cache, all are.
    let late = File::open(ground.image()).unwrap();
    assert!(!is_passed_through(&mounted, &late, PROBE_BYTES));
    ground.check(&late, 0..4_000_000);
    drop((early, late));
    let mapped = File::open(ground.image()).unwrap();
    assert!(!is_passed_through(&mounted, &mapped, PROBE_BYTES), "a map holds the file open, too");
    assert!(map.as_ref()[..] == ground.content[..]);
    drop((map, mapped));
    // Closing is told to the server behind our back.
    let first = open_passed_through(&mounted, &ground.image());
    // Many at a time, opened and closed in any order, with and without O_DIRECT.
    thread::scope(|scope| {
        for seed in 1..5 {
            let ground = &ground;
            scope.spawn(move || {
                let mut noise = Xorshift::seeded(seed);
                let mut open = Vec::new();
                for _ in 0..200 {
                    let mut options = OpenOptions::new();
                    options.read(true);
                    if noise.below(4) == 0 {
                        options.custom_flags(libc::O_DIRECT);
                        drop(options.open(ground.image()).unwrap());
                        continue;
                    }
                    let file = options.open(ground.image()).unwrap();
                    let start = noise.below(3_900_000) as usize;
                    ground.check(&file, start..start + 1000);
                    open.push(file);
                    if noise.below(3) == 0 {
                        open.clear();
                    }
                }
            });
        }
    });
    let mapped = caifs::sys::MappedFile::new(&first).unwrap();
    drop(first);
    assert!(mapped.as_ref()[..] == ground.content[..]);
    drop(mapped);
    assert!(mounted.end());
}

#[test]
fn opens_that_come_while_it_becomes_complete_all_succeed() {
    let Some(ground) = Ground::new(3_000_000) else { return };
    let mounted = ground.mount("");
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        for seed in 1..5 {
            let (ground, is_over) = (&ground, &is_over);
            scope.spawn(move || {
                let mut noise = Xorshift::seeded(seed);
                while !is_over.load(Ordering::Relaxed) {
                    let file = File::open(ground.image()).unwrap();
                    let start = noise.below(2_900_000) as usize;
                    ground.check(&file, start..start + 5000);
                }
            });
        }
        ground.complete();
        is_over.store(true, Ordering::Relaxed);
    });
    drop(open_passed_through(&mounted, &ground.image()));
    assert!(mounted.end());
}

#[test]
fn the_mountpoint_itself_can_be_the_image_and_the_file_lie_in_the_cache() {
    let Some(ground) = Ground::new(2_000_000) else { return };
    let (mountpoint, cache) = (ground.scratch.file("as a file", ""), ground.scratch.dir("cache"));
    for is_complete in [false, true] {
        let options = ["-c", cache.to_str().unwrap(), "-o", "backing=auto"];
        let mounted = mount_with(&ground.index, Some(&ground.store), &mountpoint, &options).unwrap();
        assert_eq!(present(&mountpoint), if is_complete { "100" } else { "0.00" });
        assert!(fs::read(&mountpoint).unwrap() == ground.content);
        let file = File::open(&mountpoint).unwrap();
        assert!(!is_complete || is_passed_through(&mounted, &file, PROBE_BYTES));
        drop(file);
        wait_until("it is complete", || present(&mountpoint) == "100");
        assert!(mounted.end());
    }
    let name = caifs::digest::Digest::Sha256.id(&fs::read(&ground.index).unwrap()).to_hex();
    let backing = cache.join(".caifs/backing").join(format!("{name}.img"));
    assert!(fs::read(&backing).unwrap() == ground.content);
    // The cache's quota does not touch it.
    assert!(
        run(caifs()
            .args(["cat", "--cache-size", "1M", "-c"])
            .arg(&cache)
            .arg("-s")
            .arg(&ground.store)
            .arg(&ground.index))
        .ok()
        .stdout
            == ground.content
    );
    assert!(fs::read(&backing).unwrap() == ground.content);
}

#[test]
fn what_cannot_be_the_backing_file_is_refused_in_one_line() {
    let Some(ground) = Ground::new(200_000) else { return };
    ground.fill();
    let (m, backing) = (&ground.mountpoint, ground.backing());
    let refused = |spec: &Path, options: &str| {
        let mut mount = caifs();
        mount.arg("mount").arg(spec).arg(m).arg("-s").arg(&ground.store).args(["-o", options]);
        let finished = run(&mut mount).fails();
        assert_eq!(finished.status.code(), Some(32), "{}", finished.stderr);
        finished.error_line().to_owned()
    };
    let backed = format!("backing={}", backing.display());
    // Another image, of the same size.
    let other = ground.scratch.join("other.caibx");
    let blob = ground.scratch.file("other", Xorshift::seeded(9).bytes(200_000));
    run(caifs().args(["make", "-m", "4:16:64", "-s"]).arg(&ground.store).arg(&other).arg(blob)).ok();
    let line = refused(&other, &backed);
    let remedy = format!(": remove it and {}, or name another file", backing.display());
    assert!(line.contains(&format!("{}.caifs is of an image", backing.display())) && line.ends_with(&remedy), "{line}");
    assert!(fs::read(&backing).unwrap() == ground.content, "left as it is");
    // A damaged state.
    let state = PathBuf::from(format!("{}.caifs", backing.display()));
    let right = fs::read(&state).unwrap();
    fs::write(&state, b"caifs-backing-1\nrubbish").unwrap();
    assert!(refused(&ground.index, &backed).contains("is damaged: remove it and"), "damage");
    fs::write(&state, right).unwrap();
    // A file of somebody else.
    let precious = ground.scratch.file("precious", &ground.content);
    let line = refused(&ground.index, &format!("backing={}", precious.display()));
    assert!(line.contains("is there and nothing says what is in it: remove it or name another file"), "{line}");
    let line = refused(&ground.index, "backing=auto");
    assert!(line.ends_with("there is no local cache for it (name a directory with -c, or a file)"), "{line}");
    let tree = ground.scratch.join("tree.caidx");
    fs::write(ground.scratch.dir("tree").join("file"), "content").unwrap();
    run(caifs().args(["tar", "-i", "-s"]).arg(&ground.store).arg(&tree).arg(ground.scratch.join("tree"))).ok();
    let line = refused(&tree, &backed);
    assert!(
        line.ends_with("only a disk image (.caibx) can have a backing file, and this is a directory tree"),
        "{line}"
    );
    let mounted = ground.mount("");
    ground.check_all();
    assert!(mounted.end());
}

#[test]
fn two_mounts_share_a_file() {
    let Some(ground) = Ground::new(3_000_000) else { return };
    let mounted = ground.mount("");
    ground.check(&File::open(ground.image()).unwrap(), 0..1_000_000);
    assert!(mounted.end());
    let first = ground.mount("");
    let other = ground.scratch.dir("other");
    let second = ground.mount_at(&other, "").unwrap();
    let image = other.join("disk");
    assert!(present(&image).parse::<f64>().unwrap() > 30.0);
    assert!(fs::read(&image).unwrap() == ground.content);
    assert_ne!(present(&image), "100", "only the first adds to it");
    ground.complete();
    assert!(fs::read(&image).unwrap() == ground.content);
    assert!(second.end());
    // A third finds it complete, while the first still has it.
    let third = ground.mount_at(&other, "").unwrap();
    assert!(is_passed_through(&third, &File::open(&image).unwrap(), PROBE_BYTES));
    assert!(third.end() && first.end());
}

/// A file system of its own under the scratch directory.
fn mount_fs(ground: &Ground, name: &str, kind: &str, options: &str) -> Option<PathBuf> {
    let path = ground.scratch.dir(name);
    if nix::mount::mount(Some(kind), &path, Some(kind), MsFlags::empty(), Some(options)).is_err() {
        missing(&format!("a mount of {kind}"));
        return None;
    }
    Some(path)
}

#[test]
fn where_the_kernel_cannot_read_the_file_itself_we_do() {
    let Some(ground) = Ground::new(2_000_000) else { return };
    // A stacked file system.
    let (lower, upper, work) = (ground.scratch.dir("lower"), ground.scratch.dir("upper"), ground.scratch.dir("work"));
    let layers = format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
    let Some(overlay) = mount_fs(&ground, "overlay", "overlay", &layers) else { return };
    for passthrough in ["", ",passthrough=yes"] {
        let option = format!("backing={}{passthrough}", overlay.join("backing").display());
        let mounted = mount_with(&ground.index, Some(&ground.store), &ground.mountpoint, &["-o", &option]).unwrap();
        ground.complete();
        let file = File::open(ground.image()).unwrap();
        assert!(!is_passed_through(&mounted, &file, PROBE_BYTES));
        ground.check(&file, 0..2_000_000);
        drop(file);
        assert!(mounted.end());
    }
}

#[test]
fn an_ordinary_user_has_a_backing_file_that_we_read() {
    let (Some(setpriv), Some(_)) = (peer("setpriv"), peer("fusermount3")) else { return };
    if !can_mount() {
        return;
    }
    if !users_may_open_fuse() {
        run_with_open_fuse("backing::an_ordinary_user_has_a_backing_file_that_we_read");
        return;
    }
    let Some(ground) = Ground::new(2_000_000) else { return };
    let home = tempfile::tempdir_in("/tmp").unwrap();
    fs::set_permissions(home.path(), fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::chown(home.path(), Some(65534), Some(65534)).unwrap();
    let program = home.path().join("caifs");
    fs::hard_link(env!("CARGO_BIN_EXE_caifs"), &program)
        .or_else(|_| fs::copy(env!("CARGO_BIN_EXE_caifs"), &program).map(drop))
        .unwrap();
    let as_user = |name: &str, args: &[&std::ffi::OsStr]| {
        let mut user = setpriv.command();
        user.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
            .arg(name)
            .args(args)
            .current_dir(home.path());
        user
    };
    for (name, from) in [("disk.caibx", &ground.index), ("blob", &ground.scratch.join("disk"))] {
        fs::copy(from, home.path().join(name)).unwrap();
        fs::set_permissions(home.path().join(name), fs::Permissions::from_mode(0o644)).unwrap();
    }
    let (m, store) = (home.path().join("m"), home.path().join("store"));
    let caifs = program.to_str().unwrap();
    run(&mut as_user(
        caifs,
        &[
            "make".as_ref(),
            "-m".as_ref(),
            "4:16:64".as_ref(),
            "-s".as_ref(),
            store.as_ref(),
            "disk.caibx".as_ref(),
            "blob".as_ref(),
        ],
    ))
    .ok();
    fs::create_dir(&m).unwrap();
    std::os::unix::fs::chown(&m, Some(65534), Some(65534)).unwrap();
    let option = format!("backing={}", home.path().join("backing").display());
    for _ in 0..2 {
        let mut mount = as_user(
            caifs,
            &[
                "mount".as_ref(),
                "disk.caibx".as_ref(),
                m.as_ref(),
                "-s".as_ref(),
                store.as_ref(),
                "-o".as_ref(),
                option.as_ref(),
            ],
        );
        let mounted = Mounted::by_command(&mut mount, &m).unwrap();
        for _ in 0..3 {
            let read = run(&mut as_user("cat", &[m.join("disk").as_ref()])).ok().stdout;
            assert!(read == ground.content);
        }
        drop(mounted);
    }
    assert!(fs::read(home.path().join("backing")).unwrap() == ground.content);
    unmount(&m);
}

#[test]
fn what_desync_left_is_taken_over() {
    let Some(ground) = Ground::new(3_000_000) else { return };
    let Some(desync) = peer("desync") else { return };
    let (backing, state) = (ground.backing(), ground.scratch.join("backing.state"));
    let serve = || {
        let mut server = desync.command();
        server.args(["mount-index", "--cor-file"]).arg(&backing).arg("--cor-state-save").arg(&state);
        server.arg("-s").arg(&ground.store).arg(&ground.index).arg(&ground.mountpoint);
        Mounted::by_server(&mut server, &ground.mountpoint).unwrap()
    };
    let mut server = serve();
    ground.check(&File::open(ground.image()).unwrap(), 0..1_200_000);
    // It writes its state when it is told to end.
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(server.pids()[0]), nix::sys::signal::Signal::SIGINT).unwrap();
    wait_until("desync ends", || state.exists());
    assert!(server.end());
    // One chunk of it is damaged.
    let file = OpenOptions::new().read(true).write(true).open(&backing).unwrap();
    file.write_all_at(b"rubbish", 600_000).unwrap();
    drop(file);

    let kept = ground.scratch.join("kept.castr");
    fs::rename(&ground.store, &kept).unwrap();
    fs::create_dir(&ground.store).unwrap();
    server = ground.mount(",io-timeout=2");
    let file = File::open(ground.image()).unwrap();
    ground.check(&file, 0..500_000);
    ground.check(&file, 700_000..1_200_000);
    assert!(file.read_exact_at(&mut [0; 10], 600_000).is_err(), "what is damaged is not believed");
    assert_eq!(xattr::get(&ground.mountpoint, "user.caifs.eio").unwrap().map(|eio| eio != b"0"), Some(true));
    drop(file);
    assert!(server.end());
    fs::remove_dir(&ground.store).unwrap();
    fs::rename(&kept, &ground.store).unwrap();
    ground.fill();
    let server = ground.mount("");
    assert!(is_passed_through(&server, &File::open(ground.image()).unwrap(), PROBE_BYTES));
    assert!(server.end());

    // Where desync had everything, nothing is fetched.
    for name in ["backing", "backing.caifs", "backing.state"] {
        fs::remove_file(ground.scratch.join(name)).unwrap();
    }
    let server = serve();
    ground.check_all();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(server.pids()[0]), nix::sys::signal::Signal::SIGINT).unwrap();
    wait_until("desync ends", || state.exists());
    drop(server);
    ground.empty_store();
    let mounted = ground.mount("");
    wait_until("all that desync left is checked in the background", || present(&ground.image()) == "100");
    ground.check_all();
    assert!(mounted.end());
}

#[test]
fn whenever_the_server_is_killed_no_wrong_byte_is_read_afterwards() {
    let Some(ground) = Ground::new(5_000_000) else { return };
    let n_kills = std::env::var("CAIFS_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(N_KILLS);
    let mut noise = Xorshift::seeded(n_kills + 77);
    let mut n_partial = 0;
    for kill_idx in 0..n_kills {
        let mut mounted = ground.mount("");
        let n_reads = AtomicUsize::new(0);
        let is_killed = AtomicBool::new(false);
        // From before the first read to after the last chunk was written.
        let kill_after = noise.below(120) as usize;
        thread::scope(|scope| {
            for reader in 0..2 {
                let (ground, n_reads, is_killed) = (&ground, &n_reads, &is_killed);
                let mut noise = Xorshift::seeded(kill_idx * 2 + reader + 1);
                scope.spawn(move || {
                    let Ok(file) = File::open(ground.image()) else { return };
                    loop {
                        let start = noise.below(4_900_000);
                        let mut bytes = vec![0; 1 + noise.below(90_000) as usize];
                        match file.read_exact_at(&mut bytes, start) {
                            Ok(()) => assert!(bytes == ground.content[start as usize..][..bytes.len()], "a wrong byte"),
                            Err(error) => {
                                assert!(is_killed.load(Ordering::SeqCst), "before the kill: {error}");
                                return;
                            }
                        }
                        n_reads.fetch_add(1, Ordering::SeqCst);
                        if is_killed.load(Ordering::SeqCst) {
                            return;
                        }
                    }
                });
            }
            wait_until("enough was read", || n_reads.load(Ordering::SeqCst) >= kill_after);
            n_partial += usize::from(!matches!(present(&ground.image()).as_str(), "0.00" | "100"));
            is_killed.store(true, Ordering::SeqCst);
            mounted.kill_server();
            unmount(&ground.mountpoint);
        });
        drop(mounted);
        if kill_idx % 5 == 4 || kill_idx + 1 == n_kills {
            // All of it, and then from the file alone.
            ground.fill();
            let kept = ground.scratch.join("kept.castr");
            fs::rename(&ground.store, &kept).unwrap();
            fs::create_dir(&ground.store).unwrap();
            let mounted = ground.mount("");
            ground.check_all();
            assert!(mounted.end());
            fs::remove_dir(&ground.store).unwrap();
            fs::rename(&kept, &ground.store).unwrap();
            for name in ["backing", "backing.caifs"] {
                fs::remove_file(ground.scratch.join(name)).unwrap();
            }
        }
    }
    assert!(n_partial > 0, "no kill came while the file was filling");
}
