//! `caifs chunk-server` and `caifs index-server`.

use std::env;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use tokio::runtime::Runtime;

use super::serve_flags::{ChunkServerArgs, IndexServerArgs, ServerFlags};
use super::settings;
use crate::chunk::cipher::{Algorithm, Cipher, Key};
use crate::config::StoreSettings;
use crate::digest::Digest;
use crate::serve::chunk_server::{ChunkServer, ChunkServerConfig, Reopen, Upstream};
use crate::serve::http::{HttpConfig, Limits, LogTarget, Server, Service, TlsFiles, signals};
use crate::serve::index_server::IndexServer;
use crate::store::layout::Layout;
use crate::store::local_files::LocalFiles;
use crate::store::location::{Location, without_secrets};
use crate::store::open::{StoreSpec, open_files, open_stores, open_writable};
use crate::store::{FileStore, Form, Secret, WriteStore};

/// Where `--authorization` is looked for when it is not given.
const AUTHORIZATION_VARIABLE: &str = "DESYNC_HTTP_AUTH";

/// Where `--encryption-key` is looked for when it is not given.
const KEY_VARIABLE: &str = "DESYNC_ENCRYPTION_KEY";

/// `caifs chunk-server`.
pub fn chunk_server(args: &ChunkServerArgs) -> Result<()> {
    let runtime = Runtime::new().context("cannot start")?;
    let settings = settings::of_access(&args.server.access, Some(args.server.concurrency))?;
    let config = ChunkServerConfig {
        layout: layout(args)?,
        digest: digest(&args.server)?,
        verify_read: !args.skip_verify_read && !are_trusted(&settings, &args.stores)?,
        verify_write: !args.skip_verify_write,
    };
    let is_writable = args.writable;
    // Stores over a network are made inside a runtime.
    let entered = runtime.enter();
    let (upstream, reopen) = match &args.store_file {
        None => {
            let stores = StoreFile { stores: args.stores.clone(), cache: args.cache.clone() };
            (stores.open(&settings, is_writable)?, None)
        }
        Some(path) => {
            let path = path.clone();
            let open = move || StoreFile::read(&path)?.open(&settings, is_writable);
            let upstream = open()?;
            let reopen: Reopen = Box::new(move || open().map_err(|error| format!("{error:#}")));
            (upstream, Some(reopen))
        }
    };
    drop(entered);
    serve(runtime, &args.server, Arc::new(ChunkServer::new(config, upstream, reopen)))
}

/// `caifs index-server`.
pub fn index_server(args: &IndexServerArgs) -> Result<()> {
    let runtime = Runtime::new().context("cannot start")?;
    let entered = runtime.enter();
    let settings = settings::of_access(&args.server.access, Some(args.server.concurrency))?;
    let files = index_place(&settings, &args.store)?;
    drop(entered);
    let service = IndexServer::new(files, digest(&args.server)?, args.writable);
    serve(runtime, &args.server, Arc::new(service))
}

/// What a chunk server serves, as a store file says it.
#[derive(Debug, Deserialize)]
struct StoreFile {
    #[serde(default)]
    stores: Vec<String>,
    #[serde(default)]
    cache: Option<String>,
}

impl StoreFile {
    fn read(path: &Path) -> Result<Self> {
        let name = || format!("store file {}", path.display());
        let text = std::fs::read(path).with_context(name)?;
        serde_json::from_slice(&text).with_context(name)
    }

    fn open(&self, settings: &StoreSettings, is_writable: bool) -> Result<Upstream> {
        let cache = match self.cache.as_deref().filter(|cache| !cache.is_empty()) {
            None => None,
            Some(text) => Some(writable(settings, text)?),
        };
        if is_writable {
            let ([text], None) = (self.stores.as_slice(), &cache) else {
                bail!("a writable chunk server needs exactly one store, and no cache");
            };
            let writable = writable(settings, text)?;
            return Ok(Upstream { store: Arc::clone(&writable) as _, cache: None, writable: Some(writable) });
        }
        if self.stores.is_empty() {
            bail!("there is no store to serve (name one with -s, or in the store file)");
        }
        let groups: Vec<_> = self.stores.iter().map(|text| resolve(settings, text)).collect::<Result<_>>()?;
        Ok(Upstream { store: open_stores(&groups)?, cache, writable: None })
    }
}

