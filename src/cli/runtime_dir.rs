//! The directory of control sockets of this user.

use std::path::PathBuf;

use nix::unistd::geteuid;

use crate::mount::control::paths::without_session;

/// Where root's sockets lie.
const OF_ROOT: &str = "/run/caifs";

/// `CAIFS_RUNTIME_DIR`, or `/run/caifs` for root, or `$XDG_RUNTIME_DIR/caifs`, or `/tmp/caifs-UID`.
pub fn runtime_dir() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let uid = geteuid();
    if let Some(dir) = set("CAIFS_RUNTIME_DIR") {
        return dir;
    }
    if uid.is_root() {
        return OF_ROOT.into();
    }
    match set("XDG_RUNTIME_DIR") {
        Some(dir) => dir.join("caifs"),
        None => without_session(uid.as_raw()),
    }
}
