//! What the objects of a store are called and made of: `<4 hex digits>/<64 hex digits><extension>`.
//!
//! The extension is all there is to tell the form (formats.md 3 and 11): `.cacnk` for compressed chunks, nothing for plain ones,
//! and behind it the cipher and the first bytes of its key's digest for encrypted ones.

use std::sync::Arc;

use bytes::Bytes;

use super::Stored;
use crate::chunk::cipher::{Cipher, CipherError};
use crate::chunk::codec::Form;
use crate::digest::ChunkId;

/// Suffix of compressed chunks.
pub const COMPRESSED_SUFFIX: &str = ".cacnk";

/// Names and form of a store's objects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Compressed or plain.
    pub form: Form,
    /// What encrypts the objects.
    pub cipher: Option<Arc<Cipher>>,
}

impl Default for Layout {
    fn default() -> Self {
        Self { form: Form::Compressed, cipher: None }
    }
}

impl Layout {
    /// What follows the id in an object's name.
    pub fn extension(&self) -> String {
        let mut extension = form_extension(self.form).to_owned();
        if let Some(cipher) = &self.cipher {
            extension.push_str(&cipher.extension());
        }
        extension
    }

    /// `<64 hex digits><extension>`.
    pub fn file_name(&self, id: ChunkId) -> String {
        id.to_hex() + &self.extension()
    }

    /// `<4 hex digits>/<64 hex digits><extension>`.
    pub fn object_name(&self, id: ChunkId) -> String {
        let file_name = self.file_name(id);
        format!("{}/{file_name}", &file_name[..4])
    }

    /// The chunk that `<4 hex digits>/<64 hex digits><extension>` names; `None` for every other name.
    pub fn parse(&self, object_name: &str) -> Option<ChunkId> {
        let (directory, file_name) = object_name.split_once('/')?;
        let hex = file_name.strip_suffix(&self.extension())?;
        let id: ChunkId = hex.parse().ok()?;
        (id.to_hex() == hex && directory == &hex[..4]).then_some(id)
    }

    /// The chunk that an object's content holds.
    ///
    /// # Errors
    /// It cannot be decrypted.
    pub fn open(&self, content: Bytes) -> Result<Stored, CipherError> {
        let bytes = match &self.cipher {
            Some(cipher) => cipher.open(&content)?.into(),
            None => content,
        };
        Ok(Stored { form: self.form, bytes })
    }

    /// The content of the object for a chunk, which must be in this layout's form.
    ///
    /// # Errors
    /// What is wrong with the chunk.
    pub fn seal(&self, stored: Stored) -> Result<Bytes, &'static str> {
        if stored.form != self.form {
            return Err("the chunk has not the form this store keeps");
        }
        if stored.bytes.is_empty() {
            return Err("a stored chunk cannot be empty");
        }
        Ok(match &self.cipher {
            Some(cipher) => cipher.seal(&stored.bytes).into(),
            None => stored.bytes,
        })
    }
}

/// The part of the extension that tells the form.
pub fn form_extension(form: Form) -> &'static str {
    match form {
        Form::Compressed => COMPRESSED_SUFFIX,
        Form::Plain => "",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::chunk::cipher::{Algorithm, Key};
    use crate::digest::Digest;

    #[test]
    fn names_are_those_of_casync_and_desync() {
        let id = Digest::default().id(b"x");
        let hex = "6a1db6c1dd481f7aab2adb9c262b210edcca35624ec64c29ffca6857b1e30253";
        let key: Key = "d69371915dbc4b1f0ec55e2a80f0e089accf4b32e0f8dc0e29fed7f0f30d1b26".parse().unwrap();
        let chacha = Some(Arc::new(Cipher::new(Algorithm::XChaCha20Poly1305, &key)));
        let aes = Some(Arc::new(Cipher::new(Algorithm::Aes256Gcm, &key)));
        for (form, cipher, extension) in [
            (Form::Compressed, None, ".cacnk"),
            (Form::Plain, None, ""),
            (Form::Compressed, chacha, ".cacnk.xchacha20-poly1305-511a735b"),
            (Form::Plain, aes, ".aes-256-gcm-511a735b"),
        ] {
            let layout = Layout { form, cipher };
            let name = format!("6a1d/{hex}{extension}");
            assert_eq!(layout.object_name(id), name);
            assert_eq!(layout.parse(&name), Some(id));
            for wrong in [
                format!("6a1d/{hex}{extension}x"),
                format!("6a1e/{hex}{extension}"),
                format!("6a1d/{}{extension}", hex.to_uppercase()),
                format!("x/6a1d/{hex}{extension}"),
                hex.to_owned(),
            ] {
                assert_eq!(layout.parse(&wrong), None, "{wrong}");
            }
            let stored = Stored { form, bytes: Bytes::from_static(b"content") };
            let sealed = layout.seal(stored.clone()).unwrap();
            assert_eq!(sealed == stored.bytes, layout.cipher.is_none());
            assert_eq!(layout.open(sealed).unwrap(), stored);
            assert!(layout.seal(Stored { form, bytes: Bytes::new() }).is_err());
        }
    }
}
