//! Makes, pins and releases the namespaces of a pod.
//!
//! Each is made by the shim's only thread, which enters it, configures it, pins it by a bind mount and goes back. If it
//! cannot go back, the process ends: nothing may run in the wrong namespace, and `cleanup` takes away what was pinned.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};
use ocid_api::paths::PodPaths;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::mount_bind;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::container::rootfs;
use crate::error::{Context as _, Error, Result};
use crate::process::Process;
use crate::record;

/// Exit code when the way back to the host's namespaces is lost.
const EXIT_LOST: i32 = 70;

/// How long the init of a pid namespace may take to begin.
const READY_SECONDS: i64 = 10;

/// Which namespaces to make and what holds in them.
pub(super) struct Wanted<'a> {
    pub(super) net: bool,
    pub(super) ipc: bool,
    pub(super) uts: bool,
    pub(super) shared_pid: bool,
    pub(super) hostname: &'a str,
    pub(super) sysctls: BTreeMap<&'a str, &'a str>,
}

/// Where namespaces are pinned; `None` for those not made.
#[derive(Debug, Default)]
pub(super) struct Pinned {
    pub(super) net: Option<PathBuf>,
    pub(super) ipc: Option<PathBuf>,
    pub(super) uts: Option<PathBuf>,
    pub(super) pid: Option<PathBuf>,
    /// Init of the shared pid namespace.
    pub(super) pause: Option<Process>,
}

/// A kind of namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Net,
    Ipc,
    Uts,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Net => "net",
            Kind::Ipc => "ipc",
            Kind::Uts => "uts",
        }
    }

    fn flag(self) -> CloneFlags {
        match self {
            Kind::Net => CloneFlags::CLONE_NEWNET,
            Kind::Ipc => CloneFlags::CLONE_NEWIPC,
            Kind::Uts => CloneFlags::CLONE_NEWUTS,
        }
    }
}

/// Refuses what must not be set, before anything is made.
pub(super) fn check(wanted: &Wanted<'_>) -> Result<()> {
    if wanted.hostname.len() > 64 || wanted.hostname.contains('\0') {
        return Err(Error::invalid("a host name has at most 64 bytes and no zero byte"));
    }
    for (name, value) in &wanted.sysctls {
        let kind = sysctl_namespace(name)?;
        let made = match kind {
            Kind::Net => wanted.net,
            Kind::Ipc => wanted.ipc,
            Kind::Uts => wanted.uts,
        };
        if !made {
            let kind = kind.name();
            return Err(Error::invalid(format!("sysctl {name} needs a {kind} namespace of the pod's own")));
        }
        if value.contains(['\0', '\n']) || value.len() > 4096 {
            return Err(Error::invalid(format!("the value of sysctl {name} is not one line")));
        }
    }
    Ok(())
}

/// The namespace that holds a kernel setting. One that is not in a namespace is the host's, and refused.
fn sysctl_namespace(name: &str) -> Result<Kind> {
    let refused = || Error::invalid(format!("sysctl {name:?} is not one of a pod's own namespaces"));
    let letters = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._/-".contains(&b);
    let well_formed = !name.is_empty()
        && name.len() < 256
        && name.bytes().all(letters)
        && sysctl_path(name).split('/').all(|c| !matches!(c, "" | "." | ".."));
    if !well_formed {
        return Err(refused());
    }
    let path = sysctl_path(name);
    match path.split_once('/') {
        Some(("net", _)) => Ok(Kind::Net),
        Some(("fs", rest)) if rest.starts_with("mqueue/") => Ok(Kind::Ipc),
        Some(("kernel", rest)) if rest == "sem" || rest.starts_with("shm") || rest.starts_with("msg") => {
            Ok(Kind::Ipc)
        }
        _ => Err(refused()),
    }
}

/// The path below /proc/sys of a dotted name. As for sysctl(8), the separator seen first decides, and the other one is
/// part of a name (`net/ipv4/conf/eth0.1/…`).
fn sysctl_path(name: &str) -> String {
    match name.find(['.', '/']).map(|i| name.as_bytes()[i]) {
        Some(b'.') => name
            .chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                c => c,
            })
            .collect(),
        _ => name.to_owned(),
    }
}

/// Makes and pins what is wanted. On error, what was pinned is there for [`release`].
pub(super) fn make(paths: &PodPaths, wanted: &Wanted<'_>) -> Result<Pinned> {
    let dir = paths.namespaces();
    record::make_dir(&dir).context(|| format!("make {}", dir.display()))?;
    let mut pinned = Pinned::default();
    if wanted.net {
        pinned.net = Some(make_one(Kind::Net, &dir, wanted)?);
    }
    if wanted.ipc {
        pinned.ipc = Some(make_one(Kind::Ipc, &dir, wanted)?);
    }
    if wanted.uts {
        pinned.uts = Some(make_one(Kind::Uts, &dir, wanted)?);
    }
    if wanted.shared_pid {
        let (path, pause) = make_pid(&dir)?;
        (pinned.pid, pinned.pause) = (Some(path), Some(pause));
    }
    Ok(pinned)
}

