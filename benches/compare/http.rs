//! The image over HTTP: nginx on loopback, as it is and with 20 ms added to each request, and the disk tier before it; and small reads
//! without the kernel's read-ahead, with ours and with nobody's.

use std::collections::HashSet;
use std::fs::OpenOptions;
use std::net::SocketAddr;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use caifs::digest::ChunkId;
use caifs::format::index::Index;

use crate::data::Source;
use crate::measure;
use crate::results::Metric;
use crate::subjects::Subject;
use crate::support::mounted::Mounted;
use crate::support::peers::find;
use crate::support::proxy::{FaultProxy, ProxyFault};
use crate::support::run::command;
use crate::support::servers::nginx::{Nginx, Site};

/// What is added to each request.
const DELAY: Duration = Duration::from_millis(20);

/// Chunks fetched one at a time to know how fast that is.
const N_ONE_BY_ONE: usize = 200;

/// What is read at a time past the kernel's page cache, so that nothing is read ahead there: what it would ask for by itself.
const DIRECT_BYTES: usize = 128 << 10;

/// Distinct content that is read so.
const DIRECT_CONTENT_BYTES: u64 = 64 << 20;

/// The servers of this group.
pub struct Servers {
    nginx: Nginx,
    delayed: FaultProxy,
}

impl Servers {
    /// Serves a store.
    ///
    /// # Errors
    /// nginx is not there.
    pub fn start(dir: &Path, store: &Path) -> Result<Self, String> {
        let program = find("nginx").ok_or("missing: nginx")?;
        std::fs::create_dir_all(dir).map_err(|error| error.to_string())?;
        let site = format!("location /store/ {{ alias {}/; }} keepalive_requests 1000000;", store.display());
        let nginx = Nginx::start(&program, dir, Site { server: &site, tls: None, verify_client: false });
        let url = nginx.url();
        let address: SocketAddr = url
            .trim_start_matches("http://")
            .trim_end_matches('/')
            .parse()
            .map_err(|_| format!("{url}: no address"))?;
        let delayed = FaultProxy::start(address, |_, _| ProxyFault::Latency(DELAY));
        Ok(Self { nginx, delayed })
    }

    fn store(&self) -> String {
        format!("{}store/", self.nginx.url())
    }

    fn delayed_store(&self) -> String {
        format!("{}/store/", self.delayed.url().trim_end_matches('/'))
    }
}

