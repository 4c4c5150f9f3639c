//! Create, start, stop and reopen the log of a container.

use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ocid_api::id::ContainerId;
use ocid_api::shim as wire;

use super::Pods;
use super::handle::{Container, ContainerMetadata, Pod, Reserved};
use super::run::encode;
use crate::error::{Context, Error, Kind, Result};
use crate::host;
use crate::image::Image;
use crate::oci::{self, ImageDefaults};
use crate::rooted::Rooted;
use crate::shim::ContainerPhase;
use crate::spec::{self, ContainerSpec, Profile, Scope};

/// How long it may take to look at the paths that a container names.
const CONFIGURE_DEADLINE: Duration = Duration::from_secs(30);
/// Largest /etc/passwd or /etc/group of an image that is read, in bytes.
const USER_FILE_BYTES_MAX: u64 = 10 << 20;
/// Largest seccomp profile that is read, in bytes.
const PROFILE_BYTES_MAX: u64 = 1 << 20;

impl Pods {
    /// Makes a container in a ready pod. Nothing of the user's process has run when this returns. A repeated request
    /// joins the first.
    ///
    /// # Errors
    /// `NotFound` for the pod or the image; `FailedPrecondition` if the pod is not ready; `InvalidArgument` for what
    /// the runtime refuses. Nothing is left then.
    pub async fn create_container(
        self: &Arc<Pods>,
        pod: &Arc<Pod>,
        spec: ContainerSpec,
    ) -> Result<ContainerId> {
        pod.accepts_work()?;
        let _lifecycle = pod.lifecycle.read().await;
        pod.accepts_work()?;
        if let Some(container) = pod.named(&spec.name) {
            container.birth.outcome().await?;
            return Ok(container.id().clone());
        }
        let name = spec.name.name.clone();
        let (image, lease) = self.images.lease(&spec.image.image)?;
        let id = ContainerId::generate();
        let prepared = self.prepare(pod, &id, spec, &image).await?;
        let container = match pod.reserve(Container::new(id, prepared.metadata, lease)) {
            Reserved::New(container) => container,
            Reserved::Existing(container) => {
                container.birth.outcome().await?;
                return Ok(container.id().clone());
            }
        };
        let _attended = container.birth.attend();
        self.index.add_container(pod, container.id());
        let outcome = self
            .make(pod, &container, &prepared.config)
            .await
            .map_err(|e| e.during(format!("create container {name} in pod {}", pod.id())));
        if outcome.is_err()
            && let Err(error) = self.remove_container_locked(pod, container.id()).await
        {
            tracing::error!(container = %container.id(), %error, "what is left of the container could not be removed yet");
            self.undo_containers_later(pod, vec![container.id().clone()]);
        }
        container.birth.is(&outcome);
        outcome?;
        tracing::info!(pod = %pod.id(), container = %container.id(), name, "container created");
        Ok(container.id().clone())
    }

