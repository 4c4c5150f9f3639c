//! Credentials, and what a registry wants to see of them.
//!
//! A registry answers 401 with challenges. `Basic` wants the user and the password; `Bearer` names a token server (the
//! realm), which gives a token for one scope: by GET with user and password, by GET with nothing for public images, or
//! by POST with an identity token. Tokens are kept in memory until shortly before they expire, for one host, scope and
//! credential: whoever has other credentials, or none, does not get them.
//!
//! Secrets are in no error, no log and no `Debug` output, and go nowhere but to the host they are for and to the realm
//! that host names; a realm without TLS is refused if the registry has TLS.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use http::{HeaderMap, HeaderValue, header};
use reqwest::Url;
use serde::Deserialize;

use super::reference::Digest;
use crate::error::{Error, Kind, Result};

/// The most bytes of one `WWW-Authenticate` header that are looked at, and the most headers and challenges.
const CHALLENGE_BYTES_MAX: usize = 8 << 10;
const CHALLENGES_MAX: usize = 16;
const PARAMETERS_MAX: usize = 16;

/// The most tokens kept.
const TOKENS_MAX: usize = 256;
/// How long a token lives whose server does not say.
const TOKEN_LIFE_DEFAULT: Duration = Duration::from_secs(60);
/// No token is kept longer than this, whatever its server says.
const TOKEN_LIFE_MAX: Duration = Duration::from_secs(3600);
/// A token is not used in the last moments of its life: the request would arrive after it.
const TOKEN_MARGIN: Duration = Duration::from_secs(10);

/// What the caller gives to prove who it is. One of the variants of CRI's `AuthConfig`; not shown by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    secret: Secret,
    server: Option<String>,
}

#[derive(Clone, PartialEq, Eq)]
pub(super) enum Secret {
    Password {
        username: String,
        password: String,
    },
    /// Exchanged for access tokens at the realm.
    Identity(String),
    /// A bearer token for the registry itself.
    Registry(String),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.secret {
            Secret::Password { .. } => "password",
            Secret::Identity(_) => "identity token",
            Secret::Registry(_) => "registry token",
        };
        write!(f, "Credentials({kind}, redacted)")
    }
}

impl Credentials {
    /// From the fields of CRI's `AuthConfig`. All empty is nothing: an anonymous pull.
    ///
    /// # Errors
    /// `InvalidArgument` if `auth` is not base64 of `user:password`, without saying what it is.
    pub fn from_cri(
        username: &str,
        password: &str,
        auth: &str,
        server_address: &str,
        identity_token: &str,
        registry_token: &str,
    ) -> Result<Option<Credentials>> {
        let secret = if !identity_token.is_empty() {
            Secret::Identity(identity_token.to_owned())
        } else if !registry_token.is_empty() {
            Secret::Registry(registry_token.to_owned())
        } else if !username.is_empty() || !password.is_empty() {
            Secret::Password { username: username.to_owned(), password: password.to_owned() }
        } else if !auth.is_empty() {
            decode_auth(auth).ok_or_else(|| Error::invalid("`auth` is not base64 of user:password"))?
        } else {
            return Ok(None);
        };
        let server = (!server_address.is_empty()).then(|| server_host(server_address));
        Ok(Some(Credentials { secret, server }))
    }

    /// User and password.
    #[must_use]
    pub fn password(username: &str, password: &str) -> Credentials {
        let secret = Secret::Password { username: username.to_owned(), password: password.to_owned() };
        Credentials { secret, server: None }
    }

    /// Whether they are meant for the registry of this host: credentials that name another server are not sent.
    pub(super) fn are_for(&self, host: &str) -> bool {
        let canonical = |host: &str| match host {
            "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
            other => other.to_ascii_lowercase(),
        };
        self.server.as_deref().is_none_or(|server| canonical(server) == canonical(host))
    }

    pub(super) fn secret(&self) -> &Secret {
        &self.secret
    }

