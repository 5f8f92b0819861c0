//! `caifs top`: what happens in mounts, live: rates a second from one look to the next.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Read as _, Write as _};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use super::figures::{bytes, failing, fitted, percent, safe, span};
use super::runtime_dir::runtime_dir;
use crate::config::units::parse_span;
use crate::mount::control::client::{ControlError, Place, all_own, ask_all, place_of};
use crate::mount::control::protocol::Status;
use crate::sys::{KeyMode, catch_signals, terminal_size};

/// The shortest time between two looks.
const MIN_INTERVAL: Duration = Duration::from_millis(100);

/// Requests shown of each mount.
const MAX_REQUESTS: usize = 5;

const CTRL_C: u8 = 3;
const ESCAPE: u8 = 0x1b;

/// Arguments of `top`.
#[derive(Debug, clap::Args)]
pub struct TopArgs {
    /// The mountpoint [default: all mounts of this user].
    #[arg(value_name = "DIR")]
    pub mountpoint: Option<PathBuf>,
    /// From one look to the next, at least 100ms.
    #[arg(short, long, value_name = "TIME", default_value = "1s")]
    pub interval: String,
    /// End after so many looks [default: with q or Ctrl-C].
    #[arg(short = 'n', long, value_name = "N")]
    pub count: Option<u64>,
}

pub fn run(args: &TopArgs) -> Result<()> {
    let interval = parse_span(&args.interval)
        .filter(|interval| *interval >= MIN_INTERVAL)
        .ok_or_else(|| anyhow!("--interval: {:?} is not a time of at least 100ms, such as 1s", args.interval))?;
    let dir = runtime_dir();
    let stdout = io::stdout();
    let screen = stdout.is_terminal().then(Screen::begin).transpose()?;
    let mut before: HashMap<String, (Instant, Status)> = HashMap::new();
    let mut n_looks = 0;
    loop {
        let (dir, mountpoint) = (dir.clone(), args.mountpoint.clone());
        let look = move || look(&dir, mountpoint.as_deref());
        let seen = match &screen {
            Some(screen) => match screen.while_it_lasts(look)? {
                Some(seen) => seen?,
                None => return Ok(()),
            },
            None => look()?,
        };
        let (text, seen) = page(seen, &before);
        before = seen;
        n_looks += 1;
        match &screen {
            Some(screen) => screen.show(&text, interval)?,
            None => stdout.lock().write_all(format!("{text}\n").as_bytes())?,
        }
        if args.count.is_some_and(|count| n_looks >= count) {
            return Ok(());
        }
        match &screen {
            Some(screen) => {
                if screen.wait(interval) {
                    return Ok(());
                }
            }
            None => std::thread::sleep(interval),
        }
    }
}

type Seen = Vec<(Place, Result<Status, ControlError>)>;

fn look(dir: &Path, mountpoint: Option<&Path>) -> Result<Seen, ControlError> {
    let places = match mountpoint {
        Some(mountpoint) => vec![place_of(dir, mountpoint)?],
        None => all_own(dir)?,
    };
    Ok(ask_all(dir, places))
}

/// What is shown of a look, and what the next one is compared with.
fn page(seen: Seen, before: &HashMap<String, (Instant, Status)>) -> (String, HashMap<String, (Instant, Status)>) {
    let mut text = String::new();
    let mut now_seen = HashMap::new();
    for (place, status) in seen {
        match status {
            Ok(status) => {
                let now = Instant::now();
                let last = before.get(&status.device);
                text.push_str(&section(&status, last.map(|(at, status)| ((now - *at).as_secs_f64(), status))));
                now_seen.insert(status.device.clone(), (now, status));
            }
            Err(error) => {
                let _ = writeln!(text, "{}: {}", safe(&place.name().to_string_lossy()), safe(&error.to_string()));
            }
        }
    }
    if text.is_empty() {
        text.push_str("no mounts of caifs\n");
    }
    (text, now_seen)
}

