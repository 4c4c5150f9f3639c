//! A larger share of the CPU for everything that is measured, so that others on the machine disturb less.
//!
//! Daemons, shims, containers and bare tools all get the same, so no comparison gains by it.

use std::fs;
use std::path::{Path, PathBuf};

use harness::Node;

/// The hierarchy that shares out the CPU, with the file and its highest value.
fn hierarchy() -> (PathBuf, &'static str, &'static str) {
    let v1 = Path::new("/sys/fs/cgroup/cpu");
    match v1.join("cpu.shares").exists() {
        true => (v1.to_owned(), "cpu.shares", "262144"),
        false => (PathBuf::from("/sys/fs/cgroup"), "cpu.weight", "10000"),
    }
}

/// This process in a cgroup of its own until dropped.
#[derive(Debug)]
pub(crate) struct Weight {
    before: PathBuf,
    own: PathBuf,
}

impl Weight {
    /// Also makes the cgroups of the node's pods and of its shims, which keep themselves out of ours.
    pub(crate) fn raise(node: &Node) -> Weight {
        let (root, file, highest) = hierarchy();
        let before = root.join(own_cgroup(file == "cpu.shares").trim_start_matches('/'));
        let dir = |suffix: &str| root.join(format!("{}{suffix}", node.cgroup.trim_start_matches('/')));
        for suffix in ["", "-shims", "-bench"] {
            // Where it cannot be had, the measurement is only noisier.
            let _ = fs::create_dir_all(dir(suffix));
            let _ = fs::write(dir(suffix).join(file), highest);
        }
        let own = dir("-bench");
        let _ = fs::write(own.join("cgroup.procs"), std::process::id().to_string());
        let shims = format!("[shim]\ncgroup = \"{}-shims\"\n", node.cgroup);
        fs::write(node.path().join("config.d/50-bench.toml"), shims).unwrap();
        Weight { before, own }
    }
}

impl Drop for Weight {
    fn drop(&mut self) {
        let procs = fs::read_to_string(self.own.join("cgroup.procs")).unwrap_or_default();
        for pid in procs.lines() {
            let _ = fs::write(self.before.join("cgroup.procs"), pid);
        }
        let _ = fs::remove_dir(&self.own);
    }
}

fn own_cgroup(v1: bool) -> String {
    let text = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let wanted = |line: &&str| {
        let controllers = line.split(':').nth(1).unwrap_or_default();
        if v1 { controllers.split(',').any(|c| c == "cpu") } else { line.starts_with("0::") }
    };
    text.lines().find(wanted).and_then(|line| line.splitn(3, ':').nth(2)).unwrap_or("/").to_owned()
}
