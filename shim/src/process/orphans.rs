//! Collects adopted zombies that nobody claims: double-forked daemons of execs, children of dead inits.
//!
//! A subreaper gets children it has never heard of. Each that exits keeps its pid, and its place in the container's pids
//! limit, until somebody waits for it.
//!
//! An exit cannot be stolen: a pid is reaped only if it is in no `Claim` and was there before every [`Hold`] that
//! exists. Whoever makes a process through the runtime takes a hold before it starts the runtime and keeps it until the
//! pid is claimed, so there is no moment at which a process that somebody will want is neither held nor claimed. And
//! execs without a pause, whose holds overlap, keep nothing from being collected.
//!
//! Never polls fast: it looks after an exit that was seen, and otherwise at a pace that slows down to once a minute as
//! long as it finds nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{fs, io};

use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use tokio::sync::Notify;

/// How long after a hint to look: orphans of one exit become ours together, and are collected together.
const DELAY: Duration = Duration::from_secs(1);
/// How often to look when nothing is ever found.
const PERIOD_MAX: Duration = Duration::from_secs(60);

static REGISTRY: Mutex<Registry> = Mutex::new(Registry {
    claimed: BTreeSet::new(),
    holds: BTreeSet::new(),
    begun: 0,
    seen: BTreeMap::new(),
});
static HINT: Notify = Notify::const_new();

struct Registry {
    /// Children that a `Process` will wait for.
    claimed: BTreeSet<i32>,
    /// Work in flight that makes children which are not claimed yet, by number.
    holds: BTreeSet<u64>,
    /// How many holds have begun: the number of the last one.
    begun: u64,
    /// Children that nobody has claimed, and how many holds had begun when they were first seen.
    seen: BTreeMap<i32, u64>,
}

impl Registry {
    fn claim(&mut self, pid: i32) -> bool {
        self.seen.remove(&pid); // who has this pid after its release is somebody else
        self.claimed.insert(pid)
    }
}

fn registry() -> MutexGuard<'static, Registry> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// As long as it exists, nothing is collected that may have been made since it began.
#[derive(Debug)]
#[must_use = "dropping it lets unclaimed children be collected"]
pub struct Hold(u64);

/// To be taken before the runtime is started, and kept until the process it makes has been adopted.
pub fn hold() -> Hold {
    let mut registry = registry();
    registry.begun += 1;
    let number = registry.begun;
    registry.holds.insert(number);
    Hold(number)
}

impl Drop for Hold {
    fn drop(&mut self) {
        registry().holds.remove(&self.0);
    }
}

/// A pid that somebody will wait for. 0 once released.
#[derive(Debug)]
pub(super) struct Claim(AtomicI32);

impl Claim {
    /// Claims a child just made by us, whose pid cannot be claimed by anybody.
    pub(super) fn new(pid: Pid) -> Claim {
        let pid = pid.as_raw_nonzero().get();
        registry().claim(pid);
        Claim(AtomicI32::new(pid))
    }

    /// Claims a child that somebody else made.
    pub(super) fn try_new(pid: Pid) -> io::Result<Claim> {
        let pid = pid.as_raw_nonzero().get();
        if !registry().claim(pid) {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!("process {pid} has its waiter"),
            ));
        }
        Ok(Claim(AtomicI32::new(pid)))
    }

    /// To be called as soon as the exit is taken: the pid may be another's from then on, so this happens once only.
    pub(super) fn release(&self) {
        let pid = self.0.swap(0, Ordering::Relaxed);
        if pid != 0 {
            registry().claimed.remove(&pid);
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.release();
    }
}

/// Says that a process has just exited, whose orphans may be ours now.
pub(super) fn look_soon() {
    HINT.notify_one();
}

/// Collects for as long as the shim lives.
pub async fn run() {
    let mut period = DELAY;
    loop {
        tokio::select! {
            () = tokio::time::sleep(period) => {}
            () = HINT.notified() => tokio::time::sleep(DELAY).await,
        }
        period = if collect() > 0 { DELAY } else { (period * 2).min(PERIOD_MAX) };
    }
}

/// Reaps every zombie child that nobody claims or may be about to claim, and says how many.
fn collect() -> usize {
    // Locked until the end, so that no claim and no hold begins between the question and the reaping.
    let mut registry = registry();
    let registry = &mut *registry;
    let mut unclaimed = children();
    unclaimed.retain(|pid| !registry.claimed.contains(pid));
    registry.seen.retain(|pid, _| unclaimed.contains(pid));
    let first_hold = registry.holds.first().copied().unwrap_or(u64::MAX);
    let (mut collected, mut later) = (0, false);
    for pid in unclaimed {
        // A hold with a number above this began when the child was there already.
        if *registry.seen.entry(pid).or_insert(registry.begun) >= first_hold {
            later = true;
            continue;
        }
        let reaped = Pid::from_raw(pid)
            .map(|pid| waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOHANG));
        if matches!(reaped, Some(Ok(Some(_)))) {
            registry.seen.remove(&pid); // one that lives is passed over
            collected += 1;
        }
    }
    if later {
        HINT.notify_one();
    }
    collected
}

