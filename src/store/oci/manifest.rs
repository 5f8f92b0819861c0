//! The manifest of a chunk (formats.md 7.1): an image manifest with an artifact type of its own, the empty configuration, and one layer.

use bytes::Bytes;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

/// The media type of manifests.
pub(super) const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

/// The media type of a chunk's blob.
pub(super) const BLOB_TYPE: &str = "application/octet-stream";

/// What tells the manifest of a chunk from others.
const ARTIFACT_TYPE: &str = "application/vnd.desync.chunk.v1";

/// The empty configuration of the OCI image specification.
pub(super) const EMPTY_CONFIG: &[u8] = b"{}";
/// Its digest.
pub(super) const EMPTY_CONFIG_DIGEST: &str = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";
const EMPTY_CONFIG_TYPE: &str = "application/vnd.oci.empty.v1+json";

/// The blob a manifest names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Descriptor {
    /// `sha256:<64 hex digits>`.
    pub digest: String,
    /// Its length in bytes.
    pub size: u64,
}

impl Descriptor {
    /// What names these bytes.
    pub fn of(content: &[u8]) -> Self {
        let hex: String = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
        Self { digest: format!("sha256:{hex}"), size: content.len() as u64 }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    artifact_type: Option<String>,
    #[serde(default)]
    layers: Vec<Layer>,
}

#[derive(Deserialize)]
struct Layer {
    digest: String,
    size: u64,
}

/// The blob that the manifest of a chunk names; `None` for the manifest of something else.
///
/// # Errors
/// What is wrong with it.
pub(super) fn read(content: &[u8]) -> Result<Option<Descriptor>, String> {
    let manifest: Manifest = serde_json::from_slice(content).map_err(|error| format!("not a manifest: {error}"))?;
    if manifest.artifact_type.as_deref() != Some(ARTIFACT_TYPE) {
        return Ok(None);
    }
    let [Layer { digest, size }] = &manifest.layers[..] else {
        return Err(format!("the manifest of a chunk has {} layers, not one", manifest.layers.len()));
    };
    // The digest becomes a part of a URL.
    let is_digest = digest.strip_prefix("sha256:").is_some_and(|hex| {
        hex.len() == 64 && hex.bytes().all(|digit| digit.is_ascii_digit() || (b'a'..=b'f').contains(&digit))
    });
    match is_digest {
        true => Ok(Some(Descriptor { digest: digest.clone(), size: *size })),
        false => Err("the manifest does not name its blob by sha256".to_owned()),
    }
}

/// The manifest of the chunk in this blob.
pub(super) fn write(blob: &Descriptor, tag: &str) -> Bytes {
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": {"mediaType": EMPTY_CONFIG_TYPE, "digest": EMPTY_CONFIG_DIGEST, "size": EMPTY_CONFIG.len()},
        "layers": [{"mediaType": BLOB_TYPE, "digest": blob.digest, "size": blob.size}],
        "annotations": {"org.opencontainers.image.title": tag},
    });
    manifest.to_string().into()
}

/// What an error of the registry says: `{"errors": [{"code": "…", "message": "…"}]}` (OCI distribution specification).
pub(super) fn error_words(body: &str) -> Option<String> {
    let answer: ErrorAnswer = match serde_json::from_str(body) {
        Ok(answer) => answer,
        Err(_) => return body.lines().next().filter(|line| !line.starts_with('<')).map(str::to_owned),
    };
    let words = answer.errors.iter().map(|error| format!("{} ({})", error.message, error.code));
    Some(words.collect::<Vec<_>>().join(", "))
}

/// The code of an error about a manifest whose blob is not there.
pub(super) const UNKNOWN_BLOB: &str = "BLOB_UNKNOWN";

#[derive(Deserialize)]
struct ErrorAnswer {
    errors: Vec<OneError>,
}

#[derive(Deserialize)]
struct OneError {
    code: String,
    #[serde(default)]
    message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let blob = Descriptor::of(b"content");
        assert_eq!(read(&write(&blob, "tag")), Ok(Some(blob)));
        assert_eq!(Descriptor::of(EMPTY_CONFIG).digest, EMPTY_CONFIG_DIGEST);
    }

    #[test]
    fn errors_are_told_in_words() {
        let body = r#"{"errors":[{"code":"DENIED","message":"no","detail":[1]},{"code":"MANIFEST_BLOB_UNKNOWN"}]}"#;
        assert_eq!(error_words(body).as_deref(), Some("no (DENIED),  (MANIFEST_BLOB_UNKNOWN)"));
        assert_eq!(error_words("out of order\n").as_deref(), Some("out of order"));
        assert_eq!(error_words("<html>"), None);
        assert_eq!(error_words(""), None);
    }

    #[test]
    fn other_manifests_are_missing_and_bad_ones_are_errors() {
        let of = |layers: &str| format!(r#"{{"artifactType":"{ARTIFACT_TYPE}","layers":{layers}}}"#);
        assert_eq!(read(br#"{"schemaVersion":2,"layers":[]}"#), Ok(None));
        assert_eq!(read(br#"{"artifactType":"application/x"}"#), Ok(None));
        let hex = "0".repeat(64);
        for (manifest, what) in [
            ("rubbish".to_owned(), "not a manifest"),
            (of("[]"), "0 layers"),
            (of(r#"[{"digest":"sha256:../..","size":1}]"#), "by sha256"),
            (of(&format!(r#"[{{"digest":"sha512:{hex}","size":1}}]"#)), "by sha256"),
            (of(&format!(r#"[{{"digest":"sha256:{hex}","size":-1}}]"#)), "not a manifest"),
        ] {
            let error = read(manifest.as_bytes()).expect_err(&manifest);
            assert!(error.contains(what), "{error}");
        }
    }
}
