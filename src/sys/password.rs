//! A password from the terminal, which does not show it.
//!
//! Invariant: the terminal is as it was before when the function returns, also when the user pressed Ctrl-C.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

/// The longest password, in bytes.
const MAX_PASSWORD_BYTES: usize = 1024;

const CTRL_C: u8 = 3;
const CTRL_D: u8 = 4;
const BACKSPACE: u8 = 8;
const DELETE: u8 = 0x7f;

/// Asks for a password at the terminal of this process, whatever its standard input is.
///
/// # Errors
/// There is no terminal, the user broke off (`Interrupted`), or the password is too long or no text.
pub fn read_password(prompt: &str) -> io::Result<String> {
    let mut terminal = OpenOptions::new().read(true).write(true).open("/dev/tty")?;
    let mut silent = Silent::new(&terminal)?;
    terminal.write_all(prompt.as_bytes())?;
    let password = read_line(&mut terminal);
    silent.undo();
    terminal.write_all(b"\n")?;
    String::from_utf8(password?).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "the password is not UTF-8"))
}

fn read_line(terminal: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut password = Vec::new();
    let mut byte = [0];
    loop {
        if terminal.read(&mut byte)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match byte[0] {
            b'\n' | b'\r' => return Ok(password),
            CTRL_C | CTRL_D => return Err(io::Error::new(io::ErrorKind::Interrupted, "broken off")),
            DELETE | BACKSPACE => {
                password.pop();
            }
            _ if password.len() == MAX_PASSWORD_BYTES => {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "the password is too long"));
            }
            byte => password.push(byte),
        }
    }
}

/// A terminal that shows nothing, gives each key at once, and makes no signals of them; as before when dropped.
struct Silent {
    terminal: File,
    before: Option<libc::termios>,
}

impl Silent {
    fn new(terminal: &File) -> io::Result<Self> {
        let terminal = terminal.try_clone()?;
        let mut before = MaybeUninit::uninit();
        // SAFETY: the pointer is to room for a termios, which tcgetattr fills when it answers 0.
        if unsafe { libc::tcgetattr(terminal.as_raw_fd(), before.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it was filled.
        let before = unsafe { before.assume_init() };
        let mut silent = before;
        silent.c_lflag &= !(libc::ECHO | libc::ICANON | libc::ISIG);
        silent.c_cc[libc::VMIN] = 1;
        silent.c_cc[libc::VTIME] = 0;
        // SAFETY: the pointer is to a termios that lives through the call.
        if unsafe { libc::tcsetattr(terminal.as_raw_fd(), libc::TCSAFLUSH, &silent) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { terminal, before: Some(before) })
    }

    fn undo(&mut self) {
        if let Some(before) = self.before.take() {
            // SAFETY: as above. A terminal that has gone away needs nothing undone.
            unsafe { libc::tcsetattr(self.terminal.as_raw_fd(), libc::TCSADRAIN, &before) };
        }
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        self.undo();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn keys_make_a_line() {
        let line = |keys: &[u8]| read_line(&mut &keys[..]).map_err(|error| error.kind());
        assert_eq!(line(b"secret\nrest"), Ok(b"secret".to_vec()));
        assert_eq!(line(b"secrex\x7ft\r"), Ok(b"secret".to_vec()));
        assert_eq!(line(b"\x08\n"), Ok(Vec::new()));
        assert_eq!(line(b"sec\x03"), Err(io::ErrorKind::Interrupted));
        assert_eq!(line(b"sec"), Err(io::ErrorKind::UnexpectedEof));
        assert_eq!(line(&[b'x'; MAX_PASSWORD_BYTES + 1]), Err(io::ErrorKind::InvalidInput));
    }
}
