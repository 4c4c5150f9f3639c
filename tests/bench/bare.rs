//! What both runtimes stand on, without them: `runc` on a bundle that ocid made, and the CNI plugins one after the
//! other.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use harness::Node;
use harness::network::PLUGINS;
use harness::process;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// `runc` with containers made after the pattern of one of ocid's.
#[derive(Debug)]
pub(crate) struct Runc {
    dir: PathBuf,
    cgroup: String,
    pattern: Value,
}

impl Runc {
    /// `bundle` is that of a running container of ocid's: the same configuration, namespaces and root filesystem.
    pub(crate) fn new(node: &Node, bundle: &Path) -> Runc {
        let dir = node.path().join("bare");
        fs::create_dir_all(&dir).unwrap();
        let mut pattern: Value =
            serde_json::from_slice(&fs::read(bundle.join("config.json")).unwrap()).unwrap();
        pattern["root"]["path"] = json!(bundle.join("rootfs"));
        let mut process = pattern["process"].clone();
        process["args"] = json!(["true"]);
        fs::write(dir.join("exec.json"), process.to_string()).unwrap();
        Runc { dir, cgroup: node.cgroup.clone(), pattern }
    }

    /// Writes the bundle of a new container.
    pub(crate) fn bundle(&self, id: &str) {
        let bundle = self.dir.join(id);
        fs::create_dir_all(&bundle).unwrap();
        let mut config = self.pattern.clone();
        config["linux"]["cgroupsPath"] = json!(format!("{}/{id}", self.cgroup));
        fs::write(bundle.join("config.json"), config.to_string()).unwrap();
    }

    fn call(&self, verb: &str, args: &[&str]) {
        let mut command = Command::new("runc");
        command.arg("--root").arg(self.dir.join("root")).arg("--log").arg(self.dir.join("log"));
        command.args(["--log-format", "json", verb]).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let status = command.status().unwrap();
        let log = || fs::read_to_string(self.dir.join("log")).unwrap_or_default();
        assert!(status.success(), "runc {verb}: {status}: {}", log());
    }

    pub(crate) fn create(&self, id: &str) {
        let pid_file = self.pid_file(id);
        let bundle = self.dir.join(id);
        let (pid_file, bundle) = (pid_file.to_str().unwrap(), bundle.to_str().unwrap());
        self.call("create", &["--bundle", bundle, "--pid-file", pid_file, id]);
    }

    pub(crate) fn start(&self, id: &str) {
        self.call("start", &[id]);
    }

    /// `runc exec` of `true`.
    pub(crate) fn exec(&self, id: &str) {
        let spec = self.dir.join("exec.json");
        self.call("exec", &["--process", spec.to_str().unwrap(), id]);
    }

    /// Kills init and waits for its end, by polling: it is no child of ours.
    pub(crate) fn kill(&self, id: &str) {
        let pid = fs::read_to_string(self.pid_file(id)).unwrap().trim().parse().unwrap();
        process::signal(pid, Signal::SIGKILL);
        let begun = Instant::now();
        while process::runs(pid) {
            assert!(begun.elapsed() < Duration::from_secs(10), "{id} survives SIGKILL");
            std::thread::sleep(Duration::from_micros(500));
        }
    }

    pub(crate) fn delete(&self, id: &str) {
        self.call("delete", &[id]);
        let _ = fs::remove_dir_all(self.dir.join(id));
    }

    fn pid_file(&self, id: &str) -> PathBuf {
        self.dir.join(id).join("pid")
    }
}

/// A network namespace, as long as this is kept.
#[derive(Debug)]
pub(crate) struct Netns(Child);

impl Netns {
    pub(crate) fn new() -> Netns {
        let child = Command::new("unshare").args(["-n", "sleep", "100000"]).spawn().unwrap();
        let netns = Netns(child);
        let ours = fs::read_link("/proc/self/ns/net").unwrap();
        let begun = Instant::now();
        while fs::read_link(netns.path()).is_ok_and(|theirs| theirs == ours) {
            assert!(begun.elapsed() < Duration::from_secs(10), "unshare -n does nothing");
            std::thread::sleep(Duration::from_millis(1));
        }
        netns
    }

    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/net", self.0.id()))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The plugins of a node's network.
#[derive(Debug)]
pub(crate) struct Cni {
    list: Value,
    scratch: PathBuf,
}

impl Cni {
    pub(crate) fn new(node: &Node) -> Cni {
        let list = serde_json::from_str(&node.network.conflist()).unwrap();
        Cni { list, scratch: node.path().join("cni.out") }
    }

    /// ADD through the chain; returns the last result.
    pub(crate) fn add(&self, id: &str, netns: &Netns) -> Value {
        let mut result = Value::Null;
        for plugin in self.list["plugins"].as_array().unwrap() {
            result = self.call("ADD", plugin, &result, id, netns);
        }
        result
    }

    /// DEL through the chain, backwards.
    pub(crate) fn del(&self, id: &str, netns: &Netns, result: &Value) {
        for plugin in self.list["plugins"].as_array().unwrap().iter().rev() {
            self.call("DEL", plugin, result, id, netns);
        }
    }

    fn call(&self, verb: &str, plugin: &Value, before: &Value, id: &str, netns: &Netns) -> Value {
        let mut conf = plugin.clone();
        conf["cniVersion"] = self.list["cniVersion"].clone();
        conf["name"] = self.list["name"].clone();
        if !before.is_null() {
            conf["prevResult"] = before.clone();
        }
        let name = plugin["type"].as_str().unwrap();
        let mut child = Command::new(Path::new(PLUGINS).join(name))
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", id)
            .env("CNI_NETNS", netns.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", PLUGINS)
            .stdin(Stdio::piped())
            .stdout(File::create(&self.scratch).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(conf.to_string().as_bytes()).unwrap();
        let status = child.wait().unwrap();
        let said = fs::read(&self.scratch).unwrap();
        assert!(status.success(), "{name} {verb}: {}", String::from_utf8_lossy(&said));
        serde_json::from_slice(&said).unwrap_or_default()
    }
}
