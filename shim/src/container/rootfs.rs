//! Mounts and unmounts a container's root filesystem.
//!
//! Layers are handed to the kernel as descriptors, so that neither their number nor the characters in their paths
//! matter: an option string is limited to a page and gives meaning to `:` and `,`. Older kernels get names in
//! /proc/self/fd, first one option per layer, then one option for all.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_fd, fsconfig_set_string, fsmount, fsopen, mount, mount_bind, mount_remount, move_mount,
    unmount,
};

use crate::error::{Context as _, Error, Result};

/// What overlayfs takes.
const LAYERS_MAX: usize = 500;
/// Room for the options of mount(2): a page, with its final zero byte.
const OPTIONS_BYTES_MAX: usize = 4095;
/// How many mounts on top of each other are taken away.
const STACKED_MAX: usize = 8;

/// Where the layers of a root filesystem are.
pub(super) struct Rootfs<'a> {
    /// Uppermost first.
    pub(super) lower: &'a [String],
    /// Writable layer and overlayfs' work directory; both empty if nobody writes.
    pub(super) upper: &'a str,
    pub(super) work: &'a str,
}

/// The layers, open.
struct Layers {
    lower: Vec<OwnedFd>,
    /// Writable layer and work directory.
    upper: Option<(OwnedFd, OwnedFd)>,
}

/// Mounts the root filesystem at `target`, an empty directory.
pub(super) fn mount_at(rootfs: &Rootfs<'_>, target: &Path) -> Result<()> {
    check(rootfs)?;
    if let ([only], true) = (rootfs.lower, rootfs.upper.is_empty()) {
        return bind_read_only(Path::new(only), target).context(|| format!("mount {only}"));
    }
    let open = |path: &str| {
        let flags = libc::O_DIRECTORY | libc::O_CLOEXEC;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path);
        file.map(OwnedFd::from).context(|| format!("open layer {path}"))
    };
    let lower = rootfs.lower.iter().map(|path| open(path)).collect::<Result<Vec<_>>>()?;
    let upper = match rootfs.upper.is_empty() {
        true => None,
        false => Some((open(rootfs.upper)?, open(rootfs.work)?)),
    };
    let layers = Layers { lower, upper };
    // What an old kernel does not know it calls invalid; so is what is wrong with the layers, which the last way tells.
    overlay(&layers, target, by_descriptor)
        .or_else(|_| overlay(&layers, target, by_name))
        .or_else(
            |e| if e == Errno::INVAL || e == Errno::NOSYS { one_string(&layers, target) } else { Err(e) },
        )
        .context(|| format!("mount {} layers", layers.lower.len()))
}

/// Unmounts what is mounted at `target`. Nothing is success.
pub(crate) fn unmount_at(target: &Path) -> Result<()> {
    for _ in 0..STACKED_MAX {
        match unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR) => return Ok(()), // not a mount, or not there
            Err(e) => return Err(e).context(|| format!("unmount {}", target.display())),
        }
    }
    Ok(())
}

fn check(rootfs: &Rootfs<'_>) -> Result<()> {
    if rootfs.lower.is_empty() || rootfs.lower.len() > LAYERS_MAX {
        return Err(Error::invalid(format!("a root filesystem has 1 to {LAYERS_MAX} layers")));
    }
    if rootfs.upper.is_empty() != rootfs.work.is_empty() {
        return Err(Error::invalid("a writable layer and its work directory go together"));
    }
    let paths = rootfs
        .lower
        .iter()
        .map(String::as_str)
        .chain([rootfs.upper, rootfs.work])
        .filter(|path| !path.is_empty());
    match paths.into_iter().find(|path| !path.starts_with('/') || path.contains('\0')) {
        Some(path) => Err(Error::invalid(format!("layer {path:?} is not an absolute path"))),
        None => Ok(()),
    }
}

fn bind_read_only(layer: &Path, target: &Path) -> rustix::io::Result<()> {
    mount_bind(layer, target)?;
    let read_only = MountFlags::BIND | MountFlags::RDONLY;
    mount_remount(target, read_only, c"").inspect_err(|_| {
        let _ = unmount(target, UnmountFlags::DETACH);
    })
}

/// How one layer is told to the kernel.
type Tell = fn(&OwnedFd, &str, &OwnedFd) -> rustix::io::Result<()>;

/// Since Linux 6.13.
fn by_descriptor(overlay: &OwnedFd, key: &str, layer: &OwnedFd) -> rustix::io::Result<()> {
    fsconfig_set_fd(overlay, key, layer)
}

/// Since Linux 6.5, which knows `lowerdir+`.
fn by_name(overlay: &OwnedFd, key: &str, layer: &OwnedFd) -> rustix::io::Result<()> {
    fsconfig_set_string(overlay, key, name(layer))
}

fn overlay(layers: &Layers, target: &Path, tell: Tell) -> rustix::io::Result<()> {
    let overlay = fsopen(c"overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&overlay, c"source", c"overlay")?;
    for layer in &layers.lower {
        tell(&overlay, "lowerdir+", layer)?;
    }
    let mut attributes = MountAttrFlags::empty();
    match &layers.upper {
        Some((upper, work)) => {
            tell(&overlay, "upperdir", upper)?;
            tell(&overlay, "workdir", work)?;
        }
        None => attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY,
    }
    fsconfig_create(&overlay)?;
    let mounted = fsmount(&overlay, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    move_mount(&mounted, c"", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

fn one_string(layers: &Layers, target: &Path) -> rustix::io::Result<()> {
    let mut options = String::from("lowerdir=");
    for (i, layer) in layers.lower.iter().enumerate() {
        let colon = if i == 0 { "" } else { ":" };
        let _ = write!(options, "{colon}{}", name(layer));
    }
    let mut flags = MountFlags::empty();
    match &layers.upper {
        Some((upper, work)) => {
            let _ = write!(options, ",upperdir={},workdir={}", name(upper), name(work));
        }
        None => flags |= MountFlags::RDONLY,
    }
    if options.len() > OPTIONS_BYTES_MAX {
        return Err(Errno::TOOBIG);
    }
    let options = std::ffi::CString::new(options).map_err(|_| Errno::INVAL)?;
    mount(c"overlay", target, c"overlay", flags, &*options)
}

fn name(layer: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", layer.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn what_cannot_be_a_root_filesystem_is_refused() {
        let kind = |lower: &[&str], upper: &str, work: &str| {
            let lower: Vec<String> = lower.iter().map(|&path| path.to_owned()).collect();
            check(&Rootfs { lower: &lower, upper, work }).map_err(|e| e.kind())
        };
        let many = vec!["/l"; LAYERS_MAX + 1];
        for (lower, upper, work) in [
            (&[][..], "/u", "/w"),
            (&many, "/u", "/w"),
            (&["/l"], "/u", ""),
            (&["/l"], "", "/w"),
            (&["l"], "/u", "/w"),
            (&["/l\0"], "", ""),
        ] {
            assert_eq!(kind(lower, upper, work), Err(Kind::InvalidArgument));
        }
        assert_eq!(kind(&many[1..], "/u", "/w"), Ok(()));
    }
}
