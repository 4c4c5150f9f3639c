//! What is left of a node when nothing should be.
//!
//! Everything a node makes carries its directory, its cgroup, its network's name or the id of a pod or container, so
//! that others on the machine are never blamed. A look is repeated for some seconds, because the kernel and whoever
//! adopts orphans take their time.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ocid_api::cgroup::Version;
use rustix::mount::{UnmountFlags, unmount};

use crate::network::Network;
use crate::process;

/// How long what is ending may take to be gone.
pub const GRACE: Duration = Duration::from_secs(5);

/// By what the things of a node are known.
#[derive(Debug)]
pub struct Traces<'a> {
    /// Its directory.
    pub dir: &'a Path,
    /// Its durable directory.
    pub root: &'a Path,
    /// Its run-time directory.
    pub state: &'a Path,
    /// The cgroup below which its pods are.
    pub cgroup: &'a str,
    /// Its network.
    pub network: &'a Network,
    /// The ids of all pods and containers that it had.
    pub ids: Vec<String>,
    /// The zombies that were there before it.
    pub zombies: &'a BTreeSet<u32>,
}

impl Traces<'_> {
    /// One line for each thing that is left.
    pub fn scan(&self) -> Vec<String> {
        let mut left = Vec::new();
        self.processes(&mut left);
        self.mounts(&mut left);
        self.network(&mut left);
        self.cgroups(&mut left);
        self.sockets(&mut left);
        self.files(&mut left);
        left
    }

    fn name(&self) -> &str {
        self.dir.to_str().expect("the harness chose the name")
    }

    fn processes(&self, left: &mut Vec<String>) {
        for process in process::all() {
            let line = format!("{} {} [{}] {}", process.pid, process.state, process.comm, process.cmdline);
            // A zombie has lost what would tell whose it is: a new one of init's or of our own counts as ours.
            let adopted = process.parent == 1 || process.parent == std::process::id();
            if process.state == 'Z' {
                if adopted && !self.zombies.contains(&process.pid) {
                    left.push(format!("zombie: {line}"));
                }
            } else if process.belongs_to(self.name(), self.cgroup, &self.ids) {
                left.push(format!("process: {line}"));
            }
        }
    }

    fn mounts(&self, left: &mut Vec<String>) {
        for pid in process::one_per_mount_namespace() {
            let Ok(text) = fs::read_to_string(format!("/proc/{pid}/mountinfo")) else { continue };
            let ours = text.lines().filter(|line| line.contains(self.name()));
            left.extend(ours.map(|line| format!("mount as seen by {pid}: {line}")));
        }
    }

    fn network(&self, left: &mut Vec<String>) {
        left.extend(self.network.ports().iter().map(|port| format!("bridge port: {port}")));
        left.extend(self.network.reserved().iter().map(|ip| format!("reserved address: {ip}")));
        left.extend(self.network.rules(&self.ids).iter().map(|rule| format!("firewall rule: {rule}")));
        for dir in ["/run/netns", "/var/run/netns"] {
            let names = fs::read_dir(dir).into_iter().flatten().flatten();
            let names = names.filter_map(|e| e.file_name().into_string().ok());
            left.extend(
                names.filter(|n| self.ids.contains(n)).map(|n| format!("network namespace: {dir}/{n}")),
            );
        }
    }

    fn cgroups(&self, left: &mut Vec<String>) {
        for hierarchy in hierarchies() {
            let parent = hierarchy.join(self.cgroup.trim_start_matches('/'));
            walk(&hierarchy, 5, &mut |path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                let below = path.starts_with(&parent) && path != parent;
                if below || self.ids.iter().any(|id| name.contains(id.as_str())) {
                    left.push(format!("cgroup: {}", path.display()));
                }
            });
        }
    }

    fn sockets(&self, left: &mut Vec<String>) {
        let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
        let ours = table.lines().filter(|line| line.contains(self.name()));
        left.extend(ours.map(|line| format!("socket: {line}")));
    }

    fn files(&self, left: &mut Vec<String>) {
        for dir in [self.root, self.state] {
            for child in children(&dir.join("pods")) {
                left.push(format!("file: {}", child.display()));
            }
            walk_files(dir, 6, &mut |path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                if self.ids.iter().any(|id| name.contains(id.as_str())) && !path.starts_with(dir.join("pods"))
                {
                    left.push(format!("file: {}", path.display()));
                }
            });
        }
        for dir in ["snapshots/containers", "content/ingest"] {
            left.extend(children(&self.root.join(dir)).iter().map(|p| format!("file: {}", p.display())));
        }
    }

    /// Removes by force whatever of the node can be found. For tests that failed.
    pub fn sweep(&self) {
        process::kill_all(self.name(), self.cgroup, &self.ids);
        for _ in 0..3 {
            let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
            let points = text.lines().filter_map(|line| line.split(' ').nth(4));
            let mut ours: Vec<&str> = points.filter(|p| Path::new(p).starts_with(self.dir)).collect();
            ours.sort_unstable();
            for point in ours.iter().rev() {
                let _ = unmount(*point, UnmountFlags::DETACH);
            }
        }
        self.network.remove_rules();
        self.network.remove_bridge();
        self.remove_cgroups();
    }

    /// Removes the cgroup that was made for the node, with what a failed test left in it.
    pub fn remove_cgroups(&self) {
        for hierarchy in hierarchies() {
            let parent = hierarchy.join(self.cgroup.trim_start_matches('/'));
            let mut found = Vec::new();
            walk(&hierarchy, 8, &mut |path| {
                let by_id = self.ids.iter().any(|id| path.to_string_lossy().contains(id.as_str()));
                // By text: what the daemon keeps beside the parent, under a name made of it, is the node's too.
                if by_id || path.to_string_lossy().starts_with(&*parent.to_string_lossy()) {
                    found.push(path.to_owned());
                }
            });
            // Children after their parents, so backwards.
            found.iter().rev().for_each(|dir| drop(fs::remove_dir(dir)));
        }
    }
}

/// The ids of all zombies there are.
pub fn zombies() -> BTreeSet<u32> {
    process::all().iter().filter(|p| p.state == 'Z').map(|p| p.pid).collect()
}

fn hierarchies() -> Vec<PathBuf> {
    Version::detect().and_then(Version::hierarchies).unwrap_or_default()
}

fn children(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).into_iter().flatten().filter_map(|e| Some(e.ok()?.path())).collect()
}

/// Visits the directories below `dir`, parents first.
fn walk(dir: &Path, depth: usize, visit: &mut impl FnMut(&Path)) {
    walk_files(dir, depth, &mut |path| {
        if path.is_dir() {
            visit(path);
        }
    });
}

/// Visits everything below `dir`, parents first; follows no links.
fn walk_files(dir: &Path, depth: usize, visit: &mut impl FnMut(&Path)) {
    for path in children(dir) {
        visit(&path);
        if depth > 1 && path.symlink_metadata().is_ok_and(|m| m.is_dir()) {
            walk_files(&path, depth - 1, visit);
        }
    }
}
