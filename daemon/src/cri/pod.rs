//! A pod, from CRI to what was asked.
//!
//! Everything a request can get wrong is refused here, with the name of the field; whoever gets a [`PodSpec`] trusts it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ocid_api::cri;

use crate::error::{Error, Result};
use crate::spec::{
    Dns, GroupsPolicy, HugepageLimit, IdMapping, PodName, PodNamespaces, PodPid, PodSecurity, PodSpec,
    PortMapping, Profile, Protocol, Resources, Scope, Selinux, UserNamespace, check_absolute, check_text,
};

/// Bounds on what one request may make us keep.
pub(super) const NAME_BYTES_MAX: usize = 253;
pub(super) const LABELS_BYTES_MAX: usize = 256 << 10;
const HOSTNAME_BYTES_MAX: usize = 64;
const DNS_ENTRIES_MAX: usize = 64;
const DNS_ENTRY_BYTES_MAX: usize = 255;
const PORTS_MAX: usize = 4096;
const SYSCTLS_MAX: usize = 256;
const GROUPS_MAX: usize = 65_536;

/// Kubernetes' bound, and one below which no kernel interface takes an id for "none".
const ID_MAX: i64 = i32::MAX as i64;

/// The pod that a request asks for.
///
/// # Errors
/// `InvalidArgument` with the name of the first field that is wrong.
pub fn pod_spec(config: cri::PodSandboxConfig, runtime_handler: String) -> Result<PodSpec> {
    let metadata = config.metadata.ok_or_else(|| Error::invalid("sandbox config has no metadata"))?;
    let name = PodName {
        name: checked_name("metadata.name", metadata.name)?,
        namespace: checked_name("metadata.namespace", metadata.namespace)?,
        uid: checked_name("metadata.uid", metadata.uid)?,
        attempt: metadata.attempt,
    };
    check_text("hostname", &config.hostname, HOSTNAME_BYTES_MAX)?;
    if !config.log_directory.is_empty() {
        check_absolute("log_directory", &config.log_directory)?;
    }
    check_text("runtime_handler", &runtime_handler, NAME_BYTES_MAX)?;
    check_labels(&config.labels, &config.annotations)?;

    let linux = config.linux.unwrap_or_default();
    let context = linux.security_context.unwrap_or_default();
    check_cgroup_parent(&linux.cgroup_parent)?;
    let namespaces = namespaces(context.namespace_options.clone().unwrap_or_default())?;
    check_sysctls(&linux.sysctls, &namespaces)?;

    Ok(PodSpec {
        name,
        hostname: config.hostname,
        log_directory: config.log_directory,
        dns: config.dns_config.map(dns).transpose()?.filter(|dns| *dns != Dns::default()),
        port_mappings: port_mappings(config.port_mappings)?,
        labels: config.labels.into_iter().collect(),
        annotations: config.annotations.into_iter().collect(),
        runtime_handler,
        cgroup_parent: linux.cgroup_parent,
        sysctls: linux.sysctls.into_iter().collect(),
        namespaces,
        security: security(context)?,
        resources: linux.resources.map(|r| resources("linux.resources", r)).transpose()?,
        overhead: linux.overhead.map(|r| resources("linux.overhead", r)).transpose()?,
    })
}

/// Names are data and never a path of ours, but they end up in logs, labels and CNI arguments.
pub(super) fn checked_name(field: &str, name: String) -> Result<String> {
    if name.is_empty() {
        return Err(Error::invalid(format!("{field} is empty")));
    }
    check_text(field, &name, NAME_BYTES_MAX)?;
    if name.contains('/') || name.contains("..") {
        return Err(Error::invalid(format!("{field} contains `/` or `..`")));
    }
    Ok(name)
}

pub(super) fn check_labels(
    labels: &BTreeMap<String, String>,
    annotations: &BTreeMap<String, String>,
) -> Result<()> {
    let bytes: usize = labels.iter().chain(annotations).map(|(key, value)| key.len() + value.len()).sum();
    if bytes > LABELS_BYTES_MAX {
        return Err(Error::invalid(format!(
            "labels and annotations have {bytes} bytes, more than {LABELS_BYTES_MAX}"
        )));
    }
    Ok(())
}

