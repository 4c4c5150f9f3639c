//! RunPodSandbox: bring a pod up, top to bottom.
//!
//! | the daemon dies after | recovery finds | and does |
//! |---|---|---|
//! | reserve | nothing | nothing; kubelet asks again |
//! | launch | a shim without a record | the shim leaves by itself |
//! | create_pod, CNI ADD | a pod that was never ready, its network intended | remove: CNI DEL, namespaces, record, shim |
//! | set_attached | a ready pod | adopts it; the repeated request gets the same id |

use std::sync::Arc;

use ocid_api::id::PodId;
use ocid_api::shim as wire;

use super::Pods;
use super::files;
use super::handle::{Pod, Reserved};
use crate::error::{Context, Error, Kind, Result};
use crate::network::{self, Attachment, Dns, Intent, Request};
use crate::oci::CgroupDriver;
use crate::shim::{Network, Shim};
use crate::spec::{self, PodPid, PodSpec, Scope};

impl Pods {
    /// Makes the pod and returns its id once its network is up. A repeated request joins the first, also after a
    /// restart of the daemon.
    ///
    /// # Errors
    /// Whatever failed first; nothing is left then, or what is left is listed as not ready and can be removed.
    pub async fn run(self: &Arc<Pods>, spec: PodSpec) -> Result<PodId> {
        self.handler(&spec.runtime_handler)?;
        let pod = match self.index.reserve(spec) {
            Reserved::New(pod) => pod,
            Reserved::Existing(pod) => {
                pod.birth.outcome().await?;
                return Ok(pod.id().clone());
            }
        };
        let _attended = pod.birth.attend();
        let _lifecycle = pod.lifecycle.write().await;
        let outcome = self.bring_up(&pod).await.map_err(|e| e.during(format!("run pod {}", pod.spec().name)));
        if let Err(cause) = &outcome {
            tracing::warn!(pod = %pod.id(), error = %cause, "pod did not come up");
            pod.mark_stopping();
            self.index.free_name(&pod);
            if let Err(error) = self.remove_locked(&pod).await {
                // It stays listed as not ready: kubelet can stop and remove it, and we go on trying.
                tracing::error!(pod = %pod.id(), %error, "what is left of the pod could not be removed yet");
                self.undo_later(&pod);
            }
        }
        pod.birth.is(&outcome);
        outcome?;
        tracing::info!(pod = %pod.id(), name = %pod.spec().name, "pod is ready");
        Ok(pod.id().clone())
    }

    async fn bring_up(&self, pod: &Arc<Pod>) -> Result<()> {
        let intent = self.network_intent(pod)?;
        let request = self.create_request(pod, intent.as_ref())?;
        pod.set_shim(Shim::launch(&self.launcher, pod.id()).await?); // from here on, recovery can find the pod
        let shim = pod.shim()?;
        shim.create_pod(request).await?;
        let attachment = match &intent {
            Some(intent) => encode(&self.network.attach(intent).await?)?,
            None => Vec::new(),
        };
        shim.set_attached(attachment).await // from here on, the pod is ready
    }

    /// What CNI will be asked; `None` for a pod on the host's network.
    fn network_intent(&self, pod: &Pod) -> Result<Option<Intent>> {
        let spec = pod.spec();
        if spec.namespaces.network == Scope::Node {
            return Ok(None);
        }
        let netns = self.launcher.dirs().pod(pod.id()).namespaces().join("net");
        let dns = spec.dns.clone().unwrap_or_default();
        let request = Request {
            pod_id: pod.id().to_string(),
            pod_namespace: spec.name.namespace.clone(),
            pod_name: spec.name.name.clone(),
            pod_uid: spec.name.uid.clone(),
            netns,
            port_mappings: spec.port_mappings.iter().map(port_mapping).collect::<Result<_>>()?,
            dns: Dns { servers: dns.servers, searches: dns.searches, options: dns.options },
            annotations: spec.annotations.clone(),
            cgroup_path: Some(self.cgroup_parent(pod)),
            pod_cidrs: self.network.pod_cidrs(),
        };
        self.network.intent(&request).map(Some)
    }

    fn create_request(&self, pod: &Pod, intent: Option<&Intent>) -> Result<wire::CreatePodRequest> {
        let spec = pod.spec();
        if spec.namespaces.user.is_some() {
            return Err(Error::new(Kind::Unimplemented, "user namespaces are not supported by this build"));
        }
        let host_network = spec.namespaces.network == Scope::Node;
        let host_ipc = spec.namespaces.ipc == Scope::Node;
        Ok(wire::CreatePodRequest {
            pod: pod.id().to_string(),
            metadata: encode(spec)?,
            new_net: !host_network,
            new_ipc: !host_ipc,
            // As the reference runtimes do: a pod on the host's network has the host's name.
            new_uts: !host_network,
            shared_pid: spec.namespaces.pid == PodPid::Pod,
            hostname: spec.hostname.clone(),
            sysctls: spec.sysctls.clone().into_iter().collect(),
            shm_bytes: if host_ipc { 0 } else { self.config.shm_bytes },
            files: files::of(spec),
            network_intent: intent.map(encode).transpose()?.unwrap_or_default(),
            runtime: Some(self.runtime_of(pod)?).into(),
            cgroup: if self.owns_cgroup(spec) { self.cgroup_parent(pod) } else { String::new() },
            ..Default::default()
        })
    }

    /// The cgroup below which the pod's containers go: what was asked, or one of our own for each pod.
    pub(super) fn cgroup_parent(&self, pod: &Pod) -> String {
        match pod.spec().cgroup_parent.as_str() {
            "" => format!("{}/{}", self.config.cgroup_parent.trim_end_matches('/'), pod.id()),
            asked => asked.to_owned(),
        }
    }

    /// Whether the pod's cgroup goes with the pod. What kubelet made kubelet removes, and systemd removes its slices.
    fn owns_cgroup(&self, spec: &PodSpec) -> bool {
        spec.cgroup_parent.is_empty() && self.cgroup_driver == CgroupDriver::Cgroupfs
    }
}

fn port_mapping(asked: &spec::PortMapping) -> Result<network::PortMapping> {
    let host_ip = match asked.host_ip.as_str() {
        "" => None,
        ip => {
            Some(ip.parse().context(Kind::InvalidArgument, || format!("host ip {ip:?} of a port mapping"))?)
        }
    };
    Ok(network::PortMapping {
        host_port: asked.host_port,
        container_port: asked.container_port,
        protocol: match asked.protocol {
            spec::Protocol::Tcp => network::Protocol::Tcp,
            spec::Protocol::Udp => network::Protocol::Udp,
            spec::Protocol::Sctp => network::Protocol::Sctp,
        },
        host_ip,
    })
}

/// What is needed to undo a pod's network; `None` if there is nothing to undo.
pub(super) fn network_of(network: &Network) -> Result<Option<(Intent, Option<Attachment>)>> {
    if network.intent.is_empty() {
        return Ok(None);
    }
    let what = || "understand the recorded network".to_owned();
    let intent = serde_json::from_slice(&network.intent).context(Kind::Internal, what)?;
    let attachment = match network.result.is_empty() {
        true => None,
        false => Some(serde_json::from_slice(&network.result).context(Kind::Internal, what)?),
    };
    Ok(Some((intent, attachment)))
}

pub(super) fn encode(value: &impl serde::Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).context(Kind::Internal, || "encode metadata".into())
}
