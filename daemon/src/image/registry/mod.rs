//! A client of OCI registries: from a reference to verified documents, and from a digest to a stream of bytes.
//!
//! An operation asks the hosts that [`super::hosts`] lists, in order, until one gives what is wanted; whatever goes
//! wrong with one, the next is tried, and the message of a failure tells what each said. Within a host, lost
//! connections, 408, 429 and 5xx are tried again a few times, with pauses that grow and vary. A host that could not be
//! reached or that broke off is asked last for a minute, so that a dead mirror does not slow every layer.
//!
//! | what the deciding host did | kind |
//! |---|---|
//! | 404, or an error code that says unknown | `NotFound` |
//! | 401 in spite of all we have; wants credentials we have not | `Unauthenticated` |
//! | 403 | `PermissionDenied` |
//! | unreachable, TLS failure, 408, 429, 5xx, redirects without end, stalled or too slow | `RegistryUnavailable` |
//! | wrong digest or size, truncated (the bytes are not what was named, so that host does not work) | `RegistryUnavailable` |
//! | a document we do not take | see [`super::manifest`] |
//!
//! The deciding host is the last in the configured order, normally the registry itself: a mirror without the image
//! does not make it unknown.
//!
//! Documents are verified here. A blob is a stream, and whoever stores it must verify it; what is enforced here is that
//! it is never longer than its descriptor says and never waits for ever.
//!
//! Credentials go to the registry that the reference names and to the token server it names; never to a mirror, and
//! never where a redirect leads. Addresses in errors are cut to scheme, host and port, for signed URLs are secrets.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher, Hasher as _, RandomState};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, Stream};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use reqwest::{Response, Url};
use serde::Deserialize;
use tokio::time::timeout;

use super::auth::{self, Credentials};
use super::hosts::{self, Host, Tls};
use super::manifest::{self, DOCUMENT_BYTES_MAX, Descriptor, Document, INDEX_DEPTH_MAX, Manifest, Platform};
use super::reference::{Digest, Reference};
use crate::error::{Error, Kind, Result};

/// Tries of one operation at one host. If another host can be asked instead, it is asked sooner.
const ATTEMPTS_MAX: u32 = 4;
const ATTEMPTS_BEFORE_NEXT_HOST: u32 = 2;
/// The longest pause between two tries of our own choosing, and the longest that a registry may ask for.
const BACKOFF_MAX: Duration = Duration::from_secs(10);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);
/// Token requests in one operation at one host.
const TOKEN_REQUESTS_MAX: u32 = 2;
const REDIRECTS_MAX: u32 = 5;
const TOKEN_BYTES_MAX: usize = 1 << 20;
const ERROR_BODY_BYTES_MAX: usize = 64 << 10;
const HEADER_BYTES_MAX: u32 = 64 << 10;
/// How much of a registry's own words goes into an error.
const ERROR_TEXT_MAX: usize = 300;
/// HTTP clients kept, one for each way to trust.
const CLIENTS_MAX: usize = 32;
/// How long a host that did not work is asked last.
const AVOIDED_FOR: Duration = Duration::from_secs(60);
/// How long user and password are sent without being asked for again.
const BASIC_LIFE: Duration = Duration::from_secs(300);

/// How to reach registries.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the directories with `hosts.toml` are. Default: `/etc/ocid/certs.d`.
    pub certs_dir: PathBuf,
    /// How long a connection may take, with name lookup and TLS. Default: 10 s.
    pub connect_timeout: Duration,
    /// How long nothing may arrive: of an answer, or of a body once it has begun. Default: 60 s.
    pub stall_timeout: Duration,
    /// How long a manifest, a config or a token may take as a whole. Default: 120 s.
    pub document_timeout: Duration,
    /// Bytes per second below which a blob is given up, so that a trickle does not last for ever; 0: any rate will do.
    /// Default: 1024.
    pub bytes_per_second_min: u64,
    /// The time over which that rate is measured. Default: 60 s.
    pub rate_window: Duration,
    /// The first pause between two tries; each next one is twice as long. Default: 500 ms.
    pub backoff: Duration,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            certs_dir: hosts::CERTS_DIR_DEFAULT.into(),
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(60),
            document_timeout: Duration::from_secs(120),
            bytes_per_second_min: 1024,
            rate_window: Duration::from_secs(60),
            backoff: Duration::from_millis(500),
        }
    }
}