/// Our children, alive or not.
fn children() -> Vec<i32> {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return Vec::new() };
    let lists: io::Result<Vec<String>> =
        tasks.map(|task| fs::read_to_string(task?.path().join("children"))).collect();
    match lists {
        Ok(lists) => lists
            .iter()
            .flat_map(|list| list.split_ascii_whitespace())
            .filter_map(|pid| pid.parse().ok())
            .collect(),
        Err(_) => children_by_parent(), // a kernel without CONFIG_PROC_CHILDREN
    }
}

/// Our children, by asking every process for its parent.
fn children_by_parent() -> Vec<i32> {
    let ours = std::process::id().to_string();
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            // The name, in parentheses, may hold anything; after it come the state and the parent.
            stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)) == Some(ours.as_str())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use super::super::{Process, Status};
    use super::*;
    use crate::os;

    /// Runs the named test again, alone in a process of its own; `true` there. Orphans and their collection are a matter
    /// of the whole process, and would get at the children of other tests.
    fn alone(test: &str) -> bool {
        const MARK: &str = "OCID_TEST_ALONE";
        if std::env::var_os(MARK).is_some() {
            return true;
        }
        let name = format!("process::orphans::tests::{test}");
        let exe = std::env::current_exe().unwrap();
        let output = Command::new(exe).args(["--exact", &name]).env(MARK, "1").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        false
    }

    /// Starts a script in a process that exits at once, so that the script becomes our child. It begins only then: the
    /// shell between us would reap it if it were faster.
    async fn double_fork(script: &str) -> i32 {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let (gate, go) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let mut command = Command::new("/bin/sh");
        let script = format!("exec 3<&0; (read go <&3; {script}) >/dev/null & echo $!");
        command.args(["-c", &script]).stdin(Stdio::from(gate)).stdout(Stdio::from(write));
        let parent = Process::spawn(&mut command).unwrap();
        parent.wait().await.unwrap();
        drop(go);
        io::read_to_string(fs::File::from(read)).unwrap().trim().parse().unwrap()
    }

    async fn zombie(pid: i32) {
        for _ in 0..500 {
            if fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().contains(") Z ") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{pid} does not exit");
    }

    #[tokio::test]
    async fn the_exit_of_an_adopted_process_is_ours() {
        if !alone("the_exit_of_an_adopted_process_is_ours") {
            return;
        }
        os::become_subreaper().unwrap();
        let _hold = hold();
        let alive = double_fork("sleep 0.2; exit 7").await;
        let process = Process::adopt(alive).unwrap();
        assert_eq!(process.wait().await.unwrap(), Status { code: 7, signal: 0 });

        let dead = double_fork("kill -9 $(sh -c 'echo $PPID')").await;
        zombie(dead).await;
        let process = Process::adopt(dead).unwrap();
        assert_eq!(process.wait().await.unwrap(), Status { code: 137, signal: 9 });
        assert_eq!(Process::adopt(dead).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn only_what_is_neither_held_nor_claimed_is_collected() {
        if !alone("only_what_is_neither_held_nor_claimed_is_collected") {
            return;
        }
        os::become_subreaper().unwrap();
        let orphan = double_fork("exit 1").await;
        let wanted = double_fork("exit 2").await;
        zombie(orphan).await;
        zombie(wanted).await;
        assert_eq!(children().iter().filter(|pid| [orphan, wanted].contains(pid)).count(), 2);
        let mut scanned = children_by_parent();
        let mut listed = children();
        scanned.sort_unstable();
        listed.sort_unstable();
        assert_eq!(scanned, listed, "both ways of asking agree");

        let held = hold();
        let overlapping = hold();
        assert_eq!(collect(), 0, "somebody may be about to adopt them");
        let wanted = Process::adopt(wanted).unwrap();
        drop(held);
        assert_eq!(collect(), 0, "this one began before they were seen, too");
        let later = hold();
        drop(overlapping);
        assert_eq!(collect(), 1, "the orphan, which was there before the work that is under way");
        drop(later);
        assert_eq!(collect(), 0);
        assert_eq!(wanted.wait().await.unwrap().code, 2);
        assert!(!fs::exists(format!("/proc/{orphan}")).unwrap());
    }

    #[tokio::test]
    async fn the_loop_collects_soon_after_an_exit() {
        if !alone("the_loop_collects_soon_after_an_exit") {
            return;
        }
        os::become_subreaper().unwrap();
        let collector = tokio::spawn(run());
        let orphan = double_fork("sleep 0.05").await;
        for _ in 0..500 {
            if !fs::exists(format!("/proc/{orphan}")).unwrap() {
                return collector.abort();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{orphan} was not collected");
    }
}
