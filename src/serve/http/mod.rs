//! What the servers share: from listening to an answer on the wire, for HTTP/1.1 and HTTP/2, with and without TLS.
//!
//! * [`HttpConfig`] says where and how to listen; [`Server`] does it, until it is told to end, and then finishes what it has begun.
//! * `request` takes one request through authorization, the reserved names, limits and the access log to a [`Service`],
//!   which makes the [`Answer`].
//! * `pulse` cuts off who sends or takes nothing; `tls` reads certificates; [`metrics`] counts; [`signals`] end and reload.
//!
//! Invariant: everything is bounded: connections, requests being answered, bytes of uploads, the time of each step. Connections
//! above the limit wait in the system's queue, which has a limit of its own.

mod access_log;
mod answer;
pub mod metrics;
mod pulse;
mod request;
pub mod signals;
mod tls;

pub use access_log::LogTarget;
pub use answer::{Answer, Body};
pub use tls::TlsFiles;

use std::fmt::{Debug, Display};
use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use hyper::body::Incoming;
use hyper::http::request::Parts;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_rustls::TlsAcceptor;

use crate::store::Secret;
use access_log::AccessLog;
use metrics::Metrics;
use pulse::{Pulse, Watched};

/// How long nothing is accepted when the system has no descriptor left for a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Requests at a time on one HTTP/2 connection.
const MAX_STREAMS: u32 = 128;

/// Bytes an HTTP/2 client may send ahead: enough that a far one uploads chunks without waiting.
const WINDOW_BYTES: u32 = 1 << 20;

/// What makes answers.
pub trait Service: Debug + Send + Sync + 'static {
    /// Looks at a request before its body is read: how many bytes of it are taken at the most (0 for none), or why it is refused.
    ///
    /// # Errors
    /// The refusal.
    fn admit(&self, head: &Parts) -> Result<u64, Box<Answer>>;

    /// Answers a request that was admitted. An answer to HEAD needs no body, but may have that of GET, which is not sent then.
    fn answer<'a>(&'a self, head: &'a Parts, body: Bytes) -> BoxFuture<'a, Answer>;

    /// Reads again what it was set up with; what was before stays on failure. Called on a thread that may block.
    ///
    /// # Errors
    /// Why it cannot be read, as text for people.
    fn reload(&self) -> Result<(), String> {
        Ok(())
    }

    /// Adds numbers of its own to the metrics.
    fn render_metrics(&self, _text: &mut String) {}
}

/// Where and how to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpConfig {
    /// Addresses as `host:port`; without host all addresses, `[::1]:80` for IPv6, and `http` and `https` are ports, too.
    pub listen: Vec<String>,
    /// Certificates; none for plain HTTP.
    pub tls: Option<TlsFiles>,
    /// What the `Authorization` header of each request must be.
    pub authorization: Option<Secret>,
    /// Where a line for each request goes.
    pub access_log: Option<LogTarget>,
    /// What a client may take of time and room.
    pub limits: Limits,
}

/// What clients may take of time and room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// From connecting, or the first byte of a later request, to the end of the request's head. For the TLS handshake, too.
    pub header_timeout: Duration,
    /// Between requests; and for the other side to take something of what is sent.
    pub idle_timeout: Duration,
    /// For a body to come in; and then again for its answer to be made.
    pub request_timeout: Duration,
    /// For requests that are being answered when the server is told to end.
    pub drain_timeout: Duration,
    /// Connections at a time.
    pub max_connections: usize,
    /// Requests being answered at a time; others wait.
    pub max_requests: usize,
    /// Bytes of uploads in memory at a time; others wait. One that is larger counts as much as this.
    pub upload_budget_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // As desync's servers.
            header_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(120),
            request_timeout: Duration::from_secs(300),
            drain_timeout: Duration::from_secs(30),
            max_connections: 1024,
            max_requests: 256,
            upload_budget_bytes: 512 << 20,
        }
    }
}

/// Why a server cannot be set up: on what, and the reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{object}: {reason}")]
pub struct ServeError {
    object: String,
    reason: String,
}

impl ServeError {
    /// An error on something.
    pub fn new(object: impl Display, reason: impl Display) -> Self {
        Self { object: object.to_string(), reason: reason.to_string() }
    }
}

/// A server that listens, and answers when it is [run](Server::run).
#[derive(Debug)]
pub struct Server {
    listeners: Vec<TcpListener>,
    shared: Arc<Shared>,
}

