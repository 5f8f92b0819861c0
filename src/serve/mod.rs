//! Giving chunks and indexes to others.
//!
//! * [`http`] is what both servers share: listening, connections, TLS, limits, authorization, the access log and the metrics.
//! * [`chunk_server`] answers requests for chunks, [`index_server`] requests for indexes and archives; `beside` is
//!   what lies beside those.
//! * [`pull`] and [`push`] speak the casync protocol over standard input and output; `wire` has its frames, `stdio` the streams.
//!
//! Invariants: no request is unbounded in time or memory; what is uploaded is checked before it is kept (unless that is switched
//! off); an answer tells no secret and no path of this machine.

pub mod http;

pub mod chunk_server;

pub mod index_server;

pub mod pull;

pub mod push;

pub use wire::SessionError;

mod beside;
mod shared_call;
mod stdio;
mod wire;
