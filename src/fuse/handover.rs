//! One connection to the kernel, served by one process after another.
//!
//! The kernel sends INIT once in the life of a connection, and fuser begins with it. So fuser is given one end of a socket pair instead of
//! the device; it finds INIT there and answers into it, and then the device takes the place of the socket under the same number. At
//! the first time the real INIT goes through the pair and so does its answer; later a copy of that INIT does, with the flags
//! that were agreed upon, and the answer is thrown away.
//!
//! What the process before had read and not answered is asked for again (`FUSE_NOTIFY_RESEND`, Linux 6.9); the kernel marks such
//! a request with the highest bit of its number, and fuser hands the number back as it came.
//!
//! Layouts: `fuse_in_header` of 40 bytes and `fuse_init_in`, `fuse_out_header` of 16 and `fuse_init_out`, in linux/fuse.h.
//!
//! Invariant: only a connection whose kernel sends requests again is handed over: elsewhere their askers would wait for ever.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::unistd::{read, write};

use super::gate::Gate;
use crate::sys::descriptors::replace;

/// The smallest buffer that the kernel fills with a request (`FUSE_MIN_READ_BUFFER`).
const READ_BUFFER_BYTES: usize = 8192;

/// Bytes of a request's header; those of INIT follow.
const IN_HEADER_BYTES: usize = 40;

/// Bytes of an answer's header; those of INIT's answer follow.
const OUT_HEADER_BYTES: usize = 16;

/// Where things stand in INIT, from the start of the request: operation, versions, flags.
const IN_OPCODE: usize = 4;
const IN_MAJOR: usize = IN_HEADER_BYTES;
const IN_MAX_READAHEAD: usize = IN_HEADER_BYTES + 8;
const IN_FLAGS: usize = IN_HEADER_BYTES + 12;
const IN_FLAGS2: usize = IN_HEADER_BYTES + 16;

/// The same in its answer.
const OUT_ERROR: usize = 4;
const OUT_MAX_READAHEAD: usize = OUT_HEADER_BYTES + 8;
const OUT_FLAGS: usize = OUT_HEADER_BYTES + 12;
const OUT_FLAGS2: usize = OUT_HEADER_BYTES + 32;

const FUSE_INIT: u32 = 26;

/// The one major version there has been since 2005.
const FUSE_KERNEL_VERSION: u32 = 7;

/// `FUSE_HAS_RESEND` (bit 39 of the flags), offered by kernels that send requests again.
const HAS_RESEND: u32 = 1 << (39 - 32);

/// `FUSE_INIT_EXT`: the flags have a second half.
const INIT_EXT: u32 = 1 << 30;

/// `FUSE_NOTIFY_RESEND`.
const NOTIFY_RESEND: u32 = 7;

/// How a session begins, and how it can be left to another process.
#[derive(Debug, Default)]
pub struct Handover {
    beginning: Beginning,
    agreed: OnceLock<Vec<u8>>,
    gate: Arc<Gate>,
}

#[derive(Debug, Default)]
enum Beginning {
    /// With the kernel's INIT, for this process only.
    #[default]
    Alone,
    /// With the kernel's INIT, of which a copy is kept.
    First,
    /// With a copy of an INIT that another process has answered.
    Later(Vec<u8>),
}

impl Handover {
    /// The first session of a connection that others may take over.
    pub fn first() -> Self {
        Self { beginning: Beginning::First, ..Self::default() }
    }

    /// A session that goes on with a connection; `init` is what [`Handover::agreed`] gave.
    pub fn later(init: Vec<u8>) -> Self {
        Self { beginning: Beginning::Later(init), ..Self::default() }
    }

    /// What a process needs that takes the connection over. `None` when nobody can, because the kernel is too old for it.
    pub fn agreed(&self) -> Option<&[u8]> {
        self.agreed.get().map(Vec::as_slice)
    }

    /// Where requests are held back before the process ends.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Whether each thread may take requests from a descriptor of its own. Not where another process may go on: what was read from a
    /// descriptor fails when that one is closed, and only one is kept.
    pub(super) fn may_clone(&self) -> bool {
        matches!(self.beginning, Beginning::Alone)
    }

