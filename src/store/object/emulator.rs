//! Requests for emulators of Google Cloud Storage, which know Google's JSON API.
//!
//! The crate speaks the XML API (`/bucket/object`). Emulators know that one partly and under Google's host name only, so the requests we
//! make of them are put in terms of the other: content is got from `/download/storage/v1/b/BUCKET/o/OBJECT` and sent to
//! `/upload/storage/v1/b/BUCKET/o` (<https://cloud.google.com/storage/docs/json_api/v1/objects>).

use object_store::HeaderValue;
use object_store::client::{HttpRequest, HttpResponse};

/// The request in terms of the JSON API; one that names no object stays as it is.
pub fn to_json_api(mut request: HttpRequest) -> HttpRequest {
    let is_upload = request.method().as_str() == "PUT";
    let uri = request.uri().to_string();
    let Some(translated) = translate(&uri, is_upload) else { return request };
    let (Ok(uri), Ok(post)) = (translated.parse(), "POST".parse()) else { return request };
    *request.uri_mut() = uri;
    if is_upload {
        *request.method_mut() = post;
    }
    request
}

/// The answer with the tag of an upload, which the JSON API has in the body and the crate looks for in the headers.
pub fn to_xml_api(mut response: HttpResponse) -> HttpResponse {
    if response.status().is_success() && !response.headers().contains_key("etag") {
        response.headers_mut().insert("etag", HeaderValue::from_static("\"\""));
    }
    response
}

/// `BASE/BUCKET/OBJECT`, both escaped, in the other API; the crate escapes every `/` in the name of an object.
fn translate(uri: &str, is_upload: bool) -> Option<String> {
    if uri.contains('?') {
        return None;
    }
    let (rest, object) = uri.rsplit_once('/')?;
    let (base, bucket) = rest.rsplit_once('/')?;
    Some(match is_upload {
        true => format!("{base}/upload/storage/v1/b/{bucket}/o?uploadType=media&name={object}"),
        false => format!("{base}/download/storage/v1/b/{bucket}/o/{object}?alt=media"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_named_in_the_json_api() {
        let translated = |is_upload| translate("http://127.0.0.1:9/x/bkt/6a1d%2F6a%2Ecacnk", is_upload);
        let read = "http://127.0.0.1:9/x/download/storage/v1/b/bkt/o/6a1d%2F6a%2Ecacnk?alt=media";
        let write = "http://127.0.0.1:9/x/upload/storage/v1/b/bkt/o?uploadType=media&name=6a1d%2F6a%2Ecacnk";
        assert_eq!((translated(false).as_deref(), translated(true).as_deref()), (Some(read), Some(write)));
        assert_eq!(translate("http://127.0.0.1:9/bkt?list-type=2", false), None);
    }
}
