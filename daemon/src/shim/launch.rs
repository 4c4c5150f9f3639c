//! Start a shim for a new pod, or run its `cleanup` for a pod whose shim is gone.
//!
//! The shim is spawned directly in serve mode: no helper process in between, no fork of this one (std's `Command`
//! uses posix_spawn as long as nothing runs between fork and exec).

use std::path::PathBuf;
use std::process::Stdio;

use ocid_api::id::{ContainerId, PodId};
use ocid_api::paths::Dirs;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use super::state::Deadlines;
use crate::error::{Context, Error, Kind, Result};

/// How much of a shim's last words is kept for the error.
const WORDS_BYTES_MAX: u64 = 4096;

/// How many cleanups run at a time.
const CLEANUPS_MAX: usize = 16;

/// Knows the shim binary and where pods live.
#[derive(Debug)]
pub struct Launcher {
    binary: PathBuf,
    dirs: Dirs,
    cgroup: String,
    deadlines: Deadlines,
    children: TaskTracker,
    cleanups: Semaphore,
}

/// What `ocid-shim cleanup` is to do beyond ending what still runs.
#[derive(Debug, Clone, Copy)]
pub(super) enum Depth<'a> {
    /// Nothing: end the processes, record the exits.
    End,
    /// Release the namespaces and record the pod as stopped.
    Detached,
    /// Leave nothing of the pod.
    Remove,
    /// Leave nothing of one container.
    RemoveContainer(&'a ContainerId),
}

impl Launcher {
    /// `cgroup` is where shims move themselves, out of the daemon's own; empty leaves them where they are.
    pub fn new(binary: PathBuf, dirs: Dirs, cgroup: String, deadlines: Deadlines) -> Launcher {
        Launcher {
            binary,
            dirs,
            cgroup,
            deadlines,
            children: TaskTracker::new(),
            cleanups: Semaphore::new(CLEANUPS_MAX),
        }
    }

    /// Where pods live.
    pub fn dirs(&self) -> &Dirs {
        &self.dirs
    }

    /// The deadlines of every call to a shim.
    pub fn deadlines(&self) -> Deadlines {
        self.deadlines
    }

    /// Starts a shim and returns once it serves.
    pub(super) async fn launch(&self, pod: &PodId) -> Result<()> {
        let mut command = self.command("serve", pod);
        if !self.cgroup.is_empty() {
            command.arg("--cgroup").arg(&self.cgroup);
        }
        let mut child = self.spawn(&mut command)?;
        let ready = tokio::time::timeout(self.deadlines.start, ready(&mut child)).await;
        let outcome = match ready {
            Ok(outcome) => outcome,
            Err(_) => Err(Error::new(
                Kind::DeadlineExceeded,
                format!("shim not ready within {:?}", self.deadlines.start),
            )),
        };
        // It has said what it had to say; two descriptors for each pod would be left.
        drop((child.stdout.take(), child.stderr.take()));
        if outcome.is_err() {
            self.leave_nothing(&mut child, pod).await;
        }
        // task: reaps the shim if it exits while we live; owned by the launcher.
        self.children.spawn(async move { child.wait().await });
        outcome.map_err(|e| e.during(format!("start shim of pod {pod}")))
    }

    /// Ends a shim that did not become ready. It may have made its directories, and nobody would look for them.
    async fn leave_nothing(&self, child: &mut Child, pod: &PodId) {
        // That it has exited already is what we want; if it cannot be killed, its lock says so to cleanup.
        tokio::time::timeout(self.deadlines.start, child.kill()).await.ok();
        if let Err(error) = self.cleanup(pod, Depth::Remove).await {
            tracing::warn!(%error, "what a shim left stays until the next start");
        }
    }

