//! Drives the real binary with the real runtime. Needs root, runc and a static busybox; says so and passes without.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ocid_api::id::{ContainerId, PodId};
use ocid_api::paths::{Dirs, PodPaths};
use ocid_api::record::{read_container, read_pod};
use ocid_api::shim::{
    ContainerPhase, CreateContainerRequest, CreatePodRequest, ExecSyncOutput, ExecSyncRequest, Network,
    NetworkPhase, PodPhase, PodState, RemoveContainerRequest, RemovePodRequest, ReopenLogRequest, Rootfs,
    Runtime, SetNetworkRequest, ShimClient, StartContainerRequest, StopContainerRequest,
    UpdateContainerRequest, WatchRequest,
};
use serde_json::{Value, json};
use ttrpc::context::{Context, with_duration};

#[path = "live/faults.rs"]
mod faults;

const RUNC: &str = "/usr/sbin/runc";
const BUSYBOX: &str = "/bin/busybox";

/// The binary under test; another build of it may be named.
fn binary() -> String {
    std::env::var("OCID_SHIM").unwrap_or_else(|_| env!("CARGO_BIN_EXE_ocid-shim").to_owned())
}

fn ctx() -> Context {
    with_duration(Duration::from_secs(30))
}

/// Whether this machine can run it.
fn able() -> bool {
    let root = nix::unistd::geteuid().is_root();
    let able = root && Path::new(RUNC).exists() && Path::new(BUSYBOX).exists();
    if !able {
        println!("skipped: needs root, {RUNC} and {BUSYBOX}");
    }
    able
}

/// One pod with its shim. Dropping it leaves nothing, whatever the test has left.
struct Node {
    _dir: tempfile::TempDir,
    dirs: Dirs,
    id: PodId,
    paths: PodPaths,
    shim: Child,
    client: ShimClient,
    layer: PathBuf,
    logs: PathBuf,
    runtime_root: PathBuf,
}

impl Node {
    async fn new() -> Node {
        Node::prepared(|_| {}).await
    }

