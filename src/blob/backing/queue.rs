//! The way to the thread that fills a backing file: a queue of bounded bytes, and the times when nothing is put into it.
//!
//! Two things make that nothing is taken for a while, each in a [`Rest`] of its own. After a fault of the disk nobody adds anything. When
//! the disk is only slower than the stores, readers add nothing, so that no read waits for it time and again; a warming, which is in no
//! hurry, goes on.
//!
//! Invariants: a reader waits for a place in the queue for a bounded time; who waits for an answer gets one, also when the thread ends.

use std::collections::HashSet;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore, oneshot};

use crate::chunk::Chunk;

/// How long readers add nothing after one has waited in vain for a place in the queue.
const SLOW_REST: Duration = Duration::from_secs(1);

/// How long an end of the mount waits for what is being written.
pub(super) const MAX_CLOSE: Duration = Duration::from_secs(10);

/// How long a reader whose chunk finds the queue full waits for a place in it, at the most.
const MAX_QUEUE_WAIT: Duration = Duration::from_secs(2);

/// Granularity of the queue's budget, in bytes.
const PERMIT_BYTES: u64 = 1024;

/// What the thread is told.
#[derive(Debug)]
pub(super) enum Message {
    /// A verified chunk to write, and who wants to hear whether it is in the file.
    Keep(usize, Chunk, OwnedSemaphorePermit, Option<oneshot::Sender<bool>>),
    /// A claim that a reader found right, and how often pages had been forgotten when it began to look.
    Verified(usize, u64),
    /// Somebody wants what was written to be flushed, and to hear when that is over.
    Flush(oneshot::Sender<()>),
    /// A flush is over.
    Flushed(io::Result<()>),
    End,
}

/// The way to the thread, which ends with it.
#[derive(Debug)]
pub(super) struct Queue {
    sender: Sender<Message>,
    budget: Arc<Semaphore>,
    n_permits: u32,
    max_wait: Duration,
    queued: Arc<Mutex<HashSet<usize>>>,
    rest: Arc<Rest>,
    /// Until when readers add nothing, because the disk is slow.
    slow_rest: Rest,
    ended: Arc<(Mutex<bool>, Condvar)>,
}

/// The thread's end of a queue.
#[derive(Debug)]
pub(super) struct Inbox {
    pub(super) sender: Sender<Message>,
    pub(super) receiver: Receiver<Message>,
    /// Until when nobody adds anything, because the disk failed.
    pub(super) rest: Arc<Rest>,
    /// Chunks on their way; never locked over anything else.
    queued: Arc<Mutex<HashSet<usize>>>,
}

impl Inbox {
    /// A chunk is on its way no longer.
    pub(super) fn arrived(&self, chunk_idx: usize) {
        lock(&self.queued).remove(&chunk_idx);
    }
}

/// Until when nothing is added.
#[derive(Debug)]
pub(super) struct Rest {
    start: Instant,
    until_ms: AtomicU64,
}

impl Rest {
    fn new() -> Self {
        Self { start: Instant::now(), until_ms: AtomicU64::new(0) }
    }

    pub(super) fn is_on(&self) -> bool {
        (self.start.elapsed().as_millis() as u64) < self.until_ms.load(Ordering::Relaxed)
    }

    pub(super) fn left(&self) -> Duration {
        Duration::from_millis(self.until_ms.load(Ordering::Relaxed)).saturating_sub(self.start.elapsed())
    }

    pub(super) fn begin(&self, length: Duration) {
        let until = self.start.elapsed() + length;
        self.until_ms.fetch_max(until.as_millis() as u64, Ordering::Relaxed);
    }
}

