//! nginx under test: a directory behind HTTP or HTTPS, writable by PUT, with an access log to count requests and connections.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::certificates::Certificates;
use crate::support::server::{Server, free_port};

/// How long a line may take to appear in the access log: it is written behind the answer.
const LOG_LIMIT: Duration = Duration::from_secs(30);

/// What a server is to be like.
#[derive(Debug, Clone, Copy, Default)]
pub struct Site<'a> {
    /// Directives in the `server` block, such as `if ($http_authorization != "…") { return 401; }`.
    pub server: &'a str,
    /// Serve HTTPS (and HTTP/2) with these certificates.
    pub tls: Option<&'a Certificates>,
    /// Demand a client certificate of the same CA.
    pub verify_client: bool,
}

/// A running nginx.
#[derive(Debug)]
pub struct Nginx {
    server: Server,
    root: PathBuf,
    log: PathBuf,
    scheme: &'static str,
}

/// One request, as the access log has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The serial number of its connection.
    pub connection: u64,
    /// `HTTP/1.1` or `HTTP/2.0`.
    pub protocol: String,
    /// `GET`, …
    pub method: String,
    /// How it was answered.
    pub status: u16,
    /// Bytes of the answer's body.
    pub body_bytes: u64,
    /// Path and query.
    pub uri: String,
    /// The values of `Authorization` and `Cookie`, `-` for none.
    pub credentials: String,
}

impl Nginx {
    /// Starts `program` with its files in `dir`, which must be empty; what it serves lies in `dir/root`.
    #[track_caller]
    pub fn start(program: &Path, dir: &Path, site: Site<'_>) -> Self {
        let root = dir.join("root");
        fs::create_dir(&root).expect("the directory was empty");
        let port = free_port();
        let shown = dir.display();
        let (listen, scheme, tls) = match site.tls {
            None => ("", "http", String::new()),
            Some(made) => {
                let (cert, key) = (made.server_cert.display(), made.server_key.display());
                (" ssl http2", "https", format!("ssl_certificate {cert}; ssl_certificate_key {key};"))
            }
        };
        let verify = match (site.verify_client, site.tls) {
            (true, Some(made)) => format!("ssl_client_certificate {}; ssl_verify_client on;", made.ca.display()),
            _ => String::new(),
        };
        // Its workers are nobody otherwise, who may not enter our directories.
        let user = if crate::support::is_root() { "user root;" } else { "" };
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {shown}/{kind};\n"))
            .concat();
        let config = format!(
            r#"daemon off; worker_processes 1; {user} pid {shown}/pid; error_log {shown}/error.log;
            events {{ worker_connections 512; }}
            http {{
                {temporary}
                log_format line '$connection|$server_protocol|$request_method|$status|$body_bytes_sent|$request_uri|$http_authorization $http_cookie';
                access_log {shown}/access.log line;
                client_max_body_size 0; keepalive_requests 100000; etag on;
                server {{
                    listen 127.0.0.1:{port}{listen};
                    root {root};
                    {tls} {verify}
                    dav_methods PUT DELETE; create_full_put_path on; dav_access user:rw group:r all:r;
                    {server}
                }}
            }}"#,
            root = root.display(),
            server = site.server,
        );
        let file = dir.join("nginx.conf");
        fs::write(&file, config).expect("the directory can be written to");
        let mut command = Command::new(program);
        command.arg("-e").arg(dir.join("error.log")).arg("-p").arg(dir).arg("-c").arg(&file);
        Self { server: Server::start(&mut command, port), root, log: dir.join("access.log"), scheme }
    }

    /// Where it answers, with `/` at the end; the host is 127.0.0.1.
    pub fn url(&self) -> String {
        format!("{}://127.0.0.1:{}/", self.scheme, self.server.port)
    }

    /// What it serves.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The requests so far, of which there must be `n` at least.
    #[track_caller]
    pub fn requests(&self, n: usize) -> Vec<Request> {
        let start = Instant::now();
        loop {
            let text = fs::read_to_string(&self.log).unwrap_or_default();
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            let lines: Vec<_> = whole.lines().map(parse).collect();
            if lines.len() >= n {
                return lines;
            }
            assert!(start.elapsed() < LOG_LIMIT, "the access log has {} lines, not {n}:\n{text}", lines.len());
            thread::sleep(Duration::from_millis(2));
        }
    }
}

#[track_caller]
fn parse(line: &str) -> Request {
    let parts: Vec<&str> = line.splitn(7, '|').collect();
    let [connection, protocol, method, status, body_bytes, uri, credentials] = parts[..] else {
        panic!("a line of another form in the access log: {line}")
    };
    Request {
        connection: connection.parse().expect("a number"),
        protocol: protocol.to_owned(),
        method: method.to_owned(),
        status: status.parse().expect("a number"),
        body_bytes: body_bytes.parse().expect("a number"),
        uri: uri.to_owned(),
        credentials: credentials.to_owned(),
    }
}
