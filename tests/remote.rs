//! Real mounts through real servers: every store, indexes and archives wherever they lie, a bad network, and the cache between.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::mount::{can_mount, contents};
use crate::store::oci::registry;
use crate::support::blob::noise;
use crate::support::corner::Corner;
use crate::support::listing::tree_listing;
use crate::support::mounted::Mounted;
use crate::support::peers::peer;
use crate::support::proxy::{FaultProxy, Mode, ProxyFault, chosen};
use crate::support::run::{caifs, run};
use crate::support::scratch::Scratch;
use crate::support::server::{Server, free_port};
use crate::support::servers::nginx::{Nginx, Site};
use crate::support::servers::sshd::Sshd;
use crate::support::servers::{gcs, rclone};

/// Everything of a mount's settings that a user of this machine may have is left out.
fn quiet(command: &mut Command) -> &mut Command {
    let nowhere = "/nonexistent";
    command.env("HOME", nowhere).env("XDG_CONFIG_HOME", nowhere).env("CAIFS_CONFIG_DIR", nowhere)
}

/// A tree with everything in it, its index, store and archive; and a place to mount.
struct Ground {
    scratch: Scratch,
    tree: PathBuf,
    mnt: PathBuf,
}

impl Ground {
    /// Over a tree that is there already.
    fn over(tree: PathBuf) -> Self {
        let scratch = Scratch::new();
        let mnt = scratch.dir("mnt");
        Self { scratch, tree, mnt }
    }

    fn new() -> Self {
        let scratch = Scratch::new();
        let tree = scratch.dir("tree");
        fs::create_dir(tree.join("corner")).unwrap();
        Corner::ALL.build(&tree.join("corner"));
        for i in 0..60 {
            fs::write(tree.join(format!("file {i}")), noise(20_000 + i * 1000)).unwrap();
        }
        let mnt = scratch.dir("mnt");
        Self { scratch, tree, mnt }
    }

    /// Packs the tree; the index, the store and the archive lie in this directory.
    fn pack(&self, dir: &Path) {
        fs::create_dir_all(dir).unwrap();
        run(caifs().args(["tar", "-i", "-s"]).arg(dir.join("default.castr")).arg(dir.join("t.caidx")).arg(&self.tree))
            .ok();
        run(caifs().arg("tar").arg(dir.join("t.catar")).arg(&self.tree)).ok();
    }

    #[track_caller]
    fn mount(&self, spec: &str, args: &[&str], settings: &[(&str, &str)]) -> Mounted {
        let mut command = caifs();
        quiet(&mut command).arg("mount").arg(spec).arg(&self.mnt).args(args).envs(settings.iter().copied());
        Mounted::by_command(&mut command, &self.mnt).unwrap()
    }

    /// Mounts, compares everything with the tree, and unmounts.
    #[track_caller]
    fn check(&self, spec: &str, args: &[&str], settings: &[(&str, &str)]) {
        let mounted = self.mount(spec, args, settings);
        tree_listing(&self.mnt).assert_same(&tree_listing(&self.tree));
        assert!(contents(&self.mnt) == contents(&self.tree), "{spec}: contents");
        assert!(mounted.end(), "{spec}: the server ends with its mount");
    }

    /// Mounts a plain archive, lists the root and reads one file; gives the bytes fetched for that, and the size of the archive.
    #[track_caller]
    fn check_part(&self, spec: &str, settings: &[(&str, &str)], sent_bytes: impl Fn() -> u64) {
        let before = sent_bytes();
        let mounted = self.mount(spec, &[], settings);
        assert!(fs::read_dir(&self.mnt).unwrap().count() >= 60);
        assert!(fs::read(self.mnt.join("file 7")).unwrap() == fs::read(self.tree.join("file 7")).unwrap());
        let archive_bytes = fs::metadata(self.scratch.join("root/t.catar")).unwrap().len();
        let fetched = sent_bytes() - before;
        assert!(fetched < archive_bytes / 20, "{fetched} of {archive_bytes}");
        assert!(mounted.end());
        self.check(spec, &[], settings);
    }
}

