//! Where a registry's images are really fetched: `<certs_dir>/<host>/hosts.toml`, as containerd reads it.
//!
//! ```toml
//! server = "https://registry-1.docker.io"      # last resort; default: the host itself
//! [host."https://mirror.example:5000"]         # tried first, in the order written
//! capabilities = ["pull", "resolve"]
//! ca = "mirror.crt"                            # or a list; relative to this file
//! client = [["client.crt", "client.key"]]      # or one file with both
//! skip_verify = false
//! override_path = false                        # true: the URL's path is used as it is, without /v2
//! header = { "x-token" = "…" }
//! dial_timeout = "3s"
//! ```
//!
//! The directory of `host:5000` is `host_5000_` or `host:5000`; if a host has none, `_default` counts. Keys at the top
//! of the file belong to `server`. The files are read for each operation: they are small, and an edit needs no restart.
//!
//! Never guessed: an unknown key, capability or URL is an error that names the file, so a typing error cannot quietly
//! send pulls elsewhere. Headers may be secrets: no error and no log shows a value from the file.

use std::fmt;
use std::io::{ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use reqwest::Url;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::reference::DEFAULT_HOST;
use crate::error::{Context, Error, Kind, Result};

/// Where the directories of registries are looked for.
pub const CERTS_DIR_DEFAULT: &str = "/etc/ocid/certs.d";

/// Where Docker Hub's registry really is.
const DOCKER_HUB: &str = "registry-1.docker.io";
/// The directory for every host without one of its own.
const DEFAULT_DIRECTORY: &str = "_default";
const FILE_BYTES_MAX: u64 = 1 << 20;
const HOSTS_MAX: usize = 32;

/// One place that serves a registry's images.
#[derive(Debug, Clone)]
pub(super) struct Host {
    /// Scheme, host, port, and the path up to and without the repository. No slash at the end.
    pub(super) base: Url,
    /// May turn a tag into a digest.
    pub(super) can_resolve: bool,
    /// May serve what has a digest.
    pub(super) can_pull: bool,
    pub(super) tls: Tls,
    /// Sent with every request to this host, and to no other.
    pub(super) headers: HeaderMap,
    pub(super) dial_timeout: Option<Duration>,
    /// It stands for another host, which it must be told (`?ns=`) and whose credentials it must not get.
    pub(super) is_mirror: bool,
}

/// How to trust a host, with the contents of the files.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Tls {
    /// PEM bundles that count beside the system's.
    pub(super) ca: Vec<Vec<u8>>,
    /// PEM of certificate and key.
    pub(super) client: Option<Vec<u8>>,
    pub(super) skip_verify: bool,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls")
            .field("ca", &self.ca.len())
            .field("client", &self.client.is_some())
            .field("skip_verify", &self.skip_verify)
            .finish()
    }
}

impl Host {
    /// Scheme, host and port: what a credential or a connection belongs to.
    pub(super) fn origin(&self) -> String {
        origin(&self.base)
    }
}

/// Scheme, host and port of a URL, and nothing of it that may be a secret.
pub(super) fn origin(url: &Url) -> String {
    url.origin().ascii_serialization()
}

/// The places to ask for the images of `host`, first choice first. Reads files: call it where blocking is allowed.
///
/// # Errors
/// `FailedPrecondition` if the configuration is wrong, `InvalidArgument` if the host cannot be one.
pub(super) fn load(certs_dir: &Path, host: &str) -> Result<Vec<Host>> {
    for directory in directories(certs_dir, host) {
        let path = directory.join("hosts.toml");
        if let Some(text) = read_if_exists(&path)? {
            let text = String::from_utf8(text).map_err(|_| wrong(&path, "is not UTF-8 text"))?;
            return parse(&path, &text, host);
        }
    }
    Ok(vec![unconfigured(host)?])
}

