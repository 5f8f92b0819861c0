//! Directories of indexes elsewhere: web servers with a listing, our index server, buckets, SFTP.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::{Ground, errno, eventually, names};
use crate::mount::can_mount;
use crate::support::blob::noise;
use crate::support::mounted::Mounted;
use crate::support::peers::peer;
use crate::support::run::{caifs, run};
use crate::support::server::{Server, free_port};
use crate::support::servers::nginx::{Nginx, Site};
use crate::support::servers::sshd::Sshd;
use crate::support::servers::{gcs, rclone};

/// A short time between two looks at a place that tells of no changes.
const OFTEN: [&str; 2] = ["-o", "poll-interval=50ms"];

impl Ground {
    #[track_caller]
    fn mount_from(&self, spec: &str, args: &[&str], settings: &[(&str, &str)]) -> Mounted {
        let mut command = self.command(Path::new(spec), args);
        Mounted::by_command(command.envs(settings.iter().copied()), &self.mnt).unwrap()
    }

    /// Two images, a tree and an archive, and one of each in a directory below.
    fn fill(&self) {
        fs::create_dir_all(self.index.join("sub dir/deep")).unwrap();
        self.image("disk a%.caibx", &noise(700_000));
        // Small chunks, so that the index is larger than what is read of it at once.
        let blob = self.scratch.file("blob", noise(4_000_000));
        let mut make = caifs();
        run(make.args(["make", "-m", "1:4:16", "-s"]).arg(&self.store).arg(self.index.join("large.caibx")).arg(blob))
            .ok();
        self.tree("tree.caidx");
        self.tree("sub dir/archive.catar");
        self.image("sub dir/deep/below.caibx", &noise(1000));
        fs::write(self.index.join("notes.txt"), "x").unwrap();
        // A store beside each index, as without an option.
        for dir in ["sub dir", "sub dir/deep"] {
            let copied = Command::new("cp").arg("-r").arg(&self.store).arg(self.index.join(dir)).status().unwrap();
            assert!(copied.success());
        }
    }

    /// Looks at what [`Ground::fill`] made; `has_below` if the directories below are there, too.
    #[track_caller]
    fn check(&self, has_below: bool) {
        let mut wanted = vec!["disk a%", "large", "sub dir", "tree"];
        wanted.retain(|name| has_below || *name != "sub dir");
        assert_eq!(self.names(""), wanted);
        assert_eq!((self.own("parts"), self.own("fetches")), (0, 0), "a listing opens nothing");
        assert_eq!(fs::metadata(self.mnt.join("large")).unwrap().len(), 4_000_000);
        assert_eq!((self.own("parts"), self.own("fetches")), (0, 0), "the length is at the end of the index");
        assert!(fs::read(self.mnt.join("disk a%")).unwrap() == noise(700_000));
        assert_eq!(self.own("parts"), 1);
        self.check_tree("tree");
        if has_below {
            assert_eq!(self.names("sub dir"), ["archive", "deep"]);
            self.check_tree("sub dir/archive");
            assert!(fs::read(self.mnt.join("sub dir/deep/below")).unwrap() == noise(1000));
        }
        assert_eq!(errno(fs::metadata(self.mnt.join("none"))), Some(libc::ENOENT));
        assert_eq!(self.own("eio"), 0);
    }

    /// Puts an index at a place by `put`, replaces and removes it, and sees each in the mount.
    #[track_caller]
    fn check_changes(&self, put: impl Fn(&[u8], &str), remove: impl Fn(&str)) {
        let content = |name: &str| fs::read(self.mnt.join(name)).ok();
        let (first, second) = (noise(30_000), noise(50_000));
        // Read over while it is not there, so that the kernel knows that.
        assert_eq!(content("new"), None);
        put(&first, "new.caibx");
        eventually("a new one appears", || content("new").as_ref() == Some(&first));
        assert!(self.names("").contains(&"new".to_owned()));
        put(&second, "new.caibx");
        eventually("a replaced one is new", || content("new").as_ref() == Some(&second));
        remove("new.caibx");
        eventually("a removed one is gone", || !self.names("").contains(&"new".to_owned()) && content("new").is_none());
    }
}

fn nginx(dir: &Path, server: &str) -> Option<Nginx> {
    Some(Nginx::start(&peer("nginx")?.path, dir, Site { server, tls: None, verify_client: false }))
}

