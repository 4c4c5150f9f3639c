//! Run one CNI plugin: environment, stdin, result, deadline.
//!
//! A plugin is a foreign program. It gets an environment of its own, a process group of its own and nothing else of
//! ours; it gives back at most [`STDOUT_BYTES_MAX`] of JSON before its deadline, or its whole group is killed.
//! This module never looks into a configuration and never decides which plugin runs next.

use std::ffi::OsString;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout, timeout_at};

use crate::error::{Context, Error, Kind, Result};

/// More output than this is not a CNI result.
const STDOUT_BYTES_MAX: usize = 1 << 20;
/// What is kept of the plugin's log; the rest is read and dropped, so that the plugin does not block.
const STDERR_BYTES_MAX: usize = 64 << 10;
/// What an error quotes of a plugin's message or output.
const EXCERPT_CHARS_MAX: usize = 1024;
/// How long output may still come once the plugin has exited: a process it left behind may hold the pipe for ever.
const DRAIN_DEADLINE: Duration = Duration::from_secs(1);
/// How long a killed plugin may take to die before it is left to the runtime's reaper.
const REAP_DEADLINE: Duration = Duration::from_secs(5);
/// A plugin that is just being copied into place cannot be executed: wait for the writer, this often and this long.
const BUSY_RETRIES: u32 = 10;
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// What a plugin is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    Add,
    Check,
    Del,
    Gc,
    Status,
}

impl Verb {
    /// As it stands in `CNI_COMMAND`.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Verb::Add => "ADD",
            Verb::Check => "CHECK",
            Verb::Del => "DEL",
            Verb::Gc => "GC",
            Verb::Status => "STATUS",
        }
    }
}

/// The container's end of an attachment, as the environment tells it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target<'a> {
    pub(super) container_id: &'a str,
    /// Empty when the namespace is gone.
    pub(super) netns: &'a Path,
    pub(super) ifname: &'a str,
    pub(super) args: &'a str,
}

/// One run of one plugin.
#[derive(Debug)]
pub(super) struct Call<'a> {
    pub(super) verb: Verb,
    pub(super) network: &'a str,
    pub(super) plugin: &'a str,
    pub(super) dirs: &'a [PathBuf],
    /// None for verbs about the network as a whole: GC and STATUS.
    pub(super) target: Option<Target<'a>>,
    pub(super) stdin: Vec<u8>,
    pub(super) deadline: Instant,
}

/// Why a run failed; `code` is set if the plugin itself said so.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) code: Option<u64>,
    pub(super) error: Error,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure { code: None, error }
    }
}

/// Code 3 of the specification: the plugin does not know the container, so there is nothing to clean up.
pub(super) const CODE_UNKNOWN_CONTAINER: u64 = 3;

/// A plugin's type becomes a file name: only what can be nothing else is accepted.
pub(super) fn valid_type(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    !name.is_empty() && name.len() <= 255 && name.chars().all(plain) && name.chars().any(|c| c != '.')
}

/// Finds the executable of a plugin in the configured directories, and nowhere else.
pub(super) fn find(name: &str, dirs: &[PathBuf]) -> Result<PathBuf> {
    if !valid_type(name) {
        return Err(Error::precondition(format!("plugin type {name:?} is not a plain file name")));
    }
    for dir in dirs {
        let path = dir.join(name);
        let Ok(meta) = path.metadata() else { continue };
        let mode = meta.permissions().mode();
        if !meta.is_file() || mode & 0o111 == 0 {
            continue;
        }
        // The owner is not checked: many nodes carry plugins unpacked with a build user's id.
        if mode & 0o002 != 0 {
            let (path, uid) = (path.display(), meta.uid());
            return Err(Error::precondition(format!(
                "plugin {path} (owner {uid}) is writable by everybody: not run"
            )));
        }
        return Ok(path);
    }
    let dirs: Vec<_> = dirs.iter().map(|dir| dir.display().to_string()).collect();
    Err(Error::precondition(format!("plugin {name:?} is not installed in {}", dirs.join(", "))))
}

