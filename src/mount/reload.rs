//! Settings read again while a mount is served: stores, limits and credentials change without an unmount and without an error to who reads.
//!
//! * [`Reloader::reload`] reads everything again that the command line reads; [`Reloader::remount`] puts options over it.
//! * [`Changes`] tells what is in force now, and what holds until the mount ends.
//!
//! Invariants: an error changes nothing; one change at a time; an option that cannot change is named.

use std::sync::{Arc, Mutex, PoisonError};

use super::log;
use super::options::MountOption;
use super::settings::{Difference, Shown, differences};
use crate::config::{MountConfig, explain};
use crate::fuse::requests::Requests;
use crate::volume::Live;

/// An option with its value, as it was given.
pub type Given = (String, Option<String>);

/// Reads the settings again, with some options over those of the command line.
pub type ReadSettings = Box<dyn Fn(&[Given]) -> Result<MountConfig, String> + Send + Sync>;

/// Says of settings whether this process can be held to them, or why not.
pub type Admits = Box<dyn Fn(&MountConfig) -> Result<(), String> + Send + Sync>;

/// What whoever watches the service hears: `true` when settings begin to be read again, `false` when that is over.
pub type AroundReload = Box<dyn Fn(bool) + Send + Sync>;

/// Changes the settings of one mount.
pub struct Reloader {
    live: Arc<Live>,
    requests: Arc<Requests>,
    read: ReadSettings,
    admits: Admits,
    around: AroundReload,
    /// Options given while the mount was served. Held while settings change, so that one change is over before the next begins.
    given: Mutex<Vec<Given>>,
}

impl std::fmt::Debug for Reloader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reloader").field("live", &self.live).finish_non_exhaustive()
    }
}

/// SIGHUP means something as long as this lives.
#[derive(Debug)]
#[must_use = "it counts only until it is dropped"]
pub struct OnHangup(());

impl Drop for OnHangup {
    fn drop(&mut self) {
        super::signals::on_hangup(None);
    }
}

/// What came of reading settings again.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Changes {
    /// In force now.
    pub changed: Vec<Difference>,
    /// Stores with options that are others now, by name.
    pub stores: Vec<(String, Vec<&'static str>)>,
    /// Said, and not in force before the mount is made anew.
    pub fixed: Vec<Difference>,
}

/// Why settings did not change.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReloadError {
    /// They cannot be read, or a store not be opened.
    #[error("nothing is changed: {0}")]
    Failed(String),
    /// Options were given that hold until the mount ends.
    #[error("nothing is changed: {} cannot change while mounted (unmount and mount again)", .0.join(", "))]
    Fixed(Vec<&'static str>),
}

/// Who watches the service knows that settings are read as long as this lives, which ends with a panic, too.
struct During<'a>(&'a AroundReload);

impl<'a> During<'a> {
    fn begin(around: &'a AroundReload) -> Self {
        around(true);
        Self(around)
    }
}

impl Drop for During<'_> {
    fn drop(&mut self) {
        (self.0)(false);
    }
}

impl Reloader {
    /// For one mount; `read` reads what the command line reads, and `admits` judges what of it would be in force.
    pub fn new(
        live: Arc<Live>,
        requests: Arc<Requests>,
        read: ReadSettings,
        admits: Admits,
        around: AroundReload,
    ) -> Self {
        Self { live, requests, read, admits, around, given: Mutex::default() }
    }

    /// Reads the settings again. Blocks on files and on programs that give secrets.
    ///
    /// # Errors
    /// They cannot be read or used; nothing changed then.
    pub fn reload(&self) -> Result<Changes, ReloadError> {
        self.change(&[])
    }

    /// Reads the settings again, with options over them that hold for all later times, too.
    ///
    /// # Errors
    /// As [`Reloader::reload`]; an option cannot change.
    pub fn remount(&self, options: &[Given]) -> Result<Changes, ReloadError> {
        self.change(options)
    }

    /// Reads the settings again whenever this process gets SIGHUP, until the returned value is dropped.
    pub fn on_hangup(self: &Arc<Self>) -> OnHangup {
        let reloader = Arc::clone(self);
        // What came of it is in the log.
        super::signals::on_hangup(Some(Arc::new(move || drop(reloader.reload()))));
        OnHangup(())
    }

