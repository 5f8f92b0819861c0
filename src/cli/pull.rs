//! `caifs pull` and `caifs push`: the far ends of the casync protocol, as ssh runs them.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use tokio::runtime::Runtime;

use super::args::ProtocolArgs;
use super::settings;
use crate::config::StoreSettings;
use crate::config::units::parse_size;
use crate::serve::pull::Pull;
use crate::serve::push::Push;
use crate::store::location::without_secrets;
use crate::store::open::{StoreSpec, open_stores, open_writable};
use crate::store::{Store, WriteStore};

/// `caifs pull BASE ARCHIVE INDEX STORE…`.
pub fn pull(args: &ProtocolArgs, rate_limit: Option<&str>) -> Result<()> {
    let words = Words::of(args)?;
    let runtime = Runtime::new().context("cannot start")?;
    let _entered = runtime.enter();
    let settings = settings::of_access(&args.access, None)?;
    let store = match words.stores.is_empty() {
        true => None,
        false => {
            let groups: Result<Vec<_>, _> = words.stores.iter().map(|text| settings.resolve(text)).collect();
            Some(open_stores(&groups?)?)
        }
    };
    let max_bytes_per_second = match rate_limit {
        None => None,
        Some(text) => Some(parse_size(text).with_context(|| format!("--rate-limit-bps: {text:?} is not a size"))?),
    };
    let pull = Pull { archive: words.archive, index: words.index, store, max_bytes_per_second };
    let served = pull.serve(runtime.handle());
    drop(_entered);
    runtime.shutdown_background();
    Ok(served?)
}

/// `caifs push BASE ARCHIVE INDEX STORE…`: the first store is written to.
pub fn push(args: &ProtocolArgs) -> Result<()> {
    let words = Words::of(args)?;
    let runtime = Runtime::new().context("cannot start")?;
    let _entered = runtime.enter();
    let settings = settings::of_access(&args.access, None)?;
    let mut push = Push { archive: words.archive, index: words.index, ..Push::default() };
    if let Some((first, others)) = words.stores.split_first() {
        push.store = Some(writable(&settings, first)?);
        for text in others {
            push.others.push(open_stores(&[settings.resolve(text)?])? as Arc<dyn Store>);
        }
    }
    let served = push.serve(runtime.handle());
    drop(_entered);
    runtime.shutdown_background();
    Ok(served?)
}

fn writable(settings: &StoreSettings, text: &str) -> Result<Arc<dyn WriteStore>> {
    match settings.resolve(text)?.as_slice() {
        [StoreSpec { location, options }] => Ok(open_writable(location, options)?),
        _ => bail!("{}: a group of mirrors can only be read", without_secrets(text)),
    }
}

/// The words behind the verb by their places; `-` and nothing mean that there is none.
struct Words {
    archive: Option<PathBuf>,
    index: Option<PathBuf>,
    stores: Vec<String>,
}

impl Words {
    fn of(args: &ProtocolArgs) -> Result<Self> {
        let given = |word: &String| !word.is_empty() && word != "-";
        let [base, archive, index, stores @ ..] = args.words.as_slice() else {
            bail!("four words are needed: BASE ARCHIVE INDEX STORE, each - for none");
        };
        if given(base) {
            bail!("{base}: a base is not supported (it must be -)");
        }
        let path = |word: &String| given(word).then(|| PathBuf::from(word));
        let stores = stores.iter().filter(|word| given(word)).cloned().collect();
        Ok(Self { archive: path(archive), index: path(index), stores })
    }
}
