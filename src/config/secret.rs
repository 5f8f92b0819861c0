//! Secrets of the configuration: given as a text, in a file, or by a command. Read when a store needs them, and once.
//!
//! Invariant: no error, log or `Debug` shows a secret, or what a command wrote instead of one.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::store::Secret;

/// The longest first line of a secret's file or command, in bytes.
pub const MAX_SECRET_BYTES: usize = 64 << 10;

/// How long a command may take to give a secret.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// How often a command that has closed its output is asked whether it has ended.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// Where a secret comes from.
#[derive(Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// It is given.
    Text(Secret),
    /// It is the first line of a file.
    File(PathBuf),
    /// It is the first line that a program writes: the program and its arguments.
    Command(Vec<String>),
}

/// Without the secret, and without a command's arguments, which can tell as much.
impl fmt::Debug for SecretSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(_) => f.write_str("Text(…)"),
            Self::File(path) => write!(f, "File({path:?})"),
            Self::Command(command) => write!(f, "Command({:?}, …)", command.first()),
        }
    }
}

/// A secret that is read when it is asked for.
#[derive(Debug, Clone)]
pub struct LazySecret {
    source: SecretSource,
    known: Arc<OnceLock<Secret>>,
}

impl PartialEq for LazySecret {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl Eq for LazySecret {}

impl LazySecret {
    /// A secret from there.
    pub fn new(source: SecretSource) -> Self {
        Self { source, known: Arc::default() }
    }

    /// A secret that is given.
    pub fn text(text: impl Into<String>) -> Self {
        Self::new(SecretSource::Text(Secret::new(text)))
    }

    /// Where it comes from.
    pub fn source(&self) -> &SecretSource {
        &self.source
    }

    /// The secret; read from its file, or asked from its command, the first time only.
    ///
    /// # Errors
    /// One line saying what is wrong with the file or command.
    pub fn get(&self) -> Result<Secret, String> {
        if let Some(known) = self.known.get() {
            return Ok(known.clone());
        }
        let secret = match &self.source {
            SecretSource::Text(secret) => secret.clone(),
            SecretSource::File(path) => from_file(path)?,
            SecretSource::Command(command) => from_command(command, COMMAND_TIMEOUT)?,
        };
        Ok(self.known.get_or_init(|| secret).clone())
    }
}

fn from_file(path: &Path) -> Result<Secret, String> {
    let name = path.display();
    let wrong = |error: std::io::Error| format!("secret file {name}: {error}");
    // Looked at before it is opened: opening a pipe would wait for whoever writes it.
    let metadata = path.metadata().map_err(wrong)?;
    if !metadata.is_file() {
        return Err(format!("secret file {name}: not a regular file"));
    }
    if metadata.permissions().mode() & 0o007 != 0 {
        tracing::warn!("secret file {name} is open to every user (chmod o-rwx {name})");
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(wrong)?;
    file.take(MAX_SECRET_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(wrong)?;
    first_line(&bytes).map_err(|why| format!("secret file {name}: {why}"))
}

fn from_command(command: &[String], limit: Duration) -> Result<Secret, String> {
    let Some((program, args)) = command.split_first() else { return Err("a secret's command is empty".to_owned()) };
    // Its arguments are not shown: they may be secret enough.
    let wrong = |why: &dyn fmt::Display| format!("command {program} for a secret: {why}");
    let mut command = Command::new(program);
    // What it says on stderr is for the person, and passes by.
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(|error| wrong(&error))?;
    let deadline = Instant::now() + limit;
    let output = read_output(&mut child, deadline, limit).and_then(|output| {
        match wait(&mut child, deadline).ok_or_else(|| late(limit))?.map_err(|error| error.to_string())? {
            status if status.success() => Ok(output),
            status => Err(format!("it failed ({status})")),
        }
    });
    if output.is_err() {
        // Ended already, mostly; there is nothing to do about it then.
        let _ = child.kill();
        let _ = child.wait();
    }
    let output = output.map_err(|why| wrong(&why))?;
    first_line(&output).map_err(|why| wrong(&why))
}

/// All a command writes, up to the bound.
fn read_output(child: &mut Child, deadline: Instant, limit: Duration) -> Result<Vec<u8>, String> {
    let mut output = Vec::new();
    let Some(mut stdout) = child.stdout.take() else { return Ok(output) };
    let mut part = [0; 4096];
    while output.len() <= MAX_SECRET_BYTES {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, so that what is left never becomes a busy wait.
        let millis = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(stdout.as_fd(), PollFlags::POLLIN)], millis) {
            Ok(0) | Err(Errno::EINTR) if Instant::now() >= deadline => return Err(late(limit)),
            Ok(0) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.desc().to_owned()),
            Ok(_) => match stdout.read(&mut part).map_err(|error| error.to_string())? {
                0 => break,
                n => output.extend_from_slice(&part[..n]),
            },
        }
    }
    Ok(output)
}