/// One round of a subject. `add` takes the figures.
///
/// # Errors
/// A mount or read failed.
pub fn round(
    subject: &Subject,
    image: &Source,
    servers: &Servers,
    work: &Path,
    mut add: impl FnMut(&'static str, Metric, f64),
) -> Result<(), String> {
    let mountpoint = work.join("mnt");
    // What is fetched: zeros and what else repeats come once.
    let chunks = distinct_chunks(&image.index)?;
    let distinct_bytes = chunks.iter().map(|(_, n_bytes)| n_bytes).sum::<u64>();
    let rate = |time: Duration, bytes: u64| bytes as f64 / time.as_secs_f64() / f64::from(1 << 20);
    let read = |mount: Mounted| {
        let file = crate::subjects::file_of_size(&mountpoint, image.content_bytes)?;
        let (time, _) = measure::sequential(&file).map_err(|error| error.to_string())?;
        drop(mount);
        Ok::<f64, String>(rate(time, distinct_bytes))
    };
    let mount = |more: &[&str], store: String| {
        let mut mount = command(subject.program(), ["mount".as_ref(), image.index.as_os_str(), mountpoint.as_os_str()]);
        Mounted::by_command(mount.args(["-s", &store]).args(more), &mountpoint)
    };
    std::fs::create_dir_all(&mountpoint).map_err(|error| error.to_string())?;
    if subject.name == "desync" {
        let mut server = command(subject.program(), ["mount-index", "-s", &servers.store()]);
        let mount = Mounted::by_server(server.arg(&image.index).arg(&mountpoint), &mountpoint)?;
        add(subject.name, Metric::HttpSequential, read(mount)?);
        return Ok(());
    }
    add(subject.name, Metric::HttpSequential, read(mount(&[], servers.store())?)?);
    let cache = work.join("cache");
    let _ = std::fs::remove_dir_all(&cache);
    let kept = ["-c", cache.to_str().ok_or("the work directory is not UTF-8")?, "--cache-size", "64G"];
    add(subject.name, Metric::HttpKeeping, read(mount(&kept, servers.store())?)?);
    let offline = [&kept[..], &["--offline"]].concat();
    add(subject.name, Metric::HttpKept, read(mount(&offline, servers.store())?)?);
    let _ = std::fs::remove_dir_all(&cache);
    add(subject.name, Metric::DelayedSequential, read(mount(&[], servers.delayed_store())?)?);
    add("limit", Metric::DelayedSequential, one_by_one(&chunks, &servers.delayed_store())?);
    let (end, content_bytes) = beginning(&image.index)?;
    for (metric, more) in [(Metric::DelayedDirect, &[][..]), (Metric::DelayedDirectAlone, &["-o", "read-ahead=0"])] {
        let mount = mount(more, servers.delayed_store())?;
        let file = crate::subjects::file_of_size(&mountpoint, image.content_bytes)?;
        let time = direct(&file, end).map_err(|error| error.to_string())?;
        drop(mount);
        add(subject.name, metric, rate(time, content_bytes));
    }
    Ok(())
}

/// The first so many bytes of an image that have [`DIRECT_CONTENT_BYTES`] of distinct content, and how much that really is.
fn beginning(index: &Path) -> Result<(u64, u64), String> {
    let bytes = std::fs::read(index).map_err(|error| error.to_string())?;
    let index = Index::open(bytes).map_err(|error| error.to_string())?;
    let (mut met, mut content_bytes, mut end) = (HashSet::new(), 0, 0);
    for item in index.items() {
        let item = item.map_err(|error| error.to_string())?;
        if content_bytes >= DIRECT_CONTENT_BYTES {
            break;
        }
        end = item.end;
        if met.insert(item.id) {
            content_bytes += item.size_bytes();
        }
    }
    Ok((end, content_bytes))
}

/// Reads the beginning of a file past the page cache, a piece at a time.
fn direct(file: &Path, end: u64) -> std::io::Result<Duration> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(file)?;
    let mut piece = vec![0; DIRECT_BYTES];
    let start = Instant::now();
    let mut offset = 0;
    while offset < end {
        match file.read_at(&mut piece, offset)? {
            0 => break,
            n => offset += n as u64,
        }
    }
    Ok(start.elapsed())
}

/// The ids of an index, each once, with the bytes of their chunks.
fn distinct_chunks(index: &Path) -> Result<Vec<(ChunkId, u64)>, String> {
    let bytes = std::fs::read(index).map_err(|error| error.to_string())?;
    let index = Index::open(bytes).map_err(|error| error.to_string())?;
    let mut met = HashSet::new();
    let mut chunks = Vec::new();
    for item in index.items() {
        let item = item.map_err(|error| error.to_string())?;
        if met.insert(item.id) {
            chunks.push((item.id, item.end - item.start));
        }
    }
    Ok(chunks)
}

/// MiB of content a second when one chunk is asked for after the other, on one connection.
fn one_by_one(chunks: &[(ChunkId, u64)], store: &str) -> Result<f64, String> {
    let step = (chunks.len() / N_ONE_BY_ONE).max(1);
    let chosen = || chunks.iter().step_by(step).take(N_ONE_BY_ONE);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
    let options = caifs::store::StoreOptions::default();
    let client = caifs::store::http::client(&options, store).map_err(|error| error.to_string())?;
    let start = Instant::now();
    for (id, _) in chosen() {
        let url = format!("{store}{}/{id}.cacnk", &id.to_hex()[..4]);
        let fetched = async { client.get(url).send().await?.error_for_status()?.bytes().await };
        runtime.block_on(fetched).map_err(|error| error.to_string())?;
    }
    let n_bytes = chosen().map(|(_, n_bytes)| n_bytes).sum::<u64>();
    Ok(n_bytes as f64 / start.elapsed().as_secs_f64() / f64::from(1 << 20))
}