    /// Runs the shim's `cleanup`, which works from the records alone and may be repeated.
    pub(super) async fn cleanup(&self, pod: &PodId, depth: Depth<'_>) -> Result<()> {
        let mut command = self.command("cleanup", pod);
        match depth {
            Depth::End => &mut command,
            Depth::Detached => command.arg("--detached"),
            Depth::Remove => command.arg("--remove"),
            Depth::RemoveContainer(id) => command.arg("--remove-container").arg(id.as_str()),
        };
        // After a reboot every pod is cleaned up at once.
        let _turn =
            self.cleanups.acquire().await.context(Kind::Internal, || "wait for a turn to clean up".into())?;
        let mut child = self.spawn(command.kill_on_drop(true))?;
        let finish = async {
            let words = words(child.stderr.take()).await;
            let status = child.wait().await.context(Kind::Internal, || "wait for cleanup".into())?;
            if status.success() { Ok(()) } else { Err(Error::internal(format!("{status}: {words}"))) }
        };
        match tokio::time::timeout(self.deadlines.cleanup, finish).await {
            Ok(done) => done,
            Err(_) => {
                Err(Error::new(Kind::DeadlineExceeded, format!("took over {:?}", self.deadlines.cleanup)))
            }
        }
        .map_err(|e| e.during(format!("clean up pod {pod}, whose shim is gone")))
    }

    fn command(&self, verb: &str, pod: &PodId) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg(verb).arg("--pod").arg(pod.as_str());
        command.arg("--root").arg(&self.dirs.root).arg("--state").arg(&self.dirs.state);
        command.env_clear().current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn spawn(&self, command: &mut Command) -> Result<Child> {
        command.spawn().context(Kind::Internal, || format!("run {}", self.binary.display()))
    }
}

/// Waits for the ready byte, or for the reason why there is none.
async fn ready(child: &mut Child) -> Result<()> {
    let mut byte = [0_u8; 1];
    let stdout = child.stdout.as_mut().ok_or_else(|| Error::internal("no stdout"))?;
    match stdout.read_exact(&mut byte).await {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::internal(format!("it said: {}", words(child.stderr.take()).await))),
    }
}

/// What a child wrote before it closed its stderr, cut to a readable length.
async fn words(stderr: Option<impl AsyncRead + Unpin>) -> String {
    let mut said = Vec::new();
    if let Some(stderr) = stderr {
        // An error here only shortens a message.
        stderr.take(WORDS_BYTES_MAX).read_to_end(&mut said).await.ok();
    }
    String::from_utf8_lossy(&said).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    use super::*;

    /// A launcher whose shim is a script.
    fn launcher(dir: &std::path::Path, script: &str) -> Launcher {
        let binary = dir.join("shim");
        fs::write(&binary, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).unwrap();
        let second = Duration::from_secs(1);
        let deadlines =
            Deadlines { call: second, runtime: second, start: second, cleanup: Duration::from_secs(20) };
        let dirs = Dirs { root: dir.to_owned(), state: dir.to_owned() };
        Launcher::new(binary, dirs, String::new(), deadlines)
    }

    #[tokio::test]
    async fn a_shim_that_does_not_become_ready_is_killed_and_cleaned_up_after() {
        let dir = tempfile::tempdir().unwrap();
        let marks = dir.path().display();
        let script = format!(
            "echo \"$*\" >> {marks}/calls; [ $1 = serve ] || exit 0; echo $$ > {marks}/pid; exec sleep 1000"
        );
        let launcher = launcher(dir.path(), &script);
        let error = launcher.launch(&PodId::generate()).await.unwrap_err();
        assert_eq!(error.kind(), Kind::DeadlineExceeded, "{error}");
        let calls = fs::read_to_string(dir.path().join("calls")).unwrap();
        let verbs: Vec<_> = calls.lines().map(|line| line.split(' ').next().unwrap()).collect();
        assert_eq!(verbs, ["serve", "cleanup"], "{calls}");
        assert!(calls.trim_end().ends_with("--remove"), "{calls}");
        let pid = fs::read_to_string(dir.path().join("pid")).unwrap();
        assert!(!std::path::Path::new("/proc").join(pid.trim()).exists(), "it runs on");
    }

    #[tokio::test]
    async fn what_a_shim_says_before_it_gives_up_is_the_error() {
        let dir = tempfile::tempdir().unwrap();
        let launcher = launcher(dir.path(), "echo no space left >&2; exit 1");
        let error = launcher.launch(&PodId::generate()).await.unwrap_err().to_string();
        assert!(error.contains("it said: no space left"), "{error}");
    }
}
