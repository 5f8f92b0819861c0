//! A volume as it is served: what it is made of, for whoever watches it, warms it or changes its settings meanwhile.

use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::Volume;
use super::open::SpecKind;
use crate::blob::Blob;
use crate::config::MountConfig;
use crate::report::Report;
use crate::store::location::FileLocation;
use crate::tree::Tree;

/// A volume and the view behind it.
#[derive(Debug, Clone)]
pub struct LiveVolume {
    /// What the kernel asks.
    pub volume: Arc<dyn Volume>,
    /// What everybody else asks.
    pub live: Arc<Live>,
}

/// What a volume is made of. Nothing here waits for a store.
#[derive(Debug)]
pub struct Live {
    /// What was mounted.
    pub location: FileLocation,
    /// Its counters.
    pub report: Arc<Report>,
    /// When it was opened.
    pub opened: Instant,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    config: MountConfig,
    parts: Vec<Part>,
    observers: Vec<Arc<dyn PartObserver>>,
}

/// Somebody who has something to do with every part.
pub trait PartObserver: Debug + Send + Sync {
    /// A part was opened. Must not wait.
    fn part_opened(&self, part: &Part);

    /// Other settings are in force now. Must not wait.
    fn settings_changed(&self, config: &MountConfig);
}

/// An index or archive that a volume serves. A volume has one, or one for each index of a directory that has been opened.
#[derive(Debug, Clone)]
pub struct Part {
    /// Path within the mount, empty for the only one.
    pub path: Vec<u8>,
    /// Tells it from others that were at the same path: the same when it is closed and opened again, another when its file was replaced.
    pub number: u64,
    /// Tells this opening of it from others; clones share it.
    pub opening: Arc<()>,
    /// Where the index or archive lies.
    pub location: FileLocation,
    /// What it is.
    pub kind: SpecKind,
    /// Its content.
    pub blob: Blob,
    /// Its files, unless it is a disk image.
    pub tree: Option<Arc<Tree>>,
}

impl Live {
    /// A volume with these settings, of which no part is open yet.
    pub fn new(location: FileLocation, config: MountConfig, report: Arc<Report>) -> Self {
        let state = Mutex::new(State { config, parts: Vec::new(), observers: Vec::new() });
        Self { location, report, opened: Instant::now(), state }
    }

    /// Hears of a part that has been opened.
    pub fn add(&self, part: Part) {
        let observers = {
            let mut state = self.lock();
            state.parts.push(part.clone());
            state.observers.clone()
        };
        observers.iter().for_each(|observer| observer.part_opened(&part));
    }

    /// Tells somebody of every part: those that are open now, and those that are opened later.
    pub fn observe(&self, observer: &Arc<dyn PartObserver>) {
        let parts = {
            let mut state = self.lock();
            state.observers.push(Arc::clone(observer));
            state.parts.clone()
        };
        parts.iter().for_each(|part| observer.part_opened(part));
    }

    /// Hears that the part at a path is gone.
    pub fn remove(&self, path: &[u8]) {
        self.lock().parts.retain(|part| part.path != path);
    }

    /// The parts that are open.
    pub fn parts(&self) -> Vec<Part> {
        self.lock().parts.clone()
    }

    /// The settings in force.
    pub fn config(&self) -> MountConfig {
        self.lock().config.clone()
    }

    /// Hears that other settings are in force now.
    pub fn set_config(&self, config: MountConfig) {
        let observers = {
            let mut state = self.lock();
            state.config = config.clone();
            state.observers.clone()
        };
        observers.iter().for_each(|observer| observer.settings_changed(&config));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
