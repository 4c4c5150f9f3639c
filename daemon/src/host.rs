//! Facts about this machine and its OCI runtime, asked once, so that everything that decides by them stays pure.
//!
//! [`Host`] is plain data: tests make their own. Nothing here changes the machine.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use ocid_api::cgroup::{self, Version};
use rustix::process::{Resource, getrlimit};
use serde::Deserialize;

use crate::error::{Context, Error, Kind, Result};
use crate::spec::{CapabilitySet, Device};

/// What this machine is and what it lets us do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// The interface that the controllers are bound to.
    pub cgroup: Version,
    /// Controllers that can be used, by name.
    pub controllers: Vec<String>,
    /// Whether systemd runs the machine.
    pub systemd: bool,
    /// The kernel's major and minor version.
    pub kernel: (u32, u32),
    /// The machine's name on the network.
    pub hostname: String,
    /// Whether AppArmor is on.
    pub apparmor: bool,
    /// Whether SELinux is on.
    pub selinux: bool,
    /// Whether a process can make a user namespace.
    pub user_namespaces: bool,
    /// The capabilities that our children can have at most.
    pub bounding: CapabilitySet,
    /// Our own preference of the OOM killer: without `SYS_RESOURCE` no child of ours can have a lower one.
    pub oom_score_adj: i32,
    /// Our own hard limit of open files: without `SYS_RESOURCE` no child of ours can have a higher one.
    pub nofile_max: u64,
    /// Sizes of huge pages that cgroups can limit, as `2MB`.
    pub hugepage_sizes: Vec<String>,
    /// Whether cgroups can limit swap.
    pub swap_accounting: bool,
    /// Files that tell containers about the load of their neighbours, one per processor.
    pub thermal_throttle: Vec<String>,
}

impl Host {
    /// Asks the kernel.
    ///
    /// # Errors
    /// If cgroups or procfs are not mounted. A fact that is only missing is not an error.
    pub fn probe() -> Result<Host> {
        let cgroup =
            Version::detect().context(Kind::Internal, || format!("find cgroups at {}", cgroup::MOUNT))?;
        let status = read("/proc/self/status").context(Kind::Internal, || "read /proc/self/status".into())?;
        let bounding = status
            .lines()
            .find_map(|line| line.strip_prefix("CapBnd:"))
            .and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok())
            .ok_or_else(|| Error::internal("/proc/self/status has no CapBnd"))?;
        let uname = rustix::system::uname();
        let controllers = controllers(cgroup);
        Ok(Host {
            cgroup,
            systemd: Path::new("/run/systemd/system").is_dir(),
            kernel: kernel_version(&uname.release().to_string_lossy()),
            hostname: uname.nodename().to_string_lossy().into_owned(),
            apparmor: flag("/sys/module/apparmor/parameters/enabled", "Y"),
            selinux: Path::new("/sys/fs/selinux/enforce").exists(),
            user_namespaces: Path::new("/proc/self/ns/user").exists()
                && !flag("/proc/sys/user/max_user_namespaces", "0"),
            bounding: CapabilitySet::from_bits(bounding),
            oom_score_adj: read("/proc/self/oom_score_adj")
                .ok()
                .and_then(|s| s.trim().parse().ok())
                .unwrap_or(0),
            nofile_max: getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX),
            hugepage_sizes: if controllers.iter().any(|c| c == "hugetlb") {
                hugepage_sizes()
            } else {
                Vec::new()
            },
            swap_accounting: swap_accounting(cgroup),
            thermal_throttle: thermal_throttle(),
            controllers,
        })
    }

    /// Whether mounts can be made read-only with everything below them (mount_setattr, since 5.12).
    pub fn recursive_read_only(&self) -> bool {
        self.kernel >= (5, 12)
    }

    /// Whether a cgroup controller can be used.
    pub fn has_controller(&self, name: &str) -> bool {
        self.controllers.iter().any(|controller| controller == name)
    }

    /// Whether our children can have limits and scores that are better than our own.
    pub fn can_raise_limits(&self) -> bool {
        CapabilitySet::named("SYS_RESOURCE").is_some_and(|cap| self.bounding.contains(cap))
    }
}

/// Reads a small file of procfs or sysfs.
fn read(path: impl AsRef<Path>) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(path)?.take(1 << 20).read_to_string(&mut text)?;
    Ok(text)
}

fn flag(path: &str, value: &str) -> bool {
    read(path).is_ok_and(|text| text.trim() == value)
}

