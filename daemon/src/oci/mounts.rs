//! Mounts: those every container has, those of its pod, and its volumes.
//!
//! A runtime mounts in the order of the list. So what lies deeper comes later, and a volume on the place of a default
//! mount takes that place.

use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount as OciMount;

use super::{Input, namespaces::oci_mappings};
use crate::error::{Error, Kind, Result};
use crate::spec::{Mount, Propagation, Scope};

pub(super) fn mounts(input: &Input<'_>) -> Result<Vec<OciMount>> {
    let asked = &input.container.mounts;
    if asked.len() != input.mount_sources.len() {
        return Err(Error::internal("there is not one source for each mount"));
    }
    let targets: Vec<String> = asked.iter().map(|mount| clean(&mount.container_path)).collect();
    let taken = |target: &str| targets.iter().any(|asked| asked == target);

    // A volume on /dev or /sys brings what is below it.
    let hidden = |target: &str| {
        taken(target) || ["/dev", "/sys"].iter().any(|top| taken(top) && Path::new(target).starts_with(top))
    };
    let mut mounts: Vec<OciMount> =
        defaults(input).into_iter().filter(|mount| !hidden(&mount.destination().to_string_lossy())).collect();

    // Stable, so that of two volumes on one place the later one is seen, as it was asked for.
    let mut rest: Vec<(String, OciMount)> =
        pod_mounts(input).into_iter().filter(|(target, _)| !taken(target)).collect();
    for ((mount, target), source) in asked.iter().zip(&targets).zip(input.mount_sources) {
        rest.push((target.clone(), volume(mount, target, source, input)?));
    }
    rest.sort_by_key(|(target, _)| target.matches('/').count());
    mounts.extend(rest.into_iter().map(|(_, mount)| mount));
    Ok(mounts)
}

fn defaults(input: &Input<'_>) -> Vec<OciMount> {
    let privileged = input.container.security.privileged;
    let access = if privileged { "rw" } else { "ro" };
    let in_user_namespace = input.pod.namespaces.user.is_some();
    let host_network = input.pod.namespaces.network == Scope::Node;

    let mut devpts = vec!["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"];
    // Group 5 is tty everywhere, but it may not exist in a user namespace.
    if input.pod.namespaces.user.as_ref().is_none_or(|user| user.gids.iter().any(|gids| gids.length > 5)) {
        devpts.push("gid=5");
    }
    let sys = if in_user_namespace && host_network {
        // The kernel lets only the owner of a network namespace mount its sysfs.
        mount("/sys", "none", "/sys", &["rbind", "rslave", "nosuid", "noexec", "nodev", access])
    } else {
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", access])
    };
    vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount("/dev/pts", "devpts", "devpts", &devpts),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        sys,
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", access]),
    ]
}

/// What all containers of the pod see alike.
fn pod_mounts(input: &Input<'_>) -> Vec<(String, OciMount)> {
    let files = input.files;
    let access = if input.container.security.readonly_rootfs { "ro" } else { "rw" };
    let mut mounts = Vec::new();
    mounts.push(match &files.shm {
        Some(shm) => bind("/dev/shm", shm, &["rbind", "rprivate", "nosuid", "noexec", "nodev", "rw"]),
        None => mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
    });
    for (target, source) in [
        ("/etc/hosts", &files.hosts),
        ("/etc/hostname", &files.hostname),
        ("/etc/resolv.conf", &files.resolv_conf),
    ] {
        if let Some(source) = source {
            mounts.push(bind(target, source, &["rbind", "rprivate", access]));
        }
    }
    mounts.into_iter().map(|mount| (mount.destination().to_string_lossy().into_owned(), mount)).collect()
}

fn volume(asked: &Mount, target: &str, source: &Path, input: &Input<'_>) -> Result<OciMount> {
    if asked.recursive_read_only && !(input.host.recursive_read_only() && input.runtime.recursive_read_only())
    {
        return Err(Error::new(
            Kind::RroUnsupported,
            format!("mount {target} recursively read-only: the kernel or the runtime cannot"),
        ));
    }
    let mut options = vec!["rbind", propagation(asked.propagation)];
    options.push(match (asked.recursive_read_only, asked.readonly) {
        (true, _) => "rro",
        (false, true) => "ro",
        (false, false) => "rw",
    });
    options.extend(asked.mount_options.iter().map(String::as_str));
    let mut mount = bind(target, source, &options);
    if !asked.uid_mappings.is_empty() {
        mount
            .set_uid_mappings(Some(oci_mappings(&asked.uid_mappings)))
            .set_gid_mappings(Some(oci_mappings(&asked.gid_mappings)));
    }
    Ok(mount)
}

fn propagation(propagation: Propagation) -> &'static str {
    match propagation {
        Propagation::Private => "rprivate",
        Propagation::HostToContainer => "rslave",
        Propagation::Bidirectional => "rshared",
    }
}

/// For mounts to spread through a volume, the root filesystem's must spread as far.
pub(super) fn rootfs_propagation(input: &Input<'_>) -> Option<String> {
    let any = |wanted| input.container.mounts.iter().any(|mount| mount.propagation == wanted);
    if any(Propagation::Bidirectional) {
        Some("rshared".into())
    } else if any(Propagation::HostToContainer) {
        Some("rslave".into())
    } else {
        None
    }
}

/// One spelling for one place.
fn clean(path: &str) -> String {
    path.split('/')
        .filter(|part| !part.is_empty() && *part != ".")
        .fold(String::new(), |path, part| path + "/" + part)
}

fn bind(target: &str, source: &Path, options: &[&str]) -> OciMount {
    let mut mount = mount(target, "bind", "", options);
    mount.set_source(Some(source.to_owned()));
    mount
}

fn mount(target: &str, typ: &str, source: &str, options: &[&str]) -> OciMount {
    let mut mount = OciMount::default();
    mount
        .set_destination(PathBuf::from(target))
        .set_typ(Some(typ.to_owned()))
        .set_source(Some(PathBuf::from(source)))
        .set_options(Some(options.iter().map(|option| (*option).to_owned()).collect()));
    mount
}
