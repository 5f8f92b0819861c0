//! Many readers, and a store that stalls, fails and comes back: no error but EIO within its deadline, everything back to nothing afterwards, and
//! memory that does not grow. 15 seconds as a part of all tests; `CAIFS_TEST_SOAK_SECONDS` for longer.

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::ground::{Aligned, BLOCK_BYTES, Ground, direct, is_idle};
use crate::mount::can_mount;
use crate::support::blob::Xorshift;
use crate::support::peers::peer;
use crate::support::proxy::{Mode, ProxyFault, chosen};
use crate::support::run::run;
use crate::support::servers::nginx::{Nginx, Site};

const N_READERS: u64 = 24;

/// Every read is answered by then.
const IO_TIMEOUT: Duration = Duration::from_secs(2);

/// How much later a reader may hear of it on a machine that does other things, too. It is a bound on hanging, not a measurement.
const GRACE: Duration = Duration::from_secs(20);

/// The memory of the mount, and what the process may have beside it.
const MEMORY_MIB: u64 = 32;
const BESIDE_BYTES: u64 = 96 << 20;

/// What a store does in turn, and for how long.
const PHASES: [(&str, Duration); 6] = [
    ("up", Duration::from_millis(1500)),
    ("stalled", Duration::from_millis(3000)),
    ("up", Duration::from_millis(1500)),
    ("reset", Duration::from_millis(1500)),
    ("up", Duration::from_millis(1000)),
    ("shaky", Duration::from_millis(2000)),
];

/// What readers saw.
#[derive(Default)]
struct Seen {
    n_read: AtomicU64,
    n_eio: AtomicU64,
    longest_ms: AtomicU64,
}

#[test]
fn readers_get_right_bytes_or_eio_in_time_and_nothing_is_left_behind() {
    if !can_mount() {
        return;
    }
    let Some(nginx) = peer("nginx") else { return };
    let seconds = std::env::var("CAIFS_TEST_SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(15);
    let ground = Ground::new(60_000_000);
    let nginx = Nginx::start(&nginx.path, &ground.scratch, Site { server: "", tls: None, verify_client: false });
    let proxy = ground.behind_proxy(&nginx);
    let (memory, io_timeout) = (format!("{MEMORY_MIB}M"), format!("{}s", IO_TIMEOUT.as_secs()));
    let mounted =
        ground.mount_from(&format!("{}/st", proxy.url()), &["--memory", &memory, "--io-timeout", &io_timeout]);
    let (seen, is_over) = (Seen::default(), AtomicBool::new(false));
    let rss: Mutex<Vec<u64>> = Mutex::default();
    let end = Instant::now() + Duration::from_secs(seconds);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..N_READERS)
            .map(|seed| {
                let (ground, seen, is_over) = (&ground, &seen, &is_over);
                scope.spawn(move || read(ground, seed, seen, is_over))
            })
            .collect();
        'all: loop {
            for (phase, span) in PHASES {
                match phase {
                    "stalled" => proxy.set_mode(Mode::BlackHole),
                    "reset" => proxy.set_mode(Mode::Reset),
                    "shaky" => {
                        proxy.set_mode(Mode::Up);
                        proxy.set_script(|n, _| match () {
                            () if chosen(1, n, 10) => ProxyFault::Status { code: 503, retry_after: None },
                            () if chosen(2, n, 10) => ProxyFault::WrongBytes,
                            () if chosen(3, n, 10) => ProxyFault::Truncate,
                            () if chosen(4, n, 5) => ProxyFault::BlackHole,
                            () => ProxyFault::None,
                        });
                    }
                    _ => {
                        proxy.set_script(|_, _| ProxyFault::None);
                        proxy.set_mode(Mode::Up);
                    }
                }
                // The phases are the test: this is how long the store is ill, and nobody waits for it to pass.
                std::thread::sleep(span.min(end.saturating_duration_since(Instant::now())));
                // It can be asked in every phase, which no lock or full queue may hold up.
                let status = ground.status();
                rss.lock().unwrap().push(status["rss_bytes"].as_u64().unwrap());
                assert!(!is_over.load(Ordering::SeqCst), "no reader gives up");
                if Instant::now() >= end {
                    break 'all;
                }
            }
            run(ground.caifs(&["reload"]).arg(&ground.mnt)).ok();
        }
        proxy.set_script(|_, _| ProxyFault::None);
        proxy.set_mode(Mode::Up);
        // All of them read right bytes again, without a new mount.
        let before: u64 = seen.n_read.load(Ordering::SeqCst);
        ground.until_status("reads go on", |_| seen.n_read.load(Ordering::SeqCst) > before + 10 * N_READERS);
        is_over.store(true, Ordering::SeqCst);
        for reader in readers {
            reader.join().unwrap();
        }
    });
    ground.until_status("everything is back to nothing", is_idle);
    let status = ground.status();
    let (n_read, n_eio, longest_ms) =
        (seen.n_read.load(Ordering::SeqCst), seen.n_eio.load(Ordering::SeqCst), seen.longest_ms.load(Ordering::SeqCst));
    let rss = rss.into_inner().unwrap();
    let (first, last, most) = (rss[rss.len() / 3], rss[rss.len() - 1], *rss.iter().max().unwrap());
    println!(
        "{seconds} s: {n_read} reads, {n_eio} EIO, longest read {longest_ms} ms; resident after a third {} KiB, last {} KiB, most {} KiB; totals {}",
        first / 1024,
        last / 1024,
        most / 1024,
        status["totals"]
    );
    assert!(n_read > 0 && n_eio > 0, "the store was well and ill: {n_read} {n_eio}");
    assert_eq!(status["totals"]["n_panics"], 0);
    assert!(most < (MEMORY_MIB << 20) + BESIDE_BYTES, "resident: {rss:?}");
    assert!(last < first + (16 << 20), "resident memory grows: {rss:?}");
    // What readers saw as errors is what the mount counted; the kernel may ask again for what failed.
    assert!(status["totals"]["n_eio"].as_u64() >= Some(n_eio));
    // The kernel does not take a failure for content.
    assert!(fs::read(ground.image()).unwrap() == ground.blob, "all of it is right in the end");
    assert!(mounted.end());
}

/// Reads blocks at random places until it is over.
fn read(ground: &Ground, seed: u64, seen: &Seen, is_over: &AtomicBool) {
    let image = direct(&ground.image());
    let mut random = Xorshift::seeded(seed + 1);
    let mut buffer = Aligned::new(BLOCK_BYTES);
    let n_blocks = (ground.blob.len() / BLOCK_BYTES) as u64;
    while !is_over.load(Ordering::SeqCst) {
        let offset = random.below(n_blocks) as usize * BLOCK_BYTES;
        let start = Instant::now();
        let outcome = image.read_exact_at(buffer.bytes(), offset as u64);
        let took = start.elapsed();
        seen.longest_ms.fetch_max(took.as_millis() as u64, Ordering::SeqCst);
        let is_right = match outcome {
            Ok(()) => {
                seen.n_read.fetch_add(1, Ordering::SeqCst);
                *buffer.bytes() == ground.blob[offset..offset + BLOCK_BYTES]
            }
            Err(error) => {
                seen.n_eio.fetch_add(1, Ordering::SeqCst);
                error.raw_os_error() == Some(libc::EIO)
            }
        };
        if !is_right || took > IO_TIMEOUT + GRACE {
            is_over.store(true, Ordering::SeqCst);
            panic!("reader {seed} at {offset} after {took:?}: wrong bytes, another error than EIO, or too late");
        }
    }
}
