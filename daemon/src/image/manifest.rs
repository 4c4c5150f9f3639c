//! What a registry serves: an index, a manifest, an image config. Parsed views; the bytes are kept by others.
//!
//! A document's digest is the digest of its bytes as they came, so a document is never written out from these views:
//! they leave out what they do not need. Both the OCI and the Docker (schema 2) media types are understood.
//!
//! What is refused, and as what:
//!
//! | document | kind | because |
//! |---|---|---|
//! | schema 1, artifacts, unknown layer or config types | `Unimplemented` | the request is right and so is the image; this build cannot run it, and trying again will not help |
//! | malformed, ambiguous, or contradicting its media type | `FailedPrecondition` | the image is broken until somebody pushes a good one |
//! | over a size or a count | `ResourceExhausted` | our limit |
//! | nothing for this platform | `NotFound` | the message lists what there is |
//!
//! This module does no I/O and never follows a `urls` entry of a layer.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use oci_spec::image as oci;
use serde::Deserialize;
use serde::de::{IgnoredAny, SeqAccess, Visitor};

use super::reference::Digest;
use crate::error::{Context, Error, Kind, Result};

/// The largest index, manifest or image config.
pub const DOCUMENT_BYTES_MAX: usize = 4 << 20;
/// The most layers of an image: what overlayfs can stack.
pub const LAYERS_MAX: usize = 500;
/// The most manifests in one index.
pub const INDEX_ENTRIES_MAX: usize = 1000;
/// The most indexes on the way to a manifest.
pub const INDEX_DEPTH_MAX: usize = 4;

const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const DOCKER_SCHEMA_1: &str = "application/vnd.docker.distribution.manifest.v1+json";
const DOCKER_SCHEMA_1_SIGNED: &str = "application/vnd.docker.distribution.manifest.v1+prettyjws";

