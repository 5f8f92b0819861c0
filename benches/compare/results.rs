//! Samples, their medians, the table, the JSON, and the targets.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;

use caifs::config::DEFAULT_MEMORY_BYTES;
use serde_json::{Value, json};

use crate::measure::COLD;
use crate::options::{GROUPS, Options, SUBJECTS};

/// What a mount may use beside its memory budget, in MiB.
const RSS_ALLOWANCE_MIB: f64 = 40.0;

/// Samples of one figure that differ by more than this factor are named under the table: something disturbed one of them.
const STEADY_FACTOR: f64 = 1.5;

/// What is measured, in the order of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "`Metric::row` says what each is")]
pub enum Metric {
    TreeMount,
    TreeFirstByte,
    FindCold,
    FindWarm,
    TarCold,
    TarBytes,
    TreeRss,
    ImageMount,
    ImageFirstByte,
    SequentialCold,
    SequentialSecond,
    CatSecond,
    Random1,
    Random1Tail,
    Random4,
    Random4Tail,
    HotRequest,
    ImageRss,
    Limit,
    LimitUnverified,
    MountSmallIndex,
    MountLargeIndex,
    IndexRss,
    HttpSequential,
    HttpKeeping,
    HttpKept,
    DelayedSequential,
    DelayedDirect,
    DelayedDirectAlone,
    SequentialUnfilled,
    SequentialFilling,
    PassedSequentialWarm,
    PassedSequentialCold,
    PassedSequentialDirect,
    PassedRandomWarm1,
    PassedRandomWarm4,
    PassedRandomCold1,
    PassedRandomDirect1,
    PassedRandomDirect4,
}

impl Metric {
    const ALL: [Self; 39] = [
        Self::TreeMount,
        Self::TreeFirstByte,
        Self::FindCold,
        Self::FindWarm,
        Self::TarCold,
        Self::TarBytes,
        Self::TreeRss,
        Self::ImageMount,
        Self::ImageFirstByte,
        Self::SequentialCold,
        Self::SequentialSecond,
        Self::CatSecond,
        Self::Random1,
        Self::Random1Tail,
        Self::Random4,
        Self::Random4Tail,
        Self::HotRequest,
        Self::ImageRss,
        Self::Limit,
        Self::LimitUnverified,
        Self::MountSmallIndex,
        Self::MountLargeIndex,
        Self::IndexRss,
        Self::HttpSequential,
        Self::HttpKeeping,
        Self::HttpKept,
        Self::DelayedSequential,
        Self::DelayedDirect,
        Self::DelayedDirectAlone,
        Self::SequentialUnfilled,
        Self::SequentialFilling,
        Self::PassedSequentialWarm,
        Self::PassedSequentialCold,
        Self::PassedSequentialDirect,
        Self::PassedRandomWarm1,
        Self::PassedRandomWarm4,
        Self::PassedRandomCold1,
        Self::PassedRandomDirect1,
        Self::PassedRandomDirect4,
    ];