fn nginx(dir: &Path) -> Option<Nginx> {
    Some(Nginx::start(&peer("nginx")?.path, dir, Site { server: "", tls: None, verify_client: false }))
}

#[test]
fn trees_are_mounted_over_http() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let Some(nginx) = nginx(&ground.scratch) else { return };
    // What is not read is to be most of it.
    fs::write(ground.tree.join("large"), noise(120_000_000)).unwrap();
    ground.pack(nginx.root());
    // The store is found beside the index, as casync does it.
    ground.check(&format!("{}t.caidx", nginx.url()), &[], &[]);
    let local = nginx.root().join("t.caidx").display().to_string();
    ground.check(&local, &["-s", &format!("{}default.castr", nginx.url())], &[]);
    let proxy = FaultProxy::start(nginx_address(&nginx), |_, _| ProxyFault::None);
    ground.check_part(&format!("{}/t.catar", proxy.url().trim_end_matches('/')), &[], || proxy.sent_bytes());
}

#[test]
fn trees_are_mounted_from_chunk_and_index_servers() {
    if !can_mount() {
        return;
    }
    let Some(desync) = peer("desync") else { return };
    let ground = Ground::new();
    let dir = ground.scratch.join("packed");
    ground.pack(&dir);
    let start = |mut command: Command, args: &[&str], served: &Path| {
        let port = free_port();
        command.args(args).arg(served).args(["-l", &format!("127.0.0.1:{port}")]);
        Server::start(&mut command, port)
    };
    let indexes = start(caifs(), &["index-server", "-s"], &dir);
    let index = format!("http://127.0.0.1:{}/t.caidx", indexes.port);
    for command in [caifs(), desync.command()] {
        let chunks = start(command, &["chunk-server", "-s"], &dir.join("default.castr"));
        ground.check(&index, &["-s", &format!("http://127.0.0.1:{}/", chunks.port)], &[]);
    }
    let archive = format!("http://127.0.0.1:{}/t.catar", indexes.port);
    ground.check(&archive, &[], &[]);
}

#[test]
fn trees_are_mounted_from_buckets() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let buckets = ground.scratch.dir("buckets");
    ground.pack(&buckets.join("bkt/dir"));
    let Some(s3) = rclone::signed(&buckets) else { return };
    let keys =
        [("S3_ACCESS_KEY", rclone::ACCESS_KEY), ("S3_SECRET_KEY", rclone::SECRET_KEY), ("S3_REGION", "us-east-1")];
    let place = format!("s3+http://127.0.0.1:{}/bkt/dir", s3.port);
    ground.check(&format!("{place}/t.caidx?lookup=path"), &[], &keys);
    ground.check(&format!("{place}/t.catar?lookup=path"), &[], &keys);

    let Some(gcs) = gcs::start("bkt") else { return };
    let emulator = format!("127.0.0.1:{}", gcs.port);
    let emulator = [("STORAGE_EMULATOR_HOST", emulator.as_str())];
    let mut tar = caifs();
    quiet(&mut tar).envs(emulator).args(["tar", "-i", "-s", "gs://bkt/x/default.castr", "gs://bkt/x/t.caidx"]);
    run(tar.arg(&ground.tree)).ok();
    ground.check("gs://bkt/x/t.caidx", &[], &emulator);
}

#[test]
fn trees_are_mounted_from_registries() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let Some(registry) = registry(&ground.scratch, "") else { return };
    let store = format!("oci+http://127.0.0.1:{}/some/tree", registry.port);
    let index = ground.scratch.join("t.caidx");
    let mut tar = caifs();
    run(quiet(&mut tar).args(["tar", "-i", "-s", &store]).arg(&index).arg(&ground.tree)).ok();
    ground.check(&index.display().to_string(), &["-s", &store], &[]);
}

