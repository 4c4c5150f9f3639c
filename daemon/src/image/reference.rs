//! Image references and digests: the two names an image has.
//!
//! Text is parsed once, here, by the grammar Docker and containerd use; short names get the host and the prefix they
//! stand for (`busybox` is `docker.io/library/busybox:latest`). Inside, a [`Reference`] is safe to put in a URL and a
//! [`Digest`] is safe to name a file.
//!
//! This module never asks a registry and never guesses: a name has exactly one meaning.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::Digest as _;

use crate::error::{Error, Kind, Result};

/// The host that a name without one means.
pub const DEFAULT_HOST: &str = "docker.io";
/// What Docker's registry was called before; the same place.
const LEGACY_DEFAULT_HOST: &str = "index.docker.io";
/// The folder of names without one, on the default host only.
const OFFICIAL_PREFIX: &str = "library/";
/// The tag of a reference that has neither tag nor digest.
const DEFAULT_TAG: &str = "latest";

const HOST_LEN_MAX: usize = 255;
const REPOSITORY_LEN_MAX: usize = 255;
const TAG_LEN_MAX: usize = 128;
/// More than the longest legal reference; longer text is not even looked at.
const REFERENCE_LEN_MAX: usize = 1024;

/// How a digest was computed. The two that registries use and that are safe; every other one is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Algorithm {
    /// What everybody uses.
    Sha256,
    /// Allowed by the image specification.
    Sha512,
}

impl Algorithm {
    /// The name before the colon.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Algorithm::Sha256 => "sha256",
            Algorithm::Sha512 => "sha512",
        }
    }

    fn hex_len(self) -> usize {
        match self {
            Algorithm::Sha256 => 64,
            Algorithm::Sha512 => 128,
        }
    }
}

/// The name of some bytes: `sha256:` or `sha512:` and lower-case hexadecimal, nothing else. Cannot be malformed.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest {
    algorithm: Algorithm,
    text: Box<str>,
}