/// `6.1.0-13-amd64` is (6, 1); what cannot be read counts as old.
fn kernel_version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// On v1, a controller that no hierarchy is mounted for does not count.
fn controllers(version: Version) -> Vec<String> {
    match version {
        Version::V2 => read(Path::new(cgroup::MOUNT).join("cgroup.controllers"))
            .map(|text| text.split_whitespace().map(str::to_owned).collect())
            .unwrap_or_default(),
        Version::V1 => {
            let mut names: Vec<String> = fs::read_dir(cgroup::MOUNT)
                .into_iter()
                .flatten()
                .flatten()
                .filter_map(|entry| entry.file_name().into_string().ok())
                .flat_map(|name| name.split(',').map(str::to_owned).collect::<Vec<_>>())
                .filter(|name| name != "unified" && name != "systemd")
                .collect();
            names.sort();
            names.dedup();
            names
        }
    }
}

/// `/sys/kernel/mm/hugepages/hugepages-2048kB` is `2MB` in the names of cgroup files.
fn hugepage_sizes() -> Vec<String> {
    let mut sizes: Vec<u64> = fs::read_dir("/sys/kernel/mm/hugepages")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            entry.file_name().to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()
        })
        .collect();
    sizes.sort_unstable();
    sizes.into_iter().map(hugepage_name).collect()
}

fn hugepage_name(kib: u64) -> String {
    match kib {
        _ if kib >= 1 << 20 && kib.is_multiple_of(1 << 20) => format!("{}GB", kib >> 20),
        _ if kib >= 1 << 10 && kib.is_multiple_of(1 << 10) => format!("{}MB", kib >> 10),
        _ => format!("{kib}KB"),
    }
}

/// On v2 the root cgroup has no such file; our own has, unless we are in the root.
fn swap_accounting(version: Version) -> bool {
    match version {
        Version::V1 => version.dir("memory", "/").join("memory.memsw.limit_in_bytes").exists(),
        Version::V2 => {
            let own = read("/proc/self/cgroup").unwrap_or_default();
            let own = cgroup::of_process(version, &own).unwrap_or("/");
            // Since 5.8 swap is accounted unless switched off at boot; asked in the root, we believe that.
            own == "/" || version.dir("memory", own).join("memory.swap.max").exists()
        }
    }
}

fn thermal_throttle() -> Vec<String> {
    let mut found: Vec<(u32, String)> = fs::read_dir("/sys/devices/system/cpu")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.strip_prefix("cpu")?.parse().ok()?;
            let directory = entry.path().join("thermal_throttle");
            directory.is_dir().then(|| Some((number, directory.to_str()?.to_owned())))?
        })
        .collect();
    found.sort_unstable();
    found.into_iter().map(|(_, path)| path).collect()
}

/// Advisories of runc that let a container out, and the versions that fixed each. Source: runc's own advisories.
const RUNC_ADVISORIES: [(&str, &[[u32; 3]]); 4] = [
    ("CVE-2024-21626", &[[1, 1, 12]]),
    ("CVE-2025-31133", &[[1, 2, 8], [1, 3, 3], [1, 4, 0]]),
    ("CVE-2025-52565", &[[1, 2, 8], [1, 3, 3], [1, 4, 0]]),
    ("CVE-2025-52881", &[[1, 2, 8], [1, 3, 3], [1, 4, 0]]),
];

/// The three numbers of a version; what follows them says nothing here.
fn numbers(version: &str) -> Option<[u32; 3]> {
    let mut parts = version.split('.').map(|part| {
        let end = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
        part[..end].parse().ok()
    });
    Some([parts.next()??, parts.next()??, parts.next()??])
}

/// What the OCI runtime can do, from the output of `runc features` and `runc --version`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuntimeFeatures {
    /// What it calls itself, as in `runc`; empty if it did not say.
    pub name: String,
    /// As in `1.1.5`; empty if it did not say.
    pub version: String,
    /// Options that a mount can have.
    pub mount_options: Vec<String>,
    /// Whether mounts can map ids.
    pub idmapped_mounts: bool,
    /// Whether it filters system calls.
    pub seccomp: bool,
    /// Namespaces it can make.
    pub namespaces: Vec<String>,
}

