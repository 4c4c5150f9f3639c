//! What was asked: pods and containers as validated data, free of CRI's types.
//!
//! `cri/` makes these from requests and is the only place that checks them; everyone else may trust them. They are
//! kept as JSON beside the shim's records, so a daemon must read what an older one wrote: every struct takes missing
//! fields from its default, fields are only added, and enums have names that never change.
//!
//! Never here: decisions, file access, or values of environment variables in `Debug` output.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};

/// A pod: what CRI calls a sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodSpec {
    /// Who it is.
    pub name: PodName,
    /// Host name inside the pod; empty only where the pod uses the node's network.
    pub hostname: String,
    /// Absolute directory of the containers' logs; empty for none.
    pub log_directory: String,
    /// Content of resolv.conf; `None` means the node's.
    pub dns: Option<Dns>,
    /// Ports to publish.
    pub port_mappings: Vec<PortMapping>,
    /// Returned as they were given.
    pub labels: BTreeMap<String, String>,
    /// Returned as they were given; they change nothing.
    pub annotations: BTreeMap<String, String>,
    /// Name of the runtime handler; empty for the default.
    pub runtime_handler: String,
    /// Cgroup below which the containers go, as a path or as a systemd slice; empty for our own choice.
    pub cgroup_parent: String,
    /// Kernel settings by dotted name; only of namespaces that are the pod's own.
    pub sysctls: BTreeMap<String, String>,
    /// What the pod shares with the node.
    pub namespaces: PodNamespaces,
    /// Security settings of the pod as a whole.
    pub security: PodSecurity,
    /// Sum of the containers' resources.
    pub resources: Option<Resources>,
    /// What the pod costs on top.
    pub overhead: Option<Resources>,
}

/// A pod's identity: a retry with the same name is the same pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct PodName {
    /// Name of the pod.
    pub name: String,
    /// Its namespace in the cluster.
    pub namespace: String,
    /// Its unique id in the cluster.
    pub uid: String,
    /// How often it has been made anew.
    pub attempt: u32,
}

impl fmt::Display for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} (uid {}, attempt {})", self.namespace, self.name, self.uid, self.attempt)
    }
}

/// The lines of resolv.conf.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    /// `nameserver`, one line each.
    pub servers: Vec<String>,
    /// `search`, one line.
    pub searches: Vec<String>,
    /// `options`, one line.
    pub options: Vec<String>,
}

/// A port of the pod and the node's port that leads to it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PortMapping {
    /// Which transport.
    pub protocol: Protocol,
    /// In the pod.
    pub container_port: u16,
    /// On the node; 0 publishes nothing.
    pub host_port: u16,
    /// Address on the node; empty for all.
    pub host_ip: String,
}

/// A transport protocol.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// Whose network and IPC namespaces a pod uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// The pod's own.
    #[default]
    Pod,
    /// The node's.
    Node,
}

/// Whose PID namespace the containers of a pod use unless they say otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PodPid {
    /// One for the whole pod.
    #[default]
    Pod,
    /// Each container its own.
    Container,
    /// The node's.
    Node,
}

/// Which namespaces a pod has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodNamespaces {
    /// Network; the UTS namespace follows it.
    pub network: Scope,
    /// Processes.
    pub pid: PodPid,
    /// IPC and /dev/shm.
    pub ipc: Scope,
    /// Users; `None` means the node's.
    pub user: Option<UserNamespace>,
}

/// A user namespace's one mapping, the same for users and groups.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UserNamespace {
    /// Users.
    pub uids: Vec<IdMapping>,
    /// Groups.
    pub gids: Vec<IdMapping>,
}

/// A range of ids inside and outside a user namespace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IdMapping {
    /// First id outside.
    pub host_id: u32,
    /// First id inside.
    pub container_id: u32,
    /// How many.
    pub length: u32,
}