fn make_one(kind: Kind, dir: &Path, wanted: &Wanted<'_>) -> Result<PathBuf> {
    let name = kind.name();
    let source = format!("/proc/thread-self/ns/{name}");
    let host = File::open(&source).context(|| format!("open {source}"))?;
    unshare(kind.flag()).context(|| format!("make a {name} namespace"))?;
    let inside = configure(kind, wanted).and_then(|()| pin(Path::new(&source), &dir.join(name)));
    if let Err(e) = setns(&host, kind.flag()) {
        lost(&format!("cannot go back to the host's {name} namespace: {e}"));
    }
    inside
}

/// Ends the process: it must not serve in a pod's namespace.
fn lost(why: &str) -> ! {
    crate::log::say(why);
    std::process::exit(EXIT_LOST)
}

fn configure(kind: Kind, wanted: &Wanted<'_>) -> Result<()> {
    match kind {
        Kind::Net => loopback_up().context(|| "bring the loopback interface up".to_owned())?,
        Kind::Uts if !wanted.hostname.is_empty() => {
            nix::unistd::sethostname(wanted.hostname).context(|| "set the host name".to_owned())?;
        }
        Kind::Uts | Kind::Ipc => {}
    }
    for (name, value) in &wanted.sysctls {
        if sysctl_namespace(name)? == kind {
            let path = Path::new("/proc/sys").join(sysctl_path(name));
            fs::write(&path, value)
                .map_err(|e| Error::invalid(format!("set sysctl {name} to {value:?}: {e}")))?;
        }
    }
    Ok(())
}

fn pin(source: &Path, target: &Path) -> Result<PathBuf> {
    record::write_file(target, b"", 0o600).context(|| format!("make {}", target.display()))?;
    mount_bind(source, target).context(|| format!("pin {}", target.display()))?;
    Ok(target.to_path_buf())
}

/// A pid namespace exists with its first process. Only the children of this thread are made in it, for a moment.
fn make_pid(dir: &Path) -> Result<(PathBuf, Process)> {
    let host = File::open("/proc/thread-self/ns/pid").context(|| "open our pid namespace".to_owned())?;
    unshare(CloneFlags::CLONE_NEWPID).context(|| "make a pid namespace".to_owned())?;
    // Our own executable, though its file may have been replaced since.
    // It is told where the namespace will be pinned, so that `cleanup` knows whose it is.
    let target = dir.join("pid");
    let (ready, theirs) = pipe_with(PipeFlags::CLOEXEC).context(|| "make a pipe".to_owned())?;
    let mut command = Command::new("/proc/self/exe");
    command.arg("pause").arg(&target).stdin(Stdio::null()).stdout(theirs).stderr(Stdio::null());
    let spawned = Process::spawn(&mut command);
    if let Err(e) = setns(&host, CloneFlags::CLONE_NEWPID) {
        lost(&format!("cannot go back to the host's pid namespace: {e}"));
    }
    let pause = spawned.context(|| "start the init of the pid namespace".to_owned())?;
    let source = format!("/proc/{}/ns/pid", pause.pid());
    match pin(Path::new(&source), &target).and_then(|path| is_ready(&ready).map(|()| path)) {
        Ok(path) => Ok((path, pause)),
        Err(e) => {
            let _ = pause.signal(libc::SIGKILL);
            Err(e)
        }
    }
}

/// Unpins whatever is pinned. Nothing is success.
pub(crate) fn release(paths: &PodPaths) -> Result<()> {
    let dir = paths.namespaces();
    for name in ["net", "ipc", "uts", "pid", "user"] {
        let path = dir.join(name);
        rootfs::unmount_at(&path)?;
        record::remove_file(&path).context(|| format!("remove {}", path.display()))?;
    }
    record::remove_dir(&dir).context(|| format!("remove {}", dir.display()))
}

/// Waits until the init has given up what is the host's: containers will see it.
fn is_ready(pipe: &OwnedFd) -> Result<()> {
    let timeout = Timespec { tv_sec: READY_SECONDS, tv_nsec: 0 };
    let mut fds = [PollFd::new(pipe, PollFlags::IN)];
    let seen = poll(&mut fds, Some(&timeout)).context(|| "wait for the init".to_owned())?;
    // Nothing is read if nothing came, for that would wait.
    let ready = seen == 1 && rustix::io::read(pipe, &mut [0; 1]) == Ok(1);
    if ready { Ok(()) } else { Err(Error::internal("the init of the pid namespace did not begin")) }
}

