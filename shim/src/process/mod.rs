//! One supervised process: a container's init, an exec, or a call of the runtime.
//!
//! ```text
//! spawned or adopted ──▶ running ──▶ exited        the exit is taken exactly once, by `wait`
//! ```
//!
//! Invariant: nobody else waits for this pid. `waitpid(-1)` is called nowhere in the shim, so an exit cannot be lost
//! and a recycled pid cannot be mistaken for ours. What nobody has claimed is collected by [`orphans`].

pub mod orphans;
pub(crate) mod tree;

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, WaitIdStatus, pidfd_open, waitid};
use tokio::io::unix::AsyncFd;

use crate::os;
use orphans::Claim;

/// A pidfd and exactly one exit.
///
/// Dropping it ends nothing: the process runs on, and is collected as an orphan when it exits.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    pidfd: AsyncFd<OwnedFd>,
    status: OnceLock<Status>,
    claim: Claim,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// The exit code, or 128 and the signal.
    pub code: u32,
    /// The signal that ended it; 0 if none did.
    pub signal: u32,
}

impl Process {
    /// Starts a child, by posix_spawn: the command must have no `pre_exec`, user or group.
    ///
    /// Our copies of the descriptors given to it as stdin, stdout and stderr are closed before this returns, so that the
    /// other ends see the child's EOF and not ours; the command is left with none.
    ///
    /// # Errors
    /// If it cannot be started; then nothing runs.
    pub fn spawn(command: &mut Command) -> io::Result<Process> {
        let _hold = orphans::hold(); // until the pid is claimed
        let spawned = os::with_children_limits(|| command.spawn());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = spawned?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData)?;
        // std's handle is only dropped, never waited with; the pid stays the child's until we reap it.
        Process::open(pid, Claim::new(pid)).inspect_err(|_| {
            let _ = child.kill(); // the orphan collector takes the rest
        })
    }

    /// Takes over a descendant that became our child when its parent exited. It may have exited already.
    ///
    /// The caller holds [`orphans::hold`] from before it was made until this returns.
    ///
    /// # Errors
    /// `NotFound` if this pid is not a child of ours, `AlreadyExists` if it is claimed.
    pub fn adopt(pid: i32) -> io::Result<Process> {
        let not_ours =
            || io::Error::new(io::ErrorKind::NotFound, format!("process {pid} is not a child of ours"));
        let pid = Some(pid).filter(|pid| *pid > 0).and_then(Pid::from_raw).ok_or_else(not_ours)?;
        let claim = Claim::try_new(pid)?;
        let process = Process::open(pid, claim).map_err(|e| match e.raw_os_error() {
            Some(libc::ESRCH) => not_ours(),
            _ => e,
        })?;
        // Only our own children can be waited for, so this proves that the pidfd is one of them.
        match process.try_wait(WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT) {
            Ok(_) => Ok(process),
            Err(rustix::io::Errno::CHILD) => Err(not_ours()),
            Err(e) => Err(e.into()),
        }
    }

    fn open(pid: Pid, claim: Claim) -> io::Result<Process> {
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let pidfd = os::watch_readable(pidfd)?;
        Ok(Process { pid, pidfd, status: OnceLock::new(), claim })
    }

    /// The process id, valid until the exit has been taken.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Whether the exit has been taken. Then the pid may be another's.
    pub fn is_reaped(&self) -> bool {
        self.status.get().is_some()
    }

    /// Sends a signal. A process that has gone is success: what was wanted has happened.
    ///
    /// # Errors
    /// If there is no such signal.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        match os::pidfd_send_signal(self.pidfd.as_fd(), signal) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            result => result,
        }
    }

    /// Waits for the exit and takes it. May be dropped and called again; once known, the answer stays.
    ///
    /// # Errors
    /// If the kernel says that this is no child of ours, which nothing in the shim can cause.
    pub async fn wait(&self) -> io::Result<Status> {
        loop {
            if let Some(status) = self.status.get() {
                return Ok(*status);
            }
            let mut ready = self.pidfd.readable().await?;
            // No await from here to the claim's release: either all of it happens or nothing.
            match self.try_wait(WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
                Ok(Some(exit)) => {
                    self.claim.release(); // the pid may be another's from now on
                    let _ = self.status.set(Status::from(&exit));
                    orphans::look_soon();
                }
                Ok(None) => ready.clear_ready(),
                // Another waiter of this very process was faster; its answer is there or this is an error.
                Err(rustix::io::Errno::CHILD) if self.status.get().is_some() => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn try_wait(&self, options: WaitIdOptions) -> rustix::io::Result<Option<WaitIdStatus>> {
        loop {
            match waitid(WaitId::PidFd(self.pidfd.as_fd()), options) {
                Err(rustix::io::Errno::INTR) => {}
                result => return result,
            }
        }
    }
}

impl From<&WaitIdStatus> for Status {
    fn from(exit: &WaitIdStatus) -> Status {
        let number = |value: Option<i32>| value.and_then(|value| u32::try_from(value).ok());
        match number(exit.terminating_signal()) {
            Some(signal) => Status { code: 128 + signal, signal },
            None => Status { code: number(exit.exit_status()).unwrap_or(255), signal: 0 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    #[tokio::test]
    async fn an_exit_is_code_or_signal() {
        let cases = [
            ("exit 0", Status { code: 0, signal: 0 }),
            ("exit 200", Status { code: 200, signal: 0 }),
            ("kill -9 $$", Status { code: 137, signal: 9 }),
            ("kill -15 $$", Status { code: 143, signal: 15 }),
        ];
        for (script, expected) in cases {
            let process = Process::spawn(&mut shell(script)).unwrap();
            assert_eq!(process.wait().await.unwrap(), expected, "{script}");
        }
    }

    #[tokio::test]
    async fn a_wait_may_be_dropped_and_repeated() {
        let process = Process::spawn(&mut shell("exec sleep 60")).unwrap();
        let short = tokio::time::timeout(std::time::Duration::from_millis(20), process.wait()).await;
        assert!(short.is_err());
        process.signal(libc::SIGKILL).unwrap();
        let first = process.wait().await.unwrap();
        assert_eq!(process.wait().await.unwrap(), first);
        process.signal(libc::SIGTERM).unwrap(); // gone is fine
    }

    #[tokio::test]
    async fn two_waiters_see_the_same_exit() {
        let process = Process::spawn(&mut shell("sleep 0.05; exit 9")).unwrap();
        let (a, b) = tokio::join!(process.wait(), process.wait());
        assert_eq!((a.unwrap().code, b.unwrap().code), (9, 9));
    }

    #[tokio::test]
    async fn only_an_unclaimed_child_can_be_adopted() {
        let process = Process::spawn(&mut shell("exec sleep 60")).unwrap();
        assert_eq!(Process::adopt(process.pid()).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        for stranger in [1, 0, -1, i32::MAX] {
            assert_eq!(Process::adopt(stranger).unwrap_err().kind(), io::ErrorKind::NotFound, "{stranger}");
        }
        process.signal(libc::SIGKILL).unwrap();
        process.wait().await.unwrap();
    }

    #[tokio::test]
    async fn a_bad_signal_is_an_error() {
        let process = Process::spawn(&mut shell("exec sleep 60")).unwrap();
        assert!(process.signal(1000).is_err());
        process.signal(libc::SIGRTMIN()).unwrap();
        assert_eq!(process.wait().await.unwrap().signal, u32::try_from(libc::SIGRTMIN()).unwrap());
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_starts_nothing() {
        let error = Process::spawn(&mut Command::new("/nowhere/at/all")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
