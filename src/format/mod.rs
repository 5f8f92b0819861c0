//! Bytes to types and back: index files, archives and the casync protocol. No I/O, no clock, no threads; never panics on any input.

pub mod catar;
pub mod index;
pub mod profile;
pub mod protocol;
