//! Pods and containers as CRI shows them.

use ocid_api::cri;
use serde_json::json;

use crate::pod::{Container, ContainerPhase, ContainerState, Pod};
use crate::spec::{self, Resources, Signal};

pub(super) fn pod_state(pod: &Pod) -> cri::PodSandboxState {
    if pod.ready() { cri::PodSandboxState::SandboxReady } else { cri::PodSandboxState::SandboxNotready }
}

fn pod_metadata(name: &spec::PodName) -> cri::PodSandboxMetadata {
    cri::PodSandboxMetadata {
        name: name.name.clone(),
        uid: name.uid.clone(),
        namespace: name.namespace.clone(),
        attempt: name.attempt,
    }
}

/// `None` for a pod whose creation has not been answered and did not fail half-way.
pub(super) fn pod(pod: &Pod) -> Option<cri::PodSandbox> {
    if !pod.visible() {
        return None;
    }
    let spec = pod.spec();
    Some(cri::PodSandbox {
        id: pod.id().to_string(),
        metadata: Some(pod_metadata(&spec.name)),
        state: pod_state(pod).into(),
        created_at: pod.created_at_ns(),
        labels: spec.labels.clone(),
        annotations: spec.annotations.clone(),
        runtime_handler: spec.runtime_handler.clone(),
    })
}

pub(super) fn pod_status(pod: &Pod) -> Option<cri::PodSandboxStatus> {
    if !pod.visible() {
        return None;
    }
    let spec = pod.spec();
    Some(cri::PodSandboxStatus {
        id: pod.id().to_string(),
        metadata: Some(pod_metadata(&spec.name)),
        state: pod_state(pod).into(),
        created_at: pod.created_at_ns(),
        network: Some(network(pod)),
        linux: Some(cri::LinuxPodSandboxStatus {
            namespaces: Some(cri::Namespace { options: Some(namespace_options(spec)) }),
        }),
        labels: spec.labels.clone(),
        annotations: spec.annotations.clone(),
        runtime_handler: spec.runtime_handler.clone(),
    })
}

fn network(pod: &Pod) -> cri::PodSandboxNetworkStatus {
    let mut ips = pod.ips().into_iter().map(|ip| ip.to_string());
    cri::PodSandboxNetworkStatus {
        ip: ips.next().unwrap_or_default(),
        additional_ips: ips.map(|ip| cri::PodIp { ip }).collect(),
    }
}

fn namespace_options(spec: &spec::PodSpec) -> cri::NamespaceOption {
    let scope = |scope| match scope {
        spec::Scope::Pod => cri::NamespaceMode::Pod,
        spec::Scope::Node => cri::NamespaceMode::Node,
    };
    let pid = match spec.namespaces.pid {
        spec::PodPid::Pod => cri::NamespaceMode::Pod,
        spec::PodPid::Container => cri::NamespaceMode::Container,
        spec::PodPid::Node => cri::NamespaceMode::Node,
    };
    cri::NamespaceOption {
        network: scope(spec.namespaces.network).into(),
        pid: pid.into(),
        ipc: scope(spec.namespaces.ipc).into(),
        ..Default::default()
    }
}

/// The verbose part of a pod's status, in the shape that users of crictl read.
pub(super) fn pod_info(pod: &Pod) -> serde_json::Value {
    let Some(view) = pod.view() else { return json!({}) };
    let attachment =
        serde_json::from_slice::<serde_json::Value>(&view.state.network.result).unwrap_or_default();
    json!({
        "pid": view.state.shim_pid,
        "processStatus": format!("{:?}", view.life).to_lowercase(),
        "netNamespaceClosed": view.state.network.detached,
        "runtimeHandler": pod.spec().runtime_handler,
        "config": pod.spec(),
        "cniResult": attachment.get("result").cloned().unwrap_or_default(),
        "sandboxMetadata": pod.spec().name,
    })
}

pub(super) fn container_phase(state: &ContainerState) -> cri::ContainerState {
    match state.phase {
        ContainerPhase::Creating | ContainerPhase::Created => cri::ContainerState::ContainerCreated,
        ContainerPhase::Running => cri::ContainerState::ContainerRunning,
        ContainerPhase::Exited => cri::ContainerState::ContainerExited,
    }
}

fn container_metadata(name: &spec::ContainerName) -> cri::ContainerMetadata {
    cri::ContainerMetadata { name: name.name.clone(), attempt: name.attempt }
}

/// The image as the user wrote it.
fn image(image: &spec::ImageSpec) -> cri::ImageSpec {
    let seen = if image.user_specified_image.is_empty() { &image.image } else { &image.user_specified_image };
    cri::ImageSpec {
        image: seen.clone(),
        annotations: image.annotations.clone(),
        user_specified_image: image.user_specified_image.clone(),
        runtime_handler: image.runtime_handler.clone(),
        image_ref: image.image_ref.clone(),
    }
}

pub(super) fn container(pod: &Pod, container: &Container, state: &ContainerState) -> cri::Container {
    let spec = container.spec();
    cri::Container {
        id: container.id().to_string(),
        pod_sandbox_id: pod.id().to_string(),
        metadata: Some(container_metadata(&spec.name)),
        image: Some(image(&spec.image)),
        image_ref: container.metadata().image_ref.clone(),
        state: container_phase(state).into(),
        created_at: state.created_at_ns,
        labels: spec.labels.clone(),
        annotations: spec.annotations.clone(),
        image_id: container.metadata().image_id.clone(),
    }
}