/// What every connection needs.
#[derive(Debug)]
struct Shared {
    service: Arc<dyn Service>,
    limits: Limits,
    tls_files: Option<TlsFiles>,
    /// Replaced as a whole on reload; held only to clone.
    tls: RwLock<Option<Arc<rustls::ServerConfig>>>,
    authorization: Option<Secret>,
    access_log: Option<AccessLog>,
    metrics: Arc<Metrics>,
    connections: Arc<Semaphore>,
    requests: Semaphore,
    /// In KiB.
    uploads: Semaphore,
}

impl Server {
    /// Listens. Connections wait in the system's queue until [`Server::run`].
    ///
    /// # Errors
    /// An address cannot be read or is taken; certificates or the log cannot be opened.
    pub async fn bind(config: HttpConfig, service: Arc<dyn Service>) -> Result<Self, ServeError> {
        let tls = config.tls.as_ref().map(tls::server_config).transpose()?;
        let access_log = match config.access_log {
            None => None,
            Some(target) => {
                let shown = format!("log {target:?}");
                Some(AccessLog::open(target).map_err(|error| ServeError::new(shown, error))?)
            }
        };
        let mut listeners = Vec::with_capacity(config.listen.len());
        for address in &config.listen {
            listeners.push(listen(address).await?);
        }
        let limits = config.limits;
        let shared = Arc::new(Shared {
            service,
            limits,
            tls_files: config.tls,
            tls: RwLock::new(tls),
            authorization: config.authorization,
            access_log,
            metrics: Arc::default(),
            connections: Arc::new(Semaphore::new(limits.max_connections)),
            requests: Semaphore::new(limits.max_requests),
            uploads: Semaphore::new(request::upload_permits(limits.upload_budget_bytes) as usize),
        });
        Ok(Self { listeners, shared })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// What the system answers.
    pub fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        self.listeners.iter().map(TcpListener::local_addr).collect()
    }

    /// Answers requests until `end`; then takes no more, finishes those it has within the drain timeout, and returns. Each value
    /// that comes out of `reloads` (which may end at any time) makes it read settings, certificates and the name of its log again.
    pub async fn run(self, end: impl Future<Output = ()>, mut reloads: tokio::sync::mpsc::Receiver<()>) {
        let (closing, is_closing) = watch::channel(false);
        let accepting: Vec<_> = self
            .listeners
            .into_iter()
            .map(|listener| tokio::spawn(accept(Arc::clone(&self.shared), listener, is_closing.clone())))
            .collect();
        drop(is_closing);
        tokio::pin!(end);
        loop {
            tokio::select! {
                () = &mut end => break,
                Some(()) = reloads.recv() => self.shared.clone().reload().await,
            }
        }
        for task in &accepting {
            // Connections that are served have tasks of their own.
            task.abort();
        }
        closing.send_replace(true);
        if tokio::time::timeout(self.shared.limits.drain_timeout, closing.closed()).await.is_err() {
            tracing::warn!("{} connections are cut off: they are not done in time", closing.receiver_count());
        }
    }
}

/// Listens on an address as typed. Without a host on all addresses, of IPv6, too, where there is IPv6.
async fn listen(address: &str) -> Result<TcpListener, ServeError> {
    let (host, port) =
        split_address(address).map_err(|reason| ServeError::new(format!("listen on {address}"), reason))?;
    let bound = match host {
        "" => match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
            Err(error)
                if error.kind() != io::ErrorKind::AddrInUse && error.kind() != io::ErrorKind::PermissionDenied =>
            {
                TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await
            }
            bound => bound,
        },
        host => TcpListener::bind((host, port)).await,
    };
    bound.map_err(|error| ServeError::new(format!("listen on {address}"), error))
}

/// Host and port of an address as Go writes them.
fn split_address(address: &str) -> Result<(&str, u16), &'static str> {
    let (host, port) = address.rsplit_once(':').ok_or("an address is host:port, or :port for all addresses")?;
    let port = match port {
        "http" => 80,
        "https" => 443,
        number => number.parse().map_err(|_| "the port must be a number up to 65535, http or https")?,
    };
    let host = match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').ok_or("the ] behind the address is missing")?,
        None if host.contains(':') => return Err("an IPv6 address stands in brackets: [::1]:80"),
        None => host,
    };
    Ok((host, port))
}

