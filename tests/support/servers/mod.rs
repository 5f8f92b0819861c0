//! Each kind of server, as the tests start it.

pub mod gcs;
pub mod rclone;
