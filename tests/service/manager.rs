//! A small service manager: listens as systemd does to what a service says, keeps its files, and starts it again with them.
//!
//! What it keeps goes when it is dropped, so that whoever waits for the mount of a service that has ended is let go.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::cmsg_space;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::Pid;

use crate::support::run;

/// Nothing in these tests takes as long; what does hangs.
pub const LIMIT: Duration = Duration::from_secs(60);

/// The number of the first passed file.
const FIRST_FD: RawFd = 3;

/// The message that ends the listening thread.
const END: &[u8] = b"END OF TEST";

/// A manager and its one service, which is ended when this is dropped.
pub struct Manager {
    socket: PathBuf,
    /// Ends the listening thread, also when the path of the socket is gone.
    to_listener: UnixDatagram,
    heard: Arc<Mutex<Heard>>,
    listener: Option<JoinHandle<()>>,
    service: Option<Child>,
    command: Box<dyn Fn() -> Command>,
    watchdog: Option<Duration>,
    stderr: PathBuf,
}

#[derive(Default)]
struct Heard {
    messages: Vec<String>,
    store: Vec<(String, OwnedFd)>,
}

impl Manager {
    /// A manager of a service; `command` makes the command line anew for each start.
    pub fn new(dir: &Path, command: impl Fn() -> Command + 'static) -> Self {
        let socket = dir.join("notify");
        let listening = UnixDatagram::bind(&socket).expect("a socket can be made");
        let to_listener = UnixDatagram::unbound().expect("a socket can be made");
        to_listener.connect(&socket).expect("it listens");
        let heard = Arc::new(Mutex::new(Heard::default()));
        let shared = Arc::clone(&heard);
        let listener = std::thread::spawn(move || while listen(&listening, &shared) {});
        Self {
            socket,
            to_listener,
            heard,
            listener: Some(listener),
            service: None,
            command: Box::new(command),
            watchdog: None,
            stderr: dir.join("stderr"),
        }
    }

    /// The unit says another command from now on.
    pub fn set_command(&mut self, command: impl Fn() -> Command + 'static) {
        self.command = Box::new(command);
    }

    /// Wants to hear of the service so often.
    pub fn watch(&mut self, watchdog: Duration) {
        self.watchdog = Some(watchdog);
    }

