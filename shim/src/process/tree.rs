//! A process and all that it has started, to be ended together.
//!
//! Found by the links from parents to children. Each is stopped as soon as it is found, so that it makes no more, and
//! the looking goes on until it finds nobody new.
//!
//! Never signals by number: a pidfd is opened first. That the number at the root still means what the caller thinks is
//! the caller's to know: a child of ours that nobody has reaped, or a process that is stopped.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::OwnedFd;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// How often is looked: each round may find children made since the last.
const ROUNDS_MAX: usize = 16;

/// Kills the descendants of `root`, and those that `more` names and their descendants; not `root` itself.
pub(crate) fn kill_descendants(root: i32, more: impl Fn() -> Vec<i32>) {
    for pidfd in stop_descendants(root, more) {
        let _ = pidfd_send_signal(&pidfd, Signal::KILL);
    }
}

fn stop_descendants(root: i32, more: impl Fn() -> Vec<i32>) -> Vec<OwnedFd> {
    let (mut seen, mut tree) = (BTreeSet::from([root]), Vec::new());
    for _ in 0..ROUNDS_MAX {
        let mut found = descendants(root);
        for pid in more() {
            found.push(pid);
            found.extend(descendants(pid));
        }
        found.retain(|pid| seen.insert(*pid));
        if found.is_empty() {
            break;
        }
        for pid in found {
            if let Some(Ok(pidfd)) = Pid::from_raw(pid).map(|pid| pidfd_open(pid, PidfdFlags::empty())) {
                let _ = pidfd_send_signal(&pidfd, Signal::STOP);
                tree.push(pidfd);
            }
        }
    }
    tree
}

/// Children of children, as far as they still have their parents.
fn descendants(root: i32) -> Vec<i32> {
    let mut found = Vec::new();
    let mut next = vec![root];
    while let Some(pid) = next.pop() {
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            let children = children.split_ascii_whitespace().filter_map(|pid| pid.parse::<i32>().ok());
            for child in children {
                found.push(child);
                next.push(child);
            }
        }
    }
    found
}