    async fn make(&self, pod: &Pod, container: &Container, config: &[u8]) -> Result<()> {
        let id = container.id();
        let (snapshots, owner, chain_ids) =
            (Arc::clone(&self.snapshots), id.clone(), container.metadata().chain_ids.clone());
        let rootfs = tokio::task::spawn_blocking(move || snapshots.prepare(&owner, &chain_ids))
            .await
            .context(Kind::Internal, || "prepare the root filesystem".into())??;
        let spec = container.spec();
        let text = |path: &std::path::Path| path.to_string_lossy().into_owned();
        let request = wire::CreateContainerRequest {
            container: id.to_string(),
            metadata: encode(container.metadata())?,
            config: config.to_vec(),
            rootfs: Some(wire::Rootfs {
                lower: rootfs.lower.iter().map(|dir| text(dir)).collect(),
                upper: text(&rootfs.upper),
                work: text(&rootfs.work),
                ..Default::default()
            })
            .into(),
            stdio: Some(wire::Stdio {
                log_directory: if spec.log_path.is_empty() {
                    String::new()
                } else {
                    pod.spec().log_directory.clone()
                },
                log_path: spec.log_path.clone(),
                tty: spec.tty,
                stdin: spec.stdin,
                stdin_once: spec.stdin_once,
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        pod.shim()?.create_container(id, request).await
    }

    /// [`Pods::configure`] where blocking is allowed, for it looks at paths of volumes, and a dead file server can make
    /// that last for ever.
    async fn prepare(
        self: &Arc<Pods>,
        pod: &Arc<Pod>,
        id: &ContainerId,
        spec: ContainerSpec,
        image: &Arc<Image>,
    ) -> Result<Prepared> {
        let (pods, pod, id, image) = (Arc::clone(self), Arc::clone(pod), id.clone(), Arc::clone(image));
        let work = async {
            let what = || "configure the container".to_owned();
            let turn = Arc::clone(&self.configuring).acquire_owned().await.context(Kind::Internal, what)?;
            let configure = move || {
                // Held by the thread, which may hang for longer than anybody waits for it.
                let _turn = turn;
                pods.configure(&pod, &id, spec, &image)
            };
            tokio::task::spawn_blocking(configure).await.context(Kind::Internal, what)?
        };
        match tokio::time::timeout(CONFIGURE_DEADLINE, work).await {
            Ok(configured) => configured,
            Err(_) => Err(Error::new(
                Kind::DeadlineExceeded,
                format!("a path of a volume or device could not be looked at within {CONFIGURE_DEADLINE:?}"),
            )),
        }
    }

    /// The runtime's configuration and our metadata for a new container.
    fn configure(&self, pod: &Pod, id: &ContainerId, spec: ContainerSpec, image: &Image) -> Result<Prepared> {
        if !spec.cdi_devices.is_empty() {
            return Err(Error::new(Kind::Unimplemented, "CDI devices are not supported by this build"));
        }
        let config = self.images.config(image)?;
        let rootfs = self.snapshots.view(&image.chain_ids)?;
        let user = oci::user::resolve(
            &spec.security,
            &config.user,
            &text_of(&rootfs, "/etc/passwd")?,
            &text_of(&rootfs, "/etc/group")?,
        )?;
        let mut devices = Vec::new();
        for device in &spec.devices {
            devices.extend(host::device_nodes(device)?);
        }
        if spec.security.privileged {
            devices.extend(host::all_device_nodes()?);
        }
        let seccomp_profile = match &spec.security.seccomp {
            Some(Profile::Localhost(path)) => Some(local_profile(path)?),
            _ => None,
        };
        let paths = self.launcher.dirs().pod(pod.id());
        let file = |name: &str| Some(paths.files().join(name));
        let host_ipc = pod.spec().namespaces.ipc == Scope::Node;
        let defaults = ImageDefaults {
            entrypoint: config.entrypoint,
            cmd: config.cmd,
            env: config.env,
            working_dir: config.working_dir,
            user: config.user,
            stop_signal: config.stop_signal,
        };
        let runtime_spec = oci::runtime_spec(&oci::Input {
            pod: pod.spec(),
            container: &spec,
            image: &defaults,
            user: &user,
            namespaces: &self.namespaces(pod, &spec)?,
            files: &oci::PodFiles {
                resolv_conf: file("resolv.conf"),
                hostname: file("hostname"),
                hosts: file("hosts"),
                shm: Some(if host_ipc { "/dev/shm".into() } else { paths.shm() }),
            },
            mount_sources: &spec.mounts.iter().map(mount_source).collect::<Result<Vec<_>>>()?,
            devices: &devices,
            cgroups_path: &oci::cgroup_path(self.cgroup_driver, &self.cgroup_parent(pod), pod.id(), id).oci,
            seccomp_profile: seccomp_profile.as_deref(),
            host: &self.host,
            runtime: &self.handler(&pod.spec().runtime_handler)?.features,
            policy: &self.policy,
        })?;
        let process = runtime_spec.process().clone().unwrap_or_default();
        let stop_signal = oci::stop_signal(&spec, &defaults);
        let config = encode(&runtime_spec)?;
        let metadata = ContainerMetadata {
            spec,
            image_id: image.id.to_string(),
            image_ref: image.repo_digests.first().cloned().unwrap_or_else(|| image.id.to_string()),
            chain_ids: image.chain_ids.clone(),
            stop_signal: stop_signal.number().into(),
            process,
        };
        Ok(Prepared { metadata, config })
    }

    /// Starts a container that has been created. Starting a running one is success.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` if it has ended; what the runtime says if the process cannot be started.
    pub async fn start_container(&self, text: &str) -> Result<()> {
        let (pod, container) = self.index.container(text)?;
        let _lifecycle = pod.lifecycle.read().await;
        pod.accepts_work()?;
        pod.shim()?.start_container(container.id()).await?;
        tracing::info!(pod = %pod.id(), container = %container.id(), "container started");
        Ok(())
    }

    /// Stops a container: its stop signal, then after `grace` SIGKILL to all of it. Needs no lifecycle lock, so a long
    /// stop blocks nobody. Unknown, created and ended are success.
    ///
    /// # Errors
    /// `DeadlineExceeded` if the kernel cannot end it.
    pub async fn stop_container(&self, text: &str, grace: Duration) -> Result<()> {
        let (pod, container) = match self.index.container(text) {
            Err(error) if error.kind() == Kind::NotFound => return Ok(()),
            found => found?,
        };
        if pod.container_state(container.id()).is_none_or(|state| state.phase == ContainerPhase::Exited) {
            return Ok(());
        }
        let signal = container.metadata().stop_signal;
        pod.shim()?.stop_container(container.id(), signal, grace).await?;
        tracing::info!(pod = %pod.id(), container = %container.id(), "container stopped");
        Ok(())
    }

    /// Opens the log file of a running container anew, after kubelet renamed it.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` if it does not run; no new file exists then.
    pub async fn reopen_log(&self, text: &str) -> Result<()> {
        let (pod, container) = self.index.container(text)?;
        match pod.container_state(container.id()).map(|state| state.phase) {
            Some(ContainerPhase::Running) => pod.shim()?.reopen_log(container.id()).await,
            _ => Err(Error::precondition(format!("container {} is not running", container.id()))),
        }
    }
}

/// A file of an image; empty if the image has none, or something else under its name.
fn text_of(rootfs: &Rooted, path: &str) -> Result<Vec<u8>> {
    match rootfs.read_file(path, USER_FILE_BYTES_MAX) {
        Err(error) if error.kind() == Kind::NotFound => Ok(Vec::new()),
        read => read,
    }
}

/// A seccomp profile of the node.
fn local_profile(path: &str) -> Result<Vec<u8>> {
    let what = || format!("read seccomp profile {path}");
    let file = fs::File::open(path).context(Kind::InvalidArgument, what)?;
    let mut text = Vec::new();
    file.take(PROFILE_BYTES_MAX).read_to_end(&mut text).context(Kind::InvalidArgument, what)?;
    Ok(text)
}

/// The path of a volume on the node, symbolic links followed here, before anything is mounted.
fn mount_source(mount: &spec::Mount) -> Result<PathBuf> {
    if mount.image.is_some() {
        return Err(Error::new(Kind::Unimplemented, "image volumes are not supported by this build"));
    }
    let what = || format!("volume {:?} for {:?}", mount.host_path, mount.container_path);
    fs::canonicalize(&mount.host_path).context(Kind::InvalidArgument, what)
}

struct Prepared {
    metadata: ContainerMetadata,
    config: Vec<u8>,
}
