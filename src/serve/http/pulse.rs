//! Signs of life on a connection: who sends nothing, or takes nothing, is cut off.
//!
//! hyper times the headers of a request, too, but the same clock runs between two requests; here both have their own. A
//! connection is *busy* from the head of a request to the last byte of its answer's body. While it is not, it must begin a request
//! within the idle timeout and complete a head it has begun within the header timeout. What we send must be taken within the
//! idle timeout, always. (How long a request itself may take is no matter of the connection.)

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use super::metrics::Metrics;

/// What is known of a connection by both its reader and the requests on it.
#[derive(Debug)]
pub(super) struct Pulse {
    /// Never held over I/O or await.
    state: Mutex<State>,
    header_timeout: Duration,
    idle_timeout: Duration,
}

#[derive(Debug)]
struct State {
    /// Requests whose answers are not sent yet.
    n_busy: usize,
    /// Since when a head has been coming in.
    head_since: Option<Instant>,
    /// When the last byte came in or the last answer was done.
    quiet_since: Instant,
    /// Whether bytes between requests are no beginning of a head: HTTP/2 sends its own messages there.
    is_multiplexed: bool,
}

/// A request on a connection; the connection is idle when all of them are gone.
#[derive(Debug)]
pub(super) struct Busy {
    pulse: Arc<Pulse>,
}

impl Pulse {
    /// A new connection. Its first head must be there within the header timeout.
    pub(super) fn new(header_timeout: Duration, idle_timeout: Duration) -> Arc<Self> {
        let now = Instant::now();
        let state = State { n_busy: 0, head_since: Some(now), quiet_since: now, is_multiplexed: false };
        Arc::new(Self { state: Mutex::new(state), header_timeout, idle_timeout })
    }

    /// The head of a request has been read.
    pub(super) fn begin(self: &Arc<Self>, version: hyper::Version) -> Busy {
        let mut state = self.lock();
        state.n_busy += 1;
        state.head_since = None;
        state.is_multiplexed = version == hyper::Version::HTTP_2;
        drop(state);
        Busy { pulse: Arc::clone(self) }
    }

    fn has_read(&self) {
        let now = Instant::now();
        let mut state = self.lock();
        state.quiet_since = now;
        if state.n_busy == 0 && !state.is_multiplexed {
            state.head_since.get_or_insert(now);
        }
    }

    /// By when something must come in, and whether it being late now is an end.
    fn read_deadline(&self) -> (Instant, bool) {
        let state = self.lock();
        match (state.n_busy, state.head_since) {
            // Looked at again then.
            (1.., _) => (Instant::now() + self.idle_timeout, false),
            (0, Some(since)) => (since + self.header_timeout, true),
            (0, None) => (state.quiet_since + self.idle_timeout, true),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut state = self.pulse.lock();
        state.n_busy -= 1;
        state.quiet_since = Instant::now();
    }
}

/// A connection with a watch on it, which also counts its bytes.
#[derive(Debug)]
pub(super) struct Watched<S> {
    stream: S,
    pulse: Arc<Pulse>,
    metrics: Arc<Metrics>,
    reading: Option<Pin<Box<Sleep>>>,
    writing: Option<Pin<Box<Sleep>>>,
}

impl<S> Watched<S> {
    pub(super) fn new(stream: S, pulse: Arc<Pulse>, metrics: Arc<Metrics>) -> Self {
        Self { stream, pulse, metrics, reading: None, writing: None }
    }

