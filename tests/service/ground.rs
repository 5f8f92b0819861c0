//! A tree to mount, ways to mount it, and readers that ask its server without a pause.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::manager::LIMIT;
use crate::mount::contents;
use crate::support::blob::Xorshift;
use crate::support::mounted::Mounted;
use crate::support::run::{caifs, run};
use crate::support::scratch::Scratch;
use crate::support::scripted::{Scripted, answer};

/// A user that is not root: name and number.
pub const OTHER: (&str, u32) = ("nobody", 65534);

/// A tree, its index and store, and a place to mount.
pub struct Ground {
    pub scratch: Scratch,
    pub tree: PathBuf,
    pub index: PathBuf,
    pub store: PathBuf,
    pub mnt: PathBuf,
}

impl Ground {
    pub fn new() -> Self {
        let scratch = Scratch::new();
        let (tree, mnt) = (scratch.dir("tree"), scratch.dir("mnt"));
        let mut random = Xorshift::seeded(7);
        for dir in 0..4 {
            fs::create_dir(tree.join(format!("dir {dir}"))).unwrap();
            for file in 0..6 {
                let content = random.bytes(40_000 * (file + 1));
                fs::write(tree.join(format!("dir {dir}/file {file}")), content).unwrap();
            }
        }
        let (index, store) = (scratch.join("t.caidx"), scratch.join("t.castr"));
        let ground = Self { scratch, tree, index, store, mnt };
        ground.pack();
        ground
    }

    /// Makes the index and the store, anew.
    pub fn pack(&self) {
        run(caifs().args(["tar", "-i", "-s"]).arg(&self.store).arg(&self.index).arg(&self.tree)).ok();
    }

    /// The tree twice, below other names, as a directory of indexes; and what is to be seen in a mount of it.
    pub fn into_directory(self) -> (Self, BTreeMap<PathBuf, Vec<u8>>) {
        let directory = self.scratch.dir("indexes");
        fs::create_dir(directory.join("below")).unwrap();
        let places = ["one", "below/two"];
        for place in places {
            fs::copy(&self.index, directory.join(format!("{place}.caidx"))).unwrap();
        }
        let blob = Xorshift::seeded(8).bytes(300_000);
        let image = self.scratch.file("blob", &blob);
        run(caifs().args(["make", "-s"]).arg(&self.store).arg(directory.join("below/image.caibx")).arg(image)).ok();
        let all = contents(&self.tree);
        let below =
            |place: &'static str| all.iter().map(move |(name, bytes)| (Path::new(place).join(name), bytes.clone()));
        let mut wanted: BTreeMap<PathBuf, Vec<u8>> = places.into_iter().flat_map(below).collect();
        wanted.insert("below/image".into(), blob);
        (Self { index: directory, ..self }, wanted)
    }

    /// Makes the command of a mount in the foreground.
    pub fn foreground(&self, args: &[&str]) -> impl Fn() -> Command + 'static {
        let whole = self.background(args);
        let envs: Vec<(OsString, Option<OsString>)> =
            whole.get_envs().map(|(name, value)| (name.to_owned(), value.map(OsStr::to_owned))).collect();
        let args: Vec<OsString> = whole.get_args().map(OsStr::to_owned).collect();
        move || {
            let mut command = caifs();
            command.args(&args).arg("--foreground");
            command.envs(envs.iter().filter_map(|(name, value)| Some((name, value.as_ref()?))));
            command
        }
    }

    /// `caifs` without anything that a user of this machine may have set.
    pub fn caifs(&self) -> Command {
        let mut command = caifs();
        let nowhere = "/nonexistent";
        command.env("HOME", nowhere).env("XDG_CONFIG_HOME", nowhere).env("CAIFS_CONFIG_DIR", nowhere);
        command.env("CAIFS_RUNTIME_DIR", self.scratch.join("run"));
        command
    }

    /// The command of a mount in the background, as people type it; with the tree's own store, unless the arguments name one as `--store=…`.
    pub fn background(&self, args: &[&str]) -> Command {
        let mut command = self.caifs();
        command.arg("mount").arg(&self.index).arg(&self.mnt);
        if !args.iter().any(|arg| arg.starts_with("--store=")) {
            command.arg("-s").arg(&self.store);
        }
        command.args(args);
        command
    }

    /// Mounts in the background.
    pub fn mount(&self, args: &[&str]) -> Result<Mounted, String> {
        Mounted::by_command(&mut self.background(args), &self.mnt)
    }
}

