//! `rclone serve s3`: an S3 server over a directory, each directory in it a bucket. It checks signatures and knows path lookup only.

use std::path::Path;

use crate::support::peers::peer;
use crate::support::server::{Server, free_port};

/// The access key that [`signed`] takes.
pub const ACCESS_KEY: &str = "caifs-key";

/// The secret that goes with it.
pub const SECRET_KEY: &str = "caifs-secret";

/// A server that wants signed requests; `None` when there is no rclone.
pub fn signed(dir: &Path) -> Option<Server> {
    start(dir, &["--auth-key", &format!("{ACCESS_KEY},{SECRET_KEY}")])
}

/// A server that takes unsigned requests; `None` when there is no rclone.
pub fn public(dir: &Path) -> Option<Server> {
    start(dir, &[])
}

fn start(dir: &Path, more: &[&str]) -> Option<Server> {
    let port = free_port();
    let mut command = peer("rclone")?.command();
    // Nothing is read from the user's own settings. It remembers directories it has seen: files are put there before it is asked.
    command.args(["serve", "s3", "--config", "", "--log-level", "CRITICAL"]);
    command.args(["--addr", &format!("127.0.0.1:{port}")]).args(more).arg(dir);
    Some(Server::start(&mut command, port))
}
