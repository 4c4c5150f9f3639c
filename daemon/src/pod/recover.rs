//! At start: read the records, and the list is whole; then find each shim, undo what was half made, and sweep what
//! nobody refers to.
//!
//! There is nothing here that a running daemon does not also do: a pod that never became ready is removed, a shim that
//! is gone is followed to its end.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use ocid_api::id::{ContainerId, PodId};
use ocid_api::record;

use super::Pods;
use super::handle::{Container, ContainerMetadata, Pod};
use super::run::network_of;
use crate::error::{Context, Error, Kind, Result};
use crate::network::Gc;
use crate::shim::{ContainerPhase, PodPhase, PodState, Shim};
use crate::spec::PodSpec;

/// How often undoing a half-made pod is tried before it is left, listed as not ready, to kubelet.
const UNDO_TRIES: u32 = 4;
const UNDO_PAUSE: Duration = Duration::from_secs(1);

impl Pods {
    /// Reads every record. When this returns, lists are whole; no shim has been waited for.
    ///
    /// # Errors
    /// If the directories of pods cannot be read. One bad record concerns its own pod only.
    pub fn recover(self: &Arc<Pods>) -> Result<()> {
        let dirs = self.launcher.dirs();
        let what = || format!("list {} and {}", dirs.records().display(), dirs.runs().display());
        let mut ids: BTreeSet<PodId> =
            record::pods(dirs).context(Kind::Internal, what)?.into_iter().collect();
        ids.extend(running(dirs).context(Kind::Internal, what)?);
        let mut recorded = BTreeSet::new();
        let mut certain = true;
        let mut attached = Some(Vec::new());
        for id in ids {
            match record::containers(&dirs.pod(&id)) {
                Ok(containers) => recorded.extend(containers),
                Err(error) => {
                    tracing::error!(pod = %id, %error, "the containers of a pod cannot be listed");
                    certain = false;
                }
            }
            attached = attached.zip(self.recover_pod(id)).map(|(mut all, of_pod)| {
                all.extend(of_pod);
                all
            });
        }
        self.sweep_unrecorded(&recorded, certain);
        self.collect_networks(attached);
        Ok(())
    }

    /// Deletes what belongs to nothing on record. It may take long, and nobody waits for it.
    fn sweep_unrecorded(self: &Arc<Pods>, recorded: &BTreeSet<ContainerId>, certain: bool) {
        // Listed now: what a request is about to make is not on record yet.
        let mut unrecorded = match self.snapshots.containers() {
            Ok(found) if certain => found,
            Ok(_) => Vec::new(),
            Err(error) => {
                tracing::error!(%error, "what containers have written is not swept");
                Vec::new()
            }
        };
        unrecorded.retain(|id| !recorded.contains(id));
        let pods = Arc::clone(self);
        // task: deletes files, once; tracked by `Pods`.
        self.tasks.spawn_blocking(move || {
            for id in unrecorded {
                if let Err(error) = pods.snapshots.remove(&id) {
                    tracing::error!(container = %id, %error, "what a container has written could not be deleted");
                }
            }
            if let Err(error) = pods.images.sweep() {
                tracing::error!(%error, "layers that nobody needs could not be deleted");
            }
        });
    }

    /// Lets the network collect what belongs to no pod on record: `None` if a record is damaged, for then nobody knows.
    fn collect_networks(&self, attached: Option<Vec<(String, String)>>) {
        let Some(live) = attached else {
            tracing::warn!("a record is damaged: networks collect nothing at this start");
            return;
        };
        let collection = self.network.gc(&live);
        // task: asks the network's plugins once; pods wait for it with their attachment, lists do not. Tracked by `Pods`.
        self.tasks.spawn(async move {
            match collection.await {
                Ok(Gc::Done(network)) => tracing::info!(network, live = live.len(), "network collected"),
                Ok(Gc::Skipped(reason)) => tracing::debug!(reason, "no network collected"),
                Err(error) => tracing::warn!(%error, "the network could not collect what no pod uses"),
            }
        });
    }

    /// Returns the pod's network attachments, as plugins know them; `None` if its record does not say.
    fn recover_pod(self: &Arc<Pods>, id: PodId) -> Option<Vec<(String, String)>> {
        let (spec, state, readable) = match self.read(&id) {
            Ok((spec, state)) => (spec, state, true),
            Err(error) => {
                tracing::error!(pod = %id, %error, "the record of a pod is damaged; ending the pod");
                (None, PodState::default(), false)
            }
        };
        let attached = network_of(&state.network).ok().filter(|_| readable).map(|network| {
            let intent = network.filter(|_| !state.network.detached).map(|(intent, _)| intent);
            intent.map(|i| (i.container_id().to_owned(), i.ifname().to_owned())).into_iter().collect()
        });
        // Nothing of it was made that anybody could stop: it is shown only if we fail to remove it.
        let hidden = state.created_at_ns == 0;
        // A pod without a whole record was never answered for, or can never be answered for again.
        let undo = spec.is_none() || state.phase == PodPhase::Created;
        let stopped = state.phase == PodPhase::Stopped;
        let pod = Arc::new(Pod::recovered(id, spec.unwrap_or_default()));
        for container in state.containers.iter().filter(|c| c.phase >= ContainerPhase::Created) {
            match self.recover_container(&pod, &container.id) {
                Ok(made) => pod.adopt(made),
                Err(error) => {
                    tracing::error!(container = %container.id, %error, "the record of a container is damaged; removing it");
                }
            }
        }
        pod.set_shim(Shim::recover(&self.launcher, pod.id(), state));
        if undo {
            pod.mark_stopping();
        }
        if !undo {
            pod.birth.is(&Ok(()));
        } else if !hidden {
            pod.birth.is(&Err(restarted()));
        }
        self.index.adopt(Arc::clone(&pod));
        let pods = Arc::clone(self);
        if undo {
            self.index.free_name(&pod);
            self.undo_later(&pod);
        } else if !stopped {
            // task: removes half-made containers of one pod; tracked by `Pods`.
            self.tasks.spawn(async move { pods.undo_unfinished(&pod).await });
        }
        attached
    }