async fn accept(shared: Arc<Shared>, listener: TcpListener, is_closing: watch::Receiver<bool>) {
    loop {
        match listener.accept().await {
            Ok((stream, client)) => {
                // After it is accepted, so that no listener holds room for a client that another one has: this one waits, and
                // the others behind it in the system's queue.
                let Ok(permit) = Arc::clone(&shared.connections).acquire_owned().await else { return };
                tokio::spawn(connection(Arc::clone(&shared), stream, client, is_closing.clone(), permit));
            }
            // A connection that its client gave up is its own matter; a lack of descriptors or memory passes.
            Err(error) => {
                tracing::warn!("cannot accept a connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Serves one connection to its end.
async fn connection(
    shared: Arc<Shared>,
    stream: TcpStream,
    client: SocketAddr,
    mut is_closing: watch::Receiver<bool>,
    permit: OwnedSemaphorePermit,
) {
    let _permit = permit;
    let metrics = Arc::clone(&shared.metrics);
    let _counted = metrics.connection();
    // Answers are short, and the next request waits for the last packet of each.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!("{client}: {error}");
    }
    let tls = shared.tls.read().unwrap_or_else(PoisonError::into_inner).clone();
    let Some(config) = tls else { return serve(shared, stream, client, is_closing).await };
    let handshake = tokio::time::timeout(shared.limits.header_timeout, TlsAcceptor::from(config).accept(stream));
    let shaken = tokio::select! {
        shaken = handshake => shaken,
        _ = is_closing.wait_for(|is_closing| *is_closing) => return,
    };
    match shaken {
        Ok(Ok(stream)) => serve(shared, stream, client, is_closing).await,
        Ok(Err(error)) => tracing::debug!("{client}: TLS: {error}"),
        Err(_) => tracing::debug!("{client}: TLS: the handshake took too long"),
    }
}

async fn serve<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    shared: Arc<Shared>,
    stream: S,
    client: SocketAddr,
    mut is_closing: watch::Receiver<bool>,
) {
    let pulse = Pulse::new(shared.limits.header_timeout, shared.limits.idle_timeout);
    let stream = TokioIo::new(Watched::new(stream, Arc::clone(&pulse), Arc::clone(&shared.metrics)));
    let mut builder = auto::Builder::new(TokioExecutor::new());
    // The pulse keeps the time of heads.
    builder.http1().timer(TokioTimer::new()).header_read_timeout(None);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES);
    let service = service_fn(move |incoming: hyper::Request<Incoming>| {
        let busy = pulse.begin(incoming.version());
        let shared = Arc::clone(&shared);
        async move {
            let answer = request::handle(&shared, incoming, client).await;
            Ok::<_, std::convert::Infallible>(answer.into_response(busy))
        }
    });
    let connection = builder.serve_connection(stream, service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        _ = is_closing.wait_for(|is_closing| *is_closing) => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!("{client}: {error}");
    }
}

impl Shared {
    /// Reads again what may have changed. A part that cannot be read stays as it was.
    async fn reload(self: Arc<Self>) {
        let reloading = tokio::task::spawn_blocking(move || {
            let failed = |what: &str, error: &dyn Display| tracing::error!("{what} stays as it was: {error}");
            if let Some(Err(error)) = self.access_log.as_ref().map(AccessLog::reopen) {
                failed("the access log", &error);
            }
            match self.tls_files.as_ref().map(tls::server_config) {
                None => {}
                Some(Ok(config)) => *self.tls.write().unwrap_or_else(PoisonError::into_inner) = Some(config),
                Some(Err(error)) => failed("the certificate", &error),
            }
            match self.service.reload() {
                Ok(()) => tracing::info!("settings are read again"),
                Err(error) => failed("what is served", &error),
            }
        });
        if reloading.await.is_err() {
            tracing::error!("reading the settings again ended in a panic");
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_go_reads_them() {
        for (text, wanted) in [
            (":http", ("", 80)),
            (":8080", ("", 8080)),
            ("localhost:https", ("localhost", 443)),
            ("127.0.0.1:0", ("127.0.0.1", 0)),
            ("[::1]:80", ("::1", 80)),
        ] {
            assert_eq!(split_address(text), Ok(wanted), "{text}");
        }
        for wrong in ["", "80", "localhost", ":65536", ":ftp", "::1:80", "[::1:80", ":-1"] {
            assert!(split_address(wrong).is_err(), "{wrong}");
        }
    }

    #[tokio::test]
    async fn a_taken_address_is_an_error_that_names_it() {
        let taken = listen("127.0.0.1:0").await.unwrap();
        let address = taken.local_addr().unwrap().to_string();
        let text = listen(&address).await.unwrap_err().to_string();
        assert!(text.starts_with(&format!("listen on {address}: Address already in use")), "{text}");
    }
}
