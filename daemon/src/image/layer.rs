//! One layer's archive into one directory: the rules of the OCI image spec, for overlayfs.
//!
//! Each layer gets an empty directory of its own; what it says about the layers below becomes overlayfs's form:
//!
//! | in the archive        | in the directory                                                     |
//! |-----------------------|----------------------------------------------------------------------|
//! | `d/.wh.name`          | `d/name`, a character device 0:0                                     |
//! | `d/.wh..wh..opq`      | `trusted.overlay.opaque=y` on `d`                                    |
//! | a parent not listed   | a directory like the one below it, or else root's with mode 0755     |
//! | a hard link downwards | the target is copied up to its own path, then linked                 |
//! | a directory over our own whiteout | an opaque directory                                      |
//! | a whiteout over an entry of this layer | the entry stays: whiteouts speak of lower layers only |
//!
//! The archive is hostile. Its paths are resolved from a file descriptor of the layer's directory, without following
//! any symlink, and what they name is changed only through descriptors or calls that do not follow the last one either.
//! A path with `..`, or through something that is not a directory, is an error. Attributes that would speak to
//! overlayfs or to the host's security modules are dropped, and so is a character device 0:0: it would be a whiteout
//! that the archive did not write as one. (It is not an error, because images that contain another runtime's storage
//! have them.)
//!
//! Nothing is synced here.

use std::collections::HashMap;
use std::fs::File;
use std::io::BufRead;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{
    self, AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, UTIME_OMIT,
    Uid, XattrFlags,
};
use rustix::io::Errno;

use super::archive::{Archive, Entry, Type};
use crate::error::{Error, Kind, Result};
use crate::rooted::{retry, stat_entry};
use crate::snapshot::{Usage, remove_entry, tree_usage};

/// What a layer may cost.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Members of the archive.
    pub entries: u64,
    /// Bytes of one path or link target.
    pub path_bytes: usize,
    /// Components of one path.
    pub depth: usize,
    /// Bytes of the expanded stream, and of all files (a hole counts, and so does what is copied up).
    pub expanded_bytes: u64,
    /// Part of the file system that must stay free, of its bytes and of its inodes, in percent.
    pub free_percent: u64,
    /// Bytes of one extended attribute's value.
    pub xattr_bytes: usize,
    /// Bytes of all extended attributes of one file.
    pub xattrs_bytes: usize,
    /// Bytes of the extension headers (PAX, GNU) of one entry, and of the map of a sparse file.
    pub extension_bytes: usize,
    /// Bytes of the paths of all directories together: they are kept until the end, for their times.
    pub directory_bytes: usize,
}

// There is deliberately no limit on the ratio of expanded to compressed bytes: a file of zeros, as `lastlog` often is,
// has the largest that gzip can reach, and what a bomb can do is bounded by `expanded_bytes` and `free_percent`.
impl Default for Limits {
    fn default() -> Limits {
        Limits {
            entries: 1_000_000,
            path_bytes: 4095,
            depth: 256,
            expanded_bytes: 64 << 30,
            free_percent: 5,
            xattr_bytes: 64 << 10,
            xattrs_bytes: 1 << 20,
            extension_bytes: 1 << 20,
            directory_bytes: 64 << 20,
        }
    }
}

/// How much is written between two looks at the free space.
const CHECK_SPACE_EVERY: u64 = 64 << 20;

/// And how many entries are made.
const CHECK_SPACE_ENTRIES: u64 = 1 << 14;

/// How many open directories are kept: an archive walks a tree, so the next parent is nearly always among the last.
const OPEN_DIRS: usize = 8;

/// What a directory is opened with to be changed or listed; never through a symlink.
const DIR: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

const OPAQUE: &str = "trusted.overlay.opaque";
const WHITEOUT: &[u8] = b".wh.";
const WHITEOUT_META: &[u8] = b".wh..wh.";
const WHITEOUT_OPAQUE: &[u8] = b".wh..wh..opq";

/// Device numbers beyond these would name another device when the kernel packs them.
const MAJORS: u64 = 1 << 12;
const MINORS: u64 = 1 << 20;

/// Gives the directories of all layers below, the uppermost first. It may block until they are complete: layers are
/// unpacked side by side, and hardly one looks below before its end.
pub type Below<'a> = dyn Fn() -> Result<Vec<PathBuf>> + Sync + 'a;

/// Applies an archive to an empty directory.
///
/// The stream is read up to the end of the archive.
///
/// # Errors
/// `InvalidArgument` if the layer is malformed or hostile, `ResourceExhausted` if it exceeds a limit or the disk,
/// `Cancelled` if `cancel` became true.
pub fn apply(
    stream: &mut impl BufRead,
    dir: &Path,
    below: &Below<'_>,
    limits: &Limits,
    cancel: &AtomicBool,
) -> Result<Usage> {
    let mut archive = Archive::new(stream, limits.extension_bytes);
    let mut layer = Layer::open(dir, below, limits, cancel)?;
    while let Some(entry) = archive.next()? {
        layer.count()?;
        let path = clean(&entry.path, limits)?;
        layer.entry(&path, &entry, &mut archive).map_err(|e| match e.kind() {
            Kind::Cancelled => e,
            _ => e.during(format!("unpack {}", shown(&entry.path))),
        })?;
    }
    layer.finish(dir)
}

/// The error of what was cancelled.
pub(super) fn cancelled() -> Error {
    Error::new(Kind::Cancelled, "unpacking was cancelled")
}

/// Owner, mode and times.
struct Attributes {
    uid: u32,
    gid: u32,
    mode: u32,
    mtime: Option<Timespec>,
}

impl Attributes {
    fn of_entry(entry: &Entry) -> Attributes {
        let (seconds, nanos) = entry.mtime;
        let mtime = Timespec { tv_sec: seconds, tv_nsec: nanos.into() };
        Attributes { uid: entry.uid, gid: entry.gid, mode: entry.mode, mtime: Some(mtime) }
    }

    fn of_file(stat: &Stat) -> Attributes {
        let nanos = i64::try_from(stat.st_mtime_nsec).unwrap_or(0);
        let mtime = Timespec { tv_sec: stat.st_mtime, tv_nsec: nanos };
        Attributes { uid: stat.st_uid, gid: stat.st_gid, mode: stat.st_mode & 0o7777, mtime: Some(mtime) }
    }

    /// Access times say nothing in an image; the same as the modification's makes unpacking repeatable.
    fn times(&self) -> Timestamps {
        let time = self.mtime.unwrap_or(Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT });
        Timestamps { last_access: time, last_modification: time }
    }

    /// Owner first, because changing it clears setuid and capabilities. Times come last, by the caller.
    fn set(&self, fd: impl AsFd) -> Result<(), Errno> {
        fs::fchown(&fd, Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid)))?;
        fs::fchmod(fd, Mode::from_raw_mode(self.mode))
    }

    /// The same for what cannot be opened without side effects: a device, a fifo, a symlink (which has no mode).
    fn set_at(&self, parent: BorrowedFd<'_>, name: &[u8], has_mode: bool) -> Result<(), Errno> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        if has_mode {
            // The entry was made by us just now, in a directory that nobody else can reach: it is no symlink.
            fs::chmodat(parent, name, Mode::from_raw_mode(self.mode), AtFlags::empty())?;
        }
        fs::utimensat(parent, name, &self.times(), AtFlags::SYMLINK_NOFOLLOW)
    }
}

type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// What a directory gets when nothing changes in it any more.
#[derive(Default)]
struct Pending {
    mtime: Option<Timespec>,
    /// A default ACL would be inherited by all that is made in the directory.
    default_acl: Option<Vec<u8>>,
}

struct Layer<'a> {
    root: Rc<OwnedFd>,
    below: &'a Below<'a>,
    /// The directories of the layers below, opened when first needed.
    lower_fds: Option<Vec<OwnedFd>>,
    limits: &'a Limits,
    cancel: &'a AtomicBool,
    /// Parents used last, the latest at the end. Paths are clean and relative; the root is not among them.
    open: Vec<(Vec<u8>, Rc<OwnedFd>)>,
    pending: HashMap<Vec<u8>, Pending>,
    pending_bytes: usize,
    entries: u64,
    written: u64,
    check_space_at: u64,
    usage: Usage,
    /// Something was counted that is gone: the tally does not hold.
    replaced: bool,
}

