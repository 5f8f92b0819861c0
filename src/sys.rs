//! System calls that no safe crate wraps, behind safe functions: the only room with unsafe code.
//!
//! * [`MappedFile`]: a file in memory that stays readable when somebody truncates it.
//! * [`fork`]: split the process, refused when threads exist. [`watch_process`]: know when another one has ended.
//! * [`catch_signals`]: signals as bytes of a stream; [`give_memory_back`]: what was freed, to the system; [`limit_heaps`]
//!   bounds what is freed and kept; [`replace_in_arguments`] changes what others see of the arguments.
//! * [`receive_fd`], [`inherited_fd`], [`read_at_nowait`]: a descriptor from a socket, one left open by whoever started us; a read
//!   that does not wait for the disk.
//! * [`descriptors`]: those a program was started with, and one that comes to mean another file.
//! * [`terminal_size`], [`KeyMode`], [`read_password`]: a terminal and its keys; a line from it that it does not show.
//! * [`attributes`]: what Linux knows of a file beyond stat(2), for making archives.
//!
//! Invariant: every function here is safe to call with any argument; what it needs, it checks.

pub mod attributes;
pub mod descriptors;
mod file;
mod mapped;
mod password;
mod process;
mod terminal;

pub use file::{inherited_fd, read_at_nowait, receive_fd};
pub use mapped::MappedFile;
pub use password::read_password;
pub use process::{Forked, catch_signals, fork, give_memory_back, limit_heaps, replace_in_arguments, watch_process};
pub use terminal::{KeyMode, terminal_size};