/// See the module. Cheap to clone; clones share connections and tokens.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    config: Config,
    tokens: auth::Cache,
    /// Built when first needed: reading the system's certificates takes time and memory.
    http: tokio::sync::Mutex<HashMap<HttpKey, reqwest::Client>>,
    avoided: Mutex<HashMap<String, Instant>>,
}

/// What two requests must have in common to share an HTTP client.
#[derive(Clone, PartialEq, Eq, Hash)]
struct HttpKey {
    /// Nothing for plain http, which must not cost the system's certificates.
    tls: Option<Tls>,
    connect_timeout: Duration,
    /// This machine itself is never reached through a proxy.
    is_loopback: bool,
}

/// A document whose bytes have its digest.
#[derive(Clone, PartialEq, Eq)]
pub struct Resolved {
    /// The digest of `bytes`.
    pub digest: Digest,
    /// What it is.
    pub media_type: String,
    /// The document as it came, never to be written anew.
    pub bytes: Bytes,
    /// Who gave it: scheme, host and port.
    pub host: String,
}

impl fmt::Debug for Resolved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Resolved({}, {}, {} bytes from {})",
            self.digest,
            self.media_type,
            self.bytes.len(),
            self.host
        )
    }
}

/// An image chosen for a platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// What was read to find it: the document that the reference names first, the image's manifest last.
    pub documents: Vec<Resolved>,
    /// The last document, parsed.
    pub manifest: Manifest,
}

/// The bytes of a blob from `offset` on; not verified.
pub struct Blob {
    /// Where this stream begins. 0 if the host cannot resume: then what is there already must be thrown away.
    pub offset: u64,
    /// Bytes from `offset` to the end.
    pub length: u64,
    /// Who gives it: scheme, host and port.
    pub host: String,
    remaining: u64,
    response: Response,
    pace: Pace,
    client: Client,
}

impl Client {
    /// A client that has done nothing yet: no file is read and no connection made before the first operation.
    #[must_use]
    pub fn new(config: Config) -> Client {
        Client(Arc::new(Inner {
            config,
            tokens: auth::Cache::default(),
            http: tokio::sync::Mutex::default(),
            avoided: Mutex::default(),
        }))
    }

    /// The document that a reference names: an index or a manifest, verified if the reference has a digest.
    ///
    /// # Errors
    /// See the module.
    pub async fn resolve(
        &self,
        reference: &Reference,
        credentials: Option<&Credentials>,
    ) -> Result<Resolved> {
        let want = Doc {
            path: format!("manifests/{}", reference.target()),
            is_manifest: true,
            expected: reference.digest(),
            size: None,
        };
        self.fetch(reference, &want, credentials).await
    }

    /// A manifest or index that another document names.
    ///
    /// # Errors
    /// See the module.
    pub async fn manifest(
        &self,
        reference: &Reference,
        descriptor: &Descriptor,
        credentials: Option<&Credentials>,
    ) -> Result<Resolved> {
        let want = Doc {
            path: format!("manifests/{}", descriptor.digest),
            is_manifest: true,
            expected: Some(&descriptor.digest),
            size: Some(descriptor.size),
        };
        let resolved = self.fetch(reference, &want, credentials).await?;
        if resolved.media_type != descriptor.media_type {
            let (digest, is, named) = (&descriptor.digest, &resolved.media_type, &descriptor.media_type);
            return Err(Error::precondition(format!(
                "manifest {digest} is {is} and the index says it is {named}"
            )));
        }
        Ok(resolved)
    }

    /// The image config, or another small blob, in memory.
    ///
    /// # Errors
    /// See the module.
    pub async fn config(
        &self,
        reference: &Reference,
        descriptor: &Descriptor,
        credentials: Option<&Credentials>,
    ) -> Result<Bytes> {
        let want = Doc {
            path: format!("blobs/{}", descriptor.digest),
            is_manifest: false,
            expected: Some(&descriptor.digest),
            size: Some(descriptor.size),
        };
        self.fetch(reference, &want, credentials).await.map(|resolved| resolved.bytes)
    }

    /// From a reference to the manifest for a platform, through as many indexes as there are.
    ///
    /// # Errors
    /// See the module; `NotFound` if there is no image for the platform.
    pub async fn image(
        &self,
        reference: &Reference,
        platform: &Platform,
        credentials: Option<&Credentials>,
    ) -> Result<Image> {
        let mut documents = vec![self.resolve(reference, credentials).await?];
        loop {
            let last = &documents[documents.len() - 1];
            match Document::parse(Some(&last.media_type), &last.bytes)
                .map_err(|error| error.during(format!("image {reference}")))?
            {
                Document::Manifest(manifest) => return Ok(Image { documents, manifest }),
                Document::Index(_) if documents.len() > INDEX_DEPTH_MAX => {
                    return Err(Error::precondition(format!(
                        "image {reference} has more than {INDEX_DEPTH_MAX} indexes within each other"
                    )));
                }
                Document::Index(index) => {
                    let chosen =
                        index.choose(platform).map_err(|error| error.during(format!("image {reference}")))?;
                    documents.push(self.manifest(reference, &chosen, credentials).await?);
                }
            }
        }
    }

