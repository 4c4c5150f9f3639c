//! Root filesystems by overlayfs.
//!
//! ```text
//! <dir>/layers/<chain id>/{fs,usage}        one layer's own files; whiteouts in overlayfs's form
//!                         unsynced          until `sync`: the boot it was written in
//!       containers/<container>/{upper,work} what one container has written
//!       init/                               the layer on top of every image
//!       tmp/                                whatever is not finished; emptied by `open`
//! ```
//!
//! Everything is made or filled in `tmp` and gets its name by one rename; removal begins with a rename back. A crash at
//! any point of ours therefore leaves either the whole thing or rubbish in `tmp`. A power cut could leave a layer with
//! its name and without its content; that is why one that was not synced does not survive a reboot. All directories are root's alone, so that
//! local users reach neither an image's setuid files nor a pod's data; only what becomes a root directory inside a
//! container has the mode that the image gave it.

use std::fs::{self as stdfs, DirBuilder, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ocid_api::id::ContainerId;
use rustix::fs::{self, CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{self, FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, UnmountFlags};

use super::tree::{remove_tree, tree_usage};
use super::{ChainId, Rootfs, Usage, init_layer};
use crate::error::{Context, Error, Kind, Result};
use crate::rooted::Rooted;

/// How many layers an image may have: overlayfs takes 500 lower directories. An image that needs them all leaves none
/// for the init layer, whose entries go into the container's upper directory then.
pub const LAYERS_MAX: usize = 500;

/// Marks a layer that a power cut would damage.
const UNSYNCED: &str = "unsynced";

/// See the module.
#[derive(Debug)]
pub struct Overlay {
    dir: PathBuf,
}

impl Overlay {
    /// Opens the store in a directory, making it if need be, and removes what a crash left unfinished.
    ///
    /// # Errors
    /// If the directories cannot be made or cleaned.
    pub fn open(dir: &Path) -> Result<Overlay> {
        // Absolute, because the paths go to the shim; and the kernel's options know no relative ones.
        let dir =
            std::path::absolute(dir).context(Kind::Internal, || format!("resolve {}", dir.display()))?;
        let overlay = Overlay { dir };
        for dir in [&overlay.dir, &overlay.layers_dir(), &overlay.containers_dir(), &overlay.tmp_dir()] {
            private_dir(dir, true)?;
        }
        for entry in names(&overlay.tmp_dir())? {
            remove_tree(&overlay.tmp_dir().join(entry))?;
        }
        overlay.remove_unsynced()?;
        if !overlay.init_dir().exists() {
            let stage = overlay.stage()?;
            init_layer::write(stage.dir())?;
            rename(stage.dir(), &overlay.init_dir())?;
        }
        Ok(overlay)
    }

    // Layers.

    /// A new empty directory to unpack a layer into.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn stage(&self) -> Result<Stage> {
        let root = self.scratch()?;
        let stage = Stage { fs: root.join("fs"), root, layers: self.layers_dir() };
        make_dir(&stage.fs, 0o755)?;
        Ok(stage)
    }

    /// Whether the layer is there.
    pub fn has(&self, chain_id: &ChainId) -> bool {
        self.layer_dir(chain_id).is_dir()
    }

    /// Where the layer's files are, if it is there.
    pub fn layer_dir(&self, chain_id: &ChainId) -> PathBuf {
        self.layers_dir().join(chain_id.hex()).join("fs")
    }

    /// What the layer uses on disk, as recorded when it was committed.
    ///
    /// # Errors
    /// `NotFound` if there is no such layer.
    pub fn usage(&self, chain_id: &ChainId) -> Result<Usage> {
        let path = self.layers_dir().join(chain_id.hex()).join("usage");
        let text = stdfs::read_to_string(&path).map_err(|e| {
            let kind = if e.kind() == io::ErrorKind::NotFound { Kind::NotFound } else { Kind::Internal };
            Error::with_source(kind, format!("read the usage of layer {chain_id}"), e)
        })?;
        let mut numbers = text.split_whitespace().map(u64::from_str);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(bytes)), Some(Ok(inodes))) => Ok(Usage { bytes, inodes }),
            // Not worth failing for, and a power cut may do it: look again.
            _ => tree_usage(&self.layer_dir(chain_id)),
        }
    }

    /// All layers, in no order.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn layers(&self) -> Result<Vec<ChainId>> {
        let names = names(&self.layers_dir())?;
        Ok(names.iter().filter_map(|name| format!("sha256:{name}").parse().ok()).collect())
    }

    /// Removes a layer. That nobody needs it, neither a layer above nor a container, is the caller's to know.
    ///
    /// # Errors
    /// If it cannot be removed; whatever is left of it is then no layer any more.
    pub fn remove_layer(&self, chain_id: &ChainId) -> Result<()> {
        self.condemn_layer(chain_id)?.map_or(Ok(()), Condemned::remove)
    }

    /// Takes a layer's name away, which is quick; deleting its files is left to the caller, who may let go of its
    /// locks first. `None` if there is no such layer.
    ///
    /// # Errors
    /// If it cannot be renamed.
    pub fn condemn_layer(&self, chain_id: &ChainId) -> Result<Option<Condemned>> {
        self.condemn(&self.layers_dir().join(chain_id.hex()))
    }

    /// Puts all that was committed on stable storage. Once per image, before its name is recorded.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn sync(&self) -> Result<()> {
        let unsynced = self.unsynced()?; // what comes later may not be on disk when we return
        let dir = open_dir(&self.dir, OFlags::RDONLY)?;
        fs::syncfs(dir).context(Kind::Internal, || format!("sync {}", self.dir.display()))?;
        for chain_id in unsynced {
            match stdfs::remove_file(self.layers_dir().join(chain_id.hex()).join(UNSYNCED)) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {} // another sync, or the layer is gone
                removed => removed.context(Kind::Internal, || format!("mark layer {chain_id} as synced"))?,
            }
        }
        Ok(())
    }

    fn unsynced(&self) -> Result<Vec<ChainId>> {
        let mut layers = self.layers()?;
        layers.retain(|chain_id| self.layers_dir().join(chain_id.hex()).join(UNSYNCED).exists());
        Ok(layers)
    }

    /// Removes layers that may have lost their content in a power cut.
    fn remove_unsynced(&self) -> Result<()> {
        let boot = boot_id();
        for chain_id in self.unsynced()? {
            let written_in = stdfs::read_to_string(self.layers_dir().join(chain_id.hex()).join(UNSYNCED));
            if !written_in.is_ok_and(|written_in| !boot.is_empty() && written_in == boot) {
                tracing::info!(%chain_id, "removing a layer that was not synced before the machine went down");
                self.remove_layer(&chain_id)?;
            }
        }
        Ok(())
    }

    // Containers.

    /// Prepares the root filesystem of a container from an image's chain ids, the bottom layer's first.
    ///
    /// # Errors
    /// `NotFound` if a layer is missing, `InvalidArgument` if there are too many.
    pub fn prepare(&self, container: &ContainerId, chain_ids: &[ChainId]) -> Result<Rootfs> {
        let lower = self.lower(chain_ids)?;
        let home = self.containers_dir().join(container.as_str());
        if !home.exists() {
            let scratch = Scratch(self.scratch()?);
            // The upper directory becomes the root directory, so it looks like the image's.
            let image_root = chain_ids.last().map_or_else(|| self.init_dir(), |top| self.layer_dir(top));
            let image_root =
                image_root.metadata().context(Kind::Internal, || format!("stat {}", image_root.display()))?;
            let upper = scratch.0.join("upper");
            make_dir(&upper, 0o700)?;
            if !fits_init(chain_ids) {
                init_layer::write(&upper)?;
            }
            stdfs::set_permissions(&upper, Permissions::from_mode(image_root.mode() & 0o7777))
                .context(Kind::Internal, || format!("set the mode of {}", upper.display()))?;
            std::os::unix::fs::chown(&upper, Some(image_root.uid()), Some(image_root.gid()))
                .context(Kind::Internal, || format!("set the owner of {}", upper.display()))?;
            make_dir(&scratch.0.join("work"), 0o700)?;
            match rename(&scratch.0, &home) {
                Err(_) if home.exists() => {} // prepared by another at the same time
                renamed => renamed?,
            }
        }
        Ok(Rootfs { lower, upper: home.join("upper"), work: home.join("work") })
    }

    /// Removes what a container has written. That there is nothing is success.
    ///
    /// # Errors
    /// If it cannot be removed, which includes that something is still mounted in it.
    pub fn remove(&self, container: &ContainerId) -> Result<()> {
        self.condemn(&self.containers_dir().join(container.as_str()))?.map_or(Ok(()), Condemned::remove)
    }

    /// All containers that something was prepared for, in no order.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn containers(&self) -> Result<Vec<ContainerId>> {
        Ok(names(&self.containers_dir())?.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Measures what a container has written. This walks a tree: do it in the background.
    ///
    /// # Errors
    /// `NotFound` if nothing was prepared for it.
    pub fn container_usage(&self, container: &ContainerId) -> Result<Usage> {
        let upper = self.containers_dir().join(container.as_str()).join("upper");
        if !upper.is_dir() {
            return Err(Error::not_found(format!("container {container} has no root filesystem")));
        }
        tree_usage(&upper)
    }

    // Views.

    /// The files of an image, as a container on it would first see them; read-only and mounted nowhere.
    ///
    /// The mount ends when the view is dropped, and with the process in any case.
    ///
    /// # Errors
    /// As `prepare`.
    pub fn view(&self, chain_ids: &[ChainId]) -> Result<Rooted> {
        let lower = self.lower(chain_ids)?;
        // The init layer takes part, or a container would be created after another /etc than it then sees. What it hides
        // in an image that leaves no room for it are three files that nobody looks at before the container runs.
        let [init] = lower.as_slice() else {
            return mount_detached(&lower, &self.tmp_dir()).map(Rooted::from_fd);
        };
        Rooted::new(init)
    }

    fn lower(&self, chain_ids: &[ChainId]) -> Result<Vec<PathBuf>> {
        if chain_ids.len() > LAYERS_MAX {
            let what =
                format!("an image of {} layers cannot be mounted, only of {LAYERS_MAX}", chain_ids.len());
            return Err(Error::invalid(what));
        }
        let mut lower = Vec::with_capacity(chain_ids.len() + 1);
        if fits_init(chain_ids) {
            lower.push(self.init_dir());
        }
        for chain_id in chain_ids.iter().rev() {
            if !self.has(chain_id) {
                return Err(Error::not_found(format!("there is no layer {chain_id}")));
            }
            lower.push(self.layer_dir(chain_id));
        }
        Ok(lower)
    }

    /// A new private directory in `tmp`.
    fn scratch(&self) -> Result<PathBuf> {
        let path = self.tmp_dir().join(ContainerId::generate().as_str()); // any unique name does
        private_dir(&path, false)?;
        Ok(path)
    }

    /// Takes the name away first, so that nothing half removed is ever found under it. Makes nothing: on a full disk
    /// this is how room is made.
    fn condemn(&self, path: &Path) -> Result<Option<Condemned>> {
        let condemned = self.tmp_dir().join(ContainerId::generate().as_str()); // any unique name does
        match stdfs::rename(path, &condemned) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            moved => moved
                .context(Kind::Internal, || format!("remove {}", path.display()))
                .map(|()| Some(Condemned(condemned))),
        }
    }

    fn layers_dir(&self) -> PathBuf {
        self.dir.join("layers")
    }

    fn containers_dir(&self) -> PathBuf {
        self.dir.join("containers")
    }

    fn init_dir(&self) -> PathBuf {
        self.dir.join("init")
    }

    fn tmp_dir(&self) -> PathBuf {
        self.dir.join("tmp")
    }
}

