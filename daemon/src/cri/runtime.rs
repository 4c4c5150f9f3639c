//! RuntimeService: decode, call, encode.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use ocid_api::cri;
use ocid_api::cri::runtime_service_server::RuntimeService;
use tonic::{Request, Response, Status, async_trait};

use super::{container, filter, pod, stats, status};
use crate::error::{Context, Error, Kind, Result};
use crate::pod::{CgroupDriver, Container, ContainerPhase, ContainerState, Handler, Pod, Pods};
use crate::stats::{Stats, now_ns};

/// The version of kubelet's runtime API, not of CRI: a constant that clients look for.
const KUBELET_API_VERSION: &str = "0.1.0";

/// The runtime service of one node.
#[derive(Debug)]
pub struct RuntimeApi {
    /// What can be done to pods.
    pub pods: Arc<Pods>,
    /// What containers use.
    pub stats: Arc<Stats>,
    /// Who makes cgroups.
    pub cgroup_driver: CgroupDriver,
    /// The OCI runtimes by handler; the empty name is the default's.
    pub handlers: BTreeMap<String, Handler>,
    /// The configuration in effect, for verbose answers.
    pub config: serde_json::Value,
    /// Where writable layers are.
    pub snapshots_dir: String,
}

type Answer<T> = Result<Response<T>, Status>;

fn answer<T>(message: T) -> Answer<T> {
    Ok(Response::new(message))
}

#[async_trait]
impl RuntimeService for RuntimeApi {
    async fn version(&self, _: Request<cri::VersionRequest>) -> Answer<cri::VersionResponse> {
        answer(cri::VersionResponse {
            version: KUBELET_API_VERSION.into(),
            runtime_name: "ocid".into(),
            runtime_version: env!("CARGO_PKG_VERSION").into(),
            runtime_api_version: "v1".into(),
        })
    }

    async fn status(&self, request: Request<cri::StatusRequest>) -> Answer<cri::StatusResponse> {
        let network = self.pods.network_status();
        let condition = |kind: &str, status, reason: &str, message: &str| cri::RuntimeCondition {
            r#type: kind.into(),
            status,
            reason: reason.into(),
            message: message.into(),
        };
        let mut info = BTreeMap::new();
        if request.into_inner().verbose {
            info.insert("config".into(), self.config.to_string());
            info.insert("version".into(), env!("CARGO_PKG_VERSION").into());
            info.insert("cniconfig".into(), self.pods.network_info().to_string());
        }
        answer(cri::StatusResponse {
            status: Some(cri::RuntimeStatus {
                conditions: vec![
                    condition("RuntimeReady", true, "", ""),
                    condition("NetworkReady", network.ready, network.reason, &network.message),
                ],
            }),
            info,
            runtime_handlers: self.handlers.iter().map(handler).collect(),
            features: Some(cri::RuntimeFeatures { supplemental_groups_policy: true, ..Default::default() }),
        })
    }

    async fn runtime_config(
        &self,
        _: Request<cri::RuntimeConfigRequest>,
    ) -> Answer<cri::RuntimeConfigResponse> {
        let driver = match self.cgroup_driver {
            CgroupDriver::Systemd => cri::CgroupDriver::Systemd,
            CgroupDriver::Cgroupfs => cri::CgroupDriver::Cgroupfs,
        };
        answer(cri::RuntimeConfigResponse {
            linux: Some(cri::LinuxRuntimeConfiguration { cgroup_driver: driver.into() }),
        })
    }

