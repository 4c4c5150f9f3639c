//! One pod, and one container, as the daemon knows them: what was asked, and where to learn what is.
//!
//! A handle holds nothing that could not be rebuilt from the record and the shim. Its spec never changes; its state is
//! the shim's. What it adds is order: the lifecycle lock, and the wait of a repeated request for the first.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use oci_spec::runtime::Process;
use ocid_api::id::{ContainerId, PodId};
use serde::{Deserialize, Serialize};
use tokio::sync::{RwLock, watch};

use crate::error::{Error, Kind, Result};
use crate::image::Lease;
use crate::network::Attachment;
use crate::shim::{ContainerPhase, ContainerState, Life, PodPhase, Shim, View};
use crate::snapshot::ChainId;
use crate::spec::{ContainerName, ContainerSpec, PodSpec};

/// One pod.
#[derive(Debug)]
pub struct Pod {
    id: PodId,
    spec: PodSpec,
    /// Set when the shim has been launched or found on record.
    shim: OnceLock<Shim>,
    /// Held alone by run, stop and remove of the pod; shared by create, start and remove of its containers.
    pub(super) lifecycle: RwLock<()>,
    pub(super) birth: Birth,
    stopping: AtomicBool,
    /// Whether an earlier daemon made it, and perhaps left something running.
    recovered: bool,
    containers: Mutex<Containers>,
    /// When this handle was made, in Unix nanoseconds.
    known_since_ns: i64,
}

type Containers = BTreeMap<ContainerId, Arc<Container>>;

/// One container.
#[derive(Debug)]
pub struct Container {
    id: ContainerId,
    metadata: ContainerMetadata,
    pub(super) birth: Birth,
    /// Keeps the image's layers on disk.
    _lease: Lease,
}

/// The daemon's own data about a container, kept by the shim beside the record.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ContainerMetadata {
    /// What was asked.
    pub spec: ContainerSpec,
    /// Digest of the image's config.
    pub image_id: String,
    /// A repo digest of the image, or its id if it has none.
    pub image_ref: String,
    /// Layers of the image, lowermost first.
    pub chain_ids: Vec<ChainId>,
    /// Signal that ends it: the config's, the image's, or SIGTERM.
    pub stop_signal: u32,
    /// The init process as the runtime got it; execs are derived from it and never from defaults.
    pub process: Process,
}

impl Pod {
    pub(super) fn new(id: PodId, spec: PodSpec) -> Pod {
        Pod {
            id,
            spec,
            shim: OnceLock::new(),
            lifecycle: RwLock::new(()),
            birth: Birth::new(),
            stopping: AtomicBool::new(false),
            recovered: false,
            containers: Mutex::default(),
            known_since_ns: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(1, |since| i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)),
        }
    }

    /// A pod that an earlier daemon made.
    pub(super) fn recovered(id: PodId, spec: PodSpec) -> Pod {
        Pod { recovered: true, ..Pod::new(id, spec) }
    }

    /// Whether an earlier daemon made it.
    pub(super) fn is_recovered(&self) -> bool {
        self.recovered
    }

    /// Who it is.
    pub fn id(&self) -> &PodId {
        &self.id
    }

    /// What was asked.
    pub fn spec(&self) -> &PodSpec {
        &self.spec
    }

    /// The last known state; `None` as long as no shim has been started.
    pub fn view(&self) -> Option<View> {
        self.shim.get().map(Shim::view)
    }

    /// Its addresses; none as long as it has no network of its own, or for ever on the node's.
    pub fn ips(&self) -> Vec<IpAddr> {
        let Some(view) = self.view() else { return Vec::new() };
        serde_json::from_slice::<Attachment>(&view.state.network.result).map(|a| a.ips).unwrap_or_default()
    }

    pub(super) fn shim(&self) -> Result<&Shim> {
        self.shim.get().ok_or_else(|| Error::precondition(format!("pod {} has no shim yet", self.id)))
    }

    pub(super) fn has_shim(&self) -> bool {
        self.shim.get().is_some()
    }

    /// Gives the pod its shim. Only who made the handle does this, once.
    pub(super) fn set_shim(&self, shim: Shim) {
        self.shim.set(shim).expect("a pod gets its shim once, from who made the handle");
    }

    /// Whether CRI calls the pod ready: its network is up, nobody is stopping it, and its shim has not gone.
    pub fn ready(&self) -> bool {
        !self.stopping.load(Ordering::Acquire)
            && self.view().is_some_and(|view| view.state.phase == PodPhase::Ready && view.life != Life::Gone)
    }

    /// When it was made, in Unix nanoseconds. Never 0, which CRI's clients take for a fault, though no shim may have
    /// come so far as to record it.
    pub fn created_at_ns(&self) -> i64 {
        match self.view().map(|view| view.state.created_at_ns) {
            Some(recorded) if recorded > 0 => recorded,
            _ => self.known_since_ns,
        }
    }

    /// Whether callers may see it: its creation has been answered, or left something to be removed.
    pub fn visible(&self) -> bool {
        self.birth.succeeded() || self.birth.failed()
    }

    /// From here on new work is refused, not queued.
    pub(super) fn mark_stopping(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    /// Refuses work in a pod that is not ready.
    pub(super) fn accepts_work(&self) -> Result<()> {
        if self.ready() { Ok(()) } else { Err(Error::precondition(format!("pod {} is not ready", self.id))) }
    }

    /// The containers that have been made, or are being made, ordered by id.
    pub fn containers(&self) -> Vec<Arc<Container>> {
        self.lock().values().cloned().collect()
    }

    /// One container.
    pub fn container(&self, id: &ContainerId) -> Option<Arc<Container>> {
        self.lock().get(id).cloned()
    }

    /// The containers that callers may see, with their state: those whose creation has succeeded.
    pub fn visible_containers(&self) -> Vec<(Arc<Container>, ContainerState)> {
        let Some(view) = self.view() else { return Vec::new() };
        let visible = |container: Arc<Container>| {
            let state = view.state.container(container.id())?;
            (container.birth.succeeded() && state.phase >= ContainerPhase::Created)
                .then(|| (container, state.clone()))
        };
        self.containers().into_iter().filter_map(visible).collect()
    }

    /// The state of one container that callers may see.
    pub fn container_state(&self, id: &ContainerId) -> Option<ContainerState> {
        self.view()?.state.container(id).filter(|state| state.phase >= ContainerPhase::Created).cloned()
    }

    /// The container of this name that is there or on its way, and has neither failed nor ended.
    pub(super) fn named(&self, name: &ContainerName) -> Option<Arc<Container>> {
        self.named_in(&self.lock(), name)
    }

    /// Adds a container, unless one of the same name is there.
    pub(super) fn reserve(&self, new: Container) -> Reserved<Container> {
        let mut containers = self.lock();
        if let Some(old) = self.named_in(&containers, &new.metadata.spec.name) {
            return Reserved::Existing(old);
        }
        let new = Arc::new(new);
        containers.insert(new.id.clone(), Arc::clone(&new));
        Reserved::New(new)
    }

    fn named_in(&self, containers: &Containers, name: &ContainerName) -> Option<Arc<Container>> {
        let view = self.view();
        let ended = |id: &ContainerId| {
            let state = view.as_ref().and_then(|view| view.state.container(id));
            state.is_some_and(|state| state.phase == ContainerPhase::Exited)
        };
        let same = |c: &&Arc<Container>| c.metadata.spec.name == *name && !c.birth.failed() && !ended(&c.id);
        containers.values().find(same).cloned()
    }

    /// Adds a container that is on record.
    pub(super) fn adopt(&self, container: Container) {
        self.lock().insert(container.id.clone(), Arc::new(container));
    }

    pub(super) fn forget(&self, id: &ContainerId) {
        self.lock().remove(id);
    }

    fn lock(&self) -> MutexGuard<'_, Containers> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Container {
    pub(super) fn new(id: ContainerId, metadata: ContainerMetadata, lease: Lease) -> Container {
        Container { id, metadata, birth: Birth::new(), _lease: lease }
    }

    /// Who it is.
    pub fn id(&self) -> &ContainerId {
        &self.id
    }

    /// What was asked.
    pub fn spec(&self) -> &ContainerSpec {
        &self.metadata.spec
    }

    /// All that the daemon keeps about it.
    pub fn metadata(&self) -> &ContainerMetadata {
        &self.metadata
    }
}

