//! All integration tests, as one binary so that it is linked once.

#![allow(clippy::unwrap_used)]

mod format;
mod layering;
mod support;
