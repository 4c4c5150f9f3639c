//! Neighbours that misbehave on request: a registry and a CNI plugin.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crate::http::{Message, respond};
use crate::image::{Built, media_type_of};
use crate::network::PLUGINS;

/// What a [`FaultyRegistry`] does wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Every request is answered with this status.
    Status(u16),
    /// Blobs end in the middle.
    Truncate,
    /// Blobs have the right length and the wrong content.
    WrongBlob,
    /// What a tag leads to is not what its digest says.
    WrongManifest,
    /// Requests are read and never answered.
    Hang,
    /// The first so many requests are answered with 503.
    Unavailable(usize),
    /// Asks for these credentials by the basic scheme.
    Basic(String, String),
    /// Asks for a token, which it gives for these credentials.
    Token(String, String),
}

#[derive(Debug)]
struct State {
    fault: Fault,
    /// Tag to top digest, for every repository.
    tags: BTreeMap<String, String>,
    blobs: BTreeMap<String, Vec<u8>>,
    requests: Vec<String>,
}

/// A registry in this process that serves images with a fault.
#[derive(Debug, Clone)]
pub struct FaultyRegistry {
    /// Where it listens.
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
}

/// The token that [`Fault::Token`] gives.
const TOKEN: &str = "aa.bb.cc";

impl FaultyRegistry {
    /// Starts one. Its threads end with the process.
    pub fn start(fault: Fault) -> FaultyRegistry {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port on the loopback");
        let address = listener.local_addr().unwrap();
        let state = State { fault, tags: BTreeMap::new(), blobs: BTreeMap::new(), requests: Vec::new() };
        let registry = FaultyRegistry { address, state: Arc::new(Mutex::new(state)) };
        let serving = registry.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let serving = serving.clone();
                thread::spawn(move || serving.answer(stream));
            }
        });
        registry
    }

    /// Serves an image under a tag, in every repository.
    pub fn add(&self, image: &Built, tag: &str) {
        let mut state = self.state.lock().unwrap();
        state.tags.insert(tag.to_owned(), image.digest.clone());
        state.blobs.extend(image.blobs.clone());
    }

    /// Misbehaves differently from now on.
    pub fn set(&self, fault: Fault) {
        self.state.lock().unwrap().fault = fault;
    }

    /// The first lines of all requests so far.
    pub fn requests(&self) -> Vec<String> {
        self.state.lock().unwrap().requests.clone()
    }

    fn answer(&self, stream: TcpStream) -> io::Result<()> {
        let request = Message::read(&stream)?;
        let mut state = self.state.lock().unwrap();
        state.requests.push(request.start.clone());
        let fault = state.fault.clone();
        let target = request.start.split(' ').nth(1).unwrap_or("/");
        // Some clients say in the query which registry they mean.
        let path = target.split('?').next().unwrap_or(target).to_owned();
        let refuse = |status: u16, headers: &[(&str, String)]| respond(&stream, status, headers, 0, b"");
        match &fault {
            Fault::Status(status) => return refuse(*status, &[]),
            Fault::Unavailable(left) => {
                state.fault = left.checked_sub(2).map_or(Fault::None, |n| Fault::Unavailable(n + 1));
                return refuse(503, &[("retry-after", "0".to_owned())]);
            }
            Fault::Hang => {
                drop(state);
                // Long enough for any deadline of a test; the process may end before.
                thread::sleep(Duration::from_secs(600));
                return Ok(());
            }
            Fault::Token(user, password) if path.starts_with("/token") => {
                let known = request.header("authorization") == Some(basic(user, password).as_str());
                let body = format!(r#"{{"token":"{TOKEN}","expires_in":300}}"#);
                return match known {
                    true => respond(&stream, 200, &[], body.len(), body.as_bytes()),
                    false => refuse(401, &[]),
                };
            }
            Fault::Token(..) if request.header("authorization") != Some(&format!("Bearer {TOKEN}")) => {
                let realm = format!("Bearer realm=\"http://{}/token\",service=\"test\"", self.address);
                return refuse(401, &[("www-authenticate", realm)]);
            }
            Fault::Basic(user, password)
                if request.header("authorization") != Some(basic(user, password).as_str()) =>
            {
                return refuse(401, &[("www-authenticate", "Basic realm=\"test\"".to_owned())]);
            }
            _ => {}
        }
        let (reference, blob) = match path.rsplit('/').next().filter(|_| path != "/v2/") {
            None => return respond(&stream, 200, &[], 2, b"{}"),
            Some(reference) => {
                let digest = state.tags.get(reference).cloned().unwrap_or(reference.to_owned());
                let blob = state.blobs.get(&digest).cloned();
                (digest, blob)
            }
        };
        drop(state);
        let Some(mut body) = blob else { return refuse(404, &[]) };
        let length = body.len();
        let is_blob = path.contains("/blobs/");
        if is_blob && fault == Fault::Truncate {
            body.truncate(length / 2);
        }
        if (is_blob && fault == Fault::WrongBlob) || (!is_blob && fault == Fault::WrongManifest) {
            // A blank at the end keeps JSON valid; the first byte of anything else is turned.
            let last = body.len() - 1;
            if media_type_of(&body).is_some() {
                body.push(b' ');
            } else {
                body[last] ^= 1;
            }
        }
        let length = if fault == Fault::WrongManifest { body.len() } else { length };
        let kind = media_type_of(&body).filter(|_| !is_blob).unwrap_or("application/octet-stream".to_owned());
        let headers = [("content-type", kind), ("docker-content-digest", reference)];
        let body = if request.start.starts_with("HEAD") { &[][..] } else { &body[..] };
        respond(&stream, 200, &headers, length, body)
    }
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", base64(format!("{user}:{password}").as_bytes()))
}