    /// A name for these credentials that tells nothing about them.
    fn fingerprint(&self) -> Digest {
        let (kind, first, second) = match &self.secret {
            Secret::Password { username, password } => ("p", username.as_str(), password.as_str()),
            Secret::Identity(token) => ("i", token.as_str(), ""),
            Secret::Registry(token) => ("r", token.as_str(), ""),
        };
        Digest::sha256(format!("{kind}{}:{first}{second}", first.len()).as_bytes())
    }
}

fn decode_auth(auth: &str) -> Option<Secret> {
    let auth = auth.trim();
    let bytes = STANDARD.decode(auth).or_else(|_| STANDARD_NO_PAD.decode(auth)).ok()?;
    let text = String::from_utf8(bytes).ok()?;
    let (username, password) = text.split_once(':')?;
    // Docker's own encoder pads with NUL.
    let password = password.trim_end_matches('\0');
    Some(Secret::Password { username: username.to_owned(), password: password.to_owned() })
}

/// The host of `https://host/v1/` or of `host/path`.
fn server_host(address: &str) -> String {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    rest.split('/').next().unwrap_or_default().to_owned()
}

/// What a registry wants to see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

/// Reads the challenges of all `WWW-Authenticate` headers; those we do not understand are left out.
pub(super) fn challenges(headers: &HeaderMap) -> Vec<Challenge> {
    let mut found = Vec::new();
    for value in headers.get_all(header::WWW_AUTHENTICATE).iter().take(CHALLENGES_MAX) {
        let Ok(text) = value.to_str() else { continue };
        if text.len() <= CHALLENGE_BYTES_MAX {
            found.extend(parse_challenges(text));
        }
    }
    found.truncate(CHALLENGES_MAX);
    found
}

/// One header may hold several challenges, separated by commas like their own parameters: a word that is followed by
/// `=` is a parameter, any other word begins a challenge.
fn parse_challenges(text: &str) -> Vec<Challenge> {
    let mut raw: Vec<(String, Vec<(String, String)>)> = Vec::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let end = rest.find(|c: char| !is_token(c)).unwrap_or(rest.len());
        if end == 0 || raw.len() >= CHALLENGES_MAX {
            break; // the end, or nothing that a header may hold here
        }
        let (word, after) = rest.split_at(end);
        let Some(value) = after.trim_start().strip_prefix('=') else {
            raw.push((word.to_ascii_lowercase(), Vec::new()));
            rest = after;
            continue;
        };
        let Some((value, after)) = parameter_value(value.trim_start()) else { break };
        rest = after;
        let Some((_, parameters)) = raw.last_mut() else { break };
        if parameters.len() < PARAMETERS_MAX {
            parameters.push((word.to_ascii_lowercase(), value));
        }
    }
    raw.into_iter().filter_map(|(scheme, parameters)| Challenge::new(&scheme, parameters)).collect()
}

fn is_token(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c)
}

/// A token, or a quoted string with its backslashes taken out; and what follows.
fn parameter_value(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        // Some registries forget the quotes: take everything that does not separate.
        let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
        return Some((text[..end].to_owned(), &text[end..]));
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &quoted[at + 1..])),
            '\\' => value.push(chars.next()?.1),
            other => value.push(other),
        }
    }
    None
}

impl Challenge {
    fn new(scheme: &str, parameters: Vec<(String, String)>) -> Option<Challenge> {
        let mut named: HashMap<String, String> = HashMap::new();
        for (name, value) in parameters {
            named.entry(name).or_insert(value);
        }
        match scheme {
            "basic" => Some(Challenge::Basic),
            "bearer" => Some(Challenge::Bearer {
                realm: named.remove("realm")?,
                service: named.remove("service").filter(|service| !service.is_empty()),
                scope: named.remove("scope").filter(|scope| !scope.is_empty()),
            }),
            _ => None,
        }
    }
}

/// What to do about a challenge.
#[derive(Debug)]
pub(super) enum Answer {
    /// Send user and password to the registry itself.
    Basic,
    /// Ask the realm for a token first.
    Token(TokenRequest),
}

