//! From a location and options to buckets of the `object_store` crate: server, region, credentials, TLS, timeouts.

use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::gcp::{GcpCredential, GoogleCloudStorageBuilder};
use object_store::{Certificate, ClientOptions, HeaderValue, RetryConfig, StaticCredentialProvider};
use url::Url;

use super::access::Access;
use super::answer::{Connector, Trouble};
use super::aws_profile::ProfileFile;
use crate::store::StoreOptions;
use crate::store::location::{Lookup, S3Location};
use crate::store::options::{HttpOptions, S3Options};
use crate::store::tls::install_provider;

/// How long connecting may take.
const MAX_CONNECT: Duration = Duration::from_secs(10);

/// The region when neither the options nor the server's name tell one; servers of others than AWS mostly do not care.
const DEFAULT_REGION: &str = "us-east-1";

/// Where Google Cloud Storage is.
const GOOGLE_ENDPOINT: &str = "https://storage.googleapis.com";

/// What is called by the server's name.
const USER_AGENT: &str = concat!("caifs/", env!("CARGO_PKG_VERSION"));

/// The ways into an S3 bucket.
///
/// # Errors
/// What is wrong with the options.
pub fn s3(location: &S3Location, options: &StoreOptions) -> Result<Access, String> {
    let builder = s3_builder(location, options)?;
    let build = |builder: AmazonS3Builder| builder.build().map_err(reason);
    if !is_sought(&options.s3) {
        return Ok(Access::Given(Arc::new(build(builder)?)));
    }
    let unsigned = build(builder.clone().with_skip_signature(true))?;
    let signed = build(builder)?;
    let credentials = Arc::clone(signed.credentials());
    let search = move || -> futures_util::future::BoxFuture<'static, object_store::Result<()>> {
        let credentials = Arc::clone(&credentials);
        Box::pin(async move { credentials.get_credential().await.map(drop) })
    };
    Ok(Access::sought(Arc::new(signed), Arc::new(unsigned), Box::new(search)))
}

/// The ways into a bucket of Google Cloud Storage.
///
/// # Errors
/// What is wrong with the options.
pub fn gcs(bucket: &str, options: &StoreOptions) -> Result<Access, String> {
    let endpoint = options.gcs.endpoint.as_deref().unwrap_or(GOOGLE_ENDPOINT).trim_end_matches('/');
    let url = Url::parse(endpoint).map_err(|error| format!("{endpoint} is not a URL: {error}"))?;
    let builder = GoogleCloudStorageBuilder::new()
        .with_client_options(client_options(options, &url)?)
        .with_retry(no_retries())
        .with_bucket_name(bucket)
        .with_base_url(endpoint)
        .with_http_connector(Connector::new(&url).with_emulator(options.gcs.endpoint.is_some()));
    let build = |builder: GoogleCloudStorageBuilder| builder.build().map_err(reason);
    let unsigned = || {
        // With credentials given, even empty ones, the crate looks for no others.
        let nobody = StaticCredentialProvider::new(GcpCredential { bearer: String::new() });
        build(builder.clone().with_skip_signature(true).with_credentials(Arc::new(nobody)))
    };
    if options.gcs.anonymous || options.gcs.endpoint.is_some() {
        return Ok(Access::Given(Arc::new(unsigned()?)));
    }
    if let Some(path) = &options.gcs.credentials_file {
        let path = path.to_str().ok_or_else(|| format!("{}: not a UTF-8 name", path.display()))?;
        return Ok(Access::Given(Arc::new(build(builder.clone().with_application_credentials(path))?)));
    }
    let unsigned = unsigned()?;
    let signed = build(builder.clone())?;
    let credentials = Arc::clone(signed.credentials());
    let search = move || -> futures_util::future::BoxFuture<'static, object_store::Result<()>> {
        let credentials = Arc::clone(&credentials);
        Box::pin(async move { credentials.get_credential().await.map(drop) })
    };
    Ok(Access::sought(Arc::new(signed), Arc::new(unsigned), Box::new(search)))
}

