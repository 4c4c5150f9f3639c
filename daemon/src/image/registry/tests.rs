//! The client against a registry that does what a test tells it, and against Debian's real one.

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};

use futures_util::StreamExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;

const PASSWORD: &str = "hunter2-must-not-show";

/// What arrived at the fake.
#[derive(Debug, Clone)]
struct Asked {
    method: String,
    path: String,
    query: String,
    headers: HashMap<String, String>,
    body: String,
}

impl Asked {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// What the fake answers; `Connection: close` each time.
#[derive(Debug, Clone, Default)]
struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Claimed instead of the body's length; `None` in `Some`: nothing is claimed, the end is the end.
    claims: Option<Option<usize>>,
    /// Send no more than this and wait for ever.
    hangs_after: Option<usize>,
    /// Send one byte at a time, with this pause.
    drips: Option<Duration>,
}

fn reply(status: u16, body: impl Into<Vec<u8>>) -> Reply {
    Reply { status, body: body.into(), ..Reply::default() }
}

impl Reply {
    fn with(mut self, name: &'static str, value: impl Into<String>) -> Reply {
        self.headers.push((name, value.into()));
        self
    }
}

/// A registry on a loopback port, whose answers a function decides.
struct Fake {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Fake {
    /// `answer` gets the request and how many came before it.
    async fn start(answer: impl Fn(&Asked, usize) -> Reply + Send + Sync + 'static) -> Fake {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked: Arc<Mutex<Vec<Asked>>> = Arc::default();
        let (log, answer) = (Arc::clone(&asked), Arc::new(answer));
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (log, answer) = (Arc::clone(&log), Arc::clone(&answer));
                tokio::spawn(async move { serve(stream, &log, &*answer).await });
            }
        });
        Fake { address, asked, task }
    }

    fn host(&self) -> String {
        self.address.to_string()
    }

    fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    fn count(&self, part: &str) -> usize {
        self.asked().iter().filter(|asked| asked.path.contains(part)).count()
    }

    fn reference(&self) -> Reference {
        Reference::parse(&format!("{}/app:v1", self.host())).unwrap()
    }
}

async fn serve(
    mut stream: TcpStream,
    log: &Mutex<Vec<Asked>>,
    answer: &(dyn Fn(&Asked, usize) -> Reply + Send + Sync),
) -> Option<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
        if head == [0x16] {
            return None; // the beginning of TLS, which nobody speaks here
        }
    }
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.lines();
    let mut first = lines.next()?.split(' ');
    let (method, target) = (first.next()?.to_owned(), first.next()?);
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let headers: HashMap<String, String> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let length = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    let (path, query, body) = (path.to_owned(), query.to_owned(), String::from_utf8(body).unwrap());
    let asked = Asked { method, path, query, headers, body };
    let reply = {
        let mut log = log.lock().unwrap();
        let before = log.len();
        log.push(asked.clone());
        answer(&asked, before)
    };
    let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", reply.status);
    if let Some(length) = reply.claims.unwrap_or(Some(reply.body.len())) {
        head.push_str(&format!("Content-Length: {length}\r\n"));
    }
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    stream.write_all(format!("{head}\r\n").as_bytes()).await.ok()?;
    if let Some(pause) = reply.drips {
        for byte in reply.body {
            stream.write_all(&[byte]).await.ok()?;
            tokio::time::sleep(pause).await;
        }
        return Some(());
    }
    let end = reply.hangs_after.unwrap_or(reply.body.len());
    stream.write_all(&reply.body[..end]).await.ok()?;
    if reply.hangs_after.is_some() {
        std::future::pending::<()>().await;
    }
    stream.shutdown().await.ok()
}

/// A client with short pauses and no configured hosts.
fn client() -> Client {
    client_with("/nonexistent".into())
}

fn client_with(certs_dir: PathBuf) -> Client {
    Client::new(Config { certs_dir, backoff: Duration::from_millis(5), ..Config::default() })
}

/// A client that does not wait long for silence.
fn impatient() -> Client {
    Client::new(Config {
        certs_dir: "/nonexistent".into(),
        stall_timeout: Duration::from_secs(1),
        backoff: Duration::from_millis(5),
        ..Config::default()
    })
}

fn write_hosts(dir: &tempfile::TempDir, reference: &Reference, text: &str) {
    let folder = dir.path().join(reference.host());
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("hosts.toml"), text).unwrap();
}

fn manifest_bytes() -> Vec<u8> {
    let digest = Digest::sha256(b"{}");
    format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",
        "config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{digest}","size":2}},"layers":[]}}"#
    )
    .into_bytes()
}

