//! What `/proc` says about the processes of a node.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;
use std::{fs, thread};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// One process, as far as it can be seen.
#[derive(Debug, Clone)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Its parent's id.
    pub parent: u32,
    /// The kernel's state letter; `Z` is a zombie.
    pub state: char,
    /// The name the kernel keeps, at most 15 bytes.
    pub comm: String,
    /// Its arguments, joined by blanks.
    pub cmdline: String,
}

impl Process {
    /// Reads one; `None` if it is gone.
    pub fn read(pid: u32) -> Option<Process> {
        let dir = format!("/proc/{pid}");
        let stat = fs::read(format!("{dir}/stat")).ok()?;
        let stat = String::from_utf8_lossy(&stat).into_owned();
        // The name stands in parentheses and may contain some: what follows the last one is fixed.
        let (head, tail) = stat.rsplit_once(')')?;
        let mut fields = tail.split_whitespace();
        let state = fields.next()?.chars().next()?;
        let parent = fields.next()?.parse().ok()?;
        let cmdline = fs::read(format!("{dir}/cmdline")).unwrap_or_default();
        let cmdline = String::from_utf8_lossy(&cmdline).trim_end_matches('\0').replace('\0', " ");
        Some(Process { pid, parent, state, comm: head.split_once('(')?.1.to_owned(), cmdline })
    }

    /// Whether the process has something to do with the directory, or runs below the cgroup or one named by an id.
    pub fn belongs_to(&self, dir: &str, cgroup: &str, ids: &[String]) -> bool {
        if self.pid == std::process::id() {
            return false;
        }
        let proc = format!("/proc/{}", self.pid);
        let link = |name: &str| fs::read_link(format!("{proc}/{name}")).is_ok_and(|p| p.starts_with(dir));
        let in_cgroup = || {
            let text = fs::read_to_string(format!("{proc}/cgroup")).unwrap_or_default();
            text.lines()
                .filter_map(|l| l.splitn(3, ':').nth(2))
                .any(|path| path.starts_with(cgroup) || ids.iter().any(|id| path.contains(id.as_str())))
        };
        self.cmdline.contains(dir) || link("exe") || link("cwd") || link("root") || in_cgroup()
    }
}

/// Every process there is.
pub fn all() -> Vec<Process> {
    let entries = fs::read_dir("/proc").expect("/proc is mounted");
    entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).filter_map(Process::read).collect()
}

/// Whether a process with this id exists and is not a zombie.
pub fn runs(pid: u32) -> bool {
    Process::read(pid).is_some_and(|p| p.state != 'Z' && p.state != 'X')
}

/// Sends a signal; a process that is gone is no error.
pub fn signal(pid: u32, signal: Signal) {
    if let Ok(pid) = i32::try_from(pid) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

/// Kills everything of a node and waits a moment for it to be gone.
pub fn kill_all(dir: &str, cgroup: &str, ids: &[String]) {
    for _ in 0..100 {
        let left: Vec<Process> =
            all().into_iter().filter(|p| p.state != 'Z' && p.belongs_to(dir, cgroup, ids)).collect();
        if left.is_empty() {
            return;
        }
        left.iter().for_each(|p| signal(p.pid, Signal::SIGKILL));
        thread::sleep(Duration::from_millis(20));
    }
}

/// One process id per mount namespace of this machine.
pub fn one_per_mount_namespace() -> Vec<u32> {
    let mut seen = BTreeMap::new();
    for process in all() {
        if let Ok(namespace) = fs::read_link(format!("/proc/{}/ns/mnt", process.pid)) {
            seen.entry(namespace).or_insert(process.pid);
        }
    }
    seen.into_values().collect()
}

/// Sum of the process's open descriptors.
pub fn descriptors(pid: u32) -> usize {
    fs::read_dir(Path::new("/proc").join(pid.to_string()).join("fd")).map_or(0, Iterator::count)
}
