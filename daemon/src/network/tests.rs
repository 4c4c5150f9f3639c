//! The runner and the chain, against plugins that are shell scripts; and once against the real ones.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Instant as Clock;

use super::*;

/// Directories of its own, and plugins that write down how they were called.
struct Bench {
    dir: tempfile::TempDir,
}

/// Passes a result on, or makes one.
const ECHO: &str =
    r#"[ $CNI_COMMAND = ADD ] && echo '{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.2/24"}]}'; exit 0"#;

impl Bench {
    fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        for name in ["bin", "conf"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        Bench { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Installs a plugin that logs its call and then does what `body` says.
    fn plugin(&self, name: &str, body: &str) -> &Self {
        let dir = self.dir.path().display();
        let script = format!(
            "#!/bin/sh\nexport D={dir}\necho \"$CNI_COMMAND {name}\" >> $D/log\n\
             env | grep ^CNI_ | sort > $D/$CNI_COMMAND-{name}.env\ncat > $D/$CNI_COMMAND-{name}.json\n{body}\n"
        );
        let path = self.path("bin").join(name);
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        self
    }

    fn conf(&self, version: &str, plugins: &Value) -> &Self {
        let list = json!({"cniVersion": version, "name": "net", "plugins": plugins});
        fs::write(self.path("conf/10-net.conflist"), list.to_string()).unwrap();
        self
    }

    fn config(&self) -> Config {
        Config {
            conf_dir: self.path("conf"),
            plugin_dirs: vec![self.path("none"), self.path("bin")],
            ..Config::default()
        }
    }

    fn request(&self) -> Request {
        Request {
            pod_id: "pod1".to_owned(),
            pod_namespace: "ns".to_owned(),
            pod_name: "name".to_owned(),
            pod_uid: "uid".to_owned(),
            netns: "/proc/self/ns/net".into(),
            port_mappings: vec![PortMapping {
                host_port: 8080,
                container_port: 80,
                protocol: Protocol::Tcp,
                host_ip: None,
            }],
            ..Request::default()
        }
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    fn log(&self) -> Vec<String> {
        self.text("log").lines().map(ToOwned::to_owned).collect()
    }

    fn stdin(&self, call: &str) -> Value {
        serde_json::from_str(&self.text(&format!("{call}.json"))).unwrap()
    }

    async fn run(&self, name: &str, timeout: Duration) -> Result<Vec<u8>, Failure> {
        self.run_with(name, timeout, b"{}".to_vec()).await
    }

    async fn run_with(&self, name: &str, timeout: Duration, stdin: Vec<u8>) -> Result<Vec<u8>, Failure> {
        let dirs = [self.path("bin")];
        let deadline = Instant::now() + timeout;
        plugin::run(Call {
            verb: Verb::Add,
            network: "net",
            plugin: name,
            dirs: &dirs,
            target: None,
            stdin,
            deadline,
        })
        .await
    }
}

const LONG: Duration = Duration::from_secs(30);

fn alive(pid: &str) -> bool {
    // A zombie that nobody has collected yet is dead.
    fs::read_to_string(format!("/proc/{}/stat", pid.trim())).is_ok_and(|stat| !stat.contains(") Z "))
}

#[tokio::test]
async fn a_plugin_that_hangs_is_killed_with_its_children_at_the_deadline() {
    let bench = Bench::new();
    bench.plugin("hang", "sleep 1000 & echo $! > $D/child; echo waiting >&2; sleep 1000");
    let began = Clock::now();
    let error = bench.run("hang", Duration::from_secs(2)).await.unwrap_err().error;
    assert!(began.elapsed() < Duration::from_secs(10));
    assert_eq!(error.kind(), Kind::DeadlineExceeded);
    assert!(
        error.to_string().contains("plugin \"hang\": ADD: killed") && error.to_string().contains("waiting"),
        "{error}"
    );
    let child = bench.text("child");
    assert!(!child.is_empty());
    let deadline = Clock::now() + Duration::from_secs(5);
    while alive(&child) {
        assert!(Clock::now() < deadline, "its child lives on");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_plugin_whose_caller_goes_away_is_killed_with_its_children() {
    let bench = Bench::new();
    bench.plugin("hang", "sleep 1000 & echo $! > $D/child; sleep 1000");
    let call = bench.run("hang", LONG);
    assert!(tokio::time::timeout(Duration::from_secs(2), call).await.is_err());
    let child = bench.text("child");
    assert!(!child.is_empty());
    let deadline = Clock::now() + Duration::from_secs(5);
    while alive(&child) {
        assert!(Clock::now() < deadline, "its child lives on");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn output_held_open_by_a_process_left_behind_is_not_waited_for() {
    let bench = Bench::new();
    bench.plugin("leaver", "sleep 30 & echo $! > $D/child; echo '{}'");
    let began = Clock::now();
    assert_eq!(bench.run("leaver", LONG).await.unwrap(), b"{}\n");
    assert!(began.elapsed() < Duration::from_secs(10));
    let child = bench.text("child").trim().parse().ok().and_then(rustix::process::Pid::from_raw).unwrap();
    rustix::process::kill_process(child, rustix::process::Signal::KILL).unwrap();
}

#[tokio::test]
async fn errors_of_plugins_are_decoded() {
    let bench = Bench::new();
    let cases = [
        (
            r#"echo '{"cniVersion":"1.0.0","code":11,"msg":"later","details":"why"}'; exit 1"#,
            Kind::Unavailable,
            "later; why (code 11)",
        ),
        (r#"echo '{"code":7,"msg":"bad key"}'; exit 1"#, Kind::FailedPrecondition, "bad key (code 7)"),
        (r#"echo '{"code":1,"msg":"version"}'; exit 1"#, Kind::FailedPrecondition, "(code 1)"),
        (r#"echo '{"code":3,"msg":"who?"}'; exit 1"#, Kind::FailedPrecondition, "(code 3)"),
        (r#"echo '{"code":50,"msg":"down"}'; exit 1"#, Kind::Unavailable, "(code 50)"),
        (r#"echo '{"code":999,"msg":"own"}'; exit 1"#, Kind::Internal, "own (code 999)"),
        (
            "echo oh no; echo log >&2; exit 3",
            Kind::Internal,
            "exit code 3 without a CNI error; stdout: oh no; stderr: log",
        ),
        ("exit 4", Kind::Internal, "exit code 4 without a CNI error"),
        ("kill -9 $$", Kind::Internal, "killed by signal 9"),
        ("exec head -c 2097152 /dev/zero", Kind::Internal, "printed more than 1048576 bytes"),
    ];
    for (body, kind, expected) in cases {
        bench.plugin("bad", body);
        let error = bench.run("bad", LONG).await.unwrap_err().error;
        assert_eq!(error.kind(), kind, "{body}: {error}");
        let text = error.to_string();
        assert!(
            text.starts_with("network \"net\": plugin \"bad\": ADD: ") && text.contains(expected),
            "{body}: {text}"
        );
    }
}

#[tokio::test]
async fn large_input_and_a_talkative_log_do_not_block() {
    let bench = Bench::new();
    bench.plugin("chatty", "head -c 1000000 /dev/zero >&2; wc -c < $D/ADD-chatty.json");
    let stdin = vec![b'x'; 1 << 20];
    assert_eq!(bench.run_with("chatty", LONG, stdin.clone()).await.unwrap().trim_ascii(), b"1048576");
    // And one that does not read it at all.
    let path = bench.path("bin/deaf");
    fs::write(&path, "#!/bin/sh\necho ok\n").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(bench.run_with("deaf", LONG, stdin).await.unwrap(), b"ok\n");
}

#[tokio::test]
async fn a_plugin_inherits_no_descriptor_and_no_environment() {
    let bench = Bench::new();
    let _held = fs::File::create(bench.path("held")).unwrap();
    bench.plugin("p", "ls -l /proc/self/fd; env");
    let printed = String::from_utf8(bench.run("p", LONG).await.unwrap()).unwrap();
    assert!(printed.contains("pipe:") && !printed.contains("/held"), "{printed}");
    let ours = std::env::vars().map(|(key, _)| key).filter(|key| key.starts_with("CARGO"));
    for key in ours.chain(["HOME".to_owned()]) {
        assert!(!printed.contains(&format!("\n{key}=")), "{printed}");
    }
}

#[tokio::test]
async fn only_plain_installed_safe_plugins_are_run() {
    let bench = Bench::new();
    bench.plugin("good", "").plugin("open", "").plugin("data", "");
    fs::set_permissions(bench.path("bin/open"), fs::Permissions::from_mode(0o777)).unwrap();
    fs::set_permissions(bench.path("bin/data"), fs::Permissions::from_mode(0o644)).unwrap();
    fs::create_dir(bench.path("bin/dir")).unwrap();
    let cases = [
        ("../bin/good", "not a plain file name"),
        ("..", "not a plain file name"),
        ("", "not a plain file name"),
        ("a b", "not a plain file name"),
        ("absent", "plugin \"absent\" is not installed in /"),
        ("data", "is not installed in"),
        ("dir", "is not installed in"),
        ("open", "writable by everybody"),
    ];
    for (name, expected) in cases {
        let error = bench.run(name, LONG).await.unwrap_err().error;
        assert_eq!(error.kind(), Kind::FailedPrecondition, "{error}");
        assert!(error.to_string().contains(expected), "{name}: {error}");
    }
    assert!(bench.log().is_empty());
    bench.run("good", LONG).await.unwrap();
}

#[tokio::test]
async fn an_add_whose_output_is_no_result_fails() {
    let bench = Bench::new();
    bench.conf("1.0.0", &json!([{"type": "p"}]));
    let network = Network::new(bench.config());
    let cases = [
        ("exit 0", "printed no result"),
        ("echo '{}'", "no address"),
        ("echo garbage", "printed no CNI result"),
        ("head -c 2097152 /dev/zero", "printed more than"),
        ("exit 1", "exit code 1"),
    ];
    for (body, expected) in cases {
        bench.plugin("p", body);
        let intent = network.intent(&bench.request()).unwrap();
        let error = network.attach(&intent).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Internal);
        assert!(
            error.to_string().contains(expected) && error.to_string().contains("\"net\""),
            "{body}: {error}"
        );
    }
    assert_eq!(bench.log(), ["ADD p"; 5], "nothing is undone, nothing tried again");
}

#[tokio::test]
async fn the_chain_runs_in_order_and_back_with_everything_passed_on() {
    let bench = Bench::new();
    let second = r#"[ $CNI_COMMAND = ADD ] && echo '{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.3/24"}],"mine":1}'; exit 0"#;
    bench.plugin("first", ECHO).plugin("second", second);
    let plugins = json!([{"type": "first", "own": {"key": 1}}, {"type": "second", "capabilities": {"portMappings": true, "dns": true}}]);
    bench.conf("1.0.0", &plugins);
    let network = Network::new(bench.config());
    let intent = network.intent(&bench.request()).unwrap();
    let attachment = network.attach(&intent).await.unwrap();
    let last = json!({"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.3/24"}], "mine": 1});
    assert_eq!((&attachment.result, attachment.ips.as_slice()), (&last, &["10.0.0.3".parse().unwrap()][..]));

    // The record outlives the configuration, and the daemon.
    let record = serde_json::to_string(&(&intent, &attachment)).unwrap();
    let other = bench.path("conf/10-net.conflist");
    fs::write(&other, r#"{"cniVersion":"0.4.0","name":"other","plugins":[{"type":"other"}]}"#).unwrap();
    let network = Network::new(Config { plugin_dirs: vec![], ..bench.config() });
    let (intent, attachment): (Intent, Attachment) = serde_json::from_str(&record).unwrap();
    network.check(&intent, &attachment).await.unwrap();
    network.detach(&intent, Some(&attachment)).await.unwrap();
    network.detach(&intent, None).await.unwrap();
    let expected = [
        "ADD first",
        "ADD second",
        "CHECK first",
        "CHECK second",
        "DEL second",
        "DEL first",
        "DEL second",
        "DEL first",
    ];
    assert_eq!(bench.log(), expected);

    let dirs = format!("{}:{}", bench.path("none").display(), bench.path("bin").display());
    let env = |verb, netns| {
        format!(
            "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=name;K8S_POD_INFRA_CONTAINER_ID=pod1;K8S_POD_UID=uid\n\
             CNI_COMMAND={verb}\nCNI_CONTAINERID=pod1\nCNI_IFNAME=eth0\nCNI_NETNS={netns}\nCNI_PATH={dirs}\n"
        )
    };
    assert_eq!(bench.text("ADD-first.env"), env("ADD", "/proc/self/ns/net"));
    assert_eq!(bench.text("DEL-first.env"), env("DEL", "/proc/self/ns/net"));
    let add = json!({"cniVersion": "1.0.0", "name": "net", "type": "first", "own": {"key": 1}});
    assert_eq!(bench.stdin("ADD-first"), add);
    let first = json!({"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.2/24"}]});
    let runtime = json!({"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]});
    let add = bench.stdin("ADD-second");
    assert_eq!((&add["prevResult"], &add["runtimeConfig"]), (&first, &runtime));
    assert_eq!(bench.stdin("CHECK-first")["prevResult"], last);
    let del = bench.stdin("DEL-second");
    assert_eq!(
        (del.get("prevResult"), &del["runtimeConfig"]),
        (None, &runtime),
        "the second DEL had no result"
    );
}

#[tokio::test]
async fn detaching_tries_every_plugin_and_needs_no_namespace() {
    let bench = Bench::new();
    let fail = |code| format!(r#"echo '{{"code":{code},"msg":"no {code}"}}'; exit 1"#);
    bench.plugin("a", &fail(11)).plugin("b", "sleep 1000").plugin("c", &fail(3)).plugin("d", &fail(5));
    bench.conf(
        "0.3.1",
        &json!([{"type": "a"}, {"type": "b"}, {"type": "c"}, {"type": "d"}, {"type": "gone"}]),
    );
    let network = Network::new(Config { del_timeout_s: 4, ..bench.config() });
    for netns in [bench.path("absent"), bench.path("conf")] {
        let intent = network.intent(&Request { netns, ..bench.request() }).unwrap();
        let attachment = Attachment { result: json!({}), ips: vec![], dns: Dns::default() };
        let _ = fs::remove_file(bench.path("log"));
        let text = network.detach(&intent, Some(&attachment)).await.unwrap_err().to_string();
        assert_eq!(bench.log(), ["DEL d", "DEL c", "DEL b", "DEL a"]);
        for expected in
            ["\"gone\" is not installed", "no 5 (code 5)", "plugin \"b\": DEL: killed", "no 11 (code 11)"]
        {
            assert!(text.contains(expected), "{text}");
        }
        assert!(!text.contains("no 3"), "an unknown container is detached: {text}");
        assert!(bench.text("DEL-a.env").contains("CNI_NETNS=\n"), "{}", bench.text("DEL-a.env"));
        assert_eq!(bench.stdin("DEL-a").get("prevResult"), None, "not before 0.4.0");
    }
}

#[tokio::test]
async fn a_check_that_networks_cannot_do_is_not_run() {
    let bench = Bench::new();
    bench.plugin("p", ECHO).conf("0.3.1", &json!([{"type": "p"}]));
    let network = Network::new(bench.config());
    let attachment = Attachment { result: json!({}), ips: vec![], dns: Dns::default() };
    network.check(&network.intent(&bench.request()).unwrap(), &attachment).await.unwrap();
    let list = r#"{"cniVersion":"1.0.0","name":"net","disableCheck":true,"plugins":[{"type":"p"}]}"#;
    fs::write(bench.path("conf/10-net.conflist"), list).unwrap();
    network.check(&network.intent(&bench.request()).unwrap(), &attachment).await.unwrap();
    assert!(bench.log().is_empty());
}

#[tokio::test]
async fn a_network_that_appears_is_used_at_once_and_its_absence_is_told() {
    let bench = Bench::new();
    fs::remove_dir(bench.path("conf")).unwrap();
    let network = Network::new(bench.config());
    let status = network.status();
    assert_eq!((status.ready, status.reason, status.network), (false, "NetworkPluginNotReady", None));
    assert!(status.message.contains("no network configuration found in /"), "{}", status.message);
    assert_eq!(network.intent(&bench.request()).unwrap_err().kind(), Kind::Unavailable);
    fs::create_dir(bench.path("conf")).unwrap();
    fs::write(bench.path("conf/00.conflist"), "{").unwrap();
    let text = network.intent(&bench.request()).unwrap_err().to_string();
    assert!(text.contains("1 unusable, the first: ") && text.contains("00.conflist"), "{text}");
    bench.conf("1.0.0", &json!([{"type": "p"}]));
    assert_eq!(network.intent(&bench.request()).unwrap().network(), "net");
    let status = network.status();
    assert_eq!((status.ready, status.network.as_deref(), status.broken.len()), (true, Some("net"), 1));
}

#[tokio::test]
async fn status_follows_the_directory_without_a_pod() {
    let bench = Bench::new();
    let network = Network::new(bench.config());
    assert!(!network.status().ready);
    bench.plugin("p", ECHO).conf("1.0.0", &json!([{"type": "p"}]));
    until(|| network.status().ready).await;
    fs::remove_file(bench.path("conf/10-net.conflist")).unwrap();
    until(|| !network.status().ready).await;
}

async fn until(condition: impl Fn() -> bool) {
    let deadline = Clock::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Clock::now() < deadline, "it does not happen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn the_default_network_can_be_named() {
    let bench = Bench::new();
    bench.conf("1.0.0", &json!([{"type": "p"}]));
    let other = r#"{"cniVersion":"1.0.0","name":"other","type":"p"}"#;
    fs::write(bench.path("conf/20-other.conf"), other).unwrap();
    let named =
        |name: &str| Network::new(Config { default_network: Some(name.to_owned()), ..bench.config() });
    assert_eq!(named("other").intent(&bench.request()).unwrap().network(), "other");
    let status = named("absent").status();
    assert!(
        !status.ready && status.message.contains("no configuration of the network \"absent\""),
        "{status:?}"
    );
}

#[tokio::test]
async fn status_is_asked_in_the_background_and_rarely() {
    let bench = Bench::new();
    bench.plugin("p", r#"echo '{"code":50,"msg":"agent is down"}'; exit 1"#);
    bench.conf("1.1.0", &json!([{"type": "p"}]));
    let network = Network::new(bench.config());
    assert!(network.status().ready, "nothing is known yet, and nothing is waited for");
    until(|| !network.status().ready).await;
    let status = network.status();
    assert!(status.message.contains("agent is down"), "{status:?}");
    for _ in 0..50 {
        let _ = network.status();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(bench.log(), ["STATUS p"]);
    let env = bench.text("STATUS-p.env");
    assert!(env.contains("CNI_COMMAND=STATUS") && !env.contains("CNI_CONTAINERID"), "{env}");
}

#[tokio::test]
async fn a_missing_plugin_shows_in_the_status() {
    let bench = Bench::new();
    bench.conf("1.0.0", &json!([{"type": "p"}]));
    let network = Network::new(bench.config());
    until(|| !network.status().ready).await;
    assert!(network.status().message.contains("plugin \"p\" is not installed in"), "{:?}", network.status());
}

#[tokio::test]
async fn collecting_tells_the_plugins_what_lives_if_they_can_collect() {
    let bench = Bench::new();
    bench
        .plugin("p", "exit 0")
        .plugin("q", r#"echo '{"code":5,"msg":"disk"}'; exit 1"#)
        .plugin("r", "exit 0");
    bench.conf("1.0.0", &json!([{"type": "p"}]));
    let network = Network::new(bench.config());
    let live = [("pod1".to_owned(), "eth0".to_owned())];
    assert!(matches!(network.gc(&live).await, Ok(Gc::Skipped(why)) if why.contains("speaks CNI 1.0.0")));
    assert!(bench.log().is_empty());
    let list = json!([{"type": "p"}, {"type": "q"}, {"type": "r"}]);
    bench.conf("1.1.0", &list);
    network.intent(&bench.request()).unwrap();
    let error = network.gc(&live).await.unwrap_err();
    assert!(error.to_string().contains("disk (code 5)"), "{error}");
    assert_eq!(bench.log(), ["GC p", "GC q", "GC r"]);
    let expected = json!([{"containerID": "pod1", "ifname": "eth0"}]);
    assert_eq!(bench.stdin("GC-r")["cni.dev/valid-attachments"], expected);
    bench.plugin("q", "exit 0");
    assert_eq!(network.gc(&live).await.unwrap(), Gc::Done("net".to_owned()));
}

#[tokio::test]
async fn nobody_is_attached_while_the_network_collects() {
    let bench = Bench::new();
    bench.plugin("p", ECHO);
    bench.conf("1.1.0", &json!([{"type": "p"}]));
    let network = Network::new(bench.config());
    let intent = network.intent(&bench.request()).unwrap();
    // It counts from the call on, before anybody has polled it: what it was told of is already old.
    let collection = network.gc(&[]);
    let attached = tokio::time::timeout(Duration::from_millis(300), network.attach(&intent)).await;
    assert!(attached.is_err() && bench.log().is_empty(), "{:?}", bench.log());
    assert!(matches!(network.gc(&[]).await, Err(e) if e.kind() == Kind::FailedPrecondition));
    collection.await.unwrap();
    network.attach(&intent).await.unwrap();
    assert_eq!(bench.log(), ["GC p", "ADD p"]);
}

#[tokio::test]
async fn the_ranges_of_the_node_are_taken_whole_or_not_at_all() {
    let network = Network::new(Bench::new().config());
    network.set_pod_cidrs("10.1.0.0/24, fd00::/64").unwrap();
    assert!(network.set_pod_cidrs("10.2.0.0/24,nonsense").is_err());
    assert_eq!(network.pod_cidrs(), ["10.1.0.0/24", "fd00::/64"]);
}

#[test]
fn the_configuration_has_defaults_and_no_misspellings() {
    let config: Config = toml::from_str("add_timeout_s = 5").unwrap();
    assert_eq!(config, Config { add_timeout_s: 5, ..Config::default() });
    assert!(toml::from_str::<Config>("add_timeout = 5").is_err());
}

/// A thread in a network namespace of its own, which ends with it: nothing has to be cleaned up.
struct Namespace {
    path: PathBuf,
    release: std::sync::mpsc::Sender<()>,
    thread: std::thread::JoinHandle<()>,
}

impl Namespace {
    fn new() -> Namespace {
        let (ready, path) = std::sync::mpsc::channel();
        let (release, released) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let (pid, tid) = (std::process::id(), rustix::thread::gettid().as_raw_nonzero());
            ready.send(PathBuf::from(format!("/proc/{pid}/task/{tid}/ns/net"))).unwrap();
            let _ = released.recv();
        });
        Namespace { path: path.recv().unwrap(), release, thread }
    }

    fn end(self) {
        self.release.send(()).unwrap();
        self.thread.join().unwrap();
    }
}

fn skip_reason() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root".to_owned());
    }
    let needed = ["bridge", "host-local", "portmap"].map(|name| Path::new("/usr/lib/cni").join(name));
    let missing = needed.iter().find(|path| !path.exists()).map(|path| format!("no {}", path.display()));
    missing.or_else(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
            .err()
            .map(|error| format!("no namespaces: {error}"))
    })
}

fn output(command: &str) -> String {
    let mut words = command.split(' ');
    let output = std::process::Command::new(words.next().unwrap()).args(words).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs in a thread whose namespace plays the node, so that bridge, veth and rules vanish with it.
#[test]
fn real_plugins_attach_check_and_detach_a_namespace() {
    let node = std::thread::spawn(|| match skip_reason() {
        Some(reason) => eprintln!("skipped: {reason}"),
        None => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            for version in ["0.3.1", "0.4.0", "1.0.0"] {
                runtime.block_on(real_plugins(version));
            }
        }
    });
    node.join().unwrap();
}

async fn real_plugins(version: &str) {
    let bench = Bench::new();
    let reservations = bench.path("reservations/ocidt0");
    let range = json!([[{"subnet": "10.211.77.0/24"}]]);
    let ipam = json!({"type": "host-local", "dataDir": bench.path("reservations"), "ranges": range,
        "routes": [{"dst": "0.0.0.0/0"}]});
    let list = json!({"cniVersion": version, "name": "ocidt0", "plugins": [
        {"type": "bridge", "bridge": "ocidt0", "isGateway": true, "ipMasq": false, "ipam": ipam,
            "dns": {"nameservers": ["10.211.77.1"], "search": ["test"]}},
        {"type": "portmap", "capabilities": {"portMappings": true}},
    ]});
    fs::write(bench.path("conf/10.conflist"), list.to_string()).unwrap();
    let config = Config { plugin_dirs: vec!["/usr/lib/cni".into()], ..bench.config() };
    let network = Network::new(config);
    let reserved = || -> Vec<String> {
        let names = fs::read_dir(&reservations)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("10.")).collect()
    };

    // A whole life, with the namespace there to the end.
    let pod = Namespace::new();
    let intent = network.intent(&Request { netns: pod.path.clone(), ..bench.request() }).unwrap();
    let attachment = network.attach(&intent).await.unwrap();
    assert_eq!(attachment.ips, ["10.211.77.2".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(
        (attachment.dns.servers.as_slice(), attachment.dns.searches.as_slice()),
        (&["10.211.77.1".to_owned()][..], &["test".to_owned()][..])
    );
    // Not checked: this portmap looks for IPv6 rules of an IPv4 pod.
    assert!(output("iptables-save -t nat").contains("--to-destination 10.211.77.2:80"));
    assert_eq!(reserved(), ["10.211.77.2"]);
    assert!(output("ip -o link show master ocidt0").contains("veth"));
    let twice = network.attach(&intent).await.unwrap_err();
    assert!(twice.to_string().contains("plugin \"bridge\": ADD: "), "{twice}");
    network.detach(&intent, Some(&attachment)).await.unwrap();
    assert!(!output("iptables-save -t nat").contains("10.211.77.2"));
    assert!(!output("ip -o link show master ocidt0").contains("veth"));
    assert!(reserved().is_empty());
    network.detach(&intent, Some(&attachment)).await.unwrap();

    // After a reboot: no namespace, no result; the address must be free again.
    let ports = Vec::new();
    let request = Request {
        netns: pod.path.clone(),
        pod_id: "pod2".to_owned(),
        port_mappings: ports,
        ..bench.request()
    };
    let intent = network.intent(&request).unwrap();
    let attachment = network.attach(&intent).await.unwrap();
    network.check(&intent, &attachment).await.unwrap();
    assert_eq!(reserved().len(), 1);
    pod.end();
    fs::write(bench.path("conf/10.conflist"), "gone").unwrap();
    assert_eq!(network.check(&intent, &attachment).await.is_ok(), version == "0.3.1", "{version} notices");
    network.detach(&intent, None).await.unwrap();
    assert!(reserved().is_empty());
    network.detach(&intent, Some(&attachment)).await.unwrap();

    // A version that these plugins are too old for.
    let newer = json!({"cniVersion": "1.1.0", "name": "newer", "plugins": list["plugins"]});
    fs::write(bench.path("conf/10.conflist"), newer.to_string()).unwrap();
    let intent = network.intent(&Request { netns: bench.path("absent"), ..bench.request() }).unwrap();
    let text = network.attach(&intent).await.unwrap_err().to_string();
    assert!(text.contains("incompatible CNI versions") || text.contains("netns"), "{text}");
}
