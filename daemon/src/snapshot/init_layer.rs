//! The layer on top of every image: real directories where the runtime mounts.
//!
//! An image may have made `/dev`, `/proc`, `/sys` or `/etc` a symlink, and a runtime that mounts there would follow it.
//! With these directories and files above the image's, there is nothing to follow; where the image has directories
//! too, overlayfs merges them. It is made once, in a bare directory, before anything of an image is near.

use std::fs::{DirBuilder, OpenOptions, Permissions, set_permissions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use crate::error::{Context, Kind, Result};

const DIRS: [&str; 4] = ["dev", "proc", "sys", "etc"];
const FILES: [&str; 3] = ["etc/hosts", "etc/hostname", "etc/resolv.conf"];

/// Fills an empty directory.
pub(super) fn write(dir: &Path) -> Result<()> {
    for name in DIRS {
        let path = dir.join(name);
        DirBuilder::new()
            .mode(0o755)
            .create(&path)
            .context(Kind::Internal, || format!("make {}", path.display()))?;
        mode(&path, 0o755)?;
    }
    for name in FILES {
        let path = dir.join(name);
        let made = OpenOptions::new().write(true).create_new(true).mode(0o644).open(&path);
        made.context(Kind::Internal, || format!("make {}", path.display()))?;
        mode(&path, 0o644)?;
    }
    mode(dir, 0o755)
}

/// Sets a mode whatever the umask.
fn mode(path: &Path, mode: u32) -> Result<()> {
    set_permissions(path, Permissions::from_mode(mode))
        .context(Kind::Internal, || format!("set the mode of {}", path.display()))
}
