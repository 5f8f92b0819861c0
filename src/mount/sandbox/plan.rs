//! What threads in a sandbox may open: the lists of it, and what a mount of some settings adds to them.

use std::path::{Path, PathBuf};

use nix::unistd::{Uid, User, geteuid};

use crate::config::MountConfig;
use crate::store::StoreOptions;
use crate::store::location::{FileLocation, Location, split_group};

/// What everybody may read: users, the time, programs' libraries, what the process is.
const SYSTEM_READ: &[&str] = &[
    "/etc/group",
    "/etc/hosts",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/nsswitch.conf",
    "/etc/passwd",
    "/etc/services",
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
    "/nix/store",
];

/// What may be read by who asks over a network: how names are looked up, certificates, settings of ssh(1). All of `/etc`, since its files are
/// replaced while the system runs (by whoever edits them, and by what learns of another network or user), and a rule for a file is for
/// the one that was there; the secrets in it are root's, so that `setuid` keeps them. Of the links that `/etc/resolv.conf` may be, the
/// places in `/run`.
const NETWORK_READ: &[&str] =
    &["/etc", "/run/systemd/resolve", "/run/resolvconf", "/run/NetworkManager", "/run/nscd", "/var/lib/sss/mc"];

/// What of it is often a link to elsewhere: where names are looked up, and certificates.
const NETWORK_LINKED: &[&str] = &[
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

/// Where a directory holds what the system makes and replaces, and nobody's own files.
const OF_SYSTEM: &[&str] = &["/etc", "/nix", "/run", "/usr", "/var/run"];

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
        Self { read: paths(SYSTEM_READ), write: paths(SYSTEM_WRITE), exec: Vec::new() }
    }

    /// What who asks over a network needs.
    fn add_network(&mut self) {
        self.read.extend(NETWORK_READ.iter().map(PathBuf::from));
        for path in NETWORK_LINKED {
            self.add_linked(Path::new(path), OF_SYSTEM);
        }
    }

    /// What programs need that are started.
    pub(super) fn add_programs(&mut self) {
        self.exec.extend(PROGRAMS.iter().map(PathBuf::from));
    }

    /// All of another plan as well.
    pub fn add(&mut self, other: &Self) {
        self.read.extend_from_slice(&other.read);
        self.write.extend_from_slice(&other.write);
        self.exec.extend_from_slice(&other.exec);
    }

    /// Where a link leads, and those that it leads to: a directory, or the directory of a file if it is one of `of_system` and lies deeper than
    /// these, since a file there is made anew when it changes. Of one that lies elsewhere, beside what may be anybody's, the file only.
    /// Nothing for what is no link.
    fn add_linked(&mut self, path: &Path, of_system: &[&str]) {
        let mut path = path.to_owned();
        for _ in 0..MAX_LINKS {
            let Ok(target) = std::fs::read_link(&path) else { return };
            path = directory_of(&path).join(target);
            if path.is_dir() {
                self.read.push(path.clone());
                continue;
            }
            // What it leads to may come later than the mount, its directory hardly.
            let Ok(dir) = directory_of(&path).canonicalize() else { return };
            let is_of_system = of_system.iter().any(|system| dir.starts_with(system) && dir != Path::new(system));
            self.read.push(if is_of_system { dir } else { path.clone() });
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
        let is_remote =
            |profile: &str| matches!(FileLocation::parse(profile.as_ref()), Ok(FileLocation::Remote { .. }));
        if ahead.profile.as_deref().is_some_and(is_remote) {
            self.add_network();
        }
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
        match location {
            Location::Local(path) => {
                self.read.push(path.clone());
                if let Some(parent) = path.parent().filter(|parent| parent.components().count() > 2) {
                    // So that a store that is made anew, or moved into its place, can be read.
                    self.read.push(parent.to_owned());
                }
            }
            _ => self.add_network(),
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
                self.add_programs();
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fs;

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
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().canonicalize().unwrap().join(name);
        for name in ["etc", "run", "far", "far/deep", "home"] {
            fs::create_dir(path(name)).unwrap();
            fs::write(path(name).join("file"), name).unwrap();
        }
        std::os::unix::fs::symlink("../run/link", path("etc/resolv.conf")).unwrap();
        std::os::unix::fs::symlink(path("far/deep/late"), path("run/link")).unwrap();
        std::os::unix::fs::symlink(path("home"), path("etc/certs")).unwrap();
        std::os::unix::fs::symlink(path("home/file"), path("etc/hosts")).unwrap();
        let (run, far) = (path("run"), path("far/deep"));
        let of_system = [run.to_str().unwrap(), far.parent().unwrap().to_str().unwrap()];
        let led_to = |name: &str| {
            let mut plan = SandboxPlan::default();
            plan.add_linked(&path(name), &of_system);
            plan.read
        };
        assert_eq!(led_to("etc/resolv.conf"), [path("etc/../run/link"), path("far/deep")], "not all of /run");
        assert_eq!(led_to("etc/certs"), [path("home")], "and not what lies beside it");
        assert_eq!(led_to("etc/hosts"), [path("home/file")], "nor what is somebody's");
        assert!(led_to("etc/file").is_empty() && led_to("etc/missing").is_empty());
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
        assert!(plan.read.starts_with(&["/srv/a".into(), "/etc".into()]) && plan.read.ends_with(&["/srv/idx".into()]));
        let of_ssh = home_of_user(&config).map(|home| home.join(".ssh"));
        let others = plan.write.iter().filter(|path| Some(*path) != of_ssh.as_ref());
        assert_eq!(others.collect::<Vec<_>>(), [&PathBuf::from("/var/cache/caifs"), &"/srv/profiles".into()]);
        assert!(plan.exec.contains(&"/usr".into()) && !plan.exec.contains(&"/".into()));

        let mut plan = SandboxPlan::default();
        plan.add_mount(&FileLocation::parse("https://h/a.caibx".as_ref()).unwrap(), &MountConfig::default());
        assert!(plan.write.contains(&SPOOL_DIR.into()) && plan.exec.is_empty());
    }
}
