//! Images made from nothing: layers entry by entry, manifests in either format, and three ways to hand them over.
//!
//! Deterministic: no clock, fixed order, so the same recipe has the same digest on every machine with the same busybox.
//! Nothing is checked on purpose: a recipe may say `../../etc/passwd`, because refusing that is the daemon's work.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// The name under which every node has [`Image::busybox`].
pub const BUSYBOX: &str = "registry.test/busybox:1";

/// The machine's own busybox, which must not need a library.
const HOST_BUSYBOX: &str = "/bin/busybox";

/// How a layer's bytes are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// As they are.
    Plain,
    /// gzip.
    Gzip,
    /// Zstandard.
    Zstd,
}

/// Which of the two manifest formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// OCI image specification 1.
    Oci,
    /// Docker's schema 2.
    Docker,
}

/// What an entry is.
#[derive(Debug, Clone)]
enum Kind {
    File(Vec<u8>),
    Dir,
    Symlink(Vec<u8>),
    Hardlink(Vec<u8>),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
    /// One run of data at an offset in a file of a size, in GNU's old sparse form.
    Sparse {
        size: u64,
        offset: u64,
        data: Vec<u8>,
    },
}

#[derive(Debug, Clone)]
struct Entry {
    path: Vec<u8>,
    mode: u32,
    owner: (u64, u64),
    xattrs: Vec<(String, Vec<u8>)>,
    kind: Kind,
}

/// A layer, built entry by entry. Paths are bytes and are written as they are given.
#[derive(Debug, Clone)]
pub struct Layer {
    entries: Vec<Entry>,
    compression: Compression,
    padding: usize,
}

impl Default for Layer {
    fn default() -> Layer {
        Layer { entries: Vec::new(), compression: Compression::Gzip, padding: 0 }
    }
}

impl Layer {
    /// A gzip layer with no entry.
    pub fn new() -> Layer {
        Layer::default()
    }

    /// Stores it in another way.
    #[must_use]
    pub fn compressed(mut self, compression: Compression) -> Layer {
        self.compression = compression;
        self
    }

    fn entry(mut self, path: impl AsRef<[u8]>, mode: u32, kind: Kind) -> Layer {
        let path = path.as_ref().to_vec();
        self.entries.push(Entry { path, mode, owner: (0, 0), xattrs: Vec::new(), kind });
        self
    }

    /// A regular file.
    #[must_use]
    pub fn file(self, path: impl AsRef<[u8]>, mode: u32, content: impl AsRef<[u8]>) -> Layer {
        self.entry(path, mode, Kind::File(content.as_ref().to_vec()))
    }

    /// A directory.
    #[must_use]
    pub fn dir(self, path: impl AsRef<[u8]>, mode: u32) -> Layer {
        self.entry(path, mode, Kind::Dir)
    }

