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
        for (name, options) in [("root", "size=256k,mode=700"), ("state", "size=2m,nr_inodes=60,mode=700")] {
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
        assert!(fs::write(dir.join("more"), [1; 64]).is_err());
    }
    // Here no file can be made either.
    let mut names = 0..;
    while fs::File::create(node.dirs.state.join(format!("filler-{}", names.next().unwrap()))).is_ok() {
        assert!(fs::read_dir(&node.dirs.state).unwrap().count() < 1000);
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

/// A peer that asks for the states of the pod and reads none of them.
fn stalled_watch(node: &Node) -> std::os::unix::net::UnixStream {
    use std::io::Write as _;
    let field = |tag: u8, text: &str| {
        let mut bytes = vec![tag, u8::try_from(text.len()).unwrap()];
        bytes.extend(text.as_bytes());
        bytes
    };
    let request = [field(0x0a, "ocid.shim.v1.Shim"), field(0x12, "Watch")].concat();
    let mut stream = std::os::unix::net::UnixStream::connect(node.paths.socket()).unwrap();
    stream.write_all(&u32::try_from(request.len()).unwrap().to_be_bytes()).unwrap();
    stream.write_all(&[0, 0, 0, 1, 1, 0]).unwrap(); // stream 1, a request, no flags
    stream.write_all(&request).unwrap();
    stream
}

/// Memory of the shim that is its own, in KiB.
fn private_kib(node: &Node) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", node.shim.id())).unwrap();
    let of = |line: &str| line.split_ascii_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok());
    rollup.lines().filter(|line| line.starts_with("Private_")).filter_map(of).sum()
}

fn fds(node: &Node) -> usize {
    fs::read_dir(format!("/proc/{}/fd", node.shim.id())).unwrap().count()
}

#[tokio::test]
async fn a_watcher_that_does_not_read_costs_no_memory_and_stops_nobody() {
    if !able() {
        return;
    }
    let node = Node::new().await;
    node.ready(|_| {}).await;
    let id = node.run(&["sleep", "1000"]).await;
    let mut resources = json!({ "memory": { "limit": 64 << 20 } }).to_string().into_bytes();
    resources.resize(60 << 10, b' ');
    let update = UpdateContainerRequest { container: id.to_string(), resources, ..Default::default() };
    node.client.update_container(ctx(), &update).await.unwrap();
    let before = private_kib(&node);
    let stalled: Vec<_> = (0..3).map(|_| stalled_watch(&node)).collect();
    for _ in 0..40 {
        node.client.update_container(ctx(), &update).await.unwrap();
    }
    let grown = private_kib(&node).saturating_sub(before);
    assert!(grown < 2 << 10, "{grown} KiB");
    let too_large = UpdateContainerRequest { resources: vec![b' '; (64 << 10) + 1], ..update };
    let refused = node.client.update_container(ctx(), &too_large).await.unwrap_err();
    assert_eq!(code(&refused).0, ttrpc::Code::INVALID_ARGUMENT);
    // It may even go on reading, and finds the state of now.
    node.stop(&id, 0).await.unwrap();
    drop(stalled);
}

#[tokio::test]
async fn many_execs_leave_no_descriptor_no_zombie_and_no_memory() {
    if !able() {
        return;
    }
    let rounds = std::env::var("OCID_EXECS").ok().and_then(|n| n.parse().ok()).unwrap_or(40);
    let node = Node::new().await;
    node.ready(|_| {}).await;
    let id = node.run(&["sleep", "1000"]).await;
    let mut before = (0, 0);
    for round in 0..rounds + 8 {
        if round == 8 {
            before = (fds(&node), private_kib(&node)); // what the first ones have left is there for the others
        }
        match round % 4 {
            0 => {
                let (_, stdout, _) = node.exec(&id, &["sh", "-c", "yes | head -c 300000"], 0).await.unwrap();
                assert_eq!(stdout.len(), 300_000);
            }
            1 => drop(node.exec(&id, &["no-such-program"], 0).await.unwrap_err()),
            2 => drop(node.exec(&id, &["yes"], 200).await.unwrap_err()),
            _ => assert_eq!(node.exec(&id, &["sh", "-c", "sleep 0.1 & exit 4"], 0).await.unwrap().0, 4),
        }
    }
    tokio::time::sleep(Duration::from_millis(2500)).await; // orphans are collected, buffers given back
    let children = format!("/proc/{0}/task/{0}/children", node.shim.id());
    assert_eq!(
        fs::read_to_string(children).unwrap().split_ascii_whitespace().count(),
        1,
        "the container's init"
    );
    let after = (fds(&node), private_kib(&node));
    assert_eq!(after.0, before.0, "descriptors");
    assert!(after.1 < before.1 + (4 << 10), "{before:?} {after:?} KiB");
    let left: Vec<_> = fs::read_dir(node.paths.run_dir()).unwrap().flatten().map(|e| e.file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with("runtime-")), "{left:?}");
}