impl<'a> Layer<'a> {
    fn open(
        dir: &Path,
        below: &'a Below<'a>,
        limits: &'a Limits,
        cancel: &'a AtomicBool,
    ) -> Result<Layer<'a>> {
        let root = fs::openat(CWD, dir, DIR, Mode::empty())
            .map_err(|e| Error::with_source(Kind::Internal, format!("open {}", dir.display()), e))?;
        Ok(Layer {
            root: Rc::new(root),
            below,
            lower_fds: None,
            limits,
            cancel,
            open: Vec::with_capacity(OPEN_DIRS),
            pending: HashMap::new(),
            pending_bytes: 0,
            entries: 0,
            written: 0,
            check_space_at: 0,
            usage: Usage::default(),
            replaced: false,
        })
    }

    /// Called once per entry.
    fn count(&mut self) -> Result<()> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            let what = format!("the layer has more than {} entries", self.limits.entries);
            return Err(Error::new(Kind::ResourceExhausted, what));
        }
        if self.entries.is_multiple_of(CHECK_SPACE_ENTRIES) {
            self.check_space()?;
        }
        self.check_cancelled()
    }

    fn check_cancelled(&self) -> Result<()> {
        if self.cancel.load(Ordering::Relaxed) { Err(cancelled()) } else { Ok(()) }
    }

    /// Called before bytes are written, with their number.
    fn spend(&mut self, bytes: u64) -> Result<()> {
        self.written = self.written.saturating_add(bytes);
        if self.written > self.limits.expanded_bytes {
            let what = format!("the layer's files have more than {} bytes", self.limits.expanded_bytes);
            return Err(Error::new(Kind::ResourceExhausted, what));
        }
        if self.written >= self.check_space_at {
            self.check_space_at = self.written.saturating_add(CHECK_SPACE_EVERY);
            self.check_space()?;
        }
        Ok(())
    }

    /// Refuses to fill the file system, by bytes or by inodes.
    fn check_space(&self) -> Result<()> {
        let space = fs::fstatvfs(&*self.root).map_err(os("look at the free space"))?;
        let percent = self.limits.free_percent;
        let scarce = |free: u64, all: u64| u128::from(free) * 100 < u128::from(all) * u128::from(percent);
        // A file system without a fixed number of inodes says it has none.
        if scarce(space.f_bavail, space.f_blocks) || scarce(space.f_favail, space.f_files) {
            let what = format!("less than {percent} % of the file system is free");
            return Err(Error::new(Kind::ResourceExhausted, what));
        }
        Ok(())
    }

    fn entry(&mut self, path: &[u8], entry: &Entry, archive: &mut Archive<impl BufRead>) -> Result<()> {
        let Some((parent, name)) = split(path) else {
            return match entry.kind {
                Type::Dir => self.root_directory(entry),
                _ => Err(Error::invalid("the layer's root is not a directory")),
            };
        };
        if name.starts_with(WHITEOUT) {
            return self.whiteout(parent, name);
        }
        let mut whiteouts = parent.split(|b| *b == b'/').filter(|c| c.starts_with(WHITEOUT)).peekable();
        if whiteouts.peek().is_some() {
            // Left-overs of aufs's own bookkeeping are skipped, as everywhere; nothing else is below a whiteout.
            let aufs = whiteouts.all(|c| c.starts_with(WHITEOUT_META));
            return if aufs { Ok(()) } else { Err(Error::invalid("it lies below a whiteout")) };
        }
        if matches!(entry.kind, Type::Char | Type::Block) && !self.device_is_wanted(entry)? {
            return Ok(());
        }
        let parent = self.parent(parent)?;
        match entry.kind {
            Type::File => self.file(&parent, name, path, entry, archive),
            Type::Dir => self.directory(&parent, name, path, entry),
            Type::Symlink => self.symlink(&parent, name, path, entry),
            Type::HardLink => self.hard_link(&parent, name, path, entry),
            Type::Char | Type::Block | Type::Fifo => self.node(&parent, name, path, entry),
        }
    }

    fn root_directory(&mut self, entry: &Entry) -> Result<()> {
        let root = self.root.clone();
        let attributes = Attributes::of_entry(entry);
        clear_xattrs(&root).map_err(os("clear extended attributes"))?;
        let default_acl = self.describe(&root, &attributes, &entry.xattrs, true)?;
        self.postpone(Vec::new(), Pending { mtime: attributes.mtime, default_acl })
    }

    fn file(
        &mut self,
        parent: &Rc<OwnedFd>,
        name: &[u8],
        path: &[u8],
        entry: &Entry,
        archive: &mut Archive<impl BufRead>,
    ) -> Result<()> {
        self.spend(entry.size)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = self.make(parent, name, path, |parent, name| {
            fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR)
        })?;
        match &entry.sparse {
            None => self.content(&fd, archive, u64::MAX)?,
            Some(map) => {
                fs::ftruncate(&fd, entry.size).map_err(os("set the size of a sparse file"))?;
                for (offset, len) in map {
                    fs::seek(&fd, fs::SeekFrom::Start(*offset)).map_err(os("seek in a sparse file"))?;
                    self.content(&fd, archive, *len)?;
                }
            }
        }
        let attributes = Attributes::of_entry(entry);
        self.describe(&fd, &attributes, &entry.xattrs, false)?;
        fs::futimens(&fd, &attributes.times()).map_err(os("set the times"))?;
        self.usage.add(&fs::fstat(&fd).map_err(os("stat"))?);
        Ok(())
    }

    /// Writes the next `len` bytes of the entry's content, or all there are. From the stream's buffer, without a copy.
    fn content(&self, fd: &OwnedFd, archive: &mut Archive<impl BufRead>, len: u64) -> Result<()> {
        let mut left = len.min(archive.content_left());
        while left > 0 {
            self.check_cancelled()?;
            let piece = archive.content(left)?;
            let written = retry(|| rustix::io::write(fd, piece)).map_err(os("write"))?;
            archive.consume(written);
            left = left.saturating_sub(written as u64);
        }
        Ok(())
    }

    fn directory(&mut self, parent: &Rc<OwnedFd>, name: &[u8], path: &[u8], entry: &Entry) -> Result<()> {
        let (fd, new) = self.make_directory(parent, name, path, true)?;
        if !new {
            clear_xattrs(&fd).map_err(os("clear extended attributes"))?;
        }
        let attributes = Attributes::of_entry(entry);
        let default_acl = self.describe(&fd, &attributes, &entry.xattrs, true)?;
        self.postpone(path.to_vec(), Pending { mtime: attributes.mtime, default_acl })?;
        self.remember(path.to_vec(), Rc::new(fd));
        Ok(())
    }

    fn symlink(&mut self, parent: &Rc<OwnedFd>, name: &[u8], path: &[u8], entry: &Entry) -> Result<()> {
        if entry.link.is_empty() || entry.link.len() > self.limits.path_bytes {
            return Err(Error::invalid("a symlink's target is empty or too long"));
        }
        self.make(parent, name, path, |parent, name| fs::symlinkat(&*entry.link, parent, name))?;
        Attributes::of_entry(entry).set_at(parent.as_fd(), name, false).map_err(os("describe a symlink"))?;
        self.add_usage(parent, name)
    }

    fn node(&mut self, parent: &Rc<OwnedFd>, name: &[u8], path: &[u8], entry: &Entry) -> Result<()> {
        let file_type = match entry.kind {
            Type::Char => FileType::CharacterDevice,
            Type::Block => FileType::BlockDevice,
            _ => FileType::Fifo,
        };
        let part = |n: u64| u32::try_from(n).map_err(|_| Error::invalid("a device number out of range"));
        let device = fs::makedev(part(entry.device.0)?, part(entry.device.1)?);
        self.make(parent, name, path, |parent, name| {
            fs::mknodat(parent, name, file_type, Mode::RUSR | Mode::WUSR, device)
        })?;
        Attributes::of_entry(entry)
            .set_at(parent.as_fd(), name, true)
            .map_err(os("describe a device or fifo"))?;
        self.add_usage(parent, name)
    }

    fn device_is_wanted(&self, entry: &Entry) -> Result<bool> {
        let (major, minor) = entry.device;
        if major >= MAJORS || minor >= MINORS {
            return Err(Error::invalid(format!("a device number out of range: {major}:{minor}")));
        }
        Ok(entry.kind != Type::Char || entry.device != (0, 0)) // see the module about 0:0
    }

    fn hard_link(&mut self, parent: &Rc<OwnedFd>, name: &[u8], path: &[u8], entry: &Entry) -> Result<()> {
        let target = clean(&entry.link, self.limits)?;
        let missing = || Error::invalid(format!("its target {} does not exist", shown(&entry.link)));
        let Some((target_parent, target_name)) = split(&target) else {
            return Err(Error::invalid("a hard link to the root directory"));
        };
        if target.strip_prefix(path).is_some_and(|rest| rest.starts_with(b"/")) {
            return Err(Error::invalid("a hard link in place of its target's own parent"));
        }
        let found = match self.lookup(target_parent)? {
            Some(dir) => {
                stat_entry(&*dir, target_name).map_err(os("look for a hard link's target"))?.map(|s| (dir, s))
            }
            None => None,
        };
        let dir = match found {
            Some((_, stat)) if is_whiteout(&stat) => return Err(missing()),
            Some((_, stat)) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                return Err(Error::invalid("a hard link to a directory"));
            }
            // Linking a name to itself would remove it first.
            Some(_) if target == path => return Ok(()),
            Some((dir, _)) => dir,
            None => {
                let dir = self.copy_up(&target)?.ok_or_else(missing)?;
                if target == path {
                    return Ok(());
                }
                dir
            }
        };
        self.make(parent, name, path, |parent, name| {
            fs::linkat(&*dir, target_name, parent, name, AtFlags::empty())
        })
    }

    fn whiteout(&mut self, parent: &[u8], name: &[u8]) -> Result<()> {
        if name == WHITEOUT_OPAQUE {
            let dir = self.parent(parent)?;
            return set_opaque(&dir).map_err(os("make a directory opaque"));
        }
        if name.starts_with(WHITEOUT_META) {
            return Ok(()); // aufs's own bookkeeping
        }
        let hidden = &name[WHITEOUT.len()..];
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(Error::invalid("a whiteout without a proper name"));
        }
        let parent = self.parent(parent)?;
        match fs::mknodat(&*parent, hidden, FileType::CharacterDevice, Mode::empty(), fs::makedev(0, 0)) {
            Ok(()) => self.add_usage(&parent, hidden),
            Err(Errno::EXIST) => {
                // What this layer itself brings stays, but a directory no longer shows what is below it.
                let stat = stat_entry(&*parent, hidden).map_err(os("look at what a whiteout hides"))?;
                if stat.is_some_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Directory) {
                    let dir =
                        fs::openat(&*parent, hidden, DIR, Mode::empty()).map_err(os("open a directory"))?;
                    set_opaque(&dir).map_err(os("make a directory opaque"))?;
                }
                Ok(())
            }
            Err(e) => Err(os("make a whiteout")(e)),
        }
    }

    // Making entries.

    /// Makes an entry that is not a directory, in place of whatever has its name.
    fn make<T>(
        &mut self,
        parent: &Rc<OwnedFd>,
        name: &[u8],
        path: &[u8],
        make: impl Fn(BorrowedFd<'_>, &[u8]) -> Result<T, Errno>,
    ) -> Result<T> {
        match make(parent.as_fd(), name) {
            Err(Errno::EXIST) => {
                self.replace(parent, name, path)?;
                make(parent.as_fd(), name).map_err(os("make"))
            }
            made => made.map_err(os("make")),
        }
    }

    /// Makes a directory, or finds it; says whether it is new. In place of something else only if it `may_replace`.
    fn make_directory(
        &mut self,
        parent: &Rc<OwnedFd>,
        name: &[u8],
        path: &[u8],
        may_replace: bool,
    ) -> Result<(OwnedFd, bool)> {
        let make = |parent: &Rc<OwnedFd>| fs::mkdirat(&**parent, name, Mode::RWXU);
        let mut opaque = false;
        let new = match make(parent) {
            Ok(()) => true,
            Err(Errno::EXIST) => {
                let stat = stat_entry(&**parent, name).map_err(os("look at a directory"))?;
                let stat =
                    stat.ok_or_else(|| Error::internal("a directory vanished while it was unpacked"))?;
                if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                    false
                } else {
                    // Our own whiteout of the same name meant: not merged with what is below.
                    opaque = is_whiteout(&stat);
                    if !opaque && !may_replace {
                        return Err(Error::invalid(format!(
                            "it leads through {}, not a directory",
                            shown(path)
                        )));
                    }
                    self.replace(parent, name, path)?;
                    make(parent).map_err(os("make a directory"))?;
                    true
                }
            }
            Err(e) => return Err(os("make a directory")(e)),
        };
        let fd = fs::openat(&**parent, name, DIR, Mode::empty()).map_err(os("open a directory"))?;
        if opaque {
            set_opaque(&fd).map_err(os("make a directory opaque"))?;
        }
        Ok((fd, new))
    }

    fn replace(&mut self, parent: &Rc<OwnedFd>, name: &[u8], path: &[u8]) -> Result<()> {
        remove_entry(&**parent, name).map_err(os("replace an earlier entry"))?;
        self.replaced = true;
        let below = |other: &[u8]| {
            other.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
        };
        self.open.retain(|(open, _)| !below(open));
        Ok(())
    }

    /// Gives owner, mode and extended attributes; returns the default ACL, which has to wait.
    fn describe(
        &self,
        fd: impl AsFd,
        attributes: &Attributes,
        xattrs: &Xattrs,
        directory: bool,
    ) -> Result<Option<Vec<u8>>> {
        attributes.set(&fd).map_err(os("set owner and mode"))?;
        let mut default_acl = None;
        let mut total = 0_usize;
        for (name, value) in xattrs {
            total = total.saturating_add(name.len()).saturating_add(value.len());
            if value.len() > self.limits.xattr_bytes || total > self.limits.xattrs_bytes {
                return Err(Error::new(Kind::ResourceExhausted, "its extended attributes are too large"));
            }
            if directory && name == b"system.posix_acl_default" {
                default_acl = Some(value.clone());
            } else if is_portable(name) {
                set_xattr(&fd, name, value)?;
            }
        }
        Ok(default_acl)
    }

    fn add_usage(&mut self, parent: &OwnedFd, name: &[u8]) -> Result<()> {
        let stat = fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(os("stat"))?;
        self.usage.add(&stat);
        Ok(())
    }

    // Finding directories.

    /// The directory of that path, made with its parents if it is missing.
    fn parent(&mut self, path: &[u8]) -> Result<Rc<OwnedFd>> {
        if let Some(dir) = self.lookup(path)? {
            return Ok(dir);
        }
        let mut dir = self.root.clone();
        let mut end = 0;
        for name in path.split(|b| *b == b'/') {
            end += name.len() + usize::from(end > 0);
            let here = &path[..end];
            let fd = match fs::openat(&*dir, name, DIR, Mode::empty()) {
                Ok(fd) => fd,
                Err(_) => {
                    // First look, then make: a whiteout of ours decides what can be seen below, and is about to go.
                    let below = self.find_lower(here)?;
                    let (fd, _) = self.make_directory(&dir, name, here, false)?;
                    self.imitate(&fd, here, name, below)?;
                    fd
                }
            };
            dir = Rc::new(fd);
        }
        self.remember(path.to_vec(), dir.clone());
        Ok(dir)
    }

    /// The directory of that path, if this layer has it.
    fn lookup(&mut self, path: &[u8]) -> Result<Option<Rc<OwnedFd>>> {
        if path.is_empty() {
            return Ok(Some(self.root.clone()));
        }
        if let Some(at) = self.open.iter().rposition(|(open, _)| open == path) {
            let last = self.open.len() - 1;
            self.open.swap(at, last);
            return Ok(Some(self.open[last].1.clone()));
        }
        match open_beneath(&self.root, path) {
            Ok(dir) => {
                let dir = Rc::new(dir);
                self.remember(path.to_vec(), dir.clone());
                Ok(Some(dir))
            }
            // Also what is no directory: making it says what is wrong.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(e) => Err(os("open a directory")(e)),
        }
    }

    fn remember(&mut self, path: Vec<u8>, dir: Rc<OwnedFd>) {
        if let Some(known) = self.open.iter_mut().find(|(open, _)| *open == path) {
            known.1 = dir;
            return;
        }
        if self.open.len() == OPEN_DIRS {
            self.open.remove(0);
        }
        self.open.push((path, dir));
    }

    fn postpone(&mut self, path: Vec<u8>, pending: Pending) -> Result<()> {
        let acl = pending.default_acl.as_ref().map_or(0, Vec::len);
        let path_bytes = if self.pending.contains_key(&path) { 0 } else { path.len() };
        self.pending_bytes = self.pending_bytes.saturating_add(path_bytes).saturating_add(acl);
        if self.pending_bytes > self.limits.directory_bytes {
            return Err(Error::new(
                Kind::ResourceExhausted,
                "the layer's directories have too long paths together",
            ));
        }
        self.pending.insert(path, pending);
        Ok(())
    }

    // Lower layers.

    /// Finds what is visible under a path below this layer: its directory, and what it is.
    fn find_lower(&mut self, path: &[u8]) -> Result<Option<(OwnedFd, Stat)>> {
        if self.lower_fds.is_none() {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let opened: Result<_, _> =
                (self.below)()?.iter().map(|dir| fs::openat(CWD, dir, flags, Mode::empty())).collect();
            self.lower_fds = Some(opened.map_err(os("open the layers below"))?);
        }
        // This layer comes first: it may hide what is below, although it has no such entry itself.
        let layers = std::iter::once(&*self.root).chain(self.lower_fds.iter().flatten());
        for layer in layers {
            self.check_cancelled()?;
            match find(layer, path).map_err(os("look into the layers below"))? {
                Found::Entry(dir, stat) => return Ok(Some((dir, stat))),
                Found::Hidden => return Ok(None),
                Found::Nothing => {}
            }
        }
        Ok(None)
    }

    /// Gives a new directory that the archive did not list the attributes of the one that it will be merged with.
    fn imitate(
        &mut self,
        fd: &OwnedFd,
        path: &[u8],
        name: &[u8],
        below: Option<(OwnedFd, Stat)>,
    ) -> Result<()> {
        let pending = match below {
            Some((dir, stat)) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                let below =
                    fs::openat(dir, name, DIR, Mode::empty()).map_err(os("open a directory below"))?;
                copy_directory(&below, fd).map_err(os("copy a directory's attributes"))?
            }
            _ => {
                Attributes { uid: 0, gid: 0, mode: 0o755, mtime: None }
                    .set(fd)
                    .map_err(os("set owner and mode"))?;
                Pending::default()
            }
        };
        self.postpone(path.to_vec(), pending)
    }

    /// Copies what lower layers have under a path to the same path in this one; returns its directory here.
    fn copy_up(&mut self, path: &[u8]) -> Result<Option<Rc<OwnedFd>>> {
        let Some((parent, name)) = split(path) else { return Ok(None) };
        let Some((dir, stat)) = self.find_lower(path)? else { return Ok(None) };
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            return Err(Error::invalid("a hard link to a directory"));
        }
        let parent = self.parent(parent)?;
        let attributes = Attributes::of_file(&stat);
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                self.spend(u64::try_from(stat.st_size).unwrap_or(u64::MAX))?;
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let source = fs::openat(&dir, name, flags, Mode::empty()).map_err(os("open a file below"))?;
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fd = self.make(&parent, name, path, |parent, name| {
                    fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR)
                })?;
                let (mut source, mut copy) = (File::from(source), File::from(fd));
                std::io::copy(&mut source, &mut copy)
                    .map_err(|e| Error::with_source(Kind::Internal, "copy a file from a layer below", e))?;
                attributes.set(&copy).map_err(os("set owner and mode"))?;
                copy_xattrs(&source, &copy).map_err(os("copy extended attributes"))?;
                fs::futimens(&copy, &attributes.times()).map_err(os("set the times"))?;
            }
            FileType::Symlink => {
                let target = fs::readlinkat(&dir, name, Vec::new()).map_err(os("read a symlink below"))?;
                self.make(&parent, name, path, |parent, name| fs::symlinkat(&*target, parent, name))?;
                attributes.set_at(parent.as_fd(), name, false).map_err(os("describe a symlink"))?;
            }
            file_type => {
                self.make(&parent, name, path, |parent, name| {
                    fs::mknodat(parent, name, file_type, Mode::RUSR | Mode::WUSR, stat.st_rdev)
                })?;
                attributes.set_at(parent.as_fd(), name, true).map_err(os("describe a device or fifo"))?;
            }
        }
        self.add_usage(&parent, name)?;
        Ok(Some(parent))
    }

    // The end.

    /// Gives directories what had to wait, and adds up.
    fn finish(mut self, dir: &Path) -> Result<Usage> {
        self.open.clear();
        // If the archive said nothing of it, the root directory looks like the one below.
        if !self.pending.contains_key(&[][..])
            && let Some(below) = (self.below)()?.first()
        {
            let below = fs::openat(CWD, below, DIR, Mode::empty()).map_err(os("open the layer below"))?;
            let pending = copy_directory(&below, &self.root).map_err(os("copy a directory's attributes"))?;
            self.postpone(Vec::new(), pending)?;
        }
        for (path, pending) in &self.pending {
            self.check_cancelled()?;
            let opened = if path.is_empty() {
                Ok(self.root.clone())
            } else {
                open_beneath(&self.root, path).map(Rc::new)
            };
            let fd = match opened {
                Ok(fd) => fd,
                // A later entry took its place.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                Err(e) => return Err(os("open a directory")(e)),
            };
            if let Some(acl) = &pending.default_acl {
                set_xattr(&fd, b"system.posix_acl_default", acl)?;
            }
            if let Some(mtime) = pending.mtime {
                let times = Timestamps { last_access: mtime, last_modification: mtime };
                fs::futimens(&fd, &times).map_err(os("set a directory's times"))?;
            }
            if !path.is_empty() {
                self.usage.add(&fs::fstat(&fd).map_err(os("stat"))?);
            }
        }
        if self.replaced {
            return tree_usage(dir);
        }
        self.usage.add(&fs::fstat(&*self.root).map_err(os("stat"))?);
        Ok(self.usage)
    }
}

