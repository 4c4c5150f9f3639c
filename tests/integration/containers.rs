//! Containers: create, start, stop, remove, how they end, and what is refused.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use harness::client::{container, refused, security};
use harness::{BUSYBOX, Node, Setup, test};
use ocid_api::cri::{
    Capability, ContainerConfig, ContainerFilter, ContainerState, ContainerStateValue, Int64Value, KeyValue,
    LinuxContainerResources, Mount,
};
use tonic::Code;

/// Runs a container to its end in a pod of its own and returns its log without the prefixes.
async fn output_of(node: &Node, config: &ContainerConfig) -> (i32, String) {
    let (_, id) = node.run_with(&node.pod("output"), config).await;
    let status = node.client().exited(&id).await;
    let log = node.log(&id).await;
    let text: Vec<&str> = log.lines().filter_map(|line| line.splitn(4, ' ').nth(3)).collect();
    (status.exit_code, text.join("\n"))
}

#[test]
fn a_container_lives_its_life() {
    test(Setup::default(), async |node| {
        let client = node.client();
        let pod_config = node.pod("life");
        let pod = client.run_pod(&pod_config).await.unwrap();
        let mut config = container("main", BUSYBOX, &["sleep", "1000"]);
        config.annotations.insert("a".into(), "b".into());
        let id = client.create(&pod, &config, &pod_config).await.unwrap();

        let created = client.container_status(&id).await.unwrap();
        assert_eq!(created.state(), ContainerState::ContainerCreated);
        assert!(created.created_at > 0 && created.started_at == 0 && created.finished_at == 0);
        assert_eq!((created.metadata, created.labels), (config.metadata.clone(), config.labels.clone()));
        assert_eq!(created.annotations, config.annotations);
        assert!(created.log_path.starts_with('/'));
        assert_eq!(created.image.unwrap().image, BUSYBOX);
        assert!(!created.image_ref.is_empty() && !created.image_id.is_empty());

        client.start(&id).await.unwrap();
        let running = client.container_status(&id).await.unwrap();
        assert_eq!(running.state(), ContainerState::ContainerRunning);
        assert!(running.started_at >= running.created_at);
        let pid = client.pid(&id).await.unwrap();
        assert!(harness::process::runs(pid));

        client.stop(&id, 0).await.unwrap();
        let exited = client.container_status(&id).await.unwrap();
        assert_eq!((exited.state(), exited.exit_code), (ContainerState::ContainerExited, 137));
        assert!(exited.finished_at >= exited.started_at);
        assert!(!harness::process::runs(pid));
        client.stop(&id, 0).await.unwrap();
        refused(client.start(&id).await, &[Code::FailedPrecondition]);

        for _ in 0..2 {
            client.remove(&id).await.unwrap();
        }
        refused(client.container_status(&id).await, &[Code::NotFound]);
        assert!(client.containers().await.unwrap().is_empty());
    });
}

#[test]
fn exit_codes_and_reasons_are_exact() {
    test(Setup::default(), async |node| {
        let client = node.client();
        let pod_config = node.pod("exits");
        let pod = client.run_pod(&pod_config).await.unwrap();
        for (name, command, code, reason) in [
            ("zero", "exit 0", 0, "Completed"),
            ("seven", "exit 7", 7, "Error"),
            ("max", "exit 255", 255, "Error"),
            ("term", "trap 'exit 143' TERM; kill $$; sleep 5", 143, "Error"),
        ] {
            let id = client
                .run(&pod, &container(name, BUSYBOX, &["sh", "-c", command]), &pod_config)
                .await
                .unwrap();
            let status = client.exited(&id).await;
            assert_eq!((status.exit_code, status.reason.as_str()), (code, reason), "{name}");
        }
    });
}

