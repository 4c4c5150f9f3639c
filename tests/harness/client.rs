//! A CRI client that reads like a test: one short method per RPC, and recipes for pods and containers.
//!
//! It connects when it must, so it lives through the daemon's restarts: the call that finds the daemon gone fails with
//! `Unavailable`, the next one connects anew.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use ocid_api::cri::image_service_client::ImageServiceClient;
use ocid_api::cri::runtime_service_client::RuntimeServiceClient;
use ocid_api::cri::{self, *};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// Longest that any call may take unless it says otherwise.
const TIMEOUT: Duration = Duration::from_secs(120);

/// What kubelet accepts at most.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// The result of a call.
pub type Result<T> = std::result::Result<T, Status>;

/// A client of both services. Clones share what they have seen.
#[derive(Debug, Clone)]
pub struct Client {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    seen: Arc<Mutex<BTreeSet<String>>>,
}

impl Client {
    /// A client of the daemon at this socket; connects with the first call. Needs a tokio runtime around it.
    pub fn new(socket: &Path) -> Client {
        Client::with_timeout(socket, TIMEOUT)
    }

    /// A client that gives up on each call after this time, as kubelet does.
    pub fn with_timeout(socket: &Path, timeout: Duration) -> Client {
        let socket = PathBuf::from(socket);
        let connect = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
        });
        let endpoint = Endpoint::from_static("http://localhost").timeout(timeout);
        let channel = endpoint.connect_with_connector_lazy(connect);
        Client {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX),
            images: ImageServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX),
            seen: Arc::default(),
        }
    }

    /// The whole runtime service, for calls that have no short form here.
    pub fn runtime(&self) -> RuntimeServiceClient<Channel> {
        self.runtime.clone()
    }

    /// The whole image service.
    pub fn image_service(&self) -> ImageServiceClient<Channel> {
        self.images.clone()
    }

    /// Every pod and container id that this client or a clone was given.
    pub fn seen(&self) -> Vec<String> {
        self.seen.lock().expect("no test panics while it holds this").iter().cloned().collect()
    }

    fn note(&self, id: String) -> String {
        self.seen.lock().expect("no test panics while it holds this").insert(id.clone());
        id
    }

    /// Version.
    pub async fn version(&self) -> Result<VersionResponse> {
        answer(self.runtime().version(VersionRequest::default()).await)
    }

    /// Status, with the verbose information.
    pub async fn status(&self) -> Result<StatusResponse> {
        answer(self.runtime().status(StatusRequest { verbose: true }).await)
    }

    /// RunPodSandbox with the default handler; returns the id.
    pub async fn run_pod(&self, config: &PodSandboxConfig) -> Result<String> {
        let request = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: String::new() };
        Ok(self.note(answer(self.runtime().run_pod_sandbox(request).await)?.pod_sandbox_id))
    }

    /// StopPodSandbox.
    pub async fn stop_pod(&self, id: &str) -> Result<()> {
        let request = StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        answer(self.runtime().stop_pod_sandbox(request).await).map(drop)
    }

    /// RemovePodSandbox.
    pub async fn remove_pod(&self, id: &str) -> Result<()> {
        let request = RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        answer(self.runtime().remove_pod_sandbox(request).await).map(drop)
    }

    /// PodSandboxStatus, verbose.
    pub async fn pod_info(&self, id: &str) -> Result<PodSandboxStatusResponse> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: true };
        answer(self.runtime().pod_sandbox_status(request).await)
    }

    /// The status in PodSandboxStatus.
    pub async fn pod_status(&self, id: &str) -> Result<PodSandboxStatus> {
        self.pod_info(id).await?.status.ok_or_else(|| Status::data_loss("no status in the answer"))
    }

    /// ListPodSandbox, all of them.
    pub async fn pods(&self) -> Result<Vec<PodSandbox>> {
        self.pods_where(PodSandboxFilter::default()).await
    }

    /// ListPodSandbox with a filter.
    pub async fn pods_where(&self, filter: PodSandboxFilter) -> Result<Vec<PodSandbox>> {
        let request = ListPodSandboxRequest { filter: Some(filter) };
        let pods = answer(self.runtime().list_pod_sandbox(request).await)?.items;
        pods.iter().for_each(|pod| drop(self.note(pod.id.clone())));
        Ok(pods)
    }

    /// CreateContainer; returns the id.
    pub async fn create(
        &self,
        pod: &str,
        config: &ContainerConfig,
        pod_config: &PodSandboxConfig,
    ) -> Result<String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(config.clone()),
            sandbox_config: Some(pod_config.clone()),
        };
        Ok(self.note(answer(self.runtime().create_container(request).await)?.container_id))
    }

    /// StartContainer.
    pub async fn start(&self, id: &str) -> Result<()> {
        let request = StartContainerRequest { container_id: id.to_owned() };
        answer(self.runtime().start_container(request).await).map(drop)
    }

    /// CreateContainer and StartContainer; returns the id.
    pub async fn run(
        &self,
        pod: &str,
        config: &ContainerConfig,
        pod_config: &PodSandboxConfig,
    ) -> Result<String> {
        let id = self.create(pod, config, pod_config).await?;
        self.start(&id).await?;
        Ok(id)
    }

    /// StopContainer with a grace period in seconds.
    pub async fn stop(&self, id: &str, timeout: i64) -> Result<()> {
        let request = StopContainerRequest { container_id: id.to_owned(), timeout };
        answer(self.runtime().stop_container(request).await).map(drop)
    }

    /// RemoveContainer.
    pub async fn remove(&self, id: &str) -> Result<()> {
        let request = RemoveContainerRequest { container_id: id.to_owned() };
        answer(self.runtime().remove_container(request).await).map(drop)
    }

    /// ContainerStatus, verbose.
    pub async fn container_info(&self, id: &str) -> Result<ContainerStatusResponse> {
        let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: true };
        answer(self.runtime().container_status(request).await)
    }

    /// The status in ContainerStatus.
    pub async fn container_status(&self, id: &str) -> Result<ContainerStatus> {
        self.container_info(id).await?.status.ok_or_else(|| Status::data_loss("no status in the answer"))
    }

    /// The process id of a container's init, from the verbose information.
    pub async fn pid(&self, id: &str) -> Result<u32> {
        let info = self.container_info(id).await?.info;
        let text = info.get("info").ok_or_else(|| Status::data_loss("no info in the verbose answer"))?;
        let info: serde_json::Value =
            serde_json::from_str(text).map_err(|e| Status::data_loss(format!("info is no JSON: {e}")))?;
        let pid = info["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
        pid.ok_or_else(|| Status::data_loss(format!("no pid in {text}")))
    }

    /// ListContainers, all of them.
    pub async fn containers(&self) -> Result<Vec<cri::Container>> {
        self.containers_where(ContainerFilter::default()).await
    }

    /// ListContainers with a filter.
    pub async fn containers_where(&self, filter: ContainerFilter) -> Result<Vec<cri::Container>> {
        let request = ListContainersRequest { filter: Some(filter) };
        let containers = answer(self.runtime().list_containers(request).await)?.containers;
        containers.iter().for_each(|c| drop(self.note(c.id.clone())));
        Ok(containers)
    }

    /// Waits until a container has exited and returns its status.
    pub async fn exited(&self, id: &str) -> ContainerStatus {
        crate::eventually(Duration::from_secs(30), "the container exits", async || {
            let status = self.container_status(id).await.map_err(|e| e.to_string())?;
            let state = status.state();
            if state == ContainerState::ContainerExited { Ok(status) } else { Err(format!("{state:?}")) }
        })
        .await
    }

    /// ExecSync without a time-out.
    pub async fn exec(&self, id: &str, command: &[&str]) -> Result<ExecSyncResponse> {
        self.exec_for(id, command, 0).await
    }

    /// ExecSync with a time-out in seconds.
    pub async fn exec_for(&self, id: &str, command: &[&str], timeout: i64) -> Result<ExecSyncResponse> {
        let cmd = command.iter().map(|&word| word.to_owned()).collect();
        let request = ExecSyncRequest { container_id: id.to_owned(), cmd, timeout };
        answer(self.runtime().exec_sync(request).await)
    }

    /// ExecSync of a shell line that must succeed; returns its output without the last newline.
    pub async fn shell(&self, id: &str, line: &str) -> String {
        let answer =
            self.exec(id, &["sh", "-c", line]).await.unwrap_or_else(|e| panic!("exec {line:?}: {e}"));
        let stderr = String::from_utf8_lossy(&answer.stderr).into_owned();
        assert_eq!(answer.exit_code, 0, "{line:?}: {stderr}");
        String::from_utf8_lossy(&answer.stdout).trim_end_matches('\n').to_owned()
    }

    /// ReopenContainerLog.
    pub async fn reopen_log(&self, id: &str) -> Result<()> {
        let request = ReopenContainerLogRequest { container_id: id.to_owned() };
        answer(self.runtime().reopen_container_log(request).await).map(drop)
    }

    /// PullImage without credentials; returns the image reference.
    pub async fn pull(&self, image: &str) -> Result<String> {
        self.pull_as(image, None).await
    }

    /// PullImage with credentials.
    pub async fn pull_as(&self, image: &str, auth: Option<AuthConfig>) -> Result<String> {
        let request = PullImageRequest { image: Some(spec(image)), auth, sandbox_config: None };
        Ok(answer(self.image_service().pull_image(request).await)?.image_ref)
    }

    /// ImageStatus, verbose; `None` if there is no such image.
    pub async fn image(&self, image: &str) -> Result<Option<cri::Image>> {
        let request = ImageStatusRequest { image: Some(spec(image)), verbose: true };
        Ok(answer(self.image_service().image_status(request).await)?.image)
    }

    /// ListImages, all of them.
    pub async fn images(&self) -> Result<Vec<cri::Image>> {
        Ok(answer(self.image_service().list_images(ListImagesRequest::default()).await)?.images)
    }

    /// RemoveImage.
    pub async fn remove_image(&self, image: &str) -> Result<()> {
        let request = RemoveImageRequest { image: Some(spec(image)) };
        answer(self.image_service().remove_image(request).await).map(drop)
    }

    /// ImageFsInfo.
    pub async fn image_fs(&self) -> Result<ImageFsInfoResponse> {
        answer(self.image_service().image_fs_info(ImageFsInfoRequest {}).await)
    }

    /// Stops and removes every pod, again and again until none is listed or the deadline has passed.
    ///
    /// # Errors
    /// What was said last.
    pub async fn remove_all(&self, deadline: Duration) -> std::result::Result<(), String> {
        let begun = std::time::Instant::now();
        loop {
            let left = match self.remove_listed().await {
                Ok(0) => return Ok(()),
                Ok(left) => format!("{left} pods are still listed"),
                Err(e) => e.to_string(),
            };
            if begun.elapsed() > deadline {
                return Err(left);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn remove_listed(&self) -> Result<usize> {
        let mut tasks = tokio::task::JoinSet::new();
        for pod in self.pods().await? {
            let client = self.clone();
            tasks.spawn(async move {
                client.stop_pod(&pod.id).await?;
                client.remove_pod(&pod.id).await
            });
        }
        for result in tasks.join_all().await {
            result?;
        }
        Ok(self.pods().await?.len())
    }
}

fn answer<T>(response: std::result::Result<tonic::Response<T>, Status>) -> Result<T> {
    response.map(tonic::Response::into_inner)
}

/// An image by its name.
pub fn spec(image: &str) -> ImageSpec {
    ImageSpec { image: image.to_owned(), ..Default::default() }
}

/// A pod as kubelet would ask for it: pod network and ipc, a pid namespace per container, a uid of its own.
pub fn pod(name: &str, log_directory: &Path) -> PodSandboxConfig {
    let namespaces = NamespaceOption {
        network: NamespaceMode::Pod.into(),
        pid: NamespaceMode::Container.into(),
        ipc: NamespaceMode::Pod.into(),
        ..Default::default()
    };
    let security = LinuxSandboxSecurityContext { namespace_options: Some(namespaces), ..Default::default() };
    let uid = ocid_api::id::PodId::generate().to_string()[..32].to_owned();
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_owned(),
            uid: uid.clone(),
            namespace: "default".to_owned(),
            attempt: 0,
        }),
        hostname: name.to_owned(),
        log_directory: log_directory.join(format!("{name}-{uid}")).display().to_string(),
        labels: BTreeMap::from([
            ("io.kubernetes.pod.name".to_owned(), name.to_owned()),
            ("io.kubernetes.pod.namespace".to_owned(), "default".to_owned()),
            ("io.kubernetes.pod.uid".to_owned(), uid),
        ]),
        linux: Some(LinuxPodSandboxConfig { security_context: Some(security), ..Default::default() }),
        ..Default::default()
    }
}