#[test]
fn trees_are_mounted_over_sftp_and_ssh() {
    if !can_mount() {
        return;
    }
    let Some(sshd) = Sshd::start() else { return };
    let ground = Ground::new();
    let dir = ground.scratch.join("root");
    ground.pack(&dir);
    let config = format!("[store]\nssh-identity-file = [{:?}]\nssh-known-hosts = {:?}\n", sshd.key, sshd.known_hosts);
    let config = ground.scratch.file("caifs.toml", config).display().to_string();
    let sftp = sshd.url("sftp", &dir);
    ground.check(&format!("{sftp}/t.caidx"), &["--config", &config], &[]);
    ground.check(&format!("{sftp}/t.catar"), &["--config", &config], &[]);
    let ssh = sshd.ssh.display().to_string();
    let far_ends = ["casync", "desync"].into_iter().filter_map(peer).map(|peer| peer.path);
    for far in far_ends.chain([caifs().get_program().into()]) {
        let far = far.display().to_string();
        let settings = [("CASYNC_SSH_PATH", ssh.as_str()), ("CASYNC_REMOTE_PATH", far.as_str())];
        let url = sshd.url_without_port("ssh", &dir);
        let store = format!("{url}/default.castr");
        // desync serves chunks only.
        let index = match far.ends_with("desync") {
            true => dir.join("t.caidx").display().to_string(),
            false => format!("{url}/t.caidx"),
        };
        ground.check(&index, &["-s", &store], &settings);
    }
}

fn nginx_address(nginx: &Nginx) -> std::net::SocketAddr {
    let url = nginx.url();
    url.trim_start_matches("http://").trim_end_matches('/').parse().expect("nginx listens on an address")
}

#[test]
fn one_request_in_five_may_fail_in_any_way() {
    if !can_mount() {
        return;
    }
    // A tree of one's own takes minutes for each kind of failure.
    let ground = std::env::var_os("CAIFS_TEST_TREE").map_or_else(Ground::new, |tree| Ground::over(tree.into()));
    let Some(nginx) = nginx(&ground.scratch) else { return };
    ground.pack(nginx.root());
    let index = nginx.root().join("t.caidx").display().to_string();
    let faults = [
        ProxyFault::Latency(Duration::from_millis(100)),
        ProxyFault::Reset,
        ProxyFault::ResetInBody,
        ProxyFault::Truncate,
        ProxyFault::WrongBytes,
        ProxyFault::Status { code: 429, retry_after: Some(0) },
        ProxyFault::Status { code: 500, retry_after: None },
        ProxyFault::Status { code: 503, retry_after: None },
        ProxyFault::Trickle(100_000),
        ProxyFault::BlackHole,
    ];
    for (seed, fault) in faults.into_iter().enumerate() {
        let proxy = FaultProxy::start(nginx_address(&nginx), move |n, _| match chosen(seed as u64, n, 20) {
            true => fault,
            false => ProxyFault::None,
        });
        // One server, with nobody else to ask.
        ground.check(
            &index,
            &["-s", &format!("{}/default.castr", proxy.url().trim_end_matches('/')), "--io-timeout", "20s"],
            &[],
        );
        assert!(proxy.n_requests() > 50);
    }
    // What one server refuses or denies for good, another one has.
    for code in [403, 404] {
        let proxy = FaultProxy::start(nginx_address(&nginx), move |n, _| match chosen(code, n, 20) {
            true => ProxyFault::Status { code: code as u16, retry_after: None },
            false => ProxyFault::None,
        });
        let group = format!("{}/default.castr|{}default.castr", proxy.url().trim_end_matches('/'), nginx.url());
        ground.check(&index, &["-s", &group], &[]);
        assert!(proxy.n_requests() > 50);
    }
}

