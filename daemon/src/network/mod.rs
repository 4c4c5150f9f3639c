//! Attach a pod's network namespace to a network, through CNI.
//!
//! ```text
//! intent ──▶ (recorded by the caller) ──▶ attach ──▶ check … ──▶ detach      detach may follow anything, any number of times
//! ```
//!
//! An [`Intent`] holds the network as it was configured when the pod was asked for, so an attachment can be ended after
//! any crash and after the configuration has changed. Nothing is kept here between calls but the lists read from disk
//! and what was last found out about the default network: what has to survive is the caller's.
//!
//! Never undoes anything on its own: after a failed [`attach`](Network::attach) the caller calls
//! [`detach`](Network::detach), as after a successful one. Never brings up the loopback interface, which needs no plugin.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Map, Value, json};
use tokio::sync::RwLock;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

mod conf;
mod intent;
mod orphans;
mod plugin;
mod result;

use conf::{List, Loaded, Plugin, Version};
pub use intent::{Intent, PortMapping, Protocol, Request};
use plugin::{CODE_UNKNOWN_CONTAINER, Call, Failure, Target, Verb};
pub use result::{Attachment, Dns};

use crate::error::{Error, Kind, Result};
use crate::section;

/// The default network is asked for its health at most this often, and only while somebody wants to know.
const PROBE_INTERVAL: Duration = Duration::from_secs(10);
/// How long plugins that another daemon left running may go on.
const ORPHAN_PATIENCE: Duration = Duration::from_secs(30);
/// The reason that kubelet and its users know.
const NOT_READY: &str = "NetworkPluginNotReady";

section! {
    /// How pods are attached to networks.
    pub struct Config {
        /// Where networks are configured: `*.conflist`, `*.conf` and `*.json`, in the order of their names. It may
        /// appear later.
        conf_dir: PathBuf = "/etc/cni/net.d".into(),
        /// Where plugins are installed; the first directory that has one counts.
        plugin_dirs: Vec<PathBuf> = vec!["/usr/lib/cni".into(), "/opt/cni/bin".into()],
        /// The name of the network that pods are attached to. Unset: the first usable one.
        default_network: Option<String> = None,
        /// How long all plugins of a network together may take to attach a pod, in seconds. Kubelet gives up on a pod
        /// after 240.
        add_timeout_s: u64 = 60,
        /// How long all plugins of a network together may take to detach a pod, in seconds. Kubelet gives up after 120.
        del_timeout_s: u64 = 60,
        /// How long all plugins of a network together may take to check an attachment, in seconds.
        check_timeout_s: u64 = 30,
        /// How long all plugins of a network together may take to collect what no pod uses, in seconds.
        gc_timeout_s: u64 = 60,
        /// How long all plugins of a network together may take to say whether they work, in seconds; nobody waits for it.
        status_timeout_s: u64 = 5,
    }
}

/// Whether pods can be attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// CRI's `NetworkReady`.
    pub ready: bool,
    /// One word for the condition; empty when ready.
    pub reason: &'static str,
    /// The same for a person; empty when ready.
    pub message: String,
    /// The network that pods would be attached to.
    pub network: Option<String>,
    /// Files that were skipped, and why.
    pub broken: Vec<String>,
}

/// What a collection did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gc {
    /// The plugins of this network have collected.
    Done(String),
    /// Nothing was done, for this reason.
    Skipped(String),
}

/// See the module.
#[derive(Debug)]
pub struct Network {
    inner: Arc<Inner>,
    /// Shared by those who attach; a collection has it alone, for it would take apart what it was not told of.
    gate: Arc<RwLock<()>>,
    /// What kubelet said last about this node's ranges. Not kept across restarts: it says so again.
    pod_cidrs: Mutex<Vec<String>>,
    /// The background check of the default network, while it runs; ends with us.
    probe: Mutex<Option<AbortOnDropHandle<()>>>,
    _watch: AbortOnDropHandle<()>,
}

struct Inner {
    config: Config,
    loaded: Mutex<Arc<Loaded>>,
    /// Held while the directory is read, so that an older reading never replaces a newer one.
    reading: Mutex<()>,
    health: Mutex<Health>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("config", &self.config).finish_non_exhaustive()
    }
}