    /// A node whose directory has been prepared before its shim starts.
    async fn prepared(prepare: impl FnOnce(&Path)) -> Node {
        let dir = tempfile::Builder::new().prefix("ocid-").tempdir_in("/tmp").unwrap();
        prepare(dir.path());
        let dirs = Dirs { root: dir.path().join("root"), state: dir.path().join("state") };
        let id = PodId::generate();
        let paths = dirs.pod(&id);
        let (layer, logs) = (dir.path().join("layer"), dir.path().join("logs"));
        for name in ["bin", "proc", "sys", "dev", "etc", "tmp"] {
            fs::create_dir_all(layer.join(name)).unwrap();
        }
        fs::create_dir_all(&logs).unwrap();
        fs::copy(BUSYBOX, layer.join("bin/busybox")).unwrap();
        for applet in ["sh", "sleep", "true", "cat", "echo", "head", "yes", "hostname", "ps", "dd", "setsid"]
        {
            std::os::unix::fs::symlink("busybox", layer.join("bin").join(applet)).unwrap();
        }
        let mut shim = Command::new(binary())
            .args(["serve", "--pod", id.as_str(), "--cgroup", "/ocid-test-shims"])
            .arg("--root")
            .arg(&dirs.root)
            .arg("--state")
            .arg(&dirs.state)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0];
        shim.stdout.take().unwrap().read_exact(&mut ready).unwrap();
        assert_eq!(&ready, b"1");
        let client = connect(&paths).await;
        let runtime_root = dir.path().join("runc");
        Node { _dir: dir, dirs, id, paths, shim, client, layer, logs, runtime_root }
    }

    async fn ready(&self, change: impl FnOnce(&mut CreatePodRequest)) {
        let mut request = CreatePodRequest {
            pod: self.id.to_string(),
            metadata: b"pod metadata".to_vec(),
            new_net: true,
            new_ipc: true,
            new_uts: true,
            hostname: "pod-host".to_owned(),
            shm_bytes: 1 << 20,
            network_intent: b"intent".to_vec(),
            runtime: Some(Runtime {
                binary: RUNC.to_owned(),
                root: self.runtime_root.to_str().unwrap().to_owned(),
                timeout_ms: 20_000,
                ..Default::default()
            })
            .into(),
            cgroup: format!("/ocid-test/{}", self.id),
            ..Default::default()
        };
        request.sysctls.insert("net.ipv4.ip_forward".to_owned(), "1".to_owned());
        request.sysctls.insert("kernel.shm_rmid_forced".to_owned(), "1".to_owned());
        change(&mut request);
        self.client.create_pod(ctx(), &request).await.unwrap();
        self.client.create_pod(ctx(), &request).await.unwrap(); // may be repeated
        self.network(NetworkPhase::NETWORK_ATTACHED).await;
    }

    async fn network(&self, phase: NetworkPhase) {
        let network = Network { phase: phase.into(), result: b"result".to_vec(), ..Default::default() };
        let request = SetNetworkRequest { network: Some(network).into(), ..Default::default() };
        self.client.set_network(ctx(), &request).await.unwrap();
    }

    fn request(&self, id: &ContainerId, args: &[&str]) -> CreateContainerRequest {
        let upper = self._dir.path().join("upper").join(id.as_str());
        let work = self._dir.path().join("work").join(id.as_str());
        fs::create_dir_all(&upper).unwrap();
        fs::create_dir_all(&work).unwrap();
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        CreateContainerRequest {
            container: id.to_string(),
            metadata: b"container metadata".to_vec(),
            config: serde_json::to_vec(&self.config(id, args)).unwrap(),
            rootfs: Some(Rootfs {
                lower: vec![text(&self.layer)],
                upper: text(&upper),
                work: text(&work),
                ..Default::default()
            })
            .into(),
            stdio: Some(ocid_api::shim::Stdio {
                log_directory: text(&self.logs),
                log_path: format!("{id}.log"),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        }
    }

    fn config(&self, id: &ContainerId, args: &[&str]) -> Value {
        let ns = self.paths.namespaces();
        json!({
            "ociVersion": "1.0.2",
            "process": process(args),
            "root": { "path": "rootfs" },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] },
                { "destination": "/dev/shm", "type": "bind", "source": self.paths.shm(), "options": ["rbind", "rw"] }
            ],
            "linux": {
                "cgroupsPath": format!("/ocid-test/{}/{id}", self.id),
                "resources": { "devices": [{ "allow": true, "access": "rwm" }], "memory": { "limit": 64 << 20 } },
                "namespaces": [
                    { "type": "pid" }, { "type": "mount" },
                    { "type": "network", "path": ns.join("net") },
                    { "type": "ipc", "path": ns.join("ipc") },
                    { "type": "uts", "path": ns.join("uts") }
                ]
            }
        })
    }

    async fn create(&self, args: &[&str]) -> ContainerId {
        let id = ContainerId::generate();
        self.client.create_container(ctx(), &self.request(&id, args)).await.unwrap();
        id
    }

    async fn run(&self, args: &[&str]) -> ContainerId {
        let id = self.create(args).await;
        self.start(&id).await.unwrap();
        id
    }

    async fn start(&self, id: &ContainerId) -> ttrpc::Result<()> {
        let request = StartContainerRequest { container: id.to_string(), ..Default::default() };
        self.client.start_container(ctx(), &request).await.map(drop)
    }

    async fn stop(&self, id: &ContainerId, timeout_ms: u64) -> ttrpc::Result<ocid_api::shim::ContainerState> {
        let request = StopContainerRequest { container: id.to_string(), timeout_ms, ..Default::default() };
        self.client.stop_container(ctx(), &request).await.map(|response| response.state.unwrap_or_default())
    }

    async fn remove(&self, id: &ContainerId) {
        let request = RemoveContainerRequest { container: id.to_string(), ..Default::default() };
        self.client.remove_container(ctx(), &request).await.unwrap();
    }

    async fn exec(
        &self,
        id: &ContainerId,
        args: &[&str],
        timeout_ms: u64,
    ) -> ttrpc::Result<(u32, Vec<u8>, Vec<u8>)> {
        let request = ExecSyncRequest {
            container: id.to_string(),
            process: serde_json::to_vec(&process(args)).unwrap(),
            timeout_ms,
            output_bytes_max: 1 << 20,
            ..Default::default()
        };
        let mut stream = self.client.exec_sync(ctx(), &request).await?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            let ExecSyncOutput { stdout: out, stderr: err, exit, .. } =
                stream.recv().await?.expect("the exit comes last");
            stdout.extend(out);
            stderr.extend(err);
            if let Some(exit) = exit.as_ref() {
                return Ok((exit.code, stdout, stderr));
            }
        }
    }

    async fn exited(&self, id: &ContainerId) -> ocid_api::shim::ContainerState {
        let mut states = self.client.watch(Context::default(), &WatchRequest::default()).await.unwrap();
        loop {
            let state = states.recv().await.unwrap().unwrap();
            let container = state.containers.into_iter().find(|c| c.container == id.as_str());
            if let Some(container) =
                container.filter(|c| c.phase.enum_value() == Ok(ContainerPhase::CONTAINER_EXITED))
            {
                return container;
            }
        }
    }

    fn log(&self, id: &ContainerId) -> String {
        fs::read_to_string(self.logs.join(format!("{id}.log"))).unwrap_or_default()
    }

    fn shim_exits(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(3);
        loop {
            if let Some(status) = self.shim.try_wait().unwrap() {
                assert!(status.success(), "{status}");
                return;
            }
            assert!(Instant::now() < deadline, "the shim does not exit");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn cleanup(&self, depth: &[&str]) -> std::process::Output {
        Command::new(binary())
            .args(["cleanup", "--pod", self.id.as_str()])
            .arg("--root")
            .arg(&self.dirs.root)
            .arg("--state")
            .arg(&self.dirs.state)
            .args(depth)
            .output()
            .unwrap()
    }

    fn mounts(&self) -> Vec<String> {
        let all = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let ours = self._dir.path().to_str().unwrap().to_owned();
        let prepared = ["root", "state", "logs"].map(|name| format!(" {ours}/{name} "));
        let ours = all.lines().filter(|line| line.contains(&ours));
        ours.filter(|line| !prepared.iter().any(|mount| line.contains(mount))).map(str::to_owned).collect()
    }

    /// Nothing is left of the pod but, if wanted, its record.
    fn check_clean(&self, record: bool) {
        assert_eq!(self.mounts(), Vec::<String>::new());
        assert!(!self.paths.run_dir().exists());
        assert_eq!(self.paths.record_dir().exists(), record);
        for controller in ["memory", "pids", "cpu", "freezer", "systemd"] {
            let dir = Path::new("/sys/fs/cgroup").join(controller).join("ocid-test").join(self.id.as_str());
            assert!(!dir.exists(), "{}", dir.display());
        }
        let left = fs::read_dir(&self.runtime_root).map(Iterator::count).unwrap_or(0);
        assert_eq!(left, 0, "the runtime remembers containers");
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("shim's log: {}", fs::read_to_string(self.paths.log()).unwrap_or_default());
        }
        let _ = self.shim.kill();
        let _ = self.shim.wait();
        self.cleanup(&["--remove"]);
        for name in ["root", "state", "logs"] {
            let _ = Command::new("umount").arg("-l").arg(self._dir.path().join(name)).output();
        }
    }
}

