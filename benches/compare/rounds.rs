//! The rounds: each subject's measurements in turn, again and again.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::data::{Data, Source, Zeros};
use crate::http::{self, Servers};
use crate::limit::{Verify, decode_all};
use crate::measure::{self, byte_at, drop_caches, heat, prewarm};
use crate::options::Options;
use crate::results::{Metric, Results};
use crate::subjects::{Served, Subject, What, subjects};

/// Memory touched before a cold read of the tree: its page cache, the pipe's reader, the server.
const TREE_PREWARM_BYTES: u64 = 1536 << 20;

/// Memory touched beside the size of the image before a cold read of it.
const IMAGE_PREWARM_BYTES: u64 = 512 << 20;

/// Memory touched before short measurements.
const SMALL_PREWARM_BYTES: u64 = 256 << 20;

/// Runs all rounds. A subject that fails is noted and left out from then on.
pub fn run(options: &Options, data: &Data, results: &mut Results) {
    let subjects = subjects(options, results);
    let mountpoint = options.work.join("mnt");
    let mut rounds = Rounds { options, data, results, mountpoint, failed: BTreeSet::new() };
    for round in 0..options.runs {
        eprintln!("compare: round {} of {}", round + 1, options.runs);
        // Another one begins each time, so that what the first pays for does not always hit the same.
        for turn in 0..subjects.len() {
            let subject = &subjects[(round + turn) % subjects.len()];
            rounds.subject(subject, round);
        }
        rounds.limit();
    }
    // The mountpoint is empty now; should it not be, it is better kept.
    let _ = std::fs::remove_dir(&rounds.mountpoint);
}

struct Rounds<'a> {
    options: &'a Options,
    data: &'a Data,
    results: &'a mut Results,
    mountpoint: PathBuf,
    failed: BTreeSet<(&'static str, &'static str)>,
}

