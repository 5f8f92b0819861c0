//! All integration tests, as one binary so that it is linked once.

mod layering;
mod support;
