//! Who the process is and what its threads may do, from its first moment on.
//!
//! [`Confinement::begin`] becomes the wanted user, while nothing but this thread exists; every thread that is started later calls
//! [`Confinement::enter`]. Capabilities, `no_new_privs` and Landlock domains belong to a thread, not to a process: the main thread and
//! the one that waits for signals keep what mounting and unmounting take, all others do without.
//!
//! What needs which: mount(2), umount2(2) and `FUSE_DEV_IOC_BACKING_OPEN` need `CAP_SYS_ADMIN`; `/sys/class/bdi` and a mountpoint or
//! device that only root can open need `CAP_DAC_OVERRIDE`.
//!
//! Invariant: nothing that came from elsewhere is read by a thread that may mount.

use std::ffi::CString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl::{set_keepcaps, set_no_new_privs};
use nix::unistd::{AccessFlags, Gid, Uid, User, eaccess, geteuid, getgroups, initgroups, setgid, setuid};

use super::MountError;
use super::control::paths::prepare as prepare_control;
use super::sandbox::{Sandbox, SandboxPlan};
use super::service::Service;
use crate::cache::disk::make_root;
use crate::config::MountConfig;
use crate::store::location::{FileLocation, Location};

/// What the threads keep that mount, unmount, and open a log file again.
const OF_MOUNTING: &[Capability] =
    &[Capability::CAP_SYS_ADMIN, Capability::CAP_DAC_OVERRIDE, Capability::CAP_DAC_READ_SEARCH];

/// What all other threads of root keep in a sandbox: files of other users, as root has them, and what a cache of theirs is told of its files.
const OF_FILES: &[Capability] =
    &[Capability::CAP_DAC_OVERRIDE, Capability::CAP_DAC_READ_SEARCH, Capability::CAP_FOWNER];

/// What threads keep that answer on a control socket: it lies in a directory of root's.
const OF_CONTROL: &[Capability] = &[Capability::CAP_DAC_OVERRIDE];

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It talks to stores, reads files, hashes, decodes.
    Worker,
    /// It takes requests from the kernel.
    Session,
    /// It answers this user and root on the control socket, and reads the configuration again, or writes the log: files and programs of
    /// an admin's choice, so that no sandbox holds it.
    Control,
}

/// What the threads of this process may do.
#[derive(Debug)]
pub struct Confinement {
    mounts_as_root: bool,
    sandbox: Option<Sandbox>,
    /// What the sandbox lets threads open.
    plan: SandboxPlan,
    /// The capabilities that workers keep; `None` for all that they have.
    worker_caps: Option<CapsHashSet>,
    session_caps: Option<CapsHashSet>,
    control_caps: Option<CapsHashSet>,
}

impl Confinement {
    /// Becomes the user, and looks up what the sandbox needs. To be called before any other thread exists.
    ///
    /// # Errors
    /// There is no such user or it cannot be become; it cannot use the cache; a sandbox was demanded and cannot be had.
    pub(super) fn begin(service: &Service) -> Result<Self, MountError> {
        let config = &service.config;
        let mounts_as_root = geteuid().is_root();
        let user = config.service.setuid.as_deref().map(find_user).transpose()?;
        let wants_sandbox = config.service.sandbox.unwrap_or(mounts_as_root && service.location.is_some());
        if user.is_none() && !wants_sandbox {
            return Ok(Self {
                mounts_as_root,
                sandbox: None,
                plan: SandboxPlan::default(),
                worker_caps: None,
                session_caps: None,
                control_caps: None,
            });
        }
        let mut plan = SandboxPlan::system();
        plan.add(&service.plan);
        if let Some(location) = &service.location {
            plan.add_mount(location, config);
        }
        if let Some(user) = &user {
            if let Some(dir) = &service.control_dir {
                // It stays the directory of whoever mounts. Whoever puts a socket there says what is wrong with it.
                let _ = prepare_control(dir);
            }
            become_user(user)?;
        }
        let cache = cache_dir(config);
        if let Some(cache) = &cache {
            // Whoever opens it says what is wrong with it.
            let _ = make_root(cache);
        }
        if has_cap(Capability::CAP_SYS_ADMIN) {
            // Who may unmount by himself needs no program that runs as root, which this forbids.
            set_no_new_privs().map_err(MountError::errno("PR_SET_NO_NEW_PRIVS"))?;
        }
        let sandbox = match (wants_sandbox, Sandbox::new(&plan)) {
            (false, _) => None,
            (true, Ok(sandbox)) => Some(sandbox),
            (true, Err(why)) if config.service.sandbox == Some(true) => return Err(MountError::Sandbox(why)),
            (true, Err(why)) => {
                tracing::warn!("the mount goes without a sandbox: {why} (sandbox=no goes without it silently)");
                None
            }
        };
        let held = caps::read(None, CapSet::Permitted).unwrap_or_default();
        let keep =
            |wanted: &[Capability]| wanted.iter().copied().filter(|cap| held.contains(cap)).collect::<CapsHashSet>();
        let worker_caps = match (&user, &sandbox) {
            (Some(_), _) => keep(&[]),
            (None, Some(_)) => keep(OF_FILES),
            (None, None) => held.clone(),
        };
        let mut session_caps = worker_caps.clone();
        if config.keep.backing.is_some() && config.passthrough() != Some(false) {
            session_caps.extend(keep(&[Capability::CAP_SYS_ADMIN]));
        }
        let mut control_caps = worker_caps.clone();
        control_caps.extend(keep(OF_CONTROL));
        let confinement = Self {
            mounts_as_root,
            sandbox,
            plan,
            worker_caps: Some(worker_caps),
            session_caps: Some(session_caps),
            control_caps: Some(control_caps),
        };
        if let (Some(user), Some(cache)) = (&user, &cache) {
            confinement.check_cache(cache, user)?;
        }
        Ok(confinement)
    }