    /// A symbolic link.
    #[must_use]
    pub fn symlink(self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Layer {
        self.entry(path, 0o777, Kind::Symlink(target.as_ref().to_vec()))
    }

    /// A second name of a file of this layer; with its mode, as archivers write it and some unpackers apply it.
    #[must_use]
    pub fn hardlink(self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Layer {
        let target = target.as_ref();
        let mode = self.entries.iter().find(|e| e.path == target).map_or(0o644, |e| e.mode);
        self.entry(path, mode, Kind::Hardlink(target.to_vec()))
    }

    /// A character device.
    #[must_use]
    pub fn char_device(self, path: impl AsRef<[u8]>, mode: u32, major: u32, minor: u32) -> Layer {
        self.entry(path, mode, Kind::Char(major, minor))
    }

    /// A block device.
    #[must_use]
    pub fn block_device(self, path: impl AsRef<[u8]>, mode: u32, major: u32, minor: u32) -> Layer {
        self.entry(path, mode, Kind::Block(major, minor))
    }

    /// A named pipe.
    #[must_use]
    pub fn fifo(self, path: impl AsRef<[u8]>, mode: u32) -> Layer {
        self.entry(path, mode, Kind::Fifo)
    }

    /// A file of `size` bytes that are zero but for `data` at `offset`, a multiple of 512.
    #[must_use]
    pub fn sparse(self, path: impl AsRef<[u8]>, size: u64, offset: u64, data: impl AsRef<[u8]>) -> Layer {
        self.entry(path, 0o644, Kind::Sparse { size, offset, data: data.as_ref().to_vec() })
    }

    /// Hides a path of the layers below.
    #[must_use]
    pub fn whiteout(self, path: &str) -> Layer {
        let (dir, name) = path.rsplit_once('/').map_or((String::new(), path), |(d, n)| (format!("{d}/"), n));
        self.file(format!("{dir}.wh.{name}"), 0o644, b"")
    }

    /// Hides everything that the layers below have in a directory.
    #[must_use]
    pub fn opaque(self, dir: &str) -> Layer {
        self.file(format!("{dir}/.wh..wh..opq"), 0o644, b"")
    }

    /// Changes the owner of the entry added last.
    #[must_use]
    pub fn owner(mut self, uid: u64, gid: u64) -> Layer {
        self.last().owner = (uid, gid);
        self
    }

    /// Gives the entry added last an extended attribute.
    #[must_use]
    pub fn xattr(mut self, name: &str, value: impl AsRef<[u8]>) -> Layer {
        self.last().xattrs.push((name.to_owned(), value.as_ref().to_vec()));
        self
    }

    /// Adds zeros after the archive's end, as some builders do.
    #[must_use]
    pub fn padded(mut self, bytes: usize) -> Layer {
        self.padding = bytes;
        self
    }

    fn last(&mut self) -> &mut Entry {
        self.entries.last_mut().expect("an entry was added before")
    }

    /// The uncompressed archive.
    pub fn tar(&self) -> Vec<u8> {
        let mut archive = Vec::new();
        self.entries.iter().for_each(|entry| entry.write(&mut archive));
        archive.resize(archive.len() + 1024 + self.padding, 0);
        archive
    }

    fn pack(&self, tar: &[u8]) -> Vec<u8> {
        match self.compression {
            Compression::Plain => tar.to_vec(),
            Compression::Zstd => zstd::encode_all(tar, 3).unwrap(),
            Compression::Gzip => {
                let mut encoder =
                    flate2::GzBuilder::new().mtime(0).write(Vec::new(), flate2::Compression::new(6));
                encoder.write_all(tar).unwrap();
                encoder.finish().unwrap()
            }
        }
    }
}

impl Entry {
    /// Appends header and content. The `tar` crate refuses hostile names, so the name fields are filled by hand.
    fn write(&self, out: &mut Vec<u8>) {
        let mut pax: Vec<(String, Vec<u8>)> =
            self.xattrs.iter().map(|(name, value)| (format!("SCHILY.xattr.{name}"), value.clone())).collect();
        let mut header = tar::Header::new_gnu();
        header.set_mode(self.mode);
        header.set_uid(self.owner.0);
        header.set_gid(self.owner.1);
        header.set_mtime(0);
        header.set_size(0);
        let link: &[u8] = match &self.kind {
            Kind::Symlink(target) | Kind::Hardlink(target) => target,
            _ => b"",
        };
        header.set_entry_type(match self.kind {
            Kind::File(_) => tar::EntryType::Regular,
            Kind::Dir => tar::EntryType::Directory,
            Kind::Symlink(_) => tar::EntryType::Symlink,
            Kind::Hardlink(_) => tar::EntryType::Link,
            Kind::Char(..) => tar::EntryType::Char,
            Kind::Block(..) => tar::EntryType::Block,
            Kind::Fifo => tar::EntryType::Fifo,
            Kind::Sparse { .. } => tar::EntryType::GNUSparse,
        });
        if let Kind::Char(major, minor) | Kind::Block(major, minor) = self.kind {
            header.set_device_major(major).unwrap();
            header.set_device_minor(minor).unwrap();
        }
        let content: &[u8] = match &self.kind {
            Kind::File(content) => content,
            Kind::Sparse { size, offset, data } => {
                let gnu = header.as_gnu_mut().expect("made as GNU");
                octal(&mut gnu.realsize, *size);
                octal(&mut gnu.sparse[0].offset, *offset);
                octal(&mut gnu.sparse[0].numbytes, data.len() as u64);
                // An empty run at the end says how far the last hole reaches.
                octal(&mut gnu.sparse[1].offset, *size);
                octal(&mut gnu.sparse[1].numbytes, 0);
                data
            }
            _ => b"",
        };
        header.set_size(content.len() as u64);
        let old = header.as_old_mut();
        name(&mut old.name, "path", &self.path, &mut pax);
        name(&mut old.linkname, "linkpath", link, &mut pax);
        header.set_cksum();
        write_pax(out, &pax);
        out.extend_from_slice(header.as_bytes());
        write_padded(out, content);
    }
}

/// Puts a name into its field, or into an extended header where it is too long.
fn name(field: &mut [u8; 100], key: &str, bytes: &[u8], pax: &mut Vec<(String, Vec<u8>)>) {
    let fits = bytes.len().min(field.len());
    field[..fits].copy_from_slice(&bytes[..fits]);
    if bytes.len() > field.len() {
        pax.push((key.to_owned(), bytes.to_vec()));
    }
}

fn octal(field: &mut [u8; 12], value: u64) {
    field.copy_from_slice(format!("{value:011o}\0").as_bytes());
}

fn write_pax(out: &mut Vec<u8>, records: &[(String, Vec<u8>)]) {
    if records.is_empty() {
        return;
    }
    let mut body = Vec::new();
    for (key, value) in records {
        // The length counts itself: two guesses settle it.
        let rest = key.len() + value.len() + 3;
        let mut length = rest + rest.to_string().len();
        length = rest + length.to_string().len();
        body.extend_from_slice(format!("{length} {key}=").as_bytes());
        body.extend_from_slice(value);
        body.push(b'\n');
    }
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::XHeader);
    header.set_path("pax").unwrap();
    header.set_mode(0o644);
    header.set_size(body.len() as u64);
    header.set_cksum();
    out.extend_from_slice(header.as_bytes());
    write_padded(out, &body);
}

fn write_padded(out: &mut Vec<u8>, content: &[u8]) {
    out.extend_from_slice(content);
    out.resize(out.len().next_multiple_of(512), 0);
}

/// A recipe: layers, the `config` part of the image configuration, and how it is packed.
#[derive(Debug, Clone)]
pub struct Image {
    layers: Vec<Layer>,
    config: Value,
    format: Format,
    foreign: bool,
    diff_ids: Option<Vec<String>>,
}

impl Default for Image {
    fn default() -> Image {
        Image::new()
    }
}

impl Image {
    /// No layers, no configuration, OCI format, below an index that also lists a platform we are not.
    pub fn new() -> Image {
        Image { layers: Vec::new(), config: json!({}), format: Format::Oci, foreign: true, diff_ids: None }
    }

