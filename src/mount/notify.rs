//! What the service manager is told, over the datagrams of sd_notify(3): ready, how it goes, still alive, and descriptors to keep.
//!
//! * [`Manager`] is the one that started this process, if there is one.
//! * [`Pulse`] tells it how the mount goes, and that it lives, from a thread of its own.
//!
//! Invariants: nothing here touches the mountpoint; a manager that does not listen is no reason to end.

use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use sd_notify::NotifyState;
use tokio::runtime::Handle;

use crate::report::Report;

/// How often the manager hears how the mount goes, if that has changed.
const STATUS_INTERVAL: Duration = Duration::from_secs(10);

/// How often a thread that may be starting is looked for.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);

/// How long a manager may leave a message waiting.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// The service manager that started this process; without one, nothing here does anything.
#[derive(Debug, Clone, Default)]
pub struct Manager {
    socket: Option<Arc<UnixDatagram>>,
    watchdog: Option<Duration>,
}

impl Manager {
    /// The manager that listens on a socket (`NOTIFY_SOCKET`: a path, or `@` and an abstract name), and that wants to hear of us at least
    /// every `watchdog`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(socket_name: &OsStr, watchdog: Option<Duration>) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        match socket_name.as_bytes() {
            [b'@', name @ ..] => socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?,
            [b'/', ..] => socket.connect(socket_name)?,
            _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a path nor an abstract name")),
        }
        socket.set_write_timeout(Some(SEND_TIMEOUT))?;
        Ok(Self { socket: Some(Arc::new(socket)), watchdog })
    }

    /// Whether there is one.
    pub fn is_there(&self) -> bool {
        self.socket.is_some()
    }

    /// The service does what it is for.
    pub fn ready(&self) {
        self.tell("READY=1");
    }

    /// The service is served by another process than the one that was started.
    pub fn main_pid(&self, pid: u32) {
        self.tell(&format!("MAINPID={pid}"));
    }

    /// The service is ending.
    pub fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    /// How it goes, in a line for people.
    pub fn status(&self, line: &str) {
        self.tell(&format!("STATUS={}", line.replace('\n', " ")));
    }

    /// The service takes up another configuration until the value is dropped.
    pub fn reloading(&self) -> Reloading<'_> {
        // Together with the time, in one message: the manager must not take an older READY for the end of this.
        let now = NotifyState::monotonic_usec_now().map(|now| format!("\n{now}")).unwrap_or_default();
        self.tell(&format!("RELOADING=1{now}"));
        Reloading { manager: self }
    }

    /// Gives the manager an open file to keep while the service is restarted; of the same file a second time it keeps one.
    ///
    /// # Errors
    /// The message cannot be sent. (Whether the file is kept, the manager does not say.)
    pub fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        let Some(socket) = &self.socket else { return Ok(()) };
        let message = format!("FDSTORE=1\nFDNAME={name}");
        let fds = [fd.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        let parts = [IoSlice::new(message.as_bytes())];
        sendmsg::<()>(socket.as_raw_fd(), &parts, &rights, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }

    /// Makes the manager let go of what it keeps under a name.
    pub fn forget(&self, name: &str) {
        self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={name}"));
    }

    fn tell(&self, message: &str) {
        let Some(socket) = &self.socket else { return };
        if let Err(error) = socket.send(message.as_bytes()) {
            tracing::debug!("service manager: {error}");
        }
    }
}

/// A change of configuration that the manager has heard of; at its end the service is ready again.
#[derive(Debug)]
pub struct Reloading<'a> {
    manager: &'a Manager,
}

impl Drop for Reloading<'_> {
    fn drop(&mut self) {
        self.manager.ready();
    }
}

