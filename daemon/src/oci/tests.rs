//! The whole document: by golden file, by property, and once under a real runtime.
//!
//! A case is a directory in `testdata`: `input.json` says what was asked, `config.json` what came of it. To accept new
//! results, run with `UPDATE_EXPECT=1` and read the difference.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use ocid_api::cgroup::Version;
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::Value;

use super::*;
use crate::error::Kind;
use crate::host::DeviceKind;
use crate::spec::*;

const BUSYBOX: &str = "/bin/busybox";

/// What a case says; everything else is as on a usual node.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Case {
    pod: PodSpec,
    container: ContainerSpec,
    entrypoint: Vec<String>,
    cmd: Vec<String>,
    env: Vec<String>,
    working_dir: String,
    image_user: String,
    passwd: String,
    group: String,
    cgroup_v2: bool,
    apparmor: bool,
    selinux: bool,
    no_sys_resource: bool,
    devices: bool,
    pids_limit: Option<i64>,
    seccomp_profile: Option<String>,
}

fn host() -> Host {
    Host {
        cgroup: Version::V1,
        controllers: ["cpu", "cpuset", "hugetlb", "memory", "pids"].map(String::from).into(),
        systemd: false,
        kernel: (6, 1),
        hostname: "node-1".into(),
        apparmor: false,
        selinux: false,
        user_namespaces: true,
        bounding: CapabilitySet::ALL,
        oom_score_adj: -500,
        nofile_max: 1 << 20,
        hugepage_sizes: vec!["2MB".into()],
        swap_accounting: true,
        thermal_throttle: vec!["/sys/devices/system/cpu/cpu0/thermal_throttle".into()],
    }
}

fn namespace_paths() -> NamespacePaths {
    let path = |name: &str| Some(PathBuf::from(format!("/run/ocid/pods/p/ns/{name}")));
    NamespacePaths {
        net: path("net"),
        ipc: path("ipc"),
        uts: path("uts"),
        pid: path("pid"),
        user: path("user"),
        target_pid: Some("/proc/42/ns/pid".into()),
    }
}

fn device() -> DeviceNode {
    DeviceNode {
        path: "/dev/fuse".into(),
        kind: DeviceKind::Char,
        major: 10,
        minor: 229,
        mode: 0o666,
        uid: 0,
        gid: 0,
        permissions: "rw".into(),
    }
}

fn build(case: &Case) -> Result<Spec> {
    let sys_resource = CapabilitySet::named("SYS_RESOURCE").unwrap();
    let host = Host {
        cgroup: if case.cgroup_v2 { Version::V2 } else { Version::V1 },
        apparmor: case.apparmor,
        selinux: case.selinux,
        bounding: if case.no_sys_resource {
            CapabilitySet::ALL.minus(sys_resource)
        } else {
            CapabilitySet::ALL
        },
        ..host()
    };
    let image = ImageDefaults {
        entrypoint: case.entrypoint.clone(),
        cmd: case.cmd.clone(),
        env: case.env.clone(),
        working_dir: case.working_dir.clone(),
        user: case.image_user.clone(),
        stop_signal: String::new(),
    };
    let user =
        user::resolve(&case.container.security, &image.user, case.passwd.as_bytes(), case.group.as_bytes())?;
    let file = |name: &str| Some(PathBuf::from(format!("/run/ocid/pods/p/files/{name}")));
    let shm = match case.pod.namespaces.ipc {
        Scope::Pod => "/run/ocid/pods/p/shm",
        Scope::Node => "/dev/shm",
    };
    let sources: Vec<PathBuf> = case
        .container
        .mounts
        .iter()
        .map(|mount| match &mount.image {
            Some(_) => "/var/lib/ocid/snapshots/image".into(),
            None => mount.host_path.clone().into(),
        })
        .collect();
    let devices = if case.devices { vec![device()] } else { Vec::new() };
    let policy =
        Policy { pids_limit: case.pids_limit, apparmor_profile: "ocid-default".into(), ..Policy::default() };
    let runtime =
        RuntimeFeatures { mount_options: vec!["rro".into()], seccomp: true, ..RuntimeFeatures::default() };
    runtime_spec(&Input {
        pod: &case.pod,
        container: &case.container,
        image: &image,
        user: &user,
        namespaces: &namespace_paths(),
        files: &PodFiles {
            hosts: file("hosts"),
            hostname: file("hostname"),
            resolv_conf: file("resolv.conf"),
            shm: Some(shm.into()),
        },
        mount_sources: &sources,
        devices: &devices,
        cgroups_path: "/kubepods/pod1/c",
        seccomp_profile: case.seccomp_profile.as_ref().map(String::as_bytes),
        host: &host,
        runtime: &runtime,
        policy: &policy,
    })
}