/// A path without `/` at either end, without empty components and without `.`; empty for the root.
fn clean(path: &[u8], limits: &Limits) -> Result<Vec<u8>> {
    if path.is_empty() || path.contains(&0) {
        return Err(Error::invalid("the layer has an entry without a proper name"));
    }
    if path.len() > limits.path_bytes {
        return Err(Error::invalid(format!("layer entry {} has too long a path", shown(path))));
    }
    let mut clean = Vec::with_capacity(path.len());
    let mut depth = 0;
    for component in path.split(|b| *b == b'/') {
        match component {
            b"" | b"." => continue,
            b".." => return Err(Error::invalid(format!("layer entry {} leaves the layer", shown(path)))),
            long if long.len() > 255 => {
                return Err(Error::invalid(format!("layer entry {} has too long a name", shown(path))));
            }
            name => {
                if depth > 0 {
                    clean.push(b'/');
                }
                clean.extend_from_slice(name);
                depth += 1;
            }
        }
    }
    if depth > limits.depth {
        return Err(Error::invalid(format!("layer entry {} is too deep", shown(path))));
    }
    Ok(clean)
}

/// Parent and name of a clean path; nothing for the root.
fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    if path.is_empty() {
        return None;
    }
    Some(match path.iter().rposition(|b| *b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&[], path),
    })
}

/// A guest's path for an operator's eyes: escaped, and not too long.
fn shown(path: &[u8]) -> String {
    let head = &path[..path.len().min(200)];
    format!("\"{}\"{}", head.escape_ascii(), if head.len() < path.len() { "…" } else { "" })
}

fn open_beneath(root: &OwnedFd, path: &[u8]) -> Result<OwnedFd, Errno> {
    let how = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    retry(|| fs::openat2(root, path, DIR, Mode::empty(), how))
}

enum Found {
    /// The directory that has it, and what it is.
    Entry(OwnedFd, Stat),
    /// It is not there, and what is below cannot be seen either.
    Hidden,
    Nothing,
}

