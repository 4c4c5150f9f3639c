//! What can be done to pods and containers: the core of the daemon.
//!
//! ```text
//!            run                         stop                       remove
//!   nothing ─────▶ ready ─────────────────────────▶ stopped ─────────────────▶ nothing
//!      ▲  └─ fails: remove ─┘    a dead shim: ended ────▲
//!      └──────── a daemon that starts finds each pod where it was ──────
//! ```
//!
//! The truth about a pod is its shim's; what is here is a view, an order of things, and the work that needs images,
//! snapshots and networks. See `README.md` for the invariants.

mod container;
mod exec;
mod files;
mod handle;
mod index;
mod recover;
mod run;
mod teardown;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ocid_api::id::ContainerId;
use ocid_api::{record, shim as wire};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

pub use handle::{Container, Pod};

// What is asked of this module is answered in these words, so its users need not know whose they are.
pub use crate::oci::CgroupDriver;
pub use crate::shim::{ContainerPhase, ContainerState};

use crate::config;
use crate::error::{Error, Result};
use crate::host::{Host, RuntimeFeatures};
use crate::image::Images;
use crate::network::{self, Network};
use crate::oci::{NamespacePaths, Policy};
use crate::shim::Launcher;
use crate::snapshot::Overlay;
use crate::spec::{ContainerPid, ContainerSpec};
use index::Index;

/// What [`Pods`] works with.
#[derive(Debug)]
pub struct Parts {
    /// Starts shims.
    pub launcher: Arc<Launcher>,
    /// Attaches pods to networks.
    pub network: Arc<Network>,
    /// Names to images.
    pub images: Arc<Images>,
    /// Root filesystems.
    pub snapshots: Arc<Overlay>,
    /// What the machine can do.
    pub host: Host,
    /// The section of the configuration.
    pub config: config::Runtime,
    /// Who makes cgroups.
    pub cgroup_driver: CgroupDriver,
    /// The OCI runtimes that pods can name.
    pub handlers: BTreeMap<String, Handler>,
}

/// An OCI runtime that was found.
#[derive(Debug, Clone)]
pub struct Handler {
    /// Its binary, absolute.
    pub binary: PathBuf,
    /// What it can do.
    pub features: RuntimeFeatures,
}

/// All pods of a node.
#[derive(Debug)]
pub struct Pods {
    index: Index,
    launcher: Arc<Launcher>,
    network: Arc<Network>,
    images: Arc<Images>,
    snapshots: Arc<Overlay>,
    host: Host,
    config: config::Runtime,
    cgroup_driver: CgroupDriver,
    handlers: BTreeMap<String, Handler>,
    policy: Policy,
    /// How long to wait for a shim that is on record before saying that it does not answer.
    settle_deadline: Duration,
    /// Bounds the threads that look at paths of volumes: a dead file server holds each for ever.
    configuring: Arc<Semaphore>,
    tasks: TaskTracker,
}

/// How many containers are configured at a time.
const CONFIGURING_MAX: usize = 64;

impl Pods {
    /// No pods yet; see [`Pods::recover`].
    pub fn new(parts: Parts) -> Pods {
        let Parts { launcher, network, images, snapshots, host, config, cgroup_driver, handlers } = parts;
        let settle_deadline = launcher.deadlines().cleanup;
        Pods {
            index: Index::default(),
            launcher,
            network,
            images,
            snapshots,
            host,
            config,
            cgroup_driver,
            handlers,
            policy: Policy::default(),
            settle_deadline,
            configuring: Arc::new(Semaphore::new(CONFIGURING_MAX)),
            tasks: TaskTracker::new(),
        }
    }

    /// All pods, ordered by id, those on their way too.
    pub fn pods(&self) -> Vec<Arc<Pod>> {
        self.index.pods()
    }

    /// The pod of an id or of a unique beginning of one.
    ///
    /// # Errors
    /// `NotFound`; `InvalidArgument` if several match.
    pub fn pod(&self, text: &str) -> Result<Arc<Pod>> {
        self.index.pod(text)
    }