/// Sets have no order; files need one.
fn sorted(mut value: Value) -> Value {
    if let Some(capabilities) = value.pointer_mut("/process/capabilities").and_then(Value::as_object_mut) {
        for set in capabilities.values_mut().filter_map(Value::as_array_mut) {
            set.sort_by(|a, b| a.as_str().cmp(&b.as_str()));
        }
    }
    value
}

#[test]
fn documents_are_as_in_testdata() {
    let testdata = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/oci/testdata");
    let update = std::env::var_os("UPDATE_EXPECT").is_some();
    let mut cases: Vec<PathBuf> =
        fs::read_dir(&testdata).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    assert!(cases.len() >= 10, "the cases are gone: {cases:?}");
    for directory in cases {
        // The profile is another one on another architecture.
        if directory.ends_with("seccomp-default") && !cfg!(target_arch = "x86_64") {
            continue;
        }
        let input = fs::read(directory.join("input.json")).unwrap();
        let case: Case = serde_json::from_slice(&input).unwrap_or_else(|e| panic!("{directory:?}: {e}"));
        let text = match build(&case) {
            Ok(spec) => serde_json::to_string_pretty(&sorted(serde_json::to_value(&spec).unwrap())).unwrap(),
            Err(error) => format!("{error:?}"),
        } + "\n";
        let expected = directory.join("config.json");
        if update {
            fs::write(&expected, &text).unwrap();
        }
        let expected = fs::read_to_string(&expected).unwrap();
        assert!(text == expected, "{directory:?} is not as expected; now it is:\n{text}");
    }
}

fn runnable() -> Case {
    Case { cmd: vec!["/bin/true".into()], ..Case::default() }
}

#[test]
fn commands_and_arguments_follow_the_rules_of_images() {
    let words = |text: &str| text.split_whitespace().map(String::from).collect::<Vec<_>>();
    for (entrypoint, cmd, command, args, expected) in [
        ("e", "c", "", "", Some("e c")),
        ("e", "c", "x", "", Some("x")),
        ("e", "c", "", "y", Some("e y")),
        ("e", "c", "x", "y", Some("x y")),
        ("", "c", "", "", Some("c")),
        ("", "", "", "y", Some("y")),
        ("", "", "", "", None),
    ] {
        let mut case = Case { entrypoint: words(entrypoint), cmd: words(cmd), ..Case::default() };
        (case.container.command, case.container.args) = (words(command), words(args));
        let found = build(&case).ok().map(|spec| spec.process().clone().unwrap().args().clone().unwrap());
        assert_eq!(found, expected.map(words), "{entrypoint:?} {cmd:?} {command:?} {args:?}");
    }
}

#[test]
fn working_directories_stay_out_of_proc() {
    for (asked, expected) in [
        ("", Some("/")),
        ("app", Some("/app")),
        ("/a//./b/../c/", Some("/a/c")),
        ("/../../x", Some("/x")),
        ("/proc", Some("/proc")),
        ("/proc/self/fd/7", None),
        ("/x/../proc/self/fd/7", None),
        ("proc/1/root", None),
    ] {
        let case = Case { working_dir: asked.into(), ..runnable() };
        let found = build(&case).ok().map(|spec| spec.process().clone().unwrap().cwd().clone());
        assert_eq!(found, expected.map(PathBuf::from), "{asked:?}");
    }
}

#[test]
fn the_last_setting_of_a_variable_counts() {
    let mut case = Case {
        env: ["A=image", "PATH=/image", "BROKEN", "=x", "HOSTNAME=image", "B=image"].map(String::from).into(),
        ..runnable()
    };
    case.pod.hostname = "web-0".into();
    case.container.tty = true;
    let var = |name: &str, value: &str| EnvVar { name: name.into(), value: value.into() };
    case.container.envs = vec![var("B", "one"), var("C", "a=b"), var("B", "two")];
    let env = |case: &Case| build(case).map(|spec| spec.process().clone().unwrap().env().clone().unwrap());
    assert_eq!(
        env(&case).unwrap(),
        ["PATH=/image", "TERM=xterm", "A=image", "HOSTNAME=web-0", "B=two", "C=a=b"]
    );
    case.container.envs = vec![EnvVar { name: "SECRET".into(), value: b"s3cr\xff".to_vec() }];
    let error = env(&case).unwrap_err().to_string();
    assert!(error.contains("SECRET") && !error.contains("s3cr"), "{error}");
    assert!(!format!("{:?}", case.container).contains("s3cr"));
}

