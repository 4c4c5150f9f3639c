//! Which namespaces a container joins, and which it gets for itself.
//!
//! A namespace that is not in the list is the node's. So a path that should be there and is not is an error.

use std::path::PathBuf;

use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder, LinuxNamespace, LinuxNamespaceType};
use ocid_api::cgroup::Version;

use super::Input;
use crate::error::{Error, Result};
use crate::spec::{ContainerPid, IdMapping, PodPid, Scope};

pub(super) fn namespaces(input: &Input<'_>) -> Result<Vec<LinuxNamespace>> {
    let (asked, paths) = (&input.pod.namespaces, input.namespaces);
    let mut list = vec![own(LinuxNamespaceType::Mount)];
    if asked.network == Scope::Pod {
        list.push(joined(LinuxNamespaceType::Network, paths.net.as_ref())?);
        // Without a network of its own a pod shows the node's name.
        list.push(joined(LinuxNamespaceType::Uts, paths.uts.as_ref())?);
    }
    if asked.ipc == Scope::Pod {
        list.push(joined(LinuxNamespaceType::Ipc, paths.ipc.as_ref())?);
    }
    list.extend(pid(input)?);
    if asked.user.is_some() {
        list.push(joined(LinuxNamespaceType::User, paths.user.as_ref())?);
    }
    // On v1, a cgroup namespace hides less than it breaks.
    if input.host.cgroup == Version::V2 && !input.container.security.privileged {
        list.push(own(LinuxNamespaceType::Cgroup));
    }
    Ok(list)
}

fn pid(input: &Input<'_>) -> Result<Option<LinuxNamespace>> {
    let of_pod = input.pod.namespaces.pid;
    match (&input.container.security.pid, of_pod) {
        (ContainerPid::Container, _) => Ok(Some(own(LinuxNamespaceType::Pid))),
        (ContainerPid::Target(_), _) => {
            joined(LinuxNamespaceType::Pid, input.namespaces.target_pid.as_ref()).map(Some)
        }
        (ContainerPid::Pod, PodPid::Pod) => {
            joined(LinuxNamespaceType::Pid, input.namespaces.pid.as_ref()).map(Some)
        }
        (ContainerPid::Pod | ContainerPid::Node, PodPid::Node) => Ok(None),
        (ContainerPid::Pod, PodPid::Container) => {
            Err(Error::invalid("the pod has no PID namespace to share"))
        }
        (ContainerPid::Node, _) => {
            Err(Error::invalid("the container wants the node's PID namespace, but its pod does not use it"))
        }
    }
}

fn own(typ: LinuxNamespaceType) -> LinuxNamespace {
    let mut namespace = LinuxNamespace::default();
    namespace.set_typ(typ).set_path(None);
    namespace
}

fn joined(typ: LinuxNamespaceType, path: Option<&PathBuf>) -> Result<LinuxNamespace> {
    let path =
        path.ok_or_else(|| Error::internal(format!("the path of the {typ} namespace to join is missing")))?;
    let mut namespace = LinuxNamespace::default();
    namespace.set_typ(typ).set_path(Some(path.clone()));
    Ok(namespace)
}

/// Runtimes want them even where the user namespace is joined.
pub(super) fn id_mappings(input: &Input<'_>) -> (Option<Vec<LinuxIdMapping>>, Option<Vec<LinuxIdMapping>>) {
    match &input.pod.namespaces.user {
        Some(user) => (Some(oci_mappings(&user.uids)), Some(oci_mappings(&user.gids))),
        None => (None, None),
    }
}

pub(super) fn oci_mappings(mappings: &[IdMapping]) -> Vec<LinuxIdMapping> {
    mappings
        .iter()
        .map(|mapping| {
            LinuxIdMappingBuilder::default()
                .host_id(mapping.host_id)
                .container_id(mapping.container_id)
                .size(mapping.length)
                .build()
                .expect("every member has a default")
        })
        .collect()
}
