//! Indexes that are replaced while their server, the listing or the settings are not what they should be; and indexes that lie.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use caifs::config::{MountConfig, StoreSettings};
use caifs::digest::Digest;
use caifs::report::Report;
use caifs::store::location::FileLocation;
use caifs::volume::background::{Background, read_profile};
use caifs::volume::live::LiveVolume;
use caifs::volume::open::open_volume;
use caifs::volume::{ROOT_INO, Volume};
use tokio::runtime::Runtime;

use super::{Ground, errno, eventually};
use crate::mount::can_mount;
use crate::support::blob::Xorshift;
use crate::support::run::{caifs, run};
use crate::support::scripted::{Answer, Request, Scripted, answer};

/// How a server of files behaves.
#[derive(Default)]
struct Manners {
    /// An index is not sent as a whole; HEAD and Range are answered.
    fails_whole: AtomicBool,
    /// It tells no version of anything.
    is_plain: AtomicBool,
    /// The profile of `vm0` is never answered.
    hangs_profiles: AtomicBool,
}

/// A web server over a directory, with a listing.
fn serve(dir: PathBuf, manners: &Arc<Manners>) -> Scripted {
    let manners = Arc::clone(manners);
    Scripted::start(move |_, request| {
        let (method, path) = request.line.split_once(' ').unwrap();
        match path {
            "/" => listing(&dir),
            path => send(&dir.join(&path[1..]), method, request, &manners),
        }
    })
}

fn listing(dir: &Path) -> Answer {
    let mut page = "<h1>Index of /</h1>".to_owned();
    for entry in fs::read_dir(dir).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        page.push_str(&format!("<a href=\"{name}\">{name}</a>"));
    }
    answer("200 OK", "Content-Type: text/html\r\n", page.as_bytes())
}

fn send(path: &Path, method: &str, request: &Request, manners: &Manners) -> Answer {
    let name = path.to_str().unwrap();
    if name.ends_with("/vm0.caibx.profile") && manners.hangs_profiles.load(Ordering::SeqCst) {
        return Answer::Hang(Vec::new());
    }
    let Ok(bytes) = fs::read(path) else { return answer("404 Not Found", "", b"") };
    let is_index = name.ends_with(".caibx") || name.ends_with(".caidx");
    let etag = format!("\"{}\"", Digest::Sha256.id(&bytes).to_hex());
    let mut headers = "Accept-Ranges: bytes\r\n".to_owned();
    if !manners.is_plain.load(Ordering::SeqCst) {
        headers.push_str(&format!("ETag: {etag}\r\n"));
    }
    if method == "HEAD" {
        let n = bytes.len();
        return Answer::Then(
            format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {n}\r\n{headers}\r\n").into_bytes(),
        );
    }
    if let Some(range) = request.header("range") {
        let (first, last) = range.trim_start_matches("bytes=").split_once('-').unwrap();
        let (first, last) = (first.parse::<usize>().unwrap(), last.parse::<usize>().unwrap().min(bytes.len() - 1));
        headers.push_str(&format!("Content-Range: bytes {first}-{last}/{}\r\n", bytes.len()));
        return answer("206 Partial Content", &headers, &bytes[first..=last]);
    }
    if is_index && manners.fails_whole.load(Ordering::SeqCst) {
        return answer("503 Service Unavailable", "", b"");
    }
    answer("200 OK", &headers, &bytes)
}

fn content(version: u64, len: usize) -> Vec<u8> {
    Xorshift::seeded(version).bytes(len)
}

/// A collection without a mount.
struct Open {
    runtime: Runtime,
    live: LiveVolume,
}

impl Open {
    fn new(place: &str, set: impl FnOnce(&mut MountConfig)) -> Self {
        let runtime = Runtime::new().unwrap();
        let mut config = MountConfig::default();
        config.show.poll_interval = Some(Duration::from_millis(1));
        set(&mut config);
        let place = FileLocation::parse_any(place.as_ref()).unwrap();
        let live = runtime.block_on(open_volume(&place, &config, false, &Arc::new(Report::default()))).unwrap();
        Self { runtime, live }
    }

