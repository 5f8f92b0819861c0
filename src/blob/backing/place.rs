//! Opening a backing file and its state: a new one, one of an earlier mount, or one that desync's `mount-index --cor-file` left.
//!
//! A file is taken only if nobody else could have written it (its owner is us or root, and others may not write). What its state says
//! is believed if the file is the one it was written for and, when it was closed in order, unchanged since; else everything in the file
//! is a claim only, and hashed before it is used.
//!
//! Invariants: nothing of a file that is not ours to fill is changed; the state has its name before the file has content, so that no
//! crash leaves a file of ours that nothing is known of; after opening no path is used any more.

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use super::map::Map;
use super::state::{
    BLOCK_BYTES, BLOCK_CHUNKS, BLOCK_WORDS, Condition, FileId, Identity, WORD_CHUNKS, decode_map_block,
    encode_map_block, map_block_at,
};

/// What the name of a backing file's state ends with.
const STATE_SUFFIX: &str = ".caifs";

/// What desync's state file is called beside its file, behind the name or in place of the suffix.
const DESYNC_SUFFIX: &str = "state";

/// How often a state may be there and gone again before it is an error.
const MAX_TRIES: u32 = 8;

/// Why a file cannot be the backing file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackingError {
    /// It is not to be used: something is to be done about it first.
    #[error("{0}")]
    Refused(String),
    /// It cannot be used now: the mount can do without.
    #[error("{0}")]
    Unusable(String),
}

/// An opened backing file.
#[derive(Debug)]
pub(super) struct Place {
    /// As long as the image.
    pub(super) data: File,
    pub(super) content: Content,
}

/// What there is of the image.
#[derive(Debug)]
pub(super) enum Content {
    /// All of it.
    Complete,
    /// Some of it, and it is ours to add to it.
    Ours {
        map: Map,
        /// Locked as long as it is open.
        state: Flock<File>,
        is_foreign: bool,
    },
    /// Some of it, and it is not ours.
    Others {
        map: Map,
        /// Why nothing can be added.
        why: &'static str,
    },
}

/// The path of a backing file's state.
pub(super) fn state_path(path: &Path) -> PathBuf {
    with_suffix(path, STATE_SUFFIX)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

/// Opens a backing file of this image, or makes one. Blocks. `is_null` tells the chunks that desync never writes.
pub(super) fn open(path: &Path, identity: &Identity, is_null: &dyn Fn(usize) -> bool) -> Result<Place, BackingError> {
    let state_path = state_path(path);
    for _ in 0..MAX_TRIES {
        match open_file(&state_path) {
            Ok((state, is_writable)) => return open_with(path, &state_path, state, is_writable, identity),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                make_state(path, &state_path, identity, is_null)?;
            }
            Err(error) => return Err(failed(&state_path, &error)),
        }
    }
    Err(refused(format!("{} comes and goes", state_path.display())))
}

