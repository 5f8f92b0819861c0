//! What threads that read what others wrote may still open: a Landlock domain (landlock(7)), for each of them on its own.
//!
//! * [`SandboxPlan`] lists the paths; [`SandboxPlan::add_mount`] adds what a mount of some settings needs.
//! * [`Sandbox`] is the plan with its files looked up; [`Sandbox::enter`] shuts the calling thread in, and all that it starts.
//!
//! A domain forbids mounting and unmounting, so the main thread and the one that waits for signals stay outside. Threads share their
//! memory, so this is a wall against opening what was not meant, not against code that took over a thread.
//!
//! Invariant: a thread that cannot be shut in does not go on unnoticed: [`Sandbox::failed`] tells.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr,
    RulesetStatus, path_beneath_rules,
};
use nix::unistd::{Uid, User, geteuid};

use crate::config::MountConfig;
use crate::store::StoreOptions;
use crate::store::location::{FileLocation, Location, split_group};

/// The first that lets files be moved between directories (Linux 5.19), as a cache does.
const NEEDED: ABI = ABI::V2;

/// What is handled where the kernel can: truncation and ioctls of devices as well.
const WANTED: ABI = ABI::V5;

/// What everybody may read: names, certificates, users, programs' libraries, what the process is. Of the links that `/etc/resolv.conf`
/// may be, the places in `/run`.
const SYSTEM_READ: &[&str] = &[
    "/etc",
    "/usr",
    "/lib",
    "/lib32",
    "/lib64",
    "/bin",
    "/sbin",
    "/proc/self",
    "/proc/sys",
    "/proc/meminfo",
    "/proc/cpuinfo",
    "/sys/fs/cgroup",
    "/sys/devices/system/cpu",
    "/dev/urandom",
    "/dev/random",
    "/run/systemd/resolve",
    "/run/resolvconf",
    "/run/NetworkManager",
    "/run/nscd",
    "/nix/store",
];

/// What of it is often a link to elsewhere: where names are looked up, and certificates. What a link leads to is replaced with its
/// directory, so that this is what may be read.
const SYSTEM_LINKED: &[&str] = &[
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/host.conf",
    "/etc/gai.conf",
    "/etc/localtime",
    "/etc/ssl",
    "/etc/ssl/certs",
    "/etc/ssl/cert.pem",
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
];

/// The most links that lead one to the other, as the kernel has it.
const MAX_LINKS: usize = 40;

/// What everybody may write to. The device is opened once more by every thread that takes requests.
const SYSTEM_WRITE: &[&str] = &["/dev/null", "/dev/fuse"];

/// Where programs lie, with their loaders and libraries.
const PROGRAMS: &[&str] = &["/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/nix/store"];

/// Where an index that is no local file is laid down without a cache (see `blob::source`).
const SPOOL_DIR: &str = "/var/tmp";

/// Files of a directory of indexes that are looked at, for those that are symlinks.
const MAX_LOOKED_AT: usize = 100_000;

/// What may be opened; a directory stands for all below it. What does not exist is left out.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SandboxPlan {
    /// Files and directories to read.
    pub read: Vec<PathBuf>,
    /// Files and directories to read, and to write, make and remove files in.
    pub write: Vec<PathBuf>,
    /// Programs to start, and directories of programs.
    pub exec: Vec<PathBuf>,
}

impl SandboxPlan {
    /// What every process needs.
    pub fn system() -> Self {
        let paths = |list: &[&str]| list.iter().map(PathBuf::from).collect();
        let mut plan = Self { read: paths(SYSTEM_READ), write: paths(SYSTEM_WRITE), exec: Vec::new() };
        for path in SYSTEM_LINKED {
            plan.add_linked(Path::new(path));
        }
        plan
    }

    /// All of another plan as well.
    pub fn add(&mut self, other: &Self) {
        self.read.extend_from_slice(&other.read);
        self.write.extend_from_slice(&other.write);
        self.exec.extend_from_slice(&other.exec);
    }