impl Digest {
    /// Parses `algorithm:hex`.
    ///
    /// # Errors
    /// `InvalidArgument`, naming what is wrong with it.
    pub fn parse(text: &str) -> Result<Digest> {
        let bad = |why: String| Error::invalid(format!("digest {:?} {why}", shown(text)));
        let (algorithm, hex) = text.split_once(':').ok_or_else(|| bad("has no colon".into()))?;
        let algorithm = match algorithm {
            "sha256" => Algorithm::Sha256,
            "sha512" => Algorithm::Sha512,
            _ => return Err(bad("is neither sha256 nor sha512".into())),
        };
        if hex.len() != algorithm.hex_len() {
            return Err(bad(format!(
                "has {} characters after the colon, not {}",
                hex.len(),
                algorithm.hex_len()
            )));
        }
        if !hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(bad("is not lower-case hexadecimal".into()));
        }
        Ok(Digest { algorithm, text: text.into() })
    }

    /// The sha256 digest of these bytes.
    #[must_use]
    pub fn sha256(bytes: &[u8]) -> Digest {
        Digest::of(Algorithm::Sha256, bytes)
    }

    /// The digest of these bytes.
    #[must_use]
    pub fn of(algorithm: Algorithm, bytes: &[u8]) -> Digest {
        let mut hasher = Hasher::new(algorithm);
        hasher.update(bytes);
        hasher.finish()
    }

    /// Whether these bytes have this digest.
    #[must_use]
    pub fn matches(&self, bytes: &[u8]) -> bool {
        Digest::of(self.algorithm, bytes) == *self
    }

    /// How it was computed.
    #[must_use]
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// What stands after the colon: safe as a file name.
    #[must_use]
    pub fn hex(&self) -> &str {
        &self.text[self.algorithm.as_str().len() + 1..]
    }

    /// The whole text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for Digest {
    type Err = Error;
    fn from_str(text: &str) -> Result<Digest> {
        Digest::parse(text)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Digest, D::Error> {
        Digest::parse(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// Computes a digest from bytes that arrive in pieces.
#[derive(Clone)]
pub struct Hasher(State);

#[derive(Clone)]
enum State {
    Sha256(sha2::Sha256),
    Sha512(Box<sha2::Sha512>),
}

impl Hasher {
    /// A hasher that has seen nothing.
    #[must_use]
    pub fn new(algorithm: Algorithm) -> Hasher {
        Hasher(match algorithm {
            Algorithm::Sha256 => State::Sha256(sha2::Sha256::new()),
            Algorithm::Sha512 => State::Sha512(Box::new(sha2::Sha512::new())),
        })
    }

    /// Takes the next bytes in.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            State::Sha256(hash) => hash.update(bytes),
            State::Sha512(hash) => hash.update(bytes),
        }
    }

    /// The digest of everything taken in.
    #[must_use]
    pub fn finish(self) -> Digest {
        let (algorithm, hex) = match self.0 {
            State::Sha256(hash) => (Algorithm::Sha256, hex::encode(hash.finalize())),
            State::Sha512(hash) => (Algorithm::Sha512, hex::encode(hash.finalize())),
        };
        Digest { algorithm, text: format!("{}:{hex}", algorithm.as_str()).into() }
    }
}

/// The full name of an image: host, repository, and a tag, a digest or both.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    host: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Parses a reference as a user writes it and completes what it leaves out.
    ///
    /// # Errors
    /// `InvalidArgument`, naming the part that is wrong.
    pub fn parse(text: &str) -> Result<Reference> {
        parse(text).map_err(|why| {
            Error::new(Kind::InvalidArgument, format!("image reference {:?}: {why}", shown(text)))
        })
    }

    /// The registry that the name says: `docker.io`, `localhost:5000`, `[::1]:5000`.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The path within the registry: `library/busybox`.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag; absent only if there is a digest.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, which decides if there is also a tag.
    #[must_use]
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Host and repository: `docker.io/library/busybox`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}/{}", self.host, self.repository)
    }

    /// What the CRI calls a repo tag, if there is a tag: `docker.io/library/busybox:latest`.
    #[must_use]
    pub fn repo_tag(&self) -> Option<String> {
        self.tag.as_ref().map(|tag| format!("{}/{}:{tag}", self.host, self.repository))
    }

    /// What the CRI calls a repo digest: `docker.io/library/busybox@sha256:…`.
    #[must_use]
    pub fn repo_digest(&self, digest: &Digest) -> String {
        format!("{}/{}@{digest}", self.host, self.repository)
    }

    /// The same repository at a digest, without the tag.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Reference {
        Reference {
            host: self.host.clone(),
            repository: self.repository.clone(),
            tag: None,
            digest: Some(digest),
        }
    }

    /// What is asked of the registry: the digest if there is one, else the tag.
    pub(crate) fn target(&self) -> &str {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.as_str(),
            (None, Some(tag)) => tag,
            (None, None) => DEFAULT_TAG,
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Reference {
    type Err = Error;
    fn from_str(text: &str) -> Result<Reference> {
        Reference::parse(text)
    }
}

fn parse(text: &str) -> std::result::Result<Reference, String> {
    if text.is_empty() {
        return Err("it is empty".into());
    }
    if text.len() > REFERENCE_LEN_MAX {
        return Err(format!("it is longer than {REFERENCE_LEN_MAX} bytes"));
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(Digest::parse(digest).map_err(|error| error.to_string())?)),
        None => (text, None),
    };
    // A colon before the last slash belongs to a port.
    let (name, tag) = match rest.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (rest, None),
    };
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    let (host, repository) = split_host(name);
    check_host(&host)?;
    check_repository(&repository)?;
    if tag.is_none() && digest.is_none() && is_image_id(name) {
        // A bare 64-digit name can be told from an image id by nobody.
        return Err("64 hexadecimal digits are an image id, not a name".into());
    }
    let tag = match (tag, &digest) {
        (Some(tag), _) => Some(tag.to_owned()),
        (None, Some(_)) => None,
        (None, None) => Some(DEFAULT_TAG.to_owned()),
    };
    Ok(Reference { host, repository, tag, digest })
}

/// Whether the first component is a host is decided by its look alone: a dot, a colon, `localhost` or a capital.
fn split_host(name: &str) -> (String, String) {
    let (host, repository) = match name.split_once('/') {
        Some((first, rest))
            if first.contains(['.', ':'])
                || first == "localhost"
                || first.bytes().any(|byte| byte.is_ascii_uppercase()) =>
        {
            (first, rest)
        }
        _ => (DEFAULT_HOST, name),
    };
    let host = if host == LEGACY_DEFAULT_HOST { DEFAULT_HOST } else { host };
    if host == DEFAULT_HOST && !repository.is_empty() && !repository.contains('/') {
        return (host.to_owned(), format!("{OFFICIAL_PREFIX}{repository}"));
    }
    (host.to_owned(), repository.to_owned())
}

fn check_host(host: &str) -> std::result::Result<(), String> {
    let bad = |why: &str| Err(format!("the host {:?} {why}", shown(host)));
    if host.len() > HOST_LEN_MAX {
        return bad("is longer than 255 bytes");
    }
    let (name, port) = if let Some(rest) = host.strip_prefix('[') {
        let Some((address, after)) = rest.split_once(']') else {
            return bad("has no closing bracket");
        };
        if address.parse::<Ipv6Addr>().is_err() {
            return bad("is not an IPv6 address");
        }
        match (after, after.strip_prefix(':')) {
            ("", _) => return Ok(()),
            (_, Some(port)) => ("", Some(port)),
            (_, None) => return bad("has something other than a port after the bracket"),
        }
    } else {
        match host.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (host, None),
        }
    };
    if let Some(port) = port {
        let digits = port.bytes().all(|byte| byte.is_ascii_digit());
        if !digits || port.len() > 5 || !port.parse::<u16>().is_ok_and(|port| port > 0) {
            return bad("has a port that is not a number from 1 to 65535");
        }
    }
    if host.starts_with('[') {
        return Ok(());
    }
    let label_ok = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if !name.split('.').all(label_ok) {
        return bad("is not a domain name or an address");
    }
    Ok(())
}

