//! The published state: what `Watch` sends. It is recorded first and published then, never the other way round.

use ocid_api::paths::{ContainerPaths, PodPaths};
use ocid_api::shim::{ContainerState, PodState};
use tokio::sync::watch;

use crate::error::{Context as _, Result};
use crate::{log, record};

/// See the module.
#[derive(Debug)]
pub(crate) struct Board {
    paths: PodPaths,
    state: watch::Sender<PodState>,
}

impl Board {
    pub(crate) fn new(paths: PodPaths, state: PodState) -> Board {
        Board { paths, state: watch::Sender::new(state) }
    }

    /// The state now.
    pub(crate) fn state(&self) -> watch::Ref<'_, PodState> {
        self.state.borrow()
    }

    /// The state now and after every change.
    pub(crate) fn subscribe(&self) -> watch::Receiver<PodState> {
        self.state.subscribe()
    }

    /// Records and publishes a change of the pod itself.
    pub(crate) fn change(&self, change: impl FnOnce(&mut PodState)) -> Result<()> {
        let mut state = self.state.borrow().clone();
        change(&mut state);
        record::write_pod(&self.paths, &state).context(|| "write the pod's record".to_owned())?;
        self.state.send_replace(state);
        Ok(())
    }

    /// Publishes a change of the pod that leaves no record.
    pub(crate) fn publish(&self, change: impl FnOnce(&mut PodState)) {
        self.state.send_modify(change);
    }

    /// Records and publishes a container's state.
    pub(crate) fn put(&self, paths: &ContainerPaths, state: ContainerState) -> Result<()> {
        record::write_container(paths, &state).context(|| "write the container's record".to_owned())?;
        self.show(state);
        Ok(())
    }

    /// Publishes a state that is true whether or not it can be recorded.
    pub(crate) fn put_anyway(&self, paths: &ContainerPaths, state: ContainerState) {
        let recorded = match state.exit.as_ref() {
            Some(exit) => record::write_exit(paths, exit).map(|()| {
                // The exit file alone tells all; the record, with the start, is brought up to date if there is room.
                let _ = record::write_container(paths, &state);
            }),
            None => record::write_container(paths, &state),
        };
        if let Err(e) = recorded {
            log::say(&format!("container {}: cannot record its state: {e}", state.container));
        }
        self.show(state);
    }

    /// Publishes that a container is no more.
    pub(crate) fn forget(&self, id: &str) {
        self.state.send_if_modified(|state| {
            let before = state.containers.len();
            state.containers.retain(|container| container.container != id);
            state.containers.len() != before
        });
    }

    fn show(&self, shown: ContainerState) {
        self.state.send_modify(|state| {
            match state.containers.iter_mut().find(|container| container.container == shown.container) {
                Some(container) => *container = shown,
                None => state.containers.push(shown),
            }
        });
    }
}
