//! Signed or unsigned: what is done when nobody gave credentials.
//!
//! The machine may have credentials of its own (an instance's metadata), or the bucket may be public. Which of the two is found
//! out at the first request, and remembered.
//!
//! Invariant: finding out takes at most [`MAX_SEARCH`]. A choice of unsigned requests that a server refuses is made anew after a while.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use object_store::ObjectStore;
use object_store::list::PaginatedListStore;
use tokio::sync::OnceCell;

use super::answer::Trouble;

/// How long the machine's own credentials are waited for. Where there is a server of metadata, it answers in milliseconds.
const MAX_SEARCH: Duration = Duration::from_secs(3);

/// How old a choice of unsigned requests must be for a refusal to undo it: the metadata may not have been there yet at boot.
const CHOICE_LASTS: Duration = Duration::from_secs(60);

/// A bucket, whoever's.
pub trait Bucket: ObjectStore + PaginatedListStore {}

impl<T: ObjectStore + PaginatedListStore> Bucket for T {}

/// Asks for credentials; the error says why there are none.
pub type Search = Box<dyn Fn() -> BoxFuture<'static, object_store::Result<()>> + Send + Sync>;

/// A way into a bucket.
#[derive(Debug, Clone)]
pub struct Way {
    /// The bucket, as it is asked this way.
    pub bucket: Arc<dyn Bucket>,
    /// Why requests are unsigned, if that was our choice and nobody's setting.
    pub why_unsigned: Option<String>,
}

/// The ways into a bucket.
pub enum Access {
    /// There is one.
    Given(Arc<dyn Bucket>),
    /// With the machine's own credentials if it has any, else without.
    Sought {
        /// With credentials.
        signed: Arc<dyn Bucket>,
        /// Without.
        unsigned: Arc<dyn Bucket>,
        /// Finds out whether there are any.
        search: Search,
        /// What was found.
        choice: Mutex<Arc<Choice>>,
    },
}

/// What was chosen, once it is.
#[derive(Debug, Default)]
pub struct Choice(OnceCell<(Way, Instant)>);

impl Access {
    /// With the credentials that a search finds, else without.
    pub fn sought(signed: Arc<dyn Bucket>, unsigned: Arc<dyn Bucket>, search: Search) -> Self {
        Self::Sought { signed, unsigned, search, choice: Mutex::default() }
    }

    /// The way to ask now; at the first call it is found out.
    pub async fn way(&self) -> Way {
        let (signed, unsigned, search, choice) = match self {
            Self::Given(bucket) => return Way { bucket: Arc::clone(bucket), why_unsigned: None },
            Self::Sought { signed, unsigned, search, choice } => (signed, unsigned, search, choice),
        };
        let choice = Arc::clone(&choice.lock().unwrap_or_else(PoisonError::into_inner));
        let chosen = choice.0.get_or_init(|| async {
            let why = match tokio::time::timeout(MAX_SEARCH, search()).await {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(match Trouble::from(error) {
                    Trouble::Refused(refusal) => refusal.to_string(),
                    Trouble::Broken(text) | Trouble::Wrong(text) => text,
                }),
                Err(_) => Some(format!("no answer within {} s", MAX_SEARCH.as_secs())),
            };
            if let Some(why) = &why {
                tracing::debug!("no credentials ({why}): requests go unsigned");
            }
            let bucket = if why.is_none() { signed } else { unsigned };
            (Way { bucket: Arc::clone(bucket), why_unsigned: why }, Instant::now())
        });
        chosen.await.0.clone()
    }

    /// Takes note that a server wants other credentials than a way's.
    pub fn refused(&self, way: &Way) {
        let Self::Sought { choice, .. } = self else { return };
        let mut choice = choice.lock().unwrap_or_else(PoisonError::into_inner);
        let is_old = choice.0.get().is_some_and(|(_, made)| made.elapsed() >= CHOICE_LASTS);
        if way.why_unsigned.is_some() && is_old {
            *choice = Arc::default();
        }
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Given(_) => "Given",
            Self::Sought { .. } => "Sought",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use object_store::gcp::GoogleCloudStorageBuilder;

    fn bucket(name: &str) -> Arc<dyn Bucket> {
        crate::store::tls::install_provider();
        let credentials = object_store::gcp::GcpCredential { bearer: String::new() };
        let credentials = Arc::new(object_store::StaticCredentialProvider::new(credentials));
        let builder = GoogleCloudStorageBuilder::new().with_bucket_name(name).with_credentials(credentials);
        Arc::new(builder.build().expect("complete"))
    }

    #[tokio::test(start_paused = true)]
    async fn credentials_are_sought_once() {
        for (answer, is_signed) in [(Some(true), true), (Some(false), false), (None, false)] {
            let n_searches = Arc::new(AtomicU32::new(0));
            let n = Arc::clone(&n_searches);
            let search: Search = Box::new(move || {
                n.fetch_add(1, Ordering::SeqCst);
                Box::pin(async move {
                    match answer {
                        Some(true) => Ok(()),
                        Some(false) => {
                            Err(object_store::Error::Generic { store: "S3", source: "nothing there".into() })
                        }
                        None => std::future::pending().await,
                    }
                })
            });
            let access = Access::sought(bucket("signed"), bucket("unsigned"), search);
            let ways = futures_util::future::join_all((0..9).map(|_| access.way())).await;
            for way in &ways {
                assert_eq!(way.why_unsigned.is_none(), is_signed);
                assert!(way.bucket.to_string().contains(if is_signed { "signed" } else { "unsigned" }));
                assert_eq!(way.bucket.to_string().contains("unsigned"), !is_signed);
                // A choice just made stands.
                access.refused(way);
            }
            access.way().await;
            assert_eq!(n_searches.load(Ordering::SeqCst), 1);
        }
    }
}