impl Queue {
    /// A queue of so many bytes, its other end, and what tells on its drop that the thread has ended. `max_wait` bounds what a reader
    /// waits for a slow disk.
    pub(super) fn new(queue_bytes: u64, max_wait: Duration) -> (Self, Inbox, Told) {
        let (sender, receiver) = channel();
        let n_permits = u32::try_from(queue_bytes / PERMIT_BYTES).unwrap_or(u32::MAX >> 4).clamp(1, u32::MAX >> 4);
        let queue = Self {
            sender: sender.clone(),
            budget: Arc::new(Semaphore::new(n_permits as usize)),
            n_permits,
            max_wait: max_wait.min(MAX_QUEUE_WAIT),
            queued: Arc::default(),
            rest: Arc::new(Rest::new()),
            slow_rest: Rest::new(),
            ended: Arc::default(),
        };
        let (rest, queued) = (Arc::clone(&queue.rest), Arc::clone(&queue.queued));
        let told = Told(Arc::clone(&queue.ended));
        (queue, Inbox { sender, receiver, rest, queued }, told)
    }

    /// Takes a chunk to be written. Waits a little when the disk is slower than the store, and gives up then.
    pub(super) async fn offer(&self, chunk_idx: usize, chunk: &Chunk) {
        if self.rest.is_on() || self.slow_rest.is_on() {
            return;
        }
        // A reader that goes away while it waits must not leave the chunk marked as queued.
        let Some(mark) = Queued::new(&self.queued, chunk_idx) else { return };
        let Ok(Ok(permit)) = tokio::time::timeout(self.max_wait, self.acquire(chunk)).await else {
            self.slow_rest.begin(SLOW_REST);
            return;
        };
        if self.sender.send(Message::Keep(chunk_idx, chunk.clone(), permit, None)).is_ok() {
            mark.keep();
        }
    }

    /// Takes a chunk to be written for somebody who is in no hurry: waits for room as long as the disk takes, and until it is written.
    /// Whether it is in the file then.
    pub(super) async fn keep(&self, chunk_idx: usize, chunk: &Chunk) -> bool {
        if self.rest.is_on() {
            return false;
        }
        // One that is on its way for a reader comes a second time: what becomes of the first nobody would hear.
        let mark = Queued::new(&self.queued, chunk_idx);
        let Ok(permit) = self.acquire(chunk).await else { return false };
        let (answer, is_written) = oneshot::channel();
        if self.sender.send(Message::Keep(chunk_idx, chunk.clone(), permit, Some(answer))).is_err() {
            return false;
        }
        if let Some(mark) = mark {
            mark.keep();
        }
        is_written.await.unwrap_or(false)
    }

    /// Waits until something may be added again after a fault of the disk.
    pub(super) async fn rested(&self) {
        while self.rest.is_on() {
            tokio::time::sleep(self.rest.left().max(Duration::from_millis(1))).await;
        }
    }

    /// Waits until what was written by now was flushed, whatever came of it.
    pub(super) async fn flushed(&self) {
        let (answer, is_over) = oneshot::channel();
        if self.sender.send(Message::Flush(answer)).is_ok() {
            // The thread may end first: it flushes then.
            let _ = is_over.await;
        }
    }

    fn acquire(&self, chunk: &Chunk) -> impl Future<Output = Result<OwnedSemaphorePermit, AcquireError>> + use<> {
        let n_permits = u32::try_from((chunk.plain().len() as u64).div_ceil(PERMIT_BYTES)).unwrap_or(u32::MAX);
        Arc::clone(&self.budget).acquire_many_owned(n_permits.clamp(1, self.n_permits))
    }

    /// Ends the thread, after what was offered has reached the disk. A disk that hangs must not keep the process, so the wait is bounded.
    pub(super) fn close(&self) {
        // The thread may have ended by itself, because the file is complete.
        drop(self.sender.send(Message::End));
        let (ended, condition) = &*self.ended;
        drop(condition.wait_timeout_while(lock(ended), MAX_CLOSE, |ended| !*ended));
    }

    /// Hears that a claim was found right.
    pub(super) fn verified(&self, chunk_idx: usize, n_forgotten: u64) {
        // The thread ends when nothing is left to learn.
        drop(self.sender.send(Message::Verified(chunk_idx, n_forgotten)));
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.close();
    }
}

/// A chunk marked as queued, unless it was.
struct Queued<'a> {
    queued: &'a Mutex<HashSet<usize>>,
    chunk_idx: Option<usize>,
}

