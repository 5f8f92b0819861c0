//! What threads that read what others wrote may still open: a Landlock domain (landlock(7)), for each of them on its own.
//!
//! * [`SandboxPlan`] lists the paths, and knows what a mount of some settings needs.
//! * [`Sandbox`] is the plan with its files looked up; [`Sandbox::enter`] shuts the calling thread in, and all that it starts.
//!
//! A domain forbids mounting and unmounting, so the main thread and the one that waits for signals stay outside. Threads share their
//! memory, so this is a wall against opening what was not meant, not against code that took over a thread.
//!
//! Invariant: a thread that cannot be shut in does not go on unnoticed: [`Sandbox::failed`] tells.

mod plan;

use std::sync::atomic::{AtomicBool, Ordering};

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr,
    RulesetStatus, path_beneath_rules,
};
pub use plan::SandboxPlan;

/// The first that lets files be moved between directories (Linux 5.19), as a cache does.
const NEEDED: ABI = ABI::V2;

/// What is handled where the kernel can: truncation and ioctls of devices as well.
const WANTED: ABI = ABI::V5;

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
    fn programs_run_where_they_are_planned() {
        if !can() {
            return;
        }
        let mut plan = SandboxPlan::system();
        plan.add_programs();
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        inside(&plan, || {
            assert!(Command::new("/bin/true").status().unwrap().success());
            let cat = Command::new("cat").arg(dir.path().join("file")).stderr(std::process::Stdio::null()).status();
            assert!(!cat.unwrap().success(), "and are held to the plan themselves");
        });
    }
}