fn s3_builder(location: &S3Location, options: &StoreOptions) -> Result<AmazonS3Builder, String> {
    let url = bucket_server(location)?;
    let is_virtual = is_virtual_host(location);
    let mut builder = AmazonS3Builder::new()
        .with_client_options(client_options(options, &url)?)
        .with_retry(no_retries())
        .with_region(region_of(&location.endpoint).unwrap_or(DEFAULT_REGION))
        // Not every server knows how to delete many at once, and we never do.
        .with_disable_bulk_delete(true)
        .with_http_connector(Connector::new(&url));
    let s3 = &options.s3;
    for (name, value) in &s3.more {
        let key: AmazonS3ConfigKey = name.parse().map_err(|_| format!("unknown setting '{name}'"))?;
        // The place is the location's to say.
        let is_place = matches!(
            key,
            AmazonS3ConfigKey::Bucket
                | AmazonS3ConfigKey::Endpoint
                | AmazonS3ConfigKey::S3Endpoint
                | AmazonS3ConfigKey::VirtualHostedStyleRequest
        );
        if !is_place {
            builder = builder.with_config(key, value);
        }
    }
    if let Some(region) = &s3.region {
        builder = builder.with_region(region);
    }
    builder = builder
        .with_bucket_name(&location.bucket)
        .with_endpoint(url.as_str().trim_end_matches('/'))
        .with_virtual_hosted_style_request(is_virtual);
    if s3.anonymous {
        return Ok(builder.with_skip_signature(true));
    }
    match (&s3.access_key, &s3.secret_key) {
        (Some(access_key), Some(secret_key)) => {
            builder = builder.with_access_key_id(access_key).with_secret_access_key(secret_key.expose());
            if let Some(token) = &s3.session_token {
                builder = builder.with_token(token.expose());
            }
        }
        (Some(_), None) => return Err("there is an access key, but no secret key".to_owned()),
        (None, Some(_)) => return Err("there is a secret key, but no access key".to_owned()),
        (None, None) => {
            if let Some(path) = &s3.credentials_file {
                let file = ProfileFile::new(path.clone(), s3.profile.clone());
                builder = builder.with_credentials(Arc::new(file));
            }
        }
    }
    Ok(builder)
}

/// Whether nobody said what credentials there are.
fn is_sought(s3: &S3Options) -> bool {
    use AmazonS3ConfigKey as Key;
    let says = |name: &String| {
        let key = name.parse::<Key>().ok();
        key.is_some_and(|key| {
            matches!(
                key,
                Key::AccessKeyId
                    | Key::SecretAccessKey
                    | Key::WebIdentityTokenFile
                    | Key::ContainerCredentialsRelativeUri
                    | Key::ContainerCredentialsFullUri
                    | Key::SkipSignature
            )
        })
    };
    let is_given = s3.anonymous || s3.access_key.is_some() || s3.credentials_file.is_some();
    !is_given && !s3.more.iter().any(|(name, _)| says(name))
}

/// The server that requests for a bucket go to; its name begins with the bucket's for virtual hosts.
fn bucket_server(location: &S3Location) -> Result<Url, String> {
    let endpoint = &location.endpoint;
    let mut url = Url::parse(endpoint).map_err(|error| format!("{endpoint} is not a URL: {error}"))?;
    if is_virtual_host(location) {
        let host = format!("{}.{}", location.bucket, url.host_str().unwrap_or_default());
        url.set_host(Some(&host)).map_err(|error| format!("{host} is no host name: {error}"))?;
    }
    Ok(url)
}

fn is_virtual_host(location: &S3Location) -> bool {
    match location.lookup {
        Lookup::Dns => true,
        Lookup::Path => false,
        Lookup::Auto => {
            let host = host_of(&location.endpoint);
            let has_names = is_aws(host) || host == "storage.googleapis.com";
            // A certificate for *.host does not cover a name with a further dot.
            has_names && !location.bucket.contains('.')
        }
    }
}

/// The region in the name of a server of AWS: `s3.REGION.amazonaws.com`, `s3-REGION.…`, `s3.dualstack.REGION.…`.
fn region_of(endpoint: &str) -> Option<&str> {
    let host = host_of(endpoint);
    let names = host.strip_suffix(".cn").unwrap_or(host).strip_suffix(".amazonaws.com")?;
    let last = names.rsplit('.').next()?;
    let region = last.strip_prefix("s3-").unwrap_or(last);
    // Regions are words and a number; "s3", "accelerate", "dualstack" and "external-1" (an old name without one) are none.
    let is_region = region.contains('-') && region.ends_with(|c: char| c.is_ascii_digit());
    (is_region && !region.starts_with("external")).then_some(region)
}

