//! What lies in a bucket as in a directory: objects, and prefixes that end with `/`.

use object_store::list::PaginatedListOptions;

use super::answer::Trouble;
use super::{BucketStore, info_of};
use crate::store::StoreError;
use crate::store::files::Listed;
use crate::store::listing::{MAX_LISTED, is_name};

impl BucketStore {
    /// The names in a directory. One without objects is not told from one that is not there.
    pub(super) async fn list_directory(&self, directory: &str) -> Result<Option<Vec<Listed>>, StoreError> {
        let prefix = match directory {
            "" => self.prefix.clone(),
            below => format!("{}{below}/", self.prefix),
        };
        let mut listed = Vec::new();
        let mut page_token: Option<String> = None;
        loop {
            let page = self.request(directory, |bucket| {
                let prefix = Some(prefix.as_str()).filter(|prefix| !prefix.is_empty());
                let options = PaginatedListOptions {
                    delimiter: Some("/".into()),
                    page_token: page_token.clone(),
                    ..PaginatedListOptions::default()
                };
                async move { bucket.list_paginated(prefix, options).await.map_err(Trouble::from) }
            });
            let page = page.await?;
            let name_of = |key: &str| {
                let name = key.strip_prefix(prefix.as_str())?.trim_end_matches('/');
                is_name(name).then(|| name.to_owned())
            };
            listed.extend(page.result.common_prefixes.iter().filter_map(|key| {
                let name = name_of(key.as_ref())?;
                Some(Listed { name, is_directory: true, size: None, mtime: None, version: None })
            }));
            listed.extend(page.result.objects.iter().filter_map(|meta| {
                let name = name_of(meta.location.as_ref())?;
                let info = info_of(meta);
                Some(Listed {
                    name,
                    is_directory: false,
                    size: Some(info.size),
                    mtime: info.mtime,
                    // Not all servers list the ETag that they send with the object.
                    version: None,
                })
            }));
            if listed.len() > MAX_LISTED {
                let reason = format!("it has more than {MAX_LISTED} names");
                return Err(StoreError::new(self.name.clone(), self.shown(directory), reason));
            }
            page_token = page.page_token;
            if page_token.is_none() {
                return Ok(Some(listed));
            }
        }
    }
}
