//! Servers under test: started on loopback, on a free port, and ended by their pid whatever happens.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::run;

/// How long a server may take until its port answers.
const READY_LIMIT: Duration = Duration::from_secs(30);

/// A running server, killed on drop with everything it started.
#[derive(Debug)]
pub struct Server {
    child: Child,
    /// The port on loopback that it answers on.
    pub port: u16,
}

impl Server {
    /// Starts a server that stays in the foreground and waits until its port answers. What it says goes to the test's standard error.
    ///
    /// # Panics
    /// When it cannot be started, ends, or does not answer in time.
    #[track_caller]
    pub fn start(command: &mut Command, port: u16) -> Self {
        let shown = run::shown(command);
        command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        let child = command.spawn().unwrap_or_else(|error| panic!("cannot start {shown}: {error}"));
        let mut server = Self { child, port };
        let start = Instant::now();
        while TcpStream::connect_timeout(&server.address(), Duration::from_millis(200)).is_err() {
            let ended = server.child.try_wait().expect("a child can be waited for");
            assert!(ended.is_none(), "{shown}: ended ({ended:?}) before it answered");
            assert!(start.elapsed() < READY_LIMIT, "{shown}: no answer on port {port} after {READY_LIMIT:?}");
            thread::sleep(Duration::from_millis(5));
        }
        server
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// Waits for its end, which something else must bring about, and gives its status; `None` when it is late.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        run::wait(&mut self.child, limit)
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        run::kill_group(&mut self.child);
    }
}

/// A port on loopback that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback has a free port");
    listener.local_addr().expect("it is bound").port()
}
