//! The sessions of a store: a bounded number, each used by one request at a time.
//!
//! A request waits for its turn without a thread. Then it takes a kept session, or logs in (few at once, as servers refuse
//! many unfinished logins), and works on a blocking thread. Its value is handed out before the file is closed, which saves the reader
//! a round trip.
//!
//! Invariant: whoever stops waiting (deadline, or dropped) has the connection cut: the thread then ends at once, and its
//! session is not used again.

use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::session::{Fault, Session, Target};

/// Logins at once. OpenSSH begins to refuse at 10 unfinished ones, counted over all its clients (MaxStartups).
const MAX_LOGINS_AT_ONCE: usize = 4;

/// What a piece of work made.
pub struct Done<T> {
    /// For the one who asked.
    pub value: T,
    /// A file to be closed when the value is on its way.
    pub open: Option<ssh2::File>,
}

impl<T> std::fmt::Debug for Done<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Done").field("is_open", &self.open.is_some()).finish_non_exhaustive()
    }
}

impl<T> Done<T> {
    /// A value, and no file left open.
    pub fn with(value: T) -> Self {
        Self { value, open: None }
    }
}

/// The sessions of a store.
#[derive(Debug)]
pub struct Pool {
    target: Arc<Target>,
    timeout: Duration,
    n_sessions: usize,
    /// One permit a session in use.
    turns: Arc<Semaphore>,
    /// One permit a login.
    logins: Arc<Semaphore>,
    /// Sessions not in use; the one used last is taken first.
    idle: Idle,
}

type Idle = Arc<Mutex<Vec<Session>>>;

/// Where the session of a request comes from.
enum Start {
    Kept(Session),
    Login(TcpStream, OwnedSemaphorePermit),
}

/// Cuts a connection, unless the request was done with it.
struct Cut(Option<TcpStream>);

impl Drop for Cut {
    fn drop(&mut self) {
        if let Some(socket) = &self.0 {
            // The connection may be gone already.
            drop(socket.shutdown(Shutdown::Both));
        }
    }
}

impl Pool {
    /// A pool of at most `n_sessions` (at least one); none is made yet.
    pub fn new(target: Target, n_sessions: usize, timeout: Duration) -> Self {
        let n_sessions = n_sessions.clamp(1, Semaphore::MAX_PERMITS);
        Self {
            target: Arc::new(target),
            timeout,
            n_sessions,
            turns: Arc::new(Semaphore::new(n_sessions)),
            logins: Arc::new(Semaphore::new(MAX_LOGINS_AT_ONCE)),
            idle: Idle::default(),
        }
    }

    /// Does a piece of work on a session within the timeout, which begins when it is its turn. The wait for that is as long at the most.
    pub async fn run<T, W>(&self, work: W) -> Result<T, Fault>
    where
        T: Send + 'static,
        W: Fn(&Session) -> Result<Done<T>, Fault> + Clone + Send + 'static,
    {
        let turn = tokio::time::timeout(self.timeout, Arc::clone(&self.turns).acquire_owned());
        let Ok(Ok(turn)) = turn.await else {
            return Err(Fault::Broken(format!("all {} sessions were busy for {:?}", self.n_sessions, self.timeout)));
        };
        match tokio::time::timeout(self.timeout, self.run_now(Arc::new(turn), work)).await {
            Ok(done) => done,
            Err(_) => {
                // What keeps one session from being answered keeps the others.
                self.forget_kept();
                Err(Fault::Broken(format!("timed out after {:?}", self.timeout)))
            }
        }
    }

    async fn run_now<T, W>(&self, turn: Arc<OwnedSemaphorePermit>, work: W) -> Result<T, Fault>
    where
        T: Send + 'static,
        W: Fn(&Session) -> Result<Done<T>, Fault> + Clone + Send + 'static,
    {
        if let Some(session) = self.kept() {
            let socket = session.socket();
            match self.work_on(Start::Kept(session), socket, &turn, work.clone()).await {
                // The server has ended the session since, and the others with it: a new one is made at once.
                Err(Fault::Broken(why)) => {
                    tracing::debug!("sftp://{}: a kept session is gone: {why}", self.target.host);
                    self.forget_kept();
                }
                done => return done,
            }
        }
        let closed = |_| Fault::Broken("no login".to_owned());
        let login = Arc::clone(&self.logins).acquire_owned().await.map_err(closed)?;
        // While waiting for others to log in, one of them may have become free.
        let (start, socket) = match self.kept() {
            Some(session) => {
                let socket = session.socket();
                (Start::Kept(session), socket)
            }
            None => {
                let stream = self.target.connect().await?;
                let socket = stream.try_clone();
                (Start::Login(stream, login), socket)
            }
        };
        self.work_on(start, socket, &turn, work).await
    }

    /// A session that is kept and lives, as far as it can be told without asking.
    fn kept(&self) -> Option<Session> {
        loop {
            let session = lock(&self.idle).pop()?;
            if !session.is_closed() {
                return Some(session);
            }
        }
    }

    /// Ends the sessions that are kept.
    fn forget_kept(&self) {
        let kept = std::mem::take(&mut *lock(&self.idle));
        drop(kept);
    }

    /// Does the work on a blocking thread, which has the turn until the session is free again.
    async fn work_on<T, W>(
        &self,
        start: Start,
        socket: std::io::Result<TcpStream>,
        turn: &Arc<OwnedSemaphorePermit>,
        work: W,
    ) -> Result<T, Fault>
    where
        T: Send + 'static,
        W: FnOnce(&Session) -> Result<Done<T>, Fault> + Send + 'static,
    {
        let mut cut = Cut(Some(socket.map_err(|error| Fault::Broken(error.to_string()))?));
        let (sender, receiver) = oneshot::channel();
        let (target, idle, turn) = (Arc::clone(&self.target), Arc::clone(&self.idle), Arc::clone(turn));
        tokio::task::spawn_blocking(move || {
            let started = match start {
                Start::Kept(session) => Ok(session),
                Start::Login(stream, login) => {
                    let started = Session::start(&target, stream);
                    drop(login);
                    started
                }
            };
            let done = started.and_then(|session| match work(&session) {
                Ok(done) => Ok((session, done)),
                Err(fault) => {
                    if fault.keeps_session() {
                        lock(&idle).push(session);
                    }
                    Err(fault)
                }
            });
            match done {
                // Who does not wait any more does not need the reason either.
                Err(fault) => drop(sender.send(Err(fault))),
                Ok((session, Done { value, open: None })) => {
                    // Free before the answer, so that whoever asks next finds it.
                    lock(&idle).push(session);
                    drop(sender.send(Ok(value)));
                }
                Ok((session, Done { value, open: Some(mut file) })) => {
                    let is_wanted = sender.send(Ok(value)).is_ok();
                    if file.close().is_ok() && is_wanted {
                        lock(&idle).push(session);
                    }
                }
            }
            drop(turn);
        });
        match receiver.await {
            Ok(result) => {
                // A session that failed has been dropped, which cuts it; one that did not is used again.
                cut.0 = None;
                result
            }
            Err(_) => Err(Fault::Broken("the request's thread ended without an answer".to_owned())),
        }
    }
}

/// Nothing is done under this lock that could leave the list half changed.
fn lock(idle: &Mutex<Vec<Session>>) -> std::sync::MutexGuard<'_, Vec<Session>> {
    idle.lock().unwrap_or_else(PoisonError::into_inner)
}
