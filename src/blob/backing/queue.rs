//! The way to the thread that fills a backing file: a queue of bounded bytes, and the times when nothing is put into it.
//!
//! Two things make that nothing is taken for a while, each in a [`Rest`] of its own. After a fault of the disk nobody adds anything. When
//! the disk is only slower than the stores, readers add nothing, so that no read waits for it time and again; a warming, which is in no
//! hurry, goes on. It has half of the queue at the most, and as long as it waits for room no reader does.
//!
//! Invariants: a read waits for places in the queue for a bounded time, however many chunks it has; who waits for an answer gets one, also
//! when the thread ends.

use std::collections::HashSet;
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::Instant as Deadline;

use crate::chunk::Chunk;

/// How long nothing is added after a failure, or after a reader has waited in vain; each doubles it, up to the longest.
pub(super) const FIRST_REST: Duration = Duration::from_secs(1);
pub(super) const LONGEST_REST: Duration = Duration::from_secs(60);

/// How long an end of the mount waits for what is being written.
const MAX_CLOSE: Duration = Duration::from_secs(10);

/// How long a read whose chunks find the queue full waits for places in it, at the most.
const MAX_QUEUE_WAIT: Duration = Duration::from_secs(2);

/// Granularity of the queue's budget, in bytes.
const PERMIT_BYTES: u64 = 1024;

/// What the thread is told.
#[derive(Debug)]
pub(super) enum Message {
    /// A verified chunk to write, and who wants to hear whether it is in the file.
    Keep(usize, Chunk, Room, Option<oneshot::Sender<bool>>),
    /// A claim that a reader found right, and how often pages had been forgotten when it began to look.
    Verified(usize, u64),
    /// Somebody wants what was written to be flushed, and to hear when that is over.
    Flush(oneshot::Sender<()>),
    /// A flush is over.
    Flushed(io::Result<()>),
    End,
}

/// A place in the queue, until this is dropped.
#[derive(Debug)]
pub(super) struct Room {
    _of_all: OwnedSemaphorePermit,
    _of_unhurried: Option<OwnedSemaphorePermit>,
}

/// The way to the thread, which [`Queue::close`] ends.
#[derive(Debug)]
pub(super) struct Queue {
    sender: Sender<Message>,
    budget: Arc<Semaphore>,
    n_permits: u32,
    /// What those may have of the budget who are in no hurry.
    unhurried: Arc<Semaphore>,
    n_unhurried_permits: u32,
    /// Those of them who wait for room.
    n_waiting_unhurried: AtomicUsize,
    max_wait: Duration,
    pub(super) max_close: Duration,
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
    /// The last length that [`Rest::begin_again`] gave it.
    length: Mutex<Duration>,
}

impl Rest {
    fn new() -> Self {
        Self { start: Instant::now(), until_ms: AtomicU64::new(0), length: Mutex::default() }
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

    /// Begins one, unless one is on, after what began at `since` went wrong: twice as long as the last one if that did not help for as long
    /// as it was.
    fn begin_again(&self, since: Instant) {
        let mut length = lock(&self.length);
        if self.is_on() {
            return;
        }
        let end = self.start + Duration::from_millis(self.until_ms.load(Ordering::Relaxed));
        *length = match since.saturating_duration_since(end) < *length {
            true => (2 * *length).min(LONGEST_REST),
            false => FIRST_REST,
        };
        self.begin(*length);
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
            unhurried: Arc::new(Semaphore::new((n_permits / 2).max(1) as usize)),
            n_unhurried_permits: (n_permits / 2).max(1),
            n_waiting_unhurried: AtomicUsize::new(0),
            max_wait: max_wait.min(MAX_QUEUE_WAIT),
            max_close: MAX_CLOSE,
            queued: Arc::default(),
            rest: Arc::new(Rest::new()),
            slow_rest: Rest::new(),
            ended: Arc::default(),
        };
        let (rest, queued) = (Arc::clone(&queue.rest), Arc::clone(&queue.queued));
        let told = Told(Arc::clone(&queue.ended));
        (queue, Inbox { sender, receiver, rest, queued }, told)
    }

    /// Takes the chunks of a read to be written. When the disk is slower than the store it waits a little, for all of them together and until
    /// `by` at the most, and gives up then.
    pub(super) async fn offer(&self, chunks: impl Iterator<Item = (usize, &Chunk)>, by: Deadline) {
        let by = by.min(Deadline::now() + self.max_wait);
        for (chunk_idx, chunk) in chunks {
            if self.rest.is_on() || self.slow_rest.is_on() {
                return;
            }
            // A reader that goes away while it waits must not leave the chunk marked as queued.
            let Some(mark) = Queued::new(&self.queued, chunk_idx) else { continue };
            let Some(room) = self.room_by(by, chunk).await else { continue };
            if self.sender.send(Message::Keep(chunk_idx, chunk.clone(), room, None)).is_ok() {
                mark.keep();
            }
        }
    }

