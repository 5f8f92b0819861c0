//! A number that goes up and down: how many are inside of something now, or how much there is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How many are inside, or how much there is, now.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// Counts one more until the returned value is dropped, however that comes about.
    pub fn enter(&self) -> Inside<'_> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Inside(self)
    }

    /// The same for what outlives the caller: of a gauge that is a part of something shared.
    pub fn enter_owned<T>(owner: &Arc<T>, gauge: fn(&T) -> &Self) -> InsideOwned<T> {
        gauge(owner).add(1);
        InsideOwned { owner: Arc::clone(owner), gauge }
    }

    /// Adds to the number.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Takes from the number what was added before.
    pub fn sub(&self, n: u64) {
        self.0.fetch_sub(n, Ordering::Relaxed);
    }

    /// The number now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One that is inside.
#[derive(Debug)]
#[must_use = "it counts only until it is dropped"]
pub struct Inside<'a>(&'a Gauge);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One that is inside, wherever it goes.
#[derive(Debug)]
#[must_use = "it counts only until it is dropped"]
pub struct InsideOwned<T> {
    owner: Arc<T>,
    gauge: fn(&T) -> &Gauge,
}

impl<T> Drop for InsideOwned<T> {
    fn drop(&mut self) {
        (self.gauge)(&self.owner).sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_went_in_comes_out_also_on_panic() {
        let gauge = Gauge::default();
        let one = gauge.enter();
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _two = gauge.enter();
            assert_eq!(gauge.get(), 2);
            panic!("scripted");
        }));
        assert!(caught.is_err());
        assert_eq!(gauge.get(), 1);
        drop(one);
        assert_eq!(gauge.get(), 0);
    }
}