async fn connect(paths: &PodPaths) -> ShimClient {
    let address = format!("unix://{}", paths.socket().display());
    let socket = ttrpc::r#async::transport::Socket::connect(address).await.unwrap();
    ShimClient::new(ttrpc::r#async::Client::new(socket))
}

fn process(args: &[&str]) -> Value {
    json!({ "args": args, "cwd": "/", "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 },
        "capabilities": { "bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"] } })
}

fn code(error: &ttrpc::Error) -> (ttrpc::Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("{other:?}"),
    }
}

fn alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[tokio::test]
async fn a_pod_lives_from_create_to_remove_and_leaves_nothing() {
    if !able() {
        return;
    }
    let mut node = Node::new().await;
    node.ready(|_| {}).await;
    let id = node
        .run(&[
            "sh",
            "-c",
            "echo out; echo err >&2; hostname; cat /proc/sys/net/ipv4/ip_forward; exec sleep 1000",
        ])
        .await;
    node.start(&id).await.unwrap(); // may be repeated
    let running = read_container(&node.paths, &id).unwrap().unwrap();
    assert_eq!(running.phase.enum_value(), Ok(ContainerPhase::CONTAINER_RUNNING));
    assert!(running.pid > 1 && running.started_at_ns > 0 && alive(running.pid));
    assert_eq!(running.cgroup, format!("/ocid-test/{}/{id}", node.id));

    let (exit, stdout, stderr) =
        node.exec(&id, &["sh", "-c", "echo a; echo b >&2; exit 7"], 10_000).await.unwrap();
    assert_eq!((exit, &stdout[..], &stderr[..]), (7, &b"a\n"[..], &b"b\n"[..]));

    let resources = json!({ "memory": { "limit": 32 << 20 } }).to_string().into_bytes();
    let update = UpdateContainerRequest { container: id.to_string(), resources, ..Default::default() };
    node.client.update_container(ctx(), &update).await.unwrap();
    let limit = format!("/sys/fs/cgroup/memory{}/memory.limit_in_bytes", running.cgroup);
    if Path::new(&limit).exists() {
        assert_eq!(fs::read_to_string(limit).unwrap().trim(), (32 << 20).to_string());
    }

    let log = node.logs.join(format!("{id}.log"));
    fs::rename(&log, node.logs.join("rotated")).unwrap();
    node.client
        .reopen_log(ctx(), &ReopenLogRequest { container: id.to_string(), ..Default::default() })
        .await
        .unwrap();
    let rotated = fs::read_to_string(node.logs.join("rotated")).unwrap();
    for text in ["stdout F out", "stderr F err", "stdout F pod-host", "stdout F 1"] {
        assert!(rotated.contains(text), "{text} in {rotated}");
    }

    let stopped = node.stop(&id, 0).await.unwrap();
    assert_eq!((stopped.exit.code, stopped.exit.signal, stopped.pid), (137, 9, 0));
    assert!(!alive(running.pid));
    node.stop(&id, 0).await.unwrap(); // may be repeated
    node.remove(&id).await;
    node.remove(&id).await;
    assert_eq!(read_container(&node.paths, &id).unwrap(), None);
    assert!(log.exists(), "the log stays");

    node.client.remove_pod(ctx(), &RemovePodRequest::default()).await.unwrap();
    node.check_clean(false);
    node.shim_exits();
}