    /// Where a link leads, and those that it leads to: the directory of each, since a file there is made anew when it changes. Of one that
    /// lies right below a directory of the root, where everything may lie, the file only. Nothing for what is no link.
    fn add_linked(&mut self, path: &Path) {
        let mut path = path.to_owned();
        for _ in 0..MAX_LINKS {
            let Ok(target) = std::fs::read_link(&path) else { return };
            path = directory_of(&path).join(target);
            // What it leads to may come later than the mount, its directory hardly.
            let Ok(dir) = directory_of(&path).canonicalize() else { return };
            self.read.push(if dir.components().count() > 2 { dir } else { path.clone() });
        }
    }

    /// What a mount of `location` needs with these settings. Reads the secrets of its stores, so that files and programs that give them
    /// need not be open to it; what is wrong with a store is left for those who open it.
    pub fn add_mount(&mut self, location: &FileLocation, config: &MountConfig) {
        let sources = &config.sources;
        self.read.extend(config.config_file.iter().chain(&config.store_file).cloned());
        let default_store = location.default_store();
        let mut stores: Vec<&str> = sources.stores.iter().map(String::as_str).collect();
        if stores.is_empty() {
            stores.push(&default_store);
        }
        for store in stores {
            self.add_store(store, config, Use::Read);
        }
        if let Some(cache) = &sources.cache {
            self.add_store(cache, config, Use::Write);
        }
        match location {
            // Its directory, for whoever finds profiles and signatures beside it, or another version in its place.
            FileLocation::Local(path) if path.is_dir() => {
                self.read.push(path.clone());
                self.add_targets(path, &mut { MAX_LOOKED_AT });
            }
            FileLocation::Local(path) => self.read.push(directory_of(path)),
            FileLocation::Remote { directory, directory_text, .. } => {
                let specs = sources.settings.resolve(directory_text).unwrap_or_default();
                self.add_location(directory, specs.first().map(|spec| &spec.options), config);
                if sources.cache.is_none() {
                    self.write.push(SPOOL_DIR.into());
                }
            }
            FileLocation::Stdio => {}
        }
        let (ahead, keep) = (&config.ahead, &config.keep);
        self.read.extend(ahead.profile.iter().chain(&config.sources.trust.verify_key).map(PathBuf::from));
        let written = ahead.record.iter().chain(&config.service.access_trace).map(|path| directory_of(path));
        self.write.extend(written);
        self.write.extend(keep.backing.iter().filter(|file| *file != "auto").map(|file| directory_of(Path::new(file))));
    }

