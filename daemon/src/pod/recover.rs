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
use crate::error::{Context, Error, Kind, Result};
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
        for id in ids {
            recorded.extend(record::containers(&dirs.pod(&id)).context(Kind::Internal, what)?);
            self.recover_pod(id);
        }
        for id in self.snapshots.containers()? {
            if !recorded.contains(&id) {
                self.snapshots.remove(&id)?;
            }
        }
        self.images.sweep()
    }

    fn recover_pod(self: &Arc<Pods>, id: PodId) {
        let (spec, state) = match self.read(&id) {
            Ok(found) => found,
            Err(error) => {
                tracing::error!(pod = %id, %error, "the record of a pod is damaged; ending the pod");
                (None, PodState::default())
            }
        };
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
        pod.birth.is(&if undo {
            Err(Error::internal("the daemon was restarted before the pod was ready"))
        } else {
            Ok(())
        });
        self.index.adopt(Arc::clone(&pod));
        let pods = Arc::clone(self);
        if undo {
            self.index.free_name(&pod);
            // task: removes one half-made pod; tracked by `Pods`.
            self.tasks.spawn(async move { pods.undo_pod(&pod).await });
        } else if !stopped {
            // task: removes half-made containers of one pod; tracked by `Pods`.
            self.tasks.spawn(async move { pods.undo_containers(&pod).await });
        }
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
        let _lifecycle = pod.lifecycle.write().await;
        for attempt in 1..=UNDO_TRIES {
            match self.remove_locked(pod).await {
                Ok(()) => return,
                Err(error) => {
                    tracing::error!(pod = %pod.id(), attempt, %error, "a half-made pod could not be removed")
                }
            }
            tokio::time::sleep(UNDO_PAUSE * attempt).await;
        }
    }

    /// Removes the containers whose creation nobody was told of: those that were not whole in the record, and those
    /// that the shim was still asked for when the earlier daemon died.
    async fn undo_containers(&self, pod: &Arc<Pod>) {
        let Ok(shim) = pod.shim() else { return };
        if let Err(error) = shim.settled(self.settle_deadline).await {
            tracing::warn!(pod = %pod.id(), %error, "half-made containers of the pod stay until it is removed");
            return;
        }
        let _lifecycle = pod.lifecycle.read().await;
        for container in &shim.view().state.containers {
            if pod.container(&container.id).is_some() {
                continue;
            }
            tracing::info!(pod = %pod.id(), container = %container.id, "removing a half-made container");
            if let Err(error) = self.remove_container_locked(pod, &container.id).await {
                tracing::error!(container = %container.id, %error, "a half-made container could not be removed");
            }
        }
    }
}

/// Pods that have a run directory, with or without a record.
fn running(dirs: &ocid_api::paths::Dirs) -> std::io::Result<Vec<PodId>> {
    record::pods(&ocid_api::paths::Dirs { root: dirs.state.clone(), state: dirs.state.clone() })
}
