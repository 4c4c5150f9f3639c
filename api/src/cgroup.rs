//! Where a cgroup's files live, on either version of the kernel's interface.
//!
//! v1 has a hierarchy per controller below `/sys/fs/cgroup/<controller>`; v2 has one, at `/sys/fs/cgroup`. A hybrid
//! machine, which mounts v2 without controllers beside v1, counts as v1. A cgroup is named by its path inside the
//! hierarchies, which is the same in all of them.

use std::path::{Path, PathBuf};
use std::{fs, io};

/// Where cgroup filesystems are mounted, by convention of every distribution.
pub const MOUNT: &str = "/sys/fs/cgroup";

/// `CGROUP2_SUPER_MAGIC` of statfs(2).
const CGROUP2_MAGIC: i64 = 0x6367_7270;

/// Which interface the controllers are bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// One hierarchy per controller; also hybrid machines.
    V1,
    /// The unified hierarchy.
    V2,
}

impl Version {
    /// Asks the kernel.
    ///
    /// # Errors
    /// If nothing is mounted at [`MOUNT`].
    pub fn detect() -> io::Result<Version> {
        let stat = rustix::fs::statfs(MOUNT)?;
        #[allow(clippy::cast_lossless, clippy::unnecessary_cast)] // f_type is i32 or i64 by architecture.
        Ok(if stat.f_type as i64 == CGROUP2_MAGIC { Version::V2 } else { Version::V1 })
    }

    /// The directory of `cgroup` as `controller` sees it.
    pub fn dir(self, controller: &str, cgroup: &str) -> PathBuf {
        let inside = cgroup.trim_start_matches('/');
        match self {
            Version::V1 => Path::new(MOUNT).join(controller).join(inside),
            Version::V2 => Path::new(MOUNT).join(inside),
        }
    }

    /// The mounts of all hierarchies in which `cgroup` may exist.
    ///
    /// # Errors
    /// If the mount point cannot be listed.
    pub fn hierarchies(self) -> io::Result<Vec<PathBuf>> {
        match self {
            Version::V2 => Ok(vec![PathBuf::from(MOUNT)]),
            Version::V1 => {
                let mut found = Vec::new();
                for entry in fs::read_dir(MOUNT)? {
                    let entry = entry?;
                    // `cpu` is often a link to `cpu,cpuacct`: the same hierarchy under a second name.
                    if entry.file_type()?.is_dir() {
                        found.push(entry.path());
                    }
                }
                Ok(found)
            }
        }
    }
}

/// The path of a process's cgroup from the text of `/proc/<pid>/cgroup`: the v2 line where v2 has the controllers,
/// else that of the memory controller, which accounts what we report. A removed cgroup is marked by the kernel.
pub fn of_process(version: Version, proc_cgroup: &str) -> Option<&str> {
    proc_cgroup
        .lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            let ours = match version {
                Version::V2 => controllers.is_empty(),
                Version::V1 => controllers.split(',').any(|c| c == "memory"),
            };
            ours.then(|| path.trim_end_matches(" (deleted)"))
        })
        .next()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "9:memory:/ocid/p/c\n4:cpu,cpuacct:/ocid/p/c\n1:name=systemd:/\n0::/elsewhere\n";

    #[test]
    fn v1_follows_the_memory_controller_and_v2_the_unified_line() {
        assert_eq!(of_process(Version::V1, HYBRID), Some("/ocid/p/c"));
        assert_eq!(of_process(Version::V2, HYBRID), Some("/elsewhere"));
        assert_eq!(of_process(Version::V2, "0::/a/b (deleted)\n"), Some("/a/b"));
        assert_eq!(of_process(Version::V1, "garbage"), None);
    }

    #[test]
    fn a_cgroup_path_stays_below_the_mount() {
        assert_eq!(Version::V1.dir("memory", "/a/b"), Path::new("/sys/fs/cgroup/memory/a/b"));
        assert_eq!(Version::V2.dir("memory", "/a/b"), Path::new("/sys/fs/cgroup/a/b"));
    }
}