fn check_repository(repository: &str) -> std::result::Result<(), String> {
    if repository.is_empty() {
        return Err("the repository is empty".into());
    }
    if repository.len() > REPOSITORY_LEN_MAX {
        return Err("the repository is longer than 255 bytes".into());
    }
    if repository.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Err("the repository must be lower case".into());
    }
    if repository.split('/').all(is_component) {
        return Ok(());
    }
    Err("a part of the repository is not lower-case letters and digits, joined by '.', '_', '__' or dashes"
        .into())
}

/// Letters and digits, joined by one dot, one or two underscores, or any number of dashes.
fn is_component(component: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = component.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    word(*first)
        && word(*last)
        && bytes
            .split(|byte| word(*byte))
            .all(|joint| matches!(joint, b"" | b"." | b"_" | b"__") || joint.iter().all(|byte| *byte == b'-'))
}

fn check_tag(tag: &str) -> std::result::Result<(), String> {
    if tag.is_empty() {
        return Err("the tag is empty".into());
    }
    if tag.len() > TAG_LEN_MAX {
        return Err("the tag is longer than 128 bytes".into());
    }
    let ok = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    if !tag.bytes().all(ok) || tag.starts_with(['.', '-']) {
        return Err(format!("the tag {:?} is not letters, digits, '_', '.' and '-'", shown(tag)));
    }
    Ok(())
}