/// Tells the manager how it goes, and that the mount lives, until it is dropped.
#[derive(Debug)]
pub(super) struct Pulse {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Pulse {
    /// Begins; `enter` is run first, on the new thread. The watchdog hears of us as long as the runtime runs tasks and `is_served` holds.
    pub(super) fn start(
        manager: &Manager,
        report: Arc<Report>,
        runtime: Handle,
        enter: impl FnOnce() + Send + 'static,
        is_served: impl Fn() -> bool + Send + 'static,
    ) -> io::Result<Self> {
        if !manager.is_there() {
            return Ok(Self { stop: None, thread: None });
        }
        let manager = manager.clone();
        let (stop, stopped) = mpsc::channel();
        let thread = std::thread::Builder::new().name("notify".into()).spawn(move || {
            enter();
            manager.beat(&report, &stopped, |limit| becomes(&is_served, limit / 2) && runs_tasks(&runtime, limit / 2));
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Manager {
    /// Until `stopped` is closed; `lives` looks for at most so long.
    fn beat(&self, report: &Report, stopped: &mpsc::Receiver<()>, lives: impl Fn(Duration) -> bool) {
        // Half of the time, as sd_watchdog_enabled(3) advises.
        let watch_interval = self.watchdog.map(|watchdog| (watchdog / 2).max(Duration::from_millis(1)));
        let interval = watch_interval.unwrap_or(STATUS_INTERVAL).min(STATUS_INTERVAL);
        let mut said = String::new();
        let mut since_status = STATUS_INTERVAL;
        loop {
            if watch_interval.is_some() {
                match lives(interval / 2) {
                    true => self.tell("WATCHDOG=1"),
                    false => {
                        tracing::error!("the mount is no longer served: the service manager is not told that it lives")
                    }
                }
            }
            if since_status >= STATUS_INTERVAL {
                since_status = Duration::ZERO;
                let line = status_line(report);
                if line != said {
                    self.status(&line);
                    said = line;
                }
            }
            match stopped.recv_timeout(interval) {
                Err(RecvTimeoutError::Timeout) => since_status += interval,
                Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }
}

/// Whether something holds within `limit`: at the first look the threads may only just be starting.
fn becomes(holds: impl Fn() -> bool, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    while !holds() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
    true
}

/// Whether a task is run within `limit`.
fn runs_tasks(runtime: &Handle, limit: Duration) -> bool {
    let (sender, receiver) = mpsc::channel();
    runtime.spawn(async move {
        // Nobody may be waiting any more, which is what is being asked.
        let _ = sender.send(());
    });
    receiver.recv_timeout(limit).is_ok()
}

/// How the mount goes, in a line.
pub(super) fn status_line(report: &Report) -> String {
    let hits = report.n_memory_hits.get() + report.n_disk_hits.get();
    let all = hits + report.n_fetches.get();
    let rate = match (hits * 100).checked_div(all) {
        Some(percent) => format!("{percent} % of {all} chunks from the cache"),
        None => "no chunk read yet".to_owned(),
    };
    let mebibytes = |bytes: u64| bytes >> 20;
    format!(
        "{rate}, {} fetched ({} MiB), {} MiB read, {} errors",
        report.n_fetches.get(),
        mebibytes(report.fetched_bytes.get()),
        mebibytes(report.read_bytes.get()),
        report.eio_text(),
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    use nix::cmsg_space;
    use nix::sys::socket::{ControlMessageOwned, recvmsg};

    fn manager(watchdog: Option<Duration>) -> (UnixDatagram, Manager) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let listener = UnixDatagram::bind(&path).unwrap();
        listener.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let manager = Manager::connect(path.as_os_str(), watchdog).unwrap();
        (listener, manager)
    }

    fn next(listener: &UnixDatagram) -> String {
        let mut bytes = [0; 4096];
        let n_bytes = listener.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..n_bytes].to_vec()).unwrap()
    }

    #[test]
    fn messages_are_those_of_sd_notify() {
        let (listener, manager) = manager(None);
        manager.ready();
        assert_eq!(next(&listener), "READY=1");
        manager.status("a\nb");
        assert_eq!(next(&listener), "STATUS=a b");
        manager.main_pid(7);
        assert_eq!(next(&listener), "MAINPID=7");
        drop(manager.reloading());
        let reloading = next(&listener);
        let (first, time) = reloading.split_once("\nMONOTONIC_USEC=").unwrap();
        assert_eq!(first, "RELOADING=1");
        assert!(time.trim().parse::<u64>().unwrap() > 0);
        assert_eq!(next(&listener), "READY=1");
        manager.forget("fuse");
        assert_eq!(next(&listener), "FDSTOREREMOVE=1\nFDNAME=fuse");
    }

    #[test]
    fn an_abstract_name_is_a_socket_too_and_nobody_there_is_an_error() {
        let name = format!("caifs-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(name.as_bytes()).unwrap();
        let listener = UnixDatagram::bind_addr(&address).unwrap();
        Manager::connect(OsStr::new(&format!("@{name}")), None).unwrap().ready();
        assert_eq!(next(&listener), "READY=1");
        assert!(Manager::connect(OsStr::new("/no/such/socket"), None).is_err());
        assert!(Manager::connect(OsStr::new("socket"), None).is_err());
        Manager::default().ready();
    }

    #[test]
    fn a_file_is_given_to_keep() {
        let (listener, manager) = manager(None);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"kept").unwrap();
        manager.keep("state", file.as_fd()).unwrap();
        let mut bytes = [0; 64];
        let mut iov = [io::IoSliceMut::new(&mut bytes)];
        let mut control = cmsg_space!([std::os::fd::RawFd; 2]);
        let message =
            recvmsg::<()>(listener.as_raw_fd(), &mut iov, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC).unwrap();
        let Some(ControlMessageOwned::ScmRights(fds)) = message.cmsgs().unwrap().next() else { panic!("no file") };
        let n_bytes = message.bytes;
        let mut kept = std::fs::File::open(format!("/proc/self/fd/{}", fds[0])).unwrap();
        nix::unistd::close(fds[0]).unwrap();
        assert_eq!(&bytes[..n_bytes], b"FDSTORE=1\nFDNAME=state");
        let mut text = String::new();
        kept.rewind().unwrap();
        kept.read_to_string(&mut text).unwrap();
        assert_eq!(text, "kept");
    }

    #[test]
    fn the_watchdog_hears_of_a_mount_that_lives_and_of_no_other() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        for lives in [true, false] {
            let (listener, manager) = manager(Some(Duration::from_millis(20)));
            let report = Arc::new(Report::default());
            report.n_fetches.add(1);
            report.n_disk_hits.add(3);
            let handle = runtime.handle().clone();
            let pulse = Pulse::start(&manager, report, handle, || {}, move || lives).unwrap();
            let first = next(&listener);
            match lives {
                true => {
                    assert_eq!(first, "WATCHDOG=1");
                    assert!(next(&listener).starts_with("STATUS=75 % of 4 chunks from the cache, 1 fetched"));
                    let more = [next(&listener), next(&listener)];
                    assert_eq!(more, ["WATCHDOG=1", "WATCHDOG=1"]);
                }
                false => assert!(first.starts_with("STATUS="), "{first}"),
            }
            let begun = Instant::now();
            drop(pulse);
            assert!(begun.elapsed() < STATUS_INTERVAL, "the end does not wait for the next beat");
        }
    }

    #[test]
    fn a_runtime_that_runs_nothing_is_noticed() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        assert!(runs_tasks(runtime.handle(), Duration::from_secs(20)));
        let (sender, receiver) = mpsc::channel::<()>();
        let (began, begun) = mpsc::channel();
        runtime.spawn(async move {
            began.send(()).unwrap();
            let _ = receiver.recv();
        });
        begun.recv().unwrap();
        assert!(!runs_tasks(runtime.handle(), Duration::from_millis(20)));
        drop(sender);
    }
}
