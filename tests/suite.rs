//! All integration tests, as one binary so that it is linked once.

#![allow(clippy::unwrap_used)]

mod backing;
mod cache;
mod chunks;
mod cli;
mod config;
mod format;
mod hostile;
mod inspect;
mod interop;
mod layering;
mod ls;
mod mirrors;
mod model;
mod mount;
mod mount_service;
mod pack;
mod pack_tar;
mod protocol;
mod proxy;
mod remote;
mod serve;
mod store;
mod support;
mod volume;