pub(super) fn container_status(
    pod: &Pod,
    container: &Container,
    state: &ContainerState,
) -> cri::ContainerStatus {
    let spec = container.spec();
    let exit = state.exit.clone().unwrap_or_default();
    let reason = match &state.exit {
        None => "",
        Some(exit) if !exit.reason.is_empty() => &exit.reason,
        Some(exit) if exit.oom_killed => "OOMKilled",
        Some(exit) if exit.code == 0 => "Completed",
        Some(_) => "Error",
    };
    let signal = u8::try_from(container.metadata().stop_signal).ok().and_then(Signal::from_number);
    let signal = signal.and_then(|s| cri::Signal::from_str_name(&format!("SIGNAL_{}", s.name())));
    cri::ContainerStatus {
        id: container.id().to_string(),
        metadata: Some(container_metadata(&spec.name)),
        state: container_phase(state).into(),
        created_at: state.created_at_ns,
        started_at: state.started_at_ns,
        finished_at: exit.finished_at_ns,
        exit_code: i32::try_from(exit.code).unwrap_or(i32::MAX),
        image: Some(image(&spec.image)),
        image_ref: container.metadata().image_ref.clone(),
        reason: reason.to_owned(),
        message: exit.message,
        labels: spec.labels.clone(),
        annotations: spec.annotations.clone(),
        mounts: spec.mounts.iter().map(mount).collect(),
        log_path: log_path(pod, spec),
        resources: Some(cri::ContainerResources { linux: Some(resources(&spec.resources)), windows: None }),
        image_id: container.metadata().image_id.clone(),
        user: Some(user(container)),
        stop_signal: signal.unwrap_or_default().into(),
    }
}

/// Absolute, as crictl and kubelet open it; empty if there is no log.
fn log_path(pod: &Pod, spec: &spec::ContainerSpec) -> String {
    if spec.log_path.is_empty() || pod.spec().log_directory.is_empty() {
        return String::new();
    }
    format!("{}/{}", pod.spec().log_directory.trim_end_matches('/'), spec.log_path)
}

fn user(container: &Container) -> cri::ContainerUser {
    let user = container.metadata().process.user();
    let groups = user.additional_gids().clone().unwrap_or_default();
    cri::ContainerUser {
        linux: Some(cri::LinuxContainerUser {
            uid: user.uid().into(),
            gid: user.gid().into(),
            supplemental_groups: groups.into_iter().map(i64::from).collect(),
        }),
    }
}

/// A mount as it was asked for; kubelet looks for the termination message through it.
fn mount(mount: &spec::Mount) -> cri::Mount {
    let propagation = match mount.propagation {
        spec::Propagation::Private => cri::MountPropagation::PropagationPrivate,
        spec::Propagation::HostToContainer => cri::MountPropagation::PropagationHostToContainer,
        spec::Propagation::Bidirectional => cri::MountPropagation::PropagationBidirectional,
    };
    let volume = mount.image.as_ref();
    cri::Mount {
        container_path: mount.container_path.clone(),
        host_path: mount.host_path.clone(),
        readonly: mount.readonly,
        selinux_relabel: mount.selinux_relabel,
        propagation: propagation.into(),
        recursive_read_only: mount.recursive_read_only,
        image: volume.map(|volume| image(&volume.image)),
        image_sub_path: volume.map(|volume| volume.sub_path.clone()).unwrap_or_default(),
        ..Default::default()
    }
}

fn resources(resources: &Resources) -> cri::LinuxContainerResources {
    cri::LinuxContainerResources {
        cpu_period: resources.cpu_period.map_or(0, |v| i64::try_from(v).unwrap_or(i64::MAX)),
        cpu_quota: resources.cpu_quota.unwrap_or_default(),
        cpu_shares: resources.cpu_shares.map_or(0, |v| i64::try_from(v).unwrap_or(i64::MAX)),
        memory_limit_in_bytes: resources.memory_limit.unwrap_or_default(),
        oom_score_adj: resources.oom_score_adj.unwrap_or_default().into(),
        cpuset_cpus: resources.cpuset_cpus.clone(),
        cpuset_mems: resources.cpuset_mems.clone(),
        hugepage_limits: resources
            .hugepage_limits
            .iter()
            .map(|page| cri::HugepageLimit { page_size: page.page_size.clone(), limit: page.limit })
            .collect(),
        unified: resources.unified.clone(),
        memory_swap_limit_in_bytes: resources.memory_swap_limit.unwrap_or_default(),
    }
}

/// The verbose part of a container's status, in the shape that users of crictl read. `runtime_spec` is what the runtime
/// was given, as long as the container has a bundle.
pub(super) fn container_info(
    pod: &Pod,
    container: &Container,
    state: &ContainerState,
    runtime_spec: serde_json::Value,
) -> serde_json::Value {
    json!({
        "sandboxID": pod.id(),
        "pid": state.pid,
        "removing": false,
        "snapshotKey": container.id(),
        "snapshotter": "overlay",
        "runtimeHandler": pod.spec().runtime_handler,
        "config": container.spec(),
        "runtimeSpec": runtime_spec,
        "privileged": container.spec().security.privileged,
    })
}