fn open_with(
    path: &Path,
    state_path: &Path,
    state: File,
    is_writable: bool,
    identity: &Identity,
) -> Result<Place, BackingError> {
    let at_state = |error: io::Error| failed(state_path, &error);
    let at_data = |error: io::Error| failed(path, &error);
    check_private(state_path, &state.metadata().map_err(at_state)?)?;
    let mut why = "it cannot be written";
    let state = match is_writable {
        false => Err(state),
        true => match Flock::lock(state, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => Ok(locked),
            Err((state, nix::errno::Errno::EWOULDBLOCK)) => {
                why = "another mount is filling it";
                Err(state)
            }
            Err((_, errno)) => return Err(at_state(errno.into())),
        },
    };
    let reader: &File = state.as_deref().unwrap_or_else(|state| state);
    let first = read_block(reader, 0).map_err(at_state)?;
    identity.check(&first).map_err(|error| {
        let (path, state) = (path.display(), state_path.display());
        refused(format!("{state} {error}: remove it and {path}, or name another file"))
    })?;
    let seed = identity.seed();
    let condition = Condition::decode(&read_block(reader, 1).map_err(at_state)?, seed);
    let (data, is_new) = open_data(path, state.is_ok()).map_err(|error| match error.kind() {
        ErrorKind::NotFound => BackingError::Unusable(format!("{} is not there ({why})", path.display())),
        _ => at_data(error),
    })?;
    let metadata = data.metadata().map_err(at_data)?;
    check_private(path, &metadata)?;
    if let (Ok(locked), true) = (&state, is_new || metadata.len() == 0) {
        // An earlier file may have left a state that is not of this one but would pass for it once this has the length.
        locked
            .write_all_at(&[0; BLOCK_BYTES], BLOCK_BYTES as u64)
            .and_then(|()| locked.sync_data())
            .map_err(at_state)?;
        data.set_len(identity.size).map_err(at_data)?;
        return Ok(Place { data, content: fresh(state, identity, why) });
    }
    if metadata.len() != identity.size {
        let (has, wants) = (metadata.len(), identity.size);
        let (path, state) = (path.display(), state_path.display());
        return Err(refused(format!(
            "{path} has {has} bytes and the image {wants}: remove it and {state}, or name another file"
        )));
    }
    let known = condition.filter(|condition| {
        let changed = condition.changed;
        condition.file == FileId::of(&metadata) && changed.is_none_or(|_| changed == Condition::changed_at(&metadata))
    });
    if known.is_some_and(|condition| condition.is_complete && condition.changed.is_some()) {
        return Ok(Place { data, content: Content::Complete });
    }
    if known.is_none() {
        if state.is_err() {
            return Err(BackingError::Unusable(format!("{} was copied or changed, and {why}", path.display())));
        }
        tracing::warn!(
            "backing file {}: it was copied or changed since it was last used; what is in it is checked first",
            path.display()
        );
    }
    let map = load_map(reader, identity, known.is_some()).map_err(at_state)?;
    if known.is_none() {
        // The state is to say less than it does, before it is said to be of this file.
        map.all_dirty();
    }
    let content = match state {
        Ok(state) => {
            let is_foreign = known.is_none_or(|condition| condition.is_foreign);
            Content::Ours { map, state, is_foreign }
        }
        Err(_) => Content::Others { map, why },
    };
    Ok(Place { data, content })
}

/// What is known of a file of which nothing is there yet.
fn fresh(state: Result<Flock<File>, File>, identity: &Identity, why: &'static str) -> Content {
    let map = Map::new(identity.n_chunks as usize);
    // What the state says, if anything, is of a file that is gone.
    map.all_dirty();
    match state {
        Ok(state) => Content::Ours { map, state, is_foreign: false },
        Err(_) => Content::Others { map, why },
    }
}

