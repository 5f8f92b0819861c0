//! A bad network before a server: a proxy on loopback that breaks requests on script and as a whole.
//!
//! * [`FaultProxy::start`] understands HTTP/1.1 and asks its script about every request; [`FaultProxy::start_raw`] carries any bytes
//!   (SFTP, TLS) and obeys only its [`Mode`].
//! * [`Mode`] is the state of the whole network and can be changed while requests are under way.
//! * [`chosen`] picks a share of the requests, the same ones in every run.
//!
//! A response is read as a whole before it is sent on, with a `Content-Length`; requests go to the server as they came, `Host` included, so
//! that signatures hold. Connections are kept alive on both sides. Everything ends when the proxy is dropped.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};

use super::http::{BodySize, Head, read_chunked, read_exactly};

/// What is written at once; between two pieces the network can go down.
const PIECE_BYTES: usize = 64 << 10;

/// What is done to one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyFault {
    /// It is answered rightly.
    None,
    /// It is answered rightly after this span.
    Latency(Duration),
    /// The connection is reset before anything is answered; the server is not asked.
    Reset,
    /// The connection is reset after half of the body was sent (how much of it arrives is up to the system).
    ResetInBody,
    /// The connection is closed after half of the body, of which all was promised. A body of less than two bytes is lost as a whole.
    Truncate,
    /// The byte in the middle of the body has one bit flipped.
    WrongBytes,
    /// The answer is this status instead; the server is not asked.
    Status {
        /// The status code.
        code: u16,
        /// Seconds for a `Retry-After` header.
        retry_after: Option<u64>,
    },
    /// The body is sent at so many bytes a second.
    Trickle(u64),
    /// It is never answered.
    BlackHole,
}

/// The state of the whole network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Requests are answered as the script says.
    Up,
    /// Nothing is answered, and what is under way stands still; it goes on when the network is up again.
    BlackHole,
    /// Every connection is reset, those under way and new ones.
    Reset,
}

type Script = dyn Fn(u64, &str) -> ProxyFault + Send + Sync;

/// A running proxy.
#[derive(Debug)]
pub struct FaultProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl FaultProxy {
    /// Starts a proxy before an HTTP server. The script is told how many requests there were before this one, and its path without query.
    ///
    /// # Panics
    /// When loopback has no port, or no thread can be started.
    pub fn start(upstream: SocketAddr, script: impl Fn(u64, &str) -> ProxyFault + Send + Sync + 'static) -> Self {
        Self::start_as(upstream, Some(Arc::new(script)))
    }

    /// Starts a proxy before a server of any protocol.
    ///
    /// # Panics
    /// As [`FaultProxy::start`].
    pub fn start_raw(upstream: SocketAddr) -> Self {
        Self::start_as(upstream, None)
    }