    /// For networks that want to know the node's ranges. Being told something that is none is never an error.
    async fn update_runtime_config(
        &self,
        request: Request<cri::UpdateRuntimeConfigRequest>,
    ) -> Answer<cri::UpdateRuntimeConfigResponse> {
        let told = request.into_inner().runtime_config.and_then(|config| config.network_config);
        if let Some(network) = told
            && let Err(error) = self.pods.set_pod_cidrs(&network.pod_cidr)
        {
            tracing::warn!(%error, "the pod ranges that kubelet gave are not used");
        }
        answer(cri::UpdateRuntimeConfigResponse {})
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<cri::RunPodSandboxRequest>,
    ) -> Answer<cri::RunPodSandboxResponse> {
        let request = request.into_inner();
        let config = request.config.ok_or_else(|| Error::invalid("RunPodSandbox without a config"))?;
        let id = self.pods.run(pod::pod_spec(config, request.runtime_handler)?).await?;
        answer(cri::RunPodSandboxResponse { pod_sandbox_id: id.into() })
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<cri::StopPodSandboxRequest>,
    ) -> Answer<cri::StopPodSandboxResponse> {
        self.pods.stop(&request.into_inner().pod_sandbox_id).await?;
        answer(cri::StopPodSandboxResponse {})
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<cri::RemovePodSandboxRequest>,
    ) -> Answer<cri::RemovePodSandboxResponse> {
        self.pods.remove(&request.into_inner().pod_sandbox_id).await?;
        answer(cri::RemovePodSandboxResponse {})
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<cri::PodSandboxStatusRequest>,
    ) -> Answer<cri::PodSandboxStatusResponse> {
        let request = request.into_inner();
        let pod = self.pods.pod(&request.pod_sandbox_id)?;
        let timestamp = now_ns();
        let shown = status::pod_status(&pod)
            .ok_or_else(|| Error::not_found(format!("pod {} is being made", pod.id())))?;
        let containers = pod.visible_containers();
        let mut info = BTreeMap::new();
        if request.verbose {
            info.insert("info".into(), status::pod_info(&pod).to_string());
        }
        answer(cri::PodSandboxStatusResponse {
            status: Some(shown),
            info,
            containers_statuses: containers
                .iter()
                .map(|(c, state)| status::container_status(&pod, c, state))
                .collect(),
            timestamp,
        })
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<cri::ListPodSandboxRequest>,
    ) -> Answer<cri::ListPodSandboxResponse> {
        let wanted = request.into_inner().filter.unwrap_or_default();
        let pods = self.pods.pods();
        let items =
            pods.iter().filter_map(|pod| status::pod(pod)).filter(|pod| filter::pod(&wanted, pod)).collect();
        answer(cri::ListPodSandboxResponse { items })
    }

    async fn create_container(
        &self,
        request: Request<cri::CreateContainerRequest>,
    ) -> Answer<cri::CreateContainerResponse> {
        let request = request.into_inner();
        let pod = self.pods.pod(&request.pod_sandbox_id)?;
        let config = request.config.ok_or_else(|| Error::invalid("CreateContainer without a config"))?;
        let id = self.pods.create_container(&pod, container::container_spec(config, pod.spec())?).await?;
        answer(cri::CreateContainerResponse { container_id: id.into() })
    }

    async fn start_container(
        &self,
        request: Request<cri::StartContainerRequest>,
    ) -> Answer<cri::StartContainerResponse> {
        self.pods.start_container(&request.into_inner().container_id).await?;
        answer(cri::StartContainerResponse {})
    }

    async fn stop_container(
        &self,
        request: Request<cri::StopContainerRequest>,
    ) -> Answer<cri::StopContainerResponse> {
        let request = request.into_inner();
        let grace = Duration::from_secs(u64::try_from(request.timeout).unwrap_or_default());
        self.pods.stop_container(&request.container_id, grace).await?;
        answer(cri::StopContainerResponse {})
    }

    async fn remove_container(
        &self,
        request: Request<cri::RemoveContainerRequest>,
    ) -> Answer<cri::RemoveContainerResponse> {
        self.pods.remove_container(&request.into_inner().container_id).await?;
        answer(cri::RemoveContainerResponse {})
    }

    async fn list_containers(
        &self,
        request: Request<cri::ListContainersRequest>,
    ) -> Answer<cri::ListContainersResponse> {
        let wanted = request.into_inner().filter.unwrap_or_default();
        let mut containers = Vec::new();
        for (pod, container, state) in self.containers() {
            let shown = status::container(&pod, &container, &state);
            if filter::container(&wanted, &shown) {
                containers.push(shown);
            }
        }
        answer(cri::ListContainersResponse { containers })
    }