/// Lines about one mount; `before` is what it was so many seconds ago.
fn section(status: &Status, before: Option<(f64, &Status)>) -> String {
    // A mount with the same number that was made meanwhile is another one.
    let before = before.filter(|(_, last)| last.pid == status.pid && last.uptime_seconds <= status.uptime_seconds);
    let rate = |value: &dyn Fn(&Status) -> u64| match before {
        Some((seconds, last)) if seconds > 0.0 => value(status).saturating_sub(value(last)) as f64 / seconds,
        _ => 0.0,
    };
    let per_second = |value: &dyn Fn(&Status) -> u64| format!("{}/s", bytes(rate(value) as u64));
    let answered = |status: &Status| status.requests.answered.iter().map(|(_, n)| n).sum::<u64>();
    let mut text = String::new();
    let _ = writeln!(
        text,
        "{}  {} of {}  pid {}, up {}, {} resident",
        safe(&status.mountpoint),
        status.kind,
        fitted(&safe(&status.source), 60),
        status.pid,
        span(status.uptime_seconds),
        bytes(status.rss_bytes)
    );
    let present = status.present.as_ref().map_or_else(|| "?".to_owned(), |present| percent(present.any));
    let _ = writeln!(
        text,
        "  read {}  fetched {}  {:.0} requests/s  {:.0} fetches/s  {:.0} errors/s  EIO {}  present {present}",
        per_second(&|status| status.totals.read_bytes),
        per_second(&|status| status.totals.fetched_bytes),
        rate(&answered),
        rate(&|status| status.totals.n_fetches),
        rate(&|status| status.totals.n_store_errors),
        status.totals.n_eio
    );
    let tiers: Vec<String> = status.tiers.iter().map(|tier| tier_now(tier.name.as_str(), status, before)).collect();
    let _ = writeln!(text, "  {}", tiers.join("  "));
    let early = &status.early;
    if early.n_ahead + early.n_warmed + early.n_in_flight > 0 {
        let _ = writeln!(
            text,
            "  read ahead {}  ahead now {}  warmed {}  {} under way",
            per_second(&|status| status.early.ahead_bytes),
            bytes(early.ahead_now_bytes),
            per_second(&|status| status.early.warmed_bytes),
            early.n_in_flight
        );
    }
    for (place, store) in status.stores.iter().enumerate() {
        let of_store = |value: fn(&crate::mount::control::protocol::StoreStatus) -> u64| {
            rate(&|status: &Status| status.stores.get(place).map_or(0, value))
        };
        let health = match store.set_aside_seconds {
            _ if store.is_healthy => "ok".to_owned(),
            Some(seconds) => format!("aside for {}", span(seconds)),
            None => failing(store.n_errors_in_row),
        };
        let latency = store.p95_seconds.map_or_else(String::new, |p95| format!("  95 % in {}", span(p95)));
        let _ = writeln!(
            text,
            "  store {}  {health}  {:.0}/s, {} under way, {:.0} failed/s  {}/s{latency}",
            fitted(&safe(&store.name), 60),
            of_store(|store| store.n_requests),
            store.n_in_flight,
            of_store(|store| store.n_failed),
            bytes(of_store(|store| store.found_bytes) as u64)
        );
    }
    let requests = &status.requests;
    let _ = writeln!(
        text,
        "  {} requests wait ({} for chunks), {} chunks under way",
        requests.n_in_flight, requests.n_waiting_for_chunks, status.fetches.n_in_flight
    );
    for request in requests.oldest.iter().take(MAX_REQUESTS) {
        let _ = writeln!(
            text,
            "    {} for {}  inode {}  offset {}  {} bytes",
            request.op,
            span(request.age_seconds),
            request.ino,
            request.offset,
            request.n_bytes
        );
    }
    text
}

/// How often a tier had what was asked, since the last look; and how full it is.
fn tier_now(name: &str, status: &Status, before: Option<(f64, &Status)>) -> String {
    let tier = status.tiers.iter().find(|tier| tier.name == name);
    if let Some(present) = tier.and_then(|tier| tier.present.as_ref()) {
        return match present.n_complete == present.n_files {
            true => format!("{name} complete"),
            false => format!("{name} {} of {} chunks", present.n_present, present.n_chunks),
        };
    }
    let figures = |status: &Status| {
        status.tiers.iter().find(|tier| tier.name == name).map_or((0, 0), |tier| (tier.n_hits, tier.n_misses))
    };
    let (hits, misses) = figures(status);
    let (hits_before, misses_before) = before.map_or((0, 0), |(_, last)| figures(last));
    let (hits, misses) = (hits.saturating_sub(hits_before), misses.saturating_sub(misses_before));
    let rate = match hits + misses {
        0 => "idle".to_owned(),
        n => format!("{} found", percent(hits as f64 / n as f64)),
    };
    let full = tier.and_then(|tier| tier.used_bytes.zip(tier.limit_bytes));
    let full = full.map_or_else(String::new, |(used, limit)| format!(", {} of {}", bytes(used), bytes(limit)));
    format!("{name} {rate}{full}")
}

