//! One measurement each, by wall clock, and what makes a measurement cold.
//!
//! Cold means: a fresh mount, so that neither the kernel nor the server has anything of it; the chunk store (or the
//! squashfs file) in the page cache, so that the disk is not what is compared; and memory touched beforehand, because
//! a virtual machine pays for the first touch of each page, which would count against whoever comes first. For the
//! native filesystem, which has no mount to make fresh, cold means all kernel caches dropped: it reads the disk.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::support::blob::Xorshift;
use crate::support::run::{command, run_within};

/// What [`self`] says, in one line for the table.
pub const COLD: &str = "cold = fresh mount, store in the page cache, memory touched beforehand; \
                        native cold = kernel caches dropped (reads the disk)";

/// No single find or tar takes longer, or something hangs.
const COMMAND_LIMIT: Duration = Duration::from_secs(900);

/// Read size of sequential reads.
const SEQUENTIAL_BYTES: usize = 1 << 20;

/// Read size of random reads.
const RANDOM_BYTES: u64 = 4096;

/// Touches and frees memory, so that the next measurement finds pages that the host has already provided. At most half
/// of what is available.
pub fn prewarm(bytes: u64) {
    let available = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    });
    let bytes = bytes.min(available.unwrap_or(0) * 1024 / 2);
    // One byte that is not 0 per page makes the kernel provide it.
    let mut memory = vec![0u8; usize::try_from(bytes).unwrap_or(0)];
    memory.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    std::hint::black_box(&memory);
}

/// Reads every file at or under a path, so that the page cache has it. Returns the bytes read.
pub fn heat(path: &Path) -> io::Result<u64> {
    let mut files = Vec::new();
    let mut waiting = vec![path.to_owned()];
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            for entry in fs::read_dir(path)? {
                waiting.push(entry?.path());
            }
        } else {
            files.push(path);
        }
    }
    let next = AtomicUsize::new(0);
    let read_all = || -> io::Result<u64> {
        let mut buffer = vec![0; SEQUENTIAL_BYTES];
        let mut total = 0;
        while let Some(path) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            total += read_to_end(&mut File::open(path)?, &mut buffer)?;
        }
        Ok(total)
    };
    thread::scope(|scope| {
        let other = scope.spawn(read_all);
        let own = read_all()?;
        Ok(own + other.join().expect("a reader does not panic")?)
    })
}

/// Drops the kernel's caches; false when this is not allowed.
pub fn drop_caches() -> bool {
    nix::unistd::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").is_ok()
}

/// `find -printf %s` over a tree: time and number of entries.
pub fn find(dir: &Path) -> Result<(Duration, u64), String> {
    let start = Instant::now();
    let finished = run_within(command("find", [".", "-printf", "%s\\n"]).current_dir(dir), COMMAND_LIMIT);
    let time = start.elapsed();
    match finished.status.success() {
        true => Ok((time, finished.stdout.iter().filter(|&&byte| byte == b'\n').count() as u64)),
        false => Err(format!("find: {}", finished.stderr.lines().next().unwrap_or("failed"))),
    }
}

/// `tar cf - . | wc -c` over a tree: time and bytes. A pipe, because GNU tar reads no file when it writes to /dev/null.
pub fn tar(dir: &Path) -> Result<(Duration, u64), String> {
    let start = Instant::now();
    let script = "set -o pipefail; tar cf - . | wc -c";
    let finished = run_within(command("bash", ["-c", script]).current_dir(dir), COMMAND_LIMIT);
    let time = start.elapsed();
    // tar says "file changed as we read it" with status 1 for servers whose attributes are not stable.
    match (finished.text().trim().parse(), finished.status.code()) {
        (Ok(bytes), Some(0 | 1)) => Ok((time, bytes)),
        _ => Err(format!("tar: {}", finished.stderr.lines().next().unwrap_or("failed"))),
    }
}

/// Reads a file from start to end in 1 MiB reads: time and bytes.
pub fn sequential(file: &Path) -> io::Result<(Duration, u64)> {
    let mut buffer = vec![0; SEQUENTIAL_BYTES];
    let start = Instant::now();
    let bytes = read_to_end(&mut File::open(file)?, &mut buffer)?;
    Ok((start.elapsed(), bytes))
}

/// `cat` of a file into nothing.
pub fn cat(file: &Path) -> io::Result<Duration> {
    let start = Instant::now();
    let status = command("cat", [file]).stdin(Stdio::null()).stdout(Stdio::null()).status()?;
    match status.success() {
        true => Ok(start.elapsed()),
        false => Err(io::Error::other(format!("cat: {status}"))),
    }
}

