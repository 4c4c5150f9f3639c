//! A container, from CRI to what was asked.
//!
//! Everything a request can get wrong is refused here, with the name of the field; whoever gets a [`ContainerSpec`]
//! trusts it.

use ocid_api::cri;

use super::pod::{
    apparmor, check_count, check_labels, checked_name, groups_policy, id_mappings, known, resources, seccomp,
    selinux, user_id, user_ids, user_namespace,
};
use crate::error::{Error, Result};
use crate::spec::{
    CapabilityChanges, CapabilityRequest, CapabilitySet, ContainerName, ContainerPid, ContainerSecurity,
    ContainerSpec, Device, EnvVar, ImageSpec, ImageVolume, Mount, PodPid, PodSpec, Propagation, RunAs,
    Signal, check_absolute, check_relative, check_text,
};

const MOUNTS_MAX: usize = 512;
const DEVICES_MAX: usize = 256;
const PATHS_MAX: usize = 512;
/// Arguments and environment together; less than the kernel takes for an exec.
const ARGS_BYTES_MAX: usize = 1 << 20;
const REFERENCE_BYTES_MAX: usize = 4096;

/// The container that a request asks for, in that pod.
///
/// # Errors
/// `InvalidArgument` with the name of the first field that is wrong.
pub fn container_spec(config: cri::ContainerConfig, sandbox: &PodSpec) -> Result<ContainerSpec> {
    let metadata = config.metadata.ok_or_else(|| Error::invalid("container config has no metadata"))?;
    let name =
        ContainerName { name: checked_name("metadata.name", metadata.name)?, attempt: metadata.attempt };
    let image = image_spec(config.image.ok_or_else(|| Error::invalid("container config has no image"))?)?;
    if image.image.is_empty() {
        return Err(Error::invalid("image.image is empty"));
    }
    check_labels(&config.labels, &config.annotations)?;
    check_args(&config.command, &config.args, &config.envs)?;
    if !config.working_dir.is_empty() {
        check_absolute("working_dir", &config.working_dir)?;
    }
    check_relative("log_path", &config.log_path)?;

    let linux = config.linux.unwrap_or_default();
    let security = security(linux.security_context.unwrap_or_default(), sandbox)?;
    let mounts = mounts(config.mounts, security.privileged)?;
    Ok(ContainerSpec {
        name,
        image,
        command: config.command,
        args: config.args,
        working_dir: config.working_dir,
        envs: config.envs.into_iter().map(env_var).collect::<Result<_>>()?,
        mounts,
        devices: devices(config.devices)?,
        cdi_devices: cdi_devices(config.cdi_devices)?,
        labels: config.labels.into_iter().collect(),
        annotations: config.annotations.into_iter().collect(),
        log_path: config.log_path,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
        resources: linux.resources.map(|r| resources("linux.resources", r)).transpose()?.unwrap_or_default(),
        security,
        stop_signal: signal(config.stop_signal)?,
    })
}

fn image_spec(image: cri::ImageSpec) -> Result<ImageSpec> {
    for (field, text) in [
        ("image.image", &image.image),
        ("image.user_specified_image", &image.user_specified_image),
        ("image.runtime_handler", &image.runtime_handler),
        ("image.image_ref", &image.image_ref),
    ] {
        check_text(field, text, REFERENCE_BYTES_MAX)?;
    }
    check_labels(&image.annotations, &Default::default())?;
    Ok(ImageSpec {
        image: image.image,
        user_specified_image: image.user_specified_image,
        runtime_handler: image.runtime_handler,
        annotations: image.annotations.into_iter().collect(),
        image_ref: image.image_ref,
    })
}

fn check_args(command: &[String], args: &[String], envs: &[cri::KeyValue]) -> Result<()> {
    let texts = command.iter().chain(args);
    // Each entry also costs its end and its pointer.
    let bytes: usize = texts.clone().map(|arg| arg.len() + 9).sum::<usize>()
        + envs.iter().map(|env| env.key.len() + env.value.len() + 10).sum::<usize>();
    if bytes > ARGS_BYTES_MAX {
        return Err(Error::invalid(format!("command, args and envs have more than {ARGS_BYTES_MAX} bytes")));
    }
    if texts.into_iter().any(|arg| arg.contains('\0')) {
        return Err(Error::invalid("command or args contains NUL"));
    }
    Ok(())
}

