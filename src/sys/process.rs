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

/// Replaces texts in the arguments of this process as others see them (`/proc/PID/cmdline`), and as `std::env::args` gives them from now on.
/// What is shorter than what it stands in place of has spaces behind it; what is longer is left out. Tells how many texts are not there.
///
/// # Errors
/// `EDEADLK` when the process has threads, which might be reading them; what reading `/proc/self/stat` answers.
pub fn replace_in_arguments(texts: &[(String, String)]) -> io::Result<usize> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::from_raw_os_error(libc::EDEADLK));
    }
    let area = argument_area(&std::fs::read("/proc/self/stat")?).ok_or(io::ErrorKind::InvalidData)?;
    let start = std::ptr::with_exposed_provenance_mut::<u8>(area.start);
    let mut bytes = vec![0; area.len()];
    // SAFETY: the kernel has put the arguments there, on the stack of this process, which is mapped as long as it lives. No other
    // thread exists, and no reference to them, which the standard library hands out as copies only.
    unsafe { std::ptr::copy_nonoverlapping(start, bytes.as_mut_ptr(), area.len()) };
    let mut n_missed = 0;
    for (text, other) in texts.iter().filter(|(text, _)| !text.is_empty()) {
        let other = if other.len() <= text.len() { other.as_str() } else { "" };
        let (mut from, mut is_there) = (0, false);
        while let Some(at) = bytes[from..].windows(text.len()).position(|window| window == text.as_bytes()) {
            let place = &mut bytes[from + at..][..text.len()];
            place.fill(b' ');
            place[..other.len()].copy_from_slice(other.as_bytes());
            from += at + text.len();
            is_there = true;
        }
        n_missed += usize::from(!is_there);
    }
    // SAFETY: as above; the area is writable as all of the stack is, and as long as the copy.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), start, area.len()) };
    Ok(n_missed)
}

/// Where the arguments of a process lie, by its `/proc/PID/stat` (proc(5), fields 48 and 49); nothing where that is not told.
fn argument_area(stat: &[u8]) -> Option<std::ops::Range<usize>> {
    // The second field, in parentheses, can hold anything.
    let behind = stat.iter().rposition(|byte| *byte == b')')? + 1;
    let text = std::str::from_utf8(stat.get(behind..)?).ok()?;
    let mut numbers = text.split_ascii_whitespace().skip(48 - 3).map(|field| field.parse::<usize>().ok());
    let (start, end) = (numbers.next()??, numbers.next()??);
    (start != 0 && start < end).then_some(start..end)
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
    fn arguments_lie_where_the_kernel_says() {
        let stat = std::fs::read("/proc/self/stat").unwrap();
        let area = argument_area(&stat).unwrap();
        assert_eq!(area.len(), std::fs::read("/proc/self/cmdline").unwrap().len());
        assert_eq!(argument_area(b"1 (a) b) S 1 2 3"), None);
        let of_others = [b"1 (x) S".to_vec(), b" 0".repeat(60)].concat();
        assert_eq!(argument_area(&of_others), None, "others are not told");
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
