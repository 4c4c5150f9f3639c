//! The only caller of the runtime binary: create, start, exec, update and delete; a deadline on each.
//!
//! State comes from memory and pidfds and signals go by pidfd, so `state`, `kill` and `delete --force` (which sleeps
//! 100 ms) are on no request's path; the last is for undoing what we cannot know the state of.

mod log;

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::error::{Context as _, Error, Kind, Result};
use crate::process::{Process, tree};
use crate::record;
use crate::stdio::ChildEnds;

/// How long a call may take if nobody says otherwise.
const TIMEOUT: Duration = Duration::from_secs(120);
/// How long a killed runtime has to die: then it hangs in the kernel and we stop waiting for it.
const KILL_DEADLINE: Duration = Duration::from_secs(2);

/// How the names of a call's files begin.
const SCRATCH: &str = "runtime-";

/// An OCI runtime and where we keep the files of a call to it.
#[derive(Debug)]
pub(crate) struct Runc {
    binary: PathBuf,
    root: PathBuf,
    systemd_cgroup: bool,
    timeout: Duration,
    scratch: PathBuf,
    calls: AtomicU64,
}

/// A file that goes when it is dropped.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = record::remove_file(&self.0);
    }
}

impl Runc {
    /// `scratch` is a directory for nobody but us.
    pub(crate) fn new(
        binary: &str,
        root: &str,
        systemd_cgroup: bool,
        timeout_ms: u64,
        scratch: PathBuf,
    ) -> Runc {
        let timeout = if timeout_ms == 0 { TIMEOUT } else { Duration::from_millis(timeout_ms) };
        let (binary, root) = (binary.into(), root.into());
        Runc { binary, root, systemd_cgroup, timeout, scratch, calls: AtomicU64::new(0) }
    }

    /// Makes a container from a bundle and says the pid of its init.
    pub(crate) async fn create(
        &self,
        id: &str,
        bundle: &Path,
        console: Option<&Path>,
        ends: ChildEnds,
    ) -> Result<i32> {
        let pid_file = self.scratch_file("pid");
        let mut args: Vec<&std::ffi::OsStr> =
            vec!["--bundle".as_ref(), bundle.as_ref(), "--pid-file".as_ref(), pid_file.0.as_ref()];
        if let Some(socket) = console {
            args.extend(["--console-socket".as_ref(), socket.as_os_str()]);
        }
        args.push(id.as_ref());
        self.call("create", &args, Some(ends)).await?;
        read_pid(&pid_file.0)
    }

    /// Lets the user's process go.
    pub(crate) async fn start(&self, id: &str) -> Result<()> {
        self.call("start", &[id.as_ref()], None).await
    }

    /// Starts an extra process in a container and says its pid.
    pub(crate) async fn exec(&self, id: &str, process: &[u8], ends: ChildEnds) -> Result<i32> {
        let pid_file = self.scratch_file("pid");
        let spec = self.scratch_file("json");
        record::write_file(&spec.0, process, 0o600).context(|| "write the exec's process".to_owned())?;
        let args = [
            "--detach".as_ref(),
            "--process".as_ref(),
            spec.0.as_os_str(),
            "--pid-file".as_ref(),
            pid_file.0.as_os_str(),
            id.as_ref(),
        ];
        self.call("exec", &args, Some(ends)).await?;
        read_pid(&pid_file.0)
    }

    /// Changes limits: OCI LinuxResources as JSON.
    pub(crate) async fn update(&self, id: &str, resources: &[u8]) -> Result<()> {
        let file = self.scratch_file("json");
        record::write_file(&file.0, resources, 0o600).context(|| "write the limits".to_owned())?;
        self.call("update", &["--resources".as_ref(), file.0.as_os_str(), id.as_ref()], None).await
    }

    /// Forgets a container that has exited, and removes its cgroup.
    pub(crate) async fn delete(&self, id: &str) -> Result<()> {
        self.call("delete", &[id.as_ref()], None).await
    }

    /// Kills and forgets whatever there is of a container. Nothing is success.
    pub(crate) async fn delete_by_force(&self, id: &str) -> Result<()> {
        self.call("delete", &["--force".as_ref(), id.as_ref()], None).await
    }

    async fn call(&self, verb: &str, args: &[&std::ffi::OsStr], ends: Option<ChildEnds>) -> Result<()> {
        let log = self.scratch_file("log");
        let mut command = Command::new(&self.binary);
        command.arg("--root").arg(&self.root);
        // Where there is no room for a log, it says nothing: deleting must not need space.
        if record::write_file(&log.0, b"", 0o600).is_ok() {
            command.arg("--log").arg(&log.0).args(["--log-format", "json"]);
        }
        if self.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        command.arg(verb).args(args); // no directory: std would fork for it, and we are in / already
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        if let Some(ends) = ends {
            ends.give_to(&mut command);
        }
        let process =
            Process::spawn(&mut command).context(|| format!("run {} {verb}", self.binary.display()))?;
        let Ok(status) = tokio::time::timeout(self.timeout, process.wait()).await else {
            // With what it has begun: a half-made process would live on, known to nobody.
            let _ = process.signal(libc::SIGSTOP);
            tree::kill_descendants(process.pid(), Vec::new);
            let _ = process.signal(libc::SIGKILL);
            let _ = tokio::time::timeout(KILL_DEADLINE, process.wait()).await;
            let after = self.timeout.as_millis();
            return Err(Error::deadline(format!("{} {verb} did not end within {after} ms", self.name())));
        };
        let status = status.context(|| format!("wait for {} {verb}", self.name()))?;
        if status.code == 0 {
            return Ok(());
        }
        let (kind, text) = tail(&log.0).as_deref().and_then(log::last_error).unwrap_or_else(|| {
            let how = if status.signal == 0 { "exit code" } else { "signal" };
            let number = if status.signal == 0 { status.code } else { status.signal };
            (Kind::Internal, format!("it ended with {how} {number} and said nothing"))
        });
        Err(Error::new(kind, format!("{} {verb}: {text}", self.name())))
    }

    fn name(&self) -> std::borrow::Cow<'_, str> {
        self.binary.file_name().unwrap_or(self.binary.as_os_str()).to_string_lossy()
    }

    fn scratch_file(&self, extension: &str) -> Scratch {
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        Scratch(self.scratch.join(format!("{SCRATCH}{}-{number}.{extension}", std::process::id())))
    }
}

/// Whether a command line is that of a call made with this scratch directory.
pub(crate) fn is_call<'a>(mut args: impl Iterator<Item = &'a [u8]>, scratch: &Path) -> bool {
    use std::os::unix::ffi::OsStrExt as _;
    let ours = [scratch.as_os_str().as_bytes(), b"/", SCRATCH.as_bytes()].concat();
    args.any(|arg| arg.starts_with(&ours))
}

/// The end of a log. A runtime gone mad may have written any amount.
fn tail(path: &Path) -> Option<String> {
    let mut file = File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(log::TAIL_BYTES))).ok()?;
    let mut bytes = Vec::new();
    file.take(log::TAIL_BYTES).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

fn read_pid(path: &Path) -> Result<i32> {
    let text = fs::read_to_string(path).context(|| "read the runtime's pid file".to_owned())?;
    text.trim()
        .parse()
        .ok()
        .filter(|pid| *pid > 1)
        .ok_or_else(|| Error::internal("the runtime's pid file holds no pid"))
}
