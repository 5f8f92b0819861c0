//! Processes: fork, and signals as bytes of a stream.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicI32, Ordering};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::{ForkResult, Pid};

/// Which side of a [`fork`] this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forked {
    /// The process that called.
    Parent {
        /// The new process.
        child: Pid,
    },
    /// The new process.
    Child,
}

/// Splits the process in two.
///
/// # Errors
/// `EDEADLK` when the process has threads: only the calling one would live on in the child, and locks that others hold would
/// stay locked for ever. Otherwise what fork(2) or reading `/proc/self/task` answers.
pub fn fork() -> io::Result<Forked> {
    let n_threads = std::fs::read_dir("/proc/self/task")?.count();
    if n_threads != 1 {
        return Err(io::Error::from_raw_os_error(libc::EDEADLK));
    }
    // What stands in a buffer would be written by both.
    io::stdout().flush()?;
    // SAFETY: this is the only thread, so the child finds every lock and the allocator in a state it may go on from.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(Forked::Parent { child }),
        ForkResult::Child => Ok(Forked::Child),
    }
}

/// A descriptor of a process, which is readable once it has ended (pidfd_open(2), since Linux 5.3). It stands for this process, also when
/// its number is another's later.
///
/// # Errors
/// `ESRCH` when there is no such process; `ENOSYS` from an older kernel.
pub fn watch_process(process: Pid) -> io::Result<OwnedFd> {
    // SAFETY: the call takes two numbers and touches no memory of ours.
    let number = unsafe { libc::syscall(libc::SYS_pidfd_open, process.as_raw(), 0) };
    match RawFd::try_from(number) {
        // SAFETY: the kernel has just made it for us, and nobody else knows it.
        Ok(number) if number >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(number) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives memory that was freed, and that the allocator keeps for later, back to the system: after work that needed much of it and is
/// over. Takes some milliseconds. Does nothing where the allocator is not glibc's.
pub fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes the allocator's own locks, and touches nothing that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Lets the allocator have no more heaps than `n`, for the rest of the process: by default there are eight for each core, and what one of
/// them has freed is of no use to a thread that has another. Does nothing where the allocator is not glibc's.
pub fn limit_heaps(n: u16) {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets a number under the allocator's own lock.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, n.into());
    }
}

/// Where the handler writes; -1 as long as nobody asked.
static SIGNAL_SINK: AtomicI32 = AtomicI32::new(-1);

/// From now on each of `signals` that the process gets is one byte, its number, in the returned stream, instead of what it
/// would have done. Can be asked for once in a process. Programs started later get the default actions.
///
/// # Errors
/// `AlreadyExists` at the second call; what sigaction(2) answers for a signal that cannot be caught.
pub fn catch_signals(signals: &[Signal]) -> io::Result<UnixStream> {
    let (reader, writer) = UnixStream::pair()?;
    // A handler must never wait, not even when nobody reads.
    writer.set_nonblocking(true)?;
    let taken = SIGNAL_SINK.compare_exchange(-1, writer.as_raw_fd(), Ordering::SeqCst, Ordering::SeqCst);
    if taken.is_err() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "signals are already caught in this process"));
    }
    // The descriptor belongs to the handler now, for the rest of the process: a handler may run at any time.
    let _ = writer.into_raw_fd();
    let action = SigAction::new(SigHandler::Handler(write_signal), SaFlags::SA_RESTART, SigSet::empty());
    for &signal in signals {
        // SAFETY: the handler only loads an atomic and calls write(2), both async-signal-safe, and keeps errno.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(reader)
}

extern "C" fn write_signal(signal: libc::c_int) {
    let saved = nix::errno::Errno::last_raw();
    let sink = SIGNAL_SINK.load(Ordering::SeqCst);
    let byte = u8::try_from(signal).unwrap_or(0);
    // SAFETY: one byte from our stack to a descriptor that is never closed; a full socket loses only a repeated signal.
    unsafe { libc::write(sink, (&raw const byte).cast(), 1) };
    nix::errno::Errno::set_raw(saved);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::io::Read;
    use std::os::fd::AsFd;

    #[test]
    fn fork_is_refused_in_a_process_with_threads() {
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || receiver.recv());
        assert_eq!(fork().unwrap_err().raw_os_error(), Some(libc::EDEADLK));
        drop(sender);
        let _ = other.join();
    }

    #[test]
    fn the_end_of_a_watched_process_is_seen() {
        let mut child = std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let watched = watch_process(Pid::from_raw(child.id().cast_signed())).unwrap();
        let has_ended = |wait: PollTimeout| poll(&mut [PollFd::new(watched.as_fd(), PollFlags::POLLIN)], wait) == Ok(1);
        assert!(!has_ended(PollTimeout::ZERO));
        drop(child.stdin.take());
        assert!(has_ended(PollTimeout::from(10_000_u16)));
        child.wait().unwrap();
        assert_eq!(
            watch_process(Pid::from_raw(child.id().cast_signed())).unwrap_err().raw_os_error(),
            Some(libc::ESRCH)
        );
    }

    #[test]
    fn a_caught_signal_is_a_byte_in_the_stream() {
        let mut stream = catch_signals(&[Signal::SIGUSR2]).unwrap();
        assert_eq!(catch_signals(&[Signal::SIGUSR2]).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        nix::sys::signal::raise(Signal::SIGUSR2).unwrap();
        let mut byte = [0u8; 1];
        stream.read_exact(&mut byte).unwrap();
        assert_eq!(i32::from(byte[0]), libc::SIGUSR2);
    }
}
