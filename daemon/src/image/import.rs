//! Side-loading: OCI layouts and `docker save` archives that lie in the preload directory, for nodes that reach no
//! registry.
//!
//! An entry is a directory with an OCI layout, or a tar archive of a layout or of `docker save`, plain or compressed.
//! Everything in it is verified like what a registry gives. Images get the names that the entry carries. An entry that
//! has not changed since, and whose images are still here, is not read again.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Images;
use super::content::replace;
use super::manifest::{DOCUMENT_BYTES_MAX, Document, INDEX_DEPTH_MAX, ImageConfig, Platform};
use super::pull::{Found, Source};
use super::reference::{Algorithm, Digest, Hasher, Reference};
use super::unpack::Compression;
use crate::error::{Context, Error, Kind, Result};
use crate::rooted::Rooted;

/// Members of an archive; a layout has one for each layer and document.
const MEMBERS_MAX: usize = 100_000;
/// How many links may follow one another.
const LINKS_DEPTH_MAX: usize = 8;
/// The largest archive that is expanded to be read.
const ARCHIVE_BYTES_MAX: u64 = 256 << 30;

/// What an entry looked like when it was imported, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    bytes: u64,
    changed_ns: i128,
    images: BTreeSet<Digest>,
}

type Stamps = BTreeMap<String, Stamp>;

impl Images {
    /// Imports every entry of the preload directory. What cannot be imported is logged and does not keep the rest.
    pub async fn preload(self: &Arc<Images>) {
        let stamps_file = self.root.join("preload.json");
        let mut stamps: Stamps = fs::read(&stamps_file)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default();
        let mut entries: Vec<PathBuf> = match fs::read_dir(&self.preload_dir) {
            Ok(entries) => entries.filter_map(|entry| Some(entry.ok()?.path())).collect(),
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::error!(dir = %self.preload_dir.display(), %error, "cannot read the preload directory");
                }
                return;
            }
        };
        entries.sort();
        for path in entries {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match self.preload_entry(&path, stamps.get(&name)).await {
                Ok(None) => {}
                Ok(Some(stamp)) => {
                    tracing::info!(file = %path.display(), images = stamp.images.len(), "imported");
                    stamps.insert(name, stamp);
                    let saved =
                        serde_json::to_vec(&stamps).context(Kind::Internal, || "encode stamps".into());
                    if let Err(error) = saved.and_then(|bytes| replace(&stamps_file, &bytes)) {
                        tracing::warn!(%error, "what was imported will be read again at the next start");
                    }
                }
                Err(error) => tracing::error!(file = %path.display(), %error, "cannot import"),
            }
        }
    }

    /// `None` if nothing had to be done.
    async fn preload_entry(self: &Arc<Images>, path: &Path, old: Option<&Stamp>) -> Result<Option<Stamp>> {
        let metadata =
            fs::metadata(path).context(Kind::Internal, || format!("look at {}", path.display()))?;
        let changed_ns = i128::from(metadata.ctime()) * 1_000_000_000 + i128::from(metadata.ctime_nsec());
        let mut stamp = Stamp { bytes: metadata.len(), changed_ns, images: BTreeSet::new() };
        if let Some(old) = old
            && (old.bytes, old.changed_ns) == (stamp.bytes, stamp.changed_ns)
            && old.images.iter().all(|id| matches!(self.find(id.as_str()), Ok(Some(_))))
        {
            return Ok(None);
        }
        let entry = path.to_owned();
        let root = self.root.clone();
        let (blobs, images) = tokio::task::spawn_blocking(move || {
            let blobs = Blobs::open(&entry, &root)?;
            let images = blobs.images()?;
            Ok::<_, Error>((blobs, images))
        })
        .await
        .context(Kind::Internal, || "read the archive".into())??;
        for found in images {
            stamp.images.insert(self.install(found, Source::Local(&blobs)).await?);
        }
        Ok(Some(stamp))
    }
}

