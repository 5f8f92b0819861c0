//! What is answered to one request.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use hyper::body::{Frame, SizeHint};
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};

use super::pulse::Busy;
use crate::store::StoreError;

/// An answer before it is sent.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// Headers beside those that follow from the body.
    pub headers: HeaderMap,
    /// What is sent behind the headers; nothing of it in answer to HEAD.
    pub body: Body,
}

/// What is sent behind the headers.
pub enum Body {
    /// Nothing.
    Empty,
    /// These bytes.
    Bytes(Bytes),
    /// Pieces as they come; an error among them ends the connection, so that the reader knows that it lacks something.
    Stream {
        /// The length of all pieces together.
        n_bytes: u64,
        /// The pieces.
        pieces: BoxStream<'static, Result<Bytes, StoreError>>,
    },
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("Empty"),
            Self::Bytes(bytes) => write!(f, "Bytes({})", bytes.len()),
            Self::Stream { n_bytes, .. } => write!(f, "Stream({n_bytes})"),
        }
    }
}

impl Answer {
    /// A status and nothing else.
    pub fn empty(status: StatusCode) -> Self {
        Self { status, headers: HeaderMap::new(), body: Body::Empty }
    }

    /// A line of text.
    pub fn text(status: StatusCode, text: impl fmt::Display) -> Self {
        let line = Bytes::from(format!("{text}\n"));
        Self { body: Body::Bytes(line), ..Self::empty(status) }
            .with(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"))
    }

    /// Content, with status 200.
    pub fn content(content_type: &'static str, body: Body) -> Self {
        Self { body, ..Self::empty(StatusCode::OK) }.with(CONTENT_TYPE, HeaderValue::from_static(content_type))
    }

    /// The refusal of a method, with those that are taken.
    pub fn method_not_allowed(allowed: &'static str) -> Self {
        Self::text(StatusCode::METHOD_NOT_ALLOWED, "only GET, HEAD and PUT are understood")
            .with(hyper::header::ALLOW, HeaderValue::from_static(allowed))
    }

    /// The same answer with one header more.
    pub fn with(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.insert(name, value);
        self
    }

    /// The answer to the same request made with HEAD, with the length that GET would give.
    pub fn without_body(mut self) -> Self {
        let n_bytes = match std::mem::replace(&mut self.body, Body::Empty) {
            Body::Empty => return self,
            Body::Bytes(bytes) => bytes.len() as u64,
            Body::Stream { n_bytes, .. } => n_bytes,
        };
        self.with(CONTENT_LENGTH, n_bytes.into())
    }

    /// What hyper sends; `busy` is held until the last byte has been handed over.
    pub(super) fn into_response(self, busy: Busy) -> Response<Outgoing> {
        let mut response = Response::new(Outgoing { body: self.body, _busy: busy });
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers;
        response
    }
}

/// A body on its way out.
pub(super) struct Outgoing {
    body: Body,
    _busy: Busy,
}

impl hyper::body::Body for Outgoing {
    type Data = Bytes;
    type Error = StoreError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, StoreError>>> {
        match &mut self.body {
            Body::Empty => Poll::Ready(None),
            Body::Bytes(bytes) => {
                let bytes = std::mem::take(bytes);
                self.body = Body::Empty;
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Body::Stream { n_bytes, pieces } => {
                let polled = pieces.poll_next_unpin(context);
                if let Poll::Ready(Some(Ok(piece))) = &polled {
                    *n_bytes = n_bytes.saturating_sub(piece.len() as u64);
                }
                if let Poll::Ready(Some(Err(error))) = &polled {
                    tracing::warn!("an answer is cut off: {error}");
                }
                polled.map(|piece| piece.map(|piece| piece.map(Frame::data)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.body {
            Body::Empty => true,
            Body::Bytes(bytes) => bytes.is_empty(),
            Body::Stream { .. } => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(match &self.body {
            Body::Empty => 0,
            Body::Bytes(bytes) => bytes.len() as u64,
            Body::Stream { n_bytes, .. } => *n_bytes,
        })
    }
}
