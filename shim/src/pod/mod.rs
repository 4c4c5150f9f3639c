//! The pod: its namespaces and files, its containers, and the phases it goes through.
//!
//! Creating a container holds `lifecycle` for reading, a change of the pod's phase alone. Teardown first marks the pod,
//! so that new work is refused and not queued.

pub(crate) mod files;
pub(crate) mod namespaces;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ocid_api::cgroup::Version;
use ocid_api::id::{ContainerId, PodId};
use ocid_api::paths::PodPaths;
use ocid_api::shim::{
    ContainerState, CreatePodRequest, Namespaces, Network, NetworkPhase, PROTOCOL, PodPhase, PodState,
    Runtime,
};
use tokio::sync::{RwLock, oneshot, watch};

use crate::board::Board;
use crate::cgroup::Cgroup;
use crate::container::{Container, METADATA_BYTES_MAX, New};
use crate::error::{Context as _, Error, Result};
use crate::log;
use crate::process::Process;
use crate::record::{self, now_ns};
use crate::runc::Runc;

/// How long the init of the shared pid namespace has to die.
const PAUSE_DEADLINE: Duration = Duration::from_secs(5);

/// The pod of this shim.
#[derive(Debug)]
pub(crate) struct Pod {
    paths: PodPaths,
    board: Arc<Board>,
    lifecycle: RwLock<()>,
    ending: AtomicBool,
    runc: Mutex<Option<Arc<Runc>>>,
    containers: Mutex<BTreeMap<ContainerId, Arc<Container>>>,
    pause: Mutex<Option<Process>>,
    /// The first write of the pod to stable storage, beside everything else.
    flushed: Mutex<Option<oneshot::Receiver<std::io::Result<()>>>>,
    ended: watch::Sender<bool>,
}

/// What is to be left of a pod that ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leave {
    /// What may still be asked about.
    Record,
    /// Nothing.
    Nothing,
}

impl Pod {
    pub(crate) fn new(id: &PodId, paths: PodPaths) -> Pod {
        let state = PodState {
            protocol: PROTOCOL,
            pod: id.to_string(),
            shim_pid: std::process::id(),
            boot_id: record::boot_id(),
            ..Default::default()
        };
        Pod {
            board: Arc::new(Board::new(paths.clone(), state)),
            paths,
            lifecycle: RwLock::default(),
            ending: AtomicBool::new(false),
            runc: Mutex::default(),
            containers: Mutex::default(),
            pause: Mutex::default(),
            flushed: Mutex::default(),
            ended: watch::Sender::new(false),
        }
    }

    /// The state now and after every change.
    pub(crate) fn subscribe(&self) -> watch::Receiver<PodState> {
        self.board.subscribe()
    }

    /// Turns true when nothing is left to serve.
    pub(crate) fn ended(&self) -> watch::Receiver<bool> {
        self.ended.subscribe()
    }

    /// Whether CreatePod has succeeded.
    pub(crate) fn exists(&self) -> bool {
        self.phase() != PodPhase::POD_PHASE_UNSPECIFIED
    }

    fn phase(&self) -> PodPhase {
        self.board.state().phase.enum_value_or_default()
    }

    /// Makes the namespaces and files. On error nothing is left.
    pub(crate) async fn create(&self, request: CreatePodRequest) -> Result<Namespaces> {
        let _lifecycle = self.lifecycle.write().await;
        self.refuse_if_ending()?;
        if request.pod != self.board.state().pod {
            return Err(Error::invalid(format!("this is the shim of pod {}", self.board.state().pod)));
        }
        if self.exists() {
            return Ok(self.board.state().namespaces.clone().unwrap_or_default());
        }
        let made = self.make(&request);
        if made.is_err()
            && let Err(e) = self.release().await.and_then(|()| self.erase_record())
        {
            log::say(&format!("undoing a failed CreatePod: {e}"));
        }
        made
    }

