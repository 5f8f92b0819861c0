//! The terminal: its size, and keys as they are pressed.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// Columns and rows of a terminal; `None` for what is none.
pub fn terminal_size(terminal: BorrowedFd<'_>) -> Option<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the call writes one `winsize`, which lives for its whole length; the descriptor is borrowed for as long.
    let answer = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    (answer == 0 && size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// A terminal that hands over each key at once, does not show it, and makes no signals of any; as before when this is dropped.
#[derive(Debug)]
pub struct KeyMode {
    terminal: OwnedFd,
    before: libc::termios,
}

impl KeyMode {
    /// Begins. What was typed before is forgotten.
    ///
    /// # Errors
    /// It is no terminal.
    pub fn begin(terminal: BorrowedFd<'_>) -> io::Result<Self> {
        let terminal = terminal.try_clone_to_owned()?;
        // SAFETY: all-zero bytes are a valid `termios`: it has integers only.
        let mut before: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: the call writes one `termios`, which lives for its whole length.
        if unsafe { libc::tcgetattr(terminal.as_raw_fd(), &raw mut before) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let mut keys = before;
        keys.c_lflag &= !(libc::ICANON | libc::ECHO | libc::ISIG);
        keys.c_cc[libc::VMIN] = 1;
        keys.c_cc[libc::VTIME] = 0;
        set(&terminal, libc::TCSAFLUSH, &keys)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for KeyMode {
    fn drop(&mut self) {
        // Without waiting for what is still to be shown: the terminal may be held up. One that has gone away needs nothing any more.
        drop(set(&self.terminal, libc::TCSANOW, &self.before));
    }
}

fn set(terminal: &OwnedFd, when: libc::c_int, mode: &libc::termios) -> io::Result<()> {
    // SAFETY: the call reads one `termios`, which lives for its whole length.
    match unsafe { libc::tcsetattr(terminal.as_raw_fd(), when, mode) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn what_is_no_terminal_has_no_size_and_no_keys() {
        let null = File::open("/dev/null").unwrap();
        assert_eq!(terminal_size(null.as_fd()), None);
        assert!(KeyMode::begin(null.as_fd()).is_err());
    }

    #[test]
    fn a_terminal_is_as_before_afterwards() {
        let Ok(terminal) = File::options().read(true).write(true).open("/dev/ptmx") else { return };
        let mode = || {
            // SAFETY: as above.
            let mut mode: libc::termios = unsafe { std::mem::zeroed() };
            // SAFETY: as above.
            assert_eq!(unsafe { libc::tcgetattr(terminal.as_raw_fd(), &raw mut mode) }, 0);
            mode.c_lflag
        };
        let before = mode();
        let keys = KeyMode::begin(terminal.as_fd()).unwrap();
        assert_eq!(mode() & (libc::ICANON | libc::ECHO | libc::ISIG), 0);
        drop(keys);
        assert_eq!(mode(), before);
    }
}