/// Whether chunks of all these stores may be handed on unverified. Whoever reads them verifies them, whatever is set.
fn are_trusted(settings: &StoreSettings, stores: &[String]) -> Result<bool> {
    let mut are_trusted = !stores.is_empty();
    for text in stores {
        are_trusted &= resolve(settings, text)?.iter().all(|spec| spec.options.skip_verify);
    }
    Ok(are_trusted)
}

/// What a store's location and options are.
fn resolve(settings: &StoreSettings, text: &str) -> Result<Vec<StoreSpec>> {
    Ok(settings.resolve(text)?)
}

/// Opens a store that chunks are written to.
fn writable(settings: &StoreSettings, text: &str) -> Result<Arc<dyn WriteStore>> {
    match resolve(settings, text)?.as_slice() {
        [StoreSpec { location, options }] => Ok(open_writable(location, options)?),
        _ => bail!("{}: a group of mirrors can only be read", without_secrets(text)),
    }
}

/// Opens the place of indexes.
fn index_place(settings: &StoreSettings, text: &str) -> Result<Arc<dyn FileStore>> {
    match resolve(settings, text)?.as_slice() {
        // A directory that is not there is a mistake, and not one without indexes.
        [StoreSpec { location: Location::Local(path), .. }] => Ok(Arc::new(LocalFiles::open(path)?)),
        [StoreSpec { location, options }] => Ok(open_files(location, options)?),
        _ => bail!("{}: indexes are served from one place, not from a group of mirrors", without_secrets(text)),
    }
}

fn digest(flags: &ServerFlags) -> Result<Digest> {
    flags.digest.parse().map_err(|error: String| anyhow!(error))
}

/// How chunks go over the wire.
fn layout(args: &ChunkServerArgs) -> Result<Layout> {
    let form = if args.uncompressed { Form::Plain } else { Form::Compressed };
    // A key or cipher says it, too, but a key in the environment alone does not.
    if !args.encryption && args.encryption_key.is_none() && args.encryption_algorithm.is_none() {
        return Ok(Layout { form, cipher: None });
    }
    let key = args.encryption_key.clone().or_else(|| env::var(KEY_VARIABLE).ok());
    let key = key.with_context(|| format!("encryption needs --encryption-key, or a key in ${KEY_VARIABLE}"))?;
    let key: Key = key.parse().map_err(|error: &str| anyhow!(error))?;
    let algorithm: Algorithm =
        args.encryption_algorithm.as_deref().unwrap_or_default().parse().map_err(|error: String| anyhow!(error))?;
    Ok(Layout { form, cipher: Some(Arc::new(Cipher::new(algorithm, &key))) })
}

/// Serves until a signal ends it.
fn serve(runtime: Runtime, flags: &ServerFlags, service: Arc<dyn Service>) -> Result<()> {
    let authorization = flags.authorization.clone().or_else(|| env::var(AUTHORIZATION_VARIABLE).ok());
    let config = HttpConfig {
        listen: flags.listen.clone(),
        tls: flags.cert.clone().zip(flags.key.clone()).map(|(cert, key)| TlsFiles {
            cert,
            key,
            client_ca: flags.client_ca.clone(),
        }),
        authorization: authorization.filter(|value| !value.is_empty()).map(Secret::new),
        access_log: flags.log.as_ref().map(|path| match path.as_os_str() == OsStr::new("-") {
            true => LogTarget::Stderr,
            false => LogTarget::File(path.clone()),
        }),
        limits: Limits::default(),
    };
    let served = runtime.block_on(async {
        // Before anybody can know that it answers, so that no signal comes too early.
        let (end, reloads) = signals::catch().context("cannot catch signals")?;
        let server = Server::bind(config, service).await?;
        for address in server.addresses()? {
            tracing::info!("listening on {address}");
        }
        server.run(end, reloads).await;
        Ok(())
    });
    // What still waits for a store or a disk then is waited for no longer.
    runtime.shutdown_background();
    served
}