/// A cgroupfs path or a systemd slice. The colon separates the parts of systemd's form, so it cannot be in one.
fn check_cgroup_parent(parent: &str) -> Result<()> {
    check_text("linux.cgroup_parent", parent, NAME_BYTES_MAX * 4)?;
    if parent.contains(':') || parent.split('/').any(|part| part == ".." || part == ".") {
        return Err(Error::invalid("linux.cgroup_parent contains `:`, `.` or `..`"));
    }
    Ok(())
}

fn dns(config: cri::DnsConfig) -> Result<Dns> {
    for (field, entries) in [
        ("dns_config.servers", &config.servers),
        ("dns_config.searches", &config.searches),
        ("dns_config.options", &config.options),
    ] {
        check_count(field, entries.len(), DNS_ENTRIES_MAX)?;
        // A line break would begin another directive.
        entries.iter().try_for_each(|entry| check_text(field, entry, DNS_ENTRY_BYTES_MAX))?;
    }
    Ok(Dns { servers: config.servers, searches: config.searches, options: config.options })
}

fn port_mappings(mappings: Vec<cri::PortMapping>) -> Result<Vec<PortMapping>> {
    check_count("port_mappings", mappings.len(), PORTS_MAX)?;
    let port = |field: &str, port: i32| {
        u16::try_from(port)
            .map_err(|_| Error::invalid(format!("port_mappings.{field} {port} is not between 0 and 65535")))
    };
    mappings
        .into_iter()
        .map(|mapping| {
            if !mapping.host_ip.is_empty() && mapping.host_ip.parse::<IpAddr>().is_err() {
                return Err(Error::invalid("port_mappings.host_ip is not an IP address"));
            }
            Ok(PortMapping {
                protocol: match known("port_mappings.protocol", mapping.protocol)? {
                    cri::Protocol::Tcp => Protocol::Tcp,
                    cri::Protocol::Udp => Protocol::Udp,
                    cri::Protocol::Sctp => Protocol::Sctp,
                },
                container_port: port("container_port", mapping.container_port)?,
                host_port: port("host_port", mapping.host_port)?,
                host_ip: mapping.host_ip,
            })
        })
        .collect()
}

fn namespaces(options: cri::NamespaceOption) -> Result<PodNamespaces> {
    let scope = |field: &str, mode: i32| match known(field, mode)? {
        cri::NamespaceMode::Pod => Ok(Scope::Pod),
        cri::NamespaceMode::Node => Ok(Scope::Node),
        _ => Err(Error::invalid(format!("{field} of a pod is POD or NODE"))),
    };
    Ok(PodNamespaces {
        network: scope("namespace_options.network", options.network)?,
        ipc: scope("namespace_options.ipc", options.ipc)?,
        pid: match known("namespace_options.pid", options.pid)? {
            cri::NamespaceMode::Pod => PodPid::Pod,
            cri::NamespaceMode::Container => PodPid::Container,
            cri::NamespaceMode::Node => PodPid::Node,
            cri::NamespaceMode::Target => {
                return Err(Error::invalid("namespace_options.pid of a pod cannot be TARGET"));
            }
        },
        user: options.userns_options.map(user_namespace).transpose()?.flatten(),
    })
}

/// `None` is the node's user namespace.
pub(super) fn user_namespace(options: cri::UserNamespace) -> Result<Option<UserNamespace>> {
    let field = "namespace_options.userns_options";
    match known(&format!("{field}.mode"), options.mode)? {
        cri::NamespaceMode::Node => return Ok(None),
        cri::NamespaceMode::Pod => {}
        _ => return Err(Error::invalid(format!("{field}.mode is POD or NODE"))),
    }
    let uids = id_mappings(&format!("{field}.uids"), &options.uids)?;
    let gids = id_mappings(&format!("{field}.gids"), &options.gids)?;
    let [mapping] = uids[..] else {
        return Err(Error::invalid(format!("{field}.uids has {} mappings, not one", uids.len())));
    };
    if uids != gids {
        return Err(Error::invalid(format!("{field}.uids and gids are not the same")));
    }
    if mapping.container_id != 0 {
        return Err(Error::invalid(format!("{field}.uids does not begin with the container's id 0")));
    }
    Ok(Some(UserNamespace { uids, gids }))
}