/// The files of a layout or an archive.
pub(super) struct Blobs {
    files: Files,
    /// Digests of the layers of `docker save`, whose names say nothing about them. Several names may have one.
    layers: HashMap<String, Digest>,
}

enum Files {
    Directory(Rooted),
    Archive { file: Arc<File>, members: HashMap<String, Member> },
}

#[derive(Debug, Clone, Copy)]
struct Member {
    offset: u64,
    bytes: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Vec<String>,
}

#[derive(Deserialize)]
struct Layout {
    manifests: Vec<LayoutEntry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LayoutEntry {
    #[serde(default)]
    media_type: Option<String>,
    digest: Digest,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

impl Blobs {
    /// Opens an entry; `scratch` is a directory for what must be expanded first.
    fn open(path: &Path, scratch: &Path) -> Result<Blobs> {
        let what = || format!("open {}", path.display());
        let files = if path.is_dir() {
            Files::Directory(Rooted::new(path)?)
        } else {
            // Without waiting: a pipe that somebody left there has no other end.
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            let file =
                File::from(rustix::fs::open(path, flags, Mode::empty()).context(Kind::Internal, what)?);
            if !file.metadata().context(Kind::Internal, what)?.is_file() {
                return Err(Error::invalid("neither a directory nor a regular file"));
            }
            let file = plain(file, scratch)?;
            let members = members(&file)?;
            Files::Archive { file: Arc::new(file), members }
        };
        Ok(Blobs { files, layers: HashMap::new() }.with_docker_layers())
    }

    /// The images in it, with their names.
    fn images(&self) -> Result<Vec<Found>> {
        let docker = self.docker_images()?;
        if let Some(text) = self.read("index.json")? {
            let layout: Layout =
                serde_json::from_slice(&text).context(Kind::InvalidArgument, || "read index.json".into())?;
            let named = layout.manifests.iter().any(|entry| entry.reference().is_some());
            if named || docker.is_empty() {
                let found = layout.manifests.iter().map(|entry| self.layout_image(entry));
                return found.filter_map(Result::transpose).collect();
            }
        }
        if docker.is_empty() {
            return Err(Error::invalid(
                "neither an OCI layout (index.json) nor `docker save` (manifest.json)",
            ));
        }
        docker.iter().map(|image| self.docker_image(image)).collect()
    }

    /// `None` for an entry that has nothing for this platform: archives of several platforms list them beside each other.
    fn layout_image(&self, entry: &LayoutEntry) -> Result<Option<Found>> {
        let mut documents = vec![(entry.digest.clone(), self.document(&entry.digest)?)];
        let mut media_type = entry.media_type.clone();
        let manifest = loop {
            let (_, bytes) = &documents[documents.len() - 1];
            match Document::parse(media_type.as_deref(), bytes)? {
                Document::Manifest(manifest) => break manifest,
                Document::Index(_) if documents.len() > INDEX_DEPTH_MAX => {
                    return Err(Error::invalid("too many indexes within each other"));
                }
                Document::Index(index) => {
                    let chosen = index.choose(&Platform::host())?;
                    media_type = Some(chosen.media_type.clone());
                    documents.push((chosen.digest.clone(), self.document(&chosen.digest)?));
                }
            }
        };
        let config = self.document(&manifest.config.digest)?;
        if ImageConfig::parse(&config)?.check_platform(&Platform::host()).is_err() {
            return Ok(None);
        }
        let reference = entry.reference();
        if reference.is_none() {
            tracing::warn!(image = %manifest.config.digest, "an image in the archive carries no name; it is known by its id only");
        }
        Ok(Some(Found {
            manifest,
            config,
            repo_tags: reference.iter().filter_map(Reference::repo_tag).collect(),
            repo_digests: reference.iter().map(|r| r.repo_digest(&entry.digest)).collect(),
            documents,
        }))
    }

    /// `docker save` has no manifest: one is written, the same for the same image at every import.
    fn docker_image(&self, image: &DockerImage) -> Result<Found> {
        let config = self.small(&image.config)?;
        let mut layers = Vec::new();
        for name in &image.layers {
            let digest = self.layers.get(name);
            let digest =
                digest.ok_or_else(|| Error::invalid(format!("layer {name:?} is not in the archive")))?;
            layers.push(json!({
                "mediaType": "application/vnd.docker.image.rootfs.diff.tar",
                "digest": digest,
                "size": self.size(name)?,
            }));
        }
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {
                "mediaType": "application/vnd.docker.container.image.v1+json",
                "digest": Digest::sha256(&config),
                "size": config.len(),
            },
            "layers": layers,
        });
        let manifest = Bytes::from(manifest.to_string());
        let digest = Digest::sha256(&manifest);
        let Document::Manifest(parsed) = Document::parse(None, &manifest)? else {
            return Err(Error::internal("the manifest we wrote is an index"));
        };
        let names = image.repo_tags.iter().flatten();
        let references = names.map(|name| Reference::parse(name)).collect::<Result<Vec<_>>>()?;
        Ok(Found {
            manifest: parsed,
            config,
            repo_tags: references.iter().filter_map(Reference::repo_tag).collect(),
            repo_digests: references.iter().map(|r| r.repo_digest(&digest)).collect(),
            documents: vec![(digest, manifest)],
        })
    }