    fn make(&self, request: &CreatePodRequest) -> Result<Namespaces> {
        let wanted = namespaces::Wanted {
            net: request.new_net,
            ipc: request.new_ipc,
            uts: request.new_uts,
            shared_pid: request.shared_pid,
            hostname: &request.hostname,
            sysctls: request.sysctls.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect(),
        };
        namespaces::check(&wanted)?;
        let files: Vec<files::File<'_>> = request
            .files
            .iter()
            .map(|file| files::File { name: &file.name, content: &file.content, mode: file.mode })
            .collect();
        files::check(&files)?;
        if request.metadata.len() > METADATA_BYTES_MAX {
            return Err(Error::invalid(format!(
                "the pod's metadata has more than {METADATA_BYTES_MAX} bytes"
            )));
        }
        let runtime = request.runtime.clone().unwrap_or_default();
        if !runtime.binary.starts_with('/') || !runtime.root.starts_with('/') {
            return Err(Error::invalid("the runtime's binary and root are absolute paths"));
        }

        // Record first, with where the namespaces will be: cleanup releases what it finds there.
        let dir = self.paths.namespaces();
        let path = |made: bool, name: &str| {
            if made { dir.join(name).to_string_lossy().into_owned() } else { String::new() }
        };
        let state = PodState {
            phase: PodPhase::POD_CREATED.into(),
            created_at_ns: now_ns(),
            network: Some(Network {
                phase: NetworkPhase::NETWORK_INTENDED.into(),
                intent: request.network_intent.clone(),
                ..Default::default()
            })
            .into(),
            namespaces: Some(Namespaces {
                net: path(wanted.net, "net"),
                ipc: path(wanted.ipc, "ipc"),
                uts: path(wanted.uts, "uts"),
                pid: path(wanted.shared_pid, "pid"),
                ..Default::default()
            })
            .into(),
            runtime: Some(runtime.clone()).into(),
            cgroup: request.cgroup.clone(),
            ..self.board.state().clone()
        };
        record::make_dir(self.paths.record_dir()).context(|| "make the pod's record".to_owned())?;
        record::replace(&self.paths.metadata(), &request.metadata).context(|| "write metadata".to_owned())?;
        record::write_pod(&self.paths, &state).context(|| "write the pod's record".to_owned())?;
        *lock(&self.flushed) = Some(self.flush());

        files::make(&self.paths, &files)?;
        if request.shm_bytes > 0 {
            files::mount_shm(&self.paths.shm(), request.shm_bytes)?;
        }
        let pinned = namespaces::make(&self.paths, &wanted)?;
        *lock(&self.pause) = pinned.pause;
        *lock(&self.runc) = Some(Arc::new(runc(&runtime, self.paths.run_dir().to_path_buf())));
        let namespaces = state.namespaces.clone().unwrap_or_default();
        self.board.publish(|published| *published = state);
        Ok(namespaces)
    }

    /// Brings metadata and record to stable storage, in a thread that lives as long as that takes.
    fn flush(&self) -> oneshot::Receiver<std::io::Result<()>> {
        let (done, flushed) = oneshot::channel();
        let dir = self.paths.record_dir().to_path_buf();
        let files = [self.paths.metadata(), self.paths.record()];
        let thread = std::thread::Builder::new().name("flush".to_owned()).stack_size(64 << 10);
        // If no thread can be made, the channel closes and says so.
        let _ = thread.spawn(move || {
            if let Err(Err(e)) = done.send(record::flush(&dir, &files)) {
                log::say(&format!("write the record to disk: {e}")); // nobody waits for it
            }
        });
        flushed
    }

    /// Records what the daemon did with the network; DETACHED ends the pod.
    pub(crate) async fn set_network(self: &Arc<Self>, network: Network) -> Result<()> {
        match network.phase.enum_value_or_default() {
            NetworkPhase::NETWORK_ATTACHED => self.attached(network).await,
            NetworkPhase::NETWORK_DETACHED => self.end(Leave::Record).await,
            _ => Err(Error::invalid("a network is set to ATTACHED or DETACHED")),
        }
    }

    async fn attached(&self, network: Network) -> Result<()> {
        let _lifecycle = self.lifecycle.write().await;
        self.refuse_if_ending()?;
        match self.phase() {
            PodPhase::POD_CREATED | PodPhase::POD_READY => {}
            phase => return Err(Error::precondition(format!("a pod in phase {phase:?} has no network"))),
        }
        let first = lock(&self.flushed).take();
        if let Some(first) = first {
            flushed(first).await?;
        }
        let intent = match (network.intent.is_empty(), self.board.state().network.as_ref()) {
            (true, Some(recorded)) => recorded.intent.clone(),
            _ => network.intent.clone(),
        };
        let network = Network { intent, ..network };
        let same =
            self.phase() == PodPhase::POD_READY && self.board.state().network.as_ref() == Some(&network);
        if same {
            return Ok(());
        }
        // What is needed to undo the network, the intent, is on stable storage by now; the result is brought there beside
        // everything else. A power cut in between ends the pod as any other does, and it is removed by its intent.
        let mut state = self.board.state().clone();
        state.network = Some(network).into();
        state.phase = PodPhase::POD_READY.into();
        record::write_pod(&self.paths, &state).context(|| "write the pod's record".to_owned())?;
        drop(self.flush());
        self.board.publish(|published| {
            published.network = state.network;
            published.phase = state.phase;
        });
        Ok(())
    }

    /// Ends every container, releases everything, and leaves the record or nothing. The shim exits after it.
    pub(crate) async fn end(self: &Arc<Self>, leave: Leave) -> Result<()> {
        self.ending.store(true, Ordering::Relaxed);
        let _lifecycle = self.lifecycle.write().await;
        if *self.ended.borrow() && leave == Leave::Record {
            return Ok(());
        }
        if leave == Leave::Record && !self.exists() {
            self.ending.store(false, Ordering::Relaxed);
            return Err(Error::precondition("there is no pod yet"));
        }
        self.end_containers(leave).await?;
        self.release().await?;
        if leave == Leave::Record {
            self.board.change(|state| {
                state.phase = PodPhase::POD_STOPPED.into();
                let mut network = state.network.take().unwrap_or_default();
                network.phase = NetworkPhase::NETWORK_DETACHED.into();
                state.network = Some(network).into();
            })?;
        } else {
            self.erase_record()?;
            self.board.publish(|state| state.phase = PodPhase::POD_STOPPED.into());
        }
        record::remove_dir(self.paths.run_dir()).context(|| "remove the pod's run-time files".to_owned())?;
        self.ended.send_replace(true);
        Ok(())
    }

