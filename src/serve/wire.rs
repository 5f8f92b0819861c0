//! Frames of the casync protocol over standard input and output.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio::sync::mpsc;

use super::stdio;
use crate::format::protocol::{Decoder, Frame, FrameError};

/// Bytes read from the other side at a time.
const READ_BYTES: usize = 64 << 10;

/// Frames waiting to be sent: each holds a chunk at the most, so this bounds the memory.
const MAX_WAITING_FRAMES: usize = 16;

/// Why a session of the casync protocol failed.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The other side sent what is no frame, or wishes what is not there.
    #[error("{0}")]
    Frame(#[from] FrameError),
    /// A frame that has no place here.
    #[error("the other side sent {0} out of turn")]
    OutOfTurn(&'static str),
    /// The other side gave up.
    #[error("the other side gave up: {0}")]
    Aborted(String),
    /// The other side went away too early.
    #[error("the other side closed the session before everything was sent")]
    Ended,
    /// A stream failed.
    #[error("the session broke: {0}")]
    Io(#[from] io::Error),
    /// What was to be served, or taken, cannot be.
    #[error("{0}")]
    Failed(String),
}

impl SessionError {
    /// The errno to tell the other side.
    pub(super) fn errno(&self) -> u32 {
        let errno = match self {
            Self::Frame(_) | Self::OutOfTurn(_) => libc::EBADMSG,
            Self::Aborted(_) | Self::Ended => libc::ECONNABORTED,
            Self::Io(_) | Self::Failed(_) => libc::EIO,
        };
        errno.unsigned_abs()
    }
}

/// Reads frames from standard input.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    decoder: Decoder,
}

impl Incoming {
    /// The next frame; `None` at the end of the stream. Blocks.
    pub(super) fn next(&mut self) -> Result<Option<Frame>, SessionError> {
        let mut buffer = [0; READ_BYTES];
        loop {
            match self.decoder.next_frame()? {
                Some(Frame::Abort { reason, .. }) => return Err(SessionError::Aborted(reason)),
                Some(frame) => return Ok(Some(frame)),
                None => {}
            }
            match stdio::read(&mut buffer)? {
                0 => {
                    self.decoder.finish()?;
                    return Ok(None);
                }
                n => self.decoder.feed(&buffer[..n]),
            }
        }
    }
}

/// Sends frames to standard output, from a thread of its own.
#[derive(Debug)]
pub(super) struct Outgoing {
    frames: mpsc::Sender<Frame>,
    /// The reader of our output has gone away.
    is_gone: Arc<AtomicBool>,
    thread: JoinHandle<io::Result<()>>,
}

/// Where frames to send are put; waits while too many are waiting.
#[derive(Debug, Clone)]
pub(super) struct Sender {
    frames: mpsc::Sender<Frame>,
    is_gone: Arc<AtomicBool>,
}

impl Outgoing {
    /// Starts the thread. With a limit, no more than so many bytes a second are sent.
    pub(super) fn start(max_bytes_per_second: Option<u64>) -> io::Result<Self> {
        let (frames, waiting) = mpsc::channel(MAX_WAITING_FRAMES);
        let is_gone = Arc::new(AtomicBool::new(false));
        let gone = Arc::clone(&is_gone);
        let thread = std::thread::Builder::new().name("caifs-send".into()).spawn(move || {
            let sent = send_all(waiting, max_bytes_per_second);
            gone.store(sent.is_err(), Ordering::Relaxed);
            sent
        })?;
        Ok(Self { frames, is_gone, thread })
    }

    pub(super) fn sender(&self) -> Sender {
        Sender { frames: self.frames.clone(), is_gone: Arc::clone(&self.is_gone) }
    }

    /// Waits until everything is sent. All senders must be gone.
    pub(super) fn finish(self) -> io::Result<()> {
        drop(self.frames);
        self.thread.join().unwrap_or_else(|_| Err(io::Error::other("the sending thread panicked")))
    }
}

impl Sender {
    /// Queues a frame; false when the other side has gone away.
    pub(super) async fn send(&self, frame: Frame) -> bool {
        self.frames.send(frame).await.is_ok()
    }

    /// [`Sender::send`], for threads that run no futures.
    pub(super) fn send_blocking(&self, frame: Frame) -> bool {
        self.frames.blocking_send(frame).is_ok()
    }

    /// Whether the other side has gone away.
    pub(super) fn is_gone(&self) -> bool {
        self.is_gone.load(Ordering::Relaxed)
    }
}

fn send_all(mut frames: mpsc::Receiver<Frame>, max_bytes_per_second: Option<u64>) -> io::Result<()> {
    let start = Instant::now();
    let mut sent_bytes = 0u64;
    let mut bytes = BytesMut::new();
    while let Some(frame) = frames.blocking_recv() {
        bytes.clear();
        frame.encode(&mut bytes).map_err(io::Error::other)?;
        stdio::write_all(&bytes)?;
        sent_bytes += bytes.len() as u64;
        if let Some(rate) = max_bytes_per_second.filter(|rate| *rate > 0) {
            let due = Duration::from_secs_f64(sent_bytes as f64 / rate as f64);
            std::thread::sleep(due.saturating_sub(start.elapsed()));
        }
    }
    Ok(())
}