    fn volume(&self) -> &dyn Volume {
        &*self.live.volume
    }

    fn ino(&self, name: &str) -> u64 {
        self.runtime.block_on(self.volume().lookup(ROOT_INO, name.as_bytes())).unwrap().unwrap().ino
    }

    fn read(&self, ino: u64, offset: u64, len: u32) -> Result<Vec<u8>, i32> {
        let read = self.runtime.block_on(self.volume().read(ino, offset, len));
        read.map(|bytes| bytes.to_vec()).map_err(|error| error.errno())
    }

    fn names(&self) -> Vec<String> {
        let listing = self.runtime.block_on(self.volume().readdir(ROOT_INO, 0, 1000)).unwrap();
        let mut names: Vec<_> =
            listing.entries.iter().map(|entry| String::from_utf8(entry.name.to_vec()).unwrap()).collect();
        names.sort();
        names
    }
}

#[test]
fn what_is_kept_of_an_index_is_never_shown_as_the_one_that_replaced_it() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let (first, second) = (content(1, 300_000), content(2, 300_000));
    ground.image("vm.caibx", &first);
    let manners = Arc::new(Manners::default());
    let server = serve(ground.index.clone(), &manners);
    let cache = ground.scratch.dir("cache").display().to_string();
    let args = ["-c", &cache, "--error-retry", "0", "-o", "poll-interval=50ms"];
    let _mounted = crate::support::mounted::Mounted::by_command(&mut ground.command(server.url(), &args), &ground.mnt);
    let vm = ground.mnt.join("vm");
    assert!(fs::read(&vm).unwrap() == first);
    let number = fs::metadata(&vm).unwrap().ino();

    manners.fails_whole.store(true, Ordering::SeqCst);
    ground.image("vm.caibx", &second);
    eventually("the new one is there", || fs::metadata(&vm).is_ok_and(|metadata| metadata.ino() != number));
    assert_eq!(fs::metadata(&vm).unwrap().len(), 300_000);
    match fs::read(&vm) {
        Ok(read) => assert!(read == second, "the file before, under the number of the new one"),
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EIO)),
    }
    manners.fails_whole.store(false, Ordering::SeqCst);
    eventually("it is read when it can be", || fs::read(&vm).is_ok_and(|read| read == second));
}

#[test]
fn what_is_kept_of_a_signed_index_is_not_looked_at_for_the_one_that_replaced_it() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let key = |kind: &str| ground.scratch.join(format!("key.{kind}")).display().to_string();
    let (secret, public) = (key("sec"), key("pub"));
    run(caifs().args(["sign", "-G", "-s", &secret, "-p", &public])).ok();
    let put = |content: &[u8]| {
        let index = ground.image("vm.caibx", content);
        run(caifs().args(["sign", "-s", &secret]).arg(index)).ok();
    };
    put(&content(1, 300_000));
    let manners = Arc::new(Manners::default());
    let server = serve(ground.index.clone(), &manners);
    let cache = ground.scratch.dir("cache").display().to_string();
    let args = ["-c", &cache, "--error-retry", "0", "--verify-key", &public, "-o", "poll-interval=50ms"];
    let _mounted = crate::support::mounted::Mounted::by_command(&mut ground.command(server.url(), &args), &ground.mnt);
    let vm = ground.mnt.join("vm");
    let number = fs::metadata(&vm).unwrap().ino();

    manners.fails_whole.store(true, Ordering::SeqCst);
    put(&content(2, 200_000));
    eventually("the one before is gone", || !fs::metadata(&vm).is_ok_and(|metadata| metadata.ino() == number));
    if let Ok(metadata) = fs::metadata(&vm) {
        assert_eq!(metadata.len(), 200_000, "the length of the file before, under the number of the new one");
    }
    manners.fails_whole.store(false, Ordering::SeqCst);
    eventually("it is read when it can be", || fs::read(&vm).is_ok_and(|read| read == content(2, 200_000)));
}

