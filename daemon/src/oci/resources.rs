//! Limits, devices, and the cgroup that enforces both.

use oci_spec::runtime::{
    LinuxCpu, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, LinuxHugepageLimit, LinuxMemory, LinuxPids,
    LinuxResources,
};
use ocid_api::cgroup::Version;
use ocid_api::id::{ContainerId, PodId};

use super::Input;
use crate::error::{Error, Result};
use crate::host::{DeviceKind, DeviceNode, Host};
use crate::spec::Resources;

/// The bounds of cpu.shares; the kernel moves what is outside, but only on v1.
const CPU_SHARES: (u64, u64) = (2, 262_144);

pub(super) fn resources(input: &Input<'_>) -> Result<LinuxResources> {
    let mut resources = linux_resources(&input.container.resources, input.host)?;
    if resources.pids().is_none() {
        resources.set_pids(input.policy.pids_limit.and_then(|limit| pids(limit, input.host)));
    }
    resources.set_devices(Some(device_rules(input)));
    Ok(resources)
}

/// The limits alone, for an update too: what was not said is left as it is.
///
/// # Errors
/// `InvalidArgument` for limits that this machine cannot keep.
pub fn linux_resources(asked: &Resources, host: &Host) -> Result<LinuxResources> {
    if !asked.unified.is_empty() && host.cgroup == Version::V1 {
        return Err(Error::invalid("resources.unified needs cgroup v2, and this machine has v1"));
    }
    let text = |text: &String| (!text.is_empty()).then(|| text.clone());

    let mut cpu = LinuxCpu::default();
    cpu.set_shares(asked.cpu_shares.map(|shares| shares.clamp(CPU_SHARES.0, CPU_SHARES.1)))
        .set_quota(asked.cpu_quota)
        .set_period(asked.cpu_period)
        .set_cpus(text(&asked.cpuset_cpus))
        .set_mems(text(&asked.cpuset_mems));

    let mut memory = LinuxMemory::default();
    // Without accounting there is nothing to limit, and runtimes fail.
    let swap = asked.memory_swap_limit.filter(|_| host.swap_accounting);
    memory.set_limit(asked.memory_limit).set_swap(swap);

    // Clients list every size that they know of, and zero for those that are not used.
    let hugepages: Vec<_> = asked
        .hugepage_limits
        .iter()
        .filter(|limit| host.hugepage_sizes.contains(&limit.page_size))
        .map(|limit| {
            let mut out = LinuxHugepageLimit::default();
            out.set_page_size(limit.page_size.clone())
                .set_limit(i64::try_from(limit.limit).unwrap_or(i64::MAX));
            out
        })
        .collect();

    let mut resources = LinuxResources::default();
    resources
        .set_cpu((cpu != LinuxCpu::default()).then_some(cpu))
        .set_memory((memory != LinuxMemory::default()).then_some(memory))
        .set_pids(asked.pids_limit.and_then(|limit| pids(limit, host)))
        .set_hugepage_limits((!hugepages.is_empty()).then_some(hugepages));
    if !asked.unified.is_empty() {
        resources.set_unified(Some(asked.unified.clone().into_iter().collect()));
    }
    Ok(resources)
}

fn pids(limit: i64, host: &Host) -> Option<LinuxPids> {
    let mut pids = LinuxPids::default();
    pids.set_limit(limit);
    host.has_controller("pids").then_some(pids)
}

/// First nothing, then what every program needs, then what was asked for.
fn device_rules(input: &Input<'_>) -> Vec<LinuxDeviceCgroup> {
    use LinuxDeviceType::{B, C};
    if input.container.security.privileged {
        return vec![rule(true, None, None, None, "rwm")];
    }
    let mut rules = vec![
        rule(false, None, None, None, "rwm"),
        // Making a node is harmless while it cannot be opened.
        rule(true, Some(C), None, None, "m"),
        rule(true, Some(B), None, None, "m"),
    ];
    // null, zero, full, random, urandom, tty; ptmx, and the terminals of the container's own devpts.
    for (major, minor) in [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)] {
        rules.push(rule(true, Some(C), Some(major), Some(minor), "rwm"));
    }
    rules.push(rule(true, Some(C), Some(136), None, "rwm"));
    rules.extend(input.devices.iter().map(|device| {
        rule(
            true,
            Some(device_type(device.kind)),
            Some(device.major.into()),
            Some(device.minor.into()),
            &device.permissions,
        )
    }));
    rules
}

fn rule(
    allow: bool,
    typ: Option<LinuxDeviceType>,
    major: Option<i64>,
    minor: Option<i64>,
    access: &str,
) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(allow).set_typ(typ).set_major(major).set_minor(minor).set_access(Some(access.to_owned()));
    rule
}

/// The nodes to make, beside those that every runtime makes by itself.
pub(super) fn devices(input: &Input<'_>) -> Option<Vec<LinuxDevice>> {
    let devices: Vec<_> = input.devices.iter().map(device).collect();
    (!devices.is_empty()).then_some(devices)
}

