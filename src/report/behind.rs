//! Writing behind the backs of those who must not wait: a bounded queue, and a thread that takes from it.
//!
//! [`Behind`] is where those put things who have some; [`Sink`] is what writes them, on the thread.
//!
//! Invariants: who has something to write never waits for what takes it (a disk that hangs): what does not fit into the queue is lost,
//! and whoever had it hears so; the end waits for a bounded time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long the end waits for what takes what is written, and how often it looks.
const END_LIMIT: Duration = Duration::from_secs(2);
const END_PAUSE: Duration = Duration::from_millis(1);

/// What writes, on a thread of its own.
pub trait Sink<T>: Send + 'static {
    /// Writes it, or keeps it for a while.
    fn write(&mut self, item: T);

    /// How soon [`Sink::flush`] is to be called if nothing comes; `None` for not at all.
    fn due(&self) -> Option<Duration>;

    /// Writes what was kept for long enough; at the end, all that was kept.
    fn flush(&mut self, is_end: bool);

    /// Opens again what somebody may have moved away.
    fn reopen(&mut self);
}

/// A queue, and the thread that takes from it.
#[derive(Debug)]
pub struct Behind<T> {
    queue: SyncSender<Message<T>>,
    is_to_reopen: Arc<AtomicBool>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
enum Message<T> {
    Item(T),
    /// There is something to do beside items.
    Look,
    End,
}

impl<T: Send + 'static> Behind<T> {
    /// Starts the thread. At the most `max_waiting` items are in the queue; `enter` is run first on the thread.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(
        thread_name: &str,
        max_waiting: usize,
        enter: impl FnOnce() + Send + 'static,
        mut sink: impl Sink<T>,
    ) -> std::io::Result<Self> {
        let (queue, received) = sync_channel(max_waiting);
        let is_to_reopen = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&is_to_reopen);
        let thread = std::thread::Builder::new().name(thread_name.into()).spawn(move || {
            enter();
            run(&mut sink, &received, max_waiting, &asked);
        })?;
        Ok(Self { queue, is_to_reopen, writer: Mutex::new(Some(thread)) })
    }

    /// Has it written soon; `false` if it is lost.
    pub fn write(&self, item: T) -> bool {
        self.queue.try_send(Message::Item(item)).is_ok()
    }

    /// Has [`Sink::reopen`] called before the next item.
    pub fn reopen(&self) {
        self.is_to_reopen.store(true, Ordering::Relaxed);
        // If there is no room, it is looked at with one of the items that are there.
        drop(self.queue.try_send(Message::Look));
    }

    /// Writes what waits, and ends; `false` if that took too long, and what waits is lost. So is what comes after this.
    pub fn finish(&self) -> bool {
        let Some(thread) = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take() else { return true };
        let deadline = Instant::now() + END_LIMIT;
        let mut is_told = false;
        while !thread.is_finished() {
            // There is room in the queue as soon as something is taken. The writer is gone if nothing more is.
            is_told = is_told || !matches!(self.queue.try_send(Message::End), Err(TrySendError::Full(_)));
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(END_PAUSE);
        }
        // A panic of the sink was told of by its own message.
        drop(thread.join());
        true
    }
}

fn run<T>(sink: &mut impl Sink<T>, received: &Receiver<Message<T>>, max_waiting: usize, is_to_reopen: &AtomicBool) {
    loop {
        let message = match sink.due() {
            Some(due) => received.recv_timeout(due),
            None => received.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        if is_to_reopen.swap(false, Ordering::Relaxed) {
            sink.reopen();
        }
        match message {
            Ok(Message::Item(item)) => sink.write(item),
            Ok(Message::Look) => {}
            Err(RecvTimeoutError::Timeout) => sink.flush(false),
            Ok(Message::End) | Err(RecvTimeoutError::Disconnected) => {
                // What came while the end was asked for; no more than has room, lest the end never comes.
                for message in received.try_iter().take(max_waiting) {
                    if let Message::Item(item) = message {
                        sink.write(item);
                    }
                }
                return sink.flush(true);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Sender, channel};

    /// Writes when it is let, and tells what it did.
    struct Held {
        let_through: Receiver<()>,
        done: Sender<String>,
    }

    impl Sink<u32> for Held {
        fn write(&mut self, item: u32) {
            let _ = self.let_through.recv();
            let _ = self.done.send(item.to_string());
        }

        fn due(&self) -> Option<Duration> {
            None
        }

        fn flush(&mut self, is_end: bool) {
            let _ = self.done.send(format!("flush {is_end}"));
        }

        fn reopen(&mut self) {
            let _ = self.done.send("reopen".into());
        }
    }

    #[test]
    fn who_writes_never_waits_and_hears_what_is_lost() {
        let (let_one, let_through) = channel();
        let (done, all) = channel();
        let begun = done.clone();
        let enter = move || begun.send("enter".into()).unwrap();
        let behind = Behind::start("test", 2, enter, Held { let_through, done }).unwrap();
        assert!(behind.write(0));
        // The thread has the first one and waits; two more have room.
        let mut n_taken = 0;
        while n_taken < 2 {
            n_taken += u32::from(behind.write(n_taken + 1));
        }
        assert!(!behind.write(9), "there is no room");
        behind.reopen();
        drop(let_one);
        assert!(behind.finish() && behind.finish());
        assert!(!behind.write(10), "it has ended");
        let mut all: Vec<String> = all.iter().collect();
        let reopened = all.iter().position(|done| done == "reopen").unwrap();
        assert!(reopened < all.iter().position(|done| done == "1").unwrap(), "{all:?}");
        all.remove(reopened);
        assert_eq!(all, ["enter", "0", "1", "2", "flush true"]);
    }

    #[test]
    fn the_end_does_not_wait_for_what_hangs() {
        let (let_one, let_through) = channel::<()>();
        let (done, _all) = channel();
        let behind = Behind::start("test", 1, || {}, Held { let_through, done }).unwrap();
        assert!(behind.write(0));
        assert!(!behind.finish());
        drop(let_one);
    }
}
