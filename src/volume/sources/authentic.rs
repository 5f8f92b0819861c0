//! An index that is what is demanded of it: read, its signature found, checked, and only then kept.
//!
//! Invariant: nothing that failed a check is kept, and what is kept is checked again.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use bytes::Bytes;

use super::{Came, ReadIndex, Sources};
use crate::blob::source::IndexBytes;
use crate::config::TrustConfig;
use crate::format::minisign::{MAX_SIGNATURE_BYTES, Signature};
use crate::store::FileInfo;
use crate::store::location::FileLocation;
use crate::volume::open::OpenError;
use crate::volume::trust::{self, TrustError};

impl Sources {
    /// An index that is what is demanded of it, what is known of its file, and its signature if one is demanded.
    ///
    /// # Errors
    /// As [`Sources::index`].
    pub async fn signed_index(
        &self,
        location: &FileLocation,
    ) -> Result<(IndexBytes, FileInfo, Option<Signature>), OpenError> {
        let ReadIndex { mut bytes, info, came } = self.read_index(location).await?;
        let mut signature = None;
        if trust::is_demanded(&self.config.trust) {
            let is_kept = came == Some(Came::FromCache);
            (bytes, signature) = self.checked(location, bytes, is_kept).await?;
        }
        if came == Some(Came::Fresh) {
            self.keep_file(location, &info, bytes.as_ref());
        }
        if let Some(signature) = &signature {
            tracing::info!("{location}: signed with key {}: {:?}", signature.key_id, signature.trusted_comment);
        }
        Ok((bytes, info, signature))
    }

    /// Checks an index that was read; `is_kept` says that it is what was kept of it.
    async fn checked(
        &self,
        location: &FileLocation,
        mut bytes: IndexBytes,
        is_kept: bool,
    ) -> Result<(IndexBytes, Option<Signature>), OpenError> {
        let fail = |error: TrustError| OpenError::new(&location.to_string(), error);
        let demands = &self.config.trust;
        if demands.verify_key.is_none() {
            let (bytes, checked) = check(location, bytes, None, String::new(), demands).await?;
            return Ok((bytes, checked.map_err(fail)?));
        }
        let place = trust::signature_of(location).ok_or_else(|| fail(TrustError::Stdin))?;
        let name = place.to_string();
        // A signature that was kept was kept with an index that it is the signature of: as a rule this one, and there is no need to ask.
        if let Some(kept) = Some(&place).filter(|_| is_kept).and_then(|place| self.kept_file(place)) {
            let checked;
            (bytes, checked) = check(location, bytes, Some(kept.bytes), name.clone(), demands).await?;
            if let Ok(signature) = checked {
                return Ok((bytes, signature));
            }
        }
        let found = self.signature_file(&place).await?;
        let text = found.as_ref().map(|(text, _)| text.clone());
        let (bytes, checked) = check(location, bytes, text, name, demands).await?;
        let signature = checked.map_err(fail)?;
        if let Some((text, Some(info))) = &found {
            self.keep_file(&place, info, text);
        }
        Ok((bytes, signature))
    }

    /// The signature that lies beside an index, `None` if there is none; with what is known of it if it is fresh and lies in a store.
    async fn signature_file(&self, place: &FileLocation) -> Result<Option<(Bytes, Option<FileInfo>)>, OpenError> {
        match place {
            FileLocation::Remote { name, .. } => {
                let found = self.whole_file(place, name, MAX_SIGNATURE_BYTES).await?;
                Ok(found.map(|(whole, came)| (whole.bytes, Some(whole.info).filter(|_| came == Came::Fresh))))
            }
            FileLocation::Local(_) | FileLocation::Stdio => {
                let read = local_signature(place.file_name());
                let read = read.map_err(|error| OpenError::new(&place.to_string(), error))?;
                Ok(read.map(|text| (text.into(), None)))
            }
        }
    }
}

/// Checks on a thread that may take its time, as a large index does, and gives the index back.
async fn check(
    location: &FileLocation,
    bytes: IndexBytes,
    signature: Option<Bytes>,
    signature_name: String,
    demands: &TrustConfig,
) -> Result<(IndexBytes, Result<Option<Signature>, TrustError>), OpenError> {
    let demands = demands.clone();
    let checking = tokio::task::spawn_blocking(move || {
        let checked = trust::check(bytes.as_ref(), signature.as_deref(), &signature_name, &demands);
        (bytes, checked)
    });
    checking.await.map_err(|error| OpenError::new(&location.to_string(), format!("it could not be checked: {error}")))
}

fn local_signature(path: &Path) -> io::Result<Option<Vec<u8>>> {
    // Looked at before it is opened: opening a pipe would wait for whoever writes it.
    match path.metadata() {
        Ok(metadata) if metadata.is_file() && metadata.len() <= MAX_SIGNATURE_BYTES => {}
        Ok(metadata) if metadata.is_file() => return Err(io::Error::other("too large for a signature")),
        Ok(_) => return Err(io::Error::other("not a regular file")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_SIGNATURE_BYTES).read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}