#[tokio::test]
async fn an_idle_shim_sleeps() {
    if !able() {
        return;
    }
    let node = Node::new().await;
    node.ready(|_| {}).await;
    node.run(&["sh", "-c", "echo hello; exec sleep 1000"]).await;
    let _watch = stalled_watch(&node);
    tokio::time::sleep(Duration::from_secs(4)).await;
    let wakeups = || {
        let status = fs::read_to_string(format!("/proc/{}/status", node.shim.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
        line.trim().parse::<u64>().unwrap()
    };
    let before = wakeups();
    tokio::time::sleep(Duration::from_secs(8)).await;
    let woken = wakeups() - before;
    assert!(woken <= 4, "woken {woken} times in 8 s");
}

#[tokio::test]
async fn a_peer_that_is_not_root_is_refused() {
    use std::os::unix::net::UnixStream;
    if !able() {
        return;
    }
    let node = Node::new().await;
    node.ready(|_| {}).await;
    let socket = node.paths.socket();
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(node.paths.run_dir()).unwrap().permissions().mode() & 0o777, 0o700);
    assert_eq!(fs::metadata(node.paths.record_dir()).unwrap().permissions().mode() & 0o777, 0o700);
    // Were the modes not what they are.
    for dir in socket.ancestors().take_while(|dir| *dir != Path::new("/tmp")) {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o777)).unwrap();
    }
    let refused = tokio::task::spawn_blocking(move || {
        std::thread::spawn(move || {
            let nobody = rustix::thread::Uid::from_raw(65534);
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap(); // of this thread
            let mut stream = UnixStream::connect(&socket).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            stream.read(&mut [0; 64])
        })
        .join()
        .unwrap()
    });
    assert!(matches!(refused.await.unwrap(), Ok(0)), "the connection is closed at once");
    let log = fs::read_to_string(node.paths.log()).unwrap();
    assert!(log.contains("not root"), "{log}");
}

#[tokio::test]
async fn a_full_log_disk_stops_nobody_and_leaves_whole_records() {
    if !able() {
        return;
    }
    let node = Node::prepared(|dir| {
        let logs = dir.join("logs");
        fs::create_dir(&logs).unwrap();
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(&logs).status();
        assert!(mount.unwrap().success());
        fs::write(logs.join("filler"), vec![1; 500_000]).unwrap();
    })
    .await;
    node.ready(|_| {}).await;
    let script =
        "yes 0123456789 | head -n 50000; while ! cat /go 2>/dev/null; do sleep 0.02; done; echo after";
    let id = node.run(&["sh", "-c", script]).await;
    tokio::time::sleep(Duration::from_millis(700)).await;
    fs::remove_file(node.logs.join("filler")).unwrap();
    node.exec(&id, &["sh", "-c", "echo go > /go"], 0).await.unwrap();
    assert_eq!(node.exited(&id).await.exit.code, 0);
    let log = node.log(&id);
    let whole = |line: &str| {
        let text = line.split_once(" stdout F ").map(|(_, text)| text);
        matches!(text, Some("0123456789" | "go" | "after")) || line.contains("lines dropped: No space left")
    };
    let torn: Vec<_> = log.lines().filter(|line| !whole(line)).collect();
    assert_eq!(torn, Vec::<&str>::new());
    assert!(
        log.contains("lines dropped") && log.ends_with(" stdout F after\n"),
        "{}",
        &log[log.len() - 300..]
    );
}

