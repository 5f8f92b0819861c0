//! Standard input and output as the streams of a protocol, whether they block or not.
//!
//! casync opens the pipes of a helper non-blocking, and the flag belongs to the pipe and not to the process: taking it away would take it
//! from casync, too. So whoever is told "not now" waits for the descriptor with poll(2).

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Reads some bytes of standard input; 0 at its end.
pub(super) fn read(buffer: &mut [u8]) -> io::Result<usize> {
    let stdin = io::stdin();
    loop {
        match nix::unistd::read(&stdin, buffer) {
            Ok(n) => return Ok(n),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => wait(stdin.as_fd(), PollFlags::POLLIN)?,
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Writes all bytes to standard output.
pub(super) fn write_all(mut bytes: &[u8]) -> io::Result<()> {
    let stdout = io::stdout();
    while !bytes.is_empty() {
        match nix::unistd::write(&stdout, bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => wait(stdout.as_fd(), PollFlags::POLLOUT)?,
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

fn wait(fd: BorrowedFd<'_>, events: PollFlags) -> io::Result<()> {
    match poll(&mut [PollFd::new(fd, events)], PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
