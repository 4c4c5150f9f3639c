//! A shim that dies takes its pod with it, visibly and wholly, and nothing else.

use std::time::Duration;

use harness::process::{runs, signal};
use harness::{Node, Setup, test};
use nix::sys::signal::Signal;
use ocid_api::cri::{ContainerState, PodSandboxState};

const SEEN_WITHIN: Duration = Duration::from_secs(2);

async fn is_dead(node: &Node, pod: &str, container: &str, pid: u32) {
    harness::eventually(SEEN_WITHIN, "the pod is seen dead", async || {
        let pod = node.client().pod_status(pod).await.map_err(|e| e.to_string())?.state();
        let status = node.client().container_status(container).await.map_err(|e| e.to_string())?;
        let dead =
            pod == PodSandboxState::SandboxNotready && status.state() == ContainerState::ContainerExited;
        if !dead || runs(pid) {
            return Err(format!("{pod:?}, {:?}, running: {}", status.state(), runs(pid)));
        }
        assert!(!status.reason.is_empty() && status.exit_code != 0 && status.finished_at > 0, "{status:?}");
        Ok(())
    })
    .await;
}

#[test]
fn its_pod_ends_and_can_be_removed_and_others_run_on() {
    test(Setup::default(), async |node| {
        let (pod, id) = node.run("dies", &["sh", "-c", "sleep 9191 & sleep 9191"]).await;
        let (_, other) = node.run("lives", &["sleep", "1000"]).await;
        let (pid, other_pid) =
            (node.client().pid(&id).await.unwrap(), node.client().pid(&other).await.unwrap());
        signal(node.shim_pid(&pod), Signal::SIGKILL);
        is_dead(node, &pod, &id, pid).await;
        let left = harness::process::all().into_iter().find(|p| p.cmdline == "sleep 9191");
        assert!(left.is_none(), "{left:?}");
        assert_eq!(node.client().pid(&other).await.unwrap(), other_pid);
        assert_eq!(node.client().shell(&other, "echo alive").await, "alive");
        assert!(node.client().exec(&id, &["true"]).await.is_err());
        node.client().stop(&id, 0).await.unwrap();
        node.client().remove(&id).await.unwrap();
        node.client().stop_pod(&pod).await.unwrap();
        node.client().stop_pod(&pod).await.unwrap();
        node.client().remove_pod(&pod).await.unwrap();
        assert_eq!(node.network.reserved().len(), 1, "its address is free again");
    });
}

#[test]
fn a_shim_that_died_with_the_daemon_is_found_dead() {
    test(Setup::default(), async |node| {
        let (pod, id) = node.run("dies", &["sleep", "1000"]).await;
        let pid = node.client().pid(&id).await.unwrap();
        let shim = node.shim_pid(&pod);
        node.kill();
        signal(shim, Signal::SIGKILL);
        node.start().await;
        is_dead(node, &pod, &id, pid).await;
        node.client().remove_pod(&pod).await.unwrap();
    });
}

#[test]
fn a_recorded_exit_outlives_its_shim() {
    test(Setup::default(), async |node| {
        let (pod, id) = node.run("done", &["sh", "-c", "exit 42"]).await;
        let before = node.client().exited(&id).await;
        signal(node.shim_pid(&pod), Signal::SIGKILL);
        harness::eventually(SEEN_WITHIN, "the pod is seen dead", async || {
            let state = node.client().pod_status(&pod).await.map_err(|e| e.to_string())?.state();
            if state == PodSandboxState::SandboxNotready { Ok(()) } else { Err(format!("{state:?}")) }
        })
        .await;
        let after = node.client().container_status(&id).await.unwrap();
        assert_eq!(
            (after.exit_code, after.finished_at, after.reason),
            (42, before.finished_at, before.reason)
        );
    });
}

#[test]
fn a_frozen_shim_holds_up_only_its_own_pod() {
    test(Setup::default(), async |node| {
        let (pod, id) = node.run("frozen", &["sleep", "1000"]).await;
        let (_, other) = node.run("lives", &["sleep", "1000"]).await;
        let shim = node.shim_pid(&pod);
        signal(shim, Signal::SIGSTOP);
        let took = node.restart().await;
        assert!(took < Duration::from_secs(5), "{took:?}");
        // What is recorded stands: a frozen shim must not make kubelet kill a healthy pod.
        let status = node.client().container_status(&id).await.unwrap();
        assert_eq!(status.state(), ContainerState::ContainerRunning);
        assert_eq!(node.client().pods().await.unwrap().len(), 2);
        assert_eq!(node.client().shell(&other, "echo alive").await, "alive");
        signal(shim, Signal::SIGCONT);
        harness::eventually(Duration::from_secs(20), "the shim is found again", async || {
            let answer = node.client().exec_for(&id, &["true"], 5).await.map_err(|e| e.to_string())?;
            if answer.exit_code == 0 { Ok(()) } else { Err(format!("{answer:?}")) }
        })
        .await;
    });
}

#[test]
fn a_shim_killed_while_its_pod_is_stopping_stops_it_all_the_same() {
    test(Setup::default(), async |node| {
        let (pod, id) = node.run("deaf", &["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"]).await;
        let pid = node.client().pid(&id).await.unwrap();
        let shim = node.shim_pid(&pod);
        let (client, target) = (node.client().clone(), id.clone());
        let stopping = tokio::spawn(async move { client.stop(&target, 60).await });
        tokio::time::sleep(Duration::from_millis(500)).await;
        signal(shim, Signal::SIGKILL);
        // The call may fail or succeed; it must end.
        let _ = tokio::time::timeout(Duration::from_secs(10), stopping).await.expect("the call ends");
        is_dead(node, &pod, &id, pid).await;
        node.client().stop(&id, 0).await.unwrap();
    });
}

#[test]
fn stopping_a_pod_whose_shim_is_frozen_fails_in_time_and_says_why() {
    test(Setup::default(), async |node| {
        std::fs::write(node.path().join("config.d/quick.toml"), "[shim]\ncall_timeout_s = 2\n").unwrap();
        node.restart().await;
        let (pod, id) = node.run("frozen", &["sleep", "1000"]).await;
        let shim = node.shim_pid(&pod);
        signal(shim, Signal::SIGSTOP);
        let begun = std::time::Instant::now();
        let (stopped, ran, stopped_pod) = tokio::join!(
            node.client().stop(&id, 0),
            node.client().exec_for(&id, &["true"], 1),
            node.client().stop_pod(&pod)
        );
        let took = begun.elapsed();
        for status in [stopped.unwrap_err(), ran.unwrap_err(), stopped_pod.unwrap_err()] {
            assert_eq!(status.code(), tonic::Code::DeadlineExceeded, "{status:?}");
            assert!(status.message().contains("frozen"), "{status:?}");
        }
        assert!(took < Duration::from_secs(15), "{took:?}");
        signal(shim, Signal::SIGCONT);
        node.client().stop_pod(&pod).await.unwrap();
        node.client().remove_pod(&pod).await.unwrap();
    });
}