pub(super) fn id_mappings(field: &str, mappings: &[cri::IdMapping]) -> Result<Vec<IdMapping>> {
    // The kernel's own bound.
    check_count(field, mappings.len(), 340)?;
    mappings
        .iter()
        .map(|mapping| {
            let fits = |first: u32| first.checked_add(mapping.length).is_some();
            if mapping.length == 0 || !fits(mapping.host_id) || !fits(mapping.container_id) {
                return Err(Error::invalid(format!("{field} has an empty or overflowing range")));
            }
            Ok(IdMapping {
                host_id: mapping.host_id,
                container_id: mapping.container_id,
                length: mapping.length,
            })
        })
        .collect()
}

/// Only settings of a namespace that is the pod's own, for anything else is the node's.
fn check_sysctls(sysctls: &BTreeMap<String, String>, namespaces: &PodNamespaces) -> Result<()> {
    check_count("linux.sysctls", sysctls.len(), SYSCTLS_MAX)?;
    for (name, value) in sysctls {
        check_text("linux.sysctls", name, NAME_BYTES_MAX)?;
        let field = format!("linux.sysctls[{name}]");
        if !is_sysctl_name(name) {
            return Err(Error::invalid(format!("{field} is not the name of a kernel setting")));
        }
        check_text(&field, value, 4096)?;
        let owner = match name.as_str() {
            _ if name.starts_with("net.") => namespaces.network,
            // The UTS namespace follows the network.
            "kernel.domainname" => namespaces.network,
            _ if is_ipc_sysctl(name) => namespaces.ipc,
            _ => return Err(Error::invalid(format!("{field} is not a setting of a namespace"))),
        };
        if owner == Scope::Node {
            return Err(Error::invalid(format!("{field} is a setting of a namespace that is the node's")));
        }
    }
    Ok(())
}

/// Dotted words of `[a-z0-9_-]`. A slash stands for a dot within a word, as in `net.ipv4.conf.eth0/100.rp_filter`.
fn is_sysctl_name(name: &str) -> bool {
    let word = |word: &str| {
        word.split('/').all(|part| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'-'))
        })
    };
    // With a slash as the first separator, dots and slashes would change their meaning.
    let head = name.split('.').next().unwrap_or_default();
    name.contains('.') && !head.contains('/') && name.split('.').all(word)
}

fn is_ipc_sysctl(name: &str) -> bool {
    const IPC: [&str; 9] = [
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.msg_next_id",
    ];
    IPC.contains(&name) || name.starts_with("fs.mqueue.")
}

fn security(context: cri::LinuxSandboxSecurityContext) -> Result<PodSecurity> {
    let run_as_user = context.run_as_user.map(|id| user_id("run_as_user", id.value)).transpose()?;
    let run_as_group = context.run_as_group.map(|id| user_id("run_as_group", id.value)).transpose()?;
    if run_as_group.is_some() && run_as_user.is_none() {
        return Err(Error::invalid("run_as_group without run_as_user"));
    }
    #[allow(deprecated)] // A client may still send only the old field.
    let old_seccomp = context.seccomp_profile_path;
    Ok(PodSecurity {
        privileged: context.privileged,
        run_as_user,
        run_as_group,
        supplemental_groups: user_ids("supplemental_groups", &context.supplemental_groups)?,
        supplemental_groups_policy: groups_policy(context.supplemental_groups_policy)?,
        readonly_rootfs: context.readonly_rootfs,
        seccomp: seccomp(context.seccomp, &old_seccomp)?,
        apparmor: apparmor(context.apparmor, "")?,
        selinux: context.selinux_options.map(selinux).transpose()?,
    })
}

pub(super) fn user_id(field: &str, id: i64) -> Result<u32> {
    u32::try_from(id)
        .ok()
        .filter(|_| id <= ID_MAX)
        .ok_or_else(|| Error::invalid(format!("{field} {id} is not between 0 and {ID_MAX}")))
}

pub(super) fn user_ids(field: &str, ids: &[i64]) -> Result<Vec<u32>> {
    check_count(field, ids.len(), GROUPS_MAX)?;
    ids.iter().map(|id| user_id(field, *id)).collect()
}

pub(super) fn groups_policy(policy: i32) -> Result<GroupsPolicy> {
    Ok(match known("supplemental_groups_policy", policy)? {
        cri::SupplementalGroupsPolicy::Merge => GroupsPolicy::Merge,
        cri::SupplementalGroupsPolicy::Strict => GroupsPolicy::Strict,
    })
}

