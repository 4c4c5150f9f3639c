//! What is true of a container now, and how that is said on the wire and on disk.

use ocid_api::shim::{self, ContainerPhase, ContainerState};

use super::state::{Exit, State};

/// What is true of a container now.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    pub(crate) id: String,
    pub(crate) state: State,
    pub(crate) created_at_ns: i64,
    pub(crate) stop_deadline_ns: i64,
    pub(crate) cgroup: String,
    pub(crate) resources: Vec<u8>,
    pub(crate) stdio: shim::Stdio,
    pub(crate) rootfs: shim::Rootfs,
    pub(crate) bundle: String,
}

impl Facts {
    /// On the wire and on disk.
    pub(crate) fn to_message(&self) -> ContainerState {
        let (phase, pid, started_at_ns, exit) = match &self.state {
            State::Creating => (ContainerPhase::CONTAINER_CREATING, 0, 0, None),
            State::Created { init } => (ContainerPhase::CONTAINER_CREATED, *init, 0, None),
            State::Running { init, started_at_ns } => {
                (ContainerPhase::CONTAINER_RUNNING, *init, *started_at_ns, None)
            }
            State::Exited { started_at_ns, exit } => {
                (ContainerPhase::CONTAINER_EXITED, 0, *started_at_ns, Some(exit.to_message()))
            }
        };
        ContainerState {
            container: self.id.clone(),
            phase: phase.into(),
            created_at_ns: self.created_at_ns,
            started_at_ns,
            pid: u32::try_from(pid).unwrap_or(0),
            exit: exit.into(),
            cgroup: self.cgroup.clone(),
            stop_deadline_ns: self.stop_deadline_ns,
            stdio: Some(self.stdio.clone()).into(),
            resources: self.resources.clone(),
            rootfs: Some(self.rootfs.clone()).into(),
            bundle: self.bundle.clone(),
            ..Default::default()
        }
    }
}

impl Exit {
    /// On the wire and on disk.
    pub(crate) fn to_message(&self) -> shim::Exit {
        shim::Exit {
            code: self.code,
            signal: self.signal,
            oom_killed: self.oom_killed,
            finished_at_ns: self.finished_at_ns,
            reason: self.reason.clone(),
            message: self.message.clone(),
            ..Default::default()
        }
    }
}
