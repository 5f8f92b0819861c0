//! The mount as a service.
//!
//! * [`options`]: what was asked for.
//! * [`attach`]: the mountpoint checked, a dead mount cleaned away, the kernel told; [`Attached`] is the mount.
//! * [`table`]: what is mounted where. [`detach`]: unmounting, of our own mount only.
//! * `given`: serving a mount that somebody else has made. [`fstab`]: what is to be mounted at boot.
//! * [`daemon`]: into the background, and back to the caller with a yes or a reason.
//! * [`service`]: what surrounds a mount. [`log`]: where its lines go. [`notify`]: what the service manager hears.
//! * [`privileges`] and [`sandbox`]: who the process is, and what its threads may open.
//! * `takeover`: a mount that outlives its process.
//! * [`run`]: all of it in order, with signals.
//! * [`control`]: what happens, seen from outside; [`settings`] and [`reload`]: other settings meanwhile. [`remount`]: other flags of the
//!   kernel; [`abort`]: the end of a mount that hangs.
//!
//! Invariants: a mount that was made is unmounted when its [`Attached`] goes; nothing else is ever unmounted but dead mounts of
//! our own type; no password gets into the mount table; what came from elsewhere is read by threads that cannot mount.

pub mod abort;
pub mod attach;
pub mod control;
pub mod daemon;
pub mod detach;
mod error;
pub mod fstab;
mod fusermount;
mod given;
pub mod log;
pub mod notify;
pub mod options;
pub mod privileges;
pub mod reload;
pub mod remount;
pub mod run;
pub mod sandbox;
pub mod service;
pub mod settings;
mod signals;
mod source;
pub mod table;
mod takeover;

pub use attach::{Attached, Mounted};
pub use error::{BoxError, MountError};
pub use run::{MountRequest, Place, mount};
pub use service::Service;
pub use source::shown_source;

/// The type that mount tables show.
pub const FS_TYPE: &str = "fuse.caifs";