#[test]
fn web_servers_with_a_listing() {
    if !can_mount() {
        return;
    }
    for listing in ["autoindex on;", "autoindex on; autoindex_format json;"] {
        let mut ground = Ground::new();
        let Some(nginx) = nginx(&ground.scratch.dir("nginx"), listing) else { return };
        let place = nginx.root().join("some place");
        fs::create_dir(&place).unwrap();
        ground.index = place;
        ground.store = ground.index.join("default.castr");
        ground.fill();
        let url = format!("{}some%20place/", nginx.url());
        let mounted = ground.mount_from(&url, &OFTEN, &[]);
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(table.contains(&format!(" - fuse.caifs {url} ")), "{table}");
        ground.check(true);
        let index_bytes = fs::metadata(ground.index.join("large.caibx")).unwrap().len();
        let of_large: u64 = nginx
            .requests(1)
            .iter()
            .filter(|request| request.uri.ends_with("/large.caibx") && request.method == "GET")
            .map(|request| request.body_bytes)
            .sum();
        assert!((1..1000).contains(&of_large) && index_bytes > 20_000, "{of_large} of {index_bytes}");
        let put = |content: &[u8], name: &str| drop(ground.image(name, content));
        ground.check_changes(put, |name| fs::remove_file(ground.index.join(name)).unwrap());
        assert!(mounted.end());
    }
}

#[test]
fn what_was_listed_is_used_when_the_server_is_away() {
    if !can_mount() {
        return;
    }
    let mut ground = Ground::new();
    let Some(nginx) = nginx(&ground.scratch.dir("nginx"), "autoindex on;") else { return };
    ground.index = nginx.root().to_owned();
    ground.store = ground.index.join("default.castr");
    ground.image("a.caibx", b"content");
    let mounted = ground.mount_from(&nginx.url(), &OFTEN, &[]);
    assert_eq!(fs::read(ground.mnt.join("a")).unwrap(), b"content");
    drop(nginx);
    let mut ends = caifs();
    ends.arg("--version");
    run(&mut ends).ok();
    assert_eq!(ground.names(""), ["a"]);
    assert_eq!(fs::read(ground.mnt.join("a")).unwrap(), b"content", "and what was read is in memory");
    assert!(mounted.end());
}

#[test]
fn servers_without_a_listing_are_told_of() {
    if !can_mount() {
        return;
    }
    let Some(desync) = peer("desync") else { return };
    let ground = Ground::new();
    ground.image("a.caibx", b"a");
    let Some(nginx) = nginx(&ground.scratch.dir("nginx"), "location /page/ { try_files /page/index.html =404; }")
    else {
        return;
    };
    fs::create_dir_all(nginx.root().join("page")).unwrap();
    fs::write(nginx.root().join("page/index.html"), "<h1>Hello</h1>").unwrap();
    let port = free_port();
    let mut command = desync.command();
    command.args(["index-server", "-l", &format!("127.0.0.1:{port}"), "-s"]).arg(&ground.index);
    let server = Server::start(&mut command, port);
    for (url, why) in [
        (nginx.url(), "403 Forbidden"),
        (format!("{}page/", nginx.url()), "not the listing of a directory"),
        (format!("{}none/", nginx.url()), "there is no such directory"),
        (format!("http://127.0.0.1:{}/", server.port), "lists no directories"),
        (format!("http://127.0.0.1:{}/", free_port()), "cannot connect"),
    ] {
        let finished = ground.refused(Path::new(&url), &["--error-retry", "0"]);
        assert!(finished.error_line().contains(why), "{}", finished.stderr);
        assert_eq!(finished.status.code(), Some(32));
    }
}

#[test]
fn our_index_server() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    ground.fill();
    let store = ground.store.display().to_string();
    let port = free_port();
    let mut command = caifs();
    command.args(["index-server", "-w", "-l", &format!("127.0.0.1:{port}"), "-s"]).arg(&ground.index);
    command.env("DESYNC_HTTP_AUTH", "Bearer hidden");
    let server = Server::start(&mut command, port);
    let place = format!("http://127.0.0.1:{}/", server.port);
    let refused = ground.refused(Path::new(&place), &["-s", &store]);
    assert!(refused.error_line().contains("401 Unauthorized"), "the list is for who is let in: {}", refused.stderr);
    let config = "[store]\nhttp-auth = \"Bearer hidden\"\n";
    let config = ground.scratch.file("caifs.toml", config).display().to_string();
    let mounted = ground.mount_from(&place, &["--config", &config, "-s", &store, OFTEN[0], OFTEN[1]], &[]);
    ground.check(false);
    let put = |content: &[u8], name: &str| {
        let blob = ground.scratch.file("blob", content);
        let mut make = caifs();
        run(make.args(["--config", &config, "make", "-s", &store]).arg(format!("{place}{name}")).arg(blob)).ok();
    };
    ground.check_changes(put, |name| fs::remove_file(ground.index.join(name)).unwrap());
    assert!(mounted.end());
}

