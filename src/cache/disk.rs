//! placeholder until the disk tier is merged
use crate::cache::Want;
use crate::chunk::Chunk;
use crate::digest::Digest;
use crate::report::Report;
use crate::store::Stored;
use std::path::PathBuf;
use std::sync::Arc;
#[derive(Debug)]
#[allow(missing_docs)]
pub struct DiskTier {}
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct DiskConfig {
    pub path: PathBuf,
    pub quota_bytes: Option<u64>,
    pub keep_free_bytes: u64,
}
#[allow(missing_docs)]
impl DiskTier {
    pub fn open(_: DiskConfig, _: Arc<Report>) -> std::io::Result<Arc<Self>> {
        Ok(Arc::new(Self {}))
    }
    pub fn get(&self, _: Digest, _: &Want) -> Option<Chunk> {
        None
    }
    pub fn keep(&self, _: &Chunk, _: &Stored) {}
}

#[derive(Debug)]
#[allow(missing_docs)]
pub struct BlockMap {}
#[allow(missing_docs)]
impl BlockMap {
    pub fn get(&self, _: u64) -> Option<crate::digest::ChunkId> {
        None
    }
    pub fn set(&self, _: u64, _: crate::digest::ChunkId) {}
}
#[allow(missing_docs)]
impl DiskTier {
    pub fn block_ids(&self, _: &str, _: &str) -> BlockMap {
        BlockMap {}
    }
    pub fn kept_file(&self, _: &str) -> Option<KeptFile> {
        None
    }
    pub fn keep_file(&self, _: &str, _: Option<&str>, _: Option<std::time::SystemTime>, _: &[u8]) {}
    pub fn path(&self) -> &std::path::Path {
        std::path::Path::new("/")
    }
}
#[derive(Debug)]
#[allow(missing_docs)]
pub struct KeptFile {
    pub bytes: Vec<u8>,
    pub version: Option<String>,
    pub mtime: Option<std::time::SystemTime>,
}
