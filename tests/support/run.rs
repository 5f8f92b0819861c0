//! Running programs: captured output, a time limit, and no child left behind.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// How long a program may take when a test says nothing else.
pub const TIME_LIMIT: Duration = Duration::from_secs(120);

/// How often a running child is looked at.
const POLL: Duration = Duration::from_millis(1);

/// What a program left: exit status and both outputs.
#[derive(Debug)]
pub struct Finished {
    /// The command as a person would type it.
    pub command: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output, as bytes.
    pub stdout: Vec<u8>,
    /// Its standard error, as text.
    pub stderr: String,
}

impl Finished {
    /// Passes the result on when the program succeeded; panics with its error output otherwise.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert!(self.status.success(), "{}: {}\n{}", self.command, self.status, self.stderr);
        self
    }

    /// Passes the result on when the program failed; panics with its output when it succeeded.
    #[track_caller]
    pub fn fails(self) -> Self {
        assert!(!self.status.success(), "{} succeeded:\n{}", self.command, self.text());
        self
    }

    /// The standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// The one line of an error report; panics when there are more or none, because people get one line.
    #[track_caller]
    pub fn error_line(&self) -> &str {
        let lines: Vec<&str> = self.stderr.lines().collect();
        assert_eq!(lines.len(), 1, "{}: expected one error line, got:\n{}", self.command, self.stderr);
        lines[0]
    }
}

/// The `caifs` of this build, ready for its arguments.
pub fn caifs() -> Command {
    Command::new(env!("CARGO_BIN_EXE_caifs"))
}

/// A command by name and arguments.
pub fn command<S: AsRef<OsStr>>(program: impl AsRef<OsStr>, args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(program);
    command.args(args);
    command
}

/// Runs a command to its end within [`TIME_LIMIT`].
#[track_caller]
pub fn run(command: &mut Command) -> Finished {
    run_within(command, TIME_LIMIT)
}

/// Runs a command to its end. It gets nothing on standard input and its own process group, which is killed, with a
/// panic, when the time is over.
///
/// The outputs are those written until the child's end: what a daemon that the child left behind writes later into
/// an inherited output is not waited for.
#[track_caller]
pub fn run_within(command: &mut Command, limit: Duration) -> Finished {
    let shown = shown(command);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot start {shown}: {error}"));
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let Some(status) = wait(&mut child, limit) else {
        kill_group(&mut child);
        panic!("{shown}: not finished after {limit:?}");
    };
    let read = |output: Collected, name: &str| {
        let left = limit.min(Duration::from_secs(5));
        output.recv_timeout(left).unwrap_or_else(|_| panic!("{shown}: someone still holds its {name} open"))
    };
    let stdout = read(stdout, "standard output");
    let stderr = String::from_utf8_lossy(&read(stderr, "standard error")).into_owned();
    Finished { command: shown, status, stdout, stderr }
}

/// Waits for a child's end, at most so long.
pub fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            return Some(status);
        }
        if start.elapsed() > limit {
            return None;
        }
        thread::sleep(POLL);
    }
}

/// Ends a child that leads its own process group, and the group.
pub fn kill_group(child: &mut Child) {
    // The group is gone when the child has ended by itself meanwhile; there is nothing to do then.
    let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
    let _ = child.kill();
    let _ = child.wait();
}

/// A command as a person would type it.
pub fn shown(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|arg| arg.to_string_lossy().into_owned()));
    words.join(" ")
}

type Collected = std::sync::mpsc::Receiver<Vec<u8>>;

/// Reads an output to its end on a thread of its own, so that no child blocks on a full pipe.
fn collect(output: Option<impl Read + Send + 'static>) -> Collected {
    let (sender, receiver) = std::sync::mpsc::channel();
    let mut output = output.expect("the output was piped");
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // A read error ends the output; what came before it is still worth showing.
        let _ = output.read_to_end(&mut bytes);
        // The receiver is gone when the test has panicked already.
        let _ = sender.send(bytes);
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_and_status_are_captured() {
        let finished = run(&mut command("sh", ["-c", "printf out; echo err >&2; exit 3"]));
        assert_eq!(finished.status.code(), Some(3));
        assert_eq!(finished.stdout, b"out");
        assert_eq!(finished.fails().error_line(), "err");
    }

    #[test]
    fn a_program_that_takes_too_long_is_ended() {
        let start = Instant::now();
        let outcome = std::panic::catch_unwind(|| {
            run_within(&mut command("sh", ["-c", "sleep 60"]), Duration::from_millis(50));
        });
        assert!(outcome.is_err());
        assert!(start.elapsed() < Duration::from_secs(30));
    }
}