/// Standard base64 with padding: what the basic scheme wants of a few bytes.
pub fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let group = chunk.iter().fold(0_usize, |n, b| n << 8 | usize::from(*b)) << (8 * (3 - chunk.len()));
        for place in 0..4 {
            let digit = DIGITS[group >> (18 - 6 * place) & 63];
            text.push(if place <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

/// A directory of CNI plugins that note each call, obey a mode, and then run the real plugin.
#[derive(Debug)]
pub struct Plugins {
    /// The directory, for `plugin_dirs`.
    pub dir: PathBuf,
}

impl Plugins {
    /// Wraps `bridge` and `portmap`; the other plugins are the real ones.
    pub fn wrap(dir: &Path) -> Plugins {
        fs::create_dir_all(dir).unwrap();
        for entry in fs::read_dir(PLUGINS).expect("the package containernetworking-plugins is installed") {
            let name = entry.unwrap().file_name();
            let _ = symlink(Path::new(PLUGINS).join(&name), dir.join(&name));
        }
        for name in ["bridge", "portmap"] {
            let path = dir.join(name);
            let _ = fs::remove_file(&path);
            let here = dir.display();
            let script = format!(
                "#!/bin/sh\n\
                 # Notes the call, does what the file `mode.{name}.COMMAND` says, runs the real plugin.\n\
                 echo \"{name} $CNI_COMMAND $CNI_CONTAINERID\" >> {here}/calls\n\
                 mode={here}/mode.{name}.$CNI_COMMAND\n\
                 [ -e \"$mode\" ] && . \"$mode\"\n\
                 exec {PLUGINS}/{name}\n"
            );
            fs::write(&path, script).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        Plugins { dir: dir.to_owned() }
    }

    /// Runs these shell commands before the plugin's `command` from now on; none, if empty.
    pub fn set(&self, plugin: &str, command: &str, shell: &str) {
        let mode = self.dir.join(format!("mode.{plugin}.{command}"));
        let part = mode.with_extension("part");
        fs::write(&part, format!("{shell}\n")).unwrap();
        fs::rename(part, mode).unwrap();
    }

    /// Answers `command` with an error of the protocol.
    pub fn fail(&self, plugin: &str, command: &str) {
        let error = r#"{"cniVersion":"1.0.0","code":11,"msg":"told to fail"}"#;
        self.set(plugin, command, &format!("echo '{error}'; exit 1"));
    }

    /// The calls so far: plugin, command, container id.
    pub fn calls(&self) -> Vec<(String, String, String)> {
        let text = fs::read_to_string(self.dir.join("calls")).unwrap_or_default();
        let split = |line: &str| {
            let mut words = line.split(' ').map(str::to_owned);
            Some((words.next()?, words.next()?, words.next().unwrap_or_default()))
        };
        text.lines().filter_map(split).collect()
    }

    /// How often a plugin was called with a command.
    pub fn count(&self, plugin: &str, command: &str) -> usize {
        self.calls().iter().filter(|(p, c, _)| p == plugin && c == command).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::request;
    use crate::image::{Image, Layer, digest};

    #[test]
    fn base64_is_the_standard_one() {
        for (plain, coded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")]
        {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    #[test]
    fn a_faulty_registry_does_what_it_was_told() {
        let image = Image::new().layer(Layer::new().file("f", 0o644, "x")).build();
        let registry = FaultyRegistry::start(Fault::None);
        registry.add(&image, "1");
        let get = |path: &str, headers: &[(&str, &str)]| {
            request(registry.address, "GET", path, headers, b"").unwrap()
        };
        let manifest = get("/v2/x/manifests/1", &[]);
        assert_eq!(digest(&manifest.body), image.digest);
        let blob = format!("/v2/x/blobs/{}", image.id);
        let whole = get(&blob, &[]).body.len();

        registry.set(Fault::Truncate);
        assert_eq!(get(&blob, &[]).body.len(), whole / 2);
        registry.set(Fault::WrongBlob);
        assert_ne!(digest(&get(&blob, &[]).body), image.id);
        registry.set(Fault::WrongManifest);
        assert_ne!(digest(&get("/v2/x/manifests/1", &[]).body), image.digest);
        registry.set(Fault::Unavailable(2));
        let seen: Vec<u16> = (0..3).map(|_| get("/v2/", &[]).status()).collect();
        assert_eq!(seen, [503, 503, 200]);
        registry.set(Fault::Basic("u".into(), "p".into()));
        assert_eq!(get(&blob, &[]).status(), 401);
        assert_eq!(get(&blob, &[("authorization", "Basic dTpw")]).status(), 200);
        registry.set(Fault::Token("u".into(), "p".into()));
        assert!(get(&blob, &[]).header("www-authenticate").unwrap().contains("/token"));
        assert_eq!(get("/token?service=test", &[("authorization", "Basic dTpw")]).status(), 200);
        assert_eq!(get(&blob, &[("authorization", "Bearer aa.bb.cc")]).status(), 200);
    }
}
