//! What is mounted: made once in the work directory, used again as long as its source is unchanged.
//!
//! * the tree: `tree.caidx` with `tree.castr`, and `tree.squashfs`;
//! * the image: an ext4 image, half of it real files and the rest zeros, `image.caibx` with `image.castr`, and
//!   `image.squashfs`, which holds the image as one file;
//! * two indexes of nothing but zeros, a small and a huge one, with the one chunk they need.
//!
//! casync makes the indexes when it is there (so that we are measured on what others made), else caifs does.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use caifs::digest::Digest;
use caifs::format::index::{
    ChunkSizes, FLAG_EXCLUDE_FILE, FLAG_EXCLUDE_NODUMP, FLAG_SHA512_256, IndexHeader, encode_header, encode_item,
    encode_tail,
};

use crate::limit;
use crate::measure;
use crate::options::Options;
use crate::results::Results;
use crate::support::peers::find;
use crate::support::run::{caifs, command, run_within};

/// Part of each fingerprint: data made by another version of this file is made again.
const VERSION: &str = "1";

/// No single step of the preparation takes longer, or something hangs.
const STEP_LIMIT: Duration = Duration::from_secs(1800);

/// The size that the small one of the two indexes of zeros describes.
const SMALL_INDEX_BYTES: u64 = 1 << 20;

/// Where the image's files come from, as long as there is room.
const IMAGE_SOURCES: [&str; 4] = ["/usr/bin", "/usr/lib/x86_64-linux-gnu", "/usr/lib", "/usr/share"];

/// Larger files are left out of the image, so that it holds many.
const IMAGE_MAX_FILE_BYTES: u64 = 64 << 20;

/// Something to mount, in every form there is.
#[derive(Debug)]
pub struct Source {
    /// The directory or image itself.
    pub native: PathBuf,
    /// Its index.
    pub index: PathBuf,
    /// The chunks of the index.
    pub store: PathBuf,
    /// The same as squashfs (zstd, 64 KiB); `None` when it cannot be made here.
    pub squashfs: Option<PathBuf>,
    /// Bytes of its content.
    pub content_bytes: u64,
}

/// All that the rounds need.
#[derive(Debug)]
pub struct Data {
    /// The directory tree.
    pub tree: Option<Source>,
    /// Entries of the tree, its root included.
    pub n_entries: u64,
    /// A file of the tree, relative to its root.
    pub some_file: PathBuf,
    /// The disk image.
    pub image: Option<Source>,
    /// An offset of the image where there is content.
    pub content_offset: u64,
    /// The small and the large index of zeros, with the store of both.
    pub zeros: Option<Zeros>,
}

/// Two indexes whose every chunk is the same.
#[derive(Debug)]
pub struct Zeros {
    /// Describes 1 MiB.
    pub small: PathBuf,
    /// Describes [`Options::large_index_bytes`].
    pub large: PathBuf,
    /// Has the one chunk of both.
    pub store: PathBuf,
}

impl Data {
    /// Makes what is wanted and not there yet.
    ///
    /// # Errors
    /// What could not be made, in one line.
    pub fn prepare(options: &Options, results: &mut Results) -> Result<Self, String> {
        let mut data =
            Self { tree: None, n_entries: 0, some_file: PathBuf::new(), image: None, content_offset: 0, zeros: None };
        if options.wants_group("tree") {
            let (source, n_entries) = tree(options)?;
            note_squashfs(&source, results);
            data.some_file = measure::some_file(&source.native).ok_or("the tree has no file with content")?;
            data.tree = Some(source);
            data.n_entries = n_entries;
        }
        if ["image", "limit", "http", "backing"].iter().any(|group| options.wants_group(group)) {
            let source = image(options)?;
            note_squashfs(&source, results);
            data.content_offset = limit::offset_of_content(&source.index)?;
            data.image = Some(source);
        }
        if options.wants_group("index") {
            data.zeros = Some(zeros(options)?);
        }
        Ok(data)
    }
}

fn note_squashfs(source: &Source, results: &mut Results) {
    if source.squashfs.is_none() {
        results.note("missing: mksquashfs (apt-get install squashfs-tools): no figures for squashfuse");
    }
}

