//! The OCI runtime specification of a container: the recipe, in the order of the OCI document.
//!
//! Pure: files, paths and facts about the machine come in as [`Input`], a document comes out. What was not asked for is
//! not granted: where a fact that a request needs is missing, the answer is an error and never a wider permission.
//! Annotations and the image's labels never get into the document.

mod mounts;
mod namespaces;
mod process;
mod resources;
mod seccomp;
mod security;
pub mod user;

use std::path::{Path, PathBuf};

use oci_spec::runtime::{Root, Spec};

use crate::error::{Error, Result};
use crate::host::{DeviceNode, Host, RuntimeFeatures};
use crate::spec::{ContainerSpec, PodSpec, Profile};

pub use process::{exec_process, stop_signal};
pub use resources::{CgroupDriver, CgroupPath, cgroup_path, linux_resources};
pub use seccomp::PROFILE_BYTES_MAX as SECCOMP_PROFILE_BYTES_MAX;
pub use user::User;

/// Everything that a container's document is made from.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// The pod.
    pub pod: &'a PodSpec,
    /// The container.
    pub container: &'a ContainerSpec,
    /// What its image says where the container does not.
    pub image: &'a ImageDefaults,
    /// Who it runs as, from [`user::resolve`].
    pub user: &'a User,
    /// Namespaces that it joins.
    pub namespaces: &'a NamespacePaths,
    /// Files that its pod gives it.
    pub files: &'a PodFiles,
    /// For each of the container's mounts, in their order, the path on the node: symbolic links followed, images mounted.
    pub mount_sources: &'a [PathBuf],
    /// Devices asked for, and for a privileged container those of the node.
    pub devices: &'a [DeviceNode],
    /// The document's `cgroupsPath`: [`CgroupPath::oci`].
    pub cgroups_path: &'a str,
    /// The text of the seccomp profile, if a profile of the node was asked for.
    pub seccomp_profile: Option<&'a [u8]>,
    /// This machine.
    pub host: &'a Host,
    /// Its OCI runtime.
    pub runtime: &'a RuntimeFeatures,
    /// What the operator decided.
    pub policy: &'a Policy,
}

/// What an image says about how to run it. Its author is not trusted: nothing here widens what the container may do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageDefaults {
    /// Program and first arguments.
    pub entrypoint: Vec<String>,
    /// Further arguments.
    pub cmd: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Empty for `/`.
    pub working_dir: String,
    /// As `user`, `uid`, `user:group` or `uid:gid`; empty for root.
    pub user: String,
    /// As `SIGTERM` or `15`; empty for SIGTERM.
    pub stop_signal: String,
}

/// Paths of the namespaces that a container joins. `None`: its pod has none of that kind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NamespacePaths {
    /// Network.
    pub net: Option<PathBuf>,
    /// IPC.
    pub ipc: Option<PathBuf>,
    /// Host name.
    pub uts: Option<PathBuf>,
    /// The pod's processes.
    pub pid: Option<PathBuf>,
    /// Users.
    pub user: Option<PathBuf>,
    /// The processes of the container that this one targets.
    pub target_pid: Option<PathBuf>,
}

/// Paths of what a pod gives to all its containers. `None`: it gives none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodFiles {
    /// For /etc/hosts.
    pub hosts: Option<PathBuf>,
    /// For /etc/hostname.
    pub hostname: Option<PathBuf>,
    /// For /etc/resolv.conf.
    pub resolv_conf: Option<PathBuf>,
    /// For /dev/shm; the node's where the pod uses the node's IPC namespace.
    pub shm: Option<PathBuf>,
}

/// What the operator decided for all containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Processes and threads that a container may have; `None` for no limit.
    pub pids_limit: Option<i64>,
    /// The seccomp profile of a container that says nothing.
    pub seccomp_unset: Profile,
    /// Whether programs of the machine's 32-bit kin can run under our seccomp profile; it costs 20 ms per start.
    pub seccomp_compat_architectures: bool,
    /// The loaded AppArmor profile that is the default; empty if there is none.
    pub apparmor_profile: String,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            pids_limit: None,
            seccomp_unset: Profile::Unconfined,
            seccomp_compat_architectures: true,
            apparmor_profile: String::new(),
        }
    }
}

/// The root filesystem's path in the document, relative to the bundle.
pub const ROOTFS: &str = "rootfs";

/// The version of the specification that the documents follow: the oldest that has all we use.
const OCI_VERSION: &str = "1.0.2";

/// The document for a container.
///
/// # Errors
/// `InvalidArgument` if the request cannot be met on this machine, with the name of what stands against it.
pub fn runtime_spec(input: &Input<'_>) -> Result<Spec> {
    if input.container.security.privileged && !input.pod.security.privileged {
        return Err(Error::invalid("the container is privileged, but its pod is not"));
    }
    let mut root = Root::default();
    root.set_path(PathBuf::from(ROOTFS)).set_readonly(Some(input.container.security.readonly_rootfs));

    let mut spec = Spec::default();
    spec.set_version(OCI_VERSION.to_owned())
        .set_process(Some(process::process(input)?))
        .set_root(Some(root))
        // The pod's UTS namespace has its name already.
        .set_hostname(None)
        .set_mounts(Some(mounts::mounts(input)?))
        .set_annotations(None)
        .set_linux(Some(linux(input)?));
    Ok(spec)
}

fn linux(input: &Input<'_>) -> Result<oci_spec::runtime::Linux> {
    let (uid_mappings, gid_mappings) = namespaces::id_mappings(input);
    let mut linux = oci_spec::runtime::Linux::default();
    linux
        .set_namespaces(Some(namespaces::namespaces(input)?))
        .set_uid_mappings(uid_mappings)
        .set_gid_mappings(gid_mappings)
        .set_devices(resources::devices(input))
        .set_cgroups_path(Some(Path::new(input.cgroups_path).to_owned()))
        .set_resources(Some(resources::resources(input)?))
        .set_rootfs_propagation(mounts::rootfs_propagation(input))
        .set_seccomp(security::seccomp(input)?)
        .set_masked_paths(Some(security::masked_paths(input)))
        .set_readonly_paths(Some(security::readonly_paths(input)))
        .set_mount_label(security::mount_label(input));
    Ok(linux)
}

#[cfg(test)]
mod tests;
