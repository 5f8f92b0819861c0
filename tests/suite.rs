//! All integration tests, as one binary so that it is linked once.

#![allow(clippy::unwrap_used)]

mod ahead;
mod backing;
mod cache;
mod chunks;
mod cli;
mod collection;
mod config;
mod control;
mod daemon;
mod format;
mod fstab;
mod hostile;
mod inspect;
mod interop;
mod layering;
mod ls;
mod manual;
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
mod service;
mod store;
mod support;
mod table;
mod trust;
mod vm;
mod volume;