/// Whether an object was there before.
pub(super) enum Reserved<T> {
    /// It was not: the caller makes it.
    New(Arc<T>),
    /// It was, or somebody is making it: the caller waits for its [`Birth`].
    Existing(Arc<T>),
}

/// How the request that makes an object ended, for the identical requests that wait for it.
#[derive(Debug)]
pub(super) struct Birth(watch::Sender<Option<Result<(), (Kind, String)>>>);

impl Birth {
    fn new() -> Birth {
        Birth(watch::Sender::new(None))
    }

    /// Tells those who wait.
    pub(super) fn is(&self, outcome: &Result<()>) {
        let outcome = outcome.as_ref().copied().map_err(|error| (error.kind(), error.to_string()));
        self.0.send_replace(Some(outcome));
    }

    /// Tells those who wait that it failed, unless somebody tells them first: who makes an object may panic.
    pub(super) fn attend(&self) -> Attended<'_> {
        Attended(self)
    }

    /// Waits for the outcome and shares it.
    pub(super) async fn outcome(&self) -> Result<()> {
        let mut receiver = self.0.subscribe();
        let outcome = match receiver.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone(),
            Err(_) => None,
        };
        match outcome {
            Some(outcome) => outcome.map_err(|(kind, text)| Error::new(kind, text)),
            None => Err(Error::internal("the request that was to make this object has vanished")),
        }
    }

    fn open(&self) -> bool {
        self.0.borrow().is_none()
    }

    pub(super) fn succeeded(&self) -> bool {
        matches!(*self.0.borrow(), Some(Ok(())))
    }

    pub(super) fn failed(&self) -> bool {
        matches!(*self.0.borrow(), Some(Err(_)))
    }
}

/// See [`Birth::attend`].
pub(super) struct Attended<'a>(&'a Birth);

impl Drop for Attended<'_> {
    fn drop(&mut self) {
        if self.0.open() {
            self.0.is(&Err(Error::internal("the request that was to make this object has failed")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn those_who_wait_for_a_birth_learn_that_its_maker_panicked() {
        let birth = std::sync::Arc::new(Birth::new());
        let maker = {
            let birth = std::sync::Arc::clone(&birth);
            tokio::spawn(async move {
                let _attended = birth.attend();
                tokio::task::yield_now().await;
                panic!("a bug");
            })
        };
        let outcome = tokio::time::timeout(std::time::Duration::from_secs(5), birth.outcome()).await;
        assert_eq!(outcome.unwrap().unwrap_err().kind(), Kind::Internal);
        assert!(maker.await.is_err() && birth.failed());
    }

    #[tokio::test]
    async fn an_attended_birth_keeps_the_outcome_that_it_was_told() {
        let birth = Birth::new();
        let attended = birth.attend();
        birth.is(&Ok(()));
        drop(attended);
        assert!(birth.outcome().await.is_ok());
    }
}
