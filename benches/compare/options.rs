//! What was asked for on the command line.

use std::path::{Path, PathBuf};
use std::time::Duration;

/// What `--help` prints.
pub const USAGE: &str = "\
usage: cargo bench --bench compare -- [OPTIONS]
  --quick          small data, one run: shows that everything works, its figures mean little
  --tree DIR       the directory tree to compare on (default /usr/share)
  --image-mib N    size of the ext4 image, half of it real files (default 2048)
  --runs N         rounds; the table shows medians (default 5)
  --only NAME      only this group (tree, image, limit, index, http, backing) or subject (caifs, casync, desync, squashfuse_ll,
                   squashfuse, native); may be repeated
  --out FILE       where the JSON goes (default target/compare.json)
  --work DIR       where the data is made and kept (default target/tmp/compare)";

/// The groups of measurements.
pub const GROUPS: [&str; 6] = ["tree", "image", "limit", "index", "http", "backing"];

/// The subjects, in the order of the table.
pub const SUBJECTS: [&str; 6] = ["caifs", "casync", "desync", "squashfuse_ll", "squashfuse", "native"];

/// What was asked for.
#[derive(Debug, Clone)]
pub struct Options {
    /// Small data, one run.
    pub quick: bool,
    /// The directory tree.
    pub tree: PathBuf,
    /// Size of the image in MiB.
    pub image_mib: u64,
    /// Rounds.
    pub runs: usize,
    /// Where the JSON goes.
    pub out: PathBuf,
    /// Where data is made and kept.
    pub work: PathBuf,
    /// How long one random-read measurement lasts.
    pub random_time: Duration,
    /// How many reads of a hot range are measured.
    pub n_hot_reads: usize,
    /// The size the large sparse index describes, in bytes.
    pub large_index_bytes: u64,
    only: Vec<String>,
}

impl Options {
    /// Reads the arguments; `None` when only help was asked for.
    ///
    /// # Errors
    /// What is wrong with them, in one line.
    pub fn parse(args: impl Iterator<Item = String>) -> Result<Option<Self>, String> {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let (mut tree, mut image_mib, mut runs) = (None, None, None);
        let mut out = target.parent().unwrap_or(target).join("compare.json");
        let mut work = target.join("compare");
        let mut quick = false;
        let mut only = Vec::new();
        let mut args = args;
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or(format!("{arg} needs a value"));
            match arg.as_str() {
                // Cargo passes this to every benchmark.
                "--bench" => {}
                "--help" | "-h" => return Ok(None),
                "--quick" => quick = true,
                "--tree" => tree = Some(PathBuf::from(value()?)),
                "--image-mib" => image_mib = Some(number(&value()?)?),
                "--runs" => runs = Some(number(&value()?)?),
                "--out" => out = value()?.into(),
                "--work" => work = value()?.into(),
                "--only" => only.push(value()?),
                other => return Err(format!("unknown option {other}")),
            }
        }
        if let Some(name) =
            only.iter().find(|name| !GROUPS.contains(&name.as_str()) && !SUBJECTS.contains(&name.as_str()))
        {
            return Err(format!("--only {name}: use one of {} or {}", GROUPS.join(", "), SUBJECTS.join(", ")));
        }
        let usual_tree = || if quick { small_tree() } else { "/usr/share".into() };
        let tree = tree.unwrap_or_else(usual_tree);
        let tree = tree.canonicalize().map_err(|error| format!("--tree {}: {error}", tree.display()))?;
        let image_mib: u64 = image_mib.unwrap_or(if quick { 64 } else { 2048 });
        if image_mib < 16 {
            return Err(format!("--image-mib {image_mib}: use 16 or more"));
        }
        Ok(Some(Self {
            quick,
            tree,
            image_mib,
            runs: usize::try_from(runs.unwrap_or(if quick { 1 } else { 5 })).unwrap_or(usize::MAX).max(1),
            out,
            work: std::path::absolute(&work).map_err(|error| format!("--work {}: {error}", work.display()))?,
            random_time: Duration::from_secs(if quick { 1 } else { 3 }),
            n_hot_reads: if quick { 2_000 } else { 20_000 },
            large_index_bytes: if quick { 1 << 34 } else { 1 << 40 },
            only,
        }))
    }

    /// Whether a group of measurements is wanted.
    pub fn wants_group(&self, group: &str) -> bool {
        self.wants(group, &GROUPS)
    }

    /// Whether a subject is wanted.
    pub fn wants_subject(&self, subject: &str) -> bool {
        self.wants(subject, &SUBJECTS)
    }

    /// Whether a subject was asked for by its name.
    pub fn names_subject(&self, subject: &str) -> bool {
        self.only.iter().any(|only| only == subject)
    }

    /// A name is wanted when it is named, or when no name of its kind is.
    fn wants(&self, name: &str, kind: &[&str]) -> bool {
        let mut named = self.only.iter().filter(|only| kind.contains(&only.as_str())).peekable();
        named.peek().is_none() || named.any(|only| only == name)
    }
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("'{text}' is not a number"))
}

/// A small directory that most systems have.
fn small_tree() -> PathBuf {
    ["/usr/share/zoneinfo", "/usr/share/perl", "/usr/include", "/etc"]
        .into_iter()
        .map(PathBuf::from)
        .find(|dir| dir.is_dir())
        .unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into())
}