    /// The container of an id or of a unique beginning of one, and its pod.
    ///
    /// # Errors
    /// As [`Pods::pod`].
    pub fn container(&self, text: &str) -> Result<(Arc<Pod>, Arc<Container>)> {
        self.index.container(text)
    }

    /// What the runtime was given for a container; `None` where there is no bundle any more.
    pub fn runtime_config(&self, pod: &Pod, id: &ContainerId) -> Option<serde_json::Value> {
        let path = self.launcher.dirs().pod(pod.id()).container(id).config();
        serde_json::from_slice(&record::read(&path).ok()??).ok()
    }

    /// Whether pods can be attached to a network.
    pub fn network_status(&self) -> network::Status {
        self.network.status()
    }

    /// What an operator needs to see why pods get no network.
    pub fn network_info(&self) -> serde_json::Value {
        let (status, config) = (self.network.status(), self.network.config());
        serde_json::json!({
            "ready": status.ready,
            "message": status.message,
            "defaultNetwork": status.network,
            "broken": status.broken,
            "confDir": config.conf_dir,
            "pluginDirs": config.plugin_dirs,
        })
    }

    /// Takes the ranges of this node's pods, `address/bits` with commas between.
    ///
    /// # Errors
    /// If one is no range; the old ones stay then.
    pub fn set_pod_cidrs(&self, text: &str) -> Result<()> {
        self.network.set_pod_cidrs(text)
    }

    /// Waits for the work that recovery left in the background.
    pub async fn idle(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// The binary of a handler; the empty name is the default's.
    fn handler(&self, name: &str) -> Result<&Handler> {
        let name = if name.is_empty() { &self.config.default_handler } else { name };
        self.handlers.get(name).ok_or_else(|| {
            let known: Vec<_> = self.handlers.keys().map(String::as_str).collect();
            Error::invalid(format!("there is no runtime handler {name:?}; there are: {}", known.join(", ")))
        })
    }

    fn runtime_of(&self, pod: &Pod) -> Result<wire::Runtime> {
        let name = &pod.spec().runtime_handler;
        let binary = &self.handler(name)?.binary;
        let name = if name.is_empty() { &self.config.default_handler } else { name };
        Ok(wire::Runtime {
            binary: binary.to_string_lossy().into_owned(),
            root: self.launcher.dirs().state.join("runtime").join(name).to_string_lossy().into_owned(),
            systemd_cgroup: self.cgroup_driver == CgroupDriver::Systemd,
            timeout_ms: self.config.timeout_s * 1000,
            ..Default::default()
        })
    }

    /// The namespaces of the pod and of a targeted container, for a new container to join.
    fn namespaces(&self, pod: &Pod, spec: &ContainerSpec) -> Result<NamespacePaths> {
        let state = pod.shim()?.view().state;
        let path = |text: &str| (!text.is_empty()).then(|| PathBuf::from(text));
        let target_pid = match &spec.security.pid {
            ContainerPid::Target(target) => Some(self.target_pid(pod, target)?),
            _ => None,
        };
        Ok(NamespacePaths {
            net: path(&state.netns),
            ipc: path(&state.ipcns),
            uts: path(&state.utsns),
            pid: path(&state.pidns),
            user: None,
            target_pid,
        })
    }

    fn target_pid(&self, pod: &Pod, target: &str) -> Result<PathBuf> {
        let (owner, container) = self.container(target)?;
        if owner.id() != pod.id() {
            return Err(Error::invalid(format!("target container {target:?} is in another pod")));
        }
        let state = pod.container_state(container.id()).filter(|state| state.pid > 0);
        let state =
            state.ok_or_else(|| Error::precondition(format!("target container {target:?} does not run")))?;
        Ok(format!("/proc/{}/ns/pid", state.pid).into())
    }
}
