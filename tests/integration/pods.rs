//! Pods: run, list, stop, remove, and what is refused.

use std::collections::BTreeMap;
use std::fs;

use harness::client::{container, namespaces, refused};
use harness::{BUSYBOX, Setup, test};
use ocid_api::cri::{
    ContainerState, NamespaceMode, PodSandboxFilter, PodSandboxState, PodSandboxStateValue,
    RunPodSandboxRequest,
};
use tonic::Code;

#[test]
fn the_daemon_says_who_it_is_and_that_it_is_ready() {
    test(Setup::default(), async |node| {
        let version = node.client().version().await.unwrap();
        assert_eq!((version.version.as_str(), version.runtime_name.as_str()), ("0.1.0", "ocid"));
        assert_eq!(version.runtime_api_version, "v1");
        let status = node.client().status().await.unwrap();
        let conditions: BTreeMap<String, bool> =
            status.status.unwrap().conditions.into_iter().map(|c| (c.r#type, c.status)).collect();
        assert!(conditions["RuntimeReady"] && conditions["NetworkReady"], "{conditions:?}");
        assert!(status.runtime_handlers.iter().any(|h| h.name.is_empty()), "no default handler");
        assert!(status.info.contains_key("config"), "verbose information has the configuration");
    });
}

#[test]
fn a_pod_lives_its_life() {
    test(Setup::default(), async |node| {
        let client = node.client();
        let mut config = node.pod("life");
        config.annotations.insert("note".into(), "kept \u{1F980} as it is\n".into());
        let id = client.run_pod(&config).await.unwrap();
        assert_eq!(id.len(), 64);

        let status = client.pod_status(&id).await.unwrap();
        assert_eq!(status.state(), PodSandboxState::SandboxReady);
        assert_eq!((status.labels, status.annotations), (config.labels.clone(), config.annotations.clone()));
        assert_eq!(status.metadata, config.metadata);
        assert!(status.created_at > 0);
        assert!(status.network.unwrap().ip.starts_with(&node.network.prefix));

        let listed = client.pods().await.unwrap();
        assert_eq!(listed.len(), 1);
        assert_eq!(listed[0].id, id);

        for _ in 0..2 {
            client.stop_pod(&id).await.unwrap();
        }
        assert_eq!(client.pod_status(&id).await.unwrap().state(), PodSandboxState::SandboxNotready);
        assert!(node.network.reserved().is_empty(), "a stopped pod holds no address");
        for _ in 0..2 {
            client.remove_pod(&id).await.unwrap();
        }
        refused(client.pod_status(&id).await, &[Code::NotFound]);
        assert!(client.pods().await.unwrap().is_empty());
    });
}

#[test]
fn removing_a_running_pod_ends_its_containers() {
    test(Setup::default(), async |node| {
        let (pod, id) = node.run("busy", &["sleep", "1000"]).await;
        let pid = node.client().pid(&id).await.unwrap();
        node.client().remove_pod(&pod).await.unwrap();
        assert!(!harness::process::runs(pid), "its process runs on");
        refused(node.client().container_status(&id).await, &[Code::NotFound]);
    });
}

#[test]
fn stopping_a_pod_keeps_what_kubelet_may_still_ask() {
    test(Setup::default(), async |node| {
        let (pod, id) = node.run("kept", &["sleep", "1000"]).await;
        node.client().stop_pod(&pod).await.unwrap();
        let status = node.client().container_status(&id).await.unwrap();
        assert_eq!((status.state(), status.exit_code), (ContainerState::ContainerExited, 137));
        let config = container("late", BUSYBOX, &["true"]);
        refused(
            node.client().create(&pod, &config, &node.pod("kept")).await,
            &[Code::FailedPrecondition, Code::NotFound],
        );
    });
}

#[test]
fn filters_are_all_of_them_and_prefixes_name_a_pod() {
    test(Setup::default(), async |node| {
        let client = node.client();
        let mut ids = Vec::new();
        for name in ["a", "b"] {
            let mut config = node.pod(name);
            config.labels.insert("tier".into(), name.into());
            ids.push(client.run_pod(&config).await.unwrap());
        }
        client.stop_pod(&ids[1]).await.unwrap();
        let with = async |filter: PodSandboxFilter| -> Vec<String> {
            client.pods_where(filter).await.unwrap().into_iter().map(|p| p.id).collect()
        };
        let ready = Some(PodSandboxStateValue { state: PodSandboxState::SandboxReady.into() });
        let label = BTreeMap::from([("tier".to_owned(), "b".to_owned())]);
        assert_eq!(with(PodSandboxFilter { state: ready, ..Default::default() }).await, ids[..1]);
        let by_label = PodSandboxFilter { label_selector: label.clone(), ..Default::default() };
        assert_eq!(with(by_label).await, ids[1..]);
        let both = PodSandboxFilter { state: ready, label_selector: label, ..Default::default() };
        assert!(with(both).await.is_empty());
        let by_id = |id: &str| PodSandboxFilter { id: id.to_owned(), ..Default::default() };
        assert_eq!(with(by_id(&ids[0][..12])).await, ids[..1]);
        assert!(with(by_id("ffffffffffffffff")).await.is_empty());
        assert_eq!(client.pod_status(&ids[0][..12]).await.unwrap().id, ids[0]);
        // An ambiguous prefix names nothing.
        if ids[0][..1] == ids[1][..1] {
            refused(client.pod_status(&ids[0][..1]).await, &[Code::InvalidArgument, Code::NotFound]);
        }
    });
}

#[test]
fn unknown_ids_are_not_found_but_may_be_stopped_and_removed() {
    test(Setup::default(), async |node| {
        let client = node.client();
        for id in ["0".repeat(64).as_str(), "nonsense", "../../etc", "deadbeef"] {
            refused(client.pod_status(id).await, &[Code::NotFound, Code::InvalidArgument]);
            client.stop_pod(id).await.unwrap();
            client.remove_pod(id).await.unwrap();
        }
    });
}

#[test]
fn bad_pods_are_refused_and_leave_nothing() {
    test(Setup::default(), async |node| {
        let client = node.client();
        let mut no_metadata = node.pod("x");
        no_metadata.metadata = None;
        let mut no_name = node.pod("x");
        no_name.metadata.as_mut().unwrap().name.clear();
        let mut no_uid = node.pod("x");
        no_uid.metadata.as_mut().unwrap().uid.clear();
        let mut user_namespace = node.pod("x");
        namespaces(&mut user_namespace).network = 99;
        let mut hostname = node.pod("x");
        hostname.hostname = "h".repeat(300);
        let mut escaping = node.pod("x");
        escaping.linux.as_mut().unwrap().cgroup_parent = "../../evil".into();
        let mut sysctl = node.pod("x");
        sysctl.linux.as_mut().unwrap().sysctls.insert("no.such.sysctl".into(), "1".into());
        for (what, config) in [
            ("no metadata", no_metadata),
            ("no name", no_name),
            ("no uid", no_uid),
            ("unknown namespace mode", user_namespace),
            ("long hostname", hostname),
            ("cgroup parent that leaves", escaping),
            ("unknown sysctl", sysctl),
        ] {
            let result = client.run_pod(&config).await;
            assert!(result.is_err(), "{what} was accepted");
            refused(result, &[Code::InvalidArgument, Code::FailedPrecondition, Code::Internal]);
        }
        let config = Some(node.pod("x"));
        let request = RunPodSandboxRequest { config, runtime_handler: "no-such-handler".into() };
        refused(client.runtime().run_pod_sandbox(request).await, &[Code::InvalidArgument, Code::NotFound]);
        refused(
            client.runtime().run_pod_sandbox(RunPodSandboxRequest::default()).await,
            &[Code::InvalidArgument],
        );
        assert!(client.pods().await.unwrap().is_empty(), "a refused pod is listed");
    });
}

#[test]
fn hostile_names_are_only_names() {
    test(Setup::default(), async |node| {
        let client = node.client();
        for name in ["../../../tmp/x", "a/b", "line\nbreak", "\u{0}nul", "$(reboot)", &"n".repeat(4000)] {
            let mut config = node.pod("hostile");
            config.metadata.as_mut().unwrap().name = name.to_owned();
            config.hostname = "hostile".into();
            // Accepted or refused, but never interpreted: the leak check looks for the rest.
            if let Ok(id) = client.run_pod(&config).await {
                assert_eq!(client.pod_status(&id).await.unwrap().metadata.unwrap().name, name);
            }
        }
    });
}

#[test]
fn a_pod_has_its_hostname_dns_and_namespaces() {
    test(Setup::default(), async |node| {
        let client = node.client();
        let mut config = node.pod("named");
        config.hostname = "web-0".into();
        config.dns_config = Some(ocid_api::cri::DnsConfig {
            servers: vec!["10.0.0.10".into()],
            searches: vec!["svc.cluster.local".into()],
            options: vec!["ndots:5".into()],
        });
        config
            .linux
            .as_mut()
            .unwrap()
            .sysctls
            .insert("net.ipv4.ip_unprivileged_port_start".into(), "7".into());
        let (pod, first) = node.run_with(&config, &container("one", BUSYBOX, &["sleep", "1000"])).await;
        let second = client.run(&pod, &container("two", BUSYBOX, &["sleep", "1000"]), &config).await.unwrap();
        assert_eq!(client.shell(&first, "hostname").await, "web-0");
        assert_eq!(
            client.shell(&first, "cat /etc/resolv.conf").await,
            "search svc.cluster.local\nnameserver 10.0.0.10\noptions ndots:5"
        );
        assert_eq!(client.shell(&first, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start").await, "7");
        for (namespace, shared) in
            [("net", true), ("ipc", true), ("uts", true), ("pid", false), ("mnt", false)]
        {
            let link = format!("readlink /proc/self/ns/{namespace}");
            let same = client.shell(&first, &link).await == client.shell(&second, &link).await;
            assert_eq!(same, shared, "{namespace}");
        }
        client.shell(&first, "echo x > /dev/shm/shared").await;
        assert_eq!(client.shell(&second, "cat /dev/shm/shared").await, "x");
    });
}

#[test]
fn containers_that_share_a_pid_namespace_see_each_other() {
    test(Setup::default(), async |node| {
        let mut config = node.pod("shared");
        namespaces(&mut config).pid = NamespaceMode::Pod.into();
        let mut one = container("one", BUSYBOX, &["sleep", "4321"]);
        harness::client::security(&mut one).namespace_options.as_mut().unwrap().pid =
            NamespaceMode::Pod.into();
        let mut two = one.clone();
        two.metadata.as_mut().unwrap().name = "two".into();
        two.command = vec!["sleep".into(), "1234".into()];
        two.log_path = "two/0.log".into();
        let (pod, first) = node.run_with(&config, &one).await;
        let second = node.client().run(&pod, &two, &config).await.unwrap();
        let seen = node.client().shell(&second, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '").await;
        assert!(seen.contains("sleep 4321") && seen.contains("sleep 1234"), "{seen}");
        // Orphans are collected by the pod's init.
        node.client().shell(&first, "(sleep 0.1 &) ; sleep 1").await;
        let states = node.client().shell(&first, "cat /proc/[0-9]*/stat | cut -d' ' -f3 | sort -u").await;
        assert!(!states.contains('Z'), "a zombie stays: {states}");
    });
}

#[test]
fn without_a_network_only_host_network_pods_start() {
    test(Setup { cni: false, ..Setup::default() }, async |node| {
        let client = node.client();
        let ready = async || {
            let conditions = client.status().await.unwrap().status.unwrap().conditions;
            conditions.into_iter().find(|c| c.r#type == "NetworkReady").unwrap()
        };
        let condition = ready().await;
        assert!(!condition.status);
        assert!(!condition.message.is_empty() && !condition.reason.is_empty());
        refused(
            client.run_pod(&node.pod("cluster")).await,
            &[Code::FailedPrecondition, Code::Unavailable, Code::Internal],
        );
        let mut config = node.pod("host");
        namespaces(&mut config).network = NamespaceMode::Node.into();
        let (_, id) = node.run_with(&config, &container("c", BUSYBOX, &["sleep", "1000"])).await;
        let link = fs::read_link("/proc/self/ns/net").unwrap();
        assert_eq!(client.shell(&id, "readlink /proc/self/ns/net").await, link.display().to_string());

        // A configuration that appears is noticed.
        fs::write(node.network.conf_file(), node.network.conflist()).unwrap();
        harness::eventually(std::time::Duration::from_secs(10), "the network is ready", async || {
            if ready().await.status { Ok(()) } else { Err("not yet".to_owned()) }
        })
        .await;
        client.run_pod(&node.pod("cluster")).await.unwrap();
    });
}