    /// A blob from `offset` on. The bytes are not verified, and may be fewer than promised: then the stream ends in an
    /// error, and the caller, who knows what it has, asks again from there.
    ///
    /// # Errors
    /// See the module.
    pub async fn blob(
        &self,
        reference: &Reference,
        digest: &Digest,
        size: u64,
        offset: u64,
        credentials: Option<&Credentials>,
    ) -> Result<Blob> {
        if offset > 0 && offset >= size {
            return Err(Error::internal(format!("resume blob {digest} of {size} bytes at {offset}")));
        }
        let want = BlobRange { digest, size, offset };
        self.fetch(reference, &want, credentials).await
    }

    /// Asks a host last for a while, because what it gave was wrong.
    pub fn avoid(&self, host: &str) {
        let now = Instant::now();
        let mut avoided = self.0.avoided.lock().unwrap_or_else(PoisonError::into_inner);
        avoided.retain(|_, until| *until > now);
        avoided.insert(host.to_owned(), now + AVOIDED_FOR);
    }

    fn is_avoided(&self, host: &Host) -> bool {
        let avoided = self.0.avoided.lock().unwrap_or_else(PoisonError::into_inner);
        avoided.get(&host.origin()).is_some_and(|until| *until > Instant::now())
    }

    /// Asks host after host.
    async fn fetch<W: Want>(
        &self,
        reference: &Reference,
        want: &W,
        credentials: Option<&Credentials>,
    ) -> Result<W::Got> {
        let doing = || format!("get {} of {}", want.path(), reference.name());
        let hosts = self.hosts(reference).await?;
        let mut hosts: Vec<(usize, &Host)> =
            hosts.iter().enumerate().filter(|(_, host)| want.may_ask(host)).collect();
        let Some(&(deciding, _)) = hosts.last() else {
            return Err(Error::precondition(format!("{}: no configured host has the capability", doing())));
        };
        hosts.sort_by_key(|(_, host)| self.is_avoided(host));

        let mut kind = Kind::RegistryUnavailable;
        let mut said: Vec<String> = Vec::new();
        for (at, (order, host)) in hosts.iter().enumerate() {
            let credentials =
                credentials.filter(|credentials| !host.is_mirror && credentials.are_for(reference.host()));
            let request = Request { host, reference, credentials };
            match self.try_host(&request, want, at + 1 < hosts.len()).await {
                Ok(got) => return Ok(got),
                Err(error) => {
                    tracing::debug!(host = host.origin(), %error, "host did not give {}", want.path());
                    if *order == deciding {
                        kind = error.kind();
                    }
                    said.push(format!("{}: {error}", host.origin()));
                }
            }
        }
        Err(Error::new(kind, format!("{}: {}", doing(), said.join("; "))))
    }

    async fn hosts(&self, reference: &Reference) -> Result<Vec<Host>> {
        let (certs_dir, host) = (self.0.config.certs_dir.clone(), reference.host().to_owned());
        tokio::task::spawn_blocking(move || hosts::load(&certs_dir, &host))
            .await
            .map_err(|error| Error::with_source(Kind::Internal, "read registry configuration", error))?
    }

    /// Asks one host, again if that may help.
    async fn try_host<W: Want>(
        &self,
        request: &Request<'_>,
        want: &W,
        another_follows: bool,
    ) -> Result<W::Got> {
        let attempts = if another_follows { ATTEMPTS_BEFORE_NEXT_HOST } else { ATTEMPTS_MAX };
        let mut budget = Budget { token_requests: TOKEN_REQUESTS_MAX, may_resume: true };
        let mut attempt = 1;
        loop {
            let failure = match self.try_once(request, want, &mut budget).await {
                Ok(got) => return Ok(got),
                Err(failure) => failure,
            };
            let pause = match failure.retry {
                Retry::FromStart if budget.may_resume => {
                    budget.may_resume = false;
                    Duration::ZERO
                }
                Retry::No | Retry::FromStart => return Err(failure.error),
                Retry::Elsewhere => {
                    self.avoid(&request.host.origin());
                    if another_follows {
                        return Err(failure.error);
                    }
                    backoff(self.0.config.backoff, attempt)
                }
                Retry::Soon => backoff(self.0.config.backoff, attempt),
                Retry::After(wait) if wait <= RETRY_AFTER_MAX && !another_follows => wait,
                Retry::After(_) => return Err(failure.error),
            };
            if attempt >= attempts {
                return Err(failure.error);
            }
            attempt += 1;
            tokio::time::sleep(pause).await;
        }
    }