fn is_image_id(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The beginning of a text that may be long: an error must not be as big as its cause.
fn shown(text: &str) -> String {
    const SHOWN_MAX: usize = 300;
    match text.char_indices().nth(SHOWN_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEX: &str = "6c3c624b58dbbcd3c0dd82b4c53f04194d1247c6eebdaab7c610cf7d66709b3b";

    #[test]
    fn names_are_completed_as_docker_does() {
        let cases = [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("library/busybox", "docker.io/library/busybox:latest"),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
            ("docker.io/busybox", "docker.io/library/busybox:latest"),
            ("user/app", "docker.io/user/app:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/app", "localhost:5000/app:latest"),
            ("localhost:5000", "docker.io/library/localhost:5000"),
            ("127.0.0.1:5000/a/b/c:v1", "127.0.0.1:5000/a/b/c:v1"),
            ("[::1]/app", "[::1]/app:latest"),
            ("[2001:db8::1]:5000/app:x", "[2001:db8::1]:5000/app:x"),
            ("registry.k8s.io/pause:3.10", "registry.k8s.io/pause:3.10"),
            ("MyHost/app", "MyHost/app:latest"),
            ("gcr.io/a__b/c-d--e/f.g_h", "gcr.io/a__b/c-d--e/f.g_h:latest"),
        ];
        for (given, full) in cases {
            assert_eq!(Reference::parse(given).map(|r| r.to_string()).unwrap(), full, "{given}");
        }
    }

    #[test]
    fn a_digest_replaces_the_default_tag_and_keeps_a_written_one() {
        let only = Reference::parse(&format!("busybox@sha256:{HEX}")).unwrap();
        assert_eq!((only.tag(), only.repo_tag()), (None, None));
        assert_eq!(only.target(), format!("sha256:{HEX}"));
        let both = Reference::parse(&format!("busybox:1@sha256:{HEX}")).unwrap();
        assert_eq!(both.repo_tag().unwrap(), "docker.io/library/busybox:1");
        assert_eq!(both.to_string(), format!("docker.io/library/busybox:1@sha256:{HEX}"));
        assert_eq!(both.target(), format!("sha256:{HEX}"));
        let digest = both.digest().unwrap().clone();
        assert_eq!(both.repo_digest(&digest), format!("docker.io/library/busybox@sha256:{HEX}"));
        assert_eq!(both.with_digest(digest), only);
    }

    #[test]
    fn a_bad_reference_is_refused_and_the_message_names_the_problem() {
        let long = "a".repeat(256);
        let cases: &[(&str, &str)] = &[
            ("", "empty"),
            ("Busybox", "lower case"),
            ("docker.io/Busybox", "lower case"),
            ("host.io/", "repository is empty"),
            ("/busybox", "part of the repository"),
            ("busybox:", "tag is empty"),
            (":tag", "repository is empty"),
            ("busybox:-x", "tag"),
            ("busybox:a b", "tag"),
            ("a..b", "part of the repository"),
            ("a___b", "part of the repository"),
            ("a//b", "part of the repository"),
            ("../etc", "the host"),
            ("a/../b", "part of the repository"),
            ("host.io/../../x", "part of the repository"),
            ("host.io/a/%2e%2e/b", "part of the repository"),
            ("host.io/a?b", "part of the repository"),
            ("-bad.io/x", "host"),
            ("a_b.io/x", "host"),
            ("host:port/x", "port"),
            ("host:0/x", "port"),
            ("host:65536/x", "port"),
            ("host:+80/x", "port"),
            ("[::1/x", "bracket"),
            ("[z:z]/x", "IPv6"),
            ("[::1]x/y", "bracket"),
            ("user@host.io/x", "digest"),
            ("busybox@sha1:da39a3ee5e6b4b0d3255bfef95601890afd80709", "neither sha256 nor sha512"),
            ("busybox@sha256:abc", "3 characters"),
            ("busybox@sha256:../../../../x", "characters"),
            (HEX, "image id"),
            (&long, "longer than 255"),
        ];
        for (given, part) in cases {
            let error = Reference::parse(given).expect_err(given);
            assert_eq!(error.kind(), Kind::InvalidArgument);
            assert!(error.to_string().contains(part), "{given}: {error}");
        }
        assert!(
            Reference::parse(&format!("sha256:{HEX}")).is_ok(),
            "a repository called sha256 with a long tag"
        );
    }

    #[test]
    fn an_error_is_not_as_big_as_its_cause() {
        let error = Reference::parse(&"é".repeat(1 << 20)).unwrap_err();
        assert!(error.to_string().len() < 1000);
    }

    #[test]
    fn lengths_are_limited_at_the_limit_and_not_before() {
        assert!(Reference::parse(&format!("h.io/{}", "a".repeat(255))).is_ok());
        assert!(Reference::parse(&format!("h.io/{}", "a".repeat(256))).is_err());
        assert!(Reference::parse(&format!("a:{}", "t".repeat(128))).is_ok());
        assert!(Reference::parse(&format!("a:{}", "t".repeat(129))).is_err());
    }

    #[test]
    fn digests_are_strict() {
        for text in [
            HEX.to_owned(),
            format!("sha256:{}", HEX.to_uppercase()),
            format!("sha256:{}", &HEX[1..]),
            format!("sha512:{HEX}"),
            format!("sha256:{HEX}0"),
            format!("sha256 :{HEX}"),
            format!("sha384:{HEX}{}", &HEX[..32]),
        ] {
            assert!(Digest::parse(&text).is_err(), "{text}");
        }
        let digest = Digest::parse(&format!("sha512:{HEX}{HEX}")).unwrap();
        assert_eq!(digest.hex().len(), 128);
        assert_eq!(
            Digest::sha256(b"").as_str(),
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
        assert!(Digest::of(Algorithm::Sha512, b"x").matches(b"x"));
        assert!(!Digest::sha256(b"x").matches(b"y"));
    }

    proptest! {
        #[test]
        fn anything_is_parsed_or_refused_without_panic(text in ".{0,80}") {
            let _ = Reference::parse(&text);
            let _ = Digest::parse(&text);
        }

        #[test]
        fn the_full_form_parses_to_itself(
            host in "([a-z]{1,5}\\.io|localhost|\\[::1\\]|10\\.0\\.0\\.1)(:[1-9][0-9]{0,3})?",
            repository in "[a-z0-9]{1,5}((\\.|_|__|-{1,3}|/)[a-z0-9]{1,4}){0,4}",
            tag in proptest::option::of("[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}"),
            digest in proptest::option::of("sha256:[0-9a-f]{64}"),
        ) {
            let mut text = format!("{host}/{repository}");
            if let Some(tag) = &tag { text.push_str(&format!(":{tag}")); }
            if let Some(digest) = &digest { text.push_str(&format!("@{digest}")); }
            let parsed = Reference::parse(&text).unwrap();
            prop_assert_eq!(parsed.host(), &host);
            prop_assert_eq!(parsed.repository(), &repository);
            prop_assert_eq!(&Reference::parse(&parsed.to_string()).unwrap(), &parsed);
        }

        #[test]
        fn an_accepted_reference_is_safe_in_a_url_and_a_path(text in "[a-zA-Z0-9./:@_\\[\\]%?# -]{1,40}") {
            if let Ok(reference) = Reference::parse(&text) {
                let path = reference.repository();
                prop_assert!(!path.contains(['%', '?', '#', ' ', '@', ':', '\\']));
                prop_assert!(path.split('/').all(|part| !part.is_empty() && part != "." && part != ".."));
            }
        }
    }
}
