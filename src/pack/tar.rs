//! stub
#![allow(missing_docs, unused)]
use std::path::Path;
#[derive(Debug, Default)]
pub struct TarOptions {
    pub feature_flags: crate::format::catar::FeatureFlags,
    pub one_file_system: bool,
    pub no_time: bool,
}
pub fn tar(root: &Path, o: &TarOptions, sink: &mut dyn std::io::Write) -> Result<(), super::PackError> {
    Err(super::PackError::Resources("not yet".into()))
}