    async fn try_once<W: Want>(
        &self,
        request: &Request<'_>,
        want: &W,
        budget: &mut Budget,
    ) -> std::result::Result<W::Got, Failure> {
        let mut headers = HeaderMap::new();
        want.headers(&mut headers, budget.may_resume);
        let response = self.authorized(request, &request.url(&want.path()), &headers, budget).await?;
        if !response.status().is_success() {
            return Err(self.refusal(response).await);
        }
        want.take(self, request.host, response).await
    }

    /// Sends a request with the credentials it turns out to need.
    async fn authorized(
        &self,
        request: &Request<'_>,
        url: &Url,
        headers: &HeaderMap,
        budget: &mut Budget,
    ) -> std::result::Result<Response, Failure> {
        let host = request.host;
        let scope = format!("repository:{}:pull", request.reference.repository());
        let key = auth::Key::new(host.origin(), scope.clone(), request.credentials);
        let mut authorization = match request.credentials.map(Credentials::secret) {
            Some(auth::Secret::Registry(token)) => auth::bearer(token),
            _ => self.0.tokens.get(&key, Instant::now()),
        };
        loop {
            let response = self.follow(host, url, headers, authorization.as_ref()).await?;
            if response.status() != StatusCode::UNAUTHORIZED {
                return Ok(response);
            }
            if let Some(refused) = &authorization {
                self.0.tokens.forget(&key, refused);
            }
            if budget.token_requests == 0 {
                return Ok(response); // a refusal like any other
            }
            budget.token_requests -= 1;
            let challenges = auth::challenges(response.headers());
            let (header, life) = match auth::answer(&challenges, &host.base, &scope, request.credentials)? {
                auth::Answer::Basic => {
                    let header =
                        request.credentials.and_then(|credentials| auth::basic(credentials.secret()));
                    if header.is_none() || header == authorization {
                        return Ok(response); // the same again will not help
                    }
                    (header, BASIC_LIFE)
                }
                auth::Answer::Token(ask) => {
                    let token =
                        self.token(host, ask).await.map_err(|failure| match budget.token_requests {
                            // A further try would only show us the 401 again, and hide why.
                            0 => Failure { retry: Retry::No, ..failure },
                            _ => failure,
                        })?;
                    (Some(token.header), token.life)
                }
            };
            if let Some(header) = &header {
                self.0.tokens.put(key.clone(), header.clone(), life, Instant::now());
            }
            authorization = header;
        }
    }

    /// Sends a request and follows redirects by hand, because what may go along depends on where they lead.
    async fn follow(
        &self,
        host: &Host,
        url: &Url,
        headers: &HeaderMap,
        authorization: Option<&HeaderValue>,
    ) -> std::result::Result<Response, Failure> {
        let mut url = url.clone();
        let mut is_at_home = true;
        for _ in 0..=REDIRECTS_MAX {
            let mut all = headers.clone();
            if is_at_home {
                all.extend(host.headers.clone());
                if let Some(authorization) = authorization {
                    all.insert(header::AUTHORIZATION, authorization.clone());
                }
            }
            let sent = self.http(host, &url, is_at_home).await?.get(url.clone()).headers(all).send();
            let response = self.in_time(sent).await?;
            if !is_redirect(response.status()) {
                return Ok(response);
            }
            let target = response.headers().get(header::LOCATION).and_then(|location| location.to_str().ok());
            let next = target
                .and_then(|target| url.join(target).ok())
                .ok_or_else(|| Failure::no(Kind::RegistryUnavailable, "redirects without saying where to"))?;
            if !matches!(next.scheme(), "http" | "https")
                || (url.scheme() == "https" && next.scheme() == "http")
            {
                return Err(Failure::no(
                    Kind::RegistryUnavailable,
                    "redirects to an address that is not https",
                ));
            }
            // Whoever has left does not come back with credentials.
            is_at_home = is_at_home && next.origin() == host.base.origin();
            url = next;
        }
        Err(Failure::no(Kind::RegistryUnavailable, format!("redirects more than {REDIRECTS_MAX} times")))
    }