#[tokio::test]
async fn no_line_is_lost_or_moved_by_reopening_the_log() {
    if !able() {
        return;
    }
    let node = Node::new().await;
    node.ready(|_| {}).await;
    let id = node
        .run(&["sh", "-c", "i=0; while [ $i -lt 30000 ]; do echo $i; i=$((i+1)); done; printf end"])
        .await;
    let log = node.logs.join(format!("{id}.log"));
    let mut rotated = Vec::new();
    while read_container(&node.paths, &id).unwrap().unwrap().exit.is_none() && rotated.len() < 200 {
        let name = node.logs.join(format!("rotated-{}", rotated.len()));
        fs::rename(&log, &name).unwrap();
        let request = ReopenLogRequest { container: id.to_string(), ..Default::default() };
        if node.client.reopen_log(ctx(), &request).await.is_ok() {
            assert!(log.exists());
        }
        rotated.push(name);
    }
    node.exited(&id).await;
    rotated.push(log);
    let all: String = rotated.iter().map(|path| fs::read_to_string(path).unwrap_or_default()).collect();
    let lines: Vec<_> = all.lines().map(|line| line.split_once(" stdout F ").unwrap().1).collect();
    assert_eq!(lines.len(), 30_001);
    assert!(lines[..30_000].iter().enumerate().all(|(i, line)| *line == i.to_string()));
    assert_eq!(lines[30_000], "end");
}

#[tokio::test]
async fn calls_may_be_repeated_and_come_at_any_time() {
    if !able() {
        return;
    }
    let mut node = Node::new().await;
    let runtime = slow_runtime(&node, "sleep 0.2", "");
    let early = node.client.create_container(ctx(), &node.request(&ContainerId::generate(), &["true"])).await;
    assert_eq!(code(&early.unwrap_err()).0, ttrpc::Code::FAILED_PRECONDITION);
    let detached = Network { phase: NetworkPhase::NETWORK_DETACHED.into(), ..Default::default() };
    let detach = SetNetworkRequest { network: Some(detached).into(), ..Default::default() };
    let early = node.client.set_network(ctx(), &detach).await;
    assert_eq!(code(&early.unwrap_err()).0, ttrpc::Code::FAILED_PRECONDITION);
    node.ready(|request| request.runtime.as_mut().unwrap().binary = runtime).await;

    // The pod ends while a container is made: that one is ended too, and what comes later is refused.
    let id = ContainerId::generate();
    let late = node.request(&ContainerId::generate(), &["sleep", "1000"]);
    let request = node.request(&id, &["sleep", "1000"]);
    let started = StartContainerRequest { container: id.to_string(), ..Default::default() };
    let (created, first, second, late, unknown) = tokio::join!(
        node.client.create_container(ctx(), &request),
        async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            node.client.set_network(ctx(), &detach).await
        },
        async {
            tokio::time::sleep(Duration::from_millis(120)).await;
            node.client.set_network(ctx(), &detach).await
        },
        async {
            tokio::time::sleep(Duration::from_millis(140)).await;
            node.client.create_container(ctx(), &late).await
        },
        async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            node.client
                .start_container(
                    ctx(),
                    &StartContainerRequest {
                        container: ContainerId::generate().to_string(),
                        ..started.clone()
                    },
                )
                .await
        },
    );
    created.unwrap();
    first.unwrap();
    second.unwrap();
    assert_eq!(code(&late.unwrap_err()).0, ttrpc::Code::FAILED_PRECONDITION);
    assert_eq!(code(&unknown.unwrap_err()).0, ttrpc::Code::NOT_FOUND);
    node.shim_exits();
    let state = read_pod(&node.paths).unwrap().unwrap();
    assert_eq!(state.containers.len(), 1);
    assert_eq!((state.containers[0].exit.code, state.containers[0].started_at_ns), (137, 0));
    remove_and_check(&node, "stopped").await;
}

#[tokio::test]
async fn a_pod_is_removed_while_its_containers_are_made_started_and_stopped() {
    if !able() {
        return;
    }
    let mut node = Node::new().await;
    let runtime = slow_runtime(&node, "sleep 0.1", "");
    node.ready(|request| request.runtime.as_mut().unwrap().binary = runtime).await;
    let (made, running) =
        (node.create(&["sleep", "1000"]).await, node.run(&["sh", "-c", "trap '' TERM; sleep 1000"]).await);
    let request = node.request(&ContainerId::generate(), &["sleep", "1000"]);
    let begun = Instant::now();
    let (_, _, _, _, removed) = tokio::join!(
        node.client.create_container(ctx(), &request),
        node.start(&made),
        node.stop(&running, 60_000),
        node.exec(&running, &["sleep", "1000"], 0),
        async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            node.client.remove_pod(ctx(), &RemovePodRequest::default()).await
        }
    );
    removed.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    node.shim_exits();
    assert!(processes_of(&node).is_empty(), "{:#?}", processes_of(&node));
    node.check_clean(false);
}

