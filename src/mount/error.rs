//! Why there is no mount, in a line for people, with the exit code of mount(8).

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::options::OptionError;

/// An error of whoever opens a volume; its sources are printed behind it.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Exit codes of mount(8), section "Exit status".
const USAGE: u8 = 1;
const SYSTEM: u8 = 2;
const INTERRUPTED: u8 = 8;
const MOUNT_FAILED: u8 = 32;

/// Why a mount or unmount failed.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The options make no sense.
    #[error(transparent)]
    Options(#[from] OptionError),
    /// The volume cannot be opened.
    #[error("{}", chain(.0.as_ref()))]
    Open(BoxError),
    /// The mountpoint cannot be used.
    #[error("mountpoint {}: {problem}", path.display())]
    Mountpoint {
        /// The mountpoint.
        path: PathBuf,
        /// What is wrong, and what helps.
        problem: String,
    },
    /// The source cannot be shown in a mount table.
    #[error("the source contains a NUL byte")]
    Source,
    /// This is already mounted there.
    #[error("already mounted on {}", .0.display())]
    AlreadyMounted(PathBuf),
    /// The kernel offers no FUSE.
    #[error(
        "/dev/fuse: {0} (load the module with `modprobe fuse`; a container needs the device, as with --device /dev/fuse)"
    )]
    NoFuse(io::Error),
    /// The kernel refused.
    #[error("mount(2): {0}")]
    Kernel(io::Error),
    /// fusermount3 refused, or is not there.
    #[error("{0}")]
    Fusermount(String),
    /// The table of mounts cannot be read.
    #[error("/proc/self/mountinfo: {0}")]
    Table(io::Error),
    /// It took too long.
    #[error("not ready within {} s", .0.as_secs_f32())]
    NotReady(Duration),
    /// The kernel and we did not come together after mounting.
    #[error("FUSE session: {0}")]
    Serve(io::Error),
    /// A system call that always works did not.
    #[error("{what}: {error}")]
    System {
        /// What was wanted.
        what: &'static str,
        /// The answer.
        error: io::Error,
    },
    /// What is mounted there is not what was to be unmounted.
    #[error("{} {problem}", path.display())]
    NotOurs {
        /// The mountpoint.
        path: PathBuf,
        /// What is there instead.
        problem: String,
    },
    /// It cannot be unmounted.
    #[error("cannot unmount {}: {problem}", path.display())]
    Unmount {
        /// The mountpoint.
        path: PathBuf,
        /// Whether it is in use rather than broken.
        busy: bool,
        /// Why.
        problem: String,
    },
    /// The background process ended.
    #[error("{0}")]
    Background(String),
    /// What the background process said.
    #[error("{reason}")]
    Reported {
        /// Its exit code.
        exit_code: u8,
        /// In one line.
        reason: String,
    },
    /// The caller was told to end while it waited for the mount.
    #[error("interrupted")]
    Interrupted,
    /// The process that asked for the mount was gone when it was ready.
    #[error("nobody waits for the mount any more")]
    Abandoned,
    /// The log that was asked for cannot be had.
    #[error("log {what}: {why}")]
    Log {
        /// What was asked for.
        what: String,
        /// Why not.
        why: String,
    },
    /// The process cannot become the user that was asked for, or that user cannot do what it must.
    #[error("setuid: {0}")]
    User(String),
    /// A sandbox was demanded and cannot be had.
    #[error("sandbox: {0} (--sandbox=no goes without)")]
    Sandbox(String),
    /// A mount of another process cannot be gone on with.
    #[error("mount on {}: {why}", mountpoint.display())]
    Takeover {
        /// Where it is.
        mountpoint: PathBuf,
        /// Why not.
        why: &'static str,
    },
    /// With what was to be mounted where.
    #[error("cannot mount {source_name} on {}: {reason}", mountpoint.display())]
    Failed {
        /// As shown in mount tables.
        source_name: String,
        /// As given.
        mountpoint: PathBuf,
        /// Why, in one line.
        reason: String,
        /// For the caller of the program.
        exit_code: u8,
    },
}

impl MountError {
    /// The exit code that mount(8) documents for this.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Options(_) => USAGE,
            Self::System { .. } => SYSTEM,
            Self::Interrupted => INTERRUPTED,
            Self::Failed { exit_code, .. } | Self::Reported { exit_code, .. } => *exit_code,
            Self::Open(_)
            | Self::Mountpoint { .. }
            | Self::Source
            | Self::AlreadyMounted(_)
            | Self::NoFuse(_)
            | Self::Kernel(_)
            | Self::Fusermount(_)
            | Self::Table(_)
            | Self::NotReady(_)
            | Self::Serve(_)
            | Self::NotOurs { .. }
            | Self::Unmount { .. }
            | Self::Background(_)
            | Self::Log { .. }
            | Self::User(_)
            | Self::Sandbox(_)
            | Self::Takeover { .. }
            | Self::Abandoned => MOUNT_FAILED,
        }
    }

    pub(super) fn mountpoint(path: impl Into<PathBuf>, problem: impl Into<String>) -> Self {
        Self::Mountpoint { path: path.into(), problem: problem.into() }
    }

    pub(super) fn system(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::System { what, error }
    }

    pub(super) fn errno(what: &'static str) -> impl FnOnce(nix::errno::Errno) -> Self {
        move |errno| Self::System { what, error: errno.into() }
    }
}

/// The error and what is behind it, in one line.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let mut line = String::new();
    for cause in causes {
        let text = cause.to_string();
        // Some errors repeat their source in their own text.
        if line.ends_with(&text) {
            continue;
        }
        if !line.is_empty() {
            line.push_str(": ");
        }
        line.push_str(&text);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_of_an_error_are_in_its_line_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("index x.caibx")]
        struct Outer(#[source] io::Error);
        #[derive(Debug, thiserror::Error)]
        #[error("outer: {0}")]
        struct Repeating(#[source] io::Error);

        let line = MountError::Open(Box::new(Outer(io::Error::other("truncated")))).to_string();
        assert_eq!(line, "index x.caibx: truncated");
        let line = MountError::Open(Box::new(Repeating(io::Error::other("truncated")))).to_string();
        assert_eq!(line, "outer: truncated");
    }

    #[test]
    fn exit_codes_are_those_of_mount() {
        assert_eq!(MountError::Options(OptionError::Reserved { name: "loop" }).exit_code(), 1);
        assert_eq!(MountError::system("fork")(io::Error::other("x")).exit_code(), 2);
        assert_eq!(MountError::Interrupted.exit_code(), 8);
        assert_eq!(MountError::Source.exit_code(), 32);
    }
}