    fn docker_images(&self) -> Result<Vec<DockerImage>> {
        match self.read("manifest.json")? {
            Some(text) => {
                serde_json::from_slice(&text).context(Kind::InvalidArgument, || "read manifest.json".into())
            }
            None => Ok(Vec::new()),
        }
    }

    fn with_docker_layers(mut self) -> Blobs {
        // An archive without manifest.json, or with a broken one, is told of by `images`.
        for image in self.docker_images().unwrap_or_default() {
            for name in image.layers {
                if !self.layers.contains_key(&name)
                    && let Ok(digest) = self.hash(&name)
                {
                    self.layers.insert(name, digest);
                }
            }
        }
        self
    }

    /// A reader of a blob.
    pub(super) fn open_blob(&self, digest: &Digest) -> Result<Box<dyn Read + Send>> {
        match self.layers.iter().find(|(_, layer)| *layer == digest) {
            Some((name, _)) => self.reader(name),
            None => self.reader(&blob_path(digest)),
        }
    }

    fn document(&self, digest: &Digest) -> Result<Bytes> {
        self.small(&blob_path(digest))
    }

    fn small(&self, name: &str) -> Result<Bytes> {
        self.read(name)?.ok_or_else(|| Error::invalid(format!("{name:?} is not in the archive")))
    }

