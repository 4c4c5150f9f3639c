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
//! way needs it.

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

use tokio::sync::Semaphore;

pub use index::Image;

use crate::error::{Context, Error, Kind, Result};
use crate::section;
use crate::snapshot::{ChainId, Overlay, Usage};
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
        Lease::new(&self.holds, chain_ids.iter().map(|id| id.hex().to_owned()))
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
        // Locked until all is deleted: who wants a layer next finds it whole or not at all.
        let index = self.index();
        let live = self.live(&index);
        for chain_id in self.snapshots.layers()? {
            if !live.contains(chain_id.hex()) {
                self.snapshots.remove_layer(&chain_id)?;
            }
        }
        self.content.sweep(|hex| live.contains(hex))
    }

    /// [`Images::sweep`], if a lease has ended on a layer that nothing else needs.
    ///
    /// # Errors
    /// As [`Images::sweep`].
    pub fn sweep_released(&self) -> Result<()> {
        let released = self.holds.take_released();
        if released.is_empty() {
            return Ok(());
        }
        let live = self.live(&self.index());
        if released.iter().all(|name| live.contains(name)) { Ok(()) } else { self.sweep() }
    }

    /// What the images take on disk, and where.
    pub fn usage(&self) -> (Usage, &Path) {
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
        (usage, &self.root)
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
}

impl Lease {
    fn new(holds: &Arc<Holds>, names: impl IntoIterator<Item = String>) -> Lease {
        let names: Vec<String> = names.into_iter().collect();
        let mut counts = holds.lock();
        for name in &names {
            *counts.held.entry(name.clone()).or_default() += 1;
        }
        Lease { holds: Arc::clone(holds), names }
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
                    counts.released.push(name);
                }
            }
        }
    }
}

/// How many leases there are on each name.
#[derive(Debug, Default)]
struct Holds(Mutex<Counts>);

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
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
