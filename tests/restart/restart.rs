//! A daemon that is killed and started finds its pods as they are, and what ended meanwhile as it ended.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant, UNIX_EPOCH};

use harness::client::{container, security};
use harness::process::{runs, signal};
use harness::{BUSYBOX, Node, Setup, test};
use nix::sys::signal::Signal;
use ocid_api::cri::{
    ContainerConfig, ContainerState, ContainerStatus, Mount, NamespaceMode, PodSandboxState,
};

/// Pods in the large test, each with two containers; `OCID_TEST_PODS` changes it.
fn pod_count() -> usize {
    std::env::var("OCID_TEST_PODS").ok().and_then(|n| n.parse().ok()).unwrap_or(50)
}

/// How many pods are started at once.
const PARALLEL: usize = 8;

/// What must be the same before and after.
type Fingerprint = (String, String, i64, i64, Option<u32>);

async fn fingerprints(node: &Node) -> BTreeMap<String, Fingerprint> {
    let mut found = BTreeMap::new();
    for container in node.client().containers().await.unwrap() {
        let status = node.client().container_status(&container.id).await.unwrap();
        let pid = node.client().pid(&container.id).await.ok();
        let state = format!("{:?}", status.state());
        found.insert(
            container.id,
            (container.pod_sandbox_id, state, status.created_at, status.started_at, pid),
        );
    }
    found
}

#[test]
fn a_hundred_containers_outlive_a_killed_daemon() {
    test(Setup::default(), async |node| {
        let pods = pod_count();
        let mut started = 0;
        let mut tasks = tokio::task::JoinSet::new();
        while started < pods || !tasks.is_empty() {
            while started < pods && tasks.len() < PARALLEL {
                let (client, config) = (node.client().clone(), node.pod(&format!("p{started}")));
                started += 1;
                tasks.spawn(async move {
                    let pod = client.run_pod(&config).await.unwrap();
                    for name in ["a", "b"] {
                        let main = container(name, BUSYBOX, &["sleep", "100000"]);
                        client.run(&pod, &main, &config).await.unwrap();
                    }
                });
            }
            tasks.join_next().await.unwrap().unwrap();
        }
        let before = fingerprints(node).await;
        assert_eq!(before.len(), 2 * pods);
        let pods_before = node.client().pods().await.unwrap();

        node.kill();
        let begun = Instant::now();
        node.spawn();
        let listed = loop {
            match node.client().containers().await {
                Ok(list) => break list,
                Err(_) if begun.elapsed() < Duration::from_secs(10) => {
                    tokio::time::sleep(Duration::from_millis(2)).await
                }
                Err(e) => panic!("no list: {e}"),
            }
        };
        let took = begun.elapsed();
        eprintln!("first list of {} containers {took:?} after the start", listed.len());
        assert_eq!(listed.len(), 2 * pods, "the first list is not whole");
        assert!(listed.iter().all(|c| c.state() == ContainerState::ContainerRunning));
        assert!(took < Duration::from_secs(1), "{took:?}");

        assert_eq!(fingerprints(node).await, before);
        let mut pods_after = node.client().pods().await.unwrap();
        let mut pods_before = pods_before;
        pods_before.sort_by(|a, b| a.id.cmp(&b.id));
        pods_after.sort_by(|a, b| a.id.cmp(&b.id));
        assert_eq!(pods_after, pods_before);
        assert!(pods_after.iter().all(|p| p.state() == PodSandboxState::SandboxReady));
        for (_, _, _, _, pid) in before.values() {
            assert!(runs(pid.unwrap()));
        }
        let last = listed.last().unwrap();
        assert_eq!(node.client().shell(&last.id, "echo alive").await, "alive");
    });
}

/// A container that waits for a file of the host before it goes on.
fn waiting(node: &Node, name: &str, then: &str) -> ContainerConfig {
    let script = format!("while [ ! -e /host/go ]; do sleep 0.05; done; {then}");
    let mut config = container(name, BUSYBOX, &["sh", "-c", &script]);
    config.mounts = vec![Mount {
        host_path: node.log_dir().display().to_string(),
        container_path: "/host".into(),
        ..Default::default()
    }];
    config
}

fn now_ns() -> i64 {
    i64::try_from(UNIX_EPOCH.elapsed().unwrap().as_nanos()).unwrap()
}

