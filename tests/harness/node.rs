//! One node: a directory, a network and a cgroup of its own, a daemon that can be killed and started, and a client.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use ocid_api::cri::{ContainerConfig, PodSandboxConfig};
use ocid_api::id::PodId;
use ocid_api::paths::{Dirs, PodPaths};
use tempfile::TempDir;

use crate::client::{self, Client};
use crate::faults::Plugins;
use crate::image::{BUSYBOX, Built, Image};
use crate::leak::{self, Traces};
use crate::network::{Network, PLUGINS};
use crate::process;
use crate::registry::Registry;

/// How long a daemon may take to answer after its start.
const START_DEADLINE: Duration = Duration::from_secs(20);

/// How long a daemon may take to end after SIGTERM.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// How long all pods of a node may take to be removed.
const REMOVE_DEADLINE: Duration = Duration::from_secs(90);

/// How much of a log a failed test shows, in lines.
const LOG_LINES: usize = 200;

/// How a node differs from the usual one.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Puts [`BUSYBOX`] where the daemon imports it from at its start.
    pub busybox: bool,
    /// Writes a CNI configuration.
    pub cni: bool,
    /// Puts [`Plugins`] before the real ones.
    pub plugins: bool,
    /// Starts a registry, to which `registry.test` and `docker.io` lead.
    pub registry: bool,
    /// Starts the daemon; else the test does.
    pub start: bool,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup { busybox: true, cni: true, plugins: false, registry: false, start: true }
    }
}

/// See the module. Dropping it ends everything by force and judges nothing; [`test`] does both properly.
#[derive(Debug)]
pub struct Node {
    // Dropped first to last: what stands lower must outlive what stands higher.
    registry: Option<Registry>,
    plugins: Option<Plugins>,
    daemon: Mutex<Option<Child>>,
    client: Client,
    /// Its network.
    pub network: Network,
    /// The cgroup below which its pods are.
    pub cgroup: String,
    dirs: Dirs,
    zombies: BTreeSet<u32>,
    keep: Mutex<bool>,
    /// Where the state is, if that is somewhere else.
    _state_dir: Option<TempDir>,
    dir: TempDir,
}

/// Runs a test on a node of its own; see the crate.
pub fn test<F: AsyncFnOnce(&Node)>(setup: Setup, body: F) {
    assert!(rustix::process::geteuid().is_root(), "this ring makes namespaces and networks: run it as root");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let _inside = runtime.enter();
    let node = Node::new(&setup);
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        runtime.block_on(async {
            if setup.start {
                node.start().await;
            }
            body(&node).await;
            node.finish().await
        })
    }));
    match outcome {
        Ok(left) if left.is_empty() => {}
        Ok(left) => {
            node.explain();
            drop(node);
            panic!("left behind:\n  {}", left.join("\n  "));
        }
        Err(panic) => {
            node.explain();
            drop(node);
            resume_unwind(panic);
        }
    }
}

impl Node {
    /// Makes everything but starts nothing. Needs a tokio runtime around it.
    pub fn new(setup: &Setup) -> Node {
        let hex = PodId::generate().as_str()[..8].to_owned();
        let base = std::env::var_os("OCID_TEST_TMP").map_or_else(std::env::temp_dir, PathBuf::from);
        let directory = |base: PathBuf| {
            tempfile::Builder::new().prefix(&format!("oc-{hex}")).rand_bytes(0).tempdir_in(base).unwrap()
        };
        let dir = directory(base);
        let path = dir.path();
        // On a real node this is on /run: on a tmpfs.
        let state_dir = std::env::var_os("OCID_TEST_STATE").map(|base| directory(base.into()));
        // A shim's socket stands below the pod's id, and the kernel takes 107 bytes.
        assert!(
            path.as_os_str().len() <= 24,
            "{} is too long for sockets: set OCID_TEST_TMP",
            path.display()
        );
        let network = Network::new(path, &hex);
        if !setup.cni {
            fs::remove_file(network.conf_file()).unwrap();
        }
        let plugins = setup.plugins.then(|| Plugins::wrap(&path.join("cni")));
        let registry = setup.registry.then(|| Registry::start(&path.join("registry")));
        let state = state_dir.as_ref().map_or(path, TempDir::path).join("run");
        let dirs = Dirs { root: path.join("root"), state };
        let client = Client::new(&dirs.state.join("ocid.sock"));
        let node = Node {
            registry,
            plugins,
            daemon: Mutex::new(None),
            client,
            network,
            cgroup: format!("/ocid-test-{hex}"),
            dirs,
            zombies: leak::zombies(),
            keep: Mutex::new(false),
            _state_dir: state_dir,
            dir,
        };
        node.write_files(setup);
        node
    }

