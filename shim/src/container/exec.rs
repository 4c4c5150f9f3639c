//! An extra process in a container. `ExecSync` is one: no input, bounded output, killed with its caller.
//!
//! [`spawn`] is the one place that knows how a process gets into a container. Today the runtime does it; entering by
//! pidfd without the runtime belongs there, for the specs that it knows, with the runtime for all others.

use std::collections::BTreeSet;
use std::fs;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::sync::{Semaphore, mpsc};

use super::Container;
use crate::error::{Context as _, Error, Kind, Result};
use crate::process::{Process, Status, orphans};
use crate::stdio::{Capture, ChildEnds, Chunk};

/// Execs of one pod at a time.
const EXECS_MAX: usize = 64;
/// Longest exec spec.
const PROCESS_BYTES_MAX: usize = 1 << 20;
/// How long killed processes have to die.
const KILL_DEADLINE: Duration = Duration::from_secs(5);
/// How often the descendants of a process are looked for: each round may find children made since the last.
const ROUNDS_MAX: usize = 16;

static EXECS: Semaphore = Semaphore::const_new(EXECS_MAX);

/// What a synchronous exec runs.
pub(crate) struct ExecSync {
    /// OCI process as JSON.
    pub(crate) process: Vec<u8>,
    /// `None` waits for ever.
    pub(crate) timeout: Option<Duration>,
    /// Of each stream.
    pub(crate) output_bytes_max: u64,
}

impl Container {
    /// Runs it to its end, handing its output to `output`. If the time-out passes, or `gone` resolves, the process and
    /// its descendants are killed first and then this returns the reason.
    pub(crate) async fn exec_sync<F: Future<Output = bool>>(
        self: &Arc<Self>,
        exec: ExecSync,
        output: impl Fn(Chunk) -> F,
        gone: impl Future<Output = ()>,
    ) -> Result<Status> {
        check(&exec.process)?;
        let _permit = EXECS.try_acquire().map_err(|_| {
            Error::new(Kind::ResourceExhausted, format!("{EXECS_MAX} execs run in this pod already"))
        })?;
        if !self.state().is_running() {
            return Err(Error::precondition("the container does not run"));
        }
        let (capture, ends, chunks) =
            Capture::new(exec.output_bytes_max).context(|| "make the exec's pipes".to_owned())?;
        let cut_short = async {
            let timeout = exec.timeout;
            let passed = async {
                match timeout {
                    Some(timeout) => tokio::time::sleep(timeout).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = passed => Error::deadline("the exec did not end within its time-out"),
                () = gone => Error::new(Kind::Cancelled, "the caller has gone"),
            }
        };
        tokio::pin!(cut_short);

        // In a task of its own, so that a process which starts too late is still found and killed.
        let mut starting = tokio::spawn(spawn(Arc::clone(self), exec.process, ends));
        let process = tokio::select! {
            biased;
            started = &mut starting => started.context(|| "start the exec".to_owned())??,
            why = &mut cut_short => {
                let container = Arc::clone(self);
                tokio::spawn(async move {
                    if let Ok(Ok(process)) = starting.await {
                        container.kill_tree(&process).await;
                    }
                });
                return Err(why);
            }
        };
        let ended = async {
            let (status, ()) = tokio::join!(finish(&process, capture), forward(chunks, output));
            status
        };
        tokio::select! {
            biased;
            status = ended => status,
            why = &mut cut_short => {
                self.kill_tree(&process).await;
                Err(why)
            }
        }
    }

    /// Kills a process of this container and what it has started, and reaps it.
    async fn kill_tree(&self, process: &Process) {
        let tree = self.stop_tree(process);
        for pidfd in &tree {
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
        let _ = process.signal(libc::SIGKILL);
        let _ = tokio::time::timeout(KILL_DEADLINE, process.wait()).await;
    }

    /// Stops the descendants, so that they make no more, until a look finds no new one.
    fn stop_tree(&self, process: &Process) -> Vec<OwnedFd> {
        let _ = process.signal(libc::SIGSTOP);
        let (mut seen, mut tree) = (BTreeSet::from([process.pid()]), Vec::new());
        for _ in 0..ROUNDS_MAX {
            let mut found = descendants(process.pid());
            // Those whose parent has ended are nobody's descendants any more, but still in the session of the exec.
            found.extend(
                self.cgroup()
                    .map(|cgroup| cgroup.processes())
                    .unwrap_or_default()
                    .into_iter()
                    .filter(|pid| session(*pid) == Some(process.pid())),
            );
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
}

/// Puts a process into the container.
async fn spawn(container: Arc<Container>, process: Vec<u8>, ends: ChildEnds) -> Result<Process> {
    let _hold = orphans::hold(); // until it is ours
    let pid = container.runc.exec(&container.id(), &process, ends).await?;
    Process::adopt(pid).context(|| format!("adopt the exec, process {pid}"))
}

/// The exit, once all that was written before it is on its way. Descendants that hold the output are not waited for.
async fn finish(process: &Process, capture: Capture) -> Result<Status> {
    let status = process.wait().await.context(|| "wait for the exec".to_owned())?;
    capture.finish().await;
    Ok(status)
}

async fn forward<F: Future<Output = bool>>(mut chunks: mpsc::Receiver<Chunk>, output: impl Fn(Chunk) -> F) {
    while let Some(chunk) = chunks.recv().await {
        if !output(chunk).await {
            return; // dropping the receiver tells the reader that nobody listens
        }
    }
}

fn check(process: &[u8]) -> Result<()> {
    #[derive(serde::Deserialize)]
    struct Process {
        #[serde(default)]
        terminal: bool,
        #[serde(default)]
        args: Vec<String>,
    }
    if process.len() > PROCESS_BYTES_MAX {
        return Err(Error::invalid("the exec's process is too large"));
    }
    let process: Process =
        serde_json::from_slice(process).map_err(|e| Error::invalid(format!("the exec's process: {e}")))?;
    if process.args.first().is_none_or(String::is_empty) {
        return Err(Error::invalid("the exec has no command"));
    }
    if process.terminal {
        return Err(Error::invalid("a synchronous exec has no terminal"));
    }
    Ok(())
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

/// The session of a process.
fn session(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // After the name: state, parent, group, session.
    stat.rsplit_once(") ")?.1.split(' ').nth(3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exec_needs_a_command_and_has_no_terminal() {
        assert!(check(br#"{"args":["true"],"cwd":"/"}"#).is_ok());
        for bad in
            [&b"{}"[..], br#"{"args":[]}"#, br#"{"args":[""]}"#, br#"{"args":["a"],"terminal":true}"#, b"x"]
        {
            assert!(check(bad).is_err());
        }
    }
}