fn tree(options: &Options) -> Result<(Source, u64), String> {
    let native = options.tree.clone();
    let seen = run(command("find", ["-printf", "%s %T@\\n"]).current_dir(&native))?;
    let n_entries = seen.iter().filter(|&&byte| byte == b'\n').count() as u64;
    let sizes = run(command("find", ["-type", "f", "-printf", "%s\\n"]).current_dir(&native))?;
    let content_bytes = String::from_utf8_lossy(&sizes).lines().filter_map(|line| line.parse::<u64>().ok()).sum();
    let state = Digest::default().id(&seen);
    let name = format!("tree-{}", &Digest::default().id(native.as_os_str().as_encoded_bytes()).to_hex()[..8]);
    let dir = made(options, &name, &format!("{} {n_entries} {state}", native.display()), |dir| {
        make_index(&dir.join("tree.castr"), &dir.join("tree.caidx"), &native, true)?;
        make_squashfs(&native, &dir.join("tree.squashfs"))
    })?;
    let source = Source {
        native,
        index: dir.join("tree.caidx"),
        store: dir.join("tree.castr"),
        squashfs: present(dir.join("tree.squashfs")),
        content_bytes,
    };
    Ok((source, n_entries))
}

fn image(options: &Options) -> Result<Source, String> {
    let mib = options.image_mib;
    let dir = made(options, &format!("image-{mib}"), &format!("{mib} MiB"), |dir| {
        let (image, files) = (dir.join("image/image.raw"), dir.join("files"));
        fs::create_dir(dir.join("image")).map_err(at(dir))?;
        copy_files(&files, (mib << 20) / 2)?;
        File::create(&image).and_then(|file| file.set_len(mib << 20)).map_err(at(&image))?;
        let mkfs = find("mkfs.ext4").ok_or("mkfs.ext4 is missing (apt-get install e2fsprogs)")?;
        run(command(mkfs, ["-q", "-F", "-d"]).arg(&files).arg(&image))?;
        fs::remove_dir_all(&files).map_err(at(&files))?;
        make_index(&dir.join("image.castr"), &dir.join("image.caibx"), &image, false)?;
        make_squashfs(&dir.join("image"), &dir.join("image.squashfs"))
    })?;
    Ok(Source {
        native: dir.join("image/image.raw"),
        index: dir.join("image.caibx"),
        store: dir.join("image.castr"),
        squashfs: present(dir.join("image.squashfs")),
        content_bytes: mib << 20,
    })
}

fn zeros(options: &Options) -> Result<Zeros, String> {
    let large_bytes = options.large_index_bytes;
    let dir = made(options, "zeros", &format!("{large_bytes}"), |dir| {
        let sizes = ChunkSizes::default();
        let plain = vec![0; usize::try_from(sizes.max).expect("a chunk fits into memory")];
        let id = Digest::Sha512_256.id(&plain);
        let hex = id.to_hex();
        let chunk_dir = dir.join("zeros.castr").join(&hex[..4]);
        fs::create_dir_all(&chunk_dir).map_err(at(&chunk_dir))?;
        let stored = zstd::bulk::compress(&plain, 3).map_err(|error| format!("zstd: {error}"))?;
        fs::write(chunk_dir.join(format!("{hex}.cacnk")), stored).map_err(at(&chunk_dir))?;
        // The flags that casync gives a blob.
        let feature_flags = FLAG_SHA512_256 | FLAG_EXCLUDE_NODUMP | FLAG_EXCLUDE_FILE;
        for (name, bytes) in [("small.caibx", SMALL_INDEX_BYTES), ("large.caibx", large_bytes)] {
            let n_chunks = bytes / sizes.max;
            let path = dir.join(name);
            let mut file = BufWriter::new(File::create(&path).map_err(at(&path))?);
            let mut put = |bytes: &[u8]| file.write_all(bytes).map_err(at(&path));
            put(&encode_header(&IndexHeader { feature_flags, sizes }))?;
            for number in 1..=n_chunks {
                put(&encode_item(number * sizes.max, &id))?;
            }
            put(&encode_tail(usize::try_from(n_chunks).expect("a count of chunks fits")))?;
            file.flush().map_err(at(&path))?;
        }
        Ok(())
    })?;
    Ok(Zeros { small: dir.join("small.caibx"), large: dir.join("large.caibx"), store: dir.join("zeros.castr") })
}