#[tokio::test]
async fn exits_are_exact_and_recorded_after_their_start() {
    if !able() {
        return;
    }
    let node = Node::new().await;
    node.ready(|_| {}).await;
    for (script, expected, signal) in [("exit 0", 0, 0), ("exit 42", 42, 0), ("kill -9 $$; exit 1", 1, 0)] {
        let id = node.run(&["sh", "-c", script]).await;
        let state = node.exited(&id).await;
        assert_eq!((state.exit.code, state.exit.signal), (expected, signal), "{script}");
        assert!(state.started_at_ns > 0 && state.exit.finished_at_ns >= state.created_at_ns, "{state:?}");
        assert_eq!(read_container(&node.paths, &id).unwrap().unwrap().exit, state.exit);
        assert_eq!(code(&node.start(&id).await.unwrap_err()).0, ttrpc::Code::FAILED_PRECONDITION);
    }
}

#[tokio::test]
async fn a_graceful_stop_waits_and_a_shorter_one_wins() {
    if !able() {
        return;
    }
    let node = Node::new().await;
    node.ready(|_| {}).await;
    let polite = node.run(&["sh", "-c", "trap 'exit 5' TERM; while :; do sleep 0.02; done"]).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(node.stop(&polite, 20_000).await.unwrap().exit.code, 5);

    let deaf = node.run(&["sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 0.02; done"]).await;
    while !node.log(&deaf).contains("deaf") {
        tokio::time::sleep(Duration::from_millis(10)).await; // until then the runtime may still hear it
    }
    let begun = Instant::now();
    let (long, short) = tokio::join!(node.stop(&deaf, 20_000), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        node.stop(&deaf, 200).await
    });
    assert_eq!((long.unwrap().exit.signal, short.unwrap().exit.signal), (9, 9));
    assert!(begun.elapsed() < Duration::from_secs(2));

    let created = node.create(&["sleep", "1000"]).await;
    let state = node.stop(&created, 20_000).await.unwrap();
    assert_eq!((state.phase.enum_value(), state.started_at_ns), (Ok(ContainerPhase::CONTAINER_EXITED), 0));
    node.stop(&ContainerId::generate(), 0).await.unwrap(); // unknown
}

