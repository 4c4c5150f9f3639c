//! The composition: builds every part in the order in which they need each other, recovers, serves, and drains.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener as Listener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ocid_api::paths::Dirs;
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use tokio::net::UnixListener;
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::task::AbortOnDropHandle;

use crate::config::{self, Config};
use crate::cri::{self, ImageApi, RuntimeApi};
use crate::error::{Context, Error, Kind, Result};
use crate::host::{Host, RuntimeFeatures};
use crate::image::Images;
use crate::network::Network;
use crate::oci::CgroupDriver;
use crate::os;
use crate::pod::{Handler, Parts, Pods};
use crate::shim::{Deadlines, Launcher};
use crate::snapshot::Overlay;
use crate::stats::Stats;

/// How long a runtime may take to say what it can do.
const PROBE_DEADLINE: Duration = Duration::from_secs(5);
/// How long to wait for the lock of a daemon that is going.
const LOCK_DEADLINE: Duration = Duration::from_secs(2);
const LOCK_PAUSE: Duration = Duration::from_millis(10);
/// Permissions of the CRI socket: root and its group.
const SOCKET_MODE: u32 = 0o660;

/// A daemon that has recovered and is about to serve.
pub struct Daemon {
    config: Config,
    pods: Arc<Pods>,
    images: Arc<Images>,
    runtime_api: RuntimeApi,
    listener: UnixListener,
    _sweeper: AbortOnDropHandle<()>,
    /// Held as long as we live: one daemon per state directory.
    _lock: File,
}

impl Daemon {
    /// Builds every part and reads the records.
    ///
    /// # Errors
    /// If the machine lacks something without which nothing can run, or another daemon uses the same directories.
    pub async fn build(config: Config) -> Result<Daemon> {
        let begun = Instant::now();
        let dirs = Dirs { root: config.node.root.clone(), state: config.node.state.clone() };
        // The state directory is passed through by those who hold a socket in it; what is in it is private by itself.
        private_dir(&dirs.state, 0o711)?;
        private_dir(&dirs.root, 0o700)?;
        let lock = lock(&dirs.state).await?;
        // First of all, so that nothing we run inherits it.
        let passed =
            os::passed_listener().context(Kind::Internal, || "take the listener from systemd".into())?;
        let host = Host::probe()?;
        let cgroup_driver = match config.runtime.cgroup_driver.as_str() {
            "systemd" => CgroupDriver::Systemd,
            "cgroupfs" => CgroupDriver::Cgroupfs,
            _ if host.systemd => CgroupDriver::Systemd,
            _ => CgroupDriver::Cgroupfs,
        };
        let handlers = handlers(&config).await?;
        let snapshots = Arc::new(Overlay::open(&dirs.root.join("snapshots"))?);
        let images = Arc::new(Images::open(&dirs.root, &config.image, Arc::clone(&snapshots))?);
        let network = Arc::new(Network::new(config.network.clone()));
        let stats = Arc::new(Stats::new(host.cgroup, Arc::clone(&snapshots)));
        let shim = shim_binary(&config)?;
        let launcher =
            Arc::new(Launcher::new(shim, dirs.clone(), config.shim.cgroup.clone(), deadlines(&config)));
        let mut listed = handlers.clone();
        if let Some(default) = handlers.get(&config.runtime.default_handler) {
            listed.insert(String::new(), default.clone());
        }
        let pods = Arc::new(Pods::new(Parts {
            launcher,
            network,
            images: Arc::clone(&images),
            snapshots,
            host,
            config: config.runtime.clone(),
            cgroup_driver,
            handlers,
        }));
        pods.recover()?;
        // task: deletes the layers of containers that have gone; ends with the daemon.
        let sweeper = AbortOnDropHandle::new(tokio::spawn(Arc::clone(&images).sweep_released()));
        // Before anybody can ask for an image: a node that reaches no registry has these and no others.
        images.preload().await;
        tracing::info!(pods = pods.pods().len(), took = ?begun.elapsed(), "recovered");
        let runtime_api = RuntimeApi {
            pods: Arc::clone(&pods),
            stats,
            cgroup_driver,
            handlers: listed,
            config: serde_json::to_value(&config)
                .context(Kind::Internal, || "encode the configuration".into())?,
            snapshots_dir: dirs.root.join("snapshots").to_string_lossy().into_owned(),
        };
        let listener = listener(&config.node.listen, passed)?;
        Ok(Daemon { config, pods, images, runtime_api, listener, _sweeper: sweeper, _lock: lock })
    }

