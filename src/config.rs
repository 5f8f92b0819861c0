//! Resolved settings: what was meant, after everything that was typed has been read. Knows neither clap nor the environment.

use std::time::Duration;

/// The memory budget when none is given, in bytes.
pub const DEFAULT_MEMORY_BYTES: u64 = 256 << 20;

/// The smallest memory budget a mount works with, in bytes: a few of the largest usual chunks and replies.
pub const MIN_MEMORY_BYTES: u64 = 16 << 20;

/// How long a read may take before it is answered with EIO, when nothing else is said.
pub const DEFAULT_IO_TIMEOUT: Duration = Duration::from_secs(30);

/// How a mount behaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountConfig {
    /// Store locations in the order they are asked; empty for the casync rule (`default.castr` beside the index).
    pub stores: Vec<String>,
    /// One budget for the memory tier, read-ahead and buffers, in bytes.
    pub memory_bytes: u64,
    /// Every request of the kernel is answered by then.
    pub io_timeout: Duration,
    /// Owner shown for everything, instead of the stored one.
    pub uid: Option<u32>,
    /// Group shown for everything, instead of the stored one.
    pub gid: Option<u32>,
    /// Whether other users may use the mount; `None` means: yes when mounted by root.
    pub allow_other: Option<bool>,
}

impl Default for MountConfig {
    fn default() -> Self {
        Self {
            stores: Vec::new(),
            memory_bytes: DEFAULT_MEMORY_BYTES,
            io_timeout: DEFAULT_IO_TIMEOUT,
            uid: None,
            gid: None,
            allow_other: None,
        }
    }
}