    /// What a write that waits comes to: it goes on waiting, or its time is over.
    fn write_waits<T>(&mut self, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        let idle_timeout = self.pulse.idle_timeout;
        let sleep = self.writing.get_or_insert_with(|| Box::pin(sleep_until(Instant::now() + idle_timeout)));
        sleep.as_mut().poll(context).map(|()| Err(too_late("the other side takes nothing")))
    }
}

fn too_late(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, what)
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let n_before = buffer.filled().len();
        if let Poll::Ready(read) = Pin::new(&mut this.stream).poll_read(context, buffer) {
            let n_read = buffer.filled().len() - n_before;
            if n_read > 0 {
                this.pulse.has_read();
                this.metrics.received_bytes.add(n_read as u64);
            }
            // A head that comes in byte by byte is late, too, though something is always there.
            return match this.pulse.read_deadline() {
                (deadline, true) if read.is_ok() && n_read > 0 && Instant::now() >= deadline => {
                    Poll::Ready(Err(too_late("a request's head took too long")))
                }
                _ => Poll::Ready(read),
            };
        }
        loop {
            let (deadline, is_end) = this.pulse.read_deadline();
            let sleep = this.reading.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
            if sleep.deadline() != deadline && (is_end || sleep.is_elapsed()) {
                sleep.as_mut().reset(deadline);
            }
            match sleep.as_mut().poll(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(()) if is_end => return Poll::Ready(Err(too_late("nothing came in"))),
                Poll::Ready(()) => {}
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match Pin::new(&mut self.stream).poll_write(context, bytes) {
            Poll::Ready(written) => {
                self.writing = None;
                self.metrics.sent_bytes.add(written.as_ref().map_or(0, |n_bytes| *n_bytes as u64));
                Poll::Ready(written)
            }
            Poll::Pending => self.write_waits(context),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match Pin::new(&mut self.stream).poll_flush(context) {
            Poll::Ready(flushed) => {
                self.writing = None;
                Poll::Ready(flushed)
            }
            Poll::Pending => self.write_waits(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match Pin::new(&mut self.stream).poll_shutdown(context) {
            Poll::Ready(shut) => Poll::Ready(shut),
            Poll::Pending => self.write_waits(context),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match Pin::new(&mut self.stream).poll_write_vectored(context, slices) {
            Poll::Ready(written) => {
                self.writing = None;
                self.metrics.sent_bytes.add(written.as_ref().map_or(0, |n_bytes| *n_bytes as u64));
                Poll::Ready(written)
            }
            Poll::Pending => self.write_waits(context),
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    const HEADER: Duration = Duration::from_secs(30);
    const IDLE: Duration = Duration::from_secs(120);

    fn watched() -> (Watched<DuplexStream>, DuplexStream, Arc<Pulse>) {
        let (ours, theirs) = duplex(64);
        let pulse = Pulse::new(HEADER, IDLE);
        (Watched::new(ours, Arc::clone(&pulse), Arc::default()), theirs, pulse)
    }

    async fn end_of(connection: &mut Watched<DuplexStream>) -> Duration {
        let start = Instant::now();
        let mut buffer = [0; 16];
        loop {
            if let Err(error) = connection.read(&mut buffer).await {
                assert_eq!(error.kind(), io::ErrorKind::TimedOut);
                return start.elapsed();
            }
        }
    }

    fn is_about(span: Duration, wanted: Duration) -> bool {
        (wanted..wanted + Duration::from_millis(50)).contains(&span)
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_head_has_the_header_timeout_and_later_ones_the_idle_timeout_before() {
        let (mut connection, _theirs, _pulse) = watched();
        assert!(is_about(end_of(&mut connection).await, HEADER));
        let (mut connection, _theirs, pulse) = watched();
        drop(pulse.begin(hyper::Version::HTTP_11));
        assert!(is_about(end_of(&mut connection).await, IDLE));
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_drips_in_is_cut_off() {
        let (mut connection, mut theirs, pulse) = watched();
        drop(pulse.begin(hyper::Version::HTTP_11));
        let dripping = async {
            while theirs.write_all(b"x").await.is_ok() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        let end = tokio::select! { end = end_of(&mut connection) => end, () = dripping => Duration::ZERO };
        assert!(is_about(end, HEADER), "{end:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_busy_connection_may_be_silent() {
        let (mut connection, _theirs, pulse) = watched();
        let busy = pulse.begin(hyper::Version::HTTP_11);
        let silent = tokio::time::timeout(10 * IDLE, end_of(&mut connection)).await;
        assert!(silent.is_err());
        drop(busy);
        assert!(is_about(end_of(&mut connection).await, IDLE));
    }

    #[tokio::test(start_paused = true)]
    async fn messages_of_http_2_between_requests_begin_no_head() {
        let (mut connection, mut theirs, pulse) = watched();
        drop(pulse.begin(hyper::Version::HTTP_2));
        theirs.write_all(b"ping").await.unwrap();
        assert!(is_about(end_of(&mut connection).await, IDLE));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_sent_must_be_taken() {
        let (mut connection, _theirs, pulse) = watched();
        let _busy = pulse.begin(hyper::Version::HTTP_11);
        let start = Instant::now();
        let error = connection.write_all(&[0; 100]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(is_about(start.elapsed(), IDLE));
    }
}
