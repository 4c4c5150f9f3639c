//! Pod networks: addresses, port mappings, and plugins that fail, hang or talk nonsense.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use harness::client::{container, refused};
use harness::{BUSYBOX, Node, Setup, test};
use ocid_api::cri::{PodSandboxState, PortMapping};
use tonic::Code;

const WITH_PLUGINS: Setup = Setup { busybox: true, cni: true, plugins: true, registry: false, start: true };
const SERVER: [&str; 3] =
    ["sh", "-c", "mkdir /www; echo hello > /www/index.html; exec httpd -f -p 8080 -h /www"];

async fn get(address: &str) -> Result<String, String> {
    let address = address.to_owned();
    let fetch = move || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&address.parse().unwrap(), Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    };
    tokio::task::spawn_blocking(fetch).await.unwrap().map_err(|e| e.to_string())
}

async fn serves(address: &str) {
    harness::eventually(Duration::from_secs(15), address, async || {
        let text = get(address).await?;
        if text.contains("hello") { Ok(()) } else { Err(text) }
    })
    .await;
}

async fn address(node: &Node, pod: &str) -> String {
    node.client().pod_status(pod).await.unwrap().network.unwrap().ip
}

#[test]
fn pods_reach_each_other_and_the_host_reaches_them() {
    test(Setup::default(), async |node| {
        let (server, id) = node.run_with(&node.pod("server"), &container("c", BUSYBOX, &SERVER)).await;
        let (_, client) = node.run("client", &["sleep", "1000"]).await;
        let ip = address(node, &server).await;
        serves(&format!("{ip}:8080")).await;
        assert_eq!(node.client().shell(&client, &format!("wget -q -O - http://{ip}:8080/")).await, "hello");
        let own = node.client().shell(&id, "ip -o -4 addr show eth0").await;
        assert!(own.contains(&ip), "{own} does not have {ip}");
        assert!(
            node.client().shell(&id, "ip -o addr show lo").await.contains("127.0.0.1"),
            "loopback is down"
        );
        assert_eq!(node.network.reserved().len(), 2);
    });
}

#[test]
fn a_host_port_leads_into_the_pod_and_is_gone_with_it() {
    test(Setup::default(), async |node| {
        let port = harness::registry::free_address().port();
        let mut config = node.pod("server");
        config.port_mappings =
            vec![PortMapping { container_port: 8080, host_port: i32::from(port), ..Default::default() }];
        let (pod, _) = node.run_with(&config, &container("c", BUSYBOX, &SERVER)).await;
        // The plugin's rules match what leaves the host as well as the loopback.
        let gateway = format!("{}1:{port}", node.network.prefix);
        serves(&gateway).await;
        node.client().stop_pod(&pod).await.unwrap();
        assert!(get(&gateway).await.is_err(), "the port is still mapped");
    });
}

#[test]
fn a_plugin_that_fails_leaves_no_pod_and_no_address() {
    test(WITH_PLUGINS, async |node| {
        for plugin in ["bridge", "portmap"] {
            node.plugins().fail(plugin, "ADD");
            let mut config = node.pod("fails");
            config.port_mappings =
                vec![PortMapping { container_port: 80, host_port: 18080, ..Default::default() }];
            let said = refused(
                node.client().run_pod(&config).await,
                &[Code::Internal, Code::Unavailable, Code::FailedPrecondition, Code::Unknown],
            );
            assert!(said.contains("told to fail") && said.contains(plugin), "{said}");
            node.plugins().set(plugin, "ADD", "");
            node.client().remove_all(Duration::from_secs(10)).await.unwrap();
            assert!(node.network.reserved().is_empty(), "{plugin}: an address is still reserved");
        }
        // The same name works as soon as the plugin does.
        node.client().run_pod(&node.pod("fails")).await.unwrap();
    });
}

#[test]
fn nonsense_from_a_plugin_is_an_error() {
    test(WITH_PLUGINS, async |node| {
        for answer in
            ["exit 0", "echo '{}'; exit 0", "echo 'no json'; exit 0", "echo '[1'; exit 3", "kill -9 $$"]
        {
            node.plugins().set("bridge", "ADD", answer);
            let result = node.client().run_pod(&node.pod("nonsense")).await;
            assert!(result.is_err(), "{answer:?} was taken for a network");
        }
        node.plugins().set("bridge", "ADD", "head -c 50000000 /dev/zero | tr '\\0' x; exit 0");
        refused(
            node.client().run_pod(&node.pod("flood")).await,
            &[Code::Internal, Code::Unavailable, Code::ResourceExhausted, Code::Unknown],
        );
        node.plugins().set("bridge", "ADD", "");
    });
}

#[test]
fn a_failing_del_is_an_error_that_a_repetition_mends() {
    test(WITH_PLUGINS, async |node| {
        let id = node.client().run_pod(&node.pod("stuck")).await.unwrap();
        node.plugins().fail("bridge", "DEL");
        assert!(node.client().stop_pod(&id).await.is_err(), "the address is still reserved");
        assert_eq!(node.network.reserved().len(), 1);
        assert!(node.client().pods().await.unwrap().iter().any(|p| p.id == id), "it must not be forgotten");
        node.plugins().set("bridge", "DEL", "");
        node.client().stop_pod(&id).await.unwrap();
        assert!(node.network.reserved().is_empty());
        assert_eq!(node.client().pod_status(&id).await.unwrap().state(), PodSandboxState::SandboxNotready);
    });
}

#[test]
fn a_pod_is_detached_by_the_configuration_it_was_attached_with() {
    test(Setup::default(), async |node| {
        let id = node.client().run_pod(&node.pod("old")).await.unwrap();
        fs::remove_file(node.network.conf_file()).unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        node.restart().await;
        node.client().stop_pod(&id).await.unwrap();
        assert!(node.network.reserved().is_empty());
    });
}

#[test]
fn a_slow_plugin_holds_only_its_own_pod() {
    test(WITH_PLUGINS, async |node| {
        let (_, id) = node.run("there", &["sleep", "1000"]).await;
        node.plugins().set("bridge", "ADD", "sleep 3");
        let (client, config) = (node.client().clone(), node.pod("slow"));
        let slow = tokio::spawn(async move { client.run_pod(&config).await });
        tokio::time::sleep(Duration::from_millis(300)).await;
        let begun = Instant::now();
        node.client().pods().await.unwrap();
        node.client().status().await.unwrap();
        node.client().shell(&id, "true").await;
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
        slow.await.unwrap().unwrap();
        node.plugins().set("bridge", "ADD", "");
    });
}
