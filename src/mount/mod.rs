//! The mount as a service.
//!
//! * [`options`]: what was asked for.
//! * [`attach`]: the mountpoint checked, a dead mount cleaned away, the kernel told; [`Attached`] is the mount.
//! * [`table`]: what is mounted where. [`detach`]: unmounting, of our own mount only.
//! * `given`: serving a mount that somebody else has made. [`fstab`]: what is to be mounted at boot.
//! * [`daemon`]: into the background, and back to the caller with a yes or a reason.
//! * [`run`]: all of it in order, with signals.
//! * [`control`]: what happens, seen from outside; [`settings`] and [`reload`]: other settings meanwhile. [`remount`]: other flags of the
//!   kernel; [`abort`]: the end of a mount that hangs.
//!
//! Invariants: a mount that was made is unmounted when its [`Attached`] goes; nothing else is ever unmounted but dead mounts of
//! our own type; no password gets into the mount table.

pub mod abort;
pub mod attach;
pub mod control;
pub mod daemon;
pub mod detach;
mod error;
pub mod fstab;
mod fusermount;
mod given;
pub mod options;
pub mod reload;
pub mod remount;
pub mod run;
pub mod settings;
mod signals;
mod source;
pub mod table;

pub use attach::{Attached, Mounted};
pub use error::{BoxError, MountError};
pub use run::{MountRequest, Place, mount};
pub use source::shown_source;

/// The type that mount tables show.
pub const FS_TYPE: &str = "fuse.caifs";