/// What the last probe found, and about which list: another list begins with a clean record.
#[derive(Default)]
struct Health {
    begun: Option<Instant>,
    found: Option<(Arc<List>, Result<(), String>)>,
}

impl Network {
    /// Reads the configuration and follows its changes for as long as the value lives. Needs a runtime.
    #[must_use]
    pub fn new(config: Config) -> Network {
        let loaded = Loaded::load(&config.conf_dir);
        report(&config, &loaded);
        let inner = Arc::new(Inner {
            config,
            loaded: Mutex::new(Arc::new(loaded)),
            reading: Mutex::default(),
            health: Mutex::default(),
        });
        let watch = AbortOnDropHandle::new(tokio::spawn(watch(inner.clone())));
        Network {
            inner,
            gate: Arc::default(),
            pod_cidrs: Mutex::default(),
            probe: Mutex::default(),
            _watch: watch,
        }
    }

    /// Whether pods can be attached. Answers from memory; may begin a check in the background, for later answers.
    #[must_use]
    pub fn status(&self) -> Status {
        let loaded = self.inner.loaded();
        let (list, problem) = match self.inner.choose(&loaded) {
            Ok(list) => (Some(list.clone()), self.inner.known_problem(list)),
            Err(problem) => (None, Some(problem)),
        };
        self.probe(list.as_ref());
        Status {
            ready: problem.is_none(),
            reason: if problem.is_none() { "" } else { NOT_READY },
            message: problem.unwrap_or_default(),
            network: list.map(|list| list.name.clone()),
            broken: loaded.broken.clone(),
        }
    }

    /// Takes the ranges of this node's pods, `address/bits` with commas between, for networks that want to be told.
    ///
    /// # Errors
    /// If one is no range; the old ones stay then.
    pub fn set_pod_cidrs(&self, text: &str) -> Result<()> {
        let cidrs: Vec<String> =
            text.split(',').map(str::trim).filter(|cidr| !cidr.is_empty()).map(str::to_owned).collect();
        for cidr in &cidrs {
            intent::range(cidr)?;
        }
        *lock(&self.pod_cidrs) = cidrs;
        Ok(())
    }

    /// The ranges of this node's pods; empty as long as nobody has said.
    pub fn pod_cidrs(&self) -> Vec<String> {
        lock(&self.pod_cidrs).clone()
    }

    /// Where networks are configured, and where their plugins are.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// Chooses the network for a pod and freezes all that its life in it will need. Looks at the files' times, so that
    /// a network configured a moment ago is found; that costs a few system calls and no waiting for plugins.
    ///
    /// # Errors
    /// `InvalidArgument` if plugins cannot be told of such a pod; `Unavailable` if there is no network to attach it to.
    pub fn intent(&self, request: &Request) -> Result<Intent> {
        self.inner.refresh();
        let loaded = self.inner.loaded();
        let list = self.inner.choose(&loaded).map_err(|problem| Error::new(Kind::Unavailable, problem))?;
        Intent::new(request, list, &self.inner.config.plugin_dirs)
    }

    /// Attaches. On failure something may be attached: the caller detaches.
    ///
    /// # Errors
    /// Those of the first plugin that fails; `Internal` if the pod got no address.
    pub async fn attach(&self, intent: &Intent) -> Result<Attachment> {
        let list = intent.list()?;
        let _not_collecting = self.gate.read().await;
        let deadline = after(self.inner.config.add_timeout_s);
        let mut result: Option<Value> = None;
        for plugin in &list.plugins {
            let stdout =
                run(Verb::Add, &list, plugin, intent, intent.netns(), result.as_ref(), deadline).await;
            let decoded = result::decode(&stdout.map_err(|failure| failure.error)?, list.version);
            result = Some(decoded.map_err(|e| e.during(label(&list, plugin, Verb::Add)))?);
        }
        let result = result.ok_or_else(|| Error::internal("a network without plugins"))?;
        result::attachment(result, intent.ifname()).map_err(|e| e.during(format!("network {:?}", list.name)))
    }