    async fn container_status(
        &self,
        request: Request<cri::ContainerStatusRequest>,
    ) -> Answer<cri::ContainerStatusResponse> {
        let request = request.into_inner();
        let (pod, container, state) = self.container(&request.container_id)?;
        let mut info = BTreeMap::new();
        if request.verbose {
            let config = self.pods.runtime_config(&pod, container.id()).unwrap_or_default();
            info.insert("info".into(), status::container_info(&pod, &container, &state, config).to_string());
        }
        let shown = status::container_status(&pod, &container, &state);
        answer(cri::ContainerStatusResponse { status: Some(shown), info })
    }

    async fn reopen_container_log(
        &self,
        request: Request<cri::ReopenContainerLogRequest>,
    ) -> Answer<cri::ReopenContainerLogResponse> {
        self.pods.reopen_log(&request.into_inner().container_id).await?;
        answer(cri::ReopenContainerLogResponse {})
    }

    async fn exec_sync(&self, request: Request<cri::ExecSyncRequest>) -> Answer<cri::ExecSyncResponse> {
        let request = request.into_inner();
        let timeout = u64::try_from(request.timeout).ok().filter(|s| *s > 0).map(Duration::from_secs);
        let output = self.pods.exec_sync(&request.container_id, request.cmd, timeout).await?;
        answer(cri::ExecSyncResponse {
            stdout: output.stdout,
            stderr: output.stderr,
            exit_code: i32::try_from(output.exit.code).unwrap_or(i32::MAX),
        })
    }

    async fn container_stats(
        &self,
        request: Request<cri::ContainerStatsRequest>,
    ) -> Answer<cri::ContainerStatsResponse> {
        let (_, container, state) = self.container(&request.into_inner().container_id)?;
        // Who never asks for the list would otherwise make us remember every container there ever was.
        self.stats.retain(|id| self.pods.container(id.as_str()).is_ok());
        let usage = self.stats.container(&state);
        let usage =
            usage.ok_or_else(|| Error::not_found(format!("container {} is not running", container.id())))?;
        let shown = stats::container(stats::attributes(&container), &usage, &self.snapshots_dir);
        answer(cri::ContainerStatsResponse { stats: Some(shown) })
    }

    async fn list_container_stats(
        &self,
        request: Request<cri::ListContainerStatsRequest>,
    ) -> Answer<cri::ListContainerStatsResponse> {
        let wanted = request.into_inner().filter.unwrap_or_default();
        let containers = self.containers();
        let (stats, snapshots_dir) = (Arc::clone(&self.stats), self.snapshots_dir.clone());
        // Several files for each container, some of which the kernel computes while they are read.
        let collect = move || {
            let known: HashSet<_> = containers.iter().map(|(_, container, _)| container.id()).collect();
            stats.retain(|id| known.contains(id));
            let mut shown = Vec::new();
            for (pod, container, state) in &containers {
                let attributes = stats::attributes(container);
                if state.phase == ContainerPhase::Running
                    && filter::container_stats(&wanted, pod.id().as_str(), &attributes)
                    && let Some(usage) = stats.container(state)
                {
                    shown.push(stats::container(attributes, &usage, &snapshots_dir));
                }
            }
            shown
        };
        let shown = tokio::task::spawn_blocking(collect)
            .await
            .context(Kind::Internal, || "collect what containers use".into())?;
        answer(cri::ListContainerStatsResponse { stats: shown })
    }
}

impl RuntimeApi {
    fn containers(&self) -> Vec<(Arc<Pod>, Arc<Container>, ContainerState)> {
        let of_pod = |pod: Arc<Pod>| {
            let made = pod.visible_containers();
            made.into_iter().map(move |(container, state)| (Arc::clone(&pod), container, state))
        };
        self.pods.pods().into_iter().flat_map(of_pod).collect()
    }

    /// A container that callers may see.
    fn container(&self, text: &str) -> Result<(Arc<Pod>, Arc<Container>, ContainerState)> {
        let (pod, container) = self.pods.container(text)?;
        let state = pod.container_state(container.id());
        let state =
            state.ok_or_else(|| Error::not_found(format!("container {} is being made", container.id())))?;
        Ok((pod, container, state))
    }
}

fn handler((name, handler): (&String, &Handler)) -> cri::RuntimeHandler {
    cri::RuntimeHandler {
        name: name.clone(),
        features: Some(cri::RuntimeHandlerFeatures {
            recursive_read_only_mounts: handler.features.recursive_read_only(),
            user_namespaces: false,
        }),
    }
}