fn a_manifest() -> Reply {
    reply(200, manifest_bytes()).with("Content-Type", "application/vnd.oci.image.manifest.v1+json")
}

fn credentials() -> Credentials {
    Credentials::password("user", PASSWORD)
}

async fn drain(mut blob: Blob) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    while let Some(chunk) = blob.chunk().await? {
        all.extend_from_slice(&chunk);
    }
    Ok(all)
}

#[tokio::test]
async fn a_tag_resolves_to_verified_bytes() {
    let fake = Fake::start(|_, _| a_manifest()).await;
    let resolved = client().resolve(&fake.reference(), None).await.unwrap();
    assert_eq!(resolved.bytes, manifest_bytes());
    assert_eq!(resolved.digest, Digest::sha256(&manifest_bytes()));
    assert_eq!(resolved.media_type, "application/vnd.oci.image.manifest.v1+json");
    assert_eq!(resolved.host, format!("http://{}", fake.host()));
    let asked = &fake.asked()[0];
    assert_eq!((asked.method.as_str(), asked.path.as_str()), ("GET", "/v2/app/manifests/v1"));
    assert_eq!((asked.query.as_str(), asked.header("authorization")), ("", ""));
    assert!(asked.header("accept").contains("manifest.list.v2"));
}

#[tokio::test]
async fn bearer_tokens_are_fetched_once_and_kept_apart_by_credential() {
    let realm = Fake::start(|asked, _| {
        let who = if asked.header("authorization").is_empty() { "anonymous" } else { "known" };
        reply(200, format!(r#"{{"token":"{who}-token","expires_in":300}}"#))
    })
    .await;
    let url = format!("http://{}/token", realm.host());
    let fake = Fake::start(move |asked, _| match asked.header("authorization") {
        "Bearer known-token" => a_manifest(),
        "Bearer anonymous-token" => reply(403, r#"{"errors":[{"code":"DENIED","message":"private"}]}"#),
        _ => reply(401, "").with(
            "WWW-Authenticate",
            format!(r#"Bearer realm="{url}",service="reg, istry",scope="repository:app:pull""#),
        ),
    })
    .await;
    let client = client();
    for _ in 0..3 {
        client.resolve(&fake.reference(), Some(&credentials())).await.unwrap();
    }
    let asked = realm.asked();
    assert_eq!(asked.len(), 1, "one token serves all");
    assert_eq!(asked[0].query, "service=reg%2C+istry&scope=repository%3Aapp%3Apull");
    assert!(asked[0].header("authorization").starts_with("Basic "));
    assert_eq!(fake.asked().len(), 4, "only the first request was refused");
    assert!(fake.asked().iter().all(|asked| !asked.header("authorization").starts_with("Basic")));

    let error = client.resolve(&fake.reference(), None).await.unwrap_err();
    assert_eq!(error.kind(), Kind::PermissionDenied, "{error}");
    assert!(error.to_string().contains("DENIED: private"), "{error}");
    assert_eq!(realm.asked().len(), 2, "another caller does not get the first one's token");
}

#[tokio::test]
async fn identity_tokens_are_posted_and_never_in_a_url() {
    let realm = Fake::start(|_, _| reply(200, r#"{"access_token":"t"}"#)).await;
    let url = format!("http://{}/token", realm.host());
    let fake = Fake::start(move |asked, _| match asked.header("authorization") {
        "Bearer t" => a_manifest(),
        _ => reply(401, "").with("WWW-Authenticate", format!("Bearer realm=\"{url}\",service=s")),
    })
    .await;
    let identity = Credentials::from_cri("", "", "", "", PASSWORD, "").unwrap();
    client().resolve(&fake.reference(), identity.as_ref()).await.unwrap();
    let asked = &realm.asked()[0];
    assert_eq!((asked.method.as_str(), asked.query.as_str()), ("POST", ""));
    assert!(asked.body.contains("grant_type=refresh_token"), "{}", asked.body);
    assert!(asked.body.contains(&format!("refresh_token={PASSWORD}")));
    assert!(asked.body.contains("scope=repository%3Aapp%3Apull"));
}

#[tokio::test]
async fn basic_is_sent_when_asked_for_and_remembered() {
    let fake = Fake::start(|asked, _| match asked.header("authorization") {
        "" => reply(401, "").with("WWW-Authenticate", "Basic realm=\"r\""),
        _ => a_manifest(),
    })
    .await;
    let client = client();
    client.resolve(&fake.reference(), Some(&credentials())).await.unwrap();
    client.resolve(&fake.reference(), Some(&credentials())).await.unwrap();
    assert_eq!(fake.asked().len(), 3);
    let error = client.resolve(&fake.reference(), None).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unauthenticated);
}

#[tokio::test]
async fn credentials_for_another_server_are_not_sent() {
    let fake = Fake::start(|_, _| reply(401, "").with("WWW-Authenticate", "Basic realm=\"r\"")).await;
    let other = Credentials::from_cri("user", PASSWORD, "", "https://elsewhere.io/v1/", "", "").unwrap();
    let error = client().resolve(&fake.reference(), other.as_ref()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unauthenticated);
    assert!(fake.asked().iter().all(|asked| asked.header("authorization").is_empty()));
}

#[tokio::test]
async fn a_registry_that_is_never_satisfied_gets_two_token_requests() {
    let realm = Fake::start(|_, n| reply(200, format!(r#"{{"token":"t{n}","expires_in":300}}"#))).await;
    let url = format!("http://{}/token", realm.host());
    let fake = Fake::start(move |_, _| {
        reply(401, r#"{"errors":[{"code":"UNAUTHORIZED"}]}"#)
            .with("WWW-Authenticate", format!("Bearer realm=\"{url}\""))
    })
    .await;
    let error = client().resolve(&fake.reference(), Some(&credentials())).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unauthenticated, "{error}");
    assert_eq!((realm.asked().len(), fake.asked().len()), (2, 3));

    let basic = Fake::start(|_, _| reply(401, "").with("WWW-Authenticate", "Basic realm=\"r\"")).await;
    let error = client().resolve(&basic.reference(), Some(&credentials())).await.unwrap_err();
    assert_eq!((error.kind(), basic.asked().len()), (Kind::Unauthenticated, 2));
}

#[tokio::test]
async fn a_token_server_that_does_not_work_is_tried_again_and_named() {
    let refused = |url: String| {
        move |asked: &Asked, _| match asked.header("authorization") {
            "" => reply(401, "").with("WWW-Authenticate", format!("Bearer realm=\"{url}\"")),
            _ => a_manifest(),
        }
    };
    let realm =
        Fake::start(|_, n| if n == 0 { reply(503, "") } else { reply(200, r#"{"token":"t"}"#) }).await;
    let fake = Fake::start(refused(format!("http://{}/t", realm.host()))).await;
    client().resolve(&fake.reference(), Some(&credentials())).await.unwrap();
    let realm = Fake::start(|_, _| reply(503, "")).await;
    let fake = Fake::start(refused(format!("http://{}/t", realm.host()))).await;
    let error = client().resolve(&fake.reference(), Some(&credentials())).await.unwrap_err();
    assert_eq!((error.kind(), realm.asked().len()), (Kind::RegistryUnavailable, 2), "{error}");
    assert!(error.to_string().contains(&realm.host()), "{error}");
}

#[tokio::test]
async fn wrong_credentials_are_told_from_a_registry_that_does_not_work() {
    let realm = Fake::start(|_, _| reply(401, "")).await;
    let url = format!("http://{}/t", realm.host());
    let fake =
        Fake::start(move |_, _| reply(401, "").with("WWW-Authenticate", format!("Bearer realm=\"{url}\"")))
            .await;
    let error = client().resolve(&fake.reference(), Some(&credentials())).await.unwrap_err();
    assert_eq!((error.kind(), realm.asked().len()), (Kind::Unauthenticated, 1), "{error}");
}

#[tokio::test]
async fn no_error_shows_a_secret() {
    let realm =
        Fake::start(|asked, _| reply(400, format!("{} {}", asked.header("authorization"), asked.body))).await;
    let url = format!("http://{}/token?account=signed-query", realm.host());
    let fake = Fake::start(move |asked, _| match asked.path.contains("blobs") {
        true => reply(307, "").with("Location", "http://127.0.0.1:1/x?signed-query"),
        false => reply(401, "").with("WWW-Authenticate", format!("Bearer realm=\"{url}\"")),
    })
    .await;
    let identity = Credentials::from_cri("", "", "", "", PASSWORD, "").unwrap();
    let client = client();
    let mut errors = Vec::new();
    for credentials in [Some(&credentials()), identity.as_ref()] {
        errors.push(client.resolve(&fake.reference(), credentials).await.unwrap_err());
        let digest = Digest::sha256(b"x");
        errors.push(client.blob(&fake.reference(), &digest, 1, 0, credentials).await.unwrap_err());
    }
    for error in errors {
        let text = format!("{error} {error:?}");
        assert!(!text.contains("hunter2") && !text.contains("signed-query"), "{text}");
        assert!(!text.contains("dXNlcjpodW50"), "base64: {text}");
    }
}

#[tokio::test]
async fn absent_images_are_not_found_at_once() {
    let body = r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest\nunknown"}]}"#;
    for status in [404, 400] {
        let fake = Fake::start(move |_, _| reply(status, body)).await;
        let error = client().resolve(&fake.reference(), None).await.unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        assert!(error.to_string().contains("MANIFEST_UNKNOWN: manifest unknown"), "{error}");
        assert_eq!(fake.asked().len(), 1);
    }
}

#[tokio::test]
async fn server_errors_are_tried_again_four_times_and_no_more() {
    let fake = Fake::start(|_, n| if n < 3 { reply(500, "") } else { a_manifest() }).await;
    client().resolve(&fake.reference(), None).await.unwrap();
    assert_eq!(fake.asked().len(), 4);
    let fake = Fake::start(|_, _| reply(503, "<html>")).await;
    let error = client().resolve(&fake.reference(), None).await.unwrap_err();
    assert_eq!((error.kind(), fake.asked().len()), (Kind::RegistryUnavailable, 4));
    assert!(error.to_string().contains("503"), "{error}");
}

#[tokio::test]
async fn retry_after_is_kept_to_if_it_is_short() {
    let fake =
        Fake::start(|_, n| if n == 0 { reply(429, "").with("Retry-After", "1") } else { a_manifest() }).await;
    let begun = Instant::now();
    client().resolve(&fake.reference(), None).await.unwrap();
    assert!(begun.elapsed() >= Duration::from_secs(1));
    let fake = Fake::start(|_, _| reply(429, "").with("Retry-After", "61")).await;
    let error = client().resolve(&fake.reference(), None).await.unwrap_err();
    assert_eq!((error.kind(), fake.asked().len()), (Kind::RegistryUnavailable, 1));
    assert!(error.to_string().contains("61 s"), "{error}");
}

#[tokio::test]
async fn a_redirect_leaves_credentials_and_headers_behind() {
    let storage = Fake::start(|_, _| reply(200, "layer")).await;
    let to = format!("http://{}/data?signature=1", storage.host());
    let fake = Fake::start(move |asked, _| match asked.header("authorization") {
        "" => reply(401, "").with("WWW-Authenticate", "Basic realm=\"r\""),
        _ => reply(307, "").with("Location", to.clone()),
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    write_hosts(&dir, &fake.reference(), "header = { x-key = \"secret\" }");
    let client = client_with(dir.path().into());
    let blob =
        client.blob(&fake.reference(), &Digest::sha256(b"layer"), 5, 0, Some(&credentials())).await.unwrap();
    assert_eq!(drain(blob).await.unwrap(), b"layer");
    let asked = &storage.asked()[0];
    assert_eq!(
        (asked.header("authorization"), asked.header("x-key"), asked.query.as_str()),
        ("", "", "signature=1")
    );
    assert!(fake.asked().iter().all(|asked| asked.header("x-key") == "secret"));
}

#[tokio::test]
async fn redirects_end() {
    let fake = Fake::start(|_, _| reply(302, "").with("Location", "/v2/again")).await;
    let error = client().resolve(&fake.reference(), None).await.unwrap_err();
    assert_eq!((error.kind(), fake.asked().len()), (Kind::RegistryUnavailable, 6), "{error}");
    let fake = Fake::start(|_, _| reply(302, "").with("Location", "file:///etc/shadow")).await;
    assert!(client().resolve(&fake.reference(), None).await.is_err());
}

#[tokio::test]
async fn a_truncated_blob_is_resumed_where_it_broke_off() {
    let fake = Fake::start(|asked, _| match asked.header("range") {
        "" => Reply { claims: Some(Some(10)), ..reply(200, "01234") },
        "bytes=5-" => reply(206, "56789").with("Content-Range", "bytes 5-9/10"),
        other => panic!("range {other}"),
    })
    .await;
    let (client, digest) = (client(), Digest::sha256(b"0123456789"));
    let mut blob = client.blob(&fake.reference(), &digest, 10, 0, None).await.unwrap();
    assert_eq!((blob.offset, blob.length), (0, 10));
    let mut got = Vec::new();
    let error = loop {
        match blob.chunk().await {
            Ok(Some(chunk)) => got.extend_from_slice(&chunk),
            Ok(None) => panic!("not all has come"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), Kind::RegistryUnavailable);
    let blob = client.blob(&fake.reference(), &digest, 10, got.len() as u64, None).await.unwrap();
    assert_eq!((blob.offset, blob.length), (5, 5));
    got.extend(drain(blob).await.unwrap());
    assert!(digest.matches(&got));
}

#[tokio::test]
async fn a_body_without_length_that_ends_early_is_truncated() {
    let fake = Fake::start(|_, _| Reply { claims: Some(None), ..reply(200, "01234") }).await;
    let blob = client().blob(&fake.reference(), &Digest::sha256(b""), 10, 0, None).await.unwrap();
    let error = drain(blob).await.unwrap_err();
    assert!(error.to_string().contains("truncated after 5 of 10"), "{error}");
}

#[tokio::test]
async fn a_host_that_cannot_resume_begins_again_and_says_so() {
    let digest = Digest::sha256(b"0123456789");
    let plain = Fake::start(|_, _| reply(200, "0123456789")).await;
    let refuses = Fake::start(|asked, _| match asked.header("range") {
        "" => reply(200, "0123456789"),
        _ => reply(416, ""),
    })
    .await;
    let wrong = Fake::start(|asked, _| match asked.header("range") {
        "" => reply(200, "0123456789"),
        _ => reply(206, "3456789").with("Content-Range", "bytes 3-9/10"),
    })
    .await;
    for fake in [plain, refuses, wrong] {
        let blob = client().blob(&fake.reference(), &digest, 10, 5, None).await.unwrap();
        assert_eq!((blob.offset, blob.length), (0, 10));
        assert!(digest.matches(&drain(blob).await.unwrap()));
    }
}

#[tokio::test]
async fn wrong_bytes_are_refused() {
    let fake = Fake::start(|_, _| a_manifest()).await;
    let pinned = fake.reference().with_digest(Digest::sha256(b"something else"));
    let error = client().resolve(&pinned, None).await.unwrap_err();
    assert_eq!(error.kind(), Kind::RegistryUnavailable);
    assert!(error.to_string().contains("digest mismatch"), "{error}");

    let announced = Digest::sha256(b"something else").to_string();
    let fake = Fake::start(move |_, n| match n {
        0 => a_manifest().with("Docker-Content-Digest", announced.clone()),
        _ => a_manifest(),
    })
    .await;
    client().resolve(&fake.reference(), None).await.unwrap();
    assert_eq!(fake.asked().len(), 2, "damaged on the way: once more");
}

#[tokio::test]
async fn nothing_is_longer_than_it_may_be() {
    let digest = Digest::sha256(b"0123");
    for claims in [None, Some(None)] {
        let fake = Fake::start(move |_, _| Reply { claims, ..reply(200, "01234567") }).await;
        let error = match client().blob(&fake.reference(), &digest, 4, 0, None).await {
            Ok(blob) => drain(blob).await.unwrap_err(),
            Err(error) => error,
        };
        assert_eq!(error.kind(), Kind::RegistryUnavailable);
        assert!(error.to_string().contains("size mismatch"), "{error}");
    }
    for claims in [None, Some(None)] {
        let fake =
            Fake::start(move |_, _| Reply { claims, ..reply(200, vec![b' '; DOCUMENT_BYTES_MAX + 1]) }).await;
        let error = client().resolve(&fake.reference(), None).await.unwrap_err();
        assert_eq!(error.kind(), Kind::ResourceExhausted, "{error}");
    }
}

#[tokio::test]
async fn silence_ends_in_an_error() {
    let fake = Fake::start(|_, _| Reply { hangs_after: Some(5), ..reply(200, "0123456789") }).await;
    let blob = impatient().blob(&fake.reference(), &Digest::sha256(b""), 10, 0, None).await.unwrap();
    let begun = Instant::now();
    let error = drain(blob).await.unwrap_err();
    assert!(error.to_string().contains("stalled"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(20));

    let mute = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let reference = Reference::parse(&format!("{}/app", mute.local_addr().unwrap())).unwrap();
    let error = impatient().resolve(&reference, None).await.unwrap_err();
    assert_eq!(error.kind(), Kind::RegistryUnavailable);
    assert!(error.to_string().contains("no answer within"), "{error}");
}

#[tokio::test]
async fn a_trickle_ends_in_an_error() {
    let fake =
        Fake::start(|_, _| Reply { drips: Some(Duration::from_millis(20)), ..reply(200, vec![0; 10_000]) })
            .await;
    let client = Client::new(Config {
        rate_window: Duration::from_millis(300),
        bytes_per_second_min: 10_000,
        certs_dir: "/nonexistent".into(),
        ..Config::default()
    });
    let blob = client.blob(&fake.reference(), &Digest::sha256(b""), 10_000, 0, None).await.unwrap();
    let error = drain(blob).await.unwrap_err();
    assert!(error.to_string().contains("too slow"), "{error}");
}

#[test]
fn the_rate_counts_waiting_only() {
    let config =
        Config { bytes_per_second_min: 100, rate_window: Duration::from_secs(10), ..Config::default() };
    let second = Duration::from_secs(1);
    let mut pace = Pace::new(&config);
    assert!((0..9).all(|_| pace.keeps_up(second, 0)), "not judged before the window is over");
    assert!(pace.keeps_up(second, 1000), "just enough");
    assert!((0..9).all(|_| pace.keeps_up(second, 100)));
    assert!(!pace.keeps_up(second, 99), "one byte too few");
    assert!((0..1000).all(|_| pace.keeps_up(Duration::ZERO, 1)));
}

#[tokio::test]
async fn mirrors_are_asked_in_order_without_credentials_and_told_whom_they_stand_for() {
    let origin = Fake::start(|asked, _| match asked.header("authorization") {
        "" => reply(401, "").with("WWW-Authenticate", "Basic realm=\"r\""),
        _ => a_manifest(),
    })
    .await;
    let without = Fake::start(|_, _| reply(404, "")).await;
    let asks = Fake::start(|_, _| reply(401, "").with("WWW-Authenticate", "Basic realm=\"r\"")).await;
    let reference = origin.reference();
    let dir = tempfile::tempdir().unwrap();
    write_hosts(
        &dir,
        &reference,
        &format!(
            "server = \"http://{}\"\n[host.\"http://127.0.0.1:1\"]\n[host.\"http://{}/proxy\"]\nheader = {{ x-key = \"k\" }}\n\
             [host.\"http://{}\"]\noverride_path = true\n",
            origin.host(),
            without.host(),
            asks.host(),
        ),
    );
    let client = client_with(dir.path().into());
    let resolved = client.resolve(&reference, Some(&credentials())).await.unwrap();
    assert_eq!(resolved.host, format!("http://{}", origin.host()));
    let asked = &without.asked()[0];
    assert_eq!(asked.path, "/proxy/v2/app/manifests/v1");
    assert_eq!(asked.query, format!("ns={}", origin.host().replace(':', "%3A")));
    assert_eq!((asked.header("x-key"), asked.header("authorization")), ("k", ""));
    assert_eq!(asks.asked()[0].path, "/app/manifests/v1");
    assert!(asks.asked().iter().all(|asked| asked.header("authorization").is_empty()));
    assert!(origin.asked().iter().all(|asked| asked.query.is_empty() && asked.header("x-key").is_empty()));
}

#[tokio::test]
async fn the_registry_decides_the_kind_and_every_host_is_quoted() {
    let origin = Fake::start(|_, _| reply(500, "")).await;
    let mirror = Fake::start(|_, _| reply(404, "")).await;
    let reference = origin.reference();
    let dir = tempfile::tempdir().unwrap();
    write_hosts(&dir, &reference, &format!("[host.\"http://{}\"]", mirror.host()));
    let error = client_with(dir.path().into()).resolve(&reference, None).await.unwrap_err();
    assert_eq!(
        error.kind(),
        Kind::RegistryUnavailable,
        "a mirror without the image does not make it unknown"
    );
    let text = error.to_string();
    assert!(text.contains(&mirror.host()) && text.contains("404") && text.contains("500"), "{text}");
    assert_eq!((mirror.asked().len(), origin.asked().len()), (1, 4));
}

#[tokio::test]
async fn a_mirror_without_resolve_is_only_asked_for_digests() {
    let origin = Fake::start(|_, _| a_manifest()).await;
    let mirror = Fake::start(|_, _| a_manifest()).await;
    let reference = origin.reference();
    let dir = tempfile::tempdir().unwrap();
    write_hosts(&dir, &reference, &format!("[host.\"http://{}\"]\ncapabilities = [\"pull\"]", mirror.host()));
    let client = client_with(dir.path().into());
    let resolved = client.resolve(&reference, None).await.unwrap();
    assert_eq!((mirror.asked().len(), origin.asked().len()), (0, 1));
    client.resolve(&reference.with_digest(resolved.digest), None).await.unwrap();
    assert_eq!((mirror.asked().len(), origin.asked().len()), (1, 1));
}

#[tokio::test]
async fn a_mirror_that_broke_off_is_asked_last_for_a_while() {
    let origin = Fake::start(|_, _| reply(200, "layer")).await;
    let mirror = Fake::start(|_, _| Reply { claims: Some(Some(5)), ..reply(200, "la") }).await;
    let reference = origin.reference();
    let dir = tempfile::tempdir().unwrap();
    write_hosts(&dir, &reference, &format!("[host.\"http://{}\"]", mirror.host()));
    let (client, digest) = (client_with(dir.path().into()), Digest::sha256(b"layer"));
    let blob = client.blob(&reference, &digest, 5, 0, None).await.unwrap();
    assert!(drain(blob).await.is_err());
    let blob = client.blob(&reference, &digest, 5, 0, None).await.unwrap();
    let chunks: Vec<_> = blob.into_stream().collect().await;
    assert!(chunks.into_iter().all(|chunk| chunk.is_ok()));
    assert_eq!((mirror.count("blobs"), origin.count("blobs")), (1, 1));
}

#[tokio::test]
async fn a_host_that_does_not_speak_tls_is_unavailable() {
    let fake = Fake::start(|_, _| a_manifest()).await;
    let dir = tempfile::tempdir().unwrap();
    write_hosts(
        &dir,
        &fake.reference(),
        &format!("server = \"https://{}\"\nskip_verify = true", fake.host()),
    );
    let error = client_with(dir.path().into()).resolve(&fake.reference(), None).await.unwrap_err();
    assert_eq!(error.kind(), Kind::RegistryUnavailable, "{error}");
}

#[tokio::test]
async fn the_image_for_a_platform_is_found_through_nested_indexes() {
    let manifest = manifest_bytes();
    let entry = |kind: &str, bytes: &[u8]| {
        format!(
            r#"{{"mediaType":"application/vnd.oci.image.{kind}.v1+json","digest":"{}","size":{},"platform":{{"os":"linux","architecture":"amd64"}}}}"#,
            Digest::sha256(bytes),
            bytes.len()
        )
    };
    let index = |entry: String| format!(r#"{{"schemaVersion":2,"manifests":[{entry}]}}"#).into_bytes();
    let mut all = vec![manifest.clone(), index(entry("manifest", &manifest))];
    for _ in 0..5 {
        let below = all[all.len() - 1].clone();
        all.push(index(entry("index", &below)));
    }
    let served = all.clone();
    let fake = Fake::start(move |asked, _| {
        let bytes = served.iter().find(|bytes| asked.path.ends_with(Digest::sha256(bytes).as_str()));
        bytes.map_or(reply(404, ""), |bytes| {
            reply(200, bytes.clone()).with("Content-Type", "application/json")
        })
    })
    .await;
    let (client, amd64) = (client(), Platform::new("linux", "amd64", ""));
    let image = |at: usize| fake.reference().with_digest(Digest::sha256(&all[at]));
    let found = client.image(&image(INDEX_DEPTH_MAX), &amd64, None).await.unwrap();
    assert_eq!(found.documents.len(), INDEX_DEPTH_MAX + 1);
    assert_eq!(found.documents.last().unwrap().bytes, manifest);
    let error = client.image(&image(INDEX_DEPTH_MAX + 1), &amd64, None).await.unwrap_err();
    assert_eq!(error.kind(), Kind::FailedPrecondition, "{error}");
    let error = client.image(&image(1), &Platform::new("linux", "s390x", ""), None).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.to_string().contains("there is linux/amd64"), "{error}");
}

#[test]
fn operations_can_run_in_a_task_of_their_own() {
    fn is_send<T: Send>(_: T) {}
    let (client, reference) = (client(), Reference::parse("a").unwrap());
    is_send(client.image(&reference, &Platform::host(), None));
    is_send(client.blob(&reference, &Digest::sha256(b""), 0, 0, None));
    is_send::<Option<Blob>>(None);
}

/// Runs a program and says whether it did what it should.
fn run(dir: &std::path::Path, program: &str, arguments: &str) -> bool {
    let status =
        Command::new(program).args(arguments.split(' ')).current_dir(dir).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

#[tokio::test]
async fn tls_trusts_the_configured_authority_and_shows_our_certificate() {
    let (dir, port) = (tempfile::tempdir().unwrap(), free_port());
    let at = dir.path();
    let made = run(at, "openssl", "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -subj /CN=ca -days 2")
        && ["server", "client"].iter().all(|name| {
            let request = format!("req -newkey rsa:2048 -nodes -keyout {name}.key -out {name}.csr -subj /CN={name}");
            std::fs::write(at.join("san"), "subjectAltName=IP:127.0.0.1").unwrap();
            let sign = format!(
                "x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out {name}.crt -days 2 -extfile san"
            );
            run(at, "openssl", &request) && run(at, "openssl", &sign)
        });
    if !made {
        eprintln!("skipped: openssl is not installed");
        return;
    }
    let manifest = manifest_bytes();
    let served = at.join("v2/app/manifests");
    std::fs::create_dir_all(&served).unwrap();
    let mut answer =
        format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", manifest.len());
    answer.push_str(std::str::from_utf8(&manifest).unwrap());
    std::fs::write(served.join("v1"), answer).unwrap();
    let serve = format!(
        "s_server -HTTP -accept 127.0.0.1:{port} -cert server.crt -key server.key -CAfile ca.crt -Verify 1 -verify_return_error"
    );
    let mut server = Command::new("openssl");
    server
        .args(serve.split(' '))
        .current_dir(at)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let _server = Running(server.spawn().unwrap());
    wait_for(port).await;

    let reference = Reference::parse(&format!("127.0.0.1:{port}/app:v1")).unwrap();
    let client = client_with(at.into());
    let file = |name: &str| at.join(name).display().to_string();
    let identity = format!("client = [[\"{}\", \"{}\"]]", file("client.crt"), file("client.key"));
    let cases = [
        (format!("ca = \"{}\"\n{identity}", file("ca.crt")), true),
        (format!("skip_verify = true\n{identity}"), true),
        (format!("ca = \"{}\"", file("ca.crt")), false),
        (identity.clone(), false),
    ];
    for (keys, works) in cases {
        write_hosts(&dir, &reference, &format!("server = \"https://{}\"\n{keys}", reference.host()));
        match client.resolve(&reference, None).await {
            Ok(resolved) => assert!(works && resolved.bytes == manifest, "{keys}"),
            Err(error) => assert!(!works && error.kind() == Kind::RegistryUnavailable, "{keys}: {error}"),
        }
    }
}

/// Ends a child process with its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

async fn wait_for(port: u16) {
    for _ in 0..300 {
        if TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("nothing listens on {port}");
}

#[tokio::test]
async fn a_real_registry_serves_what_was_pushed() {
    const REGISTRY: &str = "/usr/bin/docker-registry";
    if !std::path::Path::new(REGISTRY).exists() {
        eprintln!("skipped: {REGISTRY} is not installed");
        return;
    }
    let (dir, port) = (tempfile::tempdir().unwrap(), free_port());
    let root = dir.path().join("data");
    let config = dir.path().join("config.yml");
    let text = format!(
        "version: 0.1\nlog: {{ level: error }}\nstorage: {{ filesystem: {{ rootdirectory: {} }} }}\n\
         http: {{ addr: '127.0.0.1:{port}' }}\n",
        root.display()
    );
    std::fs::write(&config, text).unwrap();
    let _registry = Running(
        Command::new(REGISTRY)
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    wait_for(port).await;

    let base = format!("http://127.0.0.1:{port}/v2/test/app");
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let layer: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    let diff_id = Digest::sha256(&layer);
    let config = format!(
        r#"{{"os":"linux","architecture":"amd64","config":{{"Cmd":["/x"]}},"rootfs":{{"type":"layers","diff_ids":["{diff_id}"]}}}}"#
    );
    for blob in [layer.as_slice(), config.as_bytes()] {
        let begun = http.post(format!("{base}/blobs/uploads/")).send().await.unwrap();
        let mut at = Url::parse(begun.headers()["location"].to_str().unwrap()).unwrap();
        at.query_pairs_mut().append_pair("digest", Digest::sha256(blob).as_str());
        let done = http.put(at).body(blob.to_vec()).send().await.unwrap();
        assert_eq!(done.status(), StatusCode::CREATED);
    }
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{kind}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{}","size":{}}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{diff_id}","size":{}}}]}}"#,
        Digest::sha256(config.as_bytes()),
        config.len(),
        layer.len()
    );
    let pushed = http.put(format!("{base}/manifests/v1")).header("Content-Type", kind).body(manifest.clone());
    assert_eq!(pushed.send().await.unwrap().status(), StatusCode::CREATED);

    let client = client();
    let reference = Reference::parse(&format!("127.0.0.1:{port}/test/app:v1")).unwrap();
    let image = client.image(&reference, &Platform::new("linux", "amd64", ""), None).await.unwrap();
    assert_eq!(image.documents[0].bytes, manifest);
    let parsed = client.config(&reference, &image.manifest.config, None).await.unwrap();
    let parsed = manifest::ImageConfig::parse(&parsed).unwrap();
    parsed.check_layers(&image.manifest).unwrap();
    assert_eq!(parsed.cmd, ["/x"]);
    let layer_of = &image.manifest.layers[0].descriptor;
    for offset in [0, 1, layer.len() / 2, layer.len() - 1] {
        let blob =
            client.blob(&reference, &layer_of.digest, layer_of.size, offset as u64, None).await.unwrap();
        assert_eq!(blob.offset, offset as u64, "Debian's registry can resume");
        assert!(drain(blob).await.unwrap() == layer[offset..]);
    }
    let absent = Reference::parse(&format!("127.0.0.1:{port}/test/app:v2")).unwrap();
    let error = client.resolve(&absent, None).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound, "{error}");
    let absent = Digest::sha256(b"absent");
    let error = client.blob(&reference, &absent, 6, 0, None).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound, "{error}");
}
