//! One answer for each request: at once when the volume has it in memory, else from a task, by the deadline in any case.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant, SystemTime};

use fuser::Errno;
use futures_util::FutureExt;
use tokio::runtime::Handle;

use super::gate::Gate;
use super::requests::Requests;
use super::trace::{Trace, TraceLine};
use crate::cache::source::{self, Source};
use crate::report::Report;
use crate::volume::{EioSite, VolumeError};

/// What every reply can do: refuse.
pub(super) trait Refuse: Send + 'static {
    /// Answers with an errno.
    fn refuse(self, errno: Errno);
}

macro_rules! refuse {
    ($($reply:ty),*) => {
        $(impl Refuse for $reply {
            fn refuse(self, errno: Errno) {
                self.error(errno);
            }
        })*
    };
}

refuse!(
    fuser::ReplyAttr,
    fuser::ReplyData,
    fuser::ReplyDirectory,
    fuser::ReplyDirectoryPlus,
    fuser::ReplyEntry,
    fuser::ReplyIoctl,
    fuser::ReplyXattr
);

/// What a request is, for the log and for whoever looks from outside.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    /// Name of the request.
    pub(super) op: &'static str,
    /// Inode it is about.
    pub(super) ino: u64,
    /// First byte of a read, or where a listing goes on.
    pub(super) offset: u64,
    /// Bytes of a read.
    pub(super) n_bytes: u32,
}

/// Answers requests.
#[derive(Debug)]
pub(super) struct Answerer {
    runtime: Handle,
    requests: Arc<Requests>,
    report: Arc<Report>,
    gate: Arc<Gate>,
}

type Caught<T> = Result<Result<T, VolumeError>, Box<dyn std::any::Any + Send>>;

impl Answerer {
    pub(super) fn new(runtime: Handle, requests: Arc<Requests>, report: Arc<Report>, gate: Arc<Gate>) -> Self {
        Self { runtime, requests, report, gate }
    }

    /// By when a request is answered that comes now.
    pub(super) fn io_timeout(&self) -> Duration {
        self.requests.io_timeout()
    }

    /// Polls the future once on this thread. What is ready is sent at once; else reply and future move into a task.
    pub(super) fn answer<T, R, F, S>(&self, asked: Asked, future: F, reply: R, send: S)
    where
        T: Send + 'static,
        R: Refuse,
        F: Future<Output = Result<T, VolumeError>> + Send + 'static,
        S: FnOnce(R, T) + Send + 'static,
    {
        let since = Instant::now();
        let passed = self.gate.pass();
        // Futures start tasks and timers already at their first poll.
        let _context = self.runtime.enter();
        let caught = AssertUnwindSafe(future).catch_unwind();
        // Where bytes come from is of interest to the trace only.
        let mut caught: Pin<Box<dyn Future<Output = (Caught<T>, Source)> + Send>> = match self.requests.trace() {
            None => Box::pin(caught.map(|outcome| (outcome, Source::Memory))),
            Some(_) => Box::pin(source::watched(caught)),
        };
        // The waker of the task takes this one's place at the second poll, so nothing is lost that happens in between.
        if let Poll::Ready((outcome, source)) = caught.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            let done = Done { asked, since, source, trace: self.requests.trace() };
            finish(&self.report, done, outcome, reply, send);
            return;
        }
        let entered = self.requests.enter(asked, since);
        let (report, requests) = (Arc::clone(&self.report), Arc::clone(&self.requests));
        tokio::spawn(async move {
            let _waiting = report.requests_in_flight.enter();
            let io_timeout = requests.io_timeout();
            let (outcome, source) = match tokio::time::timeout(io_timeout, caught).await {
                Ok(outcome) => outcome,
                Err(_) => {
                    let why = format!("no answer within the io-timeout of {} s", io_timeout.as_secs_f32());
                    (Ok(Err(VolumeError::io(EioSite::Deadline, why))), Source::Store)
                }
            };
            // Out of the table before its answer: who has the answer must not see it wait.
            drop(entered);
            drop(_waiting);
            let done = Done { asked, since, source, trace: requests.trace() };
            finish(&report, done, outcome, reply, send);
            drop(passed);
        });
    }
}

/// A request that has an answer.
struct Done<'a> {
    asked: Asked,
    since: Instant,
    source: Source,
    trace: Option<&'a Arc<Trace>>,
}

