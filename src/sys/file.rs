//! Descriptors: one that comes through a socket, one that was there when the process began, and a read that gives up instead of waiting.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::cmsg_space;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// The most descriptors that one message is expected to carry; the kernel closes what does not fit.
const MAX_FDS_PER_MESSAGE: usize = 4;

/// Receives one message and the open file it carries (`SCM_RIGHTS`), closed on exec. `None` when the peer closed the socket
/// or sent a message without a file; further files in the message are closed.
///
/// # Errors
/// What recvmsg(2) answers.
pub fn receive_fd(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut byte = [0u8; 1];
    let mut iov = [IoSliceMut::new(&mut byte)];
    let mut control = cmsg_space!([std::os::fd::RawFd; MAX_FDS_PER_MESSAGE]);
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut received = None;
    for control_message in message.cmsgs()? {
        let ControlMessageOwned::ScmRights(fds) = control_message else { continue };
        for fd in fds {
            // SAFETY: the kernel has just made this descriptor for us and nobody else knows its number.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            received.get_or_insert(fd);
        }
    }
    Ok(received)
}

/// A copy of the open file with this number, which whoever started the process has left open for it. Neither goes to programs that
/// are started later.
///
/// # Errors
/// `EBADF` when no file of that number is open.
pub fn inherited_fd(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl(2) takes any number, and these commands touch no memory of ours.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 0) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows its number.
    let copy = unsafe { OwnedFd::from_raw_fd(copy) };
    // SAFETY: as above; nothing but an exec notices, to whoever the file may belong.
    let set = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(copy)
}

/// Reads into `buf` from byte `offset` if that needs no waiting for the disk. `Some(n)` bytes were read, fewer than asked
/// at the end of the file or where the page cache ends; `None` when the first byte is not in memory or the file system
/// cannot tell (then a thread that may wait has to read).
///
/// # Errors
/// What preadv2(2) answers, but for `EAGAIN`, `EINTR`, `EOPNOTSUPP` and `ENOSYS`.
pub fn read_at_nowait(fd: impl AsFd, buf: &mut [u8], offset: u64) -> io::Result<Option<usize>> {
    // A negative offset would mean "the current position" to preadv2.
    let offset = libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    // SAFETY: the one iovec lies on our stack and describes `buf`, which we hold exclusively during the call.
    let n = unsafe { libc::preadv2(fd.as_fd().as_raw_fd(), &raw const iov, 1, offset, libc::RWF_NOWAIT) };
    if let Ok(n) = usize::try_from(n) {
        return Ok(Some(n));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EINTR | libc::EOPNOTSUPP | libc::ENOSYS) => Ok(None),
        _ => Err(error),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};

    use nix::sys::socket::{ControlMessage, sendmsg};

    #[test]
    fn a_received_descriptor_is_the_one_sent_and_closed_on_exec() {
        let (here, there) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"hello").unwrap();
        file.rewind().unwrap();
        let fds = [file.as_raw_fd()];
        sendmsg::<()>(
            there.as_raw_fd(),
            &[io::IoSlice::new(b"x")],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::empty(),
            None,
        )
        .unwrap();
        let received = receive_fd(&here).unwrap().expect("a descriptor was sent");
        let flags = nix::fcntl::fcntl(&received, nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
        let mut text = String::new();
        std::fs::File::from(received).read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        drop(there);
        assert!(receive_fd(&here).unwrap().is_none(), "a closed socket carries no descriptor");
    }

    #[test]
    fn an_inherited_descriptor_is_copied_and_neither_is_passed_on() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"hello").unwrap();
        let passed_on = nix::unistd::dup(&file).unwrap();
        let copy = inherited_fd(passed_on.as_raw_fd()).unwrap();
        for fd in [passed_on.as_fd(), copy.as_fd()] {
            let flags = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFD).unwrap();
            assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
        }
        drop(passed_on);
        assert_eq!(std::fs::File::from(copy).metadata().unwrap().len(), 5);
        assert_eq!(inherited_fd(-1).unwrap_err().raw_os_error(), Some(libc::EBADF));
        assert_eq!(inherited_fd(RawFd::MAX).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }

    #[test]
    fn read_without_waiting_gives_cached_bytes_and_refuses_offsets_beyond_the_range() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let mut buf = [0u8; 4];
        // A file just written is in the page cache; a file system without RWF_NOWAIT may say `None`.
        if let Some(n) = read_at_nowait(&file, &mut buf, 3).unwrap() {
            assert_eq!(&buf[..n], &b"3456"[..n]);
            assert_eq!(read_at_nowait(&file, &mut buf, 10).unwrap(), Some(0), "the end of the file");
        }
        assert_eq!(read_at_nowait(&file, &mut buf, u64::MAX).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        let (reader, _writer) = std::io::pipe().unwrap();
        assert!(!matches!(read_at_nowait(&reader, &mut buf, 0), Ok(Some(_))), "an empty pipe has nothing to give");
    }
}