fn is_aws(host: &str) -> bool {
    host.strip_suffix(".cn").unwrap_or(host).ends_with(".amazonaws.com")
}

fn host_of(endpoint: &str) -> &str {
    let host = endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest);
    host.split(['/', ':']).next().unwrap_or(host)
}

fn client_options(options: &StoreOptions, endpoint: &Url) -> Result<ClientOptions, String> {
    install_provider();
    let HttpOptions { ca_cert, trust_insecure, .. } = &options.http;
    let mut client = ClientOptions::new()
        .with_user_agent(HeaderValue::from_static(USER_AGENT))
        .with_allow_http(endpoint.scheme() == "http")
        .with_allow_invalid_certificates(*trust_insecure)
        .with_connect_timeout(MAX_CONNECT.min(options.request_timeout))
        .with_timeout(options.request_timeout);
    if let Some(path) = ca_cert {
        let wrong = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let pem = std::fs::read(path).map_err(|error| wrong(&error))?;
        let certificates = Certificate::from_pem_bundle(&pem).map_err(|error| wrong(&error))?;
        if certificates.is_empty() {
            return Err(wrong(&"no certificate in it"));
        }
        for certificate in certificates {
            client = client.with_root_certificate(certificate);
        }
    }
    Ok(client)
}

/// The crate makes each request once: `store::retry` makes it again.
fn no_retries() -> RetryConfig {
    RetryConfig { max_retries: 0, ..RetryConfig::default() }
}