/// `old` is the deprecated text form; it counts only where the new field is absent.
pub(super) fn seccomp(new: Option<cri::SecurityProfile>, old: &str) -> Result<Option<Profile>> {
    let profile = profile("seccomp", new, old, &["runtime/default", "docker/default"])?;
    if let Some(Profile::Localhost(path)) = &profile {
        // An empty or misread path must never end as "no filter".
        check_absolute("seccomp.localhost_ref", path)?;
    }
    Ok(profile)
}

/// As [`seccomp`], but names a loaded profile. Clients put the old form's prefix in the new field too.
pub(super) fn apparmor(new: Option<cri::SecurityProfile>, old: &str) -> Result<Option<Profile>> {
    let profile = profile("apparmor", new, old, &["runtime/default"])?;
    let Some(Profile::Localhost(name)) = profile else { return Ok(profile) };
    let name = name.strip_prefix("localhost/").unwrap_or(&name);
    if name.is_empty() {
        return Err(Error::invalid("apparmor.localhost_ref is empty"));
    }
    check_text("apparmor.localhost_ref", name, 4096)?;
    Ok(Some(Profile::Localhost(name.to_owned())))
}

fn profile(
    field: &str,
    new: Option<cri::SecurityProfile>,
    old: &str,
    defaults: &[&str],
) -> Result<Option<Profile>> {
    use cri::security_profile::ProfileType;
    if let Some(new) = new {
        let kind = known::<ProfileType>(&format!("{field}.profile_type"), new.profile_type)?;
        if kind != ProfileType::Localhost && !new.localhost_ref.is_empty() {
            return Err(Error::invalid(format!(
                "{field}.localhost_ref is set, but the type is not Localhost"
            )));
        }
        return Ok(Some(match kind {
            ProfileType::RuntimeDefault => Profile::RuntimeDefault,
            ProfileType::Unconfined => Profile::Unconfined,
            ProfileType::Localhost => Profile::Localhost(new.localhost_ref),
        }));
    }
    match old {
        "" => Ok(None),
        "unconfined" => Ok(Some(Profile::Unconfined)),
        _ if defaults.contains(&old) => Ok(Some(Profile::RuntimeDefault)),
        _ => match old.strip_prefix("localhost/") {
            Some(name) => Ok(Some(Profile::Localhost(name.to_owned()))),
            None => {
                Err(Error::invalid(format!("{field} profile is none of default, unconfined, localhost/…")))
            }
        },
    }
}