impl Rounds<'_> {
    fn subject(&mut self, subject: &Subject, round: usize) {
        let data = self.data;
        if let Some(tree) = data.tree.as_ref().filter(|_| subject.can(What::Tree)) {
            self.guarded(subject.name, "tree", |rounds| rounds.tree(subject, tree, round));
        }
        let wants_image = self.options.wants_group("image") && subject.can(What::Image);
        if let Some(image) = data.image.as_ref().filter(|_| wants_image) {
            self.guarded(subject.name, "image", |rounds| rounds.image(subject, image, round));
        }
        let wants_http = self.options.wants_group("http") && matches!(subject.name, "caifs" | "desync");
        if let Some(image) = data.image.as_ref().filter(|_| wants_http) {
            self.guarded(subject.name, "http", |rounds| rounds.http(subject, image));
        }
        let wants_backing = self.options.wants_group("backing") && subject.name == "caifs";
        if let Some(image) = data.image.as_ref().filter(|_| wants_backing) {
            self.guarded(subject.name, "backing", |rounds| {
                rounds.make_mountpoint()?;
                let (options, results) = (rounds.options, &mut *rounds.results);
                crate::backing::round(subject, image, options, round, |subject, metric, value| {
                    results.add(subject, metric, value);
                })
            });
        }
        let mounts_index = matches!(subject.name, "caifs" | "desync");
        if let Some(zeros) = data.zeros.as_ref().filter(|_| mounts_index) {
            self.guarded(subject.name, "index", |rounds| rounds.index(subject, zeros));
        }
    }

    fn guarded(&mut self, name: &'static str, group: &'static str, run: impl FnOnce(&mut Self) -> Result<(), String>) {
        if self.failed.contains(&(name, group)) {
            return;
        }
        if let Err(message) = run(self) {
            self.failed.insert((name, group));
            self.results.failure(&format!("{name}, {group}: {message}"));
        }
    }

    fn tree(&mut self, subject: &Subject, tree: &Source, round: usize) -> Result<(), String> {
        let name = subject.name;
        let can_be_cold = self.make_cold(subject, tree, SMALL_PREWARM_BYTES)?;
        let some_file = self.data.some_file.clone();
        self.mount_times(subject, What::Tree, tree, |served| byte_at(&served.content.join(&some_file), 0))?;

        let can_be_cold = self.make_cold(subject, tree, SMALL_PREWARM_BYTES)? && can_be_cold;
        let served = self.serve(subject, What::Tree, tree)?;
        let (cold, n_entries) = measure::find(&served.content)?;
        let (warm, _) = measure::find(&served.content)?;
        if can_be_cold {
            self.results.add(name, Metric::FindCold, millis(cold));
        }
        self.results.add(name, Metric::FindWarm, millis(warm));
        if round == 0 && n_entries != self.data.n_entries {
            let expected = self.data.n_entries;
            self.results.failure(&format!("{name}: find shows {n_entries} entries, the source has {expected}"));
        }
        self.rss(name, Metric::TreeRss, &served);
        drop(served);

        let can_be_cold = self.make_cold(subject, tree, TREE_PREWARM_BYTES)?;
        let served = self.serve(subject, What::Tree, tree)?;
        let (cold, bytes) = measure::tar(&served.content)?;
        if can_be_cold {
            self.results.add(name, Metric::TarCold, millis(cold));
        }
        self.results.add(name, Metric::TarBytes, bytes as f64);
        self.rss(name, Metric::TreeRss, &served);
        Ok(())
    }

    fn image(&mut self, subject: &Subject, image: &Source, round: usize) -> Result<(), String> {
        let name = subject.name;
        let middle = self.data.content_offset;
        let large_prewarm = image.content_bytes + IMAGE_PREWARM_BYTES;
        self.make_cold(subject, image, SMALL_PREWARM_BYTES)?;
        self.mount_times(subject, What::Image, image, |served| byte_at(&served.content, middle))?;

        let can_be_cold = self.make_cold(subject, image, large_prewarm)?;
        let served = self.serve(subject, What::Image, image)?;
        let read = |served: &Served| measure::sequential(&served.content).map_err(|error| error.to_string());
        let (cold, bytes) = read(&served)?;
        if bytes != image.content_bytes {
            return Err(format!("the image has {bytes} bytes instead of {}", image.content_bytes));
        }
        if can_be_cold {
            self.results.add(name, Metric::SequentialCold, millis(cold));
        }
        self.results.add(name, Metric::SequentialSecond, millis(read(&served)?.0));
        let cat = measure::cat(&served.content).map_err(|error| error.to_string())?;
        self.results.add(name, Metric::CatSecond, millis(cat));
        self.rss(name, Metric::ImageRss, &served);
        let is_same = || measure::same_content(&served.content, &image.native).map_err(|error| error.to_string());
        if round == 0 && served.mount.is_some() && !is_same()? {
            return Err("the image differs from the original".to_owned());
        }
        drop(served);

        let readers = [(1, Metric::Random1, Metric::Random1Tail), (4, Metric::Random4, Metric::Random4Tail)];
        for (n_readers, metric, tail) in readers {
            let can_be_cold = self.make_cold(subject, image, IMAGE_PREWARM_BYTES)?;
            let served = self.serve(subject, What::Image, image)?;
            let time = self.options.random_time;
            let seen = measure::random(&served.content, n_readers, time).map_err(|error| error.to_string())?;
            if can_be_cold {
                self.results.add(name, metric, seen.per_second);
                self.results.add(name, tail, seen.p99_us);
            }
            self.rss(name, Metric::ImageRss, &served);
        }

        self.make_cold(subject, image, SMALL_PREWARM_BYTES)?;
        let served = self.serve(subject, What::Image, image)?;
        let n_reads = self.options.n_hot_reads;
        let seen = measure::hot_requests(&served.content, middle, n_reads).map_err(|error| error.to_string())?;
        if let Some(seen) = seen {
            self.results.add(name, Metric::HotRequest, seen.p50_us);
        }
        Ok(())
    }

    fn index(&mut self, subject: &Subject, zeros: &Zeros) -> Result<(), String> {
        for (index, metric) in [(&zeros.small, Metric::MountSmallIndex), (&zeros.large, Metric::MountLargeIndex)] {
            heat(index).and_then(|_| heat(&zeros.store)).map_err(|error| error.to_string())?;
            prewarm(SMALL_PREWARM_BYTES);
            self.make_mountpoint()?;
            let mount = match subject.name {
                "caifs" => subject.mount_caifs(index, &zeros.store, &self.mountpoint),
                _ => subject.mount_desync(index, &zeros.store, &self.mountpoint),
            }?;
            self.results.add(subject.name, metric, millis(mount.time_to_mount));
            if let Some(bytes) = mount.peak_rss_bytes() {
                self.results.add(subject.name, Metric::IndexRss, mebibytes(bytes));
            }
        }
        Ok(())
    }

    fn http(&mut self, subject: &Subject, image: &Source) -> Result<(), String> {
        heat(&image.store).map_err(|error| error.to_string())?;
        prewarm(image.content_bytes + IMAGE_PREWARM_BYTES);
        let servers = Servers::start(&self.options.work.join("nginx"), &image.store)?;
        let results = &mut *self.results;
        http::round(subject, image, &servers, &self.options.work, |subject, metric, value| {
            results.add(subject, metric, value);
        })
    }

    fn limit(&mut self) {
        let Some(image) = self.data.image.as_ref().filter(|_| self.options.wants_group("limit")) else { return };
        self.guarded("limit", "limit", |rounds| {
            for (verify, metric) in [(Verify::Yes, Metric::Limit), (Verify::No, Metric::LimitUnverified)] {
                heat(&image.store).map_err(|error| error.to_string())?;
                prewarm(IMAGE_PREWARM_BYTES);
                let seen = decode_all(&image.index, &image.store, verify)?;
                rounds.results.add("limit", metric, millis(seen.time));
                rounds.results.set_distinct_bytes(seen.distinct_bytes);
            }
            Ok(())
        });
    }

    /// Time to mount, and from the start of the program to the first byte of a file.
    fn mount_times(
        &mut self,
        subject: &Subject,
        what: What,
        source: &Source,
        first_byte: impl FnOnce(&Served) -> io::Result<()>,
    ) -> Result<(), String> {
        let served = self.serve(subject, what, source)?;
        let Some(mount) = &served.mount else { return Ok(()) };
        first_byte(&served).map_err(|error| format!("first byte: {error}"))?;
        let (to_mount, to_byte) = match what {
            What::Tree => (Metric::TreeMount, Metric::TreeFirstByte),
            What::Image => (Metric::ImageMount, Metric::ImageFirstByte),
        };
        self.results.add(subject.name, to_byte, millis(mount.started.elapsed()));
        self.results.add(subject.name, to_mount, millis(mount.time_to_mount));
        Ok(())
    }

    fn serve(&self, subject: &Subject, what: What, source: &Source) -> Result<Served, String> {
        self.make_mountpoint()?;
        subject.serve(what, source, &self.mountpoint)
    }

    fn make_mountpoint(&self) -> Result<(), String> {
        let at = |error: io::Error| format!("{}: {error}", self.mountpoint.display());
        std::fs::create_dir_all(&self.mountpoint).map_err(at)
    }

    /// What cold asks for before the mount (see [`measure`]). False when it cannot be had, so that what follows is not
    /// taken for cold.
    fn make_cold(&mut self, subject: &Subject, source: &Source, bytes: u64) -> Result<bool, String> {
        if subject.name == "native" {
            let dropped = drop_caches();
            prewarm(bytes);
            if !dropped {
                self.results.note("native cold is not measured: only root may drop the kernel's caches");
            }
            return Ok(dropped);
        }
        let heated = |path: &Path| heat(path).map(drop).map_err(|error| format!("{}: {error}", path.display()));
        match (&source.squashfs, subject.name) {
            (Some(squashfs), "squashfuse" | "squashfuse_ll") => heated(squashfs)?,
            _ => {
                heated(&source.index)?;
                heated(&source.store)?;
            }
        }
        prewarm(bytes);
        Ok(true)
    }

    fn rss(&mut self, name: &'static str, metric: Metric, served: &Served) {
        if let Some(bytes) = served.mount.as_ref().and_then(|mount| mount.peak_rss_bytes()) {
            self.results.add(name, metric, mebibytes(bytes));
        }
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
