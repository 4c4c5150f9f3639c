//! The daemon is killed at random instants while thirty clients make and unmake pods.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use harness::client::container;
use harness::{BUSYBOX, Client, Random, Setup, test};
use ocid_api::cri::PodSandboxConfig;
use tonic::Status;

const CLIENTS: usize = 30;
const KILLS: usize = 20;

/// One round of a pod's life, cut short at a random step.
async fn round(client: &Client, config: &PodSandboxConfig, random: &mut Random) -> Result<(), Status> {
    let pod = client.run_pod(config).await?;
    for name in ["a", "b"] {
        let id = client.create(&pod, &container(name, BUSYBOX, &["sleep", "1000"]), config).await?;
        client.start(&id).await?;
        if random.below(3) == 0 {
            client.stop(&id, 0).await?;
            client.remove(&id).await?;
        }
    }
    if random.below(4) > 0 {
        client.stop_pod(&pod).await?;
        client.remove_pod(&pod).await?;
    }
    Ok(())
}

#[test]
fn a_storm_with_twenty_kills_leaves_nothing() {
    test(Setup::default(), async |node| {
        let mut random = Random::seeded();
        let (over, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..CLIENTS {
            let (client, mut random) = (node.client().clone(), random.fork());
            let (over, rounds) = (over.clone(), rounds.clone());
            let mut config = node.pod(&format!("storm-{number}"));
            tasks.spawn(async move {
                while !over.load(Ordering::Relaxed) {
                    if round(&client, &config, &mut random).await.is_ok() {
                        rounds.fetch_add(1, Ordering::Relaxed);
                        // As kubelet does: a new sandbox of the same pod is a new attempt.
                        config.metadata.as_mut().unwrap().attempt += 1;
                    } else {
                        // The daemon is away, or this pod is half-made: the same request again, later.
                        tokio::time::sleep(
                            random.between(Duration::from_millis(10), Duration::from_millis(100)),
                        )
                        .await;
                    }
                }
            });
        }
        for kill in 0..KILLS {
            tokio::time::sleep(random.between(Duration::from_millis(20), Duration::from_millis(1500))).await;
            let took = node.restart().await;
            assert!(took < Duration::from_secs(5), "start {kill} took {took:?}");
        }
        over.store(true, Ordering::Relaxed);
        tasks.join_all().await;
        assert!(rounds.load(Ordering::Relaxed) > 0, "no pod ever came through: nothing was tested");
        // What the storm left can be stopped and removed; the leak check looks at the rest.
        node.client().remove_all(Duration::from_secs(90)).await.unwrap();
        assert!(node.client().containers().await.unwrap().is_empty());
        let (_, id) = node.run("after", &["sleep", "1000"]).await;
        assert_eq!(node.client().shell(&id, "echo calm").await, "calm");
    });
}

#[test]
fn a_storm_of_pulls_with_kills_ends_with_the_image() {
    let setup = Setup { registry: true, ..Setup::default() };
    test(setup, async |node| {
        let mut random = Random::seeded();
        let mut image = harness::Image::busybox();
        for number in 0..8 {
            let noise: Vec<u8> = (0..2 << 20).map(|_| u8::try_from(random.below(256)).unwrap()).collect();
            image = image.layer(harness::Layer::new().file(format!("noise/{number}"), 0o644, noise));
        }
        let built = image.build();
        node.registry().push(&built, "noise", "1");
        for _ in 0..8 {
            let client = node.client().clone();
            let pull = tokio::spawn(async move { client.pull("registry.test/noise:1").await });
            tokio::time::sleep(random.between(Duration::from_millis(5), Duration::from_millis(600))).await;
            node.restart().await;
            let _ = pull.await.unwrap();
            // Never present but broken.
            if node.client().image("registry.test/noise:1").await.unwrap().is_some() {
                let config = container("c", "registry.test/noise:1", &["sh", "-c", "cat /noise/* | wc -c"]);
                let (pod, id) = node.run_with(&node.pod("check"), &config).await;
                assert_eq!(node.client().exited(&id).await.exit_code, 0);
                assert!(node.log(&id).await.trim_end().ends_with(&(8 * (2 << 20)).to_string()));
                node.client().remove_pod(&pod).await.unwrap();
                node.client().remove_image("registry.test/noise:1").await.unwrap();
            }
        }
        assert_eq!(node.client().pull("registry.test/noise:1").await.unwrap(), built.id);
    });
}
