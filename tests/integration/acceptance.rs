//! The whole life of a pod, driven by the real crictl against a real registry, as an operator would.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::image::Built;
use harness::{Image, Layer, Node, Setup, test};
use serde_json::{Value, json};

const WITH_REGISTRY: Setup = Setup { busybox: false, cni: true, plugins: false, registry: true, start: true };
const IMAGE: &str = "registry.test/acceptance/busybox:1";

/// Where crictl is: in `OCID_CRICTL`, or where `scripts/go-tool` has built it.
fn crictl_binary() -> PathBuf {
    if let Some(path) = std::env::var_os("OCID_CRICTL") {
        return path.into();
    }
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/go-tool");
    let output = Command::new(tool).arg("crictl").output().expect("scripts/go-tool runs");
    assert!(output.status.success(), "scripts/go-tool crictl: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().into()
}

/// A crictl that talks to one node.
struct Crictl {
    binary: PathBuf,
    config: PathBuf,
}

impl Crictl {
    fn new(node: &Node) -> Crictl {
        let config = node.path().join("crictl.yaml");
        let endpoint = format!("unix://{}", node.socket().display());
        let text = format!("runtime-endpoint: {endpoint}\nimage-endpoint: {endpoint}\ntimeout: 10\n");
        fs::write(&config, text).unwrap();
        Crictl { binary: crictl_binary(), config }
    }

    /// Runs a command; returns the exit code, stdout and stderr.
    fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        let output =
            Command::new(&self.binary).arg("--config").arg(&self.config).args(arguments).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
    }

    /// Runs a command that must succeed; returns its stdout.
    #[track_caller]
    fn ok(&self, arguments: &[&str]) -> String {
        let (code, stdout, stderr) = self.run(arguments);
        assert_eq!(code, 0, "crictl {arguments:?}: {stdout} {stderr}");
        stdout
    }

    /// Runs a command that prints JSON.
    #[track_caller]
    fn json(&self, arguments: &[&str]) -> Value {
        let text = self.ok(arguments);
        serde_json::from_str(&text)
            .unwrap_or_else(|e| panic!("crictl {arguments:?} printed no JSON ({e}): {text}"))
    }
}

fn write(node: &Node, name: &str, value: &Value) -> String {
    let path = node.path().join(name);
    fs::write(&path, value.to_string()).unwrap();
    path.display().to_string()
}

fn push(node: &Node) -> Built {
    let built = Image::busybox().layer(Layer::new().file("mark", 0o644, "acceptance")).build();
    node.registry().push(&built, "acceptance/busybox", "1");
    built
}

