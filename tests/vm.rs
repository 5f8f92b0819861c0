//! The host of a virtual machine: it boots an image that it has not downloaded.

mod image;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::support::mounted::Mounted;
use crate::support::proxy::{FaultProxy, ProxyFault};
use crate::support::run::{caifs, command, run, run_within};
use crate::support::scratch::Scratch;
use crate::support::server::{Server, free_port};
use image::{boot, debian_image};

/// How long a debug build may take to make the index.
const MAKE_LIMIT: Duration = Duration::from_secs(300);

/// How far away the chunks are.
const LATENCY: Duration = Duration::from_millis(20);

/// Whether to boot from a warm cache and from the plain file too, for figures.
const WANTS_ALL: &str = "CAIFS_TEST_VM_ALL";

/// A served image.
struct Served {
    scratch: Scratch,
    _chunks: (Server, FaultProxy),
    _indexes: Server,
    /// Where the index is.
    index: String,
    /// Where the chunks are.
    store: String,
}

impl Served {
    fn new(image: &Path) -> Self {
        let scratch = Scratch::new();
        let (store, indexes) = (scratch.dir("store"), scratch.dir("indexes"));
        let mut make = caifs();
        make.arg("make").arg(indexes.join("debian.caibx")).arg(image).arg("-s").arg(&store);
        run_within(&mut make, MAKE_LIMIT).ok();
        let serve = |verb: &str, dir: &PathBuf| {
            let port = free_port();
            let mut server = caifs();
            server.arg(verb).arg("-l").arg(format!("127.0.0.1:{port}")).arg("-s").arg(dir);
            (Server::start(&mut server, port), format!("http://127.0.0.1:{port}/"))
        };
        let (chunk_server, _) = serve("chunk-server", &store);
        let far_away = FaultProxy::start(chunk_server.address(), |_, _| ProxyFault::Latency(LATENCY));
        let (index_server, indexes_url) = serve("index-server", &indexes);
        let index = format!("{indexes_url}debian.caibx");
        let store = far_away.url();
        Self { scratch, _chunks: (chunk_server, far_away), _indexes: index_server, index, store }
    }

    /// Mounts it over a cache and boots from the mount: how long that took, and bytes fetched for it.
    fn boot(&self, cache: &Path, options: &[&str]) -> (Duration, u64) {
        let mountpoint = self.scratch.dir(&format!("mnt-{}", fs::read_dir(&*self.scratch).unwrap().count()));
        let before = stored_bytes(cache);
        let mut mount: Command = caifs();
        mount.arg("mount").arg(&self.index).arg(&mountpoint).arg("-s").arg(&self.store);
        let mounted = Mounted::by_command(mount.arg("-c").arg(cache).args(options), &mountpoint).unwrap();
        let took = boot(&mountpoint.join("debian"), &self.scratch);
        assert!(mounted.end(), "nobody uses the mount any more");
        (took, stored_bytes(cache) - before)
    }
}

/// Bytes of the chunks in a cache.
fn stored_bytes(cache: &Path) -> u64 {
    let listed = run(&mut command(
        "find",
        [cache.as_os_str(), "-name".as_ref(), "*.cacnk".as_ref(), "-printf".as_ref(), "%s\n".as_ref()],
    ));
    listed.ok().text().lines().map(|size| size.parse::<u64>().unwrap()).sum()
}

#[test]
fn a_machine_boots_from_an_image_that_was_not_downloaded() {
    let Some(image) = debian_image() else { return };
    let served = Served::new(&image);
    let store_bytes = stored_bytes(&served.scratch.join("store"));
    let (cold_cache, other_cache) = (served.scratch.dir("cold"), served.scratch.dir("other"));
    let profile = served.scratch.join("boot.profile");
    let record = format!("record={}", profile.display());
    let replay = format!("profile={}", profile.display());

    let (cold, cold_bytes) = served.boot(&cold_cache, &["-o", &record]);
    let (with_profile, _) = served.boot(&other_cache, &["-o", &replay]);
    eprintln!(
        "a boot fetched {cold_bytes} bytes of the {store_bytes} that the chunks of a {} byte image have, each request taking 20 ms: \
         {:.1} s with an empty cache, {:.1} s with an empty cache and a profile",
        image.metadata().unwrap().len(),
        cold.as_secs_f32(),
        with_profile.as_secs_f32(),
    );
    assert!(cold_bytes > 0 && cold_bytes < store_bytes / 2, "{cold_bytes} of {store_bytes} bytes");
    assert!(profile.metadata().unwrap().len() > 0);
    if std::env::var_os(WANTS_ALL).is_none() {
        return;
    }
    let (warm, warm_bytes) = served.boot(&cold_cache, &["-o", "profile=no"]);
    let local = boot(&image, &served.scratch);
    eprintln!("{:.1} s with a warm cache, {:.1} s from the local file", warm.as_secs_f32(), local.as_secs_f32());
    // A boot reads what the last one read, and little else.
    assert!(warm_bytes < cold_bytes / 10, "{warm_bytes} after {cold_bytes} bytes");
}