fn env_var(env: cri::KeyValue) -> Result<EnvVar> {
    if env.key.is_empty() || env.key.contains('=') || env.key.contains('\0') {
        return Err(Error::invalid("envs has a name that is empty or contains `=` or NUL"));
    }
    // The name may be told, the value may be a secret.
    let value: Vec<u8> = env.value;
    if value.contains(&0) {
        return Err(Error::invalid(format!("envs[{:?}] contains NUL", env.key)));
    }
    Ok(EnvVar { name: env.key, value })
}

fn mounts(mounts: Vec<cri::Mount>, privileged: bool) -> Result<Vec<Mount>> {
    check_count("mounts", mounts.len(), MOUNTS_MAX)?;
    mounts.into_iter().map(|mount| checked_mount(mount, privileged)).collect()
}

fn checked_mount(mount: cri::Mount, privileged: bool) -> Result<Mount> {
    check_absolute("mounts.container_path", &mount.container_path)?;
    let field = format!("mounts[{:?}]", mount.container_path);
    check_target(&field, &mount.container_path, &mount.host_path)?;
    let propagation = match known(&format!("{field}.propagation"), mount.propagation)? {
        cri::MountPropagation::PropagationPrivate => Propagation::Private,
        cri::MountPropagation::PropagationHostToContainer => Propagation::HostToContainer,
        cri::MountPropagation::PropagationBidirectional => Propagation::Bidirectional,
    };
    if propagation == Propagation::Bidirectional && !privileged {
        return Err(Error::invalid(format!("{field} is bidirectional, but the container is not privileged")));
    }
    if mount.recursive_read_only && !mount.readonly {
        return Err(Error::invalid(format!("{field} is recursive_read_only, but not readonly")));
    }
    if mount.recursive_read_only && propagation != Propagation::Private {
        return Err(Error::invalid(format!(
            "{field} is recursive_read_only, but its propagation is not private"
        )));
    }
    let image = match mount.image {
        // Clients may send an empty message for "none".
        Some(image) if !image.image.is_empty() => {
            if !mount.host_path.is_empty() {
                return Err(Error::invalid(format!("{field} has both a host_path and an image")));
            }
            if !mount.readonly {
                return Err(Error::invalid(format!("{field} is an image, but not readonly")));
            }
            if propagation != Propagation::Private {
                return Err(Error::invalid(format!(
                    "{field} is an image, but its propagation is not private"
                )));
            }
            check_relative(&format!("{field}.image_sub_path"), &mount.image_sub_path)?;
            Some(ImageVolume { image: image_spec(image)?, sub_path: mount.image_sub_path })
        }
        _ => {
            check_absolute(&format!("{field}.host_path"), &mount.host_path)?;
            if !mount.image_sub_path.is_empty() {
                return Err(Error::invalid(format!("{field} has an image_sub_path, but no image")));
            }
            None
        }
    };
    let uid_mappings = id_mappings(&format!("{field}.uidMappings"), &mount.uid_mappings)?;
    let gid_mappings = id_mappings(&format!("{field}.gidMappings"), &mount.gid_mappings)?;
    if uid_mappings.is_empty() != gid_mappings.is_empty() {
        return Err(Error::invalid(format!("{field} maps only one of users and groups")));
    }
    if mount.mount_options.iter().any(|option| !["noexec", "nodev", "nosuid"].contains(&option.as_str())) {
        return Err(Error::invalid(format!("{field}.mount_options are of noexec, nodev and nosuid")));
    }
    Ok(Mount {
        container_path: mount.container_path,
        host_path: mount.host_path,
        image,
        readonly: mount.readonly,
        recursive_read_only: mount.recursive_read_only,
        propagation,
        selinux_relabel: mount.selinux_relabel,
        uid_mappings,
        gid_mappings,
        mount_options: mount.mount_options,
    })
}