/// Opens the file; makes it if it is ours to fill. Whether it is new, too.
fn open_data(path: &Path, is_ours: bool) -> io::Result<(File, bool)> {
    if !is_ours {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
        return Ok((file, false));
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    match options.clone().create_new(true).open(path) {
        Ok(file) => Ok((file, true)),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => options.open(path).map(|file| (file, false)),
        Err(error) => Err(error),
    }
}

fn read_block(file: &File, block: u64) -> io::Result<Vec<u8>> {
    read_up_to(file, block * BLOCK_BYTES as u64, BLOCK_BYTES)
}

/// The bytes at an offset, fewer at the end of the file.
fn read_up_to(file: &File, offset: u64, n_bytes: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; n_bytes];
    let mut n_read = 0;
    while n_read < n_bytes {
        match file.read_at(&mut bytes[n_read..], offset + n_read as u64) {
            Ok(0) => break,
            Ok(n) => n_read += n,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(n_read);
    Ok(bytes)
}

/// Blocks of the map read at a time.
const BLOCKS_AT_ONCE: u64 = 2048;

fn load_map(state: &File, identity: &Identity, is_trusted: bool) -> io::Result<Map> {
    let seed = identity.seed();
    let mut map = Map::new(identity.n_chunks as usize);
    let mut n_damaged = 0;
    for first in (0..identity.n_map_blocks()).step_by(BLOCKS_AT_ONCE as usize) {
        let n_blocks = BLOCKS_AT_ONCE.min(identity.n_map_blocks() - first);
        let bytes = read_up_to(state, map_block_at(first), n_blocks as usize * BLOCK_BYTES)?;
        for (block, map_block) in bytes.chunks(BLOCK_BYTES).zip(first..) {
            match decode_map_block(block, map_block, seed) {
                Some(words) => map.load(map_block, &words, is_trusted),
                // A hole: nothing was ever written of these chunks.
                None if block.iter().all(|byte| *byte == 0) => {}
                None => n_damaged += 1,
            }
        }
    }
    if n_damaged > 0 {
        tracing::warn!(
            "the state of a backing file is damaged in {n_damaged} places; what it told of is fetched again"
        );
    }
    Ok(map)
}

/// Makes a state: of nothing, or of what desync says is in the file.
fn make_state(
    path: &Path,
    state_path: &Path,
    identity: &Identity,
    is_null: &dyn Fn(usize) -> bool,
) -> Result<(), BackingError> {
    let at_state = |error: io::Error| failed(state_path, &error);
    let claims = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_file() && metadata.len() == 0 => None,
        Ok(metadata) => Some(claims_of(path, &metadata, identity, is_null)?),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(failed(path, &error)),
    };
    let mut temporary_name = OsString::from(".#");
    temporary_name.push(state_path.file_name().unwrap_or_default());
    temporary_name.push(format!("{:016x}", RandomState::new().hash_one(std::process::id())));
    let temporary = state_path.with_file_name(temporary_name);
    let made = write_state(&temporary, identity, claims.as_deref()).and_then(|()| {
        match fs::hard_link(&temporary, state_path) {
            // Another mount has just made one: that is the one to use.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            // A file system without links.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::EOPNOTSUPP | libc::ENOSYS)) => {
                fs::rename(&temporary, state_path)
            }
            linked => linked,
        }
    });
    // Its other name is what counts; after a rename it is gone already.
    drop(fs::remove_file(&temporary));
    made.map_err(at_state)?;
    if let Some(directory) = state_path.parent().and_then(|directory| File::open(directory).ok()) {
        // Some file systems cannot flush a directory; nothing wrong comes of a state that is lost.
        drop(directory.sync_all());
    }
    Ok(())
}

fn write_state(path: &Path, identity: &Identity, claims: Option<&[u8]>) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let seed = identity.seed();
    file.write_all(&identity.encode())?;
    // Without a condition, all that the map says is a claim.
    file.write_all(&[0; BLOCK_BYTES])?;
    let Some(claims) = claims else { return file.sync_all() };
    for (bytes, map_block) in claims.chunks(BLOCK_CHUNKS / 8).zip(0..) {
        let mut words = [0; BLOCK_WORDS];
        for (word, bits) in words.iter_mut().zip(bytes.chunks(WORD_CHUNKS / 8)) {
            for (bit_idx, bit) in
                bits.iter().flat_map(|byte| (0..8).map(move |bit| u64::from(byte >> bit & 1))).enumerate()
            {
                *word |= bit << (2 * bit_idx);
            }
        }
        file.write_all(&encode_map_block(&words, map_block, seed))?;
    }
    file.sync_all()
}