    /// Starts the service with the files that are kept, and waits until it is ready.
    #[track_caller]
    pub fn start(&mut self) {
        self.start_without_waiting();
        let begun = Instant::now();
        while !self.has_heard("READY=1") {
            if let Some(status) = self.service().try_wait().expect("a child can be waited for") {
                panic!("the service ended: {status}\n{}", self.said());
            }
            assert!(begun.elapsed() < LIMIT, "never ready\n{}", self.said());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Starts the service with the files that are kept.
    pub fn start_without_waiting(&mut self) {
        let inner = (self.command)();
        // The shell has the number that the service will have.
        let mut command = Command::new("sh");
        command.args(["-c", r#"export LISTEN_PID=$$ WATCHDOG_PID=$$; exec "$@""#, "sh"]);
        command.arg(inner.get_program()).args(inner.get_args());
        let (names, numbers): (Vec<String>, Vec<RawFd>) = {
            let mut heard = self.lock();
            heard.messages.clear();
            heard.store.iter().map(|(name, fd)| (name.clone(), fd.as_raw_fd())).unzip()
        };
        for (name, value) in inner.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.env("NOTIFY_SOCKET", &self.socket);
        if !names.is_empty() {
            command.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        }
        if let Some(watchdog) = self.watchdog {
            command.env("WATCHDOG_USEC", watchdog.as_micros().to_string());
        }
        let stderr = std::fs::OpenOptions::new().append(true).create(true).open(&self.stderr).expect("opened");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr).process_group(0);
        #[allow(unsafe_code, reason = "only between fork and exec can numbers of files be chosen")]
        // SAFETY: only dup2 and fcntl are called, both async-signal-safe; the numbers stay open in this process until spawn returns.
        unsafe {
            command.pre_exec(move || {
                let mut high = [-1; 8];
                // First out of the way of the numbers that are wanted, then to them.
                for (place, &fd) in high.iter_mut().zip(&numbers) {
                    *place = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 100);
                }
                for (place, &fd) in high.iter().take(numbers.len()).enumerate() {
                    if fd < 0 || libc::dup2(fd, FIRST_FD + place as RawFd) < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        self.service = Some(command.spawn().expect("sh can be started"));
    }

    /// The service's process.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.service.as_ref().expect("started").id().cast_signed())
    }

    fn service(&mut self) -> &mut Child {
        self.service.as_mut().expect("started")
    }

    /// Sends a signal and waits for the end.
    #[track_caller]
    pub fn end(&mut self, signal: Signal) -> ExitStatus {
        kill(self.pid(), signal).expect("the service lives");
        self.wait()
    }

    /// Waits for the end.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        match run::wait(self.service(), LIMIT) {
            Some(status) => {
                self.service = None;
                status
            }
            None => panic!("the service does not end\n{}", self.said()),
        }
    }

    /// As after a stop: nothing is kept any more.
    pub fn drop_store(&self) {
        self.lock().store.clear();
    }

    /// Loses what is kept under a name.
    pub fn lose(&self, name: &str) {
        self.lock().store.retain(|(one, _)| one != name);
    }

    /// The names of what is kept.
    pub fn kept(&self) -> Vec<String> {
        self.lock().store.iter().map(|(name, _)| name.clone()).collect()
    }

    /// Whether a message came, since the last start, that has this line.
    pub fn has_heard(&self, line: &str) -> bool {
        self.count(line) > 0
    }

    /// How many such messages there were.
    pub fn count(&self, line: &str) -> usize {
        self.lock().messages.iter().filter(|message| message.lines().any(|one| one == line)).count()
    }

    /// All messages since the last start.
    pub fn messages(&self) -> Vec<String> {
        self.lock().messages.clone()
    }

    /// What the service said on standard error, over all its starts.
    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// Waits until something holds, and fails when it never does.
    #[track_caller]
    pub fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !holds(self) {
            assert!(begun.elapsed() < LIMIT, "never: {what}: {:?}\n{}", self.messages(), self.said());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        if let Some(mut service) = self.service.take() {
            run::kill_group(&mut service);
        }
        let _ = self.to_listener.send(END);
        if let Some(listener) = self.listener.take() {
            let _ = listener.join();
        }
        self.drop_store();
    }
}

/// Whether a program was ended by that signal.
pub fn was_killed_by(status: ExitStatus, signal: Signal) -> bool {
    status.signal() == Some(signal as i32)
}

/// Hears one message; false at the end.
fn listen(socket: &UnixDatagram, shared: &Mutex<Heard>) -> bool {
    let mut bytes = [0; 4096];
    let mut iov = [IoSliceMut::new(&mut bytes)];
    let mut control = cmsg_space!([RawFd; 4]);
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)
        .expect("a message can be received");
    let mut files = Vec::new();
    for control_message in message.cmsgs().expect("control messages fit") {
        if let ControlMessageOwned::ScmRights(numbers) = control_message {
            #[allow(unsafe_code, reason = "the kernel gives bare numbers")]
            // SAFETY: the kernel has just opened them for this message, and nobody else knows of them.
            files.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
        }
    }
    let n_bytes = message.bytes;
    if &bytes[..n_bytes] == END {
        return false;
    }
    let text = String::from_utf8_lossy(&bytes[..n_bytes]).into_owned();
    let mut heard = shared.lock().unwrap_or_else(PoisonError::into_inner);
    let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored").to_owned();
    if text.lines().any(|line| line == "FDSTORE=1") {
        heard.store.extend(files.into_iter().map(|fd| (name.clone(), fd)));
    }
    if text.lines().any(|line| line == "FDSTOREREMOVE=1") {
        heard.store.retain(|(one, _)| *one != name);
    }
    heard.messages.push(text);
    true
}