    /// Serves until SIGTERM or SIGINT; then finishes the calls under way. Pods run on.
    ///
    /// # Errors
    /// If serving fails as a whole.
    pub async fn run(self) -> Result<()> {
        let mut terminate =
            signal(SignalKind::terminate()).context(Kind::Internal, || "catch SIGTERM".into())?;
        let mut interrupt =
            signal(SignalKind::interrupt()).context(Kind::Internal, || "catch SIGINT".into())?;
        notify(&[sd_notify::NotifyState::Ready]);
        tracing::info!(socket = %self.config.node.listen.display(), "serving");
        let stop = async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            notify(&[sd_notify::NotifyState::Stopping]);
            tracing::info!("stopping; pods run on");
        };
        let grace = Duration::from_secs(self.config.node.shutdown_grace_s);
        let image_api = ImageApi { images: self.images };
        let served = cri::serve(self.listener, self.runtime_api, image_api, stop, grace).await;
        if tokio::time::timeout(grace, self.pods.idle()).await.is_err() {
            tracing::warn!("stopping before all that was half made is removed; the next start goes on");
        }
        served
    }
}

/// How long calls to a shim may take.
fn deadlines(config: &Config) -> Deadlines {
    Deadlines {
        call: Duration::from_secs(config.shim.call_timeout_s),
        runtime: Duration::from_secs(config.runtime.timeout_s),
        start: Duration::from_secs(config.shim.start_timeout_s),
        cleanup: Duration::from_secs(config.shim.cleanup_timeout_s),
    }
}

/// Makes a directory of our own with these permissions, or gives an existing one these.
fn private_dir(dir: &Path, mode: u32) -> Result<()> {
    let what = || format!("make {}", dir.display());
    DirBuilder::new().recursive(true).mode(mode).create(dir).context(Kind::Internal, what)?;
    fs::set_permissions(dir, Permissions::from_mode(mode)).context(Kind::Internal, what)
}

/// Refuses to run beside another daemon on the same state.
async fn lock(state: &Path) -> Result<File> {
    let path = state.join("daemon.lock");
    let what = || format!("lock {}", path.display());
    // Nobody else may open it: who can read a file can lock it, and keep us from starting.
    let file = File::options().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = file.context(Kind::Internal, what)?;
    file.set_permissions(Permissions::from_mode(0o600)).context(Kind::Internal, what)?;
    let begun = Instant::now();
    loop {
        match rustix::fs::flock(file.as_fd(), FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            // A daemon that was just killed holds its files until the kernel has ended all of it.
            Err(Errno::WOULDBLOCK) if begun.elapsed() < LOCK_DEADLINE => tokio::time::sleep(LOCK_PAUSE).await,
            Err(Errno::WOULDBLOCK) => {
                return Err(Error::precondition(format!(
                    "another ocid serves {}: stop it, or give this one other directories with --state and --root",
                    state.display()
                )));
            }
            Err(error) => return Err(Error::with_source(Kind::Internal, what(), error)),
        }
    }
}

/// The socket that systemd passed, or a new one.
fn listener(path: &Path, passed: Option<Listener>) -> Result<UnixListener> {
    let what = || format!("listen on {}", path.display());
    if let Some(listener) = passed {
        listener.set_nonblocking(true).context(Kind::Internal, what)?;
        return UnixListener::from_std(listener).context(Kind::Internal, what);
    }
    remove_dead_socket(path).map_err(|e| e.during(what()))?;
    // To connect is to write, and the umask that we began with gives that to the owner alone: there is no moment at
    // which others could connect.
    let listener = UnixListener::bind(path).context(Kind::Internal, what)?;
    fs::set_permissions(path, Permissions::from_mode(SOCKET_MODE)).context(Kind::Internal, what)?;
    Ok(listener)
}