pub(super) fn selinux(options: cri::SeLinuxOption) -> Result<Selinux> {
    let check = |field: &str, text: String, more: &[u8]| {
        let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.') || more.contains(&b);
        if text.len() > 4096 || !text.bytes().all(good) {
            return Err(Error::invalid(format!("selinux_options.{field} is not part of a label")));
        }
        Ok(text)
    };
    Ok(Selinux {
        user: check("user", options.user, b"")?,
        role: check("role", options.role, b"")?,
        kind: check("type", options.r#type, b"")?,
        level: check("level", options.level, b":,")?,
    })
}

/// The limits a request asks for. In CRI, 0 means that nothing was said.
pub(super) fn resources(field: &str, asked: cri::LinuxContainerResources) -> Result<Resources> {
    let said = |value: i64| (value != 0).then_some(value);
    let positive = |name: &str, value: i64| {
        said(value)
            .map(|value| {
                u64::try_from(value).map_err(|_| Error::invalid(format!("{field}.{name} is negative")))
            })
            .transpose()
    };
    let bytes = |name: &str, value: i64| match said(value) {
        Some(value) if value < -1 => Err(Error::invalid(format!("{field}.{name} is less than -1"))),
        value => Ok(value),
    };
    let memory_limit = bytes("memory_limit_in_bytes", asked.memory_limit_in_bytes)?;
    let memory_swap_limit = bytes("memory_swap_limit_in_bytes", asked.memory_swap_limit_in_bytes)?;
    if let (Some(memory), Some(total)) = (memory_limit, memory_swap_limit)
        && total >= 0
        && (memory < 0 || total < memory)
    {
        return Err(Error::invalid(format!(
            "{field}.memory_swap_limit_in_bytes is less than memory_limit_in_bytes, which it includes"
        )));
    }
    let oom_score_adj = i32::try_from(asked.oom_score_adj)
        .ok()
        .filter(|score| (-1000..=1000).contains(score))
        .ok_or_else(|| Error::invalid(format!("{field}.oom_score_adj is not between -1000 and 1000")))?;
    for (name, list) in [("cpuset_cpus", &asked.cpuset_cpus), ("cpuset_mems", &asked.cpuset_mems)] {
        if list.len() > 8192 || !list.bytes().all(|b| b.is_ascii_digit() || matches!(b, b',' | b'-')) {
            return Err(Error::invalid(format!("{field}.{name} is not a list of numbers")));
        }
    }
    check_unified(field, &asked.unified)?;
    Ok(Resources {
        cpu_period: positive("cpu_period", asked.cpu_period)?,
        cpu_quota: said(asked.cpu_quota),
        cpu_shares: positive("cpu_shares", asked.cpu_shares)?,
        cpuset_cpus: asked.cpuset_cpus,
        cpuset_mems: asked.cpuset_mems,
        memory_limit,
        memory_swap_limit,
        hugepage_limits: hugepage_limits(field, asked.hugepage_limits)?,
        pids_limit: None,
        oom_score_adj: Some(oom_score_adj),
        unified: asked.unified.into_iter().collect(),
    })
}

/// The page size becomes part of a file's name.
fn hugepage_limits(field: &str, limits: Vec<cri::HugepageLimit>) -> Result<Vec<HugepageLimit>> {
    check_count(&format!("{field}.hugepage_limits"), limits.len(), 32)?;
    limits
        .into_iter()
        .map(|limit| {
            let size = &limit.page_size;
            let digits = size.bytes().take_while(u8::is_ascii_digit).count();
            if digits == 0 || digits > 10 || !["KB", "MB", "GB"].contains(&&size[digits..]) {
                return Err(Error::invalid(format!("{field}.hugepage_limits.page_size is not like 2MB")));
            }
            Ok(HugepageLimit { page_size: limit.page_size, limit: limit.limit })
        })
        .collect()
}

/// Controllers' files only: `cgroup.procs` and its kin manage the cgroup itself.
fn check_unified(field: &str, unified: &BTreeMap<String, String>) -> Result<()> {
    check_count(&format!("{field}.unified"), unified.len(), 64)?;
    for (key, value) in unified {
        let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'.');
        let is_file = key.len() <= 255 && key.contains('.') && !key.starts_with('.') && key.bytes().all(word);
        if !is_file || key.starts_with("cgroup.") {
            return Err(Error::invalid(format!("{field}.unified has a key that is no file of a controller")));
        }
        // Multi-line values are legal: io.max takes one line per device.
        if value.len() > 4096 || value.contains('\0') {
            return Err(Error::invalid(format!(
                "{field}.unified[{key}] is longer than 4096 bytes or contains NUL"
            )));
        }
    }
    Ok(())
}

pub(super) fn check_count(field: &str, count: usize, max: usize) -> Result<()> {
    if count > max {
        return Err(Error::invalid(format!("{field} has {count} entries, more than {max}")));
    }
    Ok(())
}