impl RuntimeFeatures {
    /// Reads the output of `features` (JSON) and of `--version` (text). A runtime that has no `features` command gives
    /// an empty JSON text: then nothing beyond the basics is known of it.
    ///
    /// # Errors
    /// If the JSON is not what the OCI describes.
    pub fn parse(features: &[u8], version: &str) -> Result<RuntimeFeatures> {
        let (name, version) = version
            .lines()
            .find_map(|line| line.trim().rsplit_once(" version "))
            .map(|(name, version)| (name.trim().to_owned(), version.trim().to_owned()))
            .unwrap_or_default();
        if features.iter().all(u8::is_ascii_whitespace) {
            return Ok(RuntimeFeatures { name, version, seccomp: true, ..RuntimeFeatures::default() });
        }
        let document: FeaturesDocument = serde_json::from_slice(features)
            .context(Kind::Internal, || "read what the runtime says of its features".into())?;
        let linux = document.linux.unwrap_or_default();
        Ok(RuntimeFeatures {
            name,
            version,
            mount_options: document.mount_options.unwrap_or_default(),
            idmapped_mounts: linux
                .mount_extensions
                .and_then(|extensions| extensions.idmap)
                .is_some_and(|idmap| idmap.enabled.unwrap_or(false)),
            seccomp: linux.seccomp.is_none_or(|seccomp| seccomp.enabled.unwrap_or(true)),
            namespaces: linux.namespaces.unwrap_or_default(),
        })
    }

    /// Known ways out of a container that this version has not closed, as far as its number says: a distribution may
    /// have closed them without changing it.
    pub fn advisories(&self) -> Vec<&'static str> {
        let Some(version) = numbers(&self.version).filter(|_| self.name == "runc") else { return Vec::new() };
        RUNC_ADVISORIES
            .iter()
            .filter(|(_, fixed)| match fixed.iter().find(|fix| fix[..2] == version[..2]) {
                Some(fix) => version < *fix,
                // A line without a fix of its own is either older than those that got one, or newer.
                None => fixed.iter().all(|fix| version < *fix),
            })
            .map(|(advisory, _)| *advisory)
            .collect()
    }

    /// Whether a mount can be read-only with everything below it.
    pub fn recursive_read_only(&self) -> bool {
        self.mount_options.iter().any(|option| option == "rro")
    }
}

/// The part of the OCI's features document that we read. An absent member means that the runtime does not say.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct FeaturesDocument {
    mount_options: Option<Vec<String>>,
    linux: Option<LinuxFeatures>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct LinuxFeatures {
    namespaces: Option<Vec<String>>,
    seccomp: Option<Enabled>,
    mount_extensions: Option<MountExtensions>,
}

#[derive(Deserialize)]
struct MountExtensions {
    idmap: Option<Enabled>,
}

#[derive(Deserialize)]
struct Enabled {
    enabled: Option<bool>,
}

/// A device node to be made in a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceNode {
    /// Where.
    pub path: PathBuf,
    /// Character or block.
    pub kind: DeviceKind,
    /// The driver.
    pub major: u32,
    /// The driver's device.
    pub minor: u32,
    /// Permission bits of the node.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// What the container's cgroup may do with it: of `r`, `w` and `m`.
    pub permissions: String,
}

/// What kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// Character device.
    Char,
    /// Block device.
    Block,
}

/// More devices than a machine has, fewer than fill our memory.
const DEVICES_MAX: usize = 16_384;

/// The device nodes that a request means: one, or all below a directory.
///
/// # Errors
/// `InvalidArgument` if there is no such device.
pub fn device_nodes(device: &Device) -> Result<Vec<DeviceNode>> {
    let host_path = Path::new(&device.host_path);
    let metadata = fs::metadata(host_path)
        .context(Kind::InvalidArgument, || format!("find device {:?}", device.host_path))?;
    if let Some(node) = device_node(&metadata, device.container_path.clone().into(), &device.permissions) {
        return Ok(vec![node]);
    }
    if !metadata.is_dir() {
        return Err(Error::invalid(format!("{:?} is neither a device nor a directory", device.host_path)));
    }
    let mut nodes = Vec::new();
    walk(host_path, Path::new(&device.container_path), &device.permissions, &[], &mut nodes)
        .context(Kind::InvalidArgument, || format!("list devices in {:?}", device.host_path))?;
    Ok(nodes)
}

/// All devices of this machine, for privileged containers.
///
/// # Errors
/// If /dev cannot be listed.
pub fn all_device_nodes() -> Result<Vec<DeviceNode>> {
    // These are the container's own.
    const OWN: [&str; 7] = ["pts", "shm", "fd", "mqueue", "console", "ptmx", ".udev"];
    let mut nodes = Vec::new();
    walk(Path::new("/dev"), Path::new("/dev"), "rwm", &OWN, &mut nodes)
        .context(Kind::Internal, || "list /dev".into())?;
    Ok(nodes)
}