    /// Begins a session with `from_fd` over the device of a connection.
    pub(super) fn begin<S: AsFd>(
        &self,
        device: OwnedFd,
        from_fd: impl FnOnce(OwnedFd) -> io::Result<S>,
    ) -> io::Result<S> {
        let init = match &self.beginning {
            Beginning::Alone => return from_fd(device),
            Beginning::First => read_init(&device)?,
            Beginning::Later(init) => init.clone(),
        };
        check_init(&init)?;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(io::Error::from)?;
        send(ours.as_raw_fd(), &init, MsgFlags::MSG_NOSIGNAL)?;
        let session = from_fd(theirs)?;
        let mut answer = vec![0; READ_BUFFER_BYTES];
        // The answer is there already; without one this is no place to wait.
        let n_bytes = recv(ours.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
        answer.truncate(n_bytes);
        if matches!(self.beginning, Beginning::First) {
            write(&device, &answer)?;
        }
        replace(session.as_fd(), device.as_fd())?;
        match &self.beginning {
            Beginning::Later(_) => resend(&device)?,
            Beginning::First | Beginning::Alone => {}
        }
        if let Some(agreed) = agreed(init, &answer) {
            let _ = self.agreed.set(agreed);
        }
        Ok(session)
    }
}

fn read_init(device: &OwnedFd) -> io::Result<Vec<u8>> {
    let mut request = vec![0; READ_BUFFER_BYTES];
    loop {
        match read(device, &mut request) {
            Ok(n_bytes) => {
                request.truncate(n_bytes);
                return Ok(request);
            }
            Err(Errno::EINTR | Errno::EAGAIN | Errno::ENOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn check_init(init: &[u8]) -> io::Result<()> {
    let unfit =
        |why: &str| Err(io::Error::new(io::ErrorKind::InvalidData, format!("the kernel's first request {why}")));
    match (word(init, IN_OPCODE), word(init, IN_MAJOR), word(init, IN_FLAGS)) {
        (Some(FUSE_INIT), Some(FUSE_KERNEL_VERSION), Some(_)) => Ok(()),
        (Some(FUSE_INIT), Some(major), Some(_)) => unfit(&format!("is of version {major}")),
        _ => unfit("is not INIT"),
    }
}

/// INIT as a later process shall find it: with nothing in it that was not agreed upon. `None` when the kernel cannot send again.
fn agreed(mut init: Vec<u8>, answer: &[u8]) -> Option<Vec<u8>> {
    let flags2 = word(&init, IN_FLAGS2)?;
    if word(&init, IN_FLAGS)? & INIT_EXT == 0 || flags2 & HAS_RESEND == 0 || word(answer, OUT_ERROR)? != 0 {
        return None;
    }
    let flags = word(&init, IN_FLAGS)? & (word(answer, OUT_FLAGS)? | INIT_EXT);
    set_word(&mut init, IN_FLAGS, flags);
    set_word(&mut init, IN_FLAGS2, flags2 & (word(answer, OUT_FLAGS2)? | HAS_RESEND));
    set_word(&mut init, IN_MAX_READAHEAD, word(answer, OUT_MAX_READAHEAD)?);
    Some(init)
}

/// Asks the kernel to queue again what was read and not answered.
fn resend(device: &OwnedFd) -> io::Result<()> {
    let mut notice = Vec::with_capacity(OUT_HEADER_BYTES);
    notice.extend_from_slice(&(OUT_HEADER_BYTES as u32).to_ne_bytes());
    notice.extend_from_slice(&NOTIFY_RESEND.to_ne_bytes());
    // No number: it is the answer to nothing.
    notice.extend_from_slice(&0u64.to_ne_bytes());
    let n_bytes = nix::sys::uio::writev(device, &[IoSlice::new(&notice)])?;
    debug_assert_eq!(n_bytes, notice.len());
    Ok(())
}

fn word(bytes: &[u8], start: usize) -> Option<u32> {
    let word = bytes.get(start..start.checked_add(4)?)?;
    word.try_into().ok().map(u32::from_ne_bytes)
}

fn set_word(bytes: &mut [u8], start: usize, word: u32) {
    if let Some(place) = bytes.get_mut(start..start + 4) {
        place.copy_from_slice(&word.to_ne_bytes());
    }
}

/// How many threads take requests from the kernel now: a look at this process's threads by their names, which fuser gives.
pub fn n_session_threads() -> usize {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return 0 };
    let names = tasks.flatten().filter_map(|task| std::fs::read(task.path().join("comm")).ok());
    names.filter(|name| name.starts_with(b"fuser-")).count()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn init(flags: u32, flags2: u32) -> Vec<u8> {
        let mut init = vec![0; IN_HEADER_BYTES + 64];
        set_word(&mut init, IN_OPCODE, FUSE_INIT);
        set_word(&mut init, IN_MAJOR, FUSE_KERNEL_VERSION);
        set_word(&mut init, IN_MAX_READAHEAD, 131_072);
        set_word(&mut init, IN_FLAGS, flags);
        set_word(&mut init, IN_FLAGS2, flags2);
        init
    }

    fn answer(flags: u32, flags2: u32) -> Vec<u8> {
        let mut answer = vec![0; OUT_HEADER_BYTES + 64];
        set_word(&mut answer, OUT_FLAGS, flags);
        set_word(&mut answer, OUT_FLAGS2, flags2);
        set_word(&mut answer, OUT_MAX_READAHEAD, 4096);
        answer
    }

    #[test]
    fn a_later_process_is_offered_what_was_agreed_upon() {
        let kept = agreed(init(INIT_EXT | 0b111, HAS_RESEND | 0b11), &answer(INIT_EXT | 0b101, 0b10)).unwrap();
        assert_eq!(word(&kept, IN_FLAGS), Some(INIT_EXT | 0b101));
        assert_eq!(word(&kept, IN_FLAGS2), Some(HAS_RESEND | 0b10));
        assert_eq!(word(&kept, IN_MAX_READAHEAD), Some(4096));
        // Agreed upon once more, nothing changes.
        assert_eq!(agreed(kept.clone(), &answer(INIT_EXT | 0b101, 0b10)), Some(kept));
    }

    #[test]
    fn a_kernel_that_cannot_send_again_is_left_to_one_process() {
        assert_eq!(agreed(init(INIT_EXT, 0b11), &answer(INIT_EXT, 0)), None);
        assert_eq!(agreed(init(0, HAS_RESEND), &answer(0, 0)), None, "without the mark the second half is not flags");
        assert_eq!(agreed(vec![0; 8], &answer(0, 0)), None);
        let mut refused = answer(INIT_EXT, 0);
        set_word(&mut refused, OUT_ERROR, 5);
        assert_eq!(agreed(init(INIT_EXT, HAS_RESEND), &refused), None);
    }

    #[test]
    fn what_is_not_init_is_refused() {
        assert!(check_init(&init(0, 0)).is_ok());
        assert!(check_init(&[]).is_err() && check_init(&[0; 64]).is_err());
        let mut other = init(0, 0);
        set_word(&mut other, IN_MAJOR, 8);
        assert_eq!(check_init(&other).unwrap_err().to_string(), "the kernel's first request is of version 8");
    }
}