/// Makes room for a socket. Takes nothing away that is somebody's: not a file, and not a socket that is served.
fn remove_dead_socket(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::with_source(Kind::Internal, "look at what is there", e)),
        Ok(there) if !there.file_type().is_socket() => {
            return Err(Error::precondition("something that is no socket is there"));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(Error::precondition("another process listens there")),
        Err(_) => fs::remove_file(path).context(Kind::Internal, || "remove a dead socket".into()),
    }
}

fn shim_binary(config: &Config) -> Result<PathBuf> {
    if !config.shim.path.as_os_str().is_empty() {
        return find(&config.shim.path);
    }
    let own = std::env::current_exe().context(Kind::Internal, || "find our own binary".into())?;
    let beside = own.with_file_name("ocid-shim");
    if beside.is_file() { Ok(beside) } else { find(Path::new("ocid-shim")) }
}

/// The absolute path of a binary, looked up in PATH if it has no slash.
fn find(binary: &Path) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let candidates: Vec<PathBuf> = if binary.components().count() > 1 {
        vec![binary.to_owned()]
    } else {
        std::env::split_paths(&path).map(|dir| dir.join(binary)).collect()
    };
    let found =
        candidates.into_iter().find(|candidate| candidate.is_file()).and_then(|c| fs::canonicalize(c).ok());
    found.ok_or_else(|| Error::precondition(format!("{} is not installed", binary.display())))
}

/// Finds the OCI runtimes and asks what they can do. Only the default one must be there.
async fn handlers(config: &Config) -> Result<BTreeMap<String, Handler>> {
    let mut found = BTreeMap::new();
    for (name, handler) in &config.handlers {
        match probe(handler).await {
            Ok(handler) => {
                let advisories = handler.features.advisories().join(" ");
                if !advisories.is_empty() {
                    let (runtime, version) = (handler.binary.display(), &handler.features.version);
                    tracing::warn!(handler = name, %runtime, version, advisories, "this runtime has known ways out of containers; update it");
                }
                found.insert(name.clone(), handler);
            }
            Err(error) if *name == config.runtime.default_handler => {
                return Err(error.during(format!("runtime handler {name:?}, which is the default")));
            }
            Err(error) => tracing::warn!(handler = name, %error, "runtime handler left out"),
        }
    }
    Ok(found)
}

async fn probe(handler: &config::Handler) -> Result<Handler> {
    let binary = find(&handler.path)?;
    let (features, version) = tokio::try_join!(output(&binary, "features"), output(&binary, "--version"))?;
    Ok(Handler { features: RuntimeFeatures::parse(&features, &String::from_utf8_lossy(&version))?, binary })
}

/// What a runtime prints; nothing if it does not know the command.
async fn output(binary: &Path, argument: &str) -> Result<Vec<u8>> {
    let what = || format!("run {} {argument}", binary.display());
    let run = Command::new(binary).arg(argument).kill_on_drop(true).output();
    let output = tokio::time::timeout(PROBE_DEADLINE, run)
        .await
        .map_err(|_| Error::new(Kind::DeadlineExceeded, what()))?
        .context(Kind::Internal, what)?;
    Ok(if output.status.success() { output.stdout } else { Vec::new() })
}

/// Tells systemd, if it listens.
fn notify(state: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "systemd was not told");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_socket_that_nobody_serves_is_taken_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        remove_dead_socket(&path).unwrap();
        fs::write(&path, "precious").unwrap();
        assert_eq!(remove_dead_socket(&path).unwrap_err().kind(), Kind::FailedPrecondition);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        fs::remove_file(&path).unwrap();
        let served = Listener::bind(&path).unwrap();
        assert_eq!(remove_dead_socket(&path).unwrap_err().kind(), Kind::FailedPrecondition);
        drop(served);
        remove_dead_socket(&path).unwrap();
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn the_lock_is_exclusive_and_nobody_else_can_open_it() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("daemon.lock"), "").unwrap();
        let held = lock(dir.path()).await.unwrap();
        assert_eq!(held.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(lock(dir.path()).await.unwrap_err().kind(), Kind::FailedPrecondition);
    }
}
