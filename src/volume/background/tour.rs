//! Going through a directory of indexes for what is to be warmed of them: nobody else may ever open them.
//!
//! Parts are opened one after the other, each when the one before is warmed; what is then done for one is what is done for every part that
//! is opened. What cannot be listed or opened is tried again when the rest is done. Indexes that come later are warmed when
//! somebody opens them.
//!
//! Invariant: no part is held here; which of them stay open is for the volume to say.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::Semaphore;

use super::at_work::AllAtWork;
use crate::volume::warm::wish::components;
use crate::volume::warm::{self, NotWarmable, Wish};
use crate::volume::{FOREVER, FileKind, Live, ROOT_INO, Volume, VolumeError};

/// Names of a directory that are looked at together.
const MAX_ENTRIES: usize = 256;

/// How often what failed is tried again, and how soon; each time twice as long.
const N_ROUNDS: u32 = 6;
const FIRST_PAUSE: Duration = Duration::from_secs(2);

/// Whether what is in a directory may change: then it is none of an index, but one of indexes.
pub(super) fn is_changeable(volume: &dyn Volume, ino: u64) -> bool {
    volume.lasts(ino) != FOREVER
}

/// A tour of a directory of indexes.
pub(super) struct Tour {
    pub(super) volume: Arc<dyn Volume>,
    pub(super) live: Weak<Live>,
    pub(super) wishes: Vec<Wish>,
    pub(super) at_work: Arc<AllAtWork>,
    /// Those of parts that are warmed.
    pub(super) turns: Arc<Semaphore>,
}

/// A directory, or an index or archive in one.
#[derive(Debug, Clone)]
struct Place {
    path: Vec<u8>,
    ino: u64,
    is_directory: bool,
}

/// What is still to be done in a directory.
enum Step {
    /// The names from an offset on.
    Rest(Place, u64),
    /// A name, and the path that it makes.
    Name(u64, Vec<u8>, Vec<u8>),
}

/// A place that is to be tried again, and why.
type Failed = Vec<(Vec<u8>, String)>;

/// There is nothing that would keep what is warmed, of any part. That was said when the first was opened.
struct Pointless;

impl Tour {
    /// Goes through all of it once, and through what failed again.
    pub(super) async fn run(self) {
        let mut paths: Vec<(Vec<u8>, bool)> = Vec::new();
        for wish in &self.wishes {
            paths.push(match wish {
                Wish::All | Wish::Metadata => (Vec::new(), false),
                Wish::Path { path, range } => (path.clone(), range.is_some()),
            });
        }
        paths.sort();
        paths.dedup();
        // Whoever goes through all of it only looks whether the others are there.
        let has_all = paths.iter().any(|(path, has_range)| components(path).next().is_none() && !has_range);
        for n_rounds in 0..=N_ROUNDS {
            let mut failed = Failed::new();
            for (path, has_range) in paths {
                let is_covered = n_rounds == 0 && has_all && components(&path).next().is_some();
                let shown = String::from_utf8_lossy(&path).into_owned();
                match self.find(&path).await {
                    Err(error) => failed.push((path, error.to_string())),
                    Ok(None) => tracing::warn!("warming: {shown}: there is no such index or directory"),
                    Ok(Some(place)) if place.is_directory && has_range => {
                        tracing::warn!("warming: {shown}: not a regular file, which a range of bytes could be of");
                    }
                    Ok(Some(_)) if is_covered => {}
                    Ok(Some(place)) => {
                        if let Err(Pointless) = self.go_through(place, &mut failed).await {
                            return;
                        }
                    }
                }
            }
            if n_rounds == N_ROUNDS {
                for (path, error) in failed {
                    tracing::warn!("warming: {}: {error}; it is left out", String::from_utf8_lossy(&path));
                }
                return;
            }
            if failed.is_empty() {
                return;
            }
            tokio::time::sleep(FIRST_PAUSE * (1 << n_rounds)).await;
            paths = failed.into_iter().map(|(path, _)| (path, false)).collect();
        }
    }

    /// The directory at a path, or the index or archive that the path leads to or into.
    async fn find(&self, path: &[u8]) -> Result<Option<Place>, VolumeError> {
        let mut place = Place { path: Vec::new(), ino: ROOT_INO, is_directory: true };
        for name in components(path) {
            if !place.is_directory {
                break;
            }
            match self.look_up(place.ino, name, joined(&place.path, name)).await? {
                Some(found) => place = found,
                None => return Ok(None),
            }
        }
        Ok(Some(place))
    }

    async fn look_up(&self, directory: u64, name: &[u8], path: Vec<u8>) -> Result<Option<Place>, VolumeError> {
        let attr = self.volume.lookup(directory, name).await?;
        Ok(attr.map(|attr| {
            let is_directory = attr.kind == FileKind::Directory && is_changeable(&*self.volume, attr.ino);
            Place { path, ino: attr.ino, is_directory }
        }))
    }

    /// Sees to it that what is at a place is warmed, and all that is below it.
    async fn go_through(&self, place: Place, failed: &mut Failed) -> Result<(), Pointless> {
        let mut steps = match place.is_directory {
            true => vec![Step::Rest(place, 0)],
            false => return self.warm(place, failed).await,
        };
        while let Some(step) = steps.pop() {
            match step {
                Step::Rest(place, offset) => match self.volume.readdir(place.ino, offset, MAX_ENTRIES).await {
                    Ok(listing) => {
                        let Some(last) = listing.entries.last() else { continue };
                        let (ino, path) = (place.ino, place.path.clone());
                        steps.push(Step::Rest(place, last.next_offset));
                        let names = listing.entries.into_iter().rev().map(|entry| entry.name.to_vec());
                        steps.extend(names.map(|name| Step::Name(ino, joined(&path, &name), name)));
                    }
                    Err(error) => failed.push((place.path, error.to_string())),
                },
                Step::Name(directory, path, name) => match self.look_up(directory, &name, path.clone()).await {
                    Ok(Some(place)) if place.is_directory => steps.push(Step::Rest(place, 0)),
                    Ok(Some(place)) => self.warm(place, failed).await?,
                    // It went meanwhile.
                    Ok(None) => {}
                    Err(error) => failed.push((path, error.to_string())),
                },
            }
        }
        Ok(())
    }

    /// Opens a part, and waits until what is done for one that was opened is done.
    async fn warm(&self, place: Place, failed: &mut Failed) -> Result<(), Pointless> {
        // One that had to wait for its turn could be closed before.
        drop(self.turns.acquire().await);
        self.at_work.watch(&place.path);
        // Nothing that is asked of a part is answered before it is open.
        if let Err(error) = self.volume.listxattr(place.ino, false).await {
            failed.push((place.path, error.to_string()));
            return Ok(());
        }
        if !self.at_work.finished(&place.path).await {
            failed.push((place.path, "it was closed before its turn".to_owned()));
            return Ok(());
        }
        let Some(live) = self.live.upgrade() else { return Err(Pointless) };
        let part = live.parts().into_iter().find(|part| part.path == place.path);
        let Some(part) = part else { return Ok(()) };
        match warm::check(&part.blob).await {
            Ok(()) | Err(NotWarmable::Local) => Ok(()),
            Err(NotWarmable::NoCache | NotWarmable::Offline) => Err(Pointless),
        }
    }
}

/// The path of a name in a directory.
fn joined(directory: &[u8], name: &[u8]) -> Vec<u8> {
    match directory.is_empty() {
        true => name.to_vec(),
        false => [directory, b"/", name].concat(),
    }
}