    /// A small file; `None` if there is none.
    fn read(&self, name: &str) -> Result<Option<Bytes>> {
        let there = match &self.files {
            Files::Directory(dir) => dir.exists(name)?,
            Files::Archive { members, .. } => members.contains_key(name),
        };
        if !there {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        let mut reader = self.reader(name)?.take(DOCUMENT_BYTES_MAX as u64 + 1);
        reader.read_to_end(&mut bytes).context(Kind::Internal, || format!("read {name:?}"))?;
        if bytes.len() > DOCUMENT_BYTES_MAX {
            return Err(Error::invalid(format!("{name:?} is larger than {DOCUMENT_BYTES_MAX} bytes")));
        }
        Ok(Some(bytes.into()))
    }

    fn reader(&self, name: &str) -> Result<Box<dyn Read + Send>> {
        match &self.files {
            Files::Directory(dir) => Ok(Box::new(dir.open_file(name)?)),
            Files::Archive { file, .. } => {
                let Member { offset, bytes } = self.member(name)?;
                Ok(Box::new(Section { file: Arc::clone(file), at: offset, left: bytes }))
            }
        }
    }

    fn size(&self, name: &str) -> Result<u64> {
        match &self.files {
            Files::Directory(dir) => {
                let file = dir.open_file(name)?;
                Ok(file.metadata().context(Kind::Internal, || format!("look at {name:?}"))?.len())
            }
            Files::Archive { .. } => Ok(self.member(name)?.bytes),
        }
    }

    fn member(&self, name: &str) -> Result<Member> {
        match &self.files {
            Files::Archive { members, .. } => members.get(name).copied(),
            Files::Directory(_) => None,
        }
        .ok_or_else(|| Error::invalid(format!("{name:?} is not in the archive")))
    }

    fn hash(&self, name: &str) -> Result<Digest> {
        let mut hasher = Hasher::new(Algorithm::Sha256);
        let mut reader = self.reader(name)?;
        let mut buffer = vec![0; 256 << 10];
        loop {
            match reader.read(&mut buffer).context(Kind::Internal, || format!("read {name:?}"))? {
                0 => return Ok(hasher.finish()),
                n => hasher.update(&buffer[..n]),
            }
        }
    }
}

impl LayoutEntry {
    /// The name that the entry carries. A bare tag, as some tools write it, names nothing.
    fn reference(&self) -> Option<Reference> {
        let full = self.annotations.get("io.containerd.image.name");
        let short =
            self.annotations.get("org.opencontainers.image.ref.name").filter(|n| n.contains(['/', ':']));
        full.or(short).and_then(|name| Reference::parse(name).ok())
    }
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm().as_str(), digest.hex())
}

/// The archive itself, or what it expands to, in a file that has no name.
fn plain(mut file: File, scratch: &Path) -> Result<File> {
    let what = || "read the archive".to_owned();
    let mut magic = [0; 4];
    let filled = file.read(&mut magic).context(Kind::Internal, what)?;
    file.seek(SeekFrom::Start(0)).context(Kind::Internal, what)?;
    let reader: Box<dyn Read> = match Compression::detect(&magic[..filled]) {
        Compression::None => return Ok(file),
        Compression::Gzip => Box::new(flate2::read::MultiGzDecoder::new(file)),
        Compression::Zstd => Box::new(zstd::stream::read::Decoder::new(file).context(Kind::Internal, what)?),
    };
    let expanded =
        rustix::fs::open(scratch, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)
            .context(Kind::Internal, || format!("make a temporary file in {}", scratch.display()))?;
    let mut expanded = File::from(expanded);
    let bytes = io::copy(&mut reader.take(ARCHIVE_BYTES_MAX), &mut expanded)
        .context(Kind::InvalidArgument, || "expand the archive".into())?;
    if bytes == ARCHIVE_BYTES_MAX {
        return Err(Error::invalid(format!("expands to {ARCHIVE_BYTES_MAX} bytes or more")));
    }
    Ok(expanded)
}

/// Where each regular file of an archive is; a link is another name of what it points to.
fn members(file: &File) -> Result<HashMap<String, Member>> {
    let what = || "read the archive".to_owned();
    let mut archive = tar::Archive::new(file);
    (&mut &*file).seek(SeekFrom::Start(0)).context(Kind::Internal, what)?;
    let mut found = HashMap::new();
    let mut links = Vec::new();
    for entry in archive.entries_with_seek().context(Kind::InvalidArgument, what)? {
        let entry = entry.context(Kind::InvalidArgument, what)?;
        if found.len() + links.len() >= MEMBERS_MAX {
            return Err(Error::invalid(format!("the archive has more than {MEMBERS_MAX} members")));
        }
        let Ok(path) = entry.path() else { continue };
        let name = normal(&path);
        if entry.header().entry_type().is_file() {
            found.insert(name, Member { offset: entry.raw_file_position(), bytes: entry.size() });
        } else if let Ok(Some(target)) = entry.link_name() {
            let symbolic = entry.header().entry_type().is_symlink();
            let from = if symbolic { path.parent().unwrap_or(Path::new("")) } else { Path::new("") };
            links.push((name, normal(&from.join(target))));
        }
    }
    // A link may lead to another; each round follows them one step further.
    for _ in 0..LINKS_DEPTH_MAX {
        links.retain(|(name, target)| match found.get(target).copied() {
            Some(member) => {
                found.insert(name.clone(), member);
                false
            }
            None => true,
        });
    }
    Ok(found)
}