#[test]
fn capabilities_are_default_plus_added_minus_dropped() {
    const DEFAULT: &str = "CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE NET_RAW \
        SYS_CHROOT MKNOD AUDIT_WRITE SETFCAP";
    let set = |names: &str| -> CapabilitySet {
        names.split_whitespace().map(|name| CapabilitySet::named(name).unwrap()).collect()
    };
    let request = |names: &str| CapabilityRequest {
        all: names.split_whitespace().any(|name| name == "ALL"),
        named: set(&names.replace("ALL", "")),
    };
    let all = CapabilitySet::ALL.minus(set("SYS_RESOURCE"));
    for (add, drop, ambient, expected, expected_ambient) in [
        ("", "", "", Some(set(DEFAULT)), ""),
        ("NET_ADMIN", "", "", Some(set(DEFAULT).union(set("NET_ADMIN"))), ""),
        ("", "NET_RAW CHOWN", "", Some(set(DEFAULT).minus(set("NET_RAW CHOWN"))), ""),
        ("ALL", "", "", Some(all), ""),
        ("ALL", "SYS_ADMIN", "", Some(all.minus(set("SYS_ADMIN"))), ""),
        ("", "ALL", "", Some(CapabilitySet::EMPTY), ""),
        ("NET_ADMIN", "ALL", "", Some(set("NET_ADMIN")), ""),
        ("ALL", "ALL", "", Some(CapabilitySet::EMPTY), ""),
        ("NET_ADMIN", "NET_ADMIN", "NET_ADMIN", Some(set(DEFAULT)), ""),
        ("", "ALL", "NET_BIND_SERVICE", Some(set("NET_BIND_SERVICE")), "NET_BIND_SERVICE"),
        ("SYS_RESOURCE", "", "", None, ""),
    ] {
        let mut case = Case { no_sys_resource: true, ..runnable() };
        case.container.security.capabilities =
            CapabilityChanges { add: request(add), drop: request(drop), ambient: request(ambient) };
        let what = format!("add {add:?} drop {drop:?} ambient {ambient:?}");
        let Ok(spec) = build(&case) else {
            assert_eq!(expected, None, "{what}");
            continue;
        };
        let found = capabilities_of(&spec);
        assert_eq!(Some(found["bounding"]), expected, "{what}");
        assert_eq!(
            (found["effective"], found["permitted"]),
            (found["bounding"], found["bounding"]),
            "{what}"
        );
        assert_eq!(
            (found["ambient"], found["inheritable"]),
            (set(expected_ambient), set(expected_ambient)),
            "{what}"
        );
    }
}

fn capabilities_of(spec: &Spec) -> BTreeMap<String, CapabilitySet> {
    let value = serde_json::to_value(spec).unwrap();
    serde_json::from_value(value["process"]["capabilities"].clone()).unwrap()
}

#[test]
fn what_the_machine_cannot_do_is_an_error() {
    let localhost = Some(Profile::Localhost("/x".into()));
    type Change = fn(&mut Case, Option<Profile>);
    let cases: [(&str, Change); 5] = [
        ("AppArmor is off", |case, profile| case.container.security.apparmor = profile),
        ("could not be read", |case, profile| case.container.security.seccomp = profile),
        ("is not a seccomp profile", |case, profile| {
            case.container.security.seccomp = profile;
            case.seccomp_profile = Some("{}".into());
        }),
        ("needs cgroup v2", |case, _| {
            case.container.resources.unified.insert("memory.high".into(), "1".into());
        }),
        ("but its pod is not", |case, _| case.container.security.privileged = true),
    ];
    for (message, change) in cases {
        let mut case = runnable();
        change(&mut case, localhost.clone());
        let error = build(&case).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument);
        assert!(error.to_string().contains(message), "{error}");
    }
}

#[test]
fn an_exec_gets_what_the_container_has_and_a_terminal_type() {
    let mut case = runnable();
    case.container.security.capabilities.drop.all = true;
    let base = build(&case).unwrap().process().clone().unwrap();
    let exec = exec_process(&base, vec!["ls".into()], true);
    assert_eq!(exec.capabilities(), base.capabilities());
    assert_eq!((exec.terminal(), exec.args().as_deref()), (Some(true), Some(&["ls".to_owned()][..])));
    assert!(exec.env().as_ref().unwrap().contains(&"TERM=xterm".to_owned()));
    assert_eq!(exec_process(&base, vec!["ls".into()], false).env(), base.env());
}

