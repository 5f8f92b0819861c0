//! One session of the casync protocol: a process that runs the far end, and what was asked of it.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;

use super::{StoreError, Stored};
use crate::chunk::codec::Form;
use crate::digest::ChunkId;
use crate::format::protocol::{Decoder, Features, Frame, FrameError, check_session};

/// The most of the far end's last words that is kept, in bytes.
const MAX_SAID_BYTES: usize = 4096;

/// After so many answers another session is begun, so that the ids remembered stay few.
const MAX_ANSWERED: usize = 1 << 18;

/// What ssh says when asking again cannot help.
const REFUSALS: [&str; 3] = ["Permission denied", "Host key verification failed", "Too many authentication failures"];

/// What the far end says of a file that is not there, whichever program it is.
const NO_SUCH_FILE: &str = "No such file or directory";

/// Which place of the far end's command line the path of a session stands in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slot {
    /// A plain archive.
    Archive,
    /// An index.
    Index,
    /// A store.
    Store,
}

impl Slot {
    /// The number of its word behind `pull`.
    pub(super) fn position(self) -> usize {
        match self {
            Self::Archive => 1,
            Self::Index => 2,
            Self::Store => 3,
        }
    }

    fn wish(self) -> Features {
        match self {
            Self::Archive => Features::PULL_ARCHIVE,
            Self::Index => Features::PULL_INDEX,
            Self::Store => Features::PULL_CHUNKS,
        }
    }
}

/// How a far end is started.
#[derive(Debug, Clone)]
pub(super) struct Far {
    /// The store's name, for messages.
    pub(super) store: String,
    pub(super) program: OsString,
    pub(super) args: Vec<OsString>,
}

type Answer = Result<Option<Stored>, StoreError>;

/// What is asked of a session.
struct Request {
    id: ChunkId,
    answer: oneshot::Sender<Answer>,
}

/// A session that chunks are asked of. Its process ends when it is dropped.
#[derive(Debug)]
pub(super) struct Session {
    store: String,
    requests: mpsc::UnboundedSender<Request>,
    n_outstanding: Arc<AtomicUsize>,
    answered: Answered,
    task: AbortHandle,
}

/// Ids that the far end has answered: casync answers each only once in a session, and is silent when it is asked again.
type Answered = Arc<Mutex<HashSet<ChunkId>>>;

impl Session {
    /// Starts the far end; what is asked is sent when it has said hello.
    pub(super) fn begin(far: Far) -> Result<Self, StoreError> {
        let store = far.store.clone();
        let wire = Wire::open(far)?;
        let (requests, asked) = mpsc::unbounded_channel();
        let n_outstanding = Arc::new(AtomicUsize::new(0));
        let answered = Answered::default();
        let task = tokio::spawn(serve(wire, asked, Arc::clone(&answered))).abort_handle();
        Ok(Self { store, requests, n_outstanding, answered, task })
    }

    /// Whether this chunk can still be asked for here.
    pub(super) fn can_ask_for(&self, id: ChunkId) -> bool {
        let answered = lock(&self.answered);
        !answered.contains(&id) && answered.len() < MAX_ANSWERED
    }

    pub(super) fn is_alive(&self) -> bool {
        !self.requests.is_closed()
    }

    /// Requests not answered yet.
    pub(super) fn n_outstanding(&self) -> usize {
        self.n_outstanding.load(Ordering::Relaxed)
    }

    /// Asks for a chunk.
    pub(super) async fn fetch(&self, id: ChunkId) -> Answer {
        let (answer, answered) = oneshot::channel();
        let _count = Count::of(&self.n_outstanding);
        let lost =
            || StoreError::transient(self.store.clone(), format!("{}/{id}", self.store), "the session has ended");
        self.requests.send(Request { id, answer }).map_err(|_| lost())?;
        answered.await.unwrap_or_else(|_| Err(lost()))
    }

    /// Ends the session and its process.
    pub(super) fn end(&self) {
        self.task.abort();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.end();
    }
}

/// One request outstanding, also of an asker that goes away.
struct Count<'a>(&'a AtomicUsize);

impl<'a> Count<'a> {
    fn of(counter: &'a AtomicUsize) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(counter)
    }
}