#[test]
fn exits_during_the_downtime_are_told_exactly() {
    test(Setup::default(), async |node| {
        let client = node.client();
        let mut pod_config = node.pod("exits");
        let linux = pod_config.linux.get_or_insert_default().security_context.get_or_insert_default();
        linux.namespace_options.get_or_insert_default().pid = NamespaceMode::Node.into();
        let pod = client.run_pod(&pod_config).await.unwrap();
        let mut expected = Vec::new();
        for code in [0, 7, 255] {
            let config = waiting(node, &format!("code{code}"), &format!("echo last words; exit {code}"));
            expected.push((client.run(&pod, &config, &pod_config).await.unwrap(), code));
        }
        // The init of a pid namespace ignores most signals: these run in the host's.
        let mut by_signal = Vec::new();
        for (name, kill, code) in
            [("term", Signal::SIGTERM, 143), ("kill", Signal::SIGKILL, 137), ("segv", Signal::SIGSEGV, 139)]
        {
            let mut config = container(name, BUSYBOX, &["sleep", "1000"]);
            security(&mut config).namespace_options.as_mut().unwrap().pid = NamespaceMode::Node.into();
            let id = client.run(&pod, &config, &pod_config).await.unwrap();
            by_signal.push((client.pid(&id).await.unwrap(), kill));
            expected.push((id, code));
        }

        node.kill();
        tokio::time::sleep(Duration::from_millis(300)).await;
        let ended_after = now_ns();
        fs::write(node.log_dir().join("go"), "").unwrap();
        by_signal.iter().for_each(|(pid, kill)| signal(*pid, *kill));
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let ended_before = now_ns();
        node.start().await;

        for (id, code) in &expected {
            let status: ContainerStatus = client.container_status(id).await.unwrap();
            let name = &status.metadata.as_ref().unwrap().name;
            assert_eq!(
                (status.state(), status.exit_code),
                (ContainerState::ContainerExited, *code),
                "{name}"
            );
            assert_eq!(status.reason, if *code == 0 { "Completed" } else { "Error" }, "{name}");
            assert!(
                (ended_after..=ended_before).contains(&status.finished_at),
                "{name}: {}",
                status.finished_at
            );
        }
        for (id, _) in &expected[..3] {
            assert!(node.log(id).await.ends_with("stdout F last words\n"));
        }
    });
}

/// Writes numbered lines, a hundred at a time, each with the machine's uptime in hundredths of a second.
const WRITER: &str = "n=0; end=0; while [ ! -e /host/go ]; do read up _ < /proc/uptime; i=0; \
    while [ $i -lt 100 ]; do echo $n ${up%.*}${up#*.}; n=$((n+1)); i=$((i+1)); done; usleep 4000; done; \
    echo total $n";

#[test]
fn no_log_line_is_lost_and_no_writer_waits() {
    test(Setup::default(), async |node| {
        let mut config = waiting(node, "writer", "");
        config.command = vec!["sh".into(), "-c".into(), WRITER.into()];
        let (_, id) = node.run_with(&node.pod("writer"), &config).await;
        for downtime in [100, 3000] {
            tokio::time::sleep(Duration::from_millis(1000)).await;
            node.kill();
            tokio::time::sleep(Duration::from_millis(downtime)).await;
            node.start().await;
        }
        fs::write(node.log_dir().join("go"), "").unwrap();
        assert_eq!(node.client().exited(&id).await.exit_code, 0);

        let log = node.log(&id).await;
        let lines: Vec<&str> = log.lines().map(|line| line.splitn(4, ' ').nth(3).unwrap()).collect();
        let total: usize = lines.last().unwrap().strip_prefix("total ").unwrap().parse().unwrap();
        assert_eq!(lines.len(), total + 1);
        let (mut first, mut last, mut longest) = (0, 0, 0);
        for (expected, line) in lines[..total].iter().enumerate() {
            let (number, uptime) = line.split_once(' ').unwrap();
            assert_eq!(
                number.parse::<usize>().unwrap(),
                expected,
                "a line is missing, doubled or out of order"
            );
            let uptime: u64 = uptime.parse().unwrap();
            if expected == 0 {
                (first, last) = (uptime, uptime);
            }
            longest = longest.max(uptime - last);
            last = uptime;
        }
        let rate = u64::try_from(total).unwrap() * 100 / (last - first).max(1);
        eprintln!("{total} lines, {rate} a second, longest pause {longest} hundredths of a second");
        assert!(longest < 100, "the writer waited {longest} hundredths of a second");
        assert!(rate > 2000, "{rate} lines a second are no test");
    });
}