#[test]
fn a_container_that_ends_at_once_is_neither_lost_nor_still_running() {
    test(Setup::default(), async |node| {
        let client = node.client();
        let pod_config = node.pod("short");
        let pod = client.run_pod(&pod_config).await.unwrap();
        for attempt in 0..20 {
            let mut config = container("short", BUSYBOX, &["sh", "-c", "echo hello; exit 3"]);
            config.metadata.as_mut().unwrap().attempt = attempt;
            config.log_path = format!("short/{attempt}.log");
            let id = client.run(&pod, &config, &pod_config).await.unwrap();
            let status = client.exited(&id).await;
            assert_eq!(status.exit_code, 3);
            assert!(status.started_at > 0 && status.finished_at >= status.started_at);
            assert!(node.log(&id).await.ends_with("stdout F hello\n"));
        }
    });
}

#[test]
fn stop_gives_the_time_it_was_told_to_and_no_more() {
    test(Setup::default(), async |node| {
        let client = node.client();
        let pod_config = node.pod("stop");
        let pod = client.run_pod(&pod_config).await.unwrap();
        let graceful = "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.05; done";
        let deaf = "trap '' TERM; echo up; while :; do sleep 0.05; done";
        for (name, script, timeout, code, at_least, at_most) in
            [("graceful", graceful, 30, 0, 0, 5), ("deaf", deaf, 1, 137, 1, 6), ("now", deaf, 0, 137, 0, 3)]
        {
            let id = client
                .run(&pod, &container(name, BUSYBOX, &["sh", "-c", script]), &pod_config)
                .await
                .unwrap();
            harness::eventually(Duration::from_secs(10), "it is up", async || {
                if node.log(&id).await.contains("up") { Ok(()) } else { Err("no log".to_owned()) }
            })
            .await;
            let begun = Instant::now();
            client.stop(&id, timeout).await.unwrap();
            let took = begun.elapsed();
            assert_eq!(client.container_status(&id).await.unwrap().exit_code, code, "{name}");
            assert!(
                took >= Duration::from_secs(at_least) && took < Duration::from_secs(at_most),
                "{name}: {took:?}"
            );
        }
    });
}

#[test]
fn a_shorter_stop_shortens_a_longer_one() {
    test(Setup::default(), async |node| {
        let (_, id) = node.run("deaf", &["sh", "-c", "trap '' TERM; while :; do sleep 0.05; done"]).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        let (client, other) = (node.client().clone(), id.clone());
        let long = tokio::spawn(async move { client.stop(&other, 60).await });
        tokio::time::sleep(Duration::from_millis(300)).await;
        let begun = Instant::now();
        node.client().stop(&id, 1).await.unwrap();
        long.await.unwrap().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    });
}

#[test]
fn a_command_that_cannot_run_is_an_error_that_names_it() {
    test(Setup::default(), async |node| {
        let client = node.client();
        let pod_config = node.pod("bad");
        let pod = client.run_pod(&pod_config).await.unwrap();
        for (name, command) in [("absent", "/no/such/program"), ("plain", "/etc/passwd"), ("dir", "/etc")] {
            let config = container(name, BUSYBOX, &[command]);
            // The runtime may find out at create or at start.
            match client.create(&pod, &config, &pod_config).await {
                Err(status) => assert!(status.message().contains(command), "{status:?}"),
                Ok(id) => {
                    let said = refused(
                        client.start(&id).await,
                        &[
                            Code::InvalidArgument,
                            Code::FailedPrecondition,
                            Code::Internal,
                            Code::NotFound,
                            Code::Unknown,
                        ],
                    );
                    assert!(said.contains(command), "{said:?} does not name {command}");
                    let status = client.container_status(&id).await.unwrap();
                    assert_eq!((status.state(), status.exit_code), (ContainerState::ContainerExited, 128));
                    assert!(!status.reason.is_empty());
                }
            }
        }
    });
}

