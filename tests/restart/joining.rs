//! Asking again joins what was asked before: one pod, one container, one network attachment.

use std::time::Duration;

use harness::client::{container, refused};
use harness::{BUSYBOX, Client, Setup, test};
use ocid_api::cri::PodSandboxState;
use tonic::Code;

const WITH_PLUGINS: Setup = Setup { busybox: true, cni: true, plugins: true, registry: false, start: true };

#[test]
fn two_identical_requests_at_once_make_one_pod() {
    test(WITH_PLUGINS, async |node| {
        node.plugins().set("bridge", "ADD", "sleep 2");
        let config = node.pod("once");
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..5 {
            let (client, config) = (node.client().clone(), config.clone());
            tasks.spawn(async move { client.run_pod(&config).await.unwrap() });
        }
        let ids = tasks.join_all().await;
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        assert_eq!(node.plugins().count("bridge", "ADD"), 1, "{:?}", node.plugins().calls());
        assert_eq!(node.client().pods().await.unwrap().len(), 1);
    });
}

#[test]
fn a_request_repeated_after_a_time_out_gets_the_first_ones_pod() {
    test(WITH_PLUGINS, async |node| {
        node.plugins().set("bridge", "ADD", "sleep 5");
        let config = node.pod("slow");
        let hasty = Client::with_timeout(&node.socket(), Duration::from_secs(1));
        refused(hasty.run_pod(&config).await, &[Code::DeadlineExceeded, Code::Cancelled]);
        let id = node.client().run_pod(&config).await.unwrap();
        assert_eq!(node.client().run_pod(&config).await.unwrap(), id, "a finished one is joined too");
        assert_eq!(node.plugins().count("bridge", "ADD"), 1, "{:?}", node.plugins().calls());
        assert_eq!(node.network.reserved().len(), 1);
        let pods = node.client().pods().await.unwrap();
        assert_eq!((pods.len(), pods[0].id.as_str()), (1, id.as_str()));
    });
}

#[test]
fn a_finished_pod_is_joined_across_a_restart() {
    test(WITH_PLUGINS, async |node| {
        let config = node.pod("again");
        let main = container("main", BUSYBOX, &["sleep", "1000"]);
        let (pod, id) = node.run_with(&config, &main).await;
        node.restart().await;
        assert_eq!(node.client().run_pod(&config).await.unwrap(), pod);
        assert_eq!(node.client().create(&pod, &main, &config).await.unwrap(), id);
        assert_eq!(node.plugins().count("bridge", "ADD"), 1);
        // Another attempt is another pod.
        let mut next = config.clone();
        next.metadata.as_mut().unwrap().attempt = 1;
        assert_ne!(node.client().run_pod(&next).await.unwrap(), pod);
    });
}

#[test]
fn a_daemon_killed_while_the_network_is_made_leaves_a_name_that_works() {
    test(WITH_PLUGINS, async |node| {
        node.plugins().set("bridge", "ADD", "sleep 2");
        let config = node.pod("cut");
        let (client, request) = (node.client().clone(), config.clone());
        let cut = tokio::spawn(async move { client.run_pod(&request).await });
        harness::eventually(Duration::from_secs(10), "the plugin runs", async || {
            if node.plugins().count("bridge", "ADD") == 1 { Ok(()) } else { Err("not yet".to_owned()) }
        })
        .await;
        node.kill();
        assert!(cut.await.unwrap().is_err());
        node.plugins().set("bridge", "ADD", "");
        node.start().await;
        let id = node.client().run_pod(&config).await.unwrap();
        assert_eq!(node.client().pod_status(&id).await.unwrap().state(), PodSandboxState::SandboxReady);
        harness::eventually(Duration::from_secs(15), "one pod, one address", async || {
            let (pods, reserved) = (node.client().pods().await.unwrap().len(), node.network.reserved());
            if pods == 1 && reserved.len() == 1 { Ok(()) } else { Err(format!("{pods} pods, {reserved:?}")) }
        })
        .await;
    });
}

#[test]
fn identical_containers_at_once_are_one() {
    test(Setup::default(), async |node| {
        let config = node.pod("twins");
        let pod = node.client().run_pod(&config).await.unwrap();
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..4 {
            let (client, config, pod) = (node.client().clone(), config.clone(), pod.clone());
            let main = container("main", BUSYBOX, &["sleep", "1000"]);
            tasks.spawn(async move { client.create(&pod, &main, &config).await.unwrap() });
        }
        let ids = tasks.join_all().await;
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        node.client().start(&ids[0]).await.unwrap();
        assert_eq!(node.client().containers().await.unwrap().len(), 1);
    });
}

#[test]
fn a_removed_name_is_free_at_once() {
    test(Setup::default(), async |node| {
        let config = node.pod("free");
        let main = container("main", BUSYBOX, &["sleep", "1000"]);
        let (pod, first) = node.run_with(&config, &main).await;
        node.client().remove(&first).await.unwrap();
        let second = node.client().run(&pod, &main, &config).await.unwrap();
        assert_ne!(first, second);
        node.client().remove_pod(&pod).await.unwrap();
        assert_ne!(node.client().run_pod(&config).await.unwrap(), pod);
    });
}
