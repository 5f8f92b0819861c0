//! Writing a file as a whole: under a temporary name, then moved to its own.
//!
//! The temporary name is the file's with a random number behind it (formats.md 7.1). SFTP's own rename refuses to replace a file; OpenSSH's
//! `posix-rename` does replace, in one step, but the `ssh2` crate does not have it. So where something is to be replaced
//! that one request is spoken here, over a channel of its own.

use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read, Write};
use std::path::Path;

use ssh2::{OpenFlags, OpenType};

use super::super::Put;
use super::session::{Fault, Session};

/// Permissions of files, less the server's umask.
const FILE_MODE: i32 = 0o644;

/// Permissions of directories, less the server's umask.
const DIRECTORY_MODE: i32 = 0o755;

/// The longest answer that is read when SFTP is spoken here (OpenSSH's own limit is 256 KiB).
const MAX_PACKET_BYTES: u32 = 256 << 10;

/// The version of SFTP spoken here: the one everybody speaks.
const SFTP_VERSION: u32 = 3;

const FXP_INIT: u8 = 1;
const FXP_VERSION: u8 = 2;
const FXP_STATUS: u8 = 101;
const FXP_EXTENDED: u8 = 200;

/// What is done about a file that is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// It is as good as the new one (chunks). The directory is made if it is missing.
    Keep,
    /// It is replaced (whole files), and the new one is on the server's disk before that, if the server can tell.
    Replace,
}

/// `<path><random number>`.
pub fn temporary_name(path: &str) -> String {
    // A hasher's seed is the one source of random numbers in the standard library.
    format!("{path}{}", RandomState::new().hash_one(path) >> 1)
}

/// Writes a file; a temporary file that may be there is overwritten.
pub fn write_file(
    session: &Session,
    path: &str,
    temporary: &str,
    content: &[u8],
    existing: Existing,
) -> Result<Put, Fault> {
    let written = write_temporary(session, path, temporary, content, existing)
        .and_then(|()| move_into_place(session, path, temporary, existing));
    if !matches!(written, Ok(Put::Written) | Err(Fault::Broken(_))) {
        // What cannot be removed stays; the fault that led here is the one to tell.
        drop(session.sftp().unlink(Path::new(temporary)));
    }
    written
}

fn write_temporary(
    session: &Session,
    path: &str,
    temporary: &str,
    content: &[u8],
    existing: Existing,
) -> Result<(), Fault> {
    let flags = OpenFlags::WRITE | OpenFlags::TRUNCATE;
    let create = || session.sftp().open_mode(temporary, flags, FILE_MODE, OpenType::File).map_err(Fault::from);
    let mut file = match create() {
        Err(fault) if fault.is_missing() && existing == Existing::Keep => {
            if let Some(parent) = Path::new(path).parent() {
                // Somebody else may be faster, so only opening tells whether the directory is there now.
                drop(session.sftp().mkdir(parent, DIRECTORY_MODE));
            }
            match create() {
                Err(Fault::Status { code, words }) => {
                    let words = format!("{words} (the store's directory must exist)");
                    return Err(Fault::Status { code, words });
                }
                created => created?,
            }
        }
        created => created?,
    };
    file.write_all(content).map_err(|error| session.fault_of_io(error))?;
    if existing == Existing::Replace {
        match file.fsync().map_err(Fault::from) {
            // Not every server has this, and libssh2 does not ask those that do not.
            Err(fault) if !fault.keeps_session() => return Err(fault),
            _ => {}
        }
    }
    // Some servers tell only now that there was no space.
    Ok(file.close()?)
}

