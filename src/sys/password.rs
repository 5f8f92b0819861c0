//! A password from the terminal, which does not show it.
//!
//! Invariant: the terminal is as it was before when the function returns, also when the user pressed Ctrl-C.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;

use super::KeyMode;

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
    let silent = KeyMode::begin(terminal.as_fd())?;
    terminal.write_all(prompt.as_bytes())?;
    let password = read_line(&mut terminal);
    drop(silent);
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