#[tokio::test]
async fn a_failed_create_says_why_and_leaves_nothing() {
    if !able() {
        return;
    }
    let node = Node::new().await;
    node.ready(|_| {}).await;
    let id = ContainerId::generate();
    let error =
        node.client.create_container(ctx(), &node.request(&id, &["no-such-program"])).await.unwrap_err();
    let (kind, text) = code(&error);
    assert_eq!(kind, ttrpc::Code::INVALID_ARGUMENT);
    assert!(text.contains("executable file not found in $PATH"), "{text}");
    assert_eq!(read_container(&node.paths, &id).unwrap(), None);
    assert!(!node.paths.container(&id).bundle().exists());
    assert!(!node.mounts().iter().any(|mount| mount.contains(id.as_str())));
    // The name is free again.
    node.client.create_container(ctx(), &node.request(&id, &["true"])).await.unwrap();
}

#[tokio::test]
async fn an_exec_is_killed_with_all_its_descendants_on_time_out_or_hang_up() {
    if !able() {
        return;
    }
    let node = Node::new().await;
    node.ready(|_| {}).await;
    let id = node.run(&["sleep", "1000"]).await;
    let marked = |mark: &str| {
        fs::read_dir("/proc").unwrap().flatten().any(|entry| {
            fs::read(entry.path().join("cmdline"))
                .is_ok_and(|line| line == format!("sleep\0{mark}\0").into_bytes())
        })
    };
    let begun = Instant::now();
    let script = "(sleep 7771 & sleep 7771) & sleep 7771";
    let error = node.exec(&id, &["sh", "-c", script], 500).await.unwrap_err();
    assert_eq!(code(&error).0, ttrpc::Code::DEADLINE_EXCEEDED);
    assert!(begun.elapsed() < Duration::from_millis(1500), "{:?}", begun.elapsed());
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!marked("7771"));

    // A descendant that holds the output delays nobody.
    let begun = Instant::now();
    let (exit, stdout, _) = node.exec(&id, &["sh", "-c", "sleep 7772 & echo done"], 0).await.unwrap();
    assert_eq!((exit, &stdout[..]), (0, &b"done\n"[..]));
    assert!(begun.elapsed() < Duration::from_secs(2));

    let other = connect(&node.paths).await;
    let request = ExecSyncRequest {
        container: id.to_string(),
        process: serde_json::to_vec(&process(&["sleep", "7773"])).unwrap(),
        ..Default::default()
    };
    let stream = other.exec_sync(Context::default(), &request).await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while !marked("7773") && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(marked("7773"));
    drop((stream, other));
    let deadline = Instant::now() + Duration::from_secs(2);
    while marked("7773") && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(!marked("7773"), "the exec outlives its caller");

    let error = node.exec(&id, &["no-such-program"], 1000).await.unwrap_err();
    assert_eq!(code(&error).0, ttrpc::Code::INVALID_ARGUMENT);
}