    /// Asks the plugins whether the attachment is still whole. Networks older than CNI 0.4.0, and those that say so,
    /// cannot tell and pass.
    ///
    /// # Errors
    /// Those of the first plugin that objects.
    pub async fn check(&self, intent: &Intent, attachment: &Attachment) -> Result<()> {
        let list = intent.list()?;
        if list.version < Version::V0_4_0 || list.disable_check {
            return Ok(());
        }
        let deadline = after(self.inner.config.check_timeout_s);
        for plugin in &list.plugins {
            let previous = Some(&attachment.result);
            let checked = run(Verb::Check, &list, plugin, intent, intent.netns(), previous, deadline).await;
            checked.map_err(|failure| failure.error)?;
        }
        Ok(())
    }

    /// Waits for what a daemon before this one left running for this attachment, and in the end kills it: to be called
    /// before [`Network::detach`] of a pod that this daemon did not attach itself.
    pub async fn end_orphans(&self, intent: &Intent) {
        let container_id = intent.container_id().to_owned();
        // It looks at every process of the machine. Only a panic could make it fail, and DEL is worth trying even then.
        let _ = tokio::task::spawn_blocking(move || orphans::end(&container_id, ORPHAN_PATIENCE)).await;
    }

    /// Detaches. May be repeated, and works without the namespace, without a result and after a partial attach. Every
    /// plugin is asked, even when another fails.
    ///
    /// # Errors
    /// Those of all plugins that failed: call again later.
    pub async fn detach(&self, intent: &Intent, attachment: Option<&Attachment>) -> Result<()> {
        let list = intent.list()?;
        let previous =
            attachment.map(|attachment| &attachment.result).filter(|_| list.version >= Version::V0_4_0);
        let netns = if is_netns(intent.netns()) { intent.netns() } else { Path::new("") };
        let deadline = after(self.inner.config.del_timeout_s);
        let mut errors = Vec::new();
        for (before, plugin) in list.plugins.iter().enumerate().rev() {
            // A fair share of what is left: one that hangs must not take the others' time.
            let left = u32::try_from(before).unwrap_or(u32::MAX).saturating_add(1);
            let now = Instant::now();
            let deadline = now + deadline.saturating_duration_since(now) / left;
            match run(Verb::Del, &list, plugin, intent, netns, previous, deadline).await {
                Ok(_) | Err(Failure { code: Some(CODE_UNKNOWN_CONTAINER), .. }) => {}
                Err(failure) => errors.push(failure.error),
            }
        }
        joined(errors)
    }

    /// Lets the default network collect what belongs to no live attachment (container id, interface name). Only CNI
    /// 1.1.0 and newer can. `live` must hold every recorded intent, attached or not: what is missing from it is taken
    /// apart. From this call on until the future has ended, pods wait with their attachment. The time for it is the
    /// start, before requests are served.
    ///
    /// # Errors
    /// `FailedPrecondition` if a pod is being attached. Those of all plugins that failed; the others have collected.
    pub fn gc(&self, live: &[(String, String)]) -> impl Future<Output = Result<Gc>> + Send + use<> {
        let alone = Arc::clone(&self.gate).try_write_owned();
        let (inner, live) = (self.inner.clone(), live.to_vec());
        async move {
            let _alone = alone.map_err(|_| Error::precondition("a pod is being attached"))?;
            inner.gc(&live).await
        }
    }

    /// Begins a background check if one is due.
    fn probe(&self, list: Option<&Arc<List>>) {
        let mut running = lock(&self.probe);
        if running.as_ref().is_some_and(|task| !task.is_finished()) || !self.inner.probe_is_due(list) {
            return;
        }
        let inner = self.inner.clone();
        *running = Some(AbortOnDropHandle::new(tokio::spawn(async move { inner.probe().await })));
    }
}