#[test]
fn bad_containers_are_refused_and_leave_nothing() {
    test(Setup::default(), async |node| {
        let client = node.client();
        let pod_config = node.pod("bad");
        let pod = client.run_pod(&pod_config).await.unwrap();
        let base = || container("bad", BUSYBOX, &["true"]);
        let change = |f: &dyn Fn(&mut ContainerConfig)| {
            let mut config = base();
            f(&mut config);
            config
        };
        let mount = |host: &str, inside: &str| Mount {
            host_path: host.into(),
            container_path: inside.into(),
            ..Default::default()
        };
        for (what, config) in [
            ("no metadata", change(&|c| c.metadata = None)),
            ("no name", change(&|c| c.metadata.as_mut().unwrap().name.clear())),
            ("no image", change(&|c| c.image = None)),
            ("absent image", container("bad", "registry.test/absent:1", &["true"])),
            ("hostile image", container("bad", "../../etc/passwd", &["true"])),
            ("absent host path", change(&|c| c.mounts = vec![mount("/no/such/path", "/x")])),
            ("relative container path", change(&|c| c.mounts = vec![mount("/tmp", "../../x")])),
            ("unknown user", change(&|c| security(c).run_as_username = "nobody-knows".into())),
            ("group without user", change(&|c| security(c).run_as_group = Some(Int64Value { value: 5 }))),
            (
                "unknown capability",
                change(&|c| {
                    security(c).capabilities =
                        Some(Capability { add_capabilities: vec!["NO_SUCH".into()], ..Default::default() });
                }),
            ),
            ("log outside", change(&|c| c.log_path = "../../../../tmp/evil.log".into())),
        ] {
            let result = client.create(&pod, &config, &pod_config).await;
            assert!(result.is_err(), "{what} was accepted");
            refused(
                result,
                &[Code::InvalidArgument, Code::NotFound, Code::FailedPrecondition, Code::Internal],
            );
        }
        refused(
            client.create(&"0".repeat(64), &base(), &pod_config).await,
            &[Code::NotFound, Code::FailedPrecondition],
        );
        assert!(client.containers().await.unwrap().is_empty(), "a refused container is listed");
        // The name is free for one that is right.
        client.run(&pod, &base(), &pod_config).await.unwrap();
    });
}

#[test]
fn unknown_containers_are_not_found_but_may_be_stopped_and_removed() {
    test(Setup::default(), async |node| {
        let client = node.client();
        for id in ["0".repeat(64).as_str(), "nonsense", "../x"] {
            refused(client.container_status(id).await, &[Code::NotFound, Code::InvalidArgument]);
            refused(client.start(id).await, &[Code::NotFound, Code::InvalidArgument]);
            refused(client.exec(id, &["true"]).await, &[Code::NotFound, Code::InvalidArgument]);
            refused(client.reopen_log(id).await, &[Code::NotFound, Code::InvalidArgument]);
            client.stop(id, 0).await.unwrap();
            client.remove(id).await.unwrap();
        }
    });
}

#[test]
fn filters_name_state_pod_and_label() {
    test(Setup::default(), async |node| {
        let client = node.client();
        let (pod, running) = node.run("one", &["sleep", "1000"]).await;
        let (_, exited) = node.run("two", &["true"]).await;
        client.exited(&exited).await;
        let with = async |filter: ContainerFilter| -> Vec<String> {
            client.containers_where(filter).await.unwrap().into_iter().map(|c| c.id).collect()
        };
        let state = Some(ContainerStateValue { state: ContainerState::ContainerExited.into() });
        assert_eq!(
            with(ContainerFilter { state, ..Default::default() }).await,
            std::slice::from_ref(&exited)
        );
        let of_pod = ContainerFilter { pod_sandbox_id: pod[..12].to_owned(), ..Default::default() };
        assert_eq!(with(of_pod.clone()).await, std::slice::from_ref(&running));
        assert!(with(ContainerFilter { state, ..of_pod }).await.is_empty());
        let label = BTreeMap::from([("io.kubernetes.container.name".to_owned(), "other".to_owned())]);
        assert!(with(ContainerFilter { label_selector: label, ..Default::default() }).await.is_empty());
        assert_eq!(
            with(ContainerFilter { id: running[..13].to_owned(), ..Default::default() }).await,
            [running]
        );
    });
}