    async fn token(&self, host: &Host, ask: auth::TokenRequest) -> std::result::Result<auth::Token, Failure> {
        let is_at_home = ask.url.origin() == host.base.origin();
        let http = self.http(host, &ask.url, is_at_home).await?;
        let server = hosts::origin(&ask.url);
        let mut request = match ask.form {
            None => http.get(ask.url),
            Some(form) => http
                .post(ask.url)
                .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(form),
        };
        if let Some(basic) = ask.basic {
            request = request.header(header::AUTHORIZATION, basic);
        }
        let response =
            self.in_time(request.send()).await.map_err(|failure| failure.at_token_server(&server))?;
        let status = response.status();
        if !status.is_success() {
            // Not with its words: they may repeat what was sent.
            return Err(Failure::status(status, retry_after(response.headers()), "").at_token_server(&server));
        }
        let bytes =
            self.read(response, TOKEN_BYTES_MAX).await.map_err(|failure| failure.at_token_server(&server))?;
        Ok(auth::parse_token(&bytes)?)
    }

    /// The HTTP client for a URL that was reached from a host. Away from home the host's way to trust still counts, as
    /// its storage often has certificates of the same authority, but our certificate is shown to nobody else.
    async fn http(
        &self,
        host: &Host,
        url: &Url,
        is_at_home: bool,
    ) -> std::result::Result<reqwest::Client, Failure> {
        let mut tls = (url.scheme() == "https").then(|| host.tls.clone());
        if let Some(tls) = tls.as_mut().filter(|_| !is_at_home) {
            tls.client = None;
        }
        let key = HttpKey {
            tls,
            connect_timeout: host.dial_timeout.unwrap_or(self.0.config.connect_timeout),
            is_loopback: hosts::is_loopback(url),
        };
        let mut clients = self.0.http.lock().await;
        if let Some(client) = clients.get(&key) {
            return Ok(client.clone());
        }
        let built = key.clone();
        let client = tokio::task::spawn_blocking(move || build_http(&built))
            .await
            .map_err(|error| Error::with_source(Kind::Internal, "build an HTTP client", error))?
            .map_err(|error| {
                Error::with_source(Kind::RegistryUnavailable, "set up TLS", error.without_url())
            })?;
        if clients.len() >= CLIENTS_MAX {
            clients.clear();
        }
        clients.insert(key, client.clone());
        Ok(client)
    }

    /// Waits for the head of an answer.
    async fn in_time(
        &self,
        sent: impl Future<Output = reqwest::Result<Response>>,
    ) -> std::result::Result<Response, Failure> {
        let limit = self.0.config.stall_timeout;
        match timeout(limit, sent).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(Failure {
                retry: if error.is_connect() { Retry::Elsewhere } else { Retry::Soon },
                error: Error::with_source(Kind::RegistryUnavailable, "no answer", error.without_url()),
            }),
            Err(_) => Err(Failure {
                retry: Retry::Elsewhere,
                error: Error::new(Kind::RegistryUnavailable, format!("no answer within {limit:?}")),
            }),
        }
    }

    /// Reads a small body whole.
    async fn read(&self, mut response: Response, bytes_max: usize) -> std::result::Result<Bytes, Failure> {
        let limit = self.0.config.document_timeout;
        let too_long =
            || Failure::no(Kind::ResourceExhausted, format!("answered with more than {bytes_max} bytes"));
        if response.content_length().is_some_and(|length| length > bytes_max as u64) {
            return Err(too_long());
        }
        let reading = async {
            let mut bytes = BytesMut::new();
            while let Some(chunk) = response.chunk().await.map_err(|error| broken_off(error, Retry::Soon))? {
                if bytes.len() + chunk.len() > bytes_max {
                    return Err(too_long());
                }
                bytes.extend_from_slice(&chunk);
            }
            Ok(bytes.freeze())
        };
        match timeout(limit, reading).await {
            Ok(read) => read,
            Err(_) => Err(Failure {
                retry: Retry::Soon,
                error: Error::new(Kind::RegistryUnavailable, format!("the answer took more than {limit:?}")),
            }),
        }
    }

    /// What an answer that is not a success means.
    async fn refusal(&self, response: Response) -> Failure {
        let (status, after) = (response.status(), retry_after(response.headers()));
        // Half an explanation is better than none, but not worth waiting for.
        let body = self.read(response, ERROR_BODY_BYTES_MAX).await.unwrap_or_default();
        Failure::status(status, after, &explanation(&body))
    }
}

