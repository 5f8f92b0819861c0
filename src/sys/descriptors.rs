//! Descriptors by their numbers: those that a program was started with, and one number that comes to mean another file.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// The first number after the standard streams.
const FIRST: RawFd = 3;

/// The descriptors that whoever started this program left open for it, beside the standard streams. Those that nobody
/// [takes](Inherited::take) are closed on drop.
#[derive(Debug, Default)]
pub struct Inherited(Vec<OwnedFd>);

impl Inherited {
    /// All of them, closed on exec from now on. To be asked at the very beginning of the program, before it has opened anything: what is
    /// open then is nobody else's. Nothing at the second call, and none in a process that has threads.
    ///
    /// # Errors
    /// What reading `/proc/self` answers.
    pub fn at_start() -> io::Result<Self> {
        static ASKED: AtomicBool = AtomicBool::new(false);
        let n_threads = std::fs::read_dir("/proc/self/task")?.count();
        if n_threads != 1 || ASKED.swap(true, Ordering::SeqCst) {
            return Ok(Self::default());
        }
        let mut numbers = Vec::new();
        for entry in std::fs::read_dir("/proc/self/fd")? {
            numbers.extend(entry?.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok()));
        }
        numbers.retain(|&number| number >= FIRST);
        let mut inherited = Vec::new();
        for number in numbers {
            // SAFETY: only numbers go in; the one that the listing itself was read with is closed again, and answers EBADF.
            if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } == 0 {
                // SAFETY: it is open, and was so when the program began, so no value of this program owns it; this is asked once only,
                // and no other thread can have opened it since.
                inherited.push(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
        Ok(Self(inherited))
    }

    /// The one of a number, for whoever was told of it.
    pub fn take(&mut self, number: RawFd) -> Option<OwnedFd> {
        let place = self.0.iter().position(|fd| fd.as_raw_fd() == number)?;
        Some(self.0.swap_remove(place))
    }

    /// Leaves them open, for programs in the foreground: whoever started them may see by a pipe when they end.
    pub fn leave_open(&mut self) {
        self.0.drain(..).for_each(std::mem::forget);
    }
}

/// Makes the number of a descriptor mean another open file; the file that it meant is let go. Closed on exec.
///
/// # Errors
/// What dup3(2) answers, `EINVAL` for the same descriptor twice.
pub fn replace(target: BorrowedFd<'_>, by: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both numbers are open, as their types say; the owner of `target` goes on owning it, with another file behind it.
    match unsafe { libc::dup3(by.as_raw_fd(), target.as_raw_fd(), libc::O_CLOEXEC) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    #[test]
    fn a_number_means_another_file_after_its_replacement() {
        let (mut first, _writer) = std::io::pipe().unwrap();
        let (second, mut writer) = std::io::pipe().unwrap();
        replace(first.as_fd(), second.as_fd()).unwrap();
        writer.write_all(b"other").unwrap();
        drop(writer);
        let mut text = String::new();
        first.read_to_string(&mut text).unwrap();
        assert_eq!(text, "other");
        assert_eq!(replace(first.as_fd(), first.as_fd()).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn in_a_process_with_threads_nothing_is_taken_for_inherited() {
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || receiver.recv());
        assert!(Inherited::at_start().unwrap().0.is_empty());
        drop(sender);
        let _ = other.join();
    }
}