#[test]
fn the_process_is_what_was_asked_for() {
    test(Setup::default(), async |node| {
        let mut config = container("p", BUSYBOX, &["sh", "-c"]);
        config.args = vec!["id -u; id -g; id -G; pwd; echo $A; echo $PATH; cat /proc/self/oom_score_adj; umask; exec grep -E '^(SigBlk|NoNewPrivs)' /proc/self/status".into()];
        config.working_dir = "/made/for/this".into();
        config.envs = vec![
            KeyValue { key: "A".into(), value: b"first".to_vec() },
            KeyValue { key: "A".into(), value: b"last".to_vec() },
        ];
        let security = security(&mut config);
        security.run_as_user = Some(Int64Value { value: 33 });
        security.run_as_group = Some(Int64Value { value: 44 });
        security.supplemental_groups = vec![55];
        security.no_new_privs = true;
        let (code, text) = output_of(node, &config).await;
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(code, 0, "{text}");
        assert_eq!(lines[..2], ["33", "44"]);
        assert!(
            lines[2].split(' ').any(|g| g == "55") && lines[2].split(' ').any(|g| g == "50"),
            "{}",
            lines[2]
        );
        assert_eq!(lines[3..5], ["/made/for/this", "last"]);
        assert!(lines[5].starts_with("/usr/local/sbin:"));
        assert_eq!(lines[7], "0022");
        assert!(text.contains("NoNewPrivs:\t1") && text.contains("SigBlk:\t0000000000000000"), "{text}");
        // Without a shell, which ignores SIGQUIT while it waits and leaves it so.
        let (_, text) =
            output_of(node, &container("q", BUSYBOX, &["grep", "SigIgn", "/proc/self/status"])).await;
        let ignored = text.trim().strip_prefix("SigIgn:\t").unwrap();
        // 32 and 33 are the C library's own: posix_spawn leaves them ignored, and who uses them sets them.
        let ignored = u64::from_str_radix(ignored, 16).unwrap() & !0x1_8000_0000;
        assert_eq!(ignored, 0, "an ignored signal was inherited: {text}");
    });
}

#[test]
fn nothing_of_the_daemon_reaches_a_container() {
    test(Setup::default(), async |node| {
        let script =
            "env | cut -d= -f1 | sort | tr '\\n' ' '; ls /proc/self/fd | wc -l; cat /proc/self/cgroup";
        let (_, text) = output_of(node, &container("c", BUSYBOX, &["sh", "-c", script])).await;
        let first = text.lines().next().unwrap();
        for name in ["CARGO", "OCID", "RUST", "NOTIFY", "LISTEN"] {
            assert!(!first.contains(name), "{first}");
        }
    });
}

#[test]
fn limits_reach_the_cgroup_and_the_status() {
    test(Setup::default(), async |node| {
        let mut config = container("limited", BUSYBOX, &["sleep", "1000"]);
        config.linux.as_mut().unwrap().resources = Some(LinuxContainerResources {
            memory_limit_in_bytes: 64 << 20,
            cpu_shares: 512,
            cpu_quota: 50_000,
            cpu_period: 100_000,
            oom_score_adj: 500,
            ..Default::default()
        });
        let (_, id) = node.run_with(&node.pod("limited"), &config).await;
        let pid = node.client().pid(&id).await.unwrap();
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        let version = ocid_api::cgroup::Version::detect().unwrap();
        let cgroup = ocid_api::cgroup::of_process(version, &text).unwrap();
        assert!(cgroup.starts_with(&node.cgroup), "{cgroup}");
        let file = match version {
            ocid_api::cgroup::Version::V1 => "memory.limit_in_bytes",
            ocid_api::cgroup::Version::V2 => "memory.max",
        };
        let limit = fs::read_to_string(version.dir("memory", cgroup).join(file)).unwrap();
        assert_eq!(limit.trim(), (64 << 20).to_string());
        assert_eq!(fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim(), "500");
        let resources = node.client().container_status(&id).await.unwrap().resources.unwrap().linux.unwrap();
        assert_eq!((resources.memory_limit_in_bytes, resources.cpu_quota), (64 << 20, 50_000));
    });
}