    /// Group, text and unit.
    fn row(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::TreeMount => ("tree", "time to mount", "ms"),
            Self::TreeFirstByte => ("tree", "time to first byte", "ms"),
            Self::FindCold => ("tree", "find -printf %s, cold", "ms"),
            Self::FindWarm => ("tree", "find -printf %s, warm", "ms"),
            Self::TarCold => ("tree", "tar cf - . | wc -c, cold", "ms"),
            Self::TarBytes => ("tree", "bytes of that tar", "bytes"),
            Self::TreeRss => ("tree", "peak RSS of the server", "MiB"),
            Self::ImageMount => ("image", "time to mount", "ms"),
            Self::ImageFirstByte => ("image", "time to first byte", "ms"),
            Self::SequentialCold => ("image", "sequential read, cold", "ms"),
            Self::SequentialSecond => ("image", "sequential read, second", "ms"),
            Self::CatSecond => ("image", "cat, second", "ms"),
            Self::Random1 => ("image", "4 KiB random, 1 reader, cold", "1/s"),
            Self::Random1Tail => ("image", "  p99 of these", "us"),
            Self::Random4 => ("image", "4 KiB random, 4 readers, cold", "1/s"),
            Self::Random4Tail => ("image", "  p99 of these", "us"),
            Self::HotRequest => ("image", "4 KiB request, chunk in memory, p50", "us"),
            Self::ImageRss => ("image", "peak RSS of the server", "MiB"),
            Self::Limit => ("limit", "open, read, decode, verify, 2 threads", "ms"),
            Self::LimitUnverified => ("limit", "open, read, decode, 2 threads", "ms"),
            Self::MountSmallIndex => ("index", "time to mount, 1 MiB", "ms"),
            Self::MountLargeIndex => ("index", "time to mount, large (sparse)", "ms"),
            Self::IndexRss => ("index", "peak RSS of the server", "MiB"),
            Self::HttpSequential => ("http", "sequential read over HTTP, distinct", "MiB/s"),
            Self::HttpKeeping => ("http", "  the same, kept on disk meanwhile", "MiB/s"),
            Self::HttpKept => ("http", "  from what was kept", "MiB/s"),
            Self::DelayedSequential => ("http", "  20 ms added to each request", "MiB/s"),
            Self::DelayedDirect => ("http", "  and 128 KiB a read past the kernel", "MiB/s"),
            Self::DelayedDirectAlone => ("http", "  and nothing read ahead", "MiB/s"),
            Self::SequentialUnfilled => ("backing", "sequential read, cold, no backing file", "ms"),
            Self::SequentialFilling => ("backing", "sequential read, cold, filling one", "ms"),
            Self::PassedSequentialWarm => ("backing", "sequential 1 MiB, complete, warm", "MiB/s"),
            Self::PassedSequentialCold => ("backing", "sequential 1 MiB, from the disk", "MiB/s"),
            Self::PassedSequentialDirect => ("backing", "sequential 1 MiB, O_DIRECT", "MiB/s"),
            Self::PassedRandomWarm1 => ("backing", "4 KiB random, 1 reader, warm", "1/s"),
            Self::PassedRandomWarm4 => ("backing", "4 KiB random, 4 readers, warm", "1/s"),
            Self::PassedRandomCold1 => ("backing", "4 KiB random, 1 reader, from the disk", "1/s"),
            Self::PassedRandomDirect1 => ("backing", "4 KiB random, 1 reader, O_DIRECT", "1/s"),
            Self::PassedRandomDirect4 => ("backing", "4 KiB random, 4 readers, O_DIRECT", "1/s"),
        }
    }

    /// Whether samples of a quiet machine are near each other: not so for the slowest reads of many.
    fn is_steady(self) -> bool {
        !self.is_peak() && !matches!(self, Self::Random1Tail | Self::Random4Tail | Self::PassedRandomCold1)
    }

    /// Whether the highest sample is what counts, not the median.
    fn is_peak(self) -> bool {
        matches!(self, Self::TreeRss | Self::ImageRss | Self::IndexRss)
    }
}