fn build_http(key: &HttpKey) -> reqwest::Result<reqwest::Client> {
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("ocid/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .connect_timeout(key.connect_timeout)
        .pool_idle_timeout(Duration::from_secs(30))
        .pool_max_idle_per_host(4)
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .referer(false);
    if key.is_loopback {
        builder = builder.no_proxy();
    }
    match &key.tls {
        None => builder = builder.tls_certs_only([]),
        Some(tls) => {
            let mut certificates = Vec::new();
            for pem in &tls.ca {
                certificates.extend(reqwest::Certificate::from_pem_bundle(pem)?);
            }
            builder = builder.tls_certs_merge(certificates);
            if let Some(pem) = &tls.client {
                builder = builder.identity(reqwest::Identity::from_pem(pem)?);
            }
            if tls.skip_verify {
                builder = builder.tls_danger_accept_invalid_certs(true);
            }
        }
    }
    builder.build()
}

/// One operation at one host.
struct Request<'a> {
    host: &'a Host,
    reference: &'a Reference,
    /// Only those that this host may see.
    credentials: Option<&'a Credentials>,
}

impl Request<'_> {
    fn url(&self, path: &str) -> Url {
        let mut url = self.host.base.clone();
        let base = url.path().trim_end_matches('/').to_owned();
        url.set_path(&format!("{base}/{}/{path}", self.reference.repository()));
        if self.host.is_mirror {
            url.query_pairs_mut().append_pair("ns", self.reference.host());
        }
        url
    }
}

/// What is left of an operation's patience with a host.
struct Budget {
    token_requests: u32,
    may_resume: bool,
}

/// What an operation asks for, and how it takes the answer.
trait Want: Sync {
    type Got: Send;
    fn may_ask(&self, host: &Host) -> bool;
    /// What follows the repository in the URL.
    fn path(&self) -> String;
    fn headers(&self, headers: &mut HeaderMap, may_resume: bool);
    fn take(
        &self,
        client: &Client,
        host: &Host,
        response: Response,
    ) -> impl Future<Output = std::result::Result<Self::Got, Failure>> + Send;
}

/// A manifest, an index or a config: small, read whole, verified.
struct Doc<'a> {
    path: String,
    is_manifest: bool,
    expected: Option<&'a Digest>,
    size: Option<u64>,
}

impl Want for Doc<'_> {
    type Got = Resolved;

    fn may_ask(&self, host: &Host) -> bool {
        if self.expected.is_some() { host.can_pull } else { host.can_resolve }
    }

    fn path(&self) -> String {
        self.path.clone()
    }

    fn headers(&self, headers: &mut HeaderMap, _may_resume: bool) {
        if self.is_manifest {
            headers.insert(header::ACCEPT, HeaderValue::from_static(manifest::ACCEPT));
        }
    }

    async fn take(
        &self,
        client: &Client,
        host: &Host,
        response: Response,
    ) -> std::result::Result<Resolved, Failure> {
        let text = |name: &str| {
            response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
        };
        let declared = text("content-type");
        let announced = text("docker-content-digest").and_then(|digest| Digest::parse(&digest).ok());
        let bytes = client.read(response, DOCUMENT_BYTES_MAX).await?;
        if let Some(size) = self.size
            && size != bytes.len() as u64
        {
            return Err(Failure::mismatch(format!("size mismatch: {} bytes instead of {size}", bytes.len())));
        }
        // What the host announces proves nothing, but bytes that differ from it were damaged on the way.
        for digest in [self.expected, announced.as_ref()].into_iter().flatten() {
            if !digest.matches(&bytes) {
                return Err(Failure::mismatch(format!("digest mismatch: the bytes are not {digest}")));
            }
        }
        let media_type = match self.is_manifest {
            true => manifest::media_type(declared.as_deref(), &bytes)?.to_owned(),
            false => declared.unwrap_or_default(),
        };
        let digest = self.expected.cloned().unwrap_or_else(|| Digest::sha256(&bytes));
        Ok(Resolved { digest, media_type, bytes, host: host.origin() })
    }
}

struct BlobRange<'a> {
    digest: &'a Digest,
    size: u64,
    offset: u64,
}

