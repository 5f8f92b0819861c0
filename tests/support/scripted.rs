//! A web server that answers by script, byte for byte: for what a real server does only when it is ill.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

/// One request.
#[derive(Debug, Clone)]
pub struct Request {
    /// Method, path and query, as in `GET /x?y`.
    pub line: String,
    /// The lines of its head, in lower case.
    pub head: Vec<String>,
    /// Its body.
    pub body: Vec<u8>,
}

impl Request {
    /// The value of a header, in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim))
    }
}

/// What is sent for a request.
#[derive(Debug, Clone)]
pub enum Answer {
    /// These bytes, and then the connection is closed.
    Then(Vec<u8>),
    /// These bytes, and then nothing more for as long as the server lives.
    Hang(Vec<u8>),
}

/// A whole answer: `status` as in `200 OK`, further headers each with its line end.
pub fn answer(status: &str, headers: &str, body: &[u8]) -> Answer {
    let mut bytes =
        format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n", body.len());
    let mut bytes = std::mem::take(&mut bytes).into_bytes();
    bytes.extend_from_slice(body);
    Answer::Then(bytes)
}

type Script = dyn Fn(usize, &Request) -> Answer + Send + Sync;

struct Shared {
    script: Box<Script>,
    requests: Mutex<Vec<Request>>,
    hanging: Mutex<Vec<TcpStream>>,
    is_over: AtomicBool,
}

/// A running server, gone when dropped.
pub struct Scripted {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

impl Scripted {
    /// Starts a server; the script is told how many requests there were before.
    pub fn start(script: impl Fn(usize, &Request) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback has a free port");
        let address = listener.local_addr().expect("it is bound");
        let shared = Arc::new(Shared {
            script: Box::new(script),
            requests: Mutex::default(),
            hanging: Mutex::default(),
            is_over: AtomicBool::new(false),
        });
        let of_acceptor = Arc::clone(&shared);
        let acceptor = thread::spawn(move || {
            let mut threads = Vec::new();
            for stream in listener.incoming().flatten() {
                if of_acceptor.is_over.load(Ordering::SeqCst) {
                    break;
                }
                let shared = Arc::clone(&of_acceptor);
                // Those that have ended keep their stacks until somebody lets go of them.
                threads.retain(|thread: &JoinHandle<()>| !thread.is_finished());
                threads.push(thread::spawn(move || shared.serve(stream)));
            }
            for thread in threads {
                // A script that panicked has failed its test by the answer that did not come.
                drop(thread.join());
            }
        });
        Self { address, shared, acceptor: Some(acceptor) }
    }

    /// Where it answers, with `/` at the end.
    pub fn url(&self) -> String {
        format!("http://{}/", self.address)
    }

    /// The requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.requests.lock().expect("no script panics while it holds this").clone()
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        // Wakes the acceptor; if it cannot be reached it is gone.
        drop(TcpStream::connect(self.address));
        if let Some(acceptor) = self.acceptor.take() {
            drop(acceptor.join());
        }
    }
}

impl Shared {
    /// Reads one request and answers it. What goes wrong on the way is the other side's to notice.
    fn serve(&self, stream: TcpStream) {
        let Ok(reading) = stream.try_clone() else { return };
        // A client that keeps a connection without a request must not keep the server.
        drop(reading.set_read_timeout(Some(std::time::Duration::from_secs(10))));
        let mut reader = BufReader::new(reading);
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            match reader.read_line(&mut line) {
                Ok(n) if n > 0 => {}
                _ => return,
            }
            match line.trim_end() {
                "" => break,
                line => lines.push(line.to_owned()),
            }
        }
        let line = lines[0].trim_end_matches(" HTTP/1.1").to_owned();
        let head = lines.iter().skip(1).map(|line| match line.split_once(':') {
            Some((name, value)) => format!("{}:{value}", name.to_ascii_lowercase()),
            None => line.clone(),
        });
        let mut request = Request { line, head: head.collect(), body: Vec::new() };
        let n_body = request.header("content-length").and_then(|n| n.parse().ok()).unwrap_or(0);
        request.body = vec![0; n_body];
        if reader.read_exact(&mut request.body).is_err() {
            return;
        }
        let n_before = {
            let mut requests = self.requests.lock().expect("no script panics while it holds this");
            requests.push(request.clone());
            requests.len() - 1
        };
        let mut stream = stream;
        match (self.script)(n_before, &request) {
            Answer::Then(bytes) => {
                // A client that has read enough goes away.
                drop(stream.write_all(&bytes));
            }
            Answer::Hang(bytes) => {
                drop(stream.write_all(&bytes));
                self.hanging.lock().expect("nobody panics while holding this").push(stream);
            }
        }
    }
}
