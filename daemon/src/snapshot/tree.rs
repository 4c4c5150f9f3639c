//! Walk trees that guests have made: remove them, or add up what they use.
//!
//! Both go from directory to directory by file descriptor, follow no symlink, enter no mount, and use bounded memory
//! and descriptors however deep or wide the tree is.

use std::collections::HashSet;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{self, AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::Usage;
use crate::error::{Context, Error, Kind, Result};
use crate::rooted::retry;

/// How deep a walk goes with one descriptor per level.
const DEPTH_MAX: usize = 128;

/// How many entries a measurement looks at, so that a guest cannot keep us busy for ever.
const MEASURED_MAX: u64 = 4_000_000;

/// Removes a tree and everything in it. That it is gone already is success.
///
/// # Errors
/// If something cannot be removed: a mount point, or an immutable file.
pub fn remove_tree(dir: &Path) -> Result<()> {
    let what = || format!("remove {}", dir.display());
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else {
        return Err(Error::internal(format!("{} is not a tree to remove", dir.display())));
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let parent = match fs::openat(CWD, parent, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        opened => opened.context(Kind::Internal, what)?,
    };
    remove_entry(&parent, name).context(Kind::Internal, what)
}

/// Removes one entry of a directory, with everything in it.
pub(crate) fn remove_entry(parent: impl AsFd, name: impl rustix::path::Arg) -> Result<(), Errno> {
    let name = name.into_c_str()?.into_owned();
    match fs::unlinkat(&parent, &name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(e) => return Err(e),
    }
    let top = match open_dir(&parent, &name) {
        Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTDIR) => return Err(Errno::PERM), // so unlink's refusal meant just that
        opened => opened?,
    };
    let mut moved = 0;
    while empty(&top, Dir::read_from(&top)?, 1, &mut moved)? == Emptied::ButMoved {}
    match fs::unlinkat(&parent, &name, AtFlags::REMOVEDIR) {
        Err(Errno::NOENT) => Ok(()),
        removed => removed,
    }
}

#[derive(PartialEq, Eq)]
enum Emptied {
    Wholly,
    /// Trees that were too deep now lie in the top directory.
    ButMoved,
}

fn empty(top: &OwnedFd, mut dir: Dir, depth: usize, moved: &mut u64) -> Result<Emptied, Errno> {
    let mut emptied = Emptied::Wholly;
    while let Some(entry) = dir.read() {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        if entry.file_type() != FileType::Directory {
            match fs::unlinkat(dir.fd()?, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => continue,
                Err(Errno::ISDIR) => {} // the file system did not tell the type
                Err(e) => return Err(e),
            }
        }
        if depth == DEPTH_MAX {
            // Shorten the tree: what is too deep goes to the top, and is met there in the next round.
            *moved += 1;
            fs::renameat(dir.fd()?, name, top, format!(".deep-{}-{moved}", std::process::id()))?;
            emptied = Emptied::ButMoved;
            continue;
        }
        let child = open_dir(dir.fd()?, name)?;
        if empty(top, Dir::new(child)?, depth + 1, moved)? == Emptied::ButMoved {
            emptied = Emptied::ButMoved;
        }
        match fs::unlinkat(dir.fd()?, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(emptied)
}

/// Opens a directory for listing, whatever its mode, unless something is mounted there.
fn open_dir(parent: impl AsFd, name: impl rustix::path::Arg + Copy) -> Result<OwnedFd, Errno> {
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let open = |flags| {
        let flags = flags | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        retry(|| fs::openat2(&parent, name, flags, Mode::empty(), how))
    };
    match open(OFlags::RDONLY) {
        Err(Errno::ACCESS) => {
            // Only without privilege: a directory of our own that shuts us out.
            let handle = open(OFlags::PATH)?;
            fs::chmod(format!("/proc/self/fd/{}", handle.as_raw_fd()), Mode::RWXU)?;
            open(OFlags::RDONLY)
        }
        opened => opened,
    }
}

/// Adds up what a tree uses on disk; a file with several names in it counts once.
///
/// A guest may change the tree meanwhile: what vanishes is not counted, and what is more than 128 levels deep or
/// comes after four million entries is not either.
///
/// # Errors
/// If the tree itself cannot be read.
pub fn tree_usage(dir: &Path) -> Result<Usage> {
    let what = || format!("measure {}", dir.display());
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let top = fs::openat(CWD, dir, flags, Mode::empty()).context(Kind::Internal, what)?;
    let stat = fs::fstat(&top).context(Kind::Internal, what)?;
    let mut usage = Usage::default();
    usage.add(&stat);
    let mut seen = HashSet::new();
    let mut stack = vec![Dir::new(top).context(Kind::Internal, what)?];
    while let Some(dir) = stack.last_mut() {
        match next_entry(dir) {
            Some((name, stat)) => {
                let file_type = FileType::from_raw_mode(stat.st_mode);
                if file_type != FileType::Directory && stat.st_nlink > 1 && !seen.insert(stat.st_ino) {
                    continue;
                }
                usage.add(&stat);
                if usage.inodes >= MEASURED_MAX {
                    break;
                }
                if file_type == FileType::Directory && stack.len() < DEPTH_MAX {
                    let child =
                        stack.last().and_then(|dir| dir.fd().ok()).and_then(|fd| open_dir(fd, &*name).ok());
                    stack.extend(child.and_then(|child| Dir::new(child).ok()));
                }
            }
            None => {
                stack.pop();
            }
        }
    }
    Ok(usage)
}

/// The next entry that still exists.
fn next_entry(dir: &mut Dir) -> Option<(CString, fs::Stat)> {
    loop {
        let entry = dir.read()?.ok()?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        if let Ok(stat) = fs::statat(dir.fd().ok()?, name, AtFlags::SYMLINK_NOFOLLOW) {
            return Some((name.to_owned(), stat));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_tree_is_removed_without_following_symlinks_and_whatever_its_modes() {
        let temp = tempfile::tempdir().unwrap();
        let canary = temp.path().join("canary");
        std::fs::create_dir(&canary).unwrap();
        std::fs::write(canary.join("file"), "alive").unwrap();
        let tree = temp.path().join("tree");
        std::fs::create_dir_all(tree.join("a/b")).unwrap();
        std::fs::write(tree.join("a/b/file"), "x").unwrap();
        symlink(&canary, tree.join("a/link")).unwrap();
        symlink(&canary, tree.join("link")).unwrap();
        std::fs::set_permissions(tree.join("a/b"), PermissionsExt::from_mode(0o0)).unwrap();
        std::fs::set_permissions(tree.join("a"), PermissionsExt::from_mode(0o0)).unwrap();

        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
        assert_eq!(std::fs::read(canary.join("file")).unwrap(), b"alive");
        remove_tree(&tree).unwrap(); // gone is success
        symlink(&canary, &tree).unwrap();
        remove_tree(&tree).unwrap(); // a symlink in its place is removed, not followed
        assert!(canary.join("file").exists() && tree.symlink_metadata().is_err());
    }

    #[test]
    fn a_tree_deeper_than_any_path_is_measured_and_removed() {
        let temp = tempfile::tempdir().unwrap();
        let tree = temp.path().join("tree");
        std::fs::create_dir(&tree).unwrap();
        let open = |at: &OwnedFd, name: &str| {
            fs::openat(at, name, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap()
        };
        let mut dir = fs::openat(CWD, &tree, OFlags::PATH, Mode::empty()).unwrap();
        for _ in 0..3000 {
            fs::mkdirat(&dir, "deep", Mode::RWXU).unwrap();
            dir = open(&dir, "deep");
        }
        assert_eq!(tree_usage(&tree).unwrap().inodes, u64::try_from(DEPTH_MAX).unwrap() + 1);
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
    }

    #[test]
    fn usage_counts_blocks_and_every_inode_once() {
        let temp = tempfile::tempdir().unwrap();
        let tree = temp.path().join("tree");
        std::fs::create_dir(&tree).unwrap();
        std::fs::write(tree.join("file"), vec![1; 100_000]).unwrap();
        std::fs::hard_link(tree.join("file"), tree.join("again")).unwrap();
        std::fs::File::create(tree.join("sparse")).unwrap().set_len(1 << 30).unwrap();
        let usage = tree_usage(&tree).unwrap();
        assert_eq!(usage.inodes, 3);
        assert!((100_000..200_000).contains(&usage.bytes), "{usage:?}");
    }
}