/// Security settings of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodSecurity {
    /// Whether containers of this pod may be privileged.
    pub privileged: bool,
    /// User of the pod.
    pub run_as_user: Option<u32>,
    /// Group of the pod.
    pub run_as_group: Option<u32>,
    /// More groups.
    pub supplemental_groups: Vec<u32>,
    /// Whether the image's groups count.
    pub supplemental_groups_policy: GroupsPolicy,
    /// Read-only root filesystem.
    pub readonly_rootfs: bool,
    /// System call filter; `None`: nothing was said.
    pub seccomp: Option<Profile>,
    /// AppArmor profile; `None`: nothing was said.
    pub apparmor: Option<Profile>,
    /// SELinux label.
    pub selinux: Option<Selinux>,
}

/// A container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerSpec {
    /// Who it is, within its pod.
    pub name: ContainerName,
    /// What it runs.
    pub image: ImageSpec,
    /// Replaces the image's entrypoint, and drops its default arguments; empty keeps both.
    pub command: Vec<String>,
    /// Replaces the image's default arguments.
    pub args: Vec<String>,
    /// Absolute; empty for the image's.
    pub working_dir: String,
    /// Environment; of two with one name the last counts.
    pub envs: Vec<EnvVar>,
    /// Volumes.
    pub mounts: Vec<Mount>,
    /// Devices of the node.
    pub devices: Vec<Device>,
    /// Names of CDI devices.
    pub cdi_devices: Vec<String>,
    /// Returned as they were given.
    pub labels: BTreeMap<String, String>,
    /// Returned as they were given; they change nothing.
    pub annotations: BTreeMap<String, String>,
    /// Log file below the pod's log directory; empty for none.
    pub log_path: String,
    /// Whether standard input can be attached.
    pub stdin: bool,
    /// Whether standard input ends with the first client.
    pub stdin_once: bool,
    /// Whether it has a terminal.
    pub tty: bool,
    /// Limits.
    pub resources: Resources,
    /// What it may do.
    pub security: ContainerSecurity,
    /// Sent by a stop; `None` for the image's.
    pub stop_signal: Option<Signal>,
}

/// A container's identity within its pod: a retry with the same name is the same container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerName {
    /// Its name in the pod's manifest.
    pub name: String,
    /// How often it has been made anew.
    pub attempt: u32,
}

/// An image as a request names it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageSpec {
    /// Id or reference of the image to use.
    pub image: String,
    /// What the user wrote.
    pub user_specified_image: String,
    /// Handler for which the image was pulled.
    pub runtime_handler: String,
    /// Returned as they were given.
    pub annotations: BTreeMap<String, String>,
    /// Reference with digest.
    pub image_ref: String,
}

/// An environment variable. The value is bytes, and may be a secret: `Debug` shows only the name.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EnvVar {
    /// Without `=` and NUL.
    pub name: String,
    /// Without NUL; not always UTF-8.
    #[serde(serialize_with = "bytes_to_text", deserialize_with = "text_to_bytes")]
    pub value: Vec<u8>,
}

impl fmt::Debug for EnvVar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=<{} bytes>", self.name, self.value.len())
    }
}

/// Bytes in JSON: as text where they are text, which is nearly always.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Bytes<'a> {
    Text(std::borrow::Cow<'a, str>),
    Base64(String),
}

fn bytes_to_text<S: Serializer>(bytes: &[u8], serializer: S) -> std::result::Result<S::Ok, S::Error> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Bytes::Text(text.into()),
        Err(_) => Bytes::Base64(base64::engine::general_purpose::STANDARD.encode(bytes)),
    }
    .serialize(serializer)
}

fn text_to_bytes<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Vec<u8>, D::Error> {
    match Bytes::deserialize(deserializer)? {
        Bytes::Text(text) => Ok(text.into_owned().into_bytes()),
        Bytes::Base64(code) => {
            base64::engine::general_purpose::STANDARD.decode(code).map_err(serde::de::Error::custom)
        }
    }
}

