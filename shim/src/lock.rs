//! The pod's lock: held for as long as the shim lives, by whoever may change the pod.
//!
//! The shim holds it, or `cleanup` when the shim is gone; never both. It belongs to the open file, so it ends with the
//! process, however that ends. The daemon looks whether it is held and never takes it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;

use nix::fcntl::{FcntlArg, fcntl};
use ocid_api::paths::PodPaths;

use crate::error::{Context as _, Result};

/// Takes the lock; `None` if somebody holds it.
pub(crate) fn take(paths: &PodPaths) -> Result<Option<File>> {
    let path = paths.lock();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .context(|| format!("open {}", path.display()))?;
    #[allow(clippy::cast_possible_truncation)] // Constants of the ABI, all small.
    let whole = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole)) {
        Ok(_) => Ok(Some(file)),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => Ok(None),
        Err(e) => Err(e).context(|| format!("lock {}", path.display())),
    }
}
