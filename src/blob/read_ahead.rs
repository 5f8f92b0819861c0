//! Reading along a file, with what comes next fetched before it is asked for.
//!
//! [`crate::cache::ahead`] says what to fetch; this file fetches it, in tasks of their own. Invariant: a read is never later for it: the
//! read's own chunks are asked for first.

use std::future::{Future, poll_fn};
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;

use super::{Blob, BlobError};
use crate::cache::ahead::{Fetch, ReadAhead, ReadNote, SWEEP};
use crate::cache::background::Purpose;
use crate::cache::blocks::BLOCK_BYTES;

/// A chunk of so many bytes is read ahead however small the window is, so that it can be read ahead at all.
const MAX_ODD_CHUNK_BYTES: u64 = 1 << 20;

impl Blob {
    /// Exactly `n_bytes` from `offset`, for somebody who reads a file that ends at `file_end` of this stream. Reads ahead when they read
    /// on. Must be polled in a runtime.
    ///
    /// # Errors
    /// As [`Blob::read_at`]; what is read ahead and cannot be had is no error.
    pub async fn read_along(&self, offset: u64, n_bytes: usize, file_end: u64) -> Result<Bytes, BlobError> {
        let Some(ahead) = self.ahead().filter(|_| n_bytes > 0) else { return self.read_at(offset, n_bytes).await };
        let mut read = pin!(self.read_at(offset, n_bytes));
        let first = poll_fn(|context| Poll::Ready(read.as_mut().poll(context))).await;
        if !matches!(first, Poll::Ready(Err(_))) {
            let (n_bytes, file_end, has_waited) = (n_bytes as u64, file_end.min(self.size()), first.is_pending());
            if let Some(fetch) = ahead.note(ReadNote { offset, n_bytes, file_end, has_waited }) {
                self.fetch_ahead(ahead, fetch);
            }
        }
        match first {
            Poll::Ready(read) => read,
            Poll::Pending => read.await,
        }
    }

    /// The same stream, read for another purpose.
    pub fn for_purpose(&self, purpose: Purpose) -> Self {
        match self {
            Self::Chunked(blob) => Self::Chunked(blob.for_purpose(purpose)),
            Self::File(blob) => Self::File(blob.clone()),
            Self::Remote(blocks) => Self::Remote(blocks.for_purpose(purpose)),
        }
    }

    /// Who reads it and is read ahead of. A local file has the system for that, and so has one whose local copy is complete.
    fn ahead(&self) -> Option<&Arc<ReadAhead>> {
        match self {
            Self::Chunked(blob) => blob.ahead(),
            Self::File(_) => None,
            Self::Remote(blocks) => blocks.ahead(),
        }
    }

    fn fetch_ahead(&self, ahead: &Arc<ReadAhead>, fetch: Fetch) {
        if fetch.must_sweep {
            let ahead = Arc::downgrade(ahead);
            tokio::spawn(async move {
                loop {
                    tokio::time::sleep(SWEEP).await;
                    // The stream may be gone, and what it held with it.
                    if ahead.upgrade().is_none_or(|ahead| !ahead.sweep()) {
                        return;
                    }
                }
            });
        }
        let (blob, ahead) = (self.for_purpose(Purpose::Ahead), Arc::clone(ahead));
        tokio::spawn(async move {
            if let Err(error) = blob.fetch_range(fetch.range).await {
                tracing::debug!("reading ahead: {error}");
                ahead.failed(fetch.reader);
            }
        });
    }

    /// Gets what begins in a range.
    async fn fetch_range(&self, range: Range<u64>) -> Result<(), BlobError> {
        match self {
            Self::Chunked(blob) => {
                let max_chunk_bytes = (range.end - range.start).max(MAX_ODD_CHUNK_BYTES);
                let wants = blob.wants_in(range, max_chunk_bytes)?;
                for outcome in blob.cache().get_each(blob.index().digest(), &wants).await {
                    outcome?;
                }
                Ok(())
            }
            Self::File(_) => Ok(()),
            Self::Remote(blocks) => {
                let numbers = range.start.div_ceil(BLOCK_BYTES)..range.end.min(self.size()).div_ceil(BLOCK_BYTES);
                Ok(blocks.fetch(numbers).await?)
            }
        }
    }
}