/// What the runtime trusts must not be covered: a false /proc would take its writes. These are the exceptions that
/// runc makes too; system-information filesystems replace such files.
fn check_target(field: &str, container_path: &str, host_path: &str) -> Result<()> {
    const PROC_FILES: [&str; 11] = [
        "cpuinfo",
        "diskstats",
        "loadavg",
        "meminfo",
        "net/dev",
        "slabinfo",
        "stat",
        "swaps",
        "uptime",
        "sys/kernel/ns_last_pid",
        "sys/crypto/fips_enabled",
    ];
    let parts =
        |path: &str| path.split('/').filter(|p| !p.is_empty() && *p != ".").collect::<Vec<_>>().join("/");
    let target = parts(container_path);
    if target.is_empty() {
        return Err(Error::invalid(format!("{field} would cover the root filesystem")));
    }
    if target == "proc" && parts(host_path) != "proc" {
        return Err(Error::invalid(format!("{field} would cover /proc")));
    }
    if let Some(below) = target.strip_prefix("proc/")
        && !PROC_FILES.contains(&below)
    {
        return Err(Error::invalid(format!("{field} is inside /proc")));
    }
    Ok(())
}

fn devices(devices: Vec<cri::Device>) -> Result<Vec<Device>> {
    check_count("devices", devices.len(), DEVICES_MAX)?;
    devices
        .into_iter()
        .map(|device| {
            check_absolute("devices.host_path", &device.host_path)?;
            let container_path = if device.container_path.is_empty() {
                device.host_path.clone()
            } else {
                device.container_path
            };
            check_absolute("devices.container_path", &container_path)?;
            check_target("devices.container_path", &container_path, "")?;
            let permissions =
                if device.permissions.is_empty() { "rwm".to_owned() } else { device.permissions };
            if permissions.len() > 3 || !permissions.chars().all(|c| matches!(c, 'r' | 'w' | 'm')) {
                return Err(Error::invalid("devices.permissions are of r, w and m"));
            }
            Ok(Device { container_path, host_path: device.host_path, permissions })
        })
        .collect()
}

fn cdi_devices(devices: Vec<cri::CdiDevice>) -> Result<Vec<String>> {
    check_count("CDI_devices", devices.len(), DEVICES_MAX)?;
    devices
        .into_iter()
        .map(|device| {
            check_text("CDI_devices.name", &device.name, 512)?;
            let qualified = device.name.split_once('=').is_some_and(|(kind, name)| {
                !name.is_empty() && kind.split_once('/').is_some_and(|(v, c)| !v.is_empty() && !c.is_empty())
            });
            if !qualified {
                return Err(Error::invalid("CDI_devices.name is not of the form vendor/class=name"));
            }
            Ok(device.name)
        })
        .collect()
}

fn security(context: cri::LinuxContainerSecurityContext, sandbox: &PodSpec) -> Result<ContainerSecurity> {
    if context.privileged && !sandbox.security.privileged {
        return Err(Error::invalid("the container is privileged, but its pod is not"));
    }
    #[allow(deprecated)] // A client may still send only the old fields.
    let (old_seccomp, old_apparmor) = (context.seccomp_profile_path, context.apparmor_profile);
    let run_as = run_as(context.run_as_user, context.run_as_username)?;
    let run_as_group = context.run_as_group.map(|id| user_id("run_as_group", id.value)).transpose()?;
    if run_as_group.is_some() && run_as == RunAs::Image {
        return Err(Error::invalid("run_as_group without run_as_user or run_as_username"));
    }
    for (field, paths) in
        [("masked_paths", &context.masked_paths), ("readonly_paths", &context.readonly_paths)]
    {
        check_count(field, paths.len(), PATHS_MAX)?;
        paths.iter().try_for_each(|path| check_absolute(field, path))?;
    }
    Ok(ContainerSecurity {
        capabilities: capabilities(context.capabilities.unwrap_or_default())?,
        privileged: context.privileged,
        pid: pid_namespace(context.namespace_options, sandbox)?,
        run_as,
        run_as_group,
        supplemental_groups: user_ids("supplemental_groups", &context.supplemental_groups)?,
        supplemental_groups_policy: groups_policy(context.supplemental_groups_policy)?,
        readonly_rootfs: context.readonly_rootfs,
        no_new_privs: context.no_new_privs,
        masked_paths: context.masked_paths,
        readonly_paths: context.readonly_paths,
        seccomp: seccomp(context.seccomp, &old_seccomp)?,
        apparmor: apparmor(context.apparmor, &old_apparmor)?,
        selinux: context.selinux_options.map(selinux).transpose()?,
    })
}

