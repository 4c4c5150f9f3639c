//! What goes wrong beside us: a shim killed at any moment, a runtime that dawdles, a disk with no room, files that
//! somebody has emptied, peers that do not listen.

use std::os::unix::fs::PermissionsExt as _;

use super::*;

/// Processes that name the pod: on their command line or by their cgroup.
fn processes_of(node: &Node) -> Vec<String> {
    let id = node.id.as_str();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let pid = entry.file_name().to_string_lossy().into_owned();
        if pid.parse::<u32>().is_err() || pid == std::process::id().to_string() {
            continue;
        }
        let text = |name: &str| {
            let bytes = fs::read(entry.path().join(name)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).replace('\0', " ")
        };
        let dead = text("stat").rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']));
        let (line, cgroup) = (text("cmdline"), text("cgroup"));
        if !dead && (line.contains(id) || cgroup.contains(id)) {
            found.push(format!("{pid}: {line} {cgroup}"));
        }
    }
    found
}

/// A runtime that takes a while before or after it does what it is told.
fn slow_runtime(node: &Node, before: &str, after: &str) -> String {
    let path = node._dir.path().join("slow-runtime");
    fs::write(&path, format!("#!/bin/sh\n{before}\n{RUNC} \"$@\"\ncode=$?\n{after}\nexit $code\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path.to_str().unwrap().to_owned()
}

fn kill_shim(node: &mut Node) {
    node.shim.kill().unwrap();
    node.shim.wait().unwrap();
}

/// Removes the pod of a dead shim, and checks that nothing is left, nor comes back.
async fn remove_and_check(node: &Node, when: &str) {
    let done = node.cleanup(&["--remove"]);
    assert!(done.status.success(), "{when}: {done:?}");
    let left = processes_of(node);
    assert!(left.is_empty(), "{when}: {left:#?}");
    node.check_clean(false);
}

#[tokio::test]
async fn a_runtime_that_outlives_its_shim_is_ended_by_cleanup() {
    if !able() {
        return;
    }
    let verb = "for word; do case $word in create|exec|delete) verb=$word; break;; esac; done";
    for (case, before, after) in [
        ("create begins", format!("{verb}; [ $verb = create ] && sleep 1"), String::new()),
        ("create ends", String::new(), format!("{verb}; [ $verb = create ] && sleep 1")),
        ("exec begins", format!("{verb}; [ $verb = exec ] && sleep 1"), String::new()),
    ] {
        let mut node = Node::new().await;
        let runtime = slow_runtime(&node, &before, &after);
        node.ready(|request| {
            request.shared_pid = true;
            request.runtime.as_mut().unwrap().binary = runtime;
        })
        .await;
        let id = ContainerId::generate();
        let request = node.request(&id, &["sleep", "1000"]);
        let client = connect(&node.paths).await;
        let under_way = if case.starts_with("exec") {
            node.client.create_container(ctx(), &request).await.unwrap();
            node.start(&id).await.unwrap();
            let process = serde_json::to_vec(&process(&["sleep", "1001"])).unwrap();
            let request = ExecSyncRequest { container: id.to_string(), process, ..Default::default() };
            tokio::spawn(async move { client.exec_sync(ctx(), &request).await.map(drop) })
        } else {
            tokio::spawn(async move { client.create_container(ctx(), &request).await.map(drop) })
        };
        tokio::time::sleep(Duration::from_millis(500)).await;
        kill_shim(&mut node);
        let _ = under_way.await;
        remove_and_check(&node, case).await;
        tokio::time::sleep(Duration::from_millis(1200)).await;
        let left = processes_of(&node);
        assert!(left.is_empty(), "{case}, later: {left:#?}");
        node.check_clean(false);
    }
}

#[tokio::test]
async fn a_shim_killed_at_any_moment_leaves_nothing_that_cleanup_does_not_remove() {
    if !able() {
        return;
    }
    let rounds = std::env::var("OCID_KILLS").ok().and_then(|n| n.parse::<u64>().ok()).unwrap_or(12);
    for round in 0..rounds {
        let mut node = Node::new().await;
        // Of the first half second, which holds CreatePod, and two lives of a container.
        let delay = Duration::from_millis(round * 37 % 500);
        let life = async {
            node.ready(|request| request.shared_pid = round % 2 == 0).await;
            loop {
                let id = node.run(&["sh", "-c", "sleep 1000 & sleep 1000"]).await;
                let _ = node.exec(&id, &["sh", "-c", "sleep 0.01 & true"], 10_000).await;
                let _ = node.stop(&id, 0).await;
            }
        };
        let _ = tokio::time::timeout(delay, life).await;
        kill_shim(&mut node);
        let when = format!("killed after {delay:?}");
        if round % 3 == 0 {
            let done = node.cleanup(&[]);
            assert!(done.status.success(), "{when}: {done:?}");
            let phases = read_pod(&node.paths).unwrap().unwrap_or_default().containers;
            for container in phases {
                assert_eq!(container.phase.enum_value(), Ok(ContainerPhase::CONTAINER_EXITED), "{when}");
            }
        }
        remove_and_check(&node, &when).await;
    }
}
