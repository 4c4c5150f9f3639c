//! Manifests, indexes and image configs by digest.
//!
//! A blob has its name only once it is whole and verified, and is immutable from then on. Layers are not kept here:
//! they are unpacked while they arrive, and what is verified of them is their snapshot.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::reference::Digest;
use crate::error::{Context, Error, Kind, Result};

/// The blobs of one node.
#[derive(Debug)]
pub(super) struct Content {
    dir: PathBuf,
}

impl Content {
    pub(super) fn open(dir: PathBuf) -> Result<Content> {
        fs::create_dir_all(&dir).context(Kind::Internal, || format!("create {}", dir.display()))?;
        Ok(Content { dir })
    }

    /// Keeps bytes under their digest, which must be `digest`.
    pub(super) fn put(&self, digest: &Digest, bytes: &[u8]) -> Result<()> {
        if !digest.matches(bytes) {
            return Err(Error::invalid(format!("digest mismatch: {} bytes are not {digest}", bytes.len())));
        }
        let path = self.path(digest);
        if path.exists() { Ok(()) } else { replace(&path, bytes) }
    }

    /// The bytes of a digest.
    pub(super) fn get(&self, digest: &Digest) -> Result<Vec<u8>> {
        let path = self.path(digest);
        let bytes = fs::read(&path).context(Kind::Internal, || format!("read {}", path.display()))?;
        // A disk may lie, and what is read here decides what runs.
        if digest.matches(&bytes) {
            return Ok(bytes);
        }
        Err(Error::internal(format!("{} is damaged: pull the image again", path.display())))
    }

    /// Deletes every blob whose digest's hexadecimal part `keep` does not name.
    pub(super) fn sweep(&self, keep: impl Fn(&str) -> bool) -> Result<()> {
        let what = || format!("sweep {}", self.dir.display());
        for entry in fs::read_dir(&self.dir).context(Kind::Internal, what)? {
            let entry = entry.context(Kind::Internal, what)?;
            if !entry.file_name().to_str().is_some_and(&keep) {
                fs::remove_file(entry.path()).context(Kind::Internal, what)?;
            }
        }
        Ok(())
    }

    /// Digests of different algorithms differ in length, so the hexadecimal part is enough of a name.
    fn path(&self, digest: &Digest) -> PathBuf {
        self.dir.join(digest.hex())
    }
}

/// Replaces a file atomically and durably: who reads it sees the old or the new bytes, also after a power cut.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> io::Result<()> {
        let temporary = path.with_extension("tmp");
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
    };
    write().context(Kind::Internal, || format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_is_kept_only_under_its_own_digest_and_checked_when_read() {
        let dir = tempfile::tempdir().unwrap();
        let content = Content::open(dir.path().join("c")).unwrap();
        let digest = Digest::sha256(b"hello");
        assert!(content.put(&digest, b"hullo").is_err());
        content.put(&digest, b"hello").unwrap();
        assert_eq!(content.get(&digest).unwrap(), b"hello");
        fs::write(dir.path().join("c").join(digest.hex()), b"jello").unwrap();
        assert!(content.get(&digest).unwrap_err().to_string().contains("damaged"));
    }

    #[test]
    fn a_sweep_leaves_what_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let content = Content::open(dir.path().to_owned()).unwrap();
        let (a, b) = (Digest::sha256(b"a"), Digest::sha256(b"b"));
        content.put(&a, b"a").unwrap();
        content.put(&b, b"b").unwrap();
        content.sweep(|hex| hex == a.hex()).unwrap();
        assert!(content.get(&a).is_ok() && content.get(&b).is_err());
    }
}
