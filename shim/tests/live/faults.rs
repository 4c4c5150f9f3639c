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

/// A node whose records and run-time files are on filesystems of their own, which [`fill`] fills to the brim.
async fn small_disks() -> Node {
    let mut node = Node::prepared(|dir| {
        for (name, options) in [("root", "size=256k,mode=700"), ("state", "size=2m,mode=700")] {
            let path = dir.join(name);
            fs::create_dir(&path).unwrap();
            let mount =
                Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(path).status();
            assert!(mount.unwrap().success());
        }
    })
    .await;
    node.runtime_root = node.dirs.state.join("runtime");
    node.ready(|_| {}).await;
    node
}

fn fill(node: &Node) {
    use std::io::Write as _;
    for dir in [&node.dirs.root, &node.dirs.state] {
        let mut file = fs::File::create(dir.join("filler")).unwrap();
        while file.write(&[1; 4096]).is_ok_and(|written| written > 0) {}
        // No file can be made either, where the filesystem counts them.
        assert!(fs::write(dir.join("more"), [1; 64]).is_err());
        let _ = fs::remove_file(dir.join("more"));
    }
}

#[tokio::test]
async fn a_full_disk_loses_no_exit_and_keeps_nobody_from_the_end() {
    if !able() {
        return;
    }
    let mut node = small_disks().await;
    let polite = node.run(&["sh", "-c", "trap 'exit 3' TERM; echo up; while :; do sleep 0.02; done"]).await;
    let (removed, left) = (node.run(&["sleep", "1000"]).await, node.create(&["sleep", "1000"]).await);
    while !node.log(&polite).contains("up") {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    fill(&node);
    assert_eq!(node.stop(&polite, 20_000).await.unwrap().exit.code, 3);
    assert_eq!(read_container(&node.paths, &polite).unwrap().unwrap().exit.code, 3);
    node.remove(&removed).await;
    fill(&node);
    let created = ContainerId::generate();
    let refused = node.client.create_container(ctx(), &node.request(&created, &["true"])).await;
    assert_eq!(code(&refused.unwrap_err()).0, ttrpc::Code::INTERNAL);
    fill(&node);
    node.network(NetworkPhase::NETWORK_DETACHED).await;
    node.shim_exits();
    let state = read_pod(&node.paths).unwrap().unwrap();
    assert_eq!(state.phase.enum_value(), Ok(PodPhase::POD_STOPPED));
    let mut codes: Vec<_> = state.containers.iter().map(|c| (c.container.clone(), c.exit.code)).collect();
    codes.sort();
    let mut expected = vec![(polite.to_string(), 3), (left.to_string(), 137)];
    expected.sort();
    assert_eq!(codes, expected);
    fill(&node);
    remove_and_check(&node, "disk full").await;
}

#[tokio::test]
async fn a_full_disk_keeps_cleanup_from_nothing() {
    if !able() {
        return;
    }
    let mut node = small_disks().await;
    node.run(&["sleep", "1000"]).await;
    fill(&node);
    kill_shim(&mut node);
    for depth in [&[][..], &["--detached"]] {
        let done = node.cleanup(depth);
        assert!(done.status.success(), "{depth:?}: {done:?}");
        let state = read_pod(&node.paths).unwrap().unwrap();
        assert_eq!(&*state.containers[0].exit.reason, "ShimLost");
        assert_eq!(state.phase.enum_value() == Ok(PodPhase::POD_STOPPED), depth == ["--detached"]);
        fill(&node);
    }
    remove_and_check(&node, "disk full").await;
}

#[tokio::test]
async fn emptied_and_vanished_records_do_not_keep_a_pod_from_being_removed() {
    if !able() {
        return;
    }
    for case in ["container", "pod", "both", "gone"] {
        let mut node = Node::new().await;
        node.ready(|_| {}).await;
        let id = node.run(&["sleep", "1000"]).await;
        kill_shim(&mut node);
        if case != "pod" {
            fs::write(node.paths.container(&id).record(), b"").unwrap();
        }
        if case != "container" {
            fs::write(node.paths.record(), b"").unwrap();
        }
        if case == "gone" {
            fs::remove_dir_all(&node.dirs.root).unwrap();
        }
        let done = node.cleanup(&["--remove"]);
        assert!(done.status.success(), "{case}: {done:?}");
        assert!(processes_of(&node).is_empty(), "{case}: {:#?}", processes_of(&node));
        assert_eq!(node.mounts(), Vec::<String>::new(), "{case}");
        assert!(!node.paths.run_dir().exists() && !node.paths.record_dir().exists(), "{case}");
    }
}

#[tokio::test]
async fn a_stop_during_a_create_that_fails_is_a_stop_of_nothing() {
    if !able() {
        return;
    }
    let node = Node::new().await;
    let runtime = slow_runtime(&node, "sleep 0.3", "");
    node.ready(|request| request.runtime.as_mut().unwrap().binary = runtime).await;
    let id = ContainerId::generate();
    let request = node.request(&id, &["no-such-program"]);
    let begun = Instant::now();
    let (created, stopped) = tokio::join!(node.client.create_container(ctx(), &request), async {
        tokio::time::sleep(Duration::from_millis(150)).await;
        let request = StopContainerRequest { container: id.to_string(), ..Default::default() };
        node.client.stop_container(ctx(), &request).await
    });
    assert_eq!(code(&created.unwrap_err()).0, ttrpc::Code::INVALID_ARGUMENT);
    assert!(stopped.unwrap().state.is_none());
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn a_second_shim_touches_nothing_of_a_pod_that_is_there() {
    if !able() {
        return;
    }
    let mut node = Node::new().await;
    node.ready(|_| {}).await;
    let serve = |node: &Node| {
        let mut command = Command::new(binary());
        command.args(["serve", "--pod", node.id.as_str()]);
        command.arg("--root").arg(&node.dirs.root).arg("--state").arg(&node.dirs.state);
        command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap()
    };
    let before = read_pod(&node.paths).unwrap();
    assert!(!serve(&node).success());
    kill_shim(&mut node);
    assert!(!serve(&node).success());
    assert_eq!(read_pod(&node.paths).unwrap(), before);
    assert!(node.paths.namespaces().join("net").exists());
}