/// Whether a command line is that of the init of this pod's pid namespace.
pub(crate) fn is_pause<'a>(mut args: impl Iterator<Item = &'a [u8]>, paths: &PodPaths) -> bool {
    use std::os::unix::ffi::OsStrExt as _;
    let target = paths.namespaces().join("pid");
    args.nth(1) == Some(b"pause") && args.next() == Some(target.as_os_str().as_bytes())
}

/// Kills everything in a pinned pid namespace. For when nobody holds its init any more.
pub(crate) fn kill_pid_namespace(path: &Path) {
    use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
    use std::os::unix::fs::MetadataExt as _;
    let identity = |path: &Path| fs::metadata(path).ok().map(|m| (m.dev(), m.ino()));
    let (Some(ours), Some(host)) = (identity(path), identity(Path::new("/proc/self/ns/pid"))) else { return };
    // A file that is not a mounted namespace is on another device than every namespace.
    if ours == host || ours.0 != host.0 {
        return;
    }
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid =
            entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()).and_then(Pid::from_raw);
        let Some(pid) = pid else { continue };
        let namespace = entry.path().join("ns/pid");
        if identity(&namespace) != Some(ours) {
            continue;
        }
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        if identity(&namespace) == Some(ours) {
            let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        }
    }
}

/// Brings up `lo` in this thread's network namespace by one netlink message; a new namespace has it as interface 1.
fn loopback_up() -> io::Result<()> {
    const RTM_NEWLINK: u16 = 16;
    const REQUEST_ACK: u16 = 1 | 4;
    const IFF_UP: u32 = 1;
    let mut message = Vec::with_capacity(32);
    // nlmsghdr: length, type, flags, sequence, port.
    message.extend_from_slice(&32_u32.to_ne_bytes());
    message.extend_from_slice(&RTM_NEWLINK.to_ne_bytes());
    message.extend_from_slice(&REQUEST_ACK.to_ne_bytes());
    message.extend_from_slice(&[0; 8]);
    // ifinfomsg: family, pad, type, index, flags, mask of flags to change.
    message.extend_from_slice(&[0; 4]);
    message.extend_from_slice(&1_i32.to_ne_bytes());
    message.extend_from_slice(&IFF_UP.to_ne_bytes());
    message.extend_from_slice(&IFF_UP.to_ne_bytes());
    let route = None; // NETLINK_ROUTE is protocol 0
    let socket =
        rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, route)?;
    // The kernel answers while it sends, but a bound costs nothing.
    rustix::net::sockopt::set_socket_timeout(
        &socket,
        rustix::net::sockopt::Timeout::Recv,
        Some(Duration::from_secs(2)),
    )?;
    rustix::net::send(&socket, &message, SendFlags::empty())?;
    let mut answer = [0_u8; 256];
    let (length, _) = rustix::net::recv(&socket, &mut answer, RecvFlags::empty())?;
    // nlmsgerr follows the header; 0 is the acknowledgement.
    let code = answer[..length].get(16..20).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    match code {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(-code)),
        None => Err(io::Error::other("netlink answered too little")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted<'a>(net: bool, ipc: bool, sysctls: &[(&'a str, &'a str)]) -> Wanted<'a> {
        let sysctls = sysctls.iter().copied().collect();
        Wanted { net, ipc, uts: true, shared_pid: false, hostname: "h", sysctls }
    }

    #[test]
    fn only_settings_of_the_pods_own_namespaces_are_accepted() {
        let good = [
            "net.core.somaxconn",
            "kernel.shm_rmid_forced",
            "kernel.msgmax",
            "kernel.sem",
            "fs.mqueue.msg_max",
        ];
        for name in good {
            assert!(check(&wanted(true, true, &[(name, "1")])).is_ok(), "{name}");
            assert!(check(&wanted(false, false, &[(name, "1")])).is_err(), "{name} of the host");
        }
        let bad = [
            "",
            "kernel.core_pattern",
            "kernel",
            "vm.swappiness",
            "net",
            "net.",
            "net..ipv4",
            "net/../kernel/core_pattern",
            "net.ipv4...kernel",
            "../net.x",
            "/net/x",
            "fs.mqueue",
            "fs.file-max",
            "kernel.semx",
            "NET.x",
            "net.x\0",
            "kernel.hostname",
        ];
        for name in bad {
            assert!(check(&wanted(true, true, &[(name, "1")])).is_err(), "{name:?}");
        }
        assert!(check(&wanted(true, true, &[("net.a", "1\n2")])).is_err());
    }

    #[test]
    fn the_first_separator_of_a_setting_decides() {
        assert_eq!(sysctl_path("net.ipv4.ip_forward"), "net/ipv4/ip_forward");
        assert_eq!(sysctl_path("net/ipv4/conf/eth0.1/x"), "net/ipv4/conf/eth0.1/x");
        assert_eq!(sysctl_path("net.ipv4.conf.eth0/1.x"), "net/ipv4/conf/eth0.1/x");
    }
}
