//! A pod's state as its shim reports or records it, free of wire types.

use std::time::Duration;

use ocid_api::id::ContainerId;
use ocid_api::shim as wire;

/// All that is known of a pod; see `PodState` in the shim protocol.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PodState {
    /// How far the pod's life has come.
    pub phase: PodPhase,
    /// Unix nanoseconds.
    pub created_at_ns: i64,
    /// The network attachment.
    pub network: Network,
    /// Path of the pod's own network namespace; empty if it is the host's.
    pub netns: String,
    /// Path of the pod's shared PID namespace; empty if it has none.
    pub pidns: String,
    /// Path of the pod's own IPC namespace; empty if it is the host's.
    pub ipcns: String,
    /// Path of the pod's own UTS namespace; empty if it is the host's.
    pub utsns: String,
    /// Process id of the shim.
    pub shim_pid: u32,
    /// Version of the shim protocol.
    pub protocol: u32,
    /// The pod's containers, ordered by id.
    pub containers: Vec<ContainerState>,
}

/// See the life of a pod in the shim protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum PodPhase {
    /// Made; its network is not up, or never came up.
    #[default]
    Created,
    /// Its network is up.
    Ready,
    /// Ended; only the record is left.
    Stopped,
}

/// The network part of a pod's state. The bytes are this daemon's own JSON.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Network {
    /// Whether the attachment must still be undone.
    pub detached: bool,
    /// Recorded before ADD; empty for a pod on the host's network.
    pub intent: Vec<u8>,
    /// Recorded after ADD.
    pub result: Vec<u8>,
}

/// All that is known of a container.
#[derive(Debug, Clone, PartialEq)]
pub struct ContainerState {
    /// Who it is.
    pub id: ContainerId,
    /// How far its life has come.
    pub phase: ContainerPhase,
    /// Unix nanoseconds; 0 if the step was not taken.
    pub created_at_ns: i64,
    /// Unix nanoseconds; 0 if the step was not taken.
    pub started_at_ns: i64,
    /// Process id of its init; 0 before CREATED and after EXITED.
    pub pid: u32,
    /// Its cgroup below each hierarchy's mount.
    pub cgroup: String,
    /// Set if the phase is `Exited`.
    pub exit: Option<Exit>,
}

/// See the life of a container in the shim protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ContainerPhase {
    /// Being made; nobody has been told its id.
    Creating,
    /// Made; nothing of the user's process has run.
    Created,
    /// Started.
    Running,
    /// Ended.
    Exited,
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Exit {
    /// Exit code; 128 plus the signal if one ended it.
    pub code: u32,
    /// Whether the kernel killed for want of memory.
    pub oom_killed: bool,
    /// Unix nanoseconds.
    pub finished_at_ns: i64,
    /// Empty unless the exit was not the program's own doing.
    pub reason: String,
    /// For a person.
    pub message: String,
}

impl PodState {
    /// The state of one container.
    pub fn container(&self, id: &ContainerId) -> Option<&ContainerState> {
        self.containers.binary_search_by(|c| c.id.cmp(id)).ok().map(|at| &self.containers[at])
    }
}

impl From<wire::PodState> for PodState {
    fn from(state: wire::PodState) -> PodState {
        let network = state.network.unwrap_or_default();
        let namespaces = state.namespaces.unwrap_or_default();
        let mut containers: Vec<_> = state.containers.into_iter().filter_map(container).collect();
        containers.sort_by(|a, b| a.id.cmp(&b.id));
        PodState {
            phase: match state.phase.enum_value_or_default() {
                wire::PodPhase::POD_READY => PodPhase::Ready,
                wire::PodPhase::POD_STOPPED => PodPhase::Stopped,
                wire::PodPhase::POD_CREATED | wire::PodPhase::POD_PHASE_UNSPECIFIED => PodPhase::Created,
            },
            created_at_ns: state.created_at_ns,
            network: Network {
                detached: network.phase.enum_value_or_default() == wire::NetworkPhase::NETWORK_DETACHED,
                intent: network.intent,
                result: network.result,
            },
            netns: namespaces.net,
            pidns: namespaces.pid,
            ipcns: namespaces.ipc,
            utsns: namespaces.uts,
            shim_pid: state.shim_pid,
            protocol: state.protocol,
            containers,
        }
    }
}

/// `None` for a container whose id is malformed, which no shim of ours sends.
fn container(state: wire::ContainerState) -> Option<ContainerState> {
    let exit = state.exit.into_option().map(Exit::from);
    let phase = match state.phase.enum_value_or_default() {
        wire::ContainerPhase::CONTAINER_CREATED => ContainerPhase::Created,
        wire::ContainerPhase::CONTAINER_RUNNING => ContainerPhase::Running,
        wire::ContainerPhase::CONTAINER_EXITED => ContainerPhase::Exited,
        wire::ContainerPhase::CONTAINER_CREATING | wire::ContainerPhase::CONTAINER_PHASE_UNSPECIFIED => {
            ContainerPhase::Creating
        }
    };
    Some(ContainerState {
        id: state.container.parse().ok()?,
        phase,
        created_at_ns: state.created_at_ns,
        started_at_ns: state.started_at_ns,
        pid: state.pid,
        cgroup: state.cgroup,
        exit: (phase == ContainerPhase::Exited).then(|| exit.unwrap_or_default()),
    })
}

impl From<wire::Exit> for Exit {
    fn from(exit: wire::Exit) -> Exit {
        Exit {
            code: exit.code,
            oom_killed: exit.oom_killed,
            finished_at_ns: exit.finished_at_ns,
            reason: exit.reason,
            message: exit.message,
        }
    }
}

/// What an ExecSync gave.
#[derive(Debug, Default)]
pub struct ExecOutput {
    /// What it wrote, up to the cap.
    pub stdout: Vec<u8>,
    /// What it wrote, up to the cap.
    pub stderr: Vec<u8>,
    /// How it ended.
    pub exit: Exit,
}

/// How long calls to a shim may take.
#[derive(Debug, Clone, Copy)]
pub struct Deadlines {
    /// A call that only changes the shim's own state.
    pub call: Duration,
    /// A call that runs the OCI runtime.
    pub runtime: Duration,
    /// From spawn to the ready byte.
    pub start: Duration,
    /// One run of `ocid-shim cleanup`.
    pub cleanup: Duration,
}