/// A volume.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mount {
    /// Where it appears.
    pub container_path: String,
    /// What appears there; empty for an image volume.
    pub host_path: String,
    /// An image's root filesystem, or a path within it, instead of a path of the node.
    pub image: Option<ImageVolume>,
    /// Whether it can only be read. Mounts below it stay as they are.
    pub readonly: bool,
    /// Whether mounts below it can only be read too.
    pub recursive_read_only: bool,
    /// Which way later mounts spread.
    pub propagation: Propagation,
    /// Whether files get the container's SELinux label.
    pub selinux_relabel: bool,
    /// Users on the filesystem and in the container.
    pub uid_mappings: Vec<IdMapping>,
    /// Groups on the filesystem and in the container.
    pub gid_mappings: Vec<IdMapping>,
    /// Of `noexec`, `nodev` and `nosuid`.
    pub mount_options: Vec<String>,
}

/// Content of an image as a volume.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageVolume {
    /// Which image.
    pub image: ImageSpec,
    /// Relative path of a directory or file in it; empty for all of it.
    pub sub_path: String,
}

/// Which way mounts made later spread between the node and a container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Propagation {
    /// Neither way.
    #[default]
    Private,
    /// The container sees the node's.
    HostToContainer,
    /// Each sees the other's.
    Bidirectional,
}

/// A device of the node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Device {
    /// Where it appears.
    pub container_path: String,
    /// A device, or a directory of devices.
    pub host_path: String,
    /// Of `r`, `w` and `m`.
    pub permissions: String,
}

/// Limits of a container or a pod. `None`: nothing was said.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resources {
    /// CFS period in microseconds.
    pub cpu_period: Option<u64>,
    /// CFS quota in microseconds per period; negative for none.
    pub cpu_quota: Option<i64>,
    /// Relative weight.
    pub cpu_shares: Option<u64>,
    /// CPUs, as `0-3,7`.
    pub cpuset_cpus: String,
    /// Memory nodes, likewise.
    pub cpuset_mems: String,
    /// Bytes; negative for no limit.
    pub memory_limit: Option<i64>,
    /// Bytes of memory and swap together; negative for no limit.
    pub memory_swap_limit: Option<i64>,
    /// Huge pages by size, as `2MB`.
    pub hugepage_limits: Vec<HugepageLimit>,
    /// Number of processes and threads.
    pub pids_limit: Option<i64>,
    /// Preference of the kernel's OOM killer, -1000 to 1000.
    pub oom_score_adj: Option<i32>,
    /// Files of cgroup v2 and their content.
    pub unified: BTreeMap<String, String>,
}

/// A limit for huge pages of one size.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HugepageLimit {
    /// As in `2MB`.
    pub page_size: String,
    /// Bytes.
    pub limit: u64,
}

/// What a container may do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerSecurity {
    /// Changes to the default set of capabilities.
    pub capabilities: CapabilityChanges,
    /// Everything the node can give; only in a privileged pod.
    pub privileged: bool,
    /// PID namespace.
    pub pid: ContainerPid,
    /// Who it runs as.
    pub run_as: RunAs,
    /// Its primary group, if not the user's own.
    pub run_as_group: Option<u32>,
    /// More groups.
    pub supplemental_groups: Vec<u32>,
    /// Whether the image's groups count.
    pub supplemental_groups_policy: GroupsPolicy,
    /// Read-only root filesystem.
    pub readonly_rootfs: bool,
    /// Whether set-user-id programs gain nothing.
    pub no_new_privs: bool,
    /// Paths to hide.
    pub masked_paths: Vec<String>,
    /// Paths that can only be read.
    pub readonly_paths: Vec<String>,
    /// System call filter; `None`: nothing was said.
    pub seccomp: Option<Profile>,
    /// AppArmor profile; `None`: nothing was said.
    pub apparmor: Option<Profile>,
    /// SELinux label.
    pub selinux: Option<Selinux>,
}

/// Changes to the default set of capabilities. What is dropped is dropped from everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CapabilityChanges {
    /// Given in addition.
    pub add: CapabilityRequest,
    /// Taken away.
    pub drop: CapabilityRequest,
    /// Given in addition, and kept by programs that a user other than root runs.
    pub ambient: CapabilityRequest,
}