#[test]
fn a_server_without_versions_never_mixes_two_contents_in_one_file() {
    let ground = Ground::new();
    ground.image("vm.caibx", &content(1, 1000));
    for i in 0..40 {
        ground.image(&format!("other{i}.caibx"), &content(100 + i, 1000));
    }
    let manners = Arc::new(Manners::default());
    manners.is_plain.store(true, Ordering::SeqCst);
    let server = serve(ground.index.clone(), &manners);
    // So little that not all of them stay open.
    let open = Open::new(&server.url(), |config| config.memory_bytes = 2 << 20);
    let before = open.ino("vm");
    assert_eq!(open.read(before, 0, 1000), Ok(content(1, 1000)));
    let close = || {
        for i in 0..40 {
            assert_eq!(open.read(open.ino(&format!("other{i}")), 0, 1000), Ok(content(100 + i, 1000)));
        }
    };
    close();
    assert_eq!(open.read(before, 0, 1000), Ok(content(1, 1000)), "it is opened again");
    close();
    ground.image("vm.caibx", &content(2, 1000));
    assert_eq!(open.read(before, 0, 1000), Err(libc::ESTALE), "the number is that of the first content");
    let after = open.ino("vm");
    assert_ne!(before, after);
    assert_eq!(open.read(after, 0, 1000), Ok(content(2, 1000)));
    assert_eq!(open.read(before, 0, 1000), Err(libc::ESTALE));
}

#[test]
fn indexes_that_claim_more_than_their_chunks_can_hold_are_refused_alone() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    ground.tree("good.caidx");
    let good = fs::read(ground.index.join("good.caidx")).unwrap();
    let mut hostile = good.clone();
    let last = good.len() - 80;
    hostile[last..last + 8].copy_from_slice(&((1u64 << 60) - 2).to_le_bytes());
    for name in ["a.caidx", "b.caidx", "c.caibx"] {
        fs::write(ground.index.join(name), &hostile).unwrap();
    }
    let mounted = ground.mount(&["-o", "io-timeout=5s"]);
    assert_eq!(ground.names(""), ["a", "b", "c", "good"]);
    for name in ["a", "b", "c"] {
        assert_eq!(errno(fs::metadata(ground.mnt.join(name))), Some(libc::EIO), "{name}");
    }
    ground.check_tree("good");
    assert!(mounted.end());
}

#[test]
fn a_named_pipe_beside_an_index_is_no_profile() {
    let ground = Ground::new();
    let pipe = ground.index.join("x.caidx.profile");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let runtime = Runtime::new().unwrap();
    let read = runtime.block_on(async {
        let settings = StoreSettings::default();
        let location = FileLocation::Local(pipe.clone());
        tokio::time::timeout(Duration::from_secs(5), read_profile(&location, &settings, 1000)).await
    });
    runtime.shutdown_background();
    let error = read.expect("nobody waits for who writes to it").unwrap_err();
    assert!(error.to_string().contains("not a regular file"), "{error}");
}

#[test]
fn versions_that_come_back_have_their_numbers_again_however_often() {
    let ground = Ground::new();
    let contents = [content(1, 1000), content(2, 1000)];
    let indexes = contents.each_ref().map(|content| fs::read(ground.image("vm.caibx", content)).unwrap());
    let server = serve(ground.index.clone(), &Arc::default());
    let open = Open::new(&server.url(), |_| {});
    let mut numbers = Vec::new();
    for round in 0..150 {
        let version = round % 2;
        fs::write(ground.index.join("vm.caibx"), &indexes[version]).unwrap();
        if let Some(&before) = numbers.last() {
            // Found replaced when it is to be opened.
            assert_eq!(open.read(before, 0, 1000), Err(libc::ESTALE), "round {round}");
        }
        numbers.push(open.ino("vm"));
    }
    assert_ne!(numbers[0], numbers[1]);
    assert!(numbers.chunks(2).all(|pair| pair == &numbers[..2]), "{numbers:?}");
    assert_eq!(open.read(numbers[149], 0, 1000), Ok(contents[1].clone()));
}