#[test]
fn crictl_drives_a_pod_through_its_life() {
    test(WITH_REGISTRY, async |node| {
        let crictl = Crictl::new(node);
        let image = push(node);

        assert!(crictl.ok(&["version"]).contains("RuntimeName:  ocid"));
        let info = crictl.json(&["info"]);
        let conditions = info["status"]["conditions"].as_array().unwrap();
        for name in ["RuntimeReady", "NetworkReady"] {
            assert!(conditions.iter().any(|c| c["type"] == name && c["status"] == true), "{info}");
        }

        assert!(crictl.ok(&["pull", IMAGE]).contains("Image is up to date"));
        assert!(crictl.ok(&["images"]).contains("registry.test/acceptance/busybox"));
        let inspected = crictl.json(&["inspecti", IMAGE]);
        assert_eq!(inspected["status"]["id"], json!(image.id));
        assert!(inspected["info"]["imageSpec"]["config"]["Cmd"].is_array(), "{inspected}");
        assert!(crictl.json(&["imagefsinfo"])["status"]["imageFilesystems"][0]["usedBytes"].is_object());

        let pod_file = write(
            node,
            "pod.json",
            &json!({
                "metadata": { "name": "web", "namespace": "default", "uid": "acceptance-1", "attempt": 0 },
                "hostname": "web", "log_directory": node.log_dir().join("web"), "linux": {},
            }),
        );
        let container_file = write(
            node,
            "container.json",
            &json!({
                "metadata": { "name": "main", "attempt": 0 }, "image": { "image": IMAGE },
                "command": ["sh", "-c", "echo started; trap 'exit 0' TERM; while :; do sleep 0.1; done"],
                "log_path": "0.log", "linux": {},
            }),
        );
        let pod = crictl.ok(&["runp", &pod_file]);
        let short_pod = &pod[..13];
        assert!(crictl.ok(&["pods"]).contains(short_pod));
        let inspected = crictl.json(&["inspectp", short_pod]);
        assert_eq!(inspected["status"]["state"], "SANDBOX_READY");
        assert!(inspected["status"]["network"]["ip"].as_str().unwrap().starts_with(&node.network.prefix));

        let id = crictl.ok(&["create", short_pod, &container_file, &pod_file]);
        let short = &id[..13];
        assert!(crictl.ok(&["ps", "-a"]).contains("Created"));
        crictl.ok(&["start", short]);
        assert!(crictl.ok(&["ps"]).contains(short));
        let inspected = crictl.json(&["inspect", short]);
        assert_eq!(inspected["status"]["state"], "CONTAINER_RUNNING");
        assert!(inspected["info"]["pid"].as_u64().unwrap() > 1);
        assert!(inspected["info"]["runtimeSpec"]["process"]["args"].is_array());

        harness::eventually(std::time::Duration::from_secs(10), "the log is there", async || {
            let log = crictl.ok(&["logs", short]);
            if log == "started" { Ok(()) } else { Err(log) }
        })
        .await;
        assert_eq!(crictl.ok(&["exec", "-s", short, "cat", "/mark"]), "acceptance");
        let (code, _, stderr) = crictl.run(&["exec", "-s", short, "sh", "-c", "exit 7"]);
        assert!(code == 7 || (code != 0 && stderr.contains('7')), "{code} {stderr}");
        // Idle containers have used no time that crictl would show, so this one works a little.
        crictl.ok(&["exec", "-s", short, "sh", "-c", "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done"]);
        let stats = crictl.json(&["stats", "-o", "json", short]);
        assert!(stats["stats"][0]["memory"]["workingSetBytes"]["value"].as_str().unwrap() != "0", "{stats}");

        crictl.ok(&["stop", "-t", "10", short]);
        let inspected = crictl.json(&["inspect", short]);
        assert_eq!(
            (&inspected["status"]["state"], &inspected["status"]["exitCode"]),
            (&json!("CONTAINER_EXITED"), &json!(0))
        );
        crictl.ok(&["rm", short]);
        crictl.ok(&["stopp", short_pod]);
        assert!(crictl.ok(&["pods"]).contains("NotReady"));
        crictl.ok(&["rmp", short_pod]);
        assert_eq!(crictl.ok(&["pods", "-q"]), "");
        crictl.ok(&["rmi", IMAGE]);
        assert!(!crictl.ok(&["images"]).contains("acceptance"));
    });
}

#[test]
fn crictl_gets_errors_it_can_show() {
    test(WITH_REGISTRY, async |node| {
        let crictl = Crictl::new(node);
        for arguments in [
            &["inspect", "deadbeef"][..],
            &["inspectp", "deadbeef"],
            &["pull", "registry.test/absent:1"],
            &["inspecti", "absent"],
            &["exec", "-s", "deadbeef", "true"],
        ] {
            let (code, _, stderr) = crictl.run(arguments);
            assert_ne!(code, 0, "{arguments:?}");
            assert!(!stderr.contains("panic") && !stderr.contains("transport"), "{stderr}");
        }
    });
}

#[test]
fn a_pod_of_crictl_outlives_the_daemon() {
    test(WITH_REGISTRY, async |node| {
        let crictl = Crictl::new(node);
        push(node);
        let pod = write(
            node,
            "pod.json",
            &json!({
                "metadata": { "name": "web", "namespace": "default", "uid": "acceptance-2", "attempt": 0 },
                "log_directory": node.log_dir().join("web"), "linux": {},
            }),
        );
        let container = write(
            node,
            "container.json",
            &json!({
                "metadata": { "name": "main", "attempt": 0 }, "image": { "image": IMAGE },
                "command": ["sleep", "1000"], "log_path": "0.log", "linux": {},
            }),
        );
        let id = crictl.ok(&["run", &container, &pod]);
        let pid = crictl.json(&["inspect", &id])["info"]["pid"].clone();
        node.restart().await;
        assert_eq!(crictl.json(&["inspect", &id])["info"]["pid"], pid);
        assert_eq!(crictl.ok(&["exec", "-s", &id, "echo", "alive"]), "alive");
        crictl.ok(&["rmp", "-a", "-f"]);
    });
}