    fn write_files(&self, setup: &Setup) {
        for dir in [self.preload_dir(), self.certs_dir(), self.path().join("config.d"), self.log_dir()] {
            fs::create_dir_all(dir).unwrap();
        }
        fs::write(self.config_file(), self.config()).unwrap();
        if setup.busybox {
            busybox().write_archive(&self.preload_dir().join("busybox.tar"), &[BUSYBOX]);
        }
        if let Some(registry) = &self.registry {
            registry.serve_as(&self.certs_dir(), "registry.test");
            registry.serve_as(&self.certs_dir(), "docker.io");
        }
    }

    fn config(&self) -> String {
        let plugins = self.plugins.as_ref().map_or(Path::new(PLUGINS), |p| &p.dir);
        format!(
            "[network]\nconf_dir = {:?}\nplugin_dirs = [{plugins:?}]\n\n\
             [image]\ncerts_dir = {:?}\npreload_dir = {:?}\n\n\
             [runtime]\ncgroup_parent = {:?}\n\n\
             [shim]\ncgroup = \"{}-shims\"\n",
            self.network.conf_dir,
            self.certs_dir(),
            self.preload_dir(),
            self.cgroup,
            self.cgroup,
        )
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The daemon's two directories.
    pub fn dirs(&self) -> &Dirs {
        &self.dirs
    }

    /// The paths of one pod.
    pub fn pod_paths(&self, pod: &str) -> PodPaths {
        self.dirs.pod(&pod.parse().expect("the daemon gives well-formed ids"))
    }

    /// The daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.dirs.state.join("ocid.sock")
    }

    /// The configuration file; `config.d` beside it takes more.
    pub fn config_file(&self) -> PathBuf {
        self.path().join("config.toml")
    }

    /// Where registries' addresses are configured.
    pub fn certs_dir(&self) -> PathBuf {
        self.path().join("certs.d")
    }

    /// What the daemon imports at its start.
    pub fn preload_dir(&self) -> PathBuf {
        self.path().join("preload")
    }

    /// Below which pods made by [`Node::pod`] keep their logs.
    pub fn log_dir(&self) -> PathBuf {
        self.path().join("logs")
    }

    /// The client; clones of it may move into tasks.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The registry; only if the setup asked for one.
    pub fn registry(&self) -> &Registry {
        self.registry.as_ref().expect("Setup::registry was set")
    }

    /// The plugins that obey; only if the setup asked for them.
    pub fn plugins(&self) -> &Plugins {
        self.plugins.as_ref().expect("Setup::plugins was set")
    }

    /// A pod's configuration that logs into this node.
    pub fn pod(&self, name: &str) -> PodSandboxConfig {
        client::pod(name, &self.log_dir())
    }

    /// Runs a pod and one busybox container in it; returns the ids of both.
    pub async fn run(&self, name: &str, command: &[&str]) -> (String, String) {
        self.run_with(&self.pod(name), &client::container("main", BUSYBOX, command)).await
    }

    /// Runs a pod and one container in it; returns the ids of both.
    pub async fn run_with(&self, pod: &PodSandboxConfig, container: &ContainerConfig) -> (String, String) {
        let id = self.client.run_pod(pod).await.unwrap_or_else(|e| panic!("run pod: {e}"));
        let container = self.client.run(&id, container, pod).await.unwrap_or_else(|e| panic!("run: {e}"));
        (id, container)
    }

    /// The log of a container, as text.
    pub async fn log(&self, container: &str) -> String {
        let status = self.client.container_status(container).await.unwrap();
        fs::read_to_string(&status.log_path).unwrap_or_else(|e| panic!("{:?}: {e}", status.log_path))
    }