fn directories(certs_dir: &Path, host: &str) -> Vec<PathBuf> {
    let mut names = Vec::new();
    if let Some((name, port)) = host.rsplit_once(':').filter(|(_, port)| !port.contains(']')) {
        names.push(format!("{name}_{port}_"));
    }
    names.extend([host.to_owned(), DEFAULT_DIRECTORY.to_owned()]);
    names.into_iter().map(|name| certs_dir.join(name)).collect()
}

/// A host that nobody configured: https, but http for this machine itself.
fn unconfigured(host: &str) -> Result<Host> {
    let real = if host == DEFAULT_HOST { DOCKER_HUB } else { host };
    let parse = |scheme: &str| {
        Url::parse(&format!("{scheme}://{real}/v2"))
            .context(Kind::InvalidArgument, || format!("registry host {host:?} is not one"))
    };
    let secure = parse("https")?;
    let base = if is_loopback(&secure) { parse("http")? } else { secure };
    Ok(Host {
        base,
        can_resolve: true,
        can_pull: true,
        tls: Tls::default(),
        headers: HeaderMap::new(),
        dial_timeout: None,
        is_mirror: false,
    })
}

/// Whether a URL names this machine itself.
pub(super) fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    host == "localhost"
        || host.parse::<Ipv4Addr>().is_ok_and(|address| IpAddr::V4(address).is_loopback())
        || host
            .trim_matches(['[', ']'])
            .parse::<Ipv6Addr>()
            .is_ok_and(|address| IpAddr::V6(address).is_loopback())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    server: Option<String>,
    #[serde(default)]
    host: Sections,
    // The rest is what a section has, for `server`; `flatten` and `deny_unknown_fields` do not go together.
    capabilities: Option<toml::Value>,
    ca: Option<toml::Value>,
    client: Option<toml::Value>,
    skip_verify: Option<toml::Value>,
    override_path: Option<toml::Value>,
    header: Option<toml::Value>,
    dial_timeout: Option<toml::Value>,
}

// Values are checked by hand: serde's messages show the wrong value, and that may be a secret in the wrong place.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Section {
    capabilities: Option<toml::Value>,
    ca: Option<toml::Value>,
    client: Option<toml::Value>,
    skip_verify: Option<toml::Value>,
    override_path: Option<toml::Value>,
    header: Option<toml::Value>,
    dial_timeout: Option<toml::Value>,
}

/// The `[host."…"]` sections in the order they are written, which is the order they are tried.
#[derive(Default)]
struct Sections(Vec<(String, Section)>);

