//! A directory that a guest's path cannot leave.
//!
//! Whatever an image or a container says about a path — absolute, `..`, a symlink to `/etc/shadow` of the host — is
//! resolved by the kernel as if this directory were `/`. There is no fallback that does it with text, and magic links
//! (`/proc/*/fd`) are never followed.
//!
//! Reading never blocks and has no side effects: a path is first opened without touching what it names, and only a
//! regular file is then opened for reading. A fifo, a device or an endless file is an error.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{self, AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::error::{Context, Error, Kind, Result};

/// How often a lookup is repeated that lost a race with a rename somewhere in the system.
const RETRIES_MAX: u32 = 128;

/// See the module.
#[derive(Debug)]
pub struct Rooted {
    root: OwnedFd,
}

impl Rooted {
    /// Takes a directory of the host as root. The path is the daemon's own, not a guest's.
    ///
    /// # Errors
    /// If there is no such directory.
    pub fn new(dir: &Path) -> Result<Rooted> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = fs::openat(CWD, dir, flags, Mode::empty())
            .map_err(|e| Error::with_source(kind(e), format!("open directory {}", dir.display()), e))?;
        Ok(Rooted { root })
    }

    /// Takes an open directory as root; it may be that of a detached mount.
    pub fn from_fd(root: OwnedFd) -> Rooted {
        Rooted { root }
    }

    /// Opens what the path names, following symlinks inside the root, as a mere handle (`O_PATH`).
    ///
    /// # Errors
    /// `NotFound`; `InvalidArgument` if the path cannot be resolved at all.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<OwnedFd> {
        self.resolve(path.as_ref(), OFlags::PATH)
    }

    /// Opens a directory for listing.
    ///
    /// # Errors
    /// As `open`, and `NotFound` if it is not a directory.
    pub fn open_dir(&self, path: impl AsRef<Path>) -> Result<OwnedFd> {
        self.resolve(path.as_ref(), OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// Opens a regular file for reading.
    ///
    /// # Errors
    /// As `open`, and `InvalidArgument` if it is not a regular file.
    pub fn open_file(&self, path: impl AsRef<Path>) -> Result<File> {
        let path = path.as_ref();
        let handle = self.open(path)?;
        let stat = fs::fstat(&handle).context(Kind::Internal, || format!("stat {}", path.display()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Error::invalid(format!("{} is not a regular file", path.display())));
        }
        // The same inode again, now for reading: nothing can be put in its place in between.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = fs::openat(CWD, format!("/proc/self/fd/{}", handle.as_raw_fd()), flags, Mode::empty())
            .map_err(|e| Error::with_source(kind(e), format!("open {}", path.display()), e))?;
        Ok(File::from(file))
    }

    /// Reads a regular file of at most `bytes_max` bytes.
    ///
    /// # Errors
    /// As `open_file`, and `ResourceExhausted` if the file is larger.
    pub fn read_file(&self, path: impl AsRef<Path>, bytes_max: u64) -> Result<Vec<u8>> {
        let path = path.as_ref();
        let file = self.open_file(path)?;
        let mut content = Vec::new();
        // The size is not believed: a file may grow while it is read.
        file.take(bytes_max.saturating_add(1))
            .read_to_end(&mut content)
            .context(Kind::Internal, || format!("read {}", path.display()))?;
        if u64::try_from(content.len()).is_ok_and(|len| len > bytes_max) {
            let what = format!("{} is larger than {bytes_max} bytes", path.display());
            return Err(Error::new(Kind::ResourceExhausted, what));
        }
        Ok(content)
    }

    /// Whether the path names anything. A symlink that leads nowhere does not.
    ///
    /// # Errors
    /// If it cannot be told.
    pub fn exists(&self, path: impl AsRef<Path>) -> Result<bool> {
        match self.open(path) {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == Kind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn resolve(&self, path: &Path, flags: OFlags) -> Result<OwnedFd> {
        // An empty path would be an error of its own kind; it is the root.
        let wanted = if path.as_os_str().is_empty() { Path::new("/") } else { path };
        let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let opened = retry(|| fs::openat2(&self.root, wanted, flags | OFlags::CLOEXEC, Mode::empty(), how));
        opened.map_err(|e| Error::with_source(kind(e), format!("open {} in its root", path.display()), e))
    }
}

impl AsFd for Rooted {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

/// Repeats a call that the kernel gave up because of a race (`EAGAIN`), or that a signal interrupted.
pub(crate) fn retry<T>(call: impl Fn() -> Result<T, Errno>) -> Result<T, Errno> {
    let mut tries = 0;
    loop {
        match call() {
            Err(Errno::AGAIN | Errno::INTR) if tries < RETRIES_MAX => tries += 1,
            result => return result,
        }
    }
}

/// Says whether the directory has an entry of that name, without following it.
pub(crate) fn stat_entry(dir: impl AsFd, name: impl rustix::path::Arg) -> Result<Option<fs::Stat>, Errno> {
    match fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

fn kind(errno: Errno) -> Kind {
    match errno {
        Errno::NOENT | Errno::NOTDIR => Kind::NotFound,
        Errno::LOOP | Errno::NAMETOOLONG | Errno::INVAL | Errno::XDEV => Kind::InvalidArgument,
        _ => Kind::Internal,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::time::Instant;

    use super::*;

    fn guest() -> (tempfile::TempDir, Rooted) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("outside"), "host").unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("etc")).unwrap();
        std::fs::write(root.join("etc/passwd"), "root:x:0:0").unwrap();
        let rooted = Rooted::new(&root).unwrap();
        (dir, rooted)
    }

    #[test]
    fn symlinks_are_followed_inside_the_root_and_never_out_of_it() {
        let (dir, rooted) = guest();
        let root = dir.path().join("root");
        let outside = dir.path().join("outside");
        for (name, target) in [
            ("abs", Path::new("/etc/passwd")),
            ("up", Path::new("../../../etc/passwd")),
            ("out", outside.as_path()),
            ("out2", Path::new("../outside")),
            ("loop", Path::new("loop")),
            ("magic", Path::new("/proc/self/root")),
        ] {
            symlink(target, root.join(name)).unwrap();
        }
        for inside in ["etc/passwd", "/etc/passwd", "../etc/passwd", "etc/../../../etc/passwd", "abs", "up"] {
            assert_eq!(rooted.read_file(inside, 100).unwrap(), b"root:x:0:0", "{inside}");
        }
        for gone in ["out", "out2", "../outside", "/outside", "magic", "etc/passwd/x"] {
            assert_eq!(rooted.open(gone).unwrap_err().kind(), Kind::NotFound, "{gone}");
            assert!(!rooted.exists(gone).unwrap(), "{gone}");
        }
        assert_eq!(rooted.open("loop").unwrap_err().kind(), Kind::InvalidArgument);
        assert!(rooted.exists("").unwrap());
    }

    #[test]
    fn magic_links_of_a_procfs_are_refused() {
        let rooted = Rooted::new(Path::new("/proc")).unwrap();
        assert_eq!(rooted.open("self/root").unwrap_err().kind(), Kind::InvalidArgument);
        assert!(rooted.exists("self/status").unwrap());
    }

    #[test]
    fn only_regular_files_of_bounded_size_are_read_and_nothing_hangs() {
        let (dir, rooted) = guest();
        let root = dir.path().join("root");
        let began = Instant::now();
        fs::mkfifoat(CWD, root.join("fifo"), Mode::from_raw_mode(0o600)).unwrap();
        File::create(root.join("sparse")).unwrap().set_len(100 << 30).unwrap();
        assert_eq!(rooted.read_file("fifo", 10).unwrap_err().kind(), Kind::InvalidArgument);
        assert_eq!(rooted.read_file("etc", 10).unwrap_err().kind(), Kind::InvalidArgument);
        assert_eq!(rooted.read_file("sparse", 1 << 20).unwrap_err().kind(), Kind::ResourceExhausted);
        assert_eq!(rooted.read_file("etc/passwd", 9).unwrap_err().kind(), Kind::ResourceExhausted);
        assert_eq!(rooted.read_file("etc/passwd", 10).unwrap(), b"root:x:0:0");
        assert!(began.elapsed().as_secs() < 2);
    }
}