impl Inner {
    async fn gc(&self, live: &[(String, String)]) -> Result<Gc> {
        let loaded = self.loaded();
        let list = match self.choose(&loaded) {
            Ok(list) => list,
            Err(problem) => return Ok(Gc::Skipped(problem)),
        };
        if list.version < Version::V1_1_0 {
            return Ok(Gc::Skipped(format!(
                "network {:?} speaks CNI {}, which has no GC",
                list.name, list.version
            )));
        }
        if list.disable_gc {
            return Ok(Gc::Skipped(format!("network {:?} disables GC", list.name)));
        }
        let live: Vec<_> =
            live.iter().map(|(id, ifname)| json!({ "containerID": id, "ifname": ifname })).collect();
        let extra = Map::from_iter([("cni.dev/valid-attachments".to_owned(), Value::from(live))]);
        let deadline = after(self.config.gc_timeout_s);
        let errors = self.run_all(Verb::Gc, list, &extra, deadline).await;
        joined(errors).map(|()| Gc::Done(list.name.clone()))
    }

    fn loaded(&self) -> Arc<Loaded> {
        lock(&self.loaded).clone()
    }

    /// Reads the configuration again if it may have changed.
    fn refresh(&self) {
        let _reading = lock(&self.reading);
        let old = self.loaded();
        if let Some(new) = old.reload(&self.config.conf_dir) {
            if !new.same(&old) {
                report(&self.config, &new);
            }
            *lock(&self.loaded) = Arc::new(new);
        }
    }

    /// The network that pods are attached to, or why there is none.
    fn choose<'a>(&self, loaded: &'a Loaded) -> Result<&'a Arc<List>, String> {
        let dir = self.config.conf_dir.display();
        let (found, problem) = match &self.config.default_network {
            None => (loaded.lists.first(), format!("no network configuration found in {dir}")),
            Some(name) => {
                let named = loaded.lists.iter().find(|list| list.name == *name);
                (named, format!("no configuration of the network {name:?} found in {dir}"))
            }
        };
        found.ok_or_else(|| match loaded.broken.as_slice() {
            [] => problem,
            [first, ..] => format!("{problem}; {} unusable, the first: {first}", loaded.broken.len()),
        })
    }

    fn known_problem(&self, list: &List) -> Option<String> {
        match &lock(&self.health).found {
            Some((about, Err(problem))) if **about == *list => Some(problem.clone()),
            _ => None,
        }
    }

    /// Takes the turn if it is time.
    fn probe_is_due(&self, list: Option<&Arc<List>>) -> bool {
        let mut health = lock(&self.health);
        let known = list.is_none_or(|list| health.found.as_ref().is_some_and(|(about, _)| about == list));
        if known && health.begun.is_some_and(|begun| begun.elapsed() < PROBE_INTERVAL) {
            return false;
        }
        health.begun = Some(Instant::now());
        true
    }

    /// Looks whether the plugins are there, and asks those that can say whether they work.
    async fn probe(self: Arc<Self>) {
        self.clone().refresh_aside().await;
        let loaded = self.loaded();
        let Ok(list) = self.choose(&loaded) else { return };
        let missing =
            list.plugins.iter().find_map(|plugin| plugin::find(&plugin.name, &self.config.plugin_dirs).err());
        let errors = match missing {
            Some(error) => vec![error.during(format!("network {:?}", list.name))],
            None if list.version < Version::V1_1_0 => Vec::new(),
            None => self.run_all(Verb::Status, list, &Map::new(), after(self.config.status_timeout_s)).await,
        };
        let found = joined(errors).map_err(|error| error.to_string());
        let mut health = lock(&self.health);
        let before = health.found.as_ref().and_then(|(_, found)| found.as_ref().err());
        match (&found, before) {
            (Err(problem), before) if before != Some(problem) => {
                tracing::warn!(network = list.name, "{problem}")
            }
            (Ok(()), Some(_)) => tracing::info!(network = list.name, "the network is ready again"),
            _ => {}
        }
        health.found = Some((list.clone(), found));
    }

    /// Reads the disk on a thread that may wait for it.
    async fn refresh_aside(self: Arc<Self>) {
        if let Err(error) = tokio::task::spawn_blocking(move || self.refresh()).await {
            tracing::error!("reading the network configuration failed: {error}");
        }
    }

    /// Runs a verb about the network as a whole on every plugin.
    async fn run_all(
        &self,
        verb: Verb,
        list: &List,
        extra: &Map<String, Value>,
        deadline: Instant,
    ) -> Vec<Error> {
        let mut errors = Vec::new();
        for plugin in &list.plugins {
            let mut stdin = plugin_conf(list, plugin);
            stdin.extend(extra.clone());
            let stdin = Value::Object(stdin).to_string().into_bytes();
            let (network, plugin, dirs) = (&*list.name, &*plugin.name, &*self.config.plugin_dirs);
            let call = Call { verb, network, plugin, dirs, target: None, stdin, deadline };
            errors.extend(plugin::run(call).await.err().map(|failure| failure.error));
        }
        errors
    }
}

