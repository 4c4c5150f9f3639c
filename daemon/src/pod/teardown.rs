//! The only cleanup there is, in two depths. *Stop* ends everything and keeps what kubelet may still ask about;
//! *remove* is stop, then nothing left. Requests, failed starts, dead shims and recovery call these and only these.
//!
//! Each step removes what it finds; "already gone" is success; run twice, the second does nothing.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use ocid_api::id::ContainerId;

use super::Pods;
use super::handle::Pod;
use super::run::network_of;
use crate::error::{Context, Error, Kind, Result};

impl Pods {
    /// Ends everything in the pod, gives its addresses back, and keeps it listed. Unknown is success.
    ///
    /// # Errors
    /// If something could not be ended or CNI could not give the network back; to be called again then.
    pub async fn stop(&self, text: &str) -> Result<()> {
        let Some(pod) = known(self.index.pod(text))? else { return Ok(()) };
        pod.mark_stopping();
        let _lifecycle = pod.lifecycle.write().await;
        self.stop_locked(&pod).await
    }

    /// Leaves nothing of the pod and its containers but their logs. Unknown is success.
    ///
    /// # Errors
    /// As [`Pods::stop`]; or if something could not be deleted.
    pub async fn remove(&self, text: &str) -> Result<()> {
        let Some(pod) = known(self.index.pod(text))? else { return Ok(()) };
        pod.mark_stopping();
        let _lifecycle = pod.lifecycle.write().await;
        self.remove_locked(&pod).await
    }

    /// Leaves nothing of a container but its log, ending it by force if it runs. Unknown is success.
    ///
    /// # Errors
    /// If something of it could not be ended or deleted.
    pub async fn remove_container(&self, text: &str) -> Result<()> {
        let Some((pod, container)) = known(self.index.container(text))? else { return Ok(()) };
        let _lifecycle = pod.lifecycle.read().await;
        self.remove_container_locked(&pod, container.id()).await
    }

    /// [`Pods::stop`] for who holds the pod's lifecycle.
    pub(super) async fn stop_locked(&self, pod: &Pod) -> Result<()> {
        if !pod.has_shim() {
            return Ok(());
        }
        let shim = pod.shim()?;
        // A shim that was just found on record may not have been reached yet.
        shim.settled(self.settle_deadline).await?;
        let containers = pod.containers();
        let stops = containers.iter().map(|c| shim.stop_container(c.id(), 0, Duration::ZERO));
        join_all(stops).await.into_iter().collect::<Result<Vec<()>>>()?;
        let state = shim.view().state;
        let network = &state.network;
        // A shim that was launched and never told of a pod has nothing to detach.
        if network.detached || state.created_at_ns == 0 {
            return Ok(());
        }
        if let Some((intent, attachment)) = network_of(network)? {
            if pod.is_recovered() {
                self.network.end_orphans(&intent).await;
            }
            self.network.detach(&intent, attachment.as_ref()).await?;
        }
        shim.set_detached().await
    }

    /// [`Pods::remove`] for who holds the pod's lifecycle alone.
    pub(super) async fn remove_locked(&self, pod: &Arc<Pod>) -> Result<()> {
        self.stop_locked(pod).await?;
        let mut containers: BTreeSet<ContainerId> = pod.containers().iter().map(|c| c.id().clone()).collect();
        if pod.has_shim() {
            let shim = pod.shim()?;
            // Also those that were half made when an earlier daemon died, which have a snapshot but no handle.
            containers.extend(shim.view().state.containers.iter().map(|c| c.id.clone()));
            shim.remove_pod().await?;
        }
        // Nothing on record refers to the snapshots any more: a crash from here on leaves them to the sweep at start.
        for id in &containers {
            self.forget_container(pod, id).await?;
        }
        self.index.forget(pod);
        tracing::info!(pod = %pod.id(), "pod removed");
        Ok(())
    }

    /// [`Pods::remove_container`] for who holds the pod's lifecycle.
    pub(super) async fn remove_container_locked(&self, pod: &Pod, id: &ContainerId) -> Result<()> {
        let shim = pod.shim()?;
        shim.settled(self.settle_deadline).await?;
        shim.remove_container(id).await?;
        self.forget_container(pod, id).await
    }

    /// Deletes what the daemon keeps for a container whose record is gone.
    async fn forget_container(&self, pod: &Pod, id: &ContainerId) -> Result<()> {
        // A container may have written a million files.
        let (snapshots, owner) = (Arc::clone(&self.snapshots), id.clone());
        tokio::task::spawn_blocking(move || snapshots.remove(&owner))
            .await
            .context(Kind::Internal, || format!("delete what container {id} has written"))??;
        pod.forget(id);
        self.index.forget_container(id);
        Ok(())
    }
}

/// Makes an unknown object `None`: ending it is success.
fn known<T>(found: Result<T>) -> Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == Kind::NotFound => Ok(None),
        Err(error) => Err(Error::during(error, "find what is to be ended")),
    }
}