    /// A daemon's command line on this node, for calls that are expected to fail.
    pub fn command(&self) -> Command {
        let mut command = Command::new(binary("ocid"));
        command.arg("--config").arg(self.config_file());
        command.arg("--root").arg(&self.dirs.root).arg("--state").arg(&self.dirs.state);
        command.arg("--listen").arg(self.socket());
        command
    }

    /// Runs a second daemon that is expected to end at once; returns how it ended and what it said on stderr.
    pub fn run_to_end(&self, mut command: Command) -> (ExitStatus, String) {
        let said = self.path().join("second.log");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(&said).unwrap());
        let mut child = command.spawn().unwrap();
        let begun = Instant::now();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return (status, fs::read_to_string(said).unwrap());
            }
            if begun.elapsed() > STOP_DEADLINE {
                let _ = child.kill();
                let _ = child.wait();
                panic!("it runs on: {}", fs::read_to_string(said).unwrap());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Starts the daemon and returns at once.
    pub fn spawn(&self) {
        let log = OpenOptions::new().create(true).append(true).open(self.path().join("daemon.log")).unwrap();
        let mut command = self.command();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let child = command.spawn().unwrap_or_else(|e| panic!("start {:?}: {e}", command.get_program()));
        let before = self.daemon.lock().unwrap().replace(child);
        assert!(before.is_none(), "the daemon runs already");
    }

    /// Starts the daemon and waits until it answers; returns how long that took.
    pub async fn start(&self) -> Duration {
        let begun = Instant::now();
        self.spawn();
        loop {
            if let Some(status) = self.ended() {
                panic!("the daemon ended at its start: {status}");
            }
            match self.client.version().await {
                Ok(_) => return begun.elapsed(),
                Err(e) if begun.elapsed() > START_DEADLINE => panic!("the daemon does not answer: {e}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    }

    fn ended(&self) -> Option<ExitStatus> {
        self.daemon.lock().unwrap().as_mut().expect("the daemon was started").try_wait().unwrap()
    }

    /// The daemon's process id.
    pub fn daemon_pid(&self) -> u32 {
        self.daemon.lock().unwrap().as_ref().expect("the daemon runs").id()
    }

    /// Kills the daemon with SIGKILL; no effect if it does not run.
    pub fn kill(&self) {
        if let Some(mut child) = self.daemon.lock().unwrap().take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Ends the daemon with SIGTERM and returns how it ended.
    pub async fn stop(&self) -> ExitStatus {
        process::signal(self.daemon_pid(), Signal::SIGTERM);
        let begun = Instant::now();
        loop {
            if let Some(status) = self.ended() {
                *self.daemon.lock().unwrap() = None;
                return status;
            }
            assert!(begun.elapsed() < STOP_DEADLINE, "the daemon does not end after SIGTERM");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// SIGKILL and a new start; returns how long until the first answer.
    pub async fn restart(&self) -> Duration {
        self.kill();
        self.start().await
    }

    /// The shim of a pod, as its record tells.
    pub fn shim_pid(&self, pod: &str) -> u32 {
        let state = ocid_api::record::read_pod(&self.pod_paths(pod)).expect("a readable record");
        state.expect("the pod has a record").shim_pid
    }

    fn traces(&self) -> Traces<'_> {
        Traces {
            dir: self.path(),
            root: &self.dirs.root,
            state: &self.dirs.state,
            cgroup: &self.cgroup,
            network: &self.network,
            ids: self.client.seen(),
            zombies: &self.zombies,
        }
    }

    /// Removes all pods, ends the daemon, and returns what is still there.
    async fn finish(&self) -> Vec<String> {
        let mut left = Vec::new();
        let runs = self.daemon.lock().unwrap().is_some();
        let was_started = runs || self.path().join("daemon.log").exists();
        if was_started {
            if runs && let Some(status) = self.ended() {
                left.push(format!("the daemon ended by itself: {status}"));
                *self.daemon.lock().unwrap() = None;
            }
            if self.daemon.lock().unwrap().is_none() {
                self.start().await;
            }
            if let Err(why) = self.client.remove_all(REMOVE_DEADLINE).await {
                left.push(format!("pods could not be removed: {why}"));
            }
            let status = self.stop().await;
            if !status.success() {
                left.push(format!("the daemon ended badly: {status}"));
            }
        }
        if let Some(registry) = &self.registry {
            registry.stop();
        }
        let begun = Instant::now();
        let first = self.traces().scan();
        loop {
            let mut found = self.traces().scan();
            // Init adopts zombies of others all the time: one of ours is there from the beginning and stays.
            found.retain(|line| !line.starts_with("zombie") || first.contains(line));
            if found.is_empty() || begun.elapsed() > leak::GRACE {
                left.extend(found);
                return left;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Shows what the daemon and the shims said. `OCID_TEST_KEEP=1` also keeps the directory.
    fn explain(&self) {
        *self.keep.lock().unwrap() = std::env::var_os("OCID_TEST_KEEP").is_some();
        show(&self.path().join("daemon.log"));
        for pod in fs::read_dir(self.dirs.runs()).into_iter().flatten().flatten() {
            show(&pod.path().join("log"));
        }
        if let Some(registry) = &self.registry {
            eprintln!("--- registry\n{}", tail(&registry.log()));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Also runs while a test panics, perhaps with the lock held: nothing here may panic again.
        if let Some(mut child) = self.daemon.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take()
        {
            let _ = child.kill();
            let _ = child.wait();
        }
        self.registry = None;
        self.traces().sweep();
        if *self.keep.lock().unwrap_or_else(std::sync::PoisonError::into_inner) {
            eprintln!("kept: {}", self.path().display());
            self.dir.disable_cleanup(true);
        }
    }
}

fn show(log: &Path) {
    if let Ok(text) = fs::read_to_string(log) {
        eprintln!("--- {}\n{}", log.display(), tail(&text));
    }
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}

/// The busybox image, built once per process.
pub fn busybox() -> &'static Built {
    static BUILT: OnceLock<Built> = OnceLock::new();
    BUILT.get_or_init(|| Image::busybox().build())
}

/// A binary of this workspace: in `OCID_BIN_DIR`, or where cargo puts it for the profile of this test.
pub fn binary(name: &str) -> PathBuf {
    let dir = std::env::var_os("OCID_BIN_DIR").map_or_else(
        || {
            let test = std::env::current_exe().expect("a test knows its binary");
            test.ancestors().nth(2).expect("target/<profile>/deps/test").to_owned()
        },
        PathBuf::from,
    );
    let path = dir.join(name);
    assert!(path.exists(), "{} is not built: scripts/test builds it", path.display());
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_was_never_started_leaves_nothing_and_a_planted_leak_is_found() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _inside = runtime.enter();
        let node = Node::new(&Setup { busybox: false, ..Setup::default() });
        assert_eq!(runtime.block_on(node.finish()), Vec::<String>::new());

        let reserved = node.network.reservations.join(&node.network.name);
        fs::create_dir_all(&reserved).unwrap();
        fs::write(reserved.join(format!("{}7", node.network.prefix)), "x").unwrap();
        fs::create_dir_all(node.dirs.records().join("orphan")).unwrap();
        let mut orphan = Command::new("sleep").arg("100").current_dir(node.path()).spawn().unwrap();
        let freezer = PathBuf::from(format!("/sys/fs/cgroup/freezer{}/sub", node.cgroup));
        let has_freezer = fs::create_dir_all(&freezer).is_ok();
        let point = node.path().join("logs");
        rustix::mount::mount_bind(&point, &point).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(node.path().join("s")).unwrap();

        let found = node.traces().scan();
        let kinds = ["reserved address", "file", "process", "mount", "socket"];
        for kind in kinds.into_iter().chain(has_freezer.then_some("cgroup")) {
            assert!(found.iter().any(|line| line.starts_with(kind)), "{kind} is not among {found:#?}");
        }
        let path = node.path().to_owned();
        drop(node);
        let _ = orphan.wait();
        assert!(!path.exists() && !freezer.exists(), "the sweep left something");
    }
}