impl<'a> Queued<'a> {
    fn new(queued: &'a Mutex<HashSet<usize>>, chunk_idx: usize) -> Option<Self> {
        lock(queued).insert(chunk_idx).then(|| Self { queued, chunk_idx: Some(chunk_idx) })
    }

    fn keep(mut self) {
        self.chunk_idx = None;
    }
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        if let Some(chunk_idx) = self.chunk_idx {
            lock(self.queued).remove(&chunk_idx);
        }
    }
}

/// Tells on drop that the thread has ended.
#[derive(Debug)]
pub(super) struct Told(Arc<(Mutex<bool>, Condvar)>);

impl Drop for Told {
    fn drop(&mut self) {
        let (ended, condition) = &*self.0;
        *lock(ended) = true;
        condition.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::digest::Digest;

    /// A chunk that fills the queue.
    fn chunk() -> Chunk {
        Chunk::of(Digest::Sha512_256, vec![1; PERMIT_BYTES as usize].into())
    }

    fn queue() -> (Queue, Inbox) {
        let (queue, inbox, _) = Queue::new(PERMIT_BYTES, Duration::from_millis(20));
        (queue, inbox)
    }

    /// What the thread finds next: which chunk, and the answer to give.
    fn next(inbox: &Inbox) -> (usize, Option<oneshot::Sender<bool>>) {
        match inbox.receiver.try_recv().unwrap() {
            Message::Keep(chunk_idx, _, _permit, answer) => (chunk_idx, answer),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_slow_disk_keeps_readers_away_and_no_warming() {
        let (queue, inbox) = queue();
        let chunk = chunk();
        queue.offer(0, &chunk).await;
        // There is no place for another one, and the thread is busy.
        queue.offer(1, &chunk).await;
        assert!(queue.slow_rest.is_on() && !inbox.rest.is_on());
        let mut kept = std::pin::pin!(queue.keep(2, &chunk));
        assert!((&mut kept).now_or_never().is_none(), "who is in no hurry waits");
        assert!(queue.offer(3, &chunk).now_or_never().is_some(), "nobody else does");
        assert_eq!(next(&inbox).0, 0);
        assert!((&mut kept).now_or_never().is_none());
        let (chunk_idx, answer) = next(&inbox);
        assert_eq!(chunk_idx, 2);
        answer.unwrap().send(true).unwrap();
        assert!(kept.await);
        // What was not taken is not taken for being on its way.
        inbox.arrived(0);
        inbox.arrived(2);
        assert!(lock(&queue.queued).is_empty());
    }

    #[tokio::test]
    async fn after_a_fault_of_the_disk_nobody_adds_anything() {
        let (queue, inbox) = queue();
        inbox.rest.begin(Duration::from_millis(50));
        assert!(!queue.keep(0, &chunk()).await);
        queue.offer(0, &chunk()).await;
        assert!(inbox.receiver.try_recv().is_err());
        queue.rested().await;
        assert!(!inbox.rest.is_on());
        queue.offer(0, &chunk()).await;
        assert_eq!(next(&inbox).0, 0);
    }

    #[tokio::test]
    async fn who_waits_hears_what_became_of_a_chunk_that_a_reader_has_offered_too() {
        let (queue, inbox) = queue();
        let chunk = chunk();
        queue.offer(7, &chunk).await;
        let mut kept = std::pin::pin!(queue.keep(7, &chunk));
        assert!((&mut kept).now_or_never().is_none());
        assert!(next(&inbox).1.is_none(), "the reader asks for no answer");
        inbox.arrived(7);
        assert!((&mut kept).now_or_never().is_none());
        next(&inbox).1.unwrap().send(false).unwrap();
        assert!(!kept.await);
        // The thread ends without an answer.
        let mut kept = std::pin::pin!(queue.keep(8, &chunk));
        assert!((&mut kept).now_or_never().is_none());
        drop(inbox);
        assert!(!kept.await);
        queue.flushed().await;
    }
}