/// A member's name without `.`, `..` and slashes that say nothing. Nothing is opened by it.
fn normal(path: &Path) -> String {
    let mut parts: Vec<String> = Vec::new();
    for part in path.components() {
        match part {
            std::path::Component::Normal(part) => parts.push(part.to_string_lossy().into_owned()),
            std::path::Component::ParentDir => drop(parts.pop()),
            _ => {}
        }
    }
    parts.join("/")
}

/// Part of a file, read without moving the file's own position.
struct Section {
    file: Arc<File>,
    at: u64,
    left: u64,
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let n = self.file.read_at(&mut buffer[..most], self.at)?;
        self.at += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(path: &Path, files: &[(&str, &[u8])], links: &[(&str, &str)]) {
        let mut archive = tar::Builder::new(File::create(path).unwrap());
        // Links first: their targets need not come before them.
        for (name, target) in links {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
            archive.append_link(&mut header, name, target).unwrap();
        }
        for (name, content) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            archive.append_data(&mut header, name, *content).unwrap();
        }
        archive.finish().unwrap();
    }

    #[test]
    fn layers_of_docker_save_may_be_equal_and_may_be_links_to_links() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("saved.tar");
        let manifest = json!([{
            "Config": "c.json",
            "RepoTags": ["registry.test/x:1"],
            "Layers": ["a/layer.tar", "b/layer.tar", "c/layer.tar"],
        }]);
        let manifest = manifest.to_string();
        let files: &[(&str, &[u8])] = &[
            ("manifest.json", manifest.as_bytes()),
            ("c.json", b"{}"),
            ("a/layer.tar", b"same"),
            ("d/layer.tar", b"same"),
        ];
        archive(&path, files, &[("c/layer.tar", "../b/layer.tar"), ("b/layer.tar", "../d/layer.tar")]);
        let blobs = Blobs::open(&path, dir.path()).unwrap();
        let images = blobs.images().unwrap();
        let digests: Vec<_> = images[0].manifest.layers.iter().map(|l| l.descriptor.digest.clone()).collect();
        assert_eq!(digests, vec![Digest::sha256(b"same"); 3]);
        let mut content = Vec::new();
        blobs.open_blob(&digests[0]).unwrap().read_to_end(&mut content).unwrap();
        assert_eq!(content, b"same");
    }

    #[test]
    fn what_is_no_file_is_refused_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, Mode::RUSR, 0).unwrap();
        let error = Blobs::open(&path, dir.path()).err().unwrap();
        assert!(error.to_string().contains("neither a directory nor a regular file"), "{error}");
    }

    #[test]
    fn an_image_takes_its_lease_when_no_sweep_is_under_way() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = Arc::new(crate::snapshot::Overlay::open(&dir.path().join("snapshots")).unwrap());
        let images = Arc::new(Images::open(dir.path(), &super::super::Config::default(), snapshots).unwrap());
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let config = json!({"architecture": architecture, "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}});
        let manifest = json!([{"Config": "c.json", "RepoTags": ["registry.test/x:1"], "Layers": []}]);
        let (config, manifest) = (config.to_string(), manifest.to_string());
        let path = dir.path().join("saved.tar");
        archive(&path, &[("manifest.json", manifest.as_bytes()), ("c.json", config.as_bytes())], &[]);
        let pulling = Arc::clone(&images);
        let sweeping = images.index();
        let pull = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(pulling.preload_entry(&path, None)).unwrap()
        });
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(images.holds.names().is_empty(), "what the sweep does not know of is being relied on");
        drop(sweeping);
        assert_eq!(pull.join().unwrap().unwrap().images.len(), 1);
        assert!(images.find("registry.test/x:1").unwrap().is_some());
    }
}