#[test]
fn a_stop_that_was_asked_for_happens_without_the_daemon() {
    test(Setup::default(), async |node| {
        let (_, id) = node.run("deaf", &["sh", "-c", "trap '' TERM; while :; do sleep 0.05; done"]).await;
        let pid = node.client().pid(&id).await.unwrap();
        let (client, target) = (node.client().clone(), id.clone());
        let stopping = tokio::spawn(async move { client.stop(&target, 2).await });
        tokio::time::sleep(Duration::from_millis(500)).await;
        node.kill();
        let _ = stopping.await.unwrap();
        harness::eventually(Duration::from_secs(5), "it is killed on time", async || {
            if runs(pid) { Err("it runs on".to_owned()) } else { Ok(()) }
        })
        .await;
        node.start().await;
        let status = node.client().container_status(&id).await.unwrap();
        assert_eq!((status.state(), status.exit_code), (ContainerState::ContainerExited, 137));
    });
}

#[test]
fn every_state_of_a_container_survives() {
    test(Setup::default(), async |node| {
        let client = node.client();
        let config = node.pod("states");
        let pod = client.run_pod(&config).await.unwrap();
        let created = client.create(&pod, &container("created", BUSYBOX, &["true"]), &config).await.unwrap();
        let exited = client.run(&pod, &container("exited", BUSYBOX, &["false"]), &config).await.unwrap();
        client.exited(&exited).await;
        let stopped = client.run_pod(&node.pod("stopped")).await.unwrap();
        client.stop_pod(&stopped).await.unwrap();
        let before = fingerprints(node).await;
        node.restart().await;
        assert_eq!(fingerprints(node).await, before);
        let state = async |id: &str| client.pod_status(id).await.unwrap().state();
        assert_eq!(state(&pod).await, PodSandboxState::SandboxReady);
        assert_eq!(state(&stopped).await, PodSandboxState::SandboxNotready);
        client.start(&created).await.unwrap();
        assert_eq!(client.exited(&created).await.exit_code, 0);
    });
}

#[test]
fn a_daemon_that_is_told_to_end_leaves_its_pods_running() {
    test(Setup::default(), async |node| {
        let (_, id) = node.run("stays", &["sleep", "1000"]).await;
        let pid = node.client().pid(&id).await.unwrap();
        assert!(node.stop().await.success());
        assert!(runs(pid));
        node.start().await;
        assert_eq!(node.client().pid(&id).await.unwrap(), pid);
    });
}

#[test]
fn a_damaged_record_hides_one_pod_and_no_other() {
    test(Setup::default(), async |node| {
        let (bad, bad_container) = node.run("bad", &["sleep", "1000"]).await;
        let (good, id) = node.run("good", &["sleep", "1000"]).await;
        let pid = node.client().pid(&bad_container).await.unwrap();
        node.kill();
        let record = node.pod_paths(&bad).record();
        let whole = fs::read(&record).unwrap();
        fs::write(&record, &whole[..whole.len() / 2]).unwrap();
        node.start().await;
        assert!(node.client().pods().await.unwrap().iter().any(|p| p.id == good));
        assert_eq!(node.client().shell(&id, "echo alive").await, "alive");
        // Its shim lives and knows better than the file; at the latest after a removal nothing of it is left.
        let _ = node.client().remove_pod(&bad).await;
        node.kill();
        if record.exists() {
            fs::write(&record, whole).unwrap();
        }
        node.start().await;
        node.client().remove_pod(&bad).await.unwrap();
        assert!(!runs(pid));
    });
}

#[test]
fn a_pod_whose_containers_cannot_be_listed_does_not_keep_the_daemon_from_starting() {
    test(Setup::default(), async |node| {
        let (bad, _) = node.run("bad", &["sleep", "1000"]).await;
        let (good, id) = node.run("good", &["sleep", "1000"]).await;
        node.kill();
        let (containers, aside) = (node.pod_paths(&bad).containers(), node.path().join("aside"));
        fs::rename(&containers, &aside).unwrap();
        fs::write(&containers, "no directory").unwrap();
        node.start().await;
        assert_eq!(node.client().shell(&id, "echo alive").await, "alive");
        assert_eq!(node.client().pod_status(&good).await.unwrap().id, good);
        // It can be ended and removed, once its record is whole again.
        fs::remove_file(&containers).unwrap();
        fs::rename(&aside, &containers).unwrap();
        harness::eventually(Duration::from_secs(30), "only the good pod is left", async || {
            node.client().remove_pod(&bad).await.map_err(|e| e.to_string())?;
            let pods = node.client().pods().await.map_err(|e| e.to_string())?;
            if pods.len() == 1 { Ok(()) } else { Err(format!("{pods:?}")) }
        })
        .await;
    });
}
