//! Files of the pod: what the daemon wants bound into containers, and the pod's /dev/shm.

use std::path::Path;

use ocid_api::paths::PodPaths;
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

use crate::container::rootfs;
use crate::error::{Context as _, Error, Result};
use crate::record;

/// Bound on the files of a pod together, in bytes.
const BYTES_MAX: usize = 1 << 20;

/// A file to make.
pub(super) struct File<'a> {
    /// A single path component.
    pub(super) name: &'a str,
    /// What is in it.
    pub(super) content: &'a [u8],
    /// Permission bits.
    pub(super) mode: u32,
}

/// Refuses what must not be made, before anything is.
pub(super) fn check(files: &[File<'_>]) -> Result<()> {
    for file in files {
        let single = !matches!(file.name, "" | "." | "..")
            && !file.name.contains(['/', '\0'])
            && file.name.len() < 256;
        if !single {
            return Err(Error::invalid(format!("{:?} is not a file name", file.name)));
        }
        if file.mode & !0o777 != 0 {
            return Err(Error::invalid(format!(
                "file {}: mode {:o} has more than permissions",
                file.name, file.mode
            )));
        }
    }
    if files.iter().map(|file| file.content.len()).sum::<usize>() > BYTES_MAX {
        return Err(Error::invalid(format!("the pod's files have more than {BYTES_MAX} bytes together")));
    }
    Ok(())
}

/// Makes the files.
pub(super) fn make(paths: &PodPaths, files: &[File<'_>]) -> Result<()> {
    if files.is_empty() {
        return Ok(());
    }
    let dir = paths.files();
    record::make_dir(&dir).context(|| format!("make {}", dir.display()))?;
    for file in files {
        record::write_file(&dir.join(file.name), file.content, file.mode)
            .context(|| format!("write the pod's {}", file.name))?;
    }
    Ok(())
}

/// Mounts the pod's /dev/shm.
pub(super) fn mount_shm(path: &Path, bytes: u64) -> Result<()> {
    record::make_dir(path).context(|| format!("make {}", path.display()))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let options = std::ffi::CString::new(format!("mode=1777,size={bytes}"))
        .map_err(|_| Errno::INVAL)
        .context(|| "options of /dev/shm".to_owned())?;
    mount(c"shm", path, c"tmpfs", flags, &*options).context(|| "mount the pod's /dev/shm".to_owned())
}

/// Unmounts the pod's /dev/shm.
pub(crate) fn unmount_shm(path: &Path) -> Result<()> {
    rootfs::unmount_at(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_a_single_component_with_permissions_and_bounded() {
        let file = |name, mode, content| File { name, content, mode };
        assert!(check(&[file("hosts", 0o644, b"x"), file("..a", 0, b"")]).is_ok());
        for name in ["", ".", "..", "a/b", "/", "a\0"] {
            assert!(check(&[file(name, 0o644, b"")]).is_err(), "{name:?}");
        }
        assert!(check(&[file("a", 0o4755, b"")]).is_err());
        let half = vec![0; BYTES_MAX / 2 + 1];
        assert!(check(&[file("a", 0o600, &half)]).is_ok());
        assert!(check(&[file("a", 0o600, &half), file("b", 0o600, &half)]).is_err());
    }
}