#[test]
fn a_stop_sends_what_the_request_says_or_else_the_image() {
    let stop = |asked: Option<&str>, image: &str| {
        let container = ContainerSpec { stop_signal: asked.and_then(Signal::parse), ..Default::default() };
        stop_signal(&container, &ImageDefaults { stop_signal: image.into(), ..Default::default() }).name()
    };
    assert_eq!(stop(Some("SIGUSR1"), "SIGINT"), "SIGUSR1");
    for (image, expected) in [
        ("SIGINT", "SIGINT"),
        ("quit", "SIGQUIT"),
        ("3", "SIGQUIT"),
        ("RTMIN+3", "SIGRTMIN+3"),
        ("SIGRTMAX-14", "SIGRTMAX-14"),
        ("", "SIGTERM"),
        ("0", "SIGTERM"),
        ("65", "SIGTERM"),
        ("RTMIN+31", "SIGTERM"),
        ("SIGSIGINT", "SIGTERM"),
    ] {
        assert_eq!(stop(None, image), expected, "{image:?}");
    }
}

#[test]
fn a_blocked_address_family_cannot_pass_with_high_bits_set() {
    let profile = seccomp::default_profile(CapabilitySet::EMPTY, true, (6, 1));
    let profile = serde_json::to_value(profile).unwrap();
    let allowed = |family: u64| {
        let rules = profile["syscalls"].as_array().unwrap();
        rules.iter().filter(|rule| rule["names"] == serde_json::json!(["socket"])).any(|rule| {
            rule["args"].as_array().unwrap().iter().all(|arg| {
                let value = arg["value"].as_u64().unwrap();
                match arg["op"].as_str().unwrap() {
                    "SCMP_CMP_EQ" => family == value,
                    "SCMP_CMP_LT" => family < value,
                    op => panic!("{op} compares more bits than the kernel reads"),
                }
            })
        })
    };
    assert!([1, 2, 10, 16, 17, 39, 41, 44].into_iter().all(allowed));
    assert!(![38, 40, (1 << 32) | 38, (1 << 32) | 40, (1 << 63) | 38].into_iter().any(allowed));
}

fn any_case() -> impl Strategy<Value = Case> {
    let set = || prop::collection::vec(0..CAPABILITIES.len(), 0..4);
    let request = move || {
        (prop::bool::weighted(0.1), set()).prop_map(|(all, bits)| CapabilityRequest {
            all,
            named: bits.iter().map(|bit| CapabilitySet::named(CAPABILITIES[*bit]).unwrap()).collect(),
        })
    };
    let scope = || prop_oneof![Just(Scope::Pod), Just(Scope::Node)];
    let pod_pid = prop_oneof![Just(PodPid::Pod), Just(PodPid::Container), Just(PodPid::Node)];
    let pid = prop_oneof![
        Just(ContainerPid::Pod),
        Just(ContainerPid::Container),
        Just(ContainerPid::Node),
        Just(ContainerPid::Target("a".into()))
    ];
    (
        (request(), request(), request()),
        (scope(), scope(), pod_pid, pid),
        any::<[bool; 8]>(),
        prop::collection::vec("(/(dev|sys|proc|etc|etc/hosts|dev/shm|a|b)){1,3}", 0..4),
    )
        .prop_map(|((add, drop, ambient), (network, ipc, pod_pid, pid), flags, targets)| {
            let [pod_privileged, privileged, v2, devices, readonly, masked, no_sys_resource, tty] = flags;
            let mut case = Case { cgroup_v2: v2, devices, no_sys_resource, ..runnable() };
            case.pod.namespaces = PodNamespaces { network, ipc, pid: pod_pid, user: None };
            case.pod.security.privileged = pod_privileged;
            case.container.tty = tty;
            case.container.mounts = targets
                .into_iter()
                .map(|target| Mount {
                    container_path: target,
                    host_path: "/host".into(),
                    readonly,
                    ..Mount::default()
                })
                .collect();
            case.container.security = ContainerSecurity {
                capabilities: CapabilityChanges { add, drop, ambient },
                privileged,
                pid,
                masked_paths: if masked { vec!["/only/this".into()] } else { vec![] },
                ..ContainerSecurity::default()
            };
            case
        })
}