    async fn room_by(&self, by: Deadline, chunk: &Chunk) -> Option<Room> {
        let n_permits = self.n_permits(chunk);
        let permit = match Arc::clone(&self.budget).try_acquire_many_owned(n_permits) {
            Ok(permit) => permit,
            // Nobody waits in one line with a warming, nor once there is no time left.
            Err(_) if self.n_waiting_unhurried.load(Ordering::Relaxed) > 0 || by <= Deadline::now() => return None,
            Err(_) => {
                let since = Instant::now();
                match tokio::time::timeout_at(by, Arc::clone(&self.budget).acquire_many_owned(n_permits)).await {
                    Ok(permit) => permit.ok()?,
                    Err(_) => {
                        self.slow_rest.begin_again(since);
                        return None;
                    }
                }
            }
        };
        Some(Room { _of_all: permit, _of_unhurried: None })
    }

    /// Takes a chunk to be written for somebody who is in no hurry: waits for room as long as the disk takes, and until it is written.
    /// Whether it is in the file then.
    pub(super) async fn keep(&self, chunk_idx: usize, chunk: &Chunk) -> bool {
        if self.rest.is_on() {
            return false;
        }
        // One that is on its way for a reader comes a second time: what becomes of the first nobody would hear.
        let mark = Queued::new(&self.queued, chunk_idx);
        let Some(room) = self.room(chunk).await else { return false };
        let (answer, is_written) = oneshot::channel();
        if self.sender.send(Message::Keep(chunk_idx, chunk.clone(), room, Some(answer))).is_err() {
            return false;
        }
        if let Some(mark) = mark {
            mark.keep();
        }
        is_written.await.unwrap_or(false)
    }