fn late(limit: Duration) -> String {
    format!("not finished after {} s", limit.as_secs_f32())
}

fn wait(child: &mut Child, deadline: Instant) -> Option<std::io::Result<std::process::ExitStatus>> {
    loop {
        match child.try_wait().transpose() {
            Some(ended) => return Some(ended),
            None if Instant::now() >= deadline => return None,
            None => std::thread::sleep(POLL_INTERVAL),
        }
    }
}

fn first_line(bytes: &[u8]) -> Result<Secret, &'static str> {
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    if line.len() > MAX_SECRET_BYTES {
        return Err("its first line is too long for a secret");
    }
    match std::str::from_utf8(line) {
        Ok("") => Err("its first line is empty"),
        Ok(text) => Ok(Secret::new(text)),
        Err(_) => Err("its first line is not UTF-8"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Result<String, String> {
        from_command(&["sh".into(), "-c".into(), script.into()], COMMAND_TIMEOUT).map(|it| it.expose().to_owned())
    }

    #[test]
    fn a_secret_is_the_first_line() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("secret");
        for (content, wanted) in [
            (&b"geheim"[..], Ok("geheim")),
            (b"geheim\nmore", Ok("geheim")),
            (b" geheim \r\n", Ok(" geheim ")),
            (b"", Err("empty")),
            (b"\ngeheim", Err("empty")),
            (b"\xff", Err("not UTF-8")),
            (&[b'x'; MAX_SECRET_BYTES + 1], Err("too long")),
        ] {
            std::fs::write(&file, content).unwrap();
            match (from_file(&file), wanted) {
                (Ok(secret), Ok(wanted)) => assert_eq!(secret.expose(), wanted),
                (Err(error), Err(wanted)) => {
                    assert!(error.contains(wanted) && error.contains(file.to_str().unwrap()), "{error}");
                }
                (got, wanted) => panic!("{got:?} {wanted:?}"),
            }
        }
        for (path, why) in [(dir.path().to_owned(), "not a regular file"), (dir.path().join("none"), "No such file")] {
            assert!(from_file(&path).unwrap_err().contains(why));
        }
    }

    #[test]
    fn a_command_is_heard_only_when_it_succeeds() {
        assert_eq!(shell("echo geheim; echo more").as_deref(), Ok("geheim"));
        for (script, why) in [
            ("echo geheim; exit 3", "it failed (exit status: 3)"),
            ("true", "empty"),
            ("head -c 99999 /dev/zero | tr '\\0' x", ""),
        ] {
            let error = shell(script).unwrap_err();
            assert!(error.starts_with("command sh for a secret: ") && error.contains(why), "{error}");
            assert!(!error.contains("geheim") && !error.contains("xxx"), "{error}");
        }
        assert!(from_command(&["/no/such/program".into()], COMMAND_TIMEOUT).unwrap_err().contains("No such file"));
    }

    #[test]
    fn a_command_that_takes_too_long_is_ended() {
        for script in ["exec sleep 60", "exec >&-; exec sleep 60"] {
            let command = ["sh".to_owned(), "-c".to_owned(), script.to_owned()];
            let error = from_command(&command, Duration::from_millis(50)).unwrap_err();
            assert!(error.contains("not finished"), "{error}");
        }
    }

    #[test]
    fn a_secret_is_asked_for_once() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let script = format!("echo asked >> {}; echo geheim", log.display());
        let secret = LazySecret::new(SecretSource::Command(vec!["sh".into(), "-c".into(), script]));
        assert!(!log.exists());
        for asked in [secret.clone(), secret] {
            assert_eq!(asked.get().unwrap().expose(), "geheim");
            assert!(!format!("{asked:?}").contains("geheim"));
        }
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "asked\n");
    }
}
