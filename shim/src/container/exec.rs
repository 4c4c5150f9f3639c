//! An extra process in a container. `ExecSync` is one: no input, bounded output, killed with its caller.
//!
//! [`spawn`] is the one place that knows how a process gets into a container. Today the runtime does it; entering by
//! pidfd without the runtime belongs there, for the specs that it knows, with the runtime for all others.

use std::fs;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};

use super::Container;
use crate::cgroup;
use crate::error::{Context as _, Error, Kind, Result};
use crate::process::{Process, Status, orphans, tree};
use crate::stdio::{Capture, ChildEnds, Chunk};

/// Execs of one pod at a time.
const EXECS_MAX: usize = 64;
/// Longest exec spec.
const PROCESS_BYTES_MAX: usize = 1 << 20;
/// How long killed processes have to die.
const KILL_DEADLINE: Duration = Duration::from_secs(5);

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
        let permit = EXECS.try_acquire().map_err(|_| {
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
                    let _permit = permit; // it counts until it has ended
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

    /// Kills a process of this container and what it has started, and reaps it. One that has been reaped already is
    /// left alone: its pid may be another's now, and what it has left behind is not waited for either.
    async fn kill_tree(&self, process: &Process) {
        if process.is_reaped() {
            return;
        }
        // Those whose parent has ended are nobody's descendants any more, but still in the session of the exec.
        let in_session = || {
            let mut pids = self.cgroup().map(|cgroup| cgroup.processes()).unwrap_or_default();
            pids.retain(|pid| session(*pid) == Some(process.pid()));
            pids
        };
        let _ = process.signal(libc::SIGSTOP);
        tree::kill_descendants(process.pid(), in_session);
        let _ = process.signal(libc::SIGKILL);
        let _ = tokio::time::timeout(KILL_DEADLINE, process.wait()).await;
    }
}

/// Puts a process into the container.
async fn spawn(container: Arc<Container>, process: Vec<u8>, ends: ChildEnds) -> Result<Process> {
    cgroup::hasten();
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