fn move_into_place(session: &Session, path: &str, temporary: &str, existing: Existing) -> Result<Put, Fault> {
    let refused = match session.sftp().rename(Path::new(temporary), Path::new(path), None).map_err(Fault::from) {
        Ok(()) => return Ok(Put::Written),
        Err(fault) if fault.keeps_session() => fault,
        Err(fault) => return Err(fault),
    };
    match session.stat(path)? {
        None => Err(refused),
        Some(stat) if existing == Existing::Keep && stat.is_file() && stat.size != Some(0) => Ok(Put::Present),
        Some(_) => match posix_rename(session, temporary, path) {
            Err(fault) if fault.is_unsupported() => {
                Err(Fault::Unfit("it exists, and the server cannot replace a file in one step".to_owned()))
            }
            renamed => renamed.map(|()| Put::Written),
        },
    }
}

/// Moves a file, replacing what has the new name.
fn posix_rename(session: &Session, from: &str, to: &str) -> Result<(), Fault> {
    let broken = |error: io::Error| Fault::Broken(error.to_string());
    let mut channel = session.ssh().channel_session()?;
    channel.subsystem("sftp")?;
    channel.write_all(&packet(FXP_INIT, &[&SFTP_VERSION.to_be_bytes()])).map_err(broken)?;
    let (kind, _) = read_packet(&mut channel).map_err(broken)?;
    if kind != FXP_VERSION {
        return Err(Fault::Broken("broken answer to the start of SFTP".to_owned()));
    }
    let request = [&0u32.to_be_bytes()[..], &text("posix-rename@openssh.com"), &text(from), &text(to)];
    channel.write_all(&packet(FXP_EXTENDED, &request)).map_err(broken)?;
    let (kind, body) = read_packet(&mut channel).map_err(broken)?;
    let status = body.get(4..8).and_then(|bytes| bytes.try_into().ok()).map(u32::from_be_bytes);
    match status {
        Some(0) if kind == FXP_STATUS => Ok(()),
        Some(status) if kind == FXP_STATUS => Err(Fault::status(i32::try_from(status).unwrap_or(0))),
        _ => Err(Fault::Broken("broken answer to posix-rename".to_owned())),
    }
}

/// Length, kind, body.
fn packet(kind: u8, parts: &[&[u8]]) -> Vec<u8> {
    let body = parts.concat();
    let mut packet = (body.len() as u32 + 1).to_be_bytes().to_vec();
    packet.push(kind);
    packet.extend(body);
    packet
}

/// Length and bytes.
fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

/// Kind and body of the next packet.
fn read_packet(from: &mut impl Read) -> io::Result<(u8, Vec<u8>)> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_be_bytes(length);
    if length == 0 || length > MAX_PACKET_BYTES {
        return Err(io::Error::other(format!("an SFTP packet of {length} bytes")));
    }
    let mut packet = vec![0; length as usize];
    from.read_exact(&mut packet)?;
    let body = packet.split_off(1);
    Ok((packet[0], body))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_read_as_they_are_written_and_bounded() {
        let written = packet(FXP_EXTENDED, &[&[0, 0, 0, 7], &text("ab")]);
        assert_eq!(written, [0, 0, 0, 11, 200, 0, 0, 0, 7, 0, 0, 0, 2, b'a', b'b']);
        assert_eq!(read_packet(&mut &written[..]).unwrap(), (200, vec![0, 0, 0, 7, 0, 0, 0, 2, b'a', b'b']));
        for length in 0..written.len() {
            assert!(read_packet(&mut &written[..length]).is_err(), "{length}");
        }
        assert!(read_packet(&mut &[0, 0, 0, 0, 0][..]).is_err());
        assert!(read_packet(&mut &[255; 9][..]).is_err());
    }

    #[test]
    fn temporary_names_differ_and_are_no_chunks() {
        let names: std::collections::BTreeSet<_> = (0..100).map(|_| temporary_name("/a/b.cacnk")).collect();
        assert_eq!(names.len(), 100);
        for name in names {
            let random = name.strip_prefix("/a/b.cacnk").unwrap();
            assert!(!random.is_empty() && random.bytes().all(|byte| byte.is_ascii_digit()), "{name}");
        }
    }
}
