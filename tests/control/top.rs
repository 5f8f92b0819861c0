//! `caifs top` on a terminal: what it shows, and that the terminal is as it was however it ends.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::ground::Ground;
use crate::mount::can_mount;
use crate::support::peers::peer;
use crate::support::run::{command, run, wait};

const BEGIN: &str = "\x1b[?1049h";
const END: &str = "\x1b[?25h\x1b[?1049l";

/// A terminal of its own, with a shell that starts the program and says what became of both.
struct Terminal {
    child: Child,
    keys: ChildStdin,
    out: ChildStdout,
    shown: String,
}

impl Terminal {
    fn top(ground: &Ground) -> Option<Self> {
        let script = peer("script")?;
        let top = format!("{} top -i 100ms {}", env!("CARGO_BIN_EXE_caifs"), ground.mnt.display());
        // What the keyboard signals reaches the shell, too, which goes on.
        let shell = format!(
            "stty rows 30 cols 100; trap : INT TERM HUP QUIT; echo \"before $(stty -g).\"; sh -c 'echo \"pid $$.\"; exec {top}'; \
             echo \"status $?.\"; echo \"after $(stty -g).\""
        );
        let mut script = command(&script.path, ["-qec", &shell, "/dev/null"]);
        script.env("CAIFS_RUNTIME_DIR", ground.run_dir()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = script.spawn().unwrap();
        let (keys, out) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Some(Self { child, keys, out, shown: String::new() })
    }

    /// Reads until so much of it was shown.
    #[track_caller]
    fn until(&mut self, text: &str, n: usize) {
        let mut part = [0; 4096];
        while self.shown.matches(text).count() < n {
            let n = self.out.read(&mut part).unwrap();
            assert!(n > 0, "{text:?} does not come: {:?}", self.shown);
            self.shown.push_str(&String::from_utf8_lossy(&part[..n]));
        }
    }

    /// What stands behind a word that the shell says.
    #[track_caller]
    fn said(&mut self, word: &str) -> String {
        self.until(word, 1);
        let start = self.shown.find(word).unwrap() + word.len();
        while !self.shown[start..].contains('.') {
            let n = self.shown.len();
            let mut byte = [0];
            self.out.read_exact(&mut byte).unwrap();
            self.shown.push(byte[0].into());
            assert!(self.shown.len() > n);
        }
        self.shown[start..].split_once('.').unwrap().0.to_owned()
    }

    fn pid(&mut self) -> Pid {
        Pid::from_raw(self.said("pid ").parse().unwrap())
    }

    /// The program ends well, and the terminal is as it was.
    #[track_caller]
    fn ends_in_order(mut self) {
        let (before, status, after) = (self.said("before "), self.said("status "), self.said("after "));
        assert_eq!((status.as_str(), after), ("0", before), "{:?}", self.shown);
        let (begin, end) = (self.shown.matches(BEGIN).count(), self.shown.matches(END).count());
        assert_eq!((begin, end), (1, 1), "{:?}", self.shown);
        assert!(!self.shown.rsplit_once(END).unwrap().1.contains("q ends"), "{:?}", self.shown);
        wait(&mut self.child, Duration::from_secs(60)).expect("the shell ends");
    }
}

#[test]
fn top_fills_a_terminal_and_leaves_it_as_it_was_however_it_ends() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new(300_000);
    let mounted = ground.mount(&[]);
    for end in ["q", "\x03", "SIGTERM", "SIGINT", "SIGHUP"] {
        let Some(mut terminal) = Terminal::top(&ground) else { return };
        let pid = terminal.pid();
        terminal.until("q ends", 2);
        let shown = &terminal.shown;
        assert!(shown.contains(&*ground.mnt.to_string_lossy()) && shown.contains("requests wait"), "{shown:?}");
        match end.parse::<Signal>() {
            Ok(signal) => kill(pid, signal).unwrap(),
            Err(_) => terminal.keys.write_all(end.as_bytes()).unwrap(),
        }
        terminal.ends_in_order();
    }
    assert!(mounted.end());
    let wrong = run(&mut ground.caifs(&["top", "-i", "1ms"])).fails();
    assert_eq!(wrong.error_line(), "caifs: --interval: \"1ms\" is not a time of at least 100ms, such as 1s");
}

#[test]
fn ctrl_c_ends_top_also_while_a_mount_that_hangs_is_asked() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new(300_000);
    let mounted = ground.mount(&[]);
    let pid = Pid::from_raw(mounted.pids()[0]);
    kill(pid, Signal::SIGSTOP).unwrap();
    if let Some(mut terminal) = Terminal::top(&ground) {
        // The first page comes only once that mount was waited for.
        terminal.until(BEGIN, 1);
        terminal.keys.write_all(b"\x03").unwrap();
        terminal.until(END, 1);
        assert!(!terminal.shown.contains("q ends"), "{:?}", terminal.shown);
        terminal.ends_in_order();
    }
    kill(pid, Signal::SIGCONT).unwrap();
    assert!(mounted.end());
}