/// A container of an image with a command of its own; logs to `<name>/0.log`.
pub fn container(name: &str, image: &str, command: &[&str]) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(spec(image)),
        command: command.iter().map(|&word| word.to_owned()).collect(),
        labels: BTreeMap::from([("io.kubernetes.container.name".to_owned(), name.to_owned())]),
        log_path: format!("{name}/0.log"),
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(NamespaceOption {
                    pid: NamespaceMode::Container.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The namespace options of a pod made by [`pod`], to be changed.
pub fn namespaces(config: &mut PodSandboxConfig) -> &mut NamespaceOption {
    let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
    security.namespace_options.get_or_insert_default()
}

/// The security context of a container made by [`container`], to be changed.
pub fn security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    config.linux.get_or_insert_default().security_context.get_or_insert_default()
}

/// Asserts that a call failed with one of these codes and says why in words; returns the words.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(result: Result<T>, codes: &[Code]) -> String {
    let status = result.expect_err("this must be refused");
    assert!(
        codes.contains(&status.code()),
        "{:?} is not one of {codes:?}: {}",
        status.code(),
        status.message()
    );
    assert!(status.message().len() > 5, "an error must say what is wrong: {status:?}");
    assert!(status.message().len() <= 4096, "an error of {} bytes", status.message().len());
    status.message().to_owned()
}
