//! Root filesystems from layers.
//!
//! ```text
//! stage ──▶ (somebody unpacks a layer into it) ──▶ commit under its chain id ──▶ remove_layer
//! prepare(container, chain ids) ──▶ lower + upper + work, for the shim to mount ──▶ remove(container)
//! ```
//!
//! The contract, which `conformance` spells out as tests:
//!
//! - A layer appears whole or not at all, and never changes once it has its name. Committing it twice is success.
//! - A chain id names a layer *and* everything under it, so equal ids mean equal files.
//! - Whatever is prepared, removed or committed twice is so once. What a crash leaves behind is gone after `open`.
//! - Nothing here is mounted where anybody can see it: the shim mounts a container's root filesystem.

#[cfg(test)]
mod conformance;
mod init_layer;
mod overlay;
mod tree;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use rustix::fs::Stat;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::Error;

pub use overlay::{Condemned, LAYERS_MAX, Overlay, Stage};
pub(crate) use tree::remove_entry;
pub use tree::{remove_tree, tree_usage};

/// What a tree uses of its file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Allocated, not apparent: a hole costs nothing.
    pub bytes: u64,
    /// Files, directories and all else.
    pub inodes: u64,
}

impl Usage {
    pub(crate) fn add(&mut self, stat: &Stat) {
        self.bytes =
            self.bytes.saturating_add(u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512));
        self.inodes = self.inodes.saturating_add(1);
    }
}

/// Names a layer on top of certain others: the digest of its diff id and theirs, as the OCI image spec defines it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ChainId(Box<str>);

impl TryFrom<String> for ChainId {
    type Error = Error;
    fn try_from(text: String) -> Result<ChainId, Error> {
        text.parse()
    }
}

impl From<ChainId> for String {
    fn from(id: ChainId) -> String {
        id.to_string()
    }
}

impl ChainId {
    /// The chain ids of an image's layers, from the bottom up, given their diff ids (`sha256:…`).
    ///
    /// # Errors
    /// If a diff id is not a SHA-256 digest.
    pub fn chain<T: AsRef<str>>(diff_ids: &[T]) -> Result<Vec<ChainId>, Error> {
        let mut chain: Vec<ChainId> = Vec::with_capacity(diff_ids.len());
        for diff_id in diff_ids {
            let diff_id: ChainId = diff_id.as_ref().parse()?; // of the same form
            chain.push(match chain.last() {
                None => diff_id,
                Some(below) => ChainId(hex::encode(Sha256::digest(format!("{below} {diff_id}"))).into()),
            });
        }
        Ok(chain)
    }

    /// The 64 digits, without the algorithm: safe as a path component.
    pub fn hex(&self) -> &str {
        &self.0
    }
}

impl FromStr for ChainId {
    type Err = Error;

    /// Accepts `sha256:` and 64 lowercase hexadecimal digits.
    fn from_str(text: &str) -> Result<ChainId, Error> {
        let hex = text.strip_prefix("sha256:").filter(|hex| {
            hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        });
        hex.map(|hex| ChainId(hex.into())).ok_or_else(|| {
            let shown: String = text.chars().take(80).collect();
            Error::invalid(format!("{shown:?} is not a SHA-256 digest"))
        })
    }
}

impl fmt::Display for ChainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

impl fmt::Debug for ChainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// What the shim mounts: the arguments of an overlay mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rootfs {
    /// Read-only directories, uppermost first. The first is the init layer, where there is room for it.
    pub lower: Vec<PathBuf>,
    /// Receives what the container writes.
    pub upper: PathBuf,
    /// The kernel's own.
    pub work: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_ids_follow_the_image_spec() {
        let diff_ids = [format!("sha256:{}", "a".repeat(64)), format!("sha256:{}", "b".repeat(64))];
        let chain = ChainId::chain(&diff_ids).unwrap();
        assert_eq!(chain[0].to_string(), diff_ids[0]);
        let expected = Sha256::digest(format!("{} {}", diff_ids[0], diff_ids[1]));
        assert_eq!(chain[1].hex(), hex::encode(expected));
    }

    #[test]
    fn only_lowercase_sha256_digests_are_chain_ids() {
        let good = format!("sha256:{}", "0123456789abcdef".repeat(4));
        assert!(good.parse::<ChainId>().is_ok());
        for bad in
            ["", "sha256:", "sha256:../x", &good[7..], &good.to_uppercase(), &good.replace("sha256", "sha1")]
        {
            assert!(bad.parse::<ChainId>().is_err(), "{bad}");
        }
    }
}
