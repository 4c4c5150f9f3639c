//! Which images there are: one small JSON file per image, replaced atomically, the whole held in memory.
//!
//! An image is its config's digest, as in every answer that names it. Tags and repo digests point to it; a name that
//! moves leaves its old image, and an image may be left with no name at all.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::content::{remove_unfinished, replace};
use super::reference::{Digest, Reference};
use crate::error::{Context, Error, Kind, Result};
use crate::snapshot::ChainId;

/// Shortest beginning of an id that is taken for one.
const ID_PREFIX_MIN: usize = 3;

/// One image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Digest of the config: the image id.
    pub id: Digest,
    /// The config's user, as it is there: a name or number, and a group behind a colon.
    pub user: String,
    /// Names with a tag, in full: `docker.io/library/busybox:1`.
    pub repo_tags: BTreeSet<String>,
    /// Names with the digest by which they were pulled.
    pub repo_digests: BTreeSet<String>,
    /// Digests of the manifests and indexes that led here, kept in the content store with the config.
    pub manifests: BTreeSet<Digest>,
    /// Chain ids of the layers, lowermost first.
    pub chain_ids: Vec<ChainId>,
    /// What the unpacked layers and the metadata take on disk, in bytes.
    pub size: u64,
    /// Whether image garbage collection must leave it.
    #[serde(default)]
    pub pinned: bool,
}

/// All images of a node.
#[derive(Debug)]
pub(super) struct Index {
    dir: PathBuf,
    images: BTreeMap<Digest, Arc<Image>>,
    names: HashMap<String, Digest>,
}

impl Index {
    /// Reads the directory. A file that cannot be understood hides its image, not the others.
    pub(super) fn open(dir: PathBuf) -> Result<Index> {
        let what = || format!("read {}", dir.display());
        fs::create_dir_all(&dir).context(Kind::Internal, what)?;
        remove_unfinished(&dir)?;
        let mut index = Index { dir: dir.clone(), images: BTreeMap::new(), names: HashMap::new() };
        let mut files = Vec::new();
        for entry in fs::read_dir(&dir).context(Kind::Internal, what)? {
            let entry = entry.context(Kind::Internal, what)?;
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                files
                    .push((entry.metadata().and_then(|m| m.modified()).context(Kind::Internal, what)?, path));
            }
        }
        // Oldest first: a crash may have left a moved tag in two files, and the later one is right.
        files.sort();
        for (_, path) in files {
            let image = fs::read(&path)
                .map_err(|e| e.to_string())
                .and_then(|bytes| serde_json::from_slice::<Image>(&bytes).map_err(|e| e.to_string()));
            match image {
                Ok(image) => drop(index.remember(image)),
                Err(error) => {
                    tracing::warn!(file = %path.display(), error, "image record left out; pull the image again")
                }
            }
        }
        Ok(index)
    }

    /// All images, ordered by id.
    pub(super) fn list(&self) -> Vec<Arc<Image>> {
        self.images.values().cloned().collect()
    }

    /// By id, with or without `sha256:`, by any reference, or by a unique prefix of the id. In this order: an image
    /// called `cafe` must not be mistaken for one whose id happens to begin so.
    pub(super) fn find(&self, text: &str) -> Result<Option<Arc<Image>>> {
        let hex = text.strip_prefix("sha256:").unwrap_or(text);
        let whole = self.images.values().find(|image| image.id.hex() == hex);
        let named = || normal(text).and_then(|name| self.images.get(self.names.get(&name)?));
        if let Some(image) = whole.or_else(named) {
            return Ok(Some(Arc::clone(image)));
        }
        if hex.len() >= ID_PREFIX_MIN && hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            let mut matching =
                self.images.iter().filter(|(id, _)| id.hex().starts_with(hex)).map(|(_, image)| image);
            match (matching.next(), matching.next()) {
                (Some(image), None) => return Ok(Some(Arc::clone(image))),
                (Some(_), Some(_)) => {
                    return Err(Error::invalid(format!("{text:?} begins the ids of several images")));
                }
                (None, _) => {}
            }
        }
        Ok(None)
    }

    /// Adds an image, or adds its names and manifests to the one that is there. Its names leave other images.
    pub(super) fn add(&mut self, mut image: Image) -> Result<Arc<Image>> {
        if let Some(old) = self.images.get(&image.id) {
            image.repo_tags.extend(old.repo_tags.iter().cloned());
            image.repo_digests.extend(old.repo_digests.iter().cloned());
            image.manifests.extend(old.manifests.iter().cloned());
            image.pinned |= old.pinned;
        }
        // The new image first: a crash before the old one is rewritten leaves the tag in both, never in none.
        self.write(&image)?;
        let id = image.id.clone();
        for old in self.remember(image) {
            self.write(&old)?;
        }
        Ok(Arc::clone(&self.images[&id]))
    }

    /// Forgets an image under all its names. Unknown is success.
    pub(super) fn remove(&mut self, id: &Digest) -> Result<()> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::with_source(Kind::Internal, format!("delete {}", path.display()), e));
            }
            _ => {}
        }
        self.images.remove(id);
        self.names.retain(|_, named| named != id);
        Ok(())
    }

    /// Puts an image and its names in memory. Returns the images that lost a tag to it.
    fn remember(&mut self, image: Image) -> Vec<Arc<Image>> {
        let losers: BTreeSet<Digest> = image
            .repo_tags
            .iter()
            .filter_map(|tag| self.names.get(tag))
            .filter(|id| **id != image.id)
            .cloned()
            .collect();
        let mut lost = Vec::new();
        for id in losers {
            if let Some(old) = self.images.get_mut(&id) {
                Arc::make_mut(old).repo_tags.retain(|tag| !image.repo_tags.contains(tag));
                lost.push(Arc::clone(old));
            }
        }
        for name in image.repo_tags.iter().chain(&image.repo_digests) {
            self.names.insert(name.clone(), image.id.clone());
        }
        self.images.insert(image.id.clone(), Arc::new(image));
        lost
    }

    fn write(&self, image: &Image) -> Result<()> {
        let bytes =
            serde_json::to_vec(image).context(Kind::Internal, || format!("encode image {}", image.id))?;
        replace(&self.path(&image.id), &bytes)
    }

    fn path(&self, id: &Digest) -> PathBuf {
        self.dir.join(format!("{}.json", id.hex()))
    }
}