#[tokio::test]
async fn a_stopped_pod_leaves_its_record_and_a_final_state() {
    if !able() {
        return;
    }
    let mut node = Node::new().await;
    node.ready(|request| request.shared_pid = true).await;
    let id = node.run(&["sleep", "1000"]).await;
    let mut states = node.client.watch(Context::default(), &WatchRequest::default()).await.unwrap();
    let first = states.recv().await.unwrap().unwrap();
    assert_eq!(first.phase.enum_value(), Ok(PodPhase::POD_READY));
    assert_eq!(
        (first.protocol, &first.network.intent[..], &first.network.result[..]),
        (1, &b"intent"[..], &b"result"[..])
    );
    let last = tokio::spawn(async move {
        let mut last = PodState::default();
        while let Ok(Some(state)) = states.recv().await {
            last = state;
        }
        last
    });
    node.network(NetworkPhase::NETWORK_DETACHED).await;
    node.check_clean(true);
    node.shim_exits();
    let last = last.await.unwrap();
    assert_eq!(last.phase.enum_value(), Ok(PodPhase::POD_STOPPED));
    assert_eq!(last.containers[0].exit.code, 137);
    assert_eq!(read_pod(&node.paths).unwrap().unwrap(), last);
    assert_eq!(last.network.intent, b"intent");
    let removed = node.cleanup(&["--remove-container", id.as_str()]);
    assert!(removed.status.success(), "{removed:?}");
    assert_eq!(read_pod(&node.paths).unwrap().unwrap().containers.len(), 0);
    assert!(node.cleanup(&["--remove"]).status.success());
    node.check_clean(false);
}

#[tokio::test]
async fn cleanup_ends_what_a_dead_shim_has_left() {
    if !able() {
        return;
    }
    for shared_pid in [true, false] {
        cleanup_of_a_dead_shim(shared_pid).await;
    }
}

async fn cleanup_of_a_dead_shim(shared_pid: bool) {
    let mut node = Node::new().await;
    node.ready(|request| request.shared_pid = shared_pid).await;
    let id = node.run(&["sh", "-c", "sleep 1000 & sleep 1000"]).await;
    let pid = read_container(&node.paths, &id).unwrap().unwrap().pid;
    let refused = node.cleanup(&[]);
    assert!(!refused.status.success(), "the shim lives");
    node.shim.kill().unwrap();
    node.shim.wait().unwrap();
    for depth in [&[][..], &[], &["--detached"], &["--detached"], &["--remove"], &["--remove"]] {
        let done = node.cleanup(depth);
        assert!(done.status.success(), "{depth:?}: {done:?}");
        assert!(!alive(pid) || fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().contains(") Z"));
        if depth != ["--remove"] {
            let state = read_pod(&node.paths).unwrap().unwrap();
            let exit = state.containers[0].exit.clone().unwrap();
            assert_eq!((exit.code, exit.signal, &*exit.reason), (137, 9, "ShimLost"));
            assert_eq!(state.phase.enum_value() == Ok(PodPhase::POD_STOPPED), depth == ["--detached"]);
        }
    }
    node.check_clean(false);
}

#[tokio::test]
async fn an_oom_kill_is_told() {
    if !able() {
        return;
    }
    let node = Node::new().await;
    node.ready(|_| {}).await;
    let id = ContainerId::generate();
    let mut request = node.request(&id, &["dd", "if=/proc/self/mem", "of=/dev/x", "bs=200M", "count=1"]);
    let mut config = node.config(
        &id,
        &["sh", "-c", "yes | head -c 200000000 > /dev/shm2; x=$(yes | head -c 150000000); echo $x"],
    );
    config["linux"]["resources"]["memory"] = json!({ "limit": 8 << 20, "swap": 8 << 20 });
    request.config = serde_json::to_vec(&config).unwrap();
    node.client.create_container(ctx(), &request).await.unwrap();
    node.start(&id).await.unwrap();
    let state = tokio::time::timeout(Duration::from_secs(20), node.exited(&id)).await.unwrap();
    assert!(state.exit.oom_killed, "{state:?} {}", node.log(&id));
}

