//! Who is measured, and how each is started.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::data::Source;
use crate::options::{Options, SUBJECTS};
use crate::results::Results;
use crate::support::mounted::Mounted;
use crate::support::peers::find;
use crate::support::run::{caifs, command, run};

/// A program that mounts, or the kernel's own filesystem.
#[derive(Debug, Clone)]
pub struct Subject {
    /// Its name in the table.
    pub name: &'static str,
    program: PathBuf,
}

/// What there is to mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// A directory tree.
    Tree,
    /// One large file.
    Image,
}

/// What stands for content while it is measured: a mount, or the source itself.
#[derive(Debug)]
pub struct Served {
    /// `None` for the native filesystem.
    pub mount: Option<Mounted>,
    /// The root of the tree, or the image file.
    pub content: PathBuf,
}

/// The subjects that are wanted and there; who is missing is noted for the table.
pub fn subjects(options: &Options, results: &mut Results) -> Vec<Subject> {
    let mut there = Vec::new();
    for name in SUBJECTS.into_iter().filter(|name| options.wants_subject(name)) {
        let program = match name {
            "caifs" => Some(PathBuf::from(caifs().get_program())),
            "native" => Some(PathBuf::new()),
            // The high-level variant is only of interest where the faster one is not installed.
            "squashfuse" if find("squashfuse_ll").is_some() && !options.names_subject(name) => continue,
            peer => find(peer),
        };
        match program {
            Some(program) => {
                let subject = Subject { name, program };
                results.peer(name, subject.version());
                there.push(subject);
            }
            None => {
                results.peer(name, "missing".to_owned());
                results.note(&format!("missing: {name}: no figures for it"));
            }
        }
    }
    there
}

impl Subject {
    /// Whether this subject can mount such a thing at all.
    pub fn can(&self, what: What) -> bool {
        match self.name {
            // casync mkdev needs nbd, which is a block device and no mount.
            "casync" => what == What::Tree,
            "desync" => what == What::Image,
            _ => true,
        }
    }

    /// What to run.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Mounts a source on an empty directory.
    ///
    /// # Errors
    /// Why it cannot, in one line.
    pub fn serve(&self, what: What, source: &Source, mountpoint: &Path) -> Result<Served, String> {
        if self.name == "native" {
            return Ok(Served { mount: None, content: source.native.clone() });
        }
        let squashfs = || source.squashfs.as_ref().ok_or("there is no squashfs to mount".to_owned());
        let mount = match self.name {
            "caifs" => self.mount_caifs(&source.index, &source.store, mountpoint),
            "casync" => {
                let mut server = command(&self.program, ["mount"]);
                server.arg(format!("--store={}", source.store.display())).arg(&source.index).arg(mountpoint);
                Mounted::by_server(&mut server, mountpoint)
            }
            "desync" => self.mount_desync(&source.index, &source.store, mountpoint),
            _ => {
                let mut server = command(&self.program, ["-f"]);
                Mounted::by_server(server.arg(squashfs()?).arg(mountpoint), mountpoint)
            }
        }?;
        let content = match what {
            What::Tree => mountpoint.to_owned(),
            What::Image => file_of_size(mountpoint, source.content_bytes)?,
        };
        Ok(Served { mount: Some(mount), content })
    }

    /// `caifs mount`, which returns when the mount is usable and leaves a daemon.
    pub fn mount_caifs(&self, index: &Path, store: &Path, mountpoint: &Path) -> Result<Mounted, String> {
        let mut mount = command(&self.program, ["mount".as_ref(), index.as_os_str(), mountpoint.as_os_str()]);
        Mounted::by_command(mount.arg("-s").arg(store), mountpoint)
    }

    /// `desync mount-index`, which stays in the foreground.
    pub fn mount_desync(&self, index: &Path, store: &Path, mountpoint: &Path) -> Result<Mounted, String> {
        let mut server = command(&self.program, ["mount-index", "-s"]);
        Mounted::by_server(server.arg(store).arg(index).arg(mountpoint), mountpoint)
    }

    /// What the program says of its version, else where it is.
    fn version(&self) -> String {
        let path = self.program.display().to_string();
        match self.name {
            "native" => "the kernel's filesystem".to_owned(),
            "casync" => line_with(self.name, command(&self.program, ["--version"])).unwrap_or(path),
            "squashfuse" | "squashfuse_ll" => {
                line_with("squashfuse ", command(&self.program, ["--help"])).unwrap_or(path)
            }
            "caifs" => format!("this build, {}", env!("CARGO_PKG_VERSION")),
            _ => path,
        }
    }
}

/// The line of a program's output that holds a word; the output may be either of the two.
fn line_with(word: &str, mut command: Command) -> Option<String> {
    let finished = run(&mut command);
    let text = finished.text();
    text.lines().chain(finished.stderr.lines()).find(|line| line.contains(word)).map(str::to_owned)
}

/// The file of a mounted blob, whatever the server calls it.
pub fn file_of_size(dir: &Path, bytes: u64) -> Result<PathBuf, String> {
    let entries = fs::read_dir(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.metadata().is_ok_and(|seen| seen.is_file() && seen.len() == bytes))
        .ok_or_else(|| format!("{} holds no file of {bytes} bytes", dir.display()))
}