    /// Takes from the calling thread what its role can do without, for good. The first thing a thread does.
    pub fn enter(&self, role: Role) {
        let kept = match role {
            Role::Worker => &self.worker_caps,
            Role::Session => &self.session_caps,
            Role::Control => &self.control_caps,
        };
        if let Some(kept) = kept {
            // Fewer than it has: nothing can be wrong with that.
            let lowered =
                caps::set(None, CapSet::Effective, kept).and_then(|()| caps::set(None, CapSet::Permitted, kept));
            if let Err(error) = lowered {
                tracing::error!("a thread keeps capabilities that it should not: {error}");
            }
        }
        match &self.sandbox {
            Some(sandbox) if role != Role::Control => sandbox.enter(),
            _ => {}
        }
    }

    /// Whether root mounts, whatever user the process has become.
    pub fn mounts_as_root(&self) -> bool {
        self.mounts_as_root
    }

    /// Whether threads are held to a sandbox.
    pub fn is_sandboxed(&self) -> bool {
        self.sandbox.is_some()
    }

    /// Whether workers can open what a mount of `location` would need with other settings.
    ///
    /// # Errors
    /// What they cannot, and what can be done, in one line.
    pub fn admits(&self, location: &FileLocation, config: &MountConfig) -> Result<(), String> {
        if !self.is_sandboxed() {
            return Ok(());
        }
        let mut wanted = SandboxPlan::default();
        wanted.add_mount(location, config);
        self.plan.covers(&wanted).map_err(|path| {
            let path = path.display();
            format!("{path} is out of reach of the sandbox that this mount was made with (unmount and mount again, or mount with sandbox=no)")
        })
    }

    /// Fails if a thread could not be shut in.
    pub(super) fn check(&self) -> Result<(), MountError> {
        match &self.sandbox {
            Some(sandbox) if sandbox.failed() => {
                Err(MountError::Sandbox("a thread could not be shut in (see above)".into()))
            }
            _ => Ok(()),
        }
    }

    /// Looks as a worker does: this thread may more.
    fn check_cache(&self, cache: &Path, user: &User) -> Result<(), MountError> {
        let may_use = AccessFlags::R_OK | AccessFlags::W_OK | AccessFlags::X_OK;
        // Where links lead first: a link in the way of what is shut off would be named in its place.
        let real = cache.canonicalize().unwrap_or_else(|_| cache.to_owned());
        let seen = std::thread::scope(|scope| {
            let look = || {
                self.enter(Role::Worker);
                let is_shut = |path: &&Path| eaccess(*path, AccessFlags::X_OK) == Err(nix::errno::Errno::EACCES);
                // The last one is the topmost, and all below it are out of reach because of it.
                let shut = |path: &Path| path.ancestors().skip(1).filter(is_shut).last().map(Path::to_owned);
                eaccess(cache, may_use).map_err(|error| (error, shut(&real).or_else(|| shut(cache))))
            };
            scope.spawn(look).join().unwrap_or(Err((nix::errno::Errno::EINVAL, None)))
        });
        seen.map_err(|(error, shut)| {
            let (class, cache, name) = (class_of(user, cache), cache.display(), &user.name);
            let cure = match shut {
                Some(dir) => format!("{name} may not enter {0}: chmod {1}+x {0}", dir.display(), class_of(user, &dir)),
                None if class == 'u' => format!("chmod u+rwx {cache}"),
                None => format!("chown -R {name} {cache}"),
            };
            let error = io::Error::from(error);
            MountError::User(format!("{name} cannot use the cache {cache}: {error} ({cure})"))
        })
    }
}

/// Whose permissions of a directory count for a user that this process has become, as chmod(1) names them.
fn class_of(user: &User, dir: &Path) -> char {
    let is_of_group = |gid: u32| getgroups().is_ok_and(|groups| groups.contains(&Gid::from_raw(gid)));
    match dir.metadata() {
        Ok(metadata) if metadata.uid() == user.uid.as_raw() => 'u',
        Ok(metadata) if metadata.gid() == user.gid.as_raw() || is_of_group(metadata.gid()) => 'g',
        _ => 'o',
    }
}