    fn change(&self, options: &[Given]) -> Result<Changes, ReloadError> {
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        let around = During::begin(&self.around);
        let outcome = self.change_now(&given, options);
        drop(around);
        match &outcome {
            Ok(changes) => {
                *given = together(&given, options);
                tracing::info!("settings are read again: {}", changes.summary());
            }
            Err(error) => tracing::error!("settings: {error}"),
        }
        outcome
    }

    fn change_now(&self, given: &[Given], options: &[Given]) -> Result<Changes, ReloadError> {
        if let Some(trace) = self.requests.trace() {
            // Who rotates logs says so in this way.
            trace.reopen();
        }
        let old = self.live.config();
        let all = together(given, options);
        let new = (self.read)(&all).map_err(ReloadError::Failed)?;
        let (changed, fixed): (Vec<_>, Vec<_>) =
            differences(&old, &new).into_iter().partition(|difference| difference.can_change);
        let is_asked_for = |name: &str| options.iter().any(|(option, _)| is_same(option, name));
        let refused: Vec<&'static str> =
            fixed.iter().map(|difference| difference.name).filter(|name| is_asked_for(name)).collect();
        if !refused.is_empty() {
            return Err(ReloadError::Fixed(refused));
        }
        let config = with_changeable(&old, new);
        let failed = |error: &dyn ToString| ReloadError::Failed(error.to_string());
        // Only of what would be in force: the rest is judged by the next mount.
        config.sources.check().map_err(|error| failed(&error))?;
        (self.admits)(&config).map_err(ReloadError::Failed)?;
        let mut stores = Vec::new();
        for store in self.stores(&config) {
            let names = explain::differences(&old.sources.settings, &config.sources.settings, &store)
                .map_err(|error| failed(&error))?;
            if !names.is_empty() {
                stores.push((crate::store::location::without_secrets(&store), names));
            }
        }
        let (io_timeout, log_level) = (config.io_timeout, config.service.log_level);
        let prepared = self.live.prepare(config).map_err(|error| failed(&error))?;
        prepared.commit(&self.live);
        self.requests.set_io_timeout(io_timeout);
        log::set_level(log_level);
        Ok(Changes { changed, stores, fixed })
    }

    /// The stores that are asked, and what keeps chunks.
    fn stores(&self, config: &MountConfig) -> Vec<String> {
        let mut stores = config.sources.stores.clone();
        if stores.is_empty() {
            stores = self.live.parts().iter().map(|part| part.location.default_store()).collect();
            stores.sort();
            stores.dedup();
        }
        stores.extend(config.sources.cache.clone());
        stores
    }
}

/// Whether two names are of one option, as mount(8) and others spell them.
fn is_same(a: &str, b: &str) -> bool {
    let option = |name| MountOption::find(name).map(|option| option.name);
    a == b || option(a).is_some_and(|a| option(b) == Some(a))
}

/// Options given before and now: what is named now stands in place of the same before, all of it if it can be given several times.
fn together(before: &[Given], now: &[Given]) -> Vec<Given> {
    let is_named = |name: &str| now.iter().any(|(other, _)| is_same(other, name));
    before.iter().filter(|(name, _)| !is_named(name)).chain(now).cloned().collect()
}

/// The old settings with what can change as the new ones have it.
fn with_changeable(old: &MountConfig, new: MountConfig) -> MountConfig {
    let mut config = old.clone();
    // Where chunks are kept, and what an index must be, hold as long as the mount.
    let (cache, trust) = (config.sources.cache.take(), std::mem::take(&mut config.sources.trust));
    config.sources = new.sources;
    (config.sources.cache, config.sources.trust) = (cache, trust);
    config.config_file = new.config_file;
    config.store_file = new.store_file;
    config.memory_bytes = new.memory_bytes;
    config.ahead.window_bytes = new.ahead.window_bytes;
    config.ahead.warm_rate_bytes = new.ahead.warm_rate_bytes;
    config.io_timeout = new.io_timeout;
    config.service.log_level = new.service.log_level;
    config
}

impl Changes {
    /// In a line.
    pub fn summary(&self) -> String {
        let mut parts: Vec<String> = self.changed.iter().map(shown).collect();
        parts.extend(self.stores.iter().map(|(store, names)| format!("{} of {store}", names.join(", "))));
        let mut line = match parts.is_empty() {
            true => "nothing is different".to_owned(),
            false => parts.join("; "),
        };
        if !self.fixed.is_empty() {
            let fixed: Vec<&str> = self.fixed.iter().map(|difference| difference.name).collect();
            line.push_str(&format!(" (not before the next mount: {})", fixed.join(", ")));
        }
        line
    }
}