/// The terminal while it shows nothing but this; as it was afterwards, whatever ends it.
struct Screen {
    stdin: io::Stdin,
    /// `None` where no keys come from.
    keys: Option<KeyMode>,
    signals: UnixStream,
}

/// What ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waited {
    /// A key or a signal says that it is time to end.
    End,
    /// The terminal has another size.
    Resized,
    /// What was waited for.
    Done,
}

impl Screen {
    /// Another screen, without cursor.
    fn begin() -> io::Result<Self> {
        let ends = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];
        let signals = catch_signals(&[&ends[..], &[Signal::SIGWINCH]].concat())?;
        signals.set_nonblocking(true)?;
        let stdin = io::stdin();
        let keys = stdin.is_terminal().then(|| KeyMode::begin(stdin.as_fd())).transpose()?;
        let screen = Self { stdin, keys, signals };
        let mut out = io::stdout().lock();
        out.write_all(b"\x1b[?1049h\x1b[?25l")?;
        out.flush()?;
        Ok(screen)
    }

    /// Does something that may take its time on a thread; `None` when it is time to end before.
    fn while_it_lasts<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> io::Result<Option<T>> {
        let (ours, theirs) = UnixStream::pair()?;
        let thread = std::thread::Builder::new().name("caifs-look".into()).spawn(move || {
            // Closed when it is done, also by a panic.
            let _theirs = theirs;
            work()
        })?;
        loop {
            match self.wait_for(Some(&ours), None) {
                // The thread ends with the process.
                Waited::End => return Ok(None),
                Waited::Resized => {}
                Waited::Done => break,
            }
        }
        thread.join().map(Some).map_err(|_| io::Error::other("a panic was caught"))
    }

    /// Shows as much as fits.
    fn show(&self, text: &str, interval: Duration) -> io::Result<()> {
        let (columns, rows) = terminal_size(io::stdout().as_fd()).unwrap_or((80, 24));
        let time = jiff::Zoned::now().strftime("%H:%M:%S").to_string();
        let head = format!("caifs top  {time}  every {}  q ends", span(interval.as_secs_f64()));
        let mut page = String::from("\x1b[H");
        for line in std::iter::once(head.as_str()).chain(text.lines()).take(usize::from(rows)) {
            let line: String = line.chars().take(usize::from(columns)).collect();
            // What a longer line left there before is cleared; the last line has no end, or everything would move up.
            let _ = write!(page, "{line}\x1b[K\r\n");
        }
        let page = page.strip_suffix("\r\n").unwrap_or(&page);
        let mut out = io::stdout().lock();
        out.write_all(page.as_bytes())?;
        out.write_all(b"\x1b[J")?;
        out.flush()
    }

    /// Waits for the next look, or for a key. Gives whether it is time to end.
    fn wait(&self, interval: Duration) -> bool {
        // After another size of the terminal the next page fits again.
        self.wait_for(None, Some(Instant::now() + interval)) == Waited::End
    }

    /// Waits for a key or signal that ends, until the other end of `done` is closed, or until `deadline`.
    fn wait_for(&self, done: Option<&UnixStream>, deadline: Option<Instant>) -> Waited {
        loop {
            let timeout = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                Some(left) if left.is_zero() => return Waited::Done,
                // One more, so that a wait of less than a millisecond does not become none at all.
                Some(left) => u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX).into(),
                None => PollTimeout::NONE,
            };
            let mut fds = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
            fds.extend(done.map(|done| PollFd::new(done.as_fd(), PollFlags::POLLIN)));
            let n_others = fds.len();
            fds.extend(self.keys.as_ref().map(|_| PollFd::new(self.stdin.as_fd(), PollFlags::POLLIN)));
            // A signal is in its stream by now.
            let _ = poll(&mut fds, timeout);
            let is_ready: Vec<bool> = fds.iter().map(|fd| fd.any() == Some(true)).collect();
            if is_ready[0] {
                match self.signal() {
                    Some(signal) if signal == Signal::SIGWINCH as u8 => return Waited::Resized,
                    Some(_) => return Waited::End,
                    None => {}
                }
            }
            if is_ready.get(n_others) == Some(&true) && self.is_end_asked() {
                return Waited::End;
            }
            if done.is_some() && is_ready[1] {
                return Waited::Done;
            }
        }
    }

    /// A signal that has come.
    fn signal(&self) -> Option<u8> {
        let mut signal = [0];
        (&self.signals).read_exact(&mut signal).ok().map(|()| signal[0])
    }

    /// Whether one of the keys that were pressed ends it.
    fn is_end_asked(&self) -> bool {
        let mut keys = [0; 16];
        match nix::unistd::read(self.stdin.as_fd(), &mut keys) {
            // The terminal is gone.
            Ok(0) => true,
            Ok(n) => keys[..n].iter().any(|key| matches!(*key, b'q' | b'Q' | ESCAPE | CTRL_C)),
            Err(error) => !matches!(error, Errno::EINTR | Errno::EAGAIN),
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let mut out = io::stdout().lock();
        drop(out.write_all(b"\x1b[?25h\x1b[?1049l"));
        drop(out.flush());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mount::control::protocol::{BackingStatus, StoreStatus, TierStatus};

    fn status(n: u64) -> Status {
        let mut status = Status {
            mountpoint: "/m".into(),
            source: "s".into(),
            kind: "tree".into(),
            pid: 7,
            uptime_seconds: n as f64,
            ..Status::default()
        };
        status.totals.read_bytes = n << 20;
        status.totals.fetched_bytes = n << 10;
        status.requests.answered = vec![("read".into(), 10 * n), ("lookup".into(), n)];
        status.tiers.push(TierStatus {
            name: "memory".into(),
            n_hits: 3 * n,
            n_misses: n,
            used_bytes: Some(1),
            limit_bytes: Some(2),
            ..TierStatus::default()
        });
        let present = BackingStatus { n_files: 1, n_complete: 0, n_chunks: 100, n_present: n };
        status.tiers.push(TierStatus { name: "backing".into(), present: Some(present), ..TierStatus::default() });
        (status.early.n_warmed, status.early.warmed_bytes, status.early.ahead_bytes) = (n, n << 11, n << 12);
        status.stores.push(StoreStatus {
            name: "http://h".into(),
            is_healthy: true,
            n_requests: 5 * n,
            found_bytes: n << 10,
            ..StoreStatus::default()
        });
        status
    }

    #[test]
    fn rates_are_of_the_time_between_two_looks() {
        let (first, second) = (status(10), status(20));
        let shown = section(&second, Some((2.0, &first)));
        for wanted in [
            "read 5.0 MiB/s  fetched 5.0 KiB/s  55 requests/s",
            "memory 75 % found, 1 B of 2 B  backing 20 of 100 chunks",
            "read ahead 20.0 KiB/s  ahead now 0 B  warmed 10.0 KiB/s  0 under way",
            "store http://h  ok  25/s, 0 under way, 0 failed/s  5.0 KiB/s",
        ] {
            assert!(shown.contains(wanted), "{wanted} is not in\n{shown}");
        }
        let mut failing = status(20);
        (failing.stores[0].is_healthy, failing.stores[0].n_errors_in_row) = (false, 26);
        let shown = section(&failing, None);
        assert!(shown.contains("store http://h  failing, 26 errors in a row  0/s"), "{shown}");
        let new = Status { pid: 8, ..status(30) };
        assert!(section(&new, Some((2.0, &second))).contains("read 0 B/s"), "another process is another mount");
        assert!(section(&first, None).contains("  0 requests/s"));
        assert!(section(&first, Some((1.0, &first))).contains("memory idle"));
    }
}