/// What has lost its name and is to be deleted; by the next `open`, if nobody does.
#[derive(Debug)]
#[must_use]
pub struct Condemned(PathBuf);

impl Condemned {
    /// Deletes it. This walks a tree.
    ///
    /// # Errors
    /// If it cannot be deleted.
    pub fn remove(self) -> Result<()> {
        remove_tree(&self.0)
    }
}

/// Whether the init layer can be one of the lower directories.
fn fits_init(chain_ids: &[ChainId]) -> bool {
    chain_ids.len() < LAYERS_MAX
}

/// A layer that is being made. Dropped without `commit`, it is removed.
#[derive(Debug)]
pub struct Stage {
    root: PathBuf,
    fs: PathBuf,
    layers: PathBuf,
}

impl Stage {
    /// Where the layer's files go.
    pub fn dir(&self) -> &Path {
        &self.fs
    }

    /// Gives the layer its name. That it exists already is success: equal names are equal files.
    ///
    /// # Errors
    /// If the disk is full, or fails.
    pub fn commit(self, chain_id: &ChainId, usage: Usage) -> Result<()> {
        let text = format!("{} {}\n", usage.bytes, usage.inodes);
        stdfs::write(self.root.join("usage"), text)
            .context(Kind::Internal, || format!("record the usage of layer {chain_id}"))?;
        stdfs::write(self.root.join(UNSYNCED), boot_id())
            .context(Kind::Internal, || format!("record the boot of layer {chain_id}"))?;
        let layer = self.layers.join(chain_id.hex());
        match rename(&self.root, &layer) {
            Err(_) if layer.exists() => Ok(()),
            renamed => renamed,
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        remove_quietly(&self.root);
    }
}

/// A directory in `tmp` that goes away unless it was renamed.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        remove_quietly(&self.0);
    }
}

