//! System calls that no safe crate wraps, behind safe functions: the only room with unsafe code.
//!
//! * [`MappedFile`]: a file in memory that stays readable when somebody truncates it.
//! * [`fork`]: split the process, refused when threads exist.
//! * [`catch_signals`]: signals as bytes of a stream; [`give_memory_back`]: what was freed, to the system.
//! * [`receive_fd`], [`read_at_nowait`]: a descriptor from a socket; a read that does not wait for the disk.
//! * [`attributes`]: what Linux knows of a file beyond stat(2), for making archives.
//!
//! Invariant: every function here is safe to call with any argument; what it needs, it checks.

pub mod attributes;
mod file;
mod mapped;
mod process;

pub use file::{read_at_nowait, receive_fd};
pub use mapped::MappedFile;
pub use process::{Forked, catch_signals, fork, give_memory_back};