fn run_as(uid: Option<cri::Int64Value>, name: String) -> Result<RunAs> {
    match uid {
        Some(_) if !name.is_empty() => Err(Error::invalid("both run_as_user and run_as_username are set")),
        Some(uid) => Ok(RunAs::Uid(user_id("run_as_user", uid.value)?)),
        None if name.is_empty() => Ok(RunAs::Image),
        None => {
            check_text("run_as_username", &name, 256)?;
            if name.contains(':') {
                return Err(Error::invalid("run_as_username contains `:`"));
            }
            Ok(RunAs::Name(name))
        }
    }
}

/// Network, IPC and users are always the pod's; a container that asks for the node's where the pod does not is refused,
/// and one that says nothing gets what its pod has.
fn pid_namespace(options: Option<cri::NamespaceOption>, sandbox: &PodSpec) -> Result<ContainerPid> {
    use cri::NamespaceMode;
    let of_pod = match sandbox.namespaces.pid {
        PodPid::Container => ContainerPid::Container,
        PodPid::Pod | PodPid::Node => ContainerPid::Pod,
    };
    let Some(options) = options else { return Ok(of_pod) };
    for (field, mode) in [("network", options.network), ("ipc", options.ipc)] {
        let mode = known(&format!("namespace_options.{field}"), mode)?;
        if !matches!(mode, NamespaceMode::Pod | NamespaceMode::Node) {
            return Err(Error::invalid(format!("namespace_options.{field} is POD or NODE")));
        }
    }
    if let Some(asked) = options.userns_options
        && user_namespace(asked)? != sandbox.namespaces.user
    {
        return Err(Error::invalid("namespace_options.userns_options differ from the pod's"));
    }
    match known("namespace_options.pid", options.pid)? {
        NamespaceMode::Container => Ok(ContainerPid::Container),
        NamespaceMode::Pod if sandbox.namespaces.pid == PodPid::Container => {
            Err(Error::invalid("namespace_options.pid is POD, but the pod has no PID namespace of its own"))
        }
        NamespaceMode::Pod => Ok(ContainerPid::Pod),
        NamespaceMode::Node if sandbox.namespaces.pid == PodPid::Node => Ok(ContainerPid::Node),
        NamespaceMode::Node => {
            Err(Error::invalid("namespace_options.pid is NODE, but the pod does not use the node's"))
        }
        NamespaceMode::Target => {
            let id = options.target_id;
            if id.is_empty() || id.len() > ocid_api::id::LEN || !id.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(Error::invalid("namespace_options.target_id is not the id of a container"));
            }
            Ok(ContainerPid::Target(id))
        }
    }
}

fn capabilities(changes: cri::Capability) -> Result<CapabilityChanges> {
    Ok(CapabilityChanges {
        add: capability_request("add_capabilities", &changes.add_capabilities)?,
        drop: capability_request("drop_capabilities", &changes.drop_capabilities)?,
        ambient: capability_request("add_ambient_capabilities", &changes.add_ambient_capabilities)?,
    })
}

fn capability_request(field: &str, names: &[String]) -> Result<CapabilityRequest> {
    check_count(field, names.len(), PATHS_MAX)?;
    let mut request = CapabilityRequest::default();
    for name in names {
        if name.eq_ignore_ascii_case("all") {
            request.all = true;
            continue;
        }
        let shown = || name.chars().take(64).collect::<String>();
        let capability = CapabilitySet::named(name)
            .ok_or_else(|| Error::invalid(format!("{field} has the unknown capability {:?}", shown())))?;
        request.named = request.named.union(capability);
    }
    Ok(request)
}

/// A signal as CRI says it; the two that belong to the C library have no name there.
pub fn cri_signal(signal: Signal) -> cri::Signal {
    let name = signal.name().replace('+', "PLUS").replace('-', "MINUS");
    cri::Signal::from_str_name(&format!("SIGNAL_{name}")).unwrap_or(cri::Signal::RuntimeDefault)
}

