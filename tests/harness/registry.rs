//! Debian's own registry as a child, filled over the distribution API, and the wiring that leads names to it.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::http::{Message, request};
use crate::image::{Built, media_type_of};

/// A running `docker-registry` with storage of its own, ended when dropped.
#[derive(Debug)]
pub struct Registry {
    /// Where it listens.
    pub address: SocketAddr,
    child: Mutex<Child>,
    dir: PathBuf,
}

impl Registry {
    /// Starts one that keeps everything below `dir`.
    pub fn start(dir: &Path) -> Registry {
        fs::create_dir_all(dir).unwrap();
        // The port may be taken between here and the child's bind: then another is tried.
        for _ in 0..5 {
            let address = free_address();
            let config = dir.join("registry.yml");
            fs::write(&config, configuration(dir, address)).unwrap();
            let mut child = Command::new("docker-registry")
                .args(["serve".as_ref(), config.as_os_str()])
                .env("OTEL_TRACES_EXPORTER", "none")
                .stdout(Stdio::null())
                .stderr(File::create(dir.join("registry.log")).unwrap())
                .spawn()
                .expect("the package docker-registry is installed: scripts/setup --test");
            if answers(&mut child, address) {
                return Registry { address, child: Mutex::new(child), dir: dir.to_owned() };
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        panic!(
            "docker-registry does not start: {}",
            fs::read_to_string(dir.join("registry.log")).unwrap_or_default()
        )
    }

    /// Pushes an image under a repository and tag.
    pub fn push(&self, image: &Built, repository: &str, tag: &str) {
        push(self.address, image, repository, tag);
    }

    /// Leads `host` to this registry in a `certs.d` directory.
    pub fn serve_as(&self, certs_dir: &Path, host: &str) {
        mirror(certs_dir, host, self.address);
    }

    /// Ends it.
    pub fn stop(&self) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = child.kill();
        let _ = child.wait();
    }

    /// What it logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("registry.log")).unwrap_or_default()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Writes the `hosts.toml` that leads `host` to a plain-HTTP address.
pub fn mirror(certs_dir: &Path, host: &str, address: SocketAddr) {
    let dir = certs_dir.join(host);
    fs::create_dir_all(&dir).unwrap();
    let text = format!(
        "server = \"http://{address}\"\n\n[host.\"http://{address}\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
    );
    fs::write(dir.join("hosts.toml"), text).unwrap();
}

/// An address on the loopback that was free a moment ago.
pub fn free_address() -> SocketAddr {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|l| l.local_addr())
        .expect("a free port on the loopback")
}

fn configuration(dir: &Path, address: SocketAddr) -> String {
    let storage = dir.join("storage");
    format!(
        "version: 0.1\nlog: {{ level: info }}\nstorage: {{ filesystem: {{ rootdirectory: {} }} }}\nhttp: {{ addr: '{address}' }}\n",
        storage.display()
    )
}

fn answers(child: &mut Child, address: SocketAddr) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(20) {
        if matches!(child.try_wait(), Ok(Some(_))) {
            return false;
        }
        if request(address, "GET", "/v2/", &[], b"").is_ok_and(|r| r.status() == 200) {
            return true;
        }
        thread::sleep(Duration::from_millis(20));
    }
    false
}

/// Pushes over the distribution API: blobs first, manifests by digest, the top one by tag.
pub fn push(registry: SocketAddr, image: &Built, repository: &str, tag: &str) {
    let (manifests, blobs): (Vec<_>, Vec<_>) = image.blobs.iter().partition(|(_, b)| Built::is_manifest(b));
    for (digest, bytes) in blobs {
        let begun = send(registry, "POST", &format!("/v2/{repository}/blobs/uploads/"), &[], b"", 202);
        let location = begun.header("location").expect("an upload has a location");
        let path = location.find("/v2/").map_or(location, |at| &location[at..]);
        let separator = if path.contains('?') { '&' } else { '?' };
        let path = format!("{path}{separator}digest={digest}");
        send(registry, "PUT", &path, &[("content-type", "application/octet-stream")], bytes, 201);
    }
    let put = |bytes: &[u8], reference: &str| {
        let media_type = media_type_of(bytes).expect("a manifest says what it is");
        let path = format!("/v2/{repository}/manifests/{reference}");
        send(registry, "PUT", &path, &[("content-type", &media_type)], bytes, 201);
    };
    // The index last: a registry refuses one whose manifests it does not have.
    manifests
        .iter()
        .filter(|(digest, _)| **digest != image.digest)
        .for_each(|(digest, bytes)| put(bytes, digest));
    put(&image.blobs[&image.digest], tag);
}

fn send(
    to: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
    expected: u16,
) -> Message {
    let answer = request(to, method, path, headers, body).unwrap_or_else(|e| panic!("{method} {path}: {e}"));
    let text = String::from_utf8_lossy(&answer.body);
    assert_eq!(answer.status(), expected, "{method} {path}: {} {text}", answer.start);
    answer
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Compression, Format, Image, Layer};

    #[test]
    fn what_is_pushed_can_be_fetched() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::start(dir.path());
        for (format, tag) in [(Format::Oci, "oci"), (Format::Docker, "docker")] {
            let layer = Layer::new().file("f", 0o644, "x").compressed(Compression::Plain);
            let image = Image::new().layer(layer).format(format).build();
            registry.push(&image, "library/x", tag);
            let path = format!("/v2/library/x/manifests/{tag}");
            let got = request(registry.address, "GET", &path, &[("accept", &image.media_type)], b"").unwrap();
            assert_eq!(got.header("docker-content-digest"), Some(image.digest.as_str()));
        }
    }
}