/// A difference for people.
pub fn shown(difference: &Difference) -> String {
    let value = |value: &Option<String>| value.clone().unwrap_or_else(|| "default".to_owned());
    format!("{}: {} -> {}", difference.name, value(&difference.from), value(&difference.to))
}

/// Whether an option can change while a mount is served.
pub fn can_change(name: &str) -> bool {
    Shown::find(name).is_some_and(|row| row.can_change)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;
    use crate::mount::options::MOUNT_OPTIONS;
    use crate::report::Report;
    use crate::store::location::FileLocation;

    fn set(config: &mut MountConfig, options: &[Given]) -> Result<(), String> {
        for (name, value) in options {
            let option = MountOption::find(name).ok_or("unknown")?;
            option.apply(config, value.as_deref()).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    fn given(options: &[(&str, &str)]) -> Vec<Given> {
        options.iter().map(|(name, value)| ((*name).to_owned(), Some((*value).to_owned()))).collect()
    }

    /// A reloader of a mount without parts, whose files say `said`.
    fn reloader(said: Arc<Mutex<Vec<Given>>>) -> (Reloader, Arc<Live>, Arc<AtomicUsize>) {
        let location = FileLocation::Local("/x.caibx".into());
        let live = Arc::new(Live::new(location, MountConfig::default(), Arc::new(Report::default())));
        let requests = Arc::new(Requests::new(MountConfig::default().io_timeout));
        let read = move |extra: &[Given]| {
            let mut config = MountConfig::default();
            set(&mut config, &said.lock().unwrap())?;
            set(&mut config, extra)?;
            Ok(config)
        };
        let n_around = Arc::new(AtomicUsize::new(0));
        let (counted, is_inside) = (Arc::clone(&n_around), AtomicBool::new(false));
        let around = move |begins: bool| {
            assert_ne!(is_inside.swap(begins, Ordering::SeqCst), begins);
            counted.fetch_add(1, Ordering::SeqCst);
        };
        let admits = |config: &MountConfig| match config.keep.backing {
            Some(_) => Err("out of reach".to_owned()),
            None => Ok(()),
        };
        let reloader = Reloader::new(Arc::clone(&live), requests, Box::new(read), Box::new(admits), Box::new(around));
        (reloader, live, n_around)
    }

    #[test]
    fn what_can_change_changes_and_the_rest_is_named() {
        let said = Arc::new(Mutex::new(Vec::new()));
        let (reloader, live, n_around) = reloader(Arc::clone(&said));
        assert_eq!(reloader.reload().unwrap().summary(), "nothing is different");
        *said.lock().unwrap() = given(&[("memory", "64M"), ("io-timeout", "5s"), ("uid", "7"), ("backing", "auto")]);
        let changes = reloader.reload().unwrap();
        assert_eq!(
            changes.summary(),
            "memory: 256M -> 64M; io-timeout: 30s -> 5s (not before the next mount: uid, backing)"
        );
        let config = live.config();
        assert_eq!((config.memory_bytes, config.io_timeout.as_secs(), config.show.uid), (64 << 20, 5, None));
        assert_eq!(reloader.requests.io_timeout().as_secs(), 5);
        assert_eq!(n_around.load(Ordering::SeqCst), 4);
    }

    #[test]
    fn who_watches_hears_the_end_of_a_change_that_panics_and_the_next_one_works() {
        let location = FileLocation::Local("/x.caibx".into());
        let live = Arc::new(Live::new(location, MountConfig::default(), Arc::new(Report::default())));
        let requests = Arc::new(Requests::new(MountConfig::default().io_timeout));
        let (is_broken, heard) = (Arc::new(AtomicBool::new(true)), Arc::new(Mutex::new(Vec::new())));
        let (breaks, hears) = (Arc::clone(&is_broken), Arc::clone(&heard));
        let read = move |_: &[Given]| {
            assert!(!breaks.load(Ordering::SeqCst), "as a fault in a parser would");
            Ok(MountConfig::default())
        };
        let around = move |begins: bool| hears.lock().unwrap().push(begins);
        let reloader = Reloader::new(live, requests, Box::new(read), Box::new(|_| Ok(())), Box::new(around));
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| reloader.reload()));
        assert!(panicked.is_err());
        assert_eq!(*heard.lock().unwrap(), [true, false]);
        is_broken.store(false, Ordering::SeqCst);
        assert_eq!(reloader.reload().unwrap(), Changes::default());
        assert_eq!(*heard.lock().unwrap(), [true, false, true, false]);
    }

    #[test]
    fn a_remount_stays_and_refuses_what_cannot_change() {
        let said = Arc::new(Mutex::new(given(&[("gid", "9")])));
        let (reloader, live, _) = reloader(Arc::clone(&said));
        let error = reloader.remount(&given(&[("cache_size", "1G"), ("uid", "7"), ("setuid", "x")])).unwrap_err();
        let wanted = "nothing is changed: uid, setuid cannot change while mounted (unmount and mount again)";
        assert_eq!(error.to_string(), wanted);
        assert_eq!(live.config().sources.cache_size_bytes, None);
        reloader.remount(&given(&[("cache_size", "1G"), ("mount-timeout", "60s")])).unwrap();
        assert_eq!(live.config().sources.cache_size_bytes, Some(1 << 30));
        *said.lock().unwrap() = given(&[("cache-size", "5G"), ("memory", "32M")]);
        assert_eq!(reloader.reload().unwrap().summary(), "memory: 256M -> 32M", "what was given later wins");
    }

    #[test]
    fn an_error_changes_nothing() {
        let said = Arc::new(Mutex::new(given(&[("memory", "1")])));
        let (reloader, live, _) = reloader(Arc::clone(&said));
        let before = live.config();
        assert!(reloader.reload().unwrap_err().to_string().starts_with("nothing is changed: mount option"));
        *said.lock().unwrap() = given(&[("memory", "64M"), ("store", "/a"), ("http-auth", "x")]);
        assert!(matches!(reloader.reload(), Err(ReloadError::Failed(_))));
        assert_eq!(live.config(), before);
    }

    #[test]
    fn offline_is_judged_with_the_cache_that_the_mount_has() {
        let said = Arc::new(Mutex::new(given(&[("cache", "/c"), ("memory", "64M")])));
        let (reloader, live, _) = reloader(Arc::clone(&said));
        let before = live.config();
        let wanted = "nothing is changed: offline needs a cache to read from (-c CACHE)";
        // One that is said now is of the next mount.
        assert_eq!(reloader.remount(&given(&[("offline", "yes")])).unwrap_err().to_string(), wanted);
        said.lock().unwrap().extend(given(&[("offline", "yes")]));
        assert_eq!(reloader.reload().unwrap_err().to_string(), wanted);
        assert_eq!(live.config(), before);
    }

    #[test]
    fn an_option_is_the_same_by_each_of_its_names() {
        for (a, b) in [("allow_other", "allow-other"), ("drop_privileges", "sandbox"), ("unknown", "unknown")] {
            assert!(is_same(a, b) && is_same(b, a), "{a} {b}");
        }
        assert!(!is_same("uid", "gid") && !is_same("unknown", "other"));
        let given = |name: &str, value: &str| (name.to_owned(), Some(value.to_owned()));
        let all = together(&[given("sandbox", "no"), given("uid", "1")], &[given("drop_privileges", "yes")]);
        assert_eq!(all, [given("uid", "1"), given("drop_privileges", "yes")]);
    }

    #[test]
    fn what_changes_is_what_the_table_says() {
        // Everything that a table row calls changeable must be carried over, and nothing else.
        for option in MOUNT_OPTIONS {
            let value = ["64M", "7s", "7", "yes", "022", "debug", "/a"]
                .into_iter()
                .chain([&"6a".repeat(32)[..]])
                .map(str::to_owned)
                .find(|value| option.apply(&mut MountConfig::default(), Some(value)).is_ok())
                .unwrap();
            let value = if ["control", "check-store"].contains(&option.name) { "no".to_owned() } else { value };
            let old = MountConfig::default();
            let mut new = old.clone();
            option.apply(&mut new, Some(&value)).unwrap();
            let is_different = !differences(&old, &with_changeable(&old, new)).is_empty();
            assert_eq!(is_different, can_change(option.name) && option.name != "cache-repair", "{}", option.name);
        }
    }
}