/// Some capabilities, or all that there are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CapabilityRequest {
    /// All of them.
    pub all: bool,
    /// These.
    pub named: CapabilitySet,
}

/// Whose PID namespace a container uses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ContainerPid {
    /// That of the pod, whatever it is.
    #[default]
    Pod,
    /// Its own.
    Container,
    /// The node's; only in a pod that uses the node's.
    Node,
    /// That of another container of the pod, by id or prefix.
    Target(String),
}

/// The user a container runs as.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunAs {
    /// What the image says.
    #[default]
    Image,
    /// A number.
    Uid(u32),
    /// A name in the image's passwd.
    Name(String),
}

/// Whether the groups that the image's `/etc/group` gives a user count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GroupsPolicy {
    /// They do.
    #[default]
    Merge,
    /// Only those of the request.
    Strict,
}

/// A seccomp or AppArmor profile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Profile {
    /// Ours.
    RuntimeDefault,
    /// None.
    Unconfined,
    /// The node's: an absolute path for seccomp, a loaded profile's name for AppArmor.
    Localhost(String),
}

/// Parts of an SELinux label; empty ones take defaults.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Selinux {
    /// User.
    pub user: String,
    /// Role.
    pub role: String,
    /// Type.
    #[serde(rename = "type")]
    pub kind: String,
    /// Level.
    pub level: String,
}

/// A set of the kernel's capabilities; bit n is capability n.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct CapabilitySet(u64);

/// Names of the capabilities, by number, without `CAP_`.
pub const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

impl CapabilitySet {
    /// None.
    pub const EMPTY: CapabilitySet = CapabilitySet(0);
    /// All that we know.
    pub const ALL: CapabilitySet = CapabilitySet((1 << CAPABILITIES.len()) - 1);

    /// From the kernel's form; bits that we have no name for are left out.
    pub const fn from_bits(bits: u64) -> CapabilitySet {
        CapabilitySet(bits & CapabilitySet::ALL.0)
    }

    /// The capability of that name, with or without `CAP_`, in either case.
    pub fn named(name: &str) -> Option<CapabilitySet> {
        let upper = name.to_ascii_uppercase();
        let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
        CAPABILITIES.iter().position(|known| *known == short).map(|bit| CapabilitySet(1 << bit))
    }

    /// Whether all of `other` are in it.
    pub const fn contains(self, other: CapabilitySet) -> bool {
        self.0 & other.0 == other.0
    }

    /// In either.
    #[must_use]
    pub const fn union(self, other: CapabilitySet) -> CapabilitySet {
        CapabilitySet(self.0 | other.0)
    }

    /// In both.
    #[must_use]
    pub const fn intersection(self, other: CapabilitySet) -> CapabilitySet {
        CapabilitySet(self.0 & other.0)
    }

    /// In this one and not in `other`.
    #[must_use]
    pub const fn minus(self, other: CapabilitySet) -> CapabilitySet {
        CapabilitySet(self.0 & !other.0)
    }

    /// Whether there are none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Their names without `CAP_`, in the kernel's order.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        CAPABILITIES
            .iter()
            .enumerate()
            .filter(move |(bit, _)| self.0 & (1 << bit) != 0)
            .map(|(_, name)| *name)
    }
}

impl fmt::Debug for CapabilitySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.names()).finish()
    }
}

impl FromIterator<CapabilitySet> for CapabilitySet {
    fn from_iter<I: IntoIterator<Item = CapabilitySet>>(sets: I) -> CapabilitySet {
        sets.into_iter().fold(CapabilitySet::EMPTY, CapabilitySet::union)
    }
}

impl Serialize for CapabilitySet {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_seq(self.names())
    }
}

impl<'de> Deserialize<'de> for CapabilitySet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<CapabilitySet, D::Error> {
        let names = Vec::<String>::deserialize(deserializer)?;
        names
            .iter()
            .map(|name| {
                CapabilitySet::named(name)
                    .ok_or_else(|| serde::de::Error::custom(format!("unknown capability {name:?}")))
            })
            .collect()
    }
}