impl Want for BlobRange<'_> {
    type Got = Blob;

    fn may_ask(&self, host: &Host) -> bool {
        host.can_pull
    }

    fn path(&self) -> String {
        format!("blobs/{}", self.digest)
    }

    fn headers(&self, headers: &mut HeaderMap, may_resume: bool) {
        // A range counts in the bytes as they are sent, so they must be sent as they are stored.
        headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if self.offset > 0 && may_resume {
            headers.insert(header::RANGE, header_number("bytes=", self.offset, "-"));
        }
    }

    async fn take(
        &self,
        client: &Client,
        host: &Host,
        response: Response,
    ) -> std::result::Result<Blob, Failure> {
        let offset = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let range =
                    response.headers().get(header::CONTENT_RANGE).and_then(|range| range.to_str().ok());
                let (start, total) = range.and_then(content_range).ok_or_else(Failure::bad_range)?;
                if start != self.offset || total.is_some_and(|total| total != self.size) {
                    return Err(Failure::bad_range());
                }
                start
            }
            StatusCode::OK => 0,
            other => return Err(Failure::status(other, None, "")),
        };
        let length = self.size - offset;
        let promised = response.content_length();
        if promised.is_some_and(|promised| promised > length || (offset == 0 && promised != length)) {
            let promised = promised.unwrap_or_default();
            return Err(Failure::mismatch(format!("size mismatch: {promised} bytes instead of {length}")));
        }
        let pace = Pace::new(&client.0.config);
        let client = client.clone();
        Ok(Blob { offset, length, host: host.origin(), remaining: length, response, pace, client })
    }
}

impl Blob {
    /// The next bytes, or nothing at the end, when all of `length` have come.
    ///
    /// # Errors
    /// `RegistryUnavailable` if the stream breaks off, stalls, trickles or is too long. The next request goes to
    /// another host first, if there is one.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>> {
        match self.next().await {
            Ok(chunk) => Ok(chunk),
            Err(error) => {
                self.client.avoid(&self.host);
                Err(Error::new(Kind::RegistryUnavailable, format!("{}: {error}", self.host)))
            }
        }
    }

    async fn next(&mut self) -> Result<Option<Bytes>> {
        let unavailable = |why: String| Err(Error::new(Kind::RegistryUnavailable, why));
        let limit = self.client.0.config.stall_timeout;
        let begun = Instant::now();
        let Ok(chunk) = timeout(limit, self.response.chunk()).await else {
            return unavailable(format!("stalled: no bytes within {limit:?}"));
        };
        let done = self.length - self.remaining;
        let chunk = match chunk {
            Ok(chunk) => chunk,
            Err(error) => {
                let what = format!("broke off after {done} of {} bytes", self.length);
                return Err(Error::with_source(Kind::RegistryUnavailable, what, error.without_url()));
            }
        };
        let Some(chunk) = chunk else {
            return match self.remaining {
                0 => Ok(None),
                _ => unavailable(format!("truncated after {done} of {} bytes", self.length)),
            };
        };
        match self.remaining.checked_sub(chunk.len() as u64) {
            None => return unavailable(format!("size mismatch: more than {} bytes", self.length)),
            Some(remaining) => self.remaining = remaining,
        }
        if !self.pace.keeps_up(begun.elapsed(), chunk.len() as u64) {
            return unavailable(format!(
                "too slow: less than {} bytes per second",
                self.pace.bytes_per_second_min
            ));
        }
        Ok(Some(chunk))
    }

    /// The same as a stream, which ends after an error.
    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes>> + Send {
        stream::try_unfold(self, |mut blob| async move { Ok(blob.chunk().await?.map(|chunk| (chunk, blob))) })
    }
}

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Blob({} bytes from {} on, {} to come, from {})",
            self.length, self.offset, self.remaining, self.host
        )
    }
}

/// Whether bytes arrive fast enough. Only time spent waiting for them counts, not what their taker does with them.
struct Pace {
    bytes_per_second_min: u64,
    window: Duration,
    waited: Duration,
    received: u64,
}

impl Pace {
    fn new(config: &Config) -> Pace {
        Pace {
            bytes_per_second_min: config.bytes_per_second_min,
            window: config.rate_window,
            waited: Duration::ZERO,
            received: 0,
        }
    }

    fn keeps_up(&mut self, waited: Duration, received: u64) -> bool {
        self.waited += waited;
        self.received += received;
        if self.waited < self.window {
            return true;
        }
        let due = u128::from(self.bytes_per_second_min) * self.waited.as_millis() / 1000;
        let enough = u128::from(self.received) >= due;
        (self.waited, self.received) = (Duration::ZERO, 0);
        enough
    }
}

