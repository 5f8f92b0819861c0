//! Stores in registries: docker-registry open to all, with passwords, and with tokens from a server of the test.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use caifs::chunk::codec::Form;
use caifs::store::location::{Location, OciLocation};
use caifs::store::oci::OciStore;
use caifs::store::open::{open, open_writable};
use caifs::store::options::OciOptions;
use caifs::store::retry::RetryPolicy;
use caifs::store::{Secret, Store, StoreError, StoreOptions, WriteStore};

use super::http::layouts;
use super::{chunk, store_contract};
use crate::support::peers::peer;
use crate::support::run::run;
use crate::support::scratch::Scratch;
use crate::support::scripted::{Scripted, answer};
use crate::support::server::{Server, free_port};

/// docker-registry that keeps all in memory (it flushes every file otherwise), or nothing where it is not installed. `auth` is a part
/// of its configuration, which lies in `dir`.
pub fn registry(dir: &Path, auth: &str) -> Option<Server> {
    let peer = peer("docker-registry")?;
    let port = free_port();
    let config = format!(
        "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
         storage: {{inmemory: {{}}, delete: {{enabled: true}}}}\n\
         http: {{addr: \"127.0.0.1:{port}\", secret: of-a-test}}\n{auth}\n"
    );
    let file = dir.join("registry.yml");
    std::fs::write(&file, config).unwrap();
    let mut command = peer.command();
    command.arg("serve").arg(file).stderr(std::process::Stdio::null());
    Some(Server::start(&mut command, port))
}

fn location(server: &Server, repository: &str) -> OciLocation {
    OciLocation { registry: format!("http://127.0.0.1:{}", server.port), repository: repository.to_owned() }
}

fn with_login(user: &str, password: &str) -> StoreOptions {
    let (username, password) = (Some(user.to_owned()), Some(Secret::new(password)));
    let oci = OciOptions { username, password, docker_config: None };
    StoreOptions { oci, retry: RetryPolicy::NEVER, ..StoreOptions::default() }
}

#[track_caller]
fn reason<T: std::fmt::Debug>(result: Result<T, StoreError>, what: &str) -> StoreError {
    let error = result.expect_err("it had to fail");
    assert!(error.to_string().contains(what), "{error}");
    error
}

#[tokio::test]
async fn a_registry_keeps_the_contract() {
    let scratch = Scratch::new();
    let Some(server) = registry(&scratch, "") else { return };
    for (i, layout) in layouts().into_iter().enumerate() {
        let text = format!("oci+http://127.0.0.1:{}/some/store{i}", server.port);
        let location = Location::parse(&text).unwrap();
        let options = StoreOptions { layout: layout.clone(), ..StoreOptions::default() };
        let store = open_writable(&location, &options).unwrap();
        assert_eq!(store.name(), text);
        store_contract(store.as_ref()).await;
        // Another store finds what this one wrote.
        let (id, stored) = chunk(layout.form, b"x");
        assert_eq!(open(&location, &options).unwrap().fetch(id).await, Ok(Some(stored)));
    }
}

#[tokio::test]
async fn what_is_in_a_registry_is_what_desync_puts_there() {
    let scratch = Scratch::new();
    let Some(server) = registry(&scratch, "") else { return };
    let location = location(&server, "store");
    let store = OciStore::new(&location, &StoreOptions::default()).unwrap();
    let (id, stored) = chunk(Form::Compressed, b"x");
    store.put(id, stored.clone()).await.unwrap();
    let client = caifs::store::http::client(&StoreOptions::default(), "test").unwrap();
    let url = format!("{}/v2/store/manifests/{id}.cacnk", location.registry);
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let response = client.get(&url).header("Accept", kind).send().await.unwrap();
    assert_eq!(response.headers()["content-type"], kind);
    let manifest: serde_json::Value = serde_json::from_slice(&response.bytes().await.unwrap()).unwrap();
    let config = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";
    assert_eq!(manifest["schemaVersion"], 2);
    assert_eq!(manifest["artifactType"], "application/vnd.desync.chunk.v1");
    assert_eq!(
        manifest["config"],
        serde_json::json!({"mediaType": "application/vnd.oci.empty.v1+json", "digest": config, "size": 2})
    );
    assert_eq!(manifest["annotations"]["org.opencontainers.image.title"], format!("{id}.cacnk"));
    assert_eq!(manifest["layers"].as_array().unwrap().len(), 1);
    assert_eq!(manifest["layers"][0]["mediaType"], "application/octet-stream");
    assert_eq!(manifest["layers"][0]["size"], stored.bytes.len());

    // An image under a chunk's tag is no chunk.
    let mut image = manifest.clone();
    image["artifactType"] = "application/x".into();
    let (other, _) = chunk(Form::Compressed, b"another");
    let url = format!("{}/v2/store/manifests/{other}.cacnk", location.registry);
    let response = client.put(&url).header("Content-Type", kind).body(image.to_string()).send().await.unwrap();
    assert_eq!(response.status(), 201);
    assert_eq!(store.fetch(other).await, Ok(None));
    assert_eq!(store.has(other).await, Ok(false));
}

#[tokio::test]
async fn a_registry_with_passwords_wants_the_right_one() {
    let scratch = Scratch::new();
    let Some(htpasswd) = peer("htpasswd") else { return };
    let lines = run(htpasswd.command().args(["-Bbn", "user", "pass:word"])).ok().stdout;
    let file = scratch.file("htpasswd", lines);
    let Some(server) = registry(&scratch, &format!("auth: {{htpasswd: {{realm: r, path: {}}}}}", file.display()))
    else {
        return;
    };
    let location = location(&server, "a/b");
    // Two that put the same chunk at once can be in each other's way for a moment.
    let patient = |options| StoreOptions { retry: RetryPolicy::default(), ..options };
    store_contract(&OciStore::new(&location, &patient(with_login("user", "pass:word"))).unwrap()).await;

    let (id, stored) = chunk(Form::Compressed, b"x");
    let fetch = async |options: StoreOptions| OciStore::new(&location, &options).unwrap().fetch(id).await;
    let error = reason(fetch(with_login("user", "hidden")).await, "401 Unauthorized");
    assert!(error.reason.contains("are user name and password right?") && !error.is_transient, "{error}");
    assert!(!error.to_string().contains("hidden"), "{error}");
    reason(fetch(StoreOptions { retry: RetryPolicy::NEVER, ..StoreOptions::default() }).await, "docker login?");

    // As `docker login` leaves it.
    let docker = |name: &str, content: String| {
        let docker_config = Some(scratch.file(name, content));
        let oci = OciOptions { docker_config, ..OciOptions::default() };
        StoreOptions { oci, retry: RetryPolicy::NEVER, ..StoreOptions::default() }
    };
    let auth = BASE64_STANDARD.encode("user:pass:word");
    let content = format!(r#"{{"auths": {{"127.0.0.1:{}": {{"auth": "{auth}"}}}}}}"#, server.port);
    assert_eq!(fetch(docker("config.json", content)).await, Ok(Some(stored.clone())));
    let content = r#"{"credsStore": "no-such-helper"}"#.to_owned();
    reason(fetch(docker("helper.json", content)).await, "docker-credential-no-such-helper: No such file");
    reason(fetch(docker("bad.json", "rubbish".to_owned())).await, "bad.json: not a Docker configuration");

    // A fixed header takes the place of all this.
    let mut fixed = with_login("user", "wrong");
    fixed.http.authorization = Some(Secret::new(format!("Basic {auth}")));
    assert_eq!(fetch(fixed).await, Ok(Some(stored)));
}

#[test]
fn half_a_login_is_refused() {
    let location = OciLocation { registry: "https://h".to_owned(), repository: "r".to_owned() };
    for (username, password, what) in [(Some("u"), None, "needs a password"), (None, Some("p"), "needs a user name")] {
        let (username, password) = (username.map(str::to_owned), password.map(Secret::new));
        let oci = OciOptions { username, password, docker_config: None };
        let error = OciStore::new(&location, &StoreOptions { oci, ..StoreOptions::default() }).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
    }
}

/// A key that signs tokens, and its certificate.
struct Signer {
    openssl: PathBuf,
    key: PathBuf,
    /// PEM.
    certificate: PathBuf,
}

impl Signer {
    fn make(scratch: &Scratch) -> Option<Self> {
        let openssl = peer("openssl")?.path;
        let (key, certificate) = (scratch.join("token.key"), scratch.join("token.pem"));
        let mut command = Command::new(&openssl);
        command.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=tokens", "-keyout"]);
        run(command.arg(&key).arg("-out").arg(&certificate)).ok();
        Some(Self { openssl, key, certificate })
    }

    /// A JSON web token (RFC 7519) by RS256, with the certificate inside (RFC 7515, 4.1.6).
    fn sign(&self, scratch: &Path, claims: &serde_json::Value) -> String {
        let pem = std::fs::read_to_string(&self.certificate).unwrap();
        let der: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
        let header = serde_json::json!({"typ": "JWT", "alg": "RS256", "x5c": [der]});
        let part = |json: &serde_json::Value| BASE64_URL_SAFE_NO_PAD.encode(json.to_string());
        let signed = format!("{}.{}", part(&header), part(claims));
        let input = tempfile::NamedTempFile::new_in(scratch).unwrap();
        std::fs::write(input.path(), &signed).unwrap();
        let mut command = Command::new(&self.openssl);
        let signature = run(command.args(["dgst", "-sha256", "-sign"]).arg(&self.key).arg(input.path())).ok().stdout;
        format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
    }
}

#[tokio::test]
async fn tokens_are_got_where_the_registry_says() {
    let scratch = Scratch::new();
    let Some(signer) = Signer::make(&scratch) else { return };
    let certificate = signer.certificate.clone();
    let dir = scratch.to_owned();
    // Gives everybody who has the password a token for what they ask, and everybody else none.
    let tokens = Scripted::start(move |_, request| {
        let login = format!("Basic {}", BASE64_STANDARD.encode("user:password"));
        if request.header("authorization") != Some(login.as_str()) {
            return answer("401 Unauthorized", "", b"who are you?");
        }
        let url = url::Url::parse(&format!("http://h{}", request.line.trim_start_matches("GET "))).unwrap();
        let query = |key: &str| url.query_pairs().find(|(name, _)| name == key).unwrap().1.into_owned();
        let scope = query("scope");
        let [kind, name, actions] = scope.split(':').collect::<Vec<_>>()[..] else { panic!("{scope}") };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let actions: Vec<&str> = actions.split(',').collect();
        let claims = serde_json::json!({
            "iss": "the test", "sub": "user", "aud": query("service"), "jti": "1",
            "exp": now + 300, "nbf": now - 60, "iat": now,
            "access": [{"type": kind, "name": name, "actions": actions}],
        });
        let body = serde_json::json!({"token": signer.sign(&dir, &claims), "expires_in": 300}).to_string();
        answer("200 OK", "Content-Type: application/json\r\n", body.as_bytes())
    });
    let auth = format!(
        "auth: {{token: {{realm: \"{}token\", service: reg, issuer: the test, rootcertbundle: {}}}}}",
        tokens.url(),
        certificate.display()
    );
    let Some(server) = registry(&scratch, &auth) else { return };
    let location = location(&server, "a/b");
    let patient = StoreOptions { retry: RetryPolicy::default(), ..with_login("user", "password") };
    let store = OciStore::new(&location, &patient).unwrap();
    store_contract(&store).await;
    // One to read, and one to write that is good for both from then on.
    let asked: Vec<_> = tokens.requests().into_iter().map(|request| request.line).collect();
    assert_eq!(asked.len(), 2, "{asked:?}");
    let (reading, writing) = ("scope=repository%3Aa%2Fb%3Apull", "scope=repository%3Aa%2Fb%3Apull%2Cpush");
    assert!(asked[0].ends_with(reading) && asked[0].contains("service=reg"), "{asked:?}");
    assert!(asked[1].ends_with(writing) || asked[1].ends_with("%3Apush%2Cpull"), "{asked:?}");

    let (id, _) = chunk(Form::Compressed, b"x");
    let wrong = OciStore::new(&location, &with_login("user", "hidden")).unwrap();
    let error = reason(wrong.fetch(id).await, "401 Unauthorized: who are you?");
    assert!(!error.is_transient && !error.to_string().contains("hidden"), "{error}");
    assert!(error.object.starts_with(&tokens.url()), "{error}");
}

#[tokio::test]
async fn a_registry_that_is_ill_is_asked_again_and_one_that_lies_is_found_out() {
    let (id, stored) = chunk(Form::Compressed, b"x");
    let content = stored.bytes.clone();
    let hex = "a".repeat(64);
    let manifest = move |digest: &str, size: usize| {
        let kind = "application/vnd.desync.chunk.v1";
        format!(r#"{{"artifactType":"{kind}","layers":[{{"digest":"{digest}","size":{size}}}]}}"#)
    };
    let server = Scripted::start(move |n_before, request| {
        let right = format!("sha256:{hex}");
        let repository = request.line.split('/').nth(2).unwrap();
        if request.line.contains("/blobs/") {
            return match repository {
                "gone" => answer("404 Not Found", "", b""),
                _ => answer("200 OK", "", &content),
            };
        }
        let manifest = match repository {
            "ill" if n_before == 0 => return answer("503 Service Unavailable", "Retry-After: 0\r\n", b""),
            "long" => manifest(&right, 1),
            "short" => manifest(&right, 1000),
            "huge" => manifest(&right, 1 << 40),
            "elsewhere" => manifest("sha256:../../../secrets", 1),
            "downgrade" => {
                let headers = "WWW-Authenticate: Bearer realm=\"ftp://h/token\"\r\n";
                return answer("401 Unauthorized", headers, b"");
            }
            "rubbish" => "rubbish".to_owned(),
            _ => manifest(&right, content.len()),
        };
        answer("200 OK", "", manifest.as_bytes())
    });
    let fetch = async |repository: &str| {
        let registry = server.url().trim_end_matches('/').to_owned();
        let location = OciLocation { registry, repository: repository.to_owned() };
        let retry = RetryPolicy { n_retries: 1, ..RetryPolicy::NEVER };
        OciStore::new(&location, &StoreOptions { retry, ..StoreOptions::default() }).unwrap().fetch(id).await
    };
    assert_eq!(fetch("ill").await, Ok(Some(stored)));
    assert_eq!(fetch("gone").await, Ok(None));
    for (repository, what) in [
        ("long", "more than its manifest says"),
        ("short", "its manifest says 1000"),
        ("huge", "more than any chunk can"),
        ("elsewhere", "by sha256"),
        ("downgrade", "not sent over ftp"),
        ("rubbish", "not a manifest"),
    ] {
        assert!(!reason(fetch(repository).await, what).is_transient);
    }
}