#[tokio::test]
async fn a_pod_that_cannot_be_made_leaves_the_shim_where_it_was_and_nothing_behind() {
    if !able() {
        return;
    }
    let mut node = Node::new().await;
    let namespaces = |pid: u32| {
        ["net", "ipc", "uts", "pid", "pid_for_children", "mnt"]
            .map(|name| fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap())
    };
    let host = namespaces(std::process::id());
    let mut request = CreatePodRequest {
        pod: node.id.to_string(),
        new_net: true,
        new_ipc: true,
        new_uts: true,
        shared_pid: true,
        shm_bytes: 1 << 20,
        files: vec![ocid_api::shim::File { name: "hosts".to_owned(), mode: 0o644, ..Default::default() }],
        runtime: Some(Runtime {
            binary: RUNC.to_owned(),
            root: "/tmp/none".to_owned(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    for (name, value) in
        [("net.ipv4.no_such_thing", "1"), ("net.ipv4.ip_forward", "x"), ("kernel.shm_rmid_forced", "x")]
    {
        request.sysctls = [(name.to_owned(), value.to_owned())].into();
        let error = node.client.create_pod(ctx(), &request).await.unwrap_err();
        assert_eq!(code(&error).0, ttrpc::Code::INVALID_ARGUMENT, "{error:?}");
        assert_eq!(namespaces(node.shim.id()), host, "{name}");
        assert_eq!(node.mounts(), Vec::<String>::new(), "{name}");
        assert!(
            !node.paths.record().exists()
                && !node.paths.namespaces().exists()
                && !node.paths.files().exists()
        );
    }
    node.ready(|request| request.shared_pid = true).await;
    assert_eq!(namespaces(node.shim.id()), host);
    node.client.remove_pod(ctx(), &RemovePodRequest::default()).await.unwrap();
    node.shim_exits();
    node.check_clean(false);
}

#[tokio::test]
async fn a_terminal_is_logged_until_its_container_exits() {
    if !able() {
        return;
    }
    let node = Node::new().await;
    node.ready(|_| {}).await;
    let id = ContainerId::generate();
    let script = ["sh", "-c", "echo one; echo two >&2; printf end; exit 6"];
    let mut request = node.request(&id, &script);
    let mut config = node.config(&id, &script);
    config["process"]["terminal"] = json!(true);
    config["mounts"].as_array_mut().unwrap().push(json!(
        { "destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"] }
    ));
    request.config = serde_json::to_vec(&config).unwrap();
    request.stdio.as_mut().unwrap().tty = true;
    node.client.create_container(ctx(), &request).await.unwrap();
    node.start(&id).await.unwrap();
    assert_eq!(node.exited(&id).await.exit.code, 6);
    let log = node.log(&id);
    let text: Vec<_> = log.lines().map(|line| line.split_once(" stdout F ").unwrap().1.trim_end()).collect();
    assert_eq!(text, ["one", "two", "end"]);
}

#[tokio::test]
async fn an_exit_before_the_runtime_returns_is_not_lost() {
    if !able() {
        return;
    }
    let node = Node::new().await;
    // Longer than the collector of orphans waits; and an init that does not see the end of its create.
    let after =
        "for word; do case $last in --pid-file) file=$word;; esac; last=$word; verb=\"$verb $word\"; done
        case $verb in *' exec '*) sleep 1.5;; *' create '*doomed*) kill -9 $(cat $file); sleep 1.5;; esac";
    let after = after.replace("doomed", "dddddddd");
    let runtime = slow_runtime(&node, "", &after);
    node.ready(|request| request.runtime.as_mut().unwrap().binary = runtime).await;
    let id = node.run(&["sleep", "1000"]).await;
    let (a, b, c) = tokio::join!(
        node.exec(&id, &["sh", "-c", "exit 9"], 0),
        async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            node.exec(&id, &["sh", "-c", "echo b; kill -9 $$"], 0).await
        },
        async {
            tokio::time::sleep(Duration::from_millis(600)).await;
            node.exec(&id, &["sh", "-c", "exit 11"], 0).await
        },
    );
    assert_eq!((a.unwrap().0, b.unwrap().0, c.unwrap().0), (9, 137, 11));

    let doomed: ContainerId = "d".repeat(64).parse().unwrap();
    let request = node.request(&doomed, &["sleep", "1000"]);
    node.client.create_container(ctx(), &request).await.unwrap();
    let state = node.exited(&doomed).await;
    assert_eq!((state.exit.code, state.exit.signal, state.started_at_ns), (137, 9, 0));
    assert_eq!(code(&node.start(&doomed).await.unwrap_err()).0, ttrpc::Code::FAILED_PRECONDITION);
    node.remove(&doomed).await;
}