    /// The machine's busybox with its applets as hard links, users, and a shell as command.
    pub fn busybox() -> Image {
        static LAYER: OnceLock<Layer> = OnceLock::new();
        Image::new()
            .layer(LAYER.get_or_init(busybox_layer).clone())
            .config("Env", json!(["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]))
            .config("Cmd", json!(["sh"]))
    }

    /// Adds a layer on top.
    #[must_use]
    pub fn layer(mut self, layer: Layer) -> Image {
        self.layers.push(layer);
        self
    }

    /// Sets a field of the configuration: `Env`, `Cmd`, `Entrypoint`, `User`, `WorkingDir`, `StopSignal`...
    #[must_use]
    pub fn config(mut self, key: &str, value: Value) -> Image {
        self.config[key] = value;
        self
    }

    /// Chooses the manifest's format.
    #[must_use]
    pub fn format(mut self, format: Format) -> Image {
        self.format = format;
        self
    }

    /// Whether the name leads to an index, with another platform first, or straight to the manifest.
    #[must_use]
    pub fn indexed(mut self, indexed: bool) -> Image {
        self.foreign = indexed;
        self
    }

    /// Lies about the layers' uncompressed digests.
    #[must_use]
    pub fn with_diff_ids(mut self, diff_ids: Vec<String>) -> Image {
        self.diff_ids = Some(diff_ids);
        self
    }

    /// Makes every blob.
    pub fn build(&self) -> Built {
        let mut blobs = BTreeMap::new();
        let mut put = |bytes: Vec<u8>| {
            let digest = digest(&bytes);
            blobs.insert(digest.clone(), bytes);
            digest
        };
        let (mut diff_ids, mut layers, mut tars) = (Vec::new(), Vec::new(), Vec::new());
        for layer in &self.layers {
            let tar = layer.tar();
            diff_ids.push(digest(&tar));
            let packed = layer.pack(&tar);
            let (size, media_type) = (packed.len(), self.format.layer(layer.compression));
            layers.push(json!({ "mediaType": media_type, "digest": put(packed), "size": size }));
            tars.push(tar);
        }
        let platform = json!({ "architecture": architecture(), "os": "linux" });
        let mut config = platform.clone();
        config["config"] = self.config.clone();
        let diff_ids = self.diff_ids.clone().unwrap_or(diff_ids);
        config["rootfs"] = json!({ "type": "layers", "diff_ids": diff_ids });
        let config = serde_json::to_vec(&config).unwrap();
        let mut manifest = |config: Vec<u8>, layers: &[Value]| {
            let size = config.len();
            let manifest = json!({
                "schemaVersion": 2, "mediaType": self.format.manifest(),
                "config": { "mediaType": self.format.config(), "digest": put(config), "size": size },
                "layers": layers,
            });
            let bytes = serde_json::to_vec(&manifest).unwrap();
            let size = bytes.len();
            json!({ "mediaType": self.format.manifest(), "digest": put(bytes), "size": size })
        };
        let id = digest(&config);
        let mut top = manifest(config.clone(), &layers);
        top["platform"] = platform;
        if self.foreign {
            let mut other = manifest(
                br#"{"architecture":"s390x","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#.to_vec(),
                &[],
            );
            other["platform"] = json!({ "architecture": "s390x", "os": "linux" });
            let index =
                json!({ "schemaVersion": 2, "mediaType": self.format.index(), "manifests": [other, top] });
            let bytes = serde_json::to_vec(&index).unwrap();
            top = json!({ "mediaType": self.format.index(), "size": bytes.len(), "digest": put(bytes) });
        }
        let text = |key: &str| top[key].as_str().expect("just written").to_owned();
        let (media_type, digest) = (text("mediaType"), text("digest"));
        Built { id, digest, media_type, descriptor: top, blobs, config, tars }
    }
}

impl Format {
    fn manifest(self) -> &'static str {
        match self {
            Format::Oci => "application/vnd.oci.image.manifest.v1+json",
            Format::Docker => "application/vnd.docker.distribution.manifest.v2+json",
        }
    }
    fn index(self) -> &'static str {
        match self {
            Format::Oci => "application/vnd.oci.image.index.v1+json",
            Format::Docker => "application/vnd.docker.distribution.manifest.list.v2+json",
        }
    }
    fn config(self) -> &'static str {
        match self {
            Format::Oci => "application/vnd.oci.image.config.v1+json",
            Format::Docker => "application/vnd.docker.container.image.v1+json",
        }
    }
    fn layer(self, compression: Compression) -> &'static str {
        match (self, compression) {
            (Format::Oci, Compression::Plain) => "application/vnd.oci.image.layer.v1.tar",
            (Format::Oci, Compression::Gzip) => "application/vnd.oci.image.layer.v1.tar+gzip",
            (Format::Oci, Compression::Zstd) => "application/vnd.oci.image.layer.v1.tar+zstd",
            (Format::Docker, Compression::Plain) => "application/vnd.docker.image.rootfs.diff.tar",
            (Format::Docker, Compression::Gzip) => "application/vnd.docker.image.rootfs.diff.tar.gzip",
            (Format::Docker, Compression::Zstd) => "application/vnd.docker.image.rootfs.diff.tar.zstd",
        }
    }
}