    /// Where the symlinks below a directory of indexes lead, as they are now.
    fn add_targets(&mut self, dir: &Path, n_left: &mut usize) {
        let Ok(entries) = std::fs::read_dir(dir) else { return };
        for entry in entries.flatten() {
            if *n_left == 0 {
                return;
            }
            *n_left -= 1;
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => self.add_targets(&entry.path(), n_left),
                Ok(kind) if kind.is_symlink() => {
                    if let Ok(target) = entry.path().canonicalize() {
                        // The directory of a file, so that another version may take its place.
                        self.read.push(if target.is_dir() { target } else { directory_of(&target) });
                    }
                }
                _ => {}
            }
        }
    }

    /// Whether threads that are held to this plan can open all that another one names.
    ///
    /// # Errors
    /// The first path that they cannot.
    pub fn covers(&self, wanted: &Self) -> Result<(), PathBuf> {
        let real = |path: &PathBuf| path.canonicalize().unwrap_or_else(|_| path.clone());
        let is_below = |held: &[&Vec<PathBuf>], path: &PathBuf| {
            let path = real(path);
            held.iter().any(|held| held.iter().any(|held| path.starts_with(real(held))))
        };
        let lists: [(&Vec<PathBuf>, &[&Vec<PathBuf>]); 3] = [
            (&wanted.read, &[&self.read, &self.write, &self.exec]),
            (&wanted.write, &[&self.write]),
            (&wanted.exec, &[&self.exec]),
        ];
        for (wanted, held) in lists {
            // What is not there cannot be opened by anybody.
            if let Some(path) = wanted.iter().find(|path| path.exists() && !is_below(held, path)) {
                return Err(path.clone());
            }
        }
        Ok(())
    }

    fn add_store(&mut self, text: &str, config: &MountConfig, usage: Use) {
        let specs = config.sources.settings.resolve(text).unwrap_or_default();
        if specs.is_empty() {
            // Its options cannot be read, and it will not be opened; where it lies is all there is to know.
            for member in split_group(text) {
                if let (Ok(Location::Local(path)), Use::Read) = (Location::parse(member), usage) {
                    self.read.push(path);
                }
            }
        }
        for spec in specs {
            match (&spec.location, usage) {
                (Location::Local(path), Use::Write) => self.write.push(path.clone()),
                (location, _) => self.add_location(location, Some(&spec.options), config),
            }
        }
    }

    fn add_location(&mut self, location: &Location, options: Option<&StoreOptions>, config: &MountConfig) {
        if let Location::Local(path) = location {
            self.read.push(path.clone());
            if let Some(parent) = path.parent().filter(|parent| parent.components().count() > 2) {
                // So that a store that is made anew, or moved into its place, can be read.
                self.read.push(parent.to_owned());
            }
        }
        let Some(options) = options else { return };
        let (http, ssh) = (&options.http, &options.ssh);
        self.read.extend([&http.client_cert, &http.client_key, &http.ca_cert].into_iter().flatten().cloned());
        self.read.extend(options.s3.credentials_file.iter().chain(&options.gcs.credentials_file).cloned());
        // Tokens and the like of the machine's identity: what looks like a path may be one.
        self.read
            .extend(options.s3.more.iter().map(|(_, value)| PathBuf::from(value)).filter(|path| path.is_absolute()));
        self.read.extend(options.oci.docker_config.iter().cloned());
        match location {
            Location::Sftp(_) => {
                self.read.extend(ssh.identity_files.iter().chain(&ssh.known_hosts).chain(&ssh.agent_socket).cloned());
                self.read.extend(ssh.home.iter().map(|home| home.join(".ssh")));
            }
            Location::Ssh(_) => {
                self.exec.extend(PROGRAMS.iter().map(PathBuf::from));
                // Host keys are learnt, and connections shared, by files there.
                self.write.extend(ssh.home.iter().cloned().chain(home_of_user(config)).map(|home| home.join(".ssh")));
                if ssh.program != "ssh" {
                    // What a program of the user's own choice reads and starts cannot be known.
                    self.read.push("/".into());
                    self.exec.push("/".into());
                }
            }
            _ => {}
        }
    }
}

/// What a store is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Read,
    Write,
}

/// Where the user lives that the process is going to be: ssh(1) looks there, whatever the environment says.
fn home_of_user(config: &MountConfig) -> Option<PathBuf> {
    let user = match &config.service.setuid {
        None => User::from_uid(geteuid()),
        Some(text) => match text.parse() {
            Ok(uid) => User::from_uid(Uid::from_raw(uid)),
            Err(_) => User::from_name(text),
        },
    };
    user.ok().flatten().map(|user| user.dir)
}

fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// A plan that threads can be held to.
#[derive(Debug)]
pub struct Sandbox {
    ruleset: RulesetCreated,
    failed: AtomicBool,
}