/// Runs the plugin and gives back what it printed.
pub(super) async fn run(call: Call<'_>) -> Result<Vec<u8>, Failure> {
    let label = format!("network {:?}: plugin {:?}: {}", call.network, call.plugin, call.verb.as_str());
    match run_unlabelled(call).await {
        Ok(stdout) => Ok(stdout),
        Err(Failure { code, error }) => Err(Failure { code, error: error.during(label) }),
    }
}

async fn run_unlabelled(call: Call<'_>) -> Result<Vec<u8>, Failure> {
    let path = find(call.plugin, call.dirs)?;
    let mut child = spawn(&path, &call).await?;
    // Declared after the child, so dropped before it: the group is killed before its leader can be reaped.
    let mut group = Group::of(&child);
    let mut stdout = Vec::new();
    let mut stderr = Vec::new();
    let talk = talk(&mut child, call.stdin, &mut stdout, &mut stderr);
    let status = match timeout_at(call.deadline, talk).await {
        Ok(Ok(status)) => {
            group.reaped();
            status
        }
        Ok(Err(error)) => {
            end(&mut child, &mut group).await;
            return Err(error.into());
        }
        Err(_) => {
            end(&mut child, &mut group).await;
            let message = format!("killed: not done before its deadline{}", said(&stderr));
            return Err(Error::new(Kind::DeadlineExceeded, message).into());
        }
    };
    if status.success() { Ok(stdout) } else { Err(failure(status, &stdout, &stderr)) }
}

async fn spawn(path: &Path, call: &Call<'_>) -> Result<Child> {
    let mut command = Command::new(path);
    command
        .env_clear()
        .envs(environment(call))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Its own group, so that what it starts (iptables, IPAM plugins) can be ended with it. Unlike a hook before
        // exec this keeps posix_spawn.
        .process_group(0)
        .kill_on_drop(true);
    let mut retries = BUSY_RETRIES;
    loop {
        match command.spawn() {
            Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy && retries > 0 => {
                retries -= 1;
                tokio::time::sleep(BUSY_PAUSE).await;
            }
            spawned => return spawned.context(Kind::Internal, || format!("start {}", path.display())),
        }
    }
}

fn environment(call: &Call<'_>) -> Vec<(&'static str, OsString)> {
    let dirs: Vec<_> = call.dirs.iter().map(|dir| dir.as_os_str().to_owned()).collect();
    let search = std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
    let mut vars = vec![
        ("PATH", search),
        ("CNI_COMMAND", call.verb.as_str().into()),
        ("CNI_PATH", dirs.join(std::ffi::OsStr::new(":"))),
    ];
    if let Some(target) = &call.target {
        vars.extend([
            ("CNI_CONTAINERID", target.container_id.into()),
            ("CNI_NETNS", target.netns.into()),
            ("CNI_IFNAME", target.ifname.into()),
            ("CNI_ARGS", target.args.into()),
        ]);
    }
    vars
}

/// Writes stdin and reads both outputs at once, until the plugin has exited and its output has ended.
async fn talk(
    child: &mut Child,
    stdin: Vec<u8>,
    stdout: &mut Vec<u8>,
    stderr: &mut Vec<u8>,
) -> Result<ExitStatus> {
    let (Some(mut to), Some(from), Some(log)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err(Error::internal("a pipe of the plugin is missing"));
    };
    let write = async move {
        // A plugin may exit without reading: its status says how it went, the broken pipe does not matter.
        let _ = to.write_all(&stdin).await;
    };
    let io = async {
        tokio::join!(
            write,
            read(from, stdout, STDOUT_BYTES_MAX, true),
            read(log, stderr, STDERR_BYTES_MAX, false)
        )
        .1
    };
    let mut io = pin!(io);
    let (status, output) = tokio::select! {
        // The output first: once it has ended or is too much, waiting is all that is left.
        biased;
        output = &mut io => {
            output?;
            return child.wait().await.context(Kind::Internal, || "wait for the plugin".to_owned());
        }
        status = child.wait() => {
            let status = status.context(Kind::Internal, || "wait for the plugin".to_owned())?;
            (status, timeout(DRAIN_DEADLINE, io).await.unwrap_or(Ok(())))
        }
    };
    output.map(|()| status)
}