    async fn room(&self, chunk: &Chunk) -> Option<Room> {
        let _waiting = Waiting::new(&self.n_waiting_unhurried);
        let n_permits = self.n_permits(chunk);
        let n_unhurried = n_permits.min(self.n_unhurried_permits);
        // Neither is ever closed.
        let of_unhurried = Arc::clone(&self.unhurried).acquire_many_owned(n_unhurried).await.ok()?;
        let of_all = Arc::clone(&self.budget).acquire_many_owned(n_permits).await.ok()?;
        Some(Room { _of_all: of_all, _of_unhurried: Some(of_unhurried) })
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

    fn n_permits(&self, chunk: &Chunk) -> u32 {
        let n_permits = u32::try_from((chunk.plain().len() as u64).div_ceil(PERMIT_BYTES)).unwrap_or(u32::MAX);
        n_permits.clamp(1, self.n_permits)
    }

    /// Ends the thread, after what was offered has reached the disk. A disk that hangs must not keep the process, so the wait is bounded.
    /// Whether the thread has ended.
    pub(super) fn close(&self) -> bool {
        // The thread may have ended by itself, because the file is complete.
        drop(self.sender.send(Message::End));
        let (ended, condition) = &*self.ended;
        let waited = condition.wait_timeout_while(lock(ended), self.max_close, |ended| !*ended);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Hears that a claim was found right.
    pub(super) fn verified(&self, chunk_idx: usize, n_forgotten: u64) {
        // The thread ends when nothing is left to learn.
        drop(self.sender.send(Message::Verified(chunk_idx, n_forgotten)));
    }
}

/// Somebody who waits, until this is dropped.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(n_waiting: &'a AtomicUsize) -> Self {
        n_waiting.fetch_add(1, Ordering::Relaxed);
        Self(n_waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
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
    use futures_util::{FutureExt, StreamExt};

    use super::*;
    use crate::digest::Digest;

    /// A chunk that fills the queue.
    fn chunk() -> Chunk {
        Chunk::of(Digest::Sha512_256, vec![1; PERMIT_BYTES as usize].into())
    }

    const MAX_WAIT: Duration = Duration::from_millis(20);

    fn queue() -> (Queue, Inbox) {
        queue_of(1)
    }

    /// A queue of so many chunks.
    fn queue_of(n_chunks: u64) -> (Queue, Inbox) {
        let (queue, inbox, _) = Queue::new(n_chunks * PERMIT_BYTES, MAX_WAIT);
        (queue, inbox)
    }

    impl Queue {
        /// Offers a chunk for a read that has time.
        async fn offer_one(&self, chunk_idx: usize, chunk: &Chunk) {
            let by = Deadline::now() + Duration::from_secs(60);
            self.offer([(chunk_idx, chunk)].into_iter(), by).await;
        }
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
        queue.offer_one(0, &chunk).await;
        // There is no place for another one, and the thread is busy.
        queue.offer_one(1, &chunk).await;
        assert!(queue.slow_rest.is_on() && !inbox.rest.is_on());
        let mut kept = std::pin::pin!(queue.keep(2, &chunk));
        assert!((&mut kept).now_or_never().is_none(), "who is in no hurry waits");
        assert!(queue.offer_one(3, &chunk).now_or_never().is_some(), "nobody else does");
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

    #[tokio::test(start_paused = true)]
    async fn a_read_waits_once_for_all_of_its_chunks_and_not_longer_than_it_has() {
        let (queue, inbox) = queue();
        let chunk = chunk();
        let chunks = || (0..16).map(|chunk_idx| (chunk_idx, &chunk));
        // A disk that takes a chunk just before each wait is over.
        let disk = async {
            loop {
                tokio::time::sleep(MAX_WAIT - Duration::from_millis(1)).await;
                let (chunk_idx, _) = next(&inbox);
                inbox.arrived(chunk_idx);
            }
        };
        let start = Deadline::now();
        tokio::select! {
            () = queue.offer(chunks(), start + Duration::from_secs(60)) => {}
            () = disk => {}
        }
        assert!(start.elapsed() <= MAX_WAIT + Duration::from_millis(2), "{:?}", start.elapsed());
        assert!(queue.slow_rest.is_on());

        let (queue, inbox) = self::queue();
        assert!(queue.offer(chunks(), Deadline::now()).now_or_never().is_some(), "there is no time left");
        assert!(!queue.slow_rest.is_on(), "nothing was learnt of the disk");
        assert_eq!(next(&inbox).0, 0);
        assert_eq!(lock(&queue.queued).len(), 1);
    }

    #[tokio::test]
    async fn readers_do_not_wait_behind_a_warming_and_have_room_beside_it() {
        let (queue, inbox) = queue_of(4);
        let chunk = chunk();
        let mut warming = futures_util::stream::FuturesUnordered::new();
        for chunk_idx in 100..116 {
            warming.push(queue.keep(chunk_idx, &chunk));
        }
        assert!(warming.next().now_or_never().is_none());
        for chunk_idx in 0..16 {
            assert!(queue.offer_one(chunk_idx, &chunk).now_or_never().is_some(), "a reader waits");
        }
        assert!(!queue.slow_rest.is_on());
        let taken: Vec<_> = std::iter::from_fn(|| inbox.receiver.try_recv().ok()).collect();
        let numbers = taken.iter().map(|message| match message {
            Message::Keep(chunk_idx, ..) => *chunk_idx,
            other => panic!("{other:?}"),
        });
        assert_eq!(numbers.collect::<Vec<_>>(), [100, 101, 0, 1]);
        drop(taken);
        assert!(warming.next().now_or_never().flatten().is_some());
        assert_eq!(next(&inbox).0, 102, "it goes on");
    }

    #[test]
    fn a_rest_that_did_not_help_is_followed_by_a_longer_one() {
        let rest = Rest::new();
        // It ended when it began, and then something goes wrong so much later.
        let again = |later: Duration| {
            rest.until_ms.store(0, Ordering::Relaxed);
            rest.begin_again(rest.start + later);
            assert!(rest.is_on());
            *lock(&rest.length)
        };
        let secs = Duration::from_secs;
        let lengths = [0, 0, 1, 3, 8, 1, 2].map(|later| again(secs(later)));
        assert_eq!(lengths, [1, 2, 4, 8, 1, 1, 1].map(secs));
        for _ in 0..10 {
            again(secs(0));
        }
        assert_eq!(*lock(&rest.length), LONGEST_REST);
        // What went wrong for others at the same time says nothing new.
        rest.until_ms.store(0, Ordering::Relaxed);
        rest.begin_again(rest.start + secs(100));
        rest.begin_again(rest.start);
        assert_eq!(*lock(&rest.length), FIRST_REST);
    }

    #[tokio::test]
    async fn after_a_fault_of_the_disk_nobody_adds_anything() {
        let (queue, inbox) = queue();
        inbox.rest.begin(Duration::from_millis(50));
        assert!(!queue.keep(0, &chunk()).await);
        queue.offer_one(0, &chunk()).await;
        assert!(inbox.receiver.try_recv().is_err());
        queue.rested().await;
        assert!(!inbox.rest.is_on());
        queue.offer_one(0, &chunk()).await;
        assert_eq!(next(&inbox).0, 0);
    }

    #[tokio::test]
    async fn who_waits_hears_what_became_of_a_chunk_that_a_reader_has_offered_too() {
        let (queue, inbox) = queue();
        let chunk = chunk();
        queue.offer_one(7, &chunk).await;
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