fn device(node: &DeviceNode) -> LinuxDevice {
    let mut device = LinuxDevice::default();
    device
        .set_path(node.path.clone())
        .set_typ(device_type(node.kind))
        .set_major(node.major.into())
        .set_minor(node.minor.into())
        .set_file_mode(Some(node.mode))
        .set_uid(Some(node.uid))
        .set_gid(Some(node.gid));
    device
}

fn device_type(kind: DeviceKind) -> LinuxDeviceType {
    match kind {
        DeviceKind::Char => LinuxDeviceType::C,
        DeviceKind::Block => LinuxDeviceType::B,
    }
}

/// Who makes cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CgroupDriver {
    /// The runtime, as directories.
    Cgroupfs,
    /// systemd, as slices and scopes.
    Systemd,
}

/// Where a container's cgroup is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupPath {
    /// As the OCI document says it.
    pub oci: String,
    /// Below the mount of each hierarchy, beginning with a slash.
    pub path: String,
}

/// Our own part in names.
const PREFIX: &str = "ocid";

/// The cgroup of a container whose pod has that `cgroup_parent`, in either of kubelet's spellings.
pub fn cgroup_path(driver: CgroupDriver, parent: &str, pod: &PodId, container: &ContainerId) -> CgroupPath {
    let id = container.as_str();
    match driver {
        CgroupDriver::Cgroupfs => {
            let path = match parent_directory(parent) {
                Some(parent) => format!("{parent}/{id}"),
                None => format!("/{PREFIX}/{}/{id}", pod.as_str()),
            };
            CgroupPath { oci: path.clone(), path }
        }
        CgroupDriver::Systemd => {
            let slice = parent_slice(parent);
            CgroupPath {
                oci: format!("{slice}:{PREFIX}:{id}"),
                path: format!("{}/{PREFIX}-{id}.scope", slice_directory(&slice)),
            }
        }
    }
}

/// `/kubepods/burstable/pod1`, or the directory of `kubepods-burstable-pod1.slice`. `None` if nothing was said.
fn parent_directory(parent: &str) -> Option<String> {
    let parts: Vec<&str> = parent.split('/').filter(|part| !part.is_empty()).collect();
    match parts[..] {
        [] => None,
        [slice] if slice.ends_with(".slice") => Some(slice_directory(slice)),
        _ => Some(format!("/{}", parts.join("/"))),
    }
}

/// `kubepods-burstable-pod1.slice`, from itself, from its directory, or from `/kubepods/burstable/pod1`.
fn parent_slice(parent: &str) -> String {
    let parts: Vec<&str> = parent.split('/').filter(|part| !part.is_empty()).collect();
    match parts.last() {
        None => "system.slice".into(),
        Some(last) if last.ends_with(".slice") => (*last).to_owned(),
        // In a slice's name, a dash stands for a step down.
        Some(_) => {
            let words: Vec<String> = parts.iter().map(|part| part.replace('-', "_")).collect();
            format!("{}.slice", words.join("-"))
        }
    }
}

/// A slice lies in the slices that its name begins with.
fn slice_directory(slice: &str) -> String {
    let name = slice.strip_suffix(".slice").unwrap_or(slice);
    if name == "-" {
        return String::new();
    }
    let ends = name.match_indices('-').map(|(at, _)| at).chain([name.len()]);
    ends.map(|end| format!("/{}.slice", &name[..end])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids() -> (PodId, ContainerId) {
        ("a".repeat(64).parse().unwrap(), "c".repeat(64).parse().unwrap())
    }

    #[test]
    fn both_spellings_of_a_parent_lead_to_the_same_cgroup() {
        let (pod, container) = ids();
        let c = container.as_str();
        let path = |driver, parent| cgroup_path(driver, parent, &pod, &container);
        let fs = CgroupDriver::Cgroupfs;
        assert_eq!(path(fs, "/kubepods/burstable/pod1").oci, format!("/kubepods/burstable/pod1/{c}"));
        assert_eq!(
            path(fs, "kubepods-burstable.slice").path,
            format!("/kubepods.slice/kubepods-burstable.slice/{c}")
        );
        let scope = format!(
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/ocid-{c}.scope"
        );
        for parent in [
            "/kubepods/burstable/pod1-2",
            "kubepods-burstable-pod1_2.slice",
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice",
        ] {
            let found = path(CgroupDriver::Systemd, parent);
            assert_eq!(found.oci, format!("kubepods-burstable-pod1_2.slice:ocid:{c}"));
            assert_eq!(found.path, scope);
        }
    }

    #[test]
    fn a_pod_without_a_parent_has_a_cgroup_of_ours() {
        let (pod, container) = ids();
        let path = cgroup_path(CgroupDriver::Cgroupfs, "/", &pod, &container).path;
        assert_eq!(path, format!("/ocid/{}/{}", pod.as_str(), container.as_str()));
        let path = cgroup_path(CgroupDriver::Systemd, "", &pod, &container);
        assert_eq!(path.path, format!("/system.slice/ocid-{}.scope", container.as_str()));
    }
}
