//! Bytes to types and back: index files, archives, signatures and the casync protocol. No I/O, no clock, no threads; never panics on any input.

pub mod catar;
pub mod ends;
pub mod index;
pub mod minisign;
pub mod profile;
pub mod protocol;
pub mod table;