    /// Removes a half-made pod in the background.
    pub(super) fn undo_later(self: &Arc<Pods>, pod: &Arc<Pod>) {
        let (pods, pod) = (Arc::clone(self), Arc::clone(pod));
        // task: removes one half-made pod; tracked by `Pods`.
        self.tasks.spawn(async move { pods.undo_pod(&pod).await });
    }

    /// Removes half-made containers of one pod in the background.
    pub(super) fn undo_containers_later(self: &Arc<Pods>, pod: &Arc<Pod>, ids: Vec<ContainerId>) {
        let (pods, pod) = (Arc::clone(self), Arc::clone(pod));
        // task: removes half-made containers of one pod; tracked by `Pods`.
        self.tasks.spawn(async move { pods.undo_containers(&pod, ids).await });
    }

    fn read(&self, id: &PodId) -> Result<(Option<PodSpec>, PodState)> {
        let paths = self.launcher.dirs().pod(id);
        let what = || format!("read {}", paths.record_dir().display());
        let Some(state) = record::read_pod(&paths).context(Kind::Internal, what)? else {
            return Ok((None, PodState::default()));
        };
        let spec = match record::read(&paths.metadata()).context(Kind::Internal, what)? {
            Some(bytes) => serde_json::from_slice(&bytes).context(Kind::Internal, what)?,
            None => None,
        };
        Ok((spec, state.into()))
    }

    fn recover_container(&self, pod: &Pod, id: &ContainerId) -> Result<Container> {
        let path = self.launcher.dirs().pod(pod.id()).container(id).metadata();
        let what = || format!("read {}", path.display());
        let bytes = record::read(&path).context(Kind::Internal, what)?.unwrap_or_default();
        let metadata: ContainerMetadata = serde_json::from_slice(&bytes).context(Kind::Internal, what)?;
        let lease = self.images.lease_layers(&metadata.chain_ids);
        let container = Container::new(id.clone(), metadata, lease);
        container.birth.is(&Ok(()));
        Ok(container)
    }

    async fn undo_pod(&self, pod: &Arc<Pod>) {
        let _attended = pod.birth.attend();
        for attempt in 1..=UNDO_TRIES {
            // Not held while we pause: kubelet may be quicker.
            let lifecycle = pod.lifecycle.write().await;
            match self.remove_locked(pod).await {
                Ok(()) => return,
                Err(error) => {
                    tracing::error!(pod = %pod.id(), attempt, %error, "a half-made pod could not be removed")
                }
            }
            drop(lifecycle);
            tokio::time::sleep(UNDO_PAUSE * attempt).await;
        }
    }

    /// Removes the containers whose creation nobody was told of: those that were not whole in the record, and those
    /// that the shim was still asked for when the earlier daemon died.
    async fn undo_unfinished(&self, pod: &Arc<Pod>) {
        let Ok(shim) = pod.shim() else { return };
        if let Err(error) = shim.settled(self.settle_deadline).await {
            tracing::warn!(pod = %pod.id(), %error, "half-made containers of the pod stay until it is removed");
            return;
        }
        // A request makes its handle before it asks the shim, so one without a handle is nobody's.
        let mut unfinished: Vec<_> = shim.view().state.containers.iter().map(|c| c.id.clone()).collect();
        unfinished.retain(|id| pod.container(id).is_none());
        self.undo_containers(pod, unfinished).await;
    }

    async fn undo_containers(&self, pod: &Arc<Pod>, mut ids: Vec<ContainerId>) {
        for attempt in 1..=UNDO_TRIES {
            let lifecycle = pod.lifecycle.read().await;
            let mut left = Vec::new();
            for id in ids {
                tracing::info!(pod = %pod.id(), container = %id, "removing a half-made container");
                if let Err(error) = self.remove_container_locked(pod, &id).await {
                    tracing::error!(container = %id, attempt, %error, "a half-made container could not be removed");
                    left.push(id);
                }
            }
            drop(lifecycle);
            if left.is_empty() {
                return;
            }
            ids = left;
            tokio::time::sleep(UNDO_PAUSE * attempt).await;
        }
    }
}

fn restarted() -> Error {
    Error::internal("the daemon was restarted before the pod was ready")
}

/// Pods that have a run directory, with or without a record.
fn running(dirs: &ocid_api::paths::Dirs) -> std::io::Result<Vec<PodId>> {
    record::pods(&ocid_api::paths::Dirs { root: dirs.state.clone(), state: dirs.state.clone() })
}