#[test]
fn a_network_that_goes_away_is_an_error_in_time_and_comes_back_by_itself() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let Some(nginx) = nginx(&ground.scratch) else { return };
    ground.pack(nginx.root());
    let proxies = [0, 1].map(|_| FaultProxy::start(nginx_address(&nginx), |_, _| ProxyFault::None));
    let urls = proxies.each_ref().map(|proxy| format!("{}/default.castr", proxy.url().trim_end_matches('/')));
    let index = nginx.root().join("t.caidx").display().to_string();
    let log = ground.scratch.join("log");
    let args = ["-s", &urls.join("|"), "--io-timeout", "2s", "--log", log.to_str().unwrap()];
    let mounted = ground.mount(&index, &args, &[]);
    let known = tree_listing(&ground.mnt).len();
    assert!(fs::read(ground.mnt.join("file 1")).is_ok());
    proxies.iter().for_each(|proxy| proxy.set_mode(Mode::BlackHole));

    let start = Instant::now();
    let error = fs::read(ground.mnt.join("file 30")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    // Not a matter of speed: nothing may wait for a network that is not there beyond the time that was set.
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    // The kernel asks for it a second time, which does not take as long again.
    while !fs::read_to_string(&log).unwrap().contains("a read that failed late is not tried again at once") {
        assert!(start.elapsed() < Duration::from_secs(60), "every try waits");
        fs::read(ground.mnt.join("file 30")).unwrap_err();
    }
    // What needs no store is answered meanwhile.
    nix::sys::statvfs::statvfs(&ground.mnt).unwrap();
    assert_eq!(tree_listing(&ground.mnt).len(), known);
    assert!(fs::read(ground.mnt.join("file 1")).is_ok());

    proxies.iter().for_each(|proxy| proxy.set_mode(Mode::Up));
    let wanted = fs::read(ground.tree.join("file 30")).unwrap();
    let start = Instant::now();
    while fs::read(ground.mnt.join("file 30")).ok().as_ref() != Some(&wanted) {
        assert!(start.elapsed() < Duration::from_secs(60), "reads do not go on");
    }
    assert!(contents(&ground.mnt) == contents(&ground.tree));

    assert!(mounted.end());
}

#[test]
fn what_is_at_hand_is_read_beside_a_chunk_that_does_not_come() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let Some(nginx) = nginx(&scratch) else { return };
    let content = noise(256 << 10);
    let (index, store) = (nginx.root().join("x.caibx"), nginx.root().join("default.castr"));
    // The first chunk has the first page, and the second is in what the kernel asks for with it.
    let mut make = caifs();
    run(make.args(["make", "-m", "4:6:8", "-s"]).arg(&store).arg(&index).arg(scratch.file("blob", &content))).ok();
    let ids = run(caifs().arg("list-chunks").arg(&index)).ok().text();
    let lost = ids.lines().nth(1).unwrap().to_owned();
    let proxy = FaultProxy::start(nginx_address(&nginx), move |_, path| match path.contains(&lost) {
        true => ProxyFault::BlackHole,
        false => ProxyFault::None,
    });
    let (mnt, url) = (scratch.dir("mnt"), format!("{}/default.castr", proxy.url().trim_end_matches('/')));
    let mut command = caifs();
    quiet(&mut command).arg("mount").arg(&index).arg(&mnt).args(["-s", &url, "--io-timeout", "2s"]);
    let mounted = Mounted::by_command(&mut command, &mnt).unwrap();
    let image = fs::File::open(mnt.join("x")).unwrap();
    let mut page = [0; 4096];
    image.read_exact_at(&mut page, 0).unwrap();
    assert!(page[..] == content[..4096]);
    let failed = xattr::get(&mnt, "user.caifs.eio").unwrap().unwrap();
    assert_ne!(failed, b"0", "the page was asked for together with what does not come");
    image.read_exact_at(&mut page, 8192).unwrap_err();
    drop(image);
    assert!(mounted.end());
}