#[tokio::test]
async fn any_number_of_layers_is_a_root_filesystem() {
    if !able() {
        return;
    }
    let node = Node::new().await;
    node.ready(|_| {}).await;
    for count in [1, 2, 3, 60, 500] {
        for writable in [true, false] {
            let id = ContainerId::generate();
            // Read-only needs nothing made in it; a bind of one layer and an overlay of many look the same.
            let mut request = node.request(&id, &["sh", "-c", "cat /l/*; echo x > /new && echo written"]);
            let rootfs = request.rootfs.as_mut().unwrap();
            for i in 1..count {
                let layer = node._dir.path().join("many").join(format!("a:b,c-{i}-{}", "long".repeat(20)));
                fs::create_dir_all(layer.join("l")).unwrap();
                fs::write(layer.join(format!("l/{i}")), "x").unwrap();
                rootfs.lower.insert(0, layer.to_str().unwrap().to_owned());
            }
            if !writable {
                rootfs.upper.clear();
                rootfs.work.clear();
            }
            if !writable {
                fs::create_dir_all(node.layer.join("dev/shm")).unwrap();
            }
            node.client.create_container(ctx(), &request).await.unwrap();
            node.start(&id).await.unwrap();
            node.exited(&id).await;
            let log = node.log(&id);
            assert_eq!(log.contains("written"), writable, "{count} {log}");
            assert!(log.contains(&"x".repeat(count - 1)), "{count}: {log}");
            node.remove(&id).await;
        }
    }
}

#[tokio::test]
async fn a_container_inherits_nothing_of_ours() {
    if !able() {
        return;
    }
    let node = Node::new().await;
    node.ready(|_| {}).await;
    let script =
        "for f in /proc/self/fd/*; do echo fd $f; done; cat /proc/self/status; env; echo umask $(umask)";
    let id = node.run(&["sh", "-c", script]).await;
    node.exited(&id).await;
    let log = node.log(&id);
    // 32 and 33 are the C library's own, which posix_spawn leaves ignored; libraries set them for themselves.
    let ignored = log.lines().find_map(|line| line.split_once("SigIgn:\t")).map(|(_, mask)| mask).unwrap();
    assert_eq!(u64::from_str_radix(ignored, 16).unwrap() & !(3 << 31), 0, "{log}");
    assert!(log.contains("SigBlk:\t0000000000000000"), "{log}");
    assert!(log.contains("umask 0022") && !log.contains("CARGO"), "{log}");
    for fd in 4..64 {
        assert!(!log.contains(&format!("fd /proc/self/fd/{fd}\n")), "{log}");
    }
}

#[tokio::test]
async fn in_a_shared_pid_namespace_the_end_of_init_ends_the_rest() {
    if !able() {
        return;
    }
    let node = Node::new().await;
    node.ready(|request| request.shared_pid = true).await;
    let id = ContainerId::generate();
    let mut request = node.request(&id, &["sh", "-c", "sleep 7774 & setsid sleep 7774 & sleep 0.2; exit 3"]);
    let mut config = node.config(&id, &["sh", "-c", "sleep 7774 & setsid sleep 7774 & sleep 0.2; exit 3"]);
    config["linux"]["namespaces"][0]["path"] = json!(node.paths.namespaces().join("pid"));
    request.config = serde_json::to_vec(&config).unwrap();
    node.client.create_container(ctx(), &request).await.unwrap();
    node.start(&id).await.unwrap();
    assert_eq!(node.exited(&id).await.exit.code, 3);
    let left = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .any(|entry| fs::read(entry.path().join("cmdline")).is_ok_and(|line| line == b"sleep\x007774\0"));
    assert!(!left);
}