/// Reads to the end. What exceeds the limit is an error, or is dropped.
async fn read(
    mut from: impl AsyncRead + Unpin,
    into: &mut Vec<u8>,
    bytes_max: usize,
    strict: bool,
) -> Result<()> {
    let mut chunk = vec![0; 8 << 10];
    loop {
        let n =
            from.read(&mut chunk).await.context(Kind::Internal, || "read the plugin's output".to_owned())?;
        if n == 0 {
            return Ok(());
        }
        let room = bytes_max - into.len();
        if strict && n > room {
            return Err(Error::internal(format!("printed more than {bytes_max} bytes: not a CNI result")));
        }
        into.extend_from_slice(&chunk[..n.min(room)]);
    }
}

/// Kills the group and takes the leader's exit.
async fn end(child: &mut Child, group: &mut Group) {
    if child.id().is_none() {
        group.reaped(); // the leader has exited and only its output was waited for
    }
    group.kill();
    if timeout(REAP_DEADLINE, child.wait()).await.is_err() {
        tracing::warn!(pid = child.id(), "a CNI plugin survives SIGKILL for now: it is stuck in the kernel");
    }
}

/// The plugin's process group, killed when dropped unless the leader was reaped: after that the number may be another's.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &Child) -> Group {
        Group(child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw))
    }

    fn reaped(&mut self) {
        self.0 = None;
    }

    fn kill(&mut self) {
        if let Some(pid) = self.0.take() {
            // It may be gone already, which is what we want.
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What a plugin prints when it fails.
#[derive(Deserialize)]
struct Reported {
    code: u64,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: String,
}

/// What the caller can do about a code of the specification. Never `NotFound`: for a pod, that means success.
fn kind_of(code: u64) -> Kind {
    match code {
        // Incompatible version, unsupported field, unknown container, invalid network configuration.
        1 | 2 | CODE_UNKNOWN_CONTAINER | 7 => Kind::FailedPrecondition,
        // Try again later; not available (50), and existing containers suffer too (51).
        11 | 50 | 51 => Kind::Unavailable,
        _ => Kind::Internal,
    }
}

fn failure(status: ExitStatus, stdout: &[u8], stderr: &[u8]) -> Failure {
    if let Ok(Reported { code, msg, details }) = serde_json::from_slice(stdout) {
        let details = if details.is_empty() { details } else { format!("; {details}") };
        let message = format!("{} (code {code})", excerpt(format!("{msg}{details}").as_bytes()));
        return Failure { code: Some(code), error: Error::new(kind_of(code), message) };
    }
    let how = match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "ended".to_owned(),
    };
    let printed = if stdout.is_empty() { String::new() } else { format!("; stdout: {}", excerpt(stdout)) };
    Error::internal(format!("{how} without a CNI error{printed}{}", said(stderr))).into()
}

fn said(stderr: &[u8]) -> String {
    if stderr.is_empty() { String::new() } else { format!("; stderr: {}", excerpt(stderr)) }
}

/// Foreign text made fit for one line of an error.
pub(super) fn excerpt(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(4 * EXCERPT_CHARS_MAX)]);
    let clean = text.trim().chars().map(|c| if c.is_control() { ' ' } else { c });
    let mut short: String = clean.take(EXCERPT_CHARS_MAX).collect();
    if text.trim().chars().nth(EXCERPT_CHARS_MAX).is_some() || bytes.len() > 4 * EXCERPT_CHARS_MAX {
        short.push('…');
    }
    short
}
