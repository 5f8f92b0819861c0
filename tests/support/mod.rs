//! What the integration tests and the benchmark stand on.
//!
//! * [`run`]: running a program with captured output and a time limit; the `caifs` command itself.
//! * [`peers`]: the other programs that tests compare with, and what happens when one is missing.
//! * [`server`]: servers on loopback, ended by their pid; [`servers`]: how each of them is set up.
//! * [`proxy`]: a bad network before a server; [`http`] is what it reads.
//! * [`scripted`]: a web server that answers by script.
//! * [`certificates`]: a CA and what it signed.
//! * [`scratch`]: directories that vanish, whatever was put into them.
//! * [`mounted`]: mounts that are undone and servers that are ended, also when a test panics.
//! * [`corner`]: a directory tree with everything that is hard to keep: ACLs, capabilities, devices, odd names.
//! * [`generated`]: an archive of as many files as one wants, made without them.
//! * [`blob`]: deterministic noise.
//! * [`listing`]: a tree as a table, to compare a mount with its source.
//!
//! Invariant: nothing outlives the value that stands for it: no mount, no process, no directory.
#![allow(dead_code, reason = "each user of this module needs another part of it")]
#![allow(unused_imports, reason = "the benchmark is built as a test, but without a test runner and so without tests")]

pub mod blob;
pub mod certificates;
pub mod corner;
pub mod generated;
pub mod http;
pub mod listing;
pub mod mounted;
pub mod peers;
pub mod proxy;
pub mod run;
pub mod scratch;
pub mod scripted;
pub mod server;
pub mod servers;

/// Whether this process may do what only root may (devices, capabilities, other owners).
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}
