//! caifs mounts casync and desync artefacts lazily and read-only over FUSE, and makes them.
//!
//! (The code map is written when the rooms stand.)

pub mod blob;
pub mod cache;
pub mod chunk;
#[doc(hidden)]
pub mod cli;
pub mod config;
pub mod digest;
pub mod format;
pub mod fuse;
pub mod mount;
pub mod pack;
pub mod report;
pub mod store;
#[allow(unsafe_code, reason = "the one room for system calls that no safe crate wraps")]
pub mod sys;
pub mod tree;
pub mod volume;