/// Looks for a path in one layer, by overlayfs's rules.
fn find(layer: &OwnedFd, path: &[u8]) -> Result<Found, Errno> {
    let mut dir = fs::openat(layer, ".", DIR, Mode::empty())?;
    let mut opaque = false;
    let mut names = path.split(|b| *b == b'/').peekable();
    while let Some(name) = names.next() {
        opaque |= is_opaque(&dir)?;
        let Some(stat) = stat_entry(&dir, name)? else {
            return Ok(if opaque { Found::Hidden } else { Found::Nothing });
        };
        if is_whiteout(&stat) {
            return Ok(Found::Hidden);
        }
        if names.peek().is_none() {
            return Ok(Found::Entry(dir, stat));
        }
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return Ok(Found::Hidden);
        }
        dir = fs::openat(&dir, name, DIR, Mode::empty())?;
    }
    Ok(Found::Nothing)
}

fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

fn set_opaque(dir: impl AsFd) -> Result<(), Errno> {
    fs::fsetxattr(dir, OPAQUE, b"y", XattrFlags::empty())
}

fn is_opaque(dir: impl AsFd) -> Result<bool, Errno> {
    let mut value = [0_u8; 1];
    match fs::fgetxattr(dir, OPAQUE, &mut value[..]) {
        Ok(len) => Ok(len == 1 && value == *b"y"),
        Err(Errno::NODATA | Errno::NOTSUP | Errno::RANGE) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Whether an attribute means the same on every host. `trusted.*` speaks to overlayfs and other parts of this host,
/// the rest of `security.*` to its security modules, whose policy is not the image's to make.
fn is_portable(name: &[u8]) -> bool {
    name.starts_with(b"user.") || name == b"security.capability" || name == b"system.posix_acl_access"
}

fn set_xattr(fd: impl AsFd, name: &[u8], value: &[u8]) -> Result<()> {
    match fs::fsetxattr(fd, name, value, XattrFlags::empty()) {
        // Not every file system has them all; an image works without, as it does elsewhere.
        Ok(()) | Err(Errno::NOTSUP) => Ok(()),
        Err(Errno::INVAL | Errno::RANGE) => {
            Err(Error::invalid(format!("a malformed attribute {}", shown(name))))
        }
        Err(e) => Err(os("set an extended attribute")(e)),
    }
}

/// The names of all extended attributes.
fn xattr_names(fd: impl AsFd) -> Result<Vec<Vec<u8>>, Errno> {
    let mut list = vec![0_u8; 64 << 10]; // the kernel's own limit
    match fs::flistxattr(fd, list.as_mut_slice()) {
        Ok(len) => {
            list.truncate(len);
            Ok(list.split(|b| *b == 0).filter(|name| !name.is_empty()).map(<[u8]>::to_vec).collect())
        }
        Err(Errno::NOTSUP) => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}

/// Takes away what an earlier entry of the same path gave.
fn clear_xattrs(fd: impl AsFd) -> Result<(), Errno> {
    for name in xattr_names(&fd)?.iter().filter(|name| is_portable(name)) {
        fs::fremovexattr(&fd, name.as_slice())?;
    }
    Ok(())
}

fn copy_xattrs(from: impl AsFd, to: impl AsFd) -> Result<Option<Vec<u8>>, Errno> {
    let mut default_acl = None;
    for name in xattr_names(&from)? {
        let is_default_acl = name == b"system.posix_acl_default";
        if !is_portable(&name) && !is_default_acl {
            continue;
        }
        let mut value = vec![0_u8; 64 << 10];
        let len = fs::fgetxattr(&from, name.as_slice(), value.as_mut_slice())?;
        value.truncate(len);
        if is_default_acl {
            default_acl = Some(value);
        } else {
            fs::fsetxattr(&to, name.as_slice(), &value, XattrFlags::empty())?;
        }
    }
    Ok(default_acl)
}

/// Makes a directory look like another; what has to wait is returned.
fn copy_directory(from: &OwnedFd, to: &OwnedFd) -> Result<Pending, Errno> {
    let attributes = Attributes::of_file(&fs::fstat(from)?);
    attributes.set(to)?;
    let default_acl = copy_xattrs(from, to)?;
    Ok(Pending { mtime: attributes.mtime, default_acl })
}

/// An error of the system, with the kind that its cause has for a layer.
fn os(what: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| {
        let kind = match errno {
            Errno::NOSPC | Errno::DQUOT | Errno::FBIG => Kind::ResourceExhausted,
            Errno::NAMETOOLONG | Errno::MLINK => Kind::InvalidArgument,
            _ => Kind::Internal,
        };
        Error::with_source(kind, what, errno)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    /// Owners, devices and `trusted.*` attributes need privilege; without it there is nothing to check.
    pub(in crate::image) fn privileged() -> bool {
        let root = rustix::process::geteuid().is_root();
        if !root {
            println!("skipped: only root may make devices and give files away");
        }
        root
    }

    /// An archive, written byte by byte, so that it can be wrong.
    #[derive(Clone, Default)]
    pub(in crate::image) struct Tar(pub(in crate::image) Vec<u8>);

    impl Tar {
        fn header(kind: u8, path: &[u8], link: &[u8], size: u64) -> tar::Header {
            let mut header = tar::Header::new_ustar();
            header.as_old_mut().name[..path.len()].copy_from_slice(path);
            header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
            header.as_old_mut().linkflag = [kind]; // as it is: the library would tidy it
            header.set_mode(if kind == b'5' { 0o755 } else { 0o644 });
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(1_000_000);
            header.set_size(size);
            header
        }

        fn put(mut self, mut header: tar::Header, content: &[u8]) -> Tar {
            header.set_cksum();
            self.0.extend(header.as_bytes());
            self.content(content)
        }

        fn content(mut self, content: &[u8]) -> Tar {
            self.0.extend(content);
            self.0.resize(self.0.len().next_multiple_of(512), 0);
            self
        }

        fn any(self, kind: u8, path: impl AsRef<[u8]>, link: impl AsRef<[u8]>) -> Tar {
            self.put(Tar::header(kind, path.as_ref(), link.as_ref(), 0), b"")
        }

        pub(in crate::image) fn file(self, path: impl AsRef<[u8]>, content: &[u8]) -> Tar {
            self.put(Tar::header(b'0', path.as_ref(), b"", content.len() as u64), content)
        }

        fn with(self, kind: u8, path: &str, change: impl Fn(&mut tar::Header)) -> Tar {
            let mut header = Tar::header(kind, path.as_bytes(), b"", 0);
            change(&mut header);
            self.put(header, b"")
        }

        fn dir(self, path: impl AsRef<[u8]>) -> Tar {
            self.any(b'5', path, "")
        }

        fn symlink(self, path: &str, target: &str) -> Tar {
            self.any(b'2', path, target)
        }

        fn link(self, path: &str, target: &str) -> Tar {
            self.any(b'1', path, target)
        }

        fn device(self, kind: u8, path: &str, major: &[u8; 8], minor: &[u8; 8]) -> Tar {
            self.with(kind, path, |header| {
                let ustar = header.as_ustar_mut().unwrap();
                (ustar.dev_major, ustar.dev_minor) = (*major, *minor);
            })
        }

        fn extension(self, kind: u8, content: &[u8]) -> Tar {
            self.put(Tar::header(kind, b"ext", b"", content.len() as u64), content)
        }

        fn pax(self, records: &[(&str, &[u8])]) -> Tar {
            let mut text = Vec::new();
            for (key, value) in records {
                let rest = key.len() + value.len() + 3;
                let mut len = rest + 1;
                while len != rest + len.to_string().len() {
                    len += 1;
                }
                text.extend(format!("{len} {key}=").bytes());
                text.extend(*value);
                text.push(b'\n');
            }
            self.extension(b'x', &text)
        }

        pub(in crate::image) fn end(mut self) -> Vec<u8> {
            self.0.resize(self.0.len() + 1024, 0);
            self.0
        }
    }

    fn tar() -> Tar {
        Tar::default()
    }

    /// What a directory holds, one line per entry: type, mode, path, and what else is not the default.
    pub(in crate::image) fn tree(dir: &Path) -> Vec<String> {
        let mut lines = Vec::new();
        let mut todo = vec![dir.to_path_buf()];
        while let Some(path) = todo.pop() {
            let meta = path.symlink_metadata().unwrap();
            let name = path.strip_prefix(dir).unwrap().as_os_str().as_bytes();
            let name = if name.is_empty() { ".".to_owned() } else { name.escape_ascii().to_string() };
            let kind = meta.file_type();
            let mode = meta.mode() & 0o7777;
            let device = (fs::major(meta.rdev()), fs::minor(meta.rdev()));
            let mut line = if kind.is_dir() {
                todo.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
                format!("d {mode:o} {name}")
            } else if kind.is_symlink() {
                format!("l {name} -> {}", std::fs::read_link(&path).unwrap().display())
            } else if kind.is_file() && meta.len() > 64 {
                format!("f {mode:o} {name} of {}", meta.len())
            } else if kind.is_file() {
                format!("f {mode:o} {name} {:?}", std::fs::read(&path).unwrap().escape_ascii().to_string())
            } else if kind.is_fifo() {
                format!("p {mode:o} {name}")
            } else if kind.is_char_device() && device == (0, 0) {
                format!("w {name}")
            } else {
                let kind = if kind.is_char_device() { 'c' } else { 'b' };
                format!("{kind} {mode:o} {name} {}:{}", device.0, device.1)
            };
            if (meta.uid(), meta.gid()) != (0, 0) {
                line += &format!(" {}:{}", meta.uid(), meta.gid());
            }
            if !kind.is_dir() && meta.nlink() > 1 {
                line += &format!(" #{}", meta.nlink());
            }
            if kind.is_dir() || kind.is_file() {
                let fd = File::open(&path).unwrap();
                for name in xattr_names(&fd).unwrap() {
                    let mut value = vec![0; 1 << 16];
                    let len = fs::fgetxattr(&fd, name.as_slice(), value.as_mut_slice()).unwrap();
                    line += &format!(" {}={}", name.escape_ascii(), value[..len.min(20)].escape_ascii());
                }
            }
            lines.push(line);
        }
        lines.sort();
        lines
    }

    /// A directory to unpack into, and beside it what must not change.
    struct Place {
        temp: tempfile::TempDir,
    }

    impl Place {
        fn new() -> Place {
            let place = Place { temp: tempfile::tempdir().unwrap() };
            let canary = place.canary();
            std::fs::create_dir_all(canary.join("private")).unwrap();
            std::fs::write(canary.join("secret"), "canary").unwrap();
            std::fs::set_permissions(canary.join("private"), PermissionsExt::from_mode(0o700)).unwrap();
            fs::mkfifoat(CWD, canary.join("fifo"), Mode::RUSR).unwrap();
            std::fs::create_dir(place.layer()).unwrap();
            place
        }

        fn canary(&self) -> PathBuf {
            self.temp.path().join("canary")
        }

        fn layer(&self) -> PathBuf {
            self.temp.path().join("layer")
        }

        /// The canary and its surroundings with all that could have changed.
        fn outside(&self) -> Vec<String> {
            let mut all = tree(&self.canary());
            for name in ["", "secret", "private", "fifo"] {
                let meta = self.canary().join(name).symlink_metadata().unwrap();
                all.push(format!("{name} {} {}", meta.mtime(), meta.nlink()));
            }
            all.extend(
                std::fs::read_dir(self.temp.path()).unwrap().map(|e| format!("{:?}", e.unwrap().file_name())),
            );
            all
        }
    }

    pub(in crate::image) fn applied(
        archive: &[u8],
        dir: &Path,
        lower: &[PathBuf],
        limits: &Limits,
    ) -> Result<Usage> {
        apply(&mut &*archive, dir, &|| Ok(lower.to_vec()), limits, &AtomicBool::new(false))
    }

    enum Verdict {
        /// The lines of the tree, without the root directory's.
        Tree(&'static [&'static str]),
        Refused(&'static str),
    }
    use Verdict::{Refused, Tree};

    /// Unpacks on a fresh place; the archive is built knowing where the canary is.
    fn check(name: &str, archive: impl Fn(&str) -> Vec<u8>, verdict: &Verdict) {
        let place = Place::new();
        let before = place.outside();
        let archive = archive(place.canary().to_str().unwrap());
        let result = applied(&archive, &place.layer(), &[], &Limits::default());
        assert_eq!(place.outside(), before, "{name}: something outside changed");
        match (verdict, result) {
            (Tree(expected), Ok(usage)) => {
                let mut lines = tree(&place.layer());
                lines.retain(|line| !line.starts_with("d ") || !line.ends_with(" ."));
                let canary = place.canary().display().to_string();
                let lines: Vec<String> = lines.iter().map(|line| line.replace(&canary, "CANARY")).collect();
                let mut expected: Vec<String> = expected.iter().map(|line| (*line).to_owned()).collect();
                expected.sort();
                assert_eq!(lines, expected, "{name}");
                assert_eq!(usage, tree_usage(&place.layer()).unwrap(), "{name}: usage");
            }
            (Refused(why), Err(error)) => {
                assert!(error.to_string().contains(why), "{name}: {error}");
                assert_eq!(error.kind(), Kind::InvalidArgument, "{name}: {error}");
            }
            (Tree(_), Err(error)) => panic!("{name}: {error}"),
            (Refused(_), Ok(_)) => panic!("{name}: accepted as {:?}", tree(&place.layer())),
        }
    }

    #[test]
    fn paths_stay_in_the_layer() {
        if !privileged() {
            return;
        }
        let long = "n".repeat(256);
        let deep = "d/".repeat(257);
        #[rustfmt::skip]
        let cases: Vec<(&str, Vec<u8>, Verdict)> = vec![
            ("plain", tar().dir("d/").file("d/f", b"x").end(), Tree(&["d 755 d", "f 644 d/f \"x\""])),
            ("dot slash", tar().dir("./").dir("./d").file("./d/./f", b"x").end(), Tree(&["d 755 d", "f 644 d/f \"x\""])),
            ("absolute", tar().file("/f", b"x").file("//g", b"y").end(), Tree(&["f 644 f \"x\"", "f 644 g \"y\""])),
            ("up", tar().file("../canary/secret", b"x").end(), Refused("leaves the layer")),
            ("up, absolute", tar().file("/../x", b"x").end(), Refused("leaves the layer")),
            ("up in the middle", tar().file("a/../../b", b"x").end(), Refused("leaves the layer")),
            ("up, but not out", tar().dir("a").file("a/../b", b"x").end(), Refused("leaves the layer")),
            ("up at the end", tar().dir("a/..").end(), Refused("leaves the layer")),
            ("up as a whiteout", tar().file("../.wh.canary", b"").end(), Refused("leaves the layer")),
            ("dots that are names", tar().file("...", b"x").file("..f", b"y").end(), Tree(&["f 644 ... \"x\"", "f 644 ..f \"y\""])),
            ("no name", tar().file("", b"x").end(), Refused("without a proper name")),
            ("root as a file", tar().file("./", b"x").end(), Refused("root is not a directory")),
            ("root as a symlink", tar().symlink(".", "/etc").end(), Refused("root is not a directory")),
            ("root as a hard link", tar().link("/", "x").end(), Refused("root is not a directory")),
            ("too long a name", tar().pax(&[("path", long.as_bytes())]).file("f", b"").end(), Refused("too long a name")),
            ("too deep", tar().pax(&[("path", deep.as_bytes())]).dir("d").end(), Refused("too deep")),
            ("too long a path", tar().pax(&[("path", "a/".repeat(3000).as_bytes())]).dir("d").end(), Refused("too long a path")),
            ("not UTF-8", tar().file(b"\xff\xfe", b"x").end(), Tree(&["f 644 \\xff\\xfe \"x\""])),
            ("a newline in a name", tar().pax(&[("path", b"a\nb")]).file("f", b"").end(), Tree(&["f 644 a\\nb \"\""])),
            ("missing parents", tar().file("a/b/f", b"x").end(), Tree(&["d 755 a", "d 755 a/b", "f 644 a/b/f \"x\""])),
            ("parents described later", tar().file("a/f", b"x").with(b'5', "a", |h| { h.set_mode(0o1700); h.set_uid(7); }).end(),
                Tree(&["d 1700 a 7:0", "f 644 a/f \"x\""])),
            ("empty", tar().end(), Tree(&[])),
            ("no blocks at all", Vec::new(), Tree(&[])),
            ("no end", tar().file("f", b"x").0, Tree(&["f 644 f \"x\""])),
        ];
        for (name, archive, verdict) in &cases {
            check(name, |_| archive.clone(), verdict);
        }
    }

    #[test]
    fn symlinks_are_never_followed() {
        if !privileged() {
            return;
        }
        type Archive = fn(&str) -> Vec<u8>;
        #[rustfmt::skip]
        let cases: &[(&str, Archive, Verdict)] = &[
            ("a file through a symlink", |c| tar().symlink("d", c).file("d/secret", b"x").end(), Refused("not a directory")),
            ("a file through a relative symlink", |_| tar().symlink("d", "../canary").file("d/secret", b"x").end(), Refused("not a directory")),
            ("deeper", |c| tar().dir("a").symlink("a/d", c).file("a/d/e/f", b"x").end(), Refused("not a directory")),
            ("inside the layer too", |_| tar().dir("a").symlink("d", "a").file("d/f", b"x").end(), Refused("not a directory")),
            ("through a cached parent", |c| tar().dir("d").file("d/f", b"x").symlink("d", c).file("d/secret", b"x").end(), Refused("not a directory")),
            ("a directory through a symlink", |c| tar().symlink("d", c).dir("d/new").end(), Refused("not a directory")),
            ("a symlink through a symlink", |c| tar().symlink("d", c).symlink("d/new", "x").end(), Refused("not a directory")),
            ("a device through a symlink", |c| tar().symlink("d", c).device(b'3', "d/new", b"0000001\0", b"0000003\0").end(), Refused("not a directory")),
            ("a whiteout through a symlink", |c| tar().symlink("d", c).file("d/.wh.secret", b"").end(), Refused("not a directory")),
            ("an opaque symlink", |c| tar().symlink("d", c).file("d/.wh..wh..opq", b"").end(), Refused("not a directory")),
            ("a hard link through a symlink", |c| tar().symlink("d", c).link("f", "d/secret").end(), Refused("does not exist")),
            ("a hard link into a symlink", |c| tar().file("f", b"x").symlink("d", c).link("d/f", "f").end(), Refused("not a directory")),
            ("a hard link to the host", |c| tar().link("f", &format!("{c}/secret")).end(), Refused("does not exist")),
            ("a hard link upwards", |_| tar().link("f", "../canary/secret").end(), Refused("leaves the layer")),
            ("a chain of symlinks", |c| tar().symlink("a", c).symlink("b", "a").file("b/secret", b"x").end(), Refused("not a directory")),
            ("through a file", |_| tar().file("d", b"x").file("d/f", b"x").end(), Refused("not a directory")),
            ("through a fifo", |_| tar().any(b'6', "d", "").file("d/f", b"x").end(), Refused("not a directory")),
            ("a file replaces a symlink", |c| tar().symlink("f", &format!("{c}/secret")).file("f", b"x").end(), Tree(&["f 644 f \"x\""])),
            ("a directory replaces a symlink", |c| tar().symlink("d", c).with(b'5', "d", |h| h.set_mode(0o777)).file("d/secret", b"x").end(),
                Tree(&["d 777 d", "f 644 d/secret \"x\""])),
            ("a symlink replaces a tree", |c| tar().dir("d").file("d/e/f", b"x").symlink("d", c).end(), Tree(&["l d -> CANARY"])),
            ("a hard link to a symlink", |c| tar().symlink("l", &format!("{c}/secret")).link("m", "l").with(b'0', "f", |h| h.set_mode(0o600)).end(),
                Tree(&["f 600 f \"\"", "l l -> CANARY/secret #2", "l m -> CANARY/secret #2"])),
            ("a file replaces one of two links", |c| tar().symlink("l", &format!("{c}/secret")).link("m", "l").file("m", b"x").end(),
                Tree(&["f 644 m \"x\"", "l l -> CANARY/secret"])),
            ("an empty symlink", |_| tar().symlink("l", "").end(), Refused("empty or too long")),
            ("a mode and owner on a symlink", |c| tar().symlink("l", &format!("{c}/secret")).with(b'2', "k", |h| {
                h.set_mode(0o7777); h.set_uid(9); h.as_old_mut().linkname[..3].copy_from_slice(b"l\0\0"); }).end(),
                Tree(&["l k -> l 9:0", "l l -> CANARY/secret"])),
        ];
        for (name, archive, verdict) in cases {
            check(name, archive, verdict);
        }
    }

    #[test]
    fn every_type_is_made_as_described_and_the_last_entry_of_a_name_wins() {
        if !privileged() {
            return;
        }
        let acl: &[u8] = &[
            2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 4, 0, 5, 0, 255, 255, 255, 255, 32, 0, 0, 0, 255,
            255, 255, 255,
        ];
        let capability: &[u8] = &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        #[rustfmt::skip]
        let cases: Vec<(&str, Vec<u8>, Verdict)> = vec![
            ("types", tar().any(b'6', "p", "").device(b'3', "c", b"0000001\0", b"0000003\0").device(b'4', "b", b"0000010\0", b"0000001\0").symlink("l", "a").end(),
                Tree(&["b 644 b 8:1", "c 644 c 1:3", "l l -> a", "p 644 p"])),
            ("modes", tar().with(b'0', "s", |h| h.set_mode(0o4755)).with(b'0', "g", |h| h.set_mode(0o2711)).with(b'5', "t", |h| h.set_mode(0o1777))
                .with(b'0', "z", |h| h.set_mode(0)).with(b'0', "m", |h| h.set_mode(0o100_664)).end(),
                Tree(&["d 1777 t", "f 0 z \"\"", "f 2711 g \"\"", "f 4755 s \"\"", "f 664 m \"\""])),
            ("setuid with an owner", tar().with(b'0', "s", |h| { h.set_mode(0o6755); h.set_uid(5); h.set_gid(6); }).end(), Tree(&["f 6755 s \"\" 5:6"])),
            ("a setgid directory is not inherited", tar().with(b'5', "d", |h| { h.set_mode(0o2755); h.set_gid(5); }).dir("d/e").file("d/f", b"").end(),
                Tree(&["d 2755 d 0:5", "d 755 d/e", "f 644 d/f \"\""])),
            ("large owners, base 256", tar().with(b'0', "f", |h| h.set_uid(3_000_000_000)).end(), Tree(&["f 644 f \"\" 3000000000:0"])),
            ("large owners, PAX", tar().pax(&[("uid", b"4000000000"), ("gid", b"2097152")]).file("f", b"").end(), Tree(&["f 644 f \"\" 4000000000:2097152"])),
            ("an owner that is no owner", tar().pax(&[("uid", b"4294967295")]).file("f", b"").end(), Refused("owner out of range")),
            ("an owner out of range", tar().pax(&[("gid", b"4294967296")]).file("f", b"").end(), Refused("owner out of range")),
            ("a negative owner", tar().with(b'0', "f", |h| h.as_old_mut().uid = [255; 8]).end(), Refused("owner out of range")),
            ("a file twice", tar().file("f", b"long").file("f", b"x").end(), Tree(&["f 644 f \"x\""])),
            ("a file over a directory", tar().dir("d").file("d/f", b"x").file("d", b"y").end(), Tree(&["f 644 d \"y\""])),
            ("a directory over a file", tar().file("d", b"x").dir("d").file("d/f", b"y").end(), Tree(&["d 755 d", "f 644 d/f \"y\""])),
            ("a directory twice keeps its files", tar().dir("d").file("d/f", b"x").with(b'5', "d", |h| h.set_mode(0o700)).end(),
                Tree(&["d 700 d", "f 644 d/f \"x\""])),
            ("a fifo over a device over a file", tar().file("x", b"").device(b'3', "x", b"0000001\0", b"0000003\0").any(b'6', "x", "").end(), Tree(&["p 644 x"])),
            ("hard links", tar().file("a", b"x").link("b", "a").link("d/c", "/b").end(),
                Tree(&["d 755 d", "f 644 a \"x\" #3", "f 644 b \"x\" #3", "f 644 d/c \"x\" #3"])),
            ("a hard link over its twin", tar().file("a", b"x").link("b", "a").link("b", "a").end(), Tree(&["f 644 a \"x\" #2", "f 644 b \"x\" #2"])),
            ("a hard link to itself", tar().file("a", b"x").link("a", "./a").end(), Tree(&["f 644 a \"x\""])),
            ("a hard link to nothing", tar().link("a", "b").end(), Refused("does not exist")),
            ("a hard link to itself, which is not", tar().link("a", "a").end(), Refused("does not exist")),
            ("a hard link to a directory", tar().dir("d").link("a", "d").end(), Refused("to a directory")),
            ("a hard link to the root", tar().link("a", "/").end(), Refused("to the root")),
            ("a hard link over its target's parent", tar().file("d/f", b"x").link("d", "d/f").end(), Refused("own parent")),
            ("a hard link to a whiteout", tar().file(".wh.a", b"").link("b", "a").end(), Refused("does not exist")),
            ("a hard link with a size", tar().file("a", b"x").with(b'1', "b", |h| { h.set_size(512); h.as_old_mut().linkname[0] = b'a'; }).file("c", b"y").end(),
                Tree(&["f 644 a \"x\" #2", "f 644 b \"x\" #2", "f 644 c \"y\""])),
            ("an old regular file", tar().any(0, "f", "").any(0, "d/", "").any(b'7', "g", "").end(), Tree(&["d 644 d", "f 644 f \"\"", "f 644 g \"\""])),
            ("an unknown type", tar().any(b'Z', "f", "").end(), Refused("unknown type")),
            ("GNU's volume label", tar().any(b'V', "f", "").end(), Refused("unknown type")),
            ("a device major out of range", tar().device(b'3', "c", b"0010000\0", b"0000001\0").end(), Refused("out of range")),
            ("a device minor out of range", tar().device(b'4', "b", b"0000001\0", b"4000000\0").end(), Refused("out of range")),
            ("a device that wraps", tar().device(b'4', "b", b"\x80\0\0\x01\0\0\0\x08", b"0000000\0").end(), Refused("out of range")),
            ("a device 0:0 is not a whiteout", tar().device(b'3', "c", b"0000000\0", b"0000000\0").file("f", b"").end(), Tree(&["f 644 f \"\""])),
            ("a block device 0:0", tar().device(b'4', "b", b"0000000\0", b"0000000\0").end(), Tree(&["b 644 b 0:0"])),
            ("attributes", tar().pax(&[("SCHILY.xattr.user.a", b"1"), ("SCHILY.xattr.user.b", b"\n\0=")]).file("f", b"").end(),
                Tree(&["f 644 f \"\" user.a=1 user.b=\\n\\x00="])),
            ("a capability survives the owner", tar().pax(&[("SCHILY.xattr.security.capability", capability), ("uid", b"3")]).file("f", b"x").end(),
                Tree(&["f 644 f \"x\" 3:0 security.capability=\\x01\\x00\\x00\\x02\\x00\\x04\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00"])),
            ("a malformed capability", tar().pax(&[("SCHILY.xattr.security.capability", b"x")]).file("f", b"x").end(), Refused("malformed attribute")),
            ("overlayfs's attributes are dropped", tar().pax(&[("SCHILY.xattr.trusted.overlay.opaque", b"y"), ("SCHILY.xattr.user.a", b"1")]).dir("d")
                .pax(&[("SCHILY.xattr.trusted.overlay.redirect", b"/etc")]).dir("e").pax(&[("SCHILY.xattr.trusted.overlay.metacopy", b"")]).file("f", b"").end(),
                Tree(&["d 755 d user.a=1", "d 755 e", "f 644 f \"\""])),
            ("so are the host's", tar().pax(&[("SCHILY.xattr.security.selinux", b"x"), ("SCHILY.xattr.trusted.x", b"y"), ("SCHILY.xattr.security.ima", b"z")]).file("f", b"").end(),
                Tree(&["f 644 f \"\""])),
            ("attributes of an earlier entry go", tar().pax(&[("SCHILY.xattr.user.a", b"1")]).dir("d").pax(&[("SCHILY.xattr.user.b", b"2")]).dir("d").end(),
                Tree(&["d 755 d user.b=2"])),
            ("a default ACL is not inherited", tar().pax(&[("SCHILY.xattr.system.posix_acl_default", acl)]).dir("d").file("d/f", b"").dir("d/e").end(),
                Tree(&["d 755 d system.posix_acl_default=\\x02\\x00\\x00\\x00\\x01\\x00\\x07\\x00\\xff\\xff\\xff\\xff\\x04\\x00\\x05\\x00\\xff\\xff\\xff\\xff", "d 755 d/e", "f 644 d/f \"\""])),
        ];
        for (name, archive, verdict) in &cases {
            check(name, |_| archive.clone(), verdict);
        }
    }

    #[test]
    fn whiteouts_take_the_form_of_overlayfs_and_spare_their_own_layer() {
        if !privileged() {
            return;
        }
        #[rustfmt::skip]
        let cases: Vec<(&str, Vec<u8>, Verdict)> = vec![
            ("a whiteout", tar().file("d/.wh.f", b"").end(), Tree(&["d 755 d", "w d/f"])),
            ("twice", tar().file(".wh.f", b"").file(".wh.f", b"").end(), Tree(&["w f"])),
            ("of any type", tar().dir(".wh.f").symlink(".wh.g", "x").end(), Tree(&["w f", "w g"])),
            ("with content", tar().file(".wh.f", b"content").file("g", b"").end(), Tree(&["f 644 g \"\"", "w f"])),
            ("opaque", tar().file("d/.wh..wh..opq", b"").file("d/f", b"x").end(), Tree(&["d 755 d trusted.overlay.opaque=y", "f 644 d/f \"x\""])),
            ("opaque, described later", tar().file("d/.wh..wh..opq", b"").with(b'5', "d", |h| h.set_mode(0o700)).end(), Tree(&["d 700 d trusted.overlay.opaque=y"])),
            ("a file, then its whiteout", tar().file("f", b"x").file(".wh.f", b"").end(), Tree(&["f 644 f \"x\""])),
            ("a whiteout, then its file", tar().file(".wh.f", b"").file("f", b"x").end(), Tree(&["f 644 f \"x\""])),
            ("a whiteout, then its directory", tar().file(".wh.d", b"").dir("d").end(), Tree(&["d 755 d trusted.overlay.opaque=y"])),
            ("a whiteout, then something in it", tar().file(".wh.d", b"").file("d/f", b"x").end(), Tree(&["d 755 d trusted.overlay.opaque=y", "f 644 d/f \"x\""])),
            ("a directory, then its whiteout", tar().file("d/f", b"x").file(".wh.d", b"").end(), Tree(&["d 755 d trusted.overlay.opaque=y", "f 644 d/f \"x\""])),
            ("aufs's own files", tar().file(".wh..wh.aufs", b"").dir(".wh..wh.plnk").file(".wh..wh.plnk/1.2", b"x").end(), Tree(&[])),
            ("no name", tar().file("d/.wh.", b"").end(), Refused("whiteout without a proper name")),
            ("the directory itself", tar().file("d/.wh..", b"").end(), Refused("whiteout without a proper name")),
            ("the parent", tar().file("d/.wh...", b"").end(), Refused("whiteout without a proper name")),
            ("something below a whiteout", tar().file(".wh.d/f", b"").end(), Refused("below a whiteout")),
        ];
        for (name, archive, verdict) in &cases {
            check(name, |_| archive.clone(), verdict);
        }
        // The root directory can be opaque too.
        let place = Place::new();
        applied(&tar().file(".wh..wh..opq", b"").end(), &place.layer(), &[], &Limits::default()).unwrap();
        assert_eq!(tree(&place.layer()), ["d 755 . trusted.overlay.opaque=y"]);
    }

    #[test]
    fn malformed_archives_are_errors_and_sizes_cannot_smuggle_entries() {
        if !privileged() {
            return;
        }
        // A file whose content is an archive: a parser that believes the wrong size sees another entry.
        let inner = tar().file("smuggled", b"x").0;
        let sized = |records: &[(&str, &[u8])], size: u64| {
            let mut header = Tar::header(b'0', b"f", b"", size);
            header.set_size(size);
            tar().pax(records).put(header, &inner).end()
        };
        let len = inner.len().to_string();
        let bad_sum = {
            let mut archive = tar().file("f", b"x").end();
            archive[0] = b'g';
            archive
        };
        let record = |text: &[u8]| tar().extension(b'x', text).file("f", b"").end();
        #[rustfmt::skip]
        let cases: Vec<(&str, Vec<u8>, Verdict)> = vec![
            ("a PAX size overrides a smaller one", sized(&[("size", len.as_bytes())], 0), Tree(&["f 644 f of 1024"])),
            ("a PAX size overrides a larger one", sized(&[("size", b"0")], inner.len() as u64), Tree(&["f 644 f \"\"", "f 644 smuggled \"x\""])),
            ("the last PAX size counts", sized(&[("size", b"0"), ("size", len.as_bytes())], 0), Tree(&["f 644 f of 1024"])),
            ("a PAX size behind a value with newlines", sized(&[("comment", b"a\n10 size=0\n"), ("size", len.as_bytes())], 0), Tree(&["f 644 f of 1024"])),
            ("a PAX size that is no number", sized(&[("size", b"0x10")], 0), Refused("not a number")),
            ("a negative PAX size", sized(&[("size", b"-1")], 0), Refused("not a number")),
            ("an overflowing PAX size", sized(&[("size", b"99999999999999999999")], 0), Refused("not a number")),
            ("a negative size", tar().with(b'0', "f", |h| h.as_old_mut().size = [255; 12]).end(), Refused("negative size")),
            ("a size that is no number", tar().with(b'0', "f", |h| h.as_old_mut().size = *b"0000000009x\0").end(), Refused("not a number")),
            ("a wrong checksum", bad_sum, Refused("checksum")),
            ("not an archive", vec![b'x'; 2048], Refused("checksum")),
            ("a truncated header", tar().file("f", b"").0[..100].to_vec(), Refused("ends in the middle")),
            ("truncated content", tar().file("f", &[1; 600]).0[..1000].to_vec(), Refused("ends in the middle")),
            ("a header after one block of zeros", { let mut t = tar().file("f", b"").content(&[0; 512]); t = t.file("g", b""); t.end() }, Refused("single block of zeros")),
            ("PAX: no length", record(b" path=x\n"), Refused("not a number")),
            ("PAX: a short length", record(b"5 path=x\n"), Refused("malformed PAX")),
            ("PAX: a long length", record(b"99 path=x\n"), Refused("malformed PAX")),
            ("PAX: no newline", record(b"9 path=xy"), Refused("malformed PAX")),
            ("PAX: no key", record(b"6 =abc\n"), Refused("malformed PAX")),
            ("PAX: no equals", record(b"7 path\n"), Refused("malformed PAX")),
            ("PAX: NUL in a path", tar().pax(&[("path", b"a\0b")]).file("f", b"").end(), Refused("contains NUL")),
            ("PAX: a time that is no number", tar().pax(&[("mtime", b"now")]).file("f", b"").end(), Refused("not a number")),
            ("PAX: an empty value takes back", tar().pax(&[("path", b"x"), ("path", b"")]).file("f", b"").end(), Tree(&["f 644 f \"\""])),
            ("PAX twice", tar().pax(&[("path", b"x")]).pax(&[("path", b"y")]).file("f", b"").end(), Refused("two PAX headers")),
            ("PAX for nothing", tar().pax(&[("path", b"x")]).end(), Refused("describes no entry")),
            ("PAX for a global PAX", tar().pax(&[("path", b"x")]).extension(b'g', b"13 comment=x\n").file("f", b"").end(), Refused("describes a PAX header")),
            ("a global comment", tar().extension(b'g', b"13 comment=x\n").file("f", b"").end(), Tree(&["f 644 f \"\""])),
            ("a global path", tar().extension(b'g', b"9 path=x\n").file("f", b"").end(), Refused("global PAX")),
            ("a global size", tar().extension(b'g', b"9 size=0\n").file("f", b"").end(), Refused("global PAX")),
            ("GNU's long names", tar().extension(b'L', &[&[b'n'; 200][..], b"\0"].concat()).extension(b'K', b"target\0").symlink("f", "x").end(),
                Tree(&["l nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn -> target"])),
            ("two long names", tar().extension(b'L', b"a\0").extension(b'L', b"b\0").file("f", b"").end(), Refused("two long names")),
            ("long names that disagree", tar().extension(b'L', b"a\0").pax(&[("path", b"b")]).file("f", b"").end(), Refused("two different long names")),
            ("long names that agree", tar().extension(b'L', b"a\0").pax(&[("path", b"a")]).file("f", b"").end(), Tree(&["f 644 a \"\""])),
            ("a prefix", tar().with(b'0', "f", |h| h.as_ustar_mut().unwrap().prefix[..3].copy_from_slice(b"a/b")).end(), Tree(&["d 755 a", "d 755 a/b", "f 644 a/b/f \"\""])),
            ("a prefix that leaves", tar().with(b'0', "f", |h| h.as_ustar_mut().unwrap().prefix[..2].copy_from_slice(b"..")).end(), Refused("leaves the layer")),
            ("a sparse file with overlapping pieces", tar().pax(&[("GNU.sparse.size", b"20"), ("GNU.sparse.numblocks", b"2"), ("GNU.sparse.map", b"0,5,3,5")]).file("f", &[1; 10]).end(), Refused("overlap")),
            ("a sparse file with too little content", tar().pax(&[("GNU.sparse.size", b"20"), ("GNU.sparse.numblocks", b"1"), ("GNU.sparse.map", b"0,15")]).file("f", &[1; 10]).end(), Refused("not its content")),
            ("a sparse file with a wrong count", tar().pax(&[("GNU.sparse.size", b"20"), ("GNU.sparse.numblocks", b"7"), ("GNU.sparse.map", b"0,10")]).file("f", &[1; 10]).end(), Refused("another length")),
            ("a sparse file that overflows", tar().pax(&[("GNU.sparse.size", b"20"), ("GNU.sparse.numblocks", b"1"), ("GNU.sparse.map", b"18446744073709551615,10")]).file("f", &[1; 10]).end(), Refused("overlap")),
            ("a sparse file's name leaves", tar().pax(&[("GNU.sparse.name", b"../x"), ("GNU.sparse.size", b"1"), ("GNU.sparse.numblocks", b"0")]).file("f", b"").end(), Refused("leaves the layer")),
            ("a sparse file", tar().pax(&[("GNU.sparse.size", b"20"), ("GNU.sparse.numblocks", b"2"), ("GNU.sparse.map", b"2,2,10,1"), ("GNU.sparse.name", b"g")]).file("f", b"abc").file("h", b"").end(),
                Tree(&["f 644 g \"\\\\x00\\\\x00ab\\\\x00\\\\x00\\\\x00\\\\x00\\\\x00\\\\x00c\\\\x00\\\\x00\\\\x00\\\\x00\\\\x00\\\\x00\\\\x00\\\\x00\\\\x00\"", "f 644 h \"\""])),
        ];
        for (name, archive, verdict) in &cases {
            check(name, |_| archive.clone(), verdict);
        }
    }

    #[test]
    fn limits_hold_at_the_limit_and_fail_beyond() {
        if !privileged() {
            return;
        }
        let big = vec![7; 1000];
        let acl = vec![0; 600];
        let files = tar().file("a", &big).file("b", &big).end();
        let attribute =
            tar().pax(&[("SCHILY.xattr.user.a", &big), ("SCHILY.xattr.user.b", &big)]).file("f", b"").end();
        let sparse = tar()
            .pax(&[
                ("GNU.sparse.size", b"1000000"),
                ("GNU.sparse.numblocks", b"1"),
                ("GNU.sparse.map", b"0,1"),
            ])
            .file("f", b"x")
            .end();
        let directories = tar().dir("dddd").dir("dddd/eeee").dir("dddd").end();
        let pax = tar().pax(&[("comment", &acl)]).extension(b'L', &[b'n'; 100]).file("f", b"").end();
        type Limit = fn(&mut Limits, u64);
        #[rustfmt::skip]
        let cases: &[(&str, &[u8], Limit, u64)] = &[
            ("entries", &files, |l, n| l.entries = n, 2),
            ("bytes", &files, |l, n| l.expanded_bytes = n, 2000),
            ("holes", &sparse, |l, n| l.expanded_bytes = n, 1_000_000),
            ("one attribute", &attribute, |l, n| l.xattr_bytes = usize::try_from(n).unwrap(), 1000),
            ("all attributes", &attribute, |l, n| l.xattrs_bytes = usize::try_from(n).unwrap(), 2012),
            ("directories", &directories, |l, n| l.directory_bytes = usize::try_from(n).unwrap(), 13),
            ("extensions", &pax, |l, n| l.extension_bytes = usize::try_from(n).unwrap(), 613 + 100),
        ];
        for (name, archive, limit, at) in cases {
            let run = |at| {
                let mut limits = Limits::default();
                limit(&mut limits, at);
                applied(archive, &Place::new().layer(), &[], &limits)
            };
            run(*at).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(run(*at - 1).unwrap_err().kind(), Kind::ResourceExhausted, "{name}");
        }
        let full = Limits { free_percent: 100, ..Limits::default() };
        let error = applied(&files, &Place::new().layer(), &[], &full).unwrap_err();
        assert_eq!(error.kind(), Kind::ResourceExhausted);
        let huge = tar().pax(&[("size", b"18446744073709551615")]).file("f", b"").end();
        let error = applied(&huge, &Place::new().layer(), &[], &Limits::default()).unwrap_err();
        assert_eq!(error.kind(), Kind::ResourceExhausted);
        // A map that never ends is not read into memory.
        let mut endless = Tar::header(b'S', b"f", b"", 0).as_bytes().to_vec();
        endless[257..265].copy_from_slice(b"ustar  \0");
        endless[345..500].fill(0);
        endless[482] = 1;
        let mut header = tar::Header::from_byte_slice(&endless).clone();
        header.set_cksum();
        let archive =
            [header.as_bytes().as_slice(), &[[b'0'; 504].as_slice(), &[1; 8]].concat().repeat(4000)].concat();
        let error = applied(&archive, &Place::new().layer(), &[], &Limits::default()).unwrap_err();
        assert_eq!(error.kind(), Kind::ResourceExhausted, "{error}");
    }

    #[test]
    fn a_cancelled_layer_stops() {
        let place = Place::new();
        let archive = tar().file("f", b"x").end();
        let error = apply(
            &mut &*archive,
            &place.layer(),
            &|| Ok(Vec::new()),
            &Limits::default(),
            &AtomicBool::new(true),
        );
        assert_eq!(error.unwrap_err().kind(), Kind::Cancelled);
    }

    /// Unpacks archives one over the other; returns their directories, the uppermost first.
    fn layers(place: &Place, archives: &[Vec<u8>]) -> Vec<PathBuf> {
        let mut lower: Vec<PathBuf> = Vec::new();
        for (number, archive) in archives.iter().enumerate() {
            let dir = place.layer().join(number.to_string());
            std::fs::create_dir(&dir).unwrap();
            applied(archive, &dir, &lower, &Limits::default()).unwrap();
            lower.insert(0, dir);
        }
        lower
    }

    #[test]
    fn a_hard_link_to_a_lower_layer_copies_its_target_up_once() {
        if !privileged() {
            return;
        }
        let place = Place::new();
        let bottom = tar()
            .with(b'5', "d", |h| h.set_mode(0o1777))
            .pax(&[("SCHILY.xattr.user.a", b"1"), ("uid", b"5")])
            .file("d/f", b"content")
            .symlink("d/l", "/etc/shadow")
            .file("gone", b"")
            .dir("gone2/sub")
            .file("gone2/sub/f", b"")
            .end();
        let middle = tar().file(".wh.gone", b"").file("gone2/.wh..wh..opq", b"").end();
        let top = tar().link("a", "d/f").link("b", "d/f").link("c", "d/l").end();
        let dirs = layers(&place, &[bottom, middle, top]);
        assert_eq!(
            tree(&dirs[0]),
            [
                "d 1777 d",
                "d 755 .",
                "f 644 a \"content\" 5:0 #3 user.a=1",
                "f 644 b \"content\" 5:0 #3 user.a=1",
                "f 644 d/f \"content\" 5:0 #3 user.a=1",
                "l c -> /etc/shadow #2",
                "l d/l -> /etc/shadow #2",
            ]
        );
        assert_eq!(std::fs::metadata(dirs[0].join("a")).unwrap().mtime(), 1_000_000);
        for hidden in ["gone", "gone2/sub/f", "d", "never", "d/f/x"] {
            let dir = place.layer().join("again");
            std::fs::create_dir(&dir).unwrap();
            let error =
                applied(&tar().link("x", hidden).end(), &dir, &dirs[1..], &Limits::default()).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidArgument, "{hidden}: {error}");
            crate::snapshot::remove_tree(&dir).unwrap();
        }
        // Every copy is paid for.
        let dir = place.layer().join("again");
        std::fs::create_dir(&dir).unwrap();
        let limits = Limits { expanded_bytes: 6, ..Limits::default() };
        let error = applied(&tar().link("x", "d/f").end(), &dir, &dirs[1..], &limits).unwrap_err();
        assert_eq!(error.kind(), Kind::ResourceExhausted);
    }

    #[test]
    fn parents_that_are_not_listed_look_like_those_below() {
        if !privileged() {
            return;
        }
        let place = Place::new();
        let bottom = tar()
            .with(b'5', "./", |h| h.set_mode(0o711))
            .with(b'5', "tmp", |h| h.set_mode(0o1777))
            .with(b'5', "tmp/d", |h| h.set_uid(8))
            .with(b'5', "gone", |h| h.set_mode(0o700))
            .symlink("lib", "usr/lib")
            .end();
        let top =
            tar().file("tmp/d/f", b"").file(".wh.gone", b"").file("gone/f", b"").file("lib/f", b"").end();
        let dirs = layers(&place, &[bottom, top]);
        assert_eq!(
            tree(&dirs[0]),
            [
                "d 1777 tmp",
                "d 711 .",
                "d 755 gone trusted.overlay.opaque=y",
                "d 755 lib",
                "d 755 tmp/d 8:0",
                "f 644 gone/f \"\"",
                "f 644 lib/f \"\"",
                "f 644 tmp/d/f \"\"",
            ]
        );
        assert_eq!(std::fs::metadata(dirs[0].join("tmp")).unwrap().mtime(), 1_000_000);
    }

    #[test]
    fn times_are_kept_to_the_nanosecond_also_of_directories_and_before_1970() {
        if !privileged() {
            return;
        }
        let place = Place::new();
        let archive = tar()
            .pax(&[("mtime", b"1234567890.123456789")])
            .dir("d")
            .pax(&[("mtime", b"-1.25")])
            .file("d/f", b"x")
            .pax(&[("mtime", b"99.5")])
            .symlink("d/l", "x")
            .with(b'0', "d/old", |h| {
                h.as_old_mut().mtime = *b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe"
            })
            .end();
        applied(&archive, &place.layer(), &[], &Limits::default()).unwrap();
        let time = |name: &str| {
            let meta = place.layer().join(name).symlink_metadata().unwrap();
            (meta.mtime(), meta.mtime_nsec())
        };
        assert_eq!(time("d"), (1_234_567_890, 123_456_789));
        assert_eq!(time("d/f"), (-2, 750_000_000));
        assert_eq!(time("d/l"), (99, 500_000_000));
        assert_eq!(time("d/old"), (-2, 0));
    }

    #[test]
    fn what_gnu_tar_writes_in_any_format_is_what_was_there() {
        if !privileged() || Command::new("tar").arg("--version").output().is_err() {
            return;
        }
        let temp = tempfile::tempdir().unwrap();
        let source = temp.path().join("source");
        std::fs::create_dir_all(source.join("dir").join("x".repeat(80)).join("y".repeat(80))).unwrap();
        let long = source.join("dir").join("x".repeat(80)).join("y".repeat(80)).join("z".repeat(80));
        std::fs::write(&long, "long").unwrap();
        std::fs::hard_link(&long, source.join("hard")).unwrap();
        symlink("x".repeat(150), source.join("soft")).unwrap();
        std::fs::set_permissions(source.join("dir"), PermissionsExt::from_mode(0o2770)).unwrap();
        let sparse = File::create(source.join("sparse")).unwrap();
        for piece in 0..100_u64 {
            std::os::unix::fs::FileExt::write_all_at(&sparse, &[b'x'; 5000], piece << 17).unwrap();
        }
        sparse.set_len(20 << 20).unwrap();
        drop(sparse);
        let content = |dir: &Path| std::fs::read(dir.join("sparse")).unwrap();
        for format in [
            vec!["--format=gnu"],
            vec!["--format=gnu", "--sparse"],
            vec!["--format=posix"],
            vec!["--format=posix", "--sparse", "--sparse-version=0.0"],
            vec!["--format=posix", "--sparse", "--sparse-version=0.1"],
            vec!["--format=posix", "--sparse", "--sparse-version=1.0"],
        ] {
            let archive =
                Command::new("tar").arg("-C").arg(&source).args(&format).args(["-c", "."]).output().unwrap();
            assert!(archive.status.success());
            let dir = temp.path().join("unpacked");
            std::fs::create_dir(&dir).unwrap();
            applied(&archive.stdout, &dir, &[], &Limits::default())
                .unwrap_or_else(|e| panic!("{format:?}: {e}"));
            assert_eq!(tree(&dir), tree(&source), "{format:?}");
            assert!(content(&dir) == content(&source), "{format:?}: content");
            if format.contains(&"--sparse") {
                let blocks = std::fs::metadata(dir.join("sparse")).unwrap().blocks();
                assert!(blocks < (4 << 20) / 512, "{format:?}: {blocks} blocks: the holes were filled");
            }
            crate::snapshot::remove_tree(&dir).unwrap();
        }
    }

    #[derive(Debug, Clone)]
    enum Node {
        Dir(u32, BTreeMap<Vec<u8>, Node>),
        File(u32, Vec<u8>),
        Symlink(Vec<u8>),
    }

    fn nodes() -> impl Strategy<Value = BTreeMap<Vec<u8>, Node>> {
        let name = prop::collection::vec(prop_oneof![1_u8..=46, 48_u8..=255], 1..60)
            .prop_filter("a name of its own", |n| n != b"." && n != b".." && !n.starts_with(WHITEOUT));
        let leaf = prop_oneof![
            (0_u32..0o7777, prop::collection::vec(any::<u8>(), 0..2000))
                .prop_map(|(mode, content)| Node::File(mode, content)),
            prop::collection::vec(1_u8..=255, 1..100).prop_map(Node::Symlink),
        ];
        let children = prop::collection::btree_map(name.clone(), leaf, 0..4);
        children.prop_recursive(5, 40, 4, move |inner| {
            let child = (0_u32..0o7777, inner).prop_map(|(mode, children)| Node::Dir(mode, children));
            prop::collection::btree_map(name.clone(), child, 0..4)
        })
    }

    /// Puts the same tree on disk and into an archive, by other means than the code under test.
    fn build(nodes: &BTreeMap<Vec<u8>, Node>, prefix: &Path, disk: &Path, mut archive: Tar) -> Tar {
        for (name, node) in nodes {
            let name = OsStr::from_bytes(name);
            let (path, real) = (prefix.join(name), disk.join(name));
            archive = archive.extension(b'L', path.as_os_str().as_bytes());
            match node {
                Node::Dir(mode, children) => {
                    archive = archive.with(b'5', "d", |header| header.set_mode(*mode));
                    std::fs::create_dir(&real).unwrap();
                    archive = build(children, &path, &real, archive);
                    std::fs::set_permissions(&real, PermissionsExt::from_mode(*mode)).unwrap();
                }
                Node::File(mode, content) => {
                    let mut header = Tar::header(b'0', b"f", b"", content.len() as u64);
                    header.set_mode(*mode);
                    archive = archive.put(header, content);
                    std::fs::write(&real, content).unwrap();
                    std::fs::set_permissions(&real, PermissionsExt::from_mode(*mode)).unwrap();
                }
                Node::Symlink(target) => {
                    archive = archive.any(b'2', "l", target);
                    symlink(OsStr::from_bytes(target), &real).unwrap();
                }
            }
        }
        archive
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(128) })]

        #[test]
        fn a_tree_survives_the_archive(nodes in nodes()) {
            if privileged() {
                let place = Place::new();
                let source = place.temp.path().join("source");
                std::fs::create_dir(&source).unwrap();
                let archive = build(&nodes, Path::new(""), &source, tar()).end();
                let usage = applied(&archive, &place.layer(), &[], &Limits::default()).unwrap();
                prop_assert_eq!(tree(&place.layer()), tree(&source));
                prop_assert_eq!(usage, tree_usage(&place.layer()).unwrap());
            }
        }

        #[test]
        fn damage_anywhere_is_an_error_or_harmless(damage in prop::collection::vec((0_usize..8192, any::<u8>()), 1..4)) {
            if privileged() {
                let place = Place::new();
                let before = place.outside();
                let mut archive = tar()
                    .pax(&[("size", b"3"), ("path", b"d/file"), ("SCHILY.xattr.user.a", b"1")]).file("x", b"abc")
                    .pax(&[("GNU.sparse.size", b"9"), ("GNU.sparse.numblocks", b"1"), ("GNU.sparse.map", b"1,1")])
                    .file("sparse", b"x").extension(b'L', b"long\0").dir("y").symlink("l", "/etc").link("h", "d/file")
                    .file(".wh.gone", b"").end();
                for (at, value) in damage {
                    let at = at % archive.len();
                    archive[at] = value;
                    // A damaged header gets a right checksum, or the damage would not get far.
                    let block = &mut archive[at / 512 * 512..][..512];
                    if block[257..262] == *b"ustar" {
                        let mut header = tar::Header::from_byte_slice(block).clone();
                        header.set_cksum();
                        block.copy_from_slice(header.as_bytes());
                    }
                }
                if let Ok(usage) = applied(&archive, &place.layer(), &[], &Limits::default()) {
                    prop_assert_eq!(usage, tree_usage(&place.layer()).unwrap());
                }
                prop_assert_eq!(place.outside(), before);
            }
        }
    }
}
