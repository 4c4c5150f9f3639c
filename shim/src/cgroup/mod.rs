//! Paths of cgroups, who is in one, and how to end them all.
//!
//! Never acts on the root of a hierarchy, whatever a record says, and never on a recycled pid: a process is looked at
//! again through its pidfd's pid before it is signalled.

mod hasten;
pub(crate) mod oom;

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub(crate) use hasten::hasten;
use ocid_api::cgroup::{Version, of_process};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// How deep below a container's cgroup its own children are looked for.
const DEPTH_MAX: usize = 16;
/// Longest pause between two looks at who still lives.
const PAUSE_MAX: Duration = Duration::from_millis(50);

/// v1's file of threads.
const TASKS: &str = "tasks";

/// A cgroup below the root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cgroup {
    version: Version,
    path: String,
}

impl Cgroup {
    /// `None` for what must not be touched: the root, or a path that leaves the hierarchy.
    pub(crate) fn new(version: Version, path: &str) -> Option<Cgroup> {
        let mut components = path.split('/').filter(|c| !c.is_empty()).peekable();
        components.peek()?;
        let inside = components.all(|c| c != "." && c != ".." && !c.contains('\0'));
        inside.then(|| Cgroup { version, path: format!("/{}", path.trim_matches('/')) })
    }

    /// The cgroup of a process; `None` if it has gone or lives in the root.
    pub(crate) fn of(pid: i32) -> Option<Cgroup> {
        let version = Version::detect().ok()?;
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        Cgroup::new(version, of_process(version, &text)?)
    }

    /// Cgroups in which a process lives and in whose path a directory's name holds `id`, which must be long and random.
    pub(crate) fn named_after(id: &str) -> Vec<Cgroup> {
        let Ok(version) = Version::detect() else { return Vec::new() };
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let text = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
            let paths = text.lines().filter_map(|line| line.splitn(3, ':').nth(2));
            for cgroup in paths.filter_map(|path| Cgroup::new(version, named(path, id)?)) {
                if !found.contains(&cgroup) {
                    found.push(cgroup);
                }
            }
        }
        found
    }

    /// Below the mount of each hierarchy, with a leading slash.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    pub(super) fn version(&self) -> Version {
        self.version
    }

    /// Where the kernel shows it; on v1, in the memory hierarchy.
    pub(super) fn dir(&self) -> PathBuf {
        self.version.dir("memory", &self.path)
    }

    /// Kills everything in it, forks included, and waits until nothing is left. Says whether that was reached.
    pub(crate) async fn kill(&self, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        let mut pause = Duration::from_millis(1);
        loop {
            if self.version == Version::V2 {
                let _ = fs::write(self.dir().join("cgroup.kill"), "1"); // 5.14; older kernels: one by one, below
            }
            let left = self.processes();
            if left.is_empty() {
                return true;
            }
            for pid in left {
                self.kill_process(pid);
            }
            if Instant::now() >= deadline {
                return false;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Removes the cgroup and what is below it, in every hierarchy. One that is not there, or not empty, is passed over.
    pub(crate) fn remove(&self) {
        for hierarchy in self.version.hierarchies().unwrap_or_default() {
            remove_tree(&hierarchy.join(self.path.trim_start_matches('/')), DEPTH_MAX);
        }
    }

    /// Removes it as [`Cgroup::remove`] does, and waits for the dying that are still in it in some hierarchy.
    pub(crate) async fn remove_within(&self, within: Duration) {
        let deadline = Instant::now() + within;
        let path = self.path.trim_start_matches('/');
        loop {
            self.remove();
            let mut left = self.version.hierarchies().unwrap_or_default().into_iter();
            if !left.any(|hierarchy| hierarchy.join(path).exists()) || Instant::now() >= deadline {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Its processes and those of cgroups below it, zombies excepted.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        collect(&self.dir(), DEPTH_MAX, &mut pids);
        pids.retain(|pid| !is_zombie(*pid));
        pids
    }

    fn kill_process(&self, pid: i32) {
        let Some(Ok(pidfd)) = Pid::from_raw(pid).map(|pid| pidfd_open(pid, PidfdFlags::empty())) else {
            return;
        };
        // The pid may have been reused before we opened it: is this still one of ours?
        let ours = Cgroup::of(pid).is_some_and(|found| {
            found == *self || found.path.strip_prefix(&self.path).is_some_and(|rest| rest.starts_with('/'))
        });
        if ours {
            let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        }
    }
}

/// Moves this process, which must have one thread only, into a cgroup, in every hierarchy, making it where it is missing.
///
/// # Errors
/// The first failure; the other hierarchies are entered all the same.
pub(crate) fn enter(path: &str) -> io::Result<()> {
    let version = Version::detect()?;
    let cgroup =
        Cgroup::new(version, path).ok_or_else(|| io::Error::other(format!("{path:?} is no cgroup")))?;
    // A hybrid machine's v2 hierarchy controls nothing: it only has to be entered to leave a service manager's unit.
    let of_us = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let in_no_unit = version == Version::V1 && of_process(Version::V2, &of_us) == Some("/");
    let mut result = Ok(());
    for hierarchy in version.hierarchies()? {
        if in_no_unit && !hierarchy.join(TASKS).exists() {
            continue;
        }
        let entered = enter_in(&hierarchy, cgroup.path.trim_start_matches('/'));
        result = result.and(entered);
    }
    result
}

fn enter_in(hierarchy: &Path, path: &str) -> io::Result<()> {
    let with_path = |e: io::Error| io::Error::new(e.kind(), format!("{}/{path}: {e}", hierarchy.display()));
    let mut dir = hierarchy.to_path_buf();
    for component in path.split('/') {
        let parent = dir.clone();
        dir.push(component);
        match fs::create_dir(&dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(with_path(e)),
            _ => {}
        }
        inherit_cpuset(&parent, &dir);
    }
    // A thread that moves itself waits for nobody; a process that is moved waits until every processor has passed
    // through the scheduler, 10 to 50 ms on a busy machine. v2 knows processes only.
    let join = |file: &str| fs::OpenOptions::new().write(true).open(dir.join(file))?.write_all(b"0");
    match join(TASKS) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => join("cgroup.procs").map_err(with_path),
        joined => joined.map_err(with_path),
    }
}

/// A new cgroup of v1's cpuset has no CPU and no memory node, and nobody can enter it until it has.
fn inherit_cpuset(parent: &Path, dir: &Path) {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if fs::read_to_string(dir.join(file)).is_ok_and(|text| text.trim().is_empty())
            && let Ok(inherited) = fs::read_to_string(parent.join(file))
        {
            let _ = fs::write(dir.join(file), inherited.trim());
        }
    }
}

/// The path up to and with the first directory whose name holds `id`.
fn named<'a>(path: &'a str, id: &str) -> Option<&'a str> {
    let start = path.find(id).filter(|_| !id.is_empty())?;
    let end = path[start..].find('/').map_or(path.len(), |length| start + length);
    Some(&path[..end])
}