#[test]
fn a_mirror_that_went_away_is_used_again_when_it_is_back() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let Some(nginx) = nginx(&scratch) else { return };
    // More than the memory of the mount holds, so that reading it again and again asks the mirrors.
    let content = noise(24_000_000);
    let (index, store) = (nginx.root().join("x.caibx"), nginx.root().join("default.castr"));
    run(caifs().args(["make", "-s"]).arg(&store).arg(&index).arg(scratch.file("blob", &content))).ok();
    let proxies = [0, 1].map(|_| FaultProxy::start(nginx_address(&nginx), |_, _| ProxyFault::None));
    let urls = proxies.each_ref().map(|proxy| format!("{}/default.castr", proxy.url().trim_end_matches('/')));
    let mnt = scratch.dir("mnt");
    let mut command = caifs();
    quiet(&mut command).arg("mount").arg(&index).arg(&mnt).args(["-s", &urls.join("|"), "--memory", "16M"]);
    let mounted = Mounted::by_command(&mut command, &mnt).unwrap();
    let image = fs::File::open(mnt.join("x")).unwrap();
    // Its beginning was asked for when it was mounted.
    let mut places = (200_000..content.len() - 4096).step_by(200_000).cycle();
    // Reads the next place, past the kernel's cache, and tells how often each mirror was asked for it.
    let mut read = || {
        let place = places.next().expect("it goes round and round");
        let before = proxies.each_ref().map(FaultProxy::n_requests);
        let all = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        nix::fcntl::posix_fadvise(&image, 0, 0, all).unwrap();
        let mut bytes = [0; 4096];
        image.read_exact_at(&mut bytes, place as u64).unwrap();
        assert!(bytes[..] == content[place..place + 4096]);
        [0, 1].map(|mirror| proxies[mirror].n_requests() - before[mirror])
    };
    assert!(read()[0] > 0, "the first mirror is the first choice");
    proxies[0].set_mode(Mode::BlackHole);
    let start = Instant::now();
    let mut until = |what: &str, is_so: &dyn Fn([u64; 2]) -> bool| {
        while !is_so(read()) {
            assert!(start.elapsed() < Duration::from_secs(100), "{what}");
        }
    };
    until("the second mirror alone is asked", &|asked| asked[0] == 0 && asked[1] > 0);
    proxies[0].set_mode(Mode::Up);
    until("the first mirror alone is asked again", &|asked| asked[0] > 0 && asked[1] == 0);
    // A mount with an open file does not end.
    drop(image);
    assert!(mounted.end());
}

#[test]
fn a_chunk_server_passes_on_what_another_has_and_keeps_it() {
    let Some(desync) = peer("desync") else { return };
    let scratch = Scratch::new();
    let content = noise(2_000_000);
    let (index, store, cache) = (scratch.join("x.caibx"), scratch.join("store"), scratch.dir("cache"));
    run(caifs().args(["make", "-s"]).arg(&store).arg(&index).arg(scratch.file("blob", &content))).ok();
    let serve = |mut command: Command, from: &str, more: &[&str]| {
        let port = free_port();
        quiet(&mut command).args(["chunk-server", "-s", from, "-l", &format!("127.0.0.1:{port}")]).args(more);
        Server::start(&mut command, port)
    };
    let url = |server: &Server| format!("http://127.0.0.1:{}/", server.port);
    let read = |server: &Server| {
        run(quiet(&mut caifs()).arg("cat").arg(&index).args(["-s", &url(server), "-e", "0", "--io-timeout", "3s"]))
    };
    let upstream = serve(desync.command(), &store.display().to_string(), &[]);
    let site = serve(caifs(), &url(&upstream), &["-c", &cache.display().to_string(), "-e", "0"]);
    assert!(read(&site).ok().stdout == content);
    drop(upstream);
    assert!(read(&site).ok().stdout == content, "from the cache alone");
    let id = run(caifs().arg("list-chunks").arg(&index)).ok().text().lines().next().unwrap().to_owned();
    fs::remove_file(cache.join(&id[..4]).join(format!("{id}.cacnk"))).unwrap();
    read(&site).fails();
}

#[test]
fn readers_of_one_chunk_share_one_request() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let Some(nginx) = nginx(&scratch) else { return };
    let blob = scratch.file("blob", noise(400_000));
    let (index, store) = (nginx.root().join("x.caibx"), nginx.root().join("default.castr"));
    run(caifs().args(["make", "-s"]).arg(&store).arg(&index).arg(&blob)).ok();
    let proxy = FaultProxy::start(nginx_address(&nginx), |_, _| ProxyFault::Latency(Duration::from_millis(200)));
    let mnt = scratch.dir("mnt");
    let mut command = caifs();
    quiet(&mut command).arg("mount").arg(&index).arg(&mnt);
    command.args(["-s", &format!("{}/default.castr", proxy.url().trim_end_matches('/'))]);
    let mounted = Mounted::by_command(&mut command, &mnt).unwrap();
    let image = mnt.join("x");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut byte = [0];
                fs::File::open(&image).unwrap().read_exact_at(&mut byte, 200_000).unwrap();
            });
        }
    });
    let ids = run(caifs().arg("list-chunks").arg(&index)).ok().text();
    for id in ids.lines() {
        let path = format!("/default.castr/{}/{id}.cacnk", &id[..4]);
        assert!(proxy.n_requests_of(&path) <= 1, "{id}");
    }
    assert!(proxy.n_requests() > 0);
    assert!(mounted.end());
}