/// A directory of the work directory: as it is when its fingerprint is the wanted one, else made anew. It gets its
/// name only when complete, so an interrupted run leaves nothing that looks done.
fn made(
    options: &Options,
    name: &str,
    fingerprint: &str,
    make: impl FnOnce(&Path) -> Result<(), String>,
) -> Result<PathBuf, String> {
    let dir = options.work.join(name);
    let wanted = format!("{VERSION} {fingerprint}\n");
    if fs::read_to_string(dir.join("made-from")).is_ok_and(|found| found == wanted) {
        return Ok(dir);
    }
    eprintln!("compare: preparing {name} in {} (once)", options.work.display());
    let new = options.work.join(format!("{name}.new"));
    for stale in [&dir, &new] {
        if stale.exists() {
            fs::remove_dir_all(stale).map_err(at(stale))?;
        }
    }
    fs::create_dir_all(&new).map_err(at(&new))?;
    make(&new)?;
    // What was just written is not to reach the disk while something is measured.
    nix::unistd::sync();
    fs::write(new.join("made-from"), wanted).map_err(at(&new))?;
    fs::rename(&new, &dir).map_err(at(&dir))?;
    Ok(dir)
}

fn make_index(store: &Path, index: &Path, source: &Path, is_tree: bool) -> Result<(), String> {
    if let Some(casync) = find("casync") {
        let option = format!("--store={}", store.display());
        run(command(casync, ["make", &option]).arg(index).arg(source))?;
        return Ok(());
    }
    let mut make = caifs();
    match is_tree {
        true => make.args(["tar", "-i", "-s"]),
        false => make.args(["make", "-s"]),
    };
    run(make.arg(store).arg(index).arg(source))?;
    match index.exists() {
        true => Ok(()),
        false => Err(format!("no index was made of {}", source.display())),
    }
}

/// Makes a squashfs of a directory, when that can be done here.
fn make_squashfs(source: &Path, target: &Path) -> Result<(), String> {
    let Some(mksquashfs) = find("mksquashfs") else { return Ok(()) };
    let mut make = command(mksquashfs, [source, target]);
    run(make.args(["-comp", "zstd", "-b", "65536", "-no-progress", "-quiet"]))?;
    Ok(())
}

/// Copies regular files from the system, in a fixed order, until there are so many bytes.
fn copy_files(target: &Path, wanted_bytes: u64) -> Result<(), String> {
    fs::create_dir(target).map_err(at(target))?;
    let mut left = wanted_bytes;
    for (number, source) in IMAGE_SOURCES.iter().enumerate() {
        let into = target.join(format!("source-{number}"));
        copy_dir(Path::new(source), &into, &mut left)?;
    }
    Ok(())
}

fn copy_dir(source: &Path, target: &Path, left: &mut u64) -> Result<(), String> {
    let Ok(entries) = fs::read_dir(source) else { return Ok(()) };
    fs::create_dir(target).map_err(at(target))?;
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    for path in paths {
        let (Ok(seen), Some(name)) = (path.symlink_metadata(), path.file_name()) else { continue };
        let copy = target.join(name);
        if seen.is_dir() {
            copy_dir(&path, &copy, left)?;
        } else if seen.is_file() && seen.len() <= IMAGE_MAX_FILE_BYTES.min(*left) && fs::copy(&path, &copy).is_ok() {
            *left -= seen.len();
        }
        // What is left is below the size of most files: near enough.
        if *left < 4096 {
            return Ok(());
        }
    }
    Ok(())
}

fn run(command: &mut Command) -> Result<Vec<u8>, String> {
    let finished = run_within(command, STEP_LIMIT);
    match finished.status.success() {
        true => Ok(finished.stdout),
        false => Err(format!("{}: {}: {}", finished.command, finished.status, finished.stderr.trim_end())),
    }
}

fn present(path: PathBuf) -> Option<PathBuf> {
    path.exists().then_some(path)
}

fn at(path: &Path) -> impl Fn(std::io::Error) -> String + '_ {
    move |error| format!("{}: {error}", path.display())
}