/// A request for a token; the URL of a GET holds no secret.
pub(super) struct TokenRequest {
    pub(super) url: Url,
    /// User and password, for GET.
    pub(super) basic: Option<HeaderValue>,
    /// The form to POST, with the identity token in it.
    pub(super) form: Option<String>,
}

impl fmt::Debug for TokenRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenRequest({}, redacted)", self.url)
    }
}

/// Chooses what to answer. `registry` is where the challenge came from, `scope` what we want to do there.
///
/// # Errors
/// `Unauthenticated` if we have not what it wants; `RegistryUnavailable` if the realm is not one we may ask.
pub(super) fn answer(
    challenges: &[Challenge],
    registry: &Url,
    scope: &str,
    credentials: Option<&Credentials>,
) -> Result<Answer> {
    let denied = |why: &str| Err(Error::new(Kind::Unauthenticated, why));
    let secret = credentials.map(Credentials::secret);
    if matches!(secret, Some(Secret::Registry(_))) {
        return denied("the registry does not accept the registry token");
    }
    let bearer = challenges.iter().find_map(|challenge| match challenge {
        Challenge::Bearer { realm, service, scope } => Some((realm, service.as_deref(), scope.as_deref())),
        Challenge::Basic => None,
    });
    if let Some((realm, service, asked)) = bearer {
        return token_request(realm, service, asked.unwrap_or(scope), registry, secret).map(Answer::Token);
    }
    match (challenges.contains(&Challenge::Basic), secret) {
        (true, Some(Secret::Password { .. })) => Ok(Answer::Basic),
        (true, None) => denied("the registry wants a user and a password"),
        (true, Some(_)) => denied("the registry wants a user and a password, and was given a token"),
        (false, _) => denied("the registry wants credentials of a kind that is neither Basic nor Bearer"),
    }
}

fn token_request(
    realm: &str,
    service: Option<&str>,
    scope: &str,
    registry: &Url,
    secret: Option<&Secret>,
) -> Result<TokenRequest> {
    let refuse =
        |why: &str| Err(Error::new(Kind::RegistryUnavailable, format!("the registry's token server {why}")));
    let Ok(mut url) = Url::parse(realm) else { return refuse("has an address that is not a URL") };
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none_or(str::is_empty) {
        return refuse("has an address that is neither http nor https");
    }
    if !url.username().is_empty() || url.password().is_some() {
        return refuse("has a user in its address");
    }
    if registry.scheme() == "https" && url.scheme() != "https" {
        return refuse("is not reached by https, though the registry is");
    }
    url.set_fragment(None);
    if let Some(Secret::Identity(token)) = secret {
        let mut form = Url::parse("http://form/").map_err(|_| Error::internal("encode a form"))?;
        form.query_pairs_mut()
            .append_pair("grant_type", "refresh_token")
            .append_pair("refresh_token", token)
            .append_pair("client_id", "ocid")
            .append_pair("scope", scope);
        if let Some(service) = service {
            form.query_pairs_mut().append_pair("service", service);
        }
        return Ok(TokenRequest { url, basic: None, form: form.query().map(str::to_owned) });
    }
    {
        let mut query = url.query_pairs_mut();
        if let Some(service) = service {
            query.append_pair("service", service);
        }
        for scope in scope.split(' ').filter(|scope| !scope.is_empty()) {
            query.append_pair("scope", scope);
        }
    }
    Ok(TokenRequest { url, basic: secret.and_then(basic), form: None })
}

/// The `Authorization` value of a user and password.
pub(super) fn basic(secret: &Secret) -> Option<HeaderValue> {
    let Secret::Password { username, password } = secret else { return None };
    sensitive(format!("Basic {}", STANDARD.encode(format!("{username}:{password}"))))
}

/// The `Authorization` value of a token; nothing if it cannot be in a header.
pub(super) fn bearer(token: &str) -> Option<HeaderValue> {
    sensitive(format!("Bearer {token}"))
}