/// Follows the configuration. If that is impossible, it is still read when a pod needs a network or status is asked.
async fn watch(inner: Arc<Inner>) {
    let dir = inner.config.conf_dir.clone();
    let changed = || inner.clone().refresh_aside();
    if let Err(error) = conf::watch(dir.clone(), changed).await {
        tracing::warn!("cannot watch {}: {error}; it is read when needed", dir.display());
    }
}

fn report(config: &Config, loaded: &Loaded) {
    let names: Vec<_> = loaded.lists.iter().map(|list| &*list.name).collect();
    tracing::info!(dir = %config.conf_dir.display(), networks = ?names, "network configuration read");
    for problem in &loaded.broken {
        tracing::warn!("network configuration skipped: {problem}");
    }
}

/// Runs a verb about one attachment.
async fn run(
    verb: Verb,
    list: &List,
    plugin: &Plugin,
    intent: &Intent,
    netns: &Path,
    previous: Option<&Value>,
    deadline: Instant,
) -> Result<Vec<u8>, Failure> {
    let mut stdin = plugin_conf(list, plugin);
    let runtime = intent.runtime_config(plugin);
    if !runtime.is_empty() {
        stdin.insert("runtimeConfig".to_owned(), runtime.into());
    }
    if let Some(previous) = previous {
        stdin.insert("prevResult".to_owned(), previous.clone());
    }
    let (container_id, ifname, args) = (intent.container_id(), intent.ifname(), intent.args());
    plugin::run(Call {
        verb,
        network: &list.name,
        plugin: &plugin.name,
        dirs: intent.plugin_dirs(),
        target: Some(Target { container_id, netns, ifname, args }),
        stdin: Value::Object(stdin).to_string().into_bytes(),
        deadline,
    })
    .await
}

/// A plugin's configuration as it is told to it: the list's name and version hold for all.
fn plugin_conf(list: &List, plugin: &Plugin) -> Map<String, Value> {
    let mut conf = plugin.conf.clone();
    conf.insert("name".to_owned(), list.name.as_str().into());
    conf.insert("cniVersion".to_owned(), list.version.to_string().into());
    conf
}

fn label(list: &List, plugin: &Plugin, verb: Verb) -> String {
    format!("network {:?}: plugin {:?}: {}", list.name, plugin.name, verb.as_str())
}

/// Whether this is a network namespace. What a reboot left in its place is not, and plugins fail on that for ever.
fn is_netns(path: &Path) -> bool {
    /// `NSFS_MAGIC`.
    const NSFS: rustix::fs::FsWord = 0x6e73_6673;
    rustix::fs::statfs(path).is_ok_and(|fs| fs.f_type == NSFS)
}

fn after(seconds: u64) -> Instant {
    // A day stands for longer ones: beyond some point instants overflow.
    Instant::now() + Duration::from_secs(seconds.min(86_400))
}

/// One error of many: the first one's kind, everybody's text.
fn joined(mut errors: Vec<Error>) -> Result<()> {
    match errors.len() {
        0 => Ok(()),
        1 => Err(errors.remove(0)),
        _ => {
            let texts: Vec<_> = errors.iter().map(ToString::to_string).collect();
            Err(Error::new(errors[0].kind(), texts.join("; ")))
        }
    }
}

/// Nothing here can be left half changed, so a panic elsewhere does not matter.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