impl Drop for Count<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Sends requests and hands out answers until the session fails.
async fn serve(mut wire: Wire, mut asked: mpsc::UnboundedReceiver<Request>, answered: Answered) {
    let mut waiting: HashMap<ChunkId, Vec<oneshot::Sender<Answer>>> = HashMap::new();
    let failure = loop {
        match step(&mut wire, &mut asked, &mut waiting, &answered).await {
            Ok(true) => {}
            // Nobody can ask any more.
            Ok(false) => return,
            Err(error) => break error,
        }
    };
    asked.close();
    let failure = wire.explained(failure).await;
    while let Ok(Request { id, answer }) = asked.try_recv() {
        waiting.entry(id).or_default().push(answer);
    }
    for (id, answers) in waiting {
        for answer in answers {
            let object = format!("{}/{id}", failure.store);
            // Whoever went away needs no answer.
            let _ = answer.send(Err(StoreError { object, ..failure.clone() }));
        }
    }
}

/// One request or one piece of the stream; false when the askers are gone.
async fn step(
    wire: &mut Wire,
    asked: &mut mpsc::UnboundedReceiver<Request>,
    waiting: &mut HashMap<ChunkId, Vec<oneshot::Sender<Answer>>>,
    answered: &Answered,
) -> Result<bool, StoreError> {
    // Requests go out after the hello of the far end, which no other frame may precede.
    let frame = if wire.is_greeted {
        tokio::select! {
            request = asked.recv() => {
                let Some(Request { id, answer }) = request else { return Ok(false) };
                if lock(answered).contains(&id) {
                    // Answered between the choice of this session and now.
                    let _ = answer.send(Err(wire.error("the far end has answered this already")));
                    return Ok(true);
                }
                let answers = waiting.entry(id).or_default();
                answers.push(answer);
                if answers.len() == 1 {
                    wire.send(&Frame::Request { is_urgent: true, ids: vec![id] }).await?;
                }
                return Ok(true);
            }
            frame = wire.next() => frame?,
        }
    } else {
        wire.greet(Slot::Store.wish()).await?;
        return Ok(true);
    };
    let (id, stored) = match frame {
        Frame::Chunk { is_compressed, id, data } => {
            let form = if is_compressed { Form::Compressed } else { Form::Plain };
            (id, Some(Stored { form, bytes: data }))
        }
        Frame::Missing(id) => (id, None),
        other => return Err(wire.unexpected(&other)),
    };
    let Some(answers) = waiting.remove(&id) else {
        return Err(wire.error(format!("the far end sent chunk {id}, which nobody asked for")));
    };
    lock(answered).insert(id);
    for answer in answers {
        let _ = answer.send(Ok(stored.clone()));
    }
    Ok(true)
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What came of pulling a file.
#[derive(Debug)]
pub(super) enum Pulled {
    /// There is no such file.
    Missing,
    /// Its content.
    Content(Bytes),
    /// It is longer than allowed.
    TooLong,
}

/// Pulls an index or archive as a whole.
pub(super) async fn pull(far: Far, slot: Slot, max_bytes: u64) -> Result<Pulled, StoreError> {
    let mut wire = Wire::open(far)?;
    match pull_all(&mut wire, slot, max_bytes).await {
        Err(error) => {
            let error = wire.explained(error).await;
            if wire.is_missing { Ok(Pulled::Missing) } else { Err(error) }
        }
        pulled => pulled,
    }
}

async fn pull_all(wire: &mut Wire, slot: Slot, max_bytes: u64) -> Result<Pulled, StoreError> {
    wire.greet(slot.wish()).await?;
    let mut content = BytesMut::new();
    loop {
        match wire.next().await? {
            Frame::Index(data) if slot == Slot::Index => content.extend_from_slice(&data),
            Frame::Archive(data) if slot == Slot::Archive => content.extend_from_slice(&data),
            Frame::IndexEof if slot == Slot::Index => break,
            Frame::ArchiveEof if slot == Slot::Archive => break,
            other => return Err(wire.unexpected(&other)),
        }
        if content.len() as u64 > max_bytes {
            return Ok(Pulled::TooLong);
        }
    }
    // The far end takes the end of the stream for an answer, too.
    let _ = wire.send(&Frame::Goodbye).await;
    Ok(Pulled::Content(content.freeze()))
}

/// The streams of a far end.
struct Wire {
    far: Far,
    /// Killed on drop.
    child: Child,
    stdin: ChildStdin,
    stdout: ChildStdout,
    decoder: Decoder,
    /// The last line of what it said on standard error.
    said: Arc<Mutex<String>>,
    saying: Option<tokio::task::JoinHandle<()>>,
    is_greeted: bool,
    /// It has told why it gave up, so what it says on standard error is the same again.
    has_aborted: bool,
    /// It ended because there is no such file there.
    is_missing: bool,
}

impl Wire {
    fn open(far: Far) -> Result<Self, StoreError> {
        let fail = |reason: String| StoreError::new(far.store.clone(), far.store.clone(), reason);
        let mut command = Command::new(&far.program);
        command.args(&far.args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child =
            command.spawn().map_err(|error| fail(format!("cannot start {}: {error}", far.program.display())))?;
        let (Some(stdin), Some(stdout), Some(mut stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(fail("the process has no streams".to_owned()));
        };
        let said = Arc::new(Mutex::new(String::new()));
        let heard = Arc::clone(&said);
        let saying = tokio::spawn(async move {
            let mut last = Vec::new();
            let mut buffer = [0; 1024];
            while let Ok(n @ 1..) = stderr.read(&mut buffer).await {
                last.extend_from_slice(&buffer[..n]);
                let from = last.len().saturating_sub(MAX_SAID_BYTES);
                last.drain(..from);
                let text = String::from_utf8_lossy(&last);
                let line = text.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
                line.clone_into(&mut lock(&heard));
            }
        });
        let (decoder, saying) = (Decoder::default(), Some(saying));
        Ok(Self {
            far,
            child,
            stdin,
            stdout,
            decoder,
            said,
            saying,
            is_greeted: false,
            has_aborted: false,
            is_missing: false,
        })
    }

    /// Says hello and waits for that of the far end.
    async fn greet(&mut self, wish: Features) -> Result<(), StoreError> {
        let sent = self.send(&Frame::Hello(wish)).await;
        // Who does not listen has mostly said why, and what it said tells more than the broken pipe.
        match self.next().await? {
            Frame::Hello(theirs) => check_session(wish, theirs).map_err(|error| self.broken(&error))?,
            other => return Err(self.unexpected(&other)),
        }
        sent?;
        self.is_greeted = true;
        Ok(())
    }

    async fn send(&mut self, frame: &Frame) -> Result<(), StoreError> {
        let mut bytes = BytesMut::new();
        frame.encode(&mut bytes).map_err(|error| self.broken(&error))?;
        let sent = async {
            self.stdin.write_all(&bytes).await?;
            self.stdin.flush().await
        };
        let sent = sent.await;
        sent.map_err(|error| self.error(format!("the session broke: {error}")))
    }

    /// The next frame. Nothing is lost when this is dropped before it is done.
    async fn next(&mut self) -> Result<Frame, StoreError> {
        loop {
            if let Some(frame) = self.decoder.next_frame().map_err(|error| self.broken(&error))? {
                return Ok(frame);
            }
            let read = self.stdout.read_buf(self.decoder.buffer()).await;
            match read {
                Ok(0) => {
                    self.decoder.finish().map_err(|error| self.broken(&error))?;
                    return Err(self.error("the far end closed the session"));
                }
                Ok(_) => {}
                Err(error) => return Err(self.error(format!("the session broke: {error}"))),
            }
        }
    }

    fn error(&self, reason: impl ToString) -> StoreError {
        StoreError::transient(self.far.store.clone(), self.far.store.clone(), reason)
    }

    fn broken(&self, error: &FrameError) -> StoreError {
        self.error(error)
    }

    fn unexpected(&mut self, frame: &Frame) -> StoreError {
        match frame {
            Frame::Abort { reason, .. } => {
                self.has_aborted = true;
                self.error(format!("the far end gave up: {reason}"))
            }
            other => self.error(format!("the far end sent {} out of turn", other.name())),
        }
    }

    /// The error with the last words of the far end, which mostly say why.
    async fn explained(&mut self, error: StoreError) -> StoreError {
        /// How long the process may take to end by itself, and its last words to arrive.
        const LAST_WORDS: std::time::Duration = std::time::Duration::from_millis(500);
        let status = tokio::time::timeout(LAST_WORDS, self.child.wait()).await;
        if let Some(saying) = self.saying.take() {
            let _ = tokio::time::timeout(LAST_WORDS, saying).await;
        }
        let said = lock(&self.said).clone();
        // ssh ends with 255 for its own failures, a shell with 127 and 126 if there is no such command: asking again helps the first only.
        let code = status.ok().and_then(Result::ok).and_then(|status| status.code());
        // Who is not let in, or does not trust the host, only makes more log entries there by asking again.
        let is_refused = !self.is_greeted && REFUSALS.iter().any(|refusal| said.contains(refusal));
        let reason = match said.is_empty() || self.has_aborted {
            true => error.reason,
            false => format!("{}: {said}", error.reason),
        };
        let has_no_command = matches!(code, Some(126 | 127));
        self.is_missing = !has_no_command && reason.contains(NO_SUCH_FILE);
        let is_transient = error.is_transient && !has_no_command && !is_refused && !self.is_missing;
        StoreError { reason, is_transient, ..error }
    }
}