#[test]
fn buckets() {
    if !can_mount() {
        return;
    }
    let mut ground = Ground::new();
    let buckets = ground.scratch.dir("buckets");
    ground.index = buckets.join("bkt/some/place");
    ground.store = ground.index.join("default.castr");
    fs::create_dir_all(&ground.index).unwrap();
    ground.fill();
    let Some(s3) = rclone::signed(&buckets) else { return };
    let keys =
        [("S3_ACCESS_KEY", rclone::ACCESS_KEY), ("S3_SECRET_KEY", rclone::SECRET_KEY), ("S3_REGION", "us-east-1")];
    let place = format!("s3+http://127.0.0.1:{}/bkt/some/place", s3.port);
    let mounted = ground.mount_from(&format!("{place}/?lookup=path"), &OFTEN, &keys);
    ground.check(true);
    let store = format!("{place}/default.castr?lookup=path");
    let put = |content: &[u8], name: &str| {
        let blob = ground.scratch.file("blob", content);
        let mut make = caifs();
        run(make.envs(keys).args(["make", "-s", &store]).arg(format!("{place}/{name}?lookup=path")).arg(blob)).ok();
    };
    let content = |name: &str| fs::read(ground.mnt.join(name)).ok();
    put(&noise(30_000), "new.caibx");
    eventually("a new one appears", || content("new").as_ref() == Some(&noise(30_000)));
    put(&noise(50_000), "new.caibx");
    eventually("a replaced one is new", || content("new").as_ref() == Some(&noise(50_000)));
    assert!(mounted.end());

    let Some(gcs) = gcs::start("bkt") else { return };
    let emulator = format!("127.0.0.1:{}", gcs.port);
    let emulator = [("STORAGE_EMULATOR_HOST", emulator.as_str())];
    let blob = ground.scratch.file("blob", noise(100_000));
    for name in ["a.caibx", "below/b.caibx"] {
        let mut make = caifs();
        let (index, store) = (format!("gs://bkt/x/{name}"), "gs://bkt/x/default.castr");
        run(make.envs(emulator).args(["make", "-s", store, &index]).arg(&blob)).ok();
    }
    let mounted = ground.mount_from("gs://bkt/x/", &["-s", "gs://bkt/x/default.castr"], &emulator);
    assert_eq!(
        (ground.names(""), ground.names("below")),
        (vec!["a".to_owned(), "below".to_owned()], vec!["b".to_owned()])
    );
    assert!(fs::read(ground.mnt.join("below/b")).unwrap() == noise(100_000));
    assert!(fs::read(ground.mnt.join("a")).unwrap() == noise(100_000));
    assert_eq!(ground.own("eio"), 0);
    assert!(mounted.end());
}

#[test]
fn directories_over_sftp() {
    if !can_mount() {
        return;
    }
    let Some(sshd) = Sshd::start() else { return };
    let ground = Ground::new();
    ground.fill();
    std::os::unix::fs::symlink("large.caibx", ground.index.join("link.caibx")).unwrap();
    std::os::unix::fs::symlink("..", ground.index.join("up")).unwrap();
    let config = format!("[store]\nssh-identity-file = [{:?}]\nssh-known-hosts = {:?}\n", sshd.key, sshd.known_hosts);
    let config = ground.scratch.file("caifs.toml", config).display().to_string();
    let place = format!("{}/", sshd.url("sftp", &ground.index));
    let mounted = ground.mount_from(&place, &["--config", &config, OFTEN[0], OFTEN[1]], &[]);
    assert_eq!(fs::metadata(ground.mnt.join("link")).unwrap().len(), 4_000_000, "a symlink to a file is that file");
    fs::remove_file(ground.index.join("link.caibx")).unwrap();
    eventually("it is gone", || !names(&ground.mnt).contains(&"link".to_owned()));
    ground.check(true);
    let put = |content: &[u8], name: &str| drop(ground.image(name, content));
    ground.check_changes(put, |name| fs::remove_file(ground.index.join(name)).unwrap());
    assert!(mounted.end());
    let none = ground.refused(Path::new(&format!("{place}none/")), &["--config", &config]);
    assert!(none.error_line().contains("no such directory"), "{}", none.stderr);
}
