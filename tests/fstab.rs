//! The mount helper as the real mount(8), mount.fuse3, findmnt, umount and an automounter use it, and what is installed for them.
//!
//! * [`world`]: a private place for each test, with its own mounts, processes, fstab and helpers.
//! * [`lines`]: fstab lines. [`calls`]: how the helper is called. [`users`]: as an ordinary user, by mount.fuse3, in a namespace.
//! * [`automount`]: an automounter that waits. [`installed`]: install.sh, systemd's units, the examples.
//! * [`systemd`]: systemd as the first process of a namespace.

mod automount;
mod calls;
mod installed;
mod lines;
mod systemd;
mod users;
mod world;
