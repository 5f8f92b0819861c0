//! Buffers of replies that are put together from several chunks, within a limit that blobs can share.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::cache::budget::{Budget, BudgetUse, Share};

/// The limit, and buffers that are used again.
#[derive(Debug)]
pub struct Replies {
    /// Bytes of replies being put together.
    budget: Arc<Budget>,
    spare: Spare,
}

impl Replies {
    /// A limit of so many bytes for all replies that are put together at a time.
    pub fn new(reply_bytes: u64) -> Self {
        Self { budget: Budget::new(reply_bytes), spare: Spare::new(reply_bytes) }
    }

    /// The bytes of replies being put together, as a share of what they may have.
    pub fn usage(&self) -> BudgetUse {
        self.budget.usage()
    }

    /// Replies being put together may have so many bytes from now on.
    pub fn set_limit_bytes(&self, reply_bytes: u64) {
        self.budget.set_limit(reply_bytes);
    }

    /// A buffer for a reply, when there is room; more than the whole limit counts as the whole limit.
    pub(super) async fn begin(self: &Arc<Self>, n_bytes: usize) -> Reply {
        self.begin_with(n_bytes, 0).await
    }

    /// The same, with so many bytes more that are held meanwhile.
    pub(super) async fn begin_with(self: &Arc<Self>, n_bytes: usize, more_bytes: u64) -> Reply {
        let share = self.budget.take((n_bytes as u64).saturating_add(more_bytes)).await;
        Reply { bytes: self.spare.take(n_bytes), n_bytes, replies: Arc::clone(self), _share: share }
    }
}

/// A reply being put together, with its share of the budget; both are given back when the kernel has the bytes.
#[derive(Debug)]
pub(super) struct Reply {
    /// At least `n_bytes`; what is behind them is left from an earlier reply.
    bytes: Vec<u8>,
    n_bytes: usize,
    replies: Arc<Replies>,
    _share: Share,
}

impl Reply {
    /// The bytes to be filled.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.n_bytes]
    }
}

impl AsRef<[u8]> for Reply {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.n_bytes]
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.replies.spare.give_back(std::mem::take(&mut self.bytes));
    }
}

/// Reply buffers for the next read. A fresh buffer costs a page fault every 4 KiB, which is as dear as decompressing its content.
#[derive(Debug)]
struct Spare {
    buffers: Mutex<Vec<Vec<u8>>>,
    max_buffers: usize,
}

impl Spare {
    /// Buffers kept. More replies are rarely put together at once on a few cores.
    const MAX_BUFFERS: usize = 8;

    /// The largest buffer kept, in bytes: a READ of the kernel is 1 MiB at the most.
    const MAX_BUFFER_BYTES: usize = 1 << 20;

    /// Keeps at most a quarter of the bytes that replies may take, and one buffer.
    fn new(reply_bytes: u64) -> Self {
        let quarter = usize::try_from(reply_bytes / 4).unwrap_or(usize::MAX);
        let max_buffers = (quarter / Self::MAX_BUFFER_BYTES).clamp(1, Self::MAX_BUFFERS);
        Self { buffers: Mutex::default(), max_buffers }
    }

    /// A buffer of at least `n_bytes`, of any content.
    fn take(&self, n_bytes: usize) -> Vec<u8> {
        let spare = self.lock().pop();
        match spare {
            Some(mut buffer) => {
                if buffer.len() < n_bytes {
                    buffer.resize(n_bytes, 0);
                }
                buffer
            }
            None => vec![0; n_bytes],
        }
    }

    fn give_back(&self, buffer: Vec<u8>) {
        let mut buffers = self.lock();
        if buffers.len() < self.max_buffers && buffer.len() <= Self::MAX_BUFFER_BYTES {
            buffers.push(buffer);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
