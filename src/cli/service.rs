//! What stands beside a mount while it is served: the control socket, SIGHUP, metrics and the access trace.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use hyper::StatusCode;
use hyper::http::request::Parts;
use tokio::sync::{mpsc, oneshot};

use super::given::Again;
use crate::config::ServiceConfig;
use crate::fuse::requests::Requests;
use crate::fuse::trace::Trace;
use crate::mount::control::{self, MountedAt, Served, metrics, survey::Survey};
use crate::mount::reload::{Admits, AroundReload, OnHangup, Reloader};
use crate::mount::{BoxError, shown_source};
use crate::report::Report;
use crate::serve::http::{Answer, HttpConfig, Limits, Server, Service as HttpService};
use crate::volume::Live;

/// What whoever asks for metrics may take.
const LIMITS: Limits = Limits {
    header_timeout: Duration::from_secs(10),
    idle_timeout: Duration::from_secs(60),
    request_timeout: Duration::from_secs(10),
    // The end of a mount waits for nobody.
    drain_timeout: Duration::from_millis(100),
    max_connections: 32,
    max_requests: 4,
    upload_budget_bytes: 1,
};

/// What is opened before the mount is made, so that a failure is told to its caller.
#[derive(Debug)]
pub struct Beside {
    trace: Option<Arc<Trace>>,
    metrics: Option<MetricsServer>,
}

impl Beside {
    /// Opens the trace and the metrics' address, as far as they are wanted.
    ///
    /// # Errors
    /// The file cannot be opened, or the address not be listened on.
    pub fn open(config: &ServiceConfig, report: &Arc<Report>) -> Result<Self, BoxError> {
        let trace = match &config.access_trace {
            None => None,
            Some(path) => {
                // The service leaves its directory, and opens the file by its name again when logs are rotated.
                let path = std::path::absolute(path)?;
                let opened = Trace::open(&path, Arc::clone(report));
                Some(opened.map_err(|error| format!("access trace {}: {error}", path.display()))?)
            }
        };
        let metrics = config.metrics.as_deref().map(MetricsServer::start).transpose()?;
        Ok(Self { trace, metrics })
    }
}

/// A mount that is about to be served.
pub struct Fresh<'a> {
    /// As it was given.
    pub source: &'a std::ffi::OsStr,
    /// Where its control socket is to lie, if it is to have one.
    pub control_dir: Option<&'a Path>,
    /// Where it is.
    pub at: MountedAt,
    /// What it is made of.
    pub live: &'a Arc<Live>,
    /// The requests of its session.
    pub requests: &'a Arc<Requests>,
    /// How its settings are read again.
    pub again: Again,
    /// Whether this process can do what other settings ask for.
    pub admits: Admits,
    /// Called around that.
    pub around: AroundReload,
}

/// All of it, until it is dropped.
#[derive(Debug)]
pub struct Service {
    _control: Option<control::server::Server>,
    _hangup: OnHangup,
    beside: Beside,
}

/// Starts what stands beside a mount. What cannot be started is done without: the mount is worth more.
pub fn start(fresh: Fresh<'_>, beside: Beside) -> Service {
    let Fresh { source, control_dir, at, live, requests, again, admits, around } = fresh;
    if let Some(trace) = &beside.trace {
        requests.set_trace(Arc::clone(trace));
    }
    let read = Box::new(move |over: &[_]| again.read(over).map_err(|error| format!("{error:#}")));
    let reloader = Arc::new(Reloader::new(Arc::clone(live), Arc::clone(requests), read, admits, around));
    let served = Arc::new(Served {
        source: shown_source(source),
        mountpoint: at.mountpoint,
        device: at.device,
        live: Arc::clone(live),
        requests: Arc::clone(requests),
        reloader: Arc::clone(&reloader),
        survey: Survey::new(Arc::clone(live)),
    });
    if let Some(metrics) = &beside.metrics {
        // Set once: this is the only place.
        drop(metrics.served.set(Arc::clone(&served)));
    }
    let control = control_dir.and_then(|dir| {
        control::listen(dir, &served)
            .inspect_err(|error| tracing::warn!("no control socket in {}: {error}", dir.display()))
            .ok()
    });
    Service { _control: control, _hangup: reloader.on_hangup(), beside }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Some(trace) = &self.beside.trace {
            trace.finish();
        }
    }
}

/// A web server for the metrics, in a thread with a runtime of its own: nothing that a store does holds it up.
struct MetricsServer {
    served: Arc<OnceLock<Arc<Served>>>,
    _stop: oneshot::Sender<()>,
}

impl fmt::Debug for MetricsServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MetricsServer").finish_non_exhaustive()
    }
}

impl MetricsServer {
    /// Listens and answers; until there is a mount, with numbers of itself only.
    fn start(address: &str) -> Result<Self, BoxError> {
        let served: Arc<OnceLock<Arc<Served>>> = Arc::default();
        let config = HttpConfig {
            listen: vec![address.to_owned()],
            tls: None,
            authorization: None,
            access_log: None,
            limits: LIMITS,
        };
        let (stop, stopped) = oneshot::channel();
        let (tell, told) = std::sync::mpsc::channel();
        let page: Arc<dyn HttpService> = Arc::new(MetricsPage { served: Arc::clone(&served) });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name("caifs-metrics".into()).spawn(move || {
            runtime.block_on(async move {
                let server = match Server::bind(config, page).await {
                    Ok(server) => server,
                    Err(error) => return drop(tell.send(Err(error.to_string()))),
                };
                drop(tell.send(server.addresses().map_err(|error| error.to_string())));
                // Certificates and logs, which a reload would read, there are none.
                let (_reload, reloads) = mpsc::channel(1);
                // Whether it was told or dropped, it is the end.
                server.run(async { drop(stopped.await) }, reloads).await;
            });
        })?;
        let addresses: Vec<SocketAddr> = told
            .recv()
            .map_err(|_| io::Error::other("the thread ended"))?
            .map_err(|error| format!("metrics: {error}"))?;
        tracing::info!("metrics are served at {addresses:?}");
        Ok(Self { served, _stop: stop })
    }
}

/// Answers nothing but metrics, which the server does by itself.
struct MetricsPage {
    served: Arc<OnceLock<Arc<Served>>>,
}

impl fmt::Debug for MetricsPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MetricsPage").finish_non_exhaustive()
    }
}

impl HttpService for MetricsPage {
    fn admit(&self, _head: &Parts) -> Result<u64, Box<Answer>> {
        Err(Box::new(Answer::text(StatusCode::NOT_FOUND, "there is /metrics and /healthz")))
    }

    fn answer<'a>(&'a self, _head: &'a Parts, _body: Bytes) -> BoxFuture<'a, Answer> {
        Box::pin(std::future::ready(Answer::text(StatusCode::NOT_FOUND, "there is /metrics and /healthz")))
    }

    fn render_metrics(&self, text: &mut String) {
        if let Some(served) = self.served.get() {
            text.push_str(&metrics::render(served));
        }
    }
}