/// What cannot be removed now is removed by the next `open`.
fn remove_quietly(dir: &Path) {
    if let Err(error) = remove_tree(dir) {
        tracing::warn!(%error, "something unfinished stays until the next start");
    }
}

/// Mounts layers read-only, attached nowhere; there are at least two.
fn mount_detached(lower: &[PathBuf], tmp: &Path) -> Result<OwnedFd> {
    match mount_by_fd(lower) {
        // fsopen is of 5.2, overlay's `lowerdir+` of 6.5; before that, a key unknown to it is invalid.
        Err(Errno::NOSYS | Errno::INVAL) => mount_then_detach(lower, tmp),
        mounted => mounted.map_err(|e| mount_error(lower, e)),
    }
}

fn mount_by_fd(lower: &[PathBuf]) -> Result<OwnedFd, Errno> {
    let context = mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for dir in lower {
        // The kernel cuts option strings at 255 bytes, and our paths are not ours to shorten.
        let dir = fs::openat(CWD, dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        mount::fsconfig_set_string(&context, "lowerdir+", fd_path(&dir))?;
    }
    mount::fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// For older kernels: the mount is in our namespace for a moment, in a directory that is ours alone.
fn mount_then_detach(lower: &[PathBuf], tmp: &Path) -> Result<OwnedFd> {
    let dirs: Vec<OwnedFd> = lower.iter().map(|dir| open_dir(dir, OFlags::PATH)).collect::<Result<_>>()?;
    let options: Vec<String> = dirs.iter().map(fd_path).collect();
    let options = format!("lowerdir={}", options.join(":"));
    if options.len() > 4095 {
        let what =
            format!("this kernel cannot mount {} layers at once: it must be 6.5 or newer", lower.len());
        return Err(Error::new(Kind::Unimplemented, what));
    }
    let options = std::ffi::CString::new(options).context(Kind::Internal, || "mount options".to_owned())?;
    let target = Scratch(tmp.join(ContainerId::generate().as_str()));
    private_dir(&target.0, false)?;
    let flags = MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC;
    mount::mount("overlay", &target.0, "overlay", flags, options.as_c_str())
        .map_err(|e| mount_error(lower, e))?;
    let opened = open_dir(&target.0, OFlags::PATH);
    mount::unmount(&target.0, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
        .context(Kind::Internal, || format!("unmount {}", target.0.display()))?;
    opened
}

fn mount_error(lower: &[PathBuf], errno: Errno) -> Error {
    Error::with_source(Kind::Internal, format!("mount an overlay of {} directories", lower.len()), errno)
}

fn fd_path(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// What tells this boot from others; empty if the kernel does not say.
fn boot_id() -> String {
    stdfs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

fn open_dir(dir: &Path, access: OFlags) -> Result<OwnedFd> {
    let flags = access | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    fs::openat(CWD, dir, flags, Mode::empty()).context(Kind::Internal, || format!("open {}", dir.display()))
}

/// Makes a directory that only root may enter.
fn private_dir(dir: &Path, may_exist: bool) -> Result<()> {
    DirBuilder::new()
        .mode(0o700)
        .recursive(may_exist)
        .create(dir)
        .context(Kind::Internal, || format!("make {}", dir.display()))
}

/// Makes a directory of exactly this mode.
fn make_dir(dir: &Path, mode: u32) -> Result<()> {
    let what = || format!("make {}", dir.display());
    DirBuilder::new().mode(0o700).create(dir).context(Kind::Internal, what)?;
    stdfs::set_permissions(dir, Permissions::from_mode(mode)).context(Kind::Internal, what)
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    stdfs::rename(from, to).context(Kind::Internal, || format!("make {}", to.display()))
}

/// The entries of one of our own directories.
fn names(dir: &Path) -> Result<Vec<String>> {
    let what = || format!("list {}", dir.display());
    let mut names = Vec::new();
    for entry in stdfs::read_dir(dir).context(Kind::Internal, what)? {
        // A name that is not even text is none that we gave.
        names.extend(entry.context(Kind::Internal, what)?.file_name().into_string());
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::fs::read_to_string;
    use std::os::unix::fs::symlink;

    use nix::sched::{CloneFlags, unshare};
    use rustix::mount::MountPropagationFlags;

    use super::super::conformance::{chain, commit};
    use super::*;

    fn store() -> (tempfile::TempDir, Overlay) {
        let dir = tempfile::tempdir().unwrap();
        let overlay = Overlay::open(&dir.path().join("snapshots")).unwrap();
        (dir, overlay)
    }

    /// Mounting needs privilege; without it there is nothing to check.
    fn privileged() -> bool {
        let root = rustix::process::geteuid().is_root();
        if !root {
            println!("skipped: only root may mount");
        }
        root
    }

    fn mounts() -> String {
        read_to_string("/proc/thread-self/mountinfo").unwrap()
    }

    /// Runs on a thread with a mount namespace of its own.
    fn in_private_namespace(test: impl FnOnce() + Send + 'static) {
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
            test();
        });
        thread.join().unwrap();
    }

    #[test]
    fn a_view_shows_the_layers_as_one_and_is_mounted_nowhere() {
        if !privileged() {
            return;
        }
        let (_dir, overlay) = store();
        let ids = chain(2);
        commit(&overlay, &ids[0], "f", "bottom");
        commit(&overlay, &ids[1], "f", "top");
        let before = mounts();
        let view = overlay.view(&ids).unwrap();
        assert_eq!(mounts(), before);
        assert_eq!(view.read_file("/f", 100).unwrap(), b"top");
        assert_eq!(overlay.view(&ids[..1]).unwrap().read_file("f", 100).unwrap(), b"bottom");
        // It is read-only, and nothing in it is trusted to be a device or setuid.
        let write = fs::openat(&view, "f", OFlags::WRONLY, Mode::empty());
        assert_eq!(write.unwrap_err(), Errno::ROFS);
        let flags = fs::fstatvfs(&view).unwrap().f_flag;
        assert!(flags.contains(fs::StatVfsMountFlags::RDONLY | fs::StatVfsMountFlags::NOSUID));
        // The layers can be removed as soon as the view is gone.
        drop(view);
        overlay.remove_layer(&ids[1]).unwrap();
    }

    #[test]
    fn symlinks_of_an_image_cannot_redirect_what_is_mounted_above_it() {
        if !privileged() {
            return;
        }
        let (dir, overlay) = store();
        let ids = chain(1);
        let stage = overlay.stage().unwrap();
        for name in ["dev", "proc", "sys", "etc"] {
            symlink(dir.path(), stage.dir().join(name)).unwrap();
        }
        stage.commit(&ids[0], Usage::default()).unwrap();
        let view = overlay.view(&ids).unwrap();
        for name in ["dev", "proc", "sys", "etc"] {
            let stat = fs::statat(&view, name, fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
            assert_eq!(stat.st_mode, 0o40755, "{name}");
        }
        assert_eq!(view.read_file("etc/hosts", 10).unwrap(), b"");
        assert!(!view.exists("etc/passwd").unwrap());
    }

    #[test]
    fn an_image_keeps_its_own_files_beside_the_init_layers() {
        if !privileged() {
            return;
        }
        let (_dir, overlay) = store();
        let ids = chain(1);
        let stage = overlay.stage().unwrap();
        stdfs::create_dir(stage.dir().join("etc")).unwrap();
        stdfs::write(stage.dir().join("etc/passwd"), "root").unwrap();
        stdfs::write(stage.dir().join("etc/hosts"), "image").unwrap();
        stage.commit(&ids[0], Usage::default()).unwrap();
        let view = overlay.view(&ids).unwrap();
        assert_eq!(view.read_file("/etc/passwd", 10).unwrap(), b"root");
        assert_eq!(view.read_file("/etc/hosts", 10).unwrap(), b"");
        assert!(overlay.view(&[]).unwrap().exists("etc/hostname").unwrap());
    }

    #[test]
    fn what_is_condemned_has_no_name_and_makes_nothing() {
        let (_dir, overlay) = store();
        let ids = chain(1);
        commit(&overlay, &ids[0], "f", "x");
        let condemned = overlay.condemn_layer(&ids[0]).unwrap().unwrap();
        assert!(!overlay.has(&ids[0]));
        assert_eq!(names(&overlay.tmp_dir()).unwrap().len(), 1, "the layer itself and nothing beside it");
        condemned.remove().unwrap();
        assert!(names(&overlay.tmp_dir()).unwrap().is_empty());
        assert!(overlay.condemn_layer(&ids[0]).unwrap().is_none());
    }

    #[test]
    fn as_many_layers_as_the_kernel_takes_can_be_viewed_and_mounted() {
        if !privileged() {
            return;
        }
        let (dir, overlay) = store();
        let ids = chain(LAYERS_MAX);
        for (number, id) in ids.iter().enumerate() {
            commit(&overlay, id, &format!("f{number}"), "x");
        }
        let view = overlay.view(&ids).unwrap();
        assert!(view.exists("f0").unwrap() && view.exists(format!("f{}", LAYERS_MAX - 1)).unwrap());
        // And with an upper directory, as a shim would mount it.
        let rootfs = overlay.prepare(&ContainerId::generate(), &ids).unwrap();
        let context = mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
        for lower in &rootfs.lower {
            let lower = open_dir(lower, OFlags::PATH).unwrap();
            mount::fsconfig_set_string(&context, "lowerdir+", fd_path(&lower)).unwrap();
        }
        for (key, path) in [("upperdir", &rootfs.upper), ("workdir", &rootfs.work)] {
            let opened = open_dir(path, OFlags::PATH).unwrap();
            mount::fsconfig_set_string(&context, key, fd_path(&opened)).unwrap();
        }
        mount::fsconfig_create(&context).unwrap();
        let mounted =
            mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap();
        let flags = OFlags::CREATE | OFlags::WRONLY;
        drop(fs::openat(&mounted, "written", flags, Mode::RUSR).unwrap());
        assert!(rootfs.upper.join("written").exists());
        // The places where the runtime mounts are real all the same.
        let rooted = Rooted::from_fd(mounted);
        assert!(rooted.exists("etc/resolv.conf").unwrap() && rooted.exists("dev").unwrap());
        assert_eq!(rootfs.upper.metadata().unwrap().mode() & 0o7777, 0o755);
        drop((rooted, context, view));
        drop(dir);
    }

    #[test]
    fn whiteouts_and_opaque_directories_of_a_layer_hide_what_is_below() {
        if !privileged() {
            return;
        }
        let (_dir, overlay) = store();
        let ids = chain(2);
        let bottom = overlay.stage().unwrap();
        for name in ["gone", "d/old", "e/old"] {
            let path = bottom.dir().join(name);
            stdfs::create_dir_all(path.parent().unwrap()).unwrap();
            stdfs::write(path, "x").unwrap();
        }
        bottom.commit(&ids[0], Usage::default()).unwrap();
        let top = overlay.stage().unwrap();
        let whiteout = fs::FileType::CharacterDevice;
        fs::mknodat(CWD, top.dir().join("gone"), whiteout, Mode::empty(), 0).unwrap();
        stdfs::create_dir(top.dir().join("d")).unwrap();
        fs::setxattr(top.dir().join("d"), "trusted.overlay.opaque", b"y", fs::XattrFlags::empty()).unwrap();
        top.commit(&ids[1], Usage::default()).unwrap();
        let view = overlay.view(&ids).unwrap();
        assert!(!view.exists("gone").unwrap() && !view.exists("d/old").unwrap());
        assert!(view.exists("d").unwrap() && view.exists("e/old").unwrap());
    }

    #[test]
    fn a_layer_survives_a_power_cut_only_if_it_was_synced() {
        let (dir, overlay) = store();
        let ids = chain(3);
        let marker = |id: &ChainId| overlay.layer_dir(id).with_file_name(UNSYNCED);
        commit(&overlay, &ids[0], "f", "x");
        overlay.sync().unwrap();
        commit(&overlay, &ids[1], "f", "x");
        commit(&overlay, &ids[2], "f", "x");
        assert!(!marker(&ids[0]).exists() && marker(&ids[1]).exists());
        stdfs::write(marker(&ids[1]), "another boot").unwrap();

        let again = Overlay::open(&dir.path().join("snapshots")).unwrap();
        assert_eq!([0, 1, 2].map(|n: usize| again.has(&ids[n])), [true, false, true]);
        again.sync().unwrap();
        assert!(!marker(&ids[2]).exists());
    }

    #[test]
    fn an_older_kernels_way_to_mount_leaves_nothing_mounted_either() {
        if !privileged() {
            return;
        }
        in_private_namespace(|| {
            let (_dir, overlay) = store();
            let ids = chain(100);
            for (number, id) in ids.iter().enumerate() {
                commit(&overlay, id, &format!("f{number}"), "x");
            }
            let before = mounts();
            let lower = overlay.lower(&ids).unwrap();
            let view = Rooted::from_fd(mount_then_detach(&lower, &overlay.tmp_dir()).unwrap());
            assert_eq!(mounts(), before);
            assert!(view.exists("f0").unwrap() && view.exists("f99").unwrap());
            assert_eq!(stdfs::read_dir(overlay.tmp_dir()).unwrap().count(), 0);

            let ids = chain(400);
            let lower: Vec<PathBuf> = ids.iter().map(|_| lower[0].clone()).collect();
            let error = mount_then_detach(&lower, &overlay.tmp_dir()).unwrap_err();
            assert_eq!(error.kind(), Kind::Unimplemented);
        });
    }

    #[test]
    fn a_tree_with_something_mounted_in_it_is_not_removed() {
        if !privileged() {
            return;
        }
        in_private_namespace(|| {
            let (_dir, overlay) = store();
            let container = ContainerId::generate();
            let rootfs = overlay.prepare(&container, &[]).unwrap();
            let inside = rootfs.upper.join("inside");
            stdfs::create_dir(&inside).unwrap();
            mount::mount("tmpfs", &inside, "tmpfs", MountFlags::empty(), None::<&std::ffi::CStr>).unwrap();
            stdfs::write(inside.join("alive"), "x").unwrap();
            assert!(remove_tree(&rootfs.upper).is_err());
            assert!(inside.join("alive").exists());
            mount::unmount(&inside, UnmountFlags::empty()).unwrap();
            overlay.remove(&container).unwrap();
        });
    }
}