/// Symbolic links are not followed: what they name is found by itself, or lies elsewhere.
fn walk(
    from: &Path,
    to: &Path,
    permissions: &str,
    skip: &[&str],
    nodes: &mut Vec<DeviceNode>,
) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if skip.iter().any(|name| entry.file_name() == *name) {
            continue;
        }
        // A device can go away while we look.
        let Ok(metadata) = entry.metadata() else { continue };
        let path = to.join(entry.file_name());
        if metadata.is_dir() {
            match walk(&entry.path(), &path, permissions, &[], nodes) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        } else if let Some(node) = device_node(&metadata, path, permissions) {
            if nodes.len() == DEVICES_MAX {
                return Err(io::Error::other(format!("more than {DEVICES_MAX} devices")));
            }
            nodes.push(node);
        }
    }
    Ok(())
}

fn device_node(metadata: &fs::Metadata, path: PathBuf, permissions: &str) -> Option<DeviceNode> {
    let kind = match metadata.file_type() {
        kind if kind.is_char_device() => DeviceKind::Char,
        kind if kind.is_block_device() => DeviceKind::Block,
        _ => return None,
    };
    Some(DeviceNode {
        path,
        kind,
        major: rustix::fs::major(metadata.rdev()),
        minor: rustix::fs::minor(metadata.rdev()),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        permissions: permissions.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runtime_older_than_a_fix_is_named() {
        let of = |name: &str, version: &str| {
            RuntimeFeatures { name: name.into(), version: version.into(), ..RuntimeFeatures::default() }
                .advisories()
                .len()
        };
        let table = [
            ("1.1.5+ds1", 4),
            ("1.1.12", 3),
            ("1.2.7", 3),
            ("1.2.8", 0),
            ("1.3.2", 3),
            ("1.3.3", 0),
            ("1.4.0", 0),
            ("1.5.1", 0),
            ("2.0.0", 0),
            ("unknown", 0),
        ];
        for (version, expected) in table {
            assert_eq!(of("runc", version), expected, "{version}");
            assert_eq!(of("crun", version), 0);
        }
    }

    #[test]
    fn this_machine_can_be_probed() {
        let host = Host::probe().unwrap();
        assert!(host.kernel > (3, 0) && !host.hostname.is_empty() && host.nofile_max > 0, "{host:?}");
        assert!(!host.controllers.is_empty());
    }

    #[test]
    fn kernel_versions_are_read_from_any_release() {
        assert_eq!(kernel_version("6.18.44-fc-v595"), (6, 18));
        assert_eq!(kernel_version("5.4"), (5, 4));
        assert_eq!(kernel_version("odd"), (0, 0));
    }

    #[test]
    fn huge_pages_are_named_as_in_cgroup_files() {
        assert_eq!([64, 2048, 1 << 20].map(hugepage_name), ["64KB", "2MB", "1GB"]);
    }

    #[test]
    fn features_are_read_and_absent_ones_are_not_assumed() {
        let json = br#"{"ociVersionMin":"1.0.0","mountOptions":["ro","rro"],
            "linux":{"namespaces":["user"],"mountExtensions":{"idmap":{"enabled":true}},"seccomp":{"enabled":false}}}"#;
        let features = RuntimeFeatures::parse(json, "runc version 1.1.5+ds1\nspec: 1.0.2-dev\n").unwrap();
        assert_eq!(features.version, "1.1.5+ds1");
        assert!(features.recursive_read_only() && features.idmapped_mounts && !features.seccomp);
        let silent = RuntimeFeatures::parse(b"", "").unwrap();
        assert!(!silent.recursive_read_only() && !silent.idmapped_mounts);
        assert!(RuntimeFeatures::parse(b"{", "").is_err());
    }

    #[test]
    fn a_device_is_found_and_a_file_is_not_one() {
        let device = |host_path: &str| Device {
            host_path: host_path.into(),
            container_path: "/dev/x".into(),
            permissions: "r".into(),
        };
        let null = device_nodes(&device("/dev/null")).unwrap();
        assert_eq!((null[0].major, null[0].minor, null[0].kind), (1, 3, DeviceKind::Char));
        assert_eq!(null[0].path, Path::new("/dev/x"));
        assert_eq!(device_nodes(&device("/proc/self/status")).unwrap_err().kind(), Kind::InvalidArgument);
        assert!(device_nodes(&device("/dev/nonesuch")).is_err());
    }
}