#[tokio::test]
async fn the_init_of_a_shared_pid_namespace_shows_nothing_of_the_host() {
    if !able() {
        return;
    }
    let node = Node::new().await;
    node.ready(|request| request.shared_pid = true).await;
    let id = ContainerId::generate();
    let script = "echo root /proc/1/root/*; echo cwd /proc/1/cwd/*; cat /proc/1/status; exec sleep 1000";
    let mut request = node.request(&id, &["sh", "-c", script]);
    let mut config = node.config(&id, &["sh", "-c", script]);
    config["linux"]["namespaces"][0]["path"] = json!(node.paths.namespaces().join("pid"));
    // What a debugging container gets.
    for set in ["bounding", "effective", "permitted"] {
        config["process"]["capabilities"][set] =
            json!(["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_SYS_CHROOT"]);
    }
    request.config = serde_json::to_vec(&config).unwrap();
    node.client.create_container(ctx(), &request).await.unwrap();
    node.start(&id).await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while !node.log(&id).contains("nonvoluntary") && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let log = node.log(&id);
    assert!(log.contains("root /proc/1/root/*") && log.contains("cwd /proc/1/cwd/*"), "{log}");
    assert!(log.contains("Name:\tocid-pause") && log.contains("CapPrm:\t0000000000000000"), "{log}");
    let pause = fs::read_to_string(format!("/proc/{0}/task/{0}/children", node.shim.id())).unwrap();
    let pause: Vec<u32> = pause.split_ascii_whitespace().map(|pid| pid.parse().unwrap()).collect();
    let namespace = |pid: u32, name: &str| fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
    let container = read_container(&node.paths, &id).unwrap().unwrap().pid;
    let pause = pause.into_iter().find(|pid| *pid != container).unwrap();
    for name in ["net", "ipc", "uts", "pid"] {
        assert_eq!(namespace(pause, name), namespace(container, name), "{name}");
    }
    assert_ne!(namespace(pause, "mnt"), namespace(std::process::id(), "mnt"));
    for fd in fs::read_dir(format!("/proc/{pause}/fd")).unwrap().flatten() {
        assert_eq!(fs::read_link(fd.path()).unwrap(), Path::new("/dev/null"));
    }
}

#[tokio::test]
async fn a_runtime_that_hangs_is_ended_with_what_it_has_begun() {
    if !able() {
        return;
    }
    let node = Node::new().await;
    let hang = "for word; do case $word in exec|update) sleep 7776 & sleep 7776;; esac; done";
    let runtime = slow_runtime(&node, hang, "");
    node.ready(|request| {
        let runtime_of = request.runtime.as_mut().unwrap();
        (runtime_of.binary, runtime_of.timeout_ms) = (runtime, 3000);
    })
    .await;
    let id = node.run(&["sleep", "1000"]).await;
    let error = node.exec(&id, &["true"], 0).await.unwrap_err();
    assert_eq!(code(&error).0, ttrpc::Code::DEADLINE_EXCEEDED);
    let left = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .any(|entry| fs::read(entry.path().join("cmdline")).is_ok_and(|line| line == b"sleep\x007776\0"));
    assert!(!left);
    node.stop(&id, 0).await.unwrap();
}

#[tokio::test]
async fn a_container_that_has_exited_holds_no_descriptor() {
    if !able() {
        return;
    }
    let node = Node::new().await;
    node.ready(|_| {}).await;
    let before = fds(&node); // perhaps with a file that is being flushed
    for _ in 0..3 {
        let id = ContainerId::generate();
        let mut request = node.request(&id, &["echo", "x"]);
        request.stdio.as_mut().unwrap().stdin = true;
        node.client.create_container(ctx(), &request).await.unwrap();
        node.start(&id).await.unwrap();
        node.exited(&id).await;
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    while fds(&node) > before && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let after = fds(&node);
    assert!(after <= before, "{after} descriptors, {before} before");
}