/// What we ask a registry for, best first.
pub(super) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, */*;q=0.1";

/// A platform that images are built for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// `linux`.
    pub os: String,
    /// Go's name of it: `amd64`, `arm64`.
    pub architecture: String,
    /// `v8`, `v7`; empty if there is only one or it is not said.
    pub variant: String,
}

impl Platform {
    /// A platform from its parts.
    #[must_use]
    pub fn new(os: &str, architecture: &str, variant: &str) -> Platform {
        Platform { os: os.into(), architecture: architecture.into(), variant: variant.into() }.normalised()
    }

    /// The machine this runs on.
    #[must_use]
    pub fn host() -> Platform {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "x86" => "386",
            "aarch64" => "arm64",
            "powerpc64" => "ppc64le",
            "loongarch64" => "loong64",
            other => other,
        };
        Platform::new("linux", architecture, host_variant())
    }

    /// One spelling per platform: tools write `x86_64`, `arm64/v8` and `amd64/v1` for what others leave out.
    fn normalised(self) -> Platform {
        let (architecture, implied) = match self.architecture.to_ascii_lowercase().as_str() {
            "x86_64" | "x86-64" => ("amd64".to_owned(), ""),
            "aarch64" => ("arm64".to_owned(), ""),
            "i386" | "i686" | "x86" => ("386".to_owned(), ""),
            "armhf" => ("arm".to_owned(), "v7"),
            "armel" => ("arm".to_owned(), "v6"),
            other => (other.to_owned(), ""),
        };
        let variant = match (architecture.as_str(), self.variant.to_ascii_lowercase().as_str()) {
            ("amd64", "v1") | ("arm64", "v8" | "8") => String::new(),
            ("arm", "") => if implied.is_empty() { "v7" } else { implied }.to_owned(),
            ("arm", digit @ ("5" | "6" | "7" | "8")) => format!("v{digit}"),
            (_, variant) => variant.to_owned(),
        };
        Platform { os: self.os.to_ascii_lowercase(), architecture, variant }
    }

    /// What this machine can run, best first.
    fn runs(&self) -> Vec<(&str, &str)> {
        let mut all = vec![(self.architecture.as_str(), self.variant.as_str())];
        let older: &[(&str, &str)] = match (self.architecture.as_str(), self.variant.as_str()) {
            ("amd64", "v4") => &[("amd64", "v3"), ("amd64", "v2"), ("amd64", ""), ("386", "")],
            ("amd64", "v3") => &[("amd64", "v2"), ("amd64", ""), ("386", "")],
            ("amd64", "v2") => &[("amd64", ""), ("386", "")],
            ("amd64", _) => &[("386", "")],
            ("arm64", "") => &[("arm", "v8"), ("arm", "v7"), ("arm", "v6"), ("arm", "v5")],
            ("arm64", _) => &[("arm64", ""), ("arm", "v8"), ("arm", "v7"), ("arm", "v6"), ("arm", "v5")],
            ("arm", "v8") => &[("arm", "v7"), ("arm", "v6"), ("arm", "v5")],
            ("arm", "v7") => &[("arm", "v6"), ("arm", "v5")],
            ("arm", "v6") => &[("arm", "v5")],
            _ => &[],
        };
        all.extend_from_slice(older);
        all
    }

    /// How well an image for `other` runs here: 0 is best; nothing if it does not.
    fn rank(&self, other: &Platform) -> Option<usize> {
        if self.os != other.os {
            return None;
        }
        self.runs()
            .iter()
            .position(|(arch, variant)| *arch == other.architecture && *variant == other.variant)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if self.variant.is_empty() { Ok(()) } else { write!(f, "/{}", self.variant) }
    }
}

#[cfg(target_arch = "x86_64")]
fn host_variant() -> &'static str {
    use std::arch::is_x86_feature_detected as has;
    let v2 = has!("cmpxchg16b") && has!("popcnt") && has!("sse4.2") && has!("ssse3");
    let v3 =
        v2 && has!("avx2") && has!("bmi1") && has!("bmi2") && has!("f16c") && has!("fma") && has!("lzcnt");
    let v4 =
        v3 && has!("avx512f") && has!("avx512bw") && has!("avx512cd") && has!("avx512dq") && has!("avx512vl");
    match (v2, v3, v4) {
        (_, _, true) => "v4",
        (_, true, _) => "v3",
        (true, _, _) => "v2",
        _ => "",
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn host_variant() -> &'static str {
    ""
}

/// The name of some bytes in a registry: type, digest and size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// What the bytes are.
    pub media_type: String,
    /// Their digest.
    pub digest: Digest,
    /// How many there are.
    pub size: u64,
}

impl Descriptor {
    fn from_oci(descriptor: &oci::Descriptor) -> Result<Descriptor> {
        let digest = Digest::parse(descriptor.digest().as_ref())
            .map_err(|error| broken(format!("descriptor of type {}: {error}", descriptor.media_type())))?;
        Ok(Descriptor { media_type: descriptor.media_type().to_string(), digest, size: descriptor.size() })
    }

    /// A descriptor of a document: it must have a size that we are ready to read.
    fn document(descriptor: &oci::Descriptor) -> Result<Descriptor> {
        let document = Descriptor::from_oci(descriptor)?;
        if document.size > DOCUMENT_BYTES_MAX as u64 {
            return Err(too_big(format!("{} says it has {} bytes", document.digest, document.size)));
        }
        Ok(document)
    }

    /// Whether this names another index.
    #[must_use]
    pub fn is_index(&self) -> bool {
        matches!(self.media_type.as_str(), OCI_INDEX | DOCKER_LIST)
    }
}

/// An index or a manifest: what a reference resolves to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// Manifests, one for each platform.
    Index(Index),
    /// One image.
    Manifest(Manifest),
}

impl Document {
    /// Reads an index or a manifest. `declared` is the type that the `Content-Type` header or the descriptor gave; what
    /// the document says itself and what it looks like must agree with it, or the same bytes could mean two things.
    ///
    /// # Errors
    /// See the module.
    pub fn parse(declared: Option<&str>, bytes: &[u8]) -> Result<Document> {
        if bytes.len() > DOCUMENT_BYTES_MAX {
            return Err(too_big(format!("a manifest of {} bytes", bytes.len())));
        }
        match media_type(declared, bytes)? {
            kind @ (OCI_INDEX | DOCKER_LIST) => Index::parse(kind, bytes).map(Document::Index),
            kind => Manifest::parse(kind, bytes).map(Document::Manifest),
        }
    }

    /// The type of the document itself.
    #[must_use]
    pub fn media_type(&self) -> &str {
        match self {
            Document::Index(index) => &index.media_type,
            Document::Manifest(manifest) => &manifest.media_type,
        }
    }
}

/// The outline of a document: enough to say what it is, and small whatever comes.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Outline {
    #[serde(default)]
    schema_version: Option<u64>,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    artifact_type: Option<String>,
    #[serde(default)]
    manifests: Option<Count>,
    #[serde(default)]
    layers: Option<Count>,
    #[serde(default)]
    config: Option<IgnoredAny>,
    #[serde(default)]
    fs_layers: Option<IgnoredAny>,
}

/// The length of a list, without the list.
struct Count(usize);

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Count, D::Error> {
        struct Counter;
        impl<'de> Visitor<'de> for Counter {
            type Value = Count;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Count, A::Error> {
                let mut count = 0;
                while list.next_element::<IgnoredAny>()?.is_some() {
                    count += 1;
                }
                Ok(Count(count))
            }
        }
        deserializer.deserialize_seq(Counter)
    }
}

/// Decides what a document is; the answer is one of the four types we read.
pub(super) fn media_type(declared: Option<&str>, bytes: &[u8]) -> Result<&'static str> {
    let outline: Outline = object(bytes, "manifest")?;
    // A generic type says nothing; some registries and mirrors send only that.
    let declared = declared
        .map(|kind| kind.split(';').next().unwrap_or_default().trim())
        .filter(|kind| !matches!(*kind, "" | "application/json" | "application/octet-stream" | "text/plain"));
    let own = outline.media_type.as_deref().filter(|kind| !kind.is_empty());

    for kind in [declared, own].into_iter().flatten() {
        if matches!(kind, DOCKER_SCHEMA_1 | DOCKER_SCHEMA_1_SIGNED) {
            return Err(schema_1());
        }
    }
    if outline.schema_version == Some(1) || outline.fs_layers.is_some() {
        return Err(schema_1());
    }
    if let (Some(declared), Some(own)) = (declared, own)
        && declared != own
    {
        return Err(broken(format!("manifest is served as {declared} and says it is {own}")));
    }
    let image = outline.config.is_some() || outline.layers.is_some();
    let looks_like_index = match (outline.manifests.as_ref(), image) {
        (Some(_), true) => return Err(broken("manifest has both `manifests` and `layers` or `config`")),
        (Some(entries), false) if entries.0 > INDEX_ENTRIES_MAX => {
            return Err(too_big(format!("an index of {} manifests", entries.0)));
        }
        (Some(_), false) => true,
        (None, true) => false,
        (None, false) => {
            let what = outline.artifact_type.or(outline.media_type).unwrap_or_else(|| "no type".into());
            return Err(unsupported(format!("document of {what} is neither an index nor an image manifest")));
        }
    };
    if let Some(layers) = &outline.layers
        && layers.0 > LAYERS_MAX
    {
        return Err(too_big(format!("an image of {} layers", layers.0)));
    }
    let kind = match (declared.or(own), looks_like_index) {
        (Some(OCI_INDEX) | None, true) => OCI_INDEX,
        (Some(DOCKER_LIST), true) => DOCKER_LIST,
        (Some(OCI_MANIFEST) | None, false) => OCI_MANIFEST,
        (Some(DOCKER_MANIFEST), false) => DOCKER_MANIFEST,
        (Some(kind @ (OCI_INDEX | DOCKER_LIST | OCI_MANIFEST | DOCKER_MANIFEST)), _) => {
            return Err(broken(format!("manifest of type {kind} does not look like one")));
        }
        (Some(other), _) => return Err(unsupported(format!("manifests of type {other}"))),
    };
    Ok(kind)
}

/// Manifests, one for each platform (an OCI index or a Docker manifest list).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    media_type: String,
    entries: Vec<Entry>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    descriptor: oci::Descriptor,
    platform: Option<Platform>,
    is_attestation: bool,
}

impl Index {
    fn parse(media_type: &str, bytes: &[u8]) -> Result<Index> {
        let index: oci::ImageIndex = object(bytes, "image index")?;
        let entries = index.manifests().iter().map(Entry::new).collect();
        Ok(Index { media_type: media_type.to_owned(), entries })
    }

    /// The manifest, or the index further down, for this machine. Attestations and other documents about images, which
    /// tools mark with the platform `unknown/unknown`, are never chosen. An entry that does not say its platform is
    /// taken only if no other fits; compare its config by [`ImageConfig::check_platform`].
    ///
    /// # Errors
    /// `NotFound`, listing the platforms there are.
    pub fn choose(&self, platform: &Platform) -> Result<Descriptor> {
        let images = || self.entries.iter().filter(|entry| entry.is_image());
        let best = images()
            .filter_map(|entry| Some((platform.rank(entry.platform.as_ref()?)?, entry)))
            .min_by_key(|(rank, _)| *rank)
            .map(|(_, entry)| entry)
            .or_else(|| images().find(|entry| entry.platform.is_none()));
        match best {
            Some(entry) => Descriptor::document(&entry.descriptor),
            None => Err(Error::not_found(format!("no image for {platform}; there is {}", self.platforms()))),
        }
    }

    fn platforms(&self) -> String {
        const LISTED_MAX: usize = 20;
        let all: BTreeSet<String> = self
            .entries
            .iter()
            .filter(|entry| entry.is_image())
            .filter_map(|entry| entry.platform.as_ref().map(Platform::to_string))
            .collect();
        if all.is_empty() {
            return "none".into();
        }
        let more = if all.len() > LISTED_MAX { ", …" } else { "" };
        let listed: Vec<String> = all.into_iter().take(LISTED_MAX).collect();
        format!("{}{more}", listed.join(", "))
    }
}

impl Entry {
    fn new(descriptor: &oci::Descriptor) -> Entry {
        let platform = descriptor.platform().as_ref().map(|platform| {
            let variant = platform.variant().as_deref().unwrap_or_default();
            Platform::new(&platform.os().to_string(), &platform.architecture().to_string(), variant)
        });
        let is_attestation = descriptor.annotations().as_ref().is_some_and(|annotations| {
            annotations.get("vnd.docker.reference.type").is_some_and(|kind| kind == "attestation-manifest")
        }) || descriptor.artifact_type().is_some();
        Entry { descriptor: descriptor.clone(), platform, is_attestation }
    }

    fn is_image(&self) -> bool {
        let kind = self.descriptor.media_type().to_string();
        let unknown =
            self.platform.as_ref().is_some_and(|p| p.os == "unknown" || p.architecture == "unknown");
        !self.is_attestation
            && !unknown
            && matches!(kind.as_str(), OCI_INDEX | DOCKER_LIST | OCI_MANIFEST | DOCKER_MANIFEST)
    }
}

/// One image: its config and its layers, lowest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    media_type: String,
    /// The image config; its digest is the image id.
    pub config: Descriptor,
    /// The layers, lowest first.
    pub layers: Vec<Layer>,
}

/// How a layer's tar archive is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// A plain tar archive.
    None,
    /// gzip.
    Gzip,
    /// zstd.
    Zstd,
}

/// One layer of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// The packed archive.
    pub descriptor: Descriptor,
    /// How it is packed.
    pub compression: Compression,
    /// The registry need not have it. It is asked all the same; the addresses the manifest names are never followed,
    /// because they could be anybody's.
    pub foreign: bool,
}

impl Manifest {
    fn parse(media_type: &str, bytes: &[u8]) -> Result<Manifest> {
        let manifest: oci::ImageManifest = object(bytes, "image manifest")?;
        let config = Descriptor::document(manifest.config())?;
        if !matches!(config.media_type.as_str(), OCI_CONFIG | DOCKER_CONFIG) {
            let what = manifest.artifact_type().as_ref().map_or(config.media_type, ToString::to_string);
            return Err(unsupported(format!("an artifact of type {what} is not an image")));
        }
        let layers = manifest.layers().iter().map(Layer::new).collect::<Result<_>>()?;
        Ok(Manifest { media_type: media_type.to_owned(), config, layers })
    }

    /// The bytes of all packed layers, each counted as often as it occurs.
    #[must_use]
    pub fn layer_bytes(&self) -> u64 {
        self.layers.iter().fold(0, |sum, layer| sum.saturating_add(layer.descriptor.size))
    }
}

impl Layer {
    fn new(descriptor: &oci::Descriptor) -> Result<Layer> {
        let descriptor = Descriptor::from_oci(descriptor)?;
        let (compression, foreign) = match descriptor.media_type.as_str() {
            "application/vnd.oci.image.layer.v1.tar" | "application/vnd.docker.image.rootfs.diff.tar" => {
                (Compression::None, false)
            }
            "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip" => (Compression::Gzip, false),
            "application/vnd.oci.image.layer.v1.tar+zstd"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd" => (Compression::Zstd, false),
            "application/vnd.oci.image.layer.nondistributable.v1.tar"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar" => (Compression::None, true),
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip" => (Compression::Gzip, true),
            "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd" => (Compression::Zstd, true),
            other => return Err(unsupported(format!("layers of type {other}"))),
        };
        Ok(Layer { descriptor, compression, foreign })
    }
}

/// What the image says about containers made from it. Absent and empty are the same.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageConfig {
    /// When it was built, as written.
    pub created: Option<String>,
    /// `linux`; may be empty.
    pub os: String,
    /// `amd64`; may be empty.
    pub architecture: String,
    /// `v8`; may be empty.
    pub variant: String,
    /// Name or number of user, and group after a colon.
    pub user: String,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// The beginning of the command.
    pub entrypoint: Vec<String>,
    /// The rest of the command, or all of it.
    pub cmd: Vec<String>,
    /// The working directory.
    pub working_dir: String,
    /// Paths that the image wants as volumes.
    pub volumes: BTreeSet<String>,
    /// The signal that ends a container; a name or a number.
    pub stop_signal: String,
    /// `80/tcp`.
    pub exposed_ports: BTreeSet<String>,
    /// Whatever the image's author wrote. Never to be mixed with labels that mean something to us.
    pub labels: BTreeMap<String, String>,
    /// The digests of the unpacked layers, lowest first.
    pub diff_ids: Vec<Digest>,
}

#[derive(Deserialize)]
struct RawConfig {
    created: Option<String>,
    os: Option<String>,
    architecture: Option<String>,
    variant: Option<String>,
    config: Option<RawContainer>,
    rootfs: Option<RawRootfs>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct RawContainer {
    user: Option<String>,
    env: Option<Vec<String>>,
    entrypoint: Option<Words>,
    cmd: Option<Words>,
    working_dir: Option<String>,
    volumes: Option<BTreeMap<String, IgnoredAny>>,
    stop_signal: Option<String>,
    exposed_ports: Option<BTreeMap<String, IgnoredAny>>,
    labels: Option<BTreeMap<String, Option<String>>>,
}

#[derive(Deserialize)]
struct RawRootfs {
    #[serde(rename = "type")]
    kind: Option<String>,
    diff_ids: Option<Vec<Digest>>,
}

/// Old builders wrote a command of one word as text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Words {
    One(String),
    Many(Vec<String>),
}

impl Words {
    fn into_vec(self) -> Vec<String> {
        match self {
            Words::One(word) => vec![word],
            Words::Many(words) => words,
        }
    }
}

impl ImageConfig {
    /// Reads an image config.
    ///
    /// # Errors
    /// See the module.
    pub fn parse(bytes: &[u8]) -> Result<ImageConfig> {
        if bytes.len() > DOCUMENT_BYTES_MAX {
            return Err(too_big(format!("an image config of {} bytes", bytes.len())));
        }
        let raw: RawConfig = object(bytes, "image config")?;
        let rootfs = raw.rootfs.ok_or_else(|| broken("image config has no rootfs"))?;
        if rootfs.kind.as_deref().is_some_and(|kind| !matches!(kind, "" | "layers")) {
            return Err(unsupported("a rootfs that is not made of layers"));
        }
        let diff_ids = rootfs.diff_ids.unwrap_or_default();
        if diff_ids.len() > LAYERS_MAX {
            return Err(too_big(format!("an image of {} layers", diff_ids.len())));
        }
        let container = raw.config.unwrap_or_default();
        Ok(ImageConfig {
            created: raw.created,
            os: raw.os.unwrap_or_default(),
            architecture: raw.architecture.unwrap_or_default(),
            variant: raw.variant.unwrap_or_default(),
            user: container.user.unwrap_or_default(),
            env: container.env.unwrap_or_default(),
            entrypoint: container.entrypoint.map(Words::into_vec).unwrap_or_default(),
            cmd: container.cmd.map(Words::into_vec).unwrap_or_default(),
            working_dir: container.working_dir.unwrap_or_default(),
            volumes: container.volumes.unwrap_or_default().into_keys().collect(),
            stop_signal: container.stop_signal.unwrap_or_default(),
            exposed_ports: container.exposed_ports.unwrap_or_default().into_keys().collect(),
            labels: container
                .labels
                .unwrap_or_default()
                .into_iter()
                .map(|(key, value)| (key, value.unwrap_or_default()))
                .collect(),
            diff_ids,
        })
    }

    /// Each layer must have its digest here, foreign ones too: without it nobody could say that it unpacked right.
    ///
    /// # Errors
    /// `FailedPrecondition`.
    pub fn check_layers(&self, manifest: &Manifest) -> Result<()> {
        if self.diff_ids.len() == manifest.layers.len() {
            return Ok(());
        }
        let (here, there) = (self.diff_ids.len(), manifest.layers.len());
        Err(broken(format!("image config has {here} diff ids and the manifest {there} layers")))
    }

    /// An image without an index says only here what it runs on. Images that do not say are let through.
    ///
    /// # Errors
    /// `NotFound`, as if an index had not had the platform.
    pub fn check_platform(&self, platform: &Platform) -> Result<()> {
        if self.os.is_empty() || self.architecture.is_empty() {
            return Ok(());
        }
        let own = Platform::new(&self.os, &self.architecture, &self.variant);
        match platform.rank(&own) {
            Some(_) => Ok(()),
            None => Err(Error::not_found(format!("no image for {platform}; there is {own}"))),
        }
    }
}

/// Reads a JSON object. A list of the same values is not one, though serde would take it for one.
fn object<'de, T: Deserialize<'de>>(bytes: &'de [u8], what: &str) -> Result<T> {
    if bytes.trim_ascii_start().first() != Some(&b'{') {
        return Err(broken(format!("{what} is not a JSON object")));
    }
    serde_json::from_slice(bytes).context(Kind::FailedPrecondition, || format!("{what} is not valid JSON"))
}

fn broken(why: impl Into<String>) -> Error {
    Error::precondition(why)
}

fn too_big(what: impl fmt::Display) -> Error {
    Error::new(Kind::ResourceExhausted, format!("{what} is more than this runtime accepts"))
}

fn unsupported(what: impl fmt::Display) -> Error {
    Error::new(Kind::Unimplemented, format!("not supported: {what}"))
}

fn schema_1() -> Error {
    unsupported("image manifest schema 1, obsolete since 2017; push the image again with a current tool")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn digest(n: u8) -> Digest {
        Digest::sha256(&[n])
    }

    fn descriptor(media_type: &str, more: &str) -> String {
        format!(r#"{{"mediaType":"{media_type}","digest":"{}","size":7{more}}}"#, digest(0))
    }

    fn manifest(media_type: &str, config: &str, layers: &[&str]) -> String {
        let layers: Vec<String> = layers.iter().map(|kind| descriptor(kind, "")).collect();
        format!(
            r#"{{"schemaVersion":2,"mediaType":"{media_type}","config":{},"layers":[{}],"x-unknown":1}}"#,
            descriptor(config, ""),
            layers.join(",")
        )
    }

    fn index(platforms: &[&str]) -> Index {
        let entries: Vec<String> = platforms
            .iter()
            .enumerate()
            .map(|(n, platform)| {
                let n = u8::try_from(n).unwrap();
                let mut parts = platform.split('/');
                let platform = match (parts.next(), parts.next(), parts.next()) {
                    (Some(os), Some(arch), variant) => format!(
                        r#","platform":{{"os":"{os}","architecture":"{arch}","variant":"{}"}}"#,
                        variant.unwrap_or_default()
                    ),
                    _ => String::new(),
                };
                format!(r#"{{"mediaType":"{OCI_MANIFEST}","digest":"{}","size":1{platform}}}"#, digest(n))
            })
            .collect();
        let text = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","));
        match Document::parse(Some(OCI_INDEX), text.as_bytes()).unwrap() {
            Document::Index(index) => index,
            Document::Manifest(_) => panic!("not an index"),
        }
    }

    #[test]
    fn both_families_of_media_types_are_read() {
        for (kind, config, layer, compression) in [
            (OCI_MANIFEST, OCI_CONFIG, "application/vnd.oci.image.layer.v1.tar", Compression::None),
            (OCI_MANIFEST, OCI_CONFIG, "application/vnd.oci.image.layer.v1.tar+gzip", Compression::Gzip),
            (OCI_MANIFEST, OCI_CONFIG, "application/vnd.oci.image.layer.v1.tar+zstd", Compression::Zstd),
            (
                DOCKER_MANIFEST,
                DOCKER_CONFIG,
                "application/vnd.docker.image.rootfs.diff.tar",
                Compression::None,
            ),
            (
                DOCKER_MANIFEST,
                DOCKER_CONFIG,
                "application/vnd.docker.image.rootfs.diff.tar.gzip",
                Compression::Gzip,
            ),
        ] {
            let text = manifest(kind, config, &[layer]);
            for declared in [Some(kind), None, Some("application/json; charset=utf-8")] {
                let Document::Manifest(parsed) = Document::parse(declared, text.as_bytes()).unwrap() else {
                    panic!("not a manifest");
                };
                assert_eq!((parsed.layers[0].compression, parsed.layers[0].foreign), (compression, false));
                assert_eq!((parsed.layer_bytes(), parsed.config.media_type.as_str()), (7, config));
            }
        }
    }

    #[test]
    fn foreign_layers_are_marked() {
        let text = manifest(
            DOCKER_MANIFEST,
            DOCKER_CONFIG,
            &["application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"],
        );
        let Document::Manifest(parsed) = Document::parse(None, text.as_bytes()).unwrap() else { panic!() };
        assert!(parsed.layers[0].foreign);
    }

    #[test]
    fn what_cannot_be_an_image_here_is_refused_with_its_kind() {
        let layer = "application/vnd.oci.image.layer.v1.tar";
        let long: Vec<&str> = vec![layer; LAYERS_MAX + 1];
        let entry = descriptor(OCI_MANIFEST, "");
        let cases: Vec<(Option<&str>, String, Kind, &str)> = vec![
            (None, "{".into(), Kind::FailedPrecondition, "JSON"),
            (None, "[]".into(), Kind::FailedPrecondition, "JSON"),
            (None, "[".repeat(100_000), Kind::FailedPrecondition, "JSON"),
            (None, r#"{"schemaVersion":1,"fsLayers":[]}"#.into(), Kind::Unimplemented, "schema 1"),
            (Some(DOCKER_SCHEMA_1_SIGNED), "{}".into(), Kind::Unimplemented, "schema 1"),
            (None, "{}".into(), Kind::Unimplemented, "neither an index"),
            (
                None,
                format!(r#"{{"manifests":[{entry}],"layers":[],"config":{entry}}}"#),
                Kind::FailedPrecondition,
                "both",
            ),
            (Some(OCI_INDEX), manifest(OCI_MANIFEST, OCI_CONFIG, &[]), Kind::FailedPrecondition, "served as"),
            (Some(OCI_INDEX), r#"{"config":{},"layers":[]}"#.into(), Kind::FailedPrecondition, "look like"),
            (Some("text/html"), manifest("text/html", OCI_CONFIG, &[]), Kind::Unimplemented, "text/html"),
            (
                None,
                manifest(OCI_MANIFEST, "application/vnd.wasm", &[]),
                Kind::Unimplemented,
                "application/vnd.wasm",
            ),
            (
                None,
                manifest(OCI_MANIFEST, OCI_CONFIG, &["application/x+encrypted"]),
                Kind::Unimplemented,
                "encrypted",
            ),
            (None, manifest(OCI_MANIFEST, OCI_CONFIG, &long), Kind::ResourceExhausted, "501 layers"),
            (
                None,
                manifest(OCI_MANIFEST, OCI_CONFIG, &[]).replace(":7", ":5000000"),
                Kind::ResourceExhausted,
                "5000000 bytes",
            ),
            (
                None,
                manifest(OCI_MANIFEST, OCI_CONFIG, &[]).replace("sha256:", "sha256:../../"),
                Kind::FailedPrecondition,
                "",
            ),
            (
                None,
                manifest(OCI_MANIFEST, OCI_CONFIG, &[layer]).replace("sha256:", "md5:"),
                Kind::FailedPrecondition,
                "digest",
            ),
            (
                None,
                format!(r#"{{"manifests":[{}]}}"#, vec!["0"; INDEX_ENTRIES_MAX + 1].join(",")),
                Kind::ResourceExhausted,
                "1001",
            ),
            (None, " ".repeat(DOCUMENT_BYTES_MAX + 1), Kind::ResourceExhausted, "bytes"),
        ];
        for (declared, text, kind, part) in cases {
            let error = Document::parse(declared, text.as_bytes()).expect_err(part);
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn the_limits_themselves_are_allowed() {
        let layers = vec!["application/vnd.oci.image.layer.v1.tar"; LAYERS_MAX];
        assert!(Document::parse(None, manifest(OCI_MANIFEST, OCI_CONFIG, &layers).as_bytes()).is_ok());
        let entries = vec![descriptor(OCI_MANIFEST, ""); INDEX_ENTRIES_MAX].join(",");
        let text = format!(r#"{{"schemaVersion":2,"manifests":[{entries}]}}"#);
        assert!(Document::parse(None, text.as_bytes()).is_ok());
    }

    #[test]
    fn the_best_platform_is_chosen() {
        let amd64 = Platform::new("linux", "amd64", "");
        let v3 = Platform::new("linux", "x86_64", "v3");
        let arm64 = Platform::new("linux", "aarch64", "");
        let arm7 = Platform::new("linux", "arm", "");
        let cases: &[(&Platform, &[&str], Option<u8>)] = &[
            (&amd64, &["linux/arm64", "linux/amd64"], Some(1)),
            (&amd64, &["linux/amd64/v3", "linux/amd64/v1"], Some(1)),
            (&amd64, &["linux/amd64/v2"], None),
            (&v3, &["linux/amd64", "linux/amd64/v2", "linux/amd64/v4"], Some(1)),
            (&amd64, &["windows/amd64", "linux/386"], Some(1)),
            (&arm64, &["linux/arm/v7", "linux/arm64/v8"], Some(1)),
            (&arm64, &["linux/arm/v5", "linux/arm/v7"], Some(1)),
            (&arm7, &["linux/arm/v6", "linux/arm", "linux/arm64"], Some(1)),
            (&arm7, &["linux/arm/v8"], None),
            (&amd64, &["", "linux/amd64"], Some(1)),
            (&amd64, &["linux/arm64", ""], Some(1)),
            (&amd64, &["unknown/unknown", "linux/arm64"], None),
            (&amd64, &[], None),
        ];
        for (platform, there, chosen) in cases {
            let found = index(there).choose(platform).ok().map(|descriptor| descriptor.digest);
            assert_eq!(found, chosen.map(digest), "{platform} among {there:?}");
        }
    }

    #[test]
    fn attestations_are_never_chosen() {
        for more in [
            r#","platform":{"os":"unknown","architecture":"unknown"}"#,
            r#","annotations":{"vnd.docker.reference.type":"attestation-manifest"}"#,
            r#","platform":{"os":"linux","architecture":"amd64"},"artifactType":"application/x""#,
        ] {
            let text = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, descriptor(OCI_MANIFEST, more));
            let Document::Index(index) = Document::parse(None, text.as_bytes()).unwrap() else { panic!() };
            let error = index.choose(&Platform::new("linux", "amd64", "")).unwrap_err();
            assert_eq!(error.kind(), Kind::NotFound);
            assert!(error.to_string().contains("there is none"), "{error}");
        }
    }

    #[test]
    fn what_there_is_is_listed() {
        let error = index(&["linux/arm64/v8", "windows/amd64"])
            .choose(&Platform::new("linux", "s390x", ""))
            .unwrap_err();
        assert_eq!(error.to_string(), "no image for linux/s390x; there is linux/arm64, windows/amd64");
    }

    #[test]
    fn this_machine_runs_images_for_itself() {
        let host = Platform::host();
        assert_eq!(host.os, "linux");
        assert_eq!(host.rank(&host), Some(0));
        let plain = Platform::new("linux", &host.architecture, "");
        assert!(host.rank(&plain).is_some(), "{host}");
    }

    #[test]
    fn a_config_is_read_and_what_is_missing_is_empty() {
        let full = ImageConfig::parse(
            br#"{"architecture":"arm64","os":"linux","variant":"v8","created":"2026-01-01T00:00:00Z","config":{
            "User":"1:2","Env":["A=b"],"Entrypoint":["/e"],"Cmd":["c"],"WorkingDir":"/w","Volumes":{"/v":{}},
            "StopSignal":"SIGQUIT","ExposedPorts":{"80/tcp":{}},"Labels":{"k":"v"},"Healthcheck":{}},
            "rootfs":{"type":"layers","diff_ids":[]},"history":[{}]}"#,
        )
        .unwrap();
        assert_eq!(
            (full.user.as_str(), full.working_dir.as_str(), full.stop_signal.as_str()),
            ("1:2", "/w", "SIGQUIT")
        );
        assert_eq!(
            (&full.entrypoint[..], &full.cmd[..], &full.env[..]),
            (&["/e".into()][..], &["c".into()][..], &["A=b".into()][..])
        );
        assert!(full.volumes.contains("/v") && full.exposed_ports.contains("80/tcp"));
        assert_eq!(full.labels["k"], "v");
        let nulls = br#"{"config":{"User":null,"Env":null,"Entrypoint":null,"Cmd":"one","Volumes":null,"Labels":null},
            "rootfs":{"diff_ids":null}}"#;
        let nulls = ImageConfig::parse(nulls).unwrap();
        assert_eq!(nulls, ImageConfig { cmd: vec!["one".into()], ..ImageConfig::default() });
        assert_eq!(ImageConfig::parse(br#"{"rootfs":{}}"#).unwrap(), ImageConfig::default());
        for bad in [r"{}", r#"{"rootfs":{"type":"x"}}"#, r#"{"rootfs":{"diff_ids":["sha256:../x"]}}"#, "[]"] {
            assert!(ImageConfig::parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_config_must_fit_its_manifest_and_the_machine() {
        let text = manifest(OCI_MANIFEST, OCI_CONFIG, &["application/vnd.oci.image.layer.v1.tar"]);
        let Document::Manifest(manifest) = Document::parse(None, text.as_bytes()).unwrap() else { panic!() };
        let mut config = ImageConfig { diff_ids: vec![digest(1)], ..ImageConfig::default() };
        assert!(config.check_layers(&manifest).is_ok());
        config.diff_ids.push(digest(2));
        assert_eq!(config.check_layers(&manifest).unwrap_err().kind(), Kind::FailedPrecondition);
        let amd64 = Platform::new("linux", "amd64", "");
        assert!(config.check_platform(&amd64).is_ok(), "an image that does not say is let through");
        (config.os, config.architecture) = ("linux".into(), "arm64".into());
        assert_eq!(config.check_platform(&amd64).unwrap_err().kind(), Kind::NotFound);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Document::parse(None, &bytes);
            let _ = ImageConfig::parse(&bytes);
        }

        #[test]
        fn a_cut_manifest_is_refused(cut in 0_usize..100) {
            let text = manifest(OCI_MANIFEST, OCI_CONFIG, &["application/vnd.oci.image.layer.v1.tar"]);
            prop_assert!(Document::parse(None, &text.as_bytes()[..text.len() - 1 - cut]).is_err());
        }
    }
}
