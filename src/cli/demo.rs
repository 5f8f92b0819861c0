//! `caifs demo`: the main job on a real directory, step by step, with the commands it runs.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::args::DemoArgs;
use crate::mount::detach::{How, unmount_path};

/// Directories worth packing that most machines have, best first.
const CANDIDATES: [&str; 3] = ["/usr/share/doc", "/usr/share", "/etc"];

/// Fewer entries than this show nothing.
const MIN_ENTRIES: usize = 10;

/// Lines of a listing shown.
const SHOWN_LINES: usize = 8;

pub fn run(args: &DemoArgs) -> Result<()> {
    let source = match &args.dir {
        Some(dir) => dir.canonicalize().with_context(|| dir.display().to_string())?,
        None => candidate()?,
    };
    let demo = Demo::new()?;
    say(&format!("Packing {}: chunks go into a store, an index lists them.", source.display()))?;
    demo.caifs(&["tar", "-i", "-s", "store.castr", "tree.caidx"], Some(&source))?;
    let chunks = count_files(&demo.dir.join("store.castr"))?;
    let index_bytes = demo.dir.join("tree.caidx").metadata()?.len();
    say(&format!("  {chunks} chunks in the store, an index of {index_bytes} bytes.\n"))?;

    say("Mounting the index: nothing is unpacked, nothing is read but the root.")?;
    fs::create_dir(demo.dir.join("mnt"))?;
    demo.caifs(&["mount", "-s", "store.castr", "tree.caidx", "mnt"], None)?;
    say(&format!("  {} of {chunks} chunks fetched.\n", demo.fetched()?))?;

    say("Listing it:")?;
    // Names only: an entry keeps its directory open, and the mount busy.
    let names = fs::read_dir(demo.mountpoint())?.map(|entry| entry.map(|entry| entry.file_name()));
    let mut names: Vec<OsString> = names.collect::<Result<_, _>>()?;
    names.sort();
    for name in names.iter().take(SHOWN_LINES) {
        say(&format!("  {}", name.display()))?;
    }
    say(&format!("  … {} entries, {} of {chunks} chunks fetched so far.\n", names.len(), demo.fetched()?))?;

    let file = first_text(&demo.mountpoint()).context("the directory holds no file with text to show")?;
    let shown = file.strip_prefix(demo.mountpoint())?.to_owned();
    say(&format!("Reading one file, mnt/{}:", shown.display()))?;
    let content = fs::read(&file)?;
    for line in String::from_utf8_lossy(&content).lines().take(3) {
        say(&format!("  | {line}"))?;
    }
    if content != fs::read(source.join(&shown))? {
        bail!("the content of {} differs from its source", shown.display());
    }
    say(&format!(
        "  The same {} bytes as in the source; {} of {chunks} chunks fetched.\n",
        content.len(),
        demo.fetched()?
    ))?;

    say("Unmounting:")?;
    demo.caifs(&["umount", "mnt"], None)?;
    say("Done.")
}

fn say(line: &str) -> Result<()> {
    Ok(writeln!(io::stdout(), "{line}")?)
}

fn candidate() -> Result<PathBuf> {
    let has_entries = |dir: &str| fs::read_dir(dir).is_ok_and(|entries| entries.count() >= MIN_ENTRIES);
    match CANDIDATES.iter().find(|dir| has_entries(dir)) {
        Some(dir) => Ok(PathBuf::from(dir)),
        None => bail!("none of {} has files; name a directory to pack", CANDIDATES.join(", ")),
    }
}

/// The working directory, with what is mounted in it; both go with the value.
struct Demo {
    dir: PathBuf,
}

impl Demo {
    fn new() -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("caifs-demo-{}", std::process::id()));
        // For this user only: the chunks of private files are in it.
        fs::DirBuilder::new().mode(0o700).create(&dir).with_context(|| dir.display().to_string())?;
        Ok(Self { dir })
    }

    fn mountpoint(&self) -> PathBuf {
        self.dir.join("mnt")
    }

    /// Shows a command of ours and runs it in the working directory.
    fn caifs(&self, args: &[&str], path: Option<&Path>) -> Result<()> {
        let typed = path.map_or(String::new(), |path| format!(" {}", path.display()));
        say(&format!("  $ caifs {}{typed}", args.join(" ")))?;
        let mut command = Command::new(std::env::current_exe().context("cannot find this program")?);
        let status = command.args(args).args(path).current_dir(&self.dir).stdin(Stdio::null()).status()?;
        if !status.success() {
            bail!("caifs {} failed", args[0]);
        }
        Ok(())
    }

    /// Chunks the mount has fetched so far, by its own count.
    fn fetched(&self) -> Result<String> {
        let value = xattr::get(self.mountpoint(), "user.caifs.fetches")?;
        value
            .map(|value| String::from_utf8_lossy(&value).into_owned())
            .context("the mount does not tell what it fetched")
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        let _ = unmount_path(&self.mountpoint(), How::Lazily);
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn count_files(dir: &Path) -> Result<usize> {
    let mut n_files = 0;
    for entry in fs::read_dir(dir)? {
        n_files += fs::read_dir(entry?.path())?.count();
    }
    Ok(n_files)
}

/// A file with text in a directory or below it, found without reading much.
fn first_text(dir: &Path) -> Option<PathBuf> {
    let mut entries: Vec<_> = fs::read_dir(dir).ok()?.filter_map(Result::ok).collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (path, kind) = (entry.path(), entry.file_type().ok()?);
        if kind.is_file()
            && fs::read(&path).is_ok_and(|content| !content.is_empty() && std::str::from_utf8(&content).is_ok())
        {
            return Some(path);
        }
        if kind.is_dir()
            && let Some(path) = first_text(&path)
        {
            return Some(path);
        }
    }
    None
}