impl Done<'_> {
    /// Counts it, and writes it down if somebody wants that.
    fn count(&self, report: &Report, errno: i32) {
        let Asked { op, ino, offset, n_bytes } = self.asked;
        let took = self.since.elapsed();
        report.count_op(op);
        if op == "read" {
            report.read_latency.observe(took);
        }
        if let Some(trace) = self.trace {
            let source = (errno == 0).then_some(self.source);
            trace.write(TraceLine { at: SystemTime::now(), op, ino, offset, n_bytes, source, took, errno });
        }
    }
}

/// Sends the answer; logs and counts it when it is an error. The one place where the answer of a request is logged.
fn finish<T, R: Refuse>(report: &Report, done: Done<'_>, outcome: Caught<T>, reply: R, send: impl FnOnce(R, T)) {
    let error = match outcome {
        Ok(Ok(answer)) => {
            done.count(report, 0);
            return send(reply, answer);
        }
        Ok(Err(error)) => error,
        Err(_) => {
            report.n_panics.add(1);
            VolumeError::io(
                EioSite::Panic,
                "a panic was caught; please report it with the lines logged before this one",
            )
        }
    };
    error.count(report);
    done.count(report, error.errno());
    let Asked { op, ino, .. } = done.asked;
    // Before the log, which may lie on a disk that hangs.
    reply.refuse(Errno::from_i32(error.errno()));
    match error.level() {
        tracing::Level::WARN => tracing::warn!(op, ino, "{error}"),
        _ => tracing::debug!(op, ino, "{error}"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    struct TestReply(mpsc::Sender<Result<u32, i32>>);

    impl Refuse for TestReply {
        fn refuse(self, errno: Errno) {
            self.0.send(Err(errno.code())).unwrap();
        }
    }

    fn ask(
        future: impl Future<Output = Result<u32, VolumeError>> + Send + 'static,
    ) -> (Result<u32, i32>, Arc<Report>, bool) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let report = Arc::new(Report::default());
        let requests = Arc::new(Requests::new(Duration::from_millis(200)));
        let answerer =
            Answerer::new(runtime.handle().clone(), Arc::clone(&requests), Arc::clone(&report), Arc::default());
        let (sender, receiver) = mpsc::channel();
        let this_thread = std::thread::current().id();
        let (thread_sender, thread_receiver) = mpsc::channel();
        answerer.answer(
            Asked { op: "read", ino: 1, offset: 0, n_bytes: 1 },
            future,
            TestReply(sender),
            move |reply, n| {
                thread_sender.send(std::thread::current().id()).unwrap();
                reply.0.send(Ok(n)).unwrap();
            },
        );
        let answer = receiver.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!((requests.n_in_flight(), report.requests_in_flight.get()), (0, 0));
        assert_eq!(report.read_latency.snapshot().n(), 1);
        let on_this_thread = thread_receiver.try_recv().is_ok_and(|thread| thread == this_thread);
        (answer, report, on_this_thread)
    }

    #[test]
    fn what_is_ready_is_answered_on_the_asking_thread() {
        let (answer, _, on_this_thread) = ask(async { Ok(7) });
        assert_eq!((answer, on_this_thread), (Ok(7), true));
    }

    #[test]
    fn what_is_not_ready_is_answered_from_a_task() {
        let (answer, _, on_this_thread) = ask(async {
            tokio::time::sleep(Duration::from_millis(5)).await;
            Ok(8)
        });
        assert_eq!((answer, on_this_thread), (Ok(8), false));
    }

    #[test]
    fn what_never_comes_is_answered_with_eio_by_the_deadline() {
        let (answer, report, _) = ask(std::future::pending());
        assert_eq!(answer, Err(libc::EIO));
        assert_eq!(report.eio[EioSite::Deadline.number()].get(), 1);
    }

    #[test]
    fn a_panic_is_answered_with_eio_and_counted() {
        for late in [false, true] {
            let (answer, report, _) = ask(async move {
                if late {
                    tokio::task::yield_now().await;
                }
                panic!("scripted")
            });
            assert_eq!(answer, Err(libc::EIO));
            assert_eq!((report.n_panics.get(), report.eio[EioSite::Panic.number()].get()), (1, 1));
        }
    }
}