/// All that one run found.
#[derive(Debug)]
pub struct Results {
    options: Options,
    samples: BTreeMap<(Metric, &'static str), Vec<f64>>,
    peers: Vec<(&'static str, String)>,
    notes: Vec<String>,
    failures: Vec<String>,
    distinct_bytes: u64,
    /// The machine's load and processor times before the run.
    before: Disturbance,
}

/// What other work on the machine, and its host, took.
#[derive(Debug, Clone, Default)]
struct Disturbance {
    load: String,
    stolen_ticks: u64,
    all_ticks: u64,
}

impl Disturbance {
    fn now() -> Self {
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default().trim().to_owned();
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        // The first line: "cpu" and the ticks of user, nice, system, idle, iowait, irq, softirq, steal.
        let ticks: Vec<u64> =
            stat.lines().next().unwrap_or("").split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
        let all_ticks = ticks.iter().take(8).sum();
        Self { load, stolen_ticks: ticks.get(7).copied().unwrap_or(0), all_ticks }
    }

    /// The share of processor time since then that the host gave to others.
    fn stolen_share(&self, later: &Self) -> f64 {
        let all = later.all_ticks.saturating_sub(self.all_ticks).max(1);
        later.stolen_ticks.saturating_sub(self.stolen_ticks) as f64 / all as f64
    }
}

/// One line of the acceptance.
struct Target {
    text: &'static str,
    value: Option<f64>,
    limit: f64,
    at_least: bool,
}

impl Results {
    /// Nothing yet.
    pub fn new(options: &Options) -> Self {
        let options = options.clone();
        Self {
            options,
            samples: BTreeMap::new(),
            peers: Vec::new(),
            notes: Vec::new(),
            failures: Vec::new(),
            distinct_bytes: 0,
            before: Disturbance::now(),
        }
    }

    /// What makes figures of this run doubtful: one sample only, or samples far apart.
    fn doubts(&self) -> Vec<String> {
        let mut doubts = Vec::new();
        if self.options.runs < 3 {
            doubts.push(format!(
                "{} run(s): a single disturbed sample is not seen as such; compare only with --runs 3 or more",
                self.options.runs
            ));
        }
        for ((metric, subject), samples) in self.samples.iter().filter(|((metric, _), _)| metric.is_steady()) {
            let least = samples.iter().copied().fold(f64::INFINITY, f64::min);
            let most = samples.iter().copied().fold(0.0, f64::max);
            if most > least * STEADY_FACTOR {
                let (group, name, unit) = metric.row();
                doubts.push(format!(
                    "unsteady: {subject}, {group}, {name}: {} to {} {unit}",
                    shown(least),
                    shown(most)
                ));
            }
        }
        doubts
    }

    /// Takes in one sample.
    pub fn add(&mut self, subject: &'static str, metric: Metric, value: f64) {
        self.samples.entry((metric, subject)).or_default().push(value);
    }

    /// What a peer says of itself.
    pub fn peer(&mut self, name: &'static str, version: String) {
        self.peers.push((name, version));
    }

    /// Something to know when reading the table; said once.
    pub fn note(&mut self, text: &str) {
        if !self.notes.iter().any(|note| note == text) {
            self.notes.push(text.to_owned());
        }
    }

    /// Something that went wrong: it stands in the table, and the run ends with an error.
    pub fn failure(&mut self, text: &str) {
        eprintln!("compare: {text}");
        self.failures.push(text.to_owned());
    }

    /// What went wrong.
    pub fn failures(&self) -> &[String] {
        &self.failures
    }

    /// Plain bytes of the image's distinct chunks.
    pub fn set_distinct_bytes(&mut self, bytes: u64) {
        self.distinct_bytes = bytes;
    }

    /// The median (the peak for memory), when there are samples.
    fn value(&self, subject: &'static str, metric: Metric) -> Option<f64> {
        let samples = self.samples.get(&(metric, subject))?;
        match metric.is_peak() {
            true => samples.iter().copied().max_by(f64::total_cmp),
            false => median(samples),
        }
    }

    fn targets(&self) -> Vec<Target> {
        let value = |subject, metric| self.value(subject, metric);
        let ratio = |above: Option<f64>, below: Option<f64>| Some(above? / below?);
        let ours = |metric| value("caifs", metric);
        let rss = [Metric::TreeRss, Metric::ImageRss, Metric::IndexRss].into_iter().filter_map(ours);
        let budget_mib = DEFAULT_MEMORY_BYTES as f64 / f64::from(1 << 20);
        let target = |text, value, at_least, limit| Target { text, value, limit, at_least };
        let passed = |text, metric| target(text, ratio(ours(metric), value("native", metric)), true, 0.9);
        vec![
            target(
                "cold find: times faster than casync mount",
                ratio(value("casync", Metric::FindCold), ours(Metric::FindCold)),
                true,
                10.0,
            ),
            target(
                "cold tar: times faster than casync mount",
                ratio(value("casync", Metric::TarCold), ours(Metric::TarCold)),
                true,
                10.0,
            ),
            target(
                "cold sequential read: share of the limit",
                ratio(value("limit", Metric::Limit), ours(Metric::SequentialCold)),
                true,
                0.6,
            ),
            target(
                "cold sequential read: times faster than desync",
                ratio(value("desync", Metric::SequentialCold), ours(Metric::SequentialCold)),
                true,
                3.0,
            ),
            target(
                "second read (cat): share of native cat",
                ratio(value("native", Metric::CatSecond), ours(Metric::CatSecond)),
                true,
                0.6,
            ),
            target(
                "warm find: times native",
                ratio(ours(Metric::FindWarm), value("native", Metric::FindWarm)),
                false,
                1.3,
            ),
            target(
                "4 KiB random, 4 readers, cold: times desync's",
                ratio(ours(Metric::Random4), value("desync", Metric::Random4)),
                true,
                2.0,
            ),
            target("4 KiB request, chunk in memory: us", ours(Metric::HotRequest), false, 40.0),
            target(
                "mount of the large index: times the small one's",
                ratio(ours(Metric::MountLargeIndex), ours(Metric::MountSmallIndex)),
                false,
                1.5,
            ),
            target(
                "over HTTP: times faster than desync",
                ratio(ours(Metric::HttpSequential), value("desync", Metric::HttpSequential)),
                true,
                3.0,
            ),
            target(
                "20 ms added: times one chunk at a time",
                ratio(ours(Metric::DelayedSequential), value("limit", Metric::DelayedSequential)),
                true,
                20.0,
            ),
            target(
                "20 ms added, small reads: times without read-ahead",
                ratio(ours(Metric::DelayedDirect), ours(Metric::DelayedDirectAlone)),
                true,
                8.0,
            ),
            target(
                "filling a backing file: times without",
                ratio(ours(Metric::SequentialFilling), ours(Metric::SequentialUnfilled)),
                false,
                1.25,
            ),
            passed("backing file, sequential, warm: share of native", Metric::PassedSequentialWarm),
            passed("backing file, sequential, disk: share of native", Metric::PassedSequentialCold),
            passed("backing file, sequential, direct: share of native", Metric::PassedSequentialDirect),
            passed("backing file, random, warm: share of native", Metric::PassedRandomWarm1),
            passed("backing file, random, warm, 4: share of native", Metric::PassedRandomWarm4),
            passed("backing file, random, disk: share of native", Metric::PassedRandomCold1),
            passed("backing file, random, direct: share of native", Metric::PassedRandomDirect1),
            passed("backing file, random, direct, 4: share of native", Metric::PassedRandomDirect4),
            target("peak RSS: MiB", rss.max_by(f64::total_cmp), false, budget_mib + RSS_ALLOWANCE_MIB),
        ]
    }

    /// The table for people.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(text, "\n{}; median of {} (RSS: highest)", COLD, self.options.runs);
        for group in GROUPS {
            self.group(group, &mut text);
        }
        let _ = writeln!(text, "\n{:<52}{:>10}{:>12}  verdict", "targets", "figure", "wanted");
        for target in self.targets() {
            let figure = target.value.map_or("-".to_owned(), |value| format!("{value:.2}"));
            let wanted = format!("{} {}", if target.at_least { ">=" } else { "<=" }, target.limit);
            let _ = writeln!(text, "{:<52}{figure:>10}{wanted:>12}  {}", target.text, target.verdict());
        }
        if !self.peers.is_empty() {
            let peers: Vec<String> = self.peers.iter().map(|(name, version)| format!("{name} ({version})")).collect();
            let _ = writeln!(text, "\nsubjects: {}", peers.join("; "));
        }
        for note in self.notes.iter().chain(&self.failures) {
            let _ = writeln!(text, "note: {note}");
        }
        for doubt in self.doubts() {
            let _ = writeln!(text, "note: {doubt}");
        }
        let now = Disturbance::now();
        let stolen = 100.0 * self.before.stolen_share(&now);
        let _ = writeln!(
            text,
            "note: load before {}, after {}; stolen by the host {stolen:.1} %",
            self.before.load, now.load
        );
        if self.options.quick {
            let _ = writeln!(text, "note: --quick: small data, so the figures mean little");
        }
        text
    }

    fn group(&self, group: &str, text: &mut String) {
        let metrics: Vec<Metric> = Metric::ALL.into_iter().filter(|metric| metric.row().0 == group).collect();
        let has = |subject: &&str| metrics.iter().any(|&metric| self.samples.contains_key(&(metric, subject)));
        let subjects: Vec<&'static str> = SUBJECTS.into_iter().chain(["limit"]).filter(has).collect();
        if subjects.is_empty() {
            return;
        }
        let about = match group {
            "tree" => format!("tree {}", self.options.tree.display()),
            "image" => format!("image, ext4, {} MiB, half zeros", self.options.image_mib),
            "limit" => {
                format!(
                    "limit: {:.0} MB of distinct chunks of the image, no filesystem",
                    self.distinct_bytes as f64 / 1e6
                )
            }
            "backing" => format!("backing file, complete, {} MiB", self.options.image_mib),
            _ => format!("index: large = {} GiB of zeros", self.options.large_index_bytes >> 30),
        };
        let _ = write!(text, "\n{about:<48}");
        subjects.iter().for_each(|subject| {
            let _ = write!(text, "{subject:>15}");
        });
        text.push('\n');
        for metric in metrics {
            let (_, name, unit) = metric.row();
            if !subjects.iter().any(|subject| self.samples.contains_key(&(metric, *subject))) {
                continue;
            }
            let _ = write!(text, "  {name:<40}{unit:<6}");
            for subject in &subjects {
                let figure = self.value(subject, metric).map_or("-".to_owned(), shown);
                let _ = write!(text, "{figure:>15}");
            }
            text.push('\n');
        }
    }

    /// Everything, for programs.
    pub fn json(&self) -> Value {
        let results: Vec<Value> = self
            .samples
            .iter()
            .map(|((metric, subject), samples)| {
                let (group, name, unit) = metric.row();
                json!({
                    "group": group, "metric": format!("{metric:?}"), "text": name.trim(), "unit": unit,
                    "subject": subject, "value": self.value(subject, *metric), "samples": samples,
                })
            })
            .collect();
        let targets: Vec<Value> = self
            .targets()
            .iter()
            .map(|target| {
                json!({
                    "text": target.text, "figure": target.value, "wanted": target.limit,
                    "at_least": target.at_least, "verdict": target.verdict(),
                })
            })
            .collect();
        let first = |path: &str, field: &str| {
            let text = fs::read_to_string(path).unwrap_or_default();
            let line = text.lines().find_map(|line| line.strip_prefix(field));
            line.map(|rest| rest.trim_start_matches([' ', '\t', ':']).to_owned())
        };
        let now = Disturbance::now();
        json!({
            "cold": COLD,
            "disturbance": {
                "load_before": self.before.load, "load_after": now.load, "stolen_share": self.before.stolen_share(&now),
            },
            "doubts": self.doubts(),
            "machine": {
                "cpu": first("/proc/cpuinfo", "model name"),
                "cores": std::thread::available_parallelism().map_or(0, usize::from),
                "memory": first("/proc/meminfo", "MemTotal"),
                "kernel": first("/proc/version", "Linux version"),
            },
            "options": {
                "quick": self.options.quick, "runs": self.options.runs, "tree": self.options.tree,
                "image_mib": self.options.image_mib, "large_index_bytes": self.options.large_index_bytes,
            },
            "subjects": self.peers.iter().cloned().collect::<BTreeMap<_, _>>(),
            "limit_distinct_bytes": self.distinct_bytes,
            "results": results,
            "targets": targets,
            "notes": self.notes,
            "failures": self.failures,
        })
    }
}

impl Target {
    fn verdict(&self) -> &'static str {
        let Some(value) = self.value else { return "not measured" };
        match if self.at_least { value >= self.limit } else { value <= self.limit } {
            true => "met",
            false => "missed",
        }
    }
}

fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let (low, high) = (sorted.get(sorted.len().checked_sub(1)? / 2)?, sorted.get(sorted.len() / 2)?);
    Some((low + high) / 2.0)
}

fn shown(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}