/// An image's blobs, ready to be handed over.
#[derive(Debug, Clone)]
pub struct Built {
    /// The image id: the digest of the configuration.
    pub id: String,
    /// The digest of what a name leads to: the index, or the manifest where there is none.
    pub digest: String,
    /// The media type of that.
    pub media_type: String,
    descriptor: Value,
    /// Every blob by its digest.
    pub blobs: BTreeMap<String, Vec<u8>>,
    config: Vec<u8>,
    tars: Vec<Vec<u8>>,
}

impl Built {
    /// An image of layers that are packed with gzip already: the bytes of each and the digest of its archive. It cannot
    /// be written as `docker save` does, for want of the archives.
    pub fn of_packed(layers: Vec<(Vec<u8>, String)>) -> Built {
        let (format, mut blobs) = (Format::Oci, BTreeMap::new());
        let mut put = |media_type: &str, bytes: Vec<u8>| {
            let (digest, size) = (digest(&bytes), bytes.len());
            blobs.insert(digest.clone(), bytes);
            json!({ "mediaType": media_type, "digest": digest, "size": size })
        };
        let diff_ids: Vec<&String> = layers.iter().map(|(_, digest)| digest).collect();
        let config = json!({
            "architecture": architecture(), "os": "linux", "config": {},
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = serde_json::to_vec(&config).unwrap();
        let layer = format.layer(Compression::Gzip);
        let layers: Vec<Value> = layers.into_iter().map(|(bytes, _)| put(layer, bytes)).collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": format.manifest(),
            "config": put(format.config(), config.clone()), "layers": layers,
        });
        let manifest = serde_json::to_vec(&manifest).unwrap();
        let (id, digest) = (digest(&config), digest(&manifest));
        let (media_type, descriptor) = (format.manifest().to_owned(), put(format.manifest(), manifest));
        Built { id, digest, media_type, descriptor, blobs, config, tars: Vec::new() }
    }