/// An enum's variant, or an error where a newer client sends one that we do not know.
pub(super) fn known<E: TryFrom<i32>>(field: &str, value: i32) -> Result<E> {
    E::try_from(value).map_err(|_| Error::invalid(format!("{field} has the unknown value {value}")))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::error::Kind;

    pub(in crate::cri) fn good() -> cri::PodSandboxConfig {
        cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: "web-0".into(),
                namespace: "default".into(),
                uid: "7d0c".into(),
                attempt: 1,
            }),
            linux: Some(cri::LinuxPodSandboxConfig {
                security_context: Some(cri::LinuxSandboxSecurityContext::default()),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn linux(config: &mut cri::PodSandboxConfig) -> &mut cri::LinuxPodSandboxConfig {
        config.linux.as_mut().unwrap()
    }

    fn context(config: &mut cri::PodSandboxConfig) -> &mut cri::LinuxSandboxSecurityContext {
        linux(config).security_context.as_mut().unwrap()
    }

    fn options(config: &mut cri::PodSandboxConfig) -> &mut cri::NamespaceOption {
        context(config).namespace_options.get_or_insert_default()
    }

    fn sysctl(config: &mut cri::PodSandboxConfig, name: &str, value: &str) {
        linux(config).sysctls.insert(name.into(), value.into());
    }

    fn user_namespace_of(config: &mut cri::PodSandboxConfig, mode: cri::NamespaceMode, ranges: &[[u32; 3]]) {
        let mappings: Vec<_> = ranges
            .iter()
            .map(|[container_id, host_id, length]| cri::IdMapping {
                container_id: *container_id,
                host_id: *host_id,
                length: *length,
            })
            .collect();
        options(config).userns_options =
            Some(cri::UserNamespace { mode: mode.into(), uids: mappings.clone(), gids: mappings });
    }

    type Change = fn(&mut cri::PodSandboxConfig);

    #[test]
    fn bad_pods_are_refused_with_the_name_of_the_field() {
        let table: &[(&str, Change)] = &[
            ("metadata", |c| c.metadata = None),
            ("metadata.name", |c| c.metadata.as_mut().unwrap().name.clear()),
            ("metadata.name", |c| c.metadata.as_mut().unwrap().name = "a/b".into()),
            ("metadata.name", |c| c.metadata.as_mut().unwrap().name = "..".into()),
            ("metadata.name", |c| c.metadata.as_mut().unwrap().name = "a\nb".into()),
            ("metadata.name", |c| c.metadata.as_mut().unwrap().name = "a\0".into()),
            ("metadata.name", |c| c.metadata.as_mut().unwrap().name = "a".repeat(254)),
            ("metadata.namespace", |c| c.metadata.as_mut().unwrap().namespace = "a\u{7f}".into()),
            ("metadata.uid", |c| c.metadata.as_mut().unwrap().uid = "x".repeat(65_536)),
            ("metadata.uid", |c| c.metadata.as_mut().unwrap().uid.clear()),
            ("hostname", |c| c.hostname = "h".repeat(65)),
            ("hostname", |c| c.hostname = "a\n127.0.0.1".into()),
            ("log_directory", |c| c.log_directory = "var/log".into()),
            ("log_directory", |c| c.log_directory = "/var/../etc".into()),
            ("log_directory", |c| c.log_directory = format!("/{}", "x".repeat(4096))),
            ("dns_config.searches", |c| {
                c.dns_config = Some(cri::DnsConfig {
                    searches: vec!["a\nnameserver 6.6.6.6".into()],
                    ..Default::default()
                });
            }),
            ("dns_config.options", |c| {
                c.dns_config = Some(cri::DnsConfig { options: vec!["\0".into()], ..Default::default() });
            }),
            ("dns_config.servers", |c| {
                c.dns_config =
                    Some(cri::DnsConfig { servers: vec![String::new(); 65], ..Default::default() });
            }),
            ("port_mappings.host_port", |c| {
                c.port_mappings.push(cri::PortMapping { host_port: 65_536, ..Default::default() });
            }),
            ("port_mappings.container_port", |c| {
                c.port_mappings.push(cri::PortMapping { container_port: -1, ..Default::default() });
            }),
            ("port_mappings.host_ip", |c| {
                c.port_mappings.push(cri::PortMapping { host_ip: "localhost".into(), ..Default::default() });
            }),
            ("port_mappings.protocol", |c| {
                c.port_mappings.push(cri::PortMapping { protocol: 9, ..Default::default() });
            }),
            ("labels and annotations", |c| {
                c.annotations.insert("a".into(), "x".repeat(LABELS_BYTES_MAX));
            }),
            ("cgroup_parent", |c| linux(c).cgroup_parent = "/a/../../b".into()),
            ("cgroup_parent", |c| linux(c).cgroup_parent = "a:b:c".into()),
            ("kernel.core_pattern", |c| sysctl(c, "kernel.core_pattern", "x")),
            ("net.ipv4.ip_forward", |c| {
                options(c).network = 2;
                sysctl(c, "net.ipv4.ip_forward", "1");
            }),
            ("kernel.shmmax", |c| {
                options(c).ipc = 2;
                sysctl(c, "kernel.shmmax", "1");
            }),
            ("net.a", |c| sysctl(c, "net.a", "1\nkernel.core_pattern=x")),
            ("linux.sysctls", |c| sysctl(c, "net.../../kernel.core_pattern", "x")),
            ("linux.sysctls", |c| sysctl(c, "net/ipv4/ip_forward", "1")),
            ("linux.sysctls", |c| sysctl(c, "net.ipv4.ip_forward=1+kernel.core_pattern", "1")),
            ("network", |c| options(c).network = 1),
            ("ipc", |c| options(c).ipc = 3),
            ("pid", |c| options(c).pid = 3),
            ("pid", |c| options(c).pid = 7),
            ("userns_options", |c| user_namespace_of(c, cri::NamespaceMode::Container, &[[0, 1000, 10]])),
            ("userns_options", |c| user_namespace_of(c, cri::NamespaceMode::Target, &[[0, 1000, 10]])),
            ("userns_options", |c| user_namespace_of(c, cri::NamespaceMode::Pod, &[])),
            ("userns_options", |c| {
                user_namespace_of(c, cri::NamespaceMode::Pod, &[[0, 1000, 10], [10, 5000, 10]])
            }),
            ("userns_options", |c| user_namespace_of(c, cri::NamespaceMode::Pod, &[[1, 1000, 10]])),
            ("userns_options", |c| user_namespace_of(c, cri::NamespaceMode::Pod, &[[0, 1000, 0]])),
            ("userns_options", |c| user_namespace_of(c, cri::NamespaceMode::Pod, &[[0, u32::MAX, 2]])),
            ("gids are not the same", |c| {
                user_namespace_of(c, cri::NamespaceMode::Pod, &[[0, 1000, 10]]);
                options(c).userns_options.as_mut().unwrap().gids[0].host_id = 7;
            }),
            ("run_as_group", |c| context(c).run_as_group = Some(cri::Int64Value { value: 1 })),
            ("run_as_user", |c| context(c).run_as_user = Some(cri::Int64Value { value: -1 })),
            ("run_as_user", |c| context(c).run_as_user = Some(cri::Int64Value { value: 1 << 31 })),
            ("supplemental_groups", |c| context(c).supplemental_groups = vec![1, 1 << 32]),
            ("supplemental_groups_policy", |c| context(c).supplemental_groups_policy = 5),
            ("seccomp", |c| {
                context(c).seccomp =
                    Some(cri::SecurityProfile { profile_type: 2, localhost_ref: String::new() });
            }),
            ("selinux_options.type", |c| {
                context(c).selinux_options =
                    Some(cri::SeLinuxOption { r#type: "a:b".into(), ..Default::default() });
            }),
            ("linux.overhead.cpu_period", |c| {
                linux(c).overhead =
                    Some(cri::LinuxContainerResources { cpu_period: -1, ..Default::default() });
            }),
        ];
        for (field, change) in table {
            let mut config = good();
            change(&mut config);
            let error = pod_spec(config, String::new()).expect_err(field);
            assert_eq!(error.kind(), Kind::InvalidArgument);
            assert!(error.to_string().contains(field), "{field}: {error}");
        }
        assert!(pod_spec(good(), "a\nb".into()).is_err());
    }

    #[test]
    fn a_pod_is_kept_as_it_was_asked_for() {
        let mut config = good();
        config.metadata.as_mut().unwrap().name = "PodSandbox-for-a-test-".repeat(4);
        config.dns_config =
            Some(cri::DnsConfig { servers: vec!["10.10.10.10".into()], ..Default::default() });
        config.annotations.insert("run.oci.keep_original_groups".into(), "1\n".into());
        config.port_mappings.push(cri::PortMapping { container_port: 80, ..Default::default() });
        sysctl(&mut config, "net.ipv4.conf.eth0/100.rp_filter", "1");
        sysctl(&mut config, "kernel.shm_rmid_forced", "1");
        options(&mut config).pid = 1;
        user_namespace_of(&mut config, cri::NamespaceMode::Pod, &[[0, 1000, 100_000]]);
        let spec = pod_spec(config.clone(), "runc".into()).unwrap();
        assert_eq!((spec.name.attempt, spec.runtime_handler.as_str()), (1, "runc"));
        assert_eq!(spec.dns.unwrap().servers, ["10.10.10.10"]);
        assert_eq!(spec.annotations["run.oci.keep_original_groups"], "1\n");
        assert_eq!(spec.namespaces.pid, PodPid::Container);
        assert_eq!(spec.namespaces.user.unwrap().uids[0].length, 100_000);
        // An empty message is nothing said: the node's resolv.conf.
        config.dns_config = Some(cri::DnsConfig::default());
        user_namespace_of(&mut config, cri::NamespaceMode::Node, &[]);
        let spec = pod_spec(config, String::new()).unwrap();
        assert_eq!((spec.dns, spec.namespaces.user), (None, None));
        assert!(pod_spec(cri::PodSandboxConfig { linux: None, ..good() }, String::new()).is_ok());
    }

    #[test]
    fn the_new_profile_field_wins_over_the_old_one() {
        let localhost = |path: &str| Some(Profile::Localhost(path.into()));
        let new = |profile_type: i32, path: &str| {
            Some(cri::SecurityProfile { profile_type, localhost_ref: path.into() })
        };
        assert_eq!(seccomp(None, "").unwrap(), None);
        assert_eq!(seccomp(None, "unconfined").unwrap(), Some(Profile::Unconfined));
        assert_eq!(seccomp(None, "docker/default").unwrap(), Some(Profile::RuntimeDefault));
        assert_eq!(seccomp(None, "localhost//a/b.json").unwrap(), localhost("/a/b.json"));
        assert_eq!(seccomp(new(0, ""), "unconfined").unwrap(), Some(Profile::RuntimeDefault));
        assert_eq!(seccomp(new(2, "/a"), "unconfined").unwrap(), localhost("/a"));
        for (profile, old) in [
            (new(2, ""), ""),
            (new(2, "a.json"), ""),
            (new(2, "/a/../b"), ""),
            (new(1, "/a"), ""),
            (new(3, ""), ""),
            (None, "localhost/"),
            (None, "localhost/a.json"),
            (None, "Unconfined"),
        ] {
            assert!(seccomp(profile.clone(), old).is_err(), "{profile:?} {old:?}");
        }
        assert_eq!(apparmor(new(2, "localhost/mine"), "unconfined").unwrap(), localhost("mine"));
        assert_eq!(apparmor(None, "localhost/mine").unwrap(), localhost("mine"));
        assert!(apparmor(new(2, "localhost/"), "").is_err());
    }

    #[test]
    fn limits_that_make_no_sense_are_refused() {
        let good = cri::LinuxContainerResources::default;
        let page = |page_size: &str| vec![cri::HugepageLimit { page_size: page_size.into(), limit: 1 }];
        let unified = |key: &str| [(key.to_owned(), "1".to_owned())].into();
        for (name, bad) in [
            ("cpu_shares", cri::LinuxContainerResources { cpu_shares: -2, ..good() }),
            ("memory_limit", cri::LinuxContainerResources { memory_limit_in_bytes: -2, ..good() }),
            (
                "memory_swap_limit",
                cri::LinuxContainerResources {
                    memory_limit_in_bytes: 10,
                    memory_swap_limit_in_bytes: 9,
                    ..good()
                },
            ),
            ("oom_score_adj", cri::LinuxContainerResources { oom_score_adj: 1001, ..good() }),
            ("oom_score_adj", cri::LinuxContainerResources { oom_score_adj: i64::MIN, ..good() }),
            ("cpuset_cpus", cri::LinuxContainerResources { cpuset_cpus: "0\n1".into(), ..good() }),
            ("page_size", cri::LinuxContainerResources { hugepage_limits: page("../2MB"), ..good() }),
            ("page_size", cri::LinuxContainerResources { hugepage_limits: page("MB"), ..good() }),
            ("page_size", cri::LinuxContainerResources { hugepage_limits: page("2é"), ..good() }),
            ("unified", cri::LinuxContainerResources { unified: unified("cgroup.procs"), ..good() }),
            ("unified", cri::LinuxContainerResources { unified: unified("../memory.max"), ..good() }),
        ] {
            let error = resources("r", bad).expect_err(name).to_string();
            assert!(error.contains(name), "{name}: {error}");
        }
        let said = resources("r", cri::LinuxContainerResources { cpu_quota: -1, ..good() }).unwrap();
        assert_eq!((said.cpu_quota, said.memory_limit, said.oom_score_adj), (Some(-1), None, Some(0)));
    }
}