#[test]
fn a_cache_serves_without_the_network_and_the_next_version() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let Some(nginx) = nginx(&scratch) else { return };
    let mut content = noise(4_000_000);
    let make = |content: &[u8], name: &str| {
        let blob = scratch.file("blob", content);
        let (index, store) = (nginx.root().join(name), nginx.root().join("default.castr"));
        run(caifs().args(["make", "-s"]).arg(&store).arg(&index).arg(&blob)).ok();
        let ids = run(caifs().arg("list-chunks").arg(&index)).ok().text();
        ids.lines().map(str::to_owned).collect::<std::collections::HashSet<_>>()
    };
    let first = make(&content, "one.caibx");
    content[1_000_000..1_100_000].fill(7);
    let second = make(&content, "two.caibx");
    let proxy = FaultProxy::start(nginx_address(&nginx), |_, _| ProxyFault::None);
    let (mnt, cache) = (scratch.dir("mnt"), scratch.join("cache"));
    let mount = |name: &str, more: &[&str]| {
        let mut command = caifs();
        quiet(&mut command).args(["mount", &format!("{}/{name}", proxy.url().trim_end_matches('/'))]).arg(&mnt);
        command.arg("-c").arg(&cache).args(more);
        Mounted::by_command(&mut command, &mnt)
    };
    let n_chunks = || proxy.n_requests();

    let mounted = mount("one.caibx", &[]).unwrap();
    let one = fs::read(mnt.join("one")).unwrap();
    assert!(mounted.end());
    assert!(n_chunks() >= first.len() as u64);
    // The next version fetches what is new in it, and its index.
    let before = n_chunks();
    let mounted = mount("two.caibx", &[]).unwrap();
    assert!(fs::read(mnt.join("two")).unwrap() == content);
    assert!(mounted.end());
    let n_new = second.difference(&first).count() as u64;
    assert!(n_new > 0 && n_chunks() - before <= n_new + 2, "{} for {n_new}", n_chunks() - before);

    // Without the network: what is kept is served, with its index; and offline nothing is asked.
    let before = n_chunks();
    let mounted = mount("one.caibx", &["--offline"]).unwrap();
    assert!(fs::read(mnt.join("one")).unwrap() == one);
    assert!(mounted.end());
    assert_eq!(n_chunks(), before);
    proxy.set_mode(Mode::Reset);
    let mounted = mount("two.caibx", &["--io-timeout", "3s"]).unwrap();
    assert!(fs::read(mnt.join("two")).unwrap() == content);
    assert!(mounted.end());
    let refused = mount("three.caibx", &["--offline"]).unwrap_err();
    assert!(refused.contains("offline"), "{refused}");

    // A chunk that is not kept fails at once, with an errno of its own.
    let id = second.difference(&first).next().unwrap();
    fs::remove_file(cache.join(&id[..4]).join(format!("{id}.cacnk"))).unwrap();
    let mounted = mount("two.caibx", &["--offline"]).unwrap();
    assert_eq!(fs::read(mnt.join("two")).unwrap_err().raw_os_error(), Some(libc::ENETUNREACH));
    assert!(mounted.end());
}

#[test]
fn a_store_can_be_the_cache() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let Some(nginx) = nginx(&ground.scratch) else { return };
    let dir = ground.scratch.join("packed");
    ground.pack(&dir);
    let store = dir.join("default.castr").display().to_string();
    let index = dir.join("t.caidx").display().to_string();
    let cache = format!("{}cache", nginx.url());
    ground.check(&index, &["-s", &store, "-c", &cache], &[]);
    // What was read is in the cache, and enough without the store.
    ground.check(&index, &["-c", &cache, "--offline"], &[]);
}