/// The time until the first byte at an offset is there.
pub fn byte_at(file: &Path, offset: u64) -> io::Result<()> {
    File::open(file)?.read_exact_at(&mut [0], offset)
}

/// Whether two files have the same content.
pub fn same_content(left: &Path, right: &Path) -> io::Result<bool> {
    let status = command("cmp", ["-s".as_ref(), left.as_os_str(), right.as_os_str()]).status()?;
    Ok(status.success())
}

/// What random reads gave.
#[derive(Debug, Clone, Copy)]
pub struct Random {
    /// Reads a second, all readers together.
    pub per_second: f64,
    /// Median time of one read.
    pub p50_us: f64,
    /// Time that one read in a hundred exceeded.
    pub p99_us: f64,
}

/// 4 KiB reads at random aligned offsets of a file, buffered and without read-ahead, by several readers for a fixed
/// time. The offsets are the same in every run.
pub fn random(file: &Path, n_readers: u64, time: Duration) -> io::Result<Random> {
    let n_blocks = fs::metadata(file)?.len() / RANDOM_BYTES;
    let start = Instant::now();
    let reader = |seed: u64| -> io::Result<Vec<f64>> {
        let file = File::open(file)?;
        // As fio does for random reads; otherwise the kernel may read ahead what nobody wants.
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM)?;
        let mut noise = Xorshift::seeded(seed * 0x1234_5678_9ABC_DEF1);
        let mut buffer = [0; RANDOM_BYTES as usize];
        let mut times = Vec::new();
        while start.elapsed() < time {
            let offset = noise.below(n_blocks) * RANDOM_BYTES;
            let before = Instant::now();
            file.read_exact_at(&mut buffer, offset)?;
            times.push(before.elapsed().as_secs_f64() * 1e6);
        }
        Ok(times)
    };
    let times = thread::scope(|scope| {
        let readers: Vec<_> = (1..=n_readers).map(|seed| scope.spawn(move || reader(seed))).collect();
        let mut all = Vec::new();
        for reader in readers {
            all.extend(reader.join().expect("a reader does not panic")?);
        }
        io::Result::Ok(all)
    })?;
    Ok(summary(times, start.elapsed()))
}

/// 4 KiB `O_DIRECT` reads within 128 KiB that the server has in memory already: each is one request to the server.
/// `None` when the file cannot be read so.
pub fn hot_requests(file: &Path, offset: u64, n_reads: usize) -> io::Result<Option<Random>> {
    const RANGE_BYTES: u64 = 128 << 10;
    let file = match OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(file) {
        Ok(file) => file,
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(None),
        Err(error) => return Err(error),
    };
    let offset = offset - offset % RANDOM_BYTES;
    let n_blocks = (file.metadata()?.len() - offset).min(RANGE_BYTES) / RANDOM_BYTES;
    // Direct reads want aligned memory.
    let mut memory = vec![0u8; 2 * RANDOM_BYTES as usize];
    let aligned = memory.as_ptr().align_offset(RANDOM_BYTES as usize);
    let buffer = &mut memory[aligned..aligned + RANDOM_BYTES as usize];
    for block in 0..n_blocks {
        file.read_exact_at(buffer, offset + block * RANDOM_BYTES)?;
    }
    let mut noise = Xorshift::default();
    let mut times = Vec::with_capacity(n_reads);
    let start = Instant::now();
    for _ in 0..n_reads {
        let at = offset + noise.below(n_blocks) * RANDOM_BYTES;
        let before = Instant::now();
        file.read_exact_at(buffer, at)?;
        times.push(before.elapsed().as_secs_f64() * 1e6);
    }
    Ok(Some(summary(times, start.elapsed())))
}

/// A regular file that holds something, far down in a tree: the same one each time.
pub fn some_file(tree: &Path) -> Option<PathBuf> {
    let finished = run_within(command("find", [".", "-type", "f", "-size", "+0"]).current_dir(tree), COMMAND_LIMIT);
    let text = finished.text();
    let mut files: Vec<&str> = text.lines().filter(|line| tree.join(line).is_file()).collect();
    files.sort_unstable();
    files.get(files.len() / 2).map(PathBuf::from)
}

fn read_to_end(file: &mut File, buffer: &mut [u8]) -> io::Result<u64> {
    let mut total = 0;
    loop {
        match file.read(buffer)? {
            0 => return Ok(total),
            n => total += n as u64,
        }
    }
}

fn summary(mut times: Vec<f64>, elapsed: Duration) -> Random {
    times.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| times.get((times.len() as f64 * share) as usize).copied().unwrap_or(f64::NAN);
    Random { per_second: times.len() as f64 / elapsed.as_secs_f64(), p50_us: at(0.5), p99_us: at(0.99) }
}