/// A signal by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Signal(u8);

/// Names of the classic signals with their numbers on every architecture we run on.
const SIGNALS: [(&str, u8); 34] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
];

/// First and last real-time signal as the C library counts them.
const RTMIN: u8 = 34;
const RTMAX: u8 = 64;

impl Signal {
    /// SIGTERM.
    pub const TERM: Signal = Signal(15);

    /// The signal of that number, 1 to 64.
    pub fn from_number(number: u8) -> Option<Signal> {
        (1..=RTMAX).contains(&number).then_some(Signal(number))
    }

    /// A number, or a name with or without `SIG`, in either case; `RTMIN+n` and `RTMAX-n` are names too.
    pub fn parse(text: &str) -> Option<Signal> {
        if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
            return text.parse().ok().and_then(Signal::from_number);
        }
        let upper = text.to_ascii_uppercase();
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        let offset = |digits: &str| digits.parse::<u8>().ok().filter(|n| *n <= RTMAX - RTMIN);
        match name {
            "RTMIN" => Some(Signal(RTMIN)),
            "RTMAX" => Some(Signal(RTMAX)),
            _ => {
                if let Some(n) = name.strip_prefix("RTMIN+") {
                    return offset(n).map(|n| Signal(RTMIN + n));
                }
                if let Some(n) = name.strip_prefix("RTMAX-") {
                    return offset(n).map(|n| Signal(RTMAX - n));
                }
                SIGNALS.iter().find(|(known, _)| *known == name).map(|(_, number)| Signal(*number))
            }
        }
    }

    /// The number.
    pub fn number(self) -> u8 {
        self.0
    }

    /// The name with `SIG`.
    pub fn name(self) -> String {
        match SIGNALS.iter().find(|(_, number)| *number == self.0) {
            Some((name, _)) => format!("SIG{name}"),
            None if self.0 == RTMIN => "SIGRTMIN".into(),
            None if self.0 == RTMAX => "SIGRTMAX".into(),
            None if self.0 > RTMIN && self.0 <= RTMIN + 15 => format!("SIGRTMIN+{}", self.0 - RTMIN),
            None if self.0 > RTMIN => format!("SIGRTMAX-{}", RTMAX - self.0),
            None => self.0.to_string(),
        }
    }
}

/// The longest path that the kernel takes.
pub const PATH_BYTES_MAX: usize = 4096;

/// Refuses control characters and texts that are too long. `field` is what the caller reads in the error.
pub(crate) fn check_text(field: &str, text: &str, bytes_max: usize) -> Result<()> {
    if text.len() > bytes_max {
        return Err(Error::invalid(format!("{field} has {} bytes, more than {bytes_max}", text.len())));
    }
    if text.chars().any(char::is_control) {
        return Err(Error::invalid(format!("{field} contains a control character")));
    }
    Ok(())
}

/// Refuses what is no absolute path, or leads upwards.
pub(crate) fn check_absolute(field: &str, path: &str) -> Result<()> {
    if !path.starts_with('/') {
        return Err(Error::invalid(format!("{field} is not an absolute path")));
    }
    check_path(field, path)
}

/// Refuses what is no relative path, or leads upwards.
pub(crate) fn check_relative(field: &str, path: &str) -> Result<()> {
    if path.starts_with('/') {
        return Err(Error::invalid(format!("{field} is not a relative path")));
    }
    check_path(field, path)
}

fn check_path(field: &str, path: &str) -> Result<()> {
    if path.len() >= PATH_BYTES_MAX {
        return Err(Error::invalid(format!(
            "{field} has {} bytes, more than {}",
            path.len(),
            PATH_BYTES_MAX - 1
        )));
    }
    if path.contains('\0') {
        return Err(Error::invalid(format!("{field} contains NUL")));
    }
    if path.split('/').any(|part| part == "..") {
        return Err(Error::invalid(format!("{field} contains `..`")));
    }
    Ok(())
}