/// The chunks that desync says are in its copy-on-read file: one bit for each, from the lowest of the first byte. Such a file is refused
/// without them, because nothing would tell it from any other file of that size, which filling would destroy.
fn claims_of(
    path: &Path,
    metadata: &Metadata,
    identity: &Identity,
    is_null: &dyn Fn(usize) -> bool,
) -> Result<Vec<u8>, BackingError> {
    let shown = path.display();
    check_private(path, metadata)?;
    if metadata.len() != identity.size {
        let (has, wants) = (metadata.len(), identity.size);
        return Err(refused(format!(
            "{shown} is there and no copy of this image (it has {has} bytes, the image {wants}): name another file"
        )));
    }
    let n_bytes = identity.n_chunks.div_ceil(8);
    for candidate in [with_suffix(path, &format!(".{DESYNC_SUFFIX}")), path.with_extension(DESYNC_SUFFIX)] {
        let mut file = match open_file(&candidate) {
            Ok((file, _)) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(&candidate, &error)),
        };
        let has = file.metadata().map_err(|error| failed(&candidate, &error))?.len();
        if has != n_bytes {
            let candidate = candidate.display();
            return Err(refused(format!(
                "{candidate} is not desync's state of {shown} (it has {has} bytes instead of {n_bytes})"
            )));
        }
        let mut claims = Vec::with_capacity(n_bytes as usize);
        Read::by_ref(&mut file).take(n_bytes).read_to_end(&mut claims).map_err(|error| failed(&candidate, &error))?;
        // desync neither writes nor notes these: they are holes.
        for chunk_idx in (0..identity.n_chunks as usize).filter(|&chunk_idx| is_null(chunk_idx)) {
            claims[chunk_idx / 8] |= 1 << (chunk_idx % 8);
        }
        // desync makes it executable and readable for all. The file is what was looked at, whatever has its name by now.
        let (file, _) = open_file(path).map_err(|error| failed(path, &error))?;
        let found = file.metadata().map_err(|error| failed(path, &error))?;
        if (found.dev(), found.ino()) != (metadata.dev(), metadata.ino()) {
            return Err(refused(format!("{shown} was replaced while it was looked at")));
        }
        file.set_permissions(Permissions::from_mode(0o600)).map_err(|error| failed(path, &error))?;
        tracing::info!(
            "backing file {shown}: taken over from desync by {}; what is in it is checked first",
            candidate.display()
        );
        return Ok(claims);
    }
    Err(refused(format!(
        "{shown} is there and nothing says what is in it: remove it or name another file (if desync mount-index wrote it, put its \
         state file beside it as {shown}.{DESYNC_SUFFIX})"
    )))
}

/// Opens a file that is there, for writing if that is possible. A link or a named pipe in its place is not followed or waited for.
fn open_file(path: &Path) -> io::Result<(File, bool)> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    match options.clone().write(true).open(path) {
        Ok(file) => Ok((file, true)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EACCES | libc::EROFS | libc::EPERM)) => {
            options.open(path).map(|file| (file, false))
        }
        Err(error) => Err(error),
    }
}

/// Checks that nobody but us and root can have written a file.
fn check_private(path: &Path, metadata: &Metadata) -> Result<(), BackingError> {
    let shown = path.display();
    if !metadata.is_file() {
        return Err(refused(format!("{shown} is not a regular file")));
    }
    let (uid, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    if uid != 0 && uid != nix::unistd::geteuid().as_raw() {
        return Err(refused(format!(
            "{shown} belongs to user {uid}, who could change what is read: name another file"
        )));
    }
    if mode & 0o022 != 0 {
        return Err(refused(format!(
            "{shown} can be written by others (mode {mode:04o}): chmod 600 it if its content is to be trusted"
        )));
    }
    Ok(())
}

fn refused(why: String) -> BackingError {
    BackingError::Refused(why)
}

/// What a failed system call means for the mount: a disk that is full or broken is done without.
fn failed(path: &Path, error: &io::Error) -> BackingError {
    let shown = path.display();
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT | libc::EIO) => BackingError::Unusable(format!("{shown}: {error}")),
        Some(libc::ELOOP) => refused(format!("{shown} is a symbolic link: name the file itself")),
        _ => refused(format!("{shown}: {error}")),
    }
}
