//! An image with a complete backing file, read by the kernel itself, beside the same image as a plain file.
//!
//! Each figure is taken of both twice, the second time in the opposite order. fio reads, since it is what people measure disks with.
//!
//! The host has two hands in what is read from the disk, which both sides feel alike and never to the same degree. It hands out the
//! disk's time by a budget: of two reads in a row the second is the slow one whatever it reads (one file, six times 2 GiB: 715 to
//! 2073 MiB/s without a rest, 1930 to 2278 with 2 s after the first). And it takes free memory back within seconds: a page cache that
//! grows into such memory takes a fault in the host per page (2 GiB: 624 to 753 MiB/s, 80 % of the time in the kernel). So the
//! disk rests before each read, and meanwhile the page cache holds the pages that the read will need (803 to 1430 MiB/s).

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::data::Source;
use crate::measure::{self, drop_caches, heat, prewarm};
use crate::options::Options;
use crate::results::Metric;
use crate::subjects::{Subject, file_of_size};
use crate::support::mounted::Mounted;
use crate::support::peers::find;
use crate::support::run::{command, run};

/// How long the last chunks may take to reach the backing file.
const COMPLETE_LIMIT: Duration = Duration::from_secs(120);

/// How long the disk rests before it is read or written.
const DISK_REST: Duration = Duration::from_secs(3);

/// What is in the page cache before a measurement.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cache {
    Warm,
    Cold,
    /// It is passed by.
    Direct,
}

/// What is measured, with fio's words for it, and how many do it at once.
const READS: [(Metric, &str, &str, u32, Cache); 8] = [
    (Metric::PassedSequentialWarm, "read", "1M", 1, Cache::Warm),
    (Metric::PassedSequentialCold, "read", "1M", 1, Cache::Cold),
    (Metric::PassedSequentialDirect, "read", "1M", 1, Cache::Direct),
    (Metric::PassedRandomWarm1, "randread", "4k", 1, Cache::Warm),
    (Metric::PassedRandomWarm4, "randread", "4k", 4, Cache::Warm),
    (Metric::PassedRandomCold1, "randread", "4k", 1, Cache::Cold),
    (Metric::PassedRandomDirect1, "randread", "4k", 1, Cache::Direct),
    (Metric::PassedRandomDirect4, "randread", "4k", 4, Cache::Direct),
];

/// One round. `add` takes the figures.
///
/// # Errors
/// A mount or read failed, or fio is not there.
pub fn round(
    subject: &Subject,
    image: &Source,
    options: &Options,
    round: usize,
    mut add: impl FnMut(&'static str, Metric, f64),
) -> Result<(), String> {
    let fio = find("fio").ok_or("missing: fio")?;
    let directory = options.work.join("backing");
    fs::create_dir_all(&directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    let backing = directory.join("image");
    for name in ["image", "image.caifs"] {
        // Of an earlier round.
        let _ = fs::remove_file(directory.join(name));
    }
    let mountpoint = options.work.join("mnt");
    let mount = |options: &[&str]| -> Result<(Mounted, PathBuf), String> {
        let mut mount = command(subject.program(), ["mount"]);
        mount.arg(&image.index).arg(&mountpoint).arg("-s").arg(&image.store).args(options);
        let mounted = Mounted::by_command(&mut mount, &mountpoint)?;
        Ok((mounted, file_of_size(&mountpoint, image.content_bytes)?))
    };
    let backed = format!("backing={},cache-keep-free=0", backing.display());

    // Without and with filling: what it costs the first reader.
    let mut fills = [(Metric::SequentialUnfilled, vec![]), (Metric::SequentialFilling, vec!["-o", backed.as_str()])];
    if round % 2 == 1 {
        fills.reverse();
    }
    for (metric, options) in &fills {
        heat(&image.store).map_err(|error| error.to_string())?;
        nix::unistd::sync();
        thread::sleep(DISK_REST);
        prewarm(2 * image.content_bytes);
        let (mounted, file) = mount(options)?;
        let (time, _) = measure::sequential(&file).map_err(|error| error.to_string())?;
        add("caifs", *metric, time.as_secs_f64() * 1e3);
        if !options.is_empty() {
            complete(&file)?;
        }
        drop(mounted);
    }
    if round == 0 && !measure::same_content(&backing, &image.native).map_err(|error| error.to_string())? {
        return Err("the backing file differs from the original".to_owned());
    }

    let (mounted, file) = mount(&["-o", &backed])?;
    for (read_idx, read) in READS.iter().enumerate() {
        let mut pair = [("caifs", &file), ("native", &image.native)];
        if (round + read_idx) % 2 == 1 {
            pair.reverse();
        }
        let [first, second] = pair;
        for (name, file) in [first, second, second, first] {
            let (metric, kind, size, n_jobs, cache) = *read;
            add(name, metric, measured(&fio, file, (kind, size, n_jobs), cache, options.random_time)?);
        }
    }
    drop(mounted);
    Ok(())
}

fn complete(image: &Path) -> Result<(), String> {
    let start = Instant::now();
    while xattr::get(image, "user.caifs.present").ok().flatten().as_deref() != Some(b"100") {
        if start.elapsed() > COMPLETE_LIMIT {
            return Err("the backing file is not complete after all was read".to_owned());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// MiB/s of sequential reads, reads a second of random ones.
fn measured(
    fio: &Path,
    file: &Path,
    (kind, size, n_jobs): (&str, &str, u32),
    cache: Cache,
    time: Duration,
) -> Result<f64, String> {
    heat(file).map_err(|error| format!("{}: {error}", file.display()))?;
    if cache != Cache::Warm {
        thread::sleep(DISK_REST);
        if !drop_caches() {
            return Err("only root may drop the kernel's caches".to_owned());
        }
    }
    let mut command = command(fio, ["--name=read", "--readonly", "--ioengine=psync", "--invalidate=0"]);
    command.args(["--group_reporting", "--output-format=json", "--randrepeat=1", "--norandommap"]);
    command.arg(format!("--filename={}", file.display())).arg(format!("--rw={kind}")).arg(format!("--bs={size}"));
    command.arg(format!("--numjobs={n_jobs}")).arg(format!("--direct={}", u8::from(cache == Cache::Direct)));
    if kind == "randread" || cache == Cache::Warm {
        command.arg("--time_based").arg(format!("--runtime={}", time.as_secs()));
    }
    let finished = run(&mut command);
    let report: serde_json::Value =
        serde_json::from_slice(&finished.stdout).map_err(|error| format!("fio: {error}: {}", finished.stderr))?;
    let read = &report["jobs"][0]["read"];
    let value = match kind {
        "read" => read["bw_bytes"].as_f64().map(|bytes| bytes / f64::from(1 << 20)),
        _ => read["iops"].as_f64(),
    };
    value.filter(|value| *value > 0.0).ok_or(format!("fio read nothing: {}", finished.stderr))
}
