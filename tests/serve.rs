//! The servers, as clients see them: a raw one that says exactly what it means, desync and casync.

mod beside;
mod chunks;
mod client;
mod clients;
mod connections;
mod indexes;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use caifs::chunk::codec::{self, Form};
use caifs::digest::{ChunkId, Digest};
use caifs::store::local::LocalStore;
use caifs::store::{Stored, WriteStore};

use crate::support::run::caifs;
use crate::support::server::{Server, free_port};

/// Starts one of our servers on a free port.
fn start(verb: &str, args: impl FnOnce(&mut Command) -> &mut Command) -> Server {
    let port = free_port();
    let mut command = caifs();
    command.env_remove("DESYNC_HTTP_AUTH").env_remove("DESYNC_ENCRYPTION_KEY");
    command.arg(verb).arg("-l").arg(format!("127.0.0.1:{port}"));
    Server::start(args(&mut command), port)
}

/// A chunk server over a directory.
fn chunk_server(store: &Path, flags: &[&str]) -> Server {
    start("chunk-server", |command| command.arg("-s").arg(store).args(flags))
}

fn url(server: &Server) -> String {
    format!("http://{}/", server.address())
}

/// `/6a1d/6a1d…` without extension.
fn path_of(id: ChunkId) -> String {
    let hex = id.to_hex();
    format!("/{}/{hex}", &hex[..4])
}

fn id_of(plain: &[u8]) -> ChunkId {
    Digest::default().id(plain)
}

fn compressed(plain: &[u8]) -> Vec<u8> {
    codec::encode(plain, codec::DEFAULT_LEVEL)
}

/// The file of a chunk in a directory.
fn file_of(store: &Path, id: ChunkId, extension: &str) -> PathBuf {
    store.join(format!("{}{extension}", &path_of(id)[1..]))
}

/// A new store with some chunks.
fn store_of(dir: &Path, form: Form, chunks: &[&[u8]]) -> LocalStore {
    fs::create_dir_all(dir).unwrap();
    let store = LocalStore::open(dir).unwrap().with_form(form);
    for plain in chunks {
        let bytes = match form {
            Form::Compressed => compressed(plain),
            Form::Plain => plain.to_vec(),
        };
        let put = store.put(id_of(plain), Stored { form, bytes: bytes.into() });
        futures_util::FutureExt::now_or_never(put).expect("a local store does not wait").unwrap();
    }
    store
}