/// Why one try did not work, and whether another may.
#[derive(Debug)]
struct Failure {
    error: Error,
    retry: Retry,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Retry {
    No,
    Soon,
    /// The host is not there: another one, or the same if there is no other.
    Elsewhere,
    After(Duration),
    /// Without a range.
    FromStart,
}

impl Failure {
    fn no(kind: Kind, why: impl Into<String>) -> Failure {
        Failure { error: Error::new(kind, why), retry: Retry::No }
    }

    fn mismatch(why: String) -> Failure {
        Failure { error: Error::new(Kind::RegistryUnavailable, why), retry: Retry::Soon }
    }

    fn bad_range() -> Failure {
        let error =
            Error::new(Kind::RegistryUnavailable, "answered with another range than it was asked for");
        Failure { error, retry: Retry::FromStart }
    }

    fn status(status: StatusCode, after: Option<Duration>, explanation: &str) -> Failure {
        let unknown = ["MANIFEST_UNKNOWN", "NAME_UNKNOWN", "BLOB_UNKNOWN"]
            .iter()
            .any(|code| explanation.starts_with(code));
        let kind = match status {
            StatusCode::NOT_FOUND => Kind::NotFound,
            StatusCode::UNAUTHORIZED => Kind::Unauthenticated,
            StatusCode::FORBIDDEN => Kind::PermissionDenied,
            _ if unknown => Kind::NotFound,
            _ => Kind::RegistryUnavailable,
        };
        let may_pass = matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS)
            || status.is_server_error();
        let retry = match (status, may_pass, after) {
            (StatusCode::RANGE_NOT_SATISFIABLE, ..) => Retry::FromStart,
            (_, true, Some(after)) => Retry::After(after),
            (_, true, None) => Retry::Soon,
            (_, false, _) => Retry::No,
        };
        let mut text = format!("answered {status}");
        if let Some(after) = after.filter(|after| may_pass && *after > RETRY_AFTER_MAX) {
            text.push_str(&format!(", and to come back in {} s", after.as_secs()));
        }
        if !explanation.is_empty() {
            text.push_str(&format!(": {explanation}"));
        }
        Failure { error: Error::new(kind, text), retry }
    }

    fn at_token_server(self, server: &str) -> Failure {
        // A token server that does not exist says nothing about the image.
        let kind = match self.error.kind() {
            Kind::NotFound | Kind::ResourceExhausted => Kind::RegistryUnavailable,
            kind => kind,
        };
        Failure {
            error: Error::new(kind, format!("token server {server}: {}", self.error)),
            retry: self.retry,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure { error, retry: Retry::No }
    }
}

fn broken_off(error: reqwest::Error, retry: Retry) -> Failure {
    Failure {
        error: Error::with_source(Kind::RegistryUnavailable, "the answer broke off", error.without_url()),
        retry,
    }
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// `Retry-After` in seconds; a date is left out, for clocks differ, and our own pauses count.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    value.parse().ok().map(Duration::from_secs)
}

/// `bytes 5-9/10`: where it starts, and the size of the whole if it is said.
fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (start, _) = range.split_once('-')?;
    let total = match total.trim() {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    Some((start.trim().parse().ok()?, total))
}

fn header_number(before: &str, number: u64, after: &str) -> HeaderValue {
    HeaderValue::try_from(format!("{before}{number}{after}")).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// A pause that doubles each time, of which a random half is left out, so that many clients do not come back at once.
fn backoff(first: Duration, attempt: u32) -> Duration {
    let full = first.saturating_mul(1 << attempt.saturating_sub(1).min(16)).min(BACKOFF_MAX);
    // The standard library's hash keys are its only randomness; quality does not matter here.
    let random = RandomState::new().build_hasher().finish() % 1000;
    full / 2 + (full / 2).mul_f64(random as f64 / 1000.0)
}

#[derive(Deserialize)]
struct Errors {
    #[serde(default)]
    errors: Vec<OneError>,
}

#[derive(Deserialize)]
struct OneError {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// A registry's own words, if it speaks the protocol: the first error's code and message, short and printable. Other
/// bodies, mostly pages of proxies, are left out.
fn explanation(body: &[u8]) -> String {
    let Ok(Errors { errors }) = serde_json::from_slice(body) else { return String::new() };
    let Some(first) = errors.into_iter().next() else { return String::new() };
    let text =
        if first.message.is_empty() { first.code } else { format!("{}: {}", first.code, first.message) };
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(ERROR_TEXT_MAX).collect()
}

#[cfg(test)]
mod tests;