fn reason(error: object_store::Error) -> String {
    match Trouble::from(error) {
        Trouble::Refused(refusal) => refusal.to_string(),
        Trouble::Broken(text) | Trouble::Wrong(text) => text,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::Secret;
    use crate::store::options::GcsOptions;

    fn location(endpoint: &str, bucket: &str, lookup: Lookup) -> S3Location {
        S3Location { endpoint: endpoint.to_owned(), bucket: bucket.to_owned(), prefix: String::new(), lookup }
    }

    #[test]
    fn buckets_are_named_by_host_or_path() {
        for (endpoint, bucket, lookup, server, is_virtual) in [
            ("https://s3.amazonaws.com", "b", Lookup::Auto, "https://b.s3.amazonaws.com/", true),
            ("https://s3.eu-west-1.amazonaws.com", "b", Lookup::Auto, "https://b.s3.eu-west-1.amazonaws.com/", true),
            ("https://s3.amazonaws.com", "b.c", Lookup::Auto, "https://s3.amazonaws.com/", false),
            ("https://s3.amazonaws.com", "b", Lookup::Path, "https://s3.amazonaws.com/", false),
            ("https://storage.googleapis.com", "b", Lookup::Auto, "https://b.storage.googleapis.com/", true),
            ("http://127.0.0.1:9000", "b", Lookup::Auto, "http://127.0.0.1:9000/", false),
            ("http://minio:9000", "b", Lookup::Dns, "http://b.minio:9000/", true),
            ("https://notamazonaws.com", "b", Lookup::Auto, "https://notamazonaws.com/", false),
        ] {
            let location = location(endpoint, bucket, lookup);
            assert_eq!(bucket_server(&location).unwrap().as_str(), server);
            assert_eq!(is_virtual_host(&location), is_virtual, "{location:?}");
        }
    }

    #[test]
    fn a_server_of_aws_tells_its_region() {
        for (endpoint, region) in [
            ("https://s3.eu-west-1.amazonaws.com", Some("eu-west-1")),
            ("https://s3-eu-west-1.amazonaws.com:443", Some("eu-west-1")),
            ("https://s3.dualstack.us-west-2.amazonaws.com", Some("us-west-2")),
            ("https://s3-fips.us-gov-west-1.amazonaws.com", Some("us-gov-west-1")),
            ("https://s3.cn-north-1.amazonaws.com.cn", Some("cn-north-1")),
            ("https://s3.amazonaws.com", None),
            ("https://s3-accelerate.amazonaws.com", None),
            ("https://s3-external-1.amazonaws.com", None),
            ("http://127.0.0.1:9000", None),
            ("https://minio.example", None),
        ] {
            assert_eq!(region_of(endpoint), region, "{endpoint}");
        }
    }

    #[test]
    fn options_reach_the_builder() {
        let value = |s3: S3Options, key: AmazonS3ConfigKey| {
            let options = StoreOptions { s3, ..StoreOptions::default() };
            let place = location("https://s3.eu-west-1.amazonaws.com", "b", Lookup::Auto);
            s3_builder(&place, &options).map(|builder| builder.get_config_value(&key))
        };
        let keys = S3Options {
            access_key: Some("id".to_owned()),
            secret_key: Some(Secret::new("secret")),
            session_token: Some(Secret::new("token")),
            ..S3Options::default()
        };
        let more = |pairs: &[(&str, &str)]| S3Options {
            more: pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
            ..S3Options::default()
        };
        use AmazonS3ConfigKey as Key;
        let some = |text: &str| Ok(Some(text.to_owned()));
        assert_eq!(value(S3Options::default(), Key::Region), some("eu-west-1"));
        assert_eq!(value(S3Options::default(), Key::AccessKeyId), Ok(None));
        assert_eq!(value(keys.clone(), Key::AccessKeyId), some("id"));
        assert_eq!(value(keys.clone(), Key::SecretAccessKey), some("secret"));
        assert_eq!(value(keys.clone(), Key::Token), some("token"));
        assert_eq!(value(S3Options { region: Some("r".to_owned()), ..keys.clone() }, Key::Region), some("r"));
        assert_eq!(value(S3Options { anonymous: true, ..keys.clone() }, Key::SkipSignature), some("true"));
        assert_eq!(value(more(&[("aws_region", "r")]), Key::Region), some("r"));
        // The location says where, whatever else does.
        let elsewhere = more(&[("aws_endpoint_url_s3", "https://x"), ("aws_endpoint", "https://y"), ("bucket", "z")]);
        assert_eq!(value(elsewhere.clone(), Key::S3Endpoint), Ok(None));
        assert_eq!(value(elsewhere.clone(), Key::Endpoint), some("https://b.s3.eu-west-1.amazonaws.com"));
        assert_eq!(value(elsewhere, Key::Bucket), some("b"));
        assert!(value(more(&[("aws_nonsense", "x")]), Key::Region).unwrap_err().contains("aws_nonsense"));
        let error = value(S3Options { secret_key: None, ..keys.clone() }, Key::Region).unwrap_err();
        assert!(error.contains("no secret key"));
        assert!(value(S3Options { access_key: None, ..keys.clone() }, Key::Region).is_err());

        assert!(is_sought(&S3Options::default()));
        assert!(is_sought(&more(&[("aws_metadata_endpoint", "http://127.0.0.1:1")])));
        assert!(!is_sought(&more(&[("aws_web_identity_token_file", "/x"), ("aws_role_arn", "x")])));
        assert!(!is_sought(&keys));
        assert!(!is_sought(&S3Options { anonymous: true, ..S3Options::default() }));
        assert!(!is_sought(&S3Options { credentials_file: Some("/x".into()), ..S3Options::default() }));
    }

    #[test]
    fn files_that_are_named_must_be_good() {
        let with =
            |gcs: GcsOptions, http: HttpOptions| gcs_reason(&StoreOptions { gcs, http, ..StoreOptions::default() });
        let none = GcsOptions { credentials_file: Some("/no/such".into()), ..GcsOptions::default() };
        assert!(with(none, HttpOptions::default()).contains("/no/such"));
        let ca_cert = |path: &str| HttpOptions { ca_cert: Some(path.into()), ..HttpOptions::default() };
        assert!(with(GcsOptions::default(), ca_cert("/no/such")).starts_with("/no/such: No such file"));
        assert!(with(GcsOptions::default(), ca_cert("/dev/null")).contains("no certificate"));
        let endpoint = GcsOptions { endpoint: Some("127.0.0.1".to_owned()), ..GcsOptions::default() };
        assert!(with(endpoint, HttpOptions::default()).contains("not a URL"));
    }

    fn gcs_reason(options: &StoreOptions) -> String {
        gcs("b", options).expect_err("it is wrong")
    }
}