proptest! {
    #[test]
    fn a_document_never_grants_more_than_was_asked(case in any_case()) {
        let Ok(spec) = build(&case) else { return Ok(()) };
        let security = &case.container.security;
        prop_assert!(!security.privileged || case.pod.security.privileged);
        let linux = spec.linux().clone().unwrap();

        let all = CapabilitySet::ALL;
        let changes = &security.capabilities;
        let default: CapabilitySet = build(&runnable()).map(|spec| capabilities_of(&spec)["bounding"]).unwrap();
        let asked = default.union(changes.add.named).union(changes.ambient.named);
        let may = if security.privileged || changes.add.all || changes.ambient.all { all } else { asked };
        for (name, set) in capabilities_of(&spec) {
            prop_assert!(may.contains(set), "{name}: {set:?}");
            if !security.privileged {
                prop_assert!(set.intersection(changes.drop.named).is_empty(), "{name}: {set:?}");
            }
            if name == "ambient" || name == "inheritable" {
                prop_assert!(changes.ambient.all || changes.ambient.named.contains(set));
            }
        }

        let namespaces = linux.namespaces().clone().unwrap();
        let has = |typ| namespaces.iter().any(|namespace| namespace.typ() == typ);
        prop_assert!(has(LinuxNamespaceType::Mount));
        prop_assert!(has(LinuxNamespaceType::Network) || case.pod.namespaces.network == Scope::Node);
        prop_assert!(has(LinuxNamespaceType::Uts) || case.pod.namespaces.network == Scope::Node);
        prop_assert!(has(LinuxNamespaceType::Ipc) || case.pod.namespaces.ipc == Scope::Node);
        prop_assert!(has(LinuxNamespaceType::Pid) || case.pod.namespaces.pid == PodPid::Node);

        let rules = linux.resources().clone().unwrap().devices().clone().unwrap();
        let open = rules.iter().any(|rule| rule.allow() && rule.major().is_none() && rule.access().as_deref() != Some("m"));
        prop_assert!(!open || security.privileged);
        prop_assert!(rules[0].allow() == security.privileged);
        prop_assert!(linux.devices().is_none() || case.devices);
        if !security.privileged {
            prop_assert!(linux.masked_paths().clone().unwrap().contains(&"/proc/kcore".to_owned()));
            prop_assert!(linux.readonly_paths().clone().unwrap().contains(&"/proc/sys".to_owned()));
        }

        let mounts = spec.mounts().clone().unwrap();
        for mount in &mounts {
            let options = mount.options().clone().unwrap();
            let own = mount.source() != &Some("/host".into());
            if own && mount.destination().starts_with("/sys") && !security.privileged {
                prop_assert!(options.contains(&"ro".to_owned()), "{mount:?}");
            }
        }
        // Every volume is there, read-only if so asked, and comes after whatever it lies in.
        let volumes = mounts.iter().filter(|mount| mount.source() == &Some("/host".into()));
        prop_assert_eq!(volumes.count(), case.container.mounts.len());
        for (at, mount) in mounts.iter().enumerate().filter(|(_, mount)| mount.source() == &Some("/host".into())) {
            prop_assert!(!mounts[at + 1..].iter().any(|later| {
                mount.destination() != later.destination() && mount.destination().starts_with(later.destination())
            }), "{mount:?} is hidden");
        }
    }

    #[test]
    fn specs_survive_being_kept(case in any_case(), value in prop::collection::vec(any::<u8>(), 0..20)) {
        let mut container = case.container;
        container.envs = vec![EnvVar { name: "X".into(), value }];
        container.stop_signal = Signal::parse("SIGRTMIN+3");
        let json = serde_json::to_vec(&container).unwrap();
        prop_assert_eq!(serde_json::from_slice::<ContainerSpec>(&json).unwrap(), container);
        let json = serde_json::to_vec(&case.pod).unwrap();
        prop_assert_eq!(serde_json::from_slice::<PodSpec>(&json).unwrap(), case.pod);
    }
}

