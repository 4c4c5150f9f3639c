//! Holds one pod: takes the lock, opens the socket, says ready, serves until the pod has ended.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use ocid_api::id::PodId;
use ocid_api::paths::{Dirs, PodPaths};
use rustix::fs::Mode;

use crate::error::{Context as _, Error, Result};
use crate::os::{self, Inheritance};
use crate::pod::Pod;
use crate::process::orphans;
use crate::{cgroup, lock, log, record, rpc};

/// How long a shim waits for the pod it was started for.
const CREATE_DEADLINE: Duration = Duration::from_secs(60);
/// How long the last answers may take to leave.
const FAREWELL_DEADLINE: Duration = Duration::from_secs(1);
/// What the kernel shall kill last, before the daemon.
const OOM_SCORE_ADJ: i32 = -998;

/// Serves the pod. Returns when it has ended.
///
/// # Errors
/// If it cannot begin; then nothing is left.
pub fn run(id: &PodId, dirs: &Dirs, cgroup: Option<&str>) -> Result<()> {
    let inheritance = Inheritance { oom_score_adj: Some(OOM_SCORE_ADJ), ..Inheritance::default() };
    os::reset_inherited(&inheritance).context(|| "reset what was inherited".to_owned())?;
    os::become_subreaper().context(|| "become a subreaper".to_owned())?;
    os::forbid_dumps().context(|| "forbid core dumps".to_owned())?;
    if let Some(Err(e)) = cgroup.map(cgroup::enter) {
        log::say(&format!("enter cgroup: {e}"));
    }
    let paths = dirs.pod(id);
    let (_lock, listener) = begin(&paths)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .context(|| "start the runtime".to_owned())
        .inspect_err(|_| leave_nothing(&paths))?;
    runtime.block_on(serve(Pod::new(id, paths), listener))
    // The lock ends with the process.
}

/// Takes the lock and binds the socket. Undoes itself, but never what belongs to a shim that holds the lock,
/// or to a pod that was there before.
fn begin(paths: &PodPaths) -> Result<(File, UnixListener)> {
    record::make_dir(paths.run_dir()).context(|| format!("make {}", paths.run_dir().display()))?;
    let lock = lock::take(paths)?.ok_or_else(|| Error::precondition("another shim holds this pod"))?;
    if paths.record().exists() {
        return Err(Error::precondition("this pod has a record already, of a shim that is gone"));
    }
    let listener = record::make_dir(paths.record_dir())
        .context(|| format!("make {}", paths.record_dir().display()))
        .and_then(|()| listen(paths))
        .inspect_err(|_| leave_nothing(paths))?;
    say_ready(paths).inspect_err(|_| leave_nothing(paths))?;
    Ok((lock, listener))
}

fn listen(paths: &PodPaths) -> Result<UnixListener> {
    let path = paths.socket();
    record::remove_file(&path).context(|| "remove an old socket".to_owned())?;
    let umask = rustix::process::umask(Mode::from_raw_mode(0o177));
    let bound = UnixListener::bind(&path);
    rustix::process::umask(umask);
    let listener = bound.context(|| format!("listen on {}", path.display()))?;
    listener.set_nonblocking(true).context(|| "listen".to_owned())?;
    Ok(listener)
}

/// Says ready, and lets go of the daemon's descriptors.
fn say_ready(paths: &PodPaths) -> Result<()> {
    let log = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(paths.log())
        .context(|| "open the shim's log".to_owned())?;
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .context(|| "open /dev/null".to_owned())?;
    rustix::io::write(io::stdout().as_fd(), b"1").context(|| "say ready".to_owned())?;
    rustix::stdio::dup2_stdin(&null).context(|| "redirect stdin".to_owned())?;
    rustix::stdio::dup2_stdout(&null).context(|| "redirect stdout".to_owned())?;
    rustix::stdio::dup2_stderr(&log).context(|| "redirect stderr".to_owned())
}

fn leave_nothing(paths: &PodPaths) {
    let _ = record::remove_dir(paths.record_dir());
    let _ = record::remove_dir(paths.run_dir());
}

async fn serve(pod: Pod, listener: UnixListener) -> Result<()> {
    let listener = tokio::net::UnixListener::from_std(listener).context(|| "listen".to_owned())?;
    let pod = Arc::new(pod);
    tokio::spawn(orphans::run());
    tokio::spawn(rpc::serve(Arc::clone(&pod), listener));
    tokio::spawn(give_up(Arc::clone(&pod)));
    let _ = pod.ended().wait_for(|ended| *ended).await;
    rpc::farewell(FAREWELL_DEADLINE).await;
    Ok(())
}

/// Ends a shim whose daemon never came.
async fn give_up(pod: Arc<Pod>) {
    tokio::time::sleep(CREATE_DEADLINE).await;
    if !pod.exists() {
        log::say("no pod was asked for");
        if let Err(e) = pod.end(crate::pod::Leave::Nothing).await {
            log::say(&e.to_string());
        }
    }
}