fn collect(dir: &Path, depth: usize, pids: &mut Vec<i32>) {
    if let Ok(text) = fs::read_to_string(dir.join("cgroup.procs")) {
        pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 1));
    }
    for child in children(dir).filter(|_| depth > 0) {
        collect(&child, depth - 1, pids);
    }
}

fn remove_tree(dir: &Path, depth: usize) {
    for child in children(dir).filter(|_| depth > 0) {
        remove_tree(&child, depth - 1);
    }
    let _ = fs::remove_dir(dir);
}

fn children(dir: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path())
}

/// Whether only the exit status of a process is left: it cannot be killed more than that.
pub(crate) fn is_zombie(pid: i32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return true };
    // The name, in parentheses, may hold anything; the state comes after its last one.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['Z', 'X']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_and_what_leaves_it_are_no_cgroup() {
        for bad in ["", "/", "//", "/..", "/a/../..", "a/./b", "/a\0"] {
            assert_eq!(Cgroup::new(Version::V1, bad), None, "{bad:?}");
        }
        assert_eq!(Cgroup::new(Version::V1, "a/b/").unwrap().path(), "/a/b");
    }

    #[test]
    fn a_cgroup_is_named_after_an_id_up_to_that_name() {
        assert_eq!(named("/a/ocid-77.scope/init", "77"), Some("/a/ocid-77.scope"));
        assert_eq!(named("/a/77", "77"), Some("/a/77"));
        assert_eq!(named("/a/b", "77"), None);
        assert_eq!(named("/a/b", ""), None);
    }

    #[test]
    fn we_are_no_zombie_and_nobody_is() {
        assert!(!is_zombie(i32::try_from(std::process::id()).unwrap()));
        assert!(is_zombie(i32::MAX));
    }
}
