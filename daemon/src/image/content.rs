//! Manifests, indexes and image configs by digest.
//!
//! A blob has its name only once it is whole and verified, and is immutable from then on. Layers are not kept here:
//! they are unpacked while they arrive, and what is verified of them is their snapshot.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::reference::Digest;
use crate::error::{Context, Error, Kind, Result};

/// Extension of files that are being written.
const UNFINISHED: &str = "tmp";

/// The blobs of one node.
#[derive(Debug)]
pub(super) struct Content {
    dir: PathBuf,
}

impl Content {
    pub(super) fn open(dir: PathBuf) -> Result<Content> {
        fs::create_dir_all(&dir).context(Kind::Internal, || format!("create {}", dir.display()))?;
        remove_unfinished(&dir)?;
        Ok(Content { dir })
    }

    /// Keeps bytes under their digest, which must be `digest`.
    pub(super) fn put(&self, digest: &Digest, bytes: &[u8]) -> Result<()> {
        if !digest.matches(bytes) {
            return Err(Error::invalid(format!("digest mismatch: {} bytes are not {digest}", bytes.len())));
        }
        // What is there is kept only if it is right: this is how a damaged one is healed.
        if self.get(digest).is_ok() { Ok(()) } else { replace(&self.path(digest), bytes) }
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
            let name = entry.file_name();
            // What somebody is writing just now belongs to the digest that it begins with.
            let hex = name.to_str().and_then(|name| name.split('.').next());
            if !hex.is_some_and(&keep) {
                match fs::remove_file(entry.path()) {
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    removed => removed.context(Kind::Internal, what)?,
                }
            }
        }
        Ok(())
    }

    /// Digests of different algorithms differ in length, so the hexadecimal part is enough of a name.
    fn path(&self, digest: &Digest) -> PathBuf {
        self.dir.join(digest.hex())
    }
}

/// Replaces a file atomically and durably: who reads it sees the old or the new bytes, also after a power cut. Several
/// may do so at once; one of them is last.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    // A name of its own: two who write the same file must not write into each other's.
    let temporary = path.with_extension(format!("{}.{UNFINISHED}", COUNT.fetch_add(1, Ordering::Relaxed)));
    let write = || -> io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
    };
    let written = write();
    if written.is_err() {
        // A full disk must not be filled further. Where nothing was made there is nothing to delete.
        fs::remove_file(&temporary).ok();
    }
    written.context(Kind::Internal, || format!("write {}", path.display()))
}

/// Deletes what a crash in [`replace`] left. Only before anybody writes.
pub(super) fn remove_unfinished(dir: &Path) -> Result<()> {
    let what = || format!("clean {}", dir.display());
    for entry in fs::read_dir(dir).context(Kind::Internal, what)? {
        let path = entry.context(Kind::Internal, what)?.path();
        if path.extension().is_some_and(|extension| extension == UNFINISHED) {
            fs::remove_file(&path).context(Kind::Internal, what)?;
        }
    }
    Ok(())
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
    fn a_damaged_blob_is_healed_by_the_next_that_brings_it() {
        let dir = tempfile::tempdir().unwrap();
        let content = Content::open(dir.path().to_owned()).unwrap();
        let digest = Digest::sha256(b"hello");
        fs::write(dir.path().join(digest.hex()), b"jello").unwrap();
        content.put(&digest, b"hello").unwrap();
        assert_eq!(content.get(&digest).unwrap(), b"hello");
    }

    #[test]
    fn many_may_bring_the_same_blob_while_a_sweep_runs() {
        let dir = tempfile::tempdir().unwrap();
        let content = Content::open(dir.path().to_owned()).unwrap();
        let bytes = vec![7; 1 << 16];
        let digest = Digest::sha256(&bytes);
        let path = dir.path().join("same.json");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        content.put(&digest, &bytes).unwrap();
                        replace(&path, &bytes).unwrap();
                        assert_eq!(fs::read(&path).unwrap().len(), bytes.len());
                    }
                });
            }
            scope.spawn(|| {
                (0..50).for_each(|_| content.sweep(|hex| hex == digest.hex() || hex == "same").unwrap())
            });
        });
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn what_a_crash_left_unfinished_is_deleted_when_opened() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("abc.3.tmp"), b"half").unwrap();
        Content::open(dir.path().to_owned()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
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