fn sensitive(text: String) -> Option<HeaderValue> {
    let mut value = HeaderValue::try_from(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// A token as its server gave it.
pub(super) struct Token {
    pub(super) header: HeaderValue,
    pub(super) life: Duration,
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<serde_json::Value>,
}

/// Reads a token server's answer.
///
/// # Errors
/// `RegistryUnavailable`, without showing the answer.
pub(super) fn parse_token(bytes: &[u8]) -> Result<Token> {
    let bad = |why: &str| Error::new(Kind::RegistryUnavailable, format!("the registry's token server {why}"));
    // Not the error of the parser: it may quote the token.
    let answer: TokenAnswer =
        serde_json::from_slice(bytes).map_err(|_| bad("did not answer with JSON of a token"))?;
    let token = [answer.token, answer.access_token]
        .into_iter()
        .flatten()
        .find(|token| !token.is_empty())
        .ok_or_else(|| bad("gave no token"))?;
    let header = bearer(&token).ok_or_else(|| bad("gave a token that cannot be sent"))?;
    let life = answer
        .expires_in
        .and_then(|life| life.as_u64().or_else(|| life.as_str()?.parse().ok()))
        .filter(|seconds| *seconds > 0)
        .map_or(TOKEN_LIFE_DEFAULT, Duration::from_secs);
    Ok(Token { header, life: life.min(TOKEN_LIFE_MAX) })
}

/// What a token is for. Its last part keeps one caller's token from another.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    origin: String,
    scope: String,
    credentials: Option<Digest>,
}

impl Key {
    pub(super) fn new(origin: String, scope: String, credentials: Option<&Credentials>) -> Key {
        Key { origin, scope, credentials: credentials.map(Credentials::fingerprint) }
    }
}

/// The `Authorization` values in use. Bounded; what expires first goes first.
#[derive(Default)]
pub(super) struct Cache(Mutex<HashMap<Key, (HeaderValue, Instant)>>);

impl Cache {
    pub(super) fn get(&self, key: &Key, now: Instant) -> Option<HeaderValue> {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match entries.get(key) {
            Some((header, until)) if *until > now => Some(header.clone()),
            Some(_) => {
                entries.remove(key);
                None
            }
            None => None,
        }
    }

    pub(super) fn put(&self, key: Key, header: HeaderValue, life: Duration, now: Instant) {
        // A token of a short life keeps most of it.
        let life = life.saturating_sub(TOKEN_MARGIN.min(life / 5));
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|_, (_, until)| *until > now);
        if entries.len() >= TOKENS_MAX && !entries.contains_key(&key) {
            let first = entries.iter().min_by_key(|(_, (_, until))| *until).map(|(key, _)| key.clone());
            if let Some(first) = first {
                entries.remove(&first);
            }
        }
        entries.insert(key, (header, now + life));
    }

    /// Drops what a registry refused, unless another request has replaced it meanwhile.
    pub(super) fn forget(&self, key: &Key, refused: &HeaderValue) {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.get(key).is_some_and(|(header, _)| header == refused) {
            entries.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(text: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.append(header::WWW_AUTHENTICATE, HeaderValue::from_str(text).unwrap());
        headers
    }

    fn bearer_of(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        Challenge::Bearer {
            realm: realm.into(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        }
    }

    #[test]
    fn challenges_are_read_as_servers_write_them() {
        let cases: &[(&str, Vec<Challenge>)] = &[
            ("Basic realm=\"x\"", vec![Challenge::Basic]),
            ("basic", vec![Challenge::Basic]),
            (
                r#"Bearer realm="https://a/t",service="s",scope="repository:x:pull,push""#,
                vec![bearer_of("https://a/t", Some("s"), Some("repository:x:pull,push"))],
            ),
            (
                r#"bearer REALM = "https://a/t" , service = s"#,
                vec![bearer_of("https://a/t", Some("s"), None)],
            ),
            (r#"Bearer realm="a\"b\\c""#, vec![bearer_of("a\"b\\c", None, None)]),
            (
                r#"Negotiate, Basic realm="r", Bearer realm="https://a/t""#,
                vec![Challenge::Basic, bearer_of("https://a/t", None, None)],
            ),
            (r#"Bearer realm="first",realm="second""#, vec![bearer_of("first", None, None)]),
            (r#"Bearer service="s""#, vec![]),
            (r#"Bearer realm="never closed"#, vec![]),
            ("", vec![]),
            (",,, ,", vec![]),
            ("=\"x\"", vec![]),
        ];
        for (text, expected) in cases {
            assert_eq!(&challenges(&header(text)), expected, "{text}");
        }
    }

    #[test]
    fn challenges_may_stand_in_several_headers_and_are_bounded() {
        let mut headers = header("Basic realm=x");
        headers.append(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"https://a\""));
        assert_eq!(challenges(&headers).len(), 2);
        let many = header(&vec!["Basic"; 1000].join(", "));
        assert_eq!(challenges(&many).len(), CHALLENGES_MAX);
        let long = header(&format!("Bearer realm=\"https://a/{}\"", "x".repeat(CHALLENGE_BYTES_MAX)));
        assert_eq!(challenges(&long), []);
    }

    #[test]
    fn a_realm_that_must_not_be_asked_is_refused() {
        let secure = Url::parse("https://reg.io/v2").unwrap();
        let plain = Url::parse("http://reg.io/v2").unwrap();
        let ask = |realm: &str, registry: &Url| {
            answer(&[bearer_of(realm, None, None)], registry, "s", None).map_err(|error| error.kind())
        };
        for realm in ["http://evil/t", "ftp://x/t", "file:///x", "/token", "https://u:p@x/t", ""] {
            assert_eq!(ask(realm, &secure).unwrap_err(), Kind::RegistryUnavailable, "{realm}");
        }
        assert!(ask("https://auth.io/t", &secure).is_ok());
        assert!(ask("http://auth.io/t", &plain).is_ok());
    }

    #[test]
    fn bearer_is_preferred_and_a_password_goes_to_the_realm_in_a_header() {
        let registry = Url::parse("https://reg.io/v2").unwrap();
        let credentials = Credentials::password("user", "secret");
        let both = [Challenge::Basic, bearer_of("https://auth.io/t?a=b", Some("s"), None)];
        let Answer::Token(ask) = answer(&both, &registry, "x y", Some(&credentials)).unwrap() else {
            panic!("not a token request");
        };
        assert_eq!(ask.url.as_str(), "https://auth.io/t?a=b&service=s&scope=x&scope=y");
        assert_eq!(ask.basic.unwrap(), "Basic dXNlcjpzZWNyZXQ=");
    }

    #[test]
    fn cri_fields_become_one_credential() {
        let make = |u, p, a, i, r| Credentials::from_cri(u, p, a, "", i, r);
        assert_eq!(make("", "", "", "", "").unwrap(), None);
        let password = Some(Credentials::password("user", "secret"));
        assert_eq!(make("user", "secret", "", "", "").unwrap(), password);
        assert_eq!(make("", "", "dXNlcjpzZWNyZXQ=", "", "").unwrap(), password);
        assert_eq!(make("", "", "dXNlcjpzZWNyZXQ", "", "").unwrap(), password);
        let error = make("", "", "c2VjcmV0LXdpdGhvdXQtY29sb24=", "", "").unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument);
        assert!(!error.to_string().contains("secret") && !error.to_string().contains("c2Vj"));
        assert!(matches!(make("u", "p", "", "id", "").unwrap().unwrap().secret, Secret::Identity(_)));
        assert!(matches!(make("u", "p", "", "", "reg").unwrap().unwrap().secret, Secret::Registry(_)));
    }

    #[test]
    fn credentials_name_their_server_in_many_ways() {
        let for_server = |server| Credentials::from_cri("u", "p", "", server, "", "").unwrap().unwrap();
        for server in ["", "docker.io", "https://index.docker.io/v1/", "registry-1.docker.io"] {
            assert!(for_server(server).are_for("docker.io"), "{server}");
        }
        assert!(for_server("reg.io:5000/path").are_for("reg.io:5000"));
        for server in ["reg.io", "https://reg.io.evil/", "evil/reg.io:5000"] {
            assert!(!for_server(server).are_for("reg.io:5000"), "{server}");
        }
    }

    #[test]
    fn debug_output_is_redacted() {
        let credentials = [
            Credentials::password("user", "secret"),
            Credentials::from_cri("", "", "", "", "secret", "").unwrap().unwrap(),
            Credentials::from_cri("", "", "", "", "", "secret").unwrap().unwrap(),
        ];
        for one in &credentials {
            assert!(!format!("{one:?}").contains("secret"));
        }
        assert!(!format!("{:?}", bearer("secret")).contains("secret"));
    }

    #[test]
    fn tokens_are_read_in_all_their_forms() {
        let life =
            |text: &str| parse_token(text.as_bytes()).map(|token| (token.header, token.life.as_secs()));
        assert_eq!(life(r#"{"token":"a"}"#).unwrap(), (HeaderValue::from_static("Bearer a"), 60));
        assert_eq!(life(r#"{"access_token":"b","expires_in":300}"#).unwrap().1, 300);
        assert_eq!(life(r#"{"token":"","access_token":"b","expires_in":"90"}"#).unwrap().1, 90);
        assert_eq!(life(r#"{"token":"a","expires_in":-5}"#).unwrap().1, 60);
        assert_eq!(life(r#"{"token":"a","expires_in":99999999999}"#).unwrap().1, 3600);
        for text in ["", "[]", "{}", r#"{"token":"a\nb"}"#, r#"{"token":7,"x":"secret"}"#] {
            let error = life(text).unwrap_err();
            assert_eq!(error.kind(), Kind::RegistryUnavailable);
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }

    #[test]
    fn the_cache_forgets_what_expires_and_stays_small() {
        let (cache, now) = (Cache::default(), Instant::now());
        let key = |n: usize| Key::new(format!("https://{n}"), "s".into(), None);
        let value = HeaderValue::from_static("Bearer a");
        cache.put(key(0), value.clone(), Duration::from_secs(60), now);
        assert!(cache.get(&key(0), now + Duration::from_secs(49)).is_some());
        assert!(cache.get(&key(0), now + Duration::from_secs(51)).is_none(), "a margin before the end");
        for n in 0..TOKENS_MAX + 10 {
            cache.put(key(n), value.clone(), Duration::from_secs(600 + n as u64), now);
        }
        assert_eq!(cache.0.lock().unwrap().len(), TOKENS_MAX);
        assert!(cache.get(&key(0), now).is_none(), "what expires first goes first");
        assert!(cache.get(&key(TOKENS_MAX), now).is_some());
        cache.forget(&key(TOKENS_MAX), &HeaderValue::from_static("Bearer older"));
        assert!(cache.get(&key(TOKENS_MAX), now).is_some(), "another request has renewed it");
        cache.forget(&key(TOKENS_MAX), &value);
        assert!(cache.get(&key(TOKENS_MAX), now).is_none());
    }

    #[test]
    fn a_token_is_for_one_credential() {
        let key = |credentials: Option<Credentials>| Key::new("o".into(), "s".into(), credentials.as_ref());
        let secret = |u: &str, p: &str| Some(Credentials::password(u, p));
        let all = [key(None), key(secret("ab", "c")), key(secret("a", "bc")), key(secret("a", "b"))];
        for (n, one) in all.iter().enumerate() {
            assert!(all[n + 1..].iter().all(|other| other != one));
        }
    }

    proptest! {
        #[test]
        fn any_header_is_read_without_panic(text in "[ -~]{0,200}") {
            let _ = parse_challenges(&text);
        }

        #[test]
        fn quoted_values_come_back(value in "[ -~]{1,40}") {
            let quoted = value.replace('\\', "\\\\").replace('"', "\\\"");
            let found = parse_challenges(&format!("Bearer service=\"x\", realm=\"{quoted}\", Basic"));
            prop_assert_eq!(found, vec![bearer_of(&value, Some("x"), None), Challenge::Basic]);
        }
    }
}