#[test]
fn a_change_is_not_forgotten_when_the_listing_fails() {
    let ground = Ground::new();
    ground.image("a.caibx", b"a");
    // A way to the directory that can be broken without the directory itself telling of it.
    let (place, elsewhere) = (ground.scratch.join("place"), ground.scratch.file("file", "no directory"));
    std::os::unix::fs::symlink(&ground.index, &place).unwrap();
    let open = Open::new(&format!("{}/", place.display()), |config| config.show.poll_interval = Some(Duration::ZERO));
    assert_eq!(open.names(), ["a"]);
    let lead_to = |target: &Path| {
        fs::remove_file(&place).unwrap();
        std::os::unix::fs::symlink(target, &place).unwrap();
    };
    ground.image("b.caibx", b"b");
    lead_to(&elsewhere);
    assert_eq!(open.names(), ["a"], "what was listed before");
    lead_to(&ground.index);
    eventually("the change is seen", || open.names() == ["a", "b"]);
}

#[test]
fn a_part_that_opens_while_settings_change_gets_the_new_stores() {
    let ground = Ground::new();
    ground.image("vm.caibx", &content(1, 8 << 20));
    let (before, after) = (ground.scratch.join("before.castr"), ground.scratch.join("after.castr"));
    fs::rename(&ground.store, &before).unwrap();
    assert!(std::process::Command::new("cp").arg("-r").arg(&before).arg(&after).status().unwrap().success());
    let place = format!("{}/", ground.index.display());
    let stores = |path: &Path| vec![path.display().to_string()];
    let open = Open::new(&place, |config| config.sources.stores = stores(&before));
    let live = &open.live.live;
    let mut config = live.config();
    config.sources.stores = stores(&after);
    let prepared = {
        let _guard = open.runtime.enter();
        live.prepare(config).unwrap()
    };
    let vm = open.ino("vm");
    assert_eq!(open.read(vm, 0, 10), Ok(content(1, 10)));
    {
        let _guard = open.runtime.enter();
        prepared.commit(live);
    }
    fs::remove_dir_all(&before).unwrap();
    assert_eq!(open.read(vm, 8_000_000, 10), Ok(content(1, 8_000_010)[8_000_000..].to_vec()));
}

#[test]
fn a_part_that_is_opened_again_has_one_profile_at_a_time() {
    let ground = Ground::new();
    for i in 0..41 {
        ground.image(&format!("vm{i}.caibx"), &content(100 + i, 1000));
    }
    let manners = Arc::new(Manners::default());
    manners.hangs_profiles.store(true, Ordering::SeqCst);
    let server = serve(ground.index.clone(), &manners);
    let open = Open::new(&server.url(), |config| config.memory_bytes = 2 << 20);
    let background = Background::new(&open.live.live, open.runtime.handle()).unwrap();
    background.begin(&open.live);
    let numbers: Vec<u64> = (0..41).map(|i| open.ino(&format!("vm{i}"))).collect();
    let asked = |name: &str| server.requests().iter().filter(|request| request.line.ends_with(name)).count();
    assert_eq!(open.read(numbers[0], 0, 10).map(|read| read.len()), Ok(10));
    eventually("its profile is asked for", || asked("/vm0.caibx.profile") == 1);
    for _ in 0..3 {
        // All others are opened between, so that this one is closed.
        for number in &numbers {
            assert_eq!(open.read(*number, 0, 10).map(|read| read.len()), Ok(10));
        }
    }
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(asked("/vm0.caibx.profile"), 1);
    background.stop();
}