    fn start_as(upstream: SocketAddr, script: Option<Arc<Script>>) -> Self {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback has a free port");
        listener.set_nonblocking(true).expect("a socket can be non-blocking");
        let address = listener.local_addr().expect("it is bound");
        let shared = Arc::new(Shared {
            upstream,
            script: Mutex::new(script),
            mode: watch::Sender::new(Mode::Up),
            n_requests: AtomicU64::new(0),
            n_connections: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
            n_of_path: Mutex::default(),
        });
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime starts");
        let served = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            runtime.block_on(async move {
                let listener = TcpListener::from_std(listener).expect("a listener can be polled");
                tokio::select! {
                    _ = stopped => {}
                    () = accept(&served, &listener) => {}
                }
            });
        });
        Self { address, shared, stop: Some(stop), thread: Some(thread) }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// `http://<address>`, without a slash behind.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Changes the state of the network, also for what is under way.
    pub fn set_mode(&self, mode: Mode) {
        self.shared.mode.send_replace(mode);
    }

    /// Changes the script, for requests that are still to come. A raw proxy has none.
    pub fn set_script(&self, script: impl Fn(u64, &str) -> ProxyFault + Send + Sync + 'static) {
        if let Some(old) = lock(&self.shared.script).as_mut() {
            *old = Arc::new(script);
        }
    }

    /// Requests seen so far, whatever became of them.
    pub fn n_requests(&self) -> u64 {
        self.shared.n_requests.load(Ordering::SeqCst)
    }

    /// Requests for one path (without query) seen so far.
    pub fn n_requests_of(&self, path: &str) -> u64 {
        lock(&self.shared.n_of_path).get(path).copied().unwrap_or(0)
    }

    /// Connections accepted so far.
    pub fn n_connections(&self) -> u64 {
        self.shared.n_connections.load(Ordering::SeqCst)
    }

    /// Bytes sent to clients so far, of bodies only; of a raw proxy, all.
    pub fn sent_bytes(&self) -> u64 {
        self.shared.sent_bytes.load(Ordering::SeqCst)
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        // The runtime ends with its thread, and with it every connection.
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Whether request number `n` is among `percent` of 100, by chance, but always the same ones for a seed.
pub fn chosen(seed: u64, n: u64, percent: u64) -> bool {
    // The finalizer of SplitMix64: every bit of the input changes half of the output.
    let mut mixed = n.wrapping_add(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed ^ (mixed >> 31)) % 100 < percent
}

struct Shared {
    upstream: SocketAddr,
    /// `None` for a raw proxy.
    script: Mutex<Option<Arc<Script>>>,
    mode: watch::Sender<Mode>,
    n_requests: AtomicU64,
    n_connections: AtomicU64,
    sent_bytes: AtomicU64,
    n_of_path: Mutex<HashMap<String, u64>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("upstream", &self.upstream).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How a connection to a client ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Close {
    Gently,
    WithReset,
}

async fn accept(shared: &Arc<Shared>, listener: &TcpListener) {
    loop {
        // A failure is that of one connection, or of too many files open: both pass.
        let Ok((client, _)) = listener.accept().await else {
            tokio::task::yield_now().await;
            continue;
        };
        shared.n_connections.fetch_add(1, Ordering::SeqCst);
        tokio::spawn(Arc::clone(shared).serve(client));
    }
}

impl Shared {
    async fn serve(self: Arc<Self>, mut client: TcpStream) {
        let _ = client.set_nodelay(true);
        let mut mode = self.mode.subscribe();
        let script = lock(&self.script).is_some();
        let talk = async {
            match script {
                true => self.talk_http(&mut client).await,
                false => self.carry(&mut client).await,
            }
        };
        let close = tokio::select! {
            biased;
            _ = mode.wait_for(|mode| *mode == Mode::Reset) => Close::WithReset,
            close = talk => close.unwrap_or(Close::WithReset),
        };
        if close == Close::WithReset {
            let _ = client.set_zero_linger();
        }
    }

    /// Waits while the network is a black hole.
    async fn pass(&self) {
        // It cannot be closed: the sender is in `self`.
        let _ = self.mode.subscribe().wait_for(|mode| *mode != Mode::BlackHole).await;
    }

    async fn carry(&self, client: &mut TcpStream) -> io::Result<Close> {
        self.pass().await;
        let mut server = TcpStream::connect(self.upstream).await?;
        server.set_nodelay(true)?;
        let (mut from_client, mut to_client) = client.split();
        let (mut from_server, mut to_server) = server.split();
        let there = async {
            let mut buffer = vec![0; PIECE_BYTES];
            loop {
                let n = from_client.read(&mut buffer).await?;
                self.pass().await;
                if n == 0 {
                    return to_server.shutdown().await;
                }
                to_server.write_all(&buffer[..n]).await?;
            }
        };
        let back = async {
            let mut buffer = vec![0; PIECE_BYTES];
            loop {
                let n = from_server.read(&mut buffer).await?;
                self.pass().await;
                if n == 0 {
                    return to_client.shutdown().await;
                }
                self.sent_bytes.fetch_add(n as u64, Ordering::SeqCst);
                to_client.write_all(&buffer[..n]).await?;
            }
        };
        tokio::try_join!(there, back)?;
        Ok(Close::Gently)
    }

    async fn talk_http(&self, client: &mut TcpStream) -> io::Result<Close> {
        let mut unread = BytesMut::new();
        let mut server = None;
        loop {
            let Some(mut request) = Head::read(client, &mut unread).await? else { return Ok(Close::Gently) };
            let is_last = request.value("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
            let mut words = request.start_line.split(' ');
            let is_head = words.next() == Some("HEAD");
            let path = words.next().unwrap_or_default().split('?').next().unwrap_or_default().to_owned();
            let n_before = self.n_requests.fetch_add(1, Ordering::SeqCst);
            let Some(script) = lock(&self.script).clone() else { return Ok(Close::WithReset) };
            let fault = script(n_before, &path);
            *lock(&self.n_of_path).entry(path).or_default() += 1;

            self.pass().await;
            if request.take("expect").is_some() {
                client.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
            }
            let sent = match request.body_size() {
                BodySize::Chunked => read_chunked(client, &mut unread).await?,
                BodySize::Bytes(n) => read_exactly(client, &mut unread, n).await?,
                // A request without a length has no body.
                BodySize::ToTheEnd => Vec::new(),
            };
            if request.take("transfer-encoding").is_some() {
                request.set("Content-Length", sent.len());
            }
            self.pass().await;

            let (head, mut body) = match fault {
                ProxyFault::Reset => return Ok(Close::WithReset),
                ProxyFault::BlackHole => std::future::pending().await,
                ProxyFault::Status { code, retry_after } => status(code, retry_after),
                _ => self.forward(&mut server, &request, &sent, is_head).await?,
            };
            if is_head {
                body.clear();
            }
            match fault {
                ProxyFault::Latency(span) => tokio::time::sleep(span).await,
                ProxyFault::WrongBytes => {
                    let middle = body.len() / 2;
                    if let Some(byte) = body.get_mut(middle) {
                        *byte ^= 0x10;
                    }
                }
                _ => {}
            }
            let head = head.to_bytes();
            match fault {
                ProxyFault::ResetInBody | ProxyFault::Truncate => {
                    self.send(client, &head, &body[..body.len() / 2]).await?;
                    return Ok(if fault == ProxyFault::Truncate { Close::Gently } else { Close::WithReset });
                }
                ProxyFault::Trickle(rate) => {
                    self.send(client, &head, &[]).await?;
                    // Ten pieces a second, or one byte at a time.
                    let piece = usize::try_from(rate / 10).unwrap_or(usize::MAX).max(1);
                    let pause = Duration::from_secs_f64(piece as f64 / rate.max(1) as f64);
                    for piece in body.chunks(piece) {
                        self.send(client, &[], piece).await?;
                        tokio::time::sleep(pause).await;
                    }
                }
                _ => self.send(client, &head, &body).await?,
            }
            if is_last {
                return Ok(Close::Gently);
            }
        }
    }

    /// Sends a message piece by piece, the first one together with the head.
    async fn send(&self, client: &mut TcpStream, head: &[u8], body: &[u8]) -> io::Result<()> {
        let (first, rest) = body.split_at(body.len().min(PIECE_BYTES));
        self.pass().await;
        // Counted before the client can have it, so that the count is right once the client has all.
        self.sent_bytes.fetch_add(first.len() as u64, Ordering::SeqCst);
        client.write_all(&[head, first].concat()).await?;
        for piece in rest.chunks(PIECE_BYTES) {
            self.pass().await;
            self.sent_bytes.fetch_add(piece.len() as u64, Ordering::SeqCst);
            client.write_all(piece).await?;
        }
        Ok(())
    }

    /// Asks the server, on a connection that is kept; a kept one may have been closed meanwhile, and is replaced once.
    async fn forward(
        &self,
        server: &mut Option<(TcpStream, BytesMut)>,
        request: &Head,
        sent: &[u8],
        is_head: bool,
    ) -> io::Result<(Head, Vec<u8>)> {
        let message = [&request.to_bytes(), sent].concat();
        if let Some(kept) = server.take()
            && let Ok(answer) = ask(server, kept, &message, is_head).await
        {
            return Ok(answer);
        }
        let stream = TcpStream::connect(self.upstream).await?;
        stream.set_nodelay(true)?;
        ask(server, (stream, BytesMut::new()), &message, is_head).await
    }
}

/// Sends a request and reads the answer; the connection is put into `kept` if it can be used again.
async fn ask(
    kept: &mut Option<(TcpStream, BytesMut)>,
    (mut stream, mut unread): (TcpStream, BytesMut),
    message: &[u8],
    is_head: bool,
) -> io::Result<(Head, Vec<u8>)> {
    stream.write_all(message).await?;
    let mut head = loop {
        let head = Head::read(&mut stream, &mut unread).await?.ok_or(ErrorKind::UnexpectedEof)?;
        if !head.status().starts_with('1') {
            break head;
        }
    };
    let mut is_over = head.value("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
    let has_body = !is_head && !matches!(head.status(), "204" | "304");
    let mut body = Vec::new();
    if has_body {
        body = match head.body_size() {
            BodySize::Chunked => read_chunked(&mut stream, &mut unread).await?,
            BodySize::Bytes(n) => read_exactly(&mut stream, &mut unread, n).await?,
            BodySize::ToTheEnd => {
                is_over = true;
                let mut body = unread.split().to_vec();
                stream.read_to_end(&mut body).await?;
                body
            }
        };
        head.take("transfer-encoding");
        head.set("Content-Length", body.len());
    }
    // Of connections each side decides for itself.
    head.take("connection");
    head.take("keep-alive");
    if !is_over {
        *kept = Some((stream, unread));
    }
    Ok((head, body))
}

fn status(code: u16, retry_after: Option<u64>) -> (Head, Vec<u8>) {
    let body = format!("scripted status {code}\n").into_bytes();
    let mut head = Head { start_line: format!("HTTP/1.1 {code} Scripted"), fields: Vec::new() };
    head.set("Content-Type", "text/plain");
    head.set("Content-Length", body.len());
    if let Some(seconds) = retry_after {
        head.set("Retry-After", seconds);
    }
    (head, body)
}
