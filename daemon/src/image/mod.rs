//! Images: what a name means, where it is fetched, what was fetched.
//!
//! ```text
//! PullImage ─▶ registry: reference ─▶ manifest, config ┐
//! preload/  ─▶ archive: names ─▶ manifest, config      ├─▶ pull: layers ─▶ unpack ─▶ snapshots ─▶ index: names
//!                                                      ┘   (several at a time, each unpacked while it arrives)
//! ```
//!
//! An image is its config's digest. It is in the index only once all of it is on stable storage, so that after a crash
//! it is there whole or not at all; whatever was unpacked before stays and is used by the next pull.
//!
//! What nobody needs is swept: a layer stays as long as an image in the index, a container ([`Lease`]) or a pull under
//! way needs it. No lock is held while files are deleted: what is condemned loses its name first.

mod archive;
pub mod auth;
mod content;
pub mod hosts;
mod import;
mod index;
pub mod layer;
pub mod manifest;
mod pull;
pub mod reference;
pub mod registry;
pub mod unpack;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore};

pub use index::Image;

use crate::error::{Context, Error, Kind, Result};
use crate::section;
use crate::snapshot::{ChainId, Condemned, Overlay, Usage};
use content::Content;
use index::Index;
use manifest::ImageConfig;

section! {
    /// Images and registries.
    pub struct Config {
        /// Where the configuration of each registry is: `<host>/hosts.toml`, as containerd reads it.
        certs_dir: PathBuf = hosts::CERTS_DIR_DEFAULT.into(),
        /// OCI layouts and `docker save` archives in this directory are imported at start. Empty means `preload` in
        /// the root directory.
        preload_dir: PathBuf = PathBuf::new(),
        /// How many layers are fetched and unpacked at a time, over all pulls.
        parallel_layers: usize = 3,
        /// How long a connection to a registry may take, in seconds.
        connect_timeout_s: u64 = 10,
        /// How long a registry may send nothing, in seconds.
        stall_timeout_s: u64 = 60,
        /// Bytes per second below which a registry is given up; 0 takes any rate.
        bytes_per_second_min: u64 = 1024,
    }
}

/// All images of a node.
pub struct Images {
    index: Mutex<Index>,
    content: Content,
    snapshots: Arc<Overlay>,
    client: registry::Client,
    holds: Arc<Holds>,
    turns: pull::Turns,
    permits: Semaphore,
    preload_dir: PathBuf,
    root: PathBuf,
}

impl fmt::Debug for Images {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Images({})", self.root.display())
    }
}

impl Images {
    /// Opens the store below `root`.
    ///
    /// # Errors
    /// If its directories cannot be made or read.
    pub fn open(root: &Path, config: &Config, snapshots: Arc<Overlay>) -> Result<Images> {
        let preload_dir = if config.preload_dir.as_os_str().is_empty() {
            root.join("preload")
        } else {
            config.preload_dir.clone()
        };
        Ok(Images {
            index: Mutex::new(Index::open(root.join("images"))?),
            content: Content::open(root.join("content"))?,
            snapshots,
            client: registry::Client::new(registry::Config {
                certs_dir: config.certs_dir.clone(),
                connect_timeout: Duration::from_secs(config.connect_timeout_s),
                stall_timeout: Duration::from_secs(config.stall_timeout_s),
                bytes_per_second_min: config.bytes_per_second_min,
                ..registry::Config::default()
            }),
            holds: Arc::default(),
            turns: pull::Turns::default(),
            permits: Semaphore::new(config.parallel_layers.max(1)),
            preload_dir,
            root: root.to_owned(),
        })
    }

    /// All images, ordered by id.
    pub fn list(&self) -> Vec<Arc<Image>> {
        self.index().list()
    }

    /// The image of an id, of a beginning of one, or of any reference; `None` if there is none.
    ///
    /// # Errors
    /// If the beginning of an id is that of several.
    pub fn find(&self, text: &str) -> Result<Option<Arc<Image>>> {
        self.index().find(text)
    }

    /// The image that a container is to run, and a lease on its layers.
    ///
    /// # Errors
    /// `NotFound` if it has not been pulled.
    pub fn lease(&self, text: &str) -> Result<(Arc<Image>, Lease)> {
        // The index stays locked, so that no sweep comes between.
        let index = self.index();
        let shown: String = text.chars().take(200).collect();
        let image = index
            .find(text)?
            .ok_or_else(|| Error::not_found(format!("image {shown:?} is not here; pull it")))?;
        let lease = self.lease_layers(&image.chain_ids);
        Ok((image, lease))
    }

    /// A lease on the layers of a container that is on record.
    pub fn lease_layers(&self, chain_ids: &[ChainId]) -> Lease {
        Lease::new(&self.holds, chain_ids.iter().map(|id| id.hex().to_owned()), true)
    }

    /// What the image's config says.
    ///
    /// # Errors
    /// If it is damaged.
    pub fn config(&self, image: &Image) -> Result<ImageConfig> {
        ImageConfig::parse(&self.raw_config(image)?)
    }

    /// The image's config as it came.
    ///
    /// # Errors
    /// If it is damaged.
    pub fn raw_config(&self, image: &Image) -> Result<Vec<u8>> {
        self.content.get(&image.id)
    }

    /// Forgets an image under all its names. Its layers go too, unless something else needs them. Unknown is success.
    ///
    /// # Errors
    /// If the index cannot be changed or a layer cannot be deleted.
    pub async fn remove(self: &Arc<Images>, text: &str) -> Result<()> {
        {
            let mut index = self.index();
            let Some(image) = index.find(text)? else { return Ok(()) };
            index.remove(&image.id)?;
            tracing::info!(image = %image.id, names = ?image.repo_tags, "image removed");
        }
        let images = Arc::clone(self);
        tokio::task::spawn_blocking(move || images.sweep())
            .await
            .context(Kind::Internal, || "sweep".into())?
    }

