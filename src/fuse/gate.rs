//! The way out of a process that hands its mount over: what is being answered is counted, and nothing more is begun.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Set in the count once the gate is closed.
const CLOSED: u64 = 1 << 63;

/// How often a closing gate looks whether all is answered.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);

/// Counts requests that are being answered.
#[derive(Debug, Default)]
pub struct Gate(AtomicU64);

/// A request that is being answered, until it is dropped.
#[derive(Debug)]
pub(super) struct Passed(std::sync::Arc<Gate>);

impl Gate {
    /// Lets a request in. Once the gate is closed this never returns: the process is about to end, and whoever takes the mount over asks
    /// the kernel for the request again.
    pub(super) fn pass(self: &std::sync::Arc<Self>) -> Passed {
        if self.0.fetch_add(1, Ordering::SeqCst) & CLOSED == 0 {
            return Passed(std::sync::Arc::clone(self));
        }
        self.0.fetch_sub(1, Ordering::SeqCst);
        loop {
            std::thread::park();
        }
    }

    /// Closes the gate and waits until all that was let in is answered. Gives how many were not, after `limit`.
    pub fn close(&self, limit: Duration) -> u64 {
        self.0.fetch_or(CLOSED, Ordering::SeqCst);
        let deadline = Instant::now() + limit;
        loop {
            let n_passed = self.0.load(Ordering::SeqCst) & !CLOSED;
            if n_passed == 0 || Instant::now() >= deadline {
                return n_passed;
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
    }
}

impl Drop for Passed {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::{Arc, mpsc};

    #[test]
    fn a_closing_gate_waits_for_what_was_let_in_and_lets_nothing_more_in() {
        let gate = Arc::new(Gate::default());
        let passed = gate.pass();
        assert_eq!(gate.close(Duration::ZERO), 1);
        let (sender, receiver) = mpsc::channel();
        let late = Arc::clone(&gate);
        std::thread::spawn(move || {
            let _passed = late.pass();
            sender.send(()).unwrap();
        });
        drop(passed);
        // A late one may be counted for an instant, and is gone again by itself.
        assert_eq!(gate.close(Duration::from_secs(10)), 0);
        assert_eq!(receiver.try_recv(), Err(mpsc::TryRecvError::Empty), "nothing comes through a closed gate");
    }
}
