//! Bytes to types and back: index files and archives. No I/O, no clock, no threads; never panics on any input.

pub mod catar;
pub mod index;
