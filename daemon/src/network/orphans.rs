//! Plugins that a daemon left running when it was killed.
//!
//! An ADD that goes on after its daemon would make addresses and firewall rules behind the back of the DEL that is to
//! undo it, so whoever takes over a pod waits for these first. They are not killed while there is hope: a DEL that is cut
//! short after it took the interface away leaves rules that no later DEL can find, for the plugins learn the addresses
//! from the interface. They are known by their environment, which CNI prescribes and which their children inherit.

use std::fs;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// How long after a kill a process may take to be gone.
const GONE_DEADLINE: Duration = Duration::from_secs(5);
/// A parent that has just ended a child may be about to start the next.
const ROUND_PAUSE: Duration = Duration::from_millis(5);

/// Waits until no plugin works on this attachment any more; after `patience`, kills those that do. This blocks.
pub(super) fn end(container_id: &str, patience: Duration) {
    let mark = format!("CNI_CONTAINERID={container_id}");
    let begun = Instant::now();
    loop {
        let found: Vec<Pid> = processes().into_iter().filter(|pid| has_environment(*pid, &mark)).collect();
        if found.is_empty() {
            return;
        }
        if begun.elapsed() > patience + GONE_DEADLINE {
            tracing::error!(pod = container_id, "plugins that another daemon started do not end");
            return;
        }
        for pid in found {
            end_one(pid, &mark, patience.saturating_sub(begun.elapsed()));
        }
        std::thread::sleep(ROUND_PAUSE);
    }
}

fn end_one(pid: Pid, mark: &str, patience: Duration) {
    // Gone already is what was wanted.
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return };
    // The descriptor holds on to the process; only now is it certain that it is the one that was meant.
    if !has_environment(pid, mark) {
        return;
    }
    let gone_within = |patience: Duration| {
        let timeout = Timespec::try_from(patience).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        let mut gone = [PollFd::new(&pidfd, PollFlags::IN)];
        matches!(rustix::event::poll(&mut gone, Some(&timeout)), Ok(n) if n > 0)
    };
    tracing::info!(pid = pid.as_raw_nonzero().get(), "waiting for a plugin that another daemon started");
    if gone_within(patience) {
        return;
    }
    match pidfd_send_signal(&pidfd, Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => drop(gone_within(GONE_DEADLINE)),
        Err(error) => tracing::warn!(%error, "cannot end a plugin that another daemon started"),
    }
}

fn processes() -> Vec<Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)).collect()
}

/// Whether a process was started with this variable. A zombie has no environment, and is no worry.
fn has_environment(pid: Pid, mark: &str) -> bool {
    let environment = fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero())).unwrap_or_default();
    environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn shell(id: &str, script: &str) -> std::process::Child {
        let mut command = Command::new("sh");
        command.args(["-c", script]).env("CNI_CONTAINERID", id).stdout(Stdio::null());
        let child = command.spawn().unwrap();
        std::thread::sleep(Duration::from_millis(200));
        child
    }

    #[test]
    fn a_plugin_that_goes_on_is_waited_for_and_not_killed() {
        let mut ours = shell("orphan-test-0", "sleep 1; sleep 0.2; exit 0");
        end("orphan-test-0", Duration::from_secs(30));
        assert!(ours.wait().unwrap().success());
    }

    #[test]
    fn a_plugin_that_hangs_is_killed_with_its_child_and_others_are_not() {
        let mut ours = shell("orphan-test-1", "sleep 60 & wait");
        let mut other = shell("orphan-test-10", "sleep 60");
        end("orphan-test-1", Duration::from_millis(100));
        assert!(!ours.wait().unwrap().success());
        assert!(processes().into_iter().all(|pid| !has_environment(pid, "CNI_CONTAINERID=orphan-test-1")));
        assert!(other.try_wait().unwrap().is_none(), "another pod's plugin was ended");
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