    /// Deletes the layers and documents that nothing needs.
    ///
    /// # Errors
    /// If one cannot be deleted.
    pub fn sweep(&self) -> Result<()> {
        let mut condemned = Vec::new();
        let swept = self.condemn(&mut condemned);
        condemned.into_iter().map(Condemned::remove).fold(swept, Result::and)
    }

    /// Takes the names of what nothing needs away.
    fn condemn(&self, condemned: &mut Vec<Condemned>) -> Result<()> {
        // Leases are taken under this lock too: who wants a layer next finds it whole or not at all.
        let index = self.index();
        let live = self.live(&index);
        for chain_id in self.snapshots.layers()? {
            if !live.contains(chain_id.hex()) {
                condemned.extend(self.snapshots.condemn_layer(&chain_id)?);
            }
        }
        self.content.sweep(|hex| live.contains(hex))
    }

    /// Runs for ever: sweeps whenever a container's lease has ended on a layer that nothing else needs.
    pub async fn sweep_released(self: Arc<Images>) {
        loop {
            self.holds.freed.notified().await;
            let released = self.holds.take_released();
            let live = self.live(&self.index());
            if released.iter().all(|name| live.contains(name)) {
                continue;
            }
            let images = Arc::clone(&self);
            match tokio::task::spawn_blocking(move || images.sweep()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::error!(%error, "layers that nobody needs could not be deleted"),
                Err(error) => tracing::error!(%error, "a sweep has failed"),
            }
        }
    }

    /// What the images take on disk, and where.
    pub fn usage(&self) -> (Usage, PathBuf) {
        let mut seen = HashSet::new();
        let mut usage = Usage::default();
        for image in self.list() {
            for chain_id in &image.chain_ids {
                if seen.insert(chain_id.clone())
                    && let Ok(layer) = self.snapshots.usage(chain_id)
                {
                    usage.bytes = usage.bytes.saturating_add(layer.bytes);
                    usage.inodes = usage.inodes.saturating_add(layer.inodes);
                }
            }
        }
        (usage, self.root.clone())
    }

    /// The hexadecimal names of all layers and documents that something needs.
    fn live(&self, index: &Index) -> HashSet<String> {
        let mut live = self.holds.names();
        for image in index.list() {
            live.insert(image.id.hex().to_owned());
            live.extend(image.manifests.iter().map(|digest| digest.hex().to_owned()));
            live.extend(image.chain_ids.iter().map(|id| id.hex().to_owned()));
        }
        live
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps layers and documents from being swept as long as it lives.
#[derive(Debug)]
pub struct Lease {
    holds: Arc<Holds>,
    names: Vec<String>,
    /// Whether its end lets a sweep begin. That of a pull does not: what it has fetched stays for the next.
    frees: bool,
}

impl Lease {
    fn new(holds: &Arc<Holds>, names: impl IntoIterator<Item = String>, frees: bool) -> Lease {
        let names: Vec<String> = names.into_iter().collect();
        let mut counts = holds.lock();
        for name in &names {
            *counts.held.entry(name.clone()).or_default() += 1;
        }
        Lease { holds: Arc::clone(holds), names, frees }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut counts = self.holds.lock();
        for name in self.names.drain(..) {
            if let Some(count) = counts.held.get_mut(&name) {
                *count -= 1;
                if *count == 0 {
                    counts.held.remove(&name);
                    if self.frees {
                        counts.released.push(name);
                    }
                }
            }
        }
        if !counts.released.is_empty() {
            self.holds.freed.notify_one();
        }
    }
}

/// How many leases there are on each name.
#[derive(Debug, Default)]
struct Holds {
    counts: Mutex<Counts>,
    /// Told when something is released.
    freed: Notify,
}

#[derive(Debug, Default)]
struct Counts {
    held: HashMap<String, usize>,
    released: Vec<String>,
}

impl Holds {
    fn names(&self) -> HashSet<String> {
        self.lock().held.keys().cloned().collect()
    }

    fn take_released(&self) -> Vec<String> {
        std::mem::take(&mut self.lock().released)
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn images() -> (tempfile::TempDir, Arc<Images>) {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = Arc::new(Overlay::open(&dir.path().join("snapshots")).unwrap());
        let images = Images::open(dir.path(), &Config::default(), snapshots).unwrap();
        (dir, Arc::new(images))
    }

    fn layer(images: &Images, digit: char) -> ChainId {
        let id: ChainId = format!("sha256:{}", digit.to_string().repeat(64)).parse().unwrap();
        images.snapshots.stage().unwrap().commit(&id, Usage::default()).unwrap();
        id
    }

    #[tokio::test]
    async fn a_layer_goes_when_the_last_container_on_it_has_gone_whoever_drops_it() {
        let (_dir, images) = images();
        let id = layer(&images, 'a');
        let sweeper = tokio::spawn(Arc::clone(&images).sweep_released());
        let chain = std::slice::from_ref(&id);
        let (one, two) = (images.lease_layers(chain), images.lease_layers(chain));
        images.sweep().unwrap();
        drop(one);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(images.snapshots.has(&id));
        drop(two);
        for _ in 0..500 {
            if !images.snapshots.has(&id) {
                sweeper.abort();
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the layer stays");
    }

    #[tokio::test]
    async fn what_a_failed_pull_has_fetched_stays_for_the_next() {
        let (_dir, images) = images();
        let id = layer(&images, 'a');
        let sweeper = tokio::spawn(Arc::clone(&images).sweep_released());
        drop(Lease::new(&images.holds, [id.hex().to_owned()], false));
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(images.snapshots.has(&id));
        sweeper.abort();
    }
}