/// The full form of a reference, as names are kept: by digest if it has one, else by tag.
fn normal(text: &str) -> Option<String> {
    let reference = Reference::parse(text).ok()?;
    match reference.digest() {
        Some(digest) => Some(reference.repo_digest(digest)),
        None => reference.repo_tag(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(digit: char, tags: &[&str]) -> Image {
        Image {
            id: Digest::parse(&format!("sha256:{}", digit.to_string().repeat(64))).unwrap(),
            user: String::new(),
            repo_tags: tags.iter().map(|t| (*t).to_owned()).collect(),
            repo_digests: BTreeSet::new(),
            manifests: BTreeSet::new(),
            chain_ids: Vec::new(),
            size: 1,
            pinned: false,
        }
    }

    #[test]
    fn an_image_is_found_by_every_kind_of_reference() {
        let dir = tempfile::tempdir().unwrap();
        let mut index = Index::open(dir.path().to_owned()).unwrap();
        let a = index.add(image('a', &["docker.io/library/busybox:latest"])).unwrap();
        for text in [
            "busybox",
            "busybox:latest",
            "docker.io/library/busybox",
            a.id.as_str(),
            a.id.hex(),
            "aaaa",
            "sha256:aaaa",
        ] {
            assert_eq!(index.find(text).unwrap().as_ref(), Some(&a), "{text}");
        }
        assert_eq!(index.find("busybox:1").unwrap(), None);
        assert_eq!(index.find(&"b".repeat(64)).unwrap(), None);
    }

    #[test]
    fn a_name_that_looks_like_the_beginning_of_an_id_is_a_name() {
        let dir = tempfile::tempdir().unwrap();
        let mut index = Index::open(dir.path().to_owned()).unwrap();
        index.add(image('a', &[])).unwrap();
        let named = index.add(image('b', &["docker.io/library/aaa:latest"])).unwrap();
        assert_eq!(index.find("aaa").unwrap(), Some(named));
        assert!(index.find("aaaa").unwrap().unwrap().id.hex().starts_with("aaaa"));
    }

    #[test]
    fn a_tag_moves_to_the_newer_image_and_the_index_survives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let mut index = Index::open(dir.path().to_owned()).unwrap();
        index.add(image('a', &["r.io/x:1", "r.io/x:2"])).unwrap();
        index.add(image('b', &["r.io/x:1"])).unwrap();
        for index in [&index, &Index::open(dir.path().to_owned()).unwrap()] {
            assert!(index.find("r.io/x:1").unwrap().unwrap().id.hex().starts_with("bb"));
            assert!(index.find("r.io/x:2").unwrap().unwrap().id.hex().starts_with("aa"));
        }
    }

    #[test]
    fn removing_an_image_removes_all_its_names() {
        let dir = tempfile::tempdir().unwrap();
        let mut index = Index::open(dir.path().to_owned()).unwrap();
        let a = index.add(image('a', &["r.io/x:1", "q.io/x:1"])).unwrap();
        index.remove(&a.id).unwrap();
        index.remove(&a.id).unwrap();
        assert_eq!(index.find("q.io/x:1").unwrap(), None);
        assert!(Index::open(dir.path().to_owned()).unwrap().list().is_empty());
    }
}