impl Sandbox {
    /// Looks up the files of a plan, with the rights of the calling thread.
    ///
    /// # Errors
    /// Why this kernel cannot, in a few words.
    pub fn new(plan: &SandboxPlan) -> Result<Self, String> {
        let words = |error: &dyn std::error::Error| {
            format!("this kernel offers no Landlock, or one too old (Linux 5.19 is needed): {error}")
        };
        let ruleset = Ruleset::default()
            .set_compatibility(CompatLevel::HardRequirement)
            .handle_access(AccessFs::from_all(NEEDED))
            .map_err(|error| words(&error))?
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(WANTED))
            .and_then(Ruleset::create)
            .map_err(|error| words(&error))?;
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        let write = AccessFs::from_all(WANTED) & !BitFlags::from(AccessFs::Execute);
        let exec = read | AccessFs::Execute;
        let ruleset = ruleset
            .add_rules(path_beneath_rules(&plan.read, read))
            .and_then(|ruleset| ruleset.add_rules(path_beneath_rules(&plan.write, write)))
            .and_then(|ruleset| ruleset.add_rules(path_beneath_rules(&plan.exec, exec)))
            .map_err(|error| words(&error))?;
        Ok(Self { ruleset, failed: AtomicBool::new(false) })
    }

    /// Shuts the calling thread in, for good, with every thread and program that it starts. None of them gains rights by starting a
    /// program afterwards (`PR_SET_NO_NEW_PRIVS`).
    pub fn enter(&self) {
        let entered = self.ruleset.try_clone().map_err(|error| error.to_string()).and_then(|ruleset| {
            let status = ruleset.restrict_self().map_err(|error| error.to_string())?;
            match status.ruleset {
                RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced => Ok(()),
                RulesetStatus::NotEnforced => Err("not enforced".to_owned()),
            }
        });
        if let Err(why) = entered {
            self.failed.store(true, Ordering::SeqCst);
            tracing::error!("a thread could not be shut into the sandbox: {why}");
        }
    }

    /// Whether a thread could not be shut in.
    pub fn failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fs;
    use std::process::Command;

    /// What holds in a thread of its own that is held to a plan.
    fn inside<T: Send>(plan: &SandboxPlan, look: impl FnOnce() -> T + Send) -> T {
        let sandbox = Sandbox::new(plan).expect("this kernel has Landlock");
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                sandbox.enter();
                assert!(!sandbox.failed());
                look()
            });
            thread.join().unwrap()
        })
    }

    /// Kernels without Landlock are told apart from those where it is broken: it is the first thing that is asked of them.
    fn can() -> bool {
        let can = Sandbox::new(&SandboxPlan::default()).is_ok();
        let required = std::env::var_os("CAIFS_REQUIRE_PEERS").is_some_and(|value| value == "1");
        assert!(can || !required, "this kernel has no Landlock");
        if !can {
            eprintln!("skipped: this kernel has no Landlock");
        }
        can
    }

    fn is_denied<T>(result: std::io::Result<T>) -> bool {
        result.is_err_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied)
    }

    #[test]
    fn only_what_is_planned_can_be_opened() {
        if !can() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["read", "write", "write/deep", "else"] {
            fs::create_dir(path(name)).unwrap();
            fs::write(path(name).join("file"), name).unwrap();
        }
        let plan = SandboxPlan {
            read: vec![path("read"), path("missing")],
            write: vec![path("write"), "/dev/null".into()],
            exec: Vec::new(),
        };
        inside(&plan, || {
            assert_eq!(fs::read(path("read/file")).unwrap(), b"read");
            assert!(is_denied(fs::write(path("read/file"), "")));
            assert!(is_denied(fs::read(path("else/file"))));
            assert!(is_denied(fs::read_dir(path("else"))));
            assert!(is_denied(fs::read("/etc/passwd")));
            fs::write(path("write/new"), "new").unwrap();
            // As a cache puts a file in its place, and makes room.
            fs::rename(path("write/new"), path("write/deep/new")).unwrap();
            fs::remove_file(path("write/deep/new")).unwrap();
            fs::OpenOptions::new().write(true).truncate(true).open(path("write/file")).unwrap();
            fs::write("/dev/null", "x").unwrap();
            assert!(is_denied(Command::new("/bin/true").status()));
            let none: Option<&str> = None;
            let mounted = nix::mount::mount(none, &path("write"), Some("tmpfs"), nix::mount::MsFlags::empty(), none);
            assert_eq!(mounted, Err(nix::errno::Errno::EPERM));
        });
        assert_eq!(fs::read(path("else/file")).unwrap(), b"else", "other threads go on as they were");
    }

    #[test]
    fn a_plan_covers_what_lies_below_its_paths() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["a/b", "c"] {
            fs::create_dir_all(path(name)).unwrap();
        }
        std::os::unix::fs::symlink(path("c"), path("a/link")).unwrap();
        let plan = SandboxPlan { read: vec![path("a")], ..SandboxPlan::default() };
        let read = |name: &str| SandboxPlan { read: vec![path(name)], ..SandboxPlan::default() };
        let write = SandboxPlan { write: vec![path("a/b")], ..SandboxPlan::default() };
        assert_eq!(plan.covers(&read("a/b")), Ok(()));
        assert_eq!(plan.covers(&read("missing")), Ok(()));
        assert_eq!(plan.covers(&read("c")), Err(path("c")));
        assert_eq!(plan.covers(&read("a/link")), Err(path("a/link")), "what counts is where it leads");
        assert_eq!(plan.covers(&write), Err(path("a/b")));
        assert_eq!(write.covers(&read("a/b")), Ok(()));

        let mut of_directory = SandboxPlan::default();
        of_directory.add_mount(&FileLocation::Local(path("a")), &MountConfig::default());
        assert_eq!(of_directory.covers(&read("c")), Ok(()), "links that are there are followed");
    }

    #[test]
    fn what_a_link_of_the_system_leads_to_is_read() {
        if !can() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().canonicalize().unwrap().join(name);
        for name in ["etc", "run", "far", "else"] {
            fs::create_dir(path(name)).unwrap();
            fs::write(path(name).join("file"), name).unwrap();
        }
        std::os::unix::fs::symlink("../run/link", path("etc/resolv.conf")).unwrap();
        std::os::unix::fs::symlink(path("far/late"), path("run/link")).unwrap();
        let mut plan = SandboxPlan { read: vec![path("etc")], ..SandboxPlan::default() };
        plan.add_linked(&path("etc/resolv.conf"));
        plan.add_linked(&path("etc/file"));
        plan.add_linked(&path("etc/missing"));
        assert_eq!(plan.read, [path("etc"), path("run"), path("far")]);
        inside(&plan, || {
            // As what looks after it makes it anew.
            assert!(fs::read(path("etc/resolv.conf")).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound));
            assert!(is_denied(fs::read(path("else/file"))));
        });
        fs::write(path("far/late"), "nameserver").unwrap();
        assert_eq!(inside(&plan, || fs::read(path("etc/resolv.conf")).unwrap()), b"nameserver");
        let mut plan = SandboxPlan::default();
        std::os::unix::fs::symlink("/proc/version", path("etc/short")).unwrap();
        plan.add_linked(&path("etc/short"));
        assert_eq!(plan.read, [PathBuf::from("/proc/version")], "not all of /proc");
    }

    #[test]
    fn programs_run_where_they_are_planned() {
        if !can() {
            return;
        }
        let mut plan = SandboxPlan::system();
        plan.exec.extend(PROGRAMS.iter().map(PathBuf::from));
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        inside(&plan, || {
            assert!(Command::new("/bin/true").status().unwrap().success());
            let cat = Command::new("cat").arg(dir.path().join("file")).stderr(std::process::Stdio::null()).status();
            assert!(!cat.unwrap().success(), "and are held to the plan themselves");
        });
    }

    #[test]
    fn the_plan_of_a_mount_is_its_stores_and_cache() {
        let location = FileLocation::Local("/srv/idx/a.caibx".into());
        let mut config = MountConfig::default();
        let mut plan = SandboxPlan::default();
        plan.add_mount(&location, &config);
        assert_eq!(plan.read, [PathBuf::from("/srv/idx/default.castr"), "/srv/idx".into(), "/srv/idx".into()]);
        assert!(plan.write.is_empty() && plan.exec.is_empty());

        config.sources.stores = vec!["/srv/a|https://h/x".into(), "ssh://h/x".into()];
        config.sources.cache = Some("/var/cache/caifs".into());
        config.ahead.record = Some("/srv/profiles/a".into());
        let mut plan = SandboxPlan::default();
        plan.add_mount(&location, &config);
        assert_eq!(plan.read, [PathBuf::from("/srv/a"), "/srv/idx".into()]);
        let of_ssh = home_of_user(&config).map(|home| home.join(".ssh"));
        let others = plan.write.iter().filter(|path| Some(*path) != of_ssh.as_ref());
        assert_eq!(others.collect::<Vec<_>>(), [&PathBuf::from("/var/cache/caifs"), &"/srv/profiles".into()]);
        assert!(plan.exec.contains(&"/usr".into()) && !plan.exec.contains(&"/".into()));

        let mut plan = SandboxPlan::default();
        plan.add_mount(&FileLocation::parse("https://h/a.caibx".as_ref()).unwrap(), &MountConfig::default());
        assert!(plan.write.contains(&SPOOL_DIR.into()) && plan.exec.is_empty());
    }
}
