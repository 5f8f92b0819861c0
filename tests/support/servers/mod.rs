//! How each server of the tests is set up, with all it needs in a directory of its own.

pub mod gcs;
pub mod nginx;
pub mod rclone;
pub mod sshd;
