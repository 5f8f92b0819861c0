//! Profiles, wherever they lie: of one that is longer than there is memory for, the first chunks.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::config::StoreSettings;
use crate::format::profile::{MAX_PROFILE_BYTES, MAX_PROFILE_CHUNKS, Profile, ProfileReader};
use crate::store::files::{FileStore, ReadWhole};
use crate::store::location::FileLocation;
use crate::store::open::open_files;
use crate::volume::open::OpenError;

/// The share of the memory budget that a profile may take.
const MEMORY_SHARE: u64 = 64;

/// What a chunk of a profile takes of it, in bytes: its id and time, and its id once more to know it again.
const CHUNK_COST_BYTES: u64 = 80;

/// What is read of a profile at a time.
const PIECE_BYTES: u64 = 512 << 10;

/// The longest profile that is fetched from a server that cannot send a part of it, and so is in memory as a whole.
const MAX_WHOLE_BYTES: u64 = 4 << 20;

/// The first chunks of a profile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CutProfile {
    /// These.
    pub profile: Profile,
    /// Whether it has more.
    pub is_cut: bool,
}

/// How many chunks of a profile there is memory for.
pub(super) fn max_chunks(memory_bytes: u64) -> usize {
    let n_chunks = memory_bytes / MEMORY_SHARE / CHUNK_COST_BYTES;
    usize::try_from(n_chunks).unwrap_or(usize::MAX).min(MAX_PROFILE_CHUNKS)
}

/// The file beside another whose name has a suffix more; `None` for what lies nowhere.
pub fn beside(location: &FileLocation, suffix: &str) -> Option<FileLocation> {
    match location {
        FileLocation::Local(path) => {
            let mut path = path.clone().into_os_string();
            path.push(suffix);
            Some(FileLocation::Local(path.into()))
        }
        FileLocation::Remote { directory, directory_text, name } => Some(FileLocation::Remote {
            directory: directory.clone(),
            directory_text: directory_text.clone(),
            name: format!("{name}{suffix}"),
        }),
        FileLocation::Stdio => None,
    }
}

/// The first `max_chunks` chunks of a profile, wherever it lies. What follows is not read. `None` when there is none.
///
/// # Errors
/// It cannot be read, or is no profile.
pub async fn read_profile(
    location: &FileLocation,
    settings: &StoreSettings,
    max_chunks: usize,
) -> Result<Option<CutProfile>, OpenError> {
    let fail = |why: &dyn ToString| OpenError::new(&location.to_string(), why.to_string());
    let mut reader = ProfileReader::new(max_chunks);
    let is_whole = match location {
        FileLocation::Local(path) => {
            let path = path.clone();
            let read = tokio::task::spawn_blocking(move || {
                let Some(file) = open_local(&path)? else { return Ok(None) };
                read_local(file, &mut reader).map(|is_whole| Some((is_whole, reader)))
            });
            let read = read.await.unwrap_or_else(|error| Err(std::io::Error::other(error)));
            match read.map_err(|error| fail(&error))? {
                Some((is_whole, read)) => {
                    reader = read;
                    is_whole
                }
                None => return Ok(None),
            }
        }
        FileLocation::Remote { directory, directory_text, name } => {
            let specs = settings.resolve(directory_text).map_err(|error| fail(&error))?;
            let options = specs.first().map(|spec| spec.options.clone()).unwrap_or_default();
            let files = open_files(directory, &options).map_err(|error| fail(&error))?;
            match read_remote(files.as_ref(), name, &mut reader).await.map_err(|error| fail(&error))? {
                Some(is_whole) => is_whole,
                None => return Ok(None),
            }
        }
        FileLocation::Stdio => return Err(fail(&"a profile is not read from there")),
    };
    let (profile, is_cut) = reader.finish().map_err(|error| fail(&error))?;
    Ok(Some(CutProfile { profile, is_cut: is_cut || !is_whole }))
}

fn open_local(path: &Path) -> std::io::Result<Option<File>> {
    // Without O_NONBLOCK a named pipe would hold the thread for ever.
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path);
    match opened {
        Ok(file) if file.metadata()?.is_file() => Ok(Some(file)),
        Ok(_) => Err(std::io::Error::other("not a regular file")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads a file as far as it is wanted. Whether that is all of it.
fn read_local(mut file: File, reader: &mut ProfileReader) -> std::io::Result<bool> {
    let mut piece = vec![0; PIECE_BYTES as usize];
    let mut n_read = 0;
    while n_read < MAX_PROFILE_BYTES {
        let n_bytes = file.read(&mut piece)?;
        if n_bytes == 0 {
            return Ok(true);
        }
        n_read += n_bytes as u64;
        if !reader.take(&piece[..n_bytes]).map_err(std::io::Error::other)? {
            return Ok(false);
        }
    }
    Ok(false)
}

/// The same of a file of a server; `None` when there is none.
async fn read_remote(
    files: &dyn FileStore,
    name: &str,
    reader: &mut ProfileReader,
) -> Result<Option<bool>, Box<dyn std::error::Error + Send + Sync>> {
    let info = match files.stat(name).await {
        Ok(None) => return Ok(None),
        Ok(Some(info)) if info.has_ranges && info.size > PIECE_BYTES => info,
        // A server that does not say how long it is may send it all the same.
        Ok(Some(_)) | Err(_) => match files.read_whole(name, None, MAX_WHOLE_BYTES).await? {
            ReadWhole::Content(whole) => {
                reader.take(&whole.bytes)?;
                return Ok(Some(true));
            }
            ReadWhole::Missing | ReadWhole::Unchanged => return Ok(None),
        },
    };
    let end = info.size.min(MAX_PROFILE_BYTES);
    let mut at = 0;
    while at < end {
        let piece = at..end.min(at + PIECE_BYTES);
        at = piece.end;
        if !reader.take(&files.read_range(name, piece, info.version.as_ref()).await?)? {
            return Ok(Some(false));
        }
    }
    Ok(Some(end == info.size))
}
