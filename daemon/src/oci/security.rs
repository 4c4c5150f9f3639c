//! What a process may do: capabilities, hidden paths, AppArmor, SELinux. System calls are in `seccomp.rs`.

use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities, LinuxSeccomp};

use super::{Input, seccomp as filter};
use crate::error::{Error, Result};
use crate::spec::{CapabilityRequest, CapabilitySet, Profile, Selinux};

/// What a container has if nobody says otherwise: enough for images that were built to run as root.
const DEFAULT: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// The capabilities a container starts with, and those among them that a user other than root keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Granted {
    all: CapabilitySet,
    ambient: CapabilitySet,
}

/// Default, plus added, minus dropped. "All" means all that we could give. To drop all and add some is how a container
/// asks for little: then what it adds by name is all it gets. What is dropped by name is in no set, whoever adds it.
fn granted(input: &Input<'_>) -> Result<Granted> {
    let available = input.host.bounding;
    if input.container.security.privileged {
        return Ok(Granted { all: available, ambient: CapabilitySet::EMPTY });
    }
    let changes = &input.container.security.capabilities;
    let expand = |request: &CapabilityRequest| {
        let all = if request.all && !changes.drop.all { available } else { CapabilitySet::EMPTY };
        all.union(request.named).minus(changes.drop.named)
    };
    let ambient = expand(&changes.ambient);
    let added = expand(&changes.add).union(ambient);
    let missing = added.minus(available);
    if !missing.is_empty() {
        return Err(Error::invalid(format!(
            "the capabilities {missing:?} are not ours to give on this machine"
        )));
    }
    let base: CapabilitySet = match changes.drop.all {
        true => CapabilitySet::EMPTY,
        false => DEFAULT.iter().filter_map(|name| CapabilitySet::named(name)).collect(),
    };
    Ok(Granted { all: base.intersection(available).minus(changes.drop.named).union(added), ambient })
}

/// The inheritable set is empty but for ambient capabilities, which the kernel ties to it: files of the image would
/// turn it into capabilities for any user.
pub(super) fn capabilities(input: &Input<'_>) -> Result<LinuxCapabilities> {
    let granted = granted(input)?;
    let all = to_oci(granted.all);
    let ambient = to_oci(granted.ambient);
    let mut capabilities = LinuxCapabilities::default();
    capabilities
        .set_bounding(Some(all.clone()))
        .set_effective(Some(all.clone()))
        .set_permitted(Some(all))
        .set_inheritable(Some(ambient.clone()))
        .set_ambient(Some(ambient));
    Ok(capabilities)
}

fn to_oci(set: CapabilitySet) -> Capabilities {
    set.names().filter_map(|name| name.parse::<Capability>().ok()).collect()
}

pub(super) fn seccomp(input: &Input<'_>) -> Result<Option<LinuxSeccomp>> {
    let security = &input.container.security;
    if security.privileged {
        return Ok(None);
    }
    match security.seccomp.as_ref().unwrap_or(&input.policy.seccomp_unset) {
        Profile::Unconfined => Ok(None),
        Profile::RuntimeDefault => {
            let has = granted(input)?.all;
            Ok(Some(filter::default_profile(
                has,
                input.policy.seccomp_compat_architectures,
                input.host.kernel,
            )))
        }
        Profile::Localhost(path) => {
            let text = input
                .seccomp_profile
                .ok_or_else(|| Error::invalid(format!("the seccomp profile {path:?} could not be read")))?;
            filter::localhost_profile(path, text).map(Some)
        }
    }
}

pub(super) fn apparmor(input: &Input<'_>) -> Result<Option<String>> {
    let security = &input.container.security;
    match (&security.apparmor, input.host.apparmor) {
        (Some(Profile::Localhost(name)), true) => Ok(Some(name.clone())),
        (Some(Profile::Localhost(name)), false) => {
            Err(Error::invalid(format!("the AppArmor profile {name:?} is asked for, but AppArmor is off")))
        }
        (Some(Profile::Unconfined), _) | (_, false) => Ok(None),
        (None | Some(Profile::RuntimeDefault), true) => {
            let name = &input.policy.apparmor_profile;
            Ok((!security.privileged && !name.is_empty()).then(|| name.clone()))
        }
    }
}

pub(super) fn process_label(input: &Input<'_>) -> Option<String> {
    label(input, "system_r", "container_t")
}

pub(super) fn mount_label(input: &Input<'_>) -> Option<String> {
    // Files have neither the role nor the type of a process.
    label(input, "object_r", "container_file_t")
}

/// The container's options, else the pod's, with defaults for parts that are empty.
fn label(input: &Input<'_>, role: &str, kind: &str) -> Option<String> {
    if !input.host.selinux || input.container.security.privileged {
        return None;
    }
    let asked = input.container.security.selinux.as_ref().or(input.pod.security.selinux.as_ref());
    let none = Selinux::default();
    let asked = asked.unwrap_or(&none);
    let is_process = role == "system_r";
    let or = |text: &str, default: &str| if text.is_empty() { default.to_owned() } else { text.to_owned() };
    let user = or(&asked.user, "system_u");
    let role = if is_process { or(&asked.role, role) } else { role.to_owned() };
    let kind = if is_process { or(&asked.kind, kind) } else { kind.to_owned() };
    Some(format!("{user}:{role}:{kind}:{}", or(&asked.level, "s0")))
}

/// What tells a container about the node, or about its neighbours.
const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// What changes the node.
const READONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

pub(super) fn masked_paths(input: &Input<'_>) -> Vec<String> {
    let thermal = input.host.thermal_throttle.iter().map(String::as_str);
    paths(input, MASKED.into_iter().chain(thermal), &input.container.security.masked_paths)
}

pub(super) fn readonly_paths(input: &Input<'_>) -> Vec<String> {
    paths(input, READONLY.into_iter(), &input.container.security.readonly_paths)
}

/// A request adds to the defaults. It cannot take away from them, for in CRI "none" and "nothing was said" are the same;
/// but in a user namespace of its own a container with an unmasked /proc is a thing that Kubernetes knows, and there
/// the request's list is the whole list.
fn paths<'a>(input: &Input<'_>, defaults: impl Iterator<Item = &'a str>, asked: &[String]) -> Vec<String> {
    if input.container.security.privileged {
        return Vec::new();
    }
    let mut paths: Vec<String> = Vec::new();
    if input.pod.namespaces.user.is_none() {
        paths.extend(defaults.map(str::to_owned));
    }
    for path in asked {
        if !paths.contains(path) {
            paths.push(path.clone());
        }
    }
    paths
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::CAPABILITIES;

    #[test]
    fn every_capability_has_a_name_that_the_document_knows() {
        assert_eq!(to_oci(CapabilitySet::ALL).len(), CAPABILITIES.len());
    }
}