/// CRI's enum spells the names without punctuation: `SIGNAL_SIGRTMINPLUS1`.
fn signal(value: i32) -> Result<Option<Signal>> {
    let known = known::<cri::Signal>("stop_signal", value)?;
    if known == cri::Signal::RuntimeDefault {
        return Ok(None);
    }
    let name = known.as_str_name().trim_start_matches("SIGNAL_").replace("PLUS", "+").replace("MINUS", "-");
    Signal::parse(&name)
        .map(Some)
        .ok_or_else(|| Error::invalid(format!("stop_signal {name} is not a signal of this system")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cri::pod::{pod_spec, tests::good as good_pod};
    use crate::error::Kind;

    fn sandbox() -> PodSpec {
        pod_spec(good_pod(), String::new()).unwrap()
    }

    fn good() -> cri::ContainerConfig {
        cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata { name: "app".into(), attempt: 0 }),
            image: Some(cri::ImageSpec { image: "sha256:1".into(), ..Default::default() }),
            linux: Some(cri::LinuxContainerConfig {
                security_context: Some(cri::LinuxContainerSecurityContext::default()),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn context(config: &mut cri::ContainerConfig) -> &mut cri::LinuxContainerSecurityContext {
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap()
    }

    fn options(config: &mut cri::ContainerConfig) -> &mut cri::NamespaceOption {
        context(config).namespace_options.get_or_insert_default()
    }

    fn bind(target: &str) -> cri::Mount {
        cri::Mount { container_path: target.into(), host_path: "/srv".into(), ..Default::default() }
    }

    fn image(readonly: bool) -> cri::Mount {
        let image = Some(cri::ImageSpec { image: "sha256:2".into(), ..Default::default() });
        cri::Mount { container_path: "/i".into(), image, readonly, ..Default::default() }
    }

    fn env(key: &str, value: &[u8]) -> cri::KeyValue {
        cri::KeyValue { key: key.into(), value: value.to_vec() }
    }

    type Change = fn(&mut cri::ContainerConfig);

    #[test]
    fn bad_containers_are_refused_with_the_name_of_the_field() {
        let table: &[(&str, Change)] = &[
            ("metadata", |c| c.metadata = None),
            ("metadata.name", |c| c.metadata.as_mut().unwrap().name = "../x".into()),
            ("image", |c| c.image = None),
            ("image.image", |c| c.image.as_mut().unwrap().image.clear()),
            ("image.image", |c| c.image.as_mut().unwrap().image = "a\n".into()),
            ("labels and annotations", |c| {
                c.labels.insert("x".repeat(300 << 10), String::new());
            }),
            ("command, args and envs", |c| c.args = vec!["x".repeat(1 << 20)]),
            ("command, args and envs", |c| c.envs = vec![env("A", &vec![b'x'; 1 << 20])]),
            ("command, args and envs", |c| c.args = vec![String::new(); 1 << 20]),
            ("command or args", |c| c.command = vec!["a\0b".into()]),
            ("envs", |c| c.envs = vec![env("", b"x")]),
            ("envs", |c| c.envs = vec![env("A=B", b"x")]),
            ("envs", |c| c.envs = vec![env("A\0", b"x")]),
            ("envs", |c| c.envs = vec![env("A", b"x\0")]),
            ("working_dir", |c| c.working_dir = "srv".into()),
            ("working_dir", |c| c.working_dir = "/srv/../..".into()),
            ("log_path", |c| c.log_path = "/abs".into()),
            ("log_path", |c| c.log_path = "a/../../x".into()),
            ("log_path", |c| c.log_path = "a\0".into()),
            ("mounts has 513", |c| c.mounts = vec![bind("/x"); 513]),
            ("container_path", |c| c.mounts = vec![bind("x")]),
            ("container_path", |c| c.mounts = vec![bind("/proc/../sys")]),
            ("container_path", |c| c.mounts = vec![bind(&format!("/{}", "x".repeat(4096)))]),
            ("root filesystem", |c| c.mounts = vec![bind("//.")]),
            ("cover /proc", |c| c.mounts = vec![bind("/proc/")]),
            ("inside /proc", |c| c.mounts = vec![bind("/./proc//sys")]),
            ("host_path", |c| c.mounts = vec![cri::Mount { host_path: "rel".into(), ..bind("/x") }]),
            ("host_path", |c| c.mounts = vec![cri::Mount { host_path: "/a/../b".into(), ..bind("/x") }]),
            ("host_path", |c| c.mounts = vec![cri::Mount { host_path: String::new(), ..bind("/x") }]),
            ("propagation", |c| c.mounts = vec![cri::Mount { propagation: 9, ..bind("/x") }]),
            ("bidirectional", |c| c.mounts = vec![cri::Mount { propagation: 2, ..bind("/x") }]),
            ("not readonly", |c| c.mounts = vec![cri::Mount { recursive_read_only: true, ..bind("/x") }]),
            ("not private", |c| {
                c.mounts = vec![cri::Mount {
                    recursive_read_only: true,
                    readonly: true,
                    propagation: 1,
                    ..bind("/x")
                }];
            }),
            ("both a host_path and an image", |c| {
                c.mounts = vec![cri::Mount { host_path: "/x".into(), ..image(true) }]
            }),
            ("not readonly", |c| c.mounts = vec![image(false)]),
            ("image_sub_path", |c| {
                c.mounts = vec![cri::Mount { image_sub_path: "../x".into(), ..image(true) }]
            }),
            ("image_sub_path", |c| {
                c.mounts = vec![cri::Mount { image_sub_path: "/x".into(), ..image(true) }]
            }),
            ("image_sub_path", |c| c.mounts = vec![cri::Mount { image_sub_path: "x".into(), ..bind("/x") }]),
            ("mount_options", |c| {
                c.mounts = vec![cri::Mount { mount_options: vec!["suid".into()], ..bind("/x") }]
            }),
            ("maps only one", |c| {
                let range = cri::IdMapping { host_id: 1, container_id: 0, length: 1 };
                c.mounts = vec![cri::Mount { uid_mappings: vec![range], ..bind("/x") }];
            }),
            ("devices.host_path", |c| c.devices = vec![cri::Device::default()]),
            ("devices.permissions", |c| {
                c.devices = vec![cri::Device {
                    host_path: "/dev/a".into(),
                    permissions: "rx".into(),
                    ..Default::default()
                }];
            }),
            ("devices has 257", |c| c.devices = vec![cri::Device::default(); 257]),
            ("CDI_devices", |c| c.cdi_devices = vec![cri::CdiDevice { name: "gpu".into() }]),
            ("privileged", |c| context(c).privileged = true),
            ("run_as_group", |c| context(c).run_as_group = Some(cri::Int64Value { value: 1 })),
            ("run_as_user", |c| context(c).run_as_user = Some(cri::Int64Value { value: 4_294_967_296 })),
            ("run_as_username", |c| {
                context(c).run_as_user = Some(cri::Int64Value { value: 1 });
                context(c).run_as_username = "root".into();
            }),
            ("run_as_username", |c| context(c).run_as_username = "a:0".into()),
            ("masked_paths", |c| context(c).masked_paths = vec!["proc".into()]),
            ("readonly_paths", |c| context(c).readonly_paths = vec!["/a/..".into()]),
            ("add_capabilities", |c| {
                context(c).capabilities = Some(cri::Capability {
                    add_capabilities: vec!["NET_ADMINN".into()],
                    ..Default::default()
                });
            }),
            ("pid is NODE", |c| options(c).pid = 2),
            ("target_id", |c| options(c).pid = 3),
            ("target_id", |c| {
                options(c).pid = 3;
                options(c).target_id = "../../1".into();
            }),
            ("network", |c| options(c).network = 1),
            ("userns_options", |c| {
                let range = cri::IdMapping { host_id: 1000, container_id: 0, length: 10 };
                options(c).userns_options =
                    Some(cri::UserNamespace { mode: 0, uids: vec![range], gids: vec![range] });
            }),
            ("seccomp", |c| {
                context(c).seccomp =
                    Some(cri::SecurityProfile { profile_type: 2, localhost_ref: "a.json".into() });
            }),
            ("stop_signal", |c| c.stop_signal = 99),
        ];
        for (field, change) in table {
            let mut config = good();
            change(&mut config);
            let error = container_spec(config, &sandbox()).expect_err(field);
            assert_eq!(error.kind(), Kind::InvalidArgument);
            assert!(error.to_string().contains(field), "{field}: {error}");
        }
    }

    #[test]
    fn an_error_never_tells_a_value_of_the_environment() {
        let config = cri::ContainerConfig { envs: vec![env("TOKEN", b"s3cret\0")], ..good() };
        let error = container_spec(config, &sandbox()).unwrap_err();
        assert!(!error.to_string().contains("s3cret") && error.to_string().contains("TOKEN"));
    }

    #[test]
    fn a_container_is_kept_as_it_was_asked_for() {
        let mut pod = sandbox();
        pod.security.privileged = true;
        let mut config = good();
        context(&mut config).privileged = true;
        context(&mut config).capabilities = Some(cri::Capability {
            add_capabilities: vec!["all".into(), "CAP_NET_ADMIN".into()],
            drop_capabilities: vec!["net_raw".into()],
            ..Default::default()
        });
        config.envs = vec![env("X", b"\xff")];
        config.mounts = vec![
            cri::Mount { propagation: 2, ..bind("/x") },
            cri::Mount { image_sub_path: "etc".into(), ..image(true) },
            cri::Mount { host_path: "/proc".into(), ..bind("/proc") },
            bind("/proc/cpuinfo"),
        ];
        config.devices = vec![cri::Device { host_path: "/dev/fuse".into(), ..Default::default() }];
        config.log_path = "app/0.log".into();
        let spec = container_spec(config, &pod).unwrap();
        assert!(spec.security.capabilities.add.all && spec.security.privileged);
        assert_eq!(spec.security.capabilities.drop.named, CapabilitySet::named("NET_RAW").unwrap());
        assert_eq!(spec.envs[0].value, b"\xff");
        assert_eq!(spec.mounts[1].image.as_ref().unwrap().sub_path, "etc");
        assert_eq!(
            (spec.devices[0].container_path.as_str(), spec.devices[0].permissions.as_str()),
            ("/dev/fuse", "rwm")
        );
        assert!(container_spec(cri::ContainerConfig { linux: None, ..good() }, &pod).is_ok());
    }

    #[test]
    fn a_container_that_says_nothing_gets_what_its_pod_has() {
        let mut pod = sandbox();
        for (of_pod, said, expected) in [
            (PodPid::Pod, None, Some(ContainerPid::Pod)),
            (PodPid::Node, None, Some(ContainerPid::Pod)),
            (PodPid::Container, None, Some(ContainerPid::Container)),
            (PodPid::Pod, Some(1), Some(ContainerPid::Container)),
            (PodPid::Container, Some(0), None),
            (PodPid::Node, Some(2), Some(ContainerPid::Node)),
            (PodPid::Node, Some(0), Some(ContainerPid::Pod)),
        ] {
            pod.namespaces.pid = of_pod;
            let mut config = good();
            if let Some(pid) = said {
                options(&mut config).pid = pid;
            }
            let found = container_spec(config, &pod).ok().map(|spec| spec.security.pid);
            assert_eq!(found, expected, "{of_pod:?} {said:?}");
        }
    }

    #[test]
    fn every_signal_of_the_enum_is_known() {
        assert_eq!(signal(0).unwrap(), None);
        let number = |value: i32| signal(value).unwrap().unwrap().number();
        for value in 1..=65 {
            let there = signal(value).unwrap().unwrap();
            assert_eq!(signal(cri_signal(there).into()).unwrap(), Some(there), "{value}");
        }
        use cri::Signal::{Sigkill, Sigrtmaxminus14, Sigrtmin, Sigrtminplus15, Sigusr1};
        for (signal, expected) in
            [(Sigkill, 9), (Sigusr1, 10), (Sigrtmin, 34), (Sigrtminplus15, 49), (Sigrtmaxminus14, 50)]
        {
            assert_eq!(number(signal.into()), expected);
        }
    }
}