    /// Whether a blob is a manifest or an index.
    pub fn is_manifest(blob: &[u8]) -> bool {
        media_type_of(blob).is_some()
    }

    /// Writes an OCI image layout that carries these names.
    pub fn write_layout(&self, dir: &Path, names: &[&str]) {
        for (path, content) in self.layout(names) {
            let path = dir.join(path);
            fs::create_dir_all(path.parent().expect("below dir")).unwrap();
            fs::write(path, content).unwrap();
        }
    }

    /// Writes the same layout as one tar archive.
    pub fn write_archive(&self, path: &Path, names: &[&str]) {
        write_tar(path, self.layout(names)).unwrap();
    }

    fn layout(&self, names: &[&str]) -> Vec<(String, Vec<u8>)> {
        let entries: Vec<Value> = names
            .iter()
            .map(|name| {
                let mut entry = self.descriptor.clone();
                entry["annotations"] = json!({
                    "org.opencontainers.image.ref.name": name,
                    "io.containerd.image.name": name,
                });
                entry
            })
            .collect();
        let index = json!({ "schemaVersion": 2, "mediaType": Format::Oci.index(), "manifests": entries });
        let blobs = self
            .blobs
            .iter()
            .map(|(digest, bytes)| (format!("blobs/{}", digest.replace(':', "/")), bytes.clone()));
        let mut files: Vec<(String, Vec<u8>)> = blobs.collect();
        files.push(("index.json".to_owned(), serde_json::to_vec(&index).unwrap()));
        files.push(("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()));
        files
    }

    /// Writes what `docker save` writes: plain layers and a manifest.json.
    pub fn write_docker_save(&self, path: &Path, names: &[&str]) {
        let hex = |digest: &str| digest.trim_start_matches("sha256:").to_owned();
        let layers: Vec<(String, Vec<u8>)> =
            self.tars.iter().map(|tar| (format!("{}/layer.tar", hex(&digest(tar))), tar.clone())).collect();
        let layer_names: Vec<&String> = layers.iter().map(|(name, _)| name).collect();
        let config_name = format!("{}.json", hex(&self.id));
        let manifest = json!([{ "Config": config_name, "RepoTags": names, "Layers": layer_names }]);
        let mut files = vec![(config_name, self.config.clone())];
        files.extend(layers);
        files.push(("manifest.json".to_owned(), serde_json::to_vec(&manifest).unwrap()));
        write_tar(path, files).unwrap();
    }
}

/// The media type that a JSON blob says it has, if it is a manifest or index.
pub fn media_type_of(blob: &[u8]) -> Option<String> {
    let value: Value = serde_json::from_slice(blob).ok()?;
    value.get("schemaVersion")?;
    Some(value.get("mediaType")?.as_str()?.to_owned())
}

/// `sha256:` and the hexadecimal digest.
pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// The machine's architecture as images name it.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn write_tar(path: &Path, files: Vec<(String, Vec<u8>)>) -> io::Result<()> {
    // Written beside and renamed, so that a daemon that looks now sees all of it or nothing.
    let part = path.with_extension("part");
    let mut archive = tar::Builder::new(fs::File::create(&part)?);
    for (name, content) in files {
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_mtime(0);
        header.set_size(content.len() as u64);
        archive.append_data(&mut header, name, content.as_slice())?;
    }
    archive.into_inner()?.sync_all()?;
    fs::rename(part, path)
}

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
bin:x:2:2:bin:/bin:/bin/false
mail:x:8:8:mail:/var/spool/mail:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
";
const GROUP: &str = "root:x:0:\ndaemon:x:1:\nbin:x:2:\ntty:x:5:\ndisk:x:6:\nmail:x:8:\nwww-data:x:33:\nstaff:x:50:www-data\nnobody:x:65534:\n";

/// Applets are hard links, not symbolic ones: a mount over one of them must not follow to the shell.
fn busybox_layer() -> Layer {
    let binary =
        fs::read(HOST_BUSYBOX).expect("the package busybox-static is installed: scripts/setup --test");
    assert!(
        !binary.windows(8).any(|w| w == b"/ld-linu"),
        "{HOST_BUSYBOX} needs libraries: install busybox-static (scripts/setup --test)"
    );
    let list = Command::new(HOST_BUSYBOX).arg("--list").output().expect("busybox runs").stdout;
    let mut applets: Vec<&str> = std::str::from_utf8(&list).unwrap().lines().filter(|a| *a != "[").collect();
    applets.sort_unstable();
    let mut layer = Layer::new()
        .dir("bin/", 0o755)
        .file("bin/[", 0o755, binary)
        .dir("dev/", 0o755)
        .dir("etc/", 0o755)
        .file("etc/passwd", 0o644, PASSWD)
        .file("etc/group", 0o644, GROUP)
        .dir("home/", 0o755)
        .dir("root/", 0o700)
        .dir("tmp/", 0o1777)
        .dir("usr/", 0o755)
        .dir("usr/sbin/", 0o755)
        .dir("var/", 0o755)
        .dir("var/spool/", 0o755)
        .dir("var/spool/mail/", 0o755)
        .dir("var/www/", 0o755);
    for applet in applets {
        layer = layer.hardlink(format!("bin/{applet}"), "bin/[");
    }
    layer
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn an_image_is_the_same_twice_and_its_names_are_its_digests() {
        let build = || Image::busybox().layer(Layer::new().file("a", 0o600, "a")).build();
        let built = build();
        assert_eq!(built.digest, build().digest);
        assert!(built.blobs.iter().all(|(name, bytes)| *name == digest(bytes)));
        assert!(built.blobs.contains_key(&built.id));
    }

    #[test]
    fn a_layer_says_what_was_asked() {
        let long = "d/".repeat(80) + "name";
        let layer = Layer::new()
            .file("../escape", 0o644, "x")
            .file(&long, 0o644, "long")
            .file(b"odd\xff", 0o644, "y")
            .owner(3_000_000, 5)
            .xattr("user.k", b"v\0w")
            .sparse("holes", 4096, 1024, "data")
            .char_device("null", 0o666, 1, 3)
            .whiteout("dir/gone");
        let tar = layer.tar();
        let mut archive = tar::Archive::new(tar.as_slice());
        let mut seen = Vec::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path_bytes().into_owned();
            if path == b"odd\xff" {
                assert_eq!(entry.header().uid().unwrap(), 3_000_000);
                let pax: Vec<_> = entry.pax_extensions().unwrap().unwrap().map(Result::unwrap).collect();
                assert_eq!(
                    (pax[0].key_bytes(), pax[0].value_bytes()),
                    (&b"SCHILY.xattr.user.k"[..], &b"v\0w"[..])
                );
            }
            if path == b"holes" {
                let mut content = Vec::new();
                entry.read_to_end(&mut content).unwrap();
                assert_eq!((content.len(), &content[1024..1028]), (4096, &b"data"[..]));
            }
            seen.push(path);
        }
        let expected: [&[u8]; 6] =
            [b"../escape", long.as_bytes(), b"odd\xff", b"holes", b"null", b"dir/.wh.gone"];
        assert_eq!(seen, expected);
    }

    #[test]
    fn every_form_can_be_unpacked_by_tar() {
        let dir = tempfile::tempdir().unwrap();
        let built = Image::busybox().format(Format::Docker).build();
        built.write_archive(&dir.path().join("oci.tar"), &[BUSYBOX]);
        built.write_docker_save(&dir.path().join("docker.tar"), &[BUSYBOX]);
        built.write_layout(&dir.path().join("layout"), &[BUSYBOX]);
        for (archive, member) in [("oci.tar", "index.json"), ("docker.tar", "manifest.json")] {
            let out =
                Command::new("tar").arg("xOf").arg(dir.path().join(archive)).arg(member).output().unwrap();
            assert!(String::from_utf8_lossy(&out.stdout).contains(BUSYBOX), "{archive}");
        }
        assert!(dir.path().join("layout/oci-layout").exists());
    }
}
