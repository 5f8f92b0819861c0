//! Where the bytes of a request came from, for the access trace: the slowest of the places that had a part of them.
//!
//! Who wants to know wraps a future in [`watched`]; the cache [notes](note) what it hands over. Where nobody wants to know, a note costs a look
//! at a thread-local.

use std::cell::Cell;
use std::future::Future;

/// A place that had bytes, the fastest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// The memory tier, or nothing was needed.
    Memory,
    /// The disk tier.
    Disk,
    /// A store.
    Store,
}

impl Source {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Disk => "disk",
            Self::Store => "store",
        }
    }
}

tokio::task_local! {
    static SLOWEST: Cell<Source>;
}

/// Runs a future, and tells where the bytes it was handed came from.
pub async fn watched<F: Future>(future: F) -> (F::Output, Source) {
    SLOWEST
        .scope(Cell::new(Source::Memory), async move {
            let output = future.await;
            (output, SLOWEST.with(Cell::get))
        })
        .await
}

/// Hears where some bytes came from that are handed over in this task.
pub(super) fn note(source: Source) {
    // Nobody watches: no loss.
    let _ = SLOWEST.try_with(|slowest| slowest.set(slowest.get().max(source)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_slowest_place_is_told() {
        note(Source::Store);
        let asked = watched(async {
            note(Source::Disk);
            tokio::task::yield_now().await;
            note(Source::Memory);
            7
        });
        assert_eq!(asked.await, (7, Source::Disk));
        assert_eq!(watched(async {}).await, ((), Source::Memory));
    }
}