impl<'de> Deserialize<'de> for Sections {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Sections, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Sections;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("sections named by URLs")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Sections, A::Error> {
                let mut sections = Vec::new();
                while let Some(section) = map.next_entry()? {
                    sections.push(section);
                }
                Ok(Sections(sections))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

fn parse(path: &Path, text: &str, host: &str) -> Result<Vec<Host>> {
    let file: File = toml::from_str(text).map_err(|error| {
        // Not the error's own text: it quotes the line, and the line may hold a secret.
        let line = error
            .span()
            .map_or(0, |span| text.as_bytes()[..span.start.min(text.len())].split(|b| *b == b'\n').count());
        wrong(path, format!("line {line}: {}", error.message()))
    })?;
    if file.host.0.len() > HOSTS_MAX {
        return Err(wrong(path, format!("has more than {HOSTS_MAX} hosts")));
    }
    let mut hosts = Vec::with_capacity(file.host.0.len() + 1);
    for (url, section) in file.host.0 {
        hosts.push(section.into_host(path, &url, host)?);
    }
    let server = Section {
        capabilities: file.capabilities,
        ca: file.ca,
        client: file.client,
        skip_verify: file.skip_verify,
        override_path: file.override_path,
        header: file.header,
        dial_timeout: file.dial_timeout,
    };
    let url = match file.server {
        Some(url) => url,
        None => origin(&unconfigured(host)?.base),
    };
    hosts.push(server.into_host(path, &url, host)?);
    Ok(hosts)
}

impl Section {
    fn into_host(self, path: &Path, url: &str, host: &str) -> Result<Host> {
        let at = |key: &str, why: &str| wrong(path, format!("host {}: `{key}` {why}", url_shown(url)));
        let flag = |key: &str, value: Option<toml::Value>| match value {
            None => Ok(false),
            Some(value) => value.as_bool().ok_or_else(|| at(key, "is neither true nor false")),
        };
        let override_path = flag("override_path", self.override_path)?;
        let base =
            base(url, override_path).map_err(|why| wrong(path, format!("host {}: {why}", url_shown(url))))?;
        let (mut can_resolve, mut can_pull) = (true, true);
        if let Some(value) = self.capabilities {
            let capabilities = strings(value).ok_or_else(|| at("capabilities", "is not a list of names"))?;
            for capability in &capabilities {
                if !matches!(capability.as_str(), "pull" | "resolve" | "push" | "referrers") {
                    return Err(at(
                        "capabilities",
                        "has something other than pull, resolve, push and referrers",
                    ));
                }
            }
            can_pull = capabilities.iter().any(|name| name == "pull");
            can_resolve = capabilities.iter().any(|name| name == "resolve");
        }
        let mut tls = Tls { skip_verify: flag("skip_verify", self.skip_verify)?, ..Tls::default() };
        if let Some(value) = self.ca {
            let files = strings(value).ok_or_else(|| at("ca", "is neither a file nor a list of files"))?;
            tls.ca = files.iter().map(|file| read_beside(path, file)).collect::<Result<_>>()?;
        }
        if let Some(value) = self.client {
            let files = client_files(value).ok_or_else(|| {
                at("client", "is not one file with certificate and key, or one pair of files")
            })?;
            let mut pem = Vec::new();
            for file in files {
                pem.extend(read_beside(path, &file)?);
                pem.push(b'\n');
            }
            tls.client = Some(pem);
        }
        let mut headers = HeaderMap::new();
        if let Some(value) = self.header {
            let toml::Value::Table(table) = value else {
                return Err(at("header", "is not a table"));
            };
            for (name, value) in table {
                let name =
                    name.parse::<HeaderName>().map_err(|_| at("header", "has a name that cannot be one"))?;
                let values = strings(value).ok_or_else(|| at("header", "has a value that is not text"))?;
                for value in values {
                    let mut value = HeaderValue::try_from(value)
                        .map_err(|_| at("header", "has a value with characters that a header cannot have"))?;
                    value.set_sensitive(true);
                    headers.append(name.clone(), value);
                }
            }
        }
        let dial_timeout = match self.dial_timeout {
            None => None,
            Some(value) => Some(
                value
                    .as_str()
                    .and_then(duration)
                    .ok_or_else(|| at("dial_timeout", "is not a time such as \"3s\""))?,
            ),
        };
        let is_mirror = !is_same_place(&base, host);
        Ok(Host { base, can_resolve, can_pull, tls, headers, dial_timeout, is_mirror })
    }
}

/// A URL as it stands in the file, or a host without a scheme; `/v2` is added unless the path is to be left alone.
fn base(url: &str, override_path: bool) -> std::result::Result<Url, &'static str> {
    let with_scheme = if url.contains("://") { url.to_owned() } else { format!("https://{url}") };
    let mut base = Url::parse(&with_scheme).map_err(|_| "is not a URL")?;
    if !url.contains("://") && is_loopback(&base) {
        base.set_scheme("http").map_err(|()| "is not a URL")?;
    }
    if !matches!(base.scheme(), "http" | "https") || base.host_str().is_none_or(str::is_empty) {
        return Err("is not an http or https URL");
    }
    if !base.username().is_empty() || base.password().is_some() {
        return Err("has a user or a password; use `header`");
    }
    if base.query().is_some() || base.fragment().is_some() {
        return Err("has more than a path");
    }
    let path = base.path().trim_end_matches('/').to_owned();
    let path = if override_path || path.ends_with("/v2") { path } else { format!("{path}/v2") };
    base.set_path(&path);
    Ok(base)
}

/// Whether a place is the registry that the reference names, and not one that stands for it.
fn is_same_place(base: &Url, host: &str) -> bool {
    let port = base.port().map(|port| format!(":{port}")).unwrap_or_default();
    let place = format!("{}{port}", base.host_str().unwrap_or_default());
    if host == DEFAULT_HOST {
        return place == DOCKER_HUB || place == DEFAULT_HOST;
    }
    let host = host.to_ascii_lowercase();
    // `host:443` and `host` are one place for https, and likewise for http.
    let default_port = if base.scheme() == "https" { ":443" } else { ":80" };
    place == host || format!("{place}{default_port}") == host
}

fn strings(value: toml::Value) -> Option<Vec<String>> {
    match value {
        toml::Value::String(one) => Some(vec![one]),
        toml::Value::Array(many) => many
            .into_iter()
            .map(|value| match value {
                toml::Value::String(text) => Some(text),
                _ => None,
            })
            .collect(),
        _ => None,
    }
}

/// `"both.pem"`, `["both.pem"]`, `["cert", "key"]` or `[["cert", "key"]]`; only one identity is used.
fn client_files(value: toml::Value) -> Option<Vec<String>> {
    let files = match value {
        toml::Value::Array(mut pairs) if pairs.len() == 1 && pairs[0].is_array() => strings(pairs.remove(0))?,
        other => strings(other)?,
    };
    (1..=2).contains(&files.len()).then_some(files)
}

/// A Go duration of one unit, or of several from large to small: `3s`, `500ms`, `1m30s`.
fn duration(text: &str) -> Option<Duration> {
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u32 = rest[..digits].parse().ok()?;
        let unit_end =
            rest[digits..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |end| digits + end);
        let unit = match &rest[digits..unit_end] {
            "ms" => Duration::from_millis(1),
            "s" => Duration::from_secs(1),
            "m" => Duration::from_secs(60),
            "h" => Duration::from_secs(3600),
            _ => return None,
        };
        total = total.checked_add(unit.checked_mul(number)?)?;
        rest = &rest[unit_end..];
    }
    (total > Duration::ZERO).then_some(total)
}