/// The document under a real runtime. Makes its own namespaces and a cgroup, and leaves nothing. Needs root, runc and a
/// static busybox; says so and passes without.
#[test]
fn a_container_runs_under_runc() {
    use std::process::{Command, Stdio};
    let runc =
        || Command::new("runc").arg("--version").stdout(Stdio::null()).status().is_ok_and(|s| s.success());
    if !nix::unistd::geteuid().is_root() || !Path::new(BUSYBOX).exists() || !runc() {
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), "skipped: needs root, runc and {BUSYBOX}");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let rootfs = directory.path().join(ROOTFS);
    for path in ["bin", "proc", "sys", "dev", "etc", "tmp"] {
        fs::create_dir_all(rootfs.join(path)).unwrap();
    }
    fs::copy(BUSYBOX, rootfs.join("bin/sh")).unwrap();
    let features = Command::new("runc").arg("features").output().unwrap().stdout;
    let runtime = RuntimeFeatures::parse(&features, "").unwrap();
    let host = Host::probe().unwrap();
    let mut holder = Command::new("unshare")
        .args(["--net", "--uts", "--ipc", "sleep", "600"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    // The namespaces are there once the program is another one.
    while !fs::read_to_string(format!("/proc/{}/comm", holder.id())).unwrap().starts_with("sleep") {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let namespace = |name: &str| Some(PathBuf::from(format!("/proc/{}/ns/{name}", holder.id())));
    let namespaces = NamespacePaths {
        net: namespace("net"),
        ipc: namespace("ipc"),
        uts: namespace("uts"),
        ..NamespacePaths::default()
    };

    let mut pod = PodSpec::default();
    pod.namespaces.pid = PodPid::Container;
    let mut plain = ContainerSpec::default();
    plain.security.pid = ContainerPid::Container;
    plain.security.seccomp = Some(Profile::RuntimeDefault);
    plain.security.capabilities.add.all = true;
    plain.resources.memory_limit = Some(64 << 20);
    plain.resources.memory_swap_limit = Some(64 << 20);
    plain.resources.oom_score_adj = Some(-998);
    plain.mounts.push(Mount {
        container_path: "/data".into(),
        host_path: "/etc".into(),
        readonly: true,
        recursive_read_only: true,
        ..Mount::default()
    });
    let mut privileged = plain.clone();
    privileged.security.privileged = true;
    let mut dropped = plain.clone();
    dropped.security.capabilities = CapabilityChanges::default();
    dropped.security.capabilities.drop.all = true;
    dropped.security.capabilities.ambient.named = CapabilitySet::named("NET_BIND_SERVICE").unwrap();
    dropped.security.run_as = RunAs::Uid(1000);
    dropped.security.readonly_rootfs = true;
    dropped.security.no_new_privs = true;

    let bounding = format!("{:016x}", u64::from_str_radix(&status_of_self("CapBnd"), 16).unwrap());
    for (name, spec, uid, seccomp, caps, ambient) in [
        ("all", &plain, "0", "2", bounding.as_str(), "0000000000000000"),
        ("privileged", &privileged, "0", "0", bounding.as_str(), "0000000000000000"),
        ("dropped", &dropped, "1000", "2", "0000000000000400", "0000000000000400"),
    ] {
        pod.security.privileged = spec.security.privileged;
        let mut container = spec.clone();
        let script = "set -e; cat /proc/self/status; id -u; touch /data/x 2>&1 || true; echo done";
        container.command = ["/bin/sh", "-c", script].map(String::from).into();
        let user = user::resolve(&container.security, "", b"", b"").unwrap();
        let id = format!("ocid-test-{}-{name}", std::process::id());
        let document = runtime_spec(&Input {
            pod: &pod,
            container: &container,
            image: &ImageDefaults::default(),
            user: &user,
            namespaces: &namespaces,
            files: &PodFiles::default(),
            mount_sources: &["/etc".into()],
            devices: &[],
            cgroups_path: &format!("/{id}"),
            seccomp_profile: None,
            host: &host,
            runtime: &runtime,
            policy: &Policy { pids_limit: Some(64), ..Policy::default() },
        })
        .unwrap();
        fs::write(directory.path().join("config.json"), serde_json::to_vec(&document).unwrap()).unwrap();
        let output = Command::new("runc")
            .arg("--root")
            .arg(directory.path().join("state"))
            .args(["run", "--bundle"])
            .arg(directory.path())
            .arg(&id)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let all = format!("{name}: {text}{}", String::from_utf8_lossy(&output.stderr));
        let line = |key: &str| {
            text.lines()
                .find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))
                .map(str::trim)
                .unwrap_or_default()
        };
        assert!(output.status.success() && text.ends_with("done\n"), "{all}");
        assert_eq!((line("Seccomp"), line("CapBnd"), line("CapAmb")), (seccomp, caps, ambient), "{all}");
        assert!(text.lines().any(|l| l == uid) && text.contains("Read-only file system"), "{all}");
    }
    holder.kill().unwrap();
    holder.wait().unwrap();
}

fn status_of_self(key: &str) -> String {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    status.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':')).unwrap().trim().to_owned()
}
