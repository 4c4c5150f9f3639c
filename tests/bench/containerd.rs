//! Debian's containerd beside a node: its own root, state and socket below the node's directory, the node's network,
//! registry and cgroup.
//!
//! Nothing is installed and nothing of the machine's own containerd is touched, except that the shims of this version
//! keep their sockets in /run/containerd/s, whatever the configuration. Those of a containerd that was killed stay
//! behind, so the ones that came with us are removed at the end.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use harness::network::PLUGINS;
use harness::process;
use harness::{Client, Node};
use nix::sys::signal::Signal;

/// The name of its pause image.
pub(crate) const PAUSE: &str = "registry.test/pause:1";

/// Where its shims keep their sockets.
const SOCKETS: &str = "/run/containerd/s";

const DEADLINE: Duration = Duration::from_secs(30);

/// See the module. Killed when dropped.
#[derive(Debug)]
pub(crate) struct Containerd {
    bin: PathBuf,
    dir: PathBuf,
    child: Option<Child>,
    client: Client,
    /// The sockets that were there before it.
    others: BTreeSet<OsString>,
}

impl Containerd {
    /// Writes its configuration; starts nothing.
    pub(crate) fn new(node: &Node, bin: PathBuf) -> Containerd {
        let dir = node.path().join("ctrd");
        fs::create_dir_all(&dir).unwrap();
        let config = format!(
            r#"version = 2
root = {root:?}
state = {state:?}
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.tracing"]

[grpc]
address = {socket:?}

[plugins."io.containerd.internal.v1.opt"]
path = {opt:?}

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
stream_server_address = "127.0.0.1"
stream_server_port = "0"

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{PLUGINS}"
conf_dir = {conf:?}

[plugins."io.containerd.grpc.v1.cri".registry]
config_path = {certs:?}

[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false
Root = {runc:?}
"#,
            runc = dir.join("runc"),
            root = dir.join("root"),
            state = node.dirs().state.with_file_name("containerd"),
            socket = dir.join("s"),
            opt = dir.join("opt"),
            conf = node.network.conf_dir,
            certs = node.certs_dir(),
        );
        fs::write(dir.join("config.toml"), config).unwrap();
        let client = Client::new(&dir.join("s"));
        Containerd { bin, dir, child: None, client, others: sockets() }
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// Its socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.join("s")
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    /// What it says its version is.
    pub(crate) fn version(&self) -> String {
        let output = Command::new(self.bin.join("containerd")).arg("--version").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.split_whitespace().nth(2).unwrap_or("?").to_owned()
    }

    /// Starts it and returns at once.
    pub(crate) fn spawn(&mut self) {
        let log = OpenOptions::new().create(true).append(true).open(self.dir.join("log")).unwrap();
        let path = std::env::var("PATH").unwrap_or_default();
        let child = Command::new(self.bin.join("containerd"))
            .arg("--config")
            .arg(self.dir.join("config.toml"))
            .env("PATH", format!("{}:{path}", self.bin.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        assert!(self.child.replace(child).is_none(), "containerd runs already");
    }

    /// Starts it and waits until it answers.
    pub(crate) async fn start(&mut self) {
        let begun = Instant::now();
        self.spawn();
        while let Err(e) = self.client.status().await {
            let log = || fs::read_to_string(self.dir.join("log")).unwrap_or_default();
            assert!(begun.elapsed() < DEADLINE, "containerd does not answer: {e}\n{}", log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Removes every pod and ends it.
    pub(crate) async fn finish(&mut self) {
        if let Err(why) = self.client.remove_all(Duration::from_secs(120)).await {
            crate::progress(&format!("containerd: pods could not be removed: {why}"));
        }
        process::signal(self.pid(), Signal::SIGTERM);
        let begun = Instant::now();
        while begun.elapsed() < DEADLINE && process::runs(self.pid()) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.kill();
    }

    /// Its shims and what they run of its own: the pause processes.
    pub(crate) fn helpers(&self) -> Vec<u32> {
        let all = process::all();
        let socket = self.socket().display().to_string();
        let is_shim =
            |p: &&process::Process| p.cmdline.contains("containerd-shim") && p.cmdline.contains(&socket);
        let shims: Vec<u32> = all.iter().filter(is_shim).map(|p| p.pid).collect();
        let pauses = all.iter().filter(|p| p.comm == "pause" && shims.contains(&p.parent)).map(|p| p.pid);
        shims.iter().copied().chain(pauses).collect()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.kill();
        let served = fs::read_to_string("/proc/net/unix").unwrap_or_default();
        for name in sockets().difference(&self.others) {
            if !name.to_str().is_some_and(|name| served.contains(name)) {
                let _ = fs::remove_file(Path::new(SOCKETS).join(name));
            }
        }
    }
}

fn sockets() -> BTreeSet<OsString> {
    fs::read_dir(SOCKETS).into_iter().flatten().flatten().map(|entry| entry.file_name()).collect()
}