#[test]
fn a_container_killed_for_memory_says_so() {
    test(Setup::default(), async |node| {
        let mut config =
            container("hungry", BUSYBOX, &["sh", "-c", "dd if=/dev/zero of=/dev/null bs=200M count=1"]);
        // As init: the victim must be the container's first process.
        config.command = vec!["dd".into(), "if=/dev/zero".into(), "of=/dev/null".into(), "bs=200M".into()];
        config.linux.as_mut().unwrap().resources =
            Some(LinuxContainerResources { memory_limit_in_bytes: 16 << 20, ..Default::default() });
        let (_, id) = node.run_with(&node.pod("hungry"), &config).await;
        let status = node.client().exited(&id).await;
        assert_eq!((status.reason.as_str(), status.exit_code), ("OOMKilled", 137));
    });
}

#[test]
fn mounts_are_as_asked_and_removing_a_container_leaves_their_source() {
    test(Setup::default(), async |node| {
        let source = node.path().join("volume");
        fs::create_dir(&source).unwrap();
        fs::write(source.join("f"), "from the host").unwrap();
        let mount = |inside: &str, readonly| Mount {
            host_path: source.display().to_string(),
            container_path: inside.into(),
            readonly,
            ..Default::default()
        };
        let mut config = container("m", BUSYBOX, &["sleep", "1000"]);
        config.mounts = vec![mount("/rw", false), mount("/deep/ro", true)];
        let (_, id) = node.run_with(&node.pod("m"), &config).await;
        let client = node.client();
        assert_eq!(client.shell(&id, "cat /deep/ro/f; echo x > /rw/g").await, "from the host");
        let refused = client.exec(&id, &["sh", "-c", "echo x > /deep/ro/h"]).await.unwrap();
        assert_ne!(refused.exit_code, 0);
        assert_eq!(client.container_status(&id).await.unwrap().mounts.len(), 2);
        client.remove(&id).await.unwrap();
        assert_eq!(fs::read_to_string(source.join("g")).unwrap(), "x\n");
    });
}

#[test]
fn a_read_only_root_and_masked_paths_hold() {
    test(Setup::default(), async |node| {
        let mut config = container("ro", BUSYBOX, &["sleep", "1000"]);
        let security = security(&mut config);
        security.readonly_rootfs = true;
        security.masked_paths = vec!["/etc/group".into(), "/home".into()];
        security.readonly_paths = vec!["/tmp".into()];
        let (_, id) = node.run_with(&node.pod("ro"), &config).await;
        let client = node.client();
        for line in ["touch /x", "touch /tmp/x"] {
            let answer = client.exec(&id, &["sh", "-c", line]).await.unwrap();
            assert!(String::from_utf8_lossy(&answer.stderr).contains("Read-only file system"), "{line}");
        }
        assert_eq!(client.shell(&id, "wc -c < /etc/group; ls /home | wc -l").await, "0\n0");
    });
}

#[test]
fn a_stuck_descendant_does_not_outlive_its_container() {
    test(Setup::default(), async |node| {
        let (_, id) = node.run("fork", &["sh", "-c", "sleep 7777 & sleep 7777"]).await;
        node.client().stop(&id, 0).await.unwrap();
        let left = harness::process::all().into_iter().filter(|p| p.belongs_to("\u{0}", &node.cgroup, &[]));
        let sleepers: Vec<_> = left.filter(|p| p.cmdline.contains("sleep 7777")).collect();
        assert!(sleepers.is_empty(), "{sleepers:?}");
    });
}
