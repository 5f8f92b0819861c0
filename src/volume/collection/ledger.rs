//! The numbers that were given, in a file that outlives this process: who goes on with its mount gives the same.
//!
//! A part's number follows from its path and version alone only as long as no other part is in its way; which of two was there first is
//! known to those who were there. So it is written down before the kernel hears of a number, and a later process leaves
//! every span to the part that had it, be that part gone.
//!
//! | bytes | what |
//! |---|---|
//! | 16 | [`MAGIC`], once |
//! | 8, 8 | the number before the first, how many there are (little-endian, as all that follow) |
//! | 4, 4 | length of the path, length of the version |
//! | … | the path, the version |
//!
//! Invariant: a ledger in which a number is missing is not read: a process that cannot write it spoils it. (A record that is torn is of a
//! number that nobody has heard of.)

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::fs::FileExt;

/// The beginning of one that is complete.
const MAGIC: &[u8; 16] = b"caifs-numbers 1\n";

/// Bytes of a record before its path.
const HEAD_BYTES: usize = 24;

/// The most that is written: 400,000 parts with paths of usual length. It is memory of the service.
const MAX_BYTES: u64 = 64 << 20;

/// The span that was given to a path and version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Given {
    pub(super) base: u64,
    pub(super) span: u64,
    pub(super) path: Vec<u8>,
    pub(super) version: String,
}

/// Where numbers are written down.
#[derive(Debug)]
pub(super) struct Ledger {
    file: File,
    n_bytes: u64,
    is_spoiled: bool,
}

impl Ledger {
    /// Reads what a process before has given, and goes on behind it; an empty file is begun.
    ///
    /// # Errors
    /// It cannot be read or written, or is not complete.
    pub(super) fn open(mut file: File) -> io::Result<(Self, Vec<Given>)> {
        let mut bytes = Vec::new();
        file.rewind()?;
        (&file).take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
        if bytes.is_empty() {
            file.write_all_at(MAGIC, 0)?;
            return Ok((Self { file, n_bytes: MAGIC.len() as u64, is_spoiled: false }, Vec::new()));
        }
        let incomplete = || io::Error::new(io::ErrorKind::InvalidData, "not all numbers that were given are known");
        let mut rest = bytes.strip_prefix(MAGIC).ok_or_else(incomplete)?;
        let mut given = Vec::new();
        while let Some((one, behind)) = record(rest) {
            given.push(one.ok_or_else(incomplete)?);
            rest = behind;
        }
        let n_bytes = (bytes.len() - rest.len()) as u64;
        file.set_len(n_bytes)?;
        Ok((Self { file, n_bytes, is_spoiled: false }, given))
    }

    /// Writes down what is given; whether it stands there. It is memory that is written to, so nobody waits.
    pub(super) fn write(&mut self, given: &Given) -> bool {
        if self.is_spoiled {
            return false;
        }
        let Given { base, span, path, version } = given;
        let mut bytes = Vec::with_capacity(HEAD_BYTES + path.len() + version.len());
        bytes.extend_from_slice(&base.to_le_bytes());
        bytes.extend_from_slice(&span.to_le_bytes());
        for text in [path.as_slice(), version.as_bytes()] {
            bytes.extend_from_slice(&(text.len() as u32).to_le_bytes());
        }
        bytes.extend_from_slice(path);
        bytes.extend_from_slice(version.as_bytes());
        let written = match self.n_bytes + bytes.len() as u64 <= MAX_BYTES {
            true => self.file.write_all_at(&bytes, self.n_bytes),
            false => Err(io::Error::other(format!("more than {} MiB of numbers", MAX_BYTES >> 20))),
        };
        match written {
            Ok(()) => self.n_bytes += bytes.len() as u64,
            Err(error) => {
                self.is_spoiled = true;
                tracing::warn!("a restarted service will not go on with this mount, and mounts it anew: {error}");
                // Shorter needs no room, and one that is empty is not begun a second time.
                if let Err(error) = self.file.set_len(1) {
                    tracing::error!("numbers of this mount: {error}");
                }
            }
        }
        !self.is_spoiled
    }
}

/// The first record, and what is behind it: `None` if it is torn, or there is none. `Some(None)` for one that nobody has written.
fn record(bytes: &[u8]) -> Option<(Option<Given>, &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<HEAD_BYTES>()?;
    let long = |at: usize| head[at..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
    let short = |at: usize| head[at..].first_chunk().map_or(0, |word| u32::from_le_bytes(*word)) as usize;
    let (path, rest) = rest.split_at_checked(short(16))?;
    let (version, rest) = rest.split_at_checked(short(20))?;
    let version = String::from_utf8(version.to_vec()).ok();
    let given = version.map(|version| Given { base: long(0), span: long(8), path: path.to_vec(), version });
    Some((given, rest))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn given(number: u64) -> Given {
        Given { base: number << 8, span: number, path: format!("a/{number}.caidx").into_bytes(), version: "v1".into() }
    }

    fn reopened(file: &File) -> io::Result<Vec<Given>> {
        Ledger::open(file.try_clone().unwrap()).map(|(_, given)| given)
    }

    #[test]
    fn what_was_given_is_known_to_the_next_and_a_torn_end_is_not() {
        let file = tempfile::tempfile().unwrap();
        let (mut ledger, none) = Ledger::open(file.try_clone().unwrap()).unwrap();
        assert!(none.is_empty());
        ledger.write(&given(1));
        ledger.write(&given(2));
        let whole = file.metadata().unwrap().len();
        for n_bytes in (0..whole).rev() {
            let copy = tempfile::tempfile().unwrap();
            let mut bytes = vec![0; n_bytes as usize];
            file.read_exact_at(&mut bytes, 0).unwrap();
            copy.write_all_at(&bytes, 0).unwrap();
            match n_bytes as usize {
                0 => assert_eq!(reopened(&copy).unwrap(), []),
                1..16 => assert!(reopened(&copy).is_err()),
                _ => assert!(reopened(&copy).unwrap().len() < 2),
            }
        }
        // The next goes on behind what is whole.
        file.set_len(whole - 1).unwrap();
        let (mut ledger, one) = Ledger::open(file.try_clone().unwrap()).unwrap();
        assert_eq!(one, [given(1)]);
        ledger.write(&given(3));
        assert_eq!(reopened(&file).unwrap(), [given(1), given(3)]);
    }

    #[test]
    fn one_that_lacks_a_number_is_not_read() {
        let file = tempfile::tempfile().unwrap();
        let (mut ledger, _) = Ledger::open(file.try_clone().unwrap()).unwrap();
        ledger.write(&given(1));
        ledger.n_bytes = MAX_BYTES;
        ledger.write(&given(2));
        ledger.write(&given(3));
        assert_eq!(reopened(&file).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