/// A web server with the chunks of a store, which can hold its answers back.
pub fn held_back(store: &Path) -> (Scripted, Arc<AtomicBool>) {
    let hold = Arc::new(AtomicBool::new(false));
    let (store, held) = (store.to_owned(), Arc::clone(&hold));
    let server = Scripted::start(move |_, request| {
        let begun = Instant::now();
        // Not for ever: a test that fails wants to end.
        while held.load(Ordering::SeqCst) && begun.elapsed() < LIMIT {
            std::thread::sleep(Duration::from_millis(2));
        }
        match fs::read(store.join(request.line.trim_start_matches("GET /"))) {
            Ok(bytes) => answer("200 OK", "", &bytes),
            Err(_) => answer("404 Not Found", "", b""),
        }
    });
    (server, hold)
}

/// Lets every user go to a directory.
pub fn open_to_all(directory: &Path) {
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Readers that go round and round over all files, with requests that only the server can answer, until they are stopped. Each stops at
/// its first error, which [`Load::end`] gives.
pub struct Load {
    stop: Arc<AtomicBool>,
    n_rounds: Arc<AtomicU64>,
    readers: Vec<JoinHandle<Result<(), String>>>,
}

impl Load {
    /// Begins; all files are opened before this returns.
    pub fn start(mnt: &Path, wanted: &Arc<BTreeMap<PathBuf, Vec<u8>>>) -> Self {
        let (stop, n_rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let start = |number: usize| {
            let (stop, n_rounds) = (Arc::clone(&stop), Arc::clone(&n_rounds));
            let (mnt, wanted) = (mnt.to_owned(), Arc::clone(wanted));
            let held: Vec<(PathBuf, File)> =
                wanted.keys().map(|name| (name.clone(), File::open(mnt.join(name)).unwrap())).collect();
            std::thread::spawn(move || {
                for round in 0.. {
                    if stop.load(Ordering::SeqCst) {
                        break;
                    }
                    for (name, file) in &held {
                        read_round(&mnt, name, file, &wanted[name], &format!("{number}-{round}"))
                            .map_err(|error| format!("{}: {error}", name.display()))?;
                    }
                    n_rounds.fetch_add(1, Ordering::SeqCst);
                }
                Ok(())
            })
        };
        let readers = (0..4).map(start).collect();
        Self { stop, n_rounds, readers }
    }

    fn n_rounds(&self) -> u64 {
        self.n_rounds.load(Ordering::SeqCst)
    }

    /// Waits until all files were read several times more; `said` is what the server says, for when they are not.
    #[track_caller]
    pub fn go_on(&self, said: &dyn Fn() -> String) {
        let (begun, wanted) = (Instant::now(), self.n_rounds() + 8);
        while self.n_rounds() < wanted && !self.readers.iter().any(JoinHandle::is_finished) {
            assert!(begun.elapsed() < LIMIT, "the readers do not go on: {} rounds\n{}", self.n_rounds(), said());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Stops; the first error of a reader.
    pub fn end(self) -> Result<(), String> {
        self.stop.store(true, Ordering::SeqCst);
        self.readers.into_iter().try_for_each(|reader| reader.join().expect("readers do not panic"))
    }
}

/// Reads one file through an old handle and a new one, past the page cache; asks for a name that is not there and for an attribute.
fn read_round(mnt: &Path, name: &Path, held: &File, wanted: &[u8], mark: &str) -> Result<(), String> {
    let at = |what: &'static str| move |error: std::io::Error| format!("{what}: {error}");
    let mut bytes = vec![0; wanted.len()];
    let path = mnt.join(name);
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path).map_err(at("open"))?;
    direct.read_exact_at(&mut bytes, 0).map_err(at("direct read"))?;
    if bytes != wanted {
        return Err("direct read: other content".into());
    }
    // What the kernel keeps of it is dropped, so that this is asked of the server as well.
    let dropped = nix::fcntl::posix_fadvise(held, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    dropped.map_err(|error| error.to_string())?;
    held.read_exact_at(&mut bytes, 0).map_err(at("read of an open file"))?;
    if bytes != wanted {
        return Err("read of an open file: other content".into());
    }
    match path.with_file_name(format!("no {mark}")).symlink_metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        other => return Err(format!("a name that is not there: {other:?}")),
    }
    xattr::get(&path, "user.caifs.entry-offset").map_err(at("getxattr"))?;
    let (now, then) =
        (path.symlink_metadata().map_err(at("stat"))?, held.metadata().map_err(at("stat of an open file"))?);
    match now.ino() == then.ino() {
        true => Ok(()),
        false => Err(format!("inode {}, and {} when it was opened", now.ino(), then.ino())),
    }
}