    /// At once, not one after the other.
    async fn end_containers(&self, leave: Leave) -> Result<()> {
        let mut ends = Vec::new();
        for container in self.containers().values() {
            let container = Arc::clone(container);
            ends.push(tokio::spawn(async move {
                match leave {
                    Leave::Record => container.retire().await,
                    Leave::Nothing => container.remove().await,
                }
            }));
        }
        let mut result = Ok(());
        for end in ends {
            result = result.and(end.await.context(|| "end a container".to_owned()).flatten());
        }
        result
    }

    /// Takes away what has meaning only while the pod runs. What is gone already is passed over.
    async fn release(&self) -> Result<()> {
        let pause = lock(&self.pause).take();
        if let Some(pause) = pause {
            let _ = pause.signal(libc::SIGKILL);
            if tokio::time::timeout(PAUSE_DEADLINE, pause.wait()).await.is_err() {
                log::say("the init of the pid namespace survives SIGKILL");
            }
        }
        release(&self.paths, &self.board.state().cgroup)
    }

    fn erase_record(&self) -> Result<()> {
        erase_record(&self.paths)
    }

    /// Makes a container. One that has been made already is success.
    pub(crate) async fn create_container(&self, new: New) -> Result<ContainerState> {
        self.refuse_if_ending()?;
        let _lifecycle = self.lifecycle.read().await;
        self.refuse_if_ending()?;
        if self.phase() != PodPhase::POD_READY {
            return Err(Error::precondition("the pod is not ready"));
        }
        let existing = self.containers().get(&new.id).cloned();
        if let Some(container) = existing {
            return container.created().await;
        }
        let runc = lock(&self.runc).clone().ok_or_else(|| Error::precondition("the pod has no runtime"))?;
        let paths = self.paths.container(&new.id);
        let container = Arc::new(Container::new(&new, paths, self.paths.run_dir(), &runc, &self.board)?);
        self.containers().insert(new.id.clone(), Arc::clone(&container));
        if let Err(e) = container.create(&new).await {
            self.containers().remove(&new.id);
            return Err(e);
        }
        Ok(container.to_message())
    }

    /// Removes a container. An unknown one is success.
    pub(crate) async fn remove_container(&self, id: &ContainerId) -> Result<()> {
        let container = self.containers().get(id).cloned();
        if let Some(container) = container {
            container.remove().await?;
            // Its name may have been given to another meanwhile, if its create had failed.
            let mut containers = self.containers();
            if containers.get(id).is_some_and(|found| Arc::ptr_eq(found, &container)) {
                containers.remove(id);
            }
        }
        Ok(())
    }

    /// A container by its id.
    pub(crate) fn container(&self, id: &ContainerId) -> Result<Arc<Container>> {
        self.containers()
            .get(id)
            .cloned()
            .ok_or_else(|| Error::not_found(format!("no container {id} in this pod")))
    }

    fn containers(&self) -> MutexGuard<'_, BTreeMap<ContainerId, Arc<Container>>> {
        lock(&self.containers)
    }

    fn refuse_if_ending(&self) -> Result<()> {
        match self.ending.load(Ordering::Relaxed) {
            true => Err(Error::precondition("the pod is being stopped")),
            false => Ok(()),
        }
    }
}

/// The driver that a pod's record asks for.
pub(crate) fn runc(runtime: &Runtime, scratch: PathBuf) -> Runc {
    Runc::new(&runtime.binary, &runtime.root, runtime.systemd_cgroup, runtime.timeout_ms, scratch)
}

/// Releases namespaces, /dev/shm and the pod's cgroup. Nothing is success.
pub(crate) fn release(paths: &PodPaths, cgroup: &str) -> Result<()> {
    namespaces::release(paths)?;
    files::unmount_shm(&paths.shm())?;
    record::remove_dir(&paths.shm()).context(|| "remove the pod's /dev/shm".to_owned())?;
    record::remove_dir(&paths.files()).context(|| "remove the pod's files".to_owned())?;
    if let Some(cgroup) = Version::detect().ok().and_then(|version| Cgroup::new(version, cgroup)) {
        cgroup.remove();
    }
    Ok(())
}

/// Deletes the pod's durable directory; the record first, for without it there is no pod.
pub(crate) fn erase_record(paths: &PodPaths) -> Result<()> {
    record::remove_file(&paths.record()).context(|| "remove the pod's record".to_owned())?;
    record::remove_dir(paths.record_dir()).context(|| "remove the pod's record".to_owned())
}

async fn flushed(flush: oneshot::Receiver<std::io::Result<()>>) -> Result<()> {
    let done = flush.await.context(|| "start writing the record to disk".to_owned())?;
    done.context(|| "write the record to disk".to_owned())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