fn cache_dir(config: &MountConfig) -> Option<PathBuf> {
    match Location::parse(config.sources.cache.as_deref()?) {
        Ok(Location::Local(path)) => Some(path),
        _ => None,
    }
}

pub(super) fn has_cap(cap: Capability) -> bool {
    caps::has_cap(None, CapSet::Effective, cap).unwrap_or(false)
}

/// A user by name or number.
pub(super) fn find_user(text: &str) -> Result<User, MountError> {
    let found = match text.parse::<u32>() {
        Ok(uid) => User::from_uid(Uid::from_raw(uid)),
        Err(_) => User::from_name(text),
    };
    match found {
        Ok(Some(user)) => Ok(user),
        Ok(None) => Err(MountError::User(format!("there is no user {text}"))),
        Err(error) => Err(MountError::User(format!("{text} cannot be looked up: {}", io::Error::from(error)))),
    }
}

/// Becomes another user, with its groups, and keeps what mounting takes.
fn become_user(user: &User) -> Result<(), MountError> {
    if user.uid == geteuid() {
        return Ok(());
    }
    let wrong = |what: &'static str| {
        let name = user.name.clone();
        move |error: nix::errno::Errno| {
            let hint = if error == nix::errno::Errno::EPERM { " (only root can become another user)" } else { "" };
            MountError::User(format!("cannot become {name}: {what}: {}{hint}", io::Error::from(error)))
        }
    };
    let name = CString::new(user.name.as_bytes()).map_err(|_| MountError::User("a name with a NUL byte".into()))?;
    let held = caps::read(None, CapSet::Permitted).unwrap_or_default();
    set_keepcaps(true).map_err(wrong("PR_SET_KEEPCAPS"))?;
    initgroups(&name, user.gid).map_err(wrong("initgroups"))?;
    setgid(Gid::from_raw(user.gid.as_raw())).map_err(wrong("setgid"))?;
    setuid(user.uid).map_err(wrong("setuid"))?;
    set_keepcaps(false).map_err(wrong("PR_SET_KEEPCAPS"))?;
    let kept: CapsHashSet = OF_MOUNTING.iter().copied().filter(|cap| held.contains(cap)).collect();
    let lowered = caps::set(None, CapSet::Effective, &kept).and_then(|()| caps::set(None, CapSet::Permitted, &kept));
    lowered.map_err(|error| MountError::User(format!("cannot become {}: capabilities: {error}", user.name)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn service(setuid: Option<&str>, sandbox: Option<bool>) -> Service {
        let mut service = Service::default();
        service.config.service.setuid = setuid.map(str::to_owned);
        service.config.service.sandbox = sandbox;
        service
    }

    #[test]
    fn users_are_found_by_name_and_number() {
        let root = find_user("root").unwrap();
        assert_eq!((root.uid.as_raw(), find_user("0").unwrap().name), (0, "root".to_owned()));
        assert_eq!(find_user("no-such-user").unwrap_err().to_string(), "setuid: there is no user no-such-user");
        assert_eq!(find_user("4294967294").unwrap_err().to_string(), "setuid: there is no user 4294967294");
    }

    #[test]
    fn nothing_changes_when_nothing_is_asked_for() {
        let before = caps::read(None, CapSet::Effective).unwrap();
        let confinement = Confinement::begin(&service(None, Some(false))).unwrap();
        confinement.enter(Role::Worker);
        assert_eq!(caps::read(None, CapSet::Effective).unwrap(), before);
        assert!(!confinement.is_sandboxed() && confinement.mounts_as_root() == geteuid().is_root());
    }

    #[test]
    fn a_worker_in_a_sandbox_cannot_mount() {
        let begun = std::thread::scope(|scope| {
            let look = || {
                let confinement = Confinement::begin(&service(None, Some(true)))?;
                confinement.enter(Role::Worker);
                confinement.check()?;
                assert!(!has_cap(Capability::CAP_SYS_ADMIN));
                assert!(!has_cap(Capability::CAP_SYS_PTRACE));
                assert!(!has_cap(Capability::CAP_CHOWN));
                assert!(std::fs::File::open("/etc/passwd").is_ok());
                assert!(std::fs::read_dir("/etc").is_err(), "what asks no network needs no more of it");
                assert!(std::fs::read_dir("/var/log").is_err());
                Ok::<_, MountError>(())
            };
            scope.spawn(look).join().unwrap()
        });
        match begun {
            Err(MountError::Sandbox(why)) => {
                assert!(std::env::var_os("CAIFS_REQUIRE_PEERS").is_none(), "{why}");
                eprintln!("skipped: {why}");
            }
            begun => begun.unwrap(),
        }
    }
}