fn read_beside(path: &Path, file: &str) -> Result<Vec<u8>> {
    let file = path.parent().unwrap_or(Path::new("/")).join(file);
    read_if_exists(&file)?
        .ok_or_else(|| wrong(path, format!("names {}, which does not exist", file.display())))
}

fn read_if_exists(path: &Path) -> Result<Option<Vec<u8>>> {
    let opened = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => {
            return Err(error).context(Kind::FailedPrecondition, || format!("open {}", path.display()));
        }
    };
    let mut bytes = Vec::new();
    opened
        .take(FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .context(Kind::FailedPrecondition, || format!("read {}", path.display()))?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(wrong(path, "is larger than 1 MiB"));
    }
    Ok(Some(bytes))
}

/// A URL from the file as an error may show it: without what stands before an `@`.
fn url_shown(url: &str) -> String {
    let url = url.rsplit('@').next().unwrap_or_default();
    format!("{:?}", url.split('?').next().unwrap_or_default())
}

fn wrong(path: &Path, why: impl fmt::Display) -> Error {
    Error::precondition(format!("registry configuration {}: {why}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, host: &str) -> Result<Vec<Host>> {
        parse(Path::new("/certs.d/x/hosts.toml"), text, host)
    }

    fn bases(hosts: &[Host]) -> Vec<String> {
        hosts.iter().map(|host| host.base.to_string()).collect()
    }

    #[test]
    fn without_a_file_it_is_https_but_http_for_this_machine() {
        let cases = [
            ("docker.io", "https://registry-1.docker.io/v2"),
            ("quay.io", "https://quay.io/v2"),
            ("quay.io:8443", "https://quay.io:8443/v2"),
            ("10.0.0.1:5000", "https://10.0.0.1:5000/v2"),
            ("localhost", "http://localhost/v2"),
            ("localhost:5000", "http://localhost:5000/v2"),
            ("127.9.9.9:5000", "http://127.9.9.9:5000/v2"),
            ("[::1]:5000", "http://[::1]:5000/v2"),
            ("[2001:db8::1]:5000", "https://[2001:db8::1]:5000/v2"),
            ("localhost.evil.io", "https://localhost.evil.io/v2"),
        ];
        for (host, base) in cases {
            let hosts = load(Path::new("/nonexistent"), host).unwrap();
            assert_eq!(bases(&hosts), [base]);
            assert!(!hosts[0].is_mirror && hosts[0].can_pull && hosts[0].can_resolve);
        }
    }

    #[test]
    fn hosts_are_tried_in_the_order_written_and_the_server_last() {
        let text = r#"
            server = "https://registry-1.docker.io"
            [host."https://z.io"]
            [host."http://a.io:5000/path/"]
            capabilities = ["pull"]
            [host."https://m.io/v2"]
            [host."https://k.io/exact"]
            override_path = true
            [host."plain.io"]
            [host."localhost:5000"]
        "#;
        let hosts = read(text, "docker.io").unwrap();
        assert_eq!(
            bases(&hosts),
            [
                "https://z.io/v2",
                "http://a.io:5000/path/v2",
                "https://m.io/v2",
                "https://k.io/exact",
                "https://plain.io/v2",
                "http://localhost:5000/v2",
                "https://registry-1.docker.io/v2"
            ]
        );
        assert_eq!((hosts[1].can_pull, hosts[1].can_resolve), (true, false));
        let mirrors: Vec<bool> = hosts.iter().map(|host| host.is_mirror).collect();
        assert_eq!(mirrors, [true, true, true, true, true, true, false]);
    }

    #[test]
    fn a_server_elsewhere_is_a_mirror_and_the_same_place_is_not() {
        let is_mirror =
            |server: &str, host| read(&format!("server = \"{server}\""), host).unwrap()[0].is_mirror;
        assert!(is_mirror("https://other.io", "reg.io"));
        assert!(is_mirror("https://reg.io:5001", "reg.io:5000"));
        assert!(!is_mirror("https://reg.io:5000", "reg.io:5000"));
        assert!(!is_mirror("https://reg.io", "reg.io:443"));
        assert!(!is_mirror("https://reg.io", "REG.io"));
        assert!(is_mirror("https://evil.io", "docker.io"));
        assert!(!is_mirror("https://docker.io", "docker.io"));
    }

    #[test]
    fn the_keys_of_a_host_are_understood() {
        let text = r#"
            capabilities = ["resolve"]
            skip_verify = true
            dial_timeout = "1m30s"
            [header]
            x-one = "1"
            x-two = ["2", "3"]
        "#;
        let hosts = read(text, "reg.io").unwrap();
        let server = &hosts[0];
        assert_eq!((server.can_pull, server.can_resolve), (false, true));
        assert!(server.tls.skip_verify);
        assert_eq!(server.dial_timeout, Some(Duration::from_secs(90)));
        assert_eq!(server.headers.get_all("x-two").iter().count(), 2);
        assert!(!format!("{server:?}").contains("\"2\""), "header values may be secrets");
    }

    #[test]
    fn mistakes_name_the_file_and_the_key_and_no_value() {
        let cases = [
            ("surver = \"https://x\"", "surver"),
            ("[host.\"https://x.io\"]\ncapabilites = []", "capabilites"),
            ("[host.\"https://x.io\"]\ncapabilities = [\"pul\"]", "capabilities"),
            ("[host.\"ftp://x.io\"]", "ftp://x.io"),
            ("[host.\"https://u:secret@x.io\"]", "user"),
            ("[host.\"https://x.io?secret\"]", "more than a path"),
            ("skip_verify = \"secret\"", "skip_verify"),
            ("header = \"secret\"", "header"),
            ("header = { Authorization = 7 }", "header"),
            ("header = { \"a b\" = \"secret\" }", "header"),
            ("header = { a = \"secret\\n\" }", "header"),
            ("header = { a = \"secret }", "line 1"),
            ("dial_timeout = \"3\"", "dial_timeout"),
            ("dial_timeout = \"0s\"", "dial_timeout"),
            ("ca = 5", "ca"),
            ("ca = \"absent.crt\"", "/certs.d/x/absent.crt"),
            ("client = [[\"a\", \"b\", \"c\"]]", "client"),
        ];
        for (text, part) in cases {
            let error = read(text, "reg.io").expect_err(text);
            assert_eq!(error.kind(), Kind::FailedPrecondition);
            let message = error.to_string();
            assert!(message.contains(part) && message.contains("/certs.d/x/hosts.toml"), "{text}: {message}");
            assert!(!message.contains("secret"), "{message}");
        }
    }

    #[test]
    fn files_are_found_by_host_and_port_then_default() {
        let dir = tempfile::tempdir().unwrap();
        let write = |folder: &str, server: &str| {
            std::fs::create_dir_all(dir.path().join(folder)).unwrap();
            std::fs::write(dir.path().join(folder).join("hosts.toml"), format!("server = \"{server}\""))
                .unwrap();
        };
        let first = |host: &str| bases(&load(dir.path(), host).unwrap()).remove(0);
        std::fs::create_dir_all(dir.path().join("reg.io:5000")).unwrap();
        assert_eq!(first("reg.io:5000"), "https://reg.io:5000/v2");
        write("_default", "https://default.io");
        assert_eq!(first("reg.io:5000"), "https://default.io/v2");
        write("reg.io:5000", "https://colon.io");
        assert_eq!(first("reg.io:5000"), "https://colon.io/v2");
        write("reg.io_5000_", "https://underscore.io");
        assert_eq!(first("reg.io:5000"), "https://underscore.io/v2");
        assert_eq!(first("reg.io"), "https://default.io/v2");
        write("[::1]", "https://six.io");
        assert_eq!(first("[::1]"), "https://six.io/v2");
    }

    #[test]
    fn certificates_lie_beside_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("reg.io");
        std::fs::create_dir_all(&folder).unwrap();
        for name in ["ca.crt", "c.crt", "c.key"] {
            std::fs::write(folder.join(name), name).unwrap();
        }
        for client in ["[[\"c.crt\", \"c.key\"]]", "[\"c.crt\", \"c.key\"]"] {
            std::fs::write(folder.join("hosts.toml"), format!("ca = [\"ca.crt\"]\nclient = {client}"))
                .unwrap();
            let hosts = load(dir.path(), "reg.io").unwrap();
            assert_eq!(hosts[0].tls.ca, [b"ca.crt"]);
            assert_eq!(hosts[0].tls.client.as_deref(), Some(b"c.crt\nc.key\n".as_slice()));
            assert!(!format!("{:?}", hosts[0]).contains("99, 46"), "no key material in debug output");
        }
        std::fs::write(folder.join("hosts.toml"), vec![b'#'; 2 << 20]).unwrap();
        assert!(load(dir.path(), "reg.io").is_err(), "too large");
    }

    #[test]
    fn durations_are_those_of_go() {
        assert_eq!(duration("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(duration("1h2m3s"), Some(Duration::from_secs(3723)));
        for text in ["", "3", "s", "-3s", "3 s", "3d", "99999999999s", "ä"] {
            assert_eq!(duration(text), None, "{text}");
        }
    }
}
