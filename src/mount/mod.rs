//! The mount as a service: options, the mount itself, the daemon behind it, and its end.
//!
//! * [`options`] reads mount options as mount(8) passes them; one table names them all.
//! * [`table`] reads what is mounted where; [`attach`] mounts and unmounts, as root or through fusermount3.
//! * [`daemon`] splits off a background process that reports when it is ready; [`run()`] is the whole sequence.
//!
//! Invariants: nothing is unmounted but what we mounted; the caller is told of success only when the mount answers, and of
//! failure with the reason; no thread exists before the fork; passwords do not appear in the mount table.

pub mod attach;
pub mod daemon;
pub mod options;
pub mod run;
pub mod table;

pub use attach::{How, unmount};
pub use run::{MountRequest, run};

/// Why a mount or unmount failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MountError {
    /// Wrong arguments or options.
    #[error("{0}")]
    Usage(String),
    /// It could not be done.
    #[error("{0}")]
    Failed(String),
}

impl MountError {
    /// The exit code that mount(8) has for this: 1 for usage, 32 for a failed mount.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 1,
            Self::Failed(_) => 32,
        }
    }
}
